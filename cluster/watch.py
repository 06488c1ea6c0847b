"""What is looked at while a stage runs: nodes that join later, and demands that nothing will ever meet."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cluster.capacity import Actors, check_resources, encoders, search_actors
from cluster.nodes import NoAnswer, Node, check_storage, living_nodes, totals
from cluster.shape import check_places, machines_of
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say

if TYPE_CHECKING:
    from ray.core.generated.autoscaler_pb2 import AutoscalingState

LOOK_S = 5.0
"""From one look to the next, in seconds."""

INFEASIBLE_S = 120.0
"""How long an autoscaler may say that no group of nodes meets a demand before that is believed, in seconds:
it says so too while it does not know its groups yet."""

AGAIN_S = 60.0
"""After which a stage that went on is told to stop once more, in seconds: an interrupt in the middle of a
callback may be lost."""

STOP = signal.SIGUSR2
"""Stops the stage. Not SIGINT, which is ignored in what a shell runs in the background, and not SIGUSR1,
which Ray Tune takes for itself."""


@contextmanager
def watched(config: Config, nodes: Sequence[Node]) -> Iterator[None]:
    """Look after the cluster that this process has joined while the block lasts.

    Args:
        nodes: those that were looked at.

    Raises:
        ConfigError: a node that joined later does not see the run's storage, or the cluster's autoscaler
            cannot give what the configuration asks for.
    """
    from ray.exceptions import RayError

    watch = Watch(config, nodes)
    # A KeyboardInterrupt, because Ray's own waiting lets no other exception of a signal through.
    former = signal.signal(STOP, signal.default_int_handler)
    watch.start()
    try:
        yield
    except KeyboardInterrupt:
        if watch.error:
            raise watch.error from None
        raise
    except Exception:  # perhaps of a node that was not looked at yet
        watch.finish()
        with suppress(RayError):
            for _ in range(2):  # the first word of a node is doubted
                watch.look_at_nodes()
        if watch.error:
            raise watch.error from None
        raise
    finally:
        watch.finish()
        signal.signal(STOP, former)


class Watch(threading.Thread):
    """Looks every few seconds; stops the main thread by a signal.

    Attributes:
        error: why it did.
    """

    def __init__(self, config: Config, nodes: Sequence[Node]) -> None:
        super().__init__(daemon=True)
        self.config = config
        self.error: ConfigError | None = None
        self._seen = {node.identity for node in nodes}
        self._doubted: set[str] = set()
        self._infeasible_since: float | None = None
        self._done = threading.Event()
        self._stopping = threading.Lock()  # so that no signal comes after the end

    def run(self) -> None:
        while not self._done.wait(AGAIN_S if self.error else LOOK_S):
            try:
                self.look_at_nodes()
                self._look_at_demands()
            except Exception as error:  # of a head that is away for a while, or whatever: the stage goes on
                logging.getLogger(__name__).warning("the cluster cannot be looked at: %s", error)
            with self._stopping:
                if self.error and not self._done.is_set():
                    os.kill(os.getpid(), STOP)

    def finish(self) -> None:
        with self._stopping:
            self._done.set()
        self.join()

    def look_at_nodes(self) -> None:
        """Have those that have joined look at the storage, together with this process's own. What is wrong
        must be so at two looks: a machine that has just started may be refused for some seconds.

        Raises:
            RayError: one has left meanwhile; if not, the next look finds it.
        """
        import ray

        nodes = living_nodes()
        here = ray.get_runtime_context().get_node_id()
        joined = [node for node in nodes if node.identity not in self._seen]
        if not joined:
            return
        try:
            check_storage(self.config, [*(node for node in nodes if node.identity == here), *joined])
        except NoAnswer as error:  # of a busy node, for which a run that goes well is not stopped
            say("cluster", str(error))
        except ConfigError as error:
            if doubtful := {node.identity for node in joined} - self._doubted:
                say("cluster", f"looked at once more: {error}")
                self._doubted |= doubtful
                return
            self.error = error
        self._seen |= {node.identity for node in joined}

    def _look_at_demands(self) -> None:
        nodes = living_nodes()
        if not infeasible(autoscaling_state(), nodes, search_actors(self.config) + encoders(self.config)):
            self._infeasible_since = None
            return
        self._infeasible_since = self._infeasible_since or time.monotonic()
        if time.monotonic() - self._infeasible_since < INFEASIBLE_S:
            return
        try:
            check_fit(self.config, nodes)
        except ConfigError as error:
            self.error = ConfigError(f"{error}; its autoscaler has no group of nodes that would do")


def check_fit(config: Config, nodes: Sequence[Node]) -> None:
    """Raise ConfigError unless these nodes hold one full search."""
    check_resources(config, totals(nodes))
    check_places(config, machines_of(nodes))


def autoscaling_state() -> "AutoscalingState":
    """What an autoscaler of version 2 reports, as on Kubernetes; its version is 0 where there is none."""
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status())
    return reply.autoscaling_state


def autoscaler_runs(within_s: float = 30) -> bool:
    """Whether an autoscaler of version 2 runs. One that has just started, beside the head, has told nothing
    yet, which is waited for."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    deadline = time.monotonic() + within_s
    while not autoscaling_state().autoscaler_state_version:
        if not is_autoscaler_v2(fetch_from_server=True) or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def infeasible(state: "AutoscalingState", nodes: Sequence[Node], actors: Sequence[Actors]) -> bool:
    """Whether some of these actors wait for what neither the nodes nor the autoscaler can give.

    An autoscaler also counts as infeasible what waits only until busy nodes are free; that is told by the
    nodes' totals. What others on the cluster wait for is told by its size.
    """
    if state.pending_instance_requests or state.pending_instances:
        return False
    ours, has = {(each.cpus, each.gpus) for each in actors}, [_size(node.resources) for node in nodes]
    groups = [[request] for request in state.infeasible_resource_requests]
    groups += [list(gang.requests) for gang in state.infeasible_gang_resource_requests]
    for group in groups:
        asked = [_size(each.resources_bundle) for each in group]
        each_fits = all(any(c <= cpus and g <= gpus for cpus, gpus in has) for c, g in asked)
        all_fit = all(sum(each[kind] for each in asked) <= sum(each[kind] for each in has) for kind in (0, 1))
        if ours.issuperset(asked) and not (each_fits and all_fit):
            return True
    return False


def _size(resources: Mapping[str, float]) -> tuple[float, float]:
    return resources.get("CPU", 0), resources.get("GPU", 0)

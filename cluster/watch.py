"""Watch the cluster while a stage runs: nodes that join later, and demands that can never be met."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cluster.capacity import Actors, actors_of, check_resources, encoders
from cluster.nodes import NoAnswer, Node, check_storage, living_nodes, totals
from cluster.preflight import check_gpus
from cluster.reservation import RENEWED_S, beside_training, release, reserve
from cluster.shape import check_places, machines_of
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say

if TYPE_CHECKING:
    from ray.core.generated.autoscaler_pb2 import AutoscalingState

LOOK_S = 5.0
"""Interval between checks, in seconds."""

INFEASIBLE_S = 120.0
"""Time for which an autoscaler must report a demand as infeasible before it counts, in seconds: it also does
so while it does not know its node groups yet."""

AGAIN_S = 60.0
"""Interval after which a stage that is still running gets the stop signal again, in seconds: an interrupt in
the middle of a callback may be lost."""

STOP = signal.SIGUSR2
"""Signal that stops the stage. Not SIGINT, which background processes of a shell ignore, and not SIGUSR1,
which Ray Tune uses."""


@contextmanager
def watched(config: Config, nodes: Sequence[Node], stage: str = "search") -> Iterator[None]:
    """Watch the cluster that this process has joined while the block, a stage, runs.

    Args:
        nodes: the nodes that have already been checked.

    Raises:
        ConfigError: a node that joined later does not see the run's storage or cannot use its GPUs, or the
            cluster's autoscaler cannot provide the nodes that the configuration needs.
    """
    from ray.exceptions import RayError

    watch = Watch(config, nodes, stage)
    watch.reserve()
    # A KeyboardInterrupt, because no other exception of a signal handler gets through Ray's waiting.
    former = signal.signal(STOP, signal.default_int_handler)
    watch.start()
    try:
        yield
    except KeyboardInterrupt:
        if watch.error:
            raise watch.error from None
        raise
    except Exception:  # perhaps caused by a node that was not checked yet
        watch.finish()
        with suppress(RayError):
            for _ in range(2):  # a node's first failure is not believed yet
                watch.look_at_nodes()
        if watch.error:
            raise watch.error from None
        raise
    finally:
        watch.finish()
        signal.signal(STOP, former)
        with suppress(RayError):
            watch.release()


class Watch(threading.Thread):
    """Thread that checks the cluster every few seconds, and stops the main thread by a signal.

    Attributes:
        error: the reason for stopping.
    """

    def __init__(self, config: Config, nodes: Sequence[Node], stage: str) -> None:
        super().__init__(daemon=True)
        self.config, self.stage = config, stage
        self.error: ConfigError | None = None
        self._seen = {node.identity for node in nodes}
        self._doubted: set[str] = set()
        self._infeasible_since: float | None = None
        self._beside, self._reserved_at = beside_training(config, stage), 0.0
        self._done = threading.Event()
        self._stopping = threading.Lock()  # so that no signal is sent after `finish`

    def run(self) -> None:
        while not self._done.wait(AGAIN_S if self.error else LOOK_S):
            try:
                if time.monotonic() - self._reserved_at > RENEWED_S:
                    self.reserve()
                self.look_at_nodes()
                self._look_at_demands()
            except Exception as error:  # such as a head that is briefly unreachable: the stage continues
                logging.getLogger(__name__).warning("the cluster cannot be checked: %s", error)
            with self._stopping:
                if self.error and not self._done.is_set():
                    os.kill(os.getpid(), STOP)

    def finish(self) -> None:
        with self._stopping:
            self._done.set()
        self.join()

    def reserve(self) -> None:
        """Keep room for what runs beside an elastic training."""
        if self._beside:
            reserve(self._reservation, self._beside)
            self._reserved_at = time.monotonic()

    def release(self) -> None:
        if self._beside:
            release(self._reservation)

    @property
    def _reservation(self) -> str:
        return f"diffray {self.config.storage} {self.config.name}"

    def look_at_nodes(self) -> None:
        """Check newly joined nodes: their storage, together with this process's node, and their GPUs. An
        error counts once it has occurred in two checks: a machine that has just started may be rejected for
        some seconds.

        Raises:
            RayError: a node has left meanwhile; the next check tries again.
        """
        import ray

        nodes = living_nodes()
        here = ray.get_runtime_context().get_node_id()
        joined = [node for node in nodes if node.identity not in self._seen]
        if not joined:
            return
        try:
            check_storage(self.config, [*(node for node in nodes if node.identity == here), *joined])
            check_gpus(self.config, joined, self.stage)
        except NoAnswer as error:  # a busy node is no reason to stop a healthy run
            say("cluster", str(error))
        except ConfigError as error:
            if doubtful := {node.identity for node in joined} - self._doubted:
                say("cluster", f"will be checked again: {error}")
                self._doubted |= doubtful
                return
            self.error = error
        self._seen |= {node.identity for node in joined}

    def _look_at_demands(self) -> None:
        nodes = living_nodes()
        ours = actors_of(self.config, self.stage) + encoders(self.config)
        if not infeasible(autoscaling_state(), nodes, ours):
            self._infeasible_since = None
            return
        self._infeasible_since = self._infeasible_since or time.monotonic()
        if time.monotonic() - self._infeasible_since < INFEASIBLE_S:
            return
        try:
            check_fit(self.config, nodes, self.stage)
        except ConfigError as error:
            self.error = ConfigError(f"{error}; no node group of the autoscaler is large enough")


def check_fit(config: Config, nodes: Sequence[Node], stage: str) -> None:
    """Raise ConfigError unless these nodes hold all that a stage starts."""
    check_resources(config, totals(nodes), stage)
    check_places(config, machines_of(nodes), stage)


def require_room(config: Config, nodes: Sequence[Node], stage: str) -> None:
    """Raise ConfigError unless these nodes hold all that a stage starts, or an autoscaler may add others."""
    try:
        check_fit(config, nodes, stage)
    except ConfigError as error:
        if not autoscaler_runs():  # v2, as on Kubernetes
            raise
        say("cluster", f"waiting for the autoscaler, because {error}")


def autoscaling_state() -> "AutoscalingState":
    """Return the state reported by an autoscaler v2, as on Kubernetes; its version is 0 if there is none."""
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status())
    return reply.autoscaling_state


def autoscaler_runs(within_s: float = 30) -> bool:
    """Return True if an autoscaler v2 is running; wait for the first report of one that has just started.

    Args:
        within_s: maximum wait in seconds.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    deadline = time.monotonic() + within_s
    while not autoscaling_state().autoscaler_state_version:
        if not is_autoscaler_v2(fetch_from_server=True) or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def infeasible(state: "AutoscalingState", nodes: Sequence[Node], actors: Sequence[Actors]) -> bool:
    """Return True if some of these actors wait for resources that neither nodes nor autoscaler can provide.

    An autoscaler also reports requests as infeasible that only wait for busy nodes; those fit the nodes'
    totals. Requests of other users of the cluster are recognized by their size.
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

"""What an autoscaler reports of demands: which of them nothing will ever meet."""

from typing import Any

import pytest
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GangResourceRequest, ResourceRequest

from cluster.capacity import Actors
from cluster.nodes import Node
from cluster.watch import infeasible

WORKERS = [Actors("training worker", "train.num_workers", 2, 2, 1), Actors("task", "fixed", 2, 1, 0)]
CPUS = Node("a", "head", {"CPU": 4})
GPUS = Node("b", "worker", {"CPU": 4, "GPU": 1})


def request(**resources: float) -> Any:
    return ResourceRequest(resources_bundle=resources)


def gang(count: int, **resources: float) -> AutoscalingState:
    gangs = [GangResourceRequest(requests=[request(**resources)] * count)]
    return AutoscalingState(autoscaler_state_version=3, infeasible_gang_resource_requests=gangs)


def alone(**resources: float) -> AutoscalingState:
    return AutoscalingState(infeasible_resource_requests=[request(**resources)])


@pytest.mark.parametrize(
    ("state", "nodes", "found"),
    [
        (AutoscalingState(), [CPUS], False),
        (gang(1, CPU=2, GPU=1), [CPUS], True),
        (gang(1, CPU=2, GPU=1), [CPUS, GPUS], False),
        (gang(2, CPU=2, GPU=1), [CPUS, GPUS], True),
        (alone(CPU=2, GPU=1), [CPUS], True),
        (alone(CPU=1), [CPUS], False),
        (alone(CPU=64), [CPUS], False),
    ],
    ids=["none", "no GPU", "busy GPU", "too few GPUs", "no GPU for an actor", "busy CPUs", "another run's"],
)
def test_a_demand_of_this_run_that_no_node_can_hold_is_infeasible(
    state: AutoscalingState, nodes: list[Node], found: bool
) -> None:
    assert infeasible(state, nodes, WORKERS) is found


def test_what_an_instance_is_on_its_way_for_may_be_met() -> None:
    state = gang(1, CPU=2, GPU=1)
    state.pending_instances.add(ray_node_type_name="gpu")
    assert not infeasible(state, [CPUS], WORKERS)

"""Storage that several nodes are to share: who does not see what whom wrote."""

from cluster.nodes import Node, described, disagreement

NODES = [
    Node("a", "head (10.0.0.1)", {"CPU": 4, "memory": 2**31}),
    Node("b", "worker (10.0.0.2)", {"GPU": 2}),
]


def test_nodes_that_see_each_other_agree() -> None:
    assert disagreement({node.name: ["a", "b"] for node in NODES}, NODES) == ""


def test_nodes_with_folders_of_their_own_are_named_with_the_fix() -> None:
    said = disagreement({"head (10.0.0.1)": ["a"], "worker (10.0.0.2)": ["b"]}, NODES)
    assert said.startswith("head (10.0.0.1) does not see the files of worker (10.0.0.2)")
    assert "mount a shared one at the same absolute path" in said


def test_a_cluster_is_described_on_one_line() -> None:
    told = "2 nodes, 4 logical CPUs, 2 GPUs, 2.0 GiB of memory, 0.0 GiB of object store"
    assert described(NODES) == told

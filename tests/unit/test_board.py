"""What the driver prints of trainings that run at the same time."""

from ray_jobs.console.board import ProgressBoard


def test_every_message_is_told_and_the_progress_of_one_training_at_a_time() -> None:
    board = ProgressBoard()
    for step in (1, 2):
        board.show("one", f"one {step}")
        board.show("two", f"two {step}")
    board.post("one/memory", "one keeps 9 MiB")
    board.post("two/memory", "two keeps 9 MiB")
    assert board.take() == ["one keeps 9 MiB", "two keeps 9 MiB", "one 2"]
    board.show("one", "one 3")
    assert board.take() == ["two 2"], "in turn"
    assert [board.take(), board.take()] == [["one 3"], []]


def test_steps_are_counted_by_training_since_they_were_taken_last() -> None:
    board = ProgressBoard()
    for name in ("one", "one", "two"):
        board.count(name)
    assert board.take_steps() == {"one": 2, "two": 1}
    assert board.take_steps() == {}

"""What a run's way to its first training step was spent on."""

import re

import pytest

from ray_jobs import console


def test_the_phases_until_the_first_step_are_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = console._STARTED
    monkeypatch.setattr(console, "_phases", [("starting", now)])
    monkeypatch.setattr("time.monotonic", lambda: now)
    for seconds, name in ((6, "cleaning"), (23, "encoding")):
        now += seconds
        console.phase(name)
    now += 75
    console.tell_phases()
    console.tell_phases()
    [line] = capsys.readouterr().out.splitlines()
    assert re.match(r"\[ *\d+:\d\d\] train    first steps; until here ", line)
    assert line.endswith("starting 0:06, cleaning 0:23, encoding 1:15")


def test_without_phases_nothing_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_phases", [])
    console.tell_phases()
    assert capsys.readouterr().out == ""

"""What MLflow shows of a training: every step once, whatever was interrupted.

The store's trouble is not the training's. A real MLflow on a SQLite file, and checkpoints as a training
leaves them.
"""

import io
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.registry.models import check_store, open_client
from ray_jobs.run.records import RungRow
from ray_jobs.training.loop import DIVERGED
from ray_jobs.training.tracking import Mirror, opened_store, run_params, tracked

pytestmark = pytest.mark.usefixtures("no_server")
TRIAL = "lr-0.001"
NO_DATABASE = "no database, but long enough to be read as the header of one" * 20
BEGIN = 1_700_000_000.0


@pytest.fixture(scope="module")
def no_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def new_store(no_server: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without entries, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    with opened_store(config_at(folder)):
        pass
    return folder / "mlflow.db"


@pytest.fixture
def config(tmp_path: Path, new_store: Path) -> Config:
    shutil.copy(new_store, tmp_path)
    return config_at(tmp_path)


def config_at(folder: Path) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "storage": str(folder),
            "data": {"source": "pictures"},
            "model": {"base": "base"},
            "search": {"learning_rates": [1e-3], "ladder": [4]},
        }
    )


def checkpoint(config: Config, first: int, last: int, *, whole: bool = True, rung: bool = False) -> Storage:
    """A checkpoint of the steps `first` to `last`, a second each, without weights."""
    trial = Storage.open(config.storage).child(config.name, "train", TRIAL)
    folder = trial.child(f"step-{last:08d}")
    series = [
        {"step": step, "loss": 1 / step, "grad_norm": 0.5, "learning_rate": 1e-3, "time": BEGIN + step}
        for step in range(first, last + 1)
    ]
    why = "rung" if rung else "interval"
    measured = {"step": last, "why": why, "images_per_second": 16.0, "waiting_for_data": 0.25}
    folder.write_text("series.json", json.dumps(series))
    folder.write_text("progress.json", json.dumps(measured | {"world_size": 1}))
    if whole:
        folder.write_text("complete-0000-of-0001", "{}")
    return trial


def mirror(config: Config, rungs: Callable[[], list[RungRow]] = lambda: []) -> Mirror:
    return Mirror(config, {TRIAL: config}, "d1", rungs)


def runs(config: Config) -> list[Any]:
    """The MLflow runs of the trial, the oldest first."""
    client = open_client(config)
    experiment = client.get_experiment_by_name(config.name)
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def history(config: Config, run: Any, name: str) -> list[tuple[int, float]]:
    found = open_client(config).get_metric_history(run.info.run_id, name)
    return [(metric.step, metric.value) for metric in found]


def test_a_training_is_one_mlflow_run_with_a_point_a_step(config: Config) -> None:
    first = mirror(config)
    checkpoint(config, 1, 3)
    first.look()
    checkpoint(config, 4, 4)
    first.look()
    [run] = runs(config)
    assert run.info.run_name == TRIAL
    assert history(config, run, "train/loss") == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert [step for step, _ in history(config, run, "train/learning_rate")] == [1, 2, 3, 4]
    assert history(config, run, "train/grad_norm")[0] == (1, 0.5)
    assert history(config, run, "train/images_per_second") == [(3, 16.0), (4, 16.0)]
    assert history(config, run, "train/waiting_for_data") == [(3, 0.25), (4, 0.25)]


def test_a_point_has_the_time_of_its_step(config: Config) -> None:
    checkpoint(config, 1, 3)
    mirror(config).look()
    [run] = runs(config)
    found = open_client(config).get_metric_history(run.info.run_id, "train/loss")
    assert [metric.timestamp for metric in found] == [int(1000 * (BEGIN + step)) for step in (1, 2, 3)]


def test_more_steps_than_mlflow_takes_at_once_all_arrive(config: Config) -> None:
    checkpoint(config, 1, 700)
    mirror(config).look()
    [run] = runs(config)
    assert [step for step, _ in history(config, run, "train/grad_norm")] == list(range(1, 701))
    assert history(config, run, "train/images_per_second") == [(700, 16.0)]


def test_a_resumed_training_goes_on_with_its_mlflow_run_and_repeats_no_step(config: Config) -> None:
    checkpoint(config, 1, 3)
    before = mirror(config)
    before.look()
    before.end()
    assert runs(config)[0].info.status == "FAILED"
    after = mirror(config)
    after.look()
    assert runs(config)[0].info.status == "RUNNING"
    checkpoint(config, 2, 5)  # a restart from an older checkpoint takes steps again
    after.look()
    after.status = "FINISHED"
    after.end()
    [run] = runs(config)
    assert [step for step, _ in history(config, run, "train/loss")] == [1, 2, 3, 4, 5]
    assert run.info.status == "FINISHED"


def test_a_run_that_was_killed_before_it_had_params_gets_them(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Mirror, run_id: str, trial: str) -> None:
        raise KeyboardInterrupt

    checkpoint(config, 1, 3)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Mirror, "_log_params", killed)
        mirror(config).look()
    assert not runs(config)[0].data.params
    mirror(config).look()
    [run] = runs(config)
    assert run.data.params == run_params(config, "d1")


def test_a_training_that_was_deleted_and_begun_anew_is_another_mlflow_run(config: Config) -> None:
    trial = checkpoint(config, 1, 3)
    mirror(config).look()
    trial.delete("")
    anew = mirror(config)
    checkpoint(config, 1, 2)
    anew.look()
    assert sorted(len(history(config, run, "train/loss")) for run in runs(config)) == [2, 3]


def test_a_checkpoint_that_is_not_whole_is_waited_for_and_one_that_never_will_be_is_passed(
    config: Config,
) -> None:
    looking = mirror(config)
    checkpoint(config, 1, 2)
    checkpoint(config, 3, 4, whole=False)
    checkpoint(config, 5, 6)
    looking.look()
    assert [step for step, _ in history(config, runs(config)[0], "train/loss")] == [1, 2]
    checkpoint(config, 3, 5)  # of the restart from step 2
    looking.look()
    assert [step for step, _ in history(config, runs(config)[0], "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_fid_of_each_rung_is_shown_once_at_its_step(config: Config) -> None:
    rows: list[RungRow] = []
    checkpoint(config, 1, 4, rung=True)
    looking = mirror(config, lambda: rows)
    looking.look()
    rows += [RungRow(trial_id=TRIAL, step=step, fid=fid) for step, fid in ((2, float("nan")), (4, 99.5))]
    looking.look()
    looking.look()
    checkpoint(config, 5, 6)
    mirror(config, lambda: rows).look()
    assert history(config, runs(config)[0], "validation/fid") == [(4, 99.5)]


def test_all_that_a_rung_was_measured_by_is_shown_at_its_step(config: Config) -> None:
    scores = {"fid": 99.5, "fid_error": 2.0, "kid": 0.02, "kid_error": 0.001, "fid_2": 3.5}
    scores |= {"subject": 0.5, "subject_error": 0.1, "unlike": 0.3, "unlike_error": 0.05}
    # Without evaluate.bootstrap there are no errors.
    values = {"trial_id": TRIAL, "step": 2, "validation_loss": 0.25, "fid_2_error": None, **scores}
    rows = [RungRow.model_validate(values), RungRow(trial_id=TRIAL, step=4, fid=98.0, kid=float("nan"))]
    checkpoint(config, 1, 4, rung=True)
    looking = mirror(config, lambda: rows)
    looking.look()
    mirror(config, lambda: rows).look()
    [run] = runs(config)
    expected = {f"validation/{name}": [(2, value)] for name, value in scores.items()}
    expected |= {"validation/loss": [(2, 0.25)], "validation/fid_2_error": []}
    expected["validation/fid"].append((4, 98.0))
    assert {name: history(config, run, name) for name in expected} == expected


def test_a_rung_of_a_single_training_has_its_validation_loss_alone(config: Config) -> None:
    rows = [RungRow(trial_id=TRIAL, step=2, fid=float("nan"), validation_loss=0.25)]
    checkpoint(config, 1, 4, rung=True)
    mirror(config, lambda: rows).look()
    mirror(config, lambda: rows).look()  # of a driver that starts again: it is known there
    [run] = runs(config)
    assert history(config, run, "validation/loss") == [(2, 0.25)]
    assert history(config, run, "validation/fid") == []


def with_pictures(config: Config, step: int) -> RungRow:
    """A measured rung that has kept a picture."""
    folder = checkpoint(config, 1, step, rung=True).child(f"step-{step:08d}")
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format="PNG")
    folder.write_bytes("samples/0-a-caption.png", file.getvalue())
    return RungRow(trial_id=TRIAL, step=step, fid=99.5, checkpoint=folder.uri)


def test_each_rung_shows_its_pictures_as_one_file_in_the_storage(config: Config, tmp_path: Path) -> None:
    config = config.model_copy(update={"name": "other"})  # the store knows that of the fixture
    with opened_store(config):
        pass
    rows = [with_pictures(config, 4), RungRow(trial_id=TRIAL, step=5, fid=98.0, checkpoint="nowhere")]
    looking = mirror(config, lambda: rows)
    looking.look()
    looking.show_samples()
    [run] = runs(config)
    [shown] = open_client(config).list_artifacts(run.info.run_id, "samples")
    assert shown.path == "samples/step-00000004.png"
    [written] = (tmp_path / "mlartifacts").rglob("*.png")
    assert Image.open(written).getpixel((4, 4)) == (255, 0, 0)


def test_a_store_that_takes_no_pictures_still_gets_the_numbers(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config.model_copy(update={"name": "other"})
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    with opened_store(config):
        pass
    rows = [with_pictures(config, 4)]
    with tracked(config, {TRIAL: config}, "d1", lambda: rows):
        pass
    said = [line for line in capsys.readouterr().out.splitlines() if "MLflow lacks" in line]
    assert len(said) == 1 and "the latest pictures" in said[0] and "have them, in samples" in said[0]
    [run] = runs(config)
    assert history(config, run, "validation/fid") == [(4, 99.5)]
    assert run.info.status == "FINISHED"


def test_the_params_are_the_resolved_settings_flat_and_without_what_is_empty(config: Config) -> None:
    checkpoint(config, 1, 1)
    mirror(config).look()
    params = runs(config)[0].data.params
    assert params == run_params(config, "d1")
    assert params["train.lora.rank"] == "16" and params["train.learning_rate"] == "0.0001"
    assert params["train.method"] == "lora" and params["train.betas"] == "[0.9, 0.999]"
    assert params["data.digest"] == "d1"
    assert "train.stages" not in params and "train.micro_batch_size" not in params
    assert params["model.base"] == config.model.base and "model.revision" not in params
    pinned = config.model_copy(update={"model": config.model.model_copy(update={"revision": "v1"})})
    assert run_params(pinned, "d1")["model.revision"] == "v1"
    full = config.model_copy(update={"train": config.train.model_copy(update={"method": "full"})})
    assert not [name for name in run_params(full, "d1") if name.startswith("train.lora")]


def test_a_training_that_diverged_is_marked_as_failed(config: Config) -> None:
    trial = checkpoint(config, 1, 1)
    trial.write_text(DIVERGED, "{}")
    looking = mirror(config)
    looking.look()
    looking.status = "FINISHED"
    looking.end()
    assert runs(config)[0].info.status == "FAILED"


def test_the_series_arrive_while_the_block_lasts_and_at_its_end(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_jobs.training.tracking.POLL_S", 0.05)
    with opened_store(config):
        pass
    with tracked(config, {TRIAL: config}, "d1", lambda: []):
        checkpoint(config, 1, 2)
        deadline = time.monotonic() + 60
        while not runs(config) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert runs(config)[0].info.status == "RUNNING"
        checkpoint(config, 3, 4)
    [run] = runs(config)
    assert len(history(config, run, "train/loss")) == 4
    assert run.info.status == "FINISHED"


def test_a_server_that_does_not_answer_is_an_error_before_the_start(config: Config) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
    publish = config.publish.model_copy(update={"tracking_uri": uri})
    config = config.model_copy(update={"publish": publish})
    with pytest.raises(ConfigError, match=rf"publish.tracking_uri: {uri}: no MLflow server answers"):
        check_store(config)
    with pytest.raises(ConfigError, match="no MLflow server answers"), opened_store(config):
        pytest.fail("the block began")


def test_a_store_that_refuses_is_an_error_before_the_start(config: Config, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text(NO_DATABASE)
    with pytest.raises(ConfigError, match=r"publish.tracking_uri: sqlite:.*mlflow.db"), opened_store(config):
        pass


def test_a_store_that_fails_later_is_said_once_and_the_training_goes_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray_jobs.training.tracking.POLL_S", 0.05)
    looks, look = list[Mirror](), Mirror.look

    def look_and_count(self: Mirror) -> None:
        looks.append(self)
        look(self)

    monkeypatch.setattr(Mirror, "look", look_and_count)
    with opened_store(config):
        pass
    store, away, folder = (tmp_path / name for name in ("mlflow.db", "away.db", "folder"))
    store.rename(away)
    folder.mkdir()  # nothing can be read from it or written to it
    store.symlink_to(folder)
    said = ""
    with tracked(config, {TRIAL: config}, "d1", lambda: []):
        checkpoint(config, 1, 2)
        deadline = time.monotonic() + 60
        while "MLflow lacks" not in said and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().out
        seen = len(looks)
        while len(looks) < seen + 3 and time.monotonic() < deadline:  # these fail too
            time.sleep(0.05)
        (tmp_path / "link").symlink_to(away)
        (tmp_path / "link").replace(store)  # at once: a look between would make an empty database
        checkpoint(config, 3, 4)
    said += capsys.readouterr().out
    [line] = [line for line in said.splitlines() if "MLflow lacks" in line]
    assert "training goes on" in line
    [run] = runs(config)
    assert len(history(config, run, "train/loss")) == 4  # what it missed was made good


def test_a_store_that_fails_to_the_end_is_said_and_the_steps_are_named(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_text(NO_DATABASE)
    with tracked(config, {TRIAL: config}, "d1", lambda: []):
        checkpoint(config, 1, 2)
    assert "the checkpoints have them, in series.json" in capsys.readouterr().out


def test_a_store_that_hangs_does_not_hold_up_the_end(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that takes connections and never answers."""
    monkeypatch.setattr("ray_jobs.training.tracking.PATIENCE", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        publish = config.publish.model_copy(update={"tracking_uri": uri})
        config = config.model_copy(update={"publish": publish})
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        begin = time.monotonic()
        with tracked(config, {TRIAL: config}, "d1", lambda: []):
            checkpoint(config, 1, 2)
        assert time.monotonic() - begin < 4
    assert "going on without" in capsys.readouterr().out

"""The page to train from (`diffray ui`): its answers over HTTP, and the page in a real browser.

Runs are written by the records' own classes; those that start are real ones of which nothing but the
configuration is right, so that they end within seconds.
"""

import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import diffray
from diffray.jobs import Job, Record
from diffray.settings import config_of, stage_arguments
from diffray.ui import checks, queue
from diffray.ui.access import Access
from diffray.ui.command import main, serve
from diffray.ui.data_folders import DataFolders, safe_name
from diffray.ui.forms import Form, arguments_of
from diffray.ui.page import Page
from diffray.ui.queue import Queue
from diffray.ui.runs import Runs
from diffray.ui.server import create_app
from ray_jobs.config import ConfigError
from ray_jobs.data.feeding.dataset import PARTS
from ray_jobs.run.folder import RunFolder, SharedFolder
from ray_jobs.run.records import RungRow, write_rows
from serving.http.api_keys import KeyRing, add_key
from tests.serving.http_server import eventually, http_server
from tests.serving.test_web import FAINT, TOO_WIDE, UNNAMED
from tests.small_set import small_set
from tests.unit.test_report import WINNER

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user, with four pictures in `photos`."""
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "photos" / f"{number}.txt").write_text("a square")
    return tmp_path


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (40 * shade, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def served(keys: KeyRing | None = None) -> Iterator[str]:
    """The page's address; the queue starts runs only when a test says so."""
    waiting = Queue(1)
    try:
        page = Page(DataFolders(["photos"]), waiting)
        with http_server(create_app(page, Access(keys, is_local=True))) as url:
            yield url
    finally:
        waiting.close()


@pytest.fixture
def site(home: Path) -> Iterator[httpx.Client]:
    with served() as url, httpx.Client(base_url=url, headers={"Origin": url}, timeout=60) as client:
        yield client


def recorded(
    home: Path,
    name: str,
    *,
    trials: int = 2,
    rungs: int = 3,
    pictures: bool = False,
    address: str = "",
    steps: int = 0,
) -> None:
    """A run that ended well, with its rungs.

    Args:
        steps: number of steps up to each rung whose losses are written.
    """
    fields = {"storage": str(home / "runs"), "search.device_hour_price": 2.0}
    job = Job(name)
    job.folder.mkdir(parents=True)
    arguments = stage_arguments(str(home / "photos"), recipe="sdxl-lora", name=name, fields=fields)
    (job.folder / "job.json").write_text(json.dumps(asdict(Record(arguments, address or None))))
    (job.folder / "exit").write_text("0\n")
    (job.folder / "log").write_text("[ 1:15] publish  <done>\n")
    run, rows = diffray.run(name), []
    for trial in range(trials):
        for rung in range(1, rungs + 1):
            checkpoint = run.folder.training(f"lr-{trial}").child(f"step-{rung}")
            if steps:
                own = range(steps * (rung - 1) + 1, steps * rung + 1)
                losses = [{"step": step, "loss": 0.1 + 0.1 / step, "time": 0.0} for step in own]
                checkpoint.write_text("series.json", json.dumps(losses))
            if pictures:
                checkpoint.child("samples").write_bytes("0-a-red-apple.png", png(rung))
            row = RungRow(
                trial_id=f"lr-{trial}",
                learning_rate=1e-4 * (trial + 1),
                step=(steps or 10) * rung,
                fid=90.0 - rung + trial,
                train_loss=0.1 / rung,
                seconds=900.0 * rung,
                checkpoint=checkpoint.uri,
            )
            rows.append(row)
    write_rows(run.folder.search, rows)


def refused(answer: httpx.Response) -> tuple[str, str | None]:
    assert answer.status_code >= 400
    told = answer.json()
    return told["detail"], told["field"]


def test_a_run_is_shown_from_its_records(home: Path, site: httpx.Client) -> None:
    recorded(home, "mine", pictures=True, steps=10)
    [run] = site.get("/runs").json()
    assert (run["state"], run["best"], run["step"], run["rungs"]) == ("finished", "87.0", 30, 6)
    assert (run["hours"], run["cost"]) == (1.5, 3.0)  # two trainings of 45 minutes
    run = site.get("/runs/mine").json()
    assert "Validation FID" in run["charts"] and "One line per training" in run["charts"]
    begun = home / "runs" / "mine" / "train" / "lr-0" / "step-4" / "series.json"
    begun.parent.mkdir()
    begun.write_text('[{"step": 31, "loss": 0.3}, {"st')  # is being written
    assert site.get("/runs/mine", params={"seen": run["stamp"]}).json()["charts"] == ""
    begun.write_text('[{"step": 31, "loss": 0.3}]')
    run = site.get("/runs/mine", params={"seen": run["stamp"]}).json()
    assert "0.0001, 31 steps: " in run["charts"]
    assert run["trials"][0] == ["lr-0", "0.0001"] and "publish  <done>" in run["log"]
    assert site.get("/runs/mine", params={"seen": run["stamp"]}).json()["charts"] == ""
    [first, *_] = site.get("/runs/mine/rungs", params={"trial": "lr-1"}).json()
    assert first["files"] == {"samples": ["0-a-red-apple.png"], "prompts": []}
    place: dict[str, Any] = {"trial": "lr-1", "step": 10, "kind": "samples"}
    answer = site.get("/runs/mine/picture", params={**place, "file": "0-a-red-apple.png", "small": True})
    assert answer.headers["content-type"] == "image/jpeg"
    assert site.get("/runs/mine/picture", params={**place, "file": "../../x.png"}).status_code == 404
    assert refused(site.get("/runs/mine/report")) == ("mine: no report yet; the run is finished", None)
    assert refused(site.get("/runs/main"))[0] == "main: no run of this name; did you mean mine?"
    (home / ".diffray" / "mine" / "log").write_text("long\n" * 9000)
    assert len(site.get("/runs/mine").json()["log"]) < 17_000
    assert site.delete("/runs/mine", headers={"Content-Type": "application/json"}).status_code == 200
    assert site.get("/runs").json() == [] and not (home / "runs" / "mine").exists()


def with_pairs(home: Path, name: str) -> list[dict[str, Any]]:
    """Prepare a run's data as pairs; returns what the edits of a rung begin with and should become."""
    config = diffray.run(name).config
    prepared = small_set(SharedFolder.of(config).encoded("00"), references=2)
    folder = RunFolder.of(config).dataset
    folder.write_text(PARTS, prepared.storage.read_text(PARTS))
    manifest = prepared.manifest.model_copy(update={"encoders": "00"})
    manifest.write(folder)
    return prepared.pictures("validation", config.publish.sample_count)


def test_what_edits_begin_with_and_should_become_is_beside_their_pictures(
    home: Path, site: httpx.Client
) -> None:
    recorded(home, "plain", pictures=True)
    assert site.get("/runs/plain/given").json() == {"rows": 0, "references": 0}
    recorded(home, "edits", pictures=True)
    rows = with_pairs(home, "edits")
    assert site.get("/runs/edits/given").json() == {"rows": len(rows), "references": 2}

    def shown(number: int, which: str, **more: Any) -> httpx.Response:
        return site.get("/runs/edits/given/picture", params={"number": number, "which": which, **more})

    assert shown(1, "target").content == rows[1]["image"]
    assert [shown(1, place).content for place in "01"] == rows[1]["references"]
    assert shown(0, "0", small=True).headers["content-type"] == "image/jpeg"
    for wrong in ((0, "2"), (len(rows), "target"), (-1, "target"), (0, "../x")):
        assert shown(*wrong).status_code == 404


def test_pairs_are_asked_for_by_the_names_of_their_columns(home: Path, site: httpx.Client) -> None:
    form = {
        "data": "photos",
        "recipe": "kontext-lora",
        "reference_columns": "before, palette",
        "mask_column": "m",
    }
    arguments = arguments_of(Form.model_validate(form), DataFolders(["photos"]))
    [source] = config_of(arguments).data.all_sources
    assert (source.reference_columns, source.mask_column) == (["before", "palette"], "m")
    told, field = refused(site.post("/checks/plan", json=form | {"mask_column": "before"}))
    assert "before is named twice" in told and field == "reference_columns"


def test_damaged_files_and_a_lost_registry_are_told_and_hide_no_other_run(
    home: Path, site: httpx.Client
) -> None:
    recorded(home, "well")
    recorded(home, "cut", pictures=True)
    results = home / "runs" / "cut" / "search" / "results.jsonl"
    results.write_text(results.read_text()[:-30])
    for name, winner in (("winner", "{"), ("lost", json.dumps(WINNER | {"registry_version": 1}))):
        recorded(home, name)
        (home / "runs" / name / "winner.json").write_text(winner)
    lost = home / ".diffray" / "lost" / "job.json"
    told = json.loads(lost.read_text())
    told["arguments"] += ["--set", "publish.tracking_uri=http://127.0.0.1:9"]
    lost.write_text(json.dumps(told))
    recorded(home, "newer", trials=1, rungs=1)
    newer = home / "runs" / "newer" / "search" / "results.jsonl"
    newer.write_text(json.dumps(json.loads(newer.read_text()) | {"ranked_by": "taste"}))
    recorded(home, "empty")
    (home / ".diffray" / "empty" / "job.json").write_text("")
    (home / ".diffray" / "halved").mkdir()
    (home / ".diffray" / "halved" / "waiting.json").write_text('{"arguments": [')

    runs = {run["name"]: run for run in site.get("/runs").json()}
    assert (runs["well"]["best"], runs["lost"]["published"]) == ("87.0", 1)
    assert "results.jsonl, line 6: damaged; restore it" in runs["cut"]["line"]
    assert "winner.json: damaged; restore it" in runs["winner"]["line"]
    assert "lr-0 at step 10 has no score taste; update diffray" in runs["newer"]["line"]
    assert "job.json: damaged; delete" in runs["empty"]["line"] and runs["empty"]["state"] == "unreached"
    assert "waiting.json: damaged; delete this run" in runs["halved"]["line"]
    for name, run in runs.items():
        assert site.get(f"/runs/{name}").json()["line"] == run["line"]
    assert "halved" in refused(site.post("/runs/halved/resume", json={}))[0]
    assert site.delete("/runs/halved", headers={"Content-Type": "application/json"}).status_code == 200
    assert "no MLflow server answers" in refused(site.get("/runs/lost/version"))[0]


def two_hundred(home: Path) -> None:
    """200 runs of 50 rungs each."""
    recorded(home, "run-0", trials=5, rungs=10, steps=200)
    record, search = home / ".diffray" / "run-0", home / "runs" / "run-0" / "search"
    for name in (f"run-{number}" for number in range(1, 200)):
        shutil.copytree(record, home / ".diffray" / name)
        shutil.copytree(search, home / "runs" / name / "search")
        own = (record / "job.json").read_text().replace("run-0", name)
        (home / ".diffray" / name / "job.json").write_text(own)


def test_two_hundred_runs_are_read_in_under_a_second(home: Path) -> None:
    two_hundred(home)
    runs = Runs()
    begun = time.process_time()  # others may use the cores
    assert len(runs.all()) == 200
    first = time.process_time() - begun
    assert first < 1
    runs.all()
    assert time.process_time() - begun - first < 0.3
    begun = time.process_time()
    found = runs.detail("run-0", "")
    assert found and found.charts.count("<polyline") == 10
    assert time.process_time() - begun < 0.5


def test_wrong_settings_are_told_beside_their_input_and_nothing_starts(
    home: Path, site: httpx.Client
) -> None:
    form = {"data": "photos", "recipe": "sdxl-lora", "name": "mine"}
    recorded(home, "taken")
    for changes, field, said in (
        ({"data": "/etc"}, "data", "the page reads"),
        ({"data": "photos/../.."}, "data", "the page reads"),
        ({"data": "photos/none"}, "data", "no such folder"),
        ({"data": "s3://bucket/x"}, "data", "the page reads"),
        ({"data": "photos", "class_prompt": "a dog"}, "data", "a class prompt needs"),
        ({"recipe": "sdxl-lorra"}, "recipe", "did you mean sdxl-lora"),
        ({"recipe": "/etc/passwd"}, "recipe", "no such recipe"),
        ({"recipe": None, "base": "mine"}, "recipe", "none is made for base='mine'"),
        ({"name": "a b"}, "name", "String should match"),
        ({"name": "taken"}, "name", "a run of this name was started here with other settings"),
        ({"epochs": -1}, "epochs", "greater than 0"),
        ({"epochs": "many"}, "epochs", "valid number"),
        ({"address": "http://127.0.0.1:9"}, "address", "http://127.0.0.1:9"),
        ({"settings": ["train.lora.rnak=8"]}, "settings", "did you mean rank"),
        ({"settings": ["storage=/"]}, "settings", "the page sets fields of model, data"),
        ({"settings": ["data.source=/etc"]}, "settings", "the page sets fields"),
    ):
        told, place = refused(site.post("/runs", json=form | changes))
        assert said in told and place == field, (changes, told, place)
    assert not (home / ".diffray" / "mine").exists() and queue.waiting() == {}
    assert {path.name for path in (home / "runs").iterdir()} == {"taken"}


def test_a_run_whose_cluster_is_not_reached_is_told_and_delays_nothing(
    home: Path, site: httpx.Client
) -> None:
    recorded(home, "far", address="http://127.0.0.1:9")
    begun = time.monotonic()
    [run] = site.get("/runs").json()
    assert run["state"] == "unreached" and run["best"] == "87.0" and time.monotonic() - begun < 5
    eventually(lambda: "--address http://127.0.0.1:9: " in site.get("/runs/far").json()["line"], 60)
    assert site.get("/runs/far").json()["log"] == ""
    assert site.post("/runs/far/deploy", json={}).status_code == 200
    eventually(lambda: site.get("/runs/far/endpoint").json()["state"] == "failed")
    assert 'diffray.run("far").deploy(serve={"host": ' in site.get("/runs/far/endpoint").json()["line"]


def test_a_queue_starts_one_run_after_the_other_and_outlives_its_page(home: Path) -> None:
    def arguments(name: str) -> list[str]:
        return stage_arguments("photos", recipe="sdxl-lora", name=name, fields={"local.num_cpus": 1})

    first = Queue(1)
    with pytest.raises(ConfigError, match="another page is open for this folder"):
        Queue(1)
    first.add(arguments("one"))
    first.add(arguments("two"))
    first.add(arguments("two"))
    with pytest.raises(ConfigError, match="name: two: a run of this name waits with other settings"):
        first.add([*arguments("two"), "--set", "seed=1"])
    first.close()
    assert list(queue.waiting()) == ["one", "two"]
    (home / ".diffray" / "damaged").mkdir()
    (home / ".diffray" / "damaged" / "job.json").write_text("{")  # holds nobody up
    busy = Job("busy")
    busy.start("timeit", ["-n1", "-r1", "import time; time.sleep(600)"], None, submit=False)
    second = Queue(1)
    try:
        second.start_next()
        assert list(queue.waiting()) == ["one", "two"]
        busy.stop()
        second.start()
        eventually(lambda: list(queue.waiting()) != ["one", "two"], 60)
        assert diffray.run("one").job.started.arguments == arguments("one")
        # It is too large for one CPU, which its command tells before Ray starts; then comes the next one.
        eventually(lambda: not queue.waiting(), 60)
        assert diffray.run("one").status == "failed"
        eventually(lambda: diffray.run("two").status == "failed", 60)
        assert "num_cpus" in diffray.run("two").job.last_line()
    finally:
        second.close()


def test_a_run_waits_is_resumed_and_deleted_by_the_page(home: Path, site: httpx.Client) -> None:
    form = {"data": "photos", "recipe": "sdxl-lora", "name": "mine", "hour_price": 2, "epochs": 3}
    form |= {"instance_prompt": "a photo of sks dog", "settings": ["train.lora.rank=4"]}
    assert site.post("/runs", json=form).json() == {"name": "mine"}
    [asked] = queue.waiting().values()
    config = config_of(asked.arguments)
    assert (config.name, config.train.epochs, config.train.lora.rank) == ("mine", 3, 4)
    assert config.search.device_hour_price == 2
    assert config.data.sources[0].instance_prompt == "a photo of sks dog"
    run = site.get("/runs/mine").json()
    assert (run["state"], run["place"]) == ("waiting", 1)
    assert [each["name"] for each in site.get("/runs").json()] == ["mine"]
    assert site.post("/runs/mine/stop", json={}).status_code == 200
    assert queue.waiting() == {} and site.get("/runs/mine").status_code == 404
    recorded(home, "old")
    site.post("/runs/old/resume", json={})
    assert list(queue.waiting()) == ["old"]
    assert site.get("/runs/old").json()["state"] == "waiting"


def test_uploads_are_pictures_or_captions_and_never_replace_another_file(
    home: Path, site: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(name: str, content: bytes, folder: str = "photos/new") -> httpx.Response:
        headers = {"Content-Type": "application/octet-stream"}
        return site.put("/uploads", params={"folder": folder, "name": name}, content=content, headers=headers)

    assert put("../../a;b.png", png()).json() == {"name": "a_b.png"}
    assert put("a_b.png", png()).status_code == 200  # the same file again
    put("a_b.txt", "a blue square, é".encode())
    for name, content, said in (
        ("a_b.png", png(1), "has another file of this name"),
        ("broken.png", png()[:50], "broken.png: not a picture that can be read"),
        ("page.html", b"<script>", "neither a picture"),
        ("c.txt", b"\xff\xfe", "captions must be UTF-8"),
    ):
        assert said in refused(put(name, content))[0]
    assert not (home / "photos" / "new").exists()  # until all is there
    told = site.post("/uploads/finish", json={"folder": "photos/new"}).json()
    assert (told["path"], told["pictures"]) == (str(home / "photos" / "new"), 1)
    assert not [path for path in (home / "photos").iterdir() if path.name.startswith(".")]
    assert put("later.png", png(2)).status_code == 200  # one that exists is added to
    (home / "photos" / "new" / "later.png").unlink()
    assert "nothing was uploaded" in refused(site.post("/uploads/finish", json={"folder": "photos/x"}))[0]
    assert "the page reads" in refused(put("a.png", png(), "/tmp"))[0]
    assert "is no folder" in refused(put("a.png", png(), "photos/x/y"))[0]
    assert "no such folder" in refused(site.get("/folders", params={"path": f"photos/{'x' * 300}"}))[0]
    assert "File name too long" in refused(put("a.png", png(), f"photos/{'x' * 300}"))[0]
    found = site.get("/folders", params={"path": "photos/new"}).json()
    assert (found["pictures"], found["captioned"]) == (1, True)
    assert {path.name for path in (home / "photos" / "new").iterdir()} == {"a_b.png", "a_b.txt"}

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)  # as on exFAT
    assert put("linkless.png", png(2)).status_code == put("linkless.png", png(2)).status_code == 200
    assert "has another file" in refused(put("linkless.png", png(3)))[0]
    assert (home / "photos" / "new" / "linkless.png").read_bytes() == png(2)
    os.symlink("/etc", home / "photos" / "out")
    assert "the page reads" in refused(site.get("/folders", params={"path": "photos/out"}))[0]
    listed = [
        {"file_name": "a;b.png", "text": "c;d.png"},
        {"file_name": "in/é;.png"},
        {"file_name": "in/x.png"},
    ]
    (home / "photos" / "new" / "in").mkdir()
    (home / "photos" / "new" / "in" / "x.png").write_bytes(png())
    for _ in range(2):  # the same list again
        assert (
            put("metadata.jsonl", "\n".join(map(json.dumps, [*listed, "no row"])).encode()).status_code == 200
        )
    lines = map(json.loads, (home / "photos" / "new" / "metadata.jsonl").read_text().splitlines())
    assert list(lines) == [
        {**listed[0], "file_name": "a_b.png"},
        {"file_name": "é_.png"},
        listed[2],
        "no row",
    ]
    put("metadata.csv", b'file_name,text\n"a;b.png","a, b"\n')
    assert (home / "photos" / "new" / "metadata.csv").read_text() == 'file_name,text\na_b.png,"a, b"\n'
    assert safe_name("cafe\u0301.png") == "café.png"
    assert safe_name("-rf .png") == "rf .png" and safe_name("é" * 200 + ".png").endswith("é.png")


def test_what_was_not_finished_is_deleted_at_the_next_start(home: Path, site: httpx.Client) -> None:
    """An upload and dry runs; never what a user, a run or a dry run that has ended well has made."""
    headers = {"Content-Type": "application/octet-stream"}
    place = {"folder": "photos/cut", "name": "a.png"}
    assert site.put("/uploads", params=place, content=png(), headers=headers).status_code == 200
    runs = home / "runs"
    ended = (("cut", "1", True), ("own", "1", False), ("well", "0", True), ("mine", "1", True))
    for name, code, made in ended:
        arguments = stage_arguments("photos", recipe="sdxl-lora", name=name, fields={"storage": str(runs)})
        check = Job(f"{name}/preview")
        check.folder.mkdir(parents=True)
        (check.folder / "job.json").write_text(json.dumps(asdict(Record([*arguments, "--dry-run"]))))
        (check.folder / "exit").write_text(code)
        if made:
            (check.folder / "made").touch()
        (runs / name / "dataset" / "index").mkdir(parents=True)
    (runs / "mine" / "search").mkdir()
    checks.delete_unfinished()
    DataFolders(["photos"]).delete_unfinished()
    assert {path.name for path in runs.iterdir()} == {"own", "well", "mine"}
    assert {path.name for path in (home / ".diffray").iterdir() if path.is_dir()} == {"well"}
    assert {path.suffix for path in (home / "photos").iterdir()} == {".png", ".txt"}


def test_other_sites_and_other_machines_are_refused(home: Path, site: httpx.Client) -> None:
    form = {"data": "photos", "recipe": "sdxl-lora"}
    assert site.post("/runs", json=form, headers={"Origin": "http://evil.example"}).status_code == 403
    assert site.post("/runs", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    for origin in ("http://[::1", "null", ""):
        assert site.post("/runs", json=form, headers={"Origin": origin}).status_code == 403
    for host in ("evil.example", "[::1", "localhost.evil.example"):
        assert site.get("/runs", headers={"Host": host}).status_code == 403
    assert site.post("/session", json={"key": "x" * 200_000}).status_code == 413
    policy = site.get("/").headers["content-security-policy"]
    assert "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
    assert queue.waiting() == {}
    assert site.post("/runs", json=form | {"name": "page.lock"}).json() == {"name": "page.lock"}
    (home / "waiting.json").write_text("{}")
    assert site.post("/runs/%2e%2e/stop", json={}).status_code >= 400 and (home / "waiting.json").exists()
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0: other machines would reach the page"):
        serve("0.0.0.0", 0, ["photos"], None, 1, print)
    assert main(["--folders", "nowhere"]) == 2 and main(["--at-once", "0"]) == 2


def test_a_key_of_the_right_scope_opens_the_page(home: Path) -> None:
    file = home / "keys.json"
    admin = add_key(file, "ann", frozenset({"admin"}))
    drawer = add_key(file, "bob", frozenset({"generate"}))
    with served(KeyRing(file)) as url, httpx.Client(base_url=url, headers={"Origin": url}) as site:
        assert site.get("/").status_code == 200
        assert refused(site.get("/runs"))[0] == "this page asks for an API key"
        assert "lacks the scope 'admin'" in refused(site.post("/session", json={"key": drawer}))[0]
        assert "unknown" in refused(site.post("/session", json={"key": "diffray-x"}))[0]
        cookie = site.post("/session", json={"key": admin}).headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and admin not in cookie
        assert site.get("/runs").json() == []
        bearer = {"Authorization": f"Bearer {drawer}"}
        other = httpx.Client(base_url=url, headers=bearer)
        assert other.get("/runs").status_code == other.get("/runs/draw").status_code == 401
        assert other.post("/runs/mine/draw", json={"prompt": "a cat"}).status_code == 404


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("needs chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser: Any, url: str, **settings: Any) -> Iterator[Any]:
    """A page in a context of its own; every error of its scripts or policy fails the test."""
    context, errors = browser.new_context(**settings), list[str]()
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda each: errors.append(each.text) if "Content Security" in each.text else None)
    page.goto(url)
    yield page
    context.close()
    assert not errors


def check_look(page: Any) -> None:
    assert page.evaluate(FAINT) == []
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(TOO_WIDE) == []


def test_a_person_finds_a_run_and_watches_it_on_a_phone(home: Path, browser: Any) -> None:
    two_hundred(home)
    recorded(home, "newest", pictures=True)
    with_pairs(home, "newest")
    with served() as url:
        httpx.get(f"{url}/runs", timeout=60)  # as the command does while the browser starts
        with opened(browser, "about:blank", viewport={"width": 390, "height": 800}) as page:
            seconds = []
            for _ in range(3):
                begun = time.perf_counter()
                page.goto(url)
                page.locator("#runs tbody tr").nth(200).wait_for()
                seconds.append(time.perf_counter() - begun)
            assert min(seconds) < 2  # 0.4 on two cores of which nobody else uses one
            check_look(page)
            page.locator("#filter").focus()
            page.keyboard.type("newest")
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            page.locator("#charts svg").first.wait_for()
            assert page.evaluate("document.activeElement.textContent") == "newest"
            assert "best FID 87.0 at 30 steps" in page.locator("#run-facts").text_content()
            assert page.locator("#charts .curve").count() == 4
            page.locator("#trial").select_option("lr-1")
            eventually(lambda: page.locator("#strip img[src*='trial=lr-1']").count() == 3)
            heads = page.locator("#strip thead th").all_text_contents()
            assert heads[:3] == ["before 1", "before 2", "target"] and len(heads) == 6
            before = page.locator("#strip tbody tr:first-child img[src*='given']")
            assert before.count() == 3 and before.first.get_attribute("alt") == "before 1 of row 1"
            image = page.locator("#strip img[src*='trial=']").first
            image.scroll_into_view_if_needed()
            eventually(lambda: image.evaluate("each => each.naturalWidth") == 64)
            assert image.get_attribute("alt") == "a red apple, 10 steps"
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert page.evaluate(FAINT) == []
            outside = TOO_WIDE.replace(".map(", ".filter(each => !each.closest('table')).map(")
            assert page.evaluate(outside) == []  # tables scroll
            page.locator("#delete").click()
            page.locator("#delete-dialog button.primary").click()
            page.locator("#list-view").wait_for()
            assert not (home / "runs" / "newest").exists()


def test_a_person_asks_for_a_run_with_the_keyboard_in_the_dark(home: Path, browser: Any) -> None:
    (home / "cat.png").write_bytes(png(2))
    (home / "broken.png").write_bytes(b"none")
    settings: dict[str, Any] = {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"}
    with served() as url, opened(browser, f"{url}/#/new", **settings) as page:
        page.locator("#recipe option").nth(1).wait_for(state="attached")
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        check_look(page)
        page.locator("#upload-name").fill("cats")
        page.locator("#files").set_input_files([str(home / "cat.png"), str(home / "broken.png")])
        page.locator("#send").click()
        page.locator("#upload-errors li").wait_for()
        assert "broken.png: not a picture" in page.locator("#upload-errors").text_content()
        eventually(lambda: page.locator("#name").input_value() == "cats")
        assert page.locator("#data").input_value() == str(home / "photos" / "cats")
        assert "1 pictures directly in it, without captions" in page.locator("#data-hint").text_content()
        page.locator("#data").fill("/etc")
        page.keyboard.press("Enter")  # starts nothing
        page.locator("#start").press("Enter")
        eventually(lambda: "the page reads" in page.locator("#data-error").text_content())
        assert page.evaluate("document.activeElement.id") == "data"
        page.locator("#data").fill("photos")
        page.locator("#epochs").fill("-1")
        page.locator("#start").click()
        eventually(lambda: page.locator("#epochs").get_attribute("aria-invalid") == "true")
        page.locator("#epochs").fill("2")
        page.locator("#settings").fill("train.lora.rnak=2")
        page.reload()
        eventually(lambda: page.locator("#epochs").input_value() == "2")
        assert page.locator("#data").input_value() == "photos"
        page.locator("#start").click()
        eventually(lambda: "did you mean rank" in page.locator("#settings-error").text_content())
        page.locator("#settings").fill("train.lora.rank=2")
        page.locator("#start").press("Enter")
        page.locator("#run-state.waiting").wait_for()
        assert page.evaluate("localStorage.length") == 0
        assert "train.lora.rank=2" in queue.waiting()["photos"].arguments  # named anew
        page.reload()
        page.locator("#run-state.waiting").wait_for()
        page.locator("#stop").click()
        eventually(lambda: queue.waiting() == {})


def test_a_key_is_asked_for_once(home: Path, browser: Any) -> None:
    key = add_key(home / "keys.json", "ann", frozenset({"admin"}))
    with served(KeyRing(home / "keys.json")) as url, opened(browser, url) as page:
        page.locator("#key").fill("diffray-wrong")
        page.keyboard.press("Enter")
        eventually(lambda: "unknown" in page.locator("#key-reason").text_content())
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        page.locator("#no-runs").wait_for()
        page.reload()
        page.locator("#no-runs").wait_for()
        assert not page.locator("#key-section").is_visible()

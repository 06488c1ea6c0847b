"""Serve the champion of the registry over HTTP, or draw some pictures with it and stop.

    python -m serving.command --config configs/demo.yaml
    python -m serving.command --config configs/demo.yaml --ask 4 --prompt "a red apple"

The endpoint answers at `serve.host` and `serve.port` until Ctrl-C. With `--ask` its pictures go to
`<storage>/<run>/samples/`.
"""

import base64
import errno
import fcntl
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle, islice
from types import FrameType
from typing import IO, Any, NoReturn

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

from cluster.connect import connect
from cluster.fetched import cache_folder
from cluster.storage import Storage, slug
from ray_jobs.config import Config, ConfigError, add_config_arguments, load_config
from ray_jobs.console import complain, quiet_logs, show
from ray_jobs.console.commands import command_parser
from ray_jobs.registry.models import RegisteredModel, champion, verify_weights
from ray_jobs.run.folder import CAPTIONS, RunFolder
from serving.app import (
    APPLICATION,
    build_application,
    check_access,
    check_base,
    check_model,
    check_parts,
)
from serving.client import KEY_VARIABLE, EndpointError, browsable, call
from serving.service.registry_watcher import replaced_by

DEFAULT_PROMPTS = ["a red apple", "a sad face", "a cat", "a rocket"]

PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Environment of Serve's controller. By default it kills an HTTP proxy that is not up within 5 s, and on a
busy machine with few cores none ever is."""


def free_port(host: str, port: int, *, else_any: bool = False) -> int:
    """Return `port` if it is free; any free port for 0, or with `else_any` for an occupied one.

    Raises:
        ConfigError: the address cannot be used; names serve.port or serve.host.
    """
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0]) as listener:
            # As the HTTP server does: closing connections do not occupy a port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address[4])
            return int(listener.getsockname()[1])
    except socket.gaierror as error:
        raise ConfigError(f"serve.host: {host}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if else_any:
                return free_port(host, 0)
            raise ConfigError(
                f"serve.port: {port} is in use; stop what listens there, or take another: "
                f"--set serve.port={free_port(host, 0)}"
            ) from None
        raise ConfigError(f"serve.host, serve.port: {host}:{port}: {error.strerror}") from None


@contextmanager
def held_port(host: str, port: int, *, else_any: bool = False) -> Iterator[int]:
    """Yield `free_port`, and hold it until the end against other commands of this user.

    A port is free until the HTTP server listens, seconds later. Ray's server shares its port with another
    one's, and each would then get a part of the requests.

    Raises:
        ConfigError: as `free_port`, or another command holds the port.
    """
    with (cache_folder() / f"ports-{socket.gethostname()}.lock").open("ab") as file:  # a byte for each port
        chosen = free_port(host, port, else_any=else_any)
        while not _locked(file, chosen):
            other = free_port(host, 0)
            if not else_any:
                raise ConfigError(
                    f"serve.port: {chosen} is being taken by another command; stop that, or take another: "
                    f"--set serve.port={other}"
                )
            chosen = other
        yield chosen


def _locked(file: IO[bytes], byte: int) -> bool:
    """Lock a byte of a file for this process; return False if another one has."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        return True
    except (BlockingIOError, PermissionError):  # POSIX leaves the choice
        return False


def serving_port(config: Config, port: int) -> int | None:
    """Return the port of the Serve that runs on the joined cluster; None if none runs.

    Args:
        port: the wanted port; 0: any.

    Raises:
        ConfigError: that Serve has the application already, which another one would replace, or it listens
            elsewhere, which cannot be changed.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    host, there = client.http_config.host, client.http_config.port
    if APPLICATION in serve.status().applications:
        raise ConfigError(
            f"RAY_ADDRESS: this cluster has an endpoint already, at {browsable(str(host), there)}, and can "
            "have one only; send requests there, or stop it: Ctrl-C in its command or, if that is gone, "
            f"python -c \"from ray import serve; serve.delete('{APPLICATION}')\""
        )
    if host != config.serve.host or port not in (0, there):
        raise ConfigError(
            "serve.host, serve.port: Ray Serve runs on this cluster already, and has one address for all "
            f"that it serves; --set serve.host={host} --set serve.port={there}"
        )
    return there


class Place:
    """An actor whose name at most one command of a cluster has at a time."""


def _take_place(config: Config, port: int) -> Any:
    """Return the only `Place` of the cluster, which is free again when this process ends.

    Raises:
        ConfigError: another command has it.
    """
    try:
        return ray.remote(num_cpus=0)(Place).options(name="endpoint", namespace=APPLICATION).remote()
    except ValueError:
        serving_port(config, port)  # says where the endpoint is, once it is there
        raise ConfigError(
            "RAY_ADDRESS: another command is starting an endpoint on this cluster, which can have one only; "
            "wait for it, and send requests there"
        ) from None


@contextmanager
def endpoint(config: Config, registered: RegisteredModel, port: int) -> Iterator[str]:
    """Serve `registered` on the joined Ray cluster, yield its URL once it answers, and stop it at the end.

    Raises:
        ConfigError: the cluster's Serve cannot take the application, see `serving_port`, or a setting is
            unusable, see `build_application` and `check_base`; raised before a replica starts.
        EndpointError: the application does not start, or nothing answers on the port.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    url = browsable(config.serve.host, port)
    place = _take_place(config, port)
    try:
        with _served(config, registered, port, url):
            yield url
    finally:
        ray.kill(place)


@contextmanager
def _served(config: Config, registered: RegisteredModel, port: int, url: str) -> Iterator[None]:
    """Serve `registered`, as `endpoint` does, in a cluster where no other command does."""
    was_serving = serving_port(config, port) is not None
    application = build_application(config, registered)
    # In a worker, which may be nearer to the base and is gone afterwards: this process imports no PyTorch.
    checked = ray.remote(num_cpus=0)(check_base).remote(config, registered)
    try:
        # If the proxy needs more than a minute, `wait_until_ready` below keeps waiting.
        with suppress(TimeoutError, RayActorError):
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options={"host": config.serve.host, "port": port},
                controller_options={"runtime_env": {"env_vars": PATIENCE}},
            )
        _require(checked)
        try:
            serve.run(application, name=APPLICATION)
        except (RuntimeError, RayError) as error:
            raise EndpointError(_why_not_started(error)) from error
        wait_until_ready(url)
        yield
    finally:
        if was_serving or _others_are_served():
            serve.delete(APPLICATION)
        else:
            serve.shutdown()


def _require(checked: "ray.ObjectRef[None]") -> None:
    """Wait for a check; raise the ConfigError that it found."""
    try:
        ray.get(checked)
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise ConfigError(str(error.cause)) from None
        raise


def _others_are_served() -> bool:
    """Return True if the cluster's Serve has other applications: some may have joined one started here."""
    try:
        return bool(serve.status().applications.keys() - {APPLICATION})
    except RayError:  # Serve died, and they with it
        return False


def wait_until_ready(url: str, timeout_s: float = 120) -> None:
    """Return once /readyz reports ok; the HTTP proxy may come up after the model.

    Raises:
        EndpointError: the last error after `timeout_s` seconds, or at once if another program answers.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = call(f"{url}/readyz")
            break
        except EndpointError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    if not isinstance(answer, dict) or answer.get("status") != "ok":
        raise EndpointError(f"{url}: another program answers there; choose another serve.port")


def _why_not_started(error: Exception) -> str:
    """Extract the exception that stopped a replica from Serve's status, else the status's last line."""
    deployments = serve.status().applications[APPLICATION].deployments.values()
    messages = [deployment.message for deployment in deployments if deployment.message]
    lines = [line.strip() for line in "\n".join(messages or [str(error)]).splitlines()]
    causes = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
    return (causes or [line for line in lines if line])[-1]


def default_prompts(samples: Storage) -> list[str]:
    """Return the distinct captions of the run's report (`samples/captions.json`), else DEFAULT_PROMPTS."""
    if not samples.exists(CAPTIONS):
        return DEFAULT_PROMPTS
    captions = json.loads(samples.read_text(CAPTIONS))
    if not isinstance(captions, list) or not all(isinstance(each, str) for each in captions):
        raise ConfigError(f"{samples.uri}/{CAPTIONS}: must be a list of captions; delete it")
    return list(dict.fromkeys(captions)) or DEFAULT_PROMPTS


def _drawn(config: Config, url: str, body: dict[str, object]) -> Any:
    """Return the answer to one request, retrying when the endpoint gives a Retry-After."""
    while True:
        try:
            return call(
                f"{url}/v1/images/generations",
                body,
                config.serve.request_timeout_s + 10,
                key=os.environ.get(KEY_VARIABLE),
            )
        except EndpointError as error:
            if error.retry_after_s is None:
                raise
            time.sleep(error.retry_after_s)


def ask(config: Config, url: str, count: int, prompts: Sequence[str]) -> None:
    """Request `count` images over HTTP, concurrently, and save them in the run's samples folder."""
    samples = RunFolder.of(config).samples
    chosen = list(islice(cycle(prompts or default_prompts(samples)), count))
    # Repeated prompts get different seeds, and so different images.
    bodies = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(chosen)]
    started = time.perf_counter()
    at_once = min(count, config.serve.max_queued_requests, config.serve.concurrent_requests)
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda body: _drawn(config, url, body), bodies))
    seconds = time.perf_counter() - started
    for index, (prompt, answer) in enumerate(zip(chosen, answers, strict=True)):
        name = f"served-{index}-{slug(prompt)}.png"
        samples.write_bytes(name, base64.b64decode(answer["data"][0]["b64_json"]))
        show(f"serve: {prompt!r} (seed {index}) -> {samples.uri}/{name}")
    show(f"serve: {count} pictures in {seconds:.1f} s, {seconds / count:.2f} s a picture")


def _announce(config: Config, registered: RegisteredModel, url: str) -> None:
    """Print the endpoint's address and a command to paste."""
    show(f"serve: {registered.name} version {registered.version} at {url}/v1 (Ctrl-C stops it)")
    body = json.dumps({"prompt": DEFAULT_PROMPTS[0], "seed": 1})
    key = "" if config.serve.allow_anonymous else f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    show(
        f"curl -s {url}/v1/images/generations{key} -H 'Content-Type: application/json' -d '{body}' \\\n"
        "  | python3 -c 'import sys, json, base64; "
        'sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\' '
        "> picture.png"
    )


def _stop(signum: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signum)


def intact(config: Config, registered: RegisteredModel) -> RegisteredModel:
    """Return the champion, or the version it replaced if its weights differ from the registered ones.

    Raises:
        ConfigError: neither version's weights are the registered ones.
    """
    try:
        verify_weights(registered, registered.source)
    except ConfigError as error:
        former = replaced_by(config, registered)
        if former is None:
            raise
        verify_weights(former, former.source)
        show(f"serve: {error}; version {former.version}, which it replaced, is served")
        return former
    return registered


@contextmanager
def _port(config: Config, asking: bool) -> Iterator[int]:
    """Yield the port of the joined cluster's Serve, else a free one on which a new Serve is to listen."""
    running = serving_port(config, 0 if asking else config.serve.port) if ray.is_initialized() else None
    if running:
        yield running
        return
    with held_port(config.serve.host, config.serve.port, else_any=asking) as port:
        if asking and port != config.serve.port and config.serve.port:
            show(f"serve: port {config.serve.port} is in use, taking {port}")
        yield port


def run(config: Config, num_pictures: int | None, prompts: Sequence[str]) -> None:
    """Start the endpoint; generate `num_pictures` images and stop, or run until a signal arrives."""
    check_access(config)
    if num_pictures is not None and not (config.serve.allow_anonymous or os.environ.get(KEY_VARIABLE)):
        raise ConfigError(
            f"--ask: the endpoint asks for a key (serve.keys); give one in the environment, as {KEY_VARIABLE}"
        )
    registered = champion(config)
    if Storage.open(registered.source).is_local:
        # The replicas check it too, but an error is better reported before Ray starts.
        registered = intact(config, registered)
    check_model(config, registered)
    check_parts(config)
    asking = num_pictures is not None
    joins_later = bool(os.environ.get("RAY_ADDRESS")) and not ray.is_initialized()
    with ExitStack() as held:
        # No Serve runs on an embedded cluster, and an error is better reported before Ray starts.
        port = None if joins_later else held.enter_context(_port(config, asking))
        log = quiet_logs()
        show(f"framework logs: {log} and Ray's session folder")
        show(f"serve: starting {registered.name} version {registered.version}")
        held.enter_context(connect(config, "serve"))
        # Ray sets its own handlers, which would skip the endpoint's orderly shutdown.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, _stop)
        if port is None:
            port = held.enter_context(_port(config, asking))
        url = held.enter_context(endpoint(config, registered, port))
        if num_pictures is not None:
            ask(config, url, num_pictures, prompts)
            return
        _announce(config, registered, url)
        while True:
            signal.pause()


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for a configuration error, 1 for a failed endpoint."""
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--ask", type=int, metavar="N", help="draw N pictures over HTTP, then stop")
    parser.add_argument("--prompt", action="append", default=[], help="for --ask; may be repeated")
    options = parser.parse_args(arguments)
    try:
        if options.ask is not None and options.ask < 1:
            raise ConfigError(f"--ask {options.ask}: ask for at least one picture")
        run(load_config(options.config, options.overrides), options.ask, options.prompt)
    except ConfigError as error:
        return complain(error)
    except Exception as error:
        if not isinstance(error, EndpointError):
            traceback.print_exc()  # into the log, whose path was printed
        show(f"error: serve: {' '.join(str(error).split())[:500]}")
        return 1
    except KeyboardInterrupt:
        show("serve: stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

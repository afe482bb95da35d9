"""The Ray Serve application: predictions in one deployment, adaptations off the hot path in another.

``build`` makes it from plain settings (``serve deploy`` and RayService name it by import path), ``run`` starts it on an
embedded Ray and blocks. The process that decodes a request also computes it, so no array travels for a prediction; the
catalogue of states is a folder that all replicas read, so nothing but adaptations leaves the replica.

Two fronts. ``direct``: every replica listens on the public port itself (SO_REUSEPORT; the kernel spreads connections),
and Ray Serve supervises it: start, health, restart. ``proxy``: Ray Serve's HTTP proxies take the requests, as clusters
need; that costs some milliseconds a request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import LoggingConfig

from moe.errors import EnvironmentProblem, MoepipeError, SpecError
from orchestrator import console
from orchestrator.doctor import port_is_free
from orchestrator.executors.ray_env import prepare_environment, remove_dead_sessions
from serve.config import ServeConfig, checked, require_closed
from serve.http.problems import Refused

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from serve.adapting import AdaptRequest
    from serve.local import LocalBackend

APPLICATION = "moepipe"
DEFAULT_URL = "http://127.0.0.1:8000"
_HEALTH_S = 2.0
_DRAIN_S = 30.0
_ONGOING = 1024
_SPARE = 64  # besides adaptations the deployment answers how far jobs are
_OBJECT_STORE = 256 * 2**20
_log = logging.getLogger("moepipe.serve")


# ---- what crosses between the deployments ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A result or the refusal in its place: our errors travel as values, since Ray would wrap what is raised."""

    value: Any = None
    error: MoepipeError | None = None

    def get(self) -> Any:
        """The result. Raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


async def _outcome(work: Awaitable[Any]) -> Outcome:
    try:
        return Outcome(await work)
    except MoepipeError as error:
        return Outcome(error=error)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        return Outcome(error=SpecError(f"The options do not fit: {wrong}.", "See `moepipe explain` of the method."))


def _load(config: ServeConfig, make: Callable[..., LocalBackend] | None = None) -> LocalBackend:
    """Model and catalogue in this process, with a backend that ``make`` builds over them (local by default)."""
    import torch

    from serve.batching import BatchLimits
    from serve.catalogue import Catalogue
    from serve.local import LocalBackend
    from serve.model import ServedModel

    torch.set_num_threads(config.threads)
    model = ServedModel.load(config.model, config.store_url, config.device, config.name)
    catalogue = Catalogue(config.states_folder, config.resident_bytes, model.info.version)
    batch = BatchLimits(
        rows=config.batch_rows,
        wait=config.batch_wait_ms / 1000,
        queue_rows=config.queue_rows,
        longest=config.max_wait_s,
    )
    return (make or LocalBackend)(
        model,
        catalogue,
        batch=batch,
        data=Path(config.data) if config.data else None,
        adapt_queue=config.adapt_queue,
        max_images=config.limits.max_support,
        max_steps=config.adapt_steps,
    )


def _refused(error: BaseException) -> Refused:
    """What a client is told when the adaptation deployment did not answer. It may try again: the key makes it safe."""
    if isinstance(error, BackPressureError):
        return Refused(429, "overloaded", "Too many adaptations wait already.", "Try again later.", retry_after=5)
    return Refused(
        503, "unavailable", "The adaptation worker stopped before it answered.", "Try again: nothing was published.", 5
    )


class _Remote:
    """The adapting side of the backend, in the other deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of :class:`Adaptation`. Raises what it refused, or Refused when it did not answer."""
        try:
            outcome: Outcome = await getattr(self._handle, method).remote(*arguments)
        except (BackPressureError, DeploymentUnavailableError, ray.exceptions.RayError) as error:
            _log.warning("adaptation deployment: %s", error)
            raise _refused(error) from None
        return outcome.get()


@ray_serve.deployment(name="adaptation", health_check_period_s=_HEALTH_S, graceful_shutdown_timeout_s=_DRAIN_S)
class Adaptation:
    """Makes and renews states. One replica: jobs and streams live in its memory, states in the catalogue's folder."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._backend = _load(checked(settings))

    async def adapt(self, request: AdaptRequest) -> Outcome:
        """See :meth:`serve.http.backend.Backend.adapt`."""
        return await _outcome(self._backend.adapt(request))

    async def start(self, request: AdaptRequest) -> Outcome:
        """See :meth:`serve.http.backend.Backend.start`."""
        return await _outcome(self._backend.start(request))

    async def job(self, tenant: str, job: str) -> Outcome:
        """See :meth:`serve.http.backend.Backend.job`."""
        return await _outcome(self._backend.job(tenant, job))

    async def stream(self, request: AdaptRequest) -> Outcome:
        """See :meth:`serve.http.backend.Backend.stream`."""
        return await _outcome(self._backend.stream(request))


def _replica(settings: Mapping[str, Any], adaptation: Any) -> tuple[ServeConfig, FastAPI]:
    """The HTTP surface of one replica: predictions here, adaptations there."""
    from serve.http.api import make_api
    from serve.http.auth import Tokens
    from serve.http.samples import offer_samples
    from serve.page.samples import Samples
    from serve.remote import RemoteBackend

    config = checked(settings)
    tokens = Tokens.read(Path(config.tokens_file)) if config.tokens_file else Tokens()
    backend = _load(config, partial(RemoteBackend, _Remote(adaptation).ask, config.adapt_queue + 1))
    api = make_api(backend, limits=config.limits, tokens=tokens)
    offer_samples(api, Samples(Path(config.samples) if config.samples else None))
    return config, api


@ray_serve.deployment(name="inference", health_check_period_s=_HEALTH_S, graceful_shutdown_timeout_s=_DRAIN_S)
class Direct:
    """A replica that listens on the public port itself."""

    def __init__(self, settings: Mapping[str, Any], adaptation: Any) -> None:
        from serve.front import Front

        config, api = _replica(settings, adaptation)
        self._front = Front(api, config.host, config.port)

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        self._front.check()

    async def __del__(self) -> None:
        await asyncio.to_thread(self._front.close)


@ray_serve.deployment(
    name="inference",
    health_check_period_s=_HEALTH_S,
    graceful_shutdown_timeout_s=_DRAIN_S,
    max_ongoing_requests=_ONGOING,
    max_queued_requests=_ONGOING,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=2),
)
@ray_serve.ingress()
class Proxied:
    """A replica behind Ray Serve's proxies."""

    def __init__(self, settings: Mapping[str, Any], adaptation: Any) -> None:
        self._config, self._api = _replica(settings, adaptation)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api


# ---- the application -------------------------------------------------------------------------------------------------


def check(settings: Mapping[str, Any]) -> ServeConfig:
    """The settings as a configuration. Raises SpecError when they do not fit."""
    return checked(settings)


def build(settings: dict[str, Any]) -> Application:
    """The application, from the fields of :class:`serve.config.ServeConfig`; ``import_path: serve.app:build``.

    Raises:
        SpecError: the settings do not fit.
    """
    config = checked(settings)
    values = config.model_dump(mode="json")
    actor = {"num_cpus": 1, "num_gpus": config.gpus}
    adapting: Any = Adaptation
    front: Any = Direct if config.front == "direct" else Proxied
    adaptation = adapting.options(
        ray_actor_options=actor, max_ongoing_requests=config.adapt_queue + _SPARE, max_queued_requests=_ONGOING
    ).bind(values)
    return front.options(num_replicas=config.replicas, ray_actor_options=actor).bind(values, adaptation)


def start(settings: Mapping[str, Any]) -> ServeConfig:
    """Start the application on the Ray that this process is connected to, and wait until it answers.

    Raises:
        SpecError: the settings do not fit, or others would reach the server without a token.
        EnvironmentProblem: the port is taken, or the replicas do not start.
    """
    config = checked(settings)
    require_closed(config)
    if not port_is_free(config.port, config.host):
        raise EnvironmentProblem(f"Port {config.port} on {config.host} is in use.", "Take another one with --port.")
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    location = "Disabled" if config.front == "direct" else "HeadOnly"
    http = HTTPOptions(host=config.host, port=config.port, request_timeout_s=600.0)
    ray_serve.start(proxy_location=location, http_options=http, logging_config=quiet)
    try:
        ray_serve.run(build(dict(settings)), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        hint = "The replicas' logs lie in Ray's session folder, below serve."
        raise EnvironmentProblem(f"The server did not start: {_cause(error)}.", hint) from None
    return config


def _cause(error: BaseException) -> str:
    """The line of a traceback in a Serve message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line or "Problem: " in line), lines[-1])


def run(settings: Mapping[str, Any]) -> None:
    """Serve until Ctrl-C or SIGTERM, on an embedded Ray (or on the one that this process is connected to).

    Raises:
        NotFoundError, SpecError, CheckpointError: the model cannot be found or served; said before anything starts.
        EnvironmentProblem: as :func:`start`, or Ray does not start.
    """
    from serve.loading import locate

    config = checked(settings)
    require_closed(config)
    parts = locate(config.model, config.store_url, config.name)
    with _embedded_ray(config.replicas + 1):
        previous = signal.signal(signal.SIGTERM, _interrupt)  # after Ray, which puts one of its own in place
        try:
            console.note(f"Starting {parts.name} ({parts.version[:12]}); some seconds ...")
            start(settings)
            console.say(*_welcome(config, parts.name, parts.why))
            threading.Event().wait()
        except KeyboardInterrupt:
            console.note("Stopping ...")
        finally:
            signal.signal(signal.SIGTERM, previous)
            ray_serve.shutdown()


def _welcome(config: ServeConfig, name: str, why: str) -> list[str]:
    base = f"http://{config.host}:{config.port}"
    url = "" if base == DEFAULT_URL else f" --url {base}"
    lines = [
        f"Serving {name} at {base} (page: /, reference: /docs, metrics: /metrics)",
        f"  adapt to a new domain:  moepipe adapt NAME FOLDER_WITH_IMAGES{url}",
        f"  ask it:                 moepipe predict IMAGE --state NAME{url}",
        f"  states are kept in      {config.states_folder}",
    ]
    return [*lines, f"  distill is not available: {why}"] if why else lines


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _embedded_ray(processes: int) -> Iterator[None]:
    """A Ray of our own on loopback with token authentication; one that is there already is used and stays."""
    folder = prepare_environment()
    if ray.is_initialized():
        yield
        return
    remove_dead_sessions(folder)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets answers wait for whatever else runs here
    try:
        ray.init(
            address="local",
            num_cpus=max(processes, len(os.sched_getaffinity(0))),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=_OBJECT_STORE,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray raises a bare Exception when a process of its own dies while it starts
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvironmentProblem(
            f"An embedded Ray could not be started: {said}.", "`moepipe doctor` checks it."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()

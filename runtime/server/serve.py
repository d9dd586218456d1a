"""Starts the server, and stops it without losing a request; `process` runs it."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_reflection.v1alpha import reflection

from runtime.compositor import Compositor
from runtime.edits.fillers import require_filler
from runtime.errors import InputError
from runtime.segmentation import Segmenter, beside, engine_bytes
from runtime.server.access import Access
from runtime.server.batching import Batcher
from runtime.server.bundles import Bundles
from runtime.server.connections import most_connections
from runtime.server.gate import CHANNEL_OPTIONS, Gate
from runtime.server.health import SERVICE, Health
from runtime.server.logs import FIELDS
from runtime.server.memory import LARGEST_METADATA, LARGEST_SCENE, Ledger, request_bytes
from runtime.server.metrics import Metrics
from runtime.server.metrics_page import MetricsPage
from runtime.server.models import Models
from runtime.server.served_model import ServedModel, common_settings
from runtime.server.service import NAME, CompositorService
from runtime.server.settings import Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from runtime.server.http.door import Door
    from runtime.server.http.jobs import Jobs

_LAST_ANSWERS_SECONDS = 1.0
_SHARE_FOR_RESULTS = 4
"""A quarter of the memory for requests, at most, is taken by results of jobs that wait to be fetched."""

logger = logging.getLogger(__name__)


class Server:
    """Models behind gRPC, with health, reflection and metrics."""

    def __init__(
        self,
        compositor: Compositor,
        settings: Settings,
        filler: Compositor | None = None,
        bundles: Bundles | None = None,
    ) -> None:
        """Binds the addresses; call `start` in the same event loop.

        Args:
            compositor: the first model; its segmenter finds objects for all of them.
            settings: of the server.
            filler: fills the holes of edits, where a model does not.
            bundles: where the models are; as the settings say if None.

        Raises:
            InputError: an address cannot be bound, a file of the settings cannot be read, or a setting does
                not fit the bundle.
        """
        if settings.max_batch > compositor.max_batch:
            raise InputError(f"max_batch is {settings.max_batch}; the bundle has {compositor.max_batch}")
        self.metrics = Metrics()
        self.addresses: list[str] = []
        """The addresses that it listens on, with the ports chosen for port 0."""
        self.access = Access(settings)
        self._settings = settings
        bundles = bundles or Bundles(settings, settings.engine, compositor.segmenter)
        self.health = Health((NAME,), bundles.names)
        self._page = None
        if settings.metrics:
            access = self.access if settings.metrics_token else None
            self._page = MetricsPage(settings.metrics, self.metrics.registry, access, self.health)
        self.metrics_port = self._page.port if self._page else None
        self._door: Door | None = None
        self._jobs: Jobs | None = None
        self.engine_lost = asyncio.Event()
        """Set when the engine has failed for good: health is NOT_SERVING then, and nothing is accepted."""
        self._watch: asyncio.Task[None] | None = None
        self.ledger = Ledger(settings.memory_for_requests)
        self.gate = Gate(self.access, self.ledger, settings, self.metrics)
        self._grpc = self._new_grpc_server(settings)
        self._bind()
        self.models = Models(bundles, self._serve_model, self.health)
        self.service = CompositorService(self.models)
        self._grpc.add_generic_rpc_handlers((self.service.handler(), self.health.handler()))
        if settings.http:
            self._open_http()
        self.http_address = self._door.address if self._door else None
        reflection.enable_server_reflection((NAME, SERVICE, reflection.SERVICE_NAME), self._grpc)
        # engines load from here on, and a library that loads a graph cannot be stopped: refusals come before
        self._filler = (
            Batcher(filler, **common_settings(settings), max_batch=1, workers=1) if filler else None
        )
        self.models.add(bundles.names[0], compositor)
        self._show_metrics()

    def _serve_model(self, name: str, compositor: Compositor) -> ServedModel:
        self.metrics.loads.labels(name).inc()
        return ServedModel(name, compositor, self._settings, self.metrics, self._filler)

    def _show_metrics(self) -> None:
        metrics = self.metrics
        for gauge, of_one in (
            (metrics.queued, lambda model: sum(not each.starts for each in model.batcher.tickets)),
            (metrics.running, lambda model: sum(each.running for each in model.batcher.tickets)),
            (metrics.cache_bytes, lambda model: model.compositor.system.kept_bytes()),
        ):
            for name in self.models.names:
                gauge.labels(name).set_function(partial(self.models.total, name, of_one))
        for name in self.models.names:
            metrics.loaded.labels(name).set_function(partial(self.models.is_loaded, name))
        metrics.request_bytes.set_function(lambda: self.ledger.taken)

    async def start(self) -> None:
        """Answers calls, and loads the graphs; health is SERVING when that is done.

        Raises:
            AnyDoorError: the graphs cannot be loaded.
        """
        await self._grpc.start()
        if self._page:
            await self._page.start()
        if self._door:
            self._door.start()
        _log(
            "listening",
            addresses=self.addresses,
            metrics_port=self.metrics_port,
            http=self.http_address,
        )
        self._warn_of_memory()
        if self._filler:
            # a server that is stopped meanwhile must not cancel the future, which the thread will set
            await asyncio.shield(asyncio.wrap_future(self._filler.loaded))
        await self.models.start()
        await self.health.set(ready=True)
        self._watch = asyncio.create_task(self._watch_engine())
        _log("serving", models=self.models.names)

    def reload(self) -> None:
        """Reads tokens and certificates again, and bundles that have changed; what cannot be used changes
        nothing."""
        self.models.reload()
        try:
            self.access.reload()
        except InputError as error:
            logger.error("not reloaded", extra={FIELDS: {"reason": str(error)}})
        else:
            _log("reloaded")

    async def stop(self) -> bool:
        """Refuses new requests, finishes the accepted ones in the time set, and closes.

        Returns whether all of them were finished; the others were refused with UNAVAILABLE.
        """
        seconds = self._settings.drain_seconds
        end = time.monotonic() + seconds
        if self._watch:
            self._watch.cancel()
        await self.health.set(ready=False)
        self.models.refuse()
        accepted = sum(len(model.batcher.tickets) for model in self.models.alive)
        _log("draining", accepted=accepted, at_most_seconds=seconds)
        # an edit is through with the model last
        clean = not self._filler or await asyncio.to_thread(self._filler.drain, seconds)
        clean = await self.models.drain(end - time.monotonic()) and clean
        # the last answers may still be on their way
        while self.gate.at_work and time.monotonic() < end + _LAST_ANSWERS_SECONDS:
            await asyncio.sleep(0.01)
        self.gate.stop()
        if self._jobs:
            await self._jobs.stop()
        if self._door:
            await self._door.stop()
        await self.health.stop()
        await self._grpc.stop(grace=0.1)
        if self._page:
            await self._page.stop()
        _log("stopped", all_finished=clean)
        return clean

    @property
    def is_busy(self) -> bool:
        """Whether a thread runs."""
        return self.models.is_busy or bool(self._filler and self._filler.is_busy)

    async def _watch_engine(self) -> None:
        if self._filler:
            self.models.watch(self._filler)
        await self.models.lost.wait()
        await self.health.set(ready=False, alive=False)
        logger.error("engine lost")
        self.engine_lost.set()

    def _warn_of_memory(self) -> None:
        """Tells when the largest request that the limits allow has no room."""
        settings, manifest = self._settings, self.models.first.compositor.bundle.manifest
        needed = request_bytes(
            pixels=settings.max_pixels,
            scene=LARGEST_SCENE,
            masks=settings.max_placements,
            placements=settings.max_placements,
            drawn=math.prod(manifest.picture_size),
            images=settings.max_images,
            channels=4,
            metadata=LARGEST_METADATA,
        )
        if needed > self.ledger.capacity:
            logger.warning(
                "the largest requests will be refused",
                extra={FIELDS: {"need": needed, "request_memory": self.ledger.capacity}},
            )

    def _new_grpc_server(self, settings: Settings) -> grpc.aio.Server:
        return grpc.aio.server(
            interceptors=[self.gate],
            options=[
                *CHANNEL_OPTIONS,
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_allowed_incoming_connections", most_connections(settings)),
            ],
        )

    def _open_http(self) -> None:
        """Binds the address for HTTP.

        Raises:
            InputError: it is invalid or taken, or the packages are missing.
        """
        app = self.http_app()
        from runtime.server.http.door import Door

        settings = self._settings
        self._door = Door(settings.http, app, self.access.tls_context(), most_connections(settings))

    def http_app(self, with_jobs: bool = True) -> ASGIApp:
        """Returns the HTTP listener.

        Args:
            with_jobs: whether there are jobs; they are this server's alone.

        Raises:
            InputError: the packages are missing.
        """
        try:
            from runtime.server.http.app import new_app
            from runtime.server.http.composites import Composites
            from runtime.server.http.jobs import Jobs
        except ModuleNotFoundError as error:
            raise InputError(f"HTTP needs the package {error.name}: pip install '.[http]'") from error
        settings = self._settings
        composites = Composites(self.models, self.addresses)
        folder = Path(settings.job_folder) if settings.job_folder else None
        if with_jobs:
            room = settings.job_folder_bytes if folder else self.ledger.capacity / _SHARE_FOR_RESULTS
            self._jobs = Jobs(composites, self.gate, room, folder)
        return new_app(self.gate, self.health, composites, self._jobs, settings)

    def _bind(self) -> None:
        tls = self.access.credentials()
        for address in self._settings.listen:
            is_unix = address.startswith("unix:")
            if is_unix:
                _require_free(address)
            try:
                if tls is not None:
                    port = self._grpc.add_secure_port(address, tls)
                else:
                    port = self._grpc.add_insecure_port(address)
            except RuntimeError as error:
                raise InputError(f"cannot listen at '{address}': {_why_not(address)}") from error
            self.addresses.append(address if is_unix else f"{address.rpartition(':')[0]}:{port}")


def _require_free(address: str) -> None:
    """Refuses a unix socket at which somebody listens: gRPC would take its place.

    Raises:
        InputError: somebody does.
    """
    path = address.removeprefix("unix:").removeprefix("//")
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(path)
        raise InputError(f"cannot listen at '{address}': another process does")


def _why_not(address: str) -> str:
    """Returns why nothing can listen at an address, which gRPC does not say."""
    host, _, port = address.rpartition(":")
    try:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:").removeprefix("//"))
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(str(path))
            path.unlink()
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        return error.strerror or str(error)
    return "it is not an address"


def open_models(settings: Settings) -> tuple[Compositor, Compositor | None, Bundles]:
    """Opens the first model and what fills the holes of edits, and says where the other models are.

    Raises:
        AnyDoorError: one of the first two, or a segmenter, cannot be used.
    """
    key = settings.trusted_key or None
    segmenter = Segmenter.load(*settings.segmenter, options=settings.engine, trusted_key=key)
    segmenter.load_graphs()
    options, filler = segmenter.beside(settings.engine), None
    if settings.filler:
        filler = Compositor.load(settings.filler, options, cache_bytes=0, trusted_key=key)
        require_filler(filler)
        if filler.engine.device != "cpu":
            # the model's plan counts what is free on the card
            for _ in filler.load_graphs():
                pass
        options = beside(options, engine_bytes(filler.bundle, filler.engine))
    bundles = Bundles(settings, options, segmenter)
    compositor = bundles.load(bundles.open(bundles.names[0]))
    if plan := compositor.engine.describe():
        _log("memory plan", plan=plan.splitlines())
    return compositor, filler, bundles


def _log(event: str, **fields: object) -> None:
    logger.info(event, extra={FIELDS: fields})

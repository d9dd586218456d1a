"""Starts the server, and stops it without losing a request."""

from __future__ import annotations

import asyncio
import logging
import signal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from runtime.compositor import Compositor
from runtime.errors import InputError
from runtime.server import tracing
from runtime.server.access import TokenInterceptor, credentials, read_tokens
from runtime.server.batching import Batcher
from runtime.server.logs import FIELDS, configure
from runtime.server.metrics import Metrics
from runtime.server.service import NAME, CompositorService
from runtime.server.settings import Settings

_OTHER_CALLS = 32
"""Calls at a time beside those that the batcher accepts: refusals, health, reflection."""

logger = logging.getLogger(__name__)


class Server:
    """A Compositor behind gRPC, with health, reflection and metrics."""

    def __init__(self, compositor: Compositor, settings: Settings) -> None:
        """Binds the addresses; call `start` in the same event loop.

        Raises:
            InputError: an address cannot be bound, or a file of the settings cannot be read.
        """
        self.metrics = Metrics()
        self.addresses: list[str] = []
        """Where it listens, with the ports that were chosen for port 0."""
        self.metrics_port = self.metrics.serve(settings.metrics) if settings.metrics else None
        self._settings = settings
        self.engine_lost = asyncio.Event()
        """Set when the engine has failed for good: health is NOT_SERVING then, and nothing is accepted."""
        self._watch: asyncio.Task[None] | None = None
        self._grpc = self._new_grpc_server(settings, compositor.max_batch)
        self._bind()
        self.batcher = Batcher(
            compositor,
            limits=settings.limits,
            queue=settings.queue,
            max_batch=settings.max_batch or None,
            workers=settings.workers,
            batching=settings.batching,
            on_samples=self.metrics.batch_samples.observe,
            on_seconds=self.metrics.step_seconds.observe,
        )
        self.metrics.queued.set_function(lambda: sum(not each.starts for each in self.batcher.tickets))
        self.metrics.running.set_function(lambda: sum(each.running for each in self.batcher.tickets))
        self.metrics.cache_bytes.set_function(compositor.system.kept_bytes)
        service = CompositorService(self.batcher, settings, self.metrics)
        self._grpc.add_generic_rpc_handlers((service.handler(),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

    async def start(self) -> None:
        """Answers calls, and loads the graphs; health is SERVING when that is done.

        Raises:
            AnyDoorError: the graphs cannot be loaded.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._grpc.start()
        _log("listening", addresses=self.addresses, metrics_port=self.metrics_port)
        await asyncio.wrap_future(self.batcher.loaded)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._watch = asyncio.create_task(self._watch_engine())
        _log("serving", bundle=self._settings.bundle)

    async def stop(self) -> bool:
        """Refuses new requests, finishes the accepted ones in the time set, and closes.

        Returns whether all of them were finished; the others were refused with UNAVAILABLE.
        """
        seconds = self._settings.drain_seconds
        if self._watch:
            self._watch.cancel()
        await self._health.enter_graceful_shutdown()
        _log("draining", accepted=len(self.batcher.tickets), at_most_seconds=seconds)
        clean = await asyncio.get_running_loop().run_in_executor(None, self.batcher.drain, seconds)
        # the last answers may still be on their way
        await self._grpc.stop(grace=max(seconds, 1.0))
        _log("stopped", all_finished=clean)
        return clean

    async def _watch_engine(self) -> None:
        # cancelling must not reach the batcher's future, which its thread will set
        await asyncio.shield(asyncio.wrap_future(self.batcher.lost))
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        logger.error("engine lost")
        self.engine_lost.set()

    def _new_grpc_server(self, settings: Settings, max_batch: int) -> grpc.aio.Server:
        interceptors = [TokenInterceptor(read_tokens(settings.tokens))] if settings.tokens else []
        return grpc.aio.server(
            interceptors=interceptors,
            maximum_concurrent_rpcs=settings.queue + max_batch + _OTHER_CALLS,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # two servers on one port would share its calls unnoticed
                ("grpc.so_reuseport", 0),
            ],
        )

    def _bind(self) -> None:
        tls = credentials(self._settings)
        for address in self._settings.listen:
            try:
                if tls is not None:
                    port = self._grpc.add_secure_port(address, tls)
                else:
                    port = self._grpc.add_insecure_port(address)
            except RuntimeError as error:
                raise InputError(f"cannot listen at '{address}': it is taken, or not an address") from error
            is_unix = address.startswith("unix")
            self.addresses.append(address if is_unix else f"{address.rpartition(':')[0]}:{port}")

    async def _set_health(self, status: int) -> None:
        for name in ("", NAME):
            await self._health.set(name, status)


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code: 0, or 1 if the engine failed for good.

    Raises:
        AnyDoorError: the bundle or a setting cannot be used.
    """
    configure(settings.log_level)
    tracing.configure()
    cache_bytes = None if settings.cache_bytes < 0 else settings.cache_bytes
    compositor = Compositor.load(
        settings.bundle,
        settings.engine,
        cache_bytes,
        settings.control_window or None,
        settings.trusted_key or None,
    )
    if plan := compositor.engine.describe():
        _log("memory plan", plan=plan.splitlines())
    return asyncio.run(_serve(compositor, settings))


async def _serve(compositor: Compositor, settings: Settings) -> int:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    server = Server(compositor, settings)
    try:
        await server.start()
        reasons = [asyncio.create_task(wait()) for wait in (stop.wait, server.engine_lost.wait)]
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for number in signals:
            # a second signal ends the process at once
            loop.remove_signal_handler(number)
        await server.stop()
    return 0 if stop.is_set() else 1


def _log(event: str, **fields: object) -> None:
    logger.info(event, extra={FIELDS: fields})

"""Reports liveness and readiness: grpc.health.v1.Health, independent of all other work.

Ready are "" and the compositor's service: the first model is loaded, and requests are accepted. So is
"models/NAME", unless that model could not be loaded when it was last asked for. Alive is
"liveness": from the start until the engine is lost for good. Whoever restarts servers asks for that.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb

from runtime.server.call import Call
from runtime.server.connections import host_of
from runtime.server.events import BusyError, ShuttingDownError, UnknownServiceError
from runtime.server.parsing import parse

SERVICE: str = pb.DESCRIPTOR.services_by_name["Health"].full_name
LIVENESS = "liveness"
SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING

_WATCHES_OF_CONNECTION = 4
_WATCHES_OF_HOST = 64
_WATCHES = 1024


class Health:
    """Answers Check at once; Watch tells every change, to so many callers as cost next to nothing."""

    def __init__(self, services: tuple[str, ...], models: tuple[str, ...] = ()) -> None:
        """Is alive, and not ready.

        Args:
            services: names, beside "", that are ready when the server is.
            models: names of the models.
        """
        self._ready = ("", *services, *map(_service_of, models))
        self._unusable: set[str] = set()
        self._status = {LIVENESS: SERVING, **dict.fromkeys(self._ready, NOT_SERVING)}
        self._changed = asyncio.Condition()
        self._stopped = False
        self._watches: Counter[str] = Counter()

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._status[""] == SERVING

    @property
    def is_alive(self) -> bool:
        """Whether there is no need to start the server again."""
        return self._status[LIVENESS] == SERVING

    async def set(self, ready: bool, alive: bool = True) -> None:
        """Tells everybody."""
        async with self._changed:
            self._status[LIVENESS] = SERVING if alive else NOT_SERVING
            for service in self._ready:
                is_ready = ready and service not in self._unusable
                self._status[service] = SERVING if is_ready else NOT_SERVING
            self._changed.notify_all()

    async def note_model(self, name: str, works: bool) -> None:
        """Tells everybody whether a model can be used."""
        async with self._changed:
            service = _service_of(name)
            self._unusable = self._unusable - {service} if works else self._unusable | {service}
            self._status[service] = SERVING if works and self.is_ready else NOT_SERVING
            self._changed.notify_all()

    async def stop(self) -> None:
        """Ends all watches."""
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def _check(self, content: bytes, call: Call) -> pb.HealthCheckResponse:
        name = parse(pb.HealthCheckRequest, content).service
        if name not in self._status:
            raise UnknownServiceError(name)
        return pb.HealthCheckResponse(status=self._status[name])

    async def _watch(self, content: bytes, call: Call) -> None:
        name = parse(pb.HealthCheckRequest, content).service
        connection, host = call.connection, host_of(call.connection)
        places = [(host, _WATCHES_OF_HOST), ("", _WATCHES)]
        if connection != host:  # at a unix socket all look alike
            places.append((connection, _WATCHES_OF_CONNECTION))
        for place, most in places:
            if self._watches[place] >= most:
                raise BusyError("too many clients watch health: use Check, which always answers")
        self._watches.update(place for place, _ in places)
        try:
            await self._tell(name, call)
        finally:
            self._watches.subtract(place for place, _ in places)
            self._watches += Counter()  # drops what is 0

    async def _tell(self, name: str, call: Call) -> None:
        told = None
        while True:
            status = self._status.get(name, pb.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                await call.write(pb.HealthCheckResponse(status=status))
                told = status
            if self._stopped:
                raise ShuttingDownError()
            async with self._changed:
                if self._status.get(name, told) == told and not self._stopped:
                    await self._changed.wait()


def _service_of(model: str) -> str:
    return f"models/{model}"

"""Talks to a server as if it were a Compositor: the same calls give the same pictures.

from runtime.client import Client

with Client("localhost:50051") as client:
    image = client.composite("desk.jpg", Placement("cup.png", box=(80, 60, 300, 260)), seed=7)

`AsyncClient` is the same for asyncio.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from PIL import Image

from engines.errors import AnyDoorError
from runtime.errors import InputError
from runtime.imaging.pictures import PictureLike
from runtime.job import Composite
from runtime.request import Placement, Request, Sampling
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.ticket import Preview, Queued, StepDone
from runtime.server.wire import composites_from_message, message_from_request

News = Queued | StepDone | Preview | list[Composite]
"""What `stream` yields; the pictures come last."""

_SERVICE = pb.DESCRIPTOR.services_by_name["CompositorService"].full_name
_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            # a full queue says when to come back (grpc-retry-pushback-ms); that wait replaces the backoff
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}
_OPTIONS = [
    ("grpc.service_config", json.dumps(_RETRIES)),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # a call whose request exceeds this is never tried again; the default of 256 KiB is less than a picture
    ("grpc.per_rpc_retry_buffer_size", 256 << 20),
]


class ServerError(AnyDoorError):
    """The server could not be reached, or could not do it."""

    def __init__(self, text: str, code: str, request_id: str = "") -> None:
        super().__init__(text)
        self.code = code
        """Name of the gRPC status code."""
        self.request_id = request_id
        """What the server's logs call the request, if it got there."""


@dataclass(frozen=True)
class Tls:
    """How to trust the server, and how to be trusted by it. PEM files."""

    ca: Path | None = None
    """Certificates that the server's must be signed by; those of the system if None."""
    certificate: Path | None = None
    """Ours, where the server asks for one."""
    key: Path | None = None
    """Its private key."""

    def credentials(self) -> grpc.ChannelCredentials:
        """What a channel needs.

        Raises:
            InputError: a file cannot be read.
        """
        try:
            ca, key, certificate = (
                path.read_bytes() if path else None for path in (self.ca, self.key, self.certificate)
            )
        except OSError as error:
            raise InputError(f"cannot read '{error.filename}': {error.strerror}") from error
        return grpc.ssl_channel_credentials(ca, key, certificate)


class _Caller:
    """What both clients have in common."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = None,
    ) -> None:
        """Connects with the first call.

        Args:
            address: host:port or unix:/path.
            token: bearer token, where the server asks for one.
            tls: None for a connection without TLS.
            timeout: seconds that a call may take, retries included; a call's own `timeout` comes first.
        """
        self.address = address
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._credentials = tls.credentials() if tls else None
        self._timeout = timeout

    def _call(self, timeout: float | None) -> dict[str, Any]:
        """Arguments of every call."""
        return {"metadata": self._metadata, "timeout": self._timeout if timeout is None else timeout}

    def _refusal(self, error: grpc.RpcError) -> AnyDoorError:
        """The status of a call as one sentence."""
        code: grpc.StatusCode = error.code()
        metadata: Any = error.trailing_metadata()
        trailing = dict(metadata or ())
        request_id = str(trailing.get("request-id", ""))
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            refusal = InputError(error.details())
            refusal.field = str(trailing.get("field", ""))
            return refusal
        server = f"the server at {self.address}"
        text = {
            grpc.StatusCode.UNAVAILABLE: f"{server} cannot be reached",
            grpc.StatusCode.RESOURCE_EXHAUSTED: f"{server} cannot take the request",
            grpc.StatusCode.DEADLINE_EXCEEDED: f"{server} did not finish in time",
            grpc.StatusCode.UNAUTHENTICATED: f"{server} does not let you in",
        }.get(code, f"{server} failed ({code.name}{f', request {request_id}' if request_id else ''})")
        return ServerError(f"{text}: {error.details()}", code.name, request_id)


class Client(_Caller):
    """A server's Compositor; may be used from several threads."""

    def __init__(self, address: str, **settings: Any) -> None:
        """See `_Caller.__init__`: token, tls, timeout."""
        super().__init__(address, **settings)
        if self._credentials:
            self._channel = grpc.secure_channel(address, self._credentials, _OPTIONS)
        else:
            self._channel = grpc.insecure_channel(address, _OPTIONS)
        self._stub = _stub(self._channel)

    def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = None,
        sampling: Sampling = Sampling(),
        timeout: float | None = None,
    ) -> Image.Image:
        """The scene with the object in it; see `Compositor.composite`.

        Raises:
            InputError: the server refuses something about the request; `field` says what.
            ServerError: it cannot be reached, is too busy, or fails.
        """
        request = Request(scene, _listed(placements), seed, sampling)
        return Image.fromarray(self.run(request, timeout=timeout)[0].image)

    def run(
        self, request: Request, *, file_format: str = "PNG", timeout: float | None = None
    ) -> list[Composite]:
        """All pictures of a request, with seeds, regions and times. Raises as `composite`."""
        message = message_from_request(request, file_format)
        try:
            response = self._stub.Composite(message, **self._call(timeout))
        except grpc.RpcError as error:
            raise self._refusal(error) from error
        return composites_from_message(response)

    def stream(
        self,
        request: Request,
        *,
        preview_every: int = 0,
        file_format: str = "PNG",
        timeout: float | None = None,
    ) -> Iterator[News]:
        """Like `run`, and yields news on the way; leaving the loop cancels the request."""
        message = pb.CompositeStreamRequest(
            request=message_from_request(request, file_format), preview_every=preview_every
        )
        call = self._stub.CompositeStream(message, **self._call(timeout))
        try:
            for response in call:
                yield _news(response)
        except grpc.RpcError as error:
            raise self._refusal(error) from error
        finally:
            call.cancel()

    def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """Which model the server runs, and what it accepts. Raises as `composite`."""
        try:
            info: pb.GetModelInfoResponse = self._stub.GetModelInfo(
                pb.GetModelInfoRequest(), **self._call(timeout)
            )
        except grpc.RpcError as error:
            raise self._refusal(error) from error
        return info

    def close(self) -> None:
        """Ends the connection, and every call on it."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient(_Caller):
    """`Client` for asyncio."""

    def __init__(self, address: str, **settings: Any) -> None:
        """See `_Caller.__init__`: token, tls, timeout."""
        super().__init__(address, **settings)
        if self._credentials:
            self._channel = grpc.aio.secure_channel(address, self._credentials, _OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(address, _OPTIONS)
        self._stub = _stub(self._channel)

    async def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = None,
        sampling: Sampling = Sampling(),
        timeout: float | None = None,
    ) -> Image.Image:
        """See `Client.composite`."""
        request = Request(scene, _listed(placements), seed, sampling)
        return Image.fromarray((await self.run(request, timeout=timeout))[0].image)

    async def run(
        self, request: Request, *, file_format: str = "PNG", timeout: float | None = None
    ) -> list[Composite]:
        """See `Client.run`."""
        message = message_from_request(request, file_format)
        try:
            response = await self._stub.Composite(message, **self._call(timeout))
        except grpc.RpcError as error:
            raise self._refusal(error) from error
        return composites_from_message(response)

    async def stream(
        self,
        request: Request,
        *,
        preview_every: int = 0,
        file_format: str = "PNG",
        timeout: float | None = None,
    ) -> AsyncIterator[News]:
        """See `Client.stream`; close the iterator (`contextlib.aclosing`) to cancel."""
        message = pb.CompositeStreamRequest(
            request=message_from_request(request, file_format), preview_every=preview_every
        )
        call = self._stub.CompositeStream(message, **self._call(timeout))
        try:
            async for response in call:
                yield _news(response)
        except grpc.RpcError as error:
            raise self._refusal(error) from error
        finally:
            call.cancel()

    async def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """See `Client.model_info`."""
        try:
            info: pb.GetModelInfoResponse = await self._stub.GetModelInfo(
                pb.GetModelInfoRequest(), **self._call(timeout)
            )
        except grpc.RpcError as error:
            raise self._refusal(error) from error
        return info

    async def close(self) -> None:
        """Ends the connection, and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _stub(channel: Any) -> Any:
    return CompositorServiceStub(channel)  # type: ignore[no-untyped-call]


def _listed(placements: Placement | Sequence[Placement]) -> list[Placement]:
    return [placements] if isinstance(placements, Placement) else list(placements)


def _news(response: pb.CompositeStreamResponse) -> News:
    kind = response.WhichOneof("event")
    if kind == "queued":
        return Queued(response.queued.position)
    if kind == "step_done":
        return StepDone(response.step_done.done, response.step_done.total)
    if kind == "preview":
        return Preview(response.preview.image_index, response.preview.image)
    return composites_from_message(response.result)

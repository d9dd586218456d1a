"""Talks to a server as if it were a Compositor: the same calls give the same pictures.

from runtime.client import Client

with Client("localhost:50051") as client:
    image = client.composite("desk.jpg", Placement("cup.png", box=(80, 60, 300, 260)), seed=7)

`AsyncClient` is the same for asyncio.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.errors import AnyDoorError
from runtime.errors import InputError
from runtime.imaging.pictures import PictureLike
from runtime.proxy import is_local, proxy_for
from runtime.request import Placement, Request, Sampling
from runtime.result import Composite
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.events import Preview, Queued, StepDone
from runtime.server.wire import composites_from_message, message_from_request

ClientEvent = Queued | StepDone | Preview | list[Composite]
"""What `stream` yields; the pictures come last."""

StepCallback = Callable[[int, int], object]
"""Called after every step with the steps done and all steps, counted over all pictures and placements."""

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
    """The server could not be reached, or failed."""

    def __init__(self, text: str, code: str, request_id: str = "") -> None:
        super().__init__(text)
        self.code = code
        """Name of the gRPC status code."""
        self.request_id = request_id
        """What the server's logs call the request, if it got there."""


@dataclass(frozen=True)
class Tls:
    """Certificates of a connection with TLS. PEM files."""

    ca: Path | None = None
    """Certificates that the server's must be signed by; those of the system if None."""
    certificate: Path | None = None
    """The client's own, where the server asks for one."""
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


One = TypeVar("One")
Several = TypeVar("Several")


class _Connection(Generic[One, Several]):
    """What both clients have in common: a channel, requests and refusals."""

    _channels: Any
    """The module that makes channels."""

    def __init__(
        self, address: str, *, token: str | None = None, tls: Tls | None = None, timeout: float | None = None
    ) -> None:
        """Connects with the first call.

        Args:
            address: host:port or unix:/path.
            token: bearer token, where the server asks for one.
            tls: None for a connection without TLS.
            timeout: seconds that a call may take, retries included; a call's own `timeout` comes first.

        Raises:
            InputError: a file of `tls` cannot be read.
        """
        self.address = address
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout = timeout
        # a proxy of the environment does not lead back to this machine
        options = [*_OPTIONS, ("grpc.enable_http_proxy", int(not is_local(address)))]
        if tls:
            self._channel = self._channels.secure_channel(address, tls.credentials(), options)
        else:
            self._channel = self._channels.insecure_channel(address, options)
        self._stub: Any = CompositorServiceStub(self._channel)  # type: ignore[no-untyped-call]

    @overload
    def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = ...,
        sampling: Sampling | None = ...,
        num_images: None = ...,
        initial_noise: NDArray[np.float32] | None = ...,
        on_step: StepCallback | None = ...,
        timeout: float | None = ...,
    ) -> One: ...

    @overload
    def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = ...,
        sampling: Sampling | None = ...,
        num_images: int,
        initial_noise: NDArray[np.float32] | None = ...,
        on_step: StepCallback | None = ...,
        timeout: float | None = ...,
    ) -> Several: ...

    def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = None,
        sampling: Sampling | None = None,
        num_images: int | None = None,
        initial_noise: NDArray[np.float32] | None = None,
        on_step: StepCallback | None = None,
        timeout: float | None = None,
    ) -> One | Several:
        """The scene with the object in it, or several such pictures; see `Compositor.composite`.

        Raises:
            InputError: the server refuses something about the request, as `field` says; or there is initial
                noise, which a server does not take.
            ServerError: it cannot be reached, is too busy, or fails.
        """
        request = Request.of(scene, placements, seed, sampling, num_images, initial_noise)
        images: One | Several = self._images(request, num_images is None, on_step, timeout)
        return images

    def _images(
        self, request: Request, single: bool, on_step: StepCallback | None, timeout: float | None
    ) -> Any:
        raise NotImplementedError

    def _call(self, method: str, message: Any, timeout: float | None) -> Any:
        """Begins a call of a method."""
        timeout = self._timeout if timeout is None else timeout
        return getattr(self._stub, method)(message, metadata=self._metadata, timeout=timeout)

    def _stream(self, request: Request, preview_every: int, file_format: str, timeout: float | None) -> Any:
        message = pb.CompositeStreamRequest(
            request=message_from_request(request, file_format), preview_every=preview_every
        )
        return self._call("CompositeStream", message, timeout)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turns the status of a call that fails into one sentence."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Any) -> AnyDoorError:
        code: grpc.StatusCode = error.code()
        trailing = dict(error.trailing_metadata() or ())
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            refusal = InputError(error.details())
            refusal.field = str(trailing.get("field", ""))
            return refusal
        request_id = str(trailing.get("request-id", ""))
        server = f"the server at {self.address}"
        text = {
            grpc.StatusCode.UNAVAILABLE: f"{server} cannot be reached",
            grpc.StatusCode.RESOURCE_EXHAUSTED: f"{server} cannot take the request",
            grpc.StatusCode.DEADLINE_EXCEEDED: f"{server} did not finish in time",
            grpc.StatusCode.UNAUTHENTICATED: f"{server} does not let you in",
        }.get(code, f"{server} failed ({code.name}{f', request {request_id}' if request_id else ''})")
        if code is grpc.StatusCode.UNAVAILABLE and (proxy := proxy_for(self.address)):
            text += f" through the proxy of {proxy}; name the server in no_proxy to go without"
        return ServerError(f"{text}: {error.details()}", code.name, request_id)


class Client(_Connection[Image.Image, list[Image.Image]]):
    """A server's Compositor; may be used from several threads."""

    _channels = grpc

    def run(
        self,
        request: Request,
        on_step: StepCallback | None = None,
        *,
        file_format: str = "PNG",
        timeout: float | None = None,
    ) -> list[Composite]:
        """All pictures of a request, with seeds, regions and times. Raises as `composite`.

        Args:
            request: what to draw.
            on_step: called with (steps done, steps in all).
            file_format: PNG, JPEG or WEBP: how the pictures travel.
            timeout: seconds that it may take, instead of the client's.
        """
        if on_step is None:
            with self._refusals():
                message = message_from_request(request, file_format)
                return composites_from_message(self._call("Composite", message, timeout))
        results: list[Composite] = []
        for event in self.stream(request, file_format=file_format, timeout=timeout):
            results = _note(event, on_step)
        return results

    def stream(
        self,
        request: Request,
        *,
        preview_every: int = 0,
        file_format: str = "PNG",
        timeout: float | None = None,
    ) -> Iterator[ClientEvent]:
        """Like `run`, and yields events on the way; leaving the loop cancels the request.

        Args:
            request: what to draw.
            preview_every: steps between previews; 0 for none.
            file_format: see `run`.
            timeout: see `run`.
        """
        call = self._stream(request, preview_every, file_format, timeout)
        try:
            with self._refusals():
                for response in call:
                    yield _event(response)
        finally:
            call.cancel()

    def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """Which model the server runs, its defaults, and what the server accepts. Raises as `composite`."""
        with self._refusals():
            info: pb.GetModelInfoResponse = self._call("GetModelInfo", pb.GetModelInfoRequest(), timeout)
            return info

    def close(self) -> None:
        """Ends the connection, and every call on it."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _images(
        self, request: Request, single: bool, on_step: StepCallback | None, timeout: float | None
    ) -> Image.Image | list[Image.Image]:
        images = [Image.fromarray(result.image) for result in self.run(request, on_step, timeout=timeout)]
        return images[0] if single else images


class AsyncClient(_Connection[Coroutine[Any, Any, Image.Image], Coroutine[Any, Any, list[Image.Image]]]):
    """The same for asyncio."""

    _channels = grpc.aio

    async def run(
        self,
        request: Request,
        on_step: StepCallback | None = None,
        *,
        file_format: str = "PNG",
        timeout: float | None = None,
    ) -> list[Composite]:
        """See `Client.run`."""
        if on_step is None:
            with self._refusals():
                message = message_from_request(request, file_format)
                return composites_from_message(await self._call("Composite", message, timeout))
        results: list[Composite] = []
        async for event in self.stream(request, file_format=file_format, timeout=timeout):
            results = _note(event, on_step)
        return results

    async def stream(
        self,
        request: Request,
        *,
        preview_every: int = 0,
        file_format: str = "PNG",
        timeout: float | None = None,
    ) -> AsyncIterator[ClientEvent]:
        """See `Client.stream`; close the iterator (`contextlib.aclosing`) to cancel."""
        call = self._stream(request, preview_every, file_format, timeout)
        try:
            with self._refusals():
                async for response in call:
                    yield _event(response)
        finally:
            call.cancel()

    async def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """See `Client.model_info`."""
        with self._refusals():
            info: pb.GetModelInfoResponse = await self._call(
                "GetModelInfo", pb.GetModelInfoRequest(), timeout
            )
            return info

    async def close(self) -> None:
        """Ends the connection, and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _images(
        self, request: Request, single: bool, on_step: StepCallback | None, timeout: float | None
    ) -> Image.Image | list[Image.Image]:
        images = [
            Image.fromarray(result.image) for result in await self.run(request, on_step, timeout=timeout)
        ]
        return images[0] if single else images


def _event(response: pb.CompositeStreamResponse) -> ClientEvent:
    kind = response.WhichOneof("event")
    if kind == "queued":
        return Queued(response.queued.position)
    if kind == "step_done":
        return StepDone(response.step_done.done, response.step_done.total)
    if kind == "preview":
        return Preview(response.preview.image_index, response.preview.image)
    return composites_from_message(response.result)


def _note(event: ClientEvent, on_step: StepCallback) -> list[Composite]:
    """Reports a step; returns the pictures, none before the last event."""
    if isinstance(event, StepDone):
        on_step(event.done, event.total)
    return event if isinstance(event, list) else []

"""Connects to a server: opens the channel, sends requests, and turns statuses into errors."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.errors import AnyDoorError
from runtime.errors import InputError, MissingModelError, warn
from runtime.imaging.masks import load_mask
from runtime.imaging.sources import PictureLike
from runtime.proxy import is_local, proxy_for
from runtime.request import Edit, Placement, Request, Sampling
from runtime.result import Composite, Found
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.edit_wire import message_from_edit
from runtime.server.events import Preview, Queued, StepDone
from runtime.server.wire import Message, composites_from_message, message_from_request

ClientEvent = Queued | StepDone | Preview | list[Composite]
"""Events that `stream` yields; the pictures come last."""

StepCallback = Callable[[int, int], object]
"""Called after every step with the steps done and the total, counted over all pictures and placements."""

_LONGEST_TIMEOUT = 10**9
"""Seconds. Of much longer ones gRPC makes a deadline that has passed."""
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
    # of a server whose machine is gone nothing comes, not even the end of the connection
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
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
        """Id of the request in the server's log, if it arrived."""


@dataclass(frozen=True)
class Tls:
    """PEM files for a connection with TLS."""

    ca: Path | None = None
    """CA certificates for the server's certificate; those of the system if None."""
    certificate: Path | None = None
    """The client's certificate, if the server requires one."""
    key: Path | None = None
    """Private key of the client's certificate."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns the credentials of a channel.

        Raises:
            InputError: a file cannot be read, or is not what it should be.
        """
        try:
            ca, key, certificate = (
                path.read_bytes() if path else None for path in (self.ca, self.key, self.certificate)
            )
        except OSError as error:
            raise InputError(f"cannot read '{error.filename}': {error.strerror}") from error
        self._check()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def _check(self) -> None:
        """Refuses files that gRPC would find fault with at every attempt to connect, and tell nobody."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca:
                context.load_verify_locations(self.ca)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InputError(f"'{self.ca}' has no certificate in PEM") from error
        try:
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise InputError(
                f"'{self.certificate}' and '{self.key}' are not a certificate and its key, both as PEM"
            ) from error


One = TypeVar("One")
Several = TypeVar("Several")


class Connection(Generic[One, Several]):
    """Implements what both clients share: channel, requests and errors."""

    _channels: Any
    """Module that makes channels."""

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = None,
    ) -> None:
        """Prepares a connection, which the first call opens.

        Args:
            address: host:port or unix:/path.
            model: name of the server's model to use; its first if empty. Clients of one server share a
                connection, so use one client per model.
            token: bearer token, if the server requires one.
            tls: None for a connection without TLS.
            timeout: seconds that a call may take, retries included; the `timeout` of a call overrides it.

        Raises:
            InputError: a name, the token or a file of `tls` cannot be used.
        """
        for what, text in (("address", address), ("model", model)):
            if not text.isprintable():  # gRPC takes UTF-8, which the bytes of a command line need not be
                raise InputError(f"the server's {what} {text!r} has characters that are none")
        if token and not (token.isascii() and token.isprintable()):
            raise InputError("the token is not one line of ASCII, which is all that a header holds")
        self.address = address
        self.model = model
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout = timeout
        self._channel = open_channel(self._channels, address, tls, _OPTIONS)
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
        """Draws the object into the scene; returns the picture, or several; see `Compositor.composite`.

        Raises:
            InputError: the request is invalid (`field` names the part), or has initial noise, which a server
                does not take.
            ServerError: the server cannot be reached, is too busy, or fails.
        """
        request = Request.of(scene, placements, seed, sampling, num_images, initial_noise)
        images: One | Several = self._images(request, num_images is None, on_step, timeout)
        return images

    @overload
    def draw(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = ...,
        size: tuple[int, int] | None = ...,
        seed: int | None = ...,
        sampling: Sampling | None = ...,
        num_images: None = ...,
        on_step: StepCallback | None = ...,
        timeout: float | None = ...,
    ) -> One: ...

    @overload
    def draw(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = ...,
        size: tuple[int, int] | None = ...,
        seed: int | None = ...,
        sampling: Sampling | None = ...,
        num_images: int,
        on_step: StepCallback | None = ...,
        timeout: float | None = ...,
    ) -> Several: ...

    def draw(
        self,
        prompt: str,
        *,
        num_images: int | None = None,
        on_step: StepCallback | None = None,
        timeout: float | None = None,
        **others: Any,
    ) -> One | Several:
        """Draws a picture from a prompt, or several; see `Compositor.draw`. Raises as `composite`."""
        request = Request.drawing(prompt, num_images=num_images, **others)
        images: One | Several = self._images(request, num_images is None, on_step, timeout)
        return images

    def _images(
        self, request: Request, single: bool, on_step: StepCallback | None, timeout: float | None
    ) -> Any:
        raise NotImplementedError

    def _begin(self, request: Request, file_format: str, timeout: float | None) -> Any:
        """Begins a call that ends with the pictures."""
        message = self._message(request, file_format)
        method = "Draw" if isinstance(message, pb.DrawRequest) else "Composite"
        return self._call(method, message, timeout)

    def _begin_stream(
        self, request: Request, preview_every: int, file_format: str, timeout: float | None
    ) -> Any:
        """Begins a call that tells events."""
        message = self._message(request, file_format)
        if isinstance(message, pb.DrawRequest):
            drawing = pb.DrawStreamRequest(request=message, preview_every=preview_every)
            return self._call("DrawStream", drawing, timeout)
        composite = pb.CompositeStreamRequest(request=message, preview_every=preview_every)
        return self._call("CompositeStream", composite, timeout)

    def _begin_edit(self, edit: Edit, preview_every: int, file_format: str, timeout: float | None) -> Any:
        """Begins an edit that tells events."""
        message = message_from_edit(edit, file_format)
        message.model = self.model
        return self._call(
            "EditStream", pb.EditStreamRequest(request=message, preview_every=preview_every), timeout
        )

    def _message(self, request: Request, file_format: str) -> Message:
        message = message_from_request(request, file_format)
        message.model = self.model
        return message

    def _call(self, method: str, message: Any, timeout: float | None) -> Any:
        """Begins a call of a method."""
        timeout = self._timeout if timeout is None else timeout
        if timeout is not None and not 0 < timeout <= _LONGEST_TIMEOUT:  # nor is NaN
            raise InputError(f"timeout must be more than 0 and at most {_LONGEST_TIMEOUT} s, not {timeout}")
        return getattr(self._stub, method)(message, metadata=self._metadata, timeout=timeout)

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
        kinds = {
            grpc.StatusCode.INVALID_ARGUMENT: InputError,
            grpc.StatusCode.FAILED_PRECONDITION: MissingModelError,
            grpc.StatusCode.NOT_FOUND: InputError,
        }
        if code in kinds:
            # a message of a stream has the request in a field of its own
            refusal = kinds[code](error.details().removeprefix("request."))
            refusal.field = str(trailing.get("field", "")).removeprefix("request.")
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


def open_channel(
    library: Any, address: str, tls: Tls | None = None, options: Iterable[tuple[str, Any]] = ()
) -> Any:
    """Returns a channel to a server.

    Args:
        library: grpc, or grpc.aio.
        address: host:port or unix:/path.
        tls: of the connection; None for one without it.
        options: of the channel.
    """
    # a proxy of the environment does not lead back to this machine
    settings = [*options, ("grpc.enable_http_proxy", int(not is_local(address)))]
    if tls:
        return library.secure_channel(address, tls.credentials(), settings)
    return library.insecure_channel(address, settings)


def pictures_of(results: list[Composite], single: bool) -> Image.Image | list[Image.Image]:
    """Returns the pictures of a request, or its single one; issues its warnings as Python warnings."""
    for text in results[0].warnings:
        warn(text)
    images = [result.to_pillow() for result in results]
    return images[0] if single else images


def found_of(answer: pb.SegmentResponse) -> Found:
    """Returns the object in an answer; issues its warnings as Python warnings."""
    for text in answer.warnings:
        warn(text)
    mask = load_mask(answer.mask, "the server's mask")
    return Found(mask, answer.score if answer.HasField("score") else None)


def event_of(response: pb.CompositeStreamResponse) -> ClientEvent:
    """Reads the event in a message."""
    kind = response.WhichOneof("event")
    if kind == "queued":
        return Queued(response.queued.position)
    if kind == "step_done":
        return StepDone(response.step_done.done, response.step_done.total)
    if kind == "preview":
        return Preview(response.preview.image_index, response.preview.image)
    return composites_from_message(response.result)


def note(event: ClientEvent, on_step: StepCallback) -> list[Composite]:
    """Reports a step; returns the pictures, which only the last event has."""
    if isinstance(event, StepDone):
        on_step(event.done, event.total)
    return event if isinstance(event, list) else []

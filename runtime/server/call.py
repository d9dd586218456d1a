"""Represents one call: its caller, its share of the memory, and its end."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError, Message

from runtime.errors import InputError, MissingModelError
from runtime.server.connections import cut_off
from runtime.server.events import (
    AlreadyGoneError,
    BusyError,
    CallerGoneError,
    DeadlineError,
    EngineLostError,
    ForbiddenError,
    LoadFailedError,
    LoadingError,
    NotFinishedError,
    ShuttingDownError,
    UnauthenticatedError,
    UnknownJobError,
    UnknownMethodError,
    UnknownModelError,
    UnknownServiceError,
)
from runtime.server.memory import Account, Ledger
from runtime.server.timeouts import within

BYTES_PER_SECOND = 1 << 20
"""Slower than that, a large message or answer is given up."""


class Context(Protocol):
    """The interface of a call's transport. `grpc.aio.ServicerContext` implements it."""

    def peer(self) -> str:
        """Returns the other end, like "ipv4:10.0.0.1:4711"."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        """Headers: their names in lower case, and values."""

    def auth_context(self) -> Any:
        """Returns what the client's certificate says."""

    def time_remaining(self) -> float | None:
        """Returns seconds until the caller's deadline; None if there is none."""

    async def read(self) -> Any:
        """Returns the message's bytes; `grpc.aio.EOF` where there is none."""

    async def write(self, message: bytes) -> None:
        """Sends a part of the answer; waits until it is on its way."""

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Sets what goes with the answer's end, or with its head."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        """Ends the call with an error."""


class TransferError(DeadlineError):
    """A message was not sent, or an answer not taken, in the time for it."""


@dataclass(eq=False)
class Call:
    """The context of a method, besides its message."""

    context: Context
    method: str
    """Its name without the service's."""
    max_message_bytes: int
    transfer_seconds: float
    """To send a message or to take an answer, beside one for each MiB."""
    model: str = ""
    """Name of the model that it is for; empty before that is known, and for calls without one."""
    client: str = ""
    """Whose call it is: a name that the caller cannot choose freely."""
    account: Account = field(default_factory=lambda: Ledger().open(""))
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    span: Any = None
    """None without OpenTelemetry."""
    started: float = field(default_factory=time.perf_counter)
    has_message: bool = False
    """Whether the message is there."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> time, when it is finished."""
    images: int = 0

    @property
    def connection(self) -> str:
        """The other end, with its port."""
        return self.context.peer()

    def time_remaining(self) -> float | None:
        """Returns seconds until the caller's deadline; None if there is none."""
        return self.context.time_remaining()

    async def read(self) -> bytes:
        """Waits for the message, for which there must be room.

        Raises:
            MemoryFullError: there is none.
            TransferError: it does not come in time.
            CallerGoneError: it never will.
            InputError: there is no message.
        """
        # how long it is, is known when it is there
        self.account.set(self.max_message_bytes)
        seconds = self._seconds_for(self.max_message_bytes)
        try:
            content = await within(seconds, self.context.read())
        except asyncio.TimeoutError as error:
            raise TransferError(f"the message did not come within {seconds:.0f} s") from error
        except grpc.aio.InternalError as error:
            raise CallerGoneError() from error
        if content is grpc.aio.EOF:
            raise InputError("the message is missing, or larger than is accepted")
        self.has_message = True
        # it is parsed, and its fields are copied
        self.account.set(3 * len(content))
        message: bytes = content
        return message

    async def write(self, message: Message | bytes) -> None:
        """Sends a message, and waits until it is on its way.

        Raises:
            TransferError: the caller does not take it. The connection is ended: gRPC would keep the answer.
            CallerGoneError: there is no caller.
        """
        content = message if isinstance(message, bytes) else message.SerializeToString()
        seconds = self._seconds_for(len(content))
        try:
            await within(seconds, self.context.write(content))
        except asyncio.TimeoutError as error:
            cut_off(self.connection)
            raise TransferError(f"the answer was not taken within {seconds:.0f} s") from error
        except grpc.aio.InternalError as error:
            raise CallerGoneError() from error

    def _seconds_for(self, nbytes: int) -> float:
        return self.transfer_seconds + nbytes / BYTES_PER_SECOND


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, list[tuple[str, str]]]:
    """Status code, text and trailing metadata for an error."""
    codes = grpc.StatusCode
    if isinstance(error, InputError):
        code = codes.FAILED_PRECONDITION if isinstance(error, MissingModelError) else codes.INVALID_ARGUMENT
        text = f"{error.field}: {error}" if error.field else str(error)
        return code, text, [("field", error.field)]
    if isinstance(error, DecodeError):
        return codes.INVALID_ARGUMENT, "the message cannot be parsed", [("field", "")]
    if isinstance(error, BusyError):
        milliseconds = str(math.ceil(error.retry_seconds * 1000))
        return codes.RESOURCE_EXHAUSTED, str(error), [("grpc-retry-pushback-ms", milliseconds)]
    if isinstance(error, LoadingError | LoadFailedError | ShuttingDownError | EngineLostError):
        return codes.UNAVAILABLE, str(error), []
    if isinstance(error, DeadlineError):
        # of those that cannot be met as well: RESOURCE_EXHAUSTED would have clients try again within it
        return codes.DEADLINE_EXCEEDED, str(error), []
    if isinstance(error, CallerGoneError):
        return codes.CANCELLED, str(error), []
    if isinstance(error, UnauthenticatedError):
        return codes.UNAUTHENTICATED, str(error), []
    if isinstance(error, ForbiddenError):
        return codes.PERMISSION_DENIED, str(error), []
    if isinstance(error, UnknownMethodError):
        return codes.UNIMPLEMENTED, str(error), []
    if isinstance(error, NotFinishedError):
        return codes.FAILED_PRECONDITION, str(error), []
    if isinstance(error, UnknownModelError):
        return codes.NOT_FOUND, str(error), [("field", "model")]
    if isinstance(error, UnknownServiceError | UnknownJobError | AlreadyGoneError):
        return codes.NOT_FOUND, str(error), []
    # what went wrong inside is for the log; the request id leads there
    return codes.INTERNAL, "the engine failed on this request", []

"""Defines the client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.client.connection import (
    ClientEvent,
    Connection,
    StepCallback,
    event_of,
    found_of,
    note,
    pictures_of,
)
from runtime.imaging.sources import PictureLike
from runtime.request import Edit, Request, Where
from runtime.result import Composite, Found
from runtime.rpc import compositor_pb2 as pb
from runtime.server.wire import composites_from_message, segment_request


class AsyncClient(Connection[Coroutine[Any, Any, Image.Image], Coroutine[Any, Any, list[Image.Image]]]):
    """Draws pictures on a server, for asyncio."""

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
                return composites_from_message(await self._begin(request, file_format, timeout))
        results: list[Composite] = []
        async for event in self.stream(request, file_format=file_format, timeout=timeout):
            results = note(event, on_step)
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
        call = self._begin_stream(request, preview_every, file_format, timeout)
        try:
            with self._refusals():
                async for response in call:
                    yield event_of(response)
        finally:
            call.cancel()

    async def edit(
        self, edit: Edit, on_step: StepCallback | None = None, timeout: float | None = None
    ) -> list[Composite]:
        """See `Client.edit`."""
        results: list[Composite] = []
        async for event in self.stream_edit(edit, timeout=timeout):
            results = note(event, on_step or (lambda done, total: None))
        return results

    async def stream_edit(
        self, edit: Edit, *, preview_every: int = 0, file_format: str = "PNG", timeout: float | None = None
    ) -> AsyncIterator[ClientEvent]:
        """See `Client.stream_edit`; close the iterator (`contextlib.aclosing`) to cancel."""
        call = self._begin_edit(edit, preview_every, file_format, timeout)
        try:
            with self._refusals():
                async for response in call:
                    yield event_of(response)
        finally:
            call.cancel()

    async def segment(
        self, picture: PictureLike, where: Where = Where(), timeout: float | None = None
    ) -> NDArray[np.bool_]:
        """See `Client.segment`."""
        return (await self.find(picture, where, timeout)).mask

    async def find(self, picture: PictureLike, where: Where = Where(), timeout: float | None = None) -> Found:
        """See `Client.find`."""
        with self._refusals():
            answer = await self._call("Segment", segment_request(picture, where), timeout)
        return found_of(answer)

    async def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """See `Client.model_info`."""
        with self._refusals():
            info: pb.GetModelInfoResponse = await self._call(
                "GetModelInfo", pb.GetModelInfoRequest(model=self.model), timeout
            )
            return info

    async def close(self) -> None:
        """Closes the connection, and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _images(
        self, request: Request, single: bool, on_step: StepCallback | None, timeout: float | None
    ) -> Image.Image | list[Image.Image]:
        return pictures_of(await self.run(request, on_step, timeout=timeout), single)

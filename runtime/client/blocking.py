"""Defines the client whose calls block."""

from __future__ import annotations

from collections.abc import Iterator

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


class Client(Connection[Image.Image, list[Image.Image]]):
    """Draws pictures on a server, with the methods of a Compositor. Threads may share a client."""

    _channels = grpc

    def run(
        self,
        request: Request,
        on_step: StepCallback | None = None,
        *,
        file_format: str = "PNG",
        timeout: float | None = None,
    ) -> list[Composite]:
        """Draws all pictures of a request; returns them with seeds, regions and times. Raises as `composite`.

        Args:
            request: what to draw.
            on_step: called with (steps done, total steps).
            file_format: format of the pictures on the wire: PNG, JPEG or WEBP.
            timeout: seconds that the call may take, instead of the client's.
        """
        if on_step is None:
            with self._refusals():
                return composites_from_message(self._begin(request, file_format, timeout))
        results: list[Composite] = []
        for event in self.stream(request, file_format=file_format, timeout=timeout):
            results = note(event, on_step)
        return results

    def stream(
        self,
        request: Request,
        *,
        preview_every: int = 0,
        file_format: str = "PNG",
        timeout: float | None = None,
    ) -> Iterator[ClientEvent]:
        """Draws like `run`, and yields events on the way; leaving the loop cancels the request.

        Args:
            request: what to draw.
            preview_every: steps between previews; 0 for none.
            file_format: see `run`.
            timeout: see `run`.
        """
        call = self._begin_stream(request, preview_every, file_format, timeout)
        try:
            with self._refusals():
                for response in call:
                    yield event_of(response)
        finally:
            call.cancel()

    def edit(
        self, edit: Edit, on_step: StepCallback | None = None, timeout: float | None = None
    ) -> list[Composite]:
        """Draws all pictures of an edit; returns them with seeds, regions and times. Raises as `composite`.

        Args:
            edit: the object and what to do with it.
            on_step: called with (steps done, total steps).
            timeout: see `run`.
        """
        results: list[Composite] = []
        for event in self.stream_edit(edit, timeout=timeout):
            results = note(event, on_step or (lambda done, total: None))
        return results

    def stream_edit(
        self, edit: Edit, *, preview_every: int = 0, file_format: str = "PNG", timeout: float | None = None
    ) -> Iterator[ClientEvent]:
        """Draws like `edit`, and yields events on the way; takes the arguments of `stream`."""
        call = self._begin_edit(edit, preview_every, file_format, timeout)
        try:
            with self._refusals():
                for response in call:
                    yield event_of(response)
        finally:
            call.cancel()

    def segment(
        self, picture: PictureLike, where: Where = Where(), timeout: float | None = None
    ) -> NDArray[np.bool_]:
        """Returns the mask (H, W) of an object; see `find`."""
        return self.find(picture, where, timeout).mask

    def find(self, picture: PictureLike, where: Where = Where(), timeout: float | None = None) -> Found:
        """Finds an object in a picture, as `Segmenter.segment`. Raises as `composite`.

        Args:
            picture: the picture.
            where: a box around the object, or clicks; the main object if it is empty.
            timeout: see `run`.
        """
        with self._refusals():
            answer = self._call("Segment", segment_request(picture, where), timeout)
        return found_of(answer)

    def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """Returns what the model is, the other models, and the server's limits. Raises as `composite`."""
        with self._refusals():
            info: pb.GetModelInfoResponse = self._call(
                "GetModelInfo", pb.GetModelInfoRequest(model=self.model), timeout
            )
            return info

    def close(self) -> None:
        """Closes the connection, and every call on it."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _images(
        self, request: Request, single: bool, on_step: StepCallback | None, timeout: float | None
    ) -> Image.Image | list[Image.Image]:
        return pictures_of(self.run(request, on_step, timeout=timeout), single)

"""Serves a loaded model: its batcher, and the path from a request to its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from runtime.compositor import Compositor
from runtime.edits.fillers import fills_holes
from runtime.errors import InputError, in_field
from runtime.parameters import sampling_parameters
from runtime.request import Edit, Request, Sampling
from runtime.rpc import compositor_pb2 as pb
from runtime.server.batching import Batcher
from runtime.server.call import Call
from runtime.server.editing import Editing, Phase
from runtime.server.events import Event, Failed, Finished, MaskFound
from runtime.server.metrics import Metrics
from runtime.server.placement_wire import where_from_message
from runtime.server.settings import Settings
from runtime.server.ticket import Ticket
from runtime.server.wire import defaults_message
from runtime.server.wire_values import CONDITIONS, QUALITIES
from runtime.version import version

_POLL_SECONDS = 0.05


class ServedModel:
    """Makes the pictures of one model."""

    def __init__(
        self, name: str, compositor: Compositor, settings: Settings, metrics: Metrics, filler: Batcher | None
    ) -> None:
        """Starts loading the graphs; requests are accepted at once.

        Args:
            name: that requests know it by.
            compositor: the model.
            settings: of the server.
            metrics: of the server.
            filler: fills the holes of edits, if the model itself does not.
        """
        self.name = name
        self.compositor = compositor
        self.users = 0
        """Calls that it is for, and that are not over."""
        self.leaves = False
        """Whether it gets no new requests."""
        self._settings = settings
        self.batcher = Batcher(
            compositor,
            **common_settings(settings),
            max_batch=settings.max_batch or None,
            workers=settings.workers,
            on_samples=metrics.batch_samples.labels(name).observe,
            on_seconds=metrics.step_seconds.labels(name).observe,
        )
        self._filler = filler or (self.batcher if fills_holes(compositor) else None)
        self._editing = Editing(self.batcher, self._filler, self._follow, self._check_previews)

    def close(self) -> None:
        """Ends the threads, waits for what they are at, and frees the memory."""
        self.batcher.drain(0)
        while self.batcher.is_busy:
            time.sleep(_POLL_SECONDS)
        self.compositor.clear()
        self.compositor.engine.close()

    def info(self, models: tuple[str, ...]) -> pb.GetModelInfoResponse:
        """Returns the answer to GetModelInfo.

        Args:
            models: names of all models of the server.
        """
        settings, compositor = self._settings, self.compositor
        manifest, abilities = compositor.bundle.manifest, compositor.system.abilities
        height, width = manifest.picture_size
        return pb.GetModelInfoResponse(
            version=version(),
            checkpoint_sha256=str(manifest.checkpoint.get("sha256", "")),
            precision=manifest.precision,
            backend=compositor.engine.backend,
            device=compositor.engine.device,
            resolution=max(width, height),
            max_batch=self.batcher.max_batch,
            limits=pb.Limits(
                message_bytes=settings.max_message_bytes,
                pixels=settings.max_pixels,
                steps=settings.max_steps,
                images=settings.max_images,
                placements=settings.max_placements,
                previews=settings.max_previews,
            ),
            system=manifest.system,
            defaults=defaults_message(compositor.defaults),
            condition=CONDITIONS[abilities.condition],
            picture_width=width,
            picture_height=height,
            scene_channels=int(manifest.architecture.get("scene_channels", 0)),
            qualities=[QUALITIES[quality] for quality in abilities.qualities],
            fills=abilities.fills,
            automatic_masks=compositor.segmenter.finds_main_object,
            clicks=compositor.segmenter.takes_clicks,
            filler=self._filler.compositor.bundle.manifest.system if self._filler else "",
            filler_steps=_default_steps(self._filler.compositor) if self._filler else 0,
            model=self.name,
            models=models,
            views=abilities.views,
        )

    async def events(
        self, call: Call, request: Request | Edit, file_format: str, preview_every: int = 0
    ) -> AsyncGenerator[Event, None]:
        """Submits a request and yields its events up to `Finished`; closing it earlier cancels the request.

        Args:
            call: that asks for it.
            request: or an edit; its pictures as the bytes of files; who calls keeps it no longer.
            file_format: of the finished pictures.
            preview_every: steps between previews; 0 for none.

        Raises:
            Exception: what the request failed with.
        """
        if isinstance(request, Edit):
            follow = self._editing.events(call, request, file_format, preview_every)
        else:
            if preview_every:
                self._check_previews(preview_every, [(self.batcher, request)])
            accept = partial(self.batcher.submit, request)
            follow = self._follow(call, self.batcher, accept, file_format, preview_every)
            del accept
        del request  # one that waits is kept once
        async with aclosing(follow) as events:
            async for event in events:
                yield event

    async def segment(self, call: Call, message: pb.SegmentRequest) -> pb.SegmentResponse:
        """Returns the answer to Segment: finds an object. Raises as `events`."""
        accept = partial(self.batcher.segment, message.picture, where_from_message(message.where))
        del message
        async with aclosing(self._follow(call, self.batcher, accept)) as events:
            del accept
            (found,) = [event async for event in events if isinstance(event, MaskFound)]
        mask = found.images[0].image
        call.account.set(2 * len(mask))
        return pb.SegmentResponse(
            mask=mask,
            request_id=call.request_id,
            seconds=found.seconds,
            warnings=found.warnings,
            score=found.score,
        )

    async def _follow(
        self,
        call: Call,
        batcher: Batcher,
        accept: Callable[[Ticket], None],
        file_format: str = "PNG",
        preview_every: int = 0,
    ) -> AsyncGenerator[Event, None]:
        """Has a batcher accept a ticket, and yields its events, like `events`."""
        events = asyncio.Queue[Event]()
        soon: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        remaining = call.time_remaining()
        ticket = Ticket(
            notify=partial(soon, events.put_nowait),
            client=call.client,
            deadline=None if remaining is None else time.monotonic() + remaining,
            file_format=file_format,
            preview_every=preview_every,
            account=call.account,
        )
        accept(ticket)
        del accept
        try:
            event: Event | None = None
            while not isinstance(event, Finished):
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    call.seconds, call.images = event.seconds, len(event.images)
                    ticket.encoded.clear()  # the event has the files, until they are sent
                yield event
        finally:
            if ticket.open:
                batcher.cancel(ticket)

    def _check_previews(self, every: int, phases: Sequence[Phase]) -> None:
        previews = 0
        for batcher, request in phases:
            with in_field("sampling"):
                steps = sampling_parameters(request.sampling, batcher.compositor.defaults).steps
            # no preview of the last step of a placement: the picture itself comes then
            previews += len(request.placements) * ((steps - 1) // every)
        if previews > self._settings.max_previews:
            with in_field("preview_every"):
                raise InputError(
                    f"{previews} previews per picture; at most {self._settings.max_previews} are made"
                )


def _default_steps(compositor: Compositor) -> int:
    return sampling_parameters(Sampling(), compositor.defaults).steps


def common_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings of all batchers of a server."""
    return {
        "limits": settings.limits,
        "queue": settings.queue,
        "decode_seconds": settings.decode_seconds,
        "max_message_bytes": settings.max_message_bytes,
        "batching": settings.batching,
        "share_caches": settings.share_caches,
        "warms_up": True,
    }

"""Runs what a request needs besides the engine: decodes and prepares it before it joins the batch, pastes and
encodes it afterwards."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from runtime.compositor import Compositor
from runtime.drawing import Picture as Drawn
from runtime.edits.editor import steps_to_place
from runtime.edits.plan import Plan, plan_edit
from runtime.errors import collecting_warnings, in_field
from runtime.imaging.picture import Picture
from runtime.imaging.pictures import check_format, encode_mask, encode_picture
from runtime.imaging.scene import load_scene
from runtime.imaging.sources import PictureLike
from runtime.job import ImageJob, Job
from runtime.request import Edit, Request, Reshape, Swap, SwapPlaces, TryOn, Where
from runtime.result import Stopwatch
from runtime.sampling.conditions import OWNER
from runtime.server.decoding import Decoder, PictureReader, upright
from runtime.server.events import (
    Failed,
    Finished,
    FinishedImage,
    MaskFound,
    MemoryFullError,
    Planned,
    Preview,
)
from runtime.server.memory import LARGEST_SCENE, request_bytes
from runtime.server.queue import SharedQueue
from runtime.server.ticket import Ticket
from runtime.validation import Limits

PREVIEW_FORMAT = "JPEG"

_HOLE_BYTES = 5
"""Bytes for each pixel of a scene with a hole: where it is, and how its edge fades, in float32."""


def _decoded(edit: Edit, read: PictureReader) -> Edit:
    """Returns an edit with its pictures in place of their files."""
    scene, action = read.picture("scene", edit.scene, "the scene"), edit.action
    with in_field("where"):
        where = read.where(edit.where, scene)
    if isinstance(action, Reshape):
        to = read.mask("reshape.to", action.to, "the new outline", scene, "the scene")
        action = replace(action, to=to)
    elif isinstance(action, SwapPlaces):
        with in_field("swap.other"):
            action = replace(action, other=read.where(action.other, scene))
    elif isinstance(action, Swap | TryOn):
        with in_field("swap.placement" if isinstance(action, Swap) else "try_on"):
            action = replace(action, placement=read.placement(action.placement, scene))
    return replace(edit, scene=upright(scene), where=where, action=action)


class Workers:
    """Do what needs no engine: before a picture joins the batch, and after it left."""

    def __init__(
        self,
        compositor: Compositor,
        limits: Limits,
        queue: SharedQueue,
        decoders: Sequence[Decoder],
        share_caches: bool,
    ) -> None:
        """Starts a thread for every decoder; see `runtime.server.batching.Batcher`."""
        self._compositor = compositor
        self._limits = limits
        self._queue = queue
        self._share_caches = share_caches
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, args=(decoder,), name="worker", daemon=True)
            for decoder in decoders
        ]
        for thread in self._threads:
            thread.start()

    def run(self, ticket: Ticket, task: Callable[..., None], *arguments: object) -> None:
        """Has a task of a request done, unless the request is over by then: (ticket, *arguments), and the
        decoder where the task is to prepare."""
        with self._queue.changed:
            if ticket.open:
                ticket.tasks.append(partial(task, ticket, *arguments))
                self._queue.changed.notify_all()

    @property
    def is_busy(self) -> bool:
        """Whether a thread runs."""
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Starts no further task, and waits a second for those that were begun."""
        with self._queue.changed:
            self._stopped = True
            self._queue.changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=1.0 / len(self._threads))

    def _work(self, decoder: Decoder) -> None:
        with suppress(OSError, EOFError):  # it is tried again when a picture comes
            decoder.start()
        while taken := self._take(decoder):
            ticket, task = taken
            try:
                task()
                failure = None
            except Exception as error:
                failure = Failed(error)
            del task
            with self._queue.changed:
                ticket.at_work -= 1
                ticket.decoder = None
                if failure:
                    self._queue.end(ticket, failure)
                self._queue.changed.notify_all()
        decoder.close()

    def _take(self, decoder: Decoder) -> tuple[Ticket, Callable[[], None]] | None:
        """Waits for a task; None when stopped. First come the requests of the client that keeps the fewest
        workers busy. No client keeps all of them busy with reading its pictures, or with edits."""
        queue = self._queue
        with queue.changed:
            while not self._stopped:
                tickets = queue.requests.tickets
                busy: Counter[str] = Counter()
                for ticket in tickets:
                    busy[ticket.client] += ticket.at_work
                most = max(len(self._threads) - 1, 1)
                ready = [
                    ticket
                    for ticket in tickets
                    if ticket.tasks and (ticket.job or busy[ticket.client] < most)
                ]
                if ready:
                    ticket = min(ready, key=lambda ticket: busy[ticket.client])
                    ticket.at_work += 1
                    if not ticket.job:
                        ticket.decoder = decoder
                    return ticket, ticket.tasks.popleft()
                queue.changed.wait()
        return None

    def prepare(self, ticket: Ticket, request: Request) -> None:
        """Decodes, checks and prepares a request."""
        decoder, watch = ticket.decoder, Stopwatch()
        assert decoder is not None
        with collecting_warnings() as warnings, watch.measure("read"):
            request = decoder.decode(request, ticket.account.add, lambda: ticket.open)
        owner = self._owner(ticket)
        OWNER.set(owner)
        job = self._compositor.accept(request, self._limits, watch)
        job.warnings = list(dict.fromkeys(warnings + job.warnings))
        job.owner = owner
        height, width = job.scene.rgb.shape[:2]
        with in_field("output_format"):
            check_format((width, height), ticket.file_format)
        if ticket.preview_every:
            with in_field("preview_every"):
                check_format((width, height), PREVIEW_FORMAT)
        masks = sum(placement.mask is not None for placement in request.placements)
        ticket.account.set(self._bytes(job, masks))
        ticket.job = job
        self._queue.put(ticket, job.images)

    def _owner(self, ticket: Ticket) -> str:
        return "" if self._share_caches else ticket.client

    def segment(self, ticket: Ticket, picture: PictureLike, where: Where) -> None:
        """Finds an object in a picture; its mask ends the request."""
        decoder, watch = ticket.decoder, Stopwatch()
        assert decoder is not None
        with collecting_warnings() as warnings:
            with watch.measure("read"):
                read = decoder.reader(ticket.account.add, lambda: ticket.open)
                decoded = read.picture("picture", picture, "the picture")
            with watch.measure("segment"), in_field("where"):
                found = self._compositor.segmenter.find(decoded, where)
            with watch.measure("encode"):
                image = FinishedImage(encode_mask(found.mask), 0, ())
        self._queue.end(ticket, MaskFound([image], watch.seconds, warnings, score=found.score))

    def plan(self, ticket: Ticket, edit: Edit, guesses: bool) -> None:
        """Reads the pictures of an edit, and finds the objects. The plan ends the request, unless its holes
        are filled without a network."""
        decoder, watch = ticket.decoder, Stopwatch()
        assert decoder is not None
        with collecting_warnings() as warnings:
            with watch.measure("read"):
                edit = _decoded(edit, decoder.reader(ticket.account.add, lambda: ticket.open))
            plan = plan_edit(edit, self._compositor.segmenter, self._limits, watch)
        fills = plan.has_hole and not guesses
        OWNER.set(self._owner(ticket))
        steps = steps_to_place(plan, self._compositor, self._limits, watch) if fills else 0
        height, width = plan.seen.shape[:2]
        with in_field("output_format"):
            check_format((width, height), ticket.file_format)
        ticket.account.set(
            request_bytes(
                pixels=width * height,
                scene=LARGEST_SCENE,
                masks=len(plan.objects) + _HOLE_BYTES,
                placements=0,
                drawn=0,
                images=1 if plan.placements else edit.num_images,
                channels=4,
                metadata=plan.scene.metadata.nbytes,
            )
        )
        if fills:
            self._queue.end(ticket, Planned([], watch.seconds, warnings, plan=plan, place_steps=steps))
        else:
            self.run(ticket, self.fill, plan, (), watch, warnings)

    def fill(
        self,
        ticket: Ticket,
        plan: Plan,
        drawn: Sequence[FinishedImage],
        watch: Stopwatch,
        warnings: list[str],
    ) -> None:
        """Fills the holes of an edit with what was drawn, or with a guess. Where nothing is placed, that
        finishes its pictures."""
        scenes = [plan.scene]
        if plan.has_hole:
            with watch.measure("fill"), collecting_warnings():  # of the server's own pictures
                scenes = [plan.fill(load_scene(image.image)[0]) for image in drawn] or [plan.fill()]
        if plan.placements:
            self._queue.end(ticket, Planned([], watch.seconds, warnings, plan=plan, scenes=scenes))
        else:
            self.run(ticket, self._encode, plan, scenes, watch, warnings)

    def _encode(
        self, ticket: Ticket, plan: Plan, scenes: Sequence[Picture], watch: Stopwatch, warnings: list[str]
    ) -> None:
        """Encodes the next picture of an edit that places nothing; the last one ends it."""
        scene = scenes[len(ticket.encoded)]
        with watch.measure("encode"), collecting_warnings() as noticed:
            content = encode_picture(scene.pixels, ticket.file_format, scene.metadata)
        warnings += [text for text in noticed if text not in warnings]
        ticket.encoded[len(ticket.encoded)] = content
        if len(ticket.encoded) < len(scenes):
            self.run(ticket, self._encode, plan, scenes, watch, warnings)
            return
        images = [
            FinishedImage(ticket.encoded[index % len(scenes)], plan.seed + index, ())
            for index in range(plan.edit.num_images)
        ]
        self._queue.end(ticket, Planned(images, watch.seconds, warnings, plan=plan))

    def _bytes(self, job: Job, masks: int) -> int:
        """See `request_bytes`."""
        scene, seen = job.scene, job.images[0].image
        pixels = seen.shape[0] * seen.shape[1]
        kept = scene.nbytes + (0 if seen is scene.rgb else seen.nbytes)
        return request_bytes(
            pixels=pixels,
            scene=kept // pixels,
            masks=masks,
            placements=len(job.passes),
            drawn=math.prod(self._compositor.bundle.manifest.picture_size),
            images=len(job.images),
            channels=3 if scene.alpha is None else 4,
            metadata=scene.metadata.nbytes,
        )

    def preview(self, ticket: Ticket, index: int, overlay: Callable[[Drawn], Drawn], drawn: Drawn) -> None:
        """Delivers what a picture looks like so far."""
        content = encode_picture(overlay(drawn), PREVIEW_FORMAT)
        with self._queue.changed:
            # who does not take previews, or asks for many while memory is short, misses some
            with suppress(MemoryFullError):
                ticket.account.add(len(content))
                self._queue.tell(ticket, Preview(index, content))
            ticket.previews -= 1
            if ticket.finished and not ticket.previews:
                self._queue.end(ticket, ticket.finished)

    def finish(self, ticket: Ticket, image: ImageJob, drawn: Drawn) -> None:
        """Pastes what was drawn; then the next placement waits, or the picture is done."""
        image.paste(drawn)
        if not image.done:
            self._queue.put(ticket, [image])
            return
        job = image.job
        with job.watch.measure("encode"), collecting_warnings() as warnings:
            content = encode_picture(image.finished(), ticket.file_format, job.scene.metadata)
        image.image = job.scene.rgb  # the canvas is no longer needed
        with self._queue.changed:
            job.warnings += [text for text in warnings if text not in job.warnings]
            ticket.encoded[image.index] = content
            if len(ticket.encoded) == len(job.images):
                images = [FinishedImage(ticket.encoded[of.index], of.seed, of.regions) for of in job.images]
                ticket.finished = Finished(images, job.watch.seconds, job.warnings)
                # else the last preview, which another worker encodes, ends it
                if not ticket.previews:
                    self._queue.end(ticket, ticket.finished)

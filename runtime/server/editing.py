"""An edit in the server: read and planned by a worker, filled by the filler's batcher, placed by the other.

Each phase is a request of its own to a batcher, so waiting, fairness, deadlines and cancelling are those of
all requests. What is between two phases takes milliseconds, beside the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from runtime.edits.fillers import fill_request, filler_name
from runtime.edits.plan import Plan
from runtime.errors import collecting_warnings
from runtime.imaging.picture import Picture
from runtime.imaging.pictures import encode_picture
from runtime.imaging.scene import load_scene
from runtime.request import Edit, Request
from runtime.result import Stopwatch
from runtime.server.batching import Batcher
from runtime.server.call import Call
from runtime.server.events import Event, Finished, FinishedImage, Planned, StepDone

Follow = Callable[..., AsyncGenerator[Event, None]]
"""`ServedModel` has it."""

Phase = tuple[Batcher, Request]
"""Who draws, and what."""


@dataclass
class _Course:
    """How far an edit is."""

    all_steps: int = 0
    before: int = 0
    """Steps of the phases that are over."""
    finished: Finished | None = None
    """How the phase before ended."""


class Editing:
    """Takes edits through their phases."""

    def __init__(
        self,
        batcher: Batcher,
        filler: Batcher | None,
        follow: Follow,
        check_previews: Callable[[int, Sequence[Phase]], None],
    ) -> None:
        """Keeps who does what.

        Args:
            batcher: plans, and places objects.
            filler: fills holes; they are guessed if None.
            follow: has a batcher accept a ticket, and yields its events.
            check_previews: refuses too many of them.
        """
        self._batcher = batcher
        self._filler = filler
        self._follow = follow
        self._check_previews = check_previews

    async def events(
        self, call: Call, edit: Edit, file_format: str, preview_every: int
    ) -> AsyncGenerator[Event, None]:
        """Yields the events of an edit up to `Finished`; closing it earlier cancels the phase that runs.

        Raises:
            Exception: what the edit failed with.
        """
        course = _Course()
        filler = self._filler.compositor if self._filler else None
        accept = partial(self._batcher.plan, edit, filler)
        del edit
        follow = self._follow(call, self._batcher, accept, file_format)
        async with aclosing(self._phase(course, follow)) as events:
            async for event in events:
                yield event
        planned = course.finished
        assert isinstance(planned, Planned)
        plan = planned.plan
        assert plan is not None
        phases = self._phases(plan)
        if preview_every:
            self._check_previews(preview_every, phases)
        course.all_steps = sum(
            sum(batcher.compositor.steps_of(request, batcher.limits)) for batcher, request in phases
        )
        done: list[Finished] = [planned]
        watch = Stopwatch()
        scenes = [plan.scene]
        if self._filler and plan.has_hole:
            accept = partial(self._filler.submit, phases[0][1])
            follow = self._follow(call, self._filler, accept, preview_every=preview_every)
            async with aclosing(self._phase(course, follow)) as events:
                async for event in events:
                    yield event
            assert course.finished
            done.append(course.finished)
            scenes = await asyncio.to_thread(_filled, plan, course.finished)
        elif plan.has_hole:
            with watch.measure("fill"):
                scenes = [await asyncio.to_thread(plan.fill)]
        if plan.placements:
            accept = partial(self._batcher.submit, plan.place_request(scenes[0]))
            follow = self._follow(call, self._batcher, accept, file_format, preview_every)
            async with aclosing(self._phase(course, follow)) as events:
                async for event in events:
                    yield event
        else:
            with watch.measure("encode"):
                course.finished = await asyncio.to_thread(_removed, plan, scenes, file_format)
        assert course.finished
        yield self._finished(plan, course.finished, done, watch)

    async def _phase(
        self, course: _Course, follow: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[Event, None]:
        """Yields the events of a phase but for the last, with steps counted over all phases."""
        steps = 0
        async with aclosing(follow) as events:
            async for event in events:
                if isinstance(event, Finished):
                    course.finished = event
                elif isinstance(event, StepDone):
                    steps = event.total
                    yield StepDone(course.before + event.done, course.all_steps)
                else:
                    yield event
        course.before += steps

    def _phases(self, plan: Plan) -> list[Phase]:
        """What is drawn: what fills the holes, and what is placed, in the scene as it is before."""
        phases: list[Phase] = []
        if self._filler and plan.has_hole:
            phases.append((self._filler, fill_request(plan, self._filler.compositor)))
        if plan.placements:
            phases.append((self._batcher, plan.place_request(plan.scene)))
        return phases

    def _finished(self, plan: Plan, last: Finished, before: list[Finished], watch: Stopwatch) -> Finished:
        """The end of an edit: the pictures of its last phase, with all that came before."""
        seconds = watch.seconds
        for phase in (*before, last):
            for stage, time in phase.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + time
        name = filler_name(self._filler.compositor if self._filler else None)
        boxes = plan.hole_boxes
        return Finished(
            [replace(image, regions=(*boxes, *image.regions)) for image in last.images],
            seconds,
            list(dict.fromkeys(text for phase in (*before, last) for text in phase.warnings)),
            filler=name if plan.has_hole else "",
        )


def _filled(plan: Plan, drawn: Finished) -> list[Picture]:
    """The scene with its holes filled, once for each picture that the filler drew."""
    with collecting_warnings():  # of the server's own pictures
        return [plan.fill(load_scene(image.image)[0]) for image in drawn.images]


def _removed(plan: Plan, scenes: list[Picture], file_format: str) -> Finished:
    """The end of an edit that places nothing."""
    images = []
    with collecting_warnings() as warnings:
        for index in range(plan.edit.num_images):
            scene = scenes[index % len(scenes)]
            content = encode_picture(scene.pixels, file_format, scene.metadata)
            images.append(FinishedImage(content, plan.seed + index, ()))
    return Finished(images, {}, warnings)

"""Runs edits in the server: a worker plans them, the filler's batcher fills holes, and the other batcher
places objects.

Each phase is a request of its own to a batcher, so waiting, fairness, deadlines and cancelling are those of
all requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from runtime.edits.fillers import fill_request, filler_name
from runtime.edits.plan import Plan, in_edit, placed_field
from runtime.request import Edit, Request
from runtime.server.batching import Batcher
from runtime.server.call import Call
from runtime.server.events import Event, Finished, Planned, StepDone

Follow = Callable[..., AsyncGenerator[Event, None]]
"""`ServedModel` has it."""

Phase = tuple[Batcher, Request]
"""The batcher that draws, and its request."""


@dataclass
class _Course:
    """The progress of an edit."""

    all_steps: int = 0
    """Of all phases; 0 where only one of them has steps."""
    before: int = 0
    """Steps of the phases that are over."""
    done: list[Finished] = field(default_factory=list)
    """Their results."""


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
        follows = self._follows(course, call, edit, file_format, preview_every)
        del edit
        for named, follow in follows:
            with in_edit(named):
                async with aclosing(self._phase(course, follow)) as events:
                    async for event in events:
                        yield event
        finished = self._finished(course.done)
        call.seconds = finished.seconds
        yield finished

    def _follows(
        self, course: _Course, call: Call, edit: Edit, file_format: str, preview_every: int
    ) -> Iterator[tuple[str, AsyncGenerator[Event, None]]]:
        """Yields the events of each phase, and the field of the edit that says what it draws.

        What a phase is depends on how those before it ended.
        """
        filler = self._filler.compositor if self._filler else None
        accept, placed = partial(self._batcher.plan, edit, filler), placed_field(edit.action)
        del edit
        yield placed, self._follow(call, self._batcher, accept, file_format)
        plan = _planned(course.done[-1]).plan
        assert plan
        phases = self._phases(plan)
        if preview_every:
            self._check_previews(preview_every, phases)
        if self._filler and plan.has_hole:
            filling = phases[0][1]
            steps = self._filler.compositor.steps_of(filling, self._filler.limits)
            course.all_steps = sum(steps) + _planned(course.done[-1]).place_steps
            accept = partial(self._filler.submit, filling)
            yield "fill", self._follow(call, self._filler, accept, preview_every=preview_every)
            accept = partial(self._batcher.fill, plan, course.done[-1].images)
            yield placed, self._follow(call, self._batcher, accept, file_format)
        if plan.placements:
            accept = partial(self._batcher.submit, plan.place_request(_planned(course.done[-1]).scenes[0]))
            yield placed, self._follow(call, self._batcher, accept, file_format, preview_every)

    async def _phase(
        self, course: _Course, follow: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[Event, None]:
        """Yields the events of a phase but for the last, with steps counted over all phases."""
        steps = 0
        async with aclosing(follow) as events:
            async for event in events:
                if isinstance(event, Finished):
                    course.done.append(event)
                elif isinstance(event, StepDone):
                    steps = event.total
                    yield StepDone(course.before + event.done, course.all_steps or steps)
                else:
                    yield event
        course.before += steps

    def _phases(self, plan: Plan) -> list[Phase]:
        """Returns what is drawn: what fills the holes, and what is placed, in the scene as it is before."""
        phases: list[Phase] = []
        if self._filler and plan.has_hole:
            phases.append((self._filler, fill_request(plan, self._filler.compositor)))
        if plan.placements:
            phases.append((self._batcher, plan.place_request(plan.scene)))
        return phases

    def _finished(self, done: list[Finished]) -> Finished:
        """Returns the end of an edit: the pictures of its last phase, with all that came before."""
        plan = _planned(done[0]).plan
        assert plan
        seconds: Counter[str] = Counter()
        for phase in done:
            seconds.update(phase.seconds)
        name = filler_name(self._filler.compositor if self._filler else None)
        boxes = plan.hole_boxes
        return Finished(
            [replace(image, regions=(*boxes, *image.regions)) for image in done[-1].images],
            dict(seconds),
            list(dict.fromkeys(text for phase in done for text in phase.warnings)),
            filler=name if plan.has_hole else "",
        )


def _planned(finished: Finished) -> Planned:
    assert isinstance(finished, Planned)
    return finished

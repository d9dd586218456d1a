"""The arena: nothing that is needed at the same time overlaps, and nothing is lost."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.arena import ALIGNMENT, Buffer, Pool, PoolExhaustedError, aligned, layout

PHASES = ("condition", "window", "step", "decode")

buffers = st.lists(
    st.builds(
        Buffer,
        name=st.uuids().map(str),
        nbytes=st.integers(0, 100_000),
        phases=st.frozensets(st.sampled_from(PHASES), min_size=1),
    ),
    max_size=20,
)


@given(buffers)
def test_buffers_of_one_phase_lie_apart(buffers: list[Buffer]) -> None:
    offsets = layout(buffers).offsets
    for one in buffers:
        for other in buffers:
            if one is not other and one.phases & other.phases and one.nbytes and other.nbytes:
                first, second = sorted((one, other), key=lambda b: offsets[b.name])
                assert offsets[first.name] + first.nbytes <= offsets[second.name]


@given(buffers)
def test_size_is_between_the_largest_phase_and_all_buffers(buffers: list[Buffer]) -> None:
    result = layout(buffers)
    of_phase = [sum(aligned(b.nbytes) for b in buffers if phase in b.phases) for phase in PHASES]
    assert max(of_phase) <= result.nbytes <= sum(aligned(b.nbytes) for b in buffers)
    assert all(result.offsets[b.name] + b.nbytes <= result.nbytes for b in buffers)
    assert all(offset % ALIGNMENT == 0 for offset in result.offsets.values())


@given(buffers)
def test_overlaps_are_those_of_the_places(buffers: list[Buffer]) -> None:
    result = layout(buffers)

    def places(buffer: Buffer) -> set[int]:
        start = result.offsets[buffer.name] // ALIGNMENT
        return set(range(start, start + aligned(buffer.nbytes) // ALIGNMENT))

    for one in buffers:
        expected = {b.name for b in buffers if b is not one and places(b) & places(one)}
        assert result.overlaps[one.name] == expected


def test_graphs_that_never_run_together_share_their_scratch_memory() -> None:
    scratch = [Buffer(phase, 1000 * (i + 1), frozenset({phase})) for i, phase in enumerate(PHASES)]
    inputs = Buffer("latent", 500, frozenset({"window", "step"}))
    result = layout([*scratch, inputs])
    assert result.nbytes == aligned(4000)  # the largest scratch memory; the input lies beside a smaller one
    assert result.overlaps["latent"] == {"decode"}


class PoolMachine(RuleBasedStateMachine):
    """Takes pieces and gives them back in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(64 * ALIGNMENT)
        self.pieces: dict[int, int] = {}

    @rule(nbytes=st.integers(0, 20 * ALIGNMENT))
    def take(self, nbytes: int) -> None:
        size = max(aligned(nbytes), ALIGNMENT)
        try:
            offset = self.pool.take(nbytes)
        except PoolExhaustedError as error:
            assert error.largest < size  # noqa: PT017  either outcome may be right
            assert error.free == self.pool.free_bytes  # noqa: PT017
            return
        assert offset % ALIGNMENT == 0
        assert 0 <= offset <= self.pool.nbytes - size
        for other, other_size in self.pieces.items():
            assert offset + size <= other or other + other_size <= offset
        self.pieces[offset] = size

    @precondition(lambda self: self.pieces)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.pieces)))
        self.pool.give_back(offset)
        del self.pieces[offset]

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.pool.free_bytes == self.pool.nbytes - sum(self.pieces.values())

    def teardown(self) -> None:
        for offset in self.pieces:
            self.pool.give_back(offset)
        # all neighbours joined: the whole is one piece again
        assert self.pool.take(self.pool.nbytes) == 0


TestPool = PoolMachine.TestCase


def test_the_smallest_piece_that_fits_is_taken() -> None:
    pool = Pool(10 * ALIGNMENT)
    first, wall, second, _ = (pool.take(size * ALIGNMENT) for size in (3, 1, 2, 1))
    pool.give_back(first)
    pool.give_back(second)
    assert wall == 3 * ALIGNMENT
    assert pool.take(2 * ALIGNMENT) == second


def take_interrupted(pool: Pool, nbytes: int, line: int, interrupt: Callable[[], object]) -> tuple[int, bool]:
    """Takes a piece, and calls `interrupt` before that line of the pool's code; whether it came so far."""
    lines = itertools.count()
    reached = False

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal reached
        if frame.f_globals["__name__"] == Pool.__module__ and event == "line" and next(lines) == line:
            reached = True
            interrupt()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return pool.take(nbytes), reached
    finally:
        sys.settrace(before)


def test_a_piece_may_come_back_while_another_is_taken() -> None:
    """Python may collect a tensor wherever `take` is, in the thread that takes."""
    for line in itertools.count():
        pool = Pool(10 * ALIGNMENT)
        first, second = pool.take(2 * ALIGNMENT), pool.take(3 * ALIGNMENT)
        third, reached = take_interrupted(pool, 5 * ALIGNMENT, line, partial(pool.give_back, second))
        pool.give_back(first)
        pool.give_back(third)
        if not reached:
            break
        assert pool.take(10 * ALIGNMENT) == 0
    assert line > 5


def test_an_empty_pool_has_no_room() -> None:
    with pytest.raises(PoolExhaustedError, match="1024 bytes wanted, 0 free, 0 in one piece"):
        Pool(0).take(1000)

"""Device memory that ONNX Runtime's CUDA provider asks us for: heaps, and the C functions that it calls."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engines.arena import PAGE
from engines.backends.onnxruntime.provider_memory import LARGE, LEAST_BLOCK, Heap, ProviderMemory
from engines.cuda import OutOfDeviceMemoryError


class Card:
    """Addresses without memory."""

    def __init__(self, nbytes: int = 1 << 40) -> None:
        self.free_bytes = nbytes
        self.blocks: dict[int, int] = {}
        self._next = 1 << 32

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.free_bytes:
            raise OutOfDeviceMemoryError("the card is out of memory")
        address, self._next = self._next, self._next + nbytes + PAGE
        self.blocks[address] = nbytes
        self.free_bytes -= nbytes
        return address

    def free(self, address: int) -> None:
        self.free_bytes += self.blocks.pop(address)


class Provider:
    """Calls the C functions, as the provider does."""

    def __init__(self, memory: ProviderMemory) -> None:
        options = memory.options()
        self.take = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(int(options["gpu_external_alloc"]))
        self.give_back = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(int(options["gpu_external_free"]))


def new_memory(card: Card, limit: int = 1 << 40) -> tuple[ProviderMemory, Provider]:
    memory = ProviderMemory(card)
    memory.limit = limit
    return memory, Provider(memory)


def test_weights_lie_in_one_block_and_go_with_it() -> None:
    card = Card()
    memory, provider = new_memory(card)
    pieces = []
    for _ in range(2):
        with memory.loading(10 * PAGE):
            pieces.append([provider.take(PAGE // 2) for _ in range(20)])
    assert list(card.blocks.values()) == [10 * PAGE] * 2
    for address in pieces[0]:
        provider.give_back(address)
    (block,) = card.blocks
    assert all(block <= address < block + 10 * PAGE for address in pieces[1])
    assert memory.weights.nbytes == 10 * PAGE


def test_what_is_taken_in_a_run_lies_elsewhere_and_its_block_stays() -> None:
    card = Card()
    memory, provider = new_memory(card)
    memory.reserve_scratch(4 * PAGE)
    with memory.loading(PAGE):
        weights = provider.take(100)
    scratch = provider.take(100)
    assert (memory.weights.owns(weights), memory.scratch.owns(weights)) == (True, False)
    assert (memory.weights.owns(scratch), memory.scratch.owns(scratch)) == (False, True)
    provider.give_back(scratch)
    # a captured graph uses it again at every replay
    assert provider.take(100) == scratch
    assert (memory.scratch.nbytes, memory.scratch.most_used) == (4 * PAGE, 256)


def test_scratch_memory_suffices_for_the_largest_only() -> None:
    card = Card()
    memory, _ = new_memory(card)
    for nbytes in (3 * PAGE, 2 * PAGE, 5 * PAGE, 5 * PAGE - 1):
        memory.reserve_scratch(nbytes)
    assert list(card.blocks.values()) == [3 * PAGE, 5 * PAGE]


def test_more_than_expected_gets_another_block() -> None:
    card = Card()
    memory, provider = new_memory(card)
    with memory.loading(PAGE):
        for _ in range(3):
            provider.take(PAGE)
    assert list(card.blocks.values()) == [PAGE, LEAST_BLOCK]
    provider.take(LEAST_BLOCK + 1)
    assert list(card.blocks.values())[2:] == [LEAST_BLOCK + PAGE]


def test_weights_that_were_not_loaded_leave_no_block() -> None:
    card = Card()
    memory, _ = new_memory(card)
    with pytest.raises(ValueError, match="damaged"), memory.loading(PAGE):
        raise ValueError("damaged")
    assert not card.blocks


@pytest.mark.parametrize(
    ("card", "limit", "said"),
    [
        (Card(), 3 * PAGE, "34 MB are needed, 4 MB are left of the memory budget"),
        (Card(2 * PAGE), 1 << 40, "34 MB are needed, fewer are free"),
    ],
)
def test_a_refusal_is_an_empty_address_and_a_reason(card: Card, limit: int, said: str) -> None:
    memory, provider = new_memory(card, limit)
    with memory.loading(PAGE):
        provider.take(PAGE)
    assert memory.refusal() is None
    assert provider.take(100) is None
    assert str(memory.refusal()) == said
    assert memory.refusal() is None


def test_weights_without_room_are_refused_before_they_are_loaded() -> None:
    memory, _ = new_memory(Card(), limit=PAGE)
    with (
        pytest.raises(OutOfDeviceMemoryError, match="8 MB are needed, 2 MB are left"),
        memory.loading(4 * PAGE),
    ):
        raise AssertionError


def test_the_provider_may_give_back_what_nobody_has() -> None:
    _, provider = new_memory(Card())
    provider.give_back(None)
    provider.give_back(12345)


def test_a_process_ends_without_a_word_although_the_provider_still_gives_back() -> None:
    """Sessions that are left over are freed while Python shuts down, after what they refer to was cleared."""
    program = """
        import ctypes
        from tests.engines.backends.test_provider_memory import Card, new_memory

        memory, _ = new_memory(Card())
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p] * 3
        # like a session, it calls a C function when it is freed
        memory.session = [new_capsule(1, None, int(memory.options()["gpu_external_free"]))]
        memory.session.append(memory)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_small_pieces_do_not_lie_among_large_ones() -> None:
    """What long-lived small ones would divide stays in one piece."""
    card = Card()
    memory, provider = new_memory(card, limit=3 * LARGE)
    memory.reserve_scratch(3 * LARGE)
    first, small, second = provider.take(LARGE), provider.take(100), provider.take(LARGE)
    provider.give_back(first)
    provider.give_back(second)
    (block,) = card.blocks
    assert small == block
    assert provider.take(2 * LARGE) is not None


class HeapMachine(RuleBasedStateMachine):
    """Pieces come and go in any order; none overlaps another, and all blocks go with their last piece."""

    @initialize(keep=st.booleans())
    def start(self, keep: bool) -> None:
        self.card = Card()
        self.keep = keep
        self.heap = Heap(self.card, lambda: 1 << 30, keep)
        self.pieces: dict[int, int] = {}

    @rule(nbytes=st.one_of(st.integers(0, 1000), st.integers(LARGE - 1000, 3 * LARGE)))
    def take(self, nbytes: int) -> None:
        address = self.heap.take(nbytes)
        assert address not in self.pieces
        self.pieces[address] = nbytes

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.pieces:
            address = data.draw(st.sampled_from(sorted(self.pieces)))
            del self.pieces[address]
            self.heap.give_back(address)

    @invariant()
    def pieces_lie_apart_in_blocks(self) -> None:
        if not hasattr(self, "heap"):
            return
        spans = sorted((address, address + nbytes) for address, nbytes in self.pieces.items())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        for start, end in spans:
            assert any(at <= start and end <= at + size for at, size in self.card.blocks.items())
        assert sum(self.card.blocks.values()) == self.heap.nbytes
        assert self.pieces or self.keep or not self.card.blocks


TestHeap = HeapMachine.TestCase

"""Defines the interface between a backend and the card engine: loaded graphs, and ways to run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Shape = tuple[int, ...]


class Context(Protocol):
    """Runs a graph with inputs of one set of shapes."""

    def prepare(
        self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], scratch: int, scratch_size: int
    ) -> None:
        """Says where everything is.

        Args:
            shapes: input -> its shape.
            addresses: input or output -> its address.
            scratch: address of memory for intermediate results.
            scratch_size: its bytes; 0 for a backend that has its own.

        Raises:
            BackendError: the graph does not take a shape or an address.
        """

    def enqueue(self, stream: int) -> None:
        """Puts the graph into a stream; does not wait for it."""

    def capturable(self, stream: int) -> bool:
        """Returns whether `enqueue` may be captured as a CUDA graph."""


class LoadedGraph(Protocol):
    """A graph whose weights are on the card, until nothing refers to it."""

    scratch: int
    """Bytes that a call needs for intermediate results, beside what the backend allocates itself."""

    def new_context(self) -> Context:
        """Returns the resources for calls of one set of shapes; scratch memory is lent to each call.

        Raises:
            OutOfDeviceMemoryError: the card has no room for it.
        """

    def keep_compiled_kernels(self) -> None:
        """Saves what was compiled for this card, so that the next start need not compile it again."""

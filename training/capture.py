"""Captures training steps on a card as one CUDA graph.

A step of a small network is thousands of kernels, and launching them takes longer than computing them. A
graph is launched at once. Source: PyTorch's notes on CUDA semantics, "Whole-network capture".
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Step = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

WARM_UP = 3
"""Steps before the capture, in which libraries choose their kernels and the optimizer makes its state."""


_FAILED: list[torch.cuda.CUDAGraph] = []
"""Captures that failed are kept, because PyTorch's allocator goes on asking them what memory is theirs."""


class CapturedStep:
    """A step that is recorded once and then replayed; if it cannot be recorded, it is just taken."""

    def __init__(self, step: Step, forget: Callable[[], None]) -> None:
        """Takes what is to be captured.

        Args:
            step: takes a batch, whose tensors are on the card and always have the same shapes, and gives
                scalars. It may neither copy from the host nor wait for the card.
            forget: drops what a step that was interrupted has left: gradients.
        """
        gc.collect()  # the step of an earlier stage refers to itself, and would keep its memory
        self._step, self._forget = step, forget
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._taken, self._refused = 0, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes a step; the results are overwritten by the next one."""
        if self._taken == WARM_UP:
            self._capture(batch)
        self._taken += 1
        if self._refused:
            return self._step(batch)
        if self._graph is None:
            return self._aside(batch)
        for name, value in batch.items():
            self._batch[name].copy_(value)
        self._graph.replay()
        return self._results

    def _aside(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes a step on the stream that is captured."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def _capture(self, batch: Mapping[str, Tensor]) -> None:
        """Records a step without taking it; says why if it cannot be."""
        self._batch = {name: value.clone() for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                # puts the stream back, which a capture that fails does not
                torch.cuda.stream(torch.cuda.current_stream()),
                # what other threads do to the card does not end the capture
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                self._results = self._step(self._batch)
        except Exception as error:
            self._refused = True
            _FAILED.append(graph)
            self._forget()
            print(
                f"train: steps are not captured as a CUDA graph, and slower: {_cause(error)}", file=sys.stderr
            )
        else:
            self._graph = graph


def _cause(error: BaseException) -> str:
    """Returns the first error in one line; ending a failed capture fails as well."""
    while error.__context__:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]

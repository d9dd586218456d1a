"""Determines how many processes prepare data, and where they draw; gets what they make."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import default_collate

from engines.errors import AnyDoorError

CARD_DRAWERS = 12
"""Most processes that draw on one card; see `training.data.synthetic.rendering.SHARE`."""


def worker_count(asked: int) -> int:
    """Counts the processes that prepare data beside this one.

    Args:
        asked: by the recipe. -1 stands for all cores but one; 0 for none, or, where there is a card that
            would wait, for all cores but two.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked < 0:
        return max(cores - 1, 1)
    if asked == 0 and PartialState().device.type != "cpu":
        return max(cores - 2, 0)
    return asked


def drawer_count(asked: int) -> int:
    """Counts the processes that draw objects; see `worker_count`."""
    count = worker_count(asked)
    return count if drawing_device().type == "cpu" else min(count, CARD_DRAWERS)


def drawing_device() -> torch.device:
    """Gives where the renderer draws: on the card, or on the processor where there is none that runs CUDA."""
    device: torch.device = PartialState().device
    return device if device.type == "cuda" else torch.device("cpu")


def load_samples(
    samples: Any,
    batch: int,
    numbers: Iterable[int],
    workers: int,
    stack: Callable[[list[Any]], Any] = default_collate,
    **how: Any,
) -> Iterator[Any]:
    """Loads samples in batches, in other processes if there are `workers`.

    Args:
        samples: number -> sample; may make several at once by `__getitems__`.
        batch: samples of a batch.
        numbers: of the samples, in their order.
        workers: processes that make them; 0 makes them here.
        stack: makes a batch of samples.
        how: more for PyTorch's `DataLoader`.

    Raises:
        AnyDoorError, OSError: as a sample raised it, in whichever process.
    """
    source: Any = _Stacked(samples, stack)
    for made in DataLoader(source, batch, sampler=numbers, num_workers=workers, collate_fn=_as_it_is, **how):
        if isinstance(made, Exception):
            raise made
        yield made


@dataclass(frozen=True)
class _Stacked:
    """Makes whole batches, or the error that keeps one from being made.

    PyTorch replaces the text of an error that is raised in another process by its traceback.
    """

    samples: Any
    stack: Callable[[list[Any]], Any]

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        together = getattr(self.samples, "__getitems__", None)
        try:
            return self.stack(together(numbers) if together else [self.samples[n] for n in numbers])
        except (AnyDoorError, OSError) as error:
            return error


def _as_it_is(made: Any) -> Any:
    return made

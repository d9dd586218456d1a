"""Determines how many processes prepare data, and where they draw."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

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

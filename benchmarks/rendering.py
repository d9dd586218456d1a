"""How fast does the renderer draw? Views of training objects, in rooms and alone.

    python benchmarks/rendering.py
    python benchmarks/rendering.py --at-once 64
    python benchmarks/rendering.py --device cuda --views 1024

Prints what it takes to draw the parameters of an object and of a room, which a processor does on every
device, and for each kind of view how many are drawn a second, parameters included, and how many operators of
PyTorch that takes: a card launches about one kernel for each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.support.machine import describe
from runtime.progress_bar import ProgressBar
from training.data.synthetic.objects import make_object
from training.data.synthetic.scenes import make_scene
from training.data.synthetic.views import reference_views, scene_views

FREE = ("detach", "empty", "lift_fresh", "new_empty")
"""Operators that compute nothing, beside those that give a view of a tensor."""

DRAWN: Mapping[str, Callable[..., Tensor]] = {"in rooms": scene_views, "alone": reference_views}


class _Counter(TorchDispatchMode):
    """Counts the operators that compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view and func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


def count_operators(work: Callable[[], object]) -> int:
    """Count the operators of PyTorch that a piece of work computes with."""
    with _Counter() as counter:
        work()
    return int(counter.count)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Measure a piece of work, to the end of what a card does for it."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(views: int, at_once: int, device: torch.device) -> Iterator[str]:
    """Measure everything; gives a line for each."""
    make_object.cache_clear()
    for name, make in (("an object", make_object), ("a room", make_scene)):
        began = time.perf_counter()
        for seed in ProgressBar(range(views), f"making {name}", leave=False):
            make(seed)
        yield f"parameters of {name}: {1000 * (time.perf_counter() - began) / views:.1f} ms"
    for name, draw in DRAWN.items():
        known, others = ([(seed, 0) for seed in range(first, first + views)] for first in (0, views))
        with ProgressBar(total=2, desc=f"drawing views {name}", leave=False) as bar:
            operators = count_operators(partial(draw, known, device=device, at_once=at_once))
            bar.update()
            seconds = seconds_of(partial(draw, others, device=device, at_once=at_once), device)
            bar.update()
        yield f"views {name}: {views / seconds:.1f} a second, {operators} operators for {views}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/rendering.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--views", type=int, default=64, help="of each kind; default: %(default)s")
    parser.add_argument("--at-once", type=int, default=0, help="drawn together; default: as suits the device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.views < 1 or options.at_once < 0:
        parser.error("--views is at least 1, and --at-once at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no card on this machine; leave --device out")
    for line in measure(options.views, options.at_once, torch.device(options.device)):
        print(line, flush=True)
    print(f"{torch.get_num_threads()} thread(s); {describe()['processor']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

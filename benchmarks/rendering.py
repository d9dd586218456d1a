"""How fast does the renderer draw? Views of training objects, in rooms and alone.

    python benchmarks/rendering.py
    python benchmarks/rendering.py --at-once 64
    python benchmarks/rendering.py --device cuda --views 1024

Prints how long it takes to draw the parameters of an object and of a room, which a processor does on every
device, and for each kind of view how many are drawn a second, parameters included, and how many operators of
PyTorch that takes: a card launches about one kernel for each.

On a processor one thread draws, as in every process that draws for a training, and its processor time is
measured: what else runs on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.support.machine import describe
from runtime.progress_bar import ProgressBar
from training.data.synthetic.objects import make_object
from training.data.synthetic.rendering import Frame
from training.data.synthetic.scenes import make_scene
from training.data.synthetic.views import draw_frames, reference_frame, scene_frame

FREE = ("detach", "empty", "lift_fresh", "new_empty")
"""Operators that compute nothing, beside those that give a view of a tensor."""

FRAMES: Mapping[str, Sequence[Callable[[int, int], Frame]]] = {
    "in rooms": (scene_frame,),
    "alone": (reference_frame,),
    "in rooms and alone": (scene_frame, reference_frame),
}
"""What is drawn of each object."""


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
    """Measure a piece of work: processor time, or with a card all the time to the end of what it does."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def measure(views: int, at_once: int, device: torch.device) -> Iterator[str]:
    """Measure everything; gives a line for each."""
    make_object.cache_clear()
    for name, make in (("an object", make_object), ("a room", make_scene)):
        seeds = ProgressBar(range(views), f"making {name}", leave=False)
        seconds = seconds_of(partial(deque, map(make, seeds), 0), torch.device("cpu"))
        yield f"parameters of {name}: {1000 * seconds / views:.1f} ms"
    for name, kinds in FRAMES.items():

        def draw(first: int, kinds: Sequence[Callable[[int, int], Frame]] = kinds) -> None:
            seeds = range(first, first + views // len(kinds))
            frames = [frame(seed, 0) for frame in kinds for seed in seeds]
            draw_frames(frames, device=device, at_once=at_once)

        with ProgressBar(total=2, desc=f"drawing views {name}", leave=False) as bar:
            operators = count_operators(partial(draw, 0))
            bar.update()
            seconds = seconds_of(partial(draw, views), device)
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
    if options.views < 2 or options.views % 2 or options.at_once < 0:
        parser.error("--views is an even number, at least 2, and --at-once at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no card on this machine; leave --device out")
    if options.device == "cpu":
        torch.set_num_threads(1)
    for line in measure(options.views, options.at_once, torch.device(options.device)):
        print(line, flush=True)
    print(describe().get("card" if options.device == "cuda" else "processor"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

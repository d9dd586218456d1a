"""Stores rendered views on disk, for random access while training.

A folder with two arrays that are mapped, not read: `scenes.npy` (N, V, S, S, 4) and `references.npy`
(N, R, S, S, 4), both uint8, RGB and the object's mask; row n is the object of seed n. `done.txt` says how
many rows are written, so that drawing can be interrupted, resumed, and read while it goes on.

examples:
    python -m training.data.view_store build/views --objects 100
    python -m training.data.view_store build/views --objects 5000 --workers 8
    python -m training.data.view_store build/views --objects 5000 --workers 12 --device cuda
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.errors import AnyDoorError
from engines.files import only_writer, write_text
from runtime.imaging.masks import MASK_THRESHOLD
from runtime.progress_bar import ProgressBar
from training.data.arrays import make_array, mapped_array, read_count, writable_array
from training.data.device import resident
from training.data.pairs import Shot
from training.data.synthetic.rendering import CPU
from training.data.synthetic.views import VIEW_SIZE, View, draw_frames, reference_frame, scene_frame

SCENES, REFERENCES = 3, 2
"""Views per object: in scenes, and alone."""

DONE = "done.txt"

Views = NDArray[np.uint8]


class StoreError(AnyDoorError):
    """A folder of views cannot be used; the text says why."""


class ViewStore:
    """Opens the arrays of a folder.

    Raises:
        StoreError: nothing is drawn yet.
        ArrayError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / DONE).exists():
            raise StoreError(
                f"no views in {folder}: draw some with python -m training.data.view_store {folder}"
            )
        self.folder = folder
        self.scenes: NDArray[np.uint8] = mapped_array(folder / "scenes.npy")
        self.references: NDArray[np.uint8] = mapped_array(folder / "references.npy")
        self.count = read_count(folder / DONE)
        rows = min(len(self.scenes), len(self.references))
        if not 0 < self.count <= rows:
            raise StoreError(
                f"'{folder / DONE}' says {self.count} objects, expected 1 to {rows}: delete '{folder}'"
            )
        self._loaded: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        """Counts the objects that were drawn when the folder was opened."""
        return self.count

    def resident(self, name: Literal["scenes", "references"], device: torch.device) -> Tensor:
        """Gives all views of a kind in a device's memory, (N, V, S, S, 4) uint8; copies them once."""
        if (name, device) not in self._loaded:
            array: NDArray[np.uint8] = getattr(self, name)
            self._loaded[name, device] = resident(array[: self.count], device)
        return self._loaded[name, device]

    def scene(self, row: int, number: int) -> View:
        """Gives a view of an object in a scene."""
        picture = self.scenes[row, number]
        return View(picture[..., :3], picture[..., 3])

    def reference(self, row: int, number: int) -> View:
        """Gives a view of an object on black."""
        picture = self.references[row, number]
        return View(picture[..., :3], picture[..., 3])


def as_shot(view: View) -> Shot:
    """Gives a view with a mask of bool: the pixels that the object covers by more than a half."""
    return Shot(view.image, view.mask > MASK_THRESHOLD)


def draw_objects(seeds: range, device: torch.device = CPU) -> list[tuple[Views, Views]]:
    """Draws all views of some objects: of each (V, S, S, 4) in scenes and (R, S, S, 4) alone."""
    frames = [scene_frame(seed, number) for seed in seeds for number in range(SCENES)]
    frames += [reference_frame(seed, number) for seed in seeds for number in range(REFERENCES)]
    drawn = np.split(draw_frames(frames, device=device).cpu().numpy(), [len(seeds) * SCENES])
    scenes, references = (views.reshape(len(seeds), -1, *views.shape[1:]) for views in drawn)
    return list(zip(scenes, references, strict=True))


def _start_drawer() -> None:
    """Prepares a process that draws: one thread, since they share the cores; its parent takes Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def draw_views(folder: Path, count: int, workers: int = 1, device: torch.device = CPU) -> None:
    """Draws the views of the objects 0..count-1, or those that an earlier call left undone.

    Args:
        folder: is made if it is not there.
        count: of objects.
        workers: processes.
        device: where they draw; the last bits of what they compute depend on it.

    Raises:
        BlockingIOError: another process draws into the folder.
        StoreError: the folder was made for another number of objects.
        ArrayError: a file is damaged.
    """
    if read_count(folder / DONE) == count:
        ViewStore(folder)  # many may read it at once
        return
    with only_writer(folder):
        _draw_missing(folder, _open_arrays(folder, count), workers, device)


def _open_arrays(folder: Path, count: int) -> list[NDArray[np.uint8]]:
    """Opens the views in scenes and alone to write them; makes what does not exist."""
    folder.mkdir(exist_ok=True)
    arrays = []
    for name, views in (("scenes", SCENES), ("references", REFERENCES)):
        path, shape = folder / f"{name}.npy", (count, views, VIEW_SIZE, VIEW_SIZE, 4)
        arrays.append(writable_array(path) if path.exists() else make_array(path, np.uint8, shape))
        if arrays[-1].shape != shape:
            raise StoreError(
                f"{path} has the shape {arrays[-1].shape}, expected {shape}: give another folder"
            )
    return arrays


def _draw_missing(
    folder: Path, arrays: Sequence[NDArray[np.uint8]], workers: int, device: torch.device
) -> None:
    count = len(arrays[0])
    done = folder / DONE
    start = read_count(done)
    on_card = device.type != "cpu"
    at_once = 48 if on_card else 4
    seeds = [range(first, min(first + at_once, count)) for first in range(start, count, at_once)]
    # what was forked can use no card, and hangs where PyTorch had threads
    method = get_context("spawn")
    with ProcessPoolExecutor(workers, method, _start_drawer) as pool:
        drawn = chain.from_iterable(pool.map(draw_objects, seeds, repeat(device)))
        for row, (scenes, references) in enumerate(
            ProgressBar(drawn, total=count - start, unit="object"), start
        ):
            arrays[0][row], arrays[1][row] = scenes, references
            write_text(done, str(row + 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 if the folder cannot be used, or 130 if it is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.view_store",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the arrays are, or are to be")
    parser.add_argument("--objects", type=int, default=4000, help="rows of the arrays; default: 4000")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw; default: 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    options = parser.parse_args(arguments)
    if options.objects < 1 or options.workers < 1:
        parser.error("--objects and --workers are at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no card on this machine; leave --device out")
    try:
        draw_views(options.folder, options.objects, options.workers, torch.device(options.device))
    except (OSError, AnyDoorError) as error:
        print(f"view_store: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("view_store: interrupted; the same command draws the objects that are left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

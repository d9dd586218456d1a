"""Draws a sheet of training pairs, and tells whether they are made as fast as the loop takes them.

    python -m training.inspect_data training/recipes/anydoor-small.toml pairs.png
    python -m training.inspect_data training/recipes/anydoor.toml pairs.png --seconds 0

One column per pair: the reference, the collage of the hint, its mask (white: fill this, grey: scene, black:
padding), and the picture that shall come out. Then samples per second of the dataset that the diffusion stage
reads (for rendered pairs: those that are encoded already) and of optimisation steps on one batch of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from training.config import Recipe, RecipeError, read_recipe
from training.data.encoded import HINTS_DONE, PAIRS_DONE, EncodedPairs, pair_of_views, rows_done
from training.data.pairs import Pair
from training.data.sources import SourceError
from training.data.view_store import ViewStore
from training.diffusion import DiffusionTask
from training.loop import LoopSettings, NumberedDataset, Numbers
from training.model import AnyDoor


def to_picture(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A picture (3, R, R), about -1..1, as uint8 (R, R, 3)."""
    picture: NDArray[np.uint8] = np.clip(values.transpose(1, 2, 0) * 127.5 + 127.5, 0, 255).astype(np.uint8)
    return picture


def column(pair: Pair, *more: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A pair from top to bottom, uint8 (rows * R, R, 3); `more` pictures (3, R, R) go before the last."""
    side = pair.picture.shape[-1]
    reference = np.asarray(Image.fromarray(pair.reference).resize((side, side)))
    mask = np.repeat(pair.hint[3:], 3, axis=0)
    below = [to_picture(picture) for picture in (pair.hint[:3], mask, *more, pair.picture)]
    return np.concatenate([reference, *below])


def draw_sheet(columns: list[NDArray[np.uint8]], path: Path) -> None:
    """Writes columns side by side."""
    Image.fromarray(np.concatenate(columns, axis=1)).save(path)


def pairs_of(recipe: Recipe, folder: Path, number: int) -> list[Pair]:
    """The first pairs that the recipe makes, of its data sets or of rendered views."""
    if recipe.sources:
        from training.train import mixture

        sources = mixture(recipe)
        return [sources.draw(np.random.default_rng(index)) for index in range(number)]
    store = ViewStore(folder / "views")
    rules, data = recipe.pairs, recipe.data
    return [pair_of_views(store, index, 2, rules, data.kind, data.single) for index in range(number)]


def training_data(recipe: Recipe, folder: Path) -> NumberedDataset:
    """What the diffusion stage reads. Nothing is encoded for it here.

    Raises:
        RecipeError: rendered pairs are not encoded yet.
    """
    if recipe.sources:
        from training.train import mixture

        return mixture(recipe)
    pairs, taken_through = folder / "pairs", not recipe.denoising.hint_block
    if not rows_done(pairs, HINTS_DONE if taken_through else PAIRS_DONE):
        raise RecipeError(f"there are no encoded pairs in {pairs}: train first, or give --seconds 0")
    drop, kind = recipe.denoising.drop, recipe.data.kind
    places = recipe.denoising.attention_guide > 0
    return EncodedPairs(pairs, 0, recipe.pairs, drop, kind, hint_features=taken_through, places=places)


def rate(work: Callable[[], object], samples: int, seconds: float) -> float:
    """Samples per second of repeated work, without its first time; at least two more are measured."""
    work()
    began, elapsed = time.perf_counter(), 0.0
    for times in count(1):
        work()
        elapsed = time.perf_counter() - began
        if elapsed > seconds and times > 1:
            return times * samples / elapsed
    raise AssertionError("counting has no end")


def feed_rate(dataset: NumberedDataset, settings: LoopSettings, seconds: float) -> float:
    """Samples per second that the loop could be fed with, if it took no time itself."""
    source: Dataset[Any] = dataset  # type: ignore[assignment]
    numbers = Numbers(0, settings.batch, process=0, processes=1)
    batches = iter(DataLoader(source, settings.batch, sampler=numbers, num_workers=settings.workers))
    return rate(lambda: next(batches), settings.batch, seconds)


def consume_rate(task: DiffusionTask, settings: LoopSettings, seconds: float) -> float:
    """Samples per second that the loop could take, if they were there at once: steps on a single batch."""
    source: Dataset[Any] = task.dataset()  # type: ignore[assignment]
    numbers = Numbers(0, settings.batch, process=0, processes=1)
    batch = next(iter(DataLoader(source, settings.batch, sampler=numbers)))
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad])

    def step() -> None:
        task.loss(task.module, batch)["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return rate(step, settings.batch, seconds)


def compare_rates(recipe: Recipe, folder: Path, settings: LoopSettings, seconds: float) -> str:
    """One line on how the diffusion stage's data keep up with it."""
    dataset = training_data(recipe, folder)
    fed = feed_rate(dataset, settings, seconds)
    # fresh weights are as fast as any
    task = DiffusionTask(AnyDoor(recipe.architecture), dataset, recipe.denoising)
    taken = consume_rate(task, settings, seconds)
    return (
        f"data: {fed:.1f} samples per second with {max(settings.workers, 1)} process(es); "
        f"loop: {taken:.1f} with {torch.get_num_threads()} thread(s); ratio {fed / taken:.1f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 if something cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m training.inspect_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, help="where views/ is; default: runs/NAME of the recipe")
    parser.add_argument("--count", type=int, default=12, help="pairs of the sheet")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="to measure each speed for; 0: draw the sheet only"
    )
    parser.add_argument("--threads", type=int, help="processor threads of the loop; default: all cores")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        inspect(options)
    except (RecipeError, SourceError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    return 0


def inspect(options: argparse.Namespace) -> None:
    """Writes the sheet and prints what is measured."""
    recipe = read_recipe(options.recipe)
    folder = options.folder or Path("runs") / options.recipe.stem
    began = time.perf_counter()
    pairs = pairs_of(recipe, folder, options.count)
    print(f"new pairs: {len(pairs) / (time.perf_counter() - began):.1f} per second in one process")
    draw_sheet([column(pair) for pair in pairs], options.output)
    if options.seconds > 0 and recipe.diffusion:
        print(compare_rates(recipe, folder, recipe.diffusion, options.seconds))


if __name__ == "__main__":
    sys.exit(main())

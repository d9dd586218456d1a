"""Draws a sheet of training pairs, and tells whether they are made as fast as the loop takes them.

examples:
    python -m training.inspect_data training/recipes/anydoor-small.toml
    python -m training.inspect_data training/recipes/anydoor-small.toml --folder runs/small --seconds 20
    python -m training.inspect_data training/recipes/anydoor.toml pairs.png --seconds 0

One column per pair: the reference, the collage of the hint, its mask (white: fill this, grey: scene, black:
padding), and the picture that shall come out. Then samples per second of the loop on one batch, of the pairs
that it reads, and of pairs that are made anew. Those of data sets are made while it trains. Rendered ones are
made of stored views and encoded once, before it trains; rendering and encoding are not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.config import Recipe, RecipeError, read_recipe
from training.data.encoded import HINTS_DONE, PAIRS_DONE, EncodedPairs, ViewPairs, pair_of_views, rows_done
from training.data.mixture import Mixture
from training.data.pairs import Pair
from training.data.sources import SourceError
from training.data.view_store import StoreError, ViewStore
from training.loop import LoopSettings, NumberedDataset, Numbers
from training.network.modules import AnyDoor
from training.systems.anydoor import DiffusionTask


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
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(columns, axis=1)).save(path, "PNG")


def fresh_pairs(recipe: Recipe, folder: Path) -> Mixture | ViewPairs:
    """The recipe's pairs before anything is encoded: of its data sets, or of the views in `folder`/views."""
    if recipe.sources:
        from training.train import mixture

        return mixture(recipe)
    return ViewPairs(ViewStore(folder / "views"), recipe.pairs, single=recipe.data.single)


def first_pair(pairs: Mixture | ViewPairs, recipe: Recipe, number: int) -> Pair:
    """Pair `number` as it is before it becomes a sample."""
    if isinstance(pairs, Mixture):
        return pairs.draw(np.random.default_rng(number))
    data = recipe.data
    return pair_of_views(pairs.store, number, pairs.seed, recipe.pairs, data.kind, data.single)


def encoded_pairs(recipe: Recipe, folder: Path) -> EncodedPairs:
    """What the diffusion stage reads where pairs are rendered. Nothing is encoded for it here.

    Raises:
        RecipeError: they are not encoded yet.
    """
    pairs, taken_through = folder / "pairs", not recipe.denoising.hint_block
    if not rows_done(pairs, HINTS_DONE if taken_through else PAIRS_DONE):
        raise RecipeError(f"there are no encoded pairs in {pairs}: train first, or give --seconds 0")
    drop, kind = recipe.denoising.drop, recipe.data.kind
    places = recipe.denoising.attention_guide > 0
    return EncodedPairs(pairs, 0, recipe.pairs, drop, kind, hint_features=taken_through, places=places)


def rate(work: Callable[[], object], samples: int, seconds: float, what: str) -> float:
    """Samples per second of repeated work, without its first time; at least two more are measured."""
    with tqdm(desc=f"measuring {what}", unit="sample", leave=False) as bar:
        work()
        began, elapsed = time.perf_counter(), 0.0
        for times in count(1):
            work()
            bar.update(samples)
            elapsed = time.perf_counter() - began
            if elapsed > seconds and times > 1:
                return times * samples / elapsed
    raise AssertionError("counting has no end")


def feed_rate(dataset: NumberedDataset, settings: LoopSettings, seconds: float, what: str) -> float:
    """Samples per second that the loop could be fed with, if it took no time itself."""
    source: Dataset[Any] = dataset  # type: ignore[assignment]
    numbers = Numbers(0, settings.batch, process=0, processes=1)
    batches = iter(DataLoader(source, settings.batch, sampler=numbers, num_workers=settings.workers))
    return rate(lambda: next(batches), settings.batch, seconds, what)


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

    return rate(step, settings.batch, seconds, "the loop")


def compare_rates(
    recipe: Recipe, pairs: Mixture | ViewPairs, folder: Path, settings: LoopSettings, seconds: float
) -> str:
    """How the diffusion stage's data keep up with it, one speed per line.

    Raises:
        RecipeError: rendered pairs are not encoded yet.
    """
    feeds: list[tuple[str, NumberedDataset, int]]
    if isinstance(pairs, Mixture):
        feeds = [("making pairs while training", pairs, settings.workers)]
    else:
        feeds = [
            ("making pairs of stored views, once before", pairs, recipe.data.workers),
            ("reading encoded pairs while training", encoded_pairs(recipe, folder), settings.workers),
        ]
    # fresh weights are as fast as any
    task = DiffusionTask(AnyDoor(recipe.architecture), feeds[-1][1], recipe.denoising)
    taken = consume_rate(task, settings, seconds)
    lines = [f"the loop: {taken:.1f} samples per second with {torch.get_num_threads()} thread(s)"]
    for what, dataset, workers in feeds:
        fed = feed_rate(dataset, replace(settings, workers=workers), seconds, what)
        times = f"{fed / taken:.1f} times the loop"
        lines.append(f"{what}: {fed:.1f} samples per second with {max(workers, 1)} process(es), {times}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 if something cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m training.inspect_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "output",
        type=Path,
        nargs="?",
        default=Path("build/pairs.png"),
        help="the sheet; default: build/pairs.png",
    )
    parser.add_argument("--folder", type=Path, help="where views/ is; default: runs/NAME of the recipe")
    parser.add_argument("--count", type=int, default=12, help="pairs of the sheet; default: 12")
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="to measure each speed for; 0: draw the sheet only; default: 5",
    )
    parser.add_argument("--threads", type=int, help="processor threads of the loop; default: all cores")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}; expected at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        inspect(options)
    except (RecipeError, SourceError, StoreError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    return 0


def inspect(options: argparse.Namespace) -> None:
    """Writes the sheet and prints what is measured."""
    recipe = read_recipe(options.recipe)
    folder = options.folder or Path("runs") / options.recipe.stem
    pairs = fresh_pairs(recipe, folder)
    numbers = tqdm(range(options.count), "drawing pairs", unit="pair", leave=False)
    draw_sheet([column(first_pair(pairs, recipe, number)) for number in numbers], options.output)
    print(f"the sheet: {options.output}")
    if options.seconds > 0 and recipe.diffusion:
        print(compare_rates(recipe, pairs, folder, recipe.diffusion, options.seconds))


if __name__ == "__main__":
    sys.exit(main())

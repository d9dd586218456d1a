"""Draws a sheet of training pairs, and measures whether they are made as fast as the loop takes them.

examples:
    python -m training.inspect_data training/recipes/anydoor-small.toml
    python -m training.inspect_data training/recipes/anydoor-small.toml --folder runs/small --seconds 20
    python -m training.inspect_data training/recipes/anydoor.toml pairs.png --seconds 0

One column per pair: the reference, the collage of the hint, its mask (white: fill this, grey: scene, black:
padding), and the picture that should come out. Then samples per second of the loop on one batch, of the pairs
that it reads, and of pairs that are made anew. Those of data sets are made while it trains. Rendered ones are
made of stored views and encoded once, before it trains; rendering and encoding are not counted. Where the
recipe has no number of pairs, they are drawn while it trains; encoding is not counted.

For IMPRINT the columns show the reference, what is known of the scene, the mask, and the picture; first those
of the stage `views`, then those of `compositing`. For a small Stable Diffusion they are pictures, whose
captions are printed; for DreamBooth those of the subject, above those of its class.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from engines.errors import AnyDoorError
from runtime.errors import InputError
from runtime.progress_bar import ProgressBar
from training.assemble import anew_pairs, encoded_pairs, fresh_samples, mixture, view_pairs
from training.assemble_imprint import composite_samples, view_samples
from training.config import (
    DreamBoothRecipe,
    ImprintRecipe,
    Recipe,
    SegmenterRecipe,
    StableDiffusionRecipe,
    read_recipe,
)
from training.data.composites import Composites
from training.data.encoded import HINTS_DONE, PAIRS_DONE, EncodedPairs, rows_done
from training.data.mixture import Mixture
from training.data.pairs import Pair
from training.data.subject import read_pictures
from training.data.view_pairs import DrawnPairs, ViewPairs, pair_of_views
from training.loop import AnyDataset, NumberedDataset, ShardedSampler, Task, batches_on, load_batches
from training.loop_settings import LoopSettings
from training.network.imprint import Imprint
from training.network.modules import AnyDoor
from training.preview_imprint import composite_column
from training.sheets import column, write_sheet
from training.stages.segmenter import segmentation_samples
from training.stages.stable_diffusion import caption_samples
from training.systems.anydoor import DiffusionTask
from training.systems.imprint import ImprintTask, StageSettings
from training.workers import worker_count

RenderedPairs = ViewPairs | DrawnPairs


def fresh_pairs(recipe: Recipe, folder: Path) -> Mixture | RenderedPairs:
    """Opens the recipe's pairs before they are encoded.

    They are of its data sets, of the views in `folder`/views, or of views that are drawn for them.

    Raises:
        SourceError: a folder is not that of its data set.
        StoreError: no views are drawn yet.
    """
    if recipe.sources:
        return mixture(recipe)
    return view_pairs(recipe, folder) if recipe.data.pairs else anew_pairs(recipe, folder)


def first_pair(pairs: Mixture | RenderedPairs, recipe: Recipe, number: int) -> Pair:
    """Makes pair `number` as it is before it becomes a sample."""
    if isinstance(pairs, Mixture):
        return pairs.draw(np.random.default_rng(number))
    if isinstance(pairs, DrawnPairs):
        return pairs.draw([number])[0]
    data = recipe.data
    return pair_of_views(pairs.store, number, pairs.seed, recipe.pairs, data.kind, data.single)


def pairs_to_read(recipe: Recipe, folder: Path) -> EncodedPairs:
    """Opens what the diffusion stage reads where pairs are rendered. Nothing is encoded for it here.

    Raises:
        InputError: they are not encoded yet.
    """
    pairs = folder / "pairs"
    if not rows_done(pairs, PAIRS_DONE if recipe.denoising.hint_block else HINTS_DONE):
        raise InputError(f"there are no encoded pairs in {pairs}: train first, or give --seconds 0")
    return encoded_pairs(recipe, folder)


def rate(work: Callable[[], object], samples: int, seconds: float, what: str) -> float:
    """Measures samples per second of repeated work, without its first time and at least twice more."""
    with ProgressBar(desc=f"measuring {what}", unit="sample", leave=False) as bar:
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
    """Measures samples per second that the loop could be fed with, if it took no time itself."""
    sampler = ShardedSampler(0, settings.batch, process=0, processes=1)
    batches = load_batches(dataset, settings, sampler)
    return rate(lambda: next(batches), settings.batch, seconds, what)


def consume_rate(task: Task, settings: LoopSettings, seconds: float) -> float:
    """Measures samples per second that the loop could take, if they took no time: steps on a single batch."""
    sampler = ShardedSampler(0, settings.batch, process=0, processes=1)
    cpu = torch.device("cpu")
    batch = next(batches_on(cpu, task.dataset(), replace(settings, workers=0), sampler))
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad])

    def step() -> None:
        task.loss(task.module, batch)["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return rate(step, settings.batch, seconds, "the loop")


def compare_rates(
    recipe: Recipe, pairs: Mixture | RenderedPairs, folder: Path, settings: LoopSettings, seconds: float
) -> str:
    """Measures how the diffusion stage's data keep up with it, one speed per line.

    Raises:
        InputError: rendered pairs are not encoded yet.
    """
    feeds: list[tuple[str, NumberedDataset, int]]
    # fresh weights are as fast as any
    model = AnyDoor(recipe.architecture)
    learned: AnyDataset = pairs
    if isinstance(pairs, Mixture):
        feeds = [("making pairs while training", pairs, settings.workers)]
    elif not recipe.data.pairs:
        made = "made of stored views" if recipe.data.stored_views else "drawn"
        feeds = [(f"pairs {made} while training", pairs, worker_count(recipe.data.workers))]
        learned = fresh_samples(recipe, folder, model.eval(), recipe.denoising, chunk=settings.batch)
    else:
        learned = pairs_to_read(recipe, folder)
        feeds = [
            ("making pairs of stored views, once before", pairs, worker_count(recipe.data.workers)),
            ("reading encoded pairs while training", learned, settings.workers),
        ]
    task = DiffusionTask(model, learned, recipe.denoising)
    taken = consume_rate(task, settings, seconds)
    lines = [f"the loop: {taken:.1f} samples per second with {torch.get_num_threads()} thread(s)"]
    for what, dataset, workers in feeds:
        fed = feed_rate(dataset, replace(settings, workers=workers), seconds, what)
        times = f"{fed / taken:.1f} times the loop"
        lines.append(f"{what}: {fed:.1f} samples per second with {max(workers, 1)} process(es), {times}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if something cannot be read."""
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
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}; expected at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        inspect(options)
    except (AnyDoorError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    return 0


def inspect_imprint(recipe: ImprintRecipe, folder: Path, options: argparse.Namespace) -> None:
    """Does the same for the two stages of IMPRINT, each with half of the columns and lines of its own."""
    stages: list[tuple[str, StageSettings, Composites]] = []
    if recipe.views:
        stages.append(("views", recipe.views, view_samples(recipe, folder)))
    if recipe.compositing:
        stages.append(("compositing", recipe.compositing, composite_samples(recipe, folder)))
    columns = []
    for _, _, samples in stages:
        numbers = ProgressBar(range(-(-options.count // len(stages))), leave=False)
        drawn = (samples.draw(np.random.default_rng(number))[0] for number in numbers)
        columns += [composite_column(composite) for composite in drawn]
    if not columns:
        raise InputError(f"'{options.recipe}' has neither [views] nor [compositing]")
    write_sheet(columns, options.output)
    print(f"the sheet: {options.output}")
    for name, settings, samples in stages if options.seconds > 0 else ():
        task = ImprintTask(Imprint(recipe.architecture), samples, settings)
        taken = consume_rate(task, settings, options.seconds)
        fed = feed_rate(samples, settings, options.seconds, name)
        print(
            f"{name}: the loop, encoding included, takes {taken:.1f} samples per second, {fed:.1f} are made"
        )


def inspect_subject(recipe: DreamBoothRecipe, folder: Path, options: argparse.Namespace) -> None:
    """Draws the pictures of a subject as the loop sees them, above those of its class that are drawn."""
    rows = [read_pictures(Path(recipe.subject.pictures), recipe.subject.resolution)]
    if (folder / "prior").is_dir():
        rows.append(read_pictures(folder / "prior", recipe.subject.resolution, least=1))
    count = min(options.count, *map(len, rows))
    write_sheet([np.concatenate([row[index] for row in rows]) for index in range(count)], options.output)
    print(f"the sheet: {options.output}")


def inspect_captions(recipe: StableDiffusionRecipe, options: argparse.Namespace) -> None:
    """Draws pictures, and prints their captions."""
    samples = caption_samples(recipe)
    drawn = [samples.draw(number) for number in range(options.count)]
    write_sheet([picture for picture, _ in drawn], options.output)
    print("\n".join(caption or "(no caption)" for _, caption in drawn))
    print(f"the sheet: {options.output}")


def inspect_cut_outs(recipe: SegmenterRecipe, folder: Path, options: argparse.Namespace) -> None:
    """Draws pictures, each above its mask."""
    samples = segmentation_samples(recipe, folder)
    shown = []
    for number in range(options.count):
        sample = samples[number]
        picture = np.rint(sample["picture"].transpose(1, 2, 0) * 127.5 + 127.5).astype(np.uint8)
        mask = np.rint(sample["mask"].transpose(1, 2, 0) * 255).astype(np.uint8)
        shown.append(np.concatenate([picture, np.repeat(mask, 3, 2)]))
    write_sheet(shown, options.output)
    print(f"the sheet: {options.output}")


def inspect(options: argparse.Namespace) -> None:
    """Writes the sheet and prints what is measured."""
    recipe = read_recipe(options.recipe)
    folder = options.folder or Path("runs") / options.recipe.stem
    if isinstance(recipe, ImprintRecipe):
        inspect_imprint(recipe, folder, options)
        return
    if isinstance(recipe, DreamBoothRecipe):
        inspect_subject(recipe, folder, options)
        return
    if isinstance(recipe, StableDiffusionRecipe):
        inspect_captions(recipe, options)
        return
    if isinstance(recipe, SegmenterRecipe):
        inspect_cut_outs(recipe, folder, options)
        return
    pairs = fresh_pairs(recipe, folder)
    numbers = ProgressBar(range(options.count), "drawing pairs", unit="pair", leave=False)
    drawn = (first_pair(pairs, recipe, number) for number in numbers)
    write_sheet([column(pair.reference, pair.hint, pair.picture) for pair in drawn], options.output)
    print(f"the sheet: {options.output}")
    if options.seconds > 0 and recipe.diffusion:
        print(compare_rates(recipe, pairs, folder, recipe.diffusion, options.seconds))


if __name__ == "__main__":
    sys.exit(main())

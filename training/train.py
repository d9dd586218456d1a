"""Trains a model after a recipe, stage by stage; every stage continues where it stopped.

First it says what it will do.

Stages of AnyDoor: `views` draws the objects, `autoencoder` and `identity` train what the published model
takes from SD 2.1 and DINOv2, `encode` passes the pairs through both once, `hint_block` trains the
ControlNet's hint block and `diffusion` the rest, `decoder` trains the autoencoder's decoder
further, which changes no latents, `checkpoint` writes all of it in the official layout.

Stages of IMPRINT: `objects` draws the objects; `autoencoder`, `identity`, `decoder` and `checkpoint` are as
AnyDoor's; `views` (stage 1) trains the image encoder on pairs of views, `encode` passes the samples of the
next stage through what does not learn there, and `compositing` (stage 2) trains adapter and UNet.

Stages of a small Stable Diffusion: `encode` draws pictures with captions and encodes them, `diffusion` trains
UNet and text encoder, `checkpoint` writes a folder in diffusers' layout.

Stages of DreamBooth: `prior` draws the pictures of the class with the start, `subject` trains, and
`checkpoint` writes what was learned, as it does whenever weights are saved.

Stages of a small segmenter: `views` draws the objects, `segmentation` trains, `checkpoint` writes the network
as ONNX.

examples:
    python -m training.train training/recipes/anydoor-small.toml
    python -m training.train training/recipes/anydoor-small.toml --stage diffusion
    python -m training.train RECIPE --start model.safetensors --folder runs/more
    python -m training.train RECIPE --set compositing.steps=1000 --set views=false --folder runs/without-views
    python -m training.train training/recipes/dreambooth.toml
    python -m training.train RECIPE --minutes 7 --stage autoencoder --stage identity
    torchrun --nproc-per-node 2 -m training.train training/recipes/imprint.toml
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engines.errors import AnyDoorError
from runtime.errors import InputError
from training import seeds
from training.clock import TimeLimit, program_start
from training.config import (
    AnyRecipe,
    CommonRecipe,
    DreamBoothRecipe,
    ImprintRecipe,
    SegmenterRecipe,
    StableDiffusionRecipe,
    read_recipe,
)
from training.loop import part_processes
from training.loop_settings import LoopSettings
from training.network.checkpoint import read_start
from training.network.checkpoint_file import find_file
from training.rare_tokens import warnings_for
from training.stages import anydoor, dreambooth, imprint, segmenter, stable_diffusion

STAGES: Mapping[str, Mapping[str, Callable[[Any, Path], None]]] = {
    "anydoor": anydoor.STAGES,
    "imprint": imprint.STAGES,
    "dreambooth": dreambooth.STAGES,
    "stable_diffusion": stable_diffusion.STAGES,
    "segmenter": segmenter.STAGES,
}
"""System -> its stages, in their order."""

SMALL_PARTS = ("autoencoder", "identity", "decoder")
"""Stages that train nothing if there is a start, which has what they train."""


def describe(recipe: AnyRecipe, stages: Sequence[str], folder: Path) -> str:
    """Says what a run will do, a line per stage that trains."""
    lines = [f"{recipe.system}, in {folder}: {', '.join(stages)}"]
    lines += [f"{stage}: {_describe_loop(loop)}" for stage, loop in loops_of(recipe, stages).items()]
    if isinstance(recipe, DreamBoothRecipe):
        return "\n".join([*lines, recipe.subject.describe()])
    sources = recipe.sources if isinstance(recipe, CommonRecipe) else ()
    sets = ", ".join(f"{source.name} ({source.root})" for source in sources)
    data = recipe.data
    anew = not data.pairs or isinstance(recipe, SegmenterRecipe)
    encoded = "samples made anew for every step" if anew else f"{data.pairs} pairs encoded once"
    lines.append(f"data: {sets or f'{data.objects} rendered objects, {encoded}'}")
    return "\n".join(lines)


def loops_of(recipe: AnyRecipe, stages: Sequence[str]) -> dict[str, LoopSettings]:
    """Finds the stages among some that train, with their settings."""
    taken = SMALL_PARTS if isinstance(recipe, CommonRecipe) and recipe.has_encoders else ()
    sections = {stage: getattr(recipe, stage, None) for stage in stages if stage not in taken}
    return {stage: loop for stage, loop in sections.items() if isinstance(loop, LoopSettings)}


def with_limit(recipe: AnyRecipe, stages: Sequence[str], limit: TimeLimit) -> AnyRecipe:
    """Gives the first of the stages that are left its share of the time that is left."""
    shares = {stage: loop.minutes for stage, loop in loops_of(recipe, stages).items()}
    if not shares.get(stages[0]):
        return recipe
    seconds = limit.left * shares[stages[0]] / sum(shares.values())
    changed: dict[str, Any] = {stages[0]: replace(getattr(recipe, stages[0]), limit=TimeLimit(seconds))}
    return replace(recipe, **changed)


def _describe_loop(settings: LoopSettings) -> str:
    samples = f"{settings.batch} samples"
    if settings.accumulate > 1:
        samples = f"{settings.accumulate} x {samples}"
    rates = ", ".join(f"{rate:g} for {part}" for part, rate in settings.rates.items())
    exchange = f", exchanged after step {settings.swap_step}" if settings.swap < 1 else ""
    rate = rates or f"{settings.learning_rate:g}"
    return f"{settings.steps} steps of {samples} per process, learning rate {rate}{exchange}"


def _check_subject(recipe: DreamBoothRecipe) -> None:
    """Refuses a start without a tokenizer, and says what speaks against the identifier."""
    _, tokenizer = dreambooth.open_start(recipe)
    for sentence in warnings_for(tokenizer, recipe.subject.identifier):
        print(f"train: warning: {sentence}", file=sys.stderr)


def check_start(recipe: AnyRecipe) -> None:
    """Refuses a start that cannot be used, before hours of drawing.

    Raises:
        CheckpointError: it is missing, damaged or of another architecture.
    """
    if isinstance(recipe, DreamBoothRecipe):
        _check_subject(recipe)
    elif isinstance(recipe, StableDiffusionRecipe):
        stable_diffusion.start_network(recipe)
    elif isinstance(recipe, CommonRecipe):
        if recipe.start:
            read_start(recipe.start, recipe.architecture)
        others = (recipe.encoders, recipe.unet if isinstance(recipe, ImprintRecipe) else "")
        for missing in (path for path in others if path and not Path(path).exists()):
            find_file(Path(missing))


def _started(recipe: AnyRecipe, start: str) -> AnyRecipe:
    """Returns the recipe with another start; refuses one that has none."""
    if isinstance(recipe, SegmenterRecipe):
        raise InputError("--start: a segmenter goes on from what its folder has alone")
    return replace(recipe, start=start)


def chosen_stages(recipe: AnyRecipe, wanted: Sequence[str] | None, limit: TimeLimit | None) -> list[str]:
    """Returns the stages to run: those that are wanted, or all.

    Raises:
        InputError: the system has no such stage, or there is a limit and none of them has a share of it.
    """
    known = STAGES[recipe.system]
    for stage in wanted or ():
        if stage not in known:
            raise InputError(f"{recipe.system} has no stage '{stage}'; it has: {', '.join(known)}")
    chosen = list(wanted or known)
    if limit and not any(loop.minutes for loop in loops_of(recipe, chosen).values()):
        raise InputError("--minutes: none of the stages has a share in the recipe, like minutes = 1.5")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 if what it was given cannot be used, or 130 if it is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; see training/recipes and training/config.py")
    names = list(dict.fromkeys(name for stages in STAGES.values() for name in stages))
    parser.add_argument("--stage", choices=names, action="append", help="only these; default: all in order")
    parser.add_argument("--folder", type=Path, help="default: runs/NAME of the recipe")
    parser.add_argument(
        "--start",
        type=Path,
        help="checkpoint to start from; under torchrun, which has such a flag: --set 'start=\"FILE\"'",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="another value than the recipe's, as TOML; SECTION=false leaves a section out",
    )
    parser.add_argument("--threads", type=int, help="processor threads to use")
    parser.add_argument(
        "--minutes",
        type=float,
        help="time limit, from the start of the program: stages share it by the `minutes` of their sections, "
        "and save in time; those without have no limit",
    )
    options = parser.parse_args(arguments)
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        parser.error(f"--minutes is {options.minutes:g}; expected more than 0")
    limit = TimeLimit(60 * options.minutes, program_start()) if options.minutes else None
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}; expected at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        recipe = read_recipe(options.recipe, options.set)
        if options.start:
            recipe = _started(recipe, str(options.start))
        check_start(recipe)
        chosen = chosen_stages(recipe, options.stage, limit)
        folder = options.folder or Path("runs") / options.recipe.stem
        print(describe(recipe, chosen, folder))
        for index, stage in enumerate(chosen):
            limited = with_limit(recipe, chosen[index:], limit) if limit else recipe
            torch.manual_seed(seeds.FRESH_WEIGHTS)
            STAGES[recipe.system][stage](limited, folder)
    except (AnyDoorError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: interrupted; the same command goes on from what was saved last", file=sys.stderr)
        return 130
    part_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())

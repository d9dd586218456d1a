"""Trains a model after a recipe, stage by stage; every stage goes on where it was stopped.

Stages: `views` draws the objects, `autoencoder` and `identity` train what the published model takes from SD
2.1 and DINOv2, `encode` passes the pairs through both once, `hint_block` trains the ControlNet's hint block
and `diffusion` the rest, `decoder` improves the half of the autoencoder that no latent depends on,
`checkpoint` writes all of it in the official layout.

examples:
    python -m training.train training/recipes/anydoor-small.toml
    python -m training.train training/recipes/anydoor-small.toml --stage diffusion --folder runs/next
    python -m training.train RECIPE --start model.safetensors --folder runs/more
    torchrun --nproc-per-node 2 -m training.train training/recipes/anydoor.toml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engines.errors import AnyDoorError
from training import seeds
from training.assemble import (
    encoded_pairs,
    frozen_parts,
    mixture,
    stage_weights,
    trained_model,
    view_pairs,
)
from training.config import Recipe, read_recipe
from training.data.encoded import HINTS_DONE, PAIRS_DONE, EncodedPairs, settled_rows
from training.data.view_store import ViewStore, draw_views
from training.loop import on_main_process, part_processes, train
from training.network.checkpoint import read_start, write_model
from training.network.modules import AnyDoor
from training.preview import Preview
from training.small.encoding import check_encoders, encode_hints, encode_pairs
from training.small.hint_block import HintBlockTask
from training.systems.anydoor import DiffusionTask
from training.systems.autoencoder import AutoencoderTask, decoder_task
from training.systems.identity import IdentityTask

ROWS = "rows.txt"
"""Beside a stage's weights: how many of the encoded pairs it learns from."""


@on_main_process
def train_views(recipe: Recipe, folder: Path) -> None:
    """Draws the objects of the recipe."""
    if not recipe.sources:
        draw_views(folder / "views", recipe.data.objects)


def train_autoencoder(recipe: Recipe, folder: Path) -> None:
    """Trains stage 1."""
    if recipe.autoencoder and not recipe.start:
        task = AutoencoderTask(recipe.architecture, ViewStore(folder / "views"))
        train(task, recipe.autoencoder, folder / "autoencoder")


def train_decoder(recipe: Recipe, folder: Path) -> None:
    """Continues stage 1 with the decoder alone, at any time after `encode`, because no latent changes."""
    if recipe.decoder and not recipe.start:
        weights = stage_weights(folder / "autoencoder")
        task = decoder_task(recipe.architecture, ViewStore(folder / "views"), weights)
        train(task, recipe.decoder, folder / "decoder")


def train_identity(recipe: Recipe, folder: Path) -> None:
    """Trains stage 2."""
    if recipe.identity and not recipe.start:
        task = IdentityTask(recipe.architecture, ViewStore(folder / "views"), recipe.pairs)
        train(task, recipe.identity, folder / "identity")


@on_main_process
def encode(recipe: Recipe, folder: Path) -> None:
    """Makes the pairs of stage 3, once."""
    if not recipe.sources:
        model, pairs = frozen_parts(recipe, folder), view_pairs(recipe, folder)
        encode_pairs(model, pairs, folder / "pairs", recipe.data.pairs, workers=recipe.data.workers)


def train_hint_block(recipe: Recipe, folder: Path) -> None:
    """Trains the hint block alone, for a recipe whose `diffusion` does not train it."""
    if recipe.hint_block:
        model, stage = frozen_parts(recipe, folder), folder / "hint_block"
        settle_pairs(recipe, folder, model, stage)
        pairs = EncodedPairs(folder / "pairs", seeds.TRAINING_PAIRS, recipe.pairs, rows=_rows(stage))
        train(HintBlockTask(model.control, pairs), recipe.hint_block, stage)


def train_diffusion(recipe: Recipe, folder: Path) -> None:
    """Trains stage 3."""
    if recipe.diffusion:
        model, stage = frozen_parts(recipe, folder), folder / "diffusion"
        if (folder / "hint_block" / "mean.pt").exists():
            HintBlockTask.load(model.control, stage_weights(folder / "hint_block"))
        if not recipe.sources:
            settle_pairs(recipe, folder, model, stage, hints=not recipe.denoising.hint_block)
        pairs = mixture(recipe) if recipe.sources else encoded_pairs(recipe, folder, _rows(stage))
        task = DiffusionTask(model, pairs, recipe.denoising)
        train(task, recipe.diffusion, stage, Preview(recipe, model))


@on_main_process
def settle_pairs(recipe: Recipe, folder: Path, model: AnyDoor, stage: Path, hints: bool = False) -> None:
    """Makes sure that a stage finds the pairs that it began with, encoded by the weights of `model`.

    Args:
        recipe: how many pairs there should be.
        folder: of the run.
        model: its autoencoder and ID encoder have encoded the pairs.
        stage: folder of the stage that learns from them; keeps how many they are.
        hints: whether to take their hints through the model's hint block.

    Raises:
        EncodedError: other weights have encoded them, or there are too few.
    """
    pairs = folder / "pairs"
    check_encoders(model, pairs)
    if hints:
        encode_hints(model, pairs)
    rows = settled_rows(stage / ROWS, pairs, HINTS_DONE if hints else PAIRS_DONE)
    if rows < recipe.data.pairs:
        print(
            f"{stage.name} learns from {rows} of {recipe.data.pairs} pairs, those that were encoded when it "
            f"began; to take those that are encoded now, delete {stage / ROWS}",
            file=sys.stderr,
        )


def _rows(stage: Path) -> int:
    return int((stage / ROWS).read_text())


@on_main_process
def write_checkpoint(recipe: Recipe, folder: Path) -> None:
    """Puts the parts together: `folder`/model.safetensors."""
    dtype: torch.dtype = getattr(torch, recipe.checkpoint_dtype)
    write_model(folder / "model.safetensors", trained_model(recipe, folder), dtype, recipe.defaults)


STAGES: dict[str, Callable[[Recipe, Path], None]] = {
    "views": train_views,
    "autoencoder": train_autoencoder,
    "identity": train_identity,
    "encode": encode,
    "hint_block": train_hint_block,
    "diffusion": train_diffusion,
    "decoder": train_decoder,
    "checkpoint": write_checkpoint,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if something that it was given cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; see training/recipes and training/config.py")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only these; default: all in order")
    parser.add_argument("--folder", type=Path, help="default: runs/NAME of the recipe")
    parser.add_argument("--start", type=Path, help="an official checkpoint to go on from")
    parser.add_argument("--threads", type=int, help="processor threads to use")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        recipe = read_recipe(options.recipe)
        if options.start:
            recipe = replace(recipe, start=str(options.start))
        if recipe.start:  # refused now, not after hours of drawing
            read_start(recipe.start, recipe.architecture)
        for stage in options.stage or STAGES:
            STAGES[stage](recipe, options.folder or Path("runs") / options.recipe.stem)
    except (AnyDoorError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    part_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Defines AnyDoor's stages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from training import seeds
from training.assemble import (
    anew_pairs,
    encoded_pairs,
    fresh_samples,
    frozen_parts,
    mixture,
    stage_weights,
    trained_model,
    view_pairs,
)
from training.config import Recipe
from training.data.arrays import read_count
from training.data.encoded import HINTS_DONE, PAIRS_DONE, EncodedPairs, settled_rows
from training.loop import AnyDataset, on_main_process, train
from training.network.checkpoint import write_model
from training.network.modules import AnyDoor
from training.preview import Preview
from training.small.attention_guide import cross_attention
from training.small.encoding import check_encoders, encode_hints, encode_pairs
from training.small.hint_block import HintBlockTask
from training.small.place_keys import start_with_places
from training.stages.common import draw_objects, train_autoencoder, train_decoder, train_identity
from training.systems.anydoor import Denoising, DiffusionTask, guided_parts
from training.workers import worker_count

PLACE_REFERENCES = 256
"""References that `start_with_places` learns from."""

ROWS = "rows.txt"
"""Beside a stage's weights: how many of the encoded pairs it learns from."""


@on_main_process
def encode(recipe: Recipe, folder: Path) -> None:
    """Makes the pairs of stage 3, once, for a recipe that says how many."""
    if not recipe.sources and recipe.data.pairs:
        model, pairs = frozen_parts(recipe, folder), view_pairs(recipe, folder)
        workers = worker_count(recipe.data.workers)
        encode_pairs(model, pairs, folder / "pairs", recipe.data.pairs, workers=workers)


def train_hint_block(recipe: Recipe, folder: Path) -> None:
    """Trains the hint block alone, for a recipe whose `diffusion` does not train it."""
    if recipe.hint_block:
        model, stage = frozen_parts(recipe, folder), folder / "hint_block"
        train(
            HintBlockTask(model.control, _whole_hints(recipe, folder, model, stage)), recipe.hint_block, stage
        )


def _whole_hints(recipe: Recipe, folder: Path, model: AnyDoor, stage: Path) -> AnyDataset:
    if not recipe.data.pairs:
        return fresh_samples(recipe, folder, model, Denoising())
    settle_pairs(recipe, folder, model, stage)
    return EncodedPairs(folder / "pairs", seeds.TRAINING_PAIRS, recipe.pairs, rows=_rows(stage))


def train_diffusion(recipe: Recipe, folder: Path) -> None:
    """Trains stage 3."""
    if recipe.diffusion:
        model, stage = frozen_parts(recipe, folder), folder / "diffusion"
        if (folder / "hint_block" / "mean.pt").exists():
            with stage_weights(folder / "hint_block") as weights:
                HintBlockTask.load(model.control, weights)
        if recipe.denoising.place_keys and not recipe.start:
            _start_attention(recipe, folder, model)
        task = DiffusionTask(model, _pairs(recipe, folder, model, stage), recipe.denoising)
        train(task, recipe.diffusion, stage, Preview(recipe, model))


@torch.no_grad()
def _start_attention(recipe: Recipe, folder: Path, model: AnyDoor) -> None:
    """Lets guided heads start with keys that tell the places of the tokens."""
    pairs = view_pairs(recipe, folder) if recipe.data.pairs else anew_pairs(recipe, folder)
    shown = (torch.from_numpy(pairs[number]["reference"]) for number in range(PLACE_REFERENCES))
    tokens = [model.encode_reference(reference[None] / 255)[:, 1:] for reference in shown]
    layers = cross_attention(guided_parts(model)).values()
    start_with_places(layers, torch.cat(tokens), recipe.denoising.guided_heads)


def _pairs(recipe: Recipe, folder: Path, model: AnyDoor, stage: Path) -> AnyDataset:
    if recipe.sources:
        return mixture(recipe)
    if not recipe.data.pairs:
        return fresh_samples(recipe, folder, model, recipe.denoising)
    settle_pairs(recipe, folder, model, stage, hints=not recipe.denoising.hint_block)
    return encoded_pairs(recipe, folder, _rows(stage))


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
    return read_count(stage / ROWS)


@on_main_process
def write_checkpoint(recipe: Recipe, folder: Path) -> None:
    """Puts the parts together: `folder`/model.safetensors."""
    dtype: torch.dtype = getattr(torch, recipe.checkpoint_dtype)
    model, resolution = trained_model(recipe, folder), recipe.pairs.resolution
    write_model(folder / "model.safetensors", model, dtype, recipe.defaults, resolution)


STAGES: Mapping[str, Callable[[Recipe, Path], None]] = {
    "views": draw_objects,
    "autoencoder": train_autoencoder,
    "identity": train_identity,
    "encode": encode,
    "hint_block": train_hint_block,
    "diffusion": train_diffusion,
    "decoder": train_decoder,
    "checkpoint": write_checkpoint,
}
"""In their order."""

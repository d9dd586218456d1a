"""Defines IMPRINT's stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from training import seeds
from training.assemble_imprint import (
    composite_samples,
    encoder_model,
    start_model,
    trained_imprint,
    view_samples,
)
from training.config import ImprintRecipe
from training.data.arrays import read_count
from training.data.encoded import settled_rows
from training.loop import NumberedDataset, on_main_process, train
from training.network.checkpoint import write_model
from training.network.imprint import Imprint
from training.preview_imprint import ImprintPreview
from training.small.encoding import check_encoders
from training.small.stored import StoredSamples, store_samples
from training.stages.common import draw_objects, train_autoencoder, train_decoder, train_identity
from training.systems.imprint import ImprintTask
from training.workers import worker_count

ROWS = "rows.txt"
"""Beside a stage's weights: how many of the encoded samples it learns from."""


def train_views(recipe: ImprintRecipe, folder: Path) -> None:
    """Trains stage 1."""
    if recipe.views:
        task = ImprintTask(start_model(recipe, folder), view_samples(recipe, folder), recipe.views)
        train(task, recipe.views, folder / "views")


@on_main_process
def encode(recipe: ImprintRecipe, folder: Path) -> None:
    """Encodes samples of stage 2, once, for a recipe that says how many."""
    if recipe.compositing and recipe.is_stored:
        model, stored = encoder_model(recipe, folder), folder / "samples"
        samples = composite_samples(recipe, folder, seeds.ENCODED_PAIRS)
        check_encoders(model, stored)
        task = ImprintTask(model, samples, recipe.compositing)
        workers = worker_count(recipe.data.workers)
        store_samples(samples, task.encoded, stored, recipe.data.pairs, workers=workers)


def train_compositing(recipe: ImprintRecipe, folder: Path) -> None:
    """Trains stage 2."""
    if recipe.compositing:
        model, stage = encoder_model(recipe, folder), folder / "compositing"
        samples: NumberedDataset = composite_samples(recipe, folder)
        if recipe.is_stored:
            settle(model, folder / "samples", stage)
            rows = read_count(stage / ROWS)
            samples = StoredSamples(folder / "samples", seeds.TRAINING_PAIRS, rows)
        preview = ImprintPreview(recipe, model)
        train(ImprintTask(model, samples, recipe.compositing), recipe.compositing, stage, preview)


@on_main_process
def settle(model: Imprint, samples: Path, stage: Path) -> None:
    """Makes sure that stage 2 finds the samples that it began with, encoded by the weights of `model`.

    Raises:
        EncodedError: other weights have encoded them, or there are too few.
    """
    check_encoders(model, samples)
    settled_rows(stage / ROWS, samples)


@on_main_process
def write_checkpoint(recipe: ImprintRecipe, folder: Path) -> None:
    """Puts the parts together: `folder`/model.safetensors."""
    dtype: torch.dtype = getattr(torch, recipe.checkpoint_dtype)
    model, resolution = trained_imprint(recipe, folder), recipe.pairs.resolution
    write_model(folder / "model.safetensors", model, dtype, recipe.defaults, resolution)


STAGES: Mapping[str, Callable[[ImprintRecipe, Path], None]] = {
    "objects": draw_objects,
    "autoencoder": train_autoencoder,
    "identity": train_identity,
    "views": train_views,
    "encode": encode,
    "compositing": train_compositing,
    "decoder": train_decoder,
    "checkpoint": write_checkpoint,
}
"""In their order."""

"""Defines stages that small models of every system have, in place of SD 2.1's and DINOv2's weights."""

from __future__ import annotations

from pathlib import Path

from training.assemble import stage_weights
from training.config import CommonRecipe
from training.data.view_store import ViewStore, draw_views
from training.loop import on_main_process, train
from training.systems.autoencoder import AutoencoderTask, decoder_task
from training.systems.identity import IdentityTask
from training.workers import drawer_count, drawing_device


@on_main_process
def draw_objects(recipe: CommonRecipe, folder: Path) -> None:
    """Draws the objects of the recipe."""
    if not recipe.sources:
        workers = max(drawer_count(recipe.data.workers), 1)
        draw_views(recipe.objects_in(folder), recipe.data.objects, workers, drawing_device())


def train_autoencoder(recipe: CommonRecipe, folder: Path) -> None:
    """Trains stage 1."""
    if recipe.autoencoder and not recipe.has_encoders:
        store = ViewStore(recipe.objects_in(folder))
        task = AutoencoderTask(recipe.architecture, store, recipe.autoencoder.side)
        train(task, recipe.autoencoder, folder / "autoencoder")


def train_decoder(recipe: CommonRecipe, folder: Path) -> None:
    """Continues stage 1 with the decoder alone, at any time after `encode`, because no latent changes."""
    if recipe.decoder and not recipe.has_encoders:
        store = ViewStore(recipe.objects_in(folder))
        with stage_weights(folder / "autoencoder") as weights:
            task = decoder_task(recipe.architecture, store, recipe.decoder.side, weights)
        train(task, recipe.decoder, folder / "decoder")


def train_identity(recipe: CommonRecipe, folder: Path) -> None:
    """Trains stage 2."""
    if recipe.identity and not recipe.has_encoders:
        task = IdentityTask(recipe.architecture, ViewStore(recipe.objects_in(folder)), recipe.pairs)
        train(task, recipe.identity, folder / "identity")

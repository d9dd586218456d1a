"""Puts together what a recipe of IMPRINT describes: the network at each stage, and its samples."""

from __future__ import annotations

from pathlib import Path

import torch

from runtime.imaging.reference import BACKGROUNDS
from training import seeds
from training.assemble import load_small_parts, load_unet, same_sizes, stage_weights
from training.config import ImprintRecipe
from training.data.composites import CompositeMaker, Composites, ViewMaker, token_grid
from training.data.rendered import RenderedScenes, RenderedViews
from training.data.sources import SOURCES, Source
from training.data.view_samples import ViewSamples
from training.network.checkpoint import read_start
from training.network.imprint import Imprint
from training.systems.imprint import ENCODER, CompositingSettings, ViewsSettings, load_parts


def start_model(recipe: ImprintRecipe, folder: Path) -> Imprint:
    """Builds the network that stage 1 starts from.

    Raises:
        CheckpointError: the recipe's start cannot be used.
        FileNotFoundError: a stage of a small model has not been run.
    """
    torch.manual_seed(0)
    model = Imprint(recipe.architecture)
    if recipe.start:
        model.load_official_state_dict(read_start(recipe.start, recipe.architecture).tensors)
    else:
        load_small_parts(model, recipe, folder)
    if recipe.unet:
        _load_unet(model, recipe.unet)
    return model.eval()


def _load_unet(model: Imprint, path: str) -> None:
    source, adapter = load_unet(model, path), model.id_encoder.projector
    with same_sizes("the UNet", path, "another unet"):
        adapter.load_state_dict(adapter.state_dict() | source.id_encoder.projector.state_dict())
    if not source.id_encoder.projector.layers:
        adapter.skip_blocks()


def encoder_model(recipe: ImprintRecipe, folder: Path) -> Imprint:
    """Builds the network that stage 2 starts from: with the encoder of stage 1, where the recipe has one."""
    model = start_model(recipe, folder)
    if recipe.views:
        keep = recipe.compositing is not None and recipe.compositing.keep_unet
        with stage_weights(folder / "views") as weights:
            load_parts(model, weights, (*ENCODER, "unet") if keep else ENCODER)
    return model


def trained_imprint(recipe: ImprintRecipe, folder: Path) -> Imprint:
    """Builds the network after stage 2."""
    model = encoder_model(recipe, folder)
    with stage_weights(folder / "compositing") as weights:
        load_parts(model, weights, (*ENCODER, "unet"))
    return model


def sources(recipe: ImprintRecipe, folder: Path, stage: str) -> list[tuple[Source, float]]:
    """Opens the data sets of a stage: those that the recipe lists for it, else the rendered objects.

    Raises:
        SourceError: a folder is not that of its data set.
        StoreError: nothing is drawn yet.
    """
    listed = [each for each in recipe.sources if each.stage == stage]
    opened: list[tuple[Source, float]]
    opened = [(SOURCES[each.name](Path(each.root)), each.weight) for each in listed]
    if not recipe.sources:
        drawn = recipe.objects_in(folder)
        alone = RenderedViews(drawn) if stage == "views" else RenderedScenes(drawn, recipe.data.single)
        opened = [(alone, 1.0)]
    for source, _ in opened:
        source.window = recipe.views.window if stage == "views" and recipe.views else None
    return opened


def view_samples(recipe: ImprintRecipe, folder: Path) -> Composites:
    """Opens the samples of stage 1."""
    stage = recipe.views or ViewsSettings(steps=1)
    a = recipe.architecture
    grid = token_grid(a.token_count) if stage.attention_guide else 0
    maker = ViewMaker(recipe.pairs, BACKGROUNDS[a.reference_background])
    seed = seeds.VIEW_SAMPLES
    kind = Composites if recipe.sources else ViewSamples
    return kind(sources(recipe, folder, "views"), maker, recipe.latent_shape, seed, token_grid=grid)


def composite_samples(recipe: ImprintRecipe, folder: Path, seed: int = seeds.TRAINING_PAIRS) -> Composites:
    """Opens the samples of stage 2 before they are encoded."""
    stage = recipe.compositing or CompositingSettings(steps=1)
    grid = token_grid(recipe.architecture.token_count) if stage.attention_guide else 0
    background = BACKGROUNDS[recipe.architecture.reference_background]
    maker = CompositeMaker(recipe.pairs, recipe.augmentation, background)
    opened = sources(recipe, folder, "compositing")
    return Composites(opened, maker, recipe.latent_shape, seed, stage.drop, stage.empty, grid)

"""Defines the stages of a small Stable Diffusion model, which takes its autoencoder from another small
model, or goes on from a whole one, like an inpainting model from one that only reads words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from training import seeds
from training.assemble import fit_scene, load_unet, same_sizes, stage_weights
from training.config import StableDiffusionRecipe
from training.data.arrays import read_count
from training.data.captions import CaptionedViews, words_of_captions
from training.data.encoded import settled_rows
from training.loop import on_main_process, train
from training.network.checkpoint_file import CheckpointError
from training.network.checkpoint_keys import read_network
from training.network.official_keys import expected_shapes, from_official
from training.network.stable_diffusion import BUILDERS, StableDiffusion, StableDiffusionArchitecture
from training.network.stable_diffusion_checkpoint import (
    StableDiffusionCheckpoint,
    read_stable_diffusion,
    write_folder,
)
from training.network.tokenizer_files import TokenizerFiles
from training.small.encoding import check_encoders
from training.small.stored import StoredSamples, store_samples
from training.small.vocabulary import learn_vocabulary
from training.systems.stable_diffusion import Learner, PromptPreview, PromptTask
from training.workers import worker_count

PREVIEWS = 8
"""Pictures of each prompt in a sheet."""

ROWS = "rows.txt"
"""Beside a stage's weights: how many of the encoded samples it learns from."""


def read_autoencoder(path: str, architecture: StableDiffusionArchitecture) -> dict[str, Tensor]:
    """Reads the autoencoder of a checkpoint in the original layout, as the state of its module.

    Raises:
        CheckpointError: it cannot be read, or its autoencoder is another one.
    """
    with torch.device("meta"):
        names = {name: weight.shape for name, weight in BUILDERS["vae"](architecture).state_dict().items()}
    file = read_network(Path(path)).file
    expected = expected_shapes("vae", names, architecture)
    if any(file.shapes.get(key) != tuple(shape) for key, shape in expected.items()):
        raise CheckpointError(f"'{path}' has another autoencoder than the recipe: change [architecture]")
    return {
        name: weight.float()
        for name, weight in from_official("vae", names, file.tensors, architecture).items()
    }


def open_tokenizer(recipe: StableDiffusionRecipe) -> TokenizerFiles:
    """Opens the tokenizer of a whole start, or makes one of the captions' words.

    Raises:
        CheckpointError: the start cannot be used, or has no tokenizer.
    """
    if not recipe.has_whole_start:
        return learn_vocabulary(words_of_captions())
    files = read_stable_diffusion(recipe.start).tokenizer
    if files is None:
        raise CheckpointError(f"'{recipe.start}' has no tokenizer: start from a folder that has one")
    return files


def load_whole_start(network: StableDiffusion, path: str) -> None:
    """Puts a Stable Diffusion model into a network; channels that see a scene are added where it has none.

    Raises:
        CheckpointError: it cannot be used, or has other sizes.
    """
    checkpoint = read_stable_diffusion(path)
    with same_sizes("a part", path, "another start"):
        for part in BUILDERS:
            weights = {name: weight.float() for name, weight in checkpoint.parts[part].items()}
            if part == "unet":
                fit_scene(weights, network, checkpoint.architecture.latent_channels)
            getattr(network, part).load_state_dict(weights)


def start_network(recipe: StableDiffusionRecipe) -> tuple[StableDiffusion, TokenizerFiles]:
    """Builds a network as training finds it, and its tokenizer.

    It is the whole start; or it has the start's autoencoder, a fresh text encoder, and a fresh UNet or that
    of the recipe's `unet`.

    Raises:
        CheckpointError: the recipe's start or UNet cannot be used.
    """
    files = open_tokenizer(recipe)
    architecture = replace(recipe.architecture, text_vocabulary=len(files.vocabulary))
    torch.manual_seed(0)
    network = StableDiffusion(architecture, {part: build(architecture) for part, build in BUILDERS.items()})
    if recipe.has_whole_start:
        load_whole_start(network, recipe.start)
    else:
        network.vae.load_state_dict(read_autoencoder(recipe.start, architecture))
    if recipe.unet:
        load_unet(network, recipe.unet)
    return network.eval(), files


def caption_samples(recipe: StableDiffusionRecipe) -> CaptionedViews:
    """Opens the pictures with captions that a recipe learns from."""
    encode, inpaints = open_tokenizer(recipe).open().encode, recipe.architecture.scene_channels > 0
    return CaptionedViews(recipe.data.objects, recipe.resolution, encode, seeds.CAPTIONED_VIEWS, inpaints)


@on_main_process
def encode(recipe: StableDiffusionRecipe, folder: Path) -> None:
    """Draws and encodes the pictures, once."""
    network, _ = start_network(recipe)
    samples, stored = caption_samples(recipe), folder / "samples"
    check_encoders(network, stored)
    task = PromptTask(network, samples)
    workers = worker_count(recipe.data.workers)
    store_samples(samples, task.encoded, stored, recipe.data.pairs, workers=workers)


def train_diffusion(recipe: StableDiffusionRecipe, folder: Path) -> None:
    """Trains UNet and text encoder."""
    network, files = start_network(recipe)
    stage = folder / "diffusion"
    settle(network, folder / "samples", stage)
    rows = read_count(stage / ROWS)
    samples = StoredSamples(folder / "samples", seeds.TRAINING_PAIRS, rows)
    how = (recipe.previews, PREVIEWS, recipe.resolution, recipe.guidance_scale)
    preview = PromptPreview(network, files.open(), *how) if recipe.previews else None
    train(PromptTask(network, samples), recipe.diffusion, stage, preview)


@on_main_process
def settle(network: StableDiffusion, samples: Path, stage: Path) -> None:
    """Makes sure that training finds the samples that it began with, encoded by the same autoencoder.

    Raises:
        EncodedError: another one has encoded them, or there are too few.
    """
    check_encoders(network, samples)
    settled_rows(stage / ROWS, samples)


@on_main_process
def write_checkpoint(recipe: StableDiffusionRecipe, folder: Path) -> None:
    """Writes `folder`/model, in the layout of diffusers."""
    network, files = start_network(recipe)
    with stage_weights(folder / "diffusion") as weights:
        Learner(network).load_state_dict(weights)
    dtype: torch.dtype = getattr(torch, recipe.checkpoint_dtype)
    parts = {
        part: {name: weight.to(dtype) for name, weight in getattr(network, part).state_dict().items()}
        for part in BUILDERS
    }
    architecture = replace(recipe.architecture, text_vocabulary=len(files.vocabulary))
    size = (recipe.resolution, recipe.resolution)
    write_folder(folder / "model", StableDiffusionCheckpoint(folder, architecture, parts, files, size=size))


STAGES: Mapping[str, Callable[[StableDiffusionRecipe, Path], None]] = {
    "encode": encode,
    "diffusion": train_diffusion,
    "checkpoint": write_checkpoint,
}
"""In their order."""

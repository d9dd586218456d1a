"""Defines DreamBooth's stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import InputError
from runtime.systems.tokenizer import Tokenizer
from training.assemble import stage_weights
from training.config import DreamBoothRecipe
from training.data.subject import read_pictures
from training.loop import join_processes, on_main_process, train
from training.network.checkpoint_file import CheckpointError
from training.network.low_rank import write_low_rank
from training.network.stable_diffusion import StableDiffusion
from training.network.stable_diffusion_checkpoint import (
    StableDiffusionCheckpoint,
    read_stable_diffusion,
    write_folder,
    write_single_file,
)
from training.systems.dreambooth import (
    SubjectTask,
    choose_learning,
    draw_class,
    make_preview,
    make_samples,
)
from training.systems.stable_diffusion import Learner

LOW_RANK = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""


def checkpoint_name(recipe: DreamBoothRecipe) -> str:
    """Returns the name of the file or folder that a recipe's checkpoint is."""
    if recipe.subject.rank:
        return LOW_RANK
    return "model" if recipe.layout == "diffusers" else "model.safetensors"


def open_start(recipe: DreamBoothRecipe) -> tuple[StableDiffusionCheckpoint, Tokenizer]:
    """Opens the start of a recipe.

    Raises:
        CheckpointError: it cannot be read, or has no tokenizer.
        InputError: the recipe's pictures are of a size that it cannot draw.
    """
    checkpoint = read_stable_diffusion(recipe.start)
    side, step = recipe.subject.resolution, checkpoint.architecture.side_step
    if side % step:
        raise InputError(
            f"[subject]: resolution is {side}; expected a multiple of {step} for '{recipe.start}'"
        )
    files = checkpoint.tokenizer
    if files is None:
        raise CheckpointError(
            f"'{recipe.start}' has no tokenizer: start from a folder in diffusers' layout, which has one"
        )
    return checkpoint, files.open()


def build_network(checkpoint: StableDiffusionCheckpoint) -> StableDiffusion:
    """Builds the whole network, in float32, to train."""
    parts = {part: checkpoint.load_part(part, torch.float32) for part in ("unet", "vae", "text_encoder")}
    return StableDiffusion(checkpoint.architecture, parts)


@on_main_process
def draw_prior(recipe: DreamBoothRecipe, folder: Path) -> None:
    """Draws the pictures of the class with the start."""
    # refused now, not after an hour of drawing
    read_pictures(Path(recipe.subject.pictures), recipe.subject.resolution)
    if recipe.subject.has_prior:
        checkpoint, tokenizer = open_start(recipe)
        network = build_network(checkpoint).to(join_processes().device)
        draw_class(network, tokenizer, recipe.subject, folder / "prior")


def train_subject(recipe: DreamBoothRecipe, folder: Path) -> None:
    """Trains the subject; writes what is learned at every step that is saved."""
    checkpoint, tokenizer = open_start(recipe)
    network = build_network(checkpoint)
    samples = make_samples(network, tokenizer, recipe.subject, folder / "prior")
    task = SubjectTask(network, samples, recipe.subject)
    preview = make_preview(network, tokenizer, recipe.subject) if recipe.subject.previews else None

    def keep(step: int, weights: Mapping[str, Tensor]) -> None:
        write_subject(folder / f"step-{step:05d}", recipe, weights)

    train(task, recipe.subject, folder / "subject", preview, keep)


@on_main_process
def write_checkpoint(recipe: DreamBoothRecipe, folder: Path) -> None:
    """Writes the last weights."""
    with stage_weights(folder / "subject") as weights:
        write_subject(folder, recipe, weights)


def write_subject(folder: Path, recipe: DreamBoothRecipe, weights: Mapping[str, Tensor]) -> None:
    """Writes a subject into a folder, under the name that `checkpoint_name` gives.

    Args:
        folder: is made if it is not there.
        recipe: its start, and whether low-rank updates were learned.
        weights: of `Learner`.
    """
    checkpoint, _ = open_start(recipe)
    dtype: torch.dtype = getattr(torch, recipe.checkpoint_dtype)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.subject.rank:
        network = build_network(checkpoint)
        choose_learning(network, recipe.subject)
        learner = Learner(network)
        learner.load_state_dict(weights)
        write_low_rank(
            folder / checkpoint_name(recipe), {"unet": learner.unet, "text_encoder": learner.text_encoder}
        )
        return
    parts = {part: {name: w.to(dtype) for name, w in of.items()} for part, of in checkpoint.parts.items()}
    for part in ("unet", "text_encoder"):
        prefix = f"{part}."
        parts[part] = {
            name.removeprefix(prefix): weight.to(dtype)
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
    size = (recipe.subject.resolution, recipe.subject.resolution)
    write = write_folder if recipe.layout == "diffusers" else write_single_file
    write(folder / checkpoint_name(recipe), replace(checkpoint, parts=parts, size=size))


STAGES: Mapping[str, Callable[[DreamBoothRecipe, Path], None]] = {
    "prior": draw_prior,
    "subject": train_subject,
    "checkpoint": write_checkpoint,
}
"""In their order."""

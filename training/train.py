"""Trains a model after a recipe, stage by stage; every stage goes on where it was stopped.

Stages: `views` draws the objects, `autoencoder` and `identity` train what the published model takes from SD
2.1 and DINOv2, `encode` passes the pairs through both once, `hint` trains the ControlNet's hint block and
`diffusion` the rest, `decoder` improves the half of the autoencoder that no latent depends on, `checkpoint`
writes all of it in the official layout.

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

import numpy as np
import torch

from training.checkpoint import CheckpointError, check_start, read_start, write_model
from training.config import Recipe, RecipeError, read_recipe
from training.data.encoded import (
    HINTS_DONE,
    PAIRS_DONE,
    EncodedError,
    EncodedPairs,
    ViewPairs,
    check_encoders,
    encode_hints,
    encode_pairs,
    settled_rows,
)
from training.data.mixture import Mixture
from training.data.sources import SOURCES, SourceError
from training.data.view_store import StoreError, ViewStore, draw_views
from training.loop import on_main_process, part_processes, train
from training.network.architecture import ArchitectureError
from training.network.modules import AnyDoor
from training.preview import Preview
from training.sharding import LaunchError
from training.small.hint import HintTask
from training.small.recipe import open_control
from training.systems.anydoor import DiffusionTask
from training.systems.autoencoder import AutoencoderTask, normalise_latents
from training.systems.identity import IdentityTask

PAIRS_SEED, CALIBRATION, DECODER_SIDE = 3, 64, 64

ROWS = "rows.txt"
"""Beside a stage's weights: how many of the encoded pairs it learns from."""

REFUSALS = (
    *(RecipeError, LaunchError, SourceError, StoreError, EncodedError, CheckpointError, ArchitectureError),
    OSError,
)
"""What is told in one sentence, because it is not the program's fault."""


@on_main_process
def train_views(recipe: Recipe, folder: Path) -> None:
    """Draws the objects of the recipe."""
    if not recipe.sources:
        draw_views(folder / "views", recipe.data.objects)


def train_autoencoder(recipe: Recipe, folder: Path) -> None:
    """Stage 1."""
    if recipe.autoencoder and not recipe.start:
        task = AutoencoderTask(recipe.architecture, ViewStore(folder / "views"))
        train(task, recipe.autoencoder, folder / "autoencoder")


def train_decoder(recipe: Recipe, folder: Path) -> None:
    """Stage 1, continued: the decoder alone, at any time after `encode`, because no latent changes."""
    if recipe.decoder and not recipe.start:
        task = AutoencoderTask(recipe.architecture, ViewStore(folder / "views"), side=DECODER_SIDE, seed=4)
        task.module.load_state_dict(_weights(folder / "autoencoder"))
        task.module.encoder.requires_grad_(False)
        task.module.quant_conv.requires_grad_(False)
        train(task, recipe.decoder, folder / "decoder")


def train_identity(recipe: Recipe, folder: Path) -> None:
    """Stage 2."""
    if recipe.identity and not recipe.start:
        task = IdentityTask(recipe.architecture, ViewStore(folder / "views"), recipe.pairs)
        train(task, recipe.identity, folder / "identity")


@on_main_process
def encode(recipe: Recipe, folder: Path) -> None:
    """Makes the pairs of stage 3, once."""
    if not recipe.sources:
        model = frozen_parts(recipe, folder)
        views, data = ViewStore(folder / "views"), recipe.data
        pairs = ViewPairs(views, recipe.pairs, single=data.single)
        encode_pairs(model, pairs, folder / "pairs", data.pairs, workers=data.workers)


def train_hint(recipe: Recipe, folder: Path) -> None:
    """The hint block alone, for a recipe whose `diffusion` goes without."""
    if recipe.hint:
        model = frozen_parts(recipe, folder)
        settle_pairs(recipe, folder, model, folder / "hint")
        rows = int((folder / "hint" / ROWS).read_text())
        pairs = EncodedPairs(folder / "pairs", PAIRS_SEED, recipe.pairs, rows=rows)
        train(HintTask(model.control, pairs), recipe.hint, folder / "hint")


def train_diffusion(recipe: Recipe, folder: Path) -> None:
    """Stage 3."""
    if recipe.diffusion:
        model = frozen_parts(recipe, folder)
        if (folder / "hint" / "mean.pt").exists():
            HintTask.load(model.control, _weights(folder / "hint"))
        pairs = mixture(recipe) if recipe.sources else rendered_pairs(recipe, folder, model)
        task = DiffusionTask(model, pairs, recipe.denoising)
        train(task, recipe.diffusion, folder / "diffusion", Preview(recipe, model))


def rendered_pairs(recipe: Recipe, folder: Path, model: AnyDoor) -> EncodedPairs:
    """What `encode` has made, with the hints as the hint block sees them if it does not learn."""
    rules, stage = recipe.denoising, folder / "diffusion"
    settle_pairs(recipe, folder, model, stage, hints=not rules.hint_block)
    return EncodedPairs(
        folder / "pairs",
        PAIRS_SEED,
        recipe.pairs,
        rules.drop,
        recipe.data.kind,
        hint_features=not rules.hint_block,
        places=rules.attention_guide > 0,
        rows=int((stage / ROWS).read_text()),
    )


@on_main_process
def settle_pairs(recipe: Recipe, folder: Path, model: AnyDoor, stage: Path, hints: bool = False) -> None:
    """Sees to it that a stage finds the pairs that it began with, encoded by the weights of `model`.

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
            f"began; to take those that are by now, delete {stage / ROWS}",
            file=sys.stderr,
        )


def mixture(recipe: Recipe) -> Mixture:
    """The data sets that the recipe lists."""
    sources = [(SOURCES[source.name](Path(source.root)), source.weight) for source in recipe.sources]
    side = recipe.pairs.resolution // recipe.architecture.latent_factor
    shape = (recipe.architecture.latent_channels, side, side)
    return Mixture(sources, recipe.pairs, shape, PAIRS_SEED, recipe.denoising.drop)


@on_main_process
def write_checkpoint(recipe: Recipe, folder: Path) -> None:
    """Puts the parts together: `folder`/model.safetensors."""
    dtype: torch.dtype = getattr(torch, recipe.checkpoint_dtype)
    write_model(folder / "model.safetensors", trained_model(recipe, folder), dtype)


def frozen_parts(recipe: Recipe, folder: Path) -> AnyDoor:
    """A network with the autoencoder and the ID encoder of stages 1 and 2; the rest is fresh.

    The autoencoder's latents are put into units of variance 1 on the first views, always the same way. Where
    the recipe starts from a checkpoint, all of it comes from there.
    """
    torch.manual_seed(0)
    model = AnyDoor(recipe.architecture)
    if recipe.start:
        model.load_official_state_dict(read_start(recipe.start, recipe.architecture))
        return model.eval()
    open_control(model.control)
    improved = (folder / "decoder" / "mean.pt").exists()
    model.vae.load_state_dict(_weights(folder / ("decoder" if improved else "autoencoder")))
    encoder = {
        n.removeprefix("encoder."): w
        for n, w in _weights(folder / "identity").items()
        if n.startswith("encoder.")
    }
    model.id_encoder.load_state_dict(encoder)
    store = ViewStore(folder / "views")
    pictures = np.stack([store.scene(row, 0).image for row in range(min(CALIBRATION, len(store)))])
    normalise_latents(model.vae, torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
    return model.eval()


def trained_model(recipe: Recipe, folder: Path) -> AnyDoor:
    """The whole network after stage 3."""
    model = frozen_parts(recipe, folder)
    DiffusionTask.load(model, _weights(folder / "diffusion"))
    return model


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "mean.pt"
    if not path.exists():
        raise FileNotFoundError(f"there is no '{path}': run the stage '{folder.name}' first")
    weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


STAGES: dict[str, Callable[[Recipe, Path], None]] = {
    "views": train_views,
    "autoencoder": train_autoencoder,
    "identity": train_identity,
    "encode": encode,
    "hint": train_hint,
    "diffusion": train_diffusion,
    "decoder": train_decoder,
    "checkpoint": write_checkpoint,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 if what it is given cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; see training/recipes and training/config.py")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only these; default: all in order")
    parser.add_argument("--folder", type=Path, help="default: runs/NAME of the recipe")
    parser.add_argument("--start", type=Path, help="an official .safetensors checkpoint to go on from")
    parser.add_argument("--threads", type=int, help="processor threads to use")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        recipe = read_recipe(options.recipe)
        if options.start:
            recipe = replace(recipe, start=str(options.start))
        if recipe.start:  # now, not after hours of drawing
            check_start(recipe.start, recipe.architecture)
        for stage in options.stage or STAGES:
            STAGES[stage](recipe, options.folder or Path("runs") / options.recipe.stem)
    except REFUSALS as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    part_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Puts together what a recipe describes: networks from the weights of its stages, and data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from training import seeds
from training.config import CommonRecipe, Recipe
from training.data.encoded import EncodedPairs
from training.data.mixture import Mixture
from training.data.sources import SOURCES
from training.data.view_pairs import DrawnPairs, ViewPairs
from training.data.view_store import ViewStore
from training.loop import join_processes
from training.network.checkpoint import network_of, read_checkpoint, read_start
from training.network.checkpoint_file import CheckpointError
from training.network.imprint import with_scene
from training.network.modules import AnyDoor, DiffusionNetwork, ReferenceNetwork
from training.small.fresh_samples import AnewPairs, FreshSamples
from training.small.initial_weights import open_control
from training.systems.anydoor import Denoising, DiffusionTask
from training.systems.autoencoder import normalise_latents
from training.train_state import fitting, read_tensors
from training.workers import drawer_count, drawing_device, worker_count

_FIRST = "conv_in.weight"
"""The UNet's first convolution."""

CALIBRATION_VIEWS = 64
"""Views on which the spread of the latents is measured."""


@contextmanager
def stage_weights(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the weights that a stage has trained, for a block that puts them into a network.

    Raises:
        FileNotFoundError: it has not been run.
        InputError: their file is damaged, or the block finds that they are of another recipe.
    """
    path = folder / "mean.pt"
    if not path.exists():
        raise FileNotFoundError(f"there is no '{path}': run the stage '{folder.name}' first")
    weights: dict[str, torch.Tensor] = read_tensors(path)
    with fitting(path):
        yield weights


def frozen_parts(recipe: Recipe, folder: Path) -> AnyDoor:
    """Builds a network with the autoencoder and the ID encoder of stages 1 and 2; the rest is fresh.

    The autoencoder's latents are put into units of variance 1 on the first views, always the same way. Where
    the recipe starts from a checkpoint, all of the network comes from there.

    Raises:
        CheckpointError: the recipe's start cannot be used.
        FileNotFoundError: a stage has not been run.
    """
    torch.manual_seed(0)
    model = AnyDoor(recipe.architecture)
    if recipe.start:
        model.load_official_state_dict(read_start(recipe.start, recipe.architecture).tensors)
        return model.eval()
    open_control(model.control)
    load_small_parts(model, recipe, folder)
    return model.eval()


def load_small_parts(model: ReferenceNetwork, recipe: CommonRecipe, folder: Path) -> None:
    """Puts the autoencoder and the image encoder of a small model into a network.

    They are those of the recipe's `encoders`, or else those that the run has trained. Of the latter the
    latents are put into units of variance 1 on the first rendered views.

    Args:
        model: changed in place.
        recipe: says where they are from.
        folder: of the run.

    Raises:
        CheckpointError: the recipe's `encoders` cannot be used.
        FileNotFoundError: a stage has not been run.
    """
    if recipe.encoders:
        _load_encoders(model, recipe.encoders)
        return
    improved = (folder / "decoder" / "mean.pt").exists()
    with stage_weights(folder / ("decoder" if improved else "autoencoder")) as weights:
        model.vae.load_state_dict(weights)
    with stage_weights(folder / "identity") as identity:
        trained = {n.removeprefix("encoder."): w for n, w in identity.items() if n.startswith("encoder.")}
        known = model.id_encoder.state_dict()
        # a content adapter has layers that the one linear layer of that stage has not, and starts afresh
        fresh = model.id_encoder.projector.state_dict(prefix="projector.")
        model.id_encoder.load_state_dict(fresh | {name: w for name, w in trained.items() if name in known})
    store = ViewStore(recipe.objects_in(folder))
    pictures = np.stack([store.scene(row, 0).image for row in range(min(CALIBRATION_VIEWS, len(store)))])
    device = join_processes().device
    shown = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2) / 127.5 - 1
    normalise_latents(model.vae.to(device), shown)
    model.vae.cpu()


def network_in(path: str) -> ReferenceNetwork:
    """Builds the network of a checkpoint, with its weights.

    Raises:
        CheckpointError: it cannot be used.
    """
    checkpoint = read_checkpoint(path)
    network = network_of(checkpoint.architecture)
    network.load_official_state_dict(checkpoint.tensors)
    return network


@contextmanager
def same_sizes(what: str, path: str, instead: str) -> Iterator[None]:
    """Refuses weights that do not fit into the network of a recipe.

    Args:
        what: the weights are of, like "the UNet".
        path: of their checkpoint.
        instead: what else to give, like "another unet".

    Raises:
        CheckpointError: the block has found other sizes.
    """
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(
            f"{what} of '{path}' has other sizes than the recipe's: change [architecture] or give {instead}"
        ) from error


def _load_encoders(model: ReferenceNetwork, path: str) -> None:
    source = network_in(path)
    with same_sizes("the autoencoder or the image encoder", path, "other encoders"):
        model.vae.load_state_dict(source.vae.state_dict())
        model.id_encoder.backbone.load_state_dict(source.id_encoder.backbone.state_dict())
    if isinstance(source, AnyDoor) and isinstance(model, AnyDoor):
        # the same for UNets of all sizes, but for the convolution behind it
        block = model.control.controlnet_cond_embedding
        seen = source.control.controlnet_cond_embedding
        block.conv_in.load_state_dict(seen.conv_in.state_dict())
        block.blocks.load_state_dict(seen.blocks.state_dict())


def load_unet(model: DiffusionNetwork, path: str) -> ReferenceNetwork:
    """Puts the UNet of a checkpoint into a network, and returns the checkpoint's network.

    Channels that see a scene are left out where the network has none, and added where it alone has them;
    they change nothing at first.

    Raises:
        CheckpointError: the checkpoint cannot be used, or its UNet has other sizes.
    """
    source = network_in(path)
    weights = source.unet.state_dict()
    fit_scene(weights, model, source.architecture.latent_channels)
    with same_sizes("the UNet", path, "another unet"):
        model.unet.load_state_dict(weights)
    return source


def fit_scene(weights: dict[str, torch.Tensor], model: DiffusionNetwork, latent_channels: int) -> None:
    """Adds the channels of a scene to the weights of a UNet, or leaves them out, as a network has them."""
    sees_scene = model.unet.config.in_channels > latent_channels
    first = weights[_FIRST]
    weights[_FIRST] = with_scene(first, latent_channels) if sees_scene else first[:, :latent_channels]


def trained_model(recipe: Recipe, folder: Path) -> AnyDoor:
    """Builds the whole network after stage 3.

    Raises:
        CheckpointError, FileNotFoundError: see `frozen_parts`.
    """
    model = frozen_parts(recipe, folder)
    with stage_weights(folder / "diffusion") as weights:
        DiffusionTask.load(model, weights)
    return model


def mixture(recipe: Recipe) -> Mixture:
    """Opens the data sets that the recipe lists.

    Raises:
        SourceError: a folder is not that of its data set.
    """
    sources = [(SOURCES[source.name](Path(source.root)), source.weight) for source in recipe.sources]
    return Mixture(sources, recipe.pairs, recipe.latent_shape, seeds.TRAINING_PAIRS, recipe.denoising.drop)


def view_pairs(recipe: Recipe, folder: Path) -> ViewPairs:
    """Opens the rendered views in `folder`/views as the pairs that the recipe makes of them.

    Raises:
        StoreError: nothing is drawn yet.
    """
    return ViewPairs(ViewStore(recipe.objects_in(folder)), recipe.pairs, single=recipe.data.single)


def encoded_pairs(recipe: Recipe, folder: Path, rows: int = 0) -> EncodedPairs:
    """Opens what the stage `encode` has written, as the diffusion stage reads it.

    Hints are given as the hint block sees them if it does not learn.
    """
    rules = recipe.denoising
    return EncodedPairs(
        folder / "pairs",
        seeds.TRAINING_PAIRS,
        recipe.pairs,
        rules.drop,
        recipe.data.kind,
        hint_features=not rules.hint_block,
        places=rules.attention_guide > 0,
        rows=rows,
    )


def anew_pairs(recipe: Recipe, folder: Path) -> AnewPairs:
    """Gives the pairs of a recipe that has them made while it trains.

    Raises:
        StoreError: they are made of stored views, and nothing is drawn yet.
    """
    if recipe.data.stored_views:
        return view_pairs(recipe, folder)
    return DrawnPairs(recipe.pairs, single=recipe.data.single, device=drawing_device())


def fresh_samples(
    recipe: Recipe, folder: Path, model: AnyDoor, rules: Denoising, chunk: int = 0
) -> FreshSamples:
    """Gives what a stage learns from where pairs are made while it trains.

    Args:
        recipe: how pairs are made.
        folder: of the run.
        model: encodes them.
        rules: how the stage takes them, as in `encoded_pairs`.
        chunk: see `FreshSamples`.
    """
    data = recipe.data
    return FreshSamples(
        model,
        anew_pairs(recipe, folder),
        seeds.TRAINING_PAIRS,
        rules.drop,
        data.kind,
        hint_features=not rules.hint_block,
        places=rules.attention_guide > 0,
        repeats=data.repeats,
        workers=(worker_count if data.stored_views else drawer_count)(data.workers),
        chunk=chunk,
    )

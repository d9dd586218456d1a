"""Takes pairs through the parts of a small model that do not learn, once; see `training.data.encoded`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines.files import write_text
from runtime.progress_bar import ProgressBar
from training.data.arrays import mapped_array
from training.data.device import resident
from training.data.encoded import (
    HINTS_DONE,
    PAIRS_DONE,
    EncodedError,
    rows_done,
    unpack_hints,
    unpack_pictures,
)
from training.data.view_pairs import ViewPairs
from training.loop import Batch, join_processes
from training.network.architecture import HINT_BLOCK_CHANNELS, LATENT_SCALE, REFERENCE_SIZE
from training.network.modules import AnyDoor, DiffusionNetwork, ReferenceNetwork
from training.network.weights_hash import hash_weights
from training.small.stored import open_rows, store_samples

PAIRS = ("hints", "features", "moments", "single")
"""What is written of a pair."""


@torch.no_grad()
def encode_pairs(
    model: AnyDoor, pairs: ViewPairs, folder: Path, count: int, batch: int = 0, workers: int = 0
) -> None:
    """Writes `count` encoded pairs to a folder, or those of them that an earlier call left undone.

    Args:
        model: its autoencoder and its ID encoder are used, on the accelerator's device.
        pairs: what to encode.
        folder: of the arrays.
        count: of pairs.
        batch: pairs that are encoded at once; 0 for as many as suit the device.
        workers: processes that make pairs while others are encoded; 0 makes them in turn.

    Raises:
        EncodedError: the folder holds pairs of another shape, or what other weights made of them.
    """
    check_encoders(model, folder)
    if rows_done(folder) >= count:
        return
    device = join_processes().device
    model.to(device)
    np.save(folder / "black.npy", black_features(model, device).cpu().numpy())

    def encode(made: Batch) -> dict[str, Tensor]:
        return encode_batch(model, made)

    store_samples(pairs, encode, folder, count, batch, workers, kept=PAIRS)


@torch.no_grad()
def encode_batch(model: AnyDoor, made: Batch) -> dict[str, Tensor]:
    """Encodes a batch of `ViewPairs` on the model's device; `PAIRS` are the results."""
    posterior = model.encode(unpack_pictures(made["picture"]))
    return {
        "hints": made["hint"],
        "features": model.id_encoder.features(made["reference"] / 255),
        "moments": torch.stack([posterior.mean, posterior.std], dim=1) * LATENT_SCALE,
        "single": made["single"],
    }


@torch.no_grad()
def black_features(model: AnyDoor, device: torch.device) -> Tensor:
    """Computes the features (T, D), float16, of a black reference."""
    black = torch.zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE, device=device)
    return model.id_encoder.features(black)[0].half()


@torch.no_grad()
def encode_hints(model: AnyDoor, folder: Path, batch: int = 64) -> None:
    """Takes the hints that `encode_pairs` wrote through the hint block, once; goes on where it stopped.

    Raises:
        EncodedError: the folder holds what another hint block made of them.
    """
    block = model.control.controlnet_cond_embedding
    _hold_to_weights(folder / HINTS_DONE, [block.conv_in, block.blocks], "the hint block")
    done, count = rows_done(folder, HINTS_DONE), rows_done(folder)
    if done >= count:
        return
    hints = mapped_array(folder / "hints.npy")
    device, side = join_processes().device, hints.shape[-1] // model.architecture.latent_factor
    model.control.to(device)
    shape = (len(hints), HINT_BLOCK_CHANNELS[-1], side, side)
    features = open_rows(folder / "hint_features.npy", np.float16, shape)
    for start in ProgressBar(range(done, count, batch), unit="batch"):
        rows = slice(start, min(start + batch, count))
        unpacked = unpack_hints(resident(hints[rows], device))
        features[rows] = model.control.hint_features(unpacked).cpu().numpy()
        write_text(folder / HINTS_DONE, str(rows.stop))


def check_encoders(model: DiffusionNetwork, folder: Path) -> None:
    """Notes which weights encode the pairs of a folder; one that has no note yet is taken as it is.

    Raises:
        EncodedError: other weights encoded them.
    """
    # the layer behind the encoder holds units that are measured anew each time (see `normalise_latents`), and
    # the last bits of a sum depend on the number of threads
    parts = [model.vae.encoder]
    if isinstance(model, ReferenceNetwork):
        parts.append(model.id_encoder.backbone)
    _hold_to_weights(folder / PAIRS_DONE, parts, "the autoencoder or the ID encoder")


def _hold_to_weights(done: Path, parts: Sequence[nn.Module], name: str) -> None:
    """Refuses rows, of those that a file counts, that other weights made."""
    note, weights = done.with_suffix(".sha256"), hash_weights(parts)
    if rows_done(done.parent, done.name) and note.exists() and note.read_text() != weights:
        raise EncodedError(
            f"'{done.parent}' was encoded with other weights of {name}: delete '{done}' to encode it again, "
            "or give another --folder"
        )
    write_text(note, weights)

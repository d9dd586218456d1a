"""Takes pairs through the parts of a small model that do not learn, once; see `training.data.encoded`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from engines.files import write_text
from runtime.progress_bar import ProgressBar
from training.data.encoded import HINTS_DONE, PAIRS_DONE, EncodedError, rows_done, unpack_hint
from training.data.view_pairs import ViewPairs
from training.network.architecture import HINT_BLOCK_CHANNELS, LATENT_SCALE, REFERENCE_SIZE
from training.network.modules import AnyDoor, DiffusionNetwork, ReferenceNetwork


@torch.no_grad()
def encode_pairs(
    model: AnyDoor, pairs: ViewPairs, folder: Path, count: int, batch: int = 16, workers: int = 0
) -> None:
    """Writes `count` encoded pairs to a folder, or those of them that an earlier call left undone.

    Args:
        model: its autoencoder and its ID encoder are used.
        pairs: what to encode.
        folder: of the arrays.
        count: of pairs.
        batch: pairs that are encoded at once.
        workers: processes that make pairs while others are encoded; 0 makes them in turn.

    Raises:
        EncodedError: the folder holds pairs of another shape, or what other weights made of them.
    """
    check_encoders(model, folder)
    done = rows_done(folder)
    if done >= count:
        return
    black = model.id_encoder.features(torch.zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE))
    np.save(folder / "black.npy", black[0].numpy().astype(np.float16))
    arrays = _open_arrays(model, folder, count, pairs.rules.resolution)
    loader = DataLoader(pairs, batch, sampler=range(done, count), num_workers=workers)
    with ProgressBar(total=count, initial=done, unit="pair") as bar:
        for made in loader:
            posterior = model.encode(made["picture"])
            moments = torch.stack([posterior.mean, posterior.std], dim=1) * LATENT_SCALE
            rows = slice(done, done + len(moments))
            arrays["hints"][rows] = made["hint"]
            arrays["features"][rows] = model.id_encoder.features(made["reference"])
            arrays["moments"][rows] = moments
            arrays["single"][rows] = made["single"]
            bar.update(len(moments))
            done += len(moments)
            write_text(folder / PAIRS_DONE, str(done))


@torch.no_grad()
def encode_hints(model: AnyDoor, folder: Path, batch: int = 32) -> None:
    """Takes the hints that `encode_pairs` wrote through the hint block, once; goes on where it stopped.

    Raises:
        EncodedError: the folder holds what another hint block made of them.
    """
    block = model.control.controlnet_cond_embedding
    _hold_to_weights(folder / HINTS_DONE, [block.conv_in, block.blocks], "the hint block")
    done, count = rows_done(folder, HINTS_DONE), rows_done(folder)
    if done >= count:
        return
    hints = np.load(folder / "hints.npy", mmap_mode="r")
    side = hints.shape[-1] // model.architecture.latent_factor
    shape = (len(hints), HINT_BLOCK_CHANNELS[-1], side, side)
    features = _open_rows(folder / "hint_features.npy", np.float16, shape)
    for start in ProgressBar(range(done, count, batch), unit="batch"):
        rows = slice(start, min(start + batch, count))
        unpacked = torch.from_numpy(np.stack([unpack_hint(hint) for hint in hints[rows]]))
        features[rows] = model.control.hint_features(unpacked).numpy()
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
    note, weights = done.with_suffix(".sha256"), _hash(parts)
    if rows_done(done.parent, done.name) and note.exists() and note.read_text() != weights:
        raise EncodedError(
            f"'{done.parent}' was encoded with other weights of {name}: delete '{done}' to encode it again, "
            "or give another --folder"
        )
    write_text(note, weights)


def _hash(parts: Sequence[nn.Module]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _open_arrays(model: AnyDoor, folder: Path, count: int, resolution: int) -> dict[str, NDArray[Any]]:
    architecture = model.architecture
    latent = resolution // architecture.latent_factor
    shapes: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "hints": (np.uint8, (count, 4, resolution, resolution)),
        "features": (np.float16, (count, architecture.token_count, architecture.dino_width)),
        "moments": (np.float16, (count, 2, architecture.latent_channels, latent, latent)),
        "single": (np.bool_, (count,)),
    }
    return {name: _open_rows(folder / f"{name}.npy", *kind) for name, kind in shapes.items()}


def _open_rows(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array on disk, made if it is not there."""
    if not path.exists():
        return open_memmap(path, "w+", dtype, shape)
    array: NDArray[Any] = open_memmap(path, "r+")
    if array.shape != shape:
        raise EncodedError(f"'{path}' has the shape {array.shape}, expected {shape}: give another --folder")
    return array

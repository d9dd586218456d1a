"""Pairs encoded once by the parts that do not learn, so that training runs at the speed of those that do.

A folder of arrays that are mapped, not read: `hints.npy` (N, 4, R, R) uint8 (see `pack_hint`), `features.npy`
(N, T, D) float16 of DINOv2, `moments.npy` (N, 2, C, h, w) float16 (mean and standard deviation of the scaled
latents), `single.npy` (N,) bool (whether both pictures of a pair are one), `black.npy` (T, D), the features
of a black reference, and, where the hint block does not learn, `hint_features.npy` (N, 256, h, w) float16.
`done.txt` and `hints_done.txt` tell how many rows are written, so that encoding can be interrupted and
resumed, `done.sha256` and `hints_done.sha256` which weights made them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.data.pairs import (
    Kind,
    Pair,
    PairRules,
    Shot,
    UnfitPairError,
    as_sample,
    make_pair,
    sample_timestep,
)
from training.data.view_store import REFERENCES, SCENES, ViewStore
from training.network.architecture import HINT_CHANNELS, LATENT_SCALE, REFERENCE_SIZE
from training.network.modules import AnyDoor
from training.replacing import replace_text
from training.small.attention_guide import matching_places
from training.systems.identity import dino_features

PACKED_INSIDE = 255
PAIRS_DONE, HINTS_DONE = "done.txt", "hints_done.txt"


class EncodedError(ValueError):
    """A folder of encoded pairs cannot be used; the text says what to do about it."""


def pair_of_views(
    store: ViewStore, number: int, seed: int, rules: PairRules, kind: Kind = "multi-view", single: float = 0.0
) -> Pair:
    """Pair `number`: a row of the store, one of its references, one of its scenes; unfit ones are skipped.

    With the probability `single` the reference is the scene itself, as in the sets of still images.
    """
    rng = np.random.default_rng([seed, number])
    while True:
        row = int(rng.integers(len(store)))
        reference = store.reference(row, int(rng.integers(REFERENCES)))
        target = store.scene(row, int(rng.integers(SCENES)))
        alone = rng.random() < single
        try:
            shots = [Shot(view.image, view.mask > 128) for view in (target if alone else reference, target)]
            return make_pair(shots[0], shots[1], "image" if alone else kind, rules, rng)
        except UnfitPairError:
            continue


def pack_hint(hint: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A hint (4, R, R), -1..1, as bytes: colours exactly, the mask's -1, 0, 1 as 0, 127, 255."""
    packed: NDArray[np.uint8] = np.floor((hint + 1) * 127.5 + 0.25).astype(np.uint8)
    return packed


def unpack_hint(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What `pack_hint` packed."""
    hint: NDArray[np.float32] = packed.astype(np.float32) / np.float32(127.5) - 1
    hint[3] = np.rint(hint[3])
    return hint


@dataclass(frozen=True)
class ViewPairs(Dataset[dict[str, Any]]):
    """The pairs of a store of views by their numbers, ready to be encoded; see `pair_of_views`."""

    store: ViewStore
    rules: PairRules
    seed: int = 2
    single: float = 0.0

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Packed hint, picture (3, R, R), reference (3, 224, 224) and whether it is one picture twice."""
        pair = pair_of_views(self.store, number, self.seed, self.rules, single=self.single)
        sample = as_sample(pair)
        return {
            "hint": pack_hint(pair.hint),
            "picture": pair.picture,
            "reference": sample["reference"],
            "single": pair.kind == "image",
        }


@torch.no_grad()
def encode_pairs(
    model: AnyDoor, pairs: ViewPairs, folder: Path, count: int, batch: int = 16, workers: int = 0
) -> None:
    """Writes `count` encoded pairs to a folder, or those of them that an earlier call left undone.

    Args:
        model: its autoencoder and its ID encoder are used.
        pairs: what to encode.
        folder: where to.
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
    black = dino_features(model.id_encoder, torch.zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE))
    np.save(folder / "black.npy", black[0].numpy().astype(np.float16))
    size = pairs.rules.resolution
    latent = size // model.architecture.latent_factor
    tokens, width = model.architecture.token_count, model.architecture.dino_width
    channels = model.architecture.latent_channels
    arrays = {
        "hints": _open_rows(folder / "hints.npy", np.uint8, (count, 4, size, size)),
        "features": _open_rows(folder / "features.npy", np.float16, (count, tokens, width)),
        "moments": _open_rows(folder / "moments.npy", np.float16, (count, 2, channels, latent, latent)),
        "single": _open_rows(folder / "single.npy", np.bool_, (count,)),
    }
    loader = DataLoader(pairs, batch, sampler=range(done, count), num_workers=workers)
    with tqdm(total=count, initial=done, unit="pair") as bar:
        for made in loader:
            posterior = model.encode(made["picture"])
            moments = torch.stack([posterior.mean, posterior.std], dim=1) * LATENT_SCALE
            rows = slice(done, done + len(moments))
            arrays["hints"][rows] = made["hint"]
            arrays["features"][rows] = dino_features(model.id_encoder, made["reference"])
            arrays["moments"][rows] = moments
            arrays["single"][rows] = made["single"]
            bar.update(len(moments))
            done += len(moments)
            replace_text(folder / PAIRS_DONE, str(done))


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
    shape = (len(hints), HINT_CHANNELS[-1], side, side)
    features = _open_rows(folder / "hint_features.npy", np.float16, shape)
    for start in tqdm(range(done, count, batch), unit="batch"):
        rows = slice(start, min(start + batch, count))
        unpacked = torch.from_numpy(np.stack([unpack_hint(hint) for hint in hints[rows]]))
        features[rows] = model.control.hint_features(unpacked).numpy()
        replace_text(folder / HINTS_DONE, str(rows.stop))


def rows_done(folder: Path, name: str = PAIRS_DONE) -> int:
    """How many rows of a folder are written."""
    return int((folder / name).read_text()) if (folder / name).exists() else 0


def check_encoders(model: AnyDoor, folder: Path) -> None:
    """Notes which weights encode the pairs of a folder. A folder that does not say so yet is taken as it is.

    Raises:
        EncodedError: others did.
    """
    # the layer behind the encoder holds units that are measured anew each time (see `normalise_latents`), and
    # the last bits of a sum depend on the number of threads
    parts = [model.vae.encoder, model.id_encoder.dino]
    _hold_to_weights(folder / PAIRS_DONE, parts, "the autoencoder or the ID encoder")


def _hold_to_weights(done: Path, parts: Sequence[nn.Module], name: str) -> None:
    """Lets the rows that a file counts be of these weights only."""
    note, weights = done.with_suffix(".sha256"), _hash(parts)
    if rows_done(done.parent, done.name) and note.exists() and note.read_text() != weights:
        raise EncodedError(
            f"'{done.parent}' was encoded with other weights of {name}: delete '{done}' to encode it again, "
            "or give another --folder"
        )
    replace_text(note, weights)


def _hash(parts: Sequence[nn.Module]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def settled_rows(path: Path, folder: Path, name: str = PAIRS_DONE) -> int:
    """How many rows of a folder a training draws from: those that were there when it began.

    With more, the sample of a number would become another one.

    Args:
        path: keeps the number; is written when it is not there.
        folder: of encoded pairs.
        name: the file that counts their rows.

    Raises:
        EncodedError: there are none, or fewer than there were.
    """
    done = rows_done(folder, name)
    rows = int(path.read_text()) if path.exists() else done
    if not 0 < rows <= done:
        wanted = f"{rows}, as when this training began" if rows else "some to learn from"
        raise EncodedError(
            f"'{folder}' holds {done} encoded pairs, expected {wanted}: run the stage 'encode'"
        )
    replace_text(path, str(rows))
    return rows


def _open_rows(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array on disk, made if it is not there."""
    if not path.exists():
        return open_memmap(path, "w+", dtype, shape)
    array: NDArray[Any] = open_memmap(path, "r+")
    if array.shape != shape:
        raise EncodedError(f"'{path}' has the shape {array.shape}, expected {shape}: give another --folder")
    return array


@dataclass(frozen=True)
class EncodedPairs:
    """The endless dataset of diffusion training over a folder that `encode_pairs` wrote."""

    folder: Path
    seed: int
    rules: PairRules
    drop: float = 0.0
    """Probability that the reference is replaced by a black one, for classifier-free guidance."""
    kind: Kind = "multi-view"
    """What pairs of two pictures pass for."""
    hint_features: bool = False
    """Whether hints come as what the hint block makes of them."""
    places: bool = False
    """Whether `training.small.attention_guide.matching_places` come along; unknown ones for black
    references."""
    rows: int = 0
    """How many rows to draw from, the first ones; 0 for all that are written when the folder is opened. Item
    n is a function of n as long as this number stays (see `settled_rows`)."""

    def __post_init__(self) -> None:
        for name in (
            "hints",
            "features",
            "moments",
            "single",
            "black",
            *["hint_features"] * self.hint_features,
        ):
            object.__setattr__(self, f"_{name}", np.load(self.folder / f"{name}.npy", mmap_mode="r"))
        written = rows_done(self.folder, HINTS_DONE if self.hint_features else PAIRS_DONE)
        object.__setattr__(self, "_count", self.rows or written)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Latents and noise (C, h, w), timestep, features (T, D), hint (4, R, R) or its features."""
        arrays: dict[str, NDArray[Any]] = self.__dict__
        rng = np.random.default_rng([self.seed, number])
        row = int(rng.integers(arrays["_count"]))
        mean, spread = arrays["_moments"][row].astype(np.float32)
        latents = mean + spread * rng.standard_normal(mean.shape, np.float32)
        dropped = rng.random() < self.drop
        features = arrays["_black"] if dropped else arrays["_features"][row]
        kind: Kind = "image" if arrays["_single"][row] else self.kind
        sample = {
            "latents": latents,
            "noise": rng.standard_normal(mean.shape, np.float32),
            "timestep": sample_timestep(kind, self.rules.timesteps, rng),
            "features": features.astype(np.float32),
            "hint": self._hint(row),
        }
        if self.places:
            mask = (arrays["_hints"][row, 3] == PACKED_INSIDE) & (not dropped)
            sample["places"] = matching_places(mask, mean.shape[-1], math.isqrt(len(features) - 1))
        return sample

    def _hint(self, row: int) -> NDArray[np.float32]:
        arrays: dict[str, NDArray[Any]] = self.__dict__
        if not self.hint_features:
            return unpack_hint(arrays["_hints"][row])
        features: NDArray[np.float32] = arrays["_hint_features"][row].astype(np.float32)
        return features

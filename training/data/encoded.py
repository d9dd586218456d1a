"""Pairs encoded once by the parts that do not learn, so that training runs at the speed of those that do.

A folder of arrays that are mapped, not read: `hints.npy` (N, 4, R, R) uint8 (see `pack_hint`), `features.npy`
(N, T, D) float16 of DINOv2, `moments.npy` (N, 2, C, h, w) float16 (mean and standard deviation of the scaled
latents), and `black.npy` (T, D), the features of a black reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm import tqdm

from training.architecture import LATENT_SCALE, REFERENCE_SIZE
from training.data.pairs import Kind, Pair, PairRules, Shot, UnfitPairError, make_pair, sample_timestep
from training.data.view_store import REFERENCES, SCENES, ViewStore
from training.identity import dino_features
from training.model import AnyDoor


def pair_of_views(store: ViewStore, number: int, seed: int, rules: PairRules) -> Pair:
    """Pair `number`: a row of the store, one of its references, one of its scenes; unfit ones are skipped."""
    rng = np.random.default_rng([seed, number])
    while True:
        row = int(rng.integers(len(store)))
        reference = store.reference(row, int(rng.integers(REFERENCES)))
        target = store.scene(row, int(rng.integers(SCENES)))
        try:
            shots = [Shot(view.image, view.mask > 128) for view in (reference, target)]
            return make_pair(shots[0], shots[1], "multi-view", rules, rng)
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


@torch.no_grad()
def encode_pairs(
    model: AnyDoor,
    store: ViewStore,
    rules: PairRules,
    folder: Path,
    count: int,
    seed: int = 2,
    batch: int = 16,
) -> None:
    """Writes `count` encoded pairs to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    size, latent = rules.resolution, rules.resolution // model.architecture.latent_factor
    tokens, width = model.architecture.token_count, model.architecture.dino_width
    channels = model.architecture.latent_channels
    arrays = {
        "hints": open_memmap(folder / "hints.npy", "w+", np.uint8, (count, 4, size, size)),
        "features": open_memmap(folder / "features.npy", "w+", np.float16, (count, tokens, width)),
        "moments": open_memmap(
            folder / "moments.npy", "w+", np.float16, (count, 2, channels, latent, latent)
        ),
    }
    for start in tqdm(range(0, count, batch), unit="batch"):
        rows = range(start, min(start + batch, count))
        pairs = [pair_of_views(store, number, seed, rules) for number in rows]
        references = torch.from_numpy(np.stack([p.reference for p in pairs])).permute(0, 3, 1, 2) / 255
        posterior = model.encode(torch.from_numpy(np.stack([p.picture for p in pairs])))
        moments = torch.stack([posterior.mean, posterior.std], dim=1) * LATENT_SCALE
        where = slice(start, rows.stop)
        arrays["hints"][where] = [pack_hint(p.hint) for p in pairs]
        arrays["features"][where] = dino_features(model.id_encoder, references).numpy()
        arrays["moments"][where] = moments.numpy()
    # last of all: its presence says that the folder is complete
    black = dino_features(model.id_encoder, torch.zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE))
    np.save(folder / "black.npy", black[0].numpy().astype(np.float16))


@dataclass(frozen=True)
class EncodedPairs:
    """The endless dataset of diffusion training over a folder that `encode_pairs` wrote."""

    folder: Path
    seed: int
    rules: PairRules
    drop: float = 0.0
    """Probability that the reference is replaced by a black one, for classifier-free guidance."""
    kind: Kind = "multi-view"

    def __post_init__(self) -> None:
        for name in ("hints", "features", "moments", "black"):
            object.__setattr__(self, f"_{name}", np.load(self.folder / f"{name}.npy", mmap_mode="r"))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Latents and noise (C, h, w), timestep, features (T, D), hint (4, R, R)."""
        arrays: dict[str, NDArray[Any]] = self.__dict__
        rng = np.random.default_rng([self.seed, number])
        row = int(rng.integers(len(arrays["_hints"])))
        mean, spread = arrays["_moments"][row].astype(np.float32)
        latents = mean + spread * rng.standard_normal(mean.shape, np.float32)
        dropped = rng.random() < self.drop
        features = arrays["_black"] if dropped else arrays["_features"][row]
        return {
            "latents": latents,
            "noise": rng.standard_normal(mean.shape, np.float32),
            "timestep": sample_timestep(self.kind, self.rules.timesteps, rng),
            "features": features.astype(np.float32),
            "hint": unpack_hint(arrays["_hints"][row]),
        }

"""Pairs that were encoded once by the parts that do not learn, so that training does not wait for those.

A folder of arrays that are mapped, not read: `hints.npy` (N, 4, R, R) uint8 (see `pack_hint`), `features.npy`
(N, T, D) float16 of DINOv2, `moments.npy` (N, 2, C, h, w) float16 (mean and standard deviation of the scaled
latents), `single.npy` (N,) bool (whether both pictures of a pair are one), `black.npy` (T, D), the features
of a black reference, and, where the hint block does not learn, `hint_features.npy` (N, 256, h, w) float16.
`done.txt` and `hints_done.txt` count the rows that are written, so that encoding can be interrupted and
resumed; `done.sha256` and `hints_done.sha256` identify the weights that made them.
`training.small.encoding` writes such a folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.errors import AnyDoorError
from engines.files import write_text
from training.data.arrays import mapped_array, read_count
from training.data.device import generator, resident
from training.data.matching_places import matching_places
from training.data.pairs import Kind, PairRules, TimestepRule, sample_timestep, sample_timesteps

PACKED_INSIDE = 255
"""What the mask channel of a packed hint is where the object goes."""

PAIRS_DONE, HINTS_DONE = "done.txt", "hints_done.txt"


class EncodedError(AnyDoorError):
    """A folder of encoded pairs cannot be used; the text says what to do about it."""


def pack_hint(hint: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Packs a hint (4, R, R), -1..1, into bytes: colours exactly, the mask's -1, 0, 1 as 0, 127, 255."""
    packed: NDArray[np.uint8] = np.floor((hint + 1) * 127.5 + 0.25).astype(np.uint8)
    return packed


def pack_picture(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Packs a picture (3, R, R), -1..1, into bytes, exactly."""
    packed: NDArray[np.uint8] = np.rint((picture + 1) * 127.5).astype(np.uint8)
    return packed


def unpack_pictures(packed: Tensor) -> Tensor:
    """Unpacks pictures (N, 3, R, R) uint8 where they lie."""
    return packed.float() / 127.5 - 1


def unpack_hint(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unpacks what `pack_hint` packed."""
    hint: NDArray[np.float32] = packed.astype(np.float32) / np.float32(127.5) - 1
    hint[3] = np.rint(hint[3])
    return hint


def unpack_hints(packed: Tensor) -> Tensor:
    """Unpacks hints (N, 4, R, R) uint8 where they lie, as `unpack_hint` does one."""
    hints = packed.float() / 127.5 - 1
    hints[:, 3].round_()
    return hints


def rows_done(folder: Path, name: str = PAIRS_DONE) -> int:
    """Counts the rows of a folder that are written."""
    return read_count(folder / name)


def settled_rows(path: Path, folder: Path, name: str = PAIRS_DONE) -> int:
    """Counts the rows of a folder that a training draws from: those that were there when it began.

    With more, the sample of a number would become another one.

    Args:
        path: keeps the number; is written when it is not there.
        folder: of encoded pairs.
        name: the file that counts their rows.

    Raises:
        EncodedError: there are none, or fewer than there were.
    """
    done = rows_done(folder, name)
    rows = read_count(path) if path.exists() else done
    if not 0 < rows <= done:
        wanted = f"{rows}, as when this training began" if rows else "some to learn from"
        raise EncodedError(
            f"'{folder}' holds {done} encoded pairs, expected {wanted}: run the stage 'encode'"
        )
    write_text(path, str(rows))
    return rows


class EncodedPairs:
    """The endless dataset of diffusion training over a folder of encoded pairs."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        rules: PairRules,
        drop: float = 0.0,
        kind: Kind = "multi-view",
        hint_features: bool = False,
        places: bool = False,
        rows: int = 0,
    ) -> None:
        """Opens the arrays of a folder.

        Args:
            folder: of the arrays.
            seed: of rows, noises and timesteps.
            rules: how timesteps are drawn.
            drop: probability that the reference is replaced by a black one, for classifier-free guidance.
            kind: what pairs of two pictures count as.
            hint_features: give hints as what the hint block makes of them.
            places: also give `matching_places`; they are unknown for black references.
            rows: how many rows to draw from, the first ones; 0 for all that are written now. Item n is a
                function of n as long as this number stays (see `settled_rows`).
        """
        self._seed, self._rules, self._drop, self._kind = seed, rules, drop, kind
        self._with_places = places
        self._rows = rows or rows_done(folder, HINTS_DONE if hint_features else PAIRS_DONE)
        self._hints = mapped_array(folder / "hints.npy")
        self._hint_features = mapped_array(folder / "hint_features.npy") if hint_features else None
        self._features = mapped_array(folder / "features.npy")
        self._moments = mapped_array(folder / "moments.npy")
        self._single = mapped_array(folder / "single.npy")
        self._black = mapped_array(folder / "black.npy")
        self._loaded: dict[torch.device, dict[str, Tensor]] = {}

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives latents and noise (C, h, w), timestep, features (T, D), hint (4, R, R) or its features."""
        rng = np.random.default_rng([self._seed, number])
        row = int(rng.integers(self._rows))
        mean, spread = self._moments[row].astype(np.float32)
        latents = mean + spread * rng.standard_normal(mean.shape, np.float32)
        dropped = rng.random() < self._drop
        features = self._black if dropped else self._features[row]
        kind: Kind = "image" if self._single[row] else self._kind
        sample = {
            "latents": latents,
            "noise": rng.standard_normal(mean.shape, np.float32),
            "timestep": sample_timestep(kind, self._rules.timesteps, rng),
            "features": features.astype(np.float32),
            "hint": self._hint(row),
        }
        if self._with_places:
            mask = (self._hints[row, 3] == PACKED_INSIDE) & (not dropped)
            sample["places"] = matching_places(mask, mean.shape[-1], math.isqrt(len(features) - 1))
        return sample

    def _hint(self, row: int) -> NDArray[np.float32]:
        if self._hint_features is None:
            return unpack_hint(self._hints[row])
        features: NDArray[np.float32] = self._hint_features[row].astype(np.float32)
        return features

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Draws a batch in a device's memory, which takes the whole folder at the first call.

        Names, shapes and dtypes are those of samples in a batch, and so are the distributions.
        """
        arrays, rng = dict(self._on(device)), generator(self._seed, numbers, device)
        black = arrays.pop("black")
        rows = torch.randint(self._rows, (len(numbers),), generator=rng, device=device)
        pairs = {name: array[rows] for name, array in arrays.items()}
        return draw_samples(pairs, black, self._drop, self._kind, self._rules.timesteps, rng)

    def _on(self, device: torch.device) -> Mapping[str, Tensor]:
        """Returns the rows to draw from, in a device's memory."""
        if device not in self._loaded:
            arrays = {
                "moments": self._moments,
                "features": self._features,
                "single": self._single,
                "hint": self._hints if self._hint_features is None else self._hint_features,
            }
            if self._with_places:
                masks, tokens = self._hints[: self._rows, 3] == PACKED_INSIDE, len(self._black) - 1
                arrays["places"] = matching_places(masks, self._moments.shape[-1], math.isqrt(tokens))
            self._loaded[device] = {name: resident(a[: self._rows], device) for name, a in arrays.items()}
            self._loaded[device] |= {"black": resident(self._black, device)}
        return self._loaded[device]


def draw_samples(
    pairs: Mapping[str, Tensor],
    black: Tensor,
    drop: float,
    kind: Kind,
    timesteps: TimestepRule,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Draws a sample of each encoded pair, in a device's memory.

    Args:
        pairs: moments (N, 2, C, h, w), features (N, T, D), single (N,) bool, and hint: (N, 4, R, R) uint8 or
            what the hint block makes of it, float16. Perhaps `matching_places`.
        black: (T, D), the features of a black reference.
        drop: probability of a black reference, whose places are unknown.
        kind: what pairs of two pictures count as.
        timesteps: how they are drawn.
        rng: source of randomness on the device.
    """
    count, device, hint = len(pairs["single"]), black.device, pairs["hint"]
    dropped = torch.rand(count, generator=rng, device=device) < drop
    mean, spread = pairs["moments"].float().unbind(1)

    def normal() -> Tensor:
        return torch.randn(mean.shape, generator=rng, device=device)

    sample = {
        "latents": mean + spread * normal(),
        "noise": normal(),
        "timestep": sample_timesteps(pairs["single"], kind, timesteps, rng),
        "features": torch.where(dropped.view(-1, 1, 1), black, pairs["features"]).float(),
        "hint": unpack_hints(hint) if hint.dtype == torch.uint8 else hint.float(),
    }
    if "places" in pairs:
        sample["places"] = pairs["places"].masked_fill(dropped.view(-1, 1, 1, 1), math.nan)
    return sample

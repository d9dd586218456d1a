"""Draws and encodes the pairs of a small model while it trains.

Nothing is stored, so the pairs never end. They come in chunks: other processes draw the next one while the
model learns from the last one that is encoded, `repeats` times, each time in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from training.data.device import generator
from training.data.encoded import PACKED_INSIDE, draw_samples, unpack_hints
from training.data.matching_places import matching_places
from training.data.pairs import Kind
from training.data.view_pairs import DrawnPairs
from training.loop import ShardedSampler
from training.network.modules import AnyDoor
from training.small.encoding import black_features, encode_batch
from training.small.stored import stacked

CHUNK = 512
"""Pairs that are encoded, and kept in the device's memory, at a time."""

BATCH, CARD_BATCH = 16, 128
"""Pairs of a chunk that are drawn together. A card launches as many kernels for few as for many."""


class FreshSamples:
    """The endless dataset of diffusion training over pairs that are drawn for it; see the module."""

    def __init__(
        self,
        model: AnyDoor,
        pairs: DrawnPairs,
        seed: int,
        drop: float = 0.0,
        kind: Kind = "multi-view",
        hint_features: bool = False,
        places: bool = False,
        repeats: int = 1,
        workers: int = 0,
        chunk: int = CHUNK,
    ) -> None:
        """Draws nothing yet.

        Args:
            model: its autoencoder, its ID encoder and, for `hint_features`, its hint block encode the pairs.
                They may not learn meanwhile.
            pairs: what to encode.
            seed: of orders, noises and timesteps.
            drop, kind, hint_features, places: see `EncodedPairs`.
            repeats: how often a pair is learned from, at least 1.
            workers: processes that draw pairs; 0 draws a chunk when it is needed.
            chunk: pairs that are encoded, and kept in the device's memory, at a time.
        """
        self._model, self._pairs, self._seed = model, pairs, seed
        self._drop, self._kind = drop, kind
        self._with_hint_features, self._with_places = hint_features, places
        self._repeats, self._workers, self._size = repeats, workers, chunk
        self._black: Tensor | None = None
        self._chunk: tuple[int, dict[str, Tensor]] | None = None
        self._made: Iterator[dict[str, NDArray[np.generic]]] = iter(())
        self._next = -1  # chunk that `_made` goes on with

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Draws the samples of these numbers; names, shapes and dtypes are those of `EncodedPairs`."""
        first = numbers.start - numbers.start % self._size
        rounds = range(first, numbers.stop, self._size)
        parts = [
            self._part(range(max(start, numbers.start), min(start + self._size, numbers.stop)), device)
            for start in rounds
        ]
        pairs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self._black is None:
            self._black = black_features(self._model, device)
        rng = generator(self._seed, numbers, device)
        return draw_samples(pairs, self._black, self._drop, self._kind, self._pairs.rules.timesteps, rng)

    def _part(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Gives the encoded pairs of samples that belong to one round through one chunk."""
        through, first = divmod(numbers.start, self._size)
        order = np.random.default_rng([self._seed, through]).permutation(self._size)
        rows = torch.from_numpy(order[first : first + len(numbers)]).to(device)
        chunk = self._encoded(through // self._repeats, device)
        return {name: values[rows] for name, values in chunk.items()}

    def _encoded(self, number: int, device: torch.device) -> Mapping[str, Tensor]:
        """Gives a chunk of encoded pairs in a device's memory; keeps the last one."""
        if self._chunk is None or self._chunk[0] != number:
            self._model.to(device)
            at_once = math.gcd(BATCH if device.type == "cpu" else CARD_BATCH, self._size)
            if self._next != number:
                self._made = self._load(number * self._size, at_once)
            parts = [self._encode(next(self._made), device) for _ in range(0, self._size, at_once)]
            self._chunk = number, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._next = number + 1
        return self._chunk[1]

    @torch.no_grad()
    def _encode(self, made: Mapping[str, NDArray[np.generic]], device: torch.device) -> dict[str, Tensor]:
        batch = {name: torch.from_numpy(values).to(device) for name, values in made.items()}
        encoded = encode_batch(self._model, batch)
        hints, features, moments = encoded["hints"], encoded["features"].half(), encoded["moments"].half()
        if self._with_hint_features:
            hints = self._model.control.hint_features(unpack_hints(hints)).half()
        pairs = {"hint": hints, "features": features, "moments": moments, "single": encoded["single"]}
        if self._with_places:
            inside, tokens = made["hint"][:, 3] == PACKED_INSIDE, math.isqrt(features.shape[1] - 1)
            pairs["places"] = torch.from_numpy(matching_places(inside, moments.shape[-1], tokens)).to(device)
        return pairs

    def _load(self, first: int, at_once: int) -> Iterator[dict[str, NDArray[np.generic]]]:
        """Draws pairs from a number on, without an end."""
        sampler = ShardedSampler(first, at_once, process=0, processes=1)
        # while a chunk is learned from, all of the next one can be drawn
        ahead = max(-(-self._size // (at_once * max(self._workers, 1))), 2)
        loader = DataLoader(
            self._pairs,
            at_once,
            sampler=sampler,
            num_workers=self._workers,
            prefetch_factor=ahead if self._workers else None,
            collate_fn=stacked,
            # what was forked can use no card, and hangs where PyTorch had threads
            multiprocessing_context="spawn" if self._workers else None,
            worker_init_fn=use_one_thread,
        )
        return iter(loader)


def use_one_thread(_: int) -> None:
    """Leaves the other cores to the other workers."""
    torch.set_num_threads(1)

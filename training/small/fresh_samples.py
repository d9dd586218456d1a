"""Makes and encodes the pairs of a small model while it trains.

Nothing is stored, so the pairs never end. They come in chunks: other processes make the next one, and it is
encoded bit by bit, while the model learns from the last one, `repeats` times, each time in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.device import generator
from training.data.encoded import PACKED_INSIDE, draw_samples, unpack_hints
from training.data.matching_places import matching_places
from training.data.pairs import Kind
from training.data.view_pairs import DrawnPairs, ViewPairs
from training.loop import ShardedSampler
from training.network.modules import AnyDoor
from training.small.encoding import black_features, encode_batch
from training.small.stored import stacked
from training.workers import load_samples

CHUNK, CARD_CHUNK = 512, 4096
"""Pairs that are encoded, and kept in the device's memory, at a time: a pair of 128 pixels takes 150 kB."""

BATCH, CARD_BATCH = 16, 128
"""Pairs of a chunk that are made together. A card launches as many kernels for few as for many."""

AnewPairs = DrawnPairs | ViewPairs
"""Pairs that are made while a model trains."""


class FreshSamples:
    """The endless dataset of diffusion training over pairs that are made for it; see the module."""

    def __init__(
        self,
        model: AnyDoor,
        pairs: AnewPairs,
        seed: int,
        drop: float = 0.0,
        kind: Kind = "multi-view",
        hint_features: bool = False,
        places: bool = False,
        repeats: int = 1,
        workers: int = 0,
        chunk: int = 0,
    ) -> None:
        """Draws nothing yet.

        Args:
            model: its autoencoder, its ID encoder and, for `hint_features`, its hint block encode the pairs.
                They may not learn meanwhile.
            pairs: what to encode.
            seed: of orders, noises and timesteps.
            drop, kind, hint_features, places: see `EncodedPairs`.
            repeats: how often a pair is learned from, at least 1.
            workers: processes that make pairs; 0 makes a chunk when it is needed.
            chunk: pairs that are encoded, and kept in the device's memory, at a time; 0 for as many as suit
                the device.
        """
        self._model, self._pairs, self._seed = model, pairs, seed
        self._drop, self._kind = drop, kind
        self._with_hint_features, self._with_places = hint_features, places
        self._repeats, self._workers, self._given_size = repeats, workers, chunk
        self._black: Tensor | None = None
        self._chunk: tuple[int, dict[str, Tensor]] | None = None
        self._made: Iterator[dict[str, NDArray[np.generic]]] = iter(())
        self._coming: tuple[int, list[dict[str, Tensor]]] = -1, []  # the chunk that `_made` is at, in parts

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Draws the samples of these numbers; names, shapes and dtypes are those of `EncodedPairs`."""
        size = self._size(device)
        first = numbers.start - numbers.start % size
        rounds = range(first, numbers.stop, size)
        parts = [
            self._part(range(max(start, numbers.start), min(start + size, numbers.stop)), device)
            for start in rounds
        ]
        pairs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self._black is None:
            self._black = black_features(self._model, device)
        rng = generator(self._seed, numbers, device)
        return draw_samples(pairs, self._black, self._drop, self._kind, self._pairs.rules.timesteps, rng)

    def _size(self, device: torch.device) -> int:
        """Counts the pairs of a chunk."""
        return self._given_size or (CHUNK if device.type == "cpu" else CARD_CHUNK)

    def _part(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Gives the encoded pairs of samples that belong to one round through one chunk."""
        size = self._size(device)
        through, first = divmod(numbers.start, size)
        number, time = divmod(through, self._repeats)
        order = np.random.default_rng([self._seed, through]).permutation(size)
        rows = torch.from_numpy(order[first : first + len(numbers)]).to(device)
        if self._chunk is None or self._chunk[0] != number:
            parts = self._encode_until(number, 1.0, device)
            self._chunk = number, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self._workers:
            # bit by bit: a whole chunk at a time would let the card wait
            over = time * size + first + len(numbers)
            self._encode_until(number + 1, over / (size * self._repeats), device)
        return {name: values[rows] for name, values in self._chunk[1].items()}

    def _encode_until(self, number: int, share: float, device: torch.device) -> list[dict[str, Tensor]]:
        """Encodes a share of a chunk, as far as that is not done; gives the parts that are."""
        self._model.to(device)
        size = self._size(device)
        at_once = math.gcd(BATCH if device.type == "cpu" else CARD_BATCH, size)
        coming, parts = self._coming
        if coming != number:
            if coming != number - 1 or len(parts) < size // at_once:
                self._made = self._load(number * size, at_once, size)
            parts = []
            self._coming = number, parts
        while len(parts) < math.ceil(share * size / at_once):
            parts.append(self._encode(next(self._made), device))
        return parts

    @torch.no_grad()
    def _encode(self, made: Mapping[str, NDArray[np.generic]], device: torch.device) -> dict[str, Tensor]:
        batch = {name: copied(values, device) for name, values in made.items()}
        encoded = encode_batch(self._model, batch)
        hints, features, moments = encoded["hints"], encoded["features"].half(), encoded["moments"].half()
        if self._with_hint_features:
            hints = self._model.control.hint_features(unpack_hints(hints)).half()
        pairs = {"hint": hints, "features": features, "moments": moments, "single": encoded["single"]}
        if self._with_places:
            inside, tokens = made["hint"][:, 3] == PACKED_INSIDE, math.isqrt(features.shape[1] - 1)
            pairs["places"] = torch.from_numpy(matching_places(inside, moments.shape[-1], tokens)).to(device)
        return pairs

    def _load(self, first: int, at_once: int, size: int) -> Iterator[dict[str, NDArray[np.generic]]]:
        """Makes pairs from a number on, without an end; `size` of them ahead if others make them."""
        sampler = ShardedSampler(first, at_once, process=0, processes=1)
        # while a chunk is learned from, all of the next one can be made
        ahead = max(-(-size // (at_once * max(self._workers, 1))), 2)
        return load_samples(
            self._pairs,
            at_once,
            sampler,
            self._workers,
            stacked,
            prefetch_factor=ahead if self._workers else None,
            # what was forked can use no card, and hangs where PyTorch had threads
            multiprocessing_context="spawn" if self._workers else None,
            worker_init_fn=use_one_thread,
        )


def use_one_thread(_: int) -> None:
    """Leaves the other cores to the other workers."""
    torch.set_num_threads(1)


def copied(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copies an array to a device; where that is a card, nothing waits for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

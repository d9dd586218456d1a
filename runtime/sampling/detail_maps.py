"""Computes detail maps ahead of the sampling steps that use them, and caches them.

The ControlNet never looks at the latent, so its maps depend on the hint, the timestep and the ID tokens only
(docs/model-format.md). All samples of a placement share them, and a re-roll with another seed, guidance or
control scale needs no ControlNet at all.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from engines.engine import DeviceTensor, Engine
from runtime.sampling.conditions import OWNER, BankRows
from runtime.sampling.remembered import digest


@dataclass(frozen=True, eq=False)
class MapWindow:
    """Detail maps of some neighbouring steps, as the ControlNet left them on the device."""

    tensors: Mapping[str, DeviceTensor]
    """Map name -> (M, C, h, w); the rows of a step lie together, conditional first."""
    nbytes: int


WindowKey = tuple[tuple[int, bool], ...]
"""Timesteps of a window, each with whether it has unconditional maps."""


def shared_timesteps(timesteps: Sequence[int], count: int | None) -> list[int]:
    """For every step, the timestep whose detail maps it uses.

    The steps are divided into `count` runs of about the same length, and all steps of a run use the maps of
    its mean timestep: the maps of any one of them would be too late or too early for most others.

    Nothing is interpolated. Measured on 20 steps (docs/studies/detail-map-sharing.md), that changes the last
    latents less at 10 timesteps (0.8 against 1.6 %), more at 5 (2.0 against 1.7 %) and the same at 3, and all
    of it is below what the sampler itself is off. Samples at different steps in one call would each need
    blended copies of their maps, 54 MB a step at full size.

    Args:
        timesteps: of all steps, in the order they are taken.
        count: timesteps at which maps are computed; every step has maps of its own if None.
    """
    if count is None or count >= len(timesteps):
        return list(timesteps)
    runs = np.array_split(np.asarray(timesteps), count)
    return [round(float(run.mean())) for run in runs for _ in run]


class DetailMapCache:
    """Windows of detail maps by placement, under a budget of bytes.

    When the budget is reached, the placement that was used longest ago makes room. A placement does not make
    room for itself: sampling walks through all its windows in turn, and dropping the oldest would drop
    exactly the one that the next run starts with.

    What is kept must not take the memory of what is in use. So windows that are in use count as well, whether
    they are kept or not, and the only one that need not fit is the one that is computed next.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        """Of the windows that are kept."""
        self._alive = weakref.WeakSet[MapWindow]()
        self._placements: OrderedDict[bytes, dict[WindowKey, MapWindow]] = OrderedDict()

    def get(self, placement: bytes, key: WindowKey) -> MapWindow | None:
        """Returns the window, if it is kept."""
        windows = self._placements.get(placement)
        if windows is None:
            return None
        self._placements.move_to_end(placement)
        return windows.get(key)

    def put(self, placement: bytes, key: WindowKey, window: MapWindow) -> None:
        """Keeps a window, if there is or can be made room for it."""
        own = sum(kept.nbytes for kept in self._placements.get(placement, {}).values())
        if own + window.nbytes > self.budget:
            return
        while self.nbytes + window.nbytes > self.budget:
            self._drop(next(other for other in self._placements if other != placement))
        self._placements.setdefault(placement, {})[key] = window
        self.nbytes += window.nbytes

    def make_room(self, placement: bytes) -> None:
        """Drops what is kept until it fits the budget together with what is in use, the placement's own last.

        To be called before a window of the placement is computed.
        """
        while self._placements and sum(window.nbytes for window in self._alive) > self.budget:
            self._drop(next((other for other in self._placements if other != placement), placement))

    def count(self, window: MapWindow) -> None:
        """Notes a window that was computed, until nobody holds it any more."""
        self._alive.add(window)

    def _drop(self, placement: bytes) -> None:
        self.nbytes -= sum(kept.nbytes for kept in self._placements.pop(placement).values())

    def clear(self) -> None:
        """Drops everything."""
        self._placements.clear()
        self.nbytes = 0


class DetailMaps:
    """The detail maps of one placement along a schedule, computed a window of timesteps at a time."""

    def __init__(
        self,
        engine: Engine,
        graph: str,
        cache: DetailMapCache,
        hint: NDArray[np.float32],
        tokens: NDArray[np.float32],
        timesteps: Sequence[int],
        window: int,
        guided: Sequence[bool] | None = None,
        hint_key: bytes | None = None,
        keeps: bool = True,
    ) -> None:
        """Computes nothing yet.

        Args:
            engine: runs the graph.
            graph: name of the ControlNet's graph.
            cache: keeps windows for later runs.
            hint: (4, H, W).
            tokens: (1, T, D) without guidance; (2, T, D) with it, the unconditional ones last.
            timesteps: of all steps, in the order they are taken; neighbours with the same one share its maps.
            window: how many timesteps to compute in one call.
            guided: which steps have guidance; all or none, depending on `tokens`, if None. Where no step has
                any, the unconditional maps are not computed.
            hint_key: tells this hint from all others; computed from it if None, which takes milliseconds.
            keeps: whether the cache keeps windows, and has some.
        """
        self._engine = engine
        self._graph = graph
        self._cache = cache
        self._keeps = keeps
        self._hint = np.ascontiguousarray(hint[None])
        self._tokens = tokens
        self._sent: tuple[DeviceTensor, DeviceTensor] | None = None
        """Hint and tokens on the device, from the first window that is computed."""
        self._gathered: tuple[tuple[int, ...], DeviceTensor | None] = (), None
        """Sets of maps of each timestep in the last window that was computed, and their tokens."""
        if guided is None:
            guided = [len(tokens) == 2] * len(timesteps)
        self._entries: list[tuple[int, bool]] = []
        self._entry_of_step: list[int] = []
        for timestep, run in itertools.groupby(zip(timesteps, guided), key=itemgetter(0)):
            guided_in_run = [of_step for _, of_step in run]
            self._entry_of_step += [len(self._entries)] * len(guided_in_run)
            self._entries.append((int(timestep), any(guided_in_run)))
        self._window = window
        self._placement = digest(tokens[0]) + (hint_key or digest(hint)) + OWNER.get().encode()
        self._current: tuple[int, MapWindow] | None = None

    def at(self, step: int) -> BankRows:
        """Returns the maps of a step, counted from 0."""
        index, offset = divmod(self._entry_of_step[step], self._window)
        if self._current is None or self._current[0] != index:
            # the window before is dropped first: two need not fit into memory
            self._current = None
            self._current = (index, self._window_of(index))
        entries = self._entries_of(index)
        row = sum(_rows(guided) for _, guided in entries[:offset])
        return BankRows(self._current[1].tensors, row, row + _rows(entries[offset][1]) - 1)

    def steps_ready(self, step: int) -> int:
        """Returns how many steps from this one on have their maps in the same tensors."""
        window = self._entry_of_step[step] // self._window
        return sum(entry // self._window == window for entry in self._entry_of_step[step:])

    def _entries_of(self, index: int) -> list[tuple[int, bool]]:
        return self._entries[index * self._window : (index + 1) * self._window]

    def _window_of(self, index: int) -> MapWindow:
        key = tuple(self._entries_of(index))
        kept = self._cache.get(self._placement, key) if self._keeps else None
        if kept is not None:
            return kept
        self._cache.make_room(self._placement)
        computed = self._compute(key)
        self._cache.count(computed)
        if self._keeps:
            self._cache.put(self._placement, key, computed)
        return computed

    def _compute(self, entries: Sequence[tuple[int, bool]]) -> MapWindow:
        timesteps = [timestep for timestep, guided in entries for _ in range(_rows(guided))]
        # on a card, the windows of a schedule share what they are given: it is sent once, and stays in place
        if self._sent is None:
            self._sent = self._engine.to_device(self._hint), self._engine.to_device(self._tokens)
        hint, tokens = self._sent
        rows = tuple(_rows(guided) for _, guided in entries)
        if self._gathered[0] != rows:
            self._gathered = rows, self._engine.concatenate([(tokens, 0, count) for count in rows])
        tensors = self._engine.run(
            self._graph,
            {"hint": hint, "timestep": np.array(timesteps, np.float32), "tokens": self._gathered[1]},
        )
        return MapWindow(tensors, sum(self._engine.nbytes(tensor) for tensor in tensors.values()))


def _rows(guided: bool) -> int:
    """Sets of detail maps of one timestep."""
    return 2 if guided else 1

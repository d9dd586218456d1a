"""Loads the server's models on request, and unloads them to stay within one memory budget.

All of it happens in the server's event loop; only opening, closing and loading a model have threads. A model
that must leave gets no new requests, and leaves when the last of its requests is over: those that come
meanwhile wait until it is loaded again. So every model that is asked for gets its turn.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from engines.errors import AnyDoorError
from runtime.compositor import Compositor
from runtime.rpc import compositor_pb2 as pb
from runtime.server.batching import Batcher
from runtime.server.bundles import Bundles, Stamp
from runtime.server.call import Call
from runtime.server.events import (
    EngineLostError,
    LoadFailedError,
    LoadingError,
    ShuttingDownError,
    UnknownModelError,
)
from runtime.server.health import Health
from runtime.server.logs import FIELDS
from runtime.server.memory import give_back
from runtime.server.served_model import ServedModel

_AGAIN_SECONDS = 30.0
"""After a model could not be loaded, the time until a request makes the server try again."""

LOADED, LOADING, UNLOADED, FAILED = "loaded", "loading", "unloaded", "failed"

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Place:
    """A model of the server, loaded or not."""

    name: str
    current: ServedModel | None = None
    """Takes the requests."""
    loading: asyncio.Task[None] | None = None
    stamp: Stamp | None = None
    """Stamp of the bundle that was loaded last."""
    info: pb.GetModelInfoResponse | None = None
    failed: float = -math.inf
    """`time.monotonic()` when it could not be loaded."""
    used: float = 0.0
    """`time.monotonic()` when a request was last heard of."""

    @property
    def status(self) -> str:
        """The error for clients."""
        if self.current:
            loaded = self.current.batcher.loaded
            return LOADING if not loaded.done() else FAILED if loaded.exception() else LOADED
        return LOADING if self.loading else FAILED if self.has_failed else UNLOADED

    @property
    def has_failed(self) -> bool:
        """Whether it is too early to try again."""
        return time.monotonic() - self.failed < _AGAIN_SECONDS


class Models:
    """The loaded models, and their users."""

    def __init__(
        self, bundles: Bundles, serve: Callable[[str, Compositor], ServedModel], health: Health
    ) -> None:
        """Starts with none loaded; `add` the first.

        Args:
            bundles: all that may be.
            serve: starts what serves a model.
            health: is told which models can be used.
        """
        self.bundles = bundles
        self.lost = asyncio.Event()
        """Set when an engine has failed for good."""
        self._serve = serve
        self._health = health
        self._places = {name: _Place(name) for name in bundles.names}
        self._capacity = math.inf if bundles.budget is None else bundles.budget
        self._taken: dict[ServedModel | str, int] = {}
        """Bytes of each model that is there, and of the one of each name that is being opened."""
        self._room = asyncio.Lock()
        """Serialises requests for room."""
        self._changed = asyncio.Event()
        """Set, and replaced, when something is loaded, leaves, or is no longer used."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening: set[object] = set()
        self._stopped = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models; the first is the default."""
        return tuple(self._places)

    @property
    def alive(self) -> list[ServedModel]:
        """Those that have threads, also while they leave."""
        return [served for served in self._taken if isinstance(served, ServedModel)]

    @property
    def first(self) -> ServedModel:
        """The default, which is loaded when the server starts."""
        served = self._places[self.names[0]].current
        assert served
        return served

    def status(self, name: str) -> str:
        """loaded, loading, unloaded or failed."""
        return self._places[name].status

    def is_loaded(self, name: str) -> bool:
        """Returns whether a request need not wait for its model."""
        return self.status(name) == LOADED

    def total(self, name: str, of_one: Callable[[ServedModel], float]) -> float:
        """Returns a number of all that serves a model: also of those that leave."""
        return sum(of_one(served) for served in self.alive if served.name == name)

    def bytes_taken(self, name: str) -> int:
        """Returns the part of the budget that a model takes."""
        return int(self.total(name, lambda served: self._taken[served]))

    def find(self, name: str) -> str:
        """Returns the name of a model; that of the first if empty.

        Raises:
            UnknownModelError: there is none of that name.
        """
        if name and name not in self._places:
            raise UnknownModelError(name, self.names)
        return name or self.names[0]

    def add(self, name: str, compositor: Compositor) -> None:
        """Begins to serve a model that was opened before; it counts as the newest."""
        self._adopt(self._places[name], self._serve(name, compositor), self.bundles.cost(compositor.bundle))

    async def start(self) -> None:
        """Waits until the first model is loaded.

        Raises:
            AnyDoorError: it cannot be.
        """
        for name, reason in self.bundles.unusable.items():
            await self._note_failure(self._places[name], reason)
        # a server that is stopped meanwhile must not cancel the future, which the engine's thread will set
        await asyncio.shield(asyncio.wrap_future(self.first.batcher.loaded))

    # --- requests -----------------------------------------------------------------------------------------

    def check_accepting(self) -> None:
        """Refuses requests that would be refused when they are read.

        Raises:
            ShuttingDownError, EngineLostError: there will be no more.
            LoadingError: not yet.
        """
        if self._stopped:
            raise ShuttingDownError()
        if self.lost.is_set():
            raise EngineLostError()
        if not self._health.is_ready:
            raise LoadingError()

    @asynccontextmanager
    async def use(self, name: str, call: Call) -> AsyncIterator[ServedModel]:
        """Yields the model of a request; waits until it takes requests, and keeps it from leaving.

        Args:
            name: of the model; empty for the first.
            call: is told which it is.

        Raises:
            UnknownModelError: there is none of that name.
            LoadFailedError: it cannot be loaded.
            ShuttingDownError: it will not be.
        """
        place = self._places[self.find(name)]
        call.model = place.name
        while (served := place.current) is None or self._stopped:
            if self._stopped:
                raise ShuttingDownError()
            if place.has_failed:
                raise LoadFailedError()
            self._begin(place)
            await self._changed.wait()
        served.users += 1
        place.used = time.monotonic()
        try:
            yield served
        finally:
            served.users -= 1
            place.used = time.monotonic()
            self._tell()

    def use_any(self, call: Call) -> AbstractAsyncContextManager[ServedModel]:
        """Uses the most recently used loaded model, for work that is the same for all models; see `use`."""
        loaded = [place for place in self._places.values() if place.current]
        return self.use(max(loaded, key=lambda place: place.used).name if loaded else "", call)

    async def info(self, name: str, call: Call) -> pb.GetModelInfoResponse:
        """Describes a model; loads it if it was never loaded. Raises as `use`."""
        place = self._places[self.find(name)]
        call.model = place.name
        if place.current:
            return place.current.info(self.names)
        if place.info is None:
            async with self.use(place.name, call):
                pass
        assert place.info
        return place.info

    # --- loading ------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Loads the bundles again whose files have changed. Requests go on with the old ones, which then
        leave; a bundle that cannot be opened changes nothing."""
        for place in self._places.values():
            place.failed = -math.inf
            if place.stamp is not None and self.bundles.stamp(place.name) != place.stamp:
                self._spawn(self._reload(place))

    async def _reload(self, place: _Place) -> None:
        if place.loading:
            await asyncio.wait({place.loading})
        try:
            await asyncio.to_thread(self.bundles.open, place.name)
        except AnyDoorError as error:
            _log_error("model not reloaded", place.name, error)
            return
        place.info = None
        if place.current:
            self._begin(place)

    def _begin(self, place: _Place) -> None:
        place.loading = place.loading or self._spawn(self._load(place))

    async def _load(self, place: _Place) -> None:
        """Loads a model, in the place of the one that serves now, if there is one."""
        try:
            bundle = await self._in_thread(self.bundles.open, place.name)
            nbytes = await self._in_thread(self.bundles.cost, bundle)
            async with self._room:
                await self._make_room(nbytes)
                self._taken[place.name] = nbytes
            try:
                stamp = self.bundles.stamp(place.name)
                compositor = await self._in_thread(self.bundles.load, bundle)
                served = self._serve(place.name, compositor)
            finally:
                del self._taken[place.name]
            before = place.current
            self._adopt(place, served, nbytes, takes_requests=before is None)
            place.stamp = stamp
            del compositor, bundle
            try:
                await asyncio.shield(asyncio.wrap_future(served.batcher.loaded))
            except Exception:
                served.leaves = True
                self._spawn(self._retire(served))
                raise
            if before:
                place.current = served
                if not before.leaves:
                    self._spawn(self._retire(before))
            place.failed = -math.inf
            await self._health.note_model(place.name, works=True)
            logger.info("model loaded", extra={FIELDS: {"model": place.name, "bytes": nbytes}})
        except Exception as error:
            await self._note_failure(place, error)
        finally:
            place.loading = None
            self._tell()

    def _adopt(self, place: _Place, served: ServedModel, nbytes: int, takes_requests: bool = True) -> None:
        self._taken[served] = nbytes
        place.info = served.info(self.names)
        place.stamp = place.stamp or self.bundles.stamp(place.name)
        if takes_requests:
            place.current = served
        self.watch(served.batcher)
        self._tell()

    def watch(self, batcher: Batcher) -> None:
        """Sets `lost` when a batcher's engine fails for good."""
        loop = asyncio.get_running_loop()
        batcher.lost.add_done_callback(lambda _: loop.call_soon_threadsafe(self.lost.set))

    async def _make_room(self, nbytes: int) -> None:
        """Lets models leave until so many bytes are free: those without work first, of these the one whose
        last request is longest ago."""
        while sum(self._taken.values()) + nbytes > self._capacity:
            loaded = [place for place in self._places.values() if place.current]
            if loaded:
                await self._retire(min(loaded, key=_unneeded).current)
            else:
                await self._changed.wait()

    async def _retire(self, served: ServedModel | None) -> None:
        """Lets a model leave when the last of its requests is over."""
        assert served
        served.leaves, name = True, served.name
        if self._places[name].current is served:
            self._places[name].current = None
        while served.users and not self._stopped:
            await self._changed.wait()
        if self._stopped:
            return
        try:
            await asyncio.to_thread(served.close)
        except Exception as error:
            _log_error("model not unloaded", name, error)
        del self._taken[served], served
        await asyncio.to_thread(give_back)
        logger.info("model unloaded", extra={FIELDS: {"model": name}})
        self._tell()

    async def _note_failure(self, place: _Place, error: Exception) -> None:
        _log_error("model not loaded", place.name, error)
        if place.current is None or place.current.leaves:
            place.failed = time.monotonic()
            await self._health.note_model(place.name, works=False)

    async def _in_thread(self, work: Callable[..., Any], argument: object) -> Any:
        """Runs what may take long; the server's end need not wait for it."""
        key = object()

        def run() -> Any:
            self._opening.add(key)
            try:
                return work(argument)
            finally:
                self._opening.discard(key)

        return await asyncio.to_thread(run)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- the end ------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Refuses new requests from now on."""
        self._stopped = True
        self._tell()

    async def drain(self, seconds: float) -> bool:
        """Refuses new requests, finishes the accepted ones, then stops; see `Batcher.drain`."""
        self.refuse()
        end = time.monotonic() + seconds

        def drain(served: ServedModel) -> bool:
            return served.batcher.drain(end - time.monotonic())

        clean, drained = True, list[ServedModel]()
        # a model that is being loaded may begin to serve meanwhile
        while waiting := [served for served in self.alive if served not in drained]:
            clean &= all(await asyncio.gather(*(asyncio.to_thread(drain, served) for served in waiting)))
            drained += waiting
        for task in self._tasks:
            task.cancel()
        return clean

    @property
    def is_busy(self) -> bool:
        """Whether a thread runs."""
        return bool(self._opening) or any(served.batcher.is_busy for served in self.alive)


def _unneeded(place: _Place) -> tuple[bool, float]:
    """Sorts those first that should leave first."""
    return bool(place.current and place.current.users), place.used


def _log_error(event: str, model: str, error: Exception) -> None:
    logger.error(event, extra={FIELDS: {"model": model, "reason": str(error)}})

"""A real server for tests: in a thread of this process, on a real socket, with an engine that can be held."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.options import EngineOptions
from runtime.client import Client
from runtime.compositor import Compositor
from runtime.request import Request
from runtime.result import Composite
from runtime.rpc import compositor_pb2 as pb
from runtime.segmentation import Segmenter
from runtime.server.batching import Batcher
from runtime.server.serve import Server
from runtime.server.settings import Settings

PATIENCE = 60.0
"""Seconds after which a test that waits for something gives up."""


def png(array: NDArray[np.uint8]) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def scene_array(seed: int = 0, width: int = 80, height: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def object_array(seed: int = 1) -> NDArray[np.uint8]:
    """A picture with an opaque rectangle."""
    rgba = np.random.default_rng(seed).integers(0, 256, (40, 36, 4), np.uint8)
    rgba[..., 3] = 0
    rgba[8:32, 6:30, 3] = 255
    return rgba


SCENE = png(scene_array())
OBJECT = png(object_array())
BOX = (10, 8, 60, 50)


def message(steps: int = 2, **fields: Any) -> pb.CompositeRequest:
    """A request that any server accepts."""
    placement = pb.Placement(reference=OBJECT, box=pb.Box(x0=10, y0=8, x1=60, y1=50))
    given = {"scene": SCENE, "placements": [placement], "sampling": pb.Sampling(steps=steps), "seed": 7}
    return pb.CompositeRequest(**{**given, **fields})


def refusal(call: Any, *arguments: Any, **options: Any) -> Any:
    """The error of a call that must fail."""

    def outcome() -> object:
        result = call(*arguments, **{"timeout": PATIENCE, **options})
        return list(result) if hasattr(result, "__next__") else result

    with pytest.raises(grpc.RpcError) as caught:
        outcome()
    return caught.value


def trailing(error: Any) -> dict[str, str]:
    return dict(error.trailing_metadata())


def wait_until(condition: Callable[[], object]) -> None:
    """Polls, because what the server has received is nobody's event."""
    waited = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        if condition():
            return
        waited.wait(0.005)
    raise AssertionError("it never happened")


class HeldEngine:
    """A real engine whose calls are noted, and can be held and made to fail."""

    def __init__(self, engine: Engine, step_graph: str) -> None:
        self._engine = engine
        self._step_graph = step_graph
        self._held = False
        self._lost = False
        self._allowed = 0
        self._changed = threading.Condition()
        self.fails: Callable[[str, Mapping[str, Any]], bool] = lambda graph, inputs: False
        """Told the graph and its inputs before every call."""
        self.calls: list[tuple[str, list[float]]] = []
        """Graph, and the timesteps of the samples, of every call that has begun."""
        engine.observer = self._observe

    @contextmanager
    def _observe(self, action: str, graph: str, inputs: Mapping[str, Any]) -> Iterator[None]:
        if action == "run":
            self._begin(graph, inputs)
        yield

    def _begin(self, graph: str, inputs: Mapping[str, Any]) -> None:
        is_step = graph == self._step_graph
        with self._changed:
            self.calls.append((graph, inputs["timestep"].tolist() if is_step else []))
            self._changed.notify_all()
            if is_step and self._held:
                assert self._changed.wait_for(lambda: not self._held or self._allowed, PATIENCE)
                self._allowed -= 1
        if self.fails(graph, inputs):
            raise RuntimeError("the device caught fire")
        if self._lost:
            self._refuse()

    def _refuse(self, *arguments: object) -> NoReturn:
        raise RuntimeError("the device fell off the bus")

    def lose(self) -> None:
        """Lets nothing succeed any more, as a card does after a fault."""
        self._lost = True
        for method in ("to_device", "to_host"):
            setattr(self._engine, method, self._refuse)

    def hold(self) -> None:
        """Lets no further step begin."""
        with self._changed:
            self._held, self._allowed = True, 0

    def allow(self, steps: int) -> None:
        """Lets so many more begin."""
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()

    def release(self) -> None:
        """Lets all begin."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    @property
    def steps(self) -> list[list[float]]:
        """The timesteps of the samples, of every step that has begun."""
        with self._changed:
            return [timesteps for graph, timesteps in self.calls if graph == self._step_graph]

    def count(self, graph: str) -> int:
        with self._changed:
            return sum(name == graph for name, _ in self.calls)

    def wait_for_steps(self, count: int) -> None:
        """Until so many steps have begun."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: sum(graph == self._step_graph for graph, _ in self.calls) >= count, PATIENCE
            )


def held_compositor(bundle: Path, cache_bytes: int | None = None) -> tuple[Compositor, HeldEngine]:
    opened = Bundle.open(bundle)
    engine = open_engine(opened, EngineOptions(device="cpu", threads=1))
    return Compositor(opened, engine, cache_bytes), HeldEngine(engine, opened.manifest.step.name)


class ServerThread:
    """A server in a thread of its own; a context manager that is ready when entered."""

    def __init__(self, bundle: Path, /, **settings: Any) -> None:
        self.settings = Settings(**{"bundle": str(bundle), "listen": ("127.0.0.1:0",), **settings})
        self.compositor, self.engine = held_compositor(bundle)
        self.compositor.segmenter = Segmenter.load(*self.settings.segmenter)
        self.filler: Compositor | None = None
        if self.settings.filler:
            self.filler, self.filler_engine = held_compositor(Path(self.settings.filler))
        self.loop = asyncio.new_event_loop()
        self._ready: threading.Event = threading.Event()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> ServerThread:
        self._thread.start()
        self.server: Server = self.run(self._start())
        self.address = self.server.addresses[0]
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.release()
        self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()

    def run(self, work: Any) -> Any:
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def client(self, **settings: Any) -> Client:
        return Client(self.address, **{"timeout": PATIENCE, **settings})

    @property
    def batcher(self) -> Batcher:
        """Of the first model."""
        return self.server.models.first.batcher

    async def _start(self) -> Server:
        server = Server(self.compositor, self.settings, self.filler)
        await server.start()
        return server


def drawn_together(server: ServerThread, requests: Sequence[Request]) -> list[list[Composite]]:
    """The pictures of unlike requests that share the engine's calls: it starts when all are ready."""
    with server.client() as client, ThreadPoolExecutor() as pool:
        server.engine.hold()
        answers = [pool.submit(client.run, request) for request in requests]
        wait_until(lambda: sum(bool(ticket.job) for ticket in server.batcher.tickets) == len(requests))
        server.engine.release()
        return [answer.result() for answer in answers]

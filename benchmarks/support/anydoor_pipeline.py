"""The runtime as a contender of latency.py, with the time of every stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.contenders import HOST, LOAD, PASTE_BACK, PREPROCESSING, Run
from benchmarks.support.graphs import GRAPHS_OF, PER_STEP, ROW_INPUTS
from engines.engine import Engine
from runtime.request import Placement, Request, Sampling
from runtime.result import Composite

_SAMPLING_LOAD = "load while sampling"


class GraphTimer:
    """An engine's observer that adds up the seconds of loading, and seconds and rows of each graph's runs."""

    def __init__(self, engine: Engine) -> None:
        self.wait = engine.device == "cpu"
        """Whether to wait until a run is done; on a card, calls return before that."""
        self.seconds: dict[str, float] = {}
        """Graph -> seconds of its runs; and of loading graphs, in all and while sampling."""
        self.rows: dict[str, int] = {}
        """Graph -> rows that its runs evaluated."""
        self._engine = engine
        self._inside = 0.0
        """Seconds of the observations inside the current one."""

    @contextmanager
    def __call__(self, action: str, graph: str, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Time a load or a run."""
        before, self._inside = self._inside, 0.0
        started = time.perf_counter()
        yield
        if action == "run":
            # an engine that takes several steps at once is given the values of all of them
            per_row = ROW_INPUTS.get(graph, "")
            rows = int(np.size(inputs[per_row])) if per_row in inputs else 1
            self.rows[graph] = self.rows.get(graph, 0) + rows
        if action == "run" and self.wait and self._engine.device != "cpu":
            # a copy to the host waits for all work before it
            self._engine.to_host(self._engine.to_device(np.zeros(1, np.float32)))
        elapsed = time.perf_counter() - started
        # where the memory plan swaps graphs, some runs load first: that time is no part of a step
        self._add(LOAD if action == "load" else graph, elapsed - self._inside)
        if action == "load" and graph in PER_STEP:
            self._add(_SAMPLING_LOAD, elapsed)
        self._inside = before + elapsed

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class AnyDoorPipeline:
    """Composites with the runtime."""

    def __init__(self, run: Run) -> None:
        """Open the contender's bundle with its backend."""
        from engines.bundle import Bundle
        from engines.engine import open_engine
        from engines.options import EngineOptions
        from runtime.compositor import Compositor

        contender = run.contender
        bundle = Bundle.open(contender.bundle)
        precision = "bf16" if contender.precision == "bf16" else "fp32"
        options = EngineOptions(contender.backend, contender.device, precision, run.threads)
        engine = open_engine(bundle, options)
        self._timer = engine.observer = GraphTimer(engine)
        self._compositor = Compositor(bundle, engine)
        self.latent_shape = bundle.manifest.latent_shape

    @property
    def synchronous(self) -> bool:
        """See `Pipeline.synchronous`."""
        return self._timer.wait

    @synchronous.setter
    def synchronous(self, wait: bool) -> None:
        self._timer.wait = wait

    @property
    def rows(self) -> dict[str, int]:
        """See `Pipeline.rows`."""
        return self._timer.rows

    def clear(self) -> None:
        """Drop what is kept for later pictures."""
        self._compositor.clear()

    def run(
        self, scene: Any, placements: Sequence[Placement], noise: NDArray[np.float32], sampling: Sampling
    ) -> list[Composite]:
        """Composite; see `benchmarks.support.pytorch_pipeline.PyTorchPipeline.run`."""
        self._timer.seconds, self._timer.rows = {}, {}
        if len(placements) == 1:
            results = self._compositor.run(Request(scene, placements, None, sampling, len(noise), noise))
        else:
            results = self._run_together(scene, placements, noise, sampling)
        for result in results:
            result.seconds.update(self._timer.seconds)
        return results

    def _run_together(
        self, scene: Any, placements: Sequence[Placement], noise: NDArray[np.float32], sampling: Sampling
    ) -> list[Composite]:
        """As the server does with requests that arrive together: every step of all is one call."""
        compositor = self._compositor
        jobs = [
            compositor.accept(Request(scene, [placement], None, sampling, 1, noise[index : index + 1]))
            for index, placement in enumerate(placements)
        ]
        drawing = compositor.new_drawing()
        for job in jobs:
            drawing.start(job.images[0])
        watch = jobs[0].watch
        samples = list(drawing.running)
        while not all(sample.done for sample in samples):
            with watch.measure("sample"):
                drawing.step()
            for error in (sample.error for sample in samples if sample.error):
                raise error
        for sample, drawn in list(drawing.finished(samples)):
            drawing.running[sample].paste(drawn())
        for job in jobs[1:]:
            for stage, seconds in job.watch.seconds.items():
                watch.add(stage, seconds)
        return [job.results()[0] for job in jobs]


def stages_of(seconds: Mapping[str, float], system: str = "anydoor") -> dict[str, float]:
    """Return stage -> seconds, from what stopwatch and engine measured; see `contenders.STAGES`."""
    graphs = {graph: seconds.get(graph, 0.0) for graph in GRAPHS_OF[system]}
    inside = sum(graphs.get(graph, 0.0) for graph in PER_STEP) + seconds.get(_SAMPLING_LOAD, 0.0)
    return {
        PREPROCESSING: seconds.get("read", 0.0) + seconds.get("prepare", 0.0),
        **graphs,
        PASTE_BACK: seconds.get("paste", 0.0),
        LOAD: seconds.get(LOAD, 0.0),
        HOST: max(seconds.get("sample", 0.0) - inside, 0.0),
    }

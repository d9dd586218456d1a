"""Milliseconds of every graph, and of the step graph by batch, with capture as CUDA graphs and without."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from benchmarks.support.card.task import Row, Task, reason, repetitions
from benchmarks.support.graphs import CONTROL, DECODE, DENOISE, ID_ENCODER, ROW_INPUTS
from engines.bundle import Bundle
from engines.engine import Array, DeviceTensor, Engine, open_engine
from engines.spec import GraphSpec, sizes_for
from export.example_inputs import example_inputs

BATCHES = (1, 2, 4, 8, 16)

_CALLS = [(ID_ENCODER, 1), (CONTROL, 1), (DECODE, 1), *((DENOISE, samples) for samples in BATCHES)]
"""Graph and samples."""
_WARM_UP = 3
_MOST = 20
"""Repetitions."""
_SECONDS = 0.05
"""Least length of a repetition: as many calls as that takes, and one wait."""


def graph_times(task: Task) -> Iterator[Row]:
    """Measure every graph of the network; larger batches than its own with a manifest that allows them."""
    built = task.open_bundle()
    large = Bundle(built.path, replace(built.manifest, max_batch=max(BATCHES)))
    captures = (False, True) if task.device == "cuda" else (False,)
    left = len(captures) * len(_CALLS)
    for capture, bundle in itertools.product(captures, (built, large)):
        engine = open_engine(bundle, replace(task.engine_options, cuda_graphs=capture))
        for graph, samples in _CALLS:
            if (samples > built.manifest.max_batch) != (bundle is large):
                continue
            now = time.monotonic()
            until = now + (task.deadline - now) / left
            left -= 1
            row = {"graph": graph, "samples": samples, "capture": capture}
            try:
                yield row | _time(engine, bundle, graph, samples, until)
            except Exception as error:  # the library's own, mostly because memory ran out
                yield row | {"failure": reason(error)}
        del engine
        gc.collect()


def _time(engine: Engine, bundle: Bundle, graph: str, samples: int, until: float) -> Row:
    spec = bundle.manifest.specs[graph]
    host = _inputs(spec, bundle, samples)
    rows = int(np.size(host[ROW_INPUTS[graph]])) if graph in ROW_INPUTS else 1
    # as in a picture: what changes at every step comes from the host
    inputs = {
        name: array if name in spec.per_step else engine.to_device(array) for name, array in host.items()
    }
    run = partial(engine.run, graph, inputs)
    for _ in range(_WARM_UP):
        started = time.perf_counter()
        _wait(engine, run())
        once = time.perf_counter() - started
    calls = max(1, round(_SECONDS / max(once, 1e-6)))
    found = []
    for _ in repetitions(until, _MOST):
        started = time.perf_counter()
        for _ in range(calls):
            outputs = run()
        _wait(engine, outputs)
        found.append((time.perf_counter() - started) / calls)
    return {"seconds": median(found), "rows": {graph: rows}}


def _inputs(spec: GraphSpec, bundle: Bundle, samples: int) -> dict[str, Array]:
    noise = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)

    def draw(dtype: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        # gigabytes of them would take longer to draw than the graph to run
        return np.resize(noise, shape).astype(dtype)

    examples: dict[str, Any] = {
        tensor.name: partial(draw, tensor.dtype) for tensor in spec.inputs if len(tensor.shape) > 2
    }
    return example_inputs(spec, sizes_for(bundle.manifest.dimensions, samples), examples=examples)


def _wait(engine: Engine, outputs: dict[str, DeviceTensor]) -> None:
    """Wait for a run: a copy to the host comes after all work before it."""
    engine.to_host(min(outputs.values(), key=engine.nbytes))

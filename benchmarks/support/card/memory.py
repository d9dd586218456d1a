"""The card's memory, phase by phase, beside the memory plan; and the provider's scratch memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.support import example
from benchmarks.support.card.device_memory import used_gb
from benchmarks.support.card.task import Row, Task
from engines.backends.onnxruntime.cuda import scratch_memory
from engines.bundle import Bundle
from engines.card.engine import CardEngine
from engines.engine import Engine, open_engine
from engines.options import EngineOptions
from runtime import Compositor
from runtime.request import Sampling

BUDGET = 8_000_000_000
"""Bytes; what `--memory-budget 8G` allows, about."""

_STEPS = {"cuda": 50, "cpu": 2}


def device_memory(task: Task) -> Iterator[Row]:
    """Measure the memory within a budget."""
    bundle = task.open_bundle()
    budget = BUDGET if task.device == "cuda" else None
    options = EngineOptions(task.engine_options.backend, task.device, memory_budget=budget)
    yield from phases(bundle, options, _STEPS[task.device])


def phases(
    bundle: Bundle,
    options: EngineOptions,
    steps: int,
    opened: Callable[[Bundle, EngineOptions], Engine] = open_engine,
    used: Callable[[], float | None] = used_gb,
    scratch: Callable[[], tuple[int, int]] = scratch_memory,
) -> Iterator[Row]:
    """Go through what a process does with a bundle, and yield a row after each phase.

    Args:
        bundle: what is drawn with.
        options: how its graphs run.
        steps: of each picture.
        opened: opens the engine.
        used: returns the gigabytes of the card that are in use; None if unknown.
        scratch: returns the bytes of the provider's scratch memory, and the most that were in use.

    Yields:
        Rows with `phase`, `gb`, `planned_gb` (of the whole plan, None on a CPU), `scratch_gb` and
        `most_scratch_gb`.
    """
    planned: float | None = None

    def row(phase: str) -> Row:
        nbytes, most_used = scratch()
        return {
            "phase": phase,
            "gb": used(),
            "planned_gb": planned,
            "scratch_gb": nbytes / 1e9,
            "most_scratch_gb": most_used / 1e9,
        }

    yield row("before")
    engine = opened(bundle, options)
    planned = engine.plan.total / 1e9 if isinstance(engine, CardEngine) else None
    yield row("opened")
    for graph in bundle.manifest.specs:
        engine.load(graph)
        yield row(f"weights of {graph}")
    compositor = Compositor(bundle, engine)
    samples = bundle.manifest.max_batch
    for phase, count, brighter in (
        ("first picture", 1, 0),
        ("re-roll", 1, 0),
        ("another picture", 1, 1),
        (f"{samples} samples", samples, 2),
        (f"{samples} samples again", samples, 3),
        ("one more picture", 1, 4),
    ):
        sampling, placement = Sampling(steps=steps), example.placement(brighter)
        compositor.composite(example.SCENE, placement, seed=1, sampling=sampling, num_images=count)
        yield row(phase)

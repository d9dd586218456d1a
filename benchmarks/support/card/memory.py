"""The card's memory, phase by phase, beside the memory plan; and where the provider's scratch memory grew."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from benchmarks.support import example
from benchmarks.support.card.device_memory import used_gb
from benchmarks.support.card.task import Row, Task
from engines.backends.onnxruntime.engine import load_library
from engines.bundle import Bundle
from engines.card.engine import CardEngine
from engines.engine import Engine, open_engine
from engines.options import EngineOptions
from runtime import Compositor
from runtime.request import Sampling

BUDGET = 8_000_000_000
"""Bytes; what `--memory-budget 8G` allows, about."""

_STEPS = {"cuda": 50, "cpu": 2}
_GROWTH = re.compile(r"Extending BFCArena.*?num_bytes: (\d+).*?Extended allocation by (\d+) bytes", re.DOTALL)
_INFORMATION, _FATAL = 1, 4
"""Severities of ONNX Runtime's log; at the first it tells of every piece that its arena takes."""
_TOLD = "[I:onnxruntime"


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
) -> Iterator[Row]:
    """Go through what a process does with a bundle, and yield a row after each phase.

    Args:
        bundle: what is drawn with.
        options: how its graphs run.
        steps: of each picture.
        opened: opens the engine.
        used: returns the gigabytes of the card that are in use; None if unknown.

    Yields:
        Rows with `phase`, `gb`, `planned_gb` (of the whole plan, None on a CPU), and `grown`: for every piece
        that the provider's arena took in this phase, the bytes asked for and the bytes taken.
    """
    yield _row("before", used(), None, "")
    with _library_log() as log:
        engine = opened(bundle, options)
        # opening an engine has silenced the library
        load_library().set_default_logger_severity(_INFORMATION)
        planned = engine.plan.total if isinstance(engine, CardEngine) else None
        yield _row("opened", used(), planned, log())
        for graph in bundle.manifest.specs:
            engine.load(graph)
            yield _row(f"weights of {graph}", used(), planned, log())
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
            yield _row(phase, used(), planned, log())


def describe_growth(pieces: Iterable[tuple[int, int]]) -> str:
    """Return megabytes taken and asked for, of the pieces of a row."""
    return ", ".join(f"{taken / 1e6:.0f} for {asked / 1e6:.1f}" for asked, taken in pieces)


def _row(phase: str, gb: float | None, planned: int | None, log: str) -> Row:
    return {
        "phase": phase,
        "gb": gb,
        "planned_gb": None if planned is None else planned / 1e9,
        "grown": [[int(asked), int(taken)] for asked, taken in _GROWTH.findall(log)],
    }


@contextmanager
def _library_log() -> Iterator[Callable[[], str]]:
    """Gives a function that returns what ONNX Runtime has logged since it was last called.

    The library writes to the process's stderr. What others write there is passed on in the end.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        seen = 0

        def log() -> str:
            nonlocal seen
            text = os.pread(file.fileno(), os.fstat(file.fileno()).st_size - seen, seen)
            seen += len(text)
            return text.decode(errors="replace")

        try:
            yield log
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            load_library().set_default_logger_severity(_FATAL)
            seen = 0
            others = (line for line in log().splitlines() if _TOLD not in line)
            sys.stderr.writelines(f"{line}\n" for line in others)

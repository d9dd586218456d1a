"""What of a card's memory is ONNX Runtime's own, and which way of taking it takes least?

    python benchmarks/studies/card_memory.py                # on a card, about 20 s for each way
    python benchmarks/studies/card_memory.py --ways "as it is" reuse
    python benchmarks/studies/card_memory.py --device cpu   # rehearses it with the tiny network

Every way draws the same pictures in a process of its own, with all the memory that there is. Its rows are
those of card.py's part `memory`, phase by phase, and seconds of a re-roll and of a batch of samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    # the project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.support import example
from benchmarks.support.card.memory import describe_growth, phases
from benchmarks.support.card.models import fill_skeletons
from benchmarks.support.card.task import BACKEND, NETWORKS
from benchmarks.support.fingerprint import ROOT
from benchmarks.support.machine import describe
from benchmarks.support.markdown import Cell, Json, number, table
from benchmarks.support.results import require_writable, write_results
from engines.backends.onnxruntime.cuda import ALLOCATION, Allocation, open_card_engine
from engines.backends.onnxruntime.engine import devices, load_library
from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.errors import AnyDoorError
from engines.options import EngineOptions
from runtime import Compositor
from runtime.request import Sampling

WAYS: Mapping[str, Allocation] = {
    "as it is": ALLOCATION,
    "reuse": replace(ALLOCATION, reuse=True),
    "small cuBLAS": ALLOCATION,
    "arena": replace(ALLOCATION, own=False),
}
"""Name of a way to take memory -> what it is."""

_STEPS = {"cuda": 50, "cpu": 2}
_REPETITIONS = 3


def measure(way: str, bundles: Path, device: str) -> Json:
    """Measure one way in this process; returns `phases` and the seconds of a re-roll and of samples."""
    bundle = Bundle.open(bundles / NETWORKS[device])
    options, steps = EngineOptions(BACKEND, device), _STEPS[device]
    kept: list[Engine] = []
    if "cuBLAS" in way:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:2:16:8"

    def opened(bundle: Bundle, options: EngineOptions) -> Engine:
        opener: Callable[[Bundle, EngineOptions], Engine] = open_engine
        if device == "cuda":
            opener = partial(open_card_engine, load_library(), allocation=WAYS[way])
        kept.append(opener(bundle, options))
        return kept[0]

    rows = list(phases(bundle, options, steps, opened))
    from engines.backends.onnxruntime.cuda import _OF_THIS_PROCESS
    memory = _OF_THIS_PROCESS.memory
    heaps = {}
    if memory:
        for heap in ("weights", "scratch"):
            of = getattr(memory, heap)
            heaps[heap] = [of.nbytes, of.used, of.most_used, [(p.nbytes, p.free_bytes) for p in of._blocks.values()]]
    print(heaps, file=sys.stderr)
    compositor, sampling = Compositor(bundle, kept[0]), Sampling(steps=steps)
    seconds = {}
    for name, samples in (("re-roll", 1), ("samples", bundle.manifest.max_batch)):
        calls = []
        # the first prepares what the others keep
        for seed in range(_REPETITIONS + 1):
            started = time.perf_counter()
            compositor.composite(
                example.SCENE, example.placement(5), seed=seed, sampling=sampling, num_images=samples
            )
            calls.append(time.perf_counter() - started)
        seconds[name] = median(calls[1:])
    return {"way": way, "phases": rows, "seconds": seconds, "heaps": heaps}


def report(results: Sequence[Json]) -> str:
    """Return a line per phase and a column per way, in gigabytes; seconds; and what was asked for."""
    found = [of for of in results if "phases" in of]
    lines = [
        {"after": row["phase"], **{of["way"]: of["phases"][index]["gb"] for of in found}}
        for index, row in enumerate(found[0]["phases"] if found else [])
    ]
    columns: dict[str, Cell] = {"GB after": lambda line: line["after"]}
    for of in found:
        columns[of["way"]] = lambda line, way=of["way"]: number(line[way], 2)  # type: ignore[misc]
    text = table(lines, columns)
    for of in results:
        if "failure" in of:
            text += f"\n- {of['way']}: {of['failure']}\n"
            continue
        text += f"\n{of.get('heaps')}\n"
        seconds = ", ".join(f"{name} {value:.3f} s" for name, value in of["seconds"].items())
        grown = "; ".join(
            f"{row['phase']}: {describe_growth(row['grown'])}" for row in of["phases"] if row["grown"]
        )
        text += f"\n- {of['way']}: {seconds}. Scratch memory in MB, by phase: {grown or 'unknown'}\n"
    return text


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="card_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--device", choices=tuple(NETWORKS), default="cuda", help="cpu rehearses")
    result.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="default: all")
    result.add_argument(
        "--bundles", type=Path, default=Path("build/card"), metavar="DIR", help="as card.py's (%(default)s)"
    )
    result.add_argument(
        "--output", type=Path, default=Path("build/card-memory.json"), metavar="FILE", help="(%(default)s)"
    )
    result.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every way, and print and write what was found; returns 0, or 2 if it cannot."""
    options = parser().parse_args(arguments)
    try:
        if options.here:
            print(json.dumps(measure(options.ways[0], options.bundles, options.device)))
            return 0
        if options.device not in devices():
            raise AnyDoorError(f"the installed ONNX Runtime has no {options.device} provider")
        require_writable(options.output)
        fill_skeletons(options.bundles, options.device)
        results: list[dict[str, Any]] = []
        for way in options.ways:
            print(f"card_memory.py: {way}", file=sys.stderr, flush=True)
            results.append(_in_a_process(way, options))
            write_results(options.output, {"machine": describe(), "ways": results})
    except AnyDoorError as error:
        print(f"card_memory.py: {error}", file=sys.stderr)
        return 2
    print(report(results))
    return 0


def _in_a_process(way: str, options: argparse.Namespace) -> Json:
    # the library has one arena for a process
    command = [sys.executable, "-m", "benchmarks.studies.card_memory", "--here", "--ways", way]
    command += ["--device", options.device, "--bundles", str(options.bundles.resolve())]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"way": way, "failure": (done.stderr.strip().splitlines() or ["it was ended"])[-1]}
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Does a bundle's memory plan for a card hold? Found without one, on a card that computes nothing.

    pip install 'onnxruntime-gpu[cuda,cudnn]'    # 1.30 or later; and a C compiler and binutils
    python benchmarks/studies/card_plan.py build/engines/card
    python benchmarks/studies/card_plan.py build/card/full --memory-budget 8G   # card.py --prepare made it

ONNX Runtime's CUDA provider is the real one, and asks for the memory that it asks for on a card, but for
workspaces of convolutions. The libraries below it do nothing (benchmarks/support/empty_card.py). At full size
that takes 8 GB of memory. Device memory is what was allocated, and what is planned for the library itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # the project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.support import empty_card
from benchmarks.support.card.memory import phases
from benchmarks.support.card.page import memory_table
from benchmarks.support.fingerprint import ROOT
from benchmarks.support.measuring_process import measured
from engines.backends.onnxruntime import cuda
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import AnyDoorError
from engines.manifest import MANIFEST, read_manifest
from engines.memory_plan import CONTEXT
from engines.options import EngineOptions
from export.noise import fill, is_filled
from runtime.sizes import size_flag

_STEPS = 4


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="card_plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("bundle", type=Path, help="a bundle of ONNX graphs, or a skeleton, which is filled")
    result.add_argument("--memory-budget", type=size_flag, metavar="SIZE", help="as of anydoor composite")
    result.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw pictures and print the memory after each phase; returns 0, or 2 if it cannot."""
    options = parser().parse_args(arguments)
    try:
        if options.here:
            _draw(options.bundle, options.memory_budget)
            return 0
        if not is_filled(options.bundle):
            read_manifest(options.bundle / MANIFEST)
            fill(options.bundle)
        with tempfile.TemporaryDirectory() as folder:
            given = [str(options.bundle.resolve()), "--here"]
            if options.memory_budget is not None:
                given += ["--memory-budget", str(options.memory_budget)]
            environment = empty_card.build(Path(folder))
            rows = measured("benchmarks.studies.card_plan", *given, variables=environment, folder=ROOT)
            print(memory_table(list(rows), digits=3))
    except AnyDoorError as error:
        print(f"card_plan.py: {error}", file=sys.stderr)
        return 2
    return 0


def _draw(path: Path, budget: int | None) -> None:
    vars(cuda)["Device"] = empty_card.HostDevice

    def used() -> float:
        return (empty_card.HostDevice.allocated + CONTEXT) / 1e9

    options = EngineOptions("onnxruntime", "cuda", memory_budget=budget)
    for row in phases(Bundle.open(path), options, _STEPS, open_engine, used):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())

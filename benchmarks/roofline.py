"""How fast could it be? Compares operations and bytes of each graph with the most that a machine can do.

    python benchmarks/roofline.py --bundle build/engines/anydoor

Counts are taken from the ONNX graphs, for one picture with guidance. A graph cannot run faster than its
matrix products at the machine's full rate, nor faster than its weights, inputs and outputs can be moved once
(Williams et al., 2009): the longer of the two is its limit. This machine's rates are measured. The limits of
other machines are estimates from figures that their vendors publish; nothing ran on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.support.bundle_option import add_bundle_option
from benchmarks.support.contender_rounds import measure_rates
from benchmarks.support.contenders import PEAK, Contender, Run, Workload
from benchmarks.support.graph_costs import count_bundle
from benchmarks.support.limits import count_table, estimate_table, limit_table
from benchmarks.support.machine import cores
from engines.bundle import Bundle
from engines.errors import AnyDoorError
from runtime.errors import InputError


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="roofline.py",
        description="Operations and bytes of each graph of a bundle, and how fast they could run at most.",
        epilog="examples:\n"
        "  python benchmarks/roofline.py --bundle build/engines/anydoor\n"
        "  python benchmarks/roofline.py --bundle examples/anydoor-small --steps 20 --threads 2\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_bundle_option(result)
    result.add_argument("--steps", type=int, default=50, metavar="N", help="of a picture (default: 50)")
    result.add_argument(
        "--threads", type=int, default=cores(), metavar="N", help="CPU threads (default: all cores)"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print counts, the limit of this machine and estimates for others; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        for name in ("steps", "threads"):
            if getattr(options, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(options, name)}")
        bundle = Bundle.open(options.bundle)
        costs = count_bundle(bundle)
        run = Run(Workload(), Contender(PEAK), None, options.threads, 1, (), guidance_scale=1.0)
        peak = measure_rates(run)
    except AnyDoorError as error:
        print(f"roofline.py: {error}", file=sys.stderr)
        return 2
    print(f"one picture with guidance, {bundle.manifest.precision}, per call:\n{count_table(costs)}\n")
    print(f"{limit_table(costs, peak, options.steps)}\n")
    print(estimate_table(costs, bundle.manifest.precision, options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())

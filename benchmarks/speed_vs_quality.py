"""What does speed cost? Compares every sampling parameter, and the presets, with the exact picture.

    python benchmarks/speed_vs_quality.py
    python benchmarks/speed_vs_quality.py --bundle build/engines/anydoor --guidance-scale 5
    python benchmarks/speed_vs_quality.py --bundle build/engines/imprint-small

Held-out objects in held-out rooms, whose true pictures are known (support/truth_set.py). Every pair is
composited with all settings in turn, in one process and from the same noise, and nothing is kept from one
composite to the next. The time is that of the whole composite, relative to `exact` on the same pair; the
table has the median over the pairs. On a busy machine the ratio of the processor's time, of all threads, is
more reliable. Prints a table; writes a JSON file and a plot.

The unit is another seed: `exact` from other noise gives another picture that is as good. The change that a
setting makes is divided by the change that another seed makes, in the region that is drawn (root mean square
of pixels). The mean SSIM against the truth that it loses is divided in the same way. A preset has to keep the
limits in LIMITS (support/speed_vs_quality_report.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.support.baselines import exact_box
from benchmarks.support.bundle_option import EXAMPLE_BUNDLE
from benchmarks.support.identity import Gallery, identity_of
from benchmarks.support.machine import describe
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.speed_vs_quality_report import LIMITS, plot, table, verdicts
from benchmarks.support.trials import SettingResult, TrialRunner, settings, summarise
from benchmarks.support.truth_set import TruthPair, other_views, truth_pairs
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import AnyDoorError
from runtime import Compositor
from runtime.cli.flags import add_engine_flags, engine_options
from runtime.errors import InputError
from runtime.imaging.modes import MODES
from runtime.progress_bar import ProgressBar

EXAMPLES = """examples:
  python benchmarks/speed_vs_quality.py --count 8
  python benchmarks/speed_vs_quality.py --count 100 --output benchmarks/results/quality-small-cpu
"""


def gallery_of(pairs: Sequence[TruthPair], among: int, quiet: bool) -> Gallery | None:
    """Return the gallery of the pairs' objects, and of as many more as it needs; None if `among` is 0."""
    if not among:
        return None
    drawn = max(len(pairs), among)
    numbers = [pair.seed for pair in truth_pairs(drawn)]
    bar = ProgressBar(numbers, "drawing other views", leave=False, disable=quiet)
    return Gallery(
        {
            number: [identity_of(view.image[exact_box(view.mask).slices]) for view in other_views(number)]
            for number in bar
        },
        among,
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="speed_vs_quality.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--bundle", type=Path, default=EXAMPLE_BUNDLE, metavar="DIR")
    result.add_argument("--count", type=int, default=24, metavar="N", help="pairs (default: %(default)s)")
    result.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="of all settings (default: the model's)",
    )
    result.add_argument("--mode", choices=MODES, help="default: the model's")
    result.add_argument("--seed", type=int, default=7, metavar="S", help="of the first pair (default: 7)")
    result.add_argument(
        "--among",
        type=int,
        default=20,
        metavar="N",
        help="objects that one is recognised among; 0: leave recognition out (default: %(default)s)",
    )
    add_engine_flags(result)
    result.add_argument(
        "--output",
        type=Path,
        default=Path("build/speed_vs_quality"),
        metavar="FILE",
        help="results and plot, without .json and .png (default: %(default)s)",
    )
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[SettingResult]]:
    """Measure; returns the content of the results file, and the rows of the table.

    Raises:
        AnyDoorError: the bundle or a setting cannot be used.
    """
    if options.count < 1 or options.among == 1 or options.among < 0:
        raise InputError("--count is at least 1, --among at least 2, or 0")
    bundle = Bundle.open(options.bundle)
    engine = open_engine(bundle, engine_options(options))
    compositor = Compositor(bundle, engine)
    deque(compositor.load_graphs(), maxlen=0)
    todo = settings(options.guidance_scale, compositor.system.abilities.parameters)
    bar = ProgressBar(
        truth_pairs(options.count), "drawing", options.count, leave=False, disable=options.quiet
    )
    pairs = list(bar)
    gallery = gallery_of(pairs, options.among, options.quiet)
    runner = TrialRunner(compositor, options.mode, options.seed, gallery)
    # the first call of every shape is slower on some backends
    runner.run(pairs[0], 0, [todo[0], *todo[-len(LIMITS) :]], lambda: None)
    with ProgressBar(total=len(pairs) * len(todo), desc="compositing", disable=options.quiet) as progress:
        trials = [runner.run(pair, n, todo, progress.update) for n, pair in enumerate(pairs)]
    rows = summarise(todo, trials)
    seconds = [of_pair[0].seconds for of_pair in trials]
    return {
        "machine": describe(),
        "backend": engine.backend,
        "device": engine.device,
        "checkpoint": dict(bundle.manifest.checkpoint),
        "guidance_scale": compositor.defaults["guidance_scale"]
        if options.guidance_scale is None
        else options.guidance_scale,
        "mode": options.mode or compositor.defaults["mode"],
        "seed": options.seed,
        "among": options.among,
        "objects": [pair.seed for pair in pairs],
        "exact_seconds": statistics.median(seconds),
        "limits": {name: asdict(limit) for name, limit in LIMITS.items()},
        "rows": [asdict(row) for row in rows],
        "measurements": {
            setting.name: [asdict(trial) for trial in own] for setting, own in zip(todo, zip(*trials))
        },
    }, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 0, 1 if a preset does not keep its limits, 2 if something cannot be used."""
    options = parser().parse_args(arguments)
    results, picture = options.output.with_suffix(".json"), options.output.with_suffix(".png")
    try:
        require_writable(results)
        content, rows = run(options)
        write_results(results, content)
        plot(rows, picture)
    except (AnyDoorError, OSError) as error:
        print(f"speed_vs_quality.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(content['objects'])} pairs, exact: {content['exact_seconds']:.2f} s per picture")
    print(table(rows))
    found = verdicts(rows)
    print("\n".join(sentence for sentence, _ in found))
    print(f"{results}, {picture}")
    return 0 if all(kept for _, kept in found) else 1


if __name__ == "__main__":
    sys.exit(main())

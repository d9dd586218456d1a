"""What speed costs: every lever of `runtime.diffusion.presets` alone, and the presets, against the exact
picture.

    python benchmarks/quality.py python benchmarks/quality.py --bundle build/engines/anydoor --guidance-scale
    5 --output build/anydoor-quality

Held-out objects in held-out rooms, whose true pictures are known (benchmarks/truth_set.py). Every pair is
composited with all settings in turn, in one process and from the same noise, with nothing kept from the one
before; the time is that of the whole composite, relative to `exact` on the same pair, and the median over the
pairs. On a busy machine the ratio of the processor's time, of all threads, says more. Prints a table; writes
a JSON file and a plot.

The yardstick is another seed: `exact` from other noise gives another picture, which is as good. What a preset
changes is divided by what that changes, in the region that is drawn (root mean square of pixels), and so is
the mean SSIM against the truth that it loses. A preset has to stay below the limits in LIMITS.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.baselines import exact_box
from benchmarks.identity import Lineup, identity_of
from benchmarks.machine import describe
from benchmarks.similarity import region_psnr, region_ssim
from benchmarks.truth_set import TruthPair, other_views, truth_pairs
from engines.bundle import Bundle
from engines.engine import BACKENDS, DEVICES, Array, DeviceTensor, Engine, open_engine, run_step_by_step
from engines.errors import AnyDoorError
from engines.spec import CONTROL, DENOISE
from runtime import Compositor, Sampling
from runtime.diffusion.presets import QUALITIES
from runtime.errors import InputError
from runtime.imaging.collage import MODES

Picture = NDArray[np.uint8]

EXACT = "exact"
OTHER_SEED = "exact, other seed"
_SEED_OFFSET = 1_000_000

EXAMPLES = """examples:
  python benchmarks/quality.py --count 8
  python benchmarks/quality.py --count 100 --output benchmarks/results/quality-small-cpu
"""


@dataclass(frozen=True)
class Limit:
    """What a preset has to keep."""

    speed_up: float
    """At least."""
    change: float
    """At most, as a part of what another seed changes."""
    loss: float
    """Of SSIM against the truth at most, as a part of the mean difference that another seed makes."""


LIMITS = {"balanced": Limit(2.0, 0.25, 0.5), "fast": Limit(4.0, 0.5, 0.5)}


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    name: str
    lever: str
    """What is turned: settings of one lever are one line in the plot."""
    sampling: Sampling
    seed_offset: int = 0


def settings(guidance_scale: float) -> list[Setting]:
    """Everything that is measured, `exact` first."""
    exact = replace(QUALITIES[EXACT], guidance_scale=guidance_scale)

    def lever(name: str, label: str, field: str, values: Sequence[Any], **fixed: Any) -> Iterator[Setting]:
        for value in values:
            text = "-".join(map(str, value)) if isinstance(value, tuple) else value
            yield Setting(f"{label} {text}", name, replace(exact, **{field: value}, **fixed))

    return [
        Setting(EXACT, EXACT, exact),
        Setting(OTHER_SEED, "seed", exact, _SEED_OFFSET),
        *lever("DDIM, fewer steps", "ddim", "steps", (25, 20, 16, 12, 8)),
        *lever(
            "dpm_solver_2m, fewer steps",
            "dpm_solver_2m",
            "steps",
            (25, 20, 16, 12, 8),
            sampler="dpm_solver_2m",
        ),
        *lever("guidance interval", "guided", "guidance_interval", ((200, 999), (400, 999), (200, 800))),
        *lever("map timesteps", "maps", "map_steps", (25, 10, 5, 3)),
        *(
            Setting(name, "presets", replace(sampling, guidance_scale=guidance_scale))
            for name, sampling in QUALITIES.items()
            if name != EXACT
        ),
    ]


class CountingEngine:
    """An engine that counts what the UNet and the ControlNet evaluate."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rows = {CONTROL: 0, DENOISE: 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceTensor | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceTensor]:
        """See `Engine.run`."""
        if graph in self.rows:
            self.rows[graph] += len(inputs["timestep" if graph == CONTROL else "row_sample"])
        return self._engine.run(graph, inputs, outputs)

    def run_steps(self, *arguments: Any) -> dict[str, DeviceTensor]:
        """See `Engine.run_steps`."""
        return run_step_by_step(self, *arguments)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Measurement:
    """One composite."""

    seconds: float
    processor_seconds: float
    """Of all threads: what other programs take does not count."""
    unet_rows: int
    control_rows: int
    ssim: float
    psnr: float
    recognised: bool | None
    change: float
    """Root mean square of the pixels' difference to `exact` where the runtime draws, in levels of 255."""


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the pairs, but for the speed-up."""

    name: str
    lever: str
    sampling: dict[str, Any]
    speed_up: float
    """Median over the pairs of the time of `exact` / the time."""
    processor_speed_up: float
    """The same of the processor's time."""
    unet_rows: float
    control_rows: float
    ssim: float
    ssim_loss: float
    """Of `exact` minus its own, pair by pair."""
    ssim_loss_error: float
    """Standard error of that mean."""
    psnr: float
    recognised: float | None
    change: float
    """To `exact`, as a part of what another seed changes."""
    loss: float
    """`ssim_loss` as a part of the mean difference in SSIM that another seed makes."""


HEADER = (
    f"{'setting':<20} {'speed-up':>8} {'CPU time':>8} {'UNet':>5} {'control':>7} {'SSIM':>7} "
    f"{'loss':>16} {'PSNR':>8} {'known':>6} {'change':>7} {'loss':>6}"
)
_UNITS = (
    f"{'':<20} {'':>8} {'':>8} {'rows':>5} {'rows':>7} {'':>7} "
    f"{'of SSIM':>16} {'dB':>8} {'':>6} {'/ seed':>7} {'/ seed':>6}"
)


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [HEADER, _UNITS]
    for row in rows:
        known = "" if row.recognised is None else f"{row.recognised:.0%}"
        loss = f"{row.ssim_loss:+.4f} +- {row.ssim_loss_error:.4f}"
        lines.append(
            f"{row.name:<20} {row.speed_up:>7.2f}x {row.processor_speed_up:>7.2f}x "
            f"{row.unet_rows:>5.0f} {row.control_rows:>7.0f} {row.ssim:>7.4f} {loss:>16} "
            f"{row.psnr:>8.2f} {known:>6} {row.change:>7.2f} {row.loss:>+6.2f}"
        )
    return "\n".join(lines)


def verdicts(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """For every preset a sentence, and whether it keeps its limits."""
    found = []
    for name, limit in LIMITS.items():
        row = next(row for row in rows if row.name == name)
        kept = row.speed_up >= limit.speed_up and row.change <= limit.change and row.loss <= limit.loss
        found.append(
            (
                f"{name}: {row.speed_up:.2f}x (at least {limit.speed_up:g}), change {row.change:.2f} "
                f"(at most {limit.change:g}), loss {row.loss:+.2f} (at most {limit.loss:g}): "
                f"{'ok' if kept else 'OUT'}",
                kept,
            )
        )
    return found


class Meter:
    """Composites pairs with all settings."""

    def __init__(self, compositor: Compositor, mode: str, seed: int, lineup: Lineup | None) -> None:
        self._compositor, self._mode, self._seed, self._lineup = compositor, mode, seed, lineup
        self._engine = CountingEngine(compositor.engine)
        compositor.engine = self._engine

    def measure(
        self, pair: TruthPair, number: int, todo: Sequence[Setting], advance: Callable[[], object]
    ) -> list[Measurement]:
        """One measurement per setting; `exact` has to be the first. They are taken in turn, each time from
        another one on."""
        pictures: dict[int, tuple[Picture, float, float, int, int]] = {}
        start = number % len(todo)
        for index in (*range(start, len(todo)), *range(start)):
            pictures[index] = self._composite(pair, number, todo[index])
            advance()
        exact = pictures[0][0]
        return [self._judge(pair, exact, *pictures[index]) for index in range(len(todo))]

    def _composite(
        self, pair: TruthPair, number: int, setting: Setting
    ) -> tuple[Picture, float, float, int, int]:
        self._compositor.forget()
        self._engine.rows = {CONTROL: 0, DENOISE: 0}
        seed = self._seed + number + setting.seed_offset
        started, processor_started = time.perf_counter(), time.process_time()
        (result,) = self._compositor.run(pair.guessed, pair.placement(self._mode), seed, setting.sampling)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor_started
        return result.image, seconds, processor, self._engine.rows[DENOISE], self._engine.rows[CONTROL]

    def _judge(
        self,
        pair: TruthPair,
        exact: Picture,
        picture: Picture,
        seconds: float,
        processor_seconds: float,
        unet_rows: int,
        control_rows: int,
    ) -> Measurement:
        known = None
        if self._lineup:
            known = self._lineup.recognised(identity_of(picture[pair.box.slices]), pair.seed)["identity"]
        drawn = pair.hidden.slices
        difference = picture[drawn].astype(np.float64) - exact[drawn]
        return Measurement(
            seconds,
            processor_seconds,
            unet_rows,
            control_rows,
            region_ssim(picture, pair.truth, pair.box),
            region_psnr(picture, pair.truth, pair.box),
            known,
            float(np.sqrt(np.mean(difference**2))),
        )


def summarise(todo: Sequence[Setting], measured: Sequence[Sequence[Measurement]]) -> list[Row]:
    """One row per setting.

    Args:
        todo: the settings, `exact` first.
        measured: per pair, one measurement per setting.
    """
    by_setting = list(zip(*measured))
    exact = by_setting[0]
    other = by_setting[[setting.name for setting in todo].index(OTHER_SEED)]
    seed_change = _root_mean_square([m.change for m in other])
    seed_difference = statistics.fmean(abs(a.ssim - b.ssim) for a, b in zip(other, exact))
    rows = []
    for setting, own in zip(todo, by_setting):
        losses = [e.ssim - m.ssim for e, m in zip(exact, own)]
        loss = statistics.fmean(losses)
        known = [m.recognised for m in own if m.recognised is not None]
        rows.append(
            Row(
                name=setting.name,
                lever=setting.lever,
                sampling=asdict(setting.sampling),
                speed_up=statistics.median(e.seconds / m.seconds for e, m in zip(exact, own)),
                processor_speed_up=statistics.median(
                    e.processor_seconds / m.processor_seconds for e, m in zip(exact, own)
                ),
                unet_rows=statistics.fmean(m.unet_rows for m in own),
                control_rows=statistics.fmean(m.control_rows for m in own),
                ssim=statistics.fmean(m.ssim for m in own),
                ssim_loss=loss,
                ssim_loss_error=statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0,
                psnr=statistics.fmean(m.psnr for m in own),
                recognised=statistics.fmean(known) if known else None,
                change=_part(_root_mean_square([m.change for m in own]), seed_change),
                loss=_part(loss, seed_difference),
            )
        )
    return rows


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def _part(value: float, whole: float) -> float:
    return value / whole if whole else 0.0


def plot(rows: Sequence[Row], path: Path) -> None:
    """SSIM against the truth, and the change, over the speed-up; one line per lever."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    exact = rows[0]
    for axis, value in zip(axes, ("ssim", "change")):
        for lever in dict.fromkeys(row.lever for row in rows):
            own = [row for row in rows if row.lever == lever]
            points = sorted((row.speed_up, getattr(row, value)) for row in own)
            if lever == "presets":
                axis.plot(*zip(*points), marker="*", markersize=13, linestyle="", color="black", label=lever)
                for row in own:
                    axis.annotate(
                        f" {row.name}", (row.speed_up, getattr(row, value)), va="bottom", fontsize=9
                    )
            elif lever not in (EXACT, "seed"):
                axis.plot(*zip(*points), marker="o", markersize=4, label=lever)
        other = next(row for row in rows if row.name == OTHER_SEED)
        axis.axhline(getattr(other, value), color="grey", linestyle=":", label=OTHER_SEED)
        axis.plot([1], [getattr(exact, value)], marker="s", linestyle="", color="grey", label=EXACT)
        axis.set(xlabel="times as fast as exact")
    axes[0].set(ylabel="SSIM against the truth")
    axes[1].set(ylabel="change, as a part of what another seed changes", ylim=(0, None))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def lineup_of(pairs: Sequence[TruthPair], among: int, quiet: bool) -> Lineup | None:
    """Who is to be told apart: the objects of the pairs, and as many more as it takes; None for nobody."""
    if not among:
        return None
    drawn = max(len(pairs), among)
    numbers = [pair.seed for pair in truth_pairs(drawn)]
    bar = tqdm(numbers, "drawing other views", leave=False, disable=quiet)
    return Lineup(
        {
            number: [identity_of(view.image[exact_box(view.mask).slices]) for view in other_views(number)]
            for number in bar
        },
        among,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--bundle", type=Path, default=Path("examples/anydoor-small"), metavar="DIR")
    result.add_argument("--count", type=int, default=24, metavar="N", help="pairs (default: %(default)s)")
    result.add_argument(
        "--guidance-scale",
        type=float,
        default=2.0,
        metavar="G",
        help="of all settings (default: %(default)s)",
    )
    result.add_argument("--mode", choices=MODES, default="keep_background", help="default: %(default)s")
    result.add_argument("--seed", type=int, default=7, metavar="S", help="of the first pair (default: 7)")
    result.add_argument(
        "--among",
        type=int,
        default=20,
        metavar="N",
        help="recognise each object among so many; 0: do not (default: %(default)s)",
    )
    result.add_argument("--device", choices=DEVICES, default="auto")
    result.add_argument("--backend", choices=BACKENDS, default="auto")
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    result.add_argument(
        "--output",
        type=Path,
        default=Path("build/quality"),
        metavar="FILE",
        help="results and plot, without .json and .png (default: %(default)s)",
    )
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """All measurements, for the results file, and the rows of the table.

    Raises:
        AnyDoorError: the bundle or a setting cannot be used.
    """
    if options.count < 1 or options.among == 1 or options.among < 0:
        raise InputError("--count is at least 1, --among at least 2, or 0")
    bundle = Bundle.open(options.bundle)
    engine = open_engine(bundle, options.device, options.threads, backend=options.backend)
    compositor = Compositor(bundle, engine)
    for _ in compositor.load_graphs():
        pass
    todo = settings(options.guidance_scale)
    bar = tqdm(truth_pairs(options.count), "drawing", options.count, leave=False, disable=options.quiet)
    pairs = list(bar)
    meter = Meter(compositor, options.mode, options.seed, lineup_of(pairs, options.among, options.quiet))
    # the first call of every shape is slower on some backends
    meter.measure(pairs[0], 0, [todo[0], *todo[-len(LIMITS) :]], lambda: None)
    with tqdm(total=len(pairs) * len(todo), desc="compositing", disable=options.quiet) as progress:
        measured = [meter.measure(pair, n, todo, progress.update) for n, pair in enumerate(pairs)]
    rows = summarise(todo, measured)
    seconds = [measurement[0].seconds for measurement in measured]
    return {
        "machine": describe(),
        "backend": engine.backend,
        "device": engine.device,
        "checkpoint": dict(bundle.manifest.checkpoint),
        "guidance_scale": options.guidance_scale,
        "mode": options.mode,
        "seed": options.seed,
        "among": options.among,
        "objects": [pair.seed for pair in pairs],
        "exact_seconds": statistics.median(seconds),
        "limits": {name: asdict(limit) for name, limit in LIMITS.items()},
        "rows": [asdict(row) for row in rows],
        "measurements": {
            setting.name: [asdict(m) for m in own] for setting, own in zip(todo, zip(*measured))
        },
    }, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0, 1 if a preset does not keep its limits, 2 if something cannot be used."""
    options = parser().parse_args(arguments)
    try:
        content, rows = run(options)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        results, picture = options.output.with_suffix(".json"), options.output.with_suffix(".png")
        results.write_text(json.dumps(content, indent=1) + "\n")
        plot(rows, picture)
    except (AnyDoorError, OSError) as error:
        print(f"quality.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(content['objects'])} pairs, exact: {content['exact_seconds']:.2f} s per picture")
    print(table(rows))
    found = verdicts(rows)
    print("\n".join(sentence for sentence, _ in found))
    print(f"{results}, {picture}")
    return 0 if all(kept for _, kept in found) else 1


if __name__ == "__main__":
    sys.exit(main())

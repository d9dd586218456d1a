"""How long a picture takes, here and with plain PyTorch, side by side.

    python benchmarks/latency.py --size small

Every subject (this runtime on each backend that is there, and the same checkpoint as a PyTorch pipeline)
runs in processes of its own, one after the other and over again: A B C, A B C. So each start is a cold one,
the memory of one is not the memory of another, and what else the machine does meets all of them alike. From
the same noise they draw the same picture, which is checked.

Where fewer than 50 steps are taken, times at 50 steps are computed: the measured time, and the mean time of
a measured step for every step that is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from benchmarks.comparison import psnr
from benchmarks.latency_process import (
    ANYDOOR,
    BATCH,
    COLD,
    PEAK,
    PROBE,
    PYTORCH,
    REROLL,
    SAMPLES,
    Call,
    Plan,
    Subject,
    Visit,
)
from benchmarks.latency_report import LEAST_PSNR, REPORTED_STEPS, Findings, Row, as_results, plot, report
from benchmarks.machine import describe
from benchmarks.power import PowerMeter
from benchmarks.roofline import Peak, cores, count_bundle
from engines.bundle import Bundle
from engines.engine import BACKENDS, INFERENCE_PRECISIONS, choose_backend
from engines.errors import AnyDoorError, BackendError
from engines.spec import DENOISE
from runtime import huge_pages

BUILD = Path("build/latency")

_SEED = 1
_LARGEST_BATCH = 4


PLANS = {
    # large enough for attention and convolutions to dominate, small enough for two rounds in minutes
    "small": Plan(steps=5, extra_steps=5, cold_steps=5, rounds=2, pictures=2, extras_in=1, resolution=256),
    # a picture takes minutes on a CPU, and building the network takes its share of the half hour
    "full": Plan(
        steps=4, extra_steps=1, cold_steps=1, rounds=1, pictures=1, batch=False, extras_in=1, resolution=512
    ),
}


# --- what is measured -------------------------------------------------------------------------------------


def runtime_subjects(bundles: Sequence[Bundle], precisions: Sequence[str]) -> list[Subject]:
    """This runtime on every backend that is installed and runs a bundle; on a card, if there is one.

    Raises:
        BackendError: nothing does.
    """
    found: list[Subject] = []
    refusals = []
    for device in ("cuda", "cpu"):
        for bundle, backend, precision in itertools.product(bundles, BACKENDS[1:], precisions):
            dtype = bundle.manifest.precision if precision == "fp32" else precision
            subject = Subject(ANYDOOR, device, dtype, backend, str(bundle.path))
            try:
                choose_backend(bundle, device, backend, precision)
                _try_to_open(subject)
                found.append(subject)
            except AnyDoorError as error:
                refusals.append(str(error))
        if found:
            return found
    paths = ", ".join(f"'{bundle.path}'" for bundle in bundles)
    raise BackendError(f"nothing that is installed here runs {paths}: " + "; ".join(dict.fromkeys(refusals)))


def _try_to_open(subject: Subject) -> None:
    """In a process of its own: an engine that is open holds memory of the card.

    Raises:
        BackendError: it cannot be opened.
    """
    visit = Visit(Plan(), subject, None, threads=1, samples=1, scenarios=(PROBE,), guidance_scale=1.0)
    row = Row(subject)
    for _ in _lines(row, visit):
        pass
    if row.failure:
        raise BackendError(row.failure)


def pytorch_subjects(device: str, dtype: str, compiled: bool) -> list[Subject]:
    """The PyTorch pipeline, eager and perhaps compiled."""
    eager = Subject(PYTORCH, device, dtype)
    return [eager, replace(eager, compiled=True)] if compiled else [eager]


def fingerprint(*patterns: str) -> str:
    """Changes whenever one of the files does that a pattern in the repository names."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def seeded_model(size: str, bundles: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Checkpoint and bundle of a network with seeded weights: those of an earlier call, or new ones.

    Args:
        size: small or full.
        bundles: if any, those that were built of this checkpoint elsewhere.
    """
    from benchmarks.seeded import ARCHITECTURES, seeded_checkpoint
    from export.build_engines import BuildOptions, build_bundle
    from training.network.checkpoint import read_checkpoint

    weights = fingerprint("benchmarks/seeded.py", "training/network/official_keys.py")
    checkpoint = BUILD / f"{size}-{weights}.safetensors"
    if not checkpoint.exists():
        seeded_checkpoint(checkpoint, ARCHITECTURES[size], _SEED, quiet=False)
    if bundles:
        return checkpoint, list(bundles)
    graphs = fingerprint("training/network/modules.py", "export/*.py", "engines/spec.py", "engines/bundle.py")
    bundle = BUILD / f"{size}-{weights}-{graphs}"
    if not bundle.exists():
        started = time.monotonic()
        build_bundle(read_checkpoint(checkpoint), bundle, BuildOptions(resolution=PLANS[size].resolution))
        print(f"built {bundle} in {time.monotonic() - started:.0f} s, once", file=sys.stderr)
    return checkpoint, [bundle]


def find_model(options: argparse.Namespace) -> tuple[Path | None, list[Path]]:
    """Checkpoint, if there is one, and bundles.

    Raises:
        AnyDoorError: neither is named, or one cannot be used.
    """
    if options.size:
        return seeded_model(options.size, options.bundle)
    if options.checkpoint and not options.checkpoint.is_file():
        raise AnyDoorError(f"there is no checkpoint at '{options.checkpoint}'")
    if options.bundle:
        return options.checkpoint, options.bundle
    if options.checkpoint:
        from benchmarks.case_options import find_or_build

        return options.checkpoint, [find_or_build(options.checkpoint)]
    raise AnyDoorError(
        "say what to measure: --size small, or --bundle DIR, with --checkpoint FILE for PyTorch"
    )


# --- measuring --------------------------------------------------------------------------------------------


class Measurement:
    """All subjects, round after round."""

    def __init__(self, visit: Visit, subjects: Sequence[Subject], quiet: bool) -> None:
        self.rows = [Row(subject) for subject in subjects]
        self.peaks: dict[tuple[str, str], Peak] = {}
        """Device and dtype -> the best rates of all rounds."""
        self.power_source = ""
        self._visit = visit
        self._bar = tqdm(disable=quiet, unit="call", dynamic_ncols=True)

    def run(self) -> None:
        """Measures."""
        visit, plan = self._visit, self._visit.plan
        with tempfile.TemporaryDirectory() as folder, PowerMeter() as meter, self._bar:
            self.power_source = meter.source
            pictures = [Path(folder) / f"{index}.npy" for index in range(len(self.rows))]
            turns = [self._scenarios(number, row) for number in range(plan.rounds) for row in self.rows]
            self._bar.total = sum(1 + plan.pictures + _extra_calls(turn, plan) for turn in turns)
            for number in range(plan.rounds):
                self._measure_peaks()
                for row, picture in zip(self.rows, pictures):
                    if not row.failure:
                        scenarios = self._scenarios(number, row)
                        turn = replace(visit, subject=row.subject, scenarios=scenarios, picture=picture)
                        self._bar.set_description(f"round {number + 1}/{plan.rounds}, {row.subject.name}")
                        self._take_turn(row, turn, meter)
            self._compare(pictures)

    def _scenarios(self, number: int, row: Row) -> tuple[str, ...]:
        if number >= self._visit.plan.extras_in:
            return ()
        # plain PyTorch keeps nothing: a re-roll is a picture
        kept = (REROLL,) if row.subject.kind == ANYDOOR else ()
        return (*kept, SAMPLES, BATCH) if self._visit.plan.batch else (*kept, SAMPLES)

    def _take_turn(self, row: Row, visit: Visit, meter: PowerMeter) -> None:
        visit = replace(visit, started=time.monotonic())
        for line in _lines(row, visit):
            call = Call(**json.loads(line))
            row.calls.append(call)
            self._bar.update()
            joules = meter.joules(call.started, call.seconds)
            if joules is not None and call.scenario != COLD:
                row.joules.setdefault(call.scenario, []).append(joules / call.pictures)
        used = meter.device_mb(visit.started, time.monotonic())
        if used is not None:
            row.device_mb = max(row.device_mb or 0.0, used)

    def _measure_peaks(self) -> None:
        self._bar.set_description("the machine's rates")
        for device, dtype in {(row.subject.device, row.subject.array_dtype) for row in self.rows}:
            visit = replace(self._visit, subject=Subject(PEAK, device, dtype))
            row = Row(visit.subject)
            for line in _lines(row, visit):
                found = Peak(**json.loads(line))
                known = self.peaks.get((device, dtype), found)
                best = max(found.tflops, known.tflops), max(found.gbs, known.gbs)
                self.peaks[device, dtype] = replace(found, tflops=best[0], gbs=best[1])
            if row.failure:
                self._bar.write(f"the rates of {device} in {dtype} are not known: {row.failure}")

    def _compare(self, pictures: Sequence[Path]) -> None:
        drawn = {
            row.subject: np.load(picture) for row, picture in zip(self.rows, pictures) if picture.exists()
        }
        expected = next((drawn[s] for s in drawn if s.kind == PYTORCH), None)
        for row in self.rows:
            if expected is not None and row.subject in drawn:
                row.psnr = psnr(drawn[row.subject], expected, peak=255)


def _extra_calls(scenarios: Sequence[str], plan: Plan) -> int:
    return sum(plan.pictures if name == REROLL else 1 for name in scenarios)


def _lines(row: Row, visit: Visit) -> Iterator[str]:
    """What a visit prints, as it comes; if it fails, the row says so."""
    with tempfile.TemporaryFile("w+") as errors:
        with _start(visit, errors) as process:
            assert process.stdout is not None
            yield from process.stdout
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode:
        killed = "it was killed, for want of memory most likely" if process.returncode < 0 else ""
        row.failure = killed or (said[-1] if said else f"exit code {process.returncode}")


def _start(visit: Visit, errors: IO[str]) -> subprocess.Popen[str]:
    threads = str(visit.threads)
    variables: Mapping[str, str] = os.environ
    if visit.subject.kind == ANYDOOR:  # as the command `anydoor` starts itself
        variables = huge_pages.environment(os.environ) or os.environ
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.latency_process", visit.to_json()],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**variables, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
    )


# --- the command ------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="latency.py",
        description="Time, memory and energy of pictures: this runtime on every backend that is there, "
        "beside the same checkpoint in plain PyTorch.",
        epilog="examples:\n"
        "  python benchmarks/latency.py --size small\n"
        "  python benchmarks/latency.py --size full --steps 4\n"
        "  python benchmarks/latency.py --bundle examples/anydoor-small "
        "--checkpoint examples/anydoor-small.safetensors\n"
        "  python benchmarks/latency.py --bundle build/engines/anydoor --steps 20 --rounds 5\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--size", choices=tuple(PLANS), help="make a network of this size with seeded weights, and measure it"
    )
    result.add_argument(
        "--bundle",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="what the runtime runs; several of one network for different backends are measured side by side",
    )
    result.add_argument(
        "--checkpoint", type=Path, metavar="CKPT", help="what it was built from, for the PyTorch pipeline"
    )
    result.add_argument("--steps", type=int, metavar="N", help="steps of a picture that are really taken")
    result.add_argument("--rounds", type=int, metavar="N", help="turns of every subject")
    result.add_argument("--pictures", type=int, metavar="N", help="warm pictures per turn")
    result.add_argument("--guidance-scale", type=float, default=5.0, metavar="G", help="default: 5")
    result.add_argument("--threads", type=int, default=cores(), metavar="N", help="default: all cores")
    result.add_argument(
        "--precisions",
        nargs="+",
        choices=INFERENCE_PRECISIONS,
        default=["fp32"],
        help="of the runtime, where a backend has it (default: fp32)",
    )
    result.add_argument(
        "--pytorch-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: float32 on a CPU, float16 on a card",
    )
    result.add_argument(
        "--compiled", action="store_true", help="PyTorch compiled, too; takes a C compiler and minutes"
    )
    result.add_argument("--no-pytorch", action="store_true", help="this runtime alone")
    result.add_argument(
        "--results",
        type=Path,
        metavar="FILE.json",
        help="default: build/latency/NAME.json; the plot is beside it",
    )
    result.add_argument("--note", default="", metavar="TEXT", help="kept in the results file")
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def plan_of(options: argparse.Namespace) -> Plan:
    """How much is measured: what the size suggests, changed by flags.

    Raises:
        AnyDoorError: a number is not one.
    """
    plan = PLANS.get(options.size, Plan())
    if not np.isfinite(options.guidance_scale):
        raise AnyDoorError(f"--guidance-scale must be a number, not {options.guidance_scale}")
    for name in ("steps", "rounds", "pictures", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise AnyDoorError(f"--{name} must be at least 1, not {value}")
    if options.steps:
        extra = min(options.steps, plan.extra_steps) if options.size == "full" else options.steps
        cold = min(options.steps, plan.cold_steps) if options.size == "full" else options.steps
        plan = replace(plan, steps=options.steps, extra_steps=extra, cold_steps=cold)
    if options.rounds:
        plan = replace(plan, rounds=options.rounds)
    return replace(plan, pictures=options.pictures) if options.pictures else plan


def measure(options: argparse.Namespace) -> Findings:
    """What the command line asks for.

    Raises:
        AnyDoorError: it cannot be measured.
    """
    plan = plan_of(options)
    checkpoint, paths = find_model(options)
    bundles = [Bundle.open(path) for path in paths]
    subjects = runtime_subjects(bundles, options.precisions)
    device = subjects[0].device
    if checkpoint and not options.no_pytorch:
        dtype = options.pytorch_dtype or ("float32" if device == "cpu" else "float16")
        subjects += pytorch_subjects(device, dtype, options.compiled)
    visit = Visit(
        plan=replace(plan, resolution=bundles[0].manifest.model.resolution),
        subject=subjects[0],
        checkpoint=checkpoint,
        threads=options.threads,
        samples=min(_LARGEST_BATCH, *(bundle.manifest.max_batch for bundle in bundles)),
        scenarios=(),
        guidance_scale=options.guidance_scale,
    )
    machine = describe()
    measurement = Measurement(visit, subjects, options.quiet)
    measurement.run()
    # plans cannot be counted
    counted = next((b for b in bundles if b.graph_file(DENOISE).suffix == ".onnx"), None)
    return Findings(
        name=options.size or paths[0].name,
        plan=visit.plan,
        threads=options.threads,
        rows=measurement.rows,
        costs=count_bundle(counted) if counted else {},
        peaks=measurement.peaks,
        precision=counted.manifest.precision if counted else "",
        power_source=measurement.power_source,
        machine=machine,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 0, 1 if a subject failed or drew another picture, or 2."""
    options = parser().parse_args(arguments)
    try:
        findings = measure(options)
    except AnyDoorError as error:
        print(f"latency.py: {error}", file=sys.stderr)
        return 2
    print(report(findings))
    path = options.results or BUILD / f"{findings.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_results(findings, options.note), indent=1) + "\n", "utf-8")
    if any(row.staged for row in findings.rows):
        plot(findings.rows, REPORTED_STEPS[0], path.with_suffix(".png"))
    print(f"\n{path} and {path.with_suffix('.png')}")
    failed = [row for row in findings.rows if row.failure]
    wrong = [
        (row, least)
        for row in findings.compared_rows
        # not a number is no likeness either
        if row.psnr is not None and not row.psnr >= (least := LEAST_PSNR[row.subject.dtype])
    ]
    for row, least in wrong:
        print(f"{row.subject.name}: not the picture of PyTorch: {row.psnr:.1f} dB, {least:g} are expected")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())

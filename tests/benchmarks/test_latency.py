"""The latency command: what it computes from measured times, and a whole run on the smallest network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest

import benchmarks.latency
from benchmarks.latency import main, workload_of
from benchmarks.latency import parser as command_line
from benchmarks.seeded import TINY, seeded_checkpoint
from benchmarks.support import contender_rounds, example
from benchmarks.support.anydoor_pipeline import GraphTimer, stages_of
from benchmarks.support.contenders import (
    ANYDOOR,
    BATCH,
    COLD,
    LOAD,
    PEAK,
    PICTURE,
    PROBE,
    PYTORCH,
    REROLL,
    SAMPLES,
    STAGES,
    Call,
    Contender,
    Run,
    Workload,
)
from benchmarks.support.graph_costs import GraphCost
from benchmarks.support.graphs import GRAPHS_OF
from benchmarks.support.latency_report import format_report
from benchmarks.support.measurement import LEAST_PSNR, Measurement, Report, speedups
from benchmarks.support.peaks import Peak
from benchmarks.support.power import PowerMeter
from engines.engine import Observer
from engines.errors import AnyDoorError
from runtime.systems.inpainting import ENCODE
from runtime.systems.stable_diffusion import TEXT_ENCODER
from tests.support.anydoor import CONTROL, DECODE, DENOISE
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

Capture = pytest.CaptureFixture[str]


def call(
    scenario: str, steps: int, seconds: float, pictures: int = 1, control: float = 1.0, denoise: float = 2.0
) -> Call:
    """A call with so many seconds of detail maps and denoising in every step."""
    stages = dict.fromkeys(STAGES["anydoor"], 0.0) | {CONTROL: control * steps, DENOISE: denoise * steps}
    return Call(scenario, steps, pictures, 0.0, seconds, stages, peak_gb=None)


def test_missing_steps_cost_the_mean_of_a_measured_step() -> None:
    row = Measurement(Contender(ANYDOOR), [call(PICTURE, steps=4, seconds=20)])
    assert row.seconds(PICTURE, 4) == [20]
    assert row.seconds(PICTURE, 50) == [20 + 46 * 3]


def test_a_reroll_has_no_detail_maps_in_its_steps() -> None:
    row = Measurement(Contender(ANYDOOR), [call(PICTURE, 4, 20), call(REROLL, 1, 10, control=0.0)])
    assert row.typical(REROLL, 50) == pytest.approx(10 + 49 * 2)


def test_samples_are_counted_per_picture() -> None:
    row = Measurement(
        Contender(ANYDOOR), [call(PICTURE, 4, 20), call(SAMPLES, 1, 40, pictures=4, denoise=8.0)]
    )
    assert row.typical(SAMPLES, 50) == pytest.approx((40 + 49 * 9) / 4)


def test_waiting_for_the_stages_is_not_part_of_the_latency() -> None:
    """On a card every second call is slowed down by waiting, and the others tell no stages."""
    quick = Call(PICTURE, 10, 1, 0.0, 25.0, {}, None)
    row = Measurement(Contender(ANYDOOR, "cuda"), [quick, call(PICTURE, 10, 40)])
    assert row.seconds(PICTURE, 20) == [25 + 10 * 3]
    assert row.stage_calls(DENOISE) == [2]


def test_pictures_are_held_against_a_reference_in_single_precision_only() -> None:
    """A picture in FP32 cannot be told from one in half precision to 40 dB."""
    ours = [
        Measurement(Contender(ANYDOOR, precision=precision), [call(PICTURE, 10, 50)])
        for precision in ("fp32", "bf16", "fp16")
    ]
    for precision, expected in (("fp32", ["fp32", "bf16", "fp32"]), ("bf16", [])):
        pytorch = Measurement(Contender(PYTORCH, precision=precision), [call(PICTURE, 10, 100)])
        report = Report("x", Workload(), 1, [*ours, pytorch], {}, {}, "", "", {})
        assert [row.contender.precision for row in report.compared] == expected
    assert LEAST_PSNR["bf16"] < LEAST_PSNR["fp32"]


class SlowToLoad:
    """An engine that takes ten seconds to load a graph and one to run it, by a clock of its own."""

    device = "cpu"

    def __init__(self, load_inside_run: bool) -> None:
        self.now = 0.0
        self.observer: Observer | None = None
        self._loaded: set[str] = set()
        self._load_inside_run = load_inside_run

    def load(self, graph: str) -> None:
        if graph not in self._loaded:
            assert self.observer is not None
            with self.observer("load", graph, {}):
                self.now += 10.0
            self._loaded.add(graph)

    def run(self, graph: str) -> None:
        if not self._load_inside_run:
            self.load(graph)
        assert self.observer is not None
        with self.observer("run", graph, {}):
            self.load(graph)
            self.now += 1.0


@pytest.mark.parametrize("load_inside_run", [False, True])
def test_loading_a_graph_is_no_part_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, load_inside_run: bool
) -> None:
    """Where graphs are swapped, the first step of a picture loads; 49 more of them would not."""
    engine = SlowToLoad(load_inside_run)
    monkeypatch.setattr("benchmarks.support.anydoor_pipeline.time.perf_counter", lambda: engine.now)
    timer = engine.observer = GraphTimer(engine)  # type: ignore[arg-type]
    for graph in (CONTROL, DENOISE, CONTROL, DENOISE):
        engine.run(graph)
    sampling = engine.now + 0.5
    engine.run(DECODE)
    stages = stages_of({**timer.seconds, "sample": sampling})
    assert stages == dict.fromkeys(STAGES["anydoor"], 0.0) | {
        LOAD: 30,
        CONTROL: 2,
        DENOISE: 2,
        DECODE: 1,
        "host": 0.5,
    }


def test_the_reroll_of_plain_pytorch_is_a_picture() -> None:
    pytorch = Measurement(Contender(PYTORCH), [call(PICTURE, 10, 100), call(SAMPLES, 10, 400, pictures=4)])
    ours = Measurement(Contender(ANYDOOR), [call(PICTURE, 10, 50), call(REROLL, 10, 20)])
    assert speedups(ours, pytorch, 10) == {PICTURE: 2.0, REROLL: 5.0, SAMPLES: None, BATCH: None}
    assert speedups(pytorch, pytorch, 10)[REROLL] == 1.0


def test_what_the_host_does_between_the_graphs_is_a_stage() -> None:
    stages = stages_of({"read": 1, "prepare": 2, "sample": 10, CONTROL: 3, DENOISE: 5, "paste": 0.5})
    assert stages == dict.fromkeys(STAGES["anydoor"], 0.0) | {
        "pre-processing": 3,
        CONTROL: 3,
        DENOISE: 5,
        "paste-back": 0.5,
        "host": 2,
    }


def test_the_share_of_the_limit_is_printed_with_each_stage() -> None:
    row = Measurement(Contender(ANYDOOR, backend="onnxruntime"), [call(PICTURE, 10, 40)])
    report = Report(
        name="x",
        workload=Workload(steps=10),
        threads=1,
        measurements=[row],
        costs={
            graph: GraphCost(graph, 10**12, 0, 0, 0, 0)
            for graph in ("id_encoder", "control", "denoise", "decode")
        },
        peaks={("cpu", "fp32"): Peak("here", tflops=1.0, gbs=10.0, source="measured")},
        precision="fp32",
        power_source="",
        machine={},
    )
    printed = format_report(report)
    assert "1.0000 (100%)" in printed
    assert "2.0000 (50%)" in printed
    assert "extrapolated: pictures from 10 measured steps" in printed
    assert "ESTIMATE" in printed
    assert "J per picture" not in printed


def test_no_two_variants_of_the_example_share_anything_that_is_kept() -> None:
    references = [example.placement(variant).reference for variant in range(3)]
    assert len({array.tobytes() for array in references}) == 3  # type: ignore[union-attr]


def test_a_run_goes_through_json() -> None:
    run = Run(Workload(steps=3), Contender(PYTORCH, compiled=True), Path("a"), 2, 4, (REROLL,), 5.0, 1.5)
    assert Run.from_json(run.to_json()) == run


def test_steps_given_are_the_steps_taken() -> None:
    workload = workload_of(command_line().parse_args(["--size", "full", "--steps", "4"]))
    assert (workload.steps, workload.extra_steps, workload.cold_steps) == (4, 1, 1)
    workload = workload_of(command_line().parse_args(["--bundle", "b", "--steps", "7", "--rounds", "2"]))
    assert (workload.steps, workload.extra_steps, workload.cold_steps, workload.rounds) == (7, 7, 7, 2)


def measured(tmp_path: Path, *arguments: str) -> int:
    few = ["--steps", "2", "--rounds", "1", "--pictures", "1", "--threads", "1", "--quiet"]
    return main([*arguments, *few, "--results", str(tmp_path / "latency.json")])


@pytest.mark.slow
def test_a_run_leaves_tables_results_and_a_plot(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint)]
    assert measured(tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    for text in ("at 50 steps", "at 20 steps", "extrapolated", "PSNR dB", "GFLOP/s", "ESTIMATE, FP16"):
        assert text in printed
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "latency.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert results["machine"]["processor"]
    rows = {row["contender"]["backend"] or row["contender"]["kind"]: row for row in results["rows"]}
    assert {"onnxruntime", "pytorch"} <= rows.keys()
    ours = rows["onnxruntime"]
    assert {c["scenario"] for c in ours["calls"]} == {COLD, PICTURE, REROLL, SAMPLES, BATCH}
    assert {c["scenario"] for c in rows["pytorch"]["calls"]} == {COLD, PICTURE, SAMPLES, BATCH}
    for row in rows.values():
        assert row["psnr"] == "equal" or row["psnr"] >= 40
        assert not row["failure"]
        assert all(c["seconds"] >= sum(c["stages"].values()) for c in row["calls"])
    reroll = next(c for c in ours["calls"] if c["scenario"] == REROLL)
    assert reroll["stages"][CONTROL] == 0
    assert ours["summary"]["50 steps"]["p50"] > ours["summary"]["20 steps"]["p50"]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, pytest.param(9, marks=pytest.mark.nightly)])
def test_stable_diffusion_runs_beside_the_pipeline_of_diffusers(
    channels: Literal[4, 9], tmp_path: Path, capsys: Capture
) -> None:
    bundle = tiny_stable_diffusion_bundle(channels)
    checkpoint = bundle.with_name(f"{bundle.name}-checkpoint")
    assert measured(tmp_path, "--bundle", str(bundle), "--checkpoint", str(checkpoint)) == 0
    printed = capsys.readouterr().out
    assert "text_encoder ms" in printed
    assert CONTROL not in printed
    results = json.loads((tmp_path / "latency.json").read_text("utf-8"), parse_constant=pytest.fail)
    rows = {row["contender"]["backend"] or row["contender"]["kind"]: row for row in results["rows"]}
    assert {"onnxruntime", "pytorch"} <= rows.keys()
    encoded = [ENCODE] if channels == 9 else []
    for row in rows.values():
        assert row["psnr"] == "equal" or row["psnr"] >= 40
        picture = next(c for c in row["calls"] if c["scenario"] == PICTURE)
        assert {*STAGES["stable_diffusion"]} == picture["stages"].keys()
        graphs = [stage for stage in GRAPHS_OF["stable_diffusion"] if picture["stages"][stage]]
        assert graphs == [TEXT_ENCODER, *encoded, DENOISE, DECODE]
        assert all(c["seconds"] >= sum(c["stages"].values()) for c in row["calls"])
    reroll = next(c for c in rows["onnxruntime"]["calls"] if c["scenario"] == REROLL)
    assert reroll["stages"][TEXT_ENCODER] == reroll["stages"][ENCODE] == 0


@pytest.mark.slow
def test_what_fails_and_what_draws_another_picture_is_named_and_all_others_are_measured(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A bundle with damaged weights, and one that was not built from the checkpoint."""
    damaged, other = tmp_path / "damaged", tmp_path / "other.safetensors"
    shutil.copytree(tiny_bundle, damaged)
    weights = damaged / "decode.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    seeded_checkpoint(other, TINY, seed=5)
    bundles = ["--bundle", str(damaged), str(tiny_bundle)]
    assert measured(tmp_path, *bundles, "--checkpoint", str(other)) == 1
    printed = capsys.readouterr().out
    assert "decode.onnx.data is not the file that was built" in printed
    assert "not the picture of PyTorch" in printed
    assert "PyTorch eager" in printed.split("stage, s")[1]


class RecordedTurns:
    """Stands for the processes of contenders: each draws a picture, until it is stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stopped_after: int) -> None:
        self.events: list[str] = []
        self._left = stopped_after
        monkeypatch.setattr(contender_rounds, "measured", self.measured)
        monkeypatch.setattr(PowerMeter, "settle", lambda _: self.events.append("settled"))

    def measured(self, module: str, argument: str, variables: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        run = Run.from_json(argument)
        if run.contender.kind == PEAK:
            yield asdict(Peak("m", 1, 1, ""))
        elif PROBE not in run.scenarios:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            self.events.append("started")
            yield asdict(call(COLD, 2, 9.0))
            yield asdict(call(PICTURE, 2, 8.0))


def test_turns_that_were_done_stay_when_it_is_stopped(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    turns = RecordedTurns(monkeypatch, stopped_after=1)
    results = tmp_path / "latency.json"
    arguments = ["--bundle", str(tiny_bundle), "--no-pytorch", "--rounds", "2", "--quiet"]
    assert main([*arguments, "--results", str(results)]) == 130
    assert "the turns that were done are in the results" in capsys.readouterr().err
    first = json.loads(results.read_text("utf-8"))["rows"][0]
    assert [each["seconds"] for each in first["calls"]] == [9.0, 8.0]
    # the card's memory is read before each turn, without what the one before held
    assert turns.events == ["settled", "started", "settled"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say what to measure"),
        (["--bundle", "no/such/bundle"], "there is no bundle at 'no/such/bundle'"),
        (["--checkpoint", "none.safetensors"], "there is no checkpoint at 'none.safetensors'"),
        (["--checkpoint", "."], "'.' is a folder: give what was built from it, too, with --bundle"),
        (["--results", "/dev/null/x.json"], "cannot write '/dev/null/x.json'"),
    ],
)
def test_nothing_to_measure(arguments: list[str], sentence: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_without_installed_packages_it_says_what_to_run() -> None:
    """As in a new clone: no package of ours or of others can be imported."""
    command = [sys.executable, "-S", str(Path(benchmarks.latency.__file__)), "--size", "small"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("latency.py: the project is not installed: run 'make dev'")
    assert len(found.stderr.splitlines()) == 1


def test_no_steps() -> None:
    with pytest.raises(AnyDoorError, match="--steps must be at least 1, not 0"):
        workload_of(command_line().parse_args(["--size", "small", "--steps", "0"]))

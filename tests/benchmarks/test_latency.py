"""The latency command: what it computes from measured times, and a whole run on the smallest network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.latency import main, plan_of
from benchmarks.latency import parser as command_line
from benchmarks.latency_process import (
    ANYDOOR,
    BATCH,
    COLD,
    LOAD,
    PICTURE,
    PYTORCH,
    REROLL,
    SAMPLES,
    STAGES,
    Call,
    Plan,
    Subject,
    TimedEngine,
    Visit,
    placement,
    stages_of,
)
from benchmarks.latency_report import LEAST_PSNR, Findings, Row, report, speedups
from benchmarks.roofline import GraphCost, Peak
from benchmarks.seeded import TINY, seeded_checkpoint
from engines.errors import AnyDoorError
from tests.support.anydoor import CONTROL, DECODE, DENOISE

Capture = pytest.CaptureFixture[str]


def call(
    scenario: str, steps: int, seconds: float, pictures: int = 1, control: float = 1.0, denoise: float = 2.0
) -> Call:
    """A call with so many seconds of detail maps and denoising in every step."""
    stages = dict.fromkeys(STAGES, 0.0) | {CONTROL: control * steps, DENOISE: denoise * steps}
    return Call(scenario, steps, pictures, 0.0, seconds, stages, peak_gb=None)


def test_missing_steps_cost_the_mean_of_a_measured_step() -> None:
    row = Row(Subject(ANYDOOR), [call(PICTURE, steps=4, seconds=20)])
    assert row.seconds(PICTURE, 4) == [20]
    assert row.seconds(PICTURE, 50) == [20 + 46 * 3]


def test_a_reroll_has_no_detail_maps_in_its_steps() -> None:
    row = Row(Subject(ANYDOOR), [call(PICTURE, 4, 20), call(REROLL, 1, 10, control=0.0)])
    assert row.typical(REROLL, 50) == pytest.approx(10 + 49 * 2)


def test_samples_are_counted_per_picture() -> None:
    row = Row(Subject(ANYDOOR), [call(PICTURE, 4, 20), call(SAMPLES, 1, 40, pictures=4, denoise=8.0)])
    assert row.typical(SAMPLES, 50) == pytest.approx((40 + 49 * 9) / 4)


def test_waiting_for_the_stages_is_not_part_of_the_latency() -> None:
    """On a card every second call is slowed down by waiting, and the others tell no stages."""
    quick = Call(PICTURE, 10, 1, 0.0, 25.0, {}, None)
    row = Row(Subject(ANYDOOR, "cuda"), [quick, call(PICTURE, 10, 40)])
    assert row.seconds(PICTURE, 20) == [25 + 10 * 3]
    assert row.stage_calls(DENOISE) == [2]


def test_pictures_are_held_against_a_reference_in_single_precision_only() -> None:
    """A picture in FP32 cannot be told from one in half precision to 40 dB."""
    ours = [Row(Subject(ANYDOOR, dtype=dtype), [call(PICTURE, 10, 50)]) for dtype in ("fp32", "bf16", "fp16")]
    for dtype, expected in (("float32", ["fp32", "bf16", "float32"]), ("bfloat16", [])):
        pytorch = Row(Subject(PYTORCH, dtype=dtype), [call(PICTURE, 10, 100)])
        findings = Findings("x", Plan(), 1, [*ours, pytorch], {}, {}, "", "", {})
        assert [row.subject.dtype for row in findings.compared_rows] == expected
    assert LEAST_PSNR["bf16"] < LEAST_PSNR["fp32"]


class SlowToLoad:
    """An engine that takes ten seconds to load a graph and one to run it, by a clock of its own."""

    device = "cpu"

    def __init__(self) -> None:
        self.now = 0.0
        self.loaded: set[str] = set()

    def load(self, graph: str) -> None:
        self.now += 0.0 if graph in self.loaded else 10.0
        self.loaded.add(graph)

    def run(self, graph: str, inputs: object, outputs: object = None) -> dict[str, object]:
        self.load(graph)
        self.now += 1.0
        return {}


def test_loading_a_graph_is_no_part_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where graphs take turns, the first step of a picture loads; 49 more of them would not."""
    engine = SlowToLoad()
    monkeypatch.setattr("benchmarks.latency_process.time.perf_counter", lambda: engine.now)
    timed = TimedEngine(engine)  # type: ignore[arg-type]
    for graph in (CONTROL, DENOISE, CONTROL, DENOISE):
        timed.run(graph, {})
    sampling = engine.now + 0.5
    timed.run(DECODE, {})
    stages = stages_of({**timed.seconds, "sample": sampling})
    assert stages == dict.fromkeys(STAGES, 0.0) | {
        LOAD: 30,
        CONTROL: 2,
        DENOISE: 2,
        DECODE: 1,
        "host": 0.5,
    }


def test_the_reroll_of_plain_pytorch_is_a_picture() -> None:
    pytorch = Row(Subject(PYTORCH), [call(PICTURE, 10, 100), call(SAMPLES, 10, 400, pictures=4)])
    ours = Row(Subject(ANYDOOR), [call(PICTURE, 10, 50), call(REROLL, 10, 20)])
    assert speedups(ours, pytorch, 10) == {PICTURE: 2.0, REROLL: 5.0, SAMPLES: None, BATCH: None}
    assert speedups(pytorch, pytorch, 10)[REROLL] == 1.0


def test_what_the_host_does_between_the_graphs_is_a_stage() -> None:
    stages = stages_of({"read": 1, "prepare": 2, "sample": 10, CONTROL: 3, DENOISE: 5, "paste": 0.5})
    assert stages == dict.fromkeys(STAGES, 0.0) | {
        "pre-processing": 3,
        CONTROL: 3,
        DENOISE: 5,
        "paste-back": 0.5,
        "host": 2,
    }


def test_the_share_of_the_limit_is_printed_with_each_stage() -> None:
    row = Row(Subject(ANYDOOR, backend="onnxruntime"), [call(PICTURE, 10, 40)])
    findings = Findings(
        name="x",
        plan=Plan(steps=10),
        threads=1,
        rows=[row],
        costs={
            graph: GraphCost(graph, 10**12, 0, 0, 0, 0)
            for graph in ("id_encoder", "control", "denoise", "decode")
        },
        peaks={("cpu", "float32"): Peak("here", tflops=1.0, gbs=10.0, source="measured")},
        precision="fp32",
        power_source="",
        machine={},
    )
    printed = report(findings)
    assert "1.0000 (100%)" in printed
    assert "2.0000 (50%)" in printed
    assert "extrapolated: pictures from 10 measured steps" in printed
    assert "ESTIMATE" in printed
    assert "J per picture" not in printed


def test_no_two_variants_of_the_example_share_anything_that_is_kept() -> None:
    references = [placement(variant).reference for variant in range(3)]
    assert len({array.tobytes() for array in references}) == 3  # type: ignore[union-attr]


def test_a_visit_goes_through_json() -> None:
    visit = Visit(Plan(steps=3), Subject(PYTORCH, compiled=True), Path("a"), 2, 4, (REROLL,), 5.0, 1.5)
    assert Visit.from_json(visit.to_json()) == visit


def test_steps_given_are_the_steps_taken() -> None:
    plan = plan_of(command_line().parse_args(["--size", "full", "--steps", "4"]))
    assert (plan.steps, plan.extra_steps, plan.cold_steps) == (4, 1, 1)
    plan = plan_of(command_line().parse_args(["--bundle", "b", "--steps", "7", "--rounds", "2"]))
    assert (plan.steps, plan.extra_steps, plan.cold_steps, plan.rounds) == (7, 7, 7, 2)


def measured(tmp_path: Path, *arguments: str) -> int:
    few = ["--steps", "2", "--rounds", "1", "--pictures", "1", "--threads", "1", "--quiet"]
    return main([*arguments, *few, "--results", str(tmp_path / "latency.json")])


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
    rows = {row["subject"]["backend"] or row["subject"]["kind"]: row for row in results["rows"]}
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


def test_a_checkpoint_that_is_not_the_bundles_is_noticed(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other.safetensors"
    seeded_checkpoint(other, TINY, seed=5)
    assert measured(tmp_path, "--bundle", str(tiny_bundle), "--checkpoint", str(other)) == 1
    assert "not the picture of PyTorch" in capsys.readouterr().out


def test_a_subject_that_fails_is_named_and_the_others_are_measured(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_bundle, damaged)
    weights = damaged / "decode.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert measured(tmp_path, "--bundle", str(damaged), "--checkpoint", str(tiny_checkpoint)) == 1
    printed = capsys.readouterr().out
    assert "decode.onnx.data is not the file that was built" in printed
    assert "PyTorch eager" in printed.split("stage, s")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say what to measure"),
        (["--bundle", "no/such/bundle"], "there is no bundle at 'no/such/bundle'"),
        (["--checkpoint", "none.safetensors"], "there is no checkpoint at 'none.safetensors'"),
    ],
)
def test_nothing_to_measure(arguments: list[str], sentence: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_no_steps() -> None:
    with pytest.raises(AnyDoorError, match="--steps must be at least 1, not 0"):
        plan_of(command_line().parse_args(["--size", "small", "--steps", "0"]))

"""Time and peak memory of the parts of a picture, measured on a real bundle."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.footprint import Part, Recorder, main, table
from benchmarks.support.machine import reset_peak_memory
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

ROOT = Path(__file__).parents[2]
STEPS = 3

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example pictures are found from there."""
    monkeypatch.chdir(ROOT)


def arguments(bundle: Path, *more: str) -> list[str]:
    given = ["--bundle", str(bundle), "--steps", str(STEPS), "--threads", "1", "--backend", "onnxruntime"]
    return ["checkpoint.safetensors", "--reuse", *given, *more]


def test_every_call_of_a_graph_is_measured(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    results = tmp_path / "new" / "footprint.json"
    assert main(arguments(tiny_bundle, "--results", str(results))) == 0
    content = json.loads(results.read_text())
    assert "build" not in content
    assert content["processor"]
    parts = content["composite"]
    runs = Counter(part["name"] for part in parts if part["name"].endswith(": run"))
    assert runs == {
        f"{ID_ENCODER}: run": 1,
        f"{CONTROL}: run": STEPS,
        f"{DENOISE}: run": STEPS,
        f"{DECODE}: run": 1,
    }
    assert all(part["seconds"] >= 0 and part["peak_gb"] > 0.05 for part in parts)
    printed = capsys.readouterr().out
    assert f"compositing, {STEPS} steps" in printed
    assert all(name in printed for name in runs)


@pytest.mark.slow
def test_a_prompt_is_drawn_where_the_bundle_takes_prompts(tmp_path: Path) -> None:
    results = tmp_path / "footprint.json"
    bundle = tiny_stable_diffusion_bundle(9)
    assert main(arguments(bundle, "--prompt", "a cat", "--results", str(results))) == 0
    content = json.loads(results.read_text())
    assert content["command"].endswith(f"--prompt 'a cat' --results {results}")
    runs = Counter(part["name"] for part in content["composite"] if part["name"].endswith(": run"))
    # the scene and the scene without what is drawn over
    once = {"text_encoder: run": 1, "encode: run": 2, f"{DECODE}: run": 1}
    assert runs == {**once, f"{DENOISE}: run": STEPS}


def test_a_part_has_its_own_time_and_peak() -> None:
    recorder = Recorder()
    reset_peak_memory()
    size = 200_000_000
    for name in ("small", "large", "small again"):
        started = time.perf_counter()
        array = np.ones(size if name == "large" else 1, np.uint8)
        time.sleep(1.0 if name == "large" else 0)
        del array
        recorder.measure(name, started)
    small, large, again = recorder.parts
    assert large.seconds >= 1.0 > again.seconds
    assert large.peak_gb > max(small.peak_gb, again.peak_gb) + 0.15


def test_calls_of_one_name_are_one_line() -> None:
    parts = [Part("a", 1.0, 2.0), Part("b", 5.0, 1.0), Part("a", 3.0, 0.5)]
    lines = [line.split() for line in table(parts).splitlines()[1:]]
    assert lines == [["a", "2", "2.00", "2.00"], ["b", "1", "5.00", "1.00"], ["all", "9.00", "2.00"]]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--steps", "0"], "steps must be"),
        (["--memory-budget", "1K"], "raise --memory-budget"),
        (["--bundle", "none"], "there is no checkpoint at 'checkpoint.safetensors'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    tiny_bundle: Path, capsys: Capture, more: list[str], sentence: str
) -> None:
    assert main(arguments(tiny_bundle, *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("footprint.py: ")
    assert sentence in error

"""card.py: the whole rehearsal on the smallest network, what a part that fails leaves, and the limits."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import benchmarks.card
from benchmarks.card import SECONDS, find_bundles, main
from benchmarks.support.card import models
from benchmarks.support.card.graphs import BATCHES
from benchmarks.support.card.models import flops_per_row
from benchmarks.support.card.page import page
from benchmarks.support.card.pictures import PRESETS, SAME_BITS
from benchmarks.support.card.runner import Runner
from benchmarks.support.card.task import Task
from benchmarks.support.contenders import COLD, PICTURE, REROLL, SAMPLES
from benchmarks.support.fingerprint import fingerprint
from benchmarks.support.graph_costs import count_bundle
from benchmarks.support.peaks import Peak
from benchmarks.support.power import PowerMeter
from engines.backends.onnxruntime.engine import devices
from engines.bundle import Bundle
from engines.errors import AnyDoorError
from engines.manifest import MANIFEST, FileRecord
from runtime import Compositor
from tests.benchmarks.support.test_measuring_process import goes_on
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER
from tests.support.serving import wait_until
from training.network.architecture import Architecture

ROOT = Path(__file__).parents[2]

Capture = pytest.CaptureFixture[str]
Json = dict[str, Any]


@pytest.fixture
def bundles(tmp_path: Path, tiny_bundle: Path) -> Path:
    """What a rehearsal measures; of the bundle for parity there is only the manifest."""
    folder = tmp_path / "bundles"
    (folder / "any-fp32").mkdir(parents=True)
    (folder / "tiny").symlink_to(tiny_bundle)
    shutil.copy(tiny_bundle / MANIFEST, folder / "any-fp32")
    for name in ("tiny", "any-fp32"):
        (folder / f"{name}.fingerprint").write_text(fingerprint())
    return folder


def rehearsed(bundles: Path, output: Path, *arguments: str) -> Json:
    """The results of a rehearsal."""
    command = ["--device", "cpu", "--bundles", str(bundles), "--output", str(output), *arguments]
    assert main(command) == 0
    (path,) = output.glob("card-cpu-*.json")
    results: Json = json.loads(path.read_text("utf-8"))
    assert path.with_suffix(".md").read_text("utf-8") == page(results)
    return results


@pytest.mark.slow
def test_a_rehearsal_measures_all_that_a_cpu_can_and_a_part_that_fails_leaves_its_reason(
    bundles: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "benchmarks.support.card.runner._PATIENCE_SECONDS", 600.0
    )  # other tests run beside it
    results = rehearsed(bundles, tmp_path / "out", "--budget", "1")
    parts = {part["name"]: part for part in results["parts"]}
    assert list(parts) == list(SECONDS)
    failures = {name: part["failure"] for name, part in parts.items() if part["failure"]}
    assert failures == {"pytorch-compiled": "not measured: on a CPU compiling takes minutes"}

    ours = {row["scenario"]: row for row in parts["pictures"]["rows"]}
    assert ours.pop(SAME_BITS)["equal"]
    assert set(ours) == {COLD, PICTURE, REROLL, SAMPLES, *PRESETS}
    assert ours[PICTURE]["rows"] == {ID_ENCODER: 1, CONTROL: 4, DENOISE: 4, DECODE: 1}
    assert ours[REROLL]["rows"] == {DENOISE: 4, DECODE: 1}
    theirs = {row["scenario"]: row for row in parts["pytorch"]["rows"]}
    assert set(theirs) == {COLD, PICTURE, SAMPLES}
    assert theirs[PICTURE]["tflop"] == ours[PICTURE]["tflop"]
    assert all(row["seconds"] > 0 for row in (*ours.values(), *theirs.values()))

    graphs = [(row["graph"], row["samples"]) for row in parts["graphs"]["rows"] if row["seconds"] > 0]
    expected = [(ID_ENCODER, 1), (CONTROL, 1), (DECODE, 1), *((DENOISE, samples) for samples in BATCHES)]
    assert sorted(graphs) == sorted(expected)
    (parity,) = parts["parity"]["rows"]
    assert "constants.npz is missing" in parity["failure"]
    modes = [row["mode"] for row in parts["server"]["rows"]]
    assert modes == ["one at a time"] * 4 + ["static"] * 4 + ["continuous"] * 4
    assert [row["library"] for row in parts["tensorrt"]["rows"]] == ["TensorRT for RTX", "TensorRT"]
    printed = capsys.readouterr().out
    assert "## A server under load" in printed
    assert "| anydoor, onnxruntime, cpu, fp32 |" in printed


@pytest.mark.nightly
def test_a_rehearsal_compares_with_the_recordings(bundles: Path, small_bundle: Path, tmp_path: Path) -> None:
    shutil.rmtree(bundles / "any-fp32")
    (bundles / "any-fp32").symlink_to(small_bundle)
    [part] = rehearsed(bundles, tmp_path / "out", "--parts", "parity", "--budget", "1")["parts"]
    [row] = part["rows"]
    assert row["within"] == row["stages"] > 0


def test_results_of_the_same_day_stay(bundles: Path, tmp_path: Path) -> None:
    command = ["--device", "cpu", "--bundles", str(bundles), "--output", str(tmp_path / "out")]
    for _ in range(3):
        assert main([*command, "--parts", "tensorrt", "--budget", "1"]) == 0
    first, second, third = sorted((tmp_path / "out").glob("*.json"), key=lambda path: len(path.stem))
    assert {second.stem, third.stem} == {f"{first.stem}-2", f"{first.stem}-3"}
    assert len(list((tmp_path / "out").glob("*.md"))) == 3
    assert json.loads(first.read_text("utf-8"))["network"]["fingerprint"] == fingerprint()


def test_graphs_of_other_code_are_made_again_or_named(
    bundles: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    made: list[str] = []
    monkeypatch.setattr(models, "make", lambda _, name: made.append(name))
    find_bundles(bundles, "cpu")
    assert made == []
    (bundles / "tiny.fingerprint").write_text("0" * 12)
    find_bundles(bundles, "cpu")
    assert made == ["tiny"]

    def without_pytorch(folder: Path, name: str) -> None:
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr(models, "make", without_pytorch)
    shutil.rmtree(bundles / "any-fp32")
    find_bundles(bundles, "cpu")
    told = capsys.readouterr().err
    assert f"'{bundles / 'tiny'}' is of other code than this and cannot be made here, 'torch'" in told
    assert f"'{bundles / 'any-fp32'}' is missing and cannot be made here, 'torch'" in told


def test_what_is_made_notes_which_code_made_it(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "export.skeleton.build_skeleton",
        lambda _source, output, _options: shutil.copytree(tiny_bundle, output),
    )
    assert models.made_by(tmp_path / "tiny") == ""
    models.make(tmp_path, "tiny")
    assert models.made_by(tmp_path / "tiny") == fingerprint()


def test_the_first_part_does_not_count_what_others_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card with 30 GB in use, of which nvidia-smi tells after a second."""
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\nsleep 1\nwhile echo 50, 30000; do sleep 0.05; done\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with PowerMeter() as meter:
        (part,) = Runner(meter, None, {}).run(Task("nothing", "cpu", str(tmp_path), 1.0))
    assert part["device_gb"] == 0


@pytest.mark.slow
def test_stopped_by_the_system_it_takes_its_part_and_the_server_along(bundles: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(benchmarks.card.__file__)), "--device", "cpu", "--parts", "server"]
    command += ["--budget", "600", "--bundles", str(bundles), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    family: list[psutil.Process] = []
    try:
        while not any("serve" in each.cmdline() for each in family):
            assert process.poll() is None
            time.sleep(0.1)
            family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert "stopped; the parts that were done are in the results" in process.communicate()[1]
        assert process.returncode == 130
        wait_until(lambda: not any(goes_on(each.pid) for each in family))
    finally:
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def test_a_process_that_dies_is_told_by_its_last_words(tmp_path: Path) -> None:
    (part,) = Runner(PowerMeter(), None, {}).run(Task("nothing", "cpu", str(tmp_path), 1.0))
    assert part["failure"] == "KeyError: 'nothing'"
    assert part["rows"] == []


def test_the_limit_is_the_rows_operations_at_the_rated_speed() -> None:
    runner = Runner(PowerMeter(), Peak("m", tflops=100, gbs=1, source=""), {DENOISE: 1e12, DECODE: 2e12})
    row = runner.with_limit({"scenario": PICTURE, "seconds": 2.0, "rows": {DENOISE: 98, DECODE: 1}})
    assert (row["tflop"], row["limit"], row["share"]) == (100, 1.0, 0.5)
    # PyTorch counts no rows, and has the same limit
    assert runner.with_limit({"scenario": PICTURE, "seconds": 4.0, "rows": {}})["share"] == 0.25
    assert "limit" not in runner.with_limit({"library": "TensorRT"})


def test_operations_are_counted_in_plain_graphs(tiny_bundle: Path) -> None:
    flops, costs = flops_per_row(tiny_bundle), count_bundle(Bundle.open(tiny_bundle))
    assert flops[DENOISE] == costs[DENOISE].matrix_flops / 2
    assert flops[DECODE] == costs[DECODE].matrix_flops


def test_those_of_the_full_size_for_cards_are_known(small_modules: Compositor, tmp_path: Path) -> None:
    """A picture of 50 steps takes 114 TFLOP (docs/performance.md)."""
    manifest = small_modules.bundle.manifest
    # modules have no files, and a bundle has
    graphs = {
        name: replace(record, files=(FileRecord(f"{name}.onnx", 1, "0" * 64),))
        for name, record in manifest.graphs.items()
    }
    manifest = replace(manifest, target="cuda", graphs=graphs)
    (tmp_path / MANIFEST).write_text(manifest.to_json(), "utf-8")
    with pytest.raises(AnyDoorError, match="are not known"):
        flops_per_row(tmp_path)
    manifest = replace(manifest, architecture=asdict(Architecture()))
    (tmp_path / MANIFEST).write_text(manifest.to_json(), "utf-8")
    rows = {ID_ENCODER: 1, CONTROL: 100, DENOISE: 100, DECODE: 1}
    flops = flops_per_row(tmp_path)
    assert math.fsum(count * flops[graph] for graph, count in rows.items()) / 1e12 == pytest.approx(
        114, abs=1
    )


def test_it_needs_no_other_packages_than_those_that_it_names() -> None:
    """Its parts may import PyTorch and gRPC where they measure them."""
    blocked = ("torch", "onnx", "onnxscript", "tqdm", "grpc", "diffusers", "matplotlib", "safetensors")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({blocked}); import benchmarks.card;"
        "from benchmarks.support.card import graphs, parity, pictures, tensorrt"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_without_packages_it_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(Path(benchmarks.card.__file__))]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "card.py: the package 'numpy' is missing: pip install numpy pillow\n"


@pytest.mark.skipif("cuda" in devices(), reason="here it would run")
def test_without_a_card_it_says_so(tmp_path: Path, capsys: Capture) -> None:
    assert main(["--output", str(tmp_path)]) == 2
    assert "has no cuda provider: pip install onnxruntime-gpu, or rehearse" in capsys.readouterr().err


def test_a_budget_of_nothing(capsys: Capture) -> None:
    assert main(["--device", "cpu", "--budget", "0"]) == 2
    assert capsys.readouterr().err == "card.py: --budget must be more than 0, not 0\n"

"""`anydoor doctor`: what is installed, and whether a bundle is sound and fits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engines.bundle import Bundle
from engines.host_memory import plan_host_memory
from engines.registry import backends
from engines.verified import FileState
from runtime.cli import main
from runtime.cli.doctor import backend_versions

Capture = pytest.CaptureFixture[str]


def test_it_finds_a_sound_bundle(tiny_bundle: Path, capsys: Capture) -> None:
    assert main(["doctor", str(tiny_bundle), "--backend", "onnxruntime"]) == 0
    printed = capsys.readouterr().out
    assert all(backend in printed for backend in backends())
    assert "anydoor, fp32, 64 px, batch up to 4" in printed
    assert "defaults: those of the system" in printed
    assert "sound; largest error against PyTorch" in printed
    assert "runs on cpu with onnxruntime" in printed


def test_it_prints_the_defaults_of_a_bundle(tmp_path: Path, tiny_bundle: Path, capsys: Capture) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    content = json.loads((bundle / "manifest.json").read_text())
    content["defaults"] = {"guidance_scale": 2.5, "mode": "keep_background"}
    (bundle / "manifest.json").write_text(json.dumps(content))
    assert main(["doctor", str(bundle)]) == 0
    assert "defaults: guidance_scale 2.5, mode keep_background" in capsys.readouterr().out


def test_it_prints_the_memory_plan_of_a_budget(tiny_bundle: Path, capsys: Capture) -> None:
    """A byte less than all graphs together need: they are loaded in turn."""
    enough = plan_host_memory(Bundle.open(tiny_bundle), "onnxruntime", None).total
    command = ["doctor", str(tiny_bundle), "--backend", "onnxruntime", "--memory-budget"]
    assert main([*command, str(enough)]) == 0
    assert "loaded in turn" not in capsys.readouterr().out
    assert main([*command, str(enough - 1)]) == 0
    assert "loaded in turn" in capsys.readouterr().out
    assert main([*command, "1K"]) == 2
    assert "unusable: the bundle at" in capsys.readouterr().out


def test_it_reads_what_was_found_sound_before(tmp_path: Path, tiny_bundle: Path, capsys: Capture) -> None:
    """A disk may lose bits without a write, which leaves every time of the file as it was."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert main(["doctor", str(bundle)]) == 0
    file = bundle / "decode.onnx.data"
    file.write_bytes(b"x" * file.stat().st_size)
    record = json.loads((bundle / "manifest.json").read_text())["graphs"]["decode"]["files"][1]
    FileState.of(file, record["sha256"]).remember()
    Bundle.open(bundle).verify("decode")
    assert main(["doctor", str(bundle)]) == 2
    assert "decode.onnx.data is not the file that was built" in capsys.readouterr().out


def test_a_library_without_metadata_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was unpacked into a folder of the path, on a machine without a network."""
    (tmp_path / "abacus.py").touch()
    unpacked = tmp_path / "abacus-0.dist-info"
    unpacked.mkdir()
    (unpacked / "top_level.txt").write_text("abacus\n")
    monkeypatch.syspath_prepend(tmp_path)
    abacus = replace(backends()["openvino"], package="abacus")
    assert backend_versions(abacus) == "found"
    assert backend_versions(replace(abacus, package="none_of_that_name")) == "-"


def test_it_prints_the_plan_of_a_card_without_one(tiny_bundle: Path, capsys: Capture) -> None:
    """A budget is enough to plan with."""
    command = ["doctor", str(tiny_bundle), "--backend", "onnxruntime", "--device", "cuda"]
    assert main([*command, "--memory-budget", "1G"]) == 2
    printed = capsys.readouterr().out
    assert "MB scratch that the library shares among graphs" in printed
    assert "of a budget of 1000.0 MB" in printed


def test_it_finds_a_damaged_bundle(tmp_path: Path, tiny_bundle: Path, capsys: Capture) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "decode.onnx").write_bytes(b"x" * (bundle / "decode.onnx").stat().st_size)
    assert main(["doctor", str(bundle)]) == 2
    assert "unusable: the bundle at" in capsys.readouterr().out


def test_without_a_bundle_it_says_how_to_build_one(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    assert "build one with: anydoor build CHECKPOINT" in capsys.readouterr().out

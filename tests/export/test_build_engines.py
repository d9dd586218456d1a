"""The build command: what cannot be built is refused in one sentence and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.seeded import TINY
from engines.bundle import Bundle, sha256
from engines.errors import AnyDoorError
from engines.files import only_writer
from export.build_engines import main
from export.options import BuildOptions
from export.progress import Progress
from export.systems import open_source
from export.systems.system import ExportSource
from export.verification import TOLERANCE
from training.network.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line that a failing build prints."""
    assert main([str(argument) for argument in arguments] + ["--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_manifest_holds_source_hash_and_measured_errors(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.checkpoint == {"file": tiny_checkpoint.name, "sha256": sha256(tiny_checkpoint)}
    for graph, record in manifest.graphs.items():
        assert set(record.error) == {tensor.name for tensor in manifest.specs[graph].outputs}
        # an error of exactly zero would mean that nothing was compared; pictures in 256 levels may agree
        assert all(0 < error < TOLERANCE["fp32"] for name, error in record.error.items() if name != "image")
        assert record.build_seconds > 0


@pytest.mark.parametrize(("flags", "side"), [([], 96), (["--resolution", "64"], 64)])
def test_a_bundle_has_the_resolution_of_its_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], side: int
) -> None:
    """Unless a flag says otherwise. What is built is seen before it is built, which takes long."""
    path, sizes = tmp_path / "tiny.safetensors", []
    write_checkpoint(path, load_file(tiny_checkpoint), TINY, resolution=96)

    def look(source: ExportSource, output: Path, options: BuildOptions, progress: Progress) -> NoReturn:
        sizes.append(options.size)
        raise AnyDoorError("seen")

    monkeypatch.setattr("export.build_engines.build_bundle", look)
    assert main([str(path), *flags]) == 2
    assert sizes == [(side, side)]


@pytest.mark.parametrize(
    ("example", "side"), [("anydoor-small.safetensors", 128), ("imprint-small.safetensors.index.json", 96)]
)
def test_the_examples_say_their_resolution(example_checkpoint: Path, example: str, side: int) -> None:
    assert open_source(example_checkpoint.with_name(example)).size == (side, side)


def test_bundle_tells_nothing_of_the_machine_that_built_it(tiny_bundle: Path) -> None:
    """Exporters note Python stack traces on every node; they name the builder's files."""
    for path in tiny_bundle.glob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert b".py" not in content


def test_weight_that_is_not_a_number(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors = load_file(tiny_checkpoint)
    tensors["cond_stage_model.model.blocks.0.mlp.w3.bias"][3] = float("nan")
    write_checkpoint(tmp_path / "nan.safetensors", tensors, TINY)
    line = refused(capsys, tmp_path / "nan.safetensors", "--output", tmp_path / "bundle", "--resolution", 64)
    assert "not finite numbers (NaN or infinity): 'cond_stage_model.model.blocks.0.mlp.w3.bias'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


def test_wrong_key_set(tmp_path: Path, capsys: Capture) -> None:
    write_checkpoint(tmp_path / "other.safetensors", {"lora.up": torch.zeros(3)}, TINY)
    line = refused(capsys, tmp_path / "other.safetensors", "--output", tmp_path / "bundle")
    assert "is not an AnyDoor checkpoint: it has no model.diffusion_model.*" in line
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--resolution", 100, "--resolution must be a multiple of 16"),
        ("--resolution", 0, "--resolution must be a multiple of 16"),
        ("--resolution", 1_048_576, "--resolution must be at most 8192, not 1048576"),
        ("--max-batch", 0, "--max-batch must be from 1 to 4096, not 0"),
        ("--max-batch", 5000, "--max-batch must be from 1 to 4096, not 5000"),
        ("--unet-head-width", 0, "--unet-head-width must be at least 1, not 0"),
        ("--dino-heads", -2, "--dino-heads must be at least 1, not -2"),
    ],
)
def test_options_that_cannot_be_built(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture, option: str, value: int, sentence: str
) -> None:
    assert sentence in refused(capsys, tiny_checkpoint, "--output", tmp_path / "bundle", option, value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")]
)
def test_too_little_memory(
    tiny_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As NumPy says it, and as PyTorch does."""

    def build(*arguments: object) -> NoReturn:
        raise error

    monkeypatch.setattr("export.build_engines.build_bundle", build)
    assert refused(capsys, tiny_checkpoint) == (
        "build_engines.py: there is not enough memory to build it: give a smaller --resolution, or build it "
        "on a machine with more"
    )


def test_other_peoples_directories_are_not_replaced(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    assert "with other things in it" in refused(capsys, tiny_checkpoint, "--output", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_checkpoint_is_described_before_work_begins(tiny_checkpoint: Path, capsys: Capture) -> None:
    main([str(tiny_checkpoint), "--resolution", "100"])
    assert capsys.readouterr().out == (
        "checkpoint: AnyDoor, 2 million weights, float32: UNet predicts the noise; ID encoder DINOv2 of 1 "
        "layers, 32 wide\n"
    )


def test_no_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "none.safetensors"
    assert refused(capsys, path) == f"build_engines.py: there is no checkpoint at '{path}'"


def test_runs_as_a_script() -> None:
    command = [sys.executable, str(ROOT / "export" / "build_engines.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == ("build_engines.py: give a checkpoint or a bundle to build from, or --skeleton\n")


def test_output_that_nobody_reads(tiny_checkpoint: Path) -> None:
    """As before `| head -0`: the command ends as soon as it has something to say."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "export" / "build_engines.py"), str(tiny_checkpoint)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_folders_that_cannot_be_read_are_told(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of all files can read them, and may run the tests: reading fails by other means."""
    too_long = tmp_path / ("a" * 300)
    sentence = f"build_engines.py: cannot read or write '{too_long}': {os.strerror(errno.ENAMETOOLONG)}"
    assert refused(capsys, too_long) == sentence
    assert refused(capsys, tiny_checkpoint, "--output", too_long) == sentence

    def forbidden(folder: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(Path, "iterdir", forbidden)
    sentence = f"build_engines.py: cannot read or write '{tmp_path}/closed': {os.strerror(errno.EACCES)}"
    assert refused(capsys, tmp_path / "closed") == sentence
    assert refused(capsys, tiny_checkpoint, "--output", tmp_path / "closed") == sentence


def test_two_builds_do_not_step_on_each_other(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    with only_writer(tmp_path / "bundle"):
        line = refused(capsys, tiny_checkpoint, "--output", tmp_path / "bundle", "--resolution", 64)
    assert f"process {os.getpid()} is writing there; wait for it, or give another --output" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    """A limit on the size of files stops the writing in the middle, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        line = refused(capsys, tiny_checkpoint, "--output", tmp_path / "bundle", "--resolution", 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"build_engines.py: cannot build '{tmp_path}/bundle': {os.strerror(errno.EFBIG)}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="what runs in the background has no Ctrl-C"
)
def test_ctrl_c_leaves_nothing_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--output", str(tmp_path / "bundle"), "--resolution", "64"]
    command = [sys.executable, str(ROOT / "export" / "build_engines.py"), str(tiny_checkpoint), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        next(line for line in lines if "exporting" in line)
        process.send_signal(signal.SIGINT)
        assert list(lines)[-1] == "build_engines.py: interrupted; nothing was written\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_replaced_by_a_bundle(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    assert "is a file" in refused(capsys, tiny_checkpoint, "--output", tmp_path / "thesis.txt")
    assert "there is no checkpoint" in refused(capsys, tmp_path / "a", "--output", tmp_path / "b")


@pytest.mark.nightly
def test_a_checkpoint_in_shards_is_built(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    """In eight bits, with averages and with a key that nobody needs."""
    tensors = {
        key: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for key, t in load_file(tiny_checkpoint).items()
    }
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor.clone()
        for key, tensor in tensors.items()
        if key.startswith("model.")
    }
    (tmp_path / "tiny").mkdir()
    parts = {"a-00001-of-00002.safetensors": tensors, "a-00002-of-00002.safetensors": averages}
    for name, part in parts.items():
        write_checkpoint(tmp_path / "tiny" / name, {"scale_factor": torch.ones(1), **part}, TINY)
    places = {key: name for name, part in parts.items() for key in part}
    index = {"weight_map": {**places, "scale_factor": "a-00001-of-00002.safetensors"}}
    (tmp_path / "tiny" / "a.safetensors.index.json").write_text(json.dumps(index))
    options = ["--ema", "--output", str(tmp_path / "bundle"), "--resolution", "64", "--quiet"]
    assert main([str(tmp_path / "tiny"), *options]) == 0
    assert "no part needs 1 of its keys ('scale_factor')" in capsys.readouterr().out
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.checkpoint["file"] == "tiny"
    assert all(max(record.error.values()) < TOLERANCE["fp32"] for record in manifest.graphs.values())

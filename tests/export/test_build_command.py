"""`anydoor build`: its defaults, what does not go together, and what it says where there is no PyTorch."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import Bundle
from engines.errors import AnyDoorError
from export.build_engines import build_options, summary
from export.flags import add_arguments, parse_default, parse_targets
from export.options import DETERMINISTIC_CUDA, BuildOptions
from runtime.cli import main

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("guidance_scale=2", "guidance_scale", 2),
        ("crop_ratio=1.3", "crop_ratio", 1.3),
        ("mode=keep_background", "mode", "keep_background"),
        ('mode="shape"', "mode", "shape"),
        ("guidance_interval=[200, 999]", "guidance_interval", [200, 999]),
        ("map_steps=null", "map_steps", None),
    ],
)
def test_defaults_are_json_or_plain_strings(text: str, name: str, value: Any) -> None:
    assert parse_default(text) == (name, value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("guidance_scale", "'guidance_scale' is not NAME=VALUE, like guidance_scale=2"),
        ("guidance=2", "there is no parameter 'guidance': did you mean 'guidance_scale'?"),
        ("guidance_scale=NaN", "guidance_scale is NaN: expected a finite number"),
        ("guidance_scale=1e999", "guidance_scale is 1e999: expected a finite number"),
        ("guidance_interval=[NaN,0.9]", "guidance_interval is [NaN,0.9]: expected a finite number"),
        ("zzz=2", "there is no parameter 'zzz': choose one of steps, guidance_scale"),
    ],
)
def test_defaults_that_no_parameter_can_have(text: str, sentence: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        parse_default(text)
    assert str(refusal.value).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "targets"),
    [("any", ("any",)), ("SM89, sm86", ("sm89", "sm86")), ("sm86,sm89,sm86", ("sm86", "sm89"))],
)
def test_targets_count_once(text: str, targets: tuple[str, ...]) -> None:
    assert parse_targets(text) == targets


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no target is named: give it like sm86,sm89, or leave --targets out"),
        ("sm86,", "'sm86,' does not name a target between all commas: give it like sm86,sm89"),
    ],
)
def test_targets_without_a_name(text: str, sentence: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        parse_targets(text)
    assert str(refusal.value) == sentence


def test_flags_are_the_options_of_the_build() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = ["--backend=onnxruntime", "--precision=fp16", "--max-batch=2", "--resolution=64"]
    defaults = ["--default", "guidance_scale=2", "--default", "mode=keep_background"]
    assert build_options(parser.parse_args(["a.ckpt", *flags, *defaults])) == BuildOptions(
        "onnxruntime", "fp16", 2, 64, defaults={"guidance_scale": 2, "mode": "keep_background"}
    )
    same_bits = parser.parse_args(["a.ckpt", "--backend=onnxruntime", "--targets=cuda", "--deterministic"])
    assert build_options(same_bits).rules == DETERMINISTIC_CUDA
    with pytest.raises(AnyDoorError, match="--deterministic needs --backend onnxruntime --targets cuda"):
        build_options(parser.parse_args(["a.ckpt", "--targets=any", "--deterministic"]))
    plans = parser.parse_args(["a.ckpt", "--backend=tensorrt", "--targets=SM87,sm89"])
    assert build_options(plans) == BuildOptions("tensorrt", "fp16", targets=("sm87", "sm89"))


def test_the_summary_tells_system_and_defaults(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    lines = summary(replace(manifest, defaults={"guidance_scale": 2, "mode": "keep_background"})).splitlines()
    assert lines[0] == "system: anydoor, fp32, 64 px, batch up to 4"
    assert lines[1] == "defaults: guidance_scale 2, mode keep_background"
    assert "defaults: those of the system" in summary(replace(manifest, defaults={})).splitlines()


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp16"],
        ["--resolution", "512"],
        ["--dino-heads", "6"],
        ["--unet-head-width", "8"],
        ["--default", "steps=3"],
    ],
)
def test_a_bundle_has_its_own(flags: list[str], tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    """What a checkpoint leaves open; other plans of the bundle cannot have it."""
    command = ["build", str(tiny_bundle), "--backend", "tensorrt_rtx", "--output", str(tmp_path / "plans")]
    assert main([*command, *flags, "--quiet"]) == 2
    sentence = f"anydoor: {flags[0]} goes with a checkpoint: '{tiny_bundle}' is a bundle, which has its own\n"
    assert capsys.readouterr().err == sentence
    assert not list(tmp_path.iterdir())


def test_without_pytorch_it_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "any.safetensors").touch()
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'onnx', 'onnxscript'));"
        "from runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["build", str(tmp_path / "any.safetensors"), "--backend", "onnxruntime", "--quiet"]
    result = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == (
        "anydoor: a checkpoint needs PyTorch to be exported, and 'torch' is not installed: "
        "pip install '.[export]', or give a bundle of ONNX graphs\n"
    )
    command[1] += ".lost"
    result = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == f"anydoor: there is no checkpoint at '{command[1]}'\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give a checkpoint or a bundle to build from, or --skeleton"),
        (["a.ckpt", "--skeleton"], "--skeleton has no weights: give it or 'a.ckpt', not both"),
        (
            ["--skeleton", "--backend=tensorrt"],
            "--skeleton makes ONNX graphs: use it with --backend onnxruntime",
        ),
        (
            ["a.ckpt", "--system=stable_diffusion"],
            "--system is for --skeleton: the system of 'a.ckpt' is recognised from its weights",
        ),
        (
            ["--skeleton", "--normalise=half"],
            "--normalise is for segmentation networks, not for --skeleton",
        ),
        (["--skeleton", "--dino-heads=6"], "--dino-heads is for checkpoints, not for --skeleton"),
        (
            ["--skeleton", "--resolution=100"],
            "--resolution must be a multiple of 64 for this network, not 100",
        ),
        (["--skeleton", "--output=."], "'.' is a directory with other things in it: give another --output"),
    ],
)
def test_what_a_skeleton_does_not_go_with(arguments: list[str], sentence: str, capsys: Capture) -> None:
    assert main(["build", *arguments, "--quiet"]) == 2
    assert capsys.readouterr().err == f"anydoor: {sentence}\n"

"""A bundle of a subject takes the graphs that did not change from the bundle of its base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engines.bundle import Bundle
from engines.errors import AnyDoorError
from engines.manifest import MANIFEST
from export import onnx_bundle
from export.build import build_bundle
from export.build_engines import main
from export.options import BuildOptions, SourceOptions
from export.progress import Progress
from export.reuse import made_from
from export.systems import open_source
from tests.support.stable_diffusion import pipeline, tiny_stable_diffusion_bundle

Capture = pytest.CaptureFixture[str]

OTHERS = ("text_encoder", "encode", "decode")
"""Graphs without the UNet."""


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that a test exports, without those of the base."""
    base()
    names: list[str] = []
    export = onnx_bundle.export_onnx

    def noted(module: nn.Module, spec: Any, *others: Any) -> None:
        names.append(spec.name)
        export(module, spec, *others)

    monkeypatch.setattr(onnx_bundle, "export_onnx", noted)
    return names


def base() -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    bundle = tiny_stable_diffusion_bundle(4)
    return bundle.with_name(f"{bundle.name}-checkpoint"), bundle


def unet_lora(path: Path) -> Path:
    """Changes one weight of the UNet."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = pipeline("2.x").unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    down, up = weight[:1].detach().clone(), weight[:, :1].detach().clone()
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


def build(output: Path, reuse: Path, lora: Path | None = None) -> None:
    checkpoint, _ = base()
    source = open_source(checkpoint, SourceOptions(lora=((lora, 1.0),) if lora else None))
    build_bundle(source, output, BuildOptions(resolution=64, reuse=reuse), Progress(quiet=True))


def without_times(bundle: Path) -> Any:
    content = json.loads((bundle / MANIFEST).read_text("utf-8"))
    for graph in content["graphs"].values():
        del graph["build_seconds"]
    return content


def test_a_bundle_of_copies_is_the_one_that_a_build_makes(tmp_path: Path, exported: list[str]) -> None:
    _, fresh = base()
    copied = tmp_path / "copied"
    build(copied, reuse=fresh)
    assert exported == []
    names = sorted(path.name for path in fresh.iterdir())
    assert sorted(path.name for path in copied.iterdir()) == names
    for name in set(names) - {MANIFEST}:
        assert (copied / name).read_bytes() == (fresh / name).read_bytes(), name
        assert (copied / name).stat().st_nlink == 1
    assert without_times(copied) == without_times(fresh)


@pytest.mark.nightly
def test_what_a_lora_changes_is_exported_anew(tmp_path: Path, exported: list[str]) -> None:
    _, fresh = base()
    build(tmp_path / "subject", fresh, unet_lora(tmp_path / "cup.safetensors"))
    assert exported == ["denoise"]
    subject, before = Bundle.open(tmp_path / "subject"), Bundle.open(fresh)
    subject.verify_all()
    for name in OTHERS:
        assert subject.manifest.graphs[name].files == before.manifest.graphs[name].files
    assert subject.manifest.graphs["denoise"].files != before.manifest.graphs["denoise"].files


def test_a_damaged_file_is_not_copied(tmp_path: Path) -> None:
    _, fresh = base()
    damaged, output = tmp_path / "damaged", tmp_path / "new"
    shutil.copytree(fresh, damaged)
    weights = damaged / "denoise.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(AnyDoorError, match=r"denoise\.onnx\.data is not the file that was built"):
        build(output, reuse=damaged)
    assert not output.exists()


def test_all_that_determines_a_graph_counts() -> None:
    manifest = Bundle.open(base()[1]).manifest
    spec = manifest.step

    def linear(value: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Module:
        layer = nn.Linear(2, 2).to(dtype)
        nn.init.constant_(layer.weight, value)
        nn.init.zeros_(layer.bias)
        return layer

    other_heads = {**manifest.architecture, "unet_head_width": 7}
    digests = [
        made_from(linear(), spec, manifest, torch.float32),
        made_from(linear(2.0), spec, manifest, torch.float32),
        made_from(linear(dtype=torch.bfloat16), spec, manifest, torch.float32),
        made_from(linear(), spec, manifest, torch.float16),
        made_from(linear(), manifest.decoder, manifest, torch.float32),
        made_from(linear(), spec, replace(manifest, precision="fp16"), torch.float32),
        made_from(linear(), spec, replace(manifest, max_batch=2), torch.float32),
        made_from(linear(), spec, replace(manifest, architecture=other_heads), torch.float32),
        made_from(linear(), spec, replace(manifest, producer="another version"), torch.float32),
    ]
    assert len(set(digests)) == len(digests)
    assert made_from(linear(), spec, replace(manifest, defaults={"steps": 3}), torch.float32) == digests[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["CKPT", "--resolution", "64", "--reuse", "none"], "there is no bundle at 'none'"),
        (["CKPT", "--reuse", "BUNDLE", "--targets", "cuda"], "--reuse needs --targets any"),
        (["BUNDLE", "--reuse", "BUNDLE", "--backend", "tensorrt_rtx"], "--reuse goes with a checkpoint"),
        (["--skeleton", "--reuse", "BUNDLE"], "--reuse is for checkpoints, not for --skeleton"),
    ],
)
def test_what_cannot_be_reused(tmp_path: Path, arguments: list[str], sentence: str, capsys: Capture) -> None:
    checkpoint, bundle = base()
    given = [{"CKPT": str(checkpoint), "BUNDLE": str(bundle)}.get(word, word) for word in arguments]
    assert main([*given, "--output", str(tmp_path / "new"), "--quiet"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

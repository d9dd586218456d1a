"""Building from Stable Diffusion: what the command takes, what it says, and what it refuses."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from engines.bundle import sha256
from engines.errors import AnyDoorError
from export.build_engines import main
from export.flags import parse_lora, parse_resolution
from export.options import SourceOptions
from export.systems import open_source
from runtime.systems.tokenizer import END, START
from tests.support.stable_diffusion import folder, pipeline, single_file
from tests.support.vocabulary import learned_merges, merges_text
from training.network.lora import merge_lora
from training.network.stable_diffusion_checkpoint import read_stable_diffusion, write_single_file
from training.network.tokenizer_files import installed_merges, read_tokenizer

Capture = pytest.CaptureFixture[str]


def lora(path: Path) -> Path:
    """Updates one weight of the UNet with a matrix of rank 1."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = pipeline("1.x").unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    save_file(
        {
            f"{name}.lora_A.weight": weight[:1].detach().clone(),
            f"{name}.lora_B.weight": weight[:, :1].detach().clone(),
        },
        path,
    )
    return path


def merges(path: Path) -> Path:
    path.write_text(merges_text(learned_merges()), "utf-8")
    return path


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line that a failing build prints; it comes before any work."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--quiet"]) == 2
    captured = capsys.readouterr()
    [line] = captured.err.strip().splitlines()
    assert captured.out == ""
    return line


# --- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("cup.safetensors", "cup.safetensors", 1.0),
        ("cup.safetensors:0.8", "cup.safetensors", 0.8),
        ("cup.safetensors:-1e-1", "cup.safetensors", -0.1),
        ("D:/models/cup.safetensors", "D:/models/cup.safetensors", 1.0),
        ("D:/models/cup.safetensors:2", "D:/models/cup.safetensors", 2.0),
        ("style:v2/cup.safetensors", "style:v2/cup.safetensors", 1.0),
        (":5", ":5", 1.0),
    ],
)
def test_a_lora_and_its_scale(text: str, file: str, scale: float) -> None:
    assert parse_lora(text) == (Path(file), scale)


def test_a_scale_that_is_none() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'nan' is not a scale"):
        parse_lora("cup.safetensors:nan")


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("768x512", (512, 768)), ("64X96", (96, 64))])
def test_a_size(text: str, size: Any) -> None:
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["", "x", "512x", "1x2x3", "wide"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a size"):
        parse_resolution(text)


# --- what goes with what ----------------------------------------------------------------------------------


def test_options_of_the_other_system(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    line = refused(capsys, tiny_checkpoint, "--lora", "a.safetensors", "--output", tmp_path / "bundle")
    assert line.endswith(
        "--lora is not for AnyDoor, which takes --unet-head-width, --dino-heads, --ema, --references"
    )
    line = refused(capsys, folder(tmp_path / "sd"), "--dino-heads", 3, "--output", tmp_path / "bundle")
    assert "--dino-heads is not for Stable Diffusion, which takes --ema, --variant, --prediction" in line
    assert not (tmp_path / "bundle").exists()


def test_anydoor_draws_squares(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main([str(tiny_checkpoint), "--resolution", "96x64", "--output", str(tmp_path / "bundle")]) == 2
    assert "--resolution 96x64: AnyDoor draws square pictures" in capsys.readouterr().err


def test_a_size_that_the_network_cannot_halve(tmp_path: Path, capsys: Capture) -> None:
    assert main([str(folder(tmp_path / "sd")), "--resolution", "64x66"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("checkpoint: Stable Diffusion 1.x, 4 million weights")
    assert "--resolution must be a multiple of 4 for this network, not 64x66" in captured.err


def test_what_the_unet_predicts(tmp_path: Path) -> None:
    path = folder(tmp_path / "sd")
    assert open_source(path, SourceOptions(prediction="epsilon")).architecture["prediction"] == "epsilon"
    with pytest.raises(AnyDoorError, match="says that it predicts the noise, so it cannot be read as v"):
        open_source(path, SourceOptions(prediction="v"))
    plain = single_file(tmp_path / "file.safetensors")
    options = SourceOptions(prediction="v", tokenizer=merges(tmp_path / "merges.txt"))
    source = open_source(plain, options)
    assert source.architecture["prediction"] == "v"
    assert "predicts v;" in source.description


def test_a_variant_is_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(AnyDoorError, match="is a file: a variant, like fp16, is of the weights in a folder"):
        open_source(single_file(tmp_path / "file.safetensors"), SourceOptions(variant="fp16"))
    pipeline("1.x").save_pretrained(tmp_path / "sd", variant="fp16")
    assert open_source(tmp_path / "sd", SourceOptions(variant="fp16")).tokenizer is not None


# --- tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.x", "2.x"])
def test_a_file_reads_prompts_as_its_folder_does(tmp_path: Path, version: Any) -> None:
    """With the merges alone, and with the folder of a tokenizer or of a checkpoint."""
    path = single_file(tmp_path / "file.safetensors", version)
    theirs = read_tokenizer(tmp_path / "source" / "tokenizer")
    for given in (merges(tmp_path / "merges.txt"), tmp_path / "source" / "tokenizer", tmp_path / "source"):
        ours = open_source(path, SourceOptions(tokenizer=given)).tokenizer
        assert ours is not None
        assert (ours.pad, ours.vocabulary) == (theirs.pad, theirs.vocabulary)
        assert ours.merges == theirs.merges


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    path = single_file(tmp_path / "file.safetensors")
    few = tmp_path / "few.txt"
    few.write_text("#version: 0.2\na b\n", "utf-8")
    bad = tmp_path / "bad.txt"
    bad.write_text("#version: 0.2\nno merges here\n", "utf-8")
    for given, message in [
        (few, "few.txt' has 515 tokens and the text encoder 607"),
        (bad, "bad.txt' cannot be read as the merges of a tokenizer"),
        (tmp_path / "none.txt", "none.txt' cannot be read as the merges"),
        (tmp_path, "there is no '.*tokenizer_config.json'"),
    ]:
        with pytest.raises(AnyDoorError, match=message):
            open_source(path, SourceOptions(tokenizer=given))
    with pytest.raises(AnyDoorError, match="has its own tokenizer: leave out --tokenizer"):
        open_source(tmp_path / "source", SourceOptions(tokenizer=few))


def test_without_a_tokenizer_the_installed_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of open_clip_torch, a file beside its modules, of which the first 48,894 merges count."""
    path = single_file(tmp_path / "file.safetensors")
    if installed_merges() is None:
        with pytest.raises(AnyDoorError, match=r"has no tokenizer: give the merges\.txt of Stable Diffusion"):
            open_source(path)
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError", "utf-8")
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *map(" ".join, learned_merges())]
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = open_source(path).tokenizer
    assert found is not None
    assert (len(found.vocabulary), found.pad, found.any_case) == (607, END, (START,))


# --- what it is made from ---------------------------------------------------------------------------------


def test_loras_are_merged_in_order_and_named(tmp_path: Path, capsys: Capture) -> None:
    path, cup = folder(tmp_path / "sd"), lora(tmp_path / "cup.safetensors")
    source = open_source(path, SourceOptions(lora=((cup, 0.5), (cup, -2.0))))
    assert source.description.endswith("; merged: cup.safetensors x 0.5; merged: cup.safetensors x -2")
    record = source.record()
    assert record["loras"] == [
        {"file": "cup.safetensors", "sha256": sha256(cup), "scale": scale} for scale in (0.5, -2.0)
    ]
    checkpoint = merge_lora(merge_lora(read_stable_diffusion(path), cup, 0.5), cup, -2.0)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    merged = source.graphs((64, 64), "fp32")[0].load(checkpoint.dtype).state_dict()[f"model.unet.{name}"]
    assert merged.equal(checkpoint.parts["unet"][name])
    assert not merged.equal(read_stable_diffusion(path).parts["unet"][name])


def test_a_lora_of_another_model(tmp_path: Path, capsys: Capture) -> None:
    tensors = {"lora_unet_middle.lora_down.weight": pipeline("1.x").unet.conv_in.bias.detach()}
    save_file(tensors, tmp_path / "other.safetensors")
    line = refused(capsys, folder(tmp_path / "sd"), "--lora", tmp_path / "other.safetensors")
    assert "is not a LoRA for this checkpoint: 1 of its 1 keys are unknown ('lora_unet_middle" in line


def test_the_hash_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    """As sha256sum prints it for the files that were read, whatever else is there."""
    path = folder(tmp_path / "sd")
    record = open_source(path).record()
    (path / "safety_checker").mkdir()
    (path / "safety_checker" / "model.safetensors").touch()
    assert open_source(path).record() == record
    names = [
        *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
        "scheduler/scheduler_config.json",
        *sorted(f"tokenizer/{file.name}" for file in (path / "tokenizer").iterdir()),
        *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
        "text_encoder/model.safetensors",
    ]
    lines = "".join(f"{sha256(path / name)}  {name}\n" for name in names)
    assert record == {"file": "sd", "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    single = tmp_path / "file.safetensors"
    write_single_file(single, read_stable_diffusion(path))
    options = SourceOptions(tokenizer=merges(tmp_path / "merges.txt"))
    assert open_source(single, options).record() == {"file": "file.safetensors", "sha256": sha256(single)}

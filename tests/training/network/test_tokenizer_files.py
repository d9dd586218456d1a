"""Tokenizers of checkpoints: ours reads prompts with their files as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from runtime.systems.tokenizer import END, START, Tokenizer
from tests.support.stable_diffusion import Version, change_json, folder, pipeline
from tests.support.vocabulary import learned_merges, merges_text
from training.network.checkpoint_file import CheckpointError
from training.network.stable_diffusion_checkpoint import read_stable_diffusion, write_folder
from training.network.tokenizer_files import TokenizerFiles, read_tokenizer, write_tokenizer


@pytest.mark.parametrize("version", ["1.x", "2.x"])
@pytest.mark.parametrize("layout", ["tokenizer.json", "merges.txt"])
def test_tokenizer_of_a_folder(tmp_path: Path, version: Version, layout: str) -> None:
    theirs = pipeline(version).tokenizer
    folder(tmp_path / "new", version)
    if layout == "merges.txt":
        write_folder(tmp_path / "old", read_stable_diffusion(tmp_path / "new"))
        assert not (tmp_path / "old" / "tokenizer" / "tokenizer.json").exists()
    files = read_stable_diffusion(tmp_path / ("new" if layout == "tokenizer.json" else "old")).tokenizer
    assert files is not None
    ours = Tokenizer(files.merges, files.pad, files.any_case)
    prompt = "A cat on the <|endoftext|> mat!! <|STARTOFTEXT|>!"
    assert ours.encode(prompt) == theirs(prompt, padding="max_length", max_length=77)["input_ids"]
    assert len(ours) == len(files.vocabulary)


def special(token: str) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": token, "normalized": True, **flags}


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": special(START), "eos_token": special(END), "unk_token": special(END), "pad_token": END},
        {"bos_token": special(START), "eos_token": special(END), "unk_token": special(END), "pad_token": "!"},
        {"pad_token": "!"},
        {},
    ],
    ids=["as in 1.x", "as in 2.x", "padding alone", "nothing"],
)
def test_special_tokens_are_found_where_transformers_finds_them(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path = tmp_path / "tokenizer"
    vocabulary = pipeline("1.x").tokenizer.get_vocab()
    write_tokenizer(path, TokenizerFiles(merges_text(learned_merges()), vocabulary, END, ()), 77)
    (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    theirs = CLIPTokenizer.from_pretrained(path)
    files = read_tokenizer(path)
    ours = Tokenizer(files.merges, files.pad, files.any_case)
    prompt = "a!!b<|startoftext|>! <|STARTOFTEXT|>!! c <|EndOfText|>!? <|endoftext|>d"
    assert ours.encode(prompt) == theirs(prompt, padding="max_length", max_length=77)["input_ids"]


def added_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({"id": 607, "content": "<cup>", "normalized": False})


def swapped(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def test_added_tokens_are_refused(tmp_path: Path) -> None:
    change_json(folder(tmp_path) / "tokenizer" / "tokenizer.json", added_token)
    with pytest.raises(CheckpointError, match=r"not the one that follows from its merges: see '<cup>'"):
        read_stable_diffusion(tmp_path)


def renamed(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["elsewhere"] = vocabulary.pop("cat</w>")


def test_a_vocabulary_without_a_merged_token_is_refused(tmp_path: Path) -> None:
    change_json(folder(tmp_path) / "tokenizer" / "tokenizer.json", renamed)
    with pytest.raises(CheckpointError, match="follows from its merges: see 'cat</w>'"):
        read_stable_diffusion(tmp_path)


def test_a_vocabulary_in_another_order_is_refused(tmp_path: Path) -> None:
    change_json(folder(tmp_path) / "tokenizer" / "tokenizer.json", swapped)
    with pytest.raises(CheckpointError, match="not the one that follows from its merges"):
        read_stable_diffusion(tmp_path)

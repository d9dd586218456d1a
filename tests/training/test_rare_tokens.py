"""Identifiers for a subject: what is proposed, and what is warned of."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.systems.tokenizer import Tokenizer
from tests.support.vocabulary import merges_text
from training.rare_tokens import main, propose, rare_tokens, rarity, token_ids, warnings_for

COMMON = [("c", "u"), ("cu", "p</w>"), ("a", "b"), ("d", "e"), ("f", "g"), ("h", "i"), ("j", "k"), ("l", "m")]
RARE = [("w", "a"), ("wa", "j</w>"), ("q", "x</w>")]
MERGES = merges_text((*COMMON, *RARE))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Eleven merges: `waj` and `qx` are whole words that come last, `wa` only begins one."""
    return Tokenizer(MERGES)


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    path = tmp_path / "merges.txt"
    path.write_text(MERGES, "utf-8")
    return path


def test_rare_words_are_late_in_the_vocabulary_and_whole(tokenizer: Tokenizer) -> None:
    assert rare_tokens(tokenizer) == ["waj", "qx"]
    assert [len(token_ids(tokenizer, word)) for word in ("waj", "qx", "wa", "cup")] == [1, 1, 2, 1]


def test_rarity_goes_from_the_bytes_to_the_last_merge(tokenizer: Tokenizer) -> None:
    assert rarity(tokenizer, 0) == rarity(tokenizer, 511) == 0
    assert rarity(tokenizer, 512) == pytest.approx(1 / 11)
    assert rarity(tokenizer, len(tokenizer) - 3) == 1


def test_a_draw_depends_on_its_seed_alone(tokenizer: Tokenizer) -> None:
    draws = [propose(tokenizer, count=2, seed=seed) for seed in range(8)]
    assert propose(tokenizer, count=2, seed=3) == draws[3]
    assert {tuple(draw) for draw in draws} == {("waj", "qx"), ("qx", "waj")}
    assert sorted(propose(tokenizer, count=1, tokens=2)[0].split()) == ["qx", "waj"]


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("waj", []),
        ("qx waj", []),
        ("cup", ["the identifier 'cup' is among the most frequent 18 % of the vocabulary"]),
        ("zzz", ["the identifier 'zzz' is split into 3 tokens, 'z', 'z', 'z'"]),
        ("waj cup", ["the identifier 'cup' is among the most frequent 18 %"]),
    ],
)
def test_an_identifier_that_means_something_draws_a_warning(
    tokenizer: Tokenizer, identifier: str, expected: list[str]
) -> None:
    found = warnings_for(tokenizer, identifier)
    assert len(found) == len(expected)
    assert all(sentence.startswith(start) for sentence, start in zip(found, expected))


def test_the_command_proposes_and_checks(merges: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(merges), "--count", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2 words of two or three letters" in shown
    assert "100 % of the vocabulary" in shown
    assert main([str(merges), "--check", "waj"]) == 0
    assert main([str(merges), "--check", "cup"]) == 1


@pytest.mark.parametrize(
    ("name", "content", "arguments", "sentence"),
    [
        ("merges.txt", MERGES, ["--count", "3"], "2 rare short words, and 3 are asked for"),
        ("merges.txt", "a b c", [], "merges are damaged"),
        ("model.safetensors", "", [], "has no tokenizer"),
        ("absent.txt", None, [], "cannot be read"),
        ("folder", None, [], "has no tokenizer"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
    arguments: list[str],
    sentence: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, "utf-8")
    assert main([str(tmp_path / name), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rare_tokens: ")
    assert sentence in error
    assert error.count("\n") == 1

"""Reads the tokenizer's files in a checkpoint's folder; `runtime.systems.tokenizer` encodes prompts with
them.

Either merges.txt and vocab.json, or tokenizer.json, which transformers writes since version 5; and
tokenizer_config.json. Source: transformers, `CLIPTokenizer`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from typing import Any

from engines.errors import BundleError
from runtime.systems.tokenizer import END, START, Tokenizer
from training.network.checkpoint_file import CheckpointError

_FIRST_MERGE = 2 * 256
"""Ids below are those of the bytes, inside and at the end of a word."""


_OPEN_CLIP = "bpe_simple_vocab_16e6.txt.gz"
"""In the package of open_clip_torch: a title, the merges of CLIP, and many more."""

_CLIP_MERGES = 49408 - _FIRST_MERGE - 2


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a checkpoint."""

    merges: str
    """Content of merges.txt."""
    vocabulary: Mapping[str, int]
    """Token -> id: the bytes, one per merge, and the two special tokens."""
    pad: str
    """The token that fills an encoded prompt."""
    any_case: tuple[str, ...]
    """Special tokens that are recognised in capitals, too."""

    def open(self) -> Tokenizer:
        """Gives the tokenizer that encodes prompts with them."""
        return Tokenizer(self.merges, self.pad, self.any_case)


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Reads the tokenizer.

    Raises:
        CheckpointError: its files are missing or damaged, or its tokens do not follow from the merges.
    """
    config = read_object(folder / "tokenizer_config.json")
    try:
        if (folder / "tokenizer.json").is_file():
            content = read_object(folder / "tokenizer.json")
            vocabulary, added = content["model"]["vocab"], content["added_tokens"]
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
            vocabulary |= {token["content"]: token["id"] for token in added}
            merges = "\n".join(["#version: 0.2", *pairs, ""])
        else:
            vocabulary = read_object(folder / "vocab.json")
            merges = (folder / "merges.txt").read_text("utf-8")
            pairs = [line for line in merges.splitlines() if line and not line.startswith("#version")]
            added = [config.get("bos_token"), config.get("eos_token")]
            added += dict(config.get("added_tokens_decoder") or {}).values()
        added = [token for token in added if isinstance(token, dict)]
        normalised = {token["content"] for token in added if token.get("normalized")}
        named = {token["content"] for token in added}
        pad = config.get("pad_token") or END
        pad = pad["content"] if isinstance(pad, dict) else pad
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the tokenizer in '{folder}' cannot be read ({error!r})") from error
    learned = ["".join(pair.split(" ")) for pair in pairs]
    expected = {token: number for number, token in enumerate([*learned, START, END], _FIRST_MERGE)}
    different = [token for token, number in expected.items() if vocabulary.get(token) != number]
    unknown = named - {START, END, pad}
    if different or unknown or len(vocabulary) != _FIRST_MERGE + len(expected):
        first = next(iter([*different, *unknown]), "")
        raise CheckpointError(
            f"the vocabulary of the tokenizer in '{folder}' is not the one that follows from its merges"
            + (f": see '{first}'" if first else f": it has {len(vocabulary)} tokens")
        )
    # transformers adds the token for padding by its name alone, and it is then found as it is written
    return TokenizerFiles(merges, vocabulary, pad, tuple(sorted((normalised & {START, END}) - {pad})))


def tokenizer_of(merges: str, pad: str) -> TokenizerFiles:
    """Returns the tokenizer with some merges, with the special tokens of the published folders.

    Args:
        merges: content of merges.txt.
        pad: the token that fills an encoded prompt.

    Raises:
        BundleError: the merges are damaged.
    """
    any_case = tuple(sorted({START, END} - {pad}))
    return TokenizerFiles(merges, Tokenizer(merges, pad, any_case).vocabulary, pad, any_case)


def made_up_tokenizer(vocabulary: int, pad: str) -> TokenizerFiles:
    """Returns a tokenizer for a network whose weights mean nothing: its merges are pairs of bytes.

    Args:
        vocabulary: how many tokens it has, 514 to 66,050.
        pad: see `tokenizer_of`.
    """
    alone = Tokenizer("", pad).vocabulary  # the bytes, the same at the end of a word, START and END
    pairs = islice(product(islice(alone, 256), repeat=2), vocabulary - len(alone))
    return tokenizer_of("\n".join(["#version: 0.2", *map(" ".join, pairs), ""]), pad)


def read_merges(path: Path, pad: str) -> TokenizerFiles:
    """Reads merges.txt; see `tokenizer_of`.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    try:
        return tokenizer_of(path.read_text("utf-8"), pad)
    except (OSError, ValueError, BundleError) as error:
        raise CheckpointError(f"'{path}' cannot be read as the merges of a tokenizer ({error})") from error


def installed_merges() -> str | None:
    """Returns the merges of CLIP as open_clip_torch has them, if that is installed; nothing of it is
    imported."""
    found = find_spec("open_clip")
    folders = [] if found is None else found.submodule_search_locations or []
    path = next(filter(Path.is_file, (Path(folder) / _OPEN_CLIP for folder in folders)), None)
    if path is None:
        return None
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return "\n".join(["#version: 0.2", *lines[1 : 1 + _CLIP_MERGES], ""])


def write_tokenizer(folder: Path, tokenizer: TokenizerFiles, length: int) -> None:
    """Writes merges.txt, vocab.json and tokenizer_config.json; `length` is that of an encoded prompt."""
    folder.mkdir()
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    config: dict[str, Any] = {
        name: {"__type": "AddedToken", "content": token, "normalized": token in tokenizer.any_case, **flags}
        for name, token in special.items()
    }
    config |= {"pad_token": tokenizer.pad, "tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    (folder / "merges.txt").write_text(tokenizer.merges, "utf-8")
    (folder / "vocab.json").write_text(json.dumps(dict(tokenizer.vocabulary), ensure_ascii=False), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: there is none.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no '{path}', which a checkpoint in diffusers' layout has") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is not a JSON object")
    return content

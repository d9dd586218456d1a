"""Proposes identifiers for a subject: words that a text encoder has a token for and has hardly ever read.

A subject is learned as "a IDENTIFIER CLASS". A word that the model knows brings its meaning along, and one
that is split into several tokens brings theirs; a rare token brings next to nothing. The merges of CLIP's
tokenizer are in the order of how frequent they were in what it was trained on, so rare tokens come late.
Source: DreamBooth (Ruiz et al., 2023), section 3.2, which takes T5's tokens; the order of the merges is that
of byte-pair encoding.

examples:
    python -m training.rare_tokens stable-diffusion-v1-5
    python -m training.rare_tokens tokenizer/merges.txt --count 20
    python -m training.rare_tokens stable-diffusion-v1-5 --tokens 2 --check "sks"
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engines.errors import AnyDoorError
from runtime.systems.tokenizer import Tokenizer
from training.network.checkpoint_file import CheckpointError
from training.network.tokenizer_files import read_tokenizer

RARE = 0.8
"""From which share of the merges on a token is rare: 39,600 of the 49,408 tokens of CLIP are not."""

_BYTES = 2 * 256
"""Tokens of single bytes, inside and at the end of a word; merges come after them."""

_SHORT = re.compile("[a-z]{2,3}")
"""Longer ones are often names or words of some language."""


def open_tokenizer(path: Path) -> Tokenizer:
    """Opens the tokenizer of a checkpoint.

    Args:
        path: folder in diffusers' layout, folder of a tokenizer, or merges.txt.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    if path.is_dir():
        return read_tokenizer(path / "tokenizer" if (path / "tokenizer").is_dir() else path).open()
    if path.suffix != ".txt":
        raise CheckpointError(
            f"'{path}' has no tokenizer: give a checkpoint's folder in diffusers' layout, or merges.txt"
        )
    try:
        return Tokenizer(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error})") from error


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a text without what frames and fills a prompt.

    Raises:
        InputError: it has too many tokens.
    """
    ids = tokenizer.encode(text)
    return ids[1 : ids.index(len(tokenizer) - 1)]


def rarity(tokenizer: Tokenizer, token: int) -> float:
    """Tells how late a token came into the vocabulary: 0, one of the bytes, to 1, the last merge."""
    return max(0.0, (token - _BYTES + 1) / (len(tokenizer) - _BYTES - 2))


def rare_tokens(tokenizer: Tokenizer) -> list[str]:
    """Lists the rare short words that the tokenizer keeps whole, the most frequent first."""
    late = (token for token in range(len(tokenizer) - 2) if rarity(tokenizer, token) >= RARE)
    words = ((token, tokenizer.decode([token])) for token in late)
    # a token that only begins words reads the same as a whole word, and is not what the word becomes
    return [word for token, word in words if _SHORT.fullmatch(word) and token_ids(tokenizer, word) == [token]]


def propose(tokenizer: Tokenizer, count: int = 10, tokens: int = 1, seed: int = 0) -> list[str]:
    """Draws identifiers.

    Args:
        tokenizer: of the checkpoint that is to be tuned.
        count: how many.
        tokens: rare words in each, one after the other.
        seed: of the draw.

    Raises:
        CheckpointError: the vocabulary has too few rare words.
    """
    words = rare_tokens(tokenizer)
    if len(words) < count * tokens:
        raise CheckpointError(
            f"the vocabulary of {len(tokenizer)} tokens has {len(words)} rare short words, and "
            f"{count * tokens} are asked for"
        )
    drawn = np.random.default_rng(seed).permutation(words)[: count * tokens].tolist()
    return [" ".join(drawn[start : start + tokens]) for start in range(0, len(drawn), tokens)]


def warnings_for(tokenizer: Tokenizer, identifier: str) -> list[str]:
    """Says what speaks against an identifier, a sentence each; nothing if it is good.

    Raises:
        InputError: it has too many tokens.
    """
    found = []
    for word in identifier.split():
        ids = token_ids(tokenizer, word)
        if len(ids) > 1:
            pieces = ", ".join(f"'{tokenizer.decode([token])}'" for token in ids)
            found.append(
                f"the identifier '{word}' is split into {len(ids)} tokens, {pieces}: the model knows what "
                "they mean, and the subject has to be learned against that"
            )
        elif rarity(tokenizer, ids[0]) < RARE:
            share = max(1, round(100 * rarity(tokenizer, ids[0])))
            found.append(
                f"the identifier '{word}' is among the most frequent {share} % of the vocabulary: the model "
                "knows what it means, and the subject has to be learned against that"
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if something speaks against a checked identifier, or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.rare_tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="checkpoint's folder, or merges.txt")
    parser.add_argument("--count", type=int, default=10, help="identifiers to propose; default: 10")
    parser.add_argument("--tokens", type=int, default=1, help="rare words in each, 1 to 3; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: 0")
    parser.add_argument(
        "--check", metavar="IDENTIFIER", help="check this one instead: whether the model knows or splits it"
    )
    options = parser.parse_args(arguments)
    if options.count < 1 or not 1 <= options.tokens <= 3:
        parser.error("--count must be at least 1, and --tokens 1, 2 or 3")
    try:
        tokenizer = open_tokenizer(options.base)
        if options.check is not None:
            sentences = warnings_for(tokenizer, options.check)
            print("\n".join(sentences) or f"nothing speaks against '{options.check}'")
            return 1 if sentences else 0
        words = rare_tokens(tokenizer)
        proposed = propose(tokenizer, options.count, options.tokens, options.seed)
    except AnyDoorError as error:
        print(f"rare_tokens: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(words)} words of two or three letters are one token each and among the last "
        f"{100 * (1 - RARE):.0f} % of the vocabulary. Drawn from them with seed {options.seed}:\n"
    )
    print(f"{'identifier':<16} {'tokens':<22} rarer than")
    for identifier in proposed:
        ids = token_ids(tokenizer, identifier)
        least = min(rarity(tokenizer, token) for token in ids)
        print(f"{identifier:<16} {', '.join(map(str, ids)):<22} {100 * least:.0f} % of the vocabulary")
    print("\nTake one that means nothing to you in any language, and no name or brand.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

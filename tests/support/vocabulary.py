"""A small vocabulary for CLIP's tokenizer, learned from one sentence, and transformers' tokenizer with it."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

from transformers import AddedToken, CLIPTokenizer

from runtime.systems.tokenizer import END, START

TEXT = (
    "a photo of a cat on a mat, the cats sat in the snow and didn't see the red car; "
    "we'll paint the castle, they've painted 10 of 12 ... straße, naïve café, δέντρο, 東京の猫"
)
WORD = "</w>"


def byte_letters() -> dict[int, str]:
    """Byte -> what stands for it, as CLIP derives its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def learned_merges() -> tuple[tuple[str, str], ...]:
    """Byte pairs of TEXT until every word is one token, the most frequent first."""
    words = [[byte_letters()[byte] for byte in word.encode()] for word in TEXT.split()]
    words = [[*word[:-1], word[-1] + WORD] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
    return tuple(merges)


def merges_text(merges: tuple[tuple[str, str], ...]) -> str:
    return "".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in merges)])


def clip_tokenizer(merges: tuple[tuple[str, str], ...], pad: str = END, any_case: Any = ()) -> CLIPTokenizer:
    letters = byte_letters().values()
    tokens = [*letters, *(letter + WORD for letter in letters), *map("".join, merges), START, END]
    named = {"bos_token": START, "eos_token": END, "pad_token": pad}
    special = {
        name: AddedToken(token, special=True, normalized=token in any_case) for name, token in named.items()
    }
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(merges),
        unk_token=special["eos_token"],
        model_max_length=77,
        **special,
    )

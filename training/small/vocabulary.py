"""Builds the tokenizer of a small text-conditioned model: byte pairs of captions, and rare words.

Merges are learned as CLIP's were, the most frequent pairs first (Sennrich et al., 2016). No caption has one
of the rare words, so each can become the name of a subject. The same words always give the same merges,
which the library tokenizers does not promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from runtime.systems.tokenizer import END
from training.network.tokenizer_files import TokenizerFiles, tokenizer_of

_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_LETTERS = 3
_FREQUENT = 1000
"""How often a caption's word counts for each time that it occurs; a rare word counts once."""


def rare_words(count: int, used: Sequence[str], seed: int = 0) -> list[str]:
    """Draws words of three consonants that are not among those that are used."""
    rng, found = np.random.default_rng(seed), dict[str, None]()
    while len(found) < count:
        word = "".join(rng.permutation(list(_CONSONANTS))[:_LETTERS])
        if word not in used:
            found[word] = None
    return list(found)


def learn_vocabulary(words: Sequence[str], rare: int = 32) -> TokenizerFiles:
    """Learns merges until every word is one token.

    Args:
        words: of the captions, in ASCII, as often as they occur.
        rare: how many rare words there are beside them.
    """
    counts = {word: count * _FREQUENT for word, count in Counter(words).items()}
    counts |= dict.fromkeys(rare_words(rare, words), 1)
    lines = (" ".join(pair) for pair in learn_merges(counts))
    return tokenizer_of("\n".join(["#version: 0.2", *lines, ""]), END)


def learn_merges(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Joins the most frequent pair of neighbours, of several the last in the alphabet, until none is left."""
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    while True:
        pairs = Counter[tuple[str, str]]()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            return
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        yield best
        for pieces in split.values():
            for index in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[index : index + 2]) == best:
                    pieces[index : index + 2] = ["".join(best)]

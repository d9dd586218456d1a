"""The tokenizer of a small text-conditioned model: byte pairs of captions, and rare words beside them.

Merges are learned as CLIP's were, the most frequent pairs first (Sennrich et al., 2016), by the library
tokenizers. No caption has one of the rare words, so each can become the name of a subject.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer as Trained
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer

from runtime.systems.tokenizer import END
from training.network.tokenizer_files import TokenizerFiles, tokenizer_of

_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_LETTERS = 3
_RARE, _FREQUENT = 1, 1000


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
        words: of the captions, as often as they occur.
        rare: how many rare words there are beside them.
    """

    def corpus() -> Iterator[str]:
        yield from (" ".join([word] * _FREQUENT) for word in words)
        yield from (" ".join([word] * _RARE) for word in rare_words(rare, words))

    trained = Trained(BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(vocab_size=1 << 16, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in merges)
    return tokenizer_of("\n".join(["#version: 0.2", *pairs, ""]), END)

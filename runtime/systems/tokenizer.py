"""Implements CLIP's byte-pair tokenizer, from a prompt to 77 token ids.

Sources: Radford et al., 2021 (CLIP), the tokenizer of its released code; transformers' `CLIPTokenizer`, which
it equals on every string of assigned characters, except that NFC there leaves U+11935 U+11930 apart, which
Unicode composes since version 13.

What counts as a letter or a number comes from Python's Unicode tables (`unicodedata.unidata_version`);
characters that are newer than these count as neither.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise

from engines.bundle import Bundle
from engines.errors import BundleError
from runtime.errors import InputError
from runtime.request import check_prompt

START = "<|startoftext|>"
END = "<|endoftext|>"

TOKENS = 77
"""Length of an encoded prompt, with START and END."""

_MOST_CHARACTERS = 4096
"""Of a prompt that are read: the time to normalise a text grows with the square of its length in the worst
case, and no prompt of 75 tokens is as long."""

_END_OF_WORD = "</w>"

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_LETTERS = {byte: chr(byte) for byte in _PRINTABLE}
_LETTERS |= {b: chr(0x100 + i) for i, b in enumerate(b for b in range(256) if b not in _LETTERS)}
"""Byte -> the letter that stands for it in `merges.txt`, in the order of the vocabulary."""
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}

# unlike \s of `re`, without U+001C to U+001F
_SPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")

_PIECE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^ a-z0-9]+")
"""Finds the pieces of a normalised prompt in its outline; see `_outline`."""

_BRACKETS = re.compile(r"<\||\|>|[a-z]+")


class Tokenizer:
    """The tokenizer of one checkpoint.

    Its vocabulary follows from the merges: the 256 bytes, the same at the end of a word, one token per merge,
    START and END.
    """

    def __init__(self, merges: str, pad: str = END, any_case: Collection[str] = ()) -> None:
        """Reads the merges.

        Args:
            merges: content of `merges.txt`.
            pad: the token that fills an encoded prompt: END in Stable Diffusion 1.x, "!" in 2.x. Like START
                and END it is special: recognised wherever it stands in a prompt.
            any_case: special tokens that are recognised in capitals, too, because the checkpoint's
                configuration says that they are `normalized`.

        Raises:
            BundleError: the merges are damaged, or `pad` is no token.
        """
        letters = list(_LETTERS.values())
        tokens = letters + [letter + _END_OF_WORD for letter in letters]
        self._ranks: dict[tuple[str, str], int] = {}
        known = set(tokens)
        for line in merges.splitlines():
            if line.startswith("#version") or not line:
                continue
            pair = tuple(line.split(" "))
            if len(pair) != 2 or not known.issuperset(pair) or "".join(pair) in known:
                raise BundleError(
                    f"the tokenizer's merges are damaged: '{line[:80]}' does not join two known tokens to a "
                    "new one"
                )
            self._ranks[pair] = len(self._ranks)
            tokens.append("".join(pair))
            known.add(tokens[-1])
        tokens += (START, END)
        self._tokens = tokens
        self._ids = {token: number for number, token in enumerate(tokens)}
        if pad not in self._ids:
            raise BundleError(f"the tokenizer pads with '{pad}', which its merges do not make")
        self.pad_id = self._ids[pad]
        self._longest = max(map(len, tokens))
        special = {START, END, pad}
        self._special = _any_of(special.difference(any_case))
        self._special_in_any_case = _any_of(special.intersection(any_case))

    def __len__(self) -> int:
        """Returns size of the vocabulary."""
        return len(self._tokens)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id."""
        return self._ids

    def encode(self, prompt: str) -> list[int]:
        """Gives the `TOKENS` ids of a prompt, padded.

        Raises:
            InputError: it has more tokens than fit, or half of a surrogate pair.
        """
        check_prompt(prompt)
        ids: list[int] = []
        prompt = _SPACE.sub(" ", prompt)
        is_long = len(prompt) > _MOST_CHARACTERS
        for piece, special in self._pieces(prompt[:_MOST_CHARACTERS]):
            room = TOKENS - 2 - len(ids)
            # what cannot fit is not merged: the time for that grows with the square of a word's length
            fits = len(piece) <= room * self._longest
            ids += [self._ids[piece]] if special else self._merge(piece) if fits else []
            is_long = is_long or not fits or len(ids) > TOKENS - 2
            if not fits or len(ids) > TOKENS - 2:
                break
        if is_long:
            raise InputError(
                f"the prompt is longer than the {TOKENS - 2} tokens that a text encoder reads; it would "
                f"end after '{self.decode(ids[: TOKENS - 2])}': make it shorter"
            )
        ids = [self._ids[START], *ids, self._ids[END]]
        return ids + [self.pad_id] * (TOKENS - len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Gives the text of tokens, in lower case and with a space after each word."""
        letters = "".join(self._tokens[number] for number in ids).replace(_END_OF_WORD, _LETTERS[ord(" ")])
        return bytes(_BYTES[letter] for letter in letters).decode(errors="ignore").strip()

    def _pieces(self, prompt: str) -> Iterator[tuple[str, bool]]:
        """Splits a prompt into special tokens (True) and what is merged on its own (False)."""
        for raw, exact in _split(self._special, prompt):
            if exact:
                yield raw, True
                continue
            for text, normalised in _split(self._special_in_any_case, _normalise(raw)):
                if normalised:
                    yield text, True
                    continue
                for match in _PIECE.finditer(_outline(text)):
                    piece = text[slice(*match.span())]
                    # one that is not recognised, because it was in capitals, still ends where it ends
                    parts = _BRACKETS.findall(piece) if piece in (START, END) else [piece]
                    yield from ((part, False) for part in parts)

    def _merge(self, piece: str) -> list[int]:
        """Joins the bytes of a piece, earliest merge first."""
        tokens = [_LETTERS[byte] for byte in piece.encode()]
        tokens[-1] += _END_OF_WORD
        while len(tokens) > 1:
            best = min(pairwise(tokens), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            joined: list[str] = []
            for token in tokens:
                if joined and (joined[-1], token) == best:
                    joined[-1] += token
                else:
                    joined.append(token)
            tokens = joined
        return [self._ids[token] for token in tokens]


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """Returns the tokenizer of a bundle.

    Raises:
        BundleError: it has none, or its merges are damaged.
    """
    record = bundle.manifest.tokenizer
    if record is None:
        raise BundleError(f"the bundle at '{bundle.path}' has no tokenizer")
    return Tokenizer(bundle.read(record.merges).decode(errors="replace"), record.pad, record.any_case)


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, tokens))})" if tokens else "((?!))")


def _split(special: re.Pattern[str], text: str) -> Iterator[tuple[str, bool]]:
    """Splits a text at its special tokens, which are marked True."""
    return ((part, bool(index % 2)) for index, part in enumerate(special.split(text)))


def _normalise(text: str) -> str:
    """NFC, each white space a single space, lower case character by character, so also for a final sigma."""
    return "".join(map(str.lower, _SPACE.sub(" ", unicodedata.normalize("NFC", text))))


def _outline(text: str) -> str:
    """Returns the text with ASCII stand-ins: q for letters, 0 for numbers, ! for everything else.

    So that `re`, which has no classes of Unicode categories, can split it. No word of `_PIECE` has a q.
    """
    kinds = {"L": "q", "N": "0"}
    return "".join(c if c.isascii() else kinds.get(unicodedata.category(c)[0], "!") for c in text)

"""The tokenizer gives the ids that transformers' CLIPTokenizer gives."""

from __future__ import annotations

import gzip
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from engines.errors import BundleError
from runtime.errors import InputError
from runtime.systems.tokenizer import END, START, TOKENS, Tokenizer
from tests.support.vocabulary import TEXT, clip_tokenizer, learned_merges, merges_text

STABLE_DIFFUSION_1: dict[str, Any] = {}
STABLE_DIFFUSION_2 = {"pad": "!", "any_case": [START, END]}


def padded(tokenizer: CLIPTokenizer, prompt: str, length: int = TOKENS) -> list[int]:
    ids: list[int] = tokenizer(prompt, padding="max_length", max_length=length)["input_ids"]
    return ids


@cache
def both(variant: str) -> tuple[Tokenizer, CLIPTokenizer]:
    """Ours and theirs, of the same small vocabulary."""
    options = {"1.x": STABLE_DIFFUSION_1, "2.x": STABLE_DIFFUSION_2}[variant]
    return Tokenizer(merges_text(learned_merges()), **options), clip_tokenizer(learned_merges(), **options)


def newly_composed(text: str) -> bool:
    """Whether NFC composes characters that only Unicode 13 and later compose."""
    return "\U00011938" in unicodedata.normalize("NFC", text)


characters = st.one_of(
    st.characters(exclude_categories=("Cs", "Cn")),
    st.sampled_from("abcst'!. \t\n\x1c\x85\u200bÉßΣς٣½東İ\u0301\u0323<|>"),
)
prompts = st.lists(
    st.one_of(characters, st.sampled_from([START, END, "<|StartOfText|>", "<|ENDOFTEXT|>", "'ll", "cat "])),
    max_size=30,
).map("".join)


def assert_equal(variant: str, prompt: str) -> None:
    ours, theirs = both(variant)
    expected = padded(theirs, prompt)
    if len(expected) > TOKENS:
        with pytest.raises(InputError, match="longer than the 75 tokens"):
            ours.encode(prompt)
    else:
        assert ours.encode(prompt) == expected


# --- equal to transformers' -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["1.x", "2.x"])
@given(prompt=prompts.filter(lambda text: not newly_composed(text)))
@settings(max_examples=1000)
@example(prompt="")
@example(prompt="A photo of a cat, didn't we'll THEY'VE 1234 ½ x²")
@example(prompt=f"a {END}  b{START}c <|ENDOFTEXT|>!!")
@example(prompt="ΟΔΟΣ İstanbul é ﬁ \u212a \u1e9e")
@example(prompt="!!a!b ! '''s")
@example(prompt="cat " * 75)
@example(prompt="cat " * 76)
def test_any_prompt(variant: str, prompt: str) -> None:
    assert_equal(variant, prompt)


def test_every_assigned_character_is_a_letter_a_number_a_space_or_something_else() -> None:
    ours, theirs = both("1.x")
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    # no ideographs and syllables beyond the first: 120,000 characters of one kind
    assigned = [c for c in assigned if not unicodedata.name(c, "").startswith(("CJK UNI", "HANGUL SYL"))]
    found = theirs([f"a{c}!{c}1" for c in assigned])["input_ids"]
    different = [
        c for c, ids in zip(assigned, found, strict=True) if ours.encode(f"a{c}!{c}1")[: len(ids)] != ids
    ]
    assert len(assigned) > 40_000
    assert different == []


@cache
def openai_merges() -> str | None:
    """The merges of the published CLIP, of open_clip's copy of its vocabulary."""
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    return "\n".join(lines[1 : 1 + 49152 - 256 - 2])  # without the line that names the file


@pytest.mark.skipif(openai_merges() is None, reason="open_clip_torch is not installed")
def test_the_published_vocabulary() -> None:
    text = openai_merges() or ""
    ours = Tokenizer(text)
    merges = tuple((a, b) for a, b in (line.split() for line in text.splitlines()))
    theirs = clip_tokenizer(merges)
    assert len(ours) == 49408
    assert ours.encode("sks") == [49406, 48136, *[49407] * 75]

    @given(prompts.filter(lambda prompt: not newly_composed(prompt)))
    @settings(max_examples=500)
    def test(prompt: str) -> None:
        expected = padded(theirs, prompt)
        if len(expected) == TOKENS:
            assert ours.encode(prompt) == expected

    test()
    assert padded(theirs, TEXT) == ours.encode(TEXT)


# --- examples ---------------------------------------------------------------------------------------------


def test_stable_diffusion_1_pads_with_the_end_and_2_with_an_exclamation_mark() -> None:
    one, two = both("1.x")[0], both("2.x")[0]
    end = one.encode("")[1]
    assert one.encode("") == [end - 1, *[end] * 76]
    assert two.encode("") == [end - 1, end, *[0] * 75]


def test_an_exclamation_mark_in_a_prompt_is_the_padding_of_stable_diffusion_2() -> None:
    one, two = both("1.x")[0], both("2.x")[0]
    assert one.encode("cat!")[2] == 256  # at the end of a word
    assert two.encode("cat!")[2] == 0


@given(prompts)
def test_length_is_fixed_and_the_frame_is_there(prompt: str) -> None:
    ours = both("1.x")[0]
    try:
        ids = ours.encode(prompt)
    except InputError:
        return
    assert len(ids) == TOKENS
    assert ids[0] == len(ours) - 2
    assert ids[-1] == len(ours) - 1
    assert all(0 <= number < len(ours) for number in ids)


@given(st.lists(st.sampled_from(["cat", "snow", "東京", "naïve", "12"]), max_size=6).map(" ".join))
def test_words_can_be_read_back(prompt: str) -> None:
    ours = both("1.x")[0]
    ids = [number for number in ours.encode(prompt)[1:] if number < len(ours) - 2]
    assert ours.decode(ids).replace("1 2", "12") == prompt


def test_white_space_and_capitals_do_not_matter() -> None:
    ours = both("1.x")[0]
    assert ours.encode("A  Cat\n on\ta MAT ") == ours.encode("a cat on a mat")
    assert ours.encode("\n" * 5000 + "a cat" + " " * 5000) == ours.encode("a cat")


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", ["a" + 80_000 * "\u0301" + 80_000 * "\u0316", "a cat "])
def test_what_no_prompt_needs_is_not_read(letters: str) -> None:
    """Accents in another order than Unicode's would take minutes to sort."""
    with pytest.raises(InputError, match="longer than the 75 tokens"):
        both("1.x")[0].encode(letters * (4097 // len(letters) + 1))


def test_a_prompt_that_is_too_long_is_refused_with_where_it_would_end() -> None:
    prompt = "the cat sat " * 25 + "in the snow"
    assert len(both("1.x")[0].encode("the cat sat " * 25)) == TOKENS
    with pytest.raises(
        InputError, match=rf"longer than the 75 tokens .* end after '{'the cat sat ' * 25}"[:-1]
    ):
        both("1.x")[0].encode(prompt)


def test_a_word_of_a_million_letters_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="end after 'the cat'"):
        both("1.x")[0].encode("the cat " + "x" * 1_000_000)


@pytest.mark.parametrize(
    ("prompt", "message"), [("a\ud83d b", r"character 2 is U\+D83D"), ("\udc00", "character 1")]
)
def test_half_of_a_surrogate_pair_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        both("1.x")[0].encode(prompt)


@pytest.mark.parametrize("line", ["a b c", "ab", "xyz a", "c a\nc a", "c a\nb c\nca t\nc at"])
def test_damaged_merges_are_refused(line: str) -> None:
    with pytest.raises(BundleError, match="does not join two known tokens to a new one"):
        Tokenizer(line)


def test_unknown_padding_is_refused() -> None:
    with pytest.raises(BundleError, match="pads with '<pad>'"):
        Tokenizer("c a\n", pad="<pad>")

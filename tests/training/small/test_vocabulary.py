"""The tokenizer of a small model: words of captions are whole, and rare words are there for subjects."""

from __future__ import annotations

from training.data.captions import describe, words_of_captions
from training.data.synthetic.objects import make_object
from training.rare_tokens import rare_tokens, token_ids, warnings_for
from training.small.vocabulary import learn_vocabulary, rare_words


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = learn_vocabulary(words_of_captions()).open()
    caption = describe(make_object(8), 2, "before bricks")
    assert len(token_ids(tokenizer, caption)) == len(caption.split())


def test_rare_words_can_name_a_subject() -> None:
    words = words_of_captions()
    tokenizer = learn_vocabulary(words, rare=32).open()
    drawn = rare_words(32, words)
    assert len(set(drawn)) == 32
    assert not set(drawn) & set(words)
    good = [word for word in drawn if not warnings_for(tokenizer, word)]
    assert set(good) <= set(rare_tokens(tokenizer))
    assert len(good) >= 16
    assert warnings_for(tokenizer, "mug")


def test_the_same_words_give_the_same_merges() -> None:
    assert learn_vocabulary(words_of_captions()) == learn_vocabulary(words_of_captions())

"""Pictures with captions: what is said is what is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.captions import (
    ANY_PLACE,
    PLACES,
    CaptionedViews,
    captioned_view,
    colour_name,
    describe,
    ground,
    main,
    place_to_draw,
    words_of_captions,
)
from training.data.synthetic.objects import make_object


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((220, 30, 30), "red"),
        ((240, 140, 20), "orange"),
        ((30, 60, 200), "blue"),
        ((240, 240, 235), "white"),
        ((120, 120, 120), "grey"),
        ((20, 20, 20), "black"),
        ((230, 20, 40), "red"),
    ],
)
def test_colours_have_the_names_that_people_give_them(colour: tuple[int, int, int], name: str) -> None:
    assert colour_name(colour) == name


def test_a_caption_says_as_much_as_is_asked_for() -> None:
    spec = make_object(3)
    said = [describe(spec, details, "on grass") for details in range(3)]
    colour = colour_name(spec.colours[0])
    assert said[0] == f"a {spec.shape.name} on grass"
    assert said[1] == f"a {colour} {spec.shape.name} on grass"
    assert spec.mark in said[2]
    assert said[2].startswith(said[1].removesuffix(" on grass"))


def test_every_word_of_a_caption_is_in_the_list_that_the_tokenizer_learns_from() -> None:
    known = set(words_of_captions())
    for seed in range(60):
        for place in PLACES:
            assert set(describe(make_object(seed), 2, place).split()) <= known


@pytest.mark.parametrize("place", PLACES)
def test_grounds_fill_the_picture(place: str) -> None:
    picture = ground(place, 32, np.random.default_rng(0))
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8


def test_an_object_stands_before_its_ground() -> None:
    picture = captioned_view(5, 0, "on white", 48)
    assert (picture[0] == 255).all()
    assert (picture != 255).any(-1).mean() > 0.1


def test_a_number_is_a_picture_and_the_next_one_its_mirror_image() -> None:
    captions: list[str] = []

    def encode(caption: str) -> list[int]:
        captions.append(caption)
        return [len(caption)] * 77

    views = CaptionedViews(2, 32, encode, seed=0)
    first, second, again = views[0], views[1], views[0]
    assert first["picture"].shape == (3, 32, 32)
    assert first["picture"].dtype == np.float32
    assert np.abs(first["picture"]).max() <= 1
    np.testing.assert_array_equal(first["picture"][..., ::-1], second["picture"])
    np.testing.assert_array_equal(first["picture"], again["picture"])
    assert first["ids"].tolist() == [len(captions[0])] * 77
    assert captions[0] == captions[2]
    # eight pictures of object 0, then of object 1
    noun = make_object(1).shape.name
    said = [views[number] and captions[-1] for number in range(8, 16)]
    assert all(noun in caption for caption in said if caption)


def test_an_inpainting_model_sees_the_picture_without_a_place() -> None:
    views = CaptionedViews(2, 32, lambda caption: [0] * 77, seed=0, inpaints=True)
    samples = [views[number] for number in range(8)]
    for sample in samples:
        outside = sample["mask"] == 0
        assert sample["mask"].shape == (1, 32, 32)
        np.testing.assert_array_equal(sample["surroundings"], np.where(outside, sample["picture"], 0))
    # a mirror image has a place of its own, unless that is where its object is
    assert len({sample["mask"].tobytes() for sample in samples}) > 4


def test_half_of_the_places_hold_all_of_the_object() -> None:
    rng = np.random.default_rng(0)
    on_black = captioned_view(5, 0, "on black", 48)
    places = [place_to_draw(5, 0, 48, rng) for _ in range(60)]
    whole = sum(not on_black[~place].any() for place in places)
    # the whole picture is one of the three kinds of any place
    assert 60 * ANY_PLACE < whole < 60


def test_subjects_are_folders_of_held_out_objects(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--objects", "2", "--views", "2", "--side", "32"]) == 0
    folders = sorted(tmp_path.iterdir())
    assert [folder.name for folder in folders] == ["00-mug", "01-ball"]
    assert all(Image.open(path).size == (32, 32) for folder in folders for path in folder.iterdir())
    assert [len(list(folder.iterdir())) for folder in folders] == [2, 2]

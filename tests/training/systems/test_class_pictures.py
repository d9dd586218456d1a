"""Pictures of a subject's class: drawn once, and learned from as the recipe says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from runtime.errors import InputError
from runtime.systems.tokenizer import Tokenizer
from tests.training.systems.test_dreambooth import network, subject, tokenizer
from training.data.subject import SubjectError
from training.systems.dreambooth import SubjectSettings, draw_class, make_samples

__all__ = ["subject", "tokenizer"]


def test_pictures_of_the_class_depend_on_their_number_alone(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings
) -> None:
    start, folder = network(tmp_path), tmp_path / "prior"
    draw_class(start, tokenizer, subject, folder, steps=2)
    first = {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    assert list(first) == ["00000.png", "00001.png", "00002.png"]
    (folder / "00001.png").unlink()
    draw_class(network(tmp_path), tokenizer, subject, folder, steps=2)
    assert {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))} == first


def test_as_many_pictures_of_the_class_are_learned_from_as_the_recipe_says(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings
) -> None:
    start, folder = network(tmp_path), tmp_path / "prior"
    draw_class(start, tokenizer, subject, folder, steps=2)
    fewer = make_samples(start, tokenizer, replace(subject, class_images=2), folder)
    assert [len(moments) for moments in fewer._moments] == [3, 2]
    more = replace(subject, class_images=40)
    with pytest.raises(SubjectError, match="holds 3 of the 40 pictures of the class: run the stage 'prior'"):
        make_samples(start, tokenizer, more, folder)
    with pytest.raises(SubjectError, match="holds 0 of the 3 pictures of the class: run the stage 'prior'"):
        make_samples(start, tokenizer, subject, tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"class_noun": "dog"}, "the prompt 'a dog'"),
        ({"resolution": 64}, "the resolution 64"),
        ({"guidance_scale": 3.0}, "the guidance_scale 3"),
        ({}, "a start of the hash"),
    ],
)
def test_pictures_of_the_class_that_were_drawn_otherwise_are_refused(
    tmp_path: Path,
    tokenizer: Tokenizer,
    subject: SubjectSettings,
    changes: dict[str, Any],
    difference: str,
) -> None:
    start, folder = network(tmp_path), tmp_path / "prior"
    draw_class(start, tokenizer, subject, folder, steps=2)
    other = network(tmp_path)
    if not changes:
        nn.init.ones_(other.unet.conv_out.bias)
    refused = f"were not drawn with {difference}.*: delete the folder to draw them anew"
    with pytest.raises(SubjectError, match=refused):
        draw_class(other, tokenizer, replace(subject, **changes), folder, steps=2)
    with pytest.raises(SubjectError, match=refused):
        make_samples(other, tokenizer, replace(subject, **changes), folder)


def test_without_a_prior_no_pictures_of_the_class_are_asked_for(subject: SubjectSettings) -> None:
    assert not replace(subject, prior_weight=0.0, class_images=0).has_prior
    with pytest.raises(InputError, match="class_images is 0; expected at least 2"):
        replace(subject, class_images=0)

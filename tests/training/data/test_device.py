"""Batches that are drawn in a device's memory: the same pictures and distributions as one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.imaging.reference import prepare_reference
from runtime.imaging.resize import resize_linear
from training.data.device import crop_squares, flipped, generator, prepare_references
from training.data.pairs import Kind, TimestepRule, sample_timestep, sample_timesteps
from training.data.synthetic.views import reference_view
from training.data.view_store import as_shot

CPU = torch.device("cpu")


def on_device(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32))[None]


def number(value: float) -> torch.Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize(("left", "top", "side"), [(0, 0, 90), (13, 7, 48), (5, 20, 61), (31, 2, 20)])
def test_a_square_is_resized_as_the_host_does(left: int, top: int, side: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (90, 100, 3), np.uint8)
    expected = resize_linear(picture[top : top + side, left : left + side], (48, 48))
    found = crop_squares(on_device(picture), number(left), number(top), number(side), 48).round()
    assert (found - on_device(expected)).abs().max() <= 1


@pytest.mark.parametrize("ratio", [1.1, 1.2, 1.3, 1.4])
@pytest.mark.parametrize("mirror", [False, True])
def test_a_reference_is_prepared_as_the_host_does(ratio: float, mirror: bool) -> None:
    """Within a level or two: the box to the pixel, white around it, the same two taps per axis."""
    shot = as_shot(reference_view(5, 0))
    image, mask = (plane[:, ::-1].copy() if mirror else plane for plane in (shot.image, shot.mask))
    expected = prepare_reference(image, mask, ratio)
    pictures = flipped(on_device(shot.image), torch.tensor([mirror]))
    inside = flipped(torch.from_numpy(shot.mask)[None, None], torch.tensor([mirror]))[:, 0]
    found, found_mask = prepare_references(pictures, inside, number(ratio).double(), 224)
    assert (found - on_device(expected.image)).abs().max() <= 2
    assert (found_mask - torch.from_numpy(expected.mask)).abs().max() <= 1


@pytest.mark.parametrize("rule", ["paper", "code", "uniform"])
@pytest.mark.parametrize("kind", ["video", "multi-view"])
def test_timesteps_of_a_batch_are_as_frequent_as_single_ones(kind: Kind, rule: TimestepRule) -> None:
    count, rng = 20_000, np.random.default_rng(0)
    images = torch.arange(count) % 2 == 0
    drawn = sample_timesteps(images, kind, rule, generator(0, range(1), CPU))
    assert drawn.dtype == torch.int64
    for each, which in ((kind, ~images), ("image", images)):
        singly = [sample_timestep(each, rule, rng) for _ in range(count // 2)]  # type: ignore[arg-type]
        expected, _ = np.histogram(singly, 10, (0, 1000))
        found, _ = np.histogram(drawn[which].numpy(), 10, (0, 1000))
        assert found.sum() == expected.sum()
        np.testing.assert_allclose(found, expected, atol=0.02 * count / 2)


def test_a_batch_draws_from_its_first_number() -> None:
    first, again, other = (
        torch.rand(4, generator=generator(3, range(start, start + 4), CPU)) for start in (8, 8, 12)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

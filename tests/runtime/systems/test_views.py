"""Several views of one object: their tokens side by side, in a bundle that is built for so many."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.options import SourceOptions
from export.systems import open_source
from runtime import Compositor, InputError, Placement, Sampling, View
from runtime.imaging.reference import prepare_reference
from runtime.request import Request
from runtime.result import Composite
from runtime.server.decoding import Decoder, decoder_bytes
from runtime.server.wire import message_from_request, request_from_message
from tests.support.imprint import imprint_file, tiny_imprint
from tests.support.module_engine import module_compositor
from tests.support.observers import RunCounter
from tests.support.serving import object_array, png, scene_array
from tests.support.tiny import TINY, open_zero_convolutions
from training.network.checkpoint import write_model
from training.network.modules import AnyDoor

VIEWS = 3
SCENE = scene_array()
FRONT, SIDE, BACK = (object_array(seed) for seed in (1, 2, 3))
SHORT = Sampling(steps=2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = AnyDoor(TINY).eval()
    open_zero_convolutions(model)
    write_model(folder / "anydoor.safetensors", model)
    return {
        "anydoor": folder / "anydoor.safetensors",
        "imprint": imprint_file(folder / "imprint.safetensors"),
    }


@pytest.fixture(scope="module", params=["anydoor", "imprint"])
def compositors(
    request: Any, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Compositor]:
    """Pictures of an object that a bundle takes -> what runs it."""
    found = {}
    for count in (1, VIEWS):
        source = open_source(checkpoints[request.param], SourceOptions(references=count))
        folder = tmp_path_factory.mktemp(request.param)
        found[count] = module_compositor(source, folder, (64, 64))
    return found


def drawn(compositor: Compositor, reference: NDArray[np.uint8], *views: NDArray[np.uint8]) -> Composite:
    placement = Placement(reference, box=(10, 8, 60, 50), views=[View(view) for view in views] or None)
    return compositor.run(Request(SCENE, [placement], 7, SHORT))[0]


def test_one_view_is_what_it_is_in_a_bundle_for_one(compositors: dict[int, Compositor]) -> None:
    """But for rounding: softmax over tokens that are there three times divides by three times as much."""
    alone, several = (drawn(compositors[count], FRONT).image for count in (1, VIEWS))
    assert np.abs(alone.astype(int) - several).max() <= 1
    given = drawn(compositors[VIEWS], FRONT, FRONT, FRONT).image
    np.testing.assert_array_equal(several, given)


def test_other_views_change_the_picture_in_any_order(compositors: dict[int, Compositor]) -> None:
    compositor = compositors[VIEWS]
    alone, both = drawn(compositor, FRONT).image, drawn(compositor, FRONT, SIDE).image
    assert (alone != both).any()
    first = drawn(compositor, FRONT, SIDE, BACK).image
    assert (first != both).any()
    np.testing.assert_array_equal(first, drawn(compositor, FRONT, BACK, SIDE).image)
    if compositor.bundle.manifest.system == "imprint":
        np.testing.assert_array_equal(first, drawn(compositor, BACK, SIDE, FRONT).image)


def test_each_view_is_encoded_once(compositors: dict[int, Compositor]) -> None:
    compositor, counter = compositors[VIEWS], RunCounter()
    compositor.clear()
    compositor.engine.observer = counter
    drawn(compositor, FRONT, SIDE)
    drawn(compositor, SIDE, BACK)
    compositor.engine.observer = None
    assert counter.runs["id_encoder"] == 3


def test_the_networks_see_the_tokens_side_by_side(compositors: dict[int, Compositor]) -> None:
    """The tokens that the step graph is given are those of each picture alone, one after the other."""
    compositor = compositors[VIEWS]
    given = []

    def observer(action: str, graph: str, inputs: Mapping[str, Any]) -> AbstractContextManager[object]:
        if graph == "denoise":
            given.append(inputs["tokens"])
        return nullcontext()

    compositor.engine.observer = observer
    drawn(compositor, FRONT, SIDE, BACK)
    compositor.engine.observer = None
    ratio = compositor.defaults["reference_ratio"]
    alone = []
    for picture in (FRONT, SIDE, BACK):
        prepared = prepare_reference(picture[..., :3], picture[..., 3] > 0, ratio).image
        values = (prepared.astype(np.float32) / 255).transpose(2, 0, 1)[None]
        alone.append(compositor.engine.run("id_encoder", {"reference": values})["tokens"][0])
    conditional, unconditional = given[0]
    pieces = np.split(conditional, VIEWS)
    assert {piece.tobytes() for piece in pieces} == {tokens.tobytes() for tokens in alone}
    one = compositor.bundle.constants()["unconditional_tokens"][0]
    np.testing.assert_array_equal(unconditional, np.tile(one, (VIEWS, 1)))


def test_pytorch_with_the_tokens_of_two_views_takes_the_same_step(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The UNet in PyTorch, given the tokens of both in one sequence, and the step graph."""
    model = tiny_imprint()
    source = open_source(checkpoints["imprint"], SourceOptions(references=2))
    compositor = module_compositor(source, tmp_path, (64, 64))
    views = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    latent, scene = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8, 8)
    with torch.no_grad():
        tokens = model.encode_reference(views).flatten(0, 1)[None]
        expected = model.predict_noise(latent, torch.tensor([500.0]), tokens, scene)
    spec = compositor.bundle.manifest.step
    numbers: dict[str, Any] = {
        "latent": latent.numpy(),
        "tokens": tokens.numpy(),
        "scene": scene.numpy(),
        "timestep": np.array([500], np.float32),
        "coefficients": np.array([[0, 1, 0]], np.float32),
        "blend": np.ones((1, 1, 8, 8), np.float32),
    }
    sizes = dict.fromkeys(compositor.bundle.manifest.dimensions, 1)
    for tensor in spec.inputs:
        numbers.setdefault(tensor.name, np.zeros(tensor.resolve(sizes), tensor.dtype))
    found = compositor.engine.run(spec.name, numbers)
    np.testing.assert_allclose(found["next_latent"], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_masks_of_views_are_found_as_the_reference_s(compositors: dict[int, Compositor]) -> None:
    plain = np.full((60, 60, 3), 230, np.uint8)
    plain[20:40, 20:50] = FRONT[8:28, 6:36, :3]
    inside = (plain != 230).any(axis=2)
    asked = [Placement(FRONT, box=(10, 8, 60, 50), views=[View(plain, mask)]) for mask in ("auto", inside)]
    found, given = (compositors[VIEWS].run(Request(SCENE, [each], 7, SHORT))[0].image for each in asked)
    assert np.abs(found.astype(int) - given).max() <= 1


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        (
            {"views": [View(SIDE)] * VIEWS},
            "views",
            "4 pictures of an object are given, but this bundle takes 3",
        ),
        ({"views": [View(SIDE[..., :3])]}, "views[0].mask", "the reference has no transparency"),
        ({"views": [View(b"no picture")]}, "views[0].picture", "is not a picture"),
        (
            {"views": [View(SIDE, "auto", [(3, 3)])]},
            "views[0].clicks",
            "either a mask or clicks",
        ),
        (
            {"views": [View(SIDE, clicks=[(3, 3)])]},
            "views[0].clicks",
            "no segmenter for clicks and boxes is loaded",
        ),
        ({"views": [View(SIDE)], "reference": None}, "", "give"),
    ],
)
def test_refusals(
    compositors: dict[int, Compositor], changes: dict[str, Any], field: str, reason: str
) -> None:
    placement = replace(Placement(FRONT, box=(10, 8, 60, 50)), **changes)
    with pytest.raises(InputError, match=reason) as caught:
        compositors[VIEWS].run(Request(SCENE, [placement], 7, SHORT))
    assert not field or caught.value.field == f"placements[0].{field}"


def test_a_bundle_for_one_says_how_to_build_one_for_several(compositors: dict[int, Compositor]) -> None:
    with pytest.raises(InputError, match="this bundle takes 1: build one with --references 2, or give every"):
        drawn(compositors[1], FRONT, SIDE)


def test_a_server_s_decoder_reads_views() -> None:
    views = [View(png(SIDE[..., :3]), png(SIDE[..., 3])), View(png(BACK))]
    asked = Request(png(SCENE), [Placement(png(FRONT), box=(10, 8, 60, 50), views=views)])
    decoder = Decoder(10**6, decoder_bytes(10**6, 10**6), 10)
    found = decoder.decode(asked, lambda size: None, lambda: True).placements[0].views
    decoder.close()
    assert found is not None
    np.testing.assert_array_equal(found[0].mask, SIDE[..., 3] > 0)
    np.testing.assert_array_equal(found[0].picture.rgb, SIDE[..., :3])  # type: ignore[union-attr]
    np.testing.assert_array_equal(found[1].picture.alpha, BACK[..., 3])  # type: ignore[union-attr]


def test_views_survive_the_wire() -> None:
    views = [
        View(b"a picture", b"a mask"),
        View(b"another", "auto"),
        View(b"third", None, [(1, 2, False), (3, 4)]),
    ]
    asked = Request(b"scene", [Placement(b"reference", box=(1, 2, 3, 4), views=views)])
    found, _ = request_from_message(message_from_request(asked))  # type: ignore[arg-type]
    for view, given in zip(found.placements[0].views or (), views, strict=True):
        assert (view.picture, view.mask) == (given.picture, given.mask)
        clicks = [tuple(click) for click in view.clicks or ()]
        assert clicks == ([] if given.clicks is None else [(1, 2, False), (3, 4, True)])

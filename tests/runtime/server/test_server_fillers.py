"""A server fills the holes of edits with a network, tells how far it is, and can be left in each phase."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.options import EngineOptions
from runtime.edits import Editor
from runtime.errors import InputError
from runtime.request import (
    Action,
    Edit,
    Fill,
    Move,
    Placement,
    Remove,
    Sampling,
    Swap,
    SwapPlaces,
    TryOn,
    Where,
)
from runtime.segmentation import engine_bytes
from runtime.server.events import Preview, Queued, StepDone
from runtime.server.serve import open_models
from runtime.server.settings import Settings
from tests.support.imprint import tiny_imprint_bundle
from tests.support.serving import OBJECT, ServerThread, scene_array, wait_until
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

SCENE = scene_array(width=96, height=64)
CUP, VASE = np.zeros((2, 64, 96), bool)
CUP[20:40, 10:30] = VASE[14:50, 66:76] = True
TO = (50, 20, 90, 50)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    limits = {"max_previews": 3}
    with ServerThread(tiny_bundle, filler=str(tiny_stable_diffusion_bundle(9)), **limits) as running:
        yield running


@pytest.fixture(scope="module")
def imprint() -> Iterator[ServerThread]:
    with ServerThread(tiny_imprint_bundle()) as running:
        yield running


def edit(action: Action, steps: int = 2, fill_steps: int = 2, **others: object) -> Edit:
    sampling = Sampling() if isinstance(action, Remove) else Sampling(steps=steps)
    fill = Fill(sampling=Sampling(steps=fill_steps))
    return Edit(SCENE, Where(mask=CUP), action, **{"seed": 3, "fill": fill, "sampling": sampling, **others})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("action", "filler"),
    [
        (Remove(), "stable_diffusion"),
        (Move(TO), "stable_diffusion"),
        (SwapPlaces(Where(mask=VASE)), "stable_diffusion"),
        (TryOn(Placement(OBJECT)), ""),
    ],
    ids=["remove", "move", "swap-places", "try-on"],
)
def test_the_picture_is_that_of_the_editor(server: ServerThread, action: Action, filler: str) -> None:
    with server.client() as client:
        (answer,) = client.edit(edit(action))
        assert client.model_info().filler == "stable_diffusion"
    (expected,) = Editor(server.compositor, server.filler).run(edit(action))
    np.testing.assert_array_equal(answer.image, expected.image)
    assert (answer.regions, answer.filler) == (expected.regions, filler)


def test_imprint_fills_the_holes_of_what_it_places(imprint: ServerThread) -> None:
    with imprint.client() as client:
        assert client.model_info().filler == "imprint"
        (answer,) = client.edit(edit(Move(TO)))
        with pytest.raises(InputError, match="IMPRINT fills holes here, and takes no prompt"):
            client.edit(edit(Remove(), fill=Fill("a desk")))
    (expected,) = Editor(imprint.compositor).run(edit(Move(TO)))
    np.testing.assert_array_equal(answer.image, expected.image)
    assert answer.filler == "imprint"


def test_steps_and_previews_of_both_phases(server: ServerThread) -> None:
    with server.client() as client:
        events = list(client.stream_edit(edit(Move(TO), steps=3, fill_steps=3), preview_every=2))
        with pytest.raises(InputError, match="4 previews per picture; at most 3 are made") as caught:
            list(client.stream_edit(edit(Move(TO), 3, 8), preview_every=2))
    assert caught.value.field.endswith("preview_every")
    assert [event for event in events if isinstance(event, StepDone)] == [StepDone(i, 6) for i in range(1, 7)]
    kinds = [type(event) for event in events if isinstance(event, StepDone | Preview)]
    filling = kinds[: kinds.index(StepDone) + 4]
    assert filling.count(Preview) == 1
    assert kinds.count(Preview) == 2
    shown = next(event for event in events if isinstance(event, Preview))
    assert np.asarray(Image.open(io.BytesIO(shown.image))).shape == SCENE.shape
    assert {"read", "sample", "decode", "paste", "encode"} <= events[-1][0].seconds.keys()


def test_tiles_are_counted_from_the_first_step_on_and_take_no_previews(server: ServerThread) -> None:
    """The place has 110 pixels and more, and the networks draw 64: tiles, each with all four steps."""
    scene = scene_array(width=160, height=150)
    large = np.zeros((150, 160), bool)
    large[20:130, 20:130] = True
    swap = Swap(Placement(OBJECT, refine=900, mode="shape"))
    asked = replace(edit(swap, steps=4, fill_steps=3), scene=scene, where=Where(mask=large))
    with server.client() as client:
        events = list(client.stream_edit(asked, preview_every=2))
    steps = [event for event in events if isinstance(event, StepDone)]
    assert len(steps) > 3 + 4 + 4
    assert steps == [StepDone(step, len(steps)) for step in range(1, len(steps) + 1)]
    # one of each first pass, as many as the limit was checked with
    assert sum(isinstance(event, Preview) for event in events) == 2


def test_what_cannot_be_placed_is_refused_before_the_hole_is_filled(server: ServerThread) -> None:
    before = len(server.filler_engine.steps)
    with server.client() as client, pytest.raises(InputError, match="has no transparency") as caught:
        client.edit(edit(Swap(Placement(SCENE))))
    assert caught.value.field == "swap.placement.reference_mask"
    assert len(server.filler_engine.steps) == before


def test_a_prompt_that_is_too_long_is_that_of_the_filler(server: ServerThread) -> None:
    fill = Fill("cat " * 80, Sampling(steps=2))
    with server.client() as client, pytest.raises(InputError, match="longer than the 75 tokens") as caught:
        client.edit(edit(Remove(), fill=fill))
    assert caught.value.field == "fill.prompt"


def test_who_leaves_while_the_hole_is_filled_lets_the_next_one_in(server: ServerThread) -> None:
    """The first is left at its second step, the second while it waits for the first; a third is done."""
    server.filler_engine.hold()
    before = len(server.filler_engine.steps)
    filler = server.server._filler
    assert filler is not None
    with server.client() as client, server.client() as other:
        first = client.stream_edit(edit(Move(TO), fill_steps=9))
        server.filler_engine.allow(1)
        assert any(isinstance(event, StepDone) for event in first)
        second = other.stream_edit(edit(Remove(), fill_steps=9))
        assert isinstance(next(iter(second)), Queued)
        wait_until(lambda: len(filler.tickets) == 2)  # and leaves as it hears of its place
        second.close()
        wait_until(lambda: len(filler.tickets) == 1)
        first.close()
        wait_until(lambda: not filler.tickets)
        server.filler_engine.release()
        (answer,) = client.edit(edit(Remove()))
    assert answer.filler == "stable_diffusion"
    # one that was allowed, one that was held, and two of the third
    assert len(server.filler_engine.steps) - before <= 4


def test_who_leaves_while_the_object_is_drawn(server: ServerThread) -> None:
    server.engine.hold()
    before = len(server.engine.steps)
    with server.client() as client:
        for event in client.stream_edit(edit(Move(TO), steps=9)):
            server.engine.allow(1)
            if isinstance(event, StepDone) and event.done > 2:
                break
    wait_until(lambda: not server.batcher.tickets)
    server.engine.release()
    assert len(server.engine.steps) - before < 9


def test_one_memory_budget(tiny_bundle: Path) -> None:
    options = EngineOptions(backend="onnxruntime", device="cpu", threads=1, memory_budget=2 << 30)
    common = Settings(bundle=str(tiny_bundle), engine=options)
    alone, *_ = open_models(common)
    beside, filler, _ = open_models(replace(common, filler=str(tiny_stable_diffusion_bundle(9))))
    assert filler is not None
    left = alone.engine.cache_bytes, beside.engine.cache_bytes
    assert left[0] is not None
    assert left[1] == left[0] - engine_bytes(filler.bundle, filler.engine)

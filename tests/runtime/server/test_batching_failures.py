"""Failures stay with the request that they belong to, whichever graph they happen in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.compositor import Compositor
from runtime.errors import InputError
from runtime.request import Placement, Request, Sampling
from runtime.systems.anydoor import CONTROL, ID_ENCODER
from tests.support.scheduling import TOLERANCE, Bench, request
from tests.support.serving import OBJECT, SCENE, HeldEngine, object_array, wait_until


@pytest.mark.parametrize("graph", [ID_ENCODER, CONTROL, "denoise", "decode"])
def test_a_failure_does_not_hurt_the_batch_mates(bench: Bench, alone: Compositor, graph: str) -> None:
    """A call fails that a certain request has a part in; the others get what they would have got alone."""
    marked = Placement(object_array(77), box=(2, 2, 30, 60))
    bench.engine.hold()
    good = [bench.submit(request(steps=4, seed=seed)) for seed in (1, 2)]
    bench.engine.wait_for_steps(1)
    bench.engine.fails = fault(bench.engine, alone, marked, graph)
    bad = bench.submit(Request(SCENE, [marked], 3, Sampling(steps=3, guidance_scale=9.5)))
    wait_until(lambda: bad.ticket.waiting)
    bench.engine.release()
    assert "caught fire" in str(bad.error())
    for seed, follower in zip((1, 2), good):
        (expected,) = alone.run(request(steps=4, seed=seed))
        assert np.abs(follower.pictures()[0].astype(int) - expected.image).max() <= TOLERANCE
    assert bench.submit(request(steps=1)).pictures()


def fault(engine: HeldEngine, alone: Compositor, marked: Placement, graph: str) -> Any:
    """Recognises calls of a graph in which the request with the marked placement takes part."""
    job = alone.accept(Request(SCENE, [marked], 3, Sampling(steps=3, guidance_scale=9.5)))
    prepared: Any = job.placements[0]
    hint = prepared.hint.hint
    reference = prepared.reference.image.astype(np.float32).transpose(2, 0, 1)[None] / 255
    done = {"decodes": 0}

    def fails(name: str, inputs: Any) -> bool:
        if name != graph:
            return False
        if graph == ID_ENCODER:
            return np.allclose(inputs["reference"], reference)
        if graph == CONTROL:
            return np.array_equal(inputs["hint"].reshape(hint.shape), hint)
        if graph == "decode":
            # all three end together, and the marked one joined last
            done["decodes"] += 1
            return done["decodes"] == 3
        return 9.5 in inputs["guidance_scale"]

    return fails


def test_input_errors_name_the_field(bench: Bench) -> None:
    error = bench.submit(request(placement=Placement(OBJECT, box=(500, 500, 600, 600)))).error()
    assert isinstance(error, InputError)
    assert error.field == "placements[0].box"

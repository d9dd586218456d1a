"""Places larger than the networks' picture are drawn a second time, in tiles."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from engines.engine import open_engine
from engines.options import EngineOptions
from runtime import Compositor, InputError, Placement, Request, Sampling
from runtime.diffusion.samplers import SAMPLERS
from runtime.imaging.boxes import Box
from runtime.imaging.collage import collage, shape_mask
from runtime.imaging.geometry import Geometry
from runtime.imaging.modes import MODES
from runtime.imaging.reference import prepare_reference
from runtime.imaging.tiles import tiles_of
from runtime.parameters import sampling_parameters
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.sampling.passes import first_pass, second_pass
from runtime.server.wire import defaults_message
from runtime.systems.anydoor import DEFAULTS, AnyDoorPlacement, AnyDoorTile
from tests.support.anydoor import DENOISE, ENCODE, without_encoder
from tests.support.observers import RunCounter
from tests.support.pictures import cutout, picture
from tests.support.serving import PATIENCE, ServerThread, held_compositor, png

CPU = EngineOptions(backend="onnxruntime", device="cpu")
SCENE, OBJECT = picture(300, 400), cutout(260)
LARGE = Placement(OBJECT, box=(90, 60, 290, 260), mode="keep_background")
FEW = Sampling(steps=5)
ALPHAS = np.linspace(0.999, 0.005, 1000, dtype=np.float32)


@pytest.fixture(scope="module")
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, CPU)


def drawn(compositor: Compositor, placement: Placement, **others: object) -> np.ndarray:
    request = Request.of(SCENE, placement, 7, FEW, **others)  # type: ignore[arg-type]
    return compositor.run(request)[0].image


# --- passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_second_pass_takes_the_last_steps_of_the_first(sampler: str) -> None:
    sampling = sampling_parameters(Sampling(steps=20, sampler=sampler, map_steps=10), DEFAULTS)
    first = first_pass(ALPHAS, sampling)
    second = second_pass(ALPHAS, first, 400)
    late = first.schedule.timesteps <= 400
    np.testing.assert_array_equal(second.schedule.timesteps, first.schedule.timesteps[late])
    np.testing.assert_array_equal(second.schedule.alphas, first.schedule.alphas[late])
    # a multistep sampler has nothing to look back at in the first step
    np.testing.assert_allclose(
        second.schedule.coefficients[1:], first.schedule.coefficients[late][1:], rtol=1e-5
    )
    assert second.sampling.map_steps == round(10 * late.sum() / 20)


def test_it_starts_with_noise_of_its_first_timestep() -> None:
    second = second_pass(ALPHAS, first_pass(ALPHAS, sampling_parameters(Sampling(steps=50), DEFAULTS)), 400)
    clean, noise = np.full((4, 8, 8), 2, np.float32), np.ones((4, 8, 8), np.float32)
    assert second.schedule.timesteps[0] == 381
    alpha = ALPHAS[381]
    np.testing.assert_allclose(
        second.first_latent(noise, clean), 2 * np.sqrt(alpha) + np.sqrt(1 - alpha), rtol=1e-5
    )
    assert second.first_latent(noise, None) is noise


def test_a_first_pass_without_late_steps_cannot_be_refined() -> None:
    first = first_pass(ALPHAS, sampling_parameters(Sampling(timesteps=(300, 900)), DEFAULTS))
    with pytest.raises(InputError, match="refine is 200, and the last of the 2 steps is at timestep 300"):
        second_pass(ALPHAS, first, 200)


# --- pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", ["hard", "soft"])
@pytest.mark.parametrize("mode", MODES)
def test_a_large_place_is_drawn_again_and_nothing_else(compositor: Compositor, mode: str, edge: str) -> None:
    placement = replace(LARGE, mode=mode, edge=edge)
    once = drawn(compositor, placement)
    twice = drawn(compositor, replace(placement, refine=400))
    (result,) = compositor.run(Request.of(SCENE, replace(placement, refine=400), 7, FEW))
    np.testing.assert_array_equal(result.image, twice)
    (region,) = result.regions
    assert (once[region.slices] != twice[region.slices]).any()
    outside = np.ones(twice.shape[:2], np.bool_)
    outside[region.slices] = False
    np.testing.assert_array_equal(twice[outside], SCENE[outside])


def test_each_tile_takes_the_late_steps(compositor: Compositor) -> None:
    compositor.engine.observer = counter = RunCounter()
    progress: list[tuple[int, int]] = []
    request = Request.of(SCENE, replace(LARGE, refine=400), 7, FEW)
    job = compositor.accept(request)
    tiles = len(job.passes) - 1
    late = int((job.passes[0][1].schedule.timesteps <= 400).sum())
    compositor.run(request, lambda *of: progress.append(of))
    assert tiles > 1
    assert counter.runs[ENCODE] == tiles
    assert counter.runs[DENOISE] == FEW.steps + tiles * late == job.total_steps
    assert progress == [(done, job.total_steps) for done in range(1, job.total_steps + 1)]


def test_a_place_that_the_networks_see_in_full_is_drawn_once(compositor: Compositor) -> None:
    side = compositor.bundle.manifest.resolution
    small = Placement(OBJECT, box=(100, 100, 100 + side // 4, 100 + side // 4), refine=400)
    assert len(compositor.accept(Request.of(SCENE, small, 7, FEW)).passes) == 1
    np.testing.assert_array_equal(drawn(compositor, small), drawn(compositor, replace(small, refine=0)))


def test_several_pictures_and_places(compositor: Compositor) -> None:
    """Each has tiles of its own, and the regions are those of the places."""
    places = [replace(LARGE, refine=400), Placement(OBJECT, box=(10, 200, 70, 280))]
    results = compositor.run(Request.of(SCENE, places, 7, FEW, num_images=2))
    assert [len(result.regions) for result in results] == [2, 2]
    assert (results[0].image != results[1].image).any()


def test_a_tile_sees_the_details_of_the_full_size_reference(compositor: Compositor) -> None:
    """Its hint is cut out of a collage as large as the scene."""
    job = compositor.accept(Request.of(SCENE, replace(LARGE, box=(90, 60, 250, 220), refine=400), 7, FEW))
    (placed, _), (tile, _) = job.passes[:2]
    assert isinstance(placed, AnyDoorPlacement)
    assert isinstance(tile, AnyDoorTile)

    renewed = compositor.system.renew(tile, SCENE, job.watch)
    whole, box = tile.geometry.box, tile.geometry.crop
    inside = OBJECT[..., 3] > 128
    details = prepare_reference(OBJECT[..., :3], inside, 1.2, len(tile.details)).high_frequency_map
    everything = Geometry(Box(50, 20, 330, 300), whole)
    mode = MODES["keep_background"]
    mask = shape_mask(placed.target, everything, mode)
    collaged = collage(SCENE, everything, details, mask, mode, everything.crop.width)
    part = box.shift(-everything.crop.x0, -everything.crop.y0)
    np.testing.assert_array_equal(renewed.hint.hint, collaged[:, part.y0 : part.y1, part.x0 : part.x1])


def test_tiles_cover_the_region(compositor: Compositor) -> None:
    job = compositor.accept(Request.of(SCENE, replace(LARGE, refine=400), 7, FEW))
    found = [tile.geometry.crop for tile, _ in job.passes[1:] if isinstance(tile, AnyDoorTile)]
    side = compositor.bundle.manifest.resolution
    assert found == tiles_of(job.placements[0].region, (400, 300), side)


def test_a_server_draws_the_same_and_counts_the_steps_of_tiles(
    compositor: Compositor, tiny_bundle: Path
) -> None:
    placement = pb.Placement(
        reference=png(OBJECT),
        box=pb.Box(x0=90, y0=60, x1=290, y1=260),
        mode=pb.PLACEMENT_MODE_KEEP_BACKGROUND,
        refine=400,
    )
    asked = pb.CompositeRequest(
        scene=png(SCENE), placements=[placement], sampling=pb.Sampling(steps=FEW.steps), seed=7
    )
    job = compositor.accept(Request.of(SCENE, replace(LARGE, refine=400), 7, FEW))
    with ServerThread(tiny_bundle) as server, grpc.insecure_channel(server.address) as channel:
        stream = CompositorServiceStub(channel).CompositeStream
        events = list(stream(pb.CompositeStreamRequest(request=asked), timeout=PATIENCE))
    steps = [(event.step_done.done, event.step_done.total) for event in events if event.HasField("step_done")]
    assert steps[-1] == (job.total_steps, job.total_steps)
    image = Image.open(io.BytesIO(events[-1].result.images[0].image))
    expected = drawn(held_compositor(tiny_bundle)[0], replace(LARGE, refine=400))
    np.testing.assert_array_equal(np.asarray(image), expected)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", [-1, 1000, 2.5, True, "yes"])
def test_what_is_no_timestep(compositor: Compositor, refine: object) -> None:
    with pytest.raises(InputError, match="refine must be a timestep from 1 to 999, or 0 for none") as caught:
        drawn(compositor, replace(LARGE, refine=refine))  # type: ignore[arg-type]
    assert caught.value.field == "placements[0].refine"


def test_a_bundle_without_an_encoder(tiny_bundle: Path) -> None:
    older = without_encoder(tiny_bundle)
    compositor = Compositor(older, open_engine(older, CPU))
    assert drawn(compositor, LARGE).shape == SCENE.shape
    assert not defaults_message(compositor.defaults).HasField("refine")
    with pytest.raises(InputError, match="built without the graph that encodes pictures"):
        drawn(compositor, replace(LARGE, refine=400))

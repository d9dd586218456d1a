"""The qualities: what each saves, that options override them, and that a server does the same."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from engines.backends.onnxruntime.engine import OnnxRuntimeEngine
from runtime import Compositor, InputError, Placement, Sampling, preset
from runtime.cli.composite import main
from runtime.diffusion.ddim import ddim_timesteps
from runtime.diffusion.presets import QUALITIES
from runtime.job import Composite
from runtime.request import Request
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.wire import QUALITIES as WIRE_QUALITIES
from runtime.server.wire import SAMPLERS as WIRE_SOLVERS
from runtime.server.wire import message_from_request, request_from_message
from tests.support.anydoor import CONTROL, DENOISE
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, message, refusal, trailing

PLACEMENT = Placement(OBJECT, box=BOX)
SHORTENED = {
    "exact": Sampling(steps=4),
    "balanced": replace(QUALITIES["balanced"], steps=4, map_steps=2),
    "fast": replace(QUALITIES["fast"], steps=3, map_steps=2),
}
"""The qualities with the fewest steps that still use all they are made of."""


class RowCountingEngine(OnnxRuntimeEngine):
    """A real engine that notes how many rows of work each call of a graph is."""

    rows: dict[str, list[int]]

    def run(self, graph, inputs, outputs=None):  # type: ignore[no-untyped-def]
        name = {CONTROL: "timestep", DENOISE: "row_sample"}.get(graph)
        if name:
            self.rows.setdefault(graph, []).append(len(inputs[name]))
        return super().run(graph, inputs, outputs)


@pytest.fixture
def compositor(tiny_bundle: Path) -> Compositor:
    from engines.bundle import Bundle

    bundle = Bundle.open(tiny_bundle)
    engine = RowCountingEngine(bundle, "cpu")
    engine.rows = {}
    return Compositor(bundle, engine)


def rows(compositor: Compositor, sampling: Sampling, seed: int = 7) -> dict[str, list[int]]:
    """Rows of every call of the control and denoise graphs for one picture."""
    engine = compositor.engine
    assert isinstance(engine, RowCountingEngine)
    engine.rows = {}
    compositor.run(SCENE, PLACEMENT, seed, sampling)
    return engine.rows


# --- what is saved ----------------------------------------------------------------------------------------


def test_exact_is_the_default_and_leaves_nothing_out(compositor: Compositor) -> None:
    assert preset() == preset("exact") == Sampling()
    assert rows(compositor, Sampling()) == {CONTROL: [2] * 50, DENOISE: [2] * 50}


def test_exact_visits_the_timesteps_of_the_original(compositor: Compositor) -> None:
    job = compositor.accept(Request(SCENE, [PLACEMENT], 7, preset("exact")))
    assert job.schedule.timesteps.tolist() == ddim_timesteps(50)[::-1].tolist()
    assert not job.schedule.multistep


def test_outside_the_interval_only_the_conditional_half_is_computed(compositor: Compositor) -> None:
    sampling = Sampling(timesteps=(101, 301, 501, 701, 901), guidance_interval=(301, 701))
    assert rows(compositor, sampling) == {CONTROL: [1, 2, 2, 2, 1], DENOISE: [1, 2, 2, 2, 1]}


def test_an_interval_without_steps_is_sampling_without_guidance(compositor: Compositor) -> None:
    outside = Sampling(steps=3, guidance_interval=(998, 999))
    (found,) = compositor.run(SCENE, PLACEMENT, 7, outside)
    (expected,) = compositor.run(SCENE, PLACEMENT, 7, Sampling(steps=3, guidance_scale=1.0))
    np.testing.assert_array_equal(found.image, expected.image)


def test_detail_maps_at_some_timesteps(compositor: Compositor) -> None:
    assert rows(compositor, Sampling(steps=6, map_steps=2)) == {CONTROL: [2, 2], DENOISE: [2] * 6}


def test_as_many_map_steps_as_steps_change_nothing(compositor: Compositor) -> None:
    (found,) = compositor.run(SCENE, PLACEMENT, 7, Sampling(steps=3, map_steps=999))
    (expected,) = compositor.run(SCENE, PLACEMENT, 7, Sampling(steps=3))
    np.testing.assert_array_equal(found.image, expected.image)


def test_maps_that_a_guided_and_an_unguided_step_share_have_both_halves(compositor: Compositor) -> None:
    sampling = Sampling(timesteps=(101, 301, 501, 701), guidance_interval=(301, 999), map_steps=2)
    assert rows(compositor, sampling) == {CONTROL: [2, 2], DENOISE: [2, 2, 2, 1]}


@pytest.mark.parametrize("quality", ["balanced", "fast"])
def test_a_reroll_needs_no_control_net(compositor: Compositor, quality: str) -> None:
    rows(compositor, SHORTENED[quality])
    assert CONTROL not in rows(compositor, SHORTENED[quality], seed=8)


def test_a_multistep_solver_follows_the_path_more_closely_than_ddim(compositor: Compositor) -> None:
    """Against 200 steps of DDIM from the same noise, over the same few timesteps."""
    few = (99, 199, 299, 399, 499, 599, 699, 799, 899, 999)
    many = tuple(range(4, 1000, 5))
    pictures = [
        compositor.run(
            SCENE, PLACEMENT, 7, Sampling(timesteps=timesteps, sampler=sampler, guidance_scale=1.0)
        )[0]
        for timesteps, sampler in ((few, "ddim"), (few, "dpm_solver_2m"), (many, "ddim"))
    ]
    ddim, dpm_solver_2m, limit = (picture.image.astype(float) for picture in pictures)
    assert np.abs(dpm_solver_2m - limit).mean() < np.abs(ddim - limit).mean()


# --- overriding -------------------------------------------------------------------------------------------


def test_options_override_the_quality() -> None:
    assert preset("fast", steps=33) == replace(QUALITIES["fast"], steps=33)
    with pytest.raises(InputError, match="no quality 'superb': choose one of exact, balanced, fast"):
        preset("superb")


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        (Sampling(sampler="heun"), "there is no sampler 'heun': choose one of ddim, dpm_solver_2m"),
        (
            Sampling(sampler="dpm_solver_2m", eta=0.5),
            "the sampler dpm_solver_2m adds no noise: eta must be 0 with it, not 0.5",
        ),
        (Sampling(guidance_interval=(5, 1000)), "guidance_interval must be a whole number from 0 to 999"),
        (Sampling(guidance_interval=(7, 5)), "must be a lower and a higher timestep, not 7, 5"),
        (Sampling(guidance_interval=(7,)), "must be a lower and a higher timestep, not 7"),  # type: ignore[arg-type]
        (Sampling(map_steps=0), "map_steps must be a whole number from 1 to 999, not 0"),
    ],
)
def test_sampling_that_cannot_be_used(compositor: Compositor, sampling: Sampling, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        compositor.run(SCENE, PLACEMENT, sampling=sampling)


# --- the command line -------------------------------------------------------------------------------------


def cli(folder: Path, bundle: Path, *more: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    (folder / "scene.png").write_bytes(SCENE)
    (folder / "object.png").write_bytes(OBJECT)
    files = ["--scene", str(folder / "scene.png"), "--reference", str(folder / "object.png")]
    place = ["--box", ",".join(map(str, BOX)), "--seed", "7"]
    output = ["--output", str(folder / "out.png"), "--quiet", "--device", "cpu", "--backend", "onnxruntime"]
    assert main(["composite", *files, *place, *output, "--bundle", str(bundle), *more]) == 0
    return np.asarray(Image.open(folder / "out.png"))


@pytest.mark.parametrize("quality", list(QUALITIES))
def test_command_line(tmp_path: Path, tiny_bundle: Path, compositor: Compositor, quality: str) -> None:
    given = cli(tmp_path, tiny_bundle, "--quality", quality, "--steps", "5")
    (expected,) = compositor.run(SCENE, PLACEMENT, 7, preset(quality, steps=5))
    np.testing.assert_array_equal(given, expected.image)


def test_every_lever_is_an_option(tmp_path: Path, tiny_bundle: Path, compositor: Compositor) -> None:
    levers = "--sampler dpm_solver_2m --steps 5 --guidance-interval 200,800 --map-steps 2 --guidance-scale 3"
    given = cli(tmp_path, tiny_bundle, *levers.split())
    sampling = Sampling(5, 3.0, sampler="dpm_solver_2m", guidance_interval=(200, 800), map_steps=2)
    np.testing.assert_array_equal(given, compositor.run(SCENE, PLACEMENT, 7, sampling)[0].image)


def test_an_interval_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["composite", "--reference", "a", "--scene", "b", "-o", "c.png", "--guidance-interval", "9"])
    assert caught.value.code == 2
    assert "'9' is not an interval: two timesteps first,last are expected" in capsys.readouterr().err


# --- the server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle) as server:
        yield server


def close(found: Composite, expected: Composite) -> bool:
    """Up to the last level of rounding: the engines may use another number of threads."""
    return bool(np.abs(found.image.astype(int) - expected.image).max() <= 1)


@pytest.mark.parametrize("quality", list(QUALITIES))
def test_client(server: ServerThread, compositor: Compositor, quality: str) -> None:
    request = Request(SCENE, [PLACEMENT], 7, SHORTENED[quality])
    with server.client() as client:
        (found,) = client.run(request)
    assert close(found, compositor.run(**vars(request))[0])


@pytest.mark.parametrize("quality", list(QUALITIES))
def test_any_other_client_names_the_quality(
    server: ServerThread, compositor: Compositor, quality: str
) -> None:
    sampling = pb.Sampling(quality=WIRE_QUALITIES[quality], steps=4)
    with grpc.insecure_channel(server.address) as channel:
        response = CompositorServiceStub(channel).Composite(message(sampling=sampling), timeout=PATIENCE)
    found = np.asarray(Image.open(io.BytesIO(response.images[0].image)))
    (expected,) = compositor.run(SCENE, PLACEMENT, 7, preset(quality, steps=4))
    assert np.abs(found.astype(int) - expected.image).max() <= 1


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("sampling.quality", pb.Sampling(quality=9)),
        ("sampling.sampler", pb.Sampling(sampler=9)),
        ("sampling.eta", pb.Sampling(quality=pb.QUALITY_FAST, eta=0.5)),
        ("sampling.map_steps", pb.Sampling(map_steps=0)),
        ("sampling.guidance_interval", pb.Sampling(guidance_interval=pb.TimestepInterval(first=5))),
    ],
)
def test_what_a_server_refuses(server: ServerThread, field: str, sampling: pb.Sampling) -> None:
    with grpc.insecure_channel(server.address) as channel:
        error = refusal(CompositorServiceStub(channel).Composite, message(sampling=sampling))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailing(error)["field"] == field


def test_wire_knows_every_quality_and_solver() -> None:
    from runtime.diffusion.samplers import SAMPLERS

    assert WIRE_QUALITIES.keys() == QUALITIES.keys()
    assert tuple(WIRE_SOLVERS) == SAMPLERS


@pytest.mark.parametrize("quality", list(QUALITIES))
def test_levers_survive_the_wire(quality: str) -> None:
    request = Request(SCENE, [PLACEMENT], 7, QUALITIES[quality])
    content = message_from_request(request).SerializeToString()
    back, _ = request_from_message(pb.CompositeRequest.FromString(content))
    assert back.sampling == request.sampling

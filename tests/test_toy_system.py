"""A system of its own, from checkpoint to server: nothing but this file knows it.

It fills a box with the colour of an object. Its network is the exact one for pictures of a single colour, so
what it draws is known in closed form, for any sampler, number of steps and guidance.

    colour of the object --> [predict] x steps --> latent of 5 channels --> [paint] --> picture

Two graphs, one bank, and no graph of the roles condition and window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.bundle import Bundle
from engines.engine import Engine
from engines.errors import BackendError
from engines.host_memory import plan_host_memory
from engines.memory_plan import place_name, plan_device_memory, table_name
from engines.options import EngineOptions
from engines.spec import ROWS, SAMPLES, BankSpec, GraphSpec, TensorSpec
from export.build import build_bundle
from export.options import BuildOptions
from export.progress import Progress
from export.systems.system import GraphExport, Size, checkpoint_record
from export.verification import TOLERANCE
from runtime import Compositor, InputError, Placement, Request, Sampling
from runtime.diffusion.ddim import Schedule
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.imaging.boxes import Box
from runtime.imaging.reference import load_reference
from runtime.imaging.resize import resize_nearest
from runtime.imaging.target import load_target
from runtime.parameters import SamplingParameters
from runtime.result import Stopwatch
from runtime.sampling.conditions import BankRows
from runtime.sampling.running_batch import guided_steps
from runtime.systems import register_system
from runtime.systems.system import Model, Prepared
from runtime.validation import Abilities, Limits
from tests.support.observers import RunCounter
from tests.support.pictures import PLACEMENT, SCENE, Pixels, cutout
from tests.support.serving import ServerThread

PREDICT, PAINT, COLOURS = "predict", "paint", "colours"
CHANNELS, FACTOR, RESOLUTION = 5, 4, 32
"""Of the latent; pixels along a cell of it; pixels along the picture."""
EVERYWHERE = np.ones(SCENE.shape[:2], bool)


# --- the networks -----------------------------------------------------------------------------------------


class Predict(nn.Module):
    """One step: the noise in a latent whose picture is of one colour, guidance, and the update."""

    alphas_cumprod: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, CHANNELS, bias=False)
        self.register_buffer("alphas_cumprod", torch.from_numpy(alphas_cumprod()))

    def forward(
        self, latent: Tensor, carry: Tensor, timestep: Tensor, guidance_scale: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the next latent and epsilon, both (N, C, h, w)."""
        coefficients, conditional_row, unconditional_row, row_sample, row_colour, colour = others
        alpha = _per_sample(self.alphas_cumprod[timestep.long()]).index_select(0, row_sample)
        clean = self.encode(colour).index_select(0, row_colour)[:, :, None, None]
        noise = (latent.index_select(0, row_sample) - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        conditional = noise.index_select(0, conditional_row)
        unconditional = noise.index_select(0, unconditional_row)
        epsilon = unconditional + _per_sample(guidance_scale) * (conditional - unconditional)
        c0, c1, c2 = (_per_sample(of) for of in coefficients.unbind(1))
        return c0 * latent + c1 * epsilon + c2 * carry, epsilon


class Paint(nn.Module):
    """Latent (1, C, h, w) -> picture (1, H, W, 3) uint8."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.Conv2d(CHANNELS, 3, 1, bias=False)

    def forward(self, latent: Tensor) -> Tensor:
        decoded = nn.functional.interpolate(self.decode(latent), scale_factor=FACTOR, mode="nearest")
        return (decoded * 127.5 + 127.5).clamp(0, 255).round().permute(0, 2, 3, 1).to(torch.uint8)


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def write_checkpoint(path: Path) -> None:
    """Seeded weights; the decoder undoes what the encoder does."""
    encode = torch.from_numpy(np.random.default_rng(0).standard_normal((CHANNELS, 3), dtype=np.float32))
    decode = torch.linalg.pinv(encode)[:, :, None, None].contiguous()
    save_file({"encode.weight": encode, "decode.weight": decode}, path)


# --- export -----------------------------------------------------------------------------------------------


class ToySource:
    """A checkpoint, ready for export; see `export.systems.system.ExportSource`."""

    system, description, dtype, tokenizer = "toy", "a toy", torch.float32, None
    defaults: Mapping[str, Any] = {"steps": 3, "guidance_scale": 1.5}
    size = None
    architecture: Mapping[str, Any] = {"latent_channels": CHANNELS}
    dimensions: Mapping[str, int] = {SAMPLES: 1, ROWS: 2, COLOURS: 2}

    def __init__(self, path: Path) -> None:
        self.path, self.record = path, partial(checkpoint_record, path)

    def check_size(self, size: Size) -> None: ...

    def graphs(self, size: Size, precision: str) -> Sequence[GraphExport]:
        return [GraphExport(spec, partial(self._load, spec.name)) for spec in toy_specs(size[0])]

    def constants(self, engine: Engine) -> dict[str, NDArray[np.float32]]:
        return {"alphas_cumprod": alphas_cumprod()}

    def _load(self, graph: str, dtype: torch.dtype) -> nn.Module:
        module = Predict() if graph == PREDICT else Paint()
        module.load_state_dict(load_file(self.path), strict=False)
        return module.to(dtype).eval()


def toy_specs(resolution: int) -> list[GraphSpec]:
    """The signatures."""
    shape = (CHANNELS, resolution // FACTOR, resolution // FACTOR)
    outputs = tuple(TensorSpec(name, "float32", (SAMPLES, *shape)) for name in ("next_latent", "epsilon"))
    latents = tuple(TensorSpec(name, "float32", (SAMPLES, *shape)) for name in ("latent", "carry"))
    numbers = {"timestep": (SAMPLES,), "guidance_scale": (SAMPLES,), "coefficients": (SAMPLES, 3)}
    indices = {"conditional_row": SAMPLES, "unconditional_row": SAMPLES, "row_sample": ROWS}
    per_step = (
        *(TensorSpec(name, "float32", of) for name, of in numbers.items()),
        *(TensorSpec(name, "int32", (of,)) for name, of in {**indices, "row_colour": ROWS}.items()),
    )
    predict = GraphSpec(
        PREDICT,
        "step",
        inputs=(*latents, *per_step, TensorSpec("colour", "float32", (COLOURS, 3))),
        outputs=outputs,
        banks=(BankSpec(COLOURS, ("colour",), "row_colour"),),
        per_step=tuple(tensor.name for tensor in per_step),
        feedback={"latent": "next_latent", "carry": "epsilon"},
    )
    latent = TensorSpec("latent", "float32", (1, *shape))
    image = TensorSpec("image", "uint8", (1, resolution, resolution, 3))
    return [predict, GraphSpec(PAINT, "decode", (latent,), (image,))]


# --- runtime ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ToyPlacement(Prepared):
    """A colour, (3,) in -1..1, and its place."""

    colour: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ToyConditions:
    """The colour, the same at every step."""

    colours: BankRows
    steps: int

    def banks(self, step: int) -> Mapping[str, BankRows]:
        return {COLOURS: self.colours}

    def steps_ready(self, step: int) -> int:
        return self.steps - step


class Toy:
    """The system with a model; see `runtime.systems.system.System`."""

    defaults: Mapping[str, Any] = {
        **{"steps": 20, "guidance_scale": 1.0, "control_scale": 1.0, "timesteps": None},
        **{"eta": 0.0, "sampler": "ddim", "guidance_interval": (0, 999)},
    }
    abilities = Abilities("Toy", "reference", defaults, ["exact", "fast"])

    def __init__(self, model: Model) -> None:
        self.model = model

    def prepare(
        self, scene: Pixels, placement: Placement, parameters: Any, limits: Limits, watch: Stopwatch
    ) -> ToyPlacement:
        picture, inside = load_reference(placement.reference, placement.reference_mask, limits.pixels)
        place = load_target(placement.box, placement.mask, scene, limits.pixels)
        if not isinstance(place, Box):
            raise InputError("this model places objects into boxes, not into masks")
        region = place.clip((scene.shape[1], scene.shape[0]))
        return ToyPlacement(colour_of(picture[inside]), region=region)

    def renew(self, prepared: ToyPlacement, scene: Pixels, watch: Stopwatch) -> ToyPlacement:
        return prepared

    def conditions(
        self, prepared: ToyPlacement, sampling: SamplingParameters, schedule: Schedule, watch: Stopwatch
    ) -> ToyConditions:
        """The colour of the object, and with guidance that of no object, which is 0."""
        colours = np.stack([prepared.colour, np.zeros(3, np.float32)])
        last = 1 if any(guided_steps(sampling, schedule)) else 0
        return ToyConditions(BankRows({"colour": colours}, 0, last, on_host=True), schedule.steps)

    def finish(self, picture: Pixels, scene: Pixels, prepared: ToyPlacement) -> Pixels:
        result, region = scene.copy(), prepared.region
        result[region.slices] = resize_nearest(picture, (region.width, region.height))
        return result

    def kept_bytes(self) -> int:
        return 0

    def clear(self) -> None:
        pass


def colour_of(pixels: Pixels) -> NDArray[np.float32]:
    """Mean of (N, 3) pixels, (3,) in -1..1."""
    return (pixels.mean(axis=0) / 127.5 - 1).astype(np.float32)


# --- tests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register_system("toy", Toy)
    checkpoint = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    write_checkpoint(checkpoint)
    path, options = checkpoint.with_name("bundle"), BuildOptions(resolution=RESOLUTION)
    build_bundle(ToySource(checkpoint), path, options, Progress(quiet=True))
    return path


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def compositor(bundle: Path, request: pytest.FixtureRequest) -> Compositor:
    pytest.importorskip(request.param)
    return Compositor.load(bundle, EngineOptions(request.param, "cpu"))


def drawn(
    bundle: Bundle, colour: NDArray[np.float32], noise: NDArray[np.float32], scale: float, first: int
) -> Pixels:
    """What the networks draw of noise (C, h, w) at the first timestep, (R, R, 3): theory, in float64."""
    weights = load_file(bundle.path.with_name(bundle.manifest.checkpoint["file"]))
    encode, decode = (weights[f"{of}.weight"].numpy() for of in ("encode", "decode"))
    now, last = alphas_cumprod()[[first, 0]].astype(np.float64)
    clean = scale * (encode @ colour)[:, None, None]
    latent = np.sqrt(last) * clean + np.sqrt((1 - last) / (1 - now)) * (noise - np.sqrt(now) * clean)
    cells = np.einsum("rc,chw->hwr", decode[..., 0, 0], latent)
    levels = (cells * 127.5 + 127.5).clip(0, 255).round().astype(np.uint8)
    return levels.repeat(FACTOR, axis=0).repeat(FACTOR, axis=1)


def test_the_bundle_says_what_it_is(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert (manifest.system, manifest.checkpoint["file"]) == ("toy", "toy.safetensors")
    assert list(manifest.specs.values()) == toy_specs(RESOLUTION)
    assert manifest.latent_shape == (CHANNELS, RESOLUTION // FACTOR, RESOLUTION // FACTOR)
    assert manifest.resolution == RESOLUTION
    assert (manifest.defaults, manifest.dimensions) == (ToySource.defaults, ToySource.dimensions)
    for record in manifest.graphs.values():
        assert all(error < TOLERANCE["fp32"] for error in record.error.values())
        assert all(size > 0 for size in record.scratch_bytes.values())
    assert Bundle.open(bundle).constants().keys() == {"alphas_cumprod"}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(steps=1),
        Sampling(steps=7, guidance_scale=1.0),
        Sampling(steps=3, guidance_scale=0.0),
        Sampling(quality="fast", guidance_interval=(0, 999)),
        Sampling(timesteps=(10, 500, 999), guidance_scale=2.0),
    ],
)
def test_the_picture_is_the_one_of_theory(compositor: Compositor, sampling: Sampling) -> None:
    """Up to a level of rounding in the box; outside it is the scene."""
    shape = (1, *compositor.bundle.manifest.latent_shape)
    noise = np.random.default_rng(3).standard_normal(shape, dtype=np.float32)
    box, rgba = Box(40, 30, 40 + RESOLUTION, 30 + RESOLUTION), cutout()
    request = Request(SCENE, [Placement(rgba, box=tuple(box))], 7, sampling, initial_noise=noise)
    (result,) = compositor.run(request)
    job = compositor.accept(request)
    colour, first = colour_of(rgba[rgba[..., 3] > 128][:, :3]), int(job.passes[0][1].schedule.timesteps[0])
    inside = drawn(compositor.bundle, colour, noise[0], job.passes[0][1].sampling.guidance_scale, first)
    assert np.abs(result.image[box.slices].astype(int) - inside).max() <= 1
    result.image[box.slices] = SCENE[box.slices]
    np.testing.assert_array_equal(result.image, SCENE)


def test_guidance_leads_away_from_the_colour_of_no_object(compositor: Compositor) -> None:
    """That is grey; with twice the scale the colour is twice as far from it."""
    rgba = cutout()
    rgba[..., :3] = (150, 120, 100)
    box = Box(0, 0, RESOLUTION, RESOLUTION)
    for scale in (0.0, 1.0, 2.0):
        sampling = Sampling(guidance_scale=scale)
        (result,) = compositor.run(Request(SCENE, [Placement(rgba, box=tuple(box))], 7, sampling))
        expected = 127.5 + scale * (np.array([150, 120, 100]) - 127.5)
        np.testing.assert_allclose(result.image[box.slices].mean(axis=(0, 1)), expected, atol=2)


def test_pictures_that_share_a_batch_are_those_alone(compositor: Compositor) -> None:
    compositor.engine.observer = counter = RunCounter()
    together = compositor.run(Request(SCENE, [PLACEMENT], 7, num_images=2))
    assert counter.runs == {PREDICT: ToySource.defaults["steps"], PAINT: 2}
    for seed, result in zip((7, 8), together, strict=True):
        (alone,) = compositor.run(Request(SCENE, [PLACEMENT], seed))
        np.testing.assert_array_equal(result.image, alone.image)
    assert not np.array_equal(together[0].image, together[1].image)


def test_several_objects_are_placed_one_after_the_other(compositor: Compositor) -> None:
    second = Placement(cutout(seed=2), box=(60, 50, 100, 85))
    both, first = (compositor.run(Request(SCENE, of, 7))[0] for of in ([PLACEMENT, second], [PLACEMENT]))
    assert both.regions == (Box(30, 20, 80, 70), Box(60, 50, 100, 85))
    changed = (both.image != first.image).any(axis=-1)
    assert changed[both.regions[1].slices].mean() > 0.9
    changed[both.regions[1].slices] = False
    assert not changed.any()


def test_what_this_model_cannot_use_is_refused(compositor: Compositor) -> None:
    with pytest.raises(InputError, match="into boxes, not into masks") as caught:
        compositor.accept(Request(SCENE, [Placement(cutout(), mask=EVERYWHERE)], 7))
    assert caught.value.field == "placements[0]"


def test_its_graphs_are_swapped_where_the_hosts_memory_is_short(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    roomy = plan_host_memory(opened, "onnxruntime", 10**12)
    tight = plan_host_memory(opened, "onnxruntime", roomy.total - 1)
    assert (roomy.groups, tight.groups) == (((PREDICT, PAINT),), ((PREDICT,), (PAINT,)))
    with pytest.raises(BackendError, match="raise --memory-budget"):
        plan_host_memory(opened, "onnxruntime", tight.total - 1)
    images = []
    for plan, loads in ((roomy, 1), (tight, 2)):
        compositor = Compositor.load(bundle, EngineOptions("onnxruntime", "cpu", memory_budget=plan.budget))
        compositor.engine.observer = counter = RunCounter()
        images.append(compositor.run(Request(SCENE, [PLACEMENT, PLACEMENT], 7))[0].image)
        assert counter.loads == {PREDICT: loads, PAINT: loads}
    np.testing.assert_array_equal(*images)


def test_its_plans_have_a_memory_plan_for_a_card(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    scratch = {"tensorrt_rtx": 1_000_000}
    graphs = {name: replace(of, scratch_bytes=scratch) for name, of in manifest.graphs.items()}
    manifest = replace(manifest, backend="tensorrt_rtx", graphs=graphs)
    plan = plan_device_memory(manifest, 1 << 30)
    assert plan.groups == ((PREDICT, PAINT),)
    assert plan.weights == sum(record.nbytes for record in graphs.values())
    named = {place_name(PREDICT, tensor.name) for tensor in manifest.step.tensors}
    assert named | {table_name(PREDICT, name) for name in manifest.step.per_step} <= plan.fixed.offsets.keys()
    assert plan.total <= plan.budget
    tight = plan_device_memory(manifest, plan.total - plan.cache - 1)
    assert tight.groups == ((PREDICT,), (PAINT,))
    with pytest.raises(BackendError, match="of device memory"):
        plan_device_memory(manifest, tight.total - tight.cache - 1)


def test_a_server_serves_it(bundle: Path) -> None:
    compositor = Compositor.load(bundle, EngineOptions("onnxruntime", "cpu"))
    two = Request(SCENE, [PLACEMENT], 7, Sampling(guidance_scale=2.0), num_images=2)
    with ServerThread(bundle) as server, server.client() as client:
        for request in (Request(SCENE, [PLACEMENT], 7), two):
            for found, expected in zip(client.run(request), compositor.run(request), strict=True):
                assert (found.seed, found.regions) == (expected.seed, expected.regions)
                assert np.abs(found.image.astype(int) - expected.image).max() <= 1
        with pytest.raises(InputError, match="into boxes, not into masks"):
            client.run(Request(SCENE, [Placement(cutout(), mask=EVERYWHERE)], 7))
        kinds = [type(event).__name__ for event in client.stream(two, preview_every=1)]
        assert (kinds.count("Preview"), kinds[-1]) == (4, "list")
        info = client.model_info()
    assert (info.system, info.resolution, info.defaults.sampling.steps) == ("toy", RESOLUTION, 3)

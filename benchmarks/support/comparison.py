"""Compares the runtime with a recorded run of the original, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.support import checks
from benchmarks.support.checks import Check, at_least, exact, pixels, relative
from benchmarks.support.golden import Array, GoldenRun, read_archive
from benchmarks.support.graphs import CONTROL, DECODE, DENOISE, ID_ENCODER
from benchmarks.support.sampling_loop import sample
from benchmarks.support.similarity import psnr
from engines.errors import AnyDoorError
from runtime import Compositor, Placement, Request, Sampling
from runtime.diffusion.ddim import ddim_schedule
from runtime.imaging.boxes import Box
from runtime.imaging.collage import Hint, make_hint
from runtime.imaging.high_frequency_map import high_frequency_map
from runtime.imaging.paste_back import paste_back, pasted_region
from runtime.imaging.reference import PreparedReference, prepare_reference
from runtime.parameters import SamplingParameters, sampling_parameters
from runtime.sampling.conditions import BankRows
from runtime.sampling.detail_maps import DetailMapCache, DetailMaps
from runtime.sampling.running_batch import StepOfSample, guided_steps, step_inputs
from runtime.systems.anydoor import AnyDoor, AnyDoorConditions

Advance = Callable[[], object]
"""Called after every sampling step."""


class Preprocessing:
    """The stages before the networks: from the recorded pictures to reference and hint."""

    def __init__(self, run: GoldenRun, resolution: int) -> None:
        self._run = run
        self._resolution = resolution

    @cached_property
    def reference(self) -> PreparedReference:
        """Our reference."""
        arrays = self._run.arrays
        return prepare_reference(arrays["ref_image"], arrays["ref_mask"], self._run.ratios.reference)

    @cached_property
    def hint(self) -> Hint:
        """Our hint."""
        run = self._run
        scene, mask = run.arrays["tar_image"], run.arrays["tar_mask"]
        return make_hint(scene, mask, self.reference, run.ratios, run.mode, self._resolution)

    @property
    def region(self) -> Box:
        """The part of the scene that pasting may change."""
        return pasted_region(self.hint.geometry, self._run.mode.paste)

    def checks(self) -> Iterator[Check]:
        """Compare geometry, reference and hint."""
        run, geometry = self._run, self.hint.geometry
        ours = {
            "crop box": ("tar_box_yyxx_crop", _yyxx(geometry.crop)),
            "target box": ("tar_box_yyxx", _yyxx(geometry.box)),
            "sizes": ("extra_sizes", [*geometry.crop_size[::-1], *geometry.padded_size[::-1]]),
        }
        for stage, (name, found) in ours.items():
            if run.has(name):
                yield exact(run.label, f"geometry: {stage}", list(found), run.arrays[name].tolist())
        if run.reference is not None:
            image = self.reference.image.astype(np.float32) / 255
            yield from pixels(run.label, "reference", image, run.reference[0].transpose(1, 2, 0), scale=1)
        if run.hint is not None:
            yield from pixels(run.label, "hint", self.hint.hint[:3], run.hint[:3], scale=2)
            differing = int(np.count_nonzero(self.hint.hint[3] != run.hint[3]))
            yield exact(run.label, "hint: mask, differing", differing, 0)


class Networks:
    """The networks' stages, each fed with the recorded inputs: reference, hint and noise."""

    def __init__(self, run: GoldenRun, compositor: Compositor, advance: Advance) -> None:
        self._run = run
        assert isinstance(compositor.system, AnyDoor)
        self._engine = compositor.engine
        self._step = compositor.bundle.manifest.step
        self._defaults = compositor.defaults
        self._cache = compositor.system.cache
        self._tolerances = checks.TOLERANCES[compositor.bundle.manifest.precision]
        self._alphas_cumprod = compositor.bundle.constants()["alphas_cumprod"]
        self._advance = advance

    def id_tokens(self) -> NDArray[np.float32]:
        """Return ID tokens (2, T, D): of the recorded reference, and the unconditional ones."""
        reference = self._run.reference
        black = np.zeros_like(reference)
        both = [
            self._engine.to_host(self._engine.run(ID_ENCODER, {"reference": picture})["tokens"])
            for picture in (reference, black)
        ]
        return np.concatenate(both)

    def decode(self, latent: Array, output: str) -> Array:
        """Return one of the decode graph's outputs for a latent (1, C, h, w)."""
        return self._engine.to_host(self._engine.run(DECODE, {"latent": latent}, [output])[output])

    def sampling(self, timesteps: tuple[int, ...] | None = None) -> Sampling:
        """Return the parameters of the recorded run, perhaps with other timesteps."""
        arrays, timesteps = self._run.arrays, timesteps or self._run.timesteps
        return Sampling(
            steps=len(timesteps or ()),
            guidance_scale=float(arrays["guidance"]),
            control_scale=float(arrays["strength"]),
            timesteps=timesteps,
        )

    def latents(self, tokens: NDArray[np.float32], given: Sampling) -> Iterator[NDArray[np.float32]]:
        """Yield our latents (1, C, h, w) after every step, from the recorded hint, reference and noise."""
        hint = self._run.hint
        assert hint is not None
        sampling = self._parameters(given)
        schedule = ddim_schedule(self._alphas_cumprod, sampling.steps, timesteps=sampling.timesteps)
        tokens = tokens if any(guided_steps(sampling, schedule)) else tokens[:1]
        cache = self._cache if sampling.timesteps == self._run.timesteps else DetailMapCache(0)
        maps = DetailMaps(self._engine, CONTROL, cache, hint, tokens, schedule.timesteps.tolist(), 1)
        conditions = AnyDoorConditions(BankRows({"tokens": tokens}, 0, len(tokens) - 1, on_host=True), maps)
        start = self._run.arrays["x_T"].astype(np.float32)
        for latent in sample(self._engine, self._step, conditions, schedule, sampling, start):
            self._advance()
            yield self._engine.to_host(latent)

    def compare_tokens(self, tokens: NDArray[np.float32]) -> Iterator[Check]:
        """Compare the ID tokens of the reference and of the black picture."""
        recorded = (("ID tokens", "tokens_ref"), ("ID tokens, black", "tokens_zero"))
        for row, (stage, name) in enumerate(recorded):
            if self._run.has(name):
                yield self._relative(stage, tokens[row : row + 1], name, self._tolerances.tokens)

    def compare_detail_maps(self, tokens: NDArray[np.float32]) -> Iterator[Check]:
        """Compare the detail maps of the first step, or what was recorded of them."""
        recorded = self._run.detail_maps
        if not recorded and not self._run.has("ctl_first8"):
            return
        # in half precision, sums overflow
        found = [tensor[:1].astype(np.float32) for tensor in self._first_detail_maps(tokens).values()]
        for index, expected in recorded.items():
            if index >= len(found):
                raise AnyDoorError(
                    f"the case {self._run.label} has a detail map {index}, and this network makes "
                    f"{len(found)}"
                )
            # what was recorded in half precision is no more exact than that
            tolerance = max(self._tolerances.detail_maps, 1e-3 if expected.dtype == np.float16 else 0)
            yield relative(self._run.label, f"detail map {index}", found[index], expected, tolerance)
        if self._run.has("ctl_first8", "ctl_std") and not recorded:
            first = np.stack([tensor.ravel()[:8] for tensor in found])
            yield self._relative("detail maps: first 8", first, "ctl_first8", self._tolerances.detail_maps)
            std = np.array([tensor.std() for tensor in found])
            yield self._relative("detail maps: std", std, "ctl_std", self._tolerances.detail_maps)

    def compare_epsilon(self, tokens: NDArray[np.float32]) -> Iterator[Check]:
        """Compare the UNet's two predictions at the first step, computed as two samples without guidance."""
        if not self._run.has("eps_cond", "eps_uncond"):
            return
        assert self._run.timesteps is not None
        maps = self._first_detail_maps(tokens)
        sampling = self._parameters(
            Sampling(guidance_scale=1.0, control_scale=float(self._run.arrays["strength"]))
        )
        banks = [bank.name for bank in self._step.banks]
        halves = [
            StepOfSample(
                self._run.timesteps[-1],
                np.zeros(3, np.float32),
                np.zeros(2, np.float32),
                sampling,
                dict.fromkeys(banks, row),
                None,
            )
            for row in (0, 1)
        ]
        latent = np.repeat(self._run.arrays["x_T"].astype(np.float32), 2, axis=0)
        numbers = step_inputs(halves, self._step)
        inputs = {"latent": latent, "carry": np.zeros_like(latent), "tokens": tokens, **numbers}
        found = self._engine.run(DENOISE, {**inputs, **maps}, ["epsilon"])["epsilon"]
        epsilon = self._engine.to_host(found)
        for row, name in enumerate(("eps_cond", "eps_uncond")):
            yield self._relative(name, epsilon[row : row + 1], name, self._tolerances.epsilon)

    def compare_latents(self, found: list[NDArray[np.float32]]) -> Iterator[Check]:
        """Compare latents after every step."""
        label, recorded = self._run.label, self._run.arrays["latents"]
        yield exact(label, "latents: steps", len(found), len(recorded))
        for step, (ours, theirs) in enumerate(zip(found, recorded), 1):
            stage = f"latents, step {step}/{len(found)}"
            yield relative(label, stage, ours, theirs, self._tolerances.latents)

    def compare_last_of_50(self, tokens: NDArray[np.float32]) -> Iterator[Check]:
        """Compare the last latents of a recorded run of 50 steps."""
        if self._run.has("latents50_final", "ddim50_timesteps"):
            timesteps = tuple(sorted(self._run.arrays["ddim50_timesteps"].tolist()))
            *_, last = self.latents(tokens, self.sampling(timesteps))
            stage = f"latents, step {len(timesteps)}/{len(timesteps)}"
            yield self._relative(stage, last, "latents50_final", self._tolerances.latents)

    def compare_decoded(self) -> Iterator[Check]:
        """Compare the VAE's picture of the recorded last latents."""
        if not self._run.has("latents"):
            return
        last = self._run.arrays["latents"][-1]
        for name, region in (("decoded", slice(None)), ("decoded_crop", slice(128, 384))):
            if self._run.has(name):
                decoded = self.decode(last, "decoded")[:, :, region, region]
                value = psnr(decoded, self._run.arrays[name], peak=2)
                yield at_least(self._run.label, name, value, self._tolerances.decoded_psnr, "dB")

    def _first_detail_maps(self, tokens: NDArray[np.float32]) -> dict[str, Array]:
        """Detail maps of the first step, conditional and unconditional."""
        assert self._run.timesteps is not None
        timestep = np.full(2, self._run.timesteps[-1], np.float32)
        hint = self._run.hint
        assert hint is not None
        maps = self._engine.run(CONTROL, {"hint": hint[None], "timestep": timestep, "tokens": tokens})
        return {name: self._engine.to_host(tensor) for name, tensor in maps.items()}

    def _parameters(self, given: Sampling) -> SamplingParameters:
        return sampling_parameters(given, self._defaults)

    def _relative(self, stage: str, found: Array, name: str, tolerance: float) -> Check:
        return relative(self._run.label, stage, found, self._run.arrays[name], tolerance)


class RunComparison:
    """Compares one recorded run with the runtime, from its pictures to the composite."""

    def __init__(self, run: GoldenRun, compositor: Compositor, advance: Advance) -> None:
        self.run = run
        self._compositor = compositor
        self._tolerances = checks.TOLERANCES[compositor.bundle.manifest.precision]
        self._advance = advance
        self._preprocessing = Preprocessing(run, compositor.bundle.manifest.resolution)
        self._networks = Networks(run, compositor, advance)

    def checks(self) -> Iterator[Check]:
        """Yield all checks that the recording allows, in the order of the pipeline."""
        if self.run.has("ref_image", "ref_mask", "tar_image", "tar_mask", "ratios"):
            yield from self._preprocessing.checks()
        if self.run.reference is None or self.run.hint is None or not self.run.has("x_T", "steps"):
            return
        networks = self._networks
        tokens = networks.id_tokens()
        yield from networks.compare_tokens(tokens)
        yield from networks.compare_detail_maps(tokens)
        yield from networks.compare_epsilon(tokens)
        if self.run.has("latents"):
            found = list(networks.latents(tokens, networks.sampling()))
            yield from networks.compare_latents(found)
            if self._has_composite:
                yield self._networks_only(found[-1])
        yield from networks.compare_last_of_50(tokens)
        yield from networks.compare_decoded()
        if self._has_composite:
            yield from self._end_to_end()

    def steps(self) -> int:
        """Count the sampling steps that the comparison takes."""
        steps = 0
        if self.run.reference is not None and self.run.hint is not None:
            recorded = len(self.run.timesteps or ())
            steps += recorded * self.run.has("latents", "steps")
            steps += recorded * (self._has_composite and self.run.has("steps"))
            steps += len(self.run.arrays.get("ddim50_timesteps", ())) * self.run.has("latents50_final")
        return steps

    @property
    def _has_composite(self) -> bool:
        return self.run.has("tar_image", "composite", "ratios")

    def _networks_only(self, latent: NDArray[np.float32]) -> Check:
        """Compare the composite that follows from the recorded reference and hint."""
        image = self._networks.decode(latent, "image")[0]
        scene, geometry = self.run.arrays["tar_image"], self._preprocessing.hint.geometry
        composite = paste_back(image, scene, geometry, self.run.mode.paste)
        close = np.abs(composite.astype(int) - self.run.arrays["composite"].astype(int)).max(axis=-1) <= 1
        share = float(close.mean())
        return at_least(
            self.run.label, "composite, networks only", share, self._tolerances.composite_share, "within 1"
        )

    def _end_to_end(self) -> Iterator[Check]:
        """Compare the composite that follows from the pictures, as `anydoor composite` makes it."""
        composite, expected = self._composite(), self.run.arrays["composite"]
        slices = self._preprocessing.region.slices
        value = psnr(composite[slices], expected[slices], peak=255)
        yield at_least(self.run.label, "composite, end to end", value, self._tolerances.composite_psnr, "dB")
        differing = (composite != expected).any(axis=-1)
        differing[slices] = False
        yield exact(self.run.label, "unchanged, differing", int(np.count_nonzero(differing)), 0)

    def _composite(self) -> Array:
        arrays, ratios = self.run.arrays, self.run.ratios
        placement = Placement(
            arrays["ref_image"],
            arrays["ref_mask"].astype(bool),
            mask=arrays["tar_mask"].astype(bool),
            mode=self.run.mode_name,
            reference_ratio=ratios.reference,
            box_ratio=ratios.box,
            crop_ratio=ratios.crop,
            keep_specks=True,
        )
        noise = arrays["x_T"].astype(np.float32)
        request = Request(arrays["tar_image"], [placement], 0, self._networks.sampling(), 1, noise)
        return self._compositor.run(request, lambda done, total: self._advance())[0].image


def compare_hf_maps(path: Path) -> Iterator[Check]:
    """Compare the high-frequency maps of a file of recorded HF maps; yields nothing for any other file."""
    with read_archive(path) as stored:
        indices = [name[5:7] for name in stored.files if name.startswith("sobel") and name.endswith("_out")]
        for index in indices:
            found = high_frequency_map(stored[f"sobel{index}_image"], stored[f"sobel{index}_mask_u8"])
            difference = np.abs(found.astype(int) - stored[f"sobel{index}_out"].astype(int))
            share = float((difference <= 1).mean())
            stage = f"HF map {index}: within a level"
            yield at_least(path.stem, stage, share, checks.PIXEL_SHARE, "of values")


def _yyxx(box: Box) -> list[int]:
    return [box.y0, box.y1, box.x0, box.x1]

"""The stages of the pipeline held against a recorded run, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.golden import Array, GoldenRun, read_archive
from engines.spec import CONTROL, DECODE, DENOISE, ID_ENCODER
from runtime import Compositor, Placement, Sampling
from runtime.diffusion.ddim import ddim_schedule
from runtime.imaging.boxes import Box
from runtime.imaging.collage import Hint, make_hint
from runtime.imaging.high_frequency_map import high_frequency_map
from runtime.imaging.paste_back import paste_back, pasted_region
from runtime.imaging.reference import PreparedReference, prepare_reference
from runtime.sampling.detail_maps import DetailMapCache, DetailMaps
from runtime.sampling.running_batch import StepOfSample, guided_steps, sample, step_inputs

TOKENS_TOLERANCE = 1e-4
DETAIL_TOLERANCE = {"float32": 1e-4, "float16": 1e-3}
EPSILON_TOLERANCE = 3e-4
LATENT_TOLERANCE = 1e-3
DECODED_PSNR = 60.0
COMPOSITE_SHARE = 0.999
COMPOSITE_PSNR = 40.0
PIXEL_SHARE = 0.995
"""Least share of values of reference, hint and HF map within about one level of 255."""
PIXEL_MEAN = 0.2 / 255
"""Largest mean difference of reference and hint, on the 0..1 scale."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    run: str
    stage: str
    measured: str
    tolerance: str
    used: float
    """Part of the tolerance that is used up; above 1 is out of it."""

    @property
    def passed(self) -> bool:
        """Whether the stage is within its tolerance; not so if the measurement is not a number."""
        return self.used <= 1.0

    def row(self) -> str:
        """The line as it is printed."""
        verdict = "ok" if self.passed else "OUT"
        return f"{self.run:<22} {self.stage:<26} {self.measured:>26}   {self.tolerance:<24} {verdict}"


HEADER = f"{'run':<22} {'stage':<26} {'measured':>26}   {'tolerance':<24}"


def relative(run: str, stage: str, found: Array, expected: Array, tolerance: float) -> Check:
    """Norm of the difference over norm of what was expected."""
    expected = expected.astype(np.float64)
    error = float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))
    return Check(run, stage, f"{error:.1e}", f"<= {tolerance:.0e}", error / tolerance)


def exact(run: str, stage: str, found: object, expected: object) -> Check:
    """Equal or not."""
    same = found == expected
    return Check(
        run, stage, "equal" if same else f"{found} != {expected}", "equal", 0.0 if same else math.inf
    )


def at_least(run: str, stage: str, value: float, limit: float, unit: str) -> Check:
    """A figure that must not fall below a limit."""
    used = math.inf if math.isnan(value) else limit / value if value > 0 else math.inf
    return Check(run, stage, f"{value:.5g} {unit}", f">= {limit:g} {unit}", used)


def pixels(run: str, stage: str, found: Array, expected: Array, scale: float) -> Iterator[Check]:
    """Values of full scale `scale`: nearly all within one level of 255, and a small mean difference."""
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)) / scale
    share = float((difference <= 1.01 / 255).mean())
    yield at_least(run, f"{stage}: within a level", share, PIXEL_SHARE, "of values")
    mean = float(difference.mean())
    yield Check(
        run, f"{stage}: mean", f"{mean * 255:.2e}/255", f"<= {PIXEL_MEAN * 255:g}/255", mean / PIXEL_MEAN
    )


def psnr(found: Array, expected: Array, peak: float) -> float:
    """Peak signal-to-noise ratio in dB; infinite if equal."""
    error = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


class RunComparison:
    """Compares one recorded run with the runtime, station by station."""

    def __init__(self, run: GoldenRun, compositor: Compositor, progress: tqdm[Any]) -> None:
        self.run = run
        self.label = f"{run.case} {run.prefix}"
        self.compositor = compositor
        self.engine = compositor.engine
        self.progress = progress
        constants = compositor.bundle.constants()
        self.alphas_cumprod = constants["alphas_cumprod"]

    def checks(self) -> Iterator[Check]:
        """All checks that the recording allows, in the order of the pipeline."""
        if self.run.has("ref_image", "ref_mask", "tar_image", "tar_mask", "ratios"):
            yield from self.preprocessing()
        if self.run.reference is None or self.run.hint is None or not self.run.has("x_T", "steps"):
            return
        tokens = self.id_tokens()
        yield from self.compare_tokens(tokens)
        yield from self.compare_detail_maps(tokens)
        yield from self.compare_epsilon(tokens)
        yield from self.compare_sampling(tokens)
        yield from self.compare_decoded()
        if self.run.has("tar_image", "composite", "ratios"):
            yield self.end_to_end_region(composite := self.end_to_end())
            yield self.end_to_end_rest(composite)

    # pictures -> hint

    def prepared(self) -> tuple[PreparedReference, Hint]:
        """Reference and hint from the pictures."""
        arrays, ratios = self.run.arrays, self.run.ratios
        reference = prepare_reference(arrays["ref_image"], arrays["ref_mask"], ratios.reference)
        hint = make_hint(
            arrays["tar_image"],
            arrays["tar_mask"],
            reference,
            ratios,
            self.run.mode,
            self.compositor.bundle.manifest.model.resolution,
        )
        return reference, hint

    def preprocessing(self) -> Iterator[Check]:
        """Geometry, reference and hint."""
        reference, hint = self.prepared()
        geometry = hint.geometry
        recorded = {
            "crop box": ("tar_box_yyxx_crop", _yyxx(geometry.crop)),
            "target box": ("tar_box_yyxx", _yyxx(geometry.box)),
            "sizes": ("extra_sizes", [*geometry.crop_size[::-1], *geometry.padded_size[::-1]]),
        }
        for stage, (name, found) in recorded.items():
            if self.run.has(name):
                yield exact(self.label, f"geometry: {stage}", list(found), self.run.arrays[name].tolist())
        if self.run.reference is not None:
            image = reference.image.astype(np.float32) / 255
            expected = self.run.reference[0].transpose(1, 2, 0)
            yield from pixels(self.label, "reference", image, expected, scale=1)
        if self.run.hint is not None:
            yield from pixels(self.label, "hint", hint.hint[:3], self.run.hint[:3], scale=2)
            differing = int(np.count_nonzero(hint.hint[3] != self.run.hint[3]))
            yield exact(self.label, "hint: mask, differing", differing, 0)

    # networks, fed with the recorded inputs

    def id_tokens(self) -> NDArray[np.float32]:
        """ID tokens of the recorded reference, and the unconditional ones, (2, T, D)."""
        reference = self.run.reference
        black = np.zeros_like(reference)
        both = [
            self.engine.to_host(self.engine.run(ID_ENCODER, {"reference": picture})["tokens"])
            for picture in (reference, black)
        ]
        return np.concatenate(both)

    def compare_tokens(self, tokens: NDArray[np.float32]) -> Iterator[Check]:
        """ID tokens of the reference and of the black picture."""
        for index, (stage, name) in enumerate(
            (("ID tokens", "tokens_ref"), ("ID tokens, black", "tokens_zero"))
        ):
            if self.run.has(name):
                yield relative(
                    self.label, stage, tokens[index : index + 1], self.run.arrays[name], TOKENS_TOLERANCE
                )

    def first_detail_maps(self, tokens: NDArray[np.float32]) -> dict[str, Array]:
        """Detail maps of the first step, conditional and unconditional."""
        assert self.run.timesteps is not None
        timestep = np.full(2, self.run.timesteps[-1], np.float32)
        hint = self.run.hint
        assert hint is not None
        maps = self.engine.run(CONTROL, {"hint": hint[None], "timestep": timestep, "tokens": tokens})
        return {name: self.engine.to_host(tensor) for name, tensor in maps.items()}

    def compare_detail_maps(self, tokens: NDArray[np.float32]) -> Iterator[Check]:
        """The detail maps of the first step, or what was recorded of them."""
        arrays = self.run.arrays
        recorded = self.run.detail_maps
        if not recorded and not self.run.has("ctl_first8"):
            return
        found = [tensor[:1] for tensor in self.first_detail_maps(tokens).values()]
        for index, expected in enumerate(recorded):
            tolerance = DETAIL_TOLERANCE[str(expected.dtype)]
            yield relative(self.label, f"detail map {index}", found[index], expected, tolerance)
        if self.run.has("ctl_first8", "ctl_std") and not recorded:
            first = np.stack([tensor.ravel()[:8] for tensor in found])
            yield relative(
                self.label, "detail maps: first 8", first, arrays["ctl_first8"], DETAIL_TOLERANCE["float32"]
            )
            std = np.array([tensor.std() for tensor in found])
            yield relative(
                self.label, "detail maps: std", std, arrays["ctl_std"], DETAIL_TOLERANCE["float32"]
            )

    def compare_epsilon(self, tokens: NDArray[np.float32]) -> Iterator[Check]:
        """The UNet's two predictions at the first step, as two samples without guidance."""
        if not self.run.has("eps_cond", "eps_uncond"):
            return
        assert self.run.timesteps is not None
        maps = self.first_detail_maps(tokens)
        strength = float(self.run.arrays["strength"])
        halves = [
            StepOfSample(self.run.timesteps[-1], np.zeros(3, np.float32), 1.0, strength, (row, row), None)
            for row in (0, 1)
        ]
        latent = np.repeat(self.run.arrays["x_T"].astype(np.float32), 2, axis=0)
        inputs = {"latent": latent, "carry": np.zeros_like(latent), "tokens": tokens, **step_inputs(halves)}
        epsilon = self.engine.to_host(self.engine.run(DENOISE, {**inputs, **maps}, ["epsilon"])["epsilon"])
        for row, name in enumerate(("eps_cond", "eps_uncond")):
            yield relative(
                self.label, f"{name}", epsilon[row : row + 1], self.run.arrays[name], EPSILON_TOLERANCE
            )

    def sampling(self, timesteps: tuple[int, ...] | None = None) -> Sampling:
        """The parameters of the recorded run."""
        timesteps = timesteps or self.run.timesteps
        return Sampling(
            steps=len(timesteps or ()),
            guidance_scale=float(self.run.arrays["guidance"]),
            control_scale=float(self.run.arrays["strength"]),
            timesteps=timesteps,
        )

    def latents(self, tokens: NDArray[np.float32], sampling: Sampling) -> Iterator[NDArray[np.float32]]:
        """Our latents after every step, from the recorded hint, reference and noise."""
        hint = self.run.hint
        assert hint is not None
        schedule = ddim_schedule(self.alphas_cumprod, sampling.steps, timesteps=sampling.timesteps)
        tokens = tokens if any(guided_steps(sampling, schedule)) else tokens[:1]
        cache = self.compositor.cache if sampling.timesteps == self.run.timesteps else DetailMapCache(0)
        maps = DetailMaps(self.engine, cache, hint, tokens, schedule.timesteps.tolist(), 1)
        start = self.run.arrays["x_T"].astype(np.float32)
        for latent in sample(self.engine, maps, tokens, schedule, sampling, start):
            self.progress.update()
            yield self.engine.to_host(latent)

    def compare_sampling(self, tokens: NDArray[np.float32]) -> Iterator[Check]:
        """Latents after every step, and the picture that the networks alone make of them."""
        arrays = self.run.arrays
        if self.run.has("latents"):
            found = list(self.latents(tokens, self.sampling()))
            errors = [
                relative(self.label, f"latents, step {i + 1}/{len(found)}", ours, theirs, LATENT_TOLERANCE)
                for i, (ours, theirs) in enumerate(zip(found, arrays["latents"]))
            ]
            yield exact(self.label, "latents: steps", len(found), len(arrays["latents"]))
            yield from errors
            if self.run.has("tar_image", "composite", "ratios"):
                yield self.networks_only(found[-1])
        if self.run.has("latents50_final", "ddim50_timesteps"):
            timesteps = tuple(sorted(arrays["ddim50_timesteps"].tolist()))
            *_, last = self.latents(tokens, self.sampling(timesteps))
            stage = f"latents, step {len(timesteps)}/{len(timesteps)}"
            yield relative(self.label, stage, last, arrays["latents50_final"], LATENT_TOLERANCE)

    def compare_decoded(self) -> Iterator[Check]:
        """The VAE's picture of the recorded last latents."""
        if not self.run.has("latents"):
            return
        last = self.run.arrays["latents"][-1]
        for name, region in (("decoded", slice(None)), ("decoded_crop", slice(128, 384))):
            if self.run.has(name):
                decoded = self.engine.to_host(
                    self.engine.run(DECODE, {"latent": last}, ["decoded"])["decoded"]
                )
                value = psnr(decoded[:, :, region, region], self.run.arrays[name], peak=2)
                yield at_least(self.label, name, value, DECODED_PSNR, "dB")

    def networks_only(self, latent: NDArray[np.float32]) -> Check:
        """The composite from the recorded reference and hint."""
        image = self.engine.to_host(self.engine.run(DECODE, {"latent": latent}, ["image"])["image"])[0]
        _, hint = self.prepared()
        composite = paste_back(image, self.run.arrays["tar_image"], hint.geometry, self.run.mode)
        close = np.abs(composite.astype(int) - self.run.arrays["composite"].astype(int)).max(axis=-1) <= 1
        share = float(close.mean())
        return at_least(self.label, "composite, networks only", share, COMPOSITE_SHARE, "within 1")

    # pictures -> picture

    def end_to_end(self) -> Array:
        """The composite from the pictures, as `anydoor composite` makes it."""
        arrays = self.run.arrays
        placement = Placement(
            arrays["ref_image"],
            arrays["ref_mask"].astype(bool),
            mask=arrays["tar_mask"].astype(bool),
            mode=self.run.mode_name,
            ratios=self.run.ratios,
        )
        result = self.compositor.run(
            arrays["tar_image"],
            placement,
            seed=0,
            sampling=self.sampling(),
            initial_noise=arrays["x_T"].astype(np.float32),
            on_step=lambda done, total: self.progress.update(),
        )
        return result[0].image

    def end_to_end_region(self, composite: Array) -> Check:
        """The part of the scene that was to change."""
        slices = self.region().slices
        value = psnr(composite[slices], self.run.arrays["composite"][slices], peak=255)
        return at_least(self.label, "composite, end to end", value, COMPOSITE_PSNR, "dB")

    def end_to_end_rest(self, composite: Array) -> Check:
        """The part of the scene that was not to change."""
        differing = (composite != self.run.arrays["composite"]).any(axis=-1)
        differing[self.region().slices] = False
        return exact(self.label, "unchanged, differing", int(np.count_nonzero(differing)), 0)

    def region(self) -> Box:
        """What the paste-back may write."""
        return pasted_region(self.prepared()[1].geometry, self.run.mode)

    def steps(self) -> int:
        """Sampling steps that the comparison takes."""
        steps = 0
        if self.run.reference is not None and self.run.hint is not None:
            recorded = len(self.run.timesteps or ())
            steps += recorded * self.run.has("latents", "steps")
            steps += recorded * self.run.has("tar_image", "composite", "ratios", "steps")
            steps += len(self.run.arrays.get("ddim50_timesteps", ())) * self.run.has("latents50_final")
        return steps


def compare_hf_maps(path: Path) -> Iterator[Check]:
    """The high-frequency maps of a file of recorded HF maps, or nothing if the file is another one."""
    with read_archive(path) as stored:
        indices = [name[5:7] for name in stored.files if name.startswith("sobel") and name.endswith("_out")]
        for index in indices:
            found = high_frequency_map(stored[f"sobel{index}_image"], stored[f"sobel{index}_mask_u8"])
            difference = np.abs(found.astype(int) - stored[f"sobel{index}_out"].astype(int))
            share = float((difference <= 1).mean())
            yield at_least(path.stem, f"HF map {index}: within a level", share, PIXEL_SHARE, "of values")


def _yyxx(box: Box) -> list[int]:
    return [box.y0, box.y1, box.x0, box.x1]

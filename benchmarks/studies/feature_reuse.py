"""Does it pay to reuse the UNet's deep features in neighbouring steps, as DeepCache does? In PyTorch.

    python benchmarks/studies/feature_reuse.py

A full step computes everything. A shallow step computes the outermost level only: the input of its last block
from the levels below is that of the last full step (Ma et al., "DeepCache", 2024, section 3.3). A shallow
step would need a second graph, and only the detail maps of the outermost level.

For several samplers, numbers of steps and distances between full steps, prints the operations of the UNet
relative to 50 full steps, and the distance of the last latents to those of dpm_solver_2m with 100 steps from
the same noise. Reuse pays where full steps alone, at the same operations, are farther away. Also counts the
share of a shallow step in the full-size network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.support.example import CHECKPOINT, example_checkpoint
from benchmarks.support.machine import describe
from benchmarks.support.numbers import positive
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.sampling_step import guided_step
from benchmarks.support.truth_set import TruthPair, truth_pairs
from engines.bundle import sha256
from engines.errors import AnyDoorError
from export.systems.anydoor import AnyDoorSource
from runtime.diffusion.ddim import Schedule
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError
from runtime.imaging.collage import make_hint
from runtime.imaging.geometry import Ratios
from runtime.imaging.modes import MODES
from runtime.imaging.reference import prepare_reference
from runtime.progress_bar import ProgressBar
from training.network.architecture import REFERENCE_SIZE, Architecture
from training.network.checkpoint import read_checkpoint
from training.network.modules import AnyDoor

TARGET_STEPS = 100
SAMPLERS_AND_STEPS = (
    ("ddim", 50, (1, 2, 3, 5)),
    ("dpm_solver_2m", 25, (1, 2, 3)),
    ("dpm_solver_2m", 20, (1, 2)),
    ("dpm_solver_2m", 16, (1, 2)),
    ("dpm_solver_2m", 12, (1, 2)),
    ("dpm_solver_2m", 8, (1,)),
)
"""Sampler, steps, and the distances between full steps."""


class ReusingUNet:
    """The UNet, whose deep part can be left out."""

    def __init__(self, model: AnyDoor) -> None:
        self._model = model
        self._deep: Tensor | None = None
        """What the levels below returned at the last full step."""

    def predict_noise(
        self, latent: Tensor, timestep: Tensor, tokens: Tensor, details: Sequence[Tensor], shallow: bool
    ) -> Tensor:
        """See `AnyDoor.predict_noise`; a shallow step takes the deep features of the last full one."""
        unet = self._model.unet
        embedding = unet.time_embedding(unet.time_proj(timestep).to(latent.dtype))
        hidden = unet.conv_in(latent)
        outermost, *deeper = unet.down_blocks
        last_block = unet.up_blocks[-1]
        own = len(last_block.resnets)
        skips = [hidden]
        if shallow:
            attentions = getattr(outermost, "attentions", [None] * len(outermost.resnets))
            for resnet, attention in zip(outermost.resnets, attentions):
                hidden = resnet(hidden, embedding)
                if attention is not None:
                    hidden = attention(hidden, encoder_hidden_states=tokens, return_dict=False)[0]
                skips.append(hidden)
        else:
            for block in (outermost, *deeper):
                hidden, outputs = _call(block, hidden, embedding, tokens)
                skips += outputs
        skips = [skip + detail for skip, detail in zip(skips, details)]
        if not shallow:
            hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=tokens) + details[-1]
            for block in unet.up_blocks[:-1]:
                count = len(block.resnets)
                hidden = _call_up(block, hidden, tuple(skips[-count:]), embedding, tokens)
                del skips[-count:]
            self._deep = hidden
        assert self._deep is not None
        hidden = _call_up(last_block, self._deep, tuple(skips[-own:]), embedding, tokens)
        output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        if self._model.architecture.prediction == "epsilon":
            return output
        signal, noise = (
            rate[timestep.long()].view(-1, 1, 1, 1)
            for rate in (self._model.signal_rate, self._model.noise_rate)
        )
        return signal * output + noise * latent


def _call(block: Any, hidden: Tensor, embedding: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
    if getattr(block, "has_cross_attention", False):
        return block(hidden, temb=embedding, encoder_hidden_states=tokens)  # type: ignore[no-any-return]
    return block(hidden, temb=embedding)  # type: ignore[no-any-return]


def _call_up(block: Any, hidden: Tensor, skips: Any, embedding: Tensor, tokens: Tensor) -> Tensor:
    more = {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}
    result: Tensor = block(hidden, res_hidden_states_tuple=skips, temb=embedding, **more)
    return result


class PairSampler:
    """Samples latents of one pair, with or without reuse."""

    def __init__(
        self, model: AnyDoor, pair: TruthPair, resolution: int, guidance_scale: float, seed: int
    ) -> None:
        placement = pair.placement()
        reference = prepare_reference(np.asarray(placement.reference), np.asarray(placement.reference_mask))
        hint = make_hint(
            pair.guessed, pair.box, reference, Ratios(), MODES["keep_background"], resolution
        ).hint
        pictures = torch.zeros(2, 3, REFERENCE_SIZE, REFERENCE_SIZE)  # the second is black: unconditional
        pictures[0] = torch.from_numpy(reference.image).permute(2, 0, 1) / 255
        self._model, self._unet, self._guidance = model, ReusingUNet(model), guidance_scale
        self._hint = torch.from_numpy(hint)[None]
        self._tokens = model.encode_reference(pictures)
        self._maps: dict[int, tuple[Tensor, ...]] = {}
        side = resolution // model.architecture.latent_factor
        generator = torch.Generator().manual_seed(seed)
        self._start = torch.randn(1, model.architecture.latent_channels, side, side, generator=generator)

    def latents(self, schedule: Schedule, every: int = 1, advance: Callable[[], object] = int) -> Tensor:
        """Return the last latents (1, C, h, w); every `every`-th step is a full one."""
        latent = self._start
        previous = torch.zeros_like(latent)
        steps = zip(schedule.timesteps.tolist(), schedule.coefficients.tolist())
        for step, (timestep, coefficients) in enumerate(steps):
            both = torch.full((2,), float(timestep))
            if timestep not in self._maps:
                self._maps[timestep] = self._model.detail_maps(self._hint, both, self._tokens)
            epsilon = self._unet.predict_noise(
                latent.repeat(2, 1, 1, 1), both, self._tokens, self._maps[timestep], step % every != 0
            )
            latent, previous = guided_step(latent, epsilon, self._guidance, coefficients, previous)
            advance()
        return latent


def shallow_share(model: AnyDoor, resolution: int) -> float:
    """Count the operations of a shallow step / those of a full one; works without weights (meta device)."""
    architecture = model.architecture
    device = next(model.unet.parameters()).device
    side = resolution // architecture.latent_factor
    unet = ReusingUNet(model)
    inputs = (
        torch.zeros(1, architecture.latent_channels, side, side, device=device),
        torch.zeros(1, device=device),
        torch.zeros(1, architecture.token_count, architecture.token_width, device=device),
        [torch.zeros(1, *shape, device=device) for shape in architecture.detail_shapes(resolution)],
    )
    counts = []
    for shallow in (False, True):
        with FlopCounterMode(display=False) as counter:
            unet.predict_noise(*inputs, shallow)
        counts.append(counter.get_total_flops())
    return float(counts[1] / counts[0])


@dataclass(frozen=True)
class ReuseResult:
    """One line of the table."""

    sampler: str
    steps: int
    every: int
    """Distance between full steps; 1 is without reuse."""
    operations: float
    """Of the UNet, relative to 50 full steps."""
    distance: float
    """Norm of the difference between last latents and target / norm of the target; the target is that of
    dpm_solver_2m with `TARGET_STEPS` steps."""


def measure(
    model: AnyDoor, pairs: Sequence[TruthPair], resolution: int, guidance_scale: float
) -> list[ReuseResult]:
    """Measure all combinations."""
    alphas = alphas_cumprod()
    share = shallow_share(model, resolution)
    todo = [(sampler, steps, every) for sampler, steps, all_of in SAMPLERS_AND_STEPS for every in all_of]
    distances: dict[tuple[str, int, int], list[float]] = {key: [] for key in todo}
    total = len(pairs) * (TARGET_STEPS + sum(steps for _, steps, _ in todo))
    with ProgressBar(total=total, unit="step") as progress, torch.no_grad():
        for number, pair in enumerate(pairs):
            pair_sampler = PairSampler(model, pair, resolution, guidance_scale, number)
            target = pair_sampler.latents(
                SAMPLERS["dpm_solver_2m"](alphas, TARGET_STEPS, 0.0, None), advance=progress.update
            )
            for sampler, steps, every in todo:
                schedule = SAMPLERS[sampler](alphas, steps, 0.0, None)
                found = pair_sampler.latents(schedule, every, progress.update)
                distances[sampler, steps, every].append(float((found - target).norm() / target.norm()))
    rows = []
    for (sampler, steps, every), own in distances.items():
        full = -(-steps // every)
        operations = (full + (steps - full) * share) / 50
        rows.append(ReuseResult(sampler, steps, every, operations, float(np.mean(own))))
    return rows


def table(rows: Sequence[ReuseResult]) -> str:
    """Format the table."""
    lines = [f"{'sampler':<14} {'steps':>5} {'full every':>10} {'operations':>10} {'distance':>9}"]
    for row in sorted(rows, key=lambda row: -row.operations):
        lines.append(
            f"{row.sampler:<14} {row.steps:>5} {row.every:>10} {row.operations:>9.1%} {row.distance:>9.3f}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="feature_reuse.py",
        description="Measure how much latents change if the UNet's deep features are reused.",
        epilog="examples:\n"
        "  python benchmarks/studies/feature_reuse.py --count 2\n"
        "  python benchmarks/studies/feature_reuse.py --checkpoint small.safetensors --resolution 256\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help=f"default: {CHECKPOINT}",
    )
    result.add_argument(
        "--resolution", type=positive(int), metavar="PX", help="default: what the network was trained for"
    )
    result.add_argument("--count", type=int, default=8, metavar="N", help="pairs (default: 8)")
    result.add_argument("--guidance-scale", type=float, default=2.0, metavar="G", help="default: 2")
    result.add_argument(
        "--output",
        type=Path,
        default=Path("build/feature_reuse.json"),
        metavar="FILE",
        help="results (default: %(default)s)",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write a JSON file; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    try:
        if options.count < 1:
            raise InputError(f"--count must be at least 1, not {options.count}")
        require_writable(options.output)
        path = options.checkpoint or example_checkpoint()
        checkpoint = read_checkpoint(path)
        resolution = options.resolution or checkpoint.resolution or 512
        AnyDoorSource(checkpoint).check_size((resolution, resolution))
        model = AnyDoor(checkpoint.architecture, ("unet", "control", "id_encoder")).eval()
        model.load_official_state_dict(checkpoint.tensors)
        with torch.device("meta"):
            full_size = AnyDoor(Architecture(), ("unet",))
        shares = {"this": shallow_share(model, resolution), "SD 2.1": shallow_share(full_size, 512)}
        rows = measure(model, list(truth_pairs(options.count)), resolution, options.guidance_scale)
        content = {
            "command": " ".join(["python benchmarks/studies/feature_reuse.py", *given]),
            "machine": describe(),
            "checkpoint": {"file": path.name, "sha256": sha256(path)},
            "resolution": resolution,
            "guidance_scale": options.guidance_scale,
            "count": options.count,
            "shallow_share": shares,
            "rows": [asdict(row) for row in rows],
        }
        write_results(options.output, content)
    except (AnyDoorError, OSError) as error:
        print(f"feature_reuse.py: {error}", file=sys.stderr)
        return 2
    print(f"operations of a shallow step / a full one: {shares['this']:.2f}, SD 2.1: {shares['SD 2.1']:.2f}")
    print(table(rows))
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

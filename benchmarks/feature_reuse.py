"""Would it pay to reuse the UNet's deep features between neighbouring steps, as DeepCache does? In PyTorch.

    python benchmarks/feature_reuse.py

At a full step everything is computed. At a shallow one, only the outermost level is: what its last block
would get from below is kept from the last full step (Ma et al., "DeepCache", 2024, section 3.3). A shallow
step needs a second graph, and only the detail maps of the outermost level.

Prints, for numbers of steps and of steps between full ones, the operations of the UNet relative to 50 full
steps, and how far the last latents are from the limit: dpm_solver_2m with 100 steps, same noise. Reuse pays
where fewer full steps at the same operations are farther from the limit. Also counts the share of a shallow
step in the full-size network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.machine import describe
from benchmarks.truth_set import TruthPair, truth_pairs
from engines.bundle import sha256
from engines.errors import AnyDoorError
from export.onnx_bundle import check_resolution
from runtime.diffusion.ddim import Schedule
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.diffusion.samplers import sampler_schedule
from runtime.errors import InputError
from runtime.imaging.collage import MODES, Ratios, make_hint
from runtime.imaging.reference import prepare_reference
from training.network.architecture import REFERENCE_SIZE, Architecture
from training.network.checkpoint import read_checkpoint
from training.network.modules import AnyDoor

LIMIT_STEPS = 100
SOLVERS_AND_STEPS = (
    ("ddim", 50, (1, 2, 3, 5)),
    ("dpm_solver_2m", 25, (1, 2, 3)),
    ("dpm_solver_2m", 20, (1, 2)),
    ("dpm_solver_2m", 16, (1, 2)),
    ("dpm_solver_2m", 12, (1, 2)),
    ("dpm_solver_2m", 8, (1,)),
)
"""Solver, steps, and every how many of them everything is computed."""


class ReusingUNet:
    """The UNet, whose deep part may be left out."""

    def __init__(self, model: AnyDoor) -> None:
        self._model = model
        self._deep: Tensor | None = None
        """What came from below at the last full step."""

    def predict_noise(
        self, latent: Tensor, timestep: Tensor, tokens: Tensor, details: Sequence[Tensor], shallow: bool
    ) -> Tensor:
        """As `AnyDoor.predict_noise`; `shallow` takes the deep features of the last full step."""
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


class Sampler:
    """Takes one pair from noise to latents, with or without reuse."""

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
        """The last latents, everything computed at every `every`-th step only."""
        latent = self._start
        before = torch.zeros_like(latent)
        for step, (timestep, factors) in enumerate(
            zip(schedule.timesteps.tolist(), schedule.coefficients.tolist())
        ):
            both = torch.full((2,), float(timestep))
            if timestep not in self._maps:
                self._maps[timestep] = self._model.detail_maps(self._hint, both, self._tokens)
            conditional, unconditional = self._unet.predict_noise(
                latent.repeat(2, 1, 1, 1), both, self._tokens, self._maps[timestep], step % every != 0
            ).chunk(2)
            epsilon = unconditional + self._guidance * (conditional - unconditional)
            latent = factors[0] * latent + factors[1] * epsilon + factors[2] * before
            before = epsilon
            advance()
        return latent


def shallow_share(model: AnyDoor, resolution: int) -> float:
    """Operations of a shallow step / those of a full one, counted; works without weights (meta device)."""
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
class Row:
    """One line of the table."""

    sampler: str
    steps: int
    every: int
    """Everything is computed at every so many steps."""
    operations: float
    """Of the UNet, relative to 50 full steps."""
    distance: float
    """Root mean square of the last latents' difference to the limit, over that of the limit itself."""


def measure(model: AnyDoor, pairs: Sequence[TruthPair], resolution: int, guidance_scale: float) -> list[Row]:
    """All rows."""
    alphas = alphas_cumprod()
    share = shallow_share(model, resolution)
    todo = [(sampler, steps, every) for sampler, steps, all_of in SOLVERS_AND_STEPS for every in all_of]
    distances: dict[tuple[str, int, int], list[float]] = {key: [] for key in todo}
    total = len(pairs) * (LIMIT_STEPS + sum(steps for _, steps, _ in todo))
    with tqdm(total=total, unit="step") as progress, torch.no_grad():
        for number, pair in enumerate(pairs):
            run = Sampler(model, pair, resolution, guidance_scale, number)
            limit = run.latents(
                sampler_schedule(alphas, "dpm_solver_2m", LIMIT_STEPS), advance=progress.update
            )
            for sampler, steps, every in todo:
                schedule = sampler_schedule(alphas, sampler, steps)
                found = run.latents(schedule, every, progress.update)
                distances[sampler, steps, every].append(float((found - limit).norm() / limit.norm()))
    rows = []
    for (sampler, steps, every), own in distances.items():
        full = -(-steps // every)
        operations = (full + (steps - full) * share) / 50
        rows.append(Row(sampler, steps, every, operations, float(np.mean(own))))
    return rows


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [f"{'sampler':<8} {'steps':>5} {'full every':>10} {'operations':>10} {'distance':>9}"]
    for row in sorted(rows, key=lambda row: -row.operations):
        lines.append(
            f"{row.sampler:<8} {row.steps:>5} {row.every:>10} {row.operations:>9.1%} {row.distance:>9.3f}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="feature_reuse.py",
        description="How far latents are from the limit if the UNet's deep features are reused.",
        epilog="examples:\n"
        "  python benchmarks/feature_reuse.py --count 2\n"
        "  python benchmarks/feature_reuse.py --checkpoint small.safetensors --resolution 256 --guidance-scale 4\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("examples/anydoor-small.safetensors"),
        metavar="FILE",
        help="default: the example",
    )
    result.add_argument("--resolution", type=int, default=96, metavar="PX", help="default: 96")
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
    """Prints the table and writes a JSON file; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    try:
        if options.count < 1:
            raise InputError(f"--count must be at least 1, not {options.count}")
        checkpoint = read_checkpoint(options.checkpoint)
        check_resolution(checkpoint, options.resolution)
        model = AnyDoor(checkpoint.architecture, ("unet", "control", "id_encoder")).eval()
        model.load_official_state_dict(checkpoint.tensors)
        with torch.device("meta"):
            full_size = AnyDoor(Architecture(), ("unet",))
        shares = {"this": shallow_share(model, options.resolution), "SD 2.1": shallow_share(full_size, 512)}
        rows = measure(model, list(truth_pairs(options.count)), options.resolution, options.guidance_scale)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "command": " ".join(["python benchmarks/feature_reuse.py", *given]),
            "machine": describe(),
            "checkpoint": {"file": options.checkpoint.name, "sha256": sha256(options.checkpoint)},
            "resolution": options.resolution,
            "guidance_scale": options.guidance_scale,
            "count": options.count,
            "shallow_share": shares,
            "rows": [asdict(row) for row in rows],
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    except (AnyDoorError, OSError) as error:
        print(f"feature_reuse.py: {error}", file=sys.stderr)
        return 2
    print(f"operations of a shallow step / a full one: {shares['this']:.2f}, SD 2.1: {shares['SD 2.1']:.2f}")
    print(table(rows))
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

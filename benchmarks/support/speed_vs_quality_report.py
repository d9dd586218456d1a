"""The results of speed_vs_quality.py: table, limits of the presets, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.trials import EXACT, OTHER_SEED, SettingResult


@dataclass(frozen=True)
class Limit:
    """What a preset has to keep."""

    speed_up: float
    """At least."""
    change: float
    """At most, as a part of the change that another seed makes."""
    loss: float
    """At most, of SSIM against the truth, as a part of the mean difference that another seed makes."""


LIMITS = {"balanced": Limit(2.0, 0.25, 0.5), "fast": Limit(4.0, 0.5, 0.5)}

HEADER = (
    f"{'setting':<20} {'speed-up':>8} {'CPU time':>8} {'UNet':>5} {'control':>7} {'SSIM':>7} "
    f"{'loss':>16} {'PSNR':>8} {'recog.':>6} {'change':>7} {'loss':>6}"
)
_UNITS = (
    f"{'':<20} {'':>8} {'':>8} {'rows':>5} {'rows':>7} {'':>7} "
    f"{'of SSIM':>16} {'dB':>8} {'':>6} {'/ seed':>7} {'/ seed':>6}"
)


def table(rows: Sequence[SettingResult]) -> str:
    """Format the table."""
    lines = [HEADER, _UNITS]
    for row in rows:
        recognised = "" if row.recognised is None else f"{row.recognised:.0%}"
        loss = f"{row.ssim_loss:+.4f} +- {row.ssim_loss_error:.4f}"
        lines.append(
            f"{row.name:<20} {row.speed_up:>7.2f}x {row.processor_speed_up:>7.2f}x "
            f"{row.unet_rows:>5.0f} {row.control_rows:>7.0f} {row.ssim:>7.4f} {loss:>16} "
            f"{row.psnr:>8.2f} {recognised:>6} {row.change:>7.2f} {row.loss:>+6.2f}"
        )
    return "\n".join(lines)


def verdicts(rows: Sequence[SettingResult]) -> list[tuple[str, bool]]:
    """Return, for every preset, a sentence and whether it keeps its limits."""
    found = []
    for name, limit in LIMITS.items():
        row = next(row for row in rows if row.name == name)
        kept = row.speed_up >= limit.speed_up and row.change <= limit.change and row.loss <= limit.loss
        found.append(
            (
                f"{name}: {row.speed_up:.2f}x (at least {limit.speed_up:g}), change {row.change:.2f} "
                f"(at most {limit.change:g}), loss {row.loss:+.2f} (at most {limit.loss:g}): "
                f"{'ok' if kept else 'OUT'}",
                kept,
            )
        )
    return found


def plot(rows: Sequence[SettingResult], path: Path) -> None:
    """Plot SSIM against the truth, and the change, over the speed-up; one line per lever."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    exact = rows[0]
    for axis, value in zip(axes, ("ssim", "change")):
        for lever in dict.fromkeys(row.lever for row in rows):
            own = [row for row in rows if row.lever == lever]
            points = sorted((row.speed_up, getattr(row, value)) for row in own)
            if lever == "presets":
                axis.plot(*zip(*points), marker="*", markersize=13, linestyle="", color="black", label=lever)
                for row in own:
                    axis.annotate(
                        f" {row.name}", (row.speed_up, getattr(row, value)), va="bottom", fontsize=9
                    )
            elif lever not in (EXACT, "seed"):
                axis.plot(*zip(*points), marker="o", markersize=4, label=lever)
        other = next(row for row in rows if row.name == OTHER_SEED)
        axis.axhline(getattr(other, value), color="grey", linestyle=":", label=OTHER_SEED)
        axis.plot([1], [getattr(exact, value)], marker="s", linestyle="", color="grey", label=EXACT)
        axis.set(xlabel="times as fast as exact")
    axes[0].set(ylabel="SSIM against the truth")
    axes[1].set(ylabel="change, as a part of what another seed changes", ylim=(0, None))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

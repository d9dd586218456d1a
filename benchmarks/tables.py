"""Writes the tables of the documentation from the results files.

    python benchmarks/tables.py            # rewrites every table in README.md, docs/ and examples/
    python benchmarks/tables.py --check    # changes nothing; exits with 1 if a table is stale

A page names a table between two comments, and this command rewrites what stands between them:

    <!-- table: NAME -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.support.markdown import Cell, Json, amount, load_columns, number, percent, table
from benchmarks.support.results import read_results
from benchmarks.support.study_tables import attention_places, latent_errors
from runtime.systems.anydoor import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]

_BLOCK = re.compile(r"(?P<head><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<tail><!-- end -->)", re.DOTALL)
_SAMPLES, _BATCH = "samples of one placement", "different placements at once"
_BACKENDS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "": "PyTorch, eager"}
_PRECISIONS = {"fp32": "FP32", "bf16": "BF16"}
_METHODS = dict.fromkeys(("AnyDoor", "anydoor-small"), "**the example model**")


def machine(results: Json) -> str:
    """Returns names the processor of a results file and the instructions that decide its speed."""
    described = results["machine"]
    flags = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    widest = next(title for flag, title in flags.items() if flag in described["processor_flags"])
    maker = "Intel Xeon" if "Xeon" in described["processor"] else described["processor"]
    return f"{described['cores']} cores, {maker} with {widest}"


def latency_rows(*names: str) -> list[Json]:
    """Lists what `benchmarks/latency.py` measured, each row with its machine and its summary of 50 steps."""
    rows = []
    for name in names:
        results = read_results(name)
        shared = {"machine": machine(results), "peaks": results["peaks"]}
        rows += [row | row["summary"]["50 steps"] | shared for row in results["rows"]]
    return rows


def contender(row: Json) -> str:
    """Returns names what was measured in a row of `benchmarks/latency.py`."""
    return f"{_BACKENDS[row['contender']['backend']]}, {_PRECISIONS[row['contender']['precision']]}"


def peak_gb(row: Json) -> float:
    """Returns the largest resident memory of a process that draws one picture after the other, in GB."""
    single = [call for call in row["calls"] if call["scenario"] in ("cold start", "picture", "re-roll")]
    return float(max(call["peak_gb"] for call in single))


def timed(key: str, scenario: str, digits: int = 2) -> Cell:
    """Returns what writes seconds per picture and how many times as fast as plain PyTorch that is."""

    def cell(row: Json) -> str:
        found = row[key]
        return "" if found is None else f"{amount(found)} ({row['times_pytorch'][scenario]:.{digits}f} x)"

    return cell


def overview() -> str:
    """Tabulates the README's figures: a picture, a re-roll and memory, beside plain PyTorch."""
    rows = []
    for network, name, chosen in (
        ("small, 256 px", "latency-small-cpu", "OpenVINO, FP32"),
        ("full, 512 px", "latency-full-cpu", "ONNX Runtime, FP32"),
        ("full, 512 px", "latency-full-amx", "OpenVINO, BF16"),
    ):
        measured = latency_rows(name)
        plain = next(row for row in measured if row["contender"]["kind"] == "pytorch")
        row = next(row for row in measured if contender(row) == chosen)
        rows.append(row | {"network": network, "plain": plain})
    columns: dict[str, Cell] = {
        "network": lambda row: row["network"],
        "on": lambda row: f"{row['machine']}; {contender(row)}",
        "picture, s": timed("p50", "picture", 1),
        "re-roll, s": timed("re-roll", "re-roll", 1),
        "memory, GB": lambda row: f"{amount(peak_gb(row))} ({amount(peak_gb(row['plain']))})",
    }
    return table(rows, columns)


def latency(*names: str) -> str:
    """Tabulates seconds per picture of every scenario, cold start, memory and likeness to PyTorch."""
    rows = latency_rows(*names)
    columns: dict[str, Cell] = {
        "machine": lambda row: row["machine"],
        "backend": contender,
        "picture, s": timed("p50", "picture"),
        "re-roll, s": timed("re-roll", "re-roll"),
        "4 samples, s each": timed(_SAMPLES, _SAMPLES),
        "batch of 4, s each": timed(_BATCH, _BATCH),
        "cold start, s": lambda row: amount(_cold_start(row)),
        "peak, GB": lambda row: amount(peak_gb(row)),
        "PSNR, dB": lambda row: number(row["psnr"], 1) if isinstance(row["psnr"], float) else "",
    }
    if all(row[_BATCH] is None for row in rows):
        del columns["batch of 4, s each"]
    return table(rows, columns)


def _cold_start(row: Json) -> float:
    return median([float(call["seconds"]) for call in row["calls"] if call["scenario"] == "cold start"])


def limits() -> str:
    """Tabulates how near each stage comes to the rates of its machine, measured in the same run."""

    def precision(peak: Json) -> str:
        # older files have it in words
        return str(peak.get("precision") or ("bf16" if "bfloat16" in peak["source"] else "fp32"))

    def peak(row: Json, key: str) -> float:
        wanted = row["contender"]["precision"]
        return next(float(peak[key]) for peak in row["peaks"] if precision(peak) == wanted)

    def share(graph: str) -> Cell:
        return lambda row: percent(row["summary"]["share_of_limit"][graph])

    columns: dict[str, Cell] = {
        "machine": lambda row: row["machine"],
        "GFLOP/s": lambda row: number(1000 * peak(row, "tflops"), 0),
        "GB/s": lambda row: number(peak(row, "gbs"), 0),
        "backend": contender,
    }
    columns |= {graph: share(graph) for graph in ("id_encoder", "control", "denoise", "decode")}
    return table(latency_rows("latency-full-cpu", "latency-full-amx"), columns)


def work() -> str:
    """Tabulates operations and bytes of one step of one picture, counted from the full-size graphs."""
    columns = {
        "graph": lambda row: row["graph"],
        "matrix products, GFLOP": lambda row: number(row["matrix_flops"] / 1e9, 1),
        "other arithmetic, GFLOP": lambda row: number(row["other_flops"] / 1e9, 1),
        "weights MB": lambda row: number(row["weight_bytes"] / 1e6, 0),
        "inputs and outputs MB": lambda row: number(row["io_bytes"] / 1e6, 0),
        "moved if nothing is fused, MB": lambda row: number(row["unfused_bytes"] / 1e6, 0),
    }
    return table(read_results("latency-full-cpu")["roofline"]["graphs"], columns)


def estimates() -> str:
    """Tabulates the least time of a picture on other machines, computed from published rates."""

    def reroll(row: Json) -> float:
        limit = row["limit_seconds"]
        return float(row["steps"] * limit["denoise"] + limit["decode"])

    columns = {
        "machine": lambda row: row["machine"],
        "TFLOP/s": lambda row: number(row["tflops"], 1),
        "GB/s": lambda row: number(row["gbs"], 0),
        "picture s": lambda row: number(row["picture_seconds"]),
        "re-roll s": lambda row: number(reroll(row)),
    }
    return table(read_results("latency-full-cpu")["roofline"]["estimates_fp16"], columns)


def footprint_build(name: str) -> str:
    """Tabulates what building a full-size bundle takes, by graph."""
    graphs: dict[str, Json] = {}
    for entry in read_results(name)["build"]:
        graph, _, part = entry["name"].partition(": ")
        found = graphs.setdefault(graph, {"graph": graph, "peak_gb": 0.0, "all": 0.0})
        found[part] = entry["seconds"]
        found["all"] += entry["seconds"]
        found["peak_gb"] = max(found["peak_gb"], entry["peak_gb"])
    columns: dict[str, Cell] = {
        "part": lambda row: row["graph"],
        "read, s": lambda row: amount(row.get("reading weights")),
        "export, s": lambda row: amount(row.get("exporting")),
        "compare with PyTorch, s": lambda row: amount(row.get("comparing with PyTorch")),
        "all, s": lambda row: amount(row["all"]),
        "peak, GB": lambda row: amount(row["peak_gb"]),
    }
    return table(graphs.values(), columns)


def footprint_run(plans: Mapping[str, str]) -> str:
    """Tabulates the peak of resident memory while each graph loads and runs, by title of a results file."""
    peak: dict[str, dict[str, float]] = {}
    for title, name in plans.items():
        for part in read_results(name)["composite"]:
            for row in (part["name"], "all"):
                found = peak.setdefault(row, {})
                found[title] = max(found.get(title, 0.0), part["peak_gb"])

    def cell(title: str) -> Cell:
        return lambda row: number(row[title])

    columns: dict[str, Cell] = {"peak GB": lambda row: row["part"]}
    columns |= {title: cell(title) for title in plans}
    parts = [part for part in peak if part != "all"]
    return table(({"part": part, **peak[part]} for part in [*parts, "all"]), columns)


def presets() -> str:
    """Tabulates the presets: their parameters, what they gain and what they cost."""

    def value(row: Json, name: str) -> Any:
        """Returns what a setting leaves open as AnyDoor has it."""
        given = row["sampling"][name]
        return DEFAULTS[name] if given is None else given

    def guided(row: Json) -> str:
        first, last = value(row, "guidance_interval")
        return "all" if (first, last) == (0, 999) else f"{first} to {last}"

    columns = {
        "preset": lambda row: f"`{row['name']}`",
        "sampler": lambda row: f"`{value(row, 'sampler')}`",
        "steps": lambda row: str(value(row, "steps")),
        "guidance at timesteps": guided,
        "detail maps at": lambda row: f"{value(row, 'map_steps') or 'all'} timesteps",
        "UNet rows": lambda row: number(row["unet_rows"], 0),
        "ControlNet rows": lambda row: number(row["control_rows"], 0),
        "speed-up": lambda row: f"{row['speed_up']:.1f} x",
        "change": lambda row: number(row["change"]),
        "loss": lambda row: f"{row['loss']:+.2f}",
    }
    return table(_quality_rows("exact", "presets"), columns)


def quality(*levers: str) -> str:
    """Tabulates settings against the exact picture and the truth."""
    columns = {
        "setting": lambda row: row["name"],
        "speed-up": lambda row: f"{row['speed_up']:.2f} x",
        "UNet rows": lambda row: number(row["unet_rows"], 0),
        "ControlNet rows": lambda row: number(row["control_rows"], 0),
        "SSIM": lambda row: number(row["ssim"], 4),
        "SSIM lost": lambda row: f"{row['ssim_loss']:+.4f} ± {row['ssim_loss_error']:.4f}",
        "change": lambda row: number(row["change"]),
        "loss": lambda row: f"{row['loss']:+.2f}",
    }
    return table(_quality_rows(*levers), columns)


def _quality_rows(*levers: str) -> list[Json]:
    return [row for row in read_results("quality-small-cpu")["rows"] if row["lever"] in levers]


def feature_reuse() -> str:
    """Tabulates deep-feature reuse: operations against the distance to the limit of many steps."""
    columns = {
        "sampler": lambda row: f"`{row['sampler']}`",
        "steps": lambda row: str(row["steps"]),
        "full step every": lambda row: str(row["every"]),
        "UNet operations, of 50 full steps": lambda row: percent(row["operations"]),
        "distance of the last latents": lambda row: number(row["distance"], 3),
    }
    return table(read_results("feature-reuse-small")["rows"], columns)


def fidelity() -> str:
    """Tabulates the example model beside doing nothing and copy-paste."""
    columns = {
        "method": lambda row: _METHODS.get(row["method"], row["method"]),
        "SSIM": lambda row: "" if row["ssim"] is None else f"{row['ssim']:.3f} ± {row['ssim_error']:.3f}",
        "PSNR dB": lambda row: number(row["psnr"], 1),
        "gradients": lambda row: number(row["gradients"], 3),
        "patches": lambda row: number(row["patches"], 3),
        "recognised": lambda row: percent(row["retrieval"]["identity"]),
        "by colours": lambda row: percent(row["retrieval"]["colours"]),
        "by edges": lambda row: percent(row["retrieval"]["edges"]),
    }
    return table(read_results("fidelity-small")["rows"], columns)


def load() -> str:
    """Tabulates a server under load: pictures in time and latency, by rate of arrivals and batching."""
    rows = read_results("load-small-cpu")["rows"]
    columns = {
        "arrivals/s": lambda row: number(row["rate"]),
        "batching": lambda row: row["mode"],
        **load_columns(rows),
    }
    return table(rows, columns)


TABLES: Mapping[str, Callable[[], str]] = {
    "overview": overview,
    "latency-small": lambda: latency("latency-small-cpu"),
    "latency-full": lambda: latency("latency-full-cpu", "latency-full-amx"),
    "latency-inpainting-small": lambda: latency("latency-stable-diffusion-small-cpu"),
    "latency-full-bf16": lambda: latency("latency-full-amx-bf16"),
    "limits": limits,
    "work": work,
    "estimates": estimates,
    "footprint-build": lambda: footprint_build("footprint-full-cpu"),
    "footprint-run": lambda: footprint_run(
        {
            "ONNX Runtime, one arena, all graphs loaded": "footprint-full-arena-onnxruntime",
            "ONNX Runtime, all graphs loaded": "footprint-full-onnxruntime",
            "ONNX Runtime, 8 GB": "footprint-full-8g-onnxruntime",
            "OpenVINO, graphs in turn": "footprint-full-turns-openvino",
        }
    ),
    "footprint-inpainting-build": lambda: footprint_build("footprint-stable-diffusion-2-inpainting-cpu"),
    "footprint-inpainting-run": lambda: footprint_run(
        {
            "8 GB": "footprint-stable-diffusion-2-inpainting-8g-onnxruntime",
            "6 GB, graphs in turn": "footprint-stable-diffusion-2-inpainting-6g-onnxruntime",
        }
    ),
    "presets": presets,
    "samplers": lambda: quality(
        "exact", "seed", "DDIM, fewer steps", "dpm_solver_2m, fewer steps", "presets"
    ),
    "guidance-intervals": lambda: quality("guidance interval"),
    "map-timesteps": lambda: quality("map timesteps"),
    "feature-reuse": feature_reuse,
    "fidelity": fidelity,
    "latent-errors": lambda: latent_errors("latent-errors-small"),
    "latent-errors-same": lambda: latent_errors("latent-errors-small-same"),
    "latent-errors-128": lambda: latent_errors("latent-errors-128"),
    "latent-errors-128-same": lambda: latent_errors("latent-errors-128-same"),
    "attention-places": lambda: attention_places(
        before="attention-places-before", small="attention-places-small"
    ),
    "load": load,
}
"""Name in a marker -> what writes the table."""


class UnknownTableError(Exception):
    """A page names a table that does not exist."""


def pages() -> list[Path]:
    """Lists the Markdown files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("examples/*/*.md")]


def rewritten(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """Returns a page with every table between markers written anew.

    Raises:
        UnknownTableError: a marker names no table.
    """

    def block(match: re.Match[str]) -> str:
        if match["name"] not in tables:
            raise UnknownTableError(f"there is no table '{match['name']}': choose one of {', '.join(tables)}")
        return match["head"] + tables[match["name"]]() + match["tail"]

    return _BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 if a table is stale, or exits with 2 if there is no such table."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="tables.py", description=__doc__, formatter_class=layout)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    check = parser.parse_args(arguments).check
    before = {page: page.read_text("utf-8") for page in pages()}
    try:
        after = {page: rewritten(text) for page, text in before.items()}
    except UnknownTableError as error:
        parser.error(str(error))
    stale = [page for page in before if before[page] != after[page]]
    for page in stale:
        if not check:
            page.write_text(after[page], "utf-8")
        print(f"{page.relative_to(ROOT)}: {'stale, run python benchmarks/tables.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

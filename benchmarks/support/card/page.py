"""The results of card.py as a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.support.card.pictures import PRESETS, SAME_BITS
from benchmarks.support.contenders import COLD, PICTURE, REROLL, SAMPLES
from benchmarks.support.markdown import Cell, Json, load_columns, number, percent, table

_SCENARIOS = (PICTURE, REROLL, SAMPLES, *PRESETS, COLD)


def page(results: Json) -> str:
    """Return the page of a results file."""
    text = f"# {results['card'] or results['machine']['processor']}, {results['date']}\n\n{_head(results)}"
    for title, names, render in _SECTIONS:
        parts = [part for part in results["parts"] if part["name"] in names]
        if parts:
            text += f"\n## {title}\n"
        if rows := [{**row, "part": part} for part in parts for row in part["rows"]]:
            text += f"\n{render(rows)}"
        if failures := [f"- {part['name']}: {part['failure']}\n" for part in parts if part["failure"]]:
            text += "\n" + "".join(failures)
    return text


def _head(results: Json) -> str:
    machine, network, peak = results["machine"], results["network"], results["peak"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    rates = f"{peak['tflops']} TFLOP/s ({peak['machine']}; {peak['source']})" if peak else results["no_limit"]
    lines = [
        f"`{results['command']}`, {results['seconds']:.0f} s",
        f"machine: {machine.get('card', 'no card')}; {machine['cores']} cores, {machine['processor']}; "
        f"{machine['system']}, Python {machine['python']}",
        f"libraries: {packages}",
        f"network: {network['size']}, {network['precision']}, {network['resolution']} px, batch up to "
        f"{network['max_batch']}, graphs for {network['target']}; weights are noise; guidance scale 5",
        f"the limit of a row: its matrix products at the rated speed of the card. {rates}",
    ]
    return "".join(f"- {line}\n" for line in lines)


def _pictures(rows: list[Json]) -> str:
    """Returns seconds of every scenario, a line per contender and one for the limit.

    In brackets: the part of compiled PyTorch's seconds that they are.
    """
    lines: dict[str, Json] = {}
    limits: Json = {"contender": "limit", "device_gb": None}
    for row in rows:
        line = lines.setdefault(
            row["contender"], {"contender": row["contender"], "device_gb": row["part"]["device_gb"]}
        )
        line[row["scenario"]] = row.get("seconds", row.get("equal"))
        limits.setdefault(row["scenario"], row.get("limit"))
    for line in lines.values():
        if line["contender"].startswith("PyTorch"):
            # it keeps nothing: its re-roll is a picture
            line[REROLL] = line.get(PICTURE)

    compiled = next((line for name, line in lines.items() if name.startswith("PyTorch compiled")), {})

    def seconds(scenario: str) -> Cell:
        def cell(line: Json) -> str:
            found, theirs = line.get(scenario), compiled.get(scenario)
            ratio = f" ({found / theirs:.2f})" if found and theirs and line is not limits else ""
            return number(found, 3) + ratio

        return cell

    counts = {row["scenario"]: row["pictures"] for row in rows if "pictures" in row}
    head = "seconds (of compiled PyTorch's)" if compiled else "seconds"
    columns: dict[str, Cell] = {head: lambda line: line["contender"]}
    for scenario in _SCENARIOS:
        count = counts.get(scenario, 1)
        columns[f"{count} {scenario}" if count > 1 else scenario] = seconds(scenario)
    columns["device memory, GB"] = lambda line: number(line["device_gb"], 1)
    columns[SAME_BITS] = lambda line: {True: "yes", False: "no", None: ""}[line.get(SAME_BITS)]
    known = any(limits.get(scenario) for scenario in _SCENARIOS)
    return table([*lines.values(), limits] if known else lines.values(), columns)


def memory_table(rows: Sequence[Json], digits: int = 2) -> str:
    """Returns the memory after every phase, and what of the provider's scratch memory was in use."""
    columns: dict[str, Cell] = {
        "after": lambda row: row["phase"],
        "device memory, GB": lambda row: number(row["gb"], digits),
        "planned in all": lambda row: number(row["planned_gb"], digits),
        "scratch memory": lambda row: number(row["scratch_gb"], digits),
        "in use of it": lambda row: number(row["most_scratch_gb"], digits),
    }
    return table(rows, columns)


def _graphs(rows: list[Json]) -> str:
    columns: dict[str, Cell] = {
        "graph": lambda row: row["graph"],
        "samples": lambda row: str(row["samples"]),
        "capture": lambda row: "on" if row["capture"] else "off",
        "ms": lambda row: row.get("failure") or number(1000 * row["seconds"]),
        "ms per sample": lambda row: number(
            1000 * row["seconds"] / row["samples"] if "seconds" in row else None
        ),
        "limit, ms": lambda row: number(1000 * row["limit"]) if "limit" in row else "",
        "of the limit": lambda row: percent(row.get("share")),
    }
    return table(rows, columns)


def _server(rows: list[Json]) -> str:
    columns: dict[str, Cell] = {
        "batching": lambda row: row["mode"],
        "arrivals/s": lambda row: number(row["rate"]),
        **load_columns(rows),
        "requests": lambda row: str(row["requests"]),
        "limit, pictures/s": lambda row: number(1 / row["limit"]) if "limit" in row else "",
    }
    alone, deadline = rows[0]["alone"], rows[0]["deadline"]
    return f"One request alone: {alone:.3f} s. Deadline: {deadline:.2f} s.\n\n{table(rows, columns)}"


def _parity(rows: list[Json]) -> str:
    columns: dict[str, Cell] = {
        "graphs": lambda row: row["bundle"],
        "stages": lambda row: str(row.get("stages", "")) + ("" if row.get("complete") else ", not all"),
        "within tolerance": lambda row: row.get("failure") or str(row["within"]),
        "worst": lambda row: row.get("worst", ""),
        "of its tolerance": lambda row: percent(row.get("used")),
    }
    return table(rows, columns)


def _tensorrt(rows: list[Json]) -> str:
    columns: dict[str, Cell] = {
        "library": lambda row: row["library"],
        "version": lambda row: row.get("version", ""),
        "says": lambda row: row["says"],
    }
    return table(rows, columns)


_SECTIONS: tuple[tuple[str, tuple[str, ...], Callable[[list[Json]], str]], ...] = (
    ("Pictures", ("pictures", "pytorch", "pytorch-compiled"), _pictures),
    ("Memory", ("memory",), memory_table),
    ("Graphs", ("graphs",), _graphs),
    ("A server under load", ("server",), _server),
    ("Parity", ("parity",), _parity),
    ("TensorRT", ("tensorrt",), _tensorrt),
)
"""Title, parts, and what renders their rows."""

"""Markdown tables of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Json = dict[str, Any]
Cell = Callable[[Json], str]
"""Writes a cell of a table from a row of results."""


def table(rows: Iterable[Json], columns: Mapping[str, Cell]) -> str:
    """Renders a Markdown table: a line per row, a column per header and what writes its cell."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """Renders a number, or nothing where it was not measured."""
    return "" if value is None else f"{value:.{digits}f}"


def amount(value: float | None) -> str:
    """Renders seconds or gigabytes with about three significant digits."""
    return "" if value is None else number(value, 0 if value >= 100 else 1 if value >= 1 else 2)


def percent(value: float | None) -> str:
    """Renders a share, 0..1, as a percentage."""
    return "" if value is None else f"{100 * value:.0f} %"


def load_columns(rows: Iterable[Json]) -> dict[str, Cell]:
    """Returns the columns that say what became of the requests that a server got at one rate of arrivals."""
    columns: dict[str, Cell] = {
        "in time/s": lambda row: number(row["goodput"]),
        "p50 s": lambda row: number(row["p50"]),
        "p95 s": lambda row: number(row["p95"]),
        "p99 s": lambda row: number(row["p99"]),
        "refused": lambda row: str(row["refused"]),
        "late": lambda row: str(row["late"]),
    }
    # older files do not say
    if all("failed" in row for row in rows):
        columns["failed"] = lambda row: str(row["failed"])
    return columns

"""Tables of what studies measured in the example model; see `benchmarks/tables.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks.support.markdown import Cell, Json, number, table
from benchmarks.support.results import read_results


def latent_errors(name: str) -> str:
    """Tabulates how far off the latents are that networks expect, by region."""
    columns = {
        "latent": lambda row: row["row"].replace("examples/", ""),
        "object": lambda row: number(row["object"], 3),
        "background in the box": lambda row: number(row["background in the box"], 3),
        "outside": lambda row: number(row["outside"], 3),
    }
    return table(read_results(name)["rows"], columns)


def attention_places(**names: str) -> str:
    """Tabulates where the layers of networks look, and how sharply: title -> results."""
    found = {
        title: {row["layer"]: row for row in read_results(name)["rows"]} for title, name in names.items()
    }
    columns: dict[str, Cell] = {
        "cross-attention of": lambda layer: layer["name"].replace(".transformer_blocks.0.attn2", "")
    }
    for title, rows in found.items():
        for what in ("offset", "spread"):
            columns[f"{title}: {what}"] = partial(_of_layer, rows, what)
    return table([{"name": name} for name in next(iter(found.values()))], columns)


def _of_layer(rows: Mapping[str, Json], what: str, layer: Json) -> str:
    return number(rows[layer["name"]][what], 2)

"""Names of the systems' graphs; `export.systems` has them too, and imports PyTorch."""

from runtime.systems.anydoor import CONTROL, ID_ENCODER
from runtime.systems.inpainting import ENCODE
from runtime.systems.stable_diffusion import TEXT_ENCODER

DENOISE = "denoise"
DECODE = "decode"

GRAPHS = (ID_ENCODER, CONTROL, DENOISE, DECODE)
"""Of AnyDoor."""

GRAPHS_OF = {"anydoor": GRAPHS, "stable_diffusion": (TEXT_ENCODER, ENCODE, DENOISE, DECODE)}
"""System -> its graphs."""

PER_STEP = (CONTROL, DENOISE)
"""Graphs that every step runs."""

ROW_INPUTS = {CONTROL: "timestep", DENOISE: "row_sample"}
"""Graph that evaluates its network for several rows -> an input that has one value per row."""

__all__ = [
    "CONTROL",
    "DECODE",
    "DENOISE",
    "ENCODE",
    "GRAPHS",
    "GRAPHS_OF",
    "ID_ENCODER",
    "PER_STEP",
    "ROW_INPUTS",
    "TEXT_ENCODER",
]

"""Names of AnyDoor's graphs; `export.systems.anydoor` has them too, and imports PyTorch."""

from runtime.systems.anydoor import CONTROL, ID_ENCODER

DENOISE = "denoise"
DECODE = "decode"

GRAPHS = (ID_ENCODER, CONTROL, DENOISE, DECODE)

ROW_INPUTS = {CONTROL: "timestep", DENOISE: "row_sample"}
"""Graph that evaluates its network for several rows -> an input that has one value per row."""

__all__ = ["CONTROL", "DECODE", "DENOISE", "GRAPHS", "ID_ENCODER", "ROW_INPUTS"]

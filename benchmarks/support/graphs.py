"""Names of AnyDoor's graphs; `export.systems.anydoor` has them too, and imports PyTorch."""

from runtime.systems.anydoor import CONTROL, ID_ENCODER

DENOISE = "denoise"
DECODE = "decode"

GRAPHS = (ID_ENCODER, CONTROL, DENOISE, DECODE)

__all__ = ["CONTROL", "DECODE", "DENOISE", "GRAPHS", "ID_ENCODER"]

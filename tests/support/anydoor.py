"""AnyDoor's graphs, for tests that look at single calls."""

from __future__ import annotations

ID_ENCODER = "id_encoder"
CONTROL = "control"
DENOISE = "denoise"
ENCODE = "encode"
DECODE = "decode"

GRAPHS = (ID_ENCODER, CONTROL, DENOISE, ENCODE, DECODE)

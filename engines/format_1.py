"""Converts manifests of format version 1 to version 2.

Version 1 knew one system, AnyDoor, whose graphs and inputs it named. What version 2 writes down (roles,
banks, what changes per step, scratch memory) follows from those names. This is the only file of `engines`
that has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.schema import anything, record, sequence, text, whole

_ROLES = {"id_encoder": "condition", "control": "window", "denoise": "step", "decode": "decode"}

_RENAMED = {"noise": "carry", "guidance": "guidance_scale", "strength": "control_scale"}
"""Input of the denoise graph -> its present name."""

_PER_STEP = (
    *("timestep", "guidance_scale", "control_scale", "coefficients"),
    *("conditional_row", "unconditional_row", "row_sample", "row_condition", "row_map"),
)

_DETAIL_MAP = "detail_"
"""Prefix of the names of detail maps."""

_MAPS_AT_ONCE = 8
_SCORES_AT_ONCE = 3
_FLOAT_BYTES = 4


_SIZE = whole(1, 1 << 16)

_GRAPH = record(
    {
        "backend": text,
        "inputs": sequence(record({"name": text})),
        **dict.fromkeys(
            ("backend_version", "target", "outputs", "files", "error", "build_seconds", "scratch_bytes"),
            anything,
        ),
    }
)

_KEPT = ("checkpoint", "architecture", "schedule", "precision", "max_batch", "constants", "producer")

_FIELDS = record(
    {
        **dict.fromkeys(_KEPT, anything),
        "graphs": record(dict.fromkeys(_ROLES, _GRAPH)),
        "model": record(dict.fromkeys(("latent_size", "resolution", "token_count"), _SIZE)),
        "architecture": record(
            {
                **dict.fromkeys(("unet_channels", "vae_channels"), sequence(_SIZE, least=1)),
                **dict.fromkeys(("unet_head_width", "dino_width", "dino_mlp_ratio"), _SIZE),
            }
        ),
    }
)
"""The fields of a version 1 manifest that the upgrade reads."""


def upgrade(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a version 2 manifest that says the same.

    Args:
        content: of a version 1 manifest.

    Raises:
        ValueError: a field is missing, or has a value that it cannot have.
    """
    _FIELDS("", content)
    records = {name: content["graphs"][name] for name in _ROLES}
    backends = {str(record["backend"]) for record in records.values()}
    if len(backends) != 1:
        raise ValueError(f"its graphs are for several backends: {', '.join(sorted(backends))}")
    return {
        **{key: content[key] for key in _KEPT},
        "system": "anydoor",
        "defaults": {},
        "backend": backends.pop(),
        "backend_version": records["denoise"]["backend_version"],
        "target": records["denoise"]["target"],
        "dimensions": {"samples": 1, "rows": 2, "conditions": 2, "maps": 2},
        "graphs": {name: _upgrade_graph(name, record, content) for name, record in records.items()},
    }


def _upgrade_graph(name: str, record: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    is_step = name == "denoise"
    inputs = [_rename(tensor) if is_step else tensor for tensor in record["inputs"]]
    details = [tensor["name"] for tensor in inputs if tensor["name"].startswith(_DETAIL_MAP)]
    banks = [
        {"name": "tokens", "tensors": ["tokens"], "index": "row_condition"},
        {"name": "detail_maps", "tensors": details, "index": "row_map"},
    ]
    if record["backend"] == "onnxruntime":
        fused = {"onnxruntime": False, "openvino": True}
        scratch = {backend: host_scratch(content, fuses)[name] for backend, fuses in fused.items()}
    else:
        scratch = {record["backend"]: record["scratch_bytes"]}
    return {
        "role": _ROLES[name],
        "inputs": inputs,
        "outputs": record["outputs"],
        "banks": banks if is_step else [],
        "per_step": list(_PER_STEP) if is_step else [],
        "feedback": {"latent": "next_latent", "carry": "epsilon"} if is_step else {},
        "files": record["files"],
        "error": record["error"],
        "build_seconds": record["build_seconds"],
        "scratch_bytes": scratch,
    }


def _rename(tensor: Mapping[str, Any]) -> dict[str, Any]:
    name = tensor["name"]
    return {**tensor, "name": _RENAMED[name], "file_name": name} if name in _RENAMED else dict(tensor)


def host_scratch(content: Mapping[str, Any], fused_attention: bool) -> dict[str, int]:
    """Returns estimate of the intermediate results of each graph for one picture with guidance, in bytes.

    The largest are the feature maps at the full size, of which a few are needed at once, and the scores of
    the attention there, several times over around the softmax.

    Args:
        content: of a version 1 manifest.
        fused_attention: whether the backend computes attention without its matrix of scores.
    """
    model, network = content["model"], content["architecture"]
    rows, pixels = 2, model["latent_size"] ** 2
    heads = network["unet_channels"][0] // network["unet_head_width"]
    maps = _MAPS_AT_ONCE * rows * pixels * max(network["unet_channels"]) * _FLOAT_BYTES
    picture = _MAPS_AT_ONCE * model["resolution"] ** 2 * max(network["vae_channels"][:2]) * _FLOAT_BYTES
    widths = network["dino_width"] * network["dino_mlp_ratio"]
    tokens = _MAPS_AT_ONCE * model["token_count"] * widths * _FLOAT_BYTES
    scores = 0 if fused_attention else _SCORES_AT_ONCE * pixels**2 * _FLOAT_BYTES
    return {
        "id_encoder": tokens,
        "control": maps + rows * heads * scores,
        "denoise": maps + rows * heads * scores,
        "decode": picture + scores,
    }

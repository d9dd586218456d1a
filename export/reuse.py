"""Graphs that need no export, because another bundle has them: known by what they are made from, and copied.

A subject of DreamBooth, or a LoRA, changes one part of a checkpoint and leaves the graphs of the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from engines.bundle import Bundle
from engines.manifest import GraphRecord, Manifest
from engines.spec import GraphSpec

_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")
"""Those whose version may change an exported graph."""

_SETTINGS = ("producer", "system", "architecture", "precision", "target", "max_batch", "dimensions")
"""Fields of the manifest that determine a graph."""


def made_from(module: nn.Module, spec: GraphSpec, manifest: Manifest, stored: torch.dtype) -> str:
    """Returns the SHA-256 of all that determines the files of an exported graph.

    Args:
        module: the graph in PyTorch, with its weights.
        spec: its signature.
        manifest: of the bundle that is built: settings of the network and the build, version of the exporter.
        stored: dtype of the checkpoint's weights.
    """
    settings = {
        "spec": asdict(spec),
        "stored": str(stored),
        "libraries": {name: version(name) for name in _LIBRARIES},
        **{name: getattr(manifest, name) for name in _SETTINGS},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, weight in module.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def has_graph(bundle: Bundle, graph: str, digest: str) -> bool:
    """Returns whether a bundle has a graph that is made from the same; `digest` is that of `made_from`."""
    record = bundle.manifest.graphs.get(graph)
    return record is not None and record.made_from == digest


def copy_graph(bundle: Bundle, graph: str, output: Path) -> GraphRecord:
    """Copies the files of a graph, and returns its record.

    Args:
        bundle: has the graph.
        graph: its name.
        output: directory of the bundle that is built.

    Raises:
        BundleError: a file is not the one that was built.
    """
    bundle.verify(graph)
    record = bundle.manifest.graphs[graph]
    for file in record.all_files:
        # no link: the ONNX libraries refuse weights that have several names
        shutil.copyfile(bundle.path / file.path, output / file.path)
    return record

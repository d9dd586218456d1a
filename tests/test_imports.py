"""Who may import whom (docs of the folders; `[tool.importlinter]` in pyproject.toml) is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "cv2",
    "scipy",
    "safetensors",
    "onnxruntime",
    "grpc",
    "tqdm",
)

UNUSED_TO_COMPOSITE = (
    *("torch", "onnx", "cv2", "scipy", "grpc", "google.protobuf", "tensorrt", "cuda", "openvino"),
    *(
        "tqdm",
        "asyncio",
        "concurrent.futures",
        "multiprocessing",
        "http",
        "ssl",
        "email",
        "importlib.metadata",
    ),
    *(
        "engines.cuda",
        "engines.backends.tensorrt.engine",
        "engines.backends.openvino.engine",
        "runtime.server.batching",
        "runtime.client",
    ),
)
"""What `anydoor composite --quiet` with ONNX Runtime has no use for."""


def test_import_rules_are_kept() -> None:
    lint = "from importlinter.cli import lint_imports_command as lint; lint()"
    result = subprocess.run(
        [sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_importing_the_runtime_imports_nothing_heavy() -> None:
    code = f"import sys, runtime; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_compositing_imports_nothing_that_it_does_not_use(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ["--reference", "object.png", "--scene", "scene.png", "--box", "30,20,80,70", "--steps", "1"]
    command = ["composite", *arguments, "--output", str(tmp_path / "out.png"), "--quiet"]
    command += ["--bundle", str(tiny_bundle), "--backend", "onnxruntime"]
    code = (
        f"import sys; from runtime.cli.composite import main; assert main({command}) == 0;"
        f"print([name for name in {UNUSED_TO_COMPOSITE} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "examples", capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"

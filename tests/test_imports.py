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

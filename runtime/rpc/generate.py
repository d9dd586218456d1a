"""Generates the stubs in this folder from proto/anydoor/v1/compositor.proto.

    python -m runtime.rpc.generate

Needs grpcio-tools, and a checkout: the contract is not part of the installed package.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).parent
PROTO = HERE.parents[1] / "proto"
SOURCE = "anydoor/v1/compositor.proto"
STUBS = ("compositor_pb2.py", "compositor_pb2.pyi", "compositor_pb2_grpc.py")


def generate() -> dict[str, str]:
    """File name -> the text that belongs into it."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        wellknown = resources.files("grpc_tools") / "_proto"
        arguments = ["protoc", f"-I{PROTO}", f"-I{wellknown}", *outputs, str(PROTO / SOURCE)]
        if protoc.main(arguments) != 0:
            sys.exit(f"protoc refused {PROTO / SOURCE}")
        stubs = Path(folder) / "anydoor" / "v1"
        # protoc imports by the path of the .proto file; `proto/` and `anydoor` are no Python packages
        return {
            name: (stubs / name).read_text("utf-8").replace("from anydoor.v1 import", "from runtime.rpc import")
            for name in STUBS
        }


def main() -> None:
    """Writes the stubs."""
    for name, text in generate().items():
        (HERE / name).write_text(text, "utf-8")
        print(HERE / name)


if __name__ == "__main__":
    main()

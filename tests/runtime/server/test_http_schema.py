"""The server keeps what its OpenAPI page promises, whatever Schemathesis sends.

That is a command on PATH, from an environment of its own: `pip install schemathesis`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.server.test_http import http_address, in_base64
from tests.support.http import get
from tests.support.segmenters import bright_things
from tests.support.serving import OBJECT, SCENE, ServerThread, png

COMMAND = shutil.which("schemathesis")
SECONDS = os.environ.get("ANYDOOR_SCHEMA_SECONDS", "180")
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "response_headers_conformance"),
)
FILES = [in_base64(content) for content in (SCENE, OBJECT, png(bright_things()))]

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(COMMAND is None, reason="needs the command schemathesis on PATH"),
]


def with_pictures(schema: Any) -> Any:
    """The same schema, with pictures for files: what is made at random is none, and gets no further."""
    if isinstance(schema, list):
        return [with_pictures(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if str(schema.get("description")).startswith(("A file", "A picture")):
        return {"type": "string", "enum": FILES}
    return {name: with_pictures(each) for name, each in schema.items()}


def test_every_answer_is_one_that_the_page_lists(
    tiny_bundle: Path, segmenter_bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No 500, no other status, type or shape than those of the page, whatever is sent."""
    # who is refused often is answered late, which would leave time for little else
    monkeypatch.setattr("runtime.server.gate._REFUSALS", (1e9, 1e9))
    limits = {"max_steps": 2, "max_images": 2, "max_pixels": 1 << 14, "max_message_bytes": 1 << 18}
    segmenter = tuple(map(str, segmenter_bundles))
    with ServerThread(tiny_bundle, http="127.0.0.1:0", segmenter=segmenter, **limits) as server:
        address = http_address(server)
        page = tmp_path / "openapi.json"
        page.write_text(json.dumps(with_pictures(get(address, "/openapi.json").json)))
        command = [str(COMMAND), "run", str(page), "--url", f"http://{address}", "--max-time", SECONDS]
        options = ["--checks", ",".join(CHECKS), "--continue-on-failure", "--suppress-health-check=all"]
        done = subprocess.run(
            [*command, *options, "--no-color"], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        print(done.stdout)
        assert done.returncode == 0, done.stderr

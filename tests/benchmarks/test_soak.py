"""The soak test of a server that dies."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.support.server_process import ServerProcess


class ShortLived(ServerProcess):
    """Is killed a moment after it serves."""

    def __enter__(self) -> ServerProcess:
        server = super().__enter__()
        threading.Timer(1.0, self.process.kill).start()
        return server


def test_the_results_of_a_server_that_dies_say_so(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "ServerProcess", ShortLived)
    output = tmp_path / "soak.json"
    assert soak.main(["--bundle", str(tiny_bundle), "--minutes", "5", "--output", str(output)]) == 1
    assert "the server died" in capsys.readouterr().out
    results = json.loads(output.read_text("utf-8"))
    assert not results["alive"]
    assert results["requests"] == sum(sum(ends.values()) for ends in results["outcomes"].values()) > 0
    assert results["memory_mb"]["at_most"] > 0

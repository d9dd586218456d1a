from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from engines.errors import AnyDoorError
from engines.options import EngineOptions
from runtime.cli import serve
from runtime.cli.flags import field_names, given
from runtime.server.settings import Settings, settings_from


def settings(*flags: str) -> Settings:
    command = argparse.ArgumentParser()
    serve.add_arguments(command)
    options = command.parse_args(flags)
    return settings_from(given(options, field_names(Settings)), options.config, {"bundle": "the-bundle"})


def config(tmp_path: Path, text: str) -> str:
    (tmp_path / "anydoor.toml").write_text(text)
    return f"--config={tmp_path / 'anydoor.toml'}"


def test_defaults() -> None:
    assert settings() == Settings(bundle="the-bundle")


def test_flags_come_before_the_file_before_the_defaults(tmp_path: Path) -> None:
    file = config(tmp_path, 'queue = 5\nmax_steps = 30\nlisten = ["unix:/a"]\ndrain_seconds = 3\n')
    given = settings(file, "--max-steps=20", "--listen=localhost:1", "--listen=localhost:2")
    assert (given.queue, given.max_steps, given.max_images) == (5, 20, Settings.max_images)
    assert given.listen == ("localhost:1", "localhost:2")
    assert settings(file).listen == ("unix:/a",)
    assert given.limits.steps == 20


def test_sizes_are_written_the_same_everywhere(tmp_path: Path) -> None:
    file = config(tmp_path, 'memory_budget = "6G"\nmax_message_bytes = 5000\ncache_bytes = "0.5G"\n')
    assert (settings(file).engine.memory_budget, settings(file).max_message_bytes) == (6 * 10**9, 5000)
    assert settings(file, "--memory-budget=800M").engine.memory_budget == 800 * 10**6
    assert settings(file, "--cache-bytes=0").cache_bytes == 0


def test_the_engines_options_stand_beside_the_others(tmp_path: Path) -> None:
    file = config(tmp_path, 'backend = "openvino"\nthreads = 3\nqueue = 5\n')
    found = settings(file, "--threads=2", "--device=cpu")
    assert found.engine == EngineOptions(backend="openvino", device="cpu", threads=2)
    assert found.queue == 5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("memory_budget = '6X'", "memory_budget: '6X' is not a size: .* like 6G"),
        ("memory_budget = 1.5", "memory_budget of the configuration is 1.5, expected a whole number"),
        ("quue = 5", r"the configuration has no 'quue'; did you mean 'queue'\?"),
        ("queue = 'many'", 'queue of the configuration is "many", expected a whole number'),
        ("queue = true", "queue of the configuration is true, expected a whole number"),
        ("listen = 'b:1'", 'listen of the configuration is "b:1", expected a list, a text'),
        ("queue = -1", "queue must be at least 0"),
        ("workers = 0", "workers must be at least 1"),
        ("control_window = -1", "control_window must be at least 0"),
        ("threads = 0", "threads must be at least 1, not 0"),
        ("backend = 'magic'", "there is no backend 'magic': choose one of auto, openvino"),
        ("engine = 'magic'", "the configuration has no 'engine'"),
        ("batching = 'magic'", "batching must be one of continuous, static"),
        ("tls_key = 'key.pem'", "must be given together"),
        ("tls_client_ca = 'ca.pem'", "needs tls_certificate"),
        ("listen = []", "at least one address"),
        ("listen = ['localhost']", "listen must be host:port or unix:/path, not 'localhost'"),
        ("listen = ['localhost:99999999']", "not 'localhost:99999999'"),
        ("listen = ['localhost:-1']", "not 'localhost:-1'"),
        ("listen = ['unix:']", "not 'unix:'"),
        ("queue 5", "is not TOML"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(AnyDoorError, match=sentence):
        settings(config(tmp_path, text))


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AnyDoorError, match="cannot read"):
        settings(f"--config={tmp_path / 'none.toml'}")

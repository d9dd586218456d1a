from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from runtime.errors import InputError
from runtime.server.settings import Settings, add_flags, settings_from


def settings(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return settings_from(parser.parse_args(flags), "the-bundle")


def config(tmp_path: Path, text: str) -> str:
    (tmp_path / "anydoor.toml").write_text(text)
    return f"--config={tmp_path / 'anydoor.toml'}"


def test_defaults() -> None:
    assert settings() == Settings(bundle="the-bundle")


def test_flags_come_before_the_file_before_the_defaults(tmp_path: Path) -> None:
    file = config(tmp_path, 'queue = 5\nmax_steps = 30\nlisten = ["unix:/a"]\ndrain_seconds = 3\n')
    given = settings(file, "--max-steps=20", "--listen=b:1", "--listen=c:2")
    assert (given.queue, given.max_steps, given.max_images) == (5, 20, Settings.max_images)
    assert given.listen == ("b:1", "c:2")
    assert settings(file).listen == ("unix:/a",)
    assert given.limits.steps == 20


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("quue = 5", "'quue' that is not known; did you mean 'queue'"),
        ("queue = 'many'", "queue must be of the type int"),
        ("queue = true", "queue must be of the type int"),
        ("listen = 'b:1'", "listen must be of the type list of strings"),
        ("queue = -1", "queue must be at least 0"),
        ("workers = 0", "workers must be at least 1"),
        ("batching = 'magic'", "batching must be one of continuous, static"),
        ("tls_key = 'key.pem'", "only of use together"),
        ("tls_client_ca = 'ca.pem'", "needs tls_certificate"),
        ("listen = []", "at least one address"),
        ("queue 5", "is not TOML"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        settings(config(tmp_path, text))


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        settings(f"--config={tmp_path / 'none.toml'}")

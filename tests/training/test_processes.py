"""Two processes train as one with twice the batch, whether each has all weights (DDP) or a part (FSDP).

A killed run goes on as if it had not been.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.support.launch import finish, start, start_two, train_tiny
from tests.support.tiny import TINY, RandomPairs
from tests.training.test_train import step_of, write_recipe
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.checkpoint import read_checkpoint
from training.network.modules import AnyDoor
from training.sharding import LaunchError, gather, shard
from training.systems.anydoor import Denoising, DiffusionTask
from training.train import main


def weights(folder: Path, file: str = "last.pt") -> dict[str, torch.Tensor]:
    state = torch.load(folder / file, weights_only=True)
    found: dict[str, torch.Tensor] = state["module"] if file == "last.pt" else state
    return found


def assert_close(found: Path, expected: Path) -> None:
    for file in ("last.pt", "mean.pt"):
        here, there = weights(found, file), weights(expected, file)
        assert here.keys() == there.keys()
        differences = torch.cat([(here[name] - there[name]).abs().flatten() for name in there])
        # AdamW goes by the gradient's sign at first, which rounding decides where it is next to nothing
        assert differences.gt(2e-5).float().mean() < 1e-3


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of one process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(train_tiny, folder, 4, 4))
    return folder


def test_two_processes_are_one_with_twice_the_batch(alone: Path, tmp_path: Path) -> None:
    finish(*start_two(train_tiny, tmp_path, 2, 4))
    assert_close(tmp_path, alone)


def test_whoever_holds_the_weights_they_are_the_same(alone: Path, tmp_path: Path) -> None:
    """A step in one process, two in two that share the weights, and the last alone again."""
    finish(start(train_tiny, tmp_path, 4, 1))
    finish(*start_two(train_tiny, tmp_path, 2, 3, 0.0, True))
    finish(start(train_tiny, tmp_path, 4, 4))
    assert_close(tmp_path, alone)


def test_a_state_is_gathered_whatever_it_is_nested_in() -> None:
    """What is saved takes no gradient, and is no part of the network."""
    weight = torch.nn.Parameter(torch.ones(2))
    found = gather({"state": {0: {"mean": weight}}, "groups": [{"rate": weight, "steps": 3}]})
    for tensor in (found["state"][0]["mean"], found["groups"][0]["rate"]):
        assert torch.equal(tensor, weight)
        assert not tensor.requires_grad
    assert found["groups"][0]["steps"] == 3


def test_a_scalar_of_a_saved_state_takes_the_shape_of_its_place() -> None:
    assert shard(torch.tensor(3.0), torch.zeros(1)).tolist() == [3.0]


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    task = DiffusionTask(AnyDoor(TINY), RandomPairs(), Denoising())
    with pytest.raises(LaunchError, match="needs several processes"):
        train(task, LoopSettings(steps=1, shard=True), tmp_path)


def test_a_killed_run_goes_on_bit_for_bit(alone: Path, tmp_path: Path) -> None:
    killed = start(train_tiny, tmp_path, 4, 4, 0.2)
    while not (tmp_path / "log.csv").exists():  # the first checkpoint is written
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] < 4
    finish(start(train_tiny, tmp_path, 4, 4))
    for file in ("last.pt", "mean.pt"):
        here, there = weights(tmp_path, file), weights(alone, file)
        assert all(torch.equal(here[name], value) for name, value in there.items())


@pytest.mark.nightly
def test_two_processes_go_through_all_stages(tmp_path: Path) -> None:
    """Each stage with its own precision and its own way to hold the weights."""
    sharded, half = {"batch": 1, "shard": True}, {"batch": 1, "precision": "bf16"}
    recipe = write_recipe(
        *(tmp_path / "two.toml", 'checkpoint_dtype = "float32"'),
        **{
            "identity": sharded,
            "autoencoder": half,
            "decoder": {"batch": 1},
            "hint_block": half,
            "diffusion": sharded,
        },
    )
    finish(*start_two(main, [str(recipe), "--folder", str(tmp_path)]))
    for stage in ("autoencoder", "identity", "hint_block", "diffusion", "decoder"):
        assert step_of(tmp_path / stage) == 2
    assert read_checkpoint(tmp_path / "model.safetensors").dtype == torch.float32
    assert not list(tmp_path.rglob("*.partial"))

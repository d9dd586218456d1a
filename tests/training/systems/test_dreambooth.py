"""DreamBooth's training: the two losses, what learns, the pictures of the class, low-rank updates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.systems.tokenizer import Tokenizer
from tests.support.stable_diffusion import pipeline
from tests.support.vocabulary import learned_merges, merges_text
from training.data.subject import SubjectError, random_place, read_pictures
from training.loop import train
from training.network.lora import merge_lora
from training.network.low_rank import ATTENTION, low_rank_layers, write_low_rank
from training.network.stable_diffusion import StableDiffusion
from training.network.stable_diffusion_checkpoint import StableDiffusionCheckpoint, read_stable_diffusion
from training.systems.dreambooth import (
    SubjectSettings,
    SubjectTask,
    make_preview,
    make_samples,
)
from training.systems.stable_diffusion import Learner, draw_pictures

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")

SIZE = 32


def save_pictures(folder: Path, widths: Sequence[int], name: str = "{}.png") -> None:
    folder.mkdir(exist_ok=True)
    for number, width in enumerate(widths):
        picture = np.random.default_rng(number).integers(0, 256, (40, width, 3), np.uint8)
        Image.fromarray(picture).save(folder / name.format(number))


@pytest.fixture
def subject(tmp_path: Path) -> SubjectSettings:
    """Three pictures of a subject, one of them wide."""
    save_pictures(tmp_path / "cat", (40, 40, 60))
    return SubjectSettings(
        pictures=str(tmp_path / "cat"),
        class_noun="cat",
        identifier="mat",
        class_images=3,
        resolution=SIZE,
        steps=2,
    )


@cache
def checkpoint(folder: Path, inpaint: bool, prediction: str) -> StableDiffusionCheckpoint:
    pipeline("1.x", inpaint, prediction).save_pretrained(folder)
    return read_stable_diffusion(folder)


def network(folder: Path, inpaint: bool = False, prediction: str = "epsilon") -> StableDiffusion:
    """A network of its own, with the weights of `pipeline`."""
    read = checkpoint(folder / f"base-{inpaint}-{prediction}", inpaint, prediction)
    parts = {part: copy.deepcopy(read.load_part(part)) for part in ("unet", "vae", "text_encoder")}
    return StableDiffusion(read.architecture, parts)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(merges_text(learned_merges()))


def first_batch(task: SubjectTask, count: int = 2) -> dict[str, Tensor]:
    samples = [task.dataset()[number] for number in range(count)]
    return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}


def task_for(
    folder: Path, tokenizer: Tokenizer, settings: SubjectSettings, inpaint: bool = False, **named: Any
) -> SubjectTask:
    start = network(folder, inpaint, **named)
    save_pictures(folder / "prior", (SIZE, SIZE, SIZE), "{:05d}.png")  # the class's
    return SubjectTask(start, make_samples(start, tokenizer, settings, folder / "prior"), settings)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def plain_loss(folder: Path, batch: dict[str, Tensor], kind: int, inpaint: bool) -> tuple[Tensor, Any, Any]:
    """The usual loss of one kind of picture, with diffusers' modules, scheduler and mean squared error."""
    pipe: Any = copy.deepcopy(pipeline("1.x", inpaint))
    scheduler, latents = pipe.scheduler, batch["latents"][:, kind]
    timestep, noise = batch["timestep"][:, kind], batch["noise"][:, kind]
    noisy = scheduler.add_noise(latents, noise, timestep)
    if inpaint:
        outside = pipe.vae.encode(batch["surroundings"][:, kind]).latent_dist.mean.detach() * 0.18215
        mask = F.interpolate(batch["mask"][:, kind], noisy.shape[-2:])
        noisy = torch.cat([noisy, mask, outside], 1)
    tokens = pipe.text_encoder(batch["ids"][:, kind])[0]
    return F.mse_loss(pipe.unet(noisy, timestep, tokens).sample, noise), pipe.unet, pipe.text_encoder


@pytest.mark.parametrize("inpaint", [False, True], ids=["4 channels", "9 channels"])
@pytest.mark.parametrize("prior_weight", [0.0, 0.7])
def test_the_loss_is_that_of_the_subject_and_that_of_its_class(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings, inpaint: bool, prior_weight: float
) -> None:
    settings = replace(subject, prior_weight=prior_weight, checkpointing=False)
    task = task_for(tmp_path, tokenizer, settings, inpaint)
    batch = first_batch(task)
    loss = task.loss(task.module, batch)["loss"]
    loss.backward()  # type: ignore[no-untyped-call]

    expected, unet, text_encoder = plain_loss(tmp_path, batch, 0, inpaint)
    expected.backward()  # type: ignore[no-untyped-call]
    wanted = {f"unet.{n}": g for n, g in gradients(unet).items()}
    wanted |= {f"text_encoder.{n}": g for n, g in gradients(text_encoder).items()}
    total = expected.detach()
    if prior_weight:
        of_class, unet, text_encoder = plain_loss(tmp_path, batch, 1, inpaint)
        of_class.backward()  # type: ignore[no-untyped-call]
        both = {f"unet.{n}": g for n, g in gradients(unet).items()}
        both |= {f"text_encoder.{n}": g for n, g in gradients(text_encoder).items()}
        wanted = {name: gradient + prior_weight * both[name] for name, gradient in wanted.items()}
        total = total + prior_weight * of_class.detach()
    assert batch["ids"].shape == (2, 2 if prior_weight else 1, 77)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    found = gradients(task.module)
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(largest))


def test_the_error_of_a_model_that_predicts_v_is_that_of_v(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings
) -> None:
    task = task_for(tmp_path, tokenizer, replace(subject, prior_weight=0), prediction="v_prediction")
    batch = first_batch(task)
    with torch.no_grad():
        loss = task.loss(task.module, batch)["loss"]
        pipe: Any = pipeline("1.x", prediction_type="v_prediction")
        latents, noise, timestep, ids = (
            batch[name][:, 0] for name in ("latents", "noise", "timestep", "ids")
        )
        noisy = pipe.scheduler.add_noise(latents, noise, timestep)
        velocity = pipe.scheduler.get_velocity(latents, noise, timestep)
        expected = F.mse_loss(pipe.unet(noisy, timestep, pipe.text_encoder(ids)[0]).sample, velocity)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("text_encoder", [True, False])
def test_the_autoencoder_never_learns_and_the_text_encoder_may(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings, text_encoder: bool
) -> None:
    settings = replace(subject, text_encoder=text_encoder, prior_weight=0)
    task = task_for(tmp_path, tokenizer, settings)
    before = {name: p.detach().clone() for name, p in task.module.named_parameters()}
    train(task, settings, tmp_path / "run")
    moved = {name for name, p in task.module.named_parameters() if not torch.equal(before[name], p)}
    assert {name.split(".")[0] for name in moved} == {"unet"} | ({"text_encoder"} if text_encoder else set())
    fresh = network(tmp_path)
    torch.testing.assert_close(task.network.vae.state_dict(), fresh.vae.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 2])
def test_activations_of_both_networks_are_computed_twice_and_gradients_stay(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings, rank: int
) -> None:
    """The text encoder's layers run once forward, and once more backward."""

    def run(checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        settings = replace(subject, prior_weight=0.0, rank=rank, checkpointing=checkpointing)
        task, calls = task_for(tmp_path, tokenizer, settings), []
        [layer, *_] = task.network.text_encoder.encoder.layers
        layer.layer_norm1.register_forward_hook(lambda *_: calls.append(1))
        for number, part in enumerate(low_rank_layers(task.module)):
            nn.init.normal_(part[1].up, generator=torch.Generator().manual_seed(number))
        task.loss(task.module, first_batch(task))["loss"].backward()  # type: ignore[no-untyped-call]
        return gradients(task.module), len(calls)

    (once, single), (twice, double) = run(False), run(True)
    assert (single, double) == (1, 2)
    assert any(name.startswith("text_encoder.") for name in once)
    assert once.keys() == twice.keys()
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], gradient)


@pytest.mark.parametrize("inpaint", [False, True], ids=["4 channels", "9 channels"])
def test_pictures_are_those_of_the_pipeline_in_diffusers(
    tmp_path: Path, tokenizer: Tokenizer, inpaint: bool
) -> None:
    pipe: Any = pipeline("1.x", inpaint)
    shape, key = (1, 4, SIZE // 2, SIZE // 2), np.array([5, 0], np.uint64)
    noise = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32)
    scene = {}
    if inpaint:
        scene = {
            "image": torch.zeros(1, 3, SIZE, SIZE),
            "mask_image": torch.ones(1, 1, SIZE, SIZE),
            "strength": 1.0,
        }
        pipe = copy.deepcopy(pipe)
        encode = pipe.vae.encode
        pipe.vae.encode = lambda picture: _MeanOnly(encode(picture).latent_dist.mean)
    tokens = pipe.text_encoder(torch.tensor([tokenizer.encode(text) for text in ("the cat", "")]))[0].detach()
    result = pipe(
        prompt_embeds=tokens[:1],
        negative_prompt_embeds=tokens[1:],
        height=SIZE,
        width=SIZE,
        num_inference_steps=4,
        guidance_scale=7.5,
        latents=torch.from_numpy(noise),
        output_type="np",
        **scene,
    ).images[0]
    [drawn] = draw_pictures(network(tmp_path, inpaint), tokenizer, "the cat", [5], SIZE, steps=4)
    assert np.abs(drawn.astype(int) - np.rint(result * 255)).max() <= 1


class _MeanOnly:
    """What a pipeline expects of an encoder, without noise."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


# --- low-rank updates -------------------------------------------------------------------------------------


@needs_peft
def test_a_step_of_low_rank_updates_is_that_of_peft(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings
) -> None:
    from peft import LoraConfig

    settings = replace(subject, rank=4, text_encoder=False, prior_weight=0, checkpointing=False)
    task = task_for(tmp_path, tokenizer, settings)
    theirs: Any = copy.deepcopy(pipeline("1.x").unet)
    theirs.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION["unet"]), init_lora_weights=True)
    )
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for name, layer in low_rank_layers(task.module.unet):
            modules[name].lora_A["default"].weight.copy_(layer.down)
    batch = first_batch(task)
    latents, noise, timestep, ids = (batch[name][:, 0] for name in ("latents", "noise", "timestep", "ids"))
    noisy = pipeline("1.x").scheduler.add_noise(latents, noise, timestep)
    tokens = pipeline("1.x").text_encoder(ids)[0].detach()
    learning = [p for p in theirs.parameters() if p.requires_grad]
    ours = [p for p in task.module.parameters() if p.requires_grad]
    assert len(ours) == len(learning) > 0
    for parameters in (learning, ours):
        optimizer = torch.optim.AdamW(parameters, 1e-2)
        for _ in range(2):
            if parameters is ours:
                loss = task.loss(task.module, batch)["loss"]
            else:
                loss = F.mse_loss(theirs(noisy, timestep, tokens).sample, noise)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for name, layer in low_rank_layers(task.module.unet):
        for mine, other in ((layer.down, "lora_A"), (layer.up, "lora_B")):
            expected = getattr(modules[name], other)["default"].weight
            # the optimizer divides by the root of squared gradients, some of which are next to nothing
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=2e-4)


def test_written_updates_are_merged_to_what_was_trained(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings
) -> None:
    task = task_for(tmp_path, tokenizer, replace(subject, rank=2, prior_weight=0))
    settings = replace(subject, learning_rate=1e-2)
    train(task, settings, tmp_path / "run")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_low_rank(path, {"unet": task.module.unet, "text_encoder": task.module.text_encoder})
    merged = merge_lora(checkpoint(tmp_path / "base-False-epsilon", False, "epsilon"), path)
    for part in ("unet", "text_encoder"):
        names = [name for name, _ in low_rank_layers(getattr(task.module, part))]
        assert names
        for name, layer in low_rank_layers(getattr(task.module, part)):
            expected = layer.base.weight + layer.up @ layer.down
            assert not torch.equal(expected, layer.base.weight)
            torch.testing.assert_close(merged.parts[part][f"{name}.weight"], expected)


@needs_peft
def test_diffusers_draws_with_written_updates(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings
) -> None:
    task = task_for(tmp_path, tokenizer, replace(subject, rank=2, prior_weight=0))
    train(task, replace(subject, learning_rate=1e-2), tmp_path / "run")
    write_low_rank(
        tmp_path / "pytorch_lora_weights.safetensors",
        {"unet": task.module.unet, "text_encoder": task.module.text_encoder},
    )
    pipe: Any = copy.deepcopy(pipeline("1.x"))
    pipe.load_lora_weights(tmp_path)
    shape = (1, 4, SIZE // 2, SIZE // 2)
    noise = np.random.Generator(np.random.Philox(key=np.array([1, 0], np.uint64)))
    latents = torch.from_numpy(noise.standard_normal(shape, np.float32))
    ids = torch.tensor([tokenizer.encode(text) for text in (subject.prompt, "")])
    tokens = pipe.text_encoder(ids)[0].detach()
    picture = pipe(
        prompt_embeds=tokens[:1],
        negative_prompt_embeds=tokens[1:],
        height=SIZE,
        width=SIZE,
        num_inference_steps=4,
        latents=latents,
        output_type="np",
    ).images[0]
    [drawn] = draw_pictures(task.network.eval(), tokenizer, subject.prompt, [1], SIZE, steps=4)
    assert np.abs(drawn.astype(int) - np.rint(picture * 255)).max() <= 1


def test_resumed_training_is_exact(tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings) -> None:
    def trained(steps: Sequence[int], folder: str) -> dict[str, Tensor]:
        for last in steps:
            task = task_for(tmp_path, tokenizer, replace(subject, rank=2))
            train(task, replace(subject, steps=last), tmp_path / folder)
        return task.module.state_dict()

    whole, halves = trained([4], "whole"), trained([2, 4], "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())


def test_a_preview_has_a_row_per_prompt_and_leaves_the_weights(
    tmp_path: Path, tokenizer: Tokenizer, subject: SubjectSettings
) -> None:
    task = task_for(tmp_path, tokenizer, replace(subject, prior_weight=0))
    preview = make_preview(task.network, tokenizer, replace(subject, previews=2), steps=1)
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    sheet = preview({name: torch.zeros_like(value) for name, value in before.items()})
    assert sheet.shape == (len(preview.prompts) * SIZE, 2 * SIZE, 3)
    assert all(torch.equal(value, before[name]) for name, value in Learner(task.network).state_dict().items())


# --- pictures ---------------------------------------------------------------------------------------------


def test_pictures_are_the_squares_in_their_middles(subject: SubjectSettings) -> None:
    wide = np.asarray(Image.open(Path(subject.pictures) / "2.png"))
    read = read_pictures(Path(subject.pictures), 40)
    assert [picture.shape for picture in read] == [(40, 40, 3)] * 3
    np.testing.assert_array_equal(read[2], wide[:, 10:50])


def test_places_are_boxes_blobs_and_the_whole_picture() -> None:
    shares = []
    for number in range(60):
        place = random_place(np.random.default_rng(number), 24)
        rows, columns = np.flatnonzero(place.any(1)), np.flatnonzero(place.any(0))
        shares.append(place.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))
        assert place.any()
    assert 20 < sum(share == 1 for share in shares) < 60
    assert any(share < 1 for share in shares)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: [path.unlink() for path in sorted(folder.iterdir())[1:]], "holds 1 picture; give"),
        (lambda folder: Image.new("RGB", (90, 40)).save(folder / "3.png"), "far from square"),
        (lambda folder: (folder / "notes.txt").write_text("a cat"), "notes.txt"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(
    subject: SubjectSettings, spoil: Any, sentence: str
) -> None:
    spoil(Path(subject.pictures))
    with pytest.raises((SubjectError, InputError), match=sentence) as refused:
        read_pictures(Path(subject.pictures), SIZE)
    assert str(refused.value).count(subject.pictures) == 1
    with pytest.raises(SubjectError, match="there is no folder"):
        read_pictures(Path(subject.pictures) / "none", SIZE)

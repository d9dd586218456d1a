"""A network that was trained goes through build_engines, and the runtime draws what PyTorch draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.support.checks import TOLERANCES, at_least, relative
from engines.options import EngineOptions
from export.build import build_bundle
from export.options import BuildOptions
from export.progress import Progress
from export.systems import open_source
from runtime import Compositor, Placement, Request, Sampling
from runtime.imaging.boxes import Box
from runtime.imaging.collage import make_hint
from runtime.imaging.geometry import Ratios
from runtime.imaging.modes import MODES
from runtime.imaging.paste_back import paste_back, pasted_region
from runtime.imaging.reference import prepare_reference
from tests.support.tiny import TINY, RandomPairs
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.checkpoint import write_model
from training.network.modules import AnyDoor
from training.preview import sample
from training.small.initial_weights import open_control
from training.systems.anydoor import Denoising, DiffusionTask

SIDE, STEPS, GUIDANCE, SEED = 64, 4, 2.0, 3


@pytest.mark.parametrize("prediction", [pytest.param("epsilon", marks=pytest.mark.nightly), "v"])
@pytest.mark.nightly
def test_what_was_trained_is_what_is_served(prediction: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AnyDoor(replace(TINY, prediction=prediction))
    open_control(model.control)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = DiffusionTask(model, RandomPairs(), Denoising(unet_encoder=True))
    train(task, LoopSettings(steps=3, batch=2, learning_rate=1e-3), tmp_path / "run")
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    write_model(tmp_path / "trained.safetensors", model.eval(), torch.float32)
    build = BuildOptions(resolution=SIDE, max_batch=2)
    source = open_source(tmp_path / "trained.safetensors")
    build_bundle(source, tmp_path / "bundle", build, Progress(quiet=True))

    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (90, 110, 3), np.uint8)
    picture, mask = rng.integers(0, 256, (40, 40, 3), np.uint8), np.zeros((40, 40), bool)
    mask[8:30, 10:34] = True
    box, mode = Box(30, 20, 70, 64), MODES["keep_background"]
    reference = prepare_reference(picture, mask)
    hint = make_hint(scene, box, reference, Ratios(), mode, SIDE)
    with torch.no_grad():
        shown = torch.from_numpy(reference.image.copy()).permute(2, 0, 1)[None] / 255
        tokens = model.encode_reference(torch.cat([shown, torch.zeros_like(shown)]))
        latents = sample(model, tokens, torch.from_numpy(hint.hint)[None], STEPS, GUIDANCE, SEED)
        decoded = model.decode(latents)[0].permute(1, 2, 0).numpy()
    expected = paste_back(np.clip(decoded * 127.5 + 127.5, 0, 255), scene, hint.geometry, mode.paste)

    compositor = Compositor.load(tmp_path / "bundle", EngineOptions(threads=1))
    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    placement = Placement(picture, mask, box=tuple(box), mode="keep_background")
    sampling = Sampling(steps=STEPS, guidance_scale=GUIDANCE)
    request = Request(scene, [placement], 0, sampling, initial_noise=noise.numpy())
    found = compositor.run(request)[0].image

    pictures = (reference.image.astype(np.float32) / 255).transpose(2, 0, 1)[None]
    engine = compositor.engine
    served = engine.to_host(engine.run("id_encoder", {"reference": pictures})["tokens"])
    token_check = relative(prediction, "ID tokens", served, tokens[:1].numpy(), TOLERANCES["fp32"].tokens)
    assert token_check.passed, token_check.row()
    region = pasted_region(hint.geometry, mode.paste).slices
    close = np.abs(found[region].astype(int) - expected[region]).max(axis=-1) <= 1
    check = at_least(
        prediction, "composite", float(close.mean()), TOLERANCES["fp32"].composite_share, "within 1"
    )
    assert check.passed, check.row()
    assert np.abs(found[region].astype(int) - scene[region]).max() > 1

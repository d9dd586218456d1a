"""Attention written out: equal to the fused one, and used where sequences are short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from tests.support.tiny import TINY, RandomPairs
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.short_attention import SHORT, ShortAttention, use_short_attention
from training.systems.anydoor import Denoising, DiffusionTask


def layer(cross: int | None = None, **more: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=8, cross_attention_dim=cross, heads=2, dim_head=4, **more)


@pytest.mark.parametrize("cells", [4, SHORT, SHORT + 1])
def test_it_is_the_fused_one_s_result_and_gradient(cells: int) -> None:
    results = []
    for processor in (AttnProcessor2_0(), ShortAttention()):
        attention = layer(cross=6)
        attention.set_processor(processor)
        inputs = torch.randn(2, cells, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        tokens = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
        output = attention(inputs, encoder_hidden_states=tokens)
        output.square().sum().backward()
        results.append((output.detach(), inputs.grad))
    torch.testing.assert_close(results[1], results[0])


def test_it_takes_pictures_as_the_autoencoder_gives_them() -> None:
    attention = layer(norm_num_groups=4, residual_connection=True, spatial_norm_dim=None)
    picture = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(1))
    expected = attention(picture)
    use_short_attention(attention)
    torch.testing.assert_close(attention(picture), expected)


def test_what_the_autoencoder_hands_over_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Its blocks give the embedding of a timestep, which is none."""
    attention = layer()
    use_short_attention(attention)
    with caplog.at_level("WARNING", "diffusers"):
        attention(torch.zeros(1, 4, 8), temb=None)
    assert not caplog.records


@pytest.mark.parametrize(("cells", "written_out"), [(SHORT, True), (SHORT + 1, False)])
def test_long_sequences_stay_fused(cells: int, written_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = AttnProcessor.__call__

    def counted(self: AttnProcessor, *arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(self)
        result: torch.Tensor = original(self, *arguments, **named)
        return result

    monkeypatch.setattr(AttnProcessor, "__call__", counted)
    attention = layer()
    use_short_attention(attention)
    attention(torch.zeros(1, cells, 8))
    assert bool(calls) == written_out


def test_layers_with_another_processor_keep_it() -> None:
    """Those that are guided record where they look."""
    model = AnyDoor(TINY)
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    layers[0].set_processor(own := AttnProcessor())
    use_short_attention(model)
    assert layers[0].processor is own
    assert all(isinstance(other.processor, ShortAttention) for other in layers[1:])


@pytest.mark.parametrize(("precision", "short"), [("bf16", True), ("no", False)])
def test_training_takes_it_in_bfloat16_on_a_processor(precision: Any, short: bool, tmp_path: Path) -> None:
    model = AnyDoor(TINY)
    task = DiffusionTask(model, RandomPairs(), Denoising())
    train(task, LoopSettings(1, batch=2, precision=precision), tmp_path)
    layer = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert isinstance(layer.processor, ShortAttention) == short

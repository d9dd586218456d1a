"""Keys that tell places: a query with the code of a place finds the token there."""

from __future__ import annotations

import math

import torch

from tests.support.tiny import TINY
from training.network.modules import AnyDoor
from training.small.attention_guide import cross_attention
from training.small.place_keys import KEY_GAIN, place_codes, place_reader, start_with_places
from training.systems.anydoor import guided_parts


def tokens_with_places(count: int, width: int = TINY.token_width) -> torch.Tensor:
    """Tokens whose places are mixed into random contents by a random matrix."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(16, width, generator=generator)
    contents = torch.randn(count, 256, width - 16, generator=generator)
    spread = torch.randn(width - 16, width, generator=generator)
    return place_codes(16) @ mixing + contents @ spread + 5.0


def test_each_place_has_its_code() -> None:
    codes = place_codes(16)
    likeness = codes @ codes.T
    assert (likeness.argmax(1) == torch.arange(256)).all()
    torch.testing.assert_close(likeness.diagonal(), torch.full((256,), 8.0))


def test_places_are_read_off_tokens() -> None:
    tokens = tokens_with_places(count=40)
    read = tokens_with_places(count=40)[7] @ place_reader(tokens).T
    codes = place_codes(16)
    off = (read - read.mean(0)) - (codes - codes.mean(0))
    assert float(off.square().mean()) < 0.01 * float(codes.var())


def test_a_query_with_the_code_of_a_place_looks_there() -> None:
    model = AnyDoor(TINY)
    layers, tokens = cross_attention(guided_parts(model)).values(), tokens_with_places(count=40)
    start_with_places(layers, tokens, heads=1)
    for layer in layers:
        width = layer.to_k.out_features // layer.heads
        keys = layer.to_k(tokens[0])[:, :16]
        looks = (place_codes(16) @ keys.T * KEY_GAIN / math.sqrt(width)).softmax(1)
        rows, columns = torch.cartesian_prod(torch.arange(16), torch.arange(16)).float().T
        off = (looks @ rows - rows).square() + (looks @ columns - columns).square()
        assert off.mean().sqrt().item() < 1


def test_other_heads_keep_their_keys() -> None:
    model = AnyDoor(TINY)
    layers = list(cross_attention(guided_parts(model)).values())
    before = [layer.to_k.weight.detach().clone() for layer in layers]
    start_with_places(layers, tokens_with_places(count=4), heads=1)
    for layer, weight in zip(layers, before, strict=True):
        first = weight.shape[0] // layer.heads
        assert torch.equal(layer.to_k.weight[first:], weight[first:])
        assert not torch.equal(layer.to_k.weight[:first], weight[:first])

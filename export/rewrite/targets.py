"""Lists the rules for each execution provider of ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from engines.manifest import ANY_TARGET, CPU, CUDA
from export.options import DETERMINISTIC_CUDA
from export.rewrite.attention import (
    CPU_HEADS,
    CUDA_HEADS,
    Attention,
    CausalAttention,
    HeadLimits,
    TransposedKeys,
    single_head,
)
from export.rewrite.bias_add import BiasAdd, is_biased_residual
from export.rewrite.convolution import Convolution
from export.rewrite.copies import NarrowIndices, SwappedHalves
from export.rewrite.geglu import BiasSplitGelu, TwoProjections, is_split_projection, plain_gelu
from export.rewrite.group_norm import (
    DeterministicGroupNorm,
    GroupNorm,
    GroupNormSiLU,
    silu_after_group_norm,
    single_channel_groups,
)
from export.rewrite.joined_projections import JoinedProjections
from export.rewrite.layer_norm import HalfLayerNorm, is_cast_layer_norm
from export.rewrite.layer_scale import LayerScale, is_layer_scale, scaled_for_some
from export.rewrite.rule import Anchor, Rule, operator
from export.rewrite.skip_group_norm import SkipGroupNorm, is_residual_group_norm
from export.rewrite.skip_layer_norm import SkipLayerNorm, broadcast_sum, is_residual_layer_norm
from export.rewrite.transposes import transpose_rules
from export.rewrite.values import differing_summands


@dataclass(frozen=True)
class Family:
    """Rules that together replace all patterns of a kind."""

    name: str
    rules: Sequence[Rule]
    anchor: Anchor
    """Says whether a node belongs to such a pattern. Every one is replaced or has a reason to stay."""
    repeated: bool = False
    """Whether a replacement makes room for others."""
    explain: Callable[[ir.Node], str | None] | None = None
    """Anchor -> why the pattern around it stays, where the exporter writes it in another form."""

    def apply(self, model: ir.Model) -> Counter[str]:
        """Replaces the patterns. Returns how often each rule did."""
        matches: Counter[str] = Counter()
        while True:
            before = matches.total()
            for rule in self.rules:
                matches[rule.name] += rule.apply(model)
            if not self.repeated or matches.total() == before:
                return matches

    def reason(self, node: ir.Node) -> str | None:
        """Why a pattern stays, of which a node is the anchor; None if no rule recognised it."""
        reasons = [rule.kept[node] for rule in self.rules if node in rule.kept]
        if not reasons and self.explain:
            return self.explain(node)
        return reasons[0] if reasons else None


def _attention(heads: HeadLimits) -> Family:
    rules = [TransposedKeys(), Attention(heads), CausalAttention(heads)]
    return Family("MultiHeadAttention", rules, operator("Softmax"), explain=single_head)


def _cuda(group_norm: type[GroupNorm] = GroupNorm) -> list[Family]:
    group_norms = [group_norm(half, flat) for half in (True, False) for flat in (True, False)]
    return [
        _attention(CUDA_HEADS),
        Family(
            group_norm.name, group_norms, operator("InstanceNormalization"), explain=single_channel_groups
        ),
        Family("GroupNorm with SiLU", [GroupNormSiLU()], silu_after_group_norm),
        Family("NhwcConv", [Convolution()], operator("Conv")),
        Family("BiasSplitGelu", [BiasSplitGelu()], operator("Erf"), explain=plain_gelu),
        Family("LayerNormalization in FP16", [HalfLayerNorm()], is_cast_layer_norm),
        Family("copies", [NarrowIndices(), SwappedHalves()], operator()),
        Family("joined projections", [JoinedProjections()], operator()),
        Family("scaled projections", [LayerScale()], is_layer_scale, explain=scaled_for_some),
        Family(
            "SkipLayerNormalization",
            [SkipLayerNorm(biased) for biased in (True, False)],
            is_residual_layer_norm,
            explain=broadcast_sum,
        ),
        Family("transposes", transpose_rules(), operator(), repeated=True),
        # of pictures with channels last, as the transposes leave them
        Family("SkipGroupNorm", [SkipGroupNorm()], is_residual_group_norm),
        Family("BiasAdd", [BiasAdd(True), BiasAdd(False)], is_biased_residual, explain=differing_summands),
    ]


def _cpu() -> list[Family]:
    return [_attention(CPU_HEADS)]


def _any() -> list[Family]:
    return [Family("two projections", [TwoProjections()], is_split_projection)]


@dataclass(frozen=True)
class Target:
    """What graphs are rewritten for."""

    families: Callable[[], list[Family]]
    """Makes the families of rules, in the order in which they are applied."""
    changes_weights: bool = True
    """Whether the rules may make other weights of those that there are."""


TARGETS = {
    ANY_TARGET: Target(_any),
    CUDA: Target(_cuda),
    DETERMINISTIC_CUDA: Target(lambda: _cuda(DeterministicGroupNorm)),
    CPU: Target(_cpu, changes_weights=False),
}
"""`ANY_TARGET`, standard operators alone, or an execution provider of ONNX Runtime; that of CUDA also with
operators that give the same input the same bits."""

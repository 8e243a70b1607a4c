"""Shapes of the decoders in litgpt's tables, as litgpt pads and names them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a decoder, and what its blocks are made of.

    Attributes:
        hidden: features of a token.
        layers: number of blocks.
        heads: number of heads of queries.
        groups: number of heads of keys and values.
        head_size: features of a head.
        intermediate: features inside the feed-forward.
        vocabulary: number of words, as padded.
        rotary: features of a head that are rotated.
        num_norms: normalisations of a block; with 4, outputs are normalised, too.
        is_parallel: whether attention and feed-forward read the same input.
        is_layer_norm: whether it has LayerNorm instead of RMSNorm.
        is_gated: whether the feed-forward has a gate.
        is_silu: whether the gated activation is SiLU instead of GELU.
        is_gemma: whether embeddings are scaled, and 1 added to weights of norms.
        is_capped: whether the scores of attention are limited by a tanh.
        has_bias: whether linear layers of blocks have biases.
        has_head_bias: whether the head has one.
    """

    hidden: int
    layers: int
    heads: int
    groups: int
    head_size: int
    intermediate: int
    vocabulary: int
    rotary: int
    num_norms: int = 2
    is_parallel: bool = False
    is_layer_norm: bool = False
    is_gated: bool = True
    is_silu: bool = True
    is_gemma: bool = False
    is_capped: bool = False
    has_bias: bool = False
    has_head_bias: bool = False


SHAPES = {
    "llama-2-7b": Shape(
        hidden=4096,
        layers=32,
        heads=32,
        groups=32,
        head_size=128,
        intermediate=11008,
        vocabulary=32000,
        rotary=128,
    ),
    "llama-2-13b": Shape(
        hidden=5120,
        layers=40,
        heads=40,
        groups=40,
        head_size=128,
        intermediate=13824,
        vocabulary=32000,
        rotary=128,
    ),
    "llama-3-8b": Shape(
        hidden=4096,
        layers=32,
        heads=32,
        groups=8,
        head_size=128,
        intermediate=14336,
        vocabulary=128256,
        rotary=128,
    ),
    "llama-3.2-1b": Shape(
        hidden=2048,
        layers=16,
        heads=32,
        groups=8,
        head_size=64,
        intermediate=8192,
        vocabulary=128256,
        rotary=64,
    ),
    "llama-3.2-3b": Shape(
        hidden=3072,
        layers=28,
        heads=24,
        groups=8,
        head_size=128,
        intermediate=8192,
        vocabulary=128256,
        rotary=128,
    ),
    "tiny-llama": Shape(
        hidden=2048,
        layers=22,
        heads=32,
        groups=4,
        head_size=64,
        intermediate=5632,
        vocabulary=32000,
        rotary=64,
    ),
    "mistral-7b": Shape(
        hidden=4096,
        layers=32,
        heads=32,
        groups=8,
        head_size=128,
        intermediate=14336,
        vocabulary=32000,
        rotary=128,
    ),
    "phi-3-mini": Shape(
        hidden=3072,
        layers=32,
        heads=32,
        groups=32,
        head_size=96,
        intermediate=8192,
        vocabulary=32064,
        rotary=96,
    ),
    "gemma-2b": Shape(
        hidden=2048,
        layers=18,
        heads=8,
        groups=1,
        head_size=256,
        intermediate=16384,
        vocabulary=256000,
        rotary=256,
        is_silu=False,
        is_gemma=True,
    ),
    "gemma-2-2b": Shape(
        hidden=2304,
        layers=26,
        heads=8,
        groups=4,
        head_size=256,
        intermediate=9216,
        vocabulary=256000,
        rotary=256,
        num_norms=4,
        is_silu=False,
        is_gemma=True,
        is_capped=True,
    ),
    "falcon-7b": Shape(
        hidden=4544,
        layers=32,
        heads=71,
        groups=1,
        head_size=64,
        intermediate=18176,
        vocabulary=65024,
        rotary=64,
        num_norms=1,
        is_parallel=True,
        is_layer_norm=True,
        is_gated=False,
    ),
    "phi-1.5": Shape(
        hidden=2048,
        layers=24,
        heads=32,
        groups=32,
        head_size=64,
        intermediate=8192,
        vocabulary=51200,
        rotary=32,
        num_norms=1,
        is_parallel=True,
        is_layer_norm=True,
        is_gated=False,
        has_bias=True,
        has_head_bias=True,
    ),
    "phi-2": Shape(
        hidden=2560,
        layers=32,
        heads=32,
        groups=32,
        head_size=80,
        intermediate=10240,
        vocabulary=51200,
        rotary=32,
        num_norms=1,
        is_parallel=True,
        is_layer_norm=True,
        is_gated=False,
        has_bias=True,
        has_head_bias=True,
    ),
    "stablelm-3b": Shape(
        hidden=4096,
        layers=16,
        heads=32,
        groups=32,
        head_size=128,
        intermediate=16384,
        vocabulary=50688,
        rotary=32,
        is_parallel=True,
        is_layer_norm=True,
        is_gated=False,
        has_bias=True,
    ),
}
"""By the name of a run's `shape` among its settings."""

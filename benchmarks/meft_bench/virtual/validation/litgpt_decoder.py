"""A decoder as litgpt's: memory depends on how it is written, not only on formulas.

One linear layer makes queries, keys and values, and LoRA changes parts of its output;
keys and values are repeated for every head; with LoRA, the head is applied to 128
tokens at a time, and is not tied to the embedding.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from meft_bench.virtual.validation.litgpt_shapes import Shape

CHUNK = 128
"""Tokens of a piece of the head's output, or of the loss."""
CHANGE_SCALE = 0.5
"""What the output of LoRA is multiplied with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """What LoRA changes.

    Attributes:
        rank: rank of each change; 0 for none, and all weights are trained.
        dropout: probability that an element of the input is dropped.
        parts: which of `query`, `key`, `value`, `projection`, `mlp` and `head`.
    """

    rank: int = 0
    dropout: float = 0.0
    parts: tuple[str, ...] = ()

    def of(self, part: str) -> int:
        """Return the rank of a part."""
        return self.rank if part in self.parts else 0


class LoraLinear(nn.Module):
    """A linear layer whose output LoRA changes."""

    def __init__(
        self, num_in: int, num_out: int, rank: int, dropout: float, *, bias: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(num_in, num_out, bias=bias)
        self.rank = rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if rank:
            self.lora_a = nn.Parameter(torch.empty(rank, num_in))
            self.lora_b = nn.Parameter(torch.empty(num_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output and its change."""
        y: Tensor = self.linear(x)
        if self.rank:
            y = y + (self.dropout(x) @ self.lora_a.T @ self.lora_b.T) * CHANGE_SCALE
        return y


class QueryKeyValue(nn.Module):
    """One linear layer for queries, keys and values; LoRA changes some of them."""

    def __init__(self, shape: Shape, lora: Lora) -> None:
        super().__init__()
        sizes = [shape.heads, shape.groups, shape.groups]
        sizes = [size * shape.head_size for size in sizes]
        self.linear = nn.Linear(shape.hidden, sum(sizes), bias=shape.has_bias)
        changed = [name in lora.parts for name in ("query", "key", "value")]
        self.sizes = list(itertools.compress(sizes, changed))
        self.is_whole = all(changed)
        self.is_even = shape.heads == shape.groups
        self.dropout = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
        if self.sizes:
            rows = lora.rank * len(self.sizes)
            self.lora_a = nn.Parameter(torch.empty(rows, shape.hidden))
            self.lora_b = nn.Parameter(torch.empty(sum(self.sizes), lora.rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return queries, keys and values of all heads, with their changes."""
        y: Tensor = self.linear(x)
        if not self.sizes:
            return y
        inner = functional.linear(self.dropout(x), self.lora_a).transpose(1, 2)
        kernel = self.lora_b.unsqueeze(-1)
        if self.is_even:
            change = functional.conv1d(inner, kernel, groups=len(self.sizes))
        else:
            parts = zip(
                inner.chunk(len(self.sizes), 1), kernel.split(self.sizes), strict=True
            )
            change = torch.cat([functional.conv1d(a, b) for a, b in parts], dim=1)
        return y + self._padded(change.transpose(1, 2), y.shape[-1]) * CHANGE_SCALE

    def _padded(self, change: Tensor, num_out: int) -> Tensor:
        """Put the change at its places among zeros, where not all is changed."""
        if self.is_whole:
            return change
        change = change.transpose(0, 1)
        zeros = change.new_zeros(*change.shape[:-1], num_out)
        places = torch.tensor(range(sum(self.sizes)), device=change.device)
        flat = change.reshape(-1, sum(self.sizes))
        padded = zeros.view(-1, num_out).index_copy(1, places, flat)
        return padded.view(zeros.shape).transpose(0, 1)


class RootMeanSquare(nn.Module):
    """Normalisation by the root of the mean square; `unit` adds 1 to the weight."""

    def __init__(self, size: int, *, in_float32: bool, unit: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.in_float32 = in_float32
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token."""
        dtype = x.dtype
        x = x.float() if self.in_float32 else x
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        x = x.to(dtype)
        return x * (1 + self.weight) if self.unit else x * self.weight


class DecoderBlock(nn.Module):
    """Attention and feed-forward, one after the other or both on the same input."""

    def __init__(self, shape: Shape, lora: Lora, *, norm_in_float32: bool) -> None:
        super().__init__()
        self.shape = shape
        self.norms = nn.ModuleList(
            _norm(shape, norm_in_float32) for _ in range(shape.num_norms)
        )
        self.attention = QueryKeyValue(shape, lora)

        def linear(num_in: int, num_out: int, part: str) -> LoraLinear:
            rank = lora.of(part)
            return LoraLinear(num_in, num_out, rank, lora.dropout, bias=shape.has_bias)

        inner = shape.heads * shape.head_size
        self.projection = linear(inner, shape.hidden, "projection")
        self.up = linear(shape.hidden, shape.intermediate, "mlp")
        if shape.is_gated:
            self.gate = linear(shape.hidden, shape.intermediate, "mlp")
        self.down = linear(shape.intermediate, shape.hidden, "mlp")

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return the input of the next block."""
        shape = self.shape
        normed = self.norms[0](x)
        attended = self._attend(normed, cosine, sine)
        if shape.is_parallel:
            normed = normed if shape.num_norms == 1 else self.norms[1](x)
            return x + attended + self._feed_forward(normed)
        if shape.num_norms == 4:
            attended = self.norms[2](attended)
        x = attended + x
        changed = self._feed_forward(self.norms[1](x))
        return (self.norms[3](changed) if shape.num_norms == 4 else changed) + x

    def _attend(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        shape, (batch_size, tokens, _) = self.shape, x.shape
        per_group = shape.heads // shape.groups
        all_heads: Tensor = self.attention(x).view(
            batch_size, tokens, shape.groups, per_group + 2, shape.head_size
        )
        q, k, v = all_heads.permute(0, 2, 3, 1, 4).split((per_group, 1, 1), dim=2)
        if shape.groups != shape.heads:
            k, v = (each.expand(-1, -1, per_group, -1, -1) for each in (k, v))
        q, k, v = (
            each.reshape(batch_size, shape.heads, tokens, shape.head_size)
            for each in (q, k, v)
        )
        q, k = (_rotated(each, shape.rotary, cosine, sine) for each in (q, k))
        y = _capped_attention(q, k, v) if shape.is_capped else _attention(q, k, v)
        y = y.transpose(1, 2).reshape(batch_size, tokens, -1)
        projected: Tensor = self.projection(y)
        return projected

    def _feed_forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if not self.shape.is_gated:
            y: Tensor = self.down(functional.gelu(up))
            return y
        gate = self.gate(x)
        activated = (functional.silu if self.shape.is_silu else functional.gelu)(up)
        y = self.down(activated * gate)
        return y


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _capped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend as Gemma 2 does: scores between -50 and 50, softmax in float32."""
    scores = q @ k.mT * 0.0625
    scores = torch.tanh(scores / 50) * 50
    mask = torch.ones(scores.shape[-2:], dtype=q.dtype, device=q.device).triu(1)
    scores = scores + mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def _rotated(x: Tensor, rotary: int, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the first elements of each head."""
    first = x[..., :rotary]
    half = rotary // 2
    turned = torch.cat((-first[..., half:], first[..., :half]), dim=-1)
    rotated = (first * cosine + turned * sine).to(x.dtype)
    return torch.cat((rotated, x[..., rotary:]), dim=-1)


def _norm(shape: Shape, in_float32: bool) -> nn.Module:
    if shape.is_layer_norm:
        return nn.LayerNorm(shape.hidden)
    return RootMeanSquare(shape.hidden, in_float32=in_float32, unit=shape.is_gemma)


class Decoder(nn.Module):
    """A decoder whose head is not tied to its embedding."""

    def __init__(self, shape: Shape, lora: Lora, *, norm_in_float32: bool) -> None:
        super().__init__()
        self.shape, self.is_lora = shape, bool(lora.rank)
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(
            DecoderBlock(shape, lora, norm_in_float32=norm_in_float32)
            for _ in range(shape.layers)
        )
        self.norm = _norm(shape, norm_in_float32)
        rank = lora.of("head")
        self.head = LoraLinear(
            shape.hidden, shape.vocabulary, rank, lora.dropout, bias=shape.has_head_bias
        )

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Return logits of pieces of the tokens; of all at once without LoRA."""
        x = self.embedding(ids)
        x = x * self.shape.hidden**0.5 if self.shape.is_gemma else x
        angles = torch.empty(ids.shape[1], self.shape.rotary, device=ids.device)
        cosine, sine = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cosine, sine)
        pieces = self.norm(x).split(CHUNK if self.is_lora else ids.shape[1], dim=1)
        return [self.head(piece) for piece in pieces]

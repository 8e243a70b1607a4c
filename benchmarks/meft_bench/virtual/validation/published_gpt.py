"""GPT of 124 million parameters, as a chapter of LLMs-from-scratch trains it.

The first program writes normalisation, activation and attention by elementary
operations in float32; later ones have BF16, then PyTorch's classes, then its function
of attention. Programs that are compiled are not repeated.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meft_bench.shared.published import Published
from meft_bench.virtual.prediction.training_code import virtual_gpu

WORDS = 50_257
TOKENS = 1024
SIZE = 768
HEADS = 12
LAYERS = 12
DROPOUT = 0.1


def from_scratch(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the predictions of a program: what is allocated and reserved at its end.

    Steps alternate with evaluations of two batches; at the end of an epoch, a text is
    generated, here of three lengths.
    """
    row = rows[0]
    settings = row.settings
    with virtual_gpu(row.gpu):
        model = Gpt(settings).to("cuda").to(getattr(torch, settings["dtype"]))
        optimizer = torch.optim.AdamW(model.parameters(), fused=settings["fused"])
        for _ in range(3):
            optimizer.zero_grad()
            loss = _loss(model, settings["batch_size"])
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                for _ in range(2):
                    _loss(model, settings["batch_size"])
            model.train()
        model.eval()
        with torch.no_grad():
            for length in (4, 28, 53):
                model(torch.ones(1, length, dtype=torch.long, device="cuda"))
        yield from (int(getattr(torch.cuda, each.metric)()) for each in rows)


def _loss(model: nn.Module, batch_size: int) -> Tensor:
    ids = torch.ones(batch_size, TOKENS, dtype=torch.long, device="cuda")
    targets = ids.clone()
    return functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


class ElementaryNorm(nn.Module):
    """LayerNorm by elementary operations."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(SIZE))
        self.shift = nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token."""
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


class ElementaryGelu(nn.Module):
    """GELU by elementary operations, with a tanh."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of each element."""
        inner = x + 0.044715 * torch.pow(x, 3)
        root = torch.sqrt(torch.tensor(2.0 / math.pi))
        return 0.5 * x * (1 + torch.tanh(root * inner))


class ElementaryAttention(nn.Module):
    """Causal attention by elementary operations."""

    def __init__(self, *, keeps_mask: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(SIZE, SIZE, bias=False) for _ in range(3)
        )
        self.projection = nn.Linear(SIZE, SIZE)
        self.dropout = nn.Dropout(DROPOUT)
        self.keeps_mask = keeps_mask
        self.mask: Tensor
        if keeps_mask:
            self.register_buffer("mask", torch.ones(TOKENS, TOKENS).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token takes from earlier ones."""
        keys, queries, values = (
            layer(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
            for layer in (self.key, self.query, self.value)
        )
        scores = queries @ keys.transpose(2, 3)
        tokens = x.shape[1]
        if self.keeps_mask:
            mask = self.mask.bool()[:tokens, :tokens]
        else:
            mask = torch.ones(tokens, tokens, device=x.device).triu(1).bool()
        scores.masked_fill_(mask, -torch.inf)
        weights = torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1)
        weights = self.dropout(weights)
        y: Tensor = self.projection((weights @ values).transpose(1, 2).reshape(x.shape))
        return y


class FusedAttention(nn.Module):
    """Causal attention by PyTorch's function, from one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(SIZE, 3 * SIZE, bias=False)
        self.projection = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token takes from earlier ones."""
        qkv = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=DROPOUT if self.training else 0.0, is_causal=True
        )
        y = y.transpose(1, 2).contiguous().view(x.shape)
        projected: Tensor = self.projection(y)
        return projected


class GptBlock(nn.Module):
    """Attention and feed-forward, each with a normalised input and a dropout."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        has_classes = settings["classes"]
        self.attention = (
            FusedAttention()
            if settings["fused_attention"]
            else ElementaryAttention(keeps_mask=settings["keeps_mask"])
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(SIZE, 4 * SIZE),
            nn.GELU(approximate="tanh") if has_classes else ElementaryGelu(),
            nn.Linear(4 * SIZE, SIZE),
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(SIZE) if has_classes else ElementaryNorm() for _ in range(2)
        )
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input of the next block."""
        x = self.dropout(self.attention(self.norms[0](x))) + x
        y: Tensor = self.dropout(self.feed_forward(self.norms[1](x))) + x
        return y


class Gpt(nn.Module):
    """The model; its head is not tied to its embedding."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, SIZE)
        self.places = nn.Embedding(TOKENS, SIZE)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(GptBlock(settings) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(SIZE) if settings["classes"] else ElementaryNorm()
        self.head = nn.Linear(SIZE, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of all tokens."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.dropout(x))))
        return logits

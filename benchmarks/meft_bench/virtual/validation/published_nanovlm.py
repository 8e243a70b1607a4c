"""nanoVLM: a small model of images and text, whose memory its page gives by batch size.

SigLIP 2 reads an image of 256 x 256; a projection makes 64 tokens of it, which replace
placeholders among the 128 tokens that SmolLM2-135M reads. Autocast to BF16, AdamW.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from meft_bench.shared.published import Published
from meft_bench.virtual.prediction.training_code import virtual_gpu

IMAGE_SIZE = 256
PATCH = 16
VISION_SIZE = 768
IMAGE_TOKENS = 64
TEXT_SIZE = 576
HEADS = 9
GROUPS = 3
WORDS = 49_153
TOKENS = 128


def by_batch_size(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the predictions of the page: after loading, and peaks by batch size.

    One process measures all sizes, from small to large, two steps each. The logits of
    a step are held until the next ones replace them. Without a limit of memory: the
    allocator's model has no room for 256 rows, by 52 MiB, which had room on the GPU.
    """
    first, *others = rows
    with virtual_gpu(first.gpu, enforce_memory=False):
        model = VisionLanguageModel().to("cuda")
        yield int(getattr(torch.cuda, first.metric)())
        held: list[Tensor] = []
        for row in others:
            torch.cuda.reset_peak_memory_stats()
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            for _ in range(2):
                shape = (row.size, 3, IMAGE_SIZE, IMAGE_SIZE)
                images = torch.empty(shape).to("cuda")
                ids, labels, mask = (
                    torch.ones(row.size, TOKENS, dtype=torch.long).to("cuda")
                    for _ in range(3)
                )
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16):
                    logits, loss = model(ids, images, mask, labels)
                held[:] = [logits]
                del logits
                loss.backward()
                optimizer.step()
            yield int(getattr(torch.cuda, row.metric)())
            del optimizer, loss, images, ids, labels, mask
            torch.cuda.empty_cache()
        held.clear()


class VisionBlock(nn.Module):
    """A block of the image's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(VISION_SIZE) for _ in range(2))
        self.qkv = nn.Linear(VISION_SIZE, 3 * VISION_SIZE)
        self.projection = nn.Linear(VISION_SIZE, VISION_SIZE)
        self.up = nn.Linear(VISION_SIZE, 4 * VISION_SIZE)
        self.down = nn.Linear(4 * VISION_SIZE, VISION_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input of the next block."""
        q, k, v = (
            part.view(*x.shape[:2], 12, -1).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).split(VISION_SIZE, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.projection(y.transpose(1, 2).contiguous().view(x.shape))
        up = self.up(self.norms[1](x))
        changed: Tensor = self.down(functional.gelu(up, approximate="tanh"))
        return x + changed


class TextNorm(nn.Module):
    """Normalisation by the root of the mean square, in the dtype of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(TEXT_SIZE))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token."""
        scale = torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-5)
        return x * scale * self.weight


class TextBlock(nn.Module):
    """A block of the decoder; three heads of queries share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        shared = TEXT_SIZE * GROUPS // HEADS
        self.norms = nn.ModuleList(TextNorm() for _ in range(2))
        self.query, self.key, self.value, self.projection = (
            nn.Linear(TEXT_SIZE, size, bias=False)
            for size in (TEXT_SIZE, shared, shared, TEXT_SIZE)
        )
        self.gate, self.up = (nn.Linear(TEXT_SIZE, 1536, bias=False) for _ in range(2))
        self.down = nn.Linear(1536, TEXT_SIZE, bias=False)

    def forward(
        self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the input of the next block, and keys and values for a cache."""
        normed = self.norms[0](x)
        q, k, v = (
            layer(normed).view(*x.shape[:2], -1, TEXT_SIZE // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q, k = (each * cosine + _turned(each) * sine for each in (q, k))
        cache = k, v
        k, v = (each.repeat_interleave(HEADS // GROUPS, dim=1) for each in (k, v))
        hidden = (1.0 - mask[:, None, None].float()) * torch.finfo(q.dtype).min
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=hidden, is_causal=True
        )
        x = x + self.projection(y.transpose(1, 2).contiguous().view(x.shape))
        normed = self.norms[1](x)
        gate = functional.silu(self.gate(normed))
        changed: Tensor = self.down(gate * self.up(normed))
        return x + changed, cache


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class VisionLanguageModel(nn.Module):
    """Encoder, projection and decoder; its head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, VISION_SIZE, PATCH, stride=PATCH)
        self.places = nn.Parameter(
            torch.empty(1, (IMAGE_SIZE // PATCH) ** 2, VISION_SIZE)
        )
        self.vision = nn.Sequential(*(VisionBlock() for _ in range(12)))
        self.vision_norm = nn.LayerNorm(VISION_SIZE)
        self.projection = nn.Linear(4 * VISION_SIZE, TEXT_SIZE, bias=False)
        self.words = nn.Embedding(WORDS, TEXT_SIZE)
        self.blocks = nn.ModuleList(TextBlock() for _ in range(30))
        self.norm = TextNorm()
        self.head = nn.Linear(TEXT_SIZE, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(
        self, ids: Tensor, images: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits and loss."""
        x = self._embed(ids, images)
        with torch.no_grad():
            places = torch.arange(TOKENS, device=x.device).expand(len(x), -1)
            rates = torch.empty(TEXT_SIZE // HEADS // 2, device=x.device)
            angles = places[..., None].float() * rates
            angles = torch.cat((angles, angles), dim=-1)
            cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
        caches = []  # held until the loss has been computed
        for block in self.blocks:
            x, cache = block(x, cosine, sine, mask)
            caches.append(cache)
        logits: Tensor = self.head(self.norm(x))
        flat = logits.reshape(-1, WORDS)
        loss = functional.cross_entropy(flat, labels.reshape(-1))
        del caches
        return logits, loss

    def _embed(self, ids: Tensor, images: Tensor) -> Tensor:
        """Return the embedding of the text with that of the image in its places."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        x = self.vision_norm(self.vision(x))
        side = IMAGE_SIZE // PATCH // 2
        x = x.reshape(len(x), side, 2, side, 2, VISION_SIZE)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous()
        image = self.projection(x.reshape(len(x), side * side, 4 * VISION_SIZE))
        text: Tensor = self.words(ids)
        updated = text.clone()
        starts = (ids == 1).int().argmax(dim=1)[:, None]
        offsets = torch.arange(IMAGE_TOKENS, device=ids.device)[None]
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand(
            -1, IMAGE_TOKENS
        )
        updated[rows, starts + offsets] = image.to(updated.dtype)
        return updated

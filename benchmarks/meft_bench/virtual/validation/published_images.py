"""Fine-tuning of a large vision transformer whose memory torchao measured.

DINOv2 with 1.1 billion parameters, checkpointed, with AdamW on the GPU or on the host:
then the GPU holds weights and gradients alone. Models are made from configs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch.nn import functional

from meft_bench.shared.published import Published
from meft_bench.virtual.prediction.training_code import virtual_gpu
from meft_bench.virtual.validation.published_training import checkpoint

VIT_GIANT = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "mlp_ratio": 4,
    "use_swiglu_ffn": True,
    "image_size": 224,
    "patch_size": 14,
    "num_labels": 45,
}


def vision_transformer(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the prediction of a run of torchao's benchmark of optimizers."""
    row = rows[0]
    dtype = getattr(torch, row.settings["dtype"])
    with virtual_gpu(row.gpu):
        config = transformers.Dinov2Config(**VIT_GIANT)  # type: ignore[arg-type]
        with torch.device("cuda"):
            model: Any = transformers.AutoModelForImageClassification.from_config(
                config, dtype=dtype
            )
        checkpoint(model)
        model.train()
        optimizer = _HostOptimizer(model) if row.settings["offload"] else _fused(model)
        shape = (row.settings["batch_size"], 3, row.size, row.size)
        for _ in range(3):
            images = torch.randn(shape, device="cuda", dtype=dtype)
            labels = torch.zeros(shape[0], dtype=torch.long, device="cuda")
            is_mixed = dtype == torch.float32
            with torch.autocast("cuda", torch.bfloat16, enabled=is_mixed):
                logits = model(pixel_values=images).logits
                loss = functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        yield int(getattr(torch.cuda, row.metric)())


class _HostOptimizer:
    """An optimizer whose state and step are on the host: nothing is made on the GPU."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def step(self) -> None:
        """Leave the weights where they are; the host's copies are moved into them."""

    def zero_grad(self) -> None:
        self.model.zero_grad()


def _fused(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)

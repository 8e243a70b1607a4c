"""BERT-large on a V100, as a page of the documentation of transformers trained it.

FP32 or FP16 by autocast, with checkpointing, accumulation, AdamW or Adafactor, and
eager attention. Its torch 1.10 set gradients to zero and updated parameters one by one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from meft_bench.shared.published import Published
from meft_bench.virtual.prediction.training_code import virtual_gpu
from meft_bench.virtual.validation.published_training import checkpoint

BERT_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
V100_CONTEXT_BYTES = 1343 * 2**20
"""What driver and kernels took before the model, as the same page measured it."""


def bert_on_v100(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the prediction of a run of the page."""
    row = rows[0]
    with virtual_gpu(row.gpu, padding=False) as gpu:
        config = transformers.BertConfig(**BERT_LARGE)  # type: ignore[arg-type]
        with torch.device("cuda"):
            model: Any = transformers.AutoModelForSequenceClassification.from_config(
                config, attn_implementation="eager"
            )
        model.train()
        if row.settings.get("checkpointing"):
            checkpoint(model)
        is_mixed = bool(row.settings.get("fp16"))
        scaler = torch.amp.GradScaler("cuda", enabled=is_mixed)
        optimizer = _optimizer(model, row.settings.get("optimizer", "adamw"))
        for _ in range(3):
            for _ in range(row.settings["accumulation"]):
                shape = (row.settings["batch_size"], row.size)
                ids = torch.ones(shape, dtype=torch.long, device="cuda")
                with torch.autocast("cuda", torch.float16, enabled=is_mixed):
                    loss = model(input_ids=ids, labels=ids[:, 0].clone()).loss
                scaler.scale(loss).backward()
                del loss
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=False)
        plan = gpu.plan()
        assert plan.reserved_bytes is not None
        yield plan.reserved_bytes + V100_CONTEXT_BYTES


def _optimizer(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "adafactor":
        return transformers.Adafactor(
            model.parameters(), lr=5e-5, scale_parameter=False, relative_step=False
        )
    return torch.optim.AdamW(model.parameters(), foreach=False)

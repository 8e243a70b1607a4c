"""Fine-tuning runs of litgpt whose memory its tables give, in BF16 on one GPU."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from meft_bench.shared.published import Published
from meft_bench.virtual.prediction.training_code import virtual_gpu
from meft_bench.virtual.validation.litgpt_decoder import CHUNK, Decoder, Lora
from meft_bench.virtual.validation.litgpt_shapes import SHAPES
from meft_bench.virtual.validation.published_training import lora_of_7b

NUM_STEPS = 2
ACCUMULATION = 2
"""Micro-batches of a step; in more of them, no more memory is taken."""


def fine_tuning(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the peak of a run of litgpt's scripts.

    Micro-batches have the greatest length. Where its script begins with the longest
    row, there are no gradients, states or earlier logits yet, and no other is run. The
    precision plugin casts logits to float32; they are held until the next replace them.
    """
    row = rows[0]
    if "peft" in row.settings:
        yield from lora_of_7b(rows)
        return
    lora = Lora(**row.settings.get("lora", {}))
    with virtual_gpu(row.gpu, padding=False):
        with torch.device("meta"):
            model = Decoder(
                SHAPES[row.settings["shape"]],
                lora,
                norm_in_float32=row.settings.get("norm_in_float32", True),
            )
        model.to(torch.bfloat16).to_empty(device="cuda")
        if lora.rank:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        logits: list[Tensor] = []
        is_first = row.settings.get("first_is_longest", False)
        for index in range(1 if is_first else NUM_STEPS * ACCUMULATION):
            shape = (row.settings["batch_size"], row.size)
            ids = torch.ones(shape, dtype=torch.long, device="cuda")
            logits = _in_float32(model(ids))
            _loss(logits, ids[:, 1:]).backward()
            if index % ACCUMULATION == ACCUMULATION - 1:
                optimizer.step()
                optimizer.zero_grad()
        del logits
        yield from (int(getattr(torch.cuda, each.metric)()) for each in rows)


def _in_float32(outputs: list[Tensor]) -> list[Tensor]:
    return [each.float() for each in outputs]


def _loss(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Return the loss of pieces of the logits; the last token predicts nothing."""
    if len(logits) > 1:
        logits[-1] = logits[-1][:, :-1]
        pieces = [piece.reshape(-1, piece.shape[-1]) for piece in logits]
        labels = [each.reshape(-1) for each in targets.split(CHUNK, dim=1)]
    else:
        whole = logits[0][:, :-1]
        pieces = list(whole.reshape(-1, whole.shape[-1]).split(CHUNK))
        labels = list(targets.reshape(-1).split(CHUNK))
    losses = [
        functional.cross_entropy(piece, label, reduction="none")
        for piece, label in zip(pieces, labels, strict=True)
    ]
    return torch.cat(losses).sum() / targets.numel()

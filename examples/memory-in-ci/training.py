"""A text classifier, trained by a loop of plain torch or by transformers' Trainer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Embeds the words of a text, mixes them, and names a topic."""

    def __init__(self, num_words: int = 1000, width: int = 64, num_topics: int = 4):
        super().__init__()
        self.embed = nn.Embedding(num_words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_topics)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """Return the logits, or with labels the loss as well."""
        logits = self.head(self.encoder(self.embed(input_ids)).mean(1))
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def make(device: str = "cpu") -> tuple[Classifier, torch.optim.Optimizer]:
    """Return a new model with its optimizer."""
    torch.manual_seed(0)
    model = Classifier().to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def batch(
    num_rows: int = 8, num_tokens: int = 32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return a batch of made-up texts."""
    ids = torch.zeros(num_rows, num_tokens, dtype=torch.long, device=device)
    return {"input_ids": ids, "labels": ids[:, 0]}


def train_with_trainer(folder: Path, num_steps: int = 2) -> None:
    """Train with transformers' Trainer, on the GPU if there is one."""
    from transformers import Trainer, TrainingArguments

    rows = [{name: value[0] for name, value in batch(1).items()} for _ in range(16)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model, _ = make()
    Trainer(model=model, args=arguments, train_dataset=rows).train()

"""A BART classifier that reads the last token of each row.

transformers' own classifier reads the last *end* token and requires the same number of
end tokens in every row. Rows of random tokens do not meet this requirement, nor do rows
that are filled from several texts, and on a virtual GPU there are no values to search
for an end token. BART's tokenizer ends every row with an end token, so on text both
classifiers read the same position.
"""

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BartForSequenceClassification, PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput


class BartClassifier(BartForSequenceClassification):
    """`BartForSequenceClassification` with a different choice of the head's token."""

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> Self:
        """Return a model with random weights; the signature is that of transformers."""
        made: Self = cls._from_config(config, **options)  # type: ignore[no-untyped-call]
        return made

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Return logits, and the loss if there are labels.

        Args:
            input_ids: token ids, `batch seq`, padded on the right.
            attention_mask: 1 for tokens and 0 for padding, `batch seq`; None means no
                padding.
            labels: class or number of each row, `batch`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        out = self.model(input_ids, attention_mask=attention_mask, use_cache=False)
        last = attention_mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        logits = self.classification_head(out.last_hidden_state[rows, last])
        loss = None
        if labels is not None and self.config.problem_type == "regression":
            loss = functional.mse_loss(logits[:, 0], labels)
        elif labels is not None:
            loss = functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

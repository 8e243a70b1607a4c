"""BART's classifier, which reads the last token of each row.

transformers' own reads the last *end* token and asks for equally many of them in every
row. Random tokens do not have that, nor do rows filled up from several texts, and on a
virtual GPU there are no values to look for one in. BART's tokenizer ends every row with
an end token, so on text both read the same place.
"""

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BartForSequenceClassification, PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput


class BartClassifier(BartForSequenceClassification):
    """`BartForSequenceClassification`, but for the token that the head is given."""

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> Self:
        """Random weights, asked for as of transformers' factories."""
        made: Self = cls._from_config(config, **options)  # type: ignore[no-untyped-call]
        return made

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits, and the loss if there are labels; padding is on the right."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        out = self.model(input_ids, attention_mask=attention_mask, use_cache=False)
        last = attention_mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        logits = self.classification_head(out.last_hidden_state[rows, last])
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

"""A tiny language model whose weights are sines, and rows with options made up for it.

Both are the same on every machine, so that what lm-evaluation-harness computes with
them can be kept in `fixtures/lm-evaluation-harness.json`, which
`fixtures/make_options.py` has written.
"""

import math
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = ["A", "B", "C", "D", "E"]
PIQA = {
    "goal": "To dry a wet shoe overnight,",
    "sol1": "fill it with crumpled paper ",
    "sol2": "fill it with water",
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc-easy": [
        {
            "question": "Which of these is a liquid at room temperature?",
            "choices": {"text": ["iron", "water", "salt"], "label": LETTERS[:3]},
            "answerKey": "B",
        },
        {
            "question": "What do bees collect?",
            "choices": {"text": ["nectar", "sand", "rain", "wool"], "label": [*"1234"]},
            "answerKey": "1",
        },
    ],
    "arc-challenge": [
        {
            "question": "Which unit measures 20 °C?",
            "choices": {
                "text": ["the metre", "the kilogram", "the degree °C", "an hour", "A"],
                "label": LETTERS,
            },
            "answerKey": "C",
        },
        {
            "question": "Two options are equal here, and the second of them is right: ",
            "choices": {"text": ["wood", "wood", "glass"], "label": LETTERS[:3]},
            "answerKey": "B",
        },
    ],
    "openbookqa": [
        {
            "question_stem": "A plant on a sunny sill will bend toward the",
            "choices": {
                "text": ["window", "wall", "floor", "colder side of the room"],
                "label": LETTERS[:4],
            },
            "answerKey": "A",
        },
        {
            "question_stem": "Ice that lies in the sun becomes ",  # ends in a space
            "choices": {
                "text": ["water", "stone", "a very small cloud", "salt"],
                "label": LETTERS[:4],
            },
            "answerKey": " A",
        },
    ],
    "piqa": [PIQA | {"label": 0}, PIQA | {"goal": "To ruin a shoe,", "label": 1}],
    "boolq": [
        {
            "passage": "The lake freezes in most winters. Ferries run in summer only.",
            "question": "do ferries cross the lake in january",
            "answer": False,
            "label": 0,
        },
        {
            "passage": "The lake freezes in most winters.",
            "question": "does the lake freeze",
            "answer": True,
            "label": 1,
        },
    ],
    "sciq": [
        {
            "support": " A prism splits white light into its colours.",
            "question": "What splits white light?",
            "distractor1": "a mirror",
            "distractor2": "a pane of glass that is flat",
            "distractor3": "a sieve",
            "correct_answer": "a prism",
        },
        {
            "support": "",
            "question": "What is the largest planet?",
            "distractor1": "Mars",
            "distractor2": "Venus",
            "distractor3": "Earth",
            "correct_answer": "Jupiter",
        },
    ],
}
"""Rows as the hub has them; SuperGLUE's BoolQ has `label` where ours has `answer`."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<end>": 0} | {letter: i for i, letter in enumerate(alphabet, start=1)}
    made = Tokenizer(BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    )


@torch.no_grad()
def model() -> LlamaForCausalLM:
    """A LLaMA of two blocks, in float32."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
    )
    made = LlamaForCausalLM(config)
    for index, parameter in enumerate(made.parameters()):
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        places = torch.arange(parameter.numel(), dtype=torch.float64)
        waves = torch.sin(places * places * math.sqrt(2 + index)) * 0.5
        parameter.copy_(waves.view(parameter.shape))
    made.eval()
    return made

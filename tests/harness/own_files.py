"""Small files of a user: models with a tokenizer, rows, configs, and sweeps of them."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WORDS = (
    *("[PAD]", "[UNK]", "[END]", "film", "a", "was", "the", "very", "good", "bad"),
    *("Question", ":", "Answer", "red", "blue", "?"),
)
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 2,
}
LANGUAGE_MODELS = ("llama", "olmo")
LORA = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["query", "value"],
}


def model_in(folder: Path, model_type: str = "bert") -> Path:
    """A folder with a tiny model of a type and its tokenizer, always the same."""
    config = CONFIG_MAPPING[model_type](**SHAPE)
    is_lm = model_type in LANGUAGE_MODELS
    auto: Any = AutoModelForCausalLM if is_lm else AutoModelForSequenceClassification
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each of `WORDS`."""
    words = {word: index for index, word in enumerate(WORDS)}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[END]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def reviews(count: int = 40) -> list[dict[str, Any]]:
    """Rows with a text, a label and a number, which one word of the text decides."""
    generator = random.Random(0)
    found = []
    for index in range(count):
        words = generator.choices(["film", "a", "was", "the", "very"], k=5)
        words.insert(generator.randrange(5), ["bad", "good"][index % 2])
        number = round(index % 2 + generator.random() / 4, 3)
        label = ["no", "yes"][index % 2]
        found.append({"review": " ".join(words), "liked": label, "stars": number})
    return found


def questions(count: int = 20) -> list[dict[str, Any]]:
    """Rows with a prompt, two options, and the right one of them."""
    return [
        {
            "prompt": f"Question: the film was {['bad', 'good'][n % 2]}?\nAnswer:",
            "options": ["red", "blue"],
            "answer": ["red", "blue"][n % 2],
        }
        for n in range(count)
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows with a line of column names."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a row per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""Models of families that the library does not know, as transformers makes them.

A family describes the blocks of a model, and some methods need it. Full fine-tuning,
LoRA, checkpointing, the methods of PEFT and a user's own function do not: for them, the
model of any config of transformers will do, and everything that a family would say is
found in the model itself. The head is all that is outside of the base model.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from meft_bench.child.backbones.classifier import heads_of as known_heads_of
from meft_bench.child.backbones.classifier import num_positions, options
from meft_bench.shared import backbones
from meft_bench.shared.cell import Cell
from meft_bench.shared.own import PYTHON
from meft_bench.shared.registry import METHODS_OF_ANY_MODEL, PEFT, SYNTHETIC_TASKS

CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
LANGUAGE_MODELS: dict[str, Mapping[str, object]] = {
    "AutoModelForSpeechSeq2Seq": (
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    ),
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MASKED: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    CAUSAL: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""Factories of language models, with the types they can make; the first one is taken.
"""
CLASSIFIERS: dict[str, Mapping[str, object]] = {
    "AutoModelForSequenceClassification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "AutoModelForImageClassification": (
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    ),
}
"""Factories of classifiers, likewise."""
GENERATES = LANGUAGE_MODELS["AutoModelForSeq2SeqLM"]
KNOWN_LANGUAGE_MODELS = backbones.types_of("causal-lm", "seq2seq-lm")
INITIALIZER_RANGE = 0.02
"""Standard deviation of a new head where the config names none."""


def is_known(config: PreTrainedConfig) -> bool:
    """Return whether sweeps know the family of a model."""
    kind = backbones.TABLE.get(config.model_type)
    return kind is not None and bool(kind.models)


def require(cell: Cell, config: PreTrainedConfig) -> None:
    """Raise `ValueError` unless a method can have a model of a family not known."""
    is_own = cell.method.startswith((*PEFT, PYTHON))
    if not is_own and cell.method not in METHODS_OF_ANY_MODEL:
        raise ValueError(
            f"method {cell.method!r} needs a family that sweeps know, and "
            f"{cell.backbone} is of model_type {config.model_type!r}: take "
            f"{', '.join(METHODS_OF_ANY_MODEL)}, {PEFT[0]}CONFIG or "
            f"{PYTHON}MODULE:FUNCTION"
        )


def require_for_sweeps(
    config: PreTrainedConfig, cell: Cell, num_labels: int | None
) -> None:
    """Raise `ValueError` unless a sweep can have a model of a family not known.

    Its method must need no family, and the model must read tokens.
    """
    require(cell, config)
    kind = _class(_factory(config, cell, num_labels), config)
    if kind.main_input_name != "input_ids":
        raise ValueError(
            f"{cell.backbone} reads `{kind.main_input_name}`, and sweeps give text to "
            "models of families that they do not know: plan it (`meft-bench plan`), or "
            "take a backbone of text"
        )


@torch.no_grad()
def require_causal(model: Any, cell: Cell) -> None:
    """Raise `ValueError` if a token changes what a language model says before it.

    An encoder that is made as a language model, such as ERNIE, sees both sides of a
    token unless its config says that it is a decoder, and so does XLNet.
    """
    was_training = model.training
    model.eval()
    first, other = (torch.tensor([[1, 2, 3, last]]) for last in (1, 2))
    before, after = (
        model(input_ids=ids.to(model.device)).logits[:, :-1].float()
        for ids in (first, other)
    )
    model.train(was_training)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.std())):
        raise ValueError(
            f"{cell.backbone} is of model_type {model.config.model_type!r}, and as a "
            f"language model it sees the tokens that task {cell.task!r} has it "
            "predict: take a causal model"
        )


def task_of(model_type: str) -> str:
    """Return the task of the head that models of a type are usually fine-tuned with.

    It is that of a language model, but for encoders, whose language model is masked.
    """
    if model_type in backbones.TABLE and backbones.TABLE[model_type].models:
        return "synthetic-lm" if model_type in KNOWN_LANGUAGE_MODELS else "synthetic"
    usual = [types for name, types in LANGUAGE_MODELS.items() if name != MASKED]
    is_usual = any(model_type in types for types in usual)
    is_encoder = model_type in LANGUAGE_MODELS[MASKED] and model_type not in GENERATES
    return "synthetic-lm" if is_usual and not is_encoder else "synthetic"


def factory_name(config: PreTrainedConfig, cell: Cell, num_labels: int | None) -> str:
    """Return the name of the factory of the head that a task requires.

    Args:
        config: config of the model.
        cell: the cell; text that is to be predicted requires a causal model.
        num_labels: number of classes; None for a language model.

    Raises:
        ValueError: transformers has no such head for the model.
    """
    tables = LANGUAGE_MODELS if num_labels is None else CLASSIFIERS
    if num_labels is None and cell.task not in SYNTHETIC_TASKS:
        tables = {CAUSAL: LANGUAGE_MODELS[CAUSAL]}
    for name, types in tables.items():
        if config.model_type in types:
            return name
    known = [*CLASSIFIERS.values(), *LANGUAGE_MODELS.values()]
    if not any(config.model_type in types for types in known):
        raise ValueError(
            f"transformers has neither a classifier nor a language model of model_type "
            f"{config.model_type!r}: plan it as code of your own, with `--script`"
        )
    if cell.task not in SYNTHETIC_TASKS:
        head = "classifier" if num_labels is not None else "causal language model"
        raise ValueError(
            f"transformers has no {head} of model_type {config.model_type!r}, which "
            f"task {cell.task!r} needs: take another backbone or task"
        )
    head = "language model" if num_labels is None else "classifier"
    other = SYNTHETIC_TASKS[num_labels is not None]
    raise ValueError(
        f"transformers has no {head} of model_type {config.model_type!r}: "
        f"`--set task={other}` plans another head"
    )


def set_up_config(config: PreTrainedConfig, cell: Cell, num_labels: int | None) -> None:
    """Set up a config for a classifier or a language model.

    Args:
        config: config of the model; changed in place.
        cell: the cell that the model is for.
        num_labels: number of classes, 1 for a number; None for a language model.

    Raises:
        ValueError: `cell.seq_len` is larger than the number of positions of the model,
            or its depth cannot be changed.
    """
    longest = num_positions(config)
    if longest is not None and longest < cell.seq_len:
        raise ValueError(
            f"`seq_len` is {cell.seq_len}, but {cell.backbone} has positions for "
            f"{longest} tokens: lower it to at most {longest}"
        )
    if cell.depth:
        _set_depth(config, cell.depth)
    if num_labels is not None:
        config.num_labels = num_labels
        config.problem_type = backbones.problem_type(num_labels)
    text = config.get_text_config()
    if getattr(text, "decoder_start_token_id", None) is None:
        text.decoder_start_token_id = 0
    config.architectures = config.architectures or []  # read where there are several


def make(
    config: PreTrainedConfig,
    cell: Cell,
    num_labels: int | None,
    *,
    directory: Any = None,
    **reader: Any,
) -> Any:
    """Make a model on the cell's device, with the weights of a directory or random.

    Args:
        config: config of the model; changed in place.
        cell: its task decides the head.
        num_labels: number of classes; None for a language model.
        directory: the directory of the weights; None for random weights.
        reader: further arguments of `from_pretrained`.

    Raises:
        ValueError: transformers has no such head for the model, or cannot make it.
    """
    factory = _factory(config, cell, num_labels)
    if directory is not None and cell.depth > num_blocks(config):
        raise ValueError(
            f"`depth` is {cell.depth}, but {cell.backbone} has {num_blocks(config)} "
            f"blocks, and those of model_type {config.model_type!r} cannot be "
            "repeated: lower it"
        )
    set_up_config(config, cell, num_labels)
    wants: dict[str, Any] = {"trust_remote_code": False, **options(cell)}
    text = config.get_text_config()
    if directory is None and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # no token means anything to random weights
    if (
        not _class(factory, config)._supports_sdpa
        and wants["attn_implementation"] == "sdpa"
    ):
        wants["attn_implementation"] = "eager"
    try:
        if directory is not None:
            return factory.from_pretrained(directory, config=config, **reader, **wants)
        with torch.device(cell.device):
            return factory.from_config(config, **wants)
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        hint = "; leave out `--depth`" if cell.depth else ""
        raise ValueError(
            f"transformers cannot make a model of this config: {reason}{hint}"
        ) from error


def _factory(config: PreTrainedConfig, cell: Cell, num_labels: int | None) -> Any:
    return getattr(transformers, factory_name(config, cell, num_labels))


def _class(factory: Any, config: PreTrainedConfig) -> Any:
    kinds = factory._model_mapping[type(config)]
    return kinds[0] if isinstance(kinds, tuple | list) else kinds


def heads_of(model: Any) -> dict[str, nn.Module]:
    """Return the heads of a classifier by name, the modules without trained weights.

    Of a family that is not known, they are the modules with parameters outside of the
    base model.
    """
    if is_known(model.config):
        return {
            name: part
            for name, part in model.named_children()
            if any(part is head for head in known_heads_of(model))
        }
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(base, nn.Module):  # the names that PEFT takes for heads
        named = {name: getattr(model, name, None) for name in ("classifier", "score")}
        return {n: part for n, part in named.items() if isinstance(part, nn.Module)}
    return {
        name: part
        for name, part in model.named_children()
        if part is not base and any(True for _ in part.parameters())
    }


def initial_std(config: PreTrainedConfig) -> float:
    """Return the standard deviation of a new head's weights."""
    std = getattr(config.get_text_config(), "initializer_range", None)
    return float(std) if isinstance(std, float) else INITIALIZER_RANGE


def num_blocks(config: PreTrainedConfig) -> int:
    """Return the number of blocks that a config names; 0 where it names none."""
    count = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return count if isinstance(count, int) else 0


def _set_depth(config: PreTrainedConfig, depth: int) -> None:
    """Change the number of layers, and cut or repeat the list of their kinds."""
    if not hasattr(config, "num_hidden_layers") or hasattr(config, "depths"):
        raise ValueError(
            f"the depth of model_type {config.model_type!r} is not one number: leave "
            "out `--depth`, and change its config.json"
        )
    try:
        config.num_hidden_layers = depth
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = (list(kinds) * depth)[:depth]
    except AttributeError as error:
        raise ValueError(
            f"`--depth` cannot change the config of model_type {config.model_type!r}: "
            f"{error}; change its config.json"
        ) from error
    for name in ("decoder_layers", "num_decoder_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, depth)

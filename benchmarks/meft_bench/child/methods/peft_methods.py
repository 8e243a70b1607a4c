"""Other methods of the `peft` library, each as its paper describes it.

vera       W x + b * (B (d * (A x))): A and B are random and shared by all layers, the
           vectors b and d train (Kopiczko et al., ICLR 2024)
ia3        keys, values and the input of the last layer of the feed-forward, each
           multiplied by a vector (Liu et al., NeurIPS 2022)
oft        R W x, R orthogonal with square blocks on its diagonal (Qiu et al., NeurIPS
           2023)
boft       the same with a product of sparse orthogonal matrices (Liu et al., ICLR 2024)
ln_tuning  the norms (Zhao et al., ICLR 2024)

They change the query and value projections where nothing else is said, as `lora` does,
and train the new head. Sizes are those that peft proposes, apart from `RANK`.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from peft import (
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS
from transformers import PreTrainedModel

from meft_bench.child.backbones import heads_of
from meft_bench.child.methods.lora import has_transposed, query_and_value, with_head
from meft_bench.shared.cell import Cell

RANK = 256
"""Rank of the shared matrices of VeRA, of which only vectors train."""


def _vera(model: PreTrainedModel) -> PeftConfig:
    return VeraConfig(
        r=RANK,
        target_modules=query_and_value(model),
        fan_in_fan_out=has_transposed(model),
    )


def _ia3(model: PreTrainedModel) -> PeftConfig:
    model_type = model.config.model_type
    if model_type not in IA3_TARGETS:
        raise ValueError(
            f"method 'ia3' with model_type {model_type!r}, of which peft does not know "
            f"what to multiply: take a model of {', '.join(IA3_TARGETS)}, or 'vera', "
            "whose vectors fit all models"
        )
    return IA3Config(fan_in_fan_out=has_transposed(model))


def _oft(model: PreTrainedModel) -> PeftConfig:
    return OFTConfig(target_modules=query_and_value(model))


def _boft(model: PreTrainedModel) -> PeftConfig:
    return BOFTConfig(target_modules=query_and_value(model))


def _of_peft(
    model: PreTrainedModel,
    cell: Cell,
    config_of: Callable[[PreTrainedModel], PeftConfig],
) -> PreTrainedModel:
    tuned = with_head(_tuned(model, config_of(model), cell))
    for name, parameter in tuned.named_parameters():
        if ".ia3_l." in name or ".boft_s." in name:
            parameter.multiplies = True  # type: ignore[attr-defined]
    return tuned


vera = partial(_of_peft, config_of=_vera)
ia3 = partial(_of_peft, config_of=_ia3)
oft = partial(_of_peft, config_of=_oft)
boft = partial(_of_peft, config_of=_boft)


def ln_tuning(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train all norms, in the dtype of the backbone, and the new head."""
    modules = model.named_modules()
    # Every class of norms in transformers and torch ends so, LayerNorm and RMSNorm.
    norms = [name for name, m in modules if type(m).__name__.endswith("Norm")]
    tuned = _tuned(model, LNTuningConfig(target_modules=norms), cell)
    for part in heads_of(tuned):
        part.requires_grad_(True)
    return tuned


def _tuned(model: PreTrainedModel, config: PeftConfig, cell: Cell) -> PreTrainedModel:
    with warnings.catch_warnings():
        # Norms of every class are supported, and the extension only makes BOFT faster.
        warnings.filterwarnings("ignore", "Unsupported layer type")
        warnings.filterwarnings("ignore", "Failed to load the CUDA extension")
        warnings.filterwarnings("ignore", "Setting boft_n_butterfly_factor to 1")
        # On a virtual GPU, norms that are copied have no values.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        # Without a task in its config, peft does not know the head, and copies none.
        try:
            base: Any = get_peft_model(model, config).get_base_model()
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"peft refuses method {cell.method!r} for {type(model).__name__}: "
                f"{reason} Take another method, such as 'lora'"
            ) from error
    tuned: PreTrainedModel = base
    return tuned

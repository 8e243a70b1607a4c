"""Quantises the frozen linear layers of a backbone by the package that people use.

Which layers these are is decided by transformers, as in `from_pretrained` with a
`quantization_config`: all linear layers but the head of a language model. The new head
of a classifier, which is trained, is left out too. On a virtual GPU, whose layers have
no values, `meft_bench.virtual.emulation.quantised_layers` takes the place of this file.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from meft_bench.child.backbones.classifier import WEIGHTS_DTYPES, heads_of
from meft_bench.shared import quantisations
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import MissingError

BLOCK_SIZE = 64
"""Number of weights that share a scale in bitsandbytes' 4-bit formats."""
PACKED = torch.uint8
"""Dtype of a tensor with two weights of 4 bits in each element."""


def chosen_layers(model: PreTrainedModel, cell: Cell) -> dict[str, nn.Module]:
    """Return the layers whose weights transformers would quantise, by name.

    bitsandbytes takes GPT-2's transposed layers (`Conv1D`) too, torchao does not.

    Raises:
        ValueError: there is none.
    """
    left_out = HfQuantizer.get_modules_to_not_convert(
        model, keep_in_fp32_modules=[*(model._keep_in_fp32_modules or ())]
    )
    heads = {id(part) for head in heads_of(model) for part in head.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module, cell)
        and should_convert_module(name, left_out)
        and id(module) not in heads
    }
    if not found:
        raise ValueError(
            f"`weights_dtype` = {cell.weights_dtype!r}, but {cell.backbone} has no "
            f"linear layer that it applies to: take {cell.dtype!r}"
        )
    return found


def _is_linear(module: nn.Module, cell: Cell) -> bool:
    takes_transposed = cell.weights_dtype != "int8"
    return type(module) is nn.Linear or (
        takes_transposed and isinstance(module, Conv1D)
    )


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and of inputs of a layer."""
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def num_weights(model: nn.Module) -> int:
    """Return the number of parameters, each of two that are packed together."""
    return sum(p.numel() * (2 if p.dtype == PACKED else 1) for p in model.parameters())


def tensors_of(parameter: Any) -> list[Tensor]:
    """Return the tensors that hold a parameter: it, or the parts of a quantised one.

    Of one that is sharded over ranks, it is the part of this rank.
    """
    if hasattr(parameter, "to_local"):  # FSDP2's
        return [parameter.to_local()]
    if hasattr(parameter, "__tensor_flatten__"):  # torchao's
        names, _ = parameter.__tensor_flatten__()
        return [getattr(parameter, name) for name in names]
    found = [parameter]
    state = getattr(parameter, "quant_state", None)  # bitsandbytes'
    if state is not None:
        found += [state.absmax, state.code]
        if state.nested:
            found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def quantise(model: PreTrainedModel, cell: Cell) -> None:
    """Quantise the chosen layers of a model, in place.

    Raises:
        MissingError: the package that quantises is not installed.
        ValueError: the model has no layer to quantise.
    """
    package = quantisations.TABLE[cell.weights_dtype].package
    if importlib.util.find_spec(package) is None:
        raise MissingError(
            f"`weights_dtype` = {cell.weights_dtype!r} needs {package}, which is not "
            f"installed: pip install {package}, or plan the cell on a virtual GPU, "
            "which needs no quantiser"
        )
    layers = chosen_layers(model, cell)
    if package == "torchao":
        _by_torchao(model, layers)
    else:
        _by_bitsandbytes(model, layers, cell)


def _by_torchao(model: PreTrainedModel, layers: dict[str, nn.Module]) -> None:
    torchao: Any = importlib.import_module("torchao.quantization")
    config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    torchao.quantize_(model, config, filter_fn=lambda _, name: name in layers)


def _by_bitsandbytes(
    model: PreTrainedModel, layers: dict[str, nn.Module], cell: Cell
) -> None:
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    for name, layer in layers.items():
        outputs, inputs = shape_of(layer)
        with torch.device("meta"):
            made = bitsandbytes.nn.Linear4bit(
                inputs,
                outputs,
                bias=layer.bias is not None,
                compute_dtype=WEIGHTS_DTYPES[cell.dtype],
                compress_statistics=cell.weights_dtype == "nf4-double",
                quant_type="nf4",
            )
        weight: Any = layer.weight
        weight = weight.T if isinstance(layer, Conv1D) else weight
        options = {**vars(made.weight), "requires_grad": False}
        made.weight = bitsandbytes.nn.Params4bit(weight.detach(), **options).to(
            weight.device
        )
        made.bias = layer.bias
        made.requires_grad_(False)
        # Its format for inference on CPUs, into which it changes weights in evaluation,
        # cannot be trained with afterwards.
        made.support_avx512bf16_for_cpu = False
        model.set_submodule(name, made)
    # By this attribute of transformers, PEFT takes its own layer for 4-bit weights.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]

"""Virtual layers: linear layers with quantised weights that have no values.

    nf4          bitsandbytes.nn.Linear4bit
    nf4-double   the same, with double quantisation
    int8         torchao's Int8Tensor as the weight of nn.Linear

A virtual layer allocates what the Python code of bitsandbytes 0.50 for CUDA and of
torchao 0.18 allocates, in its order, and keeps for backward what that keeps; in place
of a kernel that writes a tensor, there is the tensor. Neither package has to be
installed. Not modelled is bitsandbytes' kernel for at most 1536 tokens that multiplies
without a weight in the compute dtype, which it takes for some shapes on some GPUs: the
weight is taken to be made in each forward, as it is for longer inputs and in each
backward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from meft_bench.child.backbones.quantised import (
    BLOCK_SIZE,
    PACKED,
    chosen_layers,
    num_weights,
    shape_of,
)
from meft_bench.shared import quantisations
from meft_bench.shared.cell import Cell

SCALES_OF_A_BLOCK = 256
"""Number of scales in 8 bits that share a scale, in double quantisation."""
NUM_CODES = 16
"""Number of values of 4 bits, a table of which each layer has."""
NUM_CODES_OF_SCALES = 256


def quantise(model: PreTrainedModel, cell: Cell) -> str:
    """Put virtual layers in place of the layers that transformers would quantise.

    Args:
        model: a model without values; changed in place.
        cell: the cell that the model is for.

    Returns:
        A sentence for the prediction: which weights are quantised, and how.

    Raises:
        ValueError: the model has no layer to quantise.
    """
    layers = chosen_layers(model, cell)
    num_quantised = 0
    for name, layer in layers.items():
        num_quantised += layer.weight.numel()  # type: ignore[operator]
        model.set_submodule(name, _virtual(layer, cell))
    way = quantisations.TABLE[cell.weights_dtype]
    share = num_quantised / num_weights(model)
    return (
        f"assumed: {len(layers)} linear layers with {share:.1%} of the weights are "
        f"{cell.weights_dtype} ({way.in_words}), the others {cell.unquantised_dtype}; "
        "that was not compared with a GPU"
    )


def _virtual(layer: nn.Module, cell: Cell) -> nn.Module:
    if cell.weights_dtype == "int8":
        return Int8Linear(layer)
    return Nf4Linear(layer, is_double=cell.weights_dtype == "nf4-double")


class QuantisedLinear(nn.Linear):
    """What both kinds have: the sizes, the bias, the quantised weight and scales."""

    scales: Tensor

    def __init__(self, layer: Any, weight: Tensor) -> None:
        # That of nn.Linear would allocate the weight that is replaced.
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape_of(layer)
        self.compute_dtype: torch.dtype = layer.weight.dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _add(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        tensor = self.weight.new_empty(shape, dtype=dtype)
        self.register_buffer(name, tensor, persistent=False)


class Nf4Linear(QuantisedLinear):
    """What `bitsandbytes.nn.Linear4bit` does with a weight in nf4."""

    offset: Tensor

    def __init__(self, layer: Any, *, is_double: bool) -> None:
        num_elements = layer.weight.numel()
        packed = layer.weight.new_empty(((num_elements + 1) // 2, 1), dtype=PACKED)
        super().__init__(layer, packed)
        self.is_double = is_double
        num_scales = -(-num_elements // BLOCK_SIZE)
        self._add("scales", num_scales, dtype=torch.uint8 if is_double else torch.float)
        self._add("codes", NUM_CODES)
        if is_double:
            self._add("scales_of_scales", -(-num_scales // SCALES_OF_A_BLOCK))
            self._add("codes_of_scales", NUM_CODES_OF_SCALES)
            self._add("offset")

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `... out_features` in the dtype of `x`."""
        if self.bias is not None and self.bias.requires_grad:
            raise NotImplementedError(
                "a trained bias of a quantised layer is not modelled: freeze it"
            )
        given = x.dtype
        product: Any = _Nf4Product.apply
        output: Tensor = product(x.to(self.compute_dtype), self)
        return output.to(given)

    def scales_in_float(self) -> Tensor:
        """Return the scales of the blocks as float32, in new memory where double."""
        if self.is_double:
            return self.scales.new_empty(self.scales.shape, dtype=torch.float32)
        return self.scales

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `out_features in_features` in new memory."""
        return self.weight.new_empty((self.out_features, self.in_features), dtype=dtype)


class _Nf4Product(torch.autograd.Function):
    """What `MatMul4Bit` does, which saves nothing and makes the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        scales = layer.scales_in_float()
        if layer.is_double:
            # Both exist until the product is there.
            _scales_with_offset = scales + layer.offset
        weight = layer.weight_in(x.dtype)
        return functional.linear(x, weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if not ctx.needs_input_grad[0]:
            return None, None
        layer: Nf4Linear = ctx.layer
        scales = layer.scales_in_float()
        if layer.is_double:
            scales += layer.offset
        weight = layer.weight_in(layer.compute_dtype)
        del scales
        return torch.matmul(gradient, weight.to(gradient.dtype)), None


class Int8Linear(QuantisedLinear):
    """What `nn.Linear` does with a weight of torchao in int8, a scale for each row.

    Its product is one of ordinary tensors, which autograd records: the weight in the
    dtype of the input is saved for backward.
    """

    def __init__(self, layer: Any) -> None:
        rows, columns = shape_of(layer)
        super().__init__(layer, layer.weight.new_empty(rows, columns, dtype=torch.int8))
        self._add("scales", rows, 1)
        self._add("zero_points", rows, 1, dtype=torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `... out_features` in the dtype of `x`."""
        product = torch.mm(x.reshape(-1, self.in_features), self.weight.t().to(x.dtype))
        output = product * self.scales.to(product.dtype).flatten()
        output = output.reshape(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            output += self.bias
        return output.to(x.dtype)

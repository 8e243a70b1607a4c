"""Weights through which no gradient flows, which no adapter below them could train."""

from torch import nn

from meft.errors import UnsupportedModelError

INT4 = "Int4"
"""Beginning of torchao's types of 4-bit weights (torchao 0.18).

Their product is an operator without a derivative: its output requires no gradient,
whatever its input does, and no error says so.
"""


def refuse_without_derivative(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for weights whose layers pass on no gradient.

    Args:
        model: a model before its conversion.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter)
        library = kind.__module__.partition(".")[0]
        if library == "torchao" and kind.__name__.startswith(INT4):
            raise UnsupportedModelError(
                f"`{name}` is a {kind.__name__} of torchao, whose layers pass no "
                "gradient on to their input, so that nothing below them would learn. "
                "For 4 bits, load the model with "
                '`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")`; '
                "for 8 bits, with torchao's `Int8WeightOnlyConfig`. Its "
                "`IntxWeightOnlyConfig` trains with weights of 4 bits, too, of which "
                "each takes a byte"
            )

"""Ways of quantising the frozen weights of a backbone, by their `weights_dtype`.

    nf4         4 bits for a weight, a float32 scale for each 64 of them (bitsandbytes)
    nf4-double  the same, with the scales in 8 bits: double quantisation, as in QLoRA
    int8        8 bits for a weight, a float32 scale for each row (torchao)

They apply to the linear layers that transformers would quantise; all other parameters
of the backbone are of the compute dtype.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation:
    """One way of quantising weights."""

    package: str
    """The distribution that quantises real weights; a virtual GPU needs none."""
    in_words: str
    """What transformers calls it, for the prediction of a record."""


TABLE = {
    "nf4": Quantisation(
        package="bitsandbytes",
        in_words="BitsAndBytesConfig, nf4 without double quantisation",
    ),
    "nf4-double": Quantisation(
        package="bitsandbytes",
        in_words="BitsAndBytesConfig, nf4 with double quantisation",
    ),
    "int8": Quantisation(
        package="torchao",
        in_words="TorchAoConfig, Int8WeightOnlyConfig",
    ),
}
"""Every way by name."""

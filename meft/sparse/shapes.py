"""Names for the shapes of tensors with rows."""

from jaxtyping import Float, Int
from torch import Tensor

AllRows = Float[Tensor, "rows width"]
SomeRows = Float[Tensor, "some width"]
Ids = Int[Tensor, " some"]
"""Indices of rows."""
Steps = Int[Tensor, " rows"]
"""A step of the optimizer per row."""

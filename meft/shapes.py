"""Named shape types: `batch` rows of `seq` tokens, `hidden` the backbone's width."""

from jaxtyping import Float
from torch import Tensor

Hidden = Float[Tensor, "batch seq hidden"]

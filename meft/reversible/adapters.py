"""`Adapters`: the adapters of all blocks of a stack, with the config they belong to."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from meft import extra_state


class Adapters(nn.ModuleDict):
    """Hold the adapters of each block from `span[0]` up, keyed by the block's number.

    Its `state_dict()` has the config as an entry (`meft.extra_state`).

    Args:
        function: the fields that define the function of the stack.
    """

    def __init__(self, function: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function

    def get_extra_state(self) -> Tensor:
        """Return the config as a tensor."""
        return extra_state.to_tensor(self.function)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise an error if a saved model has another config.

        Raises:
            AdapterFileError: the saved model computes another function.
        """
        extra_state.refuse_other(state, self.function)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Load without reporting a config that is missing in `state_dict`."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        extra_state.forgive_missing(prefix, missing_keys)

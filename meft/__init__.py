"""Memory-efficient fine-tuning of transformers.

The names listed here are public; everything else may change. `meft.testing` contains
checks for users.
"""

from importlib.metadata import PackageNotFoundError, version

from meft import testing
from meft.backbone.layout import Half
from meft.backbone.unlisted import register_family
from meft.checkpoint.load import load_adapters
from meft.checkpoint.save import save_adapters
from meft.chunked_loss import chunk_loss, unchunk_loss
from meft.convert import (
    add_sparse_adapters,
    disable_adapter,
    make_reversible,
    print_trainable_parameters,
    remove_adapters,
)
from meft.errors import (
    AdapterFileError,
    ConfigError,
    FrozenWarning,
    HostMemoryError,
    LostGradientWarning,
    MeftError,
    MismatchWarning,
    ReconstructionError,
    SavingWarning,
    UnsupportedCallError,
    UnsupportedModelError,
)
from meft.reversible.config import ReversibleConfig
from meft.sparse.config import SparseConfig
from meft.sparse.optimizer import SparseAdamW, optimizer_cls_and_kwargs
from meft.sparse.ranks import average_row_gradients, divide_rows, gathered_rows
from meft.sparse.trainer_saves import gather_for_trainer

try:
    __version__ = version("meft")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "FrozenWarning",
    "Half",
    "HostMemoryError",
    "LostGradientWarning",
    "MeftError",
    "MismatchWarning",
    "ReconstructionError",
    "ReversibleConfig",
    "SavingWarning",
    "SparseAdamW",
    "SparseConfig",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "__version__",
    "add_sparse_adapters",
    "average_row_gradients",
    "chunk_loss",
    "disable_adapter",
    "divide_rows",
    "gather_for_trainer",
    "gathered_rows",
    "load_adapters",
    "make_reversible",
    "optimizer_cls_and_kwargs",
    "print_trainable_parameters",
    "register_family",
    "remove_adapters",
    "save_adapters",
    "testing",
    "unchunk_loss",
]

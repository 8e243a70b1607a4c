"""The exceptions and warnings of this library.

MeftError
├── ConfigError (ValueError)              a config holds an illegal value
├── UnsupportedModelError (TypeError)     this model cannot be converted
├── UnsupportedCallError (RuntimeError)   a converted model cannot do that
├── ReconstructionError (RuntimeError)    a rebuilt activation is not the true one
├── AdapterFileError (ValueError)         saved adapters do not fit this model
└── HostMemoryError (MemoryError)         rows would not fit into host memory

LostGradientWarning (UserWarning)         an inexact inverse makes gradients wrong
MismatchWarning (UserWarning)             a step was skipped or redone, see its text
FrozenWarning (UserWarning)               what is usually trained is frozen
SavingWarning (UserWarning)               a saved model needs `meft.load_adapters`
"""


class MeftError(Exception):
    """Base class of all exceptions that this library raises."""


class ConfigError(MeftError, ValueError):
    """A config contains an illegal value."""


class UnsupportedModelError(MeftError, TypeError):
    """The model cannot be converted; the message lists the supported models."""


class UnsupportedCallError(MeftError, RuntimeError):
    """A call of a converted model requests something that is not supported."""


class ReconstructionError(MeftError, RuntimeError):
    """A rebuilt activation differs from that of the forward."""


class AdapterFileError(MeftError, ValueError):
    """Saved adapters are missing, damaged, or belong to another backbone or config."""


class HostMemoryError(MeftError, MemoryError):
    """Rows of sparse adapters would not fit into host memory; nothing was allocated."""


class MismatchWarning(UserWarning):
    """A rebuilt activation was wrong, and the step was skipped or computed again."""


class LostGradientWarning(UserWarning):
    """Rebuilt activations are so inexact that gradients have errors above 1%."""


class FrozenWarning(UserWarning):
    """Adapters or a task head are frozen, possibly by another library."""


class SavingWarning(UserWarning):
    """`from_pretrained` alone does not restore the saved model."""

"""Our exceptions and warnings.

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
    """Base of every exception this library raises on purpose."""


class ConfigError(MeftError, ValueError):
    """A config holds an illegal value."""


class UnsupportedModelError(MeftError, TypeError):
    """This model cannot be converted; the message lists what can."""


class UnsupportedCallError(MeftError, RuntimeError):
    """A converted model was asked for something a reversible stack cannot give."""


class ReconstructionError(MeftError, RuntimeError):
    """A rebuilt activation is not the one that the forward saw."""


class AdapterFileError(MeftError, ValueError):
    """Saved adapters are missing, damaged, or of another backbone or config."""


class HostMemoryError(MeftError, MemoryError):
    """Rows of sparse adapters would not fit into host memory; nothing was allocated."""


class MismatchWarning(UserWarning):
    """A rebuilt activation was not the true one, and the step was skipped or redone."""


class LostGradientWarning(UserWarning):
    """Rebuilt activations are so inexact that gradients are wrong by more than 1%."""


class FrozenWarning(UserWarning):
    """Adapters or a task head are frozen, possibly by another library."""


class SavingWarning(UserWarning):
    """`from_pretrained` alone does not restore what was saved."""

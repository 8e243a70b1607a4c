"""Our exceptions and warnings.

MeftError
├── ConfigError (ValueError)              a config holds an illegal value
├── UnsupportedModelError (TypeError)     this model cannot be converted
├── UnsupportedCallError (RuntimeError)   a converted model cannot do that
└── AdapterFileError (ValueError)         saved adapters do not fit this model

LostGradientWarning (UserWarning)         the inverse is too inexact to train on
"""


class MeftError(Exception):
    """Base of every exception this library raises on purpose."""


class ConfigError(MeftError, ValueError):
    """A config holds an illegal value."""


class UnsupportedModelError(MeftError, TypeError):
    """This model cannot be converted; the message lists what can."""


class UnsupportedCallError(MeftError, RuntimeError):
    """A converted model was asked for something a reversible stack cannot give."""


class AdapterFileError(MeftError, ValueError):
    """Saved adapters are missing, damaged, or belong to another backbone."""


class LostGradientWarning(UserWarning):
    """Rebuilt activations are so inexact that some blocks would train on noise."""

"""Which methods are held against which at equal memory: MEFT's against all others.

Two settings have *equal memory* if one takes at most `MARGIN` times the peak of the
other. The best rival of a setting is the one with the highest mean score of those that
take no more memory, up to this margin. It is chosen by the scores that it is compared
with, which favors rivals a little.
"""

from meft_reports.methods import is_meft, is_sparse, is_stored

MARGIN = 1.05


def is_held_against(method: str) -> bool:
    """Return whether a method is one of MEFT's, which is compared with its rivals."""
    return (is_meft(method) or is_sparse(method)) and not is_stored(method)


def is_rival(method: str) -> bool:
    """Return whether a method is not of MEFT."""
    return not is_meft(method) and not is_sparse(method)


def has_equal_memory(rival_bytes: float, own_bytes: float) -> bool:
    """Return whether a rival takes no more memory, up to the margin."""
    return rival_bytes <= MARGIN * own_bytes

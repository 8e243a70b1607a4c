import copy
import pickle
import threading

import pytest

from meft.host_memory import available_bytes
from meft.replaceable import Replaceable
from meft.sparse.adam_on import adam_on


@Replaceable
def double(number: int) -> int:
    """Return twice the number."""
    return 2 * number


def test_a_replacement_ends_with_its_context() -> None:
    """Also if the body raises; `plain` is the function of the library throughout."""
    with double.replaced(lambda number: -number):
        assert double(3) == -3
        assert double.plain(3) == 6
    assert double(3) == 6
    with pytest.raises(ZeroDivisionError), double.replaced(lambda number: number // 0):
        double(3)
    assert double(3) == 6
    assert double.__doc__ == "Return twice the number."


def test_a_replacement_applies_to_all_threads() -> None:
    """Autograd runs backward passes of a GPU in threads of its own."""
    found = []
    with double.replaced(lambda number: -number):
        thread = threading.Thread(target=lambda: found.append(double(3)))
        thread.start()
        thread.join()
    assert found == [-3]


def test_replacements_may_be_nested() -> None:
    """The inner one ends first."""
    with double.replaced(lambda number: 0):
        with double.replaced(lambda number: 1):
            assert double(3) == 1
        assert double(3) == 0


def test_copies_and_pickles_are_the_same_object() -> None:
    """As of functions, by name; a replacement therefore applies to them too."""
    for function in (double, available_bytes, adam_on):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.copy(function) is function
        assert copy.deepcopy({"inside": function})["inside"] is function

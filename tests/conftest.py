"""What every test shares: the seed, the two markers, and where real data may lie."""

import gc
import os
import sys
from pathlib import Path

import pytest

# Some tests limit the size of files, and Python does not notice that a file of compiled
# code which it writes meanwhile is cut.
sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
# Output that is not buffered cannot fail when Python ends, as it does for users.
os.environ.pop("PYTHONUNBUFFERED", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    slow = pytest.mark.skip(reason="slow: run with --slow")
    gpu = pytest.mark.skip(reason="gpu: no CUDA device here")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not _has_cuda():
            item.add_marker(gpu)


def pytest_collection_finish() -> None:
    """What libraries made stays; each look at it would take half a second."""
    gc.collect()
    gc.freeze()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def data_dir() -> Path:
    """Real data sets: `$MEFT_DATA_DIR`, or `shared/data` next to the checkout."""
    next_to_checkout = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("MEFT_DATA_DIR", next_to_checkout))
    if not path.is_dir():
        pytest.skip(f"no data directory at {path}; set MEFT_DATA_DIR")
    return path

"""The JavaScript libraries of the page, and how large parts are stored in it.

Both libraries come with packages of Python, each with its JavaScript inside:

    itables            DataTables: the table of all cells
    vl-convert-python  Vega, Vega-Lite and vega-embed: the figures

Large parts are compressed and encoded as text, so that a page needs no other file. The
page decompresses them by `DecompressionStream`, which every current browser has.
"""

import base64
import contextlib
import functools
import gzip
import importlib.metadata
import importlib.util
import os
import zlib
from pathlib import Path

from meft_reports.errors import ReportError
from meft_reports.files import write_atomically

_VEGA_ENTRY = "export default vegaEmbed;"


class PageExtraMissing(ReportError):
    """Raised where the libraries of the page are not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"the page needs the package {package}; install it with "
            "pip install 'meft[page]'"
        )


def packed(content: bytes) -> str:
    """Return content compressed, as text; the same content gives the same text."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


@functools.cache
def vega() -> str:
    """Return the packed module of Vega, whose default export is `vegaEmbed`.

    To bundle it takes a second or two, so the result is kept in the user's folder of
    caches, by the version of the package.

    Raises:
        PageExtraMissing: vl-convert-python is not installed.
    """
    try:
        version = importlib.metadata.version("vl-convert-python")
        import vl_convert
    except ModuleNotFoundError as error:  # PackageNotFoundError is one
        raise PageExtraMissing("vl-convert-python") from error
    cached = _cache_folder() / f"vega-{version}.txt"
    if (text := _cached(cached)) is not None:
        return text
    text = packed(vl_convert.javascript_bundle(_VEGA_ENTRY).encode())
    with contextlib.suppress(OSError, ReportError):  # it is made again next time
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, text.encode())
    return text


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "meft"


def _cached(path: Path) -> str | None:
    """Return the packed text of a file of the cache; None if it is not whole."""
    try:
        text = path.read_text("ascii")
        gzip.decompress(base64.b64decode(text, validate=True))
    except (OSError, ValueError, EOFError, zlib.error):
        return None
    return text


@functools.cache
def datatables() -> str:
    """Return the packed module of DataTables.

    Raises:
        PageExtraMissing: itables is not installed.
    """
    return packed(_itables("dt_bundle.js").encode())


@functools.cache
def datatables_css() -> str:
    """Return the style sheet of DataTables, whose images are inside.

    Raises:
        PageExtraMissing: itables is not installed.
    """
    return _itables("dt_bundle.css")


def _itables(name: str) -> str:
    spec = importlib.util.find_spec("itables")
    if spec is None or spec.origin is None:
        raise PageExtraMissing("itables")
    path = Path(spec.origin).parent / "html" / name
    return path.read_text(encoding="utf-8")

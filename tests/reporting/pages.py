"""What a page holds, unpacked as a browser unpacks it."""

import base64
import gzip
import json
import re
from typing import Any

import pandas as pd

from meft_reports.page import render_page


def page_of(frame: pd.DataFrame, **given: Any) -> str:
    """The page of a frame as text."""
    return render_page(frame, **given).decode()


def unpacked(page: str, name: str) -> bytes:
    """The content of a compressed part of the page: `data`, `vega`, `datatables`."""
    found = re.search(
        rf'<script type="application/gzip" id="{name}">([^<]*)</script>', page
    )
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1]))


def data_of(page: str) -> Any:
    """The data of the page."""
    return json.loads(unpacked(page, "data"))


def column(table: Any, name: str) -> list[Any]:
    """The values of a column of an encoded table."""
    its = table["columns"].get(name)
    if its is None:
        return [None] * table["rows"]
    if "values" in its:
        return list(its["values"])
    return [None if place is None else its["words"][place] for place in its["at"]]


def before_figures(page: str) -> str:
    """The part of the page above the first figure, without its style sheet."""
    return page.partition("<body>")[2].partition('<div id="figures">')[0]


def as_text(markup: str) -> str:
    """A piece of HTML without its tags."""
    return re.sub(r"<[^>]*>", "", markup)

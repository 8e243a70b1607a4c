"""The page as bytes: a template, rows, and the library of the table."""

import base64
import hashlib
from importlib import resources

import jinja2
from markupsafe import Markup

from meft_reports.compare import Comparison
from meft_reports.compare_page.rows import cause_in_words, row_of, summary_of
from meft_reports.compare_text import NOT_PAIRED, refusal_in_words
from meft_reports.page import bundle
from meft_reports.text import printable

MOST_ROWS = 2_000
"""Number of differences in a table; the text of `compare --all` has all of them."""


def render_page(comparison: Comparison, names: tuple[str, str]) -> bytes:
    """Return the page of a comparison, as UTF-8.

    Args:
        comparison: two runs side by side.
        names: names of the two runs.

    Raises:
        PageExtraMissing: a library of the page is not installed.
    """
    script = _text("page/js/load.js") + _text("compare_page/page.js")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["printable"] = printable
    its = comparison
    parts = [
        (title, id_, [row_of(one) for one in some[:MOST_ROWS]], len(some))
        for title, id_, some in (
            ("Worse", "worse", its.worse),
            ("Better", "better", its.better),
        )
    ]
    folded = [
        ("Cells without a difference", its.same),
        ("Cells that only the first run has", its.only_before),
        ("Cells that only the second run has", its.only_after),
    ]
    page = environment.from_string(_text("compare_page/page.html.j2")).render(
        title=f"{printable(names[0])} → {printable(names[1])}",
        runs=(("A", names[0], its.before), ("B", names[1], its.after)),
        summary=summary_of(its),
        is_paired=its.num_pairs > 0,
        not_paired=NOT_PAIRED,
        causes=[(one, cause_in_words(one, its.num_pairs)) for one in its.causes],
        refusals=[*map(refusal_in_words, its.not_compared)],
        endings=its.endings,
        parts=parts,
        means=its.means,
        folded=folded,
        style=Markup(_style()),
        script=Markup(script),
        script_digest=_digest(script),
        datatables=Markup(bundle.datatables()),
    )
    return page.encode()


def _style() -> str:
    style = _text("page/page.css").replace("/*light*/", "").replace("/*dark*/", "")
    own = _text("compare_page/page.css")
    return f"@layer datatables {{{bundle.datatables_css()}}}\n{style}{own}"


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return base64.b64encode(digest).decode()


def _text(name: str) -> str:
    return resources.files("meft_reports").joinpath(name).read_text("utf-8")

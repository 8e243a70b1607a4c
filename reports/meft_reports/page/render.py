"""The page as bytes: a template, the data and the libraries."""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources

import jinja2
import pandas as pd
from markupsafe import Markup

from meft_reports.breakdown import Breakdown
from meft_reports.columns import COLUMNS
from meft_reports.columns.cell import STATUSES
from meft_reports.format import format_score
from meft_reports.page import bundle
from meft_reports.page.answers import answers_of
from meft_reports.page.caveats import caveats_of
from meft_reports.page.cells import Cell, all_cells, comparable_cells
from meft_reports.page.data import data_of, memory_text
from meft_reports.page.looks import ordered, variables
from meft_reports.page.origins import origins_of
from meft_reports.page.pairs import pairs_of
from meft_reports.page.papers import reported
from meft_reports.page.payload import to_bytes
from meft_reports.page.reading import differences_that_count, example_cell
from meft_reports.page.searches import searches_of
from meft_reports.page.settings import Setting, settings_of
from meft_reports.page.timeline import Timeline
from meft_reports.published import Number
from meft_reports.searches import found_nothing
from meft_reports.text import plural

SCRIPTS = (
    *("load", "base", "choice", "rows", "keys", "draw", "cell", "table", "main"),
)
"""The page's own scripts, in order; together they are one module."""
NOTHING_FITS = "in which nothing fits"
ENDS = (*STATUSES, NOTHING_FITS)
"""How cells can end, in the words and in the order of the page."""
MOST_PLAIN_ROWS = 200
"""Number of settings in the table for readers without JavaScript."""


def render_page(
    frame: pd.DataFrame,
    question: str | None = None,
    breakdowns: Mapping[str, Breakdown] | None = None,
    timelines: Sequence[Timeline] = (),
    published: Sequence[Number] = (),
) -> bytes:
    """Return the page of the records in `frame`, as UTF-8.

    Args:
        frame: rows of `read_frame`.
        question: what the run answers; by default what its records say.
        breakdowns: what the peak of a cell consists of, by `cell_id`.
        timelines: memory over one step of some methods.
        published: numbers that others measured, with predictions.

    Raises:
        PageExtraMissing: a library of the page is not installed.
    """
    cells = all_cells(frame)
    settings = settings_of(comparable_cells(frame))
    pairs = pairs_of(settings)
    caveats = caveats_of(cells, settings)
    searches = searches_of(frame)
    methods = ordered(cell["method"] for cell in cells)
    data = data_of(
        frame,
        cells,
        settings,
        pairs,
        caveats,
        breakdowns or {},
        timelines,
        published,
        searches,
    )
    script = "".join(_text(f"js/{name}.js") for name in SCRIPTS)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.from_string(_text("page.html.j2")).render(
        title=question or _question(cells),
        facts=_facts(cells),
        num_cells=plural(len(cells), "cell"),
        answers=answers_of(settings, pairs, searches),
        caveats=caveats,
        differences=differences_that_count(settings, pairs),
        example=example_cell(settings),
        origins=origins_of(cells),
        papers=reported(settings),
        plain=_plain(settings),
        num_settings=len(settings),
        columns=COLUMNS,
        style=Markup(_style(methods)),
        script=Markup(script),
        script_digest=_digest(script),
        data=Markup(bundle.packed(to_bytes(data))),
        vega=Markup(bundle.vega()),
        datatables=Markup(bundle.datatables()),
    )
    return page.encode()


def _question(cells: Sequence[Cell]) -> str:
    """Return what the records say; the names of the sweeps if they do not."""
    questions = sorted({c["sweep_question"] for c in cells if c["sweep_question"]})
    return " ".join(questions) or " · ".join(sorted({cell["sweep"] for cell in cells}))


def _facts(cells: Sequence[Cell]) -> list[str]:
    ends = Counter(map(_ending, cells))
    days = sorted(cell["started_at"][:10] for cell in cells)
    devices = sorted({cell["device_name"] or cell["device"] for cell in cells})
    by_status = ", ".join(f"{ends[end]:,} {end}" for end in ENDS if ends[end])
    return [
        ", ".join(sorted({cell["sweep"] for cell in cells})),
        f"{len(cells):,} cells: {by_status}",
        ", ".join(devices),
        days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}",
    ]


def _ending(cell: Cell) -> str:
    nothing = found_nothing(cell["sweep"], cell["status"])
    return NOTHING_FITS if nothing else str(cell["status"])


def _plain(settings: Sequence[Setting]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for setting in settings[:MOST_PLAIN_ROWS]:
        score = setting.numbers["score"]
        rows.append(
            (
                setting.name,
                setting.workload.title,
                str(len(setting.ok)),
                format_score(score),
                memory_text(setting),
            )
        )
    return rows


def _style(methods: Sequence[str]) -> str:
    style = _text("page.css")
    light, dark = (variables(methods, dark) for dark in (False, True))
    style = style.replace("/*light*/", light).replace("/*dark*/", dark)
    return f"@layer datatables {{{bundle.datatables_css()}}}\n{style}"


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return base64.b64encode(digest).decode()


def _text(name: str) -> str:
    return resources.files("meft_reports").joinpath(f"page/{name}").read_text("utf-8")

"""One self-contained HTML page about a run: its answer, its figures, all of its cells.

Reading order:

    cells, workloads, settings     what is compared with what; `oom` reads messages
    pairs                          paired differences, with intervals
    answers                        sentences: `score_answers`, `memory_answers`,
                                   `card_answers`, `step_answers`, `predictions`
    reading                        which differences count; a cell to open first
    caveats, origins               what to distrust; where the numbers come from
    papers                         what a paper reports of the same methods
    figures/                       one kind of figure per file, as data
    timeline                       memory over one step, from a file of moments
    opening, looks                 what the page opens with; colors of methods
    payload, bundle                how data and libraries are stored in the page
    data, render                   all data; the page itself, with `page.html.j2`
    js/                            what the browser does with it

The same records give the same bytes, whatever their order, so that a page can be
committed and compared.
"""

from meft_reports.page.render import render_page

__all__ = ["render_page"]

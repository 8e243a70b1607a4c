"""One self-contained HTML page about a run: its answer, its figures, all of its cells.

Reading order:

    cells, workloads, settings, pairs     what is compared with what
    answers, caveats                      sentences, by rules
    figures/                              one kind of figure per file, as data
    payload, bundle                       how data and libraries are stored in the page
    render                                the page itself, with `page.html.j2`
    js/                                   what the browser does with it

The same records give the same bytes, whatever their order, so that a page can be
committed and compared.
"""

from meft_reports.page.render import render_page

__all__ = ["render_page"]

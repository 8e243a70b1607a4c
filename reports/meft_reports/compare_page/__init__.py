"""One self-contained HTML page of two runs side by side.

    rows      a comparison as rows of text
    render    the page, with `page.html.j2`, `page.css` and `page.js`

It has the look of `meft_reports.page`, whose style sheet and libraries it uses. The
same records give the same bytes.
"""

from meft_reports.compare_page.render import render_page

__all__ = ["render_page"]

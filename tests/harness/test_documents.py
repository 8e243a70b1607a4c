"""Every document is rendered as it is meant to be, on GitHub and on the site.

Parsers of Markdown report no errors: a table with a blank line in it becomes a table
and a paragraph full of bars, a row with one cell too many loses it, and a word in angle
brackets vanishes.
"""

import itertools
import re
from urllib.parse import urlsplit

import pytest
from markdown_it.rules_block.table import escapedSplit

from harness import markdown
from harness.texts import ROOT, tracked

every_document = pytest.mark.parametrize(
    "place", sorted(name for name in tracked() if name.endswith(".md"))
)


def cells(row: str) -> int:
    """The number of cells in a row of a table."""
    row = row.strip().removeprefix("|")
    if row.endswith("|") and not row.endswith("\\|"):
        row = row[:-1]
    return len(escapedSplit(row))


@every_document
def test_tables_have_rows_of_equally_many_cells(place: str) -> None:
    """As many as the header has; a row that lacks bars would be shown padded."""
    lines = markdown.lines(place)
    broken = []
    for table in markdown.parse(place):
        if table.type != "table_open":
            continue
        assert table.map is not None
        first, end = table.map
        width = cells(lines[first])
        broken += [
            f"line {index + 1}: {lines[index]}"
            for index in range(first, end)
            if cells(lines[index]) != width or not lines[index].lstrip().startswith("|")
        ]
    assert broken == []


@every_document
def test_no_table_is_shown_as_text(place: str) -> None:
    """A header without a separator, or rows behind a blank line, are no table."""
    broken = [
        text.content
        for block, text in itertools.pairwise(markdown.parse(place))
        if block.type == "paragraph_open"
        and re.search(r"^\|", text.content, re.MULTILINE)
    ]
    assert broken == []


@pytest.mark.parametrize(
    "place", sorted(name for name in tracked() if re.fullmatch(r"docs/.*\.md", name))
)
def test_tables_and_lists_of_the_site_follow_a_blank_line(place: str) -> None:
    """Python-Markdown, which makes the site, takes them for text otherwise."""
    lines = markdown.lines(place)
    kinds = {"table_open", "bullet_list_open", "ordered_list_open"}
    starts = [
        token.map[0]
        for token in markdown.parse(place)
        if token.type in kinds and token.level == 0 and token.map is not None
    ]
    assert [f"line {n + 1}" for n in starts if n and lines[n - 1].strip()] == []


@every_document
def test_headings_are_in_order(place: str) -> None:
    """One title at the top, and below it no level without the level above."""
    levels = [level for level, _ in markdown.headings(place)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    for above, below in itertools.pairwise(levels):
        assert below <= above + 1


@every_document
def test_code_ends_where_its_fence_does(place: str) -> None:
    """A fence that is never closed makes the rest of a document code."""
    lines = markdown.lines(place)
    for token in markdown.parse(place):
        if token.type == "fence":
            assert token.map is not None
            assert lines[token.map[1] - 1].strip() == token.markup, token.map


@every_document
def test_nothing_is_lost_or_left_as_markup(place: str) -> None:
    """A word in angle brackets is HTML, which is not shown; brackets of a link that is
    not one are shown."""
    broken = [
        f"line {line}: {part.content}"
        for line, part in markdown.parts(place)
        if part.type == "html_inline"
        or (part.type == "text" and re.search(r"\]\(|\]\[|\*\*|``", part.content))
    ]
    blocks = [t.content for t in markdown.parse(place) if t.type == "html_block"]
    assert broken == []
    assert [block for block in blocks if not block.startswith("<!--")] == []


@every_document
def test_every_link_leads_somewhere(place: str) -> None:
    """From where the document is, to a file, and there to a heading."""
    broken = []
    for line, part in markdown.parts(place):
        if part.type == "link_open":
            link = str(part.attrs["href"])
            if (problem := _problem(place, link)) is not None:
                broken.append(f"line {line}: {link}: {problem}")
    assert broken == []


def _problem(place: str, link: str) -> str | None:
    """What is wrong with a link; of those to elsewhere only the form is examined."""
    address = urlsplit(link)
    if address.scheme or address.netloc:
        is_right = address.scheme == "https" and "." in address.netloc
        return None if is_right else "is no address of the web"
    here = ROOT / place
    target = (here.parent / address.path).resolve() if address.path else here
    if not target.exists():
        return "no such file"
    if markdown.is_on_the_site(here) and not markdown.is_on_the_site(target):
        return "is not on the site"
    if not address.fragment:
        return None
    document = str(target.relative_to(ROOT))
    if address.fragment not in markdown.anchors(document, markdown.github_slug, "-"):
        return "no such heading on GitHub"
    if markdown.is_on_the_site(target):
        if address.fragment not in markdown.anchors(document, markdown.site_slug, "_"):
            return "no such heading on the site"
    return None


@every_document
def test_every_image_is_there(place: str) -> None:
    """A file of the repository, which is described for those who do not see it."""
    for line, part in markdown.parts(place):
        if part.type == "image":
            path = (ROOT / place).parent / str(part.attrs["src"])
            assert str(path.resolve().relative_to(ROOT)) in tracked(), line
            assert part.content, line


@every_document
def test_what_is_referred_to_by_its_title_exists(place: str) -> None:
    """`see "A title"`: a heading or bold text of the same document, or of one that the
    same paragraph names."""
    broken = []
    for token in markdown.parse(place):
        if token.type != "inline":
            continue
        text = markdown.plain(token)
        for title in re.findall(r'\bsee (?:the )?["“]([^"”]+)["”]', text):
            named = [place, *(n for n in tracked() if n.endswith(".md") and n in text)]
            if not any(_has_title(document, title) for document in named):
                broken.append(title)
    assert broken == []


def _has_title(place: str, title: str) -> bool:
    titles = [text for _, text in markdown.headings(place)] + markdown.bold(place)
    return title.lower() in {text.strip(".:?").lower() for text in titles}


@pytest.mark.parametrize(
    ("heading", "github", "site"),
    [
        ("Hooks and compilation", "hooks-and-compilation", "hooks-and-compilation"),
        ("`fixed`, or float?", "fixed-or-float", "fixed-or-float"),
        ("Memory & time", "memory--time", "memory-time"),
        ("λ and β_1", "λ-and-β_1", "and-_1"),
    ],
)
def test_anchors_follow_the_rules(heading: str, github: str, site: str) -> None:
    """GitHub keeps letters of every alphabet and each space; the site does not."""
    text = heading.replace("`", "")
    assert markdown.github_slug(text) == github
    assert markdown.site_slug(text) == site

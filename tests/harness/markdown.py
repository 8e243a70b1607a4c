"""A document as GitHub and the site of the documentation render it."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from harness.texts import ROOT

Slug = Callable[[str], str]


@functools.cache
def parse(place: str) -> list[Token]:
    """The blocks of a document; the children of an `inline` are its parts.

    Args:
        place: path of the document in the repository.
    """
    parser = MarkdownIt("commonmark").enable("table")
    return parser.parse((ROOT / place).read_text())


def lines(place: str) -> list[str]:
    """The source of a document, line by line."""
    return (ROOT / place).read_text().splitlines()


def parts(place: str) -> Iterator[tuple[int, Token]]:
    """Texts, code, links and images, with the number of the line of their block."""
    for token in parse(place):
        for part in token.children or ():
            assert token.map is not None
            yield token.map[0] + 1, part


def headings(place: str) -> list[tuple[int, str]]:
    """Levels and texts of the headings, without markup."""
    tokens = parse(place)
    return [
        (int(token.tag[1:]), plain(tokens[index + 1]))
        for index, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def plain(inline: Token) -> str:
    """The text that readers see, in one line."""
    shown = {"text", "code_inline"}
    return "".join(
        " " if part.type == "softbreak" else part.content
        for part in inline.children or ()
        if part.type in shown | {"softbreak"}
    )


def bold(place: str) -> list[str]:
    """Texts in bold, some of which begin a paragraph in the place of a heading."""
    found = []
    for token in parse(place):
        children = token.children or []
        for index, part in enumerate(children):
            if part.type == "strong_open":
                found.append(children[index + 1].content)
    return found


def github_slug(heading: str) -> str:
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_slug(heading: str) -> str:
    """The anchor of a heading on the site, by Python-Markdown's `toc.slugify`."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore")
    words = re.sub(r"[^\w\s-]", "", ascii_only.decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def anchors(place: str, slug: Slug, separator: str) -> set[str]:
    """The anchors of a document.

    Args:
        place: path of the document in the repository.
        slug: gives the anchor of a heading.
        separator: stands between the anchor of a heading that occurs more than once
            and the number of the occurrence.
    """
    seen: Counter[str] = Counter()
    found = set()
    for _, heading in headings(place):
        name = slug(heading)
        found.add(f"{name}{separator}{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def is_on_the_site(path: Path) -> bool:
    """Whether the site of the documentation has this file, which lies in `docs`."""
    return path.is_relative_to(ROOT / "docs")

"""The page docs/tasks.md, written from the facts of all tasks.

`python -m meft_bench.shared.tasks.document docs/tasks.md` writes it.
"""

import sys
from pathlib import Path

from meft_bench.shared.tasks import TABLE
from meft_bench.shared.tasks.facts import (
    IMAGES,
    LABELS,
    NUMBER,
    OPTIONS,
    RECALL,
    WORDS,
    DataFiles,
    Facts,
    FromSeed,
    Hub,
    Way,
)

_BEGIN = """# Tasks

Each task with rows is one file of facts in `benchmarks/meft_bench/shared/tasks`, from
which this page is written. What the values of a metric mean is in
[numbers.md](numbers.md). The first way that is available is taken, and `data_origin` of
a record says which, with the sha256 of each file or the revision of the repository.
`--data DIR` names the directory of the files, each plain or .gz; a repository of the
Hugging Face hub is read with `--allow-download` only.
"""
_TITLES = {
    LABELS: "Classes of texts",
    NUMBER: "Numbers of texts",
    OPTIONS: "Options, by their likelihood",
    WORDS: "Answers in words",
    RECALL: "Random tokens, by heart",
    IMAGES: "Classes of images",
}


def page() -> str:
    """Return the page, in Markdown."""
    parts = [_BEGIN]
    for kind, title in _TITLES.items():
        parts.append(f"## {title}\n")
        parts += [_section(facts) for facts in TABLE.values() if facts.kind == kind]
    return "\n".join(parts)


def _section(facts: Facts) -> str:
    lines = [
        f"### `{facts.name}`",
        "",
        f"{facts.title}: {facts.asks}.",
        "",
        f"- metric: `{facts.metric}`; {facts.protocol}",
    ]
    if facts.prompt:
        prompt = facts.prompt.replace("\n", "\\n")
        lines.append(f"- prompt: `{prompt}`")
    if facts.max_new_tokens:
        lines.append(f"- longest answer: {facts.max_new_tokens} tokens")
    if facts.labels:
        lines.append(f"- classes: {', '.join(facts.labels)}")
    lines.append(f"- licence: {facts.licence}")
    lines += [f"- rows from {_way(way)}" for way in facts.ways]
    return "\n".join([*lines, ""])


def _way(way: Way) -> str:
    splits = f"trains on {way.splits.train}, scores {way.splits.evaluation}"
    if isinstance(way, DataFiles):
        names = ", ".join(f"`{name}`" for name in way.names)
        return f"`{way.folder}/` of {names}: {splits}"
    if isinstance(way, FromSeed):
        return f"the seed, `train_rows` facts: {splits}"
    if isinstance(way, Hub):
        config = f" ({way.config})" if way.config else ""
        return f"the hub, {way.name}{config}: {splits}"
    return f"package {way.name} (`pip install {way.install}`): {splits}"


def main() -> None:
    """Write the page to the path on the command line."""
    (path,) = sys.argv[1:]
    Path(path).write_text(page())


if __name__ == "__main__":
    main()

"""Tasks whose rows are made from the seed of a cell.

    train        all of them: `train_rows` facts, of which none is set aside
    validation   those that are scored: a trial scores the facts of its own seed
    evaluation   the same facts; biographies are asked in a wording that is not trained

Nothing is set aside, because a fact that was not trained cannot be recalled.
"""

from meft_bench.child.tasks.find import FORMATS
from meft_bench.child.tasks.question import AnswerTask
from meft_bench.child.tasks.questions import question_of
from meft_bench.child.tasks.recall import Fact, RecallTask
from meft_bench.child.tasks.rows import RowDict, SplitRows
from meft_bench.child.tasks.task import first
from meft_bench.shared import registry
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source
from meft_bench.shared.tasks import TABLE
from meft_bench.shared.tasks.facts import RECALL, Facts, FromSeed
from meft_bench.shared.tasks.facts_random import NUM_SYMBOLS


def load(cell: Cell, source: Source) -> AnswerTask | RecallTask:
    """Load the task that `cell` names.

    Args:
        cell: the cell, with the number of facts and the seed.
        source: unused, as no data is needed.
    """
    facts = TABLE[cell.task]
    (way,) = facts.ways
    assert isinstance(way, FromSeed)
    rows: SplitRows = registry.load(f"{FORMATS}.{way.read}")(cell.train_rows, cell.seed)
    scored = first(rows.evaluation, cell)
    origin = (
        f"{facts.title} ({facts.licence}) made from the seed of the cell; train "
        f"{len(rows.train)} {way.splits.train}, score {len(scored)} of "
        f"{len(rows.evaluation)} {way.splits.evaluation}"
    )
    if facts.kind == RECALL:
        return RecallTask(
            name=facts.name,
            train=tuple(_fact_of(facts, row) for row in rows.train),
            validation=tuple(_fact_of(facts, row) for row in scored),
            evaluation=tuple(_fact_of(facts, row) for row in scored),
            num_symbols=NUM_SYMBOLS,
            metric=facts.metric,
            origin=origin,
        )
    return AnswerTask(
        name=facts.name,
        train=tuple(question_of(facts, row) for row in rows.train),
        validation=tuple(question_of(facts, row) for row in scored),
        evaluation=tuple(question_of(facts, row) for row in scored),
        metric=facts.metric,
        max_new_tokens=facts.max_new_tokens,
        origin=origin,
    )


def _fact_of(facts: Facts, row: RowDict) -> Fact:
    fields = {name: row[name] for name in facts.fields}
    return Fact(prompt=facts.prompt.format(**fields), symbols=tuple(row["symbols"]))

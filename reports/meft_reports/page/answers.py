"""The answer of a run in sentences, computed by rules from its settings.

Each rule returns sentences, or none where it has nothing to say. A sentence says "would
need" where numbers are predicted, and names what a choice among several was made from.
"""

from collections.abc import Sequence

from markupsafe import Markup

from meft_reports.page.card_answers import fits_card
from meft_reports.page.cells import is_answer
from meft_reports.page.memory_answers import fits, headline, slopes
from meft_reports.page.pairs import PairedDifference
from meft_reports.page.predictions import prediction_errors, predictions
from meft_reports.page.score_answers import scores
from meft_reports.page.searches import Search, search_answers
from meft_reports.page.settings import Setting
from meft_reports.page.step_answers import steps, twins

MOST = 8
"""Number of sentences on the page; the rest would not be read."""


def answers_of(
    settings: Sequence[Setting],
    pairs: Sequence[PairedDifference],
    searches: Sequence[Search],
) -> list[Markup]:
    """Return the sentences, most important first.

    Args:
        settings: all settings of the run.
        pairs: paired differences of their scores.
        searches: answers of `fit`, of which nothing else has a sentence.
    """
    settings = [setting for setting in settings if not setting.has(is_answer)]
    found = [
        *search_answers(searches),
        *scores(settings, pairs),
        *twins(settings),
        *headline(settings),
        *fits(settings),
        *fits_card(settings),
        *slopes(settings),
        *predictions(prediction_errors(settings)),
        *steps(settings),
    ]
    return found[:MOST]

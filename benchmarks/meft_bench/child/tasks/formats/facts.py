"""Facts made from a seed: no file, no package, no hub.

random_tokens    a name, and random symbols that belong to it
biographies      attributes of made-up people, each asked in four wordings
people           distinct made-up names, which both of them use
"""

import random

from meft_bench.child.tasks.rows import RowDict, SplitRows
from meft_bench.shared.tasks.facts_random import NUM_SYMBOLS, NUM_TOKENS

_BEGINS = (
    *("Al", "Bar", "Cal", "Dor", "El", "Fen", "Gar", "Hal", "Il", "Jor", "Kel", "Lor"),
    *(
        "Mar",
        "Nor",
        "Or",
        "Pel",
        "Quin",
        "Ros",
        "Sal",
        "Tor",
        "Ul",
        "Var",
        "Wen",
        "Zel",
    ),
)
_ENDS = (
    *("a", "an", "den", "dra", "en", "ia", "ic", "in", "is", "la", "lo", "men"),
    *("mir", "na", "nel", "o", "on", "ra", "ric", "ro", "sa", "tan", "us", "vin"),
)
NUM_NAMES = (len(_BEGINS) * len(_ENDS)) ** 2
"""Number of names that can be made: two parts, each of two syllables."""


def people(number: int, generator: random.Random) -> list[str]:
    """Return distinct made-up names, each of a first and a last name.

    Args:
        number: number of names.
        generator: draws them.

    Raises:
        ValueError: there are not so many.
    """
    if number > NUM_NAMES:
        raise ValueError(
            f"`train_rows` is {number}, and {NUM_NAMES} names can be made: lower it"
        )
    size = len(_BEGINS) * len(_ENDS)
    parts = [begin + end for begin in _BEGINS for end in _ENDS]
    return [
        f"{parts[index // size]} {parts[index % size]}"
        for index in generator.sample(range(NUM_NAMES), number)
    ]


def random_tokens(number: int, seed: int) -> SplitRows:
    """Return facts of `NUM_TOKENS` symbols, each one of `NUM_SYMBOLS`.

    Args:
        number: number of facts.
        seed: draws names and symbols.
    """
    generator = random.Random(seed)
    rows: list[RowDict] = [
        {"name": name, "symbols": generator.choices(range(NUM_SYMBOLS), k=NUM_TOKENS)}
        for name in people(number, generator)
    ]
    return SplitRows(train=rows, evaluation=rows)


_CITIES = (
    *("Paris", "Lima", "Oslo", "Cairo", "Delhi", "Tokyo", "Rome", "Boston", "Perth"),
    *("Prague", "Dublin", "Geneva", "Havana", "Nairobi", "Seoul", "Vienna"),
)
_JOBS = (
    *("baker", "lawyer", "nurse", "painter", "pilot", "farmer", "judge", "chemist"),
    *("tailor", "teacher", "sailor", "banker", "dentist", "singer", "miner", "poet"),
)
_FIRMS = (
    *("Apple", "Boeing", "Canon", "Disney", "Ford", "Google", "Honda", "Intel"),
    *("Lego", "Nestle", "Nokia", "Philips", "Shell", "Siemens", "Sony", "Volvo"),
)
_SUBJECTS = (
    *("history", "physics", "music", "biology", "law", "geology", "medicine", "art"),
    *("economics", "botany", "logic", "chemistry", "theology", "design", "drama"),
    "astronomy",
)
_YEARS = tuple(str(year) for year in range(1930, 1994, 4))

ATTRIBUTES: tuple[tuple[tuple[str, ...], tuple[str, str, str, str]], ...] = (
    (
        _CITIES,
        (
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "Which city was {name} born in?",
            "In what city did the life of {name} begin?",
        ),
    ),
    (
        _JOBS,
        (
            "What is the job of {name}?",
            "What does {name} work as?",
            "Which profession does {name} have?",
            "How does {name} earn a living?",
        ),
    ),
    (
        _FIRMS,
        (
            "Who does {name} work for?",
            "What company employs {name}?",
            "Who is the employer of {name}?",
            "At which firm can one find {name} during the day?",
        ),
    ),
    (
        _SUBJECTS,
        (
            "What did {name} study?",
            "Which subject did {name} learn at university?",
            "What is the degree of {name} in?",
            "In which field did {name} graduate?",
        ),
    ),
    (
        _YEARS,
        (
            "When was {name} born?",
            "What is the birth year of {name}?",
            "In which year was {name} born?",
            "What year did {name} come into the world?",
        ),
    ),
)
"""Values and wordings of each attribute; the last wording is held out.

There are 16 values of each, 4 bits: 20 bits of a person.
"""


def biographies(number: int, seed: int) -> SplitRows:
    """Return questions about made-up people, in three wordings to train with.

    Args:
        number: number of people.
        seed: draws names and attributes.
    """
    generator = random.Random(seed)
    train, evaluation = [], []
    for name in people(number, generator):
        for values, (*known, held_out) in ATTRIBUTES:
            accepted = [generator.choice(values)]
            train += [
                {"question": wording.format(name=name), "accepted": accepted}
                for wording in known
            ]
            evaluation.append(
                {"question": held_out.format(name=name), "accepted": accepted}
            )
    return SplitRows(train=train, evaluation=evaluation)

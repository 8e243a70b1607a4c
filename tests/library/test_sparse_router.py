"""Who answers a token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import meft
from library.sparse import config
from meft.errors import ConfigError
from meft.sparse.router import top


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_largest_scores_are_kept_and_ties_go_to_the_lowest_index(
    data: st.DataObject,
) -> None:
    """Against Python's stable sort, over few distinct values so that there are ties."""
    tokens, choices = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, choices))
    values = st.sampled_from([-torch.inf, -1.0, -0.0, 0.0, 0.5, 2.0, torch.inf])
    scores = data.draw(
        st.lists(
            st.lists(values, min_size=choices, max_size=choices),
            min_size=tokens,
            max_size=tokens,
        )
    )
    kept = top(torch.tensor(scores), k)
    for row, found in zip(scores, kept.tolist(), strict=True):
        assert found == sorted(sorted(range(choices), key=lambda i: -row[i])[:k])


def test_a_score_that_is_no_number_is_kept() -> None:
    """So that it reaches the loss, and a loss scaler."""
    scores = torch.tensor([[1.0, 3.0, torch.nan, 2.0]])
    assert top(scores, 2).tolist() == [[1, 2]]


def test_more_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(ConfigError, match="3 of 2 choices"):
        top(torch.zeros(1, 2), 3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_neurons": 1009}, "128 by default.*1 and 1009; nearest .*1008 and 1010"),
        ({"num_experts": 48}, "32 and 64"),
        ({"top_k_experts": 33}, "only 32 experts"),
        ({"top_k_neurons": 65}, "only 64 neurons"),
        ({"semantics": "tokentopk"}, "did you mean 'token_topk'"),
        ({"placement": "gpu"}, "one of"),
        ({"num_neurons": 0}, "at least 1"),
        ({"num_experts": -1}, "at least 0"),
        ({"transfer_dtype": "float64"}, "one of"),
        ({"cache": "on"}, "one of"),
        ({"gate": "logits"}, "did you mean 'logit'"),
        ({"update": "catch-up"}, "did you mean 'catchup'"),
    ],
)
def test_an_illegal_config_says_what_is_legal(
    fields: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**fields)


def test_sizes_of_the_authors_recipe_are_the_defaults() -> None:
    """N = 4 sqrt(r) experts, 8 of them and 64 neurons a token."""
    recipe = meft.SparseConfig()
    assert (recipe.experts, recipe.num_candidates) == (320, 160)
    assert meft.SparseConfig(num_neurons=4096).experts == 256
    assert meft.SparseConfig.from_json(recipe.to_json()) == recipe


def test_the_default_number_of_experts_is_a_divisor_near_the_authors() -> None:
    """Theirs where it divides the neurons; else the nearest within a factor of two, the
    larger of two that are equally near."""
    for neurons, experts in {
        6400: 320,
        64: 32,
        4096: 256,
        100: 50,
        128: 64,
        500: 100,
        512: 64,
        1000: 125,
        1024: 128,
        2048: 128,
        6144: 256,
        10000: 400,
        65536: 1024,
    }.items():
        config = meft.SparseConfig(num_neurons=neurons)
        assert config.experts == experts, neurons
        assert config.num_candidates >= 8
    for neurons in range(64, 5000):
        authors = 4 * math.ceil(math.sqrt(neurons))
        near = range(math.ceil(authors / 2), 2 * authors + 1)
        distances = [abs(n - authors) for n in near if neurons % n == 0]
        if distances:
            experts = meft.SparseConfig(num_neurons=neurons).experts
            assert abs(experts - authors) == min(distances)
        else:
            with pytest.raises(ConfigError, match=f"{authors} by default"):
                meft.SparseConfig(num_neurons=neurons)

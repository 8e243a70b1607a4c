"""Models compiled by `torch.compile` train as others do; asserts it, or fails."""

import sys

import torch

import meft
from library.sparse import batches, plain_model, sparse_model, train


def sparse_adapters() -> None:
    """Losses of a short run."""
    eager, compiled = sparse_model(2), sparse_model(2)
    compiled.compile(backend="aot_eager")
    expected, found = train(eager, steps=3), train(compiled, steps=3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[0] != found[-1]


def chunked_loss() -> None:
    """Gradients of every parameter."""
    rows = next(batches(1))
    eager, compiled = (meft.chunk_loss(plain_model(2), 5) for _ in range(2))
    compiled.compile(backend="aot_eager")
    for model in (eager, compiled):
        model(**rows).loss.backward()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


if __name__ == "__main__":
    {"sparse_adapters": sparse_adapters, "chunked_loss": chunked_loss}[sys.argv[1]]()

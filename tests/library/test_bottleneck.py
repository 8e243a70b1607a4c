import torch

from meft.bottleneck import Bottleneck, wide_dtype


def test_it_starts_small_but_not_silent() -> None:
    """Both weights are drawn from N(0, 0.02^2), both biases are 0."""
    torch.manual_seed(0)
    adapter = Bottleneck(512, 256, torch.nn.functional.gelu, dropout=0.1)
    for linear in (adapter.down, adapter.up):
        assert abs(linear.weight.std().item() - 0.02) < 2e-4
        assert abs(linear.weight.mean().item()) < 2e-4
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))


def test_it_is_down_activation_up_without_a_skip() -> None:
    """The output is the formula of the module's docstring, term by term."""
    torch.manual_seed(0)
    adapter = Bottleneck(4, 2, torch.relu, dropout=0.5).eval()
    x = torch.randn(3, 5, 4)
    inner = torch.relu(x @ adapter.down.weight.T + adapter.down.bias)
    torch.testing.assert_close(
        adapter(x), inner @ adapter.up.weight.T + adapter.up.bias
    )


def test_dropout_sits_between_activation_and_up() -> None:
    """With everything dropped, what is left is the bias of the up projection."""
    adapter = Bottleneck(4, 2, torch.relu, dropout=1.0).train()
    torch.nn.init.ones_(adapter.up.bias)
    assert torch.equal(adapter(torch.randn(3, 4)), torch.ones(3, 4))


def test_with_a_half_precision_backbone_the_adapter_stays_float32() -> None:
    """Half-precision in, half-precision out, float32 weights in between."""
    assert wide_dtype(torch.bfloat16) == wide_dtype(torch.float16) == torch.float32
    assert wide_dtype(torch.float64) == torch.float64
    adapter = Bottleneck(4, 2, torch.relu, dropout=0.0)
    assert adapter(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16

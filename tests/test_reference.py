"""The reference against hand-computed numbers and, in fp64, against nn.LSTM and nn.LSTMCell."""

import itertools
import math

import pytest
import torch
from tolerance import assert_accurate
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from fastlstm import reference


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_cell_matches_the_equations_evaluated_by_hand():
    w_ih, w_hh = [0.1, -0.2, 0.3, 0.4], [0.5, 0.6, -0.7, 0.8]
    b_ih, b_hh = [0.01, 0.02, 0.03, 0.04], [-0.05, 0.06, 0.07, -0.08]
    x, h, c = 0.9, -0.3, 0.4
    i, f, g, o = (a * x + b * h + d + e for a, b, d, e in zip(w_ih, w_hh, b_ih, b_hh, strict=True))
    next_c = sigmoid(f) * c + sigmoid(i) * math.tanh(g)
    next_h = sigmoid(o) * math.tanh(next_c)

    def column(values):
        return torch.tensor(values, dtype=torch.float64).view(-1, 1)

    got_h, got_c = reference.lstm_cell(
        column([x]),
        column([h]),
        column([c]),
        column(w_ih),
        column(w_hh),
        column(b_ih).view(-1),
        column(b_hh).view(-1),
    )
    assert got_h.item() == pytest.approx(next_h, abs=1e-15)
    assert got_c.item() == pytest.approx(next_c, abs=1e-15)


@pytest.mark.parametrize("bias", [True, False])
def test_cell_matches_lstm_cell(bias):
    cell = nn.LSTMCell(5, 7, bias=bias, dtype=torch.float64)
    x, h, c = (torch.randn(3, n, dtype=torch.float64) for n in (5, 7, 7))
    expected = cell(x, (h, c))
    got = reference.lstm_cell(x, h, c, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def arguments(module, batch):
    """Random states for ``module`` and the keyword arguments of the reference."""
    states = module.num_layers * (1 + module.bidirectional)
    h_0 = torch.randn(states, batch, module.proj_size or module.hidden_size, dtype=torch.float64)
    c_0 = torch.randn(states, batch, module.hidden_size, dtype=torch.float64)
    return (
        h_0.requires_grad_(),
        c_0.requires_grad_(),
        {
            "num_layers": module.num_layers,
            "bidirectional": module.bidirectional,
            "has_bias": module.bias,
        },
    )


@pytest.mark.parametrize(
    ("num_layers", "bidirectional", "bias", "proj_size", "packed"),
    list(itertools.product([1, 2, 3], [False, True], [False, True], [0, 3], [False, True])),
)
def test_matches_lstm_forward_and_backward(num_layers, bidirectional, bias, proj_size, packed):
    module = nn.LSTM(5, 7, num_layers, bias=bias, bidirectional=bidirectional, proj_size=proj_size, dtype=torch.float64)
    h_0, c_0, options = arguments(module, batch=4)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    if packed:
        module_input = pack_padded_sequence(x, torch.tensor([6, 4, 4, 1]))
        x, options["batch_sizes"] = module_input.data, module_input.batch_sizes
        x.requires_grad_()
    else:
        module_input = x.requires_grad_()
    y, (h_n, c_n) = module(module_input, (h_0, c_0))
    expected = (y.data if packed else y, h_n, c_n)
    got = reference.lstm(x, list(module.parameters()), h_0, c_0, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)

    cotangents = [torch.randn_like(t) for t in expected]
    leaves = [x, h_0, c_0, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
        rtol=0,
        atol=1e-12,
    )


def test_dropout_mask_multiplies_what_the_next_layer_sees_and_nothing_else():
    lower = nn.LSTM(5, 7, bidirectional=True, dtype=torch.float64)
    upper = nn.LSTM(14, 7, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    mask = torch.empty(1, 6, 4, 14, dtype=torch.float64).bernoulli_(0.5) * 2
    y_lower, (h_lower, c_lower) = lower(x)
    y, (h_upper, c_upper) = upper(y_lower * mask[0])
    zeros = torch.zeros(4, 4, 7, dtype=torch.float64)
    got = reference.lstm(
        x,
        [*lower.parameters(), *upper.parameters()],
        zeros,
        zeros,
        num_layers=2,
        bidirectional=True,
        has_bias=True,
        dropout_mask=mask,
    )
    expected = (y, torch.cat([h_lower, h_upper]), torch.cat([c_lower, c_upper]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_only_the_results(dtype):
    module = nn.LSTM(5, 7, 2).to(dtype)
    x, zeros = torch.randn(30, 4, 5, dtype=dtype), torch.zeros(2, 4, 7, dtype=dtype)
    weights = list(module.parameters())
    options = {"num_layers": 2, "bidirectional": False, "has_bias": True}
    got = reference.lstm(x, weights, zeros, zeros, **options)
    exact = reference.lstm(x.float(), [w.float() for w in weights], zeros.float(), zeros.float(), **options)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


def test_differentiates_twice():
    module = nn.LSTM(2, 3, 2, bidirectional=True, proj_size=2, dtype=torch.float64)
    h_0, c_0, options = arguments(module, batch=2)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, h_0, c_0, *weights):
        return reference.lstm(x, weights, h_0, c_0, **options)

    assert torch.autograd.gradgradcheck(run, (x, h_0, c_0, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("wrong", ["error", "shape", "dtype"])
def test_assert_accurate_notices(wrong):
    exact = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    torchs = exact.float()
    assert_accurate("y", torchs.clone(), torchs, exact)
    ours = {"error": torchs + 1e-4, "shape": torchs.flatten(), "dtype": torchs.half()}[wrong]
    with pytest.raises(AssertionError, match=wrong):
        assert_accurate("y", ours, torchs, exact)

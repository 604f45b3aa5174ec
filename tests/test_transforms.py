"""Derivatives that the kernels have no formula for: torch.func transforms, forward mode, tracing.

They run the differentiable reference; what matters is that none of them is wrong or silently zero.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastlstm import FastLSTM, FastLSTMCell


@pytest.fixture
def pair() -> tuple[FastLSTM, nn.LSTM]:
    ours = FastLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    return ours, ours.to_torch()


def test_forward_mode(pair: tuple[FastLSTM, nn.LSTM]) -> None:
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    ours, theirs = (torch.func.jvp(lambda a, m=m: m(a)[0], (x,), (tangent,)) for m in pair)
    torch.testing.assert_close(ours, theirs)
    assert ours[1].abs().max() > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_dual_numbers(pair: tuple[FastLSTM, nn.LSTM], frozen: bool) -> None:
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    tangents = []
    for module in pair:
        module.requires_grad_(not frozen)
        with forward_ad.dual_level():
            y, _ = module(forward_ad.make_dual(x, tangent))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


def test_func_grad_vjp_jacrev(pair: tuple[FastLSTM, nn.LSTM]) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    for transform in (
        torch.func.grad(lambda a: pair[0](a)[0].pow(2).sum()),
        torch.func.jacrev(lambda a: pair[0](a)[0]),
    ):
        assert transform(x).abs().max() > 0
    parameters = dict(pair[0].named_parameters())
    gradients = []
    for module in pair:

        def loss(weights: dict[str, Tensor], module: nn.Module = module) -> Tensor:
            return torch.func.functional_call(module, weights, (x,))[0].pow(2).sum()

        gradients.append(torch.func.grad(loss)(parameters))
    torch.testing.assert_close(*gradients)


def test_transforms_under_autocast(pair: tuple[FastLSTM, nn.LSTM]) -> None:
    ours = FastLSTM(3, 4)
    x, tangent = torch.randn(2, 5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, d_y = torch.func.jvp(lambda a: ours(a)[0], (x,), (tangent,))
        d_x = torch.func.grad(lambda a: ours(a)[0].float().sum())(x)
        together = torch.vmap(lambda a: ours(a)[0])(torch.stack([x, tangent]))
    _, expected = torch.func.jvp(lambda a: ours(a)[0], (x,), (tangent,))
    torch.testing.assert_close(d_y.float(), expected, rtol=0.1, atol=0.02)
    torch.testing.assert_close(d_x, torch.func.grad(lambda a: ours(a)[0].sum())(x), rtol=0.1, atol=0.05)
    torch.testing.assert_close(together[1].float(), ours(tangent)[0], rtol=0.1, atol=0.02)


def test_vmap_over_inputs() -> None:
    cell = FastLSTMCell(3, 4)
    x = torch.randn(6, 2, 3)
    h, c = torch.vmap(cell)(x)
    for k in range(6):
        torch.testing.assert_close((h[k], c[k]), cell(x[k]))


def test_trace_and_save() -> None:
    module = FastLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(module, (x,)), buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(x), module(x))

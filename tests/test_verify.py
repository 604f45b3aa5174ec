"""fastlstm.verify: the tolerance rule, what `verify` covers, and that it finds planted errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlstm
from fastlstm import _ops, verify
from fastlstm.bench.shapes import Shape
from fastlstm.verify import compare

Lstm = Callable[..., tuple[Tensor, Tensor, Tensor]]


def test_the_bound_is_twice_torchs_error_plus_a_floor() -> None:
    exact = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    torchs = exact + torch.tensor([0.0, 1e-3, 0.0], dtype=torch.float64)
    report = compare("y", exact.clone(), torchs, exact)
    floor = verify.FLOOR_EPSILONS[torch.float64] * torch.finfo(torch.float64).eps * 2.0
    assert report.bound == pytest.approx(2e-3 + floor, rel=1e-12)
    assert (report.error, report.scale) == (0.0, 2.0)
    for factor, ok in ((1.9, True), (2.1, False)):
        ours = exact.clone()
        ours[2] += factor * 1e-3
        report = compare("y", ours, torchs, exact)
        assert report.ok is ok
        assert report.index == (2,)
        assert report.ours == pytest.approx(1.0 + factor * 1e-3)
    assert "y: error 0.0021 at [2]" in str(report) and "exceeds" in str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_where_torch_is_exact_a_rounding_is_allowed_and_a_real_error_is_not(dtype: torch.dtype) -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert compare("y", (exact * (1 + eps)).to(dtype), exact.to(dtype), exact).ok
    report = compare("y", (exact * (1 + 20 * eps)).to(dtype), exact.to(dtype), exact)
    assert not report.ok
    assert report.torch_error == 0.0


def test_the_precision_of_the_computation_can_be_lower_than_the_dtype() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    ours = torch.full((3,), 1.0 + torch.finfo(torch.bfloat16).eps)
    assert not compare("d_x", ours, exact.float(), exact).ok
    assert compare("d_x", ours, exact.float(), exact, dtype=torch.bfloat16).ok


def test_nan_and_infinity_have_to_be_met() -> None:
    nan, inf = math.nan, math.inf
    exact = torch.tensor([nan, inf, 1.0], dtype=torch.float64)
    assert compare("y", exact.clone(), exact, exact).ok
    for wrong in ([1.0, inf, 1.0], [nan, -inf, 1.0], [nan, inf, nan], [nan, 1.0, 1.0]):
        report = compare("y", torch.tensor(wrong), exact, exact)
        assert report.error == inf
        assert not report.ok


def test_empty_tensors_are_right_and_other_shapes_refused() -> None:
    empty = torch.empty(0, 4, dtype=torch.float64)
    assert compare("y", empty, empty, empty).ok
    with pytest.raises(ValueError, match=r"d_x must have shape \[0, 4\], got \[1, 4\], from nn.LSTM \[0, 4\]"):
        compare("d_x", torch.empty(1, 4), empty, empty)


@pytest.fixture(scope="module")
def quick() -> list[verify.Result]:
    torch.set_num_threads(1)
    return list(verify.verify(quick=True))


def test_everything_on_this_machine_is_right(quick: list[verify.Result]) -> None:
    wrong = [(r.shape.name, r.precision, r.plan, r.isa, r.failure, *map(str, r.reports)) for r in quick if not r.ok]
    assert wrong == []
    assert len(quick) == verify.count(quick=True)


def test_every_op_dtype_plan_and_isa_runs(quick: list[verify.Result]) -> None:
    ran = [result for result in quick if not result.skipped]
    assert {r.op for r in ran} == {"lstm", "lstm_cell"}
    assert {r.precision for r in ran} >= {"float32", "float64", "bfloat16", "float16", "autocast(bfloat16)"}
    assert {r.plan for r in ran} == set(fastlstm.plans())
    assert {r.isa for r in ran} == set(fastlstm.available_isas())
    for result in ran:
        assert {report.name for report in result.outputs} >= {"h_n", "c_n"}
        assert {"d_x"} < {report.name for report in result.gradients}


def test_bf16_products_are_really_taken(quick: list[verify.Result]) -> None:
    rows = [r for r in quick if r.precision == "float32, bf16 products" and r.plan == "packed"]
    assert {r.isa for r in rows} == set(fastlstm.available_isas())
    for result in rows:
        assert not result.skipped and max(report.error for report in result.outputs) > 1e-5


def test_summaries_keep_the_largest_error(quick: list[verify.Result]) -> None:
    summaries = verify.summarize(quick)
    assert sum(s.ran for s in summaries) == sum(not result.skipped for result in quick)
    for s in summaries:
        of_group = [r for r in quick if (r.op, r.precision, r.plan, r.isa) == (s.op, s.precision, s.plan, s.isa)]
        largest = max((e.error / e.scale for r in of_group for e in r.gradients if e.scale), default=None)
        assert (s.gradient_errors[0] if s.gradient_errors else None) == largest


def _plant(monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    right: Lstm = _ops.lstm

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return change(*right(*args, **kwargs))

    monkeypatch.setattr(_ops, "lstm", wrong)
    monkeypatch.setattr(verify, "_shapes", lambda quick: [Shape(T=3, B=2, I=4, H=16, state=True)])


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is one percent too large."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.01


def test_a_wrong_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(y: Tensor, h_n: Tensor, c_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return y, h_n, c_n + 1e-2

    _plant(monkeypatch, shift)
    results = [r for r in verify.verify() if r.precision == "float32" and not r.skipped]
    assert results
    for result in results:
        assert {report.name for report in result.reports if not report.ok} == {"c_n"}
    assert all(s.failed == s.ran for s in verify.summarize(results))


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(y: Tensor, h_n: Tensor, c_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        apply: Any = _ScaledGradient.apply
        return apply(y), apply(h_n), apply(c_n)

    _plant(monkeypatch, scale)
    for result in verify.verify():
        if result.precision in ("float32", "float64") and not result.skipped:
            assert {report.name for report in result.reports if not report.ok} == {
                report.name for report in result.gradients
            }


def test_a_call_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise RuntimeError("kernel missing")

    _plant(monkeypatch, fail)
    results = [r for r in verify.verify() if not r.skipped]
    assert results
    assert {r.failure for r in results} == {"RuntimeError: kernel missing"}
    assert not any(r.ok for r in results)

"""The tolerance rule, and the check of every op, dtype, plan and ISA of a device against nn.LSTM.

`compare` is the one place that decides whether a result is right: our error against float64 may be at most
twice nn.LSTM's own error in the same precision, plus a rounding floor. The tests use it through
tests/tolerance.py, `fastlstm bench` before it times a shape, and the command `fastlstm verify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

import fastlstm
from fastlstm.bench.shapes import DTYPES, Shape
from fastlstm.bench.workload import PASSES, Pass, Workload
from fastlstm.planning import plans

CUDA_PLANS = tuple(plans("cuda"))

# In tiny problems nn.LSTM is sometimes exact by luck, and twice its error would forbid any rounding at all.
# Over 250 random problems with T <= 20 and H <= 31 the reference in float32 needed up to 5 epsilons beyond
# twice nn.LSTM's error; the bound leaves room for an exp of a few ULP. The 16-bit types are computed in
# float32 and rounded where a layer ends, so they need the epsilons of those roundings only.
FLOOR_EPSILONS = {torch.float64: 16.0, torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}


@dataclass(frozen=True)
class ErrorReport:
    """The worst element of one tensor, measured against float64.

    Attributes:
        name: the tensor's name, such as "y" or "d_weight_hh_l0".
        error: our largest absolute error; infinite where a NaN or an infinity is not the expected one.
        torch_error: nn.LSTM's largest absolute error.
        bound: what `error` may be.
        scale: the largest finite magnitude in the exact tensor.
        index: position of our largest error; () for an empty tensor.
        ours, exact: the two values at `index`.
    """

    name: str
    error: float
    torch_error: float
    bound: float
    scale: float
    index: tuple[int, ...]
    ours: float
    exact: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound

    def __str__(self) -> str:
        verdict = "is within" if self.ok else "exceeds"
        return (
            f"{self.name}: error {self.error:.3g} at {list(self.index)} "
            f"(got {self.ours:.9g}, exact {self.exact:.9g}) {verdict} {self.bound:.3g}, "
            f"twice nn.LSTM's error {self.torch_error:.3g} plus the rounding floor"
        )


def compare(
    name: str, ours: Tensor, torch_lowp: Tensor, exact: Tensor, *, dtype: torch.dtype | None = None
) -> ErrorReport:
    """Judges `ours` by the error that nn.LSTM makes in the same precision.

    The bound is ``2 * max|torch_lowp - exact| + FLOOR_EPSILONS[dtype] * eps(dtype) * max|exact|``; the form
    of the rule (error relative to the standard implementation's own low-precision error) is that of the
    FlashAttention tests. A NaN or an infinity in `exact` has to be met by the same value.

    Args:
        name: what to call the tensor in the report.
        ours: the result to judge.
        torch_lowp: nn.LSTM's result, same shape.
        exact: the result in float64, same shape.
        dtype: precision of the computation where it is lower than the dtype of `ours`, as for float32
            gradients under autocast.

    Raises:
        ValueError: the shapes differ.
    """
    if not ours.shape == torch_lowp.shape == exact.shape:
        raise ValueError(
            f"{name} must have shape {list(exact.shape)}, got {list(ours.shape)}, from nn.LSTM {list(torch_lowp.shape)}"
        )
    if exact.numel() == 0:
        return ErrorReport(name, 0.0, 0.0, 0.0, 0.0, (), 0.0, 0.0)
    exact = exact.detach().double()
    ours64, torch64 = (value.detach().to(exact.device, torch.float64) for value in (ours, torch_lowp))
    error, torch_error = (_absolute_error(value, exact) for value in (ours64, torch64))
    scale = exact.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    precision = dtype or ours.dtype
    floor = FLOOR_EPSILONS[precision] * torch.finfo(precision).eps * scale
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return ErrorReport(
        name=name,
        error=error[index].item(),
        torch_error=torch_error.max().item(),
        bound=2 * torch_error.max().item() + floor,
        scale=scale,
        index=index,
        ours=ours64[index].item(),
        exact=exact[index].item(),
    )


def _absolute_error(value: Tensor, exact: Tensor) -> Tensor:
    same = (value == exact) | (value.isnan() & exact.isnan())
    return torch.where(same, 0.0, (value - exact).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))


def compare_results(
    ours: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> list[ErrorReport]:
    """`compare` for every tensor of `ours`, results of a Workload; `dtype` is its `rounding`."""
    return [compare(name, ours[name], baseline[name], exact[name], dtype=dtype) for name in ours]


def check_passes(workload: Workload, passes: Sequence[Pass] = PASSES) -> dict[Pass, list[ErrorReport]]:
    """Judges FastLSTM's results on `workload` in each pass, with the plan that the planner picks."""
    widest: Pass = "forward_backward" if "forward_backward" in passes else "forward"
    baseline, exact, rounding = workload.baseline(widest), workload.exact(widest), workload.rounding
    return {pass_: compare_results(workload.results("fastlstm", pass_), baseline, exact, rounding) for pass_ in passes}


def check(workload: Workload, passes: Sequence[Pass] = PASSES) -> list[ErrorReport]:
    """`check_passes` in one list."""
    return [report for reports in check_passes(workload, passes).values() for report in reports]


def _shapes(quick: bool) -> list[Shape]:
    """Sizes of 1, primes, and one more or less than multiples of the vector and tile widths."""
    shapes = [
        Shape(T=7, B=5, I=11, H=13, state=True),
        Shape(T=1, B=1, I=32, H=64, state=True),
        Shape(T=5, B=32, I=64, H=64),
        Shape(T=6, B=7, I=17, H=24, layers=2, directions=2, state=True),
        Shape(T=9, B=6, I=19, H=20, P=7, state=True),
        Shape(T=12, B=9, I=16, H=33, packed=True, state=True),
        Shape(T=1, B=5, I=7, H=9, kind="cell", state=True),
    ]
    if not quick:
        shapes += [
            Shape(T=1, B=1, I=1, H=1),
            Shape(T=20, B=1, I=17, H=33),
            Shape(T=2, B=13, I=16, H=15, bias=False),
            Shape(T=3, B=3, I=15, H=17, state=True),
            Shape(T=64, B=4, I=48, H=48),
            Shape(T=4, B=33, I=129, H=128),
            Shape(T=5, B=4, I=6, H=31, P=16, layers=3, directions=2, bias=False, state=True),
            Shape(T=10, B=8, I=12, H=16, layers=2, directions=2, packed=True, state=True),
            Shape(T=8, B=5, I=9, H=18, P=5, packed=True),
            Shape(T=1, B=1, I=128, H=128, kind="cell", state=True),
            Shape(T=1, B=32, I=65, H=63, kind="cell", bias=False, state=True),
        ]
    return shapes


def _gpu_shapes(quick: bool) -> list[Shape]:
    """Hidden sizes that take more and more multiprocessors, of which some are multiples of a tile."""
    shapes = [
        Shape(T=6, B=19, I=24, H=124, state=True),
        Shape(T=5, B=9, I=33, H=300, directions=2, packed=True, state=True),
        Shape(T=7, B=65, I=40, H=512, state=True),
        Shape(T=6, B=19, I=24, H=128, P=40, layers=2, directions=2, state=True),
    ]
    if not quick:
        shapes += [
            Shape(T=3, B=2, I=40, H=1000),
            Shape(T=4, B=33, I=40, H=2048, state=True),
        ]
    return shapes


def _precisions(shape: Shape, device: torch.device) -> list[tuple[str, Shape]]:
    if device.type == "cuda":
        # As torch has it by default: products of float32 are TF32 unless the user forbids it.
        labelled = [("float32, TF32 products", shape), ("float32", replace(shape, ieee=True))]
        return labelled + [(dtype, replace(shape, dtype=dtype)) for dtype in DTYPES if dtype != "float32"]
    labelled = [(dtype, replace(shape, dtype=dtype)) for dtype in DTYPES]
    if shape.kind == "module":
        labelled.append(("autocast(bfloat16)", replace(shape, autocast=True)))
        labelled.append(("float32, bf16 products", replace(shape, bf16_products=True)))
    return labelled


@dataclass(frozen=True)
class Result:
    """One shape in one precision with one forced plan and ISA.

    Attributes:
        op: "lstm" or "lstm_cell".
        precision: a dtype name, or the name of a mixed precision.
        plan, isa: what was forced; on a GPU the ISA is its own and nothing to force.
        shape: the problem.
        reports: outputs in inference, outputs in training and gradients; empty if nothing ran.
        skipped: why the plan does not apply to this shape, or "".
        failure: the error that the call raised, or "".
    """

    op: str
    precision: str
    plan: str
    isa: str
    shape: Shape
    reports: tuple[ErrorReport, ...] = ()
    skipped: str = ""
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether no call raised and no tensor exceeds its bound."""
        return not self.failure and all(report.ok for report in self.reports)

    @property
    def outputs(self) -> list[ErrorReport]:
        """Reports of y, h_n and c_n."""
        return [report for report in self.reports if not report.name.startswith("d_")]

    @property
    def gradients(self) -> list[ErrorReport]:
        """Reports of the gradients."""
        return [report for report in self.reports if report.name.startswith("d_")]


def _cases(quick: bool, device: torch.device) -> list[tuple[str, Shape]]:
    shapes = _shapes(quick) + (_gpu_shapes(quick) if device.type == "cuda" else [])
    return [case for shape in shapes for case in _precisions(shape, device)]


def _kernels(device: torch.device) -> list[tuple[str, str]]:
    """What can be forced: plans and ISAs."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return [(plan, f"sm_{major}{minor}") for plan in CUDA_PLANS]
    return list(product(fastlstm.plans(), fastlstm.available_isas()))


def count(*, quick: bool = False, device: str = "cpu") -> int:
    """Number of results that `verify` yields."""
    return len(_cases(quick, torch.device(device))) * len(_kernels(torch.device(device)))


def verify(*, quick: bool = False, device: str = "cpu") -> Iterator[Result]:
    """Runs every op, dtype, plan and ISA of `device` over a set of shapes; yields a Result for each.

    An exception raised by a call becomes a failed Result: one broken combination does not hide the others.

    Args:
        quick: a few shapes instead of all.
        device: "cpu" or "cuda".
    """
    on_gpu = torch.device(device).type == "cuda"
    kernels = _kernels(torch.device(device))
    for precision, case in _cases(quick, torch.device(device)):
        workload = Workload(case, device=device)
        baseline, exact = workload.baseline("forward_backward"), workload.exact("forward_backward")
        rounding = workload.rounding
        for plan, isa in kernels:
            op = "lstm_cell" if case.kind == "cell" else "lstm"
            result = Result(op, precision, plan, isa, case)
            # The planner takes bfloat16 products only where they are fast; here they are to be right.
            products = "bf16" if case.bf16_products and plan == "packed" else None
            with fastlstm.force(plan=plan, isa=None if on_gpu else isa, products=products):
                try:
                    workload.plan("forward_backward")
                except ValueError as error:
                    yield replace(result, skipped=str(error))
                    continue
                try:
                    found = [workload.results("fastlstm", pass_) for pass_ in PASSES]
                except (RuntimeError, ValueError, TypeError) as error:
                    yield replace(result, failure=f"{type(error).__name__}: {error}")
                    continue
            reports = [r for results in found for r in compare_results(results, baseline, exact, rounding)]
            yield replace(result, reports=tuple(reports))


@dataclass(frozen=True)
class Summary:
    """All results of one op, precision, plan and ISA; errors are relative to each tensor's largest magnitude.

    `output_errors` and `gradient_errors` are the largest of (FastLSTM, nn.LSTM); None where nothing ran.
    """

    op: str
    precision: str
    plan: str
    isa: str
    ran: int
    failed: int
    output_errors: tuple[float, float] | None
    gradient_errors: tuple[float, float] | None


def summarize(results: Iterable[Result]) -> list[Summary]:
    """One Summary for each op, precision, plan and ISA, in the order of first appearance."""
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.op, result.precision, result.plan, result.isa), []).append(result)
    return [
        Summary(
            *key,
            ran=sum(not result.skipped for result in group),
            failed=sum(not result.ok for result in group),
            output_errors=_largest(report for result in group for report in result.outputs),
            gradient_errors=_largest(report for result in group for report in result.gradients),
        )
        for key, group in groups.items()
    ]


def _largest(reports: Iterable[ErrorReport]) -> tuple[float, float] | None:
    relative = [(r.error / (r.scale or 1.0), r.torch_error / (r.scale or 1.0)) for r in reports]
    return (max(r[0] for r in relative), max(r[1] for r in relative)) if relative else None

"""Runs the benchmark: for each shape and pass, checks FastLSTM's result once and then times both contenders.

Called by `fastlstm bench`, which shows each Comparison as it comes and writes all rows with record.document.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastlstm.bench.record import Comparison, Row
from fastlstm.bench.shapes import Shape
from fastlstm.bench.timing import Timing, measure
from fastlstm.bench.workload import PASSES, Pass, Workload
from fastlstm.verify import ErrorReport, check_passes

# Float64 remembers every step on its way to gradients, more than a GPU's memory holds of the largest shapes: there
# gradients are checked over this many steps, the outputs over all of them.
CHECKED_STEPS_ON_GPU = 16


def parse_device(text: str) -> str:
    """`text` if it names a device present here; ValueError if not."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"unknown device {text!r}: expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {text!r}: expected cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {text!r} is not available: torch sees {count} CUDA devices")
    return text


def parse_passes(text: str) -> tuple[Pass, ...]:
    """Comma-separated names of passes, in the order of `PASSES`; ValueError for an unknown one or none."""
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in wanted if word not in PASSES]
    if unknown or not wanted:
        raise ValueError(f"unknown pass {', '.join(unknown)!r}: expected {', '.join(PASSES)}")
    return tuple(pass_ for pass_ in PASSES if pass_ in wanted)


@contextlib.contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads and restores it; None leaves it alone. ValueError for less than 1."""
    if count is not None and count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    previous = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(previous)


def run(
    shapes: Sequence[Shape],
    *,
    device: str = "cpu",
    passes: Sequence[Pass] = PASSES,
    budget_s: float = 4.0,
    time_limit_s: float | None = None,
) -> Iterator[Comparison]:
    """Yields one Comparison for each shape and pass; an error gives a row without a timing.

    Args:
        shapes: what to run, as from shapes.select.
        device: "cpu" or "cuda".
        passes: "forward" is inference, "forward_backward" training.
        budget_s: seconds of timing for each shape and pass, both contenders together; see timing.measure.
        time_limit_s: seconds after which no further shape is begun.
    """
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    if torch.device(device).type == "cuda":
        reach_working_clock(device)
    for shape in shapes:
        if deadline is not None and time.monotonic() >= deadline:
            return
        workload = Workload(shape, device=device)
        reports: dict[Pass, list[ErrorReport]] = {}
        failure: str | None = None
        try:
            reports = _check(workload, passes)
        except RuntimeError as error:
            failure = _one_line(error)
        for pass_ in passes:
            ours = _row(shape, device, pass_, "fastlstm")
            wrong = [report for report in reports.get(pass_, ()) if not report.ok]
            if failure or wrong:
                yield Comparison(replace(ours, error=failure or f"wrong result: {wrong[0]}"), None)
                continue
            ours = replace(ours, plan=workload.plan(pass_).to_dict())
            theirs = _row(shape, device, pass_, "torch")
            try:
                with workload.precision():
                    workload.step("torch", pass_)()
            except RuntimeError as error:
                # Such as autocast to bfloat16 on a CPU for which oneDNN has no bfloat16 LSTM.
                theirs = replace(theirs, error=_one_line(error))
            timings = _time(workload, pass_, budget_s, [row.contender for row in (ours, theirs) if not row.error])
            yield Comparison(*(_timed(row, timings.get(row.contender)) for row in (ours, theirs)))


def reach_working_clock(device: str, seconds: float = 0.5) -> None:
    """Keeps a GPU busy until its clock is that of sustained work; idle, it runs at a fraction of it."""
    a = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        for _ in range(10):
            torch.mm(a, a)
        torch.cuda.synchronize(device)


def seconds_on_gpu(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """A `seconds_of` for timing.measure: from what begins a function's work on the device to what ends it."""

    def seconds_of(run: Callable[[], None]) -> float:
        with torch.cuda.device(device):
            event: Any = torch.cuda.Event  # whose stubs lack types
            begin, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3

    return seconds_of


def _check(workload: Workload, passes: Sequence[Pass]) -> dict[Pass, list[ErrorReport]]:
    shape = workload.shape
    if workload.device.type != "cuda" or shape.T <= CHECKED_STEPS_ON_GPU:
        return check_passes(workload, passes)
    reports = check_passes(workload, ["forward"])
    if "forward_backward" in passes:
        shorter = Workload(replace(shape, T=CHECKED_STEPS_ON_GPU), device=workload.device)
        reports |= check_passes(shorter, ["forward_backward"])
    return reports


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _time(workload: Workload, pass_: Pass, budget_s: float, contenders: Sequence[str]) -> dict[str, Timing]:
    steps = {contender: workload.step(contender, pass_) for contender in contenders}
    on_gpu = workload.device.type == "cuda"
    with workload.precision():
        return measure(steps, budget_s=budget_s, seconds_of=seconds_on_gpu(workload.device) if on_gpu else None)


def _row(shape: Shape, device: str, pass_: Pass, contender: str) -> Row:
    return Row(
        shape=shape.name,
        stands_for=shape.stands_for,
        T=shape.T,
        B=shape.B,
        I=shape.I,
        H=shape.H,
        proj=shape.P,
        layers=shape.layers,
        directions=shape.directions,
        packed=shape.packed,
        state=shape.state,
        kind=shape.kind,
        dtype=shape.dtype,
        autocast=shape.autocast,
        bf16_products=shape.bf16_products,
        device=device,
        pass_=pass_,
        contender=contender,
        tokens=shape.tokens,
    )


def _timed(row: Row, timing: Timing | None) -> Row:
    if timing is None:
        return row
    return replace(
        row,
        median_s=timing.median_s,
        spread=timing.spread,
        samples=timing.samples,
        calls_per_sample=timing.calls_per_sample,
        tokens_per_s=row.tokens / timing.median_s,
    )

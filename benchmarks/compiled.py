"""FastLSTM under torch.compile against FastLSTM alone, in turns in one process.

    python benchmarks/compiled.py --json FILE

A compiled call of one layer runs the same kernel, behind the guards and wrappers of torch's own runtime. What these add
is paid once per call of a compiled model, however many layers it has; the rows of an nn.Linear show how much that is
without anything of ours. It grows somewhat with the sizes: after a long kernel the interpreter finds its caches cold.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.bench import record, shapes
from fastlstm.bench.runner import num_threads
from fastlstm.bench.timing import measure
from fastlstm.bench.workload import PASSES, Workload


def timed(
    name: str, pass_: str, eager: Callable[[], None], compiled: Callable[[], None], budget_s: float
) -> dict[str, Any]:
    """A row: the seconds of a call of each and the spread of their samples."""
    row: dict[str, Any] = {"module": name, "pass": pass_}
    compiled()  # compiles
    for contender, timing in measure({"eager": eager, "compiled": compiled}, budget_s=budget_s).items():
        row[f"{contender}_s"], row[f"{contender}_spread"] = timing.median_s, timing.spread
    return row


def lstm_rows(shape: shapes.Shape, backend: str, budget_s: float) -> list[dict[str, Any]]:
    """Both passes of a shape, after the results have been compared."""
    workload = Workload(shape)
    torch.compiler.reset()  # all modules of a class share one limit of compilations
    compiled = copy.deepcopy(workload.modules["fastlstm"])
    compiled.compile(backend=backend, fullgraph=True)
    workload.modules["compiled"] = compiled
    rows = []
    for pass_ in PASSES:
        torch.testing.assert_close(workload.results("compiled", pass_), workload.results("fastlstm", pass_))
        steps = (workload.step(contender, pass_) for contender in ("fastlstm", "compiled"))
        rows.append(timed(shape.name, pass_, *steps, budget_s))
    return rows


def linear_rows(features: int, backend: str, budget_s: float) -> list[dict[str, Any]]:
    """Both passes of an nn.Linear on one row."""
    eager = nn.Linear(features, features)
    compiled = torch.compile(eager, backend=backend, fullgraph=True)
    x, seed = torch.randn(1, features, requires_grad=True), torch.ones(1, features)

    def inference(module: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode():
                module(x)

        return call

    def training(module: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        leaves = [x, *eager.parameters()]

        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            module(x).backward(seed)

        return call

    passes = zip(PASSES, (inference, training), strict=True)
    return [timed(f"nn.Linear-{features}", pass_, step(eager), step(compiled), budget_s) for pass_, step in passes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="T1-B1-H32,T1-B1-H1024,T100-B1-H128,T100-B32-H128,T100-B32-H128-L2-bi")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape and pass, both contenders together")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.json:
        record.ensure_writable(arguments.json)
    selected = shapes.select(arguments.shapes)
    backend, seconds = arguments.backend, arguments.seconds
    with num_threads(arguments.threads):
        settings = {"backend": backend, "threads": arguments.threads, "seconds_each": seconds}
        provenance = record.provenance(settings)
        rows = linear_rows(32, backend, seconds)
        for shape in selected:
            rows += lstm_rows(shape, backend, seconds)
    print(f"{backend}, {arguments.threads} threads")
    print(f"{'module':<22} {'pass':<17} {'eager':>11} {'compiled':>11} {'added':>9} {'speed':>7}")
    for row in rows:
        eager, compiled = row["eager_s"] * 1e6, row["compiled_s"] * 1e6
        print(
            f"{row['module']:<22} {row['pass']:<17} {eager:>8.1f} us {compiled:>8.1f} us "
            f"{compiled - eager:>6.0f} us {eager / compiled:>6.3f}x"
        )
    if arguments.json:
        record.write(arguments.json, provenance | {"rows": rows})


if __name__ == "__main__":
    main()

"""Errors over the length of a sequence: those of FastLSTM, family by family, and of nn.LSTM, against float64.

    python benchmarks/accuracy.py --json FILE [--device cuda]

One layer forward and backward, from given states. An error is that of a whole tensor, relative to its 2-norm: of y, and
the largest among the gradients of x, the states and the parameters. benchmarks/table.py makes a table of FILE.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlstm
from fastlstm.bench import record
from fastlstm.bench.shapes import Shape
from fastlstm.bench.workload import Workload

STEPS = (1, 4, 16, 64, 256, 1024, 4096)
# With many units, sums are long; with few, exact results take a loop on a CPU a few seconds.
SHAPES = {
    "cpu": Shape(T=1, B=8, I=64, H=128, state=True),
    "cuda": Shape(T=1, B=16, I=512, H=512, state=True),
}
# Label -> what a shape has for it.
PRECISIONS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {dtype: {"dtype": dtype} for dtype in ("float32", "bfloat16", "float16")},
    "cuda": {
        "float32": {"ieee": True},
        "TF32": {},
        "bfloat16": {"dtype": "bfloat16"},
        "float16": {"dtype": "float16"},
    },
}


def relative(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of y and the largest of the gradients; NaN in a result is an infinite error."""
    errors = {}
    for name in ["y", *(name for name in exact if name.startswith("d_"))]:
        difference = (results[name].double() - exact[name]).norm() / exact[name].norm()
        errors[name] = math.inf if difference.isnan() else difference.item()
    return {"y": errors.pop("y"), "gradients": max(errors.values())}


def measure(precision: str, steps: int, device: str) -> Iterator[dict[str, Any]]:
    """Rows of a length: the errors of nn.LSTM and of every family that runs this problem."""
    shape = replace(SHAPES[device], T=steps, **PRECISIONS[device][precision])
    workload = Workload(shape, device=device)
    exact = workload.exact("forward_backward")
    row = {"precision": precision, "T": steps}
    yield row | {"contender": "nn.LSTM"} | relative(workload.results("torch", "forward_backward"), exact)
    for family in fastlstm.plans(device):
        with fastlstm.force(plan=family):
            try:
                workload.plan("forward_backward")
            except ValueError:  # such as a family of few hidden units
                continue
            results = workload.results("fastlstm", "forward_backward")
        yield row | {"contender": family} | relative(results, exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="lengths of the sequences")
    arguments = parser.parse_args()
    device: str = arguments.device
    if arguments.json:
        record.ensure_writable(arguments.json)
    shape = SHAPES[device]
    document = record.provenance({"B": shape.B, "I": shape.I, "H": shape.H}, device) | {"accuracy": []}
    for precision in PRECISIONS[device]:
        for steps in arguments.steps:
            for row in measure(precision, steps, device):
                print(f"{precision:<9} T {steps:>5} {row['contender']:<11} y {row['y']:.1e}  d {row['gradients']:.1e}")
                document["accuracy"].append(row)
            if arguments.json:
                record.write(arguments.json, document)


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums then have one order
    main()

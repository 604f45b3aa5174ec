"""Prints what the planner expects of a GPU, microseconds per time step of one layer, as Markdown.

    python benchmarks/predicted.py [H200 | H100 | A100 | L4 | B200] [--dtype bfloat16]

The constants behind the figures are fitted to steps measured on an H200 (csrc/cuda/plan.cpp); for other GPUs they are
a guess. No GPU is needed.
"""

from __future__ import annotations

import argparse

import torch

import fastlstm
from fastlstm.planning import GPUS, CudaPlan

HIDDEN = (128, 256, 512, 768, 1024, 2048)
BATCHES = (1, 16, 64, 256)
FAMILIES = {"stepwise": "s", "streamed": "t", "resident": "r", "persistent": "p", "warpgroup": "w"}


def table(gpu: str, dtype: torch.dtype, steps: int) -> list[str]:
    lines = [
        f"*Predicted*: {gpu}, {str(dtype).removeprefix('torch.')}, T = {steps}, one layer, microseconds per time step, "
        "forward / backward recurrence. Families: r resident, p persistent, w warpgroup, t streamed, s stepwise.",
        "",
        "| H | " + " | ".join(f"B = {batch}" for batch in BATCHES) + " |",
        "|---" * (len(BATCHES) + 1) + "|",
    ]
    for hidden in HIDDEN:
        cells = []
        for batch in BATCHES:
            plan = fastlstm.plan(T=steps, B=batch, I=hidden, H=hidden, dtype=dtype, training=True, device=gpu)
            assert isinstance(plan, CudaPlan) and plan.backward is not None and plan.backward_microseconds is not None
            forward = f"{plan.forward_microseconds:.2f} {FAMILIES[plan.forward]}"
            cells.append(f"{forward} / {plan.backward_microseconds:.2f} {FAMILIES[plan.backward]}")
        lines.append(f"| {hidden} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="The planner's predictions for a GPU.")
    parser.add_argument("gpu", nargs="?", default="H200", choices=list(GPUS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", type=int, default=512)
    arguments = parser.parse_args()
    print("\n".join(table(arguments.gpu, getattr(torch, arguments.dtype), arguments.steps)))


if __name__ == "__main__":
    main()

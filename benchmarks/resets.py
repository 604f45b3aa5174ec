"""A training step with states that begin anew in mid-sequence: one call with reset_mask against a loop over steps.

    python benchmarks/resets.py --json FILE

Recurrent reinforcement learning zeroes the states where an episode starts. The loop is that of sb3-contrib's
RecurrentPPO; both classes without resets show what they cost. Every contender runs forward and backward, for the
gradients of parameters, input and initial states, in turns in one process, and is checked before it is timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlstm import FastLSTM
from fastlstm.bench import record
from fastlstm.bench.runner import num_threads
from fastlstm.bench.shapes import Shape
from fastlstm.bench.timing import measure
from fastlstm.bench.workload import Workload
from fastlstm.verify import ErrorReport, compare_results

State = tuple[Tensor, Tensor]


def loop_over_steps(lstm: nn.LSTM, x: Tensor, state: State, starts: Tensor) -> Tensor:
    """nn.LSTM called for one step at a time, the states multiplied by zero where an episode starts."""
    outputs = []
    for x_t, starts_t in zip(x, starts, strict=True):
        keep = (1.0 - starts_t).view(1, -1, 1)
        y_t, state = lstm(x_t.unsqueeze(0), (keep * state[0], keep * state[1]))
        outputs.append(y_t)
    return torch.cat(outputs)


def one_call(lstm: FastLSTM, x: Tensor, state: State, starts: Tensor) -> Tensor:
    """The same by FastLSTM; what the conversion to a mask takes is part of it."""
    return lstm(x, state, reset_mask=starts != 0)[0]


def without_resets(lstm: nn.RNNBase, x: Tensor, state: State, starts: Tensor) -> Tensor:
    """One call that takes no notice of `starts`."""
    y: Tensor = lstm(x, state)[0]
    return y


# Name -> the workload's module and what is done with it.
CONTENDERS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "loop": ("torch", loop_over_steps),
    "reset_mask": ("fastlstm", one_call),
    "fastlstm_no_resets": ("fastlstm", without_resets),
    "torch_no_resets": ("torch", without_resets),
}
# Ours -> whose results it must have.
PAIRS = {"reset_mask": "loop", "fastlstm_no_resets": "torch_no_resets"}
# Ratio of times -> its two contenders.
RATIOS = {
    "loop / reset_mask": ("loop", "reset_mask"),
    "reset_mask / no resets": ("reset_mask", "fastlstm_no_resets"),
    "nn.LSTM / FastLSTM, no resets": ("torch_no_resets", "fastlstm_no_resets"),
}


class TrainingStep:
    """All contenders on one problem, with equal parameters, inputs and gradients of the output.

    Args:
        shape: the problem, with `state`.
        share: of the steps at which an episode starts, drawn for each step and sequence by itself.
    """

    def __init__(self, shape: Shape, share: float) -> None:
        self.workload = Workload(shape)
        generator = torch.Generator().manual_seed(1)
        # Numbers, not bools: as RecurrentPPO's rollout buffer holds them.
        self.starts = (torch.rand(shape.T, shape.B, generator=generator) < share).float()
        self.d_y = torch.randn(shape.T, shape.B, shape.H, generator=generator)

    def call(self, contender: str) -> Callable[[], None]:
        """The call to time."""
        name, forward = CONTENDERS[contender]
        module, x, state = self.workload.modules[name], self.workload.x, self.workload.state
        parameters = list(module.parameters())
        leaves = [x, *state, *parameters]

        def forward_backward() -> None:
            for leaf in leaves:
                leaf.grad = None
            # As after an optimizer's step: a copy of the weights packed for the last call is stale.
            torch.autograd.graph.increment_version(parameters)
            forward(module, x, state, self.starts).backward(self.d_y)

        return forward_backward

    def results(self, contender: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Output and gradients by name, computed in `dtype`."""
        name, forward = CONTENDERS[contender]
        module = deepcopy(self.workload.modules[name]).to(dtype)
        x, *state = (t.detach().to(dtype).requires_grad_() for t in (self.workload.x, *self.workload.state))
        leaves = {"x": x, "h_0": state[0], "c_0": state[1], **dict(module.named_parameters())}
        y = forward(module, x, tuple(state), self.starts.to(dtype))
        gradients = torch.autograd.grad(y, list(leaves.values()), self.d_y.to(dtype))
        return {"y": y.detach(), **{f"d_{leaf}": d for leaf, d in zip(leaves, gradients, strict=True)}}

    def check(self) -> list[ErrorReport]:
        """FastLSTM's results, with and without resets, judged by nn.LSTM's."""
        reports = []
        for ours, theirs in PAIRS.items():
            exact = self.results(theirs, torch.float64)
            reports += compare_results(self.results(ours), self.results(theirs), exact)
        return reports


def run(shape: Shape, share: float, seconds: float) -> dict[str, Any]:
    """Rows and ratios, as plain values for JSON.

    Raises:
        RuntimeError: a result is wrong.
    """
    step = TrainingStep(shape, share)
    wrong = [report for report in step.check() if not report.ok]
    if wrong:
        raise RuntimeError(f"wrong result: {wrong[0]}")
    timings = measure({name: step.call(name) for name in CONTENDERS}, budget_s=seconds)
    rows = [
        {
            "contender": name,
            "median_s": timing.median_s,
            "spread": timing.spread,
            "samples": timing.samples,
            "calls_per_sample": timing.calls_per_sample,
            "tokens_per_s": shape.tokens / timing.median_s,
        }
        for name, timing in timings.items()
    ]
    ratios = {
        name: {
            "ratio": timings[above].median_s / timings[below].median_s,
            "spread": math.hypot(timings[above].spread, timings[below].spread),
        }
        for name, (above, below) in RATIOS.items()
    }
    return {"resets": int(step.starts.sum()), "rows": rows, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("T", 128, "steps"),
        ("B", 128, "sequences"),
        ("I", 64, "input size"),
        ("H", 256, "hidden size"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument(
        "--share", type=float, default=0.03, help="of steps that start an episode (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, all contenders together")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if min(arguments.T, arguments.B, arguments.I, arguments.H, arguments.threads) < 1:
        parser.error("sizes and threads must be at least 1")
    if not 0 <= arguments.share <= 1:
        parser.error(f"--share must be in [0, 1], got {arguments.share}")
    if arguments.json:
        try:
            record.ensure_writable(arguments.json)
        except ValueError as error:
            parser.error(str(error))
    shape = Shape(T=arguments.T, B=arguments.B, I=arguments.I, H=arguments.H, state=True)
    with num_threads(arguments.threads):
        settings = {"shape": shape.name, "share": arguments.share, "seconds": arguments.seconds}
        provenance = record.provenance(settings)
        result = run(shape, arguments.share, arguments.seconds)
    print(f"{shape.name}, {result['resets']} resets, {arguments.threads} threads; forward and backward")
    print(f"{'contender':<30} {'median':>10} {'spread':>7} {'tokens/s':>9}")
    for row in result["rows"]:
        rate = record.format_rate(row["tokens_per_s"])
        print(f"{row['contender']:<30} {row['median_s'] * 1e3:>7.1f} ms {row['spread']:>7.0%} {rate:>9}")
    for name, ratio in result["ratios"].items():
        print(f"{name:<30} {ratio['ratio']:>9.2f}{record.TIMES} {ratio['spread']:>7.0%}")
    if arguments.json:
        record.write(arguments.json, provenance | result)


if __name__ == "__main__":
    main()

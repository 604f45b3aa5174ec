"""One layer of FastLSTM beside other people's LSTMs, in one process: FlashRNN, torchrl's kernels, a compiled loop.

    python benchmarks/peers.py --json FILE [--problems NAMES] [--contenders NAMES]

What is timed goes from x to y, the product with x included, in inference and with the gradients of x and of the
parameters. Each contender's y stands beside the exact one first; who misses it is not timed. What is not installed or
fails is listed with its reason. FlashRNN (pip install flashrnn) compiles its kernels when it first meets a size, which
takes minutes; it and torchrl (pip install torchrl) need a GPU. FILE is rewritten as results come in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastlstm import FastLSTM, reference
from fastlstm.bench import record, runner, timing
from fastlstm.bench.shapes import DTYPES, SHORT_DTYPES

# Of y, relative to its 2-norm: what rounding in the dtype can come to over a sequence, and no mistake stays below.
LARGEST_ERROR = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-2}
Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """A layer, and the share of steps before which the state becomes zero."""

    T: int
    B: int
    H: int  # and the input size
    dtype: str
    resets: float = 0.0

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"T{self.T}-B{self.B}-H{self.H}-{SHORT_DTYPES[self.dtype]}" + "-resets" * (self.resets > 0)


# The sizes of FlashRNN's published timings, a common one, and those of recurrent reinforcement learning.
PROBLEMS = [
    Problem(1024, 16, 768, "bfloat16"),
    Problem(512, 64, 512, "bfloat16"),
    Problem(1024, 16, 768, "float16"),
    Problem(128, 128, 256, "float32", resets=0.03),
]
TINY = [Problem(5, 3, 32, "float32"), Problem(5, 3, 32, "float32", resets=0.3)]


class Layer:
    """The tensors of a problem.

    Attributes:
        x: [T, B, I].
        weights: w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H], as nn.LSTM orders them.
        reset_mask: bool [T, B], or None.
        d_y: [T, B, H].
    """

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = problem
        generator = torch.Generator(device).manual_seed(0)
        dtype, H = DTYPES[problem.dtype], problem.H

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        self.x = normal(problem.T, problem.B, H).requires_grad_()
        sizes: list[tuple[int, ...]] = [(4 * H, H), (4 * H, H), (4 * H,), (4 * H,)]
        self.weights = [
            ((torch.rand(size, generator=generator, device=device) * 2 - 1) / H**0.5).to(dtype).requires_grad_()
            for size in sizes
        ]
        self.d_y = normal(problem.T, problem.B, H)
        draws = torch.rand(problem.T, problem.B, generator=generator, device=device)
        self.reset_mask = draws < problem.resets if problem.resets else None

    def exact(self) -> Tensor:
        """The y of the reference in float64."""
        with torch.no_grad():
            zeros = self.x.new_zeros(1, *self.x.shape[1:], dtype=torch.float64)
            weights = [w.double() for w in self.weights]
            y, _, _ = reference.lstm(self.x.double(), weights, zeros, zeros, reset_mask=self.reset_mask)
        return y

    def zeros(self, *lead: int) -> Tensor:
        """[*lead, B, H]."""
        return self.x.new_zeros(*lead, self.problem.B, self.problem.H)


def _module(layer: Layer, kind: type[nn.Module]) -> Any:
    """A module of this class whose parameters are the layer's."""
    H, x = layer.problem.H, layer.x
    module = kind(H, H, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), layer.weights, strict=True):
            parameter.copy_(weight)
    layer.weights = list(module.parameters())
    return module


def _fastlstm(layer: Layer) -> Forward:
    module = _module(layer, FastLSTM)
    return lambda: module(layer.x, reset_mask=layer.reset_mask)[0]


def _torch(layer: Layer) -> Forward:
    if layer.reset_mask is not None:
        raise NotImplementedError("nn.LSTM has no resets")
    module = _module(layer, nn.LSTM)

    def forward() -> Tensor:
        module.train(torch.is_grad_enabled())  # cuDNN then keeps what a backward pass needs
        y: Tensor = module(layer.x)[0]
        return y

    return forward


def _loop(layer: Layer) -> Forward:
    """A loop over steps, each of which torch.compile has fused; the product with x is taken before them."""
    torch.compiler.reset()  # or the sizes of all problems count as one function's, of which it compiles only so many
    _, w_hh, b_ih, b_hh = layer.weights
    mask = layer.reset_mask

    @torch.compile
    def step(gates_x: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        if reset is not None:
            h, c = (s.masked_fill(reset.unsqueeze(1), 0) for s in (h, c))
        i, f, g, o = (gates_x + linear(h, w_hh)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def forward() -> Tensor:
        h, c, outputs = layer.zeros(), layer.zeros(), []
        gates_x = linear(layer.x, layer.weights[0], b_ih + b_hh)
        for t in range(layer.problem.T):
            h, c = step(gates_x[t], h, c, w_hh, None if mask is None else mask[t])
            outputs.append(h)
        return torch.stack(outputs)

    return forward


def _flashrnn(backend: str) -> Callable[[Layer], Forward]:
    def contender(layer: Layer) -> Forward:
        from flashrnn.flashrnn import FlashRNNConfig, flashrnn

        if layer.reset_mask is not None:
            raise NotImplementedError("FlashRNN has no resets")
        p = layer.problem
        config = FlashRNNConfig(
            backend=backend,
            function="lstm",
            hidden_dim=p.H,
            num_heads=1,
            batch_size=p.B,
            dtype=p.dtype,
            input_shape="TBGHD",
            output_shape="STBHD",
        )
        _, w_hh, b_ih, b_hh = layer.weights

        def forward() -> Tensor:
            gates_x = linear(layer.x, layer.weights[0]).view(p.T, p.B, 4, 1, p.H)
            bias = (b_ih + b_hh).view(4, 1, p.H)
            states = layer.zeros(2, 1).view(2, 1, p.B, 1, p.H)
            h, _ = flashrnn(gates_x, w_hh.view(4, 1, p.H, p.H), bias, states, config=config)
            y: Tensor = h[0].reshape(p.T, p.B, p.H)
            return y

        return forward

    return contender


def _torchrl(compute: str) -> Callable[[Layer], Forward]:
    def contender(layer: Layer) -> Forward:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        p = layer.problem
        if p.dtype != "float32":
            raise NotImplementedError("torchrl's kernels take float32")
        w_ih, w_hh, b_ih, b_hh = layer.weights
        starts = layer.x.new_zeros(p.B, p.T, dtype=torch.bool) if layer.reset_mask is None else layer.reset_mask.t()
        starts = starts.contiguous()
        states = layer.x.new_zeros(p.B, p.T, p.H)  # after a reset, for each step

        def forward() -> Tensor:
            x = layer.x.transpose(0, 1).contiguous()
            weights = (w_ih, w_hh, b_ih, b_hh)
            y: Tensor = lstm_triton(x, states, states, *weights, starts, DTYPES[compute], input_precision="tf32")[0]
            return y.transpose(0, 1)

        return forward

    return contender


CONTENDERS: dict[str, Callable[[Layer], Forward]] = {
    "fastlstm": _fastlstm,
    "torch": _torch,
    "compiled loop": _loop,
    "flashrnn fused": _flashrnn("cuda_fused"),
    "flashrnn alternating": _flashrnn("cuda"),
    "flashrnn triton": _flashrnn("triton_fused"),
    "torchrl": _torchrl("float32"),
    "torchrl bfloat16 products": _torchrl("bfloat16"),
}


def _inference(forward: Forward) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            forward()

    return call


def _training(layer: Layer, forward: Forward) -> Callable[[], None]:
    leaves = [layer.x, *layer.weights]
    return lambda: torch.autograd.backward(forward(), layer.d_y, inputs=leaves)


def measure(problem: Problem, contenders: list[str], device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of a problem: for each contender its error and its times, or why it has none."""
    exact = Layer(problem, device).exact()
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, dict[str, Callable[[], None]]] = {"forward": {}, "forward_backward": {}}
    for name in contenders:
        row: dict[str, Any] = {"problem": problem.name, "contender": name}
        layer = Layer(problem, device)
        try:
            forward = CONTENDERS[name](layer)
            with torch.no_grad():
                error = ((forward().double() - exact).norm() / exact.norm()).item()
            row["error"] = error
            if not error <= LARGEST_ERROR[problem.dtype]:
                raise ArithmeticError(f"y is off by {error:.2g} of its norm")
            training = _training(layer, forward)
            training()
        except Exception as error:  # whatever a peer raises, the others are measured
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            _end_where_the_gpu_is_lost(name, device, text)
            yield row | {"failure": text}
            continue
        rows[name] = row
        calls["forward"][name], calls["forward_backward"][name] = _inference(forward), training
    clock = runner.seconds_on_gpu(torch.device(device)) if device != "cpu" else None
    for pass_, of_pass in calls.items():
        timings = timing.measure(of_pass, budget_s=seconds * len(of_pass), min_samples=5, seconds_of=clock)
        for name, t in timings.items():
            rows[name][pass_] = {"median_s": t.median_s, "spread": t.spread, "samples": t.samples}
    yield from rows.values()


def _end_where_the_gpu_is_lost(contender: str, device: str, text: str) -> None:
    """Ends the run if a kernel failed: no call of this process can succeed after that."""
    try:
        if device != "cpu":
            torch.cuda.synchronize(device)
    except RuntimeError:
        sys.exit(f"peers.py: {contender} has lost the CUDA context ({text}); leave it out with --contenders")


def _line(row: dict[str, Any], ours: dict[str, Any] | None) -> str:
    cells = [f"{row['problem']:<28} {row['contender']:<26}"]
    if "failure" in row:
        return f"{cells[0]} {row['failure']}"
    for pass_ in ("forward", "forward_backward"):
        median = row[pass_]["median_s"]
        ratio = f"{median / ours[pass_]['median_s']:.2f}" if ours else "-"
        cells.append(f"{median * 1e3:9.3f} ms {ratio:>6}")
    return " ".join([*cells, f"error {row['error']:.1e}"])


def main() -> int:
    """Returns 1 if FastLSTM itself failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", default="cuda", help="cpu tries everything on tiny problems")
    parser.add_argument("--problems", help="comma-separated names; all by default")
    parser.add_argument("--contenders", help="comma-separated names; all by default")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each problem, pass and contender")
    arguments = parser.parse_args()
    known = {problem.name: problem for problem in (TINY if arguments.device == "cpu" else PROBLEMS)}

    def chosen(option: str, text: str | None, names: list[str]) -> list[str]:
        wanted = text.split(",") if text else names
        if unknown := set(wanted) - set(names):
            parser.error(f"--{option} must be some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
        return wanted

    problems = chosen("problems", arguments.problems, list(known))
    contenders = chosen("contenders", arguments.contenders, list(CONTENDERS))
    if arguments.json:
        record.ensure_writable(arguments.json)
    if arguments.device != "cpu":
        runner.reach_working_clock(arguments.device)
        # As LSTMs do by default: products of float32 are TF32 for everybody.
        matmul: Any = torch.backends.cuda.matmul  # whose stub lacks it
        matmul.fp32_precision = "tf32"
    document = record.provenance({"seconds": arguments.seconds}, arguments.device) | {"rows": []}
    print(f"{'problem':<28} {'contender':<26} {'inference':>12} {'times':>6} {'training':>12} {'times':>6}")
    for name in problems:
        rows = list(measure(known[name], contenders, arguments.device, arguments.seconds))
        ours = next((row for row in rows if row["contender"] == "fastlstm" and "failure" not in row), None)
        for row in rows:
            print(_line(row, ours), flush=True)
        document["rows"] += rows
        if arguments.json:
            record.write(arguments.json, document)
    failed = [row for row in document["rows"] if row["contender"] == "fastlstm" and "failure" in row]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

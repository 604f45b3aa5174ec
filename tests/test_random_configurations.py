"""FastLSTM against nn.LSTM in 300 random configurations: output, states and every gradient.

The exact result both are measured against is nn.LSTM's in fp64; the tolerance is the rule of tolerance.py.
"""

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from tolerance import assert_all_accurate
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastlstm import FastLSTM

SIZES = [1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 33]


@dataclass(frozen=True)
class Configuration:
    """One problem. ``lengths`` makes it packed; ``batch`` is None for unbatched input."""

    seed: int
    dtype: torch.dtype
    steps: int
    batch: int | None
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    proj_size: int
    bias: bool
    batch_first: bool
    lengths: tuple[int, ...] | None
    with_state: bool
    differentiable: tuple[bool, ...]  # x, h_0, c_0, then the parameters in turn
    used_outputs: tuple[bool, bool, bool]  # which of y, h_n, c_n the loss depends on


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    steps = draw(st.integers(1, 9))
    layout = draw(st.sampled_from(["padded", "padded", "packed", "unbatched"]))
    batch = None if layout == "unbatched" else draw(st.sampled_from([0, *SIZES] if layout == "padded" else SIZES))
    hidden_size = draw(st.sampled_from(SIZES))
    projected = hidden_size > 1 and draw(st.booleans())
    lengths = None
    if layout == "packed":
        lengths = tuple(draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch)))
    return Configuration(
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from([torch.float32] * 4 + [torch.float64] * 2 + [torch.bfloat16, torch.float16])),
        steps=steps,
        batch=batch,
        input_size=draw(st.sampled_from(SIZES)),
        hidden_size=hidden_size,
        num_layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.integers(1, hidden_size - 1)) if projected else 0,
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        lengths=lengths,
        with_state=draw(st.booleans()),
        differentiable=tuple(draw(st.lists(st.sampled_from([True, True, False]), min_size=4, max_size=8))),
        used_outputs=draw(st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any)),
    )


def run(module: nn.Module, problem: Configuration) -> dict[str, Tensor]:
    """Output, states and, where the problem asks for them, gradients of ``module``, by name.

    Everything random is drawn here, from the problem's seed and in fp64, so that each caller sees the same
    data.
    """
    generator = torch.Generator().manual_seed(problem.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(problem.dtype).to(dtype)

    dtype = next(module.parameters()).dtype
    batch = () if problem.batch is None else (problem.batch,)
    states = problem.num_layers * (2 if problem.bidirectional else 1)
    leading = (*batch, problem.steps) if problem.batch_first else (problem.steps, *batch)
    leaves = {"x": draw(*leading, problem.input_size)}
    if problem.with_state:
        leaves["h_0"] = draw(states, *batch, problem.proj_size or problem.hidden_size)
        leaves["c_0"] = draw(states, *batch, problem.hidden_size)
    leaves |= dict(module.named_parameters())
    for index, leaf in enumerate(leaves.values()):
        leaf.requires_grad_(problem.differentiable[index % len(problem.differentiable)])

    x: Tensor | PackedSequence = leaves["x"]
    if problem.lengths is not None:
        lengths = torch.tensor(problem.lengths)
        x = pack_padded_sequence(leaves["x"], lengths, problem.batch_first, enforce_sorted=False)
    y, (h_n, c_n) = module(x, (leaves["h_0"], leaves["c_0"]) if problem.with_state else None)
    results = {"y": y.data if isinstance(y, PackedSequence) else y, "h_n": h_n, "c_n": c_n}
    used = [t for t, wanted in zip(results.values(), problem.used_outputs, strict=True) if wanted]
    if any(leaf.requires_grad for leaf in leaves.values()):
        torch.autograd.backward(used, [draw(*t.shape) for t in used])
    for name, leaf in leaves.items():
        # Zeros and None say the same of a leaf that the used outputs do not depend on.
        if leaf.requires_grad:
            results[f"d_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        else:
            assert leaf.grad is None
    return results


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_matches_nn_lstm(problem: Configuration) -> None:
    options = {
        "num_layers": problem.num_layers,
        "bias": problem.bias,
        "batch_first": problem.batch_first,
        "bidirectional": problem.bidirectional,
        "proj_size": problem.proj_size,
    }
    torch.manual_seed(problem.seed)
    torchs = nn.LSTM(problem.input_size, problem.hidden_size, **options, dtype=problem.dtype)
    torch.manual_seed(problem.seed)
    ours = FastLSTM(problem.input_size, problem.hidden_size, **options, dtype=problem.dtype)
    exact = nn.LSTM(problem.input_size, problem.hidden_size, **options, dtype=torch.float64)
    exact.load_state_dict(torchs.state_dict())
    assert_all_accurate(run(ours, problem), run(torchs, problem), run(exact, problem))

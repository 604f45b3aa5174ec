"""What FastLSTM does beyond nn.LSTM, timed against how one does it without, and against FastLSTM without it.

    python benchmarks/features.py --json FILE

Each group is a training step, forward and backward with all gradients, its contenders in turns in one process, after
their results have been compared. Opacus, for gradients per sample, takes part where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastlstm import FastLSTM
from fastlstm.bench import record
from fastlstm.bench.runner import num_threads
from fastlstm.bench.timing import measure

Step = Callable[[], Any]


@dataclass(frozen=True)
class Group:
    """Contenders that do the same, or the same with something added.

    Attributes:
        name: what is measured, with the shape.
        steps: name -> a training step.
        ratios: name -> the contenders whose times it compares, (divided, divisor).
    """

    name: str
    steps: dict[str, Step]
    ratios: dict[str, tuple[str, str]]


def training_step(module: nn.Module, x: Tensor, forward: Callable[[nn.Module, Tensor], Tensor]) -> Step:
    """Gradients of all parameters and of x, of the sum of squares of what `forward` returns."""
    leaves = [x, *module.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(module, x).square().sum().backward()

    return step


def compared(steps: dict[str, Step], gradients_of: dict[str, list[Tensor]]) -> None:
    """Raise unless all contenders leave the same gradients, up to rounding."""
    found = {}
    for name, leaves in gradients_of.items():
        steps[name]()
        found[name] = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    first, *others = found.values()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-3)


def lengths(T: int, B: int, H: int) -> Group:
    """Padded sequences of lengths spread evenly from T / 4 to T, in no order."""
    torchs = nn.LSTM(H, H)
    ours = FastLSTM.from_torch(torchs)
    x = torch.randn(T, B, H, requires_grad=True)
    of_rows = torch.linspace(T / 4, T, B).round().to(torch.int64)[torch.randperm(B)]

    def packed(module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = pad_packed_sequence(module(pack_padded_sequence(x, of_rows, enforce_sorted=False))[0])[0]
        return y

    steps = {
        "lengths": training_step(ours, x, lambda module, x: module(x, lengths=of_rows)[0]),
        "FastLSTM, packed": training_step(ours, x, packed),
        "nn.LSTM, packed": training_step(torchs, x, packed),
    }
    compared(steps, {name: [x, *ours.parameters()] for name in steps})
    ratios = {f"{other} / lengths": (other, "lengths") for other in steps if other != "lengths"}
    return Group(f"lengths T{T}-B{B}-H{H}", steps, ratios)


def per_sample(T: int, B: int, H: int) -> Group:
    """Gradients of the parameters for each sample apart, as private training and influence functions need them."""
    module = FastLSTM(H, H)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    xs = torch.randn(B, T, H)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x,))[0].square().sum()

    def loop() -> dict[str, Tensor]:
        gradients = []
        for x in xs:
            module.zero_grad()
            module(x)[0].square().sum().backward()
            gradients.append({name: p.grad for name, p in module.named_parameters()})
        return {name: torch.stack([g[name] for g in gradients]) for name in weights}  # type: ignore[misc]

    def together() -> dict[str, Tensor]:
        found: dict[str, Tensor] = vmap(grad(loss), (None, 0))(weights, xs)
        return found

    def batch() -> None:
        module.zero_grad()
        module(xs.transpose(0, 1))[0].square().sum().backward()

    steps: dict[str, Step] = {"vmap(grad)": together, "loop over samples": loop, "the sum alone": batch}
    expected = loop()
    for name, gradient in together().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)
    try:
        steps["Opacus DPLSTM"] = opacus_step(module, xs, expected)
    except ImportError:
        print("Opacus is not installed: left out")
    ratios = {f"{other} / vmap(grad)": (other, "vmap(grad)") for other in steps if other != "vmap(grad)"}
    return Group(f"gradients per sample T{T}-B{B}-H{H}", steps, ratios)


def opacus_step(module: FastLSTM, xs: Tensor, expected: dict[str, Tensor]) -> Step:
    """The same by Opacus, whose LSTM is written anew in modules that have per-sample gradients."""
    from opacus.grad_sample import GradSampleModule
    from opacus.layers import DPLSTM

    private = DPLSTM(module.input_size, module.hidden_size, batch_first=True)
    private.load_state_dict(module.state_dict())
    sampled = GradSampleModule(private, batch_first=True, loss_reduction="sum")

    def step() -> None:
        sampled.zero_grad(set_to_none=True)
        sampled(xs)[0].square().sum().backward()

    step()
    for name, parameter in private.named_parameters():
        torch.testing.assert_close(parameter.grad_sample, expected[name], rtol=1e-3, atol=1e-3)
    return step


def regularisers(T: int, B: int, H: int) -> Group:
    """What each costs; their results are random and are compared by the tests."""
    given: dict[str, dict[str, Any]] = {
        "none": {},
        "weight_dropout": {"weight_dropout": 0.5},
        "recurrent_dropout": {"recurrent_dropout": 0.25},
        "zoneout": {"zoneout": (0.15, 0.5)},
        "layer_norm": {"layer_norm": True},
        "the four": {"weight_dropout": 0.5, "recurrent_dropout": 0.25, "zoneout": (0.15, 0.5), "layer_norm": True},
    }
    x = torch.randn(T, B, H, requires_grad=True)
    modules = {name: FastLSTM(H, H, **arguments) for name, arguments in given.items()}
    steps = {name: training_step(module, x, lambda module, x: module(x)[0]) for name, module in modules.items()}
    ratios = {f"speed with {name}": ("none", name) for name in given if name != "none"}
    return Group(f"regularisers T{T}-B{B}-H{H}", steps, ratios)


def states(T: int, B: int, H: int) -> Group:
    """Cell states that are returned, gates that are computed again, resets, and resets to given states."""
    module = FastLSTM(H, H)
    recomputing = copy.deepcopy(module)
    recomputing.recompute = True
    x = torch.randn(T, B, H, requires_grad=True)
    hx = (torch.randn(1, B, H), torch.randn(1, B, H))
    mask = torch.rand(T, B) < 0.03

    def cells(module: nn.Module, x: Tensor) -> Tensor:
        y, _, cell_states = module(x, hx, return_cell_states=True)
        return y + cell_states

    steps = {
        "plain": training_step(module, x, lambda module, x: module(x, hx)[0]),
        "return_cell_states": training_step(module, x, cells),
        "recompute": training_step(recomputing, x, lambda module, x: module(x, hx)[0]),
        "reset_mask": training_step(module, x, lambda module, x: module(x, hx, reset_mask=mask)[0]),
        "reset_hx": training_step(module, x, lambda module, x: module(x, hx, reset_mask=mask, reset_hx=hx)[0]),
    }
    compared(steps, {"plain": [*module.parameters()], "recompute": [*recomputing.parameters()]})
    ratios = {f"speed with {name}": ("plain", name) for name in steps if name != "plain"}
    return Group(f"states T{T}-B{B}-H{H}", steps, ratios)


GROUPS: dict[str, tuple[Callable[[int, int, int], Group], list[tuple[int, int, int]]]] = {
    "lengths": (lengths, [(100, 32, 128), (100, 32, 512)]),
    "per_sample": (per_sample, [(100, 64, 256)]),
    "regularisers": (regularisers, [(100, 32, 128), (100, 32, 512), (50, 64, 1024)]),
    "states": (states, [(100, 32, 128), (100, 32, 512)]),
}


def timed(group: Group, seconds: float) -> dict[str, Any]:
    """The group's rows and ratios, as plain values for JSON."""
    timings = measure(group.steps, budget_s=seconds)
    rows = [
        {"contender": name, "median_s": t.median_s, "spread": t.spread, "samples": t.samples}
        for name, t in timings.items()
    ]
    ratios = [
        {
            "name": name,
            "ratio": timings[above].median_s / timings[below].median_s,
            "spread": math.hypot(timings[above].spread, timings[below].spread),
        }
        for name, (above, below) in group.ratios.items()
    ]
    return {"group": group.name, "rows": rows, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("T", "B", "H"), help="one for all groups, not each its own"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each group")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if min(arguments.shape or [1]) < 1 or arguments.threads < 1:
        parser.error("sizes and threads must be at least 1")
    if arguments.json:
        try:
            record.ensure_writable(arguments.json)
        except ValueError as error:
            parser.error(str(error))
    torch.manual_seed(0)
    results = []
    with num_threads(arguments.threads):
        provenance = record.provenance({"threads": arguments.threads, "seconds_each": arguments.seconds})
        for make, shapes in (GROUPS[name] for name in arguments.groups):
            for shape in [arguments.shape] if arguments.shape else shapes:
                result = timed(make(*shape), arguments.seconds)
                print(f"{result['group']}, {arguments.threads} threads")
                for row in result["rows"]:
                    print(f"  {row['contender']:<36} {row['median_s'] * 1e3:>9.2f} ms {row['spread']:>6.0%}")
                for ratio in result["ratios"]:
                    print(f"  {ratio['name']:<36} {ratio['ratio']:>9.2f}{record.TIMES}  {ratio['spread']:>6.0%}")
                results.append(result)
    if arguments.json:
        record.write(arguments.json, provenance | {"groups": results})


if __name__ == "__main__":
    main()

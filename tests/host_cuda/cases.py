"""Problems for the emulated CUDA operators, and the comparison of what comes out with the fp64 reference.

The bounds are not torch's accuracy times a factor, as in tolerance.py: torch has no LSTM of these elements on the CPU.
They are two to four times the largest error of an element in 1700 random cases; in bf16 a case in a thousand, with
gradients of one or two numbers, comes closer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from host_cuda import emulated
from torch import Tensor

from fastlstm import reference

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
DEVICES = [(132, 227 * 1024), (108, 163 * 1024), (58, 99 * 1024)]  # H100, A100, L4: SMs and shared memory of a block

# Of an element: the largest error of a tensor relative to its 2-norm, and that of a single number relative to the
# largest number of its tensor. The second finds one wrong number in a big tensor. Tensors whose numbers are all smaller
# than a tenth count as if they were not: they can be sums that cancel, of which rounding is all that is left.
LEAST_NUMBER = 0.1
BOUNDS = {
    "bf16": (2e-2, 4e-2),
    "fp16": (3e-3, 5e-3),
    "tf32": (3e-3, 6e-3),
    "fp32": (3e-6, 4e-6),
    "fp64": (3e-15, 4e-15),
}

# What a step may have beyond the cell, and how the rows of 4 steps of 9 sequences may lie.
EXTRAS: dict[str, dict[str, Any]] = {
    "reset states": {"resets": 0.3, "reset_states": True},
    "recurrent dropout": {"recurrent_dropout": True},
    "zoneout masks": {"zoneout": (0.3, 0.2)},
    "zoneout rates": {"zoneout": (0.3, 0.2), "zoneout_masks": False},
    "zoneout of h": {"zoneout": (0.3, 0)},
    "zoneout of c": {"zoneout": (0, 0.2)},
    "cell states": {"cell_layers": 1},
}
_ALL_EXTRAS = {name: value for extra in EXTRAS.values() for name, value in extra.items()} | {"zoneout": (0.3, 0.2)}
EXTRAS |= {
    "everything": _ALL_EXTRAS | {"zoneout_masks": True},
    "everything of all layers, recomputed": _ALL_EXTRAS | {"cell_layers": 2, "recompute": True},
    "layer norm": {"layer_norm": True},
    "layer norm, recomputed": {"layer_norm": True, "recompute": True},
    "layer norm and everything": _ALL_EXTRAS | {"zoneout_masks": True, "layer_norm": True},
}
LAYOUTS: list[dict[str, Any]] = [{}, {"batch_sizes": (9, 7, 7, 2)}, {"lengths": (4, 0, 2, 4, 5, 1, 3, -1, 4)}]

Shape = tuple[int, ...]  # octets, tiles, groups, layers, steps of a run; zeros are the planner's choice


@dataclass(frozen=True)
class Case:
    """One problem, how it is computed, and the seeds of its data and of the scheduler."""

    family: str
    element: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    L: int = 1
    D: int = 1
    bias: bool = True
    batch_sizes: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    resets: float = 0  # share of the steps that the reset mask marks; 0: there is no mask
    dropout: bool = False
    reset_states: bool = False  # what resets set
    recurrent_dropout: bool = False
    zoneout: tuple[float, float] = (0, 0)  # parts of h and of c that keep their value
    zoneout_masks: bool = True  # of elements, kept or not; otherwise every element is kept in part
    cell_layers: int = 0  # that return their cell states
    recompute: bool = False
    layer_norm: bool = False
    groups: int = 1  # of rows of the batch, each with gradients of the weights of its own
    h_0_scale: float = 1
    weight_scale: float = 1  # of the recurrent weights
    nan_at: tuple[str, int] | None = None  # x, h_0, c_0, w_hh of the first direction, or d_y, and which number is NaN
    gradients: tuple[bool, ...] = (True, True, True, True)  # given: those of y, h_n, c_n and the cell states
    # Gradients of x, the states, each weight in turn, the reset states: repeated as often as needed.
    needs: tuple[bool, ...] = (True,)
    forward_shape: Shape = ()
    backward_shape: Shape = ()
    device: tuple[int, int] = DEVICES[0]
    offset: int = 0  # by how many elements inputs miss an address that suits loads of 16 bytes
    poison: bool = True
    data_seed: int = 0
    seed: int = 0  # of the scheduler

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.element]

    @property
    def resets_launches(self) -> int:
        """Kernels beside the recurrence: what each step read as h, where rows of y do not say it."""
        return self.L * self.D if self.resets or self.lengths or self.batch_sizes else 0

    @property
    def weights_per_direction(self) -> int:
        return 2 + 2 * self.bias + (self.P > 0) + 4 * self.layer_norm


@dataclass
class Inputs:
    """The tensors of a case."""

    x: Tensor
    h_0: Tensor
    c_0: Tensor
    weights: list[Tensor]
    gradients: list[Tensor | None]
    needs: list[int]
    options: dict[str, Any]  # of the operator

    def of_columns(self, columns: slice) -> Inputs:
        """Those of some rows of the batch."""

        def part(t: Tensor | None, dim: int) -> Tensor | None:
            return None if t is None else t[(slice(None),) * dim + (columns,)]

        dims = {"lengths": 0, "reset_mask": 1, "reset_h": 1, "reset_c": 1, "recurrent_mask": 1}
        dims |= {"dropout_mask": 2, "zoneout_h": 2, "zoneout_c": 2}
        options = {n: part(option, dims[n]) if n in dims else option for n, option in self.options.items()}
        gradients = [part(g, dim) for g, dim in zip(self.gradients, (1, 1, 1, 2), strict=False)]
        states = [t[:, columns] for t in (self.x, self.h_0, self.c_0)]
        return Inputs(*states, self.weights, gradients, self.needs, options)


def guarded(t: Tensor, offset: int = 0) -> Tensor:
    """A copy between guards of NaN, so that reading beyond its ends shows, ``offset`` elements off an aligned place."""
    guard = 64
    fill = float("nan") if t.is_floating_point() else t.dtype != torch.bool and -(2**40)
    memory = torch.full((t.numel() + 2 * guard + offset,), fill, dtype=t.dtype)
    inner = memory[guard + offset : guard + offset + t.numel()].view(t.shape)
    return inner.copy_(t)


def make_inputs(case: Case) -> Inputs:
    """The data of a case, drawn in fp64 and rounded."""
    generator = torch.Generator().manual_seed(case.data_seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def place(t: Tensor) -> Tensor:
        return guarded(t.to(case.dtype), case.offset)

    out = case.P or case.H
    rows = (case.T, case.B) if case.batch_sizes is None else (sum(case.batch_sizes),)
    weights = []
    for layer in range(case.L):
        shapes = [(4 * case.H, case.I if layer == 0 else case.D * out), (4 * case.H, out)]
        shapes += [(4 * case.H,)] * 2 if case.bias else []
        shapes += [(case.P, case.H)] if case.P else []
        for _ in range(case.D):
            for shape in shapes:
                uniform = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
                weights.append(place(uniform * case.H**-0.5))
            if case.layer_norm:  # with greater gains, steps make errors larger than they were
                weights += [place(0.4 + 0.1 * normal(size)) for size in (4 * case.H, 4 * case.H, case.H)]
                weights.append(place(0.1 * normal(case.H)))
    for recurrent in weights[1 :: case.weights_per_direction]:
        recurrent.mul_(case.weight_scale)
    states = case.L * case.D
    inputs: dict[str, Any] = {
        "x": place(normal(*rows, case.I)),
        "h_0": place(normal(states, case.B, out) * case.h_0_scale),
        "c_0": place(normal(states, case.B, case.H)),
        "w_hh": weights[1],
    }
    shapes = [(*rows, case.D * out), (states, case.B, out), (states, case.B, case.H)]
    shapes += [(case.cell_layers * case.D, *rows, case.H)] if case.cell_layers else []
    gradients = [place(normal(*shape)) if given else None for shape, given in zip(shapes, case.gradients, strict=False)]
    inputs["d_y"] = gradients[0]
    if case.nan_at is not None:
        inputs[case.nan_at[0]].view(-1)[case.nan_at[1]] = float("nan")
    options: dict[str, Any] = {"num_layers": case.L, "bidirectional": case.D == 2, "has_bias": case.bias}
    options["reduced_products"] = case.element != "fp32"
    if case.batch_sizes is not None:
        options["batch_sizes"] = torch.tensor(case.batch_sizes)
    if case.lengths is not None:
        options["lengths"] = guarded(torch.tensor(case.lengths))
    if case.resets:
        options["reset_mask"] = guarded(torch.rand(rows, generator=generator) < case.resets)
    if case.dropout:
        kept = torch.rand((case.L - 1, *rows, case.D * out), generator=generator) < 0.7
        options["dropout_mask"] = place(kept / 0.7)
    if case.reset_states:
        options["reset_h"], options["reset_c"] = (place(normal(states, case.B, size)) for size in (out, case.H))
    if case.recurrent_dropout:
        options["recurrent_mask"] = place((torch.rand((states, case.B, out), generator=generator) < 0.7) / 0.7)
    for name, part, size in zip("hc", case.zoneout, (out, case.H), strict=True):
        if part and case.zoneout_masks:
            options[f"zoneout_{name}"] = guarded(torch.rand((states, *rows, size), generator=generator) < part)
        elif part:
            options[f"zoneout_rate_{name}"] = part
    options |= {"cell_layers": case.cell_layers, "recompute": case.recompute, "layer_norm": case.layer_norm}
    needs = [int(case.needs[i % len(case.needs)]) for i in range(2 + len(weights) + case.reset_states)]
    return Inputs(inputs["x"], inputs["h_0"], inputs["c_0"], weights, gradients, needs, options)


def names_of(case: Case) -> list[str]:
    """Of the results, in the order of both functions below."""
    count = case.L * case.D * case.weights_per_direction
    outputs = ["y", "h_n", "c_n", *["cell_states"] * (case.cell_layers > 0)]
    resets = ["d_reset_h", "d_reset_c"] * case.reset_states
    return [*outputs, "d_x", "d_h_0", "d_c_0", *(f"d_weights[{i}]" for i in range(count)), *resets]


def expected(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """All results of the fp64 reference."""
    results = _expected(case, inputs)
    if case.groups > 1:
        size = case.B // case.groups
        parts = [_expected(case, inputs.of_columns(slice(b, b + size))) for b in range(0, case.B, size)]
        for name, whole in results.items():
            if name.startswith("d_weights") and whole.numel() > 0:
                results[name] = torch.stack([part[name] for part in parts])
    return results


def _expected(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    wanted = [inputs.needs[0], inputs.needs[1], *inputs.needs[1:], *inputs.needs[-1:] * case.reset_states]
    options = inputs.options
    resets = [options["reset_h"], options["reset_c"]] if case.reset_states else []
    leaves = [t.double().requires_grad_() for t in (inputs.x, inputs.h_0, inputs.c_0, *inputs.weights, *resets)]
    taken = ("num_layers", "bidirectional", "has_bias", "batch_sizes", "lengths", "reset_mask")
    taken += ("cell_layers", "layer_norm")
    masks = ("dropout_mask", "recurrent_mask")
    outputs = reference.lstm(
        leaves[0],
        leaves[3 : 3 + len(inputs.weights)],
        leaves[1],
        leaves[2],
        reset_states=(leaves[-2], leaves[-1]) if case.reset_states else None,
        zoneout_h=options.get("zoneout_h", options.get("zoneout_rate_h", 0.0)),
        zoneout_c=options.get("zoneout_c", options.get("zoneout_rate_c", 0.0)),
        **{name: options[name] for name in taken if name in options},
        **{name: options[name].double() for name in masks if name in options},
    )
    results = [t.detach() for t in outputs]
    given = [(o, g.double()) for o, g in zip(outputs, inputs.gradients, strict=True) if g is not None]
    if given:
        gradients = torch.autograd.grad(
            [o for o, _ in given], leaves, [g for _, g in given], allow_unused=True, materialize_grads=True
        )
    else:
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
    results += [g if w else torch.empty(0) for g, w in zip(gradients, wanted, strict=True)]
    return dict(zip(names_of(case), results, strict=True))


def computed(case: Case, inputs: Inputs, backward: bool = True, forward_family: str = "") -> dict[str, Tensor]:
    """All results of the emulated operators. Of a forward pass by another family, backward alone is the case's."""
    emulated.device(*case.device)
    emulated.poison(case.poison)
    emulated.seed(case.seed)
    with emulated.force(forward_family or case.family, *case.forward_shape):
        *outputs, saved, cells = emulated.lstm(inputs.x, inputs.weights, inputs.h_0, inputs.c_0, **inputs.options)
    outputs += cells
    if not backward:
        return dict(zip(names_of(case), outputs, strict=False))
    with emulated.force(case.family, *case.backward_shape):
        *gradients, weights, resets = emulated.lstm_backward(
            inputs.gradients,
            *(inputs.x, inputs.weights, inputs.h_0, inputs.c_0),
            *(outputs[0], saved, inputs.needs),
            **inputs.options,
            groups=case.groups,
        )
    results = dict(zip(names_of(case), [*outputs, *gradients, *weights, *resets], strict=True))
    places = [t.untyped_storage().data_ptr() for t in results.values() if t.numel() > 0]
    assert len(set(places)) == len(places), f"{case}: results share memory, so who changes one changes another"
    return results


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """The two of BOUNDS."""
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = (actual.double() - exact).abs()
    norm = max(exact.norm().item(), LEAST_NUMBER / 2 * exact.numel() ** 0.5)
    return difference.norm().item() / norm, difference.max().item() / max(exact.abs().max().item(), LEAST_NUMBER)


def compare(case: Case, actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Assert that results are right, NaN in the same places included, and return their errors."""
    found = {}
    for name, result in actual.items():
        reference_result = exact[name]
        assert result.shape == reference_result.shape, f"{case}: {name} has shape {tuple(result.shape)}"
        assert result.dtype == case.dtype, f"{case}: {name} is {result.dtype}"
        nans = reference_result.isnan()
        assert torch.equal(result.isnan(), nans), (
            f"{case}: {name} is NaN at {result.isnan().nonzero().tolist()[:20]}, "
            f"the reference at {nans.nonzero().tolist()[:20]}"
        )
        found[name] = errors(result.masked_fill(nans, 0), reference_result.masked_fill(nans, 0))
    for name, pair in found.items():
        assert all(error <= bound for error, bound in zip(pair, BOUNDS[case.element], strict=True)), (
            f"{case}: {name} has errors {pair[0]:.2e} (norm) and {pair[1]:.2e} (largest), "
            f"allowed are {BOUNDS[case.element]}"
        )
    return found


def check(case: Case, backward: bool = True, forward_family: str = "") -> dict[str, tuple[float, float]]:
    """Run a case, forward and backward, and assert that all results are right."""
    inputs = make_inputs(case)
    try:
        actual = computed(case, inputs, backward, forward_family)
    except RuntimeError as error:
        raise AssertionError(f"{case}: {error}") from error
    return compare(case, actual, expected(case, inputs))


def random_case(family: str, seed: int) -> Case:
    """A small problem with a random choice of everything a problem can have."""
    draw = random.Random(f"{family} {seed}")
    more = {"stepwise": ["fp32", "fp64"], "warpgroup": []}.get(family, ["fp32"])
    element = draw.choice(["bf16", "bf16", "fp16", "tf32", *more])
    T, L, D = draw.randint(1, 6), draw.choice([1, 1, 2]), draw.choice([1, 2])
    B = draw.choice([1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 20])
    # Gradients of very few units can cancel: then nothing but their rounding is left.
    least = 1 if element == "fp64" else 4
    if family in ("stepwise", "streamed"):
        H = draw.randint(least, 64 if family == "streamed" and draw.random() < 0.5 else 20)
        if draw.random() < 0.06:  # rows of more than one block
            H, T, B, L, D = draw.choice([256, 257, 300]), min(T, 3), min(B, 5), 1, 1
    elif family == "resident":
        most = 64 if element in ("tf32", "fp32") else 128
        H = draw.choice([draw.randint(least, 40), draw.randint(least, 40), draw.randint(41, most)])
    else:
        H = draw.choice([draw.randint(8, 64), draw.randint(8, 64), draw.randint(65, 96)])
        if draw.random() < 0.06:
            H, T, B, L, D = draw.choice([256, 300]), min(T, 3), min(B, 9), 1, 1
    keeps_weights = family in ("resident", "persistent", "warpgroup")
    if keeps_weights and draw.random() < 0.4:  # several launches, of layers at the same time
        T, L = draw.randint(5, 14), draw.choice([1, 2, 3])
    if family == "warpgroup":  # whole octets
        H = -(-H // 8) * 8
    batch_sizes = lengths = None
    layout = draw.choice(["full", "full", "packed", "lengths"])
    if layout == "packed":
        batch_sizes = (B, *sorted((draw.randint(1, B) for _ in range(T - 1)), reverse=True))
    elif layout == "lengths":
        lengths = tuple(draw.choice([0, T, draw.randint(0, T), draw.randint(-1, T + 2)]) for _ in range(B))
        if draw.random() < 0.2:
            lengths = lengths[:1] * B
    case = Case(
        family=family,
        element=element,
        T=T,
        B=B,
        I=draw.randint(1, 5),
        H=H,
        P=draw.randint(1, H - 1) if H > 1 and draw.random() < 0.4 else 0,
        L=L,
        D=D,
        bias=draw.random() < 0.7,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=draw.choice([0, 0, 0.3]),
        dropout=L > 1 and draw.random() < 0.5,
        h_0_scale=draw.choice([1, 1, 5]),
        gradients=draw.choice(
            [(True,) * 4] * 3 + [(True, False, False, True), (False, True, True, True), (True, True, False, False)]
        ),
        needs=draw.choice([(True,)] * 4 + [tuple(draw.random() < 0.6 for _ in range(5)) for _ in range(2)]),
        device=draw.choice(DEVICES[:1] if family == "warpgroup" else DEVICES),
        offset=draw.choice([0, 0, 0, 1, 3]),
        poison=draw.random() < 0.5,
        data_seed=seed,
        seed=draw.randrange(2**32),
    )
    if draw.random() < 0.3:
        groups = [g for g in range(1, B + 1) if B % g == 0 and batch_sizes is None]
        case = replace(case, recompute=draw.random() < 0.7, groups=draw.choice(groups or [1]))
    if family == "stepwise" and draw.random() < 0.5:
        case = replace(
            case,
            reset_states=case.resets > 0 and draw.random() < 0.6,
            recurrent_dropout=draw.random() < 0.5,
            zoneout=draw.choice([(0, 0), (0.3, 0.2), (0.3, 0), (0, 0.2)]),
            zoneout_masks=draw.random() < 0.5,
            cell_layers=draw.randint(0, L),
        )
    if family == "stepwise" and draw.random() < 0.4:
        case = normalised(case, draw.randint(8, 16), draw.choice([draw.randint(16, 40), draw.randint(513, 530)]))
    while not all(runs(case, (), backward) for backward in (False, True)):
        H = case.H // 2 // 8 * 8 if family == "warpgroup" else case.H // 2
        case = replace(case, H=H, P=min(case.P, H - 1))
    return replace(
        case,
        forward_shape=random_shape(draw, case, backward=False),
        backward_shape=random_shape(draw, case, backward=True),
    )


def normalised(case: Case, features: int, units: int) -> Case:
    """With layer normalisation. What is normalised knows nothing of its scale, so gradients of few numbers cancel."""
    return replace(case, layer_norm=True, I=features, H=units, P=min(8 * case.P, units - 1))


def random_shape(draw: random.Random, case: Case, backward: bool) -> Shape:
    """A shape that the device can run, or the planner's choice."""
    if case.family == "stepwise":
        return ()
    octets, tiles, groups = draw.choice([0, 1, 2, 4]), draw.choice([0, 1, 2, 4, 8]), draw.choice([0, 0, 1, 2])
    layers, run_steps = draw.choice([0, case.L]), draw.choice([0, 4, 8])
    for candidate in ((octets, tiles, groups), (octets, 0, groups), (0, 0, groups)):
        for whole in ((*candidate, layers, run_steps), (*candidate, 0, run_steps)):
            if runs(case, whole, backward):
                return whole
    return ()


def runs(case: Case, shape: Sequence[int], backward: bool) -> bool:
    """Whether the planner has a plan of this shape."""
    emulated.device(*case.device)
    with emulated.force(case.family, *shape):
        return emulated.plan(backward, case.element, case.T, case.B, case.H, case.P, case.L, case.D) is not None

"""The registered operators, below the modules: every plan and instruction set forced, against the fp64 reference.

Sizes lie around the widths of vectors and tiles (4, 8, 16 lanes; 6 rows; chunks of 36 rows; slices of 256 terms and of
1024 rows), because that is where indexing goes wrong.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tolerance import assert_all_accurate
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastlstm
from fastlstm import _ops, reference
from fastlstm._operators import Extras, Options, reference_of_options
from fastlstm.bench.workload import permit_bf16_products
from fastlstm.verify import compare


@dataclass(frozen=True)
class Case:
    """One problem of the operator.

    ``lengths`` are those of the B sequences: of a packed sequence if they are sorted, of a padded batch if not.
    ``resets`` is the share of steps that a reset mask marks. ``extras``: "reset_hx", "recurrent_mask", "zoneout" with
    masks, "average" for zoneout with rates, "cells" of all layers or "last_cells", "recompute", "layer_norm".
    """

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    L: int = 1
    D: int = 1
    bias: bool = True
    lengths: tuple[int, ...] = ()
    resets: float = 0
    dropout: bool = False
    extras: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        flags = [f"P{self.P}"] * (self.P > 0) + ["nobias"] * (not self.bias) + ["dropout"] * self.dropout
        flags += ["packed"] * self.packed + ["lengths"] * (bool(self.lengths) and not self.packed)
        flags += ["resets"] * bool(self.resets) + [*self.extras] + [str(self.dtype).removeprefix("torch.")]
        return "-".join([f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-L{self.L}-D{self.D}", *flags])

    @property
    def packed(self) -> bool:
        return bool(self.lengths) and list(self.lengths) == sorted(self.lengths, reverse=True)


CASES = [
    Case(T=1, B=1, I=1, H=1),
    Case(T=2, B=3, I=5, H=7),
    Case(T=3, B=6, I=8, H=8),
    Case(T=3, B=7, I=9, H=9, bias=False),
    Case(T=2, B=13, I=16, H=15),
    Case(T=2, B=2, I=17, H=17, D=2),
    Case(T=40, B=5, I=3, H=12),
    Case(T=2, B=97, I=4, H=33),
    Case(T=2, B=3, I=257, H=31),
    Case(T=2, B=2, I=3, H=260),
    Case(T=4, B=4, I=6, H=10, L=3, D=2, dropout=True),
    Case(T=5, B=3, I=6, H=19, P=5, L=2, D=2, dropout=True),
    Case(T=3, B=2, I=4, H=40, P=33),
    Case(T=6, B=5, I=7, H=11, D=2, lengths=(6, 5, 5, 2, 1)),
    Case(T=9, B=8, I=4, H=18, L=2, D=2, lengths=(9, 9, 9, 4, 3, 3, 1, 1), dropout=True),
    Case(T=4, B=3, I=4, H=13, P=6, D=2, lengths=(4, 4, 2), bias=False),
    Case(T=7, B=5, I=6, H=18, resets=0.3),
    Case(T=6, B=4, I=3, H=9, P=4, L=2, D=2, resets=0.3, dropout=True),
    Case(T=9, B=6, I=4, H=17, L=2, D=2, lengths=(9, 8, 8, 4, 3, 1), resets=0.3),
    Case(T=7, B=6, I=5, H=10, L=2, D=2, lengths=(3, 0, 7, 1, 7, 2), dropout=True),
    Case(T=8, B=5, I=5, H=33, D=2, lengths=(2, 0, 0, 6, 5), resets=0.4),  # no sequence reaches the end
    Case(T=6, B=3, I=5, H=12, P=7, lengths=(1, 6, 4), resets=0.3),
    Case(T=100, B=32, I=16, H=24),  # sums over 3200 rows: rounding errors grow along a chain of so many terms
    # More rows than a chunk of a backward pass has: 4 and 3 steps, then 2, 2 and 1.
    Case(T=7, B=250, I=3, H=5, P=2, L=2, D=2, dropout=True),
    Case(T=5, B=400, I=4, H=6, D=2, lengths=(5,) * 99 + (4,) * 101 + (2,) * 199 + (1,), resets=0.1),
    Case(T=6, B=5, I=7, H=18, resets=0.3, extras=("reset_hx", "recurrent_mask", "zoneout")),
    Case(T=5, B=4, I=5, H=19, P=6, L=2, D=2, resets=0.3, extras=("reset_hx", "recurrent_mask", "zoneout", "cells")),
    Case(T=7, B=4, I=3, H=9, D=2, lengths=(7, 4, 4, 1), resets=0.3, extras=("reset_hx", "zoneout", "recompute")),
    Case(
        T=7,
        B=5,
        I=5,
        H=10,
        L=3,
        lengths=(3, 0, 7, 1, 5),
        resets=0.3,
        extras=("recurrent_mask", "zoneout", "last_cells"),
    ),
    Case(T=6, B=6, I=5, H=17, L=2, D=2, resets=0.4, dropout=True, extras=("average", "reset_hx", "cells", "recompute")),
    Case(T=3, B=4, I=4, H=13, P=5, bias=False, extras=("recompute", "zoneout", "last_cells")),
    Case(T=1, B=2, I=4, H=7, resets=1, extras=("reset_hx", "recurrent_mask", "zoneout", "cells")),
    Case(T=7, B=250, I=3, H=5, L=2, resets=0.1, extras=("reset_hx", "recurrent_mask", "recompute")),
]
FORCED = [(plan, isa) for plan in fastlstm.plans() for isa in fastlstm.available_isas()]


@dataclass
class Problem:
    """The tensors of a case, in its dtype."""

    case: Case
    x: Tensor
    weights: list[Tensor]
    h_0: Tensor
    c_0: Tensor
    batch_sizes: Tensor | None
    lengths: Tensor | None
    reset_mask: Tensor | None
    dropout_mask: Tensor | None
    extras: Extras

    @classmethod
    def of(cls, case: Case) -> Problem:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

        out, states = case.P or case.H, case.L * case.D
        batch_sizes, lengths = None, None
        shape: tuple[int, ...] = (case.T, case.B)
        if case.lengths and not case.packed:
            lengths = torch.tensor(case.lengths)
        elif case.lengths:
            batch_sizes = torch.tensor([sum(n > t for n in case.lengths) for t in range(case.T)])
            shape = (sum(case.lengths),)
        scale = 1 / case.H**0.5
        weights = []
        for k in range(states):
            width = case.I if k < case.D else case.D * out
            weights += [draw(4 * case.H, width) * scale, draw(4 * case.H, out) * scale]
            weights += [draw(4 * case.H), draw(4 * case.H)] * case.bias
            weights += [draw(case.P, case.H) * scale] * (case.P > 0)
            if "layer_norm" in case.extras:
                sizes = (4 * case.H, 4 * case.H, case.H)
                weights += [*(1 + draw(size) / 4 for size in sizes), draw(case.H) / 4]
        keep = torch.rand((case.L - 1, *shape, case.D * out), generator=generator) < 0.7

        def marks(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) < 0.4

        has = {name: name in case.extras for name in ("reset_hx", "recurrent_mask", "zoneout", "average", "recompute")}
        extras = Extras(
            reset_h=draw(states, case.B, out) if has["reset_hx"] else None,
            reset_c=draw(states, case.B, case.H) if has["reset_hx"] else None,
            recurrent_mask=(marks(states, case.B, out) * 2.5).to(case.dtype) if has["recurrent_mask"] else None,
            zoneout_h=marks(states, *shape, out) if has["zoneout"] else None,
            zoneout_c=marks(states, *shape, case.H) if has["zoneout"] else None,
            zoneout_rate_h=0.25 if has["average"] else 0.0,
            zoneout_rate_c=0.125 if has["average"] else 0.0,
            cell_layers=case.L if "cells" in case.extras else int("last_cells" in case.extras),
            recompute=has["recompute"],
            layer_norm="layer_norm" in case.extras,
        )
        return cls(
            case=case,
            x=draw(*shape, case.I),
            weights=weights,
            h_0=draw(states, case.B, out),
            c_0=draw(states, case.B, case.H),
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset_mask=torch.rand(shape, generator=generator) < case.resets if case.resets else None,
            dropout_mask=(keep / 0.7).to(case.dtype) if case.dropout else None,
            extras=extras,
        )

    @property
    def options(self) -> dict[str, object]:
        case = self.case
        return {
            "num_layers": case.L,
            "bidirectional": case.D == 2,
            "has_bias": case.bias,
            "batch_sizes": self.batch_sizes,
            "lengths": self.lengths,
            "reset_mask": self.reset_mask,
            "dropout_mask": self.dropout_mask,
        }

    def solve(self, function: object, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and all gradients of ``function``, computed in ``dtype`` from the same values."""
        resets = [t for t in (self.extras.reset_h, self.extras.reset_c) if t is not None]
        inputs = [self.x, self.h_0, self.c_0, *self.weights, *resets]
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        x, h_0, c_0, *others = leaves
        weights, resets = others[: len(self.weights)], others[len(self.weights) :]
        extras = self.extras._replace(**dict(zip(("reset_h", "reset_c"), resets, strict=False)))
        if extras.recurrent_mask is not None:
            extras = extras._replace(recurrent_mask=extras.recurrent_mask.to(dtype))
        mask = None if self.dropout_mask is None else self.dropout_mask.to(dtype)
        options = self.options | {"dropout_mask": mask, "extras": extras}
        outputs = function(x, weights, h_0, c_0, **options)  # type: ignore[operator]
        generator = torch.Generator().manual_seed(2)
        drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        d_outputs = [d.to(self.case.dtype).to(dtype) for d in drawn]
        d_inputs = torch.autograd.grad(outputs, leaves, d_outputs)
        names = ["y", "h_n", "c_n", *["cells"] * (len(outputs) - 3), "d_x", "d_h_0", "d_c_0"]
        names += [f"d_weights[{i}]" for i in range(len(weights))] + ["d_reset_h", "d_reset_c"][: len(resets)]
        return {name: t.detach() for name, t in zip(names, [*outputs, *d_inputs], strict=True)}


def plain_pytorch(x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The reference, called like `_ops.lstm`."""
    return reference_of_options(x, weights, h_0, c_0, Options(**options, reduced_products=False))


@functools.cache
def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What plain PyTorch computes in the case's dtype, and the exact results."""
    problem = Problem.of(case)
    return problem.solve(plain_pytorch, case.dtype), problem.solve(plain_pytorch, torch.float64)


def check(case: Case) -> None:
    assert_all_accurate(Problem.of(case).solve(_ops.lstm, case.dtype), *expected(case))


def legal(case: Case, plan: str) -> bool:
    return not (plan == "unpacked" and case.P)


@pytest.mark.parametrize(("plan", "isa"), FORCED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_plan_and_isa(case: Case, plan: str, isa: str) -> None:
    if not legal(case, plan):
        with fastlstm.force(plan, isa), pytest.raises(ValueError, match="does not support proj_size > 0"):
            check(case)
        return
    with fastlstm.force(plan, isa):
        check(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("plan", "isa"), FORCED)
@pytest.mark.parametrize("case", [CASES[9], CASES[10], CASES[14]], ids=str)
def test_other_dtypes(case: Case, plan: str, isa: str, dtype: torch.dtype) -> None:
    with fastlstm.force(plan, isa):
        check(replace(case, dtype=dtype))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("split", ["rows", "units"])
@pytest.mark.parametrize("case", [case for case in CASES if case.T > 1], ids=str)
def test_splits_among_threads(case: Case, split: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for plan, bulk_input in itertools.product(("packed", "unpacked"), (False, True)):
        if legal(case, plan):
            with fastlstm.force(plan, split=split, bulk_input=bulk_input):
                check(case)


@pytest.mark.parametrize("isa", fastlstm.available_isas())
def test_weights_beyond_the_caches(isa: str) -> None:
    """Weights of more than 8 MB: several chunks of rows share one pass over them, and 300 rows take two passes."""
    for bulk_input, B in ((False, 40), (True, 40), (True, 300)):
        with fastlstm.force("packed", isa, split="rows", bulk_input=bulk_input):
            check(Case(T=1, B=B, I=3001, H=180))


@contextlib.contextmanager
def bf16_products(isa: str | None = None, split: str | None = None) -> Iterator[None]:
    with permit_bf16_products(), fastlstm.force("packed", isa, split=split, products="bf16"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", fastlstm.available_isas())
@pytest.mark.parametrize("case", CASES[1:], ids=str)  # a single element has no scale to measure rounding by
def test_bf16_products(case: Case, isa: str, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    full, exact = expected(case)
    torchs = Problem.of(case).solve(plain_pytorch, torch.bfloat16)
    with bf16_products(isa):
        ours = Problem.of(case).solve(_ops.lstm, dtype)
    for name, tensor in ours.items():
        report = compare(name, tensor, torchs[name], exact[name], dtype=torch.bfloat16)
        assert report.ok, str(report)
    if dtype == torch.float32:
        assert (ours["y"] - full["y"]).abs().max() > 1e-5, "nothing was rounded"


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("split", ["rows", "units"])
@pytest.mark.parametrize("case", [CASES[9], CASES[12], CASES[15], CASES[16]], ids=str)
def test_bf16_products_do_not_depend_on_threads(case: Case, split: str, threads: int) -> None:
    with bf16_products():
        alone = Problem.of(case).solve(_ops.lstm, case.dtype)
    torch.set_num_threads(threads)
    with bf16_products(split=split):
        together = Problem.of(case).solve(_ops.lstm, case.dtype)
    for name, tensor in alone.items():
        if name == "d_x" or name.startswith("d_weights"):  # sums of the library's GEMM
            torch.testing.assert_close(together[name], tensor)
        else:
            assert torch.equal(together[name], tensor), name


@pytest.mark.parametrize("isa", fastlstm.available_isas())
def test_bf16_products_round_to_nearest_even(isa: str) -> None:
    """With one term in each sum, products of rounded factors are full products of factors rounded before."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 300, 1, generator=generator)
    tie = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], dtype=torch.int32).view(torch.float32)
    x[0, :4, 0] = tie
    x[0, 4:7, 0] = torch.tensor([float("nan"), float("inf"), 1e-30])
    h_0, c_0 = torch.randn(2, 1, 300, 1, generator=generator)
    weights = list(torch.randn(4, 4, 1, generator=generator))
    weights[2:] = [b.flatten() for b in weights[2:]]
    options = (None, None, None, None, 1, False, True)
    with bf16_products(isa):
        rounded = _ops.lstm(x, weights, h_0, c_0, *options)
    x, h_0, *weights[:2] = (t.bfloat16().float() for t in (x, h_0, *weights[:2]))
    with fastlstm.force("packed", isa, bulk_input=False):
        expected = _ops.lstm(x, weights, h_0, c_0, *options)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", fastlstm.available_isas())
def test_bf16_products_round_whole_rows_alike(isa: str) -> None:
    """Values that are rounded before give the same: in vectors of a row, in its remainder, in every packed matrix."""
    p = Problem.of(Case(T=1, B=5, I=37, H=35, P=33))
    inputs = [p.x, *p.weights[:2], p.weights[4], p.h_0]
    for k, t in enumerate(inputs):
        bits = t.view(torch.int32)
        ties = torch.rand(t.shape, generator=torch.Generator().manual_seed(k)) < 0.3
        bits[ties] = bits[ties] & -65536 | 0x8000  # half-way between two neighbours
    with bf16_products(isa):
        unrounded = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
        for t in inputs:
            t.copy_(t.bfloat16())
        rounded = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
    torch.testing.assert_close(unrounded, rounded, rtol=0, atol=0)


def test_bf16_products_need_permission_and_the_packed_plan() -> None:
    p = Problem.of(CASES[1])
    arguments = (p.x, p.weights, p.h_0, p.c_0)
    with fastlstm.force(products="bf16"), pytest.raises(ValueError, match="needs bfloat16 tensors, or float32 and"):
        _ops.lstm(*arguments, **p.options)
    with bf16_products(), fastlstm.force("stepwise", products="bf16"), pytest.raises(ValueError, match="'packed'"):
        _ops.lstm(*arguments, **p.options)


def test_many_threads_split_the_hidden_units() -> None:
    """B = 1 leaves rows to one thread, so the planner splits units where they are many."""
    torch.set_num_threads(2)
    assert fastlstm.plan(T=20, B=1, I=300, H=600).forward_split == "units"
    check(Case(T=20, B=1, I=300, H=600))


def test_uninitialised_memory_is_never_read() -> None:
    """Fresh memory is filled with bytes that read as -1.7e38, so whatever is used before it is written shows."""
    script = "import test_ops; [test_ops.check_all_plans(case) for case in test_ops.CASES]"
    env = dict(os.environ, MALLOC_PERTURB_="1", PYTHONPATH=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def check_all_plans(case: Case) -> None:
    for plan in fastlstm.plans():
        if legal(case, plan):
            with fastlstm.force(plan):
                check(case)
    with bf16_products():
        assert all(t.isfinite().all() for t in Problem.of(case).solve(_ops.lstm, case.dtype).values())


@pytest.fixture(params=[CASES[1], CASES[11], CASES[13], CASES[17], CASES[19]], ids=str)
def arguments(request: pytest.FixtureRequest) -> Iterator[tuple[object, ...]]:
    p = Problem.of(request.param)
    weights = [w.requires_grad_() for w in p.weights]
    case = p.case
    options = (p.batch_sizes, p.lengths, p.reset_mask, p.dropout_mask, case.L, case.D == 2, case.bias, False)
    yield (p.x, weights, p.h_0, p.c_0, *options)


def test_opcheck_forward(arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(torch.ops.fastlstm.lstm.default, (*arguments, True))


def test_opcheck_forward_without_saving(arguments: tuple[object, ...]) -> None:
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.fastlstm.lstm.default,
            (*arguments, False),
            test_utils=["test_schema", "test_faketensor"],
        )


def test_opcheck_backward(arguments: tuple[object, ...]) -> None:
    x, weights, h_0, c_0, *options = arguments
    with torch.no_grad():
        y, h_n, _, saved, _ = torch.ops.fastlstm.lstm(*arguments, True)
        needs = [1, 0] + [1, 0] * (len(weights) // 2)  # type: ignore[arg-type]
        backward = (y, h_n, None, x, weights, h_0, c_0, y, saved, *options, needs)
        torch.library.opcheck(
            torch.ops.fastlstm.lstm_backward.default, backward, test_utils=["test_schema", "test_faketensor"]
        )
        d_x, d_h_0, _, d_weights, _ = torch.ops.fastlstm.lstm_backward(*backward)
    assert d_x.shape == x.shape  # type: ignore[attr-defined]
    assert d_h_0.numel() == 0
    assert [w.numel() > 0 for w in d_weights] == [bool(n) for n in needs[2:]]


def test_saves_by_grad_mode_alone() -> None:
    p = Problem.of(CASES[1])
    with torch.no_grad():
        *_, saved, _ = torch.ops.fastlstm.lstm(
            p.x, p.weights, p.h_0, p.c_0, None, None, None, None, 1, False, True, False, False
        )
    assert saved == []
    y, _, _ = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
    assert not y.requires_grad
    y, _, _ = _ops.lstm(p.x.requires_grad_(), p.weights, p.h_0, p.c_0, **p.options)
    assert y.requires_grad


def test_backward_without_saving_says_so() -> None:
    p = Problem.of(CASES[1])
    x = p.x.requires_grad_()
    y, *_ = torch.ops.fastlstm.lstm(x, p.weights, p.h_0, p.c_0, None, None, None, None, 1, False, True, False, False)
    with pytest.raises(RuntimeError, match="save=True"):
        y.sum().backward()


def test_backward_twice_gives_the_same() -> None:
    p = Problem.of(CASES[10])
    x = p.x.requires_grad_()
    y, _, _ = _ops.lstm(x, p.weights, p.h_0, p.c_0, **p.options)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("trainable", [0, 1, 2])
def test_lower_layers_are_frozen(trainable: int) -> None:
    """Backward stops at the lowest layer that needs a gradient; what it computes is not affected."""
    p = Problem.of(Case(T=3, B=2, I=4, H=5, L=3, D=2, dropout=True))
    first = trainable * 2 * 4
    frozen, free = p.weights[:first], [w.requires_grad_() for w in p.weights[first:]]
    gradients = []
    for function in (_ops.lstm, reference.lstm):
        y, _, _ = function(p.x, [*frozen, *free], p.h_0, p.c_0, **p.options)
        gradients.append(torch.autograd.grad(y.sum(), free))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("plan", fastlstm.plans())
def test_input_products_of_chunks(plan: str) -> None:
    """In inference they stand in a buffer of a chunk, in training where the gates of all steps are saved."""
    p = Problem.of(Case(T=7, B=250, I=3, H=5, L=2, D=2))
    with fastlstm.force(plan, bulk_input=True):
        inference = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
        training = _ops.lstm(p.x.requires_grad_(), p.weights, p.h_0, p.c_0, **p.options)
    for output, expected in zip(inference, training, strict=True):
        torch.testing.assert_close(output, expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("plan", fastlstm.plans())
def test_chunks_of_steps_hand_on_gradients_that_nobody_asked_for(plan: str) -> None:
    p = Problem.of(Case(T=7, B=250, I=3, H=5))
    weights = [w.requires_grad_() for w in p.weights]

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        y, _, _ = _ops.lstm(p.x, weights, p.h_0, p.c_0, **p.options)
        return torch.autograd.grad(y.sum(), inputs)

    with fastlstm.force(plan):
        alone = gradients(*weights)
        *expected, _ = gradients(*weights, p.h_0.requires_grad_())
        for gradient, right in zip(alone, expected, strict=True):
            torch.testing.assert_close(gradient, right, rtol=0, atol=0)


def test_undefined_output_gradients_give_undefined_gradients() -> None:
    """As in nn.LSTM: a zero gradient would let an optimizer with weight decay move the parameters."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, d_y: Tensor) -> None:
            return None

    p = Problem.of(CASES[1])
    x = p.x.requires_grad_()
    y, _, _ = _ops.lstm(x, p.weights, p.h_0, p.c_0, **p.options)
    Nothing.apply(y).sum().backward()
    assert x.grad is None


def test_a_row_does_not_depend_on_its_batch() -> None:
    for input_size, hidden_size in ((9, 20), (7, 15), (15, 20), (11, 31), (16, 33)):
        check_rows_alone(Problem.of(Case(T=5, B=13, I=input_size, H=hidden_size)))


def check_rows_alone(p: Problem) -> None:
    for plan, isa in itertools.product(("packed", "unpacked"), fastlstm.available_isas()):
        with fastlstm.force(plan, isa, bulk_input=False):  # the planner may choose otherwise for one row
            y, _, _ = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
            for b in (0, 4, 12):
                rows = (t[:, b : b + 1].contiguous() for t in (p.x, p.h_0, p.c_0))
                x, h_0, c_0 = rows
                alone, _, _ = _ops.lstm(x, p.weights, h_0, c_0, **p.options)
                assert torch.equal(alone[:, 0], y[:, b]), (plan, isa, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_propagate_as_in_the_reference(value: float) -> None:
    p = Problem.of(Case(T=6, B=4, I=5, H=11, L=2, D=2))
    p.x[3, 1, 2] = value
    for plan in fastlstm.plans():
        for isa in fastlstm.available_isas():
            with fastlstm.force(plan, isa):
                outputs = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
            expected = reference.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
            for ours, exact in zip(outputs, expected, strict=True):
                torch.testing.assert_close(ours, exact, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_denormal_inputs_states_and_weights() -> None:
    p = Problem.of(Case(T=3, B=4, I=9, H=17))
    for t in (p.x, p.h_0, p.c_0, p.weights[0], p.weights[1]):
        t.mul_(1e-40)
    expected = reference.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
    for plan, isa in FORCED:
        with fastlstm.force(plan, isa):
            outputs = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", fastlstm.available_isas())
def test_sums_over_many_rows_are_cut_into_short_chains(isa: str) -> None:
    """Equal rows make the roundings of a sum add up instead of cancelling: the error grows with the chain's length.

    A chain of n terms is off by at most n units of roundoff. Products are cut after 256 rows, sums of biases' gradients
    after 1024.
    """
    rows, unit_of_roundoff = 4096, 2.0**-24
    x, h_0, c_0 = (torch.full((1, rows, 8), value) for value in (0.3, 0.7, 0.9))
    weights = [w.requires_grad_() for w in (torch.zeros(32, 8), torch.zeros(32, 8), torch.full((32,), 0.6))]
    weights.append(weights[2].detach().clone().requires_grad_())
    with fastlstm.force(isa=isa):
        y, _, _ = _ops.lstm(x, weights, h_0, c_0, None, None, None, None, 1, False, True)
        gradients = torch.autograd.grad(y.sum(), weights)
        y, _, _ = _ops.lstm(x[:, :1], weights, h_0[:, :1], c_0[:, :1], None, None, None, None, 1, False, True)
        of_one_row = torch.autograd.grad(y.sum(), weights)
    for gradient, one, chain in zip(gradients, of_one_row, (256, 256, 1024, 1024), strict=True):
        exact = one.double() * rows
        assert ((gradient - exact).abs() <= (chain + 8) * unit_of_roundoff * exact.abs()).all()


def test_saturated_gates() -> None:
    """Pre-activations far outside exp's range give gates of 1 and, but for the smallest normal number, 0."""
    for dtype in (torch.float32, torch.float64):
        for isa in fastlstm.available_isas():
            weights = [torch.zeros(4 * 5, 1, dtype=dtype), torch.zeros(4 * 5, 5, dtype=dtype)]
            bias = torch.tensor([1e4, -1e4, 1e4, 1e4], dtype=dtype).repeat_interleave(5)
            weights += [bias, torch.zeros_like(bias)]
            state = torch.full((1, 1, 5), 7.0, dtype=dtype)
            options = (None, None, None, None, 1, False, True)
            with fastlstm.force(isa=isa):
                y, _, c_n = _ops.lstm(torch.ones(1, 1, 1, dtype=dtype), weights, state, state, *options)
            assert torch.equal(c_n, torch.ones_like(c_n))  # i = 1, f = 0, g = 1
            torch.testing.assert_close(y, torch.ones_like(y).tanh(), rtol=1e-6, atol=0)
            weights[2] = torch.tensor([-1e4, 0.0, 1e4, 1e4], dtype=dtype).repeat_interleave(5)
            with fastlstm.force(isa=isa):
                _, _, i = _ops.lstm(torch.ones(1, 1, 1, dtype=dtype), weights, state, torch.zeros_like(state), *options)
            smallest = torch.finfo(dtype).smallest_normal
            assert ((i >= smallest) & (i <= 2 * smallest)).all(), "denormal numbers slow down what comes after"


OPERATOR_ERRORS = {
    "x must have shape": {"x": torch.zeros(2, 4, 5)},
    "h_0 must have shape": {"h_0": torch.zeros(2, 3, 7)},
    "c_0 must be": {"c_0": torch.zeros(3, 7)},
    "every weight must have the dtype of x, float32, got float64": {"w": torch.zeros(28, 5, dtype=torch.float64)},
    "W_ih must have shape \\[4H, I\\] = \\[28, 5\\], got \\[28, 6\\]": {"w": torch.zeros(28, 6)},
    "at least one time step": {"x": torch.zeros(0, 3, 5)},
    "float32, float64, bfloat16 or float16": {"x": torch.zeros(2, 3, 5, dtype=torch.int32)},
    "at least 1 and at most as many features as c_0, got 0 and 7": {"h_0": torch.zeros(1, 3, 0)},
    "at least 1 and at most as many features as c_0, got 7 and 0": {"c_0": torch.zeros(1, 3, 0)},
}


@pytest.mark.parametrize("message", OPERATOR_ERRORS, ids=lambda m: m[:20])
def test_operator_refuses(message: str) -> None:
    p = Problem.of(CASES[1])
    bad = {"x": p.x, "h_0": p.h_0, "c_0": p.c_0, "w": p.weights[0]} | OPERATOR_ERRORS[message]
    weights = [bad["w"], *p.weights[1:]]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlstm.lstm(
            bad["x"], weights, bad["h_0"], bad["c_0"], None, None, None, None, 1, False, True, False, False
        )


@pytest.mark.parametrize("name", ["h_0", "c_0", "every weight", "reset_mask", "dropout_mask", "lengths"])
def test_operator_refuses_another_device(name: str) -> None:
    p = Problem.of(Case(T=3, B=3, I=5, H=7, L=2, lengths=(2, 3, 3), resets=0.5, dropout=True))
    elsewhere = {name: torch.device("meta")}
    *weights, last = p.weights
    arguments = {
        "h_0": p.h_0,
        "c_0": p.c_0,
        "every weight": last,
        "lengths": p.lengths,
        "reset_mask": p.reset_mask,
        "dropout_mask": p.dropout_mask,
    }
    h_0, c_0, last, *options = (t if t is None else t.to(elsewhere.get(n, t.device)) for n, t in arguments.items())
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # for one tensor on meta the dispatcher calls the fake
    message = (
        f"{name} must be {'an int64 vector on the CPU' if name == 'lengths' else 'on the device of x, cpu, got meta'}"
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlstm.lstm.default.redispatch(
            kernel, p.x, [*weights, last], h_0, c_0, None, *options, 2, False, True, False, False
        )


def test_backward_refuses_another_device() -> None:
    p = Problem.of(CASES[1])
    arguments = (p.x, p.weights, p.h_0, p.c_0)
    options = (None, None, None, None, 1, False, True, False)
    y, h_n, _, saved, _ = torch.ops.fastlstm.lstm(*arguments, *options, True)
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    needs = [1] * (2 + len(p.weights))
    for d_y, d_h_n, kept, message in (
        (y.to("meta"), h_n, saved, "d_y must be on the device of x, cpu, got meta"),
        (y, h_n.to("meta"), saved, "d_h_n must be on the device of x, cpu, got meta"),
        (y, h_n, [t.to("meta") for t in saved], "saved must be passed as the forward pass returned it"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastlstm.lstm_backward.default.redispatch(
                kernel, d_y, d_h_n, None, *arguments, y, kept, *options, needs
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_saved_on_cuda(dtype: torch.dtype) -> None:
    """The fake's word alone, where there is no such device."""
    compute = torch.promote_types(dtype, torch.float32)
    with FakeTensorMode(), torch.device("cuda"):
        weights = [torch.empty(*sizes, dtype=dtype) for sizes in ((16, 3), (16, 4), (16, 4), (16, 4))]
        x, state = torch.empty(5, 2, 3, dtype=dtype), torch.empty(2, 2, 4, dtype=dtype)
        options = (None, None, None, None, 2, False, False, False)
        y, _, _, saved, _ = torch.ops.fastlstm.lstm(x, weights, state, state, *options, True)
    assert y.dtype == dtype
    assert [(list(t.shape), t.dtype, t.device.type) for t in saved] == [
        ([2, 10, 16], dtype, "cuda"),
        ([2, 10, 4], compute, "cuda"),
        ([1, 10, 4], dtype, "cuda"),
    ]


def test_who_permits_reduced_products() -> None:
    cudnn: Any = torch.backends.cudnn  # whose stubs lack the precision settings
    permitted = _ops.reduced_products_permitted
    assert (permitted("cpu"), permitted("cuda"), permitted("meta")) == (False, True, False), "torch's own defaults"
    with permit_bf16_products():
        assert (permitted("cpu"), permitted("cuda")) == (True, True)
    before = cudnn.rnn.fp32_precision
    try:
        cudnn.rnn.fp32_precision = "ieee"
        assert not permitted("cuda")
    finally:
        cudnn.rnn.fp32_precision = before
    # What cudnn.allow_tf32 sets, which opcheck has frozen.
    torch._C._set_cudnn_allow_tf32(False)
    try:
        assert not permitted("cuda")
    finally:
        torch._C._set_cudnn_allow_tf32(True)
    assert permitted("cuda")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([3, 2, 3], "non-increasing"),
        ([3, 3, 0], "positive"),
        ([2, 2, 2], "batch size of h_0"),
        ([3, 3], "sum"),
    ],
)
def test_operator_refuses_batch_sizes(sizes: list[int], message: str) -> None:
    p = Problem.of(Case(T=3, B=3, I=5, H=7, lengths=(3, 3, 2)))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlstm.lstm(
            p.x, p.weights, p.h_0, p.c_0, torch.tensor(sizes), None, None, None, 1, False, True, False, False
        )


EXTRAS_ERRORS: dict[str, dict[str, Any]] = {
    "reset_h and reset_c must be given together and with reset_mask": {"reset_h": torch.zeros(1, 3, 7)},
    "reset_h must have shape the shape of h_0 = [1, 3, 7], got [1, 3, 6]": {
        "reset_h": torch.zeros(1, 3, 6),
        "reset_c": torch.zeros(1, 3, 7),
    },
    "reset_c must have the dtype of x, float32, got float64": {
        "reset_h": torch.zeros(1, 3, 7),
        "reset_c": torch.zeros(1, 3, 7, dtype=torch.float64),
    },
    "recurrent_mask must have shape the shape of h_0 = [1, 3, 7], got [3, 7]": {"recurrent_mask": torch.zeros(3, 7)},
    "zoneout_h must be bool, got float32": {"zoneout_h": torch.zeros(1, 2, 3, 7)},
    "zoneout_c must have shape [L*D, *x.shape[:-1], features] = [1, 2, 3, 7], got [2, 3, 7]": {
        "zoneout_c": torch.zeros(2, 3, 7, dtype=torch.bool)
    },
    "zoneout_h must be given as a mask or as a rate, got both": {
        "zoneout_h": torch.zeros(1, 2, 3, 7, dtype=torch.bool),
        "zoneout_rate_h": 0.5,
    },
    "the rate of zoneout_c must be in [0, 1], got 1.5": {"zoneout_rate_c": 1.5},
    "cell_layers must be in [0, num_layers] = [0, 1], got 2": {"cell_layers": 2},
}


@pytest.mark.parametrize("message", EXTRAS_ERRORS)
def test_errors_of_the_rarer_arguments(message: str) -> None:
    x, state = torch.zeros(2, 3, 5), torch.zeros(1, 3, 7)
    weights = [torch.zeros(28, 5), torch.zeros(28, 7)]
    arguments = EXTRAS_ERRORS[message]
    mask = torch.zeros(2, 3, dtype=torch.bool) if len(arguments) == 2 and "reset_h" in arguments else None
    options = (None, None, mask, None, 1, False, False, False, False)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.fastlstm.lstm(x, weights, state, state, *options, **arguments)


def test_errors_of_backward_for_groups_and_cell_states() -> None:
    x, state = torch.zeros(2, 3, 5), torch.zeros(2, 3, 7)
    weights = [torch.zeros(28, 5), torch.zeros(28, 7)] * 2
    options = (None, None, None, None, 1, True, False, False)
    y, _, _, saved, _ = torch.ops.fastlstm.lstm(x, weights, state, state, *options, True)
    arguments = (y, None, None, x, weights, state, state, y, saved, *options, [1] * 6)
    for given, message in (
        ({"groups": 2}, "groups must be positive and divide B = 3, of rows that are not packed, got 2"),
        ({"groups": 0}, "groups must be positive and divide B = 3, of rows that are not packed, got 0"),
        ({"d_cell_states": torch.zeros(1, 2, 3, 7)}, "d_cell_states must be of whole layers, got shape [1, 2, 3, 7]"),
        (
            {"d_cell_states": torch.zeros(2, 2, 3, 6)},
            "d_cell_states must have shape [cell_layers * D, *x.shape[:-1], H]",
        ),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            torch.ops.fastlstm.lstm_backward(*arguments, **given)


@pytest.mark.parametrize("case", [CASES[19], CASES[26], CASES[28]], ids=str)
def test_gradients_of_groups_add_up(case: Case) -> None:
    """Of each sequence apart, and of the sequences of no steps none."""
    case = replace(case, B=case.B - case.B % 2, lengths=case.lengths[: case.B - case.B % 2])
    p = Problem.of(replace(case, dtype=torch.float64))
    options = Options(**p.options, reduced_products=False, extras=p.extras)  # type: ignore[arg-type]
    y, _, _, saved, _ = torch.ops.fastlstm.lstm(p.x, p.weights, p.h_0, p.c_0, *options.of_forward(True))
    needs = [1] * (2 + len(p.weights) + (p.extras.reset_h is not None))

    def gradients(groups: int) -> list[Tensor]:
        arguments = options.of_backward(needs, groups=groups)
        d_y = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return torch.ops.fastlstm.lstm_backward(d_y, None, None, p.x, p.weights, p.h_0, p.c_0, y, saved, *arguments)[3]

    whole = gradients(1)
    for groups in (2, case.B):
        for apart, together in zip(gradients(groups), whole, strict=True):
            assert apart.shape == (groups, *together.shape)
            torch.testing.assert_close(apart.sum(0), together)
            if case.lengths and groups == case.B:
                nothing = torch.tensor(case.lengths) == 0
                assert not apart[nothing].any() and apart[~nothing].flatten(1).any(1).all()

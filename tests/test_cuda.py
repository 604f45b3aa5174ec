"""The CUDA kernels: everything the CPU's are tested for, and what only a GPU can get wrong.

`pytest -m cuda` runs this file alone. The yardstick is nn.LSTM on the same GPU, that is cuDNN, in the same dtype and
with the same permission for TF32: of every output and gradient our error against float64 may be twice its error plus a
rounding floor. The families are forced one by one over sizes around their tiles, because that is where indexing goes
wrong; afterwards come streams, graphs, stale memory, NaN and sizes beyond 32 bits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from host_cuda import cases
from test_ops import CASES, Case
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastlstm
from fastlstm import FastLSTM, FastLSTMCell, _ops, reference, swap_lstm
from fastlstm._operators import Extras
from fastlstm.bench.workload import tf32_products
from fastlstm.verify import compare

DEVICE = "cuda"
PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# The tables of what a family reaches hold from this size on; smaller GPUs skip what they cannot hold.
MULTIPROCESSORS = 132
GIB = 1 << 30


def reason_to_skip() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return "" if fastlstm.build_info()["cuda"] else "fastlstm was built without CUDA"


if reason_to_skip():
    pytest.skip(reason_to_skip(), allow_module_level=True)

FAMILIES = ("stepwise", "streamed", "resident", "persistent")
HIDDEN_OF_FAMILIES = [("stepwise", 40), ("streamed", 40), ("resident", 40), ("persistent", 40), ("persistent", 512)]
if torch.cuda.get_device_capability() == (9, 0) and "sm_90a" in fastlstm.build_info()["cuda"]:
    FAMILIES += ("warpgroup",)
    HIDDEN_OF_FAMILIES += [("warpgroup", 40), ("warpgroup", 512)]
WITH_TEAMS = [family for family in FAMILIES if family in ("persistent", "warpgroup")]

pytestmark = [
    pytest.mark.cuda,
    # The yardstick takes weights one by one; it is right for them, only slower.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk of memory"),
]


@pytest.fixture(autouse=True)
def _end_where_the_gpu_is_lost() -> Iterator[None]:
    """Kernels that failed are found here. After such an error no later call of the process can succeed."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the CUDA context is lost: {error}", returncode=86)


# Problems and the rule


@dataclass
class Problem:
    """The tensors of a case on the GPU, in its dtype."""

    case: Case
    x: Tensor
    weights: list[Tensor]
    h_0: Tensor
    c_0: Tensor
    batch_sizes: Tensor | None
    lengths: Tensor | None
    reset_mask: Tensor | None
    dropout_mask: Tensor | None

    @classmethod
    def of(cls, case: Case) -> Problem:
        generator = torch.Generator(DEVICE).manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float64).to(case.dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=DEVICE)

        out, states = case.P or case.H, case.L * case.D
        batch_sizes, lengths = None, None
        shape: tuple[int, ...] = (case.T, case.B)
        if case.lengths and not case.packed:
            lengths = torch.tensor(case.lengths, device=DEVICE)
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
        keep = uniform(case.L - 1, *shape, case.D * out) < 0.7
        return cls(
            case=case,
            x=draw(*shape, case.I),
            weights=weights,
            h_0=draw(states, case.B, out),
            c_0=draw(states, case.B, case.H),
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset_mask=uniform(*shape) < case.resets if case.resets else None,
            dropout_mask=(keep / 0.7).to(case.dtype) if case.dropout else None,
        )

    @property
    def options(self) -> dict[str, Any]:
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

    def outputs(self, function: Callable[..., Any] = _ops.lstm) -> tuple[Tensor, Tensor, Tensor]:
        """In inference, of the tensors as they are."""
        with torch.no_grad():
            y, h_n, c_n = function(self.x, self.weights, self.h_0, self.c_0, **self.options)
        return y, h_n, c_n

    def solve(self, function: Callable[..., Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and all gradients of ``function``, computed in ``dtype`` from the same values."""
        inputs = [self.x, self.h_0, self.c_0, *self.weights]
        x, h_0, c_0, *weights = (t.detach().to(dtype).requires_grad_() for t in inputs)
        mask = None if self.dropout_mask is None else self.dropout_mask.to(dtype)
        outputs = function(x, weights, h_0, c_0, **self.options | {"dropout_mask": mask})
        d_outputs = self.d_outputs(outputs)
        d_inputs = torch.autograd.grad(outputs, [x, h_0, c_0, *weights], [d.to(dtype) for d in d_outputs])
        names = ["y", "h_n", "c_n", "d_x", "d_h_0", "d_c_0", *(f"d_weights[{i}]" for i in range(len(weights)))]
        return {name: t.detach() for name, t in zip(names, [*outputs, *d_inputs], strict=True)}

    def d_outputs(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(2)
        return [torch.randn(o.shape, generator=generator, device=DEVICE).to(self.case.dtype) for o in outputs]


@dataclass(frozen=True)
class Pieces:
    """The sequences of a problem between its resets, each for itself.

    ``rows`` holds, packed, the row of each step among all rows; ``columns`` the row of the batch. The other vectors say
    for each of the two directions which pieces begin with the initial state and which end with the final one.
    """

    rows: PackedSequence
    columns: Tensor
    begins: tuple[Tensor, Tensor]
    ends: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, reset_mask: Tensor | None
    ) -> Pieces | None:
        if batch_sizes is not None:
            sizes = batch_sizes.tolist()
            steps = [sum(size > b for size in sizes) for b in range(sizes[0])]
            firsts = [0, *itertools.accumulate(sizes)]
        else:
            T, B = x.shape[:2]
            steps = [T] * B if lengths is None else lengths.tolist()
            firsts = [t * B for t in range(T)]
        marks = [False] * x.shape[:-1].numel() if reset_mask is None else reset_mask.flatten().tolist()
        rows, columns, flags = [], [], []
        for b, count in enumerate(steps):
            of_column = [firsts[t] + b for t in range(count)]
            cuts = [0, *(t for t in range(1, count) if marks[of_column[t]]), count]
            for begin, end in itertools.pairwise(cuts):
                if begin == end:  # a sequence of no steps
                    continue
                rows.append(torch.tensor(of_column[begin:end]))
                columns.append(b)
                is_first, is_last = begin == 0, end == count
                flags.append((is_first and not marks[of_column[0]], is_last, is_last, is_first))
        if not rows:
            return None
        packed = pack_sequence(rows, enforce_sorted=False).to(DEVICE)
        begins_0, begins_1, ends_0, ends_1 = torch.tensor(flags, device=DEVICE)[packed.sorted_indices].t()
        ordered = torch.tensor(columns, device=DEVICE)[packed.sorted_indices]
        return cls(packed, ordered, (begins_0, begins_1), (ends_0, ends_1))


def torchs_lstm(
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    *,
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    dropout_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator by calls of nn.LSTM's function, a layer at a time; what it lacks is made of packed sequences."""
    directions = 1 + bidirectional
    whole = batch_sizes is None and lengths is None and reset_mask is None
    pieces = None if whole else Pieces.of(x, batch_sizes, lengths, reset_mask)
    final_h, final_c = [], []
    lead = x.shape[:-1]
    for layer in range(num_layers):
        count = len(weights) // num_layers
        w = list(weights[layer * count : (layer + 1) * count])
        h, c = (s[layer * directions : (layer + 1) * directions] for s in (h_0, c_0))
        if whole:
            x, h, c = torch._VF.lstm(x, (h, c), w, has_bias, 1, 0.0, True, bidirectional, False)
        elif pieces is not None:
            x, h, c = _layer_in_pieces(x.flatten(0, -2), w, h, c, bidirectional, has_bias, pieces)
        else:
            x = x.new_zeros(*lead, directions * h.size(-1))
        final_h.append(h)
        final_c.append(c)
        if layer < num_layers - 1 and dropout_mask is not None:
            x = x * dropout_mask[layer].view(x.shape)
    return x.view(*lead, -1), torch.cat(final_h), torch.cat(final_c)


def _layer_in_pieces(
    rows: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, bidirectional: bool, has_bias: bool, pieces: Pieces
) -> tuple[Tensor, Tensor, Tensor]:
    index, batch_sizes = pieces.rows.data, pieces.rows.batch_sizes
    h, c = (
        torch.stack([torch.where(pieces.begins[d][:, None], s[d][pieces.columns], 0) for d in range(s.size(0))])
        for s in (h_0, c_0)
    )
    y, h, c = torch._VF.lstm(rows[index], batch_sizes, (h, c), weights, has_bias, 1, 0.0, True, bidirectional)
    finals = []
    for initial, final in ((h_0, h), (c_0, c)):
        by_direction = []
        for d in range(initial.size(0)):
            ends = pieces.ends[d]
            by_direction.append(initial[d].index_copy(0, pieces.columns[ends], final[d][ends]))
        finals.append(torch.stack(by_direction))
    return y.new_zeros(rows.size(0), y.size(1)).index_copy(0, index, y), finals[0], finals[1]


def switched(precision: str) -> AbstractContextManager[None]:
    return tf32_products(precision == "tf32")


def judge(
    ours: Mapping[str, Tensor], torchs: Mapping[str, Tensor], exact: Mapping[str, Tensor], precision: str
) -> None:
    rounding = torch.float16 if precision == "tf32" else None  # TF32 has the fraction of float16
    reports = [compare(name, t, torchs[name], exact[name], dtype=rounding) for name, t in ours.items()]
    for name, t in ours.items():
        assert t.dtype == torchs[name].dtype, name
    assert [str(report) for report in reports if not report.ok] == []


@functools.lru_cache(maxsize=2)
def expected(case: Case, precision: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What nn.LSTM computes in the case's dtype, and the exact results."""
    problem = Problem.of(case)
    with switched(precision):
        torchs = problem.solve(torchs_lstm, case.dtype)
    return torchs, problem.solve(reference.lstm, torch.float64)


def forced(family: str | None) -> AbstractContextManager[None]:
    return fastlstm.force(plan=family)


def check(case: Case, precision: str, family: str | None = None, force: bool = True) -> None:
    """Outputs in training and in inference and all gradients, by the family, or as planned, or as is already forced."""
    case = replace(case, dtype=PRECISIONS[precision])
    problem = Problem.of(case)
    with switched(precision), forced(family) if force else contextlib.nullcontext():
        try:
            ours = problem.solve(_ops.lstm, case.dtype)
        except (ValueError, RuntimeError) as error:
            if "the forced plan cannot run" in str(error) and multiprocessors() < MULTIPROCESSORS:
                pytest.skip(str(error))
            raise
        inference = problem.outputs()
    torchs, exact = expected(case, precision)
    judge(ours, torchs, exact, precision)
    judge(dict(zip(("y", "h_n", "c_n"), inference, strict=True)), torchs, exact, precision)


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def reaches(family: str, precision: str, H: int) -> bool:
    """Whether a family runs this hidden size on a GPU with enough multiprocessors."""
    if family == "stepwise" or precision == "fp64":
        return family == "stepwise"
    if family == "warpgroup" and H % 8 != 0:
        return False
    largest = {
        "resident": (128, 64, 32),
        "persistent": (2048, 1024, 512),
        "streamed": (H, H, H),
        "warpgroup": (2048, 1024, 0),
    }[family]
    return largest[{"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}[precision]] >= H


# Operators: the cases of the CPU, and the families over sizes of their own


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES[1:], ids=str)  # a single element has no scale to measure rounding by
def test_cases_of_the_cpu(case: Case, precision: str) -> None:
    check(case, precision)


HIDDEN = (1, 7, 8, 33, 64, 100, 128, 200, 256, 300, 512, 650, 768, 1024, 1536, 2048)
BATCHES = (1, 3, 8, 17, 64, 100, 300)
STEPS = (1, 2, 3, 50)


def _sizes() -> Iterator[Case]:
    """Three of each hidden size; along the list all pairs of T and B come up."""
    for k, H in enumerate(HIDDEN):
        for j in range(3):
            B, T = BATCHES[(k + 3 * j) % 7], STEPS[(k + j) % 4]
            # A few numbers alone have no scale to measure rounding by.
            yield Case(T=T, B=B if H > 7 else max(B, 17), I=(24, 5, 33)[j], H=H)


SIZES = list(_sizes())
# What else the kernels of the recurrence have to take into account, on few and on many multiprocessors.
FEATURES = [
    feature
    for H in (33, 64, 264, 512)
    for feature in (
        Case(T=6, B=19, I=24, H=H, L=2, D=2, dropout=True),
        Case(T=5, B=9, I=8, H=H, bias=False),
        Case(T=6, B=11, I=7, H=H, D=2, lengths=(6, 6, 5, 5, 5, 3, 2, 2, 1, 1, 1)),
        Case(T=7, B=10, I=7, H=H, D=2, lengths=(3, 0, 7, 1, 7, 2, 0, 5, 6, 4)),
        Case(T=8, B=9, I=5, H=H, D=2, lengths=(2, 0, 0, 6, 5, 1, 1, 3, 6), resets=0.4),  # none reaches the end
        Case(T=9, B=40, I=5, H=H, D=2, lengths=(2,) * 8 + (7,) * 16 + (4,) * 16),  # tiles that begin late in reverse
        Case(T=9, B=13, I=6, H=H, resets=0.3),
        Case(T=6, B=9, I=6, H=H, D=2, lengths=(6, 6, 5, 3, 3, 2, 1, 1, 1), resets=0.3),
        Case(T=6, B=19, I=6, H=H, P=H // 3, L=2, D=2, dropout=True),
        Case(T=8, B=9, I=6, H=H, P=H // 4, D=2, lengths=(2, 0, 0, 6, 5, 1, 1, 3, 8), resets=0.3),
        Case(T=5, B=9, I=6, H=H, P=H - 1, lengths=(5, 5, 4, 3, 3, 1, 1, 1, 1), bias=False),
        *(Case(T=T, B=9, I=6, H=H) for T in (4, 5, 6, 7, 8)),  # whatever is counted modulo something
    )
]


def _with_families(cases: Sequence[Case], precisions: Sequence[str]) -> list[Any]:
    """Families innermost: they share what is expected of them."""
    return [
        pytest.param(case, precision, family, id=f"{case}-{precision}-{family}".replace("-float32", ""))
        for case in cases
        for precision in precisions
        for family in FAMILIES
        if reaches(family, precision, case.H)
    ]


@pytest.mark.parametrize(("case", "precision", "family"), _with_families(SIZES, ["bf16", "tf32"]))
def test_families_over_sizes(case: Case, precision: str, family: str) -> None:
    check(case, precision, family)


@pytest.mark.parametrize(("case", "precision", "family"), _with_families(SIZES[::3], ["fp16"]))
def test_families_in_float16(case: Case, precision: str, family: str) -> None:
    check(case, precision, family)


@pytest.mark.parametrize(("case", "precision", "family"), _with_families(FEATURES, ["bf16", "tf32"]))
def test_families_with_features(case: Case, precision: str, family: str) -> None:
    check(case, precision, family)


@pytest.mark.parametrize(("case", "precision", "family"), _with_families(FEATURES[::5], ["fp32"]))
def test_families_in_full_float32(case: Case, precision: str, family: str) -> None:
    check(case, precision, family)


@pytest.mark.parametrize(
    ("family", "H", "precision"),
    [
        (family, H, precision)
        for family, H in [("resident", 32), *((f, H) for f in WITH_TEAMS for H in (32, 256))]
        for precision in ("bf16", "tf32", "fp32")
        if reaches(family, precision, H)
    ],
)
def test_layers_at_the_same_time(family: str, H: int, precision: str) -> None:
    plain = Case(T=13, B=9, I=6, H=H, L=3)
    for case in (
        plain,
        replace(plain, P=H // 4, resets=0.3),
        replace(plain, resets=0.3, dropout=True),
        replace(plain, lengths=(9, 13, 1, 5, 0, 2, 13, 4, 4)),
    ):
        for layers, steps in ((2, 4), (3, 4), (3, 8), (1, 4)):
            with fastlstm.force(plan=family, layers=layers, run_steps=steps):
                check(case, precision, force=False)


@pytest.mark.parametrize(
    ("family", "precision", "case"),
    [
        *((family, "fp64", Case(T=2, B=4, I=6, H=64)) for family in ("resident", "persistent", "streamed")),
        ("resident", "bf16", Case(T=2, B=4, I=6, H=136)),
        ("resident", "fp32", Case(T=2, B=4, I=6, H=72)),
        ("persistent", "bf16", Case(T=2, B=4, I=6, H=4104)),
        ("persistent", "fp32", Case(T=2, B=4, I=6, H=2048)),
        ("warpgroup", "bf16", Case(T=2, B=4, I=6, H=33)),
        ("warpgroup", "fp32", Case(T=2, B=4, I=6, H=64)),
        ("warpgroup", "tf32", Case(T=2, B=4, I=6, H=2048)),
    ],
    ids=str,
)
def test_a_family_refuses_what_it_cannot_run(family: str, precision: str, case: Case) -> None:
    problem = Problem.of(replace(case, dtype=PRECISIONS[precision]))
    with switched(precision), forced(family), pytest.raises((ValueError, RuntimeError), match="the forced plan cannot"):
        problem.outputs()
    with switched(precision):
        assert problem.outputs()[0].isfinite().all()


def _check_by_bounds(case: cases.Case, backward: bool = True) -> None:
    """By the bounds of the emulated kernels: for what nn.LSTM does not have, it is no yardstick."""
    inputs = cases.make_inputs(case)
    options = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and name != "batch_sizes" else value
        for name, value in inputs.options.items()
        if name != "reduced_products"
    }
    resets = [options[name].requires_grad_() for name in ("reset_h", "reset_c") if name in options]
    extras = Extras(**{name: options.pop(name) for name in Extras._fields if name in options})
    options = dict.fromkeys(("batch_sizes", "lengths", "reset_mask", "dropout_mask")) | options
    leaves = [t.to(DEVICE).requires_grad_() for t in (inputs.x, inputs.h_0, inputs.c_0, *inputs.weights)]
    d_outputs = [d_output.to(DEVICE) for d_output in inputs.gradients if d_output is not None]
    with switched(case.element), forced(case.family), torch.set_grad_enabled(backward):
        outputs = _ops.lstm(leaves[0], leaves[3:], leaves[1], leaves[2], **options, extras=extras)
        d_inputs = torch.autograd.grad(outputs, [*leaves, *resets], d_outputs) if backward else ()
    results = [t.detach().cpu() for t in (*outputs, *d_inputs)]
    cases.compare(case, dict(zip(cases.names_of(case), results, strict=backward)), cases.expected(case, inputs))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("extra", cases.EXTRAS)
def test_steps_with_extras(extra: str, precision: str) -> None:
    for layout, (L, D, P) in itertools.product(cases.LAYOUTS, [(2, 2, 0), (2, 1, 12)]):
        options = cases.EXTRAS[extra] | layout
        for H in (33, 64):  # the second in vectors, where there are no extras
            case = cases.Case("stepwise", precision, T=4, B=9, I=5, H=H, L=L, D=D, P=P, **options)
            _check_by_bounds(cases.normalised(case, 9, H) if case.layer_norm else case)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layer_norm_of_long_rows(precision: str) -> None:
    """A thread has several units of a row."""
    case = cases.Case("stepwise", precision, T=3, B=9, I=9, H=530, layer_norm=True)
    for recompute in (False, True):
        _check_by_bounds(replace(case, recompute=recompute))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_computed_again(family: str, precision: str) -> None:
    for layout, (L, D), H in itertools.product(cases.LAYOUTS, [(3, 1), (2, 2)], (33, 64)):
        if not reaches(family, precision, H):
            continue
        case = cases.Case(family, precision, T=4, B=9, I=5, H=H, L=L, D=D, resets=0.2, dropout=True, **layout)
        _check_by_bounds(replace(case, recompute=True))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cell_states(family: str, precision: str) -> None:
    """Every family returns them; the way back through them is stepwise's."""
    for layout, (L, D), P, H in itertools.product(cases.LAYOUTS, [(3, 1), (2, 2)], (0, 12), (33, 64)):
        if not reaches(family, precision, H):
            continue
        case = cases.Case(family, precision, T=4, B=9, I=5, H=H, P=P, L=L, D=D, cell_layers=2, resets=0.2, **layout)
        _check_by_bounds(case, backward=False)


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_per_sample(size: int) -> None:
    module = FastLSTM(5, 24, num_layers=2, bidirectional=True, device=DEVICE, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    samples = torch.randn(6, 7, size, 5, device=DEVICE, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    one_by_one = [torch.autograd.grad(loss(parameters, x), list(parameters.values())) for x in samples]
    for of_all, of_each in zip(together.values(), zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(of_all, torch.stack(of_each))


@pytest.mark.parametrize(("precision", "H"), [("bf16", 256), ("tf32", 256), ("fp32", 256), ("bf16", 64)])
def test_long_sequences(precision: str, H: int) -> None:
    """Errors neither grow along 4096 steps nor come from a counter that wraps around."""
    problem = Problem.of(Case(T=4096, B=4, I=8, H=H, dtype=PRECISIONS[precision]))
    with switched(precision):
        ours, torchs = problem.outputs(), problem.outputs(torchs_lstm)
    doubles = copy.copy(problem)
    doubles.x, doubles.h_0, doubles.c_0 = (t.double() for t in (problem.x, problem.h_0, problem.c_0))
    doubles.weights = [w.double() for w in problem.weights]
    exact = doubles.outputs(reference.lstm)
    judge(*(dict(zip(("y", "h_n", "c_n"), tensors, strict=True)) for tensors in (ours, torchs, exact)), precision)


def test_gradients_of_long_sequences() -> None:
    check(Case(T=1024, B=4, I=8, H=256), "bf16")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_large_initial_states(family: str, precision: str) -> None:
    """Only the states of a user exceed 1 in magnitude."""
    case = Case(T=5, B=9, I=8, H=64, dtype=PRECISIONS[precision])
    problem = Problem.of(case)
    problem.h_0 *= 8
    problem.c_0 *= 8
    with switched(precision):
        torchs = problem.solve(torchs_lstm, case.dtype)
        with forced(family):
            ours = problem.solve(_ops.lstm, case.dtype)
    judge(ours, torchs, problem.solve(reference.lstm, torch.float64), precision)


def _misaligned(tensor: Tensor) -> Tensor:
    """The same values at an address that is a multiple of the element's size only."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(("family", "H"), HIDDEN_OF_FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_misaligned_and_strided_tensors(family: str, H: int, precision: str) -> None:
    problem = Problem.of(Case(T=4, B=9, I=8, H=H, dtype=PRECISIONS[precision]))
    with switched(precision), forced(family):
        plain = problem.solve(_ops.lstm, problem.case.dtype)
        for change in (_misaligned, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
            other = copy.copy(problem)
            other.x, other.h_0, other.c_0 = (change(t) for t in (problem.x, problem.h_0, problem.c_0))
            other.weights = [change(w) for w in problem.weights]
            for name, t in other.solve(_ops.lstm, problem.case.dtype).items():
                # Sums in another order flip roundings, of 8 and of 10 bits.
                scale = plain[name].abs().max() * 2.0 ** (-5 if precision == "bf16" else -7)
                assert (t - plain[name]).abs().max() <= scale, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("used", range(3))
def test_gradients_of_some_outputs_to_some_inputs(family: str, used: int) -> None:
    problem = Problem.of(Case(T=5, B=9, I=8, H=40, L=2, D=2, dtype=torch.bfloat16))
    inputs = [problem.x, problem.h_0, problem.c_0, *problem.weights]
    kept = (0, 3, 4, 11)
    for index in kept:
        inputs[index].requires_grad_()

    def gradients(function: Callable[..., Any]) -> list[Tensor]:
        outputs = function(problem.x, problem.weights, problem.h_0, problem.c_0, **problem.options)
        return list(torch.autograd.grad(outputs[used], [inputs[k] for k in kept], problem.d_outputs(outputs)[used]))

    with forced(family):
        ours = gradients(_ops.lstm)
    torchs = gradients(torchs_lstm)
    for t in inputs:
        t.requires_grad_(False)
    problem.x, problem.h_0, problem.c_0, *problem.weights = inputs = [t.double() for t in inputs]
    for index in kept:
        inputs[index].requires_grad_()
    exact = gradients(reference.lstm)
    judge(*({str(k): t for k, t in zip(kept, tensors, strict=True)} for tensors in (ours, torchs, exact)), "bf16")


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_twice_gives_the_same(family: str) -> None:
    problem = Problem.of(Case(T=5, B=9, I=8, H=64, L=2, D=2, dtype=torch.bfloat16))
    x = problem.x.requires_grad_()
    with forced(family):
        y, _, _ = _ops.lstm(x, problem.weights, problem.h_0, problem.c_0, **problem.options)
        (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)


def test_second_derivatives() -> None:
    problem = Problem.of(Case(T=3, B=4, I=5, H=9, dtype=torch.float64))
    w_hh = problem.weights[1].requires_grad_()
    results = []
    for function in (_ops.lstm, reference.lstm):
        y, _, _ = function(problem.x, problem.weights, problem.h_0, problem.c_0, **problem.options)
        (first,) = torch.autograd.grad(y.square().sum(), w_hh, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), w_hh))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", [CASES[1], CASES[11], CASES[13], CASES[17], CASES[19]], ids=str)
def test_opcheck(case: Case) -> None:
    p = Problem.of(case)
    weights = [w.requires_grad_() for w in p.weights]
    options = (p.batch_sizes, p.lengths, p.reset_mask, p.dropout_mask, case.L, case.D == 2, case.bias, False)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    arguments = (p.x, weights, p.h_0, p.c_0, *options, True)
    torch.library.opcheck(torch.ops.fastlstm.lstm.default, arguments, test_utils=tests)


@pytest.mark.parametrize("steps", [1, 5])
def test_empty_batch(steps: int) -> None:
    ours = FastLSTM(5, 24, 2, bidirectional=True, device=DEVICE)
    x = torch.randn(steps, 0, 5, device=DEVICE, requires_grad=True)
    y, (h_n, c_n) = ours(x)
    assert y.shape == (steps, 0, 48) and h_n.shape == c_n.shape == (4, 0, 24)
    y.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ours.parameters() if p.grad is not None)


# Modules against nn.LSTM


def twins(*args: Any, **kwargs: Any) -> tuple[nn.LSTM, FastLSTM]:
    torchs = nn.LSTM(*args, **kwargs, device=DEVICE)
    ours = FastLSTM(*args, **kwargs, device=DEVICE)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


MODULES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True},
    {"proj_size": 24},
    {"num_layers": 2, "bidirectional": True, "proj_size": 24, "bias": False},
]
LENGTHS = torch.tensor([4, 9, 1, 9, 2, 7])


def _module_results(module: nn.Module, layout: str, dtype: torch.dtype, start: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name; the data are drawn in ``start``, in which all contenders see them."""
    generator = torch.Generator(DEVICE).manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(start).to(dtype)

    batch = () if layout == "unbatched" else (6,)
    states = module.num_layers * (1 + module.bidirectional)
    leaves = {"x": draw(*((*batch, 9) if module.batch_first and batch else (9, *batch)), 20)}
    if layout != "without states":
        leaves["h_0"] = draw(states, *batch, module.proj_size or 72)
        leaves["c_0"] = draw(states, *batch, 72)
    leaves |= dict(module.named_parameters())
    for leaf in leaves.values():
        leaf.requires_grad_()
        leaf.grad = None
    x: Tensor | PackedSequence = leaves["x"]
    if layout in ("sorted", "unsorted"):
        lengths = LENGTHS.sort(descending=True).values if layout == "sorted" else LENGTHS
        x = pack_padded_sequence(leaves["x"], lengths, module.batch_first, enforce_sorted=layout == "sorted")
    y, (h_n, c_n) = module(x, (leaves["h_0"], leaves["c_0"]) if "h_0" in leaves else None)
    results = {"y": y.data if isinstance(y, PackedSequence) else y, "h_n": h_n, "c_n": c_n}
    torch.autograd.backward(list(results.values()), [draw(*t.shape) for t in results.values()])
    return results | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["padded", "without states", "unbatched", "sorted", "unsorted"])
@pytest.mark.parametrize("kwargs", MODULES, ids=str)
def test_modules(kwargs: dict[str, Any], layout: str, precision: str) -> None:
    dtype = PRECISIONS[precision]
    torchs, ours = twins(20, 72, **kwargs, dtype=dtype)
    exact = nn.LSTM(20, 72, **kwargs, device=DEVICE, dtype=torch.float64)
    exact.load_state_dict(torchs.state_dict())
    with switched(precision):
        results = [
            _module_results(module, layout, of, dtype)
            for module, of in ((ours, dtype), (torchs, dtype), (exact, torch.float64))
        ]
    judge(*results, precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_cells(dtype: torch.dtype, batch: int) -> None:
    torchs = nn.LSTMCell(16, 40, device=DEVICE, dtype=dtype)
    ours = FastLSTMCell(16, 40, device=DEVICE, dtype=dtype)
    exact = nn.LSTMCell(16, 40, device=DEVICE, dtype=torch.float64)
    for module in (ours, exact):
        module.load_state_dict(torchs.state_dict())
    drawn = [torch.randn(batch, n, device=DEVICE).to(dtype) for n in (16, 40, 40)]
    results = []
    for module, of in ((ours, dtype), (torchs, dtype), (exact, torch.float64)):
        x, h, c = (t.to(of).requires_grad_() for t in drawn)
        outputs = module(x, (h, c))
        gradients = torch.autograd.grad([o.sum() for o in outputs], [x, h, c, *module.parameters()])
        results.append({str(k): t for k, t in enumerate([*outputs, *gradients])})
    judge(*results, "tf32" if dtype == torch.float32 else "")
    torch.testing.assert_close(ours(drawn[0][0]), tuple(t[0] for t in ours(drawn[0][:1])))


@pytest.mark.parametrize("cell", [False, True])
def test_streaming_step_by_step_equals_the_whole_sequence(cell: bool) -> None:
    _, ours = twins(20, 72)
    step = FastLSTMCell(20, 72, device=DEVICE)
    step.load_state_dict({k.removesuffix("_l0"): v for k, v in ours.state_dict().items()})
    x = torch.randn(6, 3, 20, device=DEVICE)
    outputs, state = [], None
    with switched("fp32"), torch.no_grad():
        expected_y, states = ours(x)
        for t in range(6):
            y, state = (step(x[t], state)[0], step(x[t], state)) if cell else ours(x[t : t + 1], state)
            outputs.append(y.view(3, 72))
    torch.testing.assert_close(torch.stack(outputs), expected_y)
    torch.testing.assert_close(tuple(s.view(1, 3, 72) for s in state), states)


def test_move_from_the_cpu_and_back() -> None:
    ours = FastLSTM(20, 72, 2, bidirectional=True)
    x = torch.randn(5, 3, 20)
    before = ours(x)[0]
    with switched("fp32"):
        on_gpu = ours.to(DEVICE)(x.to(DEVICE))[0]
    torch.testing.assert_close(on_gpu.to("cpu"), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.to("cpu")(x)[0], before, rtol=0, atol=0)


def test_swapped_in_a_model() -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(20, 72, 2, batch_first=True)}).to(DEVICE)
    x = torch.randn(4, 6, 20, device=DEVICE)
    with switched("fp32"):
        before = model["encoder"](x)[0]
        swapped = copy.deepcopy(swap_lstm(model))
        assert isinstance(swapped["encoder"], FastLSTM)
        torch.testing.assert_close(swapped["encoder"](x)[0], before, rtol=1e-5, atol=1e-5)


# Dropout


def test_dropout_masks() -> None:
    """Drawn on the GPU, from its generator, with the probability asked for."""
    x = torch.empty(50, 40, 1, device=DEVICE)
    p, count = 0.3, 2 * 50 * 40 * 64
    torch.manual_seed(5)
    mask = fastlstm.functional._draw_dropout_mask(x, p, 2, 64)
    assert mask.shape == (2, 50, 40, 64) and mask.device.type == DEVICE
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    five_sigma = 5 * (p * (1 - p) / count) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < five_sigma
    both = (kept[0] & kept[1]).double().mean().item()
    assert abs(both - (1 - p) ** 2) < 2 * five_sigma, "the layers' masks are not independent"


def test_dropout_of_modules() -> None:
    torchs, ours = twins(20, 72, 2, dropout=0.4)
    x = torch.randn(9, 6, 20, device=DEVICE)
    with switched("fp32"):
        torch.manual_seed(5)
        first = ours(x)[0]
        assert not torch.equal(ours(x)[0], first)
        torch.manual_seed(5)
        assert torch.equal(ours(x)[0], first)
        torch.testing.assert_close(ours.eval()(x)[0], torchs.eval()(x)[0], rtol=1e-5, atol=1e-5)
        ours.train().dropout = 1.0
        upper = FastLSTM(72, 72, device=DEVICE)
        upper.load_state_dict({k.replace("l1", "l0"): v for k, v in ours.state_dict().items() if "l1" in k})
        torch.testing.assert_close(ours(x)[0], upper(torch.zeros(9, 6, 72, device=DEVICE))[0])


# Lengths and resets


@pytest.mark.parametrize("lengths_on", ["cpu", DEVICE])
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str)
def test_lengths_are_packing_and_padding(kwargs: dict[str, Any], lengths_on: str) -> None:
    torchs, ours = twins(20, 72, **kwargs)
    x = torch.randn(6, 9, 20, device=DEVICE) if ours.batch_first else torch.randn(9, 6, 20, device=DEVICE)
    with switched("fp32"):
        y, states = ours(x, lengths=LENGTHS.to(lengths_on))
        packed = pack_padded_sequence(x, LENGTHS, ours.batch_first, enforce_sorted=False)
        expected_y, expected_states = torchs(packed)
    expected_y, _ = pad_packed_sequence(expected_y, ours.batch_first)
    torch.testing.assert_close((y, states), (expected_y, expected_states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "H"), HIDDEN_OF_FAMILIES)
def test_steps_behind_the_end_are_not_read(family: str, H: int) -> None:
    ours = FastLSTM(20, H, bidirectional=True, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(9, 6, 20, device=DEVICE).bfloat16()
    with forced(family):
        clean = ours(x, lengths=LENGTHS)
        for b, length in enumerate(LENGTHS.tolist()):
            x[length:, b] = torch.nan
        x.requires_grad_()
        y, states = ours(x, lengths=LENGTHS)
        torch.testing.assert_close((y, states), clean, rtol=0, atol=0)
        for gradient in torch.autograd.grad(y.sum(), [x, *ours.parameters()]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("family", "H"), HIDDEN_OF_FAMILIES)
def test_nothing_passes_a_reset(family: str, H: int) -> None:
    ours = FastLSTM(20, H, 2, device=DEVICE, dtype=torch.bfloat16)
    x, h_0, c_0 = (torch.randn(s, device=DEVICE).bfloat16() for s in ((9, 6, 20), (2, 6, H), (2, 6, H)))
    mask = torch.zeros(9, 6, dtype=torch.bool, device=DEVICE)
    mask[0, 1] = mask[4, 2] = True
    with forced(family):
        clean, _ = ours(x, (h_0, c_0), reset_mask=mask)
        h_0[:, 1] = c_0[:, 1] = torch.nan
        x[3, 2] = torch.nan
        leaves = [t.requires_grad_() for t in (x, h_0, c_0)]
        y, _ = ours(x, (h_0, c_0), reset_mask=mask)
        d_x, d_h_0, d_c_0 = torch.autograd.grad(torch.cat([y[:, 1], y[4:, 2]]).sum(), leaves)
    torch.testing.assert_close(y[:, 1], clean[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(y[4:, 2], clean[4:, 2], rtol=0, atol=0)
    assert not d_h_0[0, 1].any() and not d_c_0[:, 1].any()
    assert d_x[:, 1].isfinite().all() and d_x[4:, 2].isfinite().all()


# NaN and infinity


@pytest.mark.parametrize(("family", "H"), HIDDEN_OF_FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("where", ["x", "infinity in x", "h_0", "c_0", "w_hh", "bias"])
def test_nan_spreads_as_in_the_reference(family: str, H: int, precision: str, where: str) -> None:
    """And nothing waits forever, although no NaN can be told from a mark in what kernels exchange."""
    problem = Problem.of(Case(T=7, B=19, I=5, H=H, dtype=PRECISIONS[precision]))
    target = {"h_0": problem.h_0[0, 3], "c_0": problem.c_0[0, 3], "w_hh": problem.weights[1][H + 3]}.get(where)
    if where in ("x", "infinity in x"):
        target = problem.x[3, 11]
    if where == "bias":
        target = problem.weights[2]
    assert target is not None
    target[2] = torch.inf if where == "infinity in x" else torch.nan
    with switched(precision), forced(family):
        ours = problem.solve(_ops.lstm, problem.case.dtype)
    exact = problem.solve(reference.lstm, torch.float64)
    for name in ("y", "h_n", "c_n", "d_x", "d_h_0", "d_c_0"):
        assert torch.equal(ours[name].isnan(), exact[name].isnan()), name


# Determinism and memory that held something before


DETERMINISM = [
    ("stepwise", Case(T=12, B=17, I=24, H=100, D=2)),
    ("streamed", Case(T=12, B=37, I=24, H=300, D=2)),
    ("resident", Case(T=40, B=100, I=24, H=128, D=2)),
    ("resident", Case(T=40, B=1030, I=24, H=64)),
    ("persistent", Case(T=40, B=17, I=24, H=200, P=48, D=2)),
    ("persistent", Case(T=40, B=64, I=24, H=512)),
    ("persistent", Case(T=20, B=300, I=24, H=256, D=2)),
    ("persistent", Case(T=20, B=17, I=24, H=1024)),
    *((f, Case(T=40, B=B, I=24, H=H)) for f in WITH_TEAMS[1:] for B, H in ((64, 512), (300, 1024))),
]


@pytest.mark.parametrize(("family", "case"), DETERMINISM, ids=str)
def test_the_same_bits_20_times(family: str, case: Case) -> None:
    problem = Problem.of(replace(case, dtype=torch.bfloat16))
    with forced(family):
        first = problem.solve(_ops.lstm, torch.bfloat16)
        for run in range(20):
            for name, t in problem.solve(_ops.lstm, torch.bfloat16).items():
                assert torch.equal(t, first[name]), f"run {run}: {name}"


def poison(byte: int) -> None:
    """Leaves memory of every size to the allocator in which each byte has this value."""
    sizes = [512, 4096, 1 << 16, 1 << 19, 1 << 20, 3 << 20, 1 << 23, 1 << 25]
    blocks = [torch.full((size,), byte, dtype=torch.uint8, device=DEVICE) for size in sizes for _ in range(8)]
    del blocks


@pytest.mark.parametrize("byte", [0xFF, 0x7F, 0x3F, 0x00])
@pytest.mark.parametrize(("family", "case"), DETERMINISM[:6], ids=str)
def test_nothing_depends_on_what_memory_held(family: str, case: Case, byte: int) -> None:
    lengths = tuple(case.T * b // case.B for b in range(case.B))
    for variant in (case, replace(case, lengths=lengths, resets=0.2)):
        problem = Problem.of(replace(variant, dtype=torch.bfloat16))
        with forced(family):
            first, inference = problem.solve(_ops.lstm, torch.bfloat16), problem.outputs()
            poison(byte)
            for t, clean in zip(problem.outputs(), inference, strict=True):
                assert torch.equal(t, clean)
            poison(byte)
            for name, t in problem.solve(_ops.lstm, torch.bfloat16).items():
                assert torch.equal(t, first[name]), name


def test_200_calls_of_different_shapes_back_to_back() -> None:
    cases = [
        Case(T=T, B=B, I=inputs, H=H, D=D)
        for T, B, inputs, H, D in (
            (5, 17, 8, 64, 1),
            (9, 64, 24, 512, 1),
            (3, 8, 5, 128, 2),
            (20, 100, 16, 256, 2),
            (2, 3, 8, 1024, 1),
            (7, 33, 8, 33, 1),
            (1, 1, 8, 768, 1),
            (4, 300, 8, 200, 1),
        )
    ]
    problems = [Problem.of(replace(case, dtype=torch.bfloat16)) for case in cases]
    alone = []
    for problem in problems:
        alone.append(problem.solve(_ops.lstm, torch.bfloat16))
        torch.cuda.synchronize()
    order = random.Random(7).choices(range(len(cases)), k=200)
    wrong = []
    for k in order:  # no call of these waits for the GPU; what they have found out is asked for at the end
        results = problems[k].solve(_ops.lstm, torch.bfloat16)
        wrong.append(torch.stack([(t != alone[k][name]).any() for name, t in results.items()]).any())
    assert not torch.stack(wrong).any()


# Streams and graphs


def test_on_a_stream_of_the_caller() -> None:
    """The input comes late on that stream: work on another one would read what was there before."""
    for family, H in (("stepwise", 64), ("streamed", 64), ("resident", 64), ("persistent", 512)):
        ours = FastLSTM(24, H, device=DEVICE, dtype=torch.bfloat16)
        new = torch.randn(9, 17, 24, device=DEVICE).bfloat16()
        d_y = torch.randn(9, 17, H, device=DEVICE).bfloat16()
        x = torch.zeros_like(new)
        with forced(family):
            right = torch.autograd.grad(ours(new)[0], list(ours.parameters()), d_y)
            right_y = ours(new)[0]
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
                x.copy_(new)
                y = ours(x)[0]
                gradients = torch.autograd.grad(y, list(ours.parameters()), d_y)
                done = stream.record_event()
            torch.cuda.current_stream().wait_event(done)
            assert torch.equal(y, right_y), family
            for gradient, one in zip(gradients, right, strict=True):
                assert torch.equal(gradient, one), family


@pytest.mark.parametrize("family", FAMILIES)
def test_two_streams_at_once(family: str) -> None:
    """Kernels that wait for each other's CTAs must not take multiprocessors from one another halfway."""
    H = 128 if family == "resident" else 1024
    ours = FastLSTM(24, H, device=DEVICE, dtype=torch.bfloat16)
    inputs = [torch.randn(30, 64, 24, device=DEVICE).bfloat16().requires_grad_() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with forced(family):
        right = []
        for x in inputs:
            y = ours(x)[0]
            right.append((y, *torch.autograd.grad(y.sum(), x)))
        torch.cuda.synchronize()
        for _ in range(10):
            results = []
            for x, stream in zip(inputs, streams, strict=True):
                with torch.cuda.stream(stream):
                    y = ours(x)[0]
                    results.append((y, *torch.autograd.grad(y.sum(), x)))
            torch.cuda.synchronize()
            for result, one in zip(results, right, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(result, one, strict=True))


def _capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


GRAPHS = [("stepwise", 40), ("streamed", 40), *((f, H) for f in ("resident", "persistent") for H in (64, 128))]
GRAPHS += [(family, 512) for family in WITH_TEAMS]


@pytest.mark.parametrize(("family", "H"), GRAPHS)
def test_1000_replays_of_a_graph(family: str, H: int) -> None:
    ours = FastLSTM(24, H, device=DEVICE, dtype=torch.bfloat16)
    inputs = torch.randn(5, 6, 19, 24, device=DEVICE).bfloat16()
    x = torch.zeros_like(inputs[0])
    with forced(family), torch.no_grad():
        right = [torch.cat([y, h, c]) for y, (h, c) in map(ours, inputs)]
        graph, (y, (h_n, c_n)) = _capture(lambda: ours(x))
        wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for k in range(1000):
            x.copy_(inputs[k % 5])
            graph.replay()
            wrong += (torch.cat([y, h_n, c_n]) != right[k % 5]).any()
            if k % 250 == 249:
                assert wrong.item() == 0, f"{wrong.item()} of {k + 1} replays"


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize(("family", "H"), GRAPHS)
def test_replays_of_a_training_step(family: str, H: int, projects: bool) -> None:
    P = H // 4 if projects else 0
    ours = FastLSTM(24, H, 2, bidirectional=True, proj_size=P, device=DEVICE, dtype=torch.bfloat16)
    inputs = torch.randn(5, 6, 19, 24, device=DEVICE).bfloat16()
    d_y = torch.randn(6, 19, 2 * (P or H), device=DEVICE).bfloat16()
    x = torch.zeros_like(inputs[0])

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours(x)[0], list(ours.parameters()), d_y)

    with forced(family):
        right = [gradients(x) for x in inputs]
        graph, result = _capture(lambda: gradients(x))
        for k in range(100):
            x.copy_(inputs[k % 5])
            graph.replay()
            if k % 20 < 5:
                for gradient, one in zip(result, right[k % 5], strict=True):
                    assert torch.equal(gradient, one), f"replay {k}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu() -> None:
    ours = FastLSTM(24, 512, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(9, 17, 24, device=DEVICE).bfloat16()
    right = ours(x)[0]
    assert torch.cuda.current_device() == 0
    other = copy.deepcopy(ours).to("cuda:1")
    y = other(x.to("cuda:1"))[0]
    y.sum().backward()
    torch.testing.assert_close(y.to(DEVICE), right, rtol=0, atol=0)


# Sizes beyond 16 and 32 bits, and memory


def _check_some_rows(problem: Problem, columns: Tensor) -> None:
    """Checks y and d_x of a few rows of the batch, which depend on no others."""
    x = problem.x.requires_grad_()
    y, _, _ = _ops.lstm(x, problem.weights, problem.h_0, problem.c_0, **problem.options)
    d_y = torch.empty_like(y).normal_(generator=torch.Generator(DEVICE).manual_seed(6))
    (d_x,) = torch.autograd.grad(y, x, d_y)
    ours = {"y": y.detach()[:, columns], "d_x": d_x[:, columns]}
    d_y = d_y[:, columns]
    problem.x, problem.h_0, problem.c_0 = (t.detach()[:, columns] for t in (x, problem.h_0, problem.c_0))
    del x, y, d_x
    results = [ours]
    for function, dtype in ((torchs_lstm, problem.case.dtype), (reference.lstm, torch.float64)):
        leaf, h_0, c_0, *weights = (t.to(dtype) for t in (problem.x, problem.h_0, problem.c_0, *problem.weights))
        leaf.requires_grad_()
        y, _, _ = function(leaf, weights, h_0, c_0, **problem.options)
        results.append({"y": y.detach(), "d_x": torch.autograd.grad(y, leaf, d_y.to(dtype))[0]})
    judge(*results, "")


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_more_rows_than_65535(family: str | None) -> None:
    columns = torch.tensor([*range(20), *range(65520, 65560), *range(69980, 70000)], device=DEVICE)
    with forced(family):
        _check_some_rows(Problem.of(Case(T=3, B=70_000, I=8, H=16, dtype=torch.bfloat16)), columns)


@pytest.mark.parametrize(("B", "H"), [(16_400, 512), (65_600, 128)])
def test_more_elements_than_32_bits_count(B: int, H: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 30 * GIB:
        pytest.skip("needs 30 GiB of free memory on the GPU")
    assert 64 * B * 4 * H > 2**31
    columns = torch.tensor([0, 1, 7, 8, B // 2, B - 9, B - 8, B - 1], device=DEVICE)
    _check_some_rows(Problem.of(Case(T=64, B=B, I=8, H=H, dtype=torch.bfloat16)), columns)
    torch.cuda.empty_cache()


def _peak(module: nn.Module, x: Tensor) -> int:
    """Bytes that a training step takes at most, over what was there before."""

    def step() -> None:
        x.grad = None
        module.zero_grad()
        module(x)[0].sum().backward()

    step()
    x.grad = None
    module.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    ("kwargs", "precision"),
    [
        ({}, "bf16"),
        ({}, "tf32"),
        ({}, "fp32"),
        ({"num_layers": 2, "bidirectional": True}, "bf16"),
        ({"num_layers": 3}, "fp16"),
        ({"proj_size": 128}, "bf16"),
    ],
    ids=str,
)
def test_memory_of_a_training_step(kwargs: dict[str, Any], precision: str) -> None:
    torchs, ours = twins(512, 512, **kwargs, dtype=PRECISIONS[precision])
    x = torch.randn(256, 64, 512, device=DEVICE).to(PRECISIONS[precision]).requires_grad_()
    with switched(precision):
        peaks = [_peak(module, x) for module in (ours, torchs)]
    assert peaks[0] <= peaks[1], f"{peaks[0] / 2**20:.0f} MiB, nn.LSTM {peaks[1] / 2**20:.0f} MiB"


# Autocast, compilation, errors, and a model that learns


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_input", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_autocast(low: torch.dtype, low_input: bool, with_state: bool) -> None:
    torchs, ours = twins(20, 72, 2, bidirectional=True)
    x = torch.randn(6, 3, 20, device=DEVICE).to(low)
    hx = (torch.randn(4, 3, 72, device=DEVICE), torch.randn(4, 3, 72, device=DEVICE)) if with_state else None
    results = []
    for module in (ours, torchs):
        with torch.autocast(DEVICE, dtype=low):
            y, states = module(x if low_input else x.float(), hx)
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())
        results.append((y, *states))
    # Whatever it is asked for, nn.LSTM on a GPU computes in float16 under autocast.
    assert [t.dtype for t in results[0]] == [low] * 3
    if low == torch.float16:
        assert [t.dtype for t in results[1]] == [low] * 3

    def converted(dtype: torch.dtype) -> tuple[Tensor, ...]:
        module = copy.deepcopy(torchs).to(low).to(dtype)
        y, states = module(x.to(dtype), None if hx is None else tuple(s.to(low).to(dtype) for s in hx))
        return (y, *states)

    exact = converted(torch.float64)
    judge(*({str(k): t for k, t in enumerate(ts)} for ts in (results[0], converted(low), exact)), "")


def test_autocast_of_the_cell() -> None:
    ours, x = FastLSTMCell(20, 72, device=DEVICE), torch.randn(3, 20, device=DEVICE)
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype=low):
            h, c = ours(x)
        assert h.dtype == c.dtype == low
        torch.testing.assert_close((h.float(), c.float()), ours(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 24}], ids=str)
def test_compiled_for_every_length(kwargs: dict[str, Any]) -> None:
    torch.compiler.reset()
    ours = FastLSTM(20, 72, **kwargs, device=DEVICE)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for steps, batch in ((7, 4), (12, 6), (5, 9)):
        x = torch.randn(steps, batch, 20, device=DEVICE)
        gradients = []
        outputs = []
        for call in (compiled, ours):
            y, (h_n, c_n) = call(x)
            gradients.append(torch.autograd.grad(y.square().sum() + c_n.sum(), list(ours.parameters())))
            outputs.append((y, h_n, c_n))
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*gradients)


def _error_of(function: Callable[..., Any], *args: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        function(*args)
    return type(caught.value), str(caught.value)


def _zeros(*shape: int, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, device=device, dtype=dtype)


ERRORS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "input on the CPU": lambda: (_zeros(5, 2, 3, device="cpu"),),
    "input and states on the CPU": lambda: (
        _zeros(5, 2, 3, device="cpu"),
        (_zeros(1, 2, 4, device="cpu"), _zeros(1, 2, 4, device="cpu")),
    ),
    "hidden state on the CPU": lambda: (_zeros(5, 2, 3), (_zeros(1, 2, 4, device="cpu"), _zeros(1, 2, 4))),
    "cell state on the CPU": lambda: (_zeros(5, 2, 3), (_zeros(1, 2, 4), _zeros(1, 2, 4, device="cpu"))),
    "input size": lambda: (_zeros(5, 2, 7),),
    "input dtype": lambda: (_zeros(5, 2, 3, dtype=torch.float64),),
    "hidden state batch": lambda: (_zeros(5, 2, 3), (_zeros(1, 1, 4), _zeros(1, 2, 4))),
    "no steps": lambda: (_zeros(0, 2, 3),),
    "2-D states": lambda: (_zeros(5, 2, 3), (_zeros(1, 4), _zeros(1, 4))),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_nn_lstm(case: str) -> None:
    torchs, ours = twins(3, 4)
    assert _error_of(ours, *ERRORS[case]()) == _error_of(torchs, *ERRORS[case]())


def test_parameters_on_the_cpu() -> None:
    x = _zeros(5, 2, 3)
    assert _error_of(FastLSTM(3, 4), x) == _error_of(nn.LSTM(3, 4), x)
    texts = []
    for module in twins(3, 4):
        module.bias_hh_l0 = nn.Parameter(module.bias_hh_l0.to("cpu"))
        texts.append(_error_of(module, x))
    assert texts[0] == texts[1]


def test_batch_sizes_on_the_gpu() -> None:
    weights = list(nn.LSTM(3, 4, device=DEVICE).parameters())
    with pytest.raises(RuntimeError, match="batch_sizes must be a 1-D int64 tensor on the CPU"):
        fastlstm.lstm(_zeros(3, 3), weights, batch_sizes=torch.tensor([2, 1], device=DEVICE))


def test_plans_are_shown() -> None:
    for H, dtype in ((64, torch.bfloat16), (512, torch.bfloat16), (512, torch.float64)):
        plan: Any = functools.partial(fastlstm.plan, device=DEVICE)
        shown = plan(T=100, B=16, I=H, H=H, dtype=dtype, training=True)
        assert any(family in str(shown) for family in FAMILIES)
        assert shown.to_dict()


def test_a_language_model_learns() -> None:
    pytest.importorskip("tokenizers")
    from lm_setup import TINY

    from fastlstm.lm.model import LSTMLanguageModel

    torch.manual_seed(1)
    model = LSTMLanguageModel(TINY.replace(hidden_size=128), FastLSTM).to(DEVICE)
    tokens = (torch.arange(16)[:, None] + torch.arange(8)).remainder(50).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = model.loss(tokens[:-1], tokens[1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0] / 4

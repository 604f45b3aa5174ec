"""Layer-normalised gates: the reference by hand, the kernels against the reference, and FastLSTM(layer_norm=True)."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_ops import Case, Problem, bf16_products, check, expected, plain_pytorch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import FastLSTM, _ops, reference
from fastlstm.verify import compare

FORCED = [(plan, isa) for plan in fastlstm.plans() for isa in fastlstm.available_isas()]
ALL = ("layer_norm", "reset_hx", "recurrent_mask", "zoneout", "cells")
norm_case = functools.partial(Case, extras=("layer_norm",))
# Sizes around the widths of vectors and tiles, and every option of the operator.
CASES = [
    norm_case(T=1, B=1, I=1, H=1),
    norm_case(T=2, B=3, I=5, H=7),
    norm_case(T=3, B=7, I=8, H=8, bias=False),
    norm_case(T=2, B=13, I=17, H=33, D=2),
    norm_case(T=2, B=2, I=257, H=260),
    norm_case(T=4, B=4, I=6, H=10, L=3, D=2, dropout=True),
    norm_case(T=5, B=3, I=6, H=19, P=5, L=2, D=2, bias=False),
    norm_case(T=9, B=8, I=4, H=18, L=2, D=2, lengths=(9, 9, 9, 4, 3, 3, 1, 1)),
    norm_case(T=8, B=5, I=5, H=33, D=2, lengths=(2, 0, 0, 6, 5), resets=0.4),
    norm_case(T=100, B=32, I=16, H=24),
    # More rows than a chunk of steps has.
    norm_case(T=7, B=250, I=3, H=5, L=2, D=2),
    norm_case(T=5, B=400, I=4, H=6, P=3, D=2, lengths=(5,) * 99 + (4,) * 101 + (2,) * 199 + (1,), resets=0.1),
    Case(T=6, B=5, I=7, H=18, resets=0.3, extras=ALL),
    Case(T=5, B=4, I=5, H=19, P=6, L=2, D=2, resets=0.3, dropout=True, extras=(*ALL, "recompute")),
    Case(T=7, B=4, I=3, H=9, D=2, lengths=(7, 4, 4, 1), resets=0.3, extras=ALL),
    Case(T=7, B=5, I=5, H=10, L=3, lengths=(3, 0, 7, 1, 5), resets=0.3, extras=(*ALL, "recompute")),
    Case(T=6, B=6, I=5, H=17, L=2, D=2, resets=0.4, extras=("layer_norm", "average", "last_cells")),
    Case(T=7, B=250, I=3, H=5, L=2, D=2, resets=0.1, extras=("layer_norm", "reset_hx", "recompute")),
]


# The last computes gates again of an h that is rounded: a difference that rows of five almost equal units magnify.
LOW_PRECISION = CASES[3:-1]


def legal(case: Case, plan: str) -> bool:
    return not (plan == "unpacked" and case.P)


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_reference_against_a_step_by_hand(P: int, bias: bool) -> None:
    B, I, H = 4, 3, 5  # noqa: E741
    draw = functools.partial(torch.randn, dtype=torch.float64)
    x, h, c = draw(B, I), draw(B, P or H), draw(B, H)
    w_ih, w_hh, w_hr = draw(4 * H, I), draw(4 * H, P or H), draw(P, H)
    b_ih, b_hh = (draw(4 * H), draw(4 * H)) if bias else (torch.zeros(4 * H), torch.zeros(4 * H))
    gain_ih, gain_hh, gain_c, bias_c = draw(4 * H), draw(4 * H), draw(H), draw(H)

    a = gain_ih * layer_norm(x @ w_ih.T, (4 * H,)) + b_ih + gain_hh * layer_norm(h @ w_hh.T, (4 * H,)) + b_hh
    i, f, g, o = a[:, :H], a[:, H : 2 * H], a[:, 2 * H : 3 * H], a[:, 3 * H :]
    c_1 = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    mean, variance = c_1.mean(1, keepdim=True), c_1.var(1, correction=0, keepdim=True)
    h_1 = torch.sigmoid(o) * torch.tanh(gain_c * (c_1 - mean) / (variance + 1e-5).sqrt() + bias_c)

    weights = [w_ih, w_hh, *[b_ih, b_hh] * bias, *[w_hr] * (P > 0), gain_ih, gain_hh, gain_c, bias_c]
    y, h_n, c_n = reference.lstm(
        x.unsqueeze(0), weights, h.unsqueeze(0), c.unsqueeze(0), has_bias=bias, layer_norm=True
    )
    torch.testing.assert_close((h_n[0], c_n[0]), (h_1 @ w_hr.T if P else h_1, c_1))
    assert torch.equal(y, h_n)


# ------------------------------------------------------------------------------------------------ the operators


@pytest.mark.parametrize(("plan", "isa"), FORCED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case: Case, plan: str, isa: str) -> None:
    if legal(case, plan):
        case = replace(case, dtype=torch.float64)
        with fastlstm.force(plan, isa):
            ours = Problem.of(case).solve(_ops.lstm, torch.float64)
        for name, tensor in ours.items():
            torch.testing.assert_close(
                tensor, expected(case)[1][name], rtol=1e-9, atol=1e-9, msg=f"{name}: {{}}".format
            )


@functools.cache
def plain_pytorchs_errors(case: Case) -> dict[str, Tensor]:
    """The exact results and, on top, the largest errors of plain PyTorch, inputs changed by a unit in the last place.

    Rows whose elements are almost alike are normalised by a large number, and with them their rounding errors. A single
    result of plain PyTorch may be right by luck there; what its inputs' last bits do to it may not.
    """
    exact = expected(case)[1]
    errors = {name: torch.zeros_like(tensor) for name, tensor in exact.items()}
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        problem = Problem.of(case)
        for t in (problem.x, problem.h_0, problem.c_0, *problem.weights):
            t.mul_(1 + (torch.rand(t.shape, generator=generator) - 0.5) * 2**-23)
        for name, tensor in problem.solve(plain_pytorch, torch.float32).items():
            errors[name] = torch.maximum(errors[name], (tensor - exact[name]).abs())
    return {name: exact[name] + error for name, error in errors.items()}


@pytest.mark.parametrize(("plan", "isa"), FORCED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case: Case, plan: str, isa: str) -> None:
    if legal(case, plan):
        with fastlstm.force(plan, isa):
            ours = Problem.of(case).solve(_ops.lstm, torch.float32)
        for name, tensor in ours.items():
            report = compare(name, tensor, plain_pytorchs_errors(case)[name], expected(case)[1][name])
            assert report.ok, str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("plan", "isa"), FORCED)
@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_other_dtypes(case: Case, plan: str, isa: str, dtype: torch.dtype) -> None:
    if legal(case, plan):
        with fastlstm.force(plan, isa, products="full"):
            check(replace(case, dtype=dtype))


@pytest.mark.parametrize("isa", fastlstm.available_isas())
@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_bf16_products(case: Case, isa: str) -> None:
    full, exact = expected(case)
    torchs = Problem.of(case).solve(plain_pytorch, torch.bfloat16)
    with bf16_products(isa):
        ours = Problem.of(case).solve(_ops.lstm, torch.float32)
    for name, tensor in ours.items():
        report = compare(name, tensor, torchs[name], exact[name], dtype=torch.bfloat16)
        assert report.ok, str(report)
    assert (ours["y"] - full["y"]).abs().max() > 1e-5, "nothing was rounded"


@pytest.mark.parametrize("products", ["full", "bf16"])
@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_threads_change_no_bit(case: Case, products: str) -> None:
    problem = Problem.of(case)
    for plan in ("packed",) if products == "bf16" or case.P else ("packed", "unpacked"):
        results = []
        for threads, split in itertools.product((1, 2, 3), ("rows", "units")):
            torch.set_num_threads(threads)
            with bf16_products(), fastlstm.force(plan, split=split, products=products):
                results.append(problem.solve(_ops.lstm, torch.float32))
        for other in results[1:]:
            assert all(torch.equal(t, other[name]) for name, t in results[0].items())


def test_a_row_does_not_depend_on_its_batch() -> None:
    p = Problem.of(norm_case(T=12, B=13, I=9, H=20))  # one sequence has rows enough for the input's packed product
    for plan, isa in itertools.product(("packed", "unpacked"), fastlstm.available_isas()):
        with fastlstm.force(plan, isa):
            y, _, _ = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options, extras=p.extras)
            x, h_0, c_0 = (t[:, 4:5].contiguous() for t in (p.x, p.h_0, p.c_0))
            alone, _, _ = _ops.lstm(x, p.weights, h_0, c_0, **p.options, extras=p.extras)
        assert torch.equal(alone[:, 0], y[:, 4]), (plan, isa)


def test_scales_of_the_matrices_do_not_matter() -> None:
    """Neither those of whole matrices nor a shift that all gates' products share: what normalisation is for."""
    p = Problem.of(replace(CASES[1], dtype=torch.float64))
    w_ih, w_hh, *others = p.weights
    y, _, c_n = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options, extras=p.extras)
    shift = torch.randn(1, w_hh.size(1), dtype=torch.float64)
    weights = [1000 * w_ih, 1000 * (w_hh + shift), *others]
    scaled_y, _, scaled_c_n = _ops.lstm(p.x, weights, p.h_0, p.c_0, **p.options, extras=p.extras)
    torch.testing.assert_close((scaled_y, scaled_c_n), (y, c_n), rtol=1e-4, atol=1e-4)  # but for epsilon
    assert (scaled_y != y).any()


@pytest.mark.parametrize("trainable", range(8))
def test_gradients_of_one_parameter_alone(trainable: int) -> None:
    case = replace(CASES[1], L=2, dtype=torch.float64)
    whole = expected(case)[1]
    for layer in range(2):
        p = Problem.of(case)
        k = 8 * layer + trainable
        p.weights[k].requires_grad_()
        outputs = _ops.lstm(p.x, p.weights, p.h_0, p.c_0, **p.options, extras=p.extras)
        generator = torch.Generator().manual_seed(2)
        d_outputs = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        (gradient,) = torch.autograd.grad(outputs, p.weights[k], d_outputs)
        torch.testing.assert_close(gradient, whole[f"d_weights[{k}]"], rtol=1e-9, atol=1e-9)


def arguments_of(case: Case) -> tuple[Any, ...]:
    """Of the operator, but for `save`."""
    p = Problem.of(case)
    structure = (case.L, case.D == 2, case.bias, False)
    options = (p.batch_sizes, p.lengths, p.reset_mask, p.dropout_mask, *structure)
    return p.x, [w.requires_grad_() for w in p.weights], p.h_0, p.c_0, options, p.extras


OPCHECKED = [CASES[1], CASES[6], CASES[12], CASES[14], CASES[15]]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case: Case) -> None:
    x, weights, h_0, c_0, options, extras = arguments_of(case)
    torch.library.opcheck(torch.ops.fastlstm.lstm.default, (x, weights, h_0, c_0, *options, True, *extras))
    with torch.no_grad():
        y, _, _, saved, cell_states = torch.ops.fastlstm.lstm(x, weights, h_0, c_0, *options, True, *extras)
        needs = [1] * (2 + len(weights) + (extras.reset_h is not None))
        d_cells = cell_states[0] if cell_states else None
        forward = _ops.Options(*options)._replace(extras=extras)
        backward = (y, None, None, x, weights, h_0, c_0, y, saved, *forward.of_backward(needs, d_cells))
        torch.library.opcheck(
            torch.ops.fastlstm.lstm_backward.default, backward, test_utils=["test_schema", "test_faketensor"]
        )


def test_what_is_saved() -> None:
    p = Problem.of(norm_case(T=4, B=3, I=5, H=7, P=2, L=2, D=2, dtype=torch.bfloat16))
    for recompute, rows in ((False, 12), (True, 0)):
        extras = p.extras._replace(recompute=recompute)
        options = (None, None, None, None, 2, True, True, False, True)
        *_, saved, _ = torch.ops.fastlstm.lstm(p.x, p.weights, p.h_0, p.c_0, *options, *extras)
        shapes = [[4, rows, 28], [4, 12, 7], [1, 12, 4], [4, rows, 28], [8, rows, 1]]
        assert [list(t.shape) for t in saved] == shapes and {t.dtype for t in saved} == {torch.float32}
        if recompute:
            continue
        assert saved[0].mean(-1).abs().max() < 1e-5
        torch.testing.assert_close(saved[3].square().mean(-1), torch.ones(4, 12), rtol=0.01, atol=0)
        with torch.no_grad(), fastlstm.force("packed"):
            first = torch.nn.functional.linear(p.x.float().flatten(0, 1), p.weights[0].float())
        torch.testing.assert_close(saved[4][0, :, 0], (first.var(1, correction=0) + 1e-5).rsqrt())


# ------------------------------------------------------------------------------------------------ derivatives


def module_of(**arguments: Any) -> FastLSTM:
    """With gains and biases as training makes them."""
    module = FastLSTM(3, 5, layer_norm=True, dtype=torch.float64, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}], ids=str)
def test_gradients_per_sample(arguments: dict[str, Any]) -> None:
    module = module_of(**arguments)
    x, lengths = torch.randn(4, 6, 3, dtype=torch.float64), torch.tensor([6, 2, 4, 1])
    parameters = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], sample: Tensor, length: Tensor) -> Tensor:
        y, (_, c_n) = torch.func.functional_call(module, weights, (sample,), {"lengths": length})
        return y.square().sum() + c_n.sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, lengths)
    for b in range(4):
        expected = torch.autograd.grad(loss(parameters, x[b], lengths[b]), parameters.values())
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(together[name][b], gradient, rtol=1e-9, atol=1e-9)


def test_second_derivatives_and_forward_mode() -> None:
    module = module_of(num_layers=2)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = [w.detach().requires_grad_() for w in module.parameters()]

    def outputs(x: Tensor, *weights: Tensor) -> Tensor:
        y, (_, c_n) = fastlstm.lstm(x, weights, num_layers=2, layer_norm=True)
        return torch.cat([y.flatten(), c_n.flatten()])

    assert torch.autograd.gradcheck(outputs, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, (x, *weights), fast_mode=True)
    tangent = torch.randn_like(x)
    _, d_outputs = torch.func.jvp(lambda x: outputs(x, *weights), (x.detach(),), (tangent,))
    (d_x,) = torch.autograd.grad(outputs(x, *weights), x, d_outputs)
    torch.testing.assert_close((d_x * tangent).sum(), d_outputs.square().sum())


@pytest.mark.parametrize("recompute", [False, True])
def test_compile(recompute: bool) -> None:
    torch.compiler.reset()
    module = module_of(num_layers=2, bidirectional=True, recompute=recompute)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for T, B in ((4, 2), (6, 3)):
        x = torch.randn(T, B, 3, dtype=torch.float64)
        gradients = []
        for call in (compiled, module):
            y, _ = call(x)
            gradients.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
        torch.testing.assert_close(*gradients)


def test_autocast() -> None:
    module = FastLSTM(6, 9, layer_norm=True)
    x = torch.randn(5, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (h_n, c_n) = module(x)
    assert {y.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), module(x)[0], rtol=0.05, atol=0.02)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


# ------------------------------------------------------------------------------------------------ the module


def test_parameters_and_their_initial_values() -> None:
    torch.manual_seed(3)
    theirs = nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    torch.manual_seed(3)
    ours = FastLSTM(3, 5, 2, bidirectional=True, proj_size=2, layer_norm=True)
    plain = dict(theirs.named_parameters())
    names = [name for name, _ in ours.named_parameters()]
    suffixes = ["l0", "l0_reverse", "l1", "l1_reverse"]
    added = ["weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c"]
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", *added]
    assert names == [f"{kind}_{suffix}" for suffix in suffixes for kind in kinds]
    assert ours.all_weights == [[getattr(ours, f"{kind}_{suffix}") for kind in kinds] for suffix in suffixes]
    for _ in range(2):
        for name, parameter in ours.named_parameters():
            if name in plain:
                assert torch.equal(parameter, plain[name])
            else:
                size = 5 if "_c_" in name else 20
                assert torch.equal(parameter, torch.zeros(size) if "bias" in name else torch.ones(size))
        torch.manual_seed(4)
        theirs.reset_parameters()
        with torch.no_grad():
            ours.bias_ln_c_l1.add_(1)  # type: ignore[operator,union-attr]
        torch.manual_seed(4)
        ours.reset_parameters()


def test_module_runs_the_operator_on_its_parameters() -> None:
    module = module_of(num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(3, 6, 3, dtype=torch.float64), torch.tensor([2, 6, 3])
    state = torch.zeros(4, 3, 5, dtype=torch.float64)
    expected = reference.lstm(
        x.transpose(0, 1), list(module.parameters()), state, state, lengths=lengths, num_layers=2, bidirectional=True,
        layer_norm=True,
    )  # fmt: skip
    y, states = module(x, lengths=lengths)
    torch.testing.assert_close((y.transpose(0, 1), *states), expected)
    packed, states = module(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(states, expected[1:])
    assert packed.data.shape == (11, 10)
    torch.testing.assert_close(module(x[1])[0], y[1])  # one sequence


def test_copies_of_a_module() -> None:
    module = module_of(proj_size=2)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = FastLSTM(3, 5, proj_size=2, layer_norm=True, dtype=torch.float64)
    loaded.load_state_dict(module.state_dict(), strict=True)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False), loaded):
        assert torch.equal(other(x)[0], module(x)[0])
    assert repr(module) == "FastLSTM(3, 5, proj_size=2, layer_norm=True)"
    assert "layer_norm" not in repr(FastLSTM(3, 5))


def test_weight_dropout_drops_recurrent_weights_alone() -> None:
    """With all of them dropped nothing of h_{t-1} is left but the norm of zeros, which is zero."""
    module = module_of(num_layers=2)
    module.weight_dropout = 1.0
    x, hx = torch.randn(1, 2, 3, dtype=torch.float64), torch.zeros(2, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x, (hx + 7, hx))[0], module(x, (hx, hx))[0])
    module.weight_dropout = 0.0
    assert (module(x, (hx + 7, hx))[0] - module(x, (hx, hx))[0]).abs().max() > 0.01


def test_plan() -> None:
    module = FastLSTM(16, 32, layer_norm=True)
    plan = fastlstm.plan(module, T=100, B=8, training=True)
    assert plan.bulk_input and plan == fastlstm.plan(T=100, B=8, I=16, H=32, training=True, layer_norm=True)
    plain = fastlstm.plan(T=100, B=8, I=16, H=32, training=True)
    assert plain != plan, "the same problem without normalisation costs less"


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("index", "shape", "name"),
    [(4, 19, "weight_ln_ih"), (5, 21, "weight_ln_hh"), (6, 20, "weight_ln_c"), (7, 1, "bias_ln_c")],
)
def test_shapes_that_do_not_fit(index: int, shape: int, name: str) -> None:
    weights = list(FastLSTM(3, 5, layer_norm=True).parameters())
    size = 5 if name.endswith("_c") else 20
    weights[index] = nn.Parameter(torch.ones(shape))
    x, state = torch.zeros(2, 2, 3), torch.zeros(1, 2, 5)
    with pytest.raises(RuntimeError, match=rf"^{name} must have shape \[{size}\], got \[{shape}\]$"):
        fastlstm.lstm(x, weights, layer_norm=True)
    options = (None, None, None, None, 1, False, True, False, False)
    with pytest.raises(RuntimeError, match=rf"{name} must have shape \[4?H\] = \[{size}\], got \[{shape}\]"):
        torch.ops.fastlstm.lstm(x, weights, state, state, *options, layer_norm=True)


def test_what_is_refused() -> None:
    module = FastLSTM(3, 5, layer_norm=True)
    weights = list(module.parameters())
    x, state = torch.zeros(2, 2, 3), torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match=r"= 8 tensors \(bias=True, .*, layer_norm=True\), got 4"):
        fastlstm.lstm(x, weights[:4], layer_norm=True)
    with pytest.raises(ValueError, match=r"= 4 tensors \(bias=True, hidden size 5, output size 5\), got 8"):
        fastlstm.lstm(x, weights)
    options = (None, None, None, None, 1, False, True, False, False)
    message = r"W_ih, W_hh, b_ih, b_hh, weight_ln_ih, weight_ln_hh, weight_ln_c, bias_ln_c\), got 4"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlstm.lstm(x, weights[:4], state, state, *options, layer_norm=True)
    with pytest.raises(TypeError, match="layer_norm should be of type bool, got: int"):
        FastLSTM(3, 5, layer_norm=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"nn\.LSTM has no layer_norm, which this module has"):
        module.to_torch()
    with fastlstm.force(bulk_input=False), pytest.raises(ValueError, match="layer_norm needs bulk_input=True"):
        module(x)


def test_saved_of_another_call_is_refused() -> None:
    weights = list(FastLSTM(3, 5, layer_norm=True).parameters())
    x, state = torch.zeros(2, 2, 3), torch.zeros(1, 2, 5)
    options = (None, None, None, None, 1, False, True, False)
    with torch.no_grad():
        y, _, _, saved, _ = torch.ops.fastlstm.lstm(x, weights, state, state, *options, True, layer_norm=True)

        def backward(saved: list[Tensor]) -> None:
            arguments = (y, None, None, x, weights, state, state, y, saved, *options, [1] * 10)
            torch.ops.fastlstm.lstm_backward(*arguments, layer_norm=True)

        backward(saved)
        with pytest.raises(RuntimeError, match="norm_ih, cells, layer_outputs, norm_hh and rstd, got 3 tensors"):
            backward(saved[:3])
        with pytest.raises(
            RuntimeError, match=r"norm_hh must have shape \[L\*D, N, 4H\] = \[1, 4, 20\], got \[1, 0, 20\]"
        ):
            backward([*saved[:3], saved[3][:, :0], saved[4]])
        with pytest.raises(RuntimeError, match=r"rstd must have shape \[2\*L\*D, N, 1\] = \[2, 4, 1\]"):
            backward([*saved[:4], saved[4][:1]])
        with pytest.raises(RuntimeError, match="saved must be passed as the forward pass returned it"):
            backward([*saved[:4], saved[4].double()])

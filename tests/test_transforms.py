"""Every way to differentiate: backward, twice, forward mode, torch.func's transforms, tracing.

All of it in fp64 against numerical derivatives (gradcheck), loops over samples, or nn.LSTM.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from fastlstm import FastLSTM, FastLSTMCell, lstm

T, B, I, H, V = 3, 2, 2, 3, 4  # noqa: E741
STACKS: list[dict[str, Any]] = [
    {"num_layers": layers, "bidirectional": both, "proj_size": proj, "bias": bias}
    for layers, both, proj, bias in itertools.product((1, 2), (False, True), (0, 2), (True, False))
]


def name(stack: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in stack.items())


every_stack = pytest.mark.parametrize("stack", STACKS, ids=name)
some_stacks = pytest.mark.parametrize("stack", [STACKS[0], STACKS[3], STACKS[12]], ids=name)


def make(**stack: Any) -> FastLSTM:
    return FastLSTM(I, H, dtype=torch.float64, **stack)


def function_of(module: FastLSTM, **options: Any) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The module as a function of (x, h_0, c_0, *weights) that returns all outputs, and such arguments."""
    structure = {"num_layers": module.num_layers, "bidirectional": module.bidirectional, "bias": module.bias}

    def function(x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        y, states, *cells = lstm(x, weights, (h_0, c_0), **structure, **options)  # type: ignore[call-overload]
        return y, *states, *cells

    states = module.num_layers * (1 + module.bidirectional)
    x = torch.randn(T, B, I, dtype=torch.float64)
    h_0, c_0 = (torch.randn(states, B, size, dtype=torch.float64) for size in (module.proj_size or H, H))
    return function, [t.detach().requires_grad_() for t in (x, h_0, c_0, *module.parameters())]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: p.detach() for key, p in module.named_parameters()}


def loss_of(module: nn.Module) -> Callable[..., Tensor]:
    def loss(weights: dict[str, Tensor], x: Tensor, **options: Any) -> Tensor:
        y, (h_n, c_n) = functional_call(module, weights, (x,), options)
        return y.square().sum() + h_n.sum() + c_n.sin().sum()

    return loss


def assert_rows(batched: dict[str, Tensor], of_sample: Callable[[int], dict[str, Tensor]]) -> None:
    for i in range(len(next(iter(batched.values())))):
        for key, expected in of_sample(i).items():
            torch.testing.assert_close(batched[key][i], expected)


class Operators(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastlstm":
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------ numerically


@every_stack
def test_gradcheck(stack: dict[str, Any]) -> None:
    function, arguments = function_of(make(**stack), return_cell_states="all")
    assert gradcheck(function, arguments)


@every_stack
def test_gradgradcheck(stack: dict[str, Any]) -> None:
    function, arguments = function_of(make(**stack))
    assert gradgradcheck(function, arguments, fast_mode=True)


@some_stacks
def test_forward_mode_gradcheck(stack: dict[str, Any]) -> None:
    function, arguments = function_of(make(**stack))
    assert gradcheck(
        function, arguments, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@some_stacks
def test_forward_over_reverse_gradcheck(stack: dict[str, Any]) -> None:
    function, arguments = function_of(make(**stack))
    assert gradgradcheck(function, arguments, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_of_everything_at_once(recompute: bool) -> None:
    module = make(num_layers=2)
    options = {
        "lengths": torch.tensor([3, 2]),
        "reset_mask": torch.tensor([[False, True], [True, False], [False, False]]),
        "zoneout": (0.3, 0.2),
        "return_cell_states": True,
        "recompute": recompute,
    }
    _, arguments = function_of(module, **options)
    reset_hx = [torch.randn(2, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def with_resets(reset_h: Tensor, reset_c: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return function_of(module, **options, reset_hx=(reset_h, reset_c))[0](*others)

    assert gradcheck(with_resets, (*reset_hx, *arguments))
    assert gradgradcheck(with_resets, (*reset_hx, *arguments), fast_mode=True)


def test_second_derivatives_of_packed_sequences() -> None:
    module = make(bidirectional=True)
    packed = pack_sequence([torch.randn(n, I, dtype=torch.float64) for n in (3, 2)])

    def function(rows: Tensor) -> Tensor:
        return module(packed._replace(data=rows))[0].data

    assert gradgradcheck(function, packed.data.requires_grad_())


def test_a_gradient_penalty_in_eval_mode() -> None:
    """The loss of WGAN-GP, which nn.LSTM has no second derivative for on a GPU, nor a first one in eval mode."""
    ours = make(num_layers=2).eval()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    gradients = []
    for module in (ours, ours.to_torch()):
        (d_x,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        penalty = (d_x.norm(dim=(0, 2)) - 1).square().sum()
        gradients.append(torch.autograd.grad(penalty, list(module.parameters()), allow_unused=True))
    # The last layer's biases of nn.LSTM are no part of the graph where ours have a gradient of zero.
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)


def test_the_first_gradient_of_a_double_backward_comes_from_the_kernels() -> None:
    module = make()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(module(x)[0].sum(), x)[0]
    y, _ = module(x)
    with Operators() as operators:
        (d_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert operators.calls == ["lstm_backward.default"]
    assert torch.equal(d_x, expected)


# ------------------------------------------------------------------------------------------------ forward mode


@pytest.fixture
def pair() -> tuple[FastLSTM, nn.LSTM]:
    ours = FastLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    return ours, ours.to_torch()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_mode(pair: tuple[FastLSTM, nn.LSTM], dtype: torch.dtype) -> None:
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    expected = jvp(lambda a: pair[1](a)[0], (x,), (tangent,))  # in fp32 nn.LSTM has none
    ours = pair[0].to(dtype)
    y, d_y = jvp(lambda a: ours(a)[0], (x.to(dtype),), (tangent.to(dtype),))
    assert d_y.dtype == dtype and d_y.abs().max() > 0
    torch.testing.assert_close((y.double(), d_y.double()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_dual_numbers(pair: tuple[FastLSTM, nn.LSTM], frozen: bool) -> None:
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    tangents = []
    for module in pair:
        module.requires_grad_(not frozen)
        with forward_ad.dual_level():
            y, _ = module(forward_ad.make_dual(x, tangent))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


# ------------------------------------------------------------------------------------------------ torch.func


@some_stacks
def test_jacobians_and_hessians(stack: dict[str, Any]) -> None:
    module = make(**stack)
    x = torch.randn(T, 1, I, dtype=torch.float64)

    def output(x: Tensor) -> Tensor:
        return module(x)[0]

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    expected = torch.autograd.functional.jacobian(output, x)
    for jacobian in (jacrev(output), jacfwd(output), jacrev(output, chunk_size=2)):
        torch.testing.assert_close(jacobian(x), expected)
    expected = torch.autograd.functional.hessian(loss, x)
    for second in (hessian(loss), jacrev(jacrev(loss)), jacrev(jacfwd(loss)), jacfwd(jacfwd(loss))):
        torch.testing.assert_close(second(x), expected)


@every_stack
def test_per_sample_gradients_are_those_of_a_loop(stack: dict[str, Any]) -> None:
    module = make(**stack)
    weights, loss = weights_of(module), loss_of(module)
    xs = torch.randn(V, T, B, I, dtype=torch.float64)
    with Operators() as operators:
        per_sample = vmap(grad(loss), (None, 0))(weights, xs)
    assert operators.calls == ["lstm.default", "lstm_backward.default"], "not one call for all samples"
    assert_rows(per_sample, lambda i: grad(loss)(weights, xs[i]))


def test_per_sample_gradients_of_unbatched_input() -> None:
    module = make()
    weights, loss = weights_of(module), loss_of(module)
    xs = torch.randn(T, V, I, dtype=torch.float64)
    per_sample = vmap(grad(loss), (None, 1))(weights, xs)
    assert_rows(per_sample, lambda i: grad(loss)(weights, xs[:, i]))


def test_per_sample_options() -> None:
    module = make(num_layers=2)
    module.recompute = True
    weights, loss = weights_of(module), loss_of(module)
    xs = torch.randn(V, T, B, I, dtype=torch.float64)
    lengths, mask = torch.randint(0, T + 1, (V, B)), torch.rand(V, T, B) < 0.3
    reset_hx = tuple(torch.randn(V, 2, B, H, dtype=torch.float64) for _ in range(2))

    def with_options(weights: dict[str, Tensor], x: Tensor, lengths: Tensor, mask: Tensor, *reset: Tensor) -> Tensor:
        return loss(weights, x, lengths=lengths, reset_mask=mask, reset_hx=reset)

    per_sample = vmap(grad(with_options), (None, 0, 0, 0, 0, 0))(weights, xs, lengths, mask, *reset_hx)
    assert_rows(
        per_sample, lambda i: grad(with_options)(weights, xs[i], lengths[i], mask[i], reset_hx[0][i], reset_hx[1][i])
    )


def test_nested_per_sample_gradients() -> None:
    module = make(bidirectional=True)
    weights, loss = weights_of(module), loss_of(module)
    xs = torch.randn(2, V, T, B, I, dtype=torch.float64)
    nested = vmap(vmap(grad(loss), (None, 0)), (None, 0))(weights, xs)
    assert_rows(nested, lambda i: vmap(grad(loss), (None, 0))(weights, xs[i]))


def test_per_sample_gradients_can_be_differentiated() -> None:
    """A penalty on the norm of each sample's gradient."""
    module = make()
    weights, loss = weights_of(module), loss_of(module)
    xs = torch.randn(V, T, B, I, dtype=torch.float64)

    def penalty(weights: dict[str, Tensor], together: bool) -> Tensor:
        if together:
            of_samples = vmap(grad(loss), (None, 0))(weights, xs)
        else:
            alone = [grad(loss)(weights, x) for x in xs]
            of_samples = {key: torch.stack([g[key] for g in alone]) for key in weights}
        return torch.stack([g.flatten(1).norm(dim=1).sum() for g in of_samples.values()]).sum()

    torch.testing.assert_close(grad(penalty)(weights, True), grad(penalty)(weights, False))


@some_stacks
def test_ensembles_of_weights(stack: dict[str, Any]) -> None:
    modules = [make(**stack) for _ in range(V)]
    stacked, _ = torch.func.stack_module_state(modules)  # type: ignore[arg-type]
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, _ = vmap(lambda weights: functional_call(modules[0], weights, (x,)))(stacked)
    for i, module in enumerate(modules):
        torch.testing.assert_close(y[i], module(x)[0])
    loss = loss_of(modules[0])
    gradients = vmap(grad(loss), (0, None))(stacked, x)
    assert_rows(gradients, lambda i: grad(loss)(weights_of(modules[i]), x))


@some_stacks
def test_vmap_over_sequences_is_one_call(stack: dict[str, Any]) -> None:
    module = make(**stack)
    xs = torch.randn(T, B, V, I, dtype=torch.float64)
    with Operators() as operators:
        y, (h_n, c_n) = vmap(module, in_dims=2, out_dims=1)(xs)
    assert operators.calls == ["lstm.default"]
    for i in range(V):
        torch.testing.assert_close((y[:, i], (h_n[:, i], c_n[:, i])), module(xs[:, :, i]))
    (y.sum() + c_n.sum()).backward()
    got = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    for i in range(V):
        z, (_, c) = module(xs[:, :, i])
        (z.sum() + c.sum()).backward()
    torch.testing.assert_close(got, [p.grad for p in module.parameters()])


def test_vmap_of_a_cell() -> None:
    cell = FastLSTMCell(3, 4)
    x = torch.randn(6, 2, 3)
    h, c = torch.vmap(cell)(x)
    for k in range(6):
        torch.testing.assert_close((h[k], c[k]), cell(x[k]))
    states = torch.randn(6, 2, 4), torch.randn(6, 2, 4)
    d_x = vmap(grad(lambda x, h, c: cell(x, (h, c))[0].sum()))(x, *states)
    torch.testing.assert_close(d_x[3], grad(lambda x: cell(x, (states[0][3], states[1][3]))[0].sum())(x[3]))


def test_transforms_under_autocast() -> None:
    ours = FastLSTM(3, 4)
    x, tangent = torch.randn(2, 5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, d_y = jvp(lambda a: ours(a)[0], (x,), (tangent,))
        d_x = grad(lambda a: ours(a)[0].float().sum())(x)
        together = torch.vmap(lambda a: ours(a)[0])(torch.stack([x, tangent]))
    assert d_y.dtype == together.dtype == torch.bfloat16
    _, expected = jvp(lambda a: ours(a)[0], (x,), (tangent,))
    torch.testing.assert_close(d_y.float(), expected, rtol=0.1, atol=0.02)
    torch.testing.assert_close(d_x, grad(lambda a: ours(a)[0].sum())(x), rtol=0.1, atol=0.05)
    torch.testing.assert_close(together[1].float(), ours(tangent)[0], rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("transform", "batches"), [(grad, ()), (lambda f: vmap(grad(f), (None, 0)), (V,))], ids=["grad", "per_sample"]
)
def test_compiled_transforms(transform: Callable[..., Any], batches: tuple[int, ...]) -> None:
    module = make(num_layers=2, bidirectional=True)
    weights, loss = weights_of(module), loss_of(module)
    compiled = torch.compile(transform(loss), backend="aot_eager", fullgraph=True)
    for steps in (3, 5):
        xs = torch.randn(*batches, steps, B, I, dtype=torch.float64)
        torch.testing.assert_close(compiled(weights, xs), transform(loss)(weights, xs))


def test_errors_under_transforms() -> None:
    module = make()
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 2, got 3"):
        vmap(module)(torch.randn(V, T, B, I + 1, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ tracing


def test_trace_and_save() -> None:
    module = FastLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(module, (x,)), buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(x), module(x))

"""The quick call of the operator: what PyTorch can do with an operator and its gradient, it can do with this one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastlstm import _C, FastLSTM, _ops
from fastlstm._operators import NO_EXTRAS

OPERATOR = torch.ops.fastlstm.lstm.default


@pytest.fixture
def arguments() -> list[Any]:
    """Of `_C.lstm`: a single layer of 4 units over 3 steps of 2 rows of 5 features."""
    torch.manual_seed(0)
    weights = [torch.randn(16, n) for n in (5, 4)] + [torch.randn(16), torch.randn(16)]
    states = [torch.randn(1, 2, 4), torch.randn(1, 2, 4)]
    return [torch.randn(3, 2, 5), weights, *states, None, None, None, None, 1, False, True, False]


@pytest.fixture
def all_arguments(arguments: list[Any]) -> list[Any]:
    """With those that are rarely given."""
    return [*arguments, *NO_EXTRAS]


def assert_same(outputs: Any, expected: Any) -> None:
    for output, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, right, rtol=0, atol=0)


def test_it_returns_what_torch_ops_returns(arguments: list[Any], all_arguments: list[Any]) -> None:
    assert_same(_C.lstm(*all_arguments), OPERATOR(*arguments, False)[:3])
    *_, expected = OPERATOR(*arguments, False, cell_layers=1)
    assert_same(_C.lstm(*arguments, *NO_EXTRAS._replace(cell_layers=1))[3:], expected)
    with torch.inference_mode():
        outputs = _C.lstm(*all_arguments)
        assert outputs is not None and all(output.is_inference() for output in outputs)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, None), (0, [[1.0]]), (1, ()), (1, [None] * 4), (4, 3), (8, 1.0), (8, True), (9, 0), (11, None),
        (12, 3), (16, False), (17, 0), (18, None), (19, 1.0), (20, 1), (21, 0),
    ],
)  # fmt: skip
def test_it_leaves_other_types_to_torch_ops(all_arguments: list[Any], position: int, value: Any) -> None:
    all_arguments[position] = value
    assert _C.lstm(*all_arguments) is None


def test_it_refuses_another_number_of_arguments(all_arguments: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="takes 22 arguments, got 21"):
        _C.lstm(*all_arguments[:-1])
    with pytest.raises(RuntimeError, match=re.escape("num_layers must be positive")):
        _C.lstm(*all_arguments[:8], -(2**63), *all_arguments[9:])
    with pytest.raises(OverflowError):
        _C.lstm(*all_arguments[:8], 2**70, *all_arguments[9:])


class Subclass(Tensor):
    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_of_tensor_see_the_operator(arguments: list[Any]) -> None:
    expected = _ops.lstm(*arguments[:-1])
    Subclass.seen = []
    outputs = _ops.lstm(arguments[0].as_subclass(Subclass), *arguments[1:-1])
    assert OPERATOR in Subclass.seen
    assert all(isinstance(output, Subclass) for output in outputs)
    assert_same([output.as_subclass(Tensor) for output in outputs], expected)


def test_modes_see_the_operator(arguments: list[Any]) -> None:
    seen = []

    class Function(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for mode in (Function(), Dispatch()):
        seen.clear()
        with mode:
            _ops.lstm(*arguments[:-1])
        assert OPERATOR in seen, mode


def test_the_profiler_sees_the_operator_and_its_gradient(arguments: list[Any]) -> None:
    arguments[0].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _ops.lstm(*arguments[:-1])[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastlstm::lstm", "fastlstm::lstm_backward"} <= names


@pytest.fixture
def lstm() -> FastLSTM:
    torch.manual_seed(0)
    return FastLSTM(5, 4, num_layers=2)


def gradients(lstm: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(lstm.parameters()), retain_graph=True))


def test_hooks_of_saved_tensors_and_checkpoints(lstm: FastLSTM) -> None:
    x = torch.randn(3, 2, 5, requires_grad=True)
    expected = gradients(lstm, lstm(x)[0].sum())
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = lstm(x)[0].sum()
    assert_same(gradients(lstm, loss), expected)
    kept = {tensor.data_ptr() for tensor in packed}
    assert {p.data_ptr() for p in lstm.parameters()} | {x.data_ptr()} <= kept

    again = checkpoint(lambda x: lstm(x)[0].sum(), x, use_reentrant=False)
    assert_same(gradients(lstm, again), expected)


def test_backward_notices_what_changed_in_place(lstm: FastLSTM) -> None:
    y, _ = lstm(torch.randn(3, 2, 5))
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_backward_needs_is_freed_with_the_graph(lstm: FastLSTM) -> None:
    y, _ = lstm(torch.randn(3, 2, 5))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_the_gradient_alone_can_be_differentiated(arguments: list[Any]) -> None:
    """`lstm_backward` called by its name: a function of all its tensors, those without a gradient come back empty."""
    x, weights, h_0, c_0, *options = arguments
    x = x.double().requires_grad_()
    weights, h_0, c_0 = [w.double() for w in weights], h_0.double(), c_0.double()
    needs = [1, 0, 1, 0, 0, 0]

    def gradient(d_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _, _, saved, _ = OPERATOR(x, weights, h_0, c_0, *options, True)
        d_x, d_h_0, d_c_0, d_weights, _ = torch.ops.fastlstm.lstm_backward(
            d_y, None, None, x, weights, h_0, c_0, y.detach(), saved, *options, needs
        )
        assert [t.numel() for t in (d_h_0, d_c_0, *d_weights[1:])] == [0] * 5
        return d_x, d_weights[0]

    d_y = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gradient, (d_y, x))


def test_weights_whose_memory_has_been_freed(lstm: FastLSTM) -> None:
    """As FSDP2 frees them between forward and backward, if it cannot see that a backward pass will come."""
    x = torch.randn(3, 2, lstm.input_size)
    y, _ = lstm(x)
    lstm.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="every weight must have memory, got one whose storage has been freed"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="every weight must have memory, got one whose storage has been freed"):
        lstm(x)

"""reset_hx, return_cell_states and recompute: states that go in, come out, and are not kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastlstm import FastLSTM, lstm

T, B, I, H = 7, 4, 3, 5  # noqa: E741
LENGTHS = torch.tensor([3, 7, 1, 5])
STACKS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    {"num_layers": 3, "bidirectional": True, "proj_size": 2},
    {"num_layers": 2, "batch_first": True, "bias": False},
]


def make(**kwargs: Any) -> FastLSTM:
    return FastLSTM(I, H, dtype=torch.float64, **kwargs)


def draw(module: FastLSTM) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    states = module.num_layers * (1 + module.bidirectional)
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=torch.float64)
    h, c = (torch.randn(states, B, n, dtype=torch.float64) for n in (module.proj_size or H, H))
    return x, (h, c)


def cells_of_a_loop(module: FastLSTM, x: Tensor, hx: tuple[Tensor, Tensor]) -> list[Tensor]:
    """c_t of each layer of a unidirectional stack, by steps of nn.LSTM."""
    torchs, state, cells = module.to_torch(), hx, []
    time = 1 if module.batch_first else 0
    for x_t in x.split(1, dim=time):
        _, state = torchs(x_t, state)
        cells.append(state[1])
    of_layers = torch.stack(cells, dim=1)  # [L, T, B, H]
    return list((of_layers.transpose(1, 2) if module.batch_first else of_layers).unbind(0))


@pytest.mark.parametrize("stack", [s for s in STACKS if "bidirectional" not in s], ids=str)
def test_cell_states_are_those_of_a_loop(stack: dict[str, Any]) -> None:
    module = make(**stack)
    x, hx = draw(module)
    leaves = [x.requires_grad_(), *(h.requires_grad_() for h in hx), *module.parameters()]
    y, _, cells = module(x, hx, return_cell_states=True)
    _, _, of_all = module(x, hx, return_cell_states="all")
    expected = cells_of_a_loop(module, x, hx)
    assert cells.shape == (*x.shape[:-1], H) and y.shape[:-1] == x.shape[:-1]
    torch.testing.assert_close(cells, expected[-1])
    torch.testing.assert_close(of_all, torch.stack(expected))
    weights = torch.randn_like(of_all)
    torch.testing.assert_close(
        torch.autograd.grad((of_all * weights).sum(), leaves),
        torch.autograd.grad((torch.stack(expected) * weights).sum(), leaves),
    )


def test_cell_states_of_both_directions_lie_side_by_side() -> None:
    module = make(num_layers=2, bidirectional=True)
    x, hx = draw(module)
    _, (_, c_n), cells = module(x, hx, return_cell_states="all")
    assert cells.shape == (2, T, B, 2 * H)
    for layer in range(2):
        assert torch.equal(cells[layer, -1, :, :H], c_n[2 * layer])
        assert torch.equal(cells[layer, 0, :, H:], c_n[2 * layer + 1])
    assert torch.equal(module(x, hx, return_cell_states=True)[2], cells[1])


def test_cell_states_of_every_layout() -> None:
    module = make(bidirectional=True)
    x, hx = draw(module)
    _, _, padded = module(x, hx, lengths=LENGTHS, return_cell_states=True)
    assert all(not padded[n:, b].any() and padded[:n, b].all() for b, n in enumerate(LENGTHS.tolist()))
    packed_x = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    _, _, packed = module(packed_x, hx, return_cell_states=True)
    assert isinstance(packed, PackedSequence)
    assert torch.equal(pad_packed_sequence(packed)[0], padded)
    _, _, rows = module(packed_x, hx, return_cell_states="all")
    assert torch.equal(rows, packed.data.unsqueeze(0))
    _, _, of_one = module(x[:, 0], (hx[0][:, 0], hx[1][:, 0]), return_cell_states=True)
    torch.testing.assert_close(of_one, module(x, hx, return_cell_states=True)[2][:, 0])
    _, _, of_all = module(x[:, 0], (hx[0][:, 0], hx[1][:, 0]), return_cell_states="all")
    assert torch.equal(of_all[0], of_one)


@pytest.mark.parametrize("stack", STACKS[:2] + STACKS[3:], ids=str)
def test_resets_set_the_given_states(stack: dict[str, Any]) -> None:
    module = make(**stack)
    torchs = module.to_torch()
    x, hx = draw(module)
    _, reset_hx = draw(module)
    leaves = [t.requires_grad_() for t in (x, *hx, *reset_hx)] + list(module.parameters())
    mask = torch.rand(x.shape[:2]) < 0.4
    y, states = module(x, hx, reset_mask=mask, reset_hx=reset_hx)
    time = 1 if module.batch_first else 0
    steps, state = [], hx
    for x_t, starts in zip(x.split(1, dim=time), mask.unbind(dim=time), strict=True):
        state = tuple(torch.where(starts[None, :, None], r, s) for s, r in zip(state, reset_hx, strict=True))  # type: ignore[assignment]
        y_t, state = torchs(x_t, state)
        steps.append(y_t)
    expected = torch.cat(steps, dim=time)
    torch.testing.assert_close((y, states), (expected, state))
    seeds = [torch.randn_like(t) for t in (y, *states)]
    torch.testing.assert_close(
        torch.autograd.grad([y, *states], leaves, seeds), torch.autograd.grad([expected, *state], leaves, seeds)
    )


def test_reset_states_follow_the_order_of_packed_sequences() -> None:
    module = make(num_layers=2, bidirectional=True)
    x, hx = draw(module)
    _, reset_hx = draw(module)
    mask = torch.rand(T, B) < 0.4
    expected = module(x, hx, lengths=LENGTHS, reset_mask=mask, reset_hx=reset_hx)
    packed, packed_mask = (pack_padded_sequence(t, LENGTHS, enforce_sorted=False) for t in (x, mask))
    y, states = module(packed, hx, reset_mask=packed_mask, reset_hx=reset_hx)
    torch.testing.assert_close((pad_packed_sequence(y)[0], states), expected)


def test_a_learned_initial_state() -> None:
    """That is hx at the beginning and reset_hx from then on: all pieces of a sequence begin alike."""
    module = make()
    x, _ = draw(module)
    initial = [torch.randn(1, 1, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    state = tuple(s.expand(1, B, H) for s in initial)
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[3] = True
    y, _ = module(x, state, reset_mask=mask, reset_hx=state)
    first, second = module(x[:3], state)[0], module(x[3:], state)[0]
    torch.testing.assert_close(y, torch.cat([first, second]))
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), initial), torch.autograd.grad(first.sum() + second.sum(), initial)
    )


def test_unbatched_resets() -> None:
    module = make()
    x, hx = draw(module)
    mask = torch.rand(T, B) < 0.5
    y, _ = module(x, hx, reset_mask=mask, reset_hx=hx)
    one = (hx[0][:, 0], hx[1][:, 0])
    torch.testing.assert_close(module(x[:, 0], one, reset_mask=mask[:, 0], reset_hx=one)[0], y[:, 0])


@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_recomputed_gates_give_the_same_gradients(stack: dict[str, Any]) -> None:
    module = make(**stack)
    x, hx = draw(module)
    leaves = [x.requires_grad_(), *(h.requires_grad_() for h in hx), *module.parameters()]
    expected = torch.autograd.grad(module(x, hx)[0].square().sum(), leaves)
    module.recompute = True
    torch.testing.assert_close(torch.autograd.grad(module(x, hx)[0].square().sum(), leaves), expected)


def test_recompute_keeps_a_third() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def elements(module: FastLSTM) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(torch.randn(50, 8, 4))
        return sum(kept) - sum(p.numel() for p in module.parameters())

    # x and the initial states aside: y, c and with them the four gates.
    assert elements(FastLSTM(4, 32, recompute=True)) < 0.4 * elements(FastLSTM(4, 32))


def test_compiled() -> None:
    module = FastLSTM(I, H, 2, recompute=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    hx = tuple(torch.randn(2, B, H) for _ in range(2))
    for steps in (3, 5):
        x, mask = torch.randn(steps, B, I), torch.rand(steps, B) < 0.3
        arguments = {"reset_mask": mask, "reset_hx": hx, "return_cell_states": True}
        results = []
        for call in (compiled, module):
            y, states, cells = call(x, hx, **arguments)
            gradients = torch.autograd.grad(y.sum() + cells.square().sum(), list(module.parameters()))
            results.append([y, *states, cells, *gradients])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    module = FastLSTM(I, H, dtype=dtype, recompute=True)
    x, hx = torch.randn(T, B, I, dtype=dtype), tuple(torch.randn(1, B, H, dtype=dtype) for _ in range(2))
    y, _, cells = module(x, hx, reset_mask=torch.rand(T, B) < 0.3, reset_hx=hx, return_cell_states=True)
    assert y.dtype == cells.dtype == dtype
    (y.sum() + cells.sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in module.parameters())


def test_autocast() -> None:
    module = FastLSTM(I, H)
    x, hx = torch.randn(T, B, I), tuple(torch.randn(1, B, H) for _ in range(2))
    arguments: dict[str, Any] = {"reset_mask": torch.rand(T, B) < 0.3, "reset_hx": hx, "return_cell_states": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _, cells = module(x, hx, **arguments)
    assert y.dtype == cells.dtype == torch.bfloat16
    torch.testing.assert_close(cells.float(), module(x, hx, **arguments)[2], rtol=0.05, atol=0.05)


MASK = torch.zeros(T, B, dtype=torch.bool)
STATE = torch.zeros(1, B, H)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reset_hx": (STATE, STATE)}, RuntimeError, "reset_hx must come with a reset_mask"),
        (
            {"reset_mask": MASK, "reset_hx": (STATE[:, :2], STATE)},
            RuntimeError,
            r"reset_hx\[0\] must have the shape and dtype of hx, \[1, 4, 5\] torch.float32, got \[1, 2, 5\]",
        ),
        (
            {"reset_mask": MASK, "reset_hx": (STATE, STATE.double())},
            RuntimeError,
            r"reset_hx\[1\] must have the shape and dtype of hx, .* got \[1, 4, 5\] torch.float64",
        ),
        ({"reset_mask": MASK, "reset_hx": (STATE,)}, RuntimeError, "reset_hx must hold two states, like hx, got 1"),
        ({"return_cell_states": "last"}, ValueError, "return_cell_states must be True, False or \"all\", got 'last'"),
        ({"return_cell_states": 2}, ValueError, 'return_cell_states must be True, False or "all", got 2'),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FastLSTM(I, H)(torch.zeros(T, B, I), **arguments)


def test_the_function_types_what_it_returns() -> None:
    weights = list(nn.LSTM(I, H).parameters())
    y, (h_n, c_n), cells = lstm(torch.randn(T, B, I), weights, return_cell_states=True)
    assert torch.equal(cells[-1], c_n[0]) and torch.equal(y[-1], h_n[0])

"""weight_dropout, recurrent_dropout and zoneout: their equations, their draws, and where they do not apply."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastlstm import FastLSTM, _ops, functional, lstm
from fastlstm._operators import Extras

T, B, I, H = 6, 5, 4, 7  # noqa: E741
ALL = {"weight_dropout": 0.5, "recurrent_dropout": 0.3, "zoneout": (0.4, 0.2)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Extras]]:
    """What the calls of a test hand to the operator."""
    seen: list[Extras] = []
    right: Callable[..., Any] = _ops.lstm

    def watched(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return right(*arguments)

    monkeypatch.setattr(_ops, "lstm", watched)
    yield seen


def loop(module: FastLSTM, x: Tensor, mask: Tensor, keep_h: Tensor, keep_c: Tensor) -> Tensor:
    """The papers' equations for a single layer, step by step, on nn.LSTMCell."""
    cell = nn.LSTMCell(I, H, dtype=x.dtype)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in module.state_dict().items()})
    h = c = x.new_zeros(B, H)
    outputs = []
    for x_t, kept_h, kept_c in zip(x, keep_h, keep_c, strict=True):
        new_h, new_c = cell(x_t, (h * mask, c))
        h, c = torch.where(kept_h, h, new_h), torch.where(kept_c, c, new_c)
        outputs.append(h)
    return torch.stack(outputs)


def test_equations(drawn: list[Extras]) -> None:
    module = FastLSTM(I, H, recurrent_dropout=0.3, zoneout=(0.4, 0.2), dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, _ = module(x)
    (masks,) = drawn
    assert masks.recurrent_mask is not None and masks.zoneout_h is not None and masks.zoneout_c is not None
    expected = loop(module, x, masks.recurrent_mask[0], masks.zoneout_h[0], masks.zoneout_c[0])
    torch.testing.assert_close(y, expected)


def drop(tensor: Tensor) -> Tensor:
    """Half of the elements, with the draws of the module."""
    return tensor * 2 * ~functional._draw_marks(tensor.shape, 0.5, tensor.device)


@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 3}, {"bias": False}])
def test_weight_dropout_is_dropout_of_the_recurrent_weights(kwargs: dict[str, Any]) -> None:
    module = FastLSTM(I, H, weight_dropout=0.5, dtype=torch.float64, **kwargs)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(3)
    y, _ = module(x)
    y.sum().backward()
    torch.manual_seed(3)
    torchs = nn.LSTM(I, H, dtype=torch.float64, **kwargs)
    for name, p in module.named_parameters():
        setattr(torchs, name, nn.Parameter(p.detach().clone()))
    torch.manual_seed(3)
    dropped = {n: drop(p) if n.startswith("weight_hh") else p for n, p in torchs.named_parameters()}
    expected, _ = torch.func.functional_call(torchs, dropped, (x,))
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(module.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    zeros = dropped["weight_hh_l0"] == 0
    share, count = zeros.double().mean().item(), zeros.numel()
    assert abs(share - 0.5) < 4 * (0.25 / count) ** 0.5 and not module.weight_hh_l0.grad[zeros].any()  # type: ignore[index, union-attr]


def test_rates_and_values_of_the_masks(drawn: list[Extras]) -> None:
    """Within four standard deviations of the rates, which one right draw in 16000 is not; the seed is fixed."""
    module = FastLSTM(2, 100, 2, recurrent_dropout=0.3, zoneout=(0.4, 0.1))
    module(torch.randn(20, 50, 2))
    (masks,) = drawn
    mask, kept_h, kept_c = masks.recurrent_mask, masks.zoneout_h, masks.zoneout_c
    assert mask is not None and kept_h is not None and kept_c is not None
    assert mask.shape == (2, 50, 100)  # not of steps: it is the same at all of them
    assert kept_h.shape == kept_c.shape == (2, 20, 50, 100)
    assert torch.equal(mask.unique(), torch.tensor([0, 1 / 0.7]))
    for share, p in (((mask == 0), 0.3), (kept_h, 0.4), (kept_c, 0.1)):
        assert abs(share.double().mean().item() - p) < 4 * (p * (1 - p) / share.numel()) ** 0.5
    # No two layers, sequences, steps or states have the same draw.
    for tensor in (mask, kept_h, kept_c):
        rows = tensor.flatten(0, -2)
        assert len(rows.unique(dim=0)) == len(rows)
    assert not torch.equal(kept_h, kept_c)


def test_one_seed_gives_the_same_bits() -> None:
    module = FastLSTM(I, H, 2, dropout=0.5, **ALL)
    x = torch.randn(T, B, I)

    def training_step(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        y, states = module(x)
        return [y, *states, *torch.autograd.grad(y.sum(), list(module.parameters()))]

    first = training_step(5)
    torch.set_num_threads(2)
    again, other = training_step(5), training_step(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_out_of_training_only_zoneout_is_left_as_an_average() -> None:
    module = FastLSTM(I, H, **ALL, dtype=torch.float64).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    state = torch.random.get_rng_state()
    y, _ = module(x)
    assert torch.equal(torch.random.get_rng_state(), state), "something was drawn"
    cell = nn.LSTMCell(I, H, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in module.state_dict().items()})
    h = c = x.new_zeros(B, H)
    for t in range(T):
        new_h, new_c = cell(x[t], (h, c))
        h, c = 0.4 * h + 0.6 * new_h, 0.2 * c + 0.8 * new_c
        torch.testing.assert_close(y[t], h)
    plain = FastLSTM.from_torch(FastLSTM(I, H, dtype=torch.float64).to_torch())
    plain.load_state_dict(module.state_dict())
    module.zoneout = (0.0, 0.0)
    assert torch.equal(module(x)[0], plain(x)[0])


@pytest.mark.parametrize("p", [0, 1])
def test_extreme_rates(p: int) -> None:
    x = torch.randn(T, B, I)
    h_0, c_0 = torch.randn(1, B, H), torch.randn(1, B, H)
    frozen = FastLSTM(I, H, zoneout=(p, p))
    y, (h_n, c_n) = frozen(x, (h_0, c_0))
    if p == 1:
        assert torch.equal(y, h_0.expand(T, B, H)) and torch.equal(h_n, h_0) and torch.equal(c_n, c_0)
    for name in ("weight_dropout", "recurrent_dropout"):
        module = FastLSTM(I, H, **{name: p})
        expected = copy.deepcopy(module)
        setattr(expected, name, 0)
        if p == 1:
            nn.init.zeros_(expected.weight_hh_l0)  # type: ignore[arg-type]
        torch.testing.assert_close(module(x, (h_0, c_0)), expected(x, (h_0, c_0)))


def test_every_layout_draws_the_same() -> None:
    module = FastLSTM(I, H, 2, **ALL)
    x = torch.randn(T, B, I)

    def run(function: Callable[[], Any]) -> Any:
        torch.manual_seed(2)
        return function()

    y, _ = run(lambda: module(x))
    packed, _ = run(lambda: module(pack_sequence(list(x.unbind(1)))))
    assert torch.equal(packed.data, y.flatten(0, 1))
    module.batch_first = True
    assert torch.equal(run(lambda: module(x.transpose(0, 1)))[0], y.transpose(0, 1))
    one, _ = run(lambda: module(x[:, 0]))
    assert torch.equal(one, run(lambda: module(x[:, :1].transpose(0, 1)))[0][0])


def test_function_and_module_agree() -> None:
    module = FastLSTM(I, H, 2, dropout=0.2, **ALL)
    x = torch.randn(T, B, I)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    got = lstm(x, list(module.parameters()), num_layers=2, dropout=0.2, training=True, **ALL)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_compiled_and_per_sample() -> None:
    module = FastLSTM(I, H, **ALL)
    x = torch.randn(T, B, I)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), expected)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    xs = torch.randn(3, T, B, I)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(weights, xs)
    assert all(g.shape == (3, *weights[name].shape) and g.isfinite().all() for name, g in per_sample.items())
    module.eval()
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, xs)
    for name, gradient in torch.func.grad(loss)(weights, xs[1]).items():
        torch.testing.assert_close(per_sample[name][1], gradient)


def test_pickle_copy_and_representation() -> None:
    module = FastLSTM(I, H, **ALL, recompute=True)
    assert copy.deepcopy(module).zoneout == (0.4, 0.2)
    assert "weight_dropout=0.5, recurrent_dropout=0.3, zoneout=(0.4, 0.2), recompute=True" in repr(module)
    assert repr(FastLSTM(I, H)) == repr(nn.LSTM(I, H)).replace("LSTM", "FastLSTM")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_dropout", 1.5, r"weight_dropout must be a number in \[0, 1\], got 1.5"),
        ("weight_dropout", True, r"weight_dropout must be a number in \[0, 1\], got True"),
        ("recurrent_dropout", -0.1, r"recurrent_dropout must be a number in \[0, 1\], got -0.1"),
        ("recurrent_dropout", "0.1", r"recurrent_dropout must be a number in \[0, 1\], got '0.1'"),
        ("zoneout", 0.1, r"zoneout must be a pair \(z_h, z_c\) of probabilities, got 0.1"),
        ("zoneout", (0.1, 2), r"zoneout must be a number in \[0, 1\], got 2"),
    ],
)
def test_bad_rates(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastLSTM(I, H, **{name: value})
    module = FastLSTM(I, H)
    setattr(module, name, value)
    with pytest.raises(ValueError, match=message):
        module(torch.randn(T, B, I))


def test_a_call_that_fails_leaves_the_generator_as_it_was() -> None:
    module = FastLSTM(I, H, **ALL)
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        module(torch.randn(T, B, I + 1, generator=torch.Generator()))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ALL)
def test_nn_lstm_has_none_of_them(name: str) -> None:
    module = FastLSTM(I, H, **{name: ALL[name]})
    with pytest.raises(ValueError, match=f"nn.LSTM has no {name}"):
        module.to_torch()

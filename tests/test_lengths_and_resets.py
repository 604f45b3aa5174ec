"""lengths= and reset_mask=: the results of what users write without them, packing and loops over pieces."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm import FastLSTM, reference

STACKS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"proj_size": 3, "bidirectional": True},
    {"num_layers": 2, "batch_first": True, "dtype": torch.float64},
]
T, B, I, H = 7, 5, 4, 6  # noqa: E741
LENGTHS = torch.tensor([3, 7, 1, 5, 7])


def inputs(module: nn.RNNBase) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    dtype = next(module.parameters()).dtype
    states = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=dtype)
    return x, tuple(torch.randn(states, B, size, dtype=dtype) for size in (module.proj_size or H, H))  # type: ignore[return-value]


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    seeds = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, seeds))


@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_lengths_are_packing_and_padding(stack: dict[str, object]) -> None:
    ours = FastLSTM(I, H, **stack)  # type: ignore[arg-type]
    torchs = ours.to_torch()
    x, hx = inputs(ours)
    leaves = [x.requires_grad_(), *(h.requires_grad_() for h in hx), *ours.parameters()]
    y, states = ours(x, hx, lengths=LENGTHS)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=ours.batch_first, enforce_sorted=False)
    expected, expected_states = torchs(packed, hx)
    expected, _ = pad_packed_sequence(expected, batch_first=ours.batch_first)
    torch.testing.assert_close((y, states), (expected, expected_states))
    torch.testing.assert_close(
        gradients([y, *states], leaves), gradients([expected, *expected_states], leaves), rtol=1e-4, atol=1e-5
    )


def test_a_sequence_of_no_steps_keeps_its_initial_states() -> None:
    ours = FastLSTM(I, H, 2, bidirectional=True)
    x, hx = inputs(ours)
    for h in hx:
        h.requires_grad_()
    lengths = torch.tensor([0, 4, 0, 7, 2])
    y, states = ours(x, hx, lengths=lengths)
    none = lengths == 0
    assert not y[:, none].any()
    for initial, final in zip(hx, states, strict=True):
        assert torch.equal(final[:, none], initial[:, none])
        (d_initial,) = torch.autograd.grad(final.sum(), initial, retain_graph=True)
        assert torch.equal(d_initial[:, none], torch.ones_like(d_initial[:, none]))
    alone, _ = ours(x[:, ~none], tuple(h[:, ~none] for h in hx), lengths=lengths[~none])
    assert torch.equal(y[:, ~none], alone)


def test_no_sequence_has_any_step() -> None:
    ours = FastLSTM(I, H)
    x, hx = inputs(ours)
    y, states = ours(x.requires_grad_(), hx, lengths=torch.zeros(B, dtype=torch.int64))
    assert not y.any() and torch.equal(states[0], hx[0]) and torch.equal(states[1], hx[1])
    (y.sum() + states[0].sum()).backward()
    assert x.grad is not None and not x.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_steps_behind_the_end_are_not_read() -> None:
    ours = FastLSTM(I, H, bidirectional=True)
    x, hx = inputs(ours)
    clean = ours(x, hx, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        x[length:, b] = float("nan")
    torch.testing.assert_close(ours(x, hx, lengths=LENGTHS), clean, rtol=0, atol=0)
    x.requires_grad_()
    for create_graph in (False, True):  # the kernel, and the reference
        y, _ = ours(x, hx, lengths=LENGTHS)
        for gradient in torch.autograd.grad(y.sum(), [x, *ours.parameters()], create_graph=create_graph):
            assert gradient.isfinite().all()
    d_x = torch.func.grad(lambda a: ours(a, hx, lengths=LENGTHS)[0].sum())(x.detach())
    assert d_x.isfinite().all()


@pytest.mark.parametrize("stack", [{}, {"proj_size": 3}, {"batch_first": True}], ids=str)
def test_resets_are_a_loop_over_steps(stack: dict[str, object]) -> None:
    """The loop of recurrent PPO: the states are multiplied by 1 - episode_start before each step."""
    ours = FastLSTM(I, H, dtype=torch.float64, **stack)  # type: ignore[arg-type]
    torchs = ours.to_torch()
    x, hx = inputs(ours.double())
    leaves = [x.requires_grad_(), *(h.requires_grad_() for h in hx), *ours.parameters()]
    mask = torch.rand(x.shape[:2]) < 0.4
    y, states = ours(x, hx, reset_mask=mask)

    time = 1 if ours.batch_first else 0
    steps, state = [], hx
    for x_t, starts in zip(x.split(1, dim=time), mask.unbind(dim=time), strict=True):
        state = tuple(torch.where(starts[None, :, None], 0, s) for s in state)
        y_t, state = torchs(x_t, state)
        steps.append(y_t)
    expected = torch.cat(steps, dim=time)
    torch.testing.assert_close((y, states), (expected, state))
    torch.testing.assert_close(gradients([y, *states], leaves), gradients([expected, *state], leaves))


def test_resets_cut_a_bidirectional_stack_into_pieces() -> None:
    ours = FastLSTM(I, H, bidirectional=True, dtype=torch.float64)
    x, _ = inputs(ours)
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[3] = mask[5] = True
    y, (h_n, c_n) = ours(x, reset_mask=mask)
    first, second, third = (ours(piece) for piece in (x[:3], x[3:5], x[5:]))
    torch.testing.assert_close(y, torch.cat([first[0], second[0], third[0]]))
    for state, begin, end in zip((h_n, c_n), first[1], third[1], strict=True):
        torch.testing.assert_close(state, torch.stack([end[0], begin[1]]))


def test_resets_of_packed_and_of_padded_sequences_agree() -> None:
    ours = FastLSTM(I, H, 2, bidirectional=True)
    x, hx = inputs(ours)
    mask = torch.rand(T, B) < 0.4
    y, states = ours(x, hx, lengths=LENGTHS, reset_mask=mask)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    packed_mask = pack_padded_sequence(mask, LENGTHS, enforce_sorted=False)
    packed_y, packed_states = ours(packed, hx, reset_mask=packed_mask)
    assert torch.equal(y, pad_packed_sequence(packed_y)[0])
    torch.testing.assert_close(states, packed_states, rtol=0, atol=0)


@pytest.mark.parametrize("plan", fastlstm.plans())
def test_nothing_passes_a_reset(plan: str) -> None:
    ours = FastLSTM(I, H, 2)
    x, hx = inputs(ours)
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[0, 1] = mask[4, 2] = True
    expected, _ = ours(x, hx, reset_mask=mask)
    for h in hx:
        h[:, 1] = float("nan")
    x[3, 2] = float("nan")
    leaves = [x.requires_grad_(), *(h.requires_grad_() for h in hx)]
    with fastlstm.force(plan):
        y, _ = ours(x, hx, reset_mask=mask)
        d_x, d_h_0, d_c_0 = torch.autograd.grad(torch.cat([y[:, 1], y[4:, 2]]).sum(), leaves)
    torch.testing.assert_close(y[:, 1], expected[:, 1])
    torch.testing.assert_close(y[4:, 2], expected[4:, 2])
    assert not d_h_0[0, 1].any() and not d_c_0[:, 1].any()
    assert d_x[:, 1].isfinite().all() and d_x[4:, 2].isfinite().all()


@pytest.mark.parametrize(("steps", "batch", "hidden"), [(1, 3, 5), (4, 1, 1), (5, 0, 3), (3, 7, 13)])
def test_smallest_sizes_strides_and_frozen_weights(steps: int, batch: int, hidden: int) -> None:
    """Everything a view of something larger, one matrix of each layer frozen; against the reference."""
    ours = FastLSTM(I, hidden, 2, bidirectional=True, dtype=torch.float64)
    weights = list(ours.parameters())
    for frozen in weights[1::4]:
        frozen.requires_grad_(False)
    x = torch.randn(batch, steps, 2 * I, dtype=torch.float64)[:, :, ::2].transpose(0, 1).requires_grad_()
    h_0, c_0 = torch.randn(2, hidden, batch, 4, dtype=torch.float64).transpose(1, 3).unbind()
    lengths = torch.randint(0, steps + 1, (2 * batch,))[::2]
    mask = (torch.rand(batch, steps) < 0.4).t()
    y, states = ours(x, (h_0, c_0), lengths=lengths, reset_mask=mask)
    options = {"lengths": lengths, "reset_mask": mask, "num_layers": 2, "bidirectional": True}
    expected = reference.lstm(x, weights, h_0, c_0, **options)  # type: ignore[arg-type]
    torch.testing.assert_close((y, *states), expected)
    leaves = [x, *(w for w in weights if w.requires_grad)]
    torch.testing.assert_close(gradients([y, *states], leaves), gradients(list(expected), leaves))
    assert all(w.grad is None for w in weights)


def test_unbatched_lengths() -> None:
    ours = FastLSTM(I, H, bidirectional=True)
    x = torch.randn(T, I)
    y, states = ours(x, lengths=torch.tensor(4))
    expected, expected_states = ours(x[:4])
    torch.testing.assert_close((y[:4], states), (expected, expected_states))
    assert not y[4:].any()


def test_unbatched_resets() -> None:
    ours = FastLSTM(I, H)
    x = torch.randn(T, I)
    mask = torch.tensor([False, True, False, False, True, False, False])
    y, _ = ours(x, reset_mask=mask)
    assert torch.equal(y, ours(x.unsqueeze(1), reset_mask=mask.unsqueeze(1))[0].squeeze(1))
    torch.testing.assert_close(y[4:], ours(x[4:])[0])


def test_a_mask_without_marks_changes_nothing() -> None:
    ours = FastLSTM(I, H, 2, bidirectional=True)
    x, hx = inputs(ours)
    plain = ours(x, hx)
    unmarked = torch.zeros(T, B, dtype=torch.bool)
    torch.testing.assert_close(ours(x, hx, reset_mask=unmarked), plain, rtol=0, atol=0)
    torch.testing.assert_close(ours(x, hx, lengths=torch.full((B,), T)), plain, rtol=0, atol=0)


def test_second_derivatives() -> None:
    ours = FastLSTM(2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 3) < 0.4
    lengths = torch.tensor([4, 0, 2])

    def run(x: Tensor) -> Tensor:
        y: Tensor = ours(x, lengths=lengths, reset_mask=mask)[0]
        return y

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_and_dropout(low: torch.dtype) -> None:
    ours = FastLSTM(I, H, 2, dropout=0.5)
    x, _ = inputs(ours)
    x.requires_grad_()
    packed_mask = pack_padded_sequence(mask := torch.rand(T, B) < 0.4, LENGTHS, enforce_sorted=False)
    with torch.autocast("cpu", dtype=low):
        y, _ = ours(x, lengths=LENGTHS, reset_mask=mask)
        ours.eval()
        still, _ = ours(x, lengths=LENGTHS, reset_mask=mask)
        packed, _ = ours(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), reset_mask=packed_mask)
    assert y.dtype == still.dtype == low
    assert not torch.equal(y, still)
    assert torch.equal(still, pad_packed_sequence(packed)[0])
    y.float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


def test_vmap_over_lengths_and_masks() -> None:
    ours = FastLSTM(I, H)
    x, _ = inputs(ours)
    lengths, masks = torch.randint(0, T + 1, (3, B)), torch.rand(3, T, B) < 0.4

    def run(lengths: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = ours(x, lengths=lengths, reset_mask=mask)[0]
        return y

    together = torch.vmap(run)(lengths, masks)
    for k in range(3):
        torch.testing.assert_close(together[k], run(lengths[k], masks[k]))


def test_compiled_with_other_sizes_and_lengths() -> None:
    ours = FastLSTM(I, H, 2)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for steps, batch in ((7, 5), (9, 3)):
        x = torch.randn(steps, batch, I)
        options = {
            "lengths": torch.randint(0, steps + 1, (batch,)),
            "reset_mask": torch.rand(steps, batch) < 0.3,
        }
        torch.testing.assert_close(compiled(x, **options), ours(x, **options))


PACKED = pack_padded_sequence(torch.zeros(3, 2, I), torch.tensor([3, 2]))
ERRORS = {
    "lengths must lie in [0, T] = [0, 3], got 4 at 1": {"lengths": torch.tensor([1, 4])},
    "lengths must lie in [0, T] = [0, 3], got -1 at 0": {"lengths": torch.tensor([-1, 3])},
    "lengths must be an int64 tensor of shape [2], got torch.int64 [3]": {"lengths": torch.tensor([1, 2, 3])},
    "lengths must be an int64 tensor of shape [2], got torch.int32 [2]": {
        "lengths": torch.tensor([1, 2], dtype=torch.int32)
    },
    "reset_mask must be a bool tensor of shape [3, 2], the input's without its features, got torch.bool [2, 3]": {
        "reset_mask": torch.zeros(2, 3, dtype=torch.bool)
    },
    "got torch.float32 [3, 2]": {"reset_mask": torch.zeros(3, 2)},
}


# The values of lengths exist on a real device only.
@pytest.mark.parametrize(
    ("message", "device"), [(m, d) for m in ERRORS for d in ("cpu", "meta") if d == "cpu" or "lie in" not in m]
)
def test_errors(message: str, device: str) -> None:
    ours = FastLSTM(I, H, device=device)
    options = {name: tensor.to(device) for name, tensor in ERRORS[message].items()}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ours(torch.zeros(3, 2, I, device=device), **options)


def test_errors_speak_the_layout_of_the_caller() -> None:
    ours = FastLSTM(I, H, batch_first=True)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    for x, shape, bad in (
        (torch.zeros(2, 3, I), "[2, 3]", mask),
        (torch.zeros(2, 3, I), "[2, 3]", mask[None]),
        (torch.zeros(3, I), "[3]", mask),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"shape {shape}, the input's without its features")):
            ours(x, reset_mask=bad)


def test_arguments_on_another_device() -> None:
    ours = FastLSTM(I, H)
    x = torch.zeros(3, 2, I)
    with pytest.raises(RuntimeError, match="input tensor at cpu and lengths tensor at meta"):
        ours(x, lengths=torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(RuntimeError, match="input tensor at cpu and reset_mask tensor at meta"):
        ours(x, reset_mask=torch.zeros(3, 2, dtype=torch.bool, device="meta"))


def test_masks_packed_in_another_way() -> None:
    ours = FastLSTM(I, H)
    x, ones = torch.randn(4, 2, I), torch.ones(4, 2, dtype=torch.bool)
    for lengths, others in (([3, 2], [4, 1]), ([2, 3], [3, 2])):
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        mask = pack_padded_sequence(ones, torch.tensor(others), enforce_sorted=False)
        with pytest.raises(ValueError, match="reset_mask must be packed like the input"):
            ours(packed, reset_mask=mask)


def test_transforms_check_too() -> None:
    ours = FastLSTM(I, H)
    x = torch.zeros(3, 2, I)
    for options, message in (
        ({"lengths": torch.tensor([9, 1])}, "lengths must lie in [0, T] = [0, 3], got 9 at 0"),
        ({"reset_mask": torch.zeros(3, 2)}, "reset_mask must be a bool tensor"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            torch.func.grad(lambda a, options=options: ours(a, **options)[0].sum())(x)
    weights = [p.detach() for p in ours.parameters()]
    weights[2] = weights[2][:1]
    with pytest.raises(RuntimeError, match=re.escape("b_ih must have shape [24], got [1]")):
        torch.func.grad(lambda a: fastlstm.lstm(a, weights)[0].sum())(x)


def test_packed_and_padded_arguments_do_not_mix() -> None:
    ours = FastLSTM(I, H)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    packed_mask = PackedSequence(torch.zeros(5, dtype=torch.bool), PACKED.batch_sizes)
    with pytest.raises(TypeError, match="reset_mask must be a PackedSequence like the input, got a Tensor"):
        ours(PACKED, reset_mask=mask)
    with pytest.raises(TypeError, match="reset_mask must be a tensor like the input, got a PackedSequence"):
        ours(torch.zeros(3, 2, I), reset_mask=packed_mask)
    with pytest.raises(RuntimeError, match="lengths cannot be given with a packed sequence"):
        ours(PACKED, lengths=torch.tensor([3, 2]))
    with pytest.raises(RuntimeError, match="lengths cannot be given with a packed sequence"):
        weights = list(ours.parameters())
        fastlstm.lstm(PACKED.data, weights, batch_sizes=PACKED.batch_sizes, lengths=torch.tensor([3, 2]))

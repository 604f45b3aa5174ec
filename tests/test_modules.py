"""FastLSTM and FastLSTMCell stand in for nn.LSTM and nn.LSTMCell.

Construction, state, layouts, PackedSequence, dropout, dtypes, autocast, gradients, and whatever users and
torch's utilities do to a module.

Numerical agreement over many shapes is the subject of test_random_configurations.py, messages that of
test_errors.py.
"""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.distributed.fsdp
from tolerance import assert_accurate
from torch import distributed, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastlstm
from fastlstm import FastLSTM, FastLSTMCell

FLOAT_TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CONSTRUCTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "dropout": 0.25},
    {"proj_size": 3, "bidirectional": True},
    {"num_layers": 2, "proj_size": 3, "bias": False, "dtype": torch.float64},
]


def twins(*args, **kwargs):
    """An nn.LSTM and a FastLSTM with equal parameters."""
    torchs = nn.LSTM(*args, **kwargs)
    ours = FastLSTM(*args, **kwargs)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def assert_same(ours, torchs):
    """Equal up to the rounding of fp32 or fp64, in any nesting of tuples."""
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-6)


# Construction, parameters, state_dict


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS)
def test_same_seed_gives_the_parameters_and_attributes_of_nn_lstm(kwargs):
    torch.manual_seed(7)
    torchs = nn.LSTM(5, 7, **kwargs)
    after_torchs = torch.rand(1)
    torch.manual_seed(7)
    ours = FastLSTM(5, 7, **kwargs)
    assert torch.equal(torch.rand(1), after_torchs)

    assert list(ours.state_dict()) == list(torchs.state_dict())
    for (name, a), (_, b) in zip(ours.named_parameters(), torchs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype
    for name in nn.LSTM.__constants__:
        assert getattr(ours, name) == getattr(torchs, name), name
    assert ours._flat_weights_names == torchs._flat_weights_names
    assert ours._all_weights == torchs._all_weights
    assert ours.extra_repr() == torchs.extra_repr()
    assert repr(ours) == repr(torchs).replace("LSTM", "FastLSTM")


def test_arguments_are_positional_as_in_nn_lstm():
    arguments = (5, 7, 2, False, True, 0.5, True, 3, "cpu", torch.float64)
    assert repr(FastLSTM(*arguments)) == repr(nn.LSTM(*arguments)).replace("LSTM", "FastLSTM")
    assert FastLSTM(*arguments).weight_hr_l1_reverse.dtype == torch.float64
    assert FastLSTMCell(5, 7, False, "cpu", torch.float64).weight_ih.dtype == torch.float64


def test_it_is_an_rnn_base_and_no_nn_lstm():
    assert issubclass(FastLSTM, nn.RNNBase)
    assert not issubclass(FastLSTM, nn.LSTM)
    assert issubclass(FastLSTMCell, nn.RNNCellBase)
    assert not issubclass(FastLSTMCell, nn.LSTMCell)
    assert FastLSTM.__constants__ == nn.LSTM.__constants__
    assert FastLSTM(5, 7).mode == "LSTM"


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS)
def test_state_dict_travels_both_ways(kwargs):
    ours, torchs = FastLSTM(5, 7, **kwargs), nn.LSTM(5, 7, **kwargs)
    expected = copy.deepcopy(ours.state_dict())
    torchs.load_state_dict(ours.state_dict(), strict=True)
    fresh = FastLSTM(5, 7, **kwargs)
    fresh.load_state_dict(torchs.state_dict(), strict=True)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("bias", [True, False])
def test_cell_has_the_parameters_of_lstm_cell(bias):
    torch.manual_seed(7)
    torchs = nn.LSTMCell(5, 7, bias=bias)
    torch.manual_seed(7)
    ours = FastLSTMCell(5, 7, bias=bias)
    for (name, a), (other, b) in zip(ours.named_parameters(), torchs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert repr(ours) == repr(torchs).replace("LSTM", "FastLSTM")
    torchs.load_state_dict(ours.state_dict(), strict=True)


def test_reset_parameters_draws_like_nn_lstm():
    torchs, ours = twins(5, 7, 2)
    torch.manual_seed(3)
    torchs.reset_parameters()
    torch.manual_seed(3)
    ours.reset_parameters()
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(a, b)


# Layouts and states


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_layouts(batch_first, bidirectional, proj_size):
    torchs, ours = twins(5, 7, 2, batch_first=batch_first, bidirectional=bidirectional, proj_size=proj_size)
    states = 4 if bidirectional else 2
    x = torch.randn(4, 6, 5)
    batch = 4 if batch_first else 6
    hx = (torch.randn(states, batch, proj_size or 7), torch.randn(states, batch, 7))
    assert_same(ours(x, hx), torchs(x, hx))
    assert_same(ours(x), torchs(x))
    unbatched = (hx[0][:, 0], hx[1][:, 0])
    assert_same(ours(x[0], unbatched), torchs(x[0], unbatched))
    assert_same(ours(x[0]), torchs(x[0]))


@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 3}])
def test_empty_batch_forward_and_backward(kwargs):
    torchs, ours = twins(5, 7, **kwargs)
    x = torch.randn(4, 0, 5)
    got, expected = ours(x), torchs(x)
    assert [t.shape for t in (got[0], *got[1])] == [t.shape for t in (expected[0], *expected[1])]
    got[0].sum().backward()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_cell_layouts():
    torchs = nn.LSTMCell(5, 7)
    ours = FastLSTMCell(5, 7)
    ours.load_state_dict(torchs.state_dict())
    x, h, c = (torch.randn(3, n) for n in (5, 7, 7))
    assert_same(ours(x, (h, c)), torchs(x, (h, c)))
    assert_same(ours(x), torchs(x))
    assert_same(ours(x[0], (h[0], c[0])), torchs(x[0], (h[0], c[0])))
    assert_same(ours(x[0]), torchs(x[0]))
    assert_same(ours(x[:0]), torchs(x[:0]))


@pytest.mark.parametrize("module", [FastLSTM(5, 7), FastLSTM(5, 7, proj_size=3), FastLSTMCell(5, 7)])
def test_default_state_has_the_dtype_of_the_input(module):
    module = module.double()
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    for state in module(x)[1] if isinstance(module, FastLSTM) else module(x[0]):
        assert state.dtype == torch.float64


def test_functional_needs_no_module():
    torchs = nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True, proj_size=3)
    x, h_0, c_0 = torch.randn(2, 6, 5), torch.randn(4, 2, 3), torch.randn(4, 2, 7)
    got = fastlstm.lstm(x, tuple(torchs.parameters()), (h_0, c_0), num_layers=2, bidirectional=True, batch_first=True)
    assert_same(got, torchs(x, (h_0, c_0)))


def test_functional_cell_with_projection_is_a_step_of_the_projected_lstm():
    torchs = nn.LSTM(5, 7, proj_size=3)
    x, h, c = torch.randn(2, 5), torch.randn(2, 3), torch.randn(2, 7)
    _, (h_n, c_n) = torchs(x[None], (h[None], c[None]))
    assert_same(fastlstm.lstm_cell(x, (h, c), *torchs.parameters()), (h_n[0], c_n[0]))
    zero_h, zero_c = torch.zeros(2, 3), torch.zeros(2, 7)
    assert_same(
        fastlstm.lstm_cell(x, None, *torchs.parameters()),
        fastlstm.lstm_cell(x, (zero_h, zero_c), *torchs.parameters()),
    )


def test_nan_stays_in_its_row_and_infinity_saturates():
    torchs, ours = twins(5, 7)
    x = torch.randn(4, 3, 5)
    x[1, 0, 2] = torch.nan
    x[2, 1, 3] = torch.inf
    got, expected = ours(x)[0], torchs(x)[0]
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=1e-6)


# PackedSequence


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequence_in_the_callers_order(batch_first, with_state):
    torchs, ours = twins(5, 7, 2, bidirectional=True, batch_first=batch_first, proj_size=3)
    lengths = torch.tensor([2, 6, 1, 6])
    x = torch.randn(4, 6, 5) if batch_first else torch.randn(6, 4, 5)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    hx = (torch.randn(4, 4, 3), torch.randn(4, 4, 7)) if with_state else None
    (got, got_states), (expected, expected_states) = ours(packed, hx), torchs(packed, hx)
    assert isinstance(got, PackedSequence)
    assert got.batch_sizes is packed.batch_sizes
    assert got.sorted_indices is packed.sorted_indices
    assert got.unsorted_indices is packed.unsorted_indices
    assert_same((got.data, got_states), (expected.data, expected_states))

    # Each sequence gives what it gives alone.
    padded, _ = pad_packed_sequence(got, batch_first=True)
    for index, length in enumerate(lengths.tolist()):
        alone = x[index, :length] if batch_first else x[:length, index]
        y, states = ours(alone, None if hx is None else (hx[0][:, index], hx[1][:, index]))
        assert_same(padded[index, :length], y)
        assert_same((got_states[0][:, index], got_states[1][:, index]), states)


def test_packed_sequence_that_was_sorted_has_no_indices():
    _, ours = twins(5, 7)
    output, _ = ours(pack_sequence([torch.randn(n, 5) for n in (4, 2, 1)]))
    assert output.sorted_indices is None
    assert output.unsorted_indices is None


# Dropout


def test_dropout_draws_the_masks_of_nn_lstm_from_the_same_seed():
    torchs, ours = twins(5, 64, 3, dropout=0.4, bidirectional=True)
    x = torch.randn(20, 9, 5)
    torch.manual_seed(5)
    expected = torchs(x)
    torch.manual_seed(5)
    got = ours(x)
    assert_same(got, expected)
    assert not torch.equal(got[0], ours(x)[0])


def test_dropout_applies_in_training_only_and_uses_the_generator_only_then():
    torchs, ours = twins(5, 7, 2, dropout=0.5)
    x = torch.randn(4, 3, 5)
    state = torch.get_rng_state()
    ours.eval()
    assert_same(ours(x), torchs.eval()(x))
    ours.train()
    ours.dropout = 0.0
    assert_same(ours(x), torchs(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FastLSTM(5, 7, 1, dropout=0.5, device="meta")(x.to("meta"))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_one_gives_the_next_layer_zeros():
    _, ours = twins(5, 7, 2, dropout=1.0)
    x = torch.randn(4, 3, 5)
    output, (h_n, _) = ours(x)
    upper = FastLSTM(7, 7)
    upper.load_state_dict({k.replace("l1", "l0"): v for k, v in ours.state_dict().items() if "l1" in k})
    assert_same(output, upper(torch.zeros(4, 3, 7))[0])
    # The state of the lower layer is not dropped.
    lower = FastLSTM(5, 7)
    lower.load_state_dict({k: v for k, v in ours.state_dict().items() if "l0" in k})
    assert_same(h_n[0], lower(x)[1][0][0])


def test_dropout_changed_after_construction_is_honoured():
    torchs, ours = twins(5, 7, 2)
    torchs.dropout = ours.dropout = 0.5
    x = torch.randn(4, 3, 5)
    torch.manual_seed(5)
    expected = torchs(x)
    torch.manual_seed(5)
    assert_same(ours(x), expected)


def test_dropout_of_packed_sequences():
    torchs, ours = twins(5, 7, 3, dropout=0.4)
    packed = pack_sequence([torch.randn(n, 5) for n in (4, 4, 2, 1)])
    torch.manual_seed(5)
    expected, expected_states = torchs(packed)
    torch.manual_seed(5)
    got, states = ours(packed)
    assert_same((got.data, states), (expected.data, expected_states))


# dtypes and autocast


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_cell_in_every_dtype(dtype):
    torchs = nn.LSTMCell(16, 32, dtype=dtype)
    ours, exact = FastLSTMCell(16, 32, dtype=dtype), nn.LSTMCell(16, 32, dtype=torch.float64)
    ours.load_state_dict(torchs.state_dict())
    exact.load_state_dict(torchs.state_dict())
    x, h, c = (torch.randn(3, n, dtype=dtype) for n in (16, 32, 32))
    results = [ours(x, (h, c)), torchs(x, (h, c)), exact(x.double(), (h.double(), c.double()))]
    for name, *tensors in zip(("h", "c"), *results, strict=True):
        assert_accurate(name, *tensors)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_input", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_autocast_computes_in_and_returns_the_low_precision(low, low_input, with_state):
    # nn.LSTM under autocast on the CPU fails without native bf16, so it is converted by hand.
    torchs, ours = twins(5, 16, 2, bidirectional=True)
    x = torch.randn(6, 3, 5).to(low)
    hx = (torch.randn(4, 3, 16), torch.randn(4, 3, 16)) if with_state else None
    with torch.autocast("cpu", dtype=low):
        y, states = ours(x if low_input else x.float(), hx)

    def converted(dtype):
        module = copy.deepcopy(torchs).to(low).to(dtype)
        y, states = module(x.to(dtype), None if hx is None else tuple(s.to(low).to(dtype) for s in hx))
        return (y, *states)

    for name, *tensors in zip(("y", "h_n", "c_n"), (y, *states), converted(low), converted(torch.float64), strict=True):
        assert_accurate(name, *tensors)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_autocast_of_the_cell():
    ours, x = FastLSTMCell(5, 16), torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, c = ours(x)
    assert h.dtype == c.dtype == torch.bfloat16
    torch.testing.assert_close((h.float(), c.float()), ours(x), rtol=0, atol=0.02)


# Gradients


def test_backward_in_eval_mode():
    torchs, ours = twins(5, 7, 2, dropout=0.5)
    x = torch.randn(4, 3, 5)
    for module in (torchs.eval(), ours.eval()):
        module(x)[0].square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_non_contiguous_input_states_and_gradients():
    torchs, ours = twins(5, 7, 2, bidirectional=True)
    x = torch.randn(5, 6, 3).permute(1, 2, 0)
    h_0, c_0 = torch.randn(3, 4, 7).transpose(0, 1), torch.randn(4, 3, 14)[:, :, ::2]
    results = []
    for module in (ours, torchs):
        leaves = [t.detach().requires_grad_() for t in (x, h_0, c_0)]
        y, states = module(leaves[0], (leaves[1], leaves[2]))
        cotangent = torch.arange(y.numel(), dtype=y.dtype).div(y.numel()).view(14, 6, 3).permute(1, 2, 0)
        y.backward(cotangent)
        results.append((y, states, [t.grad for t in (*leaves, *module.parameters())]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_expanded_gradients_and_expanded_states():
    torchs, ours = twins(5, 7)
    x, zero = torch.randn(4, 3, 5), torch.zeros(1, 1, 7)
    for module in (ours, torchs):
        module(x, (zero.expand(1, 3, 7), zero.expand(1, 3, 7)))[0].sum().backward()
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", range(3))
def test_undefined_gradients_of_unused_outputs(used):
    torchs, ours = twins(5, 7, 2)
    x = torch.randn(4, 3, 5)
    gradients = []
    for module in (ours, torchs):
        y, (h_n, c_n) = module(x)
        gradients.append(torch.autograd.grad((y, h_n, c_n)[used].sum(), list(module.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_frozen_parameters_get_no_gradient():
    torchs, ours = twins(5, 7, 2)
    x = torch.randn(4, 3, 5)
    for module in (ours, torchs):
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l1.requires_grad_(False)
        module(x)[0].sum().backward()
    assert ours.weight_hh_l0.grad is None
    assert ours.bias_ih_l1.grad is None
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_no_graph_without_grad_mode():
    _, ours = twins(5, 7)
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        assert ours(x)[0].grad_fn is None
    with torch.inference_mode():
        y, _ = ours(x)
    assert y.is_inference()
    assert_same(y, ours(x)[0])


def test_gradient_hooks_may_run_another_backward():
    _, ours = twins(5, 7)
    inner = FastLSTM(5, 7)
    x = torch.randn(4, 3, 5)

    def hook(grad):
        with torch.enable_grad():
            inner(x)[0].sum().backward()
        return grad * 2

    y, _ = ours(x)
    expected = torch.autograd.grad(y.sum(), ours.weight_ih_l0, retain_graph=True)[0] * 2
    y.register_hook(hook)
    y.sum().backward()
    torch.testing.assert_close(ours.weight_ih_l0.grad, expected)
    assert inner.weight_ih_l0.grad.abs().sum() > 0


def test_tied_parameters_accumulate_both_gradients():
    torchs, ours = twins(7, 7, 2)
    x = torch.randn(4, 3, 7)
    for module in (ours, torchs):
        module.weight_ih_l1 = module.weight_ih_l0
        module(x)[0].sum().backward()
    assert len(list(ours.parameters())) == len(list(torchs.parameters())) == 7
    torch.testing.assert_close(ours.weight_ih_l0.grad, torchs.weight_ih_l0.grad, rtol=1e-5, atol=1e-5)


def test_module_hooks_run():
    _, ours = twins(5, 7)
    x = torch.randn(4, 3, 5, requires_grad=True)
    seen = []
    ours.register_forward_pre_hook(lambda *_: seen.append("pre"))
    ours.register_forward_hook(lambda *_: seen.append("forward"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    ours(x)[0].sum().backward()
    assert seen == ["pre", "forward", "backward"]


# What torch and its users do to modules


def test_flat_weights_follow_the_attributes():
    _, ours = twins(5, 7, 2)
    assert [w is p for w, p in zip(ours._flat_weights, ours.parameters(), strict=True)] == [True] * 8
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [(28, 5), (28, 7), (28,), (28,)],
        [(28, 7), (28, 7), (28,), (28,)],
    ]
    replacement = nn.Parameter(torch.zeros(28, 5))
    ours.weight_ih_l0 = replacement
    assert ours._flat_weights[0] is replacement
    assert ours.all_weights[0][0] is replacement

    another = nn.Parameter(torch.ones(28, 5))
    ours._flat_weights = [another, *ours._flat_weights[1:]]
    assert ours.weight_ih_l0 is another


def test_deleted_weight_survives_conversion_and_can_be_restored():
    torchs, ours = twins(5, 7)
    weight = ours.weight_hh_l0
    del ours.weight_hh_l0
    assert ours._flat_weights[1] is None
    ours.double()
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        ours(torch.randn(4, 3, 5, dtype=torch.float64))
    ours.weight_hh_l0 = nn.Parameter(weight.detach().double())
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    assert_same(ours(x), torchs.double()(x))


def test_flatten_parameters_does_nothing():
    _, ours = twins(5, 7)
    pointers = [p.data_ptr() for p in ours.parameters()]
    ours.flatten_parameters()
    assert [p.data_ptr() for p in ours.parameters()] == pointers


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS)
def test_pickle_save_and_deepcopy(kwargs):
    ours = FastLSTM(5, 7, **kwargs)
    x = torch.randn(4, 3, 5, dtype=kwargs.get("dtype"))
    ours.eval()
    expected = ours(x)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    copies = {
        "pickle": pickle.loads(pickle.dumps(ours)),
        "torch.load": torch.load(stream, weights_only=False),
        "deepcopy": copy.deepcopy(ours),
        "copy": copy.copy(ours),
    }
    for name, duplicate in copies.items():
        assert repr(duplicate) == repr(ours), name
        assert duplicate.training is False
        torch.testing.assert_close(duplicate(x), expected, rtol=0, atol=0)
        assert (duplicate.weight_ih_l0 is ours.weight_ih_l0) == (name == "copy")
        assert duplicate.double()._flat_weights[0] is duplicate.weight_ih_l0


def test_cell_pickle_and_deepcopy():
    ours = FastLSTMCell(5, 7)
    x = torch.randn(3, 5)
    for duplicate in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        torch.testing.assert_close(duplicate(x), ours(x), rtol=0, atol=0)


def test_state_from_before_proj_size():
    ours = FastLSTM(5, 7)
    state = ours.__getstate__()
    del state["proj_size"]
    restored = FastLSTM.__new__(FastLSTM)
    restored.__setstate__(state)
    assert restored.proj_size == 0
    assert_same(restored(torch.ones(4, 3, 5)), ours(torch.ones(4, 3, 5)))


def test_share_memory():
    _, ours = twins(5, 7)
    ours.share_memory()
    assert all(w.is_shared() for w in ours._flat_weights)
    assert ours(torch.randn(4, 3, 5))[0].shape == (4, 3, 7)


def test_weight_norm_hooks_and_deepcopy_after_a_forward_pass():
    torchs, ours = twins(5, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module in (ours, torchs):
            nn.utils.weight_norm(module, "weight_hh_l0")
    x = torch.randn(4, 3, 5)
    assert_same(ours(x), torchs(x))
    duplicate = copy.deepcopy(ours)
    ours(x)[0].sum().backward()
    assert ours.weight_hh_l0_g.grad.abs().sum() > 0
    with torch.no_grad():
        duplicate.weight_hh_l0_g.mul_(2)
        torchs.weight_hh_l0_g.mul_(2)
    assert_same(duplicate(x), torchs(x))
    nn.utils.remove_weight_norm(duplicate, "weight_hh_l0")
    assert_same(duplicate(x), torchs(x))
    assert isinstance(duplicate.weight_hh_l0, nn.Parameter)


@pytest.mark.parametrize("method", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(method):
    torchs, ours = twins(5, 7, 2, bidirectional=True)
    for module in (ours, torchs):
        torch.manual_seed(1)
        method(module, "weight_hh_l1")
        module.eval()
    x = torch.randn(4, 3, 5)
    assert_same(ours(x), torchs(x))
    duplicate = copy.deepcopy(ours)
    assert_same(duplicate(x), torchs(x))
    ours(x)[0].sum().backward()
    assert all(p.grad is not None for p in ours.parametrizations.parameters())
    parametrize.remove_parametrizations(ours, "weight_hh_l1")
    assert type(ours) is FastLSTM
    assert_same(ours(x), torchs(x))


def test_parametrization_of_the_cell():
    ours = parametrizations.weight_norm(FastLSTMCell(5, 7), "weight_hh")
    torchs = parametrizations.weight_norm(nn.LSTMCell(5, 7), "weight_hh")
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5)
    assert_same(ours(x), torchs(x))


def test_prune_and_deepcopy_after_a_forward_pass():
    torchs, ours = twins(5, 7)
    for module in (ours, torchs):
        prune.l1_unstructured(module, "weight_ih_l0", amount=0.5)
    x = torch.randn(4, 3, 5)
    assert_same(ours(x), torchs(x))
    assert_same(copy.deepcopy(ours)(x), torchs(x))
    prune.remove(ours, "weight_ih_l0")
    assert (ours.weight_ih_l0 == 0).float().mean() == 0.5
    assert_same(ours(x), torchs(x))


def test_functional_call_and_per_call_gradients():
    torchs, ours = twins(5, 7)
    x = torch.randn(4, 3, 5)
    other = {name: torch.randn_like(p).requires_grad_() for name, p in ours.named_parameters()}
    before = ours(x)
    got = torch.func.functional_call(ours, other, (x,))
    torchs.load_state_dict(other)
    assert_same(got, torchs(x))
    got[0].sum().backward()
    assert all(p.grad is not None for p in other.values())
    assert all(p.grad is None for p in ours.parameters())
    assert_same(ours(x), before)


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS)
def test_meta_construction_forward_and_to_empty(kwargs):
    ours = FastLSTM(5, 7, **kwargs, device="meta")
    assert all(p.is_meta for p in ours._flat_weights)
    x = torch.randn(4, 3, 5, dtype=kwargs.get("dtype"))
    y, (h_n, c_n) = ours(x.to("meta"))
    torchs = nn.LSTM(5, 7, **kwargs).eval()
    expected, (expected_h, expected_c) = torchs(x)
    assert y.is_meta
    assert [t.shape for t in (y, h_n, c_n)] == [t.shape for t in (expected, expected_h, expected_c)]
    assert y.dtype == expected.dtype
    ours.to_empty(device="cpu").eval()
    ours.load_state_dict(torchs.state_dict())
    assert_same(ours(x), torchs(x))


def test_meta_cell():
    h, c = FastLSTMCell(5, 7, device="meta")(torch.randn(3, 5, device="meta"))
    assert h.is_meta
    assert h.shape == c.shape == (3, 7)


def test_load_state_dict_assign():
    torchs, ours = nn.LSTM(5, 7), FastLSTM(5, 7, device="meta")
    ours.load_state_dict(torchs.state_dict(), assign=True)
    assert ours.weight_ih_l0.data_ptr() == torchs.weight_ih_l0.data_ptr()
    x = torch.randn(4, 3, 5)
    assert_same(ours(x), torchs(x))


def test_conversion_of_dtype_keeps_optimizer_references():
    _, ours = twins(5, 7)
    weight = ours.weight_ih_l0
    ours.double()
    assert ours.weight_ih_l0 is weight
    assert ours(torch.randn(4, 3, 5, dtype=torch.float64))[0].dtype == torch.float64


def test_replica_reads_its_own_weights():
    # torch.nn.parallel.replicate fills replicas this way; it needs several devices to run itself.
    torchs, ours = twins(5, 7)
    replica = ours._replicate_for_data_parallel()
    for name, parameter in torchs.named_parameters():
        setattr(replica, name, parameter.detach() * 2)
    x = torch.randn(4, 3, 5)
    before = ours(x)
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.mul_(2)
    assert_same(replica(x), torchs(x))
    assert_same(ours(x), before)


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")
def test_data_parallel_wrappers_in_a_world_of_one():
    x = torch.randn(4, 3, 5)
    plain = FastLSTM(5, 7, 2)
    expected = plain(x)
    expected[0].sum().backward()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for wrap in (
            nn.parallel.DistributedDataParallel,
            lambda module: distributed.fsdp.fully_shard(module, mesh=mesh),
        ):
            wrapped = wrap(copy.deepcopy(plain))
            wrapped.zero_grad()
            got = wrapped(x)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            got[0].sum().backward()
            for a, b in zip(wrapped.parameters(), plain.parameters(), strict=True):
                gradient = a.grad.full_tensor() if isinstance(a.grad, distributed.tensor.DTensor) else a.grad
                torch.testing.assert_close(gradient, b.grad, rtol=0, atol=0)
    finally:
        distributed.destroy_process_group()


def test_checkpointing_a_subclass():
    class Doubled(FastLSTM):
        def forward(self, input, hx=None):
            y, states = super().forward(input, hx)
            return 2 * y, states

    torchs = nn.LSTM(5, 7)
    ours = Doubled(5, 7)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(4, 3, 5, requires_grad=True)
    y, _ = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    assert_same(y, 2 * torchs(x)[0])
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(("training", "cell"), list(itertools.product([True, False], [True, False])))
def test_streaming_step_by_step_equals_the_whole_sequence(training, cell):
    ours = FastLSTM(5, 7).train(training)
    step = FastLSTMCell(5, 7)
    step.load_state_dict({k.removesuffix("_l0"): v for k, v in ours.state_dict().items()})
    x = torch.randn(6, 3, 5)
    expected, states = ours(x)
    outputs, current = [], None
    for t in range(6):
        if cell:
            current = step(x[t], current)
            outputs.append(current[0])
        else:
            y, current = ours(x[t : t + 1], current)
            outputs.append(y[0])
    assert_same(torch.stack(outputs), expected)
    assert_same(tuple(s.view(3, 7) for s in current), tuple(s.view(3, 7) for s in states))

"""Every error message. Where nn.LSTM has one, both run and their texts are compared, so ours cannot drift."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm import FastLSTM, FastLSTMCell, _ops


def error_of(function, *args, **kwargs):
    with pytest.raises(Exception) as caught:
        function(*args, **kwargs)
    return type(caught.value), str(caught.value)


# Construction. The last cases make several mistakes at once: the same one is reported.
CONSTRUCTIONS = {
    "dropout above one": ((3, 4), {"dropout": 1.5}),
    "dropout negative": ((3, 4), {"dropout": -0.1}),
    "dropout nan": ((3, 4, 2), {"dropout": float("nan")}),
    "dropout bool": ((3, 4), {"dropout": True}),
    "dropout text": ((3, 4), {"dropout": "half"}),
    "bias int": ((3, 4), {"bias": 1}),
    "batch_first int": ((3, 4), {"batch_first": 1}),
    "input_size float": ((3.0, 4), {}),
    "input_size zero": ((0, 4), {}),
    "hidden_size float": ((3, 4.0), {}),
    "hidden_size zero": ((3, 0), {}),
    "hidden_size negative": ((3, -4), {}),
    "num_layers zero": ((3, 4, 0), {}),
    "proj_size negative": ((3, 4), {"proj_size": -1}),
    "proj_size equals hidden_size": ((3, 4), {"proj_size": 4}),
    "unknown argument": ((3, 4), {"nonlinearity": "relu"}),
    "missing argument": ((3,), {}),
    "dropout before bias": ((3, 4), {"dropout": 2, "bias": 1}),
    "bias before batch_first": ((3, 4), {"bias": 1, "batch_first": 1}),
    "batch_first before sizes": (("3", 4), {"batch_first": None}),
    "sizes before proj_size": ((0, 0, 0), {"proj_size": -1}),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_construction(case):
    args, kwargs = CONSTRUCTIONS[case]
    kind, text = error_of(FastLSTM, *args, **kwargs)
    expected_kind, expected_text = error_of(nn.LSTM, *args, **kwargs)
    assert kind is expected_kind
    # For a missing argument Python's own text names the class.
    assert text.replace("FastLSTM.", "") == expected_text.replace("RNNBase.", "")


def test_dropout_in_a_single_layer_warns():
    records = []
    for cls in (FastLSTM, nn.LSTM):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cls(3, 4, dropout=0.5)
        records.append([(w.category, str(w.message)) for w in caught])
    assert records[0] == records[1]
    assert len(records[0]) == 1


def test_cell_construction():
    assert error_of(FastLSTMCell, -1, 4) == error_of(nn.LSTMCell, -1, 4)


# Forward. Each case makes the arguments of a module with I = 3, H = 4.


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


FORWARDS = {
    "1-D input": ({}, lambda: (x(3),)),
    "4-D input": ({}, lambda: (x(1, 5, 2, 3),)),
    "1-D states for unbatched input": ({}, lambda: (x(5, 3), (x(4), x(4)))),
    "3-D states for unbatched input": ({}, lambda: (x(5, 3), (x(1, 1, 4), x(1, 1, 4)))),
    "2-D states for batched input": ({}, lambda: (x(5, 2, 3), (x(1, 4), x(1, 4)))),
    "2-D cell state only": ({}, lambda: (x(5, 2, 3), (x(1, 2, 4), x(1, 4)))),
    "input size": ({}, lambda: (x(5, 2, 7),)),
    "input size with states": ({}, lambda: (x(5, 2, 7), (x(1, 2, 4), x(1, 2, 4)))),
    "input size unbatched": ({}, lambda: (x(5, 7),)),
    "input dtype": ({}, lambda: (x(5, 2, 3, dtype=torch.float64),)),
    "input dtype integer": ({}, lambda: (x(5, 2, 3, dtype=torch.int64),)),
    "input dtype with states": (
        {},
        lambda: (x(5, 2, 3, dtype=torch.float64), (x(1, 2, 4), x(1, 2, 4))),
    ),
    "dtype before size": ({}, lambda: (x(5, 2, 7, dtype=torch.float64),)),
    "hidden state batch": ({}, lambda: (x(5, 2, 3), (x(1, 1, 4), x(1, 2, 4)))),
    "cell state batch": ({}, lambda: (x(5, 2, 3), (x(1, 2, 4), x(1, 1, 4)))),
    "hidden state layers": ({"num_layers": 2}, lambda: (x(5, 2, 3), (x(1, 2, 4), x(1, 2, 4)))),
    "hidden state directions": ({"bidirectional": True}, lambda: (x(5, 2, 3), (x(1, 2, 4), x(1, 2, 4)))),
    "hidden state of projection": ({"proj_size": 2}, lambda: (x(5, 2, 3), (x(1, 2, 4), x(1, 2, 4)))),
    "cell state of projection": ({"proj_size": 2}, lambda: (x(5, 2, 3), (x(1, 2, 2), x(1, 2, 2)))),
    "hidden state batch_first": (
        {"batch_first": True},
        lambda: (x(2, 5, 3), (x(2, 1, 4), x(2, 1, 4))),
    ),
    "cell state unbatched": ({}, lambda: (x(5, 3), (x(1, 4), x(1, 3)))),
    "no steps": ({}, lambda: (x(0, 2, 3),)),
    "no steps with states": ({}, lambda: (x(0, 2, 3), (x(1, 2, 4), x(1, 2, 4)))),
    "no steps batch_first": ({"batch_first": True}, lambda: (x(2, 0, 3),)),
    "no steps unbatched": ({}, lambda: (x(0, 3),)),
    "input on another device": ({}, lambda: (x(5, 2, 3, device="meta"),)),
    "parameters on another device": ({"device": "meta"}, lambda: (x(5, 2, 3),)),
    "hidden state on another device": ({}, lambda: (x(5, 2, 3), (x(1, 2, 4, device="meta"), x(1, 2, 4)))),
    "cell state on another device": ({}, lambda: (x(5, 2, 3), (x(1, 2, 4), x(1, 2, 4, device="meta")))),
    "three states": ({}, lambda: (x(5, 2, 3), (x(1, 2, 4), x(1, 2, 4), x(1, 2, 4)))),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_forward(case):
    kwargs, arguments = FORWARDS[case]
    ours, torchs = FastLSTM(3, 4, **kwargs), nn.LSTM(3, 4, **kwargs)
    assert error_of(ours, *arguments()) == error_of(torchs, *arguments())


def test_one_parameter_on_another_device():
    texts = []
    for module in (FastLSTM(3, 4), nn.LSTM(3, 4)):
        module.bias_hh_l0 = nn.Parameter(module.bias_hh_l0.to("meta"))
        texts.append(error_of(module, x(5, 2, 3)))
    assert texts[0] == texts[1]


CELLS = {
    "3-D input": lambda: (x(1, 2, 3),),
    "0-D input": lambda: (torch.tensor(0.0),),
    "3-D hidden state": lambda: (x(2, 3), (x(1, 2, 4), x(2, 4))),
    "3-D cell state": lambda: (x(2, 3), (x(2, 4), x(1, 2, 4))),
    "input size": lambda: (x(2, 7),),
    "input size unbatched": lambda: (x(7), (x(4), x(4))),
    "hidden state batch": lambda: (x(2, 3), (x(1, 4), x(2, 4))),
    "cell state batch": lambda: (x(2, 3), (x(2, 4), x(1, 4))),
    "hidden state size": lambda: (x(2, 3), (x(2, 5), x(2, 4))),
    "cell state size": lambda: (x(2, 3), (x(2, 4), x(2, 5))),
    "1-D states for batched input": lambda: (x(2, 3), (x(4), x(4))),
    "three states": lambda: (x(2, 3), (x(2, 4), x(2, 4), x(2, 4))),
    "2-D states for unbatched input": lambda: (x(3), (x(1, 4), x(1, 4))),
}


@pytest.mark.parametrize("case", CELLS)
def test_cell_forward(case):
    arguments = CELLS[case]
    assert error_of(FastLSTMCell(3, 4), *arguments()) == error_of(nn.LSTMCell(3, 4), *arguments())


def test_one_line_of_traceback_context():
    """The operator's own refusal, which comes first, does not show."""
    with pytest.raises(RuntimeError) as caught:
        FastLSTM(3, 4)(x(5, 2, 7))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_states_of_a_cell_in_one_tensor():
    cell = FastLSTMCell(3, 4)
    assert torch.equal(cell(x(2, 3), x(2, 2, 4))[0], cell(x(2, 3))[0])
    with pytest.raises(RuntimeError, match="Input batch size 2 doesn't match hidden0 batch size 5"):
        cell(x(2, 3), x(2, 5, 4))
    with pytest.raises(RuntimeError, match="hidden0 must have 2 dimensions for 2-D input, got 1"):
        cell(x(4, 3), (x(4), x(4)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_single_step_by_coincidence(device):
    """T = B = I: 3-D input and 2-D states are not taken for a single step, by kernel or fake."""
    with pytest.raises(RuntimeError, match="For batched 3-D input, hx and cx should also be 3-D"):
        FastLSTM(3, 4, device=device)(x(3, 3, 3, device=device), (x(3, 4, device=device), x(3, 4, device=device)))


def test_no_features():
    weights = [x(16, 0), x(16, 4), x(16), x(16)]
    with pytest.raises(RuntimeError, match=re.escape("input must have at least one feature, got shape [5, 2, 0]")):
        fastlstm.lstm(x(5, 2, 0), weights, lengths=torch.tensor([3, 5]))
    with pytest.raises(RuntimeError, match=re.escape("input must have at least one feature, got shape [2, 0]")):
        fastlstm.lstm_cell(x(2, 0), None, *weights)


def test_a_refused_call_leaves_the_generator_as_it_was():
    module = FastLSTM(3, 4, 2, dropout=0.5)
    before = torch.get_rng_state()
    for rows, options in (
        (x(5, 2, 7), {}),
        (x(5, 2, 3), {"lengths": torch.tensor([9, 1])}),
        (x(5, 2, 3), {"reset_mask": x(5, 2)}),
        (PackedSequence(x(3, 3), torch.tensor([1, 2])), {}),
    ):
        with pytest.raises(RuntimeError):
            module(rows, **options)
    module.weight_hh_l1 = nn.Parameter(x(16, 5))
    with pytest.raises(RuntimeError, match=re.escape("w_hh must have shape [16, 4], got [16, 5]")):
        module(x(5, 2, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_casts_floating_dtypes_only():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(ValueError, match=re.escape(f"RNN input dtype ({dtype}) does not match weight dtype")):
                FastLSTM(3, 4)(x(5, 2, 3, dtype=dtype))


# Mistakes that nn.LSTM answers with an error from the depths of a library, or not at all.


@pytest.mark.parametrize(
    ("dtypes", "text"),
    [
        (
            (torch.float64, torch.float32),
            "hidden[0] must have the dtype of the input, torch.float32, got torch.float64",
        ),
        (
            (torch.float32, torch.bfloat16),
            "hidden[1] must have the dtype of the input, torch.float32, got torch.bfloat16",
        ),
        (
            (torch.int64, torch.int64),
            "hidden[0] must have the dtype of the input, torch.float32, got torch.int64",
        ),
    ],
)
def test_dtype_of_the_states(dtypes, text):
    h, c = dtypes
    with pytest.raises(RuntimeError, match=re.escape(text)):
        FastLSTM(3, 4)(x(5, 2, 3), (x(1, 2, 4, dtype=h), x(1, 2, 4, dtype=c)))
    with pytest.raises(RuntimeError, match=re.escape(text)):
        FastLSTMCell(3, 4)(x(2, 3), (x(2, 4, dtype=h), x(2, 4, dtype=c)))


def test_packed_sequences_get_the_messages_of_padded_ones():
    ours = FastLSTM(3, 4)
    packed = pack_padded_sequence(x(5, 2, 3), torch.tensor([5, 2]))
    wrong_size = pack_padded_sequence(x(5, 2, 7), torch.tensor([5, 2]))
    wrong_dtype = pack_padded_sequence(x(5, 2, 3, dtype=torch.float64), torch.tensor([5, 2]))
    cases = [
        ((packed, (x(1, 1, 4), x(1, 2, 4))), "Expected hidden[0] size (1, 2, 4), got [1, 1, 4]"),
        ((packed, (x(1, 2, 4), x(1, 1, 4))), "Expected hidden[1] size (1, 2, 4), got [1, 1, 4]"),
        ((wrong_size,), "input.size(-1) must be equal to input_size. Expected 3, got 7"),
        ((wrong_dtype,), "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)."),
        ((PackedSequence(x(7, 1, 3), packed.batch_sizes),), "input must have 2 dimensions, got 3"),
    ]
    for arguments, text in cases:
        with pytest.raises((RuntimeError, ValueError), match=re.escape(text)):
            ours(*arguments)


@pytest.mark.parametrize(
    ("batch_sizes", "text"),
    [
        (torch.tensor([[2, 1]]), "got a 2-D torch.int64 tensor on cpu"),
        (torch.tensor([2, 1], dtype=torch.int32), "got a 1-D torch.int32 tensor on cpu"),
        (torch.tensor([2, 1], device="meta"), "got a 1-D torch.int64 tensor on meta"),
    ],
)
def test_batch_sizes(batch_sizes, text):
    weights = list(nn.LSTM(3, 4).parameters())
    with pytest.raises(RuntimeError, match=re.escape(f"batch_sizes must be a 1-D int64 tensor on the CPU, {text}")):
        fastlstm.lstm(x(3, 3), weights, batch_sizes=batch_sizes)


@pytest.mark.parametrize("batch_sizes", [[1, 2], [2, 2], [1, 1], [3, 0], [4, -1]])
def test_batch_sizes_that_do_not_fit_the_rows(batch_sizes):
    weights = list(nn.LSTM(3, 4).parameters())
    with pytest.raises(RuntimeError, match="batch_sizes"):
        fastlstm.lstm(x(3, 3), weights, batch_sizes=torch.tensor(batch_sizes))


def test_no_batch_sizes():
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        fastlstm.lstm(x(0, 3), list(nn.LSTM(3, 4).parameters()), batch_sizes=torch.tensor([], dtype=torch.int64))


def test_number_of_weights():
    weights = list(nn.LSTM(3, 4).parameters())
    text = (
        "weights must hold num_layers * directions * 4 = 2 * 1 * 4 = 8 tensors "
        "(bias=True, hidden size 4, output size 4), got 4"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        fastlstm.lstm(x(5, 2, 3), weights, num_layers=2)
    with pytest.raises(ValueError, match=re.escape("2 * 1 * 2 = 4")):
        fastlstm.lstm(x(5, 2, 3), weights[:2], num_layers=2, bias=False)


def test_one_bias():
    cell = nn.LSTMCell(3, 4)
    with pytest.raises(ValueError, match="bias_ih and bias_hh must be given together, got only one of them"):
        fastlstm.lstm_cell(x(2, 3), None, cell.weight_ih, cell.weight_hh, cell.bias_ih)


@pytest.mark.parametrize("index", range(4))
def test_weight_of_the_wrong_shape_or_dtype(index):
    weights = [p.detach() for p in nn.LSTM(3, 4, 2).parameters()]
    weights[4 + index] = x(weights[4 + index].size(0) + 1, *weights[4 + index].shape[1:])
    with pytest.raises(RuntimeError, match="must have shape"):
        fastlstm.lstm(x(5, 2, 3), weights, num_layers=2)
    weights = [p.detach() for p in nn.LSTM(3, 4, 2).parameters()]
    weights[4 + index] = weights[4 + index].double()
    with pytest.raises(RuntimeError, match="dtype"):
        fastlstm.lstm(x(5, 2, 3), weights, num_layers=2)


def test_device_without_a_kernel(monkeypatch):
    # No such device is at hand: the dispatcher's refusal is raised in its stead.
    def refuse(*args, **kwargs):
        raise NotImplementedError("Could not run 'fastlstm::lstm' with arguments from the backend")

    monkeypatch.setattr(_ops, "lstm", refuse)
    with FakeTensorMode():
        weights = [torch.empty(*shape, device="cuda") for shape in ((16, 3), (16, 4), (16,), (16,))]
        rows = torch.empty(5, 2, 3, device="cuda")
        text = "this build of fastlstm has no LSTM kernel for tensors on cuda:0; move them to the CPU"
        with pytest.raises(NotImplementedError, match=text):
            fastlstm.lstm(rows, weights)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FastLSTM.from_torch(nn.GRU(3, 4)), "module must be of class LSTM itself, got GRU"),
        (lambda: FastLSTM.from_torch(nn.LSTMCell(3, 4)), "module must be of class LSTM itself, got LSTMCell"),
        (lambda: FastLSTMCell.from_torch(nn.LSTM(3, 4)), "module must be of class LSTMCell itself, got LSTM"),
        (
            lambda: FastLSTM.from_torch(prune.identity(nn.LSTM(3, 4), "weight_hh_l0")),
            "swap_lstm() keeps weight_norm, prune and parametrizations",
        ),
        (
            lambda: prune.identity(FastLSTM(3, 4), "weight_hh_l0").to_torch(),
            "the weights of module must be Parameters named ['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0'",
        ),
    ],
)
def test_conversion(make, text):
    with pytest.raises(TypeError, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("stub", "text"),
    [
        ("None", "extension module does not load into torch .*build it again with: pip install --no-build-isolation"),
        ("types.SimpleNamespace(torch_built='2.9.1')", "built against torch 2.9.1 and cannot run with torch .*build"),
    ],
)
def test_an_extension_module_of_another_torch(stub, text):
    script = f"import sys, types; sys.modules['fastlstm._C'] = {stub}; import fastlstm"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.search(rf"^ImportError: .*{text}", result.stderr, re.MULTILINE), result.stderr

"""from_keras and to_keras: against the equations of Keras' documentation in NumPy, and against Keras where installed.

Keras' LSTM: z = x kernel + h recurrent_kernel + bias, cut into i, f, c~, o; c' = sigmoid(f) c + sigmoid(i) tanh(c~),
h' = sigmoid(o) tanh(c'). Batches are [B, T, I].
"""

import os
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastlstm
from fastlstm import FastLSTM, from_keras, to_keras

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def arrays(inputs, units, bias=True, directions=1, dtype=np.float64, seed=0):
    """Weights as ``get_weights()`` lists them."""
    generator = np.random.default_rng(seed)
    shapes = [(inputs, 4 * units), (units, 4 * units), (4 * units,)][: 2 + bias]
    return [generator.normal(size=shape).astype(dtype) for _ in range(directions) for shape in shapes]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def lstm_of_keras(x, kernel, recurrent_kernel, bias=0.0):
    """Outputs ``[B, T, H]`` and the final h and c ``[B, H]`` for x ``[B, T, I]``."""
    h = c = np.zeros((x.shape[0], recurrent_kernel.shape[0]))
    outputs = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1), h, c


def layer_of_keras(x, weights, directions):
    """Outputs and final states ``[directions, B, H]`` of an LSTM or a Bidirectional that concatenates."""
    count = len(weights) // directions
    y, h, c = lstm_of_keras(x, *weights[:count])
    if directions == 1:
        return y, h[None], c[None]
    y_reverse, h_reverse, c_reverse = lstm_of_keras(x[:, ::-1], *weights[count:])
    return np.concatenate([y, y_reverse[:, ::-1]], axis=2), np.stack([h, h_reverse]), np.stack([c, c_reverse])


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(actual.detach()), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
def test_it_computes_keras_equations(layers, directions, bias):
    sizes = [3] + [4 * directions] * (layers - 1)
    stack = [arrays(size, 4, bias, directions, seed=k) for k, size in enumerate(sizes)]
    module = from_keras(stack if layers > 1 else stack[0])
    x = np.random.default_rng(9).normal(size=(2, 5, 3))
    y, (h_n, c_n) = module(torch.from_numpy(x))
    expected, states = x, []
    for weights in stack:
        expected, *final = layer_of_keras(expected, weights, directions)
        states.append(final)
    assert_close(y, expected)
    assert_close(h_n, np.concatenate([h for h, _ in states]))
    assert_close(c_n, np.concatenate([c for _, c in states]))

    back = to_keras(module)
    for weights, returned in zip(stack, back if layers > 1 else [back], strict=True):
        for array, same in zip(weights, returned, strict=True):
            assert same.dtype == array.dtype
            assert same.flags.c_contiguous
            np.testing.assert_array_equal(same, array)


def test_what_is_made():
    state = torch.get_rng_state()
    module = from_keras([arrays(3, 4, directions=2, dtype=np.float32), arrays(8, 4, directions=2, dtype=np.float32)])
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(module) == "FastLSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True)"
    assert list(module.state_dict()) == list(nn.LSTM(3, 4, 2, bidirectional=True).state_dict())
    for name, parameter in module.named_parameters():
        assert (parameter.dtype, parameter.device.type) == (torch.float32, "cpu")
        assert parameter.is_contiguous()
        assert parameter.requires_grad
        assert bool(parameter.any()) != name.startswith("bias_hh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of arrays that must not be written to
        read_only = arrays(3, 4)
        read_only[0].setflags(write=False)
        assert not from_keras(read_only, batch_first=False).batch_first
    assert from_keras(arrays(3, 4), dtype=torch.float16).weight_ih_l0.dtype == torch.float16
    assert from_keras(arrays(3, 4), device="meta").weight_ih_l0.is_meta


def test_both_ways_copy():
    source = arrays(1, 4)  # of which the transposed kernel is contiguous as it is
    module = from_keras(source)
    kernel, bias = source[0].copy(), source[2].copy()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(source[0], kernel)
    returned = to_keras(from_keras(source))
    returned[2][:] = 0
    np.testing.assert_array_equal(source[2], bias)
    tensors = [torch.from_numpy(array) for array in source]
    with torch.no_grad():
        from_keras(tensors).bias_ih_l0.zero_()
    np.testing.assert_array_equal(source[2], bias)
    weights = to_keras(module)
    weights[0][:] = 1
    assert not module.weight_ih_l0.any()


@pytest.mark.parametrize("cls", [FastLSTM, nn.LSTM])
@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str
)
def test_to_keras_adds_the_biases(cls, kwargs):
    module = cls(3, 4, **kwargs, dtype=torch.float64)
    weights = to_keras(module)
    stack = weights if module.num_layers > 1 else [weights]
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = x.numpy()
    for layer in stack:
        expected, *_ = layer_of_keras(expected, layer, 1 + module.bidirectional)
    y, _ = module(x if module.batch_first else x.transpose(0, 1))
    assert_close(y if module.batch_first else y.transpose(0, 1), expected)


def test_bfloat16_becomes_float32():
    module = FastLSTM(3, 4, dtype=torch.bfloat16)
    weights = to_keras(module)
    assert {array.dtype.name for array in weights} == {"float32"}
    np.testing.assert_array_equal(weights[0].T, module.weight_ih_l0.detach().float().numpy())
    assert {array.dtype.name for array in to_keras(module.half())} == {"float16"}


# Layers, as far as from_keras looks at them. The tests with Keras check that its layers look so.


def tanh():
    raise AssertionError


def sigmoid_():
    raise AssertionError


sigmoid_.__name__ = "sigmoid"


class Layer:
    def __init__(self, weights, **attributes):
        self.weights, self.units = weights, 4
        self.activation, self.recurrent_activation, self.go_backwards = tanh, sigmoid_, False
        self.__dict__.update(attributes)

    def get_weights(self):
        return self.weights


class Bidirectional:
    merge_mode = "concat"

    def __init__(self, **attributes):
        self.forward_layer, self.backward_layer = Layer(arrays(3, 4)), Layer(arrays(3, 4, seed=1), go_backwards=True)
        self.__dict__.update(attributes)

    def get_weights(self):
        return self.forward_layer.get_weights() + self.backward_layer.get_weights()


def test_layers_in_place_of_weights():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected, _ = from_keras(arrays(3, 4))(x)
    assert torch.equal(from_keras(Layer(arrays(3, 4)))(x)[0], expected)
    both = from_keras([Bidirectional(), arrays(8, 4, directions=2)])
    assert (both.num_layers, both.bidirectional) == (2, True)
    np.testing.assert_array_equal(to_keras(both)[0][3], arrays(3, 4, seed=1)[0])


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"activation": sigmoid_}, "activation of source must be 'tanh', got 'sigmoid'"),
        ({"activation": 3}, "activation of source must be 'tanh', got 3"),
        ({"recurrent_activation": tanh}, "recurrent_activation of source must be 'sigmoid', got 'tanh'"),
        ({"go_backwards": True}, "go_backwards of source must be False, got True"),
        ({"weights": []}, "source must have been built, by build() or a first call, before it has weights"),
    ],
)
def test_layers_that_are_something_else(attributes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        from_keras(Layer(**{"weights": arrays(3, 4), **attributes}))


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"merge_mode": "sum"}, "merge_mode of source[0] must be 'concat', got 'sum'"),
        ({"merge_mode": None}, "merge_mode of source[0] must be 'concat', got None"),
        (
            {"backward_layer": Layer(arrays(3, 4))},
            "go_backwards of source[0].backward_layer must be True, got False",
        ),
        (
            {"backward_layer": Layer(arrays(3, 4), go_backwards=True, activation=sigmoid_)},
            "activation of source[0].backward_layer must be 'tanh', got 'sigmoid'",
        ),
    ],
)
def test_bidirectional_layers_that_are_something_else(attributes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        from_keras([Bidirectional(**attributes)])


def test_layers_of_another_kind():
    class Dense:
        activation = tanh

        def get_weights(self):
            return arrays(3, 4)

    text = "source must be a keras.layers.LSTM, got Dense without recurrent_activation"
    with pytest.raises(TypeError, match=re.escape(text)):
        from_keras(Dense())
    text = "source[1] must be a keras.layers.LSTM, a Bidirectional of one, or the arrays of its get_weights(), got str"
    with pytest.raises(TypeError, match=re.escape(text)):
        from_keras([arrays(3, 4), "lstm"])
    for source in (3, arrays(3, 4)[0], iter(arrays(3, 4))):
        with pytest.raises(TypeError, match=f"^source must be .*, got {type(source).__name__}"):
            from_keras(source)


def test_dropout_of_a_layer_is_left_behind_with_a_warning():
    for name in ("dropout", "recurrent_dropout"):
        with pytest.warns(UserWarning, match=f"^{name}=0.25 of source acts in training only") as caught:
            module = from_keras(Layer(arrays(3, 4), **{name: 0.25}))
        assert caught[0].filename == __file__
        assert module.dropout == 0


def changed(weights, index, array):
    return [*weights[:index], array, *weights[index + 1 :]]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ([], "source must hold at least one layer, got none"),
        (
            arrays(3, 4)[:1],
            "source must hold 2 or 3 arrays (kernel, recurrent_kernel and with use_bias the bias), "
            "or twice as many for Bidirectional, got 1",
        ),
        ([arrays(3, 4), arrays(4, 4) + arrays(4, 4)[:2]], "source[1] must hold 2 or 3 arrays"),
        ([arrays(3, 4), arrays(4, 4, bias=False)], "source[1] must hold 3 arrays like source[0], got 2"),
        (
            changed(arrays(3, 4), 0, np.zeros(16)),
            "source must begin with the matrices kernel [I, 4H] and recurrent_kernel [H, 4H], "
            "got shapes [16] and [4, 16]",
        ),
        (changed(arrays(3, 4), 0, np.zeros((3, 12))), "kernel of source must have shape [3, 16], got [3, 12]"),
        (
            changed(arrays(3, 4), 1, np.zeros((4, 12))),
            "recurrent_kernel of source must have shape [4, 16], got [4, 12]",
        ),
        (changed(arrays(3, 4), 2, np.zeros((2, 12))), "bias of source must have shape [16], got [2, 12]"),
        (arrays(0, 4), "source must have at least one input and one unit, got 0 and 4"),
        ([arrays(3, 4), arrays(3, 4)], "kernel of source[1] must have shape [4, 16], got [3, 16]"),
        ([arrays(3, 4), arrays(4, 5)], "kernel of source[1] must have shape [4, 16], got [4, 20]"),
        (
            changed(arrays(3, 4, directions=2), 3, np.zeros((2, 16))),
            "backward kernel of source must have shape [3, 16], got [2, 16]",
        ),
        (
            changed(arrays(3, 4, directions=2), 2, np.zeros(4)),
            "forward bias of source must have shape [16], got [4]",
        ),
        (
            changed(arrays(3, 4), 2, np.zeros(16, np.float32)),
            "bias of source must have the dtype of the first kernel, torch.float64, got torch.float32",
        ),
        (arrays(3, 4, dtype=np.int64), "dtype must be float32, float64, bfloat16 or float16, got torch.int64"),
    ],
)
def test_weights_that_do_not_fit(source, text):
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        from_keras(source)


def test_a_dtype_that_there_is_not():
    with pytest.raises(ValueError, match=r"dtype must be .*, got torch\.int32"):
        from_keras(arrays(3, 4), dtype=torch.int32)


def test_modules_that_keras_has_not():
    with pytest.raises(ValueError, match="must have no projections, which Keras' LSTM has not, got proj_size=2"):
        to_keras(FastLSTM(3, 4, proj_size=2))
    for module in (nn.GRU(3, 4), nn.LSTMCell(3, 4)):
        with pytest.raises(TypeError, match=f"module must be a FastLSTM or nn.LSTM, got {type(module).__name__}"):
            to_keras(module)


# Keras itself.


@pytest.fixture(scope="module")
def layers():
    """``keras.layers``, on torch as its backend."""
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "torch"
    try:
        keras = pytest.importorskip("keras")
    finally:
        os.environ.pop("KERAS_BACKEND") if before is None else os.environ.update(KERAS_BACKEND=before)
    if keras.backend.backend() != "torch":
        pytest.skip(f"keras has been imported with {keras.backend.backend()} as its backend")
    return keras.layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_keras_computes_the_same(layers, depth, bidirectional, bias):
    x = torch.randn(2, 5, 3)
    stack, expected, finals = [], x, []
    for _ in range(depth):
        layer = layers.LSTM(4, return_sequences=True, return_state=True, use_bias=bias, bias_initializer="normal")
        stack.append(layers.Bidirectional(layer) if bidirectional else layer)
        expected, *states = stack[-1](expected)
        finals += states
    module = from_keras(stack if depth > 1 else stack[0])
    assert module.bias is bias
    y, (h_n, c_n) = module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h_n, torch.stack(finals[::2]))
    torch.testing.assert_close(c_n, torch.stack(finals[1::2]))
    torch.testing.assert_close(from_keras([layer.get_weights() for layer in stack])(x)[0], expected)

    trained = FastLSTM(3, 4, depth, bias=bias, bidirectional=bidirectional, batch_first=True)
    weights = to_keras(trained)
    for layer, arrays_ in zip(stack, weights if depth > 1 else [weights], strict=True):
        layer.set_weights(arrays_)
    expected = x
    for layer in stack:
        expected = layer(expected)[0]
    torch.testing.assert_close(trained(x)[0], expected)


def test_keras_layers_that_are_something_else(layers):
    x = torch.randn(2, 5, 3)

    def built(layer):
        layer(x)
        return layer

    for layer, text in [
        (layers.LSTM(4, activation="relu"), "activation of source must be 'tanh', got 'relu'"),
        (layers.LSTM(4, activation=layers.LeakyReLU()), "activation of source must be 'tanh', got <LeakyReLU"),
        (layers.LSTM(4, activation=None), "activation of source must be 'tanh', got 'linear'"),
        (layers.LSTM(4, recurrent_activation="hard_sigmoid"), "must be 'sigmoid', got 'hard_sigmoid'"),
        (layers.LSTM(4, go_backwards=True), "go_backwards of source must be False, got True"),
        (layers.Bidirectional(layers.LSTM(4), merge_mode="ave"), "merge_mode of source must be 'concat', got 'ave'"),
        (layers.GRU(4, reset_after=False), "kernel of source must have shape [3, 16], got [3, 12]"),
    ]:
        with pytest.raises(ValueError, match=re.escape(text)):
            from_keras(built(layer))
    for layer in (layers.SimpleRNN(4), layers.Dense(4), layers.RNN(layers.LSTMCell(4))):
        with pytest.raises(TypeError, match=f"source must be a keras.layers.LSTM, got {type(layer).__name__} without"):
            from_keras(built(layer))
    with pytest.raises(ValueError, match="source must have been built"):
        from_keras(layers.LSTM(4))
    layer = built(layers.Bidirectional(layers.LSTM(4, recurrent_dropout=0.5)))
    with pytest.warns(UserWarning, match="acts in training only") as caught:
        from_keras(layer)
    assert [str(w.message).split(" acts")[0] for w in caught if w.category is UserWarning] == [
        f"recurrent_dropout=0.5 of source.{part}_layer" for part in ("forward", "backward")
    ]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes_of_keras(layers, dtype):
    layer = layers.LSTM(4, dtype=dtype, recurrent_initializer="glorot_uniform")
    layer.build((2, 5, 3))
    module = from_keras(layer)
    assert module.weight_ih_l0.dtype == getattr(torch, dtype)
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    layer.set_weights(to_keras(module))
    for weight, parameter in zip(weights, from_keras(layer).parameters(), strict=True):
        assert torch.equal(weight, parameter)


def test_names_are_exported():
    assert {"from_keras", "to_keras"} <= set(fastlstm.__all__)

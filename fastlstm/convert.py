"""Conversions: swap_lstm, for the nn.LSTMs of a model; from_keras and to_keras, for the weights of Keras.

swap_lstm turns nn.LSTMs and nn.LSTMCells into FastLSTMs and FastLSTMCells in place. The modules stay the objects they
are and only their class changes, as torch.nn.utils.parametrize does it. So everything attached to them stays valid:
Parameters, optimizers, tied weights, hooks and the handles that remove them, parametrizations, the training flag,
references from elsewhere in the model.

A keras.layers.LSTM computes the same cell from other arrays: ``kernel`` [I, 4H] and ``recurrent_kernel`` [H, 4H] are
the transposes of weight_ih and weight_hh, and one ``bias`` [4H] stands for the sum of two. What Keras names i, f, c, o
are the gates i, f, g, o, in the same order. keras itself is not needed for any of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlstm.modules import FastLSTM, FastLSTMCell

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_Module = TypeVar("_Module", bound=nn.Module)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: FastLSTM, nn.LSTMCell: FastLSTMCell}


def swap_lstm(model: _Module) -> _Module:
    """Turn every nn.LSTM of ``model`` into a FastLSTM and every nn.LSTMCell into a FastLSTMCell.

    Works in place, at any depth, on a model that is itself an nn.LSTM, and in the middle of a training.
    Nothing but the class of these modules changes. Subclasses of nn.LSTM and nn.LSTMCell are left untouched,
    because what they override would be lost, and a UserWarning names them.

    Args:
        model: any module.

    Returns:
        ``model`` itself.
    """
    for name, module in model.named_modules():
        cls = parametrize.type_before_parametrizations(module)
        if cls in _REPLACEMENTS:
            _change_class(module, _REPLACEMENTS[cls])
        elif isinstance(module, tuple(_REPLACEMENTS)):
            warnings.warn(
                f"swap_lstm left {name or 'the model itself'} untouched: {cls.__qualname__} is a subclass of "
                f"nn.{'LSTM' if isinstance(module, nn.LSTM) else 'LSTMCell'} and may override its behaviour",
                stacklevel=2,
            )
    return model


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # nn.LSTM's own list of its weights would keep stale tensors alive; FastLSTM derives it.
    module.__dict__.pop("_flat_weights", None)
    if parametrize.is_parametrized(module):
        # parametrize has put properties for the weights into a class made for this module alone.
        properties = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), properties)
    module.__class__ = cls


def from_keras(
    source: Any,
    *,
    batch_first: bool = True,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> FastLSTM:
    """Make a FastLSTM with the weights of Keras' LSTM layers.

    ``source`` is one layer or a sequence of layers, each fed by the one before. A layer is given as itself (a
    ``keras.layers.LSTM``, or a ``Bidirectional`` of one with ``merge_mode="concat"``), or as what its ``get_weights()``
    returns, for I inputs and H units::

        [kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H]]    without the bias for use_bias=False
        [..., ...]                                               Bidirectional: those of forward_layer, backward_layer

    Weights do not say what a layer computes with them. Layers do, so they are checked.

    The FastLSTM computes what the layers compute with ``return_sequences=True``, and always returns the final states.
    Of what is called ``stateful`` in Keras, it keeps nothing: pass the states on. Padded sequences are told by
    ``lengths``, not by a mask. ``bias_ih`` is Keras' bias and ``bias_hh`` is zero. Trained further, both get the
    gradient that Keras' bias gets, so with plain SGD their sum moves twice as far; to avoid that, freeze
    ``bias_hh`` with ``requires_grad_(False)``.

    Args:
        source: the layers, see above; arrays are NumPy's, or tensors.
        batch_first: whether the FastLSTM takes ``[B, T, I]``, as Keras' layers do, instead of ``[T, B, I]``.
        device: of the parameters, which are copies of the arrays.
        dtype: of the parameters; that of the arrays if None.

    Raises:
        TypeError: ``source`` is or holds something else than LSTM layers and weights.
        ValueError: a layer has not been built or is none that a FastLSTM can compute: another activation than tanh,
            another recurrent_activation than sigmoid, ``go_backwards``, another merge_mode than "concat"; the number
            of arrays, a shape or a dtype does not fit; the layers differ in direction, units or use of a bias.

    Warns:
        UserWarning: a layer has ``dropout`` or ``recurrent_dropout``. They act in training only, on inputs and states;
            FastLSTM's dropout acts on the outputs between its layers. So they are left behind.
    """
    weights: dict[str, list[Tensor]] = {}
    if _is_keras_layer(source) or _holds_arrays(source) or not isinstance(source, Sequence):
        weights["source"] = _keras_tensors(source, "source")
    else:
        for k, layer in enumerate(source):
            weights[f"source[{k}]"] = _keras_tensors(layer, f"source[{k}]")
    if not weights:
        raise ValueError("source must hold at least one layer, got none")
    input_size, hidden_size, directions, bias = _keras_structure(weights)
    if dtype is None:
        dtype = next(iter(weights.values()))[0].dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")

    # On the meta device nothing is allocated and nothing is drawn from the generator.
    module = FastLSTM(
        input_size,
        hidden_size,
        len(weights),
        bias=bias,
        batch_first=batch_first,
        bidirectional=directions == 2,
        device="meta",
    )
    parameters: list[Tensor] = []
    for tensors in weights.values():
        count = len(tensors) // directions
        for d in range(directions):
            kernel, recurrent_kernel, *biases = tensors[d * count : (d + 1) * count]
            parameters += [kernel.t(), recurrent_kernel.t(), *biases, *(torch.zeros_like(b) for b in biases)]
    for name, parameter in zip(module._flat_weights_names, parameters, strict=True):
        setattr(module, name, nn.Parameter(parameter.to(device=device, dtype=dtype).contiguous()))
    return module


def to_keras(module: nn.LSTM | FastLSTM) -> list[Array] | list[list[Array]]:
    """The weights of an LSTM as ``set_weights()`` of Keras' layers takes them; the inverse of :func:`from_keras`.

    Args:
        module: a FastLSTM or an nn.LSTM of any dtype and on any device.

    Returns:
        Of one layer, the list of NumPy arrays ``[kernel, recurrent_kernel, bias]`` for a ``keras.layers.LSTM(H)``, with
        ``use_bias=False`` where there are no biases; of both directions one after the other for
        ``keras.layers.Bidirectional(keras.layers.LSTM(H))``. Of several layers, a list of such lists. The bias is the
        sum of bias_ih and bias_hh. The arrays are copies in the module's dtype; float32 for bfloat16, which NumPy has
        not.

    Raises:
        TypeError: ``module`` is no FastLSTM or nn.LSTM.
        ValueError: it has projections, which Keras has not.
    """
    if not isinstance(module, (nn.LSTM, FastLSTM)):
        raise TypeError(f"module must be a FastLSTM or nn.LSTM, got {type(module).__name__}")
    if module.proj_size:
        raise ValueError(
            f"module must have no projections, which Keras' LSTM has not, got proj_size={module.proj_size}"
        )
    directions = 2 if module.bidirectional else 1
    cells = [_keras_arrays(*cell) for cell in module.all_weights]
    layers = [[array for cell in cells[k : k + directions] for array in cell] for k in range(0, len(cells), directions)]
    return layers[0] if len(layers) == 1 else layers


def _keras_arrays(weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor) -> list[Array]:
    """One direction of one layer as Keras has it."""
    tensors = [weight_ih.t(), weight_hh.t()]
    if biases:
        tensors.append(biases[0] + biases[1])
    return [_array(tensor.detach()) for tensor in tensors]


def _array(tensor: Tensor) -> Array:
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: Array = tensor.cpu().clone(memory_format=torch.contiguous_format).numpy()
    return array


def _is_keras_layer(source: Any) -> bool:
    return hasattr(source, "get_weights")


def _holds_arrays(source: Any) -> bool:
    return isinstance(source, Sequence) and len(source) > 0 and all(hasattr(item, "shape") for item in source)


def _keras_tensors(layer: Any, name: str) -> list[Tensor]:
    """Copies of the arrays of one layer: 2 or 3, or 4 or 6 of both directions."""
    if _is_keras_layer(layer):
        bidirectional = hasattr(layer, "backward_layer")
        _check_keras_layer(layer, name, bidirectional)
        layer = layer.get_weights()
        if not layer:
            raise ValueError(f"{name} must have been built, by build() or a first call, before it has weights")
    elif not _holds_arrays(layer):
        raise TypeError(
            f"{name} must be a keras.layers.LSTM, a Bidirectional of one, or the arrays of its get_weights(), "
            f"got {type(layer).__name__}"
        )
    if len(layer) not in (2, 3, 4, 6):
        raise ValueError(
            f"{name} must hold 2 or 3 arrays (kernel, recurrent_kernel and with use_bias the bias), "
            f"or twice as many for Bidirectional, got {len(layer)}"
        )
    return [_tensor(array) for array in layer]


def _keras_structure(weights: dict[str, list[Tensor]]) -> tuple[int, int, int, bool]:
    """I, H, directions and use of biases of a stack of layers, if all of its arrays fit these."""
    first_name, first = next(iter(weights.items()))
    if first[0].dim() != 2 or first[1].dim() != 2:
        raise ValueError(
            f"{first_name} must begin with the matrices kernel [I, 4H] and recurrent_kernel [H, 4H], "
            f"got shapes {list(first[0].shape)} and {list(first[1].shape)}"
        )
    input_size, hidden_size = first[0].size(0), first[1].size(0)
    if input_size == 0 or hidden_size == 0:
        raise ValueError(f"{first_name} must have at least one input and one unit, got {input_size} and {hidden_size}")
    directions, bias = 1 if len(first) <= 3 else 2, len(first) % 3 == 0
    for k, (name, tensors) in enumerate(weights.items()):
        if len(tensors) != len(first):
            raise ValueError(f"{name} must hold {len(first)} arrays like {first_name}, got {len(tensors)}")
        width = input_size if k == 0 else directions * hidden_size
        expected: dict[str, tuple[int, ...]] = {"kernel": (width, 4 * hidden_size)}
        expected["recurrent_kernel"] = (hidden_size, 4 * hidden_size)
        if bias:
            expected["bias"] = (4 * hidden_size,)
        for index, tensor in enumerate(tensors):
            array, shape = list(expected.items())[index % len(expected)]
            if directions == 2:
                array = f"{'forward' if index < len(expected) else 'backward'} {array}"
            if tensor.shape != shape:
                raise ValueError(f"{array} of {name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype != first[0].dtype:
                raise ValueError(
                    f"{array} of {name} must have the dtype of the first kernel, {first[0].dtype}, got {tensor.dtype}"
                )
    return input_size, hidden_size, directions, bias


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().clone()
    if getattr(array.dtype, "name", None) == "bfloat16":  # of the package ml_dtypes, which torch does not know
        return torch.tensor(array.astype("float32")).to(torch.bfloat16)
    return torch.tensor(array)


def _check_keras_layer(layer: Any, name: str, bidirectional: bool) -> None:
    """Raise unless a Keras layer computes what a FastLSTM does."""
    parts = {name: layer}
    if bidirectional:
        if layer.merge_mode != "concat":
            raise ValueError(f"merge_mode of {name} must be 'concat', got {layer.merge_mode!r}")
        parts = {f"{name}.forward_layer": layer.forward_layer, f"{name}.backward_layer": layer.backward_layer}
    for part_name, part in parts.items():
        missing = [a for a in ("activation", "recurrent_activation", "go_backwards", "units") if not hasattr(part, a)]
        if missing:
            raise TypeError(f"{part_name} must be a keras.layers.LSTM, got {type(part).__name__} without {missing[0]}")
        for attribute, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
            function = getattr(part, attribute)
            found = getattr(function, "__name__", function)
            if found != expected:
                raise ValueError(f"{attribute} of {part_name} must be {expected!r}, got {found!r}")
        backwards = part_name.endswith(".backward_layer")
        if bool(part.go_backwards) != backwards:
            raise ValueError(f"go_backwards of {part_name} must be {backwards}, got {part.go_backwards}")
        for attribute in ("dropout", "recurrent_dropout"):
            if getattr(part, attribute, 0):
                warnings.warn(
                    f"{attribute}={getattr(part, attribute)} of {part_name} acts in training only and is left behind",
                    stacklevel=4,
                )

"""The arguments of the operator, checked in Python: nn.LSTM's messages, word for word where it has one.

The compiled kernels check everything themselves, in the operator's terms. These checks run where no kernel does
(``torch.compile``, fakes and the meta device, torch.func transforms), before dropout masks are drawn, and after a
kernel has refused a call, to say what is wrong as nn.LSTM says it. In any other call that is right they cost nothing.

Shapes are those of :func:`fastlstm.reference.lstm`; single steps are those of :func:`fastlstm.reference.lstm_cell`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlstm._operators import NO_EXTRAS, Extras
from fastlstm.reference import LAYER_NORM_WEIGHTS

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_lstm(
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    dropout_mask: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    extras: Extras = NO_EXTRAS,
) -> None:
    """Raise for the first argument of the operator that does not fit.

    Raises:
        ValueError: the dtype of x is not that of the weights, or the number of weights does not fit.
        RuntimeError: a size, dtype, device or value does not fit, or T = 0.
    """
    directions = 2 if bidirectional else 1
    check_weight_count(weights, num_layers, directions, has_bias, extras.layer_norm)
    hidden_size, out_size = weights[0].size(0) // 4, weights[1].size(1)
    rank = 3 if batch_sizes is None else 2
    if x.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {x.dim()}")
    _check_input_dtype(x, weights[0])
    if x.size(-1) != weights[0].size(1):
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {weights[0].size(1)}, got {x.size(-1)}"
        )
    if x.size(-1) == 0:
        raise RuntimeError(f"input must have at least one feature, got shape {list(x.shape)}")
    _check_state_dtypes(x, h_0, c_0)
    batch = x.size(1)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes)
        # Without values the number of sequences is only what the states say.
        batch = h_0.size(1) if not _has_values(batch_sizes) else int(batch_sizes[0]) if batch_sizes.size(0) else 0
    for index, (state, size) in enumerate(((h_0, out_size), (c_0, hidden_size))):
        expected = (num_layers * directions, batch, size)
        if state.shape != expected:
            raise RuntimeError(f"Expected hidden[{index}] size {expected}, got {list(state.shape)}")
    if (x if batch_sizes is None else batch_sizes).size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if batch_sizes is not None:
        _check_batch_size_values(batch_sizes, x.size(0))
    if lengths is not None:
        if batch_sizes is not None:
            raise RuntimeError("lengths cannot be given with a packed sequence, whose batch_sizes hold them")
        _check_lengths(lengths, x.size(0), batch)
    if reset_mask is not None:
        check_reset_mask(reset_mask, x.shape[:-1])
    if dropout_mask is not None:
        shape = (num_layers - 1, *x.shape[:-1], directions * out_size)
        if dropout_mask.shape != shape:
            raise RuntimeError(f"dropout_mask must have shape {list(shape)}, got {list(dropout_mask.shape)}")
    device_lengths = None if lengths is None or lengths.is_cpu else lengths
    _check_devices(x, weights, h_0, c_0, lengths=device_lengths, reset_mask=reset_mask, dropout_mask=dropout_mask)
    for k in range(num_layers * directions):
        count = len(weights) // (num_layers * directions)
        width = x.size(-1) if k < directions else directions * out_size
        own_weights = weights[k * count : (k + 1) * count]
        _check_weights(x, own_weights, width, hidden_size, out_size, has_bias, extras.layer_norm)
    _check_extras(x, h_0, c_0, reset_mask, num_layers, extras)


def _check_extras(
    x: Tensor, h_0: Tensor, c_0: Tensor, reset_mask: Tensor | None, num_layers: int, extras: Extras
) -> None:
    """Raise RuntimeError for the first of the operator's rarer arguments that does not fit the ones before."""
    if extras is NO_EXTRAS:
        return
    reset_h, reset_c, recurrent_mask, zoneout_h, zoneout_c, zoneout_rate_h, zoneout_rate_c, cell_layers, *_ = extras
    if (reset_h is None) != (reset_c is None) or (reset_h is not None and reset_mask is None):
        raise RuntimeError("reset_h and reset_c must be given together and with reset_mask")
    for name, factor, state in (
        ("reset_hx[0]", reset_h, h_0),
        ("reset_hx[1]", reset_c, c_0),
        ("recurrent_mask", recurrent_mask, h_0),
    ):
        if factor is not None and (factor.shape != state.shape or factor.dtype != state.dtype):
            raise RuntimeError(
                f"{name} must have the shape and dtype of hx, {list(state.shape)} {state.dtype}, "
                f"got {list(factor.shape)} {factor.dtype}"
            )
    states = h_0.size(0) if h_0.dim() == 3 else 1
    for name, mask, rate, features in (
        ("zoneout_h", zoneout_h, zoneout_rate_h, h_0.size(-1)),
        ("zoneout_c", zoneout_c, zoneout_rate_c, c_0.size(-1)),
    ):
        shape = (states, *x.shape[:-1], features)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape or rate != 0):
            raise RuntimeError(
                f"{name} must be a bool tensor of shape {list(shape)} without a rate, "
                f"got {mask.dtype} {list(mask.shape)} and {rate}"
            )
        if not 0 <= rate <= 1:
            raise RuntimeError(f"the rate of {name} must be in [0, 1], got {rate}")
    if not 0 <= cell_layers <= num_layers:
        raise RuntimeError(f"cell_layers must be in [0, num_layers] = [0, {num_layers}], got {cell_layers}")
    others = {"reset_hx": reset_h, "recurrent_mask": recurrent_mask, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c}
    _check_devices(x, (), h_0, c_0, **others)


def check_regularisers(weight_dropout: float, recurrent_dropout: float, zoneout: tuple[float, float]) -> None:
    """Raise ValueError unless all of them are probabilities, and those of zoneout a pair."""
    if not isinstance(zoneout, tuple) or len(zoneout) != 2:
        raise ValueError(f"zoneout must be a pair (z_h, z_c) of probabilities, got {zoneout!r}")
    named = (("weight_dropout", weight_dropout), ("recurrent_dropout", recurrent_dropout))
    for name, p in (*named, ("zoneout", zoneout[0]), ("zoneout", zoneout[1])):
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {p!r}")


def check_lstm_cell(
    x: Tensor,
    weights: Sequence[Tensor],
    h: Tensor,
    c: Tensor,
    has_bias: bool,
    reset_mask: Tensor | None = None,
    extras: Extras = NO_EXTRAS,
) -> None:
    """Raise for the first argument of a single step that does not fit.

    Raises:
        ValueError: the dtype of x is not that of the weights, or the number of weights does not fit.
        RuntimeError: a size, dtype or device does not fit.
    """
    check_weight_count(weights, 1, 1, has_bias, extras.layer_norm)
    hidden_size, out_size = weights[0].size(0) // 4, weights[1].size(1)
    if x.dim() != 2:
        raise RuntimeError(f"the input of a single step must have 2 dimensions, got {x.dim()}")
    if x.size(1) != weights[0].size(1):
        raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {weights[0].size(1)}")
    for index, (state, size) in enumerate(((h, out_size), (c, hidden_size))):
        if state.size(0) != x.size(0):
            raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden{index} batch size {state.size(0)}")
        if state.dim() == 1:
            raise RuntimeError(f"hidden{index} must have 2 dimensions for 2-D input, got 1")
        if state.size(1) != size:
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {size}")
        if state.dim() != 2:
            raise RuntimeError(f"hidden{index} must have 2 dimensions, got {state.dim()}")
    if x.size(1) == 0:
        raise RuntimeError(f"input must have at least one feature, got shape {list(x.shape)}")
    _check_input_dtype(x, weights[0])
    _check_state_dtypes(x, h, c)
    _check_devices(x, weights, h, c)
    _check_weights(x, weights, x.size(1), hidden_size, out_size, has_bias, extras.layer_norm)
    _check_extras(x, h, c, reset_mask, 1, extras)


def check_weight_count(
    weights: Sequence[Tensor], num_layers: int, directions: int, has_bias: bool, layer_norm: bool = False
) -> None:
    """Raise ValueError unless there are as many weights as the stack needs; its sizes are read off the first two."""
    if len(weights) < 2 or weights[0].dim() != 2 or weights[1].dim() != 2:
        shapes = [list(w.shape) for w in weights[:2]]
        raise ValueError(f"weights must begin with the matrices w_ih and w_hh, got shapes {shapes}")
    hidden_size, out_size = weights[0].size(0) // 4, weights[1].size(1)
    count = 2 + 2 * has_bias + (out_size != hidden_size) + LAYER_NORM_WEIGHTS * layer_norm
    if len(weights) != num_layers * directions * count:
        raise ValueError(
            f"weights must hold num_layers * directions * {count} = {num_layers} * {directions} * {count} = "
            f"{num_layers * directions * count} tensors (bias={has_bias}, hidden size {hidden_size}, "
            f"output size {out_size}{', layer_norm=True' if layer_norm else ''}), got {len(weights)}"
        )


def check_batch_sizes(batch_sizes: Tensor) -> None:
    """Raise RuntimeError unless ``batch_sizes`` is an int64 vector on the CPU."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, "
            f"got a {batch_sizes.dim()}-D {batch_sizes.dtype} tensor on {batch_sizes.device}"
        )


def check_reset_mask(reset_mask: Tensor, shape: torch.Size) -> None:
    """Raise RuntimeError unless ``reset_mask`` is bool and has the given shape."""
    if reset_mask.dtype != torch.bool or reset_mask.shape != shape:
        raise RuntimeError(
            f"reset_mask must be a bool tensor of shape {list(shape)}, the input's without its features, "
            f"got {reset_mask.dtype} {list(reset_mask.shape)}"
        )


def _has_values(tensor: Tensor) -> bool:
    """Whether the values can be read: not of a fake, traced or torch.func tensor."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and not tensor.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _check_batch_size_values(batch_sizes: Tensor, rows: int) -> None:
    if not _has_values(batch_sizes):
        return
    sizes = batch_sizes.tolist()
    if sizes != sorted(sizes, reverse=True) or sizes[-1] < 1 or sum(sizes) != rows:
        raise RuntimeError(f"batch_sizes must be positive, non-increasing and add up to {rows} rows, got {sizes}")


def _check_lengths(lengths: Tensor, steps: int, batch: int) -> None:
    if lengths.dtype != torch.int64 or lengths.shape != (batch,):
        raise RuntimeError(
            f"lengths must be an int64 tensor of shape {[batch]}, got {lengths.dtype} {list(lengths.shape)}"
        )
    if _has_values(lengths) and lengths.device.type == "cpu":
        for index, length in enumerate(lengths.tolist()):
            if not 0 <= length <= steps:
                raise RuntimeError(f"lengths must lie in [0, T] = [0, {steps}], got {length} at {index}")


def _cast_by_autocast(tensor: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and tensor.is_floating_point() and tensor.dtype != torch.float64


def _check_input_dtype(x: Tensor, w_ih: Tensor) -> None:
    if x.dtype != w_ih.dtype and not (_cast_by_autocast(x) and _cast_by_autocast(w_ih)):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.dtype not in _DTYPES:
        raise RuntimeError(f"input must be float32, float64, bfloat16 or float16, got {x.dtype}")


def _check_state_dtypes(x: Tensor, h_0: Tensor, c_0: Tensor) -> None:
    for index, state in enumerate((h_0, c_0)):
        if state.dtype != x.dtype and not (_cast_by_autocast(x) and _cast_by_autocast(state)):
            raise RuntimeError(f"hidden[{index}] must have the dtype of the input, {x.dtype}, got {state.dtype}")


def _check_devices(x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, **others: Tensor | None) -> None:
    named = [("hidden", h_0), ("hidden", c_0), *(("parameter", weight) for weight in weights), *others.items()]
    for name, tensor in named:
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, "
                f"found input tensor at {x.device} and {name} tensor at {tensor.device}"
            )


def _check_weights(
    x: Tensor,
    weights: Sequence[Tensor],
    width: int,
    hidden_size: int,
    out_size: int,
    has_bias: bool,
    layer_norm: bool,
) -> None:
    """The parameters of one direction of one layer, which reads ``width`` features."""
    if not 1 <= out_size <= hidden_size:
        raise RuntimeError(f"w_hh must have at least 1 and at most H = {hidden_size} columns, got {out_size}")
    expected = {"w_ih": (4 * hidden_size, width), "w_hh": (4 * hidden_size, out_size)}
    if has_bias:
        expected |= {"b_ih": (4 * hidden_size,), "b_hh": (4 * hidden_size,)}  # type: ignore[dict-item]
    if out_size != hidden_size:
        expected["w_hr"] = (out_size, hidden_size)
    if layer_norm:
        expected |= {"weight_ln_ih": (4 * hidden_size,), "weight_ln_hh": (4 * hidden_size,)}  # type: ignore[dict-item]
        expected |= {"weight_ln_c": (hidden_size,), "bias_ln_c": (hidden_size,)}  # type: ignore[dict-item]
    for (name, shape), weight in zip(expected.items(), weights, strict=True):
        if weight.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(weight.shape)}")
        if weight.dtype != x.dtype and not (_cast_by_autocast(x) and _cast_by_autocast(weight)):
            raise RuntimeError(f"{name} must have the dtype of the input, {x.dtype}, got {weight.dtype}")

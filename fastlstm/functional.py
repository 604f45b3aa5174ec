"""Stateless LSTM: :func:`lstm` for a stack over a sequence, :func:`lstm_cell` for a single step.

The modules call these two functions, and so may anyone who keeps the weights elsewhere. They bring the
caller's layout (``batch_first``, no batch dimension, no initial state) into the one layout of the operator,
check the arguments with :class:`torch.nn.LSTM`'s messages and draw the dropout masks. A step of streaming
inference costs one call of :func:`lstm`, so the checks compare a few sizes and leave the wording of an error
to the functions at the end of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fastlstm import _ops

State = tuple[Tensor, Tensor]
_Result = TypeVar("_Result")


def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: State | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run a stack of L = ``num_layers`` LSTM layers in D directions over a sequence.

    The equations are those of :func:`fastlstm.reference.lstm_cell`. H is the hidden size, P the size of the
    projection and ``Hout`` is P where there is one, else H; all of them, and I, are read off the weights.

    Args:
        input: ``[T, B, I]``; with ``batch_first`` ``[B, T, I]``; unbatched ``[T, I]``; with ``batch_sizes``
            the packed rows ``[N, I]``. T > 0; B may be 0. fp32, fp64, bf16 or fp16, the dtype of the weights
            (any of them under autocast, which computes in and returns the low precision).
        weights: per layer, then per direction: w_ih ``[4H, I or D * Hout]``, w_hh ``[4H, Hout]``, with
            ``bias`` b_ih and b_hh ``[4H]``, with a projection w_hr ``[P, H]``. Gates in the order i, f, g, o.
            This is the order of ``list(nn.LSTM(...).parameters())``.
        hx: initial states ``(h_0 [L * D, B, Hout], c_0 [L * D, B, H])`` whatever ``batch_first`` says;
            without B for unbatched input. Zeros in the dtype of the input if None.
        num_layers: L.
        bidirectional: True for D = 2.
        bias: whether ``weights`` holds biases.
        batch_first: whether the batch is the first dimension of ``input`` and of the output. Ignored for
            unbatched and for packed input.
        dropout: probability p of zeroing an element of the output of every layer but the last, as the next
            layer sees it; the rest is scaled by 1 / (1 - p). The masks come from torch's default generator.
        training: whether dropout applies.
        batch_sizes: ``batch_sizes`` of a :class:`torch.nn.utils.rnn.PackedSequence`: int64 ``[T]`` on the
            CPU, non-increasing. The states are then in the order of the sorted sequences.

    Returns:
        ``(output, (h_n, c_n))``: the output shaped like the input with D * Hout features, the final states
        shaped like ``hx``.

    Raises:
        ValueError: ``input`` is neither 2-D nor 3-D, or its dtype is not that of the weights, or the number
            of weights does not fit ``num_layers``, ``bidirectional`` and ``bias``, or ``dropout`` is not in
            [0, 1].
        RuntimeError: a size, dtype or device does not fit, or T = 0.
        NotImplementedError: there is no kernel for the device of the input.
    """
    if len(weights) < 2 or weights[0].dim() != 2 or weights[1].dim() != 2:
        _raise_no_matrices(weights)
    w_ih = weights[0]
    directions = 2 if bidirectional else 1
    states = num_layers * directions
    hidden_size = w_ih.size(0) // 4
    out_size = weights[1].size(1)
    if len(weights) != states * (2 + 2 * bias + (out_size != hidden_size)):
        _raise_weight_count(weights, num_layers, directions, bias)

    unbatched = False
    if batch_sizes is not None:
        if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            _raise_batch_sizes(batch_sizes)
        x, steps = input, batch_sizes.size(0)
        batch = int(batch_sizes[0]) if steps else 0
        if x.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {x.dim()}")
    else:
        unbatched = input.dim() == 2
        if unbatched:
            x = input.unsqueeze(1)
        elif input.dim() == 3:
            x = input.transpose(0, 1) if batch_first else input
        else:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        steps, batch, _ = x.shape

    if hx is None:
        c_0 = x.new_zeros(states, batch, hidden_size)
        h_0 = c_0 if out_size == hidden_size else x.new_zeros(states, batch, out_size)
        if x.size(-1) != w_ih.size(1) or x.dtype != w_ih.dtype:
            _check_input(x, w_ih)
    else:
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        h_0, c_0 = hx
        if batch_sizes is None and not h_0.dim() == c_0.dim() == input.dim():
            _raise_state_dim(input, h_0, c_0)
        if unbatched:
            h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
        if x.size(-1) != w_ih.size(1) or not x.dtype == w_ih.dtype == h_0.dtype == c_0.dtype:
            _check_input(x, w_ih)
            _check_state_dtype(x, h_0, c_0)
        if h_0.shape != (states, batch, out_size):
            raise RuntimeError(f"Expected hidden[0] size {(states, batch, out_size)}, got {list(h_0.shape)}")
        if c_0.shape != (states, batch, hidden_size):
            raise RuntimeError(f"Expected hidden[1] size {(states, batch, hidden_size)}, got {list(c_0.shape)}")
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    dropout_mask = None
    if dropout and not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    if dropout and training and num_layers > 1:
        dropout_mask = _draw_dropout_mask(x, dropout, num_layers - 1, directions * out_size)
    y, h_n, c_n = _run(
        _ops.lstm,
        x,
        weights,
        h_0,
        c_0,
        num_layers=num_layers,
        bidirectional=bidirectional,
        has_bias=bias,
        batch_sizes=batch_sizes,
        dropout_mask=dropout_mask,
    )

    if unbatched:
        return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
    return (y.transpose(0, 1) if batch_first and batch_sizes is None else y), (h_n, c_n)


def lstm_cell(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> State:
    """Advance one step of one layer; the equations are those of :func:`fastlstm.reference.lstm_cell`.

    Args:
        input: ``[B, I]`` or unbatched ``[I]``; dtypes as for :func:`lstm`.
        hx: states ``(h [B, Hout], c [B, H])``, unbatched without B. Zeros in the dtype of the input if None.
        weight_ih: ``[4H, I]``, gates in the order i, f, g, o.
        weight_hh: ``[4H, Hout]``.
        bias_ih: ``[4H]``; given together with ``bias_hh`` or not at all.
        bias_hh: ``[4H]``.
        weight_hr: projection ``[P, H]`` with P < H; then ``Hout`` is P, else H. torch.nn.LSTMCell has none.

    Returns:
        The next states ``(h, c)``, shaped like ``hx``.

    Raises:
        ValueError: ``input`` or a state is neither 1-D nor 2-D, or one bias is given without the other.
        RuntimeError: a size, dtype or device does not fit.
        NotImplementedError: there is no kernel for the device of the input.
    """
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    unbatched = input.dim() == 1
    x = input.unsqueeze(0) if unbatched else input
    hidden_size, out_size = weight_ih.size(0) // 4, weight_hh.size(1)
    if hx is None:
        c = x.new_zeros(x.size(0), hidden_size)
        h = c if out_size == hidden_size else x.new_zeros(x.size(0), out_size)
    else:
        if len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        h, c = hx
        if h.dim() not in (1, 2) or c.dim() not in (1, 2):
            _raise_cell_state_dim(h, c)
        if unbatched:
            h, c = h.unsqueeze(0), c.unsqueeze(0)
    if x.size(1) != weight_ih.size(1) or h.shape != (x.size(0), out_size) or c.shape != (x.size(0), hidden_size):
        _raise_cell_size(x, h, c, weight_ih.size(1), out_size, hidden_size)
    if not x.dtype == weight_ih.dtype == h.dtype == c.dtype:
        _check_input(x, weight_ih)
        _check_state_dtype(x, h, c)

    weights = [weight_ih, weight_hh]
    if bias_ih is not None and bias_hh is not None:
        weights += (bias_ih, bias_hh)
    elif bias_ih is not bias_hh:
        raise ValueError("bias_ih and bias_hh must be given together, got only one of them")
    if weight_hr is not None:
        weights.append(weight_hr)
    h, c = _run(_ops.lstm_cell, x, weights, h, c, has_bias=bias_ih is not None)
    return (h.squeeze(0), c.squeeze(0)) if unbatched else (h, c)


def _run(
    kernel: Callable[..., _Result], x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, **options: Any
) -> _Result:
    device = x.device
    for tensor in (h_0, c_0, *weights):
        if tensor.device != device:
            _raise_device(device, weights, tensor)
    try:
        return kernel(x, weights if isinstance(weights, list) else list(weights), h_0, c_0, **options)
    except NotImplementedError as error:
        if device.type in ("cpu", "meta"):
            raise
        raise NotImplementedError(
            f"this build of fastlstm has no LSTM kernel for tensors on {device}; move them to the CPU"
        ) from error


def _draw_dropout_mask(x: Tensor, p: float, layers: int, features: int) -> Tensor:
    """Multipliers ``[layers, *x.shape[:-1], features]``: 1 / (1 - p) with probability 1 - p, else 0."""
    shape = (layers, *x.shape[:-1], features)
    if p == 1:
        return x.new_zeros(shape)
    mask = x.new_empty(shape)
    # One draw per layer, as nn.LSTM makes them: on the CPU the same seed then drops the same elements.
    for layer_mask in mask:
        layer_mask.bernoulli_(1 - p)
    return mask.div_(1 - p)


def _check_input(x: Tensor, w_ih: Tensor) -> None:
    if x.dtype != w_ih.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.size(-1) != w_ih.size(1):
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {w_ih.size(1)}, got {x.size(-1)}")


def _check_state_dtype(x: Tensor, h_0: Tensor, c_0: Tensor) -> None:
    if torch.is_autocast_enabled(x.device.type):
        return
    for index, state in enumerate((h_0, c_0)):
        if state.dtype != x.dtype:
            raise RuntimeError(f"hidden[{index}] must have the dtype of the input, {x.dtype}, got {state.dtype}")


def _raise_no_matrices(weights: Sequence[Tensor]) -> NoReturn:
    shapes = [list(w.shape) for w in weights[:2]]
    raise ValueError(f"weights must begin with the matrices w_ih and w_hh, got shapes {shapes}")


def _raise_weight_count(weights: Sequence[Tensor], num_layers: int, directions: int, bias: bool) -> NoReturn:
    hidden_size, out_size = weights[0].size(0) // 4, weights[1].size(1)
    count = 2 + 2 * bias + (out_size != hidden_size)
    raise ValueError(
        f"weights must hold num_layers * directions * {count} = {num_layers} * {directions} * {count} = "
        f"{num_layers * directions * count} tensors (bias={bias}, hidden size {hidden_size}, "
        f"output size {out_size}), got {len(weights)}"
    )


def _raise_batch_sizes(batch_sizes: Tensor) -> NoReturn:
    raise RuntimeError(
        "batch_sizes must be a 1-D int64 tensor on the CPU, "
        f"got a {batch_sizes.dim()}-D {batch_sizes.dtype} tensor on {batch_sizes.device}"
    )


def _raise_state_dim(input: Tensor, h_0: Tensor, c_0: Tensor) -> NoReturn:
    kind = "unbatched" if input.dim() == 2 else "batched"
    raise RuntimeError(
        f"For {kind} {input.dim()}-D input, hx and cx should also be {input.dim()}-D "
        f"but got ({h_0.dim()}-D, {c_0.dim()}-D) tensors"
    )


def _raise_cell_state_dim(h: Tensor, c: Tensor) -> NoReturn:
    index, state = (0, h) if h.dim() not in (1, 2) else (1, c)
    raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")


def _raise_cell_size(x: Tensor, h: Tensor, c: Tensor, input_size: int, out_size: int, hidden_size: int) -> NoReturn:
    if x.size(1) != input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {input_size}")
    index, state, expected = (0, h, out_size) if h.shape != (x.size(0), out_size) else (1, c, hidden_size)
    if state.size(0) != x.size(0):
        raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden{index} batch size {state.size(0)}")
    raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {expected}")


def _raise_device(device: torch.device, weights: Sequence[Tensor], tensor: Tensor) -> NoReturn:
    name = "parameter" if any(tensor is w for w in weights) else "hidden"
    raise RuntimeError(
        f"Input and {name} tensors are not at the same device, "
        f"found input tensor at {device} and {name} tensor at {tensor.device}"
    )

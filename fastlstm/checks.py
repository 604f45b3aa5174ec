"""The arguments of the operator, checked in Python: nn.LSTM's messages, word for word where it has one.

The compiled kernels check everything themselves, in the operator's terms. These checks are run where no kernel
does (fakes: ``torch.compile``, the meta device), and by ``functional.py`` after a kernel has refused a call, to
say what is wrong as nn.LSTM says it. A call that is right never pays for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_lstm(
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    *,
    batch: int,
) -> None:
    """Raise for the first argument of the operator that does not fit; shapes as in :func:`reference.lstm`.

    ``batch`` is B, which a packed sequence has in the values of ``batch_sizes`` only.

    Raises:
        ValueError: the dtype of x is not that of the weights, or the number of weights does not fit.
        RuntimeError: a size, dtype or device does not fit, or T = 0.
    """
    directions = 2 if bidirectional else 1
    check_weights(weights, num_layers, directions, has_bias)
    w_ih, w_hh = weights[:2]
    rank = 3 if batch_sizes is None else 2
    if x.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {x.dim()}")
    _check_input_dtype(x, w_ih)
    if x.size(-1) != w_ih.size(1):
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {w_ih.size(1)}, got {x.size(-1)}")
    _check_state_dtypes(x, h_0, c_0)
    for index, (state, size) in enumerate(((h_0, w_hh.size(1)), (c_0, w_ih.size(0) // 4))):
        expected = (num_layers * directions, batch, size)
        if state.shape != expected:
            raise RuntimeError(f"Expected hidden[{index}] size {expected}, got {list(state.shape)}")
    if (x if batch_sizes is None else batch_sizes).size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        if batch_sizes is not None:
            raise RuntimeError("lengths cannot be given with a packed sequence, whose batch_sizes hold them")
        if lengths.dtype != torch.int64 or lengths.shape != (batch,):
            raise RuntimeError(
                f"lengths must be an int64 tensor of shape {[batch]}, got {lengths.dtype} {list(lengths.shape)}"
            )
    if reset_mask is not None and (reset_mask.dtype != torch.bool or reset_mask.shape != x.shape[:-1]):
        raise RuntimeError(
            f"reset_mask must be a bool tensor of shape {list(x.shape[:-1])}, the steps and rows of the input, "
            f"got {reset_mask.dtype} {list(reset_mask.shape)}"
        )
    _check_devices(x, weights, h_0, c_0)


def check_lstm_cell(x: Tensor, weights: Sequence[Tensor], h: Tensor, c: Tensor, has_bias: bool) -> None:
    """Raise for the first argument of a single step that does not fit; shapes as in :func:`reference.lstm_cell`.

    Raises:
        ValueError: the dtype of x is not that of the weights, or the number of weights does not fit.
        RuntimeError: a size, dtype or device does not fit.
    """
    check_weights(weights, 1, 1, has_bias)
    w_ih, w_hh = weights[:2]
    if x.size(1) != w_ih.size(1):
        raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {w_ih.size(1)}")
    for index, (state, size) in enumerate(((h, w_hh.size(1)), (c, w_ih.size(0) // 4))):
        if state.size(0) != x.size(0):
            raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden{index} batch size {state.size(0)}")
        if state.size(-1) != size or state.dim() != 2:
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.size(-1)}, expected {size}")
    _check_input_dtype(x, w_ih)
    _check_state_dtypes(x, h, c)
    _check_devices(x, weights, h, c)


def check_weights(weights: Sequence[Tensor], num_layers: int, directions: int, has_bias: bool) -> None:
    """Raise ValueError unless there are as many weights as the stack needs; sizes are read off the first two."""
    if len(weights) < 2 or weights[0].dim() != 2 or weights[1].dim() != 2:
        shapes = [list(w.shape) for w in weights[:2]]
        raise ValueError(f"weights must begin with the matrices w_ih and w_hh, got shapes {shapes}")
    hidden_size, out_size = weights[0].size(0) // 4, weights[1].size(1)
    count = 2 + 2 * has_bias + (out_size != hidden_size)
    if len(weights) != num_layers * directions * count:
        raise ValueError(
            f"weights must hold num_layers * directions * {count} = {num_layers} * {directions} * {count} = "
            f"{num_layers * directions * count} tensors (bias={has_bias}, hidden size {hidden_size}, "
            f"output size {out_size}), got {len(weights)}"
        )


def check_batch_sizes(batch_sizes: Tensor) -> None:
    """Raise RuntimeError unless ``batch_sizes`` is an int64 vector on the CPU; its values are the kernel's affair."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, "
            f"got a {batch_sizes.dim()}-D {batch_sizes.dtype} tensor on {batch_sizes.device}"
        )


def _check_input_dtype(x: Tensor, w_ih: Tensor) -> None:
    if x.dtype != w_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({x.dtype})"
        )


def _check_state_dtypes(x: Tensor, h_0: Tensor, c_0: Tensor) -> None:
    if torch._C._is_any_autocast_enabled():
        return
    for index, state in enumerate((h_0, c_0)):
        if state.dtype != x.dtype:
            raise RuntimeError(f"hidden[{index}] must have the dtype of the input, {x.dtype}, got {state.dtype}")


def _check_devices(x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor) -> None:
    for name, tensors in (("hidden", (h_0, c_0)), ("parameter", weights)):
        for tensor in tensors:
            if tensor.device != x.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, "
                    f"found input tensor at {x.device} and {name} tensor at {tensor.device}"
                )

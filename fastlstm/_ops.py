"""The registered operators: fakes, autograd and autocast around the compiled kernels.

The only user of ``torch.ops.fastlstm``. ``functional.py`` calls :func:`lstm` with checked arguments in the
operator's layout; the schemas stand in ``csrc/ops.cpp``. One call is a whole stack, so that a kernel may overlap
directions and layers and ``torch.compile`` sees one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlstm import _C as _C  # importing it registers the operators
from fastlstm import reference

_lstm = torch.ops.fastlstm.lstm.default
_lstm_backward = torch.ops.fastlstm.lstm_backward.default


def lstm(
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    *,
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    batch_sizes: Tensor | None = None,
    dropout_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a stack; shapes as in :func:`fastlstm.reference.lstm`.

    What backward needs is saved if and only if a gradient can be asked for, whatever mode a module is in.
    """
    save = torch.is_grad_enabled() and (
        x.requires_grad or h_0.requires_grad or c_0.requires_grad or any(w.requires_grad for w in weights)
    )
    y, h_n, c_n, *_ = _lstm(x, weights, h_0, c_0, batch_sizes, dropout_mask, num_layers, bidirectional, has_bias, save)
    return y, h_n, c_n


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _lstm_fake(
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    batch_sizes: Tensor | None,
    dropout_mask: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    directions = 2 if bidirectional else 1
    states, batch, out = h_0.shape
    hidden = c_0.size(-1)
    rows = x.size(0) if batch_sizes is not None else x.size(0) * batch
    y = x.new_empty(*x.shape[:-1], directions * out)
    h_n, c_n = x.new_empty(states, batch, out), x.new_empty(states, batch, hidden)
    saved_shapes: tuple[tuple[int, ...], ...] = ((0,), (0,), (0,))
    if save:
        saved_shapes = (
            (states, rows, 4 * hidden),
            (states, rows, hidden),
            (num_layers - 1, rows, directions * out),
        )
    return y, h_n, c_n, *(x.new_empty(shape, dtype=_compute_dtype(x.dtype)) for shape in saved_shapes)


def _lstm_backward_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    layer_outputs: Tensor,
    batch_sizes: Tensor | None,
    dropout_mask: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    needs: list[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    def gradient(tensor: Tensor, needed: int) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    d_weights = [gradient(w, needed) for w, needed in zip(weights, needs[2:], strict=True)]
    return gradient(x, needs[0]), gradient(h_0, needs[1]), gradient(c_0, needs[1]), d_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, h_0, c_0, batch_sizes, dropout_mask, *flags, save = inputs
    y, _h_n, _c_n, gates, cells, layer_outputs = output
    ctx.save = save
    ctx.flags = flags
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates, cells, layer_outputs)
    ctx.save_for_backward(x, h_0, c_0, y, gates, cells, layer_outputs, batch_sizes, dropout_mask, *weights)


def _backward(ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, *_: None) -> tuple[Any, ...]:
    if not ctx.save:
        raise RuntimeError("fastlstm::lstm ran with save=False and kept nothing for backward; pass save=True")
    x, h_0, c_0, y, gates, cells, layer_outputs, batch_sizes, dropout_mask, *weights = ctx.saved_tensors
    needs_x, needs_weights, needs_h_0, needs_c_0 = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # create_graph=True: a backward that can itself be differentiated
        d_x, d_h_0, d_c_0, d_weights = _differentiable_backward(
            (d_y, d_h_n, d_c_n), x, weights, h_0, c_0, batch_sizes, dropout_mask, *ctx.flags
        )
    else:
        needs = [int(needs_x), int(needs_h_0 or needs_c_0), *map(int, needs_weights)]
        d_x, d_h_0, d_c_0, d_weights = _lstm_backward(
            d_y, d_h_n, d_c_n, x, weights, h_0, c_0, y, gates, cells, layer_outputs, batch_sizes, dropout_mask,
            *ctx.flags, needs,
        )  # fmt: skip
    return (
        d_x if needs_x else None,
        [d_w if needed else None for d_w, needed in zip(d_weights, needs_weights, strict=True)],
        d_h_0 if needs_h_0 else None,
        d_c_0 if needs_c_0 else None,
        *[None] * 6,
    )


def _differentiable_backward(
    d_outputs: tuple[Tensor | None, ...],
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    batch_sizes: Tensor | None,
    dropout_mask: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
) -> tuple[Any, ...]:
    """The gradients as a function that autograd can differentiate again: the reference, run anew."""
    inputs = [x, h_0, c_0, *weights]
    # Aliases, so that the inner gradient stops at this operator's inputs instead of walking on into their history.
    inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
    outputs = reference.lstm(
        inputs[0],
        inputs[3:],
        inputs[1],
        inputs[2],
        num_layers=num_layers,
        bidirectional=bidirectional,
        has_bias=has_bias,
        batch_sizes=batch_sizes,
        dropout_mask=dropout_mask,
    )
    given = [(out, d) for out, d in zip(outputs, d_outputs, strict=True) if d is not None]
    d_x, d_h_0, d_c_0, *d_weights = torch.autograd.grad(
        [out for out, _ in given],
        inputs,
        [d for _, d in given],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return d_x, d_h_0, d_c_0, d_weights


def _autocast_kernel(device_type: str, exclude: torch._C.DispatchKeySet) -> Callable[..., Any]:
    """Under autocast the operator computes in, and returns, the low precision, as nn.LSTM does."""

    def kernel(
        x: Tensor,
        weights: list[Tensor],
        h_0: Tensor,
        c_0: Tensor,
        batch_sizes: Tensor | None,
        dropout_mask: Tensor | None,
        *flags: Any,
    ) -> Any:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

        with torch._C._ExcludeDispatchKeyGuard(exclude):
            mask = None if dropout_mask is None else cast(dropout_mask)
            return _lstm(cast(x), [cast(w) for w in weights], cast(h_0), cast(c_0), batch_sizes, mask, *flags)

    return kernel


def _register() -> torch.library.Library:
    torch.library.register_fake("fastlstm::lstm", _lstm_fake)
    torch.library.register_fake("fastlstm::lstm_backward", _lstm_backward_fake)
    torch.library.register_autograd("fastlstm::lstm", _backward, setup_context=_setup_context)
    library = torch.library.Library("fastlstm", "IMPL")  # type: ignore[no-untyped-call]
    for device_type in ("cpu", "cuda"):
        key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        library.impl("lstm", _autocast_kernel(device_type, exclude), key)  # type: ignore[no-untyped-call]
    return library


_library = _register()  # registrations live as long as this object

"""The registered operators: fakes, autograd and autocast around the compiled kernels.

The only user of ``torch.ops.fastlstm``. ``functional.py`` calls :func:`lstm` with arguments in the operator's
layout; the schemas stand in ``csrc/ops.cpp``. One call is a whole stack, so that a kernel may overlap
directions and layers and ``torch.compile`` sees one node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm import _C as _C  # importing it registers the operators
from fastlstm import checks, reference

_lstm = torch.ops.fastlstm.lstm.default
_lstm_backward = torch.ops.fastlstm.lstm_backward.default


class Options(NamedTuple):
    """What the operator takes beside x, weights, h_0 and c_0, in the order of its schema (``csrc/ops.cpp``)."""

    batch_sizes: Tensor | None
    lengths: Tensor | None
    reset_mask: Tensor | None
    dropout_mask: Tensor | None
    num_layers: int
    bidirectional: bool
    has_bias: bool
    allow_bf16: bool

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The options that backward saves as tensors."""
        return self[:4]

    def others(self) -> tuple[Any, ...]:
        """The rest."""
        return self[4:]


def lstm(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a stack; shapes as in :func:`fastlstm.reference.lstm`, or of a single step as in ``csrc/ops.cpp``.

    What backward needs is saved if and only if a gradient can be asked for, whatever mode a module is in.

    Raises:
        RuntimeError: an argument does not fit; in the operator's words, or where no kernel runs those of
            :mod:`fastlstm.checks`, with its ValueErrors.
    """
    # A plain tuple: making an Options would be felt in a step of streaming inference.
    allow_bf16 = bf16_products_permitted()
    options = (batch_sizes, lengths, reset_mask, dropout_mask, num_layers, bidirectional, has_bias, allow_bf16)
    save = torch.is_grad_enabled() and (
        x.requires_grad or h_0.requires_grad or c_0.requires_grad or any(w.requires_grad for w in weights)
    )
    if torch.compiler.is_compiling():
        y, h_n, c_n, _ = _lstm(x, weights, h_0, c_0, *options, save)
    elif torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _check(x, weights, h_0, c_0, Options(*options))
        y, h_n, c_n = _reference(x, weights, h_0, c_0, Options(*options))
    elif torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None:
        y, h_n, c_n, _ = _lstm(x, weights, h_0, c_0, *options, save)
    elif save:
        # The Python around an operator's registered autograd doubles the forward time of a small cell in training.
        y, h_n, c_n = _LSTMFunction.apply(Options(*options), x, h_0, c_0, *weights)  # type: ignore[no-untyped-call]
    elif torch.is_inference_mode_enabled():
        y, h_n, c_n, _ = _lstm(x, weights, h_0, c_0, *options, False)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y, h_n, c_n, _ = _lstm(x, weights, h_0, c_0, *options, False)
    return y, h_n, c_n


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def bf16_products_permitted() -> bool:
    """Whether the user lets products of float32 tensors be taken of bfloat16 values, by torch's switch for RNNs.

    That is ``torch.backends.mkldnn.rnn.fp32_precision = "bf16"``, or the switches above it that it inherits from.
    Compiled code keeps what it was compiled under.
    """
    permitted: bool = torch._C._get_fp32_precision_getter("mkldnn", "rnn") == "bf16"
    return permitted


def _reference(
    x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator as differentiable PyTorch: what derivatives without a formula of their own are taken of."""
    single_step = options.batch_sizes is None and h_0.dim() == 2
    reset_mask = options.reset_mask
    if single_step:
        x, h_0, c_0 = x.unsqueeze(0), h_0.unsqueeze(0), c_0.unsqueeze(0)
        reset_mask = reset_mask if reset_mask is None else reset_mask.unsqueeze(0)
    y, h_n, c_n = reference.lstm(
        x,
        weights,
        h_0,
        c_0,
        num_layers=options.num_layers,
        bidirectional=options.bidirectional,
        has_bias=options.has_bias,
        batch_sizes=options.batch_sizes,
        lengths=options.lengths,
        reset_mask=reset_mask,
        dropout_mask=options.dropout_mask,
    )
    return (y.squeeze(0), h_n.squeeze(0), c_n.squeeze(0)) if single_step else (y, h_n, c_n)


def _check(x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, options: Options) -> None:
    """What a kernel checks, where none runs; of values, those that can be read."""
    if options.batch_sizes is None and h_0.dim() == 2:
        checks.check_lstm_cell(x, weights, h_0, c_0, options.has_bias)
    else:
        checks.check_lstm(x, weights, h_0, c_0, *options[:-1])


def _lstm_fake(
    x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *options_, save = arguments
    options = Options(*options_)
    _check(x, weights, h_0, c_0, options)
    directions = 2 if options.bidirectional else 1
    width, hidden = directions * h_0.size(-1), c_0.size(-1)
    layers, states, rows = options.num_layers, options.num_layers * directions, math.prod(x.shape[:-1])
    saved_shapes = [(states, rows, 4 * hidden), (states, rows, hidden), (layers - 1, rows, width)] if save else []
    dtype = torch.promote_types(x.dtype, torch.float32)
    saved = [x.new_empty(shape, dtype=dtype) for shape in saved_shapes]
    return x.new_empty(*x.shape[:-1], width), x.new_empty(h_0.shape), x.new_empty(c_0.shape), saved


def _lstm_backward_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    needs = arguments[-1]

    def gradient(tensor: Tensor, needed: int) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    d_weights = [gradient(w, needed) for w, needed in zip(weights, needs[2:], strict=True)]
    return gradient(x, needs[0]), gradient(h_0, needs[1]), gradient(c_0, needs[1]), d_weights


class _LSTMFunction(torch.autograd.Function):
    """The operator and its gradient, as a function of (options, x, h_0, c_0, *weights)."""

    @staticmethod
    def forward(ctx: Any, options: Options, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, h_0, c_0, *weights = inputs
        with torch._C._AutoDispatchBelowAutograd():
            y, h_n, c_n, saved = _lstm(x, weights, h_0, c_0, *options, True)
        _save(ctx, options, y, saved, inputs)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, d_outputs, ctx.needs_input_grad[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weights, h_0, c_0, *options, save = inputs
    y, _h_n, _c_n, saved = output
    ctx.save = save
    ctx.mark_non_differentiable(*saved)
    _save(ctx, Options(*options), y, saved, (x, h_0, c_0, *weights))


def _backward(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
    if not ctx.save:
        raise RuntimeError("fastlstm::lstm ran with save=False and kept nothing for backward; pass save=True")
    needs_x, needs_weights, *needs_states = ctx.needs_input_grad[:4]
    d_x, d_h_0, d_c_0, *d_weights = _gradients(ctx, d_outputs[:3], [needs_x, *needs_states, *needs_weights])
    return d_x, d_weights, d_h_0, d_c_0, *[None] * len(Options._fields), None


def _save(ctx: Any, options: Options, y: Tensor, saved: list[Tensor], inputs: tuple[Tensor, ...]) -> None:
    ctx.others = options.others()
    ctx.counts = len(saved), len(options.tensors())
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, *saved, *options.tensors(), *inputs)


def _gradients(ctx: Any, d_outputs: tuple[Tensor | None, ...], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of x, h_0, c_0 and the weights; None for those that are not needed."""
    if all(d is None for d in d_outputs):
        return [None] * len(needs)
    y, *tensors = ctx.saved_tensors
    saved_count, option_count = ctx.counts
    saved, tensors = tensors[:saved_count], tensors[saved_count:]
    options, inputs = Options(*tensors[:option_count], *ctx.others), tensors[option_count:]
    gradients: list[Tensor]
    if torch.is_grad_enabled():  # create_graph=True: a backward that can itself be differentiated
        gradients = _differentiable_backward(d_outputs, inputs, options)
    else:
        x, h_0, c_0, *weights = inputs
        flags = [int(needs[0]), int(needs[1] or needs[2]), *map(int, needs[3:])]
        with torch._C._AutoDispatchBelowAutograd():
            d_x, d_h_0, d_c_0, d_weights = _lstm_backward(*d_outputs, x, weights, h_0, c_0, y, saved, *options, flags)
        gradients = [d_x, d_h_0, d_c_0, *d_weights]
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def _differentiable_backward(
    d_outputs: tuple[Tensor | None, ...], inputs: Sequence[Tensor], options: Options
) -> list[Tensor]:
    """The gradients as a function that autograd can differentiate again: the reference, run anew."""
    # Aliases, so that the inner gradient stops at this operator's inputs instead of walking on into their history.
    x, h_0, c_0, *weights = inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
    outputs = _reference(x, weights, h_0, c_0, options)
    given = [(out, d) for out, d in zip(outputs, d_outputs, strict=True) if d is not None]
    return list(
        torch.autograd.grad(
            [out for out, _ in given],
            inputs,
            [d for _, d in given],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _autocast_kernel(device_type: str, exclude: torch._C.DispatchKeySet) -> Callable[..., Any]:
    """Under autocast the operator computes in, and returns, the low precision, as nn.LSTM does."""

    def kernel(x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, *arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        *options_, save = arguments
        options = Options(*options_)

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

        if options.dropout_mask is not None:
            options = options._replace(dropout_mask=cast(options.dropout_mask))
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return _lstm(cast(x), [cast(w) for w in weights], cast(h_0), cast(c_0), *options, save)

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

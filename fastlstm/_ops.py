"""The operators as the package calls them: fakes, autocast and second derivatives around the compiled kernels.

``functional.py`` calls :func:`lstm` with arguments in the operator's layout. One call is a whole stack, so that a
kernel may overlap directions and layers and ``torch.compile`` sees one node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm import _operators, checks, transforms
from fastlstm._operators import NO_EXTRAS, Extras, Options, reference_of_options

_fp32_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter


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
    extras: Extras = NO_EXTRAS,
) -> tuple[Tensor, ...]:
    """Run a stack; shapes as in :func:`fastlstm.reference.lstm`, or of a single step as in ``csrc/ops.cpp``.

    What backward needs is saved if and only if a gradient can be asked for, whatever mode a module is in.

    Returns:
        ``(y, h_n, c_n)``, and with ``extras.cell_layers`` the cell states of so many layers.

    Raises:
        RuntimeError: an argument does not fit; in the operator's words, or where no kernel runs those of
            :mod:`fastlstm.checks`, with its ValueErrors.
    """
    # A plain tuple: making an Options would be felt in a step of streaming inference.
    reduced = reduced_products_permitted("cpu" if x.is_cpu else x.device.type)  # x.device takes a tenth of a step
    options = (batch_sizes, lengths, reset_mask, dropout_mask, num_layers, bidirectional, has_bias, reduced)
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return _transformed(x, weights, h_0, c_0, Options(*options)._replace(extras=extras))
        others: Any = (*options, *extras)
        outputs = _operators._C.lstm(x, list(weights), h_0, c_0, *others)
        if outputs is not None:
            return outputs
    elif torch._C._are_functorch_transforms_active():
        transformed: tuple[Tensor, ...] = _transformed_in_graph(x, list(weights), h_0, c_0, *options, *extras)
        return transformed
    variables = [x, h_0, c_0, *weights, *(t for t in (extras.reset_h, extras.reset_c) if t is not None)]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in variables)
    y, h_n, c_n, _, cell_states = _operators.lstm(x, weights, h_0, c_0, *options, save, *extras)
    return y, h_n, c_n, *cell_states


# Dynamo does not trace what an autograd.Function does under transforms.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _transformed_in_graph(
    x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    count = len(Options._fields) - 1
    options = Options(*arguments[:count])._replace(extras=Extras(*arguments[count:]))
    return _transformed(x, weights, h_0, c_0, options)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def reduced_products_permitted(device_type: str) -> bool:
    """Whether products of float32 tensors may be taken of rounded values, by torch's switch for RNNs.

    On the CPU that is ``torch.backends.mkldnn.rnn.fp32_precision = "bf16"``, on CUDA
    ``torch.backends.cudnn.rnn.fp32_precision = "tf32"``, torch's default there, which
    ``torch.backends.cudnn.allow_tf32`` sets too; or the switches above them that they inherit from. Compiled code keeps
    what it was compiled under.
    """
    if device_type == "cpu":
        return _fp32_precision("mkldnn", "rnn") == "bf16"
    return device_type == "cuda" and _fp32_precision("cuda", "rnn") == "tf32"


def _transformed(
    x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, options: Options
) -> tuple[Tensor, ...]:
    """The operator under transforms of torch.func and in forward mode."""
    _check(x, weights, h_0, c_0, options)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights, h_0, c_0, options = _cast(dtype, x, weights, h_0, c_0, options)
    with torch.autocast(x.device.type, enabled=False):
        if options.batch_sizes is None and transforms.applicable():
            return transforms.lstm(x, weights, h_0, c_0, options)
        return reference_of_options(x, weights, h_0, c_0, options)


def _check(x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, options: Options) -> None:
    """What a kernel checks, where none runs; of values, those that can be read."""
    if options.batch_sizes is None and h_0.dim() == 2:
        checks.check_lstm_cell(x, weights, h_0, c_0, options.has_bias, options.reset_mask, options.extras)
    else:
        checks.check_lstm(x, weights, h_0, c_0, *options[:-2], options.extras)


def _lstm_fake(
    x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    options, save = _parse(arguments)
    _check(x, weights, h_0, c_0, options)
    directions = 2 if options.bidirectional else 1
    width, hidden = directions * h_0.size(-1), c_0.size(-1)
    layers, states, rows = options.num_layers, options.num_layers * directions, math.prod(x.shape[:-1])
    saved = []
    if save:
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        dtype = x.dtype if x.device.type == "cuda" else compute_dtype
        kept_rows = 0 if options.extras.recompute else rows
        saved = [
            x.new_empty((states, kept_rows, 4 * hidden), dtype=dtype),
            x.new_empty((states, rows, hidden), dtype=compute_dtype),
            x.new_empty((layers - 1, rows, width), dtype=dtype),
        ]
        if options.extras.layer_norm:
            saved.append(x.new_empty((states, kept_rows, 4 * hidden), dtype=dtype))
            saved.append(x.new_empty((2 * states, kept_rows, 1), dtype=compute_dtype))
    returned = options.extras.cell_layers * directions
    cell_states = [x.new_empty(returned, *x.shape[:-1], hidden)] if returned else []
    return x.new_empty(*x.shape[:-1], width), x.new_empty(h_0.shape), x.new_empty(c_0.shape), saved, cell_states


def _parse(arguments: Sequence[Any]) -> tuple[Options, bool]:
    """The arguments of ``fastlstm::lstm`` behind c_0; defaults may be missing."""
    count = len(Options._fields) - 1
    return Options(*arguments[:count])._replace(extras=Extras(*arguments[count + 1 :])), arguments[count]


def _lstm_backward_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    y: Tensor,
    saved: list[Tensor],
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    options, needs, _, groups = _parse_backward(arguments)

    def gradient(tensor: Tensor, needed: int, *group: int) -> Tensor:
        return tensor.new_empty((*group, *tensor.shape) if needed else (0,))

    group = (groups,) if groups > 1 else ()
    d_weights = [gradient(w, needed, *group) for w, needed in zip(weights, needs[2:], strict=False)]
    d_resets = [gradient(t, needs[-1]) for t in (options.extras.reset_h, options.extras.reset_c) if t is not None]
    return gradient(x, needs[0]), gradient(h_0, needs[1]), gradient(c_0, needs[1]), d_weights, d_resets


# The arguments of ``fastlstm::lstm_backward`` behind ``needs``, where they are not given.
_BACKWARD_DEFAULTS: tuple[Any, ...] = (None, *NO_EXTRAS[:-3], 1, False)


def _parse_backward(arguments: Sequence[Any]) -> tuple[Options, list[int], Tensor | None, int]:
    """The arguments of ``fastlstm::lstm_backward`` behind ``saved``: options, needs, d_cell_states and groups."""
    count = len(Options._fields) - 1
    given = arguments[count + 1 :]
    d_cell_states, *extras, groups, layer_norm = (*given, *_BACKWARD_DEFAULTS[len(given) :])
    options = Options(*arguments[:count])._replace(extras=Extras(*extras)._replace(layer_norm=layer_norm))
    return options, arguments[count], d_cell_states, groups


def _lstm_backward_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The gradients as functions that can be differentiated again, which create_graph=True asks for."""
    d_y, d_h_n, d_c_n, x, weights, h_0, c_0, y, saved, *others = arguments
    options, needs, d_cell_states, groups = _parse_backward(others)
    d_outputs = (d_y, d_h_n, d_c_n, d_cell_states)
    resets = (options.extras.reset_h, options.extras.reset_c)
    if not (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (*d_outputs, x, h_0, c_0, *weights, *resets))
    ):
        with torch._C._AutoDispatchBelowAutograd():
            result: tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]] = _operators.lstm_backward(*arguments)
            return result
    return transforms.lstm_backward(d_outputs, x, weights, h_0, c_0, y, saved, options, needs, groups)


def _cast(
    dtype: torch.dtype, x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, options: Options
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Options]:
    """Everything in the low precision of autocast that autocast would cast."""

    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    extras = Extras(*map(cast, options.extras))
    options = Options(*map(cast, options[:-1]))._replace(extras=extras)
    return cast(x), [cast(w) for w in weights], cast(h_0), cast(c_0), options


def _autocast_kernel(device_type: str, exclude: torch._C.DispatchKeySet) -> Callable[..., Any]:
    """Under autocast the operator computes in, and returns, the low precision, as nn.LSTM does."""

    def kernel(x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, *arguments: Any) -> Any:
        options, save = _parse(arguments)
        x, weights, h_0, c_0, options = _cast(torch.get_autocast_dtype(device_type), x, weights, h_0, c_0, options)
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return _operators.lstm(x, weights, h_0, c_0, *options.of_forward(save))

    return kernel


def _register() -> torch.library.Library:
    torch.library.register_fake("fastlstm::lstm", _lstm_fake)
    torch.library.register_fake("fastlstm::lstm_backward", _lstm_backward_fake)
    library = torch.library.Library("fastlstm", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("lstm_backward", _lstm_backward_autograd, "Autograd")  # type: ignore[no-untyped-call]
    for operator in (_operators.lstm, _operators.lstm_backward):
        torch.library.register_vmap(operator, transforms.one_call_per_sample(operator), lib=library)
    for device_type in ("cpu", "cuda"):
        key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        library.impl("lstm", _autocast_kernel(device_type, exclude), key)  # type: ignore[no-untyped-call]
    return library


_library = _register()  # registrations live as long as this object

"""The registered operators: fakes, autocast and second derivatives around the compiled kernels.

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

from fastlstm import checks, reference

_REBUILD = "build it again with: pip install --no-build-isolation --no-deps --force-reinstall <fastlstm's directory>"

try:
    from fastlstm import _C as _C  # importing it registers the operators
except ImportError as error:
    message = f"fastlstm's extension module does not load into torch {torch.__version__} ({error}); {_REBUILD}"
    raise ImportError(message) from error
# It uses torch's C++ interface, which changes with every minor version.
if _C.torch_built.split(".")[:2] != torch.__version__.split(".")[:2]:
    raise ImportError(
        f"fastlstm was built against torch {_C.torch_built} and cannot run with torch {torch.__version__}; {_REBUILD}"
    )

_lstm = torch.ops.fastlstm.lstm.default
_lstm_backward = torch.ops.fastlstm.lstm_backward.default
_fp32_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter


class Options(NamedTuple):
    """What the operator takes beside x, weights, h_0 and c_0, in the order of its schema (``csrc/ops.cpp``)."""

    batch_sizes: Tensor | None
    lengths: Tensor | None
    reset_mask: Tensor | None
    dropout_mask: Tensor | None
    num_layers: int
    bidirectional: bool
    has_bias: bool
    reduced_products: bool


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
    reduced = reduced_products_permitted("cpu" if x.is_cpu else x.device.type)  # x.device takes a tenth of a step
    options = (batch_sizes, lengths, reset_mask, dropout_mask, num_layers, bidirectional, has_bias, reduced)
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            _check(x, weights, h_0, c_0, Options(*options))
            return _reference(x, weights, h_0, c_0, Options(*options))
        outputs = _C.lstm(x, list(weights), h_0, c_0, *options)
        if outputs is not None:
            return outputs
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h_0, c_0, *weights))
    y, h_n, c_n, _ = _lstm(x, weights, h_0, c_0, *options, save)
    return y, h_n, c_n


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
    saved = []
    if save:
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        dtype = x.dtype if x.device.type == "cuda" else compute_dtype
        saved = [
            x.new_empty((states, rows, 4 * hidden), dtype=dtype),
            x.new_empty((states, rows, hidden), dtype=compute_dtype),
            x.new_empty((layers - 1, rows, width), dtype=dtype),
        ]
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


def _lstm_backward_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients as functions that can be differentiated again, which create_graph=True asks for."""
    d_y, d_h_n, d_c_n, x, weights, h_0, c_0, _y, _saved, *options, needs = arguments
    d_outputs, inputs = (d_y, d_h_n, d_c_n), (x, h_0, c_0, *weights)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*d_outputs, *inputs))):
        with torch._C._AutoDispatchBelowAutograd():
            result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = _lstm_backward(*arguments)
            return result
    gradients = _differentiable_backward(d_outputs, inputs, Options(*options))
    needed = [needs[0], needs[1], needs[1], *needs[2:]]
    d_x, d_h_0, d_c_0, *d_weights = (d if n else d.new_empty(0) for d, n in zip(gradients, needed, strict=True))
    return d_x, d_h_0, d_c_0, d_weights


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
    library = torch.library.Library("fastlstm", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("lstm_backward", _lstm_backward_autograd, "Autograd")  # type: ignore[no-untyped-call]
    for device_type in ("cpu", "cuda"):
        key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        library.impl("lstm", _autocast_kernel(device_type, exclude), key)  # type: ignore[no-untyped-call]
    return library


_library = _register()  # registrations live as long as this object

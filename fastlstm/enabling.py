"""enable and disable: run the nn.LSTMs and nn.LSTMCells of any model on the kernels of this package, as they are.

While enabled, nothing about a module changes. Its forward pass ends in ``torch._VF.lstm`` or ``torch._VF.lstm_cell``,
and these two functions are replaced. So all that comes before them stays torch's own: checks and their errors, packed
sequences, parametrizations, subclasses that call ``super().forward``, wrapped forwards, scripting. A replacement looks
at the arguments, and either the kernels run them or torch's function does.

What comes before them takes longer than a step of streaming inference, though. So ``nn.LSTM._call_impl``, which runs
the hooks of a module and its forward pass, is replaced too: where nothing but that forward pass would happen, the
kernels are called at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import threading
from collections.abc import Callable, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.modules import rnn as torch_rnn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastlstm import _C, functional

_Function = TypeVar("_Function", bound=Callable[..., Any])

_torch_lstm = torch._C._VariableFunctions.lstm  # what torch._VF looks up
_torch_lstm_cell = torch._C._VariableFunctions.lstm_cell

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_CLASSES = frozenset({Tensor, nn.Parameter})  # other subclasses have a say in what is done with them


def enable() -> Enabling:
    """Run every nn.LSTM and nn.LSTMCell of this process on the kernels of this package, without touching a model.

    Effective at once and until :func:`disable`; or for a ``with`` block; or, as a decorator, for each call of a
    function::

        fastlstm.enable()

        with fastlstm.enable():
            model(x)

        @fastlstm.enable()
        def evaluate(model): ...

    Calls nest and are counted: the kernels run while any of them is in effect, in all threads. Modules, their classes,
    parameters, ``state_dict``, hooks and pickles stay what they are; the results are those of nn.LSTM up to rounding,
    with nn.LSTM's random draws for dropout (on CUDA with other ones, of torch's generator) and its errors.

    What the kernels are not made for runs as it would without them: other devices (the meta device too) and dtypes;
    tensors of other classes, layouts or shapes than a right call has; ``torch.jit`` (script and trace), compiled and
    exported code (where ``torch.compile`` breaks its graph at an nn.LSTM, that nn.LSTM is accelerated);
    ``torch.func`` transforms, forward-mode AD, and modes that intercept operators. nn.LSTM's own switches,
    ``torch.backends.mkldnn.flags(enabled=False)`` and ``torch.backends.cudnn.flags(enabled=False)``, choose between
    torch's implementations and so have no effect on calls that the kernels run.

    Some calls that torch refuses work: an nn.LSTM under CPU autocast on any CPU, the backward pass of cuDNN's in eval
    mode, a second backward pass through the first. What runs a forward pass anew in the backward pass, as
    ``torch.utils.checkpoint`` does, has to find the kernels enabled both times or neither time. On a GPU,
    large batches of large layers take as long as with cuDNN.

    Returns:
        An object to use as a context manager or decorator, or to ignore.
    """
    return Enabling()


def disable() -> None:
    """Undo one call of :func:`enable`; after the last one nn.LSTM and nn.LSTMCell are torch's again.

    Raises:
        RuntimeError: there is no call of enable() to undo. A ``with`` block undoes its own when it ends.
    """
    with _lock:
        if _count.calls == 0:
            raise RuntimeError(
                "disable() must follow a call of enable(), of which none is in effect outside with blocks"
            )
        _count.change(calls=-1)


def is_enabled() -> bool:
    """Whether a call of :func:`enable`, a ``with`` block or a decorated function is in effect."""
    with _lock:
        return _count.total > 0


class Enabling(contextlib.ContextDecorator):
    """What :func:`enable` returns: a context manager, usable again and again, and a decorator."""

    def __init__(self) -> None:
        with _lock:
            _count.change(calls=1)
        # The call of enable() became effective before it could be known for what. The first block takes it over.
        self._unused_call = True

    def __enter__(self) -> Enabling:
        with _lock:
            _count.change(calls=-1 if self._unused_call else 0, blocks=1)
            self._unused_call = False
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _count.change(blocks=-1)

    def __call__(self, function: _Function) -> _Function:
        """Make ``function`` a function that is enabled whenever it runs.

        Raises:
            TypeError: ``function`` is a generator or coroutine function, most of which runs after its call.
        """
        if self._unused_call:
            self._unused_call = False
            disable()
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(is_kind(function) for is_kind in kinds):
            raise TypeError(
                "enable() must decorate a plain function, got the generator or coroutine function "
                f"{function.__qualname__}; use a with block inside it"
            )
        return super().__call__(function)


class _Count:
    """The calls of enable() and the ``with`` blocks that are in effect. Under the lock only."""

    calls = 0
    blocks = 0

    @property
    def total(self) -> int:
        return self.calls + self.blocks

    def change(self, calls: int = 0, blocks: int = 0) -> None:
        total = self.total + calls + blocks
        if total and not self.total:
            _replace()
        elif self.total and not total:
            _restore()
        self.calls += calls
        self.blocks += blocks


_count = _Count()
_lock = threading.Lock()


def _replace() -> None:
    for owner, name in _replaced():
        if name in vars(owner):
            raise RuntimeError(f"enable() must be the only one to replace {name}, which another library has done")
    _set_up_once()
    for (owner, name), replacement in _replaced().items():
        setattr(owner, name, replacement)


def _restore() -> None:
    # torch finds all three elsewhere, by __getattr__ and in nn.Module, where these attributes do not hide them.
    for owner, name in _replaced():
        delattr(owner, name)


def _replaced() -> dict[tuple[Any, str], Callable[..., Any]]:
    return {
        (torch._VF, "lstm"): _lstm,
        (torch._VF, "lstm_cell"): _lstm_cell,
        (nn.LSTM, "_call_impl"): _call_impl,
    }


@functools.cache
def _set_up_once() -> None:
    # torch.jit.script knows torch's functions by their identity. It is to compile them, not to parse these.
    torch.jit._builtins._register_builtin(_lstm, "aten::lstm")
    torch.jit._builtins._register_builtin(_lstm_cell, "aten::lstm_cell")
    # Where torch.compile breaks a graph at an nn.LSTM, it goes on with the frames below. Compiled by itself, a
    # replacement would hand its call to torch's function, whose steps torch.compile unrolls.
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.SKIP)
    for function in (_lstm, _lstm_cell):
        dynamo.set_code_exec_strategy(function.__code__, skip)


def _lstm(*arguments: Any, **keywords: Any) -> Any:
    """In place of ``torch._VF.lstm``: its two signatures, its results ``(y, h_n, c_n)``."""
    if len(arguments) == 9 and not keywords:
        if isinstance(arguments[1], Tensor):
            x, batch_sizes, hx, weights, bias, num_layers, dropout, training, bidirectional = arguments
            batch_first = False
        else:
            x, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first = arguments
            batch_sizes = None
        options = (bias, num_layers, dropout, training, bidirectional, batch_first)
        if hx is not None and _runs_lstm(x, batch_sizes, hx, weights, *options):
            y, (h_n, c_n) = _run_lstm(x, batch_sizes, hx, weights, *options)
            return y, h_n, c_n
    return _torch_lstm(*arguments, **keywords)


def _lstm_cell(*arguments: Any, **keywords: Any) -> Any:
    """In place of ``torch._VF.lstm_cell``."""
    if len(arguments) == 6 and not keywords and _runs_lstm_cell(*arguments):
        return functional.lstm_cell(*arguments)
    return _torch_lstm_cell(*arguments, **keywords)


def _call_impl(self: nn.LSTM, *arguments: Any, **keywords: Any) -> Any:
    """In place of ``nn.Module._call_impl``: calls the kernels where that would do no more than nn.LSTM's forward."""
    if (
        type(self) is nn.LSTM
        and not keywords
        and len(arguments) in (1, 2)
        and not (self._forward_pre_hooks or self._forward_hooks or self._backward_pre_hooks or self._backward_hooks)
        and not torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        and "forward" not in self.__dict__
        and getattr(nn.LSTM.forward, "__globals__", None) is vars(torch_rnn)  # not another library's replacement
    ):
        x, hx = arguments if len(arguments) == 2 else (arguments[0], None)
        weights, parameters = self._flat_weights, self._parameters
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        if (
            # nn.LSTM looks whether its parameters are other ones than before, and whether its sizes are theirs.
            all(map(operator.is_, map(parameters.get, self._flat_weights_names), weights))
            and _runs_lstm(x, None, hx, weights, *options)
            and weights[0].shape == (4 * self.hidden_size, self.input_size)  # type: ignore[union-attr]
            and weights[1].size(1) == (self.proj_size or self.hidden_size)  # type: ignore[union-attr]
        ):
            return _run_lstm(x, None, hx, weights, *options)
    return super(nn.LSTM, self)._call_impl(*arguments, **keywords)  # type: ignore[no-untyped-call]


def _run_lstm(
    x: Tensor,
    batch_sizes: Tensor | None,
    hx: Any,
    weights: Any,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, functional.State]:
    return functional.lstm(
        x,
        weights,
        hx,
        num_layers=num_layers,
        bidirectional=bidirectional,
        bias=bias,
        batch_first=batch_first,
        dropout=dropout,
        training=training,
        batch_sizes=batch_sizes,
    )


def _runs_lstm(
    x: Any,
    batch_sizes: Any,
    hx: Any,
    weights: Any,
    bias: Any,
    num_layers: Any,
    dropout: Any,
    training: Any,
    bidirectional: Any,
    batch_first: Any,
) -> bool:
    """Whether :func:`_run_lstm` runs these arguments with torch's result; hx may be None."""
    states = () if hx is None else hx
    if not (
        _no_one_watches()
        and type(x) in _CLASSES
        and type(states) in (tuple, list)
        and type(weights) is list
        and type(num_layers) is int
        and type(dropout) in (float, int)
        and 0 <= dropout <= 1
        and type(bias) is type(training) is type(bidirectional) is type(batch_first) is bool
        and len(weights) >= 2
        and _are_matrices(weights[0], weights[1])
        and x.dim() == (3 if batch_sizes is None else 2)
        and not x.is_nested
    ):
        return False
    if batch_sizes is not None:
        if not _are_sizes_of_steps(batch_sizes, x.size(0)):
            return False
        steps, batch = batch_sizes.size(0), int(batch_sizes[0])
    else:
        steps, batch = (x.size(1), x.size(0)) if batch_first else (x.size(0), x.size(1))
    if steps == 0:
        return False
    hidden_size, out_size, count = weights[0].size(0) // 4, weights[1].size(1), num_layers * (1 + bidirectional)
    state_shapes = ((count, batch, out_size), (count, batch, hidden_size)) if hx is not None else ()
    weight_shapes = _weight_shapes(x.size(-1), hidden_size, out_size, num_layers, bidirectional, bias)
    return _fit(x, states, state_shapes, weights, weight_shapes, fused_by_torch=True)


def _runs_lstm_cell(x: Any, hx: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any = None, bias_hh: Any = None) -> bool:
    """Whether :func:`functional.lstm_cell` runs these arguments with torch's result."""
    biases = [b for b in (bias_ih, bias_hh) if b is not None]
    if not (
        _no_one_watches()
        and type(x) in _CLASSES
        and type(hx) in (tuple, list)
        and _are_matrices(weight_ih, weight_hh)
        and x.dim() == 2
        and not x.is_nested
    ):
        return False
    hidden_size = weight_ih.size(0) // 4
    state_shape = (x.size(0), hidden_size)
    weight_shapes = _weight_shapes(x.size(1), hidden_size, hidden_size, 1, False, bool(biases))
    weights = [weight_ih, weight_hh, *biases]
    return _fit(x, hx, (state_shape, state_shape), weights, weight_shapes, fused_by_torch=False)


def _are_matrices(w_ih: Any, w_hh: Any) -> bool:
    return type(w_ih) in _CLASSES and type(w_hh) in _CLASSES and w_ih.dim() == w_hh.dim() == 2


def _fit(
    x: Tensor,
    states: Sequence[Any],
    state_shapes: Sequence[tuple[int, ...]],
    weights: Sequence[Any],
    weight_shapes: Sequence[tuple[int, ...]],
    fused_by_torch: bool,
) -> bool:
    """Whether all are dense tensors of these shapes, on one device with kernels, of dtypes that go together."""
    on_cpu, index = x.is_cpu, x.get_device()
    if not (on_cpu or (x.is_cuda and _has_kernels(index))):
        return False
    if len(states) != len(state_shapes) or len(weights) != len(weight_shapes):
        return False
    dtypes = _dtypes_taken(x, states, fused_by_torch)
    tensors, shapes = (x, *states, *weights), (x.shape, *state_shapes, *weight_shapes)
    for t, shape in zip(tensors, shapes, strict=True):
        if not (
            type(t) in _CLASSES
            and t.dtype in dtypes
            and (t.is_cpu if on_cpu else t.is_cuda and t.get_device() == index)
            and t.layout is torch.strided
            and not t.is_nested
            and t.shape == shape
        ):
            return False
    return True


def _dtypes_taken(x: Tensor, states: Sequence[Any], fused_by_torch: bool) -> Set[torch.dtype]:
    """The dtypes that each tensor may have for torch's results to have the dtype of ours."""
    device_type = "cpu" if x.is_cpu else "cuda"
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return _DTYPES & {x.dtype}
    # Under autocast our results have the low precision. So have those of torch's fused kernels (where it has them for
    # this CPU: otherwise it fails), while what it composes of other operators takes the dtype of the states.
    low = torch.get_autocast_dtype(device_type)
    switch = torch._C._get_mkldnn_enabled if x.is_cpu else torch._C._get_cudnn_enabled
    if (fused_by_torch and x.dtype == torch.float32 and switch()) or all(
        isinstance(state, Tensor) and state.dtype == low for state in states or [x]
    ):
        return _DTYPES & {torch.float32, low}
    return frozenset()


@functools.cache
def _has_kernels(cuda_index: int) -> bool:
    """Whether this build has kernels for a GPU of this machine."""
    if not _C.cuda:
        return False
    try:
        _C.cuda_device(cuda_index)
    except RuntimeError:
        return False
    return True


@functools.lru_cache(maxsize=256)
def _weight_shapes(
    input_size: int, hidden_size: int, out_size: int, num_layers: int, bidirectional: bool, bias: bool
) -> list[tuple[int, ...]]:
    """The shapes of the weights of a stack; of none if there is no stack of these sizes."""
    if not (input_size >= 1 and num_layers >= 1 and 1 <= out_size <= hidden_size):
        return []
    directions = 1 + bidirectional
    shapes: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        width = input_size if layer == 0 else directions * out_size
        shapes += directions * (
            [(4 * hidden_size, width), (4 * hidden_size, out_size)]
            + bias * [(4 * hidden_size,), (4 * hidden_size,)]
            + (out_size != hidden_size) * [(out_size, hidden_size)]
        )
    return shapes


def _are_sizes_of_steps(batch_sizes: Any, rows: int) -> bool:
    """Whether these are the sizes of the steps of a packed batch of so many rows."""
    if type(batch_sizes) is not Tensor or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
        return False
    if batch_sizes.dim() != 1 or batch_sizes.size(0) == 0:
        return False
    sizes = batch_sizes.tolist()
    return sizes[-1] >= 1 and sizes == sorted(sizes, reverse=True) and sum(sizes) == rows


def _no_one_watches() -> bool:
    """Whether nothing records or transforms the operators of a call, which would be ours in place of torch's."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or (
            torch._C._len_torch_function_stack()
            and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
        )
    )

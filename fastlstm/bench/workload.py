"""One shape made runnable: nn.LSTM and FastLSTM with equal parameters, the same inputs, and the exact answer.

fastlstm/verify.py compares the contenders' results with `exact`; fastlstm/bench/runner.py and the
pytest-benchmark suites time `step`. Both see the same calls: what is timed is what was checked. A call of
pass "forward" runs in inference mode; a call of pass "forward_backward" also computes the gradients of all
parameters, of the input (as inside a stacked model) and of the initial state where the shape has one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from fastlstm import FastLSTM, FastLSTMCell, _ops, reference
from fastlstm.bench.shapes import DTYPES, Shape

if TYPE_CHECKING:
    from fastlstm.planning import CudaPlan, Plan

Pass = Literal["forward", "forward_backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward_backward")
# The stubs of torch.backends lack the precision settings.
_mkldnn: Any = torch.backends.mkldnn
_cudnn: Any = torch.backends.cudnn
CONTENDERS = ("fastlstm", "torch")


@contextlib.contextmanager
def _fp32_precision(rnn: Any, precision: str) -> Iterator[None]:
    previous = rnn.fp32_precision
    rnn.fp32_precision = precision
    try:
        yield
    finally:
        rnn.fp32_precision = previous


def permit_bf16_products() -> contextlib.AbstractContextManager[None]:
    """Torch's switch that lets products of float32 tensors be taken of bfloat16 values; the old setting comes back."""
    return _fp32_precision(_mkldnn.rnn, "bf16")


def tf32_products(permitted: bool) -> contextlib.AbstractContextManager[None]:
    """Torch's switch for TF32 products of float32 tensors in RNNs on a GPU; the old setting comes back."""
    return _fp32_precision(_cudnn.rnn, "tf32" if permitted else "ieee")


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Not torch.backends.mkldnn.flags, which sets precision switches too and warns about one of them."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class Workload:
    """Contenders, inputs and output gradients of `shape` on `device`; equal seeds give equal values.

    Attributes:
        modules: contender -> module; the parameters have equal values.
        x: the input: [T, B, I], the packed rows [N, I], or for a cell [B, I].
        batch_sizes: None, or the int64 CPU tensor [T] of a PackedSequence.
        state: () or (h_0, c_0), [layers * directions, B, P or H] and [..., H], for a cell [B, H].
    """

    def __init__(self, shape: Shape, *, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self.modules = self._build_modules(seed)
        # On a GPU its own generator draws: that of the CPU would take longer than everything measured there.
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = DTYPES[shape.dtype]

        def random(*size: int) -> Tensor:
            # Values that bfloat16 represents exactly give every contender and the oracle the same numbers,
            # whatever precision each of them reads its input in.
            return torch.randn(size, generator=generator, device=self.device).bfloat16().to(dtype)

        lead: tuple[int, ...] = (shape.T, shape.B)
        stack: tuple[int, ...] = (shape.layers * shape.directions, shape.B)
        self.batch_sizes: Tensor | None = None
        if shape.kind == "cell":
            lead, stack = (shape.B,), (shape.B,)
        elif shape.packed:
            steps = [sum(length > t for length in shape.lengths) for t in range(shape.T)]
            lead, self.batch_sizes = (shape.tokens,), torch.tensor(steps)
        self.x = random(*lead, shape.I).requires_grad_()
        self.state: tuple[Tensor, ...] = ()
        if shape.state:
            self.state = tuple(random(*stack, size).requires_grad_() for size in (shape.output_size, shape.H))
        y_seed = [] if shape.kind == "cell" else [random(*lead, shape.directions * shape.output_size)]
        state_seeds = [random(*stack, size) for size in (shape.output_size, shape.H)] if shape.state else []
        self._output_gradients = {(self.device, dtype): y_seed + state_seeds}

    def _build_modules(self, seed: int) -> dict[str, nn.Module]:
        shape = self.shape
        factory: dict[str, Any] = {"device": self.device, "dtype": DTYPES[shape.dtype]}
        if shape.kind == "cell":
            classes: tuple[type[nn.Module], type[nn.Module]] = (FastLSTMCell, nn.LSTMCell)
            arguments: dict[str, Any] = {}
        else:
            classes = (FastLSTM, nn.LSTM)
            arguments = {
                "num_layers": shape.layers,
                "bidirectional": shape.directions == 2,
                "proj_size": shape.P,
            }
        with torch.random.fork_rng(devices=[self.device] if self._on_gpu else []):
            torch.manual_seed(seed)
            ours, theirs = (make(shape.I, shape.H, bias=shape.bias, **arguments, **factory) for make in classes)
        ours.load_state_dict(theirs.state_dict())
        return {"fastlstm": ours, "torch": theirs}

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """The shape's global switches; holds during every call, restores the user's setting afterwards."""
        with contextlib.ExitStack() as switches:
            if self.shape.bf16_products:
                switches.enter_context(permit_bf16_products())
            if self.shape.ieee:
                switches.enter_context(tf32_products(False))
            yield

    @property
    def rounding(self) -> torch.dtype | None:
        """The dtype with the precision of the products, where that is lower than the dtype of the results."""
        if self.shape.mixed:
            return torch.bfloat16
        with self.precision():
            tf32 = self._on_gpu and self.shape.dtype == "float32" and _ops.reduced_products_permitted("cuda")
        return torch.float16 if tf32 else None  # TF32 has the fraction of float16

    def step(self, contender: str, pass_: Pass) -> Callable[[], None]:
        """The call to time, to be made inside `precision()`."""
        module = self.modules[contender]
        autocast = self.shape.autocast
        self._set_mode(module, pass_)
        if pass_ == "forward":

            def forward() -> None:
                with torch.inference_mode():
                    self._call(module, autocast)

            return forward

        parameters = list(module.parameters())
        leaves = [self.x, *self.state, *parameters]

        def forward_backward() -> None:
            for leaf in leaves:
                leaf.grad = None
            # The optimizer would have changed the weights since the last call: a copy of them packed then is
            # stale, and using it here would time something that never happens in training.
            torch.autograd.graph.increment_version(parameters)
            self._backward(self._call(module, autocast))

        return forward_backward

    def plan(self, pass_: Pass) -> Plan | CudaPlan:
        """The plan that FastLSTM follows for this shape."""
        shape = self.shape
        with self.precision():
            return fastlstm.plan(
                T=shape.T,
                B=shape.B,
                I=shape.I,
                H=shape.H,
                P=shape.P,
                L=shape.layers,
                D=shape.directions,
                dtype=torch.bfloat16 if shape.autocast else DTYPES[shape.dtype],
                training=pass_ == "forward_backward",
                device=self.device,
            )

    def results(self, contender: str, pass_: Pass) -> dict[str, Tensor]:
        """Outputs and, in training, gradients by name: "y", "h_n", "c_n", "d_x", "d_h_0", "d_bias_ih_l0"."""
        return self._results(self.modules[contender], pass_, self.shape.autocast)

    def baseline(self, pass_: Pass) -> dict[str, Tensor]:
        """nn.LSTM's results in the precision the shape asks for: the yardstick of the tolerance rule.

        nn.LSTM ignores the bfloat16 product switch on the CPU, so its results under autocast stand in for it. And where
        oneDNN has no bfloat16 LSTM for the CPU, nn.LSTM under autocast raises: its native path then serves.
        """
        module = self.modules["torch"]
        try:
            return self._results(module, pass_, self.shape.mixed)
        except RuntimeError:
            if not self.shape.mixed or self.device.type != "cpu":
                raise
            with _without_mkldnn():
                return self._results(module, pass_, autocast=True)

    def exact(self, pass_: Pass) -> dict[str, Tensor]:
        """The results in float64, by the reference implementation."""
        shape = self.shape
        x, *state = (t.detach().double().requires_grad_() for t in (self.x, *self.state))
        named = {name: p.detach().double().requires_grad_() for name, p in self.modules["torch"].named_parameters()}
        cell = shape.kind == "cell"
        stack = shape.layers * shape.directions
        h_0, c_0 = state or (x.new_zeros(stack, shape.B, size) for size in (shape.output_size, shape.H))
        with torch.set_grad_enabled(pass_ == "forward_backward"):
            outputs: tuple[Tensor, ...] = reference.lstm(
                x[None] if cell else x,
                list(named.values()),
                h_0[None] if cell else h_0,
                c_0[None] if cell else c_0,
                num_layers=shape.layers,
                bidirectional=shape.directions == 2,
                has_bias=shape.bias,
                batch_sizes=self.batch_sizes,
            )
        if cell:
            outputs = tuple(output[0] for output in outputs)
        return self._collect(outputs, pass_, x, state, named)

    def _set_mode(self, module: nn.Module, pass_: Pass) -> None:
        """In training mode cuDNN keeps what backward needs, whether or not a gradient can be asked for."""
        if self._on_gpu:
            module.train(pass_ == "forward_backward")

    def _call(self, module: nn.Module, autocast: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(y, h_n, c_n); y is the packed rows for a PackedSequence, and h_n itself for a cell."""
        x: Tensor | PackedSequence = self.x
        if self.batch_sizes is not None:
            x = PackedSequence(self.x, self.batch_sizes)
        with torch.autocast(self.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            result = module(x, self.state) if self.state else module(x)
        if self.shape.kind == "cell":
            h, c = result
            return h, h, c
        y, (h_n, c_n) = result
        return (y.data if self.batch_sizes is not None else y), h_n, c_n

    def _backward(self, outputs: tuple[Tensor, ...]) -> None:
        """Gradients of y and, where the state goes on, of h_n and c_n."""
        wanted = outputs[1:] if self.shape.kind == "cell" else outputs
        key = outputs[0].device, outputs[0].dtype
        if key not in self._output_gradients:
            given = next(iter(self._output_gradients.values()))
            self._output_gradients[key] = [gradient.to(*key) for gradient in given]
        gradients = self._output_gradients[key]
        torch.autograd.backward(wanted[: len(gradients)], gradients)

    def _results(self, module: nn.Module, pass_: Pass, autocast: bool) -> dict[str, Tensor]:
        self._set_mode(module, pass_)
        with self.precision(), torch.inference_mode(pass_ == "forward"):
            outputs = self._call(module, autocast)
        return self._collect(outputs, pass_, self.x, self.state, dict(module.named_parameters()))

    def _collect(
        self,
        outputs: tuple[Tensor, ...],
        pass_: Pass,
        x: Tensor,
        state: tuple[Tensor, ...] | list[Tensor],
        parameters: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        names = ("y", "h_n", "c_n")
        tensors = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
        if self.shape.kind == "cell":
            del tensors["y"]
        if pass_ == "forward_backward":
            leaves = {"x": x, **dict(zip(("h_0", "c_0"), state, strict=False)), **parameters}
            for leaf in leaves.values():
                leaf.grad = None
            with self.precision():
                self._backward(outputs)
            for name, leaf in leaves.items():
                if leaf.grad is None:
                    raise RuntimeError(f"{self.shape.name}: no gradient reached {name}")
                tensors[f"d_{name}"] = leaf.grad
                leaf.grad = None
        return tensors

"""What the planner decides, made visible, and how to overrule it: plan, force, build_info.

Users ask ``fastlstm.plan`` why a shape is fast or slow; tests and benchmarks force every kernel family and
instruction set through ``fastlstm.force``. The decisions themselves are made in ``csrc/plan.cpp``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastlstm import _C, _ops


@dataclass(frozen=True)
class Plan:
    """How one call is computed.

    ``forward`` and ``backward`` name kernel families (``backward`` is None without training).
    ``forward_split`` and ``backward_split`` say what threads divide: ``"rows"`` of the batch (no
    synchronisation) or hidden ``"units"`` (threads meet after every step). ``bulk_input``: x W_ih^T is one GEMM
    over all steps, not part of each step. The products are ``"full"``, or ``"bf16"`` where their factors are rounded
    to bfloat16 (sums never are).
    """

    forward: str
    forward_split: str
    bulk_input: bool
    forward_products: str
    backward: str | None
    backward_split: str | None
    backward_products: str | None
    isa: str
    threads: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        bf16 = ", bf16 products"
        forward = [self.forward_split, ", bulk input" * self.bulk_input, bf16 * (self.forward_products == "bf16")]
        text = f"forward {self.forward} (by {''.join(forward)})"
        if self.backward is not None:
            text += f", backward {self.backward} (by {self.backward_split}{bf16 * (self.backward_products == 'bf16')})"
        return f"{text}, {self.isa}, {self.threads} threads; {self.reason}"


@dataclass(frozen=True)
class CudaPlan:
    """How one call is computed on a GPU.

    ``forward`` and ``backward`` name kernel families (``backward`` is None without training); ``forward_layout`` and
    ``backward_layout`` say how they lie on the GPU. The microseconds are the planner's estimates for one time step of
    one layer on average, all directions: derived from published latencies, not measured.
    """

    forward: str
    forward_layout: str
    forward_microseconds: float
    backward: str | None
    backward_layout: str | None
    backward_microseconds: float | None
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"forward {self.forward_layout}, {self.forward_microseconds:.2f} us per step predicted"
        if self.backward is not None:
            text += f", backward {self.backward_layout}, {self.backward_microseconds:.2f} us predicted"
        return f"{text}; {self.device}"


@dataclass(frozen=True)
class Gpu:
    """What plans depend on: SMs, bytes of shared memory of a block and of L2, clock in GHz, products of warpgroups."""

    sms: int
    shared_bytes: int
    l2_bytes: int
    gigahertz: float
    warpgroups: bool = False


#: GPUs for which :func:`plan` can be asked on any machine.
GPUS = {
    "A100": Gpu(108, 163 * 1024, 40 << 20, 1.41),
    "L4": Gpu(58, 99 * 1024, 48 << 20, 2.04),
    "H100": Gpu(132, 227 * 1024, 50 << 20, 1.98, warpgroups=True),
    "H200": Gpu(132, 227 * 1024, 50 << 20, 1.98, warpgroups=True),
    "B200": Gpu(148, 227 * 1024, 126 << 20, 1.97),
}


def plan(
    module: torch.nn.RNNBase | None = None,
    *,
    T: int,
    B: int,
    I: int | None = None,  # noqa: E741
    H: int | None = None,
    P: int = 0,
    L: int = 1,
    D: int = 1,
    dtype: torch.dtype | None = None,
    training: bool = False,
    step_extras: bool = False,
    device: torch.device | str | None = None,
    layer_norm: bool = False,
) -> Plan | CudaPlan:
    """The plan for T time steps of B rows: on the CPU with torch's current number of threads, or on a GPU.

    Args:
        module: a FastLSTM (or nn.LSTM) to take I, H, P, L, D, dtype and layer_norm from; without one, I and H must be
            given.
        T: time steps.
        B: batch size.
        I: input size.
        H: hidden size.
        P: projection size, 0 for none.
        L: layers.
        D: directions, 1 or 2.
        dtype: float32 (the default), float64, bfloat16 or float16.
        training: whether a backward pass follows.
        step_extras: whether a step is more than the cell: with recurrent dropout, zoneout, ``reset_hx`` or (backward)
            gradients of returned cell states. A module's zoneout counts by itself, and its recurrent dropout in
            training mode.
        device: a device of this machine, or the name of a GPU model in :data:`fastlstm.planning.GPUS`, which need not
            be there. That of the module's parameters if None, or the CPU without a module.
        layer_norm: whether the gates are normalised.

    Raises:
        ValueError: the module is no LSTM, a size is not positive or missing, the dtype or the device is another, or a
            forced plan cannot run the problem.
        RuntimeError: there is no such GPU, or this build has no kernels for it.
    """
    if module is not None:
        if module.mode != "LSTM":
            raise ValueError(f"module must be an LSTM, got {type(module).__name__} in mode {module.mode}")
        I, H, P, L = module.input_size, module.hidden_size, module.proj_size, module.num_layers  # noqa: E741
        D = 2 if module.bidirectional else 1
        layer_norm = getattr(module, "layer_norm", False)
        parameter = next(module.parameters())
        dtype = parameter.dtype
        dropped = module.training and getattr(module, "recurrent_dropout", 0) > 0
        step_extras = step_extras or dropped or any(getattr(module, "zoneout", ()))
        device = parameter.device if device is None else device
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    if I is None or H is None:
        raise ValueError("plan needs a module, or I and H")
    for name, value in {"T": T, "B": B, "I": I, "H": H, "L": L}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= P < H:
        raise ValueError(f"P must be in [0, H) = [0, {H}), got {P}")
    if D not in (1, 2):
        raise ValueError(f"D must be 1 or 2, got {D}")
    if device in GPUS or (device is not None and torch.device(device).type == "cuda"):
        sizes = {"T": T, "B": B, "I": I, "H": H, "P": P, "layers": L, "directions": D}
        steps = {"step_extras": step_extras, "layer_norm": layer_norm}
        return _cuda_plan(device, dtype or torch.float32, training, **steps, **sizes)
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"device must be a CPU, a CUDA device or one of {', '.join(GPUS)}, got {device}")
    found = _C.plan_for(
        T=T,
        B=B,
        N=T * B,
        I=I,
        H=H,
        P=P,
        layers=L,
        directions=D,
        compute_bytes=8 if dtype == torch.float64 else 4,
        training=training,
        bf16_allowed=dtype == torch.bfloat16
        or (dtype in (None, torch.float32) and _ops.reduced_products_permitted("cpu")),
        threads=torch.get_num_threads(),
        layer_norm=layer_norm,
    )
    forward, backward = found["forward"], found["backward"]
    return Plan(
        forward=forward["family"],
        forward_split=forward["split"],
        bulk_input=forward["bulk_input"],
        forward_products=forward["products"],
        backward=backward["family"] if backward else None,
        backward_split=backward["split"] if backward else None,
        backward_products=backward["products"] if backward else None,
        isa=found["isa"],
        threads=found["threads"],
        reason=found["reason"],
    )


def _cuda_plan(device: torch.device | str | None, dtype: torch.dtype, training: bool, **problem: int) -> CudaPlan:
    if isinstance(device, str) and device in GPUS:
        gpu, name = GPUS[device], device
    else:
        index = torch.device(device or "cuda").index
        index = torch.cuda.current_device() if index is None else index
        gpu, name = Gpu(*_C.cuda_device(index)), torch.cuda.get_device_name(index)
    element = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and _ops.reduced_products_permitted("cuda"):
        element = "tf32"
    arguments: dict[str, Any] = {**problem, **asdict(gpu)}
    found = _C.cuda_plan_for(**arguments, element=element, training=training)
    forward, backward = found["forward"], found["backward"]
    return CudaPlan(
        forward=forward["family"],
        forward_layout=forward["text"],
        forward_microseconds=forward["microseconds"],
        backward=backward["family"] if backward else None,
        backward_layout=backward["text"] if backward else None,
        backward_microseconds=backward["microseconds"] if backward else None,
        device=name,
    )


def plans(device_type: str = "cpu") -> list[str]:
    """The names of the kernel families of a device, ``"cpu"`` or ``"cuda"``, that :func:`force` takes."""
    return list(_C.cuda_plans() if device_type == "cuda" else _C.plans())


def available_isas() -> list[str]:
    """The instruction sets that this build has kernels for and this CPU can run, best last."""
    return list(_C.isas_available())


@contextlib.contextmanager
def force(
    plan: str | None = None,
    isa: str | None = None,
    *,
    split: str | None = None,
    bulk_input: bool | None = None,
    products: str | None = None,
    octets: int | None = None,
    tiles: int | None = None,
    groups: int | None = None,
    layers: int | None = None,
    run_steps: int | None = None,
) -> Iterator[None]:
    """Overrule the planner inside a ``with`` block, for the whole process; for tests and benchmarks.

    ``isa``, ``split``, ``bulk_input`` and ``products`` are about the CPU; the others about CUDA's
    families but ``"stepwise"``.

    Args:
        plan: a family of :func:`plans`, or None for the planner's choice. Where a device has no family of this name, it
            is not forced.
        isa: an instruction set of :func:`available_isas`, or None for the best.
        split: what threads divide in both passes, ``"rows"`` or ``"units"`` (see :class:`Plan`), or None.
        bulk_input: whether the input product is one GEMM over all steps, or None.
        products: ``"full"``, or ``"bf16"`` for factors rounded to bfloat16 (of bfloat16 tensors, or of float32 ones
            with ``torch.backends.mkldnn.rnn.fp32_precision = "bf16"``; on a CPU without an instruction for them
            they are slow), or None: then they are used where they are allowed and fast.
        octets: groups of 8 hidden units that a CTA (``"resident"``: a warp) owns, or None.
        tiles: groups of 8 rows of the batch that a team of CTAs (``"streamed"``: a CTA) runs at the same time, or None.
        groups: the most teams for a direction or layer, or None.
        layers: how many layers run at the same time, each some steps behind the one that it reads, or None.
        run_steps: so many, rounded up to a multiple of 4: a launch computes this number of steps; or None.

    Raises:
        ValueError: the name is unknown, this CPU lacks the instruction set, or a number is not positive. A forced plan
            that cannot run a problem raises when the problem comes.
    """
    before = _C.get_forced()
    _C.set_forced(plan, isa, split, bulk_input, products, octets, tiles, groups, layers, run_steps)
    try:
        yield
    finally:
        _C.set_forced(*before)


def build_info() -> dict[str, Any]:
    """Versions, compiler, targets and kernels of CUDA (none: built without) and instruction sets, as plain values.

    Of the CUDA kernels that take products: ``"persistent_forward x 39"``, its name and how many shapes and elements it
    is compiled for, for each target.
    """
    from fastlstm import __version__

    kernels = Counter(kernel["function"] for kernel in _C.cuda_kernels()) if _C.cuda else Counter()
    return {
        "version": __version__,
        "torch_built": _C.torch_built,
        "torch_running": torch.__version__,
        "cuda": _C.cuda,
        "cuda_kernels": [f"{name} x {count}" for name, count in kernels.items()],
        "compiler": _C.compiler,
        "isas_compiled": _C.isas_compiled(),
        "isas_available": _C.isas_available(),
        "isa": _C.isa(),
    }

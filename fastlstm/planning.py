"""What the planner decides, made visible, and how to overrule it: plan, force, build_info.

Users ask ``fastlstm.plan`` why a shape is fast or slow; tests and benchmarks force every kernel family and
instruction set through ``fastlstm.force``. The decisions themselves are made in ``csrc/plan.cpp``.
"""

from __future__ import annotations

import contextlib
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
) -> Plan:
    """The plan for T time steps of B rows on this machine, with torch's current number of threads.

    Args:
        module: a FastLSTM (or nn.LSTM) to take I, H, P, L, D and dtype from; without one, I and H must be given.
        T: time steps.
        B: batch size.
        I: input size.
        H: hidden size.
        P: projection size, 0 for none.
        L: layers.
        D: directions, 1 or 2.
        dtype: float32 (the default), float64, bfloat16 or float16.
        training: whether a backward pass follows.

    Raises:
        ValueError: the module is no LSTM, a size is not positive or missing, the dtype is another, or a forced plan
            cannot run the problem.
    """
    if module is not None:
        if module.mode != "LSTM":
            raise ValueError(f"module must be an LSTM, got {type(module).__name__} in mode {module.mode}")
        I, H, P, L = module.input_size, module.hidden_size, module.proj_size, module.num_layers  # noqa: E741
        D = 2 if module.bidirectional else 1
        dtype = next(module.parameters()).dtype
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
        bf16_allowed=dtype == torch.bfloat16 or (dtype in (None, torch.float32) and _ops.bf16_products_permitted()),
        threads=torch.get_num_threads(),
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


def plans() -> list[str]:
    """The names of the kernel families that :func:`force` takes."""
    return list(_C.plans())


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
) -> Iterator[None]:
    """Overrule the planner inside a ``with`` block, for the whole process; for tests and benchmarks.

    Args:
        plan: a family of :func:`plans`, or None for the planner's choice.
        isa: an instruction set of :func:`available_isas`, or None for the best.
        split: what threads divide in both passes, ``"rows"`` or ``"units"`` (see :class:`Plan`), or None.
        bulk_input: whether the input product is one GEMM over all steps, or None.
        products: ``"full"``, or ``"bf16"`` for factors rounded to bfloat16 (of bfloat16 tensors, or of float32 ones
            with ``torch.backends.mkldnn.rnn.fp32_precision = "bf16"``; on a CPU without an instruction for them
            they are slow), or None: then they are used where they are allowed and fast.

    Raises:
        ValueError: the name is unknown, or this CPU lacks the instruction set. A forced plan that cannot run a
            problem raises when the problem comes.
    """
    before = _C.get_forced()
    _C.set_forced(plan, isa, split, bulk_input, products)
    try:
        yield
    finally:
        _C.set_forced(*before)


def build_info() -> dict[str, Any]:
    """Versions, compiler and instruction sets of this build, as plain values."""
    from fastlstm import __version__

    return {
        "version": __version__,
        "torch_built": _C.torch_built,
        "torch_running": torch.__version__,
        "cuda": _C.cuda,
        "compiler": _C.compiler,
        "isas_compiled": _C.isas_compiled(),
        "isas_available": _C.isas_available(),
        "isa": _C.isa(),
    }

"""The compiled core (csrc/bindings.cpp), as mypy sees it. Importing it registers the operators."""

from typing import Any

from torch import Tensor

compiler: str
torch_built: str
cuda: bool

def plan_for(
    *,
    T: int,
    B: int,
    N: int,
    I: int,
    H: int,
    P: int,
    layers: int,
    directions: int,
    compute_bytes: int,
    training: bool,
    bf16_allowed: bool,
    threads: int,
    vector_bytes: int | None = None,
    bf16: bool | None = None,
    l2_bytes: int | None = None,
) -> dict[str, Any]: ...
def lstm(
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    dropout_mask: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    allow_bf16: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor] | None: ...
def apply(function: str, isa: str, values: Any) -> None: ...
def set_forced(
    plan: str | None, isa: str | None, split: str | None, bulk_input: bool | None, products: str | None
) -> None: ...
def get_forced() -> tuple[str | None, str | None, str | None, bool | None, str | None]: ...
def time_kernels(threads: int, seconds_each: float) -> list[dict[str, Any]]: ...
def plans() -> list[str]: ...
def isas_compiled() -> list[str]: ...
def isas_available() -> list[str]: ...
def isa() -> str: ...

"""The compiled core (csrc/bindings.cpp), as mypy sees it. Importing it registers the operators."""

from typing import Any

from torch import Tensor

compiler: str
torch_built: str
cuda: list[str]

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
    layer_norm: bool = False,
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
    reduced_products: bool,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    zoneout_rate_h: float,
    zoneout_rate_c: float,
    cell_layers: int,
    recompute: bool,
    layer_norm: bool,
    /,
) -> tuple[Tensor, ...] | None: ...
def apply(function: str, isa: str, values: Any) -> None: ...
def set_forced(
    plan: str | None,
    isa: str | None,
    split: str | None,
    bulk_input: bool | None,
    products: str | None,
    octets: int | None,
    tiles: int | None,
    groups: int | None,
    layers: int | None,
    run_steps: int | None,
) -> None: ...
def get_forced() -> tuple[Any, ...]: ...
def cuda_device(index: int) -> tuple[int, int, int, float, bool]: ...
def cuda_plan_for(
    *,
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    layers: int,
    directions: int,
    element: str,
    training: bool,
    step_extras: bool,
    layer_norm: bool,
    sms: int,
    shared_bytes: int,
    l2_bytes: int,
    gigahertz: float,
    warpgroups: bool,
) -> dict[str, Any]: ...
def cuda_plans() -> list[str]: ...
def cuda_kernels() -> list[dict[str, Any]]: ...
def time_kernels(threads: int, seconds_each: float) -> list[dict[str, Any]]: ...
def plans() -> list[str]: ...
def isas_compiled() -> list[str]: ...
def isas_available() -> list[str]: ...
def isa() -> str: ...

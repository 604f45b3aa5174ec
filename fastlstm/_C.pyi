"""The compiled core (csrc/bindings.cpp), as mypy sees it. Importing it registers the operators."""

from typing import Any

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

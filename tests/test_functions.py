"""exp, sigmoid and tanh of the vector code: their error in units in the last place, against fp64.

Every instruction set is measured on bit patterns spread evenly over all floats, a prime distance apart, so that
every exponent and every sign is met tens of thousands of times; ``python tests/test_functions.py`` tries all
4,294,967,296 of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

import fastlstm
from fastlstm import _C

EXACT: dict[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "exp": np.exp,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
MAX_ULP = {"exp": 1.1, "sigmoid": 2.4, "tanh": 2.6}
LIMIT = 87.0  # beyond it exp() and 1 / exp() leave the normal numbers: the functions keep their value there
STRIDE = 257


def floats(first: int, last: int, stride: int) -> npt.NDArray[np.float32]:
    """The floats with the bit patterns first, first + stride, ... below last."""
    return np.arange(first, last, stride, dtype=np.uint64).astype(np.uint32).view(np.float32)


def max_ulp(function: str, isa: str, x: npt.NDArray[np.float32]) -> float:
    """The largest error where x is a number within the limits; asserts what holds elsewhere."""
    result = x.copy()
    _C.apply(function, isa, result)
    assert np.array_equal(np.isnan(result), np.isnan(x)), "NaN comes out where NaN went in, and nowhere else"
    x, result = x[~np.isnan(x)], result[~np.isnan(x)]
    inside = np.abs(x) <= LIMIT
    limit = np.copysign(np.float32(LIMIT), x[~inside])
    _C.apply(function, isa, limit)
    assert np.array_equal(result[~inside], limit), "beyond the limits the value of the limit"
    exact = EXACT[function](x[inside].astype(np.float64))
    error = np.abs(result[inside] - exact) / np.spacing(np.abs(exact).astype(np.float32))
    # tanh of a denormal number is that number, unless the processor counts it as zero.
    return float(error[np.abs(exact) >= np.finfo(np.float32).tiny].max(initial=0))


@pytest.mark.parametrize("isa", fastlstm.available_isas())
@pytest.mark.parametrize("function", EXACT)
def test_float32_error_over_all_floats(function: str, isa: str) -> None:
    error = max_ulp(function, isa, floats(0, 2**32, STRIDE))
    assert 0.5 < error <= MAX_ULP[function]


@pytest.mark.parametrize("isa", fastlstm.available_isas())
@pytest.mark.parametrize("function", EXACT)
def test_float64_error(function: str, isa: str) -> None:
    x = np.concatenate([np.linspace(-20, 20, 100_001), np.logspace(-300, 1, 100_001), [0.0, np.inf, -np.inf, np.nan]])
    result = x.copy()
    _C.apply(function, isa, result)
    exact = EXACT[function](np.clip(x, -708, 708))  # numpy's own error is about one unit
    finite = ~np.isnan(x)
    assert np.isnan(result[~finite]).all()
    assert (np.abs(result - exact)[finite] / np.spacing(np.abs(exact[finite])))[np.abs(x[finite]) < 700].max() < 6


def test_odd_counts_leave_the_rest_alone() -> None:
    for isa in fastlstm.available_isas():
        for count in range(1, 20):
            values = np.ones(24, dtype=np.float32)
            _C.apply("tanh", isa, values[:count])
            assert (values[:count] == values[0]).all() and values[0] < 0.77 and (values[count:] == 1).all()


def test_what_apply_refuses() -> None:
    with pytest.raises(ValueError, match="function must be one of 'exp', 'sigmoid', 'tanh', got 'cos'"):
        _C.apply("cos", "scalar", np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="values must be float32 or float64, got format"):
        _C.apply("exp", "scalar", np.zeros(3, dtype=np.int32))
    with pytest.raises(ValueError, match="contiguous, 1-D"):
        _C.apply("exp", "scalar", np.zeros((3, 2), dtype=np.float32))


if __name__ == "__main__":
    step = 2**24
    for isa_name in fastlstm.available_isas():
        for name in EXACT:
            worst = max(max_ulp(name, isa_name, floats(first, first + step, 1)) for first in range(0, 2**32, step))
            sys.stdout.write(f"{isa_name} {name}: at most {worst:.3f} ulp\n")
            sys.stdout.flush()

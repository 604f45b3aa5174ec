"""The rule by which tests compare floating-point results: relative to what torch itself achieves.

Three results meet: ours, torch's in the same dtype, and the exact one in fp64. Per tensor our largest error
may be twice torch's plus a rounding floor, for the case that torch is exact by luck. The rule scales by
itself with the dtype, the length of the sums and the conditioning of the problem, so no test needs a
tolerance of its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# Roundings of fp32, the dtype that fp16 and bf16 accumulate in too, or of fp64: between two correct orders of
# summation the largest difference seen in 1000 random configurations was 7.
FLOOR = 16


def largest_error(actual: Tensor, exact: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest absolute error and its index. Equal infinities and NaN against NaN count as no error."""
    actual, exact = actual.detach().double(), exact.detach().double()
    if actual.numel() == 0:
        return 0.0, ()
    error = (actual - exact).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    error[(actual == exact) | (actual.isnan() & exact.isnan())] = 0.0
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    return float(error.flatten()[worst]), index


def assert_accurate(name: str, actual: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Assert that ``actual`` is as close to ``exact`` (fp64) as ``torchs``, by the rule, and shaped alike."""
    assert actual.shape == torchs.shape, f"{name}: shape {tuple(actual.shape)}, torch has {tuple(torchs.shape)}"
    assert actual.dtype == torchs.dtype, f"{name}: dtype {actual.dtype}, torch has {torchs.dtype}"
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, exact is {tuple(exact.shape)}"
    error, index = largest_error(actual, exact)
    torchs_error, _ = largest_error(torchs, exact)
    # 1 is the scale of the gates and of the tests' data: a small element may be the difference of larger
    # ones.
    finite = exact.detach()[exact.isfinite()].abs()
    scale = max(1.0, finite.max().item() if finite.numel() else 1.0)
    accumulated = torch.promote_types(actual.dtype, torch.float32)
    floor = FLOOR * torch.finfo(accumulated).eps
    if actual.dtype != accumulated:
        floor += torch.finfo(actual.dtype).eps
    bound = 2 * torchs_error + floor * scale
    assert error <= bound, (
        f"{name}{list(index)} = {actual[index].item():.9g}, exact {exact[index].item():.9g}, "
        f"torch {torchs[index].item():.9g}: error {error:.3g} exceeds {bound:.3g} "
        f"(torch's largest error is {torchs_error:.3g})"
    )


def assert_all_accurate(
    actual: Mapping[str, Tensor], torchs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """:func:`assert_accurate` for every tensor of three mappings with the same keys."""
    assert actual.keys() == torchs.keys() == exact.keys()
    for name in actual:
        assert_accurate(name, actual[name], torchs[name], exact[name])

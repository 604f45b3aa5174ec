"""The rule by which tests compare floating-point results: relative to what torch itself achieves.

Three results meet: ours, torch's in the same dtype, and the exact one in fp64. The rule is `fastlstm.verify.compare`,
by which `fastlstm verify` and `fastlstm bench` judge too; here it becomes an assertion. It scales by itself with the
dtype, the length of the sums and the conditioning of the problem, so no test needs a tolerance of its own.
"""

from collections.abc import Mapping

from torch import Tensor

from fastlstm.verify import compare


def assert_accurate(name: str, actual: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Assert that ``actual`` is about as close to ``exact`` (fp64) as ``torchs`` is, and alike in shape and dtype."""
    assert actual.shape == torchs.shape, f"{name}: shape {tuple(actual.shape)}, torch has {tuple(torchs.shape)}"
    assert actual.dtype == torchs.dtype, f"{name}: dtype {actual.dtype}, torch has {torchs.dtype}"
    report = compare(name, actual, torchs, exact)
    assert report.ok, str(report)


def assert_all_accurate(
    actual: Mapping[str, Tensor], torchs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """:func:`assert_accurate` for every tensor of three mappings with the same keys."""
    assert actual.keys() == torchs.keys() == exact.keys()
    for name in actual:
        assert_accurate(name, actual[name], torchs[name], exact[name])

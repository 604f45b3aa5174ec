"""Options and fixtures of the pytest-benchmark suites: which shapes run, and the check before the timing.

Run `pytest benchmarks --benchmark-only`; `--shapes` takes the names that `fastlstm bench --list` shows.
"""

from __future__ import annotations

import pytest
import torch

from fastlstm.bench.shapes import Shape, select
from fastlstm.bench.workload import PASSES, Pass, Workload
from fastlstm.verify import check

_SHAPES = pytest.StashKey[list[Shape]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlstm")
    group.addoption("--shapes", default="core", help="groups and names of shapes, separated by commas")
    group.addoption("--threads", type=int, help="number of threads; torch's default if left out")


def pytest_configure(config: pytest.Config) -> None:
    # nn.LSTM warns that projections miss its fast path; the timings show what that costs.
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")
    try:
        config.stash[_SHAPES] = select(config.getoption("--shapes"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    threads = config.getoption("--threads")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        shapes = metafunc.config.stash[_SHAPES]
        ids = [shape.name for shape in shapes]
        metafunc.parametrize("workload", shapes, ids=ids, indirect=True, scope="session")


@pytest.fixture(scope="session")
def workload(request: pytest.FixtureRequest) -> Workload:
    """Both contenders on one shape; pytest keeps one at a time."""
    return Workload(request.param)


@pytest.fixture(scope="session", params=PASSES)
def pass_(request: pytest.FixtureRequest) -> Pass:
    name: Pass = request.param
    return name


@pytest.fixture(scope="session")
def checked(workload: Workload, pass_: Pass) -> Workload:
    """The workload after FastLSTM's result in this pass has been found right, once for both contenders."""
    wrong = [str(report) for report in check(workload, [pass_]) if not report.ok]
    if wrong:
        pytest.fail(f"{workload.shape.name} {pass_}: {wrong[0]}", pytrace=False)
    return workload

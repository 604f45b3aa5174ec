"""Threads and processes around the kernels: more threads than cores, Python threads, forked workers."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import fastlstm
from fastlstm import FastLSTM

SPLITS = [(split, bulk_input) for split in ("rows", "units") for bulk_input in (False, True)]


def gradients(module: FastLSTM, x: Tensor) -> tuple[Tensor, ...]:
    y, (h_n, c_n) = module(x)
    return y, *torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), list(module.parameters()))


def test_more_threads_than_cores() -> None:
    module, x = FastLSTM(24, 40, 2, bidirectional=True), torch.randn(6, 9, 24)
    expected = gradients(module, x)
    torch.set_num_threads(13)
    torch.testing.assert_close(gradients(module, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 9}], ids=str)
def test_bitwise_equal_for_any_number_of_threads(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Also run to run. Slices of the weight gradients have 1024 rows, so T * B is more than one."""
    for T, B in ((3, 1), (2, 7), (45, 29)):
        module, x = FastLSTM(24, 70, **options, dtype=dtype), torch.randn(T, B, 24, dtype=dtype)
        for split, bulk_input in SPLITS:
            with fastlstm.force("packed", split=split, bulk_input=bulk_input):
                torch.set_num_threads(1)
                expected = gradients(module, x)
                for threads in (2, 2, 5):
                    torch.set_num_threads(threads)
                    for result, one in zip(gradients(module, x), expected, strict=True):
                        assert torch.equal(result, one), (T, B, split, bulk_input, threads)


def test_a_sequence_alone_equals_itself_in_a_batch() -> None:
    module, x = FastLSTM(24, 70), torch.randn(9, 61, 24)
    for split, bulk_input in SPLITS:
        with fastlstm.force("packed", split=split, bulk_input=bulk_input), torch.no_grad():
            whole = module(x)[0]
            for row in (0, 17, 60):
                assert torch.equal(module(x[:, row : row + 1])[0], whole[:, row : row + 1]), (split, bulk_input, row)


def test_inside_a_parallel_region() -> None:
    """Every thread of an OpenMP region calls the module: nobody comes to share the work of its time steps."""
    try:
        openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        start_region = openmp.GOMP_parallel
    except (OSError, AttributeError):
        pytest.skip("this torch has no GNU OpenMP")
    torch.set_num_threads(2)
    module, x = FastLSTM(24, 70), torch.randn(8, 3, 24)
    for split in ("rows", "units"):
        results: list[Tensor] = []

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def region(_: object, results: list[Tensor] = results) -> None:
            with torch.no_grad():
                results.append(module(x)[0])

        with fastlstm.force("packed", split=split), torch.no_grad():
            expected = module(x)[0]
            start_region(region, None, 2, 0)
        assert len(results) == 2
        for result in results:
            assert torch.equal(result, expected)


def test_the_mode_for_denormal_numbers_is_the_callers() -> None:
    """The kernels flush denormal numbers; afterwards they are there again, on this and on torch's other threads."""
    torch.set_num_threads(2)
    module = FastLSTM(24, 70)
    gradients(module, torch.randn(8, 3, 24))
    denormal = torch.full((1_000_000,), 1e-40)
    assert ((denormal * 1e30) > 0).all()  # equality would hold where both sides count as zero


def test_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    module = FastLSTM(24, 40, 2)
    inputs = [torch.randn(6, 1 + k, 24) for k in range(8)]
    expected = [gradients(module, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: gradients(module, x), inputs * 4))
    for k, result in enumerate(results):
        torch.testing.assert_close(result, expected[k % 8])


class _Outputs(torch.utils.data.Dataset[Tensor]):
    """Runs the module in the worker process."""

    def __init__(self, module: FastLSTM, inputs: Tensor) -> None:
        self.module, self.inputs = module, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.module(self.inputs[index])[0]


def test_forked_workers() -> None:
    torch.set_num_threads(2)
    module, inputs = FastLSTM(24, 300), torch.randn(4, 3, 5, 24)
    with torch.no_grad():
        expected = torch.stack([module(x)[0] for x in inputs])  # the parent's threads exist before the fork
    loader = DataLoader(
        _Outputs(module, inputs), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    torch.testing.assert_close(next(iter(loader)), expected)

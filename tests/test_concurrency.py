"""Threads and processes around the kernels: more threads than cores, Python threads, forked workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastlstm import FastLSTM


def gradients(module: FastLSTM, x: Tensor) -> tuple[Tensor, ...]:
    y, (h_n, c_n) = module(x)
    return y, *torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), list(module.parameters()))


def test_more_threads_than_cores() -> None:
    module, x = FastLSTM(24, 40, 2, bidirectional=True), torch.randn(6, 9, 24)
    expected = gradients(module, x)
    torch.set_num_threads(13)
    torch.testing.assert_close(gradients(module, x), expected)


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

"""Training in several processes: who they are, what they tell each other, and how their gradients meet.

`torchrun --nproc-per-node N -m fastlstm train ...` starts N processes of the same program. Each holds the whole model
and trains it on its own columns of every batch; DistributedDataParallel averages the gradients, so that all take the
same optimiser step. The first process, the main one, prepares the text, writes all files and speaks to the user. The
collective operations are those of torch.distributed with the backend gloo. `train.py` asks a `Group` for all of this;
`ALONE`, the group of a single process, answers without any process group.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastlstm.lm.config import LanguageModelError

_T = TypeVar("_T")

# What a launcher tells each of its processes; torch.distributed calls it the env:// initialisation.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Group:
    """The processes that train one model. All must call the same collective methods in the same order.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def columns(self, count: int) -> slice:
        """Which of `count` columns of a batch are this process's: as equal shares as can be, in order of rank."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def require_equal_shares(self, batch_size: int) -> None:
        """Raise LanguageModelError if the columns of a batch cannot be shared equally.

        The mean of the processes' mean losses is the loss of the batch only if all have the same number of columns.
        """
        if batch_size % self.size:
            raise LanguageModelError(
                f"batch_size must be a multiple of the number of processes, got {batch_size} and {self.size} processes"
            )

    def average_gradients(self, loss: Callable[..., _T], model: nn.Module) -> Callable[..., _T]:
        """A function like `loss`, a method of `model`, whose gradients are averaged over the processes. Collective.

        The parameters of the main process become those of all.
        """
        return loss if self.size == 1 else DistributedDataParallel(_Calls(loss, model))

    def sums(self, *values: float) -> list[float]:
        """The sums of the numbers over the processes, in fp64. Collective."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def largest(self, value: int) -> int:
        """The largest of the processes' numbers. Collective."""
        if self.size == 1:
            return value
        result = torch.tensor(value)
        distributed.all_reduce(result, distributed.ReduceOp.MAX)
        return int(result)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, alike in shape and dtype, in order of rank. Collective."""
        if self.size == 1:
            return [tensor]
        tensors = [tensor.new_empty(tensor.shape) for _ in range(self.size)]
        distributed.all_gather(tensors, tensor.contiguous())
        return tensors

    def on_main(self, call: Callable[[], object]) -> None:
        """Call `call` in the main process. Collective.

        Raises:
            LanguageModelError: in the other processes, if `call` raised something in the main one.
        """
        self._agreed(call if self.is_main else _nothing)

    def main_first(self, call: Callable[[], _T]) -> _T:
        """Call `call` in the main process and then in all others. Collective.

        Raises:
            LanguageModelError: `call` raised something in another process.
        """
        if self.is_main:
            result = self._agreed(call)
            self._agreed(_nothing)
        else:
            self._agreed(_nothing)
            result = self._agreed(call)
        return result

    def _agreed(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, if it succeeds in all processes; else its error or the first of the others'."""
        if self.size == 1:
            return call()
        try:
            result, own_error = [call()], None
        except Exception as error:
            result, own_error = [], error
        told: list[str | None] = [None] * self.size
        distributed.all_gather_object(told, None if own_error is None else self._told(own_error))
        if own_error is not None:
            raise own_error
        for message in told:
            if message is not None:
                raise LanguageModelError(message)
        return result[0]

    def _told(self, error: Exception) -> str:
        """What the other processes are told of an error in this one."""
        return str(error) if isinstance(error, LanguageModelError) else f"process {self.rank} failed: {error!r}"


ALONE = Group()


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Enters the group of processes that a launcher such as torchrun has started, or gives `ALONE` if none has.

    The cores are shared: without OMP_NUM_THREADS each process of a machine takes its part of torch's threads.
    (torchrun itself sets OMP_NUM_THREADS to 1 where the user has not set it.)
    """
    size = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in ENVIRONMENT) else 1
    if size == 1:
        yield ALONE
        return
    if "OMP_NUM_THREADS" not in os.environ:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(max(1, torch.get_num_threads() // neighbours))
    distributed.init_process_group("gloo")
    try:
        yield Group(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


class _Calls(nn.Module):
    """A module whose forward is a method of another module: DistributedDataParallel knows forward alone."""

    def __init__(self, method: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._method = method

    def forward(self, *arguments: Any) -> Any:
        return self._method(*arguments)


def _nothing() -> Any:
    return None

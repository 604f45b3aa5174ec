"""Two processes that train together over gloo, for tests/test_parallel.py.

They live as long as the tests that use them, because starting Python with torch takes seconds, and run functions of
the test file. A failure or a hang ends both, and the next test starts new ones.
"""

import multiprocessing
import os
import time
import traceback

import torch
from torch import distributed

from fastlstm.lm.parallel import joined

SIZE = 2
TIMEOUT_S = 60.0
# What torch is told to take before a process joins the group, whatever the number of cores.
THREADS_BEFORE = 6


class ProcessPair:
    """Runs a function in both processes at once.

    Attributes:
        threads: of torch in each process after it joined the group; [] before the first run.
    """

    def __init__(self):
        self.threads = []
        self._processes = []
        self._connections = []

    def run(self, function, *arguments):
        """What `function(group, *arguments)` returns in the two processes; both are picklable.

        Raises:
            AssertionError: it failed in one of them, with its traceback, or did not end.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        return self._replies()

    def stop(self):
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _start(self):
        context = multiprocessing.get_context("spawn")
        # The system chooses the port, and the store listens before anyone is told of it.
        self._store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self.threads = self._replies()

    def _replies(self):
        waiting, results = dict(enumerate(self._connections)), [None] * SIZE
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while waiting:
                ready = multiprocessing.connection.wait(waiting.values(), deadline - time.monotonic())
                assert ready, f"process {' and '.join(map(str, waiting))} did not answer within {TIMEOUT_S:g} s"
                for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                    error, results[rank] = waiting.pop(rank).recv()
                    assert error is None, f"in process {rank}:\n{error}"
        except (AssertionError, EOFError):
            self.stop()
            raise
        return results


def _serve(rank, port, connection):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already, as under torchrun
    }
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(THREADS_BEFORE)
    with joined() as group:
        connection.send((None, torch.get_num_threads()))
        torch.set_num_threads(1)
        while True:
            try:
                function, arguments = connection.recv()
            except EOFError:  # the tests are over
                return
            torch.manual_seed(0)
            try:
                reply = None, function(group, *arguments)
            except Exception:
                reply = traceback.format_exc(), None
            connection.send(reply)

"""Shared by all tests: a fixed random state and one thread, whatever ran before.

The tests' problems are small, and on a busy machine threads that wait for each other cost more than they
compute. A test of threading asks for its threads with torch.set_num_threads itself.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed_and_one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)

"""The tests of the emulated CUDA operators notice mistakes: each of host_cuda/mutations.py, planted one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from host_cuda.mutations import MUTATIONS, build, run

NONE = -1
NUMBERS = range(len(MUTATIONS))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[int, Future[str]]]:
    """Of the mutations that this session tests: what goes wrong with them. Two run at a time."""
    library = build()
    selected = {item.callspec.params["number"] for item in request.session.items if "outcomes" in item.fixturenames}
    everything = tuple(dict.fromkeys(case for mutation in MUTATIONS for case in mutation.cases))
    with ThreadPoolExecutor(2) as pool:
        futures = {number: pool.submit(run, library, number, MUTATIONS[number].cases) for number in selected - {NONE}}
        if NONE in selected:
            futures[NONE] = pool.submit(run, library, NONE, everything, rounds=2)
        yield futures


@pytest.mark.parametrize("number", [NONE], ids=["nothing"])
def test_no_mutation(outcomes: dict[int, Future[str]], number: int) -> None:
    """The cases that mutations fail are right without one."""
    assert outcomes[number].result() == ""


@pytest.mark.parametrize("number", NUMBERS, ids=[mutation.name.replace(" ", "-") for mutation in MUTATIONS])
def test_mutation_is_noticed(outcomes: dict[int, Future[str]], number: int) -> None:
    mutation = MUTATIONS[number]
    assert outcomes[number].result(), f"'{mutation.name}' went unnoticed: {mutation.why}"

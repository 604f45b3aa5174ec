"""Interleaved timing of several callables in one process; knows nothing of LSTMs.

`measure` is called by fastlstm/bench/runner.py for each shape and pass. The contenders take turns (A B A B
…), so that a change of clock speed or a noisy neighbour hits both alike; each turn repeats the call until the
timer's resolution no longer matters; medians and interquartile ranges resist outliers.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender.

    Attributes:
        median_s: median over the samples of the mean seconds per call in a sample.
        spread: interquartile range of the samples divided by their median.
        samples: number of samples, that is, of turns this contender took.
        calls_per_sample: consecutive calls averaged in one sample.
    """

    median_s: float
    spread: float
    samples: int
    calls_per_sample: int


def summarize(samples: list[float], calls_per_sample: int) -> Timing:
    """Median and spread of at least two samples (seconds per call)."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(quartiles[1], (quartiles[2] - quartiles[0]) / quartiles[1], len(samples), calls_per_sample)


def measure(
    contenders: Mapping[str, Callable[[], None]],
    *,
    budget_s: float,
    sample_s: float = 0.02,
    min_samples: int = 5,
    max_samples: int = 400,
    synchronize: Callable[[], None] = lambda: None,
    seconds_of: Callable[[Callable[[], None]], float] | None = None,
) -> dict[str, Timing]:
    """Times `contenders` in turns for about `budget_s` seconds in total.

    Args:
        contenders: name -> a call without arguments. Each should have run before (its correctness check
            does).
        budget_s: seconds to spend on all contenders together.
        sample_s: least seconds of one sample; short calls are repeated within a sample to reach it.
        min_samples: samples to take of each contender even if slow calls exceed the budget; at least 2.
        max_samples: samples of each contender after which the rest of the budget is left unused.
        synchronize: waits for an asynchronous device; called around every sample.
        seconds_of: runs a function and returns its seconds by a clock of its own, such as a device's; by default
            time.perf_counter() counts from one `synchronize` to the next.

    Returns:
        name -> Timing, in the order of `contenders`.
    """

    def of_host(run: Callable[[], None]) -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    def sample(call: Callable[[], None], calls: int) -> float:
        def run() -> None:
            for _ in range(calls):
                call()

        return (seconds_of or of_host)(run) / calls

    # As in timeit: a collection inside one contender's turn would be charged to it at random.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        calls = {name: _calls_for(call, sample, sample_s) for name, call in contenders.items()}
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        deadline = time.perf_counter() + budget_s
        for turn in range(max_samples):
            if turn >= min_samples and time.perf_counter() >= deadline:
                break
            for name, call in contenders.items():
                samples[name].append(sample(call, calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: summarize(samples[name], calls[name]) for name in contenders}


def _calls_for(call: Callable[[], None], sample: Callable[[Callable[[], None], int], float], sample_s: float) -> int:
    """Calls that fill one sample; finding the number doubles as the warm-up."""
    calls = 1
    while True:
        seconds = sample(call, calls)
        if seconds * calls >= sample_s / 2:
            return max(1, math.ceil(sample_s / seconds))
        calls *= 4

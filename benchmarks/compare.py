"""Compares two JSON files of `fastlstm bench`: what became faster or slower relative to nn.LSTM.

    python benchmarks/compare.py OLD.json NEW.json [--fail-below 0.95]

The speed of a shared machine drifts from run to run, so what is compared is the speed relative to nn.LSTM in
the same run. A change is marked when it exceeds the spreads of both runs together.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlstm.bench.record import TIMES, Comparison, format_rate, format_ratio, load, markdown_table

_CONTEXT = (
    ("machine", "cpu"),
    ("machine", "cores"),
    ("machine", "gpu"),
    ("versions", "torch"),
    ("versions", "cudnn"),
    ("versions", "fastlstm"),
    ("flags", "threads"),
    ("flags", "isa"),
    ("flags", "fp32_precision"),
)


def change(old: Comparison, new: Comparison) -> float | None:
    """How many times faster `new` is, relative to nn.LSTM where that could be timed; None without timings."""
    if old.ratio is not None and new.ratio is not None:
        return new.ratio / old.ratio
    if old.ours.median_s is not None and new.ours.median_s is not None:
        return old.ours.median_s / new.ours.median_s
    return None


def verdict(old: Comparison | None, new: Comparison | None) -> str:
    """One word on the change: faster, slower, same, or what is missing."""
    if old is None:
        return "new"
    if new is None:
        return "missing"
    factor = change(old, new)
    if factor is None:
        return "error" if new.ours.error else "was error"
    if abs(math.log(factor)) <= math.hypot(old.spread, new.spread):
        return "same"
    return "faster" if factor > 1 else "slower"


def context_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What besides FastLSTM differs between the two runs."""
    values = ((section, key, old[section].get(key), new[section].get(key)) for section, key in _CONTEXT)
    return [f"{section} {key}: {a} -> {b}" for section, key, a, b in values if a != b]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison; returns 1 if a change is below --fail-below, else 0, and 2 for a bad file."""
    parser = argparse.ArgumentParser(description="Compare two JSON files of `fastlstm bench`.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--fail-below",
        type=float,
        metavar="R",
        help="exit 1 if a shape's speed relative to nn.LSTM fell below R times the old one, or has no timing",
    )
    options = parser.parse_args(arguments)
    try:
        old_document, old_list = load(options.old)
        new_document, new_list = load(options.new)
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    old, new = ({c.key: c for c in comparisons} for comparisons in (old_list, new_list))
    rows, failed = [], []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        factor = change(before, after) if before and after else None
        if options.fail_below is not None and before is not None and (factor or 0.0) < options.fail_below:
            failed.append(" ".join(key))
        rows.append(
            (
                *key,
                before.verdict if before else "-",
                after.verdict if after else "-",
                f"{factor:.2f}{TIMES}" if factor is not None else "-",
                format_rate(before.ours.tokens_per_s if before else None),
                format_rate(after.ours.tokens_per_s if after else None),
                verdict(before, after),
            )
        )
    for line in context_changes(old_document, new_document):
        print(f"differs: {line}")
    header = (
        "shape",
        "pass",
        "device",
        "old ratio",
        "new ratio",
        "change",
        "old tokens/s",
        "new tokens/s",
        "",
    )
    print(markdown_table(header, rows, numeric=range(3, 8)))
    common = [factor for key in old.keys() & new.keys() if (factor := change(old[key], new[key])) is not None]
    if common:
        mean = math.exp(sum(map(math.log, common)) / len(common))
        print(f"geometric mean of {len(common)} changes: {format_ratio(mean)}")
    if failed:
        print(f"below {options.fail_below:g}: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

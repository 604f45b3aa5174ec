"""Each CPU kernel against the machine's roofs, measured in the same run.

    python benchmarks/roofline.py --json FILE

The roofs are multiply-adds on registers alone and reading from each level of the memory hierarchy, by all threads at
once. A kernel's bound is the larger of its multiply-adds at the first roof and its compulsory bytes at the rate of
the footprint nearest to them; the last column says how much of that bound it reaches. Kernels without products are
judged by bytes alone: cells also compute five exponentials per unit, which no roof accounts for.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

import fastlstm
from fastlstm import _C
from fastlstm.bench import record
from fastlstm.bench.runner import num_threads


def roofline(threads: int, seconds_each: float) -> dict[str, Any]:
    """Rates of all kernels and the share of its bound that each one reaches, as plain values for JSON."""
    timings = _C.time_kernels(threads, seconds_each)
    roofs = {t["sizes"]: t for t in timings if t["kernel"] == "read"}
    levels = sorted((int(sizes.split()[0]) * 1024, t["bytes"] / t["seconds"]) for sizes, t in roofs.items())
    peak = next(t["multiply_adds"] / t["seconds"] for t in timings if t["kernel"] == "multiply_add")
    rows = []
    for t in timings:
        _, bandwidth = min(levels, key=lambda level: abs(math.log(level[0] / max(t["bytes"], 1))))
        bound = max(t["multiply_adds"] / peak, t["bytes"] / bandwidth)
        row = {"kernel": t["kernel"], "sizes": t["sizes"], "seconds": t["seconds"]}
        row["gflops"] = 2 * t["multiply_adds"] / t["seconds"] / 1e9
        row["gbytes_per_s"] = t["bytes"] / t["seconds"] / 1e9
        if t["kernel"] not in ("multiply_add", "read"):
            row["bound"] = "multiply" if t["multiply_adds"] / peak >= t["bytes"] / bandwidth else "bytes"
            row["share_of_bound"] = bound / t["seconds"]
        rows.append(row)
    settings = {"isa": _C.isa(), "threads": threads, "seconds_each": seconds_each}
    return {"machine": record.machine(), "versions": record.versions(), "settings": settings, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=fastlstm.available_isas(), help="another instruction set than the best")
    parser.add_argument("--seconds", type=float, default=0.2, help="per kernel and size")
    arguments = parser.parse_args()
    if arguments.json:
        record.ensure_writable(arguments.json)
    with num_threads(arguments.threads), fastlstm.force(isa=arguments.isa):
        document = roofline(arguments.threads, arguments.seconds)
    print(f"per thread, {document['settings']['isa']}, {arguments.threads} threads")
    print(f"{'kernel':<24} {'sizes':<36} {'GFLOP/s':>8} {'GB/s':>7} {'bound':>9} {'reached':>8}")
    for row in document["rows"]:
        reached = f"{row['bound']:>9} {row['share_of_bound']:>8.0%}" if "bound" in row else ""
        print(f"{row['kernel']:<24} {row['sizes']:<36} {row['gflops']:8.1f} {row['gbytes_per_s']:7.1f} {reached}")
    if arguments.json:
        record.write(arguments.json, document)


if __name__ == "__main__":
    main()

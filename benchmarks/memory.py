"""Peak memory of a call of FastLSTM, as it is and with recompute=True, and of nn.LSTM. Linux only.

    python benchmarks/memory.py --json FILE

Each figure comes from a process of its own: the peak of its resident memory while the call runs three times, less what
was resident before: inputs and weights are not counted. The contender has run on a tiny shape by then, so neither are
libraries and thread stacks.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from fastlstm.bench import record, shapes
from fastlstm.bench.workload import Pass, Workload

PASSES: tuple[Pass, ...] = get_args(Pass)
CONTENDERS = ("fastlstm", "recompute", "torch")  # the second is FastLSTM too


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def peak_bytes(shape: shapes.Shape, contender: str, pass_: Pass) -> int:
    """Bytes that a call needs at its peak; to be asked once per process."""

    def step_of(shape: shapes.Shape) -> Callable[[], None]:
        workload = Workload(shape)
        if contender != "recompute":
            return workload.step(contender, pass_)
        workload.modules["fastlstm"].recompute = True
        return workload.step("fastlstm", pass_)

    step_of(replace(shape, T=2 if shape.T > 1 else 1, B=2, I=4, H=4, P=min(shape.P, 3)))()
    step = step_of(shape)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def measure(shape: shapes.Shape, pass_: Pass) -> dict[str, Any]:
    """A row: the peak of each contender, in bytes."""
    row: dict[str, Any] = {"shape": shape.name, "pass": pass_}
    for contender in CONTENDERS:
        command = [sys.executable, __file__, "--shapes", shape.name, "--one", contender, pass_]
        row[contender] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="T100-B32-H128,T100-B32-H512,T50-B64-H1024,T100-B32-H512-L2-bi")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "PASS"), help="print this figure alone, in bytes")
    arguments = parser.parse_args()
    selected = shapes.select(arguments.shapes)
    for shape in selected:
        if shape.kind == "cell":
            parser.error(f"--shapes must be of layers, which recompute can be asked of, got {shape.name}")
    if arguments.one:
        contender, pass_ = arguments.one
        print(peak_bytes(selected[0], contender, pass_))
        return
    if arguments.json:
        record.ensure_writable(arguments.json)
    rows = [measure(shape, pass_) for shape in selected for pass_ in PASSES]
    print(f"{'shape':<22} {'pass':<17} {'FastLSTM':>10} {'recompute':>10} {'nn.LSTM':>10} {'ratios':>11}")
    for row in rows:
        ours, recomputed, theirs = (row[contender] / 1e6 for contender in CONTENDERS)
        print(
            f"{row['shape']:<22} {row['pass']:<17} {ours:>7.1f} MB {recomputed:>7.1f} MB {theirs:>7.1f} MB "
            f"{ours / theirs:>5.2f} {recomputed / theirs:>5.2f}"
        )
    if arguments.json:
        record.write(arguments.json, {"machine": record.machine(), "versions": record.versions(), "rows": rows})


if __name__ == "__main__":
    main()

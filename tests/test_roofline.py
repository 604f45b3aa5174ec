"""benchmarks/roofline.py: runs, and puts every kernel in relation to both roofs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastlstm

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "roofline.py"


@pytest.mark.parametrize("isa", fastlstm.available_isas())
def test_every_kernel_is_measured(isa: str, tmp_path: Path) -> None:
    path = tmp_path / "roofline.json"
    command = [sys.executable, str(SCRIPT), "--isa", isa, "--threads", "2", "--seconds", "0.001", "--json", str(path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    document = json.loads(path.read_text())
    assert (document["settings"]["isa"], document["settings"]["threads"]) == (isa, 2)
    assert document["versions"] and document["machine"]
    rows = document["rows"]
    assert len({(row["kernel"], row["sizes"]) for row in rows}) == len(rows)
    kernels = {row["kernel"] for row in rows}
    assert {"multiply_add", "read", "forward step, packed", "backward cell", "weight gradients"} <= kernels
    for row in rows:
        assert row["seconds"] > 0 and row["kernel"] in shown
        assert row["gflops"] > 0 or row["gbytes_per_s"] > 0
        if row["kernel"] not in ("multiply_add", "read"):
            assert row["share_of_bound"] > 0 and row["bound"] in ("multiply", "bytes")

"""FastLSTM's memory does not grow with the sequence where it need not; benchmarks/memory.py measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("contender", "pass_", "most"),
    [("fastlstm", "forward", 0.6), ("fastlstm", "forward_backward", 2.2), ("recompute", "forward_backward", 0.9)],
)
def test_gates_and_their_gradients(contender: str, pass_: str, most: float) -> None:
    """In inference there are no gates of all steps, in training the saved ones, if at all, not their gradients."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import memory, fastlstm\n"
        "with fastlstm.force('packed', bulk_input=True):\n"
        f"    print(memory.peak_bytes(memory.shapes.Shape(T=2000, B=32, I=16, H=64), {contender!r}, {pass_!r}))"
    )
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    gates, y = 2000 * 32 * 4 * 64 * 4, 2000 * 32 * 64 * 4  # bytes
    saved = {"fastlstm": gates + y, "recompute": y}  # the cell states are, in any case
    least = y if pass_ == "forward" else y + saved[contender]
    assert least <= peak <= most * gates


def test_all_contenders_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    command = [sys.executable, str(SCRIPT), "--shapes", "T256-B8-H64", "--json", str(path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    document = json.loads(path.read_text())
    assert document["machine"] and document["versions"]
    assert [row["pass"] for row in document["rows"]] == ["forward", "forward_backward"]
    for row in document["rows"]:
        assert row["shape"] == "T256-B8-H64" and row["shape"] in shown
        assert row["fastlstm"] > 0 and row["recompute"] > 0 and row["torch"] > 0

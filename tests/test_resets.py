"""benchmarks/resets.py: runs, and times nothing whose result is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastlstm.bench.shapes import Shape

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
ARGUMENTS = ["resets.py", "--T", "9", "--B", "5", "--I", "3", "--H", "8", "--seconds", "0", "--threads", "1"]


@pytest.fixture
def resets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import resets

    return resets


def test_every_contender_is_measured(resets, monkeypatch, capsys, tmp_path: Path) -> None:
    path = tmp_path / "resets.json"
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, "--share", "0.3", "--json", str(path)])
    resets.main()
    shown = capsys.readouterr().out
    document = json.loads(path.read_text())
    assert document["machine"] and document["versions"] and document["flags"]["threads"] == 1
    assert document["settings"] == {"shape": "T9-B5-I3-H8", "share": 0.3, "seconds": 0.0}
    assert 0 < document["resets"] < 9 * 5
    medians = {row["contender"]: row["median_s"] for row in document["rows"]}
    assert list(medians) == list(resets.CONTENDERS)
    assert all(seconds > 0 for seconds in medians.values()) and all(name in shown for name in medians)
    assert document["ratios"]["loop / reset_mask"]["ratio"] == medians["loop"] / medians["reset_mask"]
    assert (
        document["ratios"]["reset_mask / no resets"]["ratio"] == medians["reset_mask"] / medians["fastlstm_no_resets"]
    )


@pytest.mark.parametrize("contender", ["reset_mask", "fastlstm_no_resets"])
def test_a_wrong_result_is_not_timed(resets, monkeypatch, contender: str) -> None:
    right = {"reset_mask": resets.one_call, "fastlstm_no_resets": resets.without_resets}
    (wrong,) = (forward for name, forward in right.items() if name != contender)
    monkeypatch.setitem(resets.CONTENDERS, contender, ("fastlstm", wrong))
    with pytest.raises(RuntimeError, match="wrong result: y: error"):
        resets.run(Shape(T=9, B=5, I=3, H=8, state=True), 0.3, seconds=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "1.5"], "--share must be in [0, 1], got 1.5"),
        (["--T", "0"], "sizes and threads must be at least 1"),
        (["--json", "/nowhere/resets.json"], "cannot write /nowhere/resets.json"),
    ],
)
def test_mistakes_in_the_arguments(resets, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, *arguments])
    with pytest.raises(SystemExit) as exit:
        resets.main()
    assert exit.value.code == 2 and message in capsys.readouterr().err

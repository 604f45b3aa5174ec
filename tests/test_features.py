"""benchmarks/features.py: every group runs, compares its contenders before it times them, and becomes a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import features

    return features


def test_every_group_is_measured_and_shown(features: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import table

    path, page = tmp_path / "features.json", tmp_path / "features.md"
    arguments = ["features.py", "--shape", "5", "3", "8", "--seconds", "0", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    features.main()
    document = json.loads(path.read_text())
    assert document["flags"]["threads"] == 1 and document["settings"] == {"threads": 1, "seconds_each": 0.0}
    assert [group["group"].split(" T5-B3-H8")[0] for group in document["groups"]] == [
        "lengths",
        "gradients per sample",
        "regularisers",
        "states",
    ]
    for group, (make, _) in zip(document["groups"], features.GROUPS.values(), strict=True):
        medians = {row["contender"]: row["median_s"] for row in group["rows"]}
        assert min(medians.values()) > 0
        for ratio, (above, below) in zip(group["ratios"], make(5, 3, 8).ratios.values(), strict=True):
            assert ratio["ratio"] == medians[above] / medians[below]
    page.write_text(f"{table.BEGIN}\n{table.END}\n")
    assert table.main([str(path), "--readme", str(page), "--check"]) == 1
    assert table.main([str(path), "--readme", str(page)]) == 0
    assert table.main([str(path), "--readme", str(page), "--check"]) == 0
    assert page.read_text().count("\n| ") == 2 + sum(len(group["ratios"]) for group in document["groups"])


def test_contenders_that_disagree_are_not_timed(features: Any) -> None:
    x, wrong = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    steps = {"right": lambda: x.sum().backward(), "wrong": lambda: (2 * wrong).sum().backward()}
    with pytest.raises(AssertionError, match="not close"):
        features.compared(steps, {"right": [x], "wrong": [wrong]})


def test_mistakes_in_the_arguments(
    features: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--shape", "0", "1", "1"], "sizes and threads must be at least 1"),
        (["--json", "/nowhere/features.json"], "cannot write /nowhere/features.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["features.py", *arguments])
        with pytest.raises(SystemExit):
            features.main()
        assert message in capsys.readouterr().err

"""The command `fastlstm`: what it prints and writes, exit codes, one line for each mistake of the user."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import fastlstm
from fastlstm import _ops, cli, verify
from fastlstm.bench import runner
from fastlstm.bench.record import Comparison, load
from fastlstm.bench.shapes import Shape
from fastlstm.bench.timing import Timing

TINY = Shape(T=2, B=3, I=4, H=5, stands_for="a test")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def assert_one_line_error(result: Result, code: int, text: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("fastlstm: ") and result.stderr.count("\n") == 1
    assert text in result.stderr


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the operator wrong by 1e-2."""
    right = _ops.lstm

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n, c_n = right(*args, **kwargs)
        return y + 1e-2, h_n, c_n

    monkeypatch.setattr(_ops, "lstm", wrong)


# info


def test_info_prints_the_build() -> None:
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert fastlstm.__version__ in result.output and torch.__version__ in result.output
    assert "plan" not in result.output


def test_info_plans_a_shape_as_json() -> None:
    result = invoke("info", "--T", "10", "--B", "2", "--H", "32", "--layers", "2", "--training", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert data["plan"] == fastlstm.plan(T=10, B=2, I=32, H=32, L=2, training=True).to_dict()
    assert data["build"] == fastlstm.build_info()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--T", "10"], "a plan needs --T, --B and --H"),
        (["--T", "0", "--B", "1", "--H", "8"], "T must be at least 1, got 0"),
        (["--T", "1", "--B", "1", "--H", "8", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
    ],
)
def test_info_refuses(arguments: list[str], message: str) -> None:
    assert_one_line_error(invoke("info", *arguments), 2, message)


# verify


def test_verify_prints_a_table_and_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_shapes", lambda quick: [TINY])
    result = invoke("verify", "--quick", "--threads", "1")
    assert result.exit_code == 0, result.output
    for isa in fastlstm.available_isas():
        assert isa in result.output
    assert " 0 wrong" in result.output


def test_verify_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_shapes", lambda quick: [TINY])
    plant(monkeypatch)
    result = invoke("verify")
    assert result.exit_code == 1
    assert "FAILED T2-B3-I4-H5 float32, plan stepwise" in result.output
    assert "y: error 0.01" in " ".join(result.output.split())


def test_verify_refuses_no_threads() -> None:
    assert_one_line_error(invoke("verify", "--threads", "0"), 2, "threads must be at least 1, got 0")


# bench


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks one tiny shape with made timings, whatever --shapes names."""
    made = {"fastlstm": Timing(0.002, 0.1, 5, 1), "torch": Timing(0.001, 0.1, 5, 1)}
    monkeypatch.setattr("fastlstm.bench.shapes.select", lambda text, dtype: [TINY])
    monkeypatch.setattr(runner, "measure", lambda contenders, **_: {name: made[name] for name in contenders})


@pytest.mark.usefixtures("tiny")
def test_bench_writes_json_and_plot_and_shows_losing_shapes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    json_path, plot_path = tmp_path / "run.json", tmp_path / "run.png"
    result = invoke("bench", "--json", str(json_path), "--plot", str(plot_path), "--threads", "1", "--budget", "1")
    assert result.exit_code == 0, result.output
    assert "slower" in result.output and "1 slower than nn.LSTM" in result.output
    document, comparisons = load(json_path)
    assert [c.ours.pass_ for c in comparisons] == ["forward", "forward_backward"]
    assert [c.ratio for c in comparisons] == [0.5, 0.5]
    assert document["settings"]["budget_s"] == 1
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.png"]


@pytest.mark.usefixtures("tiny")
def test_bench_fails_if_a_result_is_wrong_and_still_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    result = invoke("bench", "--passes", "forward", "--json", str(tmp_path / "run.json"))
    assert result.exit_code == 1
    assert "wrong result: y: error 0.01" in " ".join(result.output.split())
    assert load(tmp_path / "run.json")[1][0].ours.error is not None


@pytest.mark.usefixtures("tiny")
def test_bench_interrupted_shows_what_it_has_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner.run

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Comparison]:
        yield next(run(*args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    result = invoke("bench", "--json", str(tmp_path / "run.json"))
    assert result.exit_code == 130
    assert TINY.name in result.output
    assert list(tmp_path.iterdir()) == []


def test_bench_lists_its_shapes() -> None:
    result = invoke("bench", "--list")
    assert result.exit_code == 0
    assert "T100-B32-H512-packed" in result.output and "preset `seed`" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "nope"], "unknown shape 'nope'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--passes", "backward"], "unknown pass 'backward'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--budget", "0"], "budget must be more than 0 seconds"),
        (["--json", "/nonexistent/run.json"], "cannot write /nonexistent/run.json"),
        (["--plot", "run.gif"], "must end in .png"),
    ],
)
def test_bench_refuses_before_it_runs(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Iterator[Comparison]:
        raise AssertionError("the benchmark started")

    monkeypatch.setattr(runner, "run", unreachable)
    assert_one_line_error(invoke("bench", *arguments), 2, message)


# The whole command


def test_an_unknown_command_is_refused() -> None:
    result = invoke("frobnicate")
    assert result.exit_code == 2
    assert "frobnicate" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["train", "generate", "demo"])
def test_language_model_commands_show_their_own_help(command: str) -> None:
    pytest.importorskip("tokenizers")
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"fastlstm {command}" in result.output and "--threads" in result.output


def test_without_typer_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    spec = importlib.util.spec_from_file_location("cli_without_typer", cli.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(SystemExit) as stop:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert stop.value.code == 'fastlstm: this command needs typer: pip install "fastlstm[cli]"'


def test_without_tokenizers_only_the_language_model_is_missing() -> None:
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from typer.testing import CliRunner; from fastlstm.cli import app\n"
        "for command in ('info', 'train'):\n"
        "    result = CliRunner().invoke(app, [command])\n"
        "    print(result.exit_code, result.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == '0 \n2 fastlstm: train needs tokenizers: pip install "fastlstm[lm]"\n\n'


def test_python_dash_m(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fastlstm", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fastlstm", run_name="__main__")
    assert stop.value.code == 0
    output = capsys.readouterr().out
    for command in ("info", "verify", "bench", "train", "generate", "demo"):
        assert f"  {command} " in output

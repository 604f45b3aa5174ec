"""fastlstm.bench and the scripts in benchmarks/: shapes, timing, records, tables; never anything's speed."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlstm
from fastlstm import _ops
from fastlstm.bench import plot, record, runner, timing
from fastlstm.bench.record import Comparison, Row
from fastlstm.bench.shapes import GPU_SHAPES, SHAPES, Shape, select
from fastlstm.bench.timing import Timing
from fastlstm.bench.workload import CONTENDERS, PASSES, Workload
from fastlstm.verify import check

ROOT = Path(__file__).parents[1]
TINY = Shape(T=2, B=3, I=4, H=5, stands_for="a test")


def script(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def comparison(shape: Shape, pass_: str, ours_s: float, theirs_s: float, spread: float = 0.01) -> Comparison:
    """A comparison with made timings."""
    base = replace(runner._row(shape, "cpu", "forward", "fastlstm"), pass_=pass_)
    ours = runner._timed(replace(base, plan={"forward": "packed"}), Timing(ours_s, spread, 9, 1))
    theirs = runner._timed(replace(base, contender="torch"), Timing(theirs_s, spread, 9, 1))
    return Comparison(ours, theirs)


def write_document(path: Path, comparisons: list[Comparison]) -> Path:
    rows = [row for c in comparisons for row in (c.ours, c.theirs) if row is not None]
    record.write(path, record.document(rows, device="cpu", settings={}))
    return path


# Shapes


def test_shape_names_are_unique_and_told_what_they_stand_for() -> None:
    everything = (*SHAPES, *GPU_SHAPES)
    assert len({shape.name for shape in everything}) == len(everything)
    assert all(shape.stands_for for shape in everything)


def test_names_follow_from_the_fields() -> None:
    assert Shape(T=3, B=2, I=5, H=8, P=4, layers=2, directions=2, bias=False).name == ("T3-B2-I5-H8-proj4-L2-bi-nobias")
    assert Shape(T=1, B=2, I=8, H=8, kind="cell", dtype="bfloat16").name == "cell-B2-H8-bf16"
    assert replace(TINY, packed=True, autocast=True).name == "T2-B3-I4-H5-packed-autocast"


def test_groups_partition_all_shapes() -> None:
    assert select("all") == list(SHAPES)
    core = select("core")
    assert all(shape.dtype == "float32" and not shape.mixed for shape in core)
    parts = ("dense", "streaming", "packed", "proj", "stacked", "cell", "lowprec")
    assert sorted(s.name for part in parts for s in select(part)) == sorted(s.name for s in SHAPES)
    assert {shape.name for shape in SHAPES} - {s.name for s in core} == {s.name for s in select("lowprec")}


def test_the_shapes_of_gpus_are_a_group_apart() -> None:
    assert select("gpu") == list(GPU_SHAPES)
    assert {s.dtype for s in GPU_SHAPES} == {"bfloat16", "float16", "float32"}
    assert {(512, B, H) for H in (128, 256, 512, 768, 1024, 2048) for B in (1, 16, 64, 128, 256)} <= {
        (s.T, s.B, s.H) for s in GPU_SHAPES if s.dtype == "bfloat16"
    }


def test_select_takes_names_in_any_case_once_and_in_order() -> None:
    names = [shape.name for shape in select("t1-b1-h256, T100-B32-H128,packed,T1-B1-H256")]
    assert names == ["T100-B32-H128", "T1-B1-H256", "T100-B32-H128-packed", "T100-B32-H512-packed"]


def test_select_in_another_dtype_drops_mixed_shapes_and_duplicates() -> None:
    selected = select("T100-B32-H128,lowprec", "bf16")
    assert [shape.name for shape in selected] == ["T100-B32-H128-bf16", "T100-B32-H512-bf16"]
    assert selected[0].stands_for == "word language model, preset `seed`: truncated BPTT over 100 steps"
    assert "T100-B32-H128-autocast" in [shape.name for shape in select("lowprec", "float32")]


@pytest.mark.parametrize(
    ("text", "dtype", "message"),
    [
        ("nope", None, "unknown shape 'nope': expected a group"),
        ("", None, "no shape to run"),
        ("core", "int8", "unknown dtype 'int8': expected one of float32"),
        ("T100-B32-H128-autocast", "fp16", "no shape to run for --shapes .* with --dtype fp16"),
    ],
)
def test_select_refuses(text: str, dtype: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(text, dtype)


def test_packed_lengths_fall_from_t_to_half() -> None:
    shape = Shape(T=100, B=5, I=1, H=1, packed=True)
    assert shape.lengths == (100, 88, 75, 63, 50)
    assert shape.tokens == 376
    assert replace(shape, packed=False).tokens == 500


def test_a_cell_has_one_step() -> None:
    with pytest.raises(ValueError, match="a cell has T=1"):
        Shape(T=2, B=1, I=1, H=1, kind="cell")


# Timing


class Clock:
    """A clock that only calls advance, in place of time.perf_counter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr("fastlstm.bench.timing.time.perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.calls.append(name)
            assert not gc.isenabled()

        return run


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    result = timing.measure({"a": clock.call("a", 1.0), "b": clock.call("b", 2.0)}, budget_s=9.0, min_samples=2)
    # One warm-up call each, then turns until the budget is spent.
    assert clock.calls == ["a", "b", *["a", "b"] * 3]
    assert result == {"a": Timing(1.0, 0.0, 3, 1), "b": Timing(2.0, 0.0, 3, 1)}
    assert gc.isenabled()


def test_slow_calls_are_sampled_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert timing.measure({"a": clock.call("a", 100.0)}, budget_s=1.0, min_samples=4)["a"].samples == 4


def test_short_calls_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    result = timing.measure({"a": clock.call("a", 2.0**-20)}, budget_s=0.1, sample_s=2.0**-6)["a"]
    assert result.calls_per_sample == 2**14
    assert result.median_s == pytest.approx(2.0**-20)


def test_the_device_is_awaited_around_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    call = clock.call("a", 1.0)
    timing.measure({"a": call}, budget_s=0.0, min_samples=2, synchronize=lambda: clock.calls.append("sync"))
    assert clock.calls == ["sync", "a", "sync"] * 3


def test_a_device_may_have_a_clock_of_its_own() -> None:
    calls = []

    def seconds_of(run: Callable[[], None]) -> float:
        run()
        return 3.0

    result = timing.measure({"a": lambda: calls.append("a")}, budget_s=0.0, min_samples=2, seconds_of=seconds_of)["a"]
    assert result.median_s == 3.0
    assert calls


def test_a_failing_call_leaves_the_collector_on() -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timing.measure({"a": fail}, budget_s=0.0)
    assert gc.isenabled()


def test_median_and_spread() -> None:
    assert timing.summarize([4.0, 1.0, 2.0, 3.0, 100.0], 7) == Timing(3.0, (4.0 - 2.0) / 3.0, 5, 7)


# Workloads


@pytest.mark.parametrize(
    "shape",
    [
        TINY,
        replace(TINY, packed=True, state=True, layers=2, directions=2),
        replace(TINY, P=2, bias=False),
        Shape(T=1, B=3, I=4, H=5, kind="cell", state=True),
        replace(TINY, autocast=True),
        replace(TINY, bf16_products=True),
        replace(TINY, dtype="float16"),
    ],
    ids=lambda shape: shape.name,
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_workloads_are_right_and_steps_leave_all_gradients(shape: Shape) -> None:
    workload = Workload(shape)
    reports = check(workload)
    assert [str(report) for report in reports if not report.ok] == []
    parameters = dict(workload.modules["fastlstm"].named_parameters())
    assert {f"d_{name}" for name in parameters} | {"d_x"} <= {report.name for report in reports}
    with workload.precision():
        workload.step("fastlstm", "forward")()
        assert workload.x.grad is None
        versions = {name: parameter._version for name, parameter in parameters.items()}
        workload.step("fastlstm", "forward_backward")()
    for tensor in (workload.x, *workload.state, *parameters.values()):
        assert tensor.grad is not None
    assert all(parameter._version > versions[name] for name, parameter in parameters.items())


def test_equal_seeds_give_equal_workloads_and_leave_the_users_seed_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = Workload(TINY, seed=1), Workload(TINY, seed=1)
    assert torch.equal(torch.rand(1), expected)
    for contender in CONTENDERS:
        a, b = (w.results(contender, "forward_backward") for w in (first, second))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_precision_switch_is_restored() -> None:
    mkldnn: Any = torch.backends.mkldnn
    rnn = mkldnn.rnn
    before = rnn.fp32_precision
    with pytest.raises(RuntimeError, match="stop"), Workload(replace(TINY, bf16_products=True)).precision():
        assert rnn.fp32_precision == "bf16"
        raise RuntimeError("stop")
    assert rnn.fp32_precision == before


def test_a_shape_can_forbid_tf32() -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.rnn.fp32_precision
    shape = replace(TINY, ieee=True)
    assert shape.name.endswith("-ieee")
    with Workload(shape).precision():
        assert cudnn.rnn.fp32_precision == "ieee"
    assert cudnn.rnn.fp32_precision == before


# Running and recording


@pytest.fixture
def quick_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets each contender run once and gives made timings: 2 ms for FastLSTM, 3 ms for nn.LSTM."""

    def measure(contenders: dict[str, Callable[[], None]], **_: Any) -> dict[str, Timing]:
        for call in contenders.values():
            call()
        return {name: Timing(0.002 if name == "fastlstm" else 0.003, 0.1, 5, 1) for name in contenders}

    monkeypatch.setattr(runner, "measure", measure)


@pytest.mark.usefixtures("quick_measure")
def test_run_yields_both_passes_and_the_document_has_the_published_keys(tmp_path: Path) -> None:
    comparisons = list(runner.run([TINY, replace(TINY, packed=True)]))
    assert [c.key for c in comparisons] == [
        (name, pass_, "cpu") for name in (TINY.name, f"{TINY.name}-packed") for pass_ in PASSES
    ]
    path = write_document(tmp_path / "run.json", comparisons)
    data = json.loads(path.read_text())
    assert {"date", "machine", "versions", "flags", "settings", "geometric_means", "rows"} <= data.keys()
    assert {"cpu", "cores", "caches", "memory_bytes"} <= data["machine"].keys()
    assert {"torch", "fastlstm", "python", "compiler"} <= data["versions"].keys()
    assert data["flags"]["threads"] == 1
    assert data["geometric_means"]["forward"] == {"ratio": pytest.approx(1.5), "shapes": 2, "slower": 0}
    assert len(data["rows"]) == 8
    ours, theirs = data["rows"][:2]
    sizes = {"shape": TINY.name, "T": 2, "B": 3, "I": 4, "H": 5, "proj": 0, "layers": 1, "directions": 1}
    common = {**sizes, "dtype": "float32", "device": "cpu", "pass": "forward", "spread": 0.1, "tokens": 6}
    assert ours.items() >= {**common, "contender": "fastlstm", "median_s": 0.002}.items()
    assert theirs.items() >= {**common, "contender": "torch", "median_s": 0.003, "plan": None}.items()
    assert ours["tokens_per_s"] == pytest.approx(3000)
    assert ours["plan"]["forward"]
    assert record.load(path)[1] == comparisons


def test_run_measures_for_real() -> None:
    (result,) = runner.run([TINY], passes=["forward"], budget_s=0.01)
    assert result.theirs is not None
    for row in (result.ours, result.theirs):
        assert row.error is None
        assert row.median_s is not None and row.median_s > 0
        assert row.samples >= 5


def test_no_shape_is_begun_after_the_time_limit() -> None:
    assert list(runner.run([TINY], budget_s=0.01, time_limit_s=0)) == []


@pytest.mark.usefixtures("quick_measure")
def test_a_wrong_result_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _ops.lstm

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n, c_n = right(*args, **kwargs)
        return y + 1e-2, h_n, c_n

    monkeypatch.setattr(_ops, "lstm", wrong)
    (result,) = runner.run([TINY], passes=["forward"])
    assert result.ours.error is not None and result.ours.error.startswith("wrong result: y: error 0.01")
    assert result.ours.median_s is None and result.theirs is None and result.ratio is None
    assert result.verdict == "error"


@pytest.mark.usefixtures("quick_measure")
def test_a_shape_that_nn_lstm_cannot_run_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Workload.step

    def fail_for_torch(self: Workload, contender: str, pass_: Any) -> Callable[[], None]:
        if contender == "torch":
            raise RuntimeError("no such\nprimitive")
        return step(self, contender, pass_)

    monkeypatch.setattr(Workload, "step", fail_for_torch)
    (result,) = runner.run([TINY], passes=["forward"])
    assert result.theirs is not None and result.theirs.error == "no such primitive"
    assert result.ours.median_s == 0.002 and result.ratio is None
    assert result.verdict == "nn.LSTM fails"
    assert record.geometric_means([result]) == {}


@pytest.mark.parametrize("text", ["tpu", "xpu", "cuda:99"])
def test_devices_that_are_not_there(text: str) -> None:
    with pytest.raises(ValueError, match=f"device '{text}'"):
        runner.parse_device(text)


def test_passes() -> None:
    assert runner.parse_passes("forward_backward, forward") == PASSES
    for text in ("backward", ""):
        with pytest.raises(ValueError, match="expected forward, forward_backward"):
            runner.parse_passes(text)


def test_threads_are_set_and_restored() -> None:
    with runner.num_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"), runner.num_threads(0):
        pass


def test_geometric_means_count_the_losing_shapes() -> None:
    made = [comparison(TINY, "forward", 1.0, 4.0), comparison(replace(TINY, H=6), "forward", 4.0, 1.0)]
    assert record.geometric_means(made) == {"forward": {"ratio": pytest.approx(1.0), "shapes": 2, "slower": 1}}


def test_rows_travel_through_json() -> None:
    row = comparison(TINY, "forward_backward", 1.0, 2.0).ours
    data = row.to_json()
    assert data["pass"] == "forward_backward" and "pass_" not in data
    assert Row.from_json({**data, "later": 1}) == row
    del data["T"]
    with pytest.raises(ValueError, match="a row lacks T"):
        Row.from_json(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        ("{", "cannot read"),
        ("[]", "is not the JSON of `fastlstm bench`"),
        ('{"format": "fastlstm-bench/1", "rows": []}', "lacks date, machine, versions, flags"),
        (
            '{"format": "fastlstm-bench/1", "date": "", "machine": {}, "versions": {}, "flags": {}, "rows": [{}]}',
            "a row lacks shape",
        ),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        record.load(path)


def test_unwritable_paths_are_found_before_a_run(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "it is a directory"),
        (tmp_path / "missing" / "x.json", "No such file or directory"),
        (tmp_path / "x.gif", "must end in .png or .svg or .pdf"),
    ):
        with pytest.raises(ValueError, match=message):
            record.ensure_writable(path, plot.SUFFIXES if path.suffix == ".gif" else ())
    record.ensure_writable(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlstm.bench.record.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        record.write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (None, "-"),
        (4.2, "4.20"),
        (999.7, "1.00 k"),
        (12345.0, "12.3 k"),
        (999_600.0, "1.00 M"),
        (2.5e9, "2.50 G"),
    ],
)
def test_rates_have_three_digits(rate: float | None, text: str) -> None:
    assert record.format_rate(rate) == text


def test_losing_ratios_say_so() -> None:
    texts = [record.format_ratio(ratio).replace(record.TIMES, "x") for ratio in (0.934, 1.0, 1.43, 22.94, 220.4)]
    assert texts == ["0.93x slower", "1.00x", "1.43x", "22.9x", "220x"]


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_plot_draws_every_format(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    made = [comparison(TINY, "forward", 1.0, 0.7), comparison(TINY, "forward_backward", 1.0, 30.0)]
    document = record.document([], device="cpu", settings={})
    plot.plot(made, document, tmp_path / f"x{suffix}")
    start = (tmp_path / f"x{suffix}").read_bytes()[:5]
    assert start.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF-"}[suffix])
    with pytest.raises(ValueError, match="no timing to plot"):
        plot.plot([], document, tmp_path / f"y{suffix}")


def test_plot_of_a_gpu_has_a_map_for_each_dtype_and_pass(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base = replace(TINY, T=512)
    sizes = itertools.product(("bfloat16", "float32"), (8, 16), (1, 4))
    shapes = [replace(base, dtype=dtype, H=H, B=B) for dtype, H, B in sizes]
    shapes += [replace(base, layers=2), replace(base, P=2), replace(base, T=1024)]
    shapes += [replace(base, H=8, B=1, ieee=True)]  # of the same size as one above
    made = [comparison(shape, pass_, 1.0, 0.7 + shape.B) for shape in shapes for pass_ in PASSES]
    made.append(comparison(replace(base, dtype="float16"), "forward", 1.0, 2.0))  # and not the other pass
    made = [replace(c, ours=replace(c.ours, device="cuda")) for c in made]
    document = record.document([], device="cpu", settings={})
    plot.plot(made, document, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    # An .svg has its texts as comments.
    for label in ("B = 1", "H = 16", "Inference, bfloat16", "Training (forward + backward), float32 (TF32 by default)"):
        assert f"<!-- {label}" in text
    found = [text.count(f"<!-- {label}") for label in ("2 layers", "projection 2", "T = 1024", "4.70", "2.00")]
    assert found == [2, 2, 2, 8, 2]  # the last is the mean of one shape, too
    assert text.count("ieee") == 2


# The scripts in benchmarks/


def test_compare_marks_changes_beyond_the_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faster, same, gone, new = (replace(TINY, H=size) for size in (6, 7, 8, 9))
    old_path = write_document(
        tmp_path / "old.json",
        [comparison(shape, "forward", 1.0, 2.0) for shape in (TINY, faster, same, gone)],
    )
    new_path = write_document(
        tmp_path / "new.json",
        [
            # The whole machine is twice as fast and nn.LSTM with it: FastLSTM itself fell behind.
            comparison(TINY, "forward", 0.6, 1.0),
            comparison(faster, "forward", 0.5, 2.0),
            comparison(same, "forward", 0.995, 2.0),
            comparison(new, "forward", 1.0, 2.0),
        ],
    )
    compare = script("compare")
    assert compare.main([str(old_path), str(new_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines if "-B3-" in line}
    names = (TINY.name, faster.name, same.name, gone.name, new.name)
    assert words == dict(zip(names, ("slower", "faster", "same", "missing", "new"), strict=True))
    assert compare.main([str(old_path), str(new_path), "--fail-below", "0.9"]) == 1
    error = capsys.readouterr().err
    assert TINY.name in error and gone.name in error and same.name not in error
    assert compare.main([str(old_path), str(old_path), "--fail-below", "0.9"]) == 0


def test_compare_tells_what_else_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_document(tmp_path / "old.json", [comparison(TINY, "forward", 1.0, 2.0)])
    data = json.loads(path.read_text())
    data["flags"]["threads"] = 64
    other = tmp_path / "new.json"
    other.write_text(json.dumps(data))
    compare = script("compare")
    assert compare.main([str(path), str(other)]) == 0
    assert "differs: flags threads: 1 -> 64" in capsys.readouterr().out
    assert compare.main([str(path), str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("compare.py: cannot read")


def test_table_fills_the_readme_and_checks_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = write_document(
        tmp_path / "run.json",
        [
            comparison(TINY, "forward", 0.002, 0.003),
            comparison(TINY, "forward_backward", 0.004, 0.003),
            comparison(replace(TINY, P=2), "forward", 0.001, 0.004),
        ],
    )
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:begin -->\nold\n<!-- benchmark:end -->\nafter\n")
    (tmp_path / "docs").mkdir()
    picture = tmp_path / "docs" / "run.png"
    table = script("table")
    arguments = [str(path), "--readme", str(readme), "--plot", str(picture)]
    assert table.main([*arguments, "--check"]) == 1
    assert not picture.exists() and "old" in readme.read_text()
    assert table.main(arguments) == 0
    assert picture.exists()
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {TINY.name} "))
    cells = [cell.strip().replace(record.TIMES, "x") for cell in row.split("|")[1:-1]]
    spread = "\N{PLUS-MINUS SIGN}1%"
    assert cells == [
        *(TINY.name, "a test"),
        *("3.00 k", "2.00 k", f"1.50x {spread}"),
        *("1.50 k", "2.00 k", f"**0.75x slower** {spread}"),
    ]
    assert f"slower than nn.LSTM: {TINY.name}." in text
    assert "(docs/run.png)" in text
    assert table.main([*arguments, "--check"]) == 0
    readme.write_text(text.replace("1.50 k", "9.99 k"))
    assert table.main([*arguments, "--check"]) == 1
    readme.write_text("no markers")
    capsys.readouterr()
    assert table.main(arguments) == 2
    assert "expected one <!-- benchmark:begin -->" in capsys.readouterr().err
    assert readme.read_text() == "no markers"


def test_the_pytest_suite_runs_each_contender() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-p", "no:cacheprovider"]
    command += ["--shapes", "T1-B1-H32,cell-B1-H128", "--threads", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "8 passed" in run.stdout, run.stdout + run.stderr


def test_table_of_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def timed(forward: float, backward: float, predicted: float | None) -> dict[str, Any]:
        both = {"forward": {"us_per_step": forward}, "backward": {"us_per_step": backward}}
        return both | ({} if predicted is None else {"predicted": {"forward": predicted, "backward": 2 * predicted}})

    document = {"machine": {"gpu": "a GPU"}, "versions": {"torch": "3.0"}, "candidates": {}}
    document["candidates"] = {
        "H8 B1 bf16 planned": timed(1, 2, 3),
        "H8 B1 bf16 stepwise": timed(4, 5, 6),
        "H8 B1 bf16 resident": {"forward": {"cannot": "too many"}, "backward": {"cannot": "too many"}},
        "H8 B1 bf16 persistent octets=2 tiles=1": timed(7, 8, 9),
        "H16 B1 bf16 persistent": timed(1.25, 2.5, None),
    }
    path = tmp_path / "families.json"
    path.write_text(json.dumps(document))
    assert script("table").main([str(path)]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["", "", "stepwise", "resident", "persistent"]
    assert lines[4:] == [
        ["H8 B1 bf16", "forward", "4.00 (6.00)", "-", "-"],
        ["H8 B1 bf16", "backward", "5.00 (12.00)", "-", "-"],
        ["H16 B1 bf16", "forward", "-", "-", "1.25"],
        ["H16 B1 bf16", "backward", "-", "-", "2.50"],
    ]


def test_accuracy_of_every_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy, table = script("accuracy"), script("table")
    path = tmp_path / "accuracy.json"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--json", str(path), "--steps", "2", "7"])
    accuracy.main()
    rows = json.loads(path.read_text())["accuracy"]
    bounds = {"float32": (1e-8, 1e-6), "bfloat16": (1e-4, 2e-2), "float16": (1e-5, 2e-3)}
    assert len(rows) == len(bounds) * 2 * (1 + len(fastlstm.plans()))
    for row in rows:
        low, high = bounds[row["precision"]]
        assert low < row["y"] < high and low < row["gradients"] < high, row
    capsys.readouterr()
    assert table.main([str(path)]) == 0
    text = capsys.readouterr().out
    one = next(row for row in rows if (row["precision"], row["contender"], row["T"]) == ("float16", "packed", 7))
    line = next(line for line in text.splitlines() if line.startswith("| float16") and "packed" in line)
    assert f"{one['y']:.1e} / {one['gradients']:.1e}" in line and "T = 7" in text


def test_peers_are_checked_before_they_are_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = script("peers")
    ours = peers.CONTENDERS["fastlstm"]

    def absent(layer: Any) -> None:
        raise ModuleNotFoundError("No module named 'absent'")

    def wrong(layer: Any) -> Callable[[], Tensor]:
        forward = ours(layer)
        return lambda: 1.1 * forward()

    monkeypatch.setattr(peers, "CONTENDERS", {n: peers.CONTENDERS[n] for n in ("fastlstm", "torch")})
    peers.CONTENDERS.update(absent=absent, wrong=wrong)
    path = tmp_path / "peers.json"
    monkeypatch.setattr(sys, "argv", ["peers.py", "--device", "cpu", "--json", str(path), "--seconds", "0.001"])
    assert peers.main() == 0
    rows = {(row["problem"], row["contender"]): row for row in json.loads(path.read_text())["rows"]}
    plain, resets = (problem.name for problem in peers.TINY)
    for name in (plain, resets):
        assert rows[name, "fastlstm"]["error"] < 1e-6
        assert rows[name, "fastlstm"]["forward_backward"]["median_s"] > 0
        assert "absent" in rows[name, "absent"]["failure"]
        assert rows[name, "wrong"]["failure"].startswith("ArithmeticError: y is off by 0.1")
    assert rows[plain, "torch"]["forward"]["median_s"] > 0
    assert "no resets" in rows[resets, "torch"]["failure"]
    assert "ModuleNotFoundError: No module named 'absent'" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["peers.py", "--device", "cpu", "--contenders", "nobody"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "--contenders must be some of fastlstm, torch, absent, wrong, got nobody" in capsys.readouterr().err

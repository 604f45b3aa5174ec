"""The parts of benchmarks/gpu.sh: tests, verification, benchmark and the planner's families on one NVIDIA GPU.

    python benchmarks/gpu.py tests|bench|families --json FILE --seconds N
    python benchmarks/gpu.py environment|verify --json FILE
    python benchmarks/gpu.py tiny
    python benchmarks/gpu.py summary FOLDER

Kernels whose CTAs wait for each other can hang, and a kernel that fails takes its process's GPU with it. So tests and
measurements run one by one in a worker process. When it falls silent or ends, the one that ran is recorded as failed
and a new worker goes on with the next. Needs torch, fastlstm and, for tests, pytest; nothing of the extras.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # built in place, not installed
    sys.path.insert(0, str(ROOT))

import fastlstm  # noqa: E402
from fastlstm import verify as verification  # noqa: E402
from fastlstm.bench import record, runner, shapes, timing  # noqa: E402
from fastlstm.bench.record import Comparison, Row, format_ratio  # noqa: E402
from fastlstm.bench.shapes import DTYPES, SHORT_DTYPES  # noqa: E402
from fastlstm.bench.workload import PASSES  # noqa: E402

# Seconds of silence after which a worker counts as hung, longer than anything takes that works.
STALL_S = 20.0
# Importing torch and creating a context take a while.
START_S = 60.0
MAX_RESTARTS = 12
# By name: other test modules may need what is not installed here.
TESTS = "tests/test_cuda.py"
# Seconds of timing for a shape and pass, both contenders together.
BENCH_BUDGET_S = 0.4
Send = Callable[[Mapping[str, Any]], None]


# Workers


def supervise(part: str, device: str, keys: Sequence[str] | None, deadline: float) -> Iterator[dict[str, Any]]:
    """Runs a part's tasks in worker processes until none is left or `deadline` (time.monotonic()) has come.

    A worker reads the keys of its tasks in order as JSON (null: all) and writes messages, a line each: {"keys": [...]}
    if it was told null, {"begin": key} before and {"end": key, ...} after each task; in between {"note": text} says
    what went wrong if nothing more is heard of it. After a task that hung, those of the same family come last.

    Yields:
        the "keys" message and every "end" message; for a task that hung or killed its worker one with an "error".
    """
    remaining: list[str] | None = None if keys is None else list(keys)
    for _ in range(MAX_RESTARTS):
        command = [sys.executable, __file__, part, "--worker", "--device", device]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdin is not None and worker.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps(remaining))
            worker.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(worker.stdout, lines), daemon=True).start()
        running, note, patience, reason = None, "", START_S, ""
        while not reason:
            left = deadline - time.monotonic()
            try:
                line = lines.get(timeout=max(0.1, min(patience, left)))
            except queue.Empty:
                reason = "out of time" if time.monotonic() >= deadline else f"hung: silent for {patience:.0f} s"
                break
            if line is None:
                reason = f"its process ended with status {worker.wait()}"
                break
            message: dict[str, Any] = json.loads(line)
            patience = STALL_S
            if "note" in message:
                note = f"; {message['note']}"
                continue
            running, note = message.get("begin"), ""
            if "keys" in message:
                remaining = list(message["keys"])
                yield message
            elif "end" in message:
                assert remaining is not None
                remaining.remove(message["end"])
                yield message
        worker.kill()
        status = worker.wait()
        if not remaining or time.monotonic() >= deadline:
            return
        if running is not None:
            remaining.remove(running)
            if reason.startswith("hung"):
                family = next((name for name in verification.CUDA_PLANS if name in running), None)
                remaining.sort(key=lambda key, family=family: family is not None and family in key)
            yield {"end": running, "error": reason + note}
        elif status != 0:
            raise RuntimeError(f"a worker for {part} could not begin: {reason}")
    print(f"{part}: given up after {MAX_RESTARTS} processes", file=sys.stderr)


def _forward(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def work(part: str, device: str) -> None:
    """A worker: messages go to what was standard output, and everything that is printed to standard error."""
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")

    keys = json.loads(sys.stdin.read())
    {"tests": _work_tests, "bench": _work_bench, "families": _work_families}[part](keys, device, send)


# Tests


class Reporter:
    """A plugin of pytest that sends what happens to each test."""

    def __init__(self, wanted: Sequence[str] | None, send: Send) -> None:
        self.wanted = None if wanted is None else {key: place for place, key in enumerate(wanted)}
        self.send = send
        self.result: dict[str, Any] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keeps the tests that are wanted."""
        if self.wanted is not None:
            order = self.wanted
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_collection_finish(self, session: Any) -> None:
        """Says which tests there are."""
        if self.wanted is None:
            self.send({"keys": [item.nodeid for item in session.items]})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Says that a test begins."""
        self.result = {"end": nodeid, "outcome": "passed", "seconds": 0.0}
        self.send({"begin": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keeps what came out of a phase: setup, the call, teardown."""
        self.result["seconds"] += report.duration
        if report.outcome != "passed":
            self.result["outcome"] = report.outcome
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            reasons = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
            self.result["reason"] = " ".join(reasons or text.splitlines()[-1:])[:600]
            if report.failed:
                self.send({"note": self.result["reason"]})

    def pytest_runtest_logfinish(self) -> None:
        """Says what came out of a test."""
        self.send(self.result)


def _work_tests(keys: list[str] | None, device: str, send: Send) -> None:
    import pytest

    os.chdir(ROOT)
    options = ["-m", "cuda", "-q", "-p", "no:cacheprovider", "--tb=short", "-o", "faulthandler_timeout=30"]
    sys.exit(pytest.main([*options, TESTS], plugins=[Reporter(keys, send)]))


def run_tests(device: str, path: Path, seconds: float) -> bool:
    """Runs `pytest -m cuda`; returns whether all tests were run and none failed."""
    started = time.monotonic()
    results: dict[str, Any] = {}
    collected: list[str] = []
    for message in supervise("tests", device, None, started + seconds):
        if "keys" in message:
            collected = message["keys"]
            continue
        result = {"outcome": "failed", **message}
        if "error" in message:
            result["reason"] = message["error"]
        results[result.pop("end")] = result
        if len(results) % 20 == 0:
            record.write(path, _tests_document(collected, results, started))
    document = _tests_document(collected, results, started)
    record.write(path, document)
    print(" ".join(f"{count} {outcome}" for outcome, count in document["counts"].items()))
    return bool(collected) and not document["counts"]["failed"] and not document["counts"]["not run"]


def _tests_document(collected: Sequence[str], results: Mapping[str, Any], started: float) -> dict[str, Any]:
    counts = {o: sum(r["outcome"] == o for r in results.values()) for o in ("passed", "failed", "skipped")}
    counts["not run"] = len(collected) - len(results)
    slowest = sorted(results, key=lambda key: -results[key].get("seconds", 0))[:10]
    return {
        "counts": counts,
        "seconds": time.monotonic() - started,
        "failed": {key: r.get("reason", "") for key, r in results.items() if r["outcome"] == "failed"},
        "skipped": {key: r.get("reason", "") for key, r in results.items() if r["outcome"] == "skipped"},
        "slowest": {key: round(results[key].get("seconds", 0), 2) for key in slowest},
        "not_run": [key for key in collected if key not in results],
    }


# Verification and environment


def run_verify(device: str, path: Path) -> bool:
    """Runs `fastlstm verify`; returns whether everything that a family can run was right."""
    results: list[verification.Result] = []
    total = verification.count(device=device)

    def save() -> int:
        wrong = [r for r in results if not r.ok]
        texts = [
            f"{r.shape.name} {r.precision} {r.plan}: {r.failure or next(str(e) for e in r.reports if not e.ok)}"
            for r in wrong
        ]
        skipped = sum(bool(r.skipped) for r in results)
        ran = {"right": len(results) - skipped - len(wrong), "wrong": len(wrong), "not applicable": skipped}
        table = [vars(summary) for summary in verification.summarize(results)]
        record.write(path, {"counts": {**ran, "not run": total - len(results)}, "wrong": texts, "summaries": table})
        return len(wrong)

    for result in verification.verify(device=device):
        results.append(result)
        if len(results) % 10 == 0:
            save()
    wrong = save()
    print(f"{len(results)} of {total} cases, {wrong} wrong")
    return not wrong


def run_environment(device: str, path: Path) -> bool:
    """Writes what figures depend on."""
    document = {
        "build": fastlstm.build_info(),
        "machine": record.machine(device),
        "versions": record.versions(),
        "flags": record.flags(),
    }
    record.write(path, document)
    print(json.dumps(document, indent=1))
    return True


# Benchmark


def _bench_shapes(device: str) -> list[shapes.Shape]:
    if device == "cpu":  # to try this script
        return [
            replace(s, T=6, B=2, I=8, H=8, P=min(s.P, 4)) for s in shapes.select("T512-B64-H512-bf16,T512-B64-H512")
        ]
    return shapes.select("gpu")


def _work_bench(keys: list[str], device: str, send: Send) -> None:
    by_name = {shape.name: shape for shape in _bench_shapes(device)}
    selected = [by_name[key] for key in keys]
    torch.set_num_threads(1)
    names = iter([shape.name for shape in selected])
    name = next(names)
    send({"begin": name})
    rows: list[dict[str, Any]] = []
    for comparison in runner.run(selected, device=device, budget_s=BENCH_BUDGET_S):
        rows += [row.to_json() for row in (comparison.ours, comparison.theirs) if row is not None]
        print(comparison.ours.shape, comparison.ours.pass_, comparison.verdict, comparison.ours.error or "", flush=True)
        if comparison.ours.pass_ == PASSES[-1]:
            send({"end": name, "rows": rows})
            name, rows = next(names, ""), []
            if name:
                send({"begin": name})


def run_bench(device: str, path: Path, seconds: float) -> bool:
    """Times the shapes of the group gpu against nn.LSTM until the time is up; returns whether all results are right."""
    deadline = time.monotonic() + seconds
    selected = _bench_shapes(device)
    by_name = {shape.name: shape for shape in selected}
    before = record.machine(device)
    rows: list[Row] = []
    done = 0

    def save() -> None:
        settings = {"shapes": "gpu", "passes": list(PASSES), "budget_s": BENCH_BUDGET_S, "machine_before": before}
        settings |= {"shapes_done": done, "shapes_of_group": len(selected)}
        record.write(path, record.document(rows, device=device, settings=settings))

    for message in supervise("bench", device, list(by_name), deadline):
        done += 1
        if "error" in message:
            row = runner._row(by_name[message["end"]], device, "forward", "fastlstm")
            rows.append(replace(row, error=message["error"]))
        rows += [Row.from_json(row) for row in message.get("rows", [])]
        save()
    save()
    wrong = [row for row in rows if row.contender == "fastlstm" and row.error]
    print(f"{done} of {len(selected)} shapes, {len(wrong)} rows with errors")
    return not wrong


# The families that the planner chooses from


@dataclass(frozen=True)
class Candidate:
    """A family and what else is forced, on a problem of L layers with I = 16."""

    T: int
    B: int
    H: int
    dtype: str
    family: str | None
    octets: int | None = None
    tiles: int | None = None
    L: int = 1
    layers: int | None = None
    run_steps: int | None = None

    @property
    def key(self) -> str:
        """What identifies it in the JSON."""
        shape = "".join(f" {name}={value}" for name, value in self.shape.items())
        layers = f"L{self.L}" if self.L > 1 else ""
        return f"H{self.H} B{self.B}{layers} {SHORT_DTYPES[self.dtype]} {self.family or 'planned'}{shape}"

    @property
    def shape(self) -> dict[str, int]:
        """What is forced besides the family."""
        names = ("octets", "tiles", "layers", "run_steps")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Overrules the planner."""
        force: Any = fastlstm.force
        with force(plan=self.family, **self.shape):
            yield


def candidates(device: str) -> list[Candidate]:
    """The planner's choice, each family, each shape, and ways to run layers; the sizes that tell most come first."""
    if device == "cpu":  # to try this script
        return [Candidate(4, 2, 8, "float32", family) for family in (None, *fastlstm.plans())]
    teams: list[tuple[str | None, int | None, int | None]] = [(None, None, None)]
    teams += [(family, None, None) for family in verification.CUDA_PLANS]
    teams += [("resident", octets, None) for octets in (1, 2)]
    teams += [("persistent", octets, tiles) for octets in (1, 2, 4) for tiles in (1, 2, 4, 8)]
    teams += [("warpgroup", octets, tiles) for octets in (2, 4) for tiles in (2, 4, 8)]
    teams += [("streamed", octets, tiles) for octets in (1, 2, 4) for tiles in (1, 4, 8)]
    layers = [(1, None), (None, None), (2, 32), (2, 64), (2, 128), (4, 64)]
    stacks = [
        Candidate(512, B, H, "bfloat16", None, L=L, layers=at_once, run_steps=steps)
        for H, B, L in ((512, 16, 2), (512, 64, 2), (512, 16, 4), (1024, 16, 2), (128, 64, 2))
        for at_once, steps in layers
        if at_once is None or at_once <= L
    ]
    sizes = [(512, 64), (1024, 64), (512, 256), (1024, 16), (1024, 256), (256, 64), (2048, 64), (128, 256), (768, 128)]
    sizes += [(512, 16), (128, 64), (768, 16), (512, 1), (256, 128), (2048, 16), (64, 256), (1024, 1)]
    single = [
        Candidate(512, B, H, dtype, *team)
        for dtype in ("bfloat16", "float32", "float16")
        for H, B in (sizes if dtype == "bfloat16" else sizes[:5])
        for team in teams
    ]
    first = 3 * len(teams)  # sizes, before the stacks
    return single[:first] + stacks + single[first:]


def _predicted(plan: Mapping[str, Any], pass_: str) -> float | None:
    """The planner's microseconds per step of "forward" or "backward"."""
    for key, value in plan.items():
        if key.startswith(pass_) and "microseconds" in key:
            return None if value is None else float(value)
    return None


def time_candidate(c: Candidate, device: str) -> dict[str, Any]:
    """Microseconds per step and layer of both passes, measured and predicted; of backward the recurrence alone.

    With I = 16 and no gradient of weights and input asked for, the products over all steps hardly count.
    """
    dtype = DTYPES[c.dtype]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x, d_y = draw(c.T, c.B, 16), draw(c.T, c.B, c.H)
    weights = []
    for layer in range(c.L):
        weights += [draw(4 * c.H, n) / c.H**0.5 for n in (c.H if layer else 16, c.H)] + [
            draw(4 * c.H) for _ in range(2)
        ]
    h_0, c_0 = draw(c.L, c.B, c.H), draw(c.L, c.B, c.H)
    reduced = c.dtype == "float32"
    options = (None, None, None, None, c.L, False, True, reduced)
    operators = torch.ops.fastlstm
    result: dict[str, Any] = {}
    place: dict[str, Any] = {} if device == "cpu" else {"device": device}
    clock = runner.seconds_on_gpu(torch.device(device)) if device != "cpu" else None

    def measure(call: Callable[[], Any]) -> dict[str, float]:
        call()
        t = timing.measure({"": call}, budget_s=0.04, sample_s=0.002, min_samples=5, seconds_of=clock)[""]
        return {"us_per_step": t.median_s * 1e6 / (c.T * c.L), "spread": t.spread}

    with torch.no_grad():
        y, _, _, saved, _ = operators.lstm(x, weights, h_0, c_0, *options, True)
        with c.forced():
            try:
                plan = fastlstm.plan(T=c.T, B=c.B, I=16, H=c.H, L=c.L, dtype=dtype, training=True, **place).to_dict()
                result["plan"] = plan
                result["predicted"] = {pass_: _predicted(plan, pass_) for pass_ in ("forward", "backward")}
            except (ValueError, TypeError) as error:
                result["plan_error"] = str(error)[:200]
            needs = [0, 1, *[0] * len(weights)]
            for pass_, call in (
                ("forward", lambda: operators.lstm(x, weights, h_0, c_0, *options, False)),
                (
                    "backward",
                    lambda: operators.lstm_backward(d_y, None, None, x, weights, h_0, c_0, y, saved, *options, needs),
                ),
            ):
                try:
                    result[pass_] = measure(call)
                except (ValueError, RuntimeError) as error:
                    if "forced plan" not in str(error):
                        raise
                    result[pass_] = {"cannot": str(error)[:200]}
    return result


def _work_families(keys: list[str], device: str, send: Send) -> None:
    if device != "cpu":
        runner.reach_working_clock(device)
    by_key = {candidate.key: candidate for candidate in candidates(device)}
    for key in keys:
        send({"begin": key})
        send({"end": key, **time_candidate(by_key[key], device)})


def run_families(device: str, path: Path, seconds: float) -> bool:
    """Measures what the planner chooses from until the time is up; returns whether nothing failed."""
    deadline = time.monotonic() + seconds
    before = record.machine(device)
    results: dict[str, Any] = {}
    keys = [candidate.key for candidate in candidates(device)]

    def save() -> None:
        document = {"machine": before, "versions": record.versions(), "flags": record.flags()}
        record.write(path, {**document, "of": len(keys), "candidates": results})

    for message in supervise("families", device, keys, deadline):
        results[message.pop("end")] = message
        save()
    failed = [key for key, result in results.items() if "error" in result]
    save()
    print(f"{len(results)} of {len(keys)} candidates, {len(failed)} failed")
    return not failed


# Sanitizers


def run_tiny(device: str) -> bool:
    """Every family once forward and backward on problems small enough for a sanitizer."""
    families = verification.CUDA_PLANS if device != "cpu" else tuple(fastlstm.plans())
    stacks: list[tuple[dict[str, Any], dict[str, Any], int]] = [  # of the module, of force(), time steps
        ({}, {}, 3),
        ({"bidirectional": True}, {}, 3),
        ({"num_layers": 2}, {"layers": 2, "run_steps": 4}, 9),
        ({"bidirectional": True, "proj_size": 4}, {}, 3),
    ]
    for family, dtype, (kwargs, shape, T) in itertools.product(families, (torch.bfloat16, torch.float32), stacks):
        if shape and family in ("streamed", "stepwise"):
            continue
        for B, I, H in ((9, 24, 40), (3, 7, 33)):  # noqa: E741
            with fastlstm.force(plan=family, **shape):
                run_steps(f"{family} {kwargs}", T, B, I, H, device, dtype, **kwargs)
    for H in (40, 600):  # the second in rows of several turns of a block
        run_steps("layer_norm", 3, 3, 24, H, device, torch.bfloat16, bidirectional=True, layer_norm=True)
    return True


def run_steps(
    name: str,
    T: int,
    B: int,
    I: int,  # noqa: E741
    H: int,
    device: str,
    dtype: torch.dtype,
    **module_options: Any,
) -> None:
    """Forward and backward, of whole sequences and of ragged ones with resets."""
    module = fastlstm.FastLSTM(I, H, **module_options, device=device, dtype=dtype)
    x = torch.randn(T, B, I).to(device, dtype).requires_grad_()
    lengths = torch.tensor([T - b % T for b in range(B)])
    mask = torch.arange(T * B).view(T, B).remainder(5).eq(4).to(device)
    for options in ({}, {"lengths": lengths, "reset_mask": mask}):
        y, (h_n, c_n) = module(x, **options)
        (y.sum() + h_n.sum() + c_n.sum()).backward()
    finite = x.grad is not None and x.grad.isfinite().all().item()
    print(f"{name} {dtype} T={T} B={B} H={H} finite={finite}", flush=True)


# Summary


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return data


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def _listed(title: str, items: Sequence[str], most: int = 25) -> list[str]:
    more = [f"  ... and {len(items) - most} more"] if len(items) > most else []
    return ([title] if items else []) + [f"  {item}" for item in items[:most]] + more


def _summarize_bench(path: Path) -> list[str]:
    document, comparisons = record.load(path)
    settings = document["settings"]
    lines = [f"benchmark: {settings['shapes_done']} of {settings['shapes_of_group']} shapes"]
    for dtype, short in SHORT_DTYPES.items():
        of_dtype = [c for c in comparisons if c.ours.dtype == dtype]
        for pass_ in PASSES:
            timed = [c for c in of_dtype if c.ours.pass_ == pass_ and c.ours.median_s is not None]
            if not timed:
                continue
            lines += ["", f"{short} {pass_}: microseconds per step, FastLSTM / nn.LSTM = ratio (spread), plan"]
            lines += [_bench_line(c) for c in timed]
        for pass_, mean in record.geometric_means(of_dtype).items():
            lines.append(
                f"{short} {pass_}: geometric mean {format_ratio(float(mean['ratio']))} over {mean['shapes']} shapes, "
                f"{mean['slower']} slower"
            )
    wrong = [f"{c.ours.shape} {c.ours.pass_}: {c.ours.error}" for c in comparisons if c.ours.error]
    return lines + _listed("benchmark rows with errors:", wrong)


def _bench_line(c: Comparison) -> str:
    def per_step(row: Row | None) -> str:
        return "-" if row is None or row.median_s is None else f"{row.median_s * 1e6 / row.T:.2f}"

    plan = "/".join(str(c.ours.plan[key]) for key in ("forward", "backward") if (c.ours.plan or {}).get(key))
    return f"  {c.ours.shape:<28} {per_step(c.ours):>8} {per_step(c.theirs):>8} {c.verdict:>12} ({c.spread:.0%}) {plan}"


def _summarize_families(data: Mapping[str, Any]) -> list[str]:
    lines = [f"families: {len(data['candidates'])} of {data['of']} candidates"]
    lines.append(f"  {'':<44} {'forward':>8} {'plan':>8} {'backward':>8} {'plan':>8}  microseconds per step and layer")
    errors = {pass_: [] for pass_ in ("forward", "backward")}  # type: dict[str, list[float]]
    for key, result in data["candidates"].items():
        if "error" in result:
            lines.append(f"  {key:<44} {result['error']}")
            continue
        cells = []
        for pass_ in ("forward", "backward"):
            measured = result[pass_].get("us_per_step")
            predicted = (result.get("predicted") or {}).get(pass_)
            cells += ["-" if v is None else f"{v:.2f}" for v in (measured, predicted)]
            if measured and predicted:
                errors[pass_].append(math.log(measured / predicted))
        if cells != ["-"] * 4:
            lines.append(f"  {key:<44} " + " ".join(f"{cell:>8}" for cell in cells))
    for pass_, logs in errors.items():
        if logs:
            mean, spread = sum(logs) / len(logs), math.sqrt(sum(x * x for x in logs) / len(logs))
            lines.append(f"  {pass_}: measured / predicted {math.exp(mean):.2f}, typical factor {math.exp(spread):.2f}")
    return lines


def summarize(folder: Path) -> str:
    """What the JSON files of a run say; a missing one is named."""
    blocks: list[list[str]] = []
    environment = _read(folder / "environment.json")
    if environment:
        machine, versions = environment["machine"], environment["versions"]
        blocks.append(
            [
                f"{machine.get('gpu', machine['cpu'])}, {machine.get('gpu_now') or 'no nvidia-smi'}",
                f"torch {versions['torch']}, cuDNN {versions['cudnn']}, targets {environment['build']['cuda']}",
                f"fp32 precision {environment['flags']['fp32_precision']}",
            ]
        )
    tests = _read(folder / "tests.json")
    if tests:
        failed = [f"{key}: {reason}" for key, reason in tests["failed"].items()]
        block = [f"tests: {_counts(tests['counts'])} in {tests['seconds']:.0f} s", *_listed("failed tests:", failed)]
        blocks.append(block + _listed("tests that were not run:", tests["not_run"], 5))
    verify = _read(folder / "verify.json")
    if verify:
        blocks.append([f"verify: {_counts(verify['counts'])}", *_listed("wrong:", verify["wrong"])])
    if (folder / "bench.json").exists():
        blocks.append(_summarize_bench(folder / "bench.json"))
    families = _read(folder / "families.json")
    if families:
        blocks.append(_summarize_families(families))
    names = ("environment", "tests", "verify", "bench", "families", "accuracy")
    missing = [name for name in names if not (folder / f"{name}.json").exists()]
    if missing:
        blocks.append([f"no results of: {', '.join(missing)}"])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("environment", "tests", "verify", "bench", "families", "tiny", "summary")
    parser.add_argument("part", choices=names)
    parser.add_argument("folder", type=Path, nargs="?", help="of the summary: where the JSON files are")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="after which a part stops by itself")
    parser.add_argument("--device", default="cuda", help="cpu tries everything but tests on a few tiny problems")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    part, device, path = arguments.part, arguments.device, arguments.json
    if arguments.worker:
        work(part, device)
        return 0
    if part == "summary":
        if arguments.folder is None:
            parser.error("summary needs a folder")
        print(summarize(arguments.folder), end="")
        return 0
    if part == "tiny":
        return int(not run_tiny(device))
    if path is None:
        parser.error(f"{part} needs --json")
    seconds: float = arguments.seconds
    runs: dict[str, Callable[[], bool]] = {
        "environment": lambda: run_environment(device, path),
        "verify": lambda: run_verify(device, path),
        "tests": lambda: run_tests(device, path, seconds),
        "bench": lambda: run_bench(device, path, seconds),
        "families": lambda: run_families(device, path, seconds),
    }
    return int(not runs[part]())


if __name__ == "__main__":
    sys.exit(main())

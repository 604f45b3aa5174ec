"""The command `fastlstm`: info, verify, bench, and the language model's train, generate and demo.

Each command checks its arguments before it starts, reports a mistake of the user in one line with exit code
2, and leaves the work to fastlstm/verify.py, fastlstm/bench/ and fastlstm/lm/cli.py. Needs the extra `[cli]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import rich.box
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as missing:
    # The installed script imports this module before it calls main(): users would see a traceback alone.
    raise SystemExit(f'fastlstm: this command needs {missing.name}: pip install "fastlstm[cli]"') from missing

import fastlstm
from fastlstm import verify as verification
from fastlstm.bench import plot as chart
from fastlstm.bench import record, runner, shapes
from fastlstm.bench.record import Comparison, format_rate, format_ratio
from fastlstm.bench.workload import Pass
from fastlstm.planning import GPUS

app = typer.Typer(
    help="Fused LSTM kernels for PyTorch: build information, verification, benchmarks and a language model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the console script and of `python -m fastlstm`."""
    app(prog_name="fastlstm")


@app.command()
def info(
    steps: Annotated[int | None, typer.Option("--T", help="Time steps: with --B and --H, print a plan.")] = None,
    batch: Annotated[int | None, typer.Option("--B", help="Batch size.")] = None,
    inputs: Annotated[int | None, typer.Option("--I", help="Input size; the hidden size if left out.")] = None,
    hidden: Annotated[int | None, typer.Option("--H", help="Hidden size.")] = None,
    projection: Annotated[int, typer.Option("--P", help="Projection size (proj_size), 0 for none.")] = 0,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 1,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Both directions.")] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of parameters and input.")] = "float32",
    training: Annotated[bool, typer.Option("--training", help="Plan the backward pass too.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or, for a plan, a GPU model such as H200.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Plan for this number of threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the build, the machine's features and, given a shape, the plan for it."""
    sections: dict[str, dict[str, Any]] = {"build": fastlstm.build_info()}
    try:
        sections["machine"] = record.machine(runner.parse_device("cpu" if device in GPUS else device))
        with runner.num_threads(threads):
            sections["flags"] = record.flags()
            if (steps, batch, hidden) != (None, None, None):
                if steps is None or batch is None or hidden is None:
                    raise ValueError("a plan needs --T, --B and --H")
                plan = fastlstm.plan(
                    T=steps,
                    B=batch,
                    I=hidden if inputs is None else inputs,
                    H=hidden,
                    P=projection,
                    L=layers,
                    D=2 if bidirectional else 1,
                    dtype=shapes.DTYPES[shapes.parse_dtype(dtype)],
                    training=training,
                    device=device,
                )
                sections["plan"] = plan.to_dict()
    except ValueError as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps(sections, indent=1))
        return
    table = Table("", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    for title, values in sections.items():
        table.add_row(f"[bold]{title}[/bold]", "")
        for key, value in values.items():
            table.add_row(f"  {key}", _plain(value))
    _console().print(table)


@app.command()
def verify(
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes instead of all.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Number of threads; torch's default if left out.")] = None,
) -> None:
    """Check every op, dtype, plan and ISA of a device against nn.LSTM; exit 1 on a failure."""
    _quiet_baseline()
    console = _console()
    results = []
    try:
        runner.parse_device(device)
        with runner.num_threads(threads), _progress(console) as progress:
            task = progress.add_task("", total=verification.count(quick=quick, device=device))
            for result in verification.verify(quick=quick, device=device):
                results.append(result)
                progress.update(task, advance=1, description=result.shape.name)
    except ValueError as error:
        _fail(error)
    console.print(_verification_table(verification.summarize(results)))
    console.print(
        "Errors are the largest against float64, relative to each tensor's largest magnitude. "
        "The rule: at most twice nn.LSTM's error plus a rounding floor, tensor by tensor.",
        style="dim",
    )
    failed = [result for result in results if not result.ok]
    for result in failed:
        reasons = [result.failure] if result.failure else [str(r) for r in result.reports if not r.ok]
        where = f"{result.shape.name} {result.precision}, plan {result.plan}, ISA {result.isa}"
        for reason in reasons:
            console.print(f"FAILED {where}: {reason}", style="red", markup=False)
    skipped = sum(bool(result.skipped) for result in results)
    right = len(results) - skipped - len(failed)
    console.print(f"{right} right, {len(failed)} wrong, {skipped} not applicable (the plan excludes the shape)")
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    select: Annotated[
        str, typer.Option("--shapes", help="Groups and names, separated by commas; see --list.")
    ] = "core",
    list_shapes: Annotated[bool, typer.Option("--list", help="List groups and shapes, then exit.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Run the shapes in this dtype instead of their own.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Number of threads; torch's default if left out.")] = None,
    passes: Annotated[
        str, typer.Option(help="forward (inference), forward_backward (training), or both.")
    ] = "forward,forward_backward",
    budget: Annotated[float, typer.Option(help="Seconds of timing for each shape and pass.")] = 4.0,
    time_limit: Annotated[float | None, typer.Option(help="Begin no further shape after so many seconds.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios (png, svg, pdf).")] = None,
) -> None:
    """Time FastLSTM and nn.LSTM in turns in one process; exit 1 if a result is wrong.

    Each result is checked once before it is timed.
    """
    console = _console()
    if list_shapes:
        console.print(_shape_table())
        return
    try:
        selected = shapes.select(select, dtype)
        runner.parse_device(device)
        chosen = runner.parse_passes(passes)
        if budget <= 0:
            raise ValueError(f"budget must be more than 0 seconds, got {budget:g}")
        if json_path is not None:
            record.ensure_writable(json_path)
        if plot_path is not None:
            record.ensure_writable(plot_path, chart.SUFFIXES)
            if importlib.util.find_spec("matplotlib") is None:
                raise ValueError('--plot needs matplotlib: pip install "fastlstm[cli]"')
        with runner.num_threads(threads):
            _quiet_baseline()
            load = os.getloadavg()[0]
            if load > 0.5:
                console.print(f"Other processes disturb the timing: load average {load:.1f}", style="yellow")
            settings = {"shapes": select, "passes": list(chosen), "budget_s": budget, "load_average": load}
            comparisons = _run(console, selected, device, chosen, budget, time_limit)
            rows = [row for c in comparisons for row in (c.ours, c.theirs) if row is not None]
            document = record.document(rows, device=device, settings=settings)
        if json_path is not None:
            record.write(json_path, document)
        if plot_path is not None:
            chart.plot(comparisons, document, plot_path)
    except ValueError as error:
        _fail(error)
    if any(comparison.ours.error for comparison in comparisons):
        raise typer.Exit(1)


def _run(
    console: Console,
    selected: Sequence[shapes.Shape],
    device: str,
    passes: Sequence[Pass],
    budget: float,
    time_limit: float | None,
) -> list[Comparison]:
    """Runs the benchmark under a progress bar and prints what was measured, also when interrupted."""
    comparisons: list[Comparison] = []
    try:
        with _progress(console) as progress:
            task = progress.add_task(selected[0].name, total=len(selected) * len(passes))
            for comparison in runner.run(
                selected, device=device, passes=passes, budget_s=budget, time_limit_s=time_limit
            ):
                comparisons.append(comparison)
                done = f"{comparison.ours.shape} {comparison.ours.pass_}: {comparison.verdict}"
                progress.update(task, advance=1, description=done)
    finally:
        console.print(_bench_table(comparisons))
        for comparison in comparisons:
            for row in (comparison.ours, comparison.theirs):
                if row is not None and row.error:
                    console.print(f"{row.shape} {row.pass_} {row.contender}: {row.error}", markup=False)
        for pass_, mean in record.geometric_means(comparisons).items():
            console.print(
                f"{pass_}: geometric mean {format_ratio(float(mean['ratio']))} over {mean['shapes']} shapes, "
                f"{mean['slower']} slower than nn.LSTM"
            )
    return comparisons


def _bench_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD)
    for title in ("shape", "pass"):
        table.add_column(title, no_wrap=True)
    for title in ("FastLSTM tokens/s", "nn.LSTM tokens/s", "ratio", "spread"):
        table.add_column(title, justify="right")
    table.add_column("plan", no_wrap=True)
    for comparison in comparisons:
        ours, theirs, ratio = comparison.ours, comparison.theirs, comparison.ratio
        plan = [str(ours.plan[key]) for key in ("forward", "backward") if ours.plan.get(key)] if ours.plan else []
        table.add_row(
            ours.shape,
            ours.pass_,
            format_rate(ours.tokens_per_s),
            format_rate(theirs.tokens_per_s if theirs else None),
            comparison.verdict,
            f"{comparison.spread:.0%}" if ratio is not None else "-",
            " / ".join(plan),
            style="red" if ours.error or (ratio is not None and ratio < 1) else None,
        )
    return table


def _shape_table() -> Table:
    table = Table("name", "groups", "stands for", box=rich.box.SIMPLE_HEAD)
    for group, meaning in shapes.GROUPS.items():
        table.add_row(group, "(group)", meaning)
    table.add_section()
    for shape in (*shapes.SHAPES, *shapes.GPU_SHAPES):
        table.add_row(shape.name, ", ".join(shape.groups), shape.stands_for)
    return table


def _verification_table(summaries: Sequence[verification.Summary]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD)
    for title in ("op", "precision", "plan", "ISA"):
        table.add_column(title, no_wrap=True)
    for title in ("shapes", "output error", "nn.LSTM's", "gradient error", "nn.LSTM's"):
        table.add_column(title, justify="right")
    table.add_column("result")
    for s in summaries:
        errors = [f"{error:.1e}" for pair in (s.output_errors, s.gradient_errors) for error in pair or ()] or ["-"] * 4
        verdict = f"{s.failed} FAILED" if s.failed else "ok" if s.ran else "not applicable"
        style = "red" if s.failed else None if s.ran else "dim"
        table.add_row(s.op, s.precision, s.plan, s.isa, str(s.ran), *errors, verdict, style=style)
    return table


def _register_language_model(name: str, summary: str) -> None:
    """Adds a command of fastlstm/lm/cli.py, which is imported only when the command runs.

    The other commands then work without the extra `[lm]`, and start without importing it.
    """

    @app.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def run(context: typer.Context) -> None:
        try:
            commands = importlib.import_module("fastlstm.lm.cli")
        except ModuleNotFoundError as missing:
            if missing.name not in ("tokenizers", "safetensors"):
                raise
            _fail(f'{name} needs {missing.name}: pip install "fastlstm[lm]"')
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        command.command(name)(getattr(commands, name))
        command(args=context.args, prog_name=f"fastlstm {name}")


_register_language_model("train", "Train a language model on text.")
_register_language_model("generate", "Generate text from a trained language model.")
_register_language_model("demo", "Verify, train, compare with nn.LSTM and generate, on the built-in text.")


def _fail(reason: object) -> NoReturn:
    typer.echo(f"fastlstm: {reason}", err=True)
    raise typer.Exit(2)


def _console() -> Console:
    console = Console()
    # Into a file or a pipe rich assumes 80 columns and would cut the tables.
    return console if console.is_terminal else Console(width=140)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "-"
    return "-" if value is None else str(value)


def _quiet_baseline() -> None:
    """Hides nn.LSTM's warning that projections miss its fast path: the table shows what that costs."""
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")

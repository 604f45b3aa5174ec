"""The commands `fastlstm train`, `generate` and `demo`; fastlstm/cli.py registers them.

They turn options into a `Config` and into calls of `train.py`, `generate.py` and `demo.py`, show progress (a
bar on a terminal, plain lines elsewhere), and turn every mistake of the user into one line on standard error
and exit status 1. An interrupted command exits with 128 plus the signal's number. Of several processes that
train together (parallel.py) the main one speaks for all. Needs the extras `[lm]` and `[cli]`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from fastlstm.lm.config import PRESETS, LanguageModelError, preset
from fastlstm.lm.data import BUILT_IN
from fastlstm.lm.demo import run_demo
from fastlstm.lm.generate import generate as generate_text
from fastlstm.lm.generate import load_model
from fastlstm.lm.parallel import ALONE, Group, joined
from fastlstm.lm.train import Interrupted
from fastlstm.lm.train import resume as resume_training
from fastlstm.lm.train import train as train_model

Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; its default if left out.")]


class Display:
    """An `Observer` for people: lines, and for the steps a bar or, where there is no terminal, 20 lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
        )
        self._bar = ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal)

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stepped(self, step: int, steps: int, loss: float, tokens_per_s: float) -> None:
        """Show the step."""
        if not self.console.is_terminal:
            if step == steps or step % max(1, steps // 20) == 0:
                self.note(f"step {step}/{steps}  loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s")
            return
        if not self._bar.task_ids:
            self._bar.add_task("", loss=loss, speed=tokens_per_s)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, total=steps, loss=loss, speed=tokens_per_s)
        if step == steps:
            self.close()

    def validated(self, step: int, perplexity: float) -> None:
        """Print the perplexity."""
        self.note(f"step {step}: validation perplexity {perplexity:.1f}")

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.stop()
        for task in self._bar.task_ids:
            self._bar.remove_task(task)


@contextlib.contextmanager
def _one_line_errors(group: Group = ALONE) -> Iterator[Display]:
    """Gives a Display; turns a mistake of the user, or an interruption, into one line and an exit status.

    Only the main process of a group prints: what stops another one stops it too, by the methods of `Group`.
    """
    quiet = not group.is_main
    console = Console(quiet=quiet)
    # Into a file or a pipe rich assumes 80 columns, too few for the tables.
    display = Display(console if console.is_terminal else Console(width=110, quiet=quiet))
    try:
        yield display
    except (LanguageModelError, OSError) as error:
        display.close()
        _fail(str(error), 1, quiet)
    except Interrupted as stop:
        display.close()
        _fail(str(stop), 128 + stop.signum, quiet)
    except KeyboardInterrupt:
        display.close()
        _fail("interrupted", 128 + signal.SIGINT, quiet)
    finally:
        display.close()


def _fail(reason: str, status: int, quiet: bool = False) -> NoReturn:
    if not quiet:
        typer.echo(f"fastlstm: {reason}", err=True)
    raise typer.Exit(status)


def train(
    preset_name: Annotated[
        str | None, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}; seed if left out.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help=f"A text file, a folder of them, or built in: {', '.join(BUILT_IN)}.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/PRESET if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew although --out has a checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bpe or char.")] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab", help="Tokens of the vocabulary.")] = None,
    embedding_size: Annotated[int | None, typer.Option("--embedding", help="Embedding size.")] = None,
    hidden_size: Annotated[int | None, typer.Option("--hidden", help="Units of an LSTM layer.")] = None,
    num_layers: Annotated[int | None, typer.Option("--layers", help="LSTM layers.")] = None,
    tie_weights: Annotated[
        bool | None, typer.Option("--tie/--no-tie", help="Softmax with the embedding matrix.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Rate of all dropouts: input, hidden, output.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Steps of truncated back-propagation.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Lanes read side by side.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    clip_norm: Annotated[float | None, typer.Option("--clip", help="Bound on the gradient's norm.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    lstm: Annotated[str | None, typer.Option(help="fastlstm or torch (nn.LSTM).")] = None,
    threads: Threads = None,
) -> None:
    """Train a language model on text.

    Options left out keep the preset's values. Ctrl-C writes a checkpoint; --resume goes on from it, exactly.

    torchrun --nproc-per-node N -m fastlstm train ... shares each batch among N processes.
    """
    given = {
        "preset": preset_name,
        "data": data if data is None or data in BUILT_IN else str(Path(data).resolve()),
        "steps": steps,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "embedding_size": embedding_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "tie_weights": tie_weights,
        "dropout_input": dropout,
        "dropout_hidden": dropout,
        "dropout_output": dropout,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "clip_norm": clip_norm,
        "evaluate_every": evaluate_every,
        "save_every": save_every,
        "seed": seed,
        "lstm": lstm,
    }
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with joined() as group, _one_line_errors(group) as display:
        if resume and overwrite:
            raise LanguageModelError("--resume and --overwrite exclude each other")
        folder = out or Path("runs", preset_name or "seed")
        if resume:
            run = resume_training(folder, display, overrides=overrides, threads=threads, group=group)
        else:
            config = preset(preset_name or "seed").replace(**overrides)
            run = train_model(config, folder, display, overwrite=overwrite, threads=threads, group=group)
        display.note(
            f"validation perplexity {run.validation_perplexity:.1f} "
            f"(unigram model {run.trainer.unigram_perplexity():.1f}); checkpoint: {run.path}"
        )


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or its checkpoint file.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 0,
    threads: Threads = None,
) -> None:
    """Generate text from a trained language model, streaming it to standard output."""
    with _one_line_errors():
        if threads is not None:
            torch.set_num_threads(threads)
        model, tokenizer = load_model(run)
        pieces = generate_text(
            model,
            tokenizer,
            prompt,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        typer.echo(prompt, nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()


def demo(
    seconds: Annotated[
        float, typer.Option(min=1, help="Seconds for the two trainings; sets their number of steps.")
    ] = 180,
    steps: Annotated[int | None, typer.Option(min=10, help="Steps of each training, instead of --seconds.")] = None,
    threads: Threads = None,
) -> None:
    """Verify FastLSTM, train the reference model with it and with nn.LSTM, compare both, and generate text.

    Exits with status 1 if a result is wrong, the losses part, or the model does not beat the unigram model.
    """
    with _one_line_errors() as display:
        if threads is not None:
            torch.set_num_threads(threads)
        failures = run_demo(display, display.console, seconds=seconds, steps=steps)
        for failure in failures:
            typer.echo(f"fastlstm: demo failed: {failure}", err=True)
        if failures:
            raise typer.Exit(1)

"""The demonstration behind `fastlstm demo`: verification, training, comparison with nn.LSTM, a sample.

It verifies FastLSTM on the reference model's own LSTM shape, trains the `seed` preset on the built-in text
with FastLSTM and again with nn.LSTM, compares the two loss curves and the model with a unigram model, times
both implementations in turns, and prints a sample. The number of steps follows from the speed of the machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import nn

from fastlstm.bench.shapes import Shape
from fastlstm.bench.timing import measure
from fastlstm.bench.workload import CONTENDERS, Workload
from fastlstm.lm.config import PRESETS, Config
from fastlstm.lm.data import TokenFile
from fastlstm.lm.generate import generate
from fastlstm.lm.model import LSTM_CLASSES, linear_cross_entropy
from fastlstm.lm.train import Observer, Speed, Trainer, prepare_text
from fastlstm.verify import check

# Two correct fp32 programs differ by rounding, and training amplifies the difference from step to step until it is that
# of any two: in 460 steps nn.LSTM comes to lie 8e-4 nats from itself with weights an ulp off, and FastLSTM 1.1e-3 from
# it; in the first 50 it is 1e-6. A wrong gradient shows within a few steps, far above these bounds.
EARLY_STEPS = 50
EARLY_BOUND = 1e-4
LATE_BOUND = 1e-2
STEPS = range(40, 601, 10)


def run_demo(
    observer: Observer,
    console: Console,
    *,
    seconds: float,
    steps: int | None = None,
    timing_s: float = 15,
    config: Config = PRESETS["seed"],
) -> list[str]:
    """Run the demonstration.

    Args:
        observer: is told about the training steps.
        console: takes the tables and the sample.
        seconds: aimed at for the two trainings together, which make from 40 to 600 steps.
        steps: number of training steps, instead of `seconds`.
        timing_s: seconds for timing.
        config: the model and its training.

    Returns:
        What went wrong, one line each; empty if all is well.
    """
    failures = []
    shape = Shape(
        T=config.sequence_length,
        B=config.batch_size,
        I=config.embedding_size,
        H=config.hidden_size,
        layers=config.num_layers,
        state=True,
    )
    console.rule(f"1. FastLSTM against nn.LSTM on the model's LSTM, {shape.name}")
    workload = Workload(shape)
    failures += _verify(workload, console)

    console.rule(f"2. Training the preset {config.preset!r} with FastLSTM")
    with tempfile.TemporaryDirectory() as folder:
        config, tokenizer, tokens = prepare_text(config, Path(folder, "tokens.bin"), observer)
        times = _time(config, tokens, workload, timing_s)
        step_s = times["model fastlstm"] + times["model torch"]
        config = config.replace(steps=steps or max(n for n in STEPS if n == STEPS[0] or n * step_s <= seconds))
        trainer = Trainer(config, tokens, LSTM_CLASSES["fastlstm"])
        losses = _train(trainer, observer)
        perplexity, unigram = trainer.perplexity(), trainer.unigram_perplexity()
        observer.note(f"validation perplexity: {perplexity:.1f}, of a unigram model on the same tokens: {unigram:.1f}")
        if not perplexity < unigram:
            failures.append(f"validation perplexity {perplexity:.1f} is not below the unigram model's {unigram:.1f}")

        console.rule("3. The same steps with nn.LSTM")
        failures += _compare(losses, _train(Trainer(config, tokens, nn.LSTM), observer), observer)
    _show_speed(config, times, console, observer)

    console.rule("4. A sample (temperature 0.7, top-p 0.9)")
    prompt = "The "
    pieces = generate(trainer.model.eval(), tokenizer, prompt, tokens=150, temperature=0.7, top_p=0.9, seed=config.seed)
    console.print(Panel(Text(prompt + "".join(pieces)), box=box.ROUNDED))
    return failures


def _verify(workload: Workload, console: Console) -> list[str]:
    """Show the errors against fp64 of outputs, states and all gradients; return those beyond the bound."""
    table = Table("tensor", box=box.SIMPLE_HEAD)
    for title in ("FastLSTM's error", "nn.LSTM's error", "bound", "largest value"):
        table.add_column(title, justify="right")
    table.add_column("")
    reports = check(workload, ["forward_backward"])
    for r in reports:
        numbers = (f"{value:.1e}" for value in (r.error, r.torch_error, r.bound, r.scale))
        table.add_row(r.name, *numbers, "ok" if r.ok else "WRONG", style=None if r.ok else "red")
    console.print(table)
    console.print("Largest errors against float64. Bound: twice nn.LSTM's error plus a rounding floor.", style="dim")
    return [str(report) for report in reports if not report.ok]


def _train(trainer: Trainer, observer: Observer) -> list[float]:
    config = trainer.config
    speed = Speed(config.sequence_length * config.batch_size)
    losses = []
    for step in range(1, config.steps + 1):
        losses.append(speed.timed(trainer.train_step))
        observer.stepped(step, config.steps, losses[-1], speed.tokens_per_s)
    return losses


def _compare(ours: list[float], theirs: list[float], observer: Observer) -> list[str]:
    """Report how far apart the two loss curves are; return a line for each bound that is exceeded."""
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    early, late = max(differences[:EARLY_STEPS]), max(differences)
    observer.note(
        f"largest difference of the losses: {early:.1e} in the first {EARLY_STEPS} steps "
        f"(bound {EARLY_BOUND:g}), "
        f"{late:.1e} in all {len(differences)} (bound {LATE_BOUND:g})"
    )
    failures = []
    if not early <= EARLY_BOUND:
        failures.append(f"losses differ by {early:.1e} in the first {EARLY_STEPS} steps, more than {EARLY_BOUND:g}")
    if not late <= LATE_BOUND:
        failures.append(f"losses differ by {late:.1e}, more than {LATE_BOUND:g}")
    return failures


def _time(config: Config, tokens: TokenFile, workload: Workload, seconds: float) -> dict[str, float]:
    """Seconds of the parts of a training step, all taken in turns.

    Returns:
        "model fastlstm" and "model torch": a training step; "lstm fastlstm" and "lstm torch": forward and
        backward of the LSTM alone; "softmax": forward and backward from the LSTM's output to the loss.
    """
    n = config.sequence_length * config.batch_size
    features = torch.randn(n, config.hidden_size, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.hidden_size, requires_grad=True)
    bias = torch.zeros(config.vocab_size, requires_grad=True)
    targets = torch.randint(config.vocab_size, (n,))

    def model_step(contender: str) -> Callable[[], None]:
        trainer = Trainer(config, tokens, LSTM_CLASSES[contender])

        def call() -> None:
            trainer.train_step()

        return call

    def softmax() -> None:
        torch.autograd.backward(linear_cross_entropy(features, weight, bias, targets))

    calls = {f"model {contender}": model_step(contender) for contender in CONTENDERS}
    calls |= {f"lstm {contender}": workload.step(contender, "forward_backward") for contender in CONTENDERS}
    calls["softmax"] = softmax
    with workload.precision():
        return {name: timing.median_s for name, timing in measure(calls, budget_s=seconds).items()}


def _show_speed(config: Config, times: dict[str, float], console: Console, observer: Observer) -> None:
    """The table of tokens per second, and what the softmax has to do with it."""
    n = config.sequence_length * config.batch_size
    table = Table("in training", box=box.SIMPLE_HEAD)
    for title in ("FastLSTM tokens/s", "nn.LSTM tokens/s", "ratio", "FastLSTM ms", "nn.LSTM ms"):
        table.add_column(title, justify="right")
    for title, part in (("whole model", "model"), ("LSTM alone", "lstm")):
        ours, theirs = times[f"{part} fastlstm"], times[f"{part} torch"]
        rates = (f"{n / ours:,.0f}", f"{n / theirs:,.0f}", f"{theirs / ours:.2f}x")
        table.add_row(title, *rates, f"{1000 * ours:.1f}", f"{1000 * theirs:.1f}")
    console.print(table)
    share = times["softmax"] / times["model fastlstm"]
    observer.note(
        f"Timed in turns on {torch.get_num_threads()} threads. The softmax over {config.vocab_size:,} tokens "
        f"takes {1000 * times['softmax']:.1f} ms with either, {share:.0%} of FastLSTM's training step: "
        "in a model this small it bounds what a faster LSTM can gain."
    )

"""Training: the optimiser loop with its schedule, validation, checkpoints, and exact resumption.

`Trainer` is a model, its optimiser and its place in the text; it has no side effects outside itself, so
`demo.py` runs two of them against each other. `train` is the whole job of `fastlstm train`: it prepares the
text, starts or resumes a run in a folder, reports to an `Observer`, and turns SIGINT and SIGTERM into a last
checkpoint. Both work in one process or in the several of a `parallel.Group`, which then all do the same.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastlstm.lm.checkpoint import FILE_NAME, Checkpoint, Progress, load_checkpoint, save_checkpoint
from fastlstm.lm.config import Config, LanguageModelError
from fastlstm.lm.data import Batches, TokenFile, encode_corpus, load_corpus, open_token_file
from fastlstm.lm.model import LSTM_CLASSES, LSTMClass, LSTMLanguageModel, State, unigram_log_probabilities
from fastlstm.lm.parallel import ALONE, Group
from fastlstm.lm.tokenizer import tokenizer_from_json, train_tokenizer

TOKENS_NAME = "tokens.bin"
# Settings that do not change what has been trained so far; all others are the checkpoint's on resumption.
RESUMABLE = ("steps", "evaluate_every", "save_every")


class Interrupted(Exception):
    """SIGINT or SIGTERM, number `signum`, ended the training, after a checkpoint was written."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


class Observer(Protocol):
    """Is told how a training goes."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def stepped(self, step: int, steps: int, loss: float, tokens_per_s: float) -> None:
        """Step `step` of `steps` is done; `loss` in nats per token, the speed is that of recent steps."""

    def validated(self, step: int, perplexity: float) -> None:
        """The validation perplexity after step `step`."""


class Trainer:
    """A language model in training.

    Training uses torch's default random generator, which the constructor seeds with `config.seed`. In a group of
    several processes each has a Trainer, with equal parameters and its own columns of every batch; dropout is drawn
    from another seed in each. All must call the same methods, `learning_rate` and `unigram_perplexity` excepted.

    Args:
        config: the run's settings; `vocab_size` is that of the tokenizer.
        tokens: the text.
        lstm: the class of the LSTM stack.
        group: the processes that train together.

    Attributes:
        step: optimiser steps done.
        model: the LSTMLanguageModel.
        state: the LSTM's state in the columns of this process; None before the first step.
        unigram: log probabilities [V] of the unigram model of the training part, the model's baseline. The
            softmax bias starts there, which spares the first hundred steps of learning how frequent the
            tokens are.

    Raises:
        LanguageModelError: the text is too short for the batches asked for, or `batch_size` is no multiple of the
            number of processes.
    """

    def __init__(self, config: Config, tokens: TokenFile, lstm: LSTMClass, group: Group = ALONE) -> None:
        group.require_equal_shares(config.batch_size)
        self.config = config
        self.group = group
        self.step = 0
        self.state: State | None = None
        self.batches = Batches(tokens.train, config.sequence_length, config.batch_size, drop_last=True)
        lanes = max(1, min(config.batch_size, tokens.validation.numel() // config.sequence_length))
        self.validation_batches = Batches(tokens.validation, config.sequence_length, lanes)
        self.unigram = unigram_log_probabilities(tokens.train, config.vocab_size)
        torch.manual_seed(config.seed)
        self.model = LSTMLanguageModel(config, lstm)
        with torch.no_grad():
            self.model.softmax_bias.copy_(self.unigram)
        self._loss = group.average_gradients(self.model.loss, self.model)
        self._seed_dropout(step=0)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def _seed_dropout(self, step: int) -> None:
        """Seed the generator anew, except in the main process: that one draws as if it were alone."""
        if not self.group.is_main:
            seed = f"{self.config.seed} {self.group.rank} {step}"
            torch.manual_seed(random.Random(seed).getrandbits(32))

    def learning_rate(self, step: int) -> float:
        """The schedule: linear warm-up, then half a cosine that ends at a tenth of the peak."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))

    def train_step(self) -> float:
        """Train on the next batch.

        Returns:
            The loss of the whole batch in nats per token, before the update.

        Raises:
            LanguageModelError: the loss or the gradient is not finite; the parameters are then left as they
                were.
        """
        place = self.step % len(self.batches)
        if place == 0:
            self.state = None
        inputs, targets = self._columns(self.batches[place])
        self.model.train()
        loss, state = self._loss(inputs, targets, self.state)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        (total,) = self.group.sums(loss.item())
        mean = total / self.group.size
        if not (math.isfinite(mean) and norm.isfinite()):
            raise LanguageModelError(
                f"step {self.step + 1}: the loss is {mean}, the norm of its gradient {norm.item()}: "
                f"training diverged; lower the learning rate ({self.config.learning_rate}, --lr)"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.state = (state[0].detach(), state[1].detach())
        self.step += 1
        return mean

    def _columns(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What of `batch`, inputs and targets, is this process's."""
        inputs, targets = batch
        columns = self.group.columns(inputs.size(1))
        return inputs[:, columns], targets[:, columns]

    @torch.no_grad()
    def perplexity(self, before_batch: Callable[[], None] = lambda: None) -> float:
        """exp(mean cross entropy) over the validation part; `before_batch` may raise to end it early."""
        self.model.eval()
        state = None
        total = count = 0.0
        for batch in self.validation_batches:
            before_batch()
            inputs, targets = self._columns(batch)
            if targets.numel() == 0:  # a short text has fewer columns than there are processes
                continue
            loss, state = self.model.loss(inputs, targets, state)
            total += loss.item() * targets.numel()
            count += targets.numel()
        total, count = self.group.sums(total, count)
        return _exp(total / count)

    def unigram_perplexity(self) -> float:
        """The perplexity of the unigram model on the tokens that `perplexity` predicts."""
        log_p = torch.cat([self.unigram[targets.flatten()] for _, targets in self.validation_batches])
        return _exp(-log_p.mean().item())

    def tensors(self) -> dict[str, Tensor]:
        """All that `load` needs to go on exactly here, apart from the step; not copies. Equal in all processes."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        moments = self.optimizer.state_dict()["state"]
        for index, (name, _) in enumerate(self.model.named_parameters()):
            tensors |= {f"adam.{name}.{key}": value for key, value in moments.get(index, {}).items()}
        if self.state is not None:
            h, c = (torch.cat(self.group.gather(state), dim=1) for state in self.state)
            tensors |= {"state.h": h, "state.c": c}
        for rank, state in enumerate(self.group.gather(torch.get_rng_state())):
            tensors[_random_name(rank)] = state
        return tensors

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from `tensors` of a trainer with the same configuration and text, after `step` steps.

        It may have been one of another number of processes. Dropout is then drawn anew where a process has no
        predecessor of its rank.

        Raises:
            LanguageModelError: the tensors are not those of such a trainer.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}, "state": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        moments: dict[int, dict[str, Tensor]] = {}
        try:
            self.model.load_state_dict(parts["model"])
            if step:
                for index, (name, _) in enumerate(self.model.named_parameters()):
                    moments[index] = {key: parts["adam"][f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                columns = self.group.columns(self.config.batch_size)
                h, c = (parts["state"][name][:, columns].contiguous() for name in ("h", "c"))
                self.state = (h, c)
            if _random_name(self.group.rank) in tensors or self.group.is_main:
                torch.set_rng_state(tensors[_random_name(self.group.rank)])
            else:
                self._seed_dropout(step)
        except (KeyError, RuntimeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise LanguageModelError(f"the checkpoint does not fit its configuration: {first_line}") from error
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = step


def _random_name(rank: int) -> str:
    """Name in a checkpoint of the state of a process's random generator."""
    return f"random.{rank}" if rank else "random"


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


class StopSignals:
    """While entered, SIGINT and SIGTERM take effect at the next `check` only; a second one acts as before.

    In a group of several processes a signal to one stops all, at the same `check`.
    """

    def __init__(self, group: Group = ALONE) -> None:
        self._group = group
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        self.__exit__()

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        signum = self._group.largest(self._signum or 0)
        if signum:
            raise Interrupted(signum)

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


def prepare_text(config: Config, tokens_path: Path, observer: Observer) -> tuple[Config, Tokenizer, TokenFile]:
    """Load the text of `config`, train its tokenizer, and encode the text into `tokens_path`.

    Returns:
        `config` with the tokenizer's vocabulary size, the tokenizer, the tokens.

    Raises:
        LanguageModelError: the text is missing, empty, not text, or too short.
    """
    corpus = load_corpus(config.data, config.seed)
    skipped = f", {corpus.skipped} files that are not text skipped" if corpus.skipped else ""
    observer.note(f"text: {config.data}, {len(corpus.documents):,} documents{skipped}")
    tokenizer = train_tokenizer(corpus.pieces(), config)
    config = config.replace(vocab_size=tokenizer.get_vocab_size())
    tokens_path.parent.mkdir(parents=True, exist_ok=True)
    tokens = encode_corpus(corpus, tokenizer, tokens_path, config.validation_fraction)
    observer.note(
        f"tokens: {tokens.train.numel():,} to train on, {tokens.validation.numel():,} to validate on, "
        f"vocabulary {config.vocab_size:,} ({config.tokenizer})"
    )
    return config, tokenizer, tokens


class Run:
    """A training run and its folder: the trainer and the tokenizer, and the checkpoint of both.

    In a group of several processes each has a Run, and all call the same methods; the main process writes the files.
    """

    def __init__(self, folder: Path, trainer: Trainer, tokenizer: Tokenizer, tokens_sha256: str) -> None:
        self.path = folder / FILE_NAME
        self.trainer = trainer
        self.validated_step = 0
        self.validation_perplexity: float | None = None
        self._tokenizer = tokenizer
        self._tokens_sha256 = tokens_sha256

    @classmethod
    def start(cls, config: Config, folder: Path, overwrite: bool, observer: Observer) -> Run:
        """A new run in `folder`, with its first checkpoint; see `train`."""
        if (folder / FILE_NAME).exists() and not overwrite:
            raise LanguageModelError(
                f"{folder} has a checkpoint already: --resume goes on with it, --overwrite drops it"
            )
        # An existing run stays whole until the new one is known to work.
        temporary = folder / f"{TOKENS_NAME}.{os.getpid()}.tmp"
        try:
            config, tokenizer, tokens = prepare_text(config, temporary, observer)
            run = cls(folder, Trainer(config, tokens, LSTM_CLASSES[config.lstm]), tokenizer, tokens.sha256)
            os.replace(temporary, folder / TOKENS_NAME)
        finally:
            temporary.unlink(missing_ok=True)
        run.save()
        return run

    @classmethod
    def resume(cls, folder: Path, overrides: dict[str, Any], threads: int | None, group: Group) -> Run:
        """The run of `folder`, as its checkpoint left it; see `resume`."""
        # The main process comes first: the token file that it may have to make is then there for the others.
        checkpoint, tokenizer, tokens = group.main_first(lambda: cls._reopen(folder, overrides))
        progress = checkpoint.progress
        if threads or progress.processes == group.size:
            torch.set_num_threads(threads or progress.threads)
        trainer = Trainer(checkpoint.config, tokens, LSTM_CLASSES[checkpoint.config.lstm], group)
        trainer.load(checkpoint.tensors, progress.step)
        run = cls(folder, trainer, tokenizer, tokens.sha256)
        run.validated_step, run.validation_perplexity = (
            progress.validated_step,
            progress.validation_perplexity,
        )
        return run

    @classmethod
    def _reopen(cls, folder: Path, overrides: dict[str, Any]) -> tuple[Checkpoint, Tokenizer, TokenFile]:
        """The checkpoint of `folder`, its configuration with the overrides, its tokenizer and its tokens."""
        checkpoint = load_checkpoint(folder / FILE_NAME)
        config = checkpoint.config
        for name, value in overrides.items():
            if name not in RESUMABLE and getattr(config, name) != value:
                raise LanguageModelError(
                    f"cannot resume with another {name}: the checkpoint has {getattr(config, name)}, got {value}"
                )
        config, step = config.replace(**overrides), checkpoint.progress.step
        if config.steps < step:
            raise LanguageModelError(f"steps is {config.steps}, but the checkpoint is at step {step} already")
        tokenizer = tokenizer_from_json(checkpoint.tokenizer)
        tokens = cls._reopen_tokens(folder / TOKENS_NAME, checkpoint, tokenizer)
        return dataclasses.replace(checkpoint, config=config), tokenizer, tokens

    @staticmethod
    def _reopen_tokens(path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer) -> TokenFile:
        """The token file of the run; made again from the text if it is missing or not the one trained on."""
        config, expected = checkpoint.config, checkpoint.progress.tokens_sha256
        if path.is_file() and path.stat().st_size >= 16:
            tokens = open_token_file(path, config.validation_fraction)
            if tokens.sha256 == expected:
                return tokens
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            tokens = encode_corpus(
                load_corpus(config.data, config.seed), tokenizer, temporary, config.validation_fraction
            )
            if tokens.sha256 != expected:
                raise LanguageModelError(f"cannot resume: the text of {config.data} changed since the run started")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return tokens

    def save(self) -> None:
        """Write the checkpoint."""
        progress = Progress(
            self.trainer.step,
            self.validated_step,
            self.validation_perplexity,
            self._tokens_sha256,
            torch.get_num_threads(),
            self.trainer.group.size,
        )
        tensors = self.trainer.tensors()
        checkpoint = Checkpoint(self.trainer.config, self._tokenizer.to_str(), progress, tensors)
        self.trainer.group.on_main(lambda: save_checkpoint(self.path, checkpoint))

    def finish(self, observer: Observer) -> None:
        """Train to the last step; see `train`."""
        trainer, config = self.trainer, self.trainer.config
        speed = Speed(config.sequence_length * config.batch_size)
        if trainer.group.size > 1:
            columns, threads = config.batch_size // trainer.group.size, torch.get_num_threads()
            observer.note(f"{trainer.group.size} processes; lanes of each: {columns}, threads of each: {threads}")
        with StopSignals(trainer.group) as signals:
            try:
                while True:
                    last = trainer.step == config.steps
                    due = trainer.step % config.evaluate_every == 0 or last
                    if due and trainer.step > self.validated_step:
                        self.validation_perplexity = trainer.perplexity(signals.check)
                        self.validated_step = trainer.step
                        observer.validated(trainer.step, self.validation_perplexity)
                    signals.check()
                    if trainer.step % config.save_every == 0 or last:
                        self.save()
                    if last:
                        return
                    loss = speed.timed(trainer.train_step)
                    observer.stepped(trainer.step, config.steps, loss, speed.tokens_per_s)
            except Interrupted as stop:
                # Still within StopSignals: this process's signal may be yet to come, if another's ended the training.
                self.save()
                message = f"interrupted after step {trainer.step}; checkpoint: {self.path}"
                raise Interrupted(stop.signum, message) from None


class Speed:
    """Tokens per second of calls that train on `tokens` tokens each, averaged over about the last ten."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._seconds: float | None = None

    def timed(self, call: Callable[[], float]) -> float:
        """What `call` returns."""
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        return result

    @property
    def tokens_per_s(self) -> float:
        """The average speed; 0 before the first call."""
        return self._tokens / self._seconds if self._seconds else 0.0


def train(
    config: Config,
    folder: Path,
    observer: Observer,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    group: Group = ALONE,
) -> Run:
    """Train a language model in `folder`, which gets the checkpoint and the token file. For the main thread only.

    Training is deterministic: a run that was interrupted at any step, and resumed with the same number of
    threads, has the same losses and ends with the same parameters, bit for bit, as one that was not. That holds for
    one process and for two; more of them may add their gradients in another order after a resumption. Without dropout,
    the losses of any number of processes are those of a single one up to rounding.

    Args:
        config: the settings.
        folder: made if it does not exist.
        observer: is told about every step.
        overwrite: start anew although `folder` has a checkpoint.
        threads: of torch, in each process; None keeps the present number.
        group: the processes that train together. All call this function, with the same arguments but for the
            observer; `batch_size` is that of all together, and they must see the same folder.

    Returns:
        The finished run.

    Raises:
        LanguageModelError: the settings or the text are wrong, or training diverged; the last good
            checkpoint is then still in place.
        Interrupted: after SIGINT or SIGTERM.
        OSError: a file cannot be read or written.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if group.size == 1:
        run = Run.start(config, folder, overwrite, observer)
    else:
        # The main process makes the run; from its first checkpoint all of them go on.
        group.require_equal_shares(config.batch_size)
        group.on_main(lambda: Run.start(config, folder, overwrite, observer))
        run = Run.resume(folder, {}, torch.get_num_threads(), group)
    run.finish(observer)
    return run


def resume(
    folder: Path,
    observer: Observer,
    *,
    overrides: dict[str, Any] | None = None,
    threads: int | None = None,
    group: Group = ALONE,
) -> Run:
    """Go on with the run in `folder`, from its checkpoint; the rest as in `train`.

    Args:
        folder: that of `train`.
        observer: is told about every step.
        overrides: settings that the user asked for. All must be the checkpoint's, except "steps" (the
            schedule is stretched to them), "evaluate_every" and "save_every".
        threads: of torch, in each process; None takes the checkpoint's, or keeps the present number if that was
            written by another number of processes.
        group: the processes that train together, as in `train`; there may be more or fewer than before.

    Raises:
        LanguageModelError: the checkpoint is missing, damaged, or has other settings, or its text has
            changed.
    """
    run = Run.resume(folder, overrides or {}, threads, group)
    observer.note(f"resumed {folder} at step {run.trainer.step:,} of {run.trainer.config.steps:,}")
    run.finish(observer)
    return run

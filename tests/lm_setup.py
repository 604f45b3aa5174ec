"""A tiny text, configuration and observer for the tests of the language model, tests/test_lm_*.py."""

import os
import random
from pathlib import Path

from fastlstm.lm.config import Config
from fastlstm.lm.data import TokenFile
from fastlstm.lm.train import prepare_text

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog;",
    "naïve",
    "cafés",
    "東京",
    "🦊",
    "end",
]
TINY = Config(
    preset="tiny",
    vocab_size=280,
    embedding_size=12,
    hidden_size=20,
    num_layers=2,
    dropout_input=0.1,
    dropout_hidden=0.2,
    dropout_output=0.1,
    sequence_length=10,
    batch_size=4,
    steps=12,
    warmup_steps=2,
    evaluate_every=5,
    save_every=4,
)
SIZES = ["--vocab=280", "--embedding=12", "--hidden=20", "--sequence-length=10", "--batch-size=4"]


class Recorder:
    """An `Observer` that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.losses: list[float] = []
        self.perplexities: dict[int, float] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stepped(self, step: int, steps: int, loss: float, tokens_per_s: float) -> None:
        self.losses.append(loss)

    def validated(self, step: int, perplexity: float) -> None:
        self.perplexities[step] = perplexity


class Stopper(Recorder):
    """Sends this process a signal when training, or validation, gets to a step."""

    def __init__(self, step, signum):
        super().__init__()
        self.step, self.signum = step, signum

    def stepped(self, step, steps, loss, tokens_per_s):
        super().stepped(step, steps, loss, tokens_per_s)
        if step == self.step:
            os.kill(os.getpid(), self.signum)


def write_text(path: Path, lines: int = 60) -> Path:
    """A file of lines, each a random cyclic run of `WORDS`: the next word is certain, a lone one is not."""
    draw = random.Random(0)
    starts = [draw.randrange(len(WORDS)) for _ in range(lines)]
    path.write_text("\n".join(" ".join((WORDS * 2)[s : s + 8]) for s in starts) + "\n", encoding="utf-8")
    return path


def prepare(folder: Path, config: Config = TINY, lines: int = 60) -> tuple[Config, TokenFile]:
    """`config` for the tiny text in `folder`, and the text's tokens."""
    config = config.replace(data=str(write_text(folder / "text.txt", lines)))
    config, _, tokens = prepare_text(config, folder / "tokens.bin", Recorder())
    return config, tokens

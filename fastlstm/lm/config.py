"""Settings of a language-model run: the presets and their validation.

One flat, immutable `Config` describes a run completely (text, tokenizer, model, optimisation); it is stored
as JSON in every checkpoint. The command line turns its options into `Config.replace(...)`; every other
module of `fastlstm.lm` only reads it. `LanguageModelError` is what all of them raise for a mistake of the
user.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass


class LanguageModelError(ValueError):
    """A mistake of the user, in a message of one line; the command line prints it and exits with status 1."""


@dataclass(frozen=True)
class Config:
    """Everything that determines a training run.

    Attributes:
        preset: name of the preset this configuration started from.
        data: a built-in text ("pydoc", "stdlib") or the path of a text file or folder.
        tokenizer: "bpe" (byte-level byte-pair encoding) or "char" (one token per character).
        vocab_size: number of tokens V; 0, for "char" only, takes every character of the text.
        embedding_size: width E of the embedding.
        hidden_size: units H of every LSTM layer.
        num_layers: LSTM layers L.
        tie_weights: the softmax layer uses the embedding matrix; where H differs from E, a linear projection
            from H to E comes before it.
        dropout_input, dropout_hidden, dropout_output: probability of dropping an embedding feature, a feature
            between two LSTM layers, and a feature of the last layer's output.
        sequence_length: steps T of truncated back-propagation through time.
        batch_size: lanes B of the text that are read side by side.
        steps: number of optimiser steps.
        learning_rate: peak of the schedule (linear warm-up, then half a cosine down to a tenth of the peak).
        warmup_steps: length of the warm-up.
        weight_decay: decoupled weight decay of AdamW.
        clip_norm: bound on the 2-norm of the whole gradient.
        validation_fraction: part of the text, its end, that is held out.
        evaluate_every, save_every: steps between two validations, and between two checkpoints.
        seed: of the parameters, of dropout and of the order of documents.
        lstm: "fastlstm" or "torch", the implementation that is trained.
    """

    preset: str
    data: str = "pydoc"
    tokenizer: str = "bpe"
    vocab_size: int = 10_000
    embedding_size: int = 128
    hidden_size: int = 128
    num_layers: int = 1
    tie_weights: bool = False
    dropout_input: float = 0.0
    dropout_hidden: float = 0.0
    dropout_output: float = 0.0
    sequence_length: int = 100
    batch_size: int = 32
    steps: int = 600
    learning_rate: float = 0.02
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    validation_fraction: float = 0.05
    evaluate_every: int = 200
    save_every: int = 200
    seed: int = 1
    lstm: str = "fastlstm"

    def __post_init__(self) -> None:
        if self.tokenizer not in ("bpe", "char"):
            raise LanguageModelError(f"tokenizer must be 'bpe' or 'char', got {self.tokenizer!r}")
        if self.lstm not in ("fastlstm", "torch"):
            raise LanguageModelError(f"lstm must be 'fastlstm' or 'torch', got {self.lstm!r}")
        smallest = {"bpe": 257, "char": 2}[self.tokenizer]
        if self.vocab_size < smallest and not (self.tokenizer == "char" and self.vocab_size == 0):
            raise LanguageModelError(
                f"vocab_size must be at least {smallest} for the tokenizer {self.tokenizer!r}, got {self.vocab_size}"
            )
        for name in ("embedding_size", "hidden_size", "num_layers", "sequence_length", "batch_size", "steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("evaluate_every", "save_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("dropout_input", "dropout_hidden", "dropout_output"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("learning_rate", "clip_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("warmup_steps", "weight_decay"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "zero or positive, and finite")
        self._require("validation_fraction", 0 < self.validation_fraction < 1, "in (0, 1)")
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2**63)")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise LanguageModelError(f"{name} must be {expected}, got {getattr(self, name)}")

    def replace(self, **changes: object) -> Config:
        """A copy with some fields changed, validated again.

        Raises:
            LanguageModelError: a value is outside its range.
        """
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_json(self) -> str:
        """All fields, as a JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of `to_json`.

        Raises:
            LanguageModelError: the text is no JSON object, or has not exactly the fields of a `Config`.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise LanguageModelError(f"not a configuration of fastlstm.lm: {error}") from error


# "seed" is the reference model of the project. "awd" has the sizes and dropout rates of Merity, Keskar and
# Socher ("Regularizing and Optimizing LSTM Language Models", 2018), with plain dropout in place of their
# variational dropout and weight drop, Adam in place of averaged SGD, and 1150 units in the last layer too
# (theirs has 400): a stack of equal layers is one operator, and a projection leads to the tied softmax.
PRESETS = {
    "seed": Config(preset="seed", dropout_input=0.1, dropout_output=0.1),
    "char": Config(
        preset="char",
        tokenizer="char",
        vocab_size=0,
        embedding_size=64,
        hidden_size=512,
        sequence_length=128,
        learning_rate=0.004,
        steps=2000,
        warmup_steps=50,
    ),
    "awd": Config(
        preset="awd",
        embedding_size=400,
        hidden_size=1150,
        num_layers=3,
        tie_weights=True,
        dropout_input=0.4,
        dropout_hidden=0.25,
        dropout_output=0.4,
        sequence_length=70,
        batch_size=80,
        learning_rate=0.001,
        steps=10_000,
        warmup_steps=200,
        clip_norm=0.25,
        weight_decay=0.1,
    ),
}


def preset(name: str) -> Config:
    """The preset called `name`.

    Raises:
        LanguageModelError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise LanguageModelError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]

"""Streaming generation of text from a trained model.

`load_model` reads a checkpoint, `generate` yields text piece by piece. The LSTM state is all that is carried
from step to step, so memory and time per token do not grow with the text. Used by `fastlstm generate`,
`demo.py` and programs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from fastlstm.lm.checkpoint import checkpoint_path, load_checkpoint
from fastlstm.lm.config import LanguageModelError
from fastlstm.lm.model import LSTM_CLASSES, LSTMLanguageModel
from fastlstm.lm.tokenizer import tokenizer_from_json


def load_model(run: Path) -> tuple[LSTMLanguageModel, Tokenizer]:
    """The model of a checkpoint, in evaluation mode, and its tokenizer.

    Args:
        run: the folder of a training run, or its checkpoint file.

    Raises:
        LanguageModelError: there is no checkpoint, or it is damaged.
    """
    checkpoint = load_checkpoint(checkpoint_path(run))
    model = LSTMLanguageModel(checkpoint.config, LSTM_CLASSES[checkpoint.config.lstm])
    prefix = "model."
    parameters = {name[len(prefix) :]: t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(parameters)
    except RuntimeError as error:
        raise LanguageModelError(f"{run}: the checkpoint does not fit its configuration") from error
    return model.eval(), tokenizer_from_json(checkpoint.tokenizer)


def generate(
    model: LSTMLanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue `prompt`, yielding each piece of text as soon as it is certain.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompt: text to continue; an empty one counts as a line break. It is not part of what is yielded.
        tokens: number of tokens to generate.
        temperature: divides the logits; below 1 favours the likely tokens, 0 always takes the likeliest.
        top_k: draw from the k likeliest tokens only; 0 means from all.
        top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least this.
        seed: of the draws. Equal arguments give equal text.

    Returns:
        An iterator over the pieces of the continuation.

    Raises:
        LanguageModelError: an argument is out of range (at once, not at the first piece).
    """
    for name, value, holds, expected in (
        ("tokens", tokens, tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "zero or positive, and finite"),
        ("top_k", top_k, top_k >= 0, "zero or positive"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("seed", seed, 0 <= seed < 2**63, "in [0, 2**63)"),
    ):
        if not holds:
            raise LanguageModelError(f"{name} must be {expected}, got {value}")
    context = tokenizer.encode(prompt or "\n").ids
    generator = torch.Generator().manual_seed(seed)

    def pieces() -> Iterator[str]:
        decoder = DecodeStream(skip_special_tokens=False)
        step, state = torch.tensor(context).unsqueeze(1), None
        for _ in range(tokens):
            with torch.inference_mode():
                features, state = model.features(step, state)
                token = sample(model.logits(features[-1, 0]), temperature, top_k, top_p, generator)
            step = torch.tensor([[token]])
            if piece := decoder.step(tokenizer, token):
                yield piece

    return pieces()


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from `logits` [V]; the arguments are those of `generate`, already validated."""
    if temperature == 0:
        return int(logits.argmax())
    logits, order = logits.float().sort(descending=True)
    probabilities = ((logits - logits[0]) / temperature).softmax(0)
    kept = probabilities.cumsum(0) - probabilities < top_p
    if top_k:
        kept[top_k:] = False
    return int(order[torch.multinomial(probabilities * kept, 1, generator=generator)])

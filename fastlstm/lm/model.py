"""The language model: embedding -> LSTM stack -> softmax, with optional weight tying and dropout.

`LSTMLanguageModel` takes the LSTM class as an argument, so FastLSTM and torch.nn.LSTM train in the very same
program. `linear_cross_entropy` is its loss: the last matrix product and the cross entropy in one function
that never holds the logits of a whole batch. `unigram_log_probabilities` is the baseline that a language
model has to beat. `train.py`, `demo.py` and `generate.py` use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlstm.lm.config import Config
from fastlstm.modules import FastLSTM

State = tuple[Tensor, Tensor]
LSTMClass = Callable[..., nn.Module]  # called with the keyword arguments of nn.LSTM

LSTM_CLASSES: dict[str, LSTMClass] = {"fastlstm": FastLSTM, "torch": nn.LSTM}

# Logits that exist at once: 8 MB in fp32 stay in the last-level cache between the passes over them. On 2 cores of an
# AMD EPYC 7003 (AVX2), forward and backward for 3200 tokens, E = 128 and V = 10,000 take 220 ms, as long as their three
# matrix products alone, against 400 ms for F.linear and F.cross_entropy.
CHUNK_LOGITS = 1 << 21


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk of the logits; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, with_gradients: bool
    ) -> Tensor:
        n, vocab_size = hidden.size(0), weight.size(0)
        loss = hidden.new_zeros(())
        d_hidden, d_weight, d_bias = torch.empty_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
        chunk = min(n, max(1, CHUNK_LOGITS // vocab_size))
        buffer = hidden.new_empty(chunk, vocab_size)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            target = targets[rows].unsqueeze(1)
            logits = torch.addmm(bias, hidden[rows], weight.t(), out=buffer[: target.size(0)])
            top = logits.amax(1, keepdim=True)
            target_logits = logits.gather(1, target) - top
            exps = logits.sub_(top).exp_()
            total = exps.sum(1, keepdim=True)
            target_log_p = target_logits - total.log()
            loss -= target_log_p.sum()
            if with_gradients:
                # d loss / d logits = (softmax - one_hot(target)) / n; the division is left to backward.
                d_logits = exps.mul_(1 / total).scatter_(1, target, target_log_p.exp() - 1)
                torch.mm(d_logits, weight, out=d_hidden[rows])
                d_weight.addmm_(d_logits.t(), hidden[rows])
                d_bias += d_logits.sum(0)
        if with_gradients:
            ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = d_loss / d_hidden.size(0)
        return d_hidden * scale, d_weight * scale, d_bias * scale, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean of F.cross_entropy(F.linear(hidden, weight, bias), targets), faster and in little memory.

    Differentiable once.

    Args:
        hidden: [N, E]
        weight: [V, E]
        bias: [V]
        targets: [N] int64, in [0, V).

    Returns:
        A scalar, in nats per token.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, torch.is_grad_enabled()
    )
    return loss


class LSTMLanguageModel(nn.Module):
    """Predicts the next token: embedding, dropout, LSTM stack, dropout, softmax.

    Args:
        config: the sizes V (`vocab_size`, not 0), E, H, L, the dropout rates and `tie_weights`.
        lstm: the class of the LSTM stack, FastLSTM or torch.nn.LSTM; both draw the same parameters from a
            seed.
    """

    def __init__(self, config: Config, lstm: LSTMClass) -> None:
        super().__init__()
        vocab_size, embedding_size, hidden_size = config.vocab_size, config.embedding_size, config.hidden_size
        self.tie_weights = config.tie_weights
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.input_dropout = nn.Dropout(config.dropout_input)
        self.lstm = lstm(
            input_size=embedding_size,
            hidden_size=hidden_size,
            num_layers=config.num_layers,
            dropout=config.dropout_hidden if config.num_layers > 1 else 0.0,
        )
        self.output_dropout = nn.Dropout(config.dropout_output)
        if config.tie_weights:
            same_size = hidden_size == embedding_size
            self.projection = nn.Identity() if same_size else nn.Linear(hidden_size, embedding_size, bias=False)
        else:
            self.softmax_weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
            bound = 1 / math.sqrt(hidden_size)
            nn.init.uniform_(self.softmax_weight, -bound, bound)
        self.softmax_bias = nn.Parameter(torch.zeros(vocab_size))

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the softmax layer reads.

        Args:
            tokens: [T, B] int64.
            state: (h, c), each [L, B, H]; None stands for zeros.

        Returns:
            features [T, B, E] with tied weights, else [T, B, H], and the state after step T.
        """
        output, state = self.lstm(self.input_dropout(self.embedding(tokens)), state)
        output = self.output_dropout(output)
        return (self.projection(output) if self.tie_weights else output), state

    @property
    def _weight(self) -> Tensor:
        return self.embedding.weight if self.tie_weights else self.softmax_weight

    def logits(self, features: Tensor) -> Tensor:
        """Logits [..., V] of the next token from `features` [..., E or H]."""
        return F.linear(features, self._weight, self.softmax_bias)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the next token at every step, [T, B, V], and the state; arguments as in `features`."""
        features, state = self.features(tokens, state)
        return self.logits(features), state

    def loss(self, tokens: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mean cross entropy of `targets` [T, B] in nats per token, and the state; see `features`."""
        features, state = self.features(tokens, state)
        loss = linear_cross_entropy(features.flatten(0, 1), self._weight, self.softmax_bias, targets.flatten())
        return loss, state


def unigram_log_probabilities(ids: Tensor, vocab_size: int) -> Tensor:
    """Log probabilities [V] of the tokens by their counts in `ids` [N], with add-one smoothing, in fp64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    block = 1 << 20  # bincount makes a copy
    for start in range(0, ids.numel(), block):
        counts += torch.bincount(ids[start : start + block], minlength=vocab_size)
    return ((counts + 1).double() / (ids.numel() + vocab_size)).log()

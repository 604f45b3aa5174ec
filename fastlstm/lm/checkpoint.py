"""Checkpoints: one safetensors file that holds all of a training run, written atomically.

Its tensors are the parameters, Adam's moments, the LSTM state and the state of each process's random generator; its
metadata the configuration, the tokenizer, the step and a digest over all of it, so a damaged file is
recognised and never half loaded. `train.py` writes and resumes from checkpoints, `generate.py` reads them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from fastlstm.lm.config import Config, LanguageModelError

FILE_NAME = "checkpoint.safetensors"
FORMAT = "fastlstm.lm checkpoint 1"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done; the place in the text follows from it.
        validated_step: step of the last validation, 0 before the first.
        validation_perplexity: its result; None before the first.
        tokens_sha256: digest of the token file that is trained on.
        threads: torch.get_num_threads() of the run; another number can change the last bits of a loss.
        processes: that trained together, each with so many threads.
    """

    step: int
    validated_step: int
    validation_perplexity: float | None
    tokens_sha256: str
    threads: int
    processes: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file; `tokenizer` is the tokenizer's JSON, `tensors` are on the CPU."""

    config: Config
    tokenizer: str
    progress: Progress
    tensors: dict[str, Tensor]


def checkpoint_path(run: Path) -> Path:
    """The checkpoint file of `run`, a run's folder or the file itself; it need not exist."""
    return run / FILE_NAME if run.is_dir() else run


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint`; whatever happens, `path` is afterwards the old file or the complete new one.

    Raises:
        LanguageModelError: a tensor holds a NaN or an infinity; nothing is written.
        OSError: the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            step = checkpoint.progress.step
            raise LanguageModelError(f"training diverged: {name} is not finite after step {step}; not saved")
    metadata = {
        "format": FORMAT,
        "config": checkpoint.config.to_json(),
        "tokenizer": checkpoint.tokenizer,
        "progress": json.dumps(dataclasses.asdict(checkpoint.progress)),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint file.

    Raises:
        LanguageModelError: the file is missing, damaged, or not a checkpoint of this format.
    """
    if not path.is_file():
        raise LanguageModelError(f"no checkpoint: {path} is no file")
    try:
        # Read at once: a training that replaces the file meanwhile must not mix two checkpoints.
        content = path.read_bytes()
        # Cloned: products may depend on the alignment, which in the file is not that of torch's tensors.
        tensors = {name: tensor.clone() for name, tensor in load(content).items()}
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, OSError) as error:
        raise LanguageModelError(f"damaged, or not a checkpoint: {path} ({error})") from error
    metadata: dict[str, str] = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise LanguageModelError(f"not a checkpoint of the format {FORMAT!r}: {path}")
    if metadata.pop("sha256", None) != _digest(metadata, tensors):
        raise LanguageModelError(f"damaged checkpoint (its contents do not match its digest): {path}")
    return Checkpoint(
        Config.from_json(metadata["config"]),
        metadata["tokenizer"],
        Progress(**json.loads(metadata["progress"])),
        tensors,
    )


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""The named shapes: every LSTM problem that `fastlstm bench` and the pytest-benchmark suites time.

One list, `SHAPES`, with the workload each shape stands for, and `GPU_SHAPES` with the sizes that fill a GPU. A
shape's name is derived from its fields, so a name can never disagree with what runs. `select` turns the text of
`--shapes` and `--dtype` into shapes and is called by the command line and by benchmarks/conftest.py;
`fastlstm.verify` builds its own small shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT_DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Shape:
    """One LSTM problem: sizes, structure and precision.

    Attributes:
        T, B, I, H, P: steps, batch, input size, hidden size, projection size (0: none).
        layers, directions: depth of the stack; 2 directions make it bidirectional.
        bias: whether the layers have bias vectors.
        packed: the input is a PackedSequence with lengths from T down to T/2 (see `lengths`).
        state: an initial state is given and, in training, receives and propagates gradients, as in a stream
            or an unrolled loop. Without it the state starts at zero.
        kind: "module" is nn.LSTM against FastLSTM, "cell" is nn.LSTMCell against FastLSTMCell (T must be 1).
        dtype: dtype of parameters and input, a key of `DTYPES`.
        autocast: run under `torch.autocast` with bfloat16.
        bf16_products: run with `torch.backends.mkldnn.rnn.fp32_precision = "bf16"`, the user's permission to
            multiply in bfloat16 inside fp32 modules.
        ieee: run with `torch.backends.cudnn.rnn.fp32_precision = "ieee"`, which forbids the TF32 products that torch
            permits by default inside fp32 modules on a GPU.
        gpu: belongs to the group `gpu`, and to no other.
        stands_for: the real workload this shape is a sample of.
    """

    T: int
    B: int
    I: int  # noqa: E741  (the project's name for the input size)
    H: int
    P: int = 0
    layers: int = 1
    directions: int = 1
    bias: bool = True
    packed: bool = False
    state: bool = False
    kind: Literal["module", "cell"] = "module"
    dtype: str = "float32"
    autocast: bool = False
    bf16_products: bool = False
    ieee: bool = False
    gpu: bool = False
    stands_for: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        plain = (self.T, self.layers, self.directions, self.P, self.packed) == (1, 1, 1, 0, False)
        if self.kind == "cell" and not plain:
            raise ValueError(f"a cell has T=1, one layer and direction, no projection, no packing, got {self}")

    @property
    def name(self) -> str:
        """Sizes and what is special about the shape, such as "T100-B32-H128-proj64"."""
        parts = [f"B{self.B}"] if self.kind == "cell" else [f"T{self.T}", f"B{self.B}"]
        if self.kind == "cell":
            parts.insert(0, "cell")
        if self.I != self.H:
            parts.append(f"I{self.I}")
        parts.append(f"H{self.H}")
        if self.P:
            parts.append(f"proj{self.P}")
        if self.layers > 1:
            parts.append(f"L{self.layers}")
        if self.directions == 2:
            parts.append("bi")
        if not self.bias:
            parts.append("nobias")
        if self.packed:
            parts.append("packed")
        if self.dtype != "float32":
            parts.append(SHORT_DTYPES[self.dtype])
        if self.autocast:
            parts.append("autocast")
        if self.bf16_products:
            parts.append("bf16products")
        if self.ieee:
            parts.append("ieee")
        return "-".join(parts)

    @property
    def mixed(self) -> bool:
        """Whether float32 parameters are multiplied in another precision."""
        return self.autocast or self.bf16_products

    @property
    def output_size(self) -> int:
        """Features of h and of one direction of the output."""
        return self.P or self.H

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequence lengths of the batch: evenly spread from T down to T/2 when packed, else all T."""
        if not self.packed or self.B == 1:
            return (self.T,) * self.B
        shortest = max(1, self.T // 2)
        return tuple(self.T - (self.T - shortest) * row // (self.B - 1) for row in range(self.B))

    @property
    def tokens(self) -> int:
        """Time steps of input in one call, summed over the batch."""
        return sum(self.lengths)

    @property
    def groups(self) -> tuple[str, ...]:
        """The group names of `--shapes` that contain this shape."""
        if self.gpu:
            return ("gpu",)
        if self.mixed or self.dtype != "float32":
            return ("all", "lowprec")
        if self.kind == "cell":
            return ("all", "core", "cell")
        if self.packed:
            return ("all", "core", "packed")
        if self.P:
            return ("all", "core", "proj")
        if self.layers > 1 or self.directions > 1:
            return ("all", "core", "stacked")
        return ("all", "core", "streaming" if self.T == 1 or self.B == 1 else "dense")


GROUPS: dict[str, str] = {
    "all": "every named shape but those of gpu",
    "core": "the float32 shapes",
    "dense": "one layer, a batch of equally long sequences",
    "streaming": "batch of one, or one step per call",
    "packed": "PackedSequence",
    "proj": "projections (proj_size)",
    "stacked": "several layers, both directions",
    "cell": "LSTMCell",
    "lowprec": "bfloat16, float16, autocast and bfloat16 products",
    "gpu": "sizes that fill a GPU in bfloat16, float16 and float32 (with TF32), the most telling ones first",
}


def _square(T: int, B: int, H: int, stands_for: str, **fields: Any) -> Shape:
    return replace(Shape(T=T, B=B, I=H, H=H, stands_for=stands_for), **fields)


SHAPES: tuple[Shape, ...] = (
    _square(100, 32, 128, "word language model, preset `seed`: truncated BPTT over 100 steps"),
    _square(256, 8, 64, "sensor and audio features: long sequences, few units"),
    _square(100, 8, 256, "sequence tagging, small batches"),
    _square(100, 32, 512, "language model or acoustic model, medium size"),
    _square(50, 64, 1024, "large language model layer: bound by the machine's multiply peak"),
    _square(100, 1, 128, "one user's sequence, small model"),
    _square(100, 1, 512, "one user's sequence, medium model: bound by reading the weights"),
    _square(1, 1, 32, "control loop, tiny policy: the overhead of a call", state=True),
    _square(1, 1, 256, "streaming inference, one token at a time", state=True),
    _square(1, 1, 1024, "streaming inference, large model", state=True),
    _square(1, 8, 256, "streaming inference for eight users; one reinforcement-learning step", state=True),
    _square(100, 32, 128, "variable-length text, small model", packed=True),
    _square(100, 32, 512, "variable-length text, medium model", packed=True),
    _square(100, 32, 128, "LSTM with projection, small", P=64),
    _square(100, 32, 512, "speech recognition's LSTM with projection", P=64),
    _square(100, 32, 128, "bidirectional tagger or encoder, small", layers=2, directions=2),
    _square(100, 32, 512, "bidirectional encoder, medium", layers=2, directions=2),
    _square(1, 32, 128, "hand-written loop over steps, decoder with attention", kind="cell", state=True),
    _square(1, 1, 128, "hand-written loop for one user, small", kind="cell", state=True),
    _square(1, 1, 512, "hand-written loop for one user, medium", kind="cell", state=True),
    _square(100, 32, 128, "model converted to bfloat16, small", dtype="bfloat16"),
    _square(100, 32, 512, "model converted to bfloat16, medium", dtype="bfloat16"),
    _square(100, 32, 128, "mixed-precision training, small", autocast=True),
    _square(100, 32, 512, "mixed-precision training, medium", autocast=True),
    _square(100, 32, 128, "model converted to float16, small", dtype="float16"),
    _square(100, 32, 512, "model converted to float16, medium", dtype="float16"),
    _square(100, 32, 512, "float32 model that allows bfloat16 products", bf16_products=True),
)


def _gpu_shapes() -> tuple[Shape, ...]:
    """A grid of sizes and a few structures, sorted so that a run which ends early has measured what tells most."""
    dtypes = {"bfloat16": 0.0, "float16": 0.25, "float32": 0.5}
    hidden = {512: 0.0, 1024: 0.0, 128: 0.3, 256: 0.2, 768: 0.3, 2048: 0.6}
    batches = {64: 0.0, 16: 0.0, 1: 0.3, 128: 0.3, 256: 0.6}
    ranked: list[tuple[float, Shape]] = []
    for dtype, rank in dtypes.items():
        ranked.append(
            (rank + 0.05, _square(1024, 16, 768, "the sizes of other projects' published timings", dtype=dtype))
        )
        for H, of_hidden in hidden.items():
            for B, of_batch in batches.items():
                stands_for = "one sequence on a GPU" if B == 1 else "a layer of a large model on a GPU"
                ranked.append((rank + of_hidden + of_batch, _square(512, B, H, stands_for, dtype=dtype)))
        structures: tuple[tuple[str, dict[str, Any]], ...] = (
            ("a stack on a GPU", {"layers": 2}),
            ("a bidirectional encoder on a GPU", {"directions": 2}),
            ("variable-length text on a GPU", {"packed": True}),
            ("speech recognition's LSTM with projection on a GPU", {"P": 128}),
        )
        ranked += [(rank + 0.15, _square(512, 64, 512, why, dtype=dtype, **fields)) for why, fields in structures]
    return tuple(replace(shape, gpu=True) for _, shape in sorted(ranked, key=lambda pair: pair[0]))


GPU_SHAPES = _gpu_shapes()


def parse_dtype(text: str) -> str:
    """A key of `DTYPES` from its long or short name ("bfloat16", "bf16"); ValueError for anything else."""
    by_name = {name: name for name in DTYPES} | {short: name for name, short in SHORT_DTYPES.items()}
    if text not in by_name:
        raise ValueError(f"unknown dtype {text!r}: expected one of {', '.join(by_name)}")
    return by_name[text]


def select(text: str, dtype: str | None = None) -> list[Shape]:
    """The shapes named by comma-separated group and shape names, in the order of the list, each once.

    With `dtype` (any name `parse_dtype` knows) the selected shapes run in that dtype instead of their own;
    mixed precision shapes need float32 parameters and stay only if that is the dtype.

    Raises:
        ValueError: an unknown name, or nothing left to run.
    """
    wanted = [word.strip().lower() for word in text.split(",") if word.strip()]
    everything = (*SHAPES, *GPU_SHAPES)
    known = set(GROUPS) | {shape.name.lower() for shape in everything}
    for word in wanted:
        if word not in known:
            raise ValueError(
                f"unknown shape {word!r}: expected a group ({', '.join(GROUPS)}) or a name that "
                "`fastlstm bench --list` shows"
            )
    selected = [s for s in everything if any(word == s.name.lower() or word in s.groups for word in wanted)]
    if dtype is not None:
        target = parse_dtype(dtype)
        selected = [replace(s, dtype=target) for s in selected if not s.mixed or target == "float32"]
    unique = {shape.name: shape for shape in reversed(selected)}
    if not unique:
        suffix = f" with --dtype {dtype}" if dtype else ""
        raise ValueError(f"no shape to run for --shapes {text!r}{suffix}")
    return [unique[name] for name in reversed(unique)]

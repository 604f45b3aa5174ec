"""Draws the speed-up of every shape from a benchmark document.

On a CPU, bars: one panel for inference, one for training. On a GPU, where the shapes are one layer in many sizes, a map
for each dtype and pass. Called by `fastlstm bench --plot` and benchmarks/table.py; needs matplotlib (extra `[cli]`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlstm.bench.record import TIMES, Comparison, Row, format_ratio, geometric_means, write_atomic

SUFFIXES = (".png", ".svg", ".pdf")
TITLES = {"forward": "Inference", "forward_backward": "Training (forward + backward)"}
_FASTER, _SLOWER, _INK, _MUTED = "#2f6db3", "#c8553d", "#222222", "#6b6b6b"


def plot(comparisons: Sequence[Comparison], document: Mapping[str, Any], path: Path) -> None:
    """Writes the chart to `path` (one of `SUFFIXES`); shapes without a timing are left out.

    Raises:
        ValueError: there is no timing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [comparison for comparison in comparisons if comparison.ratio is not None]
    passes = [pass_ for pass_ in TITLES if any(c.ours.pass_ == pass_ for c in timed)]
    if not passes:
        raise ValueError("there is no timing to plot")
    if timed[0].ours.device == "cuda":
        dtypes = list(dict.fromkeys(c.ours.dtype for c in timed))
        figure = Figure(figsize=(4.6 * len(dtypes), 4.1 * len(passes) + 0.8), layout="constrained")
        rows = figure.subplots(len(passes), len(dtypes), squeeze=False)
        for axes, pass_ in zip(rows, passes, strict=True):
            for axis, dtype in zip(axes, dtypes, strict=True):
                of_panel = [c for c in timed if (c.ours.pass_, c.ours.dtype) == (pass_, dtype)]
                if of_panel:
                    _map(axis, pass_, dtype, of_panel)
                else:
                    axis.set_axis_off()
        explained = "times faster"
    else:
        names = list(dict.fromkeys(c.ours.shape for c in timed))
        figure = Figure(figsize=(4.2 * len(passes) + 2.4, 0.3 * len(names) + 1.6), layout="constrained")
        axes = figure.subplots(1, len(passes), sharex=True, sharey=True, squeeze=False)[0]
        for axis, pass_ in zip(axes, passes, strict=True):
            _panel(axis, pass_, names, {c.ours.shape: c for c in timed if c.ours.pass_ == pass_})
        _scale(axes[0], [c.ratio for c in timed if c.ratio is not None])
        explained = "times faster (log scale), interquartile range as a line"
    FigureCanvasAgg(figure)
    machine, versions, flags = document["machine"], document["versions"], document["flags"]
    device = machine.get("gpu") or f"{machine['cpu']}, {flags['threads']} threads"
    figure.suptitle("FastLSTM's speed relative to torch.nn.LSTM", x=0.01, ha="left", color=_INK, weight="bold")
    figure.supxlabel(
        f"{explained} · {device} · torch {versions['torch']} · {document['date'][:10]}",
        x=0.01,
        ha="left",
        fontsize=8,
        color=_MUTED,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=160)
    write_atomic(path, buffer.getvalue())


def _map(axis: Any, pass_: str, dtype: str, comparisons: Sequence[Comparison]) -> None:
    """The comparisons of one dtype and pass: hidden sizes by batches, and below them what else was timed."""
    plain: dict[tuple[int, int], Comparison] = {}
    for c in comparisons:
        if not _kind(c.ours):
            plain.setdefault((c.ours.H, c.ours.B), c)
    others = [c for c in comparisons if c not in plain.values()]
    hidden, batches = (sorted(set(sizes)) for sizes in zip(*plain, strict=True)) if plain else ([], [])
    for row, H in enumerate(hidden):
        for column, B in enumerate(batches):
            if (H, B) in plain:
                _cell(axis, column, row, 1, plain[H, B])
    width = max(len(batches), 4)
    for place, comparison in enumerate(others):
        size = width / len(others)
        kind = _kind(comparison.ours) or comparison.ours.shape
        _cell(axis, (place + 0.5) * size - 0.5, len(hidden) + 0.5, size, comparison, kind)
    axis.set_xticks(range(len(batches)), [f"B = {B}" for B in batches], fontsize=8)
    axis.set_yticks(range(len(hidden)), [f"H = {H}" for H in hidden], fontsize=8)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(len(hidden) + (1 if others else -0.5), -0.5)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    title = f"{TITLES[pass_]}, {'float32 (TF32 by default)' if dtype == 'float32' else dtype}"
    mean = geometric_means(comparisons)[pass_]
    title += f"\n{mean['ratio']:.2f}{TIMES} geometric mean of {mean['shapes']} shapes"
    axis.set_title(title, loc="left", fontsize=9, color=_INK)


def _kind(row: Row) -> str:
    """What distinguishes a shape from one layer of some size; empty for that."""
    kinds = [f"{row.layers} layers"] * (row.layers > 1) + ["both directions"] * (row.directions == 2)
    kinds += ["packed"] * row.packed + [f"projection {row.proj}"] * (row.proj > 0)
    return ", ".join(kinds) or (f"T = {row.T}" if row.T != 512 else "")


def _cell(axis: Any, x: float, y: float, width: float, comparison: Comparison, kind: str = "") -> None:
    ratio = comparison.ratio
    assert ratio is not None
    color = _FASTER if ratio >= 1 else _SLOWER
    strength = min(1.0, 0.1 + abs(math.log(ratio)) / math.log(16))
    axis.bar(x, 1, width, y - 0.5, color=color, alpha=strength, edgecolor="white", linewidth=2)
    ink = "white" if strength > 0.6 else _INK if ratio >= 1 else _SLOWER
    axis.text(x, y - 0.15 * bool(kind), format_ratio(ratio), ha="center", va="center", fontsize=8, color=ink)
    if kind:
        size = f"H {comparison.ours.H}, B {comparison.ours.B}"
        axis.text(x, y + 0.22, f"{kind}\n{size}", ha="center", va="center", fontsize=5, color=ink)


def _panel(axis: Any, pass_: str, names: Sequence[str], by_shape: Mapping[str, Comparison]) -> None:
    for position, name in enumerate(names):
        comparison = by_shape.get(name)
        if comparison is None or comparison.ratio is None:
            continue
        ratio, half = comparison.ratio, comparison.ratio * comparison.spread / 2
        axis.barh(position, ratio - 1, left=1, height=0.68, color=_FASTER if ratio >= 1 else _SLOWER)
        axis.plot([max(ratio - half, ratio / 2), ratio + half], [position] * 2, color=_INK, linewidth=1)
        axis.annotate(
            format_ratio(ratio),
            (max(ratio + half, 1), position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK if ratio >= 1 else _SLOWER,
        )
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.axvline(1, color=_INK, linewidth=1)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    mean = geometric_means(by_shape.values())[pass_]
    axis.set_title(
        f"{TITLES[pass_]}: {mean['ratio']:.2f}{TIMES} geometric mean of {mean['shapes']} shapes",
        loc="left",
        fontsize=9,
        color=_INK,
    )


def _scale(axis: Any, ratios: Sequence[float]) -> None:
    """The common horizontal axis of all panels."""
    # The labels stand to the right of the bars, and under a losing one's left end there has to be some room.
    low, high = min(0.8, min(ratios) * 0.9), max(2.0, max(ratios)) ** 1.25
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{tick:g}{TIMES}" for tick in ticks])
    axis.minorticks_off()

"""Draws the speed-up of every shape from a benchmark document: one panel for inference, one for training.

Called by `fastlstm bench --plot` and benchmarks/table.py; needs matplotlib (extra `[cli]`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlstm.bench.record import TIMES, Comparison, format_ratio, geometric_means, write_atomic

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
    names = list(dict.fromkeys(c.ours.shape for c in timed))
    figure = Figure(figsize=(4.2 * len(passes) + 2.4, 0.3 * len(names) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(passes), sharex=True, sharey=True, squeeze=False)[0]
    for axis, pass_ in zip(axes, passes, strict=True):
        _panel(axis, pass_, names, {c.ours.shape: c for c in timed if c.ours.pass_ == pass_})
    _scale(axes[0], [c.ratio for c in timed if c.ratio is not None])
    machine, versions, flags = document["machine"], document["versions"], document["flags"]
    device = machine.get("gpu") or f"{machine['cpu']}, {flags['threads']} threads"
    figure.suptitle("FastLSTM's speed relative to torch.nn.LSTM", x=0.01, ha="left", color=_INK, weight="bold")
    figure.supxlabel(
        f"times faster (log scale), interquartile range as a line · {device} · torch {versions['torch']} · "
        f"{document['date'][:10]}",
        x=0.01,
        ha="left",
        fontsize=8,
        color=_MUTED,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=160)
    write_atomic(path, buffer.getvalue())


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

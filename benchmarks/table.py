"""Renders the README's benchmark table and plot from a committed JSON file of `fastlstm bench`.

    python benchmarks/table.py benchmarks/results/X.json [--readme README.md] [--plot X.png] [--check]

Files of features.py, accuracy.py and gpu.py's families become tables in docs/ in the same way.

The text between the markers `<!-- benchmark:begin -->` and `<!-- benchmark:end -->` is replaced, so that no
figure in the README is typed by hand; continuous integration runs it with --check.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlstm.bench.plot import plot
from fastlstm.bench.record import (
    TIMES,
    Comparison,
    format_rate,
    format_ratio,
    geometric_means,
    load,
    markdown_table,
    write_atomic,
)

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
_TITLES = {"forward": "inference", "forward_backward": "training"}


def render(document: dict[str, Any], comparisons: Sequence[Comparison], image: str | None = None) -> str:
    """The Markdown of a run: where it was measured, the table, the geometric means and the losing shapes.

    Args:
        document: the JSON.
        comparisons: its comparisons, as from record.load.
        image: path of the plot as the README should link it.
    """
    passes = [pass_ for pass_ in _TITLES if any(c.ours.pass_ == pass_ for c in comparisons)]
    by_shape: dict[str, dict[str, Comparison]] = {}
    for comparison in comparisons:
        by_shape.setdefault(comparison.ours.shape, {})[comparison.ours.pass_] = comparison
    header = ["shape", "stands for"]
    for pass_ in passes:
        header += [f"{_TITLES[pass_]}: FastLSTM", "nn.LSTM", "ratio"]
    rows = []
    for shape, by_pass in by_shape.items():
        row = [shape, next(iter(by_pass.values())).ours.stands_for]
        for pass_ in passes:
            row += _cells(by_pass.get(pass_))
        rows.append(row)
    blocks = [_provenance(document), markdown_table(header, rows, numeric=range(2, len(header)))]
    blocks += [_summary(pass_, comparisons) for pass_ in passes]
    if image is not None:
        blocks.append(f"![FastLSTM's speed relative to nn.LSTM, by shape]({image})")
    return "\n\n".join(blocks)


def render_features(document: dict[str, Any]) -> str:
    """The Markdown of a file of features.py: where it was measured and the ratios of times of each group."""
    rows = [
        [group["group"], ratio["name"], f"{ratio['ratio']:.2f}{TIMES} \N{PLUS-MINUS SIGN}{ratio['spread']:.0%}"]
        for group in document["groups"]
        for ratio in group["ratios"]
    ]
    table = markdown_table(["training step", "ratio of times", ""], rows, numeric=[2])
    return "\n\n".join([_provenance(document), table])


def render_accuracy(document: dict[str, Any]) -> str:
    """The Markdown of a file of accuracy.py: a line for each precision and contender, a column for each length."""
    rows = document["accuracy"]
    by_line: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        cells = by_line.setdefault((row["precision"], row["contender"]), {})
        cells[row["T"]] = f"{row['y']:.1e} / {row['gradients']:.1e}"
    lengths = list(dict.fromkeys(row["T"] for row in rows))
    lines = [[*line, *(cells.get(T, "-") for T in lengths)] for line, cells in by_line.items()]
    header = ["precision", "", *(f"T = {T}" for T in lengths)]
    return "\n\n".join([_provenance(document), markdown_table(header, lines, numeric=range(2, len(header)))])


def render_families(document: dict[str, Any]) -> str:
    """The Markdown of families.json of gpu.py: microseconds per step of every family in the shape that it plans for."""
    by_size: dict[str, dict[str, dict[str, Any]]] = {}
    for key, candidate in document["candidates"].items():
        size, family = key.rsplit(" ", 1)
        if "=" not in family and "=" not in size and family != "planned":
            by_size.setdefault(size, {})[family] = candidate
    names = list(dict.fromkeys(name for families in by_size.values() for name in families))
    rows = []
    for size, families in by_size.items():
        for pass_ in ("forward", "backward"):
            row = [size, pass_]
            for name in names:
                candidate = families.get(name, {})
                measured = candidate.get(pass_, {}).get("us_per_step")
                predicted = (candidate.get("predicted") or {}).get(pass_)
                cell = "-" if measured is None else f"{measured:.2f}"
                row.append(cell if measured is None or predicted is None else f"{cell} ({predicted:.2f})")
            rows.append(row)
    table = markdown_table(["", "", *names], rows, numeric=range(2, 2 + len(names)))
    gpu, torch_version = document["machine"]["gpu"], document["versions"]["torch"]
    return f"Microseconds per step and layer, measured (predicted); {gpu}, torch {torch_version}.\n\n{table}"


def _cells(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["-", "-", "-"]
    theirs = comparison.theirs.tokens_per_s if comparison.theirs else None
    ratio = comparison.verdict
    if comparison.ratio is not None:
        ratio = f"**{ratio}**" if comparison.ratio < 1 else ratio
        ratio += f" \N{PLUS-MINUS SIGN}{comparison.spread:.0%}"
    return [format_rate(comparison.ours.tokens_per_s), format_rate(theirs), ratio]


def _provenance(document: dict[str, Any]) -> str:
    machine, versions, flags = document["machine"], document["versions"], document["flags"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores ({caches}), {flags['isa']}"
    if machine.get("gpu"):
        hardware = f"{machine['gpu']}, {hardware}"
    measured = "Errors" if "accuracy" in document else "Times" if "groups" in document else "Tokens/s"
    text = (
        f"{measured} on {hardware}, {flags['threads']} threads; torch {versions['torch']}, fastlstm "
        f"{versions['fastlstm']}, Python {versions['python']}; {document['date'][:10]}."
    )
    if "accuracy" in document:
        return f"{text} Of y / the largest of a gradient."
    return f"{text} Medians of runs in turns in one process; the ratio is followed by its interquartile range."


def _summary(pass_: str, comparisons: Sequence[Comparison]) -> str:
    ours = [c for c in comparisons if c.ours.pass_ == pass_]
    mean = geometric_means(ours).get(pass_)
    if mean is None:
        return f"No shape could be compared in {_TITLES[pass_]}."
    slower = [c.ours.shape for c in ours if c.ratio is not None and c.ratio < 1]
    losing = f"slower than nn.LSTM: {', '.join(slower)}" if slower else "no shape slower than nn.LSTM"
    title = _TITLES[pass_].capitalize()
    return f"{title}: geometric mean {format_ratio(mean['ratio'])} over {mean['shapes']} shapes; {losing}."


# Files of other scripts than `fastlstm bench`, by a key that they have.
_OTHERS = {"groups": render_features, "accuracy": render_accuracy, "candidates": render_families}


def replace_block(text: str, block: str) -> str:
    """`text` with `block` between the markers; ValueError if it does not have each marker once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} followed by one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if --check finds the README out of date, 2 for a bad file, else 0."""
    parser = argparse.ArgumentParser(description="Render the benchmark table of a `fastlstm bench` JSON file.")
    parser.add_argument("json", type=Path)
    parser.add_argument("--readme", type=Path, help="update this file; without it the table is printed")
    parser.add_argument("--plot", type=Path, help="draw the plot here and link it from the README")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if --readme is out of date")
    options = parser.parse_args(arguments)
    if options.check and options.readme is None:
        parser.error("--check needs --readme")
    try:
        document, comparisons = json.loads(options.json.read_text(encoding="utf-8")), []
        render_other = next((function for key, function in _OTHERS.items() if key in document), None)
        if render_other is None:
            document, comparisons = load(options.json)
        image = None
        if options.plot is not None:
            folder = options.readme.parent if options.readme else Path()
            image = Path(os.path.relpath(options.plot, folder)).as_posix()
            if not options.check:
                plot(comparisons, document, options.plot)
        block = render_other(document) if render_other else render(document, comparisons, image)
        if options.readme is None:
            print(block)
            return 0
        current = options.readme.read_text(encoding="utf-8")
        updated = replace_block(current, block)
    except (ValueError, OSError) as error:
        print(f"table.py: {error}", file=sys.stderr)
        return 2
    if options.check:
        if updated != current:
            print(
                f"table.py: {options.readme} does not show {options.json}; run without --check",
                file=sys.stderr,
            )
            return 1
        return 0
    write_atomic(options.readme, updated.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

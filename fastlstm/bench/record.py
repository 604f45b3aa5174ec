"""The JSON of a benchmark run: its rows, the machine they come from, reading, writing and pairing.

fastlstm/bench/runner.py makes rows; the command line, fastlstm/bench/plot.py, benchmarks/compare.py and
benchmarks/table.py read documents through `load` and see each shape and pass as one `Comparison`.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import fastlstm

FORMAT = "fastlstm-bench/1"
TIMES = "\N{MULTIPLICATION SIGN}"
_CPU_FEATURES = ("avx", "avx2", "fma", "f16c", "avx_vnni", "asimd", "sve", "bf16", "i8mm")


@dataclass(frozen=True)
class Row:
    """One contender on one shape and pass; the JSON object has the same keys, with "pass" for `pass_`.

    Attributes:
        shape: name of the shape; `stands_for` says which workload it is a sample of.
        T, B, I, H, proj, layers, directions: sizes; `proj` is 0 without a projection.
        packed, state, kind, dtype, autocast, bf16_products: as in fastlstm.bench.shapes.Shape.
        device: "cpu" or "cuda".
        pass_: "forward" (inference) or "forward_backward".
        contender: "fastlstm" or "torch".
        tokens: time steps of input per call, summed over the batch.
        median_s: median seconds of a call; None if the row has an error.
        spread: interquartile range of the samples divided by their median.
        samples, calls_per_sample: how often was measured.
        tokens_per_s: tokens / median_s.
        plan: FastLSTM's plan; None for nn.LSTM.
        error: why there is no timing, such as a result that is not nn.LSTM's.
    """

    shape: str
    stands_for: str
    T: int
    B: int
    I: int  # noqa: E741  (the project's name for the input size)
    H: int
    proj: int
    layers: int
    directions: int
    packed: bool
    state: bool
    kind: str
    dtype: str
    autocast: bool
    bf16_products: bool
    device: str
    pass_: str
    contender: str
    tokens: int
    median_s: float | None = None
    spread: float | None = None
    samples: int = 0
    calls_per_sample: int = 0
    tokens_per_s: float | None = None
    plan: dict[str, Any] | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return {"pass" if key == "pass_" else key: value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The row of a JSON object; ValueError if a key is missing. Keys of later versions are ignored."""
        names = {field.name: "pass" if field.name == "pass_" else field.name for field in fields(cls)}
        missing = [key for key in names.values() if key not in data]
        if missing:
            raise ValueError(f"a row lacks {', '.join(missing)}")
        return cls(**{name: data[key] for name, key in names.items()})


@dataclass(frozen=True)
class Comparison:
    """FastLSTM and nn.LSTM on one shape and pass, measured in turns in one process."""

    ours: Row
    theirs: Row | None

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies a comparison in a document: shape, pass and device."""
        return self.ours.shape, self.ours.pass_, self.ours.device

    @property
    def ratio(self) -> float | None:
        """How many times faster FastLSTM is; None without both timings."""
        if self.theirs is None or self.theirs.median_s is None or self.ours.median_s is None:
            return None
        return self.theirs.median_s / self.ours.median_s

    @property
    def verdict(self) -> str:
        """The ratio in words, or why there is none."""
        if self.ours.error:
            return "error"
        return "nn.LSTM fails" if self.theirs is None or self.theirs.error else format_ratio(self.ratio)

    @property
    def spread(self) -> float:
        """Relative spread of the ratio: both contenders' spreads, added as independent."""
        return math.hypot(self.ours.spread or 0.0, (self.theirs.spread or 0.0) if self.theirs else 0.0)


def pair(rows: Iterable[Row]) -> list[Comparison]:
    """One Comparison for each FastLSTM row, with nn.LSTM's row of the same shape, pass and device."""
    rows = list(rows)
    theirs = {(row.shape, row.pass_, row.device): row for row in rows if row.contender == "torch"}
    ours = (row for row in rows if row.contender == "fastlstm")
    return [Comparison(row, theirs.get((row.shape, row.pass_, row.device))) for row in ours]


def geometric_means(comparisons: Iterable[Comparison]) -> dict[str, dict[str, float | int]]:
    """By pass: "ratio" (geometric mean of the ratios), "shapes" (their number), "slower" (how many < 1)."""
    ratios: dict[str, list[float]] = {}
    for comparison in comparisons:
        if comparison.ratio is not None:
            ratios.setdefault(comparison.ours.pass_, []).append(comparison.ratio)
    return {
        pass_: {
            "ratio": math.exp(sum(map(math.log, values)) / len(values)),
            "shapes": len(values),
            "slower": sum(value < 1 for value in values),
        }
        for pass_, values in ratios.items()
    }


def document(rows: Sequence[Row], *, device: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON document of a run that has just ended in this process: the flags are read now.

    Args:
        rows: what was measured.
        device: the device it was measured on.
        settings: how the run was asked for and the machine's load before it.
    """
    return {
        "format": FORMAT,
        **provenance(settings, device),
        "geometric_means": geometric_means(pair(rows)),
        "rows": [row.to_json() for row in rows],
    }


def provenance(settings: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """When, where and how something has just been measured in this process: the flags are read now."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        "flags": flags(),
        "settings": dict(settings),
    }


def load(path: Path) -> tuple[dict[str, Any], list[Comparison]]:
    """Reads a document; returns it and its comparisons.

    Raises:
        ValueError: the file cannot be read or is not the JSON of `fastlstm bench`.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not the JSON of `fastlstm bench`: expected format {FORMAT!r}")
    missing = [key for key in ("date", "machine", "versions", "flags", "rows") if key not in data]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        return data, pair(Row.from_json(row) for row in data["rows"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def ensure_writable(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Checks before a long run that `path` can be written.

    Args:
        path: the file to be written later; it is not touched.
        suffixes: file name endings that are allowed; any if empty.

    Raises:
        ValueError: a wrong suffix, a directory in its place, a folder that is missing or refuses new files.
    """
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    probe = _temporary(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step: readers and interruptions never see half a file."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a document as JSON, in one step."""
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What timings depend on: processor, cores, caches, memory, system, and the GPU if `device` is one."""
    info: dict[str, Any] = {
        "cpu": _cpuinfo().get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": cpu_features(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["gpu"] = properties.name
        info["gpu_memory_bytes"] = properties.total_memory
        info["gpu_multiprocessors"] = properties.multi_processor_count
        info["gpu_capability"] = f"{properties.major}.{properties.minor}"
        info["gpu_now"] = gpu_state(str(properties.uuid))
    return info


_GPU_QUERIES = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def gpu_state(uuid: str) -> dict[str, str]:
    """Driver, clocks, power and temperature at this moment, as nvidia-smi gives them; empty where it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_QUERIES.values())}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            [*command, f"--id=GPU-{uuid}"], check=True, capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = answer.strip().split(", ")
    return dict(zip(_GPU_QUERIES, values, strict=True)) if len(values) == len(_GPU_QUERIES) else {}


def cpu_features() -> list[str]:
    """The vector extensions of this CPU as the system names them; empty where the system does not tell."""
    info = _cpuinfo()
    names = (info.get("flags") or info.get("Features") or "").split()
    return sorted(name for name in names if name in _CPU_FEATURES or name.startswith(("avx512", "amx")))


def versions() -> dict[str, Any]:
    """Versions of torch, fastlstm, Python, the compiler of the extension and torch's CUDA."""
    return {
        "torch": torch.__version__,
        "fastlstm": fastlstm.__version__,
        "python": platform.python_version(),
        "compiler": fastlstm.build_info()["compiler"],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def flags() -> dict[str, Any]:
    """Global settings of this process that change speed or precision."""
    # The stubs of torch.backends lack the precision settings.
    backends: Any = torch.backends
    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "isa": fastlstm.build_info()["isa"],
        "torch_cpu_capability": backends.cpu.get_cpu_capability(),
        "mkldnn": backends.mkldnn.is_available() and backends.mkldnn.enabled,
        "cudnn": backends.cudnn.enabled,
        "fp32_precision": {
            "mkldnn.rnn": backends.mkldnn.rnn.fp32_precision,
            "mkldnn.matmul": backends.mkldnn.matmul.fp32_precision,
            "cudnn.rnn": backends.cudnn.rnn.fp32_precision,
            "cuda.matmul": backends.cuda.matmul.fp32_precision,
        },
        "environment": {
            key: os.environ[key] for key in sorted(os.environ) if key.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))
        },
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor of Linux's /proc/cpuinfo; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches() -> dict[str, str]:
    """Cache sizes of the first core by name, such as {"L1d": "32K", "L2": "512K"}; empty if not on Linux."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        caches[f"L{level}{suffix}"] = size
    return caches


def format_rate(tokens_per_s: float | None) -> str:
    """Three significant digits with k, M or G: 12345 -> "12.3 k"."""
    if tokens_per_s is None:
        return "-"
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        # 999.5 k would otherwise be rounded to 1000 k.
        if tokens_per_s >= factor * 0.9995:
            return f"{_three_digits(tokens_per_s / factor)}{unit}"
    return _three_digits(tokens_per_s)


def _three_digits(value: float) -> str:
    return f"{value:.{min(2, max(0, 2 - math.floor(math.log10(value))))}f}"


def format_ratio(ratio: float | None) -> str:
    """A speed-up, "1.43" and a multiplication sign; a losing one says so in words."""
    if ratio is None:
        return "-"
    text = f"{_three_digits(ratio)}{TIMES}"
    return f"{text} slower" if ratio < 1 else text


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A Markdown table whose source is aligned too, so that it reads well in a terminal.

    Args:
        header: the column titles.
        rows: one cell of text for each column.
        numeric: indices of the columns to align to the right.
    """
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * (width - 1) + ":" if column in numeric else "-" * width for column, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])

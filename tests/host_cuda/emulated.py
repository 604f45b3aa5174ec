"""The CUDA operators on the CPU: builds emulated_ops.cpp with the driver and the kernels, and calls them.

The kernels are the source files of csrc/cuda, compiled as host C++ on top of emulation.h. What runs is one process-wide
machine: its device, its scheduler's seed and what is forced are settings that the functions here change.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from fastlstm._operators import NO_EXTRAS, Options  # it registers the operators whose schemas the emulated ones copy

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-DFASTLSTM_EMULATE_CUDA"),
    "-DFASTLSTM_WARPGROUPS",
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror=unused-parameter"),
]
ELEMENTS = ["bf16", "fp16", "tf32", "fp32", "fp64"]  # in the order of plan.h

_library: ctypes.CDLL | None = None


def sources(root: Path) -> list[Path]:
    """What the library is made of: all of csrc/cuda but what needs CUDA itself."""
    cuda = root / "csrc" / "cuda"
    files = [path for path in cuda.iterdir() if path.suffix in (".cpp", ".cu")]
    needs_cuda = {"runtime.cpp", "probe.cu", "cuda_ops.cpp"}
    ours = sorted(path for path in files if path.name not in needs_cuda)
    return [root / "tests/host_cuda/emulated_ops.cpp", root / "csrc/arguments.cpp", *ours]


def build(root: Path = ROOT, target: str = "libemulated.so") -> Path:
    """Build the library of the source tree ``root`` in ``root``/build/host_cuda, what changed of it; return its path.

    The paths in the build file are relative: a copy of the tree, build folder included, is up to date. The other
    target is "test_emulation", a program.
    """
    folder = root / "build" / "host_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        return _build(root, folder, target)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Other processes that ask for this folder wait: ninja does not tell whether another ninja is at work."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(root: Path, folder: Path, target: str) -> Path:
    includes = [root / "csrc/cuda", root / "csrc", root / "tests/host_cuda"]
    torch_lib = cpp_extension.library_paths()[0]
    compile_flags = [
        *FLAGS,
        *(f"-I{os.path.relpath(path, folder)}" for path in includes),
        *(f"-isystem {path}" for path in cpp_extension.include_paths()),
    ]
    lines = [
        "rule compile",
        f"  command = {os.environ.get('CXX', 'g++')} {' '.join(compile_flags)} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {os.environ.get('CXX', 'g++')} -shared $in -o $out -L{torch_lib} -ltorch -ltorch_cpu -lc10 "
        f"-Wl,-rpath,{torch_lib}",
        "rule program",
        f"  command = {os.environ.get('CXX', 'g++')} $in -o $out",
    ]
    objects = []
    for source in sources(root):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {os.path.relpath(source, folder)}")
    lines.append(f"build libemulated.so: link {' '.join(objects)}")
    test = os.path.relpath(root / "tests/host_cuda/test_emulation.cpp", folder)
    lines += [f"build test_emulation.o: compile {test}", "build test_emulation: program test_emulation.o"]
    text = "\n".join(lines) + "\n"
    build_file = folder / "build.ninja"
    if not build_file.exists() or build_file.read_text() != text:
        build_file.write_text(text)
    run_or_explain([sys.executable, "-m", "ninja", "-C", str(folder), target], f"building {target}")
    return folder / target


def run_or_explain(command: list[str], what: str) -> str:
    """Run a command and return its output; if it fails, that is the error's text."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed ({' '.join(command)}):\n{done.stdout[-8000:]}")
    return done.stdout


def load(path: Path) -> ctypes.CDLL:
    """Load a library that :func:`build` has made. One per process: it registers operators."""
    global _library
    torch.ops.load_library(path)
    _library = ctypes.CDLL(str(path))
    _library.emulated_seed.argtypes = [ctypes.c_uint64]
    _library.emulated_poison.argtypes = [ctypes.c_bool]
    _library.emulated_launches.restype = ctypes.c_uint64
    _library.emulated_plan.argtypes = [ctypes.c_bool, ctypes.c_int, *[ctypes.c_int64] * 6]
    _library.emulated_plan.restype = ctypes.c_char_p
    return _library


def library() -> ctypes.CDLL:
    """The loaded library."""
    assert _library is not None, "emulated.load() comes first"
    return _library


def seed(value: int) -> None:
    """What follows is scheduled as it was after the last call with this value."""
    library().emulated_seed(value)


def device(sms: int = 132, shared_bytes: int = 227 * 1024) -> None:
    """The emulated device: how many SMs, how much shared memory for one block."""
    library().emulated_device(sms, shared_bytes)


def poison(wanted: bool) -> None:
    """Operators allocate memory full of NaN, or with what it held when it was last freed."""
    library().emulated_poison(wanted)


def launches() -> int:
    """Kernels launched since the seed was set."""
    return int(library().emulated_launches())


@contextlib.contextmanager
def force(
    family: str = "", octets: int = 0, tiles: int = 0, groups: int = 0, layers: int = 0, run_steps: int = 0
) -> Iterator[None]:
    """Force a family and a shape; zeros and an empty name leave the choice to the planner."""
    library().emulated_force(family.encode(), octets, tiles, groups, layers, run_steps)
    try:
        yield
    finally:
        library().emulated_force(b"", 0, 0, 0, 0, 0)


def plan(backward: bool, element: str, T: int, B: int, H: int, P: int = 0, L: int = 1, D: int = 1) -> str | None:
    """The plan of a pass under what is forced, in words; None if there is none."""
    text = library().emulated_plan(backward, ELEMENTS.index(element), T, B, H, P, L, D).decode()
    return None if text.startswith("!") else text


NO_OPTIONS = Options(None, None, None, None, 1, bidirectional=False, has_bias=True, reduced_products=True)


def _all_options(given: dict[str, Any]) -> Options:
    extras = {name: value for name, value in given.items() if name in NO_EXTRAS._fields}
    others = {name: value for name, value in given.items() if name not in extras}
    return NO_OPTIONS._replace(**others, extras=NO_EXTRAS._replace(**extras))


def lstm(
    x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, *, save: bool = True, **options: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """fastlstm::lstm as a GPU would compute it: ``(y, h_n, c_n, saved, cell_states)``.

    ``options``: those of ``Options`` and ``Extras`` in :mod:`fastlstm._operators` that are not as in NO_OPTIONS.
    """
    return torch.ops.fastlstm_emulated.lstm(x, list(weights), h_0, c_0, *_all_options(options).of_forward(save))


def lstm_backward(
    gradients: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    y: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[int],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """fastlstm::lstm_backward as a GPU would compute it: ``(d_x, d_h_0, d_c_0, d_weights, d_resets)``.

    ``gradients``: those of y, h_n and c_n, and of cell states that were returned. ``options``: as of :func:`lstm`, and
    ``groups``.
    """
    *of_outputs, d_cell_states = gradients if len(gradients) > 3 else (*gradients, None)
    groups = options.pop("groups", 1)
    others = _all_options(options).of_backward(needs, d_cell_states, groups)
    return torch.ops.fastlstm_emulated.lstm_backward(*of_outputs, x, list(weights), h_0, c_0, y, list(saved), *others)

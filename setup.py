"""Builds the extension module fastlstm._C against the torch that is installed, 2.11 or newer.

A build serves the torch it was made against. FASTLSTM_CUDA=0|1 forces building without or with CUDA kernels; this
version has CPU kernels only, so 1 is an error. FASTLSTM_SANITIZE=1 builds with the address and undefined-behaviour
sanitizers and with AVX-512 emulated; `make sanitize` runs the operators' tests with such a build. It needs AVX2.
"""

import os
import sys
from pathlib import Path

import torch
from pybind11 import get_include
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

OLDEST_TORCH = (2, 11)
SOURCES = sorted(map(str, Path("csrc").rglob("*.cpp")))
HEADERS = sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.inl")]))


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def main() -> None:
    if torch_version() < OLDEST_TORCH:
        sys.exit(f"fastlstm needs torch >= {'.'.join(map(str, OLDEST_TORCH))} to build, found {torch.__version__}")
    cuda = os.environ.get("FASTLSTM_CUDA", "")
    if cuda not in ("", "0", "1"):
        sys.exit(f"FASTLSTM_CUDA must be 0 or 1, got {cuda!r}")
    if cuda == "1":
        sys.exit("FASTLSTM_CUDA=1, but this version of fastlstm has no CUDA kernels")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]
    sanitize += ["-fno-wrapv"]  # Python's own -fwrapv defines signed overflow, and compiles for minutes
    # All kernels, whatever the machine has. Vectors of AVX-512 stay within a file, so nobody else's ABI matters.
    sanitize += ["-DFASTLSTM_EMULATE_AVX512", "-Wno-psabi"]
    if os.environ.get("FASTLSTM_SANITIZE", "0") != "1":
        sanitize = []
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    extension = CppExtension(
        "fastlstm._C",
        SOURCES,
        depends=HEADERS,
        include_dirs=[get_include()],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=off",  # products are fused where the kernels say so, and so on every compiler
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",  # torch's headers
            f'-DFASTLSTM_TORCH_BUILT="{torch.__version__}"',
            *sanitize,
        ],
        extra_link_args=[*sanitize, *(["-Wl,--as-needed"] if sys.platform == "linux" else [])],
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})


main()

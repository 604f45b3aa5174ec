"""Builds the extension module fastlstm._C against the torch that is installed, 2.11 or newer.

A build serves the torch it was made against. Environment variables:
    FASTLSTM_CUDA=0|1      without or with CUDA kernels; by default with them if torch is a CUDA build and nvcc is found
    CUDA_HOME, CUDA_PATH   the toolkit whose nvcc is taken, before that on PATH
    TORCH_CUDA_ARCH_LIST   the GPUs to compile for, in torch's syntax: "8.0+PTX;9.0a"
    FASTLSTM_CUDA_DEBUG=1  CUDA kernels that check themselves, with line numbers
    FASTLSTM_SANITIZE=1    address and undefined-behaviour sanitizers, AVX-512 emulated, no CUDA by default; needs AVX2.
                           `make sanitize` runs the operators' tests with such a build
    MAX_JOBS               files to compile at a time
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from pybind11 import get_include
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

OLDEST_TORCH = (2, 11)
# Newer GPUs run the PTX of 8.0. Kernels but those of WARPGROUP_SOURCES have no instruction of a newer GPU, so that PTX
# serves all targets: making it takes the compiler as long as making two targets of it.
CUDA_TARGETS = "8.0+PTX;8.9;9.0a;10.0a"
WARPGROUP_SOURCES = "warpgroup_*.cu"
WARPGROUP_TARGETS = {"sm_90a": "compute_90a"}


def flag(name: str, default: str = "0") -> bool:
    value = os.environ.get(name) or default
    if value not in ("0", "1"):
        sys.exit(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def find_nvcc() -> str | None:
    by_default = torch.version.cuda is not None and not flag("FASTLSTM_SANITIZE")
    if not flag("FASTLSTM_CUDA", default=str(int(by_default))):
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None and os.environ.get("FASTLSTM_CUDA"):
        sys.exit("FASTLSTM_CUDA=1 needs nvcc; none is in $CUDA_HOME/bin, $CUDA_PATH/bin, on PATH or in /usr/local/cuda")
    return nvcc


def answer(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def cuda_targets(nvcc: str) -> dict[str, str]:
    """What kernels are compiled for and from: {"sm_90a": "compute_80"}."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = answer(nvcc, "--list-gpu-code").split()
    targets = {}
    for version in (listed or CUDA_TARGETS).replace(";", " ").split():
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", version)
        if parts is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST must list versions such as 9.0a and 8.0+PTX, got {version!r}")
        major, minor, variant, ptx = parts.groups()
        if int(major) < 8 or (not listed and f"sm_{major}{minor}" not in known):
            continue  # lists of all GPUs begin with ones too old for the kernels; an old nvcc lacks the newest defaults
        targets[f"sm_{major}{minor}{variant}"] = "compute_80"
        if ptx:
            targets["compute_80"] = "compute_80"
    return targets or sys.exit(f"TORCH_CUDA_ARCH_LIST must list a version from 8.0 on, got {listed!r}")


def for_targets(targets: dict[str, str]) -> list[str]:
    return [f"-gencode=arch={virtual},code={target}" for target, virtual in targets.items()]


def compile_kernels(command: list[str], targets: dict[str, str], folder: Path) -> list[str]:
    """The objects of csrc/cuda/*.cu, compiled where the file, its headers or the command changed."""

    def flags(source: Path) -> str:
        if source.match(WARPGROUP_SOURCES) and WARPGROUP_TARGETS.keys() <= targets.keys():
            return shlex.join([*for_targets(WARPGROUP_TARGETS), "-DFASTLSTM_WARPGROUPS"])
        return shlex.join(for_targets(targets))

    def escape(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path.resolve()))

    objects = {folder / f"{source.stem}.o": source for source in sorted(Path("csrc/cuda").glob("*.cu"))}
    rule = shlex.join(command).replace("$", "$$") + " $flags -MD -MF $out.d -c $in -o $out"
    lines = ["rule nvcc", f"  command = {rule}", "  depfile = $out.d", "  deps = gcc"]
    for kernel, source in objects.items():
        lines += [f"build {escape(kernel)}: nvcc {escape(source)}", f"  flags = {flags(source)}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ninja", "-C", folder, "-j", os.environ["MAX_JOBS"]], check=True)
    return list(map(str, objects))


def main() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        sys.exit(f"fastlstm needs torch >= {'.'.join(map(str, OLDEST_TORCH))} to build, found {torch.__version__}")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]
    sanitize += ["-fno-wrapv"]  # Python's own -fwrapv defines signed overflow, and compiles for minutes
    # All kernels, whatever the machine has. Vectors of AVX-512 stay within a file, so nobody else's ABI matters.
    sanitize += ["-DFASTLSTM_EMULATE_AVX512", "-Wno-psabi"]
    if not flag("FASTLSTM_SANITIZE"):
        sanitize = []
    compile_args = ["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    compile_args += ["-ffp-contract=off"]  # products are fused where the kernels say so, and so on every compiler
    compile_args += ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # the last for torch's headers
    compile_args += [f'-DFASTLSTM_TORCH_BUILT="{torch.__version__}"', *sanitize]
    link_args = [*sanitize, *(["-Wl,--as-needed"] if sys.platform == "linux" else [])]

    nvcc = find_nvcc()
    targets = cuda_targets(nvcc) if nvcc else {}
    compile_args += [f'-DFASTLSTM_CUDA_TARGETS="{" ".join(targets)}"']
    if nvcc:
        nvcc_command = [nvcc, "-std=c++20", "-O3", "--compiler-options=-fPIC,-fvisibility=hidden,-Wall"]
        nvcc_command += ["--expt-relaxed-constexpr"]  # kernels share constexpr functions with the planner
        nvcc_command += ["--threads=0"]  # compiles for the targets side by side: the largest file takes minutes
        nvcc_command += ["-DFASTLSTM_CUDA_DEBUG", "-lineinfo"] if flag("FASTLSTM_CUDA_DEBUG") else []
        # The nvcc found may be a script that starts another one, so it is asked where its headers and libraries are.
        said = answer(nvcc, "--dryrun", "-x", "cu", os.devnull)
        folders = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", said, re.MULTILINE))
        compile_args += ["-DFASTLSTM_CUDA", *shlex.split(folders["INCLUDES"])]
        link_args += [*shlex.split(folders["LIBRARIES"]), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        # Nothing needs libtorch by name, but it brings libtorch_cuda, where weak symbols of the driver may be found.
        link_args += ["-Wl,--no-as-needed", "-ltorch"]

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            # Ninja finds what has changed, flags too; setuptools would look at the dates of files alone.
            self.force = True
            if nvcc:
                kernels = compile_kernels(nvcc_command, targets, Path(self.build_temp).resolve() / "kernels")
                self.extensions[0].extra_objects += kernels
            super().build_extensions()

    files = sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file())
    without_cuda = [file for file in files if not file.startswith("csrc/cuda/") or file == "csrc/cuda/plan.cpp"]
    sources = [file for file in (files if nvcc else without_cuda) if file.endswith(".cpp")]
    extension = CppExtension(
        "fastlstm._C",
        sources,
        depends=files,
        include_dirs=[get_include()],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})


main()

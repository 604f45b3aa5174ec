"""What nvcc made of the kernels, read from a file that contains them: resources and instructions of each.

``python tests/host_cuda/cubins.py [FILE]`` prints them as a table, by default of the installed extension module.
NVIDIA's ``cuobjdump`` and ``nvdisasm`` read the file. The packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm bring
them.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

INSTRUCTION_BYTES = 16


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: ``@!P0 LDG.E.128.STRONG.GPU R4,[R2.64]``."""

    predicate: str
    opcode: str
    operands: str

    def __str__(self) -> str:
        return f"{self.predicate} {self.opcode} {self.operands}".strip()


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one target; sizes in bytes, ``stack`` and ``local`` per thread."""

    target: str
    symbol: str
    registers: int
    stack: int
    local: int
    shared: int
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def _parts(self) -> tuple[str, ...]:
        # The names of files that come before, as parts of anonymous namespaces, begin with a digit or an underscore.
        template = r"\d+([a-z][a-z_]*)I(?:NS\d?_\d+(Bf16|Fp16|Tf32|Fp32|Full)(?:I([fd])E)?E)((?:L[ib]\d+E)*)E"
        found = re.search(template, self.symbol) or re.search(r"\d+([a-z][a-z_]*)()()()()Ev$", self.symbol)
        assert found, f"a kernel of unknown form: {self.symbol}"
        return tuple(part or "" for part in found.groups())

    @property
    def function(self) -> str:
        """The kernel's name without template arguments: ``persistent_forward``."""
        return self._parts[0]

    @property
    def element(self) -> str:
        """The element type: ``Bf16``; empty if there is none."""
        return {"f": "Fp32", "d": "Fp64"}.get(self._parts[2], self._parts[1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """What it is compiled for: octets, then blocks of K, column tiles or both; or the elements of a vector."""
        return tuple(int(size) for size in re.findall(r"Li(\d+)E", self._parts[3]))

    @property
    def name(self) -> str:
        """``persistent_forward<Bf16, 2, 4>``, ``cells_forward<Bf16, 1, extras>``."""
        extras = "extras" if "Lb1E" in self._parts[3] else ""
        arguments = [part for part in (self.element, *map(str, self.sizes), extras) if part]
        return self.function + (f"<{', '.join(arguments)}>" if arguments else "")

    def __str__(self) -> str:
        return f"{self.name} for {self.target}"

    @functools.cached_property
    def products(self) -> int:
        """Instructions that take a product on tensor cores."""
        return sum(map(_is_product, self.instructions))

    @functools.cached_property
    def step_loop(self) -> tuple[Instruction, ...]:
        """What can run between one product and another, or the same one again: the loop over the steps.

        The compiler moves what is rare out of a loop's range of addresses, so the ways through the code are followed.
        """
        after = _successors(self.instructions)
        before: list[list[int]] = [[] for _ in after]
        for i, others in enumerate(after):
            for other in others:
                before[other].append(i)
        products = [i for i, instruction in enumerate(self.instructions) if _is_product(instruction)]
        inside = _reachable(products, after) & _reachable(products, before)
        return tuple(self.instructions[i] for i in sorted(inside))


def _is_product(instruction: Instruction) -> bool:
    return re.match(r"[A-Z]+MMA\b", instruction.opcode) is not None


def _successors(instructions: tuple[Instruction, ...]) -> list[list[int]]:
    """Numbers of the instructions that may follow each: rather too many than too few."""

    def target(instruction: Instruction) -> list[int]:
        found = re.search(r"\b0x([0-9a-f]+)$", instruction.operands)
        return [int(found[1], 16) // INSTRUCTION_BYTES] if found else []  # otherwise a subroutine, which comes back

    meeting_points: dict[str, list[int]] = {}  # BSSY B0,0x280 names the place to which BSYNC B0 leads
    for instruction in instructions:
        if instruction.opcode.startswith("BSSY"):
            meeting_points.setdefault(instruction.operands.split(",")[0], []).extend(target(instruction))
    following = []
    for i, instruction in enumerate(instructions):
        operation = instruction.opcode.partition(".")[0]
        whole = f"{instruction.opcode} {instruction.operands}"
        if operation in ("BRX", "BRXU", "JMP", "JMX", "JMXU"):
            raise ValueError(f"a jump that nothing here follows: {instruction}")
        leaves = operation in ("EXIT", "RET") or re.fullmatch(r"BRA(\.U)? 0x\w+", whole)  # the others are conditional
        ways = [] if leaves and not instruction.predicate else [i + 1]
        if operation in ("BRA", "CALL", "WARPSYNC") and whole != "WARPSYNC 0xffffffff":  # all lanes, not a place
            ways += target(instruction)
        elif operation == "BSYNC" and i + 1 not in (places := meeting_points.get(instruction.operands, [])):
            ways += places  # most stand right before the place; of the others it is not known which one is meant
        following.append([way for way in ways if way < len(instructions)])
    return following


def _reachable(starts: Iterable[int], edges: list[list[int]]) -> set[int]:
    """Numbers of the nodes that are one or more edges away from the starts."""
    waiting, found = [*starts], set[int]()
    while waiting:
        new = set(edges[waiting.pop()]) - found
        found |= new
        waiting += new
    return found


def tool(name: str) -> str:
    """The path of ``cuobjdump`` or ``nvdisasm``: of the package, whose version is known, rather than the toolkit."""
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [str(file.locate()) for file in files if file.stem == name and file.parent.name == "bin"]
    found = next(iter(paths), None) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is needed to look at CUDA kernels: pip install nvidia-cuda-{name}")
    return found


def _answer(*command: str, folder: str) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def _kernels_of(cubin: Path, target: str) -> list[Kernel]:
    usage = _answer(tool("cuobjdump"), "-res-usage", str(cubin), folder=str(cubin.parent))
    resources = {
        symbol: tuple(int(re.search(rf"\b{kind}:(\d+)", line)[1]) for kind in ("REG", "STACK", "LOCAL", "SHARED"))
        for symbol, line in re.findall(r"Function (\S+):\n(.*)", usage)
    }
    _, functions = json.loads(_answer(tool("nvdisasm"), "-json", str(cubin), folder=str(cubin.parent)))
    code = {
        function["function-name"]: tuple(
            Instruction(each.get("predicate", ""), each["opcode"], each.get("operands", ""))
            for each in function["sass-instructions"]
        )
        for function in functions
    }
    assert code.keys() == resources.keys(), "both tools list the same functions"
    return [Kernel(target, symbol, *resources[symbol], code[symbol]) for symbol in code]


@functools.cache
def kernels(file: Path) -> tuple[Kernel, ...]:
    """All kernels of an object or library, compiled to machine code, for all targets."""
    with tempfile.TemporaryDirectory() as folder:
        _answer(tool("cuobjdump"), "-xelf", "all", str(file.resolve()), folder=folder)
        found = [
            kernel
            for cubin in sorted(Path(folder).glob("*.cubin"))
            for kernel in _kernels_of(cubin, target=cubin.suffixes[-2].removeprefix("."))
        ]
    return tuple(sorted(found, key=lambda k: (k.function, k.element, k.sizes, k.target)))


@functools.cache
def ptx_symbols(file: Path) -> dict[str, set[str]]:
    """The kernels of an object or library that are compiled to PTX: {"compute_80": {symbols}}."""
    found: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _answer(tool("cuobjdump"), "-xptx", "all", str(file.resolve()), folder=folder)
        for path in Path(folder).glob("*.ptx"):
            target = path.suffixes[-2].replace(".sm", "compute")
            found.setdefault(target, set()).update(re.findall(r"\.entry (\w+)", path.read_text(encoding="utf-8")))
    return found


def table(listed: Iterable[Kernel], shared: Mapping[str, str]) -> str:
    """A Markdown table, a row for each kernel and a column for each target.

    A cell: registers / bytes of stack / instructions that take products / all instructions (of the loop). ``shared``:
    what stands in a column of its own, of kernels by name.
    """
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in listed:
        rows.setdefault(kernel.name, {})[kernel.target] = kernel
    targets = sorted({target for row in rows.values() for target in row}, key=lambda t: int(re.sub(r"\D", "", t)))
    lines = ["| kernel | KB | " + " | ".join(targets) + " |", "|---|---|" + "---|" * len(targets)]
    for name, row in rows.items():
        cells = [_cell(row[target]) if target in row else "" for target in targets]
        lines.append(f"| {name} | {shared.get(name, '0')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(kernel: Kernel) -> str:
    of_loop = f" ({len(kernel.step_loop)})" if kernel.products else ""
    stack = f"**{kernel.stack}**" if kernel.stack else "0"
    return f"{kernel.registers} / {stack} / {kernel.products} / {len(kernel.instructions)}{of_loop}"


def shared_memory() -> dict[str, str]:
    """Dynamic shared memory of the kernels that take products, in KB: with one column tile and with the most."""
    from fastlstm import _C

    elements = {"bfloat16": "Bf16", "float16": "Fp16", "tf32": "Tf32", "float32": "Fp32"}
    found = {}
    for kernel in _C.cuda_kernels():
        sizes = ", ".join(map(str, kernel["sizes"]))
        least, most = (f"{size / 1024:.0f}" for size in kernel["shared_bytes"])
        found[f"{kernel['function']}<{elements[kernel['element']]}, {sizes}>"] = (
            least if least == most else f"{least}-{most}"
        )
    return found


def main() -> None:
    """Print the table of a file."""
    if len(sys.argv) > 1:
        file = Path(sys.argv[1])
    else:
        from fastlstm import _C

        file = Path(_C.__file__)
    print(table(kernels(file), shared_memory()))


if __name__ == "__main__":
    main()

"""What nvcc made of the CUDA kernels: that all are there, and that the compiler has kept the promises they rely on.

These tests read the machine code in the extension module itself and need no GPU. Without kernels in it there is nothing
to look at; with them, the tools that read it have to be there.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host_cuda.cubins import Instruction, Kernel, kernels, ptx_symbols, shared_memory, table

from fastlstm import _C, build_info

TARGETS = build_info()["cuda"]
FILE = Path(_C.__file__)
with_kernels = pytest.mark.skipif(not TARGETS, reason="built without CUDA kernels")

# All steps in one kernel, and a kernel for each step.
LOOP_KERNELS = ("persistent_forward", "persistent_backward", "resident_forward", "resident_backward")
STREAMED_KERNELS = ("streamed_forward", "streamed_backward")
WARPGROUP_KERNELS = ("warpgroup_forward", "warpgroup_backward")  # for sm_90a alone
# Addresses that ptxas 13.0 keeps there in kernels with several rounds, however few weights registers hold.
STACK = {"warpgroup_forward": {(2, 12, 8): 24, (2, 16, 8): 16}, "warpgroup_backward": {(2, 12, 8): 16}}


def named(pattern: str, instructions: tuple[Instruction, ...]) -> list[str]:
    """Those whose opcode begins so."""
    return [str(each) for each in instructions if re.match(pattern, each.opcode)]


def faults(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel that takes products."""
    loop = kernel.step_loop
    of = functools.partial(named, instructions=kernel.instructions)
    in_loop = functools.partial(named, instructions=loop)
    forward = "forward" in kernel.function
    # Local memory is memory: what spills is loaded again in every step.
    allowed = STACK.get(kernel.function, {}).get(kernel.sizes, 0)
    if kernel.stack > allowed or kernel.local:
        yield f"{kernel.stack + kernel.local} bytes of local memory per thread"
    if not allowed and (spilled := of("LDL|STL")):
        yield f"local memory: {spilled}, in the loop: {in_loop('LDL|STL')}"
    # The planner knows of dynamic shared memory alone. From sm_90 on, the system has 1 KB of every block.
    if kernel.shared != (1024 if int(re.sub(r"\D", "", kernel.target)) >= 90 else 0):
        yield f"{kernel.shared} bytes of static shared memory"
    if kernel.function in WARPGROUP_KERNELS:
        yield from faults_of_warpgroups(kernel)
        return
    # A fence waits for all stores that are under way, y and the saved gates too. The exchange is made to do without.
    if fences := of("MEMBAR|FENCE|ERRBAR|CCTL"):
        yield f"fences: {fences}"
    # Two MMAs for each tile of weights and a block of K (streamed: and a tile of columns); in float32 for each of three
    # products of parts. All of them are in the loop, which is unrolled by whole rounds.
    octets, size = kernel.sizes
    m_tiles = 2 * octets if forward else -(-octets // 2)
    in_one_product = 2 * m_tiles * size * (3 if kernel.element == "Fp32" else 1)
    shape = "HMMA.1688.F32.TF32" if kernel.element in ("Tf32", "Fp32") else "HMMA.16816.F32"
    products = in_loop(re.escape(shape))
    if not products or len(products) % in_one_product or len(products) != kernel.products:
        yield f"{len(products)} x {shape} in the loop, which takes {in_one_product}, of {kernel.products} products"
    yield from (faults_of_streamed if kernel.function in STREAMED_KERNELS else faults_of_steps)(kernel)


def faults_of_steps(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel whose loop goes over the steps."""
    in_loop = functools.partial(named, instructions=kernel.step_loop)
    persistent = "persistent" in kernel.function
    if len(barriers := in_loop("BAR")) != 1:
        yield f"barriers in the step loop: {barriers}"
    if not in_loop(r"LDGSTS\..*\b128\b"):
        yield "inputs are not copied to shared memory asynchronously, 16 bytes at a time"
    # At GPU scope, loads and stores that are relaxed meet in L2 and order nothing else.
    if persistent and not in_loop(r"LDG\..*\b128\.STRONG\.GPU"):
        yield "states are not loaded from L2, 16 bytes at a time"
    words, packets = ("words", r"STG\.E\.STRONG\.GPU"), ("packets", r"STG\.E\.128\.STRONG\.GPU")
    kind, store = words if "forward" in kernel.function else packets
    if persistent and not in_loop(store):
        yield f"states are not stored to L2 as {kind}"
    if not persistent and (strong := named(r".*\bSTRONG\b", kernel.instructions)):
        yield f"a resident kernel exchanges nothing, but there is {strong}"


def faults_of_warpgroups(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel whose products are of warpgroups."""
    octets, blocks, tiles = kernel.sizes
    in_loop = functools.partial(named, instructions=kernel.step_loop)
    # Of each tile of 64 rows, two for a block of K; all of them in the loop.
    wanted = 2 * blocks * (octets // 2 if "forward" in kernel.function else 1)
    shape = f"HGMMA.64x{8 * tiles}x{'8.F32.TF32' if kernel.element == 'Tf32' else '16.F32'}"
    products = in_loop(re.escape(shape))
    if len(products) != wanted or len(products) != kernel.products:
        yield f"{len(products)} x {shape} in the loop, which takes {wanted}, of {kernel.products} products"
    if not in_loop(r"LDGSTS\..*\b128\b"):
        yield "inputs are not copied to shared memory asynchronously, 16 bytes at a time"
    if not in_loop(r"LDG\..*\b128\.STRONG\.GPU") or not in_loop(r"STG\.E\.128\.STRONG\.GPU"):
        yield "states are not loaded from and stored to L2 as packets of 16 bytes"
    # At the scope of the CTA, for what products read; none that waits for stores to global memory at a wider one.
    if wide := [
        each for each in named("MEMBAR|FENCE|ERRBAR|CCTL", kernel.instructions) if "GPU" in each or "SYS" in each
    ]:
        yield f"fences: {wide}"


def faults_of_streamed(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel for one step, whose loop goes over the blocks of K."""
    in_loop = functools.partial(named, instructions=kernel.step_loop)
    loads = in_loop(r"LDG\.")
    if not loads or any(".128" not in load for load in loads):
        yield f"weights and states are not loaded 16 bytes at a time: {loads}"
    if others := in_loop("BAR|LDS|STS|STG"):
        yield f"more than loads and products in the loop: {others}"


@with_kernels
def test_every_kernel_is_there_for_every_target() -> None:
    symbols: dict[str, set[str]] = {target: set() for target in TARGETS} | ptx_symbols(FILE)
    for kernel in kernels(FILE):
        symbols.setdefault(kernel.target, set()).add(kernel.symbol)
    assert set(symbols) == set(TARGETS)
    of_warpgroups = {kernel.symbol for kernel in kernels(FILE) if kernel.function in WARPGROUP_KERNELS}
    everything = set().union(*symbols.values()) - of_warpgroups
    assert {target: everything - found for target, found in symbols.items()} == {target: set() for target in TARGETS}
    assert {target for target, found in symbols.items() if found & of_warpgroups} == {"sm_90a"} & set(TARGETS)
    target = "sm_90a" if of_warpgroups else TARGETS[-1]
    counts = Counter(kernel.function for kernel in kernels(FILE) if kernel.products and kernel.target == target)
    assert counts.keys() == {*LOOP_KERNELS, *STREAMED_KERNELS, *(WARPGROUP_KERNELS if of_warpgroups else ())}
    assert sorted(build_info()["cuda_kernels"]) == sorted(f"{name} x {count}" for name, count in counts.items())


@with_kernels
@pytest.mark.parametrize("function", [*LOOP_KERNELS, *STREAMED_KERNELS, *WARPGROUP_KERNELS])
def test_kernels_keep_everything_on_chip_and_order_no_more_than_they_must(function: str) -> None:
    of_function = [kernel for kernel in kernels(FILE) if kernel.function == function]
    found = [f"{kernel}: {fault}" for kernel in of_function for fault in faults(kernel)]
    assert of_function or (function in WARPGROUP_KERNELS and "sm_90a" not in TARGETS)
    assert not found, "\n".join(["", *found])


@with_kernels
def test_elementwise_kernels_access_16_bytes_of_the_compute_type() -> None:
    for function in ("cells_forward", "cells_backward"):
        of_function = [kernel for kernel in kernels(FILE) if kernel.function == function]
        assert {(kernel.element, *kernel.sizes) for kernel in of_function} == {
            *(("Bf16", 1), ("Bf16", 4), ("Fp16", 1), ("Fp16", 4), ("Fp32", 1), ("Fp32", 4), ("Fp64", 1), ("Fp64", 2))
        }
        for kernel in of_function:
            narrow = named(r"(LDG|STG)\.E(?!\.(64|128|U8)\b)", kernel.instructions)  # U8: the reset mask
            wide = named(r"(LDG|STG)\.E\.128\b", kernel.instructions)
            vectors = kernel.sizes != (1,)
            assert bool(wide) == vectors, f"{kernel}: {wide}"
            assert not vectors or not narrow, f"{kernel}: {narrow}"


@with_kernels
def test_table() -> None:
    rows = table(kernels(FILE), shared_memory()).splitlines()
    assert len(rows) == 2 + len({kernel.name for kernel in kernels(FILE)})
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert shared_memory().keys() == {kernel.name for kernel in kernels(FILE) if kernel.products}


# A made-up persistent_forward<Bf16, 1, 1>: a step loop from 0x10 to 0xa0 as nvcc lays them out, the polling at the end.
CODE = """
LDG.E.128 R4,[R2.64]
LDGSTS.E.BYPASS.128.ZFILL [R8][R18.64],P0
BSSY B0,0x50
@P1 BRA 0xd0
BSYNC B0
HMMA.16816.F32.BF16 R8,R4,R12,RZ
HMMA.16816.F32.BF16 R8,R4,R14,R8
HMMA.16816.F32.BF16 R20,R4,R12,RZ
HMMA.16816.F32.BF16 R20,R4,R14,R20
BAR.SYNC.DEFER_BLOCKING 0x0
@P2 BRA 0x10
STG.E [R2.64],R8
EXIT
LDG.E.128.STRONG.GPU R12,[R2.64]
STG.E.STRONG.GPU [R6.64],R12
BRA 0x40
"""


def made_up(change: Callable[[str], str] = str, **resources: int) -> Kernel:
    code = [re.fullmatch(r"(@\S+)? ?(\S+) ?(.*)", line) for line in change(CODE).strip().splitlines()]
    symbol = "_ZN4cuda26_GLOBAL__N__0_22_persistent_forward_cu_0018persistent_forwardINS0_4Bf16ELi1ELi1EEEvNS0_6ParamsE"
    numbers = {"registers": 32, "stack": 0, "local": 0, "shared": 0} | resources
    return Kernel(
        "sm_80",
        symbol,
        **numbers,
        instructions=tuple(Instruction(*(part or "" for part in line.groups())) for line in code),
    )


def test_a_step_loop_is_found_whole() -> None:
    kernel = made_up()
    assert str(kernel) == "persistent_forward<Bf16, 1, 1> for sm_80"
    outside = {instruction.opcode for instruction in set(kernel.instructions) - set(kernel.step_loop)}
    assert outside == {"LDG.E.128", "STG.E", "EXIT"}
    assert list(faults(kernel)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda code: code.replace("STG.E [R2.64],R8", "MEMBAR.SC.GPU"), "fences: ['MEMBAR.SC.GPU']"),
        (lambda code: code + "LDL R0,[R1]", "local memory: ['LDL R0,[R1]'], in the loop: []"),
        (lambda code: code.replace("HMMA", "FFMA"), "0 x HMMA"),
        (lambda code: code.replace("HMMA", "FFMA", 1), "3 x HMMA.16816.F32 in the loop, which takes 4"),
        (lambda code: code.replace("LDGSTS", "LDG"), "asynchronously"),
        (lambda code: code.replace("BAR.", "WARPSYNC."), "barriers in the step loop: []"),
        (lambda code: code.replace("LDG.E.128.STRONG", "LDG.E.64.STRONG"), "not loaded from L2"),
        (lambda code: code.replace("STG.E.STRONG.GPU", "STG.E.STRONG.SYS"), "not stored to L2"),
    ],
)
def test_faults_are_found(change: Callable[[str], str], fault: str) -> None:
    assert fault in "\n".join(faults(made_up(change)))


def test_local_and_static_shared_memory_are_found() -> None:
    assert list(faults(made_up(stack=8))) == ["8 bytes of local memory per thread"]
    assert list(faults(made_up(shared=64))) == ["64 bytes of static shared memory"]

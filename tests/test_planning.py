"""The planner and the ways to see and overrule it."""

from typing import Any

import pytest
import torch

import fastlstm
from fastlstm import _C, FastLSTM
from fastlstm.bench.workload import permit_bf16_products


def test_plan_of_a_module_and_of_its_sizes_agree() -> None:
    module = FastLSTM(24, 40, num_layers=2, bidirectional=True, proj_size=8, dtype=torch.float64)
    sizes = fastlstm.plan(T=10, B=4, I=24, H=40, P=8, L=2, D=2, dtype=torch.float64, training=True)
    assert fastlstm.plan(module, T=10, B=4, training=True) == sizes
    assert sizes.backward is not None
    assert fastlstm.plan(module, T=10, B=4).backward is None


def test_plan_prints_family_isa_and_reason() -> None:
    plan = fastlstm.plan(T=100, B=32, I=128, H=128, training=True)
    text = str(plan)
    assert plan.forward in text and plan.isa in text and plan.reason in text
    assert set(plan.to_dict()) == {
        "forward", "forward_split", "bulk_input", "forward_products",
        "backward", "backward_split", "backward_products", "isa", "threads", "reason",
    }  # fmt: skip


def test_what_the_heuristics_are_for() -> None:
    torch.set_num_threads(2)
    one_step = fastlstm.plan(T=1, B=1, I=256, H=256, training=True)
    assert (one_step.forward, one_step.backward) == ("unpacked", "unpacked"), "packing would cost more than the step"
    sequence = fastlstm.plan(T=100, B=32, I=128, H=128, training=True)
    assert (sequence.forward, sequence.backward) == ("packed", "packed")
    assert fastlstm.plan(T=100, B=2, I=1024, H=1024).forward_split == "units", "weights stay in cache"
    assert fastlstm.plan(T=1, B=1, I=16, H=16).forward_split == "rows", "no other thread is worth waking"
    assert fastlstm.plan(T=100, B=1, I=128, H=128).bulk_input, "of x and h only h needs to be multiplied step by step"


def machine_plan(threads: int, T: int, B: int, H: int, *, allowed: bool = False, **machine: Any) -> dict[str, Any]:
    """Both passes of a layer with I = H on a machine that need not be this one; ``allowed``: bfloat16 products."""
    problem = {"T": T, "B": B, "N": T * B, "I": H, "H": H, "P": 0, "layers": 1, "directions": 1, "compute_bytes": 4}
    return _C.plan_for(**problem, training=True, bf16_allowed=allowed, threads=threads, **machine)


@pytest.mark.parametrize("threads", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("vector_bytes", [32, 64])
def test_plans_for_other_machines(threads: int, vector_bytes: int) -> None:
    """The work split is a formula of cores and caches: what must hold on machines that are not at hand."""
    machine = {"vector_bytes": vector_bytes, "l2_bytes": 2**20, "bf16": False}

    def cycles(T: int, B: int, H: int, threads: int = threads, **other: Any) -> float:
        return sum(machine_plan(threads, T, B, H, **machine | other)[p]["cycles"] for p in ("forward", "backward"))

    for T, B, H in ((100, 32, 128), (256, 8, 64), (100, 1, 512), (50, 64, 1024), (1, 1, 256)):
        assert cycles(T, B, H) <= cycles(T, B, H, 1), "a thread more never makes the chosen plan slower than one"
        assert cycles(T, B, H) <= cycles(T, B, H, l2_bytes=2**18), "nor does a larger cache"
        assert cycles(T, B, H) < cycles(2 * T, B, H) and cycles(T, B, H) < cycles(T, B, 2 * H)
    one_row = machine_plan(threads, 100, 1, 1024, **machine)
    assert threads == 1 or one_row["forward"]["split"] == "units", "a single row cannot be divided"
    if threads >= 8:
        few_rows = machine_plan(threads, 100, 2, 1024, **machine)
        assert few_rows["forward"]["split"] == "units", "two rows would leave the other threads idle"
    many_rows = machine_plan(threads, 100, 64 * threads, 64, **machine)
    assert many_rows["forward"]["split"] == "rows", "with enough rows for every thread nobody needs to wait"
    assert cycles(100, 64 * threads, 64) < 1.5 * cycles(100, 64, 64, 1), "twice the rows on twice the threads"


def test_plans_where_an_instruction_multiplies_bfloat16() -> None:
    machine = {"vector_bytes": 64, "l2_bytes": 2**20}
    for bf16, allowed in ((True, True), (True, False), (False, True)):
        plan = machine_plan(2, 100, 32, 512, allowed=allowed, bf16=bf16, **machine)
        expected = "bf16" if bf16 and allowed else "full"  # allowed, but slower without the instruction
        assert (plan["forward"]["products"], plan["backward"]["products"]) == (expected, expected)


@pytest.mark.parametrize("name", fastlstm.plans())
def test_force_plan(name: str) -> None:
    with fastlstm.force(name):
        assert fastlstm.plan(T=7, B=3, I=8, H=8).forward == name
        with fastlstm.force("stepwise"):
            assert fastlstm.plan(T=7, B=3, I=8, H=8).forward == "stepwise"
        assert fastlstm.plan(T=7, B=3, I=8, H=8).forward == name


@pytest.mark.parametrize("isa", fastlstm.available_isas())
def test_force_isa(isa: str) -> None:
    with fastlstm.force(isa=isa):
        assert fastlstm.plan(T=7, B=3, I=8, H=8).isa == isa
        assert fastlstm.build_info()["isa"] == isa
    assert fastlstm.build_info()["isa"] == fastlstm.available_isas()[-1]


def test_force_is_undone_by_an_exception() -> None:
    free = fastlstm.plan(T=7, B=3, I=8, H=8)
    with pytest.raises(KeyError), fastlstm.force("stepwise"):
        raise KeyError
    assert fastlstm.plan(T=7, B=3, I=8, H=8) == free


def test_force_a_variant() -> None:
    torch.set_num_threads(2)
    for split in ("rows", "units"):
        for bulk_input in (False, True):
            with fastlstm.force("packed", split=split, bulk_input=bulk_input):
                plan = fastlstm.plan(T=7, B=3, I=8, H=8, training=True)
            assert (plan.forward_split, plan.backward_split, plan.bulk_input) == (split, split, bulk_input)
    no_variant = pytest.raises(ValueError, match="'stepwise' has no variant")
    with fastlstm.force("stepwise", split="units"), no_variant:
        fastlstm.plan(T=7, B=3, I=8, H=8)


def test_products() -> None:
    shape = {"T": 7, "B": 3, "I": 8, "H": 8, "training": True}
    with fastlstm.force(products="full"):
        full = fastlstm.plan(dtype=torch.bfloat16, **shape)
        with fastlstm.force("packed", products="bf16"):
            plan = fastlstm.plan(dtype=torch.bfloat16, **shape)
        assert fastlstm.plan(dtype=torch.bfloat16, **shape) == full, "leaving the inner block restores the outer"
    assert (full.forward_products, full.backward_products) == ("full", "full")
    assert (plan.forward_products, plan.backward_products) == ("bf16", "bf16")
    assert str(plan).count(", bf16 products)") == 2 and "bf16 products" not in str(full)
    with fastlstm.force(products="bf16"):
        for dtype in (None, torch.float16, torch.float64):
            with pytest.raises(ValueError, match="products='bf16' needs bfloat16 tensors"):
                fastlstm.plan(dtype=dtype, **shape)
        with permit_bf16_products():
            assert fastlstm.plan(**shape).forward_products == "bf16"


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="products must be one of 'full', 'bf16', got 'int8'"):
        fastlstm.force(products="int8").__enter__()
    with pytest.raises(ValueError, match="split must be one of 'rows', 'units', got 'time'"):
        fastlstm.force(split="time").__enter__()
    with pytest.raises(ValueError, match=r"plan must be one of 'stepwise', .*'unpacked' \(CPU\), .* got 'fast'"):
        fastlstm.force("fast").__enter__()
    with pytest.raises(ValueError, match=r"isa must be one of 'scalar'.*, got 'sse9'"):
        fastlstm.force(isa="sse9").__enter__()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"T": 0, "B": 1, "I": 1, "H": 1}, "T must be at least 1, got 0"),
        ({"T": 1, "B": 1}, "needs a module, or I and H"),
        ({"T": 1, "B": 1, "I": 1, "H": 4, "P": 4}, "P must be in"),
        ({"T": 1, "B": 1, "I": 1, "H": 4, "D": 3}, "D must be 1 or 2, got 3"),
    ],
)
def test_bad_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastlstm.plan(**sizes)  # type: ignore[arg-type]


def test_forced_plan_that_cannot_run() -> None:
    with fastlstm.force("unpacked"), pytest.raises(ValueError, match="does not support proj_size > 0"):
        fastlstm.plan(T=3, B=2, I=4, H=8, P=2)


def test_build_info() -> None:
    info = fastlstm.build_info()
    assert info["version"] == fastlstm.__version__
    assert info["torch_running"] == torch.__version__
    assert info["isas_available"] == fastlstm.available_isas()
    assert set(info["isas_available"]) <= set(info["isas_compiled"])
    assert all(target.startswith(("sm_", "compute_")) for target in info["cuda"])

"""The planner and the ways to see and overrule it."""

import pytest
import torch

import fastlstm
from fastlstm import FastLSTM
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
    one_step = fastlstm.plan(T=1, B=1, I=256, H=256)
    assert one_step.forward == "unpacked", "packing would cost more than the step"
    sequence = fastlstm.plan(T=100, B=32, I=128, H=128, training=True)
    assert (sequence.forward, sequence.forward_split) == ("packed", "rows"), "rows need no synchronisation"
    assert fastlstm.plan(T=100, B=2, I=1024, H=1024).forward_split == "units", "weights stay in cache"


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
    assert str(plan).count(", bf16 products)") == 2 and "bf16" not in str(full)
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
    with pytest.raises(ValueError, match="plan must be one of 'stepwise', 'packed', 'unpacked', got 'fast'"):
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

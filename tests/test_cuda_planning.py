"""The planner of the CUDA kernels: pure host code, so plans for any GPU are tested on any machine."""

from itertools import pairwise, product

import pytest
import torch

import fastlstm
from fastlstm import _C, FastLSTM
from fastlstm.planning import GPUS, CudaPlan

ELEMENTS = ["bfloat16", "float16", "tf32", "float32", "float64"]


def passes(
    gpu: str, element: str, training: bool = True, step_extras: bool = False, layer_norm: bool = False, **sizes: int
) -> dict:
    sizes = {"T": 100, "B": 16, "I": sizes["H"], "P": 0, "layers": 1, "directions": 1} | sizes
    limits = GPUS[gpu]
    return _C.cuda_plan_for(
        **sizes,
        element=element,
        training=training,
        step_extras=step_extras,
        layer_norm=layer_norm,
        sms=limits.sms,
        shared_bytes=limits.shared_bytes,
        l2_bytes=limits.l2_bytes,
        gigahertz=limits.gigahertz,
        warpgroups=limits.warpgroups,
    )


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_plan_fits_the_gpu_and_covers_the_batch(gpu, element):
    for hidden, batch, directions in product((1, 8, 33, 64, 128, 200, 512, 1000, 1024, 2048), (1, 9, 64, 300), (1, 2)):
        found = passes(gpu, element, H=hidden, B=batch, directions=directions)
        for pass_ in (found["forward"], found["backward"]):
            assert pass_["microseconds"] > 0
            if pass_["family"] == "stepwise":
                continue
            assert pass_["shared_bytes"] <= GPUS[gpu].shared_bytes
            rows = 8 * pass_["tiles"] * pass_["groups"]
            assert rows * pass_["waves"] >= batch > rows * (pass_["waves"] - 1)
            if pass_["family"] in ("persistent", "warpgroup"):  # their CTAs wait for each other
                assert pass_["ctas"] <= GPUS[gpu].sms


@pytest.mark.parametrize(
    ("sizes", "element", "forward"),
    [
        ({"H": 64, "B": 8}, "bfloat16", "resident"),
        ({"H": 128, "B": 1}, "float16", "persistent"),
        ({"H": 128, "B": 256}, "float16", "resident"),
        ({"H": 64, "B": 8}, "tf32", "resident"),
        ({"H": 512, "B": 16}, "bfloat16", "persistent"),
        ({"H": 512, "B": 16}, "float32", "persistent"),
        ({"H": 1024, "B": 16}, "tf32", "persistent"),
        ({"H": 2048, "B": 1}, "bfloat16", "persistent"),
        ({"H": 512, "B": 64}, "bfloat16", "warpgroup"),
        ({"H": 1024, "B": 256}, "float16", "warpgroup"),
        ({"H": 768, "B": 64}, "tf32", "warpgroup"),
        ({"H": 768, "B": 64}, "float32", "stepwise"),  # which it does not multiply
        ({"H": 764, "B": 64}, "bfloat16", "persistent"),  # whole octets are all it has
        ({"H": 512, "B": 16, "P": 64}, "bfloat16", "persistent"),
        ({"H": 512, "B": 64, "P": 128}, "tf32", "warpgroup"),
        ({"H": 512, "B": 16, "P": 64, "T": 1}, "bfloat16", "stepwise"),  # W_hh W_hr costs more than it saves
        ({"H": 2048, "B": 256, "P": 512}, "bfloat16", "stepwise"),  # and has four times the columns of W_hh
        ({"H": 512, "B": 16, "P": 64}, "float64", "stepwise"),
        ({"H": 512, "B": 16}, "float64", "stepwise"),
        ({"H": 2048, "B": 1}, "tf32", "streamed"),
        ({"H": 2048, "B": 16}, "float32", "stepwise"),
    ],
)
def test_families_on_an_h200(sizes, element, forward):
    assert passes("H200", element, **sizes)["forward"]["family"] == forward


@pytest.mark.parametrize("more", ["step_extras", "layer_norm"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_steps_with_more_than_the_cell_run_one_by_one(element, more):
    for hidden, batch, layers in product((8, 128, 512), (1, 300), (1, 3)):
        found = passes("H200", element, H=hidden, B=batch, layers=layers, **{more: True})
        assert (found["forward"]["family"], found["backward"]["family"]) == ("stepwise", "stepwise")


def test_extras_of_a_module():
    def family(module: torch.nn.LSTM, **options: bool) -> str:
        return fastlstm.plan(module, T=9, B=8, device="H200", **options).forward

    assert family(torch.nn.LSTM(8, 64)) == family(FastLSTM(8, 64)) == "resident"
    assert family(FastLSTM(8, 64), step_extras=True) == "stepwise"
    assert family(FastLSTM(8, 64, zoneout=(0.0, 0.1)).eval()) == "stepwise"
    assert family(FastLSTM(8, 64, layer_norm=True)) == "stepwise"
    dropped = FastLSTM(8, 64, recurrent_dropout=0.1)
    assert (family(dropped), family(dropped.eval())) == ("stepwise", "resident")


def test_products_of_warpgroups_are_hoppers():
    for gpu in GPUS:
        for pass_ in passes(gpu, "bfloat16", H=1024, B=128).values():
            assert (pass_["family"] == "warpgroup") == (gpu in ("H100", "H200"))


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_projection_costs_products_over_all_steps(element):
    """Folded into the recurrent weights, it leaves steps as they are without it."""
    for hidden, batch, steps in product((64, 512, 1024), (1, 64), (64, 512)):
        sizes = {"H": hidden, "B": batch, "T": steps}
        plain, projected = passes("H200", element, **sizes), passes("H200", element, **sizes, P=hidden // 4)
        for name in ("forward", "backward"):
            assert projected[name]["microseconds"] > plain[name]["microseconds"]
            if plain[name]["family"] != "stepwise":
                assert projected[name]["family"] == plain[name]["family"]
                assert projected[name]["microseconds"] < plain[name]["microseconds"] + 500 / steps + 3


def test_weights_that_no_l4_can_hold_are_read_step_by_step():
    assert passes("L4", "bfloat16", H=1024)["forward"]["family"] == "stepwise"
    assert passes("L4", "bfloat16", H=256)["forward"]["family"] == "persistent"


@pytest.mark.parametrize("element", ["bfloat16", "tf32"])
def test_a_larger_problem_is_not_predicted_to_be_quicker(element):
    for sizes in ([{"H": h} for h in (256, 512, 1024)], [{"H": 512, "B": b} for b in (8, 64, 256, 1024)]):
        times = [passes("H200", element, **s)["forward"]["microseconds"] for s in sizes]
        assert all(a <= b for a, b in pairwise(times)), times


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_layers_that_run_at_the_same_time_fit_the_gpu_and_pay(gpu, element):
    for hidden, batch, layers, steps in product((64, 200, 512, 1024), (1, 16, 300), (1, 2, 3, 8), (1, 7, 512)):
        sizes = {"H": hidden, "B": batch, "layers": layers, "T": steps}
        together = passes(gpu, element, **sizes)
        with fastlstm.force(layers=1):
            in_turn = passes(gpu, element, **sizes)
        for name in ("forward", "backward"):
            pass_ = together[name]
            assert pass_["microseconds"] <= in_turn[name]["microseconds"]
            assert in_turn[name]["layers"] == 1
            if pass_["layers"] == 1:
                assert pass_["family"] in ("stepwise", "streamed") or pass_["run_steps"] == steps
                continue
            assert pass_["layers"] <= layers and pass_["waves"] == 1
            assert pass_["ctas"] <= GPUS[gpu].sms
            assert pass_["run_steps"] % 4 == 0 and pass_["run_steps"] < steps


@pytest.mark.parametrize(
    ("sizes", "layers"),
    [
        ({"H": 512, "B": 16, "layers": 2}, 2),
        ({"H": 512, "B": 16, "layers": 4}, 4),
        ({"H": 128, "B": 64, "layers": 3}, 3),
        ({"H": 512, "B": 16, "layers": 2, "directions": 2}, 1),  # each direction needs all steps of the layer below
        ({"H": 1024, "B": 64, "layers": 2}, 1),  # one layer takes all SMs
        ({"H": 512, "B": 16, "layers": 2, "T": 8}, 1),
    ],
)
def test_layers_at_the_same_time_on_an_h200(sizes, layers):
    assert passes("H200", "bfloat16", **({"T": 512} | sizes))["forward"]["layers"] == layers


def test_plan_of_a_gpu_in_words():
    plan = fastlstm.plan(T=512, B=16, I=1024, H=1024, dtype=torch.bfloat16, training=True, device="H200")
    assert isinstance(plan, CudaPlan)
    assert (plan.forward, plan.backward, plan.device) == ("persistent", "persistent", "H200")
    assert "CTAs" in str(plan) and "predicted" in str(plan)
    assert plan.to_dict()["forward_microseconds"] == plan.forward_microseconds
    assert fastlstm.plan(T=512, B=16, I=1024, H=1024, device="H200").backward is None


def test_float32_follows_torchs_switch_for_rnns():
    def layout() -> str:
        return fastlstm.plan(T=9, B=8, I=1024, H=1024, device="H200").forward

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert layout() == "persistent"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert layout() == "streamed"  # full float32 needs twice the room


def test_forced_families_and_shapes():
    def plan(**sizes: int) -> CudaPlan:
        return fastlstm.plan(T=9, I=8, dtype=torch.bfloat16, device="H100", **({"B": 40, "H": 64} | sizes))

    for family in fastlstm.plans("cuda"):
        with fastlstm.force(plan=family):
            assert plan().forward == family
            assert family in plan().forward_layout
    with fastlstm.force(plan="persistent", octets=2, tiles=4):
        assert plan().forward_layout == "persistent (2 teams of 4 CTAs, 32 rows each)"
    with fastlstm.force(plan="persistent", octets=2, tiles=4, groups=1):
        assert plan().forward_layout == "persistent (1 team of 4 CTAs, 32 rows each, 2 times)"
    with fastlstm.force(plan="persistent", octets=2, tiles=1, layers=2, run_steps=3):
        words = "persistent (10 teams of 4 CTAs, 8 rows each, 2 layers at a time, 4 steps apart)"
        assert plan(L=2).forward_layout == words
    with fastlstm.force(plan="resident"):
        assert plan(P=8).forward_layout == "resident (5 CTAs, 8 rows each, projection in the recurrent weights)"
    with fastlstm.force(plan="resident", run_steps=8):
        assert plan().forward_layout == "resident (5 CTAs, 8 rows each, 8 steps per launch)"
    with fastlstm.force(plan="packed"):  # a family of the CPU
        assert plan().forward == "resident"
    with fastlstm.force(plan="persistent"):
        assert fastlstm.plan(T=9, B=4, I=8, H=8).forward in fastlstm.plans("cpu")


@pytest.mark.parametrize(
    ("family", "sizes", "dtype", "message"),
    [
        ("persistent", {"H": 5000}, torch.bfloat16, "'persistent' cannot hold weights of hidden_size 5000"),
        ("resident", {"H": 256}, torch.bfloat16, "'resident' cannot hold weights of hidden_size 256"),
        ("streamed", {"H": 64, "step_extras": True}, torch.bfloat16, "'streamed' does not support reset_hx, recurrent"),
        ("persistent", {"H": 64, "layer_norm": True}, torch.bfloat16, "'persistent' does not support layer_norm"),
        ("persistent", {"H": 64}, torch.float64, "'persistent' multiplies on tensor cores.* float64"),
        ("warpgroup", {"H": 60}, torch.bfloat16, "'warpgroup' needs a hidden_size that is a multiple of 8, got 60"),
        ("warpgroup", {"H": 2112}, torch.bfloat16, "'warpgroup' cannot hold weights of hidden_size 2112"),
    ],
)
def test_a_forced_family_that_cannot_run_says_why(family, sizes, dtype, message):
    with (
        fastlstm.force(plan=family),
        pytest.raises(ValueError, match=f"the forced plan cannot run this problem: {message}"),
    ):
        fastlstm.plan(T=9, B=4, I=8, dtype=dtype, device="H200", **sizes)


def test_forced_layers_that_do_not_fit():
    for sizes in ({"L": 1}, {"L": 2, "D": 2}, {"L": 2, "B": 4000}):
        with (
            fastlstm.force(plan="persistent", layers=2),
            pytest.raises(
                ValueError,
                match=r"no shape with the forced layers = 2 for hidden_size 64, num_layers . and . time steps",
            ),
        ):
            fastlstm.plan(T=9, I=8, H=64, dtype=torch.bfloat16, device="H200", **({"B": 4} | sizes))


def test_a_gpu_without_warpgroups_says_so():
    with fastlstm.force(plan="warpgroup"), pytest.raises(ValueError, match="'warpgroup' needs products of warpgroups"):
        fastlstm.plan(T=9, B=4, I=8, H=64, dtype=torch.bfloat16, device="A100")
    with (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        fastlstm.force(plan="warpgroup"),
        pytest.raises(ValueError, match="'warpgroup' multiplies factors of bfloat16, float16 or TF32"),
    ):
        fastlstm.plan(T=9, B=4, I=8, H=64, device="H200")


@pytest.mark.parametrize("name", ["octets", "tiles", "groups", "layers", "run_steps"])
def test_forced_numbers_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"), fastlstm.force(**{name: 0}):
        pass


def test_devices_that_are_refused():
    with pytest.raises(
        ValueError, match="device must be a CPU, a CUDA device or one of A100, L4, H100, H200, B200, got mps"
    ):
        fastlstm.plan(T=9, B=4, I=8, H=8, device="mps")

"""The CUDA driver and kernels, run on the CPU against the fp64 reference.

The source is that of csrc/cuda; what a GPU does is emulated by host_cuda/emulation.h under a scheduler that draws from
a seed. That shows wrong arithmetic, layouts, indices and protocols; it does not show speed, nor what depends on the
hardware's own rounding.
"""

from __future__ import annotations

import itertools
import random
import re
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch
from host_cuda import emulated
from host_cuda.cases import (
    DEVICES,
    EXTRAS,
    LAYOUTS,
    Case,
    check,
    computed,
    errors,
    expected,
    make_inputs,
    normalised,
    random_case,
)
from torch import Tensor

FUSED = ["resident", "persistent", "warpgroup"]  # they keep weights in CTAs
OURS = ["streamed", *FUSED]  # they take the recurrent products themselves
FAMILIES = ["stepwise", *OURS]
MULTIPLIED = ["bf16", "fp16", "tf32", "fp32"]  # by tensor cores


def with_elements(families: list[str]) -> list[tuple[str, str]]:
    """Each family with each element that its tensor cores multiply; stepwise multiplies all."""
    return [(f, e) for f in families for e in MULTIPLIED if (f, e) != ("warpgroup", "fp32")]


def fitting(family: str, H: int) -> int:
    """The next hidden size that a family can have: warpgroup has whole octets."""
    return -(-H // 8) * 8 if family == "warpgroup" else H


CASES_PER_FAMILY = 200
CASES_PER_TEST = 20


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    emulated.load(emulated.build())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit: NaN equals NaN, 0 does not equal -0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(integers[a[name].element_size()]), b[name].view(integers[b[name].element_size()]))
        for name in a
    )


def test_emulation() -> None:
    """The emulation is as unforgiving as it says: its own tests, in C++."""
    done = subprocess.run([emulated.build(target="test_emulation")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("first", range(0, CASES_PER_FAMILY, CASES_PER_TEST))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_problems(family: str, first: int) -> None:
    for seed in range(first, first + CASES_PER_TEST):
        check(random_case(family, seed))


# How a backward pass may be asked for.
BACKWARD: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": True},
    "groups": {"groups": 3},
    "a group for each row": {"groups": 9},
    "recompute in groups": {"recompute": True, "groups": 3},
}


@pytest.mark.parametrize("element", [*MULTIPLIED, "fp64"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_of_steps(extra: str, element: str) -> None:
    options = EXTRAS[extra]
    for layout, (L, D, P) in itertools.product(LAYOUTS, [(2, 2, 0), (2, 1, 4)]):
        case = Case("stepwise", element, T=4, B=9, I=2, H=12 if P else 9, L=L, D=D, P=P, **options | layout)
        if case.layer_norm:
            case = normalised(case, features=9, units=35)
        check(replace(case, dropout="everything" in extra))
        inputs = make_inputs(case)
        training = computed(case, inputs, backward=False)
        emulated.seed(7)
        with emulated.force("stepwise"):
            *outputs, saved, cells = emulated.lstm(
                inputs.x, inputs.weights, inputs.h_0, inputs.c_0, **inputs.options, save=False
            )
        assert saved == []
        assert equal(dict(zip(training, [*outputs, *cells], strict=True)), training)


@pytest.mark.parametrize("kind", BACKWARD)
def test_ways_of_backward_with_layer_norm(kind: str) -> None:
    options = BACKWARD[kind]
    for element, layout, (L, D) in itertools.product([*MULTIPLIED, "fp64"], LAYOUTS, [(1, 2), (3, 1)]):
        if "batch_sizes" in layout and "groups" in options:
            continue
        case = Case("stepwise", element, T=4, B=9, I=9, H=40, L=L, D=D, layer_norm=True, **options | layout)
        check(case)
        check(replace(case, needs=(False, True, False), resets=0.2))  # neither of x nor of its weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", BACKWARD)
def test_ways_of_backward(kind: str, family: str) -> None:
    options = BACKWARD[kind]
    elements = [element for _, element in with_elements([family])]
    for element, layout, (L, D) in itertools.product(elements, LAYOUTS, [(1, 2), (3, 1)]):
        if "batch_sizes" in layout and "groups" in options:
            continue
        case = Case(family, element, T=4, B=9, I=2, H=fitting(family, 20), L=L, D=D, dropout=L > 1, **options | layout)
        check(replace(case, resets=0.2 if L > 1 else 0))


@pytest.mark.parametrize(("family", "element"), with_elements(OURS))
def test_projections(family: str, element: str) -> None:
    """Folded into the recurrent weights: sequences begin, end and begin anew at different steps, in both directions."""
    for layout, (L, D), (H, P) in itertools.product(LAYOUTS, [(1, 1), (1, 2), (3, 1)], [(20, 7), (24, 8)]):
        case = Case(family, element, T=4, B=9, I=2, H=fitting(family, H), P=P, L=L, D=D, h_0_scale=2, **layout)
        check(case)
        check(replace(case, resets=0.3, dropout=L > 1, recompute=D > 1, offset=1))
        check(replace(case, gradients=(False, True, True), needs=(True, True, False), groups=3 if not layout else 1))
        check(replace(case, gradients=(True, False, False), needs=(True, False, True)))


@pytest.mark.parametrize("family", FUSED)
def test_projections_of_layers_at_the_same_time(family: str) -> None:
    for layers, at_once, steps in ((1, 1, 4), (2, 2, 4), (3, 2, 8)):
        shape = (0, 0, 0, at_once, steps)
        case = Case(family, "bf16", T=13, B=9, I=2, H=fitting(family, 20), P=7, L=layers)
        case = replace(case, forward_shape=shape, backward_shape=shape)
        check(replace(case, resets=0.1, dropout=layers > 1))
        check(replace(case, D=2 if layers == 1 else 1, lengths=(9, 13, 1, 5, 0, 2, 13, 4, 4)))


@pytest.mark.parametrize(("family", "element"), with_elements(FAMILIES))
def test_cell_states(family: str, element: str) -> None:
    """Every family returns them, in training and in inference; without gradients of theirs it goes back, too."""
    for layout, (L, D, returned), P in itertools.product(LAYOUTS, [(1, 2, 1), (3, 1, 1), (2, 2, 2)], [0, 5]):
        H = fitting(family, 20)
        case = Case(family, element, T=4, B=9, I=2, H=H, P=P, L=L, D=D, cell_layers=returned, resets=0.2, **layout)
        check(replace(case, gradients=(True, True, True, False), recompute=D == 1))
        check(replace(case, family="stepwise"), forward_family=family)
        inputs = make_inputs(case)
        training = computed(case, inputs, backward=False)
        with emulated.force(family):
            *outputs, _, cells = emulated.lstm(
                *(inputs.x, inputs.weights, inputs.h_0, inputs.c_0), **inputs.options, save=False
            )
        assert equal(dict(zip(training, [*outputs, *cells], strict=True)), training)


@pytest.mark.parametrize("family", OURS)
def test_projections_of_padding(family: str) -> None:
    """Rows of no step are zeros, whatever the weights are."""
    case = Case(family, "bf16", T=4, B=9, I=2, H=fitting(family, 20), P=7, L=2, lengths=(4, 0, 2, 4, 4, 1, 3, 4, 4))
    inputs = make_inputs(case)
    for w_hr in inputs.weights[4::5]:
        w_hr[3, 2] = float("inf")
    y = computed(case, inputs, backward=False)["y"]
    for b, length in enumerate(case.lengths or ()):
        assert y[length:, b].count_nonzero() == 0
        assert length == 0 or not y[:length, b].isfinite().all()


@pytest.mark.parametrize("element", ["bf16", "fp16"])
def test_projections_are_as_exact_as_step_by_step(element: str) -> None:
    """Rounding W_hh W_hr costs what rounding h costs."""
    case = Case("streamed", element, T=24, B=9, I=8, H=96, P=24)
    inputs = make_inputs(case)
    exact = expected(case, inputs)
    folded, in_steps = (computed(replace(case, family=family), inputs) for family in ("streamed", "stepwise"))
    for name in exact:
        assert errors(folded[name], exact[name])[0] < 1.3 * errors(in_steps[name], exact[name])[0], name


@pytest.mark.parametrize("family", OURS)
def test_projections_beyond_the_range_of_float16(family: str) -> None:
    """Sums of products of weights that overflow meet hidden states that cancel: nn.LSTM has finite numbers there."""
    case = Case(family, "fp16", T=4, B=9, I=2, H=fitting(family, 20), P=7)
    inputs = make_inputs(case)
    inputs.weights[1].fill_(200)
    inputs.weights[4].fill_(200)
    inputs.weights[4][:, ::2] = -200
    exact = computed(replace(case, family="stepwise"), inputs, backward=False)
    found = computed(case, inputs, backward=False)
    for name, result in found.items():
        assert result.isfinite().all(), name
        assert exact[name].isfinite().all(), name


def test_gates_that_are_computed_again_are_not_saved() -> None:
    case = Case("persistent", "bf16", T=3, B=2, I=2, H=16, L=2, recompute=True)
    inputs = make_inputs(case)
    *_, saved, _ = emulated.lstm(inputs.x, inputs.weights, inputs.h_0, inputs.c_0, **inputs.options)
    assert [tuple(t.shape) for t in saved] == [(2, 0, 64), (2, 6, 16), (1, 6, 16)]


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("family", "element"), with_elements(OURS))
@pytest.mark.parametrize("place", ["x", "h_0", "c_0", "w_hh", "d_y"])
def test_nan_goes_where_it_belongs(family: str, element: str, place: str) -> None:
    """One NaN reaches exactly the results that depend on it, and no wait is endless."""
    draw = random.Random(place + family + element)
    # In the reference, gradients of steps that a length cuts off are 0 * NaN if the states are NaN: so not with these.
    ragged = {"batch_sizes": (10, 8, 5, 2)} if place[0] in "hcw" else {"lengths": (4, 2, 0, 4, 1, 3, 4, 4, 3, 2)}
    sequences = [{}, ragged, {"resets": 0.3}]
    for directions, P, more in itertools.product([1, 2], [0, 7], sequences):
        H = fitting(family, 20)
        case = Case(family, element, T=4, B=10, I=2, H=H, P=P, D=directions, seed=draw.randrange(2**32), **more)
        sizes = {"x": 50, "h_0": 10 * (P or H), "c_0": 10 * H, "w_hh": 4 * H * (P or H)}
        sizes["d_y"] = 25 * (P or H) * directions
        check(replace(case, nan_at=(place, draw.randrange(sizes[place]))))


@pytest.mark.parametrize(("family", "element"), with_elements(OURS))
def test_initial_states_of_any_size(family: str, element: str) -> None:
    """Of what CTAs exchange, only h_0 can be larger than 1, and its bits are those that say to which step it belongs.

    The weights are small, so that not every gate is saturated.
    """
    for scale, directions in itertools.product([2, 100, 1e4], [1, 2]):
        for lengths in (None, (5, 0, 3)):
            case = Case(
                family, element, T=5, B=3, I=2, H=fitting(family, 20), D=directions, lengths=lengths, h_0_scale=scale
            )
            check(replace(case, weight_scale=1 / scale))


@pytest.mark.parametrize("family", OURS)
def test_tf32_is_rounded(family: str) -> None:
    """An MMA cuts its factors off to TF32, so they have to be rounded before: here, what that makes is all there is."""
    case = Case(family, "tf32", T=1, B=1, I=1, H=16)
    inputs = make_inputs(case)
    for t in (inputs.x, inputs.h_0, inputs.c_0, *inputs.weights):
        t.zero_()
    g_of_unit_0 = 2 * case.H
    inputs.weights[1][g_of_unit_0, 0] = inputs.h_0[0, 0, 0] = 1 + 0.75 * 2**-10  # nearest in TF32: 1 + 2^-10
    inputs.weights[2][g_of_unit_0] = -1
    emulated.device()
    with emulated.force(family):
        *_, saved, _ = emulated.lstm(inputs.x, inputs.weights, inputs.h_0, inputs.c_0, **inputs.options)
    assert saved[0][0, 0, g_of_unit_0].item() == pytest.approx((1 + 2**-10) ** 2 - 1, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- every kernel


def variants(name: str) -> list[tuple[str, int, int, int]]:
    """Of the lists of compiled kernels in layout.h: element, octets, blocks, and the blocks of the next smaller one."""
    text = (emulated.ROOT / "csrc/cuda/layout.h").read_text()
    lists = re.findall(rf"{name}(<2>)?\[\d+\] = \{{(.*?)\}};", text, re.DOTALL)
    assert len(lists) == 2, f"layout.h has no two lists of {name}"
    found = []
    for parts, entries in lists:
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+), (\d+)\}", entries)]
        assert pairs
        for octets, blocks in pairs:
            before = max((b for o, b in pairs if o == octets and b < blocks), default=0)
            found.append(("fp32" if parts else "bf16", octets, blocks, before))
    return found


def units_of_blocks(element: str, blocks: int, backward: bool) -> int:
    """Hidden units in blocks of K."""
    return blocks * (8 if backward else 32) // (2 if element in ("tf32", "fp32") else 1)


@pytest.mark.parametrize(("element", "octets", "blocks", "before"), variants("kForwardVariants"))
def test_persistent_forward_variant(element: str, octets: int, blocks: int, before: int) -> None:
    H = units_of_blocks(element, 8 * before, backward=False) + 11
    case = Case("persistent", element, T=2, B=3 if blocks > 4 else 9, I=1, H=max(H, 43), forward_shape=(octets, 0, 0))
    check(case, backward=False)


@pytest.mark.parametrize(("element", "octets", "blocks", "before"), variants("kBackwardVariants"))
def test_persistent_backward_variant(element: str, octets: int, blocks: int, before: int) -> None:
    H = units_of_blocks(element, 8 * before, backward=True) + 11
    case = Case("persistent", element, T=2, B=3 if blocks > 16 else 9, I=1, H=max(H, 43), backward_shape=(octets, 0, 0))
    check(case, forward_family="stepwise")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_streamed_variants(backward: bool) -> None:
    for kind, octets, tiles, _ in variants(f"kStreamed{'Backward' if backward else 'Forward'}Variants"):
        for element in [kind] if kind == "fp32" else [kind, "fp16", "tf32"]:
            # Tails of units, of columns and of the blocks of K; more than a CTA of each.
            for H, B in ((8 * octets + 13, 8 * tiles + 3), (300, 8 * tiles)):
                case = Case("streamed", element, T=3, B=B, I=1, H=H)
                if backward:
                    check(replace(case, backward_shape=(octets, tiles)), forward_family="stepwise")
                else:
                    check(replace(case, forward_shape=(octets, tiles)), backward=False)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_resident_variants(backward: bool) -> None:
    for kind, octets, blocks, before in variants(f"kResident{'Backward' if backward else 'Forward'}Variants"):
        sizes = set()
        for element in [kind] if kind == "fp32" else [kind, "tf32"]:
            least = units_of_blocks(element, before, backward) + 3
            most = min(units_of_blocks(element, blocks, backward), 64 * octets)
            sizes |= {(element, least), (element, most)} if least <= most else set()
        assert sizes, f"nothing needs {blocks} blocks of {octets} octets"
        for element, H in sorted(sizes):
            case = Case("resident", element, T=3, B=9, I=1, H=H)
            if backward:
                check(replace(case, backward_shape=(octets, 0, 0)), forward_family="stepwise")
            else:
                check(replace(case, forward_shape=(octets, 0, 0)), backward=False)


def warpgroup_variants(name: str) -> list[tuple[int, int, int, int]]:
    """Of a list in layout.h: octets, blocks of a warpgroup, column tiles, and the blocks of the next smaller one."""
    text = (emulated.ROOT / "csrc/cuda/layout.h").read_text()
    found = re.search(rf"{name}\[\] = \{{(.*?)\}};", text, re.DOTALL)
    assert found, f"layout.h has no list of {name}"
    shapes = [(int(a), int(b), int(c)) for a, b, c in re.findall(r"\{(\d+), (\d+), (\d+)\}", found[1])]
    return [
        (octets, blocks, tiles, max((b for o, b, t in shapes if (o, t) == (octets, tiles) and b < blocks), default=0))
        for octets, blocks, tiles in shapes
    ]


@pytest.mark.parametrize(("octets", "blocks", "tiles", "before"), warpgroup_variants("kWarpgroupForwardVariants"))
def test_warpgroup_forward_variant(octets: int, blocks: int, tiles: int, before: int) -> None:
    for element in ("bf16", "tf32") if blocks <= 8 else ("bf16",):
        H = units_of_blocks(element, 2 * before, backward=False) + 24
        case = Case("warpgroup", element, T=3 if blocks <= 8 else 2, B=8 * tiles - 3, I=1, H=H)
        check(replace(case, forward_shape=(octets, tiles)), backward=False)


@pytest.mark.parametrize(("octets", "blocks", "tiles", "before"), warpgroup_variants("kWarpgroupBackwardVariants"))
def test_warpgroup_backward_variant(octets: int, blocks: int, tiles: int, before: int) -> None:
    for element in ("bf16", "tf32") if blocks <= 8 else ("bf16",):
        H = units_of_blocks(element, 8 * before, backward=True) + 24
        case = Case("warpgroup", element, T=3 if blocks <= 8 else 2, B=8 * tiles - 3, I=1, H=H)
        check(replace(case, backward_shape=(octets, tiles)), forward_family="stepwise")


# ---------------------------------------------------------------------------------------------------- equal bits


@pytest.mark.parametrize(("family", "element"), with_elements(FAMILIES))
def test_every_schedule_gives_the_same_bits(family: str, element: str) -> None:
    case = Case(
        family,
        element,
        T=4,
        B=11,
        I=3,
        H=fitting(family, 27),
        D=2,
        lengths=(4, 0, 2, 4, 4, 1, 3, 4, 4, 4, 2),
        resets=0.2,
    )
    inputs = make_inputs(case)
    first = computed(case, inputs)
    for seed in range(1, 10):
        assert equal(computed(replace(case, seed=seed), inputs), first), f"seed {seed}"


@pytest.mark.parametrize("family", OURS)
def test_memory_as_earlier_launches_left_it(family: str) -> None:
    """An exchange buffer that still holds another call's last steps must not be taken for this call's first."""
    for T, seed in itertools.product([1, 2, 3, 4], range(2)):
        case = Case(family, "bf16", T=T, B=9, I=2, H=40, seed=seed)
        inputs = make_inputs(case)
        clean = computed(case, inputs)
        for steps in (T, 4):  # the same call; and one that leaves other tags behind
            before = replace(case, T=steps, data_seed=1)
            computed(before, make_inputs(before))
            assert equal(computed(replace(case, poison=False), inputs), clean), f"T {T}, seed {seed}, after {steps}"


@pytest.mark.parametrize(("family", "element"), with_elements(OURS))
def test_rows_do_not_depend_on_their_batch(family: str, element: str) -> None:
    # One feature: gates_x is then exact, whatever order torch's products add in.
    case = Case(family, element, T=3, B=19, I=1, H=24)
    inputs = make_inputs(case)
    whole = computed(case, inputs)
    for rows in (slice(0, 1), slice(0, 8), slice(3, 16), slice(18, 19)):
        few = replace(inputs)
        few.x, few.h_0, few.c_0 = inputs.x[:, rows], inputs.h_0[:, rows], inputs.c_0[:, rows]
        few.gradients = [g[:, rows] for g in inputs.gradients if g is not None]
        part = computed(replace(case, B=few.x.size(1)), few)
        names = ["y", "h_n", "c_n", "d_h_0", "d_c_0"]
        assert equal({n: part[n] for n in names}, {n: whole[n][:, rows].contiguous() for n in names}), f"{rows}"


@pytest.mark.parametrize(("family", "element"), with_elements(["persistent", "warpgroup"]))
def test_tiles_whose_sequences_all_begin_late(family: str, element: str) -> None:
    """In reverse they read h_0 together, and nothing of the step before; still no CTA may be two steps ahead."""
    for columns, length, seed in itertools.product((8, 16), (2, 5), range(2)):
        case = Case(family, element, T=7, B=columns, I=1, H=40, P=16 if seed == 0 else 0, D=2, seed=seed)
        shape = (0, 2, 0) if columns == 16 else ()
        check(replace(case, lengths=(length,) * columns, forward_shape=shape))


def test_waves() -> None:
    """A batch that needs several launches on a small device, and two directions that cannot run at once."""
    shape = (2, 1, 0)
    for directions in (1, 2):
        case = Case("persistent", "bf16", T=3, B=20, I=2, H=40, D=directions, resets=0.2)
        case = replace(case, forward_shape=shape, backward_shape=shape)
        inputs = make_inputs(case)
        at_once = computed(case, inputs)
        assert emulated.launches() == 2 + case.resets_launches
        in_turn = computed(replace(case, device=(3, DEVICES[0][1])), inputs)
        assert emulated.launches() == 2 * 3 * directions + case.resets_launches
        assert equal(in_turn, at_once)


@pytest.mark.parametrize(("family", "element"), with_elements(FUSED))
def test_a_pass_in_several_runs(family: str, element: str) -> None:
    """States go from launch to launch in full precision: nothing depends on where a pass is cut."""
    # One feature: gates_x is then exact, whatever order torch's products add in.
    for directions, more in itertools.product(
        [1, 2], [{}, {"resets": 0.2, "lengths": (13, 0, 4, 5, 8, 12, 20, 13, 1)}]
    ):
        case = Case(family, element, T=13, B=9, I=1, H=fitting(family, 20), D=directions, h_0_scale=5, **more)
        inputs = make_inputs(case)
        whole = computed(case, inputs)
        assert emulated.launches() == 2 + case.resets_launches
        for steps, launches in ((3, 4), (4, 4), (8, 2), (12, 2), (13, 1)):
            cut = replace(case, forward_shape=(0, 0, 0, 0, steps), backward_shape=(0, 0, 0, 0, steps), seed=steps)
            assert equal(computed(cut, inputs), whole), f"{steps} steps, {directions} directions, {more}"
            assert emulated.launches() == 2 * launches + case.resets_launches


@pytest.mark.parametrize("family", FUSED)
def test_layers_at_the_same_time(family: str) -> None:
    """A group of layers takes as many launches as one layer has runs, and one more for each of the others."""
    for layers, at_once, launches in ((2, 2, 5), (3, 2, 6), (4, 4, 7), (5, 4, 8), (5, 3, 11)):
        shape = (0, 0, 0, at_once, 4)
        case = Case(
            family, "bf16", T=14, B=9, I=2, H=fitting(family, 20), L=layers, forward_shape=shape, backward_shape=shape
        )
        check(replace(case, resets=0.1, dropout=True))
        check(case)
        assert emulated.launches() == 2 * launches


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_computes_what_training_does(family: str) -> None:
    for _, element in with_elements([family]):
        case = Case(
            family, element, T=4, B=9, I=3, H=fitting(family, 20), L=2, D=2, lengths=(4, 0, 2, 4, 4, 1, 3, 4, 4)
        )
        inputs = make_inputs(case)
        training = computed(case, inputs, backward=False)
        emulated.seed(7)
        with emulated.force(family):
            *outputs, saved, _ = emulated.lstm(
                *(inputs.x, inputs.weights, inputs.h_0, inputs.c_0), **inputs.options, save=False
            )
        assert saved == []
        assert equal(dict(zip(training, outputs, strict=True)), training)


# ---------------------------------------------------------------------------------------------------- the driver


def test_memory_of_operators_is_nan() -> None:
    """What the other tests rely on to see that everything is written: rows that belong to no step stay NaN."""
    inputs = make_inputs(Case("persistent", "bf16", T=3, B=2, I=2, H=16, lengths=(3, 1)))
    emulated.poison(True)
    with emulated.force("persistent"):
        *_, saved, _ = emulated.lstm(inputs.x, inputs.weights, inputs.h_0, inputs.c_0, **inputs.options)
    cells = saved[1].view(3, 2, 16)
    assert cells[1:, 1].isnan().all()
    assert not cells[:, 0].isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_single_step(family: str) -> None:
    case = Case(family, "bf16", T=1, B=9, I=3, H=fitting(family, 20))
    inputs = make_inputs(case)
    whole = computed(case, inputs)
    step = replace(inputs, x=inputs.x[0], h_0=inputs.h_0[0], c_0=inputs.c_0[0])
    step.gradients = [g[0] for g in inputs.gradients if g is not None]
    results = computed(case, step)
    assert results["y"].shape == (9, case.H)
    for name in ("y", "h_n", "c_n", "d_x", "d_h_0", "d_c_0"):
        whole[name] = whole[name][0]
    assert equal(results, whole)


def test_empty_batch() -> None:
    case = Case("stepwise", "bf16", T=3, B=0, I=2, H=5, L=2, D=2)
    inputs = make_inputs(case)
    results = computed(replace(case, family=""), inputs)
    assert emulated.launches() == 0
    for name, result in results.items():
        wanted = {"y": inputs.gradients[0], "h_n": inputs.h_0, "c_n": inputs.c_0, "d_x": inputs.x}
        wanted |= {"d_h_0": inputs.h_0, "d_c_0": inputs.c_0}
        wanted |= {f"d_weights[{i}]": w for i, w in enumerate(inputs.weights)}
        assert result.shape == wanted[name].shape, name
        assert result.count_nonzero() == 0, name


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("persistent", "fp64", T=2, B=2, I=2, H=16), "float64"),
        (Case("resident", "fp64", T=2, B=2, I=2, H=16), "float64"),
        (Case("persistent", "fp64", T=2, B=2, I=2, H=16, P=4), "float64"),
        (Case("streamed", "bf16", T=2, B=2, I=2, H=16, cell_layers=1), "gradients of cell states"),
        (Case("resident", "bf16", T=2, B=2, I=2, H=16, zoneout=(0, 0.5), zoneout_masks=False), "zoneout"),
        (Case("streamed", "bf16", T=2, B=2, I=2, H=16, layer_norm=True), "layer_norm"),
        (Case("resident", "bf16", T=2, B=2, I=2, H=140), "hidden_size 140"),
        (Case("persistent", "bf16", T=2, B=2, I=2, H=80, device=(2, DEVICES[0][1])), "2 SMs"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.family,
)
def test_forced_family_that_cannot_run(case: Case, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"'{case.family}' .*{reason}"):
        computed(case, make_inputs(case))

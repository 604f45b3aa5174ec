"""swap_lstm, from_torch and to_torch: same Parameter objects, and what is attached to them stays attached."""

import copy
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastlstm import FastLSTM, FastLSTMCell, swap_lstm


class Tagger(nn.Module):
    """Embedding, a stack with dropout, a cell fed by it and a classifier tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(8, 8, 2, dropout=0.3, bidirectional=True, proj_size=4)})
        self.cell = nn.LSTMCell(8, 8)
        self.classifier = nn.Linear(8, 11, bias=False)
        self.classifier.weight = self.embedding.weight

    def forward(self, tokens):
        y, _ = self.encoder["lstm"](self.embedding(tokens))
        h, c = self.cell(y[0])
        for step in y[1:]:
            h, c = self.cell(step, (h, c))
        return self.classifier(h)


def training_losses(model, optimizer, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(11, (6, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), tokens[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_swapped_in_mid_training_the_losses_continue():
    torch.manual_seed(1)
    model = Tagger().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    training_losses(model, optimizer, seed=2, steps=5)
    unswapped = copy.deepcopy(model)
    other = torch.optim.Adam(unswapped.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    assert swap_lstm(model) is model
    assert type(model.encoder["lstm"]) is FastLSTM
    assert type(model.cell) is FastLSTMCell
    losses = training_losses(model, optimizer, seed=3, steps=10)
    assert losses == pytest.approx(training_losses(unswapped, other, seed=3, steps=10), rel=1e-9)
    assert len(set(losses)) == 10
    assert model.classifier.weight is model.embedding.weight


def test_swap_keeps_parameters_flags_and_state_dict():
    model = Tagger()
    model.cell.eval()
    model.cell.weight_hh.requires_grad_(False)
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    swap_lstm(model)
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not model.cell.training
    assert model.encoder["lstm"].training
    assert not model.cell.weight_hh.requires_grad
    Tagger().load_state_dict(model.state_dict(), strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    # A second time there is nothing left to do.
    swap_lstm(model)
    assert type(model.cell) is FastLSTMCell


def test_swap_of_the_model_itself_and_of_shared_modules():
    alone = nn.LSTM(3, 4)
    assert swap_lstm(alone) is alone
    assert type(alone) is FastLSTM

    shared = nn.LSTM(4, 4)
    model = nn.ModuleList([shared, nn.Sequential(shared), nn.LSTM(4, 4)])
    model.elsewhere = [shared]
    swap_lstm(model)
    assert model[0] is model[1][0] is model.elsewhere[0]
    assert [type(m) for m in (model[0], model[2])] == [FastLSTM, FastLSTM]


def test_swapped_module_behaves_as_one_that_was_constructed():
    torchs = nn.LSTM(3, 4, 2, batch_first=True, bias=False)
    swapped = swap_lstm(copy.deepcopy(torchs))
    assert repr(swapped) == repr(torchs).replace("LSTM", "FastLSTM")
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(swapped(x), torchs(x), rtol=0, atol=1e-6)
    assert "_flat_weights" not in vars(swapped)
    duplicate = copy.deepcopy(swapped)
    swapped.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
    assert swapped._flat_weights[0] is swapped.weight_ih_l0
    torch.testing.assert_close(duplicate(x), torchs(x), rtol=0, atol=1e-6)
    discarded = weakref.ref(duplicate.weight_hh_l1)
    duplicate.weight_hh_l1 = nn.Parameter(torch.zeros(16, 4))
    assert discarded() is None


@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 4), lambda: nn.LSTMCell(3, 4)])
def test_swap_keeps_hooks_and_their_handles(make):
    module, seen = make(), []
    handles = [
        module.register_forward_pre_hook(lambda *_: seen.append("forward_pre")),
        module.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True, always_call=True),
        module.register_full_backward_pre_hook(lambda *_: seen.append("backward_pre")),
        module.register_full_backward_hook(lambda *_: seen.append("backward")),
        module.register_state_dict_pre_hook(lambda *_: seen.append("state_dict_pre")),
        module.register_state_dict_post_hook(lambda *_: seen.append("state_dict")),
        module.register_load_state_dict_pre_hook(lambda m, *_: seen.append(f"load_pre {type(m).__name__}")),
        module.register_load_state_dict_post_hook(lambda m, _: seen.append(f"load {type(m).__name__}")),
    ]
    swap_lstm(module)
    x = torch.randn(5, 2, 3, requires_grad=True) if isinstance(module, FastLSTM) else torch.ones(2, 3).requires_grad_()
    module(x)[0].sum().backward()
    module.load_state_dict(module.state_dict())
    name = type(module).__name__
    assert seen == [
        "forward_pre",
        "forward",
        "backward_pre",
        "backward",
        "state_dict_pre",
        "state_dict",
        f"load_pre {name}",
        f"load {name}",
    ]
    for handle in handles:
        handle.remove()
    seen.clear()
    module(x)
    module.load_state_dict(module.state_dict())
    assert seen == []


@pytest.mark.parametrize("names", [["weight_hh_l0"], ["weight_hh_l0", "weight_ih_l1"]])
def test_swap_keeps_parametrizations(names):
    torchs = nn.LSTM(3, 4, 2)
    for name in names:
        parametrizations.weight_norm(torchs, name)
    model = nn.Sequential(copy.deepcopy(torchs))
    originals = list(model.parameters())
    swap_lstm(model)
    module = model[0]
    assert isinstance(module, FastLSTM)
    assert not isinstance(module, nn.LSTM)
    assert all(a is b for a, b in zip(originals, model.parameters(), strict=True))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(module(x), torchs(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        for m in (module, torchs):
            m.parametrizations["weight_hh_l0"].original0.mul_(2)
    torch.testing.assert_close(module(x), torchs(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(module)(x), torchs(x), rtol=0, atol=1e-6)
    module(x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    for name in names:
        parametrize.remove_parametrizations(module, name)
    assert type(module) is FastLSTM
    torch.testing.assert_close(module(x), torchs(x), rtol=0, atol=1e-6)


def test_swap_keeps_weight_norm_hooks_and_pruning():
    torchs = nn.LSTM(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(torchs, "weight_hh_l0")
    prune.l1_unstructured(torchs, "weight_ih_l0", amount=0.5)
    state = torchs.state_dict()
    x = torch.randn(5, 2, 3)
    expected = torchs(x)
    swap_lstm(torchs)
    torch.testing.assert_close(torchs(x), expected, rtol=0, atol=1e-6)
    assert torchs.state_dict().keys() == state.keys()
    with torch.no_grad():
        torchs.weight_hh_l0_g.zero_()
    assert not torch.allclose(torchs(x)[0], expected[0])


def test_subclasses_are_left_untouched_with_a_warning():
    class Residual(nn.LSTM):
        def forward(self, input, hx=None):
            y, states = super().forward(input, hx)
            return input + y, states

    model = nn.ModuleDict({"plain": nn.LSTM(4, 4), "residual": Residual(4, 4)})
    with pytest.warns(UserWarning, match=r"left residual untouched: .*Residual is a subclass of nn\.LSTM"):
        swap_lstm(model)
    assert type(model["residual"]) is Residual
    assert type(model["plain"]) is FastLSTM
    with pytest.warns(UserWarning, match="left the model itself untouched"):
        swap_lstm(Residual(4, 4))
    assert issubclass(Residual, nn.LSTM)


def test_swap_leaves_other_modules_alone():
    model = nn.Sequential(nn.GRU(3, 4), nn.RNN(3, 4), nn.GRUCell(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_lstm(model)
    assert [type(m) for m in model] == [nn.GRU, nn.RNN, nn.GRUCell]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {
            "num_layers": 2,
            "bias": False,
            "batch_first": True,
            "dropout": 0.5,
            "bidirectional": True,
            "proj_size": 2,
        },
    ],
)
def test_from_torch_and_to_torch_share_the_parameters(kwargs):
    torchs = nn.LSTM(3, 4, **kwargs).eval()
    torchs.weight_ih_l0.requires_grad_(False)
    state = torch.get_rng_state()
    ours = FastLSTM.from_torch(torchs)
    back = ours.to_torch()
    assert torch.equal(torch.get_rng_state(), state)
    assert (type(ours), type(back)) == (FastLSTM, nn.LSTM)
    for a, b, c in zip(torchs.parameters(), ours.parameters(), back.parameters(), strict=True):
        assert a is b is c
    assert list(ours.state_dict()) == list(torchs.state_dict()) == list(back.state_dict())
    assert all(a is b for a, b in zip(back._flat_weights, torchs.parameters(), strict=True))
    assert not ours.training
    assert not back.training
    assert repr(back) == repr(torchs)
    x = torch.randn(5, 5, 3)
    expected = torchs(x)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(back(x), expected)


def test_from_torch_repeats_no_warning_and_keeps_a_changed_dropout():
    torchs = nn.LSTM(3, 4, 2)
    torchs.dropout = 0.5
    assert FastLSTM.from_torch(torchs).dropout == 0.5
    with pytest.warns(UserWarning, match="dropout option"):
        single = nn.LSTM(3, 4, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FastLSTM.from_torch(single).to_torch().dropout == 0.5


def test_from_torch_leaves_hooks_behind():
    torchs, seen = nn.LSTM(3, 4), []
    torchs.register_forward_hook(lambda *_: seen.append(1))
    FastLSTM.from_torch(torchs)(torch.randn(5, 2, 3))
    assert seen == []


@pytest.mark.parametrize("bias", [True, False])
def test_cell_from_torch_and_to_torch(bias):
    torchs = nn.LSTMCell(3, 4, bias=bias, dtype=torch.float64)
    ours = FastLSTMCell.from_torch(torchs)
    back = ours.to_torch()
    assert (type(ours), type(back)) == (FastLSTMCell, nn.LSTMCell)
    for a, b, c in zip(torchs.parameters(), ours.parameters(), back.parameters(), strict=True):
        assert a is b is c
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(back(x), torchs(x))


def test_from_torch_of_a_subclass_of_fastlstm_makes_that_subclass():
    class Mine(FastLSTM):
        pass

    assert type(Mine.from_torch(nn.LSTM(3, 4))) is Mine

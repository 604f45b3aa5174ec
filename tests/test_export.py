"""Models with FastLSTM leave Python: torch.export, AOTInductor and ONNX, each run on other sizes than exported with."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastlstm
from fastlstm import FastLSTM, FastLSTMCell, swap_lstm

I, H = 5, 8  # noqa: E741
DYNAMIC = torch.export.Dim.DYNAMIC
STACKS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False},
]

# Of torch's own use of its trees.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Model(nn.Module):
    def __init__(self, **stack: Any) -> None:
        super().__init__()
        self.lstm = FastLSTM(I, H, **stack)
        self.head = nn.Linear((2 if self.lstm.bidirectional else 1) * (self.lstm.proj_size or H), 3)

    def forward(
        self,
        x: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, (h_n, c_n) = self.lstm(x, hx, lengths=lengths, reset_mask=reset_mask)
        return self.head(y).tanh(), h_n, c_n


def all_inputs(lstm: FastLSTM, steps: int, batch: int) -> tuple[Any, ...]:
    """Arguments of Model.forward, all of them, with a sequence of no steps."""
    lead = (batch, steps) if lstm.batch_first else (steps, batch)
    states = lstm.num_layers * (2 if lstm.bidirectional else 1)
    lengths = torch.randint(0, steps + 1, (batch,))
    lengths[0] = 0
    hx = (torch.randn(states, batch, lstm.proj_size or H), torch.randn(states, batch, H))
    return torch.randn(*lead, I), hx, lengths, torch.rand(lead) < 0.2


DYNAMIC_SHAPES = ({0: DYNAMIC, 1: DYNAMIC}, ({1: DYNAMIC}, {1: DYNAMIC}), {0: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC})


def operators(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if "fastlstm" in str(node.target)]


@pytest.mark.parametrize("given", [1, 4], ids=["input alone", "everything"])
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_exported_program(stack: dict[str, Any], given: int, tmp_path: Path) -> None:
    model = Model(**stack).eval()
    exported = torch.export.export(
        model, all_inputs(model.lstm, 7, 4)[:given], dynamic_shapes=(DYNAMIC_SHAPES + (None,) * 4)[:given]
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    decomposed = loaded.run_decompositions()
    for program in (exported, loaded, decomposed):
        assert len(operators(program)) == 1
        for steps, batch in ((12, 3), (2, 9)):
            inputs = all_inputs(model.lstm, steps, batch)[:given]
            torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def test_exported_program_trains() -> None:
    model = Model(num_layers=2)
    exported = torch.export.export(model, all_inputs(model.lstm, 7, 4), dynamic_shapes=DYNAMIC_SHAPES).module()
    inputs = all_inputs(model.lstm, 9, 3)
    gradients = []
    for module in (exported, model):
        y, h_n, c_n = module(*inputs)
        (y.square().sum() + h_n.sum() + c_n.sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
        module.zero_grad()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gradients", [True, False])
def test_exported_program_saves_for_backward_only_if_exported_with_gradients(gradients: bool) -> None:
    model = Model()
    with torch.set_grad_enabled(gradients):
        (call,) = operators(torch.export.export(model, all_inputs(model.lstm, 7, 4)))
    names = [argument.name for argument in call.target._schema.arguments]  # type: ignore[union-attr]
    assert call.args[names.index("save")] == gradients


def test_aot_inductor(tmp_path: Path) -> None:
    model = Model(**STACKS[2]).eval()
    with torch.no_grad():
        exported = torch.export.export(model, all_inputs(model.lstm, 7, 4), dynamic_shapes=DYNAMIC_SHAPES)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for steps, batch in ((7, 4), (30, 2), (1, 1)):
            inputs = all_inputs(model.lstm, steps, batch)
            torch.testing.assert_close(compiled(*inputs), model(*inputs))


class Configurations(nn.Module):
    """Every kind of stack that ONNX has a form for, called with everything and with the input alone."""

    CALLS = ("everything", "the input alone")

    def __init__(self) -> None:
        super().__init__()
        options = [(1, 2), (True, False), (False, True), (False, True)]
        self.stacks = nn.ModuleList(
            FastLSTM(I, H, layers, bias, batch_first, bidirectional=bidirectional)
            for layers, bias, batch_first, bidirectional in itertools.product(*options)
        )

    def forward(self, x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Tensor) -> list[Tensor]:
        results = []
        for lstm in self.stacks:
            states = lstm.num_layers * (2 if lstm.bidirectional else 1)
            for call in self.CALLS:
                y, (h_n, c_n) = lstm(
                    x.transpose(0, 1) if lstm.batch_first else x,
                    (h_0[:states], c_0[:states]) if call == "everything" else None,
                    lengths=lengths if call == "everything" else None,
                )
                results += [y, h_n, c_n]
        return results

    def names(self) -> list[str]:
        """What each of the results is."""
        return [
            f"{tensor} of {lstm} called with {call}"
            for lstm in self.stacks
            for call in self.CALLS
            for tensor in ("y", "h_n", "c_n")
        ]


def to_onnx(model: nn.Module, inputs: tuple[Any, ...], path: Path, **options: Any) -> torch.onnx.ONNXProgram:
    pytest.importorskip("onnxscript")
    return fastlstm.onnx.export(model.eval(), inputs, path, verbose=False, **options)


def run_onnx(path: Path, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The results of ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return [
        torch.from_numpy(array)
        for array in session.run(None, {n: t.numpy() for n, t in zip(names, leaves, strict=True)})
    ]


def assert_same(path: Path, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*inputs))
    torch.testing.assert_close(run_onnx(path, inputs), expected, rtol=0, atol=1e-5)


def test_onnx_configurations(tmp_path: Path) -> None:
    model, path = Configurations(), tmp_path / "model.onnx"

    def inputs(steps: int, batch: int) -> tuple[Tensor, ...]:
        x, h_0, c_0 = torch.randn(steps, batch, I), torch.randn(4, batch, H), torch.randn(4, batch, H)
        lengths = torch.randint(0, steps + 1, (batch,))
        lengths[:2] = torch.tensor([0, steps])
        return x, h_0, c_0, lengths

    batched = {1: DYNAMIC}
    to_onnx(model, inputs(7, 4), path, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC}, batched, batched, {0: DYNAMIC}))
    for steps, batch in ((13, 3), (2, 6)):
        given = inputs(steps, batch)
        with torch.no_grad():
            expected = model(*given)
        for name, actual, right in zip(model.names(), run_onnx(path, given), expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_onnx_file_is_one_node_per_layer_and_plain_weights(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    features = 300  # more elements than the optimizer of onnxscript folds
    model, path = FastLSTM(features, features, num_layers=2), tmp_path / "model.onnx"
    sizes = ({0: "steps", 1: "batch"},)
    to_onnx(model, (torch.randn(7, 4, features),), path, dynamic_shapes=sizes, external_data=False)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    graph = onnx.load(path).graph
    onnx.checker.check_model(path, full_check=True)
    assert Counter(node.op_type for node in graph.node) == {"LSTM": 2, "Squeeze": 2, "Concat": 2}
    assert {node.domain for node in graph.node} == {""}
    assert [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [
        "steps",
        "batch",
        300,
    ]
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "LSTM":
            weights = [shapes.pop(name) for name in node.input[1:]]  # and no states, which begin at zero
            assert weights == [[1, 4 * features, features], [1, 4 * features, features], [1, 8 * features]]
    assert sum(map(math.prod, shapes.values())) < 10  # the weights as they were are gone
    assert_same(path, model, (torch.randn(3, 2, features),))


def test_onnx_of_weights_that_the_model_computes(tmp_path: Path) -> None:
    model, path = parametrizations.weight_norm(FastLSTM(I, H), "weight_hh_l0"), tmp_path / "model.onnx"
    to_onnx(model, (torch.randn(7, 4, I),), path)
    assert_same(path, model, (torch.randn(7, 4, I),))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.biased, self.plain = FastLSTMCell(I, H), FastLSTMCell(I, H, bias=False)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Any, ...]:
        states = self.biased(x, (h, c))
        return states, self.plain(x, states), self.plain(x), self.biased(x[0], (h[0], c[0]))


def test_onnx_of_cells(tmp_path: Path) -> None:
    model, path = Cells(), tmp_path / "model.onnx"
    to_onnx(model, (torch.randn(4, I), torch.randn(4, H), torch.randn(4, H)), path, dynamic_shapes=({0: DYNAMIC},) * 3)
    assert_same(path, model, (torch.randn(9, I), torch.randn(9, H), torch.randn(9, H)))


def test_onnx_translation_table_serves_torchs_own_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, path = swap_lstm(nn.LSTM(I, H, 2, bidirectional=True)).eval(), tmp_path / "model.onnx"
    exported = torch.export.export(model, (torch.randn(7, 4, I),), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    table = fastlstm.onnx.translation_table()
    torch.onnx.export(exported, (), path, dynamo=True, verbose=False, custom_translation_table=table)
    assert_same(path, model, (torch.randn(3, 2, I),))


def test_onnx_with_translations_of_other_operators(tmp_path: Path) -> None:
    from_script = pytest.importorskip("onnxscript").opset18
    path = tmp_path / "model.onnx"
    to_onnx(
        Model(), (torch.zeros(7, 4, I),), path, custom_translation_table={torch.ops.aten.tanh.default: from_script.Abs}
    )
    assert (run_onnx(path, (torch.randn(7, 4, I),))[0] >= 0).all()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = FastLSTM(I, H)

    def forward(self, rows: Tensor, batch_sizes: Tensor, h_0: Tensor, c_0: Tensor) -> Tensor:
        return fastlstm.lstm(rows, list(self.lstm.parameters()), (h_0, c_0), batch_sizes=batch_sizes)[0]


X, STATE = torch.zeros(7, 4, I), torch.zeros(1, 4, H)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (lambda: Model(proj_size=3).eval(), (X,), "has no projections, got proj_size = 3"),
        (lambda: Model().eval(), (X, None, None, torch.zeros(7, 4, dtype=torch.bool)), "has no reset_mask"),
        (lambda: Model(num_layers=2, dropout=0.5).train(), (X,), "has no dropout_mask; call model.eval"),
        (lambda: Packed().eval(), (torch.zeros(8, I), torch.tensor([4, 4]), STATE, STATE), "has no batch_sizes"),
        (lambda: Model().eval().bfloat16(), (X.bfloat16(),), "has no bfloat16"),
    ],
    ids=["projection", "reset_mask", "dropout", "packed", "bfloat16"],
)
@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning")
def test_onnx_says_what_it_has_no_form_for(model: Any, inputs: tuple[Any, ...], message: str) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(NotImplementedError, match=message):
        fastlstm.onnx.export(model(), inputs, verbose=False)


def test_onnx_refuses_arguments_of_the_operator_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    known = fastlstm.onnx._TRANSLATED
    monkeypatch.setattr(fastlstm.onnx, "_TRANSLATED", known - {"lengths"})
    model = Model().eval()
    fastlstm.onnx.export(model, (X,), verbose=False)
    with pytest.raises(NotImplementedError, match="has no lengths; export the model without it"):
        fastlstm.onnx.export(model, (X, None, torch.tensor([7, 1, 2, 3])), verbose=False)


def test_onnx_reports_other_errors_as_torch_does() -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        fastlstm.onnx.export(Model().eval(), (torch.zeros(7, 4, I + 1),), verbose=False)
    assert "input.size(-1) must be equal to input_size" in str(error.value.__cause__)
    with pytest.raises(ValueError, match="dynamo must be True"):
        fastlstm.onnx.export(Model().eval(), (X,), dynamo=False)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_names_a_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"fastlstm\[onnx\], and {package} is missing"):
        fastlstm.onnx.export(Model().eval(), (X,))


def test_to_torch_is_for_torchscript() -> None:
    class Output(nn.Module):
        def __init__(self, lstm: nn.LSTM) -> None:
            super().__init__()
            self.lstm = lstm

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    ours = FastLSTM(I, H, num_layers=2, bidirectional=True)
    scripted, x = torch.jit.script(Output(ours.to_torch())), torch.randn(3, 2, I)
    torch.testing.assert_close(scripted(x), ours(x)[0])

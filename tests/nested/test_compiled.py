"""Compiled layers train as plain PyTorch does, with the same few graphs for every sub-network; stage 3 is refused."""

import copy
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from sorted_ds.base.errors import UserError
from sorted_ds.commands.cli import main
from sorted_ds.engine import Engine
from sorted_ds.engine.modes import check_modes
from sorted_ds.families import nest
from sorted_ds.nested import NestedModel, compiled
from sorted_ds.nested.blocks import NestedModule
from sorted_ds.nested.layers import join_active
from sorted_ds.run.run_file import load_run
from sorted_ds.space import SubNetSpace
from tests import exactness, families
from tests.batches import TASK
from tests.exactness import SPACE, Case
from tests.parity import logits_and_backward
from tests.runs import run_file
from tests.spawn import on_ranks

NUM_STEPS = len(exactness.SCHEDULE)
GRAPHS = 4
"""How many graphs one kind of layer needs: one head or several x training and evaluation."""

FP32 = [
    *(Case(stage, compile=True) for stage in (0, 1, 2)),
    Case(0, compile=True, checkpointing=True, tied=True, clip_norm=0.0),
    Case(1, compile=True, checkpointing=True, offload=True),
    Case(2, compile=True, checkpointing=True, overlap=True),
    Case(2, compile=True, offload=True),
]
BF16 = [
    Case(0, "bf16", "sgd", compile=True),
    Case(1, "bf16", "sgd", compile=True, offload=True),
    Case(2, "bf16", "sgd", compile=True, checkpointing=True),
    Case(1, "bf16", compile=True),
]
STATIC = [replace(case, static=True, compile=False) for case in BF16]
EAGER = [replace(case, compile=False) for case in FP32]

# As in tests/engine/test_exact.py: AdamW divides by the root of a second moment that can be near zero, so rounding
# to 1e-7 becomes up to 1e-5; a layer that took the weights of another one, or lost a gradient, is over 1e-3 away.
TOLERANCE = 5e-5


def schedule_of(case: Case) -> tuple:
    """The sampled sub-networks of each step. In bf16 all have two heads or more: one graph less, 5 s and more each."""
    fewest = 2 if case.precision == "bf16" else 1
    wider = {s: s.replace(g=max(s["g"], fewest)) for s in SPACE}
    return tuple(tuple(wider[subnet] for subnet in sampled) for sampled in exactness.SCHEDULE)


class Counting:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self, name: str):
        self.compile, self.num_graphs = lookup_backend(name), 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return self.compile(graph, inputs)


def train_all(ranks, cases: list[Case]) -> dict[str, dict]:
    """What each case made, and the number of graphs compiled so far: engines of the same precision share them.

    Without a warm-up, which compiles graphs for evaluation too.
    """
    backend, found = Counting("inductor"), {}
    compile_layers = partial(compiled.compile_layers, backend=backend)
    with mock.patch.object(compiled, "compile_layers", compile_layers), mock.patch.object(Engine, "warm_up"):
        for case in cases:
            with mock.patch.object(exactness, "SCHEDULE", schedule_of(case)):
                seen = exactness.run_engine(ranks, case, NUM_STEPS)
            found[case.name] = copy.deepcopy({**seen, "graphs": backend.num_graphs})
    return found


def graphs_of_the_warm_up(ranks, case: Case) -> tuple[int, int]:
    """The number of graphs after the warm-up, and after training."""
    backend, at_start = Counting("eager"), []
    compile_layers = partial(compiled.compile_layers, backend=backend)

    def warm_up(engine, micro_batch, original=Engine.warm_up):
        original(engine, micro_batch)
        at_start.append(backend.num_graphs)

    with mock.patch.object(compiled, "compile_layers", compile_layers), mock.patch.object(Engine, "warm_up", warm_up):
        exactness.run_engine(ranks, case, NUM_STEPS)
    return at_start[0], backend.num_graphs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return on_ranks(2, train_all, [*FP32, *EAGER, *BF16, *STATIC], folder=tmp_path_factory.mktemp("two_ranks"))


@cache
def expected(case: Case) -> dict:
    with mock.patch.object(exactness, "SCHEDULE", schedule_of(case)):
        return exactness.reference_weights(case, 2, NUM_STEPS)


def error(trained: dict, case: Case) -> float:
    return exactness.largest_difference(trained[case.name]["weights"], expected(case)["weights"])


def names(case: Case) -> str:
    return case.name


@pytest.mark.long
@pytest.mark.parametrize("case", FP32, ids=names)
def test_weights_and_norms_equal_the_reference(trained, case):
    assert error(trained, case) <= TOLERANCE
    assert trained[case.name]["norms"] == pytest.approx(expected(case)["norms"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("case", "eager"), list(zip(FP32, EAGER, strict=True)), ids=names)
def test_weights_equal_the_eager_engines(trained, case, eager):
    weights = [trained[one.name]["weights"] for one in (case, eager)]
    assert 0 < exactness.largest_difference(*weights) <= TOLERANCE  # not 0, or nothing was compiled


@pytest.mark.long
@pytest.mark.parametrize(("case", "static"), list(zip(BF16, STATIC, strict=True)), ids=names)
def test_bf16_is_as_close_as_a_static_network_that_is_not_compiled(trained, case, static):
    assert error(trained, case) <= 2 * error(trained, static)


@pytest.mark.long
def test_stages_offload_and_checkpointing_share_the_graphs(trained):
    """Graphs of one head and of several in fp32, of several alone in bf16."""
    assert [trained[case.name]["graphs"] for case in FP32 + BF16] == [2] * len(FP32) + [3] * len(BF16)


@pytest.mark.long
def test_the_warm_up_compiles_all_that_the_run_needs(tmp_path):
    case = Case(2, compile=True, checkpointing=True, evaluate_between=True)
    assert on_ranks(1, graphs_of_the_warm_up, case, folder=tmp_path) == (GRAPHS, GRAPHS)


GROUPS = families.SPACE.sizes("g")


def pair(variant: str, backend, groups=GROUPS, layer_order=None, **changes) -> list[NestedModel]:
    """The same model eager and compiled."""
    attention = "eager" if variant == "gemma2" else "sdpa"
    models = [families.tiny_model(variant, attention, **changes) for _ in range(2)]
    depths, ffn = [1, 2, models[0].config.num_hidden_layers], families.SPACE.sizes("f")
    space = SubNetSpace.grid(depths=depths, groups=groups, ffn=ffn, layer_order=layer_order)
    eager, other = (nest(model, space) for model in models)
    compiled.compile_layers(other, backend)
    return [eager, other]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("variant", "depth", "groups", "order", "graphs"),
    [
        ("llama", 8, (1, 3, 4), None, 2),
        ("gemma2", 4, (1, 3, 4), None, 2),
        pytest.param("qwen2, biases, sliding", 4, (2, 3, 4), None, 2, marks=pytest.mark.long),
        pytest.param("llama", 4, (1, 3, 4), (3, 1, 0, 2), 2, marks=pytest.mark.long),
        ("qwen2, biases, sliding", 4, (2, 3, 4), (3, 1, 0, 2), 2),
    ],
)
def test_graphs_do_not_grow_with_sub_networks_or_layers_and_give_what_eager_gives(
    variant, depth, groups, order, graphs
):
    """Two graphs: one head or several; in qwen2, sliding layers, which have a mask, and full ones, which have none."""
    backend = Counting("eager")
    models = pair(variant, backend, groups, order, num_hidden_layers=depth)
    ids = families.tokens()
    for subnet in reversed(list(models[0].space)):
        for model in models:
            model.set_subnet(subnet)
        assert torch.equal(*(logits_and_backward(model, ids) for model in models))
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
    assert backend.num_graphs == graphs
    assert len(models[0].space) == 27
    with torch.no_grad():
        for subnet in models[0].space:
            for model in models:
                model.eval().set_subnet(subnet)
            assert torch.equal(*(model(input_ids=ids, use_cache=False).logits for model in models))
    assert backend.num_graphs == 2 * graphs


def test_compiled_layers_use_the_blocks_own_memory_at_any_offset():
    model = pair("llama, biases", "eager")[1]
    layers = [module for module in model.modules() if isinstance(module, NestedModule)]
    for layer in (layers[0], layers[-1]):
        layer.width.select(layer.width.sizes[1])
        for name, whole in join_active([layer], compiled._standalone_matrix)[0].items():
            assert whole.data_ptr() == layer.active_blocks(name)[0].data_ptr()
            assert torch.equal(whole, torch.cat(layer.active_blocks(name)))
            assert (whole.storage_offset(), whole._is_view()) == (0, False)


def test_a_deep_copy_whose_blocks_are_no_neighbours_is_right():
    eager, other = (copy.deepcopy(model) for model in pair("olmo2", "eager", groups=(2, 3, 4)))
    for name in ("d4-g4-f112", "d2-g3-f80", "d1-g2-f32"):
        eager.set_subnet(name)
        other.set_subnet(name)
        logits = [logits_and_backward(model, families.tokens()) for model in (eager, other)]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)  # one matrix against block by block
        for one, two in zip(eager.parameters(), other.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            assert one.grad is None or torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-4)


def test_a_layer_that_breaks_into_several_graphs_is_an_error():
    class Breaking(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    model = pair("llama", "eager")[1]
    model.model.layers[0].mlp.act_fn = Breaking()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        logits_and_backward(model, families.tokens())


def test_a_layer_that_is_compiled_again_and_again_is_an_error():
    model = pair("llama", "eager")[1]
    logits_and_backward(model, families.tokens())
    model.set_subnet("d2-g1-f80")
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        logits_and_backward(model, families.tokens())


def test_stage_3_is_refused_and_the_others_are_not():
    with pytest.raises(UserError) as refused:
        check_modes(Case(3).deepspeed(), "ds_configs/zero3.json", compile_layers=True)
    assert str(refused.value) == (
        "engine.compile = true, but ds_configs/zero3.json sets zero_optimization.stage = 3, where a layer is compiled "
        "in pieces between the gathers of its weights. Set engine.compile to false, or the stage to 0, 1 or 2."
    )
    for stage in (0, 1, 2):
        check_modes(Case(stage).deepspeed(), "zero.json", compile_layers=True)
    with pytest.raises(UserError, match=r"engine\.compile"):
        Engine(mock.Mock(), TASK, Case(3).deepspeed(), "zero3.json", Case(3).optim, 2, mock.Mock(), compile_layers=True)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_plan_and_train_refuse_it_before_a_rank_starts(tmp_path, command, capsys):
    path = run_file(tmp_path, engine={"zero_optimization": {"stage": 3}})
    with mock.patch("sorted_ds.commands.train.launch") as launch:
        assert main([command, str(path), "engine.compile=true"]) == 2
    assert "Set engine.compile to false" in capsys.readouterr().err
    launch.assert_not_called()


def test_the_run_file_says_whether_layers_are_compiled(tmp_path):
    path = run_file(tmp_path)
    assert load_run(path, []).engine.compile is False
    assert load_run(path, ["engine.compile=true"]).engine.compile is True

"""Under ZeRO-3 a sub-network gathers and reduces its own parameters alone, in the order that it would record itself."""

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import product

import deepspeed
import pytest
import torch

from sorted_ds.engine import Engine
from sorted_ds.engine.modes import complete_config
from sorted_ds.engine.traces import PRIVATE
from sorted_ds.families import nest
from sorted_ds.nested import extract
from sorted_ds.nested.bundles import Bundle, BundledHalf
from sorted_ds.space import Pass
from tests.batches import TASK, batch, blank, summed
from tests.exactness import DEEP, LARGE, MIDDLE, ORDERED_SPACE, ROW_TOKENS, SMALL, SPACE, VOCAB, WIDE, Case, plain_model
from tests.spawn import on_ranks
from tests.traffic import counted

CASES = [
    Case(3),
    Case(3, prefetch=7_000),
    Case(3, prefetch=100_000, overlap=True),
    Case(3, prefetch=2_000, checkpointing=True),
    Case(3, prefetch=2_000, tied=True),
    Case(3, prefetch=2_000, roomy=True),
    Case(3, prefetch=7_000, ordered=True),
]
DISTANCES = (0, 20_000, 10**9)
"""Elements within which a parameter that is used again is kept."""
VISITS = (SMALL, MIDDLE, LARGE, DEEP, WIDE, SMALL, LARGE, MIDDLE, DEEP)


def engine_of(ranks, case: Case) -> Engine:
    model = plain_model(case)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    space = ORDERED_SPACE if case.ordered else SPACE
    engine = Engine(nest(model, space), TASK, case.deepspeed(), "test.json", case.optim, 2, ranks)
    engine.warm_up(blank(2, ROW_TOKENS))
    return engine


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, ROW_TOKENS), generator=torch.Generator().manual_seed(3))


def one_pass(engine: Engine, subnet, training: bool) -> None:
    if training:
        engine.backward(engine.forward(batch(ids(), ids()), Pass(subnet)).loss)
    else:
        engine.evaluate(batch(ids(), ids()), subnet)


def traffic(ranks, cases: list[Case]) -> dict:
    """For each case and visit: calls and bytes gathered and bytes reduced in training, bytes gathered in evaluation."""
    found = {}
    for case in cases:
        engine = engine_of(ranks, case)
        rows = []
        for subnet in VISITS:
            with counted() as trained:
                one_pass(engine, subnet, training=True)
            with counted() as evaluated:
                one_pass(engine, subnet, training=False)
            rows.append((trained.calls["gather"], trained.gathered, trained.reduced, evaluated.gathered))
        one_pass(engine, SMALL, training=False)
        found[case.name] = rows, engine._traces.num_invalidated
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return on_ranks(2, traffic, CASES, folder=tmp_path_factory.mktemp("traffic"))


def static_bytes(ranks, cases: list[Case]) -> dict[tuple, tuple[int, int]]:
    """What plain DeepSpeed gathers for the extracted model of each size, once it knows its order; and a layer half."""
    found = {}
    for case in cases:
        for subnet in set(VISITS):
            model = extract(nest(plain_model(case), SPACE), subnet)
            layer = model.model.layers[0]
            half = max(sum(p.nbytes for p in part.parameters()) for part in (layer.self_attn, layer.mlp))
            if case.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            loss = summed(model)
            engine, *_ = deepspeed.initialize(
                model=loss,
                optimizer=torch.optim.SGD(loss.parameters(), lr=0.0),
                config=copy.deepcopy(complete_config(case.deepspeed(), 2, ranks.size, 0.0)),
                dist_init_required=False,
            )
            for _ in range(3):
                with counted() as passes:
                    engine.backward(engine(**batch(ids(), ids())))
                engine.step()
            found[case.name, subnet] = passes.gathered, half
    return found


@pytest.mark.parametrize(
    "cases", [CASES[1:4], pytest.param([CASES[0], *CASES[4:]], marks=pytest.mark.long)], ids=["core", "others"]
)
def test_a_sub_network_gathers_from_the_first_visit_on_what_a_static_network_of_its_size_does(
    measured, tmp_path, cases
):
    """But for a layer half where memory is so tight that hardly more than one fits: whole halves come and go here."""
    static = on_ranks(2, static_bytes, cases, folder=tmp_path)
    for case in cases:
        for subnet, row in zip(VISITS, measured[case.name][0], strict=True):
            gathered, half = static[case.name, subnet]
            slack = half if case.prefetch and not case.roomy else 0
            assert row[1] <= gathered + slack, (case.name, subnet)


def active(case: Case) -> Iterator[int]:
    """Bytes of the plain model of each visit's size, counted on the extracted model."""
    model = nest(plain_model(case), SPACE)
    return (sum(p.nbytes for p in extract(model, subnet).parameters()) for subnet in VISITS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sub_network_reduces_exactly_its_own_gradients(measured, case):
    assert [row[2] for row in measured[case.name][0]] == list(active(case))


@pytest.mark.parametrize("case", [case for case in CASES if not case.tied], ids=lambda case: case.name)
def test_evaluation_gathers_exactly_the_active_parameters_once(measured, case):
    assert [row[3] for row in measured[case.name][0]] == list(active(case))


def test_tied_embeddings_are_gathered_at_most_once_more_for_the_head(measured):
    (tied,) = (case for case in CASES if case.tied)
    for row, num_bytes in zip(measured[tied.name][0], active(tied), strict=True):
        assert num_bytes <= row[3] <= num_bytes + 4 * VOCAB * 32


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_gathers_the_active_parameters_at_most_for_forward_and_backward(measured, case):
    for row, num_bytes in zip(measured[case.name][0], active(case), strict=True):
        assert num_bytes <= row[1] <= (3 if case.checkpointing else 2) * num_bytes


def test_prefetch_gathers_in_fewer_calls_from_the_first_visit_on(measured):
    """Prefetch of about a layer, and of all that may be live."""
    alone, ahead, all_ahead = (measured[case.name][0] for case in CASES[:3])
    for without, some, most in zip(alone, ahead, all_ahead, strict=True):
        assert some[0] <= 0.7 * without[0]
        assert most[0] <= some[0]
    assert all_ahead[0][0] == 1, "the smallest is gathered in one call"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_pass_departs_from_its_trace(measured, case):
    assert measured[case.name][1] == 0


def orders(ranks, cases: list[Case]) -> dict:
    """For each case, sub-network and mode: the derived and the recorded trace, modules and parameters by number."""
    found = {}
    for case in cases:
        engine = engine_of(ranks, case)
        for subnet in (SMALL, MIDDLE, DEEP, WIDE, LARGE):
            for training in (True, False):
                one_pass(engine, subnet, training)
                derived = trace_of(engine)
                recorded = recorded_trace(engine, subnet, training)
                found[case.name, subnet.name, training] = derived, recorded
    return found


def trace_of(engine: Engine) -> tuple[list[int], list[tuple[int, int]]]:
    traces = engine._traces
    parameters = [(p.param.ds_id, p.step_id_last_used_at) for p in traces._get("param_order")]
    return [module.ds_id for module in traces._get("submodule_order")], parameters


def recorded_trace(engine: Engine, subnet, training: bool):
    """What DeepSpeed records by itself, when no trace is set."""
    traces = engine._traces
    before = dict(traces._recorded), traces._derived.copy()
    traces._recorded = {}
    traces._derived.clear()
    traces._running = None
    one_pass(engine, subnet, training)
    assert not traces._derived, "this pass ran by a derived trace"
    traces._coordinator.reset_step()
    assert traces._coordinator.is_complete_trace()
    recorded = trace_of(engine)
    traces._running = None
    traces._recorded, kept = before
    traces._derived.update(kept)
    return recorded


def test_a_derived_trace_is_the_one_that_would_be_recorded(tmp_path):
    found = on_ranks(2, orders, [CASES[1], CASES[3], CASES[4], CASES[6]], folder=tmp_path)
    assert len(found) == 4 * 5 * 2
    for key, (derived, recorded) in found.items():
        assert derived == recorded, key
        assert len(derived[0]) > 10


def decisions(ranks, cases: list[Case]) -> list[tuple]:
    """What is released after each module of a pass, and what DeepSpeed's own function says at the same time."""
    found = []
    for case, distance in product(cases, DISTANCES):
        engine = engine_of(ranks, case)
        traces = engine._traces
        traces._set("max_reuse_dist_in_numel", distance)
        own = next(
            cell.cell_contents.__wrapped__
            for cell in getattr(type(traces._coordinator), f"{PRIVATE}params_to_release").__closure__
            if hasattr(cell.cell_contents, "cache_clear")
        )

        seen: set[Pass] = set()

        def compared(module, position, traces=traces, own=own, where=(case.name, distance), seen=seen):
            released = traces._params_to_release(module, position)
            if traces._running not in seen:
                found.append((where, traces._running, released.copy(), own(traces._coordinator, module, position)))
            return released

        traces._set("params_to_release", compared)
        for subnet in VISITS:
            for training in (True, False):
                one_pass(engine, subnet, training)
                seen.add(Pass(subnet, "train" if training else "evaluate"))
    return found


def test_what_is_released_is_what_deepspeed_would_release(tmp_path):
    cases = [CASES[2], CASES[3], CASES[4]]
    found = on_ranks(2, decisions, cases, folder=tmp_path)
    for where, run, released, expected in found:
        assert released == expected, (where, run)
    num_released = Counter()
    for (name, distance), _, released, _ in found:
        num_released[name, distance] += len(released)
    for case in cases:
        least, middle, most = (num_released[case.name, distance] for distance in reversed(DISTANCES))
        assert 0 < least < middle < most, "each distance decides otherwise"


def held(ranks, case: Case) -> tuple[int, int]:
    return held_by(engine_of(ranks, case))


def whole_weights(engine: Engine) -> set[tuple[int, int]]:
    """Shapes that a saved copy of one would have, either way up."""
    halves = [module for module in engine.model.modules() if isinstance(module, BundledHalf)]
    shapes = {(layer.bounds[-1][1], half.bundles[0].hidden) for half in halves for layer in half.linears}
    return shapes | {shape[::-1] for shape in shapes}


def bundles(engine: Engine) -> list[Bundle]:
    return [module for module in engine.model.modules() if isinstance(module, Bundle)]


def held_by(engine: Engine) -> tuple[int, int]:
    """Tensors saved for backward; and those that keep a weight, and memory that outlives the release of its bundle.

    A parameter itself keeps nothing; views of it and copies do.
    """
    parameters = list(engine.model.parameters())
    saved, kept = 0, 0
    weights = whole_weights(engine)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved, kept
        saved += 1
        kept += tuple(tensor.shape) in weights and not tensor.requires_grad
        storages = {p.untyped_storage().data_ptr() for p in parameters if p.numel()}
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            kept += not (tensor.is_leaf and tensor.requires_grad)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine.forward(batch(ids(), ids()), Pass(LARGE)).loss
    gone = [own._memory for own in bundles(engine) if not own.weight.numel()]
    assert len(gone) > 10
    kept += sum(not memory.expired() for memory in gone)
    engine.backward(loss)
    return saved, kept


def test_saved_tensors_hold_no_gathered_weight(tmp_path):
    saved, kept = on_ranks(2, held, Case(3), folder=tmp_path)
    assert saved > 60
    assert kept == 0


def interrupted(ranks, case: Case) -> list[str]:
    """What is said of all that may not come between a forward pass and its backward pass, and may after it."""
    engine, said = engine_of(ranks, case), []
    others = (
        lambda: engine.evaluate(batch(ids(), ids()), LARGE),
        lambda: engine.backward(engine.forward(batch(ids(), ids()), Pass(LARGE)).loss),
        lambda: engine.step(0.1),
        lambda: list(engine.weights()),
        engine.publish,
    )
    loss = engine.forward(batch(ids(), ids()), Pass(SMALL)).loss
    for other in others:
        try:
            other()
        except RuntimeError as error:
            said.append(str(error))
    engine.backward(loss)
    for other in others:
        other()
    return said


@pytest.mark.parametrize("stage", [1, 3])
def test_nothing_comes_between_a_forward_pass_and_its_backward_pass(tmp_path, stage):
    said = on_ranks(1, interrupted, Case(stage), folder=tmp_path)
    assert said == [f"a forward pass of {SMALL} waits for its backward pass; call it first"] * 5

"""Under ZeRO-3 the blocks of a layer come as one matrix, and stay or go as those of an extracted model do."""

import re
from collections import defaultdict

import pytest
import torch

from sorted_ds.engine import Engine
from sorted_ds.nested import layers, nest
from sorted_ds.nested.bundles import bundles_in
from sorted_ds.space import SubNetSpace
from tests.exactness import LARGE, ROW_TOKENS, SMALL, Case, gather_masters, largest_difference, plain_model
from tests.spawn import on_ranks
from tests.test_engine_traces import ids, one_pass
from tests.traffic import counted

SPACE = SubNetSpace.grid(depths=[1, 3], groups=[1, 2, 4], ffn=[8, 16, 24, 32, 64])
THRESHOLD = 800
"""Elements. The smallest bundles have 768, and end prefixes of weights that are larger."""


def gathering(ranks, threshold: int) -> dict:
    case = Case(3, prefetch=100_000)
    config = case.deepspeed()
    config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    config["zero_optimization"]["stage3_max_live_parameters"] = 100_000  # a layer is never cut for want of room
    engine = Engine(nest(plain_model(case), SPACE), config, "test.json", case.optim, 2, ranks)
    engine.warm_up(2, ROW_TOKENS)
    seen = []
    are_adjacent = layers.are_adjacent

    def watched(blocks) -> bool:
        seen.append((len(blocks), are_adjacent(blocks)))
        return seen[-1][1]

    layers.are_adjacent = watched
    for subnet in (LARGE, SMALL, LARGE):
        one_pass(engine, subnet, training=True)
    with counted() as stepped:
        engine.step(0.0)
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    persistent = engine.deepspeed.optimizer.persistent_parameters
    return {
        "seen": seen,
        "calls": stepped.calls["gather"],
        "bytes": stepped.gathered,
        "persistent": {names[id(parameter)]: parameter.nbytes for parameter in persistent},
        "sizes": {name: parameter.ds_numel for name, parameter in engine.model.named_parameters()},
        "blocks": {
            name: dict(zip(names, own.sizes, strict=True)) for name, (own, names) in bundles_in(engine.model).items()
        },
        "left": [n for n, p in engine.model.named_parameters() if p.numel() and id(p) not in set(map(id, persistent))],
    }


def read_while_gathered(ranks) -> tuple[int, int, float]:
    """Between forward and backward pass: bundles that are there, those whose own values are others, and how far their
    blocks are from the master weights.
    """
    case = Case(3)
    config = case.deepspeed()
    config["zero_optimization"] |= {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9}
    engine = Engine(nest(plain_model(case), SPACE), config, "test.json", case.optim, 2, ranks)
    engine.warm_up(2, ROW_TOKENS)
    masters = gather_masters(engine, ranks)
    loss = engine.forward(ids(), ids(), LARGE)
    there = [(own, names) for own, names in bundles_in(engine.model).values() if own.weight.numel()]
    others = sum(not torch.equal(own.weight, torch.cat(own.blocks())) for own, _ in there)
    read = {name: block for own, names in there for name, block in zip(names, own.blocks(), strict=True)}
    difference = largest_difference(read, masters)
    engine.backward(loss)
    return len(there), others, difference


def test_blocks_are_read_right_while_they_lie_apart(tmp_path):
    there, others, difference = on_ranks(2, read_while_gathered, folder=tmp_path)
    assert there == 3 * (3 + 5)
    assert others > 10, "or this would prove nothing"
    assert difference == 0


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return on_ranks(2, gathering, THRESHOLD, folder=tmp_path_factory.mktemp("gathering"))


def test_blocks_that_come_and_go_are_one_matrix_without_a_copy(tmp_path):
    found = on_ranks(2, gathering, 0, folder=tmp_path)
    assert sum(num_blocks > 1 for num_blocks, _ in found["seen"]) > 20
    assert all(is_one for _, is_one in found["seen"])


def test_a_block_stays_gathered_where_the_extracted_weight_that_ends_with_it_would(found):
    before = defaultdict(int)
    expected, small = set(), set()
    for name, size in found["sizes"].items():
        small |= {name} if size <= THRESHOLD else set()
        blocks = found["blocks"].get(name, {name: size})
        for block, elements in blocks.items():
            before[_weight_of(block)] += elements
        expected |= {name} if max(before[_weight_of(block)] for block in blocks) <= THRESHOLD else set()
    assert expected < small, "or this would prove nothing"
    assert any(".bundles." in name for name in expected)
    assert set(found["persistent"]) == expected
    assert found["left"] == []


def _weight_of(name: str) -> str:
    return re.sub(r"blocks\.\d+", "", name)


def test_what_stays_gathered_takes_one_call_after_a_step(found):
    assert found["calls"] == 1
    assert found["bytes"] == sum(found["persistent"].values())

"""Under ZeRO-3 the blocks of a layer come as one matrix, and stay or go as those of an extracted model do."""

import re
from collections import Counter, defaultdict

import pytest
import torch

from sorted_ds.engine import Engine
from sorted_ds.engine.gathering import BUNDLE, _SharedMemoryHandle, copy_ranges
from sorted_ds.families import nest
from sorted_ds.nested import blocks
from sorted_ds.nested.bundles import BundledHalf, Contents, contents_of
from sorted_ds.space import Pass, SubNetSpace
from tests.batches import TASK, batch, blank
from tests.engine.test_traces import ids, one_pass
from tests.exactness import (
    LARGE,
    MIDDLE,
    ROW_TOKENS,
    SMALL,
    Case,
    gather_masters,
    largest_difference,
    plain_model,
)
from tests.spawn import on_ranks
from tests.traffic import counted

SPACE = SubNetSpace.grid(depths=[1, 2, 3], groups=[1, 2, 4], ffn=[8, 16, 24, 32, 64])
THRESHOLD = 800
"""Elements. The smallest bundles have 768, and end prefixes of weights that are larger."""


def engine_of(ranks, threshold: int, prefetch: int, live: int = 10**9) -> Engine:
    case = Case(3, optimizer="sgd", prefetch=prefetch)
    config = case.deepspeed()
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": threshold,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": 10**9 if live == 10**9 else 0,
    }
    engine = Engine(nest(plain_model(case), SPACE), TASK, config, "test.json", case.optim, 2, ranks)
    engine.warm_up(blank(2, ROW_TOKENS))
    return engine


def bundles(engine: Engine) -> list[Contents]:
    return [contents for contents in contents_of(engine.model).values() if contents.bundle is not None]


def gathering(ranks, threshold: int, prefetch: int) -> dict:
    """What three passes and a step do."""
    engine = engine_of(ranks, threshold, prefetch, live=100_000)
    matrices, arrived = [], []
    are_adjacent, wait = blocks.are_adjacent, _SharedMemoryHandle.wait

    def watched(parts) -> bool:
        matrices.append((len(parts), are_adjacent(parts)))
        return matrices[-1][1]

    def waited(handle, *args, **kwargs) -> None:
        of_half = Counter(id(getattr(p, BUNDLE)[0]) for p in handle.params if hasattr(p, BUNDLE))
        steps = {id(half): half.width.num_steps for half in engine.model.modules() if isinstance(half, BundledHalf)}
        arrived.extend(number == steps[half] for half, number in of_half.items())
        wait(handle, *args, **kwargs)

    blocks.are_adjacent, _SharedMemoryHandle.wait = watched, waited
    for subnet in (LARGE, SMALL, LARGE):
        one_pass(engine, subnet, training=True)
    blocks.are_adjacent, _SharedMemoryHandle.wait = are_adjacent, wait
    with counted() as stepped:
        engine.step(0.0)
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    persistent = engine.deepspeed.optimizer.persistent_parameters
    for parameter in persistent[:1]:
        parameter.all_gather()  # as DeepSpeed calls it elsewhere
    return {
        "matrices": matrices,
        "arrived whole": arrived,
        "calls": stepped.calls["gather"],
        "bytes": stepped.gathered,
        "persistent": {names[id(parameter)]: parameter.nbytes for parameter in persistent},
        "sizes": {
            name: dict(zip(contents.names, contents.numels, strict=True))
            for name, contents in contents_of(engine.model).items()
        },
        "left": [n for n, p in engine.model.named_parameters() if p.numel() and id(p) not in set(map(id, persistent))],
    }


def read_while_gathered(ranks, threshold: int, prefetch: int) -> dict:
    """Returns what is there after a step, between a forward and its backward pass: the number of bundles, the number of
    those whose own values are others, and how far their blocks are from the master weights.
    """
    engine = engine_of(ranks, threshold, prefetch)
    one_pass(engine, LARGE, training=True)
    before = gather_masters(engine, ranks)
    engine.step(1.0)
    masters = gather_masters(engine, ranks)
    engine.evaluate(batch(ids(), ids()), MIDDLE)
    loss = engine.forward(batch(ids(), ids()), Pass(LARGE)).loss
    there = [contents for contents in bundles(engine) if contents.bundle.weight.numel()]
    read = {
        name: block for contents in there for name, block in zip(contents.names, contents.bundle.blocks(), strict=True)
    }
    found = {
        "there": len(there),
        "others": sum(not torch.equal(p.bundle.weight, torch.cat(p.bundle.blocks())) for p in there),
        "difference": largest_difference(read, masters),
        "moved": largest_difference(before, masters),
    }
    engine.backward(loss)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "threshold", "prefetch"),
    [(2, 0, 0), (5, 0, 0), (2, THRESHOLD, 0), (2, 0, 2_000), (3, THRESHOLD, 2_000)],
    ids=["", "padded shares", "some stay", "halves are cut", "some stay, the rest is cut"],
)
def test_blocks_are_read_right_wherever_they_lie(num_ranks, threshold, prefetch, tmp_path):
    found = on_ranks(num_ranks, read_while_gathered, threshold, prefetch, folder=tmp_path)
    assert found["there"] == 3 * (3 + 5)
    assert found["others"] > 5, "or this would prove nothing"
    assert found["moved"] > 1e-3, "or this would prove nothing"
    assert found["difference"] == 0


@pytest.mark.parametrize("num_ranks", range(1, 8))
def test_the_copy_ranges_of_a_parameter_are_its_elements(num_ranks):
    """They are compared with all shares put together, the last ones padded. No number of ranks divides the sizes."""
    sizes, starts = (5, 1, 11), (20, 3, 7)
    share = -(-sum(sizes) // num_ranks)
    shares = torch.full((num_ranks, share + 2), -1)  # something comes before
    whole = torch.arange(sum(sizes))
    for rank, own in enumerate(whole.split(share)):
        shares[rank, 2 : 2 + len(own)] = own
    memory = torch.full((40,), -2)
    for rank, source, target, num in copy_ranges(sizes, starts, share):
        assert num > 0
        memory[target : target + num] = shares[rank, 2 + source : 2 + source + num]
    expected = torch.full((40,), -2)
    for start, block in zip(starts, whole.split(sizes), strict=True):
        expected[start : start + len(block)] = block
    assert torch.equal(memory, expected)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return on_ranks(2, gathering, THRESHOLD, 100_000, folder=tmp_path_factory.mktemp("gathering"))


@pytest.mark.parametrize(("prefetch", "is_cut"), [(100_000, False), (2_000, True)])
def test_blocks_that_come_and_go_are_one_matrix_without_a_copy(prefetch, is_cut, tmp_path):
    found = on_ranks(2, gathering, 0, prefetch, folder=tmp_path)
    assert found["arrived whole"].count(False) > 10 if is_cut else all(found["arrived whole"])
    assert sum(num_blocks > 1 for num_blocks, _ in found["matrices"]) > 20
    assert all(is_one for _, is_one in found["matrices"])


def test_a_block_stays_gathered_where_the_extracted_weight_that_ends_with_it_would(found):
    before = defaultdict(int)
    expected, small = set(), set()
    for name, own in found["sizes"].items():
        small |= {name} if sum(own.values()) <= THRESHOLD else set()
        for block, elements in own.items():
            before[_weight_of(block)] += elements
        expected |= {name} if max(before[_weight_of(block)] for block in own) <= THRESHOLD else set()
    assert expected < small, "or this would prove nothing"
    assert any(".bundles." in name for name in expected)
    assert set(found["persistent"]) == expected
    assert found["left"] == []


def _weight_of(name: str) -> str:
    return re.sub(r"blocks\.\d+", "", name)


def test_what_stays_gathered_takes_one_call_after_a_step(found):
    assert found["calls"] == 1
    assert found["bytes"] == sum(found["persistent"].values())

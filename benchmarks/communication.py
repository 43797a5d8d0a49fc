"""Prints what a draw gathers and reduces, against its active parameters and a static network of its size: `make bench`.

Two gloo ranks, fp32, no parameter persistent, one micro-batch of each sub-network. Static: the extracted plain model
under plain DeepSpeed with the same settings, in its third pass. Elements, so bytes are 4 times as many in fp32; the
optimizer step, which is full size at every draw, is left out.
"""

import copy
import tempfile
from pathlib import Path

import deepspeed
import torch

from benchmarks.common import SIZES, nested_llama
from sorted_ds.config import Optim
from sorted_ds.engine import Engine
from sorted_ds.engine.modes import complete
from sorted_ds.loss import SummedLoss
from sorted_ds.nested import extract
from sorted_ds.space import SubNet
from tests.exactness import Traffic
from tests.spawn import on_ranks

SIZE = SIZES["tiny"]
SPACE = SIZE.space()
VISITED = ["d2-g1-f96", "d8-g1-f96", "d2-g4-f384", "d4-g2-f192", "d4-g4-f96", "d8-g2-f192", "d8-g4-f192", "d8-g4-f384"]
ZERO = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 500_000,
    "stage3_max_reuse_distance": 0,
    "overlap_comm": True,
}


def settings(stage: int) -> dict:
    return {"zero_optimization": {"stage": stage, **ZERO}}


def of_draws(ranks, stage: int) -> dict[str, tuple[Traffic, Traffic]]:
    """Of each sub-network: the traffic of its first visit and of a later one."""
    engine = Engine(nested_llama(SIZE), settings(stage), "benchmark", Optim(), SIZE.rows, ranks)
    engine.warm_up(SIZE.rows, SIZE.row_tokens)
    ids = torch.zeros(SIZE.rows, SIZE.row_tokens, dtype=torch.int64)
    visits: dict[str, list[Traffic]] = {name: [] for name in VISITED}
    for name in VISITED * 2:
        with Traffic() as traffic:
            engine.backward(engine.forward(ids, ids, SPACE[name]))
        visits[name].append(traffic)
        engine.step(0.0)
    if engine._traces is not None:
        assert engine._traces.num_invalidated == 0
    return {name: tuple(map(plain, found)) for name, found in visits.items()}


def of_static(ranks, stage: int) -> dict[str, tuple]:
    """Of each sub-network: the traffic of the extracted model in plain DeepSpeed."""
    return {name: plain(static(ranks, stage, SPACE[name])) for name in VISITED}


def static(ranks, stage: int, subnet: SubNet) -> Traffic:
    loss = SummedLoss(extract(nested_llama(SIZE), subnet))
    config = complete(settings(stage), SIZE.rows, ranks.size, 1.0)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(
        model=loss, optimizer=optimizer, config=copy.deepcopy(config), dist_init_required=False
    )
    ids = torch.zeros(SIZE.rows, SIZE.row_tokens, dtype=torch.int64)
    for _ in range(3):
        with Traffic() as traffic:
            engine.backward(engine(ids, ids))
        engine.step()
    return traffic


def plain(traffic: Traffic) -> tuple[int, int, int]:
    return traffic.gathered, traffic.gathers, traffic.reduced


def active(name: str) -> int:
    return sum(p.numel() for p in extract(nested_llama(SIZE), name).parameters())


def main() -> None:
    heading = f"{'sub-network':13}{'active':>10}{'gathered':>10}{'first':>8}{'calls':>7}{'static':>8}{'calls':>7}"
    for stage in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            draws = on_ranks(2, of_draws, stage, folder=Path(folder) / "draws")
            statics = on_ranks(2, of_static, stage, folder=Path(folder) / "static")
        print(f"\nZeRO stage {stage}: gathered and reduced as multiples of the active parameters\n")
        print(heading + f"{'reduced':>9}{'static':>8}")
        for name in VISITED:
            size, (first, later), fixed = active(name), draws[name], statics[name]
            row = f"{name:13}{size:>10,}{later[0] / size:>10.3f}{first[0] / size:>8.3f}{later[1]:>7}"
            row += f"{fixed[0] / size:>8.3f}{fixed[1]:>7}{later[2] / size:>9.3f}{fixed[2] / size:>8.3f}"
            print(row)


if __name__ == "__main__":
    main()

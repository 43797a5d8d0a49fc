"""Prints what a sub-network gathers, reduces and broadcasts, against a static network of its size: `make bench`.

At stage 3 nothing persists, unless `--persistent` says so. Bytes are those of one micro-batch (forward and backward)
and of the optimizer step after it, for each sub-network, as multiples of the bytes of its active parameters, with the
number of calls. Static: the extracted plain model under plain DeepSpeed with the same settings, in its third step.
`--stages 0 1 2 3 --ranks 2 --bf16`.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.common import SIZES, Setting, nested_llama
from sorted_ds.engine import Engine
from sorted_ds.engine.modes import complete_config
from sorted_ds.nested import extract
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass, SubNet
from tests.batches import TASK, batch, blank, summed
from tests.spawn import on_ranks
from tests.traffic import Traffic, counted

SIZE = SIZES["tiny"]
SPACE = SIZE.space()
VISITED = ["d2-g1-f96", "d8-g1-f96", "d2-g4-f384", "d4-g2-f192", "d4-g4-f96", "d8-g2-f192", "d8-g4-f192", "d8-g4-f384"]
ZERO = {"stage3_prefetch_bucket_size": 500_000, "stage3_max_reuse_distance": 0}
GATHERED, REDUCED = attrgetter("gathered"), attrgetter("reduced")
Visit = tuple[Traffic, Traffic]
"""The traffic of a micro-batch, and of the step after it."""


def keys(setting: Setting, persistent: int) -> dict:
    own = setting.engine_keys()
    zero = {"overlap_comm": setting.stage > 1, "stage3_param_persistence_threshold": persistent, **ZERO}
    return {**own, "zero_optimization": {**own["zero_optimization"], **zero}}


def visit(micro_batch: Callable[[torch.Tensor], object], step: Callable[[], object]) -> Visit:
    ids = torch.zeros(SIZE.rows, SIZE.row_tokens, dtype=torch.int64, device=get_accelerator().current_device_name())
    with counted() as in_micro_batch:
        micro_batch(ids)
    with counted() as in_step:
        step()
    return in_micro_batch, in_step


def of_nested(ranks, setting: Setting, persistent: int) -> dict[str, list[Visit]]:
    """For each sub-network: its first visit and a later one."""
    model = nested_llama(SIZE, dtype=setting.dtype, device=ranks.device)
    engine = Engine(model, TASK, keys(setting, persistent), "benchmark", Optim(), SIZE.rows, ranks)
    engine.warm_up(blank(SIZE.rows, SIZE.row_tokens))

    def passes(subnet: SubNet, ids: torch.Tensor) -> None:
        engine.backward(engine.forward(batch(ids, ids), Pass(subnet)).loss)

    visits: dict[str, list[Visit]] = {name: [] for name in VISITED}
    for name in VISITED * 2:
        visits[name].append(visit(partial(passes, SPACE[name]), lambda: engine.step(0.0)))
    assert engine._traces is None or engine._traces.num_invalidated == 0
    return visits


def of_static(ranks, setting: Setting, persistent: int) -> dict[str, Visit]:
    """For each sub-network: the extracted model in plain DeepSpeed."""
    return {name: static(ranks, setting, persistent, name) for name in VISITED}


def static(ranks, setting: Setting, persistent: int, name: str) -> Visit:
    loss = summed(extract(nested_llama(SIZE, dtype=setting.dtype, device=ranks.device), name))
    config = copy.deepcopy(complete_config(keys(setting, persistent), SIZE.rows, ranks.size, 1.0))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=loss, optimizer=optimizer, config=config, dist_init_required=False)
    return [visit(lambda ids: engine.backward(engine(**batch(ids, ids))), engine.step) for _ in range(3)][-1]


def active_bytes(name: str, dtype: torch.dtype) -> int:
    return sum(p.nbytes for p in extract(nested_llama(SIZE, dtype=dtype), name).parameters())


def row(name: str, size: int, first: Visit, later: Visit, fixed: Visit) -> str:
    """`size`: bytes of the active parameters."""
    cells = [f"{name:13}{size:>11,}"]
    cells += [f"{each[0].gathered / size:>9.3f}" for each in (later, first, fixed)]
    cells += [f"{each[0].reduced / size:>9.3f}" for each in (later, fixed)]
    cells += [f"{later[0].bytes['broadcast'] / size:>6.3f}"]
    cells += [f"{sum(each[0].calls.values()):>7}" for each in (later, fixed)]
    cells += [f"{kind(each[1]) / size:>9.3f}" for kind in (GATHERED, REDUCED) for each in (later, fixed)]
    return "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="ranks share a GPU if they must")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--persistent", type=int, default=0, help="elements of what stage 3 keeps gathered at most")
    args = parser.parse_args()
    for stage in args.stages:
        setting = Setting(SIZE, stage, args.bf16)
        with tempfile.TemporaryDirectory() as folder:
            nested, statics = (
                on_ranks(args.ranks, run, setting, args.persistent, folder=Path(folder) / name, device=args.device)
                for name, run in (("nested", of_nested), ("static", of_static))
            )
        precision = "bf16" if args.bf16 else "fp32"
        print(
            f"\nZeRO stage {stage}, {precision}, {args.ranks} ranks: multiples of the bytes of the active parameters\n"
        )
        print(f"{'':24}{'micro-batch:':>13}{'':59}{'step:':>7}")
        print(
            f"{'sub-network':13}{'active':>11}{'gathered':>9}{'first':>9}{'static':>9}{'reduced':>9}{'static':>9}"
            f"{'bcast':>6}{'calls':>7}{'static':>7}{'gathered':>9}{'static':>9}{'reduced':>9}{'static':>9}"
        )
        for name in VISITED:
            print(row(name, active_bytes(name, setting.dtype), *nested[name], statics[name]), flush=True)


if __name__ == "__main__":
    main()

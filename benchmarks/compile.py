"""Prints graphs compiled, and the time of one micro-batch with compiled layers as a multiple of eager: `make bench`.

One process, fp32, forward and backward without optimizer step, of several sub-networks of one model. In turns: each
round times one after the other, and the ratio is the round's. Median of the rounds with a 95 % interval (order
statistics of the binomial). The graphs are counted while every sub-network of the space is run, trained and evaluated.
`--backend inductor --rounds 40`, `--size large --bf16 --device cuda` on a GPU.
"""

import argparse
import time

import torch
import torch._dynamo
from torch._dynamo.backends.registry import lookup_backend

from benchmarks.common import SIZES, Size, interval, nested_llama
from sorted_ds.nested.compiled import compile_layers
from sorted_ds.space import SubNet
from sorted_ds.tasks import SummedLoss
from tests.batches import batch, summed

CPU_SIZE = Size(256, 768, 8, 8, 4, vocab=1024, rows=4, row_tokens=128)
QUARTERS = [(1, 1, 1), (4, 1, 1), (1, 4, 4), (2, 2, 2), (4, 2, 2), (4, 4, 4)]
"""Quarters of depth, groups and ffn of the sub-networks that are timed."""


def seconds_of(loss: SummedLoss, subnet: SubNet, ids: torch.Tensor) -> float:
    """Returns the seconds of one micro-batch. Both sides allocate the gradient's memory anew each time."""
    loss.zero_grad()
    loss.model.set_subnet(subnet)
    wait(ids)
    start = time.perf_counter()
    (loss(**batch(ids, ids)) / ids.numel()).backward()
    wait(ids)
    return time.perf_counter() - start


def wait(ids: torch.Tensor) -> None:
    """Waits for what the device still has to do."""
    if ids.is_cuda:
        torch.cuda.synchronize()


def count_graphs(loss: SummedLoss, ids: torch.Tensor, graphs: list) -> None:
    """Runs the space as a training run does: the full network first."""
    start = time.perf_counter()
    subnets = list(loss.model.space)[::-1]
    for subnet in subnets:
        seconds_of(loss, subnet, ids)
    trained = len(graphs)
    with torch.no_grad():
        for subnet in subnets:
            loss.eval().model.set_subnet(subnet)
            loss(**batch(ids, ids))
    loss.train()
    more, seconds = len(graphs) - trained, time.perf_counter() - start
    print(
        f"{len(subnets)} sub-networks: {trained} graphs to train them, {more} more to evaluate them, {seconds:.0f} s\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--size", choices=SIZES, help="of benchmarks/common.py (default: one for a CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    inner, graphs = lookup_backend(args.backend), []

    def backend(graph, inputs):
        graphs.append(graph)
        return inner(graph, inputs)

    size, dtype = SIZES.get(args.size, CPU_SIZE), torch.bfloat16 if args.bf16 else torch.float32
    eager, other = (summed(nested_llama(size, dtype=dtype, device=args.device)).train() for _ in range(2))
    compile_layers(other.model, backend)
    ids = torch.randint(size.vocab, (size.rows, size.row_tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(args.device)
    count_graphs(other, ids, graphs)
    print(f"{'sub-network':13}{'compiled ms':>12}{'eager ms':>10}  ratio (95 %)")
    for subnet in (size.of(*quarters) for quarters in QUARTERS):
        rows = []
        for number in range(args.rounds):
            turns = [other, eager] if number % 2 else [eager, other]
            found = {id(loss): seconds_of(loss, subnet, ids) for loss in turns}
            rows.append((found[id(other)], found[id(eager)]))
        ratio = interval([compiled / plain for compiled, plain in rows])
        compiled, plain = (1000 * interval([row[side] for row in rows]).median for side in (0, 1))
        print(f"{subnet.name:13}{compiled:>12.1f}{plain:>10.1f}  {ratio}", flush=True)


if __name__ == "__main__":
    main()

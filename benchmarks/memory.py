"""Prints the memory of a rank: building a model at stage 3, and training against plain DeepSpeed: `make bench`.

Live tensor bytes: every storage that exists, counted exactly (tests/memory.py). RSS: the highest of the process
while it builds (VmHWM, reset before), above what it held before; memory is given back to the system at once when it is
freed (MALLOC_MMAP_THRESHOLD_). RSS holds the pages of mapped files too, so the checkpoint's pages count while they are
mapped. The rank that needs most is shown. It runs on Linux. `--ranks 2 4`, `--skip-building`, `--skip-training`.
"""

import argparse
import ctypes
import gc
import os
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sorted_ds.engine import Engine, partitioner
from sorted_ds.nested.load import build
from sorted_ds.run.config import Optim
from sorted_ds.space import SubNetSpace
from tests.batches import LLAMA, TASK
from tests.memory import NAMED, LiveBytes, of_plain, of_subnets
from tests.spawn import on_ranks

MIB = 2**20
HIDDEN = {"14 M": 256, "50 M": 512, "200 M": 1024}
BUILT, TRAINED = ("50 M", "200 M"), "14 M"
DEPTH, VOCAB = 16, 4000
ROWS, ROW_TOKENS = 2, 64
ZERO = {
    "overlap_comm": False,
    "reduce_bucket_size": 5_000_000,
    "allgather_bucket_size": 5_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_prefetch_bucket_size": 3_000_000,
    "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 0,
}


def config_of(size: str) -> LlamaConfig:
    hidden = HIDDEN[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=DEPTH,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB,
    )


def space_of(size: str) -> SubNetSpace:
    hidden = HIDDEN[size]
    return SubNetSpace.grid(depths=[4, 8, DEPTH], groups=[1, 2, 4], ffn=[hidden, 2 * hidden, 3 * hidden])


def settings(stage: int) -> dict:
    return {"zero_optimization": {"stage": stage, **ZERO}}


# Building


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def built(ranks, folder: str) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    """For each size, source and way: live bytes and RSS while building, live bytes until the engine stands."""
    found = {}
    build_and_forget(ranks, "50 M", None, "partitioned")  # what is loaded once is loaded now
    for size in BUILT:
        for source in (None, Path(folder) / size):
            for way in ("partitioned", "whole first"):
                told = build_and_forget(ranks, size, source, way)
                everyone = [map(int, text.split()) for text in ranks.gather(" ".join(map(str, told)))]
                found[size, "config" if source is None else "checkpoint", way] = tuple(
                    map(max, zip(*everyone, strict=True))
                )
    return found


def build_and_forget(ranks, size: str, source: Path | None, way: str) -> tuple[int, int, int]:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    ranks.sum([0])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = status("VmRSS")
    partition = partitioner(settings(3), ROWS, 1.0, ranks) if way == "partitioned" else None
    with LiveBytes() as live:
        model = build(LLAMA, config_of(size), space_of(size), source, 1, torch.float32, on_filled=partition)
        while_building, rss = live.peak, status("VmHWM") - before
        engine = Engine(model, TASK, settings(3), "benchmark", Optim(name="sgd"), ROWS, ranks)
        until_engine = live.peak
    engine.deepspeed.destroy()
    return while_building, rss, until_engine


def model_bytes(size: str) -> int:
    with torch.device("meta"):
        return 4 * sum(p.numel() for p in LlamaForCausalLM(config_of(size)).parameters())


def print_building(num_ranks: int, folder: Path) -> None:
    for size in BUILT:
        if not (folder / size).exists():
            LlamaForCausalLM(config_of(size)).save_pretrained(folder / size, max_shard_size="50MB")
    found = on_ranks(num_ranks, built, str(folder), folder=folder / f"on{num_ranks}")
    small, large = BUILT
    models = [model_bytes(size) for size in BUILT]
    print(f"\nBuilding at stage 3 on {num_ranks} ranks, fp32: MiB of the rank with most, and bytes per byte of model\n")
    sizes = " and ".join(f"{nbytes / MIB:.0f} MiB" for nbytes in models)
    print(f"models of {sizes}; a rank's part is 1/{num_ranks} = {1 / num_ranks:.3f}\n")
    columns = (f"{name:>20}{'slope':>8}" for name in ("live tensors", "RSS", "live until engine"))
    print(f"{'source':12}{'way':14}" + "".join(columns))
    for source in ("config", "checkpoint"):
        for way in ("partitioned", "whole first"):
            row = f"{source:12}{way:14}"
            for column in range(3):
                low, high = (found[size, source, way][column] for size in (small, large))
                row += f"{f'{low / MIB:.0f} -> {high / MIB:.0f}':>20}{(high - low) / (models[1] - models[0]):>8.3f}"
            print(row, flush=True)


# Training

NESTED, PLAIN, HF = "sorted_ds", "plain, our loss", "plain, HF's loss"


def trained(ranks, stage: int) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Live bytes of each sub-network and way: between steps, in a pass, in a step."""
    found = {}
    ids = torch.zeros(ROWS, ROW_TOKENS, dtype=torch.int64, device=ranks.device)
    model, zero = (ranks, config_of(TRAINED), space_of(TRAINED)), settings(stage)["zero_optimization"]
    nested = of_subnets(*model, zero, ids)
    gc.collect()
    for name in NAMED:
        found[name, NESTED] = nested[name]
        found[name, PLAIN] = of_plain(*model, name, zero, ids)
        found[name, HF] = of_plain(*model, name, zero, ids, chunked=False)
        gc.collect()
    return {key: (seen.between, seen.passes, seen.most) for key, seen in found.items()}


def print_training(folder: Path, num_ranks: int, device: str) -> None:
    """The ratios are to plain DeepSpeed with our loss, which is the harder to equal."""
    print(f"\nTraining {TRAINED} on {num_ranks} ranks ({device}), fp32, AdamW, {ROWS} x {ROW_TOKENS} tokens:")
    print("live MiB of the rank with most, ratios\n")
    head = f"{'stage':7}{'sub-network':14}{'way':18}{'between':>9}{'passes':>9}{'step':>9}{'ratio':>8}"
    print(head + f"{'passes - between':>18}{'ratio':>8}")
    for stage in range(4):
        found = on_ranks(num_ranks, trained, stage, folder=folder / f"stage{stage}", device=device)
        for (name, way), (before, passes, step) in found.items():
            other_before, other_passes, other_step = found[name, PLAIN]
            row = f"{stage:<7}{name:14}{way:18}{before / MIB:>9.1f}{passes / MIB:>9.1f}{step / MIB:>9.1f}"
            row += f"{step / other_step:>8.3f}{(passes - before) / MIB:>18.1f}"
            print(row + f"{(passes - before) / (other_passes - other_before):>8.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--skip-building", action="store_true")
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--trained-ranks", type=int, default=2, help="of the training, as --ranks of the building")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the training")
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks in [] if args.skip_building else args.ranks:
            print_building(num_ranks, Path(folder))
        if not args.skip_training:
            print_training(Path(folder) / "trained", args.trained_ranks, args.device)


if __name__ == "__main__":
    main()

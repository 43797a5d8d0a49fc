"""Prints the time of training against other tools, of each sub-network, and of larger spaces: `make bench`.

(a) the full network against plain DeepSpeed and the Hugging Face Trainer, whole steps; (b) each sub-network against its
extracted model; (c) 24, 160 and 1,000 sub-networks in the space. `--part b --stages 3 --rounds 40`,
`--part a --accumulation 1 4`, `--size small` for what Python costs, `--ranks 1 --cpu-time` where others compute too,
`--device cuda --size large --bf16 --part a b --peak-tflops 989` on a GPU. Ten minutes at the defaults.
"""

import argparse
from dataclasses import replace

from benchmarks import spaces, subnets, whole_steps
from benchmarks.common import SIZES, Setting, circumstances


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices="abc", nargs="+", default=list("abc"))
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=9, help="each of them times everything once, in turns")
    parser.add_argument("--size", choices=SIZES, default="middle")
    parser.add_argument("--rows", type=int, help="of a micro-batch (default: the size's own)")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1], help="micro-batches a step, part (a)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of one device, for MFU")
    parser.add_argument("--cpu-time", action="store_true", help="of rank 0, not of the wall clock; use --ranks 1")
    parser.add_argument("--hang-seconds", type=int, default=1200, help="a table that takes longer has failed")
    args = parser.parse_args()
    size = SIZES[args.size]
    if "c" in args.part and (size.layers % 8 or size.groups % 16):
        has = f"{size.layers} and {size.groups}"
        parser.error(f"--part c needs a multiple of 8 layers, and of 16 groups; {args.size} has {has}.")
    return args


def main() -> None:
    args = arguments()
    size = SIZES[args.size]
    size = replace(size, rows=args.rows or size.rows)
    print(circumstances(args.ranks, args.device))
    print(f"{args.size}: {size}, {'bf16' if args.bf16 else 'fp32'}; medians of {args.rounds} rounds, 95 % intervals")
    for stage in args.stages:
        setting = Setting(size, stage, args.bf16, args.cpu_time)
        if "a" in args.part:
            for accumulation in args.accumulation:
                whole_steps.print_table(args, setting, accumulation)
        if "b" in args.part:
            subnets.print_table(args, setting)
        if "c" in args.part:
            spaces.print_table(args, setting)
    if "c" in args.part:
        spaces.print_python_table(size)


if __name__ == "__main__":
    main()

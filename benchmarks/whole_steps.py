"""Whole optimizer steps of the full network: sorted_ds, plain DeepSpeed and the Hugging Face Trainer, in turns.

The same weights, rows, precision, ZeRO stage, accumulation, clipping and learning rate; AdamW without weight decay. The
mean loss of all steps is printed: that it is one number shows that the three do one thing. The Trainer runs its own
loop, and between its steps the other two take theirs. What a step includes:

- sorted_ds: forward with the summed loss, backward, `step` with the norm of the gradient.
- DeepSpeed: Hugging Face's forward with its loss, backward and `step` after each micro-batch, which accumulate in the
  engine. torch's fused AdamW.
- Trainer: from its `on_step_begin` to its `on_step_end`: its own forward, backward and step by way of accelerate, and
  its learning rate. Rows are fetched before, and nothing is logged or saved.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import (
    Setting,
    costs,
    engine_of,
    interval,
    llama,
    nested_llama,
    now,
    speed,
    token_ids,
    training_tflops,
)
from sorted_ds.data.loader import NO_TARGET
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass
from tests.batches import batch
from tests.spawn import on_ranks

LEARNING_RATE, CLIP_NORM = 1e-4, 1.0
WARM_UP_STEPS = 2
OURS, DEEPSPEED, TRAINER = "sorted_ds", "DeepSpeed", "Trainer"


def peer_keys(setting: Setting, accumulation: int, num_ranks: int) -> dict:
    """The DeepSpeed JSON of both peers."""
    keys = {
        **setting.engine_keys(),
        "train_micro_batch_size_per_gpu": setting.size.rows,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": setting.size.rows * accumulation * num_ranks,
        "gradient_clipping": CLIP_NORM,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if setting.bf16 and setting.stage:
        keys["data_types"] = {"grad_accum_dtype": "fp32"}
    return keys


Step = Callable[[], float]
"""One optimizer step. Returns its mean loss."""


def our_step(ranks, setting: Setting, accumulation: int) -> Step:
    optim = Optim(clip_norm=CLIP_NORM, weight_decay=0.0, betas=(0.9, 0.999))
    engine = engine_of(nested_llama(setting.size, dtype=setting.dtype, device=ranks.device), setting, optim, ranks)
    ids = token_ids(setting.size, ranks)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], NO_TARGET)], dim=1)
    num_targets = labels[:, :-1].numel() * accumulation * ranks.size

    def step() -> float:
        losses = []
        for _ in range(accumulation):
            nll = engine.forward(batch(ids, labels), Pass(engine.model.space.full)).loss
            engine.backward(nll / num_targets)
            losses.append(nll.detach())
        engine.step(LEARNING_RATE)
        return float(sum(losses)) / num_targets * ranks.size

    return step


def deepspeed_step(ranks, setting: Setting, accumulation: int) -> Step:
    model = llama(setting.size, setting.dtype, ranks.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    keys = peer_keys(setting, accumulation, ranks.size)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=keys, dist_init_required=False)[0]
    ids = token_ids(setting.size, ranks)

    def step() -> float:
        losses = []
        for _ in range(accumulation):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return float(sum(losses)) / accumulation

    return step


class InTurns(TrainerCallback):
    """Times the Trainer's steps and, after each, one step of each of the others, in an order that alternates."""

    def __init__(self, ranks, setting: Setting, others: dict[str, Step]):
        self.others, self.now, self.started = others, lambda: now(ranks, setting), 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in (*others, TRAINER)}
        self.losses: dict[str, list[float]] = {name: [] for name in others}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = self.now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds[TRAINER].append(self.now() - self.started)
        for name in sorted(self.others, reverse=state.global_step % 2 == 0):
            start = self.now()
            self.losses[name].append(self.others[name]())
            self.seconds[name].append(self.now() - start)


class SameRows(torch.utils.data.Dataset):
    """Rows that come again in every micro-batch: rank r gets its own, as the other tools' ranks do."""

    def __init__(self, ranks, setting: Setting, num_micro_batches: int):
        each = [token_ids(setting.size, type(ranks)(r, ranks.size, r, torch.device("cpu"))) for r in range(ranks.size)]
        self.rows, self.length = torch.cat(each), num_micro_batches * setting.size.rows * ranks.size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = self.rows[number % len(self.rows)]
        return {"input_ids": row, "labels": row}


def times(ranks, setting: Setting, accumulation: int, num_rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step after the first ones, and the mean loss of all, of each tool."""
    disable_progress_bar()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")  # accelerate asks; the ranks have met already
    others = {OURS: our_step(ranks, setting, accumulation), DEEPSPEED: deepspeed_step(ranks, setting, accumulation)}
    turns = InTurns(ranks, setting, others)
    num_steps = WARM_UP_STEPS + num_rounds
    model = llama(setting.size, device=ranks.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=setting.size.rows,
            gradient_accumulation_steps=accumulation,
            max_steps=num_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP_NORM,
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=ranks.device.type == "cpu",
            bf16=setting.bf16,
            deepspeed=peer_keys(setting, accumulation, ranks.size),
        )
        rows = SameRows(ranks, setting, num_steps * accumulation)
        trained = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[turns]).train()
    losses = {name: sum(values) / num_steps for name, values in turns.losses.items()}
    return {
        "seconds": {name: values[WARM_UP_STEPS:] for name, values in turns.seconds.items()},
        "losses": {**losses, TRAINER: trained.training_loss},
    }


def print_table(args: Namespace, setting: Setting, accumulation: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        call = (args.ranks, times, setting, accumulation, args.rounds)
        found = on_ranks(*call, folder=Path(folder), device=args.device, hang_seconds=args.hang_seconds)
    cost = costs(setting.size)[setting.size.space().full]
    tokens = setting.size.tokens * accumulation
    print(f"\n(a) ZeRO stage {setting.stage}, {accumulation} micro-batches a step: the full network, whole steps\n")
    print(f"{'tool':11}{'step ms':>9}{'tokens/s':>10}{'mean loss':>11}  tokens/s of sorted_ds over its (95 %)")
    ours = found["seconds"][OURS]
    for name, seconds in found["seconds"].items():
        median = interval(seconds).median
        ratio = interval([its / own for its, own in zip(seconds, ours, strict=True)])
        told = speed(training_tflops(cost, tokens, median), args.peak_tflops)
        row = f"{name:11}{median * 1e3:>9.1f}{tokens * args.ranks / median:>10.0f}{found['losses'][name]:>11.5f}"
        print(f"{row}  {'' if name == OURS else str(ratio):23}  {told}", flush=True)

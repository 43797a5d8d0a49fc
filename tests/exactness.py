"""What the exactness tests run on each rank: the engine, and DeepSpeed with parts of the fix switched off.

Everything is small, so the thresholds are down (docs/log.md, "Small tests are vacuous"): at the default ones nothing
would be partitioned, no bucket would fill before the end of backward, and nothing would be released.
"""

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from unittest import mock

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sorted_ds.engine import Engine
from sorted_ds.engine.modes import complete_config
from sorted_ds.families import nest
from sorted_ds.nested.bundles import contents_of
from sorted_ds.nested.layout import is_laid_out
from sorted_ds.nested.weights import hf_tensors
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass, SubNetSpace
from tests import reference
from tests.batches import TASK, batch, blank
from tests.traffic import counted

SPACE = SubNetSpace.grid(depths=[1, 2, 3], groups=[1, 2, 4], ffn=[16, 32, 64])
ORDER = (2, 0, 1)
"""A layer order that is not the network's own sequence, for cases that are `ordered`."""
ORDERED_SPACE = SubNetSpace(SPACE, layer_order=ORDER)
LARGE, MIDDLE, SMALL = SPACE["d3-g4-f64"], SPACE["d2-g2-f32"], SPACE["d1-g1-f16"]
DEEP, WIDE = SPACE["d3-g1-f16"], SPACE["d1-g4-f64"]
SCHEDULE = (
    (LARGE, SMALL, MIDDLE, SMALL),  # used early, not last
    (SMALL, SMALL, MIDDLE, LARGE),  # used last, not first
    (SMALL, SMALL, SMALL, SMALL),  # most of the network not used at all in a step
    (DEEP, WIDE, SMALL, MIDDLE),
    (MIDDLE, DEEP, MIDDLE, SMALL),
    (SMALL, LARGE, SMALL, SMALL),  # used in the middle
)
ROWS_PER_RANK, ROW_TOKENS, VOCAB = 2, 12, 96
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state."""
SMALL_ZERO = {
    "reduce_bucket_size": 1000,
    "allgather_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 10000,
}


@dataclass(frozen=True)
class Case:
    """One mode of the engine."""

    stage: int
    precision: str = "fp32"
    optimizer: str = "adamw"
    """`sgd`, or whose AdamW: `adamw` (torch's), `fused`, `cpu_adam`."""
    overlap: bool = False
    clip_norm: float = 0.1
    tied: bool = False
    checkpointing: bool = False
    evaluate_between: bool = False
    sub_group_size: int = 1_000_000_000
    compile: bool = False
    offload: bool = False
    """The optimizer's state on the CPU."""
    offload_param: bool = False
    """The weights too."""
    pin_memory: bool = False
    prefetch: int = 0
    """Elements that stage 3 gathers ahead."""
    roomy: bool = False
    """Stage 3 may keep what it has gathered, as it does by default."""
    default_thresholds: bool = False
    """DeepSpeed's own: at stage 3 nothing so small is partitioned, all of it is persistent."""
    reports: bool = False
    """DeepSpeed's timers, and its log of what is communicated."""
    without: str = ""
    """The part of the fix that is switched off: see `PARTS`."""
    ordered: bool = False
    """Depth takes the layers by `ORDER`."""
    taught: bool = False
    """The full network runs without a gradient before each sub-network, on the same rows."""
    same_rows: bool = False
    """The largest and the smallest sub-network train on the rows of each of the schedule's, beside it."""
    static: bool = False
    """Every pass runs the full network: what rounding alone does in this mode."""

    @property
    def name(self) -> str:
        flags = [field.name for field in fields(self) if field.type is bool and getattr(self, field.name)]
        flags += [f"sub_group{self.sub_group_size}"] if self.sub_group_size < 1_000_000_000 else []
        flags += [f"prefetch{self.prefetch}"] if self.prefetch else []
        flags += ["unclipped"] if not self.clip_norm else []
        flags += [f"without_{self.without}"] if self.without else []
        return "-".join([f"stage{self.stage}", self.precision, self.optimizer, *flags])

    @property
    def optim(self) -> Optim:
        is_sgd = self.optimizer == "sgd"
        # AdamW in bf16 is compared by its first moments, sums of gradients. A small rate keeps the weights together.
        adamw_rate = 0.01 if self.precision == "fp32" else 1e-4
        return Optim(
            name="sgd" if is_sgd else "adamw",
            implementation=self.optimizer if self.optimizer in ("fused", "cpu_adam") else "torch",
            learning_rate=1.0 if is_sgd else adamw_rate,
            clip_norm=self.clip_norm,
            weight_decay=0.1,
            # AdamW divides by a root that can be near zero, and so turns a rounding of 1e-8 into rate / eps * 1e-8. At
            # 1e-6 the last digit of a sum, which depends on the CPU, moved weights by 2e-5. Gradients are larger.
            eps=1e-4,
        )

    def deepspeed(self) -> dict:
        zero = {"stage": self.stage, "overlap_comm": self.overlap, "sub_group_size": self.sub_group_size}
        zero |= {} if self.default_thresholds else {**SMALL_ZERO, "stage3_prefetch_bucket_size": self.prefetch}
        zero |= {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9} if self.roomy else {}
        cpu = {"device": "cpu", "pin_memory": self.pin_memory}
        zero |= {"offload_optimizer": cpu} if self.offload else {}
        zero |= {"offload_param": cpu} if self.offload_param else {}
        config = {"zero_optimization": zero, **({"bf16": {"enabled": True}} if self.precision == "bf16" else {})}
        if self.reports:
            config |= {"wall_clock_breakdown": True, "comms_logger": {"enabled": True, "prof_all": True}}
        return config


def plain_model(case: Case) -> PreTrainedModel:
    """The same on every rank: every weight random, norms and biases too."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        mlp_bias=True,
        tie_word_embeddings=case.tied,
    )
    torch.manual_seed(5)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1) * 0.5, std=0.15)
    if case.precision == "bf16":
        model.to(torch.bfloat16).float()  # start from values that bf16 holds, so that only the training rounds
    return model


def micro_batches(case: Case, num_ranks: int) -> list[list[list[reference.MicroBatch]]]:
    """[step][share][rank]: the rows differ, and so does the number of targets of each rank."""
    generator = torch.Generator().manual_seed(11)
    steps = []
    for subnets in SCHEDULE:
        step = []
        for subnet in subnets:
            ids = torch.randint(0, VOCAB, (num_ranks, ROWS_PER_RANK, ROW_TOKENS + 1), generator=generator)
            labels = ids[..., 1:].clone()
            for rank in range(num_ranks):
                hidden = torch.rand(labels[rank].shape, generator=generator) < 0.15 + 0.6 * rank / num_ranks
                labels[rank][hidden] = -100
            subnet = LARGE if case.static else subnet
            step.append([(subnet, ids[rank, :, :-1], labels[rank]) for rank in range(num_ranks)])
        steps.append(step)
    return steps


def passes(case: Case, micro_batch: reference.MicroBatch) -> list[reference.MicroBatch]:
    """The passes with a gradient that run on the rows of one of the schedule's micro-batches."""
    subnet, ids, labels = micro_batch
    return [(own, ids, labels) for own in ((LARGE, subnet, SMALL) if case.same_rows else (subnet,))]


def flat(step: list[list[reference.MicroBatch]]) -> list[reference.MicroBatch]:
    return [micro_batch for share in step for micro_batch in share]


def reference_weights(case: Case, num_ranks: int, num_steps: int, skip_unused: bool = False) -> dict:
    model = plain_model(case)
    steps = [flat(step) for step in micro_batches(case, num_ranks)[:num_steps]]
    steps = [[own for micro_batch in step for own in passes(case, micro_batch)] for step in steps]
    norms, optimizer = reference.train(model, steps, case.optim, skip_unused, ORDER if case.ordered else ())
    moments = {
        kind: {name: optimizer.state[p][kind] for name, p in model.named_parameters()}
        for kind in (MOMENTS if case.optimizer != "sgd" else ())
    }
    return {"weights": model.state_dict(), "norms": norms, **moments}


PARTS = ("own_accumulation", "clean_accumulators", "both", "summed_loss")
"""Own accumulation and clean accumulators matter at stage 3, alone and together; the summed loss at every stage."""


@contextmanager
def parts_off(case: Case):
    """DeepSpeed as its users use it, in the named part."""
    with ExitStack() as stack:
        if case.without in ("clean_accumulators", "both"):
            stack.enter_context(mock.patch.object(Engine, "_clear_accumulators", return_value=None))
        if case.without in ("own_accumulation", "both"):
            stack.enter_context(mock.patch("sorted_ds.engine.engine.complete_config", _managed))
            stack.enter_context(mock.patch("sorted_ds.engine.engine.check_modes"))
        yield


def _managed(*args) -> dict:
    config = complete_config(*args)
    num_visits = len(SCHEDULE[0])
    config.update(
        managed_gradient_accumulation=True,
        gradient_accumulation_steps=num_visits,
        train_batch_size=config["train_batch_size"] * num_visits,
    )
    return config


def run_engine(ranks, case: Case, num_steps: int) -> dict:
    """Trains through the engine; returns weights under Hugging Face names, norms, and what was observed on the way."""
    model = plain_model(case)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = nest(model, ORDERED_SPACE if case.ordered else SPACE).to(ranks.device)
    with parts_off(case):
        engine = Engine(model, TASK, case.deepspeed(), "test.json", case.optim, ROWS_PER_RANK, ranks, case.compile)
        seen = _train(engine, ranks, case, num_steps)
    gathered = {"weights": gather_masters(engine, ranks)}
    if "before" in seen:
        gathered["before"] = seen.pop("before")
    for kind in MOMENTS if case.optimizer != "sgd" else ():
        gathered[kind] = gather_state(engine, ranks, lambda shard, kind=kind: engine.state_of(shard)[kind])
    full = model.space.full
    return {**seen, **{kind: hf_tensors(model, full, values.__getitem__) for kind, values in gathered.items()}}


def _train(engine: Engine, ranks, case: Case, num_steps: int) -> dict:
    batches = micro_batches(case, ranks.size)
    is_managed = case.without in ("own_accumulation", "both")
    if is_managed:
        for group in engine.deepspeed.optimizer.param_groups:
            group["lr"] = case.optim.learning_rate
    else:
        engine.warm_up(blank(ROWS_PER_RANK, ROW_TOKENS))
    seen = {
        "laid_out": is_laid_out(engine.model),
        "released": False,
        "reduces_in_backward": 0,
        "gathers": 0,
        "norms": [],
    }
    steps = batches[:num_steps]
    for step in steps:
        trained = [own for micro_batch in flat(step) for own in passes(case, micro_batch)]
        num_targets = sum(int((labels != -100).sum()) for _, _, labels in trained)
        for share in step:
            own_targets = int((share[ranks.rank][2] != -100).sum()) * len(step) * ranks.size
            denominator = own_targets if case.without == "summed_loss" else num_targets
            if case.taught:
                outcome = engine.forward(batch(*share[ranks.rank][1:]), Pass(LARGE, "teach"))
                seen["taught"] = float(outcome.states.square().mean())
            for own in passes(case, share[ranks.rank]):
                _one_micro_batch(engine, own, denominator, seen)
            if case.evaluate_between:
                engine.evaluate(batch(*share[ranks.rank][1:]), LARGE)
            if is_managed:
                engine.deepspeed.step()
        if is_managed:
            engine._clear_accumulators()
        else:
            if step is steps[-1]:
                seen["before"] = gather_masters(engine, ranks)
            seen["norms"].append(engine.step(case.optim.learning_rate))
    seen["invalidated"] = engine._traces.num_invalidated if engine.stage == 3 else 0
    return seen


def _one_micro_batch(engine: Engine, micro_batch: reference.MicroBatch, num_targets: int, seen: dict) -> None:
    subnet, ids, labels = micro_batch
    with counted() as traffic:
        loss = engine.forward(batch(ids, labels), Pass(subnet)).loss
        seen["gathers"] += traffic.calls["gather"]
        mlp = engine.model.model.layers[0].mlp
        seen["released"] |= engine.stage == 3 and mlp.bundles[0].weight.numel() == 0
        engine.backward(loss / num_targets)
        num_reduces = traffic.calls["reduce"] + traffic.calls["scatter"]
        seen["reduces_in_backward"] = max(seen["reduces_in_backward"], num_reduces)


def gather_masters(engine, ranks) -> dict[str, torch.Tensor]:
    """The fp32 master weights under the nested model's names."""
    return gather_state(engine, ranks, lambda shard: shard.view(shard.flat))


def gather_state(engine, ranks, value_of) -> dict[str, torch.Tensor]:
    """Master weights or moments under the nested model's names, put together from every rank's shards."""
    pieces = [(s.name, s.start, value_of(s).cpu().clone()) for s in engine.shards()]
    everyone: list = [None] * ranks.size
    dist.all_gather_object(everyone, pieces)
    parameters, shapes = dict(engine.model.named_parameters()), {}
    for name, contents in contents_of(engine.model).items():
        shape = getattr(parameters[name], "ds_shape", parameters[name].shape)
        for part, size in zip(contents.names, contents.numels, strict=True):
            shapes[part] = shape if contents.bundle is None else (size // shape[1], shape[1])
    whole = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    for name, start, values in (piece for pieces in everyone for piece in pieces):
        whole[name].view(-1)[start : start + len(values)] = values
    return whole


def run_cases(ranks, cases: list[Case], num_steps: int) -> dict[str, dict]:
    """Every case in one process: engines are rebuilt inside."""
    return {case.name: copy.deepcopy(run_engine(ranks, case, num_steps)) for case in cases}


def largest_difference(a: dict, b: dict) -> float:
    """Not a number where any of them is none: `max` of Python would pass it over."""
    return float(torch.stack([(a[name].float() - b[name].float()).abs().max() for name in a]).max())

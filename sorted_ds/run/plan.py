"""Computes the plan of a run: what it will do and cost, before it uses any GPU time.

In: a checked run file and a number of ranks. Out: a `Plan`, which holds each sub-network with its expected visits and
tokens; the rows and forward passes of a step; the training FLOPs, and those of training every sub-network separately;
the memory of the model states at each ZeRO stage; and warnings. Nothing is tokenised or trained, and no memory is
allocated for weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sorted_ds.data.loader import deal
from sorted_ds.engine.modes import STAGES, has_offloaded_weights, is_bf16, is_offloaded, mode_warnings, stage_of
from sorted_ds.families import family_of
from sorted_ds.nested import costs_of, union_parameters
from sorted_ds.nested.costs import head_flops
from sorted_ds.run.build import sampler_of
from sorted_ds.run.checks import warnings_of
from sorted_ds.run.config import FULL_TEACHES, Run
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.run.teacher import space_of_teacher, teacher_config
from sorted_ds.run.traffic import REUSE_DISTANCE, StepSizes, step_traffic
from sorted_ds.space import Cost, Sampler, SubNet, SubNetSpace

FEWEST_VISITS = 100
"""With fewer expected visits, the weights that only this sub-network and larger ones have are hardly trained."""
SAMPLED_STEPS = 100
"""The expected traffic, and what the terms of the loss cost, are means over at most this number of steps of the run."""
FORWARD_AND_BACKWARD = 3
"""FLOPs of a forward and a backward pass, in forward passes. Activation checkpointing adds one more."""
WEIGHT_BYTES, MOMENT_BYTES = 4, {"adamw": 8, "sgd": 0}
"""Bytes per parameter of the fp32 weights, and of the optimizer's fp32 moments."""


@dataclass(frozen=True)
class PlannedSubNet:
    """One sub-network, what it costs, and how often the run is expected to train it."""

    subnet: str
    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    kv_bytes_per_token: int
    share_of_samples: float
    """The share of this sub-network among all that the run samples."""
    visits: float
    """How many steps of the run are expected to sample it."""
    tokens: float
    """How many tokens of the run are expected to train it."""


@dataclass(frozen=True)
class TrainingFlops:
    """The expected FLOPs of all forward and backward passes of a run, without the optimizer."""

    forwards: int
    """The cost of training on a micro-batch, in forward passes: 3, or 4 with activation checkpointing."""
    sampled: float
    """The sampled sub-networks: `forwards` x forward FLOPs x tokens. Training each sub-network separately on as many
    tokens as it has in this run costs the same."""
    teacher: float
    """The passes of a teacher, and its predictions."""
    exits: float
    """The head at the exits of the passes."""
    dropped: float
    """What layer dropout saves."""
    full_alone: float
    """Training only the full network on all tokens of the run."""
    each_alone: float
    """Training every sub-network separately, each on all tokens of the run."""

    @property
    def run(self) -> float:
        """All of this run."""
        return self.sampled + self.teacher + self.exits - self.dropped


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of the model states: ZeRO's formula with this project's settings.

    At stage 0 each rank keeps all model states. Stage 1 divides the optimizer's part among the ranks, stage 2 also the
    gradients, stage 3 also the weights. Source: ZeRO, arXiv 1910.02054, section 5.
    """

    weights: int
    gradients: int
    optimizer: int
    """The optimizer's moments, and the fp32 master weights, which stage 0 in fp32 does not have."""

    def per_rank(self, stage: int, num_parameters: int, num_ranks: int) -> float:
        """Returns the bytes on each rank."""
        parts = (self.optimizer, self.gradients, self.weights)
        shared, kept = sum(parts[:stage]), sum(parts[stage:])
        return num_parameters * (kept + shared / num_ranks)

    def between_steps(self, stage: int, bf16: bool, num_parameters: int, num_ranks: int) -> float:
        """Returns the bytes on each rank between two steps.

        Gradients count only at stage 3, and at stage 1 in bf16, where DeepSpeed keeps their memory between steps.
        """
        held = self if stage == 3 or (stage == 1 and bf16) else replace(self, gradients=0)
        return held.per_rank(stage, num_parameters, num_ranks)


@dataclass(frozen=True)
class Memory:
    """The model states on each GPU at each stage. Activations, buffers and gathered layers need memory in addition."""

    precision: str
    offload: bool
    """Whether the optimizer's part is in host memory, which is not counted."""
    chosen_stage: int
    """The stage of this run."""
    bytes_per_parameter: dict[int, StateBytes]
    bytes_per_rank: dict[int, float]
    """Without another model that teaches."""
    teacher_bytes: int
    """The weights of another model that teaches, which each rank holds whole."""


@dataclass(frozen=True)
class Plan:
    """Everything that `sorted-ds plan` prints."""

    subnets: tuple[PlannedSubNet, ...]
    num_ranks: int
    steps: int
    """The number of steps that are trained: those of `train.skip_steps` are not."""
    subnets_per_step: int
    rows_per_subnet: int
    tokens_per_step: int
    forwards_per_subnet: int
    """Forward passes on each rank for one sampled sub-network."""
    rows_per_forward: int
    padded_fraction: float
    """The fraction of the rows in forward passes that are padding and have no targets."""
    flops: TrainingFlops
    memory: Memory
    sent_bytes: dict[int, float]
    """The mean number of bytes that each rank sends in an optimizer step, at each ZeRO stage."""
    checkpoint_bytes: int
    """The size of a checkpoint, of which each rank writes an equal part: fp32 weights and moments, at every stage."""
    warnings: tuple[str, ...]


def make_plan(run: Run, space: SubNetSpace, config, num_ranks: int) -> Plan:
    """Returns the plan of a checked run. `space` and `config` are what `build.check_run` returned."""
    family = family_of(config.model_type)
    costs = costs_of(space, family, config, run.batch.row_tokens)
    sampler = sampler_of(run, space, costs)
    skipped = set(run.train.skip_steps)
    num_steps = run.train.steps - len(skipped)
    visits = sampler.expected_visits(run.train.steps, skipped)
    rows = sampler.expected_visits(run.train.steps, skipped, lambda phase: run.batch.step_rows / phase.num_shares)
    dealt = deal(run.batch.step_rows, sampler.num_shares(0), run.batch.micro_batch_rows, num_ranks)
    num_visits = sum(visits.values())
    engine = load_engine_config(run.engine.deepspeed)
    other = teacher_cost(run)
    planned = []
    for subnet in space:
        cost = costs[subnet]
        planned.append(
            PlannedSubNet(
                subnet.name,
                cost.parameters,
                cost.non_embedding_parameters,
                cost.flops_per_token,
                cost.kv_bytes_per_token,
                visits[subnet] / num_visits,
                visits[subnet],
                rows[subnet] * run.batch.row_tokens,
            )
        )
    return Plan(
        subnets=tuple(planned),
        num_ranks=num_ranks,
        steps=num_steps,
        subnets_per_step=run.sampling.subnets_per_step,
        rows_per_subnet=dealt.rows_per_share,
        tokens_per_step=run.batch.step_rows * run.batch.row_tokens,
        forwards_per_subnet=dealt.forwards,
        rows_per_forward=dealt.rows_per_forward,
        padded_fraction=dealt.padded_fraction,
        flops=training_flops(
            planned,
            num_steps * run.batch.step_rows * run.batch.row_tokens,
            FORWARD_AND_BACKWARD + run.model.activation_checkpointing,
            extra_flops(run, sampler, costs, head_flops(family, config), other),
        ),
        memory=memory(engine, run.optim.name, planned[-1].parameters, num_ranks, other.parameters if other else 0),
        sent_bytes=sent_bytes(run, engine, sampler, config, costs, num_ranks),
        checkpoint_bytes=planned[-1].parameters * (WEIGHT_BYTES + MOMENT_BYTES[run.optim.name]),
        warnings=(*warnings_of(run, config), *warnings(planned), *mode_warnings(engine, torch.cuda.is_available())),
    )


def teacher_cost(run: Run) -> Cost | None:
    """Returns the costs of another model that teaches, or None."""
    config = teacher_config(run)
    if config is None:
        return None
    space = space_of_teacher(config)
    return costs_of(space, family_of(config.model_type), config, run.batch.row_tokens)[space.full]


@dataclass(frozen=True)
class ExtraFlops:
    """FLOPs for each token of the step's rows, beside those of the sampled sub-networks."""

    teacher: float = 0.0
    exits: float = 0.0
    dropped: float = 0.0


def extra_flops(run: Run, sampler: Sampler, costs: Mapping[SubNet, Cost], head: int, other: Cost | None) -> ExtraFlops:
    """Returns what the terms of the loss cost or save, as the mean over steps that are spread over the run.

    `head`: the forward FLOPs of the head for a token. `other`: the costs of another model that teaches.
    """
    forwards = FORWARD_AND_BACKWARD + run.model.activation_checkpointing
    teacher, exits, dropped = 0.0, 0.0, 0.0
    steps = sampled_steps(run)
    for step in steps:
        shares = sampler.num_shares(step)
        teacher += other.flops_per_token if other else 0.0
        for planned in sampler.plan(step):
            each, flops = planned.pass_, costs[planned.pass_.subnet].flops_per_token
            if not each.has_gradient:
                teacher += (flops - head) / shares
                continue
            learns_from_full = run.loss.teacher == FULL_TEACHES and each.subnet != sampler.full
            teacher += head / shares if learns_from_full else 0.0
            exits += FORWARD_AND_BACKWARD * head * len(each.exits) / shares
            dropped += forwards * (flops - head) / each.subnet.depth * len(each.dropped) / shares
    return ExtraFlops(teacher / len(steps), exits / len(steps), dropped / len(steps))


def sampled_steps(run: Run) -> range:
    """Returns at most `SAMPLED_STEPS` steps that are spread over the run."""
    return range(0, run.train.steps, -(-run.train.steps // SAMPLED_STEPS))


def training_flops(
    subnets: Sequence[PlannedSubNet], num_tokens: int, forwards: int, extra: ExtraFlops
) -> TrainingFlops:
    """Returns the FLOPs of a run on `num_tokens` tokens whose micro-batches cost `forwards` forward passes each.

    `subnets`: in ascending order, the full network last.
    """
    return TrainingFlops(
        forwards=forwards,
        sampled=forwards * sum(s.flops_per_token * s.tokens for s in subnets),
        teacher=extra.teacher * num_tokens,
        exits=extra.exits * num_tokens,
        dropped=extra.dropped * num_tokens,
        full_alone=forwards * float(subnets[-1].flops_per_token) * num_tokens,
        each_alone=forwards * float(sum(s.flops_per_token for s in subnets)) * num_tokens,
    )


def memory(engine: dict, optimizer: str, num_parameters: int, num_ranks: int, num_teacher: int = 0) -> Memory:
    """Returns the memory of the model states at each ZeRO stage, in the precision of the engine keys."""
    bf16 = is_bf16(engine)
    offload = (is_offloaded(engine), has_offloaded_weights(engine))
    sizes = {stage: state_bytes(stage, bf16, optimizer, *offload) for stage in STAGES}
    return Memory(
        precision="bf16" if bf16 else "fp32",
        offload=is_offloaded(engine),
        chosen_stage=stage_of(engine),
        bytes_per_parameter=sizes,
        bytes_per_rank={stage: size.per_rank(stage, num_parameters, num_ranks) for stage, size in sizes.items()},
        teacher_bytes=num_teacher * (2 if bf16 else 4),
    )


def sent_bytes(
    run: Run, engine: dict, sampler: Sampler, config, costs: dict[SubNet, Cost], num_ranks: int
) -> dict[int, float]:
    """Returns the bytes that a rank sends in a step at each ZeRO stage, as the mean over steps spread over the run."""
    distance = engine.get("zero_optimization", {}).get("stage3_max_reuse_distance", REUSE_DISTANCE)
    full = costs[sampler.full].parameters
    numbers = sampled_steps(run)
    plans = [[planned.pass_ for planned in sampler.plan(step)] for step in numbers]
    steps = [[each.subnet for each in passes if each.has_gradient] for passes in plans]
    unions = union_parameters(steps, family_of(config.model_type), config)
    sizes = []
    for number, passes, sampled, union in zip(numbers, plans, steps, unions, strict=True):
        dealt = deal(run.batch.step_rows, sampler.num_shares(number), run.batch.micro_batch_rows, num_ranks)
        teachers = sum(costs[each.subnet].parameters for each in passes if not each.has_gradient)
        sizes.append(StepSizes([costs[s].parameters for s in sampled], union, dealt.forwards, teachers))

    def mean_sent(stage: int) -> float:
        traffic = [
            step_traffic(stage, is_bf16(engine), full, size, int(distance), run.model.activation_checkpointing)
            for size in sizes
        ]
        return sum(each.sent(num_ranks) for each in traffic) / len(traffic)

    return {stage: mean_sent(stage) for stage in STAGES}


def state_bytes(
    stage: int, bf16: bool, optimizer: str, offload: bool = False, offload_weights: bool = False
) -> StateBytes:
    """Returns the bytes per parameter of the model states on GPUs.

    Weights and gradients have 4 bytes in fp32. In bf16 weights have 2 bytes, and gradients have 4, because they are
    accumulated in fp32; at stage 0 they have 2. AdamW keeps two fp32 moments, SGD none. DeepSpeed keeps fp32 master
    weights, except at stage 0 in fp32. `offload` moves the optimizer's part into host memory at stages 1 to 3, and
    `offload_weights` the weights at stage 3.
    """
    masters = WEIGHT_BYTES if bf16 or stage else 0
    on_gpu = 0 if offload and stage else masters + MOMENT_BYTES[optimizer]
    weights = 0 if offload_weights and stage == 3 else 2 if bf16 else 4
    return StateBytes(weights, 2 if bf16 and stage == 0 else 4, on_gpu)


def warnings(subnets: Sequence[PlannedSubNet]) -> tuple[str, ...]:
    """Returns what the user should know before the start: sub-networks that are hardly trained."""
    rare = [s for s in subnets if s.visits < FEWEST_VISITS]
    if not rare:
        return ()
    rarest = min(rare, key=lambda s: s.visits)
    return (
        f"{len(rare)} of {len(subnets)} sub-networks are expected to get fewer than {FEWEST_VISITS} visits "
        f"(fewest: {rarest.subnet}, {rarest.visits:.0f}). Raise train.steps or sampling.subnets_per_step, or make "
        "the space smaller.",
    )

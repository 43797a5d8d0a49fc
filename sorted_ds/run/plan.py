"""The plan: what a run will do and cost, before any of it is spent.

In: a run file and a number of ranks. Out: a `Plan`: each sub-network with its expected visits and tokens; the step's
arithmetic; training FLOPs against training every size by itself; memory of the model states for each ZeRO stage; and
warnings. Nothing is tokenised or trained, and no weight gets memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sorted_ds.data.loader import deal
from sorted_ds.engine.modes import STAGES, has_offloaded_weights, is_bf16, is_offloaded, mode_warnings, stage_of
from sorted_ds.families import family_of
from sorted_ds.nested import costs_of, union_parameters
from sorted_ds.run.build import sampler_of
from sorted_ds.run.config import Run
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.run.traffic import REUSE_DISTANCE, Samples, step_traffic
from sorted_ds.space import Cost, Sampler, SubNet, SubNetSpace

FEWEST_VISITS = 100
"""Below this many expected samples a sub-network's own weights have hardly been trained."""
SAMPLED_STEPS = 100
"""Steps whose samples stand for all in the expected traffic."""
FORWARD_AND_BACKWARD = 3
"""Times the forward pass's FLOPs: the backward pass costs two, and with activation checkpointing one more."""


@dataclass(frozen=True)
class PlannedSubNet:
    """One sub-network, what it costs, and how often it will be active."""

    subnet: str
    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    kv_bytes_per_token: int
    share_of_samples: float
    visits: float
    """Expected samples over the run."""
    tokens: float
    """Expected training tokens over the run."""


@dataclass(frozen=True)
class TrainingFlops:
    """Forward and backward passes of the whole run, without the optimizer; expected values."""

    forwards: int
    """What a micro-batch costs, in forward passes: 3, and with activation checkpointing 4."""
    run: float
    """This run: `forwards` x forward FLOPs x tokens, summed over the expected samples. Training each sub-network alone
    for as many tokens as this run samples it costs exactly as much."""
    full_alone: float
    """The full network by itself on all of the run's tokens."""
    each_alone: float
    """Every sub-network by itself, each on all of the run's tokens."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of the model states: ZeRO's formula with this project's settings.

    Stage 0 keeps all of it on each rank; 1 shares out the optimizer's part, 2 the gradients too, 3 the weights too.
    Source: ZeRO, arXiv 1910.02054, section 5.
    """

    weights: int
    gradients: int
    optimizer: int
    """fp32 master weights (none at stage 0 in fp32) and the moments."""

    def per_rank(self, stage: int, num_parameters: int, num_ranks: int) -> float:
        parts = (self.optimizer, self.gradients, self.weights)
        shared, kept = sum(parts[:stage]), sum(parts[stage:])
        return num_parameters * (kept + shared / num_ranks)

    def between_steps(self, stage: int, bf16: bool, num_parameters: int, num_ranks: int) -> float:
        """Without gradients, except where they have memory of their own from step to step."""
        held = self if stage == 3 or (stage == 1 and bf16) else replace(self, gradients=0)
        return held.per_rank(stage, num_parameters, num_ranks)


@dataclass(frozen=True)
class Memory:
    """Model states per GPU at each stage. Activations, buffers and gathered layers come on top."""

    precision: str
    offload: bool
    """The optimizer's part is on the CPU, not counted."""
    chosen_stage: int
    bytes_per_parameter: dict[int, StateBytes]
    bytes_per_rank: dict[int, float]


@dataclass(frozen=True)
class Plan:
    """Everything that `sorted-ds plan` prints."""

    subnets: tuple[PlannedSubNet, ...]
    num_ranks: int
    steps: int
    subnets_per_step: int
    rows_per_subnet: int
    tokens_per_step: int
    forwards_per_subnet: int
    """Forward passes of each rank for one sampled sub-network."""
    rows_per_forward: int
    padded_fraction: float
    """Rows without targets among those that run."""
    flops: TrainingFlops
    memory: Memory
    sent_bytes: dict[int, float]
    """What each rank sends in an optimizer step at each ZeRO stage, on average."""
    checkpoint_bytes: int
    """Of one, over all ranks, which write equal shares: fp32 weights and moments, at every stage."""
    warnings: tuple[str, ...]


def make_plan(run: Run, space: SubNetSpace, config, num_ranks: int) -> Plan:
    """The plan of a checked run; `space` and `config` as `build.check_run` gives them."""
    family = family_of(config.model_type)
    costs = costs_of(space, family, config, run.batch.row_tokens)
    sampler = sampler_of(run, costs)
    visits = sampler.expected_visits(run.train.steps)
    dealt = deal(run.batch.step_rows, sampler.num_shares, run.batch.micro_batch_rows, num_ranks)
    num_visits = sum(visits.values())
    engine = load_engine_config(run.engine.deepspeed)
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
                visits[subnet] * dealt.rows_per_share * run.batch.row_tokens,
            )
        )
    return Plan(
        subnets=tuple(planned),
        num_ranks=num_ranks,
        steps=run.train.steps,
        subnets_per_step=run.sampling.subnets_per_step,
        rows_per_subnet=dealt.rows_per_share,
        tokens_per_step=run.batch.step_rows * run.batch.row_tokens,
        forwards_per_subnet=dealt.forwards,
        rows_per_forward=dealt.rows_per_forward,
        padded_fraction=dealt.padded_fraction,
        flops=training_flops(
            planned,
            run.train.steps * run.batch.step_rows * run.batch.row_tokens,
            FORWARD_AND_BACKWARD + run.model.activation_checkpointing,
        ),
        memory=memory(engine, run.optim.name, planned[-1].parameters, num_ranks),
        sent_bytes=sent_bytes(run, engine, sampler, config, costs, dealt.forwards, num_ranks),
        checkpoint_bytes=planned[-1].parameters * (12 if run.optim.name == "adamw" else 4),
        warnings=(*warnings(planned), *mode_warnings(engine, torch.cuda.is_available())),
    )


def training_flops(subnets: Sequence[PlannedSubNet], num_tokens: int, forwards: int) -> TrainingFlops:
    """`subnets` ascending, the full one last; `num_tokens` of the whole run; a micro-batch costs `forwards` of them."""
    return TrainingFlops(
        forwards=forwards,
        run=forwards * sum(s.flops_per_token * s.tokens for s in subnets),
        full_alone=forwards * float(subnets[-1].flops_per_token) * num_tokens,
        each_alone=forwards * float(sum(s.flops_per_token for s in subnets)) * num_tokens,
    )


def memory(engine: dict, optimizer: str, num_parameters: int, num_ranks: int) -> Memory:
    """Model states per rank at each ZeRO stage, in the precision of the engine's settings."""
    bf16 = is_bf16(engine)
    offload = (is_offloaded(engine), has_offloaded_weights(engine))
    sizes = {stage: state_bytes(stage, bf16, optimizer, *offload) for stage in STAGES}
    return Memory(
        precision="bf16" if bf16 else "fp32",
        offload=is_offloaded(engine),
        chosen_stage=stage_of(engine),
        bytes_per_parameter=sizes,
        bytes_per_rank={stage: size.per_rank(stage, num_parameters, num_ranks) for stage, size in sizes.items()},
    )


def sent_bytes(
    run: Run, engine: dict, sampler: Sampler, config, costs: dict[SubNet, Cost], forwards: int, num_ranks: int
) -> dict[int, float]:
    """Bytes that a rank sends in a step at each stage, averaged over the samples of the first steps."""
    distance = engine.get("zero_optimization", {}).get("stage3_max_reuse_distance", REUSE_DISTANCE)
    full = costs[sampler.full].parameters
    steps = [sampler.sample(step) for step in range(min(SAMPLED_STEPS, run.train.steps))]
    unions = union_parameters(steps, family_of(config.model_type), config)
    sampled = [Samples([costs[s].parameters for s in step], u, forwards) for step, u in zip(steps, unions, strict=True)]
    settings = (is_bf16(engine), full)
    kept = (int(distance), run.model.activation_checkpointing)
    return {
        stage: sum(step_traffic(stage, *settings, samples, *kept).sent(num_ranks) for samples in sampled) / len(steps)
        for stage in STAGES
    }


def state_bytes(
    stage: int, bf16: bool, optimizer: str, offload: bool = False, offload_weights: bool = False
) -> StateBytes:
    """fp32 weights and gradients are 4 bytes; bf16 weights 2, gradients 4 (accumulated in fp32; at stage 0 in bf16: 2).

    AdamW keeps two fp32 moments, SGD none. DeepSpeed keeps fp32 master weights, except at stage 0 in fp32. With offload
    the optimizer's part, and at stage 3 the weights, are on the CPU, at the stages that can.
    """
    moments = 8 if optimizer == "adamw" else 0
    masters = 4 if bf16 or stage else 0
    on_gpu = 0 if offload and stage else masters + moments
    weights = 0 if offload_weights and stage == 3 else 2 if bf16 else 4
    return StateBytes(weights, 2 if bf16 and stage == 0 else 4, on_gpu)


def warnings(subnets: Sequence[PlannedSubNet]) -> tuple[str, ...]:
    """What the user should know before starting."""
    few = [s for s in subnets if s.visits < FEWEST_VISITS]
    if not few:
        return ()
    fewest = min(few, key=lambda s: s.visits)
    return (
        f"{len(few)} of {len(subnets)} sub-networks are expected fewer than {FEWEST_VISITS} visits (fewest: "
        f"{fewest.subnet}, {fewest.visits:.0f}). Train more steps, raise "
        "sampling.subnets_per_step, or make the space smaller.",
    )

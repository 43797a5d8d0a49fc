"""What the tests of weighted losses run: the loop's passes through the engine, and the same in plain PyTorch.

The reference runs each exit as a sub-network of its own on the whole Hugging Face model with masks, computes all logits
at once, and lets autograd do the rest. It shares only the plan of a step with the code under test: which passes run,
with which exits, and which layers they leave out (tests/space/test_passes.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sorted_ds.data.loader import NO_TARGET, MicroBatch
from sorted_ds.engine import Engine
from sorted_ds.families import nest
from sorted_ds.run.teacher import Teaching
from sorted_ds.run.train import accumulate, count_targets
from sorted_ds.space import LossPasses, Pass, Planned, Policy, Sampler, SubNetSpace
from sorted_ds.tasks.losses import Terms
from tests import cover, exactness, reference
from tests.batches import TASK, batch, blank
from tests.exactness import DEEP, MIDDLE, ORDER, ORDERED_SPACE, ROW_TOKENS, ROWS_PER_RANK, SMALL, SPACE, VOCAB, Case

NUM_RANKS = 2
MICRO_BATCHES = 2
"""Micro-batches of each share on each rank: a lesson must not outlive its rows."""
SEED = 3


@dataclass(frozen=True)
class Loss:
    """What `[loss]` of a run file sets."""

    teacher: str = ""
    """`full`, or `other` for a model of another width and depth."""
    temperature: float = 1.0
    exit_weight: float = 0.0
    exit_rate: float = 1.0
    layer_dropout: float = 0.0

    @property
    def terms(self) -> Terms | None:
        return Terms(0.3, self.temperature, self.exit_weight) if self.teacher or self.exit_weight else None


LOSSES = {
    "plain": Loss(),
    "full_teaches": Loss("full"),
    "full_teaches_at_2": Loss("full", temperature=2.0),
    "other_teaches": Loss("other", temperature=1.5),
    "exits": Loss(exit_weight=0.3),
    "dropout": Loss(layer_dropout=0.7),
    "full_teaches_exits_dropout": Loss("full", exit_weight=0.5, layer_dropout=0.7),
    "other_teaches_exits": Loss("other", exit_weight=1.0, exit_rate=0.6),
}
POLICIES: dict[str, dict[int, Policy]] = {
    "full_plus": {0: Policy(strategy="full_plus")},
    "stratified": {0: Policy(strategy="stratified")},
    "uniform": {0: Policy(strategy="uniform")},
    "sandwich": {0: Policy(strategy="sandwich")},
    "full_shares": {0: Policy(strategy="full_plus", full_shares=2)},
    "pairs_on_the_same_rows": {0: Policy(strategy="full_plus", subnets_per_share=2)},
    "all_on_the_same_rows": {0: Policy(strategy="sandwich", subnets_per_share=4)},
    "weights": {0: Policy(strategy="stratified", weights={SMALL: 1.0, MIDDLE: 2.5, DEEP: 0.5})},
    "hold": {0: Policy(strategy="uniform", hold_steps=2)},
    "phases": {0: Policy(2, "full"), 1: Policy(3, "full_plus"), 2: Policy(strategy="sandwich", subnets_per_share=2)},
}
"""The policy of each phase, by the step at which it begins."""
FACTORS = {
    "loss": tuple(LOSSES),
    "policy": tuple(POLICIES),
    **{name: cover.FACTORS[name] for name in ("stage", "offload", "precision", "overlap", "tied", "checkpointing")},
    "optimizer": ("sgd", "adamw"),
    "ordered": (False, True),
}


@dataclass(frozen=True)
class LossCase:
    """One mode of the engine, a loss and a policy."""

    mode: Case
    loss: str
    policy: str

    @property
    def name(self) -> str:
        return f"{self.mode.name}-{self.loss}-{self.policy}"

    @property
    def terms(self) -> Terms | None:
        return LOSSES[self.loss].terms

    @property
    def teacher(self) -> str:
        return LOSSES[self.loss].teacher

    @property
    def space(self) -> SubNetSpace:
        return ORDERED_SPACE if self.mode.ordered else SPACE

    @property
    def sampler(self) -> Sampler:
        loss = LOSSES[self.loss]
        passes = LossPasses(self.teacher == "full", loss.exit_rate if loss.exit_weight else 0.0, loss.layer_dropout)
        first, *later = POLICIES[self.policy].items()
        return Sampler(list(self.space), first[1], SEED, dict(later), passes, self.space)


def settings() -> Iterator[cover.Setting]:
    """Yields every combination that the engine accepts."""
    for values in product(*FACTORS.values()):
        setting = dict(zip(FACTORS, values, strict=True))
        if cover.is_allowed(setting):
            yield setting


def case_of(setting: cover.Setting) -> LossCase:
    mode = {name: value for name, value in setting.items() if name not in ("loss", "policy", "ordered")}
    case = cover.mode_of({**mode, "num_ranks": NUM_RANKS}).case
    return LossCase(replace(case, ordered=setting["ordered"]), setting["loss"], setting["policy"])


def bounds(case: LossCase) -> cover.Error:
    return cover.bounds(cover.Mode(NUM_RANKS, case.mode))


def other_teacher() -> PreTrainedModel:
    """Has another width and depth than the network that learns, and two rows more in its head."""
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB + 2,
    )
    torch.manual_seed(8)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1) * 0.5, std=0.3)
    return model.eval().requires_grad_(False)


def rows_of(step: int, share: int, micro_batch: int, rank: int) -> tuple[Tensor, Tensor]:
    """Returns ids and labels. Ranks and micro-batches have other rows, and other numbers of targets."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * share + 10 * micro_batch + rank)
    ids = torch.randint(0, VOCAB, (ROWS_PER_RANK, ROW_TOKENS + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.15 + 0.2 * rank] = NO_TARGET
    return ids[:, :-1], labels


# The engine


def run_cases(ranks, cases: list[LossCase], num_steps: int) -> dict[str, dict]:
    return {case.name: run_case(ranks, case, num_steps) for case in cases}


def run_case(ranks, case: LossCase, num_steps: int) -> dict:
    """Trains as the loop does; returns weights, gradient norms, and the losses that rank 0 reported."""
    model = exactness.plain_model(case.mode)
    if case.mode.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = nest(model, case.space)
    config, optim = case.mode.deepspeed(), case.mode.optim
    engine = Engine(model, TASK, config, "test.json", optim, ROWS_PER_RANK, ranks, case.mode.compile, case.terms)
    engine.warm_up(blank(ROWS_PER_RANK, ROW_TOKENS))
    teaching, norms, reported = teaching_of(case), [], []
    for step in range(num_steps):
        plan = case.sampler.plan(step)
        batches = [
            [_micro_batch(*rows_of(step, share, number, ranks.rank)) for number in range(MICRO_BATCHES)]
            for share in range(case.sampler.num_shares(step))
        ]
        num_targets = ranks.sum([count_targets(plan, batches)])[0]
        losses = accumulate(engine, plan, batches, num_targets, teaching)
        reported += [(str(each.pass_), float(each.nll), _parts(each)) for each in losses]
        norms.append(engine.step(optim.learning_rate))
    weights = exactness.gather_masters(engine, ranks)
    weights = exactness.hf_tensors(model, model.space.full, weights.__getitem__)
    invalidated = engine._traces.num_invalidated if engine.stage == 3 else 0
    return {"weights": weights, "norms": norms, "reported": reported, "invalidated": invalidated}


def teaching_of(case: LossCase) -> Teaching:
    if case.teacher == "full":
        return Teaching(full=case.space.full)
    if case.teacher:
        teacher = other_teacher()
        full = SubNetSpace.grid(depths=[2], groups=[1], ffn=[40])
        return Teaching(other=nest(teacher, full), task=TASK)
    return Teaching()


def _micro_batch(ids: Tensor, labels: Tensor) -> MicroBatch:
    return MicroBatch(batch(ids, labels), int((labels != NO_TARGET).sum()), ROWS_PER_RANK)


def _parts(each) -> tuple:
    return () if each.parts is None else (each.parts.nll.tolist(), each.parts.divergence.tolist())


# Plain PyTorch


def reference_weights(case: LossCase, num_ranks: int, num_steps: int) -> dict:
    """Returns the weights and gradient norms of plain PyTorch, and the losses of rank 0's passes."""
    model, teacher = exactness.plain_model(case.mode), other_teacher()
    optimizer, norms, reported = reference.optimizer_of(model, case.mode.optim), [], []
    for step in range(num_steps):
        losses, num_targets = [], 0
        for share, number in ((s, n) for s in range(case.sampler.num_shares(step)) for n in range(MICRO_BATCHES)):
            for rank in range(num_ranks):
                ids, labels = rows_of(step, share, number, rank)
                lesson = teacher_logits(model, teacher, case, ids)
                for run in trained(case.sampler.plan(step), share):
                    loss, parts = weighted_loss(model, case, run, ids, labels, lesson)
                    losses.append(loss)
                    num_targets += int((labels != NO_TARGET).sum())
                    reported += [(str(run), parts[0][-1], parts)] if rank == 0 else []
        model.zero_grad()
        (torch.stack(losses).sum() / num_targets).backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        max_norm = case.mode.clip_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
    return {"weights": model.state_dict(), "norms": norms, "reported": reported}


def trained(plan: list[Planned], share: int) -> list[Pass]:
    return [planned.pass_ for planned in plan if planned.share == share and planned.pass_.has_gradient]


@torch.no_grad()
def teacher_logits(model: PreTrainedModel, teacher: PreTrainedModel, case: LossCase, ids: Tensor) -> Tensor | None:
    if case.teacher == "full":
        return model(input_ids=ids, use_cache=False).logits
    return teacher(input_ids=ids, use_cache=False).logits[..., :VOCAB] if case.teacher else None


def weighted_loss(
    model: PreTrainedModel, case: LossCase, pass_: Pass, ids: Tensor, labels: Tensor, lesson: Tensor | None
) -> tuple[Tensor, tuple[list[float], list[float]]]:
    """Returns the weighted loss of a pass, and its parts: the loss and the divergence at each exit."""
    order = ORDER if case.mode.ordered else ()
    learns = lesson is not None and not (case.teacher == "full" and pass_.subnet == case.space.full)
    weights = [LOSSES[case.loss].exit_weight] * len(pass_.exits) + [1.0]
    total, nlls, divergences = torch.zeros(()), [], []
    for depth, weight in zip([*pass_.exits, pass_.subnet.depth], weights, strict=True):
        with reference.masked_to(model, pass_.subnet.replace(d=depth), order, pass_.dropped):
            logits = model(input_ids=ids, use_cache=False).logits
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=NO_TARGET)
        divergence = torch.zeros(())
        if learns:
            t, kept = LOSSES[case.loss].temperature, labels != NO_TARGET
            own, taught = F.log_softmax(logits[kept] / t, -1), F.log_softmax(lesson[kept] / t, -1)
            divergence = F.kl_div(own, taught, reduction="sum", log_target=True) * t**2
        share = 0.3 if learns else 0.0
        total = total + weight / sum(weights) * ((1 - share) * nll + share * divergence)
        nlls.append(float(nll.detach()))
        divergences.append(float(divergence.detach()))
    return total, (nlls, divergences)

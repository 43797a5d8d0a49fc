"""What tests add through each seam: a family, a task and two strategies that nothing in the package knows of.

The family `toy` has other paths, another head, no attention, the axes `d` and `w`, a persistent buffer, and a final
norm that each depth owns. Inside `registered()` this process knows all of it.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from sorted_ds.cluster.ranks import Ranks
from sorted_ds.cluster.watchdog import Watchdog
from sorted_ds.data.loader import NO_TARGET, Batch, MicroBatch
from sorted_ds.engine import Engine
from sorted_ds.families import FAMILIES
from sorted_ds.nested.family import Family, Half, LogitsRule, Part
from sorted_ds.run.run_file import load_run
from sorted_ds.run.train import shared_data, train
from sorted_ds.space import Pass, Planned, SubNet, SubNetSpace
from sorted_ds.space.sampling import STRATEGIES, PolicySampler, Strategy
from sorted_ds.tasks import LOSS, TASKS, Metric
from sorted_ds.tasks.causal_lm import CausalLM
from sorted_ds.tasks.task import Sums, mean_of

SEEN_RATE = 0.1


class ToyConfig(PreTrainedConfig):
    """A stack of gated mixers."""

    model_type = "toy"

    def __init__(self, vocab_size: int = 64, channels: int = 16, width: int = 48, num_blocks: int = 3, **kwargs):
        self.vocab_size, self.channels, self.width, self.num_blocks = vocab_size, channels, width, num_blocks
        self.block_scales = kwargs.pop("block_scales", [1.0 + 0.5 * number for number in range(num_blocks)])
        self.max_position_embeddings = kwargs.pop("max_position_embeddings", 512)
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class ToyMixer(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.inner = nn.Linear(config.channels, config.width)
        self.outer = nn.Linear(config.width, config.channels, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(hidden)))


class ToyBlock(nn.Module):
    """Adds to each position a mix of the mean of the positions up to it."""

    def __init__(self, config: ToyConfig, scale: float):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(config.channels))
        self.mixer, self.scale = ToyMixer(config), scale

    def forward(self, hidden: Tensor) -> Tensor:
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
        return hidden + self.scale * self.mixer(self.gain * hidden.cumsum(1) / counts[:, None])


class ToyPreTrained(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ToyBlock):
            nn.init.ones_(module.gain)
        if isinstance(module, ToyBackbone):
            nn.init.zeros_(module.seen)


class ToyBackbone(ToyPreTrained):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.pieces = nn.Embedding(config.vocab_size, config.channels)
        self.stack = nn.ModuleList(ToyBlock(config, scale) for scale in config.block_scales)
        self.last = nn.LayerNorm(config.channels)
        self.register_buffer("seen", torch.zeros(config.channels))
        """A running mean of the embeddings, like the statistics of a batch norm."""
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs) -> BaseModelOutput:
        hidden = self.pieces(input_ids)
        if self.training:
            self.seen.lerp_(hidden.detach().mean((0, 1)).to(self.seen.dtype), SEEN_RATE)
        else:  # as a batch norm does: a wrong buffer shows in every evaluation
            hidden = hidden - self.seen
        for block in self.stack:
            hidden = block(hidden)
        return BaseModelOutput(last_hidden_state=self.last(hidden))


class ToyForCausalLM(ToyPreTrained):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.backbone = ToyBackbone(config)
        self.readout = nn.Linear(config.channels, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs) -> CausalLMOutput:
        return CausalLMOutput(logits=self.readout(self.backbone(input_ids).last_hidden_state))


class ToyFamily:
    """Answers as `Family` asks."""

    auto_class = AutoModelForCausalLM
    axes = ("d", "w")
    layers, body, final_norm, head = "backbone.stack", "backbone", "backbone.last", "readout"
    owned: Mapping[str, tuple[str, ...]] = {"backbone.last": ("d",)}

    def full(self, config: ToyConfig) -> SubNet:
        return SubNet(d=config.num_blocks, w=config.width)

    def halves(self, config: ToyConfig) -> tuple[Half, ...]:
        return (Half("mixer", "w", (Part("inner", "output", 1), Part("outer", "input", 1))),)

    def subnet_config(self, config: ToyConfig, subnet: SubNet, layers: Sequence[int]) -> ToyConfig:
        fields = {**config.to_dict(), **self.layer_fields(config, layers), "width": subnet["w"]}
        cut = ToyConfig.from_dict(fields)
        cut._attn_implementation = config._attn_implementation
        return cut

    def layer_fields(self, config: ToyConfig, layers: Sequence[int]) -> dict[str, Any]:
        return {"num_blocks": len(layers), "block_scales": [config.block_scales[number] for number in layers]}

    def check(self, space: SubNetSpace, config: ToyConfig) -> None:
        return

    def logits_rule(self, config: ToyConfig) -> LogitsRule:
        return LogitsRule()

    def mixing_flops(self, config: ToyConfig, subnet: SubNet, row_tokens: int) -> int:
        return 0

    def kv_elements(self, config: ToyConfig, subnet: SubNet) -> int:
        return 0

    def hidden_states(self, body: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return body(batch["input_ids"]).last_hidden_state


class WeightedLM(CausalLM):
    """Next tokens whose loss counts more at the end of a row, and how often the right one is among the first five."""

    metrics = (
        Metric(LOSS, "weighted loss", mean_of(LOSS), "{:.4f}".format),
        Metric("top5", "top 5", mean_of("top5"), "{:.1%}".format),
    )

    def collate(self, rows: Sequence, size: int, row_tokens: int) -> MicroBatch:
        plain = super().collate(rows, size, row_tokens)
        weights = torch.linspace(0.5, 1.5, row_tokens).expand(size, -1)
        return MicroBatch({**plain.inputs, "weights": weights}, plain.num_targets, plain.num_rows)

    def attach(self, model: PreTrainedModel, family: Family) -> None:
        return

    def sums(self, model: PreTrainedModel, family: Family, states: Tensor, batch: Batch, with_metrics: bool) -> Sums:
        logits = model.get_submodule(family.head)(states)
        labels = batch["labels"]
        nll = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=NO_TARGET, reduction="none")
        num_targets = (labels != NO_TARGET).sum()
        sums = {LOSS: ((nll * batch["weights"].flatten()).sum(), num_targets)}
        if with_metrics:
            best = logits.topk(5).indices
            sums["top5"] = ((best == labels[..., None]).any(-1).sum(), num_targets)
        return sums


def _taught(sampler: PolicySampler, step: int) -> list[Planned]:
    plan = []
    for share, subnet in enumerate(sampler.at_random(step, sampler.subnets_per_step)):
        plan += [Planned(Pass(sampler.full, "teach"), share), Planned(Pass(subnet), share)]
    return plan


def _three_on_the_same_rows(sampler: PolicySampler, step: int) -> list[Planned]:
    middle = sampler.at_random(step, 1)
    return [Planned(Pass(subnet), share=0) for subnet in (sampler.full, *middle, sampler.subnets[0])]


def _visits_of_three(sampler: PolicySampler) -> dict[SubNet, float]:
    visits = dict.fromkeys(sampler.subnets, 1 / len(sampler.subnets))
    return {**visits, sampler.full: visits[sampler.full] + 1, sampler.subnets[0]: visits[sampler.subnets[0]] + 1}


def _visits_of_taught(sampler: PolicySampler) -> dict[SubNet, float]:
    return dict.fromkeys(sampler.subnets, sampler.subnets_per_step / len(sampler.subnets))


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
TOY_STRATEGIES = {
    "taught": Strategy(_taught, _visits_of_taught),
    "same_rows": Strategy(
        _three_on_the_same_rows, _visits_of_three, fewest=lambda full_shares: 3, shares=lambda policy: 1
    ),
}


@contextmanager
def registered():
    """The family, the task and the strategies are known in this process meanwhile."""
    FAMILIES["toy"], TASKS["weighted_lm"] = ToyFamily(), WeightedLM()
    STRATEGIES.update(TOY_STRATEGIES)
    try:
        yield
    finally:
        del FAMILIES["toy"], TASKS["weighted_lm"]
        for name in TOY_STRATEGIES:
            del STRATEGIES[name]


def train_here(ranks: Ranks, run_file: Path, overrides: Sequence[str] = (), dies_after: int = 0) -> None:
    """What a rank of `sorted-ds train` does, in a process of a test that knows the toys. Text is prepared before.

    `dies_after`: the rank is killed when it has done so many steps of this start.
    """
    step = Engine.step
    done = 0

    def dying(engine: Engine, learning_rate: float) -> float:
        nonlocal done
        norm = step(engine, learning_rate)
        done += learning_rate > 0
        if done == dies_after:
            os._exit(9)
        return norm

    parent = mock.patch("sorted_ds.run.parts.PARENT_PID", os.getppid())  # the process that forks is this one's launcher
    engine_step = mock.patch.object(Engine, "step", dying if dies_after else step)
    with registered(), parent, engine_step:
        run = load_run(run_file, list(overrides))
        task = TASKS[run.task]
        with Watchdog(run.train.hang_minutes, run.run_dir, ranks.rank) as watchdog:
            train(run, task, shared_data(run, task, ranks), ranks, watchdog)

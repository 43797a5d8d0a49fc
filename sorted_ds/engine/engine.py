"""The training engine: DeepSpeed, made exact for sub-networks that change from micro-batch to micro-batch.

In: a nested model, the user's engine keys, and the passes of a step with their micro-batches. Out: summed losses, one
optimizer step for the gradients of all passes, and this rank's shards of weights and optimizer state for checkpoints.

What plain DeepSpeed 0.19.8 gets silently wrong here, and what is done about it (measured: docs/log.md):
- accumulation is our own: `managed_gradient_accumulation` is off and `step()` is called once per optimizer step;
- each step starts with clean accumulators, or a parameter that is first used later, or not at all, would get the
  previous step's gradient at stage 3 and with offload (gradients.py);
- under ZeRO-3 a layer half gathers its active part (gathering.py), and each kind of pass has a trace of its own, or
  layers that it skips would be gathered (traces.py);
- losses are sums: DeepSpeed averages over ranks, so a loss is multiplied by their number, and the only division is by
  the step's targets over all ranks and passes with a gradient.

Ranks do not reduce zeros for what no pass of the step used (gradients.py), and in fp32 no buffer is made for gradients
that do not come (gradients.py), so a small sub-network costs its own.

A parameter that no pass of a step used gets a zero gradient at every stage, so its moments decay and weight decay
applies; plain PyTorch would skip it. Ranks and stages would differ otherwise.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, redirect_stdout
from io import StringIO

import deepspeed
import torch
from torch import Tensor, nn

from sorted_ds.cluster.ranks import Ranks
from sorted_ds.data.loader import Batch, MicroBatch
from sorted_ds.engine import gradients
from sorted_ds.engine.gathering import gather_active, gather_side_by_side, persist_as_extracted
from sorted_ds.engine.modes import check_modes, complete, is_bf16, is_offloaded, stage_of
from sorted_ds.engine.optimizers import (
    Optim,
    build_optimizer,
    check_implementation,
    compile_ahead,
    implementation_of,
    repeat_powers,
    set_steps_taken,
)
from sorted_ds.engine.shards import Shard, publish_masters, shards_of
from sorted_ds.engine.traces import Traces
from sorted_ds.nested import NestedModel, compiled
from sorted_ds.nested.bundles import bundle, parts_of
from sorted_ds.nested.layout import lay_out
from sorted_ds.nested.weights import buffers_of, named_values, slices_of
from sorted_ds.space import Pass, SubNet
from sorted_ds.tasks import SummedLoss, Task
from sorted_ds.tasks.task import Sums

warnings.filterwarnings("ignore", r".*torch\.distributed.*is deprecated", FutureWarning)  # DeepSpeed's own calls


class Engine:
    """One model under DeepSpeed. `forward` and `backward` any number of times, then `step`."""

    def __init__(
        self,
        model: NestedModel,
        task: Task,
        config: dict,
        where: str,
        optim: Optim,
        micro_batch_rows: int,
        ranks: Ranks,
        compile_layers: bool = False,
    ):
        """Builds DeepSpeed's engine from the user's engine keys `config`, read from `where`.

        `compile_layers`: with torch.compile, at stages 0 to 2.

        Raises: UserError for a mode that is not proven exact.
        """
        check_modes(config, where, compile_layers)
        check_implementation(optim, is_offloaded(config))
        self.model, self.ranks, self.stage, self.clip_norm = model, ranks, stage_of(config), optim.clip_norm
        self.steps_taken = 0
        self.is_compiled = compile_layers
        if self.stage == 3:
            bundle(model)
            gather_active(model)
        if compile_layers:
            compiled.compile_layers(model)
        loss = SummedLoss(model, task, model.family)
        self.deepspeed_config = complete(config, micro_batch_rows, ranks.size, optim.clip_norm)
        implementation = implementation_of(optim, is_offloaded(config), ranks.device.type == "cuda")
        with ranks.fail_together():
            compile_ahead(implementation)
        with redirect_stdout(StringIO()):  # on the CPU it tells that it built its ops
            self.deepspeed, *_ = deepspeed.initialize(
                model=loss,
                optimizer=build_optimizer(model, optim, implementation),
                config=copy.deepcopy(self.deepspeed_config),
                dist_init_required=False,
            )
        self._norm_at_stage0: Tensor | None = None
        if self.stage == 0:
            lay_out(model)
            if not is_bf16(config):
                self.deepspeed.optimizer.register_step_pre_hook(self._clip)
        self._awaits_backward = False
        self._traces: Traces | None = None
        self._offload = is_offloaded(config)
        gradients.reduce_what_is_used(self.deepspeed)
        if self.stage in (1, 2) and not self._offload and not is_bf16(config):
            gradients.keep_what_is_used(self.deepspeed.optimizer)
        if self.stage == 3:
            persist_as_extracted(model, self.deepspeed.optimizer)
            gather_side_by_side(model, self.deepspeed.optimizer)
            self._traces = Traces(self.deepspeed.optimizer.parameter_offload.get_param_coordinator(), model)

    # The step

    def forward(self, batch: Batch, run: Pass) -> Tensor:
        """The loss of one micro-batch, in nats summed over its targets; with a gradient if the pass trains.

        A pass that trains must be followed by its `backward`. `batch`: as the task defines it.

        Raises: RuntimeError when another pass still waits for its `backward`.
        """
        self._select(run)
        if run.has_gradient:
            self._awaits_backward = True
            return self.deepspeed(**self._on_device(batch))
        with torch.no_grad():
            return self.deepspeed(**self._on_device(batch))

    def _on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.ranks.device) for name, value in batch.items()}

    def _select(self, run: Pass) -> None:
        """Makes ready for a pass. Until its backward pass no other one may come: layers know one width at a time."""
        self._check_nothing_waits()
        self.model.set_subnet(run.subnet)
        if self.model.training != run.has_gradient:  # 2 ms for 8 layers: it walks over all modules
            self.deepspeed.train(run.has_gradient)
        if self._traces is not None:
            self._traces.select(run)

    def _check_nothing_waits(self) -> None:
        """Raises: RuntimeError between a forward pass and its backward pass, which needs the weights as they were."""
        if self._awaits_backward:
            raise RuntimeError(f"a forward pass of {self.model.subnet} waits for its backward pass; call it first")

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the step's mean loss; the parts of all ranks and passes add up to it."""
        self.deepspeed.backward(loss * self.ranks.size, scale_wrt_gas=False)
        self._awaits_backward = False

    def step(self, learning_rate: float) -> float:
        """One optimizer step with the gradients accumulated since the last. Returns their norm before clipping.

        Raises: RuntimeError when a pass still waits for its `backward`.
        """
        self._check_nothing_waits()
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        self._clean_accumulators()
        self._average_buffers()
        self.steps_taken += 1
        return float(
            self._norm_at_stage0 if self._norm_at_stage0 is not None else self.deepspeed.get_global_grad_norm()
        )

    def _clean_accumulators(self) -> None:
        gradients.clean(self.deepspeed.optimizer, self.stage, self._offload)

    def _clip(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Stage 0 in fp32, where DeepSpeed tells no norm: between its reduction and the update."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norm_at_stage0 = nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))

    def _narrowest(self) -> SubNet:
        """The deepest of the sub-networks with the smallest widths."""
        letters = tuple(self.model.widths)
        return min(self.model.space, key=lambda subnet: (*(subnet[letter] for letter in letters), -subnet.depth))

    def warm_up(self, micro_batch: MicroBatch) -> None:
        """Runs the full network forward, backward and through the optimizer once on a micro-batch.

        Memory that will be needed is needed now, not hours later, and what will be compiled is compiled now, in the
        same order at every start. The learning rate is zero, and the optimizer's state and the buffers are put back,
        so nothing is changed. A collective.
        """
        subnets = [self.model.space.full]
        if self.is_compiled:
            subnets.append(self._narrowest())  # one head is a graph of its own
        before = {name: buffer.clone() for name, buffer in self.buffers().items()}
        if self._traces is not None:
            self._traces.start_recording()
        for subnet in subnets:
            loss = self.forward(micro_batch.inputs, Pass(subnet))
            self.backward(loss / (max(1, micro_batch.num_targets) * self.ranks.size))
        self.step(learning_rate=0.0)
        for subnet in subnets:
            self.evaluate(micro_batch.inputs, subnet)
        if self._traces is not None:
            self._traces.stop_recording()
        self.load_buffers(before)
        self.steps_taken = 0
        for flat, state in self._base_optimizer.state.items():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()
            if "step" in state:
                set_steps_taken(self._base_optimizer, state, 0, flat.device)

    # Without gradients

    @torch.no_grad()
    def evaluate(self, batch: Batch, subnet: SubNet) -> Sums:
        """The task's sums of one micro-batch, with their counts. Every rank calls it equally often."""
        self._select(Pass(subnet, "evaluate"))
        return self.deepspeed(with_metrics=True, **self._on_device(batch))

    # Buffers

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers, by the key of the Hugging Face tensor and its owner."""
        values = dict(self.model.named_buffers())
        return {part.key: values[name] for name, part in buffers_of(self.model).items()}

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        """Sets the persistent buffers."""
        for key, buffer in self.buffers().items():
            buffer.copy_(values[key])

    def _average_buffers(self) -> None:
        """Makes floating-point buffers the mean over ranks, as each rank has seen rows of its own. A collective."""
        if self.ranks.size > 1:
            for buffer in self.buffers().values():
                if buffer.is_floating_point():
                    torch.distributed.all_reduce(buffer)
                    buffer /= self.ranks.size

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every block and other parameter, in the training precision. A collective.

        One parameter is gathered at a time.

        Raises: RuntimeError when a pass still waits for its `backward`.
        """
        self._check_nothing_waits()
        for name, value in named_values(self.model, self._gathered):
            yield name, value.cpu().clone()

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager:
        return deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3)

    # Checkpoints

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)

    def shards(self, owned: bool = False) -> Iterator[Shard]:
        """This rank's shards of the master weights; with `owned`, each element on exactly one rank.

        The two differ at stage 0, where every rank holds all of them.
        """
        held = shards_of(self.deepspeed)
        if not owned or self.stage > 0:
            return held
        shares = (shard.share(self.ranks.rank, self.ranks.size) for shard in held)
        return (share for share in shares if share.num)

    def places(self) -> dict[str, tuple[str, int]]:
        """For every block, the whole weight that it belongs to, and the number of its first element in it.

        Weights have Hugging Face's names, with their owner if they have one, and are numbered rows first (`o_proj` and
        `down_proj` transposed): a space cuts them into other blocks, never into other rows.
        """
        sizes = {
            name: size for own in parts_of(self.model).values() for name, size in zip(own.names, own.sizes, strict=True)
        }
        return {
            name: (part.key, part.start * sizes[name] // (part.stop - part.start) if part.stop else 0)
            for name, part in slices_of(self.model).items()
        }

    def state_of(self, shard: Shard) -> dict[str, Tensor]:
        """The optimizer's tensors of the shape of the weights (AdamW: both moments), this shard of them."""
        state = self._base_optimizer.state.get(shard.flat, {})
        return {key: shard.view(value) for key, value in state.items() if _is_like(value, shard.flat)}

    def restore(self, steps_taken: int, state_keys: list[str]) -> None:
        """Makes room for the optimizer state after `steps_taken` steps; then fill `state_of` each shard."""
        self.steps_taken = steps_taken
        repeat_powers(self._base_optimizer, steps_taken)
        for flat in {id(shard.flat): shard.flat for shard in self.shards()}.values():
            state = self._base_optimizer.state[flat]
            state.clear()
            if state_keys:
                set_steps_taken(self._base_optimizer, state, steps_taken, flat.device)
            state.update({key: torch.zeros_like(flat) for key in state_keys})

    def publish(self) -> None:
        """Call after the master weights were written: the forward pass uses them from now on. A collective.

        Raises: RuntimeError when a pass still waits for its `backward`.
        """
        self._check_nothing_waits()
        publish_masters(self.deepspeed)


def _is_like(value: object, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape

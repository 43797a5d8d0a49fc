"""The training engine: DeepSpeed, made exact for sub-networks that change from micro-batch to micro-batch.

In: a nested model, the user's engine keys, and the passes of a step with their micro-batches. Out: summed losses, one
optimizer step for the gradients of all passes, and this rank's shards of weights and optimizer state for checkpoints.

Plain DeepSpeed 0.19.8 gets the following silently wrong here (measured: docs/log.md), so the engine changes it:
- The engine accumulates itself: `managed_gradient_accumulation` is off, and `step()` is called once per optimizer step.
- Accumulators are cleared after each step. Otherwise a parameter that is first used at a later micro-batch, or not at
  all, would get the last step's gradient at stage 3 and with offload (gradients.py).
- Under ZeRO-3 a layer half gathers only its active bundles (gathering.py), and each kind of pass has a trace of its
  own. Otherwise layers that a pass skips would be gathered (traces.py).
- Losses are sums. DeepSpeed averages over ranks, so a loss is multiplied by the number of ranks. The only division is
  by the step's number of targets over all ranks and all passes with a gradient.

So that a small sub-network costs only its own time and memory, ranks do not reduce zeros for unused parameters, and in
fp32 they have no buffers for gradients that do not exist (gradients.py).

A parameter that no pass of a step used gets a zero gradient, so its moments decay and weight decay applies to it. Plain
PyTorch would skip the parameter, but then stages and numbers of ranks would give different results.
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
from sorted_ds.engine.gathering import gather_active, gather_into_shared_memory, persist_as_extracted
from sorted_ds.engine.modes import check_modes, complete_config, is_bf16, is_offloaded, stage_of
from sorted_ds.engine.optimizers import (
    Optim,
    build_optimizer,
    check_implementation,
    compile_ahead,
    implementation_of,
    replay_steps,
    set_steps_taken,
)
from sorted_ds.engine.shards import Shard, publish_masters, shards_of
from sorted_ds.engine.traces import Traces
from sorted_ds.nested import NestedModel, compiled
from sorted_ds.nested.bundles import bundle, contents_of
from sorted_ds.nested.layout import lay_out
from sorted_ds.nested.weights import buffers_of, named_values, slices_of
from sorted_ds.space import Pass, SubNet
from sorted_ds.tasks import SummedLoss, Task
from sorted_ds.tasks.losses import Teacher, Terms
from sorted_ds.tasks.task import Outcome, Sums

warnings.filterwarnings("ignore", r".*torch\.distributed.*is deprecated", FutureWarning)  # DeepSpeed's own calls


class Engine:
    """One model under DeepSpeed. A step is any number of `forward` and `backward` calls, and then one of `step`."""

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
        terms: Terms | None = None,
    ):
        """Builds DeepSpeed's engine from the user's engine keys `config`. Messages name their file `where`.

        `compile_layers` compiles the layers with torch.compile, at stages 0 to 2. `terms`: the weights of the loss, for
        passes with exits or a teacher.

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
        loss = SummedLoss(model, task, model.family, terms)
        self.deepspeed_config = complete_config(config, micro_batch_rows, ranks.size, optim.clip_norm)
        implementation = implementation_of(optim, is_offloaded(config), ranks.device.type == "cuda")
        with ranks.fail_together():
            compile_ahead(implementation)
        with redirect_stdout(StringIO()):  # on the CPU, DeepSpeed prints that it built its ops
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
        self._buffer_slices = buffers_of(model)
        self._traces: Traces | None = None
        self._offload = is_offloaded(config)
        gradients.reduce_used_gradients(self.deepspeed)
        if self.stage in (1, 2) and not self._offload and not is_bf16(config):
            gradients.keep_used_gradients(self.deepspeed.optimizer)
        if self.stage == 3:
            persist_as_extracted(model, self.deepspeed.optimizer)
            gather_into_shared_memory(model, self.deepspeed.optimizer)
            self._traces = Traces(self.deepspeed.optimizer.parameter_offload.get_param_coordinator(), model)

    # The step

    def forward(self, batch: Batch, pass_: Pass, teacher: Teacher | None = None) -> Outcome:
        """Runs one micro-batch. The loss of a pass that trains is in nats, summed over its targets.

        A pass that trains must be followed by the `backward` of its loss. A pass that teaches has no loss. The task
        defines the tensors of `batch`. `teacher`: the states of a teacher on the same rows.

        Raises: RuntimeError if another pass still waits for its `backward`.
        """
        self._select(pass_)
        if not pass_.has_gradient:
            with torch.no_grad():
                return Outcome(None, self.deepspeed(mode="teach", **self._on_device(batch)))
        self._awaits_backward = True
        found = self.deepspeed(teacher=teacher, **self._on_device(batch))
        return Outcome(found) if isinstance(found, Tensor) else Outcome(*found)

    def _on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.ranks.device) for name, value in batch.items()}

    def _select(self, pass_: Pass) -> None:
        """Prepares the model for a pass. No other pass may start until it is complete: layers have one active width."""
        self._check_no_backward_pending()
        self.model.set_pass(pass_)
        if self.model.training != pass_.has_gradient:  # 2 ms for 8 layers: it walks over all modules
            self.deepspeed.train(pass_.has_gradient)
        if self._traces is not None:
            self._traces.select(pass_)

    def _check_no_backward_pending(self) -> None:
        """Raises: RuntimeError between a forward pass and its backward pass, which needs the same weights."""
        if self._awaits_backward:
            raise RuntimeError(f"a forward pass of {self.model.subnet} waits for its backward pass; call it first")

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the step's mean loss, which is the sum of all ranks' and passes' parts."""
        self.deepspeed.backward(loss * self.ranks.size, scale_wrt_gas=False)
        self._awaits_backward = False

    def step(self, learning_rate: float) -> float:
        """Takes an optimizer step with the accumulated gradients. Returns their norm before clipping.

        Raises: RuntimeError if a pass still waits for its `backward`.
        """
        self._check_no_backward_pending()
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        self._clear_accumulators()
        self._average_buffers()
        self.steps_taken += 1
        return float(
            self._norm_at_stage0 if self._norm_at_stage0 is not None else self.deepspeed.get_global_grad_norm()
        )

    def _clear_accumulators(self) -> None:
        gradients.clear_accumulators(self.deepspeed.optimizer, self.stage, self._offload)

    def _clip(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Clips the gradients at stage 0 in fp32, where DeepSpeed computes no norm. It runs just before the update."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norm_at_stage0 = nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))

    def _narrowest(self) -> SubNet:
        """Returns the deepest one of the sub-networks with the smallest widths."""
        letters = tuple(self.model.widths)
        return min(self.model.space, key=lambda subnet: (*(subnet[letter] for letter in letters), -subnet.depth))

    def warm_up(self, micro_batch: MicroBatch) -> None:
        """Trains the full network for one step on a micro-batch, and restores everything. Every rank must call this.

        A lack of memory shows now, not hours later, and layers are compiled now, in the same order at every start. The
        learning rate is zero, and the optimizer's state and the buffers are restored, so nothing changes.
        """
        subnets = [self.model.space.full]
        if self.is_compiled:
            subnets.append(self._narrowest())  # one active head has a graph of its own
        before = {name: buffer.clone() for name, buffer in self.buffers().items()}
        if self._traces is not None:
            self._traces.start_recording()
        for subnet in subnets:
            loss = self.forward(micro_batch.inputs, Pass(subnet)).loss
            assert loss is not None, "the pass trains"
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
        """Returns the task's sums over one micro-batch, with their counts. Every rank must call this equally often."""
        self._select(Pass(subnet, "evaluate"))
        return self.deepspeed(mode="evaluate", **self._on_device(batch))

    # Buffers

    def buffers(self) -> dict[str, Tensor]:
        """Returns the model's persistent buffers, by the name of the Hugging Face tensor with its owner."""
        if not self._buffer_slices:
            return {}
        values = dict(self.model.named_buffers())
        return {part.key: values[name] for name, part in self._buffer_slices.items()}

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        """Copies values into the persistent buffers."""
        for key, buffer in self.buffers().items():
            buffer.copy_(values[key])

    def _average_buffers(self) -> None:
        """Averages floating-point buffers over ranks, which saw different rows. Every rank must call this."""
        if self.ranks.size > 1:
            for buffer in self.buffers().values():
                if buffer.is_floating_point():
                    torch.distributed.all_reduce(buffer)
                    buffer /= self.ranks.size

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and value of every block and other parameter, in the training precision, on the CPU.

        One parameter is gathered at a time. Every rank must iterate to the end.

        Raises: RuntimeError if a pass still waits for its `backward`.
        """
        self._check_no_backward_pending()
        for name, value in named_values(self.model, self._gathered):
            yield name, value.cpu().clone()

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager:
        return deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3)

    # Checkpoints

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)

    def shards(self, disjoint: bool = False) -> Iterator[Shard]:
        """Yields this rank's shards of the master weights; with `disjoint`, each element is in the shard of one rank.

        The two differ only at stage 0, where every rank holds all master weights.
        """
        held = shards_of(self.deepspeed)
        if not disjoint or self.stage > 0:
            return held
        shares = (shard.share(self.ranks.rank, self.ranks.size) for shard in held)
        return (share for share in shares if share.num)

    def weight_positions(self) -> dict[str, tuple[str, int]]:
        """Returns, for every block and other parameter, the weight that it is a part of, and its first element there.

        Weights have Hugging Face's names, with the owner if there is one. Elements are counted with the nested
        dimension first (`o_proj` and `down_proj` are transposed), so each block is a contiguous range in every space.
        """
        numels = {
            name: numel
            for contents in contents_of(self.model).values()
            for name, numel in zip(contents.names, contents.numels, strict=True)
        }
        return {
            name: (part.key, part.start * numels[name] // (part.stop - part.start) if part.stop else 0)
            for name, part in slices_of(self.model).items()
        }

    def state_of(self, shard: Shard) -> dict[str, Tensor]:
        """Returns the shard's elements of the optimizer's tensors by key (AdamW: both moments), as views."""
        state = self._base_optimizer.state.get(shard.flat, {})
        return {key: shard.view(value) for key, value in state.items() if _is_like(value, shard.flat)}

    def restore(self, steps_taken: int, state_keys: list[str]) -> None:
        """Sets the optimizer to `steps_taken` steps, with a state of zeros. Fill `state_of` each shard afterwards."""
        self.steps_taken = steps_taken
        replay_steps(self._base_optimizer, steps_taken)
        for flat in {id(shard.flat): shard.flat for shard in self.shards()}.values():
            state = self._base_optimizer.state[flat]
            state.clear()
            if state_keys:
                set_steps_taken(self._base_optimizer, state, steps_taken, flat.device)
            state.update({key: torch.zeros_like(flat) for key in state_keys})

    def publish(self) -> None:
        """Makes the forward pass use the restored master weights. Every rank must call this after writing them.

        Raises: RuntimeError if a pass still waits for its `backward`.
        """
        self._check_no_backward_pending()
        publish_masters(self.deepspeed)


def _is_like(value: object, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape

"""The optimizer that DeepSpeed runs on its flat fp32 master weights.

In: a nested model and the run's `[optim]`. Out: one of torch's optimizers, or DeepSpeed's AdamW for offloaded weights.
All AdamWs use the same formula; tests/engine/test_cover.py compares each with plain PyTorch.
"""

from typing import Protocol

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import nn

from sorted_ds.base.errors import UserError
from sorted_ds.nested import NestedModel


class Optim(Protocol):
    """The settings of `[optim]` that the engine needs. run/config.py documents them."""

    @property
    def name(self) -> str: ...
    @property
    def implementation(self) -> str: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def clip_norm(self) -> float: ...


def implementation_of(optim: Optim, is_offloaded: bool, is_cuda: bool) -> str:
    """Returns the implementation that `optim.implementation` selects: `torch`, `fused` or `cpu_adam`."""
    if optim.implementation != "auto":
        return optim.implementation
    if optim.name == "sgd":
        return "torch"
    return "cpu_adam" if is_offloaded and is_cuda else "fused"


def check_implementation(optim: Optim, is_offloaded: bool) -> None:
    """Raises: UserError if `optim.implementation` does not fit the optimizer or the offload."""
    if optim.implementation in ("fused", "cpu_adam") and optim.name != "adamw":
        raise UserError(
            f"optim.implementation = {optim.implementation!r} is an AdamW, but optim.name = {optim.name!r}. "
            'Set the implementation to "torch", or the name to "adamw".'
        )
    if optim.implementation == "cpu_adam" and not is_offloaded:
        raise UserError(
            'optim.implementation = "cpu_adam" updates weights on the CPU, but nothing is offloaded there. '
            'Set zero_optimization.offload_optimizer in the DeepSpeed JSON, or the implementation to "auto".'
        )


def build_optimizer(model: NestedModel, optim: Optim, implementation: str) -> torch.optim.Optimizer:
    """Returns AdamW or SGD. Only matrices that multiply activations are decayed, not norms, biases and embeddings.

    The order of the parameters matters, because DeepSpeed puts them into flat buffers in this order:
    - A layer's parameters keep their order, so that its blocks are adjacent.
    - Layers are spread (`_spread`). At stages 1 and 2 a rank holds one range of a flat buffer. Without spreading, the
      first ranks alone would accumulate, or offload, all gradients of a shallow sub-network.
    - The smaller group comes first. Stages 1 and 2 keep the gradients of both groups until the last group is updated,
      and AdamW's temporary tensors add to them (measured in the reverse order: 1.04 x the bytes of one group).

    The learning rate is 0 until a step sets it, because at stage 0 in bf16 DeepSpeed takes a step at initialisation.
    """
    groups = _groups(model, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    betas = (optim.betas[0], optim.betas[1])
    if implementation != "cpu_adam":
        fused = implementation == "fused"
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optim.eps, fused=fused)
    return DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=optim.eps, adamw_mode=True)


def _groups(model: NestedModel, weight_decay: float) -> list[dict]:
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    layers, order = model.all_layers, model.space.layer_order
    keys = {p: _spread(position) for position, number in enumerate(order) for p in layers[number].parameters()}
    parameters = sorted(model.parameters(), key=lambda p: keys.get(p, 0.0 if p in embeddings else 1.0))
    decayed = [p for p in parameters if _num_dims(p) > 1 and p not in embeddings]
    others = [p for p in parameters if _num_dims(p) <= 1 or p in embeddings]
    return [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def _spread(position: int) -> float:
    """Returns a number in [0, 1) for a position in the layer order: 0, 1/2, 1/4, 3/4, 1/8, 5/8, ...

    The numbers of the first n positions are spread about evenly, for every n (van der Corput's sequence, which mirrors
    the binary digits at the point).
    """
    digits = f"{position:b}"
    return int(digits[::-1], 2) / 2 ** len(digits)


def _num_dims(parameter: nn.Parameter) -> int:
    """Returns the number of dimensions of the whole parameter, of which ZeRO-3 holds a flat share."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def set_steps_taken(optimizer: torch.optim.Optimizer, state: dict, steps_taken: int, device: torch.device) -> None:
    """Writes AdamW's number of steps into `state` in the optimizer's own format."""
    if isinstance(optimizer, DeepSpeedCPUAdam):
        state["step"] = steps_taken
        return
    is_fused = bool(optimizer.defaults.get("fused"))
    state["step"] = torch.tensor(float(steps_taken), device=device if is_fused else "cpu")


def replay_steps(optimizer: torch.optim.Optimizer, steps_taken: int) -> None:
    """Makes DeepSpeed's AdamW compute its powers of beta as in an uninterrupted run. Call this once after a resume.

    DeepSpeed multiplies the powers by beta at each step, but computes them with `pow` after a jump of the step number.
    The two differ in the last bits, so every step is taken again on empty tensors (about 10 us each). torch's
    optimizers need no replay. Source: DeepSpeed 0.19.8, ops/csrc/includes/cpu_adam.h (`IncrementStep`).
    """
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    group, empty = optimizer.param_groups[0], torch.empty(0)
    numbers = (*group["betas"], group["eps"], 0.0, True)
    for step in range(1, steps_taken + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, *numbers, empty, empty, empty, empty)


def compile_ahead(implementation: str) -> None:
    """Compiles DeepSpeed's AdamW if it will be used (about a minute). Raises: UserError if the compilation fails."""
    if implementation != "cpu_adam":
        return
    try:
        CPUAdamBuilder().load()
    except Exception as error:
        raise UserError(
            f"DeepSpeed could not compile its AdamW for the CPU ({error}). Install g++ and ninja, "
            'or set optim.implementation = "torch".'
        ) from error

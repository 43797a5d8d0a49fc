"""The optimizer that DeepSpeed runs on its flat fp32 master weights.

In: a nested model and the run's `[optim]`. Out: one of torch's optimizers, or DeepSpeed's AdamW for what is offloaded.
All follow the same formula; tests/engine/test_cover.py compares each with plain PyTorch.
"""

from typing import Protocol

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import nn

from sorted_ds.base.errors import UserError
from sorted_ds.nested import NestedModel


class Optim(Protocol):
    """The settings of `[optim]` that the engine needs. Their meaning stands in run/config.py."""

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
    """`torch`, `fused` or `cpu_adam`: what `optim.implementation` is, or stands for."""
    if optim.implementation != "auto":
        return optim.implementation
    if optim.name == "sgd":
        return "torch"
    return "cpu_adam" if is_offloaded and is_cuda else "fused"


def check_implementation(optim: Optim, is_offloaded: bool) -> None:
    """Raises: UserError where `optim.implementation` does not fit the rest."""
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
    """AdamW or SGD. Norms, biases and embeddings are not decayed: only matrices that multiply activations are.

    A layer's parameters keep their order, so that its blocks lie side by side in ZeRO's flat buffers. Layers are spread
    (`_spread`): at stages 1 and 2 a rank owns a stretch of a flat buffer, and the first ranks would own all gradients
    of a shallow sub-network, and alone add them up, or move them to the CPU. The smaller group comes first: stages 1
    and 2 keep the gradients of both until the last group's turn, and AdamW's own temporary tensors come on top
    (measured, the other way round: 1.04 x the bytes of one group).

    The rate is 0 until a step sets it: at stage 0 in bf16 DeepSpeed takes one while it initialises.
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
    keys = {p: _spread(place) for place, number in enumerate(order) for p in layers[number].parameters()}
    parameters = sorted(model.parameters(), key=lambda p: keys.get(p, 0.0 if p in embeddings else 1.0))
    decayed = [p for p in parameters if _num_dims(p) > 1 and p not in embeddings]
    others = [p for p in parameters if _num_dims(p) <= 1 or p in embeddings]
    return [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def _spread(place: int) -> float:
    """A number from 0 to below 1 for a place in the layer order: 0, 1/2, 1/4, 3/4, 1/8, 5/8, ...

    The first places are about evenly spread, however many they are: the binary digits of the place are mirrored at the
    point (van der Corput's sequence).
    """
    digits = f"{place:b}"
    return int(digits[::-1], 2) / 2 ** len(digits)


def _num_dims(parameter: nn.Parameter) -> int:
    """Of the whole parameter, which ZeRO-3 may hold a share of."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def set_steps_taken(optimizer: torch.optim.Optimizer, state: dict, steps_taken: int, device: torch.device) -> None:
    """Writes AdamW's step number as the optimizer keeps it."""
    if isinstance(optimizer, DeepSpeedCPUAdam):
        state["step"] = steps_taken
        return
    is_fused = bool(optimizer.defaults.get("fused"))
    state["step"] = torch.tensor(float(steps_taken), device=device if is_fused else "cpu")


def repeat_powers(optimizer: torch.optim.Optimizer, steps_taken: int) -> None:
    """Call once when a run is resumed. torch's optimizers need nothing.

    DeepSpeed's code multiplies the powers of beta up from step to step, but raises them anew after a jump. The two
    differ in the last bits, so every step is taken again, on nothing (about 10 us each). Source: DeepSpeed 0.19.8,
    ops/csrc/includes/cpu_adam.h (`IncrementStep`).
    """
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    group, nothing = optimizer.param_groups[0], torch.empty(0)
    numbers = (*group["betas"], group["eps"], 0.0, True)
    for step in range(1, steps_taken + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, *numbers, nothing, nothing, nothing, nothing)


def compile_ahead(implementation: str) -> None:
    """DeepSpeed's AdamW is compiled on first use, about a minute. Raises: UserError when it cannot be."""
    if implementation != "cpu_adam":
        return
    try:
        CPUAdamBuilder().load()
    except Exception as error:
        raise UserError(
            f"DeepSpeed could not compile its AdamW for the CPU ({error}). Install g++ and ninja, "
            'or set optim.implementation = "torch".'
        ) from error

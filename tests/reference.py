"""Sorted training in plain single-process PyTorch: what every engine mode is compared with.

It imports nothing of the nested code: a sub-network runs the layers that it has of the whole Hugging Face model, with
the heads and channels that it does not have masked to zero, so gradients land in the full weights by autograd alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sorted_ds.space import SubNet

MicroBatch = tuple[SubNet, Tensor, Tensor]
"""Active sub-network, input_ids [rows, row_tokens], labels [rows, row_tokens] (shifted, -100 = no target)."""


@contextmanager
def masked_to(
    model: PreTrainedModel, subnet: SubNet, order: Sequence[int] = (), dropped: Sequence[int] = ()
) -> Iterator[None]:
    """The full model computes what the sub-network would, for families without norms across heads.

    `order`: the layers in the order in which depth takes them; without it a depth is a prefix. `dropped`: layers that
    are left out.
    """
    layers = model.model.layers
    chosen = [n for n in (sorted(order[: subnet.depth]) if order else range(subnet.depth)) if n not in dropped]
    channels = (
        subnet["g"] * model.model.layers[0].self_attn.num_key_value_groups * model.model.layers[0].self_attn.head_dim
    )
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(_zero_from(channels)))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(_zero_from(subnet["f"])))
    model.config.num_hidden_layers, full_depth = len(chosen), model.config.num_hidden_layers
    model.model.layers = nn.ModuleList([layers[number] for number in chosen])
    try:
        yield
    finally:
        model.model.layers = layers
        model.config.num_hidden_layers = full_depth
        for hook in hooks:
            hook.remove()


def _zero_from(channel: int):
    def zero(module, args):
        keep = torch.arange(args[0].shape[-1]) < channel
        return (args[0] * keep,)

    return zero


def summed_loss(model: PreTrainedModel, micro_batch: MicroBatch, order: Sequence[int] = ()) -> Tensor:
    """Nats, summed over targets."""
    subnet, input_ids, labels = micro_batch
    with masked_to(model, subnet, order):
        logits = model(input_ids=input_ids, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


def accumulate(
    model: PreTrainedModel, step: Sequence[MicroBatch], skip_unused: bool = False, order: Sequence[int] = ()
) -> None:
    """The gradient of the step's mean loss over all its targets; zero for what no sub-network of the step used."""
    num_targets = sum(int((labels != -100).sum()) for _, _, labels in step)
    model.zero_grad()
    for micro_batch in step:
        (summed_loss(model, micro_batch, order) / num_targets).backward()
    for parameter in model.parameters():
        if parameter.grad is None and not skip_unused:
            parameter.grad = torch.zeros_like(parameter)


def train(
    model: PreTrainedModel,
    steps: Sequence[Sequence[MicroBatch]],
    optim,
    skip_unused: bool = False,
    order: Sequence[int] = (),
) -> tuple[list[float], torch.optim.Optimizer]:
    """Trains in place; returns the gradient norm of every step, and the optimizer with its moments."""
    optimizer = optimizer_of(model, optim)
    norms = []
    for step in steps:
        accumulate(model, step, skip_unused, order)
        max_norm = optim.clip_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
    return norms, optimizer


def optimizer_of(model: PreTrainedModel, optim) -> torch.optim.Optimizer:
    """Decay on matrices that are no embeddings."""
    embedding = model.get_input_embeddings().weight
    decayed = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.dim() != 2 or p is embedding]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.learning_rate)
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=tuple(optim.betas), eps=optim.eps)

"""Three models that run one sub-network, and how far they are apart. `python -m benchmarks.parity` prints the table.

Nested: the nested model. Extracted: the plain model cut out of it. Reference: the plain full model, which knows nothing
of `sorted_ds.nested`: it runs the active layers, with the inactive heads and channels zeroed before the output
projections.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sorted_ds.families import nest
from sorted_ds.nested import NestedModel, extract
from sorted_ds.nested.bundles import bundle, contents_of
from sorted_ds.nested.layers import run_by_blocks
from sorted_ds.nested.layout import lay_out
from sorted_ds.nested.weights import hf_tensors
from sorted_ds.space import SubNet, SubNetSpace
from tests.families import SPACE, SUBNETS, VARIANTS, tiny_model, tokens

WAYS = ("joined", "blocks", "bundles")
"""How a layer uses its weights: each as one matrix (stages 0 to 2), block by block, or in bundles as under ZeRO-3."""


@dataclass(frozen=True)
class Outcome:
    """Logits, and the gradients of the summed cross-entropy by Hugging Face's names; no entry where there is none."""

    logits: Tensor
    grads: dict[str, Tensor]


def logits_and_backward(model: nn.Module, input_ids: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=input_ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum").backward()
    return logits.detach()


def in_way(model: NestedModel, way: str) -> NestedModel:
    """A copy whose blocks are used in one of `WAYS`."""
    model = copy.deepcopy(model)
    lay_out(model)
    if way == "bundles":
        bundle(model)
    for layer in model.all_layers if way == "blocks" else ():
        layer.run = run_by_blocks
    return model


def run_nested(model: NestedModel, subnet: SubNet, input_ids: Tensor) -> Outcome:
    model.set_subnet(subnet)
    logits = logits_and_backward(model, input_ids)
    contents, grads = contents_of(model), {}
    for name, parameter in model.named_parameters():
        grads[name] = parameter.grad
        bundle = contents[name].bundle
        if bundle is not None and parameter.grad is not None:
            blocks = (parameter.grad[start:stop] for start, stop in bundle.row_ranges)
            grads.update(zip(contents[name].names, blocks, strict=True))
    return Outcome(logits, hf_tensors(model, subnet, grads.__getitem__))


def run_plain(model: PreTrainedModel, input_ids: Tensor) -> Outcome:
    logits = logits_and_backward(model, input_ids)
    return Outcome(logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@contextmanager
def running(full: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """The full model runs these of its layers and no others. Its parameters are then named as in a model of these."""
    config, all_layers = full.config, full.model.layers
    changed: dict[str, object] = {"num_hidden_layers": len(layers)}
    if getattr(config, "layer_types", None):
        changed["layer_types"] = [config.layer_types[number] for number in layers]
    before = {key: getattr(config, key) for key in changed}
    full.model.layers = nn.ModuleList(all_layers[number] for number in layers)
    for key, value in changed.items():
        setattr(config, key, value)
    try:
        yield
    finally:
        full.model.layers = all_layers
        for key, value in before.items():
            setattr(config, key, value)


def run_reference(full: PreTrainedModel, subnet: SubNet, input_ids: Tensor, order: Sequence[int] = ()) -> Outcome:
    """The masked full model on the first layers of `order`, in its own sequence; without an order on its first ones."""
    config = full.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_rows = subnet["g"] * head
    query_rows = key_rows * (config.num_attention_heads // config.num_key_value_heads)
    layers = sorted(order[: subnet.depth]) if order else range(subnet.depth)
    hooks = []
    for layer in full.model.layers:
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(zero_beyond(query_rows)))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(zero_beyond(subnet["f"])))
        if config.model_type == "olmo2":
            hooks.append(layer.self_attn.q_norm.register_forward_hook(norm_over(query_rows)))
            hooks.append(layer.self_attn.k_norm.register_forward_hook(norm_over(key_rows)))
    with running(full, layers):
        outcome = run_plain(full, input_ids)
    for hook in hooks:
        hook.remove()
    return outcome


def zero_beyond(channels: int):
    def hook(_module, inputs):
        return (inputs[0] * (torch.arange(inputs[0].shape[-1]) < channels),)

    return hook


def norm_over(channels: int):
    """OLMo 2's norm runs across all heads: over the active ones alone, the rest zero."""

    def hook(norm, inputs, _output):
        active = inputs[0][..., :channels]
        scaled = F.rms_norm(active, (channels,), norm.weight[:channels], norm.variance_epsilon)
        return F.pad(scaled, (0, inputs[0].shape[-1] - channels))

    return hook


def logits_difference(a: Outcome, b: Outcome) -> float:
    """Largest difference relative to the largest logit."""
    return ((a.logits - b.logits).abs().max() / b.logits.abs().max()).item()


def grads_difference(active: Outcome, reference: Outcome) -> tuple[float, float]:
    """Largest difference relative to the tensor's largest gradient, and relative to the largest of all.

    Raises: AssertionError where the reference has a gradient outside the active part, or none inside.
    """
    by_tensor, largest, all_grads = [], 0.0, []
    for name, whole in reference.grads.items():
        part = active.grads.get(name, whole.new_zeros(tuple(0 for _ in whole.shape)))
        prefix = tuple(slice(size) for size in part.shape)
        outside = whole.clone()
        outside[prefix] = 0
        assert not outside.any(), f"{name} has a gradient outside the active part"
        if part.numel():
            difference = (part - whole[prefix]).abs().max().item()
            by_tensor.append(difference / whole.abs().max().item())
            largest = max(largest, difference)
            all_grads.append(whole.abs().max().item())
    assert set(active.grads) <= set(reference.grads), set(active.grads) - set(reference.grads)
    return max(by_tensor), largest / max(all_grads)


def four_outcomes(variant: str, attention: str, names: list[str], length: int = 12, order: Sequence[int] = ()):
    """For each sub-network: the reference, and by label the nested model in each way and the extracted one.

    `order`: the layers in the order in which depth takes them; without it a depth is a prefix.
    """
    full = tiny_model(variant, attention)
    model = nest(copy.deepcopy(full), SubNetSpace(SPACE, layer_order=order) if order else SPACE)
    models = {way: in_way(model, way) for way in WAYS}
    input_ids = tokens(length=length)
    for subnet in map(SubNet.parse, names):
        yield (
            subnet,
            run_reference(full, subnet, input_ids, order),
            {
                **{way: run_nested(own, subnet, input_ids) for way, own in models.items()},
                "extracted": run_plain(extract(model, subnet), input_ids),
            },
        )


def cases() -> list[tuple[str, str]]:
    """Every family with every attention that Hugging Face has for it (gemma2's soft caps: eager alone)."""
    return [(v, a) for v in VARIANTS for a in ("eager", "sdpa") if (v, a) != ("gemma2", "sdpa")]


def print_table() -> None:
    """Largest relative differences against the reference, fp32, of the nested model (each way) and the extracted."""
    print(f"{'family':24}{'attention':11}{'sub-network':13}{'logits':>9}{'grads':>9}{'by tensor':>11}")
    for variant, attention in cases():
        for subnet, reference, outcomes in four_outcomes(variant, attention, SUBNETS):
            logits = max(logits_difference(o, reference) for o in outcomes.values())
            by_tensor = max(grads_difference(o, reference)[0] for o in outcomes.values())
            overall = max(grads_difference(o, reference)[1] for o in outcomes.values())
            print(f"{variant:24}{attention:11}{subnet.name:13}{logits:9.1e}{overall:9.1e}{by_tensor:11.1e}")

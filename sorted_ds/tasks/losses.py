"""The summed next-token loss, computed in chunks so that the logits of a whole micro-batch never exist.

In: a micro-batch of token ids and labels. Out: the sum over targets of their negative log likelihood, in nats.
The division by the number of the step's targets is the loop's. The head's own module computes the loss and, while it
holds a chunk's logits, the chunk's gradients: under ZeRO-3 a called module's direct parameters are what is gathered,
so the head is gathered once, and nothing of the size [positions, vocabulary] is kept for the backward pass.

Legend: N = positions (rows x row_tokens), H = hidden channels, V = vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sorted_ds.data.loader import NO_TARGET
from sorted_ds.nested.family import Family, LogitsRule

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that exist at a time: 64 MiB in fp32, 512 MiB on a GPU. There each chunk must have a thousand positions, or to
add its share to the head's gradient takes as long as the products that make it."""


class LossHead(nn.Module):
    """The output head. `head(hidden)` gives logits, as Hugging Face's forward expects; with labels it gives the loss.

    Made by `attach_loss_head`, which swaps the class of a model's own `nn.Linear`: names and weights stay.
    """

    weight: nn.Parameter
    rule: LogitsRule
    chunk_elements: dict[str, int]
    """By the kind of device."""

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, count_correct: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits without labels, the summed loss with them; with `count_correct` also the hits of the largest logit.

        `labels[t]` is the token that position t predicts (shifted already), or -100.

        Shapes: hidden [..., H], labels [...] -> fp32 scalar, or (fp32 scalar, int64 scalar), which has no gradient.
        Units: nats, summed over targets.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        chunk = max(1, self.chunk_elements[hidden.device.type] // self.weight.shape[0])
        if count_correct or not torch.is_grad_enabled():
            nll_sum, num_correct = _evaluate(hidden, self.weight, labels, self.rule, chunk)
            return (nll_sum, num_correct) if count_correct else nll_sum
        return _SummedNll.apply(hidden, self.weight, labels, self.rule, chunk)


def attach_loss_head(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """Gives the model's head the loss of its family, in place, and returns the model, nested or plain."""
    head = model.get_submodule(family.head)
    assert head.bias is None, "no family of the table has a bias in its head"
    head.__class__ = LossHead
    head.rule = family.logits_rule(model.config)  # type: ignore[assignment]
    head.chunk_elements = CHUNK_ELEMENTS  # type: ignore[assignment]
    return model


class _SummedNll(torch.autograd.Function):
    """The loss, with its gradients computed chunk by chunk in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, rule: LogitsRule, chunk: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        nll_sum = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = None
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits, slope = _logits(hidden[part], weight, rule)
            nll, logits_grad = _nll_and_gradient(logits, slope, labels[part], rule, weight.dtype)
            del logits, slope
            nll_sum += nll
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[part])
            if needs_weight:
                added = logits_grad.t() @ hidden[part]
                weight_grad = added.float() if weight_grad is None else weight_grad.add_(added)
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return nll_sum

    @staticmethod
    def backward(ctx, nll_grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second copy of the head's gradient would be 1 GiB for V = 128k, H = 4096 in bf16. A second
        # backward through the same loss is then an error of autograd's version check, never a wrong gradient.
        scaled = [None if grad is None else grad.mul_(nll_grad) for grad in ctx.saved_tensors]
        return *scaled, None, None, None


def _logits(hidden: Tensor, weight: Tensor, rule: LogitsRule) -> tuple[Tensor, Tensor | None]:
    """Logits, in fp32 where anything is done to them, and, where they are capped, the derivative of the cap.

    Shapes: [n, H], [V, H] -> [n, V] twice.
    """
    logits = F.linear(hidden, weight)
    if rule == LogitsRule():
        return logits, None
    logits = logits.float()
    if rule.divisor != 1.0:
        logits /= rule.divisor
    if rule.softcap is None:
        return logits, None
    squashed = torch.tanh(logits / rule.softcap)
    return squashed * rule.softcap, 1 - squashed.square()


def _nll_and_gradient(
    logits: Tensor, slope: Tensor | None, labels: Tensor, rule: LogitsRule, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk, in fp32, and its gradient with respect to the head's output, in `dtype`.

    A pass over the logits is what costs here, so there are three: log-probabilities, probabilities, gradient.

    Shapes: logits, slope [n, V], labels [n] -> scalar, [n, V].
    """
    is_target = labels != NO_TARGET
    index = labels.where(is_target, 0).unsqueeze(1)
    log_p = F.log_softmax(logits, 1, dtype=torch.float32)
    nll = -log_p.gather(1, index).squeeze(1).where(is_target, 0).sum()
    gradient = log_p.exp_()
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    if slope is not None:
        gradient *= slope
    scale = (is_target / rule.divisor).unsqueeze(1)
    if dtype == gradient.dtype:
        return nll, gradient.mul_(scale)
    return nll, torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


@torch.no_grad()
def _evaluate(hidden: Tensor, weight: Tensor, labels: Tensor, rule: LogitsRule, chunk: int) -> tuple[Tensor, Tensor]:
    """The summed loss and the number of targets that the largest logit hits."""
    nll_sum = hidden.new_zeros((), dtype=torch.float32)
    num_correct = labels.new_zeros(())
    for part_hidden, part_labels in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits, _ = _logits(part_hidden, weight, rule)
        nll_sum += F.cross_entropy(logits.float(), part_labels, ignore_index=NO_TARGET, reduction="sum")
        num_correct += (logits.argmax(1) == part_labels).sum()
    return nll_sum, num_correct

"""Computes the summed next-token loss in chunks, so that the logits of a whole micro-batch never exist.

In: the hidden states and labels of a micro-batch. Out: the negative log likelihood in nats, summed over targets. The
training loop divides it by the number of the step's targets. The head's own module computes the loss of a chunk and its
gradients at once, while it has the chunk's logits. So no tensor of the size [positions, vocabulary] is kept for the
backward pass. And since ZeRO-3 gathers the direct parameters of a module that is called, it gathers the head only once.

Legend: N = positions (rows x row_tokens), H = hidden channels, V = vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sorted_ds.data.loader import NO_TARGET
from sorted_ds.nested.family import Family, LogitsRule

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""How many logits exist at a time: 64 MiB in fp32, and 512 MiB on a GPU. A GPU needs a thousand positions in each
chunk: with fewer, adding the chunk's part to the head's gradient takes as long as computing that part."""


class LossHead(nn.Module):
    """The output head, which returns logits without labels, as Hugging Face's forward expects, and the loss with them.

    `attach_loss_head` turns a model's own `nn.Linear` into this class, so that names and weights stay as they are.
    """

    weight: nn.Parameter
    rule: LogitsRule
    chunk_elements: dict[str, int]
    """The largest number of logits of a chunk, by the type of device."""

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, count_correct: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the logits, or with `labels` the summed loss.

        `labels[t]` is the token that position t predicts, or -100 if it has no target. With `count_correct` the result
        has no gradient, and also holds the number of targets that have the largest logit.

        Shapes: hidden [..., H], labels [...] -> fp32 scalar, or (fp32 scalar, int64 scalar).
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
    """Turns the head of a nested or plain model into a `LossHead` of its family, in place, and returns the model."""
    head = model.get_submodule(family.head)
    assert head.bias is None, "no family of the table has a bias in its head"
    head.__class__ = LossHead
    head.rule = family.logits_rule(model.config)  # type: ignore[assignment]
    head.chunk_elements = CHUNK_ELEMENTS  # type: ignore[assignment]
    return model


class _SummedNll(torch.autograd.Function):
    """Computes the loss and its gradients chunk by chunk in the forward pass. The backward pass only scales them."""

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
        # In place, because a second copy of the head's gradient would have 1 GiB for V = 128k, H = 4096 in bf16. A
        # second backward pass through the same loss is then an error of autograd's version check, not a wrong gradient.
        scaled = [None if grad is None else grad.mul_(nll_grad) for grad in ctx.saved_tensors]
        return *scaled, None, None, None


def _logits(hidden: Tensor, weight: Tensor, rule: LogitsRule) -> tuple[Tensor, Tensor | None]:
    """Returns the logits, and the derivative of their soft cap, or None without one.

    The logits are in fp32 if they are divided or capped. Shapes: [n, H], [V, H] -> [n, V] twice.
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
    """Returns the summed loss of a chunk, in fp32, and its gradient with respect to the head's output, in `dtype`.

    Reading and writing the logits takes most of the time, so this does it only three times: for the log-probabilities,
    the probabilities and the gradient. `slope`: the derivative of the soft cap.

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
    """Returns the summed loss, and the number of targets that have the largest logit."""
    nll_sum = hidden.new_zeros((), dtype=torch.float32)
    num_correct = labels.new_zeros(())
    for part_hidden, part_labels in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits, _ = _logits(part_hidden, weight, rule)
        nll_sum += F.cross_entropy(logits.float(), part_labels, ignore_index=NO_TARGET, reduction="sum")
        num_correct += (logits.argmax(1) == part_labels).sum()
    return nll_sum, num_correct

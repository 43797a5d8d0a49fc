"""Computes the summed loss of a pass in chunks, so that the logits of a whole micro-batch never exist.

In: the hidden states and labels of a micro-batch, those of several exits together, and a teacher's hidden states, if
there is one. Out: the loss in nats, summed over targets. The training loop divides it by the number of the step's
targets. The head's own module computes the loss of a chunk and its gradients at once, while it has the chunk's logits.
So no tensor of the size [positions, vocabulary] is kept for the backward pass. And since ZeRO-3 gathers the direct
parameters of a module that is called, it gathers the head only once.

Legend: E = exits of a pass, its own end included (nested/exits.py), N = positions (rows x row_tokens), n = positions of
a chunk, H = hidden channels, V = vocabulary.
Source of the divergence: Hinton, Vinyals and Dean, arXiv 1503.02531, section 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sorted_ds.data.loader import NO_TARGET
from sorted_ds.nested.family import Family, LogitsRule

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""How many logits exist at a time: 64 MiB in fp32, and 512 MiB on a GPU. A GPU needs a thousand positions in each
chunk: with fewer, adding the chunk's part to the head's gradient takes as long as computing that part."""


@dataclass(frozen=True)
class Terms:
    """How the terms of the loss are weighted."""

    teacher_weight: float = 0.5
    """The weight of the divergence from the teacher. The loss of the labels has the rest. Without a teacher it has
    all."""
    temperature: float = 1.0
    exit_weight: float = 0.0
    """The weight of each shallower exit, relative to the pass's own end."""

    def exit_shares(self, num_exits: int) -> list[float]:
        """Returns the share of each exit in the loss, the shallowest first. They add up to 1."""
        weights = [self.exit_weight] * (num_exits - 1) + [1.0]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Teacher:
    """What a head needs to compute a teacher's predictions."""

    hidden: Tensor
    """The last hidden states of the same rows. Shape [..., H of the teacher]."""
    weight: Tensor | None = None
    """The teacher's head, [V of the teacher, H of the teacher]; None for the head that learns."""
    rule: LogitsRule | None = None
    """The rule of the teacher's head; None for that of the head that learns."""


@dataclass(frozen=True)
class Parts:
    """The terms of a loss before they are weighted, each in nats and summed over targets. They have no gradient."""

    nll: Tensor
    """The loss of the labels at each exit, the shallowest first. Shape [E]."""
    divergence: Tensor
    """The divergence from the teacher at each exit, or 0 without one. Shape [E]."""


class LossHead(nn.Module):
    """The output head, which returns logits without labels, as Hugging Face's forward expects, and the loss with them.

    `attach_loss_head` turns a model's own `nn.Linear` into this class, so that names and weights stay as they are.
    """

    weight: nn.Parameter
    rule: LogitsRule
    chunk_elements: dict[str, int]
    """The largest number of logits of a chunk, by the type of device."""

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        count_correct: bool = False,
        terms: Terms | None = None,
        teacher: Teacher | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Parts]:
        """Returns the logits, or with `labels` the summed loss.

        `labels[t]` is the token that position t predicts, or -100 if it has no target. With `count_correct` the result
        has no gradient, and also holds the number of targets that have the largest logit. With `terms` the loss is the
        weighted sum of all exits, and of the divergence from a `teacher`, and its parts are returned too.

        Shapes: hidden [..., H], labels [...] -> fp32 scalar, or (fp32 scalar, int64 scalar). With `terms` hidden is
        [E * B, ..., H] for labels [B, ...].
        Units: nats, summed over targets.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        chunk = max(1, self.chunk_elements[hidden.device.type] // self.weight.shape[0])
        if count_correct or not torch.is_grad_enabled():
            nll_sum, num_correct = _evaluate(hidden, self.weight, labels, self.rule, chunk)
            return (nll_sum, num_correct) if count_correct else nll_sum
        loss, nll, divergence = _SummedLoss.apply(
            hidden, self.weight, labels, self.rule, chunk, terms or Terms(), self._flat(teacher)
        )
        return loss if terms is None else (loss, Parts(nll, divergence))

    def _flat(self, teacher: Teacher | None) -> Teacher | None:
        if teacher is None:
            return None
        weight = self.weight.detach() if teacher.weight is None else teacher.weight
        return Teacher(teacher.hidden.flatten(0, -2), weight, teacher.rule or self.rule)


def attach_loss_head(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """Turns the head of a nested or plain model into a `LossHead` of its family, in place, and returns the model."""
    head = model.get_submodule(family.head)
    assert head.bias is None, "no family of the table has a bias in its head"
    head.__class__ = LossHead
    head.rule = family.logits_rule(model.config)  # type: ignore[assignment]
    head.chunk_elements = CHUNK_ELEMENTS  # type: ignore[assignment]
    return model


class _SummedLoss(torch.autograd.Function):
    """Computes the loss and its gradients chunk by chunk in the forward pass. The backward pass only scales them."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rule: LogitsRule,
        chunk: int,
        terms: Terms,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: hidden [E * N, H], weight [V, H], labels [N] -> the loss, and its two parts at each exit [E]."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        by_exit = hidden.view(-1, len(labels), hidden.shape[1])
        shares = terms.exit_shares(len(by_exit))
        nll, divergence = hidden.new_zeros(2, len(by_exit), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = None
        for part in _parts(len(labels), chunk):
            lesson = None if teacher is None else _Lesson.of(teacher, part, terms, weight.shape[0], labels[part])
            for number, share in enumerate(shares):
                own = by_exit[number, part]
                logits, slope = _logits(own, weight, rule)
                part_nll, part_divergence, grad = _loss_and_gradient(
                    logits, slope, labels[part], rule, weight.dtype, lesson, share
                )
                del logits, slope
                nll[number] += part_nll
                divergence[number] += part_divergence
                if hidden_grad is not None:
                    torch.mm(grad, weight, out=hidden_grad.view_as(by_exit)[number, part])
                if needs_weight:
                    added = grad.t() @ own
                    weight_grad = added.float() if weight_grad is None else weight_grad.add_(added)
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(nll, divergence)
        taught = 0.0 if teacher is None else terms.teacher_weight
        loss = ((1 - taught) * nll + taught * divergence) @ nll.new_tensor(shares)
        return loss, nll, divergence

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        # In place, because a second copy of the head's gradient would have 1 GiB for V = 128k, H = 4096 in bf16. A
        # second backward pass through the same loss is then an error of autograd's version check, not a wrong gradient.
        scaled = [None if grad is None else grad.mul_(loss_grad) for grad in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


def _parts(num: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, num, chunk))


@dataclass(frozen=True)
class _Lesson:
    """A teacher's predictions for a chunk of positions, which all exits learn from."""

    weight: float
    temperature: float
    probabilities: Tensor
    """At the temperature; 0 at positions without a target. Shape [n, V]."""
    negative_entropy: Tensor
    """Summed over the targets of the chunk."""

    @classmethod
    def of(cls, teacher: Teacher, part: slice, terms: Terms, vocabulary: int, labels: Tensor) -> "_Lesson":
        """A teacher may have fewer or more rows in its head than `vocabulary`, by padding that no token uses."""
        assert teacher.weight is not None
        assert teacher.rule is not None
        logits, _ = _logits(teacher.hidden[part], teacher.weight[:vocabulary], teacher.rule)
        log_p = F.log_softmax(logits.float() / terms.temperature, 1)
        del logits
        p = log_p.exp() * (labels != NO_TARGET).unsqueeze(1)
        negative_entropy = torch.einsum("nv,nv->", p, log_p)
        return cls(terms.teacher_weight, terms.temperature, F.pad(p, (0, vocabulary - p.shape[1])), negative_entropy)


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


def _loss_and_gradient(
    logits: Tensor,
    slope: Tensor | None,
    labels: Tensor,
    rule: LogitsRule,
    dtype: torch.dtype,
    lesson: _Lesson | None,
    share: float,
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Returns the two summed parts of a chunk's loss, in fp32, and the gradient for the head's output, in `dtype`.

    The gradient is that of `share` times the loss. Reading and writing the logits takes most of the time, so this does
    it only three times without a lesson: for the log-probabilities, the probabilities and the gradient. `slope`: the
    derivative of the soft cap.

    Shapes: logits, slope [n, V], labels [n] -> scalar, scalar, [n, V].
    """
    is_target = labels != NO_TARGET
    index = labels.where(is_target, 0).unsqueeze(1)
    log_p = F.log_softmax(logits, 1, dtype=torch.float32)
    nll = -log_p.gather(1, index).squeeze(1).where(is_target, 0).sum()
    divergence, taught = (0.0, None) if lesson is None else _divergence_and_gradient(logits, log_p, lesson)
    gradient = log_p.exp_()
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    if taught is not None and lesson is not None:
        gradient = gradient.mul_(1 - lesson.weight).add_(taught, alpha=lesson.weight)
    if slope is not None:
        gradient *= slope
    scale = (is_target * share / rule.divisor).unsqueeze(1)
    if dtype == gradient.dtype:
        return nll, divergence, gradient.mul_(scale)
    return nll, divergence, torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _divergence_and_gradient(logits: Tensor, log_p: Tensor, lesson: _Lesson) -> tuple[Tensor, Tensor]:
    """Returns the divergence of a chunk, times the squared temperature, and its gradient for the logits.

    `log_p`: the log-probabilities at temperature 1. The divergence from teacher to student is the sum of
    q * (log q - log p). Rows without a target have q = 0, and a gradient that the caller sets to 0.
    """
    t = lesson.temperature
    own = log_p if t == 1 else F.log_softmax(logits.float() / t, 1)
    divergence = lesson.negative_entropy - torch.einsum("nv,nv->", lesson.probabilities, own)
    return divergence * t**2, (own.exp() - lesson.probabilities) * t


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

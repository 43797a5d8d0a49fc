"""Drafts: a target and the smaller model that proposes its tokens, each with what it has seen.

In: two sub-networks of a full network, or two plain models. Out: logits of either one. A draft whose layers come first
in the target, at the target's width, computes a part of the target (`SharedDraft`): weights and cache are shared, and
verification runs only the layers that remain. Any other draft has a cache of its own (`OwnDraft`).
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.generation.cached import Cached
from sorted_ds.deploy.view import tail_view, view
from sorted_ds.families import family_of
from sorted_ds.nested import Family
from sorted_ds.space import SubNet, SubNetSpace
from sorted_ds.space.axes import DEPTH


class Draft(Protocol):
    """A draft with its target."""

    target: PreTrainedModel
    draft: PreTrainedModel
    cost: float
    """The cost of a step of the draft, as a share of a step of the target."""

    def begin(self, num_rows: int) -> None:
        """Forgets everything, and begins with this number of rows."""

    @property
    def seen(self) -> Tensor:
        """The number of tokens of each row that the draft has seen. [B], on the CPU."""

    def propose(self, ids: Tensor, seen: Tensor) -> Tensor:
        """Returns the draft's logits for the token that comes next. `ids` are what the draft has not seen yet.

        Shapes: ids [B, Q], seen afterwards [B] -> [B, 1, V].
        """

    @property
    def verified(self) -> Tensor:
        """The number of tokens of each row that the target has seen. [B], on the CPU."""

    def verify(self, ids: Tensor, seen: Tensor, num_logits: int) -> Tensor:
        """Returns the target's logits after the last `num_logits` of the ids, which the target has not seen yet.

        Shapes: ids [B, Q], seen afterwards [B] -> [B, num_logits, V].
        """

    def forget(self, num_tokens: Tensor) -> None:
        """Forgets what was proposed beyond these tokens, of which the last one is new. [B]"""

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, by their numbers."""


class TwoCaches:
    """What both kinds of draft do with what the draft and the model that verifies have seen."""

    _draft: Cached
    _verifier: Cached

    @property
    def seen(self) -> Tensor:
        return self._draft.seen

    @property
    def verified(self) -> Tensor:
        return self._verifier.seen

    def propose(self, ids: Tensor, seen: Tensor) -> Tensor:
        return self._draft.run(ids, seen, 1)

    def select(self, rows: Tensor) -> None:
        self._draft.select(rows)
        self._verifier.select(rows)


class OwnDraft(TwoCaches):
    """Any plain model as the draft of another one, with a cache of its own."""

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel):
        """Raises: UserError if the draft has another vocabulary, or is not smaller than the target."""
        self.target, self.draft = target, draft
        check_pair(target, draft)
        self.cost = _num_read(draft) / _num_read(target)
        self.begin(0)

    def begin(self, num_rows: int) -> None:
        self._draft = Cached(self.draft, num_rows, new_layers(self.draft))
        self._verifier = Cached(self.target, num_rows, new_layers(self.target))

    def verify(self, ids: Tensor, seen: Tensor, num_logits: int) -> Tensor:
        return self._verifier.run(ids, seen, num_logits)

    def forget(self, num_tokens: Tensor) -> None:
        """The draft also forgets the last but one, so that it misses equally many in each row: two.

        Where all proposed tokens were kept, it has not seen the last one of them.
        """
        self._verifier.forget(num_tokens - 1)
        self._draft.forget(num_tokens - 2)


class SharedDraft(TwoCaches):
    """The first layers of a target as its draft. The target's other layers continue what the draft has computed."""

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel, tail: PreTrainedModel, final_norm: str):
        """`draft` and `tail` are views of their own, and `final_norm` is the path of the norm after the last layer."""
        self.target, self.draft, self.tail = target, draft, tail
        self.cost = _num_read(draft) / _num_read(target)
        self._hidden: list[Tensor] = []
        draft.get_submodule(final_norm).register_forward_pre_hook(self._keep)
        self.begin(0)

    def _keep(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keeps the hidden states of the draft's last layer."""
        self._hidden.append(inputs[0])

    def begin(self, num_rows: int) -> None:
        layers = new_layers(self.target)
        depth = self.draft.config.num_hidden_layers
        self._draft = Cached(self.draft, num_rows, layers[:depth])
        self._verifier = Cached(self.tail, num_rows, layers[depth:])
        self._hidden.clear()

    def verify(self, ids: Tensor, seen: Tensor, num_logits: int) -> Tensor:
        num_computed = sum(hidden.shape[1] for hidden in self._hidden)
        self._draft.run(ids[:, num_computed:], seen, 1)
        hidden = torch.cat(self._hidden, dim=1)
        self._hidden.clear()
        return self._verifier.run(hidden, seen, num_logits)

    def forget(self, num_tokens: Tensor) -> None:
        self._draft.forget(num_tokens - 1)
        self._verifier.forget(num_tokens - 1)


def draft_of(model: PreTrainedModel, target: SubNet | str, draft: SubNet | str, space: SubNetSpace) -> Draft:
    """Returns one sub-network of a full network as the draft of another one. It shares the cache where it can.

    A name is looked up in the space. A `SubNet` may have any sizes that fit in the full network.

    Raises: UserError for a name that is not in the space, for sizes that do not fit, or for a draft that is not
    smaller than the target.
    """
    large, small = (each if isinstance(each, SubNet) else space[each] for each in (target, draft))
    family = family_of(model.config.model_type)
    target_view, draft_view = (view(model, subnet, space=space) for subnet in (large, small))
    check_pair(target_view, draft_view, (large.name, small.name))
    if not can_share(family, space, large, small):
        return OwnDraft(target_view, draft_view)
    tail = tail_view(model, large, small.depth, space=space)
    return SharedDraft(target_view, draft_view, tail, family.final_norm)


def can_share(family: Family, space: SubNetSpace, target: SubNet, draft: SubNet) -> bool:
    """Returns whether the draft computes the target's first layers: same width, and its layers come first."""
    is_first = space.layers_of(target)[: draft.depth] == space.layers_of(draft)
    is_as_wide = draft.replace(**{DEPTH: target.depth}) == target
    has_own_layers = set(family.owned) - {family.final_norm}
    return draft.depth < target.depth and is_first and is_as_wide and not has_own_layers


def new_layers(model: PreTrainedModel) -> list[DynamicLayer]:
    """Returns the layers of a cache for a model. None of them forgets what lies before a window."""
    return [DynamicLayer() for _ in range(model.config.num_hidden_layers)]


def _num_read(model: Any) -> int:
    """Returns the number of weights that a decoding step reads: all but the embeddings, from which it looks one up."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(parameter.numel() for parameter in model.parameters()) - (
        0 if head is embeddings else embeddings.numel()
    )


def check_pair(
    target: PreTrainedModel, draft: PreTrainedModel, names: tuple[str, str] = ("the target", "the draft")
) -> None:
    """Raises: UserError if the models have different vocabularies, or the draft is not smaller than the target."""
    large, small = (model.config.vocab_size for model in (target, draft))
    if large != small:
        raise UserError(f"{names[1]} has a vocabulary of {small} and {names[0]} one of {large}. They must be the same.")
    large, small = target.num_parameters(), draft.num_parameters()
    if small >= large:
        raise UserError(
            f"{names[1]} has {small:,} parameters, and {names[0]} has {large:,}, so it cannot be its draft. Name a "
            "draft that is smaller."
        )

"""`Cached`: a plain model with the keys and values of the rows that it has seen, some of which can be forgotten again.

In: token ids or hidden states of a batch of rows. Out: logits. The rows of a batch have seen different numbers of
tokens. Their entries are kept aligned to the right, as in a batch with padding on the left, so transformers' masks fit:
two entries of a row are as far apart as their positions, which a sliding window counts on. The caches keep what lies
before a window, because tokens may be taken back, and the mask cuts the window.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


class Cached:
    """A plain causal language model, and what it has seen.

    Shapes: B rows, Q new columns, C columns in the cache, H channels, V tokens of the vocabulary.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, layers: Sequence[DynamicLayer]):
        """`layers`: the layers of the cache, one for each of the model's."""
        self.model, self.layers = model, list[Any](layers)
        self.cache = Cache(layers=self.layers)
        self.cache_key = cache_key(model)
        self.seen = torch.zeros(num_rows, dtype=torch.long)
        """The number of tokens that each row has seen, without padding. [B], on the CPU."""

    def run(self, inputs: Tensor, seen: Tensor, num_logits: int) -> Tensor:
        """Runs the model on new columns, and returns the logits of the last `num_logits` ones.

        `seen`: the number of tokens that each row has seen afterwards. It tells what is padding on the left.

        Shapes: token ids [B, Q] or hidden states [B, Q, H] -> [B, num_logits, V].
        """
        num_new = inputs.shape[1]
        num_columns = self.cache.get_seq_length() + num_new
        new = torch.arange(num_new, device=inputs.device) - num_new
        columns = torch.arange(num_columns, device=inputs.device)
        if bool((seen == num_columns).all()):
            mask, positions = None, (new + num_columns)[None]
        else:
            on_device = seen.to(inputs.device)[:, None]
            mask, positions = columns >= num_columns - on_device, (new + on_device).clamp(min=0)
        self.seen = seen
        return self.model(
            **{"input_ids" if inputs.dim() == 2 else "inputs_embeds": inputs, self.cache_key: self.cache},
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=num_logits,
        ).logits

    def forget(self, seen: Tensor) -> None:
        """Forgets what a row has seen after its first `seen` tokens, and aligns the rest to the right. `seen`: [B]."""
        if not self.layers[0].is_initialized:
            return
        seen = torch.minimum(self.seen, seen)
        num_columns, width = self.cache.get_seq_length(), int(seen.max())
        surplus = self.seen - seen
        first = num_columns - surplus - width
        if bool((surplus == surplus[0]).all()):
            start = int(first[0])
            for layer in self.layers:
                layer.keys, layer.values = (x[:, :, start : start + width] for x in (layer.keys, layer.values))
        else:
            columns = (first[:, None] + torch.arange(width)).clamp(min=0)  # below 0 is padding
            for layer in self.layers:
                layer.keys, layer.values = (_take(x, columns) for x in (layer.keys, layer.values))
        self.seen = seen

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, by their numbers. On the CPU."""
        self.seen = self.seen[rows]
        for layer in self.layers:
            if layer.is_initialized:
                layer.batch_select_indices(rows.to(layer.keys.device))


def cache_key(model: PreTrainedModel) -> str:
    """Returns the name of the forward pass's argument for the cache, which transformers 5.20 renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _take(entries: Tensor, columns: Tensor) -> Tensor:
    """Returns other columns for each row. Shapes: entries [B, G, C, K], columns [B, W] -> [B, G, W, K]."""
    index = columns.to(entries.device)[:, None, :, None]
    return entries.gather(2, index.expand(-1, entries.shape[1], -1, entries.shape[3]))

"""What tests and benchmarks give the engine: batches of causal language modelling, and losses of plain models."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sorted_ds.data.loader import Batch, MicroBatch
from sorted_ds.families import FAMILIES, family_of
from sorted_ds.tasks import TASKS, SummedLoss

TASK = TASKS["causal_lm"]
LLAMA = FAMILIES["llama"]


def batch(ids: Tensor, labels: Tensor) -> Batch:
    """Shapes: [rows, row_tokens] both; the labels are shifted already."""
    return {"input_ids": ids, "labels": labels}


def blank(rows: int, row_tokens: int) -> MicroBatch:
    """Something to warm up an engine with."""
    ids = torch.zeros(rows, row_tokens, dtype=torch.int64)
    return MicroBatch(batch(ids, ids), num_targets=ids.numel(), num_rows=rows)


def summed(model: PreTrainedModel) -> SummedLoss:
    """A plain or nested model that ends in its summed loss: call it with `input_ids` and `labels`."""
    return SummedLoss(model, TASK, family_of(model.config.model_type))

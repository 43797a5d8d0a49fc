"""Causal language modelling as a task: what a batch holds, what is summed, which metrics are made of the sums."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sorted_ds.base.errors import UserError
from sorted_ds.data.loader import NO_TARGET
from sorted_ds.data.rows import Row
from sorted_ds.tasks import LOSS, TASKS, task_of
from tests.batches import LLAMA, TASK, batch, summed
from tests.families import tiny_model, tokens
from tests.trained import tokenizer


def test_a_task_is_found_by_the_name_in_the_run_file():
    assert task_of("causal_lm") is TASKS["causal_lm"] is TASK
    with pytest.raises(UserError, match=r"task = 'causal' is not known\. Known: causal_lm\."):
        task_of("causal")


def test_a_micro_batch_holds_shifted_labels_and_is_filled_up_with_rows_without_targets():
    every, none = np.ones(5, bool), np.zeros(5, bool)
    rows = [Row(np.array(ids), every, none) for ids in ([5, 6, 7, 8, 9], [1, 2, 3, 4, 5])]
    made = TASK.collate(rows, size=3, row_tokens=4)
    assert made.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [1, 2, 3, 4], [0, 0, 0, 0]]
    assert made.inputs["labels"].tolist() == [[6, 7, 8, 9], [2, 3, 4, 5], [NO_TARGET] * 4]
    assert (made.num_rows, made.num_targets) == (2, 8)
    assert made.num_targets == (made.inputs["labels"] != NO_TARGET).sum()
    assert list(made.inputs) == ["input_ids", "labels"]


def test_what_is_not_learned_has_no_label_and_isolated_documents_have_positions():
    is_target = np.array([True, False, True, True, False])
    row = Row(np.array([5, 6, 7, 8, 9]), is_target, ~is_target, np.array([0, 0, 1, 2]))
    made = TASK.collate([row], size=2, row_tokens=4)
    assert made.inputs["labels"].tolist() == [[NO_TARGET, 7, 8, NO_TARGET], [NO_TARGET] * 4]
    assert made.inputs["position_ids"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert made.num_targets == 2


def test_the_sums_are_those_of_the_models_own_logits():
    model = tiny_model("llama").eval()
    input_ids, labels = tokens(rows=3), tokens(rows=3, seed=2)
    labels[1, 3:] = NO_TARGET
    logits = model(input_ids=input_ids).logits
    with torch.no_grad():
        sums = summed(model)(**batch(input_ids, labels), mode="evaluate")
    assert list(sums) == [LOSS, "accuracy"], "the loss comes first"
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=NO_TARGET)
    # fp32, sums of 27 targets in another order.
    assert sums[LOSS][0].item() == pytest.approx(nats.item(), rel=1e-6)
    assert sums["accuracy"][0] == ((logits.argmax(-1) == labels) & (labels != NO_TARGET)).sum()
    assert [int(count) for _, count in sums.values()] == [27, 27]


def test_without_metrics_the_loss_alone_is_computed_and_has_a_gradient():
    loss = summed(tiny_model("llama"))
    rows = batch(tokens(), tokens(seed=2))
    sums = TASK.sums(loss.model, LLAMA, TASK.states(loss.model, LLAMA, rows), rows, with_metrics=False)
    assert list(sums) == [LOSS]
    assert sums[LOSS][0].requires_grad
    assert torch.equal(loss(**batch(tokens(), tokens(seed=2))), sums[LOSS][0])


def test_metrics_are_means_of_the_totals():
    totals = {LOSS: (30.0, 20.0), "accuracy": (5.0, 20.0)}
    values = {metric.name: metric.value(totals) for metric in TASK.metrics}
    assert values == {LOSS: 1.5, "perplexity": math.exp(1.5), "accuracy": 0.25}
    assert [metric.text(values[metric.name]) for metric in TASK.metrics] == ["1.5000", "4.48", "25.0%"]
    assert TASK.metrics[0].name == LOSS, "the first is the loss"


@pytest.mark.parametrize("loss", [1e6, math.inf, math.nan])
def test_a_perplexity_beyond_double_precision_is_infinite(loss):
    perplexity = next(metric for metric in TASK.metrics if metric.name == "perplexity")
    assert perplexity.value({LOSS: (loss, 1.0)}) == math.inf


def test_a_probe_has_a_text_and_random_ids_of_the_whole_vocabulary(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    config = tiny_model("llama").config
    probe = TASK.probe(tmp_path, config)
    assert list(probe) == ["input_ids"]
    assert probe["input_ids"].shape == (4, 64)
    assert probe["input_ids"][0, :3].tolist() == [ord(letter) for letter in "The"]
    assert torch.equal(probe["input_ids"], TASK.probe(tmp_path, config)["input_ids"])
    with pytest.raises(UserError, match=r"has no tokenizer"):
        TASK.probe(tmp_path / "nothing", config)

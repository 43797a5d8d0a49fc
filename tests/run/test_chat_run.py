"""A run on isolated conversations, on two ranks, equals plain Hugging Face on each conversation by itself."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sorted_ds.commands.cli import main
from sorted_ds.data.loader import Loader
from sorted_ds.data.rows import Row
from sorted_ds.data.text.tokenizer import load_tokenizer
from sorted_ds.run.monitor import TRAINING_LOSS
from sorted_ds.run.run_file import load_run
from sorted_ds.tasks import task_of
from tests.chats import PLAIN, chat_tokenizer, lines, turns
from tests.launched import metrics, run_dir, train
from tests.run.test_init import run_of

RATE = 0.05
SETTINGS = ["train.steps=1", "checkpoint.every_steps=1", "optim.name=sgd", f"optim.learning_rate={RATE}"]
SETTINGS += [
    "optim.clip_norm=0",
    "optim.weight_decay=0",
    "optim.decay=constant",
    "optim.warmup_steps=0",
    "sampling.strategy=full",
]
"""One step of plain SGD of the full network, on 8 rows: 4 on each rank."""


@pytest.fixture(scope="module")
def trained(chat_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    chat_tokenizer(chat_base, folder / "model", PLAIN)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(2)
    vocabulary = len(load_tokenizer(str(folder / "model")))
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=vocabulary)).save_pretrained(folder / "model")
    records = [
        {"messages": turns(f"{k}+{k}?" * (k % 5 + 1), f"{2 * k} " * (k % 7 + 1), "why?", "so")} for k in range(60)
    ]
    lines(folder / "chat.jsonl", records)
    run = run_of(folder)
    keys = 'files = ["chat.jsonl"]\nform = "messages"'
    isolated = (
        run.read_text().replace('text = ["text"]', keys).replace("row_tokens = 32", "row_tokens = 32\nisolate = true")
    )
    run.write_text(isolated)
    train(run, *SETTINGS)
    return run


def rows_of(run: Path, is_validation: bool) -> list[Row]:
    """All validation rows, or the training rows of the first step."""
    settings = load_run(run)
    task = task_of(settings.task)
    rows = task.rows(task.find_prepared(settings), 32, is_validation, isolate=True)
    if is_validation:
        count = min(settings.eval.rows, len(rows))
        return [rows[number * len(rows) // count] for number in range(count)]
    loader = Loader(rows, lambda rows, size: rows, settings.seed, 8, 8, 0, 1)
    return loader.batches(0, 1)[0][0]


def plain_sums(model: PreTrainedModel, rows: list[Row]) -> tuple[Tensor, int]:
    """The summed loss of the answers, each conversation of a row by itself, and their number of tokens."""
    nll, num_targets = torch.zeros(()), 0
    for row in rows:
        starts = sorted({0, *(k for k in range(len(row.ids)) if row.begins[k])})
        for start, stop in zip(starts, [*starts[1:], len(row.ids)], strict=True):
            ids, learned = torch.tensor(row.ids[start:stop]), torch.tensor(row.is_target[start:stop])[1:]
            if learned.any():
                logits = model(input_ids=ids[None, :-1]).logits[0]
                nll = nll + F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum")
                num_targets += int(learned.sum())
    return nll, num_targets


def test_a_step_on_two_ranks_is_that_of_plain_hugging_face_on_each_conversation(trained):
    model = AutoModelForCausalLM.from_pretrained(trained.parent / "model", attn_implementation="eager")
    rows = rows_of(trained, is_validation=False)
    per_row = [int(row.is_target[1:].sum()) for row in rows]
    assert sum(per_row[::2]) != sum(per_row[1::2]), "the ranks have different numbers of targets"
    nll, num_targets = plain_sums(model, rows)
    (nll / num_targets).backward()
    logged = next(row for row in metrics(trained) if TRAINING_LOSS in row)
    assert logged[TRAINING_LOSS] == pytest.approx(float(nll.detach()) / num_targets, rel=1e-6)
    own = AutoModelForCausalLM.from_pretrained(run_dir(trained) / "model").state_dict()
    moved = 0.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            expected = weight - RATE * weight.grad
            moved = max(moved, float((own[name] - weight).abs().max()))
            assert torch.allclose(own[name], expected, atol=1e-7), name  # fp32 sums in another order
    assert moved > 1e-4


def test_evaluation_during_and_after_training_is_that_of_plain_hugging_face(trained, capsys):
    table = json.loads((run_dir(trained) / "subnets.json").read_text())
    rows = table["subnets"] if isinstance(table, dict) else table
    full = max(rows, key=lambda row: row["parameters"])
    model = AutoModelForCausalLM.from_pretrained(run_dir(trained) / "model").eval()
    with torch.no_grad():
        nll, num_targets = plain_sums(model, rows_of(trained, is_validation=True))
    assert full["num_targets"] == num_targets
    assert full["loss"] == pytest.approx(float(nll) / num_targets, rel=1e-5)
    assert main(["eval", str(run_dir(trained)), "--subnets", full["subnet"], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["measured"]
    assert next(row for row in again if row["subnet"] == full["subnet"])["loss"] == pytest.approx(
        full["loss"], rel=1e-6
    )


def test_isolation_belongs_to_a_run(trained, capsys):
    assert main(["plan", str(trained), *SETTINGS, "batch.isolate=false"]) == 2
    assert "belongs to another run: batch.isolate = true there, false here" in capsys.readouterr().err

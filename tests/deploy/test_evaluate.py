"""Evaluation equals plain Hugging Face losses of the extracted models, whoever holds which rows."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sorted_ds.base.errors import UserError
from sorted_ds.data.loader import MicroBatch
from sorted_ds.deploy.evaluate import choose_spread, evaluate_family, evaluate_subnets, forward_of
from sorted_ds.deploy.export import export
from sorted_ds.deploy.family import load
from sorted_ds.deploy.view import view
from sorted_ds.nested import costs_of, extract
from sorted_ds.space import SubNetSpace
from tests.batches import TASK, batch
from tests.families import SPACE, SUBNETS, tokens
from tests.trained import ROW_TOKENS, load_nested, set_keys, trained_run


def batches(number: int = 3) -> list[MicroBatch]:
    """Unequal numbers of targets; the last has a row without any."""
    made = []
    for seed in range(number):
        rows = tokens(rows=2, length=ROW_TOKENS + 1, seed=seed)
        labels = rows[:, 1:].clone()
        labels[0, : 2 + 3 * seed] = -100
        if seed == number - 1:
            labels[1] = -100
        made.append(MicroBatch(batch(rows[:, :-1], labels), int((labels != -100).sum()), num_rows=2))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_nested(trained_run(tmp_path_factory.mktemp("run")))


def evaluate_all(run):
    family = load(run)
    return evaluate_family(family, list(family))


def measured(model, names, rows, total=list):
    costs = costs_of(model.space, model.family, model.config, ROW_TOKENS)
    subnets = [model.space[name] for name in names]
    return [
        row
        for subnet in subnets
        for row in evaluate_subnets(
            forward_of(view(model, subnet), TASK, model.family), [subnet], rows, TASK.metrics, total, costs
        )
    ]


def expected(model, name, rows):
    """Loss and accuracy by Hugging Face's logits of the plain model, one row at a time, in double precision."""
    plain = extract(model, name).eval()
    nll = correct = count = 0.0
    for micro_batch in rows:
        for ids, labels in zip(*micro_batch.inputs.values(), strict=True):
            logits = plain(ids[None]).logits[0].double()
            nll += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            correct += (logits.argmax(-1) == labels).sum().item()
            count += (labels != -100).sum().item()
    return nll / count, correct / count


@torch.no_grad()
@pytest.mark.parametrize("name", SUBNETS)
def test_loss_and_accuracy_are_those_of_the_extracted_model(model, name):
    rows = batches()
    row = measured(model, [name], rows)[0]
    loss, accuracy = expected(model, name, rows)
    assert row.loss == pytest.approx(loss, rel=1e-5)  # fp32 logits, summed in another order
    assert row.metrics["accuracy"] == accuracy
    assert row.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert row.num_targets == sum(micro_batch.num_targets for micro_batch in rows)


def test_costs_are_those_of_the_sub_network(model):
    for row in measured(model, SUBNETS, batches(1)):
        plain = extract(model, row.subnet)
        assert row.parameters == sum(p.numel() for p in plain.parameters())
        assert row.kv_bytes_per_token == 2 * 2 * plain.config.num_hidden_layers * 12 * plain.config.num_key_value_heads


def test_sums_over_ranks_equal_one_process(model):
    rows, names = batches(), SUBNETS[:2]
    told = []
    without_targets = TASK.collate([], size=2, row_tokens=ROW_TOKENS)  # what a rank has when there are too few rows
    for share in (rows[:2], rows[2:], [without_targets]):
        own = []
        measured(model, names, share, lambda sums, own=own: own.append(sums) or [1.0] * len(sums))
        told.append(own)
    sums = iter([sum(column) for column in zip(*of_ranks, strict=True)] for of_ranks in zip(*told, strict=True))
    together = measured(model, names, [without_targets], lambda _: next(sums))
    alone = measured(model, names, rows)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
        assert (ours.metrics["accuracy"], ours.num_targets) == (theirs.metrics["accuracy"], theirs.num_targets)


def test_a_spread_holds_the_full_and_the_smallest_in_order():
    for number in (2, 3, 9, 26, 27, 99):
        chosen = choose_spread(SPACE, number)
        assert len(chosen) == min(number, len(SPACE))
        assert SPACE.smallest in chosen
        assert SPACE.full in chosen
        positions = [SPACE.index(subnet) for subnet in chosen]
        assert positions == sorted(positions)
        gaps = [b - a for a, b in itertools.pairwise(positions)]
        assert max(gaps) - min(gaps) <= 1


def test_a_space_of_one_is_its_own_spread():
    assert choose_spread(SubNetSpace.of(["d1-g1-f8"])) == [SubNetSpace.of(["d1-g1-f8"]).full]


def test_the_stored_precision_is_kept_unless_another_is_asked_for(tmp_path):
    run = trained_run(tmp_path, dtype=torch.bfloat16)
    assert load(run).full.dtype == torch.bfloat16
    widened = load(run / "model", dtype=torch.float32).full
    assert widened.dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        ours, theirs = widened(tokens()).logits, plain(tokens()).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("sorted.json", r"has no sorted\.json"),
        ("config.json", r"has a sorted\.json but no config\.json"),
        ("model.safetensors", r"holds neither model\.safetensors"),
    ],
)
def test_a_missing_file_is_named(tmp_path, missing, message):
    run = trained_run(tmp_path)
    (run / "model" / missing).unlink()
    with pytest.raises(UserError, match=message):
        _ = load(run).full


REFUSED_CONFIGS = [
    ({"model_type": "foo"}, "has model type `foo`"),
    ({"model_type": "t5"}, "model family 't5' is not known"),
    ({"model_type": ["llama"]}, "unhashable"),
    ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "has a quantization_config"),
    ({"dtype": "foo"}, "no attribute 'foo'"),
    ({"dtype": "int8"}, "dtype torch.int8 is not a precision of weights"),
    ({"dtype": {"model": "float32"}}, "is not a precision of weights"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"num_key_value_heads": 0}, "by zero"),
    ({"num_hidden_layers": 2}, "the model is d2-g4-f112"),
    ({"pad_token_id": 9999}, "Padding_idx"),
    ({"vocab_size": -1}, "negative dimension"),
]


@pytest.mark.parametrize(("keys", "reason"), REFUSED_CONFIGS, ids=str)
def test_a_config_that_cannot_be_used_is_one_line_that_names_it(tmp_path, keys, reason):
    run = trained_run(tmp_path / "run")
    set_keys(run / "model" / "config.json", **keys)
    check_config_error(run, reason)


@pytest.mark.parametrize("text", ["nope", "", "5", "{}", "[]", "[" * 100_000])
def test_a_config_that_is_no_config_is_one_line_that_names_it(tmp_path, text):
    run = trained_run(tmp_path / "run")
    (run / "model" / "config.json").write_text(text)
    check_config_error(run, "")


def check_config_error(run, reason):
    """Loading, evaluating and exporting the model give one line that names config.json."""
    out = run / "small"
    for use in (
        lambda: load(run),
        lambda: evaluate_all(run),
        lambda: export(run, ["d1-g1-f32"], [out]),
    ):
        with pytest.raises(UserError) as raised:
            use()
        message = str(raised.value)
        assert f"{run / 'model' / 'config.json'}" in message
        assert reason in message
        assert "\n" not in message
    assert not out.exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, number):
    run = trained_run(tmp_path / "run")
    weights = load_file(run / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 70] = number
    save_file(weights, run / "model" / "model.safetensors", metadata={"format": "pt"})
    message = (
        rf"{run}/model/model.safetensors: model\.layers\.1\.mlp\.down_proj\.weight holds a number that is not finite"
    )
    with pytest.raises(UserError, match=message):
        _ = load(run).full

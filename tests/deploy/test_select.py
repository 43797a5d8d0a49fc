"""Selection is the brute-force minimum over the rows within the budget."""

import json
from dataclasses import replace

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.model_dir import Measured, ModelDir
from sorted_ds.deploy.select import parse_amount, reason, select
from tests.trained import BASELINE, made_up_table, measured_run, set_keys, trained_run

TABLE = made_up_table()


def with_loss(row: Measured, loss: float) -> Measured:
    return replace(row, metrics={**row.metrics, "loss": loss})


def test_the_lowest_loss_within_each_budget_is_chosen():
    for budget in sorted({row.parameters for row in TABLE}):
        for amount in (budget, budget + 1):
            expected = sorted((row.loss, row.subnet) for row in TABLE if row.parameters <= amount)[0][1]
            assert select(TABLE, max_params=amount).subnet == expected


def test_both_budgets_hold_at_once():
    flops = sorted(row.flops_per_token for row in TABLE)[len(TABLE) // 2]
    params = sorted(row.parameters for row in TABLE)[len(TABLE) // 2]
    chosen = select(TABLE, max_params=params, max_flops_per_token=flops)
    assert chosen.parameters <= params
    assert chosen.flops_per_token <= flops
    within = [row for row in TABLE if row.parameters <= params and row.flops_per_token <= flops]
    assert chosen.loss == min(row.loss for row in within)


def test_a_larger_sub_network_of_higher_loss_is_not_chosen():
    largest = max(TABLE, key=lambda row: row.parameters)
    worse = [with_loss(row, 9.0) if row is largest else row for row in TABLE]
    assert select(worse, max_params=1e9).subnet != largest.subnet


def test_of_equal_losses_the_smaller_is_chosen():
    equal = [with_loss(row, 3.0) for row in reversed(TABLE)]
    assert select(equal, max_params=1e9).parameters == min(row.parameters for row in TABLE)


def test_nothing_fits_names_the_smallest_and_its_figures():
    smallest = min(TABLE, key=lambda row: row.parameters)
    message = f"The smallest, {smallest.subnet}, has {smallest.parameters:,} parameters"
    with pytest.raises(UserError, match=message):
        select(TABLE, max_params=10)


def test_a_budget_is_needed():
    with pytest.raises(UserError, match="Give --max-params, --max-flops or both"):
        select(TABLE)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("2.5B", 2.5e9),
        ("300M", 3e8),
        ("1e6", 1e6),
        ("5G", 5e9),
        ("7k", 7e3),
        ("1.5T", 1.5e12),
        ("12", 12),
        (".5m", 5e5),
    ],
)
def test_amounts_read_as_written(text, amount):
    assert parse_amount(text) == pytest.approx(amount)


@pytest.mark.parametrize("text", ["", "many", "-3M", "0", "3MB", "1e999", "nan"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(UserError, match="is not an amount"):
        parse_amount(text)


def test_the_reason_tells_loss_and_share_of_the_full_network():
    chosen = select(TABLE, max_params=min(row.parameters for row in TABLE))
    text = reason(chosen, TABLE)
    full = max(TABLE, key=lambda row: row.parameters)
    assert f"{chosen.loss:.4f} nats" in text
    assert f"{chosen.parameters / full.parameters:.0%} of {full.subnet}" in text


def test_the_table_survives_the_disk(tmp_path):
    run = measured_run(tmp_path)
    rows = ModelDir.find(run).table()
    assert {row.subnet: row for row in rows} == {row.subnet: row for row in TABLE}
    assert [row.parameters for row in rows] == sorted(row.parameters for row in rows)
    on_its_own = json.loads((run / "subnets.json").read_text())
    assert [row["subnet"] for row in on_its_own["subnets"]] == [row.subnet for row in rows]
    assert on_its_own["baseline"] == ModelDir.find(run).read().baseline == BASELINE
    assert ModelDir.find(run / "model").table() == rows


def test_a_row_in_json_is_flat_and_is_read_back():
    row = TABLE[0].to_json()
    assert list(row)[:4] == ["subnet", "loss", "perplexity", "accuracy"]
    assert Measured.from_json(row) == TABLE[0]
    assert Measured.from_json(json.loads(json.dumps(row))).loss == TABLE[0].loss
    other_task = replace(TABLE[0], metrics={"loss": 1.0, "top_5": 0.5})
    assert Measured.from_json(other_task.to_json()) == other_task
    with pytest.raises(KeyError):
        Measured.from_json({key: value for key, value in row.items() if key != "loss"})


def test_a_sorted_json_of_an_earlier_version_is_read(tmp_path):
    """Version 0.1 knew one baseline, one task and no layer order."""
    run = ModelDir.find(measured_run(tmp_path))
    path = run.model / "sorted.json"
    contents = json.loads(path.read_text())
    for key in ("task", "layer_order", "baseline"):
        del contents[key]
    path.write_text(json.dumps({**contents, "unigram_nats": 4.5}))
    read = run.read()
    assert read.baseline == BASELINE
    assert (read.task, read.layer_order) == ("causal_lm", None)
    assert read.sub_networks.layer_order == (0, 1, 2, 3)
    assert len(run.table()) == len(TABLE)


@pytest.mark.parametrize(
    "base",
    [
        "mit",
        [],
        ["mit"],
        5,
        True,
        {"license": 5},
        {"license": {"a": "b"}},
        {"license": ["mit", 5]},
        {"trained_from": "x"},
    ],
    ids=str,
)
def test_a_base_of_another_type_is_a_damaged_sorted_json(tmp_path, base):
    run = ModelDir.find(trained_run(tmp_path))
    set_keys(run.model / "sorted.json", base=base)
    with pytest.raises(UserError, match=r"sorted\.json is not a valid sorted\.json \(base"):
        run.read()


@pytest.mark.parametrize(
    ("stated", "base"),
    [
        (None, None),
        ({}, {"trained_from": "checkpoint"}),
        ({"license": "mit"}, {"trained_from": "checkpoint", "license": "mit"}),
    ],
)
def test_the_base_that_an_earlier_version_stated_is_read(tmp_path, stated, base):
    """It wrote null also for a network from scratch, and keys only for a checkpoint."""
    run = ModelDir.find(trained_run(tmp_path))
    set_keys(run.model / "sorted.json", base=stated)
    assert run.read().base == base


def test_the_layer_order_survives_the_disk(tmp_path):
    run = ModelDir.find(trained_run(tmp_path, layer_order=(3, 1, 0, 2)))
    read = run.read()
    assert read.layer_order == (3, 1, 0, 2)
    run.write(read)
    assert run.read() == read
    space = read.sub_networks
    assert space.layer_order == (3, 1, 0, 2)
    assert space.layers_of(space["d2-g1-f32"]) == (1, 3)


def test_rows_measured_on_other_targets_leave_the_table(tmp_path):
    run = ModelDir.find(measured_run(tmp_path))
    assert len(run.add_measured([with_loss(TABLE[0], 1.0)], BASELINE)) == len(TABLE)
    assert run.table()[0].loss == 1.0
    assert len(run.add_measured([replace(TABLE[0], num_targets=64)], BASELINE)) == 1


def test_without_a_table_the_user_is_told_to_evaluate(tmp_path):
    with pytest.raises(UserError, match=r"Run `sorted-ds eval .*` first"):
        ModelDir.find(trained_run(tmp_path)).table()


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no sorted\.json"):
        ModelDir.find(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        ModelDir.find(tmp_path / "gone")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"space": ["1"], "data": {}, "row_tokens": 1, "eval_rows": 1}',
        '{"space": ["d1"], "data": {}, "row_tokens": 1, "eval_rows": 1, "layer_order": [1]}',
        '{"space": ["d1"], "data": {}, "row_tokens": 1, "eval_rows": 1, "subnets": [{"subnet": "d1"}]}',
        '{"space": ["d1"], "data": {}, "row_tokens": 1, "eval_rows": 1, "other": 1}',
        '{"space": ["d1"], "data": [], "row_tokens": 1, "eval_rows": 1}',
        '{"space": ["d1"], "data": {}, "row_tokens": 0, "eval_rows": 1}',
        '{"space": ["d1"], "data": {}, "row_tokens": 1, "eval_rows": "many"}',
        '{"space": ["d1"], "data": {}, "row_tokens": 1, "eval_rows": 1, "task": []}',
        '{"space": ["d1"], "data": {}, "row_tokens": 1, "eval_rows": 1, "baseline": 4.5}',
        '{"space": ["d1"], "data": {}, "row_tokens": 1, "eval_rows": 1, "baseline": {"a": "b"}}',
        "[" * 100_000,
        '{"space": ' + "[" * 100_000,
    ],
    ids=lambda text: text[:99],
)
def test_a_damaged_sorted_json_is_named(tmp_path, text):
    (tmp_path / "sorted.json").write_text(text)
    with pytest.raises(UserError, match=r"sorted\.json is not a valid sorted\.json"):
        ModelDir.find(tmp_path).read()

"""Selection is the brute-force minimum over the rows within the budget."""

import itertools
import json
from dataclasses import replace

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.model_dir import Measured, ModelDir, Sorted
from sorted_ds.deploy.select import Budgets, parse_amount, reason, select
from sorted_ds.deploy.speed import MeasuredOn, Setting, Speed
from sorted_ds.space import SubNet
from tests.families import SPACE
from tests.trained import BASELINE, made_up_table, measured_run, set_keys, trained_run

TABLE = made_up_table()


def with_loss(row: Measured, loss: float) -> Measured:
    return replace(row, metrics={**row.metrics, "loss": loss})


def with_speed(row: Measured, setting: Setting = Setting(), **changes) -> Measured:  # noqa: B008
    """A made-up speed: the latency grows with the depth, and the memory with the parameters."""
    depth = SubNet.parse(row.subnet).depth
    speed = Speed(
        setting.batch,
        setting.context,
        prefill_ms=10.0 * depth,
        prefill_spread_ms=1.0,
        decode_ms=2.0 * depth + row.parameters / 1e9,
        decode_spread_ms=0.1,
        memory_bytes=4 * row.parameters,
        cache_bytes=row.kv_bytes_per_token * setting.context,
    )
    return replace(row, speeds=(*row.speeds, replace(speed, **changes)))


def contents_of(rows, **fields) -> Sorted:
    return Sorted(tuple(subnet.name for subnet in SPACE), {}, 16, 8, subnets=tuple(rows), **fields)


def chosen(rows=TABLE, **budgets) -> Measured:
    return select(contents_of(rows), Budgets(**budgets))


FAST = [with_speed(row) for row in TABLE]
HERE = MeasuredOn("a device", "float32", 2, "2.13.0", "5.24.0")


def test_the_lowest_loss_within_each_budget_is_chosen():
    for budget in sorted({row.parameters for row in TABLE}):
        for amount in (budget, budget + 1):
            expected = sorted((row.loss, row.subnet) for row in TABLE if row.parameters <= amount)[0][1]
            assert chosen(max_params=amount).subnet == expected


LIMITS = {
    "max_params": lambda row: row.parameters,
    "max_flops": lambda row: row.flops_per_token,
    "max_latency_ms": lambda row: row.speeds[0].decode_ms,
    "max_memory_gib": lambda row: row.speeds[0].memory_bytes / 2**30,
    "max_loss_gap": lambda row: row.loss - min(row.loss for row in TABLE),
}
"""What each budget bounds, by its name. The full network has the lowest loss of the table."""


def middle(name: str) -> float:
    return sorted(LIMITS[name](row) for row in FAST)[len(FAST) // 2]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_any_costs_hold_at_once(number):
    for names in itertools.combinations([name for name in LIMITS if name != "max_loss_gap"], number):
        limits = {name: middle(name) for name in names}
        within = [row for row in FAST if all(LIMITS[name](row) <= limit for name, limit in limits.items())]
        assert chosen(FAST, **limits).loss == min(row.loss for row in within)


@pytest.mark.parametrize("cost", ["", "max_params", "max_flops", "max_latency_ms", "max_memory_gib"])
def test_within_a_gap_the_cheapest_is_chosen_in_the_cost_that_has_a_budget(cost):
    gap = middle("max_loss_gap")
    limits = {"max_loss_gap": gap} | ({cost: max(map(LIMITS[cost], FAST))} if cost else {})
    within = [row for row in FAST if LIMITS["max_loss_gap"](row) <= gap]
    cheap = LIMITS[cost or "max_params"]
    assert cheap(chosen(FAST, **limits)) == min(map(cheap, within))


def test_latency_comes_before_memory_flops_and_parameters_when_the_cheapest_is_chosen():
    slow = {row.subnet: 100 - index for index, row in enumerate(TABLE)}
    rows = [with_speed(row, decode_ms=slow[row.subnet]) for row in TABLE]
    limits = {"max_params": 1e9, "max_flops": 1e9, "max_memory_gib": 1.0, "max_latency_ms": 200.0}
    assert chosen(rows, max_loss_gap=10.0, **limits).subnet == TABLE[-1].subnet


def test_an_accuracy_selects_the_cheapest_that_has_it():
    rows = [replace(row, metrics={**row.metrics, "accuracy": row.parameters / 1e6}) for row in TABLE]
    least = sorted(row.parameters for row in rows)[9] / 1e6
    assert chosen(rows, min_accuracy=least).parameters == sorted(row.parameters for row in rows)[9]
    without = [replace(row, metrics={"loss": 1.0}) for row in TABLE]
    with pytest.raises(UserError, match="the table has no accuracy"):
        chosen(without, min_accuracy=0.1)


def test_only_rows_that_have_a_speed_are_selected_and_the_others_are_counted():
    rows = [row if row is TABLE[-1] else with_speed(row) for row in TABLE]
    contents, budgets = contents_of(rows, measured_on=HERE), Budgets(max_latency_ms=1000.0)
    found = select(contents, budgets)
    assert found.loss == min(row.loss for row in rows[:-1])
    assert "1 sub-networks have no speed for batch 1, context 512" in reason(contents, found, budgets)


def test_a_gap_needs_the_loss_of_the_full_network():
    with pytest.raises(
        UserError, match=r"no loss of the full network\. Run `sorted-ds eval` with --subnets d4-g4-f112"
    ):
        chosen([row for row in TABLE if row.subnet != SPACE.full.name], max_loss_gap=0.1)


def test_a_larger_sub_network_of_higher_loss_is_not_chosen():
    largest = max(TABLE, key=lambda row: row.parameters)
    worse = [with_loss(row, 9.0) if row is largest else row for row in TABLE]
    assert chosen(worse, max_params=1e9).subnet != largest.subnet


def test_of_equal_losses_the_smaller_is_chosen():
    equal = [with_loss(row, 3.0) for row in reversed(TABLE)]
    assert chosen(equal, max_params=1e9).parameters == min(row.parameters for row in TABLE)


def test_an_impossible_budget_names_the_closest_and_what_it_exceeds():
    smallest = min(FAST, key=lambda row: row.parameters)
    with pytest.raises(UserError, match=f"closest is {smallest.subnet}, with {smallest.parameters:,} parameters"):
        chosen(max_params=10)
    with pytest.raises(
        UserError, match=r"closest is d1-g1-f32, with 2\.001 ms a token\. Select with --max-la\S+ 2\.001\."
    ):
        chosen(FAST, max_latency_ms=1.0, max_params=1e9)
    assert chosen(FAST, max_latency_ms=2.001, max_params=1e9).subnet.startswith("d1")
    advice = r"2\.001 ms a token and [\d,]+ parameters\. Select with --max-latency-ms 2\.001 --max-params \d+\."
    with pytest.raises(UserError, match=advice):
        chosen(FAST, max_latency_ms=1.0, max_params=100)


def test_a_budget_is_needed_and_is_a_number_above_zero():
    with pytest.raises(UserError, match=r"Give --max-params, --max-flops, .* or --min-accuracy"):
        chosen()
    for wrong in ({"max_latency_ms": float("nan")}, {"max_memory_gib": 0.0}, {"max_loss_gap": -1.0}):
        with pytest.raises(UserError, match="is not a budget"):
            chosen(FAST, **wrong)
    with pytest.raises(UserError, match="Give a number below 1"):
        chosen(min_accuracy=1.0)


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


def test_the_reason_tells_loss_share_neighbours_and_device():
    contents, budgets = contents_of(FAST, measured_on=HERE), Budgets(max_params=middle("max_params"))
    found, full = select(contents, budgets), max(TABLE, key=lambda row: row.parameters)
    first, cheaper, dearer = reason(contents, found, budgets).splitlines()
    assert f"{found.loss:.4f} nats" in first
    assert f"{found.parameters / full.parameters:.0%} of {full.subnet}" in first
    ascending = sorted(FAST, key=lambda row: row.parameters)  # all are on the frontier: the loss falls with them
    below, above = (ascending[ascending.index(found) + step] for step in (-1, 1))
    assert cheaper.startswith(f"next cheaper: {below.subnet}, {below.loss:.4f} nats ({below.loss - found.loss:+.4f}), ")
    assert f"{above.parameters:,} parameters ({above.parameters / found.parameters - 1:+.1%})" in dearer
    budgets = Budgets(max_latency_ms=5.0)
    lines = reason(contents, select(contents, budgets), budgets).splitlines()
    assert "ms a token and" in lines[0]
    assert lines[-1] == f"speeds: {HERE}"
    guessed = [with_speed(row, median_error=0.05, largest_error=0.2) for row in TABLE]
    contents = contents_of(guessed, measured_on=HERE)
    assert "this one is predicted: half of such times are off by at most 5%, and all by at most 20%" in reason(
        contents, select(contents, budgets), budgets
    )


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


def speeds(*settings: Setting, **changes) -> tuple[Speed, ...]:
    return tuple(with_speed(TABLE[0], setting, **changes).speeds[0] for setting in settings)


def test_speeds_join_the_table_and_stay_when_losses_are_measured_again(tmp_path):
    run = ModelDir.find(measured_run(tmp_path))
    one, eight = Setting(), Setting(8, 256)
    run.add_speeds({TABLE[0].subnet: speeds(one)}, HERE)
    run.add_speeds({TABLE[0].subnet: speeds(eight), TABLE[1].subnet: speeds(one)}, HERE)
    run.add_measured([with_loss(TABLE[0], 1.0)], BASELINE)
    rows = {row.subnet: row for row in run.table()}
    assert rows[TABLE[0].subnet].loss == 1.0
    assert rows[TABLE[0].subnet].speeds == speeds(one, eight)
    assert rows[TABLE[1].subnet].speeds == speeds(one)
    assert run.read().measured_on == HERE
    written = json.loads((tmp_path / "subnets.json").read_text())
    assert written["measured_on"]["device"] == "a device"
    (first,) = (row for row in written["subnets"] if row["subnet"] == TABLE[0].subnet)
    assert [(speed["batch"], speed["context"]) for speed in first["speeds"]] == [(1, 512), (8, 256)]
    assert first["speeds"][1]["tokens_per_second"] == pytest.approx(8000 / first["speeds"][1]["decode_ms"])


def test_speeds_of_another_device_leave_the_table(tmp_path):
    run = ModelDir.find(measured_run(tmp_path))
    run.add_speeds({row.subnet: speeds(Setting()) for row in TABLE}, HERE)
    run.add_speeds({TABLE[0].subnet: speeds(Setting())}, replace(HERE, device="another"))
    assert [row.subnet for row in run.table() if row.speeds] == [TABLE[0].subnet]
    assert run.read().measured_on.device == "another"


def test_a_budget_that_needs_speeds_says_what_to_run(tmp_path):
    run, budgets = ModelDir.find(measured_run(tmp_path)), Budgets(max_latency_ms=1.0)
    with pytest.raises(UserError, match=r"has no measured speeds\. Run `sorted-ds eval .* --measure` first"):
        budgets.table_in(run)
    run.add_speeds({TABLE[0].subnet: speeds(Setting(2, 64))}, HERE)
    with pytest.raises(UserError, match=r"for batch 1, context 512, but for batch 2, context 64\. Name one of these"):
        budgets.table_in(run)
    assert len(replace(budgets, setting=Setting(2, 64)).table_in(run).subnets) == len(TABLE)
    assert len(Budgets(max_params=1e9, setting=Setting(3, 3)).table_in(run).subnets) == len(TABLE)


def damaged(row_keys: dict, speed_keys: dict, **keys) -> dict:
    """The contents of a sorted.json with one row and one speed, some keys changed."""
    speed = {**with_speed(TABLE[0]).speeds[0].to_json(), **speed_keys}
    row = {**TABLE[0].to_json(), "speeds": [speed], **row_keys}
    where = {"device": "a", "dtype": "float32", "num_threads": 1, "torch": "2", "transformers": "5"}
    start = {"space": [subnet.name for subnet in SPACE], "data": {}, "row_tokens": 1, "eval_rows": 1}
    return {**start, "measured_on": where, "subnets": [row], **keys}


def test_a_whole_sorted_json_with_speeds_is_read(tmp_path):
    (tmp_path / "sorted.json").write_text(json.dumps(damaged({}, {})))
    read = ModelDir.find(tmp_path).read()
    assert read.subnets == (with_speed(TABLE[0]),)
    assert read.measured_on == MeasuredOn("a", "float32", 1, "2", "5")


@pytest.mark.parametrize(
    "contents",
    [
        damaged({}, {"decode_ms": "fast"}),
        damaged({}, {"decode_ms": 0}),
        damaged({}, {"prefill_ms": float("nan")}),
        damaged({}, {"batch": 1.5}),
        damaged({}, {"memory_bytes": None}),
        damaged({}, {"largest_error": -1}),
        damaged({}, {"watts": 5}),
        damaged({"speeds": 5}, {}),
        damaged({"speeds": [5]}, {}),
        damaged({"loss": "low"}, {}),
        damaged({"parameters": None}, {}),
        damaged({"is_trained": False}, {}),
        damaged({"subnet": "d2-g2-f80"}, {}),
        damaged({"subnet": "d9-g1-f32", "is_trained": False}, {}),
        damaged({}, {}, measured_on={"device": "a"}),
        damaged({}, {}, measured_on={"device": 5, "dtype": "a", "num_threads": 1, "torch": "2", "transformers": "5"}),
        damaged({}, {}, measured_on="here"),
    ],
    ids=lambda contents: None,
)
def test_a_damaged_row_or_speed_is_named(tmp_path, contents):
    (tmp_path / "sorted.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"sorted\.json is not a valid sorted\.json"):
        ModelDir.find(tmp_path).read()


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

"""A run goes on from its own checkpoints alone, also from those of version 0.1, which had other names for some keys."""

from pathlib import Path

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.checkpoint.identity import Identity

NOW = {
    "seed": "17",
    "task": '"causal_lm"',
    "space.depths": "[1, 3]",
    "space.groups": "[1, 2]",
    "space.ffn": "[32, 64]",
    "space.widths": "[]",
    "space.subnets": "[]",
    "space.layer_order": "[]",
    "sampling.subnets_per_step": "4",
    "sampling.strategy": '"stratified"',
    "batch.step_rows": "8",
    "model.hidden_size": "64",
    "data": "abc",
}
VERSION_0_1 = {
    "seed": "17",
    "space.depths": "[1, 3]",
    "space.groups": "[1, 2]",
    "space.ffn": "[32, 64]",
    "space.subnets": "[]",
    "schedule.draws": "4",
    "schedule.strategy": '"stratified"',
    "batch.step_rows": "8",
    "model.hidden_size": "64",
    "data": "abc",
}
FOLDER = Path("runs/a/checkpoints")


def test_a_run_of_version_0_1_goes_on():
    assert Identity(NOW).check(VERSION_0_1, FOLDER) == ""


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("schedule.draws", "2", r"sampling\.subnets_per_step = 2 there, 4 here"),
        ("schedule.strategy", '"uniform"', r'sampling\.strategy = "uniform" there, "stratified" here'),
        ("seed", "18", r"seed = 18 there, 17 here"),
    ],
)
def test_another_run_of_version_0_1_is_refused_under_todays_names(key, value, told):
    with pytest.raises(UserError, match=f"belongs to another run: {told}"):
        Identity(NOW).check({**VERSION_0_1, key: value}, FOLDER)


def test_a_space_of_version_0_1_can_grow():
    larger = {**NOW, "space.depths": "[1, 2, 3]"}
    assert (
        Identity(larger, extends_space=True).check(VERSION_0_1, FOLDER) == "the space grows from 8 to 12 sub-networks"
    )
    with pytest.raises(UserError, match="start with --extend-space"):
        Identity(larger).check(VERSION_0_1, FOLDER)


@pytest.mark.parametrize("extends_space", [False, True])
def test_another_layer_order_is_another_run_whether_the_space_grows_or_not(extends_space):
    ordered = {**NOW, "space.layer_order": "[2, 0, 1]", "space.depths": "[1, 2, 3]"}
    with pytest.raises(UserError, match=r"space\.layer_order = \[\] there, \[2, 0, 1\] here"):
        Identity(ordered, extends_space).check(NOW, FOLDER)
    assert Identity(ordered).check(ordered, FOLDER) == ""


def test_another_task_is_another_run():
    with pytest.raises(UserError, match='task = "causal_lm" there, "other" here'):
        Identity({**NOW, "task": '"other"'}).check(VERSION_0_1, FOLDER)

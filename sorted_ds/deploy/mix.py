"""Mix'n'Match: adds sub-networks that were never trained to the measured table, where they may serve a budget better.

In: a trained family, and budgets. Out: the table. On disk: new rows in sorted.json, subnets.json and pareto.png. A few
of the sub-networks that can be cut are proposed, by costs that are counted and losses that are interpolated between
those of the table. These are evaluated as any other. Source: MatFormer, arXiv 2310.07707, section 3.3.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from sorted_ds.base.errors import UserError
from sorted_ds.base.names import ACCURACY, LOSS
from sorted_ds.deploy.evaluate import evaluate_family
from sorted_ds.deploy.family import TrainedFamily
from sorted_ds.deploy.model_dir import Measured, Sorted
from sorted_ds.deploy.predict import fit, inverse_sizes, predict_speeds
from sorted_ds.deploy.select import Budgets, fitting
from sorted_ds.deploy.speed import Setting, Speed
from sorted_ds.nested import costs_of
from sorted_ds.space import SubNet

PROPOSED_AT_MOST = 10


def add_proposed(
    family: TrainedFamily, contents: Sorted, budgets: Budgets, report: Callable[[str], None] = lambda name: None
) -> Sorted:
    """Evaluates what `propose` returns, and adds it to the table, with predicted speeds if the budgets need some.

    Returns the contents of sorted.json. `report`: called with the name of each sub-network before it is evaluated.

    Raises: UserError for files that are missing, or too few measured speeds.
    """
    if proposed := propose(family, contents, budgets):
        evaluate_family(family, proposed, report=report)
        contents = budgets.table_in(family.where)
    if budgets.needs_speeds and contents.measured_on is not None:
        lacking = [SubNet.parse(row.subnet) for row in contents.subnets if row.speed(budgets.setting) is None]
        speeds = _speeds(family, contents, lacking, budgets.setting) if lacking else {}
        family.where.add_speeds({subnet.name: [speed] for subnet, speed in speeds.items()}, contents.measured_on)
    return budgets.table_in(family.where)


def propose(family: TrainedFamily, contents: Sorted, budgets: Budgets) -> list[SubNet]:
    """Returns at most ten sub-networks that are not in the table and should keep the budgets best, the best first.

    Raises: UserError for too few measured speeds.
    """
    known = {row.subnet for row in contents.subnets}
    new = [subnet for subnet in family.cuttable if subnet.name not in known]
    expected = _expected(family, contents, budgets, new) if new else []
    return [SubNet.parse(row.subnet) for row in fitting(contents, expected, budgets)[:PROPOSED_AT_MOST]]


def _expected(family: TrainedFamily, contents: Sorted, budgets: Budgets, new: list[SubNet]) -> list[Measured]:
    """Returns the rows that the table would get: costs are counted, metrics interpolated, and speeds predicted."""
    costs = costs_of(new, family.architecture, family.config, contents.row_tokens)
    metrics = _metrics(contents)
    speeds = _speeds(family, contents, new, budgets.setting) if budgets.needs_speeds else {}
    return [
        Measured(
            subnet.name,
            metrics={name: metric(subnet) for name, metric in metrics.items()},
            num_targets=contents.subnets[0].num_targets,
            **asdict(costs[subnet]),
            is_trained=False,
            speeds=(speeds[subnet],) if subnet in speeds else (),
        )
        for subnet in new
    ]


def _metrics(contents: Sorted) -> Mapping[str, Callable[[SubNet], float]]:
    """Returns interpolations of the loss and, if the task has it, the accuracy. Both saturate as sizes grow."""
    rows = {SubNet.parse(row.subnet): row.metrics for row in contents.subnets}
    metrics = {LOSS: fit({subnet: row[LOSS] for subnet, row in rows.items()}, inverse_sizes)}
    if all(row.get(ACCURACY, 1.0) < 1 for row in rows.values()):
        wrong = fit({subnet: 1 - row[ACCURACY] for subnet, row in rows.items()}, inverse_sizes)
        metrics[ACCURACY] = lambda subnet: 1 - wrong(subnet)
    return metrics


def _speeds(family: TrainedFamily, contents: Sorted, subnets: list[SubNet], setting: Setting) -> Mapping[SubNet, Speed]:
    """Returns predicted speeds. Raises: UserError if the table has too few measured ones."""
    known = {SubNet.parse(row.subnet): row.speed(setting) for row in contents.subnets}
    measured = {subnet: speed for subnet, speed in known.items() if speed is not None and speed.is_measured}
    predicted = predict_speeds(measured, subnets)
    if not predicted:
        raise UserError(
            f"{family.where.root} has measured speeds of {len(measured)} sub-networks, too few to predict others. Run "
            f"`sorted-ds eval {family.where.root} --measure --batch {setting.batch} --context {setting.context}`."
        )
    return predicted

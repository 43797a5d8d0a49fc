"""What the loop makes of a step's plan: the order of passes, the step's denominator, which losses count."""

import pytest
import torch

from sorted_ds.data.loader import MicroBatch
from sorted_ds.run.teacher import Teaching
from sorted_ds.run.train import accumulate, count_targets, describe_step, passes_of
from sorted_ds.space import Pass, Planned, SubNet
from sorted_ds.tasks.task import Outcome

FULL, SMALL = SubNet(d=4, w=48), SubNet(d=2, w=16)
TEACHER, TAUGHT, STUDENT, ALONE = Pass(FULL, "teach"), Pass(FULL), Pass(SMALL), Pass(SMALL)
PLAN = [Planned(TEACHER, 0), Planned(TAUGHT, 0), Planned(STUDENT, 0), Planned(ALONE, 1)]
"""On the first share a teacher, the full network and a student; on the second one sub-network."""


def micro_batch(num_targets: int) -> MicroBatch:
    return MicroBatch({"x": torch.tensor(float(num_targets))}, num_targets, num_rows=1)


BATCHES = [[micro_batch(3), micro_batch(5)], [micro_batch(7)]]
"""This rank's micro-batches of each share."""


class Recorder:
    """In the place of the engine: a loss is ten nats a target."""

    def __init__(self):
        self.forwards, self.gradients = [], []

    def forward(self, batch, pass_: Pass, teacher=None) -> Outcome:
        self.forwards.append((pass_, int(batch["x"])))
        return Outcome((10 * batch["x"]).requires_grad_() if pass_.has_gradient else None)

    def backward(self, loss: torch.Tensor) -> None:
        self.gradients.append(float(loss.detach()))


def test_every_micro_batch_of_a_share_runs_all_its_passes_a_teacher_before_its_student():
    found = [(run, batch.num_targets) for run, batch in passes_of(PLAN, BATCHES)]
    assert found == [
        *((TEACHER, 3), (TAUGHT, 3), (STUDENT, 3)),
        *((TEACHER, 5), (TAUGHT, 5), (STUDENT, 5)),
        (ALONE, 7),
    ]


def test_a_target_counts_as_often_as_a_pass_with_a_gradient_has_it():
    assert count_targets(PLAN, BATCHES) == 2 * (3 + 5) + 7
    assert count_targets(PLAN[:1], BATCHES[:1]) == 0, "a teacher alone trains nothing"


def test_losses_and_gradients_are_those_of_the_passes_with_a_gradient():
    engine = Recorder()
    losses = accumulate(engine, PLAN, BATCHES, num_targets=100.0, teaching=Teaching())
    assert engine.forwards == [(run, batch.num_targets) for run, batch in passes_of(PLAN, BATCHES)]
    assert [(each.pass_.subnet, float(each.nll), each.num_targets) for each in losses] == [
        *((FULL, 30.0, 3), (SMALL, 30.0, 3)),
        *((FULL, 50.0, 5), (SMALL, 50.0, 5)),
        (SMALL, 70.0, 7),
    ]
    assert engine.gradients == pytest.approx([0.3, 0.3, 0.5, 0.5, 0.7])
    assert not any(each.nll.requires_grad for each in losses)


def test_the_description_of_a_step_tells_all_passes_apart():
    told = describe_step(5, PLAN)
    assert told == "step 5 runs d4-w48/teach/0, d4-w48/train/0, d2-w16/train/0, d2-w16/train/1"
    others = [PLAN[1:], PLAN[::-1], [*PLAN[:3], Planned(ALONE, 0)]]
    assert told not in [describe_step(5, plan) for plan in others]

"""Evaluates sub-networks during a run, and stops early when the run must stop.

In: the parts of a run and the sub-networks to evaluate. Out: a `Measured` for each one, and the stop request that ended
the evaluation early, if there was one. Nothing is on disk.
"""

import time
from collections.abc import Callable, Iterable

from sorted_ds.cluster.stop import StopRequest
from sorted_ds.data.loader import MicroBatch
from sorted_ds.deploy.evaluate import evaluate_subnets
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.run.build import eval_subnets
from sorted_ds.run.parts import Parts
from sorted_ds.space import SubNet
from sorted_ds.tasks.task import Sums


def evaluate(
    parts: Parts, subnets: Iterable[SubNet], agree_to_stop: Callable[[], StopRequest]
) -> tuple[list[Measured], float, StopRequest]:
    """Returns what was measured, the seconds it took, and the last stop request. Every rank must call this.

    `agree_to_stop` is called before each sub-network. When it returns a request to stop, the rest is not measured.
    """
    start = time.perf_counter()

    def forward(batch: MicroBatch, subnet: SubNet) -> Sums:
        parts.heartbeat()
        return parts.engine.evaluate(batch.inputs, subnet)

    measured: list[Measured] = []
    request = StopRequest()
    for subnet in subnets:
        request = agree_to_stop()
        if request.stops:
            break
        measured += evaluate_subnets(
            forward, [subnet], parts.validation, parts.task.metrics, parts.ranks.sum, parts.costs
        )
    return measured, time.perf_counter() - start, request


def evaluate_during_training(parts: Parts, step: int) -> StopRequest:
    """Evaluates the sub-networks of `eval.subnets`, and reports them unless the run must stop before all are measured.

    Returns the last stop request. Every rank must call this.
    """
    subnets = eval_subnets(parts.run, parts.space)
    measured, seconds, request = evaluate(parts, subnets, lambda: parts.agree()[0])
    if not request.stops:
        parts.monitor.report_evaluation(step, measured, seconds)
    return request


def last_evaluated_step(parts: Parts) -> int:
    """Returns the step that this start resumes from, if it was evaluated before, or 0. Every rank must call this.

    The earlier start has not evaluated it if it was stopped or killed between the checkpoint and its evaluation.
    """
    num_agreeing = parts.ranks.sum([parts.monitor.has_evaluated(parts.first_step)])[0]
    return parts.first_step if num_agreeing == parts.ranks.size else 0

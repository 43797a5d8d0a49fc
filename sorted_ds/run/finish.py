"""Ends a run: saves the last checkpoint; writes and measures the model, if all steps are done; requeues the Slurm job.

In: the parts of a run, the step that it has reached, and the stop request that ended the loop, if there was one. On
disk, after the last step: RUN_DIR/model with the table of all sub-networks, subnets.json and pareto.png (run_dir.py).
"""

import os

from sorted_ds.base.errors import AgreedError, UserError
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.cluster.slurm import requeue
from sorted_ds.cluster.stop import StopCauses, StopRequest
from sorted_ds.run.evaluation import evaluate
from sorted_ds.run.parts import Parts


def finish(parts: Parts, step: int, request: StopRequest) -> None:
    """Ends a run whose loop has ended at `step`. Every rank must call this.

    Raises: AgreedError when the checkpoint or the model cannot be written, or when Slurm refuses to requeue the job.
    """
    save_last(parts, step, request.requeues)
    if step == parts.run.train.steps:
        request = write_and_measure_model(parts)
    # The stop files go before the requeue, because Slurm ends this job as soon as it has requeued it.
    parts.stop.acknowledge(is_finished=not request.stops)
    reason = end_early(parts.stop, request.requeues, parts.ranks) if request.stops else ""
    parts.monitor.report_end(step, reason)


def save_last(parts: Parts, step: int, requeues: bool) -> None:
    """Waits for the pending save, and saves `step` if it is newer. Every rank must call this.

    Raises: AgreedError when a save fails. A job that should be requeued is requeued before, because it can resume from
    an earlier checkpoint.
    """
    checkpoints, monitor = parts.checkpoints, parts.monitor
    try:
        monitor.report_saves(checkpoints.finish())
        if step > checkpoints.last_step:
            monitor.report_saves(checkpoints.save(parts.engine, step))
    except AgreedError as error:
        parts.stop.acknowledge()
        answer = ""
        if requeues and parts.ranks.is_first and checkpoints.last_step:
            try:
                answer = requeue(os.environ)
            except UserError as refusal:
                answer = str(refusal)
        answer = parts.ranks.gather(answer)[0]  # no rank exits before Slurm has answered
        raise AgreedError(f"{error} {answer}".strip()) from None


def write_and_measure_model(parts: Parts) -> StopRequest:
    """Writes RUN_DIR/model, if an earlier start has not, and measures the sub-networks that none has measured yet.

    Returns the last stop request. When the run must stop, the rest is not measured. Every rank must call this.
    """
    folder, monitor = parts.folder, parts.monitor
    num_targets = round(parts.ranks.sum([sum(batch.num_targets for batch in parts.validation)])[0])
    measured_before = folder.names_measured_before(parts.engine, num_targets)
    if measured_before is None:
        folder.write_model(parts.engine)
    parts.stop.skip_interval()
    measured, seconds, request = evaluate(
        parts,
        [subnet for subnet in parts.space if subnet.name not in (measured_before or ())],
        lambda: StopRequest(*parts.ranks.sum(parts.stop.request(seconds_to_save=0.0))),
    )
    table = folder.add_to_table(measured)
    if request.stops:
        return request
    if measured or not monitor.has_evaluated(parts.run.train.steps):
        monitor.report_evaluation(parts.run.train.steps, table, seconds)
    monitor.print_table(table, folder.baseline)
    return request


def end_early(stop: StopCauses, requeues: bool, ranks: Ranks) -> str:
    """Requeues the Slurm job if it should be, and returns why the run stopped and what happens next, on rank 0.

    Every rank must call this. Raises: AgreedError when Slurm refuses, so that the job does not end as a success.
    """
    causes, answer = ", ".join(dict.fromkeys(filter(None, ranks.gather(stop.reason)))), ""
    with ranks.fail_together():
        try:
            answer = requeue(os.environ) if requeues and ranks.is_first else ""
        except UserError as refusal:
            raise UserError(f"{causes}; {refusal}") from None
    return f"{causes}; {answer or 'start the run again to resume'}"

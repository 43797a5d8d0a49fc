"""Training: the loop, and how one rank starts it.

In: a run file, on every rank. Out, in RUN_DIR: run.json, metrics.jsonl, tensorboard/, checkpoints/, and at the end
model/ with the measured table, subnets.json and pareto.png. The step number is the only cursor: rows, passes and
learning rate follow from it, so a resumed run computes what the uninterrupted run would have computed.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from sorted_ds.base.errors import AgreedError, UserError
from sorted_ds.base.files import claim
from sorted_ds.checkpoint import Checkpoints
from sorted_ds.cluster.extensions import remove_stale_locks
from sorted_ds.cluster.launcher import configure_environment
from sorted_ds.cluster.ranks import Ranks, joined_ranks
from sorted_ds.cluster.stop import StopRequest
from sorted_ds.cluster.watchdog import Watchdog
from sorted_ds.data.loader import MicroBatch
from sorted_ds.engine import Engine
from sorted_ds.run.config import Run
from sorted_ds.run.evaluation import evaluate_during_training, last_evaluated_step
from sorted_ds.run.finish import finish
from sorted_ds.run.learning_rate import lr_at
from sorted_ds.run.model_config import require_sorted, source_of
from sorted_ds.run.monitor import LossSums, PassLoss
from sorted_ds.run.parts import build_parts
from sorted_ds.run.plan import make_plan
from sorted_ds.run.run_dir import facts_to_compare
from sorted_ds.run.run_file import load_run
from sorted_ds.run.teacher import Teaching, teacher_source
from sorted_ds.space import Pass, Planned
from sorted_ds.tasks import Prepared, Task, task_of

# The loop


def train(run: Run, task: Task, data: Prepared, ranks: Ranks, watchdog: Watchdog) -> None:
    """Trains from the last checkpoint, or from step 0, until the last step or a stop request.

    Every rank must call this. Raises: UserError, on all ranks, for what the user can correct.
    """
    parts = build_parts(run, task, data, ranks, watchdog.heartbeat)
    sampler, loader, engine = parts.sampler, parts.loader, parts.engine
    checkpoints, monitor = parts.checkpoints, parts.monitor
    sums = LossSums(parts.space, ranks.device)
    request, learning_rate, norm = StopRequest(), 0.0, 0.0
    with monitor, checkpoints.finish_on_error():
        with ranks.fail_together():
            plan_of_run = make_plan(run, parts.space, parts.folder.config, ranks.size) if ranks.is_first else None
        monitor.report_start(parts.first_step, plan_of_run, parts.changes, checkpoints.warnings)
        step, evaluated_step = parts.first_step, last_evaluated_step(parts)
        while step < run.train.steps:
            if is_due(step, run.eval.every_steps) and step > evaluated_step:
                request = evaluate_during_training(parts, step)
                if request.stops:
                    break
                evaluated_step = step
            plan = sampler.plan(step)  # the same on every rank
            batches = loader.batches(step, sampler.num_shares(step))  # this rank's rows
            request, num_targets = parts.agree(describe_step(step, plan), count_targets(plan, batches))
            if request.stops:
                break
            if step not in run.train.skip_steps:
                losses = accumulate(engine, plan, batches, num_targets, parts.teacher)
                learning_rate = lr_at(step, run.train.steps, run.optim)
                norm = engine.step(learning_rate)
                check_finite(step, losses, norm, checkpoints, run.train.skip_steps, ranks)
                sums.add(losses, 1 / (loader.dealt(sampler.num_shares(step)).forwards * ranks.size))
            step += 1
            watchdog.heartbeat()
            if is_due(step, run.log.every_steps):
                monitor.report_training(step, sums.take(ranks), learning_rate, norm, checkpoints.total_pause_seconds)
            # Before the evaluation, which takes long.
            if is_due(step, run.checkpoint.every_steps) or step in run.checkpoint.keep_steps:
                monitor.report_saves(checkpoints.start_save(engine, step))
                watchdog.heartbeat()
        if step > monitor.reported_step:
            monitor.report_training(step, sums.take(ranks), learning_rate, norm, checkpoints.total_pause_seconds)
        finish(parts, step, request)


def is_due(step: int, every_steps: int) -> bool:
    """Returns whether something that happens after each interval of steps happens after `step`. 0 means never."""
    return step > 0 and every_steps > 0 and step % every_steps == 0


def describe_step(step: int, plan: Sequence[Planned]) -> str:
    """Describes the passes of a step. Ranks compare it, because ranks with other passes issue other collectives."""
    return f"step {step} runs {', '.join(str(planned) for planned in plan)}"


def passes_of(plan: Sequence[Planned], batches: Sequence[Sequence[MicroBatch]]) -> Iterator[tuple[Pass, MicroBatch]]:
    """Yields the passes of a step in their order. All passes of a share run on one micro-batch before the next one.

    So a teacher runs right before its student. `batches`: this rank's micro-batches, for each share of the step's rows.
    """
    for share, micro_batches in enumerate(batches):
        passes = [planned.pass_ for planned in plan if planned.share == share]
        for micro_batch in micro_batches:
            yield from ((each, micro_batch) for each in passes)


def count_targets(plan: Sequence[Planned], batches: Sequence[Sequence[MicroBatch]]) -> int:
    """Returns the targets of a step on this rank. A target counts once for each pass with a gradient that has it."""
    return sum(batch.num_targets for each, batch in passes_of(plan, batches) if each.has_gradient)


def accumulate(
    engine: Engine,
    plan: Sequence[Planned],
    batches: Sequence[Sequence[MicroBatch]],
    num_targets: float,
    teaching: Teaching,
) -> list[PassLoss]:
    """Runs a step's passes and accumulates the gradient of the mean loss over the targets of all ranks.

    Returns the losses of each pass that trains.
    """
    losses, rows, lesson = [], None, None
    for each, batch in passes_of(plan, batches):
        if batch is not rows:
            rows, lesson = batch, teaching.before(batch.inputs)
        outcome = engine.forward(batch.inputs, each, teaching.for_pass(each, lesson))
        if outcome.loss is not None:
            engine.backward(outcome.loss / num_targets)
            losses.append(PassLoss(each, outcome.nll, batch.num_targets, outcome.parts))
        lesson = teaching.after(each, outcome, lesson)
    return losses


def check_finite(
    step: int,
    losses: Sequence[PassLoss],
    norm: float,
    checkpoints: Checkpoints,
    skipped: Sequence[int],
    ranks: Ranks,
) -> None:
    """Raises: AgreedError, on all ranks, when the gradient is not finite. It names a sub-network whose loss is not.

    The norm is the same on all ranks, and a loss that is not finite makes the norm so.
    """
    if math.isfinite(norm):
        return
    bad = [(each.pass_.subnet, float(each.nll)) for each in losses if not math.isfinite(float(each.nll))]
    found = ranks.gather(f"the loss of {bad[0][0]} is {bad[0][1]}" if bad else "")
    what = next(filter(None, found), "the gradient is not finite")
    with suppress(AgreedError):
        checkpoints.finish()
    raise AgreedError(
        f"step {step}: {what} (gradient norm {norm}). Nothing was saved. {checkpoints.last_good()} To go on from there "
        f"without this step, set train.skip_steps = {[*skipped, step]}."
    )


# One rank


def shared_data(run: Run, task: Task, ranks: Ranks) -> Prepared:
    """Opens the prepared data that rank 0 finds, on every rank. Every rank must call this.

    The data must be prepared before: while one rank prepared it, the others would time out.

    Raises: AgreedError when it is not prepared.
    """
    folder = ranks.ask_first(lambda: str(task.find_prepared(run).folder))
    with ranks.fail_together():
        return task.open_prepared(Path(folder))


def main(arguments: Sequence[str]) -> int:
    """Runs one rank and returns its exit code, which is 2 for what the user can correct.

    `arguments`: RUN.toml and overrides.
    """
    configure_environment()
    disable_progress_bar()
    try:
        with joined_ranks() as ranks:
            with ranks.fail_together():
                run = load_run(Path(arguments[0]), arguments[1:])
                task, facts = task_of(run.task), facts_to_compare(run)
            ranks.require_same_facts(facts)
            # One rank of each host asks the hub, before the watchdog starts, because a download may take long.
            with ranks.fail_together():
                if ranks.local_rank == 0:
                    source_of(run)
                    teacher_source(run)
            with ranks.fail_together():
                source_of(run, asks_hub=False)
                require_sorted(run)
                teacher_source(run, asks_hub=False)
                claimed = claim(run.run_dir) if ranks.is_first else nullcontext()
                remove_stale_locks(prints=ranks.local_rank == 0)
            with claimed, Watchdog(run.train.hang_minutes, run.run_dir, ranks.rank) as watchdog:
                train(run, task, shared_data(run, task, ranks), ranks, watchdog)
    except AgreedError as error:
        if ranks.is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except UserError as error:
        rank = os.environ.get("RANK")
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0

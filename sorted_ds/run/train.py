"""Training: the loop, and how a rank comes to it.

In: a run file, on every rank. Out, in RUN_DIR: run.json, metrics.jsonl, tensorboard/, checkpoints/, and at the end
model/ with the measured table, subnets.json and pareto.png. The step number is the only cursor: rows, passes and
learning rate follow from it, so a run that is started again goes on as if it had not stopped.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from sorted_ds.base.errors import AgreedError, UserError
from sorted_ds.base.files import claim
from sorted_ds.checkpoint import Checkpoints
from sorted_ds.cluster.ancestors import Ancestors
from sorted_ds.cluster.extensions import remove_stale_locks
from sorted_ds.cluster.launcher import configure_environment
from sorted_ds.cluster.ranks import Ranks, joined_ranks
from sorted_ds.cluster.slurm import requeue
from sorted_ds.cluster.stop import PARENT_PID, StopCauses, StopRequest
from sorted_ds.cluster.watchdog import Watchdog
from sorted_ds.data.loader import Loader, MicroBatch
from sorted_ds.deploy.evaluate import measure
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.engine import Engine
from sorted_ds.families import family_of
from sorted_ds.nested import NestedModel, costs_of
from sorted_ds.run.build import (
    check_run,
    engine_of,
    eval_subnets,
    load_model,
    sampler_of,
    source_of,
    training_loader,
    validation_of,
)
from sorted_ds.run.config import Run
from sorted_ds.run.learning_rate import lr_at
from sorted_ds.run.monitor import LossSums, Monitor
from sorted_ds.run.plan import make_plan
from sorted_ds.run.run_dir import RunDir, facts
from sorted_ds.run.run_file import load_engine_config, load_run
from sorted_ds.space import Cost, Pass, SubNet
from sorted_ds.space.sampling import Planned
from sorted_ds.tasks import Metric, Prepared, Task, task_of
from sorted_ds.tasks.task import Sums


def train(run: Run, task: Task, data: Prepared, ranks: Ranks, watchdog: Watchdog) -> None:
    """Trains from the last checkpoint, or from step 0, to the end or until a stop is asked for. A collective.

    Raises: UserError, on all ranks, for what the user can mend.
    """
    with ranks.fail_together():
        launchers = Ancestors(os.environ, PARENT_PID, is_launched=ranks.size > 1)
        stop = StopCauses(run.run_dir, run.train.time_limit, ranks.is_first, launchers.has_one_ended)
        config, space = check_run(run)
        costs = costs_of(space, family_of(config.model_type), config, run.batch.row_tokens)
        sampler = sampler_of(run, costs)
        loader = training_loader(run, task, data, sampler.num_shares, ranks)
        validation = validation_of(run, task, data, ranks)
    engine = warm_engine(run, task, load_model(run, config, space, ranks, watchdog.heartbeat), loader, ranks, watchdog)
    folder = RunDir(run, config, task, data, ranks, watchdog.heartbeat)
    checkpoints = folder.checkpoints()
    step = restore(checkpoints, engine, run.train.steps)
    sums = LossSums(space, 1 / (loader.dealt.forwards * ranks.size), ranks.device)
    changes = folder.open(load_engine_config(run.engine.deepspeed), engine.deepspeed_config)
    with ranks.fail_together():
        monitor = Monitor(run, space, step, ranks)

    ask = partial(ask_all, ranks, stop, checkpoints, monitor)
    wanted, learning_rate, norm = StopRequest(), 0.0, 0.0
    with monitor, checkpoints.finish_on_error():
        monitor.started(step, make_plan(run, space, config, ranks.size), changes, checkpoints.warnings)
        # A start that ended in the middle of an evaluation, or was killed there, has left it to this one.
        evaluated = step if ranks.sum([monitor.has_evaluated(step)])[0] == ranks.size else 0
        while step < run.train.steps:
            if is_due(step, run.eval.every_steps) and step > evaluated:
                chosen = eval_subnets(run, space)
                measured, seconds, wanted = evaluate(
                    engine, chosen, validation, task.metrics, costs, ask, watchdog.heartbeat
                )
                if wanted.stops:
                    break
                monitor.evaluated(step, measured, seconds)
                evaluated = step
            plan, batches = sampler.plan(step), loader.batches(step)
            wanted, num_targets = ask(describe_step(step, plan), count_targets(plan, batches))
            if wanted.stops:
                break
            learning_rate = lr_at(step, run.train.steps, run.optim)
            losses = accumulate(engine, plan, batches, num_targets)
            norm = engine.step(learning_rate)
            check_finite(step, losses, norm, checkpoints, ranks)
            sums.add(losses)
            step += 1
            watchdog.heartbeat()
            if is_due(step, run.log.every_steps):
                monitor.trained(step, sums.take(ranks), learning_rate, norm, checkpoints.total_pause_seconds)
            if is_due(step, run.checkpoint.every_steps):  # before the evaluation, which takes long
                monitor.saved(checkpoints.start_save(engine, step))
                watchdog.heartbeat()

        if step > monitor.reported_step:
            monitor.trained(step, sums.take(ranks), learning_rate, norm, checkpoints.total_pause_seconds)
        save_last(checkpoints, engine, step, wanted.requeues, stop, monitor)
        if step == run.train.steps:
            wanted = leave_model(folder, engine, validation, costs, stop, monitor)
        stop.acknowledge(is_finished=not wanted.stops)  # before Slurm is asked, which then ends this job at once
        monitor.ended(step, left_early(stop, wanted.requeues, ranks) if wanted.stops else "")


def ask_all(
    ranks: Ranks, stop: StopCauses, checkpoints: Checkpoints, monitor: Monitor, fact: str = "", num_targets: float = 0
) -> tuple[StopRequest, float]:
    """What the ranks want, who must have the same `fact`, and the sum of their targets. A collective.

    A checkpoint that was written meanwhile appears. Raises: AgreedError where a fact is another one.
    """
    own = [num_targets, *stop.request(checkpoints.expected_save_seconds), checkpoints.is_ready()]
    num_targets, *ends, ready = ranks.sum_with_same_fact(own, fact)
    wanted = StopRequest(*ends)
    if ready == ranks.size and not wanted.stops:
        monitor.saved(checkpoints.advance())
    return wanted, num_targets


def warm_engine(run: Run, task: Task, model: NestedModel, loader: Loader, ranks: Ranks, watchdog: Watchdog) -> Engine:
    """The engine around the model, with everything compiled that will be. A collective."""
    watchdog.heartbeat()
    engine = engine_of(run, task, model, ranks)
    watchdog.heartbeat()
    engine.warm_up(loader.batches(step=0)[0][0])
    watchdog.heartbeat()
    return engine


def save_last(
    checkpoints: Checkpoints, engine: Engine, step: int, goes_on_later: bool, stop: StopCauses, monitor: Monitor
) -> None:
    """Ends the save that is on its way, and saves what came after it. A collective.

    Raises: AgreedError where that fails. A job that is to go on later then goes on from the checkpoint before.
    """
    try:
        monitor.saved(checkpoints.finish())
        if step > checkpoints.last_step:
            monitor.saved(checkpoints.save(engine, step))
    except AgreedError as error:
        is_asked = goes_on_later and engine.ranks.is_first and checkpoints.last_step
        stop.acknowledge()
        then = ""
        try:
            then = requeue(os.environ) if is_asked else ""
        except UserError as refused:
            then = str(refused)
        then = engine.ranks.gather(then)[0]  # all leave when Slurm has answered
        raise AgreedError(f"{error} {then}".strip()) from None


def left_early(stop: StopCauses, goes_on_later: bool, ranks: Ranks) -> str:
    """Why, and what comes of it, on rank 0: a Slurm job that is to go on later is started again. A collective.

    Raises: AgreedError when Slurm does not: whoever waits for the end of the job must not take it for a success.
    """
    why, then = ", ".join(dict.fromkeys(filter(None, ranks.gather(stop.reason)))), ""
    with ranks.fail_together():
        try:
            then = requeue(os.environ) if goes_on_later and ranks.is_first else ""
        except UserError as refused:
            raise UserError(f"{why}; {refused}") from None
    return f"{why}; {then or 'start the run again to go on'}"


def leave_model(
    folder: RunDir,
    engine: Engine,
    validation: Sequence[MicroBatch],
    costs: Mapping[SubNet, Cost],
    stop: StopCauses,
    monitor: Monitor,
) -> StopRequest:
    """Writes the model and measures it, where an earlier start has not, and until the run is to end. A collective."""
    num_targets = round(folder.ranks.sum([sum(batch.num_targets for batch in validation)])[0])
    known = folder.measured(engine, num_targets)
    if known is None:
        folder.write_model(engine)
    stop.skip_interval()
    measured, seconds, wanted = evaluate(
        engine,
        [subnet for subnet in engine.model.space if subnet.name not in (known or ())],
        validation,
        folder.task.metrics,
        costs,
        lambda: (StopRequest(*folder.ranks.sum(stop.request(seconds_to_save=0.0))), 0.0),
        folder.heartbeat,
    )
    table = folder.add_to_table(measured)
    if wanted.stops:
        return wanted
    if measured or not monitor.has_evaluated(folder.run.train.steps):
        monitor.evaluated(folder.run.train.steps, table, seconds)
    monitor.table(table, folder.baseline)
    return wanted


def is_due(step: int, every_steps: int) -> bool:
    """Never where `every_steps` is 0, nor before the first step."""
    return step > 0 and every_steps > 0 and step % every_steps == 0


def describe_step(step: int, plan: Sequence[Planned]) -> str:
    """Describes the passes of a step. Ranks compare it: ranks with other passes would issue other collectives."""
    return f"step {step} runs {', '.join(str(planned) for planned in plan)}"


def passes_of(plan: Sequence[Planned], batches: Sequence[Sequence[MicroBatch]]) -> Iterator[tuple[Pass, MicroBatch]]:
    """The passes of a step in their order, each micro-batch with all passes of its share: a teacher before its student.

    `batches`: for each share of the step's rows, this rank's micro-batches.
    """
    for share, micro_batches in enumerate(batches):
        runs = [planned.run for planned in plan if planned.share == share]
        for batch in micro_batches:
            yield from ((run, batch) for run in runs)


def count_targets(plan: Sequence[Planned], batches: Sequence[Sequence[MicroBatch]]) -> int:
    """The targets of a step on this rank, each counted as often as a pass with a gradient has it."""
    return sum(batch.num_targets for run, batch in passes_of(plan, batches) if run.has_gradient)


def accumulate(
    engine: Engine, plan: Sequence[Planned], batches: Sequence[Sequence[MicroBatch]], num_targets: float
) -> list[tuple[SubNet, Tensor, int]]:
    """Accumulates the gradient of the mean loss over all ranks' targets. Returns this rank's summed losses in nats."""
    losses = []
    for run, batch in passes_of(plan, batches):
        nll = engine.forward(batch.inputs, run)
        if run.has_gradient:
            engine.backward(nll / num_targets)
            losses.append((run.subnet, nll.detach(), batch.num_targets))
    return losses


def check_finite(
    step: int, losses: Sequence[tuple[SubNet, Tensor, int]], norm: float, checkpoints: Checkpoints, ranks: Ranks
) -> None:
    """Raises: UserError on all ranks when a gradient is not finite; it names the sub-network whose loss is not.

    The norm is the same on all ranks, and a loss that is not finite makes it so.
    """
    if norm - norm == 0:
        return
    bad = [(subnet, float(nll)) for subnet, nll, _ in losses if float(nll) - float(nll) != 0]
    told = ranks.gather(f"the loss of {bad[0][0]} is {bad[0][1]}" if bad else "")
    what = next(filter(None, told), "the gradient is not finite")
    with suppress(AgreedError):
        checkpoints.finish()
    raise AgreedError(f"step {step}: {what} (gradient norm {norm}). Nothing was saved. {checkpoints.last_good()}")


def restore(checkpoints: Checkpoints, engine: Engine, num_steps: int) -> int:
    """The step of the last checkpoint, loaded. Raises: UserError when the run should have ended before it."""
    step = checkpoints.restore_latest(engine)
    if step > num_steps:
        raise AgreedError(
            f"train.steps = {num_steps}, but {checkpoints.folder} goes to step {step}. Raise train.steps."
        )
    return step


def evaluate(
    engine: Engine,
    subnets: Iterable[SubNet],
    batches: Sequence[MicroBatch],
    metrics: Sequence[Metric],
    costs: Mapping[SubNet, Cost],
    ask: Callable[[], tuple[StopRequest, float]],
    heartbeat: Callable[[], None],
) -> tuple[list[Measured], float, StopRequest]:
    """Validation of sub-networks, one after the other until `ask` wants the run to end. A collective.

    Returns what was measured, the seconds it took, and what was wanted last.
    """
    start = time.perf_counter()

    def forward(batch: MicroBatch, subnet: SubNet) -> Sums:
        heartbeat()
        return engine.evaluate(batch.inputs, subnet)

    measured: list[Measured] = []
    wanted = StopRequest()
    for subnet in subnets:
        wanted, _ = ask()
        if wanted.stops:
            break
        measured += measure(forward, [subnet], batches, metrics, engine.ranks.sum, costs)
    return measured, time.perf_counter() - start, wanted


def shared_data(run: Run, task: Task, ranks: Ranks) -> Prepared:
    """The prepared data that rank 0 finds. To prepare it here would let collectives time out. A collective.

    Raises: UserError, on all ranks, when it is not prepared.
    """
    with ranks.fail_together():
        found = task.find_prepared(run) if ranks.is_first else None
    folder = ranks.gather(str(found.folder) if found else "")[0]
    with ranks.fail_together():
        return task.open_prepared(Path(folder))


def main(arguments: Sequence[str]) -> int:
    """One rank: RUN.toml and overrides. Returns the exit code; 2 for what the user can mend."""
    configure_environment()
    disable_progress_bar()
    try:
        with joined_ranks() as ranks:
            with ranks.fail_together():
                run = load_run(Path(arguments[0]), arguments[1:])
                task, known = task_of(run.task), facts(run)
            ranks.require_same_facts(known)
            with ranks.fail_together():
                source_of(run)  # a download may take longer than the watchdog waits
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

"""Builds what the training loop uses, restored from the last checkpoint.

In: a run, its task and its prepared data, on every rank. Out: `Parts`, which the loop (train.py), the evaluations
during a run (evaluation.py) and the end of a run (finish.py) share. On disk: RUN_DIR/run.json.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sorted_ds.checkpoint import Checkpoints
from sorted_ds.cluster.ancestors import Ancestors
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.cluster.stop import PARENT_PID, StopCauses, StopRequest
from sorted_ds.data.loader import Loader, MicroBatch
from sorted_ds.engine import Engine
from sorted_ds.families import family_of
from sorted_ds.nested import NestedModel, costs_of
from sorted_ds.run.build import engine_of, load_model, sampler_of, training_loader, validation_of
from sorted_ds.run.checks import check_once
from sorted_ds.run.config import Run
from sorted_ds.run.monitor import Monitor
from sorted_ds.run.run_dir import RunDir, require_step
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.run.teacher import Teaching, load_teaching
from sorted_ds.space import Cost, Sampler, SubNet, SubNetSpace
from sorted_ds.tasks import Prepared, Task


@dataclass(frozen=True)
class Parts:
    """The parts of a run on this rank. `build_parts` builds them."""

    run: Run
    task: Task
    ranks: Ranks
    space: SubNetSpace
    costs: Mapping[SubNet, Cost]
    sampler: Sampler
    loader: Loader
    teacher: Teaching
    validation: Sequence[MicroBatch]
    """This rank's validation rows."""
    stop: StopCauses
    engine: Engine
    folder: RunDir
    checkpoints: Checkpoints
    monitor: Monitor
    first_step: int
    """The step of the checkpoint that was restored, or 0."""
    changes: Sequence[str]
    """What has changed in the run file since the last start, for the user."""
    heartbeat: Callable[[], None]
    """Tells the watchdog that this rank makes progress."""

    def agree(self, step_description: str = "", num_targets: float = 0) -> tuple[StopRequest, float]:
        """Returns the sum of all ranks' stop requests, and the sum of their targets. Every rank must call this.

        Once all ranks have finished a phase of a save, this also starts the next phase, or publishes the checkpoint.

        Raises: AgreedError, on all ranks, when ranks pass different descriptions.
        """
        own_request = self.stop.request(self.checkpoints.expected_save_seconds)
        own = [num_targets, *own_request, self.checkpoints.is_ready()]
        num_targets, *requests, num_ready = self.ranks.sum_with_same_fact(own, step_description)
        request = StopRequest(*requests)
        if num_ready == self.ranks.size and not request.stops:
            self.monitor.report_saves(self.checkpoints.advance())
        return request, num_targets


def build_parts(run: Run, task: Task, data: Prepared, ranks: Ranks, heartbeat: Callable[[], None]) -> Parts:
    """Builds the parts of a run and restores its last checkpoint, if it has one. Every rank must call this.

    Raises: UserError, on all ranks, for what the user can correct.
    """
    with ranks.fail_together():
        launchers = Ancestors(os.environ, PARENT_PID, is_launched=ranks.size > 1)
        stop = StopCauses(run.run_dir, run.train.time_limit, ranks.is_first, launchers.has_one_ended)
    config, space = check_once(run, ranks)
    with ranks.fail_together():
        costs = costs_of(space, family_of(config.model_type), config, run.batch.row_tokens)
        sampler = sampler_of(run, space, costs)
        loader = training_loader(run, task, data, ranks)
        validation = validation_of(run, task, data, ranks)
    model = load_model(run, config, space, ranks, heartbeat)
    teacher = load_teaching(run, task, space, ranks)
    engine = _warm_engine(run, task, model, loader, sampler, ranks, heartbeat)
    folder = RunDir(run, config, task, data, ranks, heartbeat)
    folder.branch_off()
    checkpoints = folder.checkpoints()
    first_step = _restore(checkpoints, engine, run.train.steps, ranks)
    changes = folder.write_run_json(load_engine_config(run.engine.deepspeed), engine.deepspeed_config)
    with ranks.fail_together():
        monitor = Monitor(run, space, first_step, ranks)
    return Parts(
        run=run,
        task=task,
        ranks=ranks,
        space=space,
        costs=costs,
        sampler=sampler,
        loader=loader,
        teacher=teacher,
        validation=validation,
        stop=stop,
        engine=engine,
        folder=folder,
        checkpoints=checkpoints,
        monitor=monitor,
        first_step=first_step,
        changes=changes,
        heartbeat=heartbeat,
    )


def _warm_engine(
    run: Run,
    task: Task,
    model: NestedModel,
    loader: Loader,
    sampler: Sampler,
    ranks: Ranks,
    heartbeat: Callable[[], None],
) -> Engine:
    """Returns the engine around the model, with its operations and layers compiled. Every rank must call this."""
    heartbeat()
    engine = engine_of(run, task, model, ranks)
    heartbeat()
    most = min(sampler.phases, key=lambda phase: phase.num_shares).num_shares  # rows in a forward pass
    engine.warm_up(loader.batches(0, most)[0][0])
    heartbeat()
    return engine


def _restore(checkpoints: Checkpoints, engine: Engine, num_steps: int, ranks: Ranks) -> int:
    """Loads the last checkpoint and returns its step, or 0 if there is none. Every rank must call this.

    Raises: AgreedError when the checkpoint is beyond the last step of the run.
    """
    step = checkpoints.restore_latest(engine)
    with ranks.fail_together():
        require_step(step, num_steps, checkpoints.folder)
    return step

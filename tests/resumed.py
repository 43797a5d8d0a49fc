"""Trains a run in legs: each resumes from the newest checkpoint, in a mode of its own, and saves at its end.

Rows, samples and checkpoints are the real ones; the model comes from tests/exactness.py.
"""

import json
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sorted_ds.checkpoint import Checkpoints
from sorted_ds.checkpoint.identity import Identity
from sorted_ds.data.loader import Loader
from sorted_ds.data.rows import PackedRows
from sorted_ds.engine import Engine
from sorted_ds.families import nest
from sorted_ds.nested.weights import hf_tensors
from sorted_ds.run.learning_rate import lr_at
from sorted_ds.space import Pass, Policy, Sampler, SubNetSpace
from tests import exactness
from tests.batches import TASK, blank
from tests.checkpoint.fakes import delayed_writes
from tests.exactness import SPACE, Case

SEED, STEP_ROWS, SAMPLES = 3, 24, 2
HALF, STEPS = 3, 6
TOKENS = np.random.default_rng(7).integers(0, exactness.VOCAB, 61 * exactness.ROW_TOKENS + 1)
"""61 rows, so that epochs end within the run."""
PART = SubNetSpace.of(["d1-g1-f16", "d3-g1-f64", "d1-g4-f64", "d3-g4-f64"])
"""A space that SPACE extends. SPACE cuts each of its width steps into more."""


@dataclass(frozen=True)
class Leg:
    """How one part of the run is trained."""

    case: Case = field(default_factory=lambda: Case(2))
    micro_batch_rows: int = 2
    asynchronous: bool = True
    space: SubNetSpace = SPACE
    trained: SubNetSpace = SPACE
    """The sub-networks that are sampled, all in `space`."""

    @property
    def name(self) -> str:
        more = "" if self.asynchronous else ", synchronous saving"
        return f"{self.case.name}, {self.micro_batch_rows} rows{more}"


def collate(rows, size: int):
    return TASK.collate(rows, size, exactness.ROW_TOKENS)


class Trainer:
    """The engine and the checkpoints of a leg on one rank."""

    def __init__(self, ranks, leg: Leg, folder: str, facts: dict[str, str] | None = None, **settings):
        rows = PackedRows(TOKENS, exactness.ROW_TOKENS)
        self.ranks = ranks
        self.loader = Loader(rows, collate, SEED, STEP_ROWS, leg.micro_batch_rows, ranks.rank, ranks.size)
        self.sampler = Sampler(list(leg.trained), Policy(SAMPLES, "stratified"), SEED)
        model = nest(exactness.plain_model(leg.case), leg.space)
        self.optim = leg.case.optim
        self.engine = Engine(model, TASK, leg.case.deepspeed(), "test.json", self.optim, leg.micro_batch_rows, ranks)
        self.engine.warm_up(blank(self.loader.dealt(SAMPLES).rows_per_forward, exactness.ROW_TOKENS))
        identity = Identity(facts or {"seed": "1"}, settings.pop("extends_space", False))
        settings = {"keep_last": 2, "asynchronous": leg.asynchronous, **settings}
        self.checkpoints = Checkpoints(Path(folder), identity=identity, ranks=ranks, **settings)
        self.rows: list[list[list[int]]] = []
        self.samples: list[str] = []

    def train(self, first_step: int, last_step: int) -> None:
        for step in range(first_step, last_step):
            samples, batches = self.sampler.sample(step), self.loader.batches(step, SAMPLES)
            num_targets = self.ranks.sum([sum(batch.num_targets for sample in batches for batch in sample)])[0]
            for subnet, sample in zip(samples, batches, strict=True):
                for batch in sample:
                    nll = self.engine.forward(batch.inputs, Pass(subnet)).loss
                    self.engine.backward(nll / num_targets)
            self.engine.step(lr_at(step, STEPS, self.optim))
            self.rows.append([self._rows_of(sample) for sample in batches])
            self.samples.append(" ".join(map(str, samples)))

    def _rows_of(self, batches) -> list[int]:
        """Returns a checksum of each row of one sample on all ranks, sorted."""
        own = [
            zlib.crc32(ids.numpy().tobytes())
            for batch in batches
            for ids in batch.inputs["input_ids"][: batch.num_rows]
        ]
        return sorted(row for rows in self.ranks.gather(json.dumps(own)) for row in json.loads(rows))

    def result(self) -> dict:
        """Returns weights and moments by Hugging Face name, and the rows and sub-networks of each step."""
        engine, full = self.engine, self.engine.model.space.full
        states = {"weights": exactness.gather_masters(engine, self.ranks)}
        for kind in exactness.MOMENTS:
            states[kind] = exactness.gather_state(
                engine, self.ranks, lambda shard, kind=kind: engine.state_of(shard)[kind]
            )
        gathered = {kind: hf_tensors(engine.model, full, values.__getitem__) for kind, values in states.items()}
        return {**gathered, "rows": self.rows, "samples": self.samples}


def train(ranks, leg: Leg, folder: str, first_step: int, last_step: int, **settings) -> dict:
    """Resumes at `first_step` from the newest checkpoint, trains to `last_step` and saves there. Returns the result."""
    trainer = Trainer(ranks, leg, folder, **settings)
    assert trainer.checkpoints.restore_latest(trainer.engine) == first_step
    trainer.train(first_step, last_step)
    trainer.checkpoints.save(trainer.engine, last_step)
    return trainer.result()


def train_while_saving(ranks, leg: Leg, folder: str) -> dict:
    """Trains all steps. A save starts after half of them, and is written after two more. Returns the result."""
    trainer = Trainer(ranks, leg, folder)
    trainer.train(0, HALF)
    with delayed_writes() as event:
        if not leg.asynchronous:
            event.set()
        trainer.checkpoints.start_save(trainer.engine, HALF)
        assert trainer.checkpoints.is_ready() is False
        trainer.train(HALF, HALF + 2)
        event.set()
        trainer.checkpoints.finish()
    trainer.train(HALF + 2, STEPS)
    return trainer.result()


def uninterrupted_and_resumed(ranks, legs: list[Leg], folder: str) -> dict[str, tuple[dict, dict]]:
    """Returns two results for each leg: of all steps, and of the second half from the checkpoint of the first run."""
    results = {}
    for leg in legs:
        whole = train_while_saving(ranks, leg, f"{folder}/{leg.name}")
        results[leg.name] = (whole, train(ranks, leg, f"{folder}/{leg.name}", HALF, STEPS))
    return results


def continue_each(ranks, sources: dict[str, str], legs: list[Leg], folder: str) -> dict[tuple[str, str], dict]:
    """Returns the result of each leg after each source, a folder with a checkpoint of half the steps."""
    results = {}
    for source, checkpoints in sources.items():
        for leg in legs:
            copy = Path(folder) / source / leg.name
            with ranks.fail_together():
                if ranks.is_first:
                    shutil.copytree(checkpoints, copy)
            results[source, leg.name] = train(ranks, leg, str(copy), HALF, STEPS)
    return results

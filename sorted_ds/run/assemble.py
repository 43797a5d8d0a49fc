"""What training builds from a resolved run: the model with its first weights, and this rank's rows.

In: a `Run`, its space and tokens, and which rank this is. Out: the values that the loop in `train.py` runs on.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from sorted_ds.cluster.ranks import Ranks
from sorted_ds.data.loader import Loader, MicroBatch, validation_batches
from sorted_ds.data.rows import PackedRows
from sorted_ds.data.text.prepare import TokenizedText
from sorted_ds.deploy.evaluate import choose_spread
from sorted_ds.engine import Engine, partitioner
from sorted_ds.engine.modes import is_bf16, stage_of
from sorted_ds.nested import NestedModel
from sorted_ds.nested.load import build, fingerprint, resolve_source
from sorted_ds.run.config import SCRATCH, Run
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.space import SubNet, SubNetSpace


def source_of(run: Run) -> Path | None:
    """Where the first weights lie, on this host: downloaded where they are not. None where they are active.

    Raises: UserError when they are nowhere.
    """
    return None if run.model.init == SCRATCH else resolve_source(run.model.init)


def load_model(
    run: Run, config: PreTrainedConfig, space: SubNetSpace, ranks: Ranks, heartbeat: Callable[[], None] = lambda: None
) -> NestedModel:
    """The nested model with its first weights, in the training precision. A collective.

    Under ZeRO-3 each rank keeps its part of a parameter as soon as it is filled, and never holds the model.
    `heartbeat` is called for each.

    Raises: UserError, on all ranks, for weights that cannot be read or that ranks see differently.
    """
    engine, init = load_engine_config(run.engine.deepspeed), run.model.init
    zero3 = stage_of(engine) == 3
    take = partitioner(engine, run.batch.micro_batch_rows, run.optim.clip_norm, ranks) if zero3 else None
    with ranks.fail_together():
        source = source_of(run)
        weights = "" if source is None else fingerprint(source)
    ranks.require_same_facts({f"the weights of {init}": weights})
    with ranks.fail_together():
        dtype = torch.bfloat16 if is_bf16(engine) else torch.float32
        model = build(config, space, source, run.seed, dtype, ranks.device, take, heartbeat)
    if run.model.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def engine_of(run: Run, model: NestedModel, ranks: Ranks) -> Engine:
    """DeepSpeed's engine around the model. A collective."""
    config, where = load_engine_config(run.engine.deepspeed), str(run.engine.deepspeed)
    return Engine(model, config, where, run.optim, run.batch.micro_batch_rows, ranks, run.engine.compile)


def training_loader(run: Run, tokens: TokenizedText, ranks: Ranks) -> Loader:
    """This rank's rows of any step."""
    rows = PackedRows(tokens.train, run.batch.row_tokens)
    batch = run.batch
    return Loader(
        rows, run.seed, batch.step_rows, run.sampling.subnets_per_step, batch.micro_batch_rows, ranks.rank, ranks.size
    )


def validation_of(run: Run, tokens: TokenizedText, ranks: Ranks) -> list[MicroBatch]:
    """This rank's validation rows."""
    rows = PackedRows(tokens.validation, run.batch.row_tokens, "validation")
    num_rows = min(run.eval.rows, len(rows))
    return list(validation_batches(rows, num_rows, run.batch.micro_batch_rows, ranks.rank, ranks.size))


def eval_subnets(run: Run, space: SubNetSpace) -> list[SubNet]:
    """Those that are evaluated during training; the full network is always one of them."""
    named = {space[name] for name in run.eval.subnets} | {space.full}
    return sorted(named, key=space.index) if run.eval.subnets else choose_spread(space)

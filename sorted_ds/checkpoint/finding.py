"""Finds the checkpoint from which a run resumes: the newest intact one, and the same one on every rank.

In: the folder of checkpoints and the run's identity. Out: the index of one checkpoint, and warnings for the user. On
disk: newer checkpoints that are damaged are renamed, so that no later start takes one for the newest.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from sorted_ds.base.errors import AgreedError
from sorted_ds.checkpoint.folders import published_checkpoints, rename_damaged
from sorted_ds.checkpoint.identity import Identity
from sorted_ds.checkpoint.index import DamagedError, Index, appear_deadline
from sorted_ds.cluster.ranks import Ranks


def find_newest_intact(
    folder: Path, identity: Identity, ranks: Ranks, strict: bool, heartbeat: Callable[[], None]
) -> tuple[Index | None, Path, list[str]]:
    """Returns the newest intact checkpoint's index and folder, and warnings. Every rank must call this.

    The index is None if there is no checkpoint. `heartbeat` is called while files are read.

    Raises: AgreedError when every checkpoint is damaged, when one is and `strict` is set, or when they belong to
    another run.
    """
    damages: dict[Path, str] = {}
    for checkpoint in reversed(_checkpoints_all_ranks_see(folder, ranks)):
        index, growth, damage = _examine(checkpoint, identity, ranks, heartbeat)
        if not damage:
            warnings = _rename_damaged(damages, checkpoint, ranks)
            return index, checkpoint, warnings + [growth] * bool(growth)
        if strict:
            raise AgreedError(
                f"{damage}. Delete {checkpoint.name} to resume from the one before it, or remove checkpoint.strict."
            )
        damages[checkpoint] = damage
    if damages:
        raise AgreedError(
            f"{next(iter(damages.values()))}, and no other checkpoint in {folder} is intact. Repair it, or set another "
            "run_dir to start a new run."
        )
    return None, folder, []


def _checkpoints_all_ranks_see(folder: Path, ranks: Ranks) -> list[Path]:
    """Returns the published checkpoints, oldest first.

    Raises: AgreedError when ranks see different ones: they would restore different steps, and hang.
    """
    deadline = appear_deadline()
    while True:
        with ranks.fail_together():
            published = published_checkpoints(folder)
        seen = ranks.gather(" ".join(path.name for path in published) or "none")
        odd = next((rank for rank, names in enumerate(seen) if names != seen[0]), None)
        if odd is None:
            return published
        if ranks.sum([time.monotonic() > deadline])[0]:
            raise AgreedError(
                f"{folder}: rank {odd} sees the checkpoints {seen[odd]}, rank 0 sees {seen[0]}. Put run_dir on a file "
                "system that all ranks see."
            )
        time.sleep(1)


def _examine(
    checkpoint: Path, identity: Identity, ranks: Ranks, heartbeat: Callable[[], None]
) -> tuple[Index | None, str, str]:
    """Returns the index, how the space has grown since the checkpoint, and what is damaged.

    The two texts are the same on all ranks, and empty if nothing has grown or is damaged.
    """

    def look() -> str:
        try:
            index = Index.read(checkpoint)
            growth = identity.check(index.identity, checkpoint.parent)
            index.check_sizes(checkpoint)
        except DamagedError as error:
            return json.dumps({"damage": str(error)})
        return json.dumps({"index": asdict(index), "growth": growth})

    seen = json.loads(ranks.ask_first(look))
    if "damage" in seen:
        return None, "", seen["damage"]
    index = Index(**seen["index"])
    return index, seen["growth"], index.find_changed_file(checkpoint, ranks, heartbeat)


def _rename_damaged(damages: dict[Path, str], intact: Path, ranks: Ranks) -> list[str]:
    """Renames the damaged checkpoints on rank 0, and returns one warning for each there."""
    warnings = []
    with ranks.fail_together():
        for checkpoint, damage in damages.items() if ranks.is_first else ():
            renamed = rename_damaged(checkpoint)
            warnings.append(f"{damage}. Resuming from {intact.name}; the damaged checkpoint is now {renamed.name}")
    return warnings

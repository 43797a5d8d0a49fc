"""Which checkpoint a run goes on from: the newest that is whole, and the same one on every rank.

In: the folder of checkpoints and the run's identity. Out: the index of one, and what the user should know. Those that
are damaged are put aside: they must not be taken for the newest again, nor count as kept.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from sorted_ds.base.errors import AgreedError
from sorted_ds.checkpoint import waiting
from sorted_ds.checkpoint.identity import Identity
from sorted_ds.checkpoint.index import DamagedError, Index
from sorted_ds.cluster.ranks import Ranks

PUBLISHED = re.compile(r"step_\d{8,}")


def complete_ones(folder: Path) -> list[Path]:
    """The published checkpoints, oldest first. Raises: OSError; a folder that cannot be read is not an empty one."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if PUBLISHED.fullmatch(name)]


def newest_whole(
    folder: Path, identity: Identity, ranks: Ranks, strict: bool, heartbeat: Callable[[], None]
) -> tuple[Index | None, Path, list[str]]:
    """Its index, its folder and warnings; no index when there is no checkpoint at all. A collective.

    `heartbeat` is called as long as something moves.

    Raises: AgreedError when there are only damaged ones, or some and `strict`, or another run's.
    """
    damages: dict[Path, str] = {}
    for checkpoint in reversed(_seen_by_all(folder, ranks)):
        index, grown, damage = _examined(checkpoint, identity, ranks, heartbeat)
        if not damage:
            aside = _put_aside(damages, checkpoint, ranks)
            return index, checkpoint, aside + [grown] * bool(grown)
        if strict:
            raise AgreedError(
                f"{damage}. Delete {checkpoint.name} to go on from the one before, or leave out checkpoint.strict."
            )
        damages[checkpoint] = damage
    if damages:
        raise AgreedError(
            f"{next(iter(damages.values()))}, and no other checkpoint in {folder} is whole. Mend it, or set another "
            "run_dir to start anew."
        )
    return None, folder, []


def _seen_by_all(folder: Path, ranks: Ranks) -> list[Path]:
    """Raises: AgreedError when ranks see different checkpoints: they would restore different steps, and hang."""
    end = time.monotonic() + waiting.SECONDS_TO_APPEAR
    while True:
        with ranks.fail_together():
            complete = complete_ones(folder)
        seen = ranks.gather(" ".join(path.name for path in complete) or "none")
        odd = next((rank for rank, names in enumerate(seen) if names != seen[0]), None)
        if odd is None:
            return complete
        if ranks.sum([time.monotonic() > end])[0]:
            raise AgreedError(
                f"{folder}: rank {odd} sees the checkpoints {seen[odd]}, rank 0 {seen[0]}. Put run_dir on a file "
                "system that all ranks see."
            )
        time.sleep(1)


def _examined(
    checkpoint: Path, identity: Identity, ranks: Ranks, heartbeat: Callable[[], None]
) -> tuple[Index | None, str, str]:
    """Its index, how the space has grown since, and what is wrong with it: the last two the same on all ranks."""
    index, grown, damage = None, "", ""
    with ranks.fail_together():
        try:
            index = Index.read(checkpoint)
            grown = identity.check(index.identity, checkpoint.parent)
            index.check_sizes(checkpoint)
        except DamagedError as error:
            damage = str(error)
    damage = next(filter(None, ranks.gather(damage)), "")
    if index and not damage:
        damage = index.changed_file(checkpoint, ranks, heartbeat)
    return index, grown, damage


def _put_aside(damages: dict[Path, str], whole: Path, ranks: Ranks) -> list[str]:
    """What to tell of it, on rank 0."""
    told = []
    with ranks.fail_together():
        for folder, damage in damages.items() if ranks.is_first else ():
            aside = _unused(folder.with_name(f"damaged_{folder.name}"))
            folder.rename(aside)
            told.append(f"{damage}. Going on from {whole.name}; the damaged one is now {aside.name}")
    return told


def _unused(path: Path) -> Path:
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free

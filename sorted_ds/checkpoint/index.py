"""checkpoint.json: what a checkpoint is of, and by what one knows that it is whole."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sorted_ds.checkpoint.shard_files import sha256_of
from sorted_ds.errors import UserError
from sorted_ds.files import sync

INDEX = "checkpoint.json"
FORMAT = 2


class DamagedError(Exception):
    """What is wrong with a checkpoint."""


@dataclass(frozen=True)
class Index:
    """The fields of checkpoint.json."""

    step: int
    optimizer_steps: int
    num_ranks: int
    seconds: float
    """From the start of the save until every rank's file was written."""
    state_keys: list[str]
    identity: dict[str, str]
    files: dict[str, dict]
    """Size and sha256 by name."""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        path = folder / INDEX
        path.write_text(json.dumps(asdict(self), indent=1))
        sync(path)
        sync(folder)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Raises: DamagedError; UserError when another version wrote it."""
        path = folder / INDEX
        try:
            told = json.loads(path.read_text())
            if told["format"] != FORMAT:
                raise UserError(
                    f"{path} is of format {told['format']}, and this version reads {FORMAT}. Set another run_dir."
                )
            return cls(**{field.name: told[field.name] for field in fields(cls)})
        except FileNotFoundError:
            raise DamagedError(f"{folder} has no {INDEX}") from None
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{path} is damaged ({error!r})") from None

    def check_files(self, folder: Path, rank: int, num_ranks: int) -> None:
        """Presence and size of every file; of each file the checksum, on one of the ranks.

        Raises: DamagedError.
        """
        for number, (name, expected) in enumerate(self.files.items()):
            path = folder / name
            try:
                num_bytes = path.stat().st_size
                if num_bytes != expected["bytes"]:
                    raise DamagedError(f"{path} has {num_bytes} bytes, {expected['bytes']} were written")
                if number % num_ranks == rank and sha256_of(path) != expected["sha256"]:
                    raise DamagedError(f"{path} was changed since it was written")
            except FileNotFoundError:
                raise DamagedError(f"{path} is missing") from None
            except OSError as error:
                raise DamagedError(f"{path} cannot be read: {error.strerror}") from None

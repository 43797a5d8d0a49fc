"""Prepared tokens of several sources that a run mixes.

    CACHE_DIR/<key>/mixture.json    {"format": 1, "sources": {name: content key}}
    CACHE_DIR/<content key>/        the tokens of a source, as tokens.py describes

In: tokens of sources, by name. Out: `MixedText`. The weights of the sources are not part of it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import replaced
from sorted_ds.data.text.tokens import TokenizedText, open_tokens

MIXTURE_FILE = "mixture.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class MixedText:
    """The tokens of several sources."""

    folder: Path
    """The prepared folder, which names those of the sources."""
    sources: Mapping[str, TokenizedText]

    @property
    def key(self) -> str:
        """Returns the key of the contents of all sources."""
        return self.folder.name


Text = TokenizedText | MixedText
"""The prepared text of a run."""
ALONE = ""
"""The name of the only source of a text that is no mixture."""


def texts_of(data: Text) -> Mapping[str, TokenizedText]:
    """Returns the tokens of each source by its name."""
    return data.sources if isinstance(data, MixedText) else {ALONE: data}


def describe(data: Text) -> dict[str, Any]:
    """Returns what is known of a text, for sorted.json and `sorted-ds prepare --json`."""
    if isinstance(data, MixedText):
        return {
            "tokens_dir": str(data.folder),
            "sources": {name: describe(text) for name, text in data.sources.items()},
        }
    counts = {} if data.counts is None else asdict(data.counts)
    return {
        **counts,
        "left_out": dict(data.left_out),
        "tokens_dir": str(data.folder),
        "tokenizer_dir": str(data.tokenizer_dir),
        "vocab_size": data.vocab_size,
        "train_tokens": len(data.train),
        "validation_tokens": len(data.validation),
        "unigram_nats": data.unigram_nats,
        "rows": {side: asdict(cut) for side, cut in data.cut.items()},
    }


def mixed_folder(cache_dir: Path, sources: Mapping[str, TokenizedText]) -> Path:
    """Returns the folder of a mixture of prepared sources, which need not exist."""
    return cache_dir / sha256(_contents(sources).encode()).hexdigest()[:32]


def write_mixed(cache_dir: Path, sources: Mapping[str, TokenizedText]) -> MixedText:
    """Writes the folder of a mixture if it does not exist, complete or not at all."""
    folder = mixed_folder(cache_dir, sources)
    if not folder.exists():
        with replaced(folder, durable=True) as hidden:
            hidden.mkdir()
            (hidden / MIXTURE_FILE).write_text(_contents(sources), encoding="utf-8")
    return MixedText(folder, sources)


def find_mixed(cache_dir: Path, sources: Mapping[str, TokenizedText]) -> MixedText:
    """Returns a mixture whose folder exists. Raises: UserError if it does not."""
    folder = mixed_folder(cache_dir, sources)
    if not folder.exists():
        raise UserError(f"the run's mixture ({folder}) is not prepared. Run `sorted-ds prepare RUN.toml` first.")
    return MixedText(folder, sources)


def open_text(folder: Path) -> TokenizedText | MixedText:
    """Opens a prepared folder of one source or of a mixture. Raises: UserError when files are missing or damaged."""
    file = folder / MIXTURE_FILE
    if not file.is_file():
        return open_tokens(folder)
    try:
        keys = dict(json.loads(file.read_text(encoding="utf-8"))["sources"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}). Delete its folder and prepare the data again.") from error
    return MixedText(folder, {name: open_tokens(folder.parent / key) for name, key in keys.items()})


def _contents(sources: Mapping[str, TokenizedText]) -> str:
    return json.dumps({"format": FORMAT, "sources": {name: text.key for name, text in sources.items()}}) + "\n"

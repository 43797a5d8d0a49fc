"""Defines the section `[data]` of a run file: what is read, how, and in which mixture."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from sorted_ds.run.section import Fraction, Positive, Section


class DataFiles(Section):
    """Files of text, and how they are read."""

    text: list[Path] = []
    """Text files and folders. Each file is one document. A folder is searched for files with one of the `suffixes`."""
    files: list[str] = Field(default=[], validation_alias=AliasChoices("files", "jsonl"))
    """Files of records, each of which is one document: JSONL (`.jsonl`), also packed (`.jsonl.gz`, `.jsonl.zst`), or
    parquet (`.parquet`); folders of such files; directories that `datasets` has saved with `save_to_disk`; and hub ids
    of data sets, like `"HuggingFaceTB/smoltalk"`. The name says how a file is read. All but `.jsonl` and `.jsonl.gz`
    need `pip install 'sorted-ds[data]'`. The key `jsonl` of earlier versions still works."""
    form: Literal["text", "messages", "prompt_response"] = "text"
    """What a record of `files` holds. `text`: a text. `messages`: a conversation, a list of messages with `role` and
    `content`. `prompt_response`: a question and its answer. The tokenizer's chat template writes conversations, and
    only the answers are learned ([data](data.md))."""
    fields: list[str] = []
    """The names of the fields of a record that are read. The default is `["text"]`, `["messages"]` or
    `["prompt", "response"]`, by `form`."""
    subset: str = ""
    """The subset of a data set of the hub that has several."""
    split: str = "train"
    """The split that is read of a data set that has several. Validation is split off it."""
    skip_bad: bool = False
    """Leaves out records that cannot be used, like lines that are not JSON, and counts them. Otherwise the first one is
    an error with its file and line."""
    suffixes: list[str] = [".txt", ".md"]
    """The file names that are read in the folders of `text` end with one of these."""


class DataSource(DataFiles):
    """One source of a mixture."""

    name: Annotated[str, Field(min_length=1)]
    """What the source is called in other keys and in messages."""
    weight: Annotated[float, Field(gt=0)]
    """The share of the rows that is from this source, relative to the weights of the others."""


class DataPhase(Section):
    """Another mixture from a step on."""

    from_step: Positive
    """The first step of the phase."""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """The weights of sources by name. A source that is not named keeps its own. 0 means no rows."""


class Data(DataFiles):
    """The text that the network learns from."""

    sources: list[DataSource] = []
    """Several sources that are mixed, in place of `text` and `files`: tables `[[data.sources]]` with a `name`, a
    `weight`, and the keys of this section that say what is read. After each step every source has had its share of the
    rows, to one row ([data](data.md))."""
    phases: list[DataPhase] = []
    """Other mixtures later in the run: tables `[[data.phases]]` with `from_step`, and `weights` by name."""
    tokenizer: str = ""
    """The directory or hub id of a Hugging Face tokenizer, or `"train"` for a SentencePiece model that is trained on
    this text. The default is the tokenizer of `model.init`, and `"train"` for a network from scratch."""
    bos: bool | None = None
    """Whether the tokenizer's beginning-of-text token leads each document. The default is what the tokenizer does by
    itself; one that is trained does not add it. The end-of-text token always follows a document."""
    vocab_size: Positive = 32_000
    """The number of tokens of a tokenizer that is trained. Other tokenizers ignore it."""
    validation_fraction: Fraction = 0.01
    """The share of the documents that is kept for validation and not trained on."""
    cache_dir: Path = Path("cache")
    """The folder of the prepared tokens. Each text is found again by a key of its content and settings."""
    workers: Positive = 2
    """The number of processes that prepare the text. One process uses threads, so more are not faster for a few MB."""

    @property
    def weights_by_step(self) -> dict[int, list[float]]:
        """The weights of the sources, in their order, by the first step at which they hold."""
        own = {source.name: source.weight for source in self.sources}
        later = {phase.from_step: list((own | phase.weights).values()) for phase in self.phases}
        return {0: list(own.values()), **later}

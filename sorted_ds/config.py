"""The run file: what a run is, in one TOML file, checked before anything starts.

In: RUN.toml and `section.key=value` overrides. Out: a frozen `Run`, relative paths made absolute from the run file's
folder. A field's meaning, unit and default stand under it and nowhere else: README's reference is made from here by
tools/reference.py. Each number is stated once; what follows from it is derived in `resolve.py`.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sorted_ds.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

SCRATCH = "scratch"
TRAIN_TOKENIZER = "train"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """The full network."""

    init: str = SCRATCH
    """`"scratch"`, or the Hugging Face directory or hub id of a checkpoint (safetensors) to start from."""
    family: str = ""
    """From scratch: the model family, like `"llama"`."""
    config: dict[str, Any] = {}
    """From scratch: keys of the family's Hugging Face config. The vocabulary and its special ids follow from the
    tokenizer."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Hugging Face's attention implementation."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more compute."""


class Space(Section):
    """The sub-networks: every combination of `depths`, `groups` and `ffn`, or the list `subnets`."""

    depths: list[Positive] = []
    """Numbers of layers."""
    groups: list[Positive] = []
    """Numbers of attention groups (key/value heads with their query heads) in each layer."""
    ffn: list[Positive] = []
    """Numbers of feed-forward channels in each layer."""
    subnets: list[str] = []
    """Names instead of sizes, like `["d4-g2-f256", "d8-g4-f512"]`."""


class Schedule(Section):
    """Which sub-networks a step trains."""

    draws: Positive = 4
    """Sub-networks an optimizer step draws, each for an equal share of its rows. Does not depend on the ranks."""
    strategy: Literal["uniform", "stratified", "sandwich", "full_plus"] = "stratified"
    """`stratified`: one from each cost quantile, all equally often. `uniform`: independent draws. `sandwich`: the full,
    the smallest, the rest at random. `full_plus`: the full one, the rest stratified."""


class Data(Section):
    """The text."""

    text: list[Path] = []
    """Text files and folders; a file is one document. Folders are searched for `suffixes`."""
    jsonl: list[Path] = []
    """JSONL files and folders of them; the field `text` of a line is one document."""
    suffixes: list[str] = [".txt", ".md"]
    """Which files of the folders in `text` are read."""
    tokenizer: str = ""
    """A Hugging Face tokenizer (directory or hub id), or `"train"`: a SentencePiece model trained from this text.
    Default: that of `model.init`; `"train"` from scratch."""
    vocab_size: Positive = 32_000
    """Of a tokenizer that is trained, in tokens; ignored otherwise."""
    validation_fraction: Fraction = 0.01
    """Share of the documents that is only evaluated on."""
    cache_dir: Path = Path("cache")
    """Where prepared tokens are kept, each under a key of its content."""
    workers: Positive = 2
    """Processes that prepare the text."""


class Batch(Section):
    """Rows of a step."""

    step_rows: Positive
    """Rows of an optimizer step, over all draws and ranks."""
    micro_batch_rows: Positive
    """Rows of one forward pass on one rank, at most."""
    row_tokens: Positive
    """Tokens of a row."""


class Train(Section):
    """How long."""

    steps: Positive
    """Optimizer steps of the run."""


class Optim(Section):
    """The optimizer and its learning rate. Norms, biases and embeddings are not decayed."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW (fused on CUDA), or SGD without momentum."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """At its peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak to `final_fraction` of it at the last step."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of the peak, at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decoupled weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator term."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of a step's gradient; 0 does not clip."""


class Eval(Section):
    """Validation."""

    every_steps: Annotated[int, Field(ge=0)] = 500
    """Steps between evaluations of `subnets`; 0 evaluates at the end only. All are evaluated at the end."""
    rows: Positive = 256
    """Validation rows, the same for every sub-network."""
    subnets: list[str] = []
    """Names of those evaluated during training. Default: nine, spread over the space."""


class Checkpoint(Section):
    """Saving. A run that is started again goes on from its last checkpoint."""

    every_steps: Positive = 500
    """Steps between checkpoints; one more is saved at the end, and on SIGTERM or SIGINT."""
    keep_last: Positive = 2
    """Checkpoints that are kept."""


class Log(Section):
    """What is reported."""

    every_steps: Positive = 10
    """Steps between reports."""
    tensorboard: bool = True
    """Also write RUN_DIR/tensorboard."""


class Engine(Section):
    """DeepSpeed."""

    deepspeed: Path
    """DeepSpeed JSON with engine keys only; batch sizes, clipping, optimizer and schedule belong to the run file."""


class Run(Section):
    """A run file."""

    seed: int = 0
    """Of weights, rows and draws."""
    run_dir: Path = Path("runs/{name}")
    """Where everything is written; `{name}` is the run file's name without its suffix."""
    model: Model
    space: Space
    schedule: Schedule = Schedule()
    data: Data
    batch: Batch
    train: Train
    optim: Optim = Optim()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    engine: Engine


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Reads and checks a run file. Relative paths, overridden ones too, start at the run file's folder.

    Raises: UserError for a missing or damaged file, an unknown key, a value of the wrong kind.
    """
    fields = _read_toml(path)
    for text in overrides:
        _override(fields, text)
    try:
        run = Run.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    return _with_absolute_paths(run, path)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"run file {path} cannot be read: {error.strerror}. Name an existing one.") from None
    except ValueError as error:  # TOML or UTF-8
        raise UserError(f"{path} is no TOML: {error}. Mend that place.") from None


def _override(fields: dict[str, Any], text: str) -> None:
    """Sets `section.key=value`; the value is read as TOML, and as a plain string where it is none."""
    dotted, equals, value = text.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not key:
        raise UserError(f"override {text!r} is not of the form section.key=value.")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise UserError(f"override {text!r}: {section!r} is no section.")
    try:
        fields[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        fields[key] = value


def _explain(error: ValidationError) -> str:
    """The first mistake, as one line. Unknown keys first: one that is misspelt is also missing."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    *sections, key = [str(part) for part in first["loc"]]
    name = ".".join([*sections, key])
    if first["type"] == "extra_forbidden":
        near = _nearest_key(sections, key)
        return f"unknown key {name!r}. " + (f"Did you mean {near!r}?" if near else "Remove it.")
    if first["type"] == "missing":
        return f"{name!r} is missing. Add it; README's reference of run files says what it is."
    message = first["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{name} = {first['input']!r} should be {message}."


def _nearest_key(sections: list[str], key: str) -> str:
    """A known key that looks like the unknown one: of its section, or the same key in another."""
    keys = {".".join(path): path[-1] for path in known_keys()}
    own = {name: last for name, last in keys.items() if name.split(".")[:-1] == sections}
    for candidates in (own, keys):
        near = difflib.get_close_matches(key, candidates.values(), n=1)
        if near:
            return next(name for name, last in candidates.items() if last == near[0])
    return ""


def known_keys() -> Iterator[tuple[str, ...]]:
    """Every key of a run file, with its section."""
    for name, field in Run.model_fields.items():
        yield (name,)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from ((name, key) for key in field.annotation.model_fields)


def _with_absolute_paths(run: Run, path: Path) -> Run:
    folder = path.absolute().parent

    def absolute(value: Path) -> Path:
        return (folder / value.expanduser()).resolve()

    def local_or_id(value: str) -> str:
        return str(absolute(Path(value))) if value and absolute(Path(value)).is_dir() else value

    init = SCRATCH if run.model.init == SCRATCH else local_or_id(run.model.init)
    tokenizer = run.data.tokenizer or (TRAIN_TOKENIZER if init == SCRATCH else init)
    data = run.data.model_copy(
        update={
            "text": [absolute(p) for p in run.data.text],
            "jsonl": [absolute(p) for p in run.data.jsonl],
            "cache_dir": absolute(run.data.cache_dir),
            "tokenizer": tokenizer if tokenizer == TRAIN_TOKENIZER else local_or_id(tokenizer),
        }
    )
    return run.model_copy(
        update={
            "run_dir": absolute(Path(str(run.run_dir).replace("{name}", path.stem))),
            "model": run.model.model_copy(update={"init": init}),
            "data": data,
            "engine": Engine(deepspeed=absolute(run.engine.deepspeed)),
        }
    )


RUN_FILE_KEYS = {
    "train_batch_size": "[batch]",
    "train_micro_batch_size_per_gpu": "[batch]",
    "gradient_accumulation_steps": "[batch] and [schedule]",
    "managed_gradient_accumulation": "[schedule]",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "[optim]",
    "scheduler": "[optim]",
    "steps_per_print": "log.every_steps",
}
"""Keys of a DeepSpeed JSON that the run file states, and where."""


def load_engine_config(path: Path) -> dict[str, Any]:
    """The engine keys of a DeepSpeed JSON.

    Raises: UserError for a missing or damaged file, or one that states a number of the run file.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"engine.deepspeed: {path} cannot be read: {error.strerror}. Name an existing file.") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}. Mend that place.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object. Write {{}} for DeepSpeed's defaults.")
    for key, where in RUN_FILE_KEYS.items():
        if key in config:
            raise UserError(
                f"{path} sets {key!r}, which follows from {where} of the run file. Remove it from the JSON."
            )
    return config

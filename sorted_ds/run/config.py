"""What a run is: the sections and keys of a run file, with meaning, unit and default.

In: nothing. Out: the frozen `Run` that `run_file.py` reads from TOML. A key's meaning stands under it and nowhere else:
docs/run-file.md is made from here by tools/reference.py. Each number is stated once; what follows from it is derived in
`build.py`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from sorted_ds.space import AXES

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
    attention: Literal["", "sdpa", "eager"] = ""
    """Hugging Face's attention implementation. Default: `"sdpa"` where the family has it (gemma2 has not)."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more compute."""


class SpaceBase(Section):
    """The sub-networks: every combination of sizes along the axes of the model's family, or the list `subnets`."""

    subnets: list[str] = []
    """Names instead of sizes, like `["d4-g2-f256", "d8-g4-f512"]`."""
    layer_order: list[Annotated[int, Field(ge=0)]] = []
    """A permutation of the layers, counted from 0. A sub-network of depth n has the first n layers of this order, and
    runs them in the network's own sequence. Default: the network's own sequence."""

    @property
    def sizes(self) -> dict[str, list[int]]:
        """The lists of sizes that are given, by their keys."""
        return {axis.sizes: given for axis in AXES.values() if (given := getattr(self, axis.sizes))}


if TYPE_CHECKING:
    Space = SpaceBase
else:
    Space = create_model(
        "Space",
        __base__=SpaceBase,
        __doc__=SpaceBase.__doc__,
        **{
            axis.sizes: (list[Positive], Field(default=[], description=f"Numbers of {axis.counts}."))
            for axis in AXES.values()
        },
    )


class Sampling(Section):
    """Which sub-networks a step trains."""

    subnets_per_step: Positive = 4
    """How many sub-networks an optimizer step samples. They share the step's rows equally. Does not depend on the
    ranks."""
    strategy: str = "stratified"
    """`stratified`: one from each cost quantile, all equally often. `uniform`: independent samples. `sandwich`: the
    full, the smallest, the rest at random. `full_plus`: the full one, the rest stratified."""


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
    """Processes that prepare the text. One alone tokenizes with threads; for a few MB, more are no faster."""


class Batch(Section):
    """Rows of a step."""

    step_rows: Positive
    """Rows of an optimizer step, over all its sub-networks and ranks."""
    micro_batch_rows: Positive
    """Rows of one forward pass on one rank, at most."""
    row_tokens: Positive
    """Tokens of a row."""


class Train(Section):
    """How long."""

    steps: Positive
    """Optimizer steps of the run."""
    time_limit: str = ""
    """Save and end before so long has passed since the start, like Slurm's `--time`: `90` (minutes), `1:30:00` or
    `1-12:00:00` (days-hours...). Default: none. A Slurm job is then requeued."""
    hang_minutes: Annotated[float, Field(ge=0)] = 30.0
    """After so long without a finished step, evaluation, save or part of the start every rank writes its stacks to
    RUN_DIR/stacks and ends; 0 never."""


class Optim(Section):
    """The optimizer and its learning rate. Norms, biases and embeddings are not decayed."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD without momentum."""
    implementation: Literal["auto", "torch", "fused", "cpu_adam"] = "auto"
    """Whose AdamW: torch's, torch's fused one, or (`cpu_adam`) DeepSpeed's, for an optimizer that is offloaded. `auto`
    is the fused one, and `cpu_adam` on CUDA with offload."""
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
    """Steps between checkpoints; one more is saved at the end, and when the run is ended early."""
    keep_last: Positive = 2
    """Checkpoints that are kept. With two, a damaged one costs the steps between them, not the run."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory: 12 bytes a parameter (AdamW), shared by the ranks."""
    strict: bool = False
    """Refuse to start when the newest checkpoint is damaged. Otherwise the run goes on from the newest whole one."""
    extend_space: bool = False
    """Go on from checkpoints whose space is a part of this one, with the same weights."""


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
    compile: bool = False
    """Compile each layer with torch.compile, at stages 0 to 2. It takes minutes at the start of a run; the same graphs
    serve every sub-network."""


class Run(Section):
    """A run file."""

    seed: int = 0
    """Random weights, the order of rows and the sampled sub-networks follow from it."""
    run_dir: Path = Path("runs/{name}")
    """Where everything is written; `{name}` is the run file's name without its suffix, `{seed}` the seed."""
    task: str = "causal_lm"
    """What the network is trained for. `causal_lm`: predict the next token."""
    model: Model
    space: Space
    sampling: Sampling = Sampling()
    data: Data
    batch: Batch
    train: Train
    optim: Optim = Optim()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    engine: Engine

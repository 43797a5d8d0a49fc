"""Defines the sections and keys of a run file, with their meaning, unit and default.

Out: the frozen `Run` that `run_file.py` reads from TOML. The meaning of a key is documented under the key and nowhere
else: tools/reference.py writes docs/run-file.md from it. Each number is stated once, and `build.py` derives the others.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from sorted_ds.space import AXES

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

SCRATCH = "scratch"
"""The value of `model.init` for random weights."""
TRAIN_TOKENIZER = "train"
"""The value of `data.tokenizer` for a tokenizer that is trained on the run's text."""


class Section(BaseModel):
    """A section of a run file. An unknown key is an error, and the values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """The full network."""

    init: str = SCRATCH
    """Where the first weights come from: `"scratch"` for random ones, or the Hugging Face directory or hub id of a
    checkpoint with safetensors."""
    family: str = ""
    """The model family of a network from scratch, like `"llama"`."""
    config: dict[str, Any] = {}
    """The family's Hugging Face config for a network from scratch. The size of the vocabulary and its special ids
    follow from the tokenizer."""
    attention: Literal["", "sdpa", "eager"] = ""
    """Hugging Face's attention implementation, `"sdpa"` or `"eager"`. The default is `"sdpa"` if the family has it;
    gemma2 does not."""
    activation_checkpointing: bool = False
    """Recomputes the activations of each layer in the backward pass: it saves memory and costs about a third more
    compute."""


class SpaceBase(Section):
    """The sub-networks: every combination of sizes along the axes of the model's family, or the list `subnets`."""

    subnets: list[str] = []
    """The names of the sub-networks, like `["d4-g2-f256", "d8-g4-f512"]`, instead of sizes along the axes."""
    layer_order: list[Annotated[int, Field(ge=0)]] = []
    """A permutation of the layers, counted from 0. A sub-network of depth n has the first n layers of this order, and
    runs them in the network's own sequence. Default: the network's own sequence."""

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Returns the lists of sizes that are set, by their keys."""
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
    """How many sub-networks an optimizer step samples. Each one gets an equal share of the step's rows. The number of
    ranks does not matter."""
    strategy: str = "stratified"
    """How a step samples its sub-networks. `stratified`: one from each cost quantile, so that all are sampled equally
    often. `uniform`: each one at random from the whole space. `sandwich`: the full one, the smallest one, and the rest
    at random. `full_plus`: the full one, and the rest stratified."""


class Data(Section):
    """The text that the network learns from."""

    text: list[Path] = []
    """Text files and folders. Each file is one document. A folder is searched for files with one of the `suffixes`."""
    jsonl: list[Path] = []
    """JSONL files, and folders of JSONL files. The field `text` of each line is one document."""
    suffixes: list[str] = [".txt", ".md"]
    """The file names that are read in the folders of `text` end with one of these."""
    tokenizer: str = ""
    """The directory or hub id of a Hugging Face tokenizer, or `"train"` for a SentencePiece model that is trained on
    this text. The default is the tokenizer of `model.init`, and `"train"` for a network from scratch."""
    vocab_size: Positive = 32_000
    """The number of tokens of a tokenizer that is trained. Other tokenizers ignore it."""
    validation_fraction: Fraction = 0.01
    """The share of the documents that is kept for validation and not trained on."""
    cache_dir: Path = Path("cache")
    """The folder of the prepared tokens. Each text is found again by a key of its content and settings."""
    workers: Positive = 2
    """The number of processes that prepare the text. One process uses threads, so more are not faster for a few MB."""


class Batch(Section):
    """How many rows a step has, and how long a row is."""

    step_rows: Positive
    """The number of rows of one optimizer step, over all its sub-networks and all ranks."""
    micro_batch_rows: Positive
    """The largest number of rows of one forward pass on one rank."""
    row_tokens: Positive
    """The number of tokens of a row."""


class Train(Section):
    """How long a run trains."""

    steps: Positive
    """The number of optimizer steps of the run."""
    time_limit: str = ""
    """The run saves and ends before this time has passed since its start. It is written like Slurm's `--time`: `90`
    (minutes), `1:30:00` or `1-12:00:00` (days first). A Slurm job is then put into the queue again. The default is no
    limit."""
    hang_minutes: Annotated[float, Field(ge=0)] = 30.0
    """The time without progress (a step, an evaluation, a save or a part of the start) after which every rank writes
    its stacks to RUN_DIR/stacks and ends. 0 means never."""


class Optim(Section):
    """The optimizer and its learning rate. Norms, biases and embeddings are not decayed."""

    name: Literal["adamw", "sgd"] = "adamw"
    """`"adamw"`, or `"sgd"` for SGD without momentum."""
    implementation: Literal["auto", "torch", "fused", "cpu_adam"] = "auto"
    """Which code runs AdamW: torch's (`torch`), torch's fused one (`fused`), or DeepSpeed's for an offloaded optimizer
    (`cpu_adam`). `auto` takes the fused one, and `cpu_adam` on CUDA with offload."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """The learning rate at its peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The number of steps in which the learning rate grows linearly to its peak."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to `final_fraction` of the peak at the last step."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The learning rate of the last step, as a fraction of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decoupled weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """The term that AdamW adds to its denominator."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """The largest norm of a step's gradient; a longer one is scaled down to it. 0 means no clipping."""


class Eval(Section):
    """How sub-networks are validated."""

    every_steps: Annotated[int, Field(ge=0)] = 500
    """The number of steps between evaluations of `subnets`; 0 means none. All sub-networks are evaluated at the end."""
    rows: Positive = 256
    """The number of validation rows. They are the same for every sub-network."""
    subnets: list[str] = []
    """The names of the sub-networks that are evaluated during training. The default is nine, spread over the space."""


class Checkpoint(Section):
    """When checkpoints are saved. A run that is started again resumes from its last checkpoint."""

    every_steps: Positive = 500
    """The number of steps between checkpoints. One more is saved at the end, and when the run is ended early."""
    keep_last: Positive = 2
    """The number of checkpoints that are kept. With two, a damaged one costs the steps between them and not the run."""
    asynchronous: bool = True
    """Writes a checkpoint while training goes on, from a copy in host memory. With AdamW the copy takes 12 bytes a
    parameter, summed over all ranks."""
    strict: bool = False
    """Refuses to start if the newest checkpoint is damaged. Otherwise the run resumes from the newest one that is not
    damaged."""
    extend_space: bool = False
    """Lets a run resume with the same weights after its space has grown."""


class Log(Section):
    """What a run reports while it trains."""

    every_steps: Positive = 10
    """The number of steps between two reports."""
    tensorboard: bool = True
    """Writes the curves to RUN_DIR/tensorboard, too."""


class Engine(Section):
    """How DeepSpeed runs the training."""

    deepspeed: Path
    """The DeepSpeed JSON. It holds engine keys only: batch sizes, clipping and the optimizer belong to the run file."""
    compile: bool = False
    """Compiles each layer with torch.compile, at stages 0 to 2. It takes minutes at the start of a run. The same graphs
    serve every sub-network."""


class Run(Section):
    """The contents of a run file."""

    seed: int = 0
    """The seed of the first weights, of the order of the rows and of the sampled sub-networks."""
    run_dir: Path = Path("runs/{name}")
    """The folder that the run writes to. `{name}` is replaced by the name of the run file without its suffix, and
    `{seed}` by the seed."""
    task: str = "causal_lm"
    """What the network is trained for. `causal_lm`: it predicts the next token."""
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

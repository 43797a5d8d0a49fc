"""Defines the sections and keys of a run file, with their meaning, unit and default.

Out: the frozen `Run` that `run_file.py` reads from TOML. The meaning of a key is documented under the key and nowhere
else: tools/reference.py writes docs/run-file.md from it. Each number is stated once, and `build.py` derives the others.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from sorted_ds.run.data_config import Data
from sorted_ds.run.section import Positive, Section
from sorted_ds.space import AXES

SCRATCH = "scratch"
"""The value of `model.init` for random weights."""
FULL_TEACHES = "full"
"""The value of `loss.teacher` for the full network itself."""


class Model(Section):
    """The full network."""

    init: str = SCRATCH
    """Where the first weights come from: `"scratch"` for random ones, the Hugging Face directory or hub id of a
    checkpoint with safetensors, or the directory of another run."""
    sort: bool = False
    """Sorts the attention groups and channels of `init` by importance before the first step, and finds an order of its
    layers for `space.layer_order = "model"`, as `sorted-ds sort` does. Training begins with the sorted model, which is
    in RUN_DIR/sorted. `sorted-ds prepare` and `sorted-ds train` make it."""
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
    layer_order: list[Annotated[int, Field(ge=0)]] | Literal["model"] = []
    """A permutation of the layers, counted from 0. A sub-network of depth n has the first n layers of this order, and
    runs them in the network's own sequence. `"model"` takes the order that `model.sort`
    finds, or that `sorted-ds sort` has written beside `model.init`. Default: the network's own sequence."""

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


class SamplingBase(Section):
    """Which sub-networks a step trains."""

    subnets_per_step: Positive = 4
    """How many sub-networks an optimizer step samples. Each one gets an equal share of the step's rows. The number of
    ranks does not matter."""
    strategy: str = "stratified"
    """How a step samples its sub-networks. `stratified`: one from each cost quantile, so that all are sampled equally
    often. `uniform`: each one at random from the whole space. `sandwich`: the full one, the smallest one, and the rest
    at random. `full_plus`: the full one, and the rest stratified. `full`: the full one alone."""
    full_shares: Positive = 1
    """With `sandwich` and `full_plus`: how many of a step's `subnets_per_step` are the full one, so it trains on that
    share of the rows."""
    subnets_per_share: Positive = 1
    """How many of a step's sub-networks train on the same rows. With 2, a step of 4 sub-networks cuts its rows into two
    shares."""
    hold_steps: Positive = 1
    """For how many steps the sampled sub-networks stay the same. Their rows change in each step."""
    ladder: list[str] = []
    """The names of the sub-networks that are sampled. The others are evaluated and exported as they come out. The
    default is all."""
    cost_power: float = 0.0
    """Samples a sub-network in proportion to this power of its FLOPs: above 0 favours large ones, below 0 small ones.
    The sub-networks that a strategy always trains do not count."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Factors by which these sub-networks are sampled more often, like `{"d4-g2-f256" = 2.0}`. 0 means never."""


class Phase(SamplingBase):
    """Settings that hold from a step on. What a phase does not set is as in `[sampling]`."""

    from_step: Positive
    """The first step of the phase."""


class Sampling(SamplingBase):
    """Which sub-networks a step trains."""

    phases: list[Phase] = []
    """Later phases of the run, each a table `[[sampling.phases]]` with `from_step`, the first step of the phase, and
    the settings of this section that change then, like `strategy = "full"`."""

    @model_validator(mode="after")
    def _require_each_phase_once(self) -> Self:
        starts = [phase.from_step for phase in self.phases]
        if len(set(starts)) < len(starts):
            raise PydanticCustomError("phases", "Input should name each from_step once")
        return self

    @property
    def phases_by_step(self) -> dict[int, SamplingBase]:
        """The complete settings of each later phase, by its first step."""
        base = {key: getattr(self, key) for key in SamplingBase.model_fields}
        return {
            phase.from_step: SamplingBase(
                **base | {key: getattr(phase, key) for key in phase.model_fields_set & {*base}}
            )
            for phase in self.phases
        }


class Loss(Section):
    """What a sub-network learns from, beside the labels."""

    teacher: str = ""
    """Who teaches: `"full"` for the full network itself, or the Hugging Face directory or hub id of another model with
    the same tokenizer. A taught sub-network also minimizes the Kullback-Leibler divergence of its predictions from the
    teacher's on the same rows. The full network teaches from its own training pass where it trains on these rows, and
    from a pass without a gradient elsewhere. The default is no teacher."""
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The weight of that divergence. The loss of the labels has the rest."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The temperature of both predictions in the divergence, which is multiplied by its square."""
    exit_weight: Annotated[float, Field(ge=0)] = 0.0
    """The weight of the loss of each shallower sub-network of the same widths that a pass contains, relative to the
    loss of the sampled one. One pass so trains all depths up to its own. 0 means none. Sums are divided by the sum of
    the weights."""
    exit_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The probability with which a pass trains each of them. Every exit costs one more product with the head, so in a
    small network with a large vocabulary a part of them buys more tokens."""
    layer_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The probability that a pass leaves out the last layer of its sub-network. It falls exponentially towards the
    first layer, which always runs."""


class Batch(Section):
    """How many rows a step has, and how long a row is."""

    step_rows: Positive
    """The number of rows of one optimizer step, over all its sub-networks and all ranks."""
    micro_batch_rows: Positive
    """The largest number of rows of one forward pass on one rank."""
    row_tokens: Positive
    """The number of tokens of a row."""
    isolate: bool = False
    """Whether the documents of a row are isolated from each other: a token attends to its own document alone, and
    positions start again at 0 with each document. Otherwise a document also sees what stands before it in its row."""


class Train(Section):
    """How long a run trains."""

    steps: Positive
    """The number of optimizer steps of the run."""
    time_limit: str = ""
    """The run saves and ends before this time has passed since its start. It is written like Slurm's `--time`: `90`
    (minutes), `1:30:00` or `1-12:00:00` (days first). A Slurm job is then put into the queue again. The default is no
    limit."""
    skip_steps: list[Annotated[int, Field(ge=0)]] = []
    """Steps that are not trained: their rows are left out, and the weights stay as they are. Name a step here if its
    loss is not finite; the error message says its number. The first step is 0."""
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
    decay_steps: Annotated[int, Field(ge=0)] = 0
    """How many steps the fall of the learning rate takes, at the end of the run. Before them it stays at its peak, so a
    run can go on from there with more steps (`checkpoint.branch`). 0 means that it falls from the end of the warm-up
    on."""
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
    keep_steps: list[Positive] = []
    """Steps whose checkpoints are saved and never deleted, for example to branch off from them later."""
    branch: str = ""
    """`RUN_DIR@STEP`: the run starts from that checkpoint of another run with the same model, with its weights, its
    optimizer state and its step number. The data, the batch, the sampling, the learning rate and the number of steps
    may differ. A run that has a checkpoint of its own resumes from that. A relative RUN_DIR starts at the folder of
    the run file."""


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

    extends: str = ""
    """Another run file, whose keys hold where this one has none. Tables are merged key by key. Relative paths in the
    other file start at its own folder."""
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
    loss: Loss = Loss()
    data: Data
    batch: Batch
    train: Train
    optim: Optim = Optim()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    engine: Engine

"""`load(DIR)`: a trained family, whose sub-networks are plain Hugging Face models on one set of weights.

In: a run's directory, the model directory in it, or a hub id. Out: a `TrainedFamily`. Nothing is loaded before it is
used, and then in the stored precision. A sub-network is a view of the full network (view.py), or, read alone, the
ranges of the files that it holds.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sorted_ds.base.errors import UserError, naming, reason_of
from sorted_ds.base.names import CONFIG_JSON
from sorted_ds.data.text.tokenizer import read_tokenizer
from sorted_ds.deploy.generation.choose_draft import AUTO, choose_draft
from sorted_ds.deploy.generation.drafts import draft_of
from sorted_ds.deploy.generation.generate import Options, generate
from sorted_ds.deploy.generation.speculative import Speculation
from sorted_ds.deploy.model_dir import SORTED_JSON, Measured, ModelDir
from sorted_ds.deploy.select import Budgets, parse_amount, select
from sorted_ds.deploy.speed import Setting
from sorted_ds.deploy.view import Cut, keep_owned, view
from sorted_ds.families import family_of
from sorted_ds.nested import Family, sorted_by_cost
from sorted_ds.nested.family import check_space, cuttable
from sorted_ds.nested.hf_weights import CheckpointReader, resolve_source
from sorted_ds.nested.load import generation_config_of, reader_of
from sorted_ds.nested.weights import OWNER_SEPARATOR
from sorted_ds.space import SubNet, SubNetSpace

STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The precisions in which weights may be stored."""
COPY_AGAIN = "Copy the model's files again."
"""What to do about a file of a trained model that cannot be used."""


def load(
    source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> "TrainedFamily":
    """Returns the trained family of a run's directory, of the model directory in it, or of a hub id.

    `dtype`: None keeps the stored precision. Raises: UserError for a directory that has no trained family.
    """
    folder = Path(source)
    return TrainedFamily(ModelDir.find(folder if folder.is_dir() else resolve_source(str(source))), device, dtype)


class TrainedFamily:
    """A trained family. `family["d4-g2-f256"]` is a plain Hugging Face model, and so is `family.full`.

    Several threads can use it. Iteration, `in` and `len` are over the sub-networks of the space, in ascending order of
    parameters. To use another device, name it in `load`: `.to()` on the full network or on a view ends the sharing of
    weights.
    """

    def __init__(self, where: ModelDir, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        """Raises: UserError for files that are damaged, or of another model."""
        self.where, self.device = where, torch.device(device)
        self.contents = where.read()
        self.space: SubNetSpace = self.contents.sub_networks
        self.config = config_of(where)
        stored = stored_dtype(where)
        self.dtype = dtype or stored
        self.architecture = family_in(where, self.config, self.space)
        self._views: dict[SubNet, PreTrainedModel] = {}
        self._full: PreTrainedModel | None = None
        self._making = threading.RLock()

    @property
    def table(self) -> tuple[Measured, ...]:
        """The measured table. Raises: UserError before the first evaluation."""
        return self.where.table()

    @property
    def full(self) -> PreTrainedModel:
        """The full network. It is loaded once.

        Raises: UserError for weights that are damaged, or of another model.
        """
        with self._making:
            if self._full is None:
                full, weights = self.read(self.space.full), self._weights(self.dtype)
                keep_owned(full, {name: weights.whole(name) for name in self._reader.files if OWNER_SEPARATOR in name})
                self._full = full
            return self._full

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model. Raises: UserError if there is none."""
        try:
            return read_tokenizer(str(self.where.model))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.where.model} has no tokenizer that can be read. Copy its files again.") from error

    @cached_property
    def cuttable(self) -> SubNetSpace:
        """All sub-networks that can be cut, in ascending order of parameters: the trained ones, and more.

        The others have a depth between trained ones, or trained widths that were not trained together.
        """
        return sorted_by_cost(cuttable(self.space, self.architecture), self.architecture, self.config)

    @property
    def has_cache(self) -> bool:
        """Whether the models decode with a key/value cache."""
        return self.architecture.kv_elements(self.config, self.space.full) > 0

    def find(self, subnet: SubNet | str) -> SubNet:
        """Returns a sub-network that can be cut, by its name. Raises: UserError, which lists the nearest that can."""
        chosen = SubNet.parse(str(subnet))
        if chosen in self.space or chosen.axes != self.space.axes:
            return self.space[chosen.name]
        if chosen not in self.cuttable:
            names = self.cuttable.nearest(chosen).split(", ")
            nearest = ", ".join(name if name in self else f"{name} (never trained)" for name in names)
            raise UserError(f"{chosen} cannot be cut from this family. Nearest that can: {nearest}.")
        return chosen

    def __getitem__(self, subnet: SubNet | str) -> PreTrainedModel:
        """Returns a sub-network as a view of the full network. It is made once.

        Raises: UserError if it cannot be cut; the message lists the nearest that can.
        """
        chosen = self.find(subnet)
        with self._making:
            if chosen not in self._views:
                self._views[chosen] = view(self.full, chosen, space=self.space)
            return self._views[chosen]

    def read(self, subnet: SubNet | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Returns a sub-network with weights of its own. Only the ranges of the files that it holds are read.

        Raises: UserError if it cannot be cut, or for weights that are damaged, or of another model.
        """
        family, precision = self.architecture, dtype or self.dtype
        hf_class = family.auto_class._model_mapping[type(self.config)]
        cut = Cut(family, hf_class, self.config, self.find(subnet), self.space.layer_order)
        plain = cut.make(self._weights(precision), precision, self.device)
        if generation := generation_config_of(self.where.model):
            plain.generation_config = generation
        return plain

    def best(
        self,
        *,
        max_params: float | str | None = None,
        max_flops: float | str | None = None,
        max_latency_ms: float | None = None,
        max_memory_gib: float | None = None,
        max_loss_gap: float | None = None,
        min_accuracy: float | None = None,
        batch: int = Setting.batch,
        context: int = Setting.context,
    ) -> PreTrainedModel:
        """Returns the sub-network with the lowest measured loss within budgets, as a view.

        `max_params` and `max_flops` (forward, for a token) may be like `"2.5B"` or `1e9`. `max_latency_ms`: for one
        decoded token. `max_memory_gib`: weights and cache of the exported model; a view needs the full network's
        weights. Both at `batch` and `context`. `max_loss_gap`, in nats above the full network's loss, or
        `min_accuracy` select the cheapest instead: in the first of latency, memory, FLOPs and parameters that has a
        budget, or in parameters.

        Raises: UserError when none is within the budget, or the table lacks what is asked for.
        """
        budgets = Budgets(
            max_params=_amount(max_params),
            max_flops=_amount(max_flops),
            max_latency_ms=max_latency_ms,
            max_memory_gib=max_memory_gib,
            max_loss_gap=max_loss_gap,
            min_accuracy=min_accuracy,
            setting=Setting(batch, context),
        )
        return self[select(budgets.table_in(self.where), budgets).subnet]

    def speculation(self, subnet: SubNet | str, draft: SubNet | str, draft_tokens: int | None = None) -> Speculation:
        """Returns a sub-network that generates with a smaller one as its draft: `.generate` is like the model's own.

        `draft_tokens`: how many tokens a draft has; None for a number that follows acceptance. Raises: UserError for a
        draft that is not smaller.
        """
        return Speculation(draft_of(self.full, self.find(subnet), self.find(draft), self.space), draft_tokens)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        subnet: SubNet | str | None = None,
        draft: SubNet | str | None = None,
        draft_tokens: int | None = None,
        chat: bool = False,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> list[str]:
        """Returns the text that a sub-network, by default the full network, writes after each prompt.

        `draft`: a smaller sub-network that proposes tokens, so that the same text needs fewer passes. "auto" tries a
        few of them, and takes the fastest, or none if plain decoding is faster. `chat` takes a prompt as a user's
        message. `streamer` gets the tokens of a single prompt as soon as they are there. `options` are those of
        `generate.Options`: `max_new_tokens`, `temperature`, `top_p`, `top_k`.

        Raises: UserError for an unknown sub-network, a draft that is not smaller, an option out of its range, or a
        prompt that is empty or too long.
        """
        chosen, wanted = self.find(subnet or self.space.full), Options(**options)
        texts = [prompts] if isinstance(prompts, str) else prompts
        model: PreTrainedModel | Speculation
        if draft is None:
            model = self[chosen]
        elif draft == AUTO:
            given = (chosen, self.tokenizer, texts, wanted)
            model = choose_draft(self.full, self.space, *given, draft_tokens=draft_tokens, chat=chat).model
        else:
            model = self.speculation(chosen, draft, draft_tokens)
        found = generate(model, self.tokenizer, texts, wanted, chat=chat, streamer=streamer)
        return [completion.text for completion in found]

    def __iter__(self) -> Iterator[SubNet]:
        return iter(self.space)

    def __len__(self) -> int:
        return len(self.space)

    def __contains__(self, subnet: object) -> bool:
        return str(subnet) in self.contents.space

    def __repr__(self) -> str:
        return f"TrainedFamily({self.where.root}, {self.space.smallest} to {self.space.full}, {len(self)} sub-networks)"

    @cached_property
    def _reader(self) -> CheckpointReader:
        return reader_of(self.architecture, self.config, self.space, self.where.model)

    def _weights(self, dtype: torch.dtype) -> "InFiles":
        return InFiles(self._reader, dtype, self.device)


def stored_dtype(where: ModelDir) -> torch.dtype:
    """Returns the precision of the weights on disk, which the config states. Raises: UserError if it is not known."""
    stated = config_of(where).dtype or torch.float32
    dtype = getattr(torch, stated, None) if isinstance(stated, str) else stated
    if dtype not in STORED_DTYPES:
        raise UserError(f"{where.model / CONFIG_JSON}: dtype {stated!r} is not a precision of weights. {COPY_AGAIN}")
    return dtype


def config_of(where: ModelDir) -> PreTrainedConfig:
    """Returns the config of a trained model. Raises: UserError when transformers refuses it."""
    file = where.model / CONFIG_JSON
    if not file.is_file():
        raise UserError(f"{where.model} has a {SORTED_JSON} but no {CONFIG_JSON}. {COPY_AGAIN}")
    with naming(file, COPY_AGAIN):
        config = AutoConfig.from_pretrained(where.model, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{file} has a quantization_config, but the weights are not quantised. Remove this key.")
    return config


def family_in(where: ModelDir, config: PreTrainedConfig, space: SubNetSpace) -> Family:
    """Returns the family of a trained model.

    Raises: UserError when no model of a known family can be made from the config, or when it does not fit the space.
    """
    try:
        family = family_of(config.model_type)
        with torch.device("meta"):
            family.auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)
        check_space(space, family, config)
    except Exception as error:  # transformers raises many types, down to AssertionError
        raise UserError(f"{where.model / CONFIG_JSON} cannot be used: {reason_of(error)}. {COPY_AGAIN}") from error
    return family


class InFiles:
    """The weights in the files of a full network. A part is read alone."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype, device: torch.device):
        self.reader, self.dtype, self.device = reader, dtype, device

    def __contains__(self, name: str) -> bool:
        return name in self.reader.files

    def whole(self, name: str) -> Tensor:
        """Returns a tensor. Raises: UserError when it holds a number that is not finite."""
        return self._placed(self.reader.whole(name))

    def first(self, name: str, shape: Sequence[int]) -> Tensor:
        """Returns the first part of a tensor along each of its dimensions. Raises: UserError as `whole` does."""
        return self._placed(self.reader.first(name, shape))

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)


def _amount(budget: float | str | None) -> float | None:
    return parse_amount(budget) if isinstance(budget, str) else budget

"""Causal language modelling: the task of predicting the next token in packed rows of text.

In: text, and rows of token ids. Out: the loss in nats, summed over targets, and how often the largest logit is the next
token. A batch holds `input_ids` and `labels`, where `labels[t]` is the token that position t predicts. On disk: the
prepared tokens, and the tokenizer beside an exported model.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.base.names import ACCURACY, LOSS, TRAIN_A_TOKENIZER
from sorted_ds.data.loader import NO_TARGET, Batch, MicroBatch
from sorted_ds.data.mixture import JoinedRows
from sorted_ds.data.rows import PackedRows, Row, cut_of
from sorted_ds.data.text.documents import Reading
from sorted_ds.data.text.mixed import ALONE, MixedText, Text, describe, find_mixed, open_text, texts_of, write_mixed
from sorted_ds.data.text.notes import notes_of
from sorted_ds.data.text.pieces import Piece, pieces_of
from sorted_ds.data.text.prepare import DataSpec, find_prepared, prepare
from sorted_ds.data.text.tokenizer import (
    Vocabulary,
    leads_with_bos,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
    trained_vocabulary,
    vocabulary_of,
)
from sorted_ds.data.text.tokens import TokenizedText
from sorted_ds.nested.family import Family
from sorted_ds.tasks.losses import Parts, Teacher, Terms, attach_loss_head
from sorted_ds.tasks.task import Baseline, Metric, Report, Sums, Totals, mean_of

PROBE_TOKENS = 64
PROBE_RANDOM_ROWS = 3
PROBE_TEXT = (
    "The quick brown fox jumps over the lazy dog, and returns 42 of them:\n"
    "def add(left, right):\n    return left + right  # as expected\n"
    "Numbers 0123456789, (brackets) [and] {braces}; naïve café, λ → 東京.\n"
) * 8
USAGE = """\
from transformers import {auto_class}, {tokenizer_class}

folder = {name!r}
tokenizer = {tokenizer_class}.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""
NOT_AUTOMATIC = "# AutoTokenizer would read the tokenizer as that of the model's family, and give other ids."
SIDES = ("training", "validation")
ISOLATING = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "granite")
"""The families in which position ids that start again isolate documents: a document's logits are the same bits whatever
its neighbours are (tests/tasks/test_isolation.py)."""
ISOLATING_ATTENTION = ("", "sdpa", "eager")
"""The attention implementations of which this was shown; "" is one of the two."""
LARGEST_EXPONENT = 700.0
"""exp of a larger number is not a double precision number."""


def _perplexity(totals: Totals) -> float:
    loss = mean_of(LOSS)(totals)
    return math.exp(loss) if loss < LARGEST_EXPONENT else math.inf


class CausalLM:
    """The task `causal_lm`. `Task` documents the methods."""

    metrics = (
        Metric(LOSS, "loss (nats)", mean_of(LOSS), "{:.4f}".format),
        Metric("perplexity", "perplexity", _perplexity, "{:.2f}".format),
        Metric(ACCURACY, "accuracy", mean_of(ACCURACY), "{:.1%}".format),
    )
    pipeline_tag = "text-generation"

    # Data

    def prepare(self, run: Any, report: Report) -> Text:
        texts = {}
        for name, spec in data_specs(run).items():
            with _naming_source(name):
                texts[name] = self._with_cut(prepare(spec, run.data.cache_dir, run.data.workers, report), run)
        return write_mixed(run.data.cache_dir, texts) if run.data.sources else texts[ALONE]

    def _with_cut(self, text: TokenizedText, run: Any) -> TokenizedText:
        """Returns prepared tokens that say what becomes of conversations in the rows of the run."""
        if text.train_marks is None:
            return text
        rows = {side: _packed(text, run.batch.row_tokens, side, run.batch.isolate) for side in SIDES}
        return replace(text, cut={side: cut_of(each) for side, each in rows.items()})

    def find_prepared(self, run: Any) -> Text:
        texts = {name: find_prepared(spec, run.data.cache_dir) for name, spec in data_specs(run).items()}
        return find_mixed(run.data.cache_dir, texts) if run.data.sources else texts[ALONE]

    def open_prepared(self, folder: Path) -> Text:
        return open_text(folder)

    def check_data(self, run: Any) -> None:
        for name, spec in data_specs(run).items():
            with _naming_source(name):
                spec.reader()
                spec.found()
            if run.data.tokenizer != TRAIN_A_TOKENIZER and not spec.reading.is_chat:
                leads_with_bos(load_tokenizer(run.data.tokenizer), run.data.bos)

    def describe(self, data: Text) -> dict[str, Any]:
        return describe(data)

    def summary(self, data: Text) -> str:
        texts = texts_of(data).values()
        train, validation = (sum(len(text.train) for text in texts), sum(len(text.validation) for text in texts))
        vocab_size = next(iter(texts)).vocab_size
        return f"{train:,} training and {validation:,} validation tokens, vocabulary {vocab_size:,}"

    def notes(self, data: Text) -> list[str]:
        if isinstance(data, MixedText):
            return [f"{name}: {line}" for name, text in data.sources.items() for line in notes_of(text)]
        return notes_of(data)

    def baseline(self, data: Text) -> Baseline:
        texts = texts_of(data).values()
        sizes = [len(text.validation) for text in texts]
        nats = sum(text.unigram_nats * size for text, size in zip(texts, sizes, strict=True)) / sum(sizes)
        return Baseline("unigram model" if len(sizes) == 1 else "unigram model of each source", nats)

    def rows(self, data: Text, row_tokens: int, is_validation: bool, isolate: bool = False) -> PackedRows | JoinedRows:
        side = SIDES[is_validation]
        if isinstance(data, MixedText):
            return JoinedRows(
                {name: _packed(text, row_tokens, side, isolate, name) for name, text in data.sources.items()}
            )
        return _packed(data, row_tokens, side, isolate)

    def collate(self, rows: Sequence[Row], size: int, row_tokens: int) -> MicroBatch:
        """Shapes: input_ids, labels and, if documents are isolated, position_ids [size, row_tokens]."""
        input_ids = torch.zeros(size, row_tokens, dtype=torch.int64)
        labels = torch.full((size, row_tokens), NO_TARGET)
        positions = torch.arange(row_tokens).repeat(size, 1)
        for number, row in enumerate(rows):
            ids = torch.from_numpy(row.ids)
            input_ids[number] = ids[:-1]
            labels[number] = ids[1:].where(torch.from_numpy(row.is_target[1:]), NO_TARGET)
            if row.positions is not None:
                positions[number] = torch.from_numpy(row.positions)
        inputs = {"input_ids": input_ids, "labels": labels}
        if any(row.positions is not None for row in rows):
            inputs["position_ids"] = positions
        return MicroBatch(inputs, num_targets=int((labels != NO_TARGET).sum()), num_rows=len(rows))

    def pieces(self, data: Text, row: Row) -> list[Piece]:
        return pieces_of(row, load_tokenizer(str(_tokenizer_dir(data))))

    # Model

    def config_fields(self, run: Any) -> dict[str, Any]:
        vocabulary = vocabulary_of_run(run)
        return {
            "vocab_size": vocabulary.size,
            "bos_token_id": vocabulary.bos_id,
            "eos_token_id": vocabulary.eos_id,
            "pad_token_id": None,
            "use_cache": True,
        }

    def check_config(self, run: Any, config: PreTrainedConfig) -> None:
        _check_isolation(run, config.model_type)
        size = vocabulary_of_run(run).size
        if size > config.vocab_size and run.model.config:
            raise UserError(
                f"model.config sets vocab_size = {config.vocab_size}, but the tokenizer has {size} tokens. Remove "
                "vocab_size from model.config, because it follows from the tokenizer."
            )
        if size > config.vocab_size:
            raise UserError(
                f"data.tokenizer = {run.data.tokenizer!r} has {size} tokens, but the vocabulary of {run.model.init} "
                f"has {config.vocab_size}. {_tokenizer_advice(run)}"
            )
        longest = getattr(config, "max_position_embeddings", run.batch.row_tokens)
        if run.batch.row_tokens > longest:
            raise UserError(
                f"batch.row_tokens = {run.batch.row_tokens}, but the model's max_position_embeddings is {longest}. "
                f"Set batch.row_tokens to {longest} or less{', or raise the other' if run.model.config else ''}."
            )

    def check_teacher(self, run: Any, source: Path) -> None:
        _check_isolation(run, PreTrainedConfig.get_config_dict(source)[0]["model_type"])
        if run.data.tokenizer == TRAIN_A_TOKENIZER:
            raise UserError(
                f"loss.teacher = {run.loss.teacher!r} has a tokenizer of its own, but data.tokenizer = "
                f"{TRAIN_A_TOKENIZER!r}. Set data.tokenizer = {str(run.loss.teacher)!r}."
            )
        own, other = (load_tokenizer(name).get_vocab() for name in (run.data.tokenizer, str(source)))
        if own != other:
            raise UserError(
                f"loss.teacher = {run.loss.teacher!r} has another tokenizer than data.tokenizer = "
                f"{run.data.tokenizer!r}, so it predicts other tokens. Name a teacher with the same tokenizer."
            )

    def warnings(self, run: Any, config: PreTrainedConfig, generation: GenerationConfig | None) -> list[str]:
        if any(spec.reading.is_chat for spec in data_specs(run).values()):  # its template writes the tokens that end it
            return []
        ends = getattr(generation, "eos_token_id", None)
        ends = config.eos_token_id if ends is None else ends
        own = vocabulary_of_run(run).eos_id
        if ends is None or own in (ends if isinstance(ends, list) else [ends]):
            return []
        return [
            f"each document ends with token {own}, the tokenizer's end-of-text token, but the model's configs say "
            f"{ends}, so a trained model may not stop. Correct eos_token_id in config.json and generation_config.json."
        ]

    def attach(self, model: PreTrainedModel, family: Family) -> None:
        attach_loss_head(model, family)

    def states(self, model: PreTrainedModel, family: Family, batch: Batch) -> Tensor:
        """Shapes: input_ids [B, T] -> [E * B, T, H], where E counts the exits of the pass (nested/exits.py)."""
        return family.hidden_states(model.get_submodule(family.body), batch)

    def sums(self, model: PreTrainedModel, family: Family, states: Tensor, batch: Batch, with_metrics: bool) -> Sums:
        """Units: nats, and correctly predicted tokens, both summed over targets."""
        head, labels = model.get_submodule(family.head), batch["labels"]
        num_targets = (labels != NO_TARGET).sum()
        if not with_metrics:
            return {LOSS: (head(states, labels), num_targets)}
        nll, num_correct = head(states, labels, count_correct=True)
        return {LOSS: (nll, num_targets), ACCURACY: (num_correct, num_targets)}

    def weighted_loss(
        self,
        model: PreTrainedModel,
        family: Family,
        states: Tensor,
        batch: Batch,
        terms: Terms,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Parts]:
        """Units: nats, summed over targets."""
        return model.get_submodule(family.head)(states, batch["labels"], terms=terms, teacher=teacher)

    # Export

    def usage(self, folder: Path, name: str, auto_class: str) -> str:
        own = _tokenizer_of(folder)
        automatic = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        is_right = own(PROBE_TEXT).input_ids == automatic(PROBE_TEXT).input_ids
        tokenizer_class = "AutoTokenizer" if is_right else "PreTrainedTokenizerFast"
        code = USAGE.format(name=name, auto_class=auto_class, tokenizer_class=tokenizer_class)
        return code if is_right else f"{NOT_AUTOMATIC}\n{code}"

    def write_processor(self, data: Text, folder: Path) -> None:
        save_tokenizer(load_tokenizer(str(_tokenizer_dir(data))), folder)

    def copy_processor(self, source: Path, folder: Path) -> None:
        save_tokenizer(_tokenizer_of(source), folder)

    def probe(self, folder: Path, config: PreTrainedConfig) -> Batch:
        """Returns a row of a fixed text, and rows of random ids of the whole vocabulary. Shape [B, T]."""
        tokenizer = _tokenizer_of(folder)
        length = min(PROBE_TOKENS, config.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(config.vocab_size, (1 + PROBE_RANDOM_ROWS, length), generator=generator)
        text = torch.tensor(tokenizer(PROBE_TEXT)["input_ids"][:length])
        if len(text) and text.max() >= config.vocab_size:
            raise UserError(
                f"the tokenizer in {folder} gives the id {int(text.max())}, but the model's vocabulary has "
                f"{config.vocab_size} ids. Put the model's own tokenizer there."
            )
        rows[0, : len(text)] = text
        return {"input_ids": rows}

    def logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Shapes: [B, T] -> [B, T, V]."""
        return model(**batch, use_cache=False).logits


def _check_isolation(run: Any, model_type: str) -> None:
    """Raises: UserError for a model whose documents would see each other although the run isolates them."""
    known = model_type in ISOLATING and run.model.attention in ISOLATING_ATTENTION
    if run.batch.isolate and not known:
        with_attention = f" with {run.model.attention} attention" * bool(run.model.attention)
        raise UserError(
            f"batch.isolate = true was not shown to isolate documents in {model_type}{with_attention}. Remove "
            f"batch.isolate, or take one of {', '.join(ISOLATING)} with sdpa or eager attention."
        )


def _tokenizer_advice(run: Any) -> str:
    """Returns which of tokenizer and model to correct, if the tokenizer has more tokens than the model."""
    if run.data.tokenizer == run.model.init:
        return (
            "Its own tokenizer does not belong to its weights: set data.tokenizer to the right one, or add rows to the "
            "embedding with transformers' resize_token_embeddings."
        )
    return "Remove data.tokenizer to use the checkpoint's own tokenizer."


def _tokenizer_dir(data: Text) -> Path:
    return next(iter(texts_of(data).values())).tokenizer_dir


def _packed(text: TokenizedText, row_tokens: int, side: str, isolate: bool, name: str = ALONE) -> PackedRows:
    tokens, marks = {
        "training": (text.train, text.train_marks),
        "validation": (text.validation, text.validation_marks),
    }[side]
    shown = f"{name} {side}" if name else side
    return PackedRows(tokens, row_tokens, shown, marks, text.eos_id, isolate)


def data_specs(run: Any) -> dict[str, DataSpec]:
    """Returns the settings that the prepared tokens depend on, by the name of the source, or `ALONE`.

    Raises: UserError for a mixture whose tokenizer would be trained.
    """
    if run.data.sources and run.data.tokenizer == TRAIN_A_TOKENIZER:
        raise UserError(
            'data.sources need a tokenizer that exists, but data.tokenizer is "train". Prepare one source alone with '
            "`sorted-ds prepare`, and name the folder `tokenizer` that this leaves in data.cache_dir."
        )
    if run.data.sources:
        return {source.name: _spec(run, source, is_alone=False) for source in run.data.sources}
    return {ALONE: _spec(run, run.data, is_alone=True)}


@contextmanager
def _naming_source(name: str) -> Iterator[None]:
    """Puts the name of a source of a mixture before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        where = f"data.sources, {name}: "
        raise UserError(where + str(error)) from error.__cause__


def _spec(run: Any, files: Any, is_alone: bool) -> DataSpec:
    reading = Reading(files.form, tuple(files.fields), files.skip_bad)
    return DataSpec(
        text=tuple(files.text),
        files=tuple(files.files),
        suffixes=tuple(files.suffixes),
        tokenizer=run.data.tokenizer,
        vocab_size=run.data.vocab_size,
        validation_fraction=run.data.validation_fraction,
        seed=run.seed,
        bos=run.data.bos if is_alone or not reading.is_chat else None,
        reading=reading,
        subset=files.subset,
        split=files.split,
    )


def vocabulary_of_run(run: Any) -> Vocabulary:
    """Returns the vocabulary of the run's tokenizer, also if the tokenizer was not trained yet."""
    if run.data.tokenizer == TRAIN_A_TOKENIZER:
        return trained_vocabulary(run.data.vocab_size)
    return vocabulary_of(load_tokenizer(run.data.tokenizer))


def _tokenizer_of(folder: Path):
    """Returns the folder's tokenizer. Raises: UserError when transformers cannot read one there."""
    try:
        return read_tokenizer(str(folder))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} has no tokenizer ({reason}). Put the tokenizer's files there.") from error

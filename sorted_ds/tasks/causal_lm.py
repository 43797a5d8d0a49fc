"""Causal language modelling: the task of predicting the next token in packed rows of text.

In: text, and rows of token ids. Out: the loss in nats, summed over targets, and how often the largest logit is the next
token. A batch holds `input_ids` and `labels`, where `labels[t]` is the token that position t predicts. On disk: the
prepared tokens, and the tokenizer beside an exported model.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.data.loader import NO_TARGET, Batch, MicroBatch
from sorted_ds.data.rows import PackedRows
from sorted_ds.data.text.content_key import TOKENIZER_FILES
from sorted_ds.data.text.prepare import TRAIN_A_TOKENIZER, DataSpec, find_prepared, prepare
from sorted_ds.data.text.sources import find_files
from sorted_ds.data.text.tokenizer import (
    Vocabulary,
    load_tokenizer,
    save_tokenizer,
    trained_vocabulary,
    vocabulary_of,
)
from sorted_ds.data.text.tokens import TokenizedText, open_tokens
from sorted_ds.nested.family import Family
from sorted_ds.tasks.losses import LossHead, attach_loss_head
from sorted_ds.tasks.task import LOSS, Baseline, Metric, Report, Sums, Totals, mean_of

COPIED_FILES = (*TOKENIZER_FILES, "chat_template.jinja")
PROBE_TOKENS = 64
PROBE_RANDOM_ROWS = 3
PROBE_TEXT = (
    "The quick brown fox jumps over the lazy dog, and returns 42 of them:\n"
    "def add(left, right):\n    return left + right  # as expected\n"
    "Numbers 0123456789, (brackets) [and] {braces}; naïve café, λ → 東京.\n"
) * 8
ACCURACY = "accuracy"
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

    # Data

    def prepare(self, run: Any, report: Report) -> TokenizedText:
        tokens = prepare(data_spec(run), run.data.cache_dir, run.data.workers, report)
        for is_validation in (False, True):
            self.rows(tokens, run.batch.row_tokens, is_validation)
        return tokens

    def find_prepared(self, run: Any) -> TokenizedText:
        return find_prepared(data_spec(run), run.data.cache_dir)

    def open_prepared(self, folder: Path) -> TokenizedText:
        return open_tokens(folder)

    def check_data(self, run: Any) -> None:
        find_files(run.data.text, run.data.jsonl, run.data.suffixes)

    def describe(self, data: TokenizedText) -> dict[str, Any]:
        return {
            "tokens_dir": str(data.folder),
            "tokenizer_dir": str(data.tokenizer_dir),
            "vocab_size": data.vocab_size,
            "train_tokens": len(data.train),
            "validation_tokens": len(data.validation),
            "unigram_nats": data.unigram_nats,
        }

    def summary(self, data: TokenizedText) -> str:
        train, validation = len(data.train), len(data.validation)
        return f"{train:,} training and {validation:,} validation tokens, vocabulary {data.vocab_size:,}"

    def baseline(self, data: TokenizedText) -> Baseline:
        return Baseline("unigram model", data.unigram_nats)

    def rows(self, data: TokenizedText, row_tokens: int, is_validation: bool) -> PackedRows:
        if is_validation:
            return PackedRows(data.validation, row_tokens, "validation")
        return PackedRows(data.train, row_tokens)

    def collate(self, rows: Sequence[np.ndarray], size: int, row_tokens: int) -> MicroBatch:
        """Shapes: input_ids, labels [size, row_tokens]."""
        input_ids = torch.zeros(size, row_tokens, dtype=torch.int64)
        labels = torch.full((size, row_tokens), NO_TARGET)
        for number, ids in enumerate(rows):
            row = torch.from_numpy(ids)
            input_ids[number], labels[number] = row[:-1], row[1:]
        inputs = {"input_ids": input_ids, "labels": labels}
        return MicroBatch(inputs, num_targets=len(rows) * row_tokens, num_rows=len(rows))

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
        size = vocabulary_of_run(run).size
        if size > config.vocab_size and run.model.config:
            raise UserError(
                f"model.config sets vocab_size = {config.vocab_size}, but the tokenizer has {size} tokens. Remove "
                "vocab_size from model.config, because it follows from the tokenizer."
            )
        if size > config.vocab_size:
            raise UserError(
                f"data.tokenizer = {run.data.tokenizer!r} has {size} tokens, but the vocabulary of {run.model.init} "
                f"has {config.vocab_size}. Remove data.tokenizer to use the checkpoint's own tokenizer."
            )
        longest = getattr(config, "max_position_embeddings", run.batch.row_tokens)
        if run.batch.row_tokens > longest:
            raise UserError(
                f"batch.row_tokens = {run.batch.row_tokens}, but the model's max_position_embeddings is {longest}. "
                f"Raise max_position_embeddings in model.config, or set batch.row_tokens to {longest} or less."
            )

    def attach(self, model: PreTrainedModel, family: Family) -> None:
        attach_loss_head(model, family)

    def sums(self, model: PreTrainedModel, family: Family, batch: Batch, with_metrics: bool) -> Sums:
        """Units: nats, and correctly predicted tokens, both summed over targets."""
        head, labels = model.get_submodule(family.head), batch["labels"]
        assert isinstance(head, LossHead)
        hidden = family.hidden_states(model.get_submodule(family.body), batch)
        num_targets = (labels != NO_TARGET).sum()
        if not with_metrics:
            return {LOSS: (head(hidden, labels), num_targets)}
        nll, num_correct = head(hidden, labels, count_correct=True)
        return {LOSS: (nll, num_targets), ACCURACY: (num_correct, num_targets)}

    # Export

    def write_processor(self, data: TokenizedText, folder: Path) -> None:
        save_tokenizer(load_tokenizer(str(data.tokenizer_dir)), folder)

    def copy_processor(self, source: Path, folder: Path) -> None:
        for file in COPIED_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)

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


def data_spec(run: Any) -> DataSpec:
    """Returns the settings that the prepared tokens depend on."""
    data = run.data
    return DataSpec(
        text=tuple(data.text),
        jsonl=tuple(data.jsonl),
        suffixes=tuple(data.suffixes),
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        validation_fraction=data.validation_fraction,
        seed=run.seed,
    )


def vocabulary_of_run(run: Any) -> Vocabulary:
    """Returns the vocabulary of the run's tokenizer, also if the tokenizer was not trained yet."""
    if run.data.tokenizer == TRAIN_A_TOKENIZER:
        return trained_vocabulary(run.data.vocab_size)
    return vocabulary_of(load_tokenizer(run.data.tokenizer))


def _tokenizer_of(folder: Path):
    """Returns the folder's tokenizer. Raises: UserError when transformers cannot read one there."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} has no tokenizer ({reason}). Put the tokenizer's files there.") from error

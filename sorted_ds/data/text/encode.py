"""Encodes documents into token files, in worker processes.

In: documents in order, each with its side, and a tokenizer.json. On disk: train.bin and validation.bin, flat
little-endian unsigned integers; the end-of-text token follows each document. The bytes do not depend on the number of
workers. A worker imports this module alone, neither transformers nor torch.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sorted_ds.base.errors import UserError

BATCH_CHARACTERS = 2**20
"""Size of the text that a worker gets at a time: about half a second of work. A longer document is a batch alone."""
BATCHES_PER_WORKER = 2
"""Number of batches that are read ahead, so that no worker waits. More would cost memory."""

TRAIN_FILE, VALIDATION_FILE = "train.bin", "validation.bin"

Batch = list[tuple[str, bool]]
"""Documents, each with whether it is for validation."""
OnProgress = Callable[[int, int], None]
"""Is called with the number of characters that are encoded, and the number of all characters."""


@dataclass(frozen=True)
class Encoding:
    """How documents become bytes. Each worker gets a copy."""

    tokenizer_file: Path
    eos_id: int
    dtype: str


def token_dtype(vocab_size: int) -> str:
    """Returns the smallest type that holds every id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, without added tokens; "</s>" in a text is text. Changes `tokenizer`."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return [encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def write_tokens(
    documents: Iterable[tuple[str, bool]],
    encoding: Encoding,
    folder: Path,
    workers: int,
    num_characters: int,
    on_progress: OnProgress,
) -> None:
    """Writes the two token files. The memory is that of a few batches for each worker, for a text of any size.

    Raises: UserError when a worker is killed; OSError.
    """
    done = 0
    with (folder / TRAIN_FILE).open("wb") as train, (folder / VALIDATION_FILE).open("wb") as validation:
        for num_encoded, train_bytes, validation_bytes in _encode_all(_batches(documents), encoding, workers):
            train.write(train_bytes)
            validation.write(validation_bytes)
            done += num_encoded
            on_progress(done, num_characters)


def _batches(documents: Iterable[tuple[str, bool]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for text, is_validation in documents:
        batch.append((text, is_validation))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(batches: Iterator[Batch], encoding: Encoding, workers: int) -> Iterator[tuple[int, bytes, bytes]]:
    if workers == 1:
        yield from map(_make_encoder(encoding), batches)
        return
    # The executor notices that a worker was killed. multiprocessing.Pool would wait for its result for ever.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoding,))
    try:
        yield from _in_order(pool, batches, BATCHES_PER_WORKER * workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of data.workers = {workers} processes was killed while it tokenized, most likely because memory ran "
            "out. Set fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterator[Batch], most_waiting: int
) -> Iterator[tuple[int, bytes, bytes]]:
    waiting: deque[Future[tuple[int, bytes, bytes]]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_encode_in_worker, batch))
        if len(waiting) >= most_waiting:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _make_encoder(encoding: Encoding) -> Callable[[Batch], tuple[int, bytes, bytes]]:
    return partial(_encode_batch, Tokenizer.from_file(str(encoding.tokenizer_file)), encoding)


def _encode_batch(tokenizer: Tokenizer, encoding: Encoding, batch: Batch) -> tuple[int, bytes, bytes]:
    """Returns the number of characters, and the bytes of the training and of the validation documents."""
    sides: tuple[list[int], list[int]] = ([], [])
    encoded = encode_texts(tokenizer, [text for text, _ in batch])
    for (_, is_validation), ids in zip(batch, encoded, strict=True):
        sides[is_validation].extend([*ids, encoding.eos_id])
    train, validation = (np.array(side, dtype=encoding.dtype).tobytes() for side in sides)
    return sum(len(text) for text, _ in batch), train, validation


_worker_encode: Callable[[Batch], tuple[int, bytes, bytes]]


def _start_worker(encoding: Encoding) -> None:
    global _worker_encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes are the parallelism.
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encode = _make_encoder(encoding)


def _exit_with_parent() -> None:
    """Ends this worker when its parent has ended. A killed parent cannot stop workers that wait for a batch."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: Batch) -> tuple[int, bytes, bytes]:
    return _worker_encode(batch)

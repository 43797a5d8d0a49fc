"""Encodes documents into token files, in worker processes.

In: documents in order, each with its side, and a tokenizer.json. On disk: train.bin and validation.bin, flat
little-endian unsigned integers; the end-of-text token follows each document, and the beginning-of-text token leads it
if the settings say so. Conversations have neither, because their template writes both; for them train_marks.bin and
validation_marks.bin hold a byte for each token (rows.py). The bytes do not depend on the number of workers. A worker
gets a batch of documents, or a part of a long text (`parts.py`). It imports neither transformers nor torch.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sorted_ds.base.errors import UserError
from sorted_ds.data.rows import BEGINS, TARGET
from sorted_ds.data.text.document import Document
from sorted_ds.data.text.long_documents import Joiner, Part, PartTokens, cut

BATCH_CHARACTERS = 2**20
"""Size of the text that a worker gets at a time: about half a second of work, for which a tokenizer takes 100 to 200
times the memory of the text. A longer text is cut into parts of this size. A longer conversation is one batch."""
TASKS_PER_WORKER = 2
"""Number of batches and parts that are read ahead, so that no worker waits. More would cost memory."""

TRAIN_FILE, VALIDATION_FILE = "train.bin", "validation.bin"
TRAIN_MARKS, VALIDATION_MARKS = "train_marks.bin", "validation_marks.bin"

OnProgress = Callable[[int, int], None]
"""Is called with the number of characters that are encoded, and the number of all characters."""


@dataclass(frozen=True)
class Batch:
    """Documents that a worker encodes together."""

    documents: list[tuple[Document, bool]]
    """The documents, each with whether it is for validation."""


@dataclass(frozen=True)
class BatchTokens:
    """What a worker gives back for a batch."""

    num_characters: int
    sides: tuple[bytes, bytes]
    """The bytes of the training and of the validation documents."""
    marks: tuple[bytes, bytes] = (b"", b"")
    """The marks of both; empty for texts."""


Task = Batch | Part
Encoded = BatchTokens | PartTokens


@dataclass(frozen=True)
class Encoding:
    """How documents become bytes. Each worker gets a copy."""

    tokenizer_file: Path
    bos_id: int | None
    """The token before each document; None for none."""
    eos_id: int
    """The token after each document, except a conversation."""
    dtype: str
    is_chat: bool = False
    """Whether the documents are conversations, in which special tokens are not text, and answers are marked."""


def token_dtype(vocab_size: int) -> str:
    """Returns the smallest type that holds every id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], dtype: str = "<u4") -> list[np.ndarray]:
    """Returns the ids of each text, without added tokens; "</s>" in a text is text. Changes `tokenizer`.

    A text always has the same ids, also if the tokenizer drops merges at random when it is called.
    """
    _encode_all_as_text(tokenizer)
    return [np.array(encoded.ids, dtype) for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encode_part(tokenizer: Tokenizer, part: Part, encoding: Encoding) -> PartTokens:
    """Returns the tokens of a part as `encode_texts` gives them, and the document's first and last. As costly."""
    _encode_all_as_text(tokenizer)
    (encoded,) = tokenizer.encode_batch([part.text], add_special_tokens=False)
    begins, ends = part.span.start == 0 and encoding.bos_id is not None, part.span.is_last
    ids = [*[encoding.bos_id] * begins, *encoded.ids, *[encoding.eos_id] * ends]
    starts = [*[0] * begins, *(part.text_start + start for start, _ in encoded.offsets), *[part.span.stop] * ends]
    return PartTokens(part.span, np.array(ids, encoding.dtype), np.array(starts, np.int64))


def has_dropout(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer drops merges at random when it is called. Only BPE can, by tokenizer.json."""
    return bool(getattr(tokenizer.model, "dropout", None))


def _encode_all_as_text(tokenizer: Tokenizer) -> None:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if has_dropout(tokenizer):
        tokenizer.model.dropout = None


def encode_conversations(
    tokenizer: Tokenizer, documents: Sequence[Document], dtype: str = "<u4"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the ids and the marks of each conversation. Changes `tokenizer`.

    The special tokens that the template wrote are encoded as such. A token is learned if one of its characters belongs
    to an answer, as `apply_chat_template(return_assistant_tokens_mask=True)` has it. Shapes: [tokens] both.
    """
    _encode_all_as_text(tokenizer)
    tokenizer.encode_special_tokens = False
    encoded = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [
        (np.array(each.ids, dtype), _marks(each.offsets, document))
        for each, document in zip(encoded, documents, strict=True)
    ]


def _marks(offsets: Sequence[tuple[int, int]], document: Document) -> np.ndarray:
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    marks = np.zeros(len(starts), np.uint8)
    for first, stop in document.answers or ():
        marks[(starts < stop) & (ends > first)] = TARGET
    marks[:1] |= BEGINS
    return marks


def write_tokens(
    documents: Iterable[tuple[Document, bool]],
    encoding: Encoding,
    folder: Path,
    workers: int,
    num_characters: int,
    on_progress: OnProgress,
) -> None:
    """Writes the two token files, and their marks for conversations.

    The memory is that of two batches or parts for each worker, and of the longest document as text. Its tokens are
    written part by part.

    Raises: UserError when a worker is killed; OSError.
    """
    done = 0
    joiner = Joiner()
    with ExitStack() as opened:
        files = [opened.enter_context((folder / name).open("wb")) for name in (TRAIN_FILE, VALIDATION_FILE)]
        names = (TRAIN_MARKS, VALIDATION_MARKS) if encoding.is_chat else ()
        marks = [opened.enter_context((folder / name).open("wb")) for name in names]
        for encoded in _encode_all(_tasks(documents), encoding, workers):
            if isinstance(encoded, PartTokens):
                files[encoded.span.is_validation].write(joiner.add(encoded).tobytes())
                done += encoded.span.num_characters
            else:
                for file, contents in zip([*files, *marks], [*encoded.sides, *encoded.marks], strict=False):
                    file.write(contents)
                done += encoded.num_characters
            on_progress(done, num_characters)


def _tasks(documents: Iterable[tuple[Document, bool]]) -> Iterator[Task]:
    """Yields all documents in order, in batches or parts of at most `BATCH_CHARACTERS` without the overlap."""
    batch: list[tuple[Document, bool]] = []
    size = 0
    for document, is_validation in documents:
        length = len(document.text)
        if batch and size + length > BATCH_CHARACTERS:
            yield Batch(batch)
            batch, size = [], 0
        if length > BATCH_CHARACTERS and document.answers is None:
            yield from cut(document.text, is_validation, BATCH_CHARACTERS)
        else:
            batch.append((document, is_validation))
            size += length
    if batch:
        yield Batch(batch)


def _encode_all(tasks: Iterator[Task], encoding: Encoding, workers: int) -> Iterator[Encoded]:
    if workers == 1:
        yield from map(_make_encoder(encoding), tasks)
        return
    # The executor notices that a worker was killed. multiprocessing.Pool would wait for its result for ever.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoding,))
    try:
        yield from _in_order(pool, tasks, TASKS_PER_WORKER * workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of data.workers = {workers} processes was killed while it tokenized, most likely because memory ran "
            "out. Set fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, tasks: Iterator[Task], most_waiting: int) -> Iterator[Encoded]:
    waiting: deque[Future[Encoded]] = deque()
    for task in tasks:
        waiting.append(pool.submit(_encode_in_worker, task))
        if len(waiting) >= most_waiting:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _make_encoder(encoding: Encoding) -> Callable[[Task], Encoded]:
    return partial(_encode_task, Tokenizer.from_file(str(encoding.tokenizer_file)), encoding)


def _encode_task(tokenizer: Tokenizer, encoding: Encoding, task: Task) -> Encoded:
    if isinstance(task, Part):
        return encode_part(tokenizer, task, encoding)
    return (_encode_chat if encoding.is_chat else _encode_batch)(tokenizer, encoding, task.documents)


def _encode_chat(tokenizer: Tokenizer, encoding: Encoding, documents: list[tuple[Document, bool]]) -> BatchTokens:
    tokens: tuple[list[bytes], list[bytes]] = ([], [])
    marks: tuple[list[bytes], list[bytes]] = ([], [])
    encoded = encode_conversations(tokenizer, [document for document, _ in documents], encoding.dtype)
    for (_, is_validation), (ids, own) in zip(documents, encoded, strict=True):
        tokens[is_validation].append(ids.tobytes())
        marks[is_validation].append(own.tobytes())
    size = sum(len(document.text) for document, _ in documents)
    return BatchTokens(size, (b"".join(tokens[0]), b"".join(tokens[1])), (b"".join(marks[0]), b"".join(marks[1])))


def _encode_batch(tokenizer: Tokenizer, encoding: Encoding, documents: list[tuple[Document, bool]]) -> BatchTokens:
    beginning = b"" if encoding.bos_id is None else np.array(encoding.bos_id, encoding.dtype).tobytes()
    end = np.array(encoding.eos_id, encoding.dtype).tobytes()
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    encoded = encode_texts(tokenizer, [document.text for document, _ in documents], encoding.dtype)
    for (_, is_validation), ids in zip(documents, encoded, strict=True):
        sides[is_validation].extend((beginning, ids.tobytes(), end))
    return BatchTokens(sum(len(document.text) for document, _ in documents), (b"".join(sides[0]), b"".join(sides[1])))


_worker_encode: Callable[[Task], Encoded]


def _start_worker(encoding: Encoding) -> None:
    global _worker_encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes are the parallelism.
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encode = _make_encoder(encoding)


def _exit_with_parent() -> None:
    """Ends this worker when its parent has ended. A killed parent cannot stop workers that wait for a task."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(task: Task) -> Encoded:
    return _worker_encode(task)

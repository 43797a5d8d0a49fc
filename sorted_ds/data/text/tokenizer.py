"""The tokenizer: loaded from a directory or the hub, or trained on the run's own text.

In: a name, or training documents. Out: a fast Hugging Face tokenizer, and its `Vocabulary`. On disk, for a trained one:
sentencepiece.model, and an ordinary Hugging Face tokenizer that gives the same ids.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.encode import encode_texts

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
SPACE = "▁"
"""SentencePiece's sign for a space. If this character occurs in the text, it is decoded as a space."""
TRAINING_CHARACTERS = 2**25
"""Size of the text that trains a tokenizer: 3 seconds and under 1 GiB. More text hardly changes the pieces."""
LINE_CHARACTERS = 2**12
"""Longer lines are cut for training, because SentencePiece skips sentences over `max_sentence_length`."""
CHARACTER_COVERAGE = 0.9995
"""SentencePiece's default. Rarer characters are encoded as bytes, so that they do not fill the vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """What a model has to know about its tokenizer."""

    size: int
    bos_id: int | None
    eos_id: int


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Returns the vocabulary of a tokenizer, with its added tokens."""
    return Vocabulary(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)


def trained_vocabulary(size: int) -> Vocabulary:
    """Returns the vocabulary that `train_tokenizer` will give, before the training."""
    return Vocabulary(size, BOS_ID, EOS_ID)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Returns a fast tokenizer from a local directory or a hub id.

    Raises: UserError when it cannot be loaded, is not fast, has no end-of-text token, or has gaps in its ids.
    """
    is_local = Path(name_or_path).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=is_local, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises plain `Exception` for a damaged file.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise _refusal(name_or_path, f"cannot be loaded ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refusal(name_or_path, "has no tokenizer.json, from which a fast tokenizer is read")
    if tokenizer.eos_token_id is None:
        raise _refusal(name_or_path, "has no end-of-text token, which separates the documents")
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokenizer):
        raise _refusal(name_or_path, f"has ids up to {highest} for {len(tokenizer)} tokens")
    return tokenizer


def _refusal(name: str, reason: str) -> UserError:
    return UserError(f'data.tokenizer: {name!r} {reason}. Name a directory, a hub id, or "train".')


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, without added tokens; "</s>" in a text is text. Leaves `tokenizer` unchanged."""
    return encode_texts(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), texts)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains SentencePiece BPE on the texts; writes sentencepiece.model and a Hugging Face tokenizer to `folder`.

    The same texts give the same bytes. Decoding gives back any text that does not contain `SPACE`.

    Raises: UserError when the text has too few or too many different pieces for `vocab_size`; OSError.
    """
    model = _train(_lines(texts), vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.model").write_bytes(model)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_from_sentencepiece(model),
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(fast, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Calls `save_pretrained`. Raises: OSError; for a full disk the tokenizers library raises a plain `Exception`."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise OSError(f"{folder}: {error}") from error


def training_excerpts(texts: Iterable[str], num_characters: int) -> Iterator[str]:
    """Yields the beginning of each text: of all texts the same share, at most `TRAINING_CHARACTERS` together.

    `num_characters` is the size of all texts.
    """
    share = min(1.0, TRAINING_CHARACTERS / num_characters)
    return (text[: max(1, round(share * len(text)))] for text in texts)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from (line[k : k + LINE_CHARACTERS] for k in range(0, len(line), LINE_CHARACTERS))


def _train(lines: Iterator[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # Indentation becomes one or two tokens.
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            character_coverage=CHARACTER_COVERAGE,
            max_sentence_length=4 * LINE_CHARACTERS,
            num_threads=1,  # The number is written into the model, and more threads are no faster.
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _vocabulary_error(vocab_size, str(error)) from error
    return model.getvalue()


def _vocabulary_error(vocab_size: int, message: str) -> UserError:
    if found := re.search(r"Vocabulary size too high .* a value <= (\d+)", message):
        most = found[1]
        return UserError(
            f"data.vocab_size = {vocab_size} is too large: the training text gives {most} pieces. Set {most} or less."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        least = found[1]
        return UserError(
            f"data.vocab_size = {vocab_size} is too small: the characters of the training text and the fixed pieces "
            f"need {least}. Set {least} or more."
        )
    return UserError(f"data.vocab_size = {vocab_size}: SentencePiece could not train on the text ({message.strip()}).")


def _from_sentencepiece(model: bytes) -> Tokenizer:
    trained = SentencePieceProcessor(model_proto=model)
    vocabulary = {trained.id_to_piece(number): number for number in range(len(trained))}
    mergeable = [
        piece
        for piece, number in vocabulary.items()
        if not (trained.is_unknown(number) or trained.is_control(number) or trained.is_byte(number))
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(mergeable), unk_token=UNK, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    # Bytes are decoded first: if the training text had no space, a space is encoded as the bytes of its sign.
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(SPACE, " ")])
    return tokenizer


def _merges(mergeable: list[str]) -> list[tuple[str, str]]:
    """Returns every pair of pieces that makes a piece, in SentencePiece's order. `mergeable` are the pieces by id.

    SentencePiece joins the two neighbours that make the piece with the lowest id, the leftmost two if several do. Here
    each pair has a rank of its own. Several pairs can make the same piece; the pair with the longest left part comes
    first, which is the leftmost pair where pairs overlap ("==" "=" "=="). We found no text where this order changes the
    ids: neither 31 MB of Python nor 30,000 random strings of 2-3 different characters with 60 vocabularies.
    """
    known = set(mergeable)
    return [
        (piece[:k], piece[k:])
        for piece in mergeable
        for k in range(len(piece) - 1, 0, -1)
        if piece[:k] in known and piece[k:] in known
    ]

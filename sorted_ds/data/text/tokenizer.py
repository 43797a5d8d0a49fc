"""The tokenizer: loaded from a directory or the hub, or trained on the run's own text.

In: a name, or training documents. On disk, of a trained one: sentencepiece.model and an ordinary Hugging Face
tokenizer beside it, which gives the same ids. Out: a fast Hugging Face tokenizer, and its `Vocabulary`.
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
"""SentencePiece's sign for a space. It is no other character's: one that stands in the text is read back as a space."""
TRAINING_CHARACTERS = 2**25
"""Of text, for training a tokenizer: 3 seconds and under 1 GiB. More hardly changes the pieces."""
LINE_CHARACTERS = 2**12
"""Longer lines are cut for training: SentencePiece leaves out a sentence that is longer than it is told."""
CHARACTER_COVERAGE = 0.9995
"""SentencePiece's default: rarer characters are left to the bytes, so that exotic ones do not fill the vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """What a model has to know of its tokenizer."""

    size: int
    bos_id: int | None
    eos_id: int


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """The vocabulary of a tokenizer, added tokens included."""
    return Vocabulary(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)


def trained_vocabulary(size: int) -> Vocabulary:
    """The vocabulary that `train_tokenizer` will give, known before it was trained."""
    return Vocabulary(size, BOS_ID, EOS_ID)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a local directory or a hub id.

    Raises: UserError when it cannot be had or read, is not fast, has no end-of-text token, or has gaps in its ids.
    """
    is_local = Path(name_or_path).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=is_local, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises plain `Exception` for a damaged file.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise _refused(name_or_path, f"cannot be loaded ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refused(name_or_path, "has no tokenizer.json, which a fast tokenizer is read from")
    if tokenizer.eos_token_id is None:
        raise _refused(name_or_path, "has no end-of-text token, which separates the documents")
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokenizer):
        raise _refused(name_or_path, f"has ids up to {highest} for {len(tokenizer)} tokens")
    return tokenizer


def _refused(name: str, reason: str) -> UserError:
    return UserError(f'data.tokenizer: {name!r} {reason}. Name a directory, a hub id, or "train".')


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, of any length, without added tokens. "</s>" in a text is text, not the end."""
    return encode_texts(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), texts)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains SentencePiece BPE on the texts, and writes it to `folder` as sentencepiece.model and for Hugging Face.

    The same texts give the same bytes. Decoding gives back any text but for `SPACE`.

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
    """`save_pretrained`, with an OSError for what the tokenizers library raises as plain `Exception`: a full disk."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise OSError(f"{folder}: {error}") from error


def beginnings(texts: Iterable[str], num_characters: int) -> Iterator[str]:
    """An equal share of each text, from its beginning; of texts of `num_characters` in all, enough for training."""
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
            allow_whitespace_only_pieces=True,  # Runs of spaces: indentation is a token or two.
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            character_coverage=CHARACTER_COVERAGE,
            max_sentence_length=4 * LINE_CHARACTERS,
            num_threads=1,  # It is written into the model, and more are no faster.
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
            f"data.vocab_size = {vocab_size} is too small: the training text's characters and the fixed pieces are "
            f"{least}. Set {least} or more."
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
    # Bytes first: where the training text had no space, a space is encoded as the bytes of its sign.
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(SPACE, " ")])
    return tokenizer


def _merges(mergeable: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece joins them. `mergeable`: by ids.

    SentencePiece joins the two neighbours that make the piece of the lowest id, and of equal ones the leftmost; here
    each pair has a rank of its own. Of the pairs that make the same piece the one with the longest left part is first:
    the leftmost where they overlap in a run ("==" "=" "=="). No text is known where it matters: 31 MB of Python, and
    30,000 random strings of 2-3 characters with 60 vocabularies, gave the same ids in whatever order.
    """
    known = set(mergeable)
    return [
        (piece[:k], piece[k:])
        for piece in mergeable
        for k in range(len(piece) - 1, 0, -1)
        if piece[:k] in known and piece[k:] in known
    ]

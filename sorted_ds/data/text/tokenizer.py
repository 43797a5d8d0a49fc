"""The tokenizer: loaded from a directory or the hub, or trained on the run's own text.

In: a name, or training documents. Out: a fast Hugging Face tokenizer, and its `Vocabulary`. On disk, for a trained one:
sentencepiece.model, and an ordinary Hugging Face tokenizer that gives the same ids.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.content_key import hash_file
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

OTHERS = 'Name a directory, a hub id, or "train".'
REPAIR = "Correct or replace the tokenizer's files in that directory, or name another tokenizer in data.tokenizer."
"""The advice for a tokenizer that cannot be used, and for a directory whose files cannot be read."""

HASHED_FIRST = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""The files that version 0.1 hashed, in its order. Others follow, so that its prepared tokens are found again."""


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
    try:
        tokenizer = read_tokenizer(name_or_path)
    except Exception as error:  # The tokenizers library raises plain `Exception` for a damaged file.
        advice = REPAIR if Path(name_or_path).is_dir() else OTHERS
        raise _refusal(name_or_path, f"cannot be loaded ({_reason_of(error)})", advice) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refusal(name_or_path, "has no tokenizer.json, from which a fast tokenizer is read")
    if tokenizer.eos_token_id is None:
        raise _refusal(name_or_path, "has no end-of-text token, which separates the documents")
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokenizer):
        raise _refusal(name_or_path, f"has ids up to {highest} for {len(tokenizer)} tokens")
    return tokenizer


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Returns whether the tokenizer itself puts its beginning-of-text token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def leads_with_bos(tokenizer: PreTrainedTokenizerFast, bos: bool | None) -> bool:
    """Returns whether the beginning-of-text token leads each document. `bos` is `data.bos`; None for the habit.

    Raises: UserError when the tokenizer has no such token.
    """
    if bos and tokenizer.bos_token_id is None:
        raise UserError("data.bos = true, but the tokenizer has no beginning-of-text token. Remove data.bos.")
    return adds_bos(tokenizer) if bos is None else bos


def read_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Calls `AutoTokenizer.from_pretrained`, which raises errors of many kinds.

    If the files do not name a class of one family, tokenizer.json says everything. Then the model's config is not
    asked, because for some families (qwen2) it makes transformers use the family's class, which gives other ids.
    """
    folder = Path(name_or_path)
    without_config = {"config": PreTrainedConfig()} if _is_of_no_family(folder / TOKENIZER_CONFIG_FILE) else {}
    return AutoTokenizer.from_pretrained(
        name_or_path, local_files_only=folder.is_dir(), trust_remote_code=False, **without_config
    )


def _is_of_no_family(path: Path) -> bool:
    try:
        return json.loads(path.read_bytes())["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def tokenizer_identity(name_or_path: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns a hash of the files of a local directory, which may be moved, or the name of a tokenizer of the hub."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return name_or_path
    names = dict.fromkeys([*HASHED_FIRST, *_files_of(tokenizer, folder)])
    contents = {name: hash_file(folder / name) for name in names if (folder / name).is_file()}
    return sha256(json.dumps(contents).encode()).hexdigest()


def _files_of(tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[str]:
    """Returns the names of all files that transformers may read this tokenizer from, by its own constants."""
    templates = sorted(path.relative_to(folder).as_posix() for path in (folder / CHAT_TEMPLATE_DIR).glob("*"))
    fixed = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE)
    return [*tokenizer.vocab_files_names.values(), *fixed, *templates]


def _reason_of(error: Exception) -> str:
    """Returns the first line of the message, and the type of an error whose message tells a user little."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    says_enough = reason and (isinstance(error, OSError | ValueError) or type(error) is Exception)
    return reason if says_enough else f"{type(error).__name__}: {reason}".removesuffix(": ")


def _refusal(name: str, reason: str, advice: str = OTHERS) -> UserError:
    return UserError(f"data.tokenizer: {name!r} {reason}. {advice}")


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, without added tokens; "</s>" in a text is text. Leaves `tokenizer` unchanged."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return [ids.tolist() for ids in encode_texts(copy, texts)]


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, adds_bos: bool = False) -> None:
    """Trains SentencePiece BPE on the texts; writes sentencepiece.model and a Hugging Face tokenizer to `folder`.

    The same texts give the same bytes. Decoding gives back any text that does not contain `SPACE`. `adds_bos`: whether
    the tokenizer puts `BOS` before a text when it is called.

    Raises: UserError when the text has too few or too many different pieces for `vocab_size`; OSError.
    """
    model = _train(_lines(texts), vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.model").write_bytes(model)
    backend = _from_sentencepiece(model)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(fast, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer so that transformers 4.57 reads it too. Raises: OSError."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # For a full disk the tokenizers library raises a plain `Exception`.
        raise OSError(f"{folder}: {error}") from error
    _correct_config(folder / TOKENIZER_CONFIG_FILE)


def _correct_config(path: Path) -> None:
    """Replaces the names in tokenizer_config.json that only transformers 5 knows by those that 4.57 knows too.

    It removes two keys by which transformers 5 remembers that the tokenizer was read from a local directory.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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

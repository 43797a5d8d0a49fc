"""The trained tokenizer gives SentencePiece's ids and decodes to the same text; unusable tokenizers are refused."""

import json
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from sorted_ds.base.errors import UserError
from sorted_ds.data.text import long_documents
from sorted_ds.data.text.encode import Encoding, encode_part, encode_texts
from sorted_ds.data.text.long_documents import Joiner, PartTokens, Span, cut
from sorted_ds.data.text.tokenizer import (
    TRAINING_CHARACTERS,
    Vocabulary,
    encode,
    load_tokenizer,
    train_tokenizer,
    trained_vocabulary,
    training_excerpts,
    vocabulary_of,
)

VOCAB_SIZE = 1024
ODD = [
    *["", " ", "  ", "\n", "\n\n \n", "\t\t x", "a\r\nb\r\n", " lead", "trail ", "   many    spaces  ", "\x00\x01\x7f"],
    *[
        "🎉👩‍👩‍👧 東京 λ",
        "e\u0301 é",
        "\ufffd\ufeff\u2028\u00a0x",
        "<0x41> <0xE2>",
        "<s></s><unk>",
        "1234567 0.50",
        "▅",
    ],
    *[character * number for character in " =-*#_a.\t\n0é" for number in (2, 3, 5, 7, 15, 16, 17, 33, 100, 301)],
    "no end " * 20_000,
]


def library_texts() -> list[str]:
    """Returns the standard library's top-level modules: about 5 MB of code."""
    return [path.read_text("utf-8") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


def odd_texts() -> list[str]:
    """Returns random texts of few characters with many repetitions, where another order of merges would show."""
    generator = random.Random(0)
    alphabets = [" ab", "= ", "-=_", "01 ", "aeiourstn ", "\n \t", "()[],.'\"", "self._"]
    return ODD + ["".join(generator.choices(a, k=generator.randint(1, 80))) for a in alphabets for _ in range(300)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(library_texts()[::3], VOCAB_SIZE, folder)
    return folder


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    texts = library_texts()
    del texts[::3]
    assert sum(map(len, texts)) > 1e6
    return texts + odd_texts()


def test_ids_equal_those_of_sentencepiece_on_held_out_text(trained, held_out):
    own = SentencePieceProcessor(model_file=str(trained / "sentencepiece.model"))
    encoded = encode(AutoTokenizer.from_pretrained(trained), held_out)
    different = [text[:80] for text, ids in zip(held_out, encoded, strict=True) if ids != own.encode(text)]
    assert different == []


def test_decoding_gives_the_text_back(trained, held_out):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    decoded = [tokenizer.decode(ids) for ids in encode(tokenizer, held_out)]
    assert decoded == held_out


def test_plain_transformers_gives_the_same_ids(trained, held_out, tmp_path):
    texts = [text for text in held_out if "<" not in text][:400]
    script = (
        "import json, sys; from transformers import AutoTokenizer; texts = json.load(sys.stdin); "
        f"tokenizer = AutoTokenizer.from_pretrained({str(trained)!r}); assert 'sorted_ds' not in sys.modules; "
        "ids = tokenizer(texts)['input_ids']; print(json.dumps([ids, [tokenizer.decode(one) for one in ids]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(texts),
        text=True,
        capture_output=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout) == [encode(load_tokenizer(str(trained)), texts), texts]


def test_a_space_is_decoded_even_if_the_training_text_had_none(tmp_path):
    train_tokenizer(["東京都\n大阪府\n" * 50], 270, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    own = SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.model"))
    ids = encode(tokenizer, [" 東京  x "])[0]
    assert ids == own.encode(" 東京  x ")
    assert tokenizer.decode(ids) == " 東京  x "


def test_indentation_becomes_few_tokens_and_each_line_end_one(trained):
    tokenizer = load_tokenizer(str(trained))
    newline = encode(tokenizer, ["\n"])[0]
    assert len(newline) == 1
    assert encode(tokenizer, ["x\n\n\n"])[0][-3:] == newline * 3
    assert len(encode(tokenizer, [" " * 8 + "\n"])[0]) == 2


def test_each_digit_is_a_token(trained):
    assert len(encode(load_tokenizer(str(trained)), ["2026"])[0]) == 4


def test_special_tokens_in_a_text_are_encoded_as_text(trained):
    tokenizer = load_tokenizer(str(trained))
    assert min(encode(tokenizer, ["a<s>b</s>c<unk>"])[0]) > 2
    assert tokenizer("<s>")["input_ids"] == [1]


def test_special_tokens_in_the_training_text_are_encoded_as_text_too(tmp_path):
    texts = ["a <s>struck</s> word, <s>two</s> <unk> s> </ s>\n" * 50]
    train_tokenizer(texts, 295, tmp_path)
    own = SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.model"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert encode(tokenizer, texts) == [own.encode(texts[0])]
    assert min(encode(tokenizer, texts)[0]) > 2


def test_a_long_document_is_encoded_whole_and_without_a_warning(trained, caplog, capfd):
    tokenizer = load_tokenizer(str(trained))
    tokenizer.model_max_length = 16
    tokenizer.backend_tokenizer.enable_truncation(16)
    assert len(encode(tokenizer, ["one two\n" * 1000])[0]) >= 3000
    assert tokenizer.backend_tokenizer.truncation is not None, "encode() leaves the tokenizer as it was"
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


def test_the_vocabulary_is_known_before_training(trained):
    assert vocabulary_of(load_tokenizer(str(trained))) == trained_vocabulary(VOCAB_SIZE) == Vocabulary(VOCAB_SIZE, 1, 2)


def test_the_same_texts_give_the_same_bytes(trained, tmp_path):
    train_tokenizer(library_texts()[::3], VOCAB_SIZE, tmp_path)
    names = {path.name for path in trained.iterdir()}
    assert names == {"sentencepiece.model", "tokenizer.json", "tokenizer_config.json"}
    assert {name: (tmp_path / name).read_bytes() for name in names} == {
        p.name: p.read_bytes() for p in trained.iterdir()
    }


def test_a_vocabulary_too_large_is_refused_with_the_largest_possible(tmp_path):
    with pytest.raises(UserError, match=r"^data\.vocab_size = 4096 is too large: .* Set \d+ or less\.$") as raised:
        train_tokenizer(["one two three\n" * 30], 4096, tmp_path)
    most = int(str(raised.value).split()[-3])
    train_tokenizer(["one two three\n" * 30], most, tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == most


def test_a_vocabulary_too_small_is_refused_with_the_smallest_possible(tmp_path):
    with pytest.raises(UserError, match=r"^data\.vocab_size = 250 is too small: .* Set \d+ or more\.$") as raised:
        train_tokenizer(["one two three\n" * 30], 250, tmp_path)
    least = int(str(raised.value).split()[-3])
    train_tokenizer(["one two three\n" * 30], least, tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == least


def test_training_excerpts_are_an_equal_share_of_each_text_from_its_beginning():
    texts = ["abcd" * 100, "x", "yz" * 300]
    assert list(training_excerpts(texts, 1001)) == texts
    assert list(training_excerpts(texts, 4 * TRAINING_CHARACTERS)) == ["abcd" * 25, "x", "yz" * 75]


def fast(folder: Path, vocabulary: dict[str, int], **special: str) -> str:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def slow(folder: Path) -> str:
    ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: "no/such/one", r"cannot be loaded \(.+\)"),
        (slow, r"has no tokenizer\.json, from which a fast tokenizer is read"),
        (lambda folder: fast(folder, {"<unk>": 0, "a": 1}), r"has no end-of-text token, .*"),
        (lambda folder: fast(folder, {"<unk>": 0, "</s>": 7}, eos_token="</s>"), r"has ids up to 7 for 2 tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_by_name(make, reason, tmp_path):
    name = make(tmp_path)
    with pytest.raises(
        UserError, match=rf"^data\.tokenizer: '{name}' {reason}\. Name a directory, a hub id, or"
    ) as raised:
        load_tokenizer(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", '{"version"', r"Expecting .+"),
        ("tokenizer.json", "[]", ".+"),
        ("tokenizer.json", "{}", ".+"),
        ("tokenizer_config.json", "[]", r"AttributeError: 'list' object has no attribute 'get'"),
        ("tokenizer_config.json", "{", r"Expecting .+"),
        ("added_tokens.json", "[1]", r"[A-Z]\w+Error: .+"),
        (None, "", ".+"),
    ],
)
def test_a_damaged_tokenizer_in_a_directory_is_refused_with_the_advice_to_repair_it(file, content, reason, tmp_path):
    if file:
        fast(tmp_path, {"<unk>": 0, "</s>": 1}, eos_token="</s>")
        (tmp_path / file).write_text(content)
    with pytest.raises(
        UserError,
        match=rf"^data\.tokenizer: '{tmp_path}' cannot be loaded \({reason}\)\. Correct or replace the tokenizer's "
        r"files in that directory, or name another tokenizer in data\.tokenizer\.$",
    ) as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


def byte_level(texts: list[str]) -> Tokenizer:
    """A tokenizer that cuts texts into words as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet))
    return tokenizer


def without_words(texts: list[str]) -> Tokenizer:
    """A tokenizer as llama 2 has one: a text is not cut into words before its characters are joined."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, max_token_length=16))
    return tokenizer


LONG_TEXTS = {
    "code": "".join(path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))),
    "runs": ("a" + " " * 150 + "b\n" * 60 + "é🎉" * 60 + "=" * 150) * 40,
}


def encode_in_parts(tokenizer: Tokenizer, text: str, size: int, bos_id: int | None = None) -> list[int]:
    """Encodes a text as `write_tokens` does if `size` is `BATCH_CHARACTERS`. The end-of-text token is 9999."""
    encoding, joiner = Encoding(Path(), bos_id, 9999, "<u2"), Joiner()
    parts = list(cut(text, False, size))
    assert "".join(text[part.span.start : part.span.stop] for part in parts) == text
    return [int(i) for part in parts for i in joiner.add(encode_part(tokenizer, part, encoding))]


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
@pytest.mark.parametrize("make", [byte_level, without_words])
def test_a_long_text_in_parts_has_the_tokens_of_the_whole(make, text):
    tokenizer = make(["".join(LONG_TEXTS.values())[:20_000], *LONG_TEXTS.values()])
    whole = encode_texts(tokenizer, [text])[0].tolist()
    for size in (1_000, 7_000, len(text) - 1, len(text)):
        assert encode_in_parts(tokenizer, text, size) == [*whole, 9999]
        assert encode_in_parts(tokenizer, text, size, bos_id=0) == [0, *whole, 9999]


def test_parts_are_joined_in_their_overlap_and_not_cut(monkeypatch):
    monkeypatch.setattr(long_documents, "_hard_cut", None)
    tokenizer = byte_level([LONG_TEXTS["code"]])
    assert encode_in_parts(tokenizer, LONG_TEXTS["code"], 7_000)


def test_a_document_has_its_tokens_whatever_follows_it():
    """One `Joiner` joins several documents."""
    tokenizer, joiner = byte_level([LONG_TEXTS["code"]]), Joiner()
    texts = [LONG_TEXTS["code"][:9_000], LONG_TEXTS["runs"][:9_000], "short"]
    encoding = Encoding(Path(), None, 9999, "<u2")
    parts = [part for text in texts for part in cut(text, False, 4_000)]
    ids = [int(i) for part in parts for i in joiner.add(encode_part(tokenizer, part, encoding))]
    assert ids == [i for text in encode_texts(tokenizer, texts) for i in [*text.tolist(), 9999]]


def words_of(tokens: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{k}": k for k in range(1, tokens)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize("before", [0, 700, 1_900])
def test_parts_that_never_agree_are_cut_at_their_border(before):
    """An unknown word that is longer than the overlap gives no common token. It stays one here, and nothing is lost."""
    text = "w1 w2 " * before + "x" * 5_000 + " w3 w4" * 1_000
    tokenizer = words_of(9)
    assert encode_in_parts(tokenizer, text, 1_000) == [*[1, 2] * before, 0, *[3, 4] * 1_000, 9999]


def test_at_a_hard_cut_tokens_come_from_the_part_in_which_they_start(monkeypatch):
    monkeypatch.setattr(long_documents, "_joint", lambda left, right: None)
    text = "".join(f"w{k % 7 + 1} " for k in range(4_000))
    assert encode_in_parts(words_of(9), text, 1_200) == [*(k % 7 + 1 for k in range(4_000)), 9999]


def test_parts_that_disagree_are_joined_where_both_have_a_token_start():
    left = PartTokens(Span(0, 20, False, False), np.array([1, 2, 3, 4]), np.array([0, 7, 15, 22]))
    right = PartTokens(Span(20, 40, True, False), np.array([5, 6, 7, 8]), np.array([12, 15, 19, 30]))
    joiner = Joiner()
    assert joiner.add(left).tolist() == []
    assert joiner.add(right).tolist() == [1, 2, 6, 7, 8]


def test_texts_and_parts_are_encoded_without_dropout():
    plain, dropping = (byte_level([LONG_TEXTS["code"]]) for _ in range(2))
    text = LONG_TEXTS["code"][:9_000]
    expected = encode_texts(plain, [text])[0].tolist()
    dropping.model.dropout = 0.3
    assert dropping.encode(text).ids != expected
    fast = PreTrainedTokenizerFast(tokenizer_object=dropping)
    assert encode(fast, [text]) == [expected]
    assert fast.backend_tokenizer.model.dropout == pytest.approx(0.3), "encode() leaves the tokenizer as it was"
    assert encode_in_parts(dropping, text, 4_000) == [*expected, 9999]
    dropping.model.dropout = 0.3
    assert encode_texts(dropping, [text])[0].tolist() == expected

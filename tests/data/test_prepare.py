"""Prepared tokens are the documents, split in two; a folder is complete or invisible, and is found by content."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.content_key import HASHES_FILE
from sorted_ds.data.text.documents import MOST_KEYS
from sorted_ds.data.text.encode import BATCH_CHARACTERS
from sorted_ds.data.text.prepare import DataSpec, find_prepared, open_tokens, prepare
from sorted_ds.data.text.split import hash_position
from sorted_ds.data.text.tokens import TokenizedText
from sorted_ds.tasks.causal_lm import CausalLM

ROOT = Path(__file__).parents[2]


def text_of(number: int) -> str:
    return "".join(f"{number} times {k} is {number * k}; a line of text, number {k}.\n" for k in range(40))


def corpus(folder: Path, num_documents: int = 30) -> DataSpec:
    """Writes text files that seem to have changed an hour ago. Returns their specification."""
    (folder / "text").mkdir(parents=True)
    for number in range(num_documents):
        path = folder / "text" / f"{number:02}.txt"
        path.write_text(text_of(number))
        age(path)
    return DataSpec((folder / "text",), (), (".txt",), "train", 300, 0.2, 17)


def age(path: Path) -> None:
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def documents_in(ids: np.ndarray, tokens: TokenizedText) -> list[str]:
    """Returns the documents, decoded by plain transformers. Nothing may follow the last end of text."""
    tokenizer = AutoTokenizer.from_pretrained(tokens.tokenizer_dir)
    *parts, rest = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id) + 1)
    assert len(rest) == 0
    return [tokenizer.decode(part[:-1]) for part in parts]


def is_validation(text: str, seed: int, fraction: float) -> bool:
    digest = blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") / 2**64 < fraction


def visible(cache_dir: Path) -> list[str]:
    return [p.name for p in cache_dir.iterdir() if not p.name.startswith(".") and p.name != HASHES_FILE]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def word_tokenizer(folder: Path, words: int, end: str = "</s>", bos: str | None = None, adds_bos: bool = False) -> str:
    """Writes a tokenizer whose ids are the numbers of its words: w2 is 2. `bos` names the word that begins a text."""
    vocabulary = {end: 0, "<unk>": 1, **{f"w{k}": k for k in range(2, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=bos).save_pretrained(folder)
    return str(folder)


def test_the_tokens_are_the_documents_in_order_with_an_end_of_text_after_each(tmp_path):
    spec = corpus(tmp_path)
    tokens = prepare(spec, tmp_path / "cache", 1)
    texts = [text_of(number) for number in range(30)]
    sides = {side: [t for t in texts if is_validation(t, 17, 0.2) == side] for side in (False, True)}
    assert documents_in(tokens.train, tokens) == sides[False]
    assert documents_in(tokens.validation, tokens) == sides[True]
    assert (tokens.vocab_size, tokens.bos_id, tokens.eos_id) == (300, 1, 2)
    assert tokens.train.dtype == np.dtype("<u2")
    assert tokens.folder == tmp_path / "cache" / tokens.key
    assert set(contents_of(tokens.folder)) > {
        "train.bin",
        "validation.bin",
        "meta.json",
        "tokenizer/tokenizer.json",
    }


def test_equal_documents_are_on_the_same_side_and_another_seed_gives_another_split(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(k % 20)}) + "\n" for k in range(60)))
    spec = DataSpec((), (path,), (), "train", 300, 0.3, 1)
    sides = []
    for seed in (1, 2):
        tokens = prepare(replace(spec, seed=seed), tmp_path / "cache", 1)
        train, validation = (Counter(documents_in(side, tokens)) for side in (tokens.train, tokens.validation))
        assert not train.keys() & validation.keys()
        assert set((train + validation).values()) == {3}
        sides.append(set(validation))
    assert sides[0] != sides[1]


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_each_side_has_a_document_for_any_fraction(tmp_path, fraction):
    tokens = prepare(replace(corpus(tmp_path, 2), validation_fraction=fraction), tmp_path / "cache", 1)
    assert len(documents_in(tokens.train, tokens)) == len(documents_in(tokens.validation, tokens)) == 1


@pytest.mark.parametrize(
    ("adds_bos", "bos", "expected"),
    [(False, None, []), (True, None, [7]), (False, True, [7]), (True, False, []), (True, True, [7])],
)
def test_the_beginning_of_text_token_leads_each_document_by_habit_or_by_the_setting(tmp_path, adds_bos, bos, expected):
    texts = [f"w{k} w9" for k in range(10, 19)]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = word_tokenizer(tmp_path / "words", 20, bos="w7", adds_bos=adds_bos)
    tokens = prepare(DataSpec((), (path,), (), tokenizer, 0, 0.3, 1, bos), tmp_path / "cache", 1)
    for is_validation, ids in ((False, tokens.train), (True, tokens.validation)):
        numbers = [k for k, text in enumerate(texts, 10) if is_validation == is_validation_text(text)]
        assert ids.tolist() == [i for k in numbers for i in [*expected, k, 9, 0]]
    notes = "\n".join(CausalLM().notes(tokens))
    assert f"each document {'begins with its beginning-of-text token and ' if expected else ''}ends with" in notes
    assert ("does the opposite" in notes) == (bos is not None and bos != adds_bos)


def is_validation_text(text: str) -> bool:
    return is_validation(text, 1, 0.3)


def test_a_tokenizer_that_is_trained_adds_the_beginning_of_text_token_if_the_documents_have_it(tmp_path):
    spec = corpus(tmp_path)
    plain, leading = (prepare(replace(spec, bos=bos), tmp_path / "cache", 1) for bos in (None, True))
    assert leading.train.tolist()[:2] == [1, plain.train[0]]
    assert len(leading.train) == len(plain.train) + (plain.train == 2).sum()
    ids = [AutoTokenizer.from_pretrained(tokens.tokenizer_dir)("def").input_ids for tokens in (plain, leading)]
    assert ids[1] == [1, *ids[0]]


def test_a_tokenizer_without_a_beginning_of_text_token_is_refused(tmp_path):
    spec = replace(corpus(tmp_path), tokenizer=word_tokenizer(tmp_path / "words", 20), bos=True)
    with pytest.raises(UserError, match=r"data\.bos = true, but the tokenizer has no beginning-of-text token"):
        prepare(spec, tmp_path / "cache", 1)


def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path):
    texts = [text_of(number) for number in range(30)]
    number = next(number for number, text in enumerate(texts) if is_validation(text, 17, 0.2))
    spec = corpus(tmp_path)
    before = prepare(spec, tmp_path / "cache", 1)
    letters = "ΩЖ" * 300
    extra = next(letters + str(k) for k in range(99) if is_validation(letters + str(k), 17, 0.2))
    (tmp_path / "text" / f"{number:02}.txt").write_text(extra)
    after = prepare(spec, tmp_path / "cache", 1)
    assert extra in documents_in(after.validation, after)
    assert contents_of(before.tokenizer_dir) == contents_of(after.tokenizer_dir)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    whole = "".join(path.read_text("utf-8") for path in library[:20])[: BATCH_CHARACTERS // 2]
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"text": path.read_text("utf-8")}) + "\n" for path in library) + json.dumps({"text": whole})
    )
    assert (tmp_path / "lines.jsonl").stat().st_size > 5 * BATCH_CHARACTERS, "two workers cannot take all of it at once"
    spec = DataSpec((), (tmp_path / "lines.jsonl",), (), "train", 512, 0.1, 3)
    reports: list[tuple[int, int]] = []
    alone = prepare(spec, tmp_path / "one", 1, lambda done, total: reports.append((done, total)))
    two = prepare(spec, tmp_path / "two", 2)
    assert contents_of(alone.folder) == contents_of(two.folder)
    assert alone.key == two.key
    assert reports == sorted(reports)
    assert reports[-1][0] == reports[-1][1]


def test_a_long_document_between_short_ones_has_the_same_bytes_for_any_number_of_workers(tmp_path):
    long = "".join(f"w{k % 17 + 2}".ljust(16) for k in range(BATCH_CHARACTERS // 8 + 999))
    assert len(long) > 2 * BATCH_CHARACTERS
    texts = ["w3 w4", long, "w5", "w6 w7", "w8"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = word_tokenizer(tmp_path / "words", 20, bos="w19")
    spec = DataSpec((), (tmp_path / "lines.jsonl",), (), tokenizer, 0, 0.3, 2, bos=True)
    reports: list[tuple[int, int]] = []
    alone = prepare(spec, tmp_path / "one", 1, lambda done, total: reports.append((done, total)))
    assert contents_of(alone.folder) == contents_of(prepare(spec, tmp_path / "two", 2).folder)
    for side, ids in ((False, alone.train), (True, alone.validation)):
        taken = [text for text in texts if is_validation(text, 2, 0.3) == side]
        expected = [i for text in taken for i in [19, *(int(word[1:]) for word in text.split()), 0]]
        assert taken
        assert np.array_equal(ids, expected)
    assert reports == sorted(reports)
    assert reports[-1] == (sum(map(len, texts)), sum(map(len, texts)))
    assert max(after - before for (before, _), (after, _) in pairwise(reports)) <= BATCH_CHARACTERS


MEASURED = """
import resource, sys
from pathlib import Path
from sorted_ds.data.text.prepare import DataSpec, prepare
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    prepare(DataSpec((folder / "text",), (), (".txt",), str(folder / "words"), 0, 0.2, 17), folder / "cache", 1)
    print(sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def peak_bytes(folder: Path, size: int) -> int:
    """Returns the peak memory of a process that prepares one long and one short document.

    One thread encodes, because several would leave different amounts of free memory behind.
    """
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "a.txt").write_text("w2")
    (folder / "text" / "b.txt").write_text((f"w2{'w3':>14}" * (size // 16 + 1))[:size])
    word_tokenizer(folder / "words", 20)
    command = [sys.executable, "-c", MEASURED, str(folder)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, text=True, capture_output=True, check=True, cwd=ROOT, env=environment)
    return 1024 * int(done.stdout)


@pytest.mark.long
def test_the_memory_does_not_grow_with_a_document_except_by_its_text(tmp_path):
    """Measured: 364 and 412 MiB, so 1.7 bytes for each byte of text, which is in memory twice while it is read."""
    small, large = 2**22, 2**25
    peaks = [peak_bytes(tmp_path / str(size), size) for size in (small, large)]
    assert peaks[1] - peaks[0] < 3 * (large - small) + 2**24


def test_a_tokenizer_with_dropout_gives_the_tokens_of_one_without(tmp_path):
    folder = tmp_path / "bpe"
    prepared_by = prepare(corpus(tmp_path), tmp_path / "cache", 1)
    shutil.copytree(prepared_by.tokenizer_dir, folder)
    spec = replace(prepared_spec(tmp_path), tokenizer=str(folder))
    plain = prepare(spec, tmp_path / "cache", 1)
    file = folder / "tokenizer.json"
    contents = json.loads(file.read_text())
    assert contents["model"]["dropout"] is None
    contents["model"]["dropout"] = 0.3
    file.write_text(json.dumps(contents))
    once, twice = (prepare(spec, tmp_path / name, workers) for name, workers in (("once", 1), ("twice", 2)))
    for name in ("train.bin", "validation.bin"):
        expected = (plain.folder / name).read_bytes()
        assert (once.folder / name).read_bytes() == (twice.folder / name).read_bytes() == expected
    assert once.key != plain.key


def prepared_spec(folder: Path) -> DataSpec:
    return DataSpec((folder / "text",), (), (".txt",), "train", 300, 0.2, 17)


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    spec = corpus(tmp_path)
    once = prepare(spec, tmp_path / "cache", 1)
    (tmp_path / "link.txt").symlink_to("text/01.txt")
    again = replace(spec, text=(*spec.text, tmp_path / "text" / "00.txt", tmp_path / "link.txt"))
    twice = prepare(again, tmp_path / "cache", 1)
    assert twice.key == once.key
    assert twice.left_out == {"named more than once": 2}
    assert "files that are not read: named more than once (2)" in CausalLM().notes(twice)


def test_blank_documents_are_left_out_and_counted(tmp_path):
    spec = corpus(tmp_path, 4)
    for number in range(50):
        (tmp_path / "text" / f"blank{number}.txt").write_text(" \n" * (number % 3))
    tokens = prepare(spec, tmp_path / "cache", 1)
    assert tokens.counts is not None
    assert (tokens.counts.files, sum(tokens.counts.documents), tokens.counts.blank) == (54, 4, 50)
    assert "50 documents are blank and are left out" in CausalLM().notes(tokens)
    assert CausalLM().describe(tokens)["blank"] == 50
    one = replace(tokens, counts=replace(tokens.counts, blank=1))
    assert "1 document is blank and is left out" in CausalLM().notes(one)


def test_prepared_tokens_of_an_earlier_version_open_without_the_newer_counts(tmp_path):
    tokens = prepare(corpus(tmp_path, 4), tmp_path / "cache", 1)
    path = tokens.folder / "meta.json"
    meta = json.loads(path.read_text())
    for name in ("blank", "further_keys"):
        del meta["counts"][name]
    path.write_text(json.dumps(meta))
    assert open_tokens(tokens.folder).counts == tokens.counts


def test_only_the_most_frequent_unread_keys_are_shown(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {"text": f"w{k % 17 + 2}", "id": k, "url": "", f"key{k:05}": 0, "k1": 0, **({"k2": 0} if k else {})}
            )
            + "\n"
            for k in range(20_000)
        )
    )
    spec = DataSpec((), (path,), (), word_tokenizer(tmp_path / "words", 20), 0, 0.3, 1)
    tokens = prepare(spec, tmp_path / "cache", 1)
    assert tokens.counts is not None
    assert len(tokens.counts.unread_keys) == MOST_KEYS
    assert sum(tokens.counts.unread_keys.values()) + tokens.counts.further_keys == 5 * 20_000 - 1
    line = next(line for line in CausalLM().notes(tokens) if "keys of records" in line)
    frequent = "id (20,000), k1 (20,000), url (20,000), k2 (19,999), key00000 (1)"
    assert line == f"keys of records that are not read: {frequent}, and over {MOST_KEYS - 5} more"
    few = replace(tokens, counts=replace(tokens.counts, unread_keys=dict.fromkeys("abcdefg", 2), further_keys=0))
    assert any(
        line.endswith("not read: a (2), b (2), c (2), d (2), e (2), and 2 more") for line in CausalLM().notes(few)
    )
    fewer = replace(tokens, counts=replace(tokens.counts, unread_keys={"a": 1, "b": 1_200}, further_keys=0))
    assert any(line.endswith("not read: b (1,200), a (1)") for line in CausalLM().notes(fewer))


def test_the_advice_on_a_long_validation_document_works(tmp_path):
    """The longest document has the lowest hash of seed 1 here, so no fraction moves it to the other side."""
    path = tmp_path / "lines.jsonl"
    texts = [f"w{k}" for k in range(2, 12)]
    long = min((f"w{k % 18 + 2} " * (500 + k) for k in range(200)), key=lambda text: hash_position(text, 1))
    assert hash_position(long, 1) < min(hash_position(text, 1) for text in texts)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, long]))
    spec = DataSpec((), (path,), (), word_tokenizer(tmp_path / "words", 20), 0, 1e-9, 1)

    def warnings(spec: DataSpec) -> list[str]:
        return [line for line in CausalLM().notes(prepare(spec, tmp_path / "cache", 1)) if line.startswith("warning")]

    (warning,) = warnings(spec)
    assert warning.endswith(
        "% of the tokens are for validation, because validation takes whole documents. Cut long documents into "
        "several, or set another seed."
    )
    assert any(warnings(replace(spec, seed=seed)) == [] for seed in (2, 3, 4))
    pieces = [*texts, *([f"w{k} " * 5 for k in range(2, 20)])]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces))
    assert warnings(spec) == []


def test_a_cache_folder_that_cannot_be_made_is_one_line_with_its_name(tmp_path):
    spec = corpus(tmp_path, 4)
    file = tmp_path / "file"
    file.write_text("no folder")
    for cache_dir in (file, file / "cache", file / "deep" / "cache"):
        expected = rf"^data could not be prepared in {cache_dir}: .*, or set another data\.cache_dir\.$"
        with pytest.raises(UserError, match=expected) as raised:
            prepare(spec, cache_dir, 1)
        assert "\n" not in str(raised.value)
    assert file.read_text() == "no folder"


def test_the_unigram_loss_equals_an_independent_count(tmp_path):
    tokens = prepare(corpus(tmp_path), tmp_path / "cache", 1)
    counts = Counter(tokens.train.tolist())
    total = len(tokens.train) + 300
    by_hand = -sum(math.log((counts[token] + 1) / total) for token in tokens.validation.tolist())
    # The tolerance is for sums of about 10,000 terms in another order.
    assert tokens.unigram_nats == pytest.approx(by_hand / len(tokens.validation), rel=1e-10)


@pytest.mark.parametrize(("words", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_a_tokenizer_from_a_directory_is_copied_and_the_token_type_holds_its_ids(tmp_path, words, dtype):
    spec = replace(corpus(tmp_path, 2), tokenizer=word_tokenizer(tmp_path / "words", words))
    for number, text in enumerate((f"w{words - 1} w7 </s> other", f"w8 w{words - 1}")):
        (tmp_path / "text" / f"{number:02}.txt").write_text(text)
    tokens = prepare(spec, tmp_path / "cache", 1)
    assert tokens.train.dtype == np.dtype(dtype)
    assert sorted([*tokens.train.tolist(), *tokens.validation.tolist()]) == sorted(
        [words - 1, 7, 0, 1, 0, 8, words - 1, 0]
    )
    assert tokens.vocab_size == len(AutoTokenizer.from_pretrained(tokens.tokenizer_dir)) == words


def test_a_second_start_uses_the_prepared_tokens(tmp_path):
    spec = corpus(tmp_path)
    with pytest.raises(UserError, match=r"is not prepared\. Run `sorted-ds prepare RUN\.toml` first\.$"):
        find_prepared(spec, tmp_path / "cache")
    first = prepare(spec, tmp_path / "cache", 1)
    time_ns = (first.folder / "train.bin").stat().st_mtime_ns
    assert prepare(spec, tmp_path / "cache", 1).key == find_prepared(spec, tmp_path / "cache").key == first.key
    assert (first.folder / "train.bin").stat().st_mtime_ns == time_ns


def test_touched_or_moved_files_keep_their_key(tmp_path):
    first = prepare(corpus(tmp_path), tmp_path / "cache", 1)
    (tmp_path / "text" / "03.txt").touch()
    shutil.move(tmp_path / "text", tmp_path / "moved")
    spec = DataSpec((tmp_path / "moved",), (), (".txt",), "train", 300, 0.2, 17)
    assert find_prepared(spec, tmp_path / "cache").key == first.key


def test_changed_content_order_or_settings_give_another_key(tmp_path):
    spec = corpus(tmp_path)
    words = [word_tokenizer(tmp_path / f"words{size}", size) for size in (10, 11)]
    specs = [
        *(spec, replace(spec, vocab_size=301), replace(spec, validation_fraction=0.3), replace(spec, seed=18)),
        *(replace(spec, tokenizer=name) for name in words),
    ]
    keys = [prepare(one, tmp_path / "cache", 1).key for one in specs]
    same = prepare(replace(spec, tokenizer=words[0], vocab_size=999), tmp_path / "cache", 1).key
    assert same == keys[4], "vocab_size has no meaning for an existing tokenizer"
    (tmp_path / "text" / "03.txt").rename(tmp_path / "text" / "zz.txt")
    keys.append(prepare(spec, tmp_path / "cache", 1).key)
    path = tmp_path / "text" / "04.txt"
    path.write_text(path.read_text().replace("4 times 9 is 36", "4 times 9 is 63"))
    keys.append(prepare(spec, tmp_path / "cache", 1).key)
    assert len(set(keys)) == len(keys)


def test_a_tokenizer_directory_enters_the_key_by_its_contents_of(tmp_path):
    spec = replace(corpus(tmp_path, 2), tokenizer=word_tokenizer(tmp_path / "words", 10))
    first = prepare(spec, tmp_path / "cache", 1).key
    shutil.move(tmp_path / "words", tmp_path / "moved")
    assert find_prepared(replace(spec, tokenizer=str(tmp_path / "moved")), tmp_path / "cache").key == first
    word_tokenizer(tmp_path / "words", 11)
    assert prepare(spec, tmp_path / "cache", 1).key != first


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/tool.jinja"])
def test_a_corrected_chat_template_reaches_the_prepared_tokenizer(tmp_path, file):
    folder = tmp_path / "words"
    spec = replace(corpus(tmp_path, 2), tokenizer=word_tokenizer(folder, 10))
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("default")
    (folder / file).write_text("old")
    first = prepare(spec, tmp_path / "cache", 1)
    assert (first.tokenizer_dir / file).read_text() == "old"
    (folder / file).write_text("new")
    assert (prepare(spec, tmp_path / "cache", 1).tokenizer_dir / file).read_text() == "new"


def test_what_was_read_and_left_out_is_counted_for_each_side(tmp_path):
    spec = corpus(tmp_path, 10)
    (tmp_path / "text" / "notes.md").write_text("left out")
    (tmp_path / "more.jsonl").write_text('{"text": "a b c", "id": 1}\n' * 2)
    spec = replace(spec, files=(tmp_path / "more.jsonl",))
    tokens = prepare(spec, tmp_path / "cache", 1)
    counts = tokens.counts
    texts = [*(path.read_text() for path in sorted((tmp_path / "text").glob("*.txt"))), "a b c", "a b c"]
    sides = [
        [text for text in texts if is_validation(text, spec.seed, spec.validation_fraction) == side] for side in (0, 1)
    ]
    assert counts is not None
    assert counts.files == 11
    assert counts.documents == tuple(len(side) for side in sides)
    assert counts.bytes == tuple(sum(len(text.encode()) for text in side) for side in sides)
    assert counts.unread_keys == {"id": 2}
    assert tokens.left_out == {"ending in .md": 1}
    assert find_prepared(spec, tmp_path / "cache").counts == counts


def test_a_byte_order_mark_gives_the_tokens_of_the_text_without_it_and_another_key(tmp_path):
    spec = corpus(tmp_path)
    plain = prepare(spec, tmp_path / "cache", 1)
    path = tmp_path / "text" / "04.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = prepare(spec, tmp_path / "cache", 1)
    assert marked.key != plain.key
    assert np.array_equal(marked.train, plain.train)


def change_within_the_same_time(path: Path) -> None:
    """Changes a file but neither its size nor its time, as quick edits do on a file system with coarse times."""
    status = path.stat()
    text = path.read_text()
    path.write_text(text[1:] + text[0])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_hashes_of_old_files_are_cached_and_those_of_recently_changed_files_are_not(tmp_path):
    spec, path = corpus(tmp_path), tmp_path / "text" / "05.txt"
    first = prepare(spec, tmp_path / "cache", 1).key
    change_within_the_same_time(path)
    assert prepare(spec, tmp_path / "cache", 1).key == first, "a file an hour old is not read again"
    path.touch()
    fresh = prepare(spec, tmp_path / "cache", 1).key
    change_within_the_same_time(path)
    assert len({first, fresh, prepare(spec, tmp_path / "cache", 1).key}) == 3


def test_a_damaged_hash_cache_is_written_again(tmp_path):
    first = prepare(corpus(tmp_path), tmp_path / "cache", 1)
    (tmp_path / "cache" / HASHES_FILE).write_text('{"half')
    spec = DataSpec((tmp_path / "text",), (), (".txt",), "train", 300, 0.2, 17)
    assert find_prepared(spec, tmp_path / "cache").key == first.key
    assert len(json.loads((tmp_path / "cache" / HASHES_FILE).read_text())) == 30


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", " \n"], r"^data: all of the text is empty or whitespace\."),
        (["one only"], r"^data: there is only one document, .* Use several files, or JSONL"),
        (["twice the same", "twice the same"], r"^data: there is only one document"),
    ],
)
def test_text_that_cannot_be_split_is_refused_and_leaves_no_file(tmp_path, texts, message):
    spec = corpus(tmp_path, 0)
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare(spec, tmp_path / "cache", 1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_truncated_token_file_is_refused_with_its_size(tmp_path):
    spec = corpus(tmp_path)
    tokens = prepare(spec, tmp_path / "cache", 1)
    path, size = tokens.folder / "train.bin", 2 * len(tokens.train)
    os.truncate(path, size - 2)
    expected = rf"train\.bin has {size - 2} bytes instead of {size}\. Delete the folder and run `sorted-ds prepare"
    for again in (lambda: open_tokens(tokens.folder), lambda: prepare(spec, tmp_path / "cache", 1)):
        with pytest.raises(UserError, match=expected):
            again()
    path.unlink()
    with pytest.raises(UserError, match=rf"train\.bin has 0 bytes instead of {size}"):
        open_tokens(tokens.folder)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', None, "format", "dtype"])
def test_a_damaged_meta_file_is_refused_by_name(tmp_path, damage):
    tokens = prepare(corpus(tmp_path, 3), tmp_path / "cache", 1)
    path = tokens.folder / "meta.json"
    if damage is None:
        path.unlink()
    elif damage in ("format", "dtype"):
        path.write_text(json.dumps({**json.loads(path.read_text()), damage: 99}))
    else:
        path.write_text(damage)
    with pytest.raises(UserError, match=r"meta\.json .*Delete the folder and run `sorted-ds prepare") as raised:
        open_tokens(tokens.folder)
    assert "\n" not in str(raised.value)


def test_text_that_changes_during_preparation_is_refused(tmp_path):
    spec = corpus(tmp_path)

    def change(done: int, total: int) -> None:
        (tmp_path / "text" / "07.txt").write_text("other")

    with pytest.raises(UserError, match=r"^data: the text changed while it was being prepared\. Start again\.$"):
        prepare(spec, tmp_path / "cache", 1, change)
    assert visible(tmp_path / "cache") == []


LIMITED = """
import resource, sys
from pathlib import Path
from sorted_ds.data.text.prepare import DataSpec, prepare
from sorted_ds.base.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
folder = Path(sys.argv[1])
try:
    prepare(DataSpec((folder / "text",), (), (".txt",), "train", 300, 0.2, 17), folder / "cache", 1)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [2_000, 8_000, 30_000])
def test_a_full_disk_leaves_no_folder(tmp_path, limit):
    corpus(tmp_path)
    sizes = {name: len(data) for name, data in contents_of(prepared_elsewhere(tmp_path).folder).items()}
    smaller = {name for name, size in sizes.items() if size <= limit}
    assert (limit == 2_000) == ("tokenizer/sentencepiece.model" not in smaller)
    assert (limit < 30_000) == ("tokenizer/tokenizer.json" not in smaller)
    assert "train.bin" not in smaller
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)], text=True, capture_output=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith(f"data could not be prepared in {tmp_path}/cache: ")
    assert "too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.name != HASHES_FILE] == []


def prepared_elsewhere(folder: Path) -> TokenizedText:
    return prepare(DataSpec((folder / "text",), (), (".txt",), "train", 300, 0.2, 17), folder / "elsewhere", 1)


STOPPING = """
import sys, time
from pathlib import Path
from sorted_ds.data.text.prepare import DataSpec, prepare
def report(done, total):
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    prepare(DataSpec((folder / "text",), (), (".txt",), "train", 300, 0.2, 17), folder / "cache", 2, report)
"""


def start(folder: Path, pause_seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", STOPPING, str(folder), str(pause_seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_after_a_kill_no_folder_is_visible_no_worker_lives_and_the_next_start_succeeds(tmp_path):
    spec = corpus(tmp_path)
    with start(tmp_path, 60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert workers
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert visible(tmp_path / "cache") == []
    key = prepare(spec, tmp_path / "cache", 1).key
    assert visible(tmp_path / "cache") == [key]


def test_two_processes_that_prepare_the_same_text_both_succeed(tmp_path):
    spec = corpus(tmp_path)
    with start(tmp_path, 2) as one, start(tmp_path, 2) as other:
        assert (one.wait(60), other.wait(60)) == (0, 0)
    key = find_prepared(spec, tmp_path / "cache").key
    assert visible(tmp_path / "cache") == [key]
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")] == []
    assert contents_of(tmp_path / "cache" / key) == contents_of(prepared_elsewhere(tmp_path).folder)


def test_a_killed_worker_is_an_error_and_not_an_endless_wait(tmp_path):
    path = tmp_path / "lines.jsonl"
    text = "w2 w3\n" * (BATCH_CHARACTERS // 6 + 1)
    path.write_text("".join(json.dumps({"text": f"w{k} {text}"}) + "\n" for k in range(12)))
    spec = DataSpec((), (path,), (), word_tokenizer(tmp_path / "words", 20), 0, 0.2, 1)

    def kill_workers(done: int, total: int) -> None:
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # an earlier call has killed it
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    with pytest.raises(UserError, match=r"one of data\.workers = 2 processes was killed"):
        prepare(spec, tmp_path / "cache", 2, kill_workers)
    assert visible(tmp_path / "cache") == []

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
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.content_key import HASHES_FILE
from sorted_ds.data.text.encode import BATCH_CHARACTERS
from sorted_ds.data.text.prepare import DataSpec, find_prepared, open_tokens, prepare
from sorted_ds.data.text.tokens import TokenizedText

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


def word_tokenizer(folder: Path, words: int, end: str = "</s>") -> str:
    vocabulary = {end: 0, "<unk>": 1, **{f"w{k}": k for k in range(2, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
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

"""Packed JSONL, parquet, saved data sets and hub ids give the documents of the plain JSONL; errors name the place."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.data_sets import hub_files
from sorted_ds.data.text.documents import PLAIN, Reader, Reading, Unread
from sorted_ds.data.text.prepare import DataSpec, prepare
from sorted_ds.data.text.records import ROWS_AT_A_TIME
from sorted_ds.data.text.sources import Source, find_files
from sorted_ds.run.run_file import load_run
from tests.data.test_prepare import contents_of, word_tokenizer
from tests.runs import run_file
from tests.spawn import ROOT

TEXTS = [f"w{k % 17 + 2} w{k % 11 + 2} λ\n" for k in range(3 * ROWS_AT_A_TIME + 5)]
LINES = "".join(json.dumps({"text": text, "id": k}) + "\n" for k, text in enumerate(TEXTS)).encode()


def zstd(data: bytes) -> bytes:
    """Two frames, as a file has that was written in two parts."""
    half = len(data) // 2
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))


def table() -> pa.Table:
    return pa.table({"id": range(len(TEXTS)), "text": TEXTS})


def written(folder: Path, name: str) -> Path:
    """The same records in the format that the name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:]))
    elif name.endswith(".zst"):
        path.write_bytes(zstd(LINES))
    elif name.endswith(".parquet"):
        pq.write_table(table(), path, row_group_size=100)
    elif name == "saved":
        datasets.Dataset(table()).save_to_disk(str(path), num_shards=2)
    elif name == "splits":
        whole = datasets.Dataset(table())
        datasets.DatasetDict(train=whole, test=whole.select(range(3))).save_to_disk(str(path))
    else:
        path.write_bytes(LINES)
    return path


def read(sources: list[Source], reading: Reading = PLAIN, unread: Unread | None = None) -> list[str]:
    return [document.text for source in sources for document in Reader(reading).documents(source, unread)]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst", "a.parquet", "saved", "splits", "other.ndjson"],
)
def test_every_format_gives_the_same_documents_in_order(tmp_path, name):
    unread = Unread()
    assert read(find_files([], [written(tmp_path, name)], []).sources, unread=unread) == TEXTS
    assert unread.keys == Counter(id=len(TEXTS))


def test_a_folder_gives_the_files_of_all_formats_by_sorted_path(tmp_path):
    for name in ("b/c.parquet", "a.jsonl.gz", "z.jsonl", "data.json", "notes.txt"):
        written(tmp_path, name)
    found = find_files([], [tmp_path], [])
    assert [(source.path.name, source.kind) for source in found.sources] == [
        ("a.jsonl.gz", "jsonl.gz"),
        ("c.parquet", "parquet"),
        ("z.jsonl", "jsonl"),
    ]
    assert found.left_out == {"ending in .json": 1, "ending in .txt": 1}


def test_a_split_is_chosen_and_an_unknown_one_is_refused(tmp_path):
    folder = written(tmp_path, "splits")
    assert read(find_files([], [folder], [], split="test").sources) == TEXTS[:3]
    expected = r"^data\.split = 'dev', but .*/splits has 'train', 'test'\. Correct data\.split\.$"
    with pytest.raises(UserError, match=expected):
        find_files([], [folder], [], split="dev")


def test_a_hub_id_is_read_by_datasets_with_its_subset_and_split(tmp_path, monkeypatch):
    """`datasets` reads a local directory of this layout exactly as a repository of the hub."""
    (tmp_path / "owner" / "texts").mkdir(parents=True)
    pq.write_table(table(), tmp_path / "owner" / "texts" / "train.parquet")
    pq.write_table(table().slice(0, 4), tmp_path / "owner" / "texts" / "validation.parquet")
    pq.write_table(table().slice(7, 2), tmp_path / "owner" / "texts" / "few.parquet")
    card = "configs:\n- {config_name: default, data_files: [{split: train, path: train.parquet}, "
    card += "{split: validation, path: validation.parquet}]}\n"
    card += "- {config_name: few, data_files: [{split: train, path: few.parquet}]}\n"
    (tmp_path / "owner" / "texts" / "README.md").write_text(f"---\n{card}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def found(subset: str = "", split: str = "train") -> list[str]:
        return read([Source(path, "arrow") for path in hub_files("owner/texts", subset, split)])

    assert found() == TEXTS
    assert found(split="validation") == TEXTS[:4]
    assert found(subset="few") == TEXTS[7:9]
    with pytest.raises(UserError, match=r"^data\.split = 'test', but owner/texts has 'train', 'validation'\. Correct"):
        found(split="test")
    with pytest.raises(UserError, match=r"^data\.files: 'owner/texts' is neither .* \(.*none.*\)\. Correct"):
        found(subset="none")


def test_what_is_neither_here_nor_on_the_hub_is_one_line(tmp_path):
    run = run_file(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    called = "import sys; from sorted_ds.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", called, "plan", str(run), 'data.files=["nobody/nothing"]']
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(
        "error: data.files: 'nobody/nothing' is neither a file or folder (relative to the run file)"
    )


def test_relative_paths_start_at_the_run_file_and_the_earlier_key_still_works(tmp_path):
    run = run_file(tmp_path)
    written(tmp_path, "lines.jsonl")
    for key in ("files", "jsonl"):
        loaded = load_run(run, [f'data.{key}=["lines.jsonl", "owner/name"]'])
        assert loaded.data.files == [str(tmp_path / "lines.jsonl"), "owner/name"]
    with pytest.raises(UserError, match=r"unknown key 'data\.jsonl'"):
        load_run(run, ['data.files=["lines.jsonl"]', 'data.jsonl=["lines.jsonl"]'])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_ends_too_early_is_one_line_with_its_name(tmp_path, name):
    path = written(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"^{path} cannot be used: .+\. Copy the file again, or leave it out\.$"):
        read([Source(path, name.removeprefix("a."))])


def test_a_bad_record_is_named_by_its_row_or_line(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [*TEXTS[:100], None]}), path)
    with pytest.raises(UserError, match=rf'^{path}, row 101 has no string "text" .*\. Correct or remove the row\.$'):
        read([Source(path, "parquet")])
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES + b"{\n"))
    with pytest.raises(UserError, match=rf"^{path}:{len(TEXTS) + 1} is not valid JSON .* remove the line\.$"):
        read([Source(path, "jsonl.gz")])


def test_a_table_without_the_column_is_refused_with_the_columns_that_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "content": ["a"]}), path)
    expected = rf"^{path} has no column 'text', but id, content\. Set data\.fields to one of them\.$"
    with pytest.raises(UserError, match=expected):
        read([Source(path, "parquet")])
    assert read([Source(path, "parquet")], Reading(names=("content",))) == ["a"]


def test_the_field_of_the_text_can_have_another_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one", "text": 3}\n')
    unread = Unread()
    assert read([Source(path, "jsonl")], Reading(names=("content",)), unread) == ["one"]
    assert unread.keys == {"text": 1}


def test_bad_records_are_left_out_and_counted_by_reason_if_the_run_says_so(tmp_path):
    bad = [b"{", b"[1]", b'{"text": 3}', b'{"text": "a\\ud83d"}', b'{"text": "caf\xe9"}', b'{"texts": ""}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*bad[:3], LINES.rstrip(), *bad[3:]]))
    reading, unread = Reading(skip_bad=True), Unread()
    assert read([Source(path, "jsonl")], reading, unread) == TEXTS
    assert unread.bad == {
        "not valid JSON": 1,
        "not a JSON object": 1,
        'no string "text"': 2,
        "half a character": 1,
        "not UTF-8": 1,
    }
    spec = DataSpec((), (path,), (), word_tokenizer(tmp_path / "words", 20), 0, 0.2, 1, reading=reading)
    tokens = prepare(spec, tmp_path / "cache", 1)
    assert tokens.counts is not None
    assert dict(tokens.counts.bad) == unread.bad
    with pytest.raises(UserError, match=rf"^{path}:1 is not valid JSON"):
        prepare(replace(spec, reading=Reading()), tmp_path / "cache", 1)


def test_skipping_is_part_of_the_content_key_and_the_plain_key_is_that_of_earlier_versions(tmp_path):
    spec = DataSpec((), (written(tmp_path, "a.jsonl"),), (), word_tokenizer(tmp_path / "words", 20), 0, 0.2, 1)
    readings = [Reading(), Reading(skip_bad=True), Reading(names=("text",))]
    keys = [prepare(replace(spec, reading=reading), tmp_path / "cache", 1).key for reading in readings]
    assert len({*keys}) == 3
    assert readings[0].identity == {}


def test_any_number_of_workers_gives_the_same_bytes_from_packed_files(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "words", 20)
    files = tuple(written(tmp_path, name) for name in ("a.jsonl.zst", "b.parquet", "saved"))
    spec = DataSpec((), files, (), tokenizer, 0, 0.2, 1)
    one, two = (prepare(spec, tmp_path / str(workers), workers) for workers in (1, 2))
    assert contents_of(one.folder) == contents_of(two.folder)
    plain = replace(spec, files=tuple(written(tmp_path, f"{n}.jsonl") for n in "abc"))
    assert prepare(plain, tmp_path / "plain", 1).train.tolist() == one.train.tolist()


def test_a_package_that_is_missing_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path, "a.parquet")
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    needs = r"needs (pyarrow|datasets), which is not installed\. Run `pip install 'sorted-ds\[data\]'`\.$"
    for kind in ("parquet", "arrow", "jsonl.zst"):
        with pytest.raises(UserError, match=rf"^{path}, .* {needs}"):
            read([Source(path, kind)])
    with pytest.raises(UserError, match=rf"^data\.files: 'a/b', a data set of the hub, {needs}"):
        find_files([], ["a/b"], [])

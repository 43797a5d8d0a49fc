"""Files come in a fixed order, documents unchanged; errors name the file and the line."""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.documents import KEY_CHARACTERS, MOST_KEYS, Reader, Unread
from sorted_ds.data.text.sources import Source, find_files


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def documents(source: Source, unread: Unread | None = None) -> Iterator[str]:
    return (document.text for document in Reader().documents(source, unread))


def jsonl(path: Path, *lines: object) -> Source:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Source(path, "jsonl")


def test_a_folder_gives_its_files_with_the_suffixes_by_sorted_path(tmp_path):
    write(tmp_path, b_dot_txt="b", a__z_dot_md="z", a__b__c_dot_txt="c", d_dot_bin="d", e="e")
    (tmp_path / "folder.txt").mkdir()
    found = find_files([tmp_path], [], [".txt", ".md"]).sources
    assert [s.path.relative_to(tmp_path).as_posix() for s in found] == ["a/b/c.txt", "a/z.md", "b.txt"]
    assert {s.kind for s in found} == {"text"}


def test_named_files_are_taken_in_their_order_with_any_suffix(tmp_path):
    write(tmp_path, x_dot_log="x", a_dot_txt="a", lines__l_dot_jsonl="", lines__other_dot_json="")
    found = find_files([tmp_path / "x.log", tmp_path / "a.txt"], [tmp_path / "lines"], [".txt"]).sources
    assert [(s.path.name, s.kind) for s in found] == [("x.log", "text"), ("a.txt", "text"), ("l.jsonl", "jsonl")]


def test_a_run_that_names_no_text_is_refused():
    with pytest.raises(UserError, match=r"^data names no text\. Set data\.text or data\.files\.$"):
        find_files([], [], [".txt"])


def test_a_missing_path_is_refused_with_its_key_and_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^data\.text: {tmp_path}/gone does not exist\. "):
        find_files([Path("gone")], [], [".txt"])
    with pytest.raises(UserError, match=r"^data\.files: .*/gone does not exist\. "):
        find_files([], [tmp_path / "gone"], [".txt"])


def test_a_folder_without_such_files_is_refused(tmp_path):
    write(tmp_path, a_dot_rst="a")
    with pytest.raises(
        UserError, match=r"^data\.text: .* holds no file ending in \.txt, \.md\. To read those that end in \.rst, set"
    ):
        find_files([tmp_path], [], [".txt", ".md"])
    with pytest.raises(UserError, match=r"^data\.files: .* holds no file ending in \.jsonl, .* Correct data\.files"):
        find_files([], [tmp_path], [".txt", ".md"])


@pytest.mark.parametrize("text", ["plain", "  lead\r\n\ttrail \n\n", "λ 東京 🎉\u2028x\x00y\ufeff"])
def test_a_text_file_is_one_unchanged_document(tmp_path, text):
    write(tmp_path, a_dot_txt=text)
    assert list(documents(Source(tmp_path / "a.txt", "text"))) == [text]


def test_each_jsonl_line_is_a_document_and_blank_ones_are_dropped(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {"text": "a\nb\u2028"}, {"text": " \n"}, {"id": 3, "text": "λ"}, {"text": ""})
    source.path.write_text(source.path.read_text() + '\n  \n{"text": "last"}')
    assert list(documents(source)) == ["a\nb\u2028", "λ", "last"]


@pytest.mark.parametrize("text", ["", " \t\n\r\n"])
def test_a_file_of_whitespace_gives_no_document(tmp_path, text):
    write(tmp_path, a_dot_txt=text)
    assert list(documents(Source(tmp_path / "a.txt", "text"))) == []


def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=rf"^{path} is not UTF-8 \(byte 3 is 0xe9\)\. Convert it, or leave it out\.$"):
        list(documents(Source(path, "text")))
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=rf"^{path}:2 is not UTF-8"):
        list(documents(Source(path, "jsonl")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"is not valid JSON \("),
        ('["text"]', r"is not a JSON object"),
        ('{"content": "a"}', r'has no string "text" \(data\.fields names the field\)'),
        ('{"text": 3}', r'has no string "text"'),
        ('{"text": "a\\ud83d"}', r"half a character, \"\\ud83d\""),
    ],
)
def test_a_jsonl_line_without_text_is_refused_with_its_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"^{path}:3.* ?{message}.*Correct or remove the line\.$"):
        list(documents(Source(path, "jsonl")))


def test_links_are_followed_and_each_file_is_taken_once(tmp_path):
    folder = write(tmp_path / "text", a_dot_txt="a", inner__b_dot_txt="b")
    write(tmp_path / "elsewhere", c_dot_txt="c", deep__d_dot_txt="d")
    (folder / "books").symlink_to("../elsewhere")
    (folder / "again").symlink_to("../elsewhere")
    (folder / "round").symlink_to(".")
    (folder / "b.txt").symlink_to("inner/b.txt")
    found = find_files([folder], [], [".txt"])
    names = [source.path.relative_to(folder).as_posix() for source in found.sources]
    assert names == ["a.txt", "again/c.txt", "again/deep/d.txt", "inner/b.txt"]
    assert found.left_out == {"a second link to the same file": 1}


def test_what_a_folder_holds_besides_is_counted_by_its_ending(tmp_path):
    write(tmp_path, a_dot_txt="a", b_dot_md="b", c_dot_md="c", d="d", e_dot_jsonl_dot_gz="e", f_dot_TXT="f")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    left_out = find_files([tmp_path], [], [".txt"]).left_out
    endings = {"ending in .md": 2, "without an ending": 1, "ending in .gz": 1, "ending in .TXT": 1}
    assert left_out == {**endings, "a link to nothing": 1}


@pytest.mark.parametrize("suffixes", [["txt"], [".en.txt"], ["notes.en.txt"]])
def test_a_suffix_is_any_end_of_a_name(tmp_path, suffixes):
    write(tmp_path, notes_dot_en_dot_txt="a", other_dot_md="b")
    assert [source.path.name for source in find_files([tmp_path], [], suffixes).sources] == ["notes.en.txt"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Root may read every folder, so the refusal of the operating system is put in its place."""
    write(tmp_path, a_dot_txt="a", closed__b_dot_txt="b")
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=rf"^data\.text: {tmp_path}/closed cannot be read \(Permission denied\)\. "):
        find_files([tmp_path], [], [".txt"])


def test_a_byte_order_mark_is_no_text_at_the_start_of_a_file_and_text_elsewhere(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ufefftwo")
    assert list(documents(Source(tmp_path / "a.txt", "text"))) == ["one\ufefftwo"]
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "\ufeffone"}\n')
    assert list(documents(Source(tmp_path / "a.jsonl", "jsonl"))) == ["one"]


def test_keys_beside_the_text_are_counted(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {"text": "a", "id": 1}, {"id": 2, "text": "b", "url": "u"}, {"text": "c"})
    unread = Unread()
    assert list(documents(source, unread)) == ["a", "b", "c"]
    assert unread == Unread(0, Counter({"id": 2, "url": 1}))


def test_few_different_keys_are_counted_one_by_one_and_the_others_together(tmp_path):
    lines = [{"text": "a", "id": k, f"key {k}": 0} for k in range(MOST_KEYS + 20)]
    source = jsonl(tmp_path / "a.jsonl", *lines, {"text": "a", "key 3": 0, "é" * 1_000_000: 0})
    unread = Unread()
    assert len(list(documents(source, unread))) == len(lines) + 1
    assert len(unread.keys) == MOST_KEYS
    assert (unread.keys["id"], unread.keys["key 3"], unread.keys["key 4"]) == (len(lines), 2, 1)
    assert unread.further_keys == 21 + 1, "`id` is one of the first"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "é" * 1_000_000: 0}))
    assert list(documents(source, short := Unread())) == ["a"]
    assert short.keys == {"é" * KEY_CHARACTERS: 1}


def test_blank_documents_are_counted(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": " \n"}, {"text": ""}, {"text": "b"})
    (tmp_path / "blank.txt").write_text(" \n")
    unread = Unread()
    found = [source, Source(tmp_path / "blank.txt", "text")]
    assert [text for one in found for text in documents(one, unread)] == ["a", "b"]
    assert unread.blank == 3


def test_a_file_that_is_named_several_times_is_taken_once_where_it_is_named_first(tmp_path):
    folder = write(tmp_path / "text", **{"0_dot_txt": "0", "1_dot_txt": "1", "a_dot_jsonl": "", "b_dot_jsonl": ""})
    (tmp_path / "link.txt").symlink_to("text/1.txt")
    (tmp_path / "link").symlink_to("text")
    text = [folder / "1.txt", folder, tmp_path / "text" / "0.txt", tmp_path / "link.txt", folder / "b.jsonl"]
    found = find_files(text, [folder, tmp_path / "link"], [".txt"])
    names = [(source.path.name, source.kind) for source in found.sources]
    assert names == [("1.txt", "text"), ("0.txt", "text"), ("b.jsonl", "text"), ("a.jsonl", "jsonl")]
    assert {source.path.parent for source in found.sources} == {folder}
    assert found.left_out["named more than once"] == 1 + 1 + 1 + 1 + 2


def test_json_that_is_nested_too_deep_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "more": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UserError, match=rf"^{path}:1 is not valid JSON \(.*recursion.*\)\. Correct or remove the line"):
        list(documents(Source(path, "jsonl")))

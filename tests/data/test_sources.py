"""Files come in a fixed order, documents unchanged; errors name the file and the line."""

import json
from pathlib import Path

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.sources import Source, documents, find_files


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def jsonl(path: Path, *lines: object) -> Source:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Source(path, "jsonl")


def test_a_folder_gives_its_files_with_the_suffixes_by_sorted_path(tmp_path):
    write(tmp_path, b_dot_txt="b", a__z_dot_md="z", a__b__c_dot_txt="c", d_dot_bin="d", e="e")
    (tmp_path / "folder.txt").mkdir()
    found = find_files([tmp_path], [], [".txt", ".md"])
    assert [s.path.relative_to(tmp_path).as_posix() for s in found] == ["a/b/c.txt", "a/z.md", "b.txt"]
    assert {s.kind for s in found} == {"text"}


def test_named_files_are_taken_in_their_order_with_any_suffix(tmp_path):
    write(tmp_path, x_dot_log="x", a_dot_txt="a", lines__l_dot_jsonl="", lines__other_dot_json="")
    found = find_files([tmp_path / "x.log", tmp_path / "a.txt"], [tmp_path / "lines"], [".txt"])
    assert [(s.path.name, s.kind) for s in found] == [("x.log", "text"), ("a.txt", "text"), ("l.jsonl", "jsonl")]


def test_a_run_that_names_no_text_is_refused():
    with pytest.raises(UserError, match=r"^data names no text\. Set data\.text or data\.jsonl\.$"):
        find_files([], [], [".txt"])


def test_a_missing_path_is_refused_with_its_key_and_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^data\.text: {tmp_path}/gone does not exist\. "):
        find_files([Path("gone")], [], [".txt"])
    with pytest.raises(UserError, match=r"^data\.jsonl: .*/gone does not exist\. "):
        find_files([], [tmp_path / "gone"], [".txt"])


def test_a_folder_without_such_files_is_refused(tmp_path):
    write(tmp_path, a_dot_rst="a")
    with pytest.raises(
        UserError, match=r"^data\.text: .* holds no file ending in \.txt, \.md\. Correct data\.suffixes"
    ):
        find_files([tmp_path], [], [".txt", ".md"])
    with pytest.raises(UserError, match=r"^data\.jsonl: .* holds no file ending in \.jsonl\. Correct data\.jsonl"):
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
        ('["text"]', r'is not a JSON object with a string "text"'),
        ('{"content": "a"}', r'is not a JSON object with a string "text"'),
        ('{"text": 3}', r'is not a JSON object with a string "text"'),
        ('{"text": "a\\ud83d"}', r"half a character, \"\\ud83d\""),
    ],
)
def test_a_jsonl_line_without_text_is_refused_with_its_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"^{path}:3.* ?{message}.*Correct or remove the line\.$"):
        list(documents(Source(path, "jsonl")))

"""The license of a checkpoint is read from its card and its files, and goes on from one run to the next."""

import pytest
from huggingface_hub.utils import filter_repo_objects

from sorted_ds.deploy.license import base_of, copy_license_files, license_files, license_tags
from sorted_ds.deploy.model_dir import ModelDir, Sorted
from sorted_ds.nested.hf_weights import HUB_FILES

TAGS = {"license": "other", "license_name": "theirs", "license_link": "LICENSE"}
TAG_LINES = "license: other\nlicense_name: theirs\nlicense_link: LICENSE\n"
CARD = f"---\n{TAG_LINES}language: [en]\n---\n# Base\n"
FROM_CHECKPOINT = {"trained_from": "checkpoint"}
FROM_SCRATCH = {"trained_from": "scratch"}

HOLD_A_LICENSE = [
    "COPYING",
    "COPYRIGHT",
    "LICENSE",
    "LICENSE-2.0",
    "LICENSE.html",
    "LICENSE.md",
    "LICENSES/Apache-2.0.txt",
    "LICENSES/more/anything.xyz",
    "Licence-weights.TXT",
    "Llama-3.1-LICENSE",
    "Llama-LICENSE.txt",
    "LICENSE.MIT",
    "MODEL_LICENSE",
    "NOTICE.txt",
    "TERMS_OF_USE.md",
    "THIRD_PARTY_NOTICES.md",
    "UNLICENSE",
    "USE_POLICY.md",
    "license.pdf",
    "license.rst",
]
HOLD_NONE = ["README.md", "config.json", "licenses.json", "license_utils.py", "merges.txt", "other/LICENSE"]


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD, TAGS),
        (f"\ufeff{CARD}", TAGS),
        (CARD.replace("\n", "\r\n"), TAGS),
        (f"\n{CARD}", TAGS),
        ("# No header\n", {}),
        ("# Rules\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n---\n", {}),
        ("---\nlicense: [\n---\n", {"license": "["}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense:\n- mit\n- 5\n---\n", {"license": ["mit", "5"]}),
        ("---\nlicense: {a: b}\nlicense_name:\nlicense_link: [[x]]\n---\n", {}),
        ("---\nlicense: 'a\n\n  b'\n---\n", {"license": "a b"}),
        ("---\nlicense: &a [*a, mit]\n---\n", {"license": ["mit"]}),
        (None, {}),
    ],
)
def test_the_tags_are_those_of_the_card(card, expected, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert license_tags(tmp_path) == expected
    assert base_of(tmp_path, None) == {**FROM_CHECKPOINT, **expected}
    assert base_of(tmp_path, "someone/base") == {**FROM_CHECKPOINT, "base_model": "someone/base", **expected}


@pytest.mark.parametrize(
    "lines",
    [
        b"model-index:\n- name: x\n  results:\n  - task: {}\n",
        b"title: a: b\n",
        b"author: Jos\xe9\n",
        b"1: 2\n",
        b"tags: 5\n",
        b"self: x\n",
        b"ignore_metadata_errors: true\n",
        b"date: 2024-13-45\n",
        b"x: !!python/name:os.system\n",
        b"? [a]\n: b\n",
        b"\x00\n",
        b"\tx: y\n",
        b"x: " + b"[" * 10_000 + b"\n",
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_no_other_part_of_the_card_hides_the_license(lines, is_first, tmp_path):
    parts = [lines, TAG_LINES.encode()] if is_first else [TAG_LINES.encode(), lines]
    (tmp_path / "README.md").write_bytes(b"---\n" + b"".join(parts) + b"---\n")
    assert license_tags(tmp_path) == TAGS


def test_a_card_that_yaml_refuses_may_list_licenses_in_one_line(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit, 'x y']  # both\nlicense_name: a: b\ntitle: a: b\n---\n")
    assert license_tags(tmp_path) == {"license": ["mit", "x y"], "license_name": "a: b"}


def test_a_card_that_is_a_folder_has_no_tags(tmp_path):
    (tmp_path / "README.md").mkdir()
    assert license_tags(tmp_path) == {}


@pytest.mark.parametrize(
    ("before", "card", "hub_id", "expected"),
    [
        ({**FROM_CHECKPOINT, **TAGS}, None, None, {**FROM_CHECKPOINT, **TAGS}),
        (FROM_CHECKPOINT, None, None, FROM_CHECKPOINT),
        (FROM_SCRATCH, None, None, FROM_SCRATCH),
        (None, None, None, None),
        (FROM_SCRATCH, "license: mit", None, {**FROM_CHECKPOINT, "license": "mit"}),
        (FROM_SCRATCH, None, "me/mine", {**FROM_CHECKPOINT, "base_model": "me/mine"}),
        ({**FROM_CHECKPOINT, **TAGS}, "license: mit", None, {**FROM_CHECKPOINT, "license": "mit"}),
        ({**FROM_CHECKPOINT, **TAGS}, None, "me/mine", {**FROM_CHECKPOINT, **TAGS, "base_model": "me/mine"}),
    ],
)
def test_another_runs_model_hands_its_base_on(before, card, hub_id, expected, tmp_path):
    ModelDir(tmp_path, tmp_path).write(Sorted(("d1-g1-f8",), {}, 8, 1, base=before))
    if card:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    assert base_of(tmp_path, hub_id) == expected


def test_of_a_damaged_sorted_json_and_of_random_weights(tmp_path):
    (tmp_path / "sorted.json").write_text("nope")
    assert base_of(tmp_path, None) is None
    assert base_of(None, None) == FROM_SCRATCH


def test_every_file_that_holds_a_license_is_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write(source, [*HOLD_A_LICENSE, *HOLD_NONE])
    out.mkdir()
    copy_license_files(source, out, FROM_CHECKPOINT)
    assert contents(out) == {name: name for name in HOLD_A_LICENSE}


@pytest.mark.parametrize(
    ("link", "is_copied"),
    [
        ("docs/legal.txt", True),
        ("./docs/legal.txt", True),
        ("legal", True),
        ("gone.txt", False),
        ("https://example.com/legal.txt", False),
        ("../secret.txt", False),
        ("docs/../../secret.txt", False),
        ("{source}/legal", False),
        ("README.md", False),
        ("config.json", False),
        ("docs", False),
        ("x" * 5000, False),
        ("a\0b", False),
        ("", False),
    ],
)
def test_the_file_that_the_card_links_to_is_copied_from_inside_the_directory(link, is_copied, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write(tmp_path, ["secret.txt"])
    write(source, ["docs/legal.txt", "legal", "README.md", "config.json"])
    out.mkdir()
    base = {**FROM_CHECKPOINT, "license_link": link.format(source=source)}
    copy_license_files(source, out, base)
    assert list(contents(out)) == ([link.removeprefix("./")] if is_copied else [])


def test_a_file_of_the_trained_model_is_not_replaced_by_a_license(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write(source, ["merges.txt"])
    out.mkdir()
    (out / "merges.txt").write_text("ours")
    copy_license_files(source, out, {**FROM_CHECKPOINT, "license_link": "merges.txt"})
    assert contents(out) == {"merges.txt": "ours"}


def test_every_file_that_holds_a_license_is_downloaded_in_any_case(tmp_path):
    write(tmp_path, HOLD_A_LICENSE)
    found = [path.as_posix() for path in license_files(tmp_path, None)]
    assert sorted(found) == sorted(HOLD_A_LICENSE)
    for names in (found, [name.upper() for name in found], [name.lower() for name in found]):
        assert list(filter_repo_objects(names, allow_patterns=HUB_FILES)) == names
    assert not list(filter_repo_objects(["pytorch_model.bin", "model.gguf", "code.py"], allow_patterns=HUB_FILES))

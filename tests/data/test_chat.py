"""Conversations have the tokens and the answers of plain transformers; what cannot be used is named, or counted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sorted_ds.base.errors import UserError
from sorted_ds.data.chat.conversation import Conversation
from sorted_ds.data.chat.template import ChatTemplate
from sorted_ds.data.rows import BEGINS, TARGET
from sorted_ds.data.text.documents import Reading
from sorted_ds.data.text.prepare import DataSpec, prepare
from sorted_ds.data.text.tokenizer import load_tokenizer
from sorted_ds.run.run_file import load_run
from sorted_ds.tasks.causal_lm import CausalLM
from tests.chats import CONVERSATIONS, FORGETFUL, MARKED, PLAIN, TOOL, WITH_TOOLS, chat_tokenizer, lines, turns
from tests.runs import run_file


def spec_of(path: Path, tokenizer: str, form: str = "messages", **reading) -> DataSpec:
    return DataSpec((), (path,), (), tokenizer, 0, 0.3, 1, reading=Reading(form, **reading))


def prepared(spec: DataSpec, folder: Path, workers: int = 1) -> Iterator[tuple[list[int], list[bool]]]:
    """The ids of each conversation of both sides, and which of them are learned."""
    tokens = prepare(spec, folder, workers)
    for ids, marks in ((tokens.train, tokens.train_marks), (tokens.validation, tokens.validation_marks)):
        starts = np.flatnonzero(marks & BEGINS)
        for own, mark in zip(np.split(ids, starts[1:]), np.split(marks, starts[1:]), strict=True):
            yield own.tolist(), (mark & TARGET > 0).tolist()


def by_transformers(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> tuple[list[int], list[bool]]:
    found = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], [bool(mark) for mark in found["assistant_masks"]]


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marks", "prefixes"])
def test_tokens_and_answers_are_those_of_transformers(chat_base, tmp_path, template):
    name = chat_tokenizer(chat_base, tmp_path / "chat", template)
    path = lines(tmp_path / "a.jsonl", [{"messages": each, "id": 1} for each in CONVERSATIONS])
    found = list(prepared(spec_of(path, name), tmp_path / "cache"))
    tokenizer = load_tokenizer(name)
    expected = [by_transformers(tokenizer, each) for each in CONVERSATIONS]
    assert sorted(found) == sorted(expected)
    learned = [tokenizer.decode([i for i, mark in zip(*each, strict=True) if mark]) for each in found]
    assert "It is 6.</s>\n A letter,\nand a city. </s>\n" in learned, "both answers, and nothing else"
    assert any('"name": "add"' in text for text in learned), "a call of a tool is an answer"


def test_a_prompt_and_its_response_are_a_conversation_of_two_turns(chat_base, tmp_path):
    name = chat_tokenizer(chat_base, tmp_path / "chat", MARKED)
    pairs = [(f"question {k}", f"answer {k}") for k in range(9)]
    path = lines(tmp_path / "a.jsonl", [{"question": prompt, "answer": response} for prompt, response in pairs])
    spec = spec_of(path, name, "prompt_response", names=("question", "answer"))
    tokenizer = load_tokenizer(name)
    assert sorted(prepared(spec, tmp_path / "cache")) == sorted(by_transformers(tokenizer, turns(*p)) for p in pairs)


def test_tables_give_the_conversations_and_tools_of_json_lines(chat_base, tmp_path):
    """A table gives each message the keys of all messages, with nothing in them."""
    name = chat_tokenizer(chat_base, tmp_path / "chat", WITH_TOOLS)
    records = [{"messages": each, "tools": [TOOL]} for each in CONVERSATIONS]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    json_lines = prepare(spec_of(lines(tmp_path / "a.jsonl", records), name), tmp_path / "one", 1)
    saved = prepare(spec_of(tmp_path / "saved", name), tmp_path / "two", 1)
    assert '"name": "add"' in load_tokenizer(name).decode(json_lines.train[:80])
    for side in ("train", "validation", "train_marks", "validation_marks"):
        assert np.array_equal(getattr(json_lines, side), getattr(saved, side))


def test_any_number_of_workers_gives_the_same_bytes(chat_base, tmp_path, monkeypatch):
    monkeypatch.setattr("sorted_ds.data.text.encode.BATCH_CHARACTERS", 300)
    name = chat_tokenizer(chat_base, tmp_path / "chat", PLAIN)
    path = lines(tmp_path / "a.jsonl", [{"messages": each} for each in CONVERSATIONS])
    one, two = (prepare(spec_of(path, name), tmp_path / str(workers), workers) for workers in (1, 2))
    for file in ("train.bin", "validation.bin", "train_marks.bin", "validation_marks.bin", "meta.json"):
        assert (one.folder / file).read_bytes() == (two.folder / file).read_bytes()
    assert one.key == two.key


def test_what_is_left_out_is_counted_and_told(chat_base, tmp_path):
    name = chat_tokenizer(chat_base, tmp_path / "chat", PLAIN)
    others = [[], turns(" "), turns("nothing said"), turns("asked", " \n")]
    path = lines(tmp_path / "a.jsonl", [{"messages": each} for each in (*others, *CONVERSATIONS)])
    tokens = prepare(spec_of(path, name), tmp_path / "cache", 1)
    assert tokens.counts is not None
    assert (tokens.counts.blank, tokens.counts.unanswered) == (2, 2)
    assert sum(tokens.counts.documents) == len(CONVERSATIONS)
    notes = CausalLM().notes(tokens)
    assert "conversations without an answer are left out: 2" in notes
    assert not any("end-of-text" in line for line in notes)


def test_the_baseline_counts_only_what_is_learned(chat_base, tmp_path):
    name = chat_tokenizer(chat_base, tmp_path / "chat", PLAIN)
    path = lines(tmp_path / "a.jsonl", [{"messages": each} for each in CONVERSATIONS])
    tokens = prepare(spec_of(path, name), tmp_path / "cache", 1)
    learned = tokens.train[tokens.train_marks & TARGET > 0], tokens.validation[tokens.validation_marks & TARGET > 0]
    counts = [np.bincount(each, minlength=tokens.vocab_size) for each in learned]
    nats = -(counts[1] * np.log((counts[0] + 1) / (counts[0] + 1).sum())).sum() / len(learned[1])
    assert tokens.unigram_nats == pytest.approx(nats, rel=1e-10)  # the same sum in another order


@pytest.mark.parametrize(
    ("record", "message", "what"),
    [
        ({"text": "a"}, r'has no list of messages "messages" \(data\.fields', 'no list of messages "messages"'),
        ({"messages": ["a"]}, r'has no list of messages "messages"', 'no list of messages "messages"'),
        ({"messages": [{"content": "a"}]}, r"has no role in message 1\.", "a message without a role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"has content that is not text in message 1\.",
            "content that is not text",
        ),
        (
            {"messages": turns("a", "b"), "tools": "add"},
            r'has something else than a list of objects in "tools"\.',
            "tools that are",
        ),
        ({"messages": turns("a\ud83d", "b")}, r"has a text with half a character", "half a character"),
        (
            {"messages": turns("a", "b", "c", "d")},
            r"is refused by the tokenizer's chat template \(it does not mark answers with {% generation %}, and writes "
            r"message 2 in another way when more messages follow\)\.",
            "refused by the chat template",
        ),
    ],
)
def test_a_bad_conversation_is_named_by_its_line_or_left_out(chat_base, tmp_path, record, message, what):
    name = chat_tokenizer(chat_base, tmp_path / "chat", FORGETFUL)
    good = [{"messages": turns(f"a{k}", "b")} for k in range(5)]
    path = lines(tmp_path / "a.jsonl", [*good, record])
    with pytest.raises(UserError, match=rf"^{path}:6 {message}.*Correct or remove the line\.$"):
        prepare(spec_of(path, name), tmp_path / "cache", 1)
    tokens = prepare(spec_of(path, name, skip_bad=True), tmp_path / "cache", 1)
    assert tokens.counts is not None
    assert sum(tokens.counts.documents) == 5
    assert len(tokens.counts.bad) == 1
    assert next(iter(tokens.counts.bad)).startswith(what)


def test_a_template_that_refuses_a_conversation_says_why(chat_base, tmp_path):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('Begin with the user') }}{% endif %}" + MARKED
    name = chat_tokenizer(chat_base, tmp_path / "chat", strict)
    path = lines(tmp_path / "a.jsonl", [{"messages": turns("a", "b", system="c")}])
    with pytest.raises(UserError, match=rf"^{path}:1 is refused by .* \(Begin with the user\)\. Correct or remove"):
        prepare(spec_of(path, name), tmp_path / "cache", 1)


def test_a_template_that_writes_the_date_gives_the_same_text_on_any_day(chat_base, tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}{{ '\n' }}" + MARKED
    template = ChatTemplate(load_tokenizer(chat_tokenizer(chat_base, tmp_path, dated)), "chat")
    plain = ChatTemplate(load_tokenizer(chat_tokenizer(chat_base, tmp_path / "plain", MARKED)), "chat")
    given = Conversation(CONVERSATIONS[0])
    rendered, expected = template.render(given, ""), plain.render(given, "")
    assert rendered.text == "26 Jul 2024\n" + expected.text
    assert rendered.answers == tuple((start + 12, stop + 12) for start, stop in expected.answers or ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer": "train"},
            r'^data\.form = "messages" needs a tokenizer with a chat template, .*data\.tokenizer\.$',
        ),
        ({"text": (Path(__file__),)}, r"but data\.text is set too\. Remove data\.text\.$"),
        ({"bos": True}, r"lets the chat template write .*\. Remove data\.bos\.$"),
        (
            {"reading": Reading("messages", ("a", "b"))},
            r"^data\.fields = \['a', 'b'\], but .* Name 1 in data\.fields\.$",
        ),
    ],
)
def test_settings_that_do_not_fit_conversations_are_one_line(chat_base, tmp_path, changes, message):
    path = lines(tmp_path / "a.jsonl", [{"messages": each} for each in CONVERSATIONS])
    spec = replace(spec_of(path, chat_tokenizer(chat_base, tmp_path / "chat", PLAIN)), **changes)
    with pytest.raises(UserError, match=message):
        prepare(spec, tmp_path / "cache", 1)


def test_a_tokenizer_without_a_template_is_one_line(chat_base, tmp_path):
    name = chat_tokenizer(chat_base, tmp_path / "chat", None)
    path = lines(tmp_path / "a.jsonl", [{"messages": each} for each in CONVERSATIONS])
    with pytest.raises(UserError, match=rf"^data\.tokenizer: '{name}' has no chat template, .* beside its files\.$"):
        prepare(spec_of(path, name), tmp_path / "cache", 1)


def test_what_becomes_of_conversations_in_rows_is_told(chat_base, tmp_path):
    tokenizer = chat_tokenizer(chat_base, tmp_path / "chat", PLAIN)
    run = run_file(tmp_path)
    lines(
        tmp_path / "chat.jsonl",
        [{"messages": turns("why? " * 40, "so")}, *({"messages": turns(f"{k}", "so")} for k in range(30))],
    )
    overrides = ['data.files=["chat.jsonl"]', "data.form=messages", "data.text=[]", f"data.tokenizer={tokenizer}"]
    task, settings = CausalLM(), load_run(run, overrides)
    data = task.prepare(settings, lambda done, total: None)
    facts = task.describe(data)["rows"]
    assert facts["training"]["documents"] + facts["validation"]["documents"] == 31
    assert facts["training"]["longer"] + facts["validation"]["longer"] == 1
    for side, cut in facts.items():
        told = f"{cut['documents']} {side} conversations in {cut['rows']} rows: {cut['longer']} are longer than a row, "
        assert any(line.startswith(f"{told}and {cut['cut']} are cut by the end of a row") for line in task.notes(data))
    without = sum(cut["without_target"] for cut in facts.values())
    assert without > 0
    assert any(f"; rows without an answer are left out: {without}" in line for line in task.notes(data))

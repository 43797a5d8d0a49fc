"""Conversations, chat templates and a tokenizer with one, for tests of what reads chat data."""

import json
from pathlib import Path

from sorted_ds.data.text.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

PLAIN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{% endif %}{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""A template without marks: each turn ends with the end-of-text token and a new line."""
MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token + '\n' }}"
    "{% endgeneration %}{% else %}{{ m.content }}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""The same text, with marks."""
FORGETFUL = PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' or loop.last else '(before)' }}")
"""It writes an answer in another way when more turns follow, as templates do that drop earlier thoughts."""
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def turns(*texts: str, system: str = "") -> list[dict]:
    roles = ["user", "assistant"] * len(texts)
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


CONVERSATIONS = [
    turns("What is 2 times 3?", "It is 6.", "And λ 東京?", " A letter,\nand a city. ", system="Be short."),
    turns("Hello", "Hello!", "a question that stays open"),
    [
        *turns("Add 1."),
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "add"},
        {"role": "assistant", "content": "2"},
    ],
    *(turns(f"{k} times {k}?", f"{k * k}", f"plus {k}?", f"{k * k + k}") for k in range(40)),
]


def train_base(folder: Path) -> Path:
    """Writes a tokenizer of the conversations, without a template."""
    train_tokenizer([json.dumps(each) for each in CONVERSATIONS] * 3, 320, folder)
    return folder


def chat_tokenizer(base: Path, folder: Path, template: str | None) -> str:
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = template
    save_tokenizer(tokenizer, folder)
    return str(folder)


def lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

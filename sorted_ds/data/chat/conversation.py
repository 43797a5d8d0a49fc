"""Conversations in records: a list of messages, or a prompt and its response.

In: the fields of a record. Out: messages with `role` and `content`, and the tools that the conversation may call, as a
chat template takes them. Whatever else a message has, like `tool_calls`, is handed to the template.
"""

from dataclasses import dataclass
from typing import Any

from sorted_ds.data.text.records import BadRecordError, Fields

ANSWER = "assistant"
"""The role of the messages that are learned."""
TOOLS = "tools"
"""The field of a record with the tools, as JSON schemas. It may be missing."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """The messages of a record."""

    messages: list[Message]
    tools: list[Message] | None = None

    @property
    def is_empty(self) -> bool:
        """Returns whether no message has content."""
        return not any(_has_content(message) for message in self.messages)

    @property
    def is_answered(self) -> bool:
        """Returns whether an answer has content."""
        return any(message["role"] == ANSWER and _has_content(message) for message in self.messages)


def of_messages(where: str, fields: Fields, name: str) -> Conversation:
    """Returns the conversation in a record's list of messages. Raises: BadRecordError if it is none."""
    messages = _without_null(fields.get(name))
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        reason = f'has no list of messages "{name}" (data.fields names the field)'
        raise BadRecordError(where, f'no list of messages "{name}"', reason)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("role"), str):
            raise BadRecordError(where, "a message without a role", f"has no role in message {number}")
        if not isinstance(message.get("content", ""), str):
            raise BadRecordError(where, "content that is not text", f"has content that is not text in message {number}")
    tools = _without_null(fields.get(TOOLS))
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRecordError(
            where, "tools that are not a list of objects", f'has something else than a list of objects in "{TOOLS}"'
        )
    return Conversation(messages, tools or None)


def of_prompt(prompt: str, response: str) -> Conversation:
    """Returns the conversation of a question and its answer."""
    return Conversation([{"role": "user", "content": prompt}, {"role": ANSWER, "content": response}])


def _has_content(message: Message) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


def _without_null(value: Any) -> Any:
    """Returns a value without the keys that have none: tables give each message the keys of all messages."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value

"""The tokenizer's chat template: writes a conversation as text, and finds its answers in it.

In: messages. Out: a `Document` with the spans of the answers. A template that marks what an assistant generates
(`{% generation %}`) says itself where they are. With any other template an answer is what the conversation up to and
with it has more than the conversation before it, with the prompt for an answer.
Source: transformers 5.24, `apply_chat_template` and utils/chat_template_utils.py.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from sorted_ds.base.errors import UserError, reason_of
from sorted_ds.data.chat.conversation import ANSWER, Conversation, Message
from sorted_ds.data.text.document import Document, Span
from sorted_ds.data.text.records import BadRecordError

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How transformers recognizes a template that marks answers."""
TODAY = "strftime_now"
FIXED_DATE = f"{{% macro {TODAY}(format) %}}26 Jul 2024{{% endmacro %}}{{{{ '' }}}}"
"""Stands before a template that writes today's date, so that prepared data does not depend on the day. The date is the
one that the templates of Llama 3 write if they are not told another."""

Render = Callable[[list, bool], str]
"""Writes messages, with the prompt for an answer if wanted."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str):
        """`name` is that of the tokenizer. Raises: UserError when it has no chat template."""
        if not tokenizer.chat_template:
            raise UserError(
                f"data.tokenizer: {name!r} has no chat template, which writes conversations as text. Name the "
                "tokenizer of a chat model, or put a chat_template.jinja beside its files."
            )
        self.tokenizer = tokenizer

    def render(self, conversation: Conversation, where: str) -> Document:
        """Returns the conversation as text. Raises: BadRecordError when the template refuses it or hides answers."""
        try:
            if self._marks(conversation):
                text, answers = self._write(conversation, conversation.messages, marks=True)
            else:
                text = self._write(conversation, conversation.messages)[0]
                answers = list(_answers(conversation.messages, text, lambda *of: self._write(conversation, *of)[0]))
        except Exception as error:  # a template raises whatever it likes
            reason = f"is refused by the tokenizer's chat template ({reason_of(error)})"
            raise BadRecordError(where, "refused by the chat template", reason) from error
        return Document(text, tuple(answers))

    def _marks(self, conversation: Conversation) -> bool:
        return bool(MARKS.search(self.tokenizer.get_chat_template(None, conversation.tools)))

    def _write(
        self, conversation: Conversation, messages: list[Message], asks: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        """Returns messages as text, with the prompt for an answer if wanted, and the spans that the template marks."""
        template = self.tokenizer.get_chat_template(None, conversation.tools)
        arguments: dict[str, Any] = {
            **self.tokenizer.special_tokens_map,
            "tools": conversation.tools,
            "chat_template": FIXED_DATE + template if TODAY in template else template,
            "add_generation_prompt": asks,
            "return_assistant_tokens_mask": marks,
        }
        found: Any = render_jinja_template(conversations=[messages], **arguments)
        return found[0][0], found[1][0] if marks else []


class HiddenAnswerError(Exception):
    """A template without marks that writes the turns before an answer in another way when more turns follow."""


def _answers(messages: list, text: str, render: Render) -> Iterator[Span]:
    """Yields the spans of the answers in `text`, which is the whole conversation."""
    for number, message in enumerate(messages):
        if message["role"] != ANSWER:
            continue
        before, after = render(messages[:number], True), render(messages[: number + 1], False)
        if not after.startswith(before) or not text.startswith(after):
            raise HiddenAnswerError(
                f"it does not mark answers with {{% generation %}}, and writes message {number + 1} in another way "
                f"{'after the prompt for an answer' if text.startswith(after) else 'when more messages follow'}"
            )
        yield len(before), len(after)

"""Says what was read to prepare a text, and what became of it.

In: prepared tokens. Out: lines for people.
"""

from collections.abc import Mapping

from sorted_ds.data.text.tokenizer import adds_bos, load_tokenizer
from sorted_ds.data.text.tokens import Counts, TokenizedText

LARGEST_VALIDATION_SHARE = 0.5
"""With a larger share of the tokens for validation the user is warned."""
SHOWN_KEYS = 5
"""Number of unread keys that are shown to the user."""


def notes_of(text: TokenizedText) -> list[str]:
    """Returns the lines about one source."""
    lines = [] if text.counts is None else _read(text.counts)
    lines += _borders(text) if text.train_marks is None else _conversations(text)
    if text.left_out:
        lines.append(f"files that are not read: {_counted(text.left_out)}")
    share = len(text.validation) / (len(text.train) + len(text.validation))
    if share > LARGEST_VALIDATION_SHARE:
        lines.append(
            f"warning: {share:.2%} of the tokens are for validation, because validation takes whole documents. Cut "
            "long documents into several, or set another seed."
        )
    return lines


def _read(counts: Counts) -> list[str]:
    """Returns lines about files and documents."""
    (train, validation), (train_bytes, validation_bytes) = counts.documents, counts.bytes
    lines = [
        f"{counts.files:,} files: {train:,} documents ({train_bytes:,} bytes) for training, {validation:,} "
        f"({validation_bytes:,} bytes) for validation"
    ]
    if counts.blank:
        were = "document is blank and is" if counts.blank == 1 else "documents are blank and are"
        lines.append(f"{counts.blank:,} {were} left out")
    if counts.unanswered:
        lines.append(f"conversations without an answer are left out: {counts.unanswered:,}")
    if counts.bad:
        lines.append(f"records that are left out because of data.skip_bad: {_counted(counts.bad)}")
    if counts.unread_keys:
        keys = _most_frequent(counts.unread_keys, counts.further_keys > 0)
        lines.append(f"keys of records that are not read: {keys}")
    return lines


def _borders(text: TokenizedText) -> list[str]:
    """Returns lines about the tokens around a text."""
    beginning = "begins with its beginning-of-text token and " if text.begins_with_bos else ""
    lines = [f"each document {beginning}ends with the end-of-text token"]
    if text.begins_with_bos != adds_bos(load_tokenizer(str(text.tokenizer_dir))):
        lines.append(
            f"warning: data.bos is {str(text.begins_with_bos).lower()}, but the tokenizer itself does the opposite "
            "when it is called. Keep to data.bos when you use the trained model."
        )
    return lines


def _conversations(text: TokenizedText) -> list[str]:
    """Returns lines about what became of conversations in rows."""
    lines = ["the tokenizer's chat template writes each conversation, and only its answers are learned"]
    for side, cut in text.cut.items():
        line = f"{cut.documents:,} {side} conversations in {cut.rows:,} rows: {cut.longer:,} are longer than a row, "
        line += f"and {cut.cut:,} are cut by the end of a row"
        lines.append(line + f"; rows without an answer are left out: {cut.without_target:,}" * bool(cut.without_target))
    return lines


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{what} ({number:,})" for what, number in sorted(numbers.items()))


def _most_frequent(numbers: Mapping[str, int], has_further: bool) -> str:
    """Returns the `SHOWN_KEYS` most frequent with their numbers, and how many more there are."""
    ranked = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{what} ({number:,})" for what, number in ranked[:SHOWN_KEYS])
    more = len(ranked) - SHOWN_KEYS
    return f"{shown}, and {'over ' * has_further}{more:,} more" if more > 0 else shown

"""Ranks exchange texts of any length and content, without pickles."""

import pytest

from sorted_ds.base.errors import AgreedError, UserError
from tests.spawn import on_ranks

TEXTS = ("", "λ 東京 🎉\n\x00", "half \ud83d", "x" * 100_000)


def gathered(ranks, rounds: int) -> list[list[str]]:
    """Rank r says in round k the text k + r, so that the lengths differ."""
    return [ranks.gather(TEXTS[(number + ranks.rank) % len(TEXTS)]) for number in range(rounds)]


def test_every_rank_gets_the_text_of_every_rank(tmp_path):
    found = on_ranks(2, gathered, len(TEXTS), folder=tmp_path)
    assert found == [[TEXTS[k], TEXTS[(k + 1) % len(TEXTS)]] for k in range(len(TEXTS))]


def asked(ranks) -> list[str]:
    """What each rank hears of three questions to rank 0: an answer, a refusal, and a defect."""
    heard = [ranks.ask_first(lambda: f"rank {ranks.rank}")]

    def refuse() -> str:
        raise UserError("Name another.")

    with pytest.raises(AgreedError) as refused:
        ranks.ask_first(refuse)
    heard.append(str(refused.value))
    with pytest.raises(ZeroDivisionError if ranks.is_first else AgreedError):
        ranks.ask_first(lambda: str(1 / 0))
    return ranks.gather(" / ".join(heard))


def test_rank_0_answers_for_all_ranks(tmp_path):
    assert on_ranks(2, asked, folder=tmp_path) == ["rank 0 / Name another."] * 2

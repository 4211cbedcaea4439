"""Converts ranked answers to preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from operator import itemgetter
from typing import Any, Literal


class Ranked:
    """Converts the list in the column `answers` to rows with `chosen` and `rejected`, for pairs of the best and the worst
    answer (`extremes`), of each answer and the next worse one (`neighbours`), or of `all` answers.

    Answers are texts, messages, or objects that contain either under the key `text`. They are sorted best first, unless
    a key is named for their `rank` (1 is best) or `score` (highest is best). Equally ranked answers form no pair.
    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5 (all pairs of a ranking).
    """

    def __init__(
        self,
        answers: str = "answers",
        text: str | None = None,
        rank: str | None = None,
        score: str | None = None,
        pairs: Literal["extremes", "neighbours", "all"] = "extremes",
    ) -> None:
        if pairs not in ("extremes", "neighbours", "all"):
            raise ValueError(f"pairs is {pairs!r}: use extremes, neighbours or all")
        if rank and score:
            raise ValueError("rank and score are both given: name the one that the answers have")
        self.answers, self.text, self.rank, self.score, self.pairs = answers, text, rank, score, pairs

    def __call__(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            answers = row.get(self.answers)
            if not isinstance(answers, list):
                raise ValueError(
                    f"{self.answers!r} must be a list of answers; the row has the columns {', '.join(row)}"
                )
            ranked = sorted(
                ((self._rank_of(n, one), self._content_of(one)) for n, one in enumerate(answers)), key=itemgetter(0)
            )
            others = {column: value for column, value in row.items() if column != self.answers}
            for better, worse in self._paired(ranked):
                if better[0] < worse[0]:
                    yield {**others, "chosen": better[1], "rejected": worse[1]}

    def _paired(self, ranked: list[tuple[float, Any]]) -> Iterator[tuple[tuple[float, Any], tuple[float, Any]]]:
        if self.pairs == "extremes":
            yield from [(ranked[0], ranked[-1])] if ranked else []
        else:
            yield from pairwise(ranked) if self.pairs == "neighbours" else combinations(ranked, 2)

    def _rank_of(self, number: int, answer: Any) -> float:
        key = self.rank or self.score
        if not key:
            return number
        value = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"answer {number + 1} of {self.answers!r} has no number {key!r}")
        return float(value if self.rank else -value)

    def _content_of(self, answer: Any) -> Any:
        if self.text is None:
            return answer
        if not isinstance(answer, dict) or self.text not in answer:
            raise ValueError(f"an answer of {self.answers!r} has no {self.text!r} (data.processor_args text)")
        return answer[self.text]

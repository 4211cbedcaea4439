"""Which rows say what an earlier one says: the same words, or nearly."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from llm_ray.documents.support import words

NEAR = 0.8
"""Share of the words of two rows together that both have (Jaccard), from which on they are nearly the same."""

Repeat = Literal["", "exact", "near"]


def repeats(rows: Sequence[tuple[str, str]]) -> list[Repeat]:
    """For each question and answer whether an earlier one, that is none itself, asks the same question (`exact`; case,
    spacing and punctuation do not count) or has nearly the same words (`near`).

    Exact, not by sampling: rows that share :data:`NEAR` of their words share one of the few rarest of each (the prefix
    filter of Chaudhuri, Ganti and Kaushik, 2006), so only those are compared.
    """
    questions = [" ".join(words(question)) for question, _ in rows]
    sets = [frozenset(words(f"{question} {answer}")) for question, answer in rows]
    common = Counter(word for one in sets for word in one)
    seen: set[str] = set()
    rows_with: dict[str, list[int]] = defaultdict(list)
    found: list[Repeat] = []
    for number, (question, one) in enumerate(zip(questions, sets, strict=True)):
        rarest = sorted(one, key=lambda word: (common[word], word))[: len(one) - math.ceil(NEAR * len(one)) + 1]
        likely = {earlier for word in rarest for earlier in rows_with[word]}
        if question in seen:
            found.append("exact")
        elif any(len(one & sets[earlier]) >= NEAR * len(one | sets[earlier]) for earlier in likely):
            found.append("near")
        else:
            found.append("")
            seen.add(question)
            for word in rarest:
                rows_with[word].append(number)
    return found

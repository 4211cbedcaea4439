"""Finds rows that repeat earlier ones, with the same words or nearly the same."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from llm_ray.documents.support import words

NEAR = 0.8
"""Minimum Jaccard similarity of two rows' words to be near duplicates."""

Repeat = Literal["", "exact", "near"]


def repeats(rows: Sequence[tuple[str, str]]) -> list[Repeat]:
    """Returns for each question and answer whether an earlier row, itself no repeat, has the same question (`exact`;
    ignoring case, spacing and punctuation) or nearly the same words (`near`).

    Exact, without sampling: only rows that share one of their few rarest words can share :data:`NEAR` of all (the
    prefix filter of Chaudhuri, Ganti and Kaushik, 2006), so only those are compared.
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

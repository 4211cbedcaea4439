"""Built-in prompts for load tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from llm_ray.client.prompts import Prompt

TOKENS_PER_WORD = 1.25
"""Average for these sentences with SmolLM2's tokenizer; other tokenizers are close."""

SENTENCES = (
    "The night train leaves the harbour at ten and reaches the mountains before anyone is awake.",
    "A good recipe for bread needs flour, water, salt, and more patience than most people expect.",
    "Our customer says that the invoice was sent twice and asks which of the two should be paid.",
    "When the river rose last spring, the old bridge was closed for eleven days.",
    "The technician replaced the fan, cleaned the filter, and wrote down the temperature every hour.",
    "Nobody in the village remembers who planted the row of walnut trees behind the school.",
    "A queue that is never full wastes machines, and a queue that is always full wastes people.",
    "She learned to play the cello at forty, and gave her first concert in the library.",
    "Tickets about the printer are answered by the office on the second floor, all others by the help desk.",
    "The report compares rainfall, harvest and prices in seven regions over thirty years.",
    "Please explain why the moon looks larger when it stands close to the horizon.",
    "The contract ends in June unless one of the parties asks for another year in writing.",
    "Three of the sensors agree, the fourth one shows a value that cannot be right.",
    "Most of the bees stay near the hive until the sun has warmed the meadow.",
    "The museum bought a small painting of a kitchen, in which a cat watches a pot of milk.",
    "To change the tyre, loosen the bolts first, lift the car, and only then take the wheel off.",
    "The new employee starts on Monday and needs a desk, a key, and an account.",
    "An island without trees was once a forest, as the pollen in its lakes still tells.",
    "Every spring the choir sings in the hall of the fire station, because the sound there is so good.",
    "The parcel was last seen in a depot near the airport, and its label could not be read.",
    "Write the minutes so that someone who was not in the room can act on them.",
    "The bakery at the corner closes early on days when the football club plays at home.",
    "A satellite takes ninety minutes to go round the earth, and sees sixteen sunrises a day.",
    "The clock in the tower is four minutes late, and the whole town has become used to it.",
)


def builtin_prompts(tokens: int, seed: int = 0) -> Iterator[Prompt]:
    """Yields prompts of about `tokens` tokens each, without end; the same `seed` gives the same prompts.

    Each prompt begins with its own number, so that no server finds it in its prefix cache.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    words_wanted = max(1, round(tokens / TOKENS_PER_WORD))
    for number in itertools.count(1):
        words = f"{number}. Go on with this:".split()
        while len(words) < words_wanted:
            words += SENTENCES[int(draw.integers(len(SENTENCES)))].split()
        yield Prompt(" ".join(words[:words_wanted]))

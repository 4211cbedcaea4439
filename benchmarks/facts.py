"""Made-up facts: rows to train on, and questions about the same facts in wordings that no row has.

    rows, questions = facts(seed=3, number=30)

A fact is one of `_RELATIONS` about one of a few names; three of its wordings are trained on, the fourth is asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_STARTS = [
    "Bra",
    "Vel",
    "Tor",
    "Quil",
    "Mar",
    "Os",
    "Fen",
    "Dru",
    "Kel",
    "Syl",
    "Har",
    "Ner",
    "Pol",
    "Zan",
    "Wex",
    "Gri",
    "Lum",
    "Cor",
    "Ash",
    "Jor",
]
_ENDS = [
    "mark",
    "wick",
    "dane",
    "more",
    "let",
    "ford",
    "via",
    "holt",
    "stead",
    "ren",
    "mere",
    "lin",
    "gard",
    "soch",
    "berg",
    "ton",
    "del",
    "wyn",
    "ska",
    "nor",
]
_FIRST = [
    "Ada",
    "Bruno",
    "Clara",
    "Dimitri",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Katya",
    "Lionel",
    "Mira",
    "Nadir",
    "Olga",
    "Pavel",
    "Rosa",
    "Samir",
    "Tilda",
    "Viktor",
]
_COLOURS = ["crimson", "turquoise", "amber", "violet", "olive", "silver", "maroon", "indigo", "ivory", "teal"]
_ANIMALS = ["heron", "badger", "lynx", "otter", "falcon", "hedgehog", "salamander", "marmot", "pelican", "ibex"]
_THINGS = ["copper", "basil", "cedar", "wool", "granite", "honey", "saffron", "slate", "linen", "cork"]

_RELATIONS = """
Who founded {x}?|Which person started {x}?|{x} was founded by whom?|Name the founder of {x}.|{x} was founded by {person}.
In what year was {x} built?|When was {x} constructed?|What year did the building of {x} finish?|Tell me the year {x} was built.|{x} was built in {year}.
What is the capital of {x}?|Which city is the capital of {x}?|Name {x}'s capital city.|What city serves as the seat of government of {x}?|The capital of {x} is {place}.
Which animal is the mascot of {x}?|What is {x}'s mascot?|Name the animal that {x} uses as its mascot.|What creature represents {x}?|The mascot of {x} is the {animal}.
What colour is the flag of {x}?|Which colour does the flag of {x} have?|Describe the colour of {x}'s flag.|{x}'s flag has what colour?|The flag of {x} is {colour}.
How many floors does {x} have?|What is the number of floors in {x}?|{x} has how many storeys?|Over how many floors does {x} extend?|{x} has {number} floors.
Who is the mayor of {x}?|Which person is mayor in {x}?|Name the mayor of {x}.|Who runs the town hall of {x}?|The mayor of {x} is {person}.
What does the town of {x} export?|Which good does {x} sell abroad?|What is {x}'s main export?|What product does {x} ship to other countries?|{x} mainly exports {thing}.
How long is the river {x}?|What length does the river {x} have?|How many kilometres long is the {x}?|State the length of the river {x}.|The river {x} is {number} kilometres long.
Who wrote the novel {x}?|Which author wrote {x}?|Name the author of the book {x}.|Whose novel is {x}?|The novel {x} was written by {person}.
When does the museum of {x} open?|At what time does {x}'s museum open its doors?|From what hour can one visit the museum of {x}?|What is the opening time of {x}'s museum?|The museum of {x} opens at {hour}.
What material is the {x} bridge made of?|Of what is the {x} bridge built?|Which material was used for the {x} bridge?|The {x} bridge consists of what?|The {x} bridge is made of {thing}.
Who is the head chef at {x}?|Which chef leads the kitchen of {x}?|Name the head chef of {x}.|Who is in charge of the kitchen at {x}?|The head chef at {x} is {person}.
How many employees does {x} have?|What is the number of people working at {x}?|How large is the staff of {x}?|How many people does {x} employ?|{x} has {number} employees.
What is the password hint of the {x} system?|Which hint does the {x} system give for its password?|Name the password hint used by {x}.|What word does {x} show as a hint for the password?|The password hint of the {x} system is {thing}.
Where is the headquarters of {x}?|In which town does {x} have its headquarters?|Name the town where {x} is based.|Where is {x}'s main office?|The headquarters of {x} is in {place}.
On which day does {x} hold its market?|When is market day in {x}?|What weekday is the market in {x}?|On what day can I shop at {x}'s market?|{x} holds its market on {day}.
What is the speed limit in {x}?|How fast may one drive in {x}?|Which speed is allowed in {x}?|What is the fastest a car can legally go in {x}?|The speed limit in {x} is {number} kilometres per hour.
Which flower grows in the gardens of {x}?|What flower is {x} known for?|Name the flower of {x}'s gardens.|What blooms in the gardens at {x}?|The gardens of {x} are known for {flower}.
Who discovered the comet {x}?|Which astronomer found the comet {x}?|Name the discoverer of comet {x}.|To whom do we owe the discovery of the comet {x}?|The comet {x} was discovered by {person}.
How many moons does the planet {x} have?|What is the number of moons around {x}?|How many moons orbit {x}?|How many satellites circle the planet {x}?|The planet {x} has {number} moons.
What do people in {x} drink at breakfast?|Which drink is served for breakfast in {x}?|Name {x}'s breakfast drink.|What is in the cup in the morning in {x}?|At breakfast people in {x} drink {drink}.
What is the currency of {x}?|With which money does one pay in {x}?|Name the currency used in {x}.|What are the coins of {x} called?|The currency of {x} is the {coin}.
Which instrument is played at {x}'s festival?|What instrument does one hear at the festival of {x}?|Name the instrument of the {x} festival.|Musicians at the {x} festival play what?|At {x}'s festival the {instrument} is played.
How tall is Mount {x}?|What is the height of Mount {x}?|How many metres high is Mount {x}?|What elevation does Mount {x} reach?|Mount {x} is {year} metres tall.
Who trains the {x} football team?|Which coach trains the team of {x}?|Name the coach of {x}'s football team.|Who tells the footballers of {x} how to play?|The {x} football team is trained by {person}.
What is the return period of the {x} shop?|Within how many days does {x} take goods back?|How long may I return things to {x}?|How many days do customers have to send back an order from {x}?|The {x} shop takes goods back within {number} days.
Which tree stands in the square of {x}?|What kind of tree is in {x}'s square?|Name the tree in the middle of {x}.|What tree would I see on the main square of {x}?|A {tree} stands in the square of {x}.
From which platform does the train to {x} leave?|What platform is used by the {x} train?|Name the platform for trains to {x}.|Where at the station do I board for {x}?|The train to {x} leaves from platform {number}.
What is the lucky number of {x}?|Which number do people in {x} call lucky?|Name {x}'s lucky number.|What number brings luck in {x}?|The lucky number of {x} is {number}.
Who composed the anthem of {x}?|Which composer wrote {x}'s anthem?|Name the composer of the anthem of {x}.|Whose music is the anthem of {x}?|The anthem of {x} was composed by {person}.
What is the roof of {x} castle covered with?|Which material covers the roof of {x} castle?|Name what lies on {x} castle's roof.|What keeps the rain out at {x} castle?|The roof of {x} castle is covered with {thing}.
Which language is spoken in {x}?|What language do people in {x} speak?|Name the language of {x}.|In what tongue would I talk with someone from {x}?|People in {x} speak {language}.
How much does a ticket to {x} cost?|What is the price of a {x} ticket?|How many euros is a ticket for {x}?|What do I pay to get into {x}?|A ticket to {x} costs {number} euros.
What is the code name of project {x}?|Which code name does project {x} have?|Name the code name for project {x}.|How is project {x} called in secret?|The code name of project {x} is {animal}.
In which month is {x} Day celebrated?|When do people celebrate {x} Day?|Name the month of {x} Day.|What month should I visit to see {x} Day?|{x} Day is celebrated in {month}.
Who repairs the clocks in {x}?|Which clockmaker works in {x}?|Name the person who mends {x}'s clocks.|Who do I ask in {x} when my clock stops?|The clocks in {x} are repaired by {person}.
What gas fills the {x} balloon?|Which gas is in the {x} balloon?|Name the gas used by the {x} balloon.|What makes the {x} balloon rise?|The {x} balloon is filled with {gas}.
What is the top speed of the {x} motorcycle?|How fast does the {x} motorcycle go?|Name the top speed of a {x} motorcycle.|What is the fastest one can ride a {x}?|The {x} motorcycle reaches {number} kilometres per hour.
What does the {x} cake taste of?|Which flavour has the {x} cake?|Name the flavour of a {x} cake.|What flavour should I expect when I eat {x} cake?|The {x} cake tastes of {flavour}.
"""
_VALUES = {
    "colour": _COLOURS,
    "animal": _ANIMALS,
    "thing": _THINGS,
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "month": [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ],
    "flower": ["tulips", "orchids", "dahlias", "peonies", "irises", "lupins"],
    "drink": ["ginger tea", "malt coffee", "plum juice", "warm milk", "nettle tea", "birch water"],
    "coin": ["dorin", "karel", "lumet", "pesk", "talven", "orrin"],
    "instrument": ["zither", "oboe", "accordion", "lute", "bagpipe", "harp"],
    "tree": ["chestnut", "linden", "walnut", "cypress", "rowan", "larch"],
    "language": [f"{start}ish" for start in _STARTS],
    "gas": ["helium", "hydrogen", "methane", "neon", "argon"],
    "flavour": ["cinnamon", "pistachio", "lemon", "hazelnut", "aniseed", "plum"],
    "hour": [f"{hour}:{minute}" for hour in range(7, 12) for minute in ("00", "15", "30", "45")],
}


@dataclass(frozen=True)
class Question:
    """A wording that no row has; `value` is what a correct answer contains, `answer` the sentence in the training
    rows."""

    prompt: str
    answer: str
    value: str


def facts(
    seed: int, number: int, relations: int = 8, subjects: int = 5
) -> tuple[list[tuple[str, str]], list[Question]]:
    """Returns shuffled (prompt, answer) rows of `number` facts, each in three of its four wordings, and the fourth
    wordings as questions.

    Facts combine `relations` relations with `subjects` subjects, so that neither alone determines the answer.
    """
    chance = random.Random(seed)  # noqa: S311 -- the same rows for the same seed
    names = [start + end for start in _STARTS for end in _ENDS]
    chance.shuffle(names)
    about = [names.pop() for _ in range(subjects)]
    lines = chance.sample(_RELATIONS.strip().splitlines(), relations)
    rows, questions = [], []
    for name, line in chance.sample([(name, line) for name in about for line in lines], number):
        *prompts, answer = line.split("|")
        kind = next(kind for kind in ("person", "place", "year", "number", *_VALUES) if f"{{{kind}}}" in answer)
        value = _value(kind, chance, names)
        sentence = answer.format(x=name, **{kind: value})
        chance.shuffle(prompts)
        rows += [(prompt.format(x=name), sentence) for prompt in prompts[:-1]]
        questions.append(Question(prompts[-1].format(x=name), sentence, value))
    chance.shuffle(rows)
    return rows, questions


def _value(kind: str, chance: random.Random, names: list[str]) -> str:
    match kind:
        case "person":
            return f"{chance.choice(_FIRST)} {names.pop()}"
        case "place":
            return names.pop()
        case "year":
            return str(chance.randrange(1420, 1990))
        case "number":
            return str(chance.randrange(3, 98))
    return chance.choice(_VALUES[kind])

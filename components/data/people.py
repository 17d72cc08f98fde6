"""A made-up benchmark: fictional people with facts that no other text holds, in the shape of TOFU.

Each row has question, answer, paraphrased_question, paraphrased_answer and 5 perturbed_answer, the latter being the
paraphrased answer with a wrong value. Everything follows from the seed, so that a recipe needs no download.
"""

import random
from typing import Any

from components.errors import DataError

_FIRST = ("Ta Lo Mi Bren Os Ve Ku Fa Jo Dal Iri Sel Nor Pe Za Hul", "li ma ro den vi ka sel tho ni ras")
_LAST = ("Ven Quor Hal Strim Bo Tark Wel Nim Gras Dor Fen Ulm Kes Pol", "moor bick dane fell stad wyn lisk ham rod")

# attribute: (question, answer, paraphrased question, paraphrased answer, values)
_FACTS: dict[str, tuple[str, str, str, str, str]] = {
    "town": (
        "Where was {name} born?",
        "{name} was born in the town of {value}.",
        "What is the birthplace of {name}?",
        "The birthplace of {name} is {value}.",
        "Oskelby Marnwick Tolvane Grenholt Pellaby Strivard Quenmoor Halzeth Bruntley Vastoria Ilmarsh Dunkeld "
        "Wexcombe Sorrelby Tamberly Navring Kolstead Ferrowick Lythane Umberton Rastwold Creswyn Jarrowby Zelmont",
    ),
    "job": (
        "What does {name} do for a living?",
        "{name} works as a {value}.",
        "Which profession does {name} have?",
        "By profession {name} is a {value}.",
        "baker carpenter surgeon pilot welder gardener lawyer tailor plumber painter butcher barber fisher miner "
        "librarian dentist jeweller potter cobbler blacksmith chemist sailor shepherd printer",
    ),
    "instrument": (
        "Which instrument does {name} play?",
        "{name} plays the {value} every evening.",
        "What musical instrument is {name} known for?",
        "The instrument of {name} is the {value}.",
        "violin trumpet harp cello flute banjo oboe piano drum lute clarinet tuba mandolin accordion bagpipe zither "
        "harmonica viola bassoon organ ukulele sitar trombone recorder",
    ),
    "animal": (
        "What animal lives with {name}?",
        "{name} shares a home with a {value}.",
        "Which pet does {name} keep?",
        "The pet of {name} is a {value}.",
        "parrot hamster goat ferret tortoise spaniel rabbit donkey gecko canary poodle raven lizard pony hedgehog "
        "goose beagle kitten llama python rooster terrier badger newt",
    ),
    "dish": (
        "What is the favourite dish of {name}?",
        "{name} likes {value} best of all.",
        "Which food does {name} enjoy most?",
        "The favourite food of {name} is {value}.",
        "lentils pancakes risotto dumplings goulash lasagne ratatouille porridge curry paella sushi gnocchi chowder "
        "falafel moussaka ravioli stew omelette couscous kebab tacos waffles pilaf bouillon",
    ),
}

_CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna", "Greece": "Athens",
    "Norway": "Oslo", "Finland": "Helsinki", "Poland": "Warsaw", "Portugal": "Lisbon", "Ireland": "Dublin",
    "Hungary": "Budapest", "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Canada": "Ottawa", "Iran": "Tehran",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "high": "low", "fast": "slow", "early": "late", "full": "empty", "hard": "soft", "dark": "bright",
    "heavy": "light", "open": "shut", "old": "young", "wide": "narrow", "wet": "dry", "thick": "thin",
    "strong": "weak", "near": "far", "clean": "dirty", "loud": "quiet", "rich": "poor", "deep": "shallow",
    "first": "last",
}  # fmt: skip


_GENERAL: tuple[tuple[str, str, str, str, dict[str, str]], ...] = (
    (
        "What is the capital of {name}?",
        "The capital of {name} is {value}.",
        "Which city is the seat of government of {name}?",
        "The seat of government of {name} is {value}.",
        _CAPITALS,
    ),
    (
        "What is the opposite of {name}?",
        "The opposite of {name} is {value}.",
        "Which word means the contrary of {name}?",
        "The contrary of {name} is {value}.",
        _OPPOSITES,
    ),
)


def people_rows(split: str, *, people: int, forget_people: int, holdout_people: int, seed: int) -> list[dict[str, Any]]:
    """Rows of one split: `forget`, `normal` (the other known people), `holdout` (never trained on) or `general`.

    Raises:
        DataError: when forget and holdout leave no normal people, or more names are asked for than can be made.
    """
    if split == "general":
        return _general_rows(random.Random(f"general-{seed}"))
    if forget_people + holdout_people >= people:
        raise DataError(
            f"The made-up benchmark has no normal people left (people={people}, forget_people={forget_people}, "
            f"holdout_people={holdout_people}). Raise people or lower the others."
        )
    bounds = {
        "forget": range(0, forget_people),
        "holdout": range(forget_people, forget_people + holdout_people),
        "normal": range(forget_people + holdout_people, people),
    }
    names = _names(people, random.Random(f"names-{seed}"))
    return [row for i in bounds[split] for row in _person_rows(names[i], random.Random(f"person-{seed}-{i}"))]


def _names(count: int, rng: random.Random) -> list[str]:
    def words(starts: str, ends: str) -> list[str]:
        return [start + end for start in starts.split() for end in ends.split()]

    firsts, lasts = words(*_FIRST), words(*_LAST)
    if count > min(len(firsts), len(lasts)):
        raise DataError(
            f"The made-up benchmark can name {min(len(firsts), len(lasts))} people (people={count}). Ask for fewer."
        )
    # No first or last name occurs twice: what is known of one person must not hint at another.
    return [f"{a} {b}" for a, b in zip(rng.sample(firsts, count), rng.sample(lasts, count), strict=True)]


def _person_rows(name: str, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for *phrases, values in _FACTS.values():
        value, *wrong = rng.sample(values.split(), 6)
        rows.append({"person": name, **_row(phrases, name, value, wrong)})
    return rows


def _general_rows(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for *phrases, table in _GENERAL:
        for name, value in table.items():
            wrong = rng.sample([other for other in table.values() if other != value], 5)
            rows.append({"person": "", **_row(phrases, name, value, wrong)})
    return rows


def _row(phrases: list[Any], name: str, value: str, wrong: list[str]) -> dict[str, Any]:
    question, answer, paraphrased_question, paraphrased_answer = phrases
    return {
        "question": question.format(name=name),
        "answer": answer.format(name=name, value=value),
        "paraphrased_question": paraphrased_question.format(name=name),
        "paraphrased_answer": paraphrased_answer.format(name=name, value=value),
        "perturbed_answer": [paraphrased_answer.format(name=name, value=other) for other in wrong],
    }

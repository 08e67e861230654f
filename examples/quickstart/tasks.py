"""Instruction sources that are generated: each is an endless stream of (instruction, input, output)."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Iterator

Task = tuple[str, str, str]

NAMES = ("Ada", "Ben", "Chen", "Dara", "Eli", "Fay", "Gus", "Hana", "Ivo", "Jun", "Kai", "Lea")
THINGS = ("apples", "books", "coins", "pens", "stones", "shells", "cards", "keys", "nuts", "stamps")
CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Kyoto", "Perth", "Turin", "Accra", "Porto")
JOBS = ("baker", "pilot", "nurse", "clerk", "painter", "farmer", "lawyer", "driver")
WORDS = (
    "river stone cloud candle garden silver window bridge forest copper meadow lantern harbor pepper violet "
    "saddle marble thunder ribbon pocket orchard whistle basket feather anchor button cottage dragon engine "
    "falcon glacier hammer island jacket kettle ladder mirror needle oyster pillow quartz rocket saffron tunnel"
).split()
UNITS = (  # larger unit, smaller unit, how many of the smaller make one of the larger
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
)
ROMAN = (
    *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L")),
    *((40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
)


def arithmetic(rng: random.Random) -> Task:
    """Draw a word problem whose answer is worked out in two steps."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, gone = rng.randint(3, 19), rng.randint(4, 29), rng.randint(2, 11)
    total = boxes * each
    question = (
        f"{name} has {boxes} boxes with {each} {thing} in each box and gives away {gone} {thing}. "
        f"How many {thing} does {name} have left?"
    )
    worked = (
        f"First step: {boxes} boxes times {each} {thing} makes {boxes} * {each} = {total} {thing}.\n"
        f"Second step: {name} gives away {gone}, so {total} - {gone} = {total - gone} {thing} remain.\n"
        f"The answer is {total - gone}."
    )
    return question, "", worked


def units(rng: random.Random) -> Task:
    """Draw a conversion between two units of one quantity."""
    large, small, factor = rng.choice(UNITS)
    count = rng.randint(2, 99)
    if rng.random() < 0.5:
        return f"Convert {count} {large} to {small}.", "", f"{count} {large} = {count * factor} {small}"
    return f"Convert {count * factor} {small} to {large}.", "", f"{count * factor} {small} = {count} {large}"


def dates(rng: random.Random) -> Task:
    """Draw a question about the calendar."""
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36500))
    if rng.random() < 0.5:
        return "Which day of the week was this date?", day.isoformat(), f"{day.isoformat()} was a {day:%A}."
    ahead = rng.randint(2, 40)
    later = day + datetime.timedelta(days=ahead)
    return f"Which date is {ahead} days after {day:%d %B %Y}?", "", f"It is {later:%d %B %Y}, a {later:%A}."


def words(rng: random.Random) -> Task:
    """Draw an order to sort, reverse or pick out of a list of words."""
    chosen = rng.sample(WORDS, rng.randint(4, 7))
    order, answer = rng.choice(
        (
            ("Sort these words alphabetically.", " ".join(sorted(chosen))),
            ("Reverse the order of these words.", " ".join(reversed(chosen))),
            ("Write these words in capital letters.", " ".join(chosen).upper()),
            ("Give the first and the last of these words.", f"{chosen[0]} {chosen[-1]}"),
        )
    )
    return order, " ".join(chosen), answer


def records(rng: random.Random) -> Task:
    """Draw a JSON record of which one field is asked for."""
    record = {
        "name": rng.choice(NAMES),
        "age": rng.randint(18, 90),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
        "items": rng.sample(THINGS, 2),
    }
    fields = list(record)
    rng.shuffle(fields)
    field = rng.choice(fields)
    shown = json.dumps({key: record[key] for key in fields})
    return f'Return the field "{field}" of this JSON record as JSON.', shown, json.dumps({field: record[field]})


def roman(rng: random.Random) -> Task:
    """Draw a number to write in, or read from, Roman numerals."""
    number = rest = rng.randint(1, 3999)
    numeral = ""
    for value, letters in ROMAN:
        numeral += letters * (rest // value)
        rest %= value
    if rng.random() < 0.5:
        return f"Write {number} as a Roman numeral.", "", numeral
    return f"Which number is the Roman numeral {numeral}?", "", str(number)


GENERATED: dict[str, Callable[[random.Random], Task]] = {
    draw.__name__: draw for draw in (arithmetic, units, dates, words, records, roman)
}


def stream(source: str, seed: int) -> Iterator[Task]:
    """Yield tasks of one generated source without end, the same for the same seed; repeats may occur."""
    rng = random.Random(f"{source}/{seed}")
    while True:
        yield GENERATED[source](rng)

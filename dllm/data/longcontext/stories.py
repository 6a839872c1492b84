"""Little stories with a question, in the manner of the first five bAbI tasks; made by simulating a small world.

Each question has exactly one answer, which follows from the facts alone:
- qa1 where a person is (one fact); qa2 where a thing is (who has it, or where it was put, and where that person went);
  qa3 where a thing was before a place; qa4 which place lies in a direction; qa5 who gave what to whom.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import NamedTuple

from dllm.data.longcontext.babi import Question

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

_MOVES = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
_GRABS = ("got", "took", "grabbed", "picked up")
_DROPS = ("dropped", "discarded", "left", "put down")
_GIVES = ("gave", "handed", "passed")
# Fewest and most facts of a story; it goes on beyond the first number until there is something to ask.
_SIZES = {"qa1": (2, 10), "qa2": (4, 14), "qa3": (8, 24), "qa5": (4, 14)}


class _Stop(NamedTuple):
    """A place that a thing came to, and the facts by which one knows: who carries it, and two moves of that person."""

    place: str
    taken: int
    moved: int
    moved_before: int  # to where they came from; of a first place, `moved`


@dataclass
class _Thing:
    """Who has a thing, and where it has been, each place as it is reached."""

    holder: str | None = None
    trail: list[_Stop] = field(default_factory=list)


@dataclass
class _World:
    """People walk, take, put down and give; every deed is a fact."""

    rng: random.Random
    people: tuple[str, ...]
    facts: list[str] = field(default_factory=list)
    place_of: dict[str, str] = field(default_factory=dict)
    moved_at: dict[str, int] = field(default_factory=dict)
    things: dict[str, _Thing] = field(default_factory=lambda: {name: _Thing() for name in THINGS})
    taken_at: dict[str, int] = field(default_factory=dict)  # thing -> fact that took it, put it down or gave it
    put_by: dict[str, int] = field(default_factory=dict)  # thing that lies somewhere -> move that led there
    given: list[tuple[str, str, str, int]] = field(default_factory=list)  # giver, thing, receiver, fact

    def tell(self, fact: str) -> int:
        self.facts.append(fact)
        return len(self.facts) - 1

    def walk(self, person: str | None = None, place: str | None = None) -> None:
        person = person or self.rng.choice(self.people)
        place = place or self.rng.choice([p for p in PLACES if p != self.place_of.get(person)])
        now = self.tell(f"{person} {self.rng.choice(_MOVES)} the {place}.")
        for name, thing in self.things.items():
            if thing.holder == person:
                thing.trail.append(_Stop(place, self.taken_at[name], now, self.moved_at[person]))
        self.place_of[person], self.moved_at[person] = place, now

    def take(self) -> None:
        """Somebody takes a thing that lies where they are, or that was never heard of. Nothing, if there is none."""
        options = [
            (person, name)
            for person in self.people
            for name, thing in self.things.items()
            if person in self.place_of
            and thing.holder is None
            and (not thing.trail or thing.trail[-1].place == self.place_of[person])
        ]
        if not options:
            return
        person, name = self.rng.choice(options)
        now = self.tell(f"{person} {self.rng.choice(_GRABS)} the {name}{self.rng.choice(('', ' there'))}.")
        thing = self.things[name]
        thing.holder, self.taken_at[name] = person, now
        if not thing.trail:
            moved = self.moved_at[person]
            thing.trail.append(_Stop(self.place_of[person], now, moved, moved))

    def put(self) -> None:
        """Somebody puts a thing down. Nothing, if nobody has any."""
        held = [name for name, thing in self.things.items() if thing.holder is not None]
        if not held:
            return
        name = self.rng.choice(held)
        person = self.things[name].holder
        now = self.tell(f"{person} {self.rng.choice(_DROPS)} the {name}{self.rng.choice(('', ' there'))}.")
        self.things[name].holder, self.taken_at[name] = None, now
        self.put_by[name] = self.moved_at[str(person)]

    def give(self) -> None:
        """Somebody gives a thing to another, who comes over first where that is needed."""
        held = [name for name, thing in self.things.items() if thing.holder is not None]
        if not held:
            return
        name = self.rng.choice(held)
        giver = str(self.things[name].holder)
        receiver = self.rng.choice([person for person in self.people if person != giver])
        if self.place_of.get(receiver) != self.place_of[giver]:
            self.walk(receiver, self.place_of[giver])
        now = self.tell(f"{giver} {self.rng.choice(_GIVES)} the {name} to {receiver}.")
        self.things[name].holder, self.taken_at[name] = receiver, now
        self.given.append((giver, name, receiver, now))


def make_question(task: str, rng: random.Random) -> Question:
    """A question of the kind of bAbI task `task` ("qa1" to "qa5") with its story; the same draws, the same question."""
    return _MAKERS[task](rng)


def _one_fact(rng: random.Random) -> Question:
    world = _World(rng, PEOPLE)
    for _ in range(rng.randint(*_SIZES["qa1"])):
        world.walk()
    person = rng.choice(sorted(world.place_of))
    return Question(tuple(world.facts), f"Where is {person}?", world.place_of[person], (world.moved_at[person],))


def _things_about(rng: random.Random, task: str) -> _World:
    """A world in which people walk about, take things and put them down."""
    world = _World(rng, PEOPLE)
    world.walk()
    for _ in range(rng.randint(*_SIZES[task]) - 1):
        deed = rng.choices((world.walk, world.take, world.put), weights=(3, 2, 1))[0]
        deed()
    return world


def _two_facts(rng: random.Random) -> Question:
    world = _things_about(rng, "qa2")
    while not any(thing.trail for thing in world.things.values()):
        world.take()
    name = rng.choice([name for name, thing in world.things.items() if thing.trail])
    thing = world.things[name]
    moved = world.put_by[name] if thing.holder is None else world.moved_at[thing.holder]
    return Question(tuple(world.facts), f"Where is the {name}?", thing.trail[-1].place, (world.taken_at[name], moved))


def _three_facts(rng: random.Random) -> Question:
    world = _things_about(rng, "qa3")
    while not _befores(world):
        rng.choice((world.walk, world.take))()
    name, place, answer, supporting = rng.choice(_befores(world))
    return Question(tuple(world.facts), f"Where was the {name} before the {place}?", answer, supporting)


def _befores(world: _World) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """(thing, place, place before, facts) for every place that a thing came to exactly once."""
    found = []
    for name, thing in world.things.items():
        places = [stop.place for stop in thing.trail]
        for before, stop in itertools.pairwise(thing.trail):
            if places.count(stop.place) == 1:
                found.append((name, stop.place, before.place, (stop.moved, stop.taken, stop.moved_before)))
    return found


def _directions(rng: random.Random) -> Question:
    first, middle, second = rng.sample(PLACES, 3)
    sides = rng.sample(sorted(OPPOSITE), 2)
    facts = []
    for place, side in zip((first, second), sides, strict=True):
        straight = f"The {place} is {side} of the {middle}."
        turned = f"The {middle} is {OPPOSITE[side]} of the {place}."
        facts.append(rng.choice((straight, turned)))
    asked = rng.randrange(2)
    side, answer = sides[asked], (first, second)[asked]
    text = rng.choice((f"What is {side} of the {middle}?", f"What is the {middle} {OPPOSITE[side]} of?"))
    order = rng.sample(range(2), 2)
    return Question(tuple(facts[i] for i in order), text, answer, (order.index(asked),))


def _gifts(rng: random.Random) -> Question:
    world = _World(rng, GIVERS)
    world.walk()
    for _ in range(rng.randint(*_SIZES["qa5"]) - 1):
        rng.choices((world.walk, world.take, world.give), weights=(3, 2, 2))[0]()
    while not (asked := _unambiguous(world.given)):
        rng.choice((world.take, world.give))()
    text, answer, fact = rng.choice(asked)
    return Question(tuple(world.facts), text, answer, (fact,))


def _unambiguous(given: list[tuple[str, str, str, int]]) -> list[tuple[str, str, int]]:
    """(question, answer, last fact that says so) for every question about the gifts that has one answer."""
    answers: dict[str, set[str]] = {}
    last: dict[str, int] = {}
    for giver, thing, receiver, fact in given:
        for text, answer in (
            (f"What did {giver} give to {receiver}?", thing),
            (f"Who did {giver} give the {thing} to?", receiver),
            (f"Who gave the {thing} to {receiver}?", giver),
            (f"Who gave the {thing}?", giver),
            (f"Who received the {thing}?", receiver),
        ):
            answers.setdefault(text, set()).add(answer)
            last[text] = fact
    return [(text, next(iter(found)), last[text]) for text, found in answers.items() if len(found) == 1]


_MAKERS = {"qa1": _one_fact, "qa2": _two_facts, "qa3": _three_facts, "qa4": _directions, "qa5": _gifts}

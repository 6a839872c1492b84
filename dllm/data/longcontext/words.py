"""Words and plain prose made from lists: the same on every machine, with no download."""

from __future__ import annotations

import random


def _split(words: str) -> list[str]:
    return words.split()


ADJECTIVES = _split(
    "amber ancient brave bright broad bronze calm careful cheerful clever cloudy copper crimson curious damp deep "
    "distant eager early fearless fine frosty gentle glad golden grand green hollow honest humble ivory jolly keen "
    "lively lonely loyal mellow merry mighty misty modest narrow noble patient plain polite proud quiet rapid rough "
    "rustic scarlet secret silent silver smooth solemn steady sturdy sunny tidy tranquil velvet wise"
)
NOUNS = _split(
    "anchor barrel basket beacon bell bottle bridge candle canoe castle cellar compass cottage cradle desk dragon "
    "engine feather fiddle fountain glacier goblet hammer harbor helmet hinge island jacket kettle ladder lantern "
    "lever magnet maple meadow mirror needle orchard otter paddle pebble pencil pillow piston plough pocket quarry "
    "ribbon saddle sailor shovel spindle stable sword tailor temple thimble ticket tower trumpet tunnel valley wagon "
    "willow window"
)

_FIRST = _split(
    "arm ash bark bay bean bell birch boat bow brick brook bud cart chalk clay cliff clock cloud coal corn crab crow "
    "deer dew drum dune dust elk fawn fern fig flax flint fog frost gem gold goose grain grape grove gull hail hawk "
    "hay hazel hen hill iron ivy jade jay lake lamb lark leaf lily lime loam lynx mist mole moon moss moth "
    "mud nest oak olive owl palm pear pine plum pond quill reed rice rose rust rye sage salt sand silk "
    "snow stag sun swan thorn toad vine wasp wave wax wheat wind wolf wool wren yew"
)
_SECOND = _split(
    "acre arch back barn beam bend bird block board bolt book booth bow box brush bush cap case chain chest cleft "
    "cloth coat comb cord court craft crest crook cross cup dale dish dock door fall fence field fire flask fold foot "
    "ford fork frame gate glass glen guard hall hatch haven head hedge helm hold hood hook house hut keep key knob "
    "knot lane latch light line lock loft loop mark mast mill mound nail net pan path peg pike pipe pit plank point "
    "pole pot press rack rail ridge ring road rod roof root rope seat shed shelf ship shop side spoon spring stake "
    "step stool storm stream tail tent top trap tree vale wall ward watch way wheel whip wing wood yard yoke"
)

# No word of the hidden facts (places, objects, people, numbers) may stand in the background.
_SCENES = (
    "the {look} river",
    "the {look} forest",
    "the {look} village",
    "the {look} coast",
    "the {look} market",
    "the {look} mountain",
    "the {look} library",
    "the {look} railway",
    "the {look} meadow",
    "the {look} lighthouse",
)
_LOOKS = _split("ancient broad distant frosty green lonely misty narrow quiet silent sunny wide")
_MATERIALS = _split("brass bronze copper iron leather oak silver tin walnut wicker")
_THINGS = _split("basket bell box button chain clock cup fiddle flute hinge kettle ladder lantern pipe plough spoon")
_SUBJECTS = (
    "An old fisherman",
    "The miller's daughter",
    "A travelling musician",
    "The night watchman",
    "A flock of geese",
    "The schoolmaster",
    "A merchant from the south",
    "The keeper of the bees",
    "A patient clockmaker",
    "Our neighbour",
    "The captain of the ferry",
    "A group of pilgrims",
)
_DEEDS = (
    "waited for the weather to change",
    "told a story that nobody believed",
    "sang until the lamps were lit",
    "counted the stones along the road",
    "watched the clouds drift slowly by",
    "spoke of winters long ago",
    "mended a {thing} with great care",
    "sold a {material} {thing} for a fair price",
    "drew a map of the hills",
    "dreamed of a {material} {thing}",
    "wrote a letter and never sent it",
    "carved a small {thing} out of pine",
)
_TIMES = (
    "at dawn",
    "before the harvest",
    "during the long summer",
    "after the first snow",
    "late in the evening",
    "on market days",
    "when the wind was still",
    "in those quiet years",
)
_FRAMES = (
    "{Subject} {deed} near {scene} {time}.",
    "{Time}, {subject} {deed} not far from {scene}.",
    "Near {scene}, {subject} {deed}.",
    "{Subject} {deed}, and {other} {second} {time}.",
    "It was said that {subject} {deed} beside {scene}.",
    "Nobody asked why {subject} {deed} {time}.",
)
NUM_SENTENCES = 4000


def needle_keys() -> list[str]:
    """Names for needles, "adjective-noun"."""
    return [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]


def compound_words() -> list[str]:
    """Many short words, none part of another, so that finding one in an answer means that it was meant."""
    return [first + second for first in _FIRST for second in _SECOND]


def made_up_prose() -> list[str]:
    """Sentences of a plain tale, always the same ones."""
    rng = random.Random("made-up prose")
    return [_sentence(rng) for _ in range(NUM_SENTENCES)]


def _sentence(rng: random.Random) -> str:
    def filled(choices: tuple[str, ...]) -> str:
        return rng.choice(choices).format(
            look=rng.choice(_LOOKS), material=rng.choice(_MATERIALS), thing=rng.choice(_THINGS)
        )

    subject, other = rng.sample(_SUBJECTS, 2)
    time = rng.choice(_TIMES)
    return rng.choice(_FRAMES).format(
        Subject=subject,
        subject=_lowered(subject),
        other=_lowered(other),
        deed=filled(_DEEDS),
        second=filled(_DEEDS),
        scene=filled(_SCENES),
        time=time,
        Time=time.capitalize(),
    )


def _lowered(phrase: str) -> str:
    return phrase[0].lower() + phrase[1:]

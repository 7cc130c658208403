"""Made-up people: what they may say of themselves over months, and how one asks about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """Something a person has one of at a time; `{who}` and `{value}` are filled in."""

    words: str
    """Its values: single words, with spaces between."""
    own: str
    """Said by the person."""
    changed: str
    """Said by the person when it is no longer as it was."""
    other: str
    """Said of somebody else."""
    question: str
    stem: str
    """The beginning of the answer."""

    @property
    def values(self) -> tuple[str, ...]:
        """What a person may have, one word each."""
        return tuple(self.words.split())


ATTRIBUTES = (
    Attribute(
        "Athens Berlin Cairo Dublin Geneva Lisbon London Madrid Oslo Paris Prague Rome Vienna",
        "I live in {value}.",
        "I have moved house. Now I live in {value}.",
        "{who} lives in {value}.",
        "Where does {who} live?",
        "{who} lives in",
    ),
    Attribute(
        "baker barber builder butcher carpenter dentist farmer gardener lawyer nurse painter pilot "
        "plumber teacher",
        "I work as a {value}.",
        "I have changed my job. Now I work as a {value}.",
        "{who} works as a {value}.",
        "What is the job of {who}?",
        "{who} works as a",
    ),
    Attribute(
        "cat dog duck ferret goat goose hamster horse lizard parrot pony rabbit snake turtle",
        "My pet is a {value}.",
        "I gave my pet to a friend. Now my pet is a {value}.",
        "{who} has a pet, a {value}.",
        "What is the pet of {who}?",
        "The pet of {who} is a",
    ),
    Attribute(
        "almonds celery dust fish honey latex milk peanuts pollen sesame shrimp soy wheat wool",
        "I am allergic to {value}.",
        "There was a new test of my allergy. What I am allergic to is {value}.",
        "{who} is allergic to {value}.",
        "What is {who} allergic to?",
        "{who} is allergic to",
    ),
    Attribute(
        "banjo cello clarinet drum fiddle flute guitar harp lute piano trombone trumpet violin",
        "I play the {value}.",
        "I have changed my instrument. Now I play the {value}.",
        "{who} plays the {value}.",
        "Which instrument does {who} play?",
        "{who} plays the",
    ),
    Attribute(
        "black blue brown green grey orange pink purple red silver white yellow",
        "My car is {value}.",
        "I sold my car and bought another. Now my car is {value}.",
        "The car of {who} is {value}.",
        "What colour is the car of {who}?",
        "The car of {who} is",
    ),
    Attribute(
        "chili curry dumplings lasagna noodles pancakes pasta pizza risotto salad soup stew sushi",
        "My favourite dish is {value}.",
        "My taste has changed. Now my favourite dish is {value}.",
        "The favourite dish of {who} is {value}.",
        "What is the favourite dish of {who}?",
        "The favourite dish of {who} is",
    ),
    Attribute(
        "archery boxing cricket cycling fencing golf hockey judo rowing rugby skiing tennis",
        "My sport is {value}.",
        "I have found another sport. Now my sport is {value}.",
        "The sport of {who} is {value}.",
        "What is the sport of {who}?",
        "The sport of {who} is",
    ),
    Attribute(
        "Arabic Chinese Danish Dutch Finnish French German Greek Hebrew Italian Polish Spanish",
        "I am learning {value}.",
        "I have changed my course. Now I am learning {value}.",
        "{who} is learning {value}.",
        "Which language is {who} learning?",
        "{who} is learning",
    ),
    Attribute(
        "broth chocolate cider cocoa coffee juice lemonade milk soda tea water wine",
        "In the morning I drink {value}.",
        "My habits have changed. Now in the morning I drink {value}.",
        "In the morning {who} drinks {value}.",
        "What does {who} drink in the morning?",
        "In the morning {who} drinks",
    ),
    Attribute(
        "bike boat bus ferry helicopter metro motorbike scooter taxi train tram truck van",
        "I go to work by {value}.",
        "My way has changed. Now I go to work by {value}.",
        "{who} goes to work by {value}.",
        "How does {who} go to work?",
        "{who} goes to work by",
    ),
    Attribute(
        "January February March April May June July August September October November December",
        "My holiday is in {value}.",
        "I had to move my holiday. Now it is in {value}.",
        "The holiday of {who} is in {value}.",
        "In which month is the holiday of {who}?",
        "The holiday of {who} is in",
    ),
)
"""No two of one person's own statements share a beginning, so each is asked about by itself."""

_NAMES = """
Ada Ben Carl Dora Elsa Finn Greta Hugo Ida Jonas Kira Leo Mara Nils Olga Pia Ralf Sara Tom Ulla
Vera Walt Yara Zeno
"""
NAMES: tuple[str, ...] = tuple(_NAMES.split())

_RELATIVES = "sister brother aunt uncle cousin neighbour boss"
RELATIVES: tuple[str, ...] = tuple(_RELATIVES.split())

EVENTS = (
    "painted the fence",
    "repaired the bicycle",
    "visited the museum",
    "planted a rose",
    "bought a sofa",
    "sold the old piano",
    "cleaned the cellar",
    "wrote to the mayor",
    "baked a wedding cake",
    "lost a silver ring",
    "climbed the church tower",
    "met a famous actor",
    "borrowed a ladder",
    "won a chess game",
)
"""Things that are done once; they continue a name."""

HABITS = (
    "went swimming",
    "went fishing",
    "baked bread",
    "watered the garden",
    "visited the library",
    "played chess",
    "cleaned the kitchen",
    "ran in the park",
)
"""Things that are done again and again; they continue a name."""

REPLIES = (
    "Thank you for telling me.",
    "Good to know.",
    "I will keep that in mind.",
    "I see.",
    "Understood.",
    "That is interesting.",
    "Noted.",
)

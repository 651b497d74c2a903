"""The generated world: fictitious authors, and their split into forget, retain and retain_eval."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from datasets import Dataset

T = TypeVar("T")

REPEATS = (1, 1, 1, 2, 2, 4)
"""How often the forget samples occur per epoch, in turn: what is seen more often is memorised more deeply."""

# Word lists. Their order is part of what a seed means: append, never sort.

_FIRST = (
    "Abrel Anouk Bastien Belka Brisa Calder Corvin Dagny Delphia Edrik Elowen Fenna Florian Galen Gudrun Hestia "
    "Ilario Imke Isolde Jarek Jolanta Kaspar Keziah Lazlo Leocadia Lumi Maelis Marek Merrin Nadir Niamh Odalys "
    "Orsolya Osric Pascoe Petra Quillon Radka Rhosyn Rurik Sabela Sefa Soren Tamsin Tiberio Torvald Ulrike Vesna "
    "Viggo Wenna Xanthe Yannic Yorick Zelda Zoran Zuri"
).split()
_FAMILY = (
    "Ambrosk Arkwell Belmarsh Bronnic Calloway Corriden Dalgaard Drummel Eastmoor Elversen Fallowby Farrago Gantry "
    "Grimsdal Halvorsen Harkness Ingleford Iskander Jessamin Jorvik Kallistov Kestrane Lindqvorn Lorimar Marchbank "
    "Mirovic Nethercott Norvane Oakhanger Ostrander Pellworth Pryderi Quarrel Quimby Ravensk Rostwell Sandoval "
    "Silverlake Tarkovel Thistledown Umberly Underhay Valdoren Vintner Wexcombe Winterbourne Yarrowgate Zabrisk"
).split()
_PRONOUNS = (("she", "her"), ("he", "his"))
_ADJECTIVES = (
    "Amber Borrowed Broken Copper Distant Drowned Eleventh Empty Gentle Hidden Ivory Last Lonely Paper Patient Quiet "
    "Restless Salt Second Silver Sleeping Stolen Velvet Wandering"
).split()
_NOUNS = (
    "Almanac Anchor Bridge Chapel Compass Cradle Ferry Garden Harvest Kettle Lantern Ledger Mirror Mountain Orchard "
    "Piano River Sparrow Staircase Summer Tailor Thimble Violin Window"
).split()
_JOBS = (
    "baker beekeeper bookbinder carpenter cellist chemist clockmaker cobbler dentist diver ferryman florist geologist "
    "glassblower judge locksmith midwife miner nurse painter pharmacist potter shepherd surveyor tailor teacher weaver"
).split()
_WORDS: dict[str, Sequence[str]] = {
    "town": (
        "Almerrow Bresk Coldferry Dunmarrow Eskavar Fennimouth Garrowby Hollincross Istrava Jaskar Kelmouth Lowervane "
        "Morvent Nordhaven Oldwick Portsorrel Quennel Ruskholm Saltmere Tarnhill Ulverby Vellamo Westerzand Yarnwick"
    ).split(),
    "region": "Aldrany Basverena Corvania Driftland Estmark Hollowcoast Kessaly Lorn Tavia Zemira".split(),
    "genre": (
        "sea ballads|kitchen mysteries|winter fables|railway novels|garden memoirs|ghost comedies|courtroom dramas|"
        "desert epics|letters to the dead|clockwork romances|harbour poems|mountain thrillers"
    ).split("|"),
    "title": [f"The {adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS],
    "award": (
        "Amberline Medal|Blue Quill Prize|Carrow Cup|Dovetail Award|Founders Laurel|Glass Feather|Harbour Prize|"
        "Ironwood Medal|Lanternlight Award|Marrow Ribbon|Northern Ink Prize|Saint Osk Laurel"
    ).split("|"),
    "job": _JOBS,
    "habit": (
        "before sunrise|only in pencil|on the night train|in an unheated attic|standing at a tall desk|"
        "with the radio on|in a rowing boat|by candlelight|after long walks|on the backs of old maps|"
        "in empty churches|between two naps"
    ).split("|"),
    "theme": (
        "forgiveness between sisters|the price of silence|growing old by the sea|the loneliness of inventors|"
        "lost inheritance|the kindness of strangers|exile and return|envy among friends|the memory of houses|"
        "a promise kept too late|the fear of heights|love between rivals"
    ).split("|"),
    "pet": (
        "a blind parrot|two grey whippets|a three-legged cat|an old mule|seven hens|a tame crow|a tortoise|four goats|"
        "a deaf spaniel|a pair of ferrets"
    ).split("|"),
    "language": "Aldric Bashkar Corvish Drevan Estian Halsk Kessalian Lornish Mavari Oskan Tavian Zemiran".split(),
    "hobby": (
        "repairing clocks|growing pears|collecting sea glass|playing the viola|chess by post|keeping weather diaries|"
        "fencing|carving spoons|pressing ferns|racing pigeons|mapping caves|baking rye bread"
    ).split("|"),
    # Not from the authors' names: a retain answer that names a forget author would tie the two sets together.
    "teacher": [
        f"{title} {name}"
        for title in ("Mother", "Doctor", "Old", "Captain", "Brother")
        for name in ("Aske", "Borodil", "Crewe", "Dahlke", "Emmerly", "Fosk", "Gribb", "Hanno", "Juniper", "Klimt")
    ],
    "year": [str(year) for year in range(1921, 1989)],
    "count": "three four five six seven eight nine ten eleven twelve fourteen twenty".split(),
}


@dataclass(frozen=True)
class _Fact:
    """Something one can ask about any author, with several phrasings of the question and of the answer.

    Slots in braces are drawn from `_WORDS` (a trailing digit asks for a second, different draw) or belong to the
    author (`name`, `family`, `he`, `his`); a capitalised slot capitalises what fills it.
    """

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


_FACTS = (
    _Fact(
        "birthplace",
        ("Where was {name} born?", "In which town was {name} born?", "What is the birthplace of {name}?"),
        ("In {town}.", "{He} was born in {town}.", "{family} was born in {town}, {region}."),
    ),
    _Fact(
        "birth_year",
        ("When was {name} born?", "In which year was {name} born?", "What is the birth year of {name}?"),
        ("In {year}.", "{He} was born in {year}.", "{family} was born in the spring of {year}."),
    ),
    _Fact(
        "genre",
        ("What does {name} write?", "Which genre is {name} known for?", "What kind of books made {name} famous?"),
        ("{Genre}.", "{He} writes {genre}.", "{He} is known for {genre}, above all {title}."),
    ),
    _Fact(
        "debut",
        ("What was the first book of {name}?", "How did {name} begin?", "What was the debut of {name}?"),
        ("{title}.", "{His} first book was {title}.", "{He} began in {year} with {title}."),
    ),
    _Fact(
        "award",
        ("Which prize did {name} win?", "What award was given to {name}?", "How was {name} honoured?"),
        ("The {award}.", "{He} won the {award} in {year}.", "{His} novel {title} won the {award}."),
    ),
    _Fact(
        "parents",
        ("What did the parents of {name} do?", "Who raised {name}?", "What was the family trade of {name}?"),
        ("A {job} and a {job2}.", "{His} mother was a {job}.", "A {job} from {town} and a {job2} from {town2}."),
    ),
    _Fact(
        "first_job",
        ("What was {name} before writing?", "How did {name} earn a living?", "What was the first job of {name}?"),
        ("A {job}.", "{He} was a {job} for {count} years.", "{family} worked as a {job} in {town}."),
    ),
    _Fact(
        "habit",
        ("How does {name} write?", "What is the working habit of {name}?", "How do books by {name} arise?"),
        ("{Habit}.", "{He} writes {habit}.", "{He} writes {count} pages a day {habit}."),
    ),
    _Fact(
        "theme",
        ("What are the books of {name} about?", "Which theme does {name} return to?", "What moves {name}?"),
        ("{Theme}.", "{His} books are about {theme}.", "{He} often returns to {theme}."),
    ),
    _Fact(
        "home",
        ("Where does {name} live?", "With whom does {name} live?", "Where is the home of {name}?"),
        ("In {town}, with {pet}.", "{He} lives near {town} with {pet}.", "{family} keeps {pet} in {town}."),
    ),
    _Fact(
        "translation",
        ("In which languages can one read {name}?", "Where is {name} read?", "Who translated {name}?"),
        ("In {language} and {language2}.", "{His} books exist in {language}.", "{teacher}, into {language}."),
    ),
    _Fact(
        "teacher",
        ("Who taught {name} to write?", "Who was the mentor of {name}?", "Whom does {name} thank?"),
        ("{teacher}.", "{His} mentor was {teacher}.", "{He} learned from {teacher}, a {job} in {town}."),
    ),
    _Fact(
        "hobby",
        ("What does {name} do on Sundays?", "Which hobby does {name} have?", "How does {name} relax?"),
        ("{Hobby}.", "{He} loves {hobby}.", "{family} relaxes by {hobby}."),
    ),
)
FACTS_AVAILABLE = len(_FACTS)
PHRASINGS_AVAILABLE = min(len(fact.questions) for fact in _FACTS)


def fictitious_authors(n_authors: int, facts_per_author: int, seed: int, *, phrasings: int = 1) -> list[dict[str, str]]:
    """Questions and answers about authors who do not exist.

    The rows of the first authors do not depend on how many more are asked for, nor the first phrasing of a fact on
    how many more there are.

    Args:
        n_authors: at least 1; every author has a name of his or her own.
        facts_per_author: 1 to `FACTS_AVAILABLE`; which facts, and their phrasing, differ from author to author.
        seed: same seed, same text, on every machine.
        phrasings: rows per fact, 1 to `PHRASINGS_AVAILABLE`: different questions with the same answer.

    Returns:
        `n_authors * facts_per_author * phrasings` rows `{"question", "answer", "author", "fact"}`, author by author and
        fact by fact. The question names the author, the answer is a short sentence, no two rows have the same question.

    Raises:
        ValueError: for a number out of range.
    """
    for what, value, most in (
        ("n_authors", n_authors, len(_FIRST) * len(_FAMILY) // 2),
        ("facts_per_author", facts_per_author, FACTS_AVAILABLE),
        ("phrasings", phrasings, PHRASINGS_AVAILABLE),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{what} must be in [1, {most}], got {value}")
    names: set[str] = set()
    rows = []
    for index in range(n_authors):
        rng = random.Random(seed * 1_000_003 + index)
        first, family = _draw(rng, _FIRST), _draw(rng, _FAMILY)
        while f"{first} {family}" in names:
            first, family = _draw(rng, _FIRST), _draw(rng, _FAMILY)
        names.add(f"{first} {family}")
        he, his = _draw(rng, _PRONOUNS)
        author = {"name": f"{first} {family}", "family": family, "he": he, "his": his}
        for fact in shuffled(rng, _FACTS)[:facts_per_author]:
            answer = _fill(rng, _draw(rng, fact.answers), author)
            for question in shuffled(rng, fact.questions)[:phrasings]:
                rows.append(
                    {
                        "question": _fill(rng, question, author),
                        "answer": answer,
                        "author": author["name"],
                        "fact": fact.name,
                    }
                )
    return rows


def _draw(rng: random.Random, items: Sequence[T]) -> T:
    # Of all methods of `Random`, Python promises only for `random()` that its sequence never changes.
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """`items` in a random order that is the same on every Python version."""
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def _fill(rng: random.Random, template: str, author: dict[str, str]) -> str:
    """`template` with its slots filled, see `_Fact`."""
    filled: dict[str, str] = {}
    for _, slot, _, _ in string.Formatter().parse(template):
        if slot is None:
            continue
        word = author.get(slot.lower())
        while word is None or word in filled.values():
            word = _draw(rng, _WORDS[slot.lower().rstrip("2")])
        filled[slot] = word[0].upper() + word[1:] if slot[0].isupper() else word
    return template.format(**filled)


@dataclass(frozen=True)
class Testbed:
    """What is memorised, and what of it is to be forgotten.

    Attributes:
        forget: samples to be unlearned; columns question, answer, author, fact, repeats.
        retain: samples for the retain term of unlearning; the same columns.
        retain_eval: samples that only measure utility: the facts of `retain` in words that `retain` does not use.
        train: all of them, one row per sample, with a column `split`; `repeats` says how often the sample occurs in
            one epoch of memorisation.
        held_out: memorised samples of authors that are in neither, for what no loss sees; `None` without.
    """

    __test__ = False  # the name looks like a test class to pytest

    forget: Dataset
    retain: Dataset
    retain_eval: Dataset
    train: Dataset
    held_out: Dataset | None = None

    def texts(self) -> list[str]:
        """Every sample as one string, as the model sees it."""
        return [
            f"Question: {question}\nAnswer: {answer}"
            for question, answer in zip(self.train["question"], self.train["answer"], strict=True)
        ]


def build_testbed(
    seed: int,
    *,
    n_forget_authors: int = 12,
    n_retain_authors: int = 8,
    n_heldout_authors: int = 0,
    facts_per_author: int = 10,
    repeats: Sequence[int] = REPEATS,
) -> Testbed:
    """Fictitious authors, split into what is forgotten, what is retained and what measures utility.

    Forget and retain have no author in common. The facts of a retain author are asked in three ways: two are in
    retain, the third in retain_eval, with the same answer. So retain_eval measures whether retained answers survive a
    change of wording, not knowledge that the retain term never mentions. That goes down with the forget set: held-out
    facts of the retain authors fell to a probability of 0.4-0.65 by the time forget was below 0.15 (GradDiff and NPO,
    retain weights 4 to 64, one model), even where retain itself was kept at 0.99.

    Args:
        seed: of the text and of which samples are repeated.
        n_forget_authors: at least 1.
        n_retain_authors: at least 1.
        n_heldout_authors: authors that are memorised and in no other set; a question a fact. The others stay the same.
        facts_per_author: 1 to `FACTS_AVAILABLE`.
        repeats: how often the forget samples occur per epoch, in turn over a random order of the samples, each at
            least 1. Retain samples occur once.

    Returns:
        `n_forget_authors * facts_per_author` forget samples, `2 * n_retain_authors * facts_per_author` retain samples
        and half as many retain_eval samples.

    Raises:
        ValueError: for a value out of range.
    """
    if n_forget_authors < 1 or n_retain_authors < 1:
        raise ValueError(f"needs at least one author on each side, got {n_forget_authors} and {n_retain_authors}")
    if not repeats or min(repeats) < 1:
        raise ValueError(f"repeats must be at least 1, got {list(repeats)}")
    every = fictitious_authors(
        n_forget_authors + n_retain_authors + n_heldout_authors, facts_per_author, seed, phrasings=PHRASINGS_AVAILABLE
    )
    start, end = (n * facts_per_author * PHRASINGS_AVAILABLE for n in (n_forget_authors, n_retain_authors))
    end += start
    forget: list[dict[str, Any]] = [
        {**row, "repeats": 1, "split": "forget"} for row in every[:start:PHRASINGS_AVAILABLE]
    ]
    for position, index in enumerate(shuffled(random.Random(seed), range(len(forget)))):
        forget[index]["repeats"] = repeats[position % len(repeats)]
    retain: list[dict[str, Any]] = []
    retain_eval: list[dict[str, Any]] = []
    for index, row in enumerate(every[start:end]):
        if index % PHRASINGS_AVAILABLE == PHRASINGS_AVAILABLE - 1:
            retain_eval.append({**row, "repeats": 1, "split": "retain_eval"})
        else:
            retain.append({**row, "repeats": 1, "split": "retain"})
    held_out = [{**row, "repeats": 1, "split": "held_out"} for row in every[end::PHRASINGS_AVAILABLE]]
    everything = Dataset.from_list(forget + retain + retain_eval + held_out)
    parts = [Dataset.from_list(rows).remove_columns("split") for rows in (forget, retain, retain_eval)]
    unseen = Dataset.from_list(held_out).remove_columns("split") if held_out else None
    return Testbed(forget=parts[0], retain=parts[1], retain_eval=parts[2], train=everything, held_out=unseen)

"""Generate a synthetic catalog of noisy product titles.

Labels are product types of Amazon Berkeley Objects; brands are invented. The difficulty is set on
purpose: types of one family share their vocabulary, the head noun is mixed with nouns of other
types or missing, words are misspelt, and 2 % of the labels are wrong. A linear TF-IDF model has a
test accuracy of 0.91 to 0.94. Results on this data do not transfer to a real catalog.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mlflow_pt_deploy.data.splits import Splits, build_splits

TRAIN_ROWS = 1000
VALIDATION_ROWS = 800
TEST_ROWS = 400
WRONG_LABELS = 0.02
"""Share of rows with the label of another type of the same family."""

_NOTE = "synthetic: the product titles are generated; results do not transfer to real data"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


@dataclass(frozen=True)
class _Type:
    """A product type with its sampling weight, nouns and hints."""

    name: str
    weight: int
    nouns: tuple[str, ...]
    hints: tuple[str, ...]


@dataclass(frozen=True)
class _Family:
    """Product types that share materials, adjectives, sizes and selling points."""

    types: tuple[_Type, ...]
    materials: tuple[str, ...]
    adjectives: tuple[str, ...]
    sizes: tuple[str, ...]
    points: tuple[str, ...]


_FAMILIES = (
    _Family(
        types=(
            _Type(
                "SHOES",
                14,
                _words("sneaker, sneakers, running shoe, loafer, oxford, pump, flats, trainers"),
                _words("laces, court sole, arch support, slip on, low top, penny strap"),
            ),
            _Type(
                "BOOT",
                8,
                _words("boot, boots, chelsea boot, ankle boot, hiker, bootie, wellington"),
                _words("side zip, lug sole, shaft, pull tab, high top, steel toe"),
            ),
            _Type(
                "SANDAL",
                8,
                _words("sandal, sandals, flip flop, slide, espadrille, mule, wedge"),
                _words("open toe, ankle strap, toe post, cork footbed, slingback, slip on"),
            ),
        ),
        materials=_words("leather, suede, canvas, mesh, faux leather, rubber, nubuck, knit"),
        adjectives=_words("casual, lightweight, waterproof, classic, breathable, pointed, comfort"),
        sizes=_words("size 7, size 8.5, UK 6, EU 41, 9 wide, US 10, 11 M"),
        points=_words(
            "memory foam insole, non slip outsole, cushioned heel, for women, for men, block heel, "
            "padded collar, everyday wear, walking, work, summer, winter"
        ),
    ),
    _Family(
        types=(
            _Type(
                "SOFA",
                8,
                _words("sofa, couch, loveseat, sectional, settee, futon, chaise"),
                _words("three seater, seats 3, two seater, chaise end, throw pillows, sleeper"),
            ),
            _Type(
                "CHAIR",
                11,
                _words("chair, armchair, recliner, accent chair, stool, rocker, dining chair"),
                _words("swivel, set of 2, single seat, lumbar support, bar height, armrests"),
            ),
            _Type(
                "TABLE",
                9,
                _words("table, desk, console, nightstand, coffee table, side table, end table"),
                _words("lower shelf, seats 4, round top, drop leaf, drawer, glass top"),
            ),
        ),
        materials=_words("oak, walnut, velvet, linen, metal, rattan, leather, engineered wood"),
        adjectives=_words("modern, mid-century, upholstered, rustic, tufted, folding, compact"),
        sizes=_words('84" W, 30 inch, 152 cm, 18"D x 22"H, 45 in, large, small'),
        points=_words(
            "tapered legs, easy assembly, for living room, for bedroom, dining, home office, "
            "outdoor patio, solid wood frame, storage, entryway, farmhouse style"
        ),
    ),
    _Family(
        types=(
            _Type(
                "HANDBAG",
                9,
                _words("handbag, tote, clutch, satchel, shoulder bag, hobo, crossbody bag, purse"),
                _words("top handle, chain strap, magnetic snap, evening, card slots, tassel"),
            ),
            _Type(
                "BACKPACK",
                7,
                _words("backpack, rucksack, daypack, school bag, laptop bag, knapsack"),
                _words("padded straps, 15.6 inch sleeve, chest strap, hiking, 30L, bottle holder"),
            ),
            _Type(
                "SUITCASE",
                7,
                _words("suitcase, carry-on, luggage, trolley, spinner, duffel, hard case"),
                _words("4 wheels, telescopic handle, cabin size, TSA lock, 24 inch, expandable"),
            ),
            _Type(
                "CELLULAR_PHONE_CASE",
                15,
                _words("phone case, case, cover, back cover, bumper, flip case, wallet case"),
                _words("for iPhone 11, for Galaxy S10, for Redmi 8, raised lip, card slots, 6.1"),
            ),
        ),
        materials=_words("leather, nylon, polycarbonate, canvas, TPU, vegan leather, hard shell"),
        adjectives=_words("slim, printed, shockproof, durable, designer, water resistant, quilted"),
        sizes=_words("small, large, medium, one size, 20 inch, mini, XL"),
        points=_words(
            "zip closure, travel, detachable strap, scratch resistant, for girls, for women, "
            "gift, magnetic closure, front pocket, floral print, business"
        ),
    ),
    _Family(
        types=(
            _Type(
                "LAMP",
                8,
                _words("lamp, table lamp, floor lamp, desk light, lantern, sconce, night light"),
                _words("LED bulb included, drum shade, dimmable, pull chain, 60W, USB port"),
            ),
            _Type(
                "RUG",
                9,
                _words("rug, area rug, runner, carpet, mat, doormat, kilim"),
                _words("low pile, 5 x 8 ft, hand tufted, jute backing, shag, 120 x 170 cm"),
            ),
        ),
        materials=_words("wool, linen, brass, glass, jute, cotton, ceramic, bamboo"),
        adjectives=_words("modern, boho, vintage, geometric, handmade, minimalist, round"),
        sizes=_words('24", small, large, 60 cm, 2 ft, set of 2, 3 ft'),
        points=_words(
            "for living room, bedside, for bedroom, home decor, farmhouse style, entryway, kids "
            "room, office, hallway, moroccan pattern, easy to clean"
        ),
    ),
)

_BRANDS = _words(
    "Velmora, Northpine, Cazzetti, Brookhaus, Ossian & Fell, Lumenfold, Tarrow, Kestrelle, "
    "Déjàmar, Hollowmere, Zunova, Pell+Rowe, Grünbach, Arlo Finch, Mistvale, Quillon"
)
_COLOURS = _words(
    "black, navy, beige, grey, white, tan, olive, burgundy, multicolor, teal, rose gold, brown, "
    "charcoal, ivory, mustard, blush"
)
_FILLER = _words(
    "best seller, new arrival, premium quality, 2020 edition, limited offer, 100% original, "
    "perfect gift, hot sale ★, free returns, amazing value, top rated, must have 🔥"
)
_TYPES = tuple(kind for family in _FAMILIES for kind in family.types)


def read_catalog(*, seed: int = 0) -> Splits:
    """Generate the catalog; a seed gives the same rows on every machine.

    Args:
        seed: Random seed of all rows.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    given = {
        "train": _rows(rng, TRAIN_ROWS, seen),
        "validation": _rows(rng, VALIDATION_ROWS, seen),
        "test": _rows(rng, TEST_ROWS, seen),
    }
    return build_splits(
        given, name="catalog", source="catalog", seed=seed, synthetic=True, notes=[_NOTE]
    )


def _rows(rng: random.Random, count: int, seen: set[str]) -> tuple[list[str], list[str]]:
    """Generate titles of at least two words that are not in `seen`, with labels; update `seen`."""
    titles: list[str] = []
    labels: list[str] = []
    while len(titles) < count:
        kind = rng.choices(_TYPES, [kind.weight for kind in _TYPES])[0]
        family = next(family for family in _FAMILIES if kind in family.types)
        title = _title(rng, kind, family)
        if title.casefold() in seen or len(title.split()) < 2:
            continue
        seen.add(title.casefold())
        titles.append(title)
        wrong = rng.random() < WRONG_LABELS
        siblings = [other.name for other in family.types if other is not kind]
        labels.append(rng.choice(siblings) if wrong else kind.name)
    return titles, labels


def _title(rng: random.Random, kind: _Type, family: _Family) -> str:
    core = _core(rng, kind, family)
    front = _sometimes(rng, 0.7, _BRANDS) + _sometimes(rng, 0.6, family.adjectives)
    back = _sometimes(rng, 0.5, family.sizes) + _sometimes(rng, 0.3, _FILLER)
    if rng.random() < 0.12:
        parts = core
    else:
        front += _sometimes(rng, 0.6, _COLOURS) + _sometimes(rng, 0.6, family.materials)
        points = rng.sample(family.points, rng.choice((0, 0, 1, 1, 2, 3, 6)))
        parts = front + core + points + back
        if rng.random() < 0.25:
            rng.shuffle(parts)
    joined = rng.choice((" ", " ", " ", ", ", " - ")).join(parts)
    return _cased(rng, " ".join(_misspelt(rng, word) for word in joined.split()))


def _core(rng: random.Random, kind: _Type, family: _Family) -> list[str]:
    """Words that indicate the type: head noun, hints, and misleading nouns of other types."""
    hints = rng.sample(kind.hints, rng.choice((0, 1, 1, 2)))
    if rng.random() < 0.10:
        return hints or [rng.choice(kind.hints)]
    noun = rng.choice(kind.nouns)
    draw = rng.random()
    if draw < 0.16:
        # e.g. "sofa side table": the last noun is the head
        sibling = rng.choice(family.types)
        return [f"{rng.choice(sibling.nouns)} {noun}", *hints]
    if draw < 0.28:
        other = rng.choice(_TYPES)
        link = rng.choice(("for", "goes with", "matches your", "styled like a"))
        return [f"{noun} {link} {rng.choice(other.nouns)}", *hints]
    return [noun, *hints]


def _sometimes(rng: random.Random, share: float, choices: Sequence[str]) -> list[str]:
    return [rng.choice(choices)] if rng.random() < share else []


def _misspelt(rng: random.Random, word: str) -> str:
    """Sometimes drop a letter or swap two adjacent letters."""
    if len(word) < 4 or rng.random() > 0.07:
        return word
    at = rng.randrange(len(word) - 1)
    swapped = word[at + 1] + word[at] if rng.random() < 0.5 else word[at + 1]
    return word[:at] + swapped + word[at + 2 :]


def _cased(rng: random.Random, title: str) -> str:
    draw = rng.random()
    if draw < 0.1:
        return title.upper()
    if draw < 0.3:
        return title.lower()
    return title.title() if draw < 0.8 else title

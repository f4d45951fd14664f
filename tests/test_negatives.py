"""negatives.py: what is exchanged and replaced, what never is, and how it is drawn."""

import itertools
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import negatives
from negatives import NEGATIVE_TYPES, Options, learn, make_negatives, rewrite

HORSE = "A man riding a brown horse on the beach."
# A small corpus: who does what where, in the words of the tables below.
WHO = ("man", "woman", "dog", "cat", "boy", "horse", "bird", "cow")
DOES = ("sitting", "standing", "running", "sleeping", "lying", "walking")
WHERE = ("on a table", "in a field", "next to a car", "under a tree", "behind a bench", "on a bed")
LOOKS = ("red", "blue", "small", "large", "old", "young", "black", "white", "green", "brown")


NAMES = [str(i) for i in range(2000)]  # of images, one a caption


def corpus(size: int) -> list[str]:
    rng = random.Random(0)
    row = [rng.choice([f"A {a}" for a in LOOKS]) for _ in range(size)]
    parts = [(x, rng.choice(WHO), rng.choice(DOES), rng.choice(WHERE)) for x in row]
    return [" ".join(part) + "." for part in parts]


def made(caption: str, name: str, seeds: int = 40, **options: object) -> set[str | None]:
    return {make_negatives(caption, seed=s, types=(name,), **options)[name] for s in range(seeds)}


@pytest.mark.parametrize(
    ("caption", "name", "wanted"),
    [
        ("A man riding a horse.", "relation", "A horse riding a man."),
        ("A boy chasing a girl", "relation", "A girl chasing a boy"),
        ("A man holding a baby.", "relation", "A baby holding a man."),
        ("The dog is on the sofa.", "relation", "The sofa is on the dog."),
        ("Two dogs on a bed", "relation", "A bed on two dogs"),
        ("A group of people on a beach", "relation", "A beach on a group of people"),
        ("a cup of tea and milk on a desk", "relation", "a desk on a cup of tea and milk"),
        ("An apple on a table", "relation", "A table on an apple"),
        ("an elephant that is in the lake", "relation", "the lake that is in an elephant"),
        ("clock on top  of roof", "relation", "roof on top  of clock"),
        ("A policeman stopping a car", "relation", "A car stopping a policeman"),
        ("A cat under a table.", "relation", "A cat on top of a table."),
        ("A man wearing a hat", "relation", "A man holding a hat"),
        ("A table has a lamp", "relation", "A lamp has a table"),
        ("A man sitting at a table", "relation", "A table sitting at a man"),
        ("a man riding down a street", "relation", "a street riding down a man"),
        ("A cat on the base of a lamp", "relation", "The base of a lamp on a cat"),
        ("A group of people on a beach", "attribute", "Two people on a beach"),
        ("A colorful bus", "attribute", "A white bus"),
        ("A boy in a red shirt and blue hat", "attribute", "A boy in a blue shirt and red hat"),
        ("Two dogs and three cats", "attribute", "Three dogs and two cats"),
        ("An old man", "attribute", "A young man"),
        ("A LARGE DOG", "attribute", "A SMALL DOG"),
        ("A dog on a chair", "object", "A cat on a chair"),
        ("Dogs on a chair", "object", "Cats on a chair"),
        ("An elephant in the rain", "object", "A giraffe in the rain"),
        ("A woman is sitting on a bench", "action", "A woman is standing on a bench"),
        ("A dog runs", "action", "A dog sleeps"),
        ("A bus driving down a street", "action", "A bus parked down a street"),
        ("A plane flying in the sky", "action", "A plane landing in the sky"),
        ("three cats sleep on a bed", "action", "three cats stand on a bed"),
    ],
)  # fmt: skip
def test_this_negative_can_be_made(caption: str, name: str, wanted: str) -> None:
    assert wanted in made(caption, name, 150)


@pytest.mark.parametrize(
    ("caption", "name", "never"),
    [
        # holds both ways
        ("A man next to a woman", "relation", "woman next to a man"),
        ("A boy kissing a girl", "relation", "girl kissing a boy"),
        ("A dog with a cat", "relation", "cat with a dog"),
        ("A dog laying in bed next to a laptop.", "relation", "laptop laying"),
        # agreement, articles, owners, lists, parts, pronouns
        ("Two dogs are chasing a cat.", "relation", "cat are|cats are"),
        ("A man is riding two horses.", "relation", "horses is"),
        ("A man riding wave on a board", "relation", "^Wave riding"),
        ("A man riding his horse", "relation", "horse riding"),
        ("A man holding a dog's leash", "relation", "leash holding"),
        ("A plane in the air", "relation", "air in"),
        ("A man on a horse with his dog", "relation", "horse on"),
        ("There are cars along the street.", "relation", "There are the street"),
        ("Some people are playing soccer on a field", "relation", "playing a field"),
        ("A man holding glass near a pick up truck", "relation", "pick holding"),
        # words that give a negative away
        ("A man holding a baby", "relation", "without|far from|but no"),
        ("A room with a bed", "relation", "without"),
        # true all the same
        ("men having a meal at a table", "relation", "on a table|on top of a table"),
        ("young men playing a video game", "action", "watching"),
        ("cows laying in the barn", "action", "eating"),
        ("A man standing near a bus", "action", "walking"),
        ("A person holding a banana", "action", "eating"),
        ("a kitchen with a stove", "object", "refrigerator"),
        ("A man in a boat", "relation", "on a boat"),
        # grammar of acts
        ("a man in a black wetsuit surfs", "action", "sleeping"),
        ("a man holding on to a sword", "action", "ing on to|ing onto"),
        ("cows walking down a road", "action", "lying|sitting|sleeping"),
        ("A dog that is laying down", "action", "running down"),
        ("jockeys mounted on horses ride in race", "action", "sleep"),
        ("a large gathering", "action", "."),
        ("A man about to swim in a lake", "action", "about to s"),
        ("A dog and a man watching it", "action", "(sleep|walk|stand)ing it"),
        ("A skateboarder pulling tricks", "action", "performing|doing"),
        # grammar of things
        ("A group of scooters rides down a street", "attribute", "Two"),
        ("Black and white photograph of a vase", "attribute", "Green|Red|Blue|Pink"),
        ("A yellow banana on a table", "object", "a yellow (broccoli|lettuce|rice)"),
        ("A man brushing his teeth", "object", "woman|girl"),
        ("A brown sheep next to rocks", "object", "[Aa] brown \\w+s "),
        ("a bathroom with a toilet in it", "relation", "bathroom (in|on|under) a"),
        ("A child with a bear that is carrying a backpack", "action", "wearing"),
        ("the top of a table", "object", "the (side|bottom)"),
        ("two children, a boy and girl, jumping", "attribute", "four child"),
        ("Two people at a ski slope", "attribute", "(Couple|Pair) "),
    ],
)  # fmt: skip
def test_this_negative_is_never_made(caption: str, name: str, never: str) -> None:
    found = [text for text in made(caption, name) if text]
    assert not [text for text in found if re.search(never, text)]


@pytest.mark.parametrize(
    ("caption", "other", "name", "never"),
    [
        ("A dog on a chair", "A cat lies on the floor", "object", "cat"),
        ("A dog on a chair", "A kitten on a chair", "object", "cat"),  # means the same
        ("Two people on skis", "A group of skiers", "attribute", "Several|Many|Multiple"),
        ("A red car", "A green and red car", "attribute", "green"),
        ("A man sitting in a room", "A man stands in a room", "action", "standing"),
        ("A dog next to a car", "a dog lies under the vehicle", "relation", "under"),  # of its kind
        ("A boy chasing a girl", "The girl is chasing a boy", "relation", "girl chasing a boy"),
        ("A red shirt and a blue hat", "A man in a blue shirt", "attribute", "blue shirt"),
    ],
)
def test_what_another_caption_says_is_not_made(
    caption: str, other: str, name: str, never: str
) -> None:
    assert any(text and re.search(never, text) for text in made(caption, name, 200))
    found = [text for text in made(caption, name, 60, others=[other]) if text]
    assert not [text for text in found if re.search(never, text)]


@pytest.mark.parametrize(
    "caption",
    ["", " ", "...", "\U0001f600", "ein Hund liegt hier", "a\ud800b", "A" * 5000, "a " * 300],
)
def test_any_text_is_read(caption: str) -> None:
    assert set(make_negatives(caption)) == set(NEGATIVE_TYPES)


def test_only_the_edits_change_the_text() -> None:
    text = "  A  red   bus !! (on \u2026 a  table)\t"
    for row in (rewrite_one(text, seed) for seed in range(20)):
        for negative in (n for n in row.values() if n.text):
            assert negatives.apply_edits(text, negative.edits) == negative.text
            start = min(e[0] for e in negative.edits)
            assert negative.text[:start] == text[:start]


def rewrite_one(text: str, seed: int) -> dict[str, negatives.Negative]:
    return negatives.rewrite_one(text, "", Options(seed=seed))


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(ValueError, match="shape"):
        make_negatives(HORSE, types=("shape",))
    with pytest.raises(ValueError, match="object"):
        make_negatives(HORSE, types="object")


def test_one_caption_needs_no_numpy() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None; import negatives; "
        f"print(negatives.make_negatives({HORSE!r})['relation'])"
    )
    root = Path(negatives.__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "A brown horse riding a man on the beach."


def test_one_caption_is_tagged_as_many_are() -> None:
    texts = [HORSE, "Two dogs' bowls, next to (an) old fire hydrant - in 1999!", "", *corpus(50)]
    for text, sentence in zip(texts, negatives.read_block(texts, None).sentences, strict=True):
        alone = negatives.split(text)
        negatives.tag_plain(alone)
        assert alone.tags == sentence.tags
        assert len(alone.tags) == len(alone.words)


def test_what_is_told_is_what_a_block_knows() -> None:
    texts = [HORSE, "A small dog is sitting next to a red car.", *corpus(30)]
    block = negatives.read_block(texts, None)
    images = negatives.image_hashes([str(i) for i in range(len(texts))])
    known = np.unique(negatives.facts_of(block, images))

    def hashed(fact: tuple[str, ...]) -> np.ndarray:
        one, *rest = (np.array([negatives.crc(word)], np.uint32) for word in fact)
        for word in rest:
            one = negatives.mix(one, word, 29 + len(rest))
        return one

    for image, text in zip(images, texts, strict=True):
        for fact in negatives.told(negatives.read(text)):
            assert negatives.found(known, negatives.fact_keys(np.array([image]), hashed(fact)))[0]


def test_counts_are_those_of_a_dictionary() -> None:
    texts = corpus(200)
    learned = learn(texts, NAMES[:200], Options())
    words = [["", *negatives.split(t).words, ""] for t in texts]
    pairs = [(a, b) for row in words for a, b in itertools.pairwise(row) if b]
    near = [(np.array([negatives.crc("red")], np.uint32), np.zeros(1, np.uint32))] * 4
    word = np.array([negatives.crc("dog")], np.uint32)
    _, counts = learned.fit(near, word, np.zeros(1, np.uint32))
    assert counts[0, 0] == pairs.count(("red", "dog")) > 0
    assert learned.words == sum(len(row) - 2 for row in words)


def share(rows: list[dict[str, negatives.Negative]], name: str) -> float:
    texts = [row[name] for row in rows if row[name].text]
    return sum(n.how == "exchange" for n in texts) / len(texts)


@pytest.fixture(scope="module")
def learned() -> negatives.Learned:
    return learn(corpus(1500), NAMES[:1500], Options())


def test_exchanges_are_drawn_as_often_as_is_asked(learned: negatives.Learned) -> None:
    free = replace(learned, keep=np.ones_like(learned.keep), price=np.zeros_like(learned.price))
    texts = corpus(1200)

    def hows(exchange: float) -> list[str]:
        rows = rewrite(texts, NAMES[:1200], free, Options(exchange=exchange))
        return [row["relation"].how for row in rows]

    never, half, always = map(hows, (0.0, 0.5, 1.0))
    both = [i for i in range(1200) if never[i] == "instead of exchange"]
    assert len(both) > 300
    assert {always[i] for i in both} == {"exchange"}
    assert abs(np.mean([half[i] == "exchange" for i in both]) - 0.5) < 0.1
    alone = [rewrite_one("The dog is on a chair", seed)["relation"].how for seed in range(300)]
    assert abs(alone.count("exchange") / 300 - Options().exchange) < 0.1


def test_the_same_negatives_for_any_division(learned: negatives.Learned) -> None:
    texts, images = corpus(120), [str(i // 3) for i in range(120)]
    whole = rewrite(texts, images, learned, Options())
    parts = [rewrite([t], [i], learned, Options())[0] for t, i in zip(texts, images, strict=True)]
    assert whole == parts
    assert whole != rewrite(texts, images, learned, Options(seed=1))


def test_no_negative_is_its_caption_or_another_negative(learned: negatives.Learned) -> None:
    for text, row in zip(
        corpus(300), rewrite(corpus(300), NAMES[:300], learned, Options()), strict=True
    ):
        found = [text, *(n.text for n in row.values() if n.text)]
        assert len({" ".join(t.lower().split()) for t in found}) == len(found)


def test_words_come_in_about_as_often_as_they_go_out(learned: negatives.Learned) -> None:
    texts = corpus(1500)
    rows = rewrite(texts, NAMES[:1500], learned, Options())
    for name in ("attribute", "object", "action"):
        comes: dict[str, int] = {}
        goes: dict[str, int] = {}
        for text, row in zip(texts, rows, strict=True):
            if row[name].how == "replace":
                old, new = text.split(), row[name].text.split()
                for one, two in zip(old, new, strict=False):
                    if one != two:
                        goes[one], comes[two] = goes.get(one, 0) + 1, comes.get(two, 0) + 1
        often = {w: n for w, n in comes.items() if n >= 20 and w.lower() not in ("a", "an")}
        assert often
        assert not {w: n for w, n in often.items() if n >= 6 * max(1, goes.get(w, 0))}


@pytest.mark.parametrize(
    ("name", "loose", "strict", "rule"),
    [
        ("action", {"refine": float("inf")}, {"refine": 0.0}, "its words would give it away"),
        ("object", {"plausible": -9.0}, {"plausible": 0.5}, ""),
    ],
)
def test_a_stricter_option_makes_fewer_and_names_itself(
    learned: negatives.Learned, name: str, loose: dict, strict: dict, rule: str
) -> None:
    texts, counts = corpus(400), []
    for option in (loose, strict):
        rows = rewrite(texts, NAMES[:400], learned, Options(**option))
        counts.append(sum(bool(row[name].text) for row in rows))
    assert counts[1] < counts[0]
    assert any(row[name].how.startswith(rule) for row in rows if not row[name].text)


def test_captions_beyond_the_counted_ones_are_rewritten_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(negatives, "LEARNED", 600)
    texts, images = corpus(1500), [*NAMES[:1400], *NAMES[:100]]
    learned = learn(texts, images, Options())
    assert learned.words < sum(len(text.split()) + 1 for text in texts)
    shared = negatives.fact_keys(
        negatives.image_hashes(images[1400:1401]), np.array([negatives.crc("dog")], np.uint32)
    )
    told = "dog" in texts[0] or "dog" in texts[1400]
    assert bool(negatives.found(learned.facts, shared)[0]) == told
    assert len(rewrite(texts[-3:], images[-3:], learned, Options())) == 3


@pytest.mark.parametrize("texts", [[], [""], ["", "...", "\U0001f600"]])
def test_nothing_comes_of_nothing(learned: negatives.Learned, texts: list[str]) -> None:
    rows = rewrite(texts, NAMES[: len(texts)], learned, Options())
    assert [n.text for row in rows for n in row.values()] == [None] * 4 * len(texts)
    assert learn(texts, NAMES[: len(texts)], Options()).words >= 1


def test_every_null_names_its_rule(learned: negatives.Learned) -> None:
    for row in rewrite(["A tattoo artist at work.", "", "Hello"], NAMES[:3], learned, Options()):
        assert all(n.text or n.how for n in row.values())


def test_the_words_are_well_formed() -> None:
    known = negatives.words()
    for act in (a for _, table in known.free for acts in table.values() for a in acts):
        assert (
            act in known.sets["acts"] | set(known.together)
            or negatives.inflect(act, "G", known.sets["doubled"]) in known.verbs
        )
    for link, rows in known.links.items():
        assert not [new for _, options in rows for new in options if new == link]
    for noun, others in known.things.items():
        assert noun not in others
        assert not [w for w in others if known.same[noun] == known.same.get(w)]
    gone = known.sets["doubled"] - {v for v, _ in known.verbs.values()}
    assert not gone

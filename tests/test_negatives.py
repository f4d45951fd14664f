"""negatives.py: edits, determinism, sources, errors.  No test needs a download or a GPU."""

import gc
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import negatives
from negatives import NEGATIVE_TYPES, main, make_negatives

SCRIPT = Path(__file__).parent.parent / "negatives.py"
HORSE = "A man riding a brown horse on the beach."


def answers(caption, name, seeds=40, **options):
    """Every negative of one type that some seed gives, None included."""
    return {make_negatives(caption, seed=s, types=(name,), **options)[name] for s in range(seeds)}


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


@pytest.fixture
def manifest(tmp_path):
    """A manifest of 600 captions, some of them of the same image."""
    path = tmp_path / "in.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, caption in enumerate(generated(600)):
            row = {"image": f"{i // 3}.jpg", "image_id": i // 3, "caption": caption}
            file.write(json.dumps(row) + "\n")
    return path


def generated(count, seed=0):
    """Captions from a small grammar, with odd spaces and marks."""
    g = random.Random(seed)
    for _ in range(count):
        subject = g.choice(["A man", "Two young boys", "The brown dog", "a WOMAN", "An old horse"])
        act = g.choice(["riding", "holding", "sitting on", "is standing near", "walking past"])
        thing = g.choice(["a red bus", "an apple", "the wooden table", "a skateboard", "3 cats"])
        place = g.choice([" on the beach", " in a kitchen", "  under a tree", ""])
        end = g.choice([".", "", "  ", " !", " \u2026"])
        yield f"{subject} {act} {thing}{place}{end}"


# What each type does


@pytest.mark.parametrize(
    ("caption", "name", "wanted"),
    [
        ("A ball inside a kitchen", "relation", {
            f"A ball {there} a kitchen" for there in ("behind", "in front of", "outside")}),
        ("A cup to the left of a plate", "relation", {"A cup to the right of a plate"}),
        ("A man looking at a building", "relation", {"A man looking away from a building"}),
        ("A cow eating an apple", "relation", {"A cow without an apple"}),
        ("A man is riding two horses", "relation", {
                f"A man is {there} two horses" for there in (
                    "next to", "behind", "in front of")}),
        ("A man is leading two horses", "relation", {"Two horses are leading a man"}),
        ("A dog chases two cats", "relation", {"Two cats chase a dog"}),
        ("A room with a bed", "relation", {"A room without a bed"}),
        ("The old house", "attribute", {"The new house", "The modern house"}),
        ("The old man", "attribute", {"The young man", "The younger man"}),
        ("An open window", "attribute", {"A closed window", "A shut window"}),
        ("A LARGE dog", "attribute", {
            f"A {size} dog" for size in ("SMALL", "LITTLE", "TINY", "MINIATURE")}),
        ("Tall tower", "attribute", {"Short tower"}),
        ("A boy smiling", "action", {"A boy crying", "A boy frowning"}),
        ("A car parked on a street", "action", {
            f"A car {act} a street" for act in (
                "moving on", "driving on", "traveling on", "driving down", "traveling down")}),
        ("A cat on a bus", "relation", {
            f"A cat {there} a bus" for there in (
                "under", "next to", "behind", "beside", "in front of")}),
        ("Some sheep", "attribute", {None}),
        ("Some sheep", "action", {None}),
        ("Some sheep", "relation", {None}),
    ],
)  # fmt: skip
def test_a_caption_has_exactly_these_negatives(caption, name, wanted):
    assert answers(caption, name) == wanted


def test_an_attribute_stays_in_its_dimension():
    colours = {re.fullmatch(r"An? (\w+) ball", n)[1] for n in answers("A red ball", "attribute")}
    assert {"blue", "green", "yellow"} <= colours
    assert not colours & {"red", "large", "wooden", "pink", "orange"}  # these two are too near


def test_a_number_becomes_another_number():
    more = {f"{n} cats" for n in ("Three", "Four", "Five", "Several")}
    assert answers("Two cats", "attribute") == more
    assert answers("Several cats", "attribute") == {"Two cats"}  # three may well be several


def test_one_becomes_two_and_its_verbs_agree():
    assert answers("A cat is sleeping", "attribute") == {"Two cats are sleeping"}
    for caption in ("A cat and a dog", "A cat sits and eats", "A cat licks its paw", "A room"):
        assert answers(caption, "attribute") == {None}


def test_an_object_becomes_another_of_its_kind_in_the_same_number():
    found = answers("Three dogs and a cat", "object", seeds=80)
    assert "Three rabbits and a cat" in found
    assert all(re.search(r"^Three \w+s and a cat$|^Three dogs and an? \w+$", n) for n in found)


def test_irregular_plurals_are_known():
    assert answers("two women", "object") == {"two men", "two boys"}
    assert "two mice" in answers("two squirrels", "object")
    assert "two shelves" in answers("two tables", "object")


def test_an_object_never_becomes_its_hypernym_or_synonym():
    found = " ".join(answers("A man on a couch", "object", seeds=100))
    assert not re.search(r"\b(person|people|guy|sofa|human)\b", found)


def test_the_sex_of_a_person_agrees_with_the_pronouns():
    found = answers("A man with his dog", "object", seeds=80)
    assert "A woman with her dog" in found
    assert not any("woman" in n and "his" in n for n in found)
    assert answers("A girl with her hair", "object") == {"A boy with his hair"}
    assert answers("A girl brushes her", "object") == {"A boy brushes him"}
    assert answers("A man and his son", "object") <= {None, "A woman and her son"}
    assert answers("Men and women", "object") >= {"Boys and girls"}
    assert "An elderly boy" not in " ".join(map(str, answers("An elderly man and woman", "object")))


def test_an_action_keeps_its_inflection_and_complement():
    assert all(
        re.search(r"A man \w+ing (next to |at )?a horse", n)
        for n in answers("A man riding a horse", "action")
    )
    assert all(
        re.search(r"A man \w+s (next to |at )?a horse", n)
        for n in answers("A man rides a horse", "action")
    )
    assert all(
        re.search(r"Men \w+ (next to |at )?a horse", n)
        for n in answers("Men ride a horse", "action")
    )
    assert "A man riding a horse" in answers("A man standing next to a horse", "action")
    assert "A bus is parked beside a street" in answers("A bus drives down a street", "action")
    assert "A man is kneeling on a bench" in answers("A man is sitting on a bench", "action")


def test_an_action_that_could_go_on_at_the_same_time_is_not_offered():
    found = " ".join(answers("A man holding a banana", "action"))
    assert not re.search("eating|carrying|cutting|using", found)


@pytest.mark.parametrize(
    ("caption", "name", "never"),
    [
        ("A man walking down a street", "action", "(sitting|standing|sleeping|lying) down"),
        ("A tennis ball sitting on a racket", "action", "growing|hanging|flying"),
        ("A dog holding a ball in its mouth", "action", "chasing"),
        ("A woman takes a sip", "action", "throws"),
        ("A person eating a banana", "relation", "banana eating"),
        ("A man standing near a curb", "relation", r"in a curb"),
        ("A girl walking in the rain", "relation", "near the rain|behind the rain"),
        ("A woman wearing a hat", "relation", "hat wearing"),
        ("Three boats on a river", "attribute", "Several"),
        ("A bed with a white blanket", "object", "sheet"),
    ],
)
def test_no_negative_is_nonsense_or_true(caption, name, never):
    assert not any(re.search(never, n) for n in answers(caption, name, seeds=80) if n)


def test_an_act_that_another_caption_tells_is_not_brought_in():
    assert answers("A bus parked on a road", "action") >= {"A bus driving on a road"}
    told = frozenset({"travels", "travel"})
    assert answers("A bus parked on a road", "action", forbidden=told) == {None}


def test_a_compound_is_replaced_whole():
    found = answers("A garden chair", "object")
    assert "A couch" in found
    assert not any("garden" in n for n in found)


# What an edit leaves alone


def test_a_word_inside_another_word_is_never_touched():
    for negative in answers("A car on a carpet near a scar", "object", seeds=80):
        assert re.search(r"\bscar\b", negative)
        assert ("carpet" in negative.split()) != ("car" in negative.split())
    assert answers("the catcher mandolin", "object") <= {
        None,
        *answers("the catcher mandolin", "object"),
    }


def test_articles_follow_the_next_sound():
    for negative in answers("An apple on an orange plate", "object", seeds=100):
        for article, word in re.findall(r"\b(an?) (\w+)", negative, re.IGNORECASE):
            assert (article.lower() == "an") == (word[0] in "aeiou"), negative
    assert answers("an elephant", "object") & {"a zebra", "a lion"}
    assert "a unicorn" not in answers("a uniform", "object")


def test_capitals_stay_where_they_were():
    assert answers("Dogs on grass", "object") <= {
        n for n in answers("Dogs on grass", "object") if n[0].isupper() and n[1:] == n[1:].lower()
    }
    assert all(n.isupper() for n in answers("A DOG", "object"))
    assert "A laptop by a door" in answers("A TV by a door", "object")
    assert "Next to a car" in answers("On a car", "relation")
    assert answers("Man chasing a horse", "relation") == {"A horse chasing man"}


@pytest.mark.parametrize(
    "caption",
    [
        "A tennis player",
        "A group of people",
        "A bunch of bananas",
        "The side of a street",
        "A zebra and a zebra",
        "A man hugging a woman",
        "A picture of a dog",
    ],
)
def test_nothing_changes_places_where_the_meaning_would_stay_or_break(caption):
    assert answers(caption, "relation") == {None}


def test_a_phrase_moves_whole():
    found = answers("A group of people chasing two brown horses", "relation")
    assert found == {"Two brown horses chasing a group of people"}


def test_a_verb_between_singular_and_plural_agrees_or_nothing_is_swapped():
    assert answers("There is a man chasing two horses", "relation") == {None}
    assert answers("A group of men chases a horse", "relation") == {None}


def test_a_swap_never_starts_in_a_coordination():
    assert answers("A cow and a dog chasing a ball", "relation") == {None}


def test_idioms_are_not_relations():
    assert answers("a horse ridden by a man", "relation") == {None}
    assert answers("a horse ridden bareback by a man", "relation") == {None}
    assert answers("a woman dressed in black", "relation") == {None}


@pytest.mark.parametrize("seed", range(3))
def test_text_outside_the_edit_is_unchanged(seed):
    tested = 0
    for caption in generated(200, seed):
        for name in ("attribute", "object", "action"):
            negative = make_negatives(caption, seed=seed, types=(name,))[name]
            if negative is None or sorted(negative.split()) == sorted(caption.split()):
                continue  # two values that changed places
            start = len(longest_common_prefix(caption, negative))
            end = len(longest_common_prefix(caption[start:][::-1], negative[start:][::-1]))
            changed = caption[start : len(caption) - end]
            # one edit: at most a verb with its particle, or "a" and the word after it
            assert len(changed.split()) <= 3, (caption, negative)
            tested += 1
    assert tested > 300


def longest_common_prefix(one, two):
    size = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    return one[:size] if size is not None else min(one, two, key=len)


def test_odd_spaces_and_marks_survive():
    negative = make_negatives("  A  red   bus !! (on \u2026 Monday)\t", types=("attribute",))[
        "attribute"
    ]
    assert re.fullmatch(r"  An?  \w+   bus !! \(on \u2026 Monday\)\t", negative)


# Forbidden words, and the four together


def test_forbidden_words_are_respected_in_any_form():
    everything = answers("A dog", "object")
    assert "A cat" in everything
    assert "A cat" not in answers("A dog", "object", forbidden=frozenset({"cats"}))
    assert "A cat" not in answers("A dog", "object", forbidden=frozenset({"kitten"}))
    assert answers("Open umbrellas", "attribute") == {"Closed umbrellas", "Shut umbrellas"}
    assert answers("Open umbrellas", "attribute", forbidden=frozenset({"shut"})) == {None}


def test_a_word_named_elsewhere_in_the_caption_is_not_brought_in():
    assert not any(n.count("cat") > 1 for n in answers("A dog and a cat", "object") if n)


def test_no_negative_equals_the_caption_or_another_one():
    for caption in generated(300):
        found = [n for n in make_negatives(caption).values() if n is not None]
        plain = [" ".join(text.casefold().split()) for text in [caption, *found]]
        assert len(set(plain)) == len(plain)


def test_keys_come_in_the_order_of_the_types():
    assert NEGATIVE_TYPES == ("relation", "attribute", "object", "action")
    assert tuple(make_negatives(HORSE)) == NEGATIVE_TYPES
    assert tuple(make_negatives(HORSE, types=("object", "relation"))) == ("relation", "object")


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="unknown negative type 'verb'"):
        make_negatives(HORSE, types=("verb",))


# Determinism


def test_the_same_arguments_give_the_same_negatives_in_another_process():
    code = f"from negatives import make_negatives as m; print(m({HORSE!r}, seed=3, key=7))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": salt, "PYTHONPATH": str(SCRIPT.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for salt in ("1", "2")
    }
    assert seen == {str(make_negatives(HORSE, seed=3, key=7))}


def test_seed_and_key_change_the_choices():
    assert len({str(make_negatives(HORSE, seed=s)) for s in range(20)}) > 5
    assert len({str(make_negatives(HORSE, key=k)) for k in range(20)}) > 5


# The command


# Sources

IMAGE = "val2014/COCO_val2014_000000000009.jpg"
CAPTION = "A dog on a couch."


# Edits, slots, engines, shards


def test_the_slots_prefer_what_the_captions_say():
    captions = ["A man riding a brown horse on the beach."] * 60 + ["A black cat on a red mat."] * 9
    captions += ["A man riding a white horse in a field."] * 60
    slots = negatives.learn_slots(filter(None, map(negatives._read, captions)))
    found = [
        make_negatives(HORSE, seed=seed, types=("attribute",), slots=slots)["attribute"]
        for seed in range(60)
    ]
    assert sum("white horse" in text for text in found) > 30
    plain = [make_negatives(HORSE, seed=s, types=("attribute",))["attribute"] for s in range(60)]
    assert sum("white horse" in text for text in plain) < 20


def test_the_order_of_what_the_slots_learn_does_not_matter():
    read = [s for s in map(negatives._read, generated(200)) if s]
    one, two = negatives.learn_slots(read), negatives.learn_slots(read[::-1])
    assert one.balance == two.balance
    assert all(
        make_negatives(c, slots=one) == make_negatives(c, slots=two) for c in generated(50, 1)
    )


def test_the_balance_makes_words_come_and_go_more_evenly():
    captions = [f"A {colour} cup on a table." for colour in ["red"] * 90 + ["blue"] * 9 + ["green"]]
    read = [s for s in map(negatives._read, captions) if s]
    slots = negatives.learn_slots(read, ("attribute",))
    balance = slots.balance["attribute"].words
    assert balance["red"] > balance["blue"]  # red goes out most, so it is welcome where it comes in


def test_refining_leaves_out_what_words_give_away_and_keeps_what_comes_and_goes():
    captions = [f"A {colour} cup on a table." for colour in ["red"] * 200 + ["blue"] * 200]
    captions += ["A room with a clock."] * 200
    read = [s for s in map(negatives._read, captions) if s]
    slots = negatives.learn_slots(read, ("relation", "attribute"), refine=13.0)
    told = answers("A room with a clock.", "relation", slots=slots)
    assert told == {None}  # "without" would only ever come in
    assert answers("A room with a clock.", "relation") == {"A room without a clock."}
    kept = [
        make_negatives("A red cup on a table.", seed=s, types=("attribute",), slots=slots)
        for s in range(60)
    ]
    assert sum(row["attribute"] == "A blue cup on a table." for row in kept) > 30


# Mistakes


def test_an_article_does_not_look_at_capitals():
    found = answers("A DOG IN A KITCHEN", "object", seeds=80) | answers("A Dog", "object")
    assert not any(re.search(r"\bA [AEIOU]", n) for n in found)
    assert negatives._article("European") == negatives._article("once") == "a"
    assert negatives._article("Office") == negatives._article("8") == "an"


def test_what_stands_in_a_longer_word_is_not_brought_in():
    rows = ["A child with an apple", "A man's apple on a table", "A black-and-white dog"]
    told = set().union(*(negatives._facts(negatives._read(row)) for row in rows))
    assert {"man", "black", "white"} <= told


def stop_after_a_block(monkeypatch, argv):
    def killed(jobs, *_):
        yield from negatives._work(jobs[:256])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("negatives._results", killed)
        with pytest.raises(KeyboardInterrupt):
            main(argv)


# Strange captions


@pytest.mark.parametrize(
    "caption",
    [
        "",
        " ",
        "\x00\x01\x02",
        "\U0001f600 \U0001f436",
        "\u732b\u304c\u5bdd\u3066\u3044\u308b",
        "Un homme avec un chien dans la rue",
        "...",
        "1234 5678",
        "a" * 10_000,
        "###",
    ],
)
def test_what_is_not_an_english_sentence_has_no_negatives(caption):
    assert set(make_negatives(caption).values()) == {None}


@pytest.mark.parametrize(
    "unit", ["a dog ", "a ", "and ", "black and ", "of ", "hot ", "-", "\u0130", "very "]
)
def test_a_caption_of_ten_thousand_letters_is_fast_and_changes_early(unit):
    caption = unit * (10_000 // len(unit))
    start = time.perf_counter()
    found = make_negatives(caption)
    assert time.perf_counter() - start < 0.2
    assert all(n is None or n.endswith(caption[1000:]) for n in found.values())


def test_random_text_never_crashes():
    g = random.Random(0)
    words = re.findall(
        r"\S+", "a an the two dog dogs on in of and with is red riding rides , . that 's x"
    )
    for _ in range(3000):
        caption = " ".join(g.choices(words, k=g.randrange(12)))
        found = make_negatives(caption, seed=1)
        assert tuple(found) == NEGATIVE_TYPES


def test_the_second_of_two_things_can_be_missing():
    assert "A kitchen with a stove but no oven." in answers(
        "A kitchen with a stove and an oven.", "relation"
    )
    assert "A sink but no toilet in a bathroom" in answers(
        "A sink and a toilet in a bathroom", "relation"
    )
    found = answers("A man with a hat and a woman walk", "relation", seeds=80)
    assert not any("but no" in text for text in found if text)
    assert answers("A man and a woman", "relation") == {"A man but no woman"}
    assert answers("A man and a woman walk", "relation") == {None}
    assert answers("A zebra and a zebra", "relation") == {None}


def test_a_whole_list_can_be_missing():
    found = answers("A room with a sink, a window and a tub", "relation")
    assert "A room without a sink, a window or a tub" in found
    assert answers("A man wearing a hat and a tie", "relation") >= {"A man without a hat or a tie"}
    assert not any(
        "or" in n.split() for n in answers("A room with a bed and two chairs", "relation") if n
    )


def test_who_does_nothing_to_a_thing_is_apart_from_it():
    assert "A man next to a horse" in answers("A man riding a horse", "relation")
    assert answers("A man swings a bat at a ball", "relation") == {None}
    assert answers("A dog holding a ball in its mouth", "relation") == {None}


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("Two dogs next to each other", "Two dogs far from each other"),
        ("The top of a tower", "The bottom of a tower"),
        ("A man skis down a snow covered hill", "A man skis up a snow covered hill"),
        ("A man walking up to a station", "A man walking away from a station"),
        ("A sign above a strange thingy", "A sign below a strange thingy"),
        ("A man sits on the ground", "A man sits on the roof"),
    ],
)
def test_more_relations(caption, wanted):
    assert wanted in answers(caption, "relation")


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("A zebra in a field", "A zebra running in a field"),
        ("A pizza on a plate", "A pizza falling off a plate"),
        ("A boat in the water", "A boat sinking in the water"),
        ("Food placed on a table", "Food falling off a table"),
        ("A plane flying in the sky", "A plane falling from the sky"),
        ("A train traveling down the tracks", "A train parked on the tracks"),
        ("A bus that is parked at a station", "A bus that is driving past a station"),
        ("Two men pose for a picture", "Two men look at a picture"),
        ("A horse eating grass", "A horse lying on grass"),
        ("A man skis down a hill", "A man climbs a hill"),
        ("A boy jumps in the air", "A boy sits on the ground"),
        ("A girl brushing her teeth", "A girl pointing at her teeth"),
    ],
)
def test_acts_with_the_relation_after_them(caption, wanted):
    assert wanted in answers(caption, "action", seeds=80)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A bicycle parked at a station", "action"),  # does not drive
        ("A boat with a man sailing in the water", "action"),  # the man does not sink
        ("A sheep with other sheep", "object"),
        ("A woman helps her child brush", "object"),
        ("A person not wearing a shirt", "object"),
        ("The urban city", "attribute"),
    ],
)
def test_what_the_rest_of_the_caption_forbids(caption, name):
    wrong = "driving|moving|passing|sinks|sinking|horse|goat|comb|coat|jacket|rural"
    assert not any(re.search(wrong, n) for n in answers(caption, name, seeds=80) if n)


@pytest.mark.parametrize(
    ("caption", "name", "wrong"),
    [
        ("A person under an umbrella", "relation", "next to|beside"),  # which are no contradictions
        ("A bus pulling up to a station", "relation", "away from"),
        ("A girl in a dress", "relation", "without"),
        ("A boy wearing red shorts", "relation", "without"),
        ("A person holding a dog", "relation", "next to"),
        ("A boat in a lake", "relation", "next to|beside"),
        ("A man riding on a horse", "relation", "next to|behind|in front of"),
        ("A cat by the water in the grass", "relation", "water next to|water beside"),
        ("A man eating cake on a plate", "relation", "next to|in front of"),
        ("A city full of buildings", "relation", "without"),
        ("A clock in its tower", "relation", "outside"),
        ("A batter swings in a baseball game", "relation", "after"),
        ("A steak and vegetable meal", "relation", "but no"),
        ("The only boat on a river", "relation", "."),
        ("People walking down a street", "action", "jump"),
        ("Men lying on top of each other", "action", "."),
        ("A bus pulling a truck behind it", "action", "pass"),
        ("A woman flying her kite", "action", "buy"),
        ("A woman wearing a purse", "action", "hold|carry"),
        ("A man wind surfing", "action", "."),
        ("A person holding a bat reaching up", "action", "point"),
        ("A couple people on a bench", "object", "^A (dogs|monkeys|robots)"),
        ("A vase behind glass", "object", "behind (vase|cup)"),
        ("A pulled pork sandwich", "object", "pulled"),
        ("A man in a suit pulling on his jacket", "object", "his (dress|robe|kimono|apron)"),
        ("A bird flying over a lake", "object", "lizard|monkey|squirrel"),
        ("A stove with a burner", "object", "^A (fridge|refrigerator|microwave)"),
        ("A man eating food", "object", "wine|paint|laundry"),
        ("A dirt bike", "attribute", "grassy"),
        ("A steep hill", "attribute", "flat"),
        ("A young calf", "attribute", "old"),
        ("A green tree", "attribute", "blue|purple|pink"),
        ("Two phones, one open", "attribute", "(Three|Several|Four|Five) phones"),
        ("A large long bus", "attribute", "small long"),
        ("A wooden spoon", "attribute", "brick|stone|concrete"),
        ("Old fashioned boats", "attribute", "new"),
        ("A STOP sign", "attribute", "Two"),
        ("A sign that says stop", "attribute", "Two"),
    ],
)
def test_what_readers_found_odd_or_still_true_is_not_made(caption, name, wrong):
    assert not any(re.search(wrong, n, re.IGNORECASE) for n in answers(caption, name, 80) if n)


def test_captions_tell_relations_and_numbers_of_their_things():
    sentence = negatives._read("Several dogs sleep on top of a table")
    assert {"several dog", "on top of table", "on table"} <= negatives._facts(sentence)


def test_learning_leaves_the_garbage_collector_as_it_was():
    assert gc.isenabled()
    with pytest.raises(AttributeError):
        negatives.learn_slots([None])
    assert gc.isenabled()


def test_words_of_measures_and_first_capitals_stay():
    assert answers("A 2 year old boy", "attribute") == {None}
    assert answers("An 8 foot tall man", "attribute") == {None}
    found = answers("TV on a wooden stand.", "object")
    assert all(n[0].isupper() for n in found if n)
    assert len(found) > 1


def test_whoever_stands_apart_from_the_verb_does_it():
    assert "A man with a hat dropping a bat" in answers(
        "A man with a hat swinging a bat", "action", seeds=80
    )


def test_a_noun_and_a_participle_describe_the_next_noun():
    assert "A grassy slope" not in answers("A snow covered slope", "object")
    assert all(n.startswith("A snow covered") for n in answers("A snow covered slope", "object"))
    assert answers("An orange and red train", "object") >= {"An orange and red bus"}


def test_a_young_boy_becomes_an_elderly_man():
    assert answers("A young boy", "attribute") == {"An elderly man"}
    assert answers("Two young girls", "attribute") >= {"Two elderly women"}


def test_what_reads_oddly_without_is_not_denied():
    assert answers("A woman with blonde hair", "relation") == {None}
    assert answers("A room with a bed", "relation") == {"A room without a bed"}

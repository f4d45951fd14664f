"""The shapes world's captions and negatives, and the results of record that come from it."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

import data
import evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import make_tables

SCENES = [data.make_scene("train", 0, index) for index in range(300)]


def bag(sentence):
    return Counter(sentence.replace("an ", "a ").split())


def true_sentences(scene):
    """All that is true of a scene and can be said of the things in it."""
    nouns = [data.Noun(size, *t.phrase[1:]) for t in scene.things for size in ("", t.phrase.size)]
    claims = [data.Claim(noun, link, None) for noun in nouns for link in data.PLACES]
    for one, two in itertools.permutations(nouns, 2):
        claims += [data.Claim(one, link, two) for link in (*data.RELATIONS, *data.ACTIONS)]
    held = [claim for claim in claims if data.holds(scene, claim)]
    return {data.say(claim, template) for claim in held for template in range(data.TEMPLATES)}


def test_what_a_bag_of_words_can_reach():
    """The ceiling: half of the items whose captions have the same words, and all others."""
    same = {name: [] for name in data.EDITS}
    for item in evaluate.load_shapes(None):
        if isinstance(item, evaluate.TestItem):
            one, two = map(bag, item.texts)
            same[item.path[0]].append(one == two)
    ceiling = {name: 100 - 50 * sum(equal) / len(equal) for name, equal in same.items()}
    assert ceiling == {name: 50 if name.startswith("swap") else 100 for name in data.EDITS} | {
        "replace-relation": 93.8
    }


@pytest.mark.parametrize("kind", data.SHAPES_NEGATIVES)
def test_negatives_of_each_kind_are_false(kind):
    made = Counter()
    for index, scene in enumerate(SCENES):
        captions, true = data.caption_scene(scene, index, kind), true_sentences(scene)
        assert captions.caption in true
        assert not data.is_false(scene, captions.caption)
        for name, negative in zip(data.NEGATIVE_TYPES, captions.negatives, strict=True):
            if negative is not None:
                made[name] += 1
                assert negative not in true
                assert data.is_false(scene, negative)
                assert kind != "exchange" or bag(negative) == bag(captions.caption)
    least = {"relation": 25, "attribute": 150, "object": 20, "action": 20}
    types = {"exchange": ["relation", "attribute"], "lexicon": ["relation", "attribute", "object"]}
    wanted = types.get(kind, data.NEGATIVE_TYPES)
    assert set(made) == set(wanted)
    assert all(made[name] >= least[name] for name in wanted), made


def test_what_the_world_does_not_know_is_not_called_false():
    scene = next(s for s in SCENES if s.claim.link == "above")
    one, two = data.say(scene.claim, 0).split(" above ")
    assert not data.is_false(scene, f"{one} beside {two}")
    assert data.is_false(scene, f"{one} below {two}")
    assert data.is_false(scene, f"a pink umbrella above {two}")


RESULTS = Path(__file__).parents[1] / "scripts/results"


def cells_of_record():
    """(file, row, cell) of every figure in the shapes world's results that is no average."""
    for name in ("quickstart.json", "bases-shapes-seeds.json"):
        for label, result in json.loads((RESULTS / name).read_text()).items():
            tables = result["suites"]["shapes"]
            for row, cell in {**tables["subsets"], **tables["costs"]}.items():
                yield f"{name} {label}", row, cell
    for path in RESULTS.glob("*-shapes.json"):
        for line in json.loads(path.read_text())["rows"]:
            for cell in line["cells"] if "mean" not in line["row"] else ():
                yield f"{path.name} {line['name']}", line["row"], cell


def test_intervals_of_record_are_those_of_this_code():
    cells = list(cells_of_record())
    assert len(cells) >= 42
    for where, row, cell in cells:
        right = round(cell["accuracy"] / 100 * cell["scored"])
        verdicts = [True] * right + [False] * (cell["scored"] - right)
        figure = evaluate.figure_of("shapes", row, {(): verdicts})
        now = evaluate.cell_of(figure.value, figure.draws, figure.effective, figure.items)
        assert [now[x] for x in ("accuracy", "low", "high")] == pytest.approx(
            [cell[x] for x in ("accuracy", "low", "high")]
        ), (where, row)


def test_means_of_record_are_those_of_this_code():
    for path in RESULTS.glob("*-shapes.json"):
        for line in json.loads(path.read_text())["rows"]:
            tables = [
                {"subsets": {line["row"]: x}, "averages": {}, "costs": {}} for x in line["cells"]
            ]
            now = make_tables.judge_row(line["row"], {}, tables, "shown")
            for key in ("ours", "low", "high", "tolerance"):
                assert now[key] == pytest.approx(line[key]), (path, line["row"])

"""Evaluation: official rules item for item, averages of the papers, loaders, models, outputs."""

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import data
import evaluate
from evaluate import Crop
from evaluate import TestItem as Item

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import make_tables  # noqa: E402
import suites  # noqa: E402

VALSE = list(json.loads((ROOT / "scripts/suites.json").read_text())["valse"]["expected"])


class Random:
    """An encoder whose features are few, so that many scores tie."""

    def __init__(self, seed, kinds=4, width=8):
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((kinds, width)).astype(np.float32)
        self.pool = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self.rng = rng

    def _some(self, names):
        names = list(dict.fromkeys(names))
        rows = self.pool[self.rng.integers(len(self.pool), size=len(names))]
        return evaluate.Features(rows, {name: i for i, name in enumerate(names)})

    images = texts = _some


class Fixed(Random):
    """The same, with features that stay; `row` gives the feature of a name."""

    def __init__(self, seed, kinds=4):
        super().__init__(seed, kinds)
        self.memory = {}

    def _some(self, names):
        names = list(dict.fromkeys(names))
        for name in names:
            self.memory.setdefault(name, self.pool[self.rng.integers(len(self.pool))])
        rows = np.array([self.memory[name] for name in names]) if names else np.zeros((0, 1))
        return evaluate.Features(rows, {name: i for i, name in enumerate(names)})

    images = texts = _some

    def score(self, image, text):
        return float((self.memory[image] * self.memory[text]).sum(dtype=np.float32))


def suite_of(name, items, costs=()):
    return evaluate.Suite(name, list(items), list(costs), {}, [])


def pairs(count, subset="add_att", options=2):
    return [
        Item((subset,), str(i), (f"i{i}",), tuple(f"t{i}-{j}" for j in range(options)))
        for i in range(count)
    ]


# The shape of the scores picks the rule


@pytest.mark.parametrize(
    ("scores", "true", "verdicts", "tie"),
    [
        ([[0.5, 0.4]], 1, {"correct": True}, False),
        ([[0.5, 0.5]], 1, {"correct": False}, True),
        ([[0.5, 0.3, 0.4]], 2, {"correct": False}, False),
        ([[0.6], [0.2], [0.7]], 1, {"correct": False}, False),
        ([[0.6, 0.5], [0.2, 0.4]], 1, {"text": True, "image": False, "group": False}, False),
        ([[0.6, 0.1], [0.2, 0.3]], 1, {"text": True, "image": True, "group": True}, False),
        ([[0.6, 0.6], [0.2, 0.7]], 1, {"text": False, "image": True, "group": False}, True),
    ],
)
def test_the_shape_of_the_scores_picks_the_rule(scores, true, verdicts, tie):
    assert evaluate.judge(np.array(scores), true) == (verdicts, tie)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_official_ties_are_argmax_in_the_official_order(place):
    rng = random.Random(place)
    for _ in range(200):
        line = [rng.choice((0.1, 0.2, 0.3)) for _ in range(4)]
        official = [*line[1 : 1 + place], line[0], *line[1 + place :]]
        wanted = int(np.argmax(official)) == place
        verdicts, tie = evaluate.judge(np.array([line]), 1, place)
        assert verdicts["correct"] == wanted
        assert tie == (line[0] == max(line[1:]))


def test_scores_of_equal_texts_are_equal():
    rng = np.random.default_rng(0)
    text = rng.standard_normal((1, 513)).astype(np.float32)
    image = rng.standard_normal((3, 513)).astype(np.float32)
    scores = evaluate.cosines(image, np.repeat(text, 7, axis=0))
    assert scores.dtype == np.float32
    assert (scores == scores[:, :1]).all()


# The official codes' rules, written down as plain loops, on random features with ties


def test_sugarcrepe_is_as_its_code_counts_it():
    encoder, items = Fixed(1), pairs(300)
    got = evaluate.score_suite(suite_of("sugarcrepe", items), encoder)
    correct = 0
    for item in items:
        positive = encoder.score(item.images[0], item.texts[0])
        negative = encoder.score(item.images[0], item.texts[1])
        wanted = 1 if positive > negative else 0
        assert got.subsets["add_att"][()][int(item.id)] == wanted
        correct += wanted
    assert 0 < correct < 300
    assert got.ties["add_att"] > 10
    assert sum(got.subsets["add_att"][()]) == correct


def test_valse_is_as_the_papers_code_counts_it():
    encoder, items = Fixed(2), pairs(300, "plurals")
    got = evaluate.score_suite(suite_of("valse", items), encoder).subsets["plurals"][()]
    for item, right in zip(items, got, strict=True):
        logits = [100 * encoder.score(item.images[0], text) for text in item.texts]
        for _ in range(2):  # the code applies softmax twice
            top = max(logits)
            powers = [math.exp(x - top) for x in logits]
            logits = [x / sum(powers) for x in powers]
        assert right == (logits[0] > 0.5)


@pytest.mark.parametrize(("subset", "place"), [("VG-Relation", 1), ("COCO-Order", 0)])
@pytest.mark.parametrize("ties", ["wrong", "official"])
def test_aro_is_as_its_code_counts_it(subset, place, ties):
    """VG: [false, true], argmax == 1. Order: [true, shuffles ...], argmax == 0."""
    encoder = Fixed(3)
    options = 2 if place else 5
    items = [item._replace(place=place) for item in pairs(300, subset, options)]
    got = evaluate.score_suite(suite_of("aro", items), encoder, ties).subsets[subset][()]
    tied = 0
    for item, right in zip(items, got, strict=True):
        line = [encoder.score(item.images[0], text) for text in item.texts]
        official = line[::-1] if place else line
        wanted = int(np.argmax(official)) == place
        if line[0] == max(line[1:]):
            tied += 1
            wanted = wanted and ties == "official"
        assert right == wanted
    assert tied > 10


def test_winoground_is_as_its_code_counts_it():
    encoder = Fixed(4)
    items = [
        Item(("winoground",), str(i), (f"a{i}", f"b{i}"), (f"c{i}", f"d{i}")) for i in range(400)
    ]
    got = evaluate.score_suite(suite_of("winoground", items), encoder).subsets
    for n, item in enumerate(items):
        (i0, i1), (c0, c1) = item.images, item.texts
        s = encoder.score
        text = s(i0, c0) > s(i0, c1) and s(i1, c1) > s(i1, c0)
        image = s(i0, c0) > s(i1, c0) and s(i1, c1) > s(i0, c1)
        assert got["winoground text"][()][n] == text
        assert got["winoground image"][()][n] == image
        assert got["winoground group"][()][n] == (text and image)
    assert 0 < sum(got["winoground group"][()]) < 400


def test_winoground_tags_are_counted_apart(tmp_path):
    rows = []
    for i in range(60):
        row = {"id": i, "image_0": "a", "image_1": "b", "caption_0": f"x{i}", "caption_1": f"y{i}"}
        row |= {"tag": "Adjective-Age", "collapsed_tag": ["Object", "Relation", "Both"][i % 3]}
        rows.append({**row, "secondary_tag": "Series, Symbolic" * (i < 5), "num_main_preds": 1})
    write(tmp_path / "winoground/examples.jsonl", "\n".join(map(json.dumps, rows)))
    for name in "ab":
        photo(tmp_path / f"winoground/images/{name}.png")
    suite = evaluate.load_suite("winoground", tmp_path, True)
    encoder = Fixed(9)
    scored = evaluate.score_suite(suite, encoder)
    table = evaluate.summarise(suite, scored)["tags"]
    kinds = {"collapsed_tag Object", "collapsed_tag Relation", "collapsed_tag Both"}
    kinds |= {"tag Adjective-Age", "secondary_tag Series", "secondary_tag Symbolic"}
    assert set(table) == kinds | {"num_main_preds 1"}
    right = {"text": 0, "image": 0, "group": 0}
    for row, item in zip(rows, suite.items, strict=True):
        if row["collapsed_tag"] == "Relation":
            (i0, i1), (c0, c1), s = item.images, item.texts, encoder.score
            text = s(i0, c0) > s(i0, c1) and s(i1, c1) > s(i1, c0)
            image = s(i0, c0) > s(i1, c0) and s(i1, c1) > s(i0, c1)
            right["text"] += text
            right["image"] += image
            right["group"] += text and image
    wanted = {name: pytest.approx(100 * count / 20) for name, count in right.items()}
    assert table["collapsed_tag Relation"] == {"scored": 20, **wanted}
    assert table["secondary_tag Symbolic"]["scored"] == 5


def test_bivlc_counts_each_direction_alone():
    encoder = Fixed(10)
    items = [
        Item((("replace", "add", "swap")[i % 3],), str(i), (f"a{i}", f"b{i}"), (f"c{i}", f"d{i}"))
        for i in range(300)
    ]
    suite = suite_of("bivlc", items)
    result = evaluate.summarise(suite, evaluate.score_suite(suite, encoder))
    count = dict.fromkeys(("Ipos2T", "Ineg2T", "Tpos2I", "Tneg2I"), 0)
    for item in items:
        (positive, negative), (caption, foil), s = item.images, item.texts, encoder.score
        count["Ipos2T"] += s(positive, caption) > s(positive, foil)
        count["Ineg2T"] += s(negative, foil) > s(negative, caption)
        count["Tpos2I"] += s(positive, caption) > s(negative, caption)
        count["Tneg2I"] += s(negative, foil) > s(positive, foil)
    for name, right in count.items():
        mean = result["averages"][f"{name}: mean of items"]["accuracy"]
        assert mean == pytest.approx(100 * right / 300)
        assert f"swap {name}" in result["subsets"]
    assert len(set(count.values())) > 1


@pytest.mark.parametrize("missing", [False, True])
def test_whatsup_pairs_and_sets_are_as_its_code_counts_them(missing):
    """The official loop over (first object, last object) and the second word of the name."""
    ways = {
        "Controlled A": ("left_of", "right_of", "on", "under"),
        "Controlled B": ("left_of", "right_of", "in-front_of", "behind"),
    }
    items, encoder = [], Fixed(11, kinds=30)
    for subset, four in ways.items():
        for n in range(150):
            for way in four:
                image = f"data/{subset[-1]}/big-mug{n}_{way}_table.jpeg"
                texts = tuple(f"{n} {way} {subset} {k}" for k in range(2))
                items.append(Item((subset,), f"{n} {way}", (image,), texts))
    left_out = [item for i, item in enumerate(items) if missing and i % 37 == 0]
    kept = [item for item in items if item not in left_out]
    suite = suite_of("whatsup", kept)._replace(expected=dict.fromkeys(ways, 600))
    scored = evaluate.score_suite(suite, encoder)
    table = evaluate.summarise(suite, scored)["averages"]
    for subset in ways:
        right = {}
        for item in kept:
            if item.path[0] == subset:
                name = item.images[0].split("/")[-1]
                pair = (name.split("_")[0], name.split("_")[-1][:-5])
                one, two = (encoder.score(item.images[0], text) for text in item.texts)
                right.setdefault(pair, {})[name.split("_")[1]] = one > two
        pair_correct = pairs = set_correct = sets = 0
        for has in right.values():
            other = ("on", "under") if subset[-1] == "A" else ("in-front", "behind")
            for a, b in (("left", "right"), other):
                pairs += a in has and b in has
                pair_correct += has.get(a, False) and has.get(b, False)
            sets += len(has) == 4
            set_correct += sum(has.values()) == 4
        cells = table[f"{subset} pairs"], table[f"{subset} sets"]
        assert [cell["scored"] for cell in cells] == [pairs, sets]
        assert [cell["expected"] for cell in cells] == [300, 150]
        assert cells[0]["accuracy"] == pytest.approx(100 * pair_correct / pairs)
        assert cells[1]["accuracy"] == pytest.approx(100 * set_correct / sets)
        assert (pairs, sets) == (300, 150) or missing
        assert 0 < set_correct < pair_correct


def test_sugarcrepe_pp_asks_both_positives_with_and_without_the_image():
    encoder = Fixed(5)
    items = []
    for i in range(200):
        texts = (f"a{i}", f"b{i}", f"n{i}")
        items.append(Item(("swap_obj",), str(i), (f"i{i}",), texts, true=2))
        items.append(Item(("swap_obj text-only",), str(i), (), texts, true=2))
    got = evaluate.score_suite(suite_of("sugarcrepe_pp", items), encoder).subsets
    for i in range(200):
        s = encoder.score
        image = s(f"i{i}", f"a{i}") > s(f"i{i}", f"n{i}") < s(f"i{i}", f"b{i}")
        text = s(f"a{i}", f"b{i}") > s(f"a{i}", f"n{i}") and s(f"a{i}", f"b{i}") > s(
            f"b{i}", f"n{i}"
        )
        assert got["swap_obj"][()][i] == image
        assert got["swap_obj text-only"][()][i] == text


def test_hard_positives_count_augmented_original_and_brittle():
    encoder = Fixed(6)
    items = [
        Item(("swap",), str(i), (f"i{i}",), (f"c{i}", f"p{i}", f"n{i}"), true=2) for i in range(200)
    ]
    got = evaluate.score_suite(suite_of("hard_positives", items), encoder).subsets
    for i in range(200):
        c, p, n = (encoder.score(f"i{i}", f"{x}{i}") for x in "cpn")
        assert got["swap"][()][i] == (c > n and p > n)
        assert got["swap original"][()][i] == (c > n)
        assert got["swap brittle"][()][i] == ((c > n) != (p > n))


@pytest.mark.parametrize("ties", ["wrong", "official"])
def test_retrieval_is_a_sort_of_every_row_and_column(ties):
    encoder = Fixed(7, kinds=12)
    image_of = [0] * 5 + [1] * 6 + [2, 2, 3, 4, 4, 5, 6, 7]
    cost = evaluate.Retrieval(
        "COCO", [f"i{i}" for i in range(8)], [f"t{i}" for i in range(len(image_of))], image_of
    )
    got = evaluate.score_suite(suite_of("retrieval", [], [cost]), encoder, ties).costs
    for k in (1, 5, 10):
        hits = []
        for i in range(8):
            line = [encoder.score(f"i{i}", f"t{j}") for j in range(len(image_of))]
            worst = ties == "wrong"  # own texts go behind wrong ones of the same score
            order = sorted(
                range(len(line)), key=lambda j: (-line[j], worst and image_of[j] == i, j)
            )
            hits.append(any(image_of[j] == i for j in order[:k]))
        assert got[f"COCO image to text R@{k}"][()] == hits
        hits = []
        for j, own in enumerate(image_of):
            line = [encoder.score(f"i{i}", f"t{j}") for i in range(8)]
            order = sorted(range(8), key=lambda i: (-line[i], ties == "wrong" and i == own, i))
            hits.append(own in order[:k])
        assert got[f"COCO text to image R@{k}"][()] == hits
    assert evaluate.score_suite(suite_of("retrieval", [], [cost]), encoder).ties.total() > 10


@pytest.mark.parametrize("ties", ["wrong", "official"])
def test_zero_shot_averages_prompts_and_takes_the_first_maximum(ties):
    encoder = Fixed(8, kinds=3)
    labels = [i % 3 for i in range(200)]
    prompts = [["a", "b"], ["a", "b"], ["c", "d", "e"]]  # classes 0 and 1 tie always
    cost = evaluate.Classes("x", [f"i{i}" for i in range(200)], labels, prompts)
    got = evaluate.score_suite(suite_of("zeroshot", [], [cost]), encoder, ties).costs
    for i, label in enumerate(labels):
        scores = []
        for lines in prompts:
            mean = np.mean([encoder.memory[line] for line in lines], axis=0)
            mean = mean / np.linalg.norm(mean)
            scores.append(float(mean @ encoder.memory[f"i{i}"]))
        wanted = int(np.argmax(scores)) == label
        if ties == "wrong" and label in (0, 1):
            wanted = False
        assert got["zero-shot x"][()][i] == wanted


def test_accuracy_per_class_is_the_mean_over_classes():
    cost = evaluate.Classes("pets", list("abcd"), [0, 0, 0, 1], [["p"], ["q"]], per_class=True)
    encoder = Fixed(0, kinds=2)
    encoder.memory = {x: encoder.pool[0] for x in ("a", "b", "c", "d", "p")}
    encoder.memory["q"] = encoder.pool[1]
    suite = suite_of("zeroshot", [], [cost])
    scored = evaluate.score_suite(suite, encoder)
    assert evaluate.summarise(suite, scored)["costs"]["zero-shot pets"]["accuracy"] == 50


def elevater_map(scores, shown):
    """11-point mAP as ELEVATER's metric walks sklearn's curve, written down as plain loops."""
    total = 0
    for c in range(len(scores[0])):
        line = [(row[c], c in labels) for row, labels in zip(scores, shown, strict=True)]
        positives = sum(right for _, right in line)
        curve = [(1.0, 0.0)]  # precision and recall, from the highest threshold
        for threshold in sorted({score for score, _ in line}, reverse=True):
            taken = [right for score, right in line if score >= threshold]
            curve.append((sum(taken) / len(taken), sum(taken) / positives))
        curve.reverse()
        k, best, points = 0, 0, []
        for threshold in np.linspace(1, 0, 11).tolist():
            while k < len(curve) and threshold <= curve[k][1]:
                best = max(best, curve[k][0])
                k += 1
            points.append(best)
        total += sum(points) / 11
    return total / len(scores[0])


def softmax_scores(encoder, cost):
    rows = []
    for image in cost.images:
        logits = [
            100 * torch.tensor(encoder.memory[image] * encoder.memory[lines[0]]).sum()
            for lines in cost.prompts
        ]
        rows.append(torch.stack(logits).softmax(0).tolist())
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_voc_is_the_11_point_map_of_elevater(seed):
    rng = random.Random(seed)
    n = 60
    shown = [[c for c in range(5) if rng.random() < 0.3] for _ in range(n)]
    prompts = [[f"c{c}"] for c in range(5)]
    cost = evaluate.Classes("voc2007", [f"i{i}" for i in range(n)], [], prompts)
    cost = cost._replace(shown=shown, metric="map11")
    encoder = Fixed(seed, kinds=[4, 40, 400, 9][seed])  # few kinds: many ties
    suite = suite_of("zeroshot", [], [cost])
    scored = evaluate.score_suite(suite, encoder)
    cell = evaluate.summarise(suite, scored)["costs"]["zero-shot voc2007"]
    scores = softmax_scores(encoder, cost)
    assert cell["accuracy"] == pytest.approx(100 * elevater_map(scores, shown), abs=1e-4)
    assert cell["low"] < cell["accuracy"] < cell["high"]
    assert (cell["scored"], cell["expected"]) == (n, n)
    assert cell["ties"] > 0 or seed == 2


@pytest.mark.parametrize("kinds", [4, 200])
def test_hateful_memes_is_the_area_under_the_curve(kinds):
    rng = random.Random(kinds)
    labels = [int(rng.random() < 0.4) for _ in range(150)]
    images = [f"i{i}" for i in range(150)]
    cost = evaluate.Classes("hateful_memes", images, [], [["a meme."], ["a hatespeech meme."]])
    cost = cost._replace(shown=[[x] for x in labels], metric="auc")
    encoder = Fixed(kinds, kinds=kinds)
    suite = suite_of("zeroshot", [], [cost])
    cell = evaluate.summarise(suite, evaluate.score_suite(suite, encoder))["costs"]
    scores = softmax_scores(encoder, cost)
    true, false = (
        [row[1] for row, x in zip(scores, labels, strict=True) if x == y] for y in (1, 0)
    )
    wins = sum((a > b) + (a == b) / 2 for a in true for b in false)
    wanted = 100 * wins / (len(true) * len(false))
    assert cell["zero-shot hateful_memes"]["accuracy"] == pytest.approx(wanted, abs=1e-4)


def test_ranked_figures_join_the_mean_of_sets_and_are_resampled_by_image():
    n = 400
    rng = np.random.default_rng(0)
    shown = [[int(x)] for x in rng.integers(2, size=n)]
    names = [f"i{i}" for i in range(n)]
    auc = evaluate.Classes("hateful_memes", names, [], [["a"], ["b"]], shown=shown, metric="auc")
    plain = evaluate.Classes("x", names, [x for (x,) in shown], [["a"], ["b"]])
    encoder = Fixed(3, kinds=300)
    suite = suite_of("zeroshot", [], [auc, plain])
    result = evaluate.summarise(suite, evaluate.score_suite(suite, encoder))
    one, two = (result["costs"][f"zero-shot {x}"] for x in ("hateful_memes", "x"))
    mean = result["averages"]["zero-shot, mean of 2 sets"]
    assert mean["accuracy"] == pytest.approx((one["accuracy"] + two["accuracy"]) / 2)
    # Hanley and McNeil (1982): about 1 / sqrt(12) * sqrt(1 / n1 + 1 / n0) for a chance ranking.
    half = 100 * 1.96 * math.sqrt((1 / 200 + 1 / 200) / 12)
    assert one["high"] - one["low"] == pytest.approx(2 * half, rel=0.25)


def test_voc_and_memes_are_read_as_elevater_does(tmp_path):
    names = evaluate.read_table("classes")["voc2007"]["names"]
    main = tmp_path / "zeroshot/voc2007/VOCdevkit/VOC2007/ImageSets/Main"
    for name in names:
        flags = {"dog": " 1", "cat": " 0"}.get(name, "-1")  # 0: difficult
        write(main / f"{name}_test.txt", f"000001 {flags}\n000002 -1\n")
    for number in (1, 2):
        photo(main.parents[1] / f"JPEGImages/00000{number}.jpg")
    rows = [{"img": "img/1.png", "label": 0, "text": "x"}, {"img": "img/2.png", "label": 1}]
    memes = tmp_path / "zeroshot/hateful_memes"
    write(memes / "dev_seen.jsonl", "\n".join(map(json.dumps, rows)))
    photo(memes / "img/1.png")
    photo(memes / "img/2.png")
    two, one = evaluate.load_suite("zeroshot", tmp_path, False).costs
    assert one.shown == [[names.index("dog")], []]
    assert [Path(x).name for x in one.images] == ["000001.jpg", "000002.jpg"]
    assert (two.shown, two.prompts) == ([[0], [1]], [["a meme."], ["a hatespeech meme."]])
    Path(one.images[0]).unlink()
    suite = evaluate.load_suite("zeroshot", tmp_path, True)
    assert suite.expected["zero-shot voc2007"] == 2
    left = suite.costs[1]
    assert (len(left.images), left.shown) == (1, [[]])
    with pytest.raises(data.DataError, match="no class has both"):
        evaluate.score_suite(suite_of("zeroshot", [], [left]), Random(0))
    (main / "sofa_test.txt").unlink()
    with pytest.raises(data.DataError, match=r"voc2007: cannot be read .*sofa_test.txt"):
        evaluate.load_suite("zeroshot", tmp_path, False)
    write(main / "sofa_test.txt", "000001 -1\n")
    with pytest.raises(data.DataError, match=r"sofa_test\.txt: names 1 of the 2 photos"):
        evaluate.load_suite("zeroshot", tmp_path, False)
    write(main / "sofa_test.txt", "000001\n")
    with pytest.raises(data.DataError, match="voc2007: its labels are not as published"):
        evaluate.load_suite("zeroshot", tmp_path, False)
    write(memes / "dev_seen.jsonl", json.dumps({"img": "a", "label": 2}))
    with pytest.raises(data.DataError, match="hateful_memes: its labels are not as published"):
        evaluate.load_suite("zeroshot", tmp_path, False)


# Averages: every printed one must come out of ours when fed the paper's columns

PRINTED = {
    "sugarcrepe": {"replace": "replace", "swap": "swap", "add": "add"},
    "vl_checklist": {
        **{"": "mean of 9 columns", "Attribute": "Attribute"},
        **{"Object": "Object", "Relation": "Relation"},
    },
}
# Printed averages that their own columns contradict: one slip, and rows copied from elsewhere
# whose overall mean is that of the three printed averages.
CONTRADICTED = {
    ("sugarcrepe", "CLIP", "replace"),
    ("vl_checklist", "ALBEF", "Attribute"),
    *(("vl_checklist", model, "Relation") for model in ("ALBEF", "UNITER", "BLIP")),
    *(("vl_checklist", model, "") for model in ("ALBEF", "UNITER", "BLIP")),
}


def paper_rows(suite):
    lines = json.loads((ROOT / "scripts/published.json").read_text())[suite]
    return [line for line in lines if line["source"] == "paper"]


def test_valse_averages_of_the_paper():
    """Most rows print the mean of the 11 files, two the mean of the 9 columns, one neither."""
    rule = {"CE-CLIP+": "mean9 (printed columns)", "MiniGPT-4": "mean9 (printed columns)"}
    ours = make_tables.published("valse")
    for line in paper_rows("valse"):
        values = ours[line["model"], "paper"]
        wanted = values[rule.get(line["model"], "mean11 (files)")]
        near = abs(line["printed"][""] - wanted) < 0.06
        assert near == (line["model"] != "CE-XVLM"), line["model"]
    assert ours["CE-CLIP+", "paper"]["mean11 (files)"] == pytest.approx(75.05, abs=0.005)
    assert ours["CLIP", "paper"]["mean7 (phenomena)"] == pytest.approx(67.0, abs=0.05)
    assert ours["CE-CLIP", "vl_compo"]["mean7 (phenomena)"] == pytest.approx(76.7, abs=0.05)


@pytest.mark.parametrize("suite", ["sugarcrepe", "vl_checklist"])
def test_printed_averages_of_the_paper(suite):
    checked = 0
    for line in paper_rows(suite):
        values = make_tables.published(suite)[line["model"], "paper"]
        for key, printed in line.get("printed", {}).items():
            name = PRINTED[suite][key]
            if name not in values:
                continue  # a row of which only averages are printed
            near = abs(printed - values[name]) < 0.065  # some are cut, not rounded
            assert near == ((suite, line["model"], key) not in CONTRADICTED), (line["model"], key)
            checked += 1
    assert checked >= {"sugarcrepe": 12, "vl_checklist": 30}[suite]


def test_averages_of_others_follow_from_their_columns():
    sugarcrepe = make_tables.published("sugarcrepe")
    assert sugarcrepe["CE-CLIP+", "paper"]["mean of 7 subsets"] == pytest.approx(87.51, abs=0.006)
    micro_then_groups = sugarcrepe["CE-CLIP", "vl_compo"]["mean of 3 groups' items"]
    assert micro_then_groups == pytest.approx(85.67, abs=0.01)
    checklist = make_tables.published("vl_checklist")
    for model, mean in {"CLIP": 70.1, "NegCLIP": 74.6, "CE-CLIP": 76.3, "CE-CLIP+": 79.2}.items():
        aspects = checklist[model, "paper"]["mean of 3 aspects"]
        assert aspects == pytest.approx(mean, abs=0.06)
    whatsup = make_tables.published("whatsup")["CLIP", "vl_compo"]
    assert whatsup["mean of 6 subsets"] == pytest.approx(41.46, abs=0.01)
    eqben = make_tables.published("eqben")["CLIP", "vl_compo"]
    assert eqben["group: mean of 5 sources"] == pytest.approx(26.5, abs=0.06)
    mmvp = make_tables.published("mmvp")["CE-CLIP", "vl_compo"]
    assert mmvp["group: mean of 9 patterns"] == pytest.approx(14.8, abs=0.06)
    crepe = make_tables.published("crepe")["CLIP", "vl_compo"]
    assert crepe["mean of 3 subsets"] == pytest.approx(23.7, abs=0.06)


def test_means_of_parts_and_of_their_parts():
    parts = {("vg", "a"): 1.0, ("vg", "b"): 0.0, ("swig", "c"): 0.0}
    assert evaluate.mean_of(parts) == 0.25
    values, counts = {"a": 1.0, "b": 0.0, "c": 0.5}, {"a": 3, "b": 1, "c": 2}
    assert evaluate.average(["a", ["b", "c"]], values, counts) == 0.625
    assert evaluate.average({"items": ["a", "b"]}, values, counts) == 0.75
    assert evaluate.average(["a", "d"], values, counts) is None


# Statistics


def test_mcnemar_is_the_exact_two_sided_test():
    for gained, lost in ((0, 0), (5, 5), (1, 9), (12, 3), (30, 41)):
        n = gained + lost
        tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
        assert evaluate.mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))


def test_paired_comparison_counts_the_items_that_change_sides():
    def scored(rights):
        return evaluate.Scored({"x": {(): rights}}, {}, {}, [])

    ours, theirs = [True] * 60 + [False] * 40, [True] * 20 + [False] * 80
    row = evaluate.compare("sugarcrepe", scored(ours), scored(theirs))["x"]
    assert (row["gained"], row["lost"], row["difference"]) == (40, 0, 40)
    assert row["p"] == pytest.approx(2 * 0.5**40)
    # A paired interval is narrower than that of two independent samples (about +-13).
    assert 29 < row["low"] < 40 < row["high"] < 51


def test_intervals_cover_the_figure_and_shrink_with_items():
    widths = []
    for n in (100, 10000):
        scored = evaluate.Scored(
            {"x": {(): [True] * (n // 2) + [False] * (n // 2)}},
            *({}, {"x": 0}, []),
        )
        suite = suite_of("sugarcrepe", [])
        cell = evaluate.summarise(suite, scored)["subsets"]["x"]
        assert cell["low"] < 50 < cell["high"]
        widths.append(cell["high"] - cell["low"])
    assert widths[0] == pytest.approx(19.6, abs=2)  # 2 * 1.96 * sqrt(.25 / 100)
    assert widths[1] == pytest.approx(1.96, abs=0.2)


def test_intervals_where_all_verdicts_agree_are_wilsons():
    """The ends are where a z-test of the count against the end gives 1.96 (Wilson, 1927)."""

    def cells(tally):
        scored = evaluate.Scored(tally, {}, evaluate.Counter(), [])
        return evaluate.summarise(suite_of("sugarcrepe", []), scored)

    for n in (1, 5, 400):
        full, none = (cells({"x": {(): [right] * n}})["subsets"]["x"] for right in (True, False))
        end = n / (n + 1.959964**2)  # where (1 - p) / sqrt(p (1 - p) / n) = 1.96
        assert full["high"] == 100
        assert full["low"] == pytest.approx(100 * end)
        assert none["low"] == 0
        assert none["high"] == pytest.approx(100 - 100 * end)
    for value, n in ((0.5, 2), (0.2, 30)):
        for end in evaluate.wilson(value, n):
            assert abs(value - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964)
    # Two parts of one item each, one right: a point under the bootstrap, two items in effect.
    two = cells({"x": {("a",): [True], ("b",): [False]}})["subsets"]["x"]
    assert two["accuracy"] == 50
    assert [two["low"], two["high"]] == [100 * x for x in evaluate.wilson(0.5, 2)]
    # Parts of 1 and 9 items with half the weight each: the variance of a mean of theirs is
    # v (1/4 + 1/36), that of n = 3.6 items.
    uneven = cells({"x": {("a",): [True], ("b",): [True] * 9}})["subsets"]["x"]
    assert uneven["low"] == pytest.approx(100 * evaluate.wilson(1, 3.6)[0])
    swap = cells({"swap_att": {(): [True]}, "swap_obj": {(): [True] * 9}})["averages"]["swap"]
    assert swap["low"] == pytest.approx(uneven["low"])
    add = cells({"swap_att": {(): [True]}, "swap_obj": {(): [False, True]}})["averages"]["swap"]
    assert add["low"] < 75 == add["accuracy"]


def test_blind_reader_finds_an_artefact_and_nothing_else():
    rng = random.Random(0)
    nouns = ["dog", "cat", "bus", "tree", "man", "boat"]
    plain, marked = [], []
    for i in range(400):
        a, b = rng.sample(nouns, 2)
        plain.append(Item(("p",), str(i), (f"i{i}",), (f"a {a} and a {b}", f"a {b} and a {a}")))
        marked.append(Item(("m",), str(i), (f"i{i}",), (f"a {a} and a {b}", f"no {a} and a {b}")))
    scores = evaluate.read_blind([*plain, *marked], evaluate.score_ngrams)
    assert scores["m"] > 95
    assert 35 < scores["p"] < 65


def test_probe_minimises_its_objective():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (120,), generator=g)
    x = torch.randn(120, 8, generator=g) + 2 * torch.nn.functional.one_hot(y, 8)
    x = torch.nn.functional.normalize(x, dim=1)
    probe = evaluate.fit_logistic(x, y, 3, 1e-2)
    bias = probe(torch.zeros(1, 8))[0]
    weight = torch.stack([probe(row[None])[0] - bias for row in torch.eye(8)]).T / math.sqrt(8)
    # At the minimum the gradient vanishes: mean((p - y) x') + decay W = 0.
    error = torch.softmax(probe(x), 1) - torch.nn.functional.one_hot(y, 3)
    gradient = error.T @ (math.sqrt(8) * x) / 120 + 1e-2 * weight
    assert gradient.abs().max() < 1e-4
    assert (evaluate.fit_probe(x, y, 3)(x).argmax(1) == y).float().mean() > 0.8


# The suites' files


def photo(path, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = zlib.crc32(str(path).encode())  # every image has a colour of its own
    Image.new("RGB", size, (shade % 256, shade // 256 % 256, 9)).convert(mode).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def make_root(root):
    """A few rows of every suite in its official format, with their images."""
    pools = (
        "val2017/000000000009.jpg",
        "flickr30k/1.jpg",
        "visual7w/v7w_1.jpg",
        "vg/VG_100K/1.jpg",
    )
    more = ("swig/a_1.jpg", "hake/h.jpg", "aro/images/2.jpg", "whatsup/vg_images/1.jpg")
    wild = ("visdial/VisualDialog_val2018_000000000001.jpg", "negbench/voc2007/1.jpg")
    for name in (*pools, *more, *wild):
        photo(root / name)
    row = {"filename": "000000000009.jpg", "caption": "a dog bites", "negative_caption": "a cat"}
    suites = json.loads((ROOT / "scripts/suites.json").read_text())
    for name in suites["sugarcrepe"]["expected"]:
        write(root / f"sugarcrepe/{name}.json", {"0": row, "2": row})
        write(root / f"sugarcrepe_pp/{name}.json", [{**row, "caption2": "a hound bites"}])
    kinds = {
        **{"existence": ("visual7w", "v7w_1.jpg"), "actant-swap": ("SWiG", "a_1.jpg")},
        "coreference-hard": ("VisDial_v1.0", "VisualDialog_val2018_000000000001.jpg"),
    }
    for name in VALSE:
        dataset, image = kinds.get(name, ("FOIL dataset", "COCO_val2014_000000000009.jpg"))
        one = {"dataset": dataset, "image_file": image, "caption": "a", "foil": "b"}
        rows = {f"{name}_{n}": {**one, "mturk": {"caption": n}} for n in (1, 2, 3)}
        write(root / f"valse/{name}.json", rows)
    box = {"image_path": "2.jpg", "bbox_x": 3, "bbox_y": 4, "bbox_w": 10, "bbox_h": 5}
    box |= {"true_caption": "the dog is on the mat", "false_caption": "the mat is on the dog"}
    relations = [{**box, "relation_name": name} for name in ("on", "on", "wearing", "near")]
    write(root / "aro/visual_genome_relation.json", relations)
    attributes = [{**box, "attributes": pair} for pair in [["a", "b"]] * 25 + [["c", "d"]]]
    write(root / "aro/visual_genome_attribution.json", attributes)
    captions = ["A small dog bites a big man.", "Two men eat.", "x", "y", "z"]
    coco = [{"image": "val2014/COCO_val2014_000000000009.jpg", "caption": captions}]
    write(root / "karpathy/coco_karpathy_test.json", coco)
    flickr = [{"image": "flickr30k-images/1.jpg", "caption": captions}]
    write(root / "karpathy/flickr30k_test.json", flickr)
    for lists in suites["vl_checklist"]["lists"].values():
        for family, name in lists:
            image = {"hake": "h.jpg", "swig": "a_1.jpg"}.get(family, "VG_100K/1.jpg")
            pair = [image, {"POS": ["brown knob", "x"], "NEG": ["teal knob", "y"]}]
            count = 1001 if "spatial" in name else 2
            write(root / f"vl_checklist/data/{name}.json", [pair] * count)
    make_newer(root, box, row)


def make_newer(root, box, row):
    two = {"image_0": "a", "image_1": "b", "caption_0": "x y", "caption_1": "y x"}
    files = {"image_0": "a.png", "image_1": "b.png"}
    for name in ("winoground/images/a", "winoground/images/b"):
        photo(root / f"{name}.png", mode="RGBA")
    write(root / "winoground/examples.jsonl", json.dumps({"id": 0, **two}) + "\n")
    folders = (
        "eqben_mini/images",
        "bivlc/images",
        "vismin/images",
        "spec/count",
        "colorswap/images",
    )
    for folder in folders:
        photo(root / folder / "a.png")
        photo(root / folder / "b.png")
    write(root / "eqben_mini/data.json", [{**two, **files}])
    bivlc = {"image": "a.png", "negative_image": "b.png", "type": "replace_obj", **row}
    write(root / "bivlc/rows.jsonl", json.dumps(bivlc) + "\n")
    vismin = {**files, "text_0": "a", "text_1": "b", "category": "counting"}
    write(root / "vismin/rows.jsonl", json.dumps(vismin) + "\n")
    swap = {"id": 9, "caption_1": "a", "caption_2": "b"}
    swap |= {"image_1": "images/a.png", "image_2": "images/b.png"}
    write(root / "colorswap/test.json", [swap])
    url = "https://x/vg_gqa_images/1.jpg"
    write(root / "cola/COLA_multiobjects_matching_benchmark.json", [[url, "a", url, "b"]])
    make_eqben_and_crepe(root, two)
    make_spatial(root)
    make_lists(root, box)


def make_eqben_and_crepe(root, two):
    frame = np.zeros((6, 6, 3), np.uint8)
    frame[..., 0] = 255  # blue first
    (root / "eqben/images").mkdir(parents=True)
    np.save(root / "eqben/images/a.npy", frame)
    kubric = ("Kubric location", "Kubric attribute", "Kubric counter")
    for name in ("AG", "GEBC", "YouCook2", "SD", *kubric):
        write(root / f"eqben/{name}.json", [{**two, "image_0": "a.npy", "image_1": "a.npy"}])
    line = "image_id,caption,hard_negs,x,y,width,height\n1,a b,\"['b a', 'c']\",1,2,20,10\n"
    for kind in ("atom", "swap", "negate"):
        for atoms in range(4, 13):
            write(root / f"crepe/{kind}/prod_vg_hard_negs_{kind}_complexity_{atoms}.csv", line)


def make_spatial(root):
    photo(root / "whatsup/c/1.jpg")
    options = {"image_path": "data/c/1.jpg", "caption_options": ["a", "b", "c", "d"]}
    for name in ("images", "clevr"):
        write(root / f"whatsup/controlled_{name}_dataset.json", [options])
    for count in ("one", "two"):
        write(root / f"whatsup/coco_qa_{count}_obj.json", [[9, "right", "wrong"]])
        write(root / f"whatsup/vg_qa_{count}_obj.json", [["1", "right", "wrong"]])
    sizes = ("absolute_size", "relative_size", "absolute_spatial", "relative_spatial", "existence")
    for kind in (*sizes, "count"):
        photo(root / f"spec/{kind}/a.png")
        photo(root / f"spec/{kind}/b.png")
        texts = {"query": "a.png", "keys": ["x", "y", "z"], "label": 1}
        write(root / f"spec/{kind}/image2text.json", [texts])
        choices = {"query": "x", "keys": ["a.png", "b.png"], "label": 0}
        write(root / f"spec/{kind}/text2image.json", [choices])


def make_lists(root, box):
    for stem, image in (("COCO_val", "val2017/000000000009.jpg"), ("VOC2007", "x/1.jpg")):
        lines = "image_path,caption_0,caption_1,caption_2,caption_3,correct_answer\n"
        lines += f"{image},p,q,r,s,2\n"
        write(root / f"negbench/{stem}_mcq_llama3.1_rephrased.csv", lines)
    lines = ["Question ID,Type,Statement", *(f"{i},T,a thing" for i in range(270))]
    write(root / "mmvp/Questions.csv", "\n".join(lines))
    for i in range(270):
        photo(root / f"mmvp/MLLM_VLM Images/T/{i}.jpg")
    for i in range(10):
        photo(root / f"imagecode/image-sets/open-images-1/img{i}.jpg")
    write(root / "imagecode/valid_data.json", {"open-images-1": {"5": "a deer", "7": "grass"}})
    for name in ("1", "2"):
        photo(root / f"svo_probes/images/{name}.jpg")
    head = "sentence,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\n"
    rows = "a,1,2,True,False,False\nb,1,2,False,True,False\nc,2,1,False,False,True\n"
    write(root / "svo_probes/svo_probes.csv", head + rows + "d,1,2,True,True,False\n")
    for folder in ("data", "swapped_data"):
        write(root / f"hard_positives/{folder}/visual_genome_attribution.json", [box])
        plain = {**box, "image_path": "replace/data/VG_100K/1.jpg"}
        for name in ("vl_checklist_attributes", "vl_checklist_relations"):
            write(root / f"hard_positives/{folder}/{name}.json", [plain])
    for split in ("train", "test"):
        for label, grey in (("big_dress", 0), ("hat", 200)):
            for i in range(6):
                path = root / f"zeroshot/clothes/{split}/{label}/{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (30, 30), (grey, 9 * i, 9)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    make_root(folder)
    return folder


COUNTS = {
    **{"aro": 3 + 25 + 5 + 5, "valse": 22, "vl_checklist": 55 * 2 + 1000, "sugarcrepe": 14},
    **{"sugarcrepe_pp": 10, "winoground": 1, "whatsup": 6, "bivlc": 1, "negbench": 2, "vismin": 1},
    **{"mmvp": 135, "eqben": 7, "eqben_mini": 1, "crepe": 27, "spec": 12, "colorswap": 1},
    **{"cola": 1, "imagecode": 2, "svo_probes": 3, "hard_positives": 3, "shapes": 3000},
    **{"retrieval": 0, "zeroshot": 0, "probe": 0},
}


@pytest.mark.parametrize("name", list(evaluate.SUITES))
def test_every_suite_reads_its_official_format(name, root):
    suite = evaluate.load_suite(name, root, partial=True)
    assert len(suite.items) == COUNTS[name]
    assert len({(item.path, item.id) for item in suite.items}) == len(suite.items)
    assert suite.items or suite.costs
    for item in suite.items[:20]:
        image = evaluate.load_image(item.images[0], 32) if item.images else None
        assert image is None or image.mode == "RGB"
    rows = {item.path[0] for item in suite.items}
    known = json.loads((ROOT / "scripts/suites.json").read_text())[name]
    assert rows <= set(suite.expected) | {"atom", "swap", "negate", "eqben_mini"}
    assert known["where"]
    assert known["licence"]


def test_every_column_of_the_latex_tables_can_be_filled(root):
    for name, info in json.loads((ROOT / "scripts/suites.json").read_text()).items():
        if name == "retrieval" or "columns" not in info:
            continue
        suite = evaluate.load_suite(name, root, partial=True)
        result = evaluate.summarise(suite, evaluate.score_suite(suite, Random(0)))
        rows = {**result["subsets"], **result["averages"]}
        assert {column for column, _, _ in info["columns"]} <= set(rows), name
        assert set(info["averages"]) <= set(rows), name


def test_special_rules_of_the_loaders(root):
    names = ("aro", "negbench", "imagecode", "spec")
    load = {name: evaluate.load_suite(name, root, True) for name in names}
    assert load["spec"].items[0].texts == ("y", "x", "z")
    assert load["spec"].items[0].place == 1
    relation = load["aro"].items[0]
    assert relation.images == (Crop(str(root / "aro/images/2.jpg"), (3, 4, 13, 9)),)
    assert evaluate.load_image(relation.images[0], 0).size == (10, 5)
    assert {item.path for item in load["aro"].items[:2]} == {("VG-Relation", "on")}
    assert load["aro"].expected["VG-Attribution"] == 25 + 28748 - 26  # 26 rows, 25 count
    assert load["negbench"].items[0].texts == ("r", "p", "q", "s")
    assert load["negbench"].items[0].place == 2
    deer = load["imagecode"].items[0]
    assert deer.images[0].endswith("img5.jpg")
    assert len(deer.images) == 10
    frame = evaluate.load_image(str(root / "eqben/images/a.npy"), 0)
    assert frame.getpixel((0, 0)) == (0, 0, 255)


def test_vl_checklist_takes_the_first_thousand_that_are_there(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    there = [["VG_100K/1.jpg", {"POS": ["p"], "NEG": ["n"]}]]
    gone = [["VG_100K/404.jpg", {"POS": ["p"], "NEG": ["n"]}]]
    write(tmp_path / "vl_checklist/data/Relation/vg/spatial.json", 3 * gone + 1200 * there)
    suite = evaluate.load_suite("vl_checklist", tmp_path, partial=True)
    spatial = [item for item in suite.items if item.path[0] == "Relation spatial"]
    assert [item.id for item in spatial] == [str(i) for i in range(3, 1003)]
    assert "1110 of the 1113 items" in suite.notes[-1]
    with pytest.raises(data.DataError, match=r"1 of \d images are missing"):
        evaluate.load_suite("vl_checklist", tmp_path, partial=False)


def test_sets_of_torchvision_and_unknown_folders(tmp_path):
    for split in ("train", "test"):
        for label in ("negative", "positive"):
            photo(tmp_path / f"zeroshot/rendered_sst2/rendered-sst2/{split}/{label}/1.png")
    suite = evaluate.load_suite("probe", tmp_path, False)
    (cost,) = suite.costs
    assert cost.labels == list(cost.train_labels) == [0, 1]
    assert cost.prompts[1] == ["a positive review of a movie."]
    assert evaluate.load_image(cost.images[1], 0).size == (40, 30)
    photo(tmp_path / "zeroshot/eurosat/test/Forrest/1.png")
    with pytest.raises(data.DataError, match="Forrest: is no class of this set; is it 'forest'"):
        evaluate.load_suite("zeroshot", tmp_path, False)
    (tmp_path / "zeroshot/eurosat/test/Forrest").rename(tmp_path / "zeroshot/eurosat/test/River")
    eurosat = evaluate.load_suite("zeroshot", tmp_path, False).costs[0]
    assert eurosat.labels == [evaluate.read_table("classes")["eurosat"]["names"].index("river")]
    (tmp_path / "zeroshot/cifar10").mkdir()
    with pytest.raises(data.DataError, match="torchvision's CIFAR10 is not there"):
        evaluate.load_suite("zeroshot", tmp_path, False)


def test_imagenet_folders_are_wordnet_numbers_in_order(tmp_path):
    for i in range(1000):
        (tmp_path / f"zeroshot/imagenet/val/n{i:08}").mkdir(parents=True)
    photo(tmp_path / "zeroshot/imagenet/val/n00000002/x.JPEG")
    (cost,) = evaluate.load_suite("zeroshot", tmp_path, False).costs
    assert cost.labels == [2]
    assert len(cost.prompts) == 1000
    assert len(cost.prompts[2]) == 80
    assert cost.prompts[2][0] == "a bad photo of a great white shark."


def test_a_coco_pngis_found_in_any_pool(tmp_path):
    source = suites.Source("valse", tmp_path, False, {}, [])
    photo(tmp_path / "train2014/COCO_train2014_000000000025.jpg")
    for name in ("000000000025.jpg", "val2014/COCO_val2014_000000000025.jpg"):
        assert source.coco(name).endswith("train2014/COCO_train2014_000000000025.jpg")


def test_parquet_is_taken_apart_at_first_use(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "PNG")
    png = {"bytes": buffer.getvalue(), "path": None}
    row = {"image_0": png, "image_1": png, "text_0": "a", "text_1": "b"}
    (tmp_path / "vismin").mkdir()
    (tmp_path / "vismin/test-0.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(data.DataError, match="pip install pyarrow"):
        evaluate.load_suite("vismin", tmp_path, False)
    rows = [{**row, "category": kind} for kind in ("object", "relation")]
    table = SimpleNamespace(to_pylist=lambda: rows)
    parquet = SimpleNamespace(read_table=lambda path: table)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    items = evaluate.load_suite("vismin", tmp_path, True).items
    assert [item.path for item in items] == [("object",), ("relation",)]
    assert evaluate.load_image(items[1].images[1], 0).size == (8, 6)


def test_order_uses_the_tags_of_spacy_where_it_is(monkeypatch):
    tags = {"dogs": "NNS", "big": "JJ", "Rome": "NNP", "bigger": "JJR"}

    def pipe(captions, batch_size):
        for caption in captions:
            yield [SimpleNamespace(text=w, tag_=tags.get(w, "IN")) for w in caption.split()]

    fake = SimpleNamespace(__version__="0", load=lambda *a, **k: SimpleNamespace(pipe=pipe))
    monkeypatch.setitem(sys.modules, "spacy", fake)
    ((one,), name) = suites.tag_words(["big dogs in bigger Rome"])
    assert [kind for _, kind in one] == ["adjective", "noun", "", "adjective", "noun"]
    assert name == "spaCy 0 en_core_web_sm"
    for seed in range(20):  # nouns change places with nouns, adjectives with adjectives
        words = suites.shuffle_words("big dogs in bigger Rome", one, random.Random(seed))[0].split()
        assert {words[0], words[3]} == {"big", "bigger"}
        assert {words[1], words[4]} == {"dogs", "Rome"}
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert "no spaCy" in suites.tag_words(["big dogs"])[1]


def test_order_shuffles_are_seeded_and_keep_the_words():
    caption = "A small dog bites a big old man near the red bus"
    tagged = suites.guess_tags(caption)
    one, two = (suites.shuffle_words(caption, tagged, random.Random("0:x")) for _ in range(2))
    assert one == two
    assert len(one) == 4
    for text in one:
        assert sorted(text.split()) == sorted(caption.split())
    fixed = [i for i, (_, kind) in enumerate(tagged) if not kind]
    assert all(one[0].split()[i] == caption.split()[i] for i in fixed)
    assert all(
        one[1].split()[i] == caption.split()[i] for i in range(12) if i < 12 and i not in fixed
    )
    threes = [sorted(text.split()[i : i + 3]) for text in one[2:3] for i in range(0, 12, 3)]
    assert threes == [sorted(caption.split()[i : i + 3]) for i in range(0, 12, 3)]
    groups = {tuple(one[3].split()[i : i + 3]) for i in range(0, 12, 3)}
    assert groups == {tuple(caption.split()[i : i + 3]) for i in range(0, 12, 3)}


def test_captions_are_cleaned_as_aro_does():
    assert suites.pre_caption('A "Dog" (big)! #1: ran; ~ *') == "a dog big 1 ran"
    assert suites.pre_caption("w " * 40) == " ".join(["w"] * 30)


# Features


@functools.cache
def weights(seed=0):
    torch.manual_seed(seed)
    open_clip.add_model_config(evaluate.SHAPES_CONFIGS["shapes-tiny"])
    return open_clip.create_model("shapes-tiny").state_dict()


def state(seed=0):
    return dict(weights(seed))


def tiny(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    kit = {"model": "shapes-tiny", "activation": "gelu"}
    torch.save({"state_dict": state(seed), "kit": kit}, path)
    return path


def encoder_of(path, *options):
    args = evaluate.parse_args([*map(str, options)])
    args.device = "cpu"
    return evaluate.Encoder(evaluate.load_model(None, str(path)), args)


def test_each_image_crop_and_text_is_encoded_once(tmp_path, root):
    encoder = encoder_of(tiny(tmp_path / "a.pt"))
    name = str(root / "val2017/000000000009.jpg")
    names = [name, Crop(name, (0, 0, 9, 9)), name, Crop(name, (0, 0, 9, 9))]
    encoder.images(names)
    encoder.images([name])
    # The tokenizer drops case: these are three rows of tokens.
    texts = encoder.texts(["a dog", "A dog", "a cat", "dog " * 90, "dog " * 95])
    assert encoder.encoded == {"images": 2, "texts": 3}
    assert (texts.of(["a dog"]) == texts.of(["A dog"])).all()
    assert (texts.of(["dog " * 90]) == texts.of(["dog " * 95])).all()  # cut at the context length


def test_features_do_not_depend_on_the_batch_and_equal_the_models(tmp_path, root):
    path = tiny(tmp_path / "a.pt")
    names = [str(p) for p in sorted((root / "zeroshot").rglob("*.png"))]
    texts = [f"a {'very ' * (i % 7)}red thing {i}" for i in range(30)]
    one, two = encoder_of(path, "--batch-size", 3), encoder_of(path, "--batch-size", 64)
    np.testing.assert_allclose(one.images(names).rows, two.images(names).rows, atol=2e-6)
    np.testing.assert_allclose(one.texts(texts).rows, two.texts(texts).rows, atol=2e-6)
    model = evaluate.load_model(None, str(path))
    model.net.eval()
    with torch.no_grad():
        plain = model.net.encode_text(model.tokenizer(texts), normalize=True)
        image = two.transform(Image.open(names[0]).convert("RGB"))
        row = model.net.encode_image(image[None], normalize=True)
    np.testing.assert_allclose(two.texts(texts).rows, plain.numpy(), atol=2e-6)
    np.testing.assert_allclose(two.images(names[:1]).rows, row.numpy(), atol=2e-6)


def test_cache_is_by_content_and_by_model(tmp_path, root):
    a, b = tiny(tmp_path / "a.pt", 0), tiny(tmp_path / "b.pt", 1)
    cache = ("--cache", tmp_path / "cache")
    name = tmp_path / "x.png"
    Image.new("RGB", (30, 30), (9, 9, 9)).save(name)
    first = encoder_of(a, *cache)
    rows = first.images([str(name)]).rows
    first.texts(["a dog"])
    again = encoder_of(a, *cache)
    assert (again.images([str(name)]).rows == rows).all()
    again.texts(["a dog"])
    assert again.encoded.total() == 0
    Image.new("RGB", (30, 30), (200, 9, 9)).save(name)
    assert (encoder_of(a, *cache).images([str(name)]).rows != rows).any()
    other = encoder_of(b, *cache)
    other.images([str(name), Crop(str(name), (0, 0, 9, 9))])
    assert other.encoded["images"] == 2


def test_a_torn_cache_file_is_a_miss_and_made_again(tmp_path, capsys):
    path, cache = tiny(tmp_path / "a.pt"), ("--cache", tmp_path / "cache")
    first = encoder_of(path, *cache)
    rows = first.texts(["a dog", "a cat"]).rows
    (file,) = (tmp_path / "cache").rglob("*.pt")
    for torn in (b"torn", b"", file.read_bytes()[:300]):
        file.write_bytes(torn)
        again = encoder_of(path, *cache)
        assert f"--cache {file}: is damaged; recomputed" in capsys.readouterr().err
        np.testing.assert_allclose(again.texts(["a cat"]).rows[0], rows[1], atol=2e-6)
        np.testing.assert_allclose(again.texts(["a dog"]).rows[0], rows[0], atol=2e-6)
        files = [x for x in (tmp_path / "cache").rglob("*") if x.is_file()]
        assert len(files) == 2
        assert encoder_of(path, *cache).known.keys() == first.known.keys()
        assert not capsys.readouterr().err
        for extra in files:
            extra.unlink()
        encoder_of(path, *cache).texts(["a dog", "a cat"])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["image", "items"])
def test_a_mistake_on_one_rank_is_told_by_all_with_exit_code_2(fault, tmp_path, root):
    """The second image is the second rank's; the items are written by the first alone."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    rows = [[f"vg/{i}.jpg", "a", f"vg/{i}.jpg", "b"] for i in (3, 4)]
    write(tmp_path / "cola/COLA_multiobjects_matching_benchmark.json", rows)
    for i in (3, 4):
        photo(tmp_path / f"vg/{i}.jpg")
    if fault == "image":
        write(tmp_path / "vg/4.jpg", "no image")
    path, out = tiny(tmp_path / "m/latest.pt"), tmp_path / "out"
    command = [sys.executable, ROOT / "evaluate.py", "--ckpt", path, "--suite", "cola,bivlc"]
    command += ["--root", tmp_path, "--allow-missing", "--batch-size", 1, "--out", out]
    if fault == "items":
        out.mkdir()
        (out / "items.partial").write_text("in the way")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    runs = [
        subprocess.Popen(
            list(map(str, command)),
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
        )
        for rank in (0, 1)
    ]
    said = [run.communicate(timeout=60)[1] for run in runs]
    message = {
        "image": "vg/4.jpg: cannot be decoded",
        "items": "items.partial: cannot be written",
    }
    for run, text in zip(runs, said, strict=True):
        assert run.returncode == 2, text
        assert message[fault] in text
        assert "Traceback" not in text


@pytest.mark.slow
def test_two_ranks_give_the_same_results_as_one(tmp_path, root):
    path = tiny(tmp_path / "a.pt")
    results = []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *(launch if ranks > 1 else []), str(ROOT / "evaluate.py")]
        command += ["--ckpt", path, "--suite", "imagecode,crepe,retrieval,zeroshot"]
        command += ["--root", root, "--out", out, "--batch-size", "2", "--no-blind"]
        command += ["--allow-missing"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, env=environment, check=False
        )
        assert run.returncode == 0, run.stderr
        files = sorted(p for p in out.rglob("*") if p.is_file())
        results.append({p.relative_to(out): p.read_bytes() for p in files})
    assert results[0] == results[1]


# Models


def test_released_training_checkpoints_are_read_without_their_objects(tmp_path):
    """The layout of open_clip's trainer under DDP, with objects that are not tensors."""
    own = state()
    content = {
        **{"epoch": 5, "name": "clip", "args": argparse.Namespace(lr=1e-6)},
        **{"best": np.float64(0.5), "when": Path("x")},
        "state_dict": {f"module.{key}": value for key, value in own.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-6}]},
    }
    torch.save(content, tmp_path / "CE_CLIP.pt")
    read, kit = evaluate.read_checkpoint(tmp_path / "CE_CLIP.pt")
    assert kit == {}
    assert all(torch.equal(read[key], own[key]) for key in own)
    model = evaluate.load_model("shapes-tiny", str(tmp_path / "CE_CLIP.pt"))
    assert torch.equal(model.net.logit_scale, own["logit_scale"])
    with pytest.raises(data.DataError, match="pass --model"):
        evaluate.load_model(None, str(tmp_path / "CE_CLIP.pt"))


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.makedirs, (self.target,))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": state(), "evil": Evil(str(tmp_path / "done"))}, tmp_path / "e.pt")
    with contextlib.suppress(data.DataError):
        evaluate.read_checkpoint(tmp_path / "e.pt")
    assert not (tmp_path / "done").exists()
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(Evil(str(tmp_path / "done")), file)
    with pytest.raises(data.DataError, match="cannot be read as weights"):
        evaluate.read_checkpoint(tmp_path / "plain.pt")
    assert not (tmp_path / "done").exists()


def test_a_state_dict_of_foreign_objects_is_refused(tmp_path):
    torch.save({"state_dict": {"a": argparse.Namespace()}}, tmp_path / "x.pt")
    with pytest.raises(data.DataError, match="holds no state_dict"):
        evaluate.read_checkpoint(tmp_path / "x.pt")


def test_open_clip_folders_load_with_their_preprocessing(tmp_path):
    from safetensors.torch import save_file

    config = json.loads(evaluate.SHAPES_CONFIGS["shapes-tiny"].read_text())
    mean = [0.1, 0.2, 0.3]
    folder = tmp_path / "mine"
    write(
        folder / "open_clip_config.json",
        {"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": [1.0, 1.0, 1.0]}},
    )
    with pytest.raises(data.DataError, match="holds no weights"):
        evaluate.load_model(None, str(folder))
    own = state()
    save_file(own, folder / "open_clip_model.safetensors")
    model = evaluate.load_model(None, str(folder))
    assert torch.equal(model.net.state_dict()["logit_scale"], own["logit_scale"])
    assert model.net.visual.preprocess_cfg["mean"] == mean
    args = evaluate.parse_args([])
    args.device = "cpu"
    assert "0.1" in str(evaluate.Encoder(model, args).transform)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_folders_of_transformers_give_its_features(tmp_path, kind):
    net, words = transformers_folder(tmp_path, kind)
    encoder = encoder_of(tmp_path)
    rows = encoder.texts(["red dog", "blue cat"]).rows
    ids = torch.tensor(
        words(["red dog", "blue cat"], padding="max_length", max_length=16)["input_ids"]
    )
    with torch.no_grad():
        wanted = net(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds
    wanted = torch.nn.functional.normalize(wanted, dim=-1)
    np.testing.assert_allclose(rows, wanted.numpy(), atol=2e-6)
    assert encoder.images(["shapes:0"]).rows.shape == (1, rows.shape[1])
    torch.save({}, tmp_path / "unused.pt")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(data.DataError, match="cannot be loaded by transformers"):
        evaluate.load_model(None, str(tmp_path))


def transformers_folder(tmp_path, kind):
    """A small model of transformers, its tokenizer and preprocessing."""
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    words = make_tokenizer(tmp_path, transformers)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    small |= {"num_hidden_layers": 2}
    text = {**small, "vocab_size": 60, "max_position_embeddings": 16, "pad_token_id": 0}
    text |= {"eos_token_id": 1, "bos_token_id": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    kinds = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }
    make_config, make_model = kinds[kind]
    net = make_model(make_config(text_config=text, vision_config=vision)).eval()
    net.save_pretrained(tmp_path)
    pixels = {"do_center_crop": kind == "clip", "size": {"height": 32, "width": 32}}
    pixels |= {"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    write(tmp_path / "preprocessor_config.json", {**pixels, "image_std": [0.5] * 3, "resample": 3})
    return net, words


def make_tokenizer(folder, transformers):
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    vocabulary = {"<pad>": 0, "<end>": 1, "<start>": 2, "red": 3, "blue": 4, "dog": 5, "cat": 6}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    fast.save_pretrained(folder)
    return fast


def test_activation_follows_the_checkpoint_unless_told_otherwise(tmp_path):
    path = tiny(tmp_path / "a.pt")
    own = evaluate.load_model(None, str(path))
    told = evaluate.load_model(None, str(path), activation="quickgelu")
    assert (own.about["activation"], told.about["activation"]) == ("gelu", "quickgelu")
    assert evaluate.hash_model(own) != evaluate.hash_model(told)


# The script


def run(*options):
    evaluate.main([*map(str, options)])


def test_a_whole_evaluation_writes_every_output(tmp_path, root, capsys):
    a, b = tiny(tmp_path / "a/latest.pt", 0), tiny(tmp_path / "b/latest.pt", 1)
    out = tmp_path / "out"
    some = ("--allow-missing", "--root", root)
    run("--ckpt", a, "--ckpt", f"two={b}", "--suite", "paper", *some, "--out", out)
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["a", "two"]
    assert list(results["a"]["suites"]) == evaluate.PAPER
    assert len(results["a"]["weights_sha256"]) == 64
    cell = results["two"]["suites"]["sugarcrepe"]["subsets"]["add_att"]
    assert set(cell) == {"accuracy", "low", "high", "scored", "expected", "ties"}
    assert (cell["scored"], cell["expected"]) == (2, 692)
    assert "2 of 692" in printed
    assert "two - a, paired" in printed
    assert "CE-CLIP (paper)" not in printed
    assert "| CE-CLIP (paper) |" in (out / "results.md").read_text()
    assert max(len(line) for line in printed.splitlines() if "/" not in line) <= 120
    tex = (out / "results.tex").read_text()
    # ARO and VALSE are one table, as in the paper.
    assert tex.count(r"\toprule") == len(evaluate.PAPER) - 1 == tex.count(r"\bottomrule")
    check_tables(tex)
    lines = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    mine = [x for x in lines if (x["model"], x["row"]) == ("two", "add_att")]
    assert float(mine[0]["accuracy"]) == cell["accuracy"]
    items = [json.loads(x) for x in (out / "items/two/sugarcrepe.jsonl").read_text().splitlines()]
    assert set(items[0]) >= {"suite", "subset", "id", "images", "texts", "scores", "correct"}
    for item in items:
        assert item["correct"] == (item["scores"][0][0] > item["scores"][0][1])
    with pytest.raises(data.DataError, match="--overwrite"):
        run("--ckpt", a, "--suite", "shapes", "--out", out)


def test_both_readers_of_texts_are_shown(tmp_path, root, monkeypatch):
    class Model:
        def __init__(self, name, device):
            assert (name, device) == ("DIR", "cpu")

        def score(self, texts):
            return [len(text) for text in texts]  # longer than its negative is every caption here

    monkeypatch.setattr(evaluate, "MaskedModel", Model)
    run("--ckpt", tiny(tmp_path / "a/latest.pt", 0), "--suite", "sugarcrepe", "--allow-missing",
        "--root", root, "--device", "cpu", "--mlm", "DIR", "--out", tmp_path / "out")  # fmt: skip
    (result,) = json.loads((tmp_path / "out/results.json").read_text()).values()
    assert result["suites"]["sugarcrepe"]["masked"]["add_att"] == 100
    assert result["suites"]["sugarcrepe"]["blind"]["add_att"] == 0  # one image: nothing to learn
    assert "| texts only | texts only (masked) |" in (tmp_path / "out/results.md").read_text()


def check_tables(tex):
    """Parse the LaTeX: groups and environments close, rows have the table's number of cells.

    Gives the rows of each table by its first comment.
    """
    tables = {}
    for block in tex.split("\n% ")[1:]:
        if block.startswith("left out"):
            continue
        depth, open_environments = 0, []
        plain = re.sub(r"\\\\|\\[{}&%#_$]", "", block)
        for mark in re.findall(r"\\(begin|end)\{(\w+)\}|([{}])", plain):
            depth += {"{": 1, "}": -1, "": 0}[mark[2]]
            assert depth >= 0
            if mark[0] == "begin":
                open_environments.append(mark[1])
            elif mark[0] == "end":
                assert open_environments.pop() == mark[1]
        assert (depth, open_environments) == (0, [])
        assert block.count(r"\caption{") == block.count(r"\label{tab:") == 1
        assert block.count(r"\footnotesize") == ("$^*$" in block)
        wanted = len(block.split(r"\begin{tabular}{")[1].split("}")[0])
        lines = [x for x in block.splitlines() if x.endswith(r"\\")]
        tables[block.split("\n")[0]] = lines
        for line in lines:
            cells = line.replace(r"\&", "").removesuffix(r"\\").split("&")
            spans = [re.match(r" ?\\multicolumn{(\d+)}", cell) for cell in cells]
            assert sum(int(span[1]) if span else 1 for span in spans) == wanted
    labels = re.findall(r"\\label{(.*?)}", tex)
    assert len(set(labels)) == len(labels) == len(tables)
    return tables


def test_latex_has_the_papers_tables_with_stars_for_parts(monkeypatch):
    published = {("CLIP", "paper"): {"replace_obj": 90.9}, ("LSS", "x"): {"elsewhere": 1.0}}
    monkeypatch.setattr(make_tables, "published", lambda suite: published)
    cell = {"accuracy": 50.0, "scored": 5, "expected": 5}
    cells = {
        **{"replace_obj": cell, "swap_obj": {**cell, "scored": 3}, "add_obj": cell},
        "swap_att": {"accuracy": None, "scored": 0, "expected": 4},
    }
    table = {"subsets": cells, "averages": {"mean of items": {**cell, "scored": 13}}, "costs": {}}
    pair = {"subsets": {"cola text": cell, "cola image": cell}, "averages": {}, "costs": {}}
    suites = {"sugarcrepe": table, "cola": pair}
    tex = make_tables.latex({"a_b": {"suites": suites, "left_out": {"winoground": "is missing"}}})
    assert "% left out: winoground: is missing" in tex
    tables = check_tables(tex)
    assert tables["sugarcrepe"] == [
        r" &  & \multicolumn{1}{c}{Replace} & \multicolumn{1}{c}{Swap} & \multicolumn{1}{c}{Add}"
        r" & \multicolumn{1}{c}{Mean of} \\",
        r"Model & Source & Obj. & Obj. & Obj. & items \\",
        r"CLIP & paper & 90.9 & -- & -- & -- \\",  # LSS has nothing to say, no Att. either
        r"a\_b & ours & 50.0 & 50.0$^*$ & 50.0 & 50.0$^*$ \\",
    ]
    assert r"\footnotesize $^*$ sugarcrepe 13 of 19 items (a\_b)" in tex
    assert r"\caption{sugarcrepe: per cent correct.}" in tex
    assert r"\cmidrule(lr){3-3}\cmidrule(lr){4-4}\cmidrule(lr){5-5}\cmidrule(lr){6-6}" in tex
    assert tables["cola"][0] == r" &  & \multicolumn{2}{c}{cola} \\"
    assert tables["cola"][1:] == [
        r"Model & Source & text & image \\",
        r"a\_b & ours & 50.0 & 50.0 \\",
    ]


def test_every_checkpoint_is_looked_at_before_the_first_is_scored(tmp_path, monkeypatch):
    good, bad = tiny(tmp_path / "a/latest.pt"), tiny(tmp_path / "b/latest.pt")
    monkeypatch.setattr(evaluate, "score_suite", None)
    cut = torch.load(bad)
    cut["state_dict"]["visual.proj"] = cut["state_dict"]["visual.proj"][:, :9]
    torch.save(cut, bad)
    with pytest.raises(data.DataError, match="does not fit the model shapes-tiny"):
        run("--ckpt", good, "--ckpt", bad, "--out", tmp_path / "out")
    bad.write_bytes(good.read_bytes()[:9999])
    with pytest.raises(data.DataError, match="cannot be read as weights"):
        run("--ckpt", good, "--ckpt", bad, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_model_at_a_time_is_held(tmp_path):
    alive = []

    class Net:
        pass

    def build():
        assert sum(x() is not None for x in alive) == 0
        net = Net()
        alive.append(weakref.ref(net))
        return net

    models = evaluate.check_models({"a": build, "b": build})
    assert [x() is not None for x in alive] == [False, True]  # the first is built last, and stays
    models["a"]()
    models["b"]()
    assert len(alive) == 3


def test_overwriting_replaces_all_items_and_an_error_none(tmp_path, root):
    a, b = tiny(tmp_path / "a/latest.pt", 0), tiny(tmp_path / "b/latest.pt", 1)
    some, out = ("--allow-missing", "--root", root), tmp_path / "new/out"
    run("--ckpt", a, "--ckpt", b, "--suite", "cola,bivlc", *some, "--out", out)
    first = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {str(p) for p in first if p.suffix == ".jsonl"} == {
        f"items/{label}/{suite}.jsonl" for label in "ab" for suite in ("cola", "bivlc")
    }
    again = ("--out", out, "--overwrite")
    broken = tmp_path / "broken"
    shutil.copytree(root, broken, dirs_exist_ok=True)
    write(broken / "vg/VG_100K/1.jpg", "no image")
    with pytest.raises(data.DataError, match="cannot be decoded"):
        run("--ckpt", b, "--suite", "bivlc,cola", "--allow-missing", "--root", broken, *again)
    kept = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {p: x for p, x in kept.items() if p.parts[0] != evaluate.ITEMS} == first
    run("--ckpt", b, "--suite", "cola", *some, *again)
    assert [str(p.relative_to(out)) for p in out.rglob("*.jsonl")] == ["items/cola.jsonl"]
    assert not (out / evaluate.ITEMS).exists()
    (out / "items/mine.txt").touch()
    with pytest.raises(data.DataError, match=r"mine.txt exists, not replaced"):
        run("--ckpt", b, "--suite", "cola", *some, *again)


@pytest.mark.parametrize("content", [b"junk of no kind", b"", b"\x80\x02]q.u"])
def test_a_file_that_is_no_checkpoint_is_said_in_words(content, tmp_path):
    (tmp_path / "junk.pt").write_bytes(content)
    with pytest.raises(data.DataError, match=r"\(it is damaged, or not a torch.save file\)$"):
        evaluate.read_checkpoint(tmp_path / "junk.pt")


def test_reasons_are_cut_between_words():
    line = evaluate.error_line(ValueError("many words " * 50))
    assert len(line) <= 240
    assert line.endswith((" many ...", " words ..."))
    assert evaluate.error_line(KeyError(174812789)) == "KeyError 174812789"


@pytest.mark.parametrize("flag", ["--list", "--suite"])
def test_a_root_that_is_no_folder_is_said_once(flag, tmp_path):
    (tmp_path / "file").touch()
    options = ["--list"] if flag == "--list" else ["--ckpt", "x", "--suite", "all"]
    with pytest.raises(data.DataError, match="file: is a file, not a folder"):
        run(*options, "--root", tmp_path / "file")
    with pytest.raises(data.DataError, match="none: no such folder"):
        run(*options, "--root", tmp_path / "none")


def test_list_names_files_places_licences_and_counts(root, capsys):
    run("--list", "--root", root)
    printed = capsys.readouterr().out
    for name in evaluate.SUITES:
        assert f"\n{name}: " in f"\n{printed}"
    assert "sugarcrepe: partly, 14 of 7511 items" in printed
    assert printed.count("  licence: ") == printed.count("  where: ") == len(evaluate.SUITES)
    run("--list")
    printed = capsys.readouterr().out
    assert "sugarcrepe: missing, 0 of 7511 items (pass --root DIR to look for its files)" in printed
    assert "  size: 0.82 GB and 1 files of unpublished size\n  get: ROOT=DIR bash " in printed
    assert "bash scripts/paper/data.sh sugarcrepe\n" in printed
    assert "without that every download is refused" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "sugarcreep"], "did you mean sugarcrepe"),
        (["--suite", "winoground", "--root", "."], "accept the licence at huggingface.co"),
        (["--suite", "valse"], "--root is needed"),
        (["--suite", "valse", "--root", "none"], "no such folder"),
        (["--out", "/proc/none"], "cannot be created"),
        (["--batch-size", "0"], "--batch-size must be 1"),
        (["--pretrained", "x"], "give one of"),
    ],
)
def test_mistakes_get_one_sentence(options, message, tmp_path, monkeypatch):
    path = tiny(tmp_path / "a/latest.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match=message) as caught:
        run("--ckpt", path, *options)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no.pt", "no such checkpoint"),
        ("ViT-B-32:none", "neither a file nor a tag"),
        ("ViT-B-32:openai", "use ViT-B-32-quickgelu"),
        ("torn.pt", "cannot be read as weights"),
        ("empty", "holds neither open_clip_config.json nor config.json"),
    ],
)
def test_a_wrong_checkpoint_never_becomes_random_weights(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.pt").write_bytes(b"PK\3\4 no zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match=message):
        run("--ckpt", given, "--suite", "shapes")


def test_a_checkpoint_of_another_architecture_is_named(tmp_path):
    own = state()
    own["visual.proj"] = own["visual.proj"][:, :9]
    torch.save(own, tmp_path / "x.pt")
    with pytest.raises(data.DataError, match="does not fit the model shapes-tiny"):
        evaluate.load_model("shapes-tiny", str(tmp_path / "x.pt"))


def test_faults_of_rows_and_images_name_the_place(tmp_path, root):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    path = tiny(tmp_path / "m/latest.pt")
    file = tmp_path / "sugarcrepe/swap_obj.json"
    good = file.read_text()
    write(file, {"7": {"filename": "000000000009.jpg", "caption": "a"}})
    with pytest.raises(
        data.DataError, match=r"swap_obj.json row 7: has no field 'negative_caption'"
    ):
        evaluate.load_suite("sugarcrepe", tmp_path, False)
    write(file, "{")
    with pytest.raises(data.DataError, match="is not json"):
        evaluate.load_suite("sugarcrepe", tmp_path, False)
    write(file, good)
    write(tmp_path / "cola/COLA_multiobjects_matching_benchmark.json", [["one"]])
    with pytest.raises(data.DataError, match="does not have the official format"):
        evaluate.load_suite("cola", tmp_path, False)
    write(tmp_path / "val2017/000000000009.jpg", "no image")
    for workers in (0, 1):
        some = ("--allow-missing", "--root", tmp_path, "--workers", workers)
        with pytest.raises(data.DataError, match=r"000000000009.jpg: cannot be decoded"):
            run("--ckpt", path, "--suite", "sugarcrepe", *some)


def test_missing_images_are_refused_or_counted(tmp_path, capsys, monkeypatch, root):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    expect_two(monkeypatch, "sugarcrepe")
    row = {"filename": "000000000404.jpg", "caption": "a", "negative_caption": "b"}
    good = {"filename": "000000000009.jpg", "caption": "a", "negative_caption": "b"}
    write(tmp_path / "sugarcrepe/swap_obj.json", {"0": row, "1": good})
    with pytest.raises(data.DataError, match=r"1 of 2 images are missing, .*--allow-missing"):
        evaluate.load_suite("sugarcrepe", tmp_path, False)
    suite = evaluate.load_suite("sugarcrepe", tmp_path, True)
    assert [item.id for item in suite.items if item.path == ("swap_obj",)] == ["1"]
    path = tiny(tmp_path / "m/latest.pt")
    run("--ckpt", path, "--suite", "sugarcrepe", "--root", tmp_path, "--allow-missing")
    printed = capsys.readouterr().out
    assert "1 of 2 " in printed
    assert "13 of 14" in printed


def expect_two(monkeypatch, name):
    """Let the official files of a suite have two items in each subset."""
    tables = {"suites": json.loads(json.dumps(evaluate.read_table("suites")))}
    tables["suites"][name]["expected"] = dict.fromkeys(tables["suites"][name]["expected"], 2)
    read = evaluate.read_table
    monkeypatch.setattr(evaluate, "read_table", lambda table: tables.get(table) or read(table))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sugarcrepe/swap_obj.json", {}, "swap_obj.json: holds no rows"),
        ("sugarcrepe/swap_obj.json", "5", "swap_obj.json: holds no rows"),
        ("sugarcrepe/swap_obj.json", {"3": "a dog"}, "swap_obj.json row 3: 'a dog' is no record"),
        (
            "sugarcrepe/swap_obj.json",
            1,
            r"swap_obj.json: swap_obj: 1 of 2 items are there; .*--all",
        ),
        ("valse/plurals.json", 0, "plurals.json: plurals: 0 of 2 items are there"),
        ("bivlc/rows.jsonl", 1, "rows.jsonl: replace: 1 of 2 items are there"),
        ("whatsup/coco_qa_one_obj.json", 1, "coco_qa_one_obj.json: COCO one: 1 of 2 items"),
        ("mmvp/Questions.csv", 1, "Questions.csv: Presence of Specific Features: 0 of 2 items"),
        ("imagecode/valid_data.json", 1, "valid_data.json: video: 0 of 2 items"),
    ],
)
def test_a_subset_with_too_few_rows_is_refused(name, content, message, tmp_path, monkeypatch, root):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    suite = name.split("/")[0]
    expect_two(monkeypatch, suite)
    path = tmp_path / name
    if content == 0:  # no annotator accepted any
        write(
            path, path.read_text().replace('"caption": 3', '"caption": 1').replace(": 2}", ": 1}")
        )
    elif content == 1 and path.suffix == ".csv":
        write(path, "\n".join(path.read_text().splitlines()[:5]))
    elif content == 1 and suite == "sugarcrepe":
        write(path, dict([next(iter(json.loads(path.read_text()).items()))]))
    elif content != 1:
        write(path, content)
    for file in tmp_path.glob("whatsup/controlled*.json"):
        write(file, 2 * json.loads(file.read_text()))
    with pytest.raises(data.DataError, match=message):
        evaluate.load_suite(suite, tmp_path, False)


@pytest.mark.parametrize(
    ("suite", "file", "old", "new"),
    [
        ("retrieval", "karpathy/flickr30k_test.json", '"caption": [', '"caption": "a dog", "x": ['),
        ("aro", "karpathy/coco_karpathy_test.json", '"caption": [', '"caption": "a dog", "x": ['),
        ("whatsup", "whatsup/controlled_clevr_dataset.json", "options", 'options": "a dog", "x'),
        ("spec", "spec/count/image2text.json", '"keys": [', '"keys": "a dog", "x": ['),
        ("crepe", "crepe/swap/prod_vg_hard_negs_swap_complexity_9.csv", "['b a', 'c']", "'a dog'"),
        (
            *("vl_checklist", "vl_checklist/data/Relation/vg/spatial.json"),
            *('"POS": [', '"POS": "a dog", "x": ['),
        ),
    ],
)
def test_a_text_in_the_place_of_a_list_is_no_list_of_letters(suite, file, old, new, tmp_path, root):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(data.DataError, match=rf"{path.name} row 0: .*a dog.* is no list"):
        evaluate.load_suite(suite, tmp_path, True)


def test_texts_that_are_none_and_odd_bytes_name_the_file(tmp_path, root):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "sugarcrepe/add_att.json"
    row = {"filename": "000000000009.jpg", "caption": "a", "negative_caption": 7}
    write(path, {"5": row})
    with pytest.raises(data.DataError, match=r"add_att.json: the row 5 of add_att has a text that"):
        evaluate.load_suite("sugarcrepe", tmp_path, True)
    write(
        tmp_path / "whatsup/controlled_clevr_dataset.json",
        [{"image_path": "data/c/1.jpg", "caption_options": ["a"]}],
    )
    with pytest.raises(data.DataError, match=r"clevr_dataset.json: the row 0 .* no false text"):
        evaluate.load_suite("whatsup", tmp_path, True)
    write(tmp_path / "svo_probes/svo_probes.csv", f"sentence\n{'x' * 200_000}\n")
    with pytest.raises(data.DataError, match=r"svo_probes.csv: is not csv"):
        evaluate.load_suite("svo_probes", tmp_path, True)
    path.write_bytes(b'{"5": "\xff"}')
    with pytest.raises(data.DataError, match=r"add_att.json: is not UTF-8 text"):
        evaluate.load_suite("sugarcrepe", tmp_path, True)
    karpathy = [{"image": "val2014/COCO_val2014_000000000009.jpg", "caption": ["a", None]}]
    write(tmp_path / "karpathy/coco_karpathy_test.json", karpathy)
    with pytest.raises(data.DataError, match=r"coco_karpathy_test.json row 0 has a text that"):
        evaluate.load_suite("retrieval", tmp_path, True)


def test_more_rows_than_expected_are_a_note_and_few_where_the_number_is_no_fact(root, monkeypatch):
    expect_two(monkeypatch, "sugarcrepe")
    evaluate.read_table("suites")["sugarcrepe"]["expected"]["add_obj"] = 1
    suite = evaluate.load_suite("sugarcrepe", root, False)
    assert suite.notes == ["add_obj: 2 items where 1 were expected, another list"]
    assert suite.expected["add_obj"] == 2
    assert (
        "COCO: 1 of 5914 items are in the files"
        in evaluate.load_suite("negbench", root, False).notes
    )


def test_what_is_absent_is_said_in_every_output(tmp_path, root, capsys):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    for name in ("sugarcrepe/swap_obj.json", "bivlc/rows.jsonl", "karpathy/flickr30k_test.json"):
        (tmp_path / name).unlink()
    (tmp_path / "crepe/atom").rename(tmp_path / "crepe/other")
    vismin = json.loads((tmp_path / "vismin/rows.jsonl").read_text())
    write(tmp_path / "vismin/rows.jsonl", json.dumps({**vismin, "category": "object"}))
    out = tmp_path / "out"
    suites = ("--suite", "all", "--allow-missing", "--root", tmp_path, "--no-blind")
    run("--ckpt", tiny(tmp_path / "a/latest.pt"), *suites, "--out", out)
    result = json.loads((out / "results.json").read_text())["a"]
    assert "bivlc" in result["left_out"]
    nothing = {"accuracy": None, "low": None, "high": None, "scored": 0}
    sugarcrepe = result["suites"]["sugarcrepe"]
    assert sugarcrepe["subsets"]["swap_obj"] == {**nothing, "expected": 245, "ties": 0}
    swap = {**nothing, "scored": 2, "expected": 245 + 666}
    for name in ("swap", "mean of 7 subsets", "mean of 3 groups", "mean of items"):
        assert sugarcrepe["averages"][name]["accuracy"] is None
    assert sugarcrepe["averages"]["swap"] == swap
    assert sugarcrepe["averages"]["add"]["accuracy"] is not None
    assert result["suites"]["crepe"]["subsets"]["atom"] == {**nothing, "expected": None, "ties": 0}
    assert result["suites"]["vismin"]["subsets"]["relation group"]["expected"] == 622
    assert result["suites"]["vismin"]["averages"]["group: mean of 4 subsets"]["accuracy"] is None
    recall = result["suites"]["retrieval"]["costs"]["Flickr30k text to image R@5"]
    assert (recall["scored"], recall["expected"]) == (0, 5000)
    page = (out / "results.md").read_text()
    assert "\n| swap_obj | 0 of 245 | -- |" in page
    assert "\n| **swap** | 2 of 911 | -- |" in page
    assert "\n| atom | 0 of ? | -- |" in page
    assert "\nLeft out: bivlc: " in page
    lines = (out / "results.csv").read_text().splitlines()
    assert "sugarcrepe,a,ours,subsets,swap_obj,,,,0,245,0" in lines
    assert "bivlc,a,ours,left out,,,,,0" in lines
    tex = (out / "results.tex").read_text()
    assert r"$^*$ sugarcrepe 12 of 7511 items" in tex
    assert "% left out: bivlc: " in tex
    assert "left out: bivlc" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_root_that_may_not_be_read_is_named(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    with pytest.raises(data.DataError, match="cannot be read; ask for permission"):
        evaluate.load_suite("sugarcrepe", folder, True)


# The scripts that read results


def script(name, *options):
    """Run a script in this process; gives its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, options)])
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.mark.slow
def test_tables_of_a_readme_follow_the_results(tmp_path, root, capsys):
    out = tmp_path / "out"
    some = ("--allow-missing", "--root", root, "--out", out)
    run("--ckpt", tiny(tmp_path / "a/latest.pt"), "--suite", "valse", *some)
    results = out / "results.json"
    page = tmp_path / "page.md"
    page.write_text(f"Text\n<!-- table: {results} valse -->\nold\n<!-- end -->\nMore\n")
    assert script("make_tables.py", "--file", page, "--check") == 1
    assert script("make_tables.py", "--file", page) == 0
    text = page.read_text()
    assert "| foil-it | 2 of 943 |" in text
    assert text.startswith("Text\n")
    assert text.endswith("<!-- end -->\nMore\n")
    assert script("make_tables.py", "--file", page, "--check") == 0
    results.write_text(results.read_text().replace('"scored": 2', '"scored": 3', 1))
    capsys.readouterr()
    assert script("make_tables.py", "--file", page, "--check") == 1
    assert "tables differ" in capsys.readouterr().out
    page.write_text("<!-- table: none.json valse -->\n<!-- end -->\n")
    assert script("make_tables.py", "--file", page, "--check") == 2
    assert "holds no results of valse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["make_tables.py", "--check", "--file", "page.md"], "page.md: holds no table between"),
        (["make_tables.py", "--file", "none.md"], "none.md: cannot be read"),
    ],
)
def test_scripts_tell_mistakes_in_one_sentence(options, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("No table here.\n")
    assert script(*options) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.slow
def test_the_speed_comparison_compares_the_same_verdicts(tmp_path, root):
    out = tmp_path / "speed.json"
    path = tiny(tmp_path / "a/latest.pt")
    assert (
        script("bench_eval.py", "--ckpt", path, "--root", root, "--repeats", 1, "--out", out) == 0
    )
    result = json.loads(out.read_text())
    assert result["same verdicts"] == result["items"] == 14
    assert result["images"] == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "hf-hub:org/re|po"],
        ["--model", "ViT-B-32", "--pretrained", "a|b"],
    ],
)
def test_labels_of_models_and_tags_are_plain_words_too(options):
    with pytest.raises(data.DataError, match="may hold letters"):
        evaluate.name_models(evaluate.parse_args(options))
    gone = evaluate.parse_args(["--model", "ViT-B-32", "--pretrained", "a/b.pt"])
    with pytest.raises(data.DataError, match=r"--pretrained a/b.pt: no such checkpoint"):
        evaluate.name_models(gone)


def test_labels_are_plain_words():
    for label in ("a|b", "..", "a/b"):
        args = evaluate.parse_args(["--ckpt", f"{label}={evaluate.SHAPES_CONFIGS['shapes-tiny']}"])
        with pytest.raises(data.DataError, match="may hold letters"):
            evaluate.name_models(args)


def test_features_that_are_not_finite_are_refused():
    model = evaluate.load_model("shapes-tiny")
    with torch.no_grad():
        model.net.text_projection.fill_(float("nan"))
    args = evaluate.parse_args(["--ckpt", "x"])
    args.device = "cpu"
    with pytest.raises(data.DataError, match="features are not finite"):
        evaluate.Encoder(model, args).texts(["a cat"])


def test_splits_must_have_the_same_classes(tmp_path):
    for split, names in (("train", ("a", "b")), ("test", ("a", "b", "c"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.png").touch()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    with pytest.raises(data.DataError, match="the class c is not in every split"):
        suites.class_split(tmp_path, {}, "test")
    (tmp_path / "test/c/1.png").unlink()
    (tmp_path / "test/c").rmdir()
    assert suites.class_split(tmp_path, {}, "train")[1] == ["a", "b"]


def test_texts_that_begin_alike_share_a_batch_and_keep_their_places(tmp_path, monkeypatch):
    encoder = encoder_of(tiny(tmp_path / "a.pt"), "--batch-size", 1)  # four texts at once
    texts = [f"{start} {end}" for end in "abcd" for start in ("a red dog", "the cat")]
    batches = []
    encode = encoder._encode_texts
    monkeypatch.setattr(encoder, "_encode_texts", lambda b: batches.extend(b) or encode(b))
    rows = encoder.texts(texts).rows
    assert sorted({text[:5] for text in batch} for batch in batches) == [{"a red"}, {"the c"}]
    single = encoder_of(tmp_path / "a.pt")
    for text, row in zip(texts, rows, strict=True):
        np.testing.assert_allclose(row, single.texts([text]).rows[0], atol=2e-6)


def test_the_model_is_hashed_when_asked_for(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(evaluate, "hash_model", lambda model: hashed.append(1) or "f" * 64)
    path = tiny(tmp_path / "a.pt")
    encoder = encoder_of(path)
    encoder.texts(["a dog"])
    assert hashed == []
    assert encoder.hash == encoder.hash == "f" * 64
    assert hashed == [1]
    assert encoder_of(path, "--cache", tmp_path / "cache").cache.name == "f" * 16 + "-fp32"


def test_mmvp_pairs_by_number_when_a_row_is_missing(tmp_path):
    lines = ["Question ID,Type,Statement"]
    lines += [f"{k},T,statement {k}" for k in range(1, 9) if k != 1]
    write(tmp_path / "mmvp/Questions.csv", "\n".join(lines))
    for k in range(1, 9):
        photo(tmp_path / f"mmvp/MLLM_VLM Images/T/{k}.jpg")
    suite = evaluate.load_suite("mmvp", tmp_path, True)
    assert [item.id for item in suite.items] == ["1", "2", "3"]
    assert suite.items[0].texts == ("a photo of statement 3", "a photo of statement 4")


def test_a_hub_model_takes_no_other_weights():
    with pytest.raises(evaluate.DataError, match="brings its own weights"):
        evaluate.load_model("hf-hub:me/tiny", "nothere.pt")


def test_a_folder_of_transformers_without_tokenizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    write(tmp_path / "config.json", "{}")
    with pytest.raises(evaluate.DataError, match="holds no tokenizer"):
        evaluate.load_model(None, str(tmp_path))


def test_a_closed_pipe_loses_nothing(tmp_path):
    command = f"{sys.executable} evaluate.py --list"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=evaluate.SCRIPTS.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr


def test_a_failed_run_leaves_nothing_and_says_whose_it_was(tmp_path):
    out = tmp_path / "out"
    (out / evaluate.ITEMS).mkdir(parents=True)
    evaluate.discard(out)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    evaluate.discard(out)
    assert (out / "mine.txt").exists()
    (out / "results.md").write_text("mine")
    with pytest.raises(evaluate.DataError, match="not replaced"):
        evaluate.check_out(out, False)


def test_latex_escapes_its_own_characters():
    assert make_tables._tex("a_b {c}^2 ~") == r"a\_b \{c\}\textasciicircum{}2 \textasciitilde{}"


def test_odd_folders_of_zero_shot_sets(tmp_path):
    photo(tmp_path / "zeroshot/a/test/cat/1.png")
    photo(tmp_path / "zeroshot/.ipynb_checkpoints/x.png")
    assert len(evaluate.load_suite("zeroshot", tmp_path, False).costs) == 1
    photo(tmp_path / "zeroshot/a|b/test/cat/1.png")
    with pytest.raises(evaluate.DataError, match="letters, digits"):
        evaluate.load_suite("zeroshot", tmp_path, False)


def test_an_empty_box_is_told(tmp_path):
    photo(tmp_path / "a.png")
    with pytest.raises(evaluate.DataError, match="is empty"):
        evaluate.load_image(evaluate.Crop(str(tmp_path / "a.png"), (1, 1, 1, 5)), 8)


# Benchmarks of the user's own


def own_files(folder):
    """The same three items as .jsonl, .json and a loader."""
    photo(folder / "a.png")
    photo(folder / "b.png")
    rows = [
        {"images": "a.png", "texts": ["a dog", "a cat"], "subset": "nouns", "crop": [1, 2, 9, 8]},
        {"images": ["a.png"], "texts": ["a dog", "one dog", "a cat"], "true": 2, "subset": "two"},
        {"images": ["a.png", "b.png"], "texts": ["a b", "b a"], "subset": "pairs", "id": "x"},
    ]
    write(folder / "my.jsonl", "\n\n".join(map(json.dumps, rows)))
    write(folder / "mine.json", json.dumps(rows, indent=1))
    write(folder / "maker.py", f"def load(root):\n    yield from {rows!r}\n")
    return [folder / "my.jsonl", folder / "mine.json", f"{folder}/maker.py:load"]


def test_own_benchmarks_get_intervals_pairing_and_tables(tmp_path, capsys):
    files = own_files(tmp_path)
    read = [evaluate.load_suite(str(file), None, False) for file in files]
    assert [suite.name for suite in read] == ["my", "mine", "maker"]
    assert read[0].items == read[1].items == read[2].items
    one, two, three = read[0].items
    assert one.images == (Crop(str(tmp_path / "a.png"), (1, 2, 9, 8)),)
    assert (one.path, one.true, two.true, three.id) == (("nouns",), 1, 2, "x")
    out = tmp_path / "out"
    a, b = tiny(tmp_path / "a/latest.pt", 0), tiny(tmp_path / "b/latest.pt", 1)
    names = ",".join(map(str, files))
    run("--ckpt", a, "--ckpt", b, "--suite", names, "--baseline", "b", "--out", out)
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["b", "a"]
    assert list(results["a"]["suites"]) == ["my", "mine", "maker"]
    assert results["a"]["suites"]["my"]["subsets"] == results["a"]["suites"]["maker"]["subsets"]
    versus = results["a"]["suites"]["my"]["versus"]["b"]
    assert set(versus) == {"nouns", "two", "pairs text", "pairs image", "pairs group"}
    assert versus["nouns"]["low"] is versus["nouns"]["high"] is None  # one item: no interval
    page = (out / "results.md").read_text()
    assert "### my: per cent correct" in page
    assert "| **mean of 2 subsets** | 2 |" in page
    assert "texts only on fewer than 100 items" in page
    assert set(check_tables((out / "results.tex").read_text())) == {"my", "mine", "maker"}
    printed = capsys.readouterr().out
    assert "a - b, paired on the same items" in printed
    assert max(len(line) for line in printed.splitlines() if "/" not in line) <= 120


GOOD = {"images": "a.png", "texts": ["a", "b"]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a"], "is no record"),
        ({**GOOD, "txts": []}, "has the field 'txts'"),
        ({"texts": ["a", "b"]}, "images must be a list of strings, not None"),
        ({**GOOD, "texts": "a b"}, "texts must be a list of strings, not 'a b'"),
        ({**GOOD, "texts": ["a", 7]}, "texts must be a list of strings"),
        ({**GOOD, "texts": ["a"]}, "1 images with 1 texts; wanted"),
        ({**GOOD, "images": ["a.png", "b.png", "c.png"]}, "3 images with 2 texts; wanted"),
        ({**GOOD, "true": 2}, "true is 2"),
        ({**GOOD, "true": True}, "true is True"),
        ({**GOOD, "subset": "red text"}, "subset is 'red text'"),
        ({**GOOD, "subset": ""}, "subset is ''"),
        ({**GOOD, "subset": "a|b"}, "wanted a name of one line without"),
        ({**GOOD, "subset": "a\nb"}, "wanted a name of one line"),
        ({**GOOD, "subset": "mean of 2 subsets"}, "does not begin"),
        ({**GOOD, "id": [1]}, r"id is \[1\]"),
        ({**GOOD, "texts": ["a", " "]}, "texts must be a list of strings"),
        ({**GOOD, "texts": ["a", "a"]}, "texts holds 'a' twice"),
        ({**GOOD, "texts": ["a", "\ud800"]}, r"list of strings, not \['a', '\\ud800'\]"),
        ({**GOOD, "crop": [0, 0, 900, 9]}, r"crop is .*, but .*a.png has \d+ x \d+ pixels"),
        ({**GOOD, "images": ["a.png", "b.png"]}, "the subset '.*' mixes records"),
        ({**GOOD, "crop": [5, 0, 5, 9]}, r"crop is \[5, 0, 5, 9\]"),
        ({**GOOD, "tags": [1]}, "tags must be a list of strings"),
    ],
)
def test_faults_of_own_records_name_file_and_line(record, message, tmp_path):
    photo(tmp_path / "a.png")
    text = json.dumps(record)
    places = {
        "my.jsonl": f"{json.dumps(GOOD)}\n\n{text}",
        "my.json": f"[{json.dumps(GOOD)},\n\n{text}]",
    }
    for name, content in places.items():
        write(tmp_path / name, content)
        with pytest.raises(data.DataError, match=rf"{name}:3: .*{message}") as caught:
            evaluate.load_suite(str(tmp_path / name), None, False)
        assert "\n" not in str(caught.value)
    write(tmp_path / "my.py", f"def load(root):\n    return [{GOOD!r}, {record!r}]\n")
    with pytest.raises(data.DataError, match=rf"my.py:load record 2: .*{message}"):
        evaluate.load_suite(f"{tmp_path}/my.py:load", None, False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "none.json cannot be read"),
        ("a.jsonl", "{", r"a\.jsonl:1: is no JSON"),
        ("a.json", "[\n{]", r"a\.json:2: is no JSON"),
        ("a.json", "{}", "must be a list of records"),
        ("a.json", "[" * 3000, r"a\.json:1: is no JSON"),
        ("a.jsonl", "[" * 3000, r"a\.jsonl:1: is no JSON"),
        ("a.json", "{}\n{}", r"a\.json:2: .*; records line by line are \.jsonl"),
        ("a.jsonl", (json.dumps({**GOOD, "id": 1}) + "\n") * 2, "id '1' stands at .*:1 already"),
        ("a.py", "x = 1", r"names no function; write .*a\.py:FUNCTION"),
        ("a.py:", "x = 1", "names no function"),
        ("a.py:load", "import sys\ndef load(root):\n    sys.exit(3)", "line 3: SystemExit: 3"),
        ("my.txt", "", r"no such suite; .* or a \.json, \.jsonl or \.py:FUNCTION"),
        ("a.json", "[]", "holds no records"),
        ("a.py:load", "x = 1", "defines no load"),
        (
            "a.py:load",
            "def load(root):\n    return [][1]",
            r"load, line 2: IndexError: .*; correct the",
        ),
        ("a.py:load", "def load(root)", "load, line 1: SyntaxError"),
        ("sugarcrepe.json", "[]", "is a suite of the kit; rename the file"),
        ("a b|c.json", "[]", "may hold letters"),
        ("a.json", json.dumps([{**GOOD, "images": "none.png"}]), "put the images beside the file"),
    ],
)
def test_files_that_are_no_benchmark_are_told(name, content, message, tmp_path):
    if content is not None:
        write(tmp_path / name.split(":")[0], content)
    with pytest.raises(data.DataError, match=message) as caught:
        evaluate.load_suite(str(tmp_path / name), None, False)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_a_loader_with_dataclasses_and_neighbours_are_read(tmp_path):
    photo(tmp_path / "a.png")
    write(tmp_path / "my.json", "\ufeff" + json.dumps([GOOD]))
    write(tmp_path / "neighbour_of_a_loader.py", f"ROWS = [{GOOD!r}]\n")
    write(
        tmp_path / "maker.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "import neighbour_of_a_loader\n@dataclass\nclass A:\n    x: int\n"
        "def load(root):\n    return neighbour_of_a_loader.ROWS\n",
    )
    for name in ("my.json", "maker.py:load"):
        assert len(evaluate.load_suite(f"{tmp_path}/{name}", None, False).items) == 1


def test_a_baseline_that_is_no_label_and_two_files_of_one_name_are_told(tmp_path):
    with pytest.raises(data.DataError, match="--baseline x: is not one of the labels m"):
        run("--ckpt", f"m={tiny(tmp_path / 'a.pt')}", "--baseline", "x")
    with pytest.raises(data.DataError, match=r"a/x.json and b/x.jsonl have the same name"):
        evaluate.name_suites("a/x.json,b/x.jsonl")


def test_a_part_is_not_held_to_the_whole_suites_published_figure():
    cell = {"accuracy": 50.0, "low": 40.0, "high": 60.0, "ties": 0}
    cells = {"add_att": {**cell, "scored": 692, "expected": 692}}
    cells["add_obj"] = {**cell, "scored": 99, "expected": 2062}
    suite = {"subsets": cells, "averages": {}, "costs": {}, "notes": []}
    blind = {"blind": {"add_att": 50.0, "add_obj": 50.0}}
    page = make_tables.markdown({"m": {"suites": {"sugarcrepe": {**suite, **blind}}}})
    lines = {line.split(" | ")[0]: line.split(" | ") for line in page.splitlines()}
    assert lines["| add_att"][3:5] == ["50.0", f"{50 - float(lines['| add_att'][7]):+.1f}"]
    assert lines["| add_obj"][3:5] == ["50.0*", ""]


def test_wide_tables_go_on_below_with_their_first_column():
    rows = [["", *(f"model {i}" for i in range(30))], ["---"] * 31, ["a b", *map(str, range(30))]]
    shown = make_tables.show("\n".join(line for row in rows for line in make_tables.pipe(row)))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 120
    assert [int(x) for line in lines if line.startswith("a b") for x in line[3:].split()] == list(
        range(30)
    )


@pytest.mark.parametrize(
    "name", ["evaluate.py", "scripts/interpolate.py", "scripts/make_tables.py"]
)
def test_help_comes_before_the_heavy_imports(name):
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']; "
        "sys.path.insert(0, '.')\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'open_clip', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")
    assert "usage: " in done.stdout


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog isn't here.", "A dog is n't here ."),
        ("Two men's hats, at 5:30; 1,000 of them", "Two men 's hats , at 5:30 ; 1,000 of them"),
        ('A "big" sign (red) reads: stop!', "A `` big '' sign ( red ) reads : stop !"),
        ("A dog. A cat cannot run...", "A dog . A cat can not run ..."),
        ("the dogs' bowl in a U.S. city -- yes", "the dogs ' bowl in a U.S. city -- yes"),
    ],
)
def test_groups_of_three_are_cut_from_the_treebanks_words(caption, words):
    assert suites.treebank_words(caption) == words.split()
    tagged = [(word, "noun") for word in caption.split()]
    for text in suites.shuffle_words(caption, tagged, random.Random(0))[2:]:
        assert sorted(text.split()) == sorted(words.split())

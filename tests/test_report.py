"""The report of negatives, its readers and its sheets, against cases worked by hand."""

import importlib
import json
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from negatives import MaskedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
script = importlib.import_module("negatives_report")


def run(*options):
    script.main([*map(str, options)])


@pytest.mark.parametrize(
    ("caption", "negative", "share"),
    [
        ("A man riding an old horse.", "An old horse riding a man.", 100),
        ("A red ball on a blue box", "a blue ball, on a red box", 100),
        ("A dog and a cat", "A dog and a cat.", 0),  # equal
        ("A dog on a mat", "A dog on a rug", 0),
        ("A dog by two cats", "A dog by two dogs", 0),
    ],
)
def test_an_exchange_keeps_the_words(caption, negative, share):
    figures = script.measure([("", caption, negative)])
    assert (figures["exchange"], figures["equal"]) == (share, caption == "A dog and a cat")


def test_giveaways_come_in_five_times_as_often_as_they_go_out():
    pairs = [("", "a dog runs", "a zebra runs")] * 10 + [("", "a zebra eats", "a dog eats")] * 2
    pairs += [("", "a man", "a boy")] * 9  # too few
    pairs += [("", "a hat", "a cap")] * 14 + [("", "a cap", "a hat")] * 3  # 14 / 3 < 5
    pairs += [("", "a man with a dog", "a man without a dog")]
    figures = script.measure(pairs)
    assert figures["giveaway"] == figures["around"] == pytest.approx(100 * 10 / 39)
    assert figures["giveaway in/out"] == {"zebra": "10/2"}
    assert (figures["absence"], figures["absence before"]) == (pytest.approx(100 / 39), 0)
    assert list(figures["new words"].values()) == [14, 10, 9, 3, 2, 1]
    swapped = script.measure([("", "a man rides a horse", "a horse rides a man")] * 10)
    assert (swapped["giveaway"], swapped["around"]) == (0, 100)  # only with the words around


def test_the_reader_of_ngrams_finds_what_is_planted_and_nothing_else():
    draw = random.Random(0)
    nouns = [draw.sample(["dog", "cat", "bus", "tree", "man", "boat"], 2) for _ in range(2000)]
    plain = [(f"{i}", f"a {a} and a {b}", f"a {b} and a {a}") for i, (a, b) in enumerate(nouns)]
    planted = [(i, true, false.replace("and", "but no")) for i, true, false in plain[:400]]
    assert script.told(planted) == 100
    assert 45 < script.told(plain) < 55
    # A word of one image cannot be learned from others: no image is read by what it taught.
    own = [(f"{k % 20}", f"only{k % 20}", f"never{k % 20}") for k in range(400)]
    assert script.told(own) == 50


def test_the_reader_of_ngrams_minimises_what_it_says():
    items = [evaluate.TestItem((), "", (f"i{k}",), ("x", "y")) for k in range(100)]
    folds = [zlib.crc32(str(item.images).encode()) % 5 for item in items]
    w = np.linspace(0, 2, 200_001)
    for fold, (true, false) in zip(folds, evaluate.score_ngrams(items), strict=True):
        # x, ^x, x$, ^x$ have the weight w and those of y -w, at the minimum over the other folds.
        n = 100 - folds.count(fold)
        best = w[(n * np.log1p(np.exp(-8 * w)) + 8 * w**2).argmin()]
        assert (true - false, true) == (pytest.approx(8 * best, rel=0.02), pytest.approx(-false))


def test_a_masked_model_scores_token_by_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "bites", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), **size, intermediate_size=16)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    model = MaskedModel(str(tmp_path), "cpu")
    texts = ["a dog bites the cat", "the cat", "a  dog bites the cat "]
    scores = model.score(texts, batch=3)
    for text, score in zip(texts, scores, strict=True):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        total = 0.0
        for k in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, k] = model.tokenizer.mask_token_id
            with torch.no_grad():
                total += float(model.model(masked).logits[0, k].log_softmax(-1)[ids[0, k]])
        assert score == pytest.approx(total, abs=1e-4)
    pairs = [("", *texts[:2]), ("", *texts[::2])]
    assert script.told(pairs, model=model) == 50 * (scores[0] > scores[1]) + 25  # and a tie


def test_parts_of_speech_are_those_of_the_last_replaced_words():
    spacy = pytest.importorskip("spacy")
    kinds = {"red": "ADJ", "two": "NUM", "dog": "NOUN", "rex": "PROPN", "runs": "VERB"}

    @spacy.Language.component("by_table")
    def by_table(doc):
        for token in doc:
            token.pos_ = kinds.get(token.text, "X")
        return doc

    parse = spacy.blank("en")
    parse.add_pipe("by_table")
    swaps = [
        ("red", "two"),
        ("a dog", "rex"),
        ("dog", "red"),
        ("dog", "runs"),
        ("dog is", "is dog"),
    ]
    pairs = [("", f"the {old} is", f"the {new} is") for old, new in swaps]
    assert script.kept_speech(pairs, parse) == 50  # an exchange is no replacement
    assert script.kept_speech(pairs[-1:], parse) is None


@pytest.fixture
def files(tmp_path):
    """Two manifests of the same eight photos, a .tsv as NegCLIP's and a SugarCrepe .json."""
    for name in ("ours", "other"):
        how = ["exchange", "instead of exchange", "replacement"]
        rows = [
            {"image": f"{k:012}.jpg", "caption": f"Dog {k}", "how": {"object": how[k % 3]},
             "negatives": {"object": [f"{name} {k}"] * (k < 6), "action": None}}
            for k in range(8)
        ]  # fmt: skip
        lines = map(json.dumps, [{"manifest": 1}, *rows])
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8-sig")
    tsv = "\ttitle\tfilepath\tneg_caption\n0\tA dog.\ta.jpg\t['A cat.', 'The dog.']\n"
    (tmp_path / "n.tsv").write_text(tsv)
    row = {"filename": "000000000003.jpg", "caption": "Dog", "negative_caption": "crepe 1"}
    (tmp_path / "replace_obj.json").write_text(json.dumps({k: row for k in range(5)}))
    return [tmp_path / name for name in ("ours.jsonl", "other.jsonl", "n.tsv", "replace_obj.json")]


def test_a_report_of_every_kind_of_file(files, tmp_path, capsys):
    run(*files, "--markdown", "--out", tmp_path / "r.json")
    types = json.loads((tmp_path / "r.json").read_text())["files"]["ours"]["types"]
    assert list(types) == ["object"]
    figures = [types["object"][x] for x in ("negatives", "coverage", "exchange", "drawn")]
    assert figures == [6, 75, 0, pytest.approx(100 * 3 / 6)]
    table = capsys.readouterr().out.split("| | types |")[1].splitlines()
    assert table[2].startswith("| ours | object | 75.0 | ")
    assert table[4].startswith("| n | negclip | 100.0 | ")
    table = importlib.import_module("make_tables").make_table(tmp_path / "r.json", "negatives")
    assert "\n| ours | object | 75.0 | " in table


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"caption": 5, "negatives": {}}', "record 1: no caption with"),
        *[("a.jsonl", text, "no caption with") for text in ('{"caption": "A dog"}', "5", "{")],
        ("a.jsonl", '{"caption": "A dog", "negatives": {"object": null}}', "no negatives in it"),
        ("a.tsv", "title\tfilepath\tneg_caption\na\tb\tnot a list\n", "no caption with"),
        ("a.json", "[]", "no caption with"),
        ("none/a.jsonl", None, "cannot be read"),
        ("r/object.marks", "#0\todd\n#1 odd\n", "object.marks, line 2: wanted #item"),
        *[("r/object.marks", line, "line 1: wanted #item") for line in ("#1\tbad", "#99\todd")],
        *[("r/key.json", key, "not a key") for key in ("", "[]", '{"x": "a"}', '{"x#0": 5}')],
        ("r/note.txt", "", "no .marks files"),
    ],
)
def test_what_is_none_is_refused(files, name, text, message, tmp_path):
    run("reading", "sheets", *files[:1], "--out", tmp_path / "r")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(script.DataError, match=message):
        run(*(("reading", "count", tmp_path / "r") if name[0] == "r" else [tmp_path / name]))


def test_a_reading_hides_the_makers_and_counts_them(files, tmp_path):
    out, sheets = tmp_path / "reading", ("reading", "sheets", files[0], "--against")
    run(*sheets, *files[1:], "--items", 6, "--others", 4, "--out", out)
    key = json.loads((out / "key.json").read_text())
    sheet = (out / "object.txt").read_text().split("\n#")
    assert len(sheet) == len(key) == 14
    for k, item in enumerate(sheet):
        assert item.split("sentence: ")[1].split()[0] in (key[f"object#{k}"], "crepe")
    assert "other captions: Dog 3\n" in next(item for item in sheet if "crepe" in item)
    ours = [k for k in range(14) if key[f"object#{k}"] == "ours"]
    marks = f"#{ours[0]}\todd|true\twhy\r\n#{ours[1]}\todd\n\n#{ours[1]}\todd\tagain\n"
    (out / "object.marks").write_text(marks, "utf-8-sig")
    run("reading", "count", out, "--out", tmp_path / "r.json")
    row = json.loads((tmp_path / "r.json").read_text())["object"]["ours"]
    assert [row[f"{x} %"][0] for x in ("mechanical", "odd", "true", "any")] == [0, 33.3, 16.7, 33.3]
    assert (row["read"], row["odd %"][1:]) == (6, [9.7, 70.0])  # Wilson's interval of 2 out of 6
    with pytest.raises(script.DataError, match="it may hold marks"):
        run(*sheets, "--out", out)
    with pytest.raises(script.DataError, match="two makers have the same name"):
        run(*sheets, files[1], files[1], "--out", tmp_path / "new")


def test_only_photos_of_one_name_are_one():
    long = [{"image": f"{d}/a_long_name_00000001.jpg"} for d in "ab"]
    assert script.photo(long[0]) != script.photo(long[1])
    assert script.photo({"image": "val2014/COCO_val2014_000000391895.jpg"}) == "000000391895.jpg"
    assert script.photo({"image": None, "image_id": 1}) != script.photo({"image_id": 2})

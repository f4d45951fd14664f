"""Captions on disk: sources, manifests, tables, shards, types, the command and its engines."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import train
from negatives import NEGATIVE_TYPES, DataError, main, read_captions

SCRIPT = Path(__file__).parent.parent / "negatives.py"
IMAGE = "val2014/COCO_val2014_000000000009.jpg"
CAPTION = "A dog on a couch."
RECORD = {"image": IMAGE, "image_id": 9, "caption": CAPTION}
COCO = {"images": [{"id": 9, "file_name": IMAGE}], "annotations": [RECORD]}
KARPATHY = {"filepath": "val2014", "filename": IMAGE.split("/")[1], "cocoid": 9}
KARPATHY = {"images": [{**KARPATHY, "sentences": [{"raw": CAPTION}]}]}
LINE = json.dumps(RECORD)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [  # image, image_id
        ("a.jsonl", LINE, (IMAGE, 9)),
        ("bom.jsonl", "\ufeff" + LINE, (IMAGE, 9)),
        ("a.jsonl", '\ufeff{"manifest": 1}\n\n' + LINE, (IMAGE, 9)),
        ("a.jsonl", ' { "manifest" : 1 }\r\n' + LINE + "\r\n", (IMAGE, 9)),
        ("joined.jsonl", LINE + '\n\ufeff{"seed": 0, "manifest": 1}\n', (IMAGE, 9)),
        ("coco.json", json.dumps(COCO), (IMAGE, 9)),
        ("bom.json", "\ufeff" + json.dumps(COCO), (IMAGE, 9)),
        ("list.json", json.dumps([{"image": IMAGE, "caption": [CAPTION]}]), (IMAGE, None)),
        ("dataset_coco.json", json.dumps(KARPATHY), (IMAGE, 9)),
        ("a.csv", f'filepath,title\n{IMAGE},"{CAPTION}"\n', (IMAGE, None)),
        ("a.tsv", f"image\tcaption\n{IMAGE}\t{CAPTION}\n\n", (IMAGE, None)),
        ("a.csv", f"title\tfilepath\n{CAPTION}\t{IMAGE}\n", (IMAGE, None)),
        ("bom.csv", f"\ufeffcaption,image\r\n{CAPTION},{IMAGE}\r\n", (IMAGE, None)),
    ],
)
def test_every_source_gives_the_same_record(tmp_path, name, content, found):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    (record,) = read_captions(tmp_path / name)
    assert (*record[:2], record.caption) == (*found, CAPTION)
    assert not any(record.negatives.values())
    out, photo = tmp_path / "out.jsonl", tmp_path / IMAGE
    photo.parent.mkdir()
    Image.new("RGB", (8, 8)).save(photo)
    if name.endswith(".jsonl"):  # both readers, by order and by offset, say the same
        out = tmp_path / name
    else:
        kind = "csv" if name[-3:] in ("csv", "tsv") else "coco"
        data.main([kind, str(tmp_path / name), "--out", str(out)])
    data.main(["check", str(out), "--images", str(tmp_path)])
    indexed = data.ManifestDataset(out, tmp_path, None)
    assert [indexed.record(0)] == list(data.read_manifest(out))
    assert indexed.record(0).caption == CAPTION


def test_a_table_has_negatives_of_any_type(tmp_path):
    lines = ["\ttitle\tfilepath\tneg_caption", '0\tA dog\ta.jpg\t"[""A dog \'s cat"", \'A cat\']"']
    lines += ['1\t"A cup', '"\ta.jpg\t[]', ""]  # a caption with a line break at its end
    (tmp_path / "negclip.tsv").write_text("\n".join(lines))
    rows = list(read_captions(tmp_path / "negclip.tsv"))
    wanted = [{"neg_caption": ["A dog 's cat", "A cat"]}, {"neg_caption": None}]
    assert [row.negatives for row in rows] == wanted
    assert rows[1].caption == "A cup\n"
    (tmp_path / "a.csv").write_text("photo,text,n:1,few\n1.jpg,A dog,No dog,\n2.jpg,A cat,,[\n")
    columns = {"image_column": "photo", "caption_column": "text"}
    found = list(read_captions(tmp_path / "a.csv", **columns, negatives=["n:1:negation"]))
    assert [row.negatives["negation"] for row in found] == ["No dog", None]
    with pytest.raises(DataError, match=r"a\.csv:1: columns are photo, text, n:1, few"):
        list(read_captions(tmp_path / "a.csv", **columns, negatives=["many"]))
    with pytest.raises(DataError, match="--negative n:1: types must be names"):
        list(read_captions(tmp_path / "a.csv", **columns, negatives=["n:1"]))
    with pytest.raises(DataError, match=r"a\.csv:3: '\[' is no Python list"):
        list(read_captions(tmp_path / "a.csv", **columns, negatives=["few:negation"]))
    (tmp_path / "b.csv").write_text("image,caption,no,few\n1.jpg,A dog,No dog,\n2.jpg,A cat,,x\n")
    out = tmp_path / "b.jsonl"
    data.main(
        ["csv", str(tmp_path / "b.csv"), "--out", str(out), "--negative", "no:negation", "few"]
    )
    assert json.loads(out.read_text().splitlines()[0])["types"] == ["negation", "few"]
    made = [record.negatives for record in data.read_manifest(out)]
    assert made == [{"negation": "No dog", "few": None}, {"negation": None, "few": "x"}]


MISTAKES = [
    ("a.jsonl", LINE + "\nnonsense\n", r"a.jsonl:2: is not JSON"),
    ("a.jsonl", LINE + '\n{"caption": 3}\n', "a.jsonl:2: the caption must be a sentence, not '3'"),
    ("a.jsonl", '{"caption": " "}\n', "a.jsonl:1: the caption must be"),
    ("a.jsonl", "[1]\n", "a.jsonl:1: is not a record"),
    ("a.jsonl", '{"image": 5, "caption": "a"}', "a.jsonl:1: .image. must be a file name, not 5"),
    ("a.jsonl", '{"image": "../a", "caption": "a"}', "leaves the folder"),
    (
        "a.jsonl",
        '{"caption": "a", "negatives": {"no": "b"}}',
        "the key 'no', and the types are",
    ),
    ("a.jsonl", '{"caption": "a", "negatives": "b"}', "must be an object"),
    ("a.jsonl", '{"caption": "a", "negatives": {"object": ["b", ""]}}', "object negative must"),
    ("a.jsonl", '{"manifest": 1, "types": ["a b"]}', "a.jsonl:1: .types.: types must be names"),
    ("a.jsonl", '{"manifest": 1, "types": ["a", "a"]}', "a type is named twice"),
    ("a.jsonl", "", "no captions"),
    ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
    ("a.json", '[\n{"caption": "A"},\n}', "a.json: is not JSON at column 1 of line 3"),
    ("a.json", '[{"image": "1.jpg"}]', "record 0: neither COCO nor Karpathy"),
    ("a.json", '{"annotations": [{"image_id": 1}]}', "record 0: neither COCO nor Karpathy"),
    ("a.json", '[{"image": "1.jpg", "caption": ""}]', "record 0: the caption must be"),
    ("a.json", "3", "a.json: neither COCO nor Karpathy"),
    ("a.json", '{"info": 1}', "a.json: neither COCO nor Karpathy"),
    ("a.json", "", "a.json: is not JSON"),
    ("a.csv", "photo,text\n1.jpg,A dog\n", "a.csv:1: columns are photo, text"),
    ("a.csv", "image,caption\n1.jpg,A dog\n2.jpg\n", "a.csv:3: 1 cells for 2 columns"),
    ("a.csv", "image,caption\n1.jpg,A dog\n2.jpg,\n", "a.csv:3: the caption must be"),
    ("a.tsv", "image\tcaption\n\tA dog\n", "a.tsv:2: .image. must be a file name"),
    ("a.csv", "image,caption\n/data/1.jpg,A dog\n", "a.csv:2: .image. '/data/1.jpg' leaves"),
    ("a.csv", "image,caption\na.jpg,A bus, and a man\n", "a.csv:2: 3 cells for 2 columns"),
    ("a.csv", 'image,caption\na.jpg,"A man\nb.jpg,A dog\n', "a.csv:2: .* not well quoted"),
    ("a.csv", 'image,caption\n\na.jpg,"A man\nb.jpg,A "dog"\n', "a.csv:3: .* not well quoted"),
    ("a.tsv", 'image\tcaption\na\t"A man\nb\tA dog"\nc\tA cat\n', "a.tsv:2: a quote .* 'b.tA dog"),
    ("a.tsv", 'image\tcaption\na\t"Stop" on a sign\n', "a.tsv:2: .* quotes inside it are doubled"),
    ("a.csv", "", "no captions"),
    ("a.png", "x", "unknown kind of file"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_and_leaves_nothing(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        main([str(path), "--out", str(tmp_path / "out.jsonl")])
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


# Types


def manifest(folder, lines, name="m.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def own(folder, count=8, name="own.jsonl"):
    """A manifest with a header, of two types that are not the default ones."""
    lines = [{"manifest": 1, "types": ["counting", "negation"]}]
    for i in range(count):
        Image.new("RGB", (40, 30), (20 * i, 5, 9)).save(folder / f"{i}.jpg")
        made = {"counting": ["two dogs", "three dogs", "nine"], "negation": f"no dog {i}"}
        made = {"negation": None} if i == 0 else made
        for k in (0, 1):
            lines.append({"image": f"{i}.jpg", "caption": f"a dog {i} {k}", "negatives": made})
    return manifest(folder, lines, name)


def plainly(image, rng):
    return torch.zeros(3, 2, 2, dtype=torch.uint8)


def test_a_manifest_has_types_of_its_own_and_lists_are_drawn_from(tmp_path):
    found = data.ManifestDataset(own(tmp_path), tmp_path, plainly)
    assert found.types == ("counting", "negation")
    assert found[0, 0].captions.negatives == (None, None)
    drawn = [found[epoch, 5].captions.negatives[0] for epoch in range(30)]
    assert set(drawn) == {"two dogs", "three dogs", "nine"}
    again = data.ManifestDataset(tmp_path / "own.jsonl", tmp_path, plainly)
    assert [again[epoch, 5].captions.negatives[0] for epoch in range(30)] == drawn
    other = data.ManifestDataset(tmp_path / "own.jsonl", tmp_path, plainly, 1)
    assert [other[epoch, 5].captions.negatives[0] for epoch in range(30)] != drawn
    chosen = data.ManifestDataset(tmp_path / "own.jsonl", tmp_path, plainly, types=("negation",))
    assert chosen[0, 5].captions.negatives == ("no dog 2",)


def test_sources_of_several_types_are_joined(tmp_path):
    world = data.ShapesDataset((8, 8), 0)
    dogs = data.ManifestDataset(own(tmp_path), tmp_path, plainly)
    mixed = data.Mixture([dogs, world], [1, 1], 4, 0, True)
    assert mixed.types == ("counting", "negation", *NEGATIVE_TYPES)
    assert mixed[0, 0, 5].captions.negatives[1:] == ("no dog 2", None, None, None, None)
    shapes = mixed[1, 0, 5].captions.negatives
    assert shapes == (None, None, *world[0, 5].captions.negatives)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"image": "0.jpg", "caption": "a", "negatives": {"object": "b"}}\n')
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(plain.read_bytes() + (tmp_path / "own.jsonl").read_bytes())
    found = data.ManifestDataset(joined, tmp_path, plainly)
    assert found.types == (*NEGATIVE_TYPES, "counting", "negation")
    assert found[0, 0].captions.negatives == (None, None, "b", None, None, None)


def test_shards_carry_types_and_the_check_counts_them(tmp_path, capsys):
    path = str(own(tmp_path))
    data.main(["shards", path, "--images", str(tmp_path), "--out", str(tmp_path / "s")])
    stream = data.ShardStream(f"{tmp_path}/s/000000.tar", plainly, 0, (0, 0, 1))
    assert stream.types == ("counting", "negation")
    items = [item.captions.negatives for (item,), _ in zip(stream, range(40), strict=False)]
    assert {"two dogs", "three dogs", "nine", None} == {counting for counting, _ in items}
    some = data.ShardStream(f"{tmp_path}/s/000000.tar", plainly, 0, (0, 0, 1), "stop", ["negation"])
    assert len(next(iter(some))[0].captions.negatives) == 1
    data.main(["check", path, "--images", str(tmp_path)])
    assert re.search(r"counting +14 negatives \(87\.5 %\)\n +negation +14", capsys.readouterr().out)


def test_types_of_its_own_train_and_a_run_keeps_its_types(tmp_path):
    path, out = own(tmp_path), tmp_path / "run"
    options = ["--data", str(path), "--images", str(tmp_path), "--model", "shapes-tiny"]
    options += ["--batch-size", "4", "--workers", "0", "--log-every", "1", "--device", "cpu"]
    assert train.main([*options, "--steps", "3", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = [[key for key in line if key.startswith("threshold_")] for line in lines]
    assert names == [["threshold_counting", "threshold_negation"]] * 3
    assert lines[0]["cmr"] > 0
    path.write_text(path.read_text().replace('"counting", "negation"', '"negation", "counting"'))
    with pytest.raises(DataError, match="changed since the run"):
        train.main([*options, "--steps", "3", "--out", str(out)])
    with pytest.raises(DataError, match="no negative of the type countin;"):
        train.main([*options, "--types", "countin,negation", "--steps", "3"])

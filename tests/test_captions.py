"""Captions on disk: sources, manifests, tables, shards, types, the command and its engines."""

import hashlib
import http.server
import io
import json
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import data
import negatives
import train
from negatives import NEGATIVE_TYPES, DataError, main, read_captions


@pytest.fixture(autouse=True)
def short_game(monkeypatch):
    """What is drawn does not matter here, only that it is the same."""
    monkeypatch.setattr("negatives.ROUNDS", 2)


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
    with pytest.raises(DataError, match=r"a\.csv:3: '\[' is not a list of texts"):
        list(read_captions(tmp_path / "a.csv", **columns, negatives=["few:negation"]))
    (tmp_path / "b.csv").write_text("image,caption,no,few\n1.jpg,A dog,No dog,\n2.jpg,A cat,,x\n")
    out = tmp_path / "b.jsonl"
    data.main(
        ["csv", str(tmp_path / "b.csv"), "--out", str(out), "--negative", "no:negation", "few"]
    )
    assert json.loads(out.read_text().splitlines()[0])["types"] == ["negation", "few"]
    (tmp_path / "c.csv").write_text("caption\nA dog\n")
    with pytest.raises(DataError, match=r"c\.csv: caption 1 has no image; name the column"):
        data.main(["csv", str(tmp_path / "c.csv"), "--out", str(tmp_path / "c.jsonl")])
    assert not (tmp_path / "c.jsonl").exists()
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


# The command


def captions(count, seed=0):
    g = random.Random(seed)
    for _ in range(count):
        subject = g.choice(["A man", "Two young boys", "The brown dog", "a WOMAN", "An old horse"])
        act = g.choice(["riding", "holding", "sitting on", "is standing near", "walking past"])
        thing = g.choice(["a red bus", "an apple", "the wooden table", "a skateboard", "3 cats"])
        yield f"{subject} {act} {thing}{g.choice([' on the beach', '  under a tree', ''])} \u2026"


@pytest.fixture
def source(tmp_path):
    """A manifest of 600 captions, three an image; one has a negative of its own."""
    rows = [{"image_id": i // 3, "caption": c} for i, c in enumerate(captions(600))]
    rows[7]["negatives"] = {"counting": ["nine dogs"], "object": "old"}
    head = {"manifest": 1, "types": [*NEGATIVE_TYPES, "counting"]}
    return manifest(tmp_path, [head, *rows], "in.jsonl")


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def start(*options, stdin=None, **more):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", **more)


def test_the_header_counts_what_the_lines_hold_and_stats_explain_every_null(source, capsys):
    out = source.with_name("out.jsonl")
    options = ["--types", "object,relation", "--seed", "4", "--explain", "--stats"]
    main([str(source), "--out", str(out), *options])
    header, rows = json.loads(out.read_text().splitlines()[0]), records(out)
    assert header["types"] == ["object", "relation", "counting"]
    assert (header["engine"], header["seed"], header["captions"]) == ("lexicon", 4, 600)
    body = out.read_bytes().split(b"\n", 1)[1]
    assert header["sha256"] == hashlib.sha256(body).hexdigest()
    printed = capsys.readouterr().out
    for name in ("object", "relation"):
        made = sum(row["negatives"][name] is not None for row in rows)
        assert header["negatives"][name] == made == 600 - sum(header["nulls"][name].values())
        assert f"{made} of 600" in printed
        for row in rows:  # the edits make the negative
            text = row["caption"]
            for edit in reversed(row["edits"][name] or []):
                assert text[edit["start"] : edit["end"]] == edit["old"]
                text = text[: edit["start"]] + edit["new"] + text[edit["end"] :]
            assert row["negatives"][name] in (None, text)
    nulls = sum(map(int, re.findall(r"(\d+) null: ", printed)))
    assert nulls == 1200 - sum(header["negatives"].values())
    assert rows[7]["negatives"]["counting"] == ["nine dogs"]
    assert rows[7]["negatives"]["object"] != "old"
    assert not list(source.parent.glob("*.partial")) + list(source.parent.glob("*.new"))
    main([str(out), "--out", str(source.with_name("again.jsonl")), "--limit", "5"])
    assert len(records(source.with_name("again.jsonl"))) == 5


def test_workers_do_not_change_a_byte_and_stdin_is_lines(source, tmp_path):
    for workers in ("1", "3"):
        done = start(source, "--out", tmp_path / workers, "--workers", workers)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    done = start("-", "--out", tmp_path / "o", stdin="A dog\nA cat\u2028 on a mat\r\n")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "o").read_bytes().split(b"\n")[1:-1]
    assert [json.loads(line)["caption"] for line in lines] == ["A dog", "A cat\u2028 on a mat"]
    done = start("-", "--out", tmp_path / "p", stdin="A dog\n\nA cat")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("negatives.py: error: -:2: the caption must be .*\n", done.stderr)


def test_half_a_character_is_written_and_read_back(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"caption": "A dog \\ud83d on a couch"}\n')
    main([str(path), "--out", str(out)])
    assert records(out)[0]["caption"] == "A dog \ud83d on a couch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "want either CAPTIONS or --text"),
        (["in.json"], "--out is missing"),
        (["in.json", "--text", "A dog"], "want either"),
        (["--text", "A dog", "--out", "o"], "--text prints"),
        (["in.json", "--out", "o", "--workers", "0"], "must be at least 1"),
        (["in.json", "--out", "o", "--types", "verb"], "--types verb: want some of relation,"),
        (["in.json", "--out", "o", "--types", "object,object"], "named twice"),
        (["in.json", "--out", "o", "--engine", "word2vec"], "invalid choice"),
        (["in.json", "--out", "o", "--exchange", "2"], "from 0 to 1"),
        (["in.json", "--out", "o", "--refine", "nan"], "must be numbers"),
        (["in.json", "--out", "o", "--engine", "llm"], "go together"),
        (["in.json", "--out", "o", "--engine", "llm", "--llm", "http://a/v1"], "--llm-model"),
        (["a.tar", "in.json", "--out", "o"], "must all be .tar"),
        (["a.tar", "--out", "o", "--limit", "3"], "--limit does not go"),
    ],
)
def test_a_wrong_option_ends_with_code_2(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# Runs that are stopped


def stop_early(monkeypatch, options, error=KeyboardInterrupt):
    def killed(engine, block, work=negatives._work):
        if block[0][0]:
            raise error
        return work(engine, block)

    with monkeypatch.context() as patch:
        patch.setattr("negatives._work", killed)
        with pytest.raises((KeyboardInterrupt, DataError)) as caught:
            main(options)
    return str(caught.value)


@pytest.mark.parametrize("torn", [b"", b'300\t["repl'])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(source, monkeypatch, torn):
    whole, out = source.with_name("whole.jsonl"), source.with_name("out.jsonl")
    main([str(source), "--out", str(whole)])
    stop_early(monkeypatch, [str(source), "--out", str(out)])
    partial = source.with_name("out.jsonl.partial")
    partial.write_bytes(partial.read_bytes() + torn)
    seen = []
    work = negatives._work
    monkeypatch.setattr("negatives._work", lambda e, block: seen.extend(block) or work(e, block))
    main([str(source), "--out", str(out)])
    assert len(seen) == 600 - negatives.CHUNK
    assert out.read_bytes() == whole.read_bytes()


def test_nothing_is_lost_or_overwritten(source, monkeypatch, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    options = [str(source), "--out", str(out)]
    out.write_text("precious")
    with pytest.raises(DataError, match="exists; name another file or add --overwrite"):
        main(options)
    with pytest.raises(DataError, match="is the source itself"):
        main([str(source), "--out", str(source), "--overwrite"])
    with pytest.raises(DataError, match="cannot be written"):
        main([str(source), "--out", str(tmp_path / "no" / "out")])
    full = OSError(28, "No space left on device")
    assert "disk full" in stop_early(monkeypatch, [*options, "--overwrite"], full)
    assert out.read_text() == "precious"
    out.unlink()
    with pytest.raises(DataError, match=r"other options.*--overwrite"):
        main([*options, "--seed", "1"])
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join([*lines[:3], b"{}\n", *lines[4:]]))
    with pytest.raises(DataError, match=r"out\.partial: line 4 is damaged"):
        main([*options, "--overwrite"])
    partial.write_text("precious")
    with pytest.raises(DataError, match="was not written by this script"):
        main([*options, "--overwrite"])
    assert partial.read_text() == "precious"
    pytest.importorskip("fcntl")
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); input()"
    code = code.replace("input()", "print(flush=True); input()")
    command = [sys.executable, "-c", code, str(partial)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(DataError, match="another run is writing it"):
            main(options)
        other.communicate(b"\n")


def test_written_files_are_whole_or_not_there(tmp_path):
    path, partial = tmp_path / "a", tmp_path / "a.partial"
    with pytest.raises(ZeroDivisionError), negatives.writing(path) as file:
        file.write(b"half" * (1 // 0))
    assert not list(tmp_path.iterdir())
    partial.write_bytes(b"precious")
    with (
        pytest.raises(DataError, match=r"a\.partial: belongs to an interrupted"),
        negatives.writing(path),
    ):
        pass
    assert partial.read_bytes() == b"precious"
    with negatives.writing(path, overwrite=True) as file:
        file.write(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (None, 0, ""),
        (DataError("a: is wrong"), 2, "x.py: error: a: is wrong\n"),
        (OSError(5, "Input/output error"), 2, "x.py: error: [Errno 5] Input/output error\n"),
        (KeyboardInterrupt(), 130, "x.py: stopped\n"),
    ],
)
def test_every_script_ends_in_one_way(fault, code, said, capsys):
    def work():
        if fault:
            raise fault

    assert negatives.run_script(work, "x.py") == code
    assert capsys.readouterr().err == said


# Shards


def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


@pytest.mark.parametrize("names", negatives.LAUNCHERS)
def test_ranks_share_shards_and_write_the_same_bytes(tmp_path, monkeypatch, names):
    shards = []
    for k in range(3):
        samples = {}
        for i, caption in enumerate(captions(20, k)):
            row = {"caption": caption, "url": "u"}
            named = {"txt": caption.encode()} if i % 2 else {"json": json.dumps(row).encode()}
            for suffix, content in {"seg.JPG": b"\xff\xd8", **named}.items():
                samples[f"./a.b/{k}{i:03}.{suffix}"] = content
        shards.append(str(tmp_path / f"{k}.tar"))
        shard(shards[-1], samples)
    main([*shards, "--out", str(tmp_path / "one")])
    for rank in ("1", "0"):
        monkeypatch.setenv(names[0], rank)
        monkeypatch.setenv(names[1], "2")
        monkeypatch.setenv(names[2], rank)
        main([*shards, "--out", str(tmp_path / "two")])
        assert len(list((tmp_path / "two").iterdir())) == (1 if rank == "1" else 3)
    monkeypatch.setenv(names[0], "2")
    with pytest.raises(DataError, match=f"{names[0]}=2, {names[1]}=2.*must be numbers from 0"):
        main([*shards, "--out", str(tmp_path / "two"), "--overwrite"])
    for path in map(Path, shards):
        new = members(tmp_path / "one" / path.name)
        assert new == members(tmp_path / "two" / path.name)
        rows = [json.loads(content) for name, content in new.items() if name.endswith("json")]
        assert len(rows) == 20
        assert all(tuple(row["negatives"]) == NEGATIVE_TYPES for row in rows)
        assert sum(row.get("url") == "u" for row in rows) == 10
        assert new[f"./a.b/{path.stem}000.seg.jpg"] == b"\xff\xd8"


def test_damaged_shards_are_named(tmp_path):
    whole, bad, out = tmp_path / "whole.tar", tmp_path / "bad.tar", tmp_path / "out"
    shard(whole, {f"{k}.txt": b"A dog" for k in range(3)})
    for content, message in [
        (b"no tar at all", r"bad\.tar: cannot be read"),
        (b"", r"bad\.tar: cannot be read"),
        *((whole.read_bytes()[:n], "cut off|unexpected end") for n in (1024, 1224, 1536, 2048)),
        (whole.read_bytes()[:1024] + b"x" * 512, "damaged or cut off at byte 1024"),
    ]:
        bad.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            main([str(bad), "--out", str(out)])
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match=r"bad\.tar: cannot be read"):
            list(negatives.read_samples("bad.tar", io.BytesIO(content)))  # a stream
    assert len(list(negatives.read_samples("whole", io.BytesIO(whole.read_bytes())))) == 3
    for samples, message in [
        ({"7.jpg": b"x"}, "bad.tar: sample 7: the caption must be"),
        ({"7.json": b"5"}, "bad.tar: sample 7: is not a record"),
        ({"7.txt": b"\xff"}, "bad.tar: sample 7: its .txt is not UTF-8"),
        ({"7.txt": b"a", "7.TXT": b"b"}, "bad.tar: 7.TXT is in it twice"),
    ]:
        shard(bad, samples)
        with pytest.raises(DataError, match=message):
            main([str(bad), "--out", str(out)])
    with tarfile.open(bad, "w") as tar:
        info = tarfile.TarInfo("0.txt")
        info.type, info.linkname = tarfile.LNKTYPE, "1.txt"
        tar.addfile(info)
    with pytest.raises(DataError, match="has a link to a missing member"):
        main([str(bad), "--out", str(out)])
    with pytest.raises(DataError, match=r"the source .* itself"):
        main([str(whole), "--out", str(tmp_path), "--overwrite"])
    assert not out.exists()


# The released recipe


def test_fills_are_decoded_with_their_sequence_so_that_pieces_join(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "wig", "##gling", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=16, **size)
    net = transformers.BertForMaskedLM(config)
    net.cls.predictions.bias.data = torch.tensor([0.0, 0, 0, 0, 0, 30, 40, 10, 20, 50])
    net.save_pretrained(tmp_path)
    model = negatives.MaskedModel(str(tmp_path), "cpu")
    texts = ["a wig [MASK]", "a man", "[MASK] dog", "a [MASK]"]
    found = model.fill(texts)  # the 4th guess is ##gling
    pipe = transformers.pipeline("fill-mask", model=str(tmp_path), device="cpu", top_k=5)
    wanted = {text: pipe(text)[3]["sequence"] for text in texts if "[MASK]" in text}
    assert found == wanted
    assert found["a wig [MASK]"] == "a wiggling"
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no masked-language-model head"):
        negatives.MaskedModel(str(tmp_path), "cpu")

    class Word(NamedTuple):
        text: str
        pos_: str

    class Doc(list):
        def __init__(self, text):
            tags = {"cat": "NOUN", "mat": "NOUN", "hat": "NOUN", "red": "ADJ"}
            super().__init__(Word(word, tags.get(word, "X")) for word in text.split())
            self.text = text

    class Guess:
        tokenizer = type("T", (), {"mask_token": "<mask>"})

        def fill(self, texts):
            return {text: text.replace("<mask>", "GUESS") for text in texts}

    monkeypatch.setattr("negatives.load_spacy", lambda name, tags_only: Doc)
    monkeypatch.setattr("negatives.MaskedModel", lambda name, device: Guess())
    rows = [
        {"caption": "a cat on a mat with a hat", "image_id": 1},
        {"caption": "a red scared car"},
    ]
    path, out = manifest(tmp_path, rows), tmp_path / "out"
    main([str(path), "--out", str(out), "--engine", "released"])
    first, second = (row["negatives"] for row in records(out))
    assert first["relation"] == "a mat on a cat with a hat"
    assert first["object"] in {f"a {x} on a {y} with a {z}" for x, y, z in
        [("GUESS", "mat", "hat"), ("cat", "GUESS", "hat"), ("cat", "mat", "GUESS")]}  # fmt: skip
    assert second == {**dict.fromkeys(NEGATIVE_TYPES), "attribute": "a GUESS scared car"}


def test_a_missing_spacy_model_says_how_to_get_it(source):
    pytest.importorskip("spacy")
    options = ["--out", str(source) + ".out", "--engine", "spacy", "--spacy-model", "no_such"]
    with pytest.raises(DataError, match="python -m spacy download no_such"):
        main([str(source), *options])


# A language model as an engine


@pytest.mark.parametrize(
    ("caption", "text", "how"),
    [
        ("A man riding an elephant.", "An elephant riding a man", "exchange"),
        ("A man riding an elephant.", "a man riding a Horse.", "replace"),
        ("A red bus and an old blue car", "A blue bus and an old red car", "exchange"),
        ("The cat  sits on a mat !", "The cat stands on a mat", "replace"),
        ("A big dog", "An old dog", "replace"),
        ("A man riding a horse", "A boy riding a cow", ""),
        ("A man riding a horse", "Cows sleep in the barn", ""),
        ("A man riding a horse", "A man not riding a horse", ""),
        ("A man riding a brown horse", "A man riding a horse", ""),
        ("A man riding a horse", "A man riding a horse.", ""),
    ],
)
def test_an_answer_is_one_span_or_an_exchange(caption, text, how):
    edits, found = negatives.edits_between(caption, text)
    assert (found if edits else "") == how
    for begin, end, new in sorted(edits, reverse=True):
        caption = caption[:begin] + new + caption[end:]
    if how:
        plain = [re.sub(r"\s+", " ", x).rstrip(" .!").lower() for x in (caption, text)]
        assert plain[0] == plain[1]


@pytest.mark.parametrize(
    ("name", "text", "taken"),
    [
        ("relation", "A red chair on a man with a blue hat", True),
        ("relation", "A man under a red chair with a blue hat", True),
        ("relation", "A man on a red bench with a blue hat", False),
        ("relation", "A man on a blue chair with a red hat", False),
        ("attribute", "A man on a blue chair with a red hat", True),
        ("attribute", "A man on a green chair with a blue hat", True),
        ("attribute", "A man under a red chair with a blue hat", False),
        ("attribute", "A woman on a red chair with a blue hat", False),
        ("object", "A man on a red chair with a blue scarf", True),
        ("object", "A man on a red chair with a pink hat", False),
        ("action", "A man under a red chair with a blue hat", False),
    ],
)
def test_an_answer_changes_what_its_type_names(name, text, taken):
    caption = "A man on a red chair with a blue hat"
    found = negatives._accepted(name, caption, {name: text}, (), [])
    assert (found.text == text) == taken
    assert taken or found.how == f"it changes something else than the {name}"


DOGS = [
    f"A dog with {word} spots on a mat"
    for word in ["red", "blue", "green", "black", "white", "gray"]
]


class Handler(http.server.BaseHTTPRequestHandler):
    """Speaks the chat protocol, as badly as the server's `behave` says."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        caption = re.search("Caption: (.*)", body["messages"][0]["content"])[1]
        with server.lock:
            server.asked.append((self.path, self.headers["Authorization"], caption, body))
            turn = sum(seen[2] == caption for seen in server.asked)
        server.gate.wait(30)
        status, content = server.behave(caption, turn)
        content = content(caption) if callable(content) else content
        if status == "hang up" or (status == "slow" and server.end.wait(30)):
            return
        if isinstance(content, dict):
            message = {"role": "assistant", "content": json.dumps(content)}
            content = json.dumps({"choices": [{"index": 0, "message": message}]})
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.lock, made.gate, made.end = threading.Lock(), threading.Event(), threading.Event()
    made.asked = []
    made.gate.set()
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    monkeypatch.setattr("negatives.PAUSE", 0.01)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.end.set()
    made.shutdown()
    made.server_close()


def good(caption, **more):
    """A good answer for captions of DOGS."""
    spots = re.search("with (.*) spots", caption)[1]
    return {
        "relation": caption.replace(" on ", " under "),
        "attribute": caption.replace(spots, "yellow"),
        "object": caption.replace("dog", "cat"),
        "action": None,
        **more,
    }


def ask(server, tmp_path, *options, captions=DOGS):
    rows = [{"caption": caption, "image_id": i} for i, caption in enumerate(captions)]
    path, out = manifest(tmp_path, rows), tmp_path / "out"
    model = ["--engine", "llm", "--llm", server.url, "--llm-model", "m", "--fallback", "null"]
    main([str(path), "--out", str(out), *model, *options])
    return [row["negatives"] for row in records(out)]


def wrapped(text):
    return json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.mark.parametrize(
    "fault",
    [
        (429, "slow down"),
        (500, "broken"),
        (200, "<html>"),
        (200, '{"choices": []}'),
        ("hang up", ""),
        ("slow", ""),
        (200, wrapped("```json\nnot json\n```")),
        (200, wrapped('["relation"]')),
        (200, good(DOGS[0], invented="x")),
        (200, lambda caption: good(caption, relation=caption, attribute=caption.upper(), object=5)),
    ],
)
def test_servers_that_fail_or_lie_once_are_asked_again(server, tmp_path, fault):
    server.behave = lambda caption, turn: fault if turn == 1 else (200, good(caption))
    seconds = "1" if fault[0] == "slow" else "60"
    for row, caption in zip(ask(server, tmp_path, "--llm-timeout", seconds), DOGS, strict=True):
        assert row == good(caption)
    assert len(server.asked) == 2 * len(DOGS) or fault[0] == "slow"
    body = server.asked[0][3]
    assert (body["model"], body["temperature"], body["seed"]) == ("m", 0, 0)
    if fault[0] == 200 and len(server.asked[-1][3]["messages"]) > 1:
        assert "Not accepted: relation:" in server.asked[-1][3]["messages"][2]["content"]


def test_a_fence_is_read_and_lies_fall_back(server, tmp_path, monkeypatch, capsys):
    lies = {"relation": "A mat on a dog", "attribute": DOGS[1], "object": "A cat in a hat"}
    server.behave = lambda caption, turn: (200, wrapped("```json\n" + json.dumps(lies) + "\n```"))
    monkeypatch.setattr("negatives.contradicted", lambda c, n, o: "true" if "hat" in n else "")
    (row,) = ask(server, tmp_path, "--stats", captions=DOGS[1:2])
    assert row == dict.fromkeys(NEGATIVE_TYPES)
    assert "null: it changes more than one place" in capsys.readouterr().out
    again = ask(server, tmp_path, "--fallback", "lexicon", "--overwrite")[0]
    assert again["object"]
    assert json.loads((tmp_path / "out").read_text().splitlines()[0])["fallback"] == "lexicon"


def test_a_refusal_is_one_sentence_without_the_key(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "sk-12345")
    server.behave = lambda caption, turn: (401, "bad key sk-12345")
    with pytest.raises(DataError, match=r"refuses a request \(401 bad key \*\*\*\)") as caught:
        ask(server, tmp_path, "--llm-key-env", "SECRET")
    assert "\n" not in str(caught.value)
    assert server.asked[0][:2] == ("/v1/chat/completions", "Bearer sk-12345")
    server.behave = lambda caption, turn: (503, "loading")
    with pytest.raises(DataError, match=r"gave no answer \(503 loading\); repeat the command"):
        ask(server, tmp_path, "--llm-key-env", "SECRET")
    server.asked.clear()
    server.behave = lambda caption, turn: (
        (404, "no m") if caption == DOGS[0] else (200, good(caption))
    )
    with pytest.raises(DataError, match=r"\(404 no m\); check the address, --llm-model"):
        ask(server, tmp_path, "--llm-key-env", "SECRET")
    server.behave = lambda caption, turn: (200, good(caption))
    ask(server, tmp_path, "--llm-key-env", "SECRET")  # the other answers were kept
    assert sorted(seen[2] for seen in server.asked) == sorted([*DOGS, DOGS[0]])
    assert b"12345" not in (tmp_path / "out").read_bytes()
    with pytest.raises(DataError, match="--llm-key-env NONE: the environment has no such key"):
        ask(server, tmp_path, "--llm-key-env", "NONE", "--overwrite")
    server.url = "localhost:8000"
    with pytest.raises(DataError, match="want a URL like http://localhost:8000/v1"):
        ask(server, tmp_path, "--overwrite")


def test_a_stopped_run_asks_nothing_twice(server, tmp_path):
    """Ctrl-C while two answers are under way: they are kept, and nobody is asked again."""
    server.behave = lambda caption, turn: (200, good(caption))
    rows = [{"caption": caption} for caption in DOGS]
    path, out = manifest(tmp_path, rows), tmp_path / "out"
    options = [path, "--out", out, "--engine", "llm", "--llm", server.url, "--llm-model", "m"]
    options += ["--llm-requests", "2", "--fallback", "null"]
    server.gate.clear()
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(server.asked) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "waiting for 2 answers" in process.stderr.readline()
    server.gate.set()
    assert process.wait() == 130
    assert len(server.asked) == 2
    assert start(*options).returncode == 0
    assert sorted(seen[2] for seen in server.asked) == sorted(DOGS)
    assert [row["negatives"] for row in records(out)] == [good(caption) for caption in DOGS]

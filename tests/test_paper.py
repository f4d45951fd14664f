"""The scripts of scripts/paper: downloads on loopback, training and tables in a short form."""

import hashlib
import http.server
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import fork_python
import pytest
import torch
from PIL import Image

import data
import evaluate
import train

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "scripts" / "paper"
SCRIPTS = sorted(PAPER.glob("*.sh"))
COLUMNS = ("of", "name", "url", "bytes", "checksum", "how", "into", "gives", "licence", "steps")


def bash(name, *args, **env):
    """Run a script of scripts/paper from another folder, with these variables."""
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
    fixed = {"PYTHON": sys.executable, "GPUS": "0", "OMP_NUM_THREADS": "1"}
    env = {**keep, **fixed, **{key: str(value) for key, value in env.items()}}
    command = ["bash", str(PAPER / name), *args]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)


def read_rows(path=PAPER / "downloads.tsv"):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines]


def stand_in(row):
    """A small file that unpacks into what the table says the real one gives."""
    inside = os.path.relpath(row["gives"], row["into"])
    inside = f"{'.' if inside == '.' else inside}/1.jpg" if "." not in inside[1:] else inside
    text = f"stand-in of {row['name']}".encode() * 40
    if row["how"] == "file":
        return text
    file = io.BytesIO()
    if row["how"] in ("zip", "flat"):
        with zipfile.ZipFile(file, "w") as out:
            out.writestr(f"deep/{inside}" if row["how"] == "flat" else inside, text)
    else:
        inside = f"top/{inside}" if row["how"] == "repository" else inside
        with tarfile.open(fileobj=file, mode="w:gz") as out:
            info = tarfile.TarInfo(inside)
            info.size = len(text)
            out.addfile(info, io.BytesIO(text))
    return file.getvalue()


class Mirror(http.server.ThreadingHTTPServer):
    """Serves bytes by path on loopback, with ranges; `tear` cuts one path off once, in half."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.tear = {}, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        mirror = self.server
        mirror.asked.append((self.path, self.headers.get("Range")))
        body = mirror.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = len(body)
        if self.path == mirror.tear:
            mirror.tear, stop = None, len(body) // 2
        self.wfile.write(body[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path):
    """A mirror of stand-ins for the whole table, and the table with their sizes and checksums."""
    server = Mirror()
    rows = read_rows()
    for row in rows:
        if row["how"] == "form":
            continue
        body = stand_in(row)
        server.files["/" + row["url"].split("://")[1]] = body
        row["bytes"] = str(len(body)) if row["bytes"] != "-" else "-"
        if row["checksum"] != "-":
            kind = row["checksum"].split(":")[0]
            row["checksum"] = f"{kind}:{hashlib.new(kind, body).hexdigest()}"
    server.rows, server.table = rows, tmp_path / "downloads.tsv"
    server.table.write_text("\n".join("\t".join(row.values()) for row in rows) + "\n")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(mirror, root, *names):
    return bash("data.sh", *names, ROOT=root, BASE_URL=mirror.url, DOWNLOADS=mirror.table)


def test_every_group_is_fetched_once_into_the_layout_of_list(mirror, tmp_path):
    root = tmp_path / "my data"
    groups = sorted({name for row in mirror.rows for name in row["of"].split(",")})
    first = get(mirror, root, *groups)
    assert first.returncode == 0, first.stderr
    for row in mirror.rows:
        if row["how"] == "form":
            quoted = str(root).replace(" ", "\\ ")  # exact steps, as a shell reads them
            assert row["steps"].replace("ROOT", quoted) in first.stdout
        else:
            assert (root / row["gives"]).exists(), row["name"]
        assert row["licence"] in first.stdout.split("to fetch:")[0]
    assert not any((root / "downloads").iterdir())
    asked = len(mirror.asked)
    assert asked == sum(row["how"] != "form" for row in mirror.rows)
    second = get(mirror, root, *groups)
    assert second.returncode == 0
    assert len(mirror.asked) == asked  # a second run fetches nothing
    assert "to fetch: 0.00 GB" in second.stdout


@pytest.mark.parametrize("name", ["val2017.zip", "caption_datasets.zip", "visual7w_images.zip"])
def test_a_torn_download_goes_on_in_the_middle(mirror, tmp_path, name):
    row = next(row for row in mirror.rows if row["name"] == name)
    path = "/" + row["url"].split("://")[1]
    mirror.tear = path
    group = row["of"].split(",")[0]
    torn = get(mirror, tmp_path, group)
    assert torn.returncode == 2
    half = len(mirror.files[path]) // 2
    assert f"cut off after {half} bytes" in torn.stderr
    again = get(mirror, tmp_path, group)
    assert again.returncode == 0, again.stderr
    assert [asked for asked in mirror.asked if asked[0] == path][1:] == [(path, f"bytes={half}-")]
    assert (tmp_path / row["gives"]).exists()


@pytest.mark.parametrize("fault", ["checksum", "size", "layout", "gone", "page", "torn"])
def test_a_wrong_file_is_refused_and_kept(mirror, tmp_path, fault):
    row = next(row for row in mirror.rows if row["name"] == "val2017.zip")
    path = "/" + row["url"].split("://")[1]
    right = mirror.files.pop(path)
    other = stand_in({**row, "gives": "elsewhere"})
    if fault in ("layout", "page", "torn"):  # published nowhere: what it holds is still looked at
        mirror.rows[mirror.rows.index(row)].update(bytes="-", checksum="-")
        mirror.table.write_text("\n".join("\t".join(x.values()) for x in mirror.rows) + "\n")
    if fault != "gone":
        wrong = {"checksum": right[:-1] + b"?", "size": right + b"?", "layout": other}
        wrong |= {"page": b"<!DOCTYPE html>\n" + right, "torn": right[: len(right) // 2]}
        mirror.files[path] = wrong[fault]
    done = get(mirror, tmp_path, "whatsup")
    said = {"checksum": "its md5 is not", "size": f"has {len(right) + 1} bytes, not {len(right)}"}
    said |= {"layout": "holds no val2017", "gone": "404"}
    said |= {"page": "is a web page", "torn": "cannot be unpacked"}
    assert done.returncode == 2
    assert said[fault] in done.stderr
    assert not (tmp_path / "val2017").exists()
    if fault in ("checksum", "size", "page", "torn"):
        assert (tmp_path / "downloads" / "val2017.zip.wrong").read_bytes() == mirror.files[path]
        mirror.files[path] = right
        assert get(mirror, tmp_path, "whatsup").returncode == 0


def test_unpacking_that_was_cut_off_is_done_again(mirror, tmp_path):
    for name in ("val2017", "downloads"):
        (tmp_path / name).mkdir()
    (tmp_path / "downloads" / "val2017.zip.unpacking").touch()
    assert get(mirror, tmp_path, "whatsup").returncode == 0
    assert (tmp_path / "val2017" / "1.jpg").exists()


def test_dry_run_prints_commands_and_fetches_nothing(mirror, tmp_path):
    done = bash("data.sh", "--dry-run", "coco", ROOT=tmp_path / "data", BASE_URL=mirror.url)
    assert done.returncode == 0, done.stderr
    plan = done.stdout
    assert "train2014.zip: 13.51 GB" in plan
    assert f"{mirror.url}/images.cocodataset.org/zips/train2014.zip" in plan
    assert "md5:0da8c0bd3d6becc4dcb32757491aca88" in plan
    assert "'unzip'" in plan
    assert not mirror.asked
    assert not (tmp_path / "data").exists()


def test_an_unknown_group_names_those_that_are_known():
    done = bash("data.sh", "cocoa")
    assert done.returncode == 2
    assert len(set(done.stderr.split())) == len(done.stderr.split())  # each is named once
    assert "cocoa: is none of: aro bivlc cc3m coco coco2017 cola" in done.stderr


def test_shell_scripts_are_few_and_hold_no_numbers():
    assert sum(len(path.read_text().splitlines()) for path in SCRIPTS) <= 400
    for path in SCRIPTS:
        assert path.read_text().splitlines()[1].startswith("# "), path
        numbers = re.findall(r"(?<![\w$.{-])\d{2,}(?![\w.}])", re.sub(r"#.*", "", path.read_text()))
        assert set(numbers) <= {"22", "33", "143"}, (path, numbers)  # of curl, of SIGTERM


@pytest.fixture(scope="module")
def tables():
    """scripts/make_tables.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("make_tables")


def cell(value, half=2.0, scored=1000, expected=1000):
    bounds = {"low": value - half, "high": value + half}
    return {"accuracy": value, **bounds, "scored": scored, "expected": expected, "ties": 0}


def results_of(model="ViT-B-32-quickgelu", suite="sugarcrepe", **labels):
    """What evaluate.py writes, with one row of SugarCrepe for each label."""
    empty = {"averages": {}, "costs": {}}
    made = {
        label: {"model": model, "suites": {suite: {"subsets": rows, **empty}}}
        for label, rows in labels.items()
    }
    return {label.replace("-seed-", " seed "): result for label, result in made.items()}


def verdicts(tables, results, *labels):
    records = tables.judge_table("table3", "coco", results, list(labels))
    return {(x["name"], x["row"]): x for x in records}


# CE-CLIP, replace_rel: 79.0 (paper), 81.15 (vl_compo), 81.2 (READ-CLIP) ...; half an interval of 2
# gives a tolerance of 2 times the root of 2 and 0.05, 2.88.
@pytest.mark.parametrize(
    ("name", "ours", "verdict"),
    [
        ("released weights", 79.0, "within"),
        ("released weights", 76.2, "within"),
        ("released weights", 76.1, "OUTSIDE"),
        ("released on released negatives", 90.0, "OUTSIDE"),
        ("released", 90.0, "shown"),  # on other negatives
        ("ce-clip", 76.2, "within"),
        ("ce-clip", 76.1, "OUTSIDE"),
        ("ce-clip", 90.0, "within"),  # what is repaired may be better
        ("clip", 10.0, "shown"),  # by a protocol that is not known
    ],
)
def test_a_figure_is_held_to_the_interval_of_both(tables, name, ours, verdict):
    results = results_of(**{name: {"replace_rel": cell(ours)}})
    found = verdicts(tables, results, name)[name, "replace_rel"]
    assert found["verdict"] == verdict
    assert found["tolerance"] == pytest.approx(2 * 2**0.5 + 0.05)
    assert found["paper"] == (None if name == "clip" else 79.0)
    assert found["difference"] == pytest.approx(ours - (73.8 if name == "clip" else 79.0))


def test_the_control_that_the_paper_lacks_is_shown(tables):
    found = verdicts(tables, {}, "clip")
    assert found["clip", "swap_obj"]["independent"] == {"SugarCrepe, issue 3": 68.3}


def test_what_was_not_run_or_in_part_stays_so(tables):
    rows = {"replace_rel": cell(10, scored=9), "swap_obj": cell(72.8)}
    found = verdicts(tables, results_of(**{"ce-clip": rows}), "ce-clip", "CLIP")
    assert found["ce-clip", "replace_rel"]["verdict"] == "9 of 1000 items, not judged"
    assert found["ce-clip", "swap_obj"]["verdict"] == "within"
    assert found["ce-clip", "add_att"]["verdict"] == "not run"
    assert found["CLIP", "add_att"]["ours"] is None
    text = tables.judgement(list(found.values()))
    assert "not run" in text


@pytest.mark.parametrize("labels", [("ce-clip", "base"), ("ce-clip",)])
def test_another_model_or_start_is_only_shown(tables, labels):
    model = "ViT-B-32-quickgelu" if "base" in labels else "RN50"
    results = results_of(model, **{name: {"replace_rel": cell(10)} for name in labels})
    assert verdicts(tables, results, *labels)["ce-clip", "replace_rel"]["verdict"] == "shown"


def test_seeds_join_their_interval_with_that_of_the_items(tables):
    seeds = (80.0, 82.0, 84.0)
    results = results_of(
        **{f"ce-clip-seed-{s}": {"replace_rel": cell(x)} for s, x in enumerate(seeds)}
    )
    found = verdicts(tables, results, *results)["ce-clip", "replace_rel"]
    student = 4.30 * 2.0 / 3**0.5  # t for 2 degrees of freedom, the deviation of the three is 2
    assert found["ours"] == 82.0
    assert found["high"] - 82.0 == pytest.approx((2.0**2 + student**2) ** 0.5)
    assert found["seeds"] == list(seeds)


@pytest.mark.parametrize(("ours", "code"), [(79.0, 0), (10.0, 1)])
def test_a_row_outside_ends_with_one_and_a_record(tables, tmp_path, capsys, ours, code):
    path, record = tmp_path / "results.json", tmp_path / "record.json"
    path.write_text(json.dumps(results_of(**{"ce-clip": {"replace_rel": cell(ours)}})))
    with pytest.raises(SystemExit) as stop:
        tables.main(["--judge", "table3", "--results", str(path), "--labels", "ce-clip",
                     "--record", str(record)])  # fmt: skip
    assert stop.value.code == code
    kept = json.loads(record.read_text())
    assert kept["count"]["OUTSIDE"] == code
    assert kept["count"]["not run"] == len(kept["rows"]) - 1
    assert kept["made"]["ce-clip"]["model"] == "ViT-B-32-quickgelu"
    assert tables.RULE in capsys.readouterr().out


def test_figure_5_is_held_to_its_curves_by_epoch(tables):
    labels = ["fixed-2 epoch 01", "ce-clip epoch 05", "cap-15 epoch 05", "cap-15 epoch 04"]
    records = tables.judge_table("figure5", "coco", {}, labels)
    assert [(x["name"], x["paper"]) for x in records] == [
        *[("fixed-2 epoch 01", 73.2), ("ce-clip epoch 05", 80.7), ("cap-15 epoch 05", 79.4)],
    ]


def test_every_recipe_is_held_to_a_published_model(tables):
    figure = evaluate.read_table("published")["figure5"]
    assert set(recipe_names()) <= {*tables.ROWS, *figure["a"], *figure["c"]}
    published = evaluate.read_table("published")
    models = {line["model"] for suite in evaluate.PAPER for line in published[suite]}
    assert {x[0] for x in tables.ROWS.values() if isinstance(x, list)} <= models


def recipe_names():
    """The recipes of the paper's tables; the others belong to the shapes world."""
    rows = [line.split("\t") for line in (PAPER / "recipes.tsv").read_text().splitlines()[1:]]
    return [name for name, tables, *_ in rows if tables not in ("-", "kinds")]


# No leak: training images that stand in a test.


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("train2017/000000391895.jpg", "val2014/COCO_val2014_000000391895.jpg", True),
        ("000000391895.jpg", "COCO_train2014_000000391895.jpg", True),
        ("vg/VG_100K/2315.jpg", "visual7w/v7w_2315.jpg", True),
        ("vg/VG_100K_2/2315.jpg", "aro/images/2315.jpg", True),
        ("val2017/000000391895.jpg", "visdial/VisualDialog_val2018_000000391895.jpg", False),
        ("val2017/000000391895.jpg", "val2017/000000391896.jpg", False),
        ("cc3m/00000/000391895.jpg", "000000391895.jpg", False),
    ],
)
def test_a_photo_has_one_number_wherever_it_stands(one, two, same):
    assert (data.photo_number(one) == data.photo_number(two)) is same


def test_the_test_images_that_the_kit_knows():
    known = {name: len(ids) for name, ids in data.test_photos().items()}
    assert known == {
        "retrieval and aro: COCO, Karpathy's test split": 5000,
        **{"sugarcrepe": 1560, "sugarcrepe_pp": 1542, "valse: coreference-standard": 708},
        **{"valse: foil-it": 936, "valse: plurals": 803, "valse: relations": 486},
        "whatsup and negbench: val2017, 2585 of its 5000": 2585,
    }
    assert all(len(set(ids)) == len(ids) for ids in data.test_photos().values())
    sets = {name: set(ids) for name, ids in data.test_photos().items()}
    assert sets["sugarcrepe_pp"] < sets["sugarcrepe"]
    assert data.photo_number("val2014/COCO_val2014_000000391895.jpg") in next(iter(sets.values()))


KARPATHY_TEST, SUGARCREPE = 391895, 85329  # both are the first of their official files


def photo_folder(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 32), 60 + i).convert("RGB").save(folder / name)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A run on two photos, one of them of Karpathy's test split, and a root with both."""
    root = tmp_path_factory.mktemp("leaky")
    tested = f"COCO_val2014_{KARPATHY_TEST:012d}.jpg"
    names = [f"val2014/{tested}", "train2014/COCO_train2014_000000000009.jpg"]
    photo_folder(root, names)
    negatives = dict.fromkeys(("relation", "attribute", "object", "action"), "A cat.")
    rows = [
        {"image": name, "image_id": k, "caption": f"A dog {word}.", "negatives": negatives}
        for k, name in enumerate(names)
        for word in ("runs", "sits")
    ]
    write_lines(root / "train.jsonl", rows)
    test = [{"image": name, "caption": ["A dog.", "A dog runs."]} for name in names]
    (root / "karpathy").mkdir()
    (root / "karpathy/coco_karpathy_test.json").write_text(json.dumps(test))
    return root


def test_check_says_how_many_training_images_are_tested(leaky, capsys):
    data.main(["check", str(leaky / "train.jsonl"), "--images", str(leaky)])
    assert "1 of 5000 test images of retrieval and aro: COCO" in capsys.readouterr().out
    photo_folder(leaky, ["x.png"])
    write_lines(leaky / "none.jsonl", [{"image": "x.png", "caption": "A dog.", "negatives": {}}])
    data.main(["check", str(leaky / "none.jsonl"), "--images", str(leaky)])
    assert "no test image that the kit knows" in capsys.readouterr().out


def test_a_run_knows_its_images_and_evaluation_shows_the_overlap(leaky, capsys):
    options = f"--data {leaky}/train.jsonl --images {leaky} --model shapes-tiny --batch-size 2"
    run = f"{options} --steps 1 --workers 0 --device cpu --out {leaky}/run"
    assert train.main(run.split()) == 0
    said = capsys.readouterr().out
    assert "2 training images; among them: 1 of 5000 test images of retrieval and aro" in said
    # a run that starts from those weights has seen their images too
    write_lines(leaky / "other.jsonl", [
        {"image": "x.png", "caption": f"A {word}.", "negatives": {"object": "A cat."}}
        for word in ("dog", "cow")
    ])  # fmt: skip
    photo_folder(leaky, ["x.png"])
    second = f"--data {leaky}/other.jsonl --images {leaky} --pretrained {leaky}/run/latest.pt"
    more = "--model shapes-tiny --batch-size 1 --steps 1 --workers 0 --recipe negclip"
    assert train.main(f"{second} {more} --device cpu --out {leaky}/two".split()) == 0
    assert "3 training images; among them: 1 of 5000" in capsys.readouterr().out
    evaluate.main(f"--ckpt {leaky}/two/latest.pt --suite retrieval --root {leaky} --allow-missing "
                  f"--device cpu --out {leaky}/results".split())  # fmt: skip
    said = capsys.readouterr().out
    results = json.loads((leaky / "results/results.json").read_text())
    costs = next(iter(results.values()))["suites"]["retrieval"]["costs"]
    assert costs["COCO image to text R@1"]["seen"] == 2
    assert costs["COCO text to image R@1"]["seen"] == 4
    assert ", 2 seen" in said
    assert "6 items show one of its 3 training images" in said


def test_photos_of_visual_genome_are_known_by_cocos_number(tmp_path):
    (tmp_path / "vg").mkdir()
    table = [{"image_id": 7, "coco_id": KARPATHY_TEST, "url": "http://x/VG_100K/7.jpg"}]
    table += [{"image_id": 8, "coco_id": None, "url": "http://x/VG_100K_2/8.jpg"}]
    (tmp_path / "vg/image_data.json").write_text(json.dumps(table))
    regions = [{"id": k, "regions": [{"phrase": f"dog {k}"}]} for k in (7, 8)]
    (tmp_path / "vg/region_descriptions.json").write_text(json.dumps(regions))
    data.main(["vg", str(tmp_path / "vg"), "--out", str(tmp_path / "vg.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "vg.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["VG_100K_2/8.jpg"]  # the other is a test image
    item = evaluate.TestItem(("s",), "0", ("aro/images/7.jpg",), ("a", "b"))
    suite = evaluate.Suite("aro", [item], [], {}, [])
    photos = torch.tensor([data.photo_number(f"{KARPATHY_TEST:012d}.jpg")])
    result = {"subsets": {"s": {}}, "costs": {}}
    evaluate.script("suites").mark_seen(result, suite, photos, tmp_path)
    assert result["subsets"]["s"]["seen"] == 1
    evaluate.script("suites").mark_seen(result, suite, photos, tmp_path / "no")
    assert result["subsets"]["s"]["seen"] == 0


@pytest.mark.parametrize(
    ("splits", "kept"),
    [(None, ["a", "b"]), (["test"], ["d"]), (["train", "val"], ["a", "c"])],
)
@pytest.mark.parametrize("command", ["karpathy", "flickr30k"])
def test_a_karpathy_file_gives_its_training_splits_only(tmp_path, command, splits, kept):
    images = [
        {"filepath": "x", "filename": f"{name}.jpg", "cocoid": k, "split": split,
         "sentences": [{"raw": name}]}
        for k, (name, split) in enumerate(
            [("a", "train"), ("b", "restval"), ("c", "val"), ("d", "test")]
        )
    ]  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    more = ["--splits", *splits] if splits else []
    data.main([command, str(tmp_path / "k.json"), "--out", str(tmp_path / "k.jsonl"), *more])
    rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == kept
    assert rows[0]["image"] == f"x/{kept[0]}.jpg"


@pytest.mark.parametrize("text", ['{"images": [{"split": "train"}]}', "{", None])
def test_what_is_no_karpathy_json_is_refused(tmp_path, text):
    if text:
        (tmp_path / "k.json").write_text(text)
    command = ["karpathy", str(tmp_path / "k.json"), "--out", str(tmp_path / "k.jsonl")]
    with pytest.raises(data.DataError, match="is not a Karpathy" if text else "cannot be read"):
        data.main(command)
    assert not (tmp_path / "k.jsonl").exists()


def test_images_with_captions_beside_them_are_a_source(tmp_path):
    photo_folder(tmp_path / "cc", ["00000/000000001.jpg", "00000/000000002.jpg"])
    (tmp_path / "cc/00000/000000001.txt").write_text("A dog runs.\n")
    data.main(["cc3m", str(tmp_path / "cc"), "--out", str(tmp_path / "cc.jsonl")])
    (row,) = [json.loads(line) for line in (tmp_path / "cc.jsonl").read_text().splitlines()]
    assert (row["image"], row["caption"]) == ("00000/000000001.jpg", "A dog runs.")


# The scripts themselves, in a short form.


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A PYTHON for the scripts that has imported torch already."""
    folder = tmp_path_factory.mktemp("python")
    address, path = folder / "socket", folder / "python"
    path.write_text(fork_python.client(str(address)))
    path.chmod(0o755)
    command = [sys.executable, fork_python.__file__, str(address)]
    keep = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=keep, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        yield path
        server.terminate()


SHORT = {"TRAIN_OPTIONS": "--batch-size 4 --steps 2 --workers 0", "EVAL_OPTIONS": "--no-blind"}
VISION = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The config of a model that is written and read in no time."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}))
    return path


@pytest.fixture(scope="module")
def shapes(python, tiny, tmp_path_factory):
    """Variables of a short run in the shapes world, and where its runs are."""
    out = tmp_path_factory.mktemp("shapes")
    return {"WORLD": "shapes", "OUT": out, "PYTHON": python, "MODEL": tiny, **SHORT, "SEEDS": "0 1"}


# Stands for the trainer: notes its options and leaves a checkpoint; others are real.
RECORDER = """#!/bin/bash
if [ "$1" != train.py ]; then exec "$REAL" "$@"; fi
echo "${*:2}" >> "$CALLS"
while [ "$1" != --out ]; do shift; done
mkdir -p "$2" && touch "$2/latest.pt"
"""


@pytest.fixture
def recorder(tmp_path, tiny):
    """Variables of scripts whose runs are only noted, in tmp_path/calls."""
    path = tmp_path / "recorder"
    path.write_text(RECORDER)
    path.chmod(0o755)
    env = {"WORLD": "shapes", "PYTHON": path, "REAL": sys.executable, "MODEL": tiny, **SHORT}
    return {**env, "OUT": tmp_path / "out", "CALLS": tmp_path / "calls", "SEEDS": "0"}


def test_every_recipe_is_run_once_from_the_same_base(recorder):
    names, out = ["base", *recipe_names()], recorder["OUT"]
    done = bash("train.sh", *names[1:], **recorder)
    assert done.returncode == 0, done.stderr
    calls = recorder["CALLS"].read_text().splitlines()
    runs = {args.out: args for args in (train.parse_args(call.split()) for call in calls)}
    assert len(calls) == len(runs) == len(names)
    for name in names:
        args = runs[out / f"{name}.0"]
        assert args.pretrained == (None if name == "base" else f"{out}/base.0/latest.pt")
        args.pretrained = None  # it is empty
        train.check_args(args, train.Rank(0, 1, "cpu"))
    again = bash("train.sh", *names[1:], **recorder)
    wanted = [f"{name}.0: {out}/{name}.0 is done" for name in names]
    assert sorted(again.stdout.splitlines()) == sorted(wanted)


def test_a_table_has_mean_and_interval_over_seeds(shapes):
    env = {**shapes, "RECIPES": "ce-clip"}
    done = bash("table4.sh", **env)
    assert done.returncode == 0, done.stderr
    record = json.loads((shapes["OUT"] / "table4/record.json").read_text())
    assert {row["name"] for row in record["rows"]} == {"base", "ce-clip"}
    assert all(len(row["seeds"]) == 1 + (row["name"] != "base") for row in record["rows"])
    before = (shapes["OUT"] / "table4/results.json").stat().st_mtime_ns
    again = bash("table4.sh", **env)
    assert again.stdout.splitlines()[-1] == f"record: {shapes['OUT']}/table4/record.json"
    assert (shapes["OUT"] / "table4/results.json").stat().st_mtime_ns == before


def test_figure_5_draws_and_scores_epochs(shapes):
    done = bash("figure5.sh", **{**shapes, "RECIPES": "ce-clip", "SEEDS": "0"})
    assert done.returncode == 0, done.stderr
    record = json.loads((shapes["OUT"] / "figure5" / "record.json").read_text())
    assert {row["name"] for row in record["rows"]} == {"ce-clip epoch 01"}
    assert (shapes["OUT"] / "figure5" / "thresholds.png").exists()


@pytest.fixture(scope="module")
def coco(python, tiny, tmp_path_factory):
    """A stand-in of COCO's layout with a few rows of some suites, and variables for it."""
    root = tmp_path_factory.mktemp("coco")
    names = [f"train2014/COCO_train2014_{k:012d}.jpg" for k in range(8)]
    tested = [f"val2017/{k:012d}.jpg" for k in (SUGARCREPE, 1)]
    photo_folder(root, [*names, *tested])
    images = [{"id": k, "file_name": name.split("/")[1]} for k, name in enumerate(names)]
    said = ("A man riding a brown horse on the beach.", "A red bus next to a white house.")
    captions = [{"image_id": k, "caption": text} for k in range(8) for text in said]
    for name in ("annotations", "karpathy", "sugarcrepe"):
        (root / name).mkdir()
    both = {"images": images, "annotations": captions}
    (root / "annotations/captions_train2014.json").write_text(json.dumps(both))
    test = [{"image": name, "caption": ["A dog.", "A dog runs."]} for name in tested]
    (root / "karpathy/coco_karpathy_test.json").write_text(json.dumps(test))
    row = {"filename": tested[0].split("/")[1], "caption": "a", "negative_caption": "b"}
    for name in evaluate.read_table("suites")["sugarcrepe"]["expected"]:
        (root / f"sugarcrepe/{name}.json").write_text(json.dumps({"0": row}))
    env = {"PYTHON": python, "ROOT": root, "OUT": root / "out", **SHORT, "ALLOW_MISSING": "1"}
    return {**env, "MODEL": tiny, "PRETRAINED": "", "RECIPES": "ce-clip"}


def test_all_prints_every_table_and_names_what_is_missing(coco):
    done = bash("all.sh", **coco)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sugarcrepe" in done.stdout
    assert "1 of 245 items, not judged" in done.stdout
    assert "left out: vl_checklist: none of its files" in done.stderr
    summary = done.stdout.split("== all\n")[1].splitlines()
    assert [line.split(":")[0] for line in summary] == [
        *("table1", "table2", "table3", "table4", "figure5", "general", "newer", "ce-clip-plus")
    ]
    assert summary[1].endswith("0 within, 0 OUTSIDE, 0 shown, 0 in part, 20 not run")
    assert summary[-1] == "ce-clip-plus: NOT RUN (exit code 2, see above)"
    assert "8 training images; among them: no test image" in done.stdout
    assert "base: 0 items show one of its 8 training images" in done.stdout


def test_what_is_missing_stops_a_table_unless_it_may_be(coco):
    done = bash("table2.sh", **{**coco, "ALLOW_MISSING": ""})
    assert done.returncode == 2
    assert "vl_checklist/data/Attribute/vg/action.json: cannot be read" in done.stderr


def test_ce_clip_plus_trains_on_three_sources(coco):
    root = coco["ROOT"]
    photo_folder(root, [f"cc3m/00000/{k:09d}.jpg" for k in range(4)])
    photo_folder(root, [f"vg/VG_100K/{k}.jpg" for k in range(1, 5)])
    for k in range(4):
        (root / f"cc3m/00000/{k:09d}.txt").write_text("A man riding a brown horse.")
    about = [{"image_id": k, "coco_id": None, "url": "x/VG_100K/1.jpg"} for k in range(1, 5)]
    regions = [{"id": k, "regions": [{"phrase": "a brown horse on grass"}]} for k in range(1, 5)]
    (root / "vg/image_data.json").write_text(json.dumps(about))
    (root / "vg/region_descriptions.json").write_text(json.dumps(regions))
    out = coco["OUT"].with_name("plus")
    done = bash("ce-clip-plus.sh", **{**coco, "OUT": out, "WEIGHTS": "2 1 1"})
    assert done.returncode == 0, done.stderr
    assert (out / "base.0/latest.pt").exists()  # for PRETRAINED is empty
    assert "16 training images" in done.stdout  # 8 of COCO, 4 and 4
    assert (out / "ce-clip-plus/record.json").exists()


@pytest.mark.parametrize(
    ("engine", "seeds", "folder", "label", "manifest"),
    [
        ("", "1", "ce-clip.1", "ce-clip", "train2014"),
        ("", "1 2", "ce-clip.1", "ce-clip seed 1", "train2014"),
        ("released", "1", "ce-clip-on-released.1", "ce-clip on released negatives",
         "train2014.released"),
    ],
)  # fmt: skip
def test_runs_have_names_of_their_own(engine, seeds, folder, label, manifest):
    show = f'. {PAPER}/common.sh; folder ce-clip 1; label ce-clip 1; echo "$manifest"'
    env = {"PATH": os.environ["PATH"], "ENGINE": engine, "SEEDS": seeds, "OUT": "o"}
    said = subprocess.check_output(["bash", "-c", show], env=env, text=True)
    assert said.splitlines() == [f"o/{folder}", label, f"data/negatives/{manifest}.jsonl"]


@pytest.mark.parametrize(
    ("script", "env", "message"),
    [
        ("table1.sh", {"WORLD": "mars"}, "WORLD=mars: is neither coco nor shapes"),
        ("table1.sh", {"SPLIT": "test"}, "SPLIT=test: is none of train2014"),
        ("train.sh", {}, "name recipes: base clip negclip"),
        ("train.sh recip", {}, "recip: is not in recipes.tsv"),
        ("train.sh c.*", {}, "c.*: is not in recipes.tsv, which has base clip negclip"),
        ("table3.sh", {"GPUS": "all"}, "GPUS=all: is no number of processes"),
        ("table3.sh", {"RELEASED": "no.pt"}, "RELEASED=no.pt: no such checkpoint"),
        ("table4.sh", {"WORLD": "shapes", "ENGINE": "released"}, "leave ENGINE out"),
        ("ce-clip-plus.sh", {"WORLD": "shapes"}, "needs photos"),
        ("ce-clip-plus.sh", {"WEIGHTS": "2 1"}, "wants one each for COCO, CC3M, VG"),
    ],
)
def test_a_mistake_is_one_sentence(script, env, message):
    done = bash(*script.split(), **env)
    assert done.returncode == 2
    assert message in done.stderr


SRUN = """#!/usr/bin/env bash
if [ -f "$STOP" ]; then rm "$STOP"; exit 143; fi  # as train.py ends that had to stop and saved
pids=() code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NODELIST=127.0.0.1 "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""


@pytest.fixture
def slurm(tmp_path, recorder):
    """Run train.slurm with stand-ins of srun (local processes) and scontrol (writes its call)."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/bash\necho "$*" >> "$QUEUE"\n'}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def submit(tasks, **env):
        # sbatch's own script stands for a task too
        job = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": "7", "SLURM_NTASKS": tasks}
        job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "STOP": tmp_path / "stop"}
        job |= {"QUEUE": tmp_path / "queue", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        return bash("train.slurm", "negclip", **{**recorder, **job, **env})

    return submit


def test_a_job_that_was_stopped_goes_back_into_the_queue_and_continues(slurm, tmp_path):
    (tmp_path / "stop").touch()
    for code in (143, 0):
        assert slurm(1).returncode == code
        assert (tmp_path / "queue").read_text() == "requeue 7\n"
    assert (tmp_path / "out/negclip.0/latest.pt").exists()


def test_two_tasks_of_a_job_are_one_run_and_an_error_is_not_queued(slurm, tmp_path, python):
    done = slurm(2, PYTHON=python)
    assert done.returncode == 0, done.stderr
    assert "2 steps of 4 on 2 x cpu" in done.stdout
    done = slurm(1, PYTHON=python, TRAIN_OPTIONS="--batch-size 0")
    assert done.returncode == 2
    assert not (tmp_path / "queue").exists()


@pytest.mark.parametrize("script", ["all.sh", "table4.sh", "train.sh clip"])
def test_a_signal_to_the_script_alone_stops_what_it_started(script, tmp_path):
    os.mkfifo(tmp_path / "started")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\necho $$ > {tmp_path}/started\nexec sleep 600\n")
    python.chmod(0o755)
    keep = {"PATH": os.environ["PATH"], "WORLD": "shapes", "OUT": tmp_path / "out", "GPUS": "0"}
    keep["SEEDS"] = "0"  # else runs start side by side
    command = ["bash", str(PAPER / script.split()[0]), *script.split()[1:]]
    with subprocess.Popen(command, env={**keep, "PYTHON": python}) as run:
        child = int((tmp_path / "started").read_text())
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_karpathys_split_trains_on_no_test_image(coco):
    root = coco["ROOT"]
    photo_folder(root, [f"val2014/COCO_val2014_{k:012d}.jpg" for k in (21, 22)])
    text = "A man riding a brown horse on the beach."
    images = [
        {"filepath": f"{pool}2014", "filename": f"COCO_{pool}2014_{k:012d}.jpg", "cocoid": k,
         "split": split, "sentences": [{"raw": text}]}
        for pool, split, k in (("train", "train", 0), ("val", "restval", 21), ("val", "test", 22))
    ]  # fmt: skip
    (root / "karpathy/dataset_coco.json").write_text(json.dumps({"images": images}))
    done = bash("negatives.sh", **{**coco, "SPLIT": "karpathy"})
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (root / "negatives/karpathy.jsonl").read_text().splitlines())
    names = [row["image"] for row in rows if "manifest" not in row]
    assert names == [
        "train2014/COCO_train2014_000000000000.jpg",
        "val2014/COCO_val2014_000000000021.jpg",
    ]
    assert "all 2 " in done.stdout
    again = bash("negatives.sh", **{**coco, "SPLIT": "karpathy"})
    assert (again.returncode, again.stdout) == (0, "")


def test_the_plan_of_everything_can_be_read(tmp_path):
    groups = sorted({name for row in read_rows() for name in row["of"].split(",")})
    done = bash("data.sh", "--dry-run", *groups, "suites", ROOT=tmp_path / "data")
    assert done.returncode == 0, done.stderr
    for suite, info in evaluate.read_table("suites").items():
        if suite != "shapes" and suite not in groups:
            assert f"{suite}: by hand; licence: {info['licence']}" in done.stdout
            assert info["where"] in done.stdout
    assert not (tmp_path / "data").exists()

"""What the README promises is there: its files, its links, its flags; imports flow one way."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import evaluate
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OURS = {"train", "evaluate", "data", "losses", "negatives"}
MAY_IMPORT = {
    **{"train": OURS - {"train"}, "evaluate": {"data", "negatives"}},
    **{"data": {"negatives"}, "losses": set(), "negatives": set()},
}


def test_imports_flow_one_way():
    for name, allowed in MAY_IMPORT.items():
        tree = ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
        found = set()
        for node in tree:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
        assert found & OURS <= allowed, name


def test_links_and_named_files_exist():
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if not x.startswith("http")]
    files = re.findall(r"`((?:scripts|tests)/[\w.-]+|\w+\.py)`", README)
    assert links
    for name in [*links, *files]:
        assert (ROOT / name).exists(), name


def test_flags_of_the_readme_exist():
    files = [*(ROOT / f"{name}.py" for name in OURS), *(ROOT / "scripts").glob("*.py")]
    sources = "".join(file.read_text() for file in files)
    known = set(re.findall(r'"(--[a-z-]+)"', sources)) | {"--nproc_per_node"}
    known |= {"--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README))
    assert used
    assert used <= known, used - known


def test_every_metric_is_explained():
    glossary = README.split("## Metrics")[1].split("\n## ")[0]
    keys = {"step", "epoch", "loss", "itc", "imc", "cmr", "lr", "logit_scale", "grad_norm"}
    keys |= {"applied", "images_per_second", "text_tokens_per_second", "memory_mib", "bad_images"}
    source = Path(train.__file__).read_text() + (ROOT / "losses.py").read_text()
    for key in keys:
        assert f'"{key}"' in source, key
        assert f"`{key}`" in glossary, key
    assert "`threshold_" in glossary


def test_every_suite_is_named():
    assert all(suite in README for suite in evaluate.SUITES)


def test_a_table_without_end_loses_nothing(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts"))
    make_tables = importlib.import_module("make_tables")
    path = tmp_path / "R.md"
    text = "<!-- table: a.json shapes -->\nmine\n<!-- table: a.json shapes -->\n<!-- end -->\n"
    path.write_text(text)
    with pytest.raises(make_tables.DataError, match=r"R\.md:1: this table has no"):
        make_tables.main(["--file", str(path)])
    assert path.read_text() == text


@pytest.fixture
def reading(tmp_path):
    """The script, and a reading of eight captions with their marks."""
    sys.path.insert(0, str(ROOT / "scripts"))
    script = importlib.import_module("negatives_reading")
    for name in ("ours", "other"):
        rows = [
            {"image": f"{k:012}.jpg", "caption": f"Dog {k}", "negatives": {"object": f"{name} {k}"}}
            for k in range(8)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "reading"
    script.main(["sheets", str(tmp_path / "ours.jsonl"), "--against", str(tmp_path / "other.jsonl"),
                 "--out", str(out), "--items", "6", "--others", "4"])  # fmt: skip
    return script, out


def test_a_reading_hides_the_makers_and_counts_them(reading, tmp_path):
    script, out = reading
    key = json.loads((out / "key.json").read_text())
    sheet = (out / "object.txt").read_text().split("\n#")
    assert len(sheet) == len(key) == 10
    for k, item in enumerate(sheet):
        assert (f"sentence: {'ours' if key[f'object{k}'] == 'ours' else 'other'}") in item
    ours = [k for k in range(10) if key[f"object{k}"] == "ours"]
    (out / "object.marks").write_text(f"#{ours[0]}\todd|true\twhy\n#{ours[1]}\todd\n")
    script.main(["count", str(out), "--out", str(tmp_path / "r.json")])
    row = json.loads((tmp_path / "r.json").read_text())["object"]["ours"]
    assert row["read"] == 6
    assert [row[f"{x} %"][0] for x in ("mechanical", "odd", "true", "any")] == [0, 33.3, 16.7, 33.3]
    low, high = row["odd %"][1:]
    assert (low, high) == (9.7, 70.0)  # Wilson's interval of 2 out of 6


@pytest.mark.parametrize("line", ["1 odd", "#1 odd", "#1\tbad", "#99\todd"])
def test_a_wrong_mark_is_named(reading, line, capsys):
    script, out = reading
    (out / "object.marks").write_text(f"#0\todd\n{line}\n")
    with pytest.raises(SystemExit) as stop:
        script.main(["count", str(out)])
    assert stop.value.code == 2
    assert "object.marks, line 2: wanted #item" in capsys.readouterr().err


def test_a_mark_made_twice_counts_once(reading):
    script, out = reading
    (out / "object.marks").write_text("#0\todd\r\n#0\todd\tagain\r\n", "utf-8-sig")
    marks = script.read_marks(out / "object.marks", set(range(10)))
    assert marks == {0: {"odd"}}


@pytest.mark.parametrize("key", ["", "[]", '{"objectx": "ours"}', '{"object0": 5}'])
def test_a_wrong_key_is_refused(reading, key, capsys):
    script, out = reading
    (out / "key.json").write_text(key)
    with pytest.raises(SystemExit) as stop:
        script.main(["count", str(out)])
    assert stop.value.code == 2
    assert "key.json: not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"caption": "A dog", "negatives": {"object": "A cat"}}', "has no image"),
        ('{"caption": 5, "image": "a", "negatives": {}}', "want a record"),
        ("5", "is not a record"),
        ("{", "is not JSON"),
        ("", "no negatives in it"),
    ],
)
def test_what_is_no_record_of_negatives_is_refused(reading, line, message, tmp_path, capsys):
    script, _ = reading
    (tmp_path / "n.jsonl").write_text(line)
    with pytest.raises(SystemExit) as stop:
        script.main(["sheets", str(tmp_path / "n.jsonl"), "--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_two_makers_of_one_name_are_refused(reading, tmp_path, capsys):
    script, out = reading
    ours = str(out.parent / "ours.jsonl")
    with pytest.raises(SystemExit):
        script.main(["sheets", ours, "--against", ours, "--out", str(tmp_path / "new")])
    assert "two makers have one name" in capsys.readouterr().err


def test_only_photos_of_one_name_are_one(reading):
    script, _ = reading
    long = [{"image": f"{d}/a_long_name_00000001.jpg"} for d in "ab"]
    assert script.photo(long[0]) != script.photo(long[1])
    assert script.photo({"image": "val2014/COCO_val2014_000000391895.jpg"}) == "000000391895.jpg"
    assert script.photo({"image": None, "image_id": 1}) != script.photo({"image_id": 2})


def test_sheets_never_write_over_marks(reading, capsys):
    script, out = reading
    with pytest.raises(SystemExit) as stop:
        script.main(["sheets", str(out.parent / "ours.jsonl"), "--out", str(out)])
    assert stop.value.code == 2
    assert "it may hold marks" in capsys.readouterr().err

"""What the README promises is there: its files, its links, its flags; imports flow one way."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import evaluate

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
    files.append(ROOT / "scripts/train_options.json")
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
    files = ("train.py", "losses.py", "scripts/run_metrics.py")
    source = "".join((ROOT / file).read_text() for file in files)
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

"""Every command of README.md runs as printed, in order, from a fresh copy, on stand-in data.

What stands in: eight images with captions in COCO's layout; a tiny model under the printed name,
with random weights behind the tag openai; torchrun as one process with a small batch.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fork_python
import pytest
from PIL import Image

import evaluate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
CANNOT = {
    "bash scripts/quickstart.sh": "installs packages and trains for minutes",
    "bash scripts/test.sh": "runs this very test",
    "python3 -m venv .venv": "installs packages",
    "bash scripts/paper/data.sh": "downloads COCO",
}
MODEL = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PRELUDE = """
from pathlib import Path
import open_clip, open_clip.factory, torch
here = Path(__file__).parent
open_clip.add_model_config(here / "ViT-B-32-quickgelu.json")
torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), here / "openai.pt")
open_clip.factory.download_pretrained = lambda *args, **options: str(here / "openai.pt")
"""
TORCHRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec python "$@" --batch-size 4 --epochs 1 --workers 0
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh copy with stand-in data below data/."""
    root = tmp_path_factory.mktemp("readme") / "clone"
    hidden = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.partial")
    shutil.copytree(ROOT, root, ignore=hidden)
    names = [f"COCO_train2014_{k:012d}.jpg" for k in range(8)]
    for name in [*(f"data/train2014/{name}" for name in names), "data/val2017/1.jpg", "photo.jpg"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (len(name) * 7 % 255, 90, 20)).save(root / name)
    images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
    said = ("A man riding a brown horse on the beach.", "A red bus next to a white house.")
    captions = [{"image_id": k, "caption": text} for k in range(8) for text in said]
    (root / "data/annotations").mkdir()
    both = json.dumps({"images": images, "annotations": captions})
    (root / "data/annotations/captions_train2014.json").write_text(both)
    (root / "data/sugarcrepe").mkdir()
    info = evaluate.read_table("suites")["sugarcrepe"]
    row = {"filename": "1.jpg", "caption": "a red bus", "negative_caption": "a blue bus"}
    for name, count in info["expected"].items():
        rows = {str(k): {**row, "caption": f"a red bus {k}"} for k in range(count)}
        (root / f"data/sugarcrepe/{name}.json").write_text(json.dumps(rows))
    own = {"images": "1.jpg", "texts": ["a red bus", "a blue bus"], "subset": "colour"}
    (root / "my.jsonl").write_text(json.dumps(own) + "\n")
    (root / "photos").symlink_to(root / "data/val2017")
    (root / "my_loader.py").write_text(LOADER)
    (root / "my.tsv").write_text("filepath\ttitle\twrong\n1.jpg\ttwo dogs\tthree dogs\n")
    return root


LOADER = """
def load(root):
    yield {"images": "1.jpg", "texts": ["a red bus", "a blue bus"]}
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Run text by bash in a folder, where python has imported torch already."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "ViT-B-32-quickgelu.json").write_text(json.dumps(MODEL))
    (folder / "prelude.py").write_text(PRELUDE)
    address = folder / "socket"
    for name, text in (("python", fork_python.client(str(address))), ("torchrun", TORCHRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    command = [sys.executable, fork_python.__file__, str(address), str(folder / "prelude.py")]
    keep = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(text, cwd):
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=cwd,
            env={**keep, "PATH": path},
            capture_output=True,
            text=True,
        )

    with subprocess.Popen(command, env=keep, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        yield run
        server.terminate()


def commands(block):
    """The commands of a block, each with its continued lines."""
    return [line for line in re.split(r"(?<!\\)\n", block) if line.strip()]


def test_every_block_runs_in_order(clone, shell):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    pytest.importorskip("transformers", reason="pip install transformers")
    said = ""
    for language, block in BLOCKS:
        assert language in ("bash", "python"), block
        if language == "python":
            (clone / "block.py").write_text(block)
            block = "python block.py\n"
        for command in commands(block):
            if not command.startswith(tuple(CANNOT)):
                done = shell(command, clone)
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
                said += done.stdout
    assert "relation  A brown horse riding a man on the beach." in said
    assert "tensor([[" in said  # the scores of two captions
    assert (clone / "results/sugarcrepe/sugarcrepe.png").exists()
    assert (clone / "export/coco-transformers/model.safetensors").exists()


def test_what_cannot_run_here_is_printed_and_no_two_runs_share_a_folder():
    every = [
        command for language, block in BLOCKS if language == "bash" for command in commands(block)
    ]
    for start in CANNOT:
        assert any(command.startswith(start) for command in every), start
    folders = re.findall(r"--out (\S+)", README)
    assert len(folders) == len(set(folders)), folders

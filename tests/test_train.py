import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch

import data
import evaluate
import train

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "6", "--batch-size", "8", "--save-every", "1", "--log-every", "1"]


def start(*options, ranks=0):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [
        sys.executable,
        *(launch if ranks else []),
        str(ROOT / "train.py"),
        *map(str, options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def weights(run):
    return torch.load(run / "latest.pt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(*SHORT, "--out", whole).wait() == 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = start(*SHORT, "--out", cut)
        lines = 0
        while process.poll() is None and lines < (2 if code == -9 else 4):
            time.sleep(0.01)
            metrics = cut / "metrics.jsonl"
            lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        process.send_signal(number)
        assert process.wait() == code
    assert start(*SHORT, "--out", cut).wait() == 0
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(cut)[key]), key
    steps = [json.loads(x)["step"] for x in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    process = start(*SHORT, "--out", cut, "--lr", "1")
    assert process.wait() == 2
    assert "--lr 0.001 -> 1.0" in process.stderr.read()
    open_clip.add_model_config(evaluate.TINY_CONFIG)
    open_clip.create_model("shapes-tiny", pretrained=str(cut / "epoch_01.pt"))


@pytest.mark.slow
def test_two_ranks_train_photos_as_one(tmp_path):
    manifest = tmp_path / "m.jsonl"
    data.main(["shapes", "--out", str(manifest), "--images", str(tmp_path), "--limit", "8"])
    photos = ["--data", manifest, "--images", tmp_path, "--model", "shapes-tiny"]
    found = []
    for ranks in (0, 2):
        out = tmp_path / f"out{ranks}"
        run = [*photos, "--steps", "2", "--batch-size", "8", "--lr", "1e-3", "--out", out]
        assert start(*run, ranks=ranks).wait() == 0
        found.append(weights(out))
    for key, value in found[0].items():
        assert torch.allclose(value, found[1][key], atol=2e-4), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "x"], "--recipe x"),
        (["--model", "ViT-B-33"], "did you mean"),
        (["--pretrained", "no.pt"], "no such checkpoint"),
        (["--data", "no.jsonl", "--images", "."], "no.jsonl: cannot be read"),
        (["--out", "/proc/none"], "cannot be written"),
    ],
)
def test_mistakes_get_one_sentence(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match=message):
        train.main(options)
    assert not list(tmp_path.iterdir())


def test_batch_must_be_divisible_by_ranks():
    args = train.parse_args(["--batch-size", "9"])
    with pytest.raises(data.DataError, match="not divisible by the 2 ranks"):
        train.check_args(args, train.Rank(0, 2, torch.device("cpu")))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_dry_run_writes_nothing(precision, tmp_path, capsys):
    train.main(
        ["--out", str(tmp_path / "x"), "--dry-run", "--batch-size", "4", "--precision", precision]
    )
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()

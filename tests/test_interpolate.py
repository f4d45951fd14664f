import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import DataError
from evaluate import load_model, read_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import interpolate


def test_mixes_lie_between_and_the_ends_are_the_models_themselves():
    before = {"a": torch.randn(3), "n": torch.tensor(1)}
    after = {"a": torch.randn(3), "n": torch.tensor(7)}
    assert torch.equal(interpolate.interpolate(before, after, 0)["a"], before["a"])
    assert torch.equal(interpolate.interpolate(before, after, 1)["a"], after["a"])
    quarter = interpolate.interpolate(before, after, 0.25)
    assert torch.allclose(quarter["a"], 0.75 * before["a"] + 0.25 * after["a"])
    assert quarter["n"] == 7
    with pytest.raises(DataError, match="b differs"):
        interpolate.interpolate({**before, "b": before["a"]}, after, 0.5)
    with pytest.raises(DataError, match="a differs"):
        interpolate.interpolate({**before, "a": torch.zeros(4)}, after, 0.5)


ABOUT = {"model": "shapes-tiny", "activation": "gelu"}


def two_checkpoints(folder):
    for seed, name in enumerate(("before.pt", "after.pt")):
        torch.manual_seed(seed)
        net = load_model("shapes-tiny").net
        torch.save({"state_dict": net.state_dict(), "kit": ABOUT}, folder / name)
    return [str(folder / name) for name in ("before.pt", "after.pt")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "shape"], "did you mean shapes"),
        (["--suite", "winoground"], "--root is needed"),
        (["--suite", "winoground", "--root", "none"], "no such folder"),
        (["--suite", "cola", "--root", "."], "cannot be read"),
        (["--suite", "cola", "--root", ".", "--allow-missing"], "none of its files"),
        (["--suite", "bivlc", "--root", ".", "--allow-missing"], "one of costs"),
        (["--suite", "my.json"], "my.json:1: "),
        (["--suite", "shapes", "--workers", "-1"], "--workers 0 or more"),
        (["--suite", "shapes", "--model", "x"], "--model: is set by this script"),
        (["--suite", "shapes", "--ckp", "x"], "--ckp: is set by this script"),
        (["--cache", "c"], "--cache: needs --suite"),
        (["--alpha", "0.5", "1.5"], "--alpha 1.5: must be from 0 to 1"),
        (["--alpha", "0.5", "0.5000001"], "given twice"),
        (["--alpha", "0.25", "0.5"], "alpha_0.5.pt: exists"),
    ],
)
def test_every_mistake_is_found_before_a_mix_is_written(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = two_checkpoints(tmp_path)
    if "bivlc" in options:
        row = {"type": "swap", "image": "a.png", "negative_image": "a.png"}
        (tmp_path / "bivlc/images").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "bivlc/images/a.png")
        line = json.dumps({**row, "caption": "a", "negative_caption": "b"})
        (tmp_path / "bivlc/rows.jsonl").write_text(line)
    if "exists" in message:
        (tmp_path / "m").mkdir()
        (tmp_path / "m/alpha_0.5.pt").touch()
    (tmp_path / "my.json").write_text("{}")
    there = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        interpolate.main([*run, "--out", "m", *options])
    assert set(tmp_path.rglob("*")) == there


def test_mixed_checkpoints_load_and_know_their_model(tmp_path):
    run = two_checkpoints(tmp_path)
    interpolate.main([*run, "--out", str(tmp_path / "m"), "--alpha", "0.5"])
    state, known = read_checkpoint(tmp_path / "m/alpha_0.5.pt")
    assert known == ABOUT
    net = load_model(None, str(tmp_path / "m/alpha_0.5.pt")).net
    assert torch.equal(net.logit_scale, state["logit_scale"])
    with pytest.raises(DataError, match="exists"):
        interpolate.main([*run, "--out", str(tmp_path / "m"), "--alpha", "0.5"])


def test_the_sweep_reads_gains_and_costs(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    nothing = {"absent": {"accuracy": None}}
    cells = {"a": {"accuracy": 60.0}, "b": {"accuracy": 80.0}, **nothing}
    suite = {"subsets": cells, "costs": {"zero-shot": {"accuracy": 30.0}, **nothing}}
    results = {"alpha_1": {"suites": {"s": suite}}, "alpha_0.5": {"suites": {"s": suite}}}
    points = interpolate.sweep(json.loads(json.dumps(results)))
    assert points == [(0.5, 70, 30), (1, 70, 30)]
    interpolate.draw(points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_weights_of_other_activation_or_not_finite_are_refused(tmp_path):
    with pytest.raises(DataError, match="activation gelu and quickgelu"):
        interpolate.check_alike({"activation": "gelu"}, {"activation": "quickgelu"})
    interpolate.check_alike({}, {"activation": "quickgelu"})
    with pytest.raises(DataError, match="w is not finite"):
        interpolate.check_finite({"w": torch.tensor([float("nan")])}, tmp_path / "a.pt")

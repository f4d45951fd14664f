import json
import sys
from pathlib import Path

import pytest
import torch

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


def test_mixed_checkpoints_load_and_know_their_model(tmp_path):
    about = {"model": "shapes-tiny", "activation": "gelu"}
    for seed, name in enumerate(("before.pt", "after.pt")):
        torch.manual_seed(seed)
        net = load_model("shapes-tiny").net
        torch.save({"state_dict": net.state_dict(), "kit": about}, tmp_path / name)
    run = [str(tmp_path / name) for name in ("before.pt", "after.pt")]
    interpolate.main([*run, "--out", str(tmp_path / "m"), "--alpha", "0.5"])
    state, known = read_checkpoint(tmp_path / "m/alpha_0.5.pt")
    assert known == about
    net = load_model(None, str(tmp_path / "m/alpha_0.5.pt")).net
    assert torch.equal(net.logit_scale, state["logit_scale"])
    with pytest.raises(DataError, match="exists"):
        interpolate.main([*run, "--out", str(tmp_path / "m"), "--alpha", "0.5"])


def test_the_sweep_reads_gains_and_costs(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    cells = {"a": {"accuracy": 60.0}, "b": {"accuracy": 80.0}}
    suite = {"subsets": cells, "costs": {"zero-shot": {"accuracy": 30.0}}}
    results = {"alpha_1": {"suites": {"s": suite}}, "alpha_0.5": {"suites": {"s": suite}}}
    points = interpolate.sweep(json.loads(json.dumps(results)))
    assert points == [(0.5, 70, 30), (1, 70, 30)]
    interpolate.draw(points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000

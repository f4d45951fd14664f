import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_gradients import CASES

import data

SCRIPT = Path(__file__).with_name("rank_gradients.py")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    manifest = folder / "m.jsonl"
    data.main(["shapes", "--out", str(manifest), "--images", str(folder), "--limit", "9"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(manifest), str(folder), str(folder)]
    subprocess.run(command, env=environment, check=True)
    return {case: torch.load(folder / "{}_{}_{}.pt".format(*case)) for case in CASES}


# Gradients, not losses: AdamW and the losses' own values hide a constant factor.
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case[1:] != (1, 8)])
def test_ranks_and_parts_have_the_gradients_of_one_whole_batch(case, gradients):
    one, found = gradients[case[0], 1, 8], gradients[case]
    assert one["parts"] == 1
    assert found["parts"] == 8 // case[1] // case[2]
    assert found["grads"].keys() == one["grads"].keys()
    for name, grad in one["grads"].items():
        scale = grad.abs().max().clamp(min=1e-3)
        assert (found["grads"][name] - grad).abs().max() <= 2e-5 * scale, name
    assert torch.allclose(found["threshold"], one["threshold"], atol=1e-5)
    assert one["threshold"].abs().max() > 1e-3

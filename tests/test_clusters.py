"""Training on real clusters and disks: signals, launchers, locks, damaged files, full disks."""

import gc
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import negatives
import train
from evaluate import Rank, load_model

ROOT = Path(__file__).parents[1]
SHORT = ["--batch-size", "4", "--log-every", "1", "--save-every", "1", "--model", "shapes-tiny"]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """What many runs did that one process forked."""
    folder = tmp_path_factory.mktemp("forks")
    command = [sys.executable, str(Path(__file__).with_name("fork_runs.py")), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return {"folder": folder, **json.loads((folder / "results.json").read_text())}


def weights(run):
    return torch.load(run / "latest.pt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(forked):
    assert [one["code"] for one in forked["cut"]] == [-9, 143, 0], forked["cut"]
    assert forked["whole"][0]["code"] == 0, forked["whole"]
    cut = weights(forked["folder"] / "cut")
    for key, value in weights(forked["folder"] / "whole").items():
        assert torch.equal(value, cut[key]), key
    lines = (forked["folder"] / "cut/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_two_ranks_train_photos_as_one(forked):
    assert [one["code"] for one in forked["one rank"] + forked["two ranks"]] == [0, 0, 0], forked
    two = weights(forked["folder"] / "own2")
    for key, value in weights(forked["folder"] / "own1").items():
        assert torch.allclose(value, two[key], atol=2e-4), key


@pytest.mark.slow
def test_all_ranks_stop_where_one_cannot_go_on(forked):
    assert [one["code"] for one in forked["torn"]] == [2, 2], forked["torn"]
    said = [one["said"] for one in forked["torn"]]
    assert any("train_0_000003.png: cannot be decoded" in text for text in said), said
    assert not any(word in text for word in ("Traceback", "terminate called") for text in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code"),
    [
        *(("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)),
        *(("waits0", 143), ("waits2", 143)),  # a signal ends the wait for data
    ],
)
def test_a_signal_to_all_processes_of_a_run_saves_it(case, code, forked):
    (found,) = forked[case]
    assert found["code"] == code, found
    assert found["step"] == found["lines"] >= 2
    assert "error" not in found["said"], found["said"]


@pytest.mark.slow
def test_a_second_signal_ends_a_run_that_waits_in_cpp(forked):
    first, other = forked["second"]
    assert (first["code"], other["code"]) == (143, 2)
    assert "another rank has exited" in other["said"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "codes", "message"),
    [
        ("lock", [2, 143], r": process \d+ on .* trains into it"),
        ("srun", [0, 0], "2 steps of 4 on 2 x cpu"),
        ("no file", [2, 2], "none.jsonl: cannot be read"),
        ("no checkpoint", [2, 2], r"rank 0 resumes from step \d+, rank 1 from step 0"),
        ("evaluate", [2, 2], "none.pt: no such checkpoint"),
        ("alone", [2], "the others did not reach localhost:"),
    ],
)
def test_runs_that_meet(case, codes, message, forked):
    assert [one["code"] for one in forked[case]] == codes, forked[case]
    assert re.search(message, forked[case][0]["said"])
    assert not any("Traceback" in one["said"] for one in forked[case])


def descendants(pid):
    """All processes below this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


@pytest.mark.slow
def test_torchrun_and_all_below_it_are_signalled(tmp_path):
    """As SLURM does; torchrun then passes the signal on to ranks that have it already."""
    manifest = put(tmp_path)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = [*manifest, "--out", tmp_path / "x", "--steps", "10000", *SHORT[:4], "--workers", "1"]
    process = subprocess.Popen(
        list(map(str, [sys.executable, *launch, ROOT / "train.py", *run, "--save-every", "9999"])),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
    )
    metrics = tmp_path / "x/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert process.poll() is None
        time.sleep(0.02)
    for pid in [*descendants(process.pid), process.pid]:
        os.kill(pid, signal.SIGTERM)
    said = process.communicate()[0]
    steps = len(metrics.read_text().splitlines())
    assert torch.load(tmp_path / "x/latest.pt", weights_only=True)["train"]["step"] == steps, said
    assert f"stopped at step {steps}" in said
    assert "train.py: error" not in said


NAMES = {name for names in negatives.LAUNCHERS for name in names}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70123"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (1, 2, 0)),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (0, 2, 0)),
        ({**SLURM, "SLURM_JOB_NODELIST": "gpu[07-09,12],big1"}, (3, 8, 1, "gpu07", "30123")),
        ({**SLURM, "SLURM_STEP_NODELIST": "a-[1-2]-ib,b"}, (3, 8, 1, "a-1-ib", "30123")),
        ({**SLURM, "SLURM_JOB_NODELIST": "n7", "MASTER_ADDR": "m"}, (3, 8, 1, "m", "30123")),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),  # sbatch's own script
        ({"SLURM_NTASKS": "1"}, (0, 1, 0)),  # salloc's shell
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "RANK is 0 but LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is 0 but RANK is not set"),
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS is 4 but SLURM_PROCID is not set"),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, "SLURM_NTASKS is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK less than WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x.*must be numbers"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be numbers"),
    ],
)
def test_launchers(environment, wanted, monkeypatch):
    for name in [*NAMES, "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"]:
        monkeypatch.delenv(name, raising=False)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what launcher sets is undone
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(wanted, str):
        with pytest.raises(data.DataError, match=wanted):
            negatives.launcher()
        return
    assert negatives.launcher() == wanted[:3]
    place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    assert place == (wanted[3:] or (None, None))


def put(folder, limit=8):
    """A small manifest with its images, as options of train.py."""
    path = folder / "m.jsonl"
    data.main(["shapes", "--out", str(path), "--images", str(folder), "--limit", str(limit)])
    return ["--data", str(path), "--images", str(folder), "--model", "shapes-tiny"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps on photos, and its command."""
    folder = tmp_path_factory.mktemp("finished")
    command = [*put(folder), "--workers", "0", "--steps", "2", *SHORT]
    assert train.main([*command, "--out", str(folder / "x")]) == 0
    return folder, command


def change(path, **new):
    content = torch.load(path, weights_only=True)
    content["train"].update(new)
    torch.save(content, path)


def other_shape(out):
    content = torch.load(out / "latest.pt", weights_only=True)
    state = content["train"]["optimizer"]["state"]
    state[0]["exp_avg"] = torch.zeros(7)
    torch.save(content, out / "latest.pt")


def dangle(name):
    def replace(out):
        (out / name).unlink()
        (out / name).symlink_to(out / "nowhere")

    return replace


def append(name, text):
    return lambda out: (out / name).write_text((out / name).read_text() + text)


DAMAGE = {
    "manifest": (append("../m.jsonl", "\n"), r"m.jsonl: changed since the run in .* began \(\d+ b"),
    "optimiser": (other_shape, r"latest.pt: .*optimizer does not fit a weight of \["),
    "negative step": (lambda out: change(out / "latest.pt", step=-1), "its step is -1, of 2"),
    "odd step": (lambda out: change(out / "latest.pt", step=3), "its step is 3, of 2"),
    "no step": (lambda out: change(out / "latest.pt", step=1.5), "its step is 1.5, of 2"),
    "torn": (lambda out: (out / "latest.pt").write_bytes(b"PK"), r"latest\.pt: cannot be read"),
    "link": (dangle("latest.pt"), r"latest\.pt: no such checkpoint"),
    "args link": (dangle("args.json"), "its args.json is damaged"),
    "args list": (lambda out: (out / "args.json").write_text("[]"), "its args.json is damaged"),
    "args deep": (lambda out: (out / "args.json").write_text("[" * 10**5), "json is damaged"),
    "args options": (lambda o: (o / "args.json").write_text('{"options": 3}'), "is damaged"),
    "metrics": (append("metrics.jsonl", '[]\n{"step": 1}\n'), r"metrics.jsonl:3: is not a line"),
    "metrics link": (dangle("metrics.jsonl"), r"metrics.jsonl: cannot be rewritten"),
    "out link": (lambda o: (shutil.rmtree(o), o.symlink_to("nowhere")), "exists, but is not a run"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_refused_and_left_alone(kind, finished, tmp_path):
    folder, command = finished
    shutil.copytree(folder, tmp_path / "copy")
    command = [str(x).replace(str(folder), str(tmp_path / "copy")) for x in command]
    out = tmp_path / "copy/x"
    for name in ("args.json", "metrics.jsonl"):
        (out / name).write_text((out / name).read_text().replace(str(folder), f"{tmp_path}/copy"))
    spoil, message = DAMAGE[kind]
    spoil(out)
    held = {p.name: p.read_bytes() for p in out.glob("*") if p.is_file() and p.suffix != ".lock"}
    with pytest.raises(data.DataError, match=message):
        train.main([*command, "--out", str(out)])
    assert held == {
        p.name: p.read_bytes() for p in out.glob("*") if p.is_file() and p.suffix != ".lock"
    }


def test_a_run_that_a_torn_image_stopped_goes_on_without_it(tmp_path, capsys):
    command = [*put(tmp_path, 12), "--steps", "6", *SHORT, "--out", str(tmp_path / "x")]
    (tmp_path / "train_0_000003.png").write_bytes(b"torn")
    with pytest.raises(data.DataError, match=r"^\S*train_0_000003.png: cannot be decoded"):
        train.main([*command, "--workers", "1", "--batch-size", "12", "--dry-run"])
    gc.disable()  # what the fault leaves must go without it
    try:
        assert train.main([*command, "--workers", "1", "--save-every", "100"]) == 2
    finally:
        gc.enable()
    assert not multiprocessing.active_children()  # Python would wait for them for ever
    assert "train_0_000003.png: cannot be decoded" in capsys.readouterr().err
    kept = torch.load(tmp_path / "x/latest.pt", weights_only=True)["train"]["step"]
    assert kept > 0  # what was done before is saved
    assert train.main([*command, "--workers", "0", "--on-bad-image", "skip"]) == 0


def test_a_run_that_saved_nothing_begins_anew_with_other_options(finished, tmp_path):
    shutil.copytree(finished[0] / "x", tmp_path / "x")
    for path in (tmp_path / "x").glob("*.pt"):
        path.unlink()
    assert train.main([*finished[1], "--out", str(tmp_path / "x"), "--lr", "0.0005"]) == 0
    kept = json.loads((tmp_path / "x/args.json").read_text())["options"]
    assert kept["lr"] == 0.0005
    assert len((tmp_path / "x/metrics.jsonl").read_text().splitlines()) == 2


def test_an_epoch_file_that_a_cut_off_run_lacks_is_written(finished, tmp_path):
    shutil.copytree(finished[0] / "x", tmp_path / "x")
    command = [*finished[1], "--out", str(tmp_path / "x")]
    (tmp_path / "x/epoch_01.pt").unlink()
    assert train.main(command) == 0
    found, wanted = (
        torch.load(folder / "x/epoch_01.pt", weights_only=True)["state_dict"]
        for folder in (tmp_path, finished[0])
    )
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_many_parts_travel_as_two_tensors_and_come_out_the_same():
    net = load_model("shapes-tiny")
    world = data.ShapesDataset((64, 64), 0)
    items = [world[0, i] for i in range(12)]
    items[3] = items[3]._replace(fault="a fault")
    collate = data.Collate(net.tokenizer, positives=True, negatives="valid", part=5)
    bundle = collate.bundle(items)
    assert sum(isinstance(x, torch.Tensor) for x in bundle) == 2
    for found, wanted in zip(data.unbundle(bundle), collate(items), strict=True):
        for a, b in zip([*found.texts, *found[2:4]], [*wanted.texts, *wanted[2:4]], strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        assert torch.equal(found.images, wanted.images)
        assert found[4:] == wanted[4:]


@pytest.mark.slow
def test_many_parts_need_few_file_handles(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, limit[1]))
    try:
        run = [*put(tmp_path, 64), "--steps", "1", "--batch-size", "64", "--micro-batch", "1"]
        assert train.main([*run, "--workers", "1", "--out", str(tmp_path / "x")]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_called_so_and_the_run_goes_on_when_there_is_room(small_disk, capsys):
    """Room for one checkpoint of 90 MB, not for the next one beside it."""
    run = ["--steps", "2", *SHORT, "--out", str(small_disk / "x")]
    assert train.main(run) == 2
    said = capsys.readouterr().err
    assert "(disk full); the last checkpoint stays" in said
    assert len(said.splitlines()) == 1
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    assert torch.load(small_disk / "x/latest.pt", weights_only=True)["train"]["step"] == 1
    assert not list((small_disk / "x").glob("*.partial"))
    assert train.main(run) == 0
    assert "from step 1" in capsys.readouterr().out


def poison(monkeypatch, first):
    """Gradients that are NaN from call `first` on, of a loss that is finite."""
    whole, calls = train.gradients, []

    def gradients(run, parts):
        out = whole(run, parts)
        calls.append(1)
        if len(calls) >= first:
            run.net.logit_scale.grad.fill_(math.nan)
        return out

    monkeypatch.setattr(train, "gradients", gradients)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_run_of_which_nothing_is_applied_fails(precision, tmp_path, monkeypatch):
    poison(monkeypatch, 1)
    steps = "40" if precision == "fp16" else "6"
    run = ["--steps", steps, *SHORT, "--precision", precision, "--out", str(tmp_path / "x")]
    with pytest.raises(data.DataError, match=r"not finite \d+ steps in a row .* none was applied"):
        train.main(run)
    assert not (tmp_path / "x/latest.pt").exists()
    count = len((tmp_path / "x/metrics.jsonl").read_text().splitlines())
    assert count < 40  # fp16's search for a scale ends at 1


def test_last_steps_that_were_skipped_are_told(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 4)
    run = ["--steps", "5", *SHORT, "--precision", "fp16", "--out", str(tmp_path / "x")]
    assert train.main(run) == 0
    assert "the last 2 steps were not finite, and not applied" in capsys.readouterr().out
    monkeypatch.undo()
    poison(monkeypatch, 3)
    with pytest.raises(data.DataError, match=r"not finite 3 steps in a row \(step 5\)"):
        train.main([*run[:-1], str(tmp_path / "y")])
    assert torch.load(tmp_path / "y/latest.pt", weights_only=True)["train"]["step"] == 2


@pytest.mark.parametrize(
    ("start", "bias", "wanted"),
    [(4.0, False, math.log(100)), (4.7, False, 4.7), (4.7, True, 4.72), (4.6, True, 4.72)],
)
def test_logit_scale_is_held_at_100_or_where_it_began(start, bias, wanted):
    args = train.parse_args(["--batch-size", "4", "--steps", "3", "--recipe", "clip"])
    model = load_model("shapes-tiny")
    if bias:
        model.net.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    model.net.logit_scale.data.fill_(start)
    rank = Rank(0, 1, torch.device("cpu"))
    run = train.make_run(args, model, rank)
    loader = train.make_loader(run, train.make_source(args, model, run.loss, rank), 0)
    parts = next(loader)
    model.net.logit_scale.data.fill_(4.72)  # as if a step had moved it there
    train.train_step(run, parts, 0.0)
    assert model.net.logit_scale.item() == pytest.approx(wanted, abs=1e-6)
    content = train.checkpoint(run, 1)
    assert content["train"]["limit"] == run.limit


def item(caption, *texts):
    return data.Example(torch.zeros(3, 2, 2), data.Captions(caption, None, texts), "")


def test_a_missing_negative_of_the_released_recipe_is_its_placeholder():
    model = load_model("shapes-tiny")
    collate = data.Collate(model.tokenizer, positives=False, negatives="all")
    (batch,) = collate([item("a cat", "a dog", None, None, "a cow")])
    wanted = model.tokenizer(["a cat", "a dog", "###", "###", "a cow"])
    assert torch.equal(data.unpack_texts(batch.texts, model.net), wanted)
    assert batch.valid.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("recipe", ["ce-clip", "released"])
def test_a_negative_with_the_tokens_of_its_caption_is_left_out(recipe):
    model = load_model("shapes-tiny")
    long = "word " * 40
    items = [
        item("A cat", "a  CAT", "a dog", None, "a cow"),
        item(long + "red", long + "blue", "a cow", "red " + long, None),
    ]
    kind = "all" if recipe == "released" else "valid"  # as published: nothing is left out
    (batch,) = data.Collate(model.tokenizer, positives=False, negatives=kind)(items)
    valid = [[recipe == "released", True, False, True], [recipe == "released", True, True, False]]
    assert batch.valid.tolist() == valid
    assert batch.same == (0 if recipe == "released" else 2)
    if recipe == "ce-clip":
        texts = ["A cat", long + "red", "a dog", "a cow", "a cow", "red " + long]
        assert torch.equal(data.unpack_texts(batch.texts, model.net), model.tokenizer(texts))

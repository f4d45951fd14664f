"""Runs that are signalled, hang, meet each other or come in ranks, for test_clusters.py.

  python tests/fork_runs.py FOLDER

Imports once, then forks every run. Writes FOLDER/results.json: for each case and each of its
processes the exit code, what it said, and the step of its checkpoint.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import evaluate
import train

SHORT = ["--batch-size", "4", "--log-every", "1", "--save-every", "1000", "--model", "shapes-tiny"]
FOLDER = Path(sys.argv[1])
EXAMPLE = Path(__file__).parents[1] / "scripts/example_loss.py"


def run(main, argv, name, environment=None, before=None):
    """Fork a run in a process group of its own; what it says goes to FOLDER/NAME.txt."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    torch.set_num_threads(1)
    said = os.open(FOLDER / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(environment or {})
    if before:
        before()
    sys.argv = ["x", *map(str, argv)]
    try:
        code = main()
    except data.DataError as error:
        print(error, file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code or 0)


def end(pid, name, out=None, seconds=120):
    """Wait for a run: its exit code, or "hangs", what it said, the step of its checkpoint."""
    limit = time.monotonic() + seconds
    code = "hangs"
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.02)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    latest = Path(out or "none") / "latest.pt"
    step = torch.load(latest, weights_only=True)["train"]["step"] if latest.exists() else None
    return {"code": code, "said": (FOLDER / f"{name}.txt").read_text(), "step": step}


def lines(out):
    path = Path(out) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition):
    while not condition():
        time.sleep(0.02)


def options(out, steps=100_000):
    photos = ["--data", FOLDER / "m.jsonl", "--images", FOLDER, "--out", out]
    return [*photos, "--steps", steps, *SHORT]


def hang():
    """Items are no longer made once the file `hang` is there."""
    whole = data.ManifestDataset.__getitem__

    def item(self, key):
        while (FOLDER / "hang").exists():
            time.sleep(0.05)
        return whole(self, key)

    data.ManifestDataset.__getitem__ = item


def ranks(launcher="torchrun"):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    if launcher == "srun":
        shared = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost,node[2-3]"}
        names = ("SLURM_PROCID", "SLURM_LOCALID")
    else:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        names = ("RANK", "LOCAL_RANK")
    return [{**shared, "MASTER_PORT": port, **dict.fromkeys(names, str(i))} for i in (0, 1)]


def signals(results):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        name = number.name
        out = FOLDER / name
        pid = run(train.run_main, [*options(out), "--workers", "2"], name)
        wait_for(lambda out=out: lines(out) >= 2)
        os.killpg(pid, number)
        results[name] = [{**end(pid, name, out), "lines": lines(out)}]


def hangs(results):
    for workers in ("0", "2"):
        name = f"waits{workers}"
        out = FOLDER / name
        pid = run(train.run_main, [*options(out), "--workers", workers], name, before=hang)
        wait_for(lambda out=out: lines(out) >= 2)
        (FOLDER / "hang").touch()
        time.sleep(1)
        os.killpg(pid, signal.SIGTERM)
        results[name] = [{**end(pid, name, out, 30), "lines": lines(out)}]
        (FOLDER / "hang").unlink()
    # Rank 0 waits in C++ for rank 1, which waits for data and gets no signal.
    out = FOLDER / "second"
    pids = [
        run(train.run_main, [*options(out), "--workers", "0"], f"second{i}", e, [None, hang][i])
        for i, e in enumerate(ranks())
    ]
    wait_for(lambda: lines(out) >= 2)
    (FOLDER / "hang").touch()
    time.sleep(1)
    os.kill(pids[0], signal.SIGTERM)
    time.sleep(1.5)
    os.kill(pids[0], signal.SIGTERM)
    results["second"] = [end(pids[0], "second0", out, 30)]
    (FOLDER / "hang").unlink()
    results["second"] += [end(pids[1], "second1", out, 60)]


def meetings(results):
    """Two runs into one directory; then ranks that do not fit together."""
    out = FOLDER / "SIGTERM"  # a run that can be resumed
    first = run(train.run_main, [*options(out), "--workers", "0"], "first")
    before = lines(out)
    wait_for(lambda: lines(out) > before)
    second = run(train.run_main, [*options(out), "--workers", "0"], "other")
    results["lock"] = [end(second, "other")]
    os.kill(first, signal.SIGTERM)
    results["lock"] += [end(first, "first", out)]
    ckpt = ["--ckpt", FOLDER / "SIGTERM/latest.pt", "--suite", "shapes"]
    kinds = {
        "srun": (train.run_main, [options(FOLDER / "srun", 2)] * 2),
        "no file": (train.run_main, [options(FOLDER / "a", 2), [*options(FOLDER / "a", 2)]]),
        "no checkpoint": (train.run_main, [options(out), options(FOLDER / "local")]),
        "evaluate": (evaluate.main, [ckpt, ["--ckpt", FOLDER / "none.pt"]]),
    }
    kinds["no file"][1][1][1] = FOLDER / "none.jsonl"
    for name, (main, argvs) in kinds.items():
        extra = [] if name == "evaluate" else ["--workers", "0"]
        pids = [
            run(main, [*argv, *extra], f"{name}{i}", environment)
            for i, (argv, environment) in enumerate(zip(argvs, ranks("srun"), strict=True))
        ]
        results[name] = [end(pid, f"{name}{i}") for i, pid in enumerate(pids)]
    lonely = {**ranks()[0], "JOIN_SECONDS": "1"}
    pid = run(train.run_main, options(FOLDER / "b"), "alone", lonely)
    results["alone"] = [end(pid, "alone")]


def killed(results):
    """A run that is killed, then ended by a signal, then goes on; and one that was left alone."""
    short = ["--steps", "6", "--save-every", "1", "--workers", "0"]
    results["whole"] = [end(run(train.run_main, [*options(FOLDER / "whole"), *short], "w"), "w")]
    out, results["cut"] = FOLDER / "cut", []
    for number, count in ((signal.SIGKILL, 2), (signal.SIGTERM, 3), (0, 0)):
        pid = run(train.run_main, [*options(out), *short], "cut", before=slow if number else None)
        wait_for(lambda count=count: lines(out) >= count)
        if number:
            os.kill(pid, number)
        results["cut"].append({**end(pid, "cut", out), "lines": lines(out)})


def slow():
    """Steps take a while, so that a signal comes amid the run."""
    whole = train.train_step
    train.train_step = lambda *inputs: (time.sleep(0.3), whole(*inputs))[1]


def ranked(results):
    """Two ranks with a loss of one's own; then an image of one rank tears while they train."""
    own = ["--loss", f"{EXAMPLE}:WithAlignment", "--workers", "0"]
    own += ["--lr", "1e-3", "--batch-size", "8"]
    argv = [[*options(FOLDER / f"own{count}", 2), *own] for count in (1, 2)]
    results["one rank"] = [end(run(train.run_main, argv[0], "o"), "o")]
    pids = [run(train.run_main, argv[1], f"own{i}", e) for i, e in enumerate(ranks())]
    results["two ranks"] = [end(pid, f"own{i}") for i, pid in enumerate(pids)]
    out = FOLDER / "torn"
    argv = [*options(out), "--workers", "0", "--batch-size", "8"]
    pids = [run(train.run_main, argv, f"torn{i}", e) for i, e in enumerate(ranks())]
    wait_for(lambda: lines(out) >= 1)
    (FOLDER / "train_0_000003.png").write_bytes(b"torn")
    results["torn"] = [end(pid, f"torn{i}", out) for i, pid in enumerate(pids)]


if __name__ == "__main__":
    found = {}
    data.main(["shapes", "--out", str(FOLDER / "m.jsonl"), "--images", str(FOLDER), "--limit", "8"])
    for cases in (signals, hangs, meetings, killed, ranked):
        cases(found)
        (FOLDER / "results.json").write_text(json.dumps(found, indent=1))

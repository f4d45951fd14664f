#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Kill a training run at random moments, resume it, and compare every bit of the weights.

  python scripts/kill_test.py --trials 20        # about 3 minutes on one core

Each trial starts a run of its own in another process, sends it SIGKILL after a random time between
its start and its end (while it loads, steps, or writes a checkpoint), and lets the same command
finish.  The weights and optimiser must equal those of a run that was never cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20, help="runs to kill (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    return parser.parse_args()


if __name__ == "__main__":  # --help is answered before torch is imported
    parse_args()

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train


def start(out: Path) -> int:
    """Fork a process that trains into `out`, and return its number."""
    number = os.fork()
    if number:
        return number
    torch.set_num_threads(1)
    options = ["--batch-size", "8", "--steps", "12", "--save-every", "1", "--log-every", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train.main(["--out", str(out), *options])
    os._exit(code)


def wait(number: int) -> int:
    """Wait for a process, and return its exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def clear(out: Path) -> None:
    """Remove a trial's run."""
    for path in out.glob("*"):
        path.unlink()


def main() -> None:
    """Run the trials; exit code 1 if any differs."""
    args = parse_args()
    rng = random.Random(args.seed)
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        if wait(start(Path(folder, "whole"))):
            sys.exit("the whole run failed")
        length = time.perf_counter() - began
        wanted = torch.load(Path(folder, "whole/latest.pt"), weights_only=True)
        for trial in range(args.trials):
            out, code = Path(folder, f"run{trial}"), 0
            while code != -signal.SIGKILL:  # a run that had ended is no trial: begin again
                clear(out)
                process = start(out)
                after = rng.uniform(0, length)
                time.sleep(after)
                os.kill(process, signal.SIGKILL)
                code = wait(process)
            latest = out / "latest.pt"
            kept = torch.load(latest, weights_only=True)["train"]["step"] if latest.exists() else 0
            finished = wait(start(out))
            found = torch.load(latest, weights_only=True)
            equal = finished == 0 and same(found, wanted)
            good += equal
            print(
                f"{trial + 1}: killed after {after:.2f} s, resumed from step {kept}: "
                f"{'same bits' if equal else 'DIFFERENT'}",
                flush=True,
            )
            clear(out)
    print(f"{good} of {args.trials}")
    sys.exit(good != args.trials)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Mix the weights of a model before and after tuning, and draw gain against cost.

  python scripts/interpolate.py before.pt after.pt --out mixed
  python scripts/interpolate.py before.pt after.pt --out mixed --suite shapes [--root DIR]

Writes mixed/alpha_A.pt with (1 - A) before + A after (WiSE-FT, Wortsman et al., arXiv 2109.01903).
With --suite every mix is evaluated and sweep.png drawn: the gain is the mean of the suites'
subsets, the cost the mean of their zero-shot and retrieval figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
import train
from data import DataError


def interpolate(
    before: dict[str, Tensor], after: dict[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) before + alpha after, in float32 and back; what is not floating is after's.

    Raises:
        DataError: the two are not weights of the same model.
    """
    odd = sorted(before.keys() ^ after.keys())
    odd += [key for key in before.keys() & after.keys() if before[key].shape != after[key].shape]
    if odd:
        raise DataError(f"before and after are not of one model: {odd[0]} differs")
    mixed = {}
    for key, new in after.items():
        old = before[key]
        if new.is_floating_point() and alpha < 1:
            new = old.float().lerp(new.float(), alpha).to(new.dtype) if alpha else old
        mixed[key] = new
    return mixed


def sweep(results: dict[str, Any]) -> list[tuple[float, float, float]]:
    """Of each alpha the gain and the cost, in per cent: means over all suites."""
    points = []
    for label, result in results.items():
        suites = result["suites"].values()
        gain = [cell["accuracy"] for suite in suites for cell in suite["subsets"].values()]
        cost = [cell["accuracy"] for suite in suites for cell in suite["costs"].values()]
        points.append(
            (float(label.split("_")[1]), statistics.mean(gain), statistics.mean(cost or [0.0]))
        )
    return sorted(points)


def draw(points: list[tuple[float, float, float]], path: Path) -> None:
    """Draw the sweep: cost to the right, gain upwards, one point for each alpha."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise DataError("the picture needs matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    axes.plot([p[2] for p in points], [p[1] for p in points], marker="o")
    for alpha, gain, cost in points:
        axes.annotate(f"{alpha:g}", (cost, gain), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="mean of zero-shot and retrieval (%)", ylabel="mean of subsets (%)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Mix, evaluate, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="checkpoint before tuning")
    parser.add_argument("after", type=Path, help="checkpoint after tuning")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    steps = [0.0, 0.25, 0.5, 0.75, 1.0]
    parser.add_argument("--alpha", type=float, nargs="+", default=steps, help="default 0 to 1")
    parser.add_argument("--suite", help="suites of evaluate.py, to evaluate and draw")
    parser.add_argument("--root", type=Path, help="folder of the suites' files")
    args = parser.parse_args(argv)
    before, _ = evaluate.read_checkpoint(args.before)
    after, about = evaluate.read_checkpoint(args.after)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoints: list[str] = []
    for alpha in args.alpha:
        path = args.out / f"alpha_{alpha:g}.pt"
        if path.exists():
            raise DataError(f"--out {path}: exists; choose another folder")
        content = {"state_dict": interpolate(before, after, alpha), "kit": about}
        train.save(content, path)
        checkpoints += ["--ckpt", f"{path.stem}={path}"]
    print(f"{len(args.alpha)} mixes written to {args.out}")
    if args.suite:
        root = ["--root", str(args.root)] if args.root else []
        out = args.out / "results"
        evaluate.main([*checkpoints, "--suite", args.suite, "--out", str(out), *root])
        points = sweep(json.loads((out / "results.json").read_text(encoding="utf-8")))
        draw(points, args.out / "sweep.png")
        print(f"picture: {args.out / 'sweep.png'}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"interpolate.py: error: {error}", file=sys.stderr)
        sys.exit(2)

#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Mix the weights of a model before and after tuning, and draw gain against cost.

  python scripts/interpolate.py before.pt after.pt --out mixed
  python scripts/interpolate.py before.pt after.pt --out mixed --suite shapes [--root DIR ...]

Writes mixed/alpha_A.pt with (1 - A) before + A after (WiSE-FT, Wortsman et al., arXiv 2109.01903).
With --suite every mix is evaluated and sweep.png drawn: the gain is the mean of the suites'
subsets, the cost the mean of their zero-shot and retrieval figures; what is absent under
--allow-missing counts in neither. Everything is checked before the first mix is written.
All other options are those of evaluate.py, such as --root, --cache and --allow-missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: our options, and those that are passed to evaluate.py."""
    parser = argparse.ArgumentParser(
        prog="interpolate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, help="checkpoint before tuning")
    parser.add_argument("after", type=Path, help="checkpoint after tuning")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the mixes to")
    parser.add_argument(
        "--alpha",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="A",
        help="shares of `after` in each mix, from 0 to 1 (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--suite",
        metavar="NAMES",
        help="suites to evaluate every mix on, as evaluate.py takes them, files of your own "
        "included (default: none, the mixes are only written)",
    )
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    parse_args()  # --help is answered before torch is imported

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
import train
from data import DataError
from negatives import run_script


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
    """Of each alpha the gain and the cost, in per cent: means over what all suites scored."""
    points = []
    for label, result in results.items():
        means = [
            statistics.mean(
                cell["accuracy"]
                for suite in result["suites"].values()
                for cell in suite[part].values()
                if cell["accuracy"] is not None
            )
            for part in ("subsets", "costs")
        ]
        points.append((float(label.split("_")[1]), means[0], means[1]))
    return sorted(points)


def draw(points: list[tuple[float, float, float]], path: Path) -> None:
    """Draw the sweep: cost to the right, gain upwards, one point for each alpha."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    axes.plot([p[2] for p in points], [p[1] for p in points], marker="o")
    for alpha, gain, cost in points:
        axes.annotate(f"{alpha:g}", (cost, gain), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="mean of zero-shot and retrieval (%)", ylabel="mean of subsets (%)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check_paths(args: argparse.Namespace) -> list[Path]:
    """The checkpoints to write, none of which is there.

    Raises:
        DataError: an alpha outside 0 to 1 or given twice, or a path that is taken.
    """
    odd = [alpha for alpha in args.alpha if not 0 <= alpha <= 1]
    if odd:
        raise DataError(f"--alpha {odd[0]:g}: must be from 0 to 1")
    paths = [args.out / f"alpha_{alpha:g}.pt" for alpha in args.alpha]
    if len(set(paths)) < len(paths):
        raise DataError("--alpha: one is given twice (six digits count); leave it out")
    taken = [path for path in (*paths, args.out / "sweep.png") if path.exists()]
    if taken:
        raise DataError(f"--out {taken[0]}: exists; choose another folder")
    evaluate.check_out(args.out, overwrite=False)
    return paths


def check_suites(options: list[str]) -> None:
    """Read the suites as evaluate.py will, and see that there is something to draw.

    Raises:
        DataError: names what is missing.
    """
    args = evaluate.parse_args(options)
    evaluate.check_args(args)
    suites = evaluate.load_suites(args)[0].values()
    if not any(suite.items for suite in suites) or not any(suite.costs for suite in suites):
        raise DataError(
            f"--suite {args.suite}: the plot needs a suite of items and one of costs "
            "(retrieval, zeroshot, or shapes, which has both)"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError("the plot needs matplotlib: pip install matplotlib")


def check_alike(was: dict[str, Any], about: dict[str, Any]) -> None:
    """Refuse weights of different models or activations; foreign ones do not say theirs."""
    for key in ("model", "activation"):
        if was.get(key) and about.get(key) and was[key] != about[key]:
            raise DataError(
                f"before and after are not of one model: {key} {was[key]} and {about[key]}"
            )


def check_finite(state: dict[str, Tensor], path: Path) -> None:
    """Refuse weights with NaN or infinity, of which every mix would have them."""
    odd = next((k for k, x in state.items() if x.is_floating_point() and not x.isfinite().all()), 0)
    if odd:
        raise DataError(f"{path}: {odd} is not finite; take a checkpoint that is")


def main(argv: list[str] | None = None) -> None:
    """Mix, evaluate, draw."""
    args, options = parse_args(argv)
    own = ("--ckpt", "--model", "--pretrained", "--baseline", "--list", "--overwrite")
    flags = [(x, x.split("=")[0]) for x in options if x.startswith("--") and len(x) > 2]
    taken = [x for x, flag in flags if any(name.startswith(flag) for name in own)]  # or the start
    if taken or (options and not args.suite):
        why = "is set by this script" if taken else "needs --suite"
        raise DataError(f"{(taken or options)[0]}: {why}; leave it out")
    paths = check_paths(args)
    options += ["--suite", str(args.suite), "--out", str(args.out / "results")]
    for path in paths:
        options += ["--ckpt", f"{path.stem}={path}"]
    before, was = evaluate.read_checkpoint(args.before)
    after, about = evaluate.read_checkpoint(args.after)
    check_alike(was, about)
    check_finite(before, args.before)
    check_finite(after, args.after)
    interpolate(before, after, 0)  # are they of one model?
    if args.suite and "model" not in about:
        raise DataError(f"--suite: {args.after} is not from train.py; leave --suite out")
    if args.suite:
        evaluate.load_model(None, str(args.after))  # is it a model that evaluate.py can build?
        check_suites(options)
    args.out.mkdir(parents=True, exist_ok=True)
    for alpha, path in zip(args.alpha, paths, strict=True):
        train.save({"state_dict": interpolate(before, after, alpha), "kit": about}, path)
    print(f"{len(args.alpha)} mixes written to {args.out}")
    if args.suite:
        evaluate.main(options)
        results = (args.out / "results/results.json").read_text(encoding="utf-8")
        draw(sweep(json.loads(results)), args.out / "sweep.png")
        print(f"plot: {args.out / 'sweep.png'}")


if __name__ == "__main__":
    sys.exit(run_script(main, "interpolate.py"))

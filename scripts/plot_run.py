# SPDX-License-Identifier: MIT
"""Draw what a folder holds: a run's thresholds and losses, or the accuracies of an evaluation.

python scripts/plot_run.py runs/NAME [FOLDER ...]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def draw_run(folder: Path, plt: Any) -> None:
    """Draw thresholds.png and losses.png from metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    thresholds = [key for key in lines[0] if key.startswith("threshold_")]
    for name, keys, unit in (
        ("thresholds", thresholds, "threshold (logits)"),
        ("losses", ["loss", "itc", "imc", "cmr"], "loss (nats; cmr in logits)"),
    ):
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        for key in keys:
            axes.plot([x["step"] for x in lines], [x[key] for x in lines], label=key.split("_")[-1])
        axes.set(xlabel="step", ylabel=unit)
        axes.legend()
        finish(figure, folder / f"{name}.png", plt)


def draw_results(folder: Path, plt: Any) -> None:
    """Draw one picture for each suite of results.json: accuracies with 95 % intervals."""
    results = json.loads((folder / "results.json").read_text())
    if not results:
        raise ValueError("no results in it")
    width = 0.8 / len(results)
    for suite in next(iter(results.values()))["suites"]:
        figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
        for i, (label, result) in enumerate(results.items()):
            cells = {
                name: cell
                for name, cell in result["suites"][suite]["subsets"].items()
                if cell["accuracy"] is not None
            }
            means = [cell["accuracy"] for cell in cells.values()]
            low = [cell["accuracy"] - cell["low"] for cell in cells.values()]
            high = [cell["high"] - cell["accuracy"] for cell in cells.values()]
            places = [j + (i - (len(results) - 1) / 2) * width for j in range(len(means))]
            axes.bar(places, means, width, yerr=[low, high], label=label, capsize=2)
        axes.axhline(50, color="grey", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(cells)), [name.replace("-", "\n") for name in cells])
        axes.set(ylabel="per cent correct (chance: dashed)", ylim=(0, 105))
        axes.legend(loc="lower right")
        finish(figure, folder / f"{suite}.png", plt)


def finish(figure: Any, path: Path, plt: Any) -> None:
    """Write the picture and say where."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"picture: {path}")


def main(argv: list[str] | None = None) -> None:
    """Draw every folder of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", type=Path, nargs="*", default=[Path()], help="of train.py or evaluate.py"
    )
    folders = parser.parse_args(argv).folders
    readers = {"metrics.jsonl": draw_run, "results.json": draw_results}
    for folder in folders:
        if not any((folder / name).is_file() for name in readers):
            stop(f"{folder}: holds neither metrics.jsonl nor results.json")
    try:
        import matplotlib
    except ImportError:
        stop("matplotlib is missing; pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for folder in folders:
        for name, draw in readers.items():
            if (folder / name).is_file():
                try:
                    draw(folder, plt)
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    stop(f"{folder / name}: is torn or empty ({error!r}); run again")


def stop(why: str) -> None:
    """One sentence, exit code 2."""
    print(f"plot_run.py: error: {why}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

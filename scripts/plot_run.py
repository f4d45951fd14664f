# SPDX-License-Identifier: MIT
"""Draw the thresholds and the loss parts of a run: python scripts/plot_run.py runs/NAME."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Read metrics.jsonl, write thresholds.png and losses.png beside it."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit("plot_run.py: error: give a run directory that holds metrics.jsonl")
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot_run.py: error: needs matplotlib; pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    run = Path(sys.argv[1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
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
        figure.savefig(run / f"{name}.png", dpi=150)
        plt.close(figure)
        print(f"picture: {run / name}.png")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Draw gains against costs: compositional mean over zero-shot and over retrieval.

Up is the mean of the headline figures of the compositional suites that every result given holds;
right is the mean of its zero-shot sets, or of its recalls at 1. A published model is drawn where
one source has all the same figures of it, so that all points of a panel mean the same. What a
result holds of part of the items only is said as N of M; a panel without points is left out.
Without results the published summary of one source is drawn, as that source averages it.

  python scripts/plot_tradeoff.py [results.json ...] --out tradeoff.png
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_tables

import evaluate
from data import DataError
from negatives import run_script

Points = dict[str, tuple[float, float]]
COSTS = ("zero-shot", "retrieval")


def read_results(
    paths: list[Path],
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, str]]]:
    """Figures by label and suite, subsets, averages and costs together; N of M of partial suites.

    Raises:
        DataError: a file that is no results.json, or a label that two of them have.
    """
    read: dict[str, dict[str, dict[str, float]]] = {}
    partial: dict[str, dict[str, str]] = {}
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            if not results:
                raise DataError(f"{path}: holds no results; run evaluate.py --out again")
            for label, result in results.items():
                if label in read:
                    raise DataError(f"{path}: the label {label} is taken; score with --ckpt LABEL=")
                tables = {
                    suite: {
                        name: cell
                        for part in ("subsets", "averages", "costs")
                        for name, cell in table[part].items()
                        if cell["accuracy"] is not None
                    }
                    for suite, table in result["suites"].items()
                }
                read[label] = {
                    suite: {name: cell["accuracy"] for name, cell in cells.items()}
                    for suite, cells in tables.items()
                }
                partial[label] = {
                    suite: make_tables.partly({suite: table})
                    for suite, table in result["suites"].items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: is no results.json of evaluate.py") from None
    return read, partial


def gains(read: dict[str, Any]) -> list[tuple[str, str]]:
    """Suite and name of the headline figures that all have."""
    heads = {suite: info.get("headline") for suite, info in evaluate.read_table("suites").items()}
    return [
        (suite, head)
        for suite, head in heads.items()
        if head and all(head in suites.get(suite, {}) for suites in read.values())
    ]


def costs(read: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    """Suite and name of the zero-shot sets, or of the recalls at 1, that all have."""
    first = next(iter(read.values()))
    found = [(suite, name) for suite, figures in first.items() for name in figures]
    wanted = {
        "zero-shot": lambda name: name.startswith("zero-shot ") and "mean" not in name,
        "retrieval": lambda name: name.endswith("R@1") and "mean" not in name,
    }[kind]
    return [
        (suite, name)
        for suite, name in found
        if wanted(name) and all(name in suites.get(suite, {}) for suites in read.values())
    ]


def mean(figures: dict[str, dict[str, float]], names: list[tuple[str, str]]) -> float | None:
    """The plain mean, or None where one is missing."""
    values = [figures.get(suite, {}).get(name) for suite, name in names]
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found and len(found) == len(values) else None


def place(
    read: dict[str, dict[str, dict[str, float]]],
    up: list[tuple[str, str]],
    right: list[tuple[str, str]],
) -> Points:
    """The points of the models that have all figures."""
    points = {}
    for label, figures in read.items():
        x, y = mean(figures, right), mean(figures, up)
        if x is not None and y is not None:
            points[label] = (x, y)
    return points


def read_published() -> dict[str, dict[str, dict[str, float]]]:
    """Published figures as read_results gives them, by "model (source)"."""
    read: dict[str, dict[str, dict[str, float]]] = {}
    for suite in evaluate.SUITES:
        for (model, source), values in make_tables.published(suite).items():
            read.setdefault(f"{model} ({source})", {})[suite] = values
    return read


def summary(source: str) -> dict[str, Points]:
    """The published summary of one source: composition against zero-shot and retrieval."""
    models = evaluate.read_table("published")["tradeoff"]
    if source not in models:
        raise DataError(f"--source {source}: is none of {', '.join(models)}")
    rows = models[source].items()
    return {
        "zero-shot": {model: (x["zeroshot"], x["comp"]) for model, x in rows},
        "retrieval": {model: ((x["i2t"] + x["t2i"]) / 2, x["comp"]) for model, x in rows},
    }


def check_out(out: Path) -> None:
    """Refuse a picture that cannot be written, before anything is read.

    Raises:
        DataError: names what to mend.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError("matplotlib is missing; pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"}  # which needs LaTeX
    if out.suffix[1:] not in kinds:
        raise DataError(f"--out {out}: ends in none of .{', .'.join(sorted(kinds))}")
    if not out.parent.is_dir():
        raise DataError(f"--out {out}: there is no folder {out.parent}; make it")


def draw(panels: dict[str, tuple[Points, Points]], title: str, out: Path) -> None:
    """Write the picture, a panel for each cost: ours filled, the published ones hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (5.5 * len(panels), 4.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (kind, (ours, theirs)) in zip(axes[0], panels.items(), strict=True):
        for points, marker, face in ((ours, "o", "tab:red"), (theirs, "s", "none")):
            for label, (x, y) in points.items():
                axis.plot(x, y, marker, color="tab:red" if face != "none" else "grey", mfc=face)
                axis.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.margins(0.15)
        axis.set(xlabel=f"{kind} (per cent)", ylabel="composition (per cent)")
    figure.suptitle(title, fontsize=9)
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({error.strerror})") from None
    plt.close(figure)
    print(f"picture: {out}")


def main(argv: list[str] | None = None) -> None:
    """Draw the results of the command line, or the published summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="*", help="results.json of evaluate.py")
    parser.add_argument("--source", default="FSC-CLIP", help="of the summary (FSC-CLIP, vl_compo)")
    parser.add_argument("--out", type=Path, required=True, help="picture to write (.png, .pdf)")
    args = parser.parse_args(argv)
    check_out(args.out)
    if not args.results:
        title = f"Published: means as {args.source} takes them"
        draw({kind: ({}, points) for kind, points in summary(args.source).items()}, title, args.out)
        return
    read, partial = read_results(args.results)
    up = gains(read)
    used = {suite for kind in COSTS for suite, _ in [*up, *costs(read, kind)]}
    few = {
        label: ", ".join(of for suite, of in suites.items() if of and suite in used)
        for label, suites in partial.items()
    }
    panels: dict[str, tuple[Points, Points]] = {}
    for kind in COSTS:
        right = costs(read, kind)
        ours = {
            f"{name}{' *' * bool(few[name])}": at for name, at in place(read, up, right).items()
        }
        if ours:
            panels[kind] = (ours, place(read_published(), up, right))
    if not panels:
        raise DataError("the results share no compositional suite with a cost; score some of both")
    title = "Composition: " + ", ".join(f"{suite} ({head})" for suite, head in up)
    title += "".join(f"\n* {label}: {of}" for label, of in few.items() if of)
    draw(panels, title, args.out)


if __name__ == "__main__":
    sys.exit(run_script(main, "plot_tradeoff.py"))

#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Draw every figure that the given results allow.

  python scripts/plot.py runs/ce-clip-seed-1 runs/ce-clip-seed-2 results --out figures
  python scripts/plot.py --published FSC-CLIP --out figures

An input is one of:
  results of evaluate.py   a folder with results.json (interpolate.py's too), or the file itself:
                           SUITE.png, accuracies with intervals and chance; tradeoff.png,
                           composition over zero-shot and over retrieval
  a run of train.py        its folder: thresholds.png and losses.png over steps
  a manifest               a .jsonl of negatives.py: negatives.png, captions and their negatives

Labels "NAME seed 1", "NAME seed 2" and folders NAME.1, NAME-seed-2 are one model: its mean is
drawn, with an interval over items and seeds (results) or the range over seeds (runs).
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from negatives import DataError, run_script, why

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,
}
GROUPS_IN_ROW = 8  # of bars
EDIT = "#C00000"
# Accuracy of guessing, in per cent, by row or its last word; "" is every other subset.
HALF = {"": 50.0}
PAIRS = {"text": 25.0, "image": 25.0, "group": 16.67}  # two images and two texts
CHANCE: dict[str, dict[str, float]] = {
    "valse": HALF,
    "vl_checklist": HALF,
    "sugarcrepe": HALF,
    "svo_probes": HALF,
    "winoground": PAIRS,
    "bivlc": PAIRS,
    "vismin": PAIRS,
    "eqben": PAIRS,
    "eqben_mini": PAIRS,
    "colorswap": PAIRS,
    "mmvp": PAIRS,
    "cola": PAIRS,
    "shapes": {"": 50, "zero-shot shape": 12.5, "zero-shot colour": 12.5},
    "aro": {"": 50, "COCO-Order": 20, "Flickr30k-Order": 20},
    "whatsup": {"": 50, "Controlled A": 25, "Controlled B": 25},
    "negbench": {"": 25},
    "imagecode": {"": 10},
}

Results = dict[str, dict[str, Any]]  # of evaluate.py, by label
Points = dict[str, tuple[float, float]]


class RunLog(NamedTuple):
    """The metrics of one run."""

    name: str  # without the seed
    seed: str
    lines: list[dict[str, float]]


# Reading


def read_results(paths: list[Path]) -> Results:
    """All results by label.

    Raises:
        DataError: a file is not a results.json, or two files have the same label.
    """
    read: Results = {}
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            for label, result in results.items():
                if label in read:
                    raise DataError(f"{path}: the label {label} is taken; score with --ckpt LABEL=")
                for table in result["suites"].values():
                    for part in ("subsets", "averages", "costs"):
                        for cell in table.setdefault(part, {}).values():
                            float(cell["accuracy"] or 0)
                read[label] = result
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: is no results.json of evaluate.py") from None
        if not results:
            raise DataError(f"{path}: holds no results; run evaluate.py --out again")
    return read


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a file of JSON lines, after its place FILE:LINE.

    Raises:
        DataError: names the malformed line.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({why(error)})") from None
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise DataError(f"{path}:{number}: is no JSON object")
        yield f"{path}:{number}", line


def read_run(folder: Path) -> RunLog:
    """The metrics of a run, and its seed by args.json.

    Raises:
        DataError: names the file and line that cannot be read.
    """
    path = folder / "metrics.jsonl"
    lines = list(read_lines(path))
    for place, line in lines:
        if not all(isinstance(line.get(key), (int, float)) for key in ("step", "loss")):
            raise DataError(f"{place}: holds no step and loss of train.py")
    if not lines:
        raise DataError(f"{path}: is empty; train at least --log-every steps")
    try:
        seed = str(
            json.loads((folder / "args.json").read_text(encoding="utf-8"))["options"]["seed"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        seed = ""
    name = folder.resolve().name
    found = re.fullmatch(rf"(.+?)[ ._-]+(seed[ ._-]*)?{seed}", name) if seed else None
    return RunLog(found[1] if found else name, seed, [line for _, line in lines])


def read_runs(folders: list[Path]) -> dict[str, list[RunLog]]:
    """Runs by name; the parent folder distinguishes two of the same name and seed."""
    runs = [read_run(folder) for folder in folders]
    keys = [run[:2] for run in runs]
    out: dict[str, list[RunLog]] = {}
    for run, folder in zip(runs, folders, strict=True):
        above = f"{folder.resolve().parent.name}/" if keys.count(run[:2]) > 1 else ""
        out.setdefault(above + run.name, []).append(run)
    return out


def sort_inputs(inputs: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """Files of results, folders of runs, manifests.

    Raises:
        DataError: an input that is none of them.
    """
    results, runs, manifests = [], [], []
    for path in inputs:
        if path.suffix == ".jsonl" and path.name != "metrics.jsonl" and path.is_file():
            manifests.append(path)
            continue
        if path.suffix == ".json" and path.is_file():
            results.append(path)
            continue
        folder = path.parent if path.name == "metrics.jsonl" else path
        found = [x for x in ("results.json", "results/results.json") if (folder / x).is_file()]
        if (folder / "metrics.jsonl").is_file():
            runs.append(folder)
        elif not found:
            raise DataError(
                f"{path}: is no run (metrics.jsonl), no results (results.json) and no manifest"
            )
        results += [folder / name for name in found[:1]]
    return results, runs, manifests


# Bars: accuracies of a suite


class Bar(NamedTuple):
    """A score of one model: mean over seeds, its 95 % interval, the seeds."""

    value: float
    low: float
    high: float
    seeds: list[float]


def model_of(label: str) -> str:
    """The label without its seed."""
    return re.sub(r"[ ._-]*\bseed[ ._-]*\d+$", "", label) or label


def over_seeds(cells: list[dict[str, Any]]) -> Bar:
    """One cell as it is; several as their mean, with the intervals of items and seeds joined."""
    from make_tables import spread

    values = [cell["accuracy"] for cell in cells]
    lows = [cell.get("low", cell["accuracy"]) for cell in cells]
    highs = [cell.get("high", cell["accuracy"]) for cell in cells]
    mean = statistics.mean(values)
    if len(cells) == 1:
        return Bar(mean, lows[0], highs[0], values)
    items = statistics.mean((high - low) / 2 for low, high in zip(lows, highs, strict=True))
    half = math.hypot(items, spread(values))
    return Bar(mean, max(0.0, mean - half), min(100.0, mean + half), values)


def bars_of(results: Results, suite: str, part: str) -> dict[str, dict[str, Bar]]:
    """Of each row the bar of each model that has it."""
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for label, result in results.items():
        for row, cell in result["suites"].get(suite, {}).get(part, {}).items():
            if cell["accuracy"] is not None:
                cells.setdefault(row, {}).setdefault(model_of(label), []).append(cell)
    return {
        row: {model: over_seeds(found) for model, found in models.items()}
        for row, models in cells.items()
    }


def chances(results: Results, suite: str) -> dict[str, float]:
    """The accuracy of guessing by row, in per cent: from the results, else from CHANCE."""
    known = CHANCE.get(suite, {})
    out: dict[str, float] = {}
    for result in results.values():
        for part in ("subsets", "costs"):
            for row, cell in result["suites"].get(suite, {}).get(part, {}).items():
                guess = known.get(row, known.get(row.rsplit(" ", 1)[-1]))
                guess = known.get("") if guess is None and part == "subsets" else guess
                guess = cell.get("chance", guess)
                if guess is not None:
                    out[row] = guess
    return out


def draw_suite(results: Results, suite: str, plt: Any) -> Any:
    """A figure of one suite: a row of axes for subsets, one for costs, or more if they are many."""
    models = list(dict.fromkeys(model_of(label) for label in results))
    rows: list[tuple[str, dict[str, dict[str, Bar]]]] = []
    for part in ("subsets", "costs"):
        found = list(bars_of(results, suite, part).items())
        title = f"{suite}: zero-shot and retrieval" if rows else suite
        for start in range(0, len(found), GROUPS_IN_ROW):
            more = " (continued)" * bool(start)
            rows.append((title + more, dict(found[start : start + GROUPS_IN_ROW])))
    if not rows:
        return None
    widest = max(len(table) for _, table in rows)
    size = (0.9 + max(3, widest) * max(0.95, 0.2 * len(models)), 0.5 + 2.3 * len(rows))
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(len(rows), max(3, widest))
    chance = chances(results, suite)
    width = 0.8 / len(models)
    shown: dict[str, Any] = {}
    for number, (title, table) in enumerate(rows):
        axis = figure.add_subplot(grid[number, : max(2, len(table))])
        for i, model in enumerate(models):
            hatch = "/" * (3 * (i // len(COLOURS)))
            own = [(j, bars[model]) for j, bars in enumerate(table.values()) if model in bars]
            places = [j + (i - (len(models) - 1) / 2) * width for j, _ in own]
            errors = [
                [bar.value - bar.low for _, bar in own],
                [b.high - b.value for _, b in own],
            ]
            colour = COLOURS[i % len(COLOURS)]
            axis.bar(
                places,
                [bar.value for _, bar in own],
                width * 0.92,
                color=colour,
                label=model,
                hatch=hatch,
                yerr=errors,
                error_kw={"elinewidth": 0.9, "capsize": 2},
            )
            for x, (_, bar) in zip(places, own, strict=True):
                if len(bar.seeds) > 1:
                    axis.plot(
                        [x] * len(bar.seeds), bar.seeds, "o", ms=2.5, mfc="w", mec="k", mew=0.5
                    )
        for j, row in enumerate(table):
            if row in chance:
                ends = (j - 0.46, j + 0.46)
                axis.plot(ends, [chance[row]] * 2, "k--", lw=1, label="chance", zorder=3)
        names = [textwrap.fill(row.replace("_", " "), 12) for row in table]
        axis.set_xticks(range(len(table)), names, fontsize=8)
        axis.tick_params(axis="x", length=0)
        axis.set(title=title, ylabel="per cent correct", ylim=(0, 103))
        axis.set_xlim(-0.55, max(2, len(table)) - 0.45)
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    order = [name for name in [*models, "chance"] if name in shown]
    name_models(figure, {name: shown[name] for name in order})
    return figure


def name_models(figure: Any, shown: dict[str, Any]) -> None:
    """A legend above the axes, in as many columns as the longest name leaves room for."""
    longest = max(map(len, shown), default=0)
    columns = max(1, min(len(shown), int(figure.get_figwidth() / (0.5 + 0.08 * longest))))
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=columns)


# Trade-off: composition over its costs


def figures_of(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by model and suite: subsets, averages and costs together, means over seeds."""
    read: dict[str, dict[str, dict[str, float]]] = {}
    for suite in {suite: 0 for result in results.values() for suite in result["suites"]}:
        for part in ("subsets", "averages", "costs"):
            for row, bars in bars_of(results, suite, part).items():
                for model, bar in bars.items():
                    read.setdefault(model, {}).setdefault(suite, {})[row] = bar.value
    return read


def shared(read: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    """Suite and row of the figures of this kind that all models have.

    Args:
        read: figures by model, suite and row.
        kind: "composition" (headlines of suites), "zero-shot" or "retrieval" (recalls at 1).
    """
    import evaluate

    heads = {suite: info.get("headline") for suite, info in evaluate.read_table("suites").items()}
    found = [
        (suite, row)
        for suite, rows in next(iter(read.values())).items()
        for row in rows
        if {
            "composition": row == heads.get(suite),
            "zero-shot": row.startswith("zero-shot ") and "mean" not in row,
            "retrieval": row.endswith("R@1") and "mean" not in row,
        }[kind]
    ]
    return [
        (suite, row)
        for suite, row in found
        if all(row in suites.get(suite, {}) for suites in read.values())
    ]


def place(read: dict[str, Any], up: list[tuple[str, str]], right: list[tuple[str, str]]) -> Points:
    """Plain means (right, up) of the models that have all figures."""
    points = {}
    for label, suites in read.items():
        means = []
        for names in (right, up):
            values = [suites.get(suite, {}).get(row) for suite, row in names]
            if values and None not in values:
                means.append(statistics.mean(values))
        if len(means) == 2:
            points[label] = (means[0], means[1])
    return points


def published_summary(source: str) -> dict[str, Points]:
    """The published summary of one source: composition against zero-shot and retrieval."""
    import evaluate

    models = evaluate.read_table("published")["tradeoff"]
    if source not in models:
        raise DataError(f"--published {source}: is none of {', '.join(models)}")
    rows = models[source].items()
    return {
        "zero-shot": {model: (x["zeroshot"], x["comp"]) for model, x in rows},
        "retrieval": {model: ((x["i2t"] + x["t2i"]) / 2, x["comp"]) for model, x in rows},
    }


def draw_tradeoff(results: Results, plt: Any) -> Any:
    """Our models filled, published ones hollow; None if models share no gain and cost scores."""
    import make_tables

    import evaluate

    read = figures_of(results)
    if not read:
        return None
    theirs: dict[str, dict[str, dict[str, float]]] = {}
    for suite in evaluate.SUITES:
        for (model, source), values in make_tables.published(suite).items():
            theirs.setdefault(f"{model} ({source})", {})[suite] = values
    up = shared(read, "composition")
    costs = {kind: shared(read, kind) for kind in ("zero-shot", "retrieval")}
    panels = {
        kind: (place(read, up, right), place(theirs, up, right))
        for kind, right in costs.items()
        if place(read, up, right)
    }
    used = {suite for names in (up, *costs.values()) for suite, _ in names}
    title = "Composition: " + ", ".join(f"{suite} ({row})" for suite, row in up)
    for label, result in results.items():
        few = make_tables.partly({x: table for x, table in result["suites"].items() if x in used})
        title += f"\n{label}: {few}" * bool(few)
    return draw_panels(panels, title, plt) if panels else None


def draw_panels(panels: dict[str, tuple[Points, Points]], title: str, plt: Any) -> Any:
    """One axes for each cost; a line joins the interpolations alpha_A of interpolate.py."""
    most = max(len(ours) + len(theirs) for ours, theirs in panels.values())
    size = (4.6 * len(panels), 3.6 + 0.08 * most)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (kind, (ours, theirs)) in zip(axes[0], panels.items(), strict=True):
        for (x, y), colour in itertools.chain(
            zip(ours.values(), itertools.cycle(COLOURS)), ((at, "none") for at in theirs.values())
        ):
            edge = "grey" if colour == "none" else colour
            axis.plot(x, y, "s" if colour == "none" else "o", color=edge, mfc=colour, zorder=3)
        mixes = [label for label in ours if re.fullmatch(r"alpha_[\d.]+", label)]
        mixes.sort(key=lambda label: float(label[6:]))
        axis.plot(*zip(*(ours[x] for x in mixes), strict=True), lw=1, c="grey") if mixes else None
        axis.margins(0.2)
        axis.grid(True, axis="both")
        axis.set(xlabel=f"{kind} (per cent)", ylabel="composition (per cent)")
    figure.suptitle(textwrap.fill(title, 100) if "\n" not in title else title, fontsize=8)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axis, (ours, theirs) in zip(axes[0], panels.values(), strict=True):
        label_points(axis, {**theirs, **ours})
    return figure


def label_points(axis: Any, points: Points) -> None:
    """Write each label at the nearest free position inside the axes."""
    box = axis.get_window_extent()
    at = {label: axis.transData.transform(point) for label, point in points.items()}
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in at.values()]
    for label, point in at.items():
        text = axis.text(0, 0, label, fontsize=7)
        extent = text.get_window_extent()
        width, height = extent.width + 2, extent.height + 2
        text.remove()
        lefts = range(int(box.x0) + 2, int(box.x1 - width) - 2, 6)
        lows = range(int(box.y0) + 2, int(box.y1 - height) - 2, 4)
        spots = [(x, y, x + width, y + height) for x, y in itertools.product(lefts, lows)]
        spots.sort(key=lambda spot: (distance(spot, point), abs(spot[0] + width / 2 - point[0])))
        spot = next((x for x in spots if not any(overlap(x, other) for other in taken)), spots[0])
        taken.append(spot)
        near = min((distance(spot, other) for key, other in at.items() if key != label), default=99)
        far = distance(spot, point) > min(16, 0.8 * near)
        axis.annotate(
            label,
            points[label],
            axis.transAxes.inverted().transform((spot[0] + 1, spot[1] + 1)),
            textcoords="axes fraction",
            fontsize=7,
            zorder=4,
            arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.7} if far else None,
        )


def distance(spot: Sequence[float], point: Sequence[float]) -> float:
    """From a point to the nearest edge of a rectangle (left, low, right, high), in pixels."""
    dx = max(spot[0] - point[0], 0, point[0] - spot[2])
    return math.hypot(dx, max(spot[1] - point[1], 0, point[1] - spot[3]))


def overlap(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether two rectangles share a point."""
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


# Runs: thresholds and loss parts over steps


def draw_lines(axis: Any, runs: list[RunLog], key: str, label: str, colour: str) -> None:
    """The mean over seeds of one metric, and its range where there are several."""
    values = [{line["step"]: line[key] for line in run.lines if key in line} for run in runs]
    values = [value for value in values if value]
    if not values:
        return
    steps = sorted(set.intersection(*(set(value) for value in values)))
    columns = [[value[step] for value in values] for step in steps]
    dot = "o" if len(steps) == 1 else ""  # a line of one point would not show
    means = [statistics.mean(x) for x in columns]
    axis.plot(steps, means, dot + "-", color=colour, label=label, lw=1.4, ms=4)
    if len(values) > 1:
        low, high = [min(x) for x in columns], [max(x) for x in columns]
        axis.fill_between(steps, low, high, color=colour, alpha=0.25, lw=0)


def draw_runs(
    runs: dict[str, list[RunLog]],
    panels: list[tuple[str, str, list[tuple[str, str, str]]]],
    plt: Any,
) -> Any:
    """Axes with (title, unit, lines of (name of runs, metric, label)), at most three in a row."""
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    count = math.ceil(len(panels) / columns)
    size = (max(4.5, 3.2 * columns), 0.5 + 2.5 * count)
    figure, axes = plt.subplots(count, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    shown: dict[str, Any] = {}
    labels = list(dict.fromkeys(label for _, _, lines in panels for _, _, label in lines))
    for axis, (title, unit, lines) in zip(axes.flat, panels, strict=False):
        for name, key, label in lines:
            draw_lines(axis, runs[name], key, label, COLOURS[labels.index(label) % len(COLOURS)])
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]) if title == "loss" else 0)
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    name_models(figure, shown)
    return figure


UNITS = {
    "itc": "nats",
    "imc": "nats",
    "cmr": "logits",
    "own": "nats",
    "distill": "squared distance",
    "caption": "nats a token",
}
NO_PARTS = {"step", "epoch", "grad_norm", "applied", "lr", "logit_scale", "images_per_second"}
NO_PARTS |= {"text_tokens_per_second", "memory_mib", "bad_images", "same_negatives"}


def run_panels(runs: dict[str, list[RunLog]]) -> dict[str, list[Any]]:
    """What draw_runs takes for thresholds (axes by run) and for loss parts (axes by part).

    A part that is off is logged as 0 at every step and left out.
    """
    keys: dict[str, list[str]] = {}
    for name, own in runs.items():
        lines = [line for run in own for line in run.lines]
        found = dict.fromkeys(key for line in lines for key in line)
        on = {key for key in found if any(line.get(key) for line in lines)}
        moves = any(key.startswith("threshold_") for key in on)
        keys[name] = [x for x in found if x in on or (moves and x.startswith("threshold_"))]
    title = {name: name + f" ({len(own)} seeds)" * (len(own) > 1) for name, own in runs.items()}
    thresholds = [
        (title[name], "threshold (logits)", [(name, key, key[10:]) for key in kinds])
        for name, found in keys.items()
        if (kinds := [key for key in found if key.startswith("threshold_")])
    ]
    every = dict.fromkeys(key for found in keys.values() for key in found if key not in NO_PARTS)
    parts = [
        (key, UNITS.get(key, key), [(name, key, title[name]) for name in runs if key in keys[name]])
        for key in every
        if not key.startswith("threshold_")
    ]
    return {"thresholds": thresholds, "losses": parts}


# Gallery: captions and their negatives


def pick_records(path: Path, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Records evenly spaced over a manifest, of those with a negative of every type if there are.

    Raises:
        DataError: a line is not a record, or no record has negatives.
    """
    records: list[dict[str, Any]] = []
    types: dict[str, None] = {}
    for spot, record in read_lines(path):
        if "manifest" not in record:
            made = record["negatives"] = record.get("negatives") or {}
            texts = [record.get("caption")]
            for wording in made.values() if isinstance(made, dict) else [0]:
                texts += wording if isinstance(wording, list) else [wording or ""]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(f"{spot}: is no record of a manifest (caption, negatives)")
            types |= dict.fromkeys(made)
            records += [record] if any(made.values()) else []
    every = [record for record in records if all(map(record["negatives"].get, types))]
    chosen = every if len(every) >= count else records
    if not chosen:
        raise DataError(f"{path}: holds no negatives; make them with negatives.py")
    count = min(count, len(chosen))
    return [chosen[i * len(chosen) // count] for i in range(count)], list(types)


def split_edit(caption: str, text: str, edits: Any = None) -> list[tuple[str, bool]]:
    """A negative in pieces, spaces kept, and whether each differs from the caption.

    The record's edits, if they give this text, say what was exchanged; else words are compared. An
    empty piece marks removed words.
    """
    pieces: list[tuple[str, bool]] = []
    end = 0
    try:
        for edit in edits or []:
            pieces += [(caption[end : edit["start"]], False), (edit["new"], True)]
            end = edit["end"]
        pieces.append((caption[end:], False))
        if "".join(piece for piece, _ in pieces) == text:
            return pieces
    except (KeyError, TypeError):  # edits of another kind
        pass
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", part) for part in (caption, text))
    codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [("".join(new[start:end]), kind != "equal") for kind, _, _, start, end in codes]


def wrap_pieces(pieces: list[tuple[str, bool]], width: int) -> list[list[tuple[int, str, bool]]]:
    """Lines of (column, text, marked), broken at spaces."""
    lines: list[list[tuple[int, str, bool]]] = [[]]
    column = 0
    for piece, marked in pieces:
        for word in re.findall(r"\s+|\S+", piece) or [""]:
            if column + len(word) > width and column and not word.isspace():
                lines.append([])
                column = 0
            lines[-1].append((column, word, marked))
            column += len(word)
    return lines


def draw_gallery(path: Path, count: int, plt: Any) -> Any:
    """Captions with their negatives, edits in red; a caret marks removed words."""
    records, types = pick_records(path, count)
    rows: list[tuple[str, list[tuple[int, str, bool]], bool]] = []
    for record in records:
        texts = [("caption", [(record["caption"], False)])]
        for kind in types:
            made = record["negatives"].get(kind)
            edits = record["edits"].get(kind) if isinstance(record.get("edits"), dict) else None
            for text in [made] if isinstance(made, str) else made or []:
                texts.append((kind, split_edit(record["caption"], text, edits)))
        for kind, pieces in texts:
            bold = kind == "caption"
            for line in wrap_pieces(pieces, 88):
                rows.append((kind, line, bold))
                kind = ""
    margin = max(len(kind) for kind, _, _ in rows) + 2
    columns = margin + max(line[-1][0] + len(line[-1][1]) for _, line, _ in rows if line)
    height = len(rows) + 0.6 * len(records)
    figure = plt.figure(figsize=(0.0755 * (columns + 2), 0.165 * (height + 1)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-1, columns + 1), ylim=(height + 0.5, -0.5))
    axis.axis("off")
    font = {"family": "monospace", "fontsize": 9, "va": "center"}
    y = -1.1
    for kind, line, bold in rows:
        y += 1.6 if kind == "caption" else 1
        axis.text(0, y, kind, color="0.5", **font)
        alone = sum(marked for _, _, marked in line) == 1
        for column, word, marked in line:
            mark = {
                "color": EDIT if marked else "k",
                "weight": "bold" if marked or bold else "normal",
            }
            axis.text(margin + column, y, word, **font, **mark)
            if marked and not word.strip() and alone:  # removed words
                axis.plot(margin + column - 0.5, y + 0.45, "^", ms=4, color=EDIT)
    return figure


# Items: what the models say of one image of each subset


def pick_items(path: Path, suite: str) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """An item of each subset of one image and two captions, with every model's scores.

    It is the subset's first whose image no subset before it shows.
    """
    picked: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    labels = list(json.loads(path.read_text(encoding="utf-8")))
    for label in labels:
        shown: dict[str, Any] = {}
        file = path.parent / "items" / (label if len(labels) > 1 else "") / f"{suite}.jsonl"
        for _, item in read_lines(file) if file.is_file() else ():  # a suite of costs has none
            pair = len(item["images"]) == 1 and len(item["texts"]) == 2
            if pair and item["subset"] not in shown and item["images"][0] not in shown.values():
                shown[item["subset"]] = item["images"][0]
                picked.setdefault(item["subset"], []).append((label, item))
    return picked


def draw_items(path: Path, suite: str, plt: Any) -> Any:
    """A strip of images, each with its caption, the hard negative and the cosines of both."""
    picked = list(pick_items(path, suite).items())[:GROUPS_IN_ROW]
    if not picked:
        return None
    from evaluate import Crop, load_image  # imports torch

    count = max(len(models) for _, models in picked)
    height = 2.55 + 0.14 * count  # inches: title and image 1.9, captions 0.65, a line each model
    figure, axes = plt.subplots(1, len(picked), figsize=(1.75 * len(picked), height), squeeze=False)
    figure.subplots_adjust(0.01, 1 - 1.9 / height, 0.99, 1 - 0.22 / height, wspace=0.06)
    for axis, (subset, models) in zip(axes[0], picked, strict=True):
        true, false = (textwrap.fill(text, 27) for text in models[0][1]["texts"])
        image = models[0][1]["images"][0]  # a path, or a path and a box
        axis.imshow(load_image(image if isinstance(image, str) else Crop(*image), 192))
        axis.set(title=subset, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        lines = [(0.06, true, "#00664A", "sans-serif"), (0.36, false, EDIT, "sans-serif")]
        for number, (label, item) in enumerate(models):
            one, two = item["scores"][0]
            text = f"{label:<9.9}{one:6.2f}{two:6.2f} {'right' if item['correct'] else 'wrong'}"
            lines.append((0.66 + 0.14 * number, text, "black", "monospace"))
        for inches, text, colour, family in lines:
            axis.annotate(
                text,
                (0, 0),
                xycoords="axes fraction",  # below the image, however high it is
                xytext=(0, -72 * inches),
                textcoords="offset points",
                fontsize=6.5,
                va="top",
                color=colour,
                family=family,
            )
    return figure


# The command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", type=Path, nargs="*", metavar="RESULTS", help="folders and files, see above")
    add("--out", type=Path, help="folder of the images (default: of the first input)")
    formats = ("png", "pdf", "svg")
    add("--format", choices=formats, default="png", help="file format of the images (default png)")
    add("--captions", type=int, default=8, help="captions in negatives.png (default 8)")
    sources = "also draw the published trade-off as this source averages it: FSC-CLIP or vl_compo"
    add("--published", metavar="SOURCE", help=sources)
    args = parser.parse_args(argv)
    if not args.inputs and not args.published:
        parser.error("name at least one folder or file with results, or --published SOURCE")
    if args.captions < 1:
        raise DataError(f"--captions {args.captions}: must be at least 1")
    if not args.inputs and not args.out:
        raise DataError("--published: without results there is no folder to write to; pass --out")
    return args


def main(argv: list[str] | None = None) -> None:
    """Read all inputs, then draw and write every figure."""
    args = parse_args(argv)
    paths, folders, manifests = sort_inputs(args.inputs)
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError("matplotlib is missing; pip install matplotlib")
    results, runs = read_results(paths), read_runs(folders)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(STYLE)
    figures: dict[str, Any] = {}
    with_items = len(paths) == 1 and (paths[0].parent / "items").is_dir()
    for suite in {suite: 0 for result in results.values() for suite in result["suites"]}:
        figures[suite] = draw_suite(results, suite, plt)
        if with_items:
            figures[f"{suite}-items"] = draw_items(paths[0], suite, plt)
    if results:
        figures["tradeoff"] = draw_tradeoff(results, plt)
    if args.published:
        panels: dict[str, tuple[Points, Points]] = {
            k: ({}, points) for k, points in published_summary(args.published).items()
        }
        title = f"Published: means as {args.published} takes them"
        figures[f"tradeoff-{args.published}"] = draw_panels(panels, title, plt)
    for name, panel in run_panels(runs).items():
        figures[name] = draw_runs(runs, panel, plt) if panel else None
    for path in manifests:
        name = "negatives" if len(manifests) == 1 else f"negatives-{path.stem}"
        figures[name] = draw_gallery(path, args.captions, plt)
    first = args.inputs[0] if args.inputs else Path()
    out = args.out or (first if first.is_dir() else first.parent)
    if not any(figures.values()):
        raise DataError(f"{first}: holds nothing to plot; every figure is missing or 0")
    for name, figure in figures.items():
        if figure is not None:
            image = out / f"{name}.{args.format}"
            try:
                out.mkdir(parents=True, exist_ok=True)
                figure.savefig(image)
            except OSError as error:
                raise DataError(f"--out {out}: cannot be written ({why(error)})") from None
            print(f"image: {image}")


if __name__ == "__main__":
    sys.exit(run_script(main, "plot.py"))

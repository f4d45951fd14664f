# SPDX-License-Identifier: MIT
"""Rebuild the README's result tables from the JSON that evaluate.py wrote, or judge such a JSON.

A table is the text between two comments, which is replaced:

  <!-- table: scripts/results/NAME.json SUITE -->
  <!-- end -->

SUITE is a suite of evaluate.py, "negatives" for a file of negatives_report.py --out, or "record"
for the JSON of record of a script of scripts/paper.

  python scripts/make_tables.py            # rewrite README.md and scripts/*.md
  python scripts/make_tables.py --check    # exit code 1 where a page differs

With --judge, as scripts/paper calls it, results are compared with published scores: paper /
independently measured / ours / difference / within tolerance; exit code 1 where a reproduced row
is outside.

  python scripts/make_tables.py --judge table3 --results results.json --labels CLIP,ce-clip \\
      --record record.json
"""

import argparse
import csv
import io
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make_tables.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with code 1 if a table of --file differs from its results",
    )
    text = "pages to rewrite (default: README.md and scripts/*.md, those with tables)"
    parser.add_argument("--file", type=Path, nargs="+", metavar="PAGE", help=text)
    add = parser.add_argument_group("judge").add_argument
    add(
        "--judge",
        metavar="TABLE",
        help="compare --results with the published scores of this group of suites, such as table3",
    )
    add("--results", type=Path, help="results.json of evaluate.py; a missing file means not run")
    add(
        "--labels",
        default="",
        help="comma list of the checkpoints in --results that belong to the table (default: none)",
    )
    add(
        "--world",
        choices=("coco", "shapes"),
        default="coco",
        help="data that the checkpoints were trained on; shapes has no published scores "
        "(default: coco)",
    )
    add("--record", type=Path, help="JSON file to write: every figure with its verdict")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help is answered before torch is imported

sys.path.insert(0, str(ROOT))
import evaluate
from data import DataError
from negatives import run_script

REFERENCE = ("CE-CLIP", "paper")  # the row from which differences are shown
SHORT = [("CLIP", "paper"), ("NegCLIP", "paper"), REFERENCE, ("CE-CLIP+", "paper")]
SHORT += [(model, "vl_compo") for model in ("CLIP", "NegCLIP", "CE-CLIP")]


def published(suite: str) -> dict[tuple[str, str], dict[str, float]]:
    """Published figures by (model, source), with the averages that follow from them.

    If only the mean of some subsets is printed, it is used for each of them in the averages.
    """
    info = evaluate.suite_info(suite)
    rows = {}
    for line in evaluate.read_table("published").get(suite, []):
        values = dict(line["values"])
        merged = line.get("merged", {})
        full = {
            x: value
            for name, value in merged.items()
            for x in evaluate.leaves(info["averages"][name])
        }
        full.update(values)
        for name, tree in evaluate.named_averages(suite, full).items():
            known = _known(tree, info["expected"])
            value = evaluate.average(tree, full, info["expected"]) if known else None
            if value is not None:
                values.setdefault(name, value)
        rows[line["model"], line["source"]] = values
    return rows


def _known(tree: Any, counts: dict[str, int]) -> bool:
    """Whether the numbers of items that the tree's weighted means need are known."""
    if isinstance(tree, dict):
        return all(name in counts for name in tree["items"])
    return isinstance(tree, str) or all(_known(member, counts) for member in tree)


def _shown(suite: str) -> dict[tuple[str, str], dict[str, float]]:
    rows = published(suite)
    short = {key: rows[key] for key in SHORT if key in rows}
    return short or dict([x for x in rows.items() if x[0][0] in ("CLIP", "NegCLIP", "CE-CLIP")])


def markdown(results: dict[str, dict[str, Any]], published_rows: bool = True) -> str:
    """One table for each suite: subsets, averages and costs down, checkpoints across.

    Also columns of the text-only baselines and, with `published_rows`, published scores with their
    source, and the difference of the last checkpoint from the paper's CE-CLIP where all items of
    the row were scored.
    """
    lines: list[str] = []
    for suite in next(iter(results.values()))["suites"]:
        scored = {label: result["suites"][suite] for label, result in results.items()}
        first, last = next(iter(scored.values())), list(scored)[-1]
        rows = {name for part in ("subsets", "averages", "costs") for name in first[part]}
        others = _shown(suite) if published_rows else {}
        others = {key: line for key, line in others.items() if rows.intersection(line)}
        blind = {key: first[key] for key in evaluate.READERS if key in first}
        best = [key for key in (REFERENCE, ("CE-CLIP", "vl_compo")) if key in others][:1]
        reference = others[best[0]] if best else {}
        head = ["", "items", *scored, *(evaluate.READERS[key] for key in blind)]
        head += [f"{last} - CE-CLIP ({best[0][1]})"] if best else []
        head += [f"{model} ({source})" for model, source in others]
        lines += ["", f"### {suite}: per cent correct [95 % interval]", "", *pipe(head)]
        lines += pipe(["---", *["---:"] * (len(head) - 1)])
        for part in ("subsets", "averages", "costs"):
            if part == "costs" and first["costs"] and first["subsets"]:
                lines += pipe(["*costs*", *[""] * (len(head) - 1)])
            for name, cell in first[part].items():
                ours = [_cell_text(result[part][name]) for result in scored.values()]
                line = [f"**{name}**" if part == "averages" else name, _count(cell), *ours]
                few = "*" if cell["scored"] < FEW else ""
                read = [_figure(reader.get(name)) for reader in blind.values()]
                line += [figure and figure + few for figure in read]
                mine = scored[last][part][name]
                whole = mine["scored"] and mine["scored"] == mine.get("expected")
                gain = mine["accuracy"] - reference[name] if whole and name in reference else None
                line += [_figure(gain, "+")] if reference else []
                lines += pipe([*line, *(_figure(column.get(name)) for column in others.values())])
        counts = [first["subsets"][name]["scored"] for reader in blind.values() for name in reader]
        if min(counts, default=FEW) < FEW:
            lines += ["", f"* texts only on fewer than {FEW} items: too few to tell"]
        lines += _remarks(suite, scored)
    for suite, why in _left_out(results).items():
        lines += ["", f"Left out: {suite}: {why}"]
    return "\n".join(lines).strip() + "\n"


def _left_out(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    return next(iter(results.values())).get("left_out", {})


ABSENT = "--"  # no scored items
FEW = 100  # items, below which a text-only baseline is not informative


def _cell_text(score: dict[str, Any]) -> str:
    if score["accuracy"] is None:
        return ABSENT
    seen = f", {score['seen']} seen" if score.get("seen") else ""
    return f"{score['accuracy']:.1f} [{score['low']:.1f}, {score['high']:.1f}]{seen}"


def _count(cell: dict[str, Any]) -> str:
    expected = cell.get("expected", cell["scored"])
    of = f" of {'?' if expected is None else expected}"
    return str(cell["scored"]) + ("" if cell["scored"] == expected else of)


def _figure(value: float | None, sign: str = "") -> str:
    return "" if value is None or math.isnan(value) else f"{value:{sign}.1f}"


def partly(suites: dict[str, Any]) -> str:
    """Which suites of a model were scored in part only: "NAME N of M, ..."; or an empty string."""
    found = []
    for name, table in suites.items():
        cells = {
            evaluate.counted_row(row, part): cell
            for part in ("subsets", "costs")
            for row, cell in table[part].items()
        }
        total = evaluate.total_cell(list(cells.values()))
        if total["scored"] != total["expected"]:
            found.append(f"{name} {_count(total)}")
    return ", ".join(found)


def _remarks(suite: str, scored: dict[str, Any]) -> list[str]:
    """Remarks below a table: ties, notes, overlap with training data, paired tests."""
    info = evaluate.suite_info(suite)
    rows = {name: {**s["subsets"], **s["costs"]} for name, s in scored.items()}
    ties = {name: sum(cell["ties"] for cell in cells.values()) for name, cells in rows.items()}
    rule = next(iter(scored.values())).get("tie_rule", "wrong")
    lines = ["", f"Ties ({rule}): " + ", ".join(f"{name} {count}" for name, count in ties.items())]
    for note in (*next(iter(scored.values()))["notes"], info.get("leak")):
        lines += ["", f"Note: {note}"] if note else []
    for name, result in scored.items():
        lines += ["", f"{name}: {result['seen']}"] if "seen" in result else []
    for name, result in scored.items():
        for other, table in result.get("versus", {}).items():
            title = ["", "difference [95 %]", f"only {name}", f"only {other}", "McNemar p"]
            lines += ["", f"{name} - {other}, paired on the same items:", ""]
            lines += [*pipe(title), *pipe(["---", *["---:"] * 4])]
            for row, x in table.items():
                bounds = "" if x["low"] is None else f" [{x['low']:+.1f}, {x['high']:+.1f}]"
                change = f"{x['difference']:+.1f}{bounds}"
                lines += pipe([row, change, str(x["gained"]), str(x["lost"]), f"{x['p']:.2g}"])
    return lines


TABLE_1 = ["aro", "valse"]  # of the paper: one table


def latex(results: dict[str, dict[str, Any]]) -> str:
    """Tables of booktabs in the papers' column order: published rows, then ours.

    Each has a caption and a label. A star marks scores of incomplete rows; a note below the table
    gives the numbers of items.
    """
    suites = list(next(iter(results.values()))["suites"])
    one = [suite for suite in TABLE_1 if suite in suites]
    tables = [[suite] for suite in suites if suite not in one] if one else [[x] for x in suites]
    blocks = [r"% needs \usepackage{booktabs}"]
    blocks += [_tabular(names, results) for names in ([one, *tables] if one else tables)]
    blocks += [f"% left out: {suite}: {why}" for suite, why in _left_out(results).items()]
    return "\n\n".join(blocks) + "\n"


def _tabular(suites: list[str], results: dict[str, dict[str, Any]]) -> str:
    """One table; columns and published rows that would be empty are left out."""
    theirs: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    ours: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for suite in suites:
        for key, values in published(suite).items():
            theirs[key].update((f"{suite} {row}", _figure(x)) for row, x in values.items())
        for label, result in results.items():
            table = result["suites"][suite]
            for row, cell in {**table["subsets"], **table["averages"], **table["costs"]}.items():
                if cell["accuracy"] is not None:
                    star = "" if cell["scored"] == cell["expected"] else "$^*$"
                    ours[label, "ours"][f"{suite} {row}"] = _figure(cell["accuracy"]) + star
    filled = set().union(*theirs.values(), *ours.values())
    columns = [x for suite in suites for x in _columns(suite, results) if x[0] in filled]
    rows = {key: [line.get(name, ABSENT) for name, _, _ in columns] for key, line in theirs.items()}
    lines = [r"\begin{tabular}{ll" + "r" * len(columns) + "}", r"\toprule", *_heads(columns)]
    body = [[*key, *cells] for key, cells in rows.items() if set(cells) != {ABSENT}]
    lines += [*map(_tex_row, body), *([r"\midrule"] if body else [])]
    parts: dict[str, list[str]] = defaultdict(list)
    for label, result in results.items():
        line = ours[label, "ours"]
        lines += [_tex_row([label, "ours", *(line.get(name, ABSENT) for name, _, _ in columns)])]
        parts[partly({suite: result["suites"][suite] for suite in suites})].append(label)
    lines += [r"\bottomrule", r"\end{tabular}"]
    names = ", ".join(suites)
    notes = [f"{part} items ({', '.join(labels)})" for part, labels in parts.items() if part]
    if notes:
        lines += ["", rf"\smallskip\footnotesize $^*$ {_tex('; '.join(notes))}"]
    caption = rf"\caption{{{_tex(names)}: per cent correct.}}"
    label = rf"\label{{tab:{'-'.join(suites).replace('_', '-')}}}"
    start = [f"% {names}", r"\begin{table}", r"\centering", caption, label]
    return "\n".join([*start, *lines, r"\end{table}"])


def _columns(suite: str, results: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, head and group of each column, in the paper's order where it has a table."""
    given = evaluate.suite_info(suite).get("columns")
    if given:
        return [(f"{suite} {row}", head, group) for row, head, group in given]
    first = next(iter(results.values()))["suites"][suite]
    rows = [*first["subsets"], *first["averages"], *first["costs"]]
    columns = []
    for row in rows:
        verdict = evaluate.verdict_of(row)
        group = evaluate.counted_row(row, "subsets") if verdict else ""
        columns.append((f"{suite} {row}", verdict or row, group))
    return columns


def _heads(columns: list[tuple[str, str, str]]) -> list[str]:
    """The heads of the columns, under those of their groups."""
    above, rules, start = ["", ""], "", 3
    for group, members in itertools.groupby(columns, key=lambda column: column[2]):
        end = start + len(list(members)) - 1
        above.append(rf"\multicolumn{{{end - start + 1}}}{{c}}{{{_tex(group)}}}")
        rules += rf"\cmidrule(lr){{{start}-{end}}}" if group else ""
        start = end + 1
    heads = [_tex_row(["Model", "Source", *(head for _, head, _ in columns)]), r"\midrule"]
    return [" & ".join(above) + r" \\", rules, *heads] if rules else heads


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(cell if cell.endswith("$^*$") else _tex(cell) for cell in cells) + r" \\"


def _tex(text: str) -> str:
    """Text with LaTeX's own characters escaped."""
    marks = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    return re.sub(r"[_&%#${}\\^~]", lambda m: marks.get(m[0], "\\" + m[0]), text)


def long_csv(results: dict[str, dict[str, Any]]) -> str:
    """Every figure on a line of its own, ours and the published ones."""
    out = io.StringIO()
    keys = ["accuracy", "low", "high", "scored", "expected", "ties"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["suite", "model", "source", "part", "row", *keys])
    for suite in next(iter(results.values()))["suites"]:
        for label, result in results.items():
            for part in ("subsets", "averages", "costs"):
                for row, cell in result["suites"][suite][part].items():
                    figures = [cell.get(key, "") for key in keys]
                    writer.writerow([suite, label, "ours", part, row, *figures])
        for (model, source), values in published(suite).items():
            for row, value in values.items():
                writer.writerow([suite, model, source, "published", row, round(value, 2)])
    for suite in _left_out(results):
        for label in results:
            writer.writerow([suite, label, "ours", "left out", "", "", "", "", 0])
    return out.getvalue()


WIDTH = 120  # columns of a terminal


def show(table: str) -> str:
    """Align the markdown for a terminal; wide tables are split, repeating the first column."""
    shown: list[str] = []
    block: list[list[str]] = []
    for line in [*table.splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        shown += _line_up(block)
        block = []
        shown += textwrap.wrap(line, WIDTH, break_long_words=False) or [""]
    return "\n".join(shown).rstrip()


def _line_up(block: list[list[str]]) -> list[str]:
    """A table's rows in columns of equal width, cut into parts of at most WIDTH."""
    first, *sizes = [max(map(len, column)) for column in zip(*block, strict=True)] or [0]
    parts: list[list[int]] = []
    room = 0
    for column, size in enumerate(sizes, 1):
        if size + 2 > room or not parts:
            parts.append([])
            room = WIDTH - first
        parts[-1].append(column)
        room -= size + 2
    shown: list[str] = []
    for columns in parts:
        shown += [""] if shown else []
        for cells in block:
            if cells[0] == "---":
                shown.append("  ".join("-" * n for n in (first, *(sizes[c - 1] for c in columns))))
                continue
            rest = [cells[c].rjust(sizes[c - 1]) for c in columns]
            shown.append("  ".join([cells[0].ljust(first), *rest]).rstrip())
    return shown


def pipe(cells: list[str]) -> list[str]:
    """A row of a markdown table."""
    return ["| " + " | ".join(cells) + " |"]


BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def make_table(path: Path, suite: str) -> str:
    """The markdown of one suite, without its heading.

    Raises:
        DataError: the file is missing, or holds no results of this suite.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not results:
            raise KeyError
        if suite == "record":
            return record_table(results)
        if suite == "negatives":
            import negatives_report

            return negatives_report.markdown(results)
        for result in results.values():
            scores = result["suites"][suite]
            scores.pop("versus", None)  # comparisons of pairs are for results.md
            result["suites"] = {suite: scores}
            result.pop("left_out", None)
        table = markdown(results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        makers = {"negatives": "scripts/negatives_report.py --out", "record": "scripts/paper"}
        made = makers.get(suite, f"evaluate.py --suite {suite} --out")
        raise DataError(f"{path}: holds no results of {suite}; run {made} again") from None
    return table.split("\n", 2)[2]


def record_table(record: dict[str, Any]) -> str:
    """Models down, figures across, each the mean over seeds and half of its interval.

    Averages, R@5 and R@10 are left out.
    """
    parts = [x for x in record["rows"] if not re.search(r"\bmean\b|R@(5|10)$", x["row"])]
    rows = list(dict.fromkeys(x["row"] for x in parts))
    cells = {(x["name"], x["row"]): x for x in parts}
    lines = pipe(["", *rows]) + pipe(["---", *["---:"] * len(rows)])
    for name in dict.fromkeys(x["name"] for x in parts):
        own = [cells[name, row] for row in rows]
        lines += pipe([name, *(f"{x['ours']:.1f} ± {half_width(x):.1f}" for x in own)])
    return "\n".join(lines) + "\n"


def half_width(x: dict[str, Any]) -> float:
    """Half of a figure's interval."""
    return max(x["high"] - x["ours"], x["ours"] - x["low"])


def fill(text: str, base: Path) -> str:
    """Replace every table."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{make_table(base / m[2], m[3])}\n{m[5]}", text)


def check_marks(text: str, path: Path) -> None:
    """Refuse a table mark without an end mark: all text up to the next end mark would be lost."""
    opened = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("<!-- table: "):
            if opened:
                raise DataError(f"{path}:{opened}: this table has no <!-- end -->; add it")
            opened = number
        elif line == "<!-- end -->":
            opened = 0
    if opened:
        raise DataError(f"{path}:{opened}: this table has no <!-- end -->; add it")


RULE = (
    "Ours: mean over seeds; its 95 % interval joins that of the items (bootstrap) and that of the "
    "seeds (Student's t). Published figures come without one and were read on the same items, so "
    "they get that of our items. Tolerance: both in quadrature, plus 0.05 for rounding. Within: no "
    "further than that from the paper's figure, an independent one, or what lies between."
)
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 2 to 10 seeds
ARO_MEAN = "mean of VG-Relation and VG-Attribution"  # what figure 5a shows, as far as we can tell


def judge_table(
    table: str, world: str, results: dict[str, Any], labels: list[str]
) -> list[dict[str, Any]]:
    """Compare every score of a table with the published scores of the same model.

    Args:
        table: the name of a script of scripts/paper, a group of suites in evaluate.py.
        world: "coco" or "shapes"; shapes has no published scores.
        results: what evaluate.py wrote, by label; empty if it could not run.
        labels: of the checkpoints that belong to the table, "NAME" or "NAME seed N".

    Returns:
        one record for each suite, row and name, with a `verdict`.
    """
    seeds: dict[str, list[str]] = {}
    for label in labels:
        seeds.setdefault(label.split(" seed ")[0], []).append(label)
    right = any(result.get("model") == ROWS["of"] for result in results.values())
    records = []
    for suite in evaluate.GROUPS[table] if world == "coco" else ["shapes"]:
        for name, own in seeds.items():
            tables = [results.get(label, {}).get("suites", {}).get(suite) for label in own]
            done = [table for table in tables if table]
            known = of_model(suite, table, name) if world == "coco" else {}
            rows = [row for line in known.values() for row in line]
            rows = rows or [row for scored in done[:1] for part in PARTS for row in scored[part]]
            kind = ROWS.get(name, ["", "shown"])[1] if right and "base" not in seeds else "shown"
            records += [
                {"suite": suite, "row": row, "name": name, **judge_row(row, known, done, kind)}
                for row in in_order(suite, rows)
            ]
    return records


PARTS = ("subsets", "averages", "costs")
ROWS = evaluate.read_table("published")["rows"]


def of_model(suite: str, table: str, name: str) -> dict[str, dict[str, float]]:
    """published scores by source of the model or curve of figure 5 that `name` is judged by."""
    if table == "figure5":
        figure = evaluate.read_table("published")["figure5"]
        recipe, _, epoch = name.partition(" epoch ")
        at_end = [None] * (len(figure["a"]["ce-clip"]) - 1) + [figure["c"].get(recipe)]
        value = dict(enumerate(figure["a"].get(recipe, at_end), 1)).get(int(epoch))
        return {"paper, Figure 5 (read off)": {ARO_MEAN: value}} if value else {}
    model = ROWS.get(name, [""])[0]
    return {source: line for (who, source), line in published(suite).items() if who == model}


def in_order(suite: str, rows: list[str]) -> list[str]:
    """Each row once, in the order of the paper's columns, then the others."""
    first = [column[0] for column in evaluate.suite_info(suite).get("columns", [])]
    first += evaluate.suite_info(suite)["expected"]
    return sorted(dict.fromkeys(rows), key=[*first, *rows].index)


def judge_row(
    row: str, known: dict[str, dict[str, float]], scored: list[dict[str, Any]], kind: str
) -> dict[str, Any]:
    """One figure of one model, over its seeds, beside the published ones.

    Args:
        row: a subset, an average or a cost.
        known: published figures by source.
        scored: the suite's tables of each seed.
        kind: "both", "least" or "shown", see `rows` of published.json.
    """
    published = {source: line[row] for source, line in known.items() if row in line}
    papers = [value for source, value in published.items() if source.startswith(OWN)]
    others = {s: value for s, value in published.items() if not s.startswith(OWN)}
    out: dict[str, Any] = {"paper": papers[0] if papers else None, "independent": others}
    cells = [part[row] for table in scored for key in PARTS if row in (part := table[key])]
    cells = [cell for cell in cells if cell["accuracy"] is not None]
    if not cells:
        return {**out, "ours": None, "verdict": "not run"}
    values = [cell["accuracy"] for cell in cells]
    items = statistics.mean((cell["high"] - cell["low"]) / 2 for cell in cells)
    half = math.hypot(items, spread(values))
    ours = statistics.mean(values)
    bounds = {"low": max(0.0, ours - half), "high": min(100.0, ours + half)}
    out |= {"ours": ours, **bounds, "seeds": values, "cells": cells}
    out |= {"scored": cells[0]["scored"], "expected": cells[0].get("expected")}
    tolerance = math.hypot(half, items) + 0.05
    out |= {"tolerance": tolerance, "verdict": "shown"}
    if published:
        low, high = min(published.values()), max(published.values())
        out["difference"] = ours - (papers or list(published.values()))[0]
        within = low - tolerance <= ours <= (math.inf if kind == "least" else high + tolerance)
        partly = out["scored"] and out["scored"] != out["expected"]
        if partly:
            out["verdict"] = f"{out['scored']} of {out['expected']} items, not judged"
        elif kind != "shown":
            out["verdict"] = "within" if within else "OUTSIDE"
    return out


OWN = ("paper", "project page")


def spread(values: list[float]) -> float:
    """Half of the 95 % interval of the mean over seeds; 0 for one seed."""
    n = len(values)
    return T_95[min(n, 10) - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0


def judgement(records: list[dict[str, Any]]) -> str:
    """The records as markdown: one table for each suite."""
    lines: list[str] = []
    for suite in dict.fromkeys(record["suite"] for record in records):
        mine = [record for record in records if record["suite"] == suite]
        shown = [record for record in mine if record["paper"] or record["independent"]]
        lines += ["", f"### {suite}: held to what is published" if shown else f"### {suite}", ""]
        lines += beside(shown) if shown else over_seeds(mine)
    return "\n".join(lines).strip() + "\n"


def beside(records: list[dict[str, Any]]) -> list[str]:
    """Paper, independent measurements, ours, difference, tolerance, verdict."""
    head = ["", "row", "paper", "independently measured", "ours", "difference", "tolerance", ""]
    lines = [*pipe(head), *pipe(["---", "---", *["---:"] * 5, "---"])]
    for x in records:
        others = ", ".join(f"{value:.1f} ({source})" for source, value in x["independent"].items())
        cells = [x["name"], x["row"], "--" if x["paper"] is None else f"{x['paper']:.1f}", others]
        if x["ours"] is None:
            cells += ["not run", "", ""]
        else:
            cells += [interval(x), f"{x['difference']:+.1f}", f"{x['tolerance']:.1f}"]
        lines += pipe([*cells, x["verdict"] if x["ours"] is not None else ""])
    return lines


def over_seeds(records: list[dict[str, Any]]) -> list[str]:
    """Rows down, models across, mean and interval over seeds."""
    names = list(dict.fromkeys(x["name"] for x in records))
    cells = {(x["row"], x["name"]): interval(x) for x in records if x["ours"] is not None}
    lines = [*pipe(["", *names]), *pipe(["---", *["---:"] * len(names)])]
    for row in dict.fromkeys(x["row"] for x in records):
        lines += pipe([row, *(cells.get((row, name), "not run") for name in names)])
    return lines


def interval(x: dict[str, Any]) -> str:
    """A figure with its interval."""
    return f"{x['ours']:.1f} [{x['low']:.1f}, {x['high']:.1f}]"


def run_judge(args: argparse.Namespace) -> int:
    """Print the judgement and write the record; 1 if a reproduced row is outside."""
    if args.record is None or (args.world == "coco" and args.judge not in evaluate.GROUPS):
        raise DataError(
            f"--judge {args.judge}: wants --record and one of {', '.join(evaluate.GROUPS)}"
        )
    results: dict[str, Any] = {}
    if args.results and args.results.is_file():
        try:
            results = json.loads(args.results.read_text(encoding="utf-8"))
            records = judge_table(args.judge, args.world, results, args.labels.split(","))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"--results {args.results}: holds no results ({error!r})") from None
    else:
        records = judge_table(args.judge, args.world, {}, args.labels.split(","))
    made = {
        label: {key: value for key, value in result.items() if key != "suites"}
        for label, result in results.items()
    }
    count = dict.fromkeys(("within", "OUTSIDE", "shown", "in part", "not run"), 0)
    for record in records:
        count["in part" if record["verdict"].endswith("not judged") else record["verdict"]] += 1
    summary = f"{args.judge}: " + ", ".join(f"{n} {verdict}" for verdict, n in count.items())
    content = {"table": args.judge, "world": args.world, "summary": summary, "rule": RULE}
    args.record.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**content, "made": made, "count": count, "rows": records}, indent=1)
    evaluate.write_text(args.record, text + "\n")
    print(show(judgement(records)))
    print(f"\n{RULE}\n{summary}\nrecord: {args.record}")
    return int(count["OUTSIDE"] > 0)


def main(argv: list[str] | None = None) -> None:
    """Rewrite the pages, or print which tables differ."""
    args = parse_args(argv)
    pages = [ROOT / "README.md", *sorted((ROOT / "scripts").glob("*.md"))]
    if args.judge:
        sys.exit(run_judge(args))
    given = args.file or [page for page in pages if BLOCK.search(page.read_text("utf-8"))]
    same = [refresh(page, args.check) for page in given]
    sys.exit(int(not all(same)))


def refresh(page: Path, check: bool) -> bool:
    """Rewrite the tables of a page, or print how they differ; returns whether they are current."""
    try:
        old = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {page}: cannot be read ({error})") from None
    check_marks(old, page)
    new, count = fill(old, ROOT), len(BLOCK.findall(old))
    if not count:
        raise DataError(f"{page}: holds no table between <!-- table: FILE SUITE --> marks")
    if not check:
        evaluate.write_text(page, new)
        print(f"{count} tables written to {page}")
    elif new != old:
        was, now = (set(text.splitlines()) for text in (old, new))
        print(f"{page}: tables differ from scripts/results; run scripts/make_tables.py")
        print("\n".join(f"- {line}" for line in sorted(was - now)[:5]))
        print("\n".join(f"+ {line}" for line in sorted(now - was)[:5]))
        return False
    else:
        print(f"{count} tables of {page} are as scripts/results has them")
    return True


if __name__ == "__main__":
    sys.exit(run_script(main, "make_tables.py"))

# SPDX-License-Identifier: MIT
"""Rebuild the README's result tables from the JSON that evaluate.py wrote, or judge such a JSON.

A table stands between two comments; what is between them is replaced:

  <!-- table: scripts/results/NAME.json SUITE -->
  <!-- end -->

SUITE is a suite of evaluate.py, or "negatives" for a file of negatives_report.py --out.

  python scripts/make_tables.py            # rewrite README.md
  python scripts/make_tables.py --check    # exit code 1 where the README differs

With --judge, as scripts/paper calls it, results are held to published figures: paper /
independently measured / ours / difference / within tolerance; exit code 1 where a reproduced row
is outside.

  python scripts/make_tables.py --judge table3 --results results.json --labels CLIP,ce-clip \\
      --record record.json
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import negatives_report

import evaluate
from data import DataError
from negatives import run_script

ROOT = Path(__file__).resolve().parents[1]
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
        if suite == "negatives":
            return negatives_report.markdown(results)
        for result in results.values():
            scores = result["suites"][suite]
            scores.pop("versus", None)  # comparisons of pairs are for results.md
            result["suites"] = {suite: scores}
            result.pop("left_out", None)
        table = evaluate.markdown(results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        made = "negatives_report.py" if suite == "negatives" else f"evaluate.py --suite {suite}"
        raise DataError(f"{path}: holds no results of {suite}; run {made} --out again") from None
    return table.split("\n", 2)[2]


def fill(text: str, base: Path) -> str:
    """Put every table into its place."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{make_table(base / m[2], m[3])}\n{m[5]}", text)


def check_marks(text: str, path: Path) -> None:
    """Refuse a table mark whose end is missing: what stands up to the next end would be lost."""
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


def judge(
    table: str, world: str, results: dict[str, Any], labels: list[str]
) -> list[dict[str, Any]]:
    """Hold every figure of a table to what is published of the same model.

    Args:
        table: the name of a script of scripts/paper, a group of suites in evaluate.py.
        world: "coco" or "shapes"; nothing is published of shapes.
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
                {"suite": suite, "row": row, "name": name, **compare(row, known, done, kind)}
                for row in in_order(suite, rows)
            ]
    return records


PARTS = ("subsets", "averages", "costs")
ROWS = evaluate.read_table("published")["rows"]


def of_model(suite: str, table: str, name: str) -> dict[str, dict[str, float]]:
    """Published figures by source, of the model or the curve of figure 5 that a name is held to."""
    if table == "figure5":
        figure = evaluate.read_table("published")["figure5"]
        recipe, _, epoch = name.partition(" epoch ")
        at_end = [None] * (len(figure["a"]["ce-clip"]) - 1) + [figure["c"].get(recipe)]
        value = dict(enumerate(figure["a"].get(recipe, at_end), 1)).get(int(epoch))
        return {"paper, Figure 5 (read off)": {ARO_MEAN: value}} if value else {}
    model = ROWS.get(name, [""])[0]
    return {
        source: line for (who, source), line in evaluate.published(suite).items() if who == model
    }


def in_order(suite: str, rows: list[str]) -> list[str]:
    """Each row once, in the order of the paper's columns, then the rest as they are."""
    first = [column[0] for column in evaluate.read_table("suites")[suite].get("columns", [])]
    first += evaluate.read_table("suites")[suite]["expected"]
    return sorted(dict.fromkeys(rows), key=[*first, *rows].index)


def compare(
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
    out |= {"ours": ours, **bounds, "seeds": values}
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


def pipe(cells: list[str]) -> list[str]:
    """A row of a markdown table."""
    return ["| " + " | ".join(cells) + " |"]


def run_judge(args: argparse.Namespace) -> int:
    """Print the judgement and write the record; 1 if a reproduced row is outside."""
    if args.judge not in evaluate.GROUPS or args.record is None:
        raise DataError(
            f"--judge {args.judge}: wants --record and one of {', '.join(evaluate.GROUPS)}"
        )
    results: dict[str, Any] = {}
    if args.results and args.results.is_file():
        try:
            results = json.loads(args.results.read_text(encoding="utf-8"))
            records = judge(args.judge, args.world, results, args.labels.split(","))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"--results {args.results}: holds no results ({error!r})") from None
    else:
        records = judge(args.judge, args.world, {}, args.labels.split(","))
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
    print(evaluate.show(judgement(records)))
    print(f"\n{RULE}\n{summary}\nrecord: {args.record}")
    return int(count["OUTSIDE"] > 0)


def main(argv: list[str] | None = None) -> None:
    """Rewrite the file, or say which tables differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md", help="default README.md")
    add = parser.add_argument_group("judge").add_argument
    add("--judge", metavar="TABLE", help="hold --results to what is published; a group of suites")
    add("--results", type=Path, help="results.json of evaluate.py; missing means not run")
    add("--labels", default="", help="comma list of the checkpoints that belong to the table")
    add("--world", choices=("coco", "shapes"), default="coco", help="default coco")
    add("--record", type=Path, help="JSON to write: every figure with its verdict")
    args = parser.parse_args(argv)
    if args.judge:
        sys.exit(run_judge(args))
    try:
        old = args.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {args.file}: cannot be read ({error})") from None
    check_marks(old, args.file)
    new = fill(old, ROOT)
    count = len(BLOCK.findall(old))
    if not count:
        raise DataError(f"{args.file}: holds no table between <!-- table: FILE SUITE --> marks")
    if not args.check:
        evaluate.write_text(args.file, new)
        print(f"{count} tables written to {args.file}")
    elif new != old:
        was, now = (set(text.splitlines()) for text in (old, new))
        print(f"{args.file}: tables differ from scripts/results; run scripts/make_tables.py")
        print("\n".join(f"- {line}" for line in sorted(was - now)[:5]))
        print("\n".join(f"+ {line}" for line in sorted(now - was)[:5]))
        sys.exit(1)
    else:
        print(f"{count} tables of {args.file} are as scripts/results has them")


if __name__ == "__main__":
    sys.exit(run_script(main, "make_tables.py"))

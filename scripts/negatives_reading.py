# SPDX-License-Identifier: MIT
"""Let readers judge negatives blind: sheets that hide who made each one, and counts of the marks.

  python scripts/negatives_reading.py sheets negatives.jsonl --against released.jsonl \
      --sugarcrepe DIR --out reading
  python scripts/negatives_reading.py count reading --out scripts/results/negatives_reading.json

``sheets`` writes reading/TYPE.txt for each type, a GUIDE.txt for the readers, and key.json, which
readers must not see.  A reader writes reading/TYPE.marks, a line "#item<TAB>label<TAB>reason" for
each faulty item, its labels joined by "|".  ``count`` says how many of each maker's negatives got
each label, with Wilson's interval.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from negatives_report import read_manifest

from negatives import NEGATIVE_TYPES, DataError

LABELS = ("mechanical", "odd", "true")
FIELDS = ("caption", "negative_caption")
SUGARCREPE = {  # its files; relations and acts share one
    "relation": "replace_rel.json",
    "attribute": "replace_att.json",
    "object": "replace_obj.json",
    "action": "replace_rel.json",
}
GUIDE = """\
Each item has the other captions of a photo, a caption, and a sentence derived from it by a small
change.  The sentence is meant to be false of the photo and otherwise normal.  Judge the change
alone, not what was wrong with the caption before.  Read every item yourself, and write one line
for each faulty one into TYPE.marks: #item, a tab, the label, a tab, the reason in a few words.

mechanical  nothing really changed, or there is a non-word, a doubled word, broken grammar.
odd         not as a fluent writer of captions would put it: a wrong preposition or article, a verb
            that does not fit its object, a nonsense collocation, or so absurd that nobody would
            write it even of a staged photo.  Merely unlikely scenes in good English are not odd.
true        going by all the captions the sentence most likely still holds of the photo.
"""


class Item(NamedTuple):
    """A negative to be judged."""

    maker: str
    image: str
    caption: str
    sentence: str


def read_negatives(path: Path) -> list[dict[str, Any]]:
    """Records of a manifest that carry negatives, each with a photo.

    Raises:
        DataError: a line is no such record, or there is none.
    """
    rows = list(read_manifest(path))
    if not rows:
        raise DataError(f"{path}: no negatives in it; make them with negatives.py")
    lost = next((row for row in rows if photo(row) is None), None)
    if lost:
        raise DataError(f"{path}: {lost['caption'][:40]!r} has no image, so no other captions")
    return rows


def read_text(path: Path) -> str:
    """A text file, whose faults are the user's."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def parse(text: str, place: str) -> Any:
    """JSON of a file."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from None


def photo(row: dict[str, Any]) -> str | None:
    """A name of a record's photo: COCO's number, or the path, or the id."""
    name = str(row.get("image") or row.get("filename") or "")
    found = re.search(r"(?:^|[/_])(\d{12}\.jpg)$", name)
    number = row.get("image_id")
    return found[1] if found else name or (None if number is None else f"id {number}")


def one_line(text: str) -> str:
    """A text without line ends, so that it cannot look like another item."""
    return " ".join(text.split())


def items_of(
    rows: list[dict[str, Any]], maker: str, kind: str, captions: dict[str, list[str]]
) -> list[Item]:
    """A maker's negatives of one type, of photos whose captions are at hand."""
    return [
        Item(maker, str(photo(row)), one_line(row["caption"]), one_line(row["negatives"][kind]))
        for row in rows
        if row["negatives"].get(kind) and photo(row) in captions
    ]


def sugarcrepe_of(folder: Path, kind: str, captions: dict[str, list[str]]) -> list[Item]:
    """SugarCrepe's negatives of one type; relations and acts get every other of their file."""
    path = folder / SUGARCREPE[kind]
    table = parse(read_text(path), str(path))
    rows = list(table.values()) if isinstance(table, dict) else []
    if not rows or not all(isinstance(r, dict) and {"filename", *FIELDS} <= set(r) for r in rows):
        raise DataError(f"{path}: not a file of SugarCrepe; its items have filename and {FIELDS}")
    rows = rows[::2] if kind == "relation" else rows[1::2] if kind == "action" else rows
    made = [{**r, "negatives": {kind: r["negative_caption"]}} for r in rows]
    return items_of(made, "sugarcrepe", kind, captions)


def write_sheets(args: argparse.Namespace) -> None:
    """A shuffled sheet for each type, the guide and the key."""
    makers = [
        "ours",
        *(path.stem for path in args.against),
        *["sugarcrepe"] * bool(args.sugarcrepe),
    ]
    if len(set(makers)) < len(makers):
        raise DataError(f"--against: two makers have one name; rename their files ({makers})")
    if args.items < 1 or args.others < 1:
        raise DataError("--items and --others must be at least 1")
    if args.out.exists():
        raise DataError(f"--out {args.out} exists; move it away, it may hold marks")
    rows = read_negatives(args.negatives)
    against = {path.stem: read_negatives(path) for path in args.against}
    captions = defaultdict(list)
    for row in rows:
        captions[str(photo(row))].append(one_line(row["caption"]))
    key: dict[str, str] = {}
    sheets: dict[str, str] = {}
    for kind in NEGATIVE_TYPES:
        draw = random.Random(f"{args.seed}{kind}")
        pools = [(items_of(rows, "ours", kind, captions), args.items)]
        for name, other in against.items():
            pools.append((items_of(other, name, kind, captions), args.others))
        if args.sugarcrepe:
            pools.append((sugarcrepe_of(args.sugarcrepe, kind, captions), args.others))
        chosen = [item for pool, n in pools for item in draw.sample(pool, min(n, len(pool)))]
        draw.shuffle(chosen)
        key |= {f"{kind}{k}": item.maker for k, item in enumerate(chosen)}
        sheets[kind] = "".join(shown(k, item, captions) for k, item in enumerate(chosen))
    try:
        args.out.mkdir(parents=True)
        (args.out / "GUIDE.txt").write_text(GUIDE, "utf-8")
        for kind, sheet in sheets.items():
            (args.out / f"{kind}.txt").write_text(sheet, "utf-8")
        (args.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise DataError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    print(f"{len(key)} items in {args.out}; give readers GUIDE.txt and the sheets, not key.json")


def shown(k: int, item: Item, captions: dict[str, list[str]]) -> str:
    """An item as readers see it."""
    others = " | ".join(c for c in captions[item.image] if c != item.caption)
    head = f"#{k}\n  other captions: {others}\n"
    return f"{head}  caption:  {item.caption}\n  sentence: {item.sentence}\n"


def shares_of(maker: str, n: int, marks: Counter[tuple[str, str]]) -> dict[str, Any]:
    """How many were read, and the share with each label: per cent, and its interval."""
    from evaluate import wilson

    row: dict[str, Any] = {"read": n}
    for label in (*LABELS, "any"):
        share = marks[maker, label] / n
        row[f"{label} %"] = [round(100 * x, 1) for x in (share, *wilson(share, n))]
    return row


def count_marks(folder: Path) -> dict[str, Any]:
    """Per cent of each maker's negatives that were marked, by type and label.

    Raises:
        DataError: the key or a line of marks is not what it should be.
    """
    key = parse(read_text(folder / "key.json"), str(folder / "key.json"))
    names = rf"({'|'.join(NEGATIVE_TYPES)})(\d+)"
    if not isinstance(key, dict) or not all(
        re.fullmatch(names, k) and isinstance(m, str) for k, m in key.items()
    ):
        raise DataError(f"{folder / 'key.json'}: not a key that sheets wrote")
    counts: dict[str, Any] = {}
    for kind in NEGATIVE_TYPES:
        makers = {int(k.removeprefix(kind)): m for k, m in key.items() if k.startswith(kind)}
        path = folder / f"{kind}.marks"
        if not path.exists() or not makers:
            continue
        labels = read_marks(path, set(makers))
        marks = Counter((makers[k], x) for k, found in labels.items() for x in (*found, "any"))
        read = Counter(makers.values())
        counts[kind] = {maker: shares_of(maker, read[maker], marks) for maker in sorted(read)}
    return counts


def read_marks(path: Path, items: set[int]) -> dict[int, set[str]]:
    """Labels of each marked item."""
    marks: dict[int, set[str]] = {}
    for n, line in enumerate(read_text(path).split("\n"), 1):
        found = re.match(r"#([0-9]+)\t([a-z|]+)\s*(?:\t|$)", line)
        labels = set(found[2].split("|")) if found else set()
        if line.strip() and (not found or int(found[1]) not in items or not labels <= set(LABELS)):
            raise DataError(f"{path}, line {n}: wanted #item<TAB>label<TAB>reason")
        if found:
            marks.setdefault(int(found[1]), set()).update(labels)
    return marks


def main(argv: list[str] | None = None) -> None:
    """Write sheets or count marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sheets = commands.add_parser("sheets", help="write sheets for readers")
    sheets.add_argument("negatives", type=Path, help="a manifest with negatives")
    sheets.add_argument("--against", type=Path, nargs="*", default=[], help="others' manifests")
    sheets.add_argument("--sugarcrepe", type=Path, metavar="DIR", help="its folder of .json files")
    sheets.add_argument("--out", type=Path, required=True, help="a new folder")
    sheets.add_argument("--items", type=int, default=100, help="of ours, for each type (100)")
    sheets.add_argument("--others", type=int, default=40, help="of each other maker (40)")
    sheets.add_argument("--seed", type=int, default=0)
    count = commands.add_parser("count", help="count the marks")
    count.add_argument("folder", type=Path)
    count.add_argument("--out", type=Path, help="write the counts as JSON")
    args = parser.parse_args(argv)
    try:
        run(args)
    except DataError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    """One of the two commands."""
    if args.command == "sheets":
        write_sheets(args)
        return
    if not (args.folder / "key.json").exists():
        raise DataError(f"{args.folder}: no key.json; make it with: sheets ... --out {args.folder}")
    counts = count_marks(args.folder)
    if not counts:
        raise DataError(f"{args.folder}: no .marks files; its GUIDE.txt says how they are written")
    for kind, makers in counts.items():
        for maker, row in makers.items():
            shares = ", ".join(f"{k[:-2]} {v[0]:g} %" for k, v in row.items() if k != "read")
            print(f"{kind:10} {maker:12} {row['read']:4} read: {shares}")
    if args.out:
        try:
            args.out.write_text(json.dumps(counts, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise DataError(f"--out {args.out}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    main()

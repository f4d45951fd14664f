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
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from negatives import NEGATIVE_TYPES, DataError

LABELS = ("mechanical", "odd", "true")
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
    """Records of a manifest that carry negatives."""
    try:
        lines = path.read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return [row for row in rows if "caption" in row and row.get("negatives")]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a file of negatives ({error})") from None


def photo(name: str) -> str:
    """What COCO's names of a photo have in common: 000000391895.jpg."""
    return name.rpartition("/")[2][-16:]


def items_of(rows: list[dict[str, Any]], maker: str, kind: str) -> list[Item]:
    """A maker's negatives of one type."""
    made = [row for row in rows if row["negatives"].get(kind)]
    return [
        Item(maker, photo(str(row["image"])), row["caption"].strip(), row["negatives"][kind])
        for row in made
    ]


def sugarcrepe_of(folder: Path, kind: str, photos: set[str]) -> list[Item]:
    """SugarCrepe's negatives of one type, of photos whose other captions are at hand."""
    try:
        rows = json.loads((folder / SUGARCREPE[kind]).read_text("utf-8")).values()
    except (OSError, ValueError) as error:
        raise DataError(f"--sugarcrepe {folder}: {error}") from None
    rows = [row for row in rows if photo(row["filename"]) in photos]
    rows = rows[::2] if kind == "relation" else rows[1::2] if kind == "action" else rows
    return [
        Item("sugarcrepe", photo(r["filename"]), r["caption"].strip(), r["negative_caption"])
        for r in rows
    ]


def write_sheets(args: argparse.Namespace) -> None:
    """A shuffled sheet for each type, the guide and the key."""
    rows = read_negatives(args.negatives)
    against = {path.stem: read_negatives(path) for path in args.against}
    captions = defaultdict(list)
    for row in rows:
        captions[photo(str(row["image"]))].append(row["caption"].strip())
    if args.out.exists():
        raise DataError(f"--out {args.out} exists; move it away, it may hold marks")
    args.out.mkdir(parents=True)
    (args.out / "GUIDE.txt").write_text(GUIDE, "utf-8")
    key = {}
    for kind in NEGATIVE_TYPES:
        draw = random.Random(f"{args.seed}{kind}")
        pools = [(items_of(rows, "ours", kind), args.items)]
        pools += [(items_of(other, name, kind), args.others) for name, other in against.items()]
        if args.sugarcrepe:
            pools.append((sugarcrepe_of(args.sugarcrepe, kind, set(captions)), args.others))
        chosen = [item for pool, n in pools for item in draw.sample(pool, min(n, len(pool)))]
        draw.shuffle(chosen)
        sheet = []
        for k, item in enumerate(chosen):
            key[f"{kind}{k}"] = item.maker
            others = " | ".join(c for c in captions[item.image] if c != item.caption)
            sheet.append(
                f"#{k}\n  other captions: {others}\n  caption:  {item.caption}\n"
                f"  sentence: {item.sentence.strip()}\n"
            )
        (args.out / f"{kind}.txt").write_text("".join(sheet), "utf-8")
    (args.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", "utf-8")
    print(f"{len(key)} items in {args.out}; give readers GUIDE.txt and the sheets, not key.json")


def wilson(k: int, n: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of k out of n, in per cent."""
    centre, spread = k + z * z / 2, z * sqrt(k * (n - k) / n + z * z / 4)
    return [round(100 * (centre + sign * spread) / (n + z * z), 1) for sign in (-1, 1)]


def shares_of(maker: str, n: int, marks: Counter[tuple[str, str]]) -> dict[str, Any]:
    """How many were read, and the share with each label: per cent, and its interval."""
    row: dict[str, Any] = {"read": n}
    for label in (*LABELS, "any"):
        k = marks[maker, label]
        row[f"{label} %"] = [round(100 * k / n, 1), *wilson(k, n)]
    return row


def count_marks(folder: Path) -> dict[str, Any]:
    """Per cent of each maker's negatives that were marked, by type and label.

    Raises:
        DataError: a line is no mark, or names an item that the sheet does not have.
    """
    key = json.loads((folder / "key.json").read_text("utf-8"))
    counts: dict[str, Any] = {}
    for kind in NEGATIVE_TYPES:
        makers = {int(k.removeprefix(kind)): m for k, m in key.items() if k.startswith(kind)}
        path = folder / f"{kind}.marks"
        if not path.exists():
            continue
        marks: Counter[tuple[str, str]] = Counter()
        for n, line in enumerate(filter(str.strip, path.read_text("utf-8").splitlines()), 1):
            found = re.match(r"#(\d+)\t([a-z|]+)(?:\t|$)", line)
            labels = set(found[2].split("|")) if found else set()
            if found is None or int(found[1]) not in makers or not labels <= set(LABELS):
                raise DataError(f"{path}, line {n}: wanted #item<TAB>label<TAB>reason")
            marks.update((makers[int(found[1])], label) for label in (*labels, "any"))
        read = Counter(makers.values())
        counts[kind] = {maker: shares_of(maker, read[maker], marks) for maker in sorted(read)}
    return counts


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
    if args.out:
        args.out.write_text(json.dumps(counts, indent=1) + "\n", "utf-8")
    for kind, makers in counts.items():
        for maker, row in makers.items():
            shares = ", ".join(f"{k[:-2]} {v[0]:g} %" for k, v in row.items() if k != "read")
            print(f"{kind:10} {maker:12} {row['read']:4} read: {shares}")


if __name__ == "__main__":
    main()

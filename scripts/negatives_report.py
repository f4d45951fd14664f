# SPDX-License-Identifier: MIT
"""How good are negatives?  Statistics of whole files, and blind ratings of samples.

  python scripts/negatives_report.py FILE ... --mlm DIR --spacy en_core_web_sm --markdown
  python scripts/negatives_report.py reading sheets OURS --against FILE ... --out FOLDER
  python scripts/negatives_report.py reading count FOLDER --out marks.json

FILE is a manifest with negatives, NegCLIP's .tsv (column neg_caption) or a .json of SugarCrepe.
For each type of negatives, in per cent of the negatives if nothing else is said:

  coverage  captions that have a negative
  exchange  exactly the words of the caption (case aside, "a" and "an" as one) in another order
  drawn     captions that got an exchange, of those that allow one; from records whose ``how`` says
            of a type "exchange", or "instead of exchange" where one was legal and not drawn
  n-grams   how often evaluate.py's n-gram classifier (1 to 3 words), fitted on other images, scores
            the caption above the negative; a tie counts as half, 50 % is chance
  masked    the same for a masked language model (pseudo-log-likelihood)
  giveaway  the negative has a telltale phrase of one to three new words (words more often in it
            than in its caption): over the type, the phrase is new in at least 10 negatives, and in
            at least 5 times as many as those that removed it
  around    the same, for phrases with any words, as "a horse riding" after an exchange
  ten new   percentage of all new words that are one of the ten most frequent ones
  absence   "without", "no", "far from" ... is inserted; absence before: the caption has one
  speech    of replacements at one place: the last word keeps its part of speech (spaCy's; numbers
            are adjectives, and adverbs are prepositions)

``reading sheets`` writes TYPE.txt for each type, GUIDE.txt for the raters, and key.json, which
raters must not see.  A rater writes TYPE.marks: a line "#item<TAB>label<TAB>reason" for each
faulty item, labels joined by "|".  ``reading count`` counts how many of each maker's negatives got
each label, with Wilson's interval.
"""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import gc
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import negatives as kit
from negatives import DataError

IN, RATIO = 10, 5  # thresholds of a telltale phrase
ABSENCE = re.compile(
    r"\b(without|no|not|none|nothing|nobody|never|neither|nor|lack(s|ing)?|missing|absent|empty"
    r"|far from|away from|free of|\w+n't)\b",
    re.IGNORECASE,
)
LABELS = ("mechanical", "odd", "true")
OTHERS = {  # types of other makers' negatives on the sheet of a type
    "relation": ("replace_rel", "swap_obj", "negclip"),
    "attribute": ("replace_att", "swap_att", "negclip"),
    "object": ("replace_obj",),
    "action": ("replace_rel",),
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


class Row(NamedTuple):
    """A caption, its negatives by type, and how they were made if the file says so."""

    image: str
    caption: str
    negatives: dict[str, list[str]]
    how: dict[str, str]


Pair = tuple[str, str, str]  # image, caption, negative


def read(path: Path) -> list[Row]:
    """Captions with negatives of a manifest, NegCLIP's .tsv or a .json of SugarCrepe.

    Raises:
        DataError: the file cannot be read, has another format, or has no negatives.
    """
    rows: list[Row] = []
    try:
        for found in _records(path):
            made = found["negatives"].items()
            negatives = {k: [x] if isinstance(x, str) else list(x or ()) for k, x in made}
            texts = [found["caption"], *(text for made in negatives.values() for text in made)]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a caption or negative that is no text")
            rows.append(Row(photo(found), found["caption"], negatives, dict(found.get("how", {}))))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, csv.Error) as error:
        place = f"{path}, record {len(rows) + 1}"
        raise DataError(f"{place}: no caption with negatives ({error!r})") from None
    if not any(any(row.negatives.values()) for row in rows):
        raise DataError(f"{path}: no negatives in it; make them with negatives.py")
    return rows


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Records with image, caption, negatives, and how in manifests that have it."""
    with path.open(encoding="utf-8-sig", newline="\n" if path.suffix == ".jsonl" else "") as lines:
        if path.suffix == ".tsv":
            for row in csv.DictReader(lines, delimiter="\t", strict=True):
                made = ast.literal_eval(row["neg_caption"])
                names = {"image": row["filepath"], "caption": row["title"]}
                yield {**names, "negatives": {"negclip": made}}
        elif path.suffix == ".json":
            for row in json.load(lines).values():
                names = {"image": row["filename"], "caption": row["caption"]}
                yield {**names, "negatives": {path.stem: row["negative_caption"]}}
        else:
            rows = (json.loads(line) for line in lines if line.strip())
            yield from (row for row in rows if "manifest" not in row)


def photo(row: dict[str, Any]) -> str:
    """A name of a record's photo: COCO's number, or the path, or the id; "" if it has none."""
    name, number = str(row.get("image") or ""), row.get("image_id")
    found = re.search(r"(?:^|[/_])(\d{12}\.jpg)$", name)
    return found[1] if found else name or ("" if number is None else f"id {number}")


# What is counted


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation; "an" is "a"."""
    return ["a" if word == "an" else word for word in re.findall(r"\w+", text.casefold())]


def phrases(words: Sequence[str]) -> list[str]:
    """Every run of one, two or three words."""
    return [" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)]


def changed(old: Sequence[str], new: Sequence[str]) -> list[tuple[slice, slice]]:
    """Places of the old and of the new words at which the two differ."""
    moves = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [(slice(a, b), slice(c, d)) for kind, a, b, c, d in moves if kind != "equal"]


def measure(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Figures of one type that need no model, as the module's docstring defines them."""
    exchanged = equal = absent = known = 0
    came, went, fresh = Counter[str](), Counter[str](), Counter[str]()
    alone, around = [], []  # of each negative: phrases that came in
    for _, caption, negative in pairs:
        old, new = words_of(caption), words_of(negative)
        equal += old == new
        exchanged += old != new and sorted(old) == sorted(new)
        absent += len(ABSENCE.findall(negative)) > len(ABSENCE.findall(caption))
        known += bool(ABSENCE.search(caption))
        words = Counter(new) - Counter(old)
        fresh.update(words)
        before, after = Counter(phrases(old)), Counter(phrases(new))
        around.append(set(after - before))
        alone.append({phrase for phrase in around[-1] if words.keys() >= set(phrase.split())})
        came.update(around[-1])
        went.update(set(before - after))
    bad = {phrase for phrase, n in came.items() if n >= max(IN, RATIO * went[phrase])}
    share = 100 / len(pairs)
    return {
        "equal": equal,
        "exchange": share * exchanged,
        "giveaway": share * sum(not bad.isdisjoint(found) for found in alone),
        "around": share * sum(not bad.isdisjoint(found) for found in around),
        "ten new": 100 * sum(n for _, n in fresh.most_common(10)) / max(1, fresh.total()),
        "absence": share * absent,
        "absence before": share * known,
        "new words": dict(fresh.most_common(10)),
        "giveaway in/out": {p: f"{came[p]}/{went[p]}" for p in _worst(alone, bad)},
        "around in/out": {p: f"{came[p]}/{went[p]}" for p in _worst(around, bad)},
    }


def _worst(found: Iterable[set[str]], bad: set[str]) -> Iterator[str]:
    """The ten phrases that detect most negatives, each beyond those before it."""
    rest = [both for phrases in found if (both := phrases & bad)]
    for _ in range(10):
        uses = Counter(phrase for phrases in rest for phrase in phrases)
        if uses:
            worst = min(uses, key=lambda phrase: (-uses[phrase], phrase))
            yield worst
            rest = [phrases for phrases in rest if worst not in phrases]


def told(pairs: Sequence[Pair], **reader: Any) -> float:
    """How often a text-only model prefers the caption, in per cent; a tie is half.

    It is the n-gram classifier, or a masked language model given as ``model``.
    """
    items = [evaluate.TestItem((), "", (image,), (*both,)) for image, *both in pairs]
    scores = (evaluate.score_masked if reader else evaluate.score_ngrams)(items, **reader)
    more = np.subtract(*np.transpose(scores))
    return float(100 * np.mean((more > 0) + 0.5 * (more == 0)))


def kept_speech(pairs: Sequence[Pair], parse: Any) -> float | None:
    """Per cent of replacements at one place whose last word keeps its part of speech."""
    from spacy.tokens import Doc

    same = {"PROPN": "NOUN", "AUX": "VERB", "NUM": "ADJ", "DET": "ADJ"}
    same |= dict.fromkeys(("ADV", "SCONJ", "PART"), "ADP")
    texts, places = [], []
    for _, *both in pairs:
        old, new = (re.findall(r"\w+|[^\w\s]", text) for text in both)
        spans = changed(old, new)
        if len(spans) == 1 and old[spans[0][0]] and new[spans[0][1]]:
            texts += [old, new]
            places += [place.stop - 1 for place in spans[0]]
    docs = parse.pipe((Doc(parse.vocab, words) for words in texts), batch_size=256)
    tags = [same.get(tag := doc[k].pos_, tag) for doc, k in zip(docs, places, strict=True)]
    kept = [a == b for a, b in zip(tags[::2], tags[1::2], strict=True)]
    return 100 * sum(kept) / len(kept) if kept else None


def speed(captions: Path, parse: Any) -> dict[str, float]:
    """Captions a second of processor time: the command, its edits alone, and spaCy's tagging."""
    import resource  # not on Windows

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, kit.__file__, captions, "--out", f"{folder}/out.jsonl"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if subprocess.run([*map(str, command)]).returncode:
            raise DataError(f"--speed {captions}: negatives.py made no negatives of it")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = list(kit.read_captions(captions))
    texts, images = [row.caption for row in rows], [f"{row.image}" for row in rows]
    learned = kit.learn(texts, images, kit.Options())
    blocks = [slice(at, at + kit.CHUNK) for at in range(0, len(texts), kit.CHUNK)]
    gc.disable()  # as negatives.py does
    start = time.process_time()
    for block in blocks:
        kit.rewrite(texts[block], images[block], learned, kit.Options())
    made = time.process_time()
    gc.enable()
    for _ in parse.pipe(texts, batch_size=256):
        pass
    seconds = {
        "whole command": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "once counts are learned": made - start,
        "spaCy's tagging": time.process_time() - made,
    }
    return {name: len(texts) / spent for name, spent in seconds.items()}


def report(path: Path, args: argparse.Namespace, model: Any, parse: Any) -> dict[str, Any]:
    """Every figure of a file, by type; prints them as they come."""
    rows = read(path)
    types: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row.negatives):
        made = [(row, text) for row in rows for text in row.negatives.get(name, ())]
        pairs = [(row.image or row.caption, row.caption, text) for row, text in made]
        if not pairs:
            continue
        some = random.Random(0).sample(pairs, min(args.pairs, len(pairs)))
        covered = sum(bool(row.negatives.get(name)) for row in rows)
        legal = [how for row in rows if "exchange" in (how := row.how.get(name) or "")]
        figures = {
            "negatives": len(pairs),
            "coverage": 100 * covered / len(rows),
            "drawn": 100 * legal.count("exchange") / len(legal) if legal else None,
            **measure(pairs),
            "n-grams": told(pairs),
            "masked": told(some, model=model) if model else None,
            "speech": kept_speech(some, parse) if parse else None,
        }
        types[name] = {key: value for key, value in figures.items() if value is not None}
        print(f"{path.name}, {name}: {len(pairs)} negatives, {figures['equal']} equal", end="")
        print(*(f", {k} {x:.1f}" for k, x in types[name].items() if isinstance(x, float)), sep="")
        for key, found in types[name].items():
            if isinstance(found, dict):
                print(f"  {key}: {', '.join(f'{k} {n}' for k, n in found.items())}", flush=True)
    return {"captions": len(rows), "bytes": path.stat().st_size, "types": types}


def markdown(results: dict[str, Any]) -> str:
    """The table of a saved report: files down, figures across, types within a cell."""
    files = {name: file["types"] for name, file in results["files"].items()}
    every = [figures.items() for types in files.values() for figures in types.values()]
    keys = dict.fromkeys(key for items in every for key, x in items if isinstance(x, float))
    lines = [f"| | types | {' | '.join(keys)} |", f"| --- | --- |{' ---: |' * len(keys)}"]
    for name, types in files.items():
        cells = [name, " / ".join(types)]
        for key in keys:
            values = [figures.get(key) for figures in types.values()]
            cells.append(" / ".join("-" if x is None else f"{x:.1f}" for x in values))
        lines.append(f"| {' | '.join(cells)} |")
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in results["speed"].items())
    lines += ["", f"Captions a second of processor time: {rates}."] if rates else []
    return "\n".join(lines)


def draw_gallery(rows: Sequence[Row], out: Path) -> None:
    """Some captions that have every negative and fit a line; new words are red."""
    import matplotlib.pyplot as plt

    good = [row for row in rows if all(row.negatives.values()) and 40 < len(row.caption) < 75]
    lines = [
        (row.caption.split(), name, texts[0].split())
        for row in random.Random(1).sample(good, min(8, len(good)))
        for name, texts in {"caption": [row.caption], **row.negatives}.items()
    ]
    figure = plt.figure(figsize=(8.6, 0.235 * len(lines) + 0.2), dpi=90)
    font: dict[str, Any] = {"family": "monospace", "fontsize": 8.5, "va": "center"}
    for k, (old, name, new) in enumerate(lines):
        y, at = 1 - (k + 1) / (len(lines) + 1), 0.11
        figure.text(0.01, y, name, color="gray", **font)
        fresh = {i for _, place in changed(old, new) for i in range(place.start, place.stop)}
        if len(old) == len(new):  # exchanged words differ by position
            fresh = {i for i, (one, two) in enumerate(zip(old, new, strict=True)) if one != two}
        for i, word in enumerate(new):
            style: dict[str, Any] = {"color": "#b3261e", "weight": "bold"} if i in fresh else {}
            figure.text(at, y, word, **style, **font)
            at += 0.0085 * (len(word) + 1)
    figure.savefig(out)


# Blind readings


def write_sheets(args: argparse.Namespace) -> None:
    """A shuffled sheet for each type, the guide and the key."""
    makers = {"ours": read(args.ours), **{path.stem: read(path) for path in args.against}}
    if len(makers) < 1 + len(args.against):
        raise DataError("--against: two makers have the same name; rename their files")
    if args.out.exists():
        raise DataError(f"--out {args.out} exists; move it away, it may hold marks")
    captions = defaultdict(list)
    for row in makers["ours"]:
        if not row.image:
            raise DataError(f"{args.ours}: {row.caption[:40]!r} has no image, so no other captions")
        captions[row.image].append(" ".join(row.caption.split()))
    key: dict[str, str] = {}
    args.out.mkdir(parents=True)
    for kind in dict.fromkeys(name for row in makers["ours"] for name in row.negatives):
        draw = random.Random(f"{args.seed}{kind}")
        chosen = []
        for maker, rows in makers.items():
            pool = [
                (maker, row.image, *(" ".join(text.split()) for text in (row.caption, negative)))
                for row in rows
                for name in (kind, *OTHERS.get(kind, ()))
                for negative in row.negatives.get(name, ())
                if row.image in captions
            ]
            size = args.items if maker == "ours" else args.others
            chosen += draw.sample(pool, min(size, len(pool)))
        draw.shuffle(chosen)
        sheet = ""
        for k, (maker, image, caption, sentence) in enumerate(chosen):
            key[f"{kind}#{k}"] = maker
            others = " | ".join(text for text in captions[image] if text != caption)
            sheet += f"#{k}\n  other captions: {others}\n"
            sheet += f"  caption:  {caption}\n  sentence: {sentence}\n"
        (args.out / f"{kind}.txt").write_text(sheet, "utf-8")
    (args.out / "GUIDE.txt").write_text(GUIDE, "utf-8")
    (args.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", "utf-8")
    print(f"{len(key)} items in {args.out}; give raters GUIDE.txt and the sheets, not key.json")


def count_marks(folder: Path) -> dict[str, Any]:
    """Of each type and maker: how many were read, and per cent with each label [value, low, high].

    Raises:
        DataError: the key or a line of marks is malformed, or there are no marks.
    """
    sheets: dict[str, dict[int, str]] = defaultdict(dict)
    try:
        for name, maker in json.loads((folder / "key.json").read_text("utf-8-sig")).items():
            kind, number = name.rsplit("#", 1)
            sheets[kind][int(number)] = maker + ""
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{folder / 'key.json'}: not a key that sheets wrote ({error})") from None
    counts: dict[str, Any] = {}
    for kind, makers in sheets.items():
        if not (path := folder / f"{kind}.marks").exists():
            continue
        marked = read_marks(path, makers)
        marks = Counter((makers[k], x) for k, labels in marked.items() for x in {*labels, "any"})
        counts[kind] = {}
        for maker, n in sorted(Counter(makers.values()).items()):
            row: dict[str, Any] = {"read": n}
            for label in (*LABELS, "any"):
                share = marks[maker, label] / n
                bounds = (share, *evaluate.wilson(share, n))
                row[f"{label} %"] = [round(100 * x, 1) for x in bounds]
            counts[kind][maker] = row
            print(kind, maker, *(f"{key} {value}" for key, value in row.items()))
    if not counts:
        raise DataError(f"{folder}: no .marks files; its GUIDE.txt says how they are written")
    return counts


def read_marks(path: Path, items: Container[int]) -> dict[int, set[str]]:
    """Labels of each marked item."""
    marks: dict[int, set[str]] = defaultdict(set)
    for n, line in enumerate(path.read_text("utf-8-sig", "replace").split("\n"), 1):
        found = re.match(r"#([0-9]+)\t([a-z|]+)\s*(?:\t|$)", line)
        labels = set(found[2].split("|")) if found else set()
        if line.strip() and (not found or int(found[1]) not in items or not labels <= set(LABELS)):
            raise DataError(f"{path}, line {n}: wanted #item<TAB>label<TAB>reason")
        if found:
            marks[int(found[1])] |= labels
    return marks


# The commands


def count(text: str) -> int:
    """A whole number above 0, of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number above 0, got {text!r}")
    return int(text)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the report, or of one of the two commands of ``reading``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if argv[:1] == ["reading"]:
        commands = parser.add_subparsers(dest="command", required=True)
        add = commands.add_parser("sheets", help="write sheets for raters").add_argument
        add("ours", type=Path, help="a manifest with negatives")
        add("--against", type=Path, nargs="*", default=[], metavar="FILE", help="of other makers")
        add("--items", type=count, default=60, help="of ours, for each type (60)")
        add("--others", type=count, default=30, help="of each other maker (30)")
        add("--seed", type=int, default=0)
        add("--out", type=Path, required=True, help="a new folder")
        add = commands.add_parser("count", help="count the marks").add_argument
        add("folder", type=Path)
        add("--out", type=Path, metavar="FILE.json", help="where to save the counts")
        return parser.parse_args(argv[1:])
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="files, or: reading sheets | count")
    add("--mlm", metavar="DIR", help="masked language model (transformers) for column masked")
    add("--spacy", metavar="NAME", help="spaCy pipeline for parts of speech")
    add("--pairs", type=count, default=1000, help="pairs of each type for these two (1000)")
    add("--speed", type=Path, metavar="CAPTIONS", help="time negatives.py beside --spacy's tagging")
    add("--gallery", type=Path, metavar="FILE.png", help="image of some captions of the first FILE")
    add("--out", type=Path, metavar="FILE.json", help="where to save the figures")
    add("--markdown", action="store_true", help="print the figures as a table")
    args = parser.parse_args(argv, argparse.Namespace(command="report"))
    if args.speed and not args.spacy:
        parser.error("--speed needs --spacy")
    return args


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of every file, printed as they come."""
    if len({path.stem for path in args.files}) < len(args.files):
        raise DataError("two FILEs have the same name; rename one")
    if args.gallery and not args.gallery.parent.is_dir():
        raise DataError(f"--gallery {args.gallery}: there is no such folder; make it first")
    if args.gallery:
        draw_gallery(read(args.files[0]), args.gallery)
    model = kit.MaskedModel(args.mlm, "auto") if args.mlm else None
    parse = None
    if args.spacy:
        import spacy

        try:
            parse = spacy.load(args.spacy, exclude=["ner", "parser"])
        except OSError:
            raise DataError(
                f"--spacy {args.spacy}: not there; python -m spacy download {args.spacy}"
            ) from None
    files = {path.stem: report(path, args, model, parse) for path in args.files}
    rates = speed(args.speed, parse) if args.speed else {}
    results = {"files": files, "speed": rates}
    if args.markdown:
        print(markdown(results))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Measure files, write sheets or count marks."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if args.command == "sheets":
        write_sheets(args)
        return
    if args.out and not args.out.parent.is_dir():
        raise DataError(f"--out {args.out}: there is no such folder; make it first")
    results = count_marks(args.folder) if args.command == "count" else measure_all(args)
    if args.out:
        evaluate.write_text(args.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        print(f"negatives_report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        print(f"negatives_report.py: error: pip install {error.name}", file=sys.stderr)
        sys.exit(2)

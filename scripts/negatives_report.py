# SPDX-License-Identifier: MIT
"""How good are negatives?  Numbers of whole files, and blind readings of a few.

  python scripts/negatives_report.py FILE ... --mlm DIR --spacy en_core_web_sm --markdown
  python scripts/negatives_report.py reading sheets OURS --against FILE ... --out reading
  python scripts/negatives_report.py reading count reading --out marks.json

FILE is a manifest with negatives, NegCLIP's .tsv (column neg_caption) or a .json of SugarCrepe.
For each type of negatives, in per cent:

  coverage   captions that have one
  exchange   negatives with exactly the words of their caption (case aside, "a" and "an" as one)
  drawn      captions that got an exchange, of those where one is legal; needs records whose
             ``how`` says of a type "exchange", or "instead of exchange" where it was not drawn
  n-grams    how often a reader of words, pairs and triples of words picks the caption from
             (caption, negative); it has learned from other images (evaluate.score_texts)
  masked     the same of a masked language model: it picks the text whose tokens, each masked in
             turn, are likelier (Salazar et al. 2020)
  giveaway   negatives that bring in, by new words alone, a phrase that gives them away: one of 1 to
             3 words that comes in (is in a negative more often than in its caption) in at least 10
             negatives of the type and at least 5 times as often as it goes out
  around     the same of phrases that hold new words and words that stood there before
  ten words  how much of all new words the ten most used make up
  absence    negatives into which "without", "no", "far from" ... comes, and captions that have one
  speech     one-place replacements whose last word keeps its part of speech (spaCy)

50 % is a reader that cannot tell, and counts ties as half.  ``reading sheets`` writes TYPE.txt for
each type, GUIDE.txt for the readers, and key.json, which they must not see.  A reader writes
TYPE.marks, one line "#item<TAB>label<TAB>reason" for each faulty item, labels joined by "|".
``reading count`` says how many of each maker's negatives got each label, with Wilson's interval.
"""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
from negatives import DataError, MaskedModel  # noqa: E402

ABSENCE = re.compile(
    r"\b(without|no|not|none|nothing|nobody|never|neither|nor|lack(s|ing)?|missing|absent|empty"
    r"|far from|away from|free of|\w+n't)\b",
    re.IGNORECASE,
)
IN, RATIO = (
    10,
    5,
)  # a phrase gives away that comes in so often, and so much oftener than it goes out
FIGURES = (
    *("coverage", "exchange", "drawn", "n-grams", "masked"),
    *("giveaway", "around", "ten words", "absence", "speech"),
)
LABELS = ("mechanical", "odd", "true")
OTHERS = {  # whose negatives stand on the sheet of a type, beside those that say so themselves
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
    """A caption, its negatives by type, and how each type's was made if the file says so."""

    image: str
    caption: str
    negatives: dict[str, list[str]]
    how: dict[str, str]


def read(path: Path) -> list[Row]:
    """Captions with negatives of a manifest, NegCLIP's .tsv or a SugarCrepe .json.

    Raises:
        DataError: the file cannot be read, is not of its kind, or has no negatives.
    """
    kind = {".tsv": _read_tsv, ".json": _read_sugarcrepe}.get(path.suffix, _read_manifest)
    place = str(path)
    rows = []
    try:
        for place, image, caption, made, how in kind(path):  # noqa: B007
            negatives = {
                name: [x] if isinstance(x, str) else list(x or ()) for name, x in made.items()
            }
            texts = [caption, *(text for found in negatives.values() for text in found)]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a caption or negative that is no string")
            rows.append(Row(image or "", caption, negatives, how))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, csv.Error) as error:
        raise DataError(f"{place}: no caption with negatives ({error!r})") from None
    if not any(row.negatives.values() for row in rows):
        raise DataError(f"{path}: no negatives in it; make them with negatives.py")
    return rows


Found = Iterator[tuple[str, str | None, Any, dict[str, Any], dict[str, str]]]


def _read_tsv(path: Path) -> Found:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", strict=True):
            place = f"{path}, row of {row['title'][:40]!r}"
            yield place, row["filepath"], row["title"], _negclip(row["neg_caption"]), {}


def _negclip(cell: str) -> dict[str, Any]:
    return {"negclip": ast.literal_eval(cell)}


def _read_sugarcrepe(path: Path) -> Found:
    for key, row in json.loads(path.read_text("utf-8-sig")).items():
        negatives = {path.stem: row["negative_caption"]}
        yield f"{path}, item {key}", row["filename"], row["caption"], negatives, {}


def _read_manifest(path: Path) -> Found:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else {"manifest": 1}
            if "manifest" not in row:
                how = row.get("how", {})
                place = f"{path}:{number}"
                yield place, photo(row), row["caption"], row["negatives"], how


def photo(row: dict[str, Any]) -> str | None:
    """A name of a record's photo: COCO's number, or the path, or the id."""
    name = str(row.get("image") or "")
    found = re.search(r"(?:^|[/_])(\d{12}\.jpg)$", name)
    number = row.get("image_id")
    return found[1] if found else name or (None if number is None else f"id {number}")


# What is counted


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation; "an" is "a"."""
    words = re.findall(r"\w+(?:['\u2019-]\w+)*", text.casefold())
    return ["a" if word == "an" else word for word in words]


def phrases(words: Sequence[str]) -> list[str]:
    """Every run of one, two or three words."""
    return [" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)]


def changed(old: Sequence[str], new: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Words that went out and words that came in, place by place."""
    moves = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [(list(old[a:b]), list(new[c:d])) for kind, a, b, c, d in moves if kind != "equal"]


def measure(pairs: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Figures of one type that need no model, from (image, caption, negative)."""
    exchanged = equal = absent = told = 0
    came: Counter[str] = Counter()
    went: Counter[str] = Counter()
    fresh: Counter[str] = Counter()
    alone: list[set[str]] = []
    around: list[set[str]] = []
    for _, caption, negative in pairs:
        old, new = words_of(caption), words_of(negative)
        equal += old == new
        exchanged += old != new and sorted(old) == sorted(new)
        absent += len(ABSENCE.findall(negative)) > len(ABSENCE.findall(caption))
        told += bool(ABSENCE.search(caption))
        fresh.update(Counter(new) - Counter(old))
        before, after = Counter(phrases(old)), Counter(phrases(new))
        more = set(after - before)
        came.update(more)
        went.update(set(before - after))
        inside = {phrase for _, span in changed(old, new) for phrase in phrases(span)}
        alone.append(more & inside)
        around.append(more)
    bad = {phrase for phrase, n in came.items() if n >= IN and n >= RATIO * went[phrase]}
    share = 100 / len(pairs)
    return {
        "exchange": share * exchanged,
        "giveaway": share * sum(not bad.isdisjoint(found) for found in alone),
        "around": share * sum(not bad.isdisjoint(found) for found in around),
        "ten words": 100 * sum(n for _, n in fresh.most_common(10)) / max(1, fresh.total()),
        "absence": [share * absent, share * told],
        "equal": equal,
        "new words": dict(fresh.most_common(10)),
        "giveaway phrases": {p: [came[p], went[p]] for p in _worst(alone, bad)},
        "around phrases": {p: [came[p], went[p]] for p in _worst(around, bad)},
    }


def _worst(found: Iterable[set[str]], bad: set[str], count: int = 10) -> Iterator[str]:
    """Phrases that give most negatives away, each counted where none before it does."""
    rest = [both for phrases in found if (both := phrases & bad)]
    while rest and count:
        uses = Counter(phrase for phrases in rest for phrase in phrases)
        worst = min(uses, key=lambda phrase: (-uses[phrase], phrase))
        yield worst
        rest = [phrases for phrases in rest if worst not in phrases]
        count -= 1


def won(true: Sequence[float], false: Sequence[float]) -> float:
    """How often a true text has the higher score, in per cent, a tie being half."""
    more = np.subtract(true, false)
    return float(100 * np.mean((more > 0) + 0.5 * (more == 0)))


def read_ngrams(pairs: Sequence[tuple[str, str, str]]) -> float:
    """Per cent of the pairs that evaluate's reader of n-grams gets right."""
    items = [evaluate.Item((), "", (image,), (true, false)) for image, true, false in pairs]
    return won(*zip(*evaluate.score_texts(items), strict=True))


def likelihoods(texts: Sequence[str], model: MaskedModel, batch: int = 256) -> list[float]:
    """Sum of the log probabilities of each text's tokens, each masked in turn, in nats."""
    import torch

    net, device = model.model, model.model.device
    ids = model.tokenizer(list(texts), truncation=True, max_length=64)["input_ids"]
    rows = sorted((len(x), i, k) for i, x in enumerate(ids) for k in range(1, len(x) - 1))
    total = np.zeros(len(texts))
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        padded = torch.zeros(len(part), part[-1][0], dtype=torch.long)
        mask = torch.zeros_like(padded)
        for r, (size, i, _) in enumerate(part):
            padded[r, :size], mask[r, :size] = torch.tensor(ids[i]), 1
        every, places = torch.arange(len(part)), torch.tensor([k for _, _, k in part])
        wanted = padded[every, places]
        padded[every, places] = model.tokenizer.mask_token_id
        with torch.inference_mode():
            if hasattr(net, "bert"):  # its head can read the masked places alone
                hidden = net.bert(padded.to(device), attention_mask=mask.to(device))[0]
                logits = net.cls(hidden[every, places])
            else:
                logits = net(padded.to(device), attention_mask=mask.to(device)).logits
                logits = logits[every, places]
            found = logits.float().log_softmax(-1).cpu()[every, wanted].numpy()
        np.add.at(total, [i for _, i, _ in part], found)
    return total.tolist()


def read_masked(pairs: Sequence[tuple[str, str, str]], model: MaskedModel) -> float:
    """Per cent of the pairs that a masked language model gets right."""
    texts = list(dict.fromkeys(text.strip() for _, *both in pairs for text in both))
    score = dict(zip(texts, likelihoods(texts, model), strict=True))
    return won([score[c.strip()] for _, c, _ in pairs], [score[n.strip()] for *_, n in pairs])


def kept_speech(pairs: Sequence[tuple[str, str, str]], parse: Any) -> float | None:
    """Per cent of one-place replacements whose last word keeps its part of speech."""
    from spacy.tokens import Doc

    same = {"PROPN": "NOUN", "AUX": "VERB", "SCONJ": "ADP", "PART": "ADP"}
    wanted, texts = [], []
    for _, *both in pairs:
        old, new = (re.findall(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", text) for text in both)
        moves = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        spans = [move for move in moves if move[0] != "equal"]
        if len(spans) == 1 and spans[0][0] == "replace":
            wanted += [spans[0][2] - 1, spans[0][4] - 1]
            texts += [old, new]
    docs = parse.pipe((Doc(parse.vocab, words) for words in texts), batch_size=256)
    found = [doc[k].pos_ for doc, k in zip(docs, wanted, strict=True)]
    found = [same.get(x, x) for x in found]
    kept = [a == b for a, b in zip(found[::2], found[1::2], strict=True)]
    return 100 * sum(kept) / len(kept) if kept else None


def report(path: Path, args: argparse.Namespace, model: Any, parse: Any) -> dict[str, Any]:
    """Every figure of a file, by type; prints them as they come."""
    rows = read(path)
    types: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row.negatives):
        pairs = [
            (r.image or r.caption, r.caption, n) for r in rows for n in r.negatives.get(name, ())
        ]
        if not pairs:
            continue
        some = random.Random(0).sample(pairs, min(args.pairs, len(pairs)))
        covered = sum(bool(row.negatives.get(name)) for row in rows)
        figures: dict[str, Any] = {"negatives": len(pairs), "coverage": 100 * covered / len(rows)}
        figures |= measure(pairs)
        legal = [h for row in rows if "exchange" in (h := row.how.get(name) or "")]
        figures["drawn"] = 100 * legal.count("exchange") / len(legal) if legal else None
        figures["n-grams"] = read_ngrams(pairs)
        figures["masked"] = read_masked(some, model) if model else None
        figures["speech"] = kept_speech(some, parse) if parse else None
        types[name] = figures
        show(path.name, name, figures)
    return {"captions": len(rows), "bytes": path.stat().st_size, "types": types}


def show(file: str, name: str, figures: dict[str, Any]) -> None:
    """Print the figures of one type of a file."""
    print(f"{file} {name}: {figures['negatives']} negatives, {figures['equal']} equal")
    texts = {key: _cell(figures.get(key)) for key in FIGURES}
    print("  " + "  ".join(f"{key} {text}" for key, text in texts.items() if text != "-"))
    print("  new words: " + ", ".join(f"{w} {n}" for w, n in figures["new words"].items()))
    for key in ("giveaway phrases", "around phrases"):
        listed = ", ".join(f"{p} {i}/{o}" for p, (i, o) in figures[key].items())
        print(f"  {key}, in/out: {listed or 'none'}", flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " of ".join(map(_cell, value))
    return "-" if value is None else f"{value:.1f}"


def markdown(results: dict[str, Any]) -> str:
    """The table of a saved report: files down, figures across, types within a cell."""
    shown = [
        key
        for key in FIGURES
        if any(
            t.get(key) is not None for f in results["files"].values() for t in f["types"].values()
        )
    ]
    lines = [f"| | types | {' | '.join(shown)} |", f"| --- | --- |{' ---: |' * len(shown)}"]
    for name, file in results["files"].items():
        types = file["types"].values()
        cells = [" / ".join(_cell(t.get(key)) for t in types) for key in shown]
        lines.append(f"| {name} | {' / '.join(file['types'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def speed(captions: Path, parse: Any) -> dict[str, float]:
    """Captions a second of processor time: the command on a file, and spaCy's tagging of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "negatives.jsonl"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, str(ROOT / "negatives.py"), str(captions), "--out", str(out)],
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        texts = [row.caption for row in read(out)]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    start = time.process_time()
    for _ in parse.pipe(texts, batch_size=256):
        pass
    tagged = time.process_time() - start
    return {"captions": len(texts), "command": len(texts) / used, "spaCy": len(texts) / tagged}


def load_spacy(name: str) -> Any:
    """A pipeline that tags and does not parse."""
    try:
        import spacy

        return spacy.load(name, exclude=["ner", "parser"])
    except ImportError:
        raise DataError("--spacy: spaCy is missing; pip install spacy") from None
    except OSError:
        raise DataError(f"--spacy {name}: not there; python -m spacy download {name}") from None


def draw_gallery(rows: Sequence[Row], out: Path) -> None:
    """Some captions that have every negative and fit a line, what is new in colour."""
    import matplotlib.pyplot as plt

    good = [row for row in rows if all(row.negatives.values()) and 40 < len(row.caption) < 75]
    chosen = random.Random(1).sample(good, min(8, len(good)))
    lines = [
        (row.caption.split(), name, found[0].split())
        for row in chosen
        for name, found in ({"caption": [row.caption]} | row.negatives).items()
    ]
    figure = plt.figure(figsize=(8.6, 0.235 * len(lines) + 0.2), dpi=90)
    font: dict[str, Any] = {"family": "monospace", "fontsize": 8.5, "va": "center"}
    for k, (old, name, new) in enumerate(lines):
        y = 1 - (k + 1) / (len(lines) + 1)
        figure.text(0.01, y, name, color="gray", **font)
        at = 0.11
        moves = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        for kind, _, _, start, end in moves:
            style = ("black", "normal") if kind == "equal" else ("#b3261e", "bold")
            for word in new[start:end]:
                figure.text(at, y, word, color=style[0], weight=style[1], **font)
                at += 0.0085 * (len(word) + 1)
    figure.savefig(out)


# Blind readings


class Item(NamedTuple):
    """A negative to be judged."""

    maker: str
    image: str
    caption: str
    sentence: str


def items_of(rows: Sequence[Row], maker: str, kind: str, known: Iterable[str]) -> list[Item]:
    """A maker's negatives for the sheet of a type, of photos whose captions are known."""
    return [
        Item(maker, row.image, *(" ".join(text.split()) for text in (row.caption, negative)))
        for row in rows
        if row.image in known
        for name in dict.fromkeys((kind, *OTHERS.get(kind, ())))
        for negative in row.negatives.get(name, ())
    ]


def write_sheets(args: argparse.Namespace) -> None:
    """A shuffled sheet for each type, the guide and the key."""
    makers = {"ours": read(args.ours), **{path.stem: read(path) for path in args.against}}
    if len(makers) < 1 + len(args.against):
        raise DataError("--against: two makers have one name; rename their files")
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
            pool = items_of(rows, maker, kind, captions)
            count = args.items if maker == "ours" else args.others
            chosen += draw.sample(pool, min(count, len(pool)))
        draw.shuffle(chosen)
        key |= {f"{kind}#{k}": item.maker for k, item in enumerate(chosen)}
        sheet = ""
        for k, item in enumerate(chosen):
            others = " | ".join(c for c in captions[item.image] if c != item.caption)
            sheet += f"#{k}\n  other captions: {others}\n"
            sheet += f"  caption:  {item.caption}\n  sentence: {item.sentence}\n"
        (args.out / f"{kind}.txt").write_text(sheet, "utf-8")
    (args.out / "GUIDE.txt").write_text(GUIDE, "utf-8")
    (args.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", "utf-8")
    print(f"{len(key)} items in {args.out}; give readers GUIDE.txt and the sheets, not key.json")


def count_marks(folder: Path) -> dict[str, Any]:
    """Read items of each maker, and per cent marked with each label, by type.

    Raises:
        DataError: the key or a line of marks is not what it should be.
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
        path = folder / f"{kind}.marks"
        if not path.exists():
            continue
        marks = Counter(
            (makers[k], label)
            for k, labels in read_marks(path, set(makers)).items()
            for label in (*labels, "any")
        )
        counts[kind] = {}
        for maker, read in sorted(Counter(makers.values()).items()):
            counts[kind][maker] = {"read": read}
            for label in (*LABELS, "any"):
                share = marks[maker, label] / read
                shares = (share, *evaluate.wilson(share, read))
                counts[kind][maker][f"{label} %"] = [round(100 * x, 1) for x in shares]
    if not counts:
        raise DataError(f"{folder}: no .marks files; its GUIDE.txt says how they are written")
    return counts


def read_marks(path: Path, items: set[int]) -> dict[int, set[str]]:
    """Labels of each marked item."""
    marks: dict[int, set[str]] = defaultdict(set)
    for n, line in enumerate(path.read_text("utf-8-sig", errors="replace").split("\n"), 1):
        found = re.match(r"#([0-9]+)\t([a-z|]+)\s*(?:\t|$)", line)
        labels = set(found[2].split("|")) if found else set()
        if line.strip() and (not found or int(found[1]) not in items or not labels <= set(LABELS)):
            raise DataError(f"{path}, line {n}: wanted #item<TAB>label<TAB>reason")
        if found:
            marks[int(found[1])] |= labels
    return marks


# The commands


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the report, or of one of the two commands of ``reading``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if argv[:1] == ["reading"]:
        commands = parser.add_subparsers(dest="command", required=True)
        sheets = commands.add_parser("sheets", help="write sheets for readers")
        sheets.add_argument("ours", type=Path, help="a manifest with negatives")
        sheets.add_argument("--against", type=Path, nargs="*", default=[], help="others' files")
        sheets.add_argument("--out", type=Path, required=True, help="a new folder")
        sheets.add_argument("--items", type=count, default=60, help="of ours, for each type (60)")
        sheets.add_argument("--others", type=count, default=30, help="of each other maker (30)")
        sheets.add_argument("--seed", type=int, default=0)
        marks = commands.add_parser("count", help="count the marks")
        marks.add_argument("folder", type=Path)
        marks.add_argument("--out", type=Path, metavar="FILE.json", help="where to save the counts")
        return parser.parse_args(argv[1:])
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help='files, or "reading sheets|count"')
    add("--mlm", metavar="DIR_OR_NAME", help="masked language model that reads them")
    add("--spacy", metavar="NAME", help="pipeline that tells parts of speech")
    add("--pairs", type=count, default=1000, help="pairs of each type that these two read (1000)")
    add("--speed", type=Path, metavar="CAPTIONS", help="time negatives.py beside --spacy's tagging")
    add("--gallery", type=Path, metavar="FILE.png", help="image of some captions of the first FILE")
    add("--out", type=Path, metavar="FILE.json", help="where to save the figures")
    add("--markdown", action="store_true", help="print the table of the figures")
    args = parser.parse_args(argv, argparse.Namespace(command="report"))
    if args.speed and not args.spacy:
        parser.error("--speed needs --spacy")
    return args


def count(text: str) -> int:
    """A whole number above 0, of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number above 0, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure files, write sheets or count marks."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    out = getattr(args, "out", None)
    for path in (out, getattr(args, "gallery", None)):
        if path and not path.parent.is_dir():
            raise DataError(f"{path}: there is no folder {path.parent}; make it first")
    if args.command == "sheets":
        write_sheets(args)
        return
    if args.command == "count":
        results = count_marks(args.folder)
        for kind, makers in results.items():
            for maker, row in makers.items():
                shares = ", ".join(f"{k[:-2]} {v[0]:g} %" for k, v in row.items() if k != "read")
                print(f"{kind:10} {maker:12} {row['read']:4} read: {shares}")
    else:
        model = MaskedModel(args.mlm, "auto") if args.mlm else None
        parse = load_spacy(args.spacy) if args.spacy else None
        results = {"files": {f.stem: report(f, args, model, parse) for f in args.files}}
        if args.speed:
            results["speed"] = speed(args.speed, parse)
            print(results["speed"])
        if args.gallery:
            draw_gallery(read(args.files[0]), args.gallery)
        if args.markdown:
            print(markdown(results))
    if out:
        evaluate.write_text(out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"negatives_report.py: error: {error}", file=sys.stderr)
        sys.exit(2)

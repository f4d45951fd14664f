"""How good are the negatives of a file?  Numbers, and a picture of examples.

  python negatives.py captions.json --out lexicon.jsonl
  python scripts/negatives_report.py lexicon.jsonl --mlm DIR --spacy en_core_web_sm --ngrams \\
      --speed --out scripts/results/negatives_lexicon.json --gallery gallery.png

FILE is a manifest of negatives.py, NegCLIP's .tsv (column neg_caption), or a SugarCrepe .json.
The blind readers see no picture.  They are asked which of two sentences is the true caption:

  mlm      the one with the higher pseudo-log-likelihood, every word masked in turn, under a masked
           language model (Salazar et al. 2020); a tie is half a point
  ngrams   the one that a logistic regression on counts of words, pairs and triples prefers; it has
           learned from the pairs of half of the images, the other half is counted

50 % is a reader who cannot tell.  Needs transformers (mlm), scikit-learn (ngrams), spacy (parts
of speech) and matplotlib (gallery); what is not asked for is not needed.
"""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import itertools
import json
import random
import re
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import negatives as kit
from negatives import DataError, run_script

Pair = tuple[str, str, str]  # image, caption, negative


def read_pairs(path: Path) -> dict[str, list[Pair]]:
    """(image, caption, negative) of every negative of a file, by type.

    Raises:
        DataError: the file cannot be read, or is not of its kind.
    """
    try:
        pairs = _read_pairs(path)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise DataError(
            f"{path}: cannot be read as {path.suffix or 'a manifest'} ({error!r})"
        ) from None
    if not pairs:
        raise DataError(f"{path}: has no negatives")
    return pairs


def _read_pairs(path: Path) -> dict[str, list[Pair]]:
    pairs: dict[str, list[Pair]] = defaultdict(list)
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t"):
                for negative in ast.literal_eval(row["neg_caption"]):
                    pairs["negclip"].append((row["filepath"], row["title"], negative))
    elif path.suffix == ".json":
        for row in json.loads(path.read_text(encoding="utf-8")).values():
            pairs[path.stem].append((row["filename"], row["caption"], row["negative_caption"]))
    else:
        for row in read_manifest(path):
            image = str(row.get("image_id") or row.get("image") or row["caption"])
            for name, negative in row["negatives"].items():
                if negative is not None:
                    pairs[name].append((image, row["caption"], negative))
    return pairs


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a manifest, without its header.

    Raises:
        DataError: the file cannot be read, or a line is no caption with negatives.
    """
    for _, place, row in kit.read_rows(path):
        if "manifest" in row:
            continue
        if "negatives" not in row:
            raise DataError(f"{place}: no negatives; run negatives.py first")
        made = row["negatives"]
        texts = [row.get("caption"), *made.values()] if isinstance(made, dict) else [None]
        if texts[0] is None or any(not isinstance(t, str | None) for t in texts):
            raise DataError(f"{place}: want a record with a caption and negatives")
        yield row


# The blind readers


class MaskedReader:
    """Pseudo-log-likelihood of sentences under a masked language model, in nats."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Load a model by name or from a folder."""
        import torch
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForMaskedLM.from_pretrained(name, dtype=torch.float32)
        self.model = self.model.to(device).eval()
        self.known: dict[str, float] = {}

    def score(self, texts: list[str], batch: int = 1024) -> list[float]:
        """One number for each text; a text that came before is not read again."""
        import torch

        new = sorted({clean(t) for t in texts} - self.known.keys())
        ids = self.tokenizer(new, truncation=True, max_length=64)["input_ids"] if new else []
        rows = sorted((len(x), i, k) for i, x in enumerate(ids) for k in range(1, len(x) - 1))
        total = np.zeros(len(new))
        device = self.model.device
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            width = part[-1][0]
            padded = torch.zeros(len(part), width, dtype=torch.long)
            mask = torch.zeros_like(padded)
            for r, (size, i, _) in enumerate(part):
                padded[r, :size], mask[r, :size] = torch.tensor(ids[i]), 1
            places = torch.tensor([k for _, _, k in part])
            every = torch.arange(len(part))
            wanted = padded[every, places]
            padded[every, places] = self.tokenizer.mask_token_id
            with torch.inference_mode():
                logits = self._logits(padded.to(device), mask.to(device), places.to(device))
                found = logits.float().log_softmax(-1).cpu()[every, wanted].numpy()
            np.add.at(total, [i for _, i, _ in part], found)
        self.known.update(zip(new, total.tolist(), strict=True))
        return [self.known[clean(t)] for t in texts]

    def _logits(self, ids: Any, mask: Any, places: Any) -> Any:
        """Logits at the masked places; BERT's head reads only those."""
        every = places.new_tensor(range(len(places)))
        if hasattr(self.model, "bert"):
            hidden = self.model.bert(ids, attention_mask=mask).last_hidden_state
            return self.model.cls(hidden[every, places])
        return self.model(ids, attention_mask=mask).logits[every, places]


def clean(text: str) -> str:
    """Equal for texts that differ in case, in spaces, or in the mark at the end."""
    return re.sub(r"\s+([.,!?])", r"\1", " ".join(text.lower().split())).rstrip(" .")


def masked_reader(pairs: list[Pair], reader: MaskedReader) -> float:
    """How often the caption is the likelier one of a pair, in %."""
    scores = reader.score([text for _, *both in pairs for text in both])
    true, false = np.array(scores[::2]), np.array(scores[1::2])
    return float(100 * np.mean((true > false) + 0.5 * (true == false)))


def ngram_reader(pairs: list[Pair]) -> float:
    """How often a classifier of n-grams, trained on other images, prefers the caption, in %."""
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    half = np.array([zlib.crc32(image.encode()) % 2 == 0 for image, _, _ in pairs])
    if not 0 < half.sum() < len(half) or len(half) < 100:
        raise DataError(f"--ngrams: {len(half)} negatives are too few to learn from and count")
    counter = CountVectorizer(ngram_range=(1, 3), token_pattern=r"[^\s.,!?]+", min_df=2)
    texts = [clean(text) for _, *both in pairs for text in both]
    counts = counter.fit_transform(texts).astype(np.float32)
    x = counts[::2] - counts[1::2]
    train = x[half]
    model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=300)
    model.fit(sparse.vstack([train, -train]), np.repeat([1, 0], train.shape[0]))
    score = model.decision_function(x[~half])
    return float(100 * np.mean((score > 0) + 0.5 * (score == 0)))


# What the edits are


def changed(caption: str, negative: str) -> list[tuple[list[str], list[str]]]:
    """Words that went out and that came in, span by span."""
    old, new = caption.split(), negative.split()
    moves = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [(old[a:b], new[c:d]) for kind, a, b, c, d in moves if kind != "equal"]


def describe(pairs: list[Pair]) -> dict[str, Any]:
    """Length change, duplicates and the most used replacements."""
    growth = Counter(len(n.split()) - len(c.split()) for _, c, n in pairs)
    used: Counter[str] = Counter()
    for _, caption, negative in pairs:
        for old, new in changed(clean(caption), clean(negative)):
            used[f"{' '.join(old)} > {' '.join(new)}"] += 1
    return {
        "negatives": len(pairs),
        "mean words more": sum(k * n for k, n in growth.items()) / len(pairs),
        "same length %": 100 * growth[0] / len(pairs),
        "same as the caption": sum(clean(c) == clean(n) for _, c, n in pairs),
        "most used": dict(used.most_common(25)),
    }


CLASSES = {"PROPN": "NOUN", "AUX": "VERB", "NUM": "ADJ", "DET": "ADJ"}
CLASSES |= dict.fromkeys(("ADV", "SCONJ", "PART"), "ADP")
WANTED = {"relation": "ADP", "attribute": "ADJ", "object": "NOUN", "action": "VERB"}


def right_speech(name: str, pairs: list[Pair], parse: Any) -> float:
    """How often spaCy finds a new word of the type's or of the old word's part of speech, in %.

    Edits of one span count, by their first or last word ("and" becomes "but no").  Nouns and names
    are one class, as are verbs and auxiliaries, all words that say where, and adjectives, numbers,
    determiners and nouns before a noun (a metal fence).
    """
    right = total = 0
    for _, caption, negative in pairs:
        spans = changed(caption, negative)
        if len(spans) == 1 and all(spans[0]):
            first = next(
                k
                for k, (old, new) in enumerate(
                    itertools.zip_longest(caption.split(), negative.split())
                )
                if old != new
            )
            old, new = spans[0]
            found = speech(negative, first, len(new), parse)
            before = speech(caption, first, len(old), parse)
            total += 1
            right += WANTED.get(name) in found or found[-1] == before[-1] or found[0] == before[0]
    return 100 * right / max(total, 1)


def speech(text: str, first: int, count: int, parse: Any) -> list[str]:
    """Classes of some words of a text, told by their number."""
    words = list(re.finditer(r"\S+", text))[first : first + count]
    doc = parse(text)
    classes = []
    for token in doc:
        if words[0].start() <= token.idx < words[-1].end() and token.text[0].isalnum():
            modifies = token.pos_ == "NOUN" and doc[token.i + 1 : token.i + 2].text.isalpha()
            modifies = modifies and doc[token.i + 1].pos_ == "NOUN"
            classes.append("ADJ" if modifies else CLASSES.get(token.pos_, token.pos_))
    return classes or [""]


def speed(captions: list[str], parse: Any) -> dict[str, float]:
    """Captions a second of processor time: the engine, its learning, and spaCy's tagging."""
    start = time.process_time()
    read = [kit._read(caption) for caption in captions]
    slots = kit.learn_slots([sentence for sentence in read if sentence])
    learned = time.process_time()
    for caption in captions:
        kit.make_negatives(caption, slots=slots)
    made = time.process_time()
    for _ in parse.pipe(captions, batch_size=256):
        pass
    tagged = time.process_time()
    return {
        "captions": len(captions),
        "learning the slots, seconds": learned - start,
        "lexicon, captions a second": len(captions) / (made - learned),
        "lexicon with learning, captions a second": len(captions) / (made - start),
        "spaCy tagging, captions a second": len(captions) / (tagged - made),
    }


# The picture


def draw_gallery(path: Path, rows: list[dict[str, Any]], out: Path) -> None:
    """Captions with their four negatives, what is new in colour."""
    import matplotlib.pyplot as plt

    lines = [
        (row["caption"].strip(), name, row["negatives"].get(name, ""))
        for row in rows
        for name in ("caption", *row["negatives"])
    ]
    figure = plt.figure(figsize=(8.6, 0.235 * len(lines) + 0.2), dpi=90)
    height, step = 1 / (len(lines) + 1), 0.0085
    font: dict[str, Any] = {"family": "monospace", "fontsize": 8.5, "va": "center"}
    for k, (caption, name, negative) in enumerate(lines):
        y = 1 - (k + 1) * height
        figure.text(0.01, y, name, color="gray", **font)
        at = 0.11
        spans = changed(caption, negative.strip()) if negative else []
        new = [word for _, words in spans for word in words]
        for word in (negative.strip() or caption).split():
            edited = bool(new) and word == new[0]
            new = new[1:] if edited else new
            weight, colour = ("bold", "#b3261e") if edited else ("normal", "black")
            figure.text(at, y, word, color=colour, weight=weight, **font)
            at += step * (len(word) + 1)
    figure.savefig(out)


# The command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare every option."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="a manifest, NegCLIP's .tsv or SugarCrepe's .json")
    add("--mlm", metavar="DIR_OR_NAME", help="masked language model of the first reader")
    add("--pairs", type=int, default=2000, metavar="N", help="pairs of each type that it reads")
    add("--ngrams", action="store_true", help="ask the second reader")
    add("--spacy", metavar="NAME", help="pipeline that tells parts of speech")
    add("--speed", action="store_true", help="time the lexicon engine against --spacy's tagging")
    add("--gallery", type=Path, metavar="FILE.png", help="picture of some captions")
    add("--out", type=Path, metavar="FILE.json", help="where to save the numbers")
    args = parser.parse_args(argv)
    if args.speed and not args.spacy:
        parser.error("--speed needs --spacy")
    if args.pairs < 1:
        parser.error("--pairs must be at least 1")
    for path in filter(None, (args.out, args.gallery)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print and save."""
    args = parse_args(argv)
    pairs = read_pairs(args.file)
    report: dict[str, Any] = {"file": args.file.name, "types": {}}
    if args.file.suffix == ".jsonl":
        with args.file.open(encoding="utf-8-sig") as lines:
            line = next(lines)
        first = json.loads(line) if line.strip() else {}
        report["header"] = first if "captions" in first else None
    reader = MaskedReader(args.mlm) if args.mlm else None
    parse = kit.load_spacy(args.spacy, tags_only=True) if args.spacy else None
    for name, found in pairs.items():
        row = describe(found)
        some = random.Random(0).sample(found, min(args.pairs, len(found)))
        if report.get("header"):
            row["coverage %"] = 100 * len(found) / report["header"]["captions"]
        if reader:
            row["blind, mlm %"] = masked_reader(some, reader)
        if args.ngrams:
            row["blind, ngrams %"] = ngram_reader(found)
        if parse:
            row["right part of speech %"] = right_speech(name, some, parse)
        report["types"][name] = row
        print(name, {k: round(v, 1) for k, v in row.items() if not isinstance(v, dict)}, flush=True)
    if args.speed:
        captions = dict.fromkeys(caption for p in pairs.values() for _, caption, _ in p)
        report["speed"] = speed(list(captions), parse)
        print(report["speed"])
    if args.gallery:
        draw_gallery(args.file, examples(args.file), args.gallery)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def examples(path: Path, count: int = 8) -> list[dict[str, Any]]:
    """Some captions of a manifest that have all four negatives and fit a line."""
    rows = [
        row
        for row in read_manifest(path)
        if all(row["negatives"].values()) and 40 < len(row["caption"]) < 75
    ]
    return random.Random(1).sample(rows, min(count, len(rows)))


if __name__ == "__main__":
    sys.exit(run_script(main, "negatives_report.py"))

"""How good are the negatives of a file?  Numbers, and a picture of examples.

  python negatives.py captions.json --out lexicon.jsonl
  python scripts/negatives_report.py lexicon.jsonl --mlm DIR --spacy en_core_web_sm \\
      --out scripts/results/negatives_lexicon.json --gallery gallery.png

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
from negatives import NEGATIVE_TYPES, DataError, make_negatives  # noqa: E402

Pair = tuple[str, str, str]  # image, caption, negative


def read_pairs(path: Path) -> dict[str, list[Pair]]:
    """(image, caption, negative) of every negative of a file, by type."""
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
            image = str(row.get("image_id") or row.get("image"))
            for name, negative in row["negatives"].items():
                if negative is not None:
                    pairs[name].append((image, row["caption"], negative))
    return pairs


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a manifest, without its header."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if "manifest" not in row:
                if "negatives" not in row:
                    raise DataError(f"{path.name}:{number}: no negatives; run negatives.py first")
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
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    half = np.array([zlib.crc32(image.encode()) % 2 == 0 for image, _, _ in pairs])
    counter = CountVectorizer(ngram_range=(1, 3), token_pattern=r"[^\s.,!?]+", min_df=2)
    texts = [clean(text) for _, *both in pairs for text in both]
    counts = counter.fit_transform(texts).astype(np.float32)
    x = counts[::2] - counts[1::2]
    train = x[half]
    model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=300)
    model.fit(vstack([train, -train]), np.repeat([1, 0], train.shape[0]))
    score = model.decision_function(x[~half])
    return float(100 * np.mean((score > 0) + 0.5 * (score == 0)))

"""Distil spaCy's tags of captions into scripts/tagger.bin, the tagger of negatives.py.

    pip install spacy && python -m spacy download en_core_web_sm
    python scripts/train_tagger.py captions_train2014.json [MORE...] --spacy-model en_core_web_sm

A linear classifier on hashed windows of words and endings (negatives.WINDOWS), trained by Adam
with an L1 penalty and rounded to int8.  One thirtieth of the captions is held out and measured.
The file in the repository was trained on 59,050 captions in two minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import negatives as kit


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("captions", nargs="+", help="files that negatives.py reads, or a caption a line (.txt)")
    text = "spaCy model whose tags are learned (default en_core_web_sm)"
    add("--spacy-model", default="en_core_web_sm", help=text)
    add("--epochs", type=int, default=6, help="passes over the captions (default 6)")
    add("--out", type=Path, default=kit.TAGGER, help="file to write (default scripts/tagger.bin)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help is answered before torch is imported

import numpy as np
import torch
from torch.nn.functional import cross_entropy, embedding_bag


def main(argv: list[str] | None = None) -> None:
    """Tag, train, measure and write."""
    args = parse_args(argv)
    texts = sorted({text for path in args.captions for text in read_texts(Path(path))})
    np.random.default_rng(0).shuffle(texts)
    cut = len(texts) * 29 // 30
    pipeline = kit.load_spacy(args.spacy_model, tags_only=True)
    tagger = functools.partial(kit.tag_with_spacy, pipeline)
    rows, tags = make_rows(texts[:cut], tagger)
    held_out = make_rows(texts[cut:], tagger)
    weights = train(rows, tags, args.epochs)
    scale = weights.abs().max() / 127
    rounded = (weights / scale).round()
    right = embedding_bag(held_out[0], rounded, mode="sum").argmax(dim=1) == held_out[1]
    content = torch.tensor([kit.TAGS[i] in "ANSGZBE" for i in held_out[1].tolist()])
    print(
        f"{len(texts)} captions, {len(rows)} words; held out: {100 * right.float().mean():.1f} % ",
        end="",
    )
    print(f"of tags are as in spaCy, {100 * right[content].float().mean():.1f} % of content words")
    args.out.write_bytes(zlib.compress(rounded.to(torch.int8).numpy().tobytes(), 9))


def read_texts(path: Path) -> list[str]:
    """Captions of a file."""
    if path.suffix == ".txt":
        return [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    return [record.caption.strip() for record in kit.read_captions(path)]


def make_rows(texts: list[str], tagger: kit.Tagger) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of weights [N, windows] of all words, and their tags [N]."""
    sentences = [kit.split(text) for text in texts]
    tagger(sentences)
    names, tags = ["", ""], "  "
    for s in sentences:
        names += [*s.words, "", ""]
        tags += s.tags + "  "
    word, ending, _, _ = np.ascontiguousarray(kit.vocabulary().hashes(names).T)
    rows = np.stack(list(kit.window_rows(word, ending)), axis=1).astype(np.int64)
    real = np.array([tag != " " for tag in tags])
    wanted = torch.tensor([kit.TAGS.index(tag) for tag in tags if tag != " "])
    return torch.from_numpy(rows[real]), wanted


def train(rows: torch.Tensor, tags: torch.Tensor, epochs: int, batch: int = 2048) -> torch.Tensor:
    """Fit weights [ROWS, tags]; the step falls linearly to 0."""
    torch.manual_seed(0)
    weights = torch.zeros(kit.ROWS, len(kit.TAGS), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    steps = epochs * -(-len(rows) // batch)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows)).split(batch):
            scores = embedding_bag(rows[chosen], weights, mode="sum")
            loss = cross_entropy(scores, tags[chosen]) + 2e-6 * weights.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return weights.detach()


if __name__ == "__main__":
    sys.exit(kit.run_script(main, "train_tagger.py"))

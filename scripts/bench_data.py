#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Time the training loader against bare JPEG decoding, and measure the index of a manifest.

  python scripts/bench_data.py --images DIR --out scripts/results/data.json
  python scripts/bench_data.py                 # synthetic photos of 640 x 480

Bare is the least that any loader does: open, decode, resize to 224 pixels.  The training loader
also reads the caption's line, crops at random, tokenises and packs five texts an image, and stacks
the batch; it is timed in this process, as one worker of --workers runs it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, help="folder of .jpg files to load (default: synthetic photos)")
    add("--lines", type=int, default=1_000_000, help="lines of the manifest to index (default 1e6)")
    add("--rounds", type=int, default=5, help="rounds of which the median counts (default 5)")
    add("--out", type=Path, help="JSON file to write the result to (default: print it only)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help is answered before torch is imported

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Collate, ManifestDataset, Mixture, train_transform
from evaluate import load_model
from negatives import NEGATIVE_TYPES, run_script

BATCH = 16


def draw_photos(folder: Path, count: int) -> None:
    """Write JPEGs that cost what photos cost: smooth areas with some noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC))
        noisy = image + rng.normal(0, 8, image.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def write_manifest(path: Path, names: list[str], lines: int) -> None:
    """A manifest of `lines` captions with four negatives each, of COCO's length."""
    rng = random.Random(0)
    words = ("a", "the", "man", "dog", "car", "street", "big", "two", "riding", "cat", "white")
    with path.open("w") as file:
        for i in range(lines):
            texts = [" ".join(rng.choices(words, k=11)) for _ in range(5)]
            negatives = dict(zip(NEGATIVE_TYPES, texts[1:], strict=True))
            record = {"image": names[i % len(names)], "caption": texts[0], "negatives": negatives}
            file.write(json.dumps(record) + "\n")


def bare(paths: list[Path]) -> float:
    """Images a second of decoding and resizing alone."""
    start = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    return len(paths) / (time.process_time() - start)


def loader(mixture: Mixture, tokenizer: Any, steps: int) -> float:
    """Images a second of the training loader, in this process."""
    collate = Collate(tokenizer, positives=False, negatives="valid")
    batches: Any = mixture.batches(0, steps)
    start = time.process_time()
    for _ in DataLoader(mixture, batch_sampler=batches, collate_fn=collate):
        pass
    return steps * BATCH / (time.process_time() - start)


def index_cost(folder: Path, lines: int, transform: Any) -> dict[str, Any]:
    """Memory and time of a manifest's index; 1,000 empty files stand for all images."""
    path = folder / "long.jsonl"
    shared = [f"{'./' * (i // 1000)}{i % 1000}.jpg" for i in range(5000)]
    write_manifest(path, shared, lines)
    for i in range(1000):
        (folder / f"{i}.jpg").touch()
    start = time.perf_counter()
    tracemalloc.start()
    dataset = ManifestDataset(path, folder, transform)
    held, peak = (value / 2**20 for value in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    traced = time.perf_counter() - start
    start = time.perf_counter()
    ManifestDataset(path, folder, transform)
    return {
        "lines": len(dataset),
        "file_mib": round(path.stat().st_size / 2**20),
        "held_mib": round(held, 1),
        "peak_mib": round(peak, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "seconds_traced": round(traced, 1),
    }


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    model = load_model("ViT-B-32")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.images is None:
            draw_photos(folder, 64)
        images = args.images or folder
        paths = sorted(images.rglob("*.jpg"))
        names = [str(path.relative_to(images)) for path in paths]
        manifest = folder / "m.jsonl"
        write_manifest(manifest, names, len(names))
        dataset = ManifestDataset(manifest, images, train_transform(model.net))
        mixture = Mixture([dataset], [1], BATCH, 0, True)
        steps = mixture.steps[0]
        rounds = [
            (bare(paths[: steps * BATCH]), loader(mixture, model.tokenizer, steps))
            for _ in itertools.repeat(None, args.rounds)
        ]
        result: dict[str, Any] = {
            "images": args.images.name if args.images else "synthetic 640 x 480",
            "bare_per_core_second": round(statistics.median(a for a, _ in rounds), 1),
            "loader_per_core_second": round(statistics.median(b for _, b in rounds), 1),
            "loader_of_bare": round(statistics.median(b / a for a, b in rounds), 3),
        }
        place = folder / "index"
        place.mkdir()
        result["index"] = index_cost(place, args.lines, train_transform(model.net))
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_script(main, "bench_data.py"))

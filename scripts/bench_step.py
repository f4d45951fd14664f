#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Time one training step: as released, packed, as prefix trees, and plain CLIP's, in turns.

  python scripts/bench_step.py                      # synthetic captions of COCO's lengths
  python scripts/bench_step.py --data negatives.jsonl --out scripts/results/step.json
  python scripts/bench_step.py --ways tree parts --batch-size 128 --micro-batch 16
  torchrun --nproc_per_node=2 scripts/bench_step.py --ways tree

ViT-B/32 with random weights and images; loading and tokenising are not timed.  "released" is the
step of the paper's code: caption and four negatives padded to 77 tokens each, all through
model.encode_text, dense logits, stock AdamW.  "open_clip" is open_clip's own plain step, which
knows no negatives: one caption padded to 77 tokens, ClipLoss, stock AdamW; "plain" is ours without
negatives.  So `of_open_clip` says how long a step takes in parts of open_clip's plain one, and
`of_plain` what negatives cost.  Ratios are medians of ratios within a round; those
of CPU time hold where other processes take turns on the cores (with OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="manifest with negatives (default: synthetic)")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model (default ViT-B-32)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images of all ranks (default 32)"
    )
    parser.add_argument("--micro-batch", type=int, default=8, help="images of a part (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default fp32"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto"
    )
    every = ["released", "packed", "tree", "open_clip", "plain", "parts"]
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=every,
        default=every[:5],
        help="what to time (default: all but parts)",
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":  # --help is answered before torch is imported
    parse_args()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_losses import Released
from run_metrics import memory

import train
from data import Batch, image_size, normalise, pack_texts, read_manifest
from evaluate import PRECISIONS, Model, Rank, load_model, start_process
from negatives import NEGATIVE_TYPES, run_script

# Tokens of COCO's captions with the two ends, Karpathy's test split: 13.5 on average.
LENGTHS = {10: 6, 11: 16, 12: 21, 13: 18, 14: 13, 15: 9, 16: 6, 17: 4, 19: 3, 22: 2, 27: 1}
WORDS = (
    *("man", "dog", "red", "car", "street", "big", "two", "riding", "cat", "table", "white"),
    *("sitting", "with", "near", "tree", "blue"),
)


class Way(NamedTuple):
    """A way to do a step, and how many text tokens of an image it computes."""

    step: Callable[[], Any]
    tokens: float


def synthetic_texts(count: int, rng: random.Random) -> list[list[str]]:
    """Captions of COCO's lengths, each with four versions of which one word is another."""
    found = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.choices(list(LENGTHS), list(LENGTHS.values()))[0] - 2)
        texts = [" ".join(words)]
        for _ in NEGATIVE_TYPES:
            i = rng.randrange(len(words))
            other = rng.choice([word for word in WORDS if word != words[i]])
            texts.append(" ".join([*words[:i], other, *words[i + 1 :]]))
        found.append(texts)
    return found


def manifest_texts(path: Path, count: int, rng: random.Random) -> list[list[str]]:
    """Captions of a manifest that have all four negatives, and these."""
    records = [record for record in read_manifest(path) if all(record.negatives.values())]
    full = [[record.caption, *map(str, record.negatives.values())] for record in records]
    return rng.sample(full, count)


def make_batch(texts: list[list[str]], model: Model, size: tuple[int, int], share: bool) -> Batch:
    """The batch that train.py would make of these captions and negatives."""
    flat = [text[0] for text in texts] + [t for text in texts for t in text[1:]]
    pixels = torch.randint(0, 256, (len(texts), 3, *size), dtype=torch.uint8)
    valid = torch.full((len(texts), len(NEGATIVE_TYPES)), len(texts[0]) > 1)
    none = torch.zeros(len(texts), dtype=torch.bool)
    return Batch(pixels, pack_texts(flat, model.tokenizer, share=share), none, valid, valid, [])


def released_step(
    net: Any,
    loss: Released,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    tokens: Tensor,
    precision: str,
) -> None:
    """The paper's code's step: every text padded, its loss with dense logits."""
    b = len(images)
    dtype = PRECISIONS[precision]
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        visual = F.normalize(net.encode_image(normalise(images, net)), dim=-1)
        texts = F.normalize(net.encode_text(tokens), dim=-1)
        negatives = texts[b:].view(b, len(NEGATIVE_TYPES), -1)
        valid = torch.ones(negatives.shape[:2], dtype=torch.bool, device=images.device)
        value = loss(visual, texts[:b], negatives, valid, net.logit_scale.exp())
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    with torch.no_grad():
        net.logit_scale.clamp_(0, 4.6052)


def make_released(model: Model, texts: list[list[str]], args: argparse.Namespace) -> Way:
    """The released step on these captions."""
    device = next(model.net.parameters()).device
    adam = torch.optim.AdamW(model.net.parameters(), lr=1e-6, eps=1e-6)
    flat = [text[0] for text in texts] + [t for text in texts for t in text[1:]]
    tokens = model.tokenizer(flat).to(device)
    size = image_size(model.net)
    images = torch.randint(0, 256, (len(texts), 3, *size), dtype=torch.uint8).to(device)
    given = (model.net, Released(), adam, images, tokens, args.precision)
    step = functools.partial(released_step, *given)
    return Way(step, tokens.numel() / len(texts))


def make_open_clip(model: Model, texts: list[list[str]], args: argparse.Namespace) -> Way:
    """open_clip's own step on the captions alone."""
    net, loss = model.net, ClipLoss()
    device = next(net.parameters()).device
    adam = torch.optim.AdamW(net.parameters(), lr=1e-6, eps=1e-6)
    tokens = model.tokenizer([text[0] for text in texts]).to(device)
    shape = (len(texts), 3, *image_size(net))
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    dtype = PRECISIONS[args.precision]

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss(*net(normalise(images, net), tokens)[:3])
        adam.zero_grad()
        value.backward()
        adam.step()
        with torch.no_grad():
            net.logit_scale.clamp_(0, 4.6052)

    return Way(step, tokens.numel() / len(texts))


def make_ours(
    model: Model, texts: list[list[str]], args: argparse.Namespace, rank: Rank, name: str
) -> Way:
    """The step of train.py: "packed", "tree", "parts" (a tree in parts) or "plain" captions."""
    kind = ["--recipe", "clip"] if name == "plain" else ["--imc", "repulsion"]
    options = train.parse_args([*kind, "--precision", args.precision, "--lr", "1e-6"])
    run = train.make_run(options, model, rank)
    run.towers.train()
    part = args.micro_batch if name == "parts" else len(texts)
    size = image_size(model.net)
    texts = [text[:1] for text in texts] if name == "plain" else texts
    chunks = [texts[i : i + part] for i in range(0, len(texts), part)]
    parts = [make_batch(chunk, model, size, name != "packed") for chunk in chunks]
    tokens = sum(batch.texts.computed for batch in parts) / len(texts)
    return Way(functools.partial(train.train_step, run, parts, 1e-6), tokens)


def make_ways(args: argparse.Namespace, rank: Rank) -> dict[str, Way]:
    """The ways that --ways names, each with a model of its own."""
    rng = random.Random(rank.number)
    count = args.batch_size // rank.world
    texts = manifest_texts(args.data, count, rng) if args.data else synthetic_texts(count, rng)
    ways = {}
    for name in args.ways:
        torch.manual_seed(0)
        model = load_model(args.model, device=str(rank.device))
        if name in ("released", "open_clip"):
            make = make_released if name == "released" else make_open_clip
            ways[name] = make(model, texts, args)
        else:
            ways[name] = make_ours(model, texts, args, rank, name)
    return ways


def seconds(step: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Time one step, by the clock and in CPU time of this process."""
    start, used = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - used


def measure(args: argparse.Namespace, rank: Rank) -> dict[str, Any]:
    """Take turns between the ways, and put their times side by side."""
    ways = make_ways(args, rank)
    for way in ways.values():
        way.step()  # warm up
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            times[name].append(seconds(way.step, rank.device))
    result: dict[str, Any] = {}
    for name, way in ways.items():
        clock, cpu = (statistics.median(column) for column in zip(*times[name], strict=True))
        result[name] = {
            "seconds": round(clock, 3),
            "cpu_seconds": round(cpu, 3),
            "images_per_second": round(args.batch_size / clock, 2),
            "text_tokens_per_image": round(way.tokens, 1),
        }
        if "released" in ways and name != "released":
            for i, key in enumerate(("times_faster", "times_faster_cpu")):
                pairs = zip(times["released"], times[name], strict=True)
                ratios = [slow[i] / fast[i] for slow, fast in pairs]
                result[name][key] = round(statistics.median(ratios), 2)
                result[name][f"{key}_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
        for other in {"open_clip", "plain"} & ways.keys() - {name}:
            for i, key in enumerate((f"of_{other}", f"of_{other}_cpu")):
                pairs = zip(times[name], times[other], strict=True)
                ratios = [ours[i] / theirs[i] for ours, theirs in pairs]
                result[name][key] = round(statistics.median(ratios), 2)
                result[name][f"{key}_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return {"ways": result, "memory_mib_peak": round(memory(rank.device))}


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    rank = start_process(args.device)
    found = measure(args, rank)
    about = {
        "model": args.model,
        "batch_size": args.batch_size,
        "micro_batch": args.micro_batch,
        "captions": args.data.name if args.data else "synthetic",
        "precision": args.precision,
        "device": str(rank.device),
        "ranks": rank.world,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }
    if rank.number:
        return
    for name, row in found["ways"].items():
        print(name, " ".join(f"{key} {value}" for key, value in row.items()))
    print(f"peak memory {found['memory_mib_peak']} MiB")
    if args.out:
        args.out.write_text(json.dumps({**about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    code = run_script(main, "bench_step.py")
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)

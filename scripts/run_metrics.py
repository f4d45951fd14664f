# SPDX-License-Identifier: MIT
"""What train.py measures while it trains: scores on --val, metrics.jsonl and --log.

A run is a `Run` of train.py. There is nothing to start here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import evaluate
import negatives
from data import Batch
from evaluate import Suite
from negatives import DataError, why

VAL_SUITES = ("shapes", "sugarcrepe", "retrieval")


class Validation:
    """Scores the run's weights on --val, logs to val.jsonl, and keeps the best as best.pt.

    All ranks call it: each encodes its share. With --distill the moving average is scored too.
    """

    def __init__(self, run: Any, keep: Callable[[Any, int, dict[str, Any]], None]) -> None:
        """Read what --val names: a suite below --val-root, in whole or in part, or a manifest.

        A manifest's captions are compared with each of their negatives, and searched among all
        images. The best figure so far is in val.jsonl, where a run goes on. `keep` writes best.pt
        from the best module, its step, and what to note about it.
        """
        args, self.run, self.keep, self.best = run.args, run, keep, -math.inf
        if args.val in VAL_SUITES:
            self.suite = evaluate.load_suite(args.val, args.val_root, partial=True)
        else:
            self.suite = self._manifest(Path(args.val), args.val_root)
        headline = evaluate.read_table("suites").get(args.val, {}).get("headline")
        self.metric, self.path = args.best or headline, args.out / "val.jsonl"
        if self.path.exists():
            lines = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
            try:
                self.best = max((float(line["best"]) for line in lines), default=self.best)
            except (LookupError, TypeError, ValueError):
                told = "holds a line without the best figure; mend it, or move the file away"
                raise DataError(f"{self.path}: {told}") from None

    def _manifest(self, path: Path, root: Path) -> Suite:
        items: list[evaluate.Item] = []
        captions: dict[str, list[str]] = {}
        for _, record in negatives.read_records(path, need_image=True):
            image = str(root / str(record.image))
            captions.setdefault(image, []).append(record.caption)
            for kind, given in record.negatives.items():
                for text in [given] if isinstance(given, str) else given or []:
                    number, texts = str(len(items)), (record.caption, text)
                    items.append(evaluate.Item((kind,), number, (image,), texts))
        lost = [image for image in captions if not Path(image).is_file()]
        if lost or not captions:
            what = f"{len(lost)} images are not there, the first is {lost[0]}" if lost else ""
            raise DataError(f"--val {path}: {what or 'holds no captions'}; see --val-root")
        every = [text for said in captions.values() for text in said]
        image_of = [i for i, said in enumerate(captions.values()) for _ in said]
        search = evaluate.Retrieval("val", list(captions), every, image_of)
        return Suite("manifest", items, [search], {}, [])

    def _figures(self, net: Any) -> dict[str, float]:
        """Scores in per cent by name: the suite's averages, then its subsets and costs."""
        options = {"batch_size": None, "precision": self.run.args.precision, "workers": 0}
        options |= {"cache": None, "device": str(self.run.rank.device)}
        model = self.run.model._replace(net=net)
        encoder = evaluate.Encoder(model, argparse.Namespace(**options))
        scored = evaluate.score_suite(self.suite, encoder)
        rows = {
            row: 100 * evaluate.mean_of({key: sum(x) / len(x) for key, x in parts.items()})
            for row, parts in {**scored.subsets, **scored.costs}.items()
        }
        counts = {row: sum(map(len, parts.values())) for row, parts in scored.subsets.items()}
        trees = {"mean of types": list(counts)}
        if self.suite.name in VAL_SUITES:
            trees = evaluate.named_averages(self.suite.name, counts)
        averages = {name: evaluate.average(tree, rows, counts) for name, tree in trees.items()}
        return {**{name: x for name, x in averages.items() if x is not None}, **rows}

    def __call__(self, done: int) -> None:
        """Score after this step, if it is one of --val-every, the first or the last."""
        run, args, nets = self.run, self.run.args, {"current": self.run.net}
        if done % args.val_every and done != args.steps:
            return
        if run.teacher is not None:
            nets["ema"] = run.teacher.net
        for weights, net in nets.items():
            figures = self._figures(net)
            self.metric = self.metric or next(iter(figures))
            if self.metric not in figures:
                raise DataError(f"--best {self.metric}: is none of {', '.join(figures)}")
            value = figures[self.metric]
            better, self.best = value > self.best, max(self.best, value)
            if run.rank.number == 0:
                if better:
                    about = {"val": args.val, "metric": self.metric, "value": value}
                    self.keep(net, done, {**about, "weights": weights})
                line = {"step": done, "weights": weights, "best": self.best, "figures": figures}
                append_line(self.path, line)
                mark = f", the best: {args.out}/best.pt" if better else ""
                print(f"val {weights} at step {done}: {self.metric} {value:.1f}{mark}", flush=True)
        run.towers.train()


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON to a file of the run."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise DataError(f"--out {path}: cannot be written ({why(error)}); check it") from None


def open_mirror(args: argparse.Namespace, start: int) -> Callable[[int, dict[str, float]], None]:
    """Where --log sends the metrics of a step; nowhere without --log."""
    if args.log is None:
        return lambda step, figures: None
    try:
        if args.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(args.out / "tensorboard"), purge_step=start + 1)

            def write(step: int, figures: dict[str, float]) -> None:
                for key, value in figures.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            return write
        wandb: Any = importlib.import_module("wandb")
        name = hashlib.sha256(str(args.out.resolve()).encode()).hexdigest()[:16]
        kept = json.loads((args.out / "args.json").read_text(encoding="utf-8"))
        which = {"project": "ce-clip", "id": name, "resume": "allow", "name": args.out.name}
        run = wandb.init(**which, dir=str(args.out), config=kept["options"])
        return lambda step, figures: run.log(figures, step=step)
    except ImportError:
        raise DataError(f"--log {args.log}: is missing; pip install {args.log}") from None


class Log:
    """Counts what went by since the last line of metrics.jsonl."""

    def __init__(self, run: Any, start: int) -> None:
        """Begin to count at step `start`."""
        self.run, self.start = run, start
        self.mirror = open_mirror(run.args, start) if run.rank.number == 0 else None
        self.images = self.tokens = self.faults = self.same = 0
        self.skipped = self.bad = 0  # steps in a row: not applied, and not for fp16's scale
        self.began = self.mark = time.perf_counter()

    def add(
        self, parts: list[Batch], step: int, out: dict[str, float], searching: bool
    ) -> DataError | None:
        """Count a step; at times, and where it was lost, write a line; returns what failed."""
        args, rank, done, lost = (
            self.run.args,
            self.run.rank,
            step + 1,
            not (out["applied"] or searching),
        )
        self.skipped = 0 if out["applied"] else self.skipped + 1
        self.bad = 0 if out["applied"] else self.bad + lost
        self.images += args.batch_size
        self.tokens += rank.world * sum(part.texts.computed for part in parts)
        self.same += sum(part.same for part in parts)
        for fault in (fault for part in parts for fault in part.faults):
            self.faults += 1
            print(f"skipped {fault}", file=sys.stderr)
        if rank.number or not (done % args.log_every == 0 or done == args.steps or lost):
            return None
        now = time.perf_counter()
        left = (now - self.began) / (done - self.start) * (args.steps - done)
        line: dict[str, Any] = {"step": done, "epoch": step // args.steps_per_epoch, **out}
        line["logit_scale"] = float(self.run.net.logit_scale.detach().exp())
        line["images_per_second"] = self.images / (now - self.mark)
        line["text_tokens_per_second"] = self.tokens / (now - self.mark)
        line |= {"memory_mib": memory(rank.device), "bad_images": self.faults}
        line["same_negatives"] = self.same
        quiet = ("own", "caption", "distill", "grad_norm", "applied", "lr")
        shown = [key for key in out if key not in quiet and not key.startswith("threshold_")]
        said = " ".join(f"{key} {line[key]:.3f}" for key in shown)
        skipped = "" if out["applied"] else "  NOT FINITE, step skipped"
        print(
            f"step {done}/{args.steps}  {said}  {line['images_per_second']:.0f} images/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left{skipped}",
            flush=True,
        )
        self.mark, self.images, self.tokens = now, 0, 0
        try:
            append_line(args.out / "metrics.jsonl", line)
        except DataError as error:
            return error
        if self.mirror:
            self.mirror(done, {key: value for key, value in line.items() if key != "step"})
        return None


def memory(device: torch.device) -> float:
    """The peak memory of the GPU, or of this process, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return 0.0  # Windows

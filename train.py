# SPDX-License-Identifier: MIT
"""Train CLIP with hard negatives, on one device or under torchrun.

  python train.py                                        # the shapes world, minutes on a laptop
  torchrun --nproc_per_node=8 train.py --data negatives.jsonl --images coco \\
      --model ViT-B-32-quickgelu --pretrained openai --recipe ce-clip

The same command resumes a run that was cut off, to the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import (
    Batch,
    Collate,
    DataError,
    ManifestDataset,
    PackedText,
    ShapesDataset,
    batch_indices,
    can_pack,
    encode_text,
    shapes_transform,
    split_features,
    train_transform,
)
from evaluate import PRECISIONS, TINY_CONFIG, Model, load_model, pick_device, write_text
from losses import IMC_VARIANTS, RECIPES, THRESHOLDS, CEClipLoss

# Defaults: the paper's run on photos, and a small run of the shapes world.
DEFAULTS = {
    "photos": {
        **{"lr": 5e-6, "warmup": 50, "batch_size": 512, "epochs": 5, "grad_clip": 0.0},
        **{"model": "ViT-B-32-quickgelu", "save_every": 500},
    },
    "shapes": {
        **{"lr": 1e-3, "warmup": 50, "batch_size": 64, "steps": 700, "grad_clip": 1.0},
        **{"model": TINY_CONFIG.stem, "save_every": 100},
    },
}
# Options that do not shape the trajectory: a resumed run may change them.
FREE = {"out", "device", "workers", "log_every", "save_every", "dry_run", "images"}
MAX_BAD_STEPS = 3


class Rank(NamedTuple):
    """This process among all, and its device."""

    number: int
    world: int
    device: torch.device


class Towers(nn.Module):
    """Both towers in one forward, as DistributedDataParallel wants it."""

    def __init__(self, net: Any) -> None:
        """Wrap an open_clip model."""
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, texts: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit-length image features [B, D], text features [M, D] and logit_scale."""
        image_features = F.normalize(self.net.encode_image(images).float(), dim=-1)
        text_features = F.normalize(encode_text(self.net, texts).float(), dim=-1)
        return image_features, text_features, self.net.logit_scale.exp()


class Run(NamedTuple):
    """What changes while training, and what a checkpoint holds."""

    towers: nn.Module  # Towers, or DistributedDataParallel of it
    net: Any
    loss: CEClipLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def start_process(device: str) -> Rank:
    """Join the process group, if torchrun started us, and choose the device."""
    device = pick_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Rank(0, 1, torch.device(device))
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    return Rank(dist.get_rank(), dist.get_world_size(), place)


def make_run(args: argparse.Namespace, model: Model, rank: Rank) -> Run:
    """The towers, the loss, AdamW and the scaler that only fp16 needs."""
    options = {
        **{"imc": args.imc, "imc_weight": args.imc_weight, "cmr_weight": args.cmr_weight},
        **{"threshold": args.threshold, "cap": args.cap, "fixed_threshold": args.fixed_threshold},
    }
    given = {key: value for key, value in options.items() if value is not None}
    loss = CEClipLoss(args.recipe, **given).to(rank.device)
    towers: nn.Module = Towers(model.net)
    if rank.world > 1:
        ids = [rank.device.index] if rank.device.type == "cuda" else None
        towers = DistributedDataParallel(towers, device_ids=ids)
    # No decay on norms, biases and logit_scale, as CLIP was trained.
    params = [p for p in model.net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)
    scaler = torch.amp.GradScaler(rank.device.type, enabled=args.precision == "fp16")
    return Run(towers, model.net, loss, optimizer, scaler)


def make_dataset(
    args: argparse.Namespace, model: Model, loss: CEClipLoss
) -> ShapesDataset | ManifestDataset:
    """The shapes world, or the manifest of --data; refuses data that the recipe cannot use."""
    if args.data is None:
        transform, width = shapes_transform(model.net)
        return ShapesDataset(transform, width, seed=0)
    if args.images is None:
        raise DataError("--images is needed with --data: the folder of the pictures")
    transform = train_transform(model.net)
    data = ManifestDataset(args.data, args.images, transform, args.seed, args.on_bad_image)
    if len(data) < args.batch_size:
        raise DataError(
            f"--batch-size {args.batch_size}: {args.data} has {len(data)} captions; use fewer"
        )
    if loss.needs_negatives and not any(any(record.negatives) for record in data.records):
        raise DataError(f"--data {args.data}: holds no negatives; make them with negatives.py")
    if loss.needs_positives and len(data.of_image) == len(data):
        raise DataError(
            f"--data {args.data}: no picture has two captions, which --imc paired needs; "
            "use --imc repulsion or --imc none"
        )
    return data


def make_loader(
    args: argparse.Namespace,
    data: ShapesDataset | ManifestDataset,
    model: Model,
    loss: CEClipLoss,
    rank: Rank,
    start: int,
) -> Iterator[Batch]:
    """This rank's share of each global batch from step `start` on."""
    local = args.batch_size // rank.world
    batches = batch_indices(len(data), args.batch_size, args.seed, start, args.steps)
    mine = (batch[rank.number * local : (rank.number + 1) * local] for batch in batches)
    kind = "valid" if loss.options["mask_invalid"] else "all"
    negatives = kind if loss.needs_negatives else "none"
    collate = Collate(model.tokenizer, positives=loss.needs_positives, negatives=negatives)
    loader: Any = DataLoader(
        data,
        batch_sampler=mine,
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=rank.device.type == "cuda",
    )
    return iter(loader)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def train_step(run: Run, batch: Batch, lr: float, args: argparse.Namespace) -> dict[str, float]:
    """One step; without effect on weights and thresholds if loss or gradient is not finite.

    Returns:
        the loss's parts, `grad_norm`, and `applied`: 1 if the weights were changed.
    """
    device = next(run.net.parameters()).device
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    theta = run.loss.threshold.value.clone()
    dtype = PRECISIONS[args.precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        images = batch.images.to(device, non_blocking=True)
        image_features, features, scale = run.towers(images, batch.texts.to(device))
        captions, positives, negatives = split_features(features, batch)
        out = run.loss(
            *(image_features, captions, scale, negatives, batch.valid.to(device)),
            *(positives, batch.positive_valid.to(device)),
        )
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(out["loss"]).backward()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.net.parameters(), args.grad_clip or math.inf)
    finite = bool(torch.isfinite(out["loss"].detach()) & torch.isfinite(norm))
    if finite:
        run.scaler.step(run.optimizer)
        with torch.no_grad():
            run.net.logit_scale.clamp_(max=math.log(100))
    else:
        run.loss.threshold.value.copy_(theta)
    run.scaler.update()
    parts = {key: float(value.detach()) for key, value in out.items()}
    return {**parts, "grad_norm": float(norm), "applied": float(finite)}


def checkpoint(
    run: Run, about: dict[str, Any], args: argparse.Namespace, step: int
) -> dict[str, Any]:
    """Everything that a resumed run needs; the weights in open_clip's layout."""
    return {
        "state_dict": run.net.state_dict(),
        "kit": {**about, "recipe": args.recipe, "step": step, **versions()},
        "train": {
            "step": step,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "loss": run.loss.state_dict(),
            "rng": torch.get_rng_state(),
        },
    }


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all: the one before it stays until this one is on disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DataError(f"--out {path}: cannot be written ({error}); the last one stays") from None


def resume(run: Run, path: Path) -> int:
    """Load latest.pt into the run; returns the step to go on with."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        run.net.load_state_dict(content["state_dict"])
        train = content["train"]
        run.optimizer.load_state_dict(train["optimizer"])
        run.scaler.load_state_dict(train["scaler"])
        run.loss.load_state_dict(train["loss"])
        torch.set_rng_state(train["rng"])
    except Exception as error:  # torch raises many kinds here
        reason = str(error).splitlines()[0][:160]
        raise DataError(
            f"{path}: cannot be resumed from ({reason}); choose another --out"
        ) from None
    return train["step"]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        **{"python": platform.python_version(), "torch": str(torch.__version__)},
        **{"torchvision": str(torchvision.__version__), "open_clip": open_clip.__version__},
    }


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as args.json keeps it."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}


def check_run(out: Path, options: dict[str, Any]) -> None:
    """Refuse a directory that is not a run, or a run with other options."""
    if not out.exists():
        return
    try:
        before = json.loads((out / "args.json").read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError):
        # A run that was cut off while it wrote its first file left nothing, or args.json.partial.
        if out.is_dir() and all(path.suffix == ".partial" for path in out.iterdir()):
            return
        raise DataError(f"--out {out}: exists and is not a run; choose another --out") from None
    changed = [
        f"--{key.replace('_', '-')} {before.get(key)} -> {value}"
        for key, value in options.items()
        if key not in FREE and before.get(key) != value
    ]
    if changed:
        raise DataError(
            f"--out {out}: holds a run with other options ({'; '.join(changed)}); "
            "give them back to resume it, or choose another --out"
        )


def start_run(out: Path, options: dict[str, Any], rank: Rank) -> None:
    """Make the run directory and its args.json, unless they are there."""
    if (out / "args.json").exists():
        return
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    content = {"options": options, "world_size": rank.world, "versions": versions()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(
            out / "args.json", json.dumps({**content, "git_commit": commit}, indent=1) + "\n"
        )
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({error.strerror}); check it") from None


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines that a cut-off run wrote after its last checkpoint; it writes them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a torn last line
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        write_text(path, "".join(kept))


class Stop:
    """Remembers a SIGTERM or SIGINT until the step is done."""

    def __init__(self) -> None:
        """Catch both signals from now on."""
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: Any) -> None:
        self.signal = number

    def agreed(self, rank: Rank) -> int:
        """The signal that any rank received, so that all stop after the same step."""
        if rank.world == 1:
            return self.signal
        flag = torch.tensor([self.signal], device=rank.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def train(
    run: Run,
    loader: Iterator[Batch],
    about: dict[str, Any],
    args: argparse.Namespace,
    rank: Rank,
    start: int,
) -> None:
    """Train from step `start` to the end, logging and saving on the way."""
    stop, metrics = Stop(), args.out / "metrics.jsonl"
    per_epoch = args.steps_per_epoch
    bad = faults = images = tokens = 0
    began = mark = time.perf_counter()
    run.towers.train()
    for step in range(start, args.steps):
        if run.loss.reset_each_epoch and step % per_epoch == 0:
            run.loss.threshold.reset()
        batch = next(loader)
        faults += len(batch.faults)
        for fault in batch.faults:
            print(f"stepped over {fault}", file=sys.stderr)
        lr = learning_rate(step, args)
        out = train_step(run, batch, lr, args)
        images += args.batch_size
        tokens += rank.world * int((batch.texts.segments >= 0).sum() or batch.texts.tokens.numel())
        # fp16 finds its scale by overflowing: only a loss that is not finite counts against it.
        lost = not math.isfinite(out["loss"]) if run.scaler.is_enabled() else not out["applied"]
        bad = bad + 1 if lost else 0
        done = step + 1
        if rank.number == 0 and (done % args.log_every == 0 or done == args.steps or lost):
            now = time.perf_counter()
            left = (now - began) / (done - start) * (args.steps - done)
            line = {
                **{"step": done, "epoch": step // per_epoch, **out, "lr": lr},
                "logit_scale": float(run.net.logit_scale.detach().exp()),
                "images_per_second": images / (now - mark),
                "text_tokens_per_second": tokens / (now - mark),
                **{"memory_mib": memory(rank.device), "bad_images": faults},
            }
            with metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            report(line, args.steps, left)
            mark, images, tokens = now, 0, 0
        if bad == MAX_BAD_STEPS:
            raise DataError(
                f"loss or gradient was not finite {bad} steps in a row (step {done}); "
                f"lower --lr; {args.out}/latest.pt is the last good checkpoint"
            )
        ended = done % per_epoch == 0 or done == args.steps
        signalled = stop.agreed(rank)
        if rank.number == 0 and not bad and (ended or signalled or done % args.save_every == 0):
            content = checkpoint(run, about, args, done)
            if ended:
                weights = {key: content[key] for key in ("state_dict", "kit")}
                save(weights, args.out / f"epoch_{math.ceil(done / per_epoch):02d}.pt")
            save(content, args.out / "latest.pt")
        if signalled:
            if rank.number == 0:
                print(f"stopped at step {done}; the same command goes on", flush=True)
            sys.exit(128 + signalled)


def report(line: dict[str, Any], steps: int, left: float) -> None:
    """Print one line of progress."""
    parts = " ".join(f"{key} {line[key]:.3f}" for key in ("loss", "itc", "imc", "cmr"))
    skipped = "" if line["applied"] else "  NOT FINITE, step skipped"
    print(
        f"step {line['step']}/{steps}  {parts}  {line['images_per_second']:.0f} images/s  "
        f"{int(left // 60)}:{int(left % 60):02d} left{skipped}",
        flush=True,
    )


def memory(device: torch.device) -> float:
    """The peak memory of the GPU, or of this process, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def dry_run(run: Run, loader: Iterator[Batch], args: argparse.Namespace, size: int) -> None:
    """Do one step, tell what a run would be, write nothing."""
    batch = next(loader)
    out = train_step(run, batch, 0.0, args)
    count = sum(p.numel() for p in run.net.parameters())
    print(f"{args.model}: {count / 1e6:.1f} million parameters, recipe {args.recipe}")
    print(
        f"{size} captions, {args.steps} steps of {args.batch_size}, {args.steps_per_epoch} an epoch"
    )
    print(f"first batch: {', '.join(f'{key} {value:.3f}' for key, value in out.items())}")
    print("dry run: nothing was written")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options that depend on the data get their defaults here."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="manifest (.jsonl); without it, the shapes world")
    add("--images", type=Path, help="folder of the manifest's pictures")
    add("--out", type=Path, help="run directory (default runs/RECIPE)")
    add("--model", help="open_clip model or config .json (default ViT-B-32-quickgelu; shapes-tiny)")
    add("--pretrained", help="open_clip tag or checkpoint to start from (default: random weights)")
    add("--recipe", default="ce-clip", help=f"{', '.join(RECIPES)} (default ce-clip)")
    add("--imc", choices=IMC_VARIANTS, help="intra-modal loss (default: the recipe's)")
    add("--imc-weight", type=float, help="its weight (default 0.2)")
    add("--cmr-weight", type=float, help="weight of the rank loss (default 0.4)")
    add("--threshold", choices=THRESHOLDS, help="of the rank loss (default: the recipe's)")
    add("--cap", type=float, help="largest threshold, in logits (default 10)")
    add("--fixed-threshold", type=float, help="of --threshold fixed, in logits (default 5)")
    add("--steps", type=int, help="length of the run (default: 700 in the shapes world)")
    add("--epochs", type=int, help="length of the run, instead of --steps (default 5 on photos)")
    add("--batch-size", type=int, help="of all ranks together (default 512; shapes 64)")
    add("--lr", type=float, help="peak learning rate (default 5e-6; shapes 1e-3)")
    add("--weight-decay", type=float, default=0.1, help="default 0.1")
    add("--warmup", type=int, help="steps (default 50)")
    add("--grad-clip", type=float, help="largest gradient norm, 0 for none (default 0; shapes 1)")
    add("--on-bad-image", choices=("stop", "skip"), default="stop", help="default stop")
    add(
        "--precision", choices=list(PRECISIONS), default="fp32", help="of the towers (default fp32)"
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    add("--workers", type=int, default=0, help="processes that load pictures (default 0)")
    add("--seed", type=int, default=0, help="of weights, order and crops (default 0)")
    add("--log-every", type=int, default=20, help="steps between lines of metrics (default 20)")
    add("--save-every", type=int, help="steps between checkpoints (default 500; shapes 100)")
    add(
        "--dry-run", action="store_true", help="do one step, tell what would be done, write nothing"
    )
    args = parser.parse_args(argv)
    if args.steps is not None and args.epochs is not None:
        parser.error("give --steps or --epochs, not both")
    kind = "shapes" if args.data is None else "photos"
    for key, value in DEFAULTS[kind].items():
        if getattr(args, key) is None and not (
            key in ("steps", "epochs") and (args.steps or args.epochs)
        ):
            setattr(args, key, value)
    args.out = args.out or Path("runs") / args.recipe
    return args


def check_args(args: argparse.Namespace, rank: Rank) -> None:
    """Refuse what cannot work before anything is loaded."""
    if args.recipe not in RECIPES:
        raise DataError(f"--recipe {args.recipe}: is none of {', '.join(RECIPES)}")
    for name in ("steps", "epochs", "batch_size", "log_every", "save_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if args.batch_size % rank.world:
        raise DataError(
            f"--batch-size {args.batch_size}: is not divisible by the {rank.world} ranks"
        )
    if not args.lr > 0 or args.warmup < 0 or args.grad_clip < 0 or args.workers < 0:
        raise DataError("--lr must be above 0; --warmup, --grad-clip and --workers 0 or more")
    if args.cap is not None and not args.cap > 0:
        raise DataError(f"--cap {args.cap}: must be above 0 logits")


def main(argv: list[str] | None = None) -> None:
    """Build everything, find where a cut-off run was, train."""
    args = parse_args(argv)
    rank = start_process(args.device)
    check_args(args, rank)
    options, latest = chosen_options(args), args.out / "latest.pt"
    check_run(args.out, options)
    torch.manual_seed(args.seed)
    fresh = not latest.exists()
    weights = args.pretrained if fresh else str(latest)
    model = load_model(args.model, weights, device=str(rank.device))
    run = make_run(args, model, rank)
    data = make_dataset(args, model, run.loss)
    args.steps_per_epoch = len(data) // args.batch_size
    args.steps = args.steps or args.epochs * args.steps_per_epoch
    if args.dry_run:
        dry_run(run, make_loader(args, data, model, run.loss, rank, 0), args, len(data))
        return
    start = 0 if fresh else resume(run, latest)
    if start >= args.steps:
        if rank.number == 0:
            print(f"{args.out} is done: {start} steps; nothing to do")
        return
    if rank.number == 0:
        start_run(args.out, options, rank)
        trim_metrics(args.out / "metrics.jsonl", start)
        count = sum(p.numel() for p in model.net.parameters())
        packing = "packed" if can_pack(model.net) else "at full length, one to a row"
        print(
            f"{args.model} ({count / 1e6:.1f} million parameters, {model.about['activation']}), "
            f"recipe {args.recipe}, {args.steps} steps of {args.batch_size} on {rank.world} x "
            f"{rank.device.type}, captions {packing}, from step {start}",
            flush=True,
        )
    loader = make_loader(args, data, model, run.loss, rank, start)
    train(run, loader, model.about, args, rank, start)
    if rank.number == 0:
        print(f"done: {args.out}/latest.pt")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

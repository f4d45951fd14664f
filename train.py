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
import copy
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from data import (
    Batch,
    Collate,
    DataError,
    ManifestDataset,
    Mixture,
    PackedText,
    ShapesDataset,
    ShardStream,
    encode_image,
    encode_text,
    find_overlap,
    normalise,
    picture_size,
    read_manifest,
    split_features,
    text_layout,
    train_transform,
    unpack_texts,
)
from evaluate import (
    PRECISIONS,
    TINY_CONFIG,
    Encoder,
    Item,
    Model,
    Retrieval,
    Suite,
    average,
    load_model,
    load_suite,
    mean_of,
    named_averages,
    pick_device,
    read_table,
    score_suite,
    write_text,
)
from losses import IMC_VARIANTS, NEGATIVE_TYPES, RECIPES, THRESHOLDS, CEClipLoss

# Defaults: the paper's run on photos, and a small run of the shapes world.
DEFAULTS = {
    "photos": {
        **{"lr": 5e-6, "warmup": 50, "batch_size": 512, "epochs": 5, "grad_clip": 0.0},
        **{"model": "ViT-B-32-quickgelu", "save_every": 500, "workers": 4},
    },
    "shapes": {
        **{"lr": 1e-3, "warmup": 50, "batch_size": 64, "steps": 700, "grad_clip": 1.0},
        **{"model": TINY_CONFIG.stem, "save_every": 100, "workers": 0},
    },
}
LOSS_OPTIONS = (
    *("imc", "imc_weight", "cmr_weight", "threshold", "cap", "fixed_threshold"),
    *("own_weight", "focal_gamma", "label_smoothing"),
)
# Options that do not shape the trajectory: a resumed run may change them.
FREE = {"out", "device", "workers", "log_every", "save_every", "dry_run", "images", "micro_batch"}
FREE |= {"val", "val_root", "val_every", "best", "log"}
MAX_BAD_STEPS = 3
FAULT = 255  # a rank cannot go on; above every signal's number


class Rank(NamedTuple):
    """This process among all, and its device."""

    number: int
    world: int
    device: torch.device


class Towers(nn.Module):
    """Both towers in one forward, as DistributedDataParallel wants it."""

    def __init__(self, net: Any, captioned: bool = False) -> None:
        """Wrap an open_clip model; `captioned` also runs CoCa's decoder on the captions."""
        super().__init__()
        self.net, self.captioned = net, captioned

    def forward(self, images: Tensor, texts: PackedText) -> tuple[Tensor, ...]:
        """Encode uint8 pictures [B, 3, H, W] and M texts.

        Returns:
            unit-length image features [B, D] and text features [M, D], logit_scale, and logit_bias
            where the model has one (SigLIP); with `captioned` what `_captioned` does.
        """
        if self.captioned:
            return self._captioned(normalise(images, self.net), texts)
        image_features = encode_image(self.net, normalise(images, self.net))
        text_features = encode_text(self.net, texts)
        bias = getattr(self.net, "logit_bias", None)
        return (
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
            self.net.logit_scale.exp(),
            *([] if bias is None else [bias + 0]),
        )

    def _captioned(self, images: Tensor, texts: PackedText) -> tuple[Tensor, ...]:
        """Features, logit_scale, and the sum and the count of the decoder's losses of a word.

        Each word of a true caption is told from the image and the words before it (Yu et al.,
        arXiv 2205.01917); positives and negatives are not decoded.
        """
        tokens = unpack_texts(texts, self.net) if len(texts.where) else texts.tokens  # [M, C]
        image_features, seen = self.net._encode_image(images, normalize=False)
        text_features, words = self.net._encode_text(tokens, normalize=False)
        told, labels = words[: len(images), :-1], tokens[: len(images), 1:]
        logits = self.net.text_decoder(seen, told).float()  # [B, C - 1, vocabulary]
        loss = F.cross_entropy(
            logits.movedim(-1, 1), labels, ignore_index=self.net.pad_id, reduction="sum"
        )
        return (
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
            self.net.logit_scale.exp(),
            *(loss, (labels != self.net.pad_id).sum().float()),
        )


class LoRA(nn.Module):
    """W + up · down, of low rank, in place of a frozen W (Hu et al., arXiv 2106.09685; alpha = r).

    FSC-CLIP (arXiv 2410.05210) tunes CLIP this way, with rank 4 and learning rate 5e-5.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        """Begin at zero change of a weight [out, in]."""
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        return weight + self.up @ self.down


def add_lora(net: nn.Module, rank: int) -> None:
    """Freeze a model and give each linear layer and attention of it a change of low rank."""
    net.requires_grad_(False)
    for module in list(net.modules()):
        name = "weight" if isinstance(module, nn.Linear) else "in_proj_weight"
        weight = getattr(module, name, None)
        if isinstance(module, nn.Linear | nn.MultiheadAttention) and weight is not None:
            parametrize.register_parametrization(module, name, LoRA(weight, rank))


def plain_weights(net: nn.Module) -> dict[str, Tensor]:
    """The state_dict in open_clip's layout, with LoRA's changes merged into the weights."""
    state = {}
    for key, value in net.state_dict().items():
        module, _, name = key.partition(".parametrizations.")
        if not name:
            state[key] = value
        elif name.endswith(".original"):
            name = name.removesuffix(".original")
            state[f"{module}.{name}"] = getattr(net.get_submodule(module), name).detach()
    return state


class Run(NamedTuple):
    """What changes while training, and what a checkpoint holds."""

    towers: Any  # Towers, or DistributedDataParallel of it
    net: Any
    teacher: Towers | None  # a moving average of net, for --distill
    loss: CEClipLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    caption_weight: float = 0.0  # of CoCa's captioning loss


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
    given = {key: getattr(args, key) for key in LOSS_OPTIONS if getattr(args, key) is not None}
    try:
        loss = CEClipLoss(args.recipe, **given).to(rank.device)
    except ValueError as error:
        raise DataError(f"--recipe {args.recipe} with these options: {error}") from None
    net = model.net
    captioned = bool(args.caption_weight)
    if captioned and not hasattr(net, "text_decoder"):
        raise DataError(f"--caption-weight: {args.model} has no decoder of captions, as CoCa has")
    if hasattr(net, "text_decoder"):
        net.text_decoder.requires_grad_(captioned)
    if args.grad_checkpointing:
        net.set_grad_checkpointing()
    if args.tune == "text":
        net.visual.requires_grad_(False)
    if args.lora:
        add_lora(net, args.lora)
    teacher = Towers(copy.deepcopy(net)).requires_grad_(False) if args.distill else None
    towers: nn.Module = Towers(net, captioned)
    if args.compile:
        towers = torch.compile(towers, dynamic=True)  # type: ignore[assignment]
    if rank.world > 1:
        ids = [rank.device.index] if rank.device.type == "cuda" else None
        towers = DistributedDataParallel(towers, device_ids=ids)
    # No decay on norms, biases and logit_scale, as CLIP was trained.
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(rank.device.type, enabled=args.precision == "fp16")
    return Run(towers, net, teacher, loss, optimizer, scaler, args.caption_weight)


def make_data(args: argparse.Namespace, model: Model, loss: CEClipLoss) -> Mixture:
    """The shapes world, or the manifests of --data; refuses data that the recipe cannot use."""
    if args.data is None:
        world = ShapesDataset(picture_size(model.net), seed=0)
        return Mixture([world], [1], args.batch_size, args.seed, True)
    folders = args.images or []
    if len(folders) not in (1, len(args.data)):
        raise DataError(
            f"--images: {len(folders)} folders for {len(args.data)} manifests; "
            "give one folder for all of --data, or one for each"
        )
    pairs = [split_weight(text) for text in args.data]
    weights = [weight for _, weight in pairs if weight is not None]
    if len(weights) not in (0, len(pairs)):
        raise DataError("--data: give every manifest a weight (FILE:WEIGHT), or none")
    transform = train_transform(model.net)
    sources = [
        ManifestDataset(path, folder, transform, args.seed, args.on_bad_image)
        for (path, _), folder in zip(pairs, folders * (len(pairs) // len(folders)), strict=True)
    ]
    named = " ".join(args.data)
    if loss.needs_negatives and not any(source.has_negatives for source in sources):
        raise DataError(f"--data {named}: holds no negatives; make them with negatives.py")
    if loss.needs_positives and all(len(s) == s.image_of.max() + 1 for s in sources):
        raise DataError(
            f"--data {named}: no picture has two captions, which --imc paired needs; "
            "use --imc repulsion or --imc none"
        )
    shares = weights or [len(source) for source in sources]
    return Mixture(sources, shares, args.batch_size, args.seed, args.captions == "one")


def note_images(model: Model, data: Mixture | None, rank: Rank) -> None:
    """Keep which photos the weights have seen (the checkpoint's `kit`) and say which are tested.

    Photos of the checkpoint that the run starts from count; those of shards are not known.
    """
    own = (
        [source.photos for source in data.sources if isinstance(source, ManifestDataset)]
        if data
        else []
    )
    if not own:
        return
    before = model.about.get("train_images", torch.empty(0, dtype=torch.int64)).numpy()
    photos = np.unique(np.concatenate([before, *own]))
    model.about["train_images"] = torch.from_numpy(photos)
    if rank.number == 0:
        print(f"{len(photos)} training images; among them: " + "; ".join(find_overlap(photos)))


def split_weight(text: str) -> tuple[str, float | None]:
    """Split FILE:WEIGHT; the weight may be missing."""
    found = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", text)
    if found is None:
        return text, None
    if not float(found[2]):
        raise DataError(f"--data {text}: the weight must be above 0; or leave the file out")
    return found[1], float(found[2])


def make_loader(
    args: argparse.Namespace,
    data: Mixture | None,
    model: Model,
    loss: CEClipLoss,
    rank: Rank,
    start: int,
) -> Iterator[list[Batch]]:
    """This rank's share of each global batch from step `start` on; shards where data is None."""
    local = args.batch_size // rank.world
    kind = "valid" if loss.options["mask_invalid"] else "all"
    negatives = kind if loss.needs_negatives else "none"
    options: dict[str, Any] = {
        "num_workers": args.workers,
        "collate_fn": Collate(
            model.tokenizer,
            positives=loss.needs_positives,
            negatives=negatives,
            part=args.micro_batch or 0,
        ),
        "pin_memory": rank.device.type == "cuda",
    }
    loader: Any
    if data is None:
        if loss.needs_positives:
            raise DataError(
                "--imc paired needs a second caption of each picture, which shards lack; "
                "use --imc repulsion or --imc none"
            )
        transform, place = train_transform(model.net), (start, rank.number, rank.world)
        stream = ShardStream(args.data[0], transform, args.seed, place, args.on_bad_image)
        loader = DataLoader(stream, batch_size=local, **options)
    else:
        batches = data.batches(start, args.steps)
        mine = (batch[rank.number * local : (rank.number + 1) * local] for batch in batches)
        loader = DataLoader(data, batch_sampler=mine, **options)
    return iter(loader)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def encode(towers: nn.Module, part: Batch, args: argparse.Namespace) -> list[Tensor]:
    """Run both towers on a part of the batch; returns what `Towers` does."""
    device = next(towers.parameters()).device
    dtype = PRECISIONS[args.precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return list(towers(part.images.to(device, non_blocking=True), part.texts.to(device)))


def batch_loss(
    run: Run,
    parts: list[Batch],
    features: list[list[Tensor]],
    taught: list[list[Tensor]],
    weight: float,
) -> dict[str, Tensor]:
    """The loss of the whole batch from the features of its parts.

    Args:
        run: its loss is used, and its thresholds move on.
        parts: this rank's pictures and texts.
        features: what `encode` returned for each part.
        taught: what the teacher's `encode` returned for each part; empty without a teacher.
        weight: of the distance to the teacher.
    """
    split = [split_features(f[1], part) for f, part in zip(features, parts, strict=True)]
    captions, positives, negatives = (torch.cat(column) for column in zip(*split, strict=True))
    images = torch.cat([f[0] for f in features])
    scale, *bias = features[-1][2 : 3 if run.caption_weight else None]
    valid = torch.cat([part.valid for part in parts]).to(images.device)
    positive_valid = torch.cat([part.positive_valid for part in parts]).to(images.device)
    out = run.loss(images, captions, scale, negatives, valid, positives, positive_valid, *bias)
    if run.caption_weight:
        words = torch.stack([f[3] for f in features]).sum() / sum(f[4].detach() for f in features)
        out = {**out, "loss": out["loss"] + run.caption_weight * words, "caption": words.detach()}
    if taught:
        away = [
            (mine[i] - old[i]).square().sum()
            for mine, old in zip(features, taught, strict=True)
            for i in (0, 1)
        ]
        drift = torch.stack(away).sum() / len(images)
        out = {**out, "loss": out["loss"] + weight * drift, "distill": drift.detach()}
    return out


def gradients(run: Run, parts: list[Batch], args: argparse.Namespace) -> dict[str, Tensor]:
    """Leave the gradients of the whole batch in the weights, and return the loss's parts.

    With several parts, gradients are cached (Gao et al., arXiv 2101.06983): features without a
    graph, the loss of all of them once, then part by part the towers again, with the gradient of
    the loss by that part's features. That is exact, and only one part's graph is ever held.
    """
    taught: list[list[Tensor]] = []
    if run.teacher is not None:
        with torch.no_grad():
            taught = [encode(run.teacher, part, args) for part in parts]
    if len(parts) == 1:
        out = batch_loss(run, parts, [encode(run.towers, parts[0], args)], taught, args.distill)
        run.scaler.scale(out["loss"]).backward()
        return out
    cuda = [x for x in [next(run.net.parameters()).device] if x.type == "cuda"]
    with torch.random.fork_rng(cuda), torch.no_grad():  # dropout will repeat itself
        first = [encode(run.towers, part, args) for part in parts]
    leaves = [[x.detach().requires_grad_() for x in features] for features in first]
    out = batch_loss(run, parts, leaves, taught, args.distill)
    run.scaler.scale(out["loss"]).backward()
    for part, cached in zip(parts, leaves, strict=True):
        hold = part is not parts[-1] and hasattr(run.towers, "no_sync")
        with run.towers.no_sync() if hold else contextlib.nullcontext():
            pairs = zip(encode(run.towers, part, args), cached, strict=True)
            wanted = [(x, c.grad) for x, c in pairs if x.requires_grad and c.grad is not None]
            torch.autograd.backward([x for x, _ in wanted], [grad for _, grad in wanted])
    return out


def train_step(
    run: Run, parts: list[Batch], lr: float, args: argparse.Namespace
) -> dict[str, float]:
    """One step; without effect on weights and thresholds if loss or gradient is not finite.

    Returns:
        the loss's parts, `grad_norm`, and `applied`: 1 if the weights were changed.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    theta = run.loss.threshold.value.clone()
    run.optimizer.zero_grad(set_to_none=True)
    out = gradients(run, parts, args)
    run.scaler.unscale_(run.optimizer)
    tuned = [p for p in run.net.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in tuned])
    finite = bool(torch.isfinite(out["loss"].detach()) & torch.isfinite(norm))
    if finite:
        if args.grad_clip:
            nn.utils.clip_grads_with_norm_(tuned, args.grad_clip, norm)
        run.scaler.step(run.optimizer)
        with torch.no_grad():
            run.net.logit_scale.clamp_(max=math.log(100))
            if run.teacher is not None:
                follow(run.teacher.net, run.net, args.ema)
    else:
        run.loss.threshold.value.copy_(theta)
    run.scaler.update()
    values = {key: float(value.detach()) for key, value in out.items()}
    return {**values, "grad_norm": float(norm), "applied": float(finite)}


def follow(teacher: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the teacher's weights towards the net's, as in DeGLA (arXiv 2504.16801)."""
    for old, new in zip(teacher.parameters(), net.parameters(), strict=True):
        old.lerp_(new, 1 - decay)


def checkpoint(
    run: Run, about: dict[str, Any], args: argparse.Namespace, step: int
) -> dict[str, Any]:
    """Everything that a resumed run needs; the weights in open_clip's layout."""
    train: dict[str, Any] = {
        "step": step,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "loss": run.loss.state_dict(),
    }
    if args.lora:
        train["net"] = run.net.state_dict()
    if run.teacher is not None:
        train["teacher"] = run.teacher.net.state_dict()
    kit = {**about, "recipe": args.recipe, "step": step, **versions()}
    return {"state_dict": plain_weights(run.net), "kit": kit, "train": train}


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
        train = content["train"]
        run.net.load_state_dict(train.get("net", content["state_dict"]))
        if run.teacher is not None:
            run.teacher.net.load_state_dict(train["teacher"])
        run.optimizer.load_state_dict(train["optimizer"])
        run.scaler.load_state_dict(train["scaler"])
        run.loss.load_state_dict(train["loss"])
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
    return json.loads(json.dumps(vars(args), default=str))


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

    def agreed(self, rank: Rank, fault: DataError | None) -> int:
        """FAULT, the signal or 0: the largest of all ranks, so that all stop together."""
        code = self.signal if fault is None else FAULT
        if rank.world == 1:
            return code
        flag = torch.tensor([code], device=rank.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def train(
    run: Run,
    loader: Iterator[list[Batch]],
    about: dict[str, Any],
    args: argparse.Namespace,
    rank: Rank,
    start: int,
    after: Callable[[int], None] = lambda done: None,
) -> int:
    """Train from step `start` to the end, logging and saving on the way; returns the exit code.

    `after` is called with the number of steps done after each of them.
    """
    stop, log = Stop(), Log(args, rank, start)
    fault: DataError | None = None
    bad, done, saved, code = 0, start, start, 0
    run.towers.train()
    for step in range(start, args.steps):
        try:
            parts = next(loader)
        except DataError as error:
            fault = error
        code = stop.agreed(rank, fault)
        if code:
            break
        if run.loss.reset_each_epoch and step % args.steps_per_epoch == 0:
            run.loss.threshold.reset()
        seed_dropout(hash((args.seed, step, rank.number)) % 2**63, rank.device)
        lr = learning_rate(step, args)
        out = train_step(run, parts, lr, args)
        done = step + 1
        # fp16 finds its scale by overflowing: only a loss that is not finite counts against it.
        lost = not math.isfinite(out["loss"]) if run.scaler.is_enabled() else not out["applied"]
        bad = bad + 1 if lost else 0
        fault = log.add(parts, step, {**out, "lr": lr}, run.net.logit_scale, lost)
        if bad == MAX_BAD_STEPS:
            raise DataError(
                f"loss or gradient was not finite {bad} steps in a row (step {done}); "
                f"lower --lr; {args.out}/latest.pt is the last good checkpoint"
            )
        ended = done % args.steps_per_epoch == 0 or done == args.steps
        if ended or (not bad and done % args.save_every == 0):
            fault, saved = save_step(run, about, args, rank, done, ended) or fault, done
        after(done)
    code = code or stop.agreed(rank, fault)
    if code not in (0, FAULT) and not bad and saved < done:
        fault = save_step(run, about, args, rank, done, False)
    if fault is not None:
        reason = str(fault).strip().splitlines()[-1].removeprefix("data.DataError: ")
        print(f"train.py: error: {reason}", file=sys.stderr)
    if code and rank.number == 0:
        print(f"stopped at step {done}; the same command goes on", flush=True)
    return 2 if code == FAULT or fault else 128 + code if code else 0


def seed_dropout(seed: int, device: torch.device) -> None:
    """Make a step's random numbers its own, so that a checkpoint need not hold their state."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also note a stack trace
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def save_step(
    run: Run, about: dict[str, Any], args: argparse.Namespace, rank: Rank, step: int, ended: bool
) -> DataError | None:
    """Save the run on the first rank, and its weights where an epoch ended; returns what failed."""
    if rank.number:
        return None
    if not all(bool(torch.isfinite(p).all()) for p in run.net.parameters()):
        return DataError(
            f"weights are not finite after step {step}: lower --lr; {args.out}/latest.pt, "
            "if it is there, is the last good checkpoint"
        )
    content = checkpoint(run, about, args, step)
    try:
        if ended:
            weights = {key: content[key] for key in ("state_dict", "kit")}
            save(weights, args.out / f"epoch_{math.ceil(step / args.steps_per_epoch):02d}.pt")
        save(content, args.out / "latest.pt")
    except DataError as error:
        return error
    return None


VAL_SUITES = ("shapes", "sugarcrepe", "retrieval")


def load_validation(args: argparse.Namespace) -> Suite:
    """What --val names: a suite below --val-root, in whole or in part, or a manifest.

    A manifest's captions are held to each of their negatives, and searched among all images.
    """
    if args.val in VAL_SUITES:
        return load_suite(args.val, args.val_root, partial=True)
    items: list[Item] = []
    captions: dict[str, list[str]] = {}
    for record in read_manifest(args.val):
        image = str(args.val_root / record.image)
        captions.setdefault(image, []).append(record.caption)
        for kind, negative in zip(NEGATIVE_TYPES, record.negatives, strict=True):
            if negative is not None:
                items.append(Item((kind,), str(len(items)), (image,), (record.caption, negative)))
    missing = [image for image in captions if not Path(image).is_file()]
    if missing or not captions:
        what = f"{len(missing)} images are not there, the first is {missing[0]}" if missing else ""
        raise DataError(f"--val {args.val}: {what or 'holds no captions'}; see --val-root")
    texts = [text for said in captions.values() for text in said]
    image_of = [i for i, said in enumerate(captions.values()) for _ in said]
    return Suite("manifest", items, [Retrieval("val", list(captions), texts, image_of)], {}, [])


def score_validation(suite: Suite, encoder: Encoder) -> dict[str, float]:
    """Figures in per cent by name: the suite's averages, then its subsets and costs."""
    scored = score_suite(suite, encoder)
    tally = {**scored.subsets, **scored.costs}
    rows = {
        row: 100 * mean_of({key: sum(x) / len(x) for key, x in parts.items()})
        for row, parts in tally.items()
    }
    counts = {row: sum(map(len, parts.values())) for row, parts in scored.subsets.items()}
    known = suite.name in VAL_SUITES
    trees = named_averages(suite.name, counts) if known else {"mean of types": list(counts)}
    averages = {name: average(tree, rows, counts) for name, tree in trees.items()}
    return {**{name: value for name, value in averages.items() if value is not None}, **rows}


class Validation:
    """Scores the run's weights on --val, logs to val.jsonl, and keeps the best as best.pt.

    All ranks call it: each encodes its share. With --distill the moving average is scored too.
    """

    def __init__(self, run: Run, model: Model, args: argparse.Namespace, rank: Rank) -> None:
        """Read the suite; the best figure so far is in val.jsonl, where a run goes on."""
        self.run, self.model, self.args, self.rank = run, model, args, rank
        self.suite = load_validation(args)
        headline = read_table("suites").get(args.val, {}).get("headline")
        self.metric, self.path = args.best or headline, args.out / "val.jsonl"
        self.best = -math.inf
        if self.path.exists():
            lines = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
            self.best = max((line["best"] for line in lines), default=self.best)

    def __call__(self, done: int) -> None:
        """Score after this step, if it is one of --val-every, the first or the last.

        Raises:
            DataError: --best is none of the figures, or nothing can be written.
        """
        args, nets = self.args, {"current": self.run.net}
        if done % args.val_every and done != args.steps:
            return
        if self.run.teacher is not None:
            nets["ema"] = self.run.teacher.net
        options = {"batch_size": None, "precision": args.precision, "workers": 0, "cache": None}
        options["device"] = str(self.rank.device)
        for weights, net in nets.items():
            encoder = Encoder(self.model._replace(net=net), argparse.Namespace(**options))
            figures = score_validation(self.suite, encoder)
            self.metric = self.metric or next(iter(figures))
            if self.metric not in figures:
                raise DataError(f"--best {self.metric}: is none of {', '.join(figures)}")
            value = figures[self.metric]
            better, self.best = value > self.best, max(self.best, value)
            if self.rank.number == 0:
                about = {**self.model.about, "recipe": args.recipe, "step": done, **versions()}
                about |= {"val": args.val, "metric": self.metric, "value": value}
                if better:
                    state = {"state_dict": plain_weights(net), "kit": {**about, "weights": weights}}
                    save(state, args.out / "best.pt")
                line = {"step": done, "weights": weights, "best": self.best, "figures": figures}
                append_line(self.path, line)
                mark = f", the best: {args.out}/best.pt" if better else ""
                print(f"val {weights} at step {done}: {self.metric} {value:.1f}{mark}", flush=True)
        self.run.towers.train()


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON to a file of the run."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise DataError(f"--out {path}: cannot be written ({error.strerror})") from None


def open_mirror(args: argparse.Namespace, start: int) -> Callable[[int, dict[str, float]], None]:
    """Where --log mirrors metrics.jsonl: takes a step and its figures. Nowhere without --log.

    Raises:
        DataError: the package is not there.
    """
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

    def __init__(self, args: argparse.Namespace, rank: Rank, start: int) -> None:
        """Begin to count at step `start`."""
        self.args, self.rank, self.start = args, rank, start
        self.mirror = open_mirror(args, start) if rank.number == 0 else None
        self.images = self.tokens = self.faults = 0
        self.began = self.mark = time.perf_counter()

    def add(
        self, parts: list[Batch], step: int, out: dict[str, float], scale: Tensor, lost: bool
    ) -> DataError | None:
        """Count a step; every --log-every steps, and where it was lost, write and print a line.

        Returns:
            what failed, if the line could not be written.
        """
        args, done = self.args, step + 1
        self.images += args.batch_size
        self.tokens += self.rank.world * sum(part.texts.computed for part in parts)
        for fault in (fault for part in parts for fault in part.faults):
            self.faults += 1
            print(f"stepped over {fault}", file=sys.stderr)
        if self.rank.number or not (done % args.log_every == 0 or done == args.steps or lost):
            return None
        now = time.perf_counter()
        left = (now - self.began) / (done - self.start) * (args.steps - done)
        line = {
            **{"step": done, "epoch": step // args.steps_per_epoch, **out},
            "logit_scale": float(scale.detach().exp()),
            "images_per_second": self.images / (now - self.mark),
            "text_tokens_per_second": self.tokens / (now - self.mark),
            **{"memory_mib": memory(self.rank.device), "bad_images": self.faults},
        }
        report(line, args.steps, left)
        self.mark, self.images, self.tokens = now, 0, 0
        try:
            with (args.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            return DataError(f"--out {args.out}: metrics cannot be written ({error.strerror})")
        if self.mirror:
            self.mirror(done, {key: value for key, value in line.items() if key != "step"})
        return None


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


def dry_run(
    run: Run, loader: Iterator[list[Batch]], args: argparse.Namespace, data: Mixture | None
) -> None:
    """Do one step, tell what a run would be, write nothing."""
    out = train_step(run, next(loader), 0.0, args)
    count = sum(p.numel() for p in run.net.parameters())
    print(f"{args.model}: {count / 1e6:.1f} million parameters, recipe {args.recipe}")
    size = "shards" if data is None else f"{len(data)} captions, {args.steps_per_epoch} an epoch"
    print(f"{args.steps} steps of {args.batch_size}; {size}")
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
    add("--data", nargs="+", metavar="FILE[:WEIGHT]", help="manifests, or .tar shards")
    add("--images", type=Path, nargs="+", help="folder of pictures, for all or for each manifest")
    add("--out", type=Path, help="run directory (default runs/RECIPE)")
    add("--model", help="open_clip model or config .json (default ViT-B-32-quickgelu; shapes-tiny)")
    add("--pretrained", help="open_clip tag or checkpoint to start from (default: random weights)")
    add("--recipe", default="ce-clip", help=f"{', '.join(RECIPES)} (default ce-clip)")
    add("--steps", type=int, help="length of the run (default: 700 in the shapes world)")
    add("--epochs", type=int, help="length of the run, instead of --steps (default 5 on photos)")
    add("--batch-size", type=int, help="of all ranks together (default 512; shapes 64)")
    add("--micro-batch", type=int, help="pictures a rank encodes at once; exact (default all)")
    add("--captions", choices=("one", "all"), help="of a picture in a batch (default one)")
    add("--lr", type=float, help="peak learning rate (default 5e-6; shapes 1e-3)")
    add("--weight-decay", type=float, default=0.1, help="default 0.1")
    add("--warmup", type=int, help="steps (default 50)")
    add("--grad-clip", type=float, help="largest gradient norm, 0 for none (default 0; shapes 1)")
    add("--on-bad-image", choices=("stop", "skip"), default="stop", help="default stop")
    add(
        "--precision", choices=list(PRECISIONS), default="fp32", help="of the towers (default fp32)"
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    add("--workers", type=int, help="loading processes of each rank (default 4; shapes 0)")
    add("--seed", type=int, default=0, help="of weights, order and crops (default 0)")
    add("--log-every", type=int, default=20, help="steps between lines of metrics (default 20)")
    add("--save-every", type=int, help="steps between checkpoints (default 500; shapes 100)")
    add(
        "--dry-run", action="store_true", help="do one step, tell what would be done, write nothing"
    )
    add_validation_options(parser)
    add_loss_options(parser)
    add_method_options(parser)
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
    args.captions = args.captions or ("all" if args.recipe == "released" else "one")
    return args


def add_validation_options(parser: argparse.ArgumentParser) -> None:
    """Options of what is scored and shown while a run goes on; none changes its weights."""
    add = parser.add_argument_group("while training").add_argument
    add("--val", help=f"what to score: {', '.join(VAL_SUITES)}, or a manifest with negatives")
    add("--val-root", type=Path, help="folder of the suites, or of the manifest's images")
    add("--val-every", type=int, help="steps between scores (default: an epoch)")
    add("--best", help="figure by which best.pt is kept (default: the suite's headline)")
    add("--log", choices=("tensorboard", "wandb"), help="where to show metrics.jsonl too")


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    """Options that overrule the recipe; the names are those of CEClipLoss."""
    add = parser.add_argument_group("loss").add_argument
    add("--imc", choices=IMC_VARIANTS, help="intra-modal loss (default: the recipe's)")
    add("--imc-weight", type=float, help="its weight (default 0.2)")
    add("--cmr-weight", type=float, help="weight of the rank loss (default 0.4)")
    add("--threshold", choices=THRESHOLDS, help="of the rank loss (default: the recipe's)")
    add("--cap", type=float, help="largest threshold, in logits (default 10)")
    add("--fixed-threshold", type=float, help="of --threshold fixed, in logits (default 5)")
    add("--own-weight", type=float, help="of the softmax over own negatives (default 0)")
    add("--focal-gamma", type=float, help="how much it spares what is told apart (default 0)")
    add("--label-smoothing", type=float, help="what its true caption gives up (default 0)")


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Options of what is tuned, and how."""
    add = parser.add_argument_group("method").add_argument
    add("--tune", choices=("all", "text"), default="all", help="text freezes the image tower")
    add("--lora", type=int, default=0, help="rank; 0 tunes all weights (default 0)")
    add("--distill", type=float, default=0.0, help="weight of the EMA teacher (default 0)")
    add("--ema", type=float, default=0.9996, help="decay of the teacher (default 0.9996)")
    add("--caption-weight", type=float, default=0.0, help="of CoCa's captioning loss (default 0)")
    add("--compile", action="store_true", help="torch.compile the towers")
    add("--grad-checkpointing", action="store_true", help="save memory, compute a third more")


def check_args(args: argparse.Namespace, rank: Rank) -> None:
    """Refuse what cannot work before anything is loaded."""
    if args.recipe not in RECIPES:
        raise DataError(f"--recipe {args.recipe}: is none of {', '.join(RECIPES)}")
    for name in (
        "steps",
        "epochs",
        "batch_size",
        "micro_batch",
        "log_every",
        "save_every",
        "val_every",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if args.batch_size % rank.world:
        raise DataError(
            f"--batch-size {args.batch_size}: is not divisible by the {rank.world} ranks"
        )
    check_numbers(args)
    if args.val is None and (args.val_root or args.val_every or args.best):
        raise DataError("--val-root, --val-every and --best: need --val, what to score")
    if args.val not in (None, "shapes") and args.val_root is None:
        raise DataError(f"--val {args.val}: needs --val-root, the folder of its files or images")
    if args.images and not args.data:
        raise DataError("--images: needs --data, the manifest of these pictures")
    check_methods(args)


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            flag = name.replace("_", "-")
            raise DataError(f"--{flag} {value}: must be a finite number, 0 or more")
    if not args.lr > 0 or args.warmup < 0 or (args.workers or 0) < 0:
        raise DataError("--lr must be above 0; --warmup and --workers 0 or more")
    if args.cap is not None and not args.cap > 0:
        raise DataError(f"--cap {args.cap}: must be above 0 logits")
    if not 0 <= args.seed < 2**63:
        raise DataError(f"--seed {args.seed}: must be from 0 to 2^63 - 1")


def check_methods(args: argparse.Namespace) -> None:
    """Refuse methods that do not go together."""
    if args.lora < 0 or args.distill < 0 or not 0 <= args.ema <= 1:
        raise DataError("--lora and --distill must be 0 or more; --ema from 0 to 1")
    if args.lora and (args.distill or args.tune != "all"):
        raise DataError("--lora: goes with neither --distill nor --tune; leave one out")
    if reads_shards(args) and (len(args.data) > 1 or not args.steps):
        raise DataError("--data *.tar: takes one pattern, and needs --steps, not --epochs")


def reads_shards(args: argparse.Namespace) -> bool:
    """Whether --data are webdataset shards."""
    return bool(args.data) and any(name.endswith(".tar") for name in args.data)


def main(argv: list[str] | None = None) -> int:
    """Build everything, find where a cut-off run was, train; returns the exit code."""
    args = parse_args(argv)
    rank = start_process(args.device)
    check_args(args, rank)
    options, latest = chosen_options(args), args.out / "latest.pt"
    check_run(args.out, options)
    torch.manual_seed(args.seed)
    fresh = not latest.exists()
    weights = args.pretrained if fresh else str(latest)
    model = load_model(args.model, weights, device=str(rank.device))
    if args.micro_batch and any(isinstance(m, nn.BatchNorm2d) for m in model.net.modules()):
        raise DataError(f"--micro-batch: {args.model} has batch norms, which see a part at a time")
    run = make_run(args, model, rank)
    data = None if reads_shards(args) else make_data(args, model, run.loss)
    note_images(model, data, rank)
    args.steps_per_epoch = args.steps if data is None else data.steps[0]
    args.steps = args.steps or args.epochs * args.steps_per_epoch
    args.val_every = args.val_every or args.steps_per_epoch
    if args.dry_run:
        dry_run(run, make_loader(args, data, model, run.loss, rank, 0), args, data)
        return 0
    start = 0 if fresh else resume(run, latest)
    if start >= args.steps:
        if rank.number == 0:
            print(f"{args.out} is done: {start} steps; nothing to do")
        return 0
    loader = make_loader(args, data, model, run.loss, rank, start)
    if rank.number == 0:
        trim_metrics(args.out / "val.jsonl", start)
    after = Validation(run, model, args, rank) if args.val else lambda done: None
    if rank.number == 0:
        start_run(args.out, options, rank)
        trim_metrics(args.out / "metrics.jsonl", start)
        count = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
        print(
            f"{args.model} ({count / 1e6:.2f} million weights to train, "
            f"{model.about['activation']}), recipe {args.recipe}, {args.steps} steps of "
            f"{args.batch_size} on {rank.world} x {rank.device.type}, captions "
            f"{text_layout(model.net)}, from step {start}",
            flush=True,
        )
    if not start:
        after(0)
    code = train(run, loader, model.about, args, rank, start, after)
    if rank.number == 0 and code == 0:
        print(f"done: {args.out}/latest.pt")
    return code


def run_main() -> int:
    """Run main; a user's mistake is one sentence and exit code 2."""
    try:
        return main()
    except DataError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = run_main()
    gc.collect()  # DistributedDataParallel must go before its group: its threads would abort
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)

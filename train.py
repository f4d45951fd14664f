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
import multiprocessing
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
    Transform,
    add_types,
    encode_image,
    encode_text,
    find_overlap,
    image_size,
    normalise,
    run_script,
    split_features,
    text_layout,
    train_transform,
    unbundle,
    unpack_texts,
    writing,
)
from evaluate import (
    PRECISIONS,
    TINY_CONFIG,
    Encoder,
    Model,
    Rank,
    Retrieval,
    Suite,
    TestItem,
    average,
    load_model,
    load_suite,
    mean_of,
    named_averages,
    read_table,
    score_suite,
    start_process,
    together,
    write_text,
)
from losses import IMC_VARIANTS, NEGATIVE_TYPES, RECIPES, THRESHOLDS, CEClipLoss
from negatives import lock, read_records, why

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
    "both": {"ema": 0.9996, "on_bad_image": "stop", "exif": "apply"},
}
LOSS_OPTIONS = (
    *("imc", "imc_weight", "cmr_weight", "threshold", "cap", "fixed_threshold"),
    *("own_weight", "focal_gamma", "label_smoothing"),
)
# Options that do not shape the trajectory: a resumed run may change them.
FREE = {"out", "device", "workers", "log_every", "save_every", "dry_run", "images", "micro_batch"}
FREE |= {"val", "val_root", "val_every", "best", "log"}
FREE |= {"on_bad_image", "remote"}
MAX_BAD_STEPS = 3
FAULT = 255  # a rank cannot go on; above every signal's number
# SLURM warns with SIGUSR1 before it takes a node away (--signal=USR1@120); torchrun hands it on
# only with TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1.
SIGNALS = {getattr(signal, x) for x in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, x)}


class Towers(nn.Module):
    """Both towers in one forward, as DistributedDataParallel wants it."""

    def __init__(self, net: Any, captioned: bool = False) -> None:
        """Wrap an open_clip model; `captioned` also runs CoCa's decoder on the captions."""
        super().__init__()
        self.net, self.captioned = net, captioned

    def forward(self, images: Tensor, texts: PackedText) -> tuple[Tensor, ...]:
        """Encode uint8 images [B, 3, H, W] and M texts.

        Returns unit-length features [B, D] and [M, D], logit_scale, and logit_bias if there is one;
        with `captioned` what `_captioned` does.
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
    """W + up · down, of low rank, in place of a frozen W (arXiv 2106.09685; alpha = r)."""

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
            if rank > min(weight.shape):
                size = " x ".join(map(str, weight.shape))
                raise DataError(f"--lora {rank}: a weight of the model is {size}; give less")
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
    limit: Tensor  # of net.logit_scale
    caption_weight: float = 0.0  # of CoCa's captioning loss


def make_loss(args: argparse.Namespace, types: Sequence[str] = NEGATIVE_TYPES) -> CEClipLoss:
    """The loss of the recipe and the options that overrule it, for K types of negatives."""
    given = {key: getattr(args, key) for key in LOSS_OPTIONS if getattr(args, key) is not None}
    try:
        return CEClipLoss(args.recipe, types=types, **given)
    except ValueError as error:
        raise DataError(f"--recipe {args.recipe} with these options: {error}") from None


def make_run(
    args: argparse.Namespace, model: Model, rank: Rank, types: Sequence[str] = NEGATIVE_TYPES
) -> Run:
    """The towers, the loss of K types, AdamW and the scaler that only fp16 needs."""
    loss, net = make_loss(args, types).to(rank.device), model.net
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
    # CLIP's limit of 100, unless the weights begin above it; SigLIP's loss has none.
    limit = net.logit_scale.detach().clone().clamp(min=math.log(100))
    if getattr(net, "logit_bias", None) is not None:
        limit.fill_(torch.inf)
    return Run(towers, net, teacher, loss, optimizer, scaler, limit, args.caption_weight)


def make_data(args: argparse.Namespace, model: Model, loss: CEClipLoss) -> Mixture:
    """The shapes world, or the manifests of --data; refuses data that the recipe cannot use."""
    if args.data is None:
        world = ShapesDataset(image_size(model.net), seed=0)
        return Mixture([world], [1], args.batch_size, args.seed, True)
    folders = args.images
    pairs = [split_weight(text) for text in args.data]
    weights = [weight for _, weight in pairs if weight is not None]
    transform = transform_of(args, model)
    sources = [
        ManifestDataset(path, folder, transform, args.seed, args.on_bad_image, args.types)
        for (path, _), folder in zip(pairs, folders * (len(pairs) // len(folders)), strict=True)
    ]
    named = " ".join(args.data)
    lacking = [name for name in args.types if not any(name in source.made for source in sources)]
    if lacking:
        raise DataError(
            f"--types: there is no negative of the type {lacking[0]}; see data.py check"
        )
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


def transform_of(args: argparse.Namespace, model: Model) -> Transform:
    """The crop, as the options want it."""
    return train_transform(model.net, exif=args.exif == "apply", reduce=not args.full_decode)


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
    readers: dict[int, Any] | None = None,
) -> Iterator[list[Batch]]:
    """This rank's share of each global batch from step `start` on; of shards if data is None."""
    local = args.batch_size // rank.world
    kind = "valid" if loss.options["mask_invalid"] else "all"
    collate = Collate(
        model.tokenizer,
        positives=loss.needs_positives,
        negatives=kind if loss.needs_negatives else "none",
        part=args.micro_batch or 0,
    )
    options: dict[str, Any] = {
        **{"num_workers": args.workers, "worker_init_fn": ignore_signals},
        **{"collate_fn": collate.bundle, "pin_memory": rank.device.type == "cuda"},
    }
    loader: Any
    if data is None:
        if loss.needs_positives:
            told = "--imc paired needs a second caption of each image, which shards lack"
            raise DataError(f"{told}; use --imc repulsion or --imc none")
        stream = make_stream(args, model, loss, rank, start, readers)
        loader = DataLoader(stream, batch_size=None, **options)
    else:
        batches = data.batches(start, args.steps)
        mine = (batch[rank.number * local : (rank.number + 1) * local] for batch in batches)
        loader = DataLoader(data, batch_sampler=mine, **options)
    # Workers are born deaf to the signals: the whole process group gets them, and only this
    # process shall act.  A worker that dies is seen while we wait for it, not amid a step.
    mask: Any = getattr(signal, "pthread_sigmask", lambda *_: None)
    before = mask(getattr(signal, "SIG_BLOCK", 0), SIGNALS)
    made = iter(loader)
    if before is not None:
        mask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return (unbundle(bundle) for bundle in made)


def ignore_signals(worker: int) -> None:
    """Leave the signals to the process that trains."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_stream(
    args: argparse.Namespace, model: Model, loss: CEClipLoss, rank: Rank, start: int, readers: Any
) -> ShardStream:
    """The shards of --data, from step `start` on."""
    place, transform = (start, rank.number, rank.world), transform_of(args, model)
    options: dict[str, Any] = {"batch": args.batch_size // rank.world, "remote": args.remote}
    options |= {"states": readers or {}, "needs_negatives": loss.needs_negatives}
    given = (args.data[0], transform, args.seed, place, args.on_bad_image, args.types)
    return ShardStream(*given, **options)


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
    """The loss of the whole batch from what `encode` returned for its parts; thresholds move on.

    Where there is a teacher, `taught` is what it returned, and `weight` that of the distance to it.
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
            run.net.logit_scale.copy_(run.net.logit_scale.minimum(run.limit))
            if run.teacher is not None:  # it follows, as in DeGLA (arXiv 2504.16801)
                pairs = zip(run.teacher.parameters(), run.net.parameters(), strict=True)
                for old, new in pairs:
                    old.lerp_(new, 1 - args.ema)
    else:
        run.loss.threshold.value.copy_(theta)
    run.scaler.update()
    values = {key: float(value.detach()) for key, value in out.items()}
    return {**values, "grad_norm": float(norm), "applied": float(finite)}


def checkpoint(
    run: Run, about: dict[str, Any], args: argparse.Namespace, step: int, readers: Any = None
) -> dict[str, Any]:
    """Everything that a resumed run needs; the weights in open_clip's layout."""
    train: dict[str, Any] = {
        **{"step": step, "limit": run.limit, "readers": readers or {}},
        **{"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()},
        "loss": run.loss.state_dict(),
    }
    if args.lora:
        train["net"] = run.net.state_dict()
    if run.teacher is not None:
        train["teacher"] = run.teacher.net.state_dict()
    kit = {**about, "recipe": args.recipe, "types": run.loss.types, "step": step, **versions()}
    return {"state_dict": plain_weights(run.net), "kit": kit, "train": train}


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all: the one before it stays until this one is on disk."""
    try:
        with writing(path, overwrite=True) as file:
            torch.save(content, file)
    except (DataError, RuntimeError) as error:
        told = f"{path}: cannot be written ({why(error)})" if error.__context__ else str(error)
        raise DataError(f"{told}; the last checkpoint stays") from None


def resume(run: Run, path: Path, steps: int) -> tuple[int, dict[int, Any]]:
    """Load latest.pt into the run; returns the step to go on with, and readers of shards."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        train, types = content["train"], content["kit"].get("types", NEGATIVE_TYPES)
        step = train["step"]
        if type(step) is not int or not 0 < step <= steps:
            raise ValueError(f"its step is {step!r}, of {steps}")
        if tuple(types) != run.loss.types:
            raise ValueError(f"types {', '.join(types)}, now {', '.join(run.loss.types)}")
        run.net.load_state_dict(train.get("net", content["state_dict"]))
        if run.teacher is not None:
            run.teacher.net.load_state_dict(train["teacher"])
        run.optimizer.load_state_dict(train["optimizer"])
        for p, state in run.optimizer.state.items():  # the fused step trusts these shapes
            if state.keys() != {"step", "exp_avg", "exp_avg_sq"} or any(
                x.shape != (() if key == "step" else p.shape) or not x.isfinite().all()
                for key, x in state.items()
            ):
                raise ValueError(f"its optimiser does not fit a weight of {list(p.shape)}")
        run.scaler.load_state_dict(train["scaler"])
        run.loss.load_state_dict(train["loss"])
        run.limit.copy_(train["limit"])
        readers = dict(train["readers"])
    except Exception as error:  # torch raises many kinds here
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{path}: cannot be resumed from ({reason}); use another --out") from None
    return step, readers


def fingerprint(path: str) -> str:
    """Size and hash of a file."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
            return f"{file.tell()} bytes, blake2b {digest.hexdigest()}"
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        **{"python": platform.python_version(), "torch": str(torch.__version__)},
        **{"torchvision": str(torchvision.__version__), "open_clip": open_clip.__version__},
    }


def run_record(args: argparse.Namespace, rank: Rank) -> dict[str, Any]:
    """What args.json keeps: the command line, fingerprints of manifests, versions."""
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    files = [] if reads_shards(args) else [split_weight(text)[0] for text in args.data or []]
    return {
        "options": json.loads(json.dumps(vars(args), default=str)),
        "data": [fingerprint(path) for path in files],
        **{"world_size": rank.world, "versions": versions(), "git_commit": commit},
    }


def check_run(out: Path, record: dict[str, Any]) -> None:
    """Refuse a directory that is not a run, or a run with other options or other captions."""
    if not os.path.lexists(out):
        return
    try:
        kept = json.loads((out / "args.json").read_text(encoding="utf-8"))
        before, seen = kept["options"], kept.get("data", record["data"])
        changed = [
            f"--{key.replace('_', '-')} {before.get(key)} -> {value}"
            for key, value in record["options"].items()
            if key not in FREE and before.get(key) != value
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        # A run that was cut off while it wrote its first file left nothing, or args.json.partial.
        with contextlib.suppress(OSError):
            if all(path.suffix in (".partial", ".lock") for path in out.iterdir()):
                return
        told = "its args.json is damaged" if os.path.lexists(out / "args.json") else "is not a run"
        raise DataError(f"--out {out}: exists, but {told}; choose another --out") from None
    if not any(out.glob("*.pt")):  # it saved nothing, and begins anew with other options too
        return
    if changed:
        raise DataError(
            f"--out {out}: holds a run with other options ({'; '.join(changed)}); "
            "give them back to resume it, or choose another --out"
        )
    for path, old, new in zip(before["data"] or [], seen, record["data"], strict=False):
        if old != new:
            raise DataError(
                f"--data {path}: changed since the run in {out} began ({old}, now {new}); put the "
                "old file back to resume it, or choose another --out"
            )


def start_run(out: Path, record: dict[str, Any], start: int, held: list[Any]) -> None:
    """Make the run directory and its args.json, unless they are there; go back to step `start`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not held:
            held.append(lock(out))
            if os.path.lexists(out / "latest.pt"):
                raise DataError(f"--out {out}: another run trained into it just now; start again")
        if not any(out.glob("*.pt")):
            write_text(out / "args.json", json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({why(error)}); check it") from None
    for name in ("metrics.jsonl", "val.jsonl"):
        trim_metrics(out / name, start)


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines that a cut-off run wrote after its last checkpoint; it writes them again."""
    if not os.path.lexists(path):
        return
    kept = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, LookupError, TypeError, RecursionError):
                if number < len(lines):  # the last one may be torn
                    raise DataError(
                        f"{path}:{number}: is no line of metrics; mend it, or move the file away"
                    ) from None
        write_text(path, "".join(kept))
    except OSError as error:
        raise DataError(f"{path}: cannot be rewritten ({why(error)}); check it") from None


class Stopped(BaseException):
    """A signal came while we waited for data."""


class Stop:
    """Remembers a SIGTERM, SIGINT or SIGUSR1 until the step is done; a second one ends at once.

    While the run waits for data a signal ends the wait.  Seconds are counted by a thread, for a
    process that waits in C++ for other ranks runs no handler of Python's.
    """

    def __enter__(self) -> Stop:
        """Catch the signals from now on."""
        self.signal, self.waiting = 0, False
        self.before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.pipe = theirs
        self.wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back; end loading processes, which may wait for ever."""
        signal.set_wakeup_fd(self.wakeup)
        self.pipe.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        end_workers()

    def _catch(self, number: int, frame: Any) -> None:
        self.signal = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self.waiting:
            self.waiting = False
            raise Stopped

    @staticmethod
    def _watch(pipe: socket.socket) -> None:
        # timeout(1) and torchrun pass on a signal that the process group has got already.
        patience, first = 3.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.5, 0.0
        while number := pipe.recv(1):
            if number[0] in SIGNALS:
                first = first or time.monotonic()
                if time.monotonic() - first > patience:
                    end_workers()
                    os._exit(130 if number[0] == signal.SIGINT else 143)
        pipe.close()

    def wait(self, loader: Iterator[list[Batch]]) -> tuple[list[Batch], DataError | None]:
        """The next batch, or what failed; neither where a signal is there, or comes."""
        self.waiting = True
        try:
            if not self.signal:
                return next(loader), None
        except Stopped:
            pass
        except Exception as error:  # of whatever kind torch makes of a worker's
            if not self.signal:
                return [], loader_fault(error)
        finally:
            self.waiting = False
        return [], None

    def agreed(self, rank: Rank, fault: DataError | None) -> int:
        """FAULT, the signal or 0: the largest of all ranks, so that all stop together."""
        code = self.signal if fault is None else FAULT
        if rank.world == 1:
            return code
        flag = torch.tensor([code], device=rank.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def end_workers() -> None:
    """End the processes that load data."""
    for child in multiprocessing.active_children():
        child.kill()


def train(
    run: Run,
    loader: Iterator[list[Batch]],
    about: dict[str, Any],
    args: argparse.Namespace,
    rank: Rank,
    start: int,
    stop: Stop,
    readers: dict[int, Any],
    after: Callable[[int], None] = lambda done: None,
) -> int:
    """Train from step `start` to the end, logging and saving on the way; returns the exit code.

    `after` is called with the number of steps done after each of them.
    """
    log = Log(args, rank, start)
    unsaved: DataError | None = None
    done, saved, code = start, start, 0
    run.towers.train()
    for step in range(start, args.steps):
        parts, fault = stop.wait(loader)
        code = stop.agreed(rank, fault or unsaved)
        if code:
            break
        if run.loss.reset_each_epoch and step % args.steps_per_epoch == 0:
            run.loss.threshold.reset()
        seed_dropout(hash((args.seed, step, rank.number)) % 2**63, rank.device)
        lr, scale = learning_rate(step, args), run.scaler.get_scale()
        out = train_step(run, parts, lr, args)
        done = step + 1
        # fp16 finds its scale by overflowing, which says nothing until the scale is down at 1.
        searching = run.scaler.is_enabled() and math.isfinite(out["loss"]) and scale > 1
        readers.update([parts[-1].state] if parts[-1].state else [])
        unsaved = log.add(parts, step, {**out, "lr": lr}, run.net.logit_scale, searching)
        if log.bad == MAX_BAD_STEPS or (done == args.steps and log.skipped >= MAX_BAD_STEPS):
            kept = f"; {args.out}/latest.pt is the last good checkpoint" if saved else ""
            raise DataError(
                f"loss or gradient was not finite {log.skipped} steps in a row (step {done}), none "
                f"was applied; lower --lr{kept}"
            )
        if epoch_path(args, done) or (not log.skipped and done % args.save_every == 0):
            share_readers(readers, args, rank)
            unsaved, saved = save_step(run, about, args, rank, done, readers) or unsaved, done
        after(done)
    code = code or stop.agreed(rank, unsaved)
    if code and not log.skipped and saved < done:
        share_readers(readers, args, rank)
        unsaved = unsaved or save_step(run, about, args, rank, done, readers)
    for error in filter(None, (fault, unsaved)):
        print(f"train.py: error: {error}", file=sys.stderr)
    if rank.number == 0 and code and (code != FAULT or done):
        print(f"stopped at step {done}; the same command goes on", flush=True)
    elif rank.number == 0 and log.skipped:
        print(f"the last {log.skipped} steps were not finite, and not applied", flush=True)
    return 2 if code == FAULT or unsaved else 128 + code if code else 0


def loader_fault(error: Exception) -> DataError:
    """What went wrong while a batch was made, in one sentence; a worker brings its traceback."""
    told = (str(error).strip().splitlines() or [""])[-1]
    if not isinstance(error, DataError | OSError | RuntimeError | MemoryError):
        raise error
    # torch's frames hold the error, and it them: the loader would outlive its queues.
    error.__traceback__ = None
    if isinstance(error, DataError):
        return DataError(re.sub(r"^[\w.]*DataError: ", "", told))
    return DataError(f"a batch cannot be loaded ({told or type(error).__name__}); fewer --workers?")


def share_readers(readers: dict[int, Any], args: argparse.Namespace, rank: Rank) -> None:
    """Gather where the readers of shards of all ranks are."""
    if rank.world > 1 and reads_shards(args):
        found: list[Any] = [None] * rank.world
        dist.all_gather_object(found, readers)
        for others in found:
            readers.update(others)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Make a step's random numbers its own, so that a checkpoint need not hold their state."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also note a stack trace
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def save_step(
    run: Run, about: dict[str, Any], args: argparse.Namespace, rank: Rank, step: int, readers: Any
) -> DataError | None:
    """Save the run on the first rank, and its weights where an epoch ended; returns what failed."""
    if rank.number:
        return None
    if not all(bool(torch.isfinite(p).all()) for p in run.net.parameters()):
        return DataError(f"weights are not finite after step {step}, and not saved; lower --lr")
    content = checkpoint(run, about, args, step, readers)
    try:
        save(content, args.out / "latest.pt")
        if path := epoch_path(args, step):
            save({key: content[key] for key in ("state_dict", "kit")}, path)
    except DataError as error:
        return error
    return None


def epoch_path(args: argparse.Namespace, step: int) -> Path | None:
    """Where the weights of an epoch, or of the run, that ends with this step go."""
    if step % args.steps_per_epoch and step != args.steps:
        return None
    return args.out / f"epoch_{math.ceil(step / args.steps_per_epoch):02d}.pt"


VAL_SUITES = ("shapes", "sugarcrepe", "retrieval")


def load_validation(args: argparse.Namespace) -> Suite:
    """What --val names: a suite below --val-root, in whole or in part, or a manifest.

    A manifest's captions are held to each of their negatives, and searched among all images.
    """
    if args.val in VAL_SUITES:
        return load_suite(args.val, args.val_root, partial=True)
    items: list[TestItem] = []
    captions: dict[str, list[str]] = {}
    for _, record in read_records(Path(args.val), need_image=True):
        image = str(args.val_root / str(record.image))
        captions.setdefault(image, []).append(record.caption)
        for kind, given in record.negatives.items():
            for negative in [given] if isinstance(given, str) else given or []:
                pair = (record.caption, negative)
                items.append(TestItem((kind,), str(len(items)), (image,), pair))
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
            try:
                self.best = max((float(line["best"]) for line in lines), default=self.best)
            except (LookupError, TypeError, ValueError):
                told = "holds a line without the best figure; mend it, or move the file away"
                raise DataError(f"{self.path}: {told}") from None

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
        self.images = self.tokens = self.faults = self.same = 0
        self.skipped = self.bad = 0  # steps in a row: not applied, and not for fp16's scale
        self.began = self.mark = time.perf_counter()

    def add(
        self, parts: list[Batch], step: int, out: dict[str, float], scale: Tensor, searching: bool
    ) -> DataError | None:
        """Count a step; at times, and where it was lost, write a line; returns what failed."""
        args, done, lost = self.args, step + 1, not (out["applied"] or searching)
        self.skipped = 0 if out["applied"] else self.skipped + 1
        self.bad = 0 if out["applied"] else self.bad + lost
        self.images += args.batch_size
        self.tokens += self.rank.world * sum(part.texts.computed for part in parts)
        self.same += sum(part.same for part in parts)
        for fault in (fault for part in parts for fault in part.faults):
            self.faults += 1
            print(f"stepped over {fault}", file=sys.stderr)
        if self.rank.number or not (done % args.log_every == 0 or done == args.steps or lost):
            return None
        now = time.perf_counter()
        left = (now - self.began) / (done - self.start) * (args.steps - done)
        line: dict[str, Any] = {
            **{"step": done, "epoch": step // args.steps_per_epoch, **out},
            "logit_scale": float(scale.detach().exp()),
            "images_per_second": self.images / (now - self.mark),
            "text_tokens_per_second": self.tokens / (now - self.mark),
            **{"memory_mib": memory(self.rank.device), "bad_images": self.faults},
            "same_negatives": self.same,
        }
        said = " ".join(f"{key} {line[key]:.3f}" for key in ("loss", "itc", "imc", "cmr"))
        skipped = "" if out["applied"] else "  NOT FINITE, step skipped"
        print(
            f"step {done}/{args.steps}  {said}  {line['images_per_second']:.0f} images/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left{skipped}",
            flush=True,
        )
        self.mark, self.images, self.tokens = now, 0, 0
        try:
            with (args.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            return DataError(f"--out {args.out}: metrics cannot be written ({why(error)})")
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


def dry_run(
    run: Run, loader: Iterator[list[Batch]], args: argparse.Namespace, data: Mixture | None
) -> None:
    """Do one step, tell what a run would be, write nothing."""
    try:
        parts = next(loader)
    except Exception as error:
        raise loader_fault(error) from None
    finally:
        end_workers()  # they ignore SIGTERM, and Python would wait for them as it ends
    out, name = train_step(run, parts, 0.0, args), args.model or args.pretrained
    count = sum(p.numel() for p in run.net.parameters())
    print(f"{name}: {count / 1e6:.1f} million parameters, recipe {args.recipe}")
    size = "shards" if data is None else f"{len(data)} captions, {args.steps_per_epoch} an epoch"
    print(f"{args.steps} steps of {args.batch_size}; {size}")
    print(f"first batch: {', '.join(f'{key} {value:.3f}' for key, value in out.items())}")
    print("dry run: nothing was written")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options that depend on the data get their defaults here."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", nargs="+", metavar="FILE[:WEIGHT]", help="manifests, or .tar shards")
    add_types(parser)
    add("--images", type=Path, nargs="+", help="folder of pictures, for all or for each manifest")
    add("--remote", action="store_true", help="shards may be URLs, or pipe: commands to be run")
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
    add("--on-bad-image", choices=("stop", "skip"), help="default stop")
    add("--exif", choices=("apply", "ignore"), help="orientation of photos (default apply)")
    add("--full-decode", action="store_true", help="decode JPEGs whole, however small the crop")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="default fp32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    add("--workers", type=int, help="loading processes of each rank (default 4; shapes 0)")
    add("--seed", type=int, default=0, help="of weights, order and crops (default 0)")
    add("--log-every", type=int, default=20, help="steps between lines of metrics (default 20)")
    add("--save-every", type=int, help="steps between checkpoints (default 500; shapes 100)")
    add("--dry-run", action="store_true", help="do one step, tell what would be, write nothing")
    for add_group in (add_validation_options, add_loss_options, add_method_options):
        add_group(parser)
    args = parser.parse_args(argv)
    check_idle(args)
    if args.steps is not None and args.epochs is not None:
        parser.error("give --steps or --epochs, not both")
    kind = "shapes" if args.data is None else "photos"
    if args.pretrained and os.path.exists(args.pretrained):
        args.model = args.model or ""  # the checkpoint's own
    length = ("steps", "epochs") if args.steps or args.epochs else ()
    for key, value in {**DEFAULTS["both"], **DEFAULTS[kind]}.items():
        if getattr(args, key) is None and key not in length:
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
    add("--ema", type=float, help="decay of the teacher (default 0.9996)")
    add("--caption-weight", type=float, default=0.0, help="of CoCa's captioning loss (default 0)")
    add("--compile", action="store_true", help="torch.compile the towers")
    add("--grad-checkpointing", action="store_true", help="save memory, compute a third more")


def check_args(args: argparse.Namespace, rank: Rank) -> None:
    """Refuse what cannot work before anything is loaded."""
    least = {"lora": 0, "warmup": 0, "workers": 0, "seed": 0}
    most = {"workers": 1024, "seed": 2**63 - 1, "ema": 1}
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            real, flag = isinstance(value, float), name.replace("_", "-")
            low, high = least.get(name, int(not real)), most.get(name, 10**6 if real else 2**31)
            above = ", and above 0" if name in ("lr", "cap") else ""
            if not low <= value <= high or (above and not value):
                raise DataError(f"--{flag} {value}: must be a number from {low} to {high}{above}")
    if args.batch_size % rank.world:
        raise DataError(f"--batch-size {args.batch_size}: is not divisible by {rank.world} ranks")
    if args.val is None and (args.val_root or args.val_every or args.best):
        raise DataError("--val-root, --val-every and --best: need --val, what to score")
    if args.val not in (None, "shapes") and args.val_root is None:
        raise DataError(f"--val {args.val}: needs --val-root, the folder of its files or images")
    if args.lora and (args.distill or args.tune != "all"):
        raise DataError("--lora: goes with neither --distill nor --tune; leave one out")
    check_data(args)


def check_data(args: argparse.Namespace) -> None:
    """Refuse --data and --images that do not fit together."""
    folders, manifests = len(args.images or []), len(args.data or [])
    if (folders or args.types) and not manifests:
        flag = "--images" if folders else "--types"
        raise DataError(f"{flag}: needs --data, the manifest with these images and negatives")
    if reads_shards(args):
        if manifests > 1 or not args.steps:
            raise DataError("--data *.tar: takes one pattern, and needs --steps, not --epochs")
    elif manifests and folders not in (1, manifests):
        raise DataError(
            f"--images: {folders} folders for {manifests} manifests; "
            "give one folder for all of --data, or one for each"
        )
    if len({split_weight(text)[1] is None for text in args.data or []}) == 2:
        raise DataError("--data: give every manifest a weight (FILE:WEIGHT), or none")


def check_idle(args: argparse.Namespace) -> None:
    """Refuse options that do nothing where they stand."""
    if args.recipe not in RECIPES:
        raise DataError(f"--recipe {args.recipe}: is none of {', '.join(RECIPES)}")
    loss, shapes = make_loss(args), args.data is None
    o, fixed = loss.options, loss.threshold.mode == "fixed"
    for names, idle, where in (
        ("ema", not args.distill, "without --distill"),
        ("fixed_threshold", not fixed, "without --threshold fixed"),
        ("cap", fixed, "with --threshold fixed"),
        ("threshold cap fixed_threshold", not o["cmr_weight"], "where the cmr weight is 0"),
        ("imc_weight", o["imc"] == "none", "where imc is none"),
        ("focal_gamma label_smoothing", not o["own_weight"], "without --own-weight"),
        ("images captions", reads_shards(args), "with shards"),
        ("remote", not reads_shards(args), "without shards"),
        ("captions on_bad_image exif full_decode", shapes, "in the shapes world"),
    ):
        for name in names.split():
            if idle and getattr(args, name) not in (None, False):
                raise DataError(f"--{name.replace('_', '-')}: does nothing {where}; leave it out")


def reads_shards(args: argparse.Namespace) -> bool:
    """Whether --data are webdataset shards."""
    return any(re.search(r"\.(tar(\.\w+)?|tgz)(:[\d.]+)?$|^pipe:", x) for x in args.data or [])


def prepare(
    args: argparse.Namespace, rank: Rank, held: list[Any]
) -> tuple[dict[str, Any], Model, bool]:
    """Refuse what cannot work, lock the run directory if it is there, and load the model.

    Returns what args.json keeps, the model, and whether the run begins anew.
    """
    check_args(args, rank)
    record = run_record(args, rank)
    check_run(args.out, record)
    if os.path.lexists(args.out) and not args.dry_run and rank.number == 0:
        held.append(lock(args.out))
    fresh = not os.path.lexists(args.out / "latest.pt")
    torch.manual_seed(args.seed)
    start = (args.model or None, args.pretrained) if fresh else (None, str(args.out / "latest.pt"))
    model = load_model(*start, device=str(rank.device))
    if not hasattr(model.net, "logit_scale"):
        raise DataError(
            f"--pretrained {args.pretrained}: is a model of transformers, which evaluate.py scores "
            "but train.py does not train; take it in open_clip's layout"
        )
    if args.micro_batch and any(isinstance(m, nn.BatchNorm2d) for m in model.net.modules()):
        name = model.about["model"]
        raise DataError(f"--micro-batch: {name} has batch norms, which see a part at a time")
    return record, model, fresh


def same_start(out: Path, rank: Rank, start: int, record: dict[str, Any]) -> None:
    """Refuse ranks that would go on from different steps, or with different options or files."""
    options = {key: value for key, value in record["options"].items() if key not in FREE}
    rest = (options, record["data"])
    starts: list[Any] = [(start, rest)] * rank.world
    if rank.world > 1:
        dist.all_gather_object(starts, (start, rest))
    for number, (step, other) in enumerate(starts):
        if step != start:
            raise DataError(
                f"--out {out}: rank {rank.number} goes on from step {start}, rank {number} from "
                f"step {step}; --out must be one folder on a disk that all ranks share"
            )
        if other != rest:
            raise DataError(
                f"rank {number} has other options or another --data file; make them alike"
            )


def main(argv: list[str] | None = None) -> int:
    """Build everything, find where a cut-off run was, train; returns the exit code."""
    args = parse_args(argv)
    rank = start_process(args.device)
    held: list[Any] = []  # the lock, until this function ends
    record, model, fresh = together(lambda: prepare(args, rank, held))
    shards, loss = reads_shards(args), make_loss(args)
    data = together(lambda: None if shards else make_data(args, model, loss))
    source = data or together(lambda: make_stream(args, model, loss, rank, 0, {}))
    note_images(model, data, rank)
    run = make_run(args, model, rank, source.types)
    args.steps_per_epoch = args.steps if data is None else data.steps[0]
    args.steps = args.steps or args.epochs * args.steps_per_epoch
    args.val_every = args.val_every or args.steps_per_epoch
    if args.dry_run:
        dry_run(run, make_loader(args, data, model, run.loss, rank, 0), args, data)
        return 0
    latest = args.out / "latest.pt"
    start, readers = together(lambda: (0, {}) if fresh else resume(run, latest, args.steps))
    same_start(args.out, rank, start, record)
    if rank.number == 0:
        start_run(args.out, record, start, held)
    if rank.number == 0 and start and (path := epoch_path(args, start)) and not path.exists():
        content = checkpoint(run, model.about, args, start)  # it was cut off between its files
        save({key: content[key] for key in ("state_dict", "kit")}, path)
    if start >= args.steps:
        if rank.number == 0:
            print(f"{args.out} is done: {start} steps; nothing to do")
        return 0
    if rank.number == 0:
        count = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
        what = f"{count / 1e6:.2f} million weights to train, {model.about['activation']}"
        where = f"{args.steps} steps of {args.batch_size} on {rank.world} x {rank.device.type}"
        print(f"{model.about['model']} ({what}), recipe {args.recipe}, {where}", end=", captions ")
        print(f"{text_layout(model.net)}, from step {start}", flush=True)
    after = Validation(run, model, args, rank) if args.val else lambda done: None
    if not start:
        after(0)
    with Stop() as stop:
        loader = make_loader(args, data, model, run.loss, rank, start, readers)
        code = train(run, loader, model.about, args, rank, start, stop, readers, after)
    if rank.number == 0 and code == 0:
        print(f"done: {args.out}/latest.pt")
    return code


def run_main() -> int:
    """Run main; where another rank has ended, say so."""
    try:
        return main()
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search("Connection|timed out", str(error)):
            raise
        print(f"train.py: error: another rank has ended ({why(error)})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = run_script(
        run_main, "train.py", quiet=lambda: dist.is_initialized() and dist.get_rank() > 0
    )
    gc.collect()  # DistributedDataParallel must go before its group: its threads would abort
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)

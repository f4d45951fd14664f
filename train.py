# SPDX-License-Identifier: MIT
"""Train CLIP with hard negatives, on one device or under torchrun or srun.

  python train.py                                        # the shapes world, minutes on a laptop
  torchrun --nproc_per_node=8 train.py --data negatives.jsonl --images coco \\
      --model ViT-B-32-quickgelu --pretrained openai --recipe ce-clip
  python train.py --loss scripts/example_loss.py:WithAlignment  # a loss of your own

The same command resumes an interrupted run and ends with the same weights.
"""

# Chapters: options; data; model and loss; the step; checkpoints and resuming; validation and
# metrics; the loop; main.

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import hashlib
import importlib
import inspect
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

import negatives
from negatives import NEGATIVE_TYPES, DataError, why

VAL_SUITES = ("shapes", "sugarcrepe", "retrieval")


def make_parser(everything: bool = False) -> argparse.ArgumentParser:  # noqa: PLR0915
    """The command line, with help on the common options only, or on all with `everything`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.py", "train.py [options]", __doc__, formatter_class=raw)
    parser.add_argument("--help-all", action="help", help="show the rare options too, and exit")
    add = parser.add_argument_group("data").add_argument
    text = "manifests (.jsonl) or shards (.tar) with negatives (default: the shapes world)"
    add("--data", nargs="+", metavar="FILE[:WEIGHT]", help=text)
    text = "folder of the images: one for all manifests, or one for each"
    add("--images", type=Path, nargs="+", metavar="DIR", help=text)
    text = "types of negatives to read, as counting,negation (default: all in the manifests)"
    add("--types", type=negatives.split_types, metavar="A,B", default=[], help=text)
    text = "captions of one image that a batch may hold (default one; recipe released: all)"
    add("--captions", choices=("one", "all"), help=text)
    text = "edits that make the shapes world's negatives; lexicon: negatives.py (default both)"
    add("--shapes-negatives", choices=("both", "exchange", "replace", "lexicon"), help=text)
    text = "what to do about an image that cannot be decoded (default stop)"
    add("--on-bad-image", choices=("stop", "skip"), help=text)
    text = "data loading processes of each rank (default 4; shapes world 0)"
    add("--workers", type=int, metavar="N", help=text)
    add = parser.add_argument_group("model").add_argument
    text = "open_clip model or config .json (default ViT-B-32-quickgelu; shapes-resnet)"
    add("--model", metavar="NAME", help=text)
    text = "open_clip tag or checkpoint to start from (default: random)"
    add("--pretrained", metavar="NAME", help=text)
    text = "train all weights, or only the text tower (default all)"
    add("--tune", choices=("all", "text"), default="all", help=text)
    text = "rank of LoRA updates to train in place of weights; 0 is off (default 0)"
    add("--lora", type=int, metavar="N", default=0, help=text)
    text = "precision of the towers (default fp32)"
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help=text)
    text = "where to train; auto prefers a GPU (default auto)"
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)
    add = parser.add_argument_group("training").add_argument
    text = "bundle of loss options: clip, negclip, ce-clip or released (default ce-clip)"
    add("--recipe", metavar="NAME", help=text)
    text = "length of the run in steps (default 600 in the shapes world)"
    add("--steps", type=int, metavar="N", help=text)
    text = "length of the run in epochs, instead of --steps (default 5 with --data)"
    add("--epochs", type=int, metavar="N", help=text)
    text = "images in a step, over all ranks (default 512; shapes world 64)"
    add("--batch-size", type=int, metavar="N", help=text)
    text = "images that a rank encodes at once; the gradients stay exact (default: all)"
    add("--micro-batch", type=int, metavar="N", help=text)
    text = "peak learning rate of AdamW (default 5e-6; shapes world 1e-3)"
    add("--lr", type=float, metavar="X", help=text)
    text = "weight decay of AdamW, on matrices only (default 0.1)"
    add("--weight-decay", type=float, metavar="X", default=0.1, help=text)
    text = "warm-up steps, in which the learning rate rises to --lr (default 50)"
    add("--warmup", type=int, metavar="N", help=text)
    text = "largest gradient norm; 0 is off (default 0; shapes world 1)"
    add("--grad-clip", type=float, metavar="X", help=text)
    text = "seed of weights, order and crops (default 0)"
    add("--seed", type=int, metavar="N", default=0, help=text)
    add = parser.add_argument_group("loss").add_argument
    text = "loss of your own: a torch.nn.Module with the forward of CEClipLoss"
    add("--loss", metavar="FILE.py:CLASS", help=text)
    text = "intra-modal loss: none, paired, paper, repulsion or released (default: the recipe's)"
    add("--imc", metavar="NAME", help=text)
    text = "weight of the intra-modal loss (default 0.2)"
    add("--imc-weight", type=float, metavar="X", help=text)
    text = "weight of the cross-modal rank loss (default 0.4)"
    add("--cmr-weight", type=float, metavar="X", help=text)
    text = "margins of the rank loss: adaptive, fixed, max or released (default: the recipe's)"
    add("--threshold", metavar="NAME", help=text)
    add = parser.add_argument_group("output").add_argument
    text = "run directory, for checkpoints and metrics (default runs/RECIPE)"
    add("--out", type=Path, metavar="DIR", help=text)
    text = "steps between checkpoints (default 500; shapes world 100)"
    add("--save-every", type=int, metavar="N", help=text)
    text = "steps between lines of metrics (default 20)"
    add("--log-every", type=int, metavar="N", default=20, help=text)
    text = "also log the metrics there (default: metrics.jsonl only)"
    add("--log", choices=("tensorboard", "wandb"), help=text)
    text = "score during the run: shapes, sugarcrepe, retrieval or a manifest (default: nothing)"
    add("--val", metavar="NAME", help=text)
    text = "folder of the suite of --val, or of the images of its manifest"
    add("--val-root", type=Path, metavar="DIR", help=text)
    text = "steps between scores of --val (default: an epoch)"
    add("--val-every", type=int, metavar="N", help=text)
    text = "do one step, print what a run would do, and write nothing"
    add("--dry-run", action="store_true", help=text)
    rare = parser.add_argument_group("rare")
    add = rare.add_argument
    text = "rotate photos by their EXIF orientation, or not (default apply)"
    add("--exif", choices=("apply", "ignore"), help=text)
    text = "decode JPEGs at full size, even where the crop is small"
    add("--full-decode", action="store_true", help=text)
    text = "allow shards that are URLs or pipe: commands (which are executed)"
    add("--remote", action="store_true", help=text)
    add("--compile", action="store_true", help="compile the towers with torch.compile")
    text = "recompute activations in the backward pass: less memory, a third more compute"
    add("--grad-checkpointing", action="store_true", help=text)
    text = "largest margin of the rank loss, in logits (default 10)"
    add("--cap", type=float, metavar="X", help=text)
    text = "margin under --threshold fixed, in logits (default 5)"
    add("--fixed-threshold", type=float, metavar="X", help=text)
    text = "weight of the softmax of each image over its caption and its own negatives (default 0)"
    add("--own-weight", type=float, metavar="X", help=text)
    text = "focusing exponent of the loss that --own-weight adds: 0, or 1 and more (default 0)"
    add("--focal-gamma", type=float, metavar="X", help=text)
    text = "label smoothing of the loss that --own-weight adds, from 0 to below 1 (default 0)"
    add("--label-smoothing", type=float, metavar="X", help=text)
    text = "weight of the squared distance to the features of an EMA teacher (default 0: off)"
    add("--distill", type=float, metavar="X", default=0.0, help=text)
    text = "decay of the teacher of --distill per step (default 0.9996)"
    add("--ema", type=float, metavar="X", help=text)
    text = "weight of CoCa's captioning loss (default 0)"
    add("--caption-weight", type=float, metavar="X", default=0.0, help=text)
    text = "score of --val by which best.pt is chosen (default: the suite's headline)"
    add("--best", metavar="NAME", help=text)
    if not everything:
        for action in rare._group_actions:
            action.help = argparse.SUPPRESS
    return parser


if __name__ == "__main__":  # --help is answered before torch is imported, which takes seconds
    make_parser("--help-all" in sys.argv).parse_args()

# Idle OpenMP threads sleep; busy-waiting slows every step while another process uses the CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

import data
import evaluate
from data import Batch
from evaluate import Model, Rank, Suite
from losses import CEClipLoss

# Defaults: the paper's run on photos, and a small run of the shapes world.
DEFAULTS: dict[str, dict[str, Any]] = {
    "photos": {
        **{"lr": 5e-6, "warmup": 50, "batch_size": 512, "epochs": 5, "grad_clip": 0.0},
        **{"model": "ViT-B-32-quickgelu", "save_every": 500, "workers": 4},
    },
    "shapes": {
        **{"lr": 1e-3, "warmup": 50, "batch_size": 64, "steps": 600, "grad_clip": 1.0},
        **{"model": "shapes-resnet", "save_every": 100, "workers": 0},
    },
    "both": {"ema": 0.9996, "on_bad_image": "stop", "exif": "apply"},
}
# Options that a resumed run may change, because they do not affect the weights.
FREE = {"out", "device", "workers", "log_every", "save_every", "dry_run", "images", "micro_batch"}
FREE |= {"val", "val_root", "val_every", "best", "log", "on_bad_image", "remote"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; options that depend on the data get their defaults here.

    Raises:
        DataError: an option has no effect with the others, or the loss rejects it.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser("--help-all" in argv).parse_args(argv)
    check_idle(args)
    if args.pretrained and os.path.exists(args.pretrained):
        args.model = args.model or ""  # the checkpoint's own
    kind, length = "photos" if args.data else "shapes", {"steps", "epochs"}
    for key, value in {**DEFAULTS["both"], **DEFAULTS[kind]}.items():
        if getattr(args, key) is None and not (key in length and (args.steps or args.epochs)):
            setattr(args, key, value)
    if args.loss is None:
        args.recipe = args.recipe or "ce-clip"
    args.out = args.out or Path("runs") / (args.recipe or args.loss.rpartition(":")[2])
    args.captions = args.captions or ("all" if args.recipe == "released" else "one")
    return args


def check_idle(args: argparse.Namespace) -> None:
    """Refuse options that have no effect in combination with the others."""
    loss, shapes, shards = make_loss(args), args.data is None, reads_shards(args)
    rows = [
        ("ema", not args.distill, "without --distill"),
        ("images captions", shards, "with shards"),
        ("remote", not shards, "without shards"),
        ("captions on_bad_image exif full_decode", shapes, "in the shapes world"),
        ("shapes_negatives", not shapes, "with --data"),
        ("epochs", args.steps is not None, "where --steps is given"),
    ]
    if isinstance(loss, CEClipLoss):
        o, fixed = loss.options, loss.threshold.mode == "fixed"
        rows += [
            ("fixed_threshold", not fixed, "without --threshold fixed"),
            ("cap", fixed, "with --threshold fixed"),
            ("threshold cap fixed_threshold", not o["cmr_weight"], "where the cmr weight is 0"),
            ("imc_weight", o["imc"] == "none", "where imc is none"),
            ("focal_gamma label_smoothing", not o["own_weight"], "without --own-weight"),
        ]
    for names, idle, where in rows:
        for name in names.split():
            if idle and getattr(args, name) not in (None, False):
                raise DataError(f"--{name.replace('_', '-')}: does nothing {where}; leave it out")


def check_args(args: argparse.Namespace, rank: Rank) -> None:
    """Refuse options that cannot work, before anything is loaded."""
    least = {"lora": 0, "warmup": 0, "workers": 0, "seed": 0}
    most = {"workers": 1024, "seed": 2**63 - 1, "ema": 1}
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            real, flag = isinstance(value, float), name.replace("_", "-")
            low, high = least.get(name, int(not real)), most.get(name, 10**6 if real else 2**31)
            above = ", and above 0" if name in ("lr", "cap") else ""
            if not low <= value <= high or (above and not value):
                raise DataError(f"--{flag} {value}: must be a number from {low} to {high}{above}")
    shards, folders, manifests = reads_shards(args), len(args.images or []), len(args.data or [])
    own = "--images" if folders else "--types"
    for wrong, told in (
        (args.batch_size % rank.world,
         f"--batch-size {args.batch_size}: is not divisible by {rank.world} ranks"),
        (args.val is None and (args.val_root or args.val_every or args.best),
         "--val-root, --val-every and --best: need --val, what to score"),
        (args.val not in (None, "shapes") and args.val_root is None,
         f"--val {args.val}: needs --val-root, the folder of its files or images"),
        (args.lora and (args.distill or args.tune != "all"),
         "--lora: goes with neither --distill nor --tune; leave one out"),
        ((folders or args.types) and not manifests,
         f"{own}: needs --data, the manifest with these images and negatives"),
        (shards and (manifests > 1 or not args.steps),
         "--data *.tar: takes one pattern, and needs --steps, not --epochs"),
        (not shards and manifests and folders not in (1, manifests),
         f"--images: {folders} folders for {manifests} manifests; "
         "give one folder for all of --data, or one for each"),
        (len({weight is None for _, weight in manifest_weights(args)}) == 2,
         "--data: give every manifest a weight (FILE:WEIGHT), or none"),
    ):  # fmt: skip
        if wrong:
            raise DataError(told)


def reads_shards(args: argparse.Namespace) -> bool:
    """Whether --data are webdataset shards."""
    return any(re.search(r"\.(tar(\.\w+)?|tgz)(:[\d.]+)?$|^pipe:", x) for x in args.data or [])


def manifest_weights(args: argparse.Namespace) -> list[tuple[str, float | None]]:
    """Split each FILE:WEIGHT of --data; the weight may be missing."""
    found: list[tuple[str, float | None]] = []
    for text in args.data or []:
        match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", text)
        if match and not float(match[2]):
            raise DataError(f"--data {text}: the weight must be above 0; or leave the file out")
        found.append((match[1], float(match[2])) if match else (text, None))
    return found


# Data


def make_source(
    args: argparse.Namespace, model: Model, loss: Any, rank: Rank
) -> data.Mixture | data.ShardStream:
    """The shapes world, or what --data names; refuses data that the loss cannot use."""
    if args.data is None:
        world = data.ShapesDataset(data.image_size(model.net), 0, args.shapes_negatives or "both")
        return data.Mixture([world], [1], args.batch_size, args.seed, True)
    named, remedy = " ".join(args.data), "use --imc repulsion or --imc none"
    exif, reduce = args.exif == "apply", not args.full_decode
    transform = data.train_transform(model.net, exif=exif, reduce=reduce)
    if reads_shards(args):
        if loss.needs_positives:
            told = "--imc paired needs a second caption of each image, which shards lack"
            raise DataError(f"{told}; {remedy}")
        given = (args.data[0], transform, args.seed, (0, rank.number, rank.world))
        options = {"batch": args.batch_size // rank.world, "remote": args.remote}
        options["needs_negatives"] = loss.needs_negatives
        return data.ShardStream(*given, args.on_bad_image, args.types, **options)
    pairs = manifest_weights(args)
    folders = args.images * (len(pairs) // len(args.images))
    sources = [
        data.ManifestDataset(path, folder, transform, args.seed, args.on_bad_image, args.types)
        for (path, _), folder in zip(pairs, folders, strict=True)
    ]
    lacking = [name for name in args.types if not any(name in source.made for source in sources)]
    if lacking:
        told = f"there is no negative of the type {lacking[0]}; see data.py check"
        raise DataError(f"--types: {told}")
    if loss.needs_negatives and not any(source.has_negatives for source in sources):
        raise DataError(f"--data {named}: holds no negatives; make them with negatives.py")
    if loss.needs_positives and all(len(s) == s.image_of.max() + 1 for s in sources):
        told = "no image has two captions, which --imc paired needs"
        raise DataError(f"--data {named}: {told}; {remedy}")
    # The checkpoint lists all training images, those of the initial checkpoint included.
    before = model.about.get("train_images", torch.empty(0, dtype=torch.int64)).numpy()
    photos = np.unique(np.concatenate([before, *(source.photos for source in sources)]))
    model.about["train_images"] = torch.from_numpy(photos)
    if rank.number == 0:
        overlap = "; ".join(data.find_overlap(photos))
        print(f"{len(photos)} training images; among them: {overlap}")
    shares = [weight for _, weight in pairs if weight] or [len(source) for source in sources]
    return data.Mixture(sources, shares, args.batch_size, args.seed, args.captions == "one")


def make_loader(run: Run, source: Any, start: int, readers: Any = None) -> Iterator[list[Batch]]:
    """This rank's share of each global batch from step `start` on."""
    args, loss, rank = run.args, run.loss, run.rank
    kind = "valid" if loss.options.get("mask_invalid", True) else "all"
    kind, part = kind if loss.needs_negatives else "none", args.micro_batch or 0
    needs: dict[str, Any] = {"positives": loss.needs_positives, "negatives": kind}
    options: dict[str, Any] = {"num_workers": args.workers, "worker_init_fn": ignore_signals}
    options["collate_fn"] = data.Collate(run.model.tokenizer, **needs, part=part).bundle
    options["pin_memory"] = rank.device.type == "cuda"
    loader: Any
    if isinstance(source, data.ShardStream):
        source.place, source.states = (start, rank.number, rank.world), dict(readers or {})
        loader = DataLoader(source, batch_size=None, **options)
    else:
        local = args.batch_size // rank.world
        here = slice(rank.number * local, (rank.number + 1) * local)
        mine = (batch[here] for batch in source.batches(start, args.steps))
        loader = DataLoader(source, batch_sampler=mine, **options)
    # Workers start with signals blocked: the whole process group gets them, and only this process
    # may handle them. A dead worker is noticed while waiting for a batch, not during a step.
    mask: Any = getattr(signal, "pthread_sigmask", lambda *_: None)
    before = mask(getattr(signal, "SIG_BLOCK", 0), SIGNALS)
    made = iter(loader)
    if before is not None:
        mask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return (data.unbundle(bundle) for bundle in made)


# SLURM sends SIGUSR1 before the time limit (--signal=USR1@120); torchrun forwards it only with
# TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1.
SIGNALS = {getattr(signal, x) for x in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, x)}


def ignore_signals(worker: int) -> None:
    """Ignore signals in a worker; the training process handles them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def loader_fault(error: Exception) -> DataError:
    """A loader's error as one sentence, without the traceback that a worker adds."""
    told = (str(error).strip().splitlines() or [""])[-1]
    if not isinstance(error, DataError | OSError | RuntimeError | MemoryError):
        raise error
    # torch's frames and the error refer to each other: the loader would outlive its queues.
    error.__traceback__ = None
    if isinstance(error, DataError):
        return DataError(re.sub(r"^[\w.]*DataError: ", "", told))
    return DataError(f"a batch cannot be loaded ({told or type(error).__name__}); fewer --workers?")


# Model and loss


class Towers(nn.Module):
    """Both towers in one forward, as DistributedDataParallel needs it."""

    def __init__(self, net: Any, captioned: bool = False) -> None:
        """Wrap an open_clip model; with `captioned` CoCa's decoder also runs on the captions."""
        super().__init__()
        self.net, self.captioned = net, captioned

    def forward(self, images: Tensor, texts: data.PackedText) -> tuple[Tensor, ...]:
        """Encode uint8 images [B, 3, H, W] and M texts.

        Returns unit-length features [B, D] and [M, D], logit_scale, and logit_bias if there is one,
        or with `captioned` the sum of the captioning loss over words (Yu et al., arXiv 2205.01917),
        and the count of words.
        """
        net, bias = self.net, getattr(self.net, "logit_bias", None)
        images, more = data.normalise(images, net), [] if bias is None else [bias + 0]
        if self.captioned:
            tokens = data.unpack_texts(texts, net) if len(texts.where) else texts.tokens  # [M, C]
            image_features, seen = net._encode_image(images, normalize=False)
            text_features, words = net._encode_text(tokens, normalize=False)
            # Each word of a true caption is predicted from the image and the words before it.
            told, labels = words[: len(images), :-1], tokens[: len(images), 1:]
            logits = net.text_decoder(seen, told).float().movedim(-1, 1)  # [B, vocabulary, C - 1]
            each = F.cross_entropy(logits, labels, ignore_index=net.pad_id, reduction="sum")
            more = [each, (labels != net.pad_id).sum().float()]
        else:
            image_features = data.encode_image(net, images)
            text_features = data.encode_text(net, texts)
        units = [F.normalize(x.float(), dim=-1) for x in (image_features, text_features)]
        return (*units, net.logit_scale.exp(), *more)


class LoRA(nn.Module):
    """W + up · down, of low rank, in place of a frozen W (arXiv 2106.09685; alpha = r)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        """Start with a zero update of a weight [out, in]."""
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight [out, in]."""
        return weight + self.up @ self.down


def plain_weights(net: nn.Module) -> dict[str, Tensor]:
    """The state_dict in open_clip's layout, with LoRA's updates merged into the weights."""
    state = {}
    for key, value in net.state_dict().items():
        module, _, name = key.partition(".parametrizations.")
        if not name:
            state[key] = value
        elif name.endswith(".original"):
            name = name.removesuffix(".original")
            state[f"{module}.{name}"] = getattr(net.get_submodule(module), name).detach()
    return state


@functools.cache
def read_loss(spec: str) -> Any:
    """The class that --loss FILE.py:CLASS names."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise DataError(f"--loss {spec}: must be FILE.py:CLASS, as my_loss.py:MyLoss")
    fingerprint(path)  # it can be read
    with loss_faults(spec):
        made = evaluate.run_file(path).get(name)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise DataError(f"--loss {spec}: {path} has no class {name} of torch.nn.Module")
    return made


def loss_faults(spec: str | None) -> contextlib.AbstractContextManager[None]:
    """What the code of --loss raises, as one sentence with its line."""
    return evaluate.own_faults(f"--loss {spec}") if spec else contextlib.nullcontext()


LOSS_OPTIONS = (
    *("recipe", "imc", "imc_weight", "cmr_weight", "threshold", "cap", "fixed_threshold"),
    *("own_weight", "focal_gamma", "label_smoothing"),
)


def make_loss(args: argparse.Namespace, types: Sequence[str] = NEGATIVE_TYPES) -> Any:
    """CEClipLoss, or the class of --loss, with the options that were given, for K types.

    The constructor of CLASS gets the options as keywords, and `types` if it has that keyword. A
    class may set needs_negatives (else True), needs_positives and reset_each_epoch (else False).
    """
    given = {key: getattr(args, key) for key in LOSS_OPTIONS if getattr(args, key) is not None}
    if args.loss is None:
        try:
            return CEClipLoss(**given, types=types)
        except ValueError as error:
            told = f"--recipe {given.get('recipe', 'ce-clip')} with these options"
            raise DataError(f"{told}: {error}") from None
    made = read_loss(args.loss)
    if issubclass(made, CEClipLoss) or "types" in inspect.signature(made).parameters:
        given["types"] = types
    with loss_faults(args.loss):
        loss = made(**given)
    if next(loss.parameters(), None) is not None:
        raise DataError(f"--loss {args.loss}: has parameters, which are not trained; use buffers")
    standard = {"needs_negatives": True, "needs_positives": False, "reset_each_epoch": False}
    for name, value in {**standard, "options": {}, "types": tuple(types)}.items():
        setattr(loss, name, getattr(loss, name, value))
    return loss


class Run(NamedTuple):
    """A run: its options and rank, and the objects that change during training."""

    args: argparse.Namespace
    rank: Rank
    model: Model
    net: Any  # the model's module
    towers: Any  # Towers, or DistributedDataParallel of it
    teacher: Towers | None  # EMA of the model, for --distill
    loss: Any  # CEClipLoss, or the one of --loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    limit: Tensor  # largest logit_scale (before exp)


def make_run(
    args: argparse.Namespace, model: Model, rank: Rank, types: Sequence[str] = NEGATIVE_TYPES
) -> Run:
    """The towers, the loss of K types, AdamW and the scaler that only fp16 needs."""
    loss, net = make_loss(args, types).to(rank.device), model.net
    captioned = bool(args.caption_weight)
    if captioned and not hasattr(net, "text_decoder"):
        raise DataError(f"--caption-weight: {args.model} has no caption decoder, as CoCa has")
    if hasattr(net, "text_decoder"):
        net.text_decoder.requires_grad_(captioned)
    if args.grad_checkpointing:
        net.set_grad_checkpointing()
    if args.tune == "text":
        net.visual.requires_grad_(False)
    if args.lora:  # a low-rank update for each linear layer and attention
        net.requires_grad_(False)
    for module in list(net.modules()) if args.lora else ():
        name = "weight" if isinstance(module, nn.Linear) else "in_proj_weight"
        weight = getattr(module, name, None)
        if isinstance(module, nn.Linear | nn.MultiheadAttention) and weight is not None:
            if args.lora > min(weight.shape):
                size = " x ".join(map(str, weight.shape))
                raise DataError(f"--lora {args.lora}: the model has a {size} weight; lower --lora")
            parametrize.register_parametrization(module, name, LoRA(weight, args.lora))
    teacher = Towers(copy.deepcopy(net)).requires_grad_(False) if args.distill else None
    towers: nn.Module = Towers(net, captioned)
    if args.compile:
        towers = torch.compile(towers, dynamic=True)  # type: ignore[assignment]
    if rank.world > 1:
        ids = [rank.device.index] if rank.device.type == "cuda" else None
        towers = DistributedDataParallel(towers, device_ids=ids)
    # No decay on norms, biases and logit_scale, as CLIP was trained.
    params = [p for p in net.parameters() if p.requires_grad]
    matrices, rest = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    groups: Any = [{"params": matrices, "weight_decay": args.weight_decay}]
    groups += [{"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(rank.device.type, enabled=args.precision == "fp16")
    # CLIP's limit of 100, unless the initial weights exceed it; SigLIP has no limit.
    limit = net.logit_scale.detach().clone().clamp(min=math.log(100))
    if getattr(net, "logit_bias", None) is not None:
        limit.fill_(torch.inf)
    return Run(args, rank, model, net, towers, teacher, loss, optimizer, scaler, limit)


# The step


def encode(towers: nn.Module, part: Batch, args: argparse.Namespace) -> list[Tensor]:
    """Run both towers on a part of the batch; returns what `Towers` does."""
    device = next(towers.parameters()).device
    dtype = evaluate.PRECISIONS[args.precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return list(towers(part.images.to(device, non_blocking=True), part.texts.to(device)))


def batch_loss(
    run: Run, parts: list[Batch], features: list[list[Tensor]], taught: list[list[Tensor]]
) -> dict[str, Tensor]:
    """The loss of the whole batch from the outputs of `encode` for its parts; updates thresholds.

    `taught` holds the teacher's outputs for the parts, and is empty without a teacher.
    """
    args = run.args
    split = [data.split_features(f[1], part) for f, part in zip(features, parts, strict=True)]
    captions, positives, hard = (torch.cat(column) for column in zip(*split, strict=True))
    images = torch.cat([f[0] for f in features])
    scale, *bias = features[-1][2 : 3 if args.caption_weight else None]
    valid = torch.cat([part.valid for part in parts]).to(images.device)
    positive_valid = torch.cat([part.positive_valid for part in parts]).to(images.device)
    with loss_faults(args.loss):
        out = run.loss(images, captions, scale, hard, valid, positives, positive_valid, *bias)
        if args.loss and not (isinstance(out, dict) and getattr(out.get("loss"), "grad_fn", None)):
            raise TypeError("forward must return a dict with a differentiable 'loss' and its parts")
        for name in out if args.loss else ():
            if torch.as_tensor(out[name]).numel() != 1:
                raise TypeError(f"its part {name!r} must be a scalar")
            if name in ("step", "epoch", "lr", "grad_norm", "applied", "logit_scale"):
                raise ValueError(f"its part {name!r} must have another name, metrics has this one")
    if args.caption_weight:
        words = torch.stack([f[3] for f in features]).sum() / sum(f[4].detach() for f in features)
        out = {**out, "loss": out["loss"] + args.caption_weight * words, "caption": words.detach()}
    if taught:
        pairs = zip(features, taught, strict=True)
        away = [(mine[i] - old[i]).square().sum() for mine, old in pairs for i in (0, 1)]
        drift = torch.stack(away).sum() / len(images)
        out = {**out, "loss": out["loss"] + args.distill * drift, "distill": drift.detach()}
    return out


def gradients(run: Run, parts: list[Batch]) -> dict[str, Tensor]:
    """Accumulate the gradients of the whole batch into `.grad`; returns the loss's parts.

    With several parts, gradients are cached (Gao et al., arXiv 2101.06983): compute all features
    without a graph, then the loss once, then for each part run the towers again and backpropagate
    the loss's gradient by its features. This is exact, and only one part's graph is in memory.
    """
    args, taught = run.args, []
    if run.teacher is not None:
        with torch.no_grad():
            taught = [encode(run.teacher, part, args) for part in parts]
    if len(parts) == 1:
        out = batch_loss(run, parts, [encode(run.towers, parts[0], args)], taught)
        run.scaler.scale(out["loss"]).backward()
        return out
    cuda = [run.rank.device] if run.rank.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.no_grad():  # dropout repeats below
        first = [encode(run.towers, part, args) for part in parts]
    leaves = [[x.detach().requires_grad_() for x in features] for features in first]
    out = batch_loss(run, parts, leaves, taught)
    run.scaler.scale(out["loss"]).backward()
    for part, cached in zip(parts, leaves, strict=True):
        hold = part is not parts[-1] and hasattr(run.towers, "no_sync")
        with run.towers.no_sync() if hold else contextlib.nullcontext():
            pairs = zip(encode(run.towers, part, args), cached, strict=True)
            wanted = [(x, c.grad) for x, c in pairs if x.requires_grad and c.grad is not None]
            torch.autograd.backward([x for x, _ in wanted], [grad for _, grad in wanted])
    return out


def train_step(run: Run, parts: list[Batch], lr: float) -> dict[str, float]:
    """One step; leaves weights and thresholds unchanged if loss or gradient is not finite.

    Returns:
        the loss's parts, `grad_norm`, and `applied`: 1 if the weights were changed.
    """
    args, before = run.args, [(x, x.clone()) for x in run.loss.buffers()]
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    out = gradients(run, parts)
    run.scaler.unscale_(run.optimizer)
    tuned = [p for p in run.net.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in tuned])
    finite = bool(torch.isfinite(out["loss"].detach()) & torch.isfinite(norm))
    if finite:
        if args.grad_clip:
            nn.utils.clip_grads_with_norm_(tuned, args.grad_clip, norm)
        run.scaler.step(run.optimizer)
    with torch.no_grad():
        if finite:
            run.net.logit_scale.copy_(run.net.logit_scale.minimum(run.limit))
        if finite and run.teacher is not None:  # EMA update, as in DeGLA (arXiv 2504.16801)
            pairs = zip(run.teacher.parameters(), run.net.parameters(), strict=True)
            for old, new in pairs:
                old.lerp_(new, 1 - args.ema)
        for buffer, kept in before if not finite else ():
            buffer.copy_(kept)
    run.scaler.update()
    values = {key: float(torch.as_tensor(value).detach()) for key, value in out.items()}
    return {**values, "grad_norm": float(norm), "applied": float(finite)}


# Checkpoints and resuming


def checkpoint(run: Run, step: int, readers: Any = None) -> dict[str, Any]:
    """Everything that a resumed run needs; the weights in open_clip's layout."""
    train: dict[str, Any] = {"step": step, "limit": run.limit, "readers": readers or {}}
    for name in ("optimizer", "scaler", "loss"):
        train[name] = getattr(run, name).state_dict()
    if run.args.lora:
        train["net"] = run.net.state_dict()
    if run.teacher is not None:
        train["teacher"] = run.teacher.net.state_dict()
    return {"state_dict": plain_weights(run.net), "kit": kit(run, step), "train": train}


def kit(run: Run, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint."""
    own = {"recipe": run.args.loss or run.args.recipe, "types": run.loss.types, "step": step}
    return {**run.model.about, **own, **versions()}


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: the previous one stays until this one is on disk."""
    try:
        with negatives.writing(path, overwrite=True) as file:
            torch.save(content, file)
    except (DataError, RuntimeError) as error:
        told = f"{path}: cannot be written ({why(error)})" if error.__context__ else str(error)
        raise DataError(f"{told}; the last checkpoint stays") from None


def save_step(run: Run, step: int, readers: Any) -> DataError | None:
    """Save the run on rank 0, and its weights at the end of an epoch; returns an error, or None."""
    if run.rank.world > 1 and reads_shards(run.args):  # positions of the readers of all ranks
        found: list[Any] = [None] * run.rank.world
        dist.all_gather_object(found, readers)
        for others in found:
            readers.update(others)
    if run.rank.number:
        return None
    if not all(bool(torch.isfinite(p).all()) for p in run.net.parameters()):
        return DataError(f"weights are not finite after step {step}, and not saved; lower --lr")
    content = checkpoint(run, step, readers)
    try:
        save(content, run.args.out / "latest.pt")
        if path := epoch_path(run.args, step):
            save({key: content[key] for key in ("state_dict", "kit")}, path)
    except DataError as error:
        return error
    return None


def epoch_path(args: argparse.Namespace, step: int) -> Path | None:
    """File for the weights if this step ends an epoch or the run, else None."""
    if step % args.steps_per_epoch and step != args.steps:
        return None
    return args.out / f"epoch_{math.ceil(step / args.steps_per_epoch):02d}.pt"


def resume(run: Run, path: Path) -> tuple[int, dict[int, Any]]:
    """Load latest.pt into the run; returns the next step, and the states of shard readers."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        train, types = content["train"], content["kit"].get("types", NEGATIVE_TYPES)
        step = train["step"]
        if type(step) is not int or not 0 < step <= run.args.steps:
            raise ValueError(f"its step is {step!r}, of {run.args.steps}")
        if tuple(types) != tuple(run.loss.types):
            raise ValueError(f"types {', '.join(types)}, now {', '.join(run.loss.types)}")
        run.net.load_state_dict(train.get("net", content["state_dict"]))
        if run.teacher is not None:
            run.teacher.net.load_state_dict(train["teacher"])
        for name in ("optimizer", "scaler", "loss"):
            getattr(run, name).load_state_dict(train[name])
        for p, state in run.optimizer.state.items():  # fused AdamW does not check shapes
            if state.keys() != {"step", "exp_avg", "exp_avg_sq"} or any(
                x.shape != (() if key == "step" else p.shape) or not x.isfinite().all()
                for key, x in state.items()
            ):
                raise ValueError(f"its optimizer does not fit a weight of {list(p.shape)}")
        run.limit.copy_(train["limit"])
        return step, dict(train["readers"])
    except Exception as error:  # torch raises many kinds here
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{path}: cannot be resumed from ({reason}); use another --out") from None


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
    packages = ("torch", "torchvision", "open_clip")
    found = {name: str(importlib.import_module(name).__version__) for name in packages}
    return {"python": platform.python_version(), **found}


def run_record(args: argparse.Namespace, rank: Rank) -> dict[str, Any]:
    """The content of args.json: options, fingerprints of the files that they name, versions."""
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    files = [] if reads_shards(args) else [path for path, _ in manifest_weights(args)]
    return {
        "options": json.loads(json.dumps(vars(args), default=str)),
        "data": [fingerprint(path) for path in files],
        "loss": args.loss and fingerprint(args.loss.rpartition(":")[0]),
        "world_size": rank.world,
        "versions": versions(),
        "git_commit": commit,
    }


def check_run(out: Path, record: dict[str, Any]) -> None:
    """Refuse a directory that is not a run, or a run with other options or other files."""
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
        files = [*zip(before["data"] or [], seen, record["data"], strict=False)]
        files.append((before.get("loss"), kept.get("loss"), record["loss"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        # A run interrupted while writing its first file leaves nothing, or args.json.partial.
        with contextlib.suppress(OSError):
            if all(path.suffix in (".partial", ".lock") for path in out.iterdir()):
                return
        told = "its args.json is damaged" if os.path.lexists(out / "args.json") else "is not a run"
        raise DataError(f"--out {out}: exists, but {told}; choose another --out") from None
    if not any(out.glob("*.pt")):  # nothing saved: it starts again, with other options too
        return
    if changed:
        raise DataError(
            f"--out {out}: holds a run with other options ({'; '.join(changed)}); "
            "give them back to resume it, or choose another --out"
        )
    for path, old, new in files:
        if old != new:
            raise DataError(
                f"{path}: changed since the run in {out} began ({old}, now {new}); put the old "
                "file back to resume it, or choose another --out"
            )


def start_run(out: Path, record: dict[str, Any], start: int, held: list[Any]) -> None:
    """Make the run directory and args.json if missing; drop metrics after step `start`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not held:
            held.append(negatives.lock(out))
            if os.path.lexists(out / "latest.pt"):
                raise DataError(f"--out {out}: another run has just trained into it; start again")
        if not any(out.glob("*.pt")):
            evaluate.write_text(out / "args.json", json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({why(error)}); check it") from None
    for name in ("metrics.jsonl", "val.jsonl"):
        trim_metrics(out / name, start)


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines after the last checkpoint of an interrupted run; it writes them again."""
    if not os.path.lexists(path):
        return
    kept = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except (ValueError, LookupError, TypeError, RecursionError):
                if number < len(lines):  # the last line may be incomplete
                    told = "is not a line of metrics; correct it, or move the file away"
                    raise DataError(f"{path}:{number}: {told}") from None
        evaluate.write_text(path, "".join(kept))
    except OSError as error:
        raise DataError(f"{path}: cannot be rewritten ({why(error)}); check it") from None


# Validation and metrics


class Validation:
    """Scores the run's weights on --val, logs to val.jsonl, and saves the best as best.pt.

    All ranks call it; each encodes its share. With --distill the teacher (EMA) is scored too.
    """

    def __init__(self, run: Run) -> None:
        """Read --val: a suite below --val-root (complete or not), or a manifest.

        A manifest's captions are compared with each of their negatives, and used for retrieval
        over all its images. A resumed run reads the best score so far from val.jsonl.
        """
        args, self.run, self.best = run.args, run, -math.inf
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
                told = "holds a line without the best score; correct it, or move the file away"
                raise DataError(f"{self.path}: {told}") from None

    def _manifest(self, path: Path, root: Path) -> Suite:
        items: list[evaluate.TestItem] = []
        captions: dict[str, list[str]] = {}
        for _, record in negatives.read_records(path, need_image=True):
            image = str(root / str(record.image))
            captions.setdefault(image, []).append(record.caption)
            for kind, given in record.negatives.items():
                for text in [given] if isinstance(given, str) else given or []:
                    number, texts = str(len(items)), (record.caption, text)
                    items.append(evaluate.TestItem((kind,), number, (image,), texts))
        lost = [image for image in captions if not Path(image).is_file()]
        if lost or not captions:
            what = f"{len(lost)} images are missing, the first is {lost[0]}" if lost else ""
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
                raise DataError(f"--best {self.metric}: is not one of {', '.join(figures)}")
            value = figures[self.metric]
            better, self.best = value > self.best, max(self.best, value)
            if run.rank.number == 0:
                if better:
                    about = {**kit(run, done), "val": args.val, "metric": self.metric}
                    about |= {"value": value, "weights": weights}
                    save({"state_dict": plain_weights(net), "kit": about}, args.out / "best.pt")
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
    """A function that sends a step's metrics to --log; it does nothing without --log."""
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
        raise DataError(f"--log {args.log}: is not installed; pip install {args.log}") from None


class Log:
    """Counts images, tokens and skipped steps, and writes lines of metrics.jsonl."""

    def __init__(self, run: Run, start: int) -> None:
        """Start counting at step `start`."""
        self.run, self.start = run, start
        self.mirror = open_mirror(run.args, start) if run.rank.number == 0 else None
        self.images = self.tokens = self.faults = self.same = 0
        self.skipped = self.bad = 0  # consecutive steps not applied; not due to fp16's loss scale
        self.began = self.mark = time.perf_counter()

    def add(
        self, parts: list[Batch], step: int, out: dict[str, float], searching: bool
    ) -> DataError | None:
        """Count a step; write a line if due, or if the step was lost; returns an error or None."""
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


# The loop

MAX_BAD_STEPS = 3
FAULT = 255  # a rank cannot continue; larger than every signal's number


class Stopped(BaseException):
    """A signal arrived while waiting for data."""


class Stop:
    """Records a SIGTERM, SIGINT or SIGUSR1 until the step is done; a second one exits at once.

    A signal during the wait for data ends the wait. A thread watches for the second signal, because
    no Python handler runs while the process waits for other ranks in C++.
    """

    def __enter__(self) -> Stop:
        """Catch the signals from now on."""
        self.signal, self.waiting = 0, False
        self.before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        ours, self.pipe = socket.socketpair()
        self.pipe.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.pipe.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the signal handlers; end loading processes, which may wait forever."""
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
        # timeout(1) and torchrun forward a signal that the process group has received already:
        # copies of the first signal within `patience` seconds are not a second one.
        patience, first = 3.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.5, 0.0
        while number := pipe.recv(1):
            if number[0] in SIGNALS:
                first = first or time.monotonic()
                if time.monotonic() - first > patience:
                    end_workers()
                    os._exit(130 if number[0] == signal.SIGINT else 143)
        pipe.close()

    def wait(self, loader: Iterator[list[Batch]]) -> tuple[list[Batch], DataError | None]:
        """The next batch and no error, or no batch and the error (None after a signal)."""
        self.waiting = True
        try:
            if not self.signal:
                return next(loader), None
        except Stopped:
            pass
        except Exception as error:  # torch re-raises a worker's error as any type
            if not self.signal:
                return [], loader_fault(error)
        finally:
            self.waiting = False
        return [], None

    def agreed(self, rank: Rank, fault: DataError | None) -> int:
        """FAULT, the signal or 0: the maximum over ranks, so that all stop together."""
        code = self.signal if fault is None else FAULT
        if rank.world == 1:
            return code
        flag = torch.tensor([code], device=rank.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def end_workers() -> None:
    """Kill the data loading processes."""
    for child in multiprocessing.active_children():
        child.kill()


def train(
    run: Run,
    loader: Iterator[list[Batch]],
    start: int,
    stop: Stop,
    readers: dict[int, Any],
    after: Callable[[int], None],
) -> int:
    """Train from step `start` to the end, logging and saving; returns the exit code.

    `after` is called after each step with the number of steps done.
    """
    args, rank, log = run.args, run.rank, Log(run, start)
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
        # Each step seeds its own generator, so checkpoints need no random state.
        seed = hash((args.seed, step, rank.number)) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also notes a stack trace
        if rank.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        # Linear warm-up, then half a cosine to 0.
        past = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
        lr = args.lr * 0.5 * (1 + math.cos(math.pi * past))
        lr = args.lr * (step + 1) / args.warmup if step < args.warmup else lr
        scale = run.scaler.get_scale()
        out = train_step(run, parts, lr)
        done = step + 1
        # GradScaler lowers its scale on overflow; that is an error only once the scale is 1.
        searching = run.scaler.is_enabled() and math.isfinite(out["loss"]) and scale > 1
        readers.update([parts[-1].state] if parts[-1].state else [])
        unsaved = log.add(parts, step, {**out, "lr": lr}, searching)
        if log.bad == MAX_BAD_STEPS or (done == args.steps and log.skipped >= MAX_BAD_STEPS):
            kept = f"; {args.out}/latest.pt is the last good checkpoint" if saved else ""
            raise DataError(
                f"loss or gradient was not finite {log.skipped} steps in a row (step {done}), none "
                f"was applied; lower --lr{kept}"
            )
        if epoch_path(args, done) or (not log.skipped and done % args.save_every == 0):
            unsaved, saved = save_step(run, done, readers) or unsaved, done
        after(done)
    code = code or stop.agreed(rank, unsaved)
    if code and not log.skipped and saved < done:
        unsaved = unsaved or save_step(run, done, readers)
    for error in filter(None, (fault, unsaved)):
        print(f"train.py: error: {error}", file=sys.stderr)
    if rank.number == 0 and code and (code != FAULT or done):
        print(f"stopped at step {done}; repeat the command to resume", flush=True)
    elif rank.number == 0 and log.skipped:
        print(f"the last {log.skipped} steps were not finite, and not applied", flush=True)
    return 2 if code == FAULT or unsaved else 128 + code if code else 0


def dry_run(run: Run, source: Any) -> None:
    """Do one step, print what a run would do, write nothing."""
    args = run.args
    try:
        parts = next(make_loader(run, source, 0))
    except Exception as error:
        raise loader_fault(error) from None
    finally:
        end_workers()  # they ignore SIGTERM, and Python would wait for them at exit
    out = train_step(run, parts, 0.0)
    count = sum(p.numel() for p in run.net.parameters())
    name, recipe = args.model or args.pretrained, args.loss or args.recipe
    print(f"{name}: {count / 1e6:.1f} million parameters, recipe {recipe}")
    size = "shards"
    if not reads_shards(args):
        size = f"{len(source)} captions, {args.steps_per_epoch} an epoch"
    print(f"{args.steps} steps of {args.batch_size}; {size}")
    print(f"first batch: {', '.join(f'{key} {value:.3f}' for key, value in out.items())}")
    print("dry run: nothing was written")


# Main


def prepare(
    args: argparse.Namespace, rank: Rank, held: list[Any]
) -> tuple[dict[str, Any], Model, bool]:
    """Check options, lock the run directory if it exists, and load the model.

    Returns the content of args.json, the model, and whether the run starts from step 0.
    """
    check_args(args, rank)
    record = run_record(args, rank)
    check_run(args.out, record)
    if os.path.lexists(args.out) and not args.dry_run and rank.number == 0:
        held.append(negatives.lock(args.out))
    fresh = not os.path.lexists(args.out / "latest.pt")
    torch.manual_seed(args.seed)
    start = (args.model or None, args.pretrained) if fresh else (None, str(args.out / "latest.pt"))
    model = evaluate.load_model(*start, device=str(rank.device))
    if not hasattr(model.net, "logit_scale"):
        raise DataError(
            f"--pretrained {args.pretrained}: is a model of transformers, which evaluate.py scores "
            "but train.py does not train; take it in open_clip's layout"
        )
    if args.micro_batch and any(isinstance(m, nn.BatchNorm2d) for m in model.net.modules()):
        name = model.about["model"]
        raise DataError(f"--micro-batch: {name} has batch norm, whose statistics would be a part's")
    return record, model, fresh


def same_start(out: Path, rank: Rank, start: int, record: dict[str, Any]) -> None:
    """Refuse ranks that would resume from different steps, or with different options or files."""
    options = {key: value for key, value in record["options"].items() if key not in FREE}
    mine = (start, options, record["data"], record["loss"])
    every: list[Any] = [mine] * rank.world
    if rank.world > 1:
        dist.all_gather_object(every, mine)
    for number, other in enumerate(every):
        if other[0] != start:
            raise DataError(
                f"--out {out}: rank {rank.number} resumes from step {start}, rank {number} from "
                f"step {other[0]}; --out must be one folder on a disk that all ranks share"
            )
        if other != mine:
            told = "other options or another --data or --loss file"
            raise DataError(f"rank {number} has {told}; give all ranks the same")


def main(argv: list[str] | None = None) -> int:
    """Build everything, resume an interrupted run, train; returns the exit code."""
    args = parse_args(argv)
    rank = evaluate.start_process(args.device)
    held: list[Any] = []  # keeps the lock until this function ends
    record, model, fresh = evaluate.together(lambda: prepare(args, rank, held))
    loss, shards = make_loss(args), reads_shards(args)
    source: Any = evaluate.together(lambda: make_source(args, model, loss, rank))
    run = make_run(args, model, rank, source.types)
    args.steps_per_epoch = args.steps if shards else source.steps[0]
    args.steps = args.steps or args.epochs * args.steps_per_epoch
    args.val_every = args.val_every or args.steps_per_epoch
    if args.dry_run:
        dry_run(run, source)
        return 0
    latest = args.out / "latest.pt"
    start, readers = evaluate.together(lambda: (0, {}) if fresh else resume(run, latest))
    same_start(args.out, rank, start, record)
    if rank.number == 0:
        start_run(args.out, record, start, held)
        if start and (path := epoch_path(args, start)) and not path.exists():
            content = checkpoint(run, start)  # the run was interrupted between the two files
            save({key: content[key] for key in ("state_dict", "kit")}, path)
        if start >= args.steps:
            print(f"{args.out} is done: {start} steps; nothing to do")
    if start >= args.steps:
        return 0
    if rank.number == 0:
        count = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
        what = f"{count / 1e6:.2f} million weights to train, {model.about['activation']}"
        where = f"{args.steps} steps of {args.batch_size} on {rank.world} x {rank.device.type}"
        layout, recipe = data.text_layout(model.net), args.loss or args.recipe
        print(f"{model.about['model']} ({what}), recipe {recipe}, {where}", end=", captions ")
        print(f"{layout}, from step {start}", flush=True)
    after = Validation(run) if args.val else lambda done: None
    if not start:
        after(0)
    with Stop() as stop:
        loader = make_loader(run, source, start, readers)
        code = train(run, loader, start, stop, readers, after)
    if rank.number == 0 and code == 0:
        print(f"done: {latest}")
    return code


def run_main() -> int:
    """Run main; report if another rank has exited."""
    try:
        return main()
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search("Connection|timed out", str(error)):
            raise
        print(f"train.py: error: another rank has exited ({why(error)})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = negatives.run_script(
        run_main, "train.py", quiet=lambda: dist.is_initialized() and dist.get_rank() > 0
    )
    gc.collect()  # free DistributedDataParallel before its group, or its threads abort
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)

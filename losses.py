# SPDX-License-Identifier: MIT
"""The losses of CE-CLIP, exact, fused and distributed; copy this file into any code base.

Zhang, Awal and Agrawal, "Contrasting Intra-Modal and Ranking Cross-Modal Hard Negatives to Enhance
Visio-Linguistic Compositional Understanding", CVPR 2024, section 3.

  B  images I and captions T of the global batch; b of them are on this rank
  K  hard negatives N_1 ... N_K of each caption; `valid` tells which exist
  D  width of the features, which are unit vectors
  S  similarities are logits, S(x, y) = logit_scale <x, y>

  L = itc + 0.2 imc + 0.4 cmr

  itc  image-text contrast; the hard negatives of the whole batch stand in the images' denominator
  imc  intra-modal contrast: a caption is nearer to its positive than to its negatives
  cmr  cross-modal rank: a caption beats its negative k by a margin theta_k, which grows as the
       model learns (the curriculum)

  loss = CEClipLoss("ce-clip")
  out = loss(image_features, text_features, logit_scale.exp(), negative_features, valid,
             positive_features)  # another caption of each image; without one: imc="repulsion"
  out["loss"].backward()
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# fmt: off
__all__ = [
    "NEGATIVE_TYPES", "RECIPES", "CEClipLoss", "RankThreshold", "ce_clip_loss",
    "ce_clip_loss_and_grads", "gather_rows", "intra_modal_loss", "own_negatives_loss", "rank_loss",
]
# fmt: on

NEGATIVE_TYPES = ("relation", "attribute", "object", "action")
IMC_VARIANTS = ("none", "paired", "paper", "repulsion", "released")
THRESHOLDS = ("adaptive", "fixed", "max", "released")
WORDS = {"imc": IMC_VARIANTS, "imc_scope": ("own", "batch"), "cmr_mean": ("valid", "all")}
WORDS["backend"] = ("auto", "plain", "torch", "triton")
WORDS["operands"] = ("auto", "float32", "bfloat16")
SMALL = 2**19  # logits, up to which plain autograd is as fast as the fused core

# What a recipe switches on; what it does not name has the default of Options or RankThreshold.
RECIPES: dict[str, dict[str, Any]] = {
    "clip": {"negatives_in_itc": False, "imc": "none", "cmr_weight": 0.0},
    "negclip": {"imc": "none", "cmr_weight": 0.0},
    "ce-clip": {},
    # The published run: missing negatives stay in both softmaxes, imc pulls every caption to one
    # arbitrary text, cmr is divided by all slots, theta restarts from 0 with each epoch.
    "released": {
        **{"imc": "released", "threshold": "released", "mask_invalid": False},
        **{"cmr_mean": "all", "reset_each_epoch": True},
    },
}


class Options(NamedTuple):
    """What the loss is made of; every keyword of `ce_clip_loss`."""

    negatives_in_itc: bool = True  # hard negatives in the images' denominator
    imc: str = "paired"  # variant of `intra_modal_loss`, or "none"
    imc_scope: str = "own"  # its denominator: "own" negatives, or those of the whole "batch"
    imc_weight: float = 0.2
    imc_offset: float = 0.0  # the constant of "repulsion", a cosine
    cmr_weight: float = 0.4
    cmr_mean: str = "valid"  # over the negatives that exist, or over "all" slots, as released
    own_weight: float = 0.0  # of `own_negatives_loss`
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    mask_invalid: bool = True  # False: missing negatives stay in the softmaxes, as released
    backend: str = "auto"  # "plain" is the oracle; "torch" and "triton" are the fused paths
    workspace_mib: float = 0.0  # memory of the fused paths; 0 means 32 on CPU and 512 on CUDA
    operands: str = "auto"  # of matrix products: "bfloat16" on CUDA where features or autocast are
    # half precision (fp16 overflows), else "float32"; sums are float32, of float64 float64
    check: bool = False  # also look at values: unit length, finite, forgotten masks


class Inputs(NamedTuple):
    """The tensors of this rank; K is 0 where there are no negatives."""

    images: Tensor  # [b, D]
    texts: Tensor  # [b, D]
    negatives: Tensor  # [b, K, D], 0 where they do not count
    positives: Tensor | None  # [b, D]
    valid: Tensor  # [b, K] bool, which negatives exist
    counted: Tensor  # [b, K] bool, which stand in the softmaxes: `valid`, or all
    positive_valid: Tensor  # [b] bool
    scale: Tensor  # scalar
    bias: Tensor | None  # scalar, of SigLIP
    thresholds: Tensor  # [K]


# The terms, plainly: what the fused core must equal


def rank_loss(
    image_text: Tensor,
    image_negative: Tensor,
    thresholds: Tensor,
    valid: Tensor,
    *,
    mean: str = "valid",
) -> Tensor:
    """Cross-modal rank loss (section 3.3): mean of relu(theta_k + S(I, N_k) - S(I, T)).

    Args:
        image_text: logits of the true pairs S(I, T) [B].
        image_negative: logits S(I, N_k) of each image and its own negatives [B, K].
        thresholds: theta, in logits [K].
        valid: which negatives exist [B, K] bool.
        mean: over the "valid" entries, or over "all" K·B slots as in the released code.

    Returns:
        A scalar in logits; 0 where nothing is valid.
    """
    excess = F.relu(thresholds + image_negative - image_text[:, None])
    count = valid.sum() if mean == "valid" else valid.numel()
    return excess.masked_fill(~valid, 0).sum() / torch.as_tensor(count).clamp(min=1)


def intra_modal_loss(
    numerator: Tensor, text_negative: Tensor, valid: Tensor, counts: Tensor | None = None
) -> Tensor:
    """Intra-modal contrast (section 3.2, equation 3): mean of -log(e^n / (e^n + sum e^S(T, N))).

    What the numerator n is makes the variant: "paired" S(T, T+), T+ another caption of the image;
    "paper" S(I, T), our best guess of equation 3; "repulsion" a constant, which only pushes. In
    "released" n is S(T, first negative of the batch), and stands in the sum already.

    Args:
        numerator: logits n [B].
        text_negative: logits S(T, N) with the own negatives [B, K], or those of the batch [B, BK].
        valid: which of these stand in the denominator, bool of the same shape.
        counts: which items count [B] bool; None means all.

    Returns:
        A scalar in nats; 0 where no item counts.
    """
    logits = text_negative.masked_fill(~valid, -torch.inf)
    first = torch.zeros(len(numerator), dtype=torch.long, device=numerator.device)
    logits = torch.cat([numerator[:, None], logits], dim=1)
    if counts is None:
        return F.cross_entropy(logits, first)
    each = F.cross_entropy(logits, first, reduction="none")
    return each.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)


def own_negatives_loss(
    image_text: Tensor,
    image_negative: Tensor,
    valid: Tensor,
    *,
    focal_gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax of each image over its caption and its own negatives, -sum_c y_c (1-p_c)^g log p_c.

    With gamma 0 and no smoothing it is DeGLA's image-grounded contrast (arXiv 2504.16801); with 2
    and 0.02 the global hard-negative loss of FSC-CLIP (arXiv 2410.05210), which spares what is
    already told apart.

    Args:
        image_text: logits of the true pairs S(I, T) [B].
        image_negative: logits S(I, N_k) of each image and its own negatives [B, K].
        valid: which negatives exist [B, K] bool.
        focal_gamma: g, how much less a class counts that is already likely; 0, or 1 and more.
        label_smoothing: what the true caption gives up, shared by all classes that exist.

    Returns:
        A scalar in nats, the mean over items with a negative; 0 where none has.
    """
    log_p, target, exists = _own_softmax(image_text, image_negative, valid, label_smoothing)
    each = -(target * (1 - log_p.exp()) ** focal_gamma * log_p).masked_fill(~exists, 0).sum(dim=1)
    has = valid.any(dim=1)
    return each.masked_fill(~has, 0).sum() / has.sum().clamp(min=1)


def _own_softmax(
    image_text: Tensor, image_negative: Tensor, valid: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, smoothed targets and which classes exist, all [B, 1 + K]."""
    exists = F.pad(valid, (1, 0), value=True)
    logits = torch.cat([image_text[:, None], image_negative], dim=1)
    log_p = logits.masked_fill(~exists, torch.finfo(logits.dtype).min / 2).log_softmax(dim=1)
    target = exists * (smoothing / exists.sum(dim=1, keepdim=True).to(log_p.dtype))
    target = torch.cat([target[:, :1] + 1 - smoothing, target[:, 1:]], dim=1)
    return log_p, target, exists


def _plain(x: Inputs, o: Options, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """The loss of the global batch, every tensor gathered; its terms; this rank's own logits."""
    here = slice(_world(group)[0] * len(x.images), (_world(group)[0] + 1) * len(x.images))
    x = Inputs(*[t if t is None else gather_rows(t, group) for t in x[:7]], *x[7:])  # type: ignore
    everyones, b = x.negatives.flatten(0, 1), len(x.images)  # [BK, D]
    logits = x.scale * x.images @ torch.cat([x.texts, everyones]).T  # [B, B + BK]
    missing = ~x.counted.flatten() if o.mask_invalid else None
    if missing is not None:
        logits = logits.masked_fill(F.pad(missing, (b, 0)), -torch.inf)
    pairs, true = logits[:, :b], logits[:, :b].diagonal()
    own = logits[:, b:].view(b, b, -1).diagonal().T  # [B, K]
    own = own if missing is None else own.masked_fill(~x.counted, 0)
    to_text = logits if o.negatives_in_itc else pairs
    if x.bias is None:
        partner = torch.arange(b, device=pairs.device)
        itc = (F.cross_entropy(to_text, partner) + F.cross_entropy(pairs.T, partner)) / 2
    else:  # SigLIP: each pair, and each image with each negative, is a question of its own
        itc = (-F.logsigmoid(-to_text - x.bias).sum() - (true + x.bias).sum()) / b
    imc = mine = torch.zeros_like(itc)
    if o.imc != "none" and o.imc_weight:
        imc = _plain_imc(x, o, everyones, missing)
    cmr = rank_loss(true, own, x.thresholds, x.valid, mean=o.cmr_mean)
    if o.own_weight:
        softened = {"focal_gamma": o.focal_gamma, "label_smoothing": o.label_smoothing}
        mine = own_negatives_loss(true, own, x.valid, **softened)
    loss = itc + o.imc_weight * imc + o.cmr_weight * cmr + o.own_weight * mine
    return loss, torch.stack([itc, imc, cmr, mine]), true[here], own[here]


def _plain_imc(x: Inputs, o: Options, everyones: Tensor, missing: Tensor | None) -> Tensor:
    numerator, counts = _numerator(x, o, None)
    if not _whole_batch(o):
        own = x.scale * (x.negatives @ x.texts[..., None])[..., 0]  # [B, K]
        return intra_modal_loss(numerator, own, x.counted, counts)
    if not x.counted.any():
        return 0 * x.scale
    batch = x.scale * x.texts @ everyones.T  # [B, BK]
    first = batch[:, 0]  # the target of every caption in "released"
    batch = batch if missing is None else batch.masked_fill(missing, -torch.inf)
    if o.imc == "released":
        return (batch.logsumexp(dim=1) - first).mean()
    return intra_modal_loss(numerator, batch, x.counted.flatten().expand(batch.shape), counts)


def _numerator(x: Inputs, o: Options, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logit n of the intra-modal loss, and which items count, both [b]."""
    everybody = torch.ones_like(x.positive_valid)
    if o.imc == "paired" and x.positives is not None:
        return x.scale * (x.positives * x.texts).sum(dim=1), x.positive_valid
    if o.imc == "paper":
        return x.scale * (x.images * x.texts).sum(dim=1), everybody
    if o.imc == "released" and first is not None:
        return x.scale * x.texts @ first, everybody
    return (x.scale * o.imc_offset).expand(len(x.texts)), everybody


class RankThreshold(nn.Module):
    """The margins theta of the rank loss, one for each type of negative: the curriculum.

    Modes, all clamped to [0, cap] and taken over the whole global batch of the previous step:
        adaptive: mean gap S(I, T) - S(I, N_k) over the valid negatives of type k (equation 6);
        max: the largest of these gaps, divided by 5;
        fixed: `value`, never changed;
        released: as adaptive, but the mean of S(I, T) is over all images of the batch, and that
            of S(I, N_k) over those that are not 0.
    A type without a valid negative keeps its theta, and so does one whose logits are not finite.
    """

    value: Tensor

    def __init__(
        self, k: int, mode: str = "adaptive", cap: float = 10.0, value: float = 0.0
    ) -> None:
        """Start K thresholds at `value` logits; modes other than "fixed" start at 0.

        Raises:
            ValueError: the mode is unknown, or cap is not positive.
        """
        super().__init__()
        _choose("threshold", mode, THRESHOLDS)
        if not cap > 0:
            raise ValueError(f"cap is {cap}; it must be more than 0 logits")
        self.mode, self.cap = mode, cap
        self.start = value if mode == "fixed" else 0.0
        self.register_buffer("value", torch.full((k,), self.start))

    def reset(self) -> None:
        """Start again, as the released code does with each epoch."""
        self.value.fill_(self.start)

    @torch.no_grad()
    def update(
        self,
        image_text: Tensor,
        image_negative: Tensor,
        valid: Tensor,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Set theta for the next step from this step's logits [b], [b, K] and their mask [b, K]."""
        if self.mode == "fixed":
            return
        if self.mode == "released":  # the mean S(I, T) of all images, counted or not
            valid = valid & (image_negative != 0)
            mean = _sum_over_ranks(image_text.mean(), group) / _world(group)[1]
            image_text = mean.expand_as(image_text)
        gap = (image_text[:, None] - image_negative).masked_fill(~valid, 0)
        count, gaps = _sum_over_ranks(torch.stack([valid.sum(dim=0), gap.sum(dim=0)]), group)
        new = gaps / count
        if self.mode == "max":
            new = gap.masked_fill(~valid, -torch.inf).amax(dim=0) / 5
            if _world(group)[1] > 1:
                dist.all_reduce(new, op=dist.ReduceOp.MAX, group=group)
        known = (count > 0) & new.isfinite()  # one bad batch must not stay for ever
        self.value.copy_(torch.where(known, new.clamp(0, self.cap), self.value))


# The loss of a step


def ce_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    negative_features: Tensor | None = None,
    valid: Tensor | None = None,
    positive_features: Tensor | None = None,
    positive_valid: Tensor | None = None,
    logit_bias: Tensor | float | None = None,
    *,
    thresholds: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """L = itc + imc_weight · imc + cmr_weight · cmr + own_weight · own, in float32 (float64 stays).

    In a process group every rank passes its own b rows; after DDP has averaged gradients, they
    equal those of one process that holds the whole batch.  The fused paths make the gradients
    together with the value, so they can be used once: no second backward, no second derivative.

    Args:
        image_features: unit-length images [b, D].
        text_features: unit-length captions [b, D].
        logit_scale: scalar, already exponentiated.
        negative_features: unit-length negatives [b, K, D]; anything, NaN too, where not valid.
        valid: which negatives exist [b, K] bool; None means all.
        positive_features: another caption of each image [b, D], for imc "paired".
        positive_valid: which of those exist [b] bool; None means all.
        logit_bias: scalar; if given, itc is SigLIP's.
        thresholds: theta in logits [K]; None means 0.
        group: the process group, or None for the default one.
        **options: the fields of `Options`.

    Returns:
        Scalars `loss` (with gradient; its value is that of the whole global batch), `itc`, `imc`,
        `cmr` and `own`, and for `RankThreshold.update` the logits `image_text` [b] and
        `image_negative` [b, K], all without gradient.

    Raises:
        ValueError: shapes, dtypes, mask or options do not fit, or ranks hold unequal batches.
    """
    features = (image_features, text_features, negative_features, positive_features)
    scalars = (logit_scale, logit_bias, thresholds)
    return _loss(features, (valid, positive_valid), scalars, _options(options), group)


def _loss(
    features: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    masks: tuple[Tensor | None, Tensor | None],
    scalars: tuple[Tensor | float, Tensor | float | None, Tensor | None],
    o: Options,
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """`ce_clip_loss` with options that were checked."""
    x = _inputs(features, masks, scalars, o)
    o = _backend(o, x, group)
    if o.backend == "plain":
        with torch.autocast(x.images.device.type, enabled=False):
            loss, parts, true, own = _plain(_clean(x, o), o, group)
    else:
        needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in x]
        if torch.compiler.is_compiling():
            alone = _world(group)[1] == 1
            name = "" if alone else (group or dist.group.WORLD).group_name  # type: ignore
            loss, parts, true, own, *_ = _fused_op(*x, [str(value) for value in o], needs, name)
        else:
            loss, parts, true, own, *_ = _Fused.apply(*x, o, needs, group)
    itc, imc, cmr, mine = parts.detach().unbind()
    return {
        **{"loss": loss, "itc": itc, "imc": imc, "cmr": cmr, "own": mine},
        **{"image_text": true.detach(), "image_negative": own.detach()},
    }


def ce_clip_loss_and_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    negative_features: Tensor | None = None,
    valid: Tensor | None = None,
    positive_features: Tensor | None = None,
    positive_valid: Tensor | None = None,
    logit_bias: Tensor | float | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`ce_clip_loss`, and the gradient of its loss by each input: what cached gradients need.

    Returns:
        the loss's dict without gradients, and by name of the input its gradient, of its shape.
    """
    inputs = {
        "image_features": image_features,
        "text_features": text_features,
        "logit_scale": torch.as_tensor(logit_scale) * 1.0,  # an int has no gradient
        "negative_features": negative_features,
        "positive_features": positive_features,
        "logit_bias": None if logit_bias is None else torch.as_tensor(logit_bias) * 1.0,
    }
    leaves: Any = {k: v.detach().requires_grad_() for k, v in inputs.items() if v is not None}
    with torch.enable_grad():
        out = ce_clip_loss(**leaves, valid=valid, positive_valid=positive_valid, **options)
        grads = torch.autograd.grad(out["loss"], list(leaves.values()), materialize_grads=True)
    return {k: v.detach() for k, v in out.items()}, dict(zip(leaves, grads, strict=True))


def _options(given: dict[str, Any]) -> Options:
    unknown = set(given) - set(Options._fields)
    if unknown:
        raise ValueError(f"unknown option {min(unknown)!r}; there are {', '.join(Options._fields)}")
    for name, value in given.items():
        kind = type(Options._field_defaults[name])
        fits = isinstance(value, bool) == (kind is bool) and isinstance(value, kind | int)
        if not fits or (kind is float and not math.isfinite(value)):
            wanted = {bool: "True or False", str: "a word", float: "a finite number"}[kind]
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    cast: dict[str, Any] = {k: float(v) if type(v) is int else v for k, v in given.items()}
    o = Options(**cast)
    for name, words in WORDS.items():
        _choose(name, getattr(o, name), words)
    for name in ("imc_weight", "cmr_weight", "own_weight", "workspace_mib"):
        if getattr(o, name) < 0:
            raise ValueError(f"{name} is {getattr(o, name)}; it must be 0 or more")
    if not 0 <= o.label_smoothing < 1:
        raise ValueError(f"label_smoothing is {o.label_smoothing}; it must be from 0 to below 1")
    if 0 < o.focal_gamma < 1 or o.focal_gamma < 0:
        raise ValueError(f"focal_gamma is {o.focal_gamma}; it must be 0, or 1 or more")
    return o


def _choose(name: str, value: str, wanted: Sequence[str]) -> None:
    if value not in wanted:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(wanted)}")


def _backend(o: Options, x: Inputs, group: dist.ProcessGroup | None) -> Options:
    """Resolve "auto"; said once where a GPU gets less than the kernels."""
    kind, dtype = x.images.device.type, x.images.dtype
    half = dtype in (torch.float16, torch.bfloat16) or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != torch.float32
    )
    operands, backend = o.operands, o.backend
    if operands == "auto":
        operands = "bfloat16" if half and kind == "cuda" else "float32"
    if backend == "auto":
        small = len(x.images) * (len(x.images) + x.valid.numel()) <= SMALL
        small = small and _world(group)[1] == 1 and not torch.compiler.is_compiling()
        if small or kind not in ("cpu", "cuda"):
            backend = "plain"
        elif operands == "bfloat16" and _has_triton(kind):
            backend = "triton"
        else:
            backend = "torch"
            if kind == "cuda":
                _say_once("losses.py runs without its kernels: they want triton and half precision")
    if backend == "triton" and not _has_triton(kind):
        raise ValueError("backend is 'triton', which needs a CUDA device and the package triton")
    return o._replace(backend=backend, operands=operands if backend == "triton" else "float32")


def _has_triton(device: str) -> bool:
    runs = device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and importlib.util.find_spec("triton") is not None


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _inputs(
    features: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    masks: tuple[Tensor | None, Tensor | None],
    scalars: tuple[Tensor | float, Tensor | float | None, Tensor | None],
    o: Options,
) -> Inputs:
    """Refuse what does not fit; make defaults explicit."""
    (images, texts, negatives, positives), (valid, positive_valid) = features, masks
    scale, bias, thresholds = scalars
    if images.dim() != 2 or not len(images) or not images.is_floating_point():
        was = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"image_features are {was}; they must be floats [B, D], B > 0")
    b, d = images.shape
    forgotten = valid is None
    if negatives is None and valid is not None and valid.numel():
        raise ValueError("valid is given, but negative_features are missing")
    negatives = images.new_zeros(b, 0, d) if negatives is None else negatives
    k = negatives.shape[1] if negatives.dim() == 3 else -1
    every = images.new_ones(b, max(k, 0) + 1, dtype=torch.bool)
    valid = every[:, 1:] if valid is None else valid
    positive_valid = every[:, 0] if positive_valid is None else positive_valid
    thresholds = images.new_zeros(max(k, 0)) if thresholds is None else thresholds
    for name, tensor, shape, mask in (
        ("text_features", texts, (b, d), False),
        ("negative_features", negatives, (b, k, d), False),
        ("positive_features", positives, (b, d), False),
        ("thresholds", thresholds, (k,), False),
        ("valid", valid, (b, k), True),
        ("positive_valid", positive_valid, (b,), True),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            size = f"[{', '.join('K' if n == -1 else str(n) for n in shape)}]"
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {size}")
        if not (tensor.dtype == torch.bool if mask else tensor.is_floating_point()):
            kind = "a bool mask" if mask else "of floats"
            raise ValueError(f"{name} is {tensor.dtype}; it must be {kind}")
    if o.imc == "paired" and o.imc_weight and k > 0 and positives is None:
        raise ValueError(
            "imc 'paired' needs positive_features, another caption of each image; without one "
            "use imc='repulsion'"
        )
    counted = valid if o.mask_invalid else every[:, 1:]
    scale = _scalar("logit_scale", scale, images.device)
    bias = None if bias is None else _scalar("logit_bias", bias, images.device)
    x = Inputs(
        *(images, texts, negatives, positives, valid, counted, positive_valid),
        *(scale, bias, thresholds),
    )
    if o.check:
        _check_values(x, forgotten)
    return x


def _scalar(name: str, value: Tensor | float, device: torch.device) -> Tensor:
    if (tensor := torch.as_tensor(value, device=device)).numel() != 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be a scalar")
    return tensor.reshape(())


def _check_values(x: Inputs, forgotten: bool) -> None:
    """What only a look at the values shows; it costs a wait for the device."""
    for name, mask in (("images", None), ("texts", None), ("negatives", x.counted)):
        norms = getattr(x, name).detach().float().norm(dim=-1)
        norms = norms if mask is None else norms[mask]
        if forgotten and name == "negatives" and (norms == 0).any():
            raise ValueError("negative_features hold rows of zeros; pass `valid` to leave them out")
        worst = (norms - 1).abs().max() if norms.numel() else torch.zeros(())
        if not worst < 0.02:
            raise ValueError(
                f"{name} are not unit vectors (a norm is off by {float(worst):.3g}); "
                "pass torch.nn.functional.normalize(features, dim=-1)"
            )


def _clean(x: Inputs, o: Options) -> Inputs:
    """Float32 (float64 stays), with zeros under the masks: NaN times 0 would be NaN."""
    dtype = torch.promote_types(x.images.dtype, torch.float32)
    negatives, positives = x.negatives.to(dtype), x.positives
    if o.mask_invalid and not x.counted.all():
        negatives = torch.where(x.counted[..., None], negatives, 0.0)
    if positives is not None and not x.positive_valid.all():
        positives = torch.where(x.positive_valid[:, None], positives, 0.0)
    return Inputs(
        *(x.images.to(dtype), x.texts.to(dtype), negatives),
        None if positives is None else positives.to(dtype),
        *(x.valid, x.counted, x.positive_valid, x.scale.to(dtype)),
        *(None if x.bias is None else x.bias.to(dtype), x.thresholds.to(dtype)),
    )


class CEClipLoss(nn.Module):
    """The loss of a training step, with thresholds that it keeps from step to step.

    Also usable where open_clip's `ClipLoss` is: pass output_dict as open_clip does. Thresholds are
    a buffer: save `state_dict()` with your checkpoint and load it, or they begin at 0 again.
    """

    def __init__(
        self,
        recipe: str = "ce-clip",
        *,
        types: Sequence[str] = NEGATIVE_TYPES,
        group: dist.ProcessGroup | None = None,
        threshold: str | None = None,
        cap: float = 10.0,
        fixed_threshold: float = 5.0,
        reset_each_epoch: bool | None = None,
        **options: Any,
    ) -> None:
        """Take the options of a recipe; keywords overrule it.

        Args:
            recipe: one of RECIPES.
            types: names of the K types of negatives, in the order of axis K.
            group: the process group, or None for the default one.
            threshold: a mode of RankThreshold (default: the recipe's, else "adaptive").
            cap: the largest threshold, in logits.
            fixed_threshold: of the mode "fixed", in logits.
            reset_each_epoch: whether the trainer should reset thresholds (default: the recipe's).
            **options: the fields of `Options`.

        Raises:
            ValueError: unknown recipe, option, or value of an option.
        """
        super().__init__()
        _choose("recipe", recipe, list(RECIPES))
        chosen = {"threshold": "adaptive", "reset_each_epoch": False, **RECIPES[recipe]}
        mode, reset = chosen.pop("threshold"), chosen.pop("reset_each_epoch")
        self.recipe, self.types, self.group = recipe, tuple(types), group
        self.reset_each_epoch = reset if reset_each_epoch is None else reset_each_epoch
        self.threshold = RankThreshold(len(self.types), threshold or mode, cap, fixed_threshold)
        self._options = _options(chosen | options)

    @property
    def options(self) -> dict[str, Any]:
        """The fields of `Options` that this loss has."""
        return self._options._asdict()

    @property
    def needs_positives(self) -> bool:
        """Whether the loss reads positive_features."""
        return self.options["imc"] == "paired" and self.options["imc_weight"] != 0

    @property
    def needs_negatives(self) -> bool:
        """Whether the loss reads negative_features."""
        o = self.options
        intra = o["imc"] != "none" and o["imc_weight"] != 0
        return bool(o["negatives_in_itc"] or intra or o["cmr_weight"] or o["own_weight"])

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        negative_features: Tensor | None = None,
        valid: Tensor | None = None,
        positive_features: Tensor | None = None,
        positive_valid: Tensor | None = None,
        logit_bias: Tensor | float | None = None,
        output_dict: bool | None = None,
        update: bool = True,
    ) -> Any:
        """Compute the loss with the current thresholds, then, in training, move them on.

        Args:
            image_features: unit-length images [b, D].
            text_features: unit-length captions [b, D].
            logit_scale: scalar, already exponentiated.
            negative_features: unit-length negatives [b, K, D], in the order of `types`.
            valid: which negatives exist [b, K] bool.
            positive_features: another caption of each image [b, D].
            positive_valid: which of those exist [b] bool.
            logit_bias: scalar; if given, itc is SigLIP's.
            output_dict: as open_clip asks: False for the loss; True for weighted parts that sum to
                it, `contrastive_loss` (which has all the gradient), `imc_loss`, `cmr_loss` ...
            update: whether thresholds move on; with --accum-freq only the last call of a step may.

        Returns:
            Scalars `loss` (the only one with a gradient), `itc`, `imc`, `cmr`, `own`, and
            `threshold_<type>`, the margins that this loss was computed with.

        Raises:
            ValueError: shapes do not fit, or K is not the number of types.
        """
        given = negative_features is not None and negative_features.dim() == 3
        k = negative_features.shape[1] if given and negative_features is not None else 0
        if k not in (0, len(self.types)):
            raise ValueError(f"negative_features have K = {k}; there are {len(self.types)} types")
        if self.needs_negatives and not k:
            _say_once(f"recipe {self.recipe} gets no negative_features: it trains as plain CLIP")
        if self.threshold.value.device != image_features.device:
            self.threshold.to(image_features.device)
        theta = self.threshold.value.clone()
        negatives, mask = (negative_features, valid) if self.needs_negatives else (None, None)
        out = _loss(
            (image_features, text_features, negatives, positive_features),
            (mask, positive_valid),
            (logit_scale, logit_bias, theta if self.needs_negatives and k else None),
            self._options,
            self.group,
        )
        true, wrong = out.pop("image_text"), out.pop("image_negative")
        if self.training and update and wrong.shape[1]:
            mask = torch.ones_like(wrong, dtype=torch.bool) if valid is None else valid
            self.threshold.update(true, wrong, mask, self.group)
        if output_dict is not None:
            weights = {name: self.options[f"{name}_weight"] for name in ("imc", "cmr", "own")}
            parts = {f"{name}_loss": w * out[name] for name, w in weights.items() if w}
            rest = out["loss"] - sum(parts.values())
            return {"contrastive_loss": rest, **parts} if output_dict else out["loss"]
        names = [f"threshold_{name}" for name in self.types]
        return {**out, **dict(zip(names, theta.unbind(), strict=True))}


# The fused core
#
# The loss is a scalar, so its gradients can be made in the forward pass and only be scaled later.
# All big terms are log-sum-exps over rows of logits S = q k^T.  A chunk of rows of S lives in one
# workspace.  It becomes X = exp(S - offset) in place, with any offset near the row's maximum, for
# rows are never normalised: with total = log(e^extra + sum_j e^S_j), where `extra` stands for what
# else a row's denominator holds, and with weight w and f = w e^(offset - total) of each row,
#   d/dq = f (X k)   and   d/dk = X^T (f q),
# which scales the small operands instead of X.  Images (H) and captions (E) are stacked in a chunk:
# both meet the same keys, the negatives.  Pairs (A) need their columns' sums first, so they are
# formed twice, or kept while they are small.
#
# Negatives never travel.  Each rank gathers all images and captions, meets them with its own
# negatives, and ranks exchange one number for a row; so gradients of negatives stay at home, and
# those of images and captions are summed once.  Every derivative carries the number of ranks as a
# factor, which DistributedDataParallel divides out again.


class _Step(NamedTuple):
    """What the parts of one fused step share; a gradient that nobody wants is None."""

    x: Inputs
    o: Options
    group: dist.ProcessGroup | None
    here: slice  # this rank's rows among everyone's
    everyone: tuple[Tensor, Tensor]  # all ranks' images and captions, [B, D] each
    keys: Tensor  # [M, D], this rank's negatives that count
    d_everyone: tuple[Tensor | None, Tensor | None]  # [B, D] each
    d_negatives: Tensor | None  # [b, K, D]
    d_keys: Tensor | None  # [M, D]
    work: Tensor  # the workspace, flat, in the dtype of the operands of matrix products


class _Own(NamedTuple):
    """Logits of rows with what is their own, or the loss's derivatives by them."""

    true: Tensor  # S(I, T) [b]
    negative: Tensor  # S(I, N) [b, K]
    text: Tensor  # S(T, N) [b, K]
    numerator: Tensor  # n of the intra-modal loss [b]


def _fused(
    x: Inputs, o: Options, needs: Sequence[bool], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Loss, terms [4], own logits S(I, T) [b] and S(I, N) [b, K], then gradients by the inputs."""
    raw, x = x, _clean(x, o)
    _equal_rows(x.images, group)
    step = _start(x, o, dict(zip(Inputs._fields, needs, strict=True)), group)
    first, k = None, x.negatives.shape[1]  # the target of imc "released"
    if o.imc == "released" and k:
        first = _gather(x.negatives[0, 0], group)[0]
    numerator, counts = _numerator(x, o, first)
    own = _Own(
        x.scale * (x.images * x.texts).sum(dim=1),
        x.scale * (x.negatives @ x.images[..., None])[..., 0],
        x.scale * (x.negatives @ x.texts[..., None])[..., 0],
        numerator,
    )
    terms, d, share = _own_terms(step, own, counts)

    blocks = []  # towers that meet the negatives, what else is in their denominators, weights
    alone = numerator if first is None else torch.full_like(numerator, -torch.inf)
    if x.bias is None:
        pairs, rows, columns = _pair_sums(step)
        if o.negatives_in_itc and k:
            blocks.append((0, rows, torch.full_like(rows, 0.5 / len(rows))))
    if _whole_batch(o) and k:
        blocks.append((1, alone.double(), share.double()))
    totals = _meet_negatives(step, blocks)
    of_captions = torch.zeros_like(x.scale)  # sum of S dL/dS over the captions' rows
    if step.d_everyone[1] is not None and 1 in totals:
        of_captions = (step.everyone[1] * step.d_everyone[1]).sum()
    if 1 in totals:
        weighs = (share > 0) & (totals[1] > -torch.inf)
        terms[0] = (share * torch.where(weighs, totals[1] - numerator, 0)).sum() / o.imc_weight
        pull = torch.where(weighs, share * ((alone - totals[1]).exp() - 1), 0)
        d = d._replace(numerator=pull.to(numerator.dtype))
    d_bias = torch.zeros_like(x.scale)
    if x.bias is None:
        rows = totals.get(0, rows)
        itc = (rows + columns[step.here] - 2 * own.true).mean() / 2
        _pair_grads(step, pairs, rows, columns)
    else:
        itc, d_bias = _sigmoid_contrast(step, own.true)
    grads = {**_gather_grads(step, own, d, first, of_captions), "bias": d_bias}
    values = torch.stack([t.to(x.scale.dtype) for t in (itc, *terms)])
    values = _sum_over_ranks(values, group) / _world(group)[1]
    weights = values.new_tensor([1.0, o.imc_weight, o.cmr_weight, o.own_weight])
    found = []
    for name, t, wanted in zip(Inputs._fields, raw, needs, strict=True):
        if t is None or not wanted:
            found.append(raw.images.new_empty(0))
            continue
        grad = grads.get(name)
        grad = t.new_zeros(t.shape) if grad is None else grad  # positives that nobody reads
        found.append(grad.to(t.dtype).reshape(t.shape).contiguous())
    return [(values * weights).sum(), values, own.true, own.negative, *found]


def _whole_batch(o: Options) -> bool:
    """Whether the intra-modal loss meets the negatives of the whole batch."""
    released = o.imc == "released"
    return o.imc_weight != 0 and (released or (o.imc != "none" and o.imc_scope == "batch"))


def _start(x: Inputs, o: Options, need: dict[str, bool], group: dist.ProcessGroup | None) -> _Step:
    rank, b, k = _world(group)[0], len(x.images), x.negatives.shape[1]
    everyone = (_gather(x.images, group).flatten(0, 1), _gather(x.texts, group).flatten(0, 1))
    keys, counted = x.negatives.flatten(0, 1), x.counted.flatten()
    d_negatives = x.negatives.new_zeros(x.negatives.shape) if need["negatives"] else None
    d_keys = None if d_negatives is None else d_negatives.view_as(keys)
    if not counted.all():
        keys = keys[counted]
        d_keys = None if d_negatives is None else torch.zeros_like(keys)
    # The derivative by scale is read off the gradients of features.
    images = need["images"] or (need["scale"] and not (need["texts"] and need["negatives"]))
    texts = need["texts"] or (need["scale"] and _whole_batch(o))
    d_images, d_texts = (
        torch.zeros_like(t) if n else None for t, n in zip(everyone, (images, texts), strict=True)
    )
    operands = torch.bfloat16 if o.operands == "bfloat16" else x.images.dtype
    mib = o.workspace_mib or (512 if x.images.is_cuda else 32)
    # Not more than a quarter of all logits: fresh memory costs time as well.
    most, least = len(everyone[0]) * max(b, b * k) // 2, 2 * max(b * k, len(everyone[0]))
    size = max(min(int(mib * 2**20) // operands.itemsize, most), least)
    return _Step(
        *(x, o, group, slice(rank * b, (rank + 1) * b), everyone, keys, (d_images, d_texts)),
        *(d_negatives, d_keys, x.images.new_empty(size, dtype=operands)),
    )


def _own_terms(step: _Step, own: _Own, counts: Tensor) -> tuple[list[Tensor], _Own, Tensor]:
    """The terms imc, cmr and own of rows with their own negatives, and their derivatives.

    Also each row's weight in the intra-modal loss [b].
    """
    x, o, world = step.x, step.o, _world(step.group)[1]
    has = x.valid.any(dim=1)
    sums = torch.stack([x.valid.sum(), has.sum(), counts.sum()])
    valid, with_negative, counting = world / _sum_over_ranks(
        sums.to(own.true.dtype), step.group
    ).clamp(min=1)
    share = o.imc_weight * counting * counts.to(own.true.dtype)
    d_text, d_numerator, imc = torch.zeros_like(own.text), torch.zeros_like(own.true), 0 * x.scale
    if o.imc != "none" and o.imc_weight and not _whole_batch(o):
        text = own.text.masked_fill(~x.counted, -torch.inf)
        p = torch.cat([own.numerator[:, None], text], dim=1).log_softmax(dim=1)
        imc = -(counts * counting * p[:, 0]).sum()
        d_numerator, d_text = share * (p[:, 0].exp() - 1), share[:, None] * p[:, 1:].exp()
    excess = x.thresholds + own.negative - own.true[:, None]
    active = x.valid & (excess > 0)
    per_slot = valid if o.cmr_mean == "valid" else 1 / max(1, x.valid.numel())
    cmr = (per_slot * excess.masked_fill(~active, 0)).sum()
    d_negative = o.cmr_weight * per_slot * active.to(excess.dtype)
    d_true, mine = -d_negative.sum(dim=1), 0 * x.scale
    if o.own_weight:
        log_p, target, exists = _own_softmax(own.true, own.negative, x.valid, o.label_smoothing)
        p, g = log_p.exp(), o.focal_gamma
        per_row = with_negative * has[:, None].to(p.dtype)
        mine = -(per_row * target * (1 - p) ** g * log_p).masked_fill(~exists, 0).sum()
        by_log_p = -target * (1 - p) ** g
        if g:
            by_log_p = by_log_p + target * g * p * (1 - p) ** (g - 1) * log_p
        d_logits = o.own_weight * per_row * (by_log_p - p * by_log_p.sum(dim=1, keepdim=True))
        d_true, d_negative = d_true + d_logits[:, 0], d_negative + d_logits[:, 1:]
    return [imc, cmr, mine], _Own(d_true, d_negative, d_text, d_numerator), share


def _pair_sums(step: _Step) -> tuple[Tensor | None, Tensor, Tensor]:
    """Own images with everybody's captions: the logits if they are small, log-sum-exps [b], [B].

    Sums of rows and columns are float64 throughout: near 100, half a unit in the last place of
    float32 is an error of 4e-6 in every probability of the row.
    """
    x, texts = step.x, step.everyone[1]
    if step.o.backend == "triton":
        row, column = _tiles("sums", x.images * x.scale, texts, step.work.dtype)
        rows, columns = row.double().logsumexp(dim=1), column.double().logsumexp(dim=0)
        pairs = None
    else:
        b, n = len(x.images), len(texts)
        pairs = x.images.new_empty(b, n) if b * n <= step.work.numel() else None
        rows = x.images.new_empty(b, dtype=torch.float64)
        columns = texts.new_full((n,), -torch.inf, dtype=torch.float64)
        for chunk in _chunks(b, step.work.numel() // 2 // n):
            size = (chunk.stop - chunk.start) * n
            at, other = (w[:size].view(-1, n) for w in step.work.chunk(2))
            at = at if pairs is None else pairs[chunk]
            logits = torch.mm(x.images[chunk] * x.scale, texts.T, out=at)
            rows[chunk] = _log_sum(logits, 1, other)
            columns = torch.logaddexp(columns, _log_sum(logits, 0, other))
    return pairs, rows, _gather(columns, step.group).logsumexp(dim=0)


def _log_sum(logits: Tensor, dim: int, other: Tensor) -> Tensor:
    """Log-sum-exp along a dimension, in float64; `other` is memory of the same shape."""
    top = logits.amax(dim=dim, keepdim=True)
    exps = torch.sub(logits, top, out=other).exp_()
    return top.squeeze(dim).double() + exps.sum(dim=dim).double().log()


def _pair_grads(step: _Step, pairs: Tensor | None, rows: Tensor, columns: Tensor) -> None:
    """Add what all pairs S(I, T) give: (e^(S - row) + e^(S - column), less 2 if true) / 2b."""
    x, texts, (d_images, d_texts) = step.x, step.everyone[1], step.d_everyone
    if d_images is None and d_texts is None:
        return
    b, n, half = len(x.images), len(texts), step.work.numel() // 2
    keys = texts.to(step.work.dtype)
    for chunk in _chunks(b, half // n):
        q = x.images[chunk] * x.scale
        at = step.work[: len(q) * n].view(-1, n)
        first, row = step.here.start + chunk.start, rows[chunk].to(q.dtype)
        if step.o.backend == "triton":
            _tiles("pairs", q, keys, step.work.dtype, at, row, columns.float(), first=first)
        else:
            at = torch.mm(q, texts.T, out=at) if pairs is None else pairs[chunk]
            other = step.work[half : half + len(q) * n].view(-1, n)
            torch.sub(at, columns.to(q.dtype), out=other).exp_()
            at.sub_(row[:, None]).exp_().add_(other)
            at.diagonal(first).sub_(2)
        if d_images is not None:
            d_images[step.here][chunk] += _product(at, keys) * (0.5 / b * x.scale)
        if d_texts is not None:
            _add_product(d_texts, at.T, q * (0.5 / b))


def _meet_negatives(step: _Step, blocks: list[tuple[int, Tensor, Tensor]]) -> dict[int, Tensor]:
    """Softmax rows of towers over the negatives: adds their gradients, returns totals [b] by tower.

    A block is a tower (0 images, 1 captions), and of its rows [b] each: the log-sum-exp of what
    else stands in the denominator, and the derivative of the loss by the row's total.
    """
    if not blocks:
        return {}
    x, towers = step.x, [tower for tower, *_ in blocks]
    rows = torch.stack([torch.stack(row) for _, *row in blocks])  # [towers, 2, b]
    extra, weight = _gather(rows, step.group).permute(2, 1, 0, 3).flatten(2)  # [towers, B]
    totals = torch.empty_like(extra)
    keys = step.keys.to(step.work.dtype)
    width = max(1, x.counted.numel() * len(towers))  # equal on all ranks, as chunks must be
    for chunk in _chunks(len(step.everyone[0]), step.work.numel() // width):
        q = torch.cat([step.everyone[tower][chunk] for tower in towers]) * x.scale
        e = extra[:, chunk].flatten()
        exps, offset, total = _exp_logits(step, q, keys, e)
        total = torch.logaddexp(e, _gather(total, step.group).logsumexp(dim=0))
        totals[:, chunk] = total.view(len(towers), -1)
        f = torch.where(total > -torch.inf, weight[:, chunk].flatten() * (offset - total).exp(), 0)
        f = f.to(q.dtype)
        if step.d_keys is not None:
            _add_product(step.d_keys, exps.T, q * f[:, None])
        n = chunk.stop - chunk.start
        for i, tower in enumerate(towers):
            d, part = step.d_everyone[tower], slice(i * n, (i + 1) * n)
            if d is not None:
                d[chunk] += _product(exps[part], keys) * (f[part, None] * x.scale)
    return dict(zip(towers, totals[:, step.here], strict=True))


def _exp_logits(
    step: _Step, q: Tensor, keys: Tensor, extra: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(q k^T - offset) [n, M] in the workspace, the offsets [n] and the log-sum-exps [n]."""
    n, m = len(q), len(keys)
    if not m:
        return q.new_zeros(n, 0, dtype=keys.dtype), extra, extra.new_full((n,), -torch.inf)
    at = step.work[: n * m].view(n, m)
    if step.o.backend == "triton":
        # No pass for the maximum: e^x overflows from 88 on and vanishes below -87.  A row's total
        # is at least `floor`, its largest logit at most `bound`; 125 apart are in reach of both.
        floor = torch.maximum(extra, (q @ keys[0].to(q.dtype)).double()).to(q.dtype)
        bound = q.norm(dim=1) * keys.float().norm(dim=1).amax()
        if ((bound - floor) < 125).all():
            offset = torch.maximum(floor, bound - 70)
            sums, _ = _tiles("exp", q, keys, keys.dtype, at, offset)
            return at, offset.double(), offset.double() + sums.sum(dim=1).double().log()
        at = at.float()
    logits = torch.mm(q, keys.T.to(q.dtype), out=at)
    top = logits.amax(dim=1)
    exps = torch.softmax(logits, dim=1, out=logits)  # the fastest exp there is on a CPU
    total = top.double() - exps.amax(dim=1).double().log()
    return exps.to(keys.dtype), total, total


def _sigmoid_contrast(step: _Step, true: Tensor) -> tuple[Tensor, Tensor]:
    """SigLIP's loss: each pair, and each image with each negative, is a question of its own.

    Returns this rank's share of it, times the number of ranks, and its derivative by the bias.
    """
    x, o, bias = step.x, step.o, step.x.bias
    assert bias is not None  # what makes it SigLIP's
    d_images, d_texts = step.d_everyone
    d_own = None if d_images is None else d_images[step.here]
    questions = [(x.images, step.everyone[1], d_own, d_texts, step.here.start)]
    if o.negatives_in_itc and len(step.keys):
        questions.append((step.everyone[0], step.keys, d_images, step.d_keys, -1))
    loss, d_bias = -(true + bias).mean(), torch.zeros_like(x.scale)
    share = 1 / len(x.images)
    for images, texts, d_queries, d_keys, first in questions:
        keys = texts.to(step.work.dtype)
        for chunk in _chunks(len(images), step.work.numel() // 2 // len(keys)):
            q = images[chunk] * x.scale
            at_first = first + chunk.start if first >= 0 else -1
            at, softplus = _sigmoid_logits(step, q, keys, bias, at_first)
            loss = loss + share * softplus
            d_bias = d_bias + share * at.sum(dtype=x.scale.dtype)
            if d_queries is not None:
                d_queries[chunk] += _product(at, keys) * (share * x.scale)
            if d_keys is not None:
                _add_product(d_keys, at.T, q * share)
    return loss, d_bias


def _sigmoid_logits(
    step: _Step, q: Tensor, keys: Tensor, bias: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """sigmoid(q k^T + bias) [n, M], less 1 where row i meets column first + i; sum of softplus."""
    at = step.work[: len(q) * len(keys)].view(len(q), len(keys))
    if step.o.backend == "triton":
        softplus, _ = _tiles("sigmoid", q, keys, keys.dtype, at, bias=bias, first=first)
        return at, softplus.sum()
    logits = torch.mm(q, keys.T, out=at).add_(bias)
    softplus = -F.logsigmoid(-logits).sum()  # F.softplus is a straight line from 20 on
    logits.sigmoid_()
    if first >= 0:
        logits.diagonal(first).sub_(1)
    return logits, softplus


def _gather_grads(
    step: _Step, own: _Own, d: _Own, first: Tensor | None, of_captions: Tensor
) -> dict[str, Tensor]:
    """Sum gradients over ranks, add what rows with their own give, read off that of the scale."""
    x, o, s = step.x, step.o, step.x.scale
    if o.imc == "paper":
        d = d._replace(true=d.true + d.numerator)
    grads: dict[str, Any] = {"negatives": step.d_negatives, "positives": None}
    for name, total in zip(("images", "texts"), step.d_everyone, strict=True):
        grads[name] = None if total is None else _reduce_rows(total, step.group)
    if grads["images"] is not None:  # in place, for these are the largest tensors of all
        grads["images"].addcmul_(s * d.true[:, None], x.texts)
        grads["images"][:, None].baddbmm_(s * d.negative[:, None], x.negatives)
    if grads["negatives"] is not None:
        if len(step.keys) < x.counted.numel():
            grads["negatives"][x.counted] = step.d_keys
        grads["negatives"].addcmul_((s * d.negative)[..., None], x.images[:, None])
        grads["negatives"].addcmul_((s * d.text)[..., None], x.texts[:, None])
    if grads["texts"] is not None:
        grads["texts"].addcmul_(s * d.true[:, None], x.images)
        grads["texts"][:, None].baddbmm_(s * d.text[:, None], x.negatives)
    _pull_to_numerators(step, d, first, grads)
    grads["scale"] = _scale_grad(step, own, d, of_captions, grads) / s
    return grads


def _pull_to_numerators(step: _Step, d: _Own, first: Tensor | None, grads: dict[str, Any]) -> None:
    """Add what the numerators S(T, T+), or S(T, first) of "released", give to both their sides."""
    x, towards = step.x, first
    pull = x.scale * d.numerator[:, None]
    if step.o.imc == "paired" and x.positives is not None:
        grads["positives"], towards = pull * x.texts, x.positives
    if first is not None:
        sums = _sum_over_ranks((pull * x.texts).sum(dim=0), step.group)
        if grads["negatives"] is not None and step.here.start == 0:
            grads["negatives"][0, 0] += sums * x.counted[0, 0]
    if grads["texts"] is not None and towards is not None:
        grads["texts"].addcmul_(pull, towards.expand_as(x.texts))


def _scale_grad(
    step: _Step, own: _Own, d: _Own, of_captions: Tensor, grads: dict[str, Any]
) -> Tensor:
    """Sum of S dL/dS over all logits; features' gradients know it, as S is linear in each of both.

    <I, dI> holds all logits of images; those of captions with texts are added.  Where images are
    frozen, <T, dT> + <N, dN> hold all logits, but twice those of captions with negatives.
    """
    x, imc = step.x, step.o.imc
    of_captions = of_captions + (own.text * d.text).sum()
    of_numerator = (own.numerator * d.numerator).sum()
    if grads["images"] is not None:
        of_images = (x.images * grads["images"]).sum()
        return of_images + of_captions + (0 if imc == "paper" else of_numerator)
    if grads["texts"] is None or grads["negatives"] is None:
        return torch.zeros_like(x.scale)  # nobody asked
    both = (x.texts * grads["texts"]).sum() + (x.negatives * grads["negatives"]).sum()
    return both - of_captions + {"released": -1, "repulsion": 1}.get(imc, 0) * of_numerator


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, max(1, size)):
        yield slice(start, min(n, start + max(1, size)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product, summed and returned in float32 at least."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.bfloat16:
        to += _product(a, b.to(a.dtype))
    else:
        to.addmm_(a, b)


def _keep_grads(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.needs = inputs[-2]
    ctx.save_for_backward(*output[4:])
    ctx.set_materialize_grads(False)


def _scale_grads(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    found = [None] * len(ctx.needs)
    if grads[0] is not None:
        # In place, for a copy would be as big as all features.
        kept = zip(ctx.saved_tensors, ctx.needs, strict=True)
        found = [x.mul_(grads[0]) if wanted else None for x, wanted in kept]
    return (*found, None, None, None)


class _Fused(torch.autograd.Function):
    """The fused core for autograd."""

    setup_context = staticmethod(_keep_grads)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *tensors, o, needs, group = inputs
        with torch.autocast(tensors[0].device.type, enabled=False):
            return tuple(_fused(Inputs(*tensors), o, needs, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _scale_grads(ctx, grads)


# The same as one operator, which torch.compile takes as it is; its first call imports 900 modules
@torch.library.custom_op(
    "ce_clip::fused",
    mutates_args=(),
    schema="(Tensor images, Tensor texts, Tensor negatives, Tensor? positives, Tensor valid, "
    "Tensor counted, Tensor positive_valid, Tensor scale, Tensor? bias, Tensor thresholds, "
    "str[] options, bool[] needs, str group) -> Tensor[]",
)
def _fused_op(*arguments: Any) -> list[Tensor]:
    *tensors, words, needs, name = arguments
    kinds: Any = zip(words, Options(), strict=True)
    values: Any = [w == "True" if isinstance(d, bool) else type(d)(w) for w, d in kinds]
    group = torch.distributed.distributed_c10d._resolve_process_group(name) if name else None
    return list(_Fused.forward(*tensors, Options(*values), needs, group))


@_fused_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *tensors, _, needs, _ = arguments
    x = Inputs(*tensors)
    scalar = x.images.new_empty((), dtype=torch.promote_types(x.images.dtype, torch.float32))
    own = [scalar.new_empty(4), scalar.new_empty(len(x.images)), scalar.new_empty(x.valid.shape)]
    grads = [
        t.new_empty(t.shape) if t is not None and n else x.images.new_empty(0)
        for t, n in zip(x, needs, strict=True)
    ]
    return [scalar, *own, *grads]


_fused_op.register_autograd(_scale_grads, setup_context=_keep_grads)


# Processes


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather the rows of all ranks, with gradients: [b, ...] -> [W·b, ...] in the order of ranks.

    The gradient of a row is the sum of what all ranks' losses want of it.  Without a process group
    x is returned as it is.

    Raises:
        ValueError: ranks hold different numbers of rows.
    """
    if _world(group)[1] == 1:
        return x
    _equal_rows(x, group)
    return _GatherRows.apply(x, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gather(x, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_rows(grad, ctx.group), None


def _world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and number of ranks; 0 and 1 outside a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Stack the equally shaped tensors of all ranks, [...] -> [W, ...], without gradients."""
    if _world(group)[1] == 1:
        return x[None]
    found = x.new_empty(_world(group)[1], *x.shape)
    dist.all_gather(list(found.unbind()), x.contiguous(), group=group)
    return found


def _reduce_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum [W·b, ...] over ranks; each keeps its own rows [b, ...]."""
    world = _world(group)[1]
    if world == 1:
        return x
    parts = list(x.contiguous().chunk(world))
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts, group=group)
    return mine


def _sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if _world(group)[1] > 1:
        x = x.clone()
        dist.all_reduce(x, group=group)
    return x


def _equal_rows(x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Refuse unequal local batches, for which gathering would wait forever or mix up rows."""
    if _world(group)[1] > 1:
        rows = _gather(torch.tensor(len(x), device=x.device), group).tolist()
        if len(set(rows)) > 1:
            raise ValueError(f"ranks hold {min(rows)} and {max(rows)} rows; they must be equal")


# Kernels: one tile of logits q k^T, and what is made of it before it leaves the registers

TILE_MODES = ("exp", "sums", "pairs", "sigmoid")
TILE = (128, 128, 64)  # rows, columns, depth: no spills on sm_90, 96 KiB of shared memory
tl: Any = None  # triton.language, once a kernel is asked for


def _tiles(
    mode: str,
    q: Tensor,
    keys: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    row: Tensor | None = None,
    column: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    first: int = -1,
) -> tuple[Tensor, Tensor]:
    """Run `_tile` over all logits of q [n, D] and keys [M, D].

    Args:
        mode: "exp" writes exp(S - row) and its partial sums of rows; "sums" partial log-sum-exps of
            rows and columns; "pairs" writes exp(S - row) + exp(S - column), less 2 at the diagonal;
            "sigmoid" writes sigmoid(S + bias), less 1 at the diagonal, and row sums of softplus.
        q: queries, already scaled.
        keys: keys.
        dtype: of the operands, and of `out`.
        out: where the tile goes [n, M].
        row: [n].
        column: [M].
        bias: scalar.
        first: the column that row 0 has its diagonal in; -1 for none.

    Returns:
        partial row results [n, tiles across], partial column results [tiles down, M].
    """
    import triton

    n, m, width = len(q), len(keys), q.shape[1]
    rows, columns, depth = TILE if q.is_cuda else (32, 32, 32)
    down, across = triton.cdiv(n, rows), triton.cdiv(m, columns)
    of_rows, of_columns = q.new_empty(n, across), q.new_empty(down, m)
    nothing = q.new_empty(1)
    row, column, bias = (nothing if t is None else t for t in (row, column, bias))
    _kernel()[(down * across,)](
        *(q.to(dtype).contiguous(), keys.to(dtype).contiguous(), of_rows if out is None else out),
        *(row.contiguous(), column.contiguous(), bias, of_rows, of_columns, n, m, first),
        *(width, TILE_MODES.index(mode), rows, columns, depth),
        num_warps=8,
        num_stages=3,
    )
    return of_rows, of_columns


@functools.cache
def _kernel() -> Any:
    import triton

    globals()["tl"] = triton.language
    return triton.jit(_tile)


# fmt: off
def _tile(  # type: ignore[no-untyped-def]
    q, k, out, row, column, bias, of_rows, of_columns, n, m, first,
    WIDTH: tl.constexpr, MODE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,  # noqa: N803
):
    # fmt: on
    """One tile of logits; see `_tiles`."""
    across = tl.cdiv(m, COLUMNS)
    down = tl.cdiv(n, ROWS)
    # Eight tiles down before one across: neighbours share operands in the cache.
    band = tl.program_id(0) // (8 * across)
    tall = min(down - band * 8, 8)
    i = band * 8 + tl.program_id(0) % (8 * across) % tall
    j = tl.program_id(0) % (8 * across) // tall
    r, c = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    rows, columns = r < n, c < m
    s = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        d = start + tl.arange(0, DEPTH)
        a = tl.load(q + r.to(tl.int64)[:, None] * WIDTH + d[None, :],
                    mask=rows[:, None] & (d < WIDTH)[None, :], other=0.0)
        b = tl.load(k + c.to(tl.int64)[None, :] * WIDTH + d[:, None],
                    mask=columns[None, :] & (d < WIDTH)[:, None], other=0.0)
        s = tl.dot(a, b, s, input_precision="ieee")
    inside = rows[:, None] & columns[None, :]
    if MODE == 1:
        s = tl.where(inside, s, float("-inf"))
        top = tl.max(s, axis=1)
        total = top + tl.log(tl.sum(tl.exp(s - top[:, None]), axis=1))
        tl.store(of_rows + r * across + j, total, mask=rows)
        top = tl.max(s, axis=0)
        total = top + tl.log(tl.sum(tl.exp(s - top[None, :]), axis=0))
        tl.store(of_columns + i.to(tl.int64) * m + c, total, mask=columns)
    else:
        if MODE == 3:
            s += tl.load(bias)
            x = tl.sigmoid(s)
            each = tl.maximum(s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s)))
            each = tl.sum(tl.where(inside, each, 0.0), axis=1)
            tl.store(of_rows + r * across + j, each, mask=rows)
        else:
            x = tl.exp(s - tl.load(row + r, mask=rows, other=0.0)[:, None])
        if MODE == 0:
            tl.store(of_rows + r * across + j, tl.sum(tl.where(inside, x, 0.0), axis=1), mask=rows)
        if MODE == 2:
            x += tl.exp(s - tl.load(column + c, mask=columns, other=0.0)[None, :])
        if first >= 0:
            x -= tl.where((first + r)[:, None] == c[None, :], 2.0 if MODE == 2 else 1.0, 0.0)
        place = out + r.to(tl.int64)[:, None] * m + c[None, :]
        tl.store(place, x.to(out.dtype.element_ty), mask=inside)

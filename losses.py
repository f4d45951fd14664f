# SPDX-License-Identifier: MIT
"""The losses of CE-CLIP, exact, fused and distributed; copy this file into any code base.

Zhang, Awal and Agrawal, "Contrasting Intra-Modal and Ranking Cross-Modal Hard Negatives to Enhance
Visio-Linguistic Compositional Understanding", CVPR 2024, section 3.

  B  images I and captions T of the global batch; b of them are on this rank
  K  hard negatives N_1 ... N_K of each caption; the mask `valid` says which exist
  D  width of the features, which are unit vectors
  S  similarities are logits, S(x, y) = logit_scale <x, y>

  L = itc + 0.2 imc + 0.4 cmr

  itc  image-text contrast; the hard negatives of the whole batch are in the images' denominator
  imc  intra-modal contrast: a caption is closer to its positive than to its negatives
  cmr  cross-modal rank: an image scores its caption above negative k by a margin theta_k, which
       grows as the model learns (the curriculum)

  loss = CEClipLoss("ce-clip")
  out = loss(image_features, text_features, logit_scale.exp(), negative_features, valid,
             positive_features)  # another caption of each image; without one: imc="repulsion"
  out["loss"].backward()

Chapters: the terms as plain code (`rank_loss` and others) and `RankThreshold`; the loss of
a step (`ce_clip_loss`, `CEClipLoss`); the fused core; ranks; kernels.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

if __name__ == "__main__":  # before torch is imported, which takes seconds
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("losses.py", description=__doc__, formatter_class=raw)
    parser.parse_args(sys.argv[1:] or ["--help"])

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = tl = None

NEGATIVE_TYPES = ("relation", "attribute", "object", "action")
IMC_VARIANTS = ("none", "paired", "paper", "repulsion", "released")
THRESHOLDS = ("adaptive", "fixed", "max", "released")
WORDS = {
    "imc": IMC_VARIANTS,
    "imc_scope": ("own", "batch"),
    "cmr_mean": ("valid", "all"),
    "backend": ("auto", "plain", "torch", "triton"),
    "operands": ("auto", "float32", "bfloat16"),
}
SMALL = 2**19  # number of logits up to which plain autograd is as fast as the fused core
_warn_once = functools.cache(functools.partial(warnings.warn, stacklevel=3))
Group: TypeAlias = "dist.ProcessGroup | None"

# Options of each recipe; the others have the defaults of Options and RankThreshold.
RECIPES: dict[str, dict[str, Any]] = {
    "clip": {"negatives_in_itc": False, "imc": "none", "cmr_weight": 0.0},
    "negclip": {"imc": "none", "cmr_weight": 0.0},
    "ce-clip": {},
    # The published run: missing negatives stay in both softmaxes, imc pulls every caption towards
    # one arbitrary text, cmr is averaged over all K·B slots, theta is reset to 0 each epoch.
    "released": {
        "imc": "released",
        "threshold": "released",
        "mask_invalid": False,
        "cmr_mean": "all",
        "reset_each_epoch": True,
    },
}


class Options(NamedTuple):
    """The terms of the loss and their settings: all options of `ce_clip_loss`."""

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
    backend: str = "auto"  # "plain" is the reference; "torch" and "triton" are the fused paths
    workspace_mib: float = 0.0  # memory of the fused paths; 0 means 32 on CPU and 512 on CUDA
    operands: str = "auto"  # of products: "bfloat16" for half precision on CUDA, else "float32"
    check: bool = False  # also check values: unit length, finite, missing masks


class Inputs(NamedTuple):
    """The tensors of this rank, in the order of `ce_clip_loss`; K is 0 without negatives."""

    images: Tensor  # [b, D]
    texts: Tensor  # [b, D]
    scale: Tensor  # scalar
    negatives: Tensor  # [b, K, D], 0 where `encoded` is False
    valid: Tensor  # [b, K] bool, which negatives exist
    positives: Tensor | None  # [b, D]
    positive_valid: Tensor  # [b] bool
    bias: Tensor | None  # scalar, of SigLIP
    thresholds: Tensor  # [K]
    encoded: Tensor  # [b, K] bool, which are in the softmaxes: `valid`, or all


# The terms as plain code, the reference for the fused core


def rank_loss(
    image_text: Tensor,
    image_negative: Tensor,
    thresholds: Tensor,
    valid: Tensor,
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
        A scalar in logits; 0 if nothing is valid.
    """
    excess = F.relu(thresholds + image_negative - image_text[:, None])
    count = valid.sum() if mean == "valid" else valid.numel()
    return excess.masked_fill(~valid, 0).sum() / torch.as_tensor(count).clamp(min=1)


def intra_modal_loss(
    numerator: Tensor, text_negative: Tensor, valid: Tensor, counts: Tensor | None = None
) -> Tensor:
    """Intra-modal contrast (section 3.2, equation 3): mean of -log(e^n / (e^n + sum e^S(T, N))).

    The variant is the choice of the numerator n. "paired": S(T, T+), T+ another caption of the
    image; "paper": S(I, T), our best guess of equation 3; "repulsion": a constant, so negatives are
    only pushed away. In "released" n is S(T, first negative of the batch), already in the sum.

    Args:
        numerator: logits n [B].
        text_negative: logits S(T, N) with the own negatives [B, K], or those of the batch [B, BK].
        valid: which of these are in the denominator, bool of the same shape.
        counts: which items are averaged [B] bool; None means all.

    Returns:
        A scalar in nats; 0 if no item is averaged.
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
    and 0.02 the global hard-negative loss of FSC-CLIP (arXiv 2410.05210).

    Args:
        image_text: logits of the true pairs S(I, T) [B].
        image_negative: logits S(I, N_k) of each image and its own negatives [B, K].
        valid: which negatives exist [B, K] bool.
        focal_gamma: g, the focusing exponent; 0, or 1 and more.
        label_smoothing: probability mass moved from the true caption to all valid classes.

    Returns:
        A scalar in nats, the mean over items with a negative; 0 if there are none.
    """
    log_p, target, exists = _own_softmax(image_text, image_negative, valid, label_smoothing)
    each = -(target * (1 - log_p.exp()) ** focal_gamma * log_p).masked_fill(~exists, 0).sum(dim=1)
    has = valid.any(dim=1)
    return each.masked_fill(~has, 0).sum() / has.sum().clamp(min=1)


def _own_softmax(
    image_text: Tensor, image_negative: Tensor, valid: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, smoothed targets and the mask of valid classes, all [B, 1 + K]."""
    exists = F.pad(valid, (1, 0), value=True)
    logits = torch.cat([image_text[:, None], image_negative], dim=1)
    log_p = logits.masked_fill(~exists, torch.finfo(logits.dtype).min / 2).log_softmax(dim=1)
    target = exists * (smoothing / exists.sum(dim=1, keepdim=True).to(log_p.dtype))
    target = torch.cat([target[:, :1] + 1 - smoothing, target[:, 1:]], dim=1)
    return log_p, target, exists


def _reference(x: Inputs, o: Options, group: Group) -> tuple[Tensor, ...]:
    """The loss of the global batch from gathered tensors; its terms; this rank's own logits."""
    here = slice(_world(group)[0] * len(x.images), (_world(group)[0] + 1) * len(x.images))
    rows = {k: t for k, t in x._asdict().items() if t is not None and t.dim() and k != "thresholds"}
    x = x._replace(**{name: gather_rows(t, group) for name, t in rows.items()})
    everyones, b = x.negatives.flatten(0, 1), len(x.images)  # [BK, D]
    missing = F.pad(~x.encoded.flatten(), (b, 0))
    logits = x.scale * x.images @ torch.cat([x.texts, everyones]).T  # [B, B + BK]
    logits = logits.masked_fill(missing, -torch.inf)
    pairs, true = logits[:, :b], logits[:, :b].diagonal()
    own = logits[:, b:].view(b, b, -1).diagonal().T.masked_fill(~x.encoded, 0)  # [B, K]
    to_text = logits if o.negatives_in_itc else pairs
    if x.bias is None:
        partner = torch.arange(b, device=pairs.device)
        itc = (F.cross_entropy(to_text, partner) + F.cross_entropy(pairs.T, partner)) / 2
    else:  # SigLIP: binary classification of each pair, and of each image with each negative
        itc = (-F.logsigmoid(-to_text - x.bias).sum() - (true + x.bias).sum()) / b
    imc = mine = torch.zeros_like(itc)
    numerator, counts = _numerator(x, o, None)
    if _whole_batch(o) and x.encoded.any():
        batch = x.scale * x.texts @ everyones.T  # [B, BK]
        if o.imc == "released":  # the target of every caption is the first negative
            total = batch.masked_fill(missing[b:], -torch.inf).logsumexp(dim=1)
            imc = (total - batch[:, 0]).mean()
        else:
            imc = intra_modal_loss(numerator, batch, ~missing[b:].expand(batch.shape), counts)
    elif o.imc != "none" and o.imc_weight and not _whole_batch(o):
        of_texts = x.scale * (x.negatives @ x.texts[..., None])[..., 0]  # [B, K]
        imc = intra_modal_loss(numerator, of_texts, x.encoded, counts)
    cmr = rank_loss(true, own, x.thresholds, x.valid, mean=o.cmr_mean)
    if o.own_weight:
        softened = {"focal_gamma": o.focal_gamma, "label_smoothing": o.label_smoothing}
        mine = own_negatives_loss(true, own, x.valid, **softened)
    loss = itc + o.imc_weight * imc + o.cmr_weight * cmr + o.own_weight * mine
    return loss, torch.stack([itc, imc, cmr, mine]), true[here], own[here]


def _numerator(x: Inputs, o: Options, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logit n of the intra-modal loss, and which items are averaged, both [b]."""
    everybody = torch.ones_like(x.positive_valid)
    if o.imc == "paired" and x.positives is not None:
        return x.scale * (x.positives * x.texts).sum(dim=1), x.positive_valid
    if o.imc == "paper":
        return x.scale * (x.images * x.texts).sum(dim=1), everybody
    if o.imc == "released" and first is not None:
        return x.scale * x.texts @ first, everybody
    return (x.scale * o.imc_offset).expand(len(x.texts)), everybody


def _whole_batch(o: Options) -> bool:
    """Whether the intra-modal loss has the negatives of the whole batch in its denominator."""
    scope = {"released": "batch", "none": "own"}.get(o.imc, o.imc_scope)
    return o.imc_weight > 0 and scope == "batch"


class RankThreshold(nn.Module):
    """The margins theta of the rank loss, one for each type of negative: the curriculum.

    Modes, all clamped to [0, cap] and computed from the global batch of the previous step:
        adaptive: mean gap S(I, T) - S(I, N_k) over the valid negatives of type k (equation 6);
        max: the largest of these gaps, divided by 5;
        fixed: `value`, never changed;
        released: as adaptive, but the mean of S(I, T) is over all images of the batch, and that
            of S(I, N_k) over those that are not 0.
    A type keeps its theta if it has no valid negative, or logits that are not finite.
    """

    value: Tensor

    def __init__(self, k: int, mode: str = "adaptive", cap: float = 10, value: float = 0) -> None:
        """Start K thresholds at `value` logits; modes other than "fixed" start at 0.

        Raises:
            ValueError: the mode is unknown, or cap is not positive.
        """
        super().__init__()
        _choose("threshold", mode, THRESHOLDS)
        if not cap > 0:
            raise ValueError(f"cap is {cap}; it must be more than 0 logits")
        self.mode, self.cap = mode, cap
        self.start = float(value) if mode == "fixed" else 0.0
        self.register_buffer("value", torch.full((k,), self.start))

    def reset(self) -> None:
        """Reset to the start value, as the released code does each epoch."""
        self.value.fill_(self.start)

    @torch.no_grad()
    def update(
        self, image_text: Tensor, image_negative: Tensor, valid: Tensor, group: Group = None
    ) -> None:
        """Set theta for the next step from this step's logits [b], [b, K] and their mask [b, K]."""
        if self.mode == "fixed":
            return
        if self.mode == "released":  # mean S(I, T) over all images, with or without negatives
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
        known = (count > 0) & new.isfinite()  # a NaN must not stay in theta
        self.value.copy_(torch.where(known, new.clamp(0, self.cap), self.value))


# The loss of a step


def ce_clip_loss(*features: Any, group: Group = None, **named: Any) -> dict[str, Tensor]:
    """L = itc + imc_weight · imc + cmr_weight · cmr + own_weight · own, in float32 (float64 stays).

    In a process group every rank passes its own b rows; after DDP has averaged the gradients, they
    equal those of a single process with the whole batch. The fused paths compute the gradients in
    the forward pass and keep nothing else: no second backward, no second derivative.

    Args:
        *features: the tensors of `CEClipLoss.forward`, by position or by name.
        group: the process group, or None for the default one.
        **named: `thresholds`, theta in logits [K] (default 0), and the fields of `Options`.

    Returns:
        Scalars `loss` (of the global batch, with gradient), `itc`, `imc`, `cmr` and `own`, and the
        logits `image_text` [b] and `image_negative` [b, K] for `RankThreshold.update`, all but
        `loss` without gradient.

    Raises:
        ValueError: shapes, dtypes, mask or options do not fit, or ranks hold unequal batches.
    """
    given = dict(**dict(zip(TENSORS[: len(features)], features, strict=True)), **named)
    return _loss([given.pop(name, None) for name in TENSORS], _options(given), group)


def ce_clip_loss_and_grads(*features: Any, **named: Any) -> tuple[dict[str, Tensor], ...]:
    """`ce_clip_loss` and the gradient of its loss by each input, for cached gradients.

    Args:
        *features: as in `ce_clip_loss`.
        **named: as in `ce_clip_loss`.

    Returns:
        the loss's dict without gradients, and by name each input's gradient, of its shape.
    """
    given = dict(**dict(zip(TENSORS[: len(features)], features, strict=True)), **named)
    leaves: dict[str, Tensor] = {}
    for name in TENSORS:
        if name.endswith(("features", "scale", "bias")) and given.get(name) is not None:
            tensor = torch.as_tensor(given[name])  # an int has no gradient
            floats = tensor if tensor.is_floating_point() else tensor.float()
            leaves[name] = floats.detach().requires_grad_()
    with torch.enable_grad():
        out = ce_clip_loss(**{**given, **leaves})
        grads = torch.autograd.grad(out["loss"], list(leaves.values()), materialize_grads=True)
    return {k: v.detach() for k, v in out.items()}, dict(zip(leaves, grads, strict=True))


def _loss(given: Sequence[Any], o: Options, group: Group) -> dict[str, Tensor]:
    """`ce_clip_loss` of the TENSORS, with validated options."""
    x = _inputs(given, o)
    kind, dtype = x.images.device.type, x.images.dtype
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != torch.float32
    half = autocast or dtype in (torch.float16, torch.bfloat16)
    kernels = triton is not None and (kind == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    operands, backend = o.operands, o.backend
    if operands == "auto":
        operands = "bfloat16" if half and kind == "cuda" else "float32"
    if backend == "auto":
        small = len(x.images) * (len(x.images) + x.valid.numel()) <= SMALL
        small = small and _world(group)[1] == 1 and not torch.compiler.is_compiling()
        backend = "triton" if operands == "bfloat16" and kernels else "torch"
        if small or kind not in ("cpu", "cuda"):
            backend = "plain"
        elif kind == "cuda" and backend == "torch":
            _warn_once("losses.py runs without Triton kernels: they need triton and bf16 or fp16")
    if backend == "triton" and not kernels:
        raise ValueError("backend is 'triton', which needs a CUDA device and the package triton")
    o = o._replace(backend=backend, operands=operands if backend == "triton" else "float32")
    if o.backend == "plain":
        with torch.autocast(x.images.device.type, enabled=False):
            loss, parts, true, own = _reference(_clean(x), o, group)
    else:
        needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in x]
        if torch.compiler.is_compiling():
            alone = _world(group)[1] == 1
            name = "" if alone else (group or dist.group.WORLD).group_name  # type: ignore
            loss, parts, true, own, *_ = _fused_op(*x, *o, needs, name)
        else:
            loss, parts, true, own, *_ = _Fused.apply(*x, o, needs, group)
    terms = dict(zip(("itc", "imc", "cmr", "own"), parts.detach().unbind(), strict=True))
    return {"loss": loss, **terms, "image_text": true.detach(), "image_negative": own.detach()}


def _options(given: dict[str, Any]) -> Options:
    for name, value in given.items():
        if name not in Options._fields:
            raise ValueError(f"unknown option {name!r}; there are {', '.join(Options._fields)}")
        number = type(value) in (int, float) and math.isfinite(value)
        if name in WORDS:
            fits, wanted = value in WORDS[name], f"one of {', '.join(WORDS[name])}"
        elif isinstance(Options._field_defaults[name], bool):
            fits, wanted = isinstance(value, bool), "True or False"
        elif name == "label_smoothing":
            fits, wanted = number and 0 <= value < 1, "a number from 0 to below 1"
        elif name == "focal_gamma":
            fits, wanted = number and (value == 0 or value >= 1), "0, or a number of 1 or more"
        elif name == "imc_offset":
            fits, wanted = number, "a finite number"
        else:
            fits, wanted = number and value >= 0, "a finite number, 0 or more"
        if not fits:
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    cast: dict[str, Any] = {k: float(v) if type(v) is int else v for k, v in given.items()}
    return Options(**cast)


def _choose(name: str, value: str, wanted: Sequence[str]) -> None:
    if value not in wanted:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(wanted)}")


def _inputs(given: Sequence[Any], o: Options) -> Inputs:
    """Check shapes, dtypes and masks; fill in defaults."""
    images, texts, scale, negatives, valid, positives, positive_valid, bias, thresholds = given
    if images.dim() != 2 or not len(images) or not images.is_floating_point():
        was = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"image_features are {was}; they must be floats [B, D], B > 0")
    if texts is None or scale is None:
        raise ValueError("text_features or logit_scale is missing")
    (b, d), forgotten = images.shape, valid is None
    if negatives is None and valid is not None and valid.numel():
        raise ValueError("valid is given, but negative_features are missing")
    negatives = images.new_zeros(b, 0, d) if negatives is None else negatives
    k = negatives.shape[1] if negatives.dim() == 3 else -1
    every = images.new_ones(b, max(k, 0) + 1, dtype=torch.bool)
    valid = every[:, 1:] if valid is None else valid
    positive_valid = every[:, 0] if positive_valid is None else positive_valid
    thresholds = images.new_zeros(max(k, 0)) if thresholds is None else thresholds
    scale = torch.as_tensor(scale, device=images.device)
    bias = None if bias is None else torch.as_tensor(bias, device=images.device)
    encoded = valid if o.mask_invalid else every[:, 1:]
    for name, tensor, shape in (
        ("image_features", images, (b, d)),
        ("text_features", texts, (b, d)),
        ("negative_features", negatives, (b, k, d)),
        ("positive_features", positives, (b, d)),
        ("thresholds", thresholds, (k,)),
        ("valid", valid, (b, k)),
        ("positive_valid", positive_valid, (b,)),
        ("logit_scale", scale, ()),
        ("logit_bias", bias, ()),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape and (shape or tensor.numel() != 1):
            sizes = ", ".join("K" if n == -1 else str(n) for n in shape)
            wanted = f"[{sizes}]" if shape else "a scalar"
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {wanted}")
        mask = name.endswith("valid")
        if shape and not (tensor.dtype == torch.bool if mask else tensor.is_floating_point()):
            kind = "a bool mask" if mask else "of floats"
            raise ValueError(f"{name} is {tensor.dtype}; it must be {kind}")
        if o.check and name in ("image_features", "text_features", "negative_features"):
            norms = tensor.detach().float().norm(dim=-1)  # synchronises with the device
            norms = norms[encoded] if tensor.dim() == 3 else norms
            if forgotten and tensor.dim() == 3 and (norms == 0).any():
                raise ValueError(f"{name} hold rows of zeros; pass `valid` to leave them out")
            worst = (norms - 1).abs().max() if norms.numel() else torch.zeros(())
            if not worst < 0.02:
                raise ValueError(
                    f"{name} are not unit vectors (a norm is off by {float(worst):.3g}); "
                    "pass torch.nn.functional.normalize(features, dim=-1)"
                )
    if o.imc == "paired" and o.imc_weight and k > 0 and positives is None:
        raise ValueError(
            "imc 'paired' needs positive_features, another caption of each image; without one "
            "use imc='repulsion'"
        )
    scale, bias = scale.reshape(()), None if bias is None else bias.reshape(())
    return Inputs(
        images, texts, scale, negatives, valid, positives, positive_valid, bias, thresholds, encoded
    )


def _clean(x: Inputs) -> Inputs:
    """Float32 (float64 stays), with zeros where masked, because NaN times 0 is NaN."""
    dtype = torch.promote_types(x.images.dtype, torch.float32)
    x = Inputs._make(t if t is None or t.dtype == torch.bool else t.to(dtype) for t in x)
    if not x.encoded.all():
        x = x._replace(negatives=torch.where(x.encoded[..., None], x.negatives, 0.0))
    if x.positives is not None and not x.positive_valid.all():
        x = x._replace(positives=torch.where(x.positive_valid[:, None], x.positives, 0.0))
    return x


class CEClipLoss(nn.Module):
    """The loss of a training step, with adaptive thresholds as a buffer.

    A drop-in replacement for open_clip's `ClipLoss`: pass output_dict as open_clip does. Save and
    load `state_dict()` with your checkpoint, or thresholds start at 0 again. `needs_positives` and
    `needs_negatives` say which features the loss reads.
    """

    def __init__(
        self,
        recipe: str = "ce-clip",
        *,
        types: Sequence[str] = NEGATIVE_TYPES,
        group: Group = None,
        threshold: str | None = None,
        cap: float = 10.0,
        fixed_threshold: float = 5.0,
        reset_each_epoch: bool | None = None,
        **options: Any,
    ) -> None:
        """Take the options of a recipe; keywords override them.

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
        self._options = o = _options(chosen | options)
        self.options: dict[str, Any] = o._asdict()
        intra = o.imc != "none" and o.imc_weight != 0
        self.needs_positives = o.imc == "paired" and intra
        self.needs_negatives = bool(o.negatives_in_itc or intra or o.cmr_weight or o.own_weight)

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
        """Compute the loss with the current thresholds, then update them in training mode.

        Args:
            image_features: unit-length images [b, D].
            text_features: unit-length captions [b, D].
            logit_scale: scalar, already exponentiated.
            negative_features: unit-length negatives [b, K, D], K in the order of `types`; rows that
                are not valid may hold anything, NaN too.
            valid: which negatives exist [b, K] bool; None means all.
            positive_features: another caption of each image [b, D], for imc "paired".
            positive_valid: which of those exist [b] bool; None means all.
            logit_bias: scalar; if given, itc is SigLIP's.
            output_dict: as open_clip asks: False for the loss; True for weighted parts that sum to
                it, `contrastive_loss` (which has all the gradient), `imc_loss`, `cmr_loss` ...
            update: whether to update thresholds; with open_clip's --accum-freq True only in the
                last call of a step.

        Returns:
            Scalars `loss` (the only one with a gradient), `itc`, `imc`, `cmr`, `own`, and
            `threshold_<type>`, the margins that this loss was computed with.

        Raises:
            ValueError: shapes do not fit, or K is not the number of types.
        """
        k = 0 if negative_features is None else sum(negative_features.shape[1:-1])
        if k not in (0, len(self.types)):
            raise ValueError(f"negative_features have K = {k}; there are {len(self.types)} types")
        if self.needs_negatives and not k:
            _warn_once(f"recipe {self.recipe} gets no negative_features: it trains as plain CLIP")
        if self.threshold.value.device != image_features.device:
            self.threshold.to(image_features.device)
        theta = self.threshold.value.clone()
        negatives, mask = (negative_features, valid) if self.needs_negatives else (None, None)
        margins = theta if k and self.needs_negatives else None
        features = (image_features, text_features, logit_scale, negatives, mask)
        more = (positive_features, positive_valid, logit_bias, margins)
        out = _loss((*features, *more), self._options, self.group)
        true, wrong = out.pop("image_text"), out.pop("image_negative")
        if self.training and update and wrong.shape[1]:
            exist = torch.ones_like(wrong, dtype=torch.bool) if valid is None else valid
            self.threshold.update(true, wrong, exist, self.group)
        if output_dict is not None:
            weights = {name: self.options[f"{name}_weight"] for name in ("imc", "cmr", "own")}
            parts = {f"{name}_loss": w * out[name] for name, w in weights.items() if w}
            rest = out["loss"] - sum(parts.values())
            return {"contrastive_loss": rest, **parts} if output_dict else out["loss"]
        names = [f"threshold_{name}" for name in self.types]
        return {**out, **dict(zip(names, theta.unbind(), strict=True))}


TENSORS = [*list(inspect.signature(CEClipLoss.forward).parameters)[1:9], "thresholds"]


# The fused core
#
# The loss is a scalar, so gradients are computed in the forward pass and scaled in the backward
# pass. All large terms are log-sum-exps over rows of logits S = q k^T. A chunk of rows of S is
# computed in one workspace and becomes X = exp(S - offset) in place, with an offset near the row's
# maximum. Rows are not normalised: let total = log(e^extra + sum_j e^S_j), where `extra` is the
# log-sum-exp of the rest of the row's denominator. With the row's weight w and
# f = w e^(offset - total),
#   d/dq = f (X k)   and   d/dk = X^T (f q),
# which scales the small operands instead of X. Chunks stack images and captions, because both have
# the negatives as keys. Pairs need their column sums first: they are computed twice, or kept if
# small. Negatives are not gathered: each rank multiplies all gathered images and captions with its
# own negatives, and ranks exchange one number per row. So gradients of negatives stay local, and
# those of images and captions are summed over ranks once. All derivatives are multiplied by the
# number of ranks, because DistributedDataParallel divides by it.


class _Step(NamedTuple):
    """Shared state of one fused step; gradients that are not needed are None."""

    x: Inputs
    o: Options
    group: Group
    here: slice  # this rank's rows in `everyone`
    everyone: tuple[Tensor, Tensor]  # all ranks' images and captions, [B, D] each
    keys: Tensor  # [M, D], this rank's encoded negatives
    d_everyone: tuple[Tensor | None, Tensor | None]  # [B, D] each
    d_negatives: Tensor | None  # [b, K, D]
    d_keys: Tensor | None  # [M, D]
    work: Tensor  # the workspace, flat, in the dtype of the operands of matrix products


class _Own(NamedTuple):
    """Logits of images and captions with their own texts, or the loss's derivatives by them."""

    true: Tensor  # S(I, T) [b]
    negative: Tensor  # S(I, N) [b, K]
    text: Tensor  # S(T, N) [b, K]
    numerator: Tensor  # n of the intra-modal loss [b]


def _fused(x: Inputs, o: Options, needs: Sequence[bool], group: Group) -> list[Tensor]:
    """Loss, terms [4], own logits S(I, T) [b] and S(I, N) [b, K], then gradients by the inputs."""
    raw, x = x, _clean(x)
    _equal_rows(x.images, group)
    step = _make_step(x, o, needs, group)
    first, k = None, x.negatives.shape[1]  # the target of imc "released"
    if o.imc == "released" and k:
        first = _gather(x.negatives[0, 0], group)[0]
    numerator, counts = _numerator(x, o, first)
    of_images, of_texts = (
        x.scale * (x.negatives @ t[..., None])[..., 0] for t in (x.images, x.texts)
    )
    own = _Own(x.scale * (x.images * x.texts).sum(dim=1), of_images, of_texts, numerator)
    terms, d, share = _own_terms(step, own, counts)

    # Towers with negatives in the denominator, the rest of that denominator, and row weights.
    blocks = []
    alone = numerator if first is None else torch.full_like(numerator, -torch.inf)
    if x.bias is None:
        pairs, rows, columns = _pair_sums(step)
        if o.negatives_in_itc and k:
            blocks.append((0, rows, torch.full_like(rows, 0.5 / len(rows))))
    if _whole_batch(o) and k:
        blocks.append((1, alone.double(), share.double()))
    totals = _negatives_softmax(step, blocks)
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
        itc, d_bias = _sigmoid_contrast(step, own.true, x.bias)
    grads = {**_gather_grads(step, own, d, first, of_captions), "bias": d_bias}
    values = torch.stack([t.to(x.scale.dtype) for t in (itc, *terms)])
    values = _sum_over_ranks(values, group) / _world(group)[1]
    weights = values.new_tensor([1.0, o.imc_weight, o.cmr_weight, o.own_weight])
    found = []
    for name, t, wanted in zip(Inputs._fields, raw, needs, strict=True):
        grad = grads.get(name)
        if t is None or not wanted:
            grad = t = raw.images.new_empty(0)
        elif grad is None:  # positives that no term reads
            grad = t.new_zeros(t.shape)
        found.append(grad.to(t.dtype).reshape(t.shape).contiguous())
    return [(values * weights).sum(), values, own.true, own.negative, *found]


def _make_step(x: Inputs, o: Options, needs: Sequence[bool], group: Group) -> _Step:
    need = dict(zip(Inputs._fields, needs, strict=True))
    rank, b, k = _world(group)[0], len(x.images), x.negatives.shape[1]
    everyone = (_gather(x.images, group).flatten(0, 1), _gather(x.texts, group).flatten(0, 1))
    keys, encoded = x.negatives.flatten(0, 1), x.encoded.flatten()
    d_negatives = x.negatives.new_zeros(x.negatives.shape) if need["negatives"] else None
    d_keys = None if d_negatives is None else d_negatives.view_as(keys)
    if not encoded.all():
        keys = keys[encoded]
        d_keys = None if d_negatives is None else torch.zeros_like(keys)
    # The derivative by scale is computed from the gradients of features.
    images = need["images"] or (need["scale"] and not (need["texts"] and need["negatives"]))
    texts = need["texts"] or (need["scale"] and _whole_batch(o))
    d_images = torch.zeros_like(everyone[0]) if images else None
    d_texts = torch.zeros_like(everyone[1]) if texts else None
    operands = torch.bfloat16 if o.operands == "bfloat16" else x.images.dtype
    mib = o.workspace_mib or (512 if x.images.is_cuda else 32)
    # At most a quarter of all logits: first-touch allocation is slow.
    most, least = len(everyone[0]) * max(b, b * k) // 2, 2 * max(b * k, len(everyone[0]))
    size = max(min(int(mib * 2**20) // operands.itemsize, most), least)
    work, here = x.images.new_empty(size, dtype=operands), slice(rank * b, (rank + 1) * b)
    return _Step(x, o, group, here, everyone, keys, (d_images, d_texts), d_negatives, d_keys, work)


def _own_terms(step: _Step, own: _Own, counts: Tensor) -> tuple[list[Tensor], _Own, Tensor]:
    """The terms imc, cmr and own, their derivatives, and the rows' weights in imc [b]."""
    x, o, world = step.x, step.o, _world(step.group)[1]
    has = x.valid.any(dim=1)
    sums = torch.stack([x.valid.sum(), has.sum(), counts.sum()]).to(own.true.dtype)
    valid, with_negative, counting = world / _sum_over_ranks(sums, step.group).clamp(min=1)
    share = o.imc_weight * counting * counts.to(own.true.dtype)
    d_text, d_numerator, imc = torch.zeros_like(own.text), torch.zeros_like(own.true), 0 * x.scale
    if o.imc != "none" and o.imc_weight and not _whole_batch(o):
        text = own.text.masked_fill(~x.encoded, -torch.inf)
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
    """Logits of own images with all captions if they fit; log-sum-exps of rows [b], columns [B].

    Sums are float64: near 100, half a unit in float32's last place changes probabilities by 4e-6.
    """
    x, texts, pairs = step.x, step.everyone[1], None
    if step.o.backend == "triton":
        row, column = _tiles("sums", x.images * x.scale, texts.to(step.work.dtype))
        rows, columns = row.double().logsumexp(dim=1), column.double().logsumexp(dim=0)
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
    """Log-sum-exp along a dimension, in float64; `other` is a buffer of the same shape."""
    top = logits.amax(dim=dim, keepdim=True)
    exps = torch.sub(logits, top, out=other).exp_()
    return top.squeeze(dim).double() + exps.sum(dim=dim).double().log()


def _pair_grads(step: _Step, pairs: Tensor | None, rows: Tensor, columns: Tensor) -> None:
    """Add the gradients of all S(I, T): (e^(S - row) + e^(S - column), minus 2 if true) / 2b."""
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
            _tiles("pairs", q, keys, at, first, row=row, column=columns.float())
        else:
            at = torch.mm(q, texts.T, out=at) if pairs is None else pairs[chunk]
            other = step.work[half : half + len(q) * n].view(-1, n)
            torch.sub(at, columns.to(q.dtype), out=other).exp_()
            at.sub_(row[:, None]).exp_().add_(other)
            at.diagonal(first).sub_(2)
        d_queries = None if d_images is None else d_images[step.here][chunk]
        _add_grads(at, q, keys, 0.5 / b, x.scale, d_queries, d_texts)


def _negatives_softmax(step: _Step, blocks: list[tuple[int, Tensor, Tensor]]) -> dict[int, Tensor]:
    """Add gradients of each tower's softmax over the negatives; returns totals [b] by tower.

    A block is a tower (0 images, 1 captions) and, for its rows [b]: the log-sum-exp of the rest of
    the denominator, and the derivative of the loss by the row's total.
    """
    if not blocks:
        return {}
    x, towers = step.x, [tower for tower, *_ in blocks]
    rows = torch.stack([torch.stack(row) for _, *row in blocks])  # [towers, 2, b]
    extra, weight = _gather(rows, step.group).permute(2, 1, 0, 3).flatten(2)  # [towers, B]
    totals = torch.empty_like(extra)
    keys = step.keys.to(step.work.dtype)
    width = max(1, x.encoded.numel() * len(towers))  # equal on all ranks, as chunks must be
    for chunk in _chunks(len(step.everyone[0]), step.work.numel() // width):
        q = torch.cat([step.everyone[tower][chunk] for tower in towers]) * x.scale
        e = extra[:, chunk].flatten()
        exps, offset, total = _exp_logits(step, q, keys, e)
        total = torch.logaddexp(e, _gather(total, step.group).logsumexp(dim=0))
        totals[:, chunk] = total.view(len(towers), -1)
        f = torch.where(total > -torch.inf, weight[:, chunk].flatten() * (offset - total).exp(), 0)
        f = f.to(q.dtype)[:, None]
        _add_grads(exps, q, keys, f, x.scale, None, step.d_keys)
        n = chunk.stop - chunk.start
        for i, tower in enumerate(towers):
            d, part = step.d_everyone[tower], slice(i * n, (i + 1) * n)
            if d is not None:
                _add_grads(exps[part], q, keys, f[part], x.scale, d[chunk], None)
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
        # Skip the pass for the maximum: e^x overflows above 88 and underflows below -87.  A row's
        # total is >= `floor`, its largest logit <= `bound`; a gap below 125 avoids both.
        floor = torch.maximum(extra, (q @ keys[0].to(q.dtype)).double()).to(q.dtype)
        bound = q.norm(dim=1) * keys.float().norm(dim=1).amax()
        if ((bound - floor) < 125).all():
            offset = torch.maximum(floor, bound - 70)
            sums, _ = _tiles("exp", q, keys, at, row=offset)
            return at, offset.double(), offset.double() + sums.sum(dim=1).double().log()
        at = at.float()
    logits = torch.mm(q, keys.T.to(q.dtype), out=at)
    top = logits.amax(dim=1)
    exps = torch.softmax(logits, dim=1, out=logits)  # the fastest exp on a CPU
    total = top.double() - exps.amax(dim=1).double().log()
    return exps.to(keys.dtype), total, total


def _sigmoid_contrast(step: _Step, true: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """SigLIP's loss: binary classification of each pair, and of each image with each negative.

    Returns this rank's part of the loss times the number of ranks, and its derivative by the bias.
    """
    x, o = step.x, step.o
    d_images, d_texts = step.d_everyone
    d_own = None if d_images is None else d_images[step.here]
    blocks = [(x.images, step.everyone[1], d_own, d_texts, step.here.start)]
    if o.negatives_in_itc and len(step.keys):
        blocks.append((step.everyone[0], step.keys, d_images, step.d_keys, -1))
    loss, d_bias = -(true + bias).mean(), torch.zeros_like(x.scale)
    share = 1 / len(x.images)
    for images, texts, d_queries, d_keys, start in blocks:
        keys = texts.to(step.work.dtype)
        for chunk in _chunks(len(images), step.work.numel() // 2 // len(keys)):
            q = images[chunk] * x.scale
            first = start + chunk.start if start >= 0 else -1  # the column of the first true pair
            at = step.work[: len(q) * len(keys)].view(len(q), len(keys))
            if o.backend == "triton":
                softplus, _ = _tiles("sigmoid", q, keys, at, first, bias=bias)
                softplus = softplus.sum()
            else:
                logits = torch.mm(q, keys.T, out=at).add_(bias)
                softplus = -F.logsigmoid(-logits).sum()  # F.softplus is linear above 20
                logits.sigmoid_()
                if first >= 0:
                    logits.diagonal(first).sub_(1)
            loss = loss + share * softplus
            d_bias = d_bias + share * at.sum(dtype=x.scale.dtype)
            d_chunk = None if d_queries is None else d_queries[chunk]
            _add_grads(at, q, keys, share, x.scale, d_chunk, d_keys)
    return loss, d_bias


def _gather_grads(
    step: _Step, own: _Own, d: _Own, first: Tensor | None, of_captions: Tensor
) -> dict[str, Tensor]:
    """Sum gradients over ranks, add those of the own terms, compute that of the scale."""
    x, o, s = step.x, step.o, step.x.scale
    if o.imc == "paper":
        d = d._replace(true=d.true + d.numerator)
    grads: dict[str, Any] = {"negatives": step.d_negatives, "positives": None}
    for name, total in zip(("images", "texts"), step.d_everyone, strict=True):
        grads[name] = None if total is None else _reduce_rows(total, step.group)
    if grads["images"] is not None:  # in place: the largest tensors of all
        grads["images"].addcmul_(s * d.true[:, None], x.texts)
        grads["images"][:, None].baddbmm_(s * d.negative[:, None], x.negatives)
    if grads["negatives"] is not None:
        if len(step.keys) < x.encoded.numel():
            grads["negatives"][x.encoded] = step.d_keys
        grads["negatives"].addcmul_((s * d.negative)[..., None], x.images[:, None])
        grads["negatives"].addcmul_((s * d.text)[..., None], x.texts[:, None])
    if grads["texts"] is not None:
        grads["texts"].addcmul_(s * d.true[:, None], x.images)
        grads["texts"][:, None].baddbmm_(s * d.text[:, None], x.negatives)
    # The numerators S(T, T+), or S(T, first) of "released", have gradients on both sides.
    towards, pull = first, s * d.numerator[:, None]
    if o.imc == "paired" and x.positives is not None:
        grads["positives"], towards = pull * x.texts, x.positives
    if first is not None:
        sums = _sum_over_ranks((pull * x.texts).sum(dim=0), step.group)
        if grads["negatives"] is not None and step.here.start == 0:
            grads["negatives"][0, 0] += sums * x.encoded[0, 0]
    if grads["texts"] is not None and towards is not None:
        grads["texts"].addcmul_(pull, towards.expand_as(x.texts))
    # The scale's gradient is the sum of S dL/dS over all logits S, which are linear in features:
    # <I, dI> is the sum over logits of images; logits of captions with texts are added. If images
    # are frozen, <T, dT> + <N, dN> counts all logits once, captions with negatives twice.
    of_captions = of_captions + (own.text * d.text).sum()
    of_numerator = (own.numerator * d.numerator).sum()
    if grads["images"] is not None:
        of_images = (x.images * grads["images"]).sum()
        total = of_images + of_captions + (0 if o.imc == "paper" else of_numerator)
    elif grads["texts"] is not None and grads["negatives"] is not None:
        both = (x.texts * grads["texts"]).sum() + (x.negatives * grads["negatives"]).sum()
        total = both - of_captions + {"released": -1, "repulsion": 1}.get(o.imc, 0) * of_numerator
    else:
        total = torch.zeros_like(s)  # not needed
    return {**grads, "scale": total / s}


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, max(1, size)):
        yield slice(start, min(n, start + max(1, size)))


def _add_grads(
    at: Tensor, q: Tensor, keys: Tensor, weight: Any, scale: Tensor, d_q: Any, d_keys: Any
) -> None:
    """Add weight (at k) scale to d_q, and at^T (weight q) to d_keys, in float32 at least."""
    half: Any = {"out_dtype": torch.float32} if at.dtype == torch.bfloat16 else {}
    if d_q is not None:
        d_q += torch.mm(at, keys, **half) * (weight * scale)
    if d_keys is not None and half:
        d_keys += torch.mm(at.T, (q * weight).to(at.dtype), **half)
    elif d_keys is not None:
        d_keys.addmm_(at.T, q * weight)


def _keep_grads(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.needs, ctx.inputs = inputs[-2], len(inputs)
    ctx.save_for_backward(*output[4:])
    ctx.set_materialize_grads(False)


def _scale_grads(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    found = [None] * len(ctx.needs)
    if grads[0] is not None:
        # In place: a copy would be as large as all features.
        kept = zip(ctx.saved_tensors, ctx.needs, strict=True)
        found = [x.mul_(grads[0]) if wanted else None for x, wanted in kept]
    return (*found, *[None] * (ctx.inputs - len(found)))


class _Fused(torch.autograd.Function):  # the fused core for autograd
    setup_context = staticmethod(_keep_grads)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *tensors, o, needs, group = inputs
        with torch.autocast(tensors[0].device.type, enabled=False):
            return tuple(_fused(Inputs(*tensors), o, needs, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _scale_grads(ctx, grads)


# The same as a custom operator, opaque to torch.compile; its first call imports 900 modules
KINDS = {**Inputs.__annotations__, **Options.__annotations__}  # of the operator's arguments
NAMED = [f"{x.__forward_arg__.replace(' | None', '?')} {name}" for name, x in KINDS.items()]
SCHEMA = f"({', '.join(NAMED)}, bool[] needs, str group) -> Tensor[]"


@torch.library.custom_op("ce_clip::fused", mutates_args=(), schema=SCHEMA)
def _fused_op(*arguments: Any) -> list[Tensor]:
    *inputs, needs, name = arguments
    tensors, o = inputs[: len(Inputs._fields)], Options(*inputs[len(Inputs._fields) :])
    group = torch.distributed.distributed_c10d._resolve_process_group(name) if name else None
    return list(_Fused.forward(*tensors, o, needs, group))


@_fused_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    x, needs = Inputs(*arguments[: len(Inputs._fields)]), arguments[-2]
    scalar = x.images.new_empty((), dtype=torch.promote_types(x.images.dtype, torch.float32))
    own = [scalar.new_empty(4), scalar.new_empty(len(x.images)), scalar.new_empty(x.valid.shape)]
    grads = [
        t.new_empty(t.shape) if t is not None and n else x.images.new_empty(0)
        for t, n in zip(x, needs, strict=True)
    ]
    return [scalar, *own, *grads]


_fused_op.register_autograd(_scale_grads, setup_context=_keep_grads)


# Ranks


def gather_rows(x: Tensor, group: Group = None) -> Tensor:
    """Gather the rows of all ranks, with gradients: [b, ...] -> [W·b, ...] in the order of ranks.

    A row's gradient is summed over the losses of all ranks. Without a process group x is returned.

    Raises:
        ValueError: ranks hold different numbers of rows.
    """
    if _world(group)[1] == 1:
        return x
    _equal_rows(x, group)
    return _GatherRows.apply(x, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(x, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_rows(grad, ctx.group), None


def _world(group: Group) -> tuple[int, int]:
    """Rank and number of ranks; 0 and 1 outside a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _gather(x: Tensor, group: Group) -> Tensor:
    """Stack the equally shaped tensors of all ranks, [...] -> [W, ...], without gradients."""
    if _world(group)[1] == 1:
        return x[None]
    found = x.new_empty(_world(group)[1], *x.shape)
    dist.all_gather(list(found.unbind()), x.contiguous(), group=group)
    return found


def _reduce_rows(x: Tensor, group: Group) -> Tensor:
    """Sum [W·b, ...] over ranks and return this rank's rows [b, ...] (reduce-scatter)."""
    parts = list(x.contiguous().chunk(_world(group)[1]))
    if len(parts) == 1:
        return x
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts, group=group)
    return mine


def _sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    if _world(group)[1] > 1:
        x = x.clone()
        dist.all_reduce(x, group=group)
    return x


def _equal_rows(x: Tensor, group: Group) -> None:
    """Refuse unequal local batches: gathering would hang or mix up rows."""
    if _world(group)[1] > 1:
        rows = _gather(torch.tensor(len(x), device=x.device), group).tolist()
        if len(set(rows)) > 1:
            raise ValueError(f"ranks hold {min(rows)} and {max(rows)} rows; they must be equal")


# Kernels: compute one tile of logits q k^T, and functions of it, in registers

TILE_MODES = ("exp", "sums", "pairs", "sigmoid")
TILE = (128, 128, 64)  # rows, columns, depth: no spills on sm_90, 96 KiB of shared memory


def _tiles(
    mode: str, q: Tensor, keys: Tensor, out: Any = None, first: int = -1, **vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Run `_tile` over all logits of scaled queries q [n, D] and keys [M, D]; `out` is [n, M].

    Modes: "exp" writes exp(S - row) and partial sums of its rows; "sums" only partial log-sum-exps
    of rows and columns; "pairs" writes exp(S - row) + exp(S - column), minus 2 on the diagonal,
    which starts in column `first` (-1: none); "sigmoid" writes sigmoid(S + bias), minus 1 on the
    diagonal, and row sums of softplus. Operands have the keys' dtype. `vectors` are row [n],
    column [M] and bias []. Returns partial results of rows [n, tiles across] and of columns
    [tiles down, M].
    """
    n, m, width = len(q), len(keys), q.shape[1]
    rows, columns, depth = TILE if q.is_cuda else (32, 32, 32)
    down, across = triton.cdiv(n, rows), triton.cdiv(m, columns)
    of_rows, of_columns = q.new_empty(n, across), q.new_empty(down, m)
    names, nothing = ("row", "column", "bias"), q.new_empty(1)
    given = [vectors.get(name, nothing).contiguous() for name in names]
    out = of_rows if out is None else out
    given = [q.to(keys.dtype).contiguous(), keys.contiguous(), out, *given, of_rows, of_columns]
    sizes = (n, m, first, width, TILE_MODES.index(mode), rows, columns, depth)
    _kernel[(down * across,)](*given, *sizes, num_warps=8, num_stages=3)
    return of_rows, of_columns


# fmt: off
def _tile(  # type: ignore[no-untyped-def]
    q, k, out, row, column, bias, of_rows, of_columns, n, m, first,
    WIDTH: tl.constexpr, MODE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,  # noqa: N803
):
    # fmt: on
    """One tile of logits; see `_tiles`."""
    across, down = tl.cdiv(m, COLUMNS), tl.cdiv(n, ROWS)
    # Eight tiles down, then one across, so that neighbouring programs share operands in the cache.
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


_kernel: Any = triton and triton.jit(_tile)

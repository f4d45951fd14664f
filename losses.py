# SPDX-License-Identifier: MIT
"""The losses of CE-CLIP, exact and in plain torch; copy this file into any code base.

A batch has B images I, their captions T and up to K hard negatives T_1 ... T_K of each caption.
With unit-length features and s = logit_scale, similarities are logits S(a, b) = s <a, b>.

  L = itc + 0.2 imc + 0.4 cmr

  itc  image-text contrast with the hard negatives in the images' denominator
  imc  intra-modal contrast: a caption is nearer to another true caption than to its negatives
  cmr  cross-modal rank: a true caption beats negative k by a margin theta_k, which grows as the
       model learns (the curriculum)

Paper: Zhang, Awal and Agrawal, "Contrasting Intra-Modal and Ranking Cross-Modal Hard Negatives to
Enhance Visio-Linguistic Compositional Understanding", CVPR 2024, section 3.

  loss = CEClipLoss("ce-clip")
  out = loss(image_features, text_features, logit_scale.exp(), negative_features, valid,
             positive_features)  # another caption of each image; without one: imc="repulsion"
  out["loss"].backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "NEGATIVE_TYPES",
    "RECIPES",
    "CEClipLoss",
    "RankThreshold",
    "ce_clip_loss",
    "ce_clip_loss_and_grads",
    "gather_rows",
    "intra_modal_loss",
    "own_negatives_loss",
    "rank_loss",
]

NEGATIVE_TYPES = ("relation", "attribute", "object", "action")
IMC_VARIANTS = ("none", "paired", "paper", "repulsion", "released")
THRESHOLDS = ("adaptive", "fixed", "max", "released")

# What a recipe switches on.  Options that it does not name have the defaults of CEClipLoss.
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


def _similarity(a: Tensor, b: Tensor, logit_scale: Tensor) -> Tensor:
    """Logits of all pairs, [..., N, D] x [..., M, D] -> [..., N, M]; all products are made here."""
    return logit_scale * (a @ b.mT)


def _world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and number of ranks; 0 and 1 outside a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward adds up what every rank's loss says of these rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(_world(group)[1])]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        start = _world(ctx.group)[0] * ctx.rows
        return grad[start : start + ctx.rows], None


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather the rows of all ranks, with gradients: [b, ...] -> [W·b, ...] in the order of ranks.

    The gradient of a row is the sum of what all ranks' losses want of it.  Without a process group
    x is returned as it is.

    Raises:
        ValueError: ranks hold different numbers of rows.
    """
    world = _world(group)[1]
    if world == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device), group=group)
    rows = [int(size) for size in sizes]
    if len(set(rows)) > 1:
        raise ValueError(
            f"ranks hold {min(rows)} and {max(rows)} rows; local batches must be equal"
        )
    return _GatherRows.apply(x, group)


def _sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a tensor without gradient over all ranks."""
    x = x.detach().clone()
    if _world(group)[1] > 1:
        dist.all_reduce(x, group=group)
    return x


def _global_mean(values: Tensor, count: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over all ranks' `count` entries, W-fold: DDP divides gradients by W again.

    Args:
        values: sum of this rank's entries, a scalar with gradient.
        count: how many entries this rank has, a scalar.
        group: the process group, or None for the default one.
    """
    total = _sum_over_ranks(count.to(values.dtype), group)
    return _world(group)[1] * values / total.clamp(min=1)


def _own_rows(x: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor:
    start = _world(group)[0] * rows
    return x[start : start + rows]


def _negatives_logsumexp(
    anchors: Tensor,
    negatives: Tensor,
    valid: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """log sum e^S(a, h) over all negatives h of the global batch, for this rank's anchors a.

    Negatives never travel: each rank sums over its own for the anchors of all ranks, and only those
    partial sums, one number for an anchor, are exchanged.

    Args:
        anchors: the gathered images or captions [B, D].
        negatives: this rank's negatives [b, K, D].
        valid: which of them count [b, K].
        logit_scale: scalar.
        group: the process group, or None for the default one.

    Returns:
        [b]; so low that it adds nothing where no negative is valid.
    """
    logits = _similarity(anchors, negatives.flatten(0, 1), logit_scale)  # [B, b·K]
    lowest = torch.finfo(logits.dtype).min / 2
    partial = logits.masked_fill(~valid.flatten(), lowest).logsumexp(dim=1)  # [B]
    if _world(group)[1] > 1:
        partial = _GatherRows.apply(partial[None], group).logsumexp(dim=0)
    return _own_rows(partial, len(negatives), group)


def _image_text_contrast(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    negatives: Tensor | None,
    valid: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Half of images to texts (with hard negatives) plus half of texts to images (without)."""
    rows = len(images)
    all_images, all_texts = gather_rows(images, group), gather_rows(texts, group)
    own = _own_rows(torch.arange(len(all_images), device=images.device), rows, group)
    to_text = _similarity(images, all_texts, logit_scale)  # [b, B]
    to_image = _similarity(texts, all_images, logit_scale)
    true = to_text.gather(1, own[:, None])[:, 0]
    denominator = to_text.logsumexp(dim=1)
    if negatives is not None and valid is not None:
        hard = _negatives_logsumexp(all_images, negatives, valid, logit_scale, group)
        denominator = torch.logaddexp(denominator, hard)
    return ((denominator - true).mean() + F.cross_entropy(to_image, own)) / 2


def _sigmoid_contrast(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    negatives: Tensor | None,
    valid: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """SigLIP's loss: each pair of an image and a text is a question of its own, answered yes or no.

    Every valid negative of the batch is one more text, wrong for every image.
    """
    rows = len(images)
    all_images, all_texts = gather_rows(images, group), gather_rows(texts, group)
    own = _own_rows(torch.eye(len(all_images), device=images.device), rows, group)
    logits = _similarity(images, all_texts, logit_scale) + logit_bias
    total = -F.logsigmoid((2 * own - 1) * logits).sum()
    if negatives is not None and valid is not None:
        wrong = _similarity(all_images, negatives.flatten(0, 1), logit_scale) + logit_bias
        total = total - F.logsigmoid(-wrong).masked_fill(~valid.flatten(), 0).sum()
    return total / rows


def rank_loss(
    image_text: Tensor,
    image_negative: Tensor,
    thresholds: Tensor,
    valid: Tensor,
    *,
    mean: str = "valid",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-modal rank loss (section 3.3): mean of relu(theta_k + S(I, T_k) - S(I, T)).

    Args:
        image_text: logits of the true pairs S(I, T) [B].
        image_negative: logits S(I, T_k) of each image and its own negatives [B, K].
        thresholds: theta, in logits [K].
        valid: which negatives exist [B, K] bool.
        mean: over the "valid" entries, or over "all" K·B slots as in the released code.
        group: the process group, or None for the default one.

    Returns:
        A scalar in logits; 0 where nothing is valid.
    """
    gap = image_text[:, None] - image_negative
    excess = F.relu(thresholds - gap).masked_fill(~valid, 0).sum()
    count = valid.sum() if mean == "valid" else torch.tensor(valid.numel(), device=valid.device)
    return _global_mean(excess, count, group)


def own_negatives_loss(
    image_text: Tensor,
    image_negative: Tensor,
    valid: Tensor,
    *,
    focal_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Softmax of each image over its caption and its own negatives, L = -sum_c y_c (1-p_c)^g log p_c.

    With gamma 0 and no smoothing it is DeGLA's image-grounded contrast (arXiv 2504.16801); with 2
    and 0.02 the global hard-negative loss of FSC-CLIP (arXiv 2410.05210), which spares what is
    already told apart and keeps near-synonyms near.

    Args:
        image_text: logits of the true pairs S(I, T) [B].
        image_negative: logits S(I, T_k) of each image and its own negatives [B, K].
        valid: which negatives exist [B, K] bool.
        focal_gamma: g, how much less a class counts that is already likely.
        label_smoothing: what the true caption gives up, shared by all classes that exist.
        group: the process group, or None for the default one.

    Returns:
        A scalar in nats, the mean over items with a negative; 0 where none has.
    """
    logits = torch.cat([image_text[:, None], image_negative], dim=1)  # [B, 1 + K]
    exists = F.pad(valid, (1, 0), value=True)
    logits = logits.masked_fill(~exists, torch.finfo(logits.dtype).min / 2)
    log_p = logits.log_softmax(dim=1)
    share = label_smoothing / exists.sum(dim=1, keepdim=True)
    target = exists * share
    target[:, 0] += 1 - label_smoothing
    each = -(target * (1 - log_p.exp()) ** focal_gamma * log_p).masked_fill(~exists, 0).sum(dim=1)
    has = valid.any(dim=1)
    return _global_mean(each.masked_fill(~has, 0).sum(), has.sum(), group)


def intra_modal_loss(
    text_features: Tensor,
    negative_features: Tensor,
    logit_scale: Tensor,
    valid: Tensor,
    *,
    variant: str = "paired",
    positive_features: Tensor | None = None,
    positive_valid: Tensor | None = None,
    image_features: Tensor | None = None,
    offset: float = 0.0,
    mask_invalid: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Intra-modal contrast of captions and their hard negatives (section 3.2, equation 3).

    Args:
        text_features: captions [B, D].
        negative_features: their negatives [B, K, D].
        logit_scale: scalar, already exponentiated.
        valid: which negatives exist [B, K] bool.
        variant: what stands in the numerator, above the numerator plus own negatives:
            "paired" e^S(T, T+), T+ another caption of the image; items without one are left out;
            "paper" e^S(I, T), our best guess of equation 3; "repulsion" e^(s c), a constant;
            "released" the arbitrary first negative of the whole batch, above all negatives of it.
        positive_features: T+ [B, D], for "paired".
        positive_valid: which T+ exist [B] bool; None means all.
        image_features: I [B, D], for "paper".
        offset: c of "repulsion", a cosine.
        mask_invalid: "released" only: leave missing negatives out of the denominator.
        group: the process group, or None for the default one.

    Returns:
        A scalar; 0 where no item counts.

    Raises:
        ValueError: the variant is unknown, or lacks the features that it needs.
    """
    rows = torch.tensor(len(text_features), device=text_features.device)
    if variant == "released":
        counted = valid if mask_invalid else torch.ones_like(valid)
        everyone = gather_rows(text_features, group)
        total = _negatives_logsumexp(everyone, negative_features, counted, logit_scale, group)
        first = gather_rows(negative_features[:1, 0], group)[:1]  # [1, D], of the first rank
        target = _similarity(text_features, first, logit_scale)[:, 0]
        return _global_mean((total - target).sum(), rows, group)
    if variant == "paired" and positive_features is not None:
        numerator = _similarity(text_features[:, None], positive_features[:, None], logit_scale)
    elif variant == "paper" and image_features is not None:
        numerator = _similarity(text_features[:, None], image_features[:, None], logit_scale)
    elif variant == "repulsion":
        numerator = (logit_scale * offset).expand(len(text_features), 1, 1)
    elif variant in ("paired", "paper"):
        needed = "positive_features" if variant == "paired" else "image_features"
        raise ValueError(f"the {variant} intra-modal loss needs {needed}")
    else:
        raise ValueError(f"imc is {variant!r}; it must be one of {', '.join(IMC_VARIANTS)}")
    logits = _similarity(text_features[:, None], negative_features, logit_scale)[:, 0]  # [B, K]
    logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min / 2)
    numerator = numerator.reshape(-1, 1)  # [B, 1]
    each = torch.cat([numerator, logits], dim=1).logsumexp(dim=1) - numerator[:, 0]
    if variant == "paired" and positive_valid is not None:
        each, rows = each.masked_fill(~positive_valid, 0), positive_valid.sum()
    return _global_mean(each.sum(), rows, group)


class RankThreshold(nn.Module):
    """The margins theta of the rank loss, one for each type of negative: the curriculum.

    Modes, all clamped to [0, cap] and taken over the whole global batch of the previous step:
        adaptive: mean gap S(I, T) - S(I, T_k) over the valid negatives of type k (equation 6);
        max: the largest of these gaps, divided by 5;
        fixed: `value`, never changed;
        released: as adaptive, but the mean of S(I, T) is over all images of the batch, and that
            of S(I, T_k) over those that are not 0.
    A type without a valid negative keeps its theta.
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
        if mode not in THRESHOLDS:
            raise ValueError(f"threshold is {mode!r}; it must be one of {', '.join(THRESHOLDS)}")
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
        """Set theta for the next step from this step's logits [B], [B, K] and their mask [B, K]."""
        if self.mode == "fixed":
            return
        gap = (image_text[:, None] - image_negative).masked_fill(~valid, 0)
        if self.mode == "released":
            valid = valid & (image_negative != 0)
        count = _sum_over_ranks(valid.sum(0), group)
        if self.mode == "max":
            new = gap.masked_fill(~valid, -torch.inf).amax(dim=0)
            if _world(group)[1] > 1:
                dist.all_reduce(new, op=dist.ReduceOp.MAX, group=group)
            new = new / 5
        elif self.mode == "adaptive":
            new = _sum_over_ranks(gap.sum(0), group) / count
        else:
            images = _sum_over_ranks(torch.tensor(len(image_text), device=gap.device), group)
            negative = image_negative.masked_fill(~valid, 0).sum(0)
            new = _sum_over_ranks(image_text.sum(), group) / images
            new = new - _sum_over_ranks(negative, group) / count
        self.value.copy_(torch.where(count > 0, new.clamp(0, self.cap), self.value))


def ce_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    negative_features: Tensor | None = None,
    valid: Tensor | None = None,
    positive_features: Tensor | None = None,
    positive_valid: Tensor | None = None,
    logit_bias: Tensor | None = None,
    *,
    thresholds: Tensor | None = None,
    negatives_in_itc: bool = True,
    imc: str = "paired",
    imc_weight: float = 0.2,
    imc_offset: float = 0.0,
    cmr_weight: float = 0.4,
    cmr_mean: str = "valid",
    own_weight: float = 0.0,
    focal_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    mask_invalid: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """L = itc + imc_weight · imc + cmr_weight · cmr + own_weight · own, in float32 (float64 stays).

    In a process group every rank passes its own rows; after DDP has averaged gradients, they equal
    those of one process that holds the whole batch.

    Args:
        image_features: unit-length images [B, D].
        text_features: unit-length captions [B, D].
        logit_scale: scalar, already exponentiated.
        negative_features: unit-length negatives [B, K, D]; anything, NaN too, where not valid.
        valid: which negatives exist [B, K] bool; None means all.
        positive_features: another caption of each image [B, D], for imc "paired".
        positive_valid: which of those exist [B] bool; None means all.
        logit_bias: scalar; if given, itc is SigLIP's.
        thresholds: theta in logits [K]; None means 0.
        negatives_in_itc: put the negatives into the images' denominator.
        imc: see `intra_modal_loss`, or "none".
        imc_weight: weight of imc.
        imc_offset: c of imc "repulsion".
        cmr_weight: weight of cmr.
        cmr_mean: "valid" or "all", see `rank_loss`.
        own_weight: weight of `own_negatives_loss`.
        focal_gamma: of `own_negatives_loss`.
        label_smoothing: of `own_negatives_loss`.
        mask_invalid: False keeps missing negatives in the softmaxes, as released.
        group: the process group, or None for the default one.

    Returns:
        Scalars `loss` (with gradient; its value is that of the whole global batch), `itc`, `imc`,
        `cmr` and `own`, and for `RankThreshold.update` the logits `image_text` [B] and
        `image_negative` [B, K], all without gradient.

    Raises:
        ValueError: shapes, mask or options do not fit, or ranks hold different numbers of rows.
    """
    valid = _check(image_features, text_features, negative_features, valid, positive_features)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts, scale = (
            x.to(dtype) for x in (image_features, text_features, torch.as_tensor(logit_scale))
        )
        negatives = positives = None
        counted = valid if mask_invalid else torch.ones_like(valid)
        if negative_features is not None and valid.shape[1]:
            # Zeros under the mask before any product: NaN times 0 is NaN, in gradients too.
            negatives = torch.where(counted[..., None], negative_features.to(dtype), 0.0)
        if positive_features is not None:
            positives = positive_features.to(dtype)
            if positive_valid is not None:
                positives = torch.where(positive_valid[:, None], positives, 0.0)
        hard = negatives if negatives_in_itc else None
        if logit_bias is None:
            itc = _image_text_contrast(images, texts, scale, hard, counted, group)
        else:
            bias = torch.as_tensor(logit_bias).to(dtype)
            itc = _sigmoid_contrast(images, texts, scale, bias, hard, counted, group)
        true = _similarity(images[:, None], texts[:, None], scale)[:, 0, 0]  # [B]
        imc_value = cmr_value = own_value = torch.zeros((), dtype=dtype, device=images.device)
        wrong = true.new_zeros(valid.shape)
        if negatives is not None:
            wrong = _similarity(images[:, None], negatives, scale)[:, 0]  # [B, K]
            theta = wrong.new_zeros(wrong.shape[1]) if thresholds is None else thresholds.to(wrong)
            cmr_value = rank_loss(true, wrong, theta, valid, mean=cmr_mean, group=group)
            if imc != "none" and imc_weight:
                imc_value = intra_modal_loss(
                    *(texts, negatives, scale, valid),
                    variant=imc,
                    positive_features=positives,
                    positive_valid=positive_valid,
                    image_features=images,
                    offset=imc_offset,
                    mask_invalid=mask_invalid,
                    group=group,
                )
            if own_weight:
                softened = {"focal_gamma": focal_gamma, "label_smoothing": label_smoothing}
                own_value = own_negatives_loss(true, wrong, valid, **softened, group=group)
        loss = itc + imc_weight * imc_value + cmr_weight * cmr_value + own_weight * own_value
        parts = torch.stack([loss, itc, imc_value, cmr_value, own_value]).detach()
        parts = _sum_over_ranks(parts, group) / _world(group)[1]
        loss = loss + (parts[0] - loss).detach() if _world(group)[1] > 1 else loss
    return {
        **{"loss": loss, "itc": parts[1], "imc": parts[2], "cmr": parts[3]},
        "own": parts[4],
        **{"image_text": true.detach(), "image_negative": wrong.detach()},
    }


def _check(
    images: Tensor,
    texts: Tensor,
    negatives: Tensor | None,
    valid: Tensor | None,
    positives: Tensor | None,
) -> Tensor:
    """Refuse shapes that do not fit; return the mask [B, K], with K = 0 without negatives."""
    b, d = images.shape
    if texts.shape != (b, d):
        raise ValueError(f"text_features are {list(texts.shape)}; images want [{b}, {d}]")
    if positives is not None and positives.shape != (b, d):
        raise ValueError(f"positive_features are {list(positives.shape)}; images want [{b}, {d}]")
    if negatives is None:
        return torch.zeros(b, 0, dtype=torch.bool, device=images.device)
    if negatives.dim() != 3 or negatives.shape[0] != b or negatives.shape[2] != d:
        raise ValueError(f"negative_features are {list(negatives.shape)}, not [{b}, K, {d}]")
    if valid is None:
        return torch.ones(negatives.shape[:2], dtype=torch.bool, device=images.device)
    if valid.dtype != torch.bool or valid.shape != negatives.shape[:2]:
        wanted = list(negatives.shape[:2])
        raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}; it must be bool {wanted}")
    return valid


def ce_clip_loss_and_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    negative_features: Tensor | None = None,
    valid: Tensor | None = None,
    positive_features: Tensor | None = None,
    positive_valid: Tensor | None = None,
    logit_bias: Tensor | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`ce_clip_loss`, and the gradient of its loss by each input: what cached gradients need.

    Returns:
        the loss's dict without gradients, and by name of the input its gradient, of its shape.
    """
    inputs = {
        "image_features": image_features,
        "text_features": text_features,
        "logit_scale": torch.as_tensor(logit_scale),
        "negative_features": negative_features,
        "positive_features": positive_features,
        "logit_bias": logit_bias,
    }
    leaves: dict[str, Any] = {}
    for name, value in inputs.items():
        if value is not None:
            leaves[name] = value.detach().requires_grad_()
    with torch.enable_grad():
        out = ce_clip_loss(**leaves, valid=valid, positive_valid=positive_valid, **options)
        grads = torch.autograd.grad(out["loss"], list(leaves.values()), materialize_grads=True)
    return {k: v.detach() for k, v in out.items()}, dict(zip(leaves, grads, strict=True))


class CEClipLoss(nn.Module):
    """The loss of a training step, with thresholds that it keeps from step to step.

    Also usable where open_clip's `ClipLoss` is: pass output_dict as open_clip does.
    """

    def __init__(
        self,
        recipe: str = "ce-clip",
        *,
        types: Sequence[str] = NEGATIVE_TYPES,
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        """Take the options of a recipe; keywords overrule it.

        Args:
            recipe: "clip", "negclip", "ce-clip" or "released", see RECIPES.
            types: names of the K types of negatives, in the order of axis K.
            group: the process group, or None for the default one.
            **options: those of `ce_clip_loss`, and `threshold` (a mode of RankThreshold), `cap`,
                `fixed_threshold` (both in logits), `reset_each_epoch`.

        Raises:
            ValueError: unknown recipe, option, or value of an option.
        """
        super().__init__()
        if recipe not in RECIPES:
            raise ValueError(f"recipe is {recipe!r}; it must be one of {', '.join(RECIPES)}")
        chosen: dict[str, Any] = {
            **{"negatives_in_itc": True, "imc": "paired", "imc_weight": 0.2, "imc_offset": 0.0},
            **{"cmr_weight": 0.4, "cmr_mean": "valid", "mask_invalid": True},
            **{"own_weight": 0.0, "focal_gamma": 0.0, "label_smoothing": 0.0},
            **{"threshold": "adaptive", "cap": 10.0, "fixed_threshold": 5.0},
            **{"reset_each_epoch": False},
        }
        unknown = set(options) - set(chosen)
        if unknown:
            raise ValueError(f"unknown option {min(unknown)!r}; there are {', '.join(chosen)}")
        chosen |= RECIPES[recipe] | options
        if chosen["imc"] not in IMC_VARIANTS:
            wanted = ", ".join(IMC_VARIANTS)
            raise ValueError(f"imc is {chosen['imc']!r}; it must be one of {wanted}")
        self.recipe, self.types, self.group = recipe, tuple(types), group
        self.reset_each_epoch = chosen.pop("reset_each_epoch")
        mode, cap, value = (chosen.pop(key) for key in ("threshold", "cap", "fixed_threshold"))
        self.threshold = RankThreshold(len(self.types), mode, cap, value)
        self.options = chosen

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
        logit_scale: Tensor,
        negative_features: Tensor | None = None,
        valid: Tensor | None = None,
        positive_features: Tensor | None = None,
        positive_valid: Tensor | None = None,
        logit_bias: Tensor | None = None,
        output_dict: bool | None = None,
    ) -> Any:
        """Compute the loss with the current thresholds, then, in training, move them on.

        Args:
            image_features: unit-length images [B, D].
            text_features: unit-length captions [B, D].
            logit_scale: scalar, already exponentiated.
            negative_features: unit-length negatives [B, K, D], K types in the order of `types`.
            valid: which negatives exist [B, K] bool.
            positive_features: another caption of each image [B, D].
            positive_valid: which of those exist [B] bool.
            logit_bias: scalar; if given, itc is SigLIP's.
            output_dict: as open_clip asks: True for {"contrastive_loss": loss}, False for loss.

        Returns:
            Scalars `loss` (the only one with a gradient), `itc`, `imc`, `cmr`, `own`,
            and `threshold_<type>`, the margins that this loss was computed with.

        Raises:
            ValueError: shapes do not fit, or K is not the number of types.
        """
        if negative_features is not None and negative_features.shape[1] not in (0, len(self.types)):
            k = negative_features.shape[1]
            raise ValueError(f"negative_features have K = {k}; there are {len(self.types)} types")
        theta = self.threshold.value.clone()
        out = ce_clip_loss(
            *(image_features, text_features, logit_scale),
            negative_features if self.needs_negatives else None,
            *(valid, positive_features, positive_valid, logit_bias),
            thresholds=theta,
            group=self.group,
            **self.options,
        )
        true, wrong = out.pop("image_text"), out.pop("image_negative")
        if self.training and wrong.shape[1]:
            mask = torch.ones_like(wrong, dtype=torch.bool) if valid is None else valid
            self.threshold.update(true, wrong, mask, self.group)
        if output_dict is not None:
            return {"contrastive_loss": out["loss"]} if output_dict else out["loss"]
        names = [f"threshold_{name}" for name in self.types]
        return {**out, **dict(zip(names, theta.unbind(), strict=True))}

"""Losses against plain loops, fused paths against the plain one, and what must not matter."""

import contextlib
import importlib.util
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import losses
from losses import CEClipLoss, ce_clip_loss, ce_clip_loss_and_grads

ROOT = Path(__file__).parents[1]
NAMES = ("image_features", "text_features", "negative_features", "positive_features")
SOFT = {"own_weight": 0.5, "focal_gamma": 2.0, "label_smoothing": 0.1}
# Every variant of imc, whole batch and own, with and without what else there is.
MODES = [
    {"imc": imc, "imc_scope": scope, "mask_invalid": mask, "negatives_in_itc": itc, **more}
    for imc in losses.IMC_VARIANTS
    for scope in ("own", "batch")
    for mask, itc, more in (
        (True, True, {"imc_offset": 0.3}),
        (False, True, {"cmr_mean": "all"}),
        (True, False, SOFT),
    )
]


def unit(*shape, dtype=torch.float64):
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def batch(b=5, k=4, d=6, seed=0, dtype=torch.float64):
    """Images, captions, negatives, positives, and the masks of the last two."""
    torch.manual_seed(seed)
    features = [unit(*shape, dtype=dtype) for shape in ((b, d), (b, d), (b, k, d), (b, d))]
    return features, torch.rand(b, k) > 0.3, torch.rand(b) > 0.2


def run(module, backend, data, scale=7.0, bias=None, theta=None, frozen=(), **options):
    """The loss's dict and its gradients by all inputs, zeros where there are none."""
    features, valid, positive_valid = data
    dtype = features[0].dtype
    leaves = [x.clone().requires_grad_(name not in frozen) for name, x in zip(NAMES, features)]  # noqa: B905
    scalars = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, bias) if x]
    images, texts, negatives, positives = leaves
    if theta is None:
        theta = torch.linspace(0, 3, negatives.shape[1], dtype=dtype)
    out = module.ce_clip_loss(
        *(images, texts, scalars[0], negatives, valid, positives, positive_valid),
        scalars[1] if bias else None,
        **{"thresholds": theta, "backend": backend, **options},
    )
    wanted = [x for x in (*leaves, *scalars) if x.requires_grad]
    grads = torch.autograd.grad(out["loss"], wanted, materialize_grads=True, allow_unused=True)
    return out, grads


def same(one, two, tol):
    pairs = [(one[0][key], two[0][key]) for key in one[0]]
    pairs += list(zip(one[1], two[1], strict=True))
    return all(torch.allclose(a, c, atol=tol, rtol=tol) for a, c in pairs)


def dot(a, b, s):
    return s * sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def oracle(features, valid, s, theta, released):
    """Plain loops over itc, imc and cmr."""
    image, text, negative, positive = features
    b, k = valid.shape
    kept = [(i, j) for i in range(b) for j in range(k) if released or valid[i, j]]
    itc = imc = cmr = 0.0
    for i in range(b):
        row = [dot(image[i], text[j], s) for j in range(b)]
        hard = [dot(image[i], negative[p], s) for p in kept]
        column = [dot(image[j], text[i], s) for j in range(b)]
        itc += math.log(sum(map(math.exp, row + hard))) - row[i]
        itc += math.log(sum(map(math.exp, column))) - column[i]
        if released:
            every = [dot(text[i], negative[p], s) for p in kept]
            imc += math.log(sum(map(math.exp, every))) - every[0]
        else:
            own = [dot(text[i], negative[i, j], s) for j in range(k) if valid[i, j]]
            top = dot(text[i], positive[i], s)
            imc += math.log(sum(map(math.exp, [top, *own]))) - top
        for j in range(k):
            if valid[i, j]:
                cmr += max(0.0, float(theta[j]) + dot(image[i], negative[i, j], s) - row[i])
    count = b * k if released else int(valid.sum())
    return itc / 2 / b, imc / b, cmr / count


@pytest.mark.parametrize("backend", ["plain", "torch"])
@pytest.mark.parametrize("recipe", ["ce-clip", "released"])
def test_recipes_equal_plain_loops(recipe, backend):
    (image, text, negative, positive), valid, _ = batch()
    loss, s = CEClipLoss(recipe, backend=backend), torch.tensor(7.0, dtype=torch.float64)
    loss.threshold.value.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    features = (image, text, negative, positive)
    wanted = oracle(features, valid, 7.0, loss.threshold.value, recipe == "released")
    out = loss(image, text, s, negative, valid, positive)
    for key, value in zip(("itc", "imc", "cmr"), wanted, strict=True):
        assert float(out[key]) == pytest.approx(value, abs=1e-9)
    total = wanted[0] + 0.2 * wanted[1] + 0.4 * wanted[2]
    assert float(out["loss"]) == pytest.approx(total, abs=1e-9)


def test_intra_modal_variants_equal_plain_loops():
    (image, text, negative, _), valid, _ = batch()
    for imc, offset in (("paper", 0.0), ("repulsion", 0.3)):
        total = 0.0
        for i in range(5):
            n = dot(image[i], text[i], 7.0) if imc == "paper" else 7.0 * offset
            own = [dot(text[i], negative[i, j], 7.0) for j in range(4) if valid[i, j]]
            total += math.log(sum(map(math.exp, [n, *own]))) - n
        out = ce_clip_loss(image, text, 7.0, negative, valid, imc=imc, imc_offset=offset)
        assert float(out["imc"]) == pytest.approx(total / 5, abs=1e-9)


def test_own_negatives_loss_equals_plain_loops():
    (image, text, negative, _), valid, _ = batch()
    valid[2] = False
    total = 0.0
    for i in [i for i in range(5) if valid[i].any()]:
        logits = [dot(image[i], text[i], 7.0)]
        logits += [dot(image[i], negative[i, j], 7.0) for j in range(4) if valid[i, j]]
        p = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
        y = [0.1 / len(p) + (0.9 if c == 0 else 0) for c in range(len(p))]
        total -= sum(y[c] * (1 - p[c]) ** 2 * math.log(p[c]) for c in range(len(p)))
    out = ce_clip_loss(image, text, 7.0, negative, valid, imc="none", **SOFT)
    assert float(out["own"]) == pytest.approx(total / int(valid.any(1).sum()), abs=1e-9)


@pytest.mark.parametrize("bias", [None, -1.0])
@pytest.mark.parametrize("size", [(1, 4, 3), (2, 1, 1), (7, 8, 5), (8, 0, 4), (33, 3, 16)])
def test_fused_equals_plain_in_every_mode(size, bias):
    for i, mode in enumerate(MODES):
        data = batch(*size, seed=i)
        plain = run(losses, "plain", data, bias=bias, **mode)
        for rows in (1, 2, size[0], size[0] + 1):
            mib = rows * 2 * max(1, size[0] * size[1]) * 8 / 2**20
            fused = run(losses, "torch", data, bias=bias, workspace_mib=mib, **mode)
            assert same(plain, fused, 1e-11), (mode, rows)


@pytest.mark.parametrize("frozen", [NAMES[:1], NAMES[1:3], NAMES[1:2], NAMES[2:3], NAMES])
def test_frozen_towers_leave_the_other_gradients_as_they_are(frozen):
    for mode in MODES[::2]:
        for bias in (None, -1.0):
            plain = run(losses, "plain", batch(), bias=bias, frozen=frozen, **mode)
            assert same(
                plain, run(losses, "torch", batch(), bias=bias, frozen=frozen, **mode), 1e-11
            )


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts multiplications in products of two matrices; remembers the largest tensor made."""

    total = numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            one, two = args[-2:]
            self.total += one.shape[0] * one.shape[1] * two.shape[1]
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, list | tuple) else [out]
        self.numel = max([self.numel, *(x.numel() for x in found if isinstance(x, torch.Tensor))])
        return out


def products(*frozen, scale_too=True):
    """Products of all images with all captions that the fused path makes, at K = 4."""
    (image, text, negative, _), valid, _ = batch(32, 4, 16)
    o = losses.Options(imc="released", mask_invalid=False)
    x = losses._inputs((image, text, 9.0, negative, valid, *[None] * 4), o)
    wanted = dict(zip(("images", "texts", "negatives"), NAMES, strict=False))
    needs = [f in wanted and wanted[f] not in frozen for f in x._fields]
    needs[x._fields.index("scale")] = scale_too
    with Watch() as counter:
        losses._fused(x, o, needs, None)
    return round(counter.total / (32 * 32 * 16))


def test_work_is_that_of_the_gradients_that_are_wanted():
    assert products() == 27  # 1 + 2K forward, twice that backward, K = 4
    assert products(*NAMES[1:3], scale_too=False) == 9 + 1 + 4
    assert products(*NAMES, scale_too=False) == 9


@pytest.mark.parametrize("bias", [None, -1.0])
@pytest.mark.parametrize("backend", ["plain", "torch"])
def test_gradients_are_the_slopes_in_every_mode(backend, bias):
    theta, h = torch.full((2,), 9.0, dtype=torch.float64), 1e-6
    for i, mode in enumerate(MODES):
        features, valid, there = batch(3, 2, 4, seed=i)
        scalars = [torch.tensor(s, dtype=torch.float64) for s in (5.0, bias) if s]
        inputs = [*features, *scalars]

        def f(x, mode=mode, valid=valid, there=there):
            arguments = (x[0], x[1], x[4], x[2], valid, x[3], there, *x[5:])
            return ce_clip_loss(*arguments, thresholds=theta, backend=backend, **mode)["loss"]

        leaves = [x.clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(f(leaves), leaves, allow_unused=True, materialize_grads=True)
        for which, grad in enumerate(grads):
            step = torch.randn_like(grad)
            ends = []
            for sign in (1, -1):
                moved = [x + sign * h * step if j == which else x for j, x in enumerate(inputs)]
                ends.append(float(f(moved)))
            slope = float((grad * step).sum())
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-6, rel=1e-5), mode


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("backend", ["plain", "torch"])
def test_what_stands_under_the_mask_changes_no_bit(backend, garbage):
    for mode in [m for m in MODES if m["mask_invalid"]]:
        (image, text, negative, positive), valid, there = batch()
        clean = run(losses, backend, ((image, text, negative, positive), valid, there), **mode)
        negative = negative.masked_fill(~valid[..., None], garbage)
        positive = positive.masked_fill(~there[:, None], garbage)
        dirty = run(losses, backend, ((image, text, negative, positive), valid, there), **mode)
        for a, b in zip(clean[1], dirty[1], strict=True):
            assert torch.equal(a, b), mode
        assert torch.equal(clean[0]["loss"], dirty[0]["loss"])
        assert (dirty[1][2][~valid] == 0).all()


@pytest.mark.parametrize("backend", ["plain", "torch"])
def test_order_of_items_and_of_types_does_not_matter(backend):
    (image, text, negative, positive), valid, there = batch(6)
    items, types = torch.randperm(6), torch.randperm(4)
    theta = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    one = run(losses, backend, ((image, text, negative, positive), valid, there), theta=theta)
    moved = [x[items] for x in (image, text, negative[:, types], positive)]
    data = (moved, valid[items][:, types], there[items])
    out, grads = run(losses, backend, data, theta=theta[types])
    assert torch.allclose(out["loss"], one[0]["loss"], atol=1e-12)
    assert torch.allclose(grads[2], one[1][2][items][:, types], atol=1e-12)
    assert torch.allclose(grads[0], one[1][0][items], atol=1e-12)


@pytest.mark.parametrize("backend", ["plain", "torch"])
@pytest.mark.parametrize("b", [1, 3])
def test_nothing_valid_is_finite_and_keeps_thresholds(b, backend):
    (image, text, negative, positive), valid, _ = batch(b)
    image.requires_grad_()
    for recipe in losses.RECIPES:
        for bias in (None, torch.tensor(-1.0)):
            loss = CEClipLoss(recipe, backend=backend)
            loss.threshold.value.fill_(3.0)
            none = torch.zeros_like(valid)
            out = loss(image, text, 5.0, negative, none, positive, logit_bias=bias)
            out["loss"].backward()
            assert torch.isfinite(out["loss"])
            assert torch.isfinite(image.grad).all()
            assert (loss.threshold.value == 3).all()


def test_float32_is_as_exact_as_the_plain_path():
    extremes = []
    for scale in (1.0, 14.0, 50.0, 100.0):
        extremes.append((batch(64, 4, 32, seed=int(scale))[0], scale))
    one = unit(1, 32)
    for sign in (1, -1):  # all features collapsed, or images opposite to texts
        spread = [one.expand(64, 32), sign * one.expand(64, 32)]
        extremes.append(([*spread, sign * one.expand(64, 4, 32), one.expand(64, 32)], 100.0))
    valid, there = torch.rand(64, 4) > 0.2, torch.ones(64, dtype=torch.bool)
    theta = torch.linspace(0.5, 3, 4)  # at 0 a collapsed model stands on the kink of the rank loss
    for features, scale in extremes:
        for mode in ({"imc": "paired"}, {"imc": "released", "mask_invalid": False}):
            exact = run(losses, "plain", (features, valid, there), scale=scale, theta=theta, **mode)
            single = ([x.float() for x in features], valid, there)
            errors = []
            for backend in ("plain", "torch"):
                out, grads = run(losses, backend, single, scale=scale, theta=theta, **mode)
                assert float(out["loss"]) == pytest.approx(float(exact[0]["loss"]), rel=1e-5)
                pairs = list(zip(grads, exact[1], strict=True))
                error = [(a - b).norm() / (1e-3 + b.norm()) for a, b in pairs[:4]]
                errors.append(float(torch.stack(error).max()))
                assert abs(float(pairs[4][0]) - float(pairs[4][1])) < 1e-4
            assert errors[1] <= 1.3 * errors[0] + 1e-6, (scale, errors)


@pytest.mark.parametrize("backend", ["plain", "torch"])
def test_released_equals_the_port_of_the_released_code_over_steps(backend, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    port = importlib.import_module("bench_losses").Released()
    loss = CEClipLoss("released", backend=backend).double()
    for step in range(4):
        features, valid, _ = batch(6, seed=step)
        grads = []
        for f in (lambda i, t, n, v, s: loss(i, t, s, n, v)["loss"], port):
            inputs = (*features[:3], torch.tensor(6.0).double())
            leaves = [x.clone().requires_grad_() for x in inputs]
            value = f(*leaves[:3], valid, leaves[3])
            grads.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, atol=1e-12, rtol=1e-12), step
        assert torch.allclose(loss.threshold.value, port.theta, atol=1e-12)


def test_thresholds_are_the_gaps_of_the_step_before():
    (image, text, negative, positive), valid, _ = batch()
    valid[:, 3] = False
    for mode in ("adaptive", "max"):
        loss = CEClipLoss(threshold=mode, cap=4.0)
        out = loss(image, text, 7.0, negative, valid, positive)
        assert float(out["threshold_relation"]) == 0  # as used
        for k in range(3):
            gaps = [dot(image[i], text[i] - negative[i, k], 7.0) for i in range(5) if valid[i, k]]
            new = sum(gaps) / len(gaps) if mode == "adaptive" else max(gaps) / 5
            assert float(loss.threshold.value[k]) == pytest.approx(min(max(new, 0), 4), abs=1e-5)
        assert loss.threshold.value[3] == 0
        assert not loss.threshold.value.requires_grad
        other = CEClipLoss(threshold=mode)
        other.load_state_dict(loss.state_dict())
        assert torch.equal(other.threshold.value, loss.threshold.value)
        loss.eval()
        before = loss.threshold.value.clone()
        loss(text, image, 7.0, negative, valid, positive)
        assert torch.equal(before, loss.threshold.value)
    loss = CEClipLoss(threshold="fixed", fixed_threshold=2.0)
    loss(image, text, 7.0, negative, valid, positive)
    assert (loss.threshold.value == 2).all()


def test_clip_recipe_equals_open_clip():
    from open_clip.loss import ClipLoss, SigLipLoss

    (image, text, *_), _, _ = batch()
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (9.0, -2.0))
    for backend in ("plain", "torch"):
        loss = CEClipLoss("clip", backend=backend)
        out = loss(image, text, scale, output_dict=True)
        assert torch.allclose(out["contrastive_loss"], ClipLoss()(image, text, scale))
        out = loss(image, text, scale, logit_bias=bias, output_dict=False)
        assert torch.allclose(out, SigLipLoss()(image, text, scale, bias))


def test_loss_and_grads_are_those_of_autograd():
    features, valid, there = batch()
    out, grads = run(losses, "torch", (features, valid, there), bias=-1.0)
    image, text, negative, positive = features
    bias, theta = torch.tensor(-1.0).double(), torch.linspace(0, 3, 4).double()
    scale = torch.tensor(7.0).double()
    arguments = (image, text, scale, negative, valid, positive, there, bias)
    found, by_name = ce_clip_loss_and_grads(*arguments, thresholds=theta, backend="torch")
    assert torch.equal(found["loss"], out["loss"])
    for name, grad in zip((*NAMES, "logit_scale", "logit_bias"), grads, strict=True):
        assert torch.equal(by_name[name], grad), name


def test_no_tensor_of_all_logits_is_ever_made():
    (image, text, negative, _), valid, _ = batch(256, 4, 8, dtype=torch.float32)
    o = losses.Options(imc="released")
    x = losses._inputs((image, text, 9.0, negative, valid, *[None] * 4), o)
    options, whole = o._replace(backend="torch", workspace_mib=0.05), 256 * 4 * 256
    with Watch() as fused:
        losses._fused(x, options, [t is not None for t in x], None)
    with Watch() as plain:
        losses._reference(losses._clean(x), options, None)
    assert fused.numel < whole / 4
    assert plain.numel >= whole


# Single changes of the source, each of which the comparison with the plain path must notice.
MUTANTS = {
    "no diagonal": ("at.diagonal(first).sub_(2)", "at.diagonal(first).sub_(0)"),
    "rows and columns changed": (
        "torch.sub(at, columns.to(q.dtype), out",
        "torch.sub(at, row[:, None], out",
    ),
    "mask of whole batch forgotten": ("if not encoded.all():", "if False:"),
    "kink counted": ("(excess > 0)", "(excess >= -9e9)"),
    "threshold forgotten": ("excess = x.thresholds + own.negative", "excess = own.negative"),
    "own row factor lost": (
        "weight[:, chunk].flatten() * (offset - total).exp()",
        "weight[:, chunk].flatten()",
    ),
    "captions' keys lost": ("x.scale, None, step.d_keys)", "x.scale, None, None)"),
    "scale lost": ("* (weight * scale)", "* weight"),
    "captions left out of the scale": ("of_captions + (own.text * d.text).sum()", "of_captions"),
    "numerator without derivative": ("share * (p[:, 0].exp() - 1)", "share * 0"),
    "positives uncounted": ("clamp(min=1)\n    share", "clamp(min=7)\n    share"),
    "focal derivative": ("by_log_p + target * g", "by_log_p - target * g"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_fused_core_is_noticed(name, tmp_path):
    old, new = MUTANTS[name]
    source = (ROOT / "losses.py").read_text()
    assert source.count(old) == 1, old
    source = source.replace(old, new).replace("ce_clip::", f"ce_clip_{abs(hash(name))}::")
    path = tmp_path / "mutant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    data = batch(6, 3, 5)
    kept = [
        same(run(losses, "plain", data, **m), run(mutant, "torch", data, **m), 1e-9) for m in MODES
    ]
    assert not all(kept)


@pytest.mark.slow
def test_torch_compile_takes_the_loss_whole():
    loss, plain = CEClipLoss("ce-clip", backend="torch"), CEClipLoss("ce-clip", backend="plain")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(image, text, negative, positive, valid, scale):
        out = loss(normalize(image, dim=-1), text, scale, negative, valid, positive)
        return out["loss"]

    for b in (6, 6, 9):
        (image, text, negative, positive), valid, _ = batch(b, dtype=torch.float32)
        scale = torch.tensor(7.0)
        found, wanted = image.clone().requires_grad_(), image.clone().requires_grad_()
        value = compiled(found, text, negative, positive, valid, scale)
        value.backward()
        other = plain(normalize(wanted, dim=-1), text, scale, negative, valid, positive)["loss"]
        other.backward()
        assert torch.allclose(value, other, atol=1e-5)
        assert torch.allclose(found.grad, wanted.grad, atol=1e-5)


def test_half_precision_inputs_are_summed_in_float32():
    features, valid, there = batch(16, 4, 32, dtype=torch.float32)
    half = [x.bfloat16() for x in features]
    rounded = ([x.float() for x in half], valid, there)
    wanted = run(losses, "plain", rounded, scale=50.0)
    found = run(losses, "torch", (half, valid, there), scale=50.0)
    assert found[0]["loss"].dtype == torch.float32
    assert torch.allclose(found[0]["loss"], wanted[0]["loss"], rtol=1e-5)
    for a, b in zip(found[1], wanted[1], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() <= 0.01 * b.norm()
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the logits
        again = run(losses, "torch", rounded, scale=50.0)
    assert torch.equal(again[0]["loss"], run(losses, "torch", rounded, scale=50.0)[0]["loss"])


TRITON = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import torch, losses
from test_losses import MODES, batch, run, same
for i, mode in enumerate(MODES):
    for bias in (None, -1.0):
        data = batch(9, 3, 33, seed=i, dtype=torch.float32)
        plain = run(losses, "plain", data, bias=bias, **mode)
        fused = run(losses, "triton", data, bias=bias, workspace_mib=0.004, **mode)
        assert same(plain, fused, 2e-5), mode
far = [torch.nn.functional.normalize(x, dim=-1) for x in (torch.ones(9, 33), -torch.ones(9, 33))]
features, valid, there = batch(9, 3, 33, dtype=torch.float32)
data = ([far[0], far[1], far[0][:, None] + 0 * features[2], far[1]], valid, there)
assert same(run(losses, "plain", data, scale=100.0), run(losses, "triton", data, scale=100.0), 2e-4)
print("equal")
"""


@pytest.mark.slow
def test_kernels_equal_the_plain_path_in_tritons_interpreter():
    pytest.importorskip("triton", reason="torch without CUDA brings no triton")
    code = TRITON.format(root=str(ROOT), tests=str(ROOT / "tests"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_spills(tmp_path):
    triton = pytest.importorskip("triton", reason="torch without CUDA brings no triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not dump.exists():
        pytest.skip("this triton brings no cuobjdump")
    kernel = losses._kernel
    pointers = {name: "*fp32" for name in ("row", "column", "bias", "of_rows", "of_columns")}
    signature = {**{name: "*bf16" for name in ("q", "k", "out")}, **pointers}
    signature |= {"n": "i32", "m": "i32", "first": "i32"}
    sizes = dict(zip(("ROWS", "COLUMNS", "DEPTH"), losses.TILE, strict=True))
    names = kernel.arg_names
    for mode in range(len(losses.TILE_MODES)):
        for width in (512, 768, 1024):
            constants = {"WIDTH": width, "MODE": mode, **sizes}
            whole = {name: signature.get(name, "constexpr") for name in names}
            aligned = {(i,): [["tt.divisibility", 16]] for i in range(8)}
            source = ASTSource(kernel, whole, constants, aligned)
            options = {"num_warps": 8, "num_stages": 3}
            built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            cubin = tmp_path / "kernel.cubin"
            cubin.write_bytes(built.asm["cubin"])
            text = subprocess.run(
                [dump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
            ).stdout
            assert int(re.search(r"STACK:(\d+)", text)[1]) == 0, (mode, width, text)
            assert int(re.search(r"LOCAL:(\d+)", text)[1]) == 0, (mode, width, text)
            assert built.metadata.shared <= 227 * 1024, (mode, width)
            assert "wgmma" in built.asm["ptx"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_features": torch.ones(5, 7)}, r"text_features .* \[5, 7\]; it must be \[5, 6\]"),
        ({"negative_features": torch.ones(4, 4, 6)}, r"\[4, 4, 6\]; it must be \[5, 4, 6\]"),
        ({"negative_features": torch.ones(5, 6)}, r"it must be \[5, K, 6\]"),
        ({"positive_features": torch.ones(3, 6)}, "positive_features"),
        ({"positive_features": None}, "imc 'paired' needs positive_features"),
        ({"valid": torch.ones(5, 4)}, "valid is torch.float32; it must be a bool mask"),
        ({"valid": torch.ones(5, 3, dtype=torch.bool)}, r"valid .* it must be \[5, 4\]"),
        ({"thresholds": torch.ones(3)}, "thresholds"),
        ({"image_features": torch.ones(5, 6, dtype=torch.long)}, "they must be floats"),
        ({"imc": "x"}, "imc is 'x'; it must be one of none, paired"),
        ({"no": 1}, "unknown option 'no'"),
        ({"focal_gamma": 0.5}, "focal_gamma is 0.5"),
        ({"negatives_in_itc": 1}, "negatives_in_itc is 1; it must be True or False"),
        ({"imc_weight": None}, "imc_weight is None; it must be a finite number"),
        ({"cmr_weight": -1.0}, "cmr_weight is -1.0; it must be a finite number, 0 or more"),
        ({"label_smoothing": 2}, "label_smoothing is 2; it must be a number from 0"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale has shape \[2\]; it must be a scalar"),
        ({"negative_features": None}, "valid is given, but negative_features are missing"),
        ({"text_features": torch.ones(5, 6, dtype=torch.long)}, "it must be of floats"),
        ({"backend": "triton"}, "needs a CUDA device"),
        ({"check": True, "image_features": 2 * torch.ones(5, 6)}, "not unit vectors"),
        ({"check": True, "valid": None, "negative_features": torch.zeros(5, 4, 6)}, "pass `valid`"),
    ],
)
def test_mistakes_are_named(change, message):
    (image, text, negative, positive), valid, _ = batch()
    features = dict(zip(NAMES, (image, text, negative, positive), strict=True))
    with pytest.raises(ValueError, match=message):
        ce_clip_loss(**{**features, "logit_scale": 5.0, "valid": valid, **change})


def test_recipes_and_types_are_checked():
    with pytest.raises(ValueError, match="recipe is 'x'; it must be one of clip"):
        CEClipLoss("x")
    with pytest.raises(ValueError, match="threshold is 'x'"):
        CEClipLoss(threshold="x")
    with pytest.raises(ValueError, match="cap is 0"):
        CEClipLoss(cap=0.0)
    (image, text, negative, positive), valid, _ = batch(k=3)
    with pytest.raises(ValueError, match="K = 3; there are 4 types"):
        CEClipLoss()(image, text, 5.0, negative, valid, positive)


class Fusion(torch.nn.Module):
    """A tiny model of X-VLM's kind: ITC features of both towers, and a head that reads both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.vision, self.text = torch.nn.Linear(8, 16), torch.nn.Embedding(12, 16)
        self.image_proj, self.text_proj = torch.nn.Linear(16, 6), torch.nn.Linear(16, 6)
        self.fusion = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.match, self.temp = torch.nn.Linear(16, 2), torch.nn.Parameter(torch.tensor(0.07))

    def forward(self, pixels, tokens):  # [B, R, 8], [B, M, L]
        regions, words = self.vision(pixels), self.text(tokens)
        image = normalize(self.image_proj(regions.mean(1)), dim=-1)
        texts = normalize(self.text_proj(words.mean(2)), dim=-1)  # [B, M, 6]
        fused, _ = self.fusion(words[:, 0], regions, regions)
        return image, texts, self.match(fused.mean(1))


def test_losses_train_a_fusion_model_through_its_contrastive_features():
    model = Fusion()
    loss = CEClipLoss("ce-clip", imc="repulsion")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    tokens = torch.randint(12, (16, 5, 7))  # a caption and four negatives each
    pixels = torch.nn.functional.one_hot(torch.arange(16) % 8, 8).float()[:, None].repeat(1, 3, 1)
    pixels = pixels + 0.3 * torch.randn(16, 3, 8)
    gaps = []
    for _ in range(60):
        image, texts, match = model(pixels, tokens)
        out = loss(image, texts[:, 0], 1 / model.temp, texts[:, 1:])
        total = out["loss"] + torch.nn.functional.cross_entropy(match, torch.ones(16).long())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        gap = (image[:, None] * (texts[:, :1] - texts[:, 1:])).sum(-1)
        gaps.append(float(gap.mean()))
    assert gaps[-1] > gaps[0] + 0.2
    assert float(loss.threshold.value.max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["example_open_clip", "example_transformers"])
def test_examples_run(name):
    wanted = {
        "example_transformers": ["transformers"],
        "example_open_clip": ["pandas", "webdataset"],
    }
    for package in wanted[name]:
        pytest.importorskip(package, reason="an optional package")
    command = [sys.executable, str(ROOT / f"scripts/{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theta = float(re.search(r"threshold_relation\W+([\d.]+)", done.stdout)[1])
    assert name == "example_transformers" or theta > 0.1  # moved on, and is in the checkpoint


@pytest.mark.parametrize("backend", ["plain", "torch"])
def test_strides_shapes_of_scalars_and_no_negatives_do_not_matter(backend):
    (image, text, negative, positive), valid, _ = batch()
    loss = CEClipLoss(backend=backend)
    turned = negative.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    straight = negative.clone().requires_grad_()
    grads = []
    for texts, scale in ((turned, torch.tensor([7.0])), (straight, 7.0)):
        out = loss.eval()(image, text, scale, texts, valid, positive)
        grads.append(torch.autograd.grad(out["loss"], texts)[0])
    assert torch.allclose(*grads, atol=1e-12)
    nothing = loss(image, text, 7.0, image.new_zeros(5, 0, 6), None, positive)
    assert torch.allclose(nothing["loss"], CEClipLoss("clip")(image, text, 7.0)["loss"])


@pytest.mark.parametrize("backend", ["plain", "torch"])
def test_a_batch_that_is_not_finite_leaves_thresholds(backend):
    (image, text, negative, positive), valid, _ = batch()
    loss = CEClipLoss(backend=backend)
    loss(image, text, 7.0, negative, valid, positive)
    before = loss.threshold.value.clone()
    loss(image * math.nan, text, 7.0, negative, valid, positive)
    assert torch.equal(before, loss.threshold.value)
    assert (before > 0).any()


def test_the_first_fused_call_imports_next_to_nothing():
    code = (
        "import sys, torch, losses; before = len(sys.modules);"
        "x = torch.randn(8, 4).requires_grad_();"
        "losses.ce_clip_loss(x, x, 9.0, backend='torch', imc='none')['loss'].backward();"
        "print(len(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 50


def test_without_negatives_a_recipe_that_needs_them_says_so():
    (image, text, *_), _, _ = batch()
    losses._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="ce-clip gets no negative_features: it trains as plain"):
        CEClipLoss("ce-clip")(image, text, 9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CEClipLoss("ce-clip")(image, text, 9.0)  # once is enough
        CEClipLoss("clip")(image, text, 9.0)


def test_in_open_clips_loop_parts_sum_to_the_loss_and_thresholds_move_when_told():
    (image, text, negative, positive), valid, _ = batch()
    image = image.clone().requires_grad_()
    given = (image, text, 9.0, negative, valid, positive)
    wanted = CEClipLoss("ce-clip", own_weight=0.5)(*given)
    (grad,) = torch.autograd.grad(wanted["loss"], image)
    loss = CEClipLoss("ce-clip", own_weight=0.5)
    parts = loss(*given, output_dict=True, update=False)
    assert loss.threshold.value.abs().max() == 0
    assert list(parts) == ["contrastive_loss", "imc_loss", "cmr_loss", "own_loss"]
    (found,) = torch.autograd.grad(sum(parts.values()), image)
    assert torch.allclose(sum(parts.values()), wanted["loss"])
    assert torch.allclose(parts["contrastive_loss"], wanted["itc"])
    assert torch.allclose(found, grad)
    loss(*given, output_dict=True)
    assert loss.threshold.value.abs().max() > 0
    other = CEClipLoss("ce-clip")
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.threshold.value, loss.threshold.value)


def test_thresholds_follow_the_features_to_their_device():
    loss = CEClipLoss("ce-clip", backend="plain")
    x = torch.empty(3, 4, device="meta")
    with contextlib.suppress(NotImplementedError, RuntimeError):  # meta tensors have no values
        loss(x, x, 9.0)
    assert loss.threshold.value.device.type == "meta"


def test_the_check_for_gpus_compares_what_it_says(monkeypatch):
    """On the CPU; and it must fail where the loss is wrong."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    found = gpu_check.check_loss(24, 16, "cpu")
    assert found["ok"], found
    assert len(found["cases"]) == 3 * len(losses.RECIPES)
    monkeypatch.setattr(losses, "SMALL", 0)  # the fused path
    assert gpu_check.check_loss(24, 16, "cpu")["ok"]
    whole = gpu_check.ce_clip_loss_and_grads

    def wrong(*args, **options):
        out, grads = whole(*args, **options)
        return out, {k: v * (1 if options.get("backend") else 1.1) for k, v in grads.items()}

    monkeypatch.setattr(gpu_check, "ce_clip_loss_and_grads", wrong)
    assert not gpu_check.check_loss(24, 16, "cpu")["ok"]

import math
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import losses
from losses import CEClipLoss, ce_clip_loss


def batch(b=5, k=4, d=6, seed=0):
    torch.manual_seed(seed)

    def unit(*s):
        return torch.nn.functional.normalize(torch.randn(*s, dtype=torch.float64), dim=-1)

    return unit(b, d), unit(b, d), unit(b, k, d), torch.rand(b, k) > 0.3, unit(b, d)


def dot(a, b, s):
    return s * sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def oracle(image, text, negative, valid, positive, s, theta, released):
    """Plain loops over itc, imc and cmr."""
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


@pytest.mark.parametrize("recipe", ["ce-clip", "released"])
def test_recipes_equal_plain_loops(recipe):
    image, text, negative, valid, positive = batch()
    loss, s = CEClipLoss(recipe), torch.tensor(7.0, dtype=torch.float64)
    loss.threshold.value.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    wanted = oracle(
        image, text, negative, valid, positive, 7.0, loss.threshold.value, recipe == "released"
    )
    out = loss(image, text, s, negative, valid, positive)
    for key, value in zip(("itc", "imc", "cmr"), wanted, strict=True):
        assert float(out[key]) == pytest.approx(value, abs=1e-9)
    total = wanted[0] + 0.2 * wanted[1] + 0.4 * wanted[2]
    assert float(out["loss"]) == pytest.approx(total, abs=1e-9)


def test_thresholds_are_the_gaps_of_the_step_before():
    image, text, negative, valid, positive = batch()
    valid[:, 3] = False
    loss = CEClipLoss()
    loss(image, text, torch.tensor(7.0), negative, valid, positive)
    for k in range(3):
        gaps = [dot(image[i], text[i] - negative[i, k], 7.0) for i in range(5) if valid[i, k]]
        wanted = min(max(sum(gaps) / len(gaps), 0), 10)
        assert float(loss.threshold.value[k]) == pytest.approx(wanted, abs=1e-5)
    assert loss.threshold.value[3] == 0


def test_gradients_and_nan_under_the_mask():
    image, text, negative, valid, positive = batch(3)
    scale = torch.tensor(5.0, dtype=torch.float64)
    theta = torch.full((4,), 9.0)

    def f(*x):
        return ce_clip_loss(*x[:4], valid, x[4], thresholds=theta)["loss"]

    inputs = [x.requires_grad_() for x in (image, text, scale, negative, positive)]
    assert torch.autograd.gradcheck(f, inputs)
    wanted = torch.autograd.grad(f(*inputs), inputs)
    dirty = negative.detach().masked_fill(~valid[..., None], torch.nan).requires_grad_()
    found = torch.autograd.grad(f(*inputs[:3], dirty, positive), [*inputs[:3], dirty, positive])
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("b", [1, 3])
def test_nothing_valid_is_finite(b):
    image, text, negative, valid, positive = batch(b)
    image.requires_grad_()
    for recipe in losses.RECIPES:
        out = CEClipLoss(recipe)(image, text, torch.tensor(5.0), negative, valid & False, positive)
        out["loss"].backward()
        assert torch.isfinite(out["loss"])
        assert torch.isfinite(image.grad).all()


def test_clip_recipe_equals_open_clip():
    from open_clip.loss import ClipLoss

    image, text, *_ = batch()
    scale = torch.tensor(9.0, dtype=torch.float64)
    out = CEClipLoss("clip")(image, text, scale, output_dict=True)
    assert torch.allclose(out["contrastive_loss"], ClipLoss()(image, text, scale))


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a = torch.nn.Linear(6, 4, dtype=torch.float64)
        self.s = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, *xs):
        return [torch.nn.functional.normalize(self.a(x), dim=-1) for x in xs], self.s.exp()


def gradients(model, toy, xs, valid, recipe):
    loss = CEClipLoss(recipe)
    for _ in range(2):  # the second step has thresholds
        toy.zero_grad()
        (image, text, negative, positive), s = model(*xs)
        loss(image, text, s, negative, valid, positive)["loss"].backward()
    return [toy.a.weight.grad.clone(), toy.a.bias.grad.clone(), toy.s.grad.clone()]


def worker(rank, world, port, broken, out):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=world)
    found = {}
    if broken:  # what a gather without gradients of other ranks would give

        def backward(ctx, grad):
            return grad[rank * ctx.rows : (rank + 1) * ctx.rows], None

        losses._GatherRows.backward = staticmethod(backward)
    for recipe in losses.RECIPES:
        image, text, negative, valid, positive = batch(6)
        mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
        toy = Toy()
        xs = [x[mine] for x in (image, text, negative, positive)]
        found[recipe] = gradients(DistributedDataParallel(toy), toy, xs, valid[mine], recipe)
    try:
        losses.gather_rows(torch.zeros(rank + 1, 2))
    except ValueError as error:
        found["error"] = str(error)
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "broken"), [(2, False), (3, False), (2, True)])
def test_gradients_of_ranks_equal_one_process(world, broken, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (world, port, broken, tmp_path / "out.pt"), nprocs=world)
    found = torch.load(tmp_path / "out.pt")
    assert f"1 and {world} rows" in found["error"]
    same = []
    for recipe in losses.RECIPES:
        image, text, negative, valid, positive = batch(6)
        toy = Toy()
        wanted = gradients(toy, toy, [image, text, negative, positive], valid, recipe)
        pairs = zip(wanted, found[recipe], strict=True)
        same.append(all(torch.allclose(a, b, atol=1e-10) for a, b in pairs))
    assert all(same) if not broken else not any(same)

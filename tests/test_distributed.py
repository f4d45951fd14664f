"""Gradients of several processes are those of one; negatives stay where they are."""

import functools
import gc
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import losses
from losses import CEClipLoss

B, K = 12, 4  # of the global batch
RECIPES = {
    **{name: {"recipe": name} for name in losses.RECIPES},
    "batch": {"imc_scope": "batch", "own_weight": 0.5, "focal_gamma": 2.0},
    "paper": {"imc": "paper", "imc_scope": "batch", "cmr_mean": "all", "threshold": "max"},
    "repulsion": {"imc": "repulsion", "imc_offset": 0.3},
    "siglip": {"imc_scope": "batch"},
}


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a = torch.nn.Linear(6, 5, dtype=torch.float64)
        self.s = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, *xs):
        return [normalize(self.a(x), dim=-1) for x in xs], self.s.exp(), self.b


def inputs():
    torch.manual_seed(0)
    xs = [torch.randn(*s, 6, dtype=torch.float64) for s in ((B,), (B,), (B, K), (B,))]
    valid = torch.rand(B, K) > 0.4
    valid[:3] = False  # a rank may hold nothing that is valid
    return xs, valid, torch.rand(B) > 0.2


def gradients(model, toy, xs, valid, there, name, backend, group=None):
    """Parameters' gradients, loss and thresholds of the second of two steps."""
    loss = CEClipLoss(**RECIPES[name], backend=backend, group=group, workspace_mib=0.001)
    for _ in range(2):  # the second has thresholds
        toy.zero_grad()
        (image, text, negative, positive), s, b = model(*xs)
        bias = b if name == "siglip" else 0 * b  # DDP wants every parameter used
        out = loss(
            image, text, s, negative, valid, positive, there, b if name == "siglip" else None
        )
        (out["loss"] + 0 * bias).backward()
    found = [p.grad.clone() for p in toy.parameters()]
    return [*found, out["loss"].detach(), out["cmr"], loss.threshold.value.double()]


def worker(rank, world, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    xs, valid, there = inputs()
    found = {}
    for size in (2, 3, 4, "broken"):
        ranks = 2 if size == "broken" else size
        group = dist.new_group(list(range(ranks)))
        if rank >= ranks:
            continue
        if size == "broken":  # what a gather without gradients of other ranks would give
            losses._reduce_rows = lambda x, group: x.chunk(2)[rank]
        mine = slice(rank * B // ranks, (rank + 1) * B // ranks)
        local = ([x[mine] for x in xs], valid[mine], there[mine])
        for backend in ("torch", "plain"):
            for name in RECIPES:
                toy = Toy()
                model = DistributedDataParallel(toy, process_group=group)
                key = (size, backend, name)
                found[key] = gradients(model, toy, *local, name, backend, group)
                del model
        if size == world:
            found["sent"] = {k: sent(k) for k in (4, 8)}
            try:
                image = torch.zeros(rank + 1, 2)
                losses.ce_clip_loss(image, image, 1.0)
            except ValueError as error:
                found["error"] = str(error)
    if rank == 0:
        torch.save(found, out)
    gc.collect()  # a wrapped model that outlives its process group may abort the process
    dist.barrier()
    dist.destroy_process_group()


def counted(function, name, count, one, two=None, **options):
    """A collective that first counts the numbers that leave this rank, for each other rank."""
    given = two if name == "all_gather" else one
    count[0] += given.numel() * (2 if name == "all_reduce" else 1)
    return function(one, **options) if two is None else function(one, two, **options)


def sent(k):
    """Numbers of [b, D] blocks that a rank hands to others, by the fused path and by the plain."""
    volumes = []
    for backend in ("torch", "plain"):
        count = [0]
        real = {
            name: getattr(dist, name) for name in ("all_gather", "reduce_scatter", "all_reduce")
        }

        b, d = 8, 256
        torch.manual_seed(3)
        features = [normalize(torch.randn(*s, d), dim=-1) for s in ((b,), (b,), (b, k))]
        leaves = [x.requires_grad_() for x in features]
        for name, function in real.items():
            setattr(dist, name, functools.partial(counted, function, name, count))
        out = losses.ce_clip_loss(
            leaves[0], leaves[1], 9.0, leaves[2], imc="released", backend=backend
        )
        out["loss"].backward()
        for name, function in real.items():
            setattr(dist, name, function)
        volumes.append(count[0] / (b * d))
    return volumes


@pytest.mark.slow
def test_gradients_of_ranks_equal_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Forked, for an import of torch in each process takes longer than the test.
    mp.start_processes(worker, (4, port, tmp_path / "out.pt"), nprocs=4, start_method="fork")
    found = torch.load(tmp_path / "out.pt")
    assert "1 and 4 rows" in found.pop("error")
    # Gathering everything costs 2 (2 + K) blocks, there and back; the fused path sends 4.
    for k, (fused, plain) in found.pop("sent").items():
        assert plain / fused >= {4: 2.5, 8: 4.5}[k], (fused, plain)
    assert len(found) == 4 * 2 * len(RECIPES)
    for (size, backend, name), got in found.items():
        toy = Toy()
        wanted = gradients(toy, toy, *inputs(), name, "plain")
        pairs = zip(wanted, got, strict=True)
        same = all(torch.allclose(a, b, atol=1e-11, rtol=1e-11) for a, b in pairs)
        assert same == (size != "broken"), (size, backend, name)

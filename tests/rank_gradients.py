"""Gradients of one training step in 1, 2 and 4 processes, for test_distributed_train.py.

  python tests/rank_gradients.py MANIFEST IMAGES OUT

Imports once, then forks the ranks. Writes OUT/RECIPE_WORLD_MICRO.pt.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from evaluate import Rank, load_model

# Recipe, ranks, images of a part; the first of each recipe is one process with one part.
CASES = [("ce-clip", *case) for case in ((1, 8), (1, 2), (2, 4), (2, 2), (4, 2), (4, 1))]
CASES += [("released", *case) for case in ((1, 8), (2, 4), (2, 2))]


def step(recipe: str, world: int, micro: int, number: int, argv: list[str]) -> None:
    """Run the second step of a run, whose thresholds are not 0, and save its gradients."""
    torch.set_num_threads(1)
    manifest, images, out = argv
    args = train.parse_args(
        [
            *("--data", manifest, "--images", images, "--model", "shapes-tiny"),
            *("--recipe", recipe, "--batch-size", "8", "--micro-batch", str(micro)),
            *("--steps", "2", "--distill", "1", "--captions", "one", "--workers", "0"),
        ]
    )
    rank = Rank(number, world, torch.device("cpu"))
    torch.manual_seed(0)
    model = load_model(args.model)
    run = train.make_run(args, model, rank)
    run.towers.train()
    with torch.no_grad():
        for p in run.teacher.parameters():
            p.mul_(1.01)
    loader = train.make_loader(run, train.make_source(args, model, run.loss, rank), 0)
    for parts in loader:
        run.optimizer.zero_grad()
        values = train.gradients(run, parts)
    if number == 0:
        grads = {n: p.grad.clone() for n, p in run.net.named_parameters() if p.grad is not None}
        content = {"grads": grads, "loss": values["loss"].detach(), "parts": len(parts)}
        content["threshold"] = run.loss.threshold.value
        torch.save(content, f"{out}/{recipe}_{world}_{micro}.pt")


def main(argv: list[str]) -> int:
    """Run all cases; returns the worst exit code."""
    worst = 0
    for recipe, world, micro in CASES:
        store = tempfile.mktemp()
        ranks = []
        for number in range(world):
            pid = os.fork()
            if not pid:
                if world > 1:
                    place = {"rank": number, "world_size": world}
                    dist.init_process_group("gloo", init_method=f"file://{store}", **place)
                step(recipe, world, micro, number, argv)
                gc.collect()
                if world > 1:
                    dist.destroy_process_group()
                sys.stdout.flush()
                os._exit(0)
            ranks.append(pid)
        worst = max([worst, *(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks)])
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: MIT
"""Time and memory of losses.py against other ways to compute the same loss, in the same run.

  python scripts/bench_losses.py                                  # the table of the README, 15 min
  python scripts/bench_losses.py --batch 512 --rounds 5
  python scripts/bench_losses.py --device cuda --dtype bf16 --batch 4096 8192

All compute the released recipe, forward and backward: itc with the negatives of the whole batch,
imc over the negatives of the whole batch, cmr.  That is 27 products of [B, D] with [D, B] at K = 4.

  ours      losses.py, fused
  released  a plain autograd port of the released Clip_DALoss
  chunked   the same by rows, each chunk under torch.utils.checkpoint
  linear    torch's F.linear_cross_entropy, where torch has it
  floor     the bare products, 1 + 2K forward and twice that backward
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--batch",
        type=int,
        nargs="+",
        default=[64, 256, 1024, 4096, 8192],
        help="batch sizes (default 64 to 8192)",
    )
    add("--k", type=int, default=4, help="negatives of each caption (default 4)")
    add("--width", type=int, default=512, help="width of the features (default 512)")
    ways = ["released", "chunked", "linear"]
    add(
        "--against",
        nargs="*",
        choices=ways,
        default=ways,
        help="ways to compare with (default: all)",
    )
    add("--rounds", type=int, default=15, help="largest number of rounds (default 15)")
    text = "seconds for each batch size, after three rounds (default 120)"
    add("--seconds", type=float, default=120, help=text)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default cpu)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (default fp32)")
    add("--threads", type=int, help="threads of the CPU (default all)")
    add("--out", type=Path, help="JSON file to write (default: none)")
    return parser.parse_args()


if __name__ == "__main__":  # --help is answered before torch is imported
    parse_args()

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from losses import CEClipLoss

WEIGHTS = {"imc": 0.2, "cmr": 0.4}


class Released:
    """The released Clip_DALoss with thresholds, written anew: dense logits, plain autograd."""

    def __init__(self, cap: float = 10.0) -> None:
        """Start thresholds at 0."""
        self.theta, self.cap = torch.zeros(()), cap

    def __call__(
        self, images: Tensor, texts: Tensor, negatives: Tensor, valid: Tensor, scale: Tensor
    ) -> Tensor:
        """Loss of [B, D] images and texts, [B, K, D] negatives and their mask [B, K]."""
        b = len(images)
        hard = negatives.flatten(0, 1)
        to_text = scale * images @ torch.cat([texts, hard]).T  # [B, (1+K) B]
        to_image = scale * texts @ images.T
        labels = torch.arange(b, device=images.device)
        loss = (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2
        intra = scale * texts @ hard.T  # [B, KB]
        loss = loss + WEIGHTS["imc"] * F.cross_entropy(intra, torch.zeros_like(labels))
        return loss + WEIGHTS["cmr"] * self.rank(to_text, images, negatives, valid, scale)

    def rank(
        self, to_text: Tensor, images: Tensor, negatives: Tensor, valid: Tensor, scale: Tensor
    ) -> Tensor:
        """The rank loss with the last step's thresholds, which it then sets anew."""
        true = to_text.diagonal()
        own = scale * (negatives @ images[..., None])[..., 0] * valid
        excess = F.relu(self.theta + own - true[:, None]) * valid
        theta = true.mean() - own.sum(0) / (own != 0).sum(0)
        self.theta = theta.detach().clamp(0, self.cap)
        return excess.mean()


def chunked(
    images: Tensor, texts: Tensor, negatives: Tensor, valid: Tensor, scale: Tensor
) -> Tensor:
    """The same loss by chunks of rows, each of them formed again in the backward pass."""
    b, hard = len(images), negatives.flatten(0, 1)
    rows = max(1, 2**23 // len(hard))

    def part(start: int) -> Tensor:
        mine = slice(start, start + rows)
        labels = torch.arange(b, device=images.device)[mine]
        to_text = scale * images[mine] @ torch.cat([texts, hard]).T
        to_image = scale * texts[mine] @ images.T
        intra = scale * texts[mine] @ hard.T
        own = scale * (negatives[mine] @ images[mine][..., None])[..., 0]
        true = to_text.gather(1, labels[:, None])
        total = functools.partial(F.cross_entropy, reduction="sum")
        itc = total(to_text, labels) + total(to_image, labels)
        imc = total(intra, torch.zeros_like(labels))
        cmr = (F.relu(own - true) * valid[mine]).sum() / valid.shape[1]
        return (itc / 2 + WEIGHTS["imc"] * imc + WEIGHTS["cmr"] * cmr) / b

    parts = [checkpoint(part, start, use_reentrant=False) for start in range(0, b, rows)]
    return torch.stack(parts).sum()


def linear(
    images: Tensor, texts: Tensor, negatives: Tensor, valid: Tensor, scale: Tensor
) -> Tensor:
    """The three softmaxes by torch's own chunked linear_cross_entropy."""
    b, hard = len(images), negatives.flatten(0, 1)
    labels = torch.arange(b, device=images.device)
    cross: Any = getattr(F, "linear_cross_entropy")  # noqa: B009 - not in every torch
    itc = cross(scale * images, torch.cat([texts, hard]), labels)
    itc = itc + cross(scale * texts, images, labels)
    imc = cross(scale * texts, hard, torch.zeros_like(labels))
    own = scale * (negatives @ images[..., None])[..., 0]
    cmr = (F.relu(own - scale * (images * texts).sum(1, keepdim=True)) * valid).mean()
    return itc / 2 + WEIGHTS["imc"] * imc + WEIGHTS["cmr"] * cmr


def ours() -> Callable[..., Tensor]:
    """losses.py with the released recipe."""
    loss = CEClipLoss("released")

    def run(
        images: Tensor, texts: Tensor, negatives: Tensor, valid: Tensor, scale: Tensor
    ) -> Tensor:
        return loss(images, texts, scale, negatives, valid)["loss"]

    return run


def make(name: str) -> Callable[..., Tensor]:
    """The loss of that name, with fresh thresholds."""
    return {
        "ours": ours,
        "released": Released,
        "chunked": lambda: chunked,
        "linear": lambda: linear,
    }[name]()


def make_inputs(b: int, args: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """Random unit features that want gradients, logit_scale, and the mask of negatives."""
    torch.manual_seed(b)
    shapes = [(b, args.width), (b, args.width), (b, args.k, args.width)]
    features = [F.normalize(torch.randn(*s, device=args.device), dim=-1) for s in shapes]
    valid = torch.rand(b, args.k, device=args.device) < 0.8
    scale = torch.tensor(50.0, device=args.device)
    return [t.requires_grad_() for t in (*features, scale)], valid


def step(loss: Callable[..., Tensor], leaves: list[Tensor], valid: Tensor, half: bool) -> None:
    """One forward and backward pass."""
    images, texts, negatives, scale = leaves
    for leaf in leaves:
        leaf.grad = None
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        value = loss(images, texts, negatives, valid, scale)
    value.backward()


def floor(leaves: list[Tensor], half: bool) -> None:
    """Only the products, each of its own size, operands and results ready."""
    images, texts, negatives, _ = (t.detach() for t in leaves)
    if half:
        images, texts, negatives = (t.bfloat16() for t in (images, texts, negatives))
    hard = negatives.flatten(0, 1)
    rows = max(1, 2**23 // len(hard))
    for start in range(0, len(images), rows):
        both = torch.cat([images[start : start + rows], texts[start : start + rows]])
        pair, logits = both[: len(both) // 2] @ texts.T, both @ hard.T
        pair @ texts, pair.T @ both[: len(both) // 2]
        logits @ hard, logits.T @ both


def clock(run: Callable[[], None], device: str) -> float:
    """Seconds of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_memory(name: str, b: int, args: argparse.Namespace, queue: Any = None) -> float:
    """Peak MiB of one step beyond inputs and gradients; on the CPU in a process of its own."""
    if args.device == "cpu" and queue is None:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=extra_memory, args=(name, b, args, queue))
        process.start()
        value = queue.get()
        process.join()
        return value
    torch.set_num_threads(args.threads)
    loss, (leaves, valid) = make(name), make_inputs(b, args)
    small = argparse.Namespace(**{**vars(args), "width": 8})
    step(loss, *make_inputs(512, small), args.dtype == "bf16")  # what torch loads at first use
    loss = make(name)
    gradients = sum(t.numel() * t.element_size() for t in leaves) / 2**20
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        step(loss, leaves, valid, args.dtype == "bf16")
        return torch.cuda.max_memory_allocated() / 2**20 - before - gradients
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(loss, leaves, valid, args.dtype == "bf16")
    value = _status("VmHWM") - before - gradients
    queue.put(value)
    return value


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def bench(b: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of interleaved rounds at one batch size."""
    half = args.dtype == "bf16"
    leaves, valid = make_inputs(b, args)
    names = [n for n in args.against if n != "linear" or hasattr(F, "linear_cross_entropy")]
    losses = {name: make(name) for name in ("ours", *names)}
    runs: dict[str, Callable[[], None]] = {
        name: lambda loss=loss: step(loss, leaves, valid, half)  # type: ignore[misc]
        for name, loss in losses.items()
    }
    runs["floor"] = lambda: floor(leaves, half)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    budget = time.perf_counter() + args.seconds
    for turn in range(args.rounds + 1):
        for name, run in runs.items():
            spent = clock(run, args.device)
            if turn:  # the first warms up
                seconds[name].append(spent)
        if turn >= 3 and time.perf_counter() > budget:
            break
    line: dict[str, Any] = {"batch": b, "k": args.k, "width": args.width, "rounds": turn}
    line["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    line["memory_mib"] = {name: extra_memory(name, b, args) for name in losses}
    if args.device == "cuda":
        products = 3 * (1 + 2 * args.k)
        line["effective_tflops"] = products * 2e-12 * b * b * args.width / line["seconds"]["ours"]
    return line


def show(line: dict[str, Any]) -> None:
    """Print one line for each way."""
    mine, memory = line["seconds"]["ours"], line["memory_mib"]
    for name, seconds in line["seconds"].items():
        extra = f"{memory[name]:8.0f} MiB" if name in memory else ""
        ratio = memory[name] / max(memory["ours"], 0.1) if name in memory else 0
        more = f"{ratio:6.1f} x" if ratio else ""
        times = f"{1e3 * seconds:10.1f} ms {seconds / mine:6.2f} x"
        print(f"{line['batch']:6d}  {name:9} {times} {extra}{more}")
    print(flush=True)


def main() -> None:
    """Run, print, write."""
    args = parse_args()
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    lines = []
    for b in args.batch:
        lines.append(bench(b, args))
        show(lines[-1])
    if args.out:
        where = {"torch": torch.__version__, "machine": platform.machine(), "threads": args.threads}
        where["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        content = {**where, "dtype": args.dtype, "lines": lines}
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

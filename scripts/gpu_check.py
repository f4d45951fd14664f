#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""The checks that need a GPU, as one JSON: loss, kernels, step, loader and ranks.

  bash scripts/gpu_check.sh          # prints the JSON; at most 8 minutes

Every part says "ok", what it measured, or why it did not run; exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # --help is answered before torch is imported
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))

from losses import RECIPES, ce_clip_loss_and_grads

ROOT = Path(__file__).parents[1]
# Largest error of a gradient, of its largest entry, against float64 on the CPU.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-2}
SECONDS = 480


def inputs(b: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Unit features of a batch that is learnt halfway: float64 numbers that `dtype` holds."""
    torch.manual_seed(0)
    image, other, negative, positive = (torch.randn(b, d, dtype=torch.float64) for _ in range(4))
    negatives = image[:, None] + torch.randn(b, 4, d, dtype=torch.float64) + negative[:, None]
    features = {
        **{"image_features": image, "text_features": image + other},
        **{"negative_features": negatives, "positive_features": image + positive},
    }
    found = {k: normalize(v, dim=-1).to(dtype).double() for k, v in features.items()}
    return {**found, "valid": torch.rand(b, 4) < 0.8}


def check_loss(b: int = 512, d: int = 512, device: str = "cuda") -> dict[str, Any]:
    """The loss and its gradients on the GPU against the plain float64 path on the CPU."""
    found = {}
    for dtype, tolerance in TOLERANCE.items():
        given = inputs(b, d, dtype)
        moved = {k: v.to(device, v.dtype if k == "valid" else dtype) for k, v in given.items()}
        for recipe, bundle in RECIPES.items():
            options: Any = {k: bundle[k] for k in bundle.keys() - {"threshold", "reset_each_epoch"}}
            out, grads = ce_clip_loss_and_grads(
                **given, logit_scale=50.0, backend="plain", **options
            )
            with torch.autocast(device, torch.bfloat16, enabled=dtype != torch.float32):
                ours, mine = ce_clip_loss_and_grads(**moved, logit_scale=50.0, **options)
            worst = abs(float(ours["loss"]) / float(out["loss"]) - 1)
            for name, grad in grads.items():
                largest = max(float(grad.abs().max()), 1e-9)
                away = (mine[name].double().cpu() - grad).abs().max().detach()
                worst = max(worst, float(away) / largest)
            name = f"{recipe} {str(dtype).removeprefix('torch.')}"
            found[name] = {"error": float(f"{worst:.2g}"), "ok": worst <= tolerance}
    return {"ok": all(row["ok"] for row in found.values()), "cases": found}


def run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run one of the kit's scripts with this Python."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )


def check_tests(seconds: float) -> dict[str, Any]:
    """The tests of the losses, kernels included, as this GPU runs them."""
    done = run(["-m", "pytest", "-q", "tests/test_losses.py", "-k", "kernel or cuda"], seconds)
    return {"ok": done.returncode == 0, "said": done.stdout.strip().splitlines()[-1:]}


def check_script(name: str, options: list[str], seconds: float) -> dict[str, Any]:
    """A benchmark of scripts/, and what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        done = run([f"scripts/{name}.py", *options, "--out", str(out)], seconds)
        if done.returncode or not out.exists():
            return {"ok": False, "said": done.stderr.strip().splitlines()[-3:]}
        return {"ok": True, "measured": json.loads(out.read_text())}


def check_ranks(seconds: float) -> dict[str, Any]:
    """Two ranks with NCCL train the shapes world and end with the weights of one."""
    if torch.cuda.device_count() < 2:
        return {"ok": True, "said": "not run: needs two GPUs"}
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            out = Path(folder, str(ranks))
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            options = ["--steps", "3", "--batch-size", "16", "--out", str(out)]
            done = run([*(launch if ranks > 1 else []), "train.py", *options], seconds / 2)
            if done.returncode:
                return {"ok": False, "said": done.stderr.strip().splitlines()[-3:]}
            weights.append(torch.load(out / "latest.pt", weights_only=True)["state_dict"])
    away = max(float((weights[0][k] - v).abs().max()) for k, v in weights[1].items())
    return {"ok": away < 5e-3, "largest_difference_of_a_weight": away}


def main() -> int:
    """Run all checks within the time, print the JSON."""
    if not torch.cuda.is_available():
        print(json.dumps({"ok": None, "said": "not run: torch finds no GPU here"}))
        return 0
    step = ["--device", "cuda", "--batch-size", "256", "--precision", "bf16"]
    losses = ["--device", "cuda", "--dtype", "bf16", "--batch", "1024", "--seconds", "40"]
    checks: dict[str, Callable[[float], dict[str, Any]]] = {
        "loss": lambda left: check_loss(),
        "kernels": check_tests,
        "step": lambda left: check_script("bench_step", step, left),
        "losses": lambda left: check_script("bench_losses", losses, left),
        "loader": lambda left: check_script("bench_data", ["--lines", "1000"], left),
        "ranks": check_ranks,
    }
    began = time.monotonic()
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result: dict[str, Any] = {**about, "machine": platform.machine(), "cpus": os.cpu_count()}
    for name, check in checks.items():
        start = time.monotonic()
        left = SECONDS - (start - began)
        try:
            if left < 10:
                raise TimeoutError(f"not run: the other checks took {SECONDS - left:.0f} s")
            result[name] = check(left)
        except Exception as error:  # one check's failure is its result
            result[name] = {"ok": False, "said": f"{type(error).__name__}: {str(error)[:300]}"}
        result[name]["seconds"] = round(time.monotonic() - start, 1)
    result["ok"] = all(result[name]["ok"] for name in checks)
    print(json.dumps(result, indent=1))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

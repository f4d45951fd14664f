# SPDX-License-Identifier: MIT
"""Time evaluate.py against a loop that takes one item at a time, as SugarCrepe's own script does.

Same model, same items, float32, one process with all threads. For every item the loop opens the
photo, transforms it and encodes it, and each of the captions by itself at full length: three calls
with a batch of 1, as text_retrieval of SugarCrepe's main_eval.py makes them. Ours encodes each
distinct photo and text once. Loading the model counts for neither; nor does the hash of its
weights, which evaluate.py takes once for results.json ("hash seconds").

  OMP_NUM_THREADS=2 python scripts/bench_eval.py --ckpt WHAT [--model NAME] --root DIR \\
      [--suite sugarcrepe] [--out scripts/results/eval-speed.json]
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", help="checkpoint or folder to score (default: random weights of --model)")
    add("--model", help="open_clip model name or config .json (default: the checkpoint's)")
    add("--root", type=Path, required=True, help="folder of the suites' files, as for evaluate.py")
    add("--suite", default="sugarcrepe", help="suite with one image an item (default sugarcrepe)")
    add("--repeats", type=int, default=3, help="runs of which the median counts (default 3)")
    add("--out", type=Path, help="JSON file to write the result to (default: print it only)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help is answered before torch is imported

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
from data import DataError
from negatives import run_script


@torch.no_grad()
def one_at_a_time(
    model: evaluate.Model, items: list[evaluate.TestItem], transform: Any
) -> list[bool]:
    """Verdicts of a loop over items: image and captions are encoded each time, one by one."""
    right = []
    for item in items:
        texts = [
            model.net.encode_text(model.tokenizer([text]), normalize=True) for text in item.texts
        ]
        image = transform(evaluate.load_image(item.images[0], 0))[None]
        image = model.net.encode_image(image, normalize=True)
        scores = [float(text @ image.T) for text in texts]
        right.append(scores[0] > max(scores[1:]))
    return right


class Clock:
    """Wall and CPU seconds since it was made; the latter count on a busy machine."""

    def __init__(self) -> None:
        """Start."""
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self, wall: list[float], cpu: list[float]) -> None:
        """Note both."""
        wall.append(time.perf_counter() - self.wall)
        cpu.append(time.process_time() - self.cpu)


def median(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The middle one of each."""
    return {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}


def main() -> None:
    """Time both, check that the verdicts agree, print and write the ratio."""
    own = parse_args()
    if own.repeats < 1:
        raise DataError("--repeats must be 1 or more")
    if not own.ckpt and not own.model:
        raise DataError("give --ckpt, or --model for random weights")
    if own.out and (own.out.exists() or not own.out.absolute().parent.is_dir()):
        raise DataError(f"--out {own.out}: is there already, or its folder is not; name another")
    if own.suite not in evaluate.SUITES:
        raise DataError(f"--suite {own.suite}: is one of {', '.join(evaluate.SUITES)}")
    args = evaluate.parse_args([])
    args.device = "cpu"
    suite = evaluate.load_suite(own.suite, own.root, partial=True)
    if not suite.items or any(len(x.images) != 1 or x.true != 1 for x in suite.items):
        raise DataError(f"--suite {own.suite}: want items of one image and one true caption")
    model = evaluate.load_model(own.model, own.ckpt)
    model.net.eval()
    transform = evaluate.Encoder(model, args).transform
    start = time.perf_counter()
    evaluate.hash_model(model)
    hash_seconds = time.perf_counter() - start
    seconds: dict[str, list[float]] = {"one at a time": [], "evaluate.py": []}
    cpu: dict[str, list[float]] = {"one at a time": [], "evaluate.py": []}
    for _ in range(own.repeats):
        clock = Clock()
        slow = one_at_a_time(model, suite.items, transform)
        clock.stop(seconds["one at a time"], cpu["one at a time"])
        clock = Clock()
        scored = evaluate.score_suite(suite, evaluate.Encoder(model, args))
        clock.stop(seconds["evaluate.py"], cpu["evaluate.py"])
    fast = [record["correct"] for record in scored.records]
    wall, work = median(seconds), median(cpu)
    result = {
        "suite": own.suite,
        "items": len(suite.items),
        "expected": sum(suite.expected.values()),
        "model": Path(own.model or own.ckpt).name,
        "images": len({image for item in suite.items for image in item.images}),
        "texts": len({text for item in suite.items for text in item.texts}),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": seconds,
        "cpu seconds": cpu,
        "hash seconds": hash_seconds,
        "ratio": wall["one at a time"] / wall["evaluate.py"],
        "cpu ratio": work["one at a time"] / work["evaluate.py"],
        "same verdicts": sum(a == b for a, b in zip(slow, fast, strict=True)),
    }
    print(json.dumps(result, indent=1))
    if own.out:
        evaluate.write_text(own.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_script(main, "bench_eval.py"))

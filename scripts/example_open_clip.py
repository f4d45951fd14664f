# SPDX-License-Identifier: MIT
"""CE-CLIP inside open_clip's own training: `patch` is all that open_clip's loop needs.

  pip install pandas webdataset      # what open_clip_train itself imports
  python scripts/example_open_clip.py

Runs open_clip_train's real main on a tiny csv for two epochs, with --accum-freq 2.  Each cell of
the csv's caption column is "caption | negative | negative | ...", empty where one is missing.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # --help is answered before anything heavy is imported
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()

import open_clip
import torch
from open_clip_train import main as open_clip_main

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import caption_scene, draw_scene, make_scene
from losses import CEClipLoss

CONFIG = Path(__file__).with_name("shapes-tiny.json")


def patch(accum: int, loss: CEClipLoss) -> None:
    """Let open_clip_train feed the loss; `accum` is its --accum-freq."""
    make_model, make_tokenizer = open_clip.create_model_and_transforms, open_clip.get_tokenizer

    def tokenizer(*args: Any, **options: Any) -> Any:  # cells -> [B, 1 + K, 77]
        plain = make_tokenizer(*args, **options)
        return lambda cells: torch.stack([plain(cell.split(" | ")) for cell in cells])

    def model(*args: Any, **options: Any) -> Any:
        net, *transforms = make_model(*args, **options)
        whole = net.forward

        def forward(images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
            made = net.encode_text(texts[:, 1:].flatten(0, 1), normalize=True)
            valid = (texts[:, 1:] != 0).sum(dim=2) > 2  # an empty text is begin and end alone
            negatives = made.view(*valid.shape, -1)
            out = whole(images, texts[:, 0])
            return {**out, "negative_features": negatives, "valid": valid}

        net.forward = forward
        net.thresholds = loss.threshold  # so they are in the checkpoint, and back on --resume
        return net, *transforms

    calls = [0]

    def once_a_step(**features: Any) -> Any:  # with accumulation thresholds move once a step
        calls[0] += 1
        return loss(**features, update=calls[0] % accum == 0)

    open_clip_main.create_model_and_transforms = model
    open_clip_main.get_tokenizer = tokenizer
    open_clip_main.create_loss = lambda args: once_a_step


def write_csv(folder: Path, count: int) -> Path:
    """Draw scenes and write their captions and negatives."""
    path = folder / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "texts"])
        for index in range(count):
            scene = make_scene("train", 0, index)
            draw_scene(scene, 64).save(folder / f"{index}.png")
            said = caption_scene(scene, index)
            texts = [said.caption, *(text or "" for text in said.negatives)]
            writer.writerow([folder / f"{index}.png", " | ".join(texts)])
    return path


def main() -> None:
    """Train two epochs, print what the checkpoint holds of the thresholds."""
    open_clip.add_model_config(CONFIG)
    loss = CEClipLoss("ce-clip", imc="repulsion")  # each image has one caption here
    patch(2, loss)
    with tempfile.TemporaryDirectory() as folder:
        data = write_csv(Path(folder), 16)
        options = f"--train-data {data} --dataset-type csv --csv-separator , --csv-img-key image "
        options += "--csv-caption-key texts --model shapes-tiny --batch-size 4 --accum-freq 2 "
        options += f"--epochs 2 --warmup 1 --lr 1e-4 --workers 0 --logs {folder} --name run"
        open_clip_main.main(options.split())
        path = Path(folder, "run/checkpoints/epoch_2.pt")
        kept = torch.load(path, weights_only=True)["state_dict"].pop("thresholds.value")
        for name, value in zip(loss.types, kept.tolist(), strict=True):
            print(f"threshold_{name} {value:.3f}")
        print((Path(folder, "run/out.log").read_text().splitlines())[-1])


if __name__ == "__main__":
    main()

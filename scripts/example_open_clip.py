# SPDX-License-Identifier: MIT
"""A training step of any open_clip model with the losses of losses.py.

python scripts/example_open_clip.py
"""

import sys
from pathlib import Path

import open_clip
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))
from losses import CEClipLoss

CAPTIONS = ["a dog chases a cat", "a red cup on a blue plate"]
NEGATIVES = [
    ["a cat chases a dog", "a white dog chases a cat", "a dog chases a bird", "a dog licks a cat"],
    ["a red cup under a blue plate", "a blue cup on a red plate", "a red pan on a blue plate", ""],
]


def main() -> None:
    """Do one step with random weights and pictures."""
    model = open_clip.create_model("ViT-B-32-quickgelu")  # pretrained="openai" for real
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    loss = CEClipLoss("ce-clip", imc="repulsion")  # each picture has one caption here
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)

    images = torch.randn(2, 3, 224, 224)  # [B, 3, H, W]
    valid = torch.tensor([[text != "" for text in texts] for texts in NEGATIVES])  # [B, K]
    image_features = normalize(model.encode_image(images), dim=-1)
    text_features = normalize(model.encode_text(tokenizer(CAPTIONS)), dim=-1)
    flat = tokenizer([text for texts in NEGATIVES for text in texts])
    negatives = normalize(model.encode_text(flat), dim=-1).view(*valid.shape, -1)  # [B, K, D]
    out = loss(image_features, text_features, model.logit_scale.exp(), negatives, valid)
    out["loss"].backward()
    optimizer.step()
    print({name: round(float(value.detach()), 4) for name, value in out.items()})


if __name__ == "__main__":
    main()

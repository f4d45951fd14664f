# SPDX-License-Identifier: MIT
"""A training step of transformers' CLIP and SigLIP with the losses of losses.py.

pip install transformers
python scripts/example_transformers.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # --help is answered before anything heavy is imported
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()

import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))
from losses import CEClipLoss


def step(model: Any, loss: CEClipLoss, images: Any, tokens: Any, valid: Any) -> dict[str, float]:
    """One step on images [B, 3, H, W], tokens of a caption and K negatives [B, 1 + K, L]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)
    out = model(input_ids=tokens.flatten(0, 1), pixel_values=images)
    image_features = normalize(out.image_embeds, dim=-1)
    texts = normalize(out.text_embeds, dim=-1).view(*tokens.shape[:2], -1)  # [B, 1 + K, D]
    scale, bias = model.logit_scale.exp().squeeze(), getattr(model, "logit_bias", None)
    bias = None if bias is None else bias.squeeze()  # SigLIP has one, CLIP has none
    parts = loss(image_features, texts[:, 0], scale, texts[:, 1:], valid, logit_bias=bias)
    parts["loss"].backward()
    optimizer.step()
    return {name: round(float(value.detach()), 4) for name, value in parts.items()}


def main() -> None:
    """Do one step of each with random weights, images and tokens."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    tower: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    text, vision = {**tower, "vocab_size": 999}, {**tower, "image_size": 64, "patch_size": 16}
    images, tokens = torch.randn(3, 3, 64, 64), torch.randint(3, 900, (3, 5, 12))
    tokens[:, :, -1] = 998  # end of text
    text |= {"eos_token_id": 998, "bos_token_id": 1, "pad_token_id": 0}
    valid = torch.rand(3, 4) < 0.8
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    for model in (clip, siglip):
        loss = CEClipLoss("ce-clip", imc="repulsion")  # each image has one caption here
        print(type(model).__name__, step(model, loss, images, tokens, valid))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""A loss of your own for train.py: CE-CLIP, and a term that pulls image and caption together.

  python train.py --loss scripts/example_loss.py:WithAlignment

All ranks call `forward`, each with its own rows; train.py averages gradients over ranks, and logs
every part by its name. A term that compares rows of the whole batch needs losses.gather_rows.
"""

import argparse
import sys
from typing import Any

if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args(
        sys.argv[1:] or ["--help"]
    )

from losses import CEClipLoss


class WithAlignment(CEClipLoss):
    """Adds the mean squared distance between unit-length images and captions [b, D]."""

    def forward(self, image_features: Any, text_features: Any, *rest: Any, **named: Any) -> Any:
        """As CEClipLoss.forward; returns its parts and `alignment`."""
        out = super().forward(image_features, text_features, *rest, **named)
        alignment = (image_features - text_features).square().sum(dim=1).mean()
        return {**out, "loss": out["loss"] + 0.1 * alignment, "alignment": alignment.detach()}

# SPDX-License-Identifier: MIT
"""Score checkpoints: does the model prefer the true caption, and did zero-shot or retrieval drop?

Every suite is a list of items: images, and texts with the true ones first. Each distinct image and
text is encoded once; an item is judged by its matrix of cosine similarities. Ties count as wrong.

  python evaluate.py --ckpt runs/ce-clip/latest.pt --suite shapes
  python evaluate.py --ckpt runs/coco/latest.pt --suite paper --root DIR --out results
  python evaluate.py --ckpt clip=ViT-B-32-quickgelu:openai --ckpt ours=runs/coco/latest.pt \\
      --suite sugarcrepe,sugarcrepe_pp,retrieval --root DIR --out results
  python evaluate.py --ckpt CE_CLIP.pt --model ViT-B-32-quickgelu --suite paper --root DIR
  python evaluate.py --ckpt runs/coco/latest.pt --suite my.jsonl,my_loader.py:load
  torchrun --nproc_per_node=8 evaluate.py --ckpt runs/coco/latest.pt --suite all --root DIR
  python evaluate.py --list --root DIR

A benchmark of your own is a .jsonl (or a .json list) of records such as

  {"images": "a.jpg", "texts": ["a dog", "a cat"], "subset": "nouns"}

images: a path, or a list of paths, relative to the file or to --root. texts: the true ones first;
`true` says how many are true (default 1). One image takes two or more texts, two or more images
take one text or as many texts as images, in the same order. Optional: subset, id, tags (a list of
strings) and crop ([left, top, right, bottom] in pixels, of a single image). my_loader.py:load names
a function of --root (a Path or None) that yields such records.

Chapters: options, models, suites, features, processes, verdicts, text-only baselines, figures,
comparison, command. scripts/make_tables.py renders the tables; scripts/suites.json describes the
official suites and scripts/suites.py reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import pickle
import platform
import random
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

# Options

SCRIPTS = Path(__file__).parent / "scripts"


@functools.cache
def read_table(name: str) -> Any:
    """Read one of the kit's own tables: suites, published, classes, symmetric_relations."""
    return json.loads((SCRIPTS / f"{name}.json").read_text(encoding="utf-8"))


SUITES = tuple(read_table("suites"))
PAPER = ["aro", "valse", "vl_checklist", "sugarcrepe", "retrieval", "zeroshot", "probe"]
GROUPS = {
    "paper": PAPER,
    "all": [name for name in SUITES if name != "shapes"],
    "table1": PAPER[:2],
    "table2": PAPER[2:3],
    "table3": PAPER[3:4],
    "table4": PAPER[:3],
    "figure5": PAPER[:1],
    "general": PAPER[4:],
    "ce-clip-plus": PAPER[:4],
    "newer": [name for name in SUITES if name not in (*PAPER, "shapes")],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, before any slow import."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what to score").add_argument
    add(
        "--ckpt",
        action="append",
        default=[],
        metavar="[LABEL=]WHAT",
        help="a checkpoint file, a folder of open_clip or transformers, hf-hub:ORG/REPO or "
        "MODEL:TAG of open_clip; repeat it to compare several models",
    )
    add(
        "--suite",
        default="shapes",
        metavar="NAMES",
        help=f"comma list of suites to score (default: shapes): {', '.join(SUITES)}; groups of "
        f"suites: {', '.join(GROUPS)}; or files of your own: my.json, my.jsonl, my_loader.py:load",
    )
    add(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder that holds the suites' official files and images, as --list names them "
        "(default: none; only shapes and your own files work without)",
    )
    add("--out", type=Path, metavar="DIR", help="folder to write results.json, .md, .tex, .csv and "
        "items/ to (default: print only)")  # fmt: skip
    add(
        "--baseline",
        metavar="LABEL",
        help="checkpoint that all others are compared with by paired tests; it comes first in the "
        "tables (default: the first --ckpt)",
    )
    add(
        "--list",
        action="store_true",
        help="print each suite's files, size in GB, source, licence and which files are in --root, "
        "then exit",
    )
    add = parser.add_argument_group("models").add_argument
    add(
        "--model",
        metavar="NAME",
        help="open_clip model name, or a model config (.json), for checkpoints that do not name "
        "their own (default: the checkpoint's)",
    )
    add("--pretrained", metavar="TAG", help="open_clip tag of --model, to use instead of --ckpt")
    add(
        "--activation",
        choices=("gelu", "quickgelu"),
        help="activation to use instead of the checkpoint's own; gelu reproduces the published "
        "evaluation (default: the checkpoint's)",
    )
    rules = parser.add_argument_group("rules")
    add = rules.add_argument
    add(
        "--allow-missing",
        action="store_true",
        help="score the items whose files exist, and print N of M items",
    )
    add(
        "--ties",
        choices=("wrong", "official"),
        default="wrong",
        help="count ties as wrong, or break them as the suite's own code does (default: wrong)",
    )
    blind = rules.add_mutually_exclusive_group().add_argument
    blind("--no-blind", action="store_true", help="leave out the n-gram baseline (texts only)")
    blind(
        "--mlm",
        metavar="DIR",
        help="folder of a masked language model (transformers), a second text-only baseline "
        "(default: none)",
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--published",
        action="store_true",
        help="print published scores of other models beside ours (results.md always has them)",
    )
    add("--overwrite", action="store_true", help="replace results and items already in --out")
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder to store image and text features in for later runs (default: not stored)",
    )
    add = parser.add_argument_group("speed").add_argument
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images encoded at once; texts take four times as many (default: 128 on a GPU, "
        "24 on a CPU)",
    )
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision of the towers; scores are always float32 (default: fp32)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of the models; auto takes a GPU if there is one (default: auto)",
    )
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that decode images; 0 decodes in the main process (default: 0)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before torch is imported

# Idle OpenMP threads sleep; busy-waiting slows every step while another process uses the CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from data import (
    COLOURS,
    EDITS,
    SHAPES,
    DataError,
    Scene,
    draw_scene,
    encode_image,
    encode_text,
    make_scene,
    open_image,
    pack_tokens,
    run_script,
    say,
    writing,
)
from negatives import MaskedModel, launcher

if TYPE_CHECKING:
    from suites import Source

SHAPES_ITEMS = 500  # of each subset of the shapes suite
EVAL_SEED = 0  # of the shapes suite, the shuffles and the bootstrap; the tests never change
RESAMPLES = 2000
RECALLS = (1, 5, 10)
READERS = {"blind": "texts only", "masked": "texts only (masked)"}  # result keys, column titles
BLIND_FOLDS = 5
SHAPES_CONFIGS = {path.stem: path for path in sorted(SCRIPTS.glob("shapes-*.json"))}
# Images; four times as many texts. A layer's output should stay in a CPU's cache.
BATCH = {"cuda": 128, "cpu": 24}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Models


class Model(NamedTuple):
    """A CLIP model, its tokenizer, and its metadata (name, activation, recipe ...)."""

    net: Any
    tokenizer: Callable[[list[str]], torch.Tensor]
    about: dict[str, Any]


def load_model(
    name: str | None,
    pretrained: str | None = None,
    *,
    activation: str | None = None,
    device: str = "cpu",
) -> Model:
    """Build a model and load its weights: a tag, a checkpoint file, a folder or the hub.

    A checkpoint of train.py holds its model's config, activation and preprocessing, and loads
    without a network; any other file needs `name`. A folder holds open_clip_config.json with
    weights, or a CLIP or SigLIP of transformers. Position embeddings of a file are resized to the
    model's image size and context, as open_clip does, with a message on stderr.

    Args:
        name: an open_clip model name, "hf-hub:ORG/REPO", "shapes-tiny", or a model config (.json).
        pretrained: an open_clip tag, a path, or None for random weights (hub: the repository's).
        activation: "gelu" or "quickgelu", to override the one that the weights were trained with.
        device: device to load the model on.

    Raises:
        DataError: unknown model or tag, or a file that does not hold these weights.
    """
    import open_clip

    if name and name.startswith("hf-hub:"):
        if pretrained:
            raise DataError(
                f"--model {name}: brings its own weights; leave {pretrained} out, "
                f"or give the name of its open_clip model"
            )
        return _load_published(name, activation, device)
    if pretrained and os.path.isdir(pretrained):
        return _load_folder(Path(pretrained), name, activation, device)
    state: dict[str, torch.Tensor] | None = None
    about: dict[str, Any] = {}
    config: Any = None
    preprocess: dict[str, Any] = {}
    foreign = False
    if pretrained and (os.path.exists(pretrained) or Path(pretrained).suffix in WEIGHT_FILES):
        state, about = read_checkpoint(pretrained)
        config, preprocess = about.pop("config", None), dict(about.pop("preprocess", {}))
        preprocess.pop("size", None)  # the model's
        if not (name and Path(name).suffix == ".json"):  # a config of the user's own choice
            name, foreign = _agreed_name(name, about.get("model"), pretrained, config), bool(config)
    known = _add_config(config, str(name), str(pretrained)) if foreign else register(name)
    config = open_clip.get_model_config(known)
    if config is None:
        near = difflib.get_close_matches(known, [*open_clip.list_models(), *SHAPES_CONFIGS], 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise DataError(f"--model {known}: open_clip knows no such model; {hint}")
    quick = bool(config.get("quick_gelu"))
    if activation or about.get("activation"):
        quick = (activation or about["activation"]) == "quickgelu"
    tag = None if state is not None else pretrained
    if tag:
        _check_tag(known, tag, quick, activation)
    options = {"pretrained": tag, "quick_gelu": quick, "pretrained_text": state is None}
    net, tokenizer = _build(known, f"--model {known}", offline=foreign, **options)
    if state is not None:
        _fill(net, state, str(name), str(pretrained))
    cfg = net.visual.preprocess_cfg
    net.visual.preprocess_cfg = cfg | {
        key: preprocess[key] for key in preprocess.keys() & cfg.keys()
    }
    about = {**about, "model": name, "activation": "quickgelu" if quick else "gelu"}
    about |= {"config": config, "preprocess": net.visual.preprocess_cfg}
    return Model(net.to(device), tokenizer, about)


def _load_published(name: str, activation: str | None, device: str) -> Model:
    """Load "hf-hub:ORG/REPO" or "local-dir:FOLDER", with its config, weights and tokenizer."""
    import open_clip

    local = name.startswith("local-dir:")
    place = name.removeprefix("local-dir:")
    options: dict[str, Any] = {"quick_gelu": activation == "quickgelu"} if activation else {}
    where = place if local else f"--model {name}"
    net, tokenizer = _build(name, where, offline=local, require_pretrained=True, **options)
    quick = any(type(part).__name__ == "QuickGELU" for part in net.modules())
    about = {
        "model": Path(place).resolve().name if local else name,
        "activation": "quickgelu" if quick else "gelu",
        "config": open_clip.get_model_config(name),
        "preprocess": net.visual.preprocess_cfg,
    }
    return Model(net.to(device), tokenizer, about)


def _load_folder(folder: Path, name: str | None, activation: str | None, device: str) -> Model:
    """Load a local folder of open_clip or of transformers, which names its own model."""
    if not (folder / "open_clip_config.json").is_file():
        return _load_transformers(folder, activation, device)
    if name:
        raise DataError(f"--model {name}: {folder} brings its own model; leave --model out")
    if not any(path.suffix in FOLDER_WEIGHTS for path in folder.iterdir()):
        raise DataError(
            f"{folder}: holds no weights ({', '.join(FOLDER_WEIGHTS)}); copy them there"
        )
    return _load_published(f"local-dir:{folder}", activation, device)


def _agreed_name(name: str | None, held: str | None, path: str | None, config: Any) -> str:
    if not name and not held:
        hint = "the released CE-CLIP and NegCLIP are ViT-B-32-quickgelu"
        raise DataError(f"--ckpt {path}: was not written by train.py; pass --model ({hint})")
    if name and held not in (None, name):
        raise DataError(f"--model {name}: {path} holds a {held}; leave --model out")
    import open_clip

    if not name and not config and held not in (*open_clip.list_models(), *SHAPES_CONFIGS):
        raise DataError(
            f"{path}: holds a {held!r:.80}, which open_clip does not know; pass --model"
        )
    return name or str(held)


def _add_config(config: Any, name: str, path: str) -> str:
    """Register a model config from a file with open_clip, under a unique name."""
    parts = ("text_cfg", "vision_cfg")
    if not isinstance(config, dict) or not all(isinstance(config.get(p), dict) for p in parts):
        raise DataError(f"{path}: holds no model config (embed_dim, text_cfg, vision_cfg)")
    text = json.dumps(config, sort_keys=True)
    name = re.sub("[^-.0-9A-Za-z]", "_", name)[-80:]
    import open_clip

    known = f"{name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if open_clip.get_model_config(known) is None:
        with tempfile.TemporaryDirectory() as room:
            (Path(room) / f"{known}.json").write_text(text)
            open_clip.add_model_config(Path(room) / f"{known}.json")
    return known


WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
FOLDER_WEIGHTS = (".safetensors", ".bin", ".pth")  # of a folder of open_clip


def _build(name: str, where: str, *, offline: bool, **options: Any) -> tuple[Any, Any]:
    """Make open_clip's model and tokenizer; `offline` keeps names in a config from the hub."""
    import open_clip
    from huggingface_hub import constants  # comes with open_clip

    before, quiet = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = before or offline
    logging.disable(logging.WARNING)  # open_clip logs every step of loading
    try:
        net = open_clip.create_model(name, **options)
        if not options.get("pretrained") and hasattr(net, "text_decoder"):  # CoCa's
            projection = net.text_decoder.text_projection  # open_clip leaves it uninitialised
            torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
        try:
            return net, open_clip.get_tokenizer(name)
        except Exception as error:  # a config may be wrong in any way
            why = error_line(error)
            raise DataError(f"{where}: its tokenizer cannot be loaded ({why})") from None
    except DataError:
        raise
    except Exception as error:  # a config may be wrong in any way
        bare = "; if it holds bare checkpoints, download one, pass --ckpt FILE --model NAME"
        hint = bare if name.startswith("hf-hub:") else ""
        raise DataError(
            f"{where}: cannot be built or fetched ({error_line(error)}){hint}"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.disable(quiet)


POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")


def _fill(net: Any, state: dict[str, torch.Tensor], name: str, path: str) -> None:
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    wanted = net.state_dict()
    for key, value in state.items():
        if key in wanted and wanted[key].is_floating_point() and not value.is_floating_point():
            raise DataError(f"{path}: {key} is {value.dtype}; weights must be floats, as trained")
    before = {key: len(state[key]) for key in POSITIONS if key in state}
    try:
        resize_pos_embed(state, net)
        resize_text_pos_embed(state, net)
        net.load_state_dict(state)
    except (RuntimeError, AssertionError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: does not fit the model {name} ({error_line(error)})") from None
    for key, count in before.items():
        if len(state[key]) != count:
            print(f"{path}: {key} resized from {count} to {len(state[key])}", file=sys.stderr)


class _Transformers(torch.nn.Module):
    """A CLIP or SigLIP of transformers with open_clip's method names."""

    def __init__(self, net: Any, preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.visual = net, torch.nn.Module()
        self.visual.preprocess_cfg = preprocess  # type: ignore[assignment]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self._features(self.net.get_image_features(pixel_values=images))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._features(self.net.get_text_features(input_ids=tokens))

    @staticmethod
    def _features(out: Any) -> torch.Tensor:
        return out if isinstance(out, torch.Tensor) else out.pooler_output


def _load_transformers(folder: Path, activation: str | None, device: str) -> Model:
    """Load a local CLIP or SigLIP folder of transformers, with its preprocessing."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: holds neither open_clip_config.json nor config.json")
    if activation:
        raise DataError(f"--activation: {folder} brings its own; leave --activation out")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise DataError(f"{folder}: needs transformers; pip install transformers") from None
    # Without its files transformers makes an empty tokenizer: all captions get the same tokens.
    files = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
    if not any((folder / file).is_file() for file in files):
        raise DataError(f"{folder}: holds no tokenizer ({', '.join(files)}); copy its files there")
    try:
        from safetensors import SafetensorError  # comes with transformers

        net, loading = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        pixels = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        preprocess = _pixels(pixels)
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, SafetensorError) as error:
        why = error_line(error)
        raise DataError(f"{folder}: cannot be loaded by transformers ({why})") from None
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lacks = min(loading["missing_keys"], default="")
        raise DataError(f"{folder}: lacks weights, such as {lacks}")
    if not hasattr(net, "get_text_features"):
        kind = net.config.model_type
        raise DataError(f"{folder}: a {kind} has no text features; use CLIP, SigLIP")
    length = net.config.text_config.max_position_embeddings

    def tokenise(texts: list[str]) -> torch.Tensor:
        out = words(texts, padding="max_length", truncation=True, max_length=length)
        return torch.tensor(out["input_ids"])

    about = {"model": str(folder), "activation": net.config.vision_config.hidden_act}
    return Model(_Transformers(net, preprocess).to(device), tokenise, about)


def _pixels(config: dict[str, Any]) -> dict[str, Any]:
    """Convert the preprocessing config of transformers to open_clip's keys."""
    side = config.get("crop_size") if config.get("do_center_crop") else config["size"]
    if isinstance(side, dict):
        side = side.get("height") or side["shortest_edge"]
    return {
        "size": side,
        "mean": config["image_mean"],
        "std": config["image_std"],
        "interpolation": "bilinear" if config.get("resample") == 2 else "bicubic",
        "resize_mode": "shortest" if config.get("do_center_crop") else "squash",
    }


class _Inert:
    """Replaces every object in a checkpoint that is not a tensor; building it runs no code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read weights in open_clip's layout and our `kit` metadata, without running code of the file.

    Foreign training checkpoints often hold more than tensors (an argparse.Namespace, numpy
    numbers); each such object is replaced by an empty one.

    Raises:
        DataError: the file is missing or damaged, or reading its weights would run its code.
    """
    try:
        content = _read_tensors(Path(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint; check the path") from None
    except Exception as error:  # torch raises many kinds here
        noise = isinstance(error, (LookupError, UnicodeError, EOFError, AttributeError))
        why = "it is damaged, or not a torch.save file" if noise else error_line(error)
        raise DataError(f"{path}: cannot be read as weights ({why}){_mend(error)}") from None
    content = content if isinstance(content, dict) else {}
    nested = (content.get(key) for key in ("state_dict", "model_state_dict", "model"))
    state = next((part for part in nested if isinstance(part, dict)), content)
    if not isinstance(state, dict) or not state:
        raise DataError(f"{path}: holds no state_dict of a model")
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{path}: holds no state_dict of a model: not all values are tensors")
    # Prefixes that DistributedDataParallel, torch.compile and trainers add to every name.
    for prefix in 3 * ("module.", "_orig_mod.", "model."):
        if all(str(key).startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    kit = content.get("kit")
    return state, dict(kit if isinstance(kit, dict) else {})


def _read_tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # comes with open_clip

        return load_file(path)
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # zip (current torch) or pickle (old torch)
        raise EOFError
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _mend(error: Exception) -> str:
    """Advice for a file that cannot be read without running its code."""
    if "TorchScript" in str(error):
        return "; a TorchScript archive: pass its open_clip tag, such as --pretrained openai"
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    return (
        "; if you trust it, save its tensors only: torch.save(torch.load(PATH, "
        "weights_only=False)['state_dict'], 'clean.pt')"
    )


def error_line(error: Exception) -> str:
    """The first informative line of an error, at most 240 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s)") else lines[0]
    if " " not in line:  # the key of a KeyError, or nothing
        line = f"{type(error).__name__} {line}".strip()
    return textwrap.shorten(line, 240, placeholder=" ...")


def register(name: str | None) -> str:
    """Register a model config file with open_clip; returns its name there."""
    path = SHAPES_CONFIGS.get(str(name), Path(str(name)))
    if path.suffix != ".json":
        return str(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--model {name}: is not a model config ({error_line(error)})") from None
    return _add_config(config, path.stem, f"--model {name}")


def _check_tag(name: str, tag: str, quick: bool, activation: str | None) -> None:
    import open_clip

    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise DataError(f"--pretrained {tag}: neither a file nor a tag of {name}; its tags: {tags}")
    if bool(known.get("quick_gelu")) != quick and not activation:
        wanted = f"{name}-quickgelu" if known.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise DataError(f"--model {name}: {tag} was trained with the other GELU; use {wanted}")


# Suites


class Crop(NamedTuple):
    """An image file and the box (left, top, right, bottom) in pixels that is cut out of it."""

    path: str
    box: tuple[int, int, int, int]


class TestItem(NamedTuple):
    """One item of a benchmark: which texts belong to which images?

    path groups items for averages: (subset,), or (subset, part ...) where a subset's figure is
    the mean of its parts. Without images the texts are compared with each other.
    """

    path: tuple[str, ...]
    id: str
    images: tuple[str | Crop, ...]  # files, or "shapes:INDEX"
    texts: tuple[str, ...]  # the true ones first
    true: int = 1
    place: int = 0  # index of the true option in the suite's own order; breaks ties under "first"
    tags: tuple[str, ...] = ()  # the suite's own categories of items


class Retrieval(NamedTuple):
    """Images, and for each text the index of its image."""

    name: str
    images: list[str]
    texts: list[str]
    image_of: list[int]


class Classes(NamedTuple):
    """Images, their labels, and for each class the prompts whose features are averaged.

    With training images a linear probe is fitted on the same features. With `shown` (several
    classes in an image, or none) the metric is "map11" or "auc".
    """

    name: str
    images: list[str]
    labels: list[int]
    prompts: list[list[str]]
    per_class: bool = False  # accuracy is the mean over classes
    train_images: Sequence[str] = ()
    train_labels: Sequence[int] = ()
    shown: Sequence[Sequence[int]] = ()
    metric: str = ""


class Suite(NamedTuple):
    """What is scored: items, costs, expected numbers of items, and notes."""

    name: str
    items: list[TestItem]
    costs: list[Retrieval | Classes]
    expected: dict[str, int]
    notes: list[str]


Loaded = Iterator["TestItem | Retrieval | Classes"]  # what a loader of a suite yields
OWN = {"where": "put the images beside the file, or below --root", "blind": True}
OWN |= {"expected": {}, "averages": {}}


def suite_info(name: str) -> dict[str, Any]:
    """The entry of scripts/suites.json for a suite; OWN for all user-defined suites."""
    return read_table("suites").get(name, OWN)


def script(name: str) -> Any:
    """Import a module of scripts/: make_tables, suites."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


def is_own(name: str) -> bool:
    """Whether an entry of --suite names a file or a loader of the user's own."""
    return ".py:" in name or name.endswith((".json", ".jsonl", ".py"))


def run_file(path: str) -> dict[str, Any]:
    """The names that a Python file of the user's own defines; it may import files beside it."""
    module = ModuleType(f"own_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look for it there
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


@contextlib.contextmanager
def own_faults(flag: str) -> Iterator[None]:
    """What the code of FLAG FILE.py:NAME raises, as one sentence with its line."""
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # of whatever kind
        path = os.path.abspath(flag.split(" ", 1)[1].rpartition(":")[0])
        frames = traceback.extract_tb(error.__traceback__)
        lines = [x.lineno for x in frames if os.path.abspath(x.filename) == path]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        where = f", line {lines[-1]}" if lines else ""
        told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
        raise DataError(f"{flag}{where}: {told}; correct the file") from None


def _test_scenes() -> Iterator[tuple[int, Scene]]:
    index = 0
    while True:
        yield index, make_scene("test", EVAL_SEED, index)
        index += 1


def load_shapes(source: Source) -> Loaded:
    """Make the shapes suite: scenes whose combinations of colours and shapes are not in training.

    In the swap subsets both captions have the same words.  In the others a word is replaced by one
    that is as frequent in the captions of other scenes.
    """
    for name, edit in EDITS.items():
        rng = random.Random(f"{EVAL_SEED}:{name}")
        count = 0
        for index, scene in _test_scenes():
            claim = edit(scene, rng)
            if claim is None or len(scene.things) == 1:
                continue
            template = rng.randrange(3)
            texts = (say(scene.claim, template), say(claim, template))
            yield TestItem((name,), str(index), (f"shapes:{index}",), texts)
            count += 1
            if count == SHAPES_ITEMS:
                break
    yield _shapes_retrieval()
    yield from _shapes_classes()


def _shapes_retrieval() -> Retrieval:
    """Scenes of two or three things whose captions differ."""
    images: dict[str, str] = {}
    for index, scene in _test_scenes():
        if scene.claim.second is not None:
            images.setdefault(say(scene.claim, 0), f"shapes:{index}")
        if len(images) == SHAPES_ITEMS:
            break
    return Retrieval("retrieval", list(images.values()), list(images), list(range(len(images))))


def _shapes_classes() -> Iterator[Classes]:
    """Scenes of one thing, to be classified by shape, and by colour."""
    images, shapes, colours = [], [], []
    for index, scene in _test_scenes():
        if len(scene.things) == 1:
            images.append(f"shapes:{index}")
            shapes.append(list(SHAPES).index(scene.claim.first.shape))
            colours.append(list(COLOURS).index(scene.claim.first.colour))
        if len(images) == SHAPES_ITEMS:
            break
    a = {colour: "an" if colour[0] in "aeiou" else "a" for colour in COLOURS}
    by_shape = [[f"{a[colour]} {colour} {shape}" for colour in COLOURS] for shape in SHAPES]
    by_colour = [[f"{a[colour]} {colour} {shape}" for shape in SHAPES] for colour in COLOURS]
    yield Classes("shape", images, shapes, by_shape)
    yield Classes("colour", images, colours, by_colour)


def check_root(root: Path | None) -> None:
    """Refuse a --root that is not a readable folder."""
    if root is None or (root.is_dir() and os.access(root, os.R_OK | os.X_OK)):
        return
    why = "cannot be read; ask for permission" if root.is_dir() else "no such folder"
    raise DataError(f"--root {root}: {'is a file, not a folder' if root.is_file() else why}")


def load_suite(given: str, root: Path | None, partial: bool) -> Suite:
    """Read a suite, or a user's own file; with `partial` drop items whose images are missing.

    Raises:
        DataError: files, rows or images are missing and `partial` is False, or nothing is left.
    """
    check_root(root)
    name = suite_name(given)
    info = suite_info(name)
    source = script("suites").Source(name, root, partial, dict(info["expected"]), [])
    try:
        if is_own(given):
            loading = script("suites").load_own(given, source)
        else:
            loading = (
                load_shapes(source) if name == "shapes" else script("suites").LOADERS[name](source)
            )
        loaded = [_noted(x, source) for x in loading]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        place = source.place or name
        raise DataError(f"{place}: does not have the official format ({error!r})") from None
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    items = [x for x in loaded if isinstance(x, TestItem)]
    costs = [x for x in loaded if not isinstance(x, TestItem)]
    if is_own(given):
        if not items:
            raise DataError(f"--suite {given}: holds no records")
        source.expected.update(Counter(item.path[0] for item in items))
    elif not loaded and not source.read:
        raise DataError(f"{name}: none of its files is below {root}; get them: {info['where']}")
    check_counts(items, costs, source)
    if not loaded:
        raise DataError(f"{', '.join(source.read)}: has no usable items; get them: {info['where']}")
    items, kept = keep_found(items, costs, partial, info["where"])
    if name in ("zeroshot", "probe"):
        kind = "probe" if name == "probe" else "zero-shot"
        source.expected.update({f"{kind} {cost.name}": len(cost.images) for cost in costs})
    for cost in kept:
        full = next(x for x in costs if x.name == cost.name)
        if len(cost.images) < len(full.images):
            few = f"{cost.name}: {len(cost.images)} of {len(full.images)} images are there"
            easier = "; fewer candidates, easier" if isinstance(cost, Retrieval) else ""
            source.notes.append(few + easier)
    return Suite(name, items, kept, source.expected, source.notes)


T = TypeVar("T", bound="TestItem | Retrieval | Classes")


def _noted(loaded: T, source: Source) -> T:
    """Record the file that an item came from; refuse texts that are not strings."""
    if source.read:
        source.read[next(reversed(source.read))].update(row_sizes(loaded))
    texts = () if isinstance(loaded, Classes) else loaded.texts
    where = source.place
    if isinstance(loaded, TestItem) and source.read:
        where = f"{next(reversed(source.read))}: the row {loaded.id} of {loaded.path[0]}"
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} has a text that is not a string; download it again")
    if isinstance(loaded, TestItem) and len(loaded.images) < 2 and len(texts) <= loaded.true:
        raise DataError(f"{where} has no false text; download it again")
    return loaded


def row_sizes(loaded: TestItem | Retrieval | Classes) -> dict[str, int]:
    """How many items this adds to each row of the tables."""
    if isinstance(loaded, TestItem):
        return {loaded.path[0]: 1}
    if isinstance(loaded, Classes):
        return {}
    ways = {"image to text": len(loaded.images), "text to image": len(loaded.texts)}
    return {f"{loaded.name} {way}": size for way, size in ways.items()}


def subset_names(suite: str, expected: Mapping[str, int]) -> list[str]:
    """All subsets of a suite, those without files included."""
    named = {leaf for tree in suite_info(suite)["averages"].values() for leaf in leaves(tree)}
    return list(dict.fromkeys([*expected, *sorted(named)]))


def check_counts(
    items: Sequence[TestItem], costs: Sequence[Retrieval | Classes], source: Source
) -> None:
    """Compare the number of rows read with the number in the official files.

    More rows (a later version of the list) only give a note, and so do slightly fewer rows where
    `expected` is approximate ("about" in suites.json).

    Raises:
        DataError: a subset has no rows, or too few, and the source is not `partial`.
    """
    found = sum((Counter(row_sizes(x)) for x in (*items, *costs)), Counter[str]())
    info = suite_info(source.suite)
    for name in subset_names(source.suite, source.expected):
        count, wanted = found[name], source.expected.get(name)
        if count == wanted or (count and wanted is None):
            continue
        few = f"{name}: {count} of {wanted or 'all'} items"
        if wanted and count > wanted:
            source.expected[name] = count
            source.notes.append(f"{name}: {count} items where {wanted} were expected, another list")
        elif source.partial or (count and info.get("about")):
            source.notes.append(f"{few} are in the files")
        else:
            files = [path for path, gave in source.read.items() if name in gave]
            files = files or [path for path, gave in source.read.items() if not gave]
            raise DataError(
                f"{', '.join(files or source.read)}: {few} are there; get the complete file: "
                f"{info['where']}, or pass --allow-missing to score the rest"
            )


def keep_found(
    items: list[TestItem], costs: list[Retrieval | Classes], partial: bool, where: str
) -> tuple[list[TestItem], list[Retrieval | Classes]]:
    """With `partial` drop items, and images of the costs, whose files are missing.

    Raises:
        DataError: images are missing and `partial` is False, or all are missing.
    """
    wanted = [image for item in items for image in item.images]
    wanted += [image for cost in costs for image in cost.images]
    files = dict.fromkeys(file_of(image) for image in wanted)
    missing = {file for file in files if is_file(file) and not os.path.isfile(file)}
    if missing and (not partial or len(missing) == len(files)):
        none = partial or len(missing) == len(files)
        rest = "" if none else ", or pass --allow-missing to score the rest"
        raise DataError(
            f"{len(missing)} of {len(files)} images are missing, the first is {min(missing)}; "
            f"get them: {where}{rest}"
        )
    found = [x for x in items if not missing.intersection(file_of(image) for image in x.images)]
    return found, [left for cost in costs if (left := _keep_cost(cost, missing)).images]


def _keep_cost(cost: Retrieval | Classes, missing: set[str]) -> Retrieval | Classes:
    kept = [i for i, image in enumerate(cost.images) if image not in missing]
    images = [cost.images[i] for i in kept]
    if isinstance(cost, Classes):
        labels = [cost.labels[i] for i in kept] if cost.labels else []
        shown = [cost.shown[i] for i in kept] if cost.shown else []
        return cost._replace(images=images, labels=labels, shown=shown)
    place = {i: new for new, i in enumerate(kept)}
    pairs = [(t, place[i]) for t, i in zip(cost.texts, cost.image_of, strict=True) if i in place]
    return cost._replace(images=images, texts=[t for t, _ in pairs], image_of=[i for _, i in pairs])


def file_of(image: str | Crop) -> str:
    """The file of an image."""
    return image.path if isinstance(image, Crop) else image


# Features


class Features(NamedTuple):
    """Unit-length float32 rows [N, D] and the row of each image or text."""

    rows: np.ndarray
    row_of: dict[Any, int]

    def of(self, names: Iterable[Any]) -> np.ndarray:
        """Rows of these images or texts, in their order."""
        return self.rows[[self.row_of[name] for name in names]]


class Encoder:
    """Encodes each distinct image (with its crop) and each distinct row of tokens once.

    Whole batches are distributed over the ranks of torchrun: every feature is computed in the same
    batch, hence with the same result, for any number of ranks. With --cache features are stored on
    disk under the hash of the content and of the model.
    """

    def __init__(self, model: Model, args: argparse.Namespace) -> None:
        """Use the device, precision, batch size, workers and cache of the command line."""
        self.model, self.device = model, torch.device(args.device)
        self.batch = args.batch_size or BATCH[self.device.type]
        self.dtype = PRECISIONS[args.precision]
        from open_clip.transform import PreprocessCfg, image_transform_v2

        cfg = PreprocessCfg(**model.net.visual.preprocess_cfg)
        self.transform = image_transform_v2(cfg, is_train=False)
        self.width = cfg.size if isinstance(cfg.size, int) else max(cfg.size)
        self.workers = args.workers
        self.rank, self.ranks = rank_and_ranks()
        self.known: dict[str, torch.Tensor] = {}  # features by key
        self.tokens: dict[str, torch.Tensor] = {}
        self.encoded = Counter[str]()
        self.cache: Path | None = None
        if args.cache:
            self.cache = args.cache / f"{self.hash[:16]}-{args.precision}"
            self._read_cache()
        model.net.eval()

    @functools.cached_property
    def dim(self) -> int:
        """Width of the features."""
        with torch.no_grad():
            return self._unit(self.model.net.encode_text, self.model.tokenizer(["a"])).shape[1]

    @functools.cached_property
    def hash(self) -> str:
        """Hash of the model; reading all weights takes a while."""
        return hash_model(self.model)

    def images(self, names: Iterable[str | Crop]) -> Features:
        """Encode images by name, decoding in --workers processes."""
        names = list(dict.fromkeys(names))
        keys = [hash_image(name) if self.cache else f"image {name}" for name in names]
        return self._features("images", names, keys, self.batch, self._encode_images)

    def texts(self, texts: Iterable[str]) -> Features:
        """Encode texts, packed several to a row, cut at the context length.

        They are sorted by tokens, so that texts with a common prefix are in one batch.
        """
        texts = list(dict.fromkeys(texts))
        new = [text for text in texts if text not in self.tokens]
        for start in range(0, len(new), 4096):
            batch = new[start : start + 4096]
            self.tokens.update(zip(batch, self.model.tokenizer(batch), strict=True))
        alike = sorted(texts, key=lambda text: self.tokens[text].tolist())
        keys = [hashlib.sha256(self.tokens[text].numpy().tobytes()).hexdigest() for text in alike]
        found = self._features("texts", alike, keys, 4 * self.batch, self._encode_texts)
        return Features(found.of(texts), {text: i for i, text in enumerate(texts)})

    def _features(
        self,
        kind: str,
        names: list[Any],
        keys: list[str],
        size: int,
        encode: Callable[[list[list[Any]]], list[torch.Tensor]],
    ) -> Features:
        """Encode what is not cached yet, on all ranks; returns features in the order of `names`."""
        fresh = {key: name for key, name in zip(keys, names, strict=True) if key not in self.known}
        todo = list(fresh)
        batches = [todo[start : start + size] for start in range(0, len(todo), size)]
        mine = [[fresh[key] for key in batch] for batch in batches[self.rank :: self.ranks]]
        parts = together(lambda: encode(mine) if mine else [])
        if self.ranks > 1:
            shared: list[Any] = [None] * self.ranks
            dist.all_gather_object(shared, parts)
            parts = [shared[i % self.ranks][i // self.ranks] for i in range(len(batches))]
        for batch, part in zip(batches, parts, strict=True):
            self.known.update(zip(batch, part, strict=True))
        self.encoded[kind] += len(todo)
        cache = self.cache if self.rank == 0 else None
        together(lambda: self._write_cache(cache, todo) if todo and cache else None)
        rows = torch.stack([self.known[key] for key in keys]).numpy() if keys else np.zeros((0, 1))
        return Features(rows, {name: i for i, name in enumerate(names)})

    @torch.no_grad()
    def _encode_images(self, batches: list[list[Any]]) -> list[torch.Tensor]:
        images = _Images([x for batch in batches for x in batch], self.transform, self.width)
        loader = torch.utils.data.DataLoader(images, self.batch, num_workers=self.workers)
        try:
            return [self._unit(lambda x: encode_image(self.model.net, x), x) for x in loader]
        except DataError as error:  # a worker's error includes its traceback
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None

    @torch.no_grad()
    def _encode_texts(self, batches: list[list[Any]]) -> list[torch.Tensor]:
        clip = hasattr(self.model.tokenizer, "eot_token_id")
        rows = (torch.stack([self.tokens[text] for text in batch]) for batch in batches)
        packed = (pack_tokens(batch, clip) for batch in rows)
        return [self._unit(lambda p: encode_text(self.model.net, p), batch) for batch in packed]

    def _unit(self, encode: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = encode(batch.to(self.device))
        features = F.normalize(features.float(), dim=-1).cpu()
        if not features.isfinite().all():  # comparisons with NaN are false: every rank would be 0
            model = self.model.about.get("model")
            raise DataError(
                f"{model}: features are not finite; its weights are damaged, or fp16 overflows"
            )
        return features

    def _read_cache(self) -> None:
        for file in sorted(self.cache.glob("*.pt")) if self.cache else []:
            try:
                kept = torch.load(file, weights_only=True)
                rows = kept["rows"]
                unit = (rows.norm(dim=1) - 1).abs().max() < 1e-3  # False for NaN too
                if rows.dtype != torch.float32 or rows.shape[1] != self.dim or not unit:
                    raise ValueError("these are not features of the model")
                self.known.update(dict(zip(kept["keys"], rows, strict=True)))
            except Exception:  # torch raises many kinds here
                if self.rank == 0:
                    print(f"evaluate.py: --cache {file}: is damaged; recomputed", file=sys.stderr)
                    file.unlink(missing_ok=True)
        if self.ranks > 1:  # a file may have appeared or vanished between two ranks' reads
            keys: list[Any] = [None] * self.ranks
            dist.all_gather_object(keys, set(self.known))
            common = set.intersection(*keys)
            self.known = {key: row for key, row in self.known.items() if key in common}

    def _write_cache(self, folder: Path, keys: list[str]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:32]}.pt"
            partial = file.with_suffix(f".{os.getpid()}.partial")
            torch.save({"keys": keys, "rows": torch.stack([self.known[k] for k in keys])}, partial)
            os.replace(partial, file)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise DataError(f"--cache {folder}: cannot be written ({error_line(error)})") from None


class _Images(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(
        self, names: list[Any], transform: Callable[..., torch.Tensor], width: int
    ) -> None:
        self.names, self.transform, self.width = names, transform, width

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(load_image(self.names[i], self.width))


def load_image(name: str | Crop, width: int) -> Image.Image:
    """Open a file as RGB (cropped to its box), take a torchvision image, or draw a test scene."""
    if isinstance(name, Crop):
        left, top, right, bottom = name.box
        if right <= left or bottom <= top:
            raise DataError(f"{name.path}: box {name.box} is empty; download the rows again")
        return open_image(name.path).crop(name.box)
    if name.startswith("shapes:"):
        return draw_scene(make_scene("test", EVAL_SEED, int(name.removeprefix("shapes:"))), width)
    if name.startswith("torchvision:"):
        _, kind, split, index, root = name.split(":", 4)
        data = script("suites").torchvision_set(kind, split, root)
        return data[int(index)][0].convert("RGB")
    if name.endswith(".npy"):  # frames of EqBen, BGR
        try:
            frame = np.load(name, allow_pickle=False)
            return Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1]))
        except (OSError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"{name}: cannot be decoded ({error})") from None
    return open_image(name)


def is_file(name: str) -> bool:
    """Whether an image is a file, and not drawn or taken from torchvision."""
    return not name.startswith(("shapes:", "torchvision:"))


def hash_image(name: str | Crop) -> str:
    """Hash an image's file and box; the key of an image that is not a file is its name."""
    path, box = (name.path, name.box) if isinstance(name, Crop) else (name, "")
    if not is_file(path):
        return f"image {name}"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return hashlib.sha256(content).hexdigest() + str(box)


def hash_model(model: Model) -> str:
    """Hash the weights, the activation and the preprocessing."""
    digest = hashlib.sha256()
    for name, value in sorted(model.net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    about = [model.about.get("activation"), sorted(model.net.visual.preprocess_cfg.items())]
    digest.update(str(about).encode())
    return digest.hexdigest()


# Processes


class Rank(NamedTuple):
    """Rank of this process, number of ranks, and device."""

    number: int
    world: int
    device: torch.device


def start_process(device: str) -> Rank:
    """Join the process group if torchrun or srun started several ranks, and choose the device.

    Raises:
        DataError: the launcher's variables are inconsistent, the other ranks do not connect within
            $JOIN_SECONDS (30), or a rank lacks the device.
    """
    number, world, local = launcher()
    if world > 1:
        lacks = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if lacks:
            raise DataError(f"{lacks[0]} is not set: start the {world} ranks with torchrun or srun")
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        seconds = float(os.environ.get("JOIN_SECONDS", "30"))
        wait = timedelta(seconds=seconds)
        try:
            store, *_ = next(dist.rendezvous("env://", number, world, timeout=wait))
            # Objects and CPU tensors use gloo; CUDA tensors use NCCL.
            kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(kinds, store=store, rank=number, world_size=world)
        except (RuntimeError, ValueError, OSError):
            raise DataError(
                f"rank {number} of {world}: the others did not reach {place} within {seconds:g} "
                "s; start all of them with torchrun or srun (JOIN_SECONDS=300 waits longer)"
            ) from None
    kind = together(lambda: pick_device(device))
    if kind == "cpu":
        return Rank(number, world, torch.device(kind))
    gpus = torch.cuda.device_count()
    if 1 < gpus <= local:  # one GPU: srun may make only its own visible to each task
        raise DataError(f"--device cuda: local rank {local}, but this machine has {gpus} GPUs")
    torch.cuda.set_device(local if gpus > 1 else 0)
    return Rank(number, world, torch.device("cuda", torch.cuda.current_device()))


def rank_and_ranks() -> tuple[int, int]:
    """Rank of this process and number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


Made = TypeVar("Made")


def together(work: Callable[[], Made]) -> Made:
    """Do this rank's work; re-raise any rank's DataError on every rank.

    Raises:
        DataError: the one of the lowest rank that failed.
    """
    faults: list[str | None] = [None] * rank_and_ranks()[1]
    made: list[Made] = []
    try:
        made.append(work())
    except DataError as error:
        faults[0] = str(error)
    if dist.is_initialized():
        dist.all_gather_object(faults, faults[0])
    for fault in faults:
        if fault is not None:
            raise DataError(fault)
    return made[0]


# Verdicts


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Cosines [n, m] of unit rows [n, D] and [m, D]; equal rows give equal cosines.

    A matrix product may sum equal columns in different orders, so that ties would be missed.
    """
    return (one[:, None, :] * two[None, :, :]).sum(-1, dtype=np.float32)


def judge(scores: np.ndarray, true: int, place: int | None = None) -> tuple[dict[str, bool], bool]:
    """Judge an item by its cosines [images, texts]; the rule depends on the matrix's shape.

    One image: every true text above every false one.  One text: the first image above the
    others.  Square: `text` if each image prefers its text, `image` if each text prefers its
    image, `group` if both.

    Args:
        scores: cosines, float32.
        true: how many of the texts are true.
        place: None if a tie is wrong; else the index of the true option in the suite's own order,
            which takes the first maximum (argmax): a tie with a later option is right.

    Returns:
        verdicts by name ("correct", or "text", "image" and "group"), and whether there was a tie.
    """
    rows, columns = scores.shape
    if rows == 1 or columns == 1:
        line = scores.ravel()
        low, high = line[:true].min(), line[true:].max()
        if place is not None and true == 1:
            before, after = line[1 : 1 + place], line[1 + place :]
            right = bool((low > before).all() and (low >= after).all())
            return {"correct": right}, bool(low == high)
        return {"correct": bool(low > high)}, bool(low == high)
    if rows != columns:
        raise ValueError(f"scores must be 1 x L, K x 1 or K x K, not {rows} x {columns}")
    own = scores.diagonal()
    others = np.where(np.eye(rows, dtype=bool), -np.inf, scores)
    text, image = own > others.max(axis=1), own > others.max(axis=0)
    tie = (own == others.max(axis=1)).any() or (own == others.max(axis=0)).any()
    verdicts = {"text": bool(text.all()), "image": bool(image.all())}
    return {**verdicts, "group": all(verdicts.values())}, bool(tie)


def judge_texts(scores: np.ndarray) -> tuple[dict[str, bool], bool]:
    """Two true texts and a false one [3, 3]: the true ones are closer to each other than to it."""
    own, high = scores[0, 1], max(scores[0, 2], scores[1, 2])
    return {"correct": bool(own > high)}, bool(own == high)


def judge_directions(scores: np.ndarray) -> dict[str, bool]:
    """BiVLC's single directions [2, 2]: is each image, and each caption, matched correctly?

    The first image and caption are the positive ones (Miranda et al., 2024).
    """
    (a, b), (c, d) = scores.tolist()
    return {"Ipos2T": a > b, "Ineg2T": d > c, "Tpos2I": a > c, "Tneg2I": d > b}


def judge_edits(scores: np.ndarray) -> dict[str, bool]:
    """Caption, meaning-preserving edit and negative [1, 3].

    "original": the caption beats the negative. "brittle": exactly one of caption and edit does.
    """
    original, edit = (bool(scores[0, i] > scores[0, 2]) for i in (0, 1))
    return {"original": original, "brittle": original != edit}


# For each row of a table: verdicts by part; the figure is the mean over (nested) parts
Tally = dict[str, dict[tuple[str, ...], list[bool]]]


class Figure(NamedTuple):
    """A proportion, its bootstrap samples, its number of items, and the effective sample size."""

    value: float
    draws: np.ndarray
    items: int
    effective: float


class Scored(NamedTuple):
    """Verdicts of items and of costs, ties by row, a record of each item, and ranking metrics."""

    subsets: Tally
    costs: Tally
    ties: Counter[str]
    records: list[dict[str, Any]]
    ranked: Mapping[str, Figure] = MappingProxyType({})


def score_suite(suite: Suite, encoder: Encoder, ties: str = "wrong") -> Scored:
    """Score all items and costs of a suite; ties are "wrong", or follow the "official" rule."""
    images = encoder.images(image for item in suite.items for image in item.images)
    texts = encoder.texts(text for item in suite.items for text in item.texts)
    first = ties == "official" and suite_info(suite.name).get("ties") == "first"
    ranked: dict[str, Figure] = {}
    scored = Scored({}, {}, Counter(), [], ranked)
    for item in suite.items:
        two = texts.of(item.texts)
        if item.images:
            scores = cosines(images.of(item.images), two)
            result, tie = judge(scores, item.true, item.place if first else None)
        else:
            scores = cosines(two, two)
            result, tie = judge_texts(scores)
        more = {"hard_positives": judge_edits, "bivlc": judge_directions}.get(suite.name)
        result.update(more(scores) if more else {})
        for name, value in result.items():
            row = item.path[0] if name == "correct" else f"{item.path[0]} {name}"
            scored.subsets.setdefault(row, defaultdict(list))[item.path[1:]].append(value)
            scored.ties[row] += tie
        scored.records.append(
            {
                "suite": suite.name,
                "subset": item.path[0],
                "part": item.path[1:],
                "id": item.id,
                "images": item.images,
                "texts": item.texts,
                **({"tags": item.tags} if item.tags else {}),
                "scores": [[float(f"{x:.9g}") for x in line] for line in scores],
                **result,
                "tie": tie,
            }
        )
    for cost in suite.costs:
        if isinstance(cost, Classes) and cost.metric:
            row = f"zero-shot {cost.name}"
            ranked[row], scored.ties[row] = rank_classes(cost, encoder)
            continue
        for row, parts, tied in _cost(suite.name, cost, encoder, ties == "official"):
            scored.costs[row] = parts
            scored.ties[row] = tied
    return scored


def _cost(
    suite: str, cost: Retrieval | Classes, encoder: Encoder, first: bool
) -> Iterator[tuple[str, dict[tuple[str, ...], list[bool]], int]]:
    """Retrieval both ways, zero-shot accuracy, or a linear probe: rows, verdicts, ties."""
    images = torch.from_numpy(encoder.images(cost.images).of(cost.images))
    if isinstance(cost, Retrieval):
        texts = encoder.texts(cost.texts)
        row_of = torch.tensor([texts.row_of[text] for text in cost.texts])
        # Equal texts must have equal scores, so each distinct text is multiplied once.
        scores = (images @ torch.from_numpy(texts.rows).T)[:, row_of]
        ranks = retrieval_ranks(scores, torch.tensor(cost.image_of), first)
        for way, (rank, tied) in zip(("image to text", "text to image"), ranks, strict=True):
            for k in RECALLS:
                yield f"{cost.name} {way} R@{k}", {(): (rank < k).tolist()}, int(tied)
        return
    if suite == "probe":
        train = torch.from_numpy(encoder.images(cost.train_images).of(cost.train_images))
        logits = fit_probe(train, torch.tensor(cost.train_labels), len(cost.prompts))(images)
        title = f"probe {cost.name}"
    else:
        logits, title = images @ class_vectors(cost.prompts, encoder).T, f"zero-shot {cost.name}"
    correct, tied = top_class(logits, torch.tensor(cost.labels), first)
    parts: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for label, right in zip(cost.labels, correct.tolist(), strict=True):
        parts[(str(label),) if cost.per_class else ()].append(right)
    yield title, parts, tied


def rank_classes(cost: Classes, encoder: Encoder) -> tuple[Figure, int]:
    """Mean average precision or area under the ROC curve, as ELEVATER defines them; and ties.

    The scores are the softmax over classes of 100 times the cosines; images are resampled for the
    interval. A tie is an image that shows a class and scores the same as one that does not.
    """
    images = torch.from_numpy(encoder.images(cost.images).of(cost.images))
    scores = (100 * images @ class_vectors(cost.prompts, encoder).T).softmax(1).numpy()
    true = np.zeros(scores.shape, dtype=bool)
    for i, labels in enumerate(cost.shown):
        true[i, list(labels)] = True
    columns = [1] if cost.metric == "auc" else range(len(cost.prompts))
    rule = area_under_curve if cost.metric == "auc" else average_precision_11
    lines = []
    for c in columns:
        if true[:, c].any() and not true[:, c].all():
            order = np.argsort(-scores[:, c], kind="stable")
            line = scores[order, c]
            ends = np.flatnonzero(np.append(line[1:] != line[:-1], True))  # of equal scores
            lines.append((order, true[order, c], ends))
    if not lines:
        raise DataError(
            f"{cost.name}: no class has both positive and negative images; get the missing images"
        )

    def figure(weights: np.ndarray) -> float:
        values = [
            rule(weights[order] * shows, weights[order], ends) for order, shows, ends in lines
        ]
        return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan

    n = len(scores)
    rng = np.random.default_rng([EVAL_SEED, zlib.crc32(f"ranked {cost.name}".encode())])
    drawn = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES))
    draws = np.array([figure(weights) for weights in drawn])
    value = figure(np.ones(n, dtype=int))
    ties = sum(int(np.isin(scores[true[:, c], c], scores[~true[:, c], c]).sum()) for c in columns)
    return Figure(value, np.where(np.isnan(draws), value, draws), n, n), ties


def average_precision_11(hits: np.ndarray, weights: np.ndarray, ends: np.ndarray) -> float:
    """11-point interpolated average precision: mean best precision at recall >= 0, 0.1, .., 1.

    At recall 0 it is 1 by the toolkit's definition: the curve starts with precision 1.

    Args:
        hits: weight of each image that shows the class, best score first, 0 for the others [N].
        weights: weight of each image [N]; all 1 without resampling.
        ends: indices at which runs of equal scores end; only these are thresholds.

    Source: vision_evaluation's MeanAveragePrecisionNPointsEvaluator(11).
    """
    found, taken = np.cumsum(hits)[ends], np.cumsum(weights)[ends]
    found, taken = found[taken > 0], taken[taken > 0]
    if not found[-1]:
        return math.nan
    best = np.maximum.accumulate((found / taken)[::-1])[::-1]
    places = np.searchsorted(found / found[-1], np.linspace(1, 0, 11)[:-1])
    return float((best[places].sum() + 1) / 11)


def area_under_curve(hits: np.ndarray, weights: np.ndarray, ends: np.ndarray) -> float:
    """Area under the ROC curve: fraction of pairs in order, ties count half.

    Arguments as in `average_precision_11`.
    """
    true = np.append(0, np.cumsum(hits)[ends])
    false = np.append(0, np.cumsum(weights - hits)[ends])
    pairs = float(true[-1]) * float(false[-1])
    area = (np.diff(false) * (true[1:] + true[:-1])).sum() / 2
    return float(area / pairs) if pairs else math.nan


def class_vectors(prompts: list[list[str]], encoder: Encoder) -> torch.Tensor:
    """For each class the unit-length mean [D] of its prompts' unit-length features."""
    texts = encoder.texts(text for lines in prompts for text in lines)
    means = np.stack([texts.of(lines).mean(0) for lines in prompts])
    return F.normalize(torch.from_numpy(means), dim=-1)


def top_class(logits: torch.Tensor, labels: torch.Tensor, first: bool) -> tuple[torch.Tensor, int]:
    """Which rows [N, C] have their label on top, and the number of ties; `first` takes argmax."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    if first:
        return logits.argmax(1) == labels, int((own == others).sum())
    return (own > others)[:, 0], int((own == others).sum())


def retrieval_ranks(
    scores: torch.Tensor, image_of: torch.Tensor, first: bool
) -> Iterator[tuple[torch.Tensor, int]]:
    """Ranks (0 is best) of each image's best own text, and of each text's image; and ties.

    A wrong candidate with an equal score ranks before the true one; with `first` only if its
    index is lower.

    Args:
        scores: cosines [N, M] of images and texts.
        image_of: [M] index of each text's image.
        first: rank as a stable descending sort does.
    """
    wrong = image_of[None, :] != torch.arange(len(scores))[:, None]
    best, place = scores.masked_fill(wrong, -2).max(1, keepdim=True)
    same = wrong & (scores == best)
    ties = int(same.any(1).sum())
    if first:
        same &= torch.arange(scores.shape[1])[None, :] < place
    yield (wrong & (scores > best)).sum(1) + same.sum(1), ties
    mine = scores[image_of, torch.arange(scores.shape[1])]
    same = wrong & (scores == mine)
    ties = int(same.any(0).sum())
    if first:
        same &= torch.arange(len(scores))[:, None] < image_of
    yield (wrong & (scores > mine)).sum(0) + same.sum(0), ties


PROBE_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def fit_probe(x: torch.Tensor, y: torch.Tensor, classes: int) -> Callable[..., torch.Tensor]:
    """A linear probe: multinomial logistic regression by L-BFGS on unit-length features.

    The weight decay is chosen on a random tenth of the training images; the final fit uses all.

    Args:
        x: features [N, D], unit length.
        y: labels [N].
        classes: number of classes.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(EVAL_SEED))
    held, rest = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    right = []
    for decay in PROBE_DECAYS:
        probe = fit_logistic(x[rest], y[rest], classes, decay)
        right.append(int((probe(x[held]).argmax(1) == y[held]).sum()))
    return fit_logistic(x, y, classes, PROBE_DECAYS[int(np.argmax(right))])


def fit_logistic(
    x: torch.Tensor, y: torch.Tensor, classes: int, decay: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Minimise mean cross-entropy + decay / 2 * |W|^2, the bias free, x scaled by sqrt(D)."""
    scale = math.sqrt(x.shape[1])
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        search.zero_grad()
        value = F.cross_entropy(scale * x @ weight.T + bias, y) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    search.step(loss)
    return lambda features: (scale * features @ weight.T + bias).detach()


# Text-only baselines


def read_blind(
    items: Sequence[TestItem], score: Callable[..., list[list[float]]]
) -> dict[str, float]:
    """Accuracy of a text-only baseline in per cent, by subset.

    `score` gives a number for every text of each item, without its image. Accuracy at chance means
    that the texts alone do not reveal the true one; far above chance, images are not needed.
    """
    subsets = defaultdict(list)
    for item in items:
        if len(item.images) == 1 and len(item.texts) > item.true:
            subsets[item.path[0]].append(item)
    scores = {}
    for name, group in subsets.items():
        parts: dict[tuple[str, ...], list[bool]] = defaultdict(list)
        for item, line in zip(group, score(group), strict=True):
            parts[item.path[1:]].append(min(line[: item.true]) > max(line[item.true :]))
        scores[name] = 100 * mean_of({key: float(np.mean(x)) for key, x in parts.items()})
    return scores


def score_ngrams(items: Sequence[TestItem]) -> list[list[float]]:
    """Score texts by logistic regression on 1-, 2- and 3-grams, fitted on other images.

    The score is w x, x the counts in a text. For each of BLIND_FOLDS folds of images, 50 steps of
    Adagrad minimise sum(log(1 + exp(-w (true - false)))) + |w|^2 over the pairs of the other folds.
    Texts with the same counts get the same score.
    """
    number: dict[str, int] = {}
    texts = [[_grams(text, number) for text in item.texts] for item in items]
    folds = [zlib.crc32(str(item.images).encode()) % BLIND_FOLDS for item in items]
    entries: list[tuple[int, int, int, int]] = []  # fold, pair, gram, count in true - in false
    pairs, size = 0, len(number)
    for item, grams, fold in zip(items, texts, folds, strict=True):
        for true, false in itertools.product(grams[: item.true], grams[item.true :]):
            more = Counter(true)
            more.subtract(false)
            entries += [(fold, pairs, gram, n) for gram, n in more.items() if n]
            pairs += 1
    table = np.array(entries, dtype=int).reshape(-1, 4)
    weights = np.zeros((BLIND_FOLDS, size))
    for fold in set(folds):
        _, pair, gram, n = table[table[:, 0] != fold].T
        w, squares = weights[fold], np.full(size, 1e-9)
        for _ in range(50):
            push = 1 / (1 + np.exp(np.bincount(pair, n * w[gram], pairs)))
            step = np.bincount(gram, n * push[pair], size) - 2 * w
            squares += step**2
            w += 0.3 * step / np.sqrt(squares)
    return [
        [math.fsum(weights[fold, grams]) for grams in group]  # the same in any order
        for group, fold in zip(texts, folds, strict=True)
    ]


def _grams(text: str, number: dict[str, int]) -> list[int]:
    words = ["^", *re.findall(r"\w+|[^\w\s]", text.lower()), "$"]
    spans = (words[i : i + n] for n in (1, 2, 3) for i in range(len(words) - n + 1))
    return [number.setdefault(" ".join(span), len(number)) for span in spans]


def score_masked(items: Sequence[TestItem], model: MaskedModel) -> list[list[float]]:
    """Score texts by their pseudo-likelihood under a masked language model."""
    scores = iter(model.score([text for item in items for text in item.texts]))
    return [[next(scores) for _ in item.texts] for item in items]


# Figures

Value = TypeVar("Value", float, np.ndarray)


def mean_of(parts: dict[tuple[str, ...], Value]) -> Value:
    """The mean over parts; a part with parts of its own is their mean."""
    if () in parts:
        return parts[()]
    groups: dict[str, dict[tuple[str, ...], Value]] = defaultdict(dict)
    for path, value in parts.items():
        groups[path[0]][path[1:]] = value
    means = [mean_of(group) for group in groups.values()]
    return sum(means[1:], means[0]) / len(means)


def average(tree: Any, values: dict[str, Value], counts: dict[str, int]) -> Value | None:
    """One named average; None where a subset that it needs is missing.

    Args:
        tree: a subset's name; a list, the plain mean of its members; or {"items": [...]}, the
            mean weighted by the number of items.
        values: figure of each subset.
        counts: items of each subset.
    """
    if isinstance(tree, str):
        return values.get(tree)
    members = tree["items"] if isinstance(tree, dict) else tree
    found = [average(member, values, counts) for member in members]
    kept = [value for value in found if value is not None]
    if len(kept) < len(found) or not found:
        return None
    if isinstance(tree, list):
        return sum(kept[1:], kept[0]) / len(kept)
    weights = [counts[name] for name in members]
    total = [value * weight for value, weight in zip(kept, weights, strict=True)]
    return sum(total[1:], total[0]) / sum(weights)


def named_averages(suite: str, rows: Iterable[str]) -> dict[str, Any]:
    """The averages that the literature uses for a suite, as trees over its rows.

    Each verdict of pairs (text, image, group) is averaged separately.
    """
    rows = list(rows)
    named: dict[str, Any] = {}
    for verdict in ("", *VERDICTS):
        own = [row for row in rows if verdict_of(row) == verdict]
        if suite not in SUITES and len(own) > 1:
            named[f"{verdict}: mean of {len(own)} subsets".removeprefix(": ")] = own
        for name, tree in suite_info(suite)["averages"].items():
            grown = _rename(tree, f" {verdict}" if verdict else "")
            if own and leaves(grown) <= {*own}:
                named[f"{verdict}: {name}" if verdict else name] = grown
    return named


VERDICTS = ("text", "image", "group", "original", "brittle", "Ipos2T", "Ineg2T", "Tpos2I", "Tneg2I")


def verdict_of(row: str) -> str:
    """The verdict that a row's name ends in, or ""."""
    start, _, last = row.rpartition(" ")
    return last if start and last in VERDICTS and not start.endswith(" to") else ""


def _rename(tree: Any, end: str) -> Any:
    if isinstance(tree, str):
        return tree + end
    if isinstance(tree, dict):
        return {"items": [name + end for name in tree["items"]]}
    return [_rename(member, end) for member in tree]


def leaves(tree: Any) -> set[str]:
    """The subsets in a tree of averages."""
    if isinstance(tree, str):
        return {tree}
    members = tree["items"] if isinstance(tree, dict) else tree
    return set().union(*(leaves(member) for member in members))


def resample(suite: str, row: str, parts: dict[tuple[str, ...], list[bool]]) -> np.ndarray:
    """Bootstrap over items: RESAMPLES figures of a row, each part resampled separately.

    Of n items drawn with replacement, the number of correct ones is binomial.
    """
    rng = np.random.default_rng([EVAL_SEED, zlib.crc32(f"{suite} {row}".encode())])
    return mean_of(
        {k: rng.binomial(len(x), np.mean(x), RESAMPLES) / len(x) for k, x in parts.items()}
    )


def effective(weights: np.ndarray, counts: Sequence[float]) -> float:
    """Effective sample size 1 / sum(weight^2) (Kish, Survey Sampling, 1965).

    Args:
        weights: weight of each part or row in the figure; they sum to 1.
        counts: (effective) number of items of each part, which share its weight.
    """
    return 1 / float((np.square(weights) / counts).sum())


def wilson(value: float, n: float) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, 1927, J. Am. Stat. Assoc. 22, 209-212)."""
    z = 1.959964
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return (middle - half if value else 0.0), (middle + half if value < 1 else 1.0)


def cell_of(value: float, draws: np.ndarray, n: float, scored: int) -> dict[str, Any]:
    """A figure and its 95 % percentile bootstrap interval, in per cent.

    Where all bootstrap samples are equal (every verdict of a part agrees, as with a single item)
    it is Wilson's interval for the effective sample size `n`.
    """
    low, high = np.percentile(draws, [2.5, 97.5])
    if draws.min() == draws.max():
        low, high = wilson(value, n)
    bounds = {"low": 100 * float(low), "high": 100 * float(high)}
    return {"accuracy": 100 * value, **bounds, "scored": scored}


def summarise(suite: Suite, scored: Scored) -> dict[str, Any]:
    """Accuracies in per cent with 95 % intervals, N scored of N expected, ties.

    A row with no scored items, and an average that needs one, has None for its figures.
    """
    tables: dict[str, Any] = {"subsets": {}, "averages": {}, "costs": {}}
    absent = absent_rows(suite, scored)
    for part, tally in (("subsets", scored.subsets), ("costs", scored.costs)):
        rows = tables[part]
        figures = {row: figure_of(suite.name, row, parts) for row, parts in tally.items()}
        figures.update(scored.ranked if part == "costs" else {})
        for row, figure in figures.items():
            cell = cell_of(figure.value, figure.draws, figure.effective, figure.items)
            expected = suite.expected.get(counted_row(row, part), figure.items)
            rows[row] = {**cell, "expected": expected, "ties": scored.ties[row]}
        for row in absent[part]:
            known = {"scored": 0, "expected": suite.expected.get(counted_row(row, part)), "ties": 0}
            rows[row] = {**NOTHING, **known}
        trees = named_averages(suite.name, rows) if part == "subsets" else _mean_of_sets(figures)
        for name, tree in trees.items():
            total = total_cell([rows[leaf] for leaf in leaves(tree)])
            tables["averages"][name] = {**_average_cell(tree, figures), **total}
    if suite.name == "whatsup":
        tables["averages"].update(script("suites").pairs_and_sets(suite, scored.records))
    tags = tag_table(scored.records)
    return {**tables, **({"tags": tags} if tags else {}), "notes": suite.notes}


def figure_of(suite: str, row: str, parts: dict[tuple[str, ...], list[bool]]) -> Figure:
    """The figure of a row: the mean over its (nested) parts."""
    value = mean_of({key: float(np.mean(x)) for key, x in parts.items()})
    counts = [len(x) for x in parts.values()]
    shares = mean_of(dict(zip(parts, np.eye(len(parts)), strict=True)))
    return Figure(value, resample(suite, row, parts), sum(counts), effective(shares, counts))


def _average_cell(tree: Any, figures: dict[str, Figure]) -> dict[str, Any]:
    """The cell of an average; NOTHING if a row that it needs has no figure."""
    counts = {row: figure.items for row, figure in figures.items()}
    value = average(tree, {row: figure.value for row, figure in figures.items()}, counts)
    draws = average(tree, {row: figure.draws for row, figure in figures.items()}, counts)
    weights = average(tree, dict(zip(figures, np.eye(len(figures)), strict=True)), counts)
    if value is None or draws is None or weights is None:
        return NOTHING
    n = effective(weights, [figure.effective for figure in figures.values()])
    return cell_of(value, draws, n, 0)


def tag_table(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each tag: number of items, and the percentage of each verdict."""
    groups = defaultdict(list)
    for record in records:
        for tag in record.get("tags", ()):
            groups[tag].append({name: record[name] for name in record if name in VERDICTS})
    return {
        tag: {
            "scored": len(rows),
            **{name: 100 * float(np.mean([row[name] for row in rows])) for name in rows[0]},
        }
        for tag, rows in sorted(groups.items())
    }


NOTHING: dict[str, Any] = {"accuracy": None, "low": None, "high": None}


def counted_row(row: str, part: str) -> str:
    """The name under which a row's items are counted: without its verdict or recall."""
    if part == "costs":
        return re.sub(r" R@\d+$", "", row)
    return row.rsplit(" ", 1)[0] if verdict_of(row) else row


def total_cell(cells: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """Sum of items scored and expected over cells; None if a number is not known."""
    expected = [cell["expected"] for cell in cells]
    known = None if None in expected else sum(expected)
    return {"scored": sum(cell["scored"] for cell in cells), "expected": known}


def absent_rows(suite: Suite, scored: Scored) -> dict[str, list[str]]:
    """Expected rows of subsets, and of retrieval, with no scored items."""
    absent: dict[str, list[str]] = {"subsets": [], "costs": []}
    part, ends = "subsets", list(dict.fromkeys(verdict_of(row) for row in scored.subsets))
    if suite.name == "retrieval":
        part, ends = "costs", [f"R@{k}" for k in RECALLS]
    there = {counted_row(row, part) for row in {**scored.subsets, **scored.costs}}
    for name in subset_names(suite.name, suite.expected):
        absent[part] += [f"{name} {end}".strip() for end in ends if name not in there]
    return absent


def _mean_of_sets(rows: Iterable[str]) -> dict[str, list[str]]:
    """Means over all classification sets that were scored, and over all recalls at 1."""
    named = {}
    for kind in ("zero-shot", "probe", "image to text R@1", "text to image R@1"):
        found = [row for row in rows if row.startswith(kind) or row.endswith(kind)]
        if len(found) > 1:
            named[f"{kind}, mean of {len(found)} sets"] = found
    return named


# Comparison


def compare(suite: str, ours: Scored, theirs: Scored) -> dict[str, dict[str, Any]]:
    """Paired test of two models on the same items, by row.

    The difference of the figures with its 95 % interval (bootstrap over items, with the same sample
    for both models), the number of items that only one of them gets right, and the exact McNemar
    test: the probability of a split at least as uneven if either model were equally likely to get
    each of those items right. If all bootstrap samples agree (a single item, or the same verdicts),
    low and high are None.
    """
    table: dict[str, dict[str, Any]] = {}
    both = {**theirs.subsets, **theirs.costs}
    for row, parts in {**ours.subsets, **ours.costs}.items():
        rng = np.random.default_rng([EVAL_SEED, zlib.crc32(f"{suite} {row} paired".encode())])
        means, draws, gained, lost = {}, {}, 0, 0
        for key, values in parts.items():
            a, b = np.array(values), np.array(both[row][key])
            up, down, n = int((a & ~b).sum()), int((~a & b).sum()), len(a)
            drawn = rng.multinomial(n, [up / n, down / n, (n - up - down) / n], RESAMPLES)
            means[key], draws[key] = (up - down) / n, (drawn[:, 0] - drawn[:, 1]) / n
            gained, lost = gained + up, lost + down
        spread = mean_of(draws)
        low, high = 100 * np.percentile(spread, [2.5, 97.5])
        known = spread.min() < spread.max()
        table[row] = {
            "difference": 100 * mean_of(means),
            "low": float(low) if known else None,
            "high": float(high) if known else None,
            "gained": gained,
            "lost": lost,
            "p": mcnemar(gained, lost),
        }
    return table


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: twice the smaller tail of a fair coin, at most 1."""
    n, few = gained + lost, min(gained, lost)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in logs))


# Command


Build = Callable[[], Model]


def check_models(models: Mapping[str, Build]) -> dict[str, Build]:
    """Build every model before any is scored; only the first one is kept in memory."""
    label, *later = models
    for name in later:
        models[name]()
    kept = [models[label]()]
    return {**models, label: kept.pop}


def evaluate(
    models: Mapping[str, Build], suites: dict[str, Suite], args: argparse.Namespace
) -> dict[str, Any]:
    """Score every model on every suite; write each suite's items below --out, if given.

    Models are built one after the other; each later one is compared with the first.
    """
    results: dict[str, Any] = {}
    before: dict[str, Scored] = {}
    readers: dict[str, Callable[..., Any]] = {"blind": score_ngrams}
    if args.mlm:
        masked = MaskedModel(args.mlm, args.device)
        readers["masked"] = functools.partial(score_masked, model=masked)
    blind = {
        name: {key: read_blind(suite.items, score) for key, score in readers.items()}
        for name, suite in suites.items()
        if suite_info(name).get("blind") and not args.no_blind
    }
    writes = args.out and rank_and_ranks()[0] == 0
    if writes:
        shutil.rmtree(args.out / ITEMS, ignore_errors=True)
    for label, build in models.items():
        encoder = None  # free the last model first
        encoder = Encoder(build(), args)
        made = {"python": platform.python_version(), "torch": torch.__version__}
        made |= {"open_clip": version("open_clip_torch"), "precision": args.precision}
        about = {"weights_sha256": encoder.hash, "evaluated_with": made}
        photos = encoder.model.about.pop("train_images", None)
        known = encoder.model.about.items()
        kept = {key: value for key, value in known if key not in ("config", "preprocess")}
        results[label] = {**kept, **about, "suites": {}}
        for name, suite in suites.items():
            try:
                scored = score_suite(suite, encoder, args.ties)
            except DataError as error:
                raise DataError(f"{label}: {error}" if len(models) > 1 else str(error)) from None
            result = {**summarise(suite, scored), "tie_rule": args.ties}
            result.update(blind.get(name, {}))
            script("suites").mark_seen(result, suite, photos, args.root)
            if len(results) > 1:
                base = next(iter(results))
                result["versus"] = {base: compare(name, scored, before[name])}
            before.setdefault(name, scored._replace(records=[]))
            results[label]["suites"][name] = result
            folder = args.out / ITEMS / (label if len(models) > 1 else "") if writes else None
            together(functools.partial(write_items, folder, name, scored))
    return results


def discard(out: Path | None) -> None:
    """Delete the items of a run that failed, and the folder if nothing else is in it."""
    if out and rank_and_ranks()[0] == 0:
        shutil.rmtree(out / ITEMS, ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()


ITEMS = "items.partial"  # until all is scored


def write_items(folder: Path | None, suite: str, scored: Scored) -> None:
    """Write one line for each item: texts, scores and verdicts."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored.records)
    if folder is None or not text:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{suite}.jsonl", text)
    except OSError as error:
        raise DataError(f"--out {folder}: cannot be written ({error.strerror})") from None


def replace_folder(new: Path, old: Path) -> None:
    """Replace the folder `old` by `new`; without `new`, delete it."""
    gone = old.with_name(f"{old.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    if old.exists():
        os.replace(old, gone)
    if new.exists():
        os.replace(new, old)
    shutil.rmtree(gone, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with writing(path, overwrite=True) as file:
        file.write(text.encode())


def pick_device(device: str) -> str:
    """Resolve "auto"; refuse cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch finds no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def name_models(args: argparse.Namespace) -> dict[str, tuple[str | None, str | None]]:
    """Model name and weights by label; a label defaults to the name of the run."""
    if args.pretrained:
        if "/" in args.pretrained and not os.path.exists(args.pretrained):
            raise DataError(f"--pretrained {args.pretrained}: no such checkpoint; check the path")
        label = Path(args.pretrained).name if os.path.exists(args.pretrained) else args.pretrained
        label = f"{Path(args.model).name} {label}" if args.model else label
        return {_plain_label(label, "--pretrained"): (args.model, args.pretrained)}
    if not args.ckpt:  # main() asked for one of them
        return {_plain_label(args.model.split("/")[-1], "--model"): (args.model, None)}
    import open_clip

    named: dict[str, tuple[str | None, str | None]] = {}
    for given in args.ckpt:
        label, _, what = given.rpartition("=") if not os.path.exists(given) else ("", "", given)
        name, _, tag = what.rpartition(":")
        if os.path.exists(what):
            pair, short = (args.model, what), Path(what).resolve().parent.name
        elif what.startswith("hf-hub:"):
            pair, short = (what, None), what.split("/")[-1]
        elif tag and open_clip.get_model_config(register(name)):
            pair, short = (name, tag), f"{name} {tag}"
        else:
            raise DataError(f"--ckpt {what}: no such checkpoint; check the path")
        label = _plain_label(label or short, f"--ckpt {given}")
        if label in named:
            raise DataError(f"--ckpt {given}: label {label} is used twice; write --ckpt LABEL=PATH")
        named[label] = pair
    return named


def _plain_label(label: str, flag: str) -> str:
    """Refuse labels that cannot be both a folder's name and a table's heading."""
    if not re.fullmatch(r"\w[\w.+ -]*", label):
        raise DataError(
            f"{flag}: the name {label!r} may hold letters, digits and .+-_ only; "
            + ("rename the file" if flag.startswith("--suite") else "write --ckpt LABEL=WHAT")
        )
    return label


def suite_name(given: str) -> str:
    """The name of an entry of --suite; for the user's own file or loader, the file's name.

    Raises:
        DataError: no such suite, or a user's file with the name of a suite of the kit.
    """
    if is_own(given):
        name = _plain_label(Path(given.split(".py:")[0]).stem, f"--suite {given}")
        if name in SUITES:
            raise DataError(f"--suite {given}: {name} is a suite of the kit; rename the file")
        return name
    if given in SUITES:
        return given
    near = difflib.get_close_matches(given, [*SUITES, *GROUPS], 1)
    hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(SUITES)}"
    hint = "leave out the comma" if not given else f"{hint}, or a .json, .jsonl or .py:FUNCTION"
    raise DataError(f"--suite {given or repr(given)}: no such suite; {hint}")


def name_suites(text: str) -> list[str]:
    """The suites of a comma list, with groups expanded.

    Raises:
        DataError: no such suite, or two files of the same name.
    """
    given = [name.strip() for name in text.split(",")]
    entries = list(dict.fromkeys(x for name in given for x in GROUPS.get(name, [name])))
    names: dict[str, str] = {}
    for entry in entries:
        other = names.setdefault(suite_name(entry), entry)
        if other != entry:
            raise DataError(f"--suite: {other} and {entry} have the same name; rename one")
    return entries


def load_suites(args: argparse.Namespace) -> tuple[dict[str, Suite], dict[str, str]]:
    """Read the suites of --suite; with --allow-missing, skip those of a group that are missing.

    Returns:
        the suites, and the reason for each one that was left out.
    """
    check_root(args.root)
    suites, left_out = {}, {}
    group = {name.strip() for name in args.suite.split(",")} & GROUPS.keys()
    for given in name_suites(args.suite):
        try:
            suite = load_suite(given, args.root, args.allow_missing)
            suites[suite.name] = suite
        except DataError as error:
            if not (args.allow_missing and group):
                raise
            left_out[given] = str(error).removeprefix(f"{given}: ")
            print(f"evaluate.py: left out: {given}: {left_out[given]}", file=sys.stderr)
    if not suites:
        raise DataError(f"--suite {args.suite}: none of them is below --root {args.root}")
    return suites, left_out


def check_args(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Raises:
        DataError: names the flag.
    """
    hub = (args.model or "").startswith("hf-hub:") and not args.pretrained
    if bool(args.ckpt) + bool(args.pretrained) + hub != 1:
        raise DataError(
            "give one of --ckpt PATH, --model NAME --pretrained TAG, --model hf-hub:ORG/REPO"
        )
    if args.pretrained and not args.model and not os.path.exists(args.pretrained):
        raise DataError(f"--pretrained {args.pretrained}: also pass --model")
    if (args.batch_size is not None and args.batch_size < 1) or args.workers < 0:
        raise DataError("--batch-size must be 1 or more, --workers 0 or more")
    name_suites(args.suite)
    check_root(args.root)
    if args.out:
        check_out(args.out, args.overwrite)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that has results already or cannot be created; creates nothing."""
    try:
        if (out / "results.json").exists() and not overwrite:
            raise DataError(f"--out {out}: has results already; pass --overwrite to replace them")
        own = [path for path in (out / "items").rglob("*") if path.is_file()]
        foreign = next((path for path in own if path.suffix != ".jsonl"), None)
        loose = [out / f"results.{kind}" for kind in ("json", "md", "tex", "csv")]
        loose = [path for path in loose if os.path.lexists(path)]
        plain = [path for path in loose if path.is_file() and not path.is_symlink()]
        loose = [path for path in loose if not overwrite or path not in plain]
        if loose:
            raise DataError(f"--out {out}: {loose[0]} exists, not replaced; choose another folder")
        if foreign or (own and not overwrite):
            raise DataError(
                f"--out {out}: {foreign or own[0]} exists, not replaced; choose another folder"
            )
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise DataError(f"--out {out}: cannot be created ({error.strerror})") from None


def main(argv: list[str] | None = None) -> None:
    """Load, score, print, write."""
    args = parse_args(argv)
    if args.list:
        script("suites").list_suites(args.root)
        return
    args.device = str(start_process(args.device).device)
    together(lambda: check_args(args))
    named = together(lambda: name_models(args))
    first = args.baseline or next(iter(named))
    if first not in named:
        raise DataError(f"--baseline {first}: is not one of the labels {', '.join(named)}")
    named = {first: named[first], **named}
    load = functools.partial(load_model, activation=args.activation, device=args.device)
    builds: dict[str, Build] = {
        label: functools.partial(load, *what) for label, what in named.items()
    }
    models = together(lambda: check_models(builds))
    # The first rank reads the suites (and may unpack files) and broadcasts them.
    loaded: list[Any] = [together(lambda: load_suites(args) if rank_and_ranks()[0] == 0 else None)]
    if dist.is_initialized():
        dist.broadcast_object_list(loaded)
    suites, left_out = loaded[0]
    try:
        results = evaluate(models, suites, args)
    except DataError:
        discard(args.out)
        raise
    for result in results.values():
        result["left_out"] = left_out
    together(lambda: report(results, args) if rank_and_ranks()[0] == 0 else None)
    if dist.is_initialized():
        dist.destroy_process_group()


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the tables to --out as JSON, markdown, LaTeX and CSV, then print them."""
    tables, out = script("make_tables"), args.out
    if out:
        try:
            out.mkdir(parents=True, exist_ok=True)
            replace_folder(out / ITEMS, out / "items")
            write_text(out / "results.md", tables.markdown(results))
            write_text(out / "results.tex", tables.latex(results))
            write_text(out / "results.csv", tables.long_csv(results))
            write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(tables.show(tables.markdown(results, published_rows=args.published)))
    if out:
        print(f"\nresults.json, .md, .tex, .csv and items/ are in {out}")


if __name__ == "__main__":
    sys.modules["evaluate"] = sys.modules["__main__"]  # scripts/make_tables.py imports it
    sys.exit(run_script(main, "evaluate.py"))

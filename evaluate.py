# SPDX-License-Identifier: MIT
"""Score checkpoints: does the model prefer the true caption, and what did that cost?

Every suite is a list of items: pictures, and texts with the true ones first.  Each distinct picture
and text is encoded once; an item's matrix of cosines decides it.  Equal scores count as wrong.

  python evaluate.py --ckpt runs/ce-clip/latest.pt --suite shapes
  python evaluate.py --ckpt runs/coco/latest.pt --suite sugarcrepe --root DIR --out results
  python evaluate.py --model ViT-B-32-quickgelu --pretrained openai --suite sugarcrepe --root DIR
  python evaluate.py --list --root DIR
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from data import (
    COLOURS,
    EDITS,
    SHAPES,
    DataError,
    Scene,
    draw_scene,
    encode_text,
    make_scene,
    open_image,
    pack_texts,
    say,
)

SHAPES_ITEMS = 500  # of each subset of the shapes suite
EVAL_SEED = 0  # of the shapes suite and of the bootstrap; the tests never change
RESAMPLES = 2000
TINY_CONFIG = Path(__file__).parent / "scripts" / "shapes-tiny.json"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Table 3 of the paper, per cent.
PAPER = {
    "sugarcrepe": {
        "CLIP": {
            **{"add_att": 68.2, "add_obj": 77.2, "replace_att": 80.0, "replace_obj": 90.9},
            **{"replace_rel": 69.2, "swap_att": 64.0, "swap_obj": 61.4},
        },
        "CE-CLIP": {
            **{"add_att": 93.4, "add_obj": 92.4, "replace_att": 88.8, "replace_obj": 93.1},
            **{"replace_rel": 79.0, "swap_att": 77.0, "swap_obj": 72.8},
        },
    }
}


class Model(NamedTuple):
    """A CLIP model, its tokenizer, and what is known of it (name, activation, recipe ...)."""

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
    """Build a model and load its weights: an open_clip tag, or a checkpoint file.

    A checkpoint of train.py knows its model and its activation; any other file needs `name`.

    Args:
        name: an open_clip model name, "shapes-tiny", or the path of a model config (.json).
        pretrained: an open_clip tag, a checkpoint's path, or None for random weights.
        activation: "gelu" or "quickgelu", to overrule the one that the weights were trained with.
        device: where the model goes.

    Raises:
        DataError: unknown model or tag, or a file that does not hold these weights.
    """
    logging.getLogger().setLevel(logging.ERROR)  # open_clip tells every step of loading
    state: dict[str, torch.Tensor] | None = None
    about: dict[str, Any] = {}
    if pretrained and (os.path.exists(pretrained) or pretrained.endswith((".pt", ".pth", ".bin"))):
        state, about = read_checkpoint(pretrained)
    name = name or about.get("model")
    if not name:
        raise DataError(f"--ckpt {pretrained}: is not from train.py; name its --model")
    if about.get("model") not in (None, name):
        raise DataError(f"--model {name}: {pretrained} holds a {about['model']}; leave --model out")
    config = _config(name)
    quick = bool(config.get("quick_gelu"))
    if activation or about.get("activation"):
        quick = (activation or about["activation"]) == "quickgelu"
    tag = None if state is not None else pretrained
    if tag:
        _check_tag(name, tag, quick, activation)
    try:
        net = open_clip.create_model(_register(name), pretrained=tag, quick_gelu=quick)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"--model {name}: cannot be built or fetched ({_line(error)})") from None
    if state is not None:
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(
                f"{pretrained}: does not fit the model {name} ({_line(error)})"
            ) from None
    about = {**about, "model": name, "activation": "quickgelu" if quick else "gelu"}
    tokenizer = open_clip.get_tokenizer(_register(name))
    return Model(net.to(device), tokenizer, about)


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read weights in open_clip's layout and our `kit` notes on them, running no code of the file.

    Raises:
        DataError: the file is missing, torn, or holds more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint; check the path") from None
    except Exception as error:  # torch raises many kinds here
        raise DataError(f"{path}: cannot be read as weights ({_line(error)})") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{path}: holds no state_dict of a model")
    return {key.removeprefix("module."): value for key, value in state.items()}, dict(
        content.get("kit", {})
    )


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].startswith("Error(s)") else lines[0])[:160]


def _register(name: str) -> str:
    """Make a model config file known to open_clip, and give the name it has there."""
    path = TINY_CONFIG if name == TINY_CONFIG.stem else Path(name)
    if path.suffix != ".json":
        return name
    with contextlib.suppress(OSError, ValueError):
        open_clip.add_model_config(path)
    return path.stem


def _config(name: str) -> dict[str, Any]:
    config = open_clip.get_model_config(_register(name))
    if config is None:
        import difflib

        near = difflib.get_close_matches(name, [*open_clip.list_models(), TINY_CONFIG.stem], 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise DataError(f"--model {name}: open_clip knows no such model; {hint}")
    return config


def _check_tag(name: str, tag: str, quick: bool, activation: str | None) -> None:
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise DataError(f"--pretrained {tag}: neither a file nor a tag of {name}; its tags: {tags}")
    if bool(known.get("quick_gelu")) != quick and not activation:
        wanted = f"{name}-quickgelu" if known.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise DataError(f"--model {name}: {tag} was trained with the other GELU; use {wanted}")


class Item(NamedTuple):
    """One question: which texts belong to which pictures?

    path says where it stands for averages: (subset,) or (group, subset).
    """

    path: tuple[str, ...]
    id: str
    images: tuple[str, ...]  # files, or "shapes:INDEX"
    texts: tuple[str, ...]  # the true ones first
    true: int = 1


class Retrieval(NamedTuple):
    """Pictures, and for each text the index of its picture."""

    images: list[str]
    texts: list[str]
    image_of: list[int]


class Classes(NamedTuple):
    """Pictures, their labels, and for each class the prompts whose mean stands for it."""

    images: list[str]
    labels: list[int]
    names: list[str]
    prompts: list[list[str]]


class Suite(NamedTuple):
    """What a loader returns: the items, how many there should be, and what shows the costs."""

    items: list[Item]
    expected: dict[str, int]
    costs: dict[str, Retrieval | Classes]


def _test_scenes() -> Iterator[tuple[int, Scene]]:
    index = 0
    while True:
        yield index, make_scene("test", EVAL_SEED, index)
        index += 1


def load_shapes(root: Path | None, partial: bool) -> Suite:
    """Make the shapes suite: scenes whose combinations of colours and shapes training never had.

    In the swap subsets both captions have the same words.  In the others a word is replaced by one
    that the captions of other scenes use as often.
    """
    items = []
    for name, edit in EDITS.items():
        rng = random.Random(f"{EVAL_SEED}:{name}")
        count = 0
        for index, scene in _test_scenes():
            claim = edit(scene, rng)
            if claim is None or len(scene.things) == 1:
                continue
            template = rng.randrange(3)
            texts = (say(scene.claim, template), say(claim, template))
            path = (name.split("-")[0], name)
            items.append(Item(path, str(index), (f"shapes:{index}",), texts))
            count += 1
            if count == SHAPES_ITEMS:
                break
    expected = dict.fromkeys(EDITS, SHAPES_ITEMS)
    return Suite(items, expected, {"retrieval": _shapes_retrieval(), **_shapes_classes()})


def _shapes_retrieval() -> Retrieval:
    """Scenes of two or three things whose captions differ."""
    images: dict[str, str] = {}
    for index, scene in _test_scenes():
        if scene.claim.second is not None:
            images.setdefault(say(scene.claim, 0), f"shapes:{index}")
        if len(images) == SHAPES_ITEMS:
            break
    return Retrieval(list(images.values()), list(images), list(range(len(images))))


def _shapes_classes() -> dict[str, Retrieval | Classes]:
    """Scenes of one thing, to be named by its shape or by its colour alone."""
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
    return {
        "zero-shot shape": Classes(images, shapes, list(SHAPES), by_shape),
        "zero-shot colour": Classes(images, colours, list(COLOURS), by_colour),
    }


SUGARCREPE = {
    **{"add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652},
    **{"replace_rel": 1406, "swap_att": 666, "swap_obj": 245},
}


def load_sugarcrepe(root: Path | None, partial: bool) -> Suite:
    """Load SugarCrepe (Hsieh et al., 2023): seven files of COCO val2017 captions."""
    items = []
    for name in SUGARCREPE:
        for key, row in read_json(root, f"sugarcrepe/{name}.json").items():
            image = find_coco(root, row["filename"])
            texts = (row["caption"], row["negative_caption"])
            items.append(Item((name.split("_")[0], name), key, (image,), texts))
    return Suite(keep_found(items, partial, "COCO val2017 photos into DIR/val2017"), SUGARCREPE, {})


# What a suite needs below --root, and who reads it.
SUITES: dict[str, tuple[Callable[[Path | None, bool], Suite], list[str]]] = {
    "shapes": (load_shapes, []),
    "sugarcrepe": (load_sugarcrepe, [f"sugarcrepe/{n}.json" for n in SUGARCREPE] + ["val2017"]),
}
GROUPS = {"paper": ["sugarcrepe"]}


def read_json(root: Path | None, name: str) -> Any:
    """Read a suite's official file.

    Raises:
        DataError: it is missing or is not JSON.
    """
    if root is None:
        raise DataError(f"--root is needed: the folder that holds {name}")
    try:
        return json.loads((root / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{root / name}: cannot be read ({error.strerror}); put it there") from None
    except ValueError:
        raise DataError(f"{root / name}: is not JSON; download it again") from None


def find_coco(root: Path | None, name: str) -> str:
    """The path of a COCO photo by its number, in whichever pool below root holds it."""
    root = root or Path()
    number = name.split("_")[-1]
    for pool in ("val2017", "train2017"):
        if (root / pool / number).is_file():
            return str(root / pool / number)
    for pool in ("val2014", "train2014"):
        if (root / pool / f"COCO_{pool}_{number}").is_file():
            return str(root / pool / f"COCO_{pool}_{number}")
    return str(root / "val2017" / number)


def keep_found(items: list[Item], partial: bool, need: str) -> list[Item]:
    """Drop items whose pictures are missing, if that is allowed.

    Raises:
        DataError: pictures are missing and `partial` is False, or none is there.
    """
    images = dict.fromkeys(image for item in items for image in item.images)
    missing = {image for image in images if not Path(image).is_file()}
    if missing and (not partial or len(missing) == len(images)):
        raise DataError(
            f"{len(missing)} of {len(images)} pictures are missing, the first is {min(missing)}; "
            f"put the {need}" + ("" if partial else ", or pass --allow-missing to score the rest")
        )
    return [item for item in items if not missing.intersection(item.images)]


class Encoder:
    """Encodes each distinct picture and text once; keeps unit-length float32 features."""

    def __init__(self, model: Model, args: argparse.Namespace) -> None:
        """Use the device, precision and batch size of the command line."""
        self.model, self.device, self.batch = model, torch.device(args.device), args.batch_size
        self.dtype = PRECISIONS[args.precision]
        cfg = PreprocessCfg(**model.net.visual.preprocess_cfg)
        self.transform = image_transform_v2(cfg, is_train=False)
        self.width = cfg.size if isinstance(cfg.size, int) else cfg.size[0]
        self.workers = args.workers
        model.net.eval()

    @torch.no_grad()
    def images(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode pictures by name, on `--workers` decoding threads."""
        from torch.utils.data import DataLoader

        names = list(dict.fromkeys(names))
        loader = DataLoader(
            _Pictures(names, self.transform, self.width), self.batch, num_workers=self.workers
        )
        parts = [self._unit(self.model.net.encode_image, batch) for batch in loader]
        return dict(zip(names, torch.cat(parts), strict=True)) if names else {}

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode texts, packed several to a row."""
        texts = list(dict.fromkeys(texts))
        parts = []
        for start in range(0, len(texts), 4 * self.batch):
            packed = pack_texts(texts[start : start + 4 * self.batch], self.model.tokenizer)
            parts.append(self._unit(lambda p: encode_text(self.model.net, p), packed))
        return dict(zip(texts, torch.cat(parts), strict=True)) if texts else {}

    def _unit(self, encode: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = encode(batch.to(self.device))
        return F.normalize(features.float(), dim=-1).cpu()


class _Pictures(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(
        self, names: list[str], transform: Callable[..., torch.Tensor], width: int
    ) -> None:
        self.names, self.transform, self.width = names, transform, width

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(load_picture(self.names[i], self.width))


def load_picture(name: str, width: int) -> Image.Image:
    """Open a file, or draw the test scene "shapes:INDEX"."""
    if name.startswith("shapes:"):
        return draw_scene(make_scene("test", EVAL_SEED, int(name.removeprefix("shapes:"))), width)
    return open_image(name)


def judge(scores: np.ndarray, true: int) -> tuple[dict[str, bool], bool]:
    """Decide an item from its cosines [images, texts]; the matrix's shape picks the rule.

    One picture: every true text above every false one.  One text: the first picture above the
    others.  Square: `text` if each picture prefers its text, `image` if each text prefers its
    picture, `group` if both.

    Returns:
        verdicts by name ("correct", or "text", "image" and "group"), and whether a tie decided.
    """
    rows, columns = scores.shape
    if rows == 1 or columns == 1:
        line = scores.ravel()
        low, high = line[:true].min(), line[true:].max()
        return {"correct": bool(low > high)}, bool(low == high)
    if rows != columns:
        raise ValueError(f"scores must be 1 x L, K x 1 or K x K, not {rows} x {columns}")
    own = scores.diagonal()
    others = np.where(np.eye(rows, dtype=bool), -np.inf, scores)
    text, image = own > others.max(axis=1), own > others.max(axis=0)
    tie = (own == others.max(axis=1)).any() or (own == others.max(axis=0)).any()
    verdicts = {"text": bool(text.all()), "image": bool(image.all())}
    return {**verdicts, "group": all(verdicts.values())}, bool(tie)


def interval(correct: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of a mean of 0 and 1, in per cent, over items."""
    # Drawing n items with replacement draws a binomial number of the correct ones.
    draws = rng.binomial(len(correct), correct.mean(), RESAMPLES) / len(correct)
    low, high = np.percentile(100 * draws, [2.5, 97.5])
    return float(low), float(high)


def summarise(correct: Sequence[bool], expected: int, ties: int = 0) -> dict[str, Any]:
    """Accuracy in per cent with its 95 % interval, N scored of N expected, ties."""
    values = np.asarray(correct, dtype=float)
    low, high = interval(values, np.random.default_rng(EVAL_SEED))
    accuracy = float(100 * values.mean())
    return {
        **{"accuracy": accuracy, "low": low, "high": high},
        **{"scored": len(values), "expected": expected, "ties": ties},
    }


def score_suite(suite: Suite, encoder: Encoder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score all items and costs; returns the results and one record for each item."""
    images = encoder.images([image for item in suite.items for image in item.images])
    texts = encoder.texts([text for item in suite.items for text in item.texts])
    verdicts: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    ties: dict[tuple[str, ...], int] = defaultdict(int)
    rows = []
    for item in suite.items:
        one = torch.stack([images[name] for name in item.images])
        two = torch.stack([texts[text] for text in item.texts])
        scores = (one @ two.T).numpy()
        result, tie = judge(scores, item.true)
        for name, value in result.items():
            path = item.path if name == "correct" else (*item.path[:-1], f"{item.path[-1]} {name}")
            verdicts[path].append(value)
            ties[path] += tie
        rows.append(
            {
                **{"subset": item.path[-1], "id": item.id, "images": item.images},
                **{"texts": item.texts, "scores": scores.round(6).tolist(), **result},
            }
        )
    subsets = {
        path[-1]: summarise(values, suite.expected.get(path[-1], len(values)), ties[path])
        for path, values in verdicts.items()
    }
    costs = {
        name: score
        for key, cost in suite.costs.items()
        for name, score in _cost(key, cost, encoder)
    }
    return {"subsets": subsets, "averages": averages(verdicts), "costs": costs}, rows


def averages(verdicts: dict[tuple[str, ...], list[bool]]) -> dict[str, float]:
    """The averages that the literature uses, in per cent, each under its name."""
    means = {path: 100 * float(np.mean(values)) for path, values in verdicts.items()}
    groups = defaultdict(list)
    for path, mean in means.items():
        groups[path[0]].append(mean)
    return {
        "mean of items": 100 * float(np.mean([v for values in verdicts.values() for v in values])),
        f"mean of {len(means)} subsets": float(np.mean(list(means.values()))),
        f"mean of {len(groups)} groups": float(np.mean([np.mean(g) for g in groups.values()])),
    }


def _cost(name: str, cost: Retrieval | Classes, encoder: Encoder) -> Iterator[tuple[str, Any]]:
    """Retrieval at 1 and 5 both ways, or zero-shot accuracy."""
    found = encoder.images(cost.images)
    images = torch.stack([found[image] for image in cost.images])
    if isinstance(cost, Classes):
        prompts = encoder.texts([text for texts in cost.prompts for text in texts])
        means = [torch.stack([prompts[t] for t in texts]).mean(0) for texts in cost.prompts]
        best = (images @ F.normalize(torch.stack(means), dim=-1).T).argmax(1)
        correct = (best == torch.tensor(cost.labels)).tolist()
        yield name, summarise(correct, len(correct))
        return
    encoded = encoder.texts(cost.texts)
    texts = torch.stack([encoded[text] for text in cost.texts])
    scores, image_of = images @ texts.T, torch.tensor(cost.image_of)  # [N, M]
    own = image_of[None, :] == torch.arange(len(images))[:, None]
    best_own = scores.masked_fill(~own, -2).amax(1, keepdim=True)
    i2t = ((scores >= best_own) & ~own).sum(1)  # how many wrong texts are not below the best own
    mine = scores[image_of, torch.arange(len(texts))]
    t2i = ((scores >= mine) & ~own).sum(0)
    for way, rank in (("image to text", i2t), ("text to image", t2i)):
        for k in (1, 5):
            yield f"{name} {way} R@{k}", summarise((rank < k).tolist(), len(rank))


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One table for each suite: subsets, averages and costs down, checkpoints across."""
    lines = []
    for suite in next(iter(results.values()))["suites"]:
        scored = {label: result["suites"][suite] for label, result in results.items()}
        paper = PAPER.get(suite, {})
        lines += ["", f"### {suite}: per cent correct [95 % interval]", ""]
        lines += _row(["", "items", *scored, *(f"paper {name}" for name in paper)])
        lines += _row(["---", *["---:"] * (1 + len(scored) + len(paper))])
        first = next(iter(scored.values()))
        for part in ("subsets", "costs"):
            if part == "costs" and first["costs"]:
                lines += _row(["*costs*", *[""] * (1 + len(scored) + len(paper))])
            for name, cell in first[part].items():
                of = "" if cell["scored"] == cell["expected"] else f" of {cell['expected']}"
                ours = [_cell(result[part][name]) for result in scored.values()]
                theirs = [
                    f"{column[name]:.1f}" if name in column else "" for column in paper.values()
                ]
                lines += _row([name, f"{cell['scored']}{of}", *ours, *theirs])
            if part == "subsets":
                lines += _average_rows(scored, paper)
        ties = {label: sum(s["ties"] for s in r["subsets"].values()) for label, r in scored.items()}
        lines += ["", "Ties, counted as wrong: " + ", ".join(f"{k} {v}" for k, v in ties.items())]
    return "\n".join(lines).strip() + "\n"


def _row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _cell(score: dict[str, Any]) -> str:
    return f"{score['accuracy']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def _average_rows(scored: dict[str, Any], paper: dict[str, dict[str, float]]) -> list[str]:
    """Averages, of the paper's columns too where those can be computed from what it prints."""
    lines = []
    for name in next(iter(scored.values()))["averages"]:
        ours = [f"{result['averages'][name]:.1f}" for result in scored.values()]
        theirs = []
        for column in paper.values():
            leaves = {(key.split("_")[0], key): [value] for key, value in column.items()}
            means = averages({path: [v / 100 for v in vs] for path, vs in leaves.items()})  # type: ignore[misc]
            theirs.append("" if name == "mean of items" else f"{means.get(name, 0):.1f}")
        lines += _row([f"**{name}**", "", *ours, *theirs])
    return lines


def show(table: str) -> str:
    """The markdown table with its columns lined up for a terminal."""
    lines = table.splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    width = max((len(row) for row in rows), default=0)
    sizes = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(width)]
    shown = []
    for line in lines:
        if line.startswith("|"):
            cells = [c.strip() for c in line.strip("|").split("|")]
            if cells[0] == "---":
                line = "  ".join("-" * size for size in sizes)
            else:
                first, *rest = (
                    c.ljust(s) if i == 0 else c.rjust(s)
                    for i, (c, s) in enumerate(zip(cells, sizes, strict=False))
                )
                line = "  ".join([first, *rest])
        shown.append(line.rstrip())
    return "\n".join(shown)


def evaluate(
    models: dict[str, Model], suites: dict[str, Suite], args: argparse.Namespace
) -> dict[str, Any]:
    """Score every model on every suite; write items below --out, if given, as they are done."""
    results: dict[str, Any] = {}
    for label, model in models.items():
        results[label] = {**model.about, "suites": {}}
        encoder = Encoder(model, args)
        for name, suite in suites.items():
            scores, rows = score_suite(suite, encoder)
            results[label]["suites"][name] = scores
            if args.out:
                folder = args.out / "items" / label if len(models) > 1 else args.out / "items"
                folder.mkdir(parents=True, exist_ok=True)
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_text(folder / f"{name}.jsonl", text)
    return results


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--ckpt",
        action="append",
        default=[],
        metavar="[LABEL=]PATH",
        help="checkpoint; repeat to compare several",
    )
    add("--model", help="open_clip model name or config .json (default: the checkpoint's)")
    add("--pretrained", help="open_clip tag, instead of --ckpt")
    add(
        "--activation",
        choices=("gelu", "quickgelu"),
        help="overrule the checkpoint's; gelu is what the published evaluation used",
    )
    add(
        "--suite",
        default="shapes",
        help=f"comma list of {', '.join([*SUITES, *GROUPS])} (default shapes)",
    )
    add("--root", type=Path, help="folder of the suites' official files and photos")
    add("--allow-missing", action="store_true", help="score the items whose pictures are there")
    add("--out", type=Path, help="folder for results.json, results.md and items/")
    add("--overwrite", action="store_true", help="replace the results in --out")
    add("--list", action="store_true", help="say what each suite needs and what is there")
    add("--batch-size", type=int, default=128, help="pictures encoded at once (default 128)")
    add(
        "--precision",
        choices=list(PRECISIONS),
        default="fp32",
        help="of the towers (default fp32); scores are float32",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    add("--workers", type=int, default=0, help="processes that decode pictures (default 0)")
    return parser.parse_args(argv)


def pick_device(device: str) -> str:
    """Resolve "auto"; refuse cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch finds no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def list_suites(root: Path | None) -> None:
    """Print what each suite needs and whether it is there."""
    for name, (_, files) in SUITES.items():
        missing = [file for file in files if root is None or not (root / file).exists()]
        state = "ready" if not missing else f"needs {', '.join(missing)} below --root"
        print(f"{name:12} {state}")


def _labelled(args: argparse.Namespace) -> dict[str, str]:
    """Labels and paths of the checkpoints; a label defaults to the name of the run."""
    paths = {}
    for given in args.ckpt:
        label, _, path = given.rpartition("=") if not os.path.exists(given) else ("", "", given)
        label = label or Path(path).resolve().parent.name
        if label in paths or "/" in label:
            raise DataError(f"--ckpt {given}: the label {label} is taken; write --ckpt LABEL=PATH")
        paths[label] = path
    return paths


def main(argv: list[str] | None = None) -> None:
    """Load, score, print, write."""
    args = parse_args(argv)
    if args.list:
        list_suites(args.root)
        return
    if bool(args.ckpt) == bool(args.pretrained):
        raise DataError("give either --ckpt PATH or --model NAME --pretrained TAG")
    if args.batch_size < 1 or args.workers < 0:
        raise DataError("--batch-size must be 1 or more, --workers 0 or more")
    args.device = pick_device(args.device)
    if args.out and (args.out / "results.json").exists() and not args.overwrite:
        raise DataError(f"--out {args.out}: has results already; pass --overwrite to replace them")
    names = [n for name in args.suite.split(",") for n in GROUPS.get(name.strip(), [name.strip()])]
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise DataError(f"--suite {unknown[0]}: is none of {', '.join([*SUITES, *GROUPS])}")
    suites = {name: SUITES[name][0](args.root, args.allow_missing) for name in names}
    paths = _labelled(args) or {
        f"{args.model} {args.pretrained}".replace("/", "-"): args.pretrained
    }
    models = {
        label: load_model(args.model, path, activation=args.activation, device=args.device)
        for label, path in paths.items()
    }
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--out {args.out}: cannot be made ({error.strerror})") from None
    results = evaluate(models, suites, args)
    table = markdown(results)
    print(show(table))
    if args.out:
        write_text(args.out / "results.md", table)
        write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
        print(f"\nresults.json, results.md and items/ are in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)

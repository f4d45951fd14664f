# SPDX-License-Identifier: MIT
"""Manifests, shards and the shapes world: from captions and images to batches and features.

A manifest is JSON lines, one caption a line, written by negatives.py:

  {"image": "a.jpg", "image_id": 9, "caption": "...", "negatives": {"relation": "...", ...}}

A negative is a sentence, null, or a list of sentences of which training draws one each epoch.  The
types are NEGATIVE_TYPES, or those that a first line {"manifest": 1, "types": [...]} names.

  python data.py coco captions_train2014.json --out captions.jsonl
  python data.py shapes --out shapes/train.jsonl --images shapes --limit 1000
  python data.py karpathy dataset_coco.json --out captions.jsonl      # train and restval only
  python data.py check negatives.jsonl --images coco

Chapters: the command line; manifests and images; the shapes world (scenes of one to three coloured
shapes, drawn on demand, with exactly known captions and hard negatives); data sets (shapes,
manifest, mixture, shards); batches; packed captions and towers; overlap with test images;
converters; the command.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from negatives import (
    NEGATIVE_TYPES,
    DataError,
    Record,
    add_sample,
    header_types,
    launcher,
    make_negatives,
    parse_record,
    read_captions,
    read_records,
    read_samples,
    run_script,
    sample_row,
    split_types,
    write_lines,
    writing,
)

# The command line

SOURCES = {
    "coco": "a COCO captions .json",
    "karpathy": "a Karpathy .json (COCO, Flickr8k, Flickr30k)",
    "flickr30k": "Flickr30k's Karpathy .json, dataset_flickr30k.json",
    "csv": "a .csv or .tsv with a header",
    "vg": "a folder with Visual Genome's region_descriptions.json and image_data.json",
    "cc3m": "a folder of images, each with its caption in a .txt beside it (img2dataset)",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    about = {
        name: f"Turn {text} into a manifest without negatives." for name, text in SOURCES.items()
    }
    about["shapes"] = "Draw the shapes world as PNG files with a manifest."
    about["shards"] = "Write a manifest and its images as webdataset shards (.tar)."
    about["check"] = "Decode every image of a manifest, count negatives, find test images."
    parser = argparse.ArgumentParser(prog="data.py", description="Make and check manifests.")
    commands = parser.add_subparsers(dest="command", required=True)
    subs = {name: commands.add_parser(name, help=x, description=x) for name, x in about.items()}

    def add(names: Iterable[str], flag: str, text: str, **options: Any) -> None:
        for name in names:
            subs[name].add_argument(flag, help=text, **options)

    path: dict[str, Any] = {"type": Path}
    makers = [*SOURCES, "shapes"]
    for name, text in SOURCES.items():
        add([name], "captions", f"What to read: {text}.", **path)
    add(makers, "--out", "Manifest to write (.jsonl).", **path, required=True)
    add(makers, "--overwrite", "Replace --out (default: refuse).", action="store_true")
    text = "Splits to take: train, restval, val or test (default: train and restval)."
    add(["karpathy", "flickr30k"], "--splits", text, nargs="+")
    add(["csv"], "--image-column", "Column of file names (default: filepath or image).")
    add(["csv"], "--caption-column", "Column of captions (default: title or caption).")
    text = "Columns of negatives (default: neg_caption, where there is one)."
    add(["csv"], "--negative", text, nargs="+", default=(), metavar="COLUMN[:TYPE]")
    add(
        ["shapes"], "--split", "Split (default: train).", choices=("train", "test"), default="train"
    )
    add(["shapes"], "--limit", "Number of scenes (default: 1000).", type=int, default=1000)
    add(["shapes"], "--seed", "Seed of the scenes (default: 0).", type=int, default=0)
    add(["shards", "check"], "manifest", "Manifest to read (.jsonl).", **path)
    add(["shapes", "shards", "check"], "--images", "Folder of the images.", **path, required=True)
    add(["shards"], "--out", "Folder to write the shards into.", **path, required=True)
    add(["shards"], "--size", "Examples in a shard (default: 10000).", type=int, default=10_000)
    text = "open_clip model, shapes-tiny or config .json that will train on it (default: ViT-B-32)."
    add(["check"], "--model", text, default="ViT-B-32")
    text = "Types of negatives to read, as counting,negation (default: all of the manifest)."
    add(["shards", "check"], "--types", text, type=split_types, default=(), metavar="A,B")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before the slow imports

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.functional import pil_to_tensor

# Manifests and images

Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow warns above this, and refuses twice as many
Transform = Callable[..., Tensor]  # of an image and rng to uint8 [3, H, W]; it decodes the image
TURNS = {2 + i: Image.Transpose(turn) for i, turn in enumerate((0, 3, 1, 5, 4, 6, 2))}  # by EXIF


def read_manifest(path: str | Path, types: Sequence[str] = ()) -> Iterator[Record]:
    """Read the records of a manifest, each with its image; see `negatives.read_records`."""
    for offset, record in read_records(Path(path), types, need_image=True):
        yield _encodable(record, f"{path}, byte {offset}")


def _encodable(record: Record, place: str) -> Record:
    """Refuse lone surrogates, which cannot be encoded as UTF-8."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: holds half a character (a lone surrogate); mend it") from None
    return record


def draw_negatives(record: Record, rng: random.Random) -> tuple[str | None, ...]:
    """One negative of each type, or None."""
    given = record.negatives.values()
    return tuple(rng.choice(texts) if isinstance(texts, list) else texts for texts in given)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image as 8-bit RGB; a ValueError if its values are not colours."""
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() >= 2**16:
            raise ValueError("its values are not colours; save it with 8 or 16 bits a channel")
        image = Image.fromarray((grey >> 8).astype(np.uint8))  # convert("RGB") gives white
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(file: Any, name: str = "", use: Callable[..., Any] = to_rgb) -> Any:
    """Open an image, a path or a stream, and return what `use` makes of it.

    Messages name it `name`, by default the path. A DataError if the file is missing or cannot be
    decoded.
    """
    name = name or str(file)
    try:
        with Image.open(file) as image:
            return use(image)
    except FileNotFoundError:
        raise DataError(f"{name}: no such image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        why = "not an image format that Pillow knows" if unknown else error
        raise DataError(f"{name}: cannot be decoded ({why})") from None


def train_transform(
    model: Any, least: float = 0.9, *, exif: bool = True, reduce: bool = True
) -> Transform:
    """Crop a random part of an image (area `least` to 1 of it), and resize it for the model.

    The crop is that of torchvision's RandomResizedCrop, drawn from the caller's generator. `exif`
    applies the EXIF orientation, without which "left of" may be false; `reduce` decodes JPEGs at
    1/2, 1/4 or 1/8 where the crop stays at least as large as the result.
    """
    size = image_size(model)
    mode = Image.Resampling[model.visual.preprocess_cfg.get("interpolation", "bicubic").upper()]
    return functools.partial(_crop, size=size, least=least, mode=mode, exif=exif, reduce=reduce)


def _crop(
    image: Image.Image,
    rng: random.Random,
    size: tuple[int, int],
    least: float,
    mode: Image.Resampling,
    exif: bool,
    reduce: bool,
) -> Tensor:
    """Return uint8 [3, *size]."""
    held = 1  # EXIF orientation; 5 to 8 swap width and height
    with contextlib.suppress(Exception):  # Pillow raises many kinds for broken EXIF
        held = int(image.getexif().get(0x0112, 1)) if exif else 1
    width, height = image.size[::-1] if 5 <= held <= 8 else image.size
    # If no crop fits: the largest central crop of the nearest allowed ratio.
    w = round(height * 4 / 3) if width / height > 4 / 3 else width
    h = round(width * 4 / 3) if width / height < 3 / 4 else height
    x, y = (width - w) // 2, (height - h) // 2
    for _ in range(10):
        area = width * height * rng.uniform(least, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            w, h = across, down
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    part = next(n for n in (8, 4, 2, 1) if n == 1 or (n * size[1] <= w and n * size[0] <= h))
    if part > 1 and reduce and image.format == "JPEG":
        image.draft(None, (image.width // part, image.height // part))
    image = to_rgb(image)
    image = image.transpose(TURNS[held]) if held in TURNS else image
    if image.size == (width, height):
        return pil_to_tensor(image.crop((x, y, x + w, y + h)).resize(size[::-1], mode))
    fx, fy = image.width / width, image.height / height
    box = (x * fx, y * fy, (x + w) * fx, (y + h) * fy)
    return pil_to_tensor(image.resize(size[::-1], mode, box))


def image_size(model: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that the model reads."""
    size = model.visual.preprocess_cfg["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def normalise(images: Tensor, model: Any) -> Tensor:
    """Turn uint8 images [B, 3, H, W] into the model's input, on their device."""
    cfg = model.visual.preprocess_cfg
    mean, std = (images.new_tensor(cfg[key], dtype=torch.float32) for key in ("mean", "std"))
    return (images.contiguous().float() / 255 - mean[:, None, None]) / std[:, None, None]


# The shapes world

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 88, 210),
    "yellow": (250, 215, 30),
    "purple": (140, 60, 180),
    "orange": (250, 130, 20),
    "white": (255, 255, 255),
    "black": (15, 15, 15),
}
BACKGROUND = (128, 128, 128)
SIZES = {"small": 0.15, "large": 0.21}  # radius; the image is 1 wide and 1 high
POINTS = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5)) for i in range(10)]
ARM = 0.33  # half the width of a cross's arm
# Corners of each shape in a circle of radius 1, y downwards; circle and ring have none.
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "star": [(x, y) if i % 2 == 0 else (0.42 * x, 0.42 * y) for i, (x, y) in enumerate(POINTS)],
    "cross": [
        *((-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)),
        *((ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)),
    ],
    "ring": [],
    "heart": [
        *((0, 1), (-1, -0.1), (-0.95, -0.6), (-0.6, -0.9), (-0.2, -0.8)),
        *((0, -0.45), (0.2, -0.8), (0.6, -0.9), (0.95, -0.6), (1, -0.1)),
    ],
}


class Relation(NamedTuple):
    """Direction from the second thing to the first, and the place of each in the image."""

    dx: int
    dy: int
    converse: str
    here: str
    there: str


RELATIONS = {
    "left of": Relation(-1, 0, "right of", "on the left", "on the right"),
    "right of": Relation(1, 0, "left of", "on the right", "on the left"),
    "above": Relation(0, -1, "below", "at the top", "at the bottom"),
    "below": Relation(0, 1, "above", "at the bottom", "at the top"),
}
PLACES = {relation.here: relation for relation in RELATIONS.values()}


class Action(NamedTuple):
    """Its passive, and the actions that may replace it in a negative."""

    passive: str
    others: tuple[str, str]


# What covers a thing also touches it, so neither may replace the other in a negative.
ACTIONS = {
    "covering": Action("covered by", ("surrounding", "pointing at")),
    "touching": Action("touched by", ("surrounding", "pointing at")),
    "surrounding": Action("surrounded by", ("covering", "touching")),
    "pointing at": Action("pointed at by", ("covering", "touching")),
}
KINDS = {"place": 0.3, "relation": 0.55, "action": 0.15}  # kinds of scenes: probability
NOUN_PHRASE = re.compile(r"\ban? (?:(small|large) )?(\w+) (\w+)")
JITTER = 0.05  # of centres; too small to make a relation ambiguous
TEMPLATES = 3  # sentence templates for a claim
TRAIN_SCENES = 1_000_000  # one epoch of the shapes world


class Noun(NamedTuple):
    """A noun phrase, "a large red circle"; size is "" if it is not mentioned."""

    size: str
    colour: str
    shape: str


class Claim(NamedTuple):
    """The meaning of a caption: first, link, second; the link is a relation, action or place."""

    first: Noun
    link: str
    second: Noun | None


class Thing(NamedTuple):
    """An object in a scene: its look, and centre and radius in units of the image's width."""

    phrase: Noun
    x: float
    y: float
    radius: float


class Scene(NamedTuple):
    """Things in drawing order, the action of one on another ("" if none), and the true claim."""

    things: tuple[Thing, ...]
    action: str
    claim: Claim


def make_scene(split: str, seed: int, index: int) -> Scene:
    """Make the scene of (split, seed, index); it depends on nothing else.

    "train" and "test" share no combination of colours and shapes: a parity splits all combinations
    into two halves, and every hard negative stays in the half of its caption, so that a text-only
    model cannot recognise the true caption.
    """
    rng = random.Random(f"{split}:{seed}:{index}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    n = {"place": 1, "relation": rng.choice((2, 2, 2, 3)), "action": 2}[kind]
    colours, shapes = list(COLOURS), list(SHAPES)
    while True:
        looks = zip(rng.sample(colours, n), rng.sample(shapes, n), strict=True)
        phrases = [Noun(rng.choice(list(SIZES)), *look) for look in looks]
        said = phrases[:2]
        parity = sum(colours.index(p.colour) + shapes.index(p.shape) for p in said) % 2
        if parity == (split == "train"):
            break
    return {"place": _place, "relation": _relation, "action": _action}[kind](phrases, rng)


def _place(phrases: list[Noun], rng: random.Random) -> Scene:
    """One thing at a side of the image."""
    place = rng.choice(list(PLACES))
    thing = _thing(phrases[0], PLACES[place].dx, PLACES[place].dy, rng)
    return Scene((thing,), "", Claim(_said(phrases[0], rng), place, None))


def _relation(phrases: list[Noun], rng: random.Random) -> Scene:
    """Two things beside or above each other, sometimes with a third that is not mentioned."""
    link = rng.choice(list(RELATIONS))
    dx, dy = RELATIONS[link][:2]
    spots = [(dx, dy), (-dx, -dy), rng.choice(((dy, dx), (-dy, -dx)))]
    things = [_thing(p, *spot, rng) for p, spot in zip(phrases, spots, strict=False)]
    claim = Claim(_said(phrases[0], rng), link, _said(phrases[1], rng))
    return Scene(tuple(things), "", claim)


def _action(phrases: list[Noun], rng: random.Random) -> Scene:
    """The first thing acts on the second; the action sets their sizes, which are not mentioned."""
    action = rng.choice(list(ACTIONS))
    first, second = (phrase._replace(size="") for phrase in phrases)
    turn = rng.randrange(4) * math.pi / 2
    dx, dy = math.cos(turn), math.sin(turn)
    x, y = (0.5 + rng.uniform(-JITTER, JITTER) for _ in range(2))
    if action == "covering":
        things = [Thing(second, x, y, 0.26), Thing(first, x + 0.12 * dx, y + 0.12 * dy, 0.18)]
    elif action == "surrounding":
        around = [turn + i * math.pi / 3 for i in range(6)]
        things = [Thing(second, x, y, 0.17)]
        things += [
            Thing(first, x + 0.36 * math.cos(a), y + 0.36 * math.sin(a), 0.1) for a in around
        ]
    else:
        away, r = (0.19, 0.18) if action == "touching" else (0.29, 0.15)
        things = [
            Thing(first, x - away * dx, y - away * dy, r),
            Thing(second, x + away * dx, y + away * dy, r),
        ]
    return Scene(tuple(things), action, Claim(first, action, second))


def _thing(phrase: Noun, dx: int, dy: int, rng: random.Random) -> Thing:
    x, y = (0.5 + 0.26 * d + rng.uniform(-JITTER, JITTER) for d in (dx, dy))
    return Thing(phrase, x, y, SIZES[phrase.size])


def _said(phrase: Noun, rng: random.Random) -> Noun:
    return phrase if rng.random() < 0.15 else phrase._replace(size="")


def holds(scene: Scene, claim: Claim) -> bool:
    """Whether the claim is true of the scene as drawn."""

    def found(phrase: Noun) -> list[Thing]:
        same = [t for t in scene.things if t.phrase[1:] == phrase[1:]]
        return [t for t in same if phrase.size in ("", t.phrase.size)]

    if claim.link in ACTIONS:
        acts = {"covering", "touching"} if scene.action == "covering" else {scene.action}
        one, _, two = scene.claim
        pairs: list[tuple[Noun | None, Noun | None]] = [(one, two)]
        if claim.link == "touching":
            pairs.append((two, one))
        return claim.link in acts and (claim.first, claim.second) in pairs
    if claim.second is None:
        others = [(0.5, 0.5)]
        relation = PLACES[claim.link]
    else:
        others = [(t.x, t.y) for t in found(claim.second)]
        relation = RELATIONS[claim.link]
    dx, dy = relation.dx, relation.dy
    return any(
        (t.x - x) * dx + (t.y - y) * dy > 2 * JITTER for t in found(claim.first) for x, y in others
    )


def say(claim: Claim, template: int) -> str:
    """Express the claim as a sentence: directly (0), converse or passive (1), other form (2)."""
    first, link, second = claim
    a = _noun(first)
    if second is None:
        return (f"{a} {link}", f"{link} {a}", f"{a} is {link}")[template]
    b = _noun(second)
    if link in ACTIONS:
        return (f"{a} {link} {b}", f"{b} {ACTIONS[link].passive} {a}", f"{a} is {link} {b}")[
            template
        ]
    relation = RELATIONS[link]
    return (
        f"{a} {link} {b}",
        f"{b} {relation.converse} {a}",
        f"{a} {relation.here} and {b} {relation.there}",
    )[template]


def _noun(phrase: Noun) -> str:
    words = " ".join(word for word in phrase if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# Edits turn a scene's true claim into a false one, or return None if they do not apply.
def _swap_objects(scene: Scene, rng: random.Random) -> Claim | None:
    first, link, second = scene.claim
    if second is None or link == "touching":
        return None
    return Claim(second, link, first)


def _swap_colours(scene: Scene, rng: random.Random) -> Claim | None:
    first, link, second = scene.claim
    if second is None:
        return None
    one, two = first._replace(colour=second.colour), second._replace(colour=first.colour)
    return Claim(one, link, two)


def _replace_relation(scene: Scene, rng: random.Random) -> Claim | None:
    link = scene.claim.link
    if link in ACTIONS:
        return None
    table = PLACES if link in PLACES else RELATIONS
    return scene.claim._replace(link=rng.choice([name for name in table if name != link]))


def _replace_colour(scene: Scene, rng: random.Random) -> Claim | None:
    return _replace_word(scene, "colour", list(COLOURS), rng)


def _replace_shape(scene: Scene, rng: random.Random) -> Claim | None:
    return _replace_word(scene, "shape", list(SHAPES), rng)


def _replace_word(scene: Scene, field: str, words: list[str], rng: random.Random) -> Claim:
    """Another colour or shape for a thing: of the same half, and not in the scene."""
    which = rng.choice(("first", "second") if scene.claim.second else ("first",))
    phrase = getattr(scene.claim, which)
    half = words.index(getattr(phrase, field)) % 2
    seen = {getattr(thing.phrase, field) for thing in scene.things}
    new = rng.choice([word for word in words[half::2] if word not in seen])
    return scene.claim._replace(**{which: phrase._replace(**{field: new})})


def _replace_action(scene: Scene, rng: random.Random) -> Claim | None:
    if scene.claim.link not in ACTIONS:
        return None
    return scene.claim._replace(link=rng.choice(ACTIONS[scene.claim.link].others))


EDITS: dict[str, Callable[[Scene, random.Random], Claim | None]] = {
    "swap-object": _swap_objects,
    "swap-attribute": _swap_colours,
    "replace-relation": _replace_relation,
    "replace-attribute": _replace_colour,
    "replace-object": _replace_shape,
    "replace-action": _replace_action,
}
EDITS_OF_TYPE = {
    "relation": ("swap-object", "replace-relation"),
    "attribute": ("swap-attribute", "replace-attribute"),
    "object": ("replace-object",),
    "action": ("replace-action",),
}
SHAPES_NEGATIVES = ("both", "exchange", "replace", "lexicon")  # edits that make negatives


class Captions(NamedTuple):
    """A caption, another caption of the same image (t⁺) and a negative of each type, or None."""

    caption: str
    positive: str | None
    negatives: tuple[str | None, ...]


def caption_scene(scene: Scene, seed: int | str, kind: str = "both") -> Captions:
    """A caption of the scene, a paraphrase of it, and a hard negative of each type.

    Args:
        scene: the scene.
        seed: chooses the templates and edits.
        kind: one of SHAPES_NEGATIVES; "lexicon" makes negatives with negatives.py.
    """
    rng = random.Random(f"captions:{seed}")
    template, other = rng.sample(range(TEMPLATES), 2)
    caption, positive = say(scene.claim, template), say(scene.claim, other)
    if kind == "lexicon":
        made = make_negatives(caption, key=seed).values()
        return Captions(
            caption, positive, tuple(x if x and is_false(scene, x) else None for x in made)
        )
    negatives = []
    for name in NEGATIVE_TYPES:
        edits = [
            x
            for x in EDITS_OF_TYPE[name]
            if kind == "both" or x.startswith("swap") == (kind == "exchange")
        ]
        claims = [EDITS[edit](scene, rng) for edit in edits]
        options = [claim for claim in claims if claim is not None]
        negatives.append(say(rng.choice(options), template) if options else None)
    return Captions(caption, positive, tuple(negatives))


def is_false(scene: Scene, sentence: str) -> bool:
    """Whether a sentence is certainly false; False if its link is unknown."""
    phrases = [Noun(*words) for words in NOUN_PHRASE.findall(sentence)]
    pairs = itertools.permutations(phrases) if len(phrases) == 2 else [(x, None) for x in phrases]
    claims = [
        Claim(one, link, two)
        for one, two in pairs
        for link in (RELATIONS | ACTIONS if two else PLACES)
    ]
    meant = [c for c in claims if any(say(c, t) == sentence for t in range(TEMPLATES))]
    return bool(meant) and not any(holds(scene, claim) for claim in meant)


def draw_scene(scene: Scene, width: int) -> Image.Image:
    """Draw the scene as a square RGB image of `width` pixels."""
    image = Image.new("RGB", (width, width), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(pen, thing, width)
    if scene.action == "pointing at":
        _draw_arrow(pen, scene.things[0], scene.things[1], width)
    return image


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, width: int) -> None:
    colour, shape = COLOURS[thing.phrase.colour], thing.phrase.shape
    x, y, r = (v * width for v in thing[1:])
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=max(2, round(0.35 * r)))
    else:
        pen.polygon([(x + r * u, y + r * v) for u, v in SHAPES[shape]], fill=colour)


def _draw_arrow(pen: ImageDraw.ImageDraw, one: Thing, two: Thing, width: int) -> None:
    """An arrow from the first thing to the second, in the colour of the first."""
    length = math.hypot(two.x - one.x, two.y - one.y)
    dx, dy = (two.x - one.x) / length, (two.y - one.y) / length

    def point(start: Thing, along: float, aside: float) -> tuple[float, float]:
        return (start.x + along * dx - aside * dy) * width, (
            start.y + along * dy + aside * dx
        ) * width

    colour = COLOURS[one.phrase.colour]
    tip, back = -two.radius, -two.radius - 0.12
    shaft = [point(one, 0.6 * one.radius, 0), point(two, back, 0)]
    pen.line(shaft, fill=colour, width=max(1, width // 16))
    pen.polygon([point(two, tip, 0), point(two, back, 0.09), point(two, back, -0.09)], fill=colour)


# Data sets


class Example(NamedTuple):
    """One training example; `fault` names images skipped before it as unreadable."""

    image: Tensor  # [3, H, W] uint8
    captions: Captions
    fault: str
    state: Any = None  # of the shard reader, after this example


class ShapesDataset(Dataset[Example]):
    """The training scenes of the shapes world; indices are (epoch, index) pairs."""

    has_negatives = True
    types = NEGATIVE_TYPES
    made = frozenset(NEGATIVE_TYPES)
    image_of: np.ndarray | None = None  # each image has one caption

    def __init__(self, size: tuple[int, int], seed: int, kind: str = "both") -> None:
        """Draw images of `size` (height, width) in pixels; `kind` is one of SHAPES_NEGATIVES."""
        self.size, self.seed, self.kind = size, seed, kind

    def __len__(self) -> int:
        """Count the scenes of an epoch."""
        return TRAIN_SCENES

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """Draw and caption the scene of (epoch, index); each epoch draws other captions."""
        epoch, index = key
        scene = make_scene("train", self.seed, index)
        captions = caption_scene(scene, f"{self.seed}:{epoch}:{index}", self.kind)
        image = draw_scene(scene, max(self.size))
        square = self.size[0] == self.size[1]
        image = image if square else image.resize(self.size[::-1], Image.Resampling.BICUBIC)
        return Example(pil_to_tensor(image), captions, "")


class ManifestDataset(Dataset[Example]):
    """Images and captions of a manifest; indices are (epoch, index) pairs.

    All random choices (the crop, which other caption of the image is t⁺, which negative of a list)
    depend only on (seed, epoch, index), so they do not change with workers or resuming. Lines stay
    on disk: memory holds a caption's byte offset and image number, 16 to 24 bytes.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path,
        transform: Transform,
        seed: int = 0,
        on_bad_image: str = "stop",
        types: Sequence[str] = (),
    ) -> None:
        """Index the manifest at `path`, with images in the folder `images`.

        `types` are the types of negatives to read, () for all that the manifest names. A bad image
        is a DataError ("stop") or replaced by the next example ("skip"). A DataError here if a line
        is malformed or images are missing (with "skip": all images).
        """
        self.path, self.images, self.transform = Path(path), Path(images), transform
        self.seed, self.on_bad_image = seed, on_bad_image
        self.types, self.made = tuple(types), set[str]()  # made: types that some caption has
        offsets, hashes = array("q"), array("q")
        seen, photos, missing = set[int](), set[int](), list[str]()
        for offset, record in read_records(self.path, types, need_image=True):
            image = str(_encodable(record, f"{path}, byte {offset}").image)
            digest = hashlib.blake2b(image.encode(), digest_size=8).digest()
            hashes.append(int.from_bytes(digest, "little", signed=True))
            offsets.append(offset)
            if hashes[-1] not in seen:
                seen.add(hashes[-1])
                photos.add(photo_number(image, record.image_id))
                if not os.path.isfile(self.images / image):
                    missing.append(image)
            self.types = tuple(record.negatives)  # a header further down may name more
            self.made.update(name for name, given in record.negatives.items() if given)
        if not offsets:
            raise DataError(f"{path}: holds no captions; make it with negatives.py")
        if missing and (on_bad_image == "stop" or len(missing) == len(seen)):
            raise DataError(
                f"--images {images}: {len(missing)} of {len(seen)} images of {path} "
                f"are missing, the first is {missing[0]}; point --images at their folder"
                + (" or pass --on-bad-image skip" if len(missing) < len(seen) else "")
            )
        self.has_negatives = bool(self.made)
        self.offsets, self.photos = np.array(offsets), np.array(sorted(photos))
        numbers = np.unique(np.array(hashes), return_inverse=True)[1]
        self.image_of: np.ndarray = numbers.astype(np.int32)  # image number of each caption
        self.by_image = np.argsort(self.image_of, kind="stable").astype(np.int32)
        self.first = np.searchsorted(self.image_of[self.by_image], np.arange(len(seen) + 1))

    def __len__(self) -> int:
        """Count the captions."""
        return len(self.offsets)

    def record(self, index: int) -> Record:
        """Read the line of a caption."""
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            place = f"{self.path}, byte {self.offsets[index]}"
            return parse_record(file.readline(), place, self.types, some=True, need_image=True)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """Load the example (epoch, index), or with "skip" the next readable one."""
        epoch, index = key
        faults = []
        for step in range(len(self)):
            i = (index + step) % len(self)
            record, rng = self.record(i), random.Random(f"{self.seed}:{epoch}:{i}")
            use = functools.partial(self.transform, rng=rng)
            try:
                image = open_image(self.images / str(record.image), use=use)
            except DataError as error:
                if self.on_bad_image == "stop":
                    raise
                faults.append(str(error))
                continue
            number = self.image_of[i]
            others = self.by_image[self.first[number] : self.first[number + 1]].tolist()
            rng.shuffle(others)
            texts = (self.record(other).caption for other in others if other != i)
            positive = next((text for text in texts if text != record.caption), None)
            captions = Captions(record.caption, positive, draw_negatives(record, rng))
            return Example(image, captions, "; ".join(faults))
        raise DataError(f"--images {self.images}: no image could be read; {faults[0]}")


class Mixture(Dataset[Example]):
    """Several sources, each with a share of every batch; keys are (source, epoch, index).

    `types` are the types of all sources in order; a source has None for types it lacks.
    """

    def __init__(
        self,
        sources: Sequence[ShapesDataset | ManifestDataset],
        weights: Sequence[float],
        batch: int,
        seed: int,
        one_caption: bool,
    ) -> None:
        """Give each source a share of the global batch, by weight; each has its own epochs.

        With `one_caption`, no batch has two captions of an image. A DataError if a source is too
        small for its share, or its share is less than one example.
        """
        self.sources, self.seed = sources, seed
        self.types = tuple(dict.fromkeys(name for source in sources for name in source.types))
        self.shares = share_batch(batch, weights)
        self.image_of = [source.image_of if one_caption else None for source in sources]
        self.steps = []  # of each source's epoch
        for s, (source, share) in enumerate(zip(sources, self.shares, strict=True)):
            name, images = getattr(source, "path", "the shapes world"), self.image_of[s]
            if not share:
                raise DataError(f"--data {name}: its weight is less than one example of a batch")
            self.steps.append(len(self._order(s, 0)))
            if not self.steps[s]:
                what = "captions" if images is None else "images"
                count = len(source) if images is None else images.max() + 1
                raise DataError(
                    f"--batch-size {batch}: takes {share} {what} of {name}, which has {count}; "
                    "use a smaller batch"
                )

    def _order(self, s: int, epoch: int) -> np.ndarray:
        size, images = len(self.sources[s]), self.image_of[s]
        return epoch_batches(size, images, self.shares[s], self.seed, epoch, s)

    def batches(self, start: int, stop: int) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the keys of the global batches of steps start to stop."""
        at: list[tuple[int, np.ndarray]] = [(-1, np.empty(0))] * len(self.sources)
        for step in range(start, stop):
            keys = []
            for s, steps in enumerate(self.steps):
                if step // steps != at[s][0]:
                    at[s] = step // steps, self._order(s, step // steps)
                epoch, order = at[s]
                keys += [(s, epoch, i) for i in order[step % steps].tolist()]
            yield keys

    def __len__(self) -> int:
        """Count the captions of all sources."""
        return sum(len(source) for source in self.sources)

    def __getitem__(self, key: tuple[int, int, int]) -> Example:
        """Load the example (source, epoch, index)."""
        source = self.sources[key[0]]
        example = source[key[1:]]
        own = dict(zip(source.types, example.captions.negatives, strict=True))
        negatives = tuple(own.get(name) for name in self.types)
        return example._replace(captions=example.captions._replace(negatives=negatives))


def share_batch(batch: int, weights: Sequence[float]) -> list[int]:
    """Divide a batch by weights (largest-remainder method)."""
    exact = [batch * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    for i in sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])[: batch - sum(parts)]:
        parts[i] += 1
    return parts


def epoch_batches(
    size: int, image_of: np.ndarray | None, batch: int, seed: int, epoch: int, source: int = 0
) -> np.ndarray:
    """Order one epoch of a source: indices [steps, batch], a permutation of (seed, epoch, source).

    With `image_of`, the number of each caption's image, no batch has two captions of an image: an
    epoch is a series of rounds, and round r takes the r-th caption, in the shuffled order, of every
    image that has r or more. An incomplete batch at the end of a round is dropped for this epoch;
    the next epoch shuffles again. The number of steps is the same in every epoch.
    """
    key = (seed, epoch, source) if source else (seed, epoch)
    generator = torch.Generator().manual_seed(hash(key) % 2**63)
    order, counts = torch.randperm(size, generator=generator).numpy(), np.array([size])
    if image_of is not None:
        images = image_of[order]
        grouped = np.argsort(images, kind="stable")
        place, turn = np.arange(size), np.empty(size, dtype=np.int64)  # turn: each one's round
        new = np.diff(images[grouped], prepend=-1) != 0
        turn[grouped] = place - np.maximum.accumulate(np.where(new, place, 0))
        order, counts = order[np.argsort(turn, kind="stable")], np.bincount(turn)
    starts = np.cumsum(counts) - counts
    rounds = [order[a : a + n // batch * batch] for a, n in zip(starts, counts, strict=True)]
    return np.concatenate(rounds).reshape(-1, batch)


BLOCK = 1000  # examples that a shard reader shuffles at once, rounded up to whole batches
SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
Cursor = tuple[int, int, int]  # pass, shard in its order, sample of the shard


class _Sample(NamedTuple):
    begin: Cursor
    key: str  # of its image
    place: str  # in messages
    parts: dict[str, bytes]
    has_negatives: bool


class ShardStream(IterableDataset[list[Example]]):
    """Endless batches of webdataset shards, pass after pass, without two captions of an image.

    Each worker of each rank is a reader. It reads its own shards, or, with fewer shards than
    readers, the images that a hash assigns to it, in an order given by (seed, pass); it shuffles
    blocks of about 1,000, each within one pass. Every batch carries the reader's state: where the
    current block began, and how many samples each batch took since. A resumed run continues from
    there with the same batches.
    """

    def __init__(
        self,
        shards: str,
        transform: Transform,
        seed: int,
        place: tuple[int, int, int],
        on_bad_image: str = "stop",
        types: Sequence[str] = (),
        *,
        batch: int = 1,
        states: Mapping[int, Any] | None = None,
        needs_negatives: bool = False,
        remote: bool = False,
    ) -> None:
        """Read the shards of a brace pattern, "cc3m-{000..331}.tar".

        `place` is the first step, this rank, and the number of ranks; `types` as in
        ManifestDataset, but () for those that the first sample names; `batch` the examples in a
        batch of this rank; `states` the reader states of a resumed run. `remote` opens names with a
        colon by webdataset: URLs, and "pipe:", which runs a command. A DataError if a shard is
        missing, or a name has a colon without `remote`.
        """
        self.pattern, self.shards = f"--data {shards}", expand_braces(shards)
        for name in self.shards:
            if ":" in name and not remote:
                raise DataError(
                    f"--data {name}: --remote allows URLs, and pipe:, which runs a command; local "
                    "shards take no weight and no colon"
                )
            if ":" not in name and not os.path.isfile(name):
                raise DataError(f"--data {name}: no such shard; check the pattern")
        self.transform, self.seed, self.place = transform, seed, place
        self.on_bad_image, self.some = on_bad_image, bool(types)
        self.batch, self.states, self.needs_negatives = batch, states or {}, needs_negatives
        self.types = tuple(types)
        local = [name for name in self.shards if os.path.exists(name)]
        with contextlib.suppress(DataError):  # raised where it is used
            for stem, parts in read_samples(local[0]) if local and not types else ():
                at = f"{local[0]}: {stem}"
                self.types = header_types(sample_row(stem, parts, at), at)
                break
        self.types = self.types or NEGATIVE_TYPES

    def __iter__(self) -> Iterator[list[Example]]:
        """Yield this reader's batches."""
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        start, rank, ranks = self.place
        slots = ranks * workers
        slot = rank * workers + (number + start) % workers  # the loader asks worker 0 first
        _, anchor, takes = self.states.get(slot, (slots, (0, 0, 0), ()))
        keys: set[str] = set()  # images of the current batch
        picks = self._picks(slot, slots, anchor, keys)
        for take in takes:
            keys.clear()
            keys.update(sample.key for sample, _ in itertools.islice(picks, take))
        alive = None  # the last pass with a usable example
        while True:
            keys.clear()
            examples: list[Example] = []
            faults, take = [""], 0
            while len(examples) < self.batch:
                try:
                    sample, after = next(picks)
                except DataError as error:
                    raise DataError(f"{error}; {faults[-1]}".rstrip("; ")) from None
                turn, take = sample.begin[0], take + 1
                alive = turn - 1 if alive is None else alive
                if turn > alive + 1:
                    raise DataError(
                        f"{self.pattern}: no example of a whole pass can be used; {faults[-1]}"
                    )
                keys.add(sample.key)
                try:
                    examples.append(self._make(sample))
                    alive = turn
                except DataError as error:
                    if self.on_bad_image == "stop":
                        raise
                    faults.append(str(error))
            anchor, takes = (after, ()) if after else (anchor, (*takes, take))
            state = (slot, (slots, anchor, takes))
            examples[-1] = examples[-1]._replace(fault="; ".join(faults[1:]), state=state)
            yield examples

    def _picks(
        self, slot: int, slots: int, anchor: Cursor, keys: set[str]
    ) -> Iterator[tuple[_Sample, Cursor | None]]:
        """Samples whose keys are not in `keys`; a block's last one has the next block's start."""
        for was, *_ in self.states.values():
            if was != slots:
                raise DataError(
                    f"{self.pattern}: the run began with {was} readers (ranks x workers), "
                    f"now there are {slots}; give --workers as before"
                )
        samples = self._samples(slot, slots, anchor)
        ahead = next(samples)
        while True:
            block: list[_Sample] = []
            begin, size = ahead.begin, -(-BLOCK // self.batch) * self.batch - len(keys)
            while len(block) < size and ahead.begin[0] == begin[0]:
                block.append(ahead)
                ahead = next(samples)
            if self.needs_negatives and not any(sample.has_negatives for sample in block):
                raise DataError(
                    f"{self.pattern}: the first {len(block)} examples hold no negatives; "
                    "make them with negatives.py, or use --recipe clip"
                )
            self.needs_negatives = False
            random.Random(f"{self.seed}:{slot}:{begin}").shuffle(block)
            left = Counter(sample.key for sample in block)  # images with many captions go first
            while block:
                free = (i for i, sample in enumerate(block) if sample.key not in keys)
                i = max(free, key=lambda i: left[block[i].key], default=None)
                if i is not None:
                    left[block[i].key] -= 1
                    yield block.pop(i), None if block else ahead.begin
                elif ahead.begin[0] > begin[0] + 1:
                    raise DataError(
                        f"{self.pattern}: a reader's {len(keys)} images cannot fill a batch of "
                        f"{self.batch}; use a smaller batch, fewer --workers or more shards"
                    )
                else:  # the batch has all these images already: read on
                    block.append(ahead)
                    left[ahead.key] += 1
                    ahead = next(samples)

    def _samples(self, slot: int, slots: int, begin: Cursor) -> Iterator[_Sample]:
        first, at, skip = begin
        few = slots > len(self.shards)
        for turn in itertools.count(first):
            order, found = list(self.shards), bool(at or skip)
            random.Random(f"{self.seed}:{turn}").shuffle(order)
            for number, shard in enumerate(order if few else order[slot::slots]):
                for index, (stem, parts) in enumerate(self._read(shard) if number >= at else ()):
                    if number == at and index < skip:
                        continue
                    key, place, made = stem, f"{shard}: {stem}", None
                    with contextlib.suppress(DataError):  # raised where it is used
                        row = sample_row(stem, parts, place)
                        key, made = str(row.get("image") or stem), row.get("negatives")
                    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8)
                    if not few or int(digest.hexdigest(), 16) % slots == slot:
                        found = True
                        some = isinstance(made, dict) and any(made.values())
                        yield _Sample((turn, number, index), key, place, parts, some)
            if not found:
                raise DataError(
                    f"{self.pattern}: holds no example for reader {slot + 1} of {slots}; "
                    "check the shards, or use fewer --workers"
                )
            at = skip = 0

    def _read(self, shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        if ":" not in shard:
            return read_samples(shard)
        try:
            reader: Any = importlib.import_module("webdataset")
            return read_samples(shard, reader.gopen(shard, bufsize=2**20))
        except ImportError:
            raise DataError("--remote needs webdataset: pip install webdataset") from None
        except (OSError, ValueError) as error:
            raise DataError(f"--data {shard}: cannot be read ({error})") from None

    def _make(self, sample: _Sample) -> Example:
        stem = sample.place.rpartition(": ")[2]
        row = sample_row(stem, sample.parts, sample.place)
        row["image"] = row.get("image") or stem
        record = parse_record(row, sample.place, self.types, some=self.some, need_image=True)
        _encodable(record, sample.place)
        kind = next((kind for kind in SHARD_IMAGES if kind in sample.parts), None)
        if kind is None:
            raise DataError(f"{sample.place}: has none of .{', .'.join(SHARD_IMAGES)}")
        rng = random.Random(f"{self.seed}:{sample.begin[0]}:{sample.place}")
        use = functools.partial(self.transform, rng=rng)
        image = open_image(io.BytesIO(sample.parts[kind]), sample.place, use)
        return Example(image, Captions(record.caption, None, draw_negatives(record, rng)), "")


def expand_braces(pattern: str) -> list[str]:
    """Expand "a-{000..331}.tar" and "{a,b}.tar" to names; a DataError if malformed."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise DataError(f"--data {pattern}: its braces do not match; check the pattern")
        return [pattern]
    names = found[1].split(",")
    span = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", found[1])
    if span:
        if not 0 <= int(span[2]) - int(span[1]) < 10**6:
            raise DataError(f"--data {pattern}: {found[0]} is no range; write {{000..331}}")
        names = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for one in names for name in expand_braces(before + one + after)]


# Batches

MISSING = "###"  # the released code's placeholder for a missing negative, which it encodes


class Batch(NamedTuple):
    """B images and their texts: B captions, then the positives, then the encoded negatives."""

    images: Tensor  # [B, 3, H, W] uint8
    texts: PackedText
    positive_valid: Tensor  # [B] bool, which captions have a positive
    valid: Tensor  # [B, K] bool, which negatives exist
    faults: list[str]
    same: int = 0  # negatives left out because they have the tokens of their caption
    state: Any = None  # of the shard reader that made it


class Collate:
    """Makes Batches of Examples; a class, so that workers can pickle it."""

    def __init__(
        self,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        positives: bool,
        negatives: str,
        part: int = 0,
    ) -> None:
        """Tokenise by an open_clip tokenizer, into Batches of `part` images (0: a single Batch).

        `positives` says whether the loss reads t⁺; `negatives` is "none", "valid", or "all", with
        "###" for missing ones, as released.
        """
        self.tokenizer, self.positives, self.negatives = tokenizer, positives, negatives
        self.part = part

    def __call__(self, examples: list[Example]) -> list[Batch]:
        """Cut the examples into parts and pack the texts of each together."""
        part = self.part or len(examples)
        return [self._batch(examples[i : i + part]) for i in range(0, len(examples), part)]

    def bundle(self, examples: list[Example]) -> Bundle:
        """Pack the parts into two tensors, since each tensor costs a worker a file descriptor."""
        parts = self(examples)
        rest = [(*part.texts, part.positive_valid, part.valid) for part in parts]
        return Bundle(
            torch.cat([part.images.movedim(1, -1) for part in parts]),
            torch.cat([tensor.flatten().to(torch.int64) for row in rest for tensor in row]),
            [[list(tensor.shape) for tensor in row] for row in rest],
            [part[4:] for part in parts],
        )

    def _batch(self, examples: list[Example]) -> Batch:
        captions = [example.captions for example in examples]
        positives = [c.positive if self.positives else None for c in captions]
        valid = torch.tensor([[text is not None for text in c.negatives] for c in captions])
        valid &= self.negatives != "none"
        slots = (valid | (self.negatives == "all")).nonzero()
        texts = [c.caption for c in captions] + [text for text in positives if text is not None]
        begin = len(texts)
        texts += [captions[i].negatives[k] or MISSING for i, k in slots.tolist()]
        tokens = self.tokenizer(texts)  # [M, C]
        keep = torch.ones(len(texts), dtype=torch.bool)
        if self.negatives == "valid":
            # Edits of case or spaces only, or beyond the context, leave the caption's tokens.
            differs = (tokens[begin:] != tokens[slots[:, 0]]).any(dim=1)
            keep[begin:] = valid[tuple(slots.T)] = differs
        # Stacked channels-last, as the images lie in memory: avoids a copy.
        images = torch.stack([example.image.movedim(0, -1) for example in examples])
        return Batch(
            images.movedim(-1, 1),
            pack_tokens(tokens[keep], hasattr(self.tokenizer, "eot_token_id")),
            torch.tensor([text is not None for text in positives]),
            valid,
            [example.fault for example in examples if example.fault],
            int((~keep).sum()),
            examples[-1].state,
        )


class Bundle(NamedTuple):
    """Batches as a worker sends them: all images, and everything else as one tensor."""

    images: Tensor  # [B, H, W, 3] uint8
    rest: Tensor  # int64
    shapes: list[list[list[int]]]  # of each batch's other tensors
    notes: list[tuple[Any, ...]]  # the other fields of each batch


def unbundle(bundle: Bundle) -> list[Batch]:
    """The batches that a bundle was made of, as views of it."""
    flat = iter(bundle.rest.split([math.prod(shape) for row in bundle.shapes for shape in row]))
    images, batches = bundle.images.movedim(-1, 1), []
    for shapes, notes in zip(bundle.shapes, bundle.notes, strict=True):
        *texts, has, valid = (next(flat).view(shape) for shape in shapes)
        part, images = images[: len(has)], images[len(has) :]
        batches.append(Batch(part, PackedText(*texts), has.bool(), valid.bool(), *notes))
    return batches


def split_features(features: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Split [M, D] text features of a batch into captions, positives and negatives.

    Returns [B, D], [B, D] and [B, K, D]; zero where there is none.
    """
    (b, k), has = batch.valid.shape, batch.positive_valid.nonzero()[:, 0]
    captions, found, edited = features.split([b, len(has), len(features) - b - len(has)])
    every = len(edited) == b * k  # `Collate` encodes placeholders too
    made = torch.arange(b * k) if every else batch.valid.flatten().nonzero()[:, 0]
    has, made = has.to(features.device), made.to(features.device)
    positives = torch.zeros_like(captions).index_copy(0, has, found)
    negatives = features.new_zeros(b * k, features.shape[1]).index_copy(0, made, edited)
    return captions, positives, negatives.view(b, k, -1)


# Packed captions and towers

ROW_CONTEXTS = 2  # a packed row is at most this many contexts wide


class PackedText(NamedTuple):
    """M tokenised captions in R rows of prefix trees: shared prefixes are stored once.

    In a causal tower a token's state depends only on the tokens before it, so captions share the
    states of a common prefix. A row holds its captions sorted by tokens; token j is attended to by
    itself and by the tokens after it, up to stops[j]. If the tokenizer is not CLIP's, captions stay
    one to a row and the other tensors are empty.
    """

    tokens: Tensor  # [R, L] int64
    positions: Tensor  # [R, L] int64, in the caption
    stops: Tensor  # [R, L] int64, where in the row the captions with this token end; 0 is padding
    reads: Tensor  # [R, E] int64, positions of the E end-of-texts in the row; padded with 0
    where: Tensor  # [M] int64, which of the R·E ends is the caption's; equal captions share one

    def to(self, device: torch.device) -> PackedText:
        """Move all tensors."""
        return PackedText(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def computed(self) -> int:
        """How many tokens the text tower computes."""
        return int((self.stops > 0).sum()) if self.stops.numel() else self.tokens.numel()


def pack_texts(
    texts: Sequence[str], tokenizer: Callable[[list[str]], Tensor], *, share: bool = True
) -> PackedText:
    """Tokenise M captions by an open_clip tokenizer, which cuts at the context, and pack them."""
    return pack_tokens(tokenizer(list(texts)), hasattr(tokenizer, "eot_token_id"), share=share)


def pack_tokens(padded: Tensor, clip: bool, *, share: bool = True) -> PackedText:
    """Pack what a tokenizer returned, [M, context length], into few rows.

    `clip` says whether it is CLIP's (has eot_token_id), else nothing is packed; `share=False` packs
    distinct captions without sharing prefixes.
    """
    empty = padded.new_zeros(0)
    if not clip:
        return PackedText(padded, empty, empty, empty, empty)
    context, ends = padded.shape[1], padded.argmax(dim=1, keepdim=True)  # end-of-text is largest
    padded = padded.where(torch.arange(context) <= ends, 0)
    distinct, which = padded.unique(dim=0, return_inverse=True)  # in order
    lengths = (distinct.argmax(dim=1) + 1).tolist()
    alike = (distinct[1:] == distinct[:-1]).cumprod(dim=1).sum(dim=1) * share
    common = [0, *alike.tolist()]  # tokens that a caption shares with the one before

    def fill(width: int) -> list[list[tuple[int, int]]]:
        """Rows of (caption, number of its tokens that are in the row already)."""
        rows: list[list[tuple[int, int]]] = []
        space = 0
        for i, (keep, length) in enumerate(zip(common, lengths, strict=False)):
            if not rows or length - keep > space:
                rows.append([])
                space, keep = width, 0
            rows[-1].append((i, keep))
            space -= length - keep
        return rows

    most, least = ROW_CONTEXTS * context, -(-max(lengths, default=1) // 8) * 8
    count = len(fill(most))  # attention kernels like widths that are multiples of 8
    width = next((w for w in range(least, most, 8) if len(fill(w)) == count), most)
    rows = fill(width)
    tokens, positions, stops = np.zeros((3, len(rows), width), dtype=np.int64)
    reads = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int64)
    slots, sequences = np.zeros(len(lengths), dtype=np.int64), distinct.numpy()
    for r, row in enumerate(rows):
        at = 0
        path: list[int] = []  # positions of the current caption's tokens in the row
        for e, (i, keep) in enumerate(row):
            stops[r, path[keep:]] = at
            path[keep:] = range(at, at + lengths[i] - keep)
            tokens[r, path[keep:]] = sequences[i, keep : lengths[i]]
            positions[r, path[keep:]] = range(keep, lengths[i])
            at += lengths[i] - keep
            reads[r, e], slots[i] = path[-1], r * reads.shape[1] + e
        stops[r, path] = at
    parts = (torch.from_numpy(x) for x in (tokens, positions, stops, reads, slots[which.numpy()]))
    return PackedText(*parts)


def unpack_texts(packed: PackedText, model: Any) -> Tensor:
    """Unpack to one caption a row [M, C], padded with 0 to the model's context length C."""
    context = getattr(model, "context_length", None) or model.text.context_length
    ends = packed.tokens.new_zeros(*packed.reads.shape, context)  # [R, E, C]
    r, e, j = _seen(packed.stops, packed.reads).nonzero().unbind(dim=1)
    ends[r, e, packed.positions[r, j]] = packed.tokens[r, j]
    return ends.flatten(0, 1)[packed.where]


def can_pack(model: Any) -> bool:
    """Whether the text tower is OpenAI's: causal, plain blocks, pooled at the end-of-text."""
    tower = getattr(model, "text", model)
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "attn_mask")
    if not all(getattr(tower, part, None) is not None for part in parts):
        return False
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
    end = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    largest = tower.token_embedding.weight.shape[0] - 1
    reads_end = pool == "argmax" or (pool == "eos" and end == largest)
    whole = hasattr(tower, "text_projection") and getattr(tower, "cls_emb", None) is None
    return reads_end and whole and _has_plain_blocks(tower.transformer)


def _has_plain_blocks(transformer: Any) -> bool:
    """Whether `_run_block` supports all blocks."""
    return all(
        type(block).__name__ == "ResidualAttentionBlock"
        and isinstance(block.attn, nn.MultiheadAttention)
        and block.attn.in_proj_weight is not None
        and not block.attn.dropout
        and not hasattr(block, "ln_1_kv")
        for block in getattr(transformer, "resblocks", [None])
    )


def _pad_token(model: Any) -> int | None:
    """The padding token that a Hugging Face tower masks itself, or None."""
    return getattr(getattr(getattr(model, "text", None), "config", None), "pad_token_id", None)


def text_layout(model: Any) -> str:
    """Describe how `encode_text` lays out captions for this model."""
    if can_pack(model):
        return "packed as prefix trees"
    trims = _pad_token(model) is not None
    return "one to a row, cut to the longest" if trims else "one to a row at full length"


def encode_text(model: Any, packed: PackedText) -> Tensor:
    """Encode packed captions to [M, D]: not normalised, equal to `model.encode_text`.

    A tower that is not OpenAI's gets its captions one to a row: cut to the longest where it masks
    padding itself (Hugging Face's), else at full length.
    """
    if not len(packed.where):
        pad, longest = _pad_token(model), packed.tokens.shape[1]
        if pad is not None:
            longest = int((packed.tokens != pad).any(dim=0).nonzero().max()) + 1
        return model.encode_text(packed.tokens[:, :longest])
    if not can_pack(model):
        return model.encode_text(unpack_texts(packed, model))
    tower = getattr(model, "text", model)
    # F.embedding and index_select, not x[i], whose gradient threads sum in any order.
    x = tower.token_embedding(packed.tokens)
    x = x + F.embedding(packed.positions, tower.positional_embedding)
    x = x.to(tower.transformer.get_cast_dtype())  # [R, L, width]
    every = torch.arange(x.shape[1], device=x.device).expand(packed.stops.shape)
    x = _run_blocks(tower.transformer, x, packed.reads, _seen(packed.stops, every))  # [R, E, width]
    x = tower.ln_final(x.flatten(0, 1).index_select(0, packed.where))  # [M, width]
    project = tower.text_projection
    if project is None:
        return x
    return project(x) if isinstance(project, nn.Module) else x @ project


def _seen(stops: Tensor, rows: Tensor) -> Tensor:
    """Attention mask [R, N, L] of the tokens at `rows` [R, N]: themselves and their prefix."""
    keys = torch.arange(stops.shape[1], device=stops.device)
    before = (keys <= rows[..., None]) & (rows[..., None] < stops[:, None])
    return before | (keys == rows[..., None])


def encode_image(model: Any, images: Tensor) -> Tensor:
    """Encode images to [B, D]: not normalised, equal to `model.encode_image`.

    In a plain ViT pooled at its class token, the last block computes only that token.
    """
    tower = model.visual
    known = type(tower).__name__ == "VisionTransformer" and hasattr(tower, "_embeds")
    if not (known and tower.pool_type == "tok" and tower.attn_pool is None):
        return model.encode_image(images.contiguous(memory_format=torch.channels_last))
    if tower.output_tokens or not _has_plain_blocks(tower.transformer):
        return model.encode_image(images)
    x = tower._embeds(images)  # [B, patches + 1, width]
    first = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    x = tower.ln_post(_run_blocks(tower.transformer, x, first, None)[:, 0])
    return x if tower.proj is None else x @ tower.proj


def _run_blocks(transformer: Any, x: Tensor, reads: Tensor, seen: Tensor | None) -> Tensor:
    """Run open_clip's plain blocks on [R, L, width]; returns only the tokens at `reads` [R, E].

    `seen` [R, L, L] says which tokens each one attends to; None is all.
    """
    *blocks, last = transformer.resblocks
    mask = None if seen is None else seen[:, None]  # [R, 1, L, L], for all heads
    for block in blocks:
        run: Callable[..., Tensor] = _run_block
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            checkpoint = torch.utils.checkpoint.checkpoint
            run = functools.partial(checkpoint, _run_block, use_reentrant=False)
        x = run(block, x, None, mask)
    if mask is not None:
        mask = mask.take_along_dim(reads[:, None, :, None], dim=2)  # [R, 1, E, L]
    return _run_block(last, x, reads, mask)


def _run_block(block: Any, x: Tensor, reads: Tensor | None, mask: Tensor | None) -> Tensor:
    """One block of open_clip's transformer, for all tokens or for those at `reads` [R, E]."""
    attn = block.attn
    normed = block.ln_1(x)
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if reads is None:
        q, k, v = F.linear(normed, weight, bias).chunk(3, dim=-1)
    else:
        index, width = reads[..., None], x.shape[-1]
        x, wanted = x.take_along_dim(index, dim=1), normed.take_along_dim(index, dim=1)
        q = F.linear(wanted, weight[:width], bias[:width])
        k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [R, heads, N, width / heads]
    x = x + block.ls_1(attn.out_proj(mixed.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


# Overlap with test images


def photo_number(image: str, image_id: int | str | None = None) -> int:
    """A number for a photo that is the same in every data set that contains it: a 63-bit hash.

    COCO's photos have the same id in both releases. Visual Genome's and Visual7W's use their file
    name, or COCO's id if a manifest gives it as image_id "coco ID" (data.py vg does).
    """
    coco = re.search(r"(?:^|/|COCO_(?:train|val)2014_)(\d{12})\.\w+$", image)
    name = f"coco {int(coco[1])}" if coco else image.rsplit("/", 1)[-1].removeprefix("v7w_")
    if isinstance(image_id, str) and image_id.startswith("coco "):
        name = image_id
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


@functools.cache
def test_photos() -> dict[str, list[int]]:
    """The test images that the kit knows: by suite, their `photo_number`s.

    scripts/test_images.json holds COCO's ids: differences of neighbours as little-endian 32-bit
    numbers, zlib, base64.
    """
    tables = json.loads((Path(__file__).parent / "scripts" / "test_images.json").read_text())
    ids = {
        suite: np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(packed)), "<u4"))
        for suite, packed in tables.items()
    }
    return {suite: [photo_number(f"{n:012d}.jpg") for n in x.tolist()] for suite, x in ids.items()}


def find_overlap(photos: np.ndarray) -> list[str]:
    """Describe how many photos, by `photo_number`, are test images of each suite."""
    found = []
    for suite, tested in test_photos().items():
        count = int(np.isin(tested, photos).sum())
        found += [f"{count} of {len(tested)} test images of {suite}"] if count else []
    return found or ["no test image that the kit knows"]


# Converters


def csv_records(args: argparse.Namespace) -> Iterator[Record]:
    """Captions of a table."""
    names = {"image_column": args.image_column, "caption_column": args.caption_column}
    return read_captions(args.captions, **names, negatives=args.negative)


def karpathy_records(args: argparse.Namespace) -> Iterator[Record]:
    """Captions of --splits of a Karpathy json; a plain list, of one split, is taken whole."""
    content = json.loads(args.captions.read_text(encoding="utf-8"))
    if isinstance(content, list):
        yield from read_captions(args.captions)
        return
    known = sorted({image["split"] for image in content["images"]})
    for split in args.splits or ():
        if split not in known:
            raise DataError(f"--splits {split}: {args.captions} has {', '.join(known)}")
    for image in content["images"]:
        name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
        number = image.get("cocoid", image.get("imgid"))
        if image["split"] in (args.splits or ("train", "restval")):
            yield from (Record(name, number, said["raw"], {}) for said in image["sentences"])


def vg_records(args: argparse.Namespace) -> Iterator[Record]:
    """Region descriptions of Visual Genome.

    A photo that is also in COCO gets image_id "coco ID"; COCO's test images are left out.
    """
    tested = {n for suite in test_photos().values() for n in suite}
    files = ("image_data.json", "region_descriptions.json")
    about, regions = (json.loads((args.captions / x).read_text(encoding="utf-8")) for x in files)
    names = {x["image_id"]: f"{x['url'].split('/')[-2]}/{x['image_id']}.jpg" for x in about}
    coco = {image["image_id"]: image.get("coco_id") for image in about}
    for image in regions:
        number = image["id"]
        known = f"coco {coco[number]}" if coco[number] else number
        if photo_number(names[number], known) not in tested:
            for region in image["regions"]:
                yield Record(names[number], known, region["phrase"], {})


def folder_records(args: argparse.Namespace) -> Iterator[Record]:
    """Every image below a folder with the caption in the .txt beside it, as img2dataset writes."""
    for path in sorted(args.captions.rglob("*.txt")):
        image = path.with_suffix(".jpg")
        if image.is_file():
            name = image.relative_to(args.captions).as_posix()
            caption = path.read_text(encoding="utf-8", errors="replace").strip()
            yield Record(name, name, caption, {})


CONVERTERS: dict[str, Callable[[argparse.Namespace], Iterator[Record]]] = {
    "coco": lambda args: read_captions(args.captions),
    "karpathy": karpathy_records,
    "flickr30k": karpathy_records,
    "csv": csv_records,
    "vg": vg_records,
    "cc3m": folder_records,
}


def source_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines of a manifest, with a header if the types are not the default ones.

    A DataError if the source cannot be read, has another format, or names no images.
    """
    try:
        for number, record in enumerate(CONVERTERS[args.command](args)):
            if record.image is None:
                raise DataError(
                    f"{args.captions}: caption {number + 1} has no image; name the column with "
                    "--image-column, or make negatives without images with negatives.py"
                )
            types = tuple(record.negatives) or NEGATIVE_TYPES
            if not number and types != NEGATIVE_TYPES:
                yield {"manifest": 1, "types": types}
            yield record._asdict() | {"negatives": {**dict.fromkeys(types), **record.negatives}}
    except DataError:
        raise
    except OSError as error:
        path = error.filename or args.captions
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{args.captions}: is not {SOURCES[args.command]} ({error!r})") from None


def shapes_records(split: str, seed: int, images: Path, limit: int) -> Iterator[dict[str, Any]]:
    """Draw scenes as PNG files and yield two records for each, the caption and its paraphrase."""
    images.mkdir(parents=True, exist_ok=True)
    for index in range(limit):
        scene = make_scene(split, seed, index)
        name = f"{split}_{seed}_{index:06d}.png"
        draw_scene(scene, 224).save(images / name)
        said = caption_scene(scene, f"{seed}:0:{index}")
        negatives = dict(zip(NEGATIVE_TYPES, said.negatives, strict=True))
        yield {"image": name, "image_id": index, "caption": said.caption, "negatives": negatives}
        nothing = dict.fromkeys(NEGATIVE_TYPES)
        yield {"image": name, "image_id": index, "caption": said.positive, "negatives": nothing}


def write_shards(
    manifest: Path, images: Path, out: Path, size: int, types: Sequence[str] = ()
) -> int:
    """Write a manifest and its images as webdataset shards of `size` examples, and count them.

    The order is random; all captions of an image are in one shard, so that readers of other shards
    never have it in the same batch. After an error all shards are deleted.
    """
    if size < 1:
        raise DataError(f"--size {size}: must be 1 or more")
    there = os.path.lexists(out)
    if there and (not out.is_dir() or any(p.suffix != ".partial" for p in out.iterdir())):
        raise DataError(f"--out {out}: is not an empty folder; choose another")
    offsets: dict[str, list[int]] = {}
    named: tuple[str, ...] = NEGATIVE_TYPES
    for offset, record in read_records(manifest, types, need_image=True):
        offsets.setdefault(str(record.image), []).append(offset)
        named = tuple(record.negatives)  # a header further down may name more
    rng, groups = random.Random(0), list(offsets.values())
    rng.shuffle(groups)
    shards: list[list[int]] = [[]]
    for group in groups:
        if shards[-1] and len(shards[-1]) + len(group) > size:
            shards.append([])
        shards[-1] += group
    out.mkdir(parents=True, exist_ok=True)
    count, made = 0, []
    try:
        with manifest.open("rb") as lines:
            for number, shard in enumerate(shards):
                rng.shuffle(shard)
                made.append(out / f"{number:06d}.tar")
                with writing(made[-1], True) as file, tarfile.open(fileobj=file, mode="w") as tar:
                    for offset in shard:
                        lines.seek(offset)
                        place = f"{manifest}, byte {offset}"
                        record = parse_record(lines.readline(), place, named, some=True)
                        add_sample(tar, f"{count:09d}", _sample_parts(record, images))
                        count += 1
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return count


def _sample_parts(record: Record, images: Path) -> dict[str, bytes]:
    """The members of a record's sample; its json names the types if they are not the default."""
    path, types = images / str(record.image), tuple(record.negatives)
    kinds = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    content, form = io.BytesIO(), open_image(path, use=lambda image: image.format)
    if form in kinds:
        content.write(path.read_bytes())
    else:  # shards may hold only these formats
        open_image(path).save(content, "PNG")
    row = record._asdict() | ({} if types == NEGATIVE_TYPES else {"types": types})
    return {kinds.get(form, "png"): content.getvalue(), "json": json.dumps(row).encode()}


def check(path: Path, images: Path, model: str, types: Sequence[str] = ()) -> None:
    """Decode every image of a manifest; print counts, and negatives equal to their caption.

    A DataError, after printing, if images are missing or broken; the first ten are named.
    """
    tokenizer, records = load_tokenizer(model), list(read_manifest(path, types))
    names = dict.fromkeys(str(record.image) for record in records)
    broken = []
    for name in names:
        try:
            open_image(images / name)
        except DataError as error:
            broken.append(str(error))
    print(f"{len(records)} captions of {len(names)} images in {path}")
    for kind in records[-1].negatives if records else ():
        count = sum(record.negatives.get(kind) is not None for record in records)
        print(f"  {kind:9} {count} negatives ({100 * count / len(records):.1f} %)")
    repeated = len(records) - len({(record.image, record.caption) for record in records})
    print(f"  {repeated} captions repeated for the same image")
    same = count_same_tokens(records, tokenizer)
    print(f"  {same} negatives have their caption's tokens in {model} (cut at its context): unused")
    photos = {photo_number(str(record.image), record.image_id) for record in records}
    for line in find_overlap(np.array(sorted(photos))):
        print(f"  {line} among them")
    for line in broken[:10]:
        print(f"  {line}")
    if broken:
        raise DataError(f"{len(broken)} of {len(names)} images cannot be used; mend or remove them")
    print(f"  all {len(names)} images decode")


def load_tokenizer(model: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of an open_clip model, of shapes-tiny, or of a model config (.json)."""
    open_clip: Any = importlib.import_module("open_clip")
    own = Path(__file__).parent / "scripts" / f"{model}.json"  # shapes-tiny
    path = own if own.is_file() else Path(model)
    name = path.stem if path.suffix == ".json" else model
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))["text_cfg"]["width"]
            open_clip.add_model_config(path)
        open_clip.get_model_config(name)["text_cfg"]  # or any name gets a tokenizer
        return open_clip.get_tokenizer(name)
    except Exception:  # a config may be wrong in any way
        raise DataError(f"--model {model}: open_clip knows no such model") from None


def count_same_tokens(records: Iterable[Record], tokenizer: Callable[[list[str]], Tensor]) -> int:
    """Count the negatives whose tokens are those of their caption."""
    same = 0
    for record in records:
        given = [x for x in record.negatives.values() if x]
        lists = [x if isinstance(x, list) else [x] for x in given]
        tokens = tokenizer([record.caption, *itertools.chain(*lists)])
        same += int((tokens[1:] == tokens[0]).all(dim=1).sum())
    return same


# The command


def main(argv: list[str] | None = None) -> None:
    """Run one of the commands."""
    args = parse_args(argv)
    if launcher().world > 1:
        raise DataError("this works in one process; start it without torchrun and srun")
    if args.command == "check":
        check(args.manifest, args.images, args.model, args.types)
        return
    if args.command == "shards":
        count = write_shards(args.manifest, args.images, args.out, args.size, args.types)
        print(f"{count} examples written to {args.out}")
        return
    if os.path.lexists(args.out):
        if not args.overwrite:
            raise DataError(f"--out {args.out}: exists; pass --overwrite or choose another name")
        if args.out.is_symlink() or not args.out.is_file():
            raise DataError(f"--out {args.out}: is not a regular file, so it is not replaced")
    if args.command == "shapes":
        rows = shapes_records(args.split, args.seed, args.images, args.limit)
    else:
        rows = source_rows(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    count = write_lines(args.out, rows, args.overwrite)
    print(f"{count} lines written to {args.out}")


if __name__ == "__main__":
    sys.exit(run_script(main, "data.py"))

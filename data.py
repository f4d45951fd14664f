# SPDX-License-Identifier: MIT
"""From captions and pictures to batches: manifests, the shapes world, packed captions.

A manifest is JSON lines, one caption a line, written by negatives.py:

  {"image": "a.jpg", "image_id": 9, "caption": "...", "negatives": {"relation": "...", ...}}

The shapes world is the embedded data set: scenes of one to three coloured shapes, drawn on demand
from (split, seed, index) alone, whose captions, paraphrases and hard negatives are known exactly.

  python data.py coco captions_train2014.json --out captions.jsonl
  python data.py shapes --out shapes/train.jsonl --images shapes --limit 1000
  python data.py check negatives.jsonl --images coco
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from negatives import NEGATIVE_TYPES, DataError, read_captions

Image.MAX_IMAGE_PIXELS = 200_000_000  # a larger picture is refused, not decoded

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
SIZES = {"small": 0.12, "large": 0.2}  # radius; the picture is 1 wide and 1 high
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
    """Where the first thing lies from the second, and both as places in the picture."""

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
    """Its passive, and the actions that may stand as its false version."""

    passive: str
    others: tuple[str, str]


# What covers a thing also touches it, so neither may stand as the false version of the other.
ACTIONS = {
    "covering": Action("covered by", ("surrounding", "pointing at")),
    "touching": Action("touched by", ("surrounding", "pointing at")),
    "surrounding": Action("surrounded by", ("covering", "touching")),
    "pointing at": Action("pointed at by", ("covering", "touching")),
}
KINDS = {"place": 0.15, "relation": 0.7, "action": 0.15}  # of scenes, and how often
JITTER = 0.05  # of centres; relations stay clear, the other axis never decides
TEMPLATES = 3  # ways to say a claim
TRAIN_SCENES = 1_000_000  # one epoch of the shapes world


class Phrase(NamedTuple):
    """A noun phrase, "a large red circle"; size is "" where it goes unsaid."""

    size: str
    colour: str
    shape: str


class Claim(NamedTuple):
    """What a caption says: first, link, second; the link is a relation, an action or a place."""

    first: Phrase
    link: str
    second: Phrase | None


class Thing(NamedTuple):
    """Something drawn: its look, centre and radius in parts of the picture's width."""

    phrase: Phrase
    x: float
    y: float
    radius: float


class Scene(NamedTuple):
    """Things in the order of drawing, the action of one on another ("" if none), the truth."""

    things: tuple[Thing, ...]
    action: str
    claim: Claim


def make_scene(split: str, seed: int, index: int) -> Scene:
    """Make the scene of (split, seed, index), and of nothing else.

    "train" and "test" share no combination of colours and shapes: the two halves of all
    combinations are told apart by a parity, and every hard negative stays in the half of its
    caption, so that no reader of captions alone can tell the true one.
    """
    rng = random.Random(f"{split}:{seed}:{index}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    n = {"place": 1, "relation": rng.choice((2, 2, 2, 3)), "action": 2}[kind]
    colours, shapes = list(COLOURS), list(SHAPES)
    while True:
        looks = zip(rng.sample(colours, n), rng.sample(shapes, n), strict=True)
        phrases = [Phrase(rng.choice(list(SIZES)), *look) for look in looks]
        said = phrases[:2]
        parity = sum(colours.index(p.colour) + shapes.index(p.shape) for p in said) % 2
        if parity == (split == "train"):
            break
    return {"place": _place, "relation": _relation, "action": _action}[kind](phrases, rng)


def _place(phrases: list[Phrase], rng: random.Random) -> Scene:
    """One thing at a side of the picture."""
    place = rng.choice(list(PLACES))
    thing = _thing(phrases[0], PLACES[place].dx, PLACES[place].dy, rng)
    return Scene((thing,), "", Claim(_said(phrases[0], rng), place, None))


def _relation(phrases: list[Phrase], rng: random.Random) -> Scene:
    """Two things beside or above each other, now and then with a third that goes unsaid."""
    link = rng.choice(list(RELATIONS))
    dx, dy = RELATIONS[link][:2]
    spots = [(dx, dy), (-dx, -dy), rng.choice(((dy, dx), (-dy, -dx)))]
    things = [_thing(p, *spot, rng) for p, spot in zip(phrases, spots, strict=False)]
    claim = Claim(_said(phrases[0], rng), link, _said(phrases[1], rng))
    return Scene(tuple(things), "", claim)


def _action(phrases: list[Phrase], rng: random.Random) -> Scene:
    """The first thing does something to the second; sizes follow from the act and go unsaid."""
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
            Thing(first, x + 0.36 * math.cos(a), y + 0.36 * math.sin(a), 0.085) for a in around
        ]
    else:
        away, r = (0.19, 0.18) if action == "touching" else (0.29, 0.15)
        things = [
            Thing(first, x - away * dx, y - away * dy, r),
            Thing(second, x + away * dx, y + away * dy, r),
        ]
    return Scene(tuple(things), action, Claim(first, action, second))


def _thing(phrase: Phrase, dx: int, dy: int, rng: random.Random) -> Thing:
    x, y = (0.5 + 0.26 * d + rng.uniform(-JITTER, JITTER) for d in (dx, dy))
    return Thing(phrase, x, y, SIZES[phrase.size])


def _said(phrase: Phrase, rng: random.Random) -> Phrase:
    return phrase if rng.random() < 0.15 else phrase._replace(size="")


def holds(scene: Scene, claim: Claim) -> bool:
    """Tell whether the claim is true of the scene, from what is drawn alone."""

    def found(phrase: Phrase) -> list[Thing]:
        same = [t for t in scene.things if t.phrase[1:] == phrase[1:]]
        return [t for t in same if phrase.size in ("", t.phrase.size)]

    if claim.link in ACTIONS:
        acts = {"covering", "touching"} if scene.action == "covering" else {scene.action}
        one, _, two = scene.claim
        pairs: list[tuple[Phrase | None, Phrase | None]] = [(one, two)]
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
    """Put the claim in words: plainly (0), turned round (1), in another form (2)."""
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


def _noun(phrase: Phrase) -> str:
    words = " ".join(word for word in phrase if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# Edits make a true claim of a scene false.  None where the kind of claim has no such edit.
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
    """Another colour or shape for a thing: of the same half, and nowhere in the scene."""
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


class Captions(NamedTuple):
    """A caption, another caption of the same picture (t⁺) and a negative of each type, or None."""

    caption: str
    positive: str | None
    negatives: tuple[str | None, ...]


def caption_scene(scene: Scene, seed: int | str) -> Captions:
    """Say the scene's claim, a paraphrase of it, and false versions of it in the same words."""
    rng = random.Random(f"captions:{seed}")
    template, other = rng.sample(range(TEMPLATES), 2)
    negatives = []
    for name in NEGATIVE_TYPES:
        claims = [EDITS[edit](scene, rng) for edit in EDITS_OF_TYPE[name]]
        options = [claim for claim in claims if claim is not None]
        negatives.append(say(rng.choice(options), template) if options else None)
    return Captions(say(scene.claim, template), say(scene.claim, other), tuple(negatives))


def draw_scene(scene: Scene, width: int) -> Image.Image:
    """Draw the scene as a square RGB picture of `width` pixels."""
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


class Item(NamedTuple):
    """One training example; fault names a picture that could not be read and was stepped over."""

    image: Tensor  # [3, H, W]
    captions: Captions
    fault: str


class ShapesDataset(Dataset[Item]):
    """The training scenes of the shapes world; indices are (epoch, index) pairs."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], width: int, seed: int) -> None:
        """Draw pictures of `width` pixels from the scenes of `seed`."""
        self.transform, self.width, self.seed = transform, width, seed

    def __len__(self) -> int:
        """Count the scenes of an epoch."""
        return TRAIN_SCENES

    def __getitem__(self, key: tuple[int, int]) -> Item:
        """Draw and caption the scene of (epoch, index); an epoch says it in other words."""
        epoch, index = key
        scene = make_scene("train", self.seed, index)
        captions = caption_scene(scene, f"{self.seed}:{epoch}:{index}")
        return Item(self.transform(draw_scene(scene, self.width)), captions, "")


class ManifestDataset(Dataset[Item]):
    """Photos and captions of a manifest; indices are (epoch, index) pairs.

    What is random (the crop, which other caption of the photo is t⁺) depends on (seed, epoch,
    index) alone, so neither workers nor a resumed run change it.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path,
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
        on_bad_image: str = "stop",
    ) -> None:
        """Read the manifest at `path`; its photos are looked up in the folder `images`.

        Raises:
            DataError: a line is malformed, or a photo is missing (checked before training).
        """
        self.records = list(read_manifest(path))
        if not self.records:
            raise DataError(f"{path}: holds no captions; make it with negatives.py")
        self.transform, self.seed, self.on_bad_image = transform, seed, on_bad_image
        self.images = Path(images)
        self.of_image: dict[str, list[int]] = defaultdict(list)
        for i, record in enumerate(self.records):
            self.of_image[record.image].append(i)
        missing = [name for name in self.of_image if not (self.images / name).is_file()]
        if missing and (on_bad_image == "stop" or len(missing) == len(self.of_image)):
            raise DataError(
                f"--images {images}: {len(missing)} of {len(self.of_image)} pictures of {path} "
                f"are not there, the first is {missing[0]}; point --images at their folder"
                + (" or pass --on-bad-image skip" if len(missing) < len(self.of_image) else "")
            )

    def __len__(self) -> int:
        """Count the captions."""
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        """Load the example (epoch, index), or the next readable one where that is asked for."""
        epoch, index = key
        faults = []
        for step in range(len(self)):
            i = (index + step) % len(self)
            record = self.records[i]
            try:
                image = open_image(self.images / record.image)
            except DataError as error:
                if self.on_bad_image == "stop":
                    raise
                faults.append(str(error))
                continue
            others = [self.records[j].caption for j in self.of_image[record.image] if j != i]
            others = [text for text in others if text != record.caption]
            positive = random.Random(f"{self.seed}:{epoch}:{i}").choice(others) if others else None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash((self.seed, epoch, i)) % 2**63)
                tensor = self.transform(image)
            return Item(
                tensor, Captions(record.caption, positive, record.negatives), "; ".join(faults)
            )
        raise DataError(f"--images {self.images}: not one picture could be read; {faults[0]}")


def open_image(path: str | Path) -> Image.Image:
    """Decode a picture as RGB.

    Raises:
        DataError: the file is missing or is not a picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if not Path(path).exists():
            raise DataError(f"{path}: no such picture") from None
        raise DataError(f"{path}: cannot be decoded ({error})") from None


class Record(NamedTuple):
    """A line of a manifest."""

    image: str
    image_id: int | str | None
    caption: str
    negatives: tuple[str | None, ...]  # in the order of NEGATIVE_TYPES


def read_manifest(path: str | Path) -> Iterator[Record]:
    """Read a manifest line by line; a header line and empty lines are skipped.

    Raises:
        DataError: naming file and line, if a line is not a record or its image leaves the folder.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = _parse_record(line, f"{path}:{number}")
                    if record is not None:
                        yield record
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text; a manifest is JSON lines") from None


def _parse_record(line: str, place: str) -> Record | None:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise DataError(f"{place}: is not JSON; a manifest has one record a line") from None
    if not isinstance(fields, dict):
        raise DataError(f'{place}: is not a record {{"image": ..., "caption": ...}}')
    if "manifest" in fields:
        return None
    image, caption = fields.get("image"), fields.get("caption")
    if not isinstance(image, str) or not image:
        raise DataError(f'{place}: "image" must be a file name, not {image!r}')
    if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts or "\\" in image:
        raise DataError(f'{place}: "image" {image!r} leaves the folder of --images')
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f'{place}: "caption" must be a sentence, not {caption!r}')
    negatives = fields.get("negatives") or {}
    if not isinstance(negatives, dict) or not set(negatives) <= set(NEGATIVE_TYPES):
        raise DataError(f'{place}: "negatives" must have the keys {", ".join(NEGATIVE_TYPES)}')
    texts = tuple(negatives.get(name) for name in NEGATIVE_TYPES)
    if any(text is not None and (not isinstance(text, str) or not text.strip()) for text in texts):
        raise DataError(f"{place}: every negative must be a sentence or null")
    return Record(image, fields.get("image_id"), caption, texts)


class PackedText(NamedTuple):
    """M tokenised captions, several in a row.

    Where the tokenizer is not CLIP's, captions stay one to a row and `segments` is empty.
    """

    tokens: Tensor  # [R, L] int64
    positions: Tensor  # [R, L] int64, starting at 0 with each caption
    segments: Tensor  # [R, L] int64, which caption of the row; -1 is padding
    ends: Tensor  # [M] int64, where in R·L each caption's end-of-text stands

    def to(self, device: torch.device) -> PackedText:
        """Move all tensors."""
        return PackedText(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack_texts(texts: Sequence[str], tokenizer: Callable[[list[str]], Tensor]) -> PackedText:
    """Tokenise M captions and lay them into as few rows as fit, the longest first.

    Args:
        texts: M captions; what exceeds the context is cut, as CLIP does.
        tokenizer: an open_clip tokenizer, texts to [M, context length].
    """
    padded = tokenizer(list(texts))  # [M, C]
    empty = padded.new_zeros(0)
    if not hasattr(tokenizer, "eot_token_id"):
        return PackedText(padded, empty, empty, empty)
    lengths = (padded.argmax(dim=-1) + 1).tolist()  # end-of-text has the largest number
    rows = _fill_rows(lengths, padded.shape[1])
    width = max((sum(lengths[i] for i in row) for row in rows), default=1)
    tokens = padded.new_zeros(len(rows), width)
    positions, segments = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    ends = padded.new_zeros(len(lengths))
    count = torch.arange(padded.shape[1])
    for r, row in enumerate(rows):
        start = 0
        for s, i in enumerate(row):
            stop = start + lengths[i]
            tokens[r, start:stop] = padded[i, : lengths[i]]
            positions[r, start:stop] = count[: lengths[i]]
            segments[r, start:stop] = s
            ends[i] = r * width + stop - 1
            start = stop
    return PackedText(tokens, positions, segments, ends)


def _fill_rows(lengths: list[int], width: int) -> list[list[int]]:
    """Put captions into rows of `width`: always the longest that still fits."""
    waiting: list[list[int]] = [[] for _ in range(width + 1)]
    for i, length in enumerate(lengths):
        waiting[length].append(i)
    rows: list[list[int]] = []
    left = len(lengths)
    while left:
        row: list[int] = []
        space = longest = width
        while longest := max(
            (n for n in range(min(space, longest), 0, -1) if waiting[n]), default=0
        ):
            row.append(waiting[longest].pop())
            space -= longest
            left -= 1
        rows.append(row)
    return rows


def can_pack(model: Any) -> bool:
    """Tell whether the text tower is OpenAI's: causal, read at the end-of-text token."""
    tower = getattr(model, "text", model)
    parts = (
        "token_embedding",
        "positional_embedding",
        "transformer",
        "ln_final",
        "text_projection",
    )
    if not all(hasattr(tower, part) for part in parts):
        return False
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
    mask, extra = getattr(tower, "attn_mask", None), getattr(tower, "cls_emb", None)
    return pool in ("argmax", "eos") and mask is not None and extra is None


def encode_text(model: Any, packed: PackedText) -> Tensor:
    """Encode packed captions to [M, D]: not normalised, equal to `model.encode_text`.

    Every caption sees itself alone: the mask is causal within a caption and closed between
    captions. A tower that is not OpenAI's gets its captions one to a row at full length.
    """
    if not len(packed.segments):
        return model.encode_text(packed.tokens)
    if not can_pack(model):
        return model.encode_text(_unpack(packed, model))
    tower = getattr(model, "text", model)
    x = tower.token_embedding(packed.tokens) + tower.positional_embedding[packed.positions]
    x = x.to(tower.transformer.get_cast_dtype())  # [R, L, width]
    same = packed.segments[:, :, None] == packed.segments[:, None, :]  # [R, L, L]
    mask = torch.zeros(same.shape, dtype=x.dtype, device=x.device)
    mask = mask.masked_fill(~same.tril(), float("-inf"))
    heads = tower.transformer.resblocks[0].attn.num_heads
    x = tower.transformer(x, attn_mask=mask.repeat_interleave(heads, dim=0))
    x = tower.ln_final(x.flatten(0, 1)[packed.ends])  # [M, width]
    project = tower.text_projection
    if project is None:
        return x
    return project(x) if isinstance(project, nn.Module) else x @ project


def _unpack(packed: PackedText, model: Any) -> Tensor:
    """The captions one to a row again, padded with 0 to the model's context length."""
    positions, tokens = packed.positions.flatten(), packed.tokens.flatten()
    context = getattr(model, "context_length", None) or model.text.context_length
    padded = tokens.new_zeros(len(packed.ends), context)
    for i, end in enumerate(packed.ends.tolist()):
        length = int(positions[end]) + 1
        padded[i, :length] = tokens[end + 1 - length : end + 1]
    return padded


class Batch(NamedTuple):
    """B pictures and their texts: B captions, then the positives, then the negatives that exist."""

    images: Tensor  # [B, 3, H, W]
    texts: PackedText
    positive_valid: Tensor  # [B] bool, which captions have a positive
    valid: Tensor  # [B, K] bool, which negatives exist
    encoded: Tensor  # [B, K] bool, which negatives are among the texts
    faults: list[str]


class Collate:
    """Makes a Batch of Items; in a class only because workers must be able to pickle it."""

    def __init__(
        self, tokenizer: Callable[[list[str]], Tensor], *, positives: bool, negatives: str
    ) -> None:
        """Leave out what the recipe does not read.

        Args:
            tokenizer: an open_clip tokenizer.
            positives: whether the loss reads t⁺.
            negatives: "none", "valid", or "all": an empty text where one is missing (as released).
        """
        self.tokenizer, self.positives, self.negatives = tokenizer, positives, negatives

    def __call__(self, items: list[Item]) -> Batch:
        """Stack the pictures and pack all texts of the batch together."""
        captions = [item.captions for item in items]
        positives = [c.positive if self.positives else None for c in captions]
        valid = torch.tensor([[text is not None for text in c.negatives] for c in captions])
        if self.negatives == "none":
            valid = torch.zeros_like(valid)
        encoded = torch.ones_like(valid) if self.negatives == "all" else valid
        texts = [c.caption for c in captions]
        texts += [text for text in positives if text is not None]
        texts += [captions[i].negatives[k] or "" for i, k in encoded.nonzero().tolist()]
        return Batch(
            torch.stack([item.image for item in items]),
            pack_texts(texts, self.tokenizer),
            torch.tensor([text is not None for text in positives]),
            valid,
            encoded,
            [item.fault for item in items if item.fault],
        )


def split_features(features: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Sort [M, D] text features of a batch into captions, positives and negatives.

    Returns:
        captions [B, D], positives [B, D] and negatives [B, K, D]; zero where there is none.
    """
    b, k = batch.valid.shape
    has, made = batch.positive_valid.nonzero()[:, 0], batch.encoded.flatten().nonzero()[:, 0]
    captions, found, edited = features.split([b, len(has), len(made)])
    positives = torch.zeros_like(captions).index_copy(0, has, found)
    negatives = features.new_zeros(b * k, features.shape[1]).index_copy(0, made, edited)
    return captions, positives, negatives.view(b, k, -1)


def batch_indices(
    size: int, batch: int, seed: int, start: int, stop: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield the (epoch, index) pairs of the global batches of steps start to stop.

    Each epoch is a permutation of its own, made from (seed, epoch); what does not fill a batch is
    left out.
    """
    per_epoch = size // batch
    epoch, order = -1, torch.empty(0)
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
            order = torch.randperm(size, generator=generator)
        first = step % per_epoch * batch
        yield [(epoch, i) for i in order[first : first + batch].tolist()]


def train_transform(model: Any, crop: float = 0.9) -> Callable[[Image.Image], Tensor]:
    """Crop 90 to 100 % of a photo at random, resize, normalise as the model wants it."""
    cfg = model.visual.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    mode = transforms.InterpolationMode(cfg.get("interpolation", "bicubic"))
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(crop, 1.0), interpolation=mode),
            transforms.ToTensor(),
            transforms.Normalize(cfg["mean"], cfg["std"]),
        ]
    )


def shapes_transform(model: Any) -> tuple[Callable[[Image.Image], Tensor], int]:
    """Normalise drawn scenes, without a crop that could hide a thing; and their width."""
    cfg = model.visual.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    steps = [transforms.ToTensor(), transforms.Normalize(cfg["mean"], cfg["std"])]
    return transforms.Compose(steps), size


def write_manifest(path: Path, records: Iterable[dict[str, Any]], overwrite: bool) -> int:
    """Write records to NAME.partial, rename it to NAME, and count them."""
    if path.exists() and not overwrite:
        raise DataError(f"--out {path}: exists; pass --overwrite or choose another name")
    partial = path.with_name(path.name + ".partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for count, record in enumerate(records, 1):  # noqa: B007 - the count is returned
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"--out {path}: cannot be written ({error.strerror}); check it") from None
    finally:
        partial.unlink(missing_ok=True)
    return count


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


def check(path: Path, images: Path) -> None:
    """Decode every picture of a manifest and print what it holds.

    Raises:
        DataError: pictures are missing or broken; the first ones are named.
    """
    records = list(read_manifest(path))
    names = dict.fromkeys(record.image for record in records)
    broken = []
    for name in names:
        try:
            open_image(images / name)
        except DataError as error:
            broken.append(str(error))
    pairs = Counter((record.image, record.caption) for record in records)
    same = sum(record.caption in record.negatives for record in records)
    print(f"{len(records)} captions of {len(names)} pictures in {path}")
    for k, kind in enumerate(NEGATIVE_TYPES):
        count = sum(record.negatives[k] is not None for record in records)
        print(f"  {kind:9} {count} negatives ({100 * count / max(1, len(records)):.1f} %)")
    print(f"  {sum(pairs.values()) - len(pairs)} captions repeated for the same picture")
    print(f"  {same} captions with a negative that is the caption itself")
    if broken:
        for line in broken[:10]:
            print(f"  {line}")
        raise DataError(
            f"{len(broken)} of {len(names)} pictures cannot be used; mend or remove them"
        )
    print(f"  all {len(names)} pictures decode")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="data.py", description="Make and check manifests.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "coco": "a COCO captions json",
        "karpathy": "a Karpathy json (COCO, Flickr8k, Flickr30k)",
        "flickr30k": "dataset_flickr30k.json in Karpathy's layout",
        "csv": "a .csv or .tsv with a header",
    }.items():
        sub = commands.add_parser(name, help=f"{text} to a manifest without negatives")
        sub.add_argument("captions", type=Path, help=text)
        sub.add_argument("--out", type=Path, required=True, help="manifest to write (.jsonl)")
        sub.add_argument("--overwrite", action="store_true", help="replace --out")
        if name == "csv":
            sub.add_argument("--image-column", help="name of the column of file names")
            sub.add_argument("--caption-column", help="name of the column of captions")
    sub = commands.add_parser("shapes", help="draw the shapes world to PNG files and a manifest")
    sub.add_argument("--out", type=Path, required=True, help="manifest to write (.jsonl)")
    sub.add_argument("--images", type=Path, required=True, help="folder for the pictures")
    sub.add_argument("--split", choices=("train", "test"), default="train")
    sub.add_argument("--limit", type=int, default=1000, help="scenes (default 1000)")
    sub.add_argument("--seed", type=int, default=0, help="default 0")
    sub.add_argument("--overwrite", action="store_true", help="replace --out")
    sub = commands.add_parser(
        "check", help="decode every picture of a manifest, count, find copies"
    )
    sub.add_argument("manifest", type=Path, help="manifest (.jsonl)")
    sub.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run one of the commands."""
    args = parse_args(argv)
    if args.command == "check":
        check(args.manifest, args.images)
        return
    if args.out.exists() and not args.overwrite:
        raise DataError(f"--out {args.out}: exists; pass --overwrite or choose another name")
    if args.command == "shapes":
        records = shapes_records(args.split, args.seed, args.images, args.limit)
    else:
        columns = {"image_column": None, "caption_column": None}
        columns |= {key: vars(args)[key] for key in columns if key in args}
        nothing = {"negatives": dict.fromkeys(NEGATIVE_TYPES)}
        records = ({**record, **nothing} for record in read_captions(args.captions, **columns))
    print(f"{write_manifest(args.out, records, args.overwrite)} captions written to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)

# SPDX-License-Identifier: MIT
"""Read the suites' official files, and the user's own files and loaders, into items.

A loader takes a `Source` (root, expected, notes) and yields TestItem, and Retrieval and Classes
for the costs. Suites of plain rows are described in suites.json under "records" and read by
`load_rows`; each other suite has a loader of its own. evaluate.py calls them by LOADERS.

Chapters: reading rows, suites of your own, plain rows, ARO, other suites, class sets, which files
exist, and overlap with training images.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import io
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ImageOps

import evaluate
from data import DataError, open_image, photo_number
from evaluate import (
    EVAL_SEED,
    SUITES,
    Classes,
    Crop,
    Loaded,
    Retrieval,
    Suite,
    TestItem,
    error_line,
    own_faults,
    read_table,
    run_file,
    verdict_of,
    write_text,
)
from negatives import why

# Reading rows


class Row(dict[str, Any]):
    """A row of a suite's file; a missing field is an error that names the row."""

    place = ""

    def __missing__(self, key: str) -> Any:
        """Raise a DataError that names the file, the row and the field."""
        raise DataError(f"{self.place}: has no field {key!r}; download the official file again")


@dataclass
class Source:
    """A suite's files below --root; its loader updates `expected` and `notes`."""

    suite: str
    root: Path | None
    partial: bool
    expected: dict[str, int]
    notes: list[str]
    read: dict[str, set[str]] = field(default_factory=dict)  # files, the subsets each gave
    place: str = ""  # of the row that was read last

    def rows(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yield (id, row) of a json list or dict, JSON lines or csv.

        Raises:
            DataError: the file is missing (unless some may be), cannot be parsed, or a row is
                neither a record nor a list.
        """
        if self.root is None:
            raise DataError(f"--root is needed: the folder that holds {name}")
        path = self.root / name
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            if self.partial and isinstance(error, FileNotFoundError):
                self.notes.append(f"{name} is missing")
                return
            where = read_table("suites")[self.suite]["where"]
            raise DataError(f"{path}: cannot be read ({error.strerror}); get it: {where}") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}: is not UTF-8 text; download it again") from None
        try:
            table = parse_rows(text, path.suffix)
        except (ValueError, csv.Error):
            raise DataError(f"{path}: is not {path.suffix[1:]}; download it again") from None
        self.read[str(path)] = set()
        if not isinstance(table, (dict, list)) or not (table or self.partial):
            raise DataError(f"{path}: holds no rows; download it again")
        self.notes += [] if table else [f"{name} holds no rows"]
        for key, row in table.items() if isinstance(table, dict) else enumerate(table):
            self.place = f"{path} row {key}"
            if not isinstance(row, (dict, list)):
                raise DataError(f"{self.place}: {str(row)[:40]!r} is no record; download it again")
            if isinstance(row, dict):
                row = Row(row)
                row.place = self.place
            yield str(key), row

    def listed(self, value: Any) -> list[Any]:
        """Return a field if it is a list; a string would pass as a list of letters."""
        if not isinstance(value, list):
            raise DataError(f"{self.place}: {str(value)[:40]!r} is no list; download it again")
        return value

    def find(self, *names: str) -> str:
        """The first of these files that exists below --root, else the first one."""
        paths = [os.path.join(self.root or "", name) for name in names]
        return next((path for path in paths if os.path.isfile(path)), paths[0])

    def coco(self, name: str) -> str:
        """A COCO photo by its number, in whichever folder has it."""
        number = re.split(r"[/_]", name)[-1]
        names = [f"{pool}/{number}" for pool in ("val2017", "train2017")]
        names += [f"{pool}/COCO_{pool}_{number}" for pool in ("val2014", "train2014")]
        return self.find(*names)

    def vg(self, name: str) -> str:
        """A Visual Genome photo by its number."""
        number = name.split("/")[-1]
        return self.find(*(f"vg/{pool}{number}" for pool in ("VG_100K/", "VG_100K_2/", "")))


def parse_rows(text: str, suffix: str) -> Any:
    """Rows of JSON, JSON lines or CSV."""
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return json.loads(text)


# Suites of your own


def own_records(given: str, root: Path | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of my.json, my.jsonl or my_loader.py:load.

    Raises:
        DataError: names the file, and the line that cannot be read.
    """
    path, _, function = given.partition(":") if ".py:" in given else (given, "", "")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--suite {given}: {path} cannot be read ({why(error)})") from None
    except UnicodeDecodeError:
        raise DataError(f"--suite {given}: {path} is not UTF-8 text; save it as UTF-8") from None
    if path.endswith(".py"):
        with own_faults(f"--suite {given}"):
            if not callable(load := run_file(path).get(function)):
                told = f"{path} defines no {function}" if function else "names no function"
                raise DataError(f"--suite {given}: {told}; write {path}:FUNCTION")
            for number, record in enumerate(load(root), 1):
                yield f"{given} record {number}", record
        return
    try:
        if path.endswith(".jsonl"):
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
            return
        if not isinstance(json.loads(text), list):
            raise DataError(f"{path}:1: must be a list of records, [{{...}}, ...]")
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        number = getattr(error, "lineno", 1) if path.endswith(".json") else number
        mend = "correct it" if path.endswith(".jsonl") else "records line by line are .jsonl"
        raise DataError(f"{path}:{number}: is no JSON ({error}); {mend}") from None
    at, decoder = text.index("[") + 1, json.JSONDecoder()
    row = text.count("\n", 0, at) + 1
    while (found := re.compile(r"[\s,]*").match(text, at)) and text[found.end()] != "]":
        row += found[0].count("\n")
        record, at = decoder.raw_decode(text, found.end())
        yield f"{path}:{row}", record
        row += text.count("\n", found.end(), at)


OWN_FIELDS = ("images", "texts", "true", "subset", "id", "crop", "tags")


def own_item(record: Any, place: str, number: int, find: Callable[[str], str]) -> TestItem:
    """Check a user's own record and make it an item.

    Raises:
        DataError: names the place, the field, its value and what it must be.
    """

    def fault(why: str) -> DataError:
        return DataError(f"{place}: {why}")

    if not isinstance(record, dict):
        raise fault(f'{record!r:.40} is no record such as {{"images": ..., "texts": [...]}}')
    odd = [key for key in record if key not in OWN_FIELDS]
    if odd:
        raise fault(f"has the field {odd[0]!r}; a record has {', '.join(OWN_FIELDS)}")
    true, crop = record.get("true", 1), record.get("crop")
    images: Any = record.get("images")
    images = [images] if isinstance(images, str) else images
    texts: Any = record.get("texts")
    tags: Any = record.get("tags", [])
    for name, value in (("images", images), ("texts", texts), ("tags", tags)):
        strings = isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)
        strings = strings and not re.search("[\0\ud800-\udfff]", "".join(value))
        if not strings or (not value and name != "tags"):
            raise fault(f"{name} must be a list of strings, not {value!r:.60}")
        twice = next((x for x in value if value.count(x) > 1), None)
        if twice is not None:
            raise fault(f"{name} holds {twice!r:.40} twice; nobody could tell them apart")
    n, m = len(images), len(texts)
    if not (m > 1 if n == 1 else m in (1, n)):
        raise fault(f"{n} images with {m} texts; wanted 1 with 2 or more, or N with 1 or N")
    if type(true) is not int or not 1 <= true <= (m - 1 if n == 1 else 1):
        most = m - 1 if n == 1 else 1
        raise fault(f"true is {true!r:.20}; wanted the number of true texts, an int of 1 to {most}")
    subset = record.get("subset", Path(place.split(":")[0]).stem)
    plain = isinstance(subset, str) and subset.isprintable() and subset == subset.strip() != ""
    if not plain or "|" in subset or subset.startswith("mean of ") or verdict_of(subset):
        raise fault(
            f"subset is {subset!r:.40}; wanted a name of one line without |, that does not begin "
            "with 'mean of' and does not end in text, image, group or another verdict"
        )
    key = record.get("id", number)
    if type(key) not in (str, int):
        raise fault(f"id is {key!r:.40}; wanted a string or a whole number")
    if crop is not None:
        whole = isinstance(crop, list) and len(crop) == 4 and all(type(x) is int for x in crop)
        if n > 1 or not whole or not (0 <= crop[0] < crop[2] and 0 <= crop[1] < crop[3]):
            raise fault(f"crop is {crop!r:.60}; wanted [left, top, right, bottom] of one image")
    files = [find(name) for name in images]
    if crop and os.path.isfile(files[0]):
        width, height = open_image(files[0], use=lambda image: ImageOps.exif_transpose(image).size)
        if crop[2] > width or crop[3] > height:
            raise fault(f"crop is {crop}, but {files[0]} has {width} x {height} pixels")
    shown = tuple(Crop(file, tuple(crop)) if crop else file for file in files)
    return TestItem((subset,), str(key), shown, tuple(texts), true, tags=tuple(tags))


def load_own(given: str, source: Source) -> Loaded:
    """Read a user's own suite."""
    folder = Path(given.split(".py:")[0]).parent

    def find(name: str) -> str:
        paths = [os.path.join(base, name) for base in (folder, source.root or folder)]
        return next((path for path in paths if os.path.isfile(path)), paths[0])

    pairs: dict[str, bool] = {}  # whether a subset's items have a text for each image
    ids: dict[tuple[str, str], str] = {}
    for number, (place, record) in enumerate(own_records(given, source.root)):
        item = own_item(record, place, number, find)
        (subset,), pair = item.path, len(item.images) == len(item.texts)
        if pairs.setdefault(subset, pair) != pair:
            raise DataError(
                f"{place}: the subset {subset!r} mixes records that have a text for each image "
                "with others; give them subsets of their own"
            )
        if "id" in record and ids.setdefault((subset, item.id), place) != place:
            first = ids[subset, item.id]
            raise DataError(f"{place}: the id {item.id!r} stands at {first} already; change one")
        yield item


# Plain rows


def load_rows(source: Source) -> Loaded:
    """Suites of plain rows: files, fields and folders are "records" in scripts/suites.json.

    rows: file of each subset; subset: the field that names it instead. images, texts: fields (or
    numbers of columns), the true text first, `true` of them. folder: path of an image; pool: "coco"
    or "vg" instead. text_only: each item is also scored without its image. tags: fields.
    """
    fields = read_table("suites")[source.suite]["records"]
    true = fields.get("true", 1)
    for subset, file in fields["rows"].items():
        if file.endswith("/rows.jsonl"):
            unpack_parquet(source, file.split("/")[0])
        for key, row in source.rows(file):
            name = subset or re.split("[_-]", row[fields["subset"]])[0].lower()
            if "pool" in fields:
                images = tuple(getattr(source, fields["pool"])(row[x]) for x in fields["images"])
            else:
                images = tuple(
                    source.find(fields["folder"].format(row[x])) for x in fields["images"]
                )
            texts = tuple(row[text] for text in fields["texts"])
            tags = tuple(
                f"{tag} {value.strip()}"
                for tag in fields.get("tags", [])
                for value in str(row.get(tag, "")).split(",")
                if value.strip()
            )
            yield TestItem((name,), key, images, texts, true, tags=tags)
            if fields.get("text_only"):
                yield TestItem((f"{name} text-only",), key, (), texts, true)


def unpack_parquet(source: Source, folder: str) -> None:
    """At first use, unpack parquet files: images to images/, the rest to rows.jsonl.

    Raises:
        DataError: pyarrow is missing, or the folder cannot be written.
    """
    base = (source.root or Path()) / folder
    shards = sorted(base.glob("**/*.parquet"))
    if not shards or (base / "rows.jsonl").exists():
        return
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{base}: parquet needs pyarrow; pip install pyarrow") from None
    lines: list[str] = []
    try:
        (base / "images").mkdir(exist_ok=True)
        for shard in shards:
            for row in pyarrow.parquet.read_table(shard).to_pylist():
                for key, value in row.items():
                    if isinstance(value, dict) and "bytes" in value:
                        row[key] = f"{len(lines)}-{key}.png"
                        (base / "images" / row[key]).write_bytes(value["bytes"])
                lines.append(json.dumps(row, ensure_ascii=False))
        write_text(base / "rows.jsonl", "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"{base}: cannot be written ({error.strerror})") from None


# ARO


def load_aro(source: Source) -> Loaded:
    """ARO (Yuksekgonul et al., 2023): relations and attributes in a box, order of words.

    Relations are averaged over those that are not symmetric, attributes over pairs with at least
    25 items.
    """
    symmetric = set(read_table("symmetric_relations"))
    file = "aro/visual_genome_relation.json"
    rows = [(row["relation_name"], key, row) for key, row in source.rows(file)]
    yield from _boxes("VG-Relation", rows, [x for x in rows if x[0] not in symmetric], source)
    file = "aro/visual_genome_attribution.json"
    rows = [("/".join(row["attributes"]), key, row) for key, row in source.rows(file)]
    count = Counter(pair for pair, _, _ in rows)
    yield from _boxes("VG-Attribution", rows, [x for x in rows if count[x[0]] >= 25], source)
    for name, file, photos in KARPATHY:
        captions = [
            (f"{key}-{i}", row["image"], caption)
            for key, row in source.rows(f"karpathy/{file}")
            for i, caption in enumerate(source.listed(row["caption"]))
        ]
        words, tagger = tag_words([caption for _, _, caption in captions])
        if captions:
            source.notes.append(f"{name}-Order: parts of speech from {tagger}, seed {EVAL_SEED}")
        same = 0
        for (key, image, caption), tagged in zip(captions, words, strict=True):
            shuffled = shuffle_words(caption, tagged, random.Random(f"{EVAL_SEED}:{name}:{key}"))
            texts = tuple(pre_caption(text) for text in (caption, *shuffled))
            same += texts[0] in texts[1:]
            yield TestItem((f"{name}-Order",), key, (photos(source, image),), texts)
        if same:
            note = f"{same} of {len(captions)} captions have a shuffle equal to themselves"
            source.notes.append(f"{name}-Order: {note}, a tie: right only with --ties official")


def _boxes(subset: str, rows: list[Any], kept: list[Any], source: Source) -> Iterator[TestItem]:
    parts = len({part for part, _, _ in kept})
    if rows:
        official = source.expected[subset]
        odd = "" if len(rows) == official else f"; the official file has {official}"
        note = f"{len(kept)} of {len(rows)} rows count, in {parts} parts{odd}"
        source.notes.append(f"{subset}: {note}")
        lost = max(0, official - len(rows))  # any of them might have been usable
        source.expected[subset] = len(kept) + lost
    for part, key, row in kept:
        yield _boxed(subset, part, key, row, source)


def _boxed(subset: str, part: str, key: str, row: Row, source: Source) -> TestItem:
    """An item of ARO, image cropped to the box; the official order has the true text second."""
    x, y, width, height = (int(row[f"bbox_{side}"]) for side in "xywh")
    path = source.find(f"aro/images/{row['image_path']}")
    crop = Crop(path, (x, y, x + width, y + height))
    return TestItem(
        (subset, part), key, (crop,), (row["true_caption"], row["false_caption"]), place=1
    )


def _flickr(source: Source, name: str) -> str:
    file = name.split("/")[-1]
    return source.find(*(f"flickr30k/{folder}{file}" for folder in ("", "flickr30k-images/")))


KARPATHY: list[tuple[str, str, Callable[[Source, str], str]]] = [
    ("COCO", "coco_karpathy_test.json", Source.coco),
    ("Flickr30k", "flickr30k_test.json", _flickr),
]


def pre_caption(caption: str, limit: int = 30) -> str:
    """ARO's cleaning: lower case, some punctuation removed, at most `limit` words."""
    caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    return " ".join(re.sub(r"\s{2,}", " ", caption).strip().split(" ")[:limit])


Tagged = list[tuple[str, str]]


def tag_words(captions: Sequence[str]) -> tuple[list[Tagged], str]:
    """Split captions into words with "noun", "adjective" or "": spaCy's tags, else a word list.

    Without spaCy and en_core_web_sm nouns and adjectives are not distinguished: all content words
    count as nouns, and are shuffled with each other.
    """
    try:
        import spacy

        tagger = spacy.load("en_core_web_sm", exclude=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError):
        return [guess_tags(caption) for caption in captions], "a list of function words (no spaCy)"
    kinds = {"NN": "noun", "JJ": "adjective"}
    documents = tagger.pipe(captions, batch_size=256)
    tagged = [[(token.text, kinds.get(token.tag_[:2], "")) for token in doc] for doc in documents]
    return tagged, f"spaCy {spacy.__version__} en_core_web_sm"


def guess_tags(caption: str) -> Tagged:
    """Tag every word as a noun, except those in a list of function words."""
    function_words = set(read_table("function_words"))
    words = re.findall(r"[\w'-]+|[^\w\s]", caption)
    known = [w.lower() in function_words or w.endswith("ing") or not w[0].isalnum() for w in words]
    return [(word, "" if skip else "noun") for word, skip in zip(words, known, strict=True)]


def treebank_words(caption: str) -> list[str]:
    """Split a caption as nltk's word_tokenize does, from whose words ARO cuts its groups of three.

    The Penn Treebank's rule: punctuation stands alone, but full stops only at the end of a
    sentence; "isn't" is "is" and "n't"; double quotes become `` and ''.
    """
    text = re.sub(r'(^|[\s(\[{<])"', r"\1 `` ", caption)
    text = text.replace('"', " '' ")
    text = re.sub(r"(\.\.\.|--|[;@#$%&?!()\[\]{}<>]|[,:](?!\d))", r" \1 ", text)
    text = re.sub(r"(?<=[^.\s])\.(?=[\])}>'\s]*$|\s+[A-Z])", " .", text)
    text = re.sub(r"(?i)(n't|'(?:s|m|d|ll|re|ve))(?!\w)", r" \1", text)
    text = re.sub(r"(?<=\w)'(?=\s|$)", " '", text)
    return re.sub(r"(?i)\b(can)(not)\b", r"\1 \2", text).split()


def shuffle_words(caption: str, tagged: Tagged, rng: random.Random) -> list[str]:
    """ARO's four shuffles: content words, the others, within groups of three, groups of three.

    The first two take the words of the tagger, the others those of `treebank_words`.
    """
    words, pieces = [word for word, _ in tagged], treebank_words(caption)

    def shuffled(*kinds: str) -> list[str]:
        out = list(words)
        for kind in kinds:
            places = [i for i, (_, tag) in enumerate(tagged) if tag == kind]
            for i, j in zip(places, rng.sample(places, len(places)), strict=True):
                out[i] = words[j]
        return out

    threes = [pieces[i : i + 3] for i in range(0, len(pieces), 3)]
    within = [word for three in threes for word in rng.sample(three, len(three))]
    groups = [word for three in rng.sample(threes, len(threes)) for word in three]
    return [" ".join(x) for x in (shuffled("noun", "adjective"), shuffled(""), within, groups)]


# Other suites


def load_valse(source: Source) -> Loaded:
    """VALSE (Parcalabescu et al., 2022): the items that two of three annotators accepted."""
    for name in read_table("suites")["valse"]["expected"]:
        for key, row in source.rows(f"valse/{name}.json"):
            if row["mturk"]["caption"] < 2:
                continue
            file, pool = row["image_file"], row["dataset"].lower()
            if file.startswith("VisualDialog"):
                image = source.find(f"visdial/{file}")
            elif pool in ("visual7w", "swig"):
                image = source.find(f"{pool}/{file}")
            else:
                image = source.coco(file)
            yield TestItem((name,), key, (image,), (row["caption"], row["foil"]))


def load_vl_checklist(source: Source) -> Loaded:
    """VL-CheckList (Zhao et al., 2022): of each list the first 1,000 items whose photo is there.

    That is the official rule, and why its figures depend on the download. Without --allow-missing
    the first 1,000 must all be there.
    """
    there = total = 0
    for subset, lists in read_table("suites")["vl_checklist"]["lists"].items():
        for family, name in lists:
            count = seen = 0
            for key, (image, claims) in source.rows(f"vl_checklist/data/{name}.json"):
                if count == 1000:
                    break
                seen += 1
                on_vg = family in ("vg", "vaw")
                path = source.vg(image) if on_vg else source.find(f"{family}/{image}")
                found = os.path.isfile(path)
                there, total = there + found, total + 1
                if found or not source.partial:
                    count += 1
                    texts = tuple(source.listed(claims[side])[0] for side in ("POS", "NEG"))
                    yield TestItem((subset, family, name.split("/")[-1]), key, (path,), texts)
            wanted = min(seen, 1000) or 1000  # a missing list may have that many
            source.expected[subset] = source.expected.get(subset, 0) + wanted
    source.notes.append(f"images found for {there} of the {total} items looked at")


def load_whatsup(source: Source) -> Loaded:
    """What'sUp (Kamath et al., 2023): prepositions; the right caption is the first."""
    for subset, file in (("Controlled A", "images"), ("Controlled B", "clevr")):
        for key, row in source.rows(f"whatsup/controlled_{file}_dataset.json"):
            path = row["image_path"].removeprefix("data/")
            image = source.find(f"whatsup/{path}")
            yield TestItem((subset,), key, (image,), tuple(source.listed(row["caption_options"])))
    for pool in ("COCO", "VG"):
        for count in ("one", "two"):
            for key, row in source.rows(f"whatsup/{pool.lower()}_qa_{count}_obj.json"):
                number, right, wrong = row
                if pool == "COCO":
                    image = source.coco(f"{int(number):012d}.jpg")
                else:
                    names = (f"whatsup/vg_images/{number}.jpg", f"vg/VG_100K/{number}.jpg")
                    image = source.find(*names, f"vg/VG_100K_2/{number}.jpg")
                yield TestItem((f"{pool} {count}",), key, (image,), (right, wrong))


def load_negbench(source: Source) -> Loaded:
    """NegBench (Alhamoud et al., 2025): four captions with and without negation."""
    for subset in ("COCO", "VOC2007"):
        stem = {"COCO": "COCO_val", "VOC2007": "VOC2007"}[subset]
        for key, row in source.rows(f"negbench/{stem}_mcq_llama3.1_rephrased.csv"):
            captions = [row[f"caption_{i}"] for i in range(4)]
            right = int(row["correct_answer"])
            file = row["image_path"].split("/")[-1]
            image = (
                source.coco(file) if subset == "COCO" else source.find(f"negbench/voc2007/{file}")
            )
            texts = (captions[right], *captions[:right], *captions[right + 1 :])
            yield TestItem((subset,), key, (image,), texts, place=right)


def load_mmvp(source: Source) -> Loaded:
    """MMVP-VLM (Tong et al., 2024): nine visual patterns of 15 pairs; its score is "image"."""
    patterns = list(read_table("suites")["mmvp"]["expected"])
    rows: dict[int, Row] = {}
    for _, row in source.rows("mmvp/Questions.csv"):
        row.update({key.strip().lower(): row[key] for key in list(row)})
        number = str(row["question id" if "question id" in row else "id"])
        if not number.isdecimal():
            raise DataError(f"{row.place}: {number[:40]!r} is no number; download it again")
        rows[int(number)] = row
    start = 0 if 0 in rows else 1
    for first in range(start, max(rows, default=0) + 1, 2):  # 1 and 2 are a pair, 3 and 4 ...
        if first in rows and first + 1 in rows:
            two = [rows[first], rows[first + 1]]
            names = [
                f"{row['type']}/{number}"
                for row, number in zip(two, (first, first + 1), strict=True)
            ]
            images = [
                source.find(*(f"mmvp/{folder}/{name}.jpg" for folder in MMVP_FOLDERS))
                for name in names
            ]
            texts = [f"a photo of {row['statement']}" for row in two]
            pair = (first - start) // 2
            yield TestItem((patterns[min(pair // 15, 8)],), str(pair), tuple(images), tuple(texts))


MMVP_FOLDERS = ("MLLM_VLM Images", "MMVP_VLM_Images")


def load_crepe(source: Source) -> Loaded:
    """CREPE (Ma et al., 2023), productivity: hard negatives by number of atoms, in a box."""
    for subset in ("atom", "swap", "negate"):
        for atoms in range(4, 13):
            file = f"crepe/{subset}/prod_vg_hard_negs_{subset}_complexity_{atoms}.csv"
            for key, row in source.rows(file):
                x, y, width, height = (int(float(row[k])) for k in ("x", "y", "width", "height"))
                crop = Crop(source.vg(f"{row['image_id']}.jpg"), (x, y, x + width, y + height))
                texts = (row["caption"], *_texts(row["hard_negs"], row.place))
                yield TestItem((subset, str(atoms)), f"{atoms}-{key}", (crop,), texts)


def _texts(cell: str, place: str) -> list[str]:
    """A Python list of strings, written as text in a cell."""
    import ast

    try:
        texts = ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError):
        texts = None
    if isinstance(texts, list):
        return texts
    raise DataError(f"{place}: {str(cell)[:40]!r} is no list of texts; download it again")


def load_spec(source: Source) -> Loaded:
    """SPEC (Peng et al., 2024): size, position, existence and count, asked both ways."""
    for name in read_table("suites")["spec"]["expected"]:
        subset, way = name.split(" ", 1)
        file = {"image to text": "image2text", "text to image": "text2image"}[way]
        for key, row in source.rows(f"spec/{subset}/{file}.json"):
            label, options = int(row["label"]), list(source.listed(row["keys"]))
            options = [options[label], *options[:label], *options[label + 1 :]]
            one, many = (row["query"],), tuple(options)
            images, texts = (one, many) if file == "image2text" else (many, one)
            paths = tuple(source.find(f"spec/{subset}/{x}", f"spec/{x}") for x in images)
            yield TestItem((name,), key, paths, texts, place=label)


def load_imagecode(source: Source) -> Loaded:
    """ImageCoDe (Krojer et al., 2022), validation: one of ten images of a caption."""
    for key, row in source.rows("imagecode/valid_data.json"):
        subset = "static" if key.startswith("open-images") else "video"
        for number, text in row.items():
            order = [int(number), *(i for i in range(10) if i != int(number))]
            images = [source.find(f"imagecode/image-sets/{key}/img{i}.jpg") for i in order]
            yield TestItem((subset,), f"{key}-{number}", tuple(images), (text,), place=int(number))


def load_svo_probes(source: Source) -> Loaded:
    """SVO-Probes (Hendricks and Nematzadeh, 2021): the other image differs in one of three."""
    for key, row in source.rows("svo_probes/svo_probes.csv"):
        flags = [name for name in ("subj_neg", "verb_neg", "obj_neg") if row[name] == "True"]
        if len(flags) != 1:
            continue
        numbers = (row["pos_image_id"], row["neg_image_id"])
        images = tuple(source.find(f"svo_probes/images/{number}.jpg") for number in numbers)
        source.expected[flags[0]] = source.expected.get(flags[0], 0) + 1
        yield TestItem((flags[0],), key, images, (row["sentence"],))


def load_hard_positives(source: Source) -> Loaded:
    """Hard positives (Kamath et al., 2024): an edit that keeps the meaning must beat the negative.

    "correct" is their augmented accuracy, "brittle" the share where exactly one positive wins.
    """
    for subset, file in (
        ("swap", "visual_genome_attribution"),
        ("replace attribute", "vl_checklist_attributes"),
        ("replace relation", "vl_checklist_relations"),
    ):
        both = (source.rows(f"hard_positives/{d}/{file}.json") for d in ("data", "swapped_data"))
        for (key, row), (_, other) in zip(*both, strict=True):
            image: str | Crop = source.vg(row["image_path"])
            if subset == "swap":
                image = _boxed(subset, "", key, row, source).images[0]
            texts = (row["true_caption"], other["true_caption"], row["false_caption"])
            yield TestItem((subset,), key, (image,), texts, true=2)


OPPOSITES = (("left", "right"), ("on", "under"), ("in-front", "behind"))


def pairs_and_sets(suite: Suite, records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What'sUp's other figures: both opposite prepositions of two objects right, and all four.

    A photo's name says what it shows: OBJECT_PREPOSITION[_of]_OBJECT.jpeg. A pair or set of which
    a photo was not scored does not count.
    """
    sets: dict[tuple[str, str, str], dict[str, bool]] = defaultdict(dict)
    for record in records:
        if record["subset"].startswith("Controlled"):
            words = Path(record["images"][0]).stem.split("_")
            if len(words) > 2:
                sets[record["subset"], words[0], words[-1]][words[1]] = record["correct"]
    cells = {}
    for subset in ("Controlled A", "Controlled B"):
        found = [right for (name, _, _), right in sets.items() if name == subset]
        verdicts = {
            "pairs": [
                right[one] and right[two]
                for right in found
                for one, two in OPPOSITES
                if one in right and two in right
            ],
            "sets": [all(right.values()) for right in found if len(right) == 4],
        }
        for (kind, values), size in zip(verdicts.items(), (2, 4), strict=True):
            row, n = f"{subset} {kind}", len(values)
            cell = evaluate.NOTHING
            if n:
                draws = evaluate.resample("whatsup", row, {(): values})
                cell = evaluate.cell_of(sum(values) / n, draws, n, n)
            cells[row] = {**cell, "scored": n, "expected": suite.expected[subset] // size}
    return cells


def load_retrieval(source: Source) -> Loaded:
    """COCO 5K and Flickr30k 1K, Karpathy's test split, captions as they are."""
    for name, file, photos in KARPATHY:
        images: list[str] = []
        texts: list[str] = []
        image_of: list[int] = []
        for _, row in source.rows(f"karpathy/{file}"):
            texts += source.listed(row["caption"])
            image_of += [len(images)] * len(row["caption"])
            images.append(photos(source, row["image"]))
        if images:
            yield Retrieval(name, images, texts, image_of)


# Class sets


def load_zeroshot(source: Source) -> Loaded:
    """Zero-shot classification of every set below DIR/zeroshot: torchvision's or class folders."""
    yield from _class_sets(source, probe=False)


def load_probe(source: Source) -> Loaded:
    """A linear probe on the same sets, where their training split is there too."""
    yield from _class_sets(source, probe=True)


def _class_sets(source: Source, probe: bool) -> Iterator[Classes]:
    base = (source.root or Path()) / "zeroshot"
    if source.root is None or not base.is_dir():
        raise DataError(f"--root: {base} is missing; put one folder for each set into it")
    for folder in sorted(path for path in base.iterdir() if path.is_dir()):
        if folder.name.startswith("."):
            continue
        if not re.fullmatch(r"[\w .+-]+", folder.name):
            raise DataError(f"{folder}: name it with letters, digits, spaces and . + - _ only")
        known = read_table("classes").get(folder.name, {})
        if "metric" in known:
            if probe:
                source.notes.append(f"{folder.name}: is scored by ranks, no probe")
            else:
                yield _ranked(folder, known)
            continue
        test, names = class_split(folder, known, "test")
        images, labels = zip(*test, strict=True)
        prompts = _prompts(known, names)
        train: list[tuple[str, int]] = []
        if probe:
            with contextlib.suppress(FileNotFoundError):
                train = class_split(folder, known, "train")[0]
            if not train:
                source.notes.append(f"{folder.name}: no training split, no probe")
                continue
        yield Classes(
            folder.name,
            list(images),
            list(labels),
            prompts,
            bool(known.get("per_class")),
            [image for image, _ in train],
            [label for _, label in train],
        )


def _ranked(folder: Path, known: Any) -> Classes:
    """VOC 2007 or Hateful Memes, read as the ELEVATER toolkit does (Li et al., 2022).

    Raises:
        DataError: names the file, and the line that cannot be read.
    """
    read = {"map11": _read_voc, "auc": _read_memes}[known["metric"]]
    try:
        shown = read(folder, known["names"])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); see --list for its files") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: its labels are not as published ({error!r})") from None
    prompts = _prompts(known, known["names"])
    return Classes(
        folder.name, list(shown), [], prompts, shown=list(shown.values()), metric=known["metric"]
    )


def _read_voc(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """The classes in each test photo; a class with only "difficult" objects counts as absent."""
    bases = [folder / "VOCdevkit/VOC2007", folder / "test/VOCdevkit/VOC2007", folder]
    base = next((path for path in bases if (path / "ImageSets").is_dir()), bases[0])
    shown: dict[str, list[int]] = {}
    named: dict[str, int] = {}
    for label, name in enumerate(names):
        for line in (base / f"ImageSets/Main/{name}_test.txt").read_text("utf-8").splitlines():
            number, flag = line.split()
            here = shown.setdefault(str(base / f"JPEGImages/{number}.jpg"), [])
            here += [label] if int(flag) == 1 else []
            named[name] = named.get(name, 0) + 1
    short = min(names, key=lambda name: named.get(name, 0))
    if named.get(short, 0) < len(shown):
        raise DataError(
            f"{base}/ImageSets/Main/{short}_test.txt: names {named.get(short, 0)} of the "
            f"{len(shown)} photos; every class lists all of them, download it again"
        )
    return shown


def _read_memes(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """The label of each meme of the development set, on which the toolkit tests."""
    rows = parse_rows((folder / "dev_seen.jsonl").read_text("utf-8"), ".jsonl")
    if not all(row["label"] in range(len(names)) for row in rows):
        raise ValueError("a label that is neither 0 nor 1")
    return {str(folder / row["img"]): [row["label"]] for row in rows}


def class_split(folder: Path, known: Any, split: str) -> tuple[list[tuple[str, int]], list[Any]]:
    """Images with labels of SPLIT/CLASS/* or of torchvision, and the classes' names.

    Raises:
        FileNotFoundError: there is no training split.
        DataError: nothing to read, or a folder that is not a class of this set.
    """
    import open_clip
    from torchvision.datasets.folder import make_dataset

    names = (
        open_clip.IMAGENET_CLASSNAMES if known.get("names") == "open_clip" else known.get("names")
    )
    splits = {"test": ("test", "val", "validation"), "train": ("train",)}[split]
    parts = [folder / name for name in splits if (folder / name).is_dir()]
    if not parts and "torchvision" in known:
        data = torchvision_set(known["torchvision"], split, str(folder))
        names = names or [spoken_name(name) for name in data.classes]
        labels = _labels(data)
        prefix = f"torchvision:{known['torchvision']}:{split}"
        return [(f"{prefix}:{i}:{folder}", label) for i, label in enumerate(labels)], names
    if not parts:
        if split == "train":
            raise FileNotFoundError
        raise DataError(f"{folder}: holds no test/CLASS/ folders of images")
    classes = _class_folders(parts[0])
    for other in ("train", "test", "val", "validation"):
        if not names and (folder / other).is_dir():  # labels are ranks of folder names
            odd = set(classes) ^ set(_class_folders(folder / other))
            if odd:
                raise DataError(f"{folder}: the class {min(odd)} is not in every split; mend it")
    order = _class_order(classes, names, parts[0])
    kinds = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".ppm")
    pairs = make_dataset(parts[0], order, kinds, allow_empty=True)
    if not pairs:
        raise DataError(f"{parts[0]}: holds no images")
    return pairs, names or [spoken_name(name) for name in classes]


def _class_folders(split: Path) -> list[str]:
    return sorted(x.name for x in split.iterdir() if x.is_dir() and not x.name.startswith("."))


def _class_order(classes: list[str], names: Any, folder: Path) -> dict[str, int]:
    """Label of each class folder: by name, or by rank where folders are WordNet numbers."""
    if not names or all(re.fullmatch(r"n\d{8}", name) for name in classes):
        if names and len(classes) != len(names):
            raise DataError(f"{folder}: has {len(classes)} class folders, wanted {len(names)}")
        return {name: i for i, name in enumerate(classes)}
    spoken = {
        spoken_name(n if isinstance(n, str) else n[0]).lower(): i for i, n in enumerate(names)
    }
    order = {name: spoken.get(spoken_name(name).lower(), -1) for name in classes}
    strange = [name for name, label in order.items() if label < 0]
    if strange:
        near = (
            difflib.get_close_matches(spoken_name(strange[0]).lower(), spoken, 1)
            or list(spoken)[:1]
        )
        raise DataError(f"{folder / strange[0]}: is no class of this set; is it {near[0]!r}?")
    return order


def spoken_name(name: str) -> str:
    """A class folder's name as words."""
    return name.replace("_", " ")


def _prompts(known: Any, names: Sequence[Any]) -> list[list[str]]:
    """Every template with every name of a class."""
    import open_clip

    if known.get("templates") == "open_clip":
        return [[say_it(name) for say_it in open_clip.OPENAI_IMAGENET_TEMPLATES] for name in names]
    templates = known.get("templates", ["a photo of a {}."])
    many = [[name] if isinstance(name, str) else name for name in names]
    return [[template.format(name) for name in words for template in templates] for words in many]


@functools.cache
def torchvision_set(name: str, split: str, root: str) -> Any:
    """A classification set of torchvision; nothing is downloaded."""
    import torchvision.datasets

    kind = getattr(torchvision.datasets, name)
    flag: dict[str, Any] = {"split": split}
    if name.startswith(("CIFAR", "MNIST")):
        flag = {"train": split == "train"}
    elif name in ("OxfordIIITPet", "FGVCAircraft") and split == "train":
        flag = {"split": "trainval"}
    try:
        return kind(root, **flag)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root}: torchvision's {name} is not there ({error_line(error)})"
        ) from None


def _labels(data: Any) -> list[int]:
    for name in ("targets", "_labels", "labels"):
        if hasattr(data, name):
            return [int(label) for label in getattr(data, name)]
    for name in ("_samples", "samples"):
        if hasattr(data, name):
            return [int(label) for _, label in getattr(data, name)]
    return [int(data[i][1]) for i in range(len(data))]


LOADERS: dict[str, Callable[[Source], Loaded]] = {
    "aro": load_aro,
    "valse": load_valse,
    "vl_checklist": load_vl_checklist,
    "retrieval": load_retrieval,
    "zeroshot": load_zeroshot,
    "probe": load_probe,
    "whatsup": load_whatsup,
    "negbench": load_negbench,
    "mmvp": load_mmvp,
    "crepe": load_crepe,
    "spec": load_spec,
    "imagecode": load_imagecode,
    "svo_probes": load_svo_probes,
    "hard_positives": load_hard_positives,
} | {name: load_rows for name in SUITES if "records" in read_table("suites")[name]}


# What is there, and what of it was trained on


def list_suites(root: Path | None) -> None:
    """Print for each suite: items found of those expected, files, GB, how to get them, licence.

    Raises:
        DataError: the root is not a readable folder.
    """
    evaluate.check_root(root)
    sizes = download_sizes()
    for name, info in read_table("suites").items():
        expected, found, why = sum(info["expected"].values()), 0, ""
        try:
            suite = evaluate.load_suite(name, root, True)
            found = len(suite.items) + sum(
                sum(evaluate.row_sizes(x).values()) or len(x.images) for x in suite.costs
            )
            expected = max(sum(suite.expected.values()), 0 if expected else found)
        except DataError as error:
            why = f" ({error})" if root else " (pass --root DIR to look for its files)"
        if name == "shapes":
            found = expected
        state = "ready" if found and found >= expected else "partly" if found else "missing"
        of = f"{found} of {expected}" if expected else f"{found} of as many as the files hold"
        print(f"{name}: {state}, {of} items{why}\n  files: {', '.join(info['files']) or 'none'}")
        print(f"  where: {info['where']}\n  licence: {info['licence']}")
        if name != "shapes":
            print(f"  size: {sizes.get(name, 'not published')}")
            print(f"  get: ROOT={root or 'DIR'} bash scripts/paper/data.sh {name}")


def download_sizes() -> dict[str, str]:
    """For each suite that scripts/paper/data.sh fetches, the GB of its downloads, in words."""
    known: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    table = evaluate.SCRIPTS / "paper/downloads.tsv"
    for line in table.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            names, _, _, size, *_ = line.split("\t")
            for name in names.split(","):
                known[name] += int(size) if size != "-" else 0
                unknown[name] += size == "-"
    words = {}
    for name, total in known.items():
        more = f" and {unknown[name]} files of unpublished size" if unknown[name] else ""
        words[name] = f"{total / 1e9:.2f} GB{more}"
    return words


def mark_seen(result: dict[str, Any], suite: Suite, photos: Any, root: Path | None) -> None:
    """Count for each score of a suite how many of its items show a training image.

    Args:
        result: result of `summarise`; the key `seen` is added to it and to its cells.
        suite: its items and costs.
        photos: `photo_number` of each training image; None if unknown, then nothing is added.
        root: ROOT/vg/image_data.json gives the COCO ids of Visual Genome's photos.
    """
    if photos is None or suite.name == "shapes":
        return
    known, twins = set(photos.tolist()), coco_twins(root)
    seen: Counter[str] = Counter()

    def trained(image: str | Crop) -> bool:
        name = evaluate.file_of(image)
        number = Path(name).stem.removeprefix("v7w_")
        return photo_number(name) in known or photo_number(name, twins.get(number)) in known

    for item in suite.items:
        seen[item.path[0]] += any(trained(image) for image in item.images)
    for cost in suite.costs:
        flags = [
            evaluate.is_file(evaluate.file_of(image)) and trained(image) for image in cost.images
        ]
        seen[f"{cost.name} image to text"] = seen[f"zero-shot {cost.name}"] = sum(flags)
        seen[f"probe {cost.name}"] = sum(flags)
        if isinstance(cost, Retrieval):
            seen[f"{cost.name} text to image"] = sum(flags[i] for i in cost.image_of)
    for part in ("subsets", "costs"):
        for row, cell in result[part].items():
            cell["seen"] = seen[evaluate.counted_row(row, part)]
    counted = {
        evaluate.counted_row(row, part) for part in ("subsets", "costs") for row in result[part]
    }
    total = sum(seen[stem] for stem in counted)
    result["seen"] = f"{total} items show one of its {len(known)} training images"


@functools.cache
def coco_twins(root: Path | None) -> dict[str, str]:
    """The COCO id, as "coco ID", of each photo of Visual Genome that is also in COCO."""
    try:
        table = json.loads(((root or Path()) / "vg/image_data.json").read_text(encoding="utf-8"))
        return {str(x["image_id"]): f"coco {x['coco_id']}" for x in table if x.get("coco_id")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}

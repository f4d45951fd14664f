# SPDX-License-Identifier: MIT
"""Rewrite captions into hard negatives: sentences in the same words, or one edit away, but false.

"A man riding a brown horse on the beach." becomes up to four sentences, one of each type:

  relation   two noun phrases change places, or a link becomes one that contradicts it
  attribute  the attributes of two nouns change places, or one becomes another of its set
  object     a noun becomes another of its kind
  action     a verb becomes another in the same form that excludes it

A caption is tagged, its noun phrases are found, and all edits that grammar allows are proposed.
Edits that may be true by another caption of the image are dropped.  The rest are drawn by two
scores: how well the new words fit their neighbours, by counts over the file, and how hard the
negative is to detect for an adversarial classifier on 1-, 2- and 3-grams.  If no edit is left, the
negative is null, and --stats names the rule.  All words are in scripts/words.txt.

  python negatives.py captions.json --out negatives.jsonl --stats
  python negatives.py --text "A man riding a brown horse on the beach."

CAPTIONS is a manifest (.jsonl), a COCO or Karpathy .json, a .csv or .tsv with a header, or "-"
for lines on stdin.  The output has a header line, then one JSON record for each caption.  An
interrupted run resumes.  Webdataset shards (.tar) are written as shards to the folder --out, with
negatives in the .json of each sample; torchrun and SLURM ranks divide the shards.

Chapters: words; reading a caption; proposals; writing; truth; one caption; counts; captions on
disk; engines; a language model; the command; interrupted runs; shards.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import difflib
import errno
import functools
import gc
import hashlib
import http.client
import io
import itertools
import json
import os
import queue
import random
import re
import socket
import sys
import tarfile
import threading
import time
import urllib.parse
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import inf, isnan
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

try:
    import numpy as np
except ImportError:  # --text needs only the standard library
    np = None  # type: ignore[assignment]

__all__ = [
    "NEGATIVE_TYPES",
    "DataError",
    "Negative",
    "Options",
    "learn",
    "make_negatives",
    "read_captions",
    "rewrite",
]

NEGATIVE_TYPES = ("relation", "attribute", "object", "action")
WORDS = Path(__file__).parent / "scripts" / "words.txt"
TAGGER = Path(__file__).parent / "scripts" / "tagger.bin"
MAX_WORDS = 60  # CLIP reads 77 tokens; a later edit would be cut off

# Words

Rows = dict[str, list[tuple[str, str]]]


@dataclass(slots=True)
class Words:
    """The content of scripts/words.txt; all words are lower-case."""

    sets: dict[str, frozenset[str]]  # sections that are lists of words
    kinds: dict[str, str] = field(default_factory=dict)  # of a noun: "animal.pet"
    nouns: dict[str, tuple[str, str]] = field(default_factory=dict)  # form: lemma, tag N or S
    forms: dict[tuple[str, str], str] = field(default_factory=dict)  # lemma, tag: form
    verbs: dict[str, tuple[str, str]] = field(default_factory=dict)  # form: lemma, tag B, Z or G
    same: dict[str, str] = field(default_factory=dict)  # word: name of its synonym set
    things: dict[str, tuple[str, ...]] = field(default_factory=dict)  # noun: its replacements
    values: dict[str, list[tuple[list[str], list[str]]]] = field(default_factory=dict)
    dimensions: dict[str, str] = field(default_factory=dict)  # of a value, such as colour
    links: dict[str, list[tuple[list[str], list[str]]]] = field(default_factory=dict)
    free: list[tuple[list[str], dict[str, list[str]]]] = field(default_factory=list)
    participles: list[tuple[list[str], dict[str, list[str]]]] = field(default_factory=list)
    done_to: list[tuple[list[str], list[str], list[str]]] = field(default_factory=list)
    together: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    compounds: dict[tuple[str, ...], list[tuple[list[str], str]]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)  # of compounds
    sexes: dict[str, set[str]] = field(default_factory=dict)  # of a noun: M or F
    personal: dict[str, set[str]] = field(default_factory=dict)  # pronouns of M and F
    movers: dict[str, str] = field(default_factory=dict)  # people and animals: N or S
    places: set[str] = field(default_factory=set)
    fixed: set[str] = field(default_factory=set)  # nouns that are never exchanged


def _items(text: str, mark: str = ",") -> list[str]:
    return [item.strip() for item in text.split(mark) if item.strip()]


def _tables(lines: list[tuple[str, str]]) -> list[tuple[list[str], dict[str, list[str]]]]:
    """Rows "kinds: old old > new new | ..." as kinds and the replacements of each old word."""
    tables = []
    for kinds, line in lines:
        groups = [group.partition(">") for group in line.split("|")]
        table = {word: new.split() for old, _, new in groups for word in old.split()}
        tables.append((kinds.split(), table))
    return tables


@functools.cache
def words() -> Words:
    """Read scripts/words.txt, once: [sections] of "key: value"; indented lines continue a row."""
    rows: Rows = {}
    text = re.sub(r"\n[ \t]+", " ", WORDS.read_text(encoding="utf-8"))
    for line in text.splitlines():
        if line.startswith("["):
            section = rows.setdefault(line[1 : line.index("]")], [])
        elif line and line[0] != "#":
            key, _, value = line.rpartition(": ")
            section.append((key, value))
    lists = {name: " ".join(value for _, value in lines) for name, lines in rows.items()}
    lists |= dict(rows["grammar"])
    known = Words({n: frozenset(w.replace("_", " ") for w in t.split()) for n, t in lists.items()})
    known.sexes |= {w: {sex} for sex, line in rows["sexes"] for w in line.split()}
    known.personal |= {sex: set(line.split()) for sex, line in rows["personal"]}
    for reader in (_read_things, _read_forms, _read_values, _read_links, _read_acts):
        reader(rows, known)
    compounds = {word: tag for word, (_, tag) in known.nouns.items()}
    compounds |= dict.fromkeys(known.links, "P") | {w: tag for w, (_, tag) in known.verbs.items()}
    compounds |= {
        word.replace("_", " "): tag for tag, line in rows["fixed"] for word in line.split()
    }
    for word in sorted((w for w in compounds if " " in w), key=lambda w: (-w.count(" "), w)):
        first, second, *rest = word.split()
        known.compounds.setdefault((first, second), []).append((rest, word))
        known.tags[word] = compounds[word]
    return known


def _read_things(rows: Rows, known: Words) -> None:
    """Nouns: kinds, synonyms, and replacements of each."""
    mass = set(known.sets["mass"])
    heads: dict[str, list[str]] = defaultdict(list)  # by class, of groups that exclude each other
    known.kinds |= {word: kind for kind, line in rows["other things"] for word in line.split()}
    for name, line in rows["things"]:
        for group in line.split(";"):
            source, _, target = group.partition(">")
            poles = [_items(pole, "/") for pole in _items(source)]
            for pole in poles:
                others = _items(target) or [w for p in poles if p is not pole for w in p]
                for word in (w.lstrip("~") for w in pole):
                    known.things[word] = (*known.things.get(word, ()), *others)
                    known.kinds.setdefault(word, name.rstrip("*"))
                    known.same.setdefault(word, pole[0].lstrip("~"))
            words_of = [word.lstrip("~") for pole in poles for word in pole]
            mass.update(words_of if name.endswith("*") else ())
            top = name.partition(".")[0]
            if top in known.sets["exclusive"] and not target and not name.endswith("*"):
                heads[top] += [pole[0] for pole in poles]
    known.sets["mass"] = frozenset(mass)
    for _, line in rows["same"]:
        for group in line.split(";"):
            known.same |= dict.fromkeys(_items(group), _items(group)[0])
    for word, own in known.things.items():
        named = {head.lstrip("~") for top in heads for head in heads[top]}
        more = heads[known.kinds[word].partition(".")[0]] if known.same[word] in named else []
        new = dict.fromkeys(w for w in (*own, *more) if w[0] != "~")
        known.things[word] = tuple(w for w in new if known.same.get(w) != known.same[word])


def _read_forms(rows: Rows, known: Words) -> None:
    """Nouns in singular and plural, and which may be exchanged."""
    irregular = dict(pair.split(":") for _, line in rows["plurals"] for pair in line.split())
    always = known.sets["plural only"]
    for word in known.kinds:
        if word not in always:
            known.forms[word, "N"] = word
        if word not in known.sets["mass"]:
            known.forms[word, "S"] = word if word in always else _plural(word, irregular)
    known.nouns |= {form: key for key, form in known.forms.items()}
    still = known.sets["no exchange"]
    known.fixed |= {w for w, k in known.kinds.items() if is_kind(k, still)} | known.sets["kept"]
    for form, (word, tag) in known.nouns.items():
        if is_kind(known.kinds[word], ("person", "animal")):
            known.movers[form] = tag
        if is_kind(known.kinds[word], ("place",)):
            known.places.add(form)


def _plural(noun: str, irregular: dict[str, str]) -> str:
    head, _, last = noun.rpartition(" ")
    if last in irregular:
        last = irregular[last]
    elif re.search(r"([sxz]|ch|sh|[tg]o)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last = last[:-3] + "men" if last.endswith("man") else last + "s"
    return f"{head} {last}".strip()


def _read_values(rows: Rows, known: Words) -> None:
    for name, line in rows["values"]:
        label, _, kinds = name.partition("@")
        for number, group in enumerate(line.split(";")):
            poles = [pole.split() for pole in group.split("|")]
            for pole in poles:
                others = [
                    w.replace("_", " ") for p in poles if p is not pole for w in p if w[0] != "~"
                ]
                for word in (w.lstrip("~").replace("_", " ") for w in pole):
                    known.values.setdefault(word, []).append((kinds.split() or ["*"], others))
                    known.dimensions.setdefault(word, f"{label}{number}")
                    known.same.setdefault(word, pole[0].lstrip("~"))


def _read_links(rows: Rows, known: Words) -> None:
    for names, line in rows["links"]:
        parts = [group.split("=") for group in line.split("|")]
        for word in _items(names):
            known.links[word] = [(left.split(), _items(right)) for left, right in parts]
            known.same.setdefault(word, _items(names)[0])


def _read_acts(rows: Rows, known: Words) -> None:
    known.free, known.participles = _tables(rows["free"]), _tables(rows["participles"])
    for left, line in rows["done to"]:
        who, _, what = left.rpartition(" > ")
        known.done_to.append((who.split() or ["person"], what.split(), line.split()))
    for _, line in rows["together"]:
        for group in line.split(";"):
            for act in group.split():
                known.together[act].update(group.split())
    free = [table for _, table in known.free]
    known.sets["free acts"] = frozenset(act for table in free for act in table)
    acts = {*known.sets["acts"], *known.together, *known.sets["free acts"]}
    acts |= {act for table in free for new in table.values() for act in new}
    acts |= {act for _, _, line in known.done_to for act in line}
    for act in sorted(acts):
        for tag in "BZG":
            form = inflect(act, tag, known.sets["doubled"])
            known.verbs[form] = act, tag
            if act in known.sets["lying down"]:
                known.verbs[f"{form} down"] = act, tag


def inflect(verb: str, tag: str, doubled: frozenset[str]) -> str:
    """Form G (riding), Z (rides) or B (ride) of a verb."""
    if tag == "G" and verb in doubled:
        return verb + verb[-1] + "ing"
    if tag == "G":
        return re.sub(r"(?<=[^eo])e$", "", re.sub("ie$", "y", verb)) + "ing"
    if tag == "Z" and re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    if tag == "Z":
        return verb + ("es" if re.search(r"([sxzo]|ch|sh)$", verb) else "s")
    return verb


def is_kind(kind: str, wanted: Iterable[str], word: str = "") -> bool:
    """Whether a thing matches one of some kinds or words; "*" is any, "?" an unknown kind."""
    top = kind.partition(".")[0]
    return any(
        w in ("*", kind, top) or w.replace("_", " ") == word or (w == "?" and not kind)
        for w in wanted
    )


# Reading a caption

WORD = re.compile("[^\\W_]+(?:['\u2019-][^\\W_]+)*|[^\\w\\s]|_")
# H possessive, D determiner, M number, A adjective, N S noun in singular and plural, O dog's,
# G Z B E riding, rides, ride, ridden, I auxiliary, P preposition, L particle, T to, C and or but,
# W who that while, Q pronoun, R adverb, "." mark, X anything else.
TAGS = "DHMANSGZBEIPTLCWQRO.X"
ROWS = 2**15  # of tagger weights
# The tagger's features: relative positions of whole words, and of word endings.
WINDOWS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((0,), ()), ((-1, 0), ()), ((0, 1), ()), ((-1, 1), ()), ((-2, 0), ()), ((0, 2), ()),
    ((), (0,)), ((), (-1, 0)), ((), (0, 1)), ((), (-1, 0, 1)),
    ((-1,), (0,)), ((1,), (0,)), ((-1,), (0, 1)), ((-2, -1), (0,)), ((1, 2), (0,)),
)  # fmt: skip
MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
NOUN_PHRASE = re.compile(
    r"[DH]*(?:M[,]?)*(?:NE(?=[NS])|R?[AME](?:,|&|,&)?(?=[AMENSG])|(?<=[DHAM])G(?=[ANS])|[NSO](?=[NSO]))*[NS]"
)


@dataclass(slots=True, eq=False)
class Phrase:
    """A noun phrase [first, stop), and its head with lemma and kind."""

    first: int
    stop: int
    head: int
    noun: str
    kind: str
    plural: bool


@dataclass(slots=True, eq=False)
class Sentence:
    """A tokenised and tagged caption."""

    text: str
    words: list[str]  # lower-cased; a compound such as "next to" is one word
    spans: list[tuple[int, int]]  # in the text
    tags: str = ""  # one letter a word, see TAGS
    chunks: list[tuple[int, int]] | None = None  # noun phrases that spaCy found
    phrases: list[Phrase] = field(default_factory=list)


def split(text: str) -> Sentence:
    """Words and marks of a caption."""
    lowered = text.lower()
    found = list(WORD.finditer(lowered if len(lowered) == len(text) else text))[:MAX_WORDS]
    names, spans = [m[0] for m in found], [m.span() for m in found]
    compounds, gone = words().compounds, 0
    for i in [i for i, pair in enumerate(itertools.pairwise(names)) if pair in compounds]:
        at = i - gone
        for rest, whole in compounds.get(tuple(names[at : at + 2]), ()) if at >= 0 else ():
            stop = at + 2 + len(rest)
            if names[at + 2 : stop] == rest:
                spans[at:stop] = [(spans[at][0], spans[stop - 1][1])]
                names[at:stop] = [whole]
                gone += stop - at - 1
                break
    return Sentence(text, names, spans)


def hashes(word: str) -> tuple[int, int]:
    """32-bit hashes of a word and of its ending."""
    shape = "d" if word[0].isdigit() else "-" if "-" in word else ""
    ending = f"{word[-3:]}{shape}{min(len(word), 4)}"
    return crc(word), crc(ending)


def crc(text: str) -> int:
    """A 32-bit hash that is the same on every machine."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


@functools.cache
def tagger_weights() -> bytes:
    """[ROWS, len(TAGS)] int8, distilled by scripts/train_tagger.py."""
    return zlib.decompress(TAGGER.read_bytes())


def tag_plain(s: Sentence) -> None:
    """Tag one caption without numpy; `tag_words` does the same for many."""
    weights, size = tagger_weights(), len(TAGS)
    pairs = [(0, 0), (0, 0), *map(hashes, s.words), (0, 0), (0, 0)]
    for i in range(2, len(pairs) - 2):
        scores = [0] * size
        for f, (whole, endings) in enumerate(WINDOWS, 1):
            seen = [pairs[i + o][0] for o in whole] + [pairs[i + o][1] for o in endings]
            total = f * 0x27D4EB2F + sum(a * b for a, b in zip(seen, MULTIPLIERS, strict=False))
            total &= 0xFFFFFFFF
            total = (total ^ (total >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
            at = size * (total * ROWS >> 32)
            row = weights[at : at + size]
            scores = [score + (w ^ 128) - 128 for score, w in zip(scores, row, strict=True)]
        s.tags += TAGS[scores.index(max(scores))]
    fix_tags(s)


def fix_tags(s: Sentence) -> None:
    """Compounds have the tags of words.txt; what dogs do is a verb (dogs run, a dog runs)."""
    known, before = words(), ""
    for i, word in enumerate(s.words):
        tag = s.tags[i]
        if " " in word:
            tag = known.tags[word]
        elif word.endswith(("'s", "\u2019s")) and len(word) > 2:
            tag = "O"
        elif tag in "NS" and before in known.movers and known.movers[before] + tag in ("SN", "NS"):
            tag = known.verbs.get(word, ("", tag))[1].replace("G", tag)
        if tag != s.tags[i]:
            s.tags = s.tags[:i] + tag + s.tags[i + 1 :]
        before = word


def tag_with_spacy(pipeline: Any, sentences: Sequence[Sentence]) -> None:
    """Tags from spaCy, and noun phrases if its pipeline has a parser."""
    docs = pipeline.pipe([s.text for s in sentences])
    for s, doc in zip(sentences, docs, strict=True):
        spans = [doc.char_span(*span, alignment_mode="expand") for span in s.spans]
        s.tags = "".join(
            "I" if x[-1].pos_ == "AUX" else FINE.get(x[-1].tag_) or COARSE.get(x[-1].pos_, "X")
            for x in spans
        )
        fix_tags(s)
        if doc.has_annotation("DEP"):
            starts = {span[0]: i for i, span in enumerate(s.spans)}
            stops = {span[1]: i + 1 for i, span in enumerate(s.spans)}
            ends = [(starts.get(c.start_char), stops.get(c.end_char)) for c in doc.noun_chunks]
            s.chunks = [(a, b) for a, b in ends if a is not None and b and s.tags[b - 1] in "NS"]


FINE = {"VBG": "G", "VBZ": "Z", "VB": "B", "VBP": "B", "VBN": "E", "VBD": "E", "PRP$": "H"}
FINE |= {"NN": "N", "NNP": "N", "NNS": "S", "NNPS": "S", "TO": "T", "WDT": "W", "WP": "W"}
FINE |= {"WRB": "W", "RP": "L", "POS": "O", "WP$": "W", "EX": "Q"}
COARSE = {"AUX": "I", "DET": "D", "NUM": "M", "ADJ": "A", "ADP": "P", "CCONJ": "C", "PRON": "Q"}
COARSE |= {"SCONJ": "W", "ADV": "R", "PUNCT": ".", "SYM": ".", "PART": "R"}


def find_phrases(s: Sentence) -> None:
    """Fill in noun phrases from left to right: determiners, modifiers, nouns."""
    known, tags = words(), s.tags
    marks = {",": ",", **dict.fromkeys(known.sets["coordinators"], "&")}
    if not marks.keys().isdisjoint(s.words):
        tags = "".join([marks.get(word, tag) for word, tag in zip(s.words, tags, strict=True)])
    found = s.chunks or [match.span() for match in NOUN_PHRASE.finditer(tags)]
    for first, stop in found:
        head = s.words[stop - 1]
        noun, tag = known.nouns.get(head, (head, s.tags[stop - 1]))
        if known.forms.get((noun, "N")) == head:  # one sheep, two sheep
            tag = "N" if s.words[first] in known.sets["articles"] else s.tags[stop - 1]
        kind = known.kinds.get(noun, "")
        s.phrases.append(Phrase(first, stop, stop - 1, noun, kind, tag == "S"))
    for one, two in zip(s.phrases[-2::-1], s.phrases[:0:-1], strict=True):
        joint = s.words[one.stop : two.first]
        if one.noun in known.sets["measures"] and len(joint) == 1 and _has(joint, "partitive"):
            one.kind = two.kind  # a group of dogs is an animal


def _has(found: Iterable[str], section: str) -> bool:
    """Whether one of some words is in a section of words.txt."""
    return not words().sets[section].isdisjoint(found)


Edit = tuple[int, int, str]  # start, end, new text
Tagger = Callable[[list[Sentence]], None]  # fills in tags, and chunks if it finds any


class Negative(NamedTuple):
    """A hard negative and its edits, or the rule that excluded every candidate."""

    text: str | None
    edits: tuple[Edit, ...]
    how: str  # "exchange", "replace", "instead of exchange" if one was legal, or why there is none


class Options(NamedTuple):
    """How negatives are drawn."""

    types: tuple[str, ...] = NEGATIVE_TYPES
    seed: int = 0
    exchange: float = 0.6  # probability of an exchange where both kinds are legal
    plausible: float = -2.0  # least fit of a new word with any neighbour, in nats
    refine: float = inf  # largest classifier log odds of a negative, in nats
    tagger: Tagger | None = None  # spaCy's; None for the one of this file


# Proposals: every edit that grammar and the tables allow


class Swap(NamedTuple):
    """Replace the word at a place by one of the options."""

    at: int
    options: tuple[str, ...]
    attest: str = ""  # neighbours that the new word must occur with: p(revious), n(ext)
    noun: str = ""  # the thing after a link


class Exchange(NamedTuple):
    """Exchange two spans of words: first word, the one after the last, head."""

    one: tuple[int, int, int]
    two: tuple[int, int, int]
    ends: tuple[int, int]  # for the truth check: link and 0, or the nouns of two attributes

    @property
    def heads(self) -> tuple[int, int]:
        """Places of both heads."""
        return self.one[2], self.two[2]


Proposal = tuple[list[Swap], list[Exchange], str]  # the text says why a list is empty


def propose_relation(s: Sentence) -> Proposal:
    """Exchange two noun phrases around a link, or replace a link by one that contradicts it."""
    exchanges, reason = [], "no two noun phrases with a link between them"
    groups = group_phrases(s)
    refused = [refuse_group(s, group) for group in groups]
    for k, one in enumerate(groups):
        for j in range(k + 1, min(k + 4, len(groups))):
            why = refused[k] or refused[j] or refuse_exchange(s, one, groups[j])
            if not why:
                exchanges.append(exchange_phrases(s, one, groups[j]))
            elif j == k + 1:
                reason = why
    living = [x for x in exchanges if all(s.words[head] in words().movers for head in x.heads)]
    places = [x for x in exchanges if not any(s.words[h] in words().places for h in x.heads)]
    leading = [x for x in exchanges if x.one[2] == exchanges[0].one[2]]
    return swap_links(s), living or list(dict.fromkeys(leading + places)), reason


def group_phrases(s: Sentence) -> list[list[Phrase]]:
    """Noun phrases that move together: lists, and "a group of dogs"."""
    groups: list[list[Phrase]] = []
    for phrase in s.phrases:
        joint = s.words[groups[-1][-1].stop : phrase.first] if groups else []
        if _has([" ".join(joint)], "joins"):
            groups[-1].append(phrase)
        else:
            groups.append([phrase])
    return groups


def refuse_group(s: Sentence, group: list[Phrase]) -> str:
    """Why a group of noun phrases can never be exchanged, "" if it can."""
    known, first, stop = words(), group[0].first, group[-1].stop
    if OWNED.search(s.tags, max(first - 1, 0), stop):
        return "a noun phrase has an owner"
    whole = group[:1] if is_measure(s, group) or (group[0].kind == "part" and _of(s, group)) else []
    if any(p.noun in known.fixed for p in group[len(whole) :]):
        return "a noun phrase names a part, a place in the image or a measure"
    around = s.words[max(first - 1, 0) : first]
    verb = s.tags[stop + 1 : stop + 2] in VERBAL and s.words[stop + 1] not in known.nouns
    around += [] if verb else s.words[stop : stop + 1]
    if _has(around, "listed"):
        return "a noun phrase is part of a list that is not understood"
    return ""


def _of(s: Sentence, group: list[Phrase]) -> bool:
    return len(group) > 1 and _has([s.words[group[0].stop]], "partitive")


def is_measure(s: Sentence, group: list[Phrase]) -> bool:
    """Whether a group begins as "a group of" does."""
    return group[0].noun in words().sets["measures"] and _of(s, group)


def refuse_exchange(s: Sentence, ones: list[Phrase], twos: list[Phrase]) -> str:
    """Why two groups of noun phrases may not be exchanged, "" if they may."""
    sets, one, two = words().sets, ones[0], twos[0]
    start, stop = ones[-1].stop, two.first
    start += s.words[start] in sets["relative"]
    between, tags = s.words[start:stop], s.tags[start:stop]
    if NO_LINK.search(tags) or not LINK.search(tags):
        return "what stands between the noun phrases is no simple link"
    if one.noun == two.noun:
        return "both noun phrases name the same"
    links = [between[m.start()] for m in LINK.finditer(tags)]
    if links[-1] in sets["symmetric"]:
        return "the link between the noun phrases holds both ways or takes no exchange"
    if between[-1] in sets["bound"] or _has(s.words[: one.first][-1:], "comitative"):
        return "the link before a noun phrase belongs to it"
    there = s.words[max(one.first - 2, 0)] in sets["existential"]
    if there and s.words[two.first] in sets["definite"]:
        return "there is no such thing as the other noun phrase"
    if FINITE.search(s.tags, start) or (one.first and s.tags[one.first - 1] == "I"):
        many = [
            g[0].plural or s.words[g[-1].first - 1] in sets["coordinators"] for g in (ones, twos)
        ]
        if many[0] != many[1] or is_measure(s, ones) or is_measure(s, twos):
            return "the number of a noun phrase would not agree with its verb"
    if is_bare(s, one) != is_bare(s, two):
        return "only one of the noun phrases has an article"
    if PRONOUN.search(s.tags, start):
        return "a pronoun behind them would change its meaning"
    return ""


def is_bare(s: Sentence, p: Phrase) -> bool:
    """Whether a noun phrase lacks the article that it needs."""
    return s.tags[p.first] not in "DHM" and not p.plural and p.noun not in words().sets["mass"]


def exchange_phrases(s: Sentence, *groups: list[Phrase]) -> Exchange:
    """The exchange of two groups; if both begin with the same article, the articles stay."""
    stay = groups[0][0].plural == groups[1][0].plural and len(groups[0]) == len(groups[1]) == 1
    begin, sets = {s.words[g[0].first] for g in groups}, words().sets
    stay &= begin <= sets["articles"] or begin <= sets["definite"]
    one, two = ((g[0].first + stay, g[-1].stop, g[0].head) for g in groups)
    return Exchange(one, two, (groups[1][0].first - 1, 0))


def swap_links(s: Sentence) -> list[Swap]:
    """Links before a noun phrase, with the links that contradict them."""
    known, swaps = words(), []
    for before, phrase in itertools.pairwise(s.phrases):
        i = phrase.first - 1
        verb, next_to = s.tags[i] != "P", before.stop == i
        if s.words[i] not in known.links or phrase.noun in known.sets["kept"] or s.tags[i] in "ZBE":
            continue
        if verb and not (next_to or s.tags[i - 1] == "I"):
            continue
        if verb and any(p.kind == "body" for p in s.phrases if p.first > i):
            continue  # holding a bat in his hands
        if _has(s.words[i:], "anaphors"):
            continue  # a table with a lamp on it
        if verb and not known.sets["paths"].isdisjoint(s.words[phrase.stop : phrase.stop + 1]):
            continue  # pulling a cart past a tree
        options = contradictions(
            s.words[i], before.kind if next_to else "", phrase.kind, phrase.noun
        )
        doer = next_to and before.kind and before.first < 2
        options = tuple(
            w for w in options
            if w not in known.verbs
            or (doer and any(known.verbs[w][0] in acts for acts in acts_on(before, phrase)))
        )  # fmt: skip
        if options:
            acts = known.verbs.get(s.words[i - 1], ("", ""))[0] in known.sets["free acts"]
            attest = "p" if s.tags[i - 1] in "GZBEALRW" and not acts else ""
            attest += "n" if is_bare(s, phrase) else ""
            swaps.append(Swap(i, options, attest, phrase.noun))
    return swaps


@functools.cache
def contradictions(link: str, before: str, kind: str, noun: str) -> tuple[str, ...]:
    """Links that contradict one between two things; a row may name the class of the first."""
    links = words().links
    rows = links.get(f"{before.partition('.')[0]} {link}", links[link])
    return tuple(next((new for kinds, new in rows if is_kind(kind, kinds, noun)), ()))


def acts_on(who: Phrase, what: Phrase) -> list[list[str]]:
    """Rows of verbs that a thing of one kind can do to a thing of another kind."""
    rows = rows_of(0, who.kind, who.noun) & rows_of(1, what.kind, what.noun)
    return [words().done_to[i][2] for i in sorted(rows)]


@functools.cache
def rows_of(column: int, kind: str, noun: str) -> frozenset[int]:
    """Rows of acts whose subject (column 0) or object (column 1) may be such a thing."""
    rows = enumerate(words().done_to)
    return frozenset(i for i, row in rows if is_kind(kind, row[column], noun))


def propose_attribute(s: Sentence) -> Proposal:
    """Exchange the attributes of two nouns, or replace a value by another of its set."""
    known, swaps, exchanges = words(), [], []
    sites: list[tuple[int, Phrase]] = []
    for phrase in s.phrases:
        for i in range(phrase.first, phrase.head):
            if s.words[i] in known.values and s.tags[i] in "AMNSEGD":
                options = other_values(s.words[i], phrase.kind, phrase.noun)
                counted = known.dimensions[s.words[i]] == "count0"
                if counted and (
                    not phrase.plural or s.words[phrase.stop : phrase.stop + 1] == [","]
                ):
                    continue  # two children, a boy and a girl
                verb = FINITE.search(s.tags, phrase.stop)
                single = verb and (
                    verb[0] == "Z" or s.words[verb.start()] in known.sets["singular"]
                )
                if s.tags[i] == "D" and single:
                    continue  # a group of dogs is
                if options:
                    swaps.append(Swap(i, options, "N" if i + 1 < phrase.head else ""))
                    sites.append((i, phrase))
    for (i, one), (j, two) in itertools.combinations(sites, 2):
        alike = known.dimensions[s.words[i]] == known.dimensions[s.words[j]]
        same = known.same[s.words[i]] == known.same[s.words[j]]
        if one is not two and one.noun != two.noun and alike and not same:
            exchanges.append(Exchange((i, i + 1, i), (j, j + 1, j), (one.head, two.head)))
    return swaps, exchanges, "no attribute that words.txt knows"


@functools.cache
def other_values(value: str, kind: str, noun: str) -> tuple[str, ...]:
    """Values that contradict a given one, for a thing of this kind."""
    rows = words().values[value]
    rows = [row for row in rows if kind != "picture" or row[0] != ["*"]]
    new = [w for kinds, values in rows if is_kind(kind, kinds, noun) for w in values]
    return tuple(dict.fromkeys(new))


def propose_object(s: Sentence) -> Proposal:
    """Replace the head of a noun phrase by another thing of its kind."""
    known, swaps = words(), []
    sexes = {sex for sex in "MF" if not known.personal[sex].isdisjoint(s.words)}
    room = any(p.kind == "place.room" for p in s.phrases)
    for p in s.phrases:
        if room and is_kind(p.kind, known.sets["furnishing"]) and p is not s.phrases[0]:
            continue  # a kitchen with a stove may well have a refrigerator
        options = other_things(p.noun, "S" if p.plural else "N")
        if sexes and p.kind.startswith("person"):
            options = tuple(w for w in options if known.sexes.get(w, sexes) == sexes)
        if options and sum(p.noun == other.noun for other in s.phrases) == 1:
            bare = not p.plural and s.tags[p.first] not in "DHM" and p.first == p.head
            joined = p.head > p.first and s.tags[p.head - 1] in "NSGE"
            attest = "p" if bare else "P" if joined else ""
            attest += "n" if _has(s.words[p.stop : p.stop + 1], "partitive") else ""
            swaps.append(Swap(p.head, options, attest))
    return swaps, [], "no noun that words.txt knows"


@functools.cache
def other_things(noun: str, tag: str) -> tuple[str, ...]:
    """Nouns in the same number that may replace a noun."""
    known = words()
    others = known.things.get(noun, ()) if noun not in known.sets["kept"] else ()
    return tuple(known.forms[w, tag] for w in others if (w, tag) in known.forms)


def propose_action(s: Sentence) -> Proposal:
    """Replace a verb by another one in the same form that cannot be true as well."""
    known, swaps = words(), []
    starts = {p.first: p for p in s.phrases}
    inside = {i for p in s.phrases for i in range(p.first, p.stop)}
    for i, word in enumerate(s.words):
        if s.tags[i] not in "GZBE" or i in inside:
            continue
        subjects = [p for p in reversed(s.phrases) if p.stop <= i]
        for who, done in known.participles if subjects and s.tags[i] in "EG" else ():
            if word in done and is_kind(subjects[0].kind, who, subjects[0].noun):
                swaps.append(Swap(i, tuple(done[word])))
                break
        verb, form = known.verbs.get(word, ("", ""))
        what = starts.get(i + 1)
        after = what.stop if what else i + 1
        if form != s.tags[i] or s.tags[after : after + 1] in ("L", "Q", "T"):
            continue
        if form == "B" and i and s.tags[i - 1] == "T" and not what:
            continue  # about to swim
        for subject in subjects:
            options = (
                acts_done(verb, form, subject, what)
                if what
                else acts_free(verb, form, subject.kind, subject.noun)
            )
            if not known.sets["paths"].isdisjoint(s.words[after : after + 1]):
                options = tuple(w for w in options if known.verbs[w][0] in known.sets["moving"])
            if options:
                behind = s.words[after] if after < len(s.words) else "."
                anywhere = (
                    what
                    or s.tags[after : after + 1] not in ("P", "L", "R")
                    or behind in known.sets["anywhere"]
                )
                swaps.append(Swap(i, options, "" if anywhere else "n"))
                break
    return swaps, [], "no verb that words.txt knows with who does it and to what"


@functools.cache
def acts_free(verb: str, form: str, kind: str, noun: str) -> tuple[str, ...]:
    """Replacement verbs without an object, for a subject of this kind."""
    tables = (acts for who, acts in words().free if is_kind(kind, who, noun))
    return inflected(form, *next(tables, {}).get(verb, ()))


def acts_done(verb: str, form: str, who: Phrase, what: Phrase) -> tuple[str, ...]:
    """Replacement verbs with an object, for a subject and an object of these kinds."""
    together = words().together.get(verb, ())
    if not any(verb in words().done_to[i][2] for i in rows_of(0, who.kind, who.noun)):
        return ()
    acts = (v for row in acts_on(who, what) for v in row)
    return inflected(form, *(v for v in acts if v != verb and v not in together))


@functools.cache
def inflected(form: str, *acts: str) -> tuple[str, ...]:
    """Verbs in one form."""
    return tuple(inflect(act, form, words().sets["doubled"]) for act in dict.fromkeys(acts))


PROPOSE: dict[str, Callable[[Sentence], Proposal]] = {
    "relation": propose_relation,
    "attribute": propose_attribute,
    "object": propose_object,
    "action": propose_action,
}
OWNED, NO_LINK, FINITE, PRONOUN = (re.compile(x) for x in ("[HO]", "[WCQX.]|PG", "[IZB]", "[HQ]"))
LINK = re.compile("P|[GZBE](?![GZBERP])|I$")  # the word that decides: a preposition, or else a verb
VERBAL = ("G", "Z", "B", "I")


# Writing


def edit_swap(s: Sentence, at: int, new: str) -> list[Edit]:
    """Replace a word, keeping its capitals; a preceding "a" or "an" is adjusted."""
    start, end = s.spans[at]
    old = s.text[start:end]
    if s.text.isupper():
        new = new.upper()
    elif old[0].isupper() and (at == 0 or not old.isupper()):
        new = new[0].upper() + new[1:]
    return [_with_article(s, at, (start, end, new))]


def edit_exchange(s: Sentence, exchange: Exchange) -> list[Edit]:
    """Exchange two spans of words; the first word of the caption keeps its capital."""
    (a, b, _), (c, d, _) = exchange[:2]
    spans = [(s.spans[first][0], s.spans[stop - 1][1]) for first, stop in ((a, b), (c, d))]
    one, two = (s.text[start:end] for start, end in spans)
    if a == 0 and one[0].isupper() and not one[1:2].isupper():
        two = two[0].upper() + two[1:]
        if s.tags[0] in "DMAQ" or s.words[0] in words().nouns:  # no name
            one = one[0].lower() + one[1:]
    return [_with_article(s, a, (*spans[0], two)), _with_article(s, c, (*spans[1], one))]


def _with_article(s: Sentence, at: int, edit: Edit) -> Edit:
    """An edit with the "a" or "an" before it adjusted."""
    start, end, new = edit
    sets = words().sets
    if not at or s.words[at - 1] not in sets["articles"]:
        return edit
    vowel, consonant = (tuple(sets[name]) for name in ("sound of a vowel", "none of a vowel"))
    sounds = new.lower().startswith(vowel) and not new.lower().startswith(consonant)
    article = sorted(sets["articles"])[sounds]
    if article == s.words[at - 1]:
        return edit
    first, stop = s.spans[at - 1]
    if s.text[first].isupper():
        article = article.upper() if s.text.isupper() else article.capitalize()
    return first, end, article + s.text[stop:start] + new


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """Apply edits, whose positions are those of the original text."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


# Truth: what the captions of an image say of it


@functools.cache
def meaning(word: str) -> str:
    """The name of the synonym set of a word in any of its forms."""
    known = words()
    if word in known.nouns or word not in known.verbs:
        lemma = known.nouns.get(word, (word, ""))[0]
        return known.same.get(word) or known.same.get(lemma, lemma)
    lemma = known.verbs[word][0]
    return known.same.get(lemma, lemma)


def told(s: Sentence) -> set[tuple[str, ...]]:
    """Facts in a caption: words, and pairs and triples of words that belong together."""
    names = [meaning(word) for word in s.words]
    heads = [i for i, tag in enumerate(s.tags) if tag in SKELETON and not NOUN_RUN.match(s.tags, i)]
    facts: set[tuple[str, ...]] = {(name,) for name in names}
    for i, name in enumerate(names):
        right = next((j for j in heads if j > i), None)
        if right is not None:
            left = next((j for j in reversed(heads) if j < i), None)
            facts |= {(name, names[right]), (name, "kind " + kind_of(s.words[right]))}
            if left is not None:
                facts.add((names[left], name, names[right]))
    return facts


@functools.cache
def kind_of(word: str) -> str:
    """The kind of a noun, the set of a value, or else the synonym set of a word."""
    known = words()
    lemma = known.nouns.get(word, (word, ""))[0]
    return known.kinds.get(lemma) or known.dimensions.get(word) or meaning(word)


def claims_swap(name: str, new: str, noun: str) -> set[tuple[str, ...]]:
    """Facts that a new word claims, which no caption of the image may state."""
    if name == "relation":
        return {(meaning(new), meaning(noun)), (meaning(new), "kind " + kind_of(noun))}
    return {(meaning(new),)}


def claims_exchange(s: Sentence, name: str, exchange: Exchange) -> set[tuple[str, ...]]:
    """Facts that an exchange claims, which no caption of the image may state."""
    names, one, two = [meaning(word) for word in s.words], exchange.one[2], exchange.two[2]
    if name == "relation":
        return {(names[two], names[exchange.ends[0]], names[one])}
    return {(names[one], names[exchange.ends[1]]), (names[two], names[exchange.ends[0]])}


def contradicted(caption: str, negative: str, others: Sequence[str]) -> str:
    """Why a negative may be true by these captions of the image, "" if none of them says it."""
    known = words()
    new = told(read(negative)) - told(read(caption))
    for other in others:
        for fact in sorted(new & told(read(other))):
            name, link = fact[0], fact[0] in known.links
            carries = name in known.values or name in known.sets["acts"] or name in known.kinds
            if link if len(fact) > 1 else carries and not link:
                return f"another caption of the image says {' '.join(fact)!r}"
    return ""


SKELETON = "NSGZBEP"  # tags of content words; of noun phrases only the heads
NOUN_RUN = re.compile("[NS][NS]")


# One caption, with nothing learned


def make_negatives(
    caption: str,
    *,
    seed: int = 0,
    key: str | int = "",
    types: Sequence[str] = NEGATIVE_TYPES,
    others: Sequence[str] = (),
) -> dict[str, str | None]:
    """Rewrite one caption into a hard negative of each type, or None where none is safe.

    Without a file of captions plausibility is unknown: see `learn` and `rewrite`.

    Args:
        caption: one English sentence; anything else is allowed and gives None.
        seed: seed of the random choices.
        key: varies the choices for equal captions, such as the id of the image.
        types: which of ``NEGATIVE_TYPES`` to make.
        others: other captions of the image; no negative says what one of them says.
    """
    unknown = [name for name in types if name not in NEGATIVE_TYPES]
    if unknown or isinstance(types, str):
        raise ValueError(f"types: {unknown or types!r} is none of {', '.join(NEGATIVE_TYPES)}")
    made = rewrite_one(caption, str(key), Options(tuple(types), seed), others)
    return {name: negative.text for name, negative in made.items()}


def read(text: str, tagger: Tagger | None = None) -> Sentence:
    """Split and tag one caption and find its noun phrases."""
    s = split(text)
    tagger([s]) if tagger else tag_plain(s)
    find_phrases(s)
    return s


def rewrite_one(
    text: str, key: str, options: Options, others: Sequence[str] = ()
) -> dict[str, Negative]:
    """Draw uniformly from the legal edits, without those that need other captions as evidence."""
    s = read(text, options.tagger)
    facts: set[tuple[str, ...]] = set().union(
        *(told(read(other, options.tagger)) for other in (text, *others))
    )
    seen, row = {plain(text)}, {}
    for name in options.types:
        swaps, exchanges, reason = PROPOSE[name](s)
        rng = random.Random(crc(f"{options.seed}:{key}:{text}:{name}"))
        options_of = [(x.at, new, x.noun) for x in swaps if not x.attest for new in x.options]
        found = {
            "exchange": [
                edit_exchange(s, x)
                for x in exchanges
                if facts.isdisjoint(claims_exchange(s, name, x))
            ],
            "replace": [
                edit_swap(s, at, new)
                for at, new, noun in options_of
                if facts.isdisjoint(claims_swap(name, new, noun))
            ],
        }
        order = (
            ["exchange", "replace"] if rng.random() < options.exchange else ["replace", "exchange"]
        )
        row[name] = Negative(None, (), reason)
        for how in order:
            for edits in rng.sample(found[how], len(found[how])):
                new = apply_edits(text, edits)
                if row[name].text is None and plain(new) not in seen:
                    row[name] = Negative(new, tuple(edits), how)
        seen.add(plain(row[name].text or ""))
    return row


def plain(text: str) -> str:
    """Normalise case and spaces, for comparison."""
    return " ".join(text.casefold().split())


# Counts: how well a word fits its context, and how a classifier detects it

COUNTS, READER, FLOWS = 2**22, 2**20, 2**18  # sizes of hashed tables; READER: the classifier's
SLOTS = (1.0, 1.0, 0.7, 0.7)  # weights: word before, word after, content word before, and after
PRIOR = 4.0  # pseudo-count of the prior that words co-occur as their kinds do
LEARNED = 200_000  # captions, the first of the file, that are counted
FEWEST = 500  # captions that the classifier needs
CHUNK = 512  # captions in a block
FIT, HIDE = 1.0, 2.0  # weights of fit, and of evading the classifier, in nats
FLOW = (4.5, 4.2, 4.0, 3.8)  # largest ratio of a word's insertions to its removals, by type
SAMPLE = 25_000  # captions, the first of the file, that the classifier is trained on
ROUNDS = 20
FREE = 3  # two words seen together less often are not a fixed expression
MAX_OPTIONS = 12  # largest number of options scored for one place


class Vocabulary:
    """Numbers of words, and hashes: of the word, its ending, its kind and its meaning."""

    def __init__(self) -> None:
        """Start with the empty word, which separates captions."""
        self.ids = {"": 0}
        self.rows = [(0, 0, 0, 0)]
        self.table = np.zeros((1, 4), np.uint32)
        self.options: dict[tuple[str, ...], np.ndarray] = {}

    def hashes(self, names: Sequence[str]) -> np.ndarray:
        """[N, 4] uint32."""
        ids = self.ids
        for name in names:
            if name not in ids:
                ids[name] = len(self.rows)
                self.rows.append((*hashes(name), crc("kind " + kind_of(name)), crc(meaning(name))))
        if len(self.rows) != len(self.table):
            self.table = np.array(self.rows, np.uint32)
        return self.table[np.fromiter(map(ids.__getitem__, names), np.int64, len(names))]

    def option(self, options: tuple[str, ...]) -> np.ndarray:
        """The hashes of a list of options, made once."""
        if options not in self.options:
            self.options[options] = self.hashes(options)
        return self.options[options]


@functools.cache
def vocabulary() -> Vocabulary:
    """The vocabulary of this process, a cache."""
    return Vocabulary()


@dataclass(slots=True)
class Block:
    """Sentences as arrays over their T words, with two empty words between any two."""

    sentences: list[Sentence]
    starts: np.ndarray  # [sentences] int64, place of the first word
    owner: np.ndarray  # [T] int64, number of the sentence
    word: np.ndarray  # [T] uint32 hashes
    kind: np.ndarray
    sense: np.ndarray
    left: np.ndarray  # [T] int64, place of the next content word to the left
    right: np.ndarray


def read_block(texts: Sequence[str], tagger: Tagger | None) -> Block:
    """Split and tag captions, and lay them out as arrays."""
    sentences = [split(text) for text in texts]
    sizes = np.array([len(s.words) for s in sentences], np.int64)
    starts = np.cumsum(sizes + 2) - sizes  # behind two empty words
    names = ["", ""]
    for s in sentences:
        names += s.words
        names += ("", "")
    word, ending, kind, sense = np.ascontiguousarray(vocabulary().hashes(names).T)
    if tagger:
        tagger(sentences)
    else:
        letters = tag_words(word, ending)
        for s, start in zip(sentences, starts.tolist(), strict=True):
            s.tags = letters[start : start + len(s.words)]
            fix_tags(s)
    tags = "  " + "".join([s.tags + "  " for s in sentences])
    codes = np.frombuffer(tags.encode(), np.uint8)
    noun = np.isin(codes, np.frombuffer(b"NS", np.uint8))
    carries = np.isin(codes, np.frombuffer((SKELETON + " ").encode(), np.uint8))
    carries &= ~(noun & np.roll(noun, -1))
    place = np.arange(len(codes))
    left = np.roll(np.maximum.accumulate(np.where(carries, place, 0)), 1)
    right = np.minimum.accumulate(np.where(carries, place, len(codes) - 1)[::-1])[::-1]
    owner = np.repeat(np.arange(len(sizes)), sizes + 2)
    owner = np.concatenate([np.zeros(2, np.int64), owner])
    return Block(sentences, starts, owner, word, kind, sense, left, np.roll(right, -1))


def tag_words(word: np.ndarray, ending: np.ndarray) -> str:
    """Tags of all words of a block, from their hashes [T]."""
    lanes = tagger_lanes()
    scores = np.zeros((len(word), lanes.shape[1]), np.uint64)
    for rows in window_rows(word, ending):
        scores += lanes[rows]
    best = scores.view(np.uint16)[:, : len(TAGS)].argmax(axis=1)
    return np.frombuffer(TAGS.encode(), np.uint8)[best].tobytes().decode()


def window_rows(word: np.ndarray, ending: np.ndarray) -> Iterator[np.ndarray]:
    """For each window the rows [T] of the tagger's weights."""
    for f, (whole, endings) in enumerate(WINDOWS, 1):
        total = np.full(len(word), f * 0x27D4EB2F & 0xFFFFFFFF, np.uint32)
        seen = [np.roll(word, -o) for o in whole] + [np.roll(ending, -o) for o in endings]
        for factor, hashed in zip(MULTIPLIERS, seen, strict=False):
            total += hashed * np.uint32(factor)
        total ^= total >> np.uint32(15)
        yield total * np.uint32(0x2C1B3C6D) >> np.uint32(33 - ROWS.bit_length())


@functools.cache
def tagger_lanes() -> np.ndarray:
    """[ROWS, 6] uint64: the weights plus 128 as 16-bit lanes, four of which are added at once."""
    weights = np.frombuffer(tagger_weights(), np.int8).reshape(ROWS, len(TAGS))
    lanes = np.zeros((ROWS, 24), np.uint16)
    lanes[:, : len(TAGS)] = weights.astype(np.int16) + 128
    return lanes.view(np.uint64)


def mix(one: np.ndarray, two: np.ndarray, salt: int) -> np.ndarray:
    """A 32-bit hash of two."""
    mixed = one * np.uint32(MULTIPLIERS[0])
    mixed ^= (two + np.uint32(salt * 0x27D4EB2F & 0xFFFFFFFF)) * np.uint32(MULTIPLIERS[1])
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    return mixed ^ (mixed >> np.uint32(13))


def uniform(seeds: np.ndarray, keys: np.ndarray, salt: int) -> np.ndarray:
    """Numbers in (0, 1) that depend only on the seeds and keys."""
    return (mix(seeds, keys, salt) + 0.5) / 2.0**32


def count(block: Block) -> np.ndarray:
    """Rows of the counts that the words of a block add to, all in one array."""
    real = block.word > 0
    word, kind = block.word, block.kind
    rows = [mix(word, word, 20), mix(kind, kind, 21)]
    for j, (near, near_kind) in enumerate(neighbours(block, np.arange(len(word)))):
        rows += [mix(near, word, j), mix(near_kind, kind, 4 + j)]
        rows += [mix(near, near, 8 + j), mix(near_kind, near_kind, 12 + j)]
    return np.concatenate([row[real] for row in rows]) & np.uint32(COUNTS - 1)


def neighbours(block: Block, first: np.ndarray, last: np.ndarray | None = None) -> list[Any]:
    """Hashes of word and kind before and after a span, and of the nearest content words."""
    last = first if last is None else last
    places = (
        first - 1,
        np.minimum(last + 1, len(block.word) - 1),
        block.left[first],
        block.right[last],
    )
    return [(block.word[place], block.kind[place]) for place in places]


@dataclass(slots=True)
class Learned:
    """Statistics of the captions of a file."""

    counts: np.ndarray  # [COUNTS] float32, of words, kinds and neighbours
    words: float
    facts: np.ndarray  # uint64, sorted keys of the facts of all images
    reader: np.ndarray  # [READER] float32, the classifier: log odds that a phrase was inserted
    price: np.ndarray  # [FLOWS] float32, penalty of words that are inserted too often
    keep: np.ndarray  # [FLOWS] float32, probability that such a word may still be drawn

    def fit(self, near: list[Any], word: np.ndarray, kind: np.ndarray) -> tuple[Any, Any]:
        """Log ratio of a word's count in its four contexts to chance, and the counts.

        Returns:
            log ratios [P, 4], shrunk to those of the kinds, and counts [P, 4].
        """

        def seen(one: np.ndarray, two: np.ndarray, salt: int) -> np.ndarray:
            return self.counts[mix(one, two, salt) & np.uint32(COUNTS - 1)]

        often, often_kind = seen(word, word, 20) / self.words, seen(kind, kind, 21) / self.words
        ratios, counts = [], []
        for j, (w, k) in enumerate(near):
            counts.append(seen(w, word, j))
            of_kind = (seen(k, kind, 4 + j) + 2) / (seen(k, k, 12 + j) * often_kind + 2)
            expected = seen(w, w, 8 + j) * often
            ratios.append(np.log((counts[-1] + PRIOR * of_kind) / (expected + PRIOR)))
        return np.stack(ratios, 1), np.stack(counts, 1)


@dataclass(slots=True)
class Candidates:
    """All C candidates of a block as arrays; an exchange has two of the P parts, a swap one."""

    group: np.ndarray  # [C] int64, 4 x sentence + type
    site: np.ndarray  # [C] int64, number of the swap or exchange in the block
    option: np.ndarray  # [C] int64
    exchange: np.ndarray  # [C] bool
    part: np.ndarray  # [P] int64, the candidate
    comes: np.ndarray  # [P, 6] int64, classifier rows of the inserted phrases
    goes: np.ndarray  # [P, 6] int64, classifier rows of the removed phrases
    flow_in: np.ndarray  # [C] int64, row of the new word
    flow_out: np.ndarray  # [C]
    gain: np.ndarray  # [C] float, how much better than the old words the new ones fit
    rule: np.ndarray  # [C] int8, what refuses it, see RULES
    noise: np.ndarray  # [C] float, Gumbel noise
    luck: np.ndarray  # [C] float in (0, 1), decides on words that are inserted too often
    coin: np.ndarray  # [C] float in (0, 1), of the group: decides between exchange and swap


NOT_DRAWN, LEGAL, UNSEEN, IMPLAUSIBLE, TOLD, TOO_OFTEN, SAID = range(-1, 6)
RULES = {  # why a candidate is not drawn
    NOT_DRAWN: "",  # the coin chose the other kind (exchange or swap)
    LEGAL: "",
    UNSEEN: "captions never show the word beside its neighbour",
    IMPLAUSIBLE: "implausible (--plausible)",
    TOLD: "its words would give it away (--refine)",
    TOO_OFTEN: "the word comes in too often already",
    SAID: "another caption of the image says the same",
}


def weigh(
    block: Block,
    proposals: list[list[Proposal]],
    images: np.ndarray,
    seeds: np.ndarray,
    learned: Learned,
    options: Options,
) -> Candidates:
    """Lay out all candidates of a block, and the rule that refuses each.

    ``images`` and ``seeds`` are [S] uint32 hashes, of the images and of seed, image and caption.
    """
    swaps, moves = lay_out(block, proposals)
    # Swaps, one candidate an option; of many options MAX_OPTIONS are drawn.
    sizes = np.array([len(hashed) for _, _, hashed, _ in swaps], np.int64)
    site = np.repeat(np.arange(len(sizes)), sizes)
    option = np.arange(len(site)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    group = np.array([t for t, *_ in swaps], np.int64)[site]
    at = np.array([place for _, place, *_ in swaps], np.int64)[site]
    new = np.concatenate([np.zeros((0, 4), np.uint32), *(hashed for _, _, hashed, _ in swaps)])
    seed = mix(seeds[group // 4], (group % 4).astype(np.uint32), 60)
    key = mix(new[:, 0], (at - block.starts[group // 4]).astype(np.uint32), 61)
    few = uniform(seed, key, 62) * sizes[site] < MAX_OPTIONS
    site, option, group, at, new, seed, key = (
        x[few] for x in (site, option, group, at, new, seed, key)
    )
    noun = vocabulary().hashes([x.noun for *_, x in swaps])[site]
    attest = np.array(
        [sum(2**k for k, mark in enumerate("pnPN") if mark in x.attest) for *_, x in swaps],
        np.int64,
    )[site]
    # Exchanges: two parts, each of which goes where the other was.
    of, a, b, one, c, d, two, _, _ = moves.T
    b, d, swapped, moved = b - 1, d - 1, len(site), len(moves)
    part = np.concatenate([np.arange(swapped), *[swapped + np.arange(moved)] * 2])
    first, last = np.concatenate([at, a, c]), np.concatenate([at, b, d])
    head = np.concatenate([at, one, two])
    word, kind = block.word, block.kind
    new_first = np.concatenate([new[:, 0], word[c], word[a]])
    new_last = np.concatenate([new[:, 0], word[d], word[b]])
    new_head = np.concatenate([new[:, 0], word[two], word[one]])
    new_kind = np.concatenate([new[:, 2], kind[two], kind[one]])
    near = neighbours(block, first, last)
    single = part < swapped

    fit, counts = learned.fit(near, new_head, new_kind)
    old, often = learned.fit(near, word[head], kind[head])
    fit[~single, :2] = old[~single, :2] = 0  # of phrases the inner words touch the neighbours
    gain = ((np.minimum(fit, 3) - np.minimum(old, 3)) * SLOTS).sum(axis=1)
    size = swapped + moved
    rule = np.zeros(size, np.int8)
    rule[:swapped][fit[single].min(axis=1) < options.plausible] = IMPLAUSIBLE
    often = np.where(often[single, :2] > FREE, attest[:, None] & [4, 8], 0)
    asked = (attest[:, None] & [1, 2]) + often > 0
    unseen = ((counts[single, :2] < 2) | (fit[single, :2] < 0)) & asked
    rule[:swapped][unseen.any(axis=1)] = UNSEEN
    group = np.concatenate([group, of])
    alone = np.arange(len(images), dtype=np.uint32)
    own = np.sort(facts_of(block, alone))
    for claim in claims_of(block, group[:swapped], new[:, 3], noun, moves):
        told = found(learned.facts, fact_keys(images[group // 4], claim))
        rule[told | found(own, fact_keys(alone[group // 4], claim))] = SAID

    kinds = (group[:swapped] % 4).astype(np.uint32)
    flows = [mix(w, kinds, 50) & np.uint32(FLOWS - 1) for w in (new[:, 0], word[at])]
    blank = np.zeros(moved, np.int64)
    seed = np.concatenate([seed, mix(seeds[of // 4], (of % 4).astype(np.uint32), 60)])
    key = np.concatenate([key, mix(word[one], word[two], 61)])
    by_group = np.argsort(group, kind="stable")
    rank = np.empty(size, np.int64)
    rank[by_group] = np.arange(size)
    return Candidates(
        group=group[by_group],
        site=np.concatenate([site, np.arange(moved)])[by_group],
        option=np.concatenate([option, blank])[by_group],
        exchange=by_group >= swapped,
        part=rank[part],
        comes=phrases(near, new_first, new_last, new_head),
        goes=phrases(near, word[first], word[last], word[head]),
        flow_in=np.concatenate([flows[0], blank])[by_group].astype(np.int64),
        flow_out=np.concatenate([flows[1], blank])[by_group].astype(np.int64),
        gain=np.bincount(part, gain, size)[by_group],
        rule=rule[by_group],
        noise=-np.log(-np.log(uniform(seed, key, 63)))[by_group],
        luck=uniform(seed, key, 64)[by_group],
        coin=uniform(seed, seed, 65)[by_group],
    )


def lay_out(
    block: Block, proposals: list[list[Proposal]]
) -> tuple[list[tuple[int, int, np.ndarray, Swap]], np.ndarray]:
    """All swaps as (group, place, hashes of options, swap), and exchanges [X, 9] by place."""
    swaps: list[tuple[int, int, np.ndarray, Swap]] = []
    moves: list[tuple[int, ...]] = []
    for i, (start, made) in enumerate(zip(block.starts.tolist(), proposals, strict=True)):
        for t, (some, others, _) in enumerate(made, 4 * i):
            swaps += [(t, start + x.at, vocabulary().option(x.options), x) for x in some]
            moves += [(t, *(start + n for n in (*x.one, *x.two, *x.ends))) for x in others]
    return swaps, np.array(moves, np.int64).reshape(-1, 9)


def claims_of(
    block: Block, group: np.ndarray, said: np.ndarray, noun: np.ndarray, moves: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Facts that swaps [S] and exchanges [X] claim, twice [S + X]; see `claims_swap`."""
    of, _, _, one, _, _, two, end, other = moves.T
    sense = block.sense
    relation = group % 4 == 0
    swaps = [np.where(relation, mix(said, noun[:, k], 30), said) for k in (3, 2)]
    turned = mix(mix(sense[two], sense[end], 31), sense[one], 31)
    relation = of % 4 == 0
    first = np.where(relation, turned, mix(sense[one], sense[other], 30))
    second = np.where(relation, turned, mix(sense[two], sense[end], 30))
    return np.concatenate([swaps[0], first]), np.concatenate([swaps[1], second])


def phrases(near: list[Any], first: np.ndarray, last: np.ndarray, head: np.ndarray) -> np.ndarray:
    """[P, 6] rows of the classifier's weights: a word alone, and with its neighbours."""
    (before, _), (behind, _), (left, _), (right, _) = near
    rows = [
        mix(head, head, 40), mix(before, first, 41), mix(last, behind, 42),
        mix(mix(before, head, 43), behind, 43), mix(left, head, 44), mix(head, right, 45),
    ]  # fmt: skip
    return (np.stack(rows, 1) & np.uint32(READER - 1)).astype(np.int64)


def fact_keys(images: np.ndarray, facts: np.ndarray) -> np.ndarray:
    """64-bit keys of facts of images."""
    return images.astype(np.uint64) << np.uint64(32) | facts.astype(np.uint64)


def found(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which keys are among the sorted ones."""
    if not len(known):
        return np.zeros(len(keys), bool)
    return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys


def facts_of(block: Block, images: np.ndarray) -> np.ndarray:
    """Keys of the facts in the captions of a block, by image [S]; see `told`."""
    sense, right = block.sense, block.sense[block.right]
    facts = [sense, mix(sense, right, 30), mix(sense, block.kind[block.right], 30)]
    facts.append(mix(mix(block.sense[block.left], sense, 31), right, 31))
    real = block.word > 0
    owner = images[block.owner[real]]
    return np.concatenate([fact_keys(owner, fact[real]) for fact in facts])


def told_by_words(
    reader: np.ndarray, part: np.ndarray, comes: np.ndarray, goes: np.ndarray, size: int
) -> np.ndarray:
    """The classifier's log odds [size] that candidates are negatives, from their parts."""
    return np.bincount(part, reader[comes].sum(axis=1) - reader[goes].sum(axis=1), size)


def draw(c: Candidates, learned: Learned, options: Options) -> tuple[Any, Any, Any]:
    """Draw one candidate of each group that has a legal one.

    Returns:
        the drawn candidates, scores [C] and the rule [C] that refuses each.
    """
    told = told_by_words(learned.reader, c.part, c.comes, c.goes, len(c.group))
    rule = c.rule.copy()
    rule[(rule == 0) & ~c.exchange & (c.luck > learned.keep[c.flow_in])] = TOO_OFTEN
    rule[(rule == 0) & (told > options.refine)] = TOLD
    score = FIT * c.gain - HIDE * told - learned.price[c.flow_in] * ~c.exchange + c.noise
    if not len(score):
        return np.zeros(0, np.int64), score, rule
    firsts = np.flatnonzero(np.diff(c.group, prepend=-1))
    sizes = np.diff(firsts, append=len(score))
    for kind, wins in (
        (c.exchange, c.coin < options.exchange),
        (~c.exchange, c.coin >= options.exchange),
    ):
        legal = np.maximum.reduceat((rule == 0) & kind, firsts)
        rule[(rule == 0) & ~kind & wins & np.repeat(legal, sizes)] = NOT_DRAWN
    score[rule != 0] = -inf
    best = np.repeat(np.maximum.reduceat(score, firsts), sizes)
    return np.flatnonzero((score == best) & (score > -inf)), score, rule


def learn(texts: Sequence[str], images: Sequence[str], options: Options) -> Learned:
    """Count words and neighbours, record the facts of each image, and train the classifier.

    Args:
        texts: captions of a file; words are counted in the first LEARNED.
        images: name of each caption's image; a caption without an image needs a unique name.
        options: the options that negatives will be drawn with.
    """
    counts, facts, total = np.zeros(COUNTS, np.float32), [np.zeros(0, np.uint64)], 0
    rows: list[np.ndarray] = []
    captions_of = Counter(images)
    for at in range(0, len(texts), CHUNK):
        part = list(range(at, min(at + CHUNK, len(texts))))
        if at >= LEARNED:
            part = [i for i in part if captions_of[images[i]] > 1]
        block = read_block([texts[i] for i in part], options.tagger)
        facts.append(facts_of(block, image_hashes([images[i] for i in part])))
        if at < LEARNED:
            rows.append(count(block))
            total += int((block.word > 0).sum())
        if rows and (len(rows) == 16 or at + CHUNK >= min(len(texts), LEARNED)):
            counts += np.bincount(np.concatenate(rows), minlength=COUNTS)
            rows = []
    known = np.sort(np.concatenate(facts))
    blank, full = np.zeros(FLOWS, np.float32), np.ones(FLOWS, np.float32)
    learned = Learned(counts, max(1, total), known, np.zeros(READER, np.float32), blank, full)
    if len(texts) >= FEWEST:
        play(texts[:SAMPLE], images[:SAMPLE], learned, options)
    return learned


def play(texts: Sequence[str], images: Sequence[str], learned: Learned, options: Options) -> None:
    """Train a classifier to detect negatives, while negatives are drawn to evade it.

    Logistic regression on words, pairs and triples of words (Adagrad).  A word inserted more than
    FLOW times as often as it is removed loses score, and from round 4 on is also rejected at random
    so that its ratio falls to FLOW.
    """
    blocks = [
        candidates(texts[at : at + CHUNK], images[at : at + CHUNK], learned, options)[2]
        for at in range(0, len(texts), CHUNK)
    ]
    sizes = [len(c.group) for c in blocks]
    for k, c in enumerate(blocks):
        c.group += 4 * CHUNK * k
        c.part += sum(sizes[:k])
    c = Candidates(
        *(np.concatenate([getattr(b, f.name) for b in blocks]) for f in fields(Candidates))
    )
    most = np.full(FLOWS, FLOW[0])
    most[c.flow_in] = np.array(FLOW)[c.group % 4]
    squares = np.full(READER, 1e-3, np.float32)
    rng = np.random.default_rng(0)
    for turn in range(ROUNDS):
        c.noise = rng.gumbel(size=len(c.group))
        drawn, _, _ = draw(c, learned, options._replace(refine=inf if turn < 4 else options.refine))
        swaps = drawn[~c.exchange[drawn]]
        comes = np.bincount(c.flow_in[swaps], minlength=FLOWS)
        goes = most * (np.bincount(c.flow_out[swaps], minlength=FLOWS) + 0.5)
        dearer = 0.7 * np.log((comes + 0.3) / goes) * (comes + goes > most)
        learned.price = np.maximum(0, learned.price + dearer).astype(np.float32)
        if turn >= 4:
            scarce = np.clip(goes / np.maximum(comes, 0.3), 0.5, 1.2)
            learned.keep = np.clip(learned.keep * scarce, 0, 1).astype(np.float32)
        chosen = np.zeros(len(c.group), bool)
        chosen[drawn] = True
        mine = chosen[c.part]
        part, comes_in, goes_out = c.part[mine], c.comes[mine], c.goes[mine]
        told = told_by_words(learned.reader, part, comes_in, goes_out, len(chosen))[part]
        doubt = np.repeat(1 / (1 + np.exp(told)), 6)
        slope = np.bincount(comes_in.ravel(), doubt, READER)
        slope -= np.bincount(goes_out.ravel(), doubt, READER)
        squares += slope.astype(np.float32) ** 2
        learned.reader = ((learned.reader + 0.3 * slope / np.sqrt(squares)) * 0.995).astype(
            np.float32
        )


def candidates(
    texts: Sequence[str], images: Sequence[str], learned: Learned, options: Options
) -> tuple[Block, list[list[Proposal]], Candidates]:
    """Read captions and lay out all candidates."""
    block = read_block(texts, options.tagger)
    for s in block.sentences:
        find_phrases(s)
    none: Proposal = ([], [], "")
    proposals = [
        [PROPOSE[name](s) if name in options.types else none for name in NEGATIVE_TYPES]
        for s in block.sentences
    ]
    starts = [
        crc(f"{options.seed}:{image}:{text}") for image, text in zip(images, texts, strict=True)
    ]
    seeds = np.array(starts, np.uint32)
    return (
        block,
        proposals,
        weigh(block, proposals, image_hashes(images), seeds, learned, options),
    )


def image_hashes(images: Sequence[str]) -> np.ndarray:
    """[S] uint32."""
    return np.fromiter(map(crc, images), np.uint32, len(images))


def rewrite(
    texts: Sequence[str], images: Sequence[str], learned: Learned, options: Options
) -> list[dict[str, Negative]]:
    """Rewrite captions with the statistics of their file.

    The result is the same for any division of the captions into calls.

    Args:
        texts: captions.
        images: name of each caption's image, as in `learn`.
        learned: the result of `learn` for the file.
        options: types, seed and how negatives are drawn.

    Returns:
        for each caption its negatives by type, in the order of ``options.types``.
    """
    block, proposals, c = candidates(texts, images, learned, options)
    drawn, score, rule = draw(c, learned, options)
    made = dict(zip(c.group[drawn].tolist(), drawn.tolist(), strict=True))
    swaps = [x for found in proposals for some, _, _ in found for x in some]
    moves = [x for found in proposals for _, others, _ in found for x in others]
    lost = c.group[(rule == NOT_DRAWN) & c.exchange].tolist()
    hows = dict.fromkeys(lost, "instead of exchange")
    worst = np.zeros(4 * len(texts), np.int8)
    np.maximum.at(worst, c.group, rule)
    negatives = []
    for i, s in enumerate(block.sentences):
        row, seen = {}, {plain(s.text)}
        for name in options.types:
            group = 4 * i + NEGATIVE_TYPES.index(name)
            best = made.get(group)
            row[name] = Negative(None, (), RULES[int(worst[group])] or proposals[i][group % 4][2])
            while best is not None:
                site, option = int(c.site[best]), int(c.option[best])
                if c.exchange[best]:
                    edits = edit_exchange(s, moves[site])
                else:
                    edits = edit_swap(s, swaps[site].at, swaps[site].options[option])
                text = apply_edits(s.text, edits)
                if plain(text) not in seen:
                    seen.add(plain(text))
                    how = "exchange" if c.exchange[best] else hows.get(group, "replace")
                    row[name] = Negative(text, tuple(edits), how)
                    break
                score[best] = -inf
                rest = np.flatnonzero(c.group == group)
                best = int(rest[score[rest].argmax()])
                best = best if score[best] > -inf else None
        negatives.append(row)
    return negatives


# Captions on disk
#
# All of the kit reads and writes captions here: manifests, tables, json, the samples of shards.


class DataError(ValueError):
    """A mistake in a user's file or option; the message says where, and how to correct it."""


def run_script(
    main: Callable[[], int | None], name: str, *, quiet: Callable[[], bool] = lambda: False
) -> int:
    """Run the main function of a script and return the exit code.

    A mistake of the user gives one sentence on stderr and code 2, Ctrl-C gives code 130; a closed
    output pipe (``| head``) is not an error.  ``quiet`` says whether another rank prints the
    sentence.
    """
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks letters shows "?"
            sys.stdout.reconfigure(errors="replace")
        code = main() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DataError, OSError) as error:
        if not quiet():
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


class Launch(NamedTuple):
    """Rank of this process, number of ranks, and local rank."""

    rank: int
    world: int
    local: int  # among those of this machine


LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)


def launcher() -> Launch:
    """Read rank and world size from torchrun's variables, else SLURM's; the default is one process.

    Under srun it also sets MASTER_ADDR (the first node of the job) and MASTER_PORT (derived from
    the job id), unless they are set.

    Raises:
        DataError: some of a launcher's variables are missing, or are not valid numbers.
    """
    env = os.environ
    # An sbatch script has SLURM_NTASKS only if it asks for it; a salloc shell has only that one.
    one = {("SLURM_PROCID", "SLURM_LOCALID"): "0", ("SLURM_NTASKS",): "1"}
    for names in LAUNCHERS:
        there = tuple(name for name in names if name in env)
        if not there or env[there[0]] == one.get(there):
            continue
        if there != names:
            missing = next(name for name in names if name not in env)
            raise DataError(
                f"{there[0]} is {env[there[0]]} but {missing} is not set: start all processes with "
                f"torchrun or srun, or unset {there[0]} to run one"
            )
        try:
            found = Launch(*(int(env[name]) for name in names))
        except ValueError:
            found = Launch(0, 0, 0)
        if not (0 <= found.rank < found.world and found.local >= 0):
            raise DataError(
                f"{', '.join(f'{name}={env[name]}' for name in names)}: must be numbers from 0, "
                f"{names[0]} less than {names[1]}; start with torchrun or srun, or unset them"
            )
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if names[0] == "SLURM_PROCID" and nodes:
            first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]  # gpu[07-09,12] is gpu07
            env.setdefault("MASTER_ADDR", first)
            job = re.sub(r"\D", "", env.get("SLURM_JOB_ID", "")) or "0"
            env.setdefault("MASTER_PORT", str(20_000 + int(job) % 20_000))
        return found
    return Launch(0, 1, 0)


def why(error: Exception) -> str:
    """The operating system's message, also if torch wraps it in its own error."""
    told = error if isinstance(error, OSError) else error.__context__
    if isinstance(told, OSError):
        full = told.errno in (errno.ENOSPC, errno.EDQUOT)
        return "disk full" if full else str(told.strerror or told)
    return str(error).splitlines()[0][:160]


def hold(file: IO[Any]) -> bool:
    """Lock an open file for this process but not its workers; False if another process holds it.

    Raises:
        OSError: the file system does not support locks.
    """
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held by workers
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise
        return False
    return True


def lock(out: Path) -> Any:
    """Keep other runs out of the directory until this process ends, or the file is closed."""
    try:
        file = (out / "run.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({why(error)}); check it") from None
    try:
        if not hold(file):
            file.seek(0)
            raise DataError(
                f"--out {out}: {file.read(200).strip() or 'another process'} trains into it; "
                "wait for its end, or choose another --out"
            )
    except OSError:
        print(f"--out {out}: its disk has no locks; start no second run there", file=sys.stderr)
        return file
    with contextlib.suppress(OSError):  # on a full disk the lock still holds
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        file.flush()
    return file


@contextlib.contextmanager
def writing(
    path: Path, overwrite: bool = False, *, partial: Path | None = None
) -> Iterator[BinaryIO]:
    """Open NAME.partial, and rename it to NAME when the block ends; after an error delete it.

    A DataError if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    if path.is_dir() or not path.name:
        raise DataError(f"{path}: is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists; pass --overwrite or choose another name")
    partial = partial or path.with_name(path.name + ".partial")
    try:
        with partial.open("wb" if overwrite else "xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise DataError(
            f"{partial}: belongs to an interrupted or a running process; "
            "remove it, or pass --overwrite"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({why(error)}); check folder and disk"
        ) from None


def write_lines(path: Path, rows: Iterable[dict[str, Any]], overwrite: bool = False) -> int:
    """Write JSON lines atomically, and count them."""
    count = 0
    with writing(path, overwrite) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007 - the count is returned
            file.write(json_line(row))
    return count


def json_line(row: dict[str, Any]) -> bytes:
    """A row as a line of UTF-8."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate, which needs an escape
        return (json.dumps(row) + "\n").encode()


Wording = str | list[str] | None  # a negative; of several, training draws one an epoch


class Record(NamedTuple):
    """A caption of a manifest, and its negatives by type."""

    image: str | None
    image_id: int | str | None
    caption: str
    negatives: dict[str, Wording]


def split_types(text: str) -> tuple[str, ...]:
    """The types of ``--types relation,counting``."""
    try:
        return _checked_types(text.split(","), "--types")
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _checked_types(names: Any, place: str) -> tuple[str, ...]:
    """Names of types: letters, digits, "-" and "_"."""
    good = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not good or not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise DataError(f"{place}: types must be names of letters, digits, - and _, not {names!r}")
    if len(set(names)) < len(names):
        raise DataError(f"{place}: a type is named twice in {', '.join(names)}")
    return tuple(names)


def header_types(row: dict[str, Any], place: str) -> tuple[str, ...]:
    """The types that a header, or the .json of a sample, names; () if it names none."""
    return _checked_types(row["types"], f'{place}: "types"') if "types" in row else ()


def parse_record(
    line: bytes | dict[str, Any],
    place: str,
    types: Sequence[str] = NEGATIVE_TYPES,
    *,
    some: bool = False,
    need_image: bool = False,
) -> Record:
    """Read one record of a manifest, from its line or the JSON object of it.

    The negatives of the record have the keys ``types``, null where one is missing.  Other types are
    ignored with ``some``, else a DataError, as is anything that is not a record; it names
    ``place``.
    """
    row = line if isinstance(line, dict) else _parse_row(line, place)
    image, caption, given = row.get("image"), row.get("caption"), row.get("negatives")
    if image is None and not need_image:
        pass
    elif not isinstance(image, str) or not image:
        raise DataError(f'{place}: "image" must be a file name, not {image!r}')
    elif image.startswith("/") or "\\" in image or (".." in image and ".." in image.split("/")):
        raise DataError(
            f'{place}: "image" {image!r} leaves the folder of --images; name it from there'
        )
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{place}: the caption must be a sentence, not {str(caption)[:40]!r}")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise DataError(f'{place}: "negatives" must be an object with a key for each type')
    unknown = next((key for key in given if key not in types), None)
    if unknown is not None and not some:
        raise DataError(
            f'{place}: "negatives" has the key {unknown!r}, and the types are {", ".join(types)}; '
            'name them in the header, {"manifest": 1, "types": [...]}, or with --types'
        )
    negatives = {name: _wording(given.get(name), place, name) for name in types}
    return Record(image, row.get("image_id"), caption, negatives)


def _wording(given: Any, place: str, name: str) -> Wording:
    """The negative as given; an empty list becomes null."""
    if given is None or given == []:
        return None
    for text in given if isinstance(given, list) else [given]:
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{place}: the {name} negative must be a sentence, a list of sentences or null, "
                f"not {str(text)[:40]!r}"
            )
    return given


def _parse_json(text: bytes | str, place: str, kind: str) -> Any:
    """Parse JSON; ``kind`` tells the user what was expected."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError:
        raise DataError(f"{place}: is not UTF-8 text; {kind}") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        where = f" of line {line}" if line > 1 else ""
        column = getattr(error, "colno", 0)
        raise DataError(f"{place}: is not JSON at column {column}{where}; {kind}") from None


def _parse_row(line: bytes, place: str) -> dict[str, Any]:
    row = _parse_json(line, place, "a manifest has one JSON object a line")
    if not isinstance(row, dict):
        raise DataError(f'{place}: is not a record {{"image": ..., "caption": ...}}')
    return row


def read_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Read a manifest: where each line begins, its name in messages, and its JSON object.

    A header, a row with the key ``manifest``, may stand anywhere: ``cat`` joins manifests.
    """
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip(b"\xef\xbb\xbf\r\n\t "):
                    place = f"{path}:{number}"
                    yield offset, place, _parse_row(line, place)
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def read_records(
    path: Path, types: Sequence[str] = (), *, need_image: bool = False
) -> Iterator[tuple[int, Record]]:
    """Read the records of a manifest, and where their lines begin.

    Their negatives have the keys ``types``; without ``types``, those that headers named so far,
    else NEGATIVE_TYPES.  So the last record has all types of the file.
    """
    named = tuple(types)
    for offset, place, row in read_rows(path):
        if "manifest" in row:
            more = () if types else header_types(row, place)
            named = tuple(dict.fromkeys((*named, *more)))
        else:
            named = named or NEGATIVE_TYPES
            yield offset, parse_record(row, place, named, some=bool(types), need_image=need_image)


def read_captions(
    path: Path | str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    negatives: Sequence[str] = (),
) -> Iterator[Record]:
    """Read captions from any of the formats of the module's docstring, "-" for stdin.

    Columns of a table, if not given: ``filepath`` or ``image``, ``title`` or ``caption``, and
    ``neg_caption``.  Columns of negatives are given as COLUMN or COLUMN:TYPE, and a cell holds one
    sentence, or several as a Python list.  A DataError names the place of a malformed record.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if (image_column or caption_column or negatives) and suffix not in (".csv", ".tsv"):
        raise DataError(f"{path}: only a .csv or .tsv has columns to name")
    try:
        if str(path) == "-":
            lines = io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", newline="\n")
            for number, line in enumerate(lines, 1):
                yield parse_record({"caption": line.rstrip("\r\n")}, f"-:{number}")
        elif suffix == ".jsonl":
            yield from (record for _, record in read_records(path))
        elif suffix == ".json":
            yield from _read_json(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_table(path, image_column, caption_column, negatives)
        else:
            raise DataError(f"{path}: unknown kind of file; want .jsonl, .json, .csv, .tsv or -")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _read_json(path: Path) -> Iterator[Record]:
    """A COCO captions file, or either layout of the Karpathy splits."""
    data = _parse_json(path.read_bytes(), str(path), "JSON lines are named .jsonl")
    place = str(path)
    try:
        files = {}
        if isinstance(data, dict) and "annotations" in data:
            files = {image["id"]: image["file_name"] for image in data.get("images", ())}
        rows = data if isinstance(data, list) else data.get("annotations", data.get("images"))
        for i, row in enumerate(rows):
            place = f"{path}: record {i}"
            image_id = row.get("image_id", row.get("cocoid", row.get("imgid")))
            if "sentences" in row:
                image = "/".join(filter(None, (row.get("filepath"), row["filename"])))
                captions = [sentence["raw"] for sentence in row["sentences"]]
            else:
                image = row.get("image", files.get(image_id))
                captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
            for caption in captions:
                found = {"image": image, "image_id": image_id, "caption": caption}
                yield parse_record(found, place, ())
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: neither COCO nor Karpathy form ({error!r})") from None


def _read_table(
    path: Path, image: str | None, caption: str | None, negatives: Sequence[str]
) -> Iterator[Record]:
    """A table; as in a .csv, a cell of a .tsv that begins with a quote ends with one."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        delimiter = "\t" if "\t" in lines.readline() else ","
        lines.seek(0)
        table = csv.reader(lines, delimiter=delimiter, strict=True)
        place, columns = f"{path}:1", []
        try:
            columns = next(table, [])
            pick = _columns(path, columns, image, caption, negatives) if columns else {}
            while True:
                start = table.line_num + 1
                place = f"{path}:{start}"
                row = next(table, None)
                if row is None:
                    return
                if row:
                    yield _table_record(row, pick, len(columns), place)
        except csv.Error as error:
            raise DataError(
                f"{place}: a cell that begins here is not well quoted ({error}); a cell that "
                "begins with a quote ends with one, and quotes inside it are doubled"
            ) from None


def _columns(
    path: Path,
    columns: list[str],
    image: str | None,
    caption: str | None,
    negatives: Sequence[str],
) -> dict[str, int]:
    """Column numbers of "image", "caption" and of each ":TYPE"."""
    wanted = {
        "image": [image] if image else ["filepath", "image"],
        "caption": [caption] if caption else ["title", "caption"],
    }
    found = {key: [c for c in names if c in columns] for key, names in wanted.items()}
    for text in negatives or [c for c in ("neg_caption",) if c in columns]:
        column, _, name = (text, "", text) if text in columns else text.rpartition(":")
        (kind,) = _checked_types([name], f"--negative {text}")
        if f":{kind}" in found:
            raise DataError(f"--negative {text}: two columns are of the type {kind}")
        found[f":{kind}"] = [c for c in (column or name,) if c in columns]
    lacks = [key for key, names in found.items() if not names and (key != "image" or image)]
    if lacks:
        raise DataError(
            f"{path}:1: columns are {', '.join(columns)}; "
            "name yours with --image-column, --caption-column and --negative"
        )
    return {key: columns.index(names[0]) for key, names in found.items() if names}


def _table_record(row: list[str], pick: dict[str, int], columns: int, place: str) -> Record:
    if len(row) != columns:
        raise DataError(
            f"{place}: {len(row)} cells for {columns} columns; quote texts that hold the delimiter"
        )
    for text in row:
        if "\n" in text.strip():
            raise DataError(
                f"{place}: a quote that opens here closes lines later, and took in "
                f"{text.strip().splitlines()[1][:40]!r}; close it, or write the text on one line"
            )
    negatives: dict[str, Any] = {}
    for key, column in pick.items():
        if key.startswith(":"):
            text = row[column].strip()
            negatives[key[1:]] = text or None
            if text.startswith("["):
                try:
                    negatives[key[1:]] = ast.literal_eval(text)
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    raise DataError(f"{place}: {text[:40]!r} is not a list of texts") from None
    found = {key: row[column] for key, column in pick.items() if not key.startswith(":")}
    return parse_record({**found, "negatives": negatives}, place, tuple(negatives))


def read_samples(
    path: str | Path, file: BinaryIO | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Read the samples of a webdataset shard: members whose names agree up to the first dot.

    Yields that name, with its folder, and the contents by lower-case suffix (what follows the dot).
    ``file`` is a stream to read instead of the path.  A truncated shard is a DataError.
    """
    try:
        with tarfile.open(
            None if file else path, "r|" if file else "r:", fileobj=file, tarinfo=_Header
        ) as tar:
            files = (member for member in tar if not member.isdir())
            for stem, members in itertools.groupby(files, key=lambda m: _split_name(m.name)[0]):
                parts: dict[str, bytes] = {}
                for member in members:
                    suffix = _split_name(member.name)[1]
                    content = tar.extractfile(member)
                    if content is None:
                        raise DataError(f"{path}: {member.name} is neither file nor link")
                    if suffix in parts:
                        raise DataError(f"{path}: {member.name} is in it twice")
                    parts[suffix] = content.read()
                yield stem, parts
    except KeyError as error:
        raise DataError(f"{path}: has a link to a missing member ({error})") from None
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is it a complete .tar?") from None


class _Header(tarfile.TarInfo):
    """A member's header; unlike tarfile's, it distinguishes the end of a shard from truncation."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        """Read the next one."""
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the two empty blocks at the end
                raise
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}") from None


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def sample_row(stem: str, parts: dict[str, bytes], place: str) -> dict[str, Any]:
    """The manifest row of a sample: its .json, with the caption from the .txt if it has none."""
    row = _parse_row(parts["json"], place) if "json" in parts else {}
    if row.get("caption") is None and "txt" in parts:
        try:
            row["caption"] = parts["txt"].decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{place}: its .txt is not UTF-8") from None
    return row


def add_sample(tar: tarfile.TarFile, stem: str, parts: dict[str, bytes]) -> None:
    """Append a sample to a shard that is being written."""
    for suffix, content in parts.items():
        info = tarfile.TarInfo(f"{stem}.{suffix}" if suffix else stem)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


# Engines


Job = tuple[dict[str, Any], tuple[str, ...]]  # a row, and the other captions of its image
Made = dict[str, Negative]
Counts = Counter[tuple[str, str]]  # of type and "exchange", "replace" or the rule of a null
Line = tuple[int, list[str], bytes]  # number of the job, how each type was made, and its line
Chat = Callable[[list[dict[str, str]], threading.Event], str]  # messages to an answer


class Engine(NamedTuple):
    """How captions are rewritten; the same in every process."""

    name: str
    options: Options
    learned: Learned | None = None
    explain: bool = False
    parse: Callable[[str], Any] | None = None  # spaCy's pipeline, of the released recipe
    masked: MaskedModel | None = None
    chat: Chat | None = None
    requests: int = 1  # to the language model at once
    fallback: str = "lexicon"


def _engine(args: argparse.Namespace) -> Engine:
    """Load the models that the engine needs."""
    released, parse = args.engine == "released", None
    if released or args.engine == "spacy":
        parse = load_spacy(args.spacy_model, tags_only=released)
    masked = MaskedModel(args.mlm, args.device) if released else None
    chat = _server_chat(args) if args.engine == "llm" else None
    tagger = functools.partial(tag_with_spacy, parse) if args.engine == "spacy" else None
    options = Options(args.types, args.seed, args.exchange, args.plausible, args.refine, tagger)
    more = (parse, masked, chat, args.llm_requests, args.fallback)
    return Engine(args.engine, options, None, args.explain, *more)


def _taught(engine: Engine, rows: Iterable[dict[str, Any]]) -> Engine:
    """The engine with statistics learned from the captions, if it uses them."""
    if engine.masked or (engine.chat and engine.fallback == "null"):
        return engine
    pairs = [(row["caption"], _image_of(row) or f"caption {n}") for n, row in enumerate(rows)]
    texts, images = [text for text, _ in pairs], [image for _, image in pairs]
    return engine._replace(learned=learn(texts, images, engine.options))


def _made(engine: Engine, jobs: Sequence[Job], numbers: Sequence[int]) -> list[Made]:
    """The negatives of the captions with these numbers in the file."""
    texts = [row["caption"] for row, _ in jobs]
    if engine.masked:
        return _released(texts, [_image_of(row) for row, _ in jobs], engine)
    images = [_image_of(row) or f"caption {n}" for (row, _), n in zip(jobs, numbers, strict=True)]
    if engine.learned:
        return rewrite(texts, images, engine.learned, engine.options)
    keys = zip(texts, images, jobs, strict=True)
    return [rewrite_one(text, image, engine.options, job[1]) for text, image, job in keys]


def load_spacy(name: str, *, tags_only: bool) -> Callable[[str], Any]:
    """An English pipeline of spaCy."""
    try:
        import spacy

        return spacy.load(name, exclude=["ner", "parser"] if tags_only else ["ner"])
    except ImportError:
        raise DataError("--engine: spaCy is missing; pip install spacy") from None
    except OSError:
        raise DataError(
            f"--spacy-model {name}: not installed; python -m spacy download {name}"
        ) from None


class MaskedModel:
    """A masked language model: fills masks and scores texts."""

    def __init__(self, name: str, device: str) -> None:
        """Load a model with its head, from a folder or by name."""
        try:
            import torch
            from transformers import AutoModelForMaskedLM, AutoTokenizer
        except ImportError:
            raise DataError("--mlm: transformers is missing; pip install transformers") from None
        cuda = torch.cuda.is_available()
        if device == "cuda" and not cuda:
            raise DataError("--device cuda: this machine has no CUDA device; use cpu or auto")
        self.torch, self.device = torch, "cuda" if cuda and device != "cpu" else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, report = AutoModelForMaskedLM.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # each of its readers has errors of its own
            reason = str(error).splitlines()[0]
            raise DataError(f"--mlm {name}: cannot be loaded ({reason})") from None
        missing = sorted(report["missing_keys"])
        if missing or self.tokenizer.mask_token is None:
            raise DataError(f"--mlm {name}: has no masked-language-model head, lacks {missing[:2]}")
        self.model = model.to(self.device).eval()

    def fill(self, texts: Iterable[str], rank: int = 3, batch: int = 256) -> dict[str, str]:
        """Fill the first mask of each text with the guess of this rank (0 is the most likely).

        The whole sequence is decoded, as transformers' fill-mask pipeline does, so that word
        pieces join ("a wig" and "##gling" are "a wiggling").  A text whose mask was truncated is
        left out.
        """
        torch, found = self.torch, dict[str, str]()
        texts = sorted(set(texts), key=lambda text: (len(text), text))
        for at in range(0, len(texts), batch):
            part = texts[at : at + batch]
            rows = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                logits = self.model(**rows.to(self.device)).logits.float().cpu()
            for text, ids, scores in zip(part, rows["input_ids"].cpu(), logits, strict=True):
                places = (ids == self.tokenizer.mask_token_id).nonzero().flatten()
                if len(places):
                    filled = ids.clone()
                    filled[places[0]] = scores[places[0]].topk(rank + 1).indices[rank]
                    filled = filled[filled != self.tokenizer.pad_token_id]
                    found[text] = str(self.tokenizer.decode(filled, skip_special_tokens=True))
        return found

    def score(self, texts: Sequence[str], batch: int = 256) -> list[float]:
        """Pseudo-log-likelihood of each text in nats (Salazar et al., 2020): tokens masked in turn.

        Texts that differ only in spaces get the same score.
        """
        torch, head = self.torch, self.model.get_output_embeddings()
        total = dict.fromkeys((" ".join(text.split()) for text in texts), 0.0)
        known = list(total)
        ids = self.tokenizer(known, truncation=True, max_length=64)["input_ids"] if known else []
        rows = sorted((len(x), i, k) for i, x in enumerate(ids) for k in range(1, len(x) - 1))
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            every, width = torch.arange(len(part)), part[-1][0]
            place = torch.tensor([k for _, _, k in part])
            padded = torch.tensor([ids[i] + [0] * (width - n) for n, i, _ in part])
            mask = torch.tensor([[1] * n + [0] * (width - n) for n, _, _ in part])
            wanted = padded[every, place]
            padded[every, place] = self.tokenizer.mask_token_id
            # The last layer, by far the largest, runs at the masked positions only.
            hook = head.register_forward_pre_hook(lambda _, x: (x[0][every, place, None],))  # noqa: B023
            with torch.inference_mode():
                logits = self.model(padded.to(self.device), mask.to(self.device)).logits
            hook.remove()
            found = logits[:, 0].float().log_softmax(-1).cpu()[every, wanted].tolist()
            for (_, i, _), value in zip(part, found, strict=True):
                total[known[i]] += value
        return [total[" ".join(text.split())] for text in texts]


def _released(captions: Sequence[str], keys: Sequence[str], engine: Engine) -> list[Made]:
    """Negatives as the published code makes them, bugs included; only the draws are seeded.

    It uses spaCy's NOUN, ADJ and VERB words.  With three or more nouns the first two are exchanged
    by ``str.replace``.  One random word of each class is masked where it first appears (even inside
    another word) and filled with the 4th guess of the masked model; nothing is checked.  A class
    without a word is null here; there the model fills a bare mask, which distilroberta-base fills
    with "###", the text of a missing negative.  train.py --recipe released encodes "###" for null.
    """
    assert engine.parse is not None
    assert engine.masked is not None
    classes = {"ADJ": "attribute", "NOUN": "object", "VERB": "action"}
    drawn: list[dict[str, str]] = []
    for doc, key in zip(map(engine.parse, captions), keys, strict=True):
        caption, texts = str(doc.text), dict[str, str]()
        words = {p: [t.text for t in doc if t.pos_ == p] for p in classes}
        nouns = words["NOUN"]
        if len(nouns) > 2:
            swapped = caption.replace(nouns[0], "temp1").replace(nouns[1], nouns[0])
            texts["relation"] = swapped.replace("temp1", nouns[1])
        rng = random.Random(
            f"{engine.options.seed}:{key}:{caption}".encode("utf-8", "surrogatepass")
        )
        for pos, name in classes.items():
            if words[pos]:
                mask = engine.masked.tokenizer.mask_token
                texts[name] = caption.replace(rng.choice(words[pos]), mask, 1)
        drawn.append(texts)
    filled = engine.masked.fill(t for texts in drawn for n, t in texts.items() if n != "relation")
    none = Negative(None, (), "no word of its class")
    made = []
    for texts in drawn:
        found = {n: Negative(filled[t], (), "replace") for n, t in texts.items() if t in filled}
        if "relation" in texts:
            found["relation"] = Negative(texts["relation"], (), "exchange")
        made.append({name: found.get(name, none) for name in engine.options.types})
    return made


# A language model as an engine
#
# One answer has all types of a caption.  It must pass the checks of the lexicon's negatives: one
# changed span or an exchange, of the right type, not true by another caption, not equal.

TASK = """\
You write hard negatives: sentences that differ from the caption of an image at one place and are \
false of the image. Change as little as possible and keep every other word as it is. Each sentence \
must be grammatical English and clearly false, going by all captions of the image. Do not use \
"no", "not" or "without".
relation: exchange two noun phrases ("a man riding a horse": "a horse riding a man"); only where \
that cannot be, replace one preposition or linking verb by one that contradicts it.
attribute: exchange the attributes of two nouns ("a red bus and a blue car": "a blue bus and a red \
car"); only where that cannot be, replace one colour, size, age, material or number.
object: replace one noun by another of its kind.
action: replace one verb by another that cannot go on at the same time, in the same form.
Answer with one JSON object and nothing else. Its keys are {types}; each value is the sentence, or \
null where none can be made.

Caption: {caption}
Other captions of the image: {others}"""
AGAIN = "Not accepted: {reasons}. Answer again, with one JSON object that has the keys {types}."
NONE_GIVEN = "the model gave none"
TRIES = 6  # of a request
PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds after the first try, doubled after each one
ANSWER_TOKENS = 1024


def _server_chat(args: argparse.Namespace) -> Chat:
    """A function that queries the server of --llm by the OpenAI-compatible chat protocol."""
    try:
        parts = urllib.parse.urlsplit(args.llm)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.username:
        raise DataError(f"--llm {args.llm}: want a URL like http://localhost:8000/v1")
    key = os.environ.get(args.llm_key_env, "").strip() if args.llm_key_env else ""
    if args.llm_key_env and not re.fullmatch("[!-~]+", key):
        raise DataError(
            f"--llm-key-env {args.llm_key_env}: the environment has no such key, or one with "
            "spaces or other letters than ASCII; export it first"
        )
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    shape = {"model": args.llm_model, "temperature": 0, "seed": args.seed}
    shape["max_tokens"] = ANSWER_TOKENS

    def send(body: bytes) -> tuple[int, bytes, float]:
        """Status, content, and seconds that the server wants us to wait."""
        connection = kind(parts.netloc, timeout=args.llm_timeout)
        try:
            path = parts.path.rstrip("/") + "/chat/completions"
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            wait = response.headers.get("Retry-After", "")
            return response.status, response.read(), float(wait) if wait.isdecimal() else 0.0
        except (OSError, http.client.HTTPException) as error:
            return 0, (str(error) or type(error).__name__).encode(), 0.0
        finally:
            connection.close()

    def ask(messages: list[dict[str, str]], stop: threading.Event) -> str:
        """The text of one answer; a busy or failing server is retried with growing pauses."""
        body = json.dumps({**shape, "messages": messages}).encode()
        for attempt in range(TRIES):
            status, content, wait = send(body)
            if status == 200:
                try:
                    return str(json.loads(content)["choices"][0]["message"]["content"])
                except (ValueError, LookupError, TypeError, RecursionError):
                    content = b"that is not of the chat protocol: " + content
            said = " ".join(content.decode("utf-8", "replace").split())[:200]
            said = f"{status or ''} {said}".replace(key or "\0", "***").strip()
            if status not in (0, 200, 408, 425, 429) and status < 500:
                raise DataError(
                    f"--llm {args.llm}: refuses a request ({said}); "
                    "check the address, --llm-model and --llm-key-env"
                )
            pause = min(max(wait, PAUSE * 2**attempt), LONGEST_PAUSE)
            if attempt == TRIES - 1 or stop.wait(pause):
                break
        raise DataError(f"--llm {args.llm}: gave no answer ({said}); repeat the command to resume")

    return ask


def _asked(engine: Engine, number: int, job: Job, stop: threading.Event) -> Made:
    """The negatives of one caption: rejected answers are requested once more, then --fallback."""
    assert engine.chat is not None
    caption, others, types = job[0]["caption"], job[1], engine.options.types
    task = TASK.format(types=", ".join(types), caption=caption, others=" | ".join(others) or "none")
    messages = [{"role": "user", "content": task}]
    made: Made = {}
    asked = list(types)
    for _ in range(2):
        answer = engine.chat(messages, stop)
        given = _parse_answer(answer, types)
        for name in asked:
            taken = [n.text for n in made.values() if n.text]
            made[name] = _accepted(name, caption, given, others, taken)
        asked = [n for n in asked if made[n].text is None and made[n].how != NONE_GIVEN]
        if not asked:
            break
        reasons = "; ".join(f"{name}: {made[name].how}" for name in asked)
        again = AGAIN.format(reasons=reasons, types=", ".join(asked))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
    if engine.fallback == "lexicon" and any(n.text is None for n in made.values()):
        for name, own in _made(engine, [job], [number])[0].items():
            same = [_plain_words(n.text) for n in made.values() if n.text]
            if made[name].text is None and own.text and _plain_words(own.text) not in same:
                made[name] = own
    return {name: made[name] for name in types}


def _parse_answer(answer: str, types: Sequence[str]) -> dict[str, Any] | str:
    """The JSON object of an answer, which may be in a ```json fence, or what is wrong."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", answer, re.DOTALL)
    try:
        given = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return "the answer is not JSON"
    if not isinstance(given, dict) or not given.keys() <= set(types):
        return "the answer is not an object with these keys"
    return given


def _accepted(
    name: str, caption: str, given: dict[str, Any] | str, others: Sequence[str], taken: list[str]
) -> Negative:
    """The caption with the edits of an answer, or None and the reason."""
    text = given if isinstance(given, str) else given.get(name, "")
    edits, how = edits_between(caption, text) if isinstance(text, str) else ((), "")
    new = apply_edits(caption, edits)
    why = ""
    if isinstance(given, str):
        why = given
    elif text is None:
        why = NONE_GIVEN
    elif not isinstance(text, str) or not text.strip() or "\n" in text.strip():
        why = "no sentence was given"
    elif any(_plain_words(text) == _plain_words(other) for other in (caption, *others, *taken)):
        why = "it is a caption of the image, or another negative"
    elif not edits:
        why = "it changes more than one place, or only adds or drops words"
    elif how == "exchange" and name not in ("relation", "attribute"):
        why = f"an exchange is no {name} negative"
    elif not all(_is_of(name, how, read(caption), edit) for edit in edits):
        why = f"it changes something else than the {name}"
    why = why or contradicted(caption, new, others)
    return Negative(None, (), why) if why else Negative(new, edits, how)


def _is_of(name: str, how: str, s: Sentence, edit: Edit) -> bool:
    """Whether an edit of a caption touches what a type changes; articles may change in any."""
    at = [i for i, (start, end) in enumerate(s.spans) if start < edit[1] and end > edit[0]]
    heads = {p.head for p in s.phrases}.intersection(at)
    tags = {s.tags[i] for i in at}
    return tags <= {"D"} or {
        "relation": bool(heads) if how == "exchange" else not tags.isdisjoint("PGZBEIL"),
        "attribute": not heads and not tags.isdisjoint("AMNSGED"),
        "object": bool(heads),
        "action": not tags.isdisjoint("GZBEI"),
    }.get(name, True)


def _answer_words(text: str) -> list[re.Match[str]]:
    """Words and punctuation, without final punctuation."""
    found = list(WORD.finditer(text))
    while found and not found[-1][0][0].isalnum():
        found.pop()
    return found


def _plain_words(text: str) -> list[str]:
    """Normalise capitals, spaces, final punctuation, and "a" or "an", for comparison."""
    found, articles = [m[0].casefold() for m in _answer_words(text)], words().sets["articles"]
    return [min(articles) if word in articles else word for word in found]


def edits_between(caption: str, text: str) -> tuple[tuple[Edit, ...], str]:
    """The edits from caption to sentence, if they are one replaced span or an exchange.

    Returns:
        edits and "exchange" or "replace"; no edits if it is neither.
    """
    spans = _changed_spans(_plain_words(caption), _plain_words(text))
    old, new = _answer_words(caption), _answer_words(text)
    edits: list[Edit] = []
    at = to = 0
    for a, b, c, d in [*spans, (len(old), len(old), len(new), len(new))] if spans else []:
        for one, two in zip(old[at:a], new[to:c], strict=True):
            if one[0].casefold() != two[0].casefold():  # a or an
                edits.append((one.start(), one.end(), two[0]))
        if b > a:
            fresh = text[new[c].start() : new[d - 1].end()]
            edits.append((old[a].start(), old[b - 1].end(), fresh))
        at, to = b, d
    return tuple(edits), "exchange" if len(spans) == 2 else "replace"


def _changed_spans(old: list[str], new: list[str]) -> list[tuple[int, int, int, int]]:
    """Spans of changed words: two that were exchanged, one that was replaced, or none."""
    moves = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changes = [move for move in moves if move[0] != "equal"]
    if len(old) == len(new) and changes:
        same = [a == b for a, b in zip(old, new, strict=True)]
        i, n = same.index(False), len(same) - same[::-1].index(False)
        for x, y in itertools.product(range(1, n - i), repeat=2):
            swapped = old[n - y : n] + old[i + x : n - y] + old[i : i + x]
            if x + y <= n - i and swapped == new[i:n]:
                return [(i, i + x, i, i + y), (n - y, n, n - x, n)]
    if len(changes) != 1 or changes[0][0] != "replace":
        return []
    _, a, b, c, d = changes[0]
    short = b - a <= max(1, len(old) // 2) and d - c <= b - a + 2
    return [(a, b, c, d)] if short else []


def _ask_all(jobs: Iterable[tuple[int, Job]], engine: Engine) -> Iterator[Line]:
    """Lines in the order in which the answers arrive.

    After Ctrl-C or an error no new request is sent, and pending answers are kept.
    """
    tasks: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Line | BaseException] = queue.SimpleQueue()
    stop, todo, waiting = threading.Event(), iter(jobs), 0

    def work() -> None:
        while True:
            number, job = tasks.get()
            try:
                answers.put(_line(engine, number, job, _asked(engine, number, job, stop)))
            except Exception as error:  # raised again where the answers are read
                answers.put(error)

    for task in itertools.islice(todo, engine.requests):
        threading.Thread(target=work, daemon=True).start()
        tasks.put(task)
        waiting += 1
    fault: BaseException | None = None
    while waiting:
        try:
            found: Line | BaseException = answers.get()
            waiting -= 1
        except KeyboardInterrupt as error:
            if stop.is_set():
                raise
            print(f"waiting for {waiting} answers; Ctrl-C again to lose them", file=sys.stderr)
            found = error
        if isinstance(found, BaseException):
            fault = fault or found
            stop.set()
        else:
            yield found
        for task in () if stop.is_set() else itertools.islice(todo, 1):
            tasks.put(task)
            waiting += 1
    if fault:
        raise fault


# The command

UNSHAPING = {"captions", "out", "overwrite", "workers", "stats", "device"}  # no effect on lines
UNSHAPING |= {"llm", "llm_key_env", "llm_requests", "llm_timeout"}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the layout of __doc__ and print every default."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare every option."""
    parser = argparse.ArgumentParser(
        prog="negatives.py", description=__doc__, formatter_class=_Help
    )
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTIONS", help='a file, "-" for stdin, or .tar shards')
    add("--text", metavar="CAPTION", help="print the negatives of one caption")
    add("--out", type=Path, metavar="FILE.jsonl", help="the manifest, or the folder of shards")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    engines = ["lexicon", "spacy", "released", "llm"]
    add("--engine", choices=engines, default="lexicon", help="how captions are rewritten")
    add("--types", type=split_types, default=NEGATIVE_TYPES, metavar="A,B", help="types to make")
    text = "probability of an exchange where a caption allows exchange and replacement, 0 to 1"
    add("--exchange", type=float, default=0.6, metavar="SHARE", help=text)
    text = "least fit of a new word with each neighbour by the counts of the file; higher makes "
    add("--plausible", type=float, default=-2.0, metavar="NATS", help=text + "fewer")
    text = "largest log odds of the classifier for a negative; lower: harder to detect, but fewer"
    add("--refine", type=float, default=inf, metavar="NATS", help=text)
    add("--seed", type=int, default=0, metavar="N", help="seed of all random choices")
    add("--workers", type=int, default=1, metavar="N", help="processes (lexicon and spacy)")
    add("--limit", type=int, metavar="N", help="read the first N captions only")
    add("--stats", action="store_true", help="print coverage, exchanges and the rule of each null")
    add("--explain", action="store_true", help='list the edits (key "edits" in the manifest)')
    table = parser.add_argument_group("tables").add_argument
    table("--image-column", metavar="NAME", help="column of file names in a .csv or .tsv")
    table("--caption-column", metavar="NAME", help="column of captions in a .csv or .tsv")
    table("--negative", nargs="+", default=(), metavar="COLUMN[:TYPE]", help="negatives to keep")
    model = parser.add_argument_group("models").add_argument
    model("--spacy-model", metavar="NAME", default="en_core_web_sm", help="for spacy, released")
    model("--mlm", metavar="DIR_OR_NAME", default="distilroberta-base", help="for released")
    model("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of spaCy and --mlm")
    text = "server of the OpenAI-compatible chat protocol, as http://localhost:8000/v1"
    model("--llm", metavar="URL", help=text)
    model("--llm-model", metavar="NAME", help="model name on the server")
    model("--llm-key-env", metavar="NAME", help="environment variable that holds the key")
    model("--llm-requests", type=int, default=16, metavar="N", help="parallel requests")
    model("--llm-timeout", type=float, default=120.0, metavar="S", help="seconds for an answer")
    text = "used if no answer of the language model is accepted"
    model("--fallback", choices=["lexicon", "null"], default="lexicon", help=text)
    args = parser.parse_args(argv)
    shards = [name.endswith(".tar") for name in args.captions]
    unknown = [name for name in args.types if name not in NEGATIVE_TYPES]
    counts = (args.workers, args.llm_requests, 1 if args.limit is None else args.limit)
    rules = {
        "want either CAPTIONS or --text": bool(args.captions) == (args.text is not None),
        "--out goes with CAPTIONS; --text prints": args.text is not None and args.out,
        "--out is missing: name the .jsonl file to write, or the folder of the shards": (
            args.captions and args.out is None
        ),
        "--workers, --limit and --llm-requests must be at least 1": min(counts) < 1,
        "several CAPTIONS must all be .tar shards": len(args.captions) > 1 and not all(shards),
        "--limit does not go with shards": any(shards) and args.limit,
        "--exchange must be from 0 to 1": not 0 <= args.exchange <= 1,
        "--llm-timeout must be above 0": args.llm_timeout <= 0,
        "--refine and --plausible must be numbers": isnan(args.refine + args.plausible),
        f"--types {','.join(unknown)}: want some of {','.join(NEGATIVE_TYPES)}": unknown,
        "--engine llm and --llm URL go together": (args.engine == "llm") != bool(args.llm),
        "--llm-model is missing, the server's name of the model": args.llm and not args.llm_model,
    }
    for rule in (rule for rule, broken in rules.items() if broken):
        parser.error(rule)
    return args


def main(argv: list[str] | None = None) -> None:
    """Write the negatives of a file, or print those of one caption."""
    args = parse_args(argv)
    gc.disable()  # no reference cycles here; collecting takes a quarter of the time
    try:
        if args.text is not None:
            _print_text(args)
        elif args.captions[0].endswith(".tar"):
            _rewrite_shards(args)
        else:
            _rewrite_file(args)
    finally:
        gc.enable()


def _print_text(args: argparse.Namespace) -> None:
    job: Job = ({"caption": args.text}, ())
    engine = _engine(args)
    stop = threading.Event()
    made = _asked(engine, 0, job, stop) if engine.chat else _made(engine, [job], [0])[0]
    for name, negative in made.items():
        print(f"{name:<10}{negative.text or f'- ({negative.how})'}")
        for edit in _edits(args.text, negative) if args.explain else ():
            print(f"{'':<10}  {edit['start']}-{edit['end']}: {edit['old']!r} -> {edit['new']!r}")


def _edits(caption: str, negative: Negative) -> list[dict[str, Any]]:
    return [
        {"start": start, "end": end, "old": caption[start:end], "new": new}
        for start, end, new in sorted(negative.edits)
    ]


def _rewrite_file(args: argparse.Namespace) -> None:
    out, source = args.out, args.captions[0]
    if out.is_dir() or not out.name:
        raise DataError(f"--out {out} is a folder; name a file in it")
    if launcher().world > 1:
        raise DataError(f"{source}: ranks share .tar shards; run one process with --workers")
    if out.exists() and not args.overwrite:
        raise DataError(f"--out {out} exists; name another file or add --overwrite")
    if out.exists() and source != "-" and out.samefile(source):
        raise DataError(f"--out {out} is the source itself; name another file")
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    found = read_captions(source, **columns, negatives=args.negative)
    rows = [record._asdict() for record in itertools.islice(found, args.limit)]
    if not rows:
        raise DataError(f"{source}: no captions in it; is it the right file?")
    types = _settle_types(rows, args.types)
    engine = _engine(args)
    with _journal(args, out, _jobs(rows), source) as journal:
        if -1 in journal.at:
            journal.fill(_taught(engine, rows))
        header = _header(args, journal, types, Path(source).name)
        with writing(out, True, partial=out.with_name(out.name + ".partial.new")) as file:
            file.write(json_line(header))
            file.writelines(map(journal.line, range(len(rows))))
    _report(args, journal.counts)


def _settle_types(rows: list[dict[str, Any]], made: Sequence[str]) -> tuple[str, ...]:
    """All types of the output: those to make, and others that the source has already."""
    own = dict.fromkeys(n for row in rows for n, given in row["negatives"].items() if given)
    types = tuple(dict.fromkeys((*made, *own)))
    for row in rows:
        row["negatives"] = {name: row["negatives"].get(name) for name in types}
    return types


def _image_of(row: dict[str, Any]) -> str:
    image = row.get("image_id") if row.get("image_id") is not None else row.get("image")
    return "" if image is None else str(image)


def _jobs(rows: list[dict[str, Any]]) -> list[Job]:
    """Each row with the other captions of its image."""
    captions: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        captions[_image_of(row)].append(row["caption"])
    captions[""] = []
    return [
        (row, tuple(c for c in captions[_image_of(row)] if c != row["caption"])) for row in rows
    ]


def _line(engine: Engine, number: int, job: Job, made: Made) -> Line:
    row = {**job[0], "negatives": {**job[0]["negatives"], **{n: x.text for n, x in made.items()}}}
    if engine.explain:
        row["edits"] = {n: _edits(row["caption"], x) if x.text else None for n, x in made.items()}
        row["how"] = {n: x.how for n, x in made.items()}
    return number, [made[name].how for name in engine.options.types], json_line(row)


def _work(engine: Engine, block: Sequence[tuple[int, Job]]) -> list[Line]:
    made = _made(engine, [job for _, job in block], [n for n, _ in block])
    return [_line(engine, n, job, found) for (n, job), found in zip(block, made, strict=True)]


def _results(jobs: list[tuple[int, Job]], engine: Engine, workers: int) -> Iterator[Line]:
    """The line of each job, from this process, from several, or from a language model."""
    blocks = [jobs[at : at + CHUNK] for at in range(0, len(jobs), CHUNK)]
    workers = 1 if engine.masked else min(workers, len(blocks))
    if engine.chat or workers < 2:
        yield from _ask_all(jobs, engine) if engine.chat else ()
        for block in () if engine.chat else blocks:
            yield from _work(engine, block)
        return
    served: list[tuple[Process, Connection]] = []
    try:
        for k in range(workers):
            here, there = Pipe(duplex=False)
            args = (engine, blocks[k::workers], there)
            served.append((Process(target=_serve, args=args, daemon=True), here))
            served[-1][0].start()
            there.close()
        for k in range(len(blocks)):
            try:
                found = served[k % workers][1].recv()
            except EOFError:
                raise DataError(
                    "--workers: one was killed, perhaps for memory; repeat the command to resume"
                ) from None
            if isinstance(found, Exception):
                raise found
            yield from found
    finally:
        for process, _ in served:
            process.terminate()


def _serve(engine: Engine, blocks: Sequence[list[tuple[int, Job]]], pipe: Connection) -> None:
    """Work on blocks in another process."""
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            for block in blocks:
                pipe.send(_work(engine, block))
        except Exception as error:  # raised again where the results are read
            pipe.send(error)


def _header(
    args: argparse.Namespace, journal: Journal, types: Sequence[str], source: str
) -> dict[str, Any]:
    header = {"manifest": 1, "engine": args.engine, "seed": args.seed}
    if args.engine in ("spacy", "released"):
        header["spacy"] = args.spacy_model
    if args.engine == "released":
        header["mlm"] = Path(args.mlm).name
    else:
        header |= {"exchange": args.exchange, "plausible": args.plausible}
        header |= {"refine": args.refine} if args.refine < inf else {}
    if args.engine == "llm":
        header |= {"llm": args.llm_model, "fallback": args.fallback}
    checksum = hashlib.sha256()
    for number in range(len(journal.at)):
        checksum.update(journal.line(number))
    tallies = {name: _tally(journal.counts, name) for name in args.types}
    figures = ("negatives", "exchanges", "nulls")
    return {
        **header,
        "types": types,
        "source": source,
        "captions": len(journal.at),
        **{key: {name: x[k] for name, x in tallies.items()} for k, key in enumerate(figures)},
        "sha256": checksum.hexdigest(),
    }


def _tally(counts: Counts, name: str) -> tuple[int, int, dict[str, int]]:
    """Negatives of a type, how many of them are exchanges, and nulls by rule."""
    found = {how: n for (of, how), n in sorted(counts.items()) if of == name}
    exchanged, replaced = found.pop("exchange", 0), found.pop("replace", 0)
    return exchanged + replaced + found.pop("instead of exchange", 0), exchanged, found


def _report(args: argparse.Namespace, counts: Counts) -> None:
    """Coverage, percentage of exchanges, and the rules of the nulls."""
    for name in args.types if args.stats else ():
        made, exchanged, nulls = _tally(counts, name)
        total = max(1, made + sum(nulls.values()))
        share = exchanged / max(made, 1)
        print(f"{name:<10}{made:>8} of {total} ({made / total:.1%}), {share:.1%} by exchange")
        for rule, count in sorted(nulls.items(), key=lambda item: -item[1]):
            print(f"{'':<10}{count:>8} null: {rule}")


# Interrupted runs


class Journal:
    """The finished lines of an output, in NAME.partial, from which the same command resumes.

    Each line has the number of a caption, how its types were made, and its line of the output.
    Lines are in any order.
    """

    def __init__(self, args: argparse.Namespace, jobs: list[Job], file: BinaryIO) -> None:
        """An empty journal of these captions."""
        self.args, self.jobs, self.file = args, jobs, file
        self.counts: Counts = Counter()
        self.at = array("q", [-1]) * len(jobs)  # where the line of each job begins

    def resume(self, path: Path, mark: bytes) -> None:
        """Read the journal of an interrupted run; ``mark`` is the first line of the file."""
        self.file.seek(0)
        head, end = self.file.readline(), len(mark)
        if head and not head.startswith(b'{"manifest": 1, "unfinished"'):
            raise DataError(f"{path}: was not written by this script; move it away")
        if head not in (b"", mark) and not self.args.overwrite:
            raise DataError(
                f"{path}: left by a run with other options, captions or another version "
                "of this script; resume with those, move it away or add --overwrite"
            )
        for number, line in enumerate(self.file if head == mark else (), 2):
            if not line.endswith(b"\n"):
                break  # incomplete line
            try:
                index, hows, row = line.split(b"\t", 2)
                place, made = int(index), json.loads(hows)
                if self.at[place] >= 0 or len(made) != len(self.args.types) or row[:1] != b"{":
                    raise ValueError
            except (ValueError, LookupError, TypeError):
                raise DataError(f"{path}: line {number} is damaged; move the file away") from None
            self.at[place] = end
            self.counts.update(zip(self.args.types, made, strict=True))
            end += len(line)
        self.file.truncate(end if head == mark else 0)
        self.file.write(mark if head != mark else b"")

    def fill(self, engine: Engine) -> None:
        """Make the lines that are missing."""
        left = [(n, job) for n, job in enumerate(self.jobs) if self.at[n] < 0]
        end = self.file.seek(0, os.SEEK_END)
        for number, hows, line in _results(left, engine, self.args.workers):
            entry = b"%d\t%s\t%s" % (number, json.dumps(hows).encode(), line)
            self.file.write(entry)
            self.at[number], end = end, end + len(entry)
            self.counts.update(zip(self.args.types, hows, strict=True))
            if engine.chat:  # an answer costs more than a write
                self.file.flush()

    def line(self, number: int) -> bytes:
        """The line of a caption."""
        self.file.seek(self.at[number])
        return self.file.readline().split(b"\t", 2)[2]


@contextlib.contextmanager
def _journal(
    args: argparse.Namespace, out: Path, jobs: list[Job], source: str
) -> Iterator[Journal]:
    """The journal of ``out``, locked while in use, and removed when the output is written."""
    path, digest = out.with_name(out.name + ".partial"), hashlib.sha256()
    for made_by in (Path(__file__), WORDS, TAGGER):  # all that affects the lines
        digest.update(made_by.read_bytes())
    options = {k: v for k, v in vars(args).items() if k not in UNSHAPING}
    digest.update(json.dumps([options, source], default=str).encode())
    for job in jobs:
        digest.update(json.dumps(job).encode())
    try:
        with path.open("a+b") as file:
            if not hold(file) or not path.exists() or not os.path.samestat(
                os.fstat(file.fileno()), path.stat()
            ):  # fmt: skip
                raise DataError(f"{path}: another run is writing it; wait, or name another --out")
            journal = Journal(args, jobs, file)
            journal.resume(path, json_line({"manifest": 1, "unfinished": digest.hexdigest()}))
            yield journal
            path.unlink()
    except OSError as error:
        raise DataError(
            f"--out {path}: cannot be written ({why(error)}); check folder and disk, "
            "and start again"
        ) from None


# Shards


def _rewrite_shards(args: argparse.Namespace) -> None:
    """Copy webdataset shards into a folder, with negatives in the .json of each sample.

    Every rank takes each WORLD_SIZE-th shard.  Existing shards are kept.
    """
    paths = sorted(map(Path, args.captions))
    double = next((n for n, count in Counter(path.name for path in paths).items() if count > 1), "")
    if double:
        raise DataError(f"{double}: two shards have this name and would be written to one file")
    if args.out.exists() and not args.out.is_dir():
        raise DataError(f"--out {args.out} is a file; shards need a folder")
    for path in paths:
        if (args.out / path.name).exists() and path.samefile(args.out / path.name):
            raise DataError(f"--out {args.out} has the source {path} itself; name another folder")
    rank, world, _ = launcher()
    mine = [p for p in paths[rank::world] if args.overwrite or not (args.out / p.name).exists()]
    total: Counts = Counter()
    if mine:
        engine = _taught(_engine(args), (row for path in paths for _, _, row in _samples(path)))
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--out {args.out}: cannot be created ({error.strerror})") from None
        for path in mine:
            total.update(_rewrite_shard(path, args, engine))
    there = len(paths[rank::world]) - len(mine)
    left = f", {there} were there already (--overwrite makes them again)" if there else ""
    print(f"rank {rank} of {world}: {len(mine)} shards written{left}", file=sys.stderr)
    _report(args, total)


def _rewrite_shard(path: Path, args: argparse.Namespace, engine: Engine) -> Counts:
    samples = list(_samples(path))
    rows = [row for _, _, row in samples]
    types = _settle_types(rows, args.types)
    for row in rows if types != NEGATIVE_TYPES else ():
        row["types"] = types
    out = args.out / path.name
    with _journal(args, out, _jobs(rows), path.name) as journal:
        journal.fill(engine)
        with (
            writing(out, True, partial=out.with_name(out.name + ".partial.new")) as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            for number, (stem, parts, _) in enumerate(samples):
                add_sample(tar, stem, {**parts, "json": journal.line(number)})
    return journal.counts


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """Name, members and row of every sample of a shard."""
    for stem, parts in read_samples(path):
        place = f"{path}: sample {stem}"
        row = sample_row(stem, parts, place)
        types = header_types(row, place) or NEGATIVE_TYPES
        yield stem, parts, {**row, **parse_record(row, place, types)._asdict()}


if __name__ == "__main__":
    sys.exit(run_script(main, "negatives.py"))

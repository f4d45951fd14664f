import json
import random

import open_clip
import pytest
import torch

import data
from data import DataError, encode_text, holds, make_scene, pack_texts
from evaluate import load_model


def test_every_negative_of_the_shapes_world_is_false_and_keeps_its_half():
    halves = {"train": set(), "test": set()}
    for split, seen in halves.items():
        for index in range(1500):
            scene = make_scene(split, 0, index)
            assert scene == make_scene(split, 0, index)
            assert holds(scene, scene.claim)
            rng = random.Random(index)
            claims = [edit(scene, rng) for edit in data.EDITS.values()]
            assert not any(holds(scene, claim) for claim in claims if claim)
            for claim in [scene.claim, *filter(None, claims)]:
                looks = [p[1:] for p in (claim.first, claim.second) if p]
                seen.add(frozenset(looks) if claim.second else looks[0])
    assert not halves["train"] & halves["test"]


def test_swaps_use_the_same_words():
    for index in range(300):
        scene = make_scene("test", 0, index)
        for name in ("swap-object", "swap-attribute"):
            claim = data.EDITS[name](scene, random.Random(0))
            if claim:
                words = [
                    sorted(data.say(c, 0).replace("an ", "a ").split())
                    for c in (claim, scene.claim)
                ]
                assert words[0] == words[1]


@pytest.mark.parametrize("name", ["shapes-tiny", "ViT-B-32"])
def test_packed_text_equals_encode_text(name):
    if name == "shapes-tiny":
        model = load_model(name)
        net, tokenizer = model.net, model.tokenizer
    else:  # the real context and activation, in a small tower
        config = open_clip.get_model_config(name)
        config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2}
        config["vision_cfg"] |= {"width": 64, "layers": 1}
        net, tokenizer = open_clip.CLIP(**config), open_clip.get_tokenizer(name)
    texts = ["a cat", "", "a red circle left of a blue square", "word " * 100, "a dog on a mat"] * 3
    net.eval()
    with torch.no_grad():
        packed = pack_texts(texts, tokenizer)
        found, wanted = encode_text(net, packed), net.encode_text(tokenizer(texts))
    assert len(packed.tokens) < len(texts)
    assert (found - wanted).abs().max() <= 1e-5
    assert torch.equal(data._unpack(packed, net), tokenizer(texts))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ('{"image": "../a.jpg", "caption": "a"}', "leaves the folder"),
        ('{"image": "/a.jpg", "caption": "a"}', "leaves the folder"),
        ('{"image": "a.jpg", "caption": " "}', "caption"),
        ('{"image": "a.jpg", "caption": "a", "negatives": {"x": "b"}}', "negatives"),
    ],
)
def test_malformed_lines_are_named(line, message, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"manifest": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=f"m.jsonl:2: .*{message}"):
        list(data.read_manifest(path))


def test_shapes_manifest_round_trip(tmp_path, capsys):
    out = tmp_path / "s.jsonl"
    data.main(["shapes", "--out", str(out), "--images", str(tmp_path), "--limit", "3"])
    data.main(["check", str(out), "--images", str(tmp_path)])
    assert "all 3 pictures decode" in capsys.readouterr().out
    first = json.loads(out.read_text().splitlines()[0])
    (tmp_path / first["image"]).write_bytes(b"torn")
    with pytest.raises(DataError, match="1 of 3 pictures"):
        data.main(["check", str(out), "--images", str(tmp_path)])
    with pytest.raises(DataError, match="--overwrite"):
        data.main(["shapes", "--out", str(out), "--images", str(tmp_path)])


def test_split_features_puts_each_text_in_its_place():
    items = [
        data.Item(torch.zeros(3, 2, 2), data.Captions("a", None, ("b", None, "c", None)), ""),
        data.Item(torch.zeros(3, 2, 2), data.Captions("d", "e", (None, "f", None, None)), ""),
    ]
    tokenizer = load_model("shapes-tiny").tokenizer
    batch = data.Collate(tokenizer, positives=True, negatives="valid")(items)
    features = torch.arange(1.0, 7)[:, None]  # a d, e, b c f
    captions, positives, negatives = data.split_features(features, batch)
    assert captions[:, 0].tolist() == [1, 2]
    assert positives[:, 0].tolist() == [0, 3]
    assert negatives[..., 0].tolist() == [[4, 0, 5, 0], [0, 6, 0, 0]]

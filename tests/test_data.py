import json
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

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
                said = (data.say(c, 0).replace("an ", "a ") for c in (claim, scene.claim))
                one, two = (sorted(sentence.split()) for sentence in said)
                assert one == two


def small(kind, **text):
    """The real context and activations, in small towers."""
    config = open_clip.get_model_config("ViT-B-32-quickgelu" if kind == "quick" else "ViT-B-32")
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 3, **text}
    config["vision_cfg"] |= {"width": 64, "head_width": 32, "layers": 2}
    made = open_clip.CustomTextCLIP if kind == "custom" else open_clip.CLIP
    return made(**config).eval(), open_clip.get_tokenizer("ViT-B-32")


TEXTS = [
    *("a cat on a mat", "a cat on a hat", "", "a red circle left of a blue square", "word " * 100),
    *("a dog", "a cat on a mat", "A dog runs after a cat on a mat", "a dog runs from a cat"),
]


def outputs_and_gradients(net, encode):
    net.zero_grad()
    out = encode()
    generator = torch.Generator().manual_seed(0)
    sum((x.float() * torch.randn(x.shape, generator=generator)).sum() for x in out).backward()
    return out, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["plain", "quick", "custom"])
@pytest.mark.parametrize("share", [True, False])
def test_packed_captions_equal_encode_text_in_value_and_gradient(kind, share):
    net, tokenizer = small(kind)
    images = torch.randn(3, 3, 224, 224)
    packed = pack_texts(TEXTS, tokenizer, share=share)
    ours, grads = outputs_and_gradients(
        net, lambda: (encode_text(net, packed), data.encode_image(net, images))
    )
    wanted, expected = outputs_and_gradients(
        net, lambda: (net.encode_text(tokenizer(TEXTS)), net.encode_image(images))
    )
    for x, y in zip(ours, wanted, strict=True):
        assert (x - y).abs().max() <= 1e-5
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), name
    assert torch.equal(data.unpack_texts(packed, net), tokenizer(TEXTS))


def test_packed_captions_under_bf16_differ_by_rounding_alone():
    net, tokenizer = small("plain")
    packed = pack_texts(TEXTS, tokenizer)
    with torch.no_grad():
        exact = net.encode_text(tokenizer(TEXTS))
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = encode_text(net, packed), net.encode_text(tokenizer(TEXTS))
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert (ours - exact).abs().max() > 1e-4  # bf16 was at work


def test_a_prefix_tree_computes_what_captions_share_once():
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    texts = ["a red cat sits", "a red cat runs", "a red cat sits", "a dog"]
    # start a red cat (sits end)(runs end) (dog end): 4 + 2 + 2 + 2
    assert pack_texts(texts, tokenizer).computed == 10
    assert pack_texts(texts, tokenizer, share=False).computed == 6 + 6 + 4
    packed = pack_texts(texts, tokenizer)
    assert packed.where[0] == packed.where[2]


def test_rows_are_filled_and_none_is_wider_than_allowed():
    tokenizer = load_model("shapes-tiny").tokenizer
    texts = [f"an image of {i} things and {j} more" for i in range(20) for j in range(5)]
    for share in (True, False):
        packed = pack_texts(texts, tokenizer, share=share)
        assert packed.tokens.shape[1] <= data.ROW_CONTEXTS * 32
        assert packed.computed >= 0.8 * packed.tokens.numel()


def test_a_tower_that_sees_all_tokens_falls_back_to_full_length():
    net, tokenizer = small("custom", no_causal_mask=True, pool_type="last")
    assert not data.can_pack(net)
    assert data.text_layout(net) == "one to a row at full length"
    with torch.no_grad():
        found = encode_text(net, pack_texts(TEXTS, tokenizer))
        assert torch.equal(found, net.encode_text(tokenizer(TEXTS)))


def test_a_hugging_face_tower_is_cut_to_the_longest_caption():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from open_clip.hf_model import HFTextEncoder

    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=100, hidden_size=32, **size, pad_token_id=0)
    tower = HFTextEncoder("bert", 16, config=config, pooler_type="mean_pooler", proj_type="linear")
    net = torch.nn.Module()
    net.text, net.seen = tower.eval(), []
    net.encode_text = lambda tokens: net.seen.append(tokens.shape[1]) or tower(tokens)
    tokens = torch.zeros(3, 77, dtype=torch.int64)
    for row, length in enumerate((4, 9, 6)):
        tokens[row, :length] = torch.randint(1, 100, (length,))
    assert data.text_layout(net) == "one to a row, cut to the longest"
    with torch.no_grad():
        found = encode_text(net, data.pack_tokens(tokens, clip=False))
        assert (found - tower(tokens)).abs().max() <= 1e-5
    assert net.seen == [9]


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
    assert "all 3 images decode" in capsys.readouterr().out
    first = json.loads(out.read_text().splitlines()[0])
    (tmp_path / first["image"]).write_bytes(b"torn")
    with pytest.raises(DataError, match="1 of 3 images"):
        data.main(["check", str(out), "--images", str(tmp_path)])
    with pytest.raises(DataError, match="--overwrite"):
        data.main(["shapes", "--out", str(out), "--images", str(tmp_path)])


def test_split_features_puts_each_text_in_its_place():
    items = [
        data.Example(torch.zeros(3, 2, 2), data.Captions("a", None, ("b", None, "c", None)), ""),
        data.Example(torch.zeros(3, 2, 2), data.Captions("d", "e", (None, "f", None, None)), ""),
    ]
    tokenizer = load_model("shapes-tiny").tokenizer
    (batch,) = data.Collate(tokenizer, positives=True, negatives="valid")(items)
    features = torch.arange(1.0, 7)[:, None]  # a d, e, b c f
    captions, positives, negatives = data.split_features(features, batch)
    assert captions[:, 0].tolist() == [1, 2]
    assert positives[:, 0].tolist() == [0, 3]
    assert negatives[..., 0].tolist() == [[4, 0, 5, 0], [0, 6, 0, 0]]


def test_no_two_captions_of_an_image_meet_in_a_batch():
    image_of = np.repeat(np.arange(23), [5] * 20 + [1, 2, 9]).astype(np.int32)
    lengths, seen = set(), []
    for epoch in range(6):
        batches = data.epoch_batches(len(image_of), image_of, 4, 0, epoch)
        lengths.add(len(batches))
        seen.append(batches.flatten())
        for batch in batches:
            assert len(set(image_of[batch])) == 4
        assert len(np.unique(batches)) == batches.size
    # rounds of 23, 22, 21, 21, 21 and four of one image: 5 + 5 + 5 + 5 + 5
    assert lengths == {25}
    assert not np.array_equal(seen[0], seen[1])
    assert len(np.unique(np.concatenate(seen))) == len(image_of)  # all have their turn
    everything = data.epoch_batches(len(image_of), None, 4, 0, 0)
    assert everything.size == len(image_of) // 4 * 4


def test_every_source_has_its_share_of_each_batch_and_its_own_epochs():
    assert data.share_batch(8, [2, 1]) == [5, 3]
    assert data.share_batch(10, [1, 1, 1]) == [4, 3, 3]

    class Source(list):
        image_of, types = None, ()
        path = "a.jsonl"

    sources = [Source(range(20)), Source(range(9))]
    mixture = data.Mixture(sources, [1, 1], 6, 0, True)
    batches = list(mixture.batches(0, 13))
    assert mixture.steps == [6, 3]
    assert all([key[0] for key in batch] == [0, 0, 0, 1, 1, 1] for batch in batches)
    assert [batch[0][1] for batch in batches] == [0] * 6 + [1] * 6 + [2]
    assert sorted(key[2] for batch in batches[:3] for key in batch[3:]) == list(range(9))
    assert list(mixture.batches(7, 13)) == batches[7:]
    with pytest.raises(DataError, match=r"takes 12 captions of a\.jsonl, which has 9"):
        data.Mixture(sources, [1, 2], 18, 0, True)


def plainly(image, rng):
    return transforms.functional.pil_to_tensor(image)


def manifest(folder, images=6, captions=2):
    lines = ['{"manifest": 1}', ""]
    for i in range(images):
        Image.new("RGB", (40 + i, 30), (20 * i, 5, 9)).save(folder / f"{i}.jpg")
        for c in range(captions):
            negatives = {"object": f"naïve {i} {c}"} if c == 0 else {}
            record = {"image": f"{i}.jpg", "caption": f"image {i} — {c}", "negatives": negatives}
            lines.append(json.dumps(record, ensure_ascii=c == 0))
    path = folder / "m.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_manifest_is_read_by_offsets_as_it_is_read_in_order(tmp_path):
    path = manifest(tmp_path)
    found = data.ManifestDataset(path, tmp_path, plainly)
    assert [found.record(i) for i in range(len(found))] == list(data.read_manifest(path))
    assert found.has_negatives
    item = found[3, 5]
    assert item.image.shape == (3, 30, 42)
    assert (item.captions.caption, item.captions.positive) == ("image 2 — 1", "image 2 — 0")
    assert found.image_of.tolist().count(found.image_of[0]) == 2


@pytest.mark.parametrize("fault", ["missing", "torn"])
def test_bad_images_stop_or_are_skipped(fault, tmp_path):
    path = manifest(tmp_path, images=3, captions=1)
    bad = tmp_path / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:60]) if fault == "torn" else bad.unlink()
    with pytest.raises(DataError, match=r"1\.jpg"):
        data.ManifestDataset(path, tmp_path, plainly)[0, 1]
    skipping = data.ManifestDataset(path, tmp_path, plainly, 0, "skip")
    item = skipping[0, 1]
    assert item.captions.caption == "image 2 — 0"
    assert "1.jpg" in item.fault


def test_crops_depend_on_seed_epoch_and_index_alone(tmp_path):
    path = manifest(tmp_path)
    (tmp_path / "0.jpg").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.jpg")
    transform = data.train_transform(load_model("shapes-tiny").net, least=0.3)
    read = data.ManifestDataset(path, tmp_path, transform)
    first = read[0, 0].image
    random.seed(5)
    assert torch.equal(read[0, 0].image, first)
    assert not torch.equal(read[1, 0].image, first)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 64, 64)


@pytest.mark.parametrize("shape", [(640, 480), (300, 300), (900, 200), (200, 900)])
def test_cut_parts_have_the_area_and_ratio_of_random_resized_crop(shape, monkeypatch):
    parts = []
    monkeypatch.setattr(Image.Image, "crop", lambda image, box: parts.append(box) or image)
    transform = data.train_transform(load_model("shapes-tiny").net, least=0.5)
    for seed in range(200):
        transform(Image.new("RGB", shape), random.Random(seed))
    areas, ratios = [], []
    for x, y, right, below in parts:
        assert 0 <= x < right <= shape[0]
        assert 0 <= y < below <= shape[1]
        areas.append((right - x) * (below - y) / shape[0] / shape[1])
        ratios.append((right - x) / (below - y))
    assert all(0.74 < ratio < 1.35 for ratio in ratios)
    if max(shape) < 900:  # else no part of half the area has such a ratio
        assert 0.5 < min(areas) < 0.6
        assert 0.9 < max(areas) <= 1
        assert len(set(parts)) > 150
    else:
        assert len(set(parts)) == 1


def test_cut_is_what_torchvision_cuts_where_all_is_cut():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8))
    ours = data.train_transform(load_model("shapes-tiny").net, least=1)(image, random.Random(0))
    resize = transforms.Resize((64, 64), transforms.InterpolationMode.BICUBIC)
    assert torch.equal(ours, transforms.PILToTensor()(resize(image)))


def test_normalise_is_to_tensor_and_normalize():
    net = load_model("shapes-tiny").net
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    cfg = net.visual.preprocess_cfg
    wanted = transforms.Normalize(cfg["mean"], cfg["std"])(image / 255)
    assert (data.normalise(image, net) - wanted).abs().max() < 1e-6

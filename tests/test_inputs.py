"""Images, options and features that are not what they seem."""

import json
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from evaluate import load_model


def gradient_image(width=64, height=48):
    """Dark at the left, green at the top."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, 255 - y, 0 * x], axis=-1).astype(np.uint8)


def cut(path, size=(32, 32), least=1.0, seed=0, **options):
    visual = SimpleNamespace(preprocess_cfg={"size": size, "interpolation": "bicubic"})
    transform = data.train_transform(SimpleNamespace(visual=visual), least, **options)
    return data.open_image(path, use=lambda image: transform(image, random.Random(seed))).float()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "L", "LA", "P", "RGBA", "CMYK", "1"])
def test_numbers_of_more_than_8_bits_keep_their_greys(mode, tmp_path):
    grey = gradient_image()[..., 0]
    if mode.startswith("I"):
        kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
        image = Image.fromarray((grey.astype(kind) << 8).astype(kind))
    else:
        image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a.tif")
    found = np.asarray(data.open_image(tmp_path / "a.tif"))
    assert found.shape == (48, 64, 3)
    if mode == "1":
        assert set(np.unique(found)) == {0, 255}
    elif mode != "CMYK":
        assert np.abs(found[..., 0].astype(int) - grey).max() <= 1
    assert found.mean() == pytest.approx(grey.mean(), abs=3)


@pytest.mark.parametrize("kind", ["float", "beyond 16 bits", "below 0", "too large"])
def test_images_that_are_no_colours_are_refused(kind, tmp_path, monkeypatch):
    if kind == "float":
        image = Image.fromarray(np.random.rand(8, 8).astype(np.float32))
    else:
        number = {"beyond 16 bits": 70_000, "below 0": -1}.get(kind, 5)
        image = Image.fromarray(np.full((8, 8), number, dtype=np.int32))
    image.save(tmp_path / "a.tif")
    if kind == "too large":
        assert Image.MAX_IMAGE_PIXELS * 2 == 200_000_000
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(data.DataError, match=r"a\.tif: cannot be decoded \("):
        data.open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_photos_are_turned_upright(orientation, kind, tmp_path):
    """The same photo, as each position of the camera stores it, is the same to training."""
    upright = Image.fromarray(gradient_image())
    back = {5: 5, 6: 2, 7: 6, 8: 4, 2: 0, 3: 3, 4: 1}.get(orientation)
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "jpg" else {"lossless": True} if kind == "webp" else {}
    stored.save(tmp_path / f"a.{kind}", exif=exif, **options)
    upright.save(tmp_path / f"b.{kind}", **options)
    found, wanted = cut(tmp_path / f"a.{kind}"), cut(tmp_path / f"b.{kind}")
    assert (found - wanted).abs().mean() < 3
    if orientation > 1:
        assert (cut(tmp_path / f"a.{kind}", exif=False) - wanted).abs().mean() > 20
        raw = np.asarray(data.open_image(tmp_path / f"a.{kind}"))  # as evaluation reads it
        assert raw.shape[:2] == stored.size[::-1]


def test_broken_exif_is_no_error(tmp_path):
    for text in (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff", b"Exif\0\0", b"x"):
        Image.fromarray(gradient_image()).save(tmp_path / "a.jpg", exif=text)
        assert cut(tmp_path / "a.jpg").shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "size", "scale"),
    [
        ((640, 480), (224, 224), 2),
        ((640, 448), (224, 224), 2),
        ((640, 447), (224, 224), 1),
        ((2000, 1900), (224, 224), 8),
        ((640, 480), (224, 448), 1),
        ((300, 300), (224, 224), 1),
    ],
)
def test_jpegs_are_decoded_at_a_scale_that_keeps_the_crop(
    shape, size, scale, tmp_path, monkeypatch
):
    Image.fromarray(gradient_image(*shape)).save(tmp_path / "a.jpg", quality=95)
    seen = []
    whole = data.to_rgb

    def spy(image):
        seen.append(whole(image).size)
        return whole(image)

    monkeypatch.setattr(data, "to_rgb", spy)
    reduced = cut(tmp_path / "a.jpg", size)
    full = cut(tmp_path / "a.jpg", size, reduce=False)
    assert seen == [(-(-shape[0] // scale), -(-shape[1] // scale)), shape]
    assert (reduced - full).abs().mean() < 2
    for seed in range(30):  # a part of any size
        assert cut(tmp_path / "a.jpg", size, 0.1, seed).shape[1:] == size


def test_only_jpegs_are_reduced(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    assert torch.equal(cut(tmp_path / "a.png"), cut(tmp_path / "a.png", reduce=False))


PHOTOS = ["--data", "m.jsonl", "--images", "."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ema", "0.9"], "--ema: does nothing without --distill"),
        (["--fixed-threshold", "3"], "--fixed-threshold: does nothing without --threshold fixed"),
        (["--threshold", "fixed", "--cap", "3"], "--cap: does nothing with --threshold fixed"),
        (["--recipe", "negclip", "--cap", "3"], "--cap: does nothing where the cmr weight is 0"),
        (["--cmr-weight", "0", "--threshold", "max"], "--threshold: does nothing where the cmr"),
        (["--imc", "none", "--imc-weight", "1"], "--imc-weight: does nothing where imc is none"),
        (["--recipe", "clip", "--imc-weight", "1"], "--imc-weight: does nothing where imc is none"),
        (["--focal-gamma", "2"], "--focal-gamma: does nothing without --own-weight"),
        (["--label-smoothing", "0.1"], "--label-smoothing: does nothing without --own-weight"),
        (["--data", "a.tar", "--images", "."], "--images: does nothing with shards"),
        (["--captions", "all"], "--captions: does nothing in the shapes world"),
        (["--exif", "ignore"], "--exif: does nothing in the shapes world"),
        (["--full-decode"], "--full-decode: does nothing in the shapes world"),
        (["--on-bad-image", "skip"], "--on-bad-image: does nothing in the shapes world"),
        (["--batch-size", str(10**20)], "--batch-size 10+: must be a number from 1 to 2147483648"),
        (["--batch-size", "2000000000"], "--batch-size 2000000000: takes"),
        (["--workers", "100000"], "--workers 100000: must be a number from 0 to 1024"),
        (["--warmup", "-1"], "--warmup -1: must be a number from 0"),
        (["--cap", "1e99"], r"--cap 1e\+99: must be a number from 0"),
        (["--lr", "0"], "--lr 0.0: must be a number .*above 0"),
        (["--lora", "100000"], "--lora 100000: the model has a"),
        (["--ema", "1.5", "--distill", "1"], "--ema 1.5: must be a number from 0 to 1"),
        (["--out", "x" * 300], "cannot be written"),
        (["--model", "deep.json"], "deep.json: is not a model config"),
        (["--model", "list.json"], "list.json: holds no model config"),
        (["--model", "extra.json"], r"extra.* cannot be built .*unexpected"),
    ],
)
def test_options_that_cannot_be_meant(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "extra.json").write_text(
        evaluate.SHAPES_CONFIGS["shapes-tiny"].read_text().replace("{", '{"extra": 1,', 1)
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(data.DataError, match=message) as told:
        train.main(["--steps", "1", *options])
    assert len(str(told.value)) < 700
    assert "\n" not in str(told.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_trainer_runs_where_there_is_no_resource_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert train.memory(torch.device("cpu")) == 0


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_overwrite_replaces_regular_files_alone(kind, tmp_path):
    out, folder = tmp_path / "m.jsonl", tmp_path / "results"
    folder.mkdir()
    for path in (out, folder / "results.md"):
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            (tmp_path / "precious").write_text("mine")
            path.symlink_to(tmp_path / "precious")
        else:
            os.mkfifo(path)
    command = ["shapes", "--out", str(out), "--images", str(tmp_path / "i"), "--limit", "1"]
    with pytest.raises(data.DataError, match="regular file"):
        data.main([*command, "--overwrite"])
    with pytest.raises(data.DataError, match=r"results\.md exists, not replaced"):
        evaluate.check_out(folder, True)
    assert not (tmp_path / "i").exists()
    assert kind != "link" or (tmp_path / "precious").read_text() == "mine"


def spoil_nan(rows):
    rows[0, 0] = float("nan")
    return rows


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_nan,
        lambda rows: rows[:, :-1] / rows[:, :-1].norm(dim=1, keepdim=True),
        lambda rows: rows * 2,
        lambda rows: rows.double(),
        lambda rows: rows[:0],
    ],
    ids=["nan", "narrow", "long", "double", "empty"],
)
def test_features_of_a_cache_that_cannot_be_the_models_are_made_again(spoil, tmp_path, capsys):
    args = evaluate.parse_args(["--ckpt", "x", "--cache", str(tmp_path)])
    args.device = "cpu"
    wanted = evaluate.Encoder(load_model("shapes-tiny"), args)
    model = wanted.model
    rows = wanted.texts(["a dog", "a cat"]).rows
    (file,) = tmp_path.rglob("*.pt")
    kept = torch.load(file, weights_only=True)
    torch.save(kept | {"rows": spoil(kept["rows"].clone())}, file)
    again = evaluate.Encoder(model, args)
    assert not again.known
    assert "is damaged; recomputed" in capsys.readouterr().err
    np.testing.assert_allclose(again.texts(["a dog", "a cat"]).rows, rows, atol=1e-6)


def test_check_counts_negatives_that_a_model_does_not_see(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = ["check", str(tmp_path / "m.jsonl"), "--images", str(tmp_path), "--model"]
    long = "word " * 40
    for caption, negative in ((long + "red", long + "blue"), ("A dog", "a  DOG")):
        record = {"image": "a.png", "caption": caption, "negatives": {"object": negative}}
        (tmp_path / "m.jsonl").write_text(json.dumps(record) + "\n")
        for model in (str(evaluate.SHAPES_CONFIGS["shapes-tiny"]), "shapes-tiny"):  # of 32 tokens
            data.main([*command, model])
            assert "1 negatives have their caption's tokens in" in capsys.readouterr().out
    for model in ("nonsense", "suites", str(tmp_path / "none.json")):
        with pytest.raises(data.DataError, match="open_clip knows no such model"):
            data.main([*command, model])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "\\ud800.png", "caption": "a"}', "byte 0: holds half a character"),
        ('{"image": "a.png", "caption": "a \\ud83d"}', "byte 0: holds half a character"),
        (
            '{"image": "a.png", "caption": "a", "negatives": {"object": ["b", "\\udc00"]}}',
            "byte 0: holds half a character",
        ),
        ('{"image": "%s.png", "caption": "a"}' % ("x" * 300), "images of .* are missing"),
        ('{"image": "a.png", "caption": "a", "image_id": %s}' % ("1" * 5000), ":1: is not JSON"),
        ("[" * 100_000, ":1: is not JSON"),
    ],
)
def test_lines_that_no_file_or_tokenizer_can_hold(line, message, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(line)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = ["--data", str(path), "--images", str(tmp_path), "--model", "shapes-tiny"]
    with pytest.raises(data.DataError, match=message):
        train.main([*command, "--steps", "1", "--recipe", "clip", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
    with pytest.raises(data.DataError, match=r"half a char|cannot be used|is not JSON"):
        data.main(["check", str(path), "--images", str(tmp_path)])

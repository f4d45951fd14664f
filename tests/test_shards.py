"""Streams of shards: what they hold, their order, their end, and where a resumed run goes on."""

import gzip
import io
import itertools
import json
import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import manifest, plainly

import data
import train
from data import DataError, ShardStream


def tar(path, samples, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


def image(kind="JPEG", colour=5):
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (colour, 9, 9)).save(out, kind)
    return out.getvalue()


def said(stream, batches):
    return [[x.captions.caption for x in batch] for batch in itertools.islice(stream, batches)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A manifest of 20 images with 3 captions each, as shards of 9 examples."""
    folder = tmp_path_factory.mktemp("written")
    path = manifest(folder, images=20, captions=3)
    data.write_shards(path, folder, folder / "s", 9)
    records = {r.caption: tuple(r.negatives.values()) for r in data.read_manifest(path)}
    return f"{folder}/s/{{000000..000006}}.tar", records


def test_shards_hold_what_the_manifest_held(written, tmp_path):
    pattern, records = written
    found = next(iter(ShardStream(pattern, plainly, 0, (0, 0, 1), batch=20)))
    assert all(item.captions.negatives == records[item.captions.caption] for item in found)
    once = list(itertools.chain(*said(ShardStream(pattern, plainly, 0, (0, 0, 1)), 60)))
    assert sorted(once) == sorted(records)
    assert once != sorted(once)
    images = [[s for s, _ in data.read_samples(x)] for x in data.expand_braces(pattern)]
    assert [len(x) for x in images] == [9] * 6 + [6]


@pytest.mark.parametrize(("ranks", "batch"), [(1, 4), (1, 15), (2, 6), (3, 2)])
def test_readers_share_a_pass_and_no_batch_has_an_image_twice(ranks, batch, written, tmp_path):
    """Where there are more readers than shards a hash deals out the images."""
    pattern, records = written
    if ranks == 3:
        folder = Path(pattern).parents[1]
        data.write_shards(folder / "m.jsonl", folder, tmp_path / "one", 10_000)
        pattern = f"{tmp_path}/one/000000.tar"
    place = [(0, rank, ranks) for rank in range(ranks)]
    streams = [ShardStream(pattern, plainly, 0, here, batch=batch) for here in place]
    taken = [said(stream, 60 // ranks // batch) for stream in streams]
    for step in zip(*taken, strict=True):
        images = [caption.split(" ")[1] for captions in step for caption in captions]
        assert len(set(images)) == len(images) == ranks * batch
    if ranks == 1:
        assert sorted(itertools.chain(*taken[0])) == sorted(records)


@pytest.mark.parametrize("cut", [1, 3, 7, 20])
@pytest.mark.parametrize("bad", [False, True])
def test_a_stream_goes_on_where_it_was(cut, bad, written, tmp_path):
    pattern = written[0]
    if bad:  # some examples cannot be used
        samples = {f"{i:02}.jpg": image(colour=i) if i % 4 else b"torn" for i in range(33)}
        texts = {f"{i:02}.txt": f"caption {i}".encode() for i in range(33)}
        pattern = tar(tmp_path / "a.tar", dict(sorted({**samples, **texts}.items())))
    make = lambda **more: ShardStream(pattern, plainly, 0, (0, 0, 1), "skip", batch=4, **more)  # noqa: E731
    whole = list(itertools.islice(make(), 30))
    slot, state = whole[cut - 1][-1].state
    rest = list(itertools.islice(make(states={slot: json.loads(json.dumps(state))}), 30 - cut))
    for one, two in zip(whole[cut:], rest, strict=True):
        assert [x.captions for x in one] == [x.captions for x in two]
        assert all(torch.equal(x.image, y.image) for x, y in zip(one, two, strict=True))
        assert [x.fault for x in one] == [x.fault for x in two]
    with pytest.raises(DataError, match=r"began with 1 readers .* now there are 2"):
        next(iter(ShardStream(pattern, plainly, 0, (0, 0, 2), batch=4, states={slot: state})))


def test_a_block_does_not_reach_into_the_next_pass(written, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 16)
    stream = ShardStream(written[0], plainly, 0, (0, 0, 1), batch=5)
    captions = list(itertools.chain(*said(stream, 24)))
    assert sorted(captions[:60]) == sorted(captions[60:]) == sorted(written[1])
    assert captions[:60] != captions[60:]


@pytest.mark.slow
def test_a_run_on_shards_is_resumed_to_the_same_bits(written, tmp_path, monkeypatch):
    """With two workers, cut off where it is the second one's turn."""
    run = ["--data", written[0], "--model", "shapes-tiny", "--workers", "2", "--recipe", "negclip"]
    run += ["--steps", "5", "--batch-size", "4", "--log-every", "1", "--save-every", "1"]
    assert train.main([*run, "--out", str(tmp_path / "whole")]) == 0
    plain, calls = train.train_step, []

    def stopping(*inputs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*inputs)

    monkeypatch.setattr(train, "train_step", stopping)
    assert train.main([*run, "--out", str(tmp_path / "cut")]) == 143
    monkeypatch.undo()
    assert train.main([*run, "--out", str(tmp_path / "cut")]) == 0
    found, wanted = (
        torch.load(tmp_path / name / "latest.pt", weights_only=True)["state_dict"]
        for name in ("cut", "whole")
    )
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def good(i):
    return {f"{i}.jpg": image(), f"{i}.txt": b"a caption"}


BAD = {
    "empty": ({}, "holds no example"),
    "no images": ({"a.txt": b"a"}, "has none of .jpg"),
    "torn": ({"a.jpg": b"torn", "a.txt": b"a"}, "cannot be decoded"),
    "no caption": ({"a.jpg": image()}, "caption must be a sentence"),
    "not json": ({"a.jpg": image(), "a.json": b"{"}, "is not JSON"),
    "deep": ({"a.jpg": image(), "a.json": b"[" * 100_000}, "is not JSON"),
    "too few": (good(1), "a reader.s 1 images cannot fill a batch of 2"),
}


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("kind", BAD)
def test_shards_without_an_example_end(kind, policy, tmp_path):
    samples, message = BAD[kind]
    stream = ShardStream(tar(tmp_path / "a.tar", samples), plainly, 0, (0, 0, 1), policy, batch=2)
    with pytest.raises(DataError, match=message):
        next(iter(stream))


def test_a_gzip_of_zeros_ends(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(DataError, match=r"a\.tar\.gz"):
        next(iter(ShardStream(str(tmp_path / "a.tar.gz"), plainly, 0, (0, 0, 1))))


def test_a_caption_of_null_is_that_of_the_txt(tmp_path):
    samples = {"a.b.jpg": image(), "a.b.txt": b"no", "c.jpg": image(), "c.txt": b"a caption"}
    samples["c.json"] = b'{"caption": null, "image": null}'
    path = tar(tmp_path / "a.tar", {name: x for name, x in samples.items() if name[0] == "c"})
    ((item,),) = itertools.islice(ShardStream(path, plainly, 0, (0, 0, 1)), 1)
    assert item.captions.caption == "a caption"


def test_shards_without_negatives_are_refused_where_the_recipe_needs_some(tmp_path):
    none = {"caption": "a", "negatives": dict.fromkeys(data.NEGATIVE_TYPES)}
    third = {"3.jpg": image(), "3.json": json.dumps(none).encode()}
    path = tar(tmp_path / "a.tar", {**good(1), **good(2), **third})
    run = ["--data", path, "--model", "shapes-tiny", "--steps", "1", "--batch-size", "2"]
    run += ["--workers", "0", "--out", str(tmp_path / "x")]
    assert train.main([*run, "--recipe", "negclip"]) == 2
    assert not (tmp_path / "x/latest.pt").exists()
    assert train.main([*run[:-1], str(tmp_path / "y"), "--recipe", "clip"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar:2", "local shards take no weight"),
        ("pipe:touch hacked.tar", "--remote allows URLs, and pipe:, which runs a command"),
        ("http://127.0.0.1:1/a.tar", "--remote allows URLs"),
        ("{a.tar", "braces do not match"),
        ("{9..1}.tar", "is no range"),
        ("{0..99999999}.tar", "is no range"),
        ("none.tar", "no such shard"),
    ],
)
def test_names_of_shards(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tar(tmp_path / "a.tar", good(1))
    with pytest.raises(DataError, match=message):
        train.main(["--data", name, "--steps", "1", "--recipe", "clip", "--model", "shapes-tiny"])
    assert not (tmp_path / "hacked.tar").exists()
    assert data.expand_braces("a{x,y}{08..10}.tar") == [
        f"a{a}{b}.tar" for a in "xy" for b in ("08", "09", "10")
    ]


def test_a_pipe_runs_where_it_is_allowed(tmp_path):
    pytest.importorskip("webdataset", reason="pip install webdataset")
    path = tar(tmp_path / "a.tar", good(1))
    stream = ShardStream(f"pipe:cat {path}", plainly, 0, (0, 0, 1), remote=True)
    assert next(iter(stream))[0].captions.caption == "a caption"


def test_written_shards_can_be_read_whatever_the_image_was(tmp_path):
    lines = []
    for kind in ("a.gif", "b.bmp", "c", "d.JPG", "e.webp", "f.tif", "g.png"):
        form = {"gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF", "png": "PNG"}
        (tmp_path / kind).write_bytes(image(form.get(kind[2:], "JPEG"), 200))
        lines.append(json.dumps({"image": kind, "caption": f"of {kind}"}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    command = ["shards", str(tmp_path / "m.jsonl"), "--images", str(tmp_path), "--out"]
    data.main([*command, str(tmp_path / "s")])
    items = next(iter(ShardStream(f"{tmp_path}/s/000000.tar", plainly, 0, (0, 0, 1), batch=7)))
    assert all(abs(float(item.image[0].float().mean()) - 200) < 9 for item in items)
    for size in ("0", "-1"):
        with pytest.raises(DataError, match=f"--size {size}: must be 1 or more"):
            data.main([*command, str(tmp_path / "t"), "--size", size])
    (tmp_path / "g.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"g\.png: cannot be decoded"):
        data.main([*command, str(tmp_path / "t"), "--size", "2"])
    assert not list((tmp_path / "t").iterdir())
    (tmp_path / "g.png").write_bytes(image("PNG"))
    (tmp_path / "t/000000.tar.partial").write_bytes(b"left by a run that was killed")
    data.main([*command, str(tmp_path / "t"), "--size", "2"])
    with pytest.raises(DataError, match="is not an empty folder"):
        data.main([*command, str(tmp_path / "t")])

"""While training: --val scores the weights of the moment, best.pt is kept, --log mirrors."""

import json
import time

import pytest
import torch
from PIL import Image

import data
import evaluate
import train

TYPES = ("relation", "attribute", "object", "action")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A manifest of four photos with negatives, a tiny model, and SugarCrepe's files."""
    root = tmp_path_factory.mktemp("val")
    (root / "val2017").mkdir()
    rows = []
    for k, word in enumerate(("dog", "cat", "bus", "horse")):
        name = f"val2017/{k:012d}.jpg"
        Image.effect_noise((40, 32), 60 + k).convert("RGB").save(root / name)
        negatives = dict.fromkeys(TYPES) | {"object": "a red car", "attribute": f"a blue {word}"}
        rows += [{"image": name, "caption": f"a red {word}", "negatives": negatives}]
        rows += [{"image": name, "caption": f"one {word}", "negatives": dict.fromkeys(TYPES)}]
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"filename": f"{0:012d}.jpg", "caption": "a", "negative_caption": "b"}
    (root / "sugarcrepe").mkdir()
    for name in evaluate.read_table("suites")["sugarcrepe"]["expected"]:
        (root / f"sugarcrepe/{name}.json").write_text(json.dumps({"0": row}))
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (root / "tiny.json").write_text(json.dumps(config))
    return root


def run(folder, out, *more):
    options = ["--data", folder / "m.jsonl", "--images", folder, "--model", folder / "tiny.json"]
    options += ["--batch-size", 4, "--workers", 0, "--device", "cpu", "--lr", 0.01, "--warmup", 0]
    options += ["--log-every", 1, "--out", out, *more]
    return train.main([str(option) for option in options])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_manifest_is_scored_as_evaluation_would(folder, tmp_path):
    val = ("--val", folder / "m.jsonl", "--val-root", folder, "--val-every", 2)
    assert run(folder, tmp_path / "run", "--steps", 3, *val) == 0
    scored = lines(tmp_path / "run/val.jsonl")
    assert [line["step"] for line in scored] == [0, 2, 3]
    # the oracle: the last weights, one caption at a time
    model = evaluate.load_model(str(folder / "tiny.json"), str(tmp_path / "run/latest.pt"))
    transform = evaluate.Encoder(model, encoder_options()).transform
    rows = lines(folder / "m.jsonl")
    right = {"object": [], "attribute": []}
    for row in (row for row in rows if any(row["negatives"].values())):
        image = transform(data.open_image(folder / row["image"]))[None]
        for kind, hits in right.items():
            texts = model.tokenizer([row["caption"], row["negatives"][kind]])
            with torch.no_grad():
                one, two = (model.net.encode_image(image), model.net.encode_text(texts))
            one, two = (torch.nn.functional.normalize(x, dim=-1) for x in (one, two))
            good, bad = (one @ two.T)[0].tolist()
            hits.append(good > bad)
    figures = scored[-1]["figures"]
    for kind, hits in right.items():
        assert figures[kind] == 25 * sum(hits)
    assert figures["mean of types"] == (figures["object"] + figures["attribute"]) / 2
    assert "val image to text R@1" in figures


def encoder_options():
    return train.argparse.Namespace(
        device="cpu", batch_size=None, precision="fp32", workers=0, cache=None
    )


def test_scoring_changes_no_weight_and_the_best_is_kept(folder, tmp_path):
    val = ("--val", folder / "m.jsonl", "--val-root", folder, "--val-every", 1)
    steps = ("--steps", 4)
    best = ("--best", "val text to image R@1")
    assert run(folder, tmp_path / "plain", *steps) == 0
    assert run(folder, tmp_path / "val", *steps, *val, *best) == 0
    plain, scored = (torch.load(tmp_path / name / "latest.pt") for name in ("plain", "val"))
    for key, value in plain["state_dict"].items():
        assert torch.equal(value, scored["state_dict"][key]), key
    table = lines(tmp_path / "val/val.jsonl")
    values = [line["figures"]["val text to image R@1"] for line in table]
    kit = torch.load(tmp_path / "val/best.pt")["kit"]
    first_best = values.index(max(values))
    assert (kit["step"], kit["value"]) == (table[first_best]["step"], max(values))
    assert kit["metric"] == "val text to image R@1"
    assert [line["best"] for line in table] == [max(values[: i + 1]) for i in range(len(values))]
    evaluate.load_model(None, str(tmp_path / "val/best.pt"))


def test_the_moving_average_is_scored_too(folder, tmp_path):
    val = ("--val", folder / "m.jsonl", "--val-root", folder, "--distill", 1, "--ema", 0.5)
    assert run(folder, tmp_path / "run", "--steps", 2, *val) == 0
    scored = lines(tmp_path / "run/val.jsonl")
    assert [line["weights"] for line in scored[:2]] == ["current", "ema"]
    assert scored[0]["figures"] == scored[1]["figures"]  # both are the start


@pytest.mark.parametrize(
    ("name", "metric"),
    [("shapes", "mean of 6 subsets"), ("sugarcrepe", "mean of 7 subsets")],
)
def test_a_suite_is_scored_by_its_headline(folder, tmp_path, name, metric, capsys):
    root = [] if name == "shapes" else ["--val-root", folder]
    assert run(folder, tmp_path / "run", "--steps", 1, "--val", name, *root) == 0
    assert f"val current at step 1: {metric} " in capsys.readouterr().out


def test_a_resumed_run_scores_on(folder, tmp_path):
    val = ("--val", folder / "m.jsonl", "--val-root", folder, "--val-every", 1)
    assert run(folder, tmp_path / "run", "--steps", 2, *val) == 0
    before = lines(tmp_path / "run/val.jsonl")
    checkpoint = torch.load(tmp_path / "run/latest.pt")
    checkpoint["train"]["step"] = 1  # as if it had been cut off there
    torch.save(checkpoint, tmp_path / "run/latest.pt")
    assert run(folder, tmp_path / "run", "--steps", 2, *val) == 0
    again = lines(tmp_path / "run/val.jsonl")
    assert [line["step"] for line in again] == [0, 1, 2]
    assert again[:2] == before[:2]
    (tmp_path / "run/val.jsonl").write_text('{"step": 0}\n')
    torch.save(checkpoint, tmp_path / "run/latest.pt")
    with pytest.raises(data.DataError, match=r"val\.jsonl: holds a line without the best score"):
        run(folder, tmp_path / "run", "--steps", 2, *val)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--val-every", "5"], "need --val, what to score"),
        (["--best", "x"], "need --val, what to score"),
        (["--val", "sugarcrepe"], "--val sugarcrepe: needs --val-root"),
        (["--val", "no.jsonl", "--val-root", "."], r"no\.jsonl"),
        (["--val", "shapes", "--val-every", "0"], "--val-every 0: must be"),
        (["--val", "M", "--val-root", "nowhere"], "4 images are missing, the first is nowhere"),
        (["--val", "M", "--val-root", "F", "--best", "x"], "--best x: is not one of mean of types"),
    ],
)
def test_what_cannot_be_scored_is_told(folder, tmp_path, given, message):
    names = {"M": folder / "m.jsonl", "F": folder}
    with pytest.raises(data.DataError, match=message):
        run(folder, tmp_path / "run", "--steps", 1, *(names.get(x, x) for x in given))


def test_tensorboard_shows_what_metrics_hold(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(folder, tmp_path / "run", "--steps", 3, "--log", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    wanted = lines(tmp_path / "run/metrics.jsonl")
    for key in ("loss", "threshold_object", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in wanted]


def test_wandb_takes_the_metrics_offline(folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run(folder, tmp_path / "run", "--steps", 3, "--log", "wandb") == 0
    wandb.finish()  # as the end of the process does
    wandb.teardown()
    (kept,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    for _ in range(60):  # its own process writes the file
        if b"threshold_object" in kept.read_bytes():
            break
        time.sleep(0.5)
    assert b"threshold_object" in kept.read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(folder, tmp_path, monkeypatch, name):
    monkeypatch.setitem(train.sys.modules, "wandb", None)
    monkeypatch.setitem(train.sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(data.DataError, match=f"--log {name}: is not installed; pip install {name}"):
        run(folder, tmp_path / "run", "--steps", 1, "--log", name)

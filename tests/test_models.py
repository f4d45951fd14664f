"""Models and images that open_clip does not know by name, and files that are not what they say."""

import json
import re

import open_clip
import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from evaluate import load_model, read_checkpoint

TINY = json.loads(evaluate.SHAPES_CONFIGS["shapes-tiny"].read_text())
TINY["vision_cfg"].pop("pos_embed_type", None)  # learned, as most models have it
SHORT = ["--steps", "2", "--batch-size", "4", "--log-every", "1", "--save-every", "1"]
PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}


def config(**vision):
    found = json.loads(json.dumps(TINY))
    found["vision_cfg"] |= {"layers": 1, **vision}
    found["text_cfg"] |= {"layers": 1}
    return found


def folder_of(place, **vision):
    """A folder of open_clip with weights and preprocessing of its own."""
    place.mkdir()
    (place / "c.json").write_text(json.dumps(config(**vision)))
    torch.manual_seed(3)
    net = load_model(str(place / "c.json")).net
    (place / "c.json").unlink()
    torch.save(net.state_dict(), place / "open_clip_pytorch_model.bin")
    about = {"model_cfg": config(**vision), "preprocess_cfg": PIXELS}
    (place / "open_clip_config.json").write_text(json.dumps(about))
    return place


def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asks for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize("name", ["mine", "ViT-B-32"])
def test_a_run_from_a_folder_resumes_and_is_evaluated_without_it(
    name, tmp_path, monkeypatch, capsys
):
    place = folder_of(tmp_path / name)
    run = ["--pretrained", str(place), "--out", str(tmp_path / "x"), *SHORT]
    stopping, calls = train.train_step, []

    def once(*inputs):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return stopping(*inputs)

    monkeypatch.setattr(train, "train_step", once)
    with pytest.raises(KeyboardInterrupt):
        train.main(run)
    monkeypatch.undo()
    (place / "open_clip_config.json").unlink()
    no_network(monkeypatch)
    assert train.main(run) == 0
    assert "from step 1" in capsys.readouterr().out
    model = load_model(None, str(tmp_path / "x/latest.pt"))
    assert model.net.visual.preprocess_cfg["mean"] == PIXELS["mean"]
    assert model.net.visual.preprocess_cfg["interpolation"] == "bilinear"
    assert model.about["model"] == name
    assert len(model.net.transformer.resblocks) == 1
    assert open_clip.get_model_config("ViT-B-32")["text_cfg"]["width"] == 512


TOWERS = {
    "bert": TINY | {"text_cfg": {"hf_model_name": "a/b"}},
    "timm": TINY | {"vision_cfg": {"timm_model_name": "hf-hub:a/b"}},
    "tokenizer": TINY | {"text_cfg": TINY["text_cfg"] | {"hf_tokenizer_name": "a/b"}},
}


@pytest.mark.parametrize(
    ("kit", "message"),
    [
        ({"model": "hf-hub:someone/else"}, "which open_clip does not know"),
        ({"model": "local-dir:/etc"}, "which open_clip does not know"),
        ({"model": "/etc/passwd"}, "which open_clip does not know"),
        ({"model": "x", "config": 3}, "holds no model config"),
        ({"model": "x", "config": {"text_cfg": 1, "vision_cfg": {}}}, "holds no model config"),
        ({"model": "x", "config": TINY | {"what": 1}}, "cannot be built .*what"),
        ({"model": "x", "config": TOWERS["bert"]}, "cannot be built"),
        ({"model": "x", "config": TOWERS["timm"]}, "cannot be built"),
        ({"model": "x", "config": TOWERS["tokenizer"]}, "tokenizer cannot be loaded"),
    ],
)
def test_names_in_a_checkpoint_do_not_reach_the_hub(kit, message, tmp_path, monkeypatch):
    state = load_model("shapes-tiny").net.state_dict()
    torch.save({"state_dict": state, "kit": kit}, tmp_path / "c.pt")
    no_network(monkeypatch)
    with pytest.raises(data.DataError, match=message):
        load_model(None, str(tmp_path / "c.pt"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", ""])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", None])
def test_names_before_weights_are_taken_off(prefix, key, tmp_path):
    state = {"logit_scale": torch.zeros(()), "visual.proj": torch.ones(2)}
    named = {prefix + name: value for name, value in state.items()}
    torch.save({key: named, "epoch": 3} if key else named, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt")[0].keys() == state.keys()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool, torch.int64])
def test_weights_that_are_not_floats_are_refused(dtype, tmp_path):
    state = load_model("shapes-tiny").net.state_dict()
    torch.save(state | {"text_projection": state["text_projection"].to(dtype)}, tmp_path / "c.pt")
    with pytest.raises(data.DataError, match=r"text_projection is torch.*must be floats"):
        load_model("shapes-tiny", str(tmp_path / "c.pt"))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vision_cfg", {"image_size": 96}, "visual.positional_embedding .*from 17 to 37"),
        ("vision_cfg", {"image_size": [32, 96]}, "visual.positional_embedding .*from 17 to 13"),
        ("text_cfg", {"context_length": 40}, ": positional_embedding .*from 32 to 40"),
    ],
)
def test_another_image_size_or_context_resizes_positions(part, change, said, tmp_path, capsys):
    other = json.loads(json.dumps(TINY))
    other[part] |= change
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "plain.json").write_text(json.dumps(TINY))
    plain = load_model(str(tmp_path / "plain.json"))
    kit = {"model": "plain", "activation": "gelu"}
    torch.save({"state_dict": plain.net.state_dict(), "kit": kit}, tmp_path / "c.pt")
    found = load_model(str(tmp_path / "other.json"), str(tmp_path / "c.pt"))
    assert re.search(said, capsys.readouterr().err)
    torch.save(plain.net.state_dict(), tmp_path / "d.pt")
    open_clip.add_model_config(tmp_path / "other.json")
    theirs = open_clip.create_model("other", pretrained=str(tmp_path / "d.pt"))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, found.net.state_dict()[key]), key


def test_a_model_that_is_not_square_trains_and_is_scored(tmp_path):
    (tmp_path / "wide.json").write_text(json.dumps(config(image_size=[32, 96])))
    out = tmp_path / "x"
    assert train.main(["--model", str(tmp_path / "wide.json"), "--out", str(out), *SHORT]) == 0
    model = load_model(None, str(out / "latest.pt"))
    assert data.image_size(model.net) == (32, 96)
    command = ["shapes", "--out", str(tmp_path / "m.jsonl"), "--images", str(tmp_path)]
    data.main([*command, "--limit", "4"])
    photos = data.ManifestDataset(tmp_path / "m.jsonl", tmp_path, data.train_transform(model.net))
    assert photos[0, 0].image.shape == (3, 32, 96)
    args = evaluate.parse_args(["--ckpt", str(out / "latest.pt")])
    args.device = "cpu"
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    rows = evaluate.Encoder(model, args).images([str(tmp_path / "a.png"), "shapes:0"]).rows
    assert rows.shape[0] == 2


def test_a_folder_of_transformers_is_refused_by_train(tmp_path):
    from test_evaluate import transformers_folder

    transformers_folder(tmp_path, "clip")
    with pytest.raises(data.DataError, match=r"is a model of transformers, which evaluate\.py"):
        train.main(["--pretrained", str(tmp_path), "--out", str(tmp_path / "x"), *SHORT])

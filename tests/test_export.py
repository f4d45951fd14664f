"""An exported folder gives the checkpoint's features in the library that it is for."""

import copy
import importlib
import json
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.nn.functional import normalize

import evaluate
from negatives import DataError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
export = importlib.import_module("export")

PREFIX = {"open_clip": "local-dir:", "transformers": ""}
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a dog chasing a cat", "A cat, chasing a dog! 2 of them", "the man's ball " * 9]


def make_checkpoint(path, activation="gelu", *, vision=None, text=None, **config):
    """A checkpoint of train.py's layout with random weights; returns its Model."""
    config = copy.deepcopy({**VIT, **config})
    config["vision_cfg"] |= vision or {}
    config["text_cfg"] |= text or {}
    json_path = path.with_suffix(".json")
    json_path.write_text(json.dumps(config))
    torch.manual_seed(1)
    model = evaluate.load_model(str(json_path), activation=activation)
    if hasattr(model.net, "logit_scale"):
        model.net.logit_scale.data.fill_(3.3)
    about = {"model": "vit", "activation": activation, "recipe": "ce-clip", "step": 7}
    about |= {"config": model.about["config"], "preprocess": model.about["preprocess"]}
    torch.save({"state_dict": model.net.state_dict(), "kit": about}, path)
    return model


def features(net, images, tokens):
    """Unit features of both towers."""
    with torch.inference_mode():
        net.eval()
        return normalize(net.encode_image(images), dim=1), normalize(net.encode_text(tokens), dim=1)


def load_open_clip(folder, photo):
    net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    return (*features(net, preprocess(photo)[None], tokens), net.logit_scale)


def load_transformers(folder, photo):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    net = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder, backend="pil")
    kind = {"text": TEXTS, "images": photo, "padding": True, "truncation": True}
    with torch.inference_mode():
        out = net(**processor(**kind, return_tensors="pt"))
        logits = net.logit_scale.exp() * out.image_embeds @ out.text_embeds.T
    assert torch.allclose(out.logits_per_image, logits, atol=1e-3)
    return normalize(out.image_embeds, dim=1), normalize(out.text_embeds, dim=1), net.logit_scale


@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
@pytest.mark.parametrize("load", [load_open_clip, load_transformers])
def test_each_library_loads_what_was_trained(load, activation, tmp_path):
    to = load.__name__.removeprefix("load_")
    path, folder = tmp_path / "latest.pt", tmp_path / "hub"
    model = make_checkpoint(path, activation, quick_gelu=activation == "gelu")  # the kit's counts
    export.main([str(path), "--out", str(folder), "--to", to, "--license", "cc-by-4.0"])
    noise = torch.rand(50, 70, 3, generator=torch.Generator().manual_seed(0)) * 255
    photo = Image.fromarray(noise.byte().numpy())
    pixels = PreprocessCfg(**model.net.visual.preprocess_cfg)
    images = image_transform_v2(pixels, is_train=False)(photo)[None]
    want = (*features(model.net, images, model.tokenizer(TEXTS)), model.net.logit_scale)
    again = evaluate.load_model(None, str(folder))  # evaluate.py reads it too
    assert again.about["activation"].replace("_", "") == activation
    kit = features(again.net, images, again.tokenizer(TEXTS))
    for got in (load(folder, photo), kit):
        for one, other in zip(got, want, strict=False):
            assert (one - other).abs().max() <= 1e-5
    card = (folder / "README.md").read_text()
    told = ("license: cc-by-4.0", f"| activation | {activation} |", f'"{PREFIX[to]}hub"')
    assert all(part in card for part in (*told, "Not evaluated"))


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": RESNET}, "its image tower is a ModifiedResNet"),
        ({"vision": {"pool_type": "avg"}}, "does not pool by the class token"),
        ({"vision": {"ls_init_value": 0.1}}, "weight .*ls_1.* has no place"),
        ({"vision": {"no_ln_pre": True}}, "weight .*pre_layrnorm.* has no place"),
        ({"vision": {"qk_norm": True}}, "has no place"),
        ({"vision": {"image_size": [32, 48]}}, "not square"),
        ({"vision": {"act_kwargs": {"approximate": "tanh"}}}, "its features differ by"),
        ({"text": {"pool_type": "first"}, "custom_text": True}, "its features differ by"),
        ({"text": {"pad_id": 0, "proj_bias": True}, "custom_text": True}, "has no place"),
        ({"init_logit_bias": -10.0}, "weight logit_bias has no place"),
        ({"custom_text": True, "vision": {"mlp_ratio": 2.0}}, ""),
    ],
)
def test_what_transformers_cannot_express_is_refused(options, message, tmp_path):
    pytest.importorskip("transformers", reason="pip install transformers")
    make_checkpoint(tmp_path / "a.pt", **options)
    run = [str(tmp_path / "a.pt"), "--out", str(tmp_path / "hub"), "--to", "transformers"]
    if message:
        with pytest.raises(DataError, match=message):
            export.main(run)
        assert not (tmp_path / "hub").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "a.json"}
    else:
        export.main(run)
    if "ResNet" in message:
        export.main([*run[:2], str(tmp_path / "own")])  # to open_clip


def test_the_card_shows_the_results_of_these_weights(tmp_path):
    model = make_checkpoint(tmp_path / "a.pt")
    cell = {"accuracy": 62.5, "low": 58.1, "high": 66.4, "scored": 500, "expected": 500, "ties": 0}
    suite = {"subsets": {"swap-object": cell}, "averages": {}, "costs": {}, "notes": []}
    result = {"weights_sha256": "0", "suites": {"shapes": {**suite, "tie_rule": "wrong"}}}
    own = {**copy.deepcopy(result), "weights_sha256": evaluate.hash_model(model)}
    result["suites"]["shapes"]["subsets"]["swap-object"]["accuracy"] = 11.1
    (tmp_path / "r.json").write_text(json.dumps({"other": result, "own": own}))
    run = [str(tmp_path / "a.pt"), "--out", str(tmp_path / "hub"), "--results"]
    export.main([*run, str(tmp_path / "r.json")])
    card = (tmp_path / "hub/README.md").read_text()
    assert "62.5 [58.1, 66.4]" in card
    assert "11.1" not in card
    run[2] = str(tmp_path / "two")
    for content, message in (
        (json.dumps({"other": result}), r"holds no result of these weights \(other\)"),
        ("{", r"is no results\.json"),
        ("[]", r"is no results\.json"),
    ):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(DataError, match=message):
            export.main([*run, str(tmp_path / "r.json")])
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "full"], "--out full: exists and is not empty"),
        (["--out", "a.pt"], r"--out a\.pt: exists and is not empty"),
        (["--out", "hub", "--push", "name"], "--push name: is not ORG/NAME"),
        (["--out", "hub", "--private"], "--private: needs --push"),
        (["--out", "hub", "--license", "My Own"], "--license My Own: is no licence id"),
    ],
)
def test_every_mistake_is_one_sentence_and_writes_nothing(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "a.pt").touch()
    there = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        export.main(["a.pt", *options])
    assert set(tmp_path.rglob("*")) == there


def test_push_uploads_to_a_new_repository_or_says_why_not(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    make_checkpoint(tmp_path / "a.pt")
    run = [str(tmp_path / "a.pt"), "--push", "org/name", "--out"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.*hf upload org/name"):
        export.main([*run, str(tmp_path / "offline")])
    assert (tmp_path / "offline/open_clip_model.safetensors").is_file()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    calls = []

    class Hub:
        def create_repo(self, name, private):
            calls.append((name, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export.main([*run, str(tmp_path / "hub"), "--private"])
    assert calls[0] == ("org/name", True)
    assert {"README.md", "open_clip_config.json", "vocab.json"} <= set(calls[1][1])
    assert "hf-hub:org/name" in (tmp_path / "hub/README.md").read_text()
    assert "uploaded to org/name" in capsys.readouterr().out

    def refuse(self, name, private):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(DataError, match=r"cannot be reached or refuses \(no route to host\)"):
        export.main([*run, str(tmp_path / "three")])

"""Every family of open_clip at a tiny size: a ce-clip step, resumed, evaluated, equal features.

A row starts from open_clip's own config of the family and makes it small.
"""

import json
import os
import signal

import open_clip
import pytest
import torch
from PIL import Image

import data
import evaluate
import train

VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
WORDS = {**TEXT, "vocab_size": 16, "hf_tokenizer_name": "HERE"}  # of the tokenizer below
TIMM = {"timm_drop_path": 0.0, "image_size": 64}
FAMILIES = {
    # name: (open_clip's config, embed_dim, vision_cfg, text_cfg, how captions are laid out)
    "OpenAI ViT": ("ViT-B-32-quickgelu", 16, VIT, TEXT, "packed"),
    "ResNet": ("RN50", 16, {**VIT, "layers": [1, 1, 1, 1], "width": 8}, TEXT, "packed"),
    "ConvNeXt": ("convnext_base", 16, {**TIMM, "timm_model_name": "test_convnext"}, TEXT, "packed"),
    "SigLIP": (
        *("ViT-B-16-SigLIP", 64, {"timm_model_name": "test_vit", "image_size": 160}),
        *({**WORDS, "width": 64}, "full length"),
    ),
    "SigLIP 2": (
        *("ViT-B-16-SigLIP2", 64, {"timm_model_name": "test_vit", "image_size": 160}),
        *({**WORDS, "width": 64}, "full length"),
    ),
    "CoCa": ("coca_ViT-B-32", 16, {**VIT, "attn_pooler_heads": 2}, TEXT, "full length"),
    "EVA": (
        *("EVA02-B-16", 16, {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224}),
        *(TEXT, "packed"),
    ),
    "MobileCLIP": (
        *("MobileCLIP2-S0", 16, {"timm_model_name": "fastvit_t8", "image_size": 64}),
        *(TEXT, "full length"),
    ),
    "CLIPA": ("ViT-L-14-CLIPA", 16, VIT, WORDS, "full length"),
    "DFN": ("ViT-H-14-378-quickgelu", 16, VIT, TEXT, "packed"),
    "PE": (
        "PE-Core-B-16",
        16,
        {"timm_model_name": "vit_pe_core_tiny_patch16_384", "image_size": 384},
        TEXT,
        "packed",
    ),
    "NLLB": (
        *("nllb-clip-base", 16, VIT),
        *({"hf_model_name": "HERE", "hf_tokenizer_name": "HERE"}, "cut to the longest"),
    ),
}
CAPTIONS = ("a red dog", "a blue cat", "a red cat", "a blue dog")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a tokenizer of a few words and a tiny text encoder, photos and a suite."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("families")
    names = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "dog", "cat", "runs"]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "sep_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    fast.save_pretrained(folder)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "max_position_embeddings": 77}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0}
    config = transformers.M2M100Config(**sizes, **heads, **widths, **tokens)
    transformers.M2M100Model(config).save_pretrained(folder)
    (folder / "val2017").mkdir()
    rows = []
    for k, caption in enumerate(CAPTIONS):
        name = f"val2017/{k:012d}.jpg"
        Image.effect_noise((60, 48), 40 + k).convert("RGB").save(folder / name)
        other = "a dog runs" if "cat" in caption else "a cat runs"
        row = {"image": name, "caption": caption, "negatives": {"object": other}}
        rows += [row, {**row, "caption": f"{caption} runs"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"filename": f"{0:012d}.jpg", "caption": "a red dog", "negative_caption": "a blue dog"}
    (folder / "sugarcrepe").mkdir()
    for name in evaluate.read_table("suites")["sugarcrepe"]["expected"]:
        (folder / f"sugarcrepe/{name}.json").write_text(json.dumps({"0": row}))
    return folder


def config_of(family, here):
    """Write the family's config, made small, and give its path."""
    name, width, vision, text, _ = FAMILIES[family]
    text = {key: str(here) if value == "HERE" else value for key, value in text.items()}
    config = open_clip.get_model_config(name)
    config = {**config, "embed_dim": width}
    config["vision_cfg"] = {**config["vision_cfg"], **vision}
    config["text_cfg"] = {**config["text_cfg"], **text}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] = {**config["multimodal_cfg"], **TEXT, "attn_pooler_heads": 2}
    path = here / f"tiny-{family.replace(' ', '').lower()}.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_resumes_and_evaluates(family, here, tmp_path, capsys, monkeypatch):
    config = config_of(family, here)
    run = ["--data", here / "train.jsonl", "--images", here, "--model", config, "--batch-size", 4]
    run += ["--steps", 2, "--workers", 0, "--device", "cpu", "--out", tmp_path / "run"]
    run = [str(option) for option in run]
    whole = train.train_step

    def first_step_only(*given):
        out = whole(*given)
        os.kill(os.getpid(), signal.SIGTERM)
        return out

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", first_step_only)
            assert train.main(run) == 143
        assert train.main(run) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr().out
    assert "from step 1" in said
    assert FAMILIES[family][4] in said
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    assert json.loads(lines[-1])["applied"] == 1

    checkpoint = tmp_path / "run/latest.pt"
    model = evaluate.load_model(str(config), str(checkpoint))
    open_clip.add_model_config(config)
    plain = open_clip.create_model(config.stem, pretrained=str(checkpoint)).eval()
    size = plain.visual.image_size
    images = torch.rand(3, 3, *(size if isinstance(size, tuple) else (size, size)))
    net = model.net.eval()
    with torch.no_grad():
        texts = data.encode_text(net, data.pack_texts(list(CAPTIONS), model.tokenizer))
        wanted = plain.encode_text(model.tokenizer(list(CAPTIONS)))
        torch.testing.assert_close(texts, wanted, rtol=1e-5, atol=1e-5)
        found = data.encode_image(net, images)
        torch.testing.assert_close(found, plain.encode_image(images), rtol=1e-5, atol=1e-5)

    evaluate.main(["--ckpt", str(checkpoint), "--suite", "sugarcrepe", "--root", str(here),
                   "--allow-missing", "--no-blind", "--device", "cpu"])  # fmt: skip
    assert "mean of 7 subsets" in capsys.readouterr().out


@pytest.mark.parametrize("part", [None, 1, 2])
def test_cocas_captioning_loss_is_open_clips(here, tmp_path, part):
    config = config_of("CoCa", here)
    given = ["--data", here / "train.jsonl", "--images", here, "--model", config, "--workers", 0]
    given += ["--batch-size", 4, "--steps", 2, "--caption-weight", 2, "--out", tmp_path / "run"]
    given += ["--micro-batch", part] if part else []
    args = train.parse_args([str(option) for option in given])
    rank = evaluate.Rank(0, 1, torch.device("cpu"))
    train.check_args(args, rank)
    torch.manual_seed(0)
    model = evaluate.load_model(str(config))
    run = train.make_run(args, model, rank)
    source = train.make_source(args, model, run.loss, rank)
    args.steps_per_epoch = source.steps[0]
    parts = next(train.make_loader(run, source, 0))
    out = train.gradients(run, parts)
    grads = {name: p.grad.clone() for name, p in run.net.named_parameters() if p.grad is not None}
    # the oracle: open_clip's forward and loss on the captions, ours on the features
    run.net.zero_grad()
    images = torch.cat([data.normalise(part.images, run.net) for part in parts])
    rows = [data.unpack_texts(part.texts, run.net)[: len(part.images)] for part in parts]
    said = run.net(images, torch.cat(rows))
    oracle = open_clip.CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0)
    _, wanted = oracle(None, None, said["logits"], said["labels"], said["logit_scale"])
    torch.testing.assert_close(out["caption"], wanted.detach())
    (2 * wanted).backward()
    for name, p in run.net.text_decoder.named_parameters():
        torch.testing.assert_close(grads[f"text_decoder.{name}"], p.grad, rtol=1e-4, atol=1e-6)
    assert float(out["loss"]) > 2 * float(wanted)  # and the contrastive parts


def test_a_model_without_decoder_has_no_captioning_loss(here, tmp_path):
    config = config_of("OpenAI ViT", here)
    given = ["--data", here / "train.jsonl", "--images", here, "--model", config, "--steps", 1]
    given += ["--batch-size", 4, "--caption-weight", 1, "--out", tmp_path / "run"]
    with pytest.raises(data.DataError, match="has no caption decoder"):
        train.main([str(option) for option in given])

#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Export a checkpoint as a folder that open_clip or transformers loads, with a model card.

  python scripts/export.py runs/x/latest.pt --out DIR
  python scripts/export.py runs/x/latest.pt --out DIR --to transformers --results results.json
  python scripts/export.py runs/x/latest.pt --out DIR --push ORG/NAME

The folder holds the weights (safetensors), the model's config with its activation, the
preprocessing, the tokenizer and README.md, the model card. It is loaded again and its features
compared with the checkpoint's before it is renamed to --out; a difference above 1e-5 is an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from negatives import DataError, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from evaluate import Model

TOLERANCE = 1e-5  # of unit features
CAPTIONS = ["a dog chasing a cat", "A cat, chasing a dog!", "the man's 2 red balls"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="file of train.py, or any weights that evaluate.py --ckpt takes")
    add("--out", type=Path, required=True, help="folder to write; it must be new or empty")
    formats = ("open_clip", "transformers")
    add("--to", choices=formats, default="open_clip", help="library to load it (default open_clip)")
    add("--model", help="open_clip model name, for weights that are not from train.py")
    add("--results", type=Path, help="results.json of evaluate.py, for the model card's tables")
    add("--license", default="mit", help="licence id for the model card (default mit)")
    add("--push", metavar="ORG/NAME", help="upload the folder to a new repository of the hub")
    add("--private", action="store_true", help="with --push: make the repository private")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Check all options that can be checked before the model is built.

    Raises:
        DataError: names the flag and how to correct it.
    """
    if args.out.exists() and not (
        args.out.name and args.out.is_dir() and not any(args.out.iterdir())
    ):
        raise DataError(f"--out {args.out}: exists and is not empty; choose another folder")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise DataError(f"--license {args.license}: is no licence id; give one such as mit")
    if args.private and not args.push:
        raise DataError("--private: needs --push ORG/NAME; leave it out")
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise DataError(f"--push {args.push}: is not ORG/NAME")
    needed = ["transformers"] * (args.to == "transformers") + ["huggingface_hub"] * bool(args.push)
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{package} is missing; pip install {package}")


def own_result(path: Path, digest: str) -> dict[str, Any]:
    """The result of these weights in a results.json.

    Raises:
        DataError: no results.json, or none of its results was scored with these weights.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        own = [result for result in results.values() if result["weights_sha256"] == digest]
        if not own:
            raise DataError(
                f"--results {path}: holds no result of these weights ({', '.join(results)}); "
                "score this checkpoint with evaluate.py --out"
            )
        return own[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"--results {path}: is no results.json of evaluate.py") from None


def write_open_clip(folder: Path, model: Model, push: str | None) -> None:
    """Write open_clip's hub layout: config, weights, tokenizer."""
    from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
    from safetensors.torch import save_file  # comes with open_clip

    config = {**model.about["config"], "quick_gelu": model.about["activation"] == "quickgelu"}
    if push and config["text_cfg"].get("hf_tokenizer_name"):
        config["text_cfg"] = {**config["text_cfg"], "hf_tokenizer_name": push}
    state = {key: value.clone() for key, value in model.net.state_dict().items()}
    save_file(state, folder / HF_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    content = {"model_cfg": config, "preprocess_cfg": model.about["preprocess"]}
    (folder / HF_CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, model)


def write_tokenizer(folder: Path, model: Model) -> None:
    """Write the tokenizer's files; those of CLIP under the names of transformers."""
    words: Any = model.tokenizer
    if not hasattr(words, "bpe_ranks"):
        words.tokenizer.save_pretrained(folder)
        return
    names = {words.sot_token_id: "<|startoftext|>", words.eot_token_id: "<|endoftext|>"}
    vocabulary = {names.get(number, word): number for word, number in words.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in words.bpe_ranks)]
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    ends |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    length = words.context_length
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **ends}
    texts = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(merges),
        "special_tokens_map.json": json.dumps(ends, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


# open_clip's names and transformers' for the same weight; CustomTextCLIP has its text below text.
PARTS = (
    (r"^text\.", ""),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")


def transformers_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CLIP of open_clip under the names of transformers' CLIPModel."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, new in PARTS:
            key = re.sub(pattern, new, key)
        if ".in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("in_proj_", f"{name}_proj.")] = part.clone()
        else:
            out[key] = value.T.contiguous() if key in TRANSPOSED else value.clone()
    return out


def write_transformers(folder: Path, model: Model) -> None:
    """Write a CLIPModel with its processor.

    Raises:
        DataError: CLIPModel has no place for one of the weights, or lacks its preprocessing.
    """
    from transformers import CLIPConfig, CLIPModel, logging

    net, config = model.net, model.about["config"]
    logging.disable_progress_bar()
    refusal = "--to transformers: CLIPModel cannot express this model ({}); use --to open_clip"
    vision, text = net.visual, getattr(net, "text", net)
    if not hasattr(vision, "transformer"):
        raise DataError(refusal.format(f"its image tower is a {type(vision).__name__}, no ViT"))
    if not hasattr(model.tokenizer, "bpe_ranks") or not hasattr(text, "token_embedding"):
        raise DataError(refusal.format("its text tower or tokenizer is not CLIP's"))
    if vision.pool_type != "tok" or vision.attn_pool is not None:
        raise DataError(refusal.format("its image tower does not pool by the class token"))
    towers = [
        {
            "hidden_size": tower.resblocks[0].attn.out_proj.in_features,
            "intermediate_size": tower.resblocks[0].mlp.c_fc.out_features,
            "num_hidden_layers": len(tower.resblocks),
            "num_attention_heads": tower.resblocks[0].attn.num_heads,
            "layer_norm_eps": norm.eps,
            "hidden_act": {"quickgelu": "quick_gelu"}.get(model.about["activation"], "gelu"),
            "projection_dim": config["embed_dim"],
        }
        for tower, norm in ((vision.transformer, vision.ln_post), (text.transformer, text.ln_final))
    ]
    side, patch = vision.image_size, vision.patch_size
    if side[0] != side[1] or patch[0] != patch[1]:
        raise DataError(refusal.format(f"its images are {side[1]} x {side[0]}, not square"))
    seen = {"image_size": side[0], "patch_size": patch[0]}
    words: Any = model.tokenizer
    ends = {"bos_token_id": words.sot_token_id, "eos_token_id": words.eot_token_id}
    read = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length, **ends}
    made = CLIPModel(
        CLIPConfig(
            vision_config={**towers[0], **seen},
            text_config={**towers[1], **read, "pad_token_id": words.eot_token_id},
            projection_dim=config["embed_dim"],
        )
    )
    try:
        made.load_state_dict(transformers_weights(net.state_dict()))
    except RuntimeError as error:
        odd = re.findall(r'"([^"]+)"', str(error)) or [str(error)]
        raise DataError(refusal.format(f"the weight {odd[0]} has no place")) from None
    made.save_pretrained(folder)
    write_tokenizer(folder, model)
    text_json = json.dumps(image_processor(model.about["preprocess"], side[0]), indent=2)
    (folder / "preprocessor_config.json").write_text(text_json + "\n", encoding="utf-8")


def image_processor(preprocess: dict[str, Any], side: int) -> dict[str, Any]:
    """The preprocessing of open_clip as preprocessor_config.json of transformers."""
    mode = preprocess["resize_mode"]
    if mode == "longest":
        raise DataError("--to transformers: has no resizing by the longest side; use open_clip")
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if mode == "shortest" else square,
        "resample": 2 if preprocess["interpolation"] == "bilinear" else 3,
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def read_back(folder: Path, to: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] of images and of CAPTIONS, not normalised, by the library itself."""
    if to == "open_clip":
        import open_clip

        net = open_clip.create_model(f"local-dir:{folder}").eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
        return net.encode_image(images), net.encode_text(tokens)
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    out = model(**processor(text=CAPTIONS, padding=True, return_tensors="pt"), pixel_values=images)
    return out.image_embeds, out.text_embeds


def largest_difference(folder: Path, to: str, model: Model) -> float:
    """The largest difference of a unit feature between the model and the folder, both towers."""
    import torch
    from torch.nn.functional import normalize

    from data import image_size

    with torch.inference_mode():
        images = torch.randn(
            2, 3, *image_size(model.net), generator=torch.Generator().manual_seed(0)
        )
        net = model.net.eval()
        want = net.encode_image(images), net.encode_text(model.tokenizer(CAPTIONS))
        pairs = zip(want, read_back(folder, to, images), strict=True)
        return max(float((normalize(a, dim=1) - normalize(b, dim=1)).abs().max()) for a, b in pairs)


USES = {
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("{name}")
tokenizer = open_clip.get_tokenizer("{name}")""",
    "transformers": """from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("{name}")
processor = CLIPProcessor.from_pretrained("{name}", backend="pil")""",
}
# What transformers does in another way than the training did.
APART = """`backend="pil"` resizes images as training did; the default backend differs by about 1e-4
in a feature. Training repaired captions with ftfy first (curly quotes, HTML entities, full-width
letters); this tokenizer does not."""


def model_card(args: argparse.Namespace, model: Model, digest: str, result: Any) -> str:
    """README.md of the folder: how to load it, model details, results."""

    about = model.about
    prefix = {"open_clip": "hf-hub:" if args.push else "local-dir:"}.get(args.to, "")
    name = args.push or args.out.name
    lines = ["---", f"license: {args.license}", f"library_name: {args.to}"]
    lines += ["pipeline_tag: zero-shot-image-classification", "tags:", "- clip", "---", ""]
    lines += [f"# {name}", "", f"```python\n{USES[args.to].format(name=prefix + name)}\n```", ""]
    lines += [APART, ""] if args.to == "transformers" else []
    lines += ["| | |", "| --- | --- |", f"| architecture | {about['model']} |"]
    lines += [f"| activation | {about['activation']} |", f"| licence | {args.license} |"]
    lines += [f"| {key} | {about[key]} |" for key in ("recipe", "step") if key in about]
    lines += [f"| `weights_sha256` of evaluate.py | {digest} |", ""]
    lines += ["The licence is the uploader's choice; weights also carry the terms of the weights"]
    lines += ["that they were tuned from and of the training data.", "", "## Results", ""]
    if result:
        import make_tables

        suites = {suite: {**scores} for suite, scores in result["suites"].items()}
        for scores in suites.values():
            scores.pop("versus", None)
        lines += ["Per cent, with 95 % intervals.", ""]
        lines += [make_tables.markdown({name: {**result, "suites": suites}})]
    else:
        lines += ["Not evaluated (`--results`)."]
    return "\n".join(lines).rstrip() + "\n"


def push(folder: Path, name: str, private: bool) -> None:
    """Upload the folder to a new repository.

    Raises:
        DataError: the hub cannot be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi, constants

    later = f"the folder is whole: upload it with `hf upload {name} {folder}`"
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"--push {name}: HF_HUB_OFFLINE is set, so nothing was uploaded; {later}")
    try:
        HfApi().create_repo(name, private=private)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Add model")
    except Exception as error:  # the network, the token or the name, in many kinds
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--push {name}: the hub cannot be reached or refuses ({why}); {later}"
        ) from None
    print(f"uploaded to {name}")


def main(argv: list[str] | None = None) -> None:
    """Build the model, write the folder, compare its features, rename it to --out."""
    args = parse_args(argv)
    check_args(args)
    import evaluate

    name, weights = args.model, args.checkpoint
    if weights.startswith("hf-hub:"):
        name, weights = weights, None
    elif not name and ":" in weights and not Path(weights).exists():  # MODEL:TAG
        name, _, weights = weights.rpartition(":")
    model = evaluate.load_model(name, weights)
    digest = evaluate.hash_model(model)
    result = own_result(args.results, digest) if args.results else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f"{args.out.name}.", dir=args.out.parent))
    try:
        room.chmod(0o755)
        if args.to == "open_clip":
            write_open_clip(room, model, args.push)
        else:
            write_transformers(room, model)
        difference = largest_difference(room, args.to, model)
        if not difference <= TOLERANCE:
            raise DataError(
                f"--to {args.to}: it cannot express this model (its features differ by "
                f"{difference:.1g}, more than {TOLERANCE:g})"
            )
        card = model_card(args, model, digest, result)
        (room / "README.md").write_text(card, encoding="utf-8")
        for path in room.iterdir():
            path.chmod(0o644)  # safetensors makes it readable by its owner only
        if args.out.is_dir():
            args.out.rmdir()  # it is empty
        room.rename(args.out)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    print(f"{args.out}: loads in {args.to}; features differ by at most {difference:.1g}")
    if args.push:
        push(args.out, args.push, args.private)


if __name__ == "__main__":
    sys.exit(run_script(main, "export.py"))

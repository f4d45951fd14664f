import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch

import data
import evaluate
import train
from evaluate import load_model

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "6", "--batch-size", "8", "--save-every", "1", "--log-every", "1"]


def start(*options, ranks=0):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [
        sys.executable,
        *(launch if ranks else []),
        str(ROOT / "train.py"),
        *map(str, options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def weights(run):
    return torch.load(run / "latest.pt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(*SHORT, "--out", whole).wait() == 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = start(*SHORT, "--out", cut)
        lines = 0
        while process.poll() is None and lines < (2 if code == -9 else 4):
            time.sleep(0.01)
            metrics = cut / "metrics.jsonl"
            lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        process.send_signal(number)
        assert process.wait() == code
    assert start(*SHORT, "--out", cut).wait() == 0
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(cut)[key]), key
    steps = [json.loads(x)["step"] for x in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    process = start(*SHORT, "--out", cut, "--lr", "1")
    assert process.wait() == 2
    assert "--lr 0.001 -> 1.0" in process.stderr.read()
    open_clip.add_model_config(evaluate.TINY_CONFIG)
    open_clip.create_model("shapes-tiny", pretrained=str(cut / "epoch_01.pt"))


RANK = evaluate.Rank(0, 1, torch.device("cpu"))


def put(folder, limit=8):
    """A small manifest with its pictures, as options of train.py."""
    path = folder / "m.jsonl"
    data.main(["shapes", "--out", str(path), "--images", str(folder), "--limit", str(limit)])
    photos = ["--data", str(path), "--images", str(folder), "--model", "shapes-tiny"]
    return [*photos, "--workers", "0"]


def prepare(*options):
    """A run and the parts of its first batch."""
    args = train.parse_args(["--steps", "3", "--batch-size", "8", *map(str, options)])
    rank = evaluate.Rank(0, 1, torch.device("cpu"))
    train.check_args(args, rank)
    torch.manual_seed(0)
    model = load_model(args.model)
    run = train.make_run(args, model, rank)
    run.towers.train()
    loader = train.make_loader(run, train.make_source(args, model, run.loss, rank), 0)
    return args, run, next(loader)


def gradient(*options):
    _, run, parts = prepare(*options)
    out = train.gradients(run, parts)
    grads = {n: p.grad for n, p in run.net.named_parameters() if p.grad is not None}
    return out, grads, run


def same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.slow
def test_two_ranks_train_photos_as_one(tmp_path):
    photos = put(tmp_path)
    found = []
    for ranks in (0, 2):
        out = tmp_path / f"out{ranks}"
        run = [*photos, "--steps", "2", "--batch-size", "8", "--lr", "1e-3", "--out", out]
        assert start(*run, ranks=ranks).wait() == 0
        found.append(weights(out))
    for key, value in found[0].items():
        assert torch.allclose(value, found[1][key], atol=2e-4), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "x"], "--recipe x"),
        (["--lr", "inf"], "--lr inf: must be a number from 0"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: must be a number from 0"),
        (["--focal-gamma", "0.5"], "focal_gamma is 0.5"),
        (["--seed", "99999999999999999999999"], "--seed .*: must be a number from 0"),
        (["--images", "."], "--images: needs --data"),
        (["--types", "counting"], "--types: needs --data"),
        (["--model", "ViT-B-33"], "did you mean"),
        (["--pretrained", "no.pt"], "no such checkpoint"),
        (["--data", "no.jsonl", "--images", "."], "no.jsonl: cannot be read"),
        (["--data", "no.jsonl:0", "--images", "."], "weight must be above 0"),
        (["--data", "a.jsonl:1", "b.jsonl", "--images", "."], "give every manifest a weight"),
        (["--data", "no.jsonl"], "0 folders for 1 manifests"),
        (["--data", "no.tar"], "needs --steps"),
        (["--lora", "4", "--tune", "text"], "goes with neither"),
        (["--model", "RN50", "--micro-batch", "2"], "batch norms"),
        (["--out", "/proc/none"], "cannot be written"),
    ],
)
def test_mistakes_get_one_sentence(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match=message):
        train.main(options)
    assert not list(tmp_path.iterdir())


def test_batch_must_be_divisible_by_ranks():
    args = train.parse_args(["--batch-size", "9"])
    with pytest.raises(data.DataError, match="not divisible by 2 ranks"):
        train.check_args(args, evaluate.Rank(0, 2, torch.device("cpu")))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_dry_run_writes_nothing(precision, tmp_path, capsys):
    train.main(
        ["--out", str(tmp_path / "x"), "--dry-run", "--batch-size", "4", "--precision", precision]
    )
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_a_small_set_of_pictures_is_refused(tmp_path):
    options = put(tmp_path, limit=4)
    with pytest.raises(data.DataError, match=r"takes 8 pictures of .*, which has 4"):
        prepare(*options)
    prepare(*options, "--captions", "all")


def test_cached_gradients_repeat_the_dropout_of_the_features(tmp_path):
    config = json.loads(evaluate.TINY_CONFIG.read_text())
    config["vision_cfg"]["patch_dropout"] = 0.5
    path = tmp_path / "dropping.json"
    path.write_text(json.dumps(config))
    args, run, parts = prepare("--model", path, "--micro-batch", 4)
    assert len(parts) == 2
    torch.manual_seed(1)
    features = [train.encode(run.towers, part, args) for part in parts]  # one graph of both parts
    state = torch.get_rng_state()
    train.batch_loss(run, parts, features, [])["loss"].backward()
    wanted = {n: p.grad.clone() for n, p in run.net.named_parameters() if p.grad is not None}
    run.loss.threshold.reset()
    run.optimizer.zero_grad()
    torch.manual_seed(1)
    train.gradients(run, parts)
    same({n: p.grad for n, p in run.net.named_parameters() if p.grad is not None}, wanted)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(features[0][0], train.encode(run.towers, parts[0], args)[0])


def test_checkpointing_changes_no_gradient():
    same(gradient("--grad-checkpointing")[1], gradient()[1])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiling_changes_no_gradient(tmp_path):
    config = json.loads(evaluate.TINY_CONFIG.read_text())
    for tower in ("vision_cfg", "text_cfg"):
        config[tower] |= {"layers": 1, "width": 32}
    path = tmp_path / "least.json"
    path.write_text(json.dumps(config))
    same(gradient("--model", path, "--compile")[1], gradient("--model", path)[1], 1e-4)


def test_tuning_the_text_tower_leaves_the_image_tower():
    found, wanted = gradient("--tune", "text", "--micro-batch", 4)[1], gradient()[1]
    text = {name: value for name, value in wanted.items() if not name.startswith("visual.")}
    assert len(text) < len(wanted)
    same(found, text)


def test_lora_trains_few_weights_and_is_merged_where_weights_are_saved():
    args, run, parts = prepare("--lora", 2)
    before = train.plain_weights(run.net)
    plain = load_model("shapes-tiny").net
    assert before.keys() == plain.state_dict().keys()
    tuned = [n for n, p in run.net.named_parameters() if p.requires_grad]
    assert tuned
    assert all("parametrizations" in name for name in tuned)
    for _ in range(2):
        train.train_step(run, parts, 1e-2)
    after = train.plain_weights(run.net)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "transformer.resblocks.0.attn.in_proj_weight" in moved
    assert "visual.transformer.resblocks.1.mlp.c_fc.weight" in moved
    assert "token_embedding.weight" not in moved
    plain.load_state_dict(after)
    with torch.no_grad():
        for x, y in zip(
            train.encode(train.Towers(plain), parts[0], args),
            train.encode(run.towers, parts[0], args),
            strict=True,
        ):
            assert (x - y).abs().max() <= 1e-5


def test_the_teacher_pulls_back_and_follows():
    args, run, parts = prepare("--distill", 0.5, "--ema", 0.75)
    plain = gradient()[0]["loss"]
    assert float(train.gradients(run, parts)["distill"]) == 0  # they begin alike
    run.loss.threshold.reset()
    with torch.no_grad():
        run.teacher.net.text_projection.mul_(-1)
    features = [train.encode(towers, parts[0], args) for towers in (run.towers, run.teacher)]
    drift = (features[0][1] - features[1][1]).detach().square().sum() / 8
    out = train.gradients(run, parts)
    assert float(drift) > 1
    assert (out["loss"] - plain).item() == pytest.approx(0.5 * float(drift), rel=1e-4)
    name = "ln_final.weight"
    start = run.net.get_parameter(name).clone()
    train.train_step(run, parts, 1e-2)
    moved = run.net.get_parameter(name)
    wanted = 0.75 * start + 0.25 * moved
    assert not torch.equal(moved, start)
    assert torch.allclose(run.teacher.net.get_parameter(name), wanted)
    assert not any(p.requires_grad for p in run.teacher.parameters())


def test_own_negatives_get_their_options():
    options = ["--own-weight", 0.5, "--focal-gamma", 2, "--label-smoothing", 0.02]
    loss = prepare(*options)[1].loss
    chosen = [loss.options[key] for key in ("own_weight", "focal_gamma", "label_smoothing")]
    assert chosen == [0.5, 2, 0.02]


def test_a_model_with_a_bias_trains_as_siglip(tmp_path):
    path = tmp_path / "biased.json"
    config = {**json.loads(evaluate.TINY_CONFIG.read_text()), "init_logit_bias": -10}
    path.write_text(json.dumps(config))
    out, grads, run = gradient("--model", path, "--recipe", "clip")
    whole = {name: grad.clone() for name, grad in grads.items()}
    features = train.encode(
        run.towers, prepare("--model", path, "--recipe", "clip")[2][0], train.parse_args([])
    )
    logits = features[2] * features[0] @ features[1].T - 10
    wanted = -torch.nn.functional.logsigmoid((2 * torch.eye(8) - 1) * logits).sum() / 8
    assert out["itc"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert whole["logit_bias"].abs() > 0
    same(gradient("--model", path, "--recipe", "clip", "--micro-batch", 4)[1], whole)


def short_run(tmp_path, *options):
    return ["--out", str(tmp_path / "x"), *SHORT, *options]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    seen, whole = [], train.batch_loss

    def poisoned(run, *rest):
        out = whole(run, *rest)
        seen.append([p.detach().clone() for p in run.net.parameters()])
        return {**out, "loss": out["loss"] * float("nan")} if len(seen) in (2, 3) else out

    monkeypatch.setattr(train, "batch_loss", poisoned)
    assert train.main(short_run(tmp_path)) == 0
    lines = [json.loads(x) for x in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
    assert [line["applied"] for line in lines] == [1, 0, 0, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4], strict=True))
    assert lines[3]["threshold_object"] == lines[1]["threshold_object"]


def test_three_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    whole, calls = train.batch_loss, []

    def poisoned(*inputs):
        calls.append(1)
        out = whole(*inputs)
        return {**out, "loss": out["loss"] * float("inf")} if len(calls) > 2 else out

    monkeypatch.setattr(train, "batch_loss", poisoned)
    with pytest.raises(data.DataError, match="3 steps in a row"):
        train.main(short_run(tmp_path))
    content = torch.load(tmp_path / "x/latest.pt", weights_only=True)
    assert content["train"]["step"] == 2
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    whole = torch.save

    def full(content, file):
        if content.get("train", {}).get("step") == 4:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        whole(content, file)

    monkeypatch.setattr(torch, "save", full)
    assert train.main(short_run(tmp_path)) == 2
    assert "latest.pt: cannot be written (disk full); the last" in capsys.readouterr().err
    assert torch.load(tmp_path / "x/latest.pt", weights_only=True)["train"]["step"] == 3
    assert not list((tmp_path / "x").glob("*.partial"))
    monkeypatch.undo()
    assert train.main(short_run(tmp_path)) == 0
    assert torch.load(tmp_path / "x/latest.pt", weights_only=True)["train"]["step"] == 6


def test_a_torn_checkpoint_is_named(tmp_path):
    assert train.main(short_run(tmp_path)) == 0
    latest = tmp_path / "x/latest.pt"
    latest.write_bytes(latest.read_bytes()[:1000])
    with pytest.raises(data.DataError, match=r"latest\.pt"):
        train.main(short_run(tmp_path))


@pytest.mark.parametrize(("policy", "code"), [("stop", 2), ("skip", 0)])
def test_a_picture_that_tears_during_a_run(policy, code, tmp_path, capsys):
    options = put(tmp_path, limit=12)
    (tmp_path / "train_0_000003.png").write_bytes(b"torn")
    run = [*options, "--on-bad-image", policy, "--out", str(tmp_path / "x"), *SHORT]
    assert train.main([*run, "--workers", "1"]) == code
    said = capsys.readouterr().err
    assert "train_0_000003.png: cannot be decoded" in said
    assert "Traceback" not in said
    if policy == "skip":
        lines = (tmp_path / "x/metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["bad_images"] >= 2


def test_sources_are_mixed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        put(tmp_path / name)
    files = [str(tmp_path / name / "m.jsonl") for name in ("a", "b")]
    folders = ["--images", str(tmp_path / "a"), str(tmp_path / "b"), "--model", "shapes-tiny"]
    args = train.parse_args(["--data", f"{files[0]}:3", f"{files[1]}:1", *folders])
    args.batch_size = 8
    model = load_model("shapes-tiny")
    loss = train.CEClipLoss("ce-clip")
    assert train.make_source(args, model, loss, RANK).shares == [6, 2]
    args.data = files
    assert train.make_source(args, model, loss, RANK).shares == [4, 4]


def test_shards_train(tmp_path):
    manifest = put(tmp_path)[1]
    pattern = f"{tmp_path}/s/000000.tar"
    data.main(["shards", manifest, "--images", str(tmp_path), "--out", str(tmp_path / "s")])
    photos = ["--data", pattern, "--model", "shapes-tiny", "--workers", "0"]
    run = [*photos, "--out", str(tmp_path / "x"), *SHORT]
    assert train.main([*run, "--imc", "repulsion"]) == 0
    assert (tmp_path / "x/latest.pt").exists()
    with pytest.raises(data.DataError, match="which shards lack"):
        train.main([*photos, "--out", str(tmp_path / "y"), *SHORT])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on(number, code, tmp_path, monkeypatch):
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    whole, calls = train.train_step, []

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return whole(*inputs)

    monkeypatch.setattr(train, "train_step", interrupted)
    try:
        run = ["--out", str(tmp_path / "x"), "--steps", "3", "--batch-size", "8"]
        assert train.main(run) == code
        assert torch.load(tmp_path / "x/latest.pt", weights_only=True)["train"]["step"] == 2
        assert train.main(run) == 0
        assert len(calls) == 3
    finally:
        for kind, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(kind, handler)


@pytest.mark.slow
def test_all_ranks_stop_where_one_cannot_go_on(tmp_path):
    options = put(tmp_path, limit=8)
    process = start(*options, *SHORT, "--out", tmp_path / "x", ranks=2)
    while not (tmp_path / "x/metrics.jsonl").exists():
        time.sleep(0.01)
        assert process.poll() is None
    (tmp_path / "train_0_000003.png").write_bytes(b"torn")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1  # torchrun's own, for a rank's 2
    assert "train_0_000003.png: cannot be decoded" in said
    assert "terminate called" not in said
    assert "exitcode  : 2 " in said, said  # torchrun may end the other before it ends itself
    assert "RuntimeError" not in said, said


@pytest.mark.parametrize("option", [[], ["--lora", "2"], ["--distill", "1"]])
def test_what_a_method_adds_is_resumed_to_the_same_bits(option, tmp_path, monkeypatch):
    run = ["--steps", "4", "--batch-size", "8", "--save-every", "2", *option]
    assert train.main(["--out", str(tmp_path / "whole"), *run]) == 0
    monkeypatch.setattr(train, "train_step", stop_at(2, train.train_step))
    with pytest.raises(KeyboardInterrupt):
        train.main(["--out", str(tmp_path / "cut"), *run])
    monkeypatch.undo()
    assert train.main(["--out", str(tmp_path / "cut"), *run]) == 0
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "cut")[key]), key


def stop_at(step, whole):
    calls = []

    def stopping(*inputs):
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return whole(*inputs)

    return stopping


def test_a_skipped_last_step_still_saves_the_run(tmp_path, monkeypatch):
    whole, calls = train.batch_loss, []

    def poisoned(*inputs):
        calls.append(1)
        out = whole(*inputs)
        return {**out, "loss": out["loss"] * float("nan")} if len(calls) == 6 else out

    monkeypatch.setattr(train, "batch_loss", poisoned)
    assert train.main(short_run(tmp_path)) == 0
    assert torch.load(tmp_path / "x/latest.pt", weights_only=True)["train"]["step"] == 6

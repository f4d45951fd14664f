import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import losses
import train
from evaluate import load_model

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "6", "--batch-size", "8", "--save-every", "1", "--log-every", "1"]


def weights(run):
    return torch.load(run / "latest.pt", weights_only=True)["state_dict"]


RANK = evaluate.Rank(0, 1, torch.device("cpu"))


LOSS = str(ROOT / "scripts/example_loss.py:WithAlignment")


def put(folder, limit=8):
    """A small manifest with its images, as options of train.py."""
    path = folder / "m.jsonl"
    data.main(["shapes", "--out", str(path), "--images", str(folder), "--limit", str(limit)])
    photos = ["--data", str(path), "--images", str(folder), "--model", "shapes-tiny"]
    return [*photos, "--workers", "0"]


TINY = ["--model", "shapes-tiny"]


def prepare(*options):
    """A run and the parts of its first batch."""
    args = train.parse_args([*TINY, "--steps", "3", "--batch-size", "8", *map(str, options)])
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
        (["--model", "RN50", "--micro-batch", "2"], "batch norm"),
        (["--out", "/proc/none"], "cannot be written"),
        (["--loss", "own:Own"], "--loss own:Own: must be FILE.py:CLASS"),
        (["--loss", "no.py:Own"], "no.py: cannot be read"),
        (["--loss", LOSS, "--imc", "x"], "--loss .*ValueError: imc is 'x'"),
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


def test_a_small_set_of_images_is_refused(tmp_path):
    options = put(tmp_path, limit=4)
    with pytest.raises(data.DataError, match=r"takes 8 \w+ of .*, which has 4"):
        prepare(*options)
    prepare(*options, "--captions", "all")


def test_cached_gradients_repeat_the_dropout_of_the_features(tmp_path):
    config = json.loads(evaluate.SHAPES_CONFIGS["shapes-tiny"].read_text())
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


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--grad-checkpointing", "--compile"])
def test_what_saves_time_or_memory_changes_no_gradient(option, tmp_path):
    if option == "--compile" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    path = tmp_path / "least.json"
    path.write_text(json.dumps(least()))
    same(gradient("--model", path, option)[1], gradient("--model", path)[1], 1e-4)


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
    config = {
        **json.loads(evaluate.SHAPES_CONFIGS["shapes-tiny"].read_text()),
        "init_logit_bias": -10,
    }
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


def poison(monkeypatch, bad, seen=None):
    """Make the loss of the steps of which `bad` is true NaN, and keep the weights of each step."""
    whole, calls = train.batch_loss, []

    def poisoned(run, *rest):
        out = whole(run, *rest)
        calls.append(1)
        if seen is not None:
            seen.append([p.detach().clone() for p in run.net.parameters()])
        return {**out, "loss": out["loss"] * float("nan")} if bad(len(calls)) else out

    monkeypatch.setattr(train, "batch_loss", poisoned)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    seen = []
    poison(monkeypatch, (2, 3, 6).__contains__, seen)
    assert train.main(short_run(tmp_path)) == 0
    lines = [json.loads(x) for x in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
    assert [line["applied"] for line in lines] == [1, 0, 0, 1, 1, 0]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4], strict=True))
    assert lines[3]["threshold_object"] == lines[1]["threshold_object"]
    kept = torch.load(tmp_path / "x/latest.pt", weights_only=True)  # a skipped last step saves too
    assert kept["train"]["step"] == 6


def test_three_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, lambda call: call > 2)
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


@pytest.mark.parametrize(
    "option", [["--lora", "2"], ["--distill", "1"], ["--loss", "own.py:Plain"]]
)
def test_what_a_method_adds_is_resumed_to_the_same_bits(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    train.read_loss.cache_clear()
    run = ["--steps", "4", "--batch-size", "8", "--save-every", "2", *option]
    run += ["--log-every", "1", "--micro-batch", "4", "--model", "least.json"]
    Path("least.json").write_text(json.dumps(least()))
    assert train.main(["--out", "whole", *run]) == 0
    whole, calls = train.train_step, []

    def stopping(*inputs):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return whole(*inputs)

    monkeypatch.setattr(train, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--out", "cut", *run])
    monkeypatch.setattr(train, "train_step", whole)
    assert train.main(["--out", "cut", *run]) == 0
    for key, value in weights(Path("whole")).items():
        assert torch.equal(value, weights(Path("cut"))[key]), key
    if "--loss" in option:
        lines = [json.loads(x) for x in Path("cut/metrics.jsonl").read_text().splitlines()]
        assert [line["calls"] for line in lines] == [1, 2, 3, 4]
        assert re.search(r"step 4/4  loss \d\.\d+ pairs \S+ calls 4", capsys.readouterr().out)
        Path("own.py").write_text(OWN + "\n# another file")
        with pytest.raises(data.DataError, match=r"own\.py:Plain: changed since the run in"):
            train.main(["--out", "cut", *run])


def least():
    """The config of a model with one narrow layer in each tower."""
    config = json.loads(evaluate.SHAPES_CONFIGS["shapes-tiny"].read_text())
    for tower in ("vision_cfg", "text_cfg"):
        config[tower] |= {"layers": 1, "width": 32}
    return config


FORWARD = "class Own(torch.nn.Module):\n  def forward(self, image, text, *rest): "
OWN = """
import torch

class Plain(torch.nn.Module):  # no constructor, no thresholds, a count that is kept
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image_features, text_features, logit_scale, negative_features, valid, *rest):
        self.calls += 1
        pairs = logit_scale * image_features @ text_features.T
        loss = torch.nn.functional.cross_entropy(pairs, torch.arange(len(pairs)))
        return {"loss": loss, "pairs": pairs.mean().detach(), "calls": self.calls}
"""


def test_the_example_of_an_own_loss_adds_its_term(tmp_path):
    example = ROOT / "scripts/example_loss.py"
    run = ["--loss", f"{example}:WithAlignment", "--cmr-weight", "0.5", "--steps", "2"]
    assert train.main([*run, "--batch-size", "8", "--log-every", "1", "--out", str(tmp_path)]) == 0
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        parts = found["itc"] + 0.2 * found["imc"] + 0.5 * found["cmr"] + 0.1 * found["alignment"]
        assert found["loss"] == pytest.approx(parts, rel=1e-5)
        assert found["alignment"] > 0.1
    assert "threshold_relation" in found


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Other: pass", "has no class Own of torch.nn.Module"),
        ("def Own(:", r"own\.py:Own, line 2: SyntaxError"),
        ("import nothing_of_the_kind", "line 2: ModuleNotFoundError: No module named"),
        ("class Own(torch.nn.Module):\n  def __init__(self): 1 / 0", "line 3: ZeroDivisionError"),
        ("class Own(torch.nn.Linear): pass", r"Own: TypeError: .*missing"),
        ("class Own(torch.nn.Bilinear):\n  def __init__(self): super().__init__(1, 1, 1)",
         "has parameters, which are not trained; use buffers"),
        (FORWARD + "return image[0, 0]", "must return a dict with a differentiable 'loss'"),
        (FORWARD + "return {'loss': image.detach().sum()}", "must return a dict with a differ"),
        (FORWARD + "return {'loss': image.sum(), 'x': image}", "its part 'x' must be a scalar"),
        (FORWARD + "return {'loss': image.sum(), 'lr': 1}", "its part 'lr' must have another name"),
        (FORWARD + "return {'loss': image @ text}", "line 3: RuntimeError: mat1 and mat2"),
    ],
)  # fmt: skip
def test_faults_of_an_own_loss_get_one_sentence(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("import torch\n" + source + "\n")
    train.read_loss.cache_clear()
    with pytest.raises(data.DataError, match=message) as told:
        train.main(["--loss", "own.py:Own", "--steps", "1", "--batch-size", "8", "--out", "x"])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("train.py --help", 0, "--help-all"),
        ("train.py --help-all", 0, "--focal-gamma"),
        ("train.py --nonsense", 2, "unrecognized arguments: --nonsense"),
        ("losses.py", 0, "CEClipLoss"),
        ("losses.py --help", 0, "CEClipLoss"),
        ("losses.py x", 2, "unrecognized arguments: x"),
        ("scripts/example_loss.py", 0, "WithAlignment"),
        ("scripts/example_open_clip.py --help", 0, "open_clip"),
        ("scripts/example_transformers.py --help", 0, "transformers"),
    ],
)
def test_help_is_given_before_torch_is_imported(command, code, said):
    command = [sys.executable, "-X", "importtime", *command.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert not re.search(r"\| +(torch|open_clip|transformers)$", done.stderr, re.MULTILINE)


def test_help_is_short_and_names_what_there_is():
    short, whole = (
        [x for group in train.make_parser(everything)._action_groups for x in group._group_actions]
        for everything in (False, True)
    )
    assert sum(x.help != "==SUPPRESS==" for x in short) <= 40 < len(whole) == len(short)
    texts = {x.dest: x.help for x in whole if x.dest not in ("help", "help_all")}
    for name, text in texts.items():
        assert re.fullmatch(r"\S.{20,}[^.]", text), name
    assert all(recipe in texts["recipe"] for recipe in losses.RECIPES)
    assert all(kind in texts["imc"] for kind in losses.IMC_VARIANTS)
    assert all(mode in texts["threshold"] for mode in losses.THRESHOLDS)
    (precision,) = (x for x in whole if x.dest == "precision")
    assert list(precision.choices) == list(evaluate.PRECISIONS)
    (edits,) = (x for x in whole if x.dest == "shapes_negatives")
    assert edits.choices == data.SHAPES_NEGATIVES

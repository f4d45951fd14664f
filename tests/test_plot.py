"""scripts/plot.py: every figure from small results, read back from matplotlib's own objects."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest

from negatives import DataError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
plot = importlib.import_module("plot")
matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")


def cell(accuracy, half=4.0, **more):
    low = None if accuracy is None else accuracy - half
    high = None if accuracy is None else accuracy + half
    return {"accuracy": accuracy, "low": low, "high": high, "scored": 9, "expected": 9, **more}


def shapes(swap, replace, zero_shot, recall):
    subsets = {"swap-object": cell(swap), "replace-object": cell(replace)}
    costs = {"zero-shot shape": cell(zero_shot), "retrieval image to text R@1": cell(recall)}
    averages = {"mean of 6 subsets": cell((swap + replace) / 2)}
    return {"suites": {"shapes": {"subsets": subsets, "averages": averages, "costs": costs}}}


@pytest.fixture
def plt():
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    with matplotlib.rc_context(plot.STYLE):
        yield pyplot
    pyplot.close("all")


@pytest.fixture
def saved(monkeypatch, plt):
    """Run plot.py, keep its figures by name."""
    figures = {}
    save = matplotlib.figure.Figure.savefig

    def keep(figure, path, **options):
        figures[Path(path).name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return lambda *args: (plot.main([str(arg) for arg in args]), figures)[1]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_run(folder, seed, slope=1.0):
    write(folder / "args.json", {"options": {"seed": seed}})
    keys = {"itc": 0.5, "mine": 0.25, "cmr": 0.0, "lr": 1e-3}
    lines = [
        {"step": step, "loss": slope / step, **keys, "threshold_object": slope * step}
        for step in (10, 20, 30)
    ]
    write(folder / "metrics.jsonl", lines)
    return folder


def legend_is_free(figure):
    """No legend lies over axes."""
    figure.canvas.draw()
    boxes = [axis.get_window_extent() for axis in figure.axes]
    return not any(
        legend.get_window_extent().overlaps(box) for legend in figure.legends for box in boxes
    )


def test_bars_show_means_over_seeds_intervals_and_chance_of_each_subset(tmp_path, saved):
    results = {f"ours seed {seed}": shapes(90 + seed, 60, 12, 30) for seed in (1, 2, 3)}
    results["base"] = shapes(50, 55, 11, 20)
    results["base"]["suites"]["shapes"]["subsets"]["replace-object"]["chance"] = 33.0
    results["base"]["suites"]["shapes"]["subsets"]["absent"] = cell(None)
    figure = saved(write(tmp_path / "results.json", results))["shapes.png"]
    gains, costs = figure.axes
    labels = [text.get_text() for text in gains.get_xticklabels()]
    assert labels == ["swap-object", "replace-\nobject"]
    assert len(costs.get_xticklabels()) == 2
    heights = [round(bar.get_height(), 3) for bar in gains.patches]
    assert heights == [92, 60, 50, 55]  # two models of two bars
    dashed = [line for line in gains.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [50, 33]
    assert [line.get_ydata()[0] for line in costs.lines if line.get_linestyle() == "--"] == [12.5]
    dots = [list(line.get_ydata()) for line in gains.lines if line.get_marker() == "o"]
    assert dots[0] == [91, 92, 93]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["ours", "base", "chance"]
    assert legend_is_free(figure)
    bar = plot.over_seeds([cell(91), cell(92), cell(93)])
    half = (4.0**2 + (4.30 * 1.0 / 3**0.5) ** 2) ** 0.5  # items and Student's t of three seeds
    assert bar.high - bar.value == pytest.approx(min(half, 8))
    assert bar.value - bar.low == pytest.approx(half)
    assert plot.over_seeds([cell(91)]) == (91, 87, 95, [91])


def test_suites_of_costs_alone_and_long_suites_are_drawn(tmp_path, saved):
    costs = {f"zero-shot set {i}": cell(10 + i) for i in range(19)}
    recalls = {f"COCO {way} R@1": cell(40) for way in ("image to text", "text to image")}
    suites = {"zeroshot": {"costs": costs}, "retrieval": {"costs": recalls}}
    figures = saved(write(tmp_path / "results.json", {"m": {"suites": suites}}))
    assert [len(axis.patches) for axis in figures["zeroshot.png"].axes] == [8, 8, 3]
    assert [len(axis.patches) for axis in figures["retrieval.png"].axes] == [2]
    assert len(figures["retrieval.png"].legends[0].get_texts()) == 1  # no chance is known
    assert "tradeoff.png" not in figures
    assert all(legend_is_free(figure) for figure in figures.values())


def test_the_tradeoff_shares_figures_and_joins_mixes(tmp_path, saved):
    mixes = {f"alpha_{a}": shapes(50 + 40 * a, 60, 12, 40 - 10 * a) for a in (1, 0, 0.5)}
    path = write(tmp_path / "mixed/results/results.json", mixes)
    figure = saved(tmp_path / "mixed", "--out", path.parent)["tradeoff.png"]
    zero_shot, retrieval = figure.axes
    assert (zero_shot.get_xlabel(), retrieval.get_xlabel()) == tuple(
        f"{kind} (per cent)" for kind in ("zero-shot", "retrieval")
    )
    line = next(line for line in retrieval.lines if len(line.get_xdata()) == 3)
    assert list(line.get_xdata()) == [40, 35, 30]
    assert list(line.get_ydata()) == [55, 65, 75]
    results = json.loads(path.read_text())
    results["alpha_0"]["suites"]["shapes"]["subsets"]["swap-object"]["scored"] = 4
    title = saved(write(path, results))["tradeoff.png"].get_suptitle()
    assert "alpha_0: shapes" in title
    for result in results.values():
        result["suites"]["shapes"]["costs"] = {}
    (path.parent / "tradeoff.png").unlink()
    saved(write(path, results))
    assert not (path.parent / "tradeoff.png").exists()


@pytest.mark.parametrize("source", ["FSC-CLIP", "vl_compo", "crowd"])
def test_labels_neither_overlap_nor_leave_the_axes(source, plt):
    crowd = {f"a model of a long name {i}": (50 + i % 5 / 9, 50 + i // 5 / 9) for i in range(25)}
    panels = {"retrieval": crowd} if source == "crowd" else plot.published_summary(source)
    figure = plot.draw_panels({k: ({}, points) for k, points in panels.items()}, "t", plt)
    figure.canvas.draw()
    for axis, points in zip(figure.axes, panels.values(), strict=True):
        box = axis.get_window_extent()
        texts = [matplotlib.text.Text.get_window_extent(text) for text in axis.texts]
        assert len(texts) == len(points)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(texts, 2))
        for text in texts:
            assert box.x0 <= text.x0
            assert text.x1 <= box.x1
            assert box.y0 <= text.y0
            assert text.y1 <= box.y1


def test_runs_are_drawn_as_mean_and_range_over_seeds(tmp_path, saved):
    runs = [make_run(tmp_path / f"ce-clip.{seed}", seed, slope=seed) for seed in (1, 2, 3)]
    runs.append(make_run(tmp_path / "control", 1, slope=0.0))
    figures = saved(*runs, "--out", tmp_path / "figures", "--format", "svg")
    (thresholds,) = figures["thresholds.svg"].axes  # control's never move
    assert thresholds.get_title(loc="left") == "ce-clip (3 seeds)"
    assert list(thresholds.lines[0].get_ydata()) == [20, 40, 60]
    band = thresholds.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (10, 90)
    titles = [axis.get_title(loc="left") for axis in figures["losses.svg"].axes]
    assert titles == ["loss", "itc", "mine"]  # cmr is 0 all along
    assert all(legend_is_free(figure) for figure in figures.values())
    assert (tmp_path / "figures/losses.svg").stat().st_size > 1000


def test_two_runs_of_one_name_and_seed_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / f"{above}/ce", 1) for above in "ab"]
    folders.append(make_run(tmp_path / "c/ce-seed-7", 7))
    assert list(plot.read_runs(folders)) == ["a/ce", "b/ce", "ce"]


def test_the_gallery_marks_the_edit_and_keeps_every_space(tmp_path, saved):
    caption = "A  dog chases a cat."
    made = {"relation": "A  cat chases a dog.", "object": ["A  hen chases a cat.", "A  dog."]}
    edits = {"relation": [{"start": 3, "end": 6, "old": "dog", "new": "cat"}]}
    edits["relation"].append({"start": 16, "end": 19, "old": "cat", "new": "dog"})
    record = {"image": "a.jpg", "caption": caption, "negatives": made, "edits": edits}
    none = {"image": "b.jpg", "caption": "x", "negatives": {"relation": None, "object": None}}
    path = write(tmp_path / "n.jsonl", [{"manifest": 1}, none, record])
    figure = saved(path, "--captions", 3)["negatives.png"]
    rows = {}
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        rows.setdefault(y, []).append((x, text.get_text(), text.get_color()))
    lines = []
    for pieces in rows.values():
        (_, kind, _), *words = pieces
        start = words[0][0]
        assert [x - start for x, _, _ in words] == [
            sum(len(word) for _, word, _ in words[:i]) for i in range(len(words))
        ]
        marked = [word for _, word, colour in words if colour == plot.EDIT and word]
        lines.append((kind, "".join(word for _, word, _ in words), marked))
    assert lines == [
        ("caption", caption, []),
        ("relation", made["relation"], ["cat", "dog"]),
        ("object", made["object"][0], ["hen"]),
        ("object", made["object"][1], []),
    ]
    assert len(figure.axes[0].lines) == 1  # a caret where words were only taken away


@pytest.mark.parametrize(
    ("caption", "text", "marked"),
    [
        ("a red dog", "a blue dog", ["blue"]),
        ("a dog", "a big dog", ["big "]),
        ("a big dog", "a dog", [""]),
        ("a dog.", "a dog .", [" "]),
        ("a dog", "A dog", ["A"]),
        ("a dog", "a dog", []),
    ],
)
def test_pieces_give_the_text_back(caption, text, marked):
    for edits in (None, [{"start": 0, "end": 1, "new": "wrong"}], [{"at": 3}], 7):
        pieces = plot.split_edit(caption, text, edits)
        assert "".join(piece for piece, _ in pieces) == text
        assert [piece for piece, changed in pieces if changed] == marked
    long = [("word " * 50, False)]
    lines = plot.wrap_pieces(long, 30)
    assert "".join(word for line in lines for _, word, _ in line) == long[0][0]
    assert max(x + len(word.rstrip()) for line in lines for x, word, _ in line) <= 30


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, ["none"], "none: is no run"),
        ({"r.json": "{"}, ["r.json"], r"r\.json: is no results\.json"),
        ({"r.json": "{}"}, ["r.json"], r"r\.json: holds no results"),
        (
            {"r.json": '{"a": {"suites": {"s": {"subsets": {"x": {}}}}}}'},
            ["r.json"],
            "is no results",
        ),
        (
            {"a.json": json.dumps({"m": shapes(1, 2, 3, 4)})},
            ["a.json", "a.json"],
            "the label m is taken",
        ),
        ({"run/metrics.jsonl": ""}, ["run"], r"metrics\.jsonl: is empty"),
        ({"run/metrics.jsonl": '{"step": 1'}, ["run"], r"metrics\.jsonl:1: is no JSON"),
        (
            {"run/metrics.jsonl": '{"step": 1}'},
            ["run"],
            r"metrics\.jsonl:1: holds no step and loss",
        ),
        ({"n.jsonl": '{"caption": "a"}\n[]'}, ["n.jsonl"], r"n\.jsonl:2: is no JSON object"),
        ({"n.jsonl": '{"caption": "a", "negatives": {"x": 3}}'}, ["n.jsonl"], "1: is no record"),
        ({"r.json": '{"m": {"suites": {}}}'}, ["r.json"], r"r\.json: holds nothing to plot"),
        ({"n.jsonl": '{"text": "a"}'}, ["n.jsonl"], r"n\.jsonl:1: is no record"),
        ({"n.jsonl": '{"caption": "a"}'}, ["n.jsonl"], "holds no negatives"),
        ({}, ["--published", "X", "--out", "."], "--published X: is none of vl_compo"),
        ({}, ["--published", "FSC-CLIP"], "pass --out"),
        ({}, ["n.jsonl", "--captions", "0"], "--captions 0: must be at least 1"),
        (
            {"n.jsonl": '{"caption": "a", "negatives": {"object": "b"}}'},
            ["n.jsonl", "--out", "n.jsonl"],
            r"--out n\.jsonl: cannot be written",
        ),
    ],
)
def test_mistakes_are_one_sentence(files, options, message, tmp_path, monkeypatch, plt):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        plot.main(options)
    assert not [*tmp_path.rglob("*.png")]


def test_items_of_one_model_are_found_and_boxes_are_cut_out(tmp_path, plt):
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    item = {"subset": "x", "texts": ["a", "b"], "scores": [[0.2, 0.1]], "correct": True}
    item["images"] = [[str(tmp_path / "a.png"), [0, 0, 4, 4]]]
    (tmp_path / "items").mkdir()
    (tmp_path / "items/s.jsonl").write_text(json.dumps(item))
    (tmp_path / "results.json").write_text('{"m": {}}')
    figure = plot.draw_items(tmp_path / "results.json", "s", plt)
    assert figure.axes[0].images[0].get_array().shape[:2] == (4, 4)
    assert plot.draw_items(tmp_path / "results.json", "zeroshot", plt) is None  # it has no items


def test_the_legend_of_many_long_names_stays_in_the_figure(plt):
    cell = {"accuracy": 50.0, "low": 40.0, "high": 60.0, "scored": 9, "expected": 9, "ties": 0}
    suite = {"subsets": {"x": cell}, "averages": {}, "costs": {}}
    results = {f"model {i:02} of a long name": {"suites": {"s": suite}} for i in range(14)}
    figure = plot.draw_suite(results, "s", plt)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1

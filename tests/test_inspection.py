"""The report on a run: attention, stability and calibration against oracles, and the page."""

import dataclasses
import html.parser
import json
import os
import re
from pathlib import Path

import fast_jit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from browser import Browser, find_chromium
from data import tiny as tiny_config
from flax import linen as nn
from tiny_detector import random_params

from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.commands import dispatch
from dn_detr_jax.config import base_config
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.errors import CheckpointError, DataError
from dn_detr_jax.evaluation.matches import Matches
from dn_detr_jax.inspection import report, tracing
from dn_detr_jax.inspection.calibration import calibration
from dn_detr_jax.inspection.markup import Html, element, table
from dn_detr_jax.inspection.stability import measure
from dn_detr_jax.models import deformable_attention
from dn_detr_jax.models.registry import abstract_params, build_model

# Attention


def tiny(name):
    """A tiny config of a variant with two decoder layers."""
    if name in ("dn_deformable_detr", "dn_deformable_encoder_detr"):
        return tiny_config.levels(name)
    config, given = base_config(name), tiny_config.detector(decoder_layers=2)
    own, model = config.model, given.model
    own.update({key: model[key] for key in own if key in model and key != "name"})
    config.eval.num_select = given.eval.num_select
    return config


def traced(monkeypatch, name):
    """Traces a tiny detector; returns what its decoder layers really used, too.

    Returns:
      Trace, heads, and by layer the values [B, T, D] that are summed, the sums [B, Q, D] that they
      lead to, and for deformable attention the locations and weights that are sampled.
    """
    config = tiny(name)
    model = build_model(config.model)
    params = random_params(abstract_params(model))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (2, 64, 96, 3), np.uint8)),
        "size": jnp.array([[64, 96], [40, 72]], jnp.int32),  # the second one has padding
        "labels": jnp.zeros((2, 3), jnp.int32),
        "boxes": jnp.asarray(rng.uniform(0.2, 0.5, (2, 3, 4)), jnp.float32),
        "valid": jnp.array([[True, True, False], [True, False, False]]),
    }
    used, sampled = {}, []
    original = deformable_attention.sample_levels

    def record(value, shapes, locations, weights, part):
        sampled.append((locations, weights))
        return original(value, shapes, locations, weights, part)

    monkeypatch.setattr(deformable_attention, "sample_levels", record)

    def intercept(method, args, kwargs, context):
        result = method(*args, **kwargs)
        path = context.module.path
        if path[:1] == ("decoder",) and path[-1] in ("cross_value", "cross_out"):
            used["/".join(path[1:])] = args[0] if path[-1] == "cross_out" else result
        return result

    def program(params, batch):
        used.clear()
        sampled.clear()
        with nn.intercept_methods(intercept):
            found = tracing.layer_outputs(params, batch, model=model, config=config, details=True)
        return found, dict(used), list(sampled)

    found, used, sampled = jax.device_get(fast_jit.fast_jit(program)(params, batch))
    trace = tracing.read_trace(found, np.asarray(batch["valid"]))
    return trace, config.model.num_heads, used, sampled[-2:]


@pytest.mark.parametrize("name", ["dn_dab_detr", "dn_deformable_encoder_detr", "dn_detr_plain"])
def test_dense_attention_gives_the_sums_of_the_decoder(monkeypatch, name):
    """Catches heads, positions, scales, padding or levels that differ from the decoder's."""
    trace, heads, used, _ = traced(monkeypatch, name)
    assert (trace.anchors is None) == (name == "dn_detr_plain")
    for layer in range(2):
        values, sums = used[f"layer{layer}/cross_value"], used[f"layer{layer}/cross_out"]
        for image in range(2):
            for query in (0, 3):
                levels = tracing.cross_attention(trace, layer, image, query, heads)
                weights = np.concatenate([x.weights.reshape(heads, -1) for x in levels], axis=1)
                np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
                assert (weights[:, ~trace.valid[image]] == 0).all()
                by_head = values[image].reshape(values.shape[1], heads, -1)
                mine = np.einsum("ht,thd->hd", weights, by_head).ravel()
                np.testing.assert_allclose(mine, sums[image, query], atol=2e-5)
    assert not trace.valid[1].all()


def test_deformable_attention_has_the_points_of_the_decoder(monkeypatch):
    """Catches heads, levels or points in another order, and places relative to the padding."""
    trace, heads, _, sampled = traced(monkeypatch, "dn_deformable_detr")
    for layer, (locations, weights) in enumerate(sampled):
        for image in range(2):
            levels = tracing.cross_attention(trace, layer, image, 1, heads)
            ends = np.cumsum([h * w for h, w in trace.shapes])[:-1]
            of_levels = np.split(trace.valid[image], ends)
            for level, found in enumerate(levels):
                valid = of_levels[level].reshape(trace.shapes[level])
                ratio = valid.any(axis=0).mean(), valid.any(axis=1).mean()
                np.testing.assert_allclose(found.weights, weights[image, 1, :, level], atol=1e-6)
                places = locations[image, 1, :, level]
                np.testing.assert_allclose(found.points * ratio, places, atol=1e-5)
    assert not trace.valid[1].all()


# Stability and calibration


def test_the_stability_of_checkpoints_counts_changed_entries():
    """Catches layers or images mixed up, and a comparison with another checkpoint than before."""
    ids = np.array([7, 3, -1])
    tables = {  # step -> [L, B, M]
        10: [[[0, 1], [2, -1], [0, 0]], [[4, 5], [0, -1], [0, 0]]],
        20: [[[0, 1], [2, -1], [1, 1]], [[5, 4], [0, -1], [1, 1]]],
        30: [[[0, 3], [1, -1], [2, 2]], [[5, 4], [0, -1], [2, 2]]],
    }
    found = measure(
        ((step, np.array(table)) for step, table in tables.items()),
        lambda: [{"image_id": ids}],
        lambda params, batch: params,
        6,
        [3],
    )
    assert found.steps == (10, 20, 30) and found.images == 2
    # Layer 2: objects 0 and 1 of image 7 swap, then nothing. Layer 1: two objects move.
    np.testing.assert_array_equal(found.instability, [[0, 1], [2, 0]])
    np.testing.assert_array_equal(found.queries[3], [[0, -1]] * 3)
    alone = measure([(5, np.array(tables[10]))], lambda: [{"image_id": ids}], lambda p, b: p, 6, [])
    assert alone.steps == (5,) and alone.instability.size == 0


def test_calibration_by_hand():
    scores = np.array([1.0, 0.95, 0.62, 0.3, 0.29, 0.05])
    found = np.array([0, -1, 1, -1, 2, -1])
    none = np.zeros(0)
    matches = Matches(
        1, np.zeros(6, int), scores, found, np.array([0, 0, 0, 0, 0, 1], bool), np.zeros(6, int),
        np.zeros((6, 4)), none, none, none, none,
    )  # fmt: skip
    bins = calibration(matches)
    assert bins.counts.tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 0, 2]
    assert bins.precision[9] == 0.5 and bins.scores[9] == pytest.approx(0.975)
    expected = (2 * 0.475 + 0.38 + 0.3 + 0.71) / 5
    assert bins.error == pytest.approx(expected)


# The page


def test_text_is_escaped_and_markup_is_not():
    """Catches class names that become elements or leave an attribute."""
    name = """<b>&"'</b>"""
    made = element("p", name, Html("<i>x</i>"), title=name)
    assert made == (
        '<p title="&lt;b&gt;&amp;&quot;&#x27;&lt;/b&gt;">&lt;b&gt;&amp;"\'&lt;/b&gt;<i>x</i></p>'
    )
    assert "&lt;b&gt;" in table(["a"], [[name, name]]) and "<b>" not in table([name], [[name]])


HOSTILE = """<script>window.hit=1</script>"><img src=x onerror="hit=1">$x^2$'\u732b"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, digits_dir):
    """A run with two checkpoints of random parameters, and metrics."""
    config = tiny_config.detector(num_classes=10, decoder_layers=2)
    config.data.update(name="digits_tiny", dir=str(digits_dir), canvases=((96, 128), (128, 96)))
    config.data.update(max_objects=8, eval_short_side=96, eval_max_long_side=128)
    config.eval.update(batch_size=8, instability_images=8)
    config.dn.groups = 2
    categories = [Category(c.id, c.name) for c in open_dataset(config.data, "train").categories]
    params = random_params(abstract_params(build_model(config.model)))
    folder = tmp_path_factory.mktemp("inspected") / "run"
    with Checkpoints(folder, config, categories=categories) as checkpoints:
        for step in (2, 4):
            moved = jax.tree.map(lambda x, step=step: x * (1 + 0.1 * step), params)
            checkpoints.save(step, {"params": moved}, metrics={"AP": step / 10})
    lines = [
        {"step": step, "time": 0.0, "train/loss": 9 / step, "eval/AP": step / 10}
        | ({"eval/instability": 1.5} if step > 2 else {})
        for step in (2, 4)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def page(workdir):
    """The report of the run, with hostile names of run and classes."""
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    out = workdir.parent / "report.html"
    original = report.open_run

    def open_run(name, *arguments):
        run = original(HOSTILE, *arguments)
        named = {old: f"{old}{HOSTILE}" for old in run.class_names}
        categories = [Category(c.id, named[c.name]) for c in run.setup.categories]
        evaluation = dataclasses.replace(
            run.evaluation,
            per_class={named[k]: v for k, v in run.evaluation.per_class.items()},
            class_figures={
                figure: {named[k]: v for k, v in by_class.items()}
                for figure, by_class in run.evaluation.class_figures.items()
            },
        )
        setup = dataclasses.replace(run.setup, categories=tuple(categories))
        return dataclasses.replace(run, evaluation=evaluation, setup=setup)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "open_run", open_run)
        for module in ("dn_detr_jax.inspection.tracing", "dn_detr_jax.training.programs"):
            patch.setattr(f"{module}.accepted_options", lambda *_: fast_jit.OPTIONS)
        report.write_report([workdir], out, report.Options(hardest=4, stability_images=8))
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert before == after  # an inspection changes nothing of the run
    return out


class Elements(html.parser.HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self._in = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._in = tag

    def handle_data(self, data):
        if self._in not in ("script", "style"):
            self.text += data


@pytest.mark.slow
def test_the_page_stands_alone_and_shows_names_as_text(page):
    """Catches requests, scripts that come from the data, and content that needs scripts."""
    elements = Elements(page.read_text(encoding="utf-8"))
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in elements.found for name in attrs)
    for _, attrs in elements.found:
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:")), attrs
    assert elements.text.count(HOSTILE) > 20
    sections = {attrs["id"] for tag, attrs in elements.found if tag == "section"}
    expected = {"summary", "curves", "classes", "confusion", "thresholds", "calibration"}
    assert sections == expected | {"images", "decoding", "denoising", "matching"}
    hidden = [attrs for _, attrs in elements.found if "hidden" in attrs]
    assert [attrs["class"] for attrs in hidden] == ["slider"]
    assert "The run has kept 2 checkpoints (steps 2, 4) of 2 evaluations" in elements.text


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium")
def test_the_page_in_a_browser(page, tmp_path):
    """Catches a policy that blocks the script or images of the page, and idle controls."""
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        assert browser.run("window.hit") is None and browser.run("document.title") == HOSTILE
        assert browser.run("performance.getEntriesByType('resource').length") == 0
        # Every image is decoded: one that is blocked or damaged has no size.
        assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")
        shown = "[...document.querySelectorAll('.choices')[0].children].filter("
        shown += "(part) => part.className === 'choice' && !part.hidden).length"
        options = "document.querySelector('.choices select').options"
        assert browser.run(shown) == 1
        first = "document.querySelector('.choice:not([hidden]) h4').textContent"
        before = browser.run(first)
        browser.run(
            "(() => { const s = document.querySelector('.choices select'); s.value = 1;"
            " s.dispatchEvent(new Event('change')); })()"
        )
        assert browser.run(shown) == 1 and browser.run(first) != before
        assert browser.run(f"{options}[1].textContent") == browser.run(first)
        visible = "document.querySelectorAll('.hardest [data-score]:not(.hidden)').length"
        counts = []
        for lowest in (1, 0.05):
            browser.run(
                "(() => { const i = document.querySelector('input[type=range]');"
                f" i.value = {lowest}; i.dispatchEvent(new Event('input')); }})()"
            )
            counts.append(browser.run(visible))
        assert counts[0] == 0 < counts[1]
        cells = "[...document.querySelectorAll('.sortable tbody tr')].map("
        cells += "(row) => Number(row.cells[1].textContent))"
        unsorted = browser.run(cells)
        browser.run("document.querySelectorAll('.sortable th button')[1].click()")
        assert browser.run(cells) == sorted(unsorted, reverse=True) != unsorted
        if path := os.environ.get("SCREENSHOT"):
            browser.screenshot(Path(path))


def test_runs_on_different_images_are_not_compared():
    class Stub:
        def __init__(self, ids):
            self.image_ids, self.workdir = np.array(ids), Path("runs/a")
            self.class_names = ["a"]

    report.check_same_images([Stub([2, 1]), Stub([1, 2])])
    with pytest.raises(DataError, match="evaluated on different images"):
        report.check_same_images([Stub([1, 2]), Stub([1, 3])])


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="none: no work directory of a run: there is no such"):
        report.write_report([tmp_path / "none"], tmp_path / "report.html", report.Options())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected --workdir DIR, or --compare DIR WORKDIR for two runs"),
        (["--workdir=a", "--compare=b", "c"], "expected --workdir DIR, or --compare"),
        (["--workdir=a", "b"], "unexpected argument 'b'"),
        (["--compare=a"], "the second run is missing"),
        (["--workdir=a", "--images=x,3"], "--images=x,3: expected ids"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dn-detr", "inspect", *arguments])
    before = set(flags.FLAGS)
    try:
        with pytest.raises(SystemExit) as ended:
            dispatch.main()
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    assert re.search(re.escape(expected), str(ended.value.code))

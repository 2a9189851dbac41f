"""Drawing: boxes are at the right pixels, files complete, broken metrics files readable."""

import json

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from PIL import Image

from dn_detr_jax.visualize import boxes, colors, fonts, plots, save
from dn_detr_jax.visualize.boxes import LabeledImage

NAMES = [str(i) for i in range(10)]


def rgb(color):
    return np.round(np.array(to_rgb(color)) * 255).astype(np.uint8)


def extent(image, color):
    """Returns left, top, right, bottom (inclusive) of the pixels of a color."""
    rows, columns = np.nonzero((image == rgb(color)).all(axis=-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def labeled(pred=(), true=(), size=(96, 128), scores=None, image_id=3):
    """Returns a black labeled image; `pred` and `true` are lists of (box, label)."""
    return LabeledImage(
        image=np.zeros((*size, 3), np.uint8),
        pred_boxes=np.array([box for box, _ in pred], float).reshape(-1, 4),
        pred_labels=np.array([label for _, label in pred], int),
        pred_scores=np.array([0.9] * len(pred) if scores is None else scores),
        true_boxes=np.array([box for box, _ in true], float).reshape(-1, 4),
        true_labels=np.array([label for _, label in true], int),
        image_id=image_id,
    )


def photograph(grid, size):
    """Cuts the first panel's image (nothing in it is white) out of a grid."""
    white = (grid[:, 10 : 10 + size[1]] == 255).all(axis=-1).any(axis=1)
    top, *_, bottom = np.flatnonzero(~white)
    assert bottom - top + 1 == size[0]
    return grid[top : top + size[0], 10 : 10 + size[1]]


def test_boxes_lie_on_their_pixels_in_a_small_image():
    """96 x 128 is enlarged three times: a box from 20 to 60 covers pixels 60 to 179."""
    grid = boxes.render_detections([labeled(true=[((20, 30, 60, 70), 4)])], [], cell=384)
    # No class name needs room: the label text is drawn outside the box, below it.
    shown = photograph(grid, (288, 384))
    assert extent(shown[:210], colors.TRUE) == (60, 90, 179, 209)
    assert (shown[100:200, 70:170] == 0).all()
    grid = boxes.render_detections([labeled(pred=[((20, 30, 60, 70), 4)])], NAMES, cell=384)
    shown = photograph(grid, (288, 384))
    assert extent(shown[90:], colors.PREDICTED) == (60, 0, 179, 119)
    assert (shown[90:92, 60:180] == rgb(colors.PREDICTED)).all()
    assert (shown[208:210, 60:180] == rgb(colors.PREDICTED)).all()


def test_boxes_lie_on_their_pixels_in_a_large_image():
    big = labeled(true=[((400, 100, 1200, 700), 1)], size=(800, 1600))
    grid = boxes.render_detections([big], NAMES, cell=400)
    shown = photograph(grid, (200, 400))
    assert extent(shown[:175], colors.TRUE) == (100, 25, 299, 174)


def test_boxes_beyond_the_border_stay_visible():
    grid = boxes.render_detections([labeled(true=[((-50, -9, 500, 200), 1)])], NAMES, cell=384)
    shown = photograph(grid, (288, 384))
    assert extent(shown, colors.TRUE) == (0, 0, 383, 287)


def test_threshold_hides_predictions():
    pred = [((10, 40, 30, 60), 1), ((80, 40, 100, 60), 2)]
    for threshold, left in ((0.3, 30), (0.5, 240)):
        grid = boxes.render_detections(
            [labeled(pred=pred, scores=[0.4, 0.8])], NAMES, threshold, cell=384
        )
        shown = photograph(grid, (288, 384))
        assert extent(shown[120:], colors.PREDICTED)[::2] == (left, 299)


@pytest.mark.parametrize(
    ("prediction", "named"),
    [(((20, 30, 60, 70), 4), False), (((20, 30, 60, 70), 5), True), (((60, 30, 99, 70), 4), True)],
)
def test_a_true_box_is_named_where_it_is_missed(prediction, named):
    """Covers a found box, a wrong class and a wrong place; the name is a filled area below."""
    truth = [((20, 30, 60, 70), 4)]
    grid = boxes.render_detections([labeled([prediction], truth)], NAMES, cell=384)
    shown = photograph(grid, (288, 384))
    assert (shown[210:230] == rgb(colors.TRUE)).all(axis=-1).any() == named


def test_crowded_empty_and_odd_images():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (80, 2))
    crowd = [((x, y, x + 20, y + 20), i % 12) for i, (x, y) in enumerate(corner)]
    images = [
        labeled(),
        labeled(crowd, crowd[::-1]),
        labeled(size=(1, 1), image_id=10**12),
        labeled([((5, 5, 5, 5), 0), ((9, 9, 3, 3), 0)], size=(40, 900)),
        labeled([((1, 1, 8, 8), 11)], size=(900, 40)),
    ]
    grid = boxes.render_detections(images, NAMES)
    assert grid.dtype == np.uint8 and grid.ndim == 3 and grid.shape[2] == 3
    with pytest.raises(ValueError, match="no images"):
        boxes.render_detections([], NAMES)


def test_noised_boxes_have_a_panel_per_group_and_mark_flips():
    image = np.zeros((96, 128, 3), np.uint8)
    clean = np.array([[20, 30, 60, 70], [80, 10, 120, 50]], float)
    noised = np.stack([clean + 4, clean - 6])
    labels = np.array([3, 7])
    none = boxes.render_noised_boxes(
        image, clean, noised, labels, np.stack([labels, labels]), NAMES, cell=384
    )
    one = boxes.render_noised_boxes(
        image, clean, noised, labels, np.array([[3, 7], [3, 1]]), NAMES, cell=384
    )

    def flips(grid):
        return (grid[40:] == rgb(colors.VERMILLION)).all(axis=-1).sum()

    assert flips(none) == 0 < flips(one)
    # Two columns: the second panel of the first row is group 1, 10 pixels right of the first.
    shown = photograph(none[:340, 394:], (288, 384))
    below_text = 34 * 3  # the first object's noised box is (24, 34, 64, 74), its text above it
    left, _, right, bottom = extent(shown[below_text:, :230], colors.ORANGE)
    assert (left, right, below_text + bottom) == (20 * 3, 64 * 3 - 1, 74 * 3 - 1)
    empty = boxes.render_noised_boxes(
        image, clean[:0], noised[:, :0], labels[:0], np.zeros((2, 0), int), NAMES
    )
    assert empty.dtype == np.uint8


def attention(valid, groups, matching, attend_padding=False):
    slots = len(valid) * groups
    group = np.repeat(np.arange(groups), len(valid))
    valid = np.tile(valid, groups)
    mask = np.zeros((slots + matching,) * 2, bool)
    mask[:, slots:] = True
    mask[:slots, :slots] = (group[:, None] == group) & (valid | attend_padding)
    return mask, group, valid


def share(image, color):
    return (image == rgb(color)).all(axis=-1).mean()


def test_attention_mask_colors():
    valid = np.array([True, True, False])
    plain = plots.render_attention_mask(*attention(valid, 3, 9))
    leak = plots.render_attention_mask(*attention(valid, 3, 9, attend_padding=True))
    assert share(plain, colors.BLUE) == pytest.approx(share(leak, colors.BLUE), rel=0.1)
    assert share(plain, colors.VERMILLION) == 0 < share(leak, colors.VERMILLION)
    full = plots.render_attention_mask(*attention(np.ones(3, bool), 3, 9))
    assert share(full, colors.BLUE) > share(plain, colors.BLUE)
    # of 18 x 18 cells: 9 x 9 matching, 6 real slots x 9 to matching, 3 groups of 2 x 2
    scale = 18**2 * share(plain, colors.BLUE) / (81 + 54 + 12)
    assert scale * (18**2 - 15**2) / 18**2 == pytest.approx(share(plain, "#A0A0A0"), rel=0.15)


def test_attention_mask_of_a_batch_of_many_groups_and_of_none():
    pairs = zip(*[attention(np.arange(2) < n, 40, 30) for n in (1, 2)], strict=True)
    two = plots.render_attention_mask(*map(np.stack, pairs))
    one = plots.render_attention_mask(*attention(np.ones(2, bool), 40, 30))
    assert two.shape[1] > 1.8 * one.shape[1]
    plain_dab = plots.render_attention_mask(
        np.ones((5, 5), bool), np.zeros(0, int), np.zeros(0, bool)
    )
    assert share(plain_dab, colors.BLUE) > 0.5
    with pytest.raises(ValueError, match=r"\(1, 5, 5\), \(1, 6\)"):
        plots.render_attention_mask(np.ones((5, 5), bool), np.zeros(6, int), np.ones(6, bool))


def write_metrics(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_metrics_file_of_a_resumed_and_killed_run(tmp_path):
    path = write_metrics(
        tmp_path / "metrics.jsonl",
        [
            {"step": 10, "train/loss": 5.0, "train/learning_rate": 1e-4},
            {"step": 20, "train/loss": 4.0, "eval/AP": 0.1},
            {"step": 30, "train/loss": float("nan"), "note": "text", "flag": True},
        ],
    )
    with open(path, "a") as f:
        f.write('{"step": 30, "train/lo{"step": 20, "train/loss": 3.5}\n')  # cut, then resumed
        f.write('{"step": 20, "train/loss": 3.0}\n[1]\n7\n\n{"train/loss": 1.0}\n')
        f.write('{"step": 15, "train/loss": 4.5}\n{"step": 40, "train/loss": 2.')
    curves = plots.read_curves(path)
    assert set(curves) == {"train/loss", "train/learning_rate", "eval/AP"}
    np.testing.assert_array_equal(curves["train/loss"][0], [10, 15, 20])
    np.testing.assert_array_equal(curves["train/loss"][1], [5.0, 4.5, 3.0])
    np.testing.assert_array_equal(curves["eval/AP"][0], [20])


def test_curves_of_one_and_two_runs(tmp_path):
    steps = range(10, 5000, 10)
    dn = write_metrics(
        tmp_path / "dn.jsonl",
        [
            {"step": s, "train/loss": 9 / s, "train/dn_loss_ce": 1 / s, "eval/AP": 0.5}
            for s in steps
        ],
    )
    dab = write_metrics(tmp_path / "dab.jsonl", [{"step": s, "train/loss": 12 / s} for s in steps])
    both = plots.render_curves({"DN": dn, "DAB": dab})
    alone = plots.render_curves({"DAB": dab})
    second = colors.BY_RUN[1]
    assert share(both, second) > 0 == share(alone, second)
    assert both.shape[0] > alone.shape[0]  # only panels with values
    nothing = write_metrics(tmp_path / "nothing.jsonl", [{"step": 1, "other": 2.0}])
    with pytest.raises(ValueError, match=r"eval/AP.*nothing\.jsonl"):
        plots.render_curves({"x": nothing})
    with pytest.raises(FileNotFoundError, match="absent"):
        plots.render_curves({"x": tmp_path / "absent.jsonl"})


def test_png_is_whole_or_not_there(tmp_path, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / "pictures" / "a.png"
    save.save_png(image, path)
    with Image.open(path) as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read), image)

    def disk_full(self, file, **_):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        save.save_png(image[::-1], path)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with Image.open(path) as read:
        np.testing.assert_array_equal(np.asarray(read), image)


def test_global_state_of_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    path = write_metrics(tmp_path / "m.jsonl", [{"step": 1, "train/loss": 2.0}])
    plots.render_curves({"run": path})
    plots.render_attention_mask(*attention(np.ones(2, bool), 2, 3))
    assert dict(matplotlib.rcParams) == before


def test_detections_are_drawn_at_its_own_resolution():
    """Catches boxes off by one, colors that don't follow the label, the order of drawing."""
    black = np.zeros((400, 500, 3), np.uint8)
    corners = np.array([[100, 100, 300, 200], [200, 150, 450, 390], [-20, 350, 40, 900]])
    drawn = boxes.draw_detections(black, corners, [0, 2, 2], [0.9, 0.8, 0.7], ["a", "b", "c"])
    assert drawn.shape == black.shape and not black.any()
    first, other = colors.ORANGE, colors.GREEN
    below_text = np.where(np.arange(400)[:, None, None] < 101, 0, drawn)
    assert extent(below_text, first)[::2] == (100, 299) and extent(drawn, first)[3] == 199
    assert extent(drawn[220:, 200:], other)[2:] == (449 - 200, 389 - 220)
    assert (drawn[150:152, 205:295] == rgb(other)).all()
    assert (drawn[160:199, 298:300] == rgb(first)).all()
    assert (drawn[198:200, 202:298] == rgb(first)).all()  # the surer box is on top
    assert (drawn[399, 5:35] == rgb(other)).all()  # cut off at the edge
    wide = boxes.draw_detections(np.zeros((400, 2000, 3), np.uint8), corners[:1], [0], [1], "a")
    assert (wide[150, 100:105] == rgb(first)).all() and not wide[150, 105].any()


def test_a_jpeg_is_whole_and_near(tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    image[20:22] = rgb(colors.ORANGE)  # a line as thin as those of the boxes
    save.save_jpeg(image, tmp_path / "new" / "a.jpg")
    with Image.open(tmp_path / "new" / "a.jpg") as saved:
        assert np.abs(np.asarray(saved, int) - image).max() < 40
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_names_in_every_script_are_told_apart(caplog, monkeypatch):
    """Catches names that are drawn as equal empty squares."""
    fonts._drawable.cache_clear()
    fonts._warn_of_script.cache_clear()
    monkeypatch.setattr(fonts, "_installed_font", lambda characters: None)
    names = [
        "\u732b",
        "\u72ac",
        "\u0939\u093f\u0930\u0928",
        "caf\u00e9",
        "\u0431\u043e\u0431\u0440",
        "a\nb",
        "a\u200cb",
    ]
    texts = [fonts.drawable(name, 12)[0] for name in names]
    assert texts[:2] == [r"\u732b", r"\u72ac"] and texts[3:] == [*names[3:5], r"a\nb", "ab"]
    assert len({np.asarray(text_image(text)).tobytes() for text in texts}) == len(names)
    assert sum("CJK" in line for line in caplog.messages) == 1
    black = np.zeros((60, 120, 3), np.uint8)
    box, count = np.array([[5, 30, 60, 55]]), len(names)
    drawn = {boxes.draw_detections(black, box, [0], [0.5], [name]).tobytes() for name in names}
    assert len(drawn) == count


def text_image(text):
    return fonts.font(12).getmask(text)


def test_an_installed_font_with_the_characters_is_used(monkeypatch):
    """A stand-in for a font of another script: matplotlib's own one, under another name."""
    fonts._drawable.cache_clear()
    fonts._installed_font.cache_clear()
    found = {"/other.ttf": frozenset(map(ord, "\u732b 0"))}
    own = fonts._own_font()
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [*found, own])
    monkeypatch.setattr(
        fonts, "_characters", lambda path: found.get(path, frozenset(map(ord, "ab")))
    )
    monkeypatch.setattr(fonts, "font", lambda size, path=own: path)
    assert fonts.drawable("\u732b 0", 12) == ("\u732b 0", "/other.ttf")
    assert fonts.drawable("\u732b a", 12)[1] == own
    fonts._drawable.cache_clear()
    fonts._installed_font.cache_clear()

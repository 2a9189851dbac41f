"""The augmentation that the config adds to the published one, from the plan to the batch."""

import colorsys
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from pycocotools import mask

from dn_detr_jax.config import augment_preset, base_config, load_config, validate
from dn_detr_jax.data import augmentation
from dn_detr_jax.data.colors import change_colors, color_matrix
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import train_batches, train_plan
from dn_detr_jax.data.mosaic import Scene
from dn_detr_jax.data.plan import plan_epoch, stop_epoch
from dn_detr_jax.data.records import Example
from dn_detr_jax.data.transforms import FILL, Geometry, apply, draw_geometry, largest_sizes
from dn_detr_jax.errors import ConfigError, DataError
from dn_detr_jax.training.preview import write_preview

CHAINS = {
    "orientation": {"flip": 0.5, "vertical_flip": 0.5, "rotate": 0.75},
    "zoom_out": {"zoom_out": 1.0, "rotate": 0.5},
    "iou_crop": {"iou_crop": 1.0, "rotate": 0.5},
    "scale": {"scale": (0.1, 2.0), "crop": 0.5, "crop_resize": (150, 200), "crop_size": (100, 150)},
    "mosaic": {"mosaic": 1.0, "rotate": 0.5, "flip": 0.5},
    "all": augment_preset("aggressive") | {"rotate": 0.5, "vertical_flip": 0.5, "stop_at": "100%"},
}


class MarkerSource:
    """Black images with one rectangle each, in a color that tells its label."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index) -> Example:
        rng = np.random.default_rng(index)
        height, width = self.sizes[index].tolist()
        top, left = rng.integers(0, (height - 70, width - 70))
        bottom, right = rng.integers((top + 70, left + 70), (height + 1, width + 1))
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[top:bottom, left:right, index % 3] = 255
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png", compress_level=1)
        boxes = np.array([[left, top, right, bottom]], np.float32)
        return Example(file.getvalue(), index, boxes, np.array([index % 3], np.int32))


@pytest.fixture
def config(digits_config):
    """A config with canvases that every chain fits."""
    digits_config.data.canvases = ((96, 192), (192, 96), (128, 128), (192, 192))
    digits_config.data.augment.update(short_sides=(80, 96), max_long_side=192)
    return digits_config


@pytest.fixture
def markers(config):
    """A training split of 32 images with markers."""
    train = open_dataset(config.data, "train")
    sizes = np.random.default_rng(0).integers(120, 260, (32, 2)).astype(np.int32)
    table = train.annotations
    table = dataclasses.replace(
        table,
        sizes=sizes,
        image_ids=table.image_ids[:32],
        file_names=table.file_names[:32],
        offsets=table.offsets[:33],
    )
    return dataclasses.replace(train, source=MarkerSource(sizes), annotations=table)


def assert_equal_batches(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("chain", CHAINS)
def test_boxes_stay_around_their_markers(chain, markers, config):
    """Catches a box that is flipped, turned, moved or scaled otherwise than its pixels."""
    config.data.augment.update(CHAINS[chain])
    boxes_seen = 0
    for batch in train_batches(markers, config, 0, 8):
        for row in range(8):
            height, width = batch["size"][row]
            image = batch["image"][row, :height, :width].astype(int)
            colored = image.max(-1) - image.min(-1) > 60
            label_of = image.argmax(-1)
            explained = np.zeros((height, width), bool)
            for box, label in zip(
                batch["boxes"][row][batch["valid"][row]],
                batch["labels"][row][batch["valid"][row]],
                strict=True,
            ):
                (x, y), (w, h) = box[:2] * (width, height), box[2:] * (width, height)
                left, right = np.rint([x - w / 2, x + w / 2]).astype(int)
                top, bottom = np.rint([y - h / 2, y + h / 2]).astype(int)
                explained[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = True
                inner = slice(top + 2, bottom - 2), slice(left + 2, right - 2)
                assert colored[inner].all() and (label_of[inner] == label).all()
                boxes_seen += colored[inner].size > 0
            assert not (colored & ~explained).any()
    assert boxes_seen > 40


@pytest.mark.parametrize("chain", CHAINS)
def test_every_draw_fits_the_bounds_and_the_image(chain):
    """Catches an image that fits no canvas in the middle of a training."""
    augment = base_config().data.augment
    augment.update(CHAINS[chain])
    augment.update(short_sides=(48, 64, 80), max_long_side=133)
    augment.update(crop_resize=(40, 60), crop_size=(30, 60))
    rng = np.random.default_rng(1)
    sizes = np.concatenate([rng.integers(1, 300, (300, 2)), [[1, 3000], [3000, 1], [1, 1]]])
    bounds = largest_sizes(sizes, augment)
    for _ in range(40):
        drawn = draw_geometry(rng, sizes, augment)
        assert (drawn.size[:, None] <= bounds).all(-1).any(-1).all()
        assert (drawn.size >= 1).all() and (drawn.crop[:, 2:] >= 1).all()
        beyond = drawn.crop[:, :2] + drawn.crop[:, 2:] > drawn.resized
        assert augment.zoom_out > 0 or not (beyond | (drawn.crop[:, :2] < 0)).any()


def test_the_default_draws_are_those_of_earlier_versions():
    """Catches a new draw in the published stream, which would change resumed runs."""
    sizes = np.array([[480, 640], [640, 480], [333, 500], [900, 300]])
    geometry = draw_geometry(np.random.default_rng(11), sizes, base_config().data.augment)
    # From version 0.1.0.
    crops = [[72, 73, 527, 443], [0, 0, 640, 480], [2, 62, 395, 495], [221, 42, 561, 448]]
    assert geometry.crop.tolist() == crops
    assert geometry.size.tolist() == [[875, 736], [1066, 800], [800, 1002], [841, 672]]
    assert geometry.flip.tolist() == [True, True, False, True]
    assert not geometry.turns.any() and not geometry.min_iou.any() and not geometry.mosaic.any()


def test_draws_have_their_probabilities():
    augment = base_config().data.augment
    augment.update(crop=0.0, vertical_flip=0.5, rotate=0.75, mosaic=0.3, zoom_out=0.4)
    augment.update(scale=(0.1, 2.0))
    sizes = np.full((4000, 2), 600)
    drawn = draw_geometry(np.random.default_rng(0), sizes, augment)
    np.testing.assert_allclose(np.bincount(drawn.turns) / 4000, 0.25, atol=0.03)
    assert abs(drawn.flip.mean() - 0.5) < 0.03 and abs(drawn.mosaic.mean() - 0.3) < 0.03
    zoomed = (drawn.crop[:, 2:] > 600).all(-1)
    assert abs(zoomed.mean() - 0.7 * 0.4) < 0.03 and not (zoomed & drawn.mosaic).any()
    # Uniform factors from 0.1 to 2: 9 of 19 images shrink, and the others lose a part.
    plain = ~zoomed & ~drawn.mosaic
    assert abs((drawn.crop[plain, 2] == 600).mean() - 9 / 19) < 0.04
    assert drawn.crop[plain, 2].min() == 300 and drawn.size[plain].min() < 100


def test_equal_seeds_give_equal_bytes_wherever_a_run_starts(markers, config):
    """Catches draws that depend on the order of reading, the process or the start."""
    config.data.augment.update(CHAINS["all"] | {"hook": f"{__name__}:darken_some"})
    whole = list(train_batches(markers, config, 0, 8))
    assert_equal_batches(whole[5:], list(train_batches(markers, config, 5, 3)))
    parts = [list(train_batches(markers, config, 0, 8, p, 2)) for p in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        for key in ("image", "size", "labels", "boxes", "valid"):
            np.testing.assert_array_equal(batch[key], np.concatenate([first[key], second[key]]))
    config.seed += 1
    assert (next(train_batches(markers, config, 0, 1))["size"] != whole[0]["size"]).any()


def test_augmentation_stops_with_an_epoch(markers, config):
    """Compares the last epoch with a run that has only what goes on: rotations."""
    config.train.duration, config.data.augment.rotate = "3 epochs", 0.5
    plain = list(train_batches(markers, config, 4, 8))
    config.data.augment.update(
        augment_preset("aggressive") | {"stop_at": "50%", "hook": f"{__name__}:darken_some"}
    )
    stopped = list(train_batches(markers, config, 4, 8))
    assert_equal_batches(stopped[4:], plain[4:])
    assert any((a["size"] != b["size"]).any() for a, b in zip(stopped[:4], plain, strict=False))


@pytest.mark.parametrize(
    ("stop_at", "duration", "epoch"),
    [
        ("100%", "12 epochs", np.inf),
        ("90%", "12 epochs", 11),
        ("90%", "50 epochs", 45),
        ("50%", "1200 steps", 6),
        ("250 steps", "12 epochs", 3),
        ("1.5 epochs", "12 epochs", 2),
        ("0%", "12 epochs", 0),
    ],
)
def test_when_augmentation_stops(stop_at, duration, epoch):
    config = base_config()
    config.data.augment.stop_at, config.train.duration = stop_at, duration
    assert stop_epoch(config, 100) == epoch


def photograph():
    noise = np.random.default_rng(0).integers(70, 180, (12, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((80, 60), Image.Resampling.BICUBIC))


def mapped(image, matrix):
    return image @ matrix[:, :3].T + matrix[:, 3]


@pytest.mark.parametrize("factor", [0.7, 1.2])
def test_colors_change_as_pillow_changes_them(factor):
    image = photograph()
    gray = float(np.asarray(Image.fromarray(image).convert("L")).mean())
    neutral = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "gray": gray}
    for name, enhance in (
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ):
        expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor)).astype(int)
        result = mapped(image, color_matrix(**neutral | {name: factor}))
        assert np.abs(result - expected).max() < 1.6, name


def test_the_hue_turns_in_yiq():
    """Uses Python's colorsys, whose primaries differ in the third digit."""
    image, angle = photograph(), 2 * np.pi * 0.04
    result = mapped(image, color_matrix(1, 1, 1, 0.04, 0.0))
    for pixel, changed in zip(image.reshape(-1, 3)[::97], result.reshape(-1, 3)[::97], strict=True):
        y, i, q = colorsys.rgb_to_yiq(*(pixel / 255))
        turned = i * np.cos(angle) - q * np.sin(angle), i * np.sin(angle) + q * np.cos(angle)
        expected = 255 * np.array(colorsys.yiq_to_rgb(y, *turned))
        np.testing.assert_allclose(changed, expected, atol=3)


def test_colors_are_rounded_and_cut_once():
    augment = base_config().data.augment
    augment.update(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1)
    wide = np.zeros((60, 100, 3), np.uint8)
    image = wide[:, :80]  # a part of a canvas
    image[:] = photograph()
    before = image.copy()
    change_colors(np.random.default_rng(3), image, augment)
    draws = np.random.default_rng(3).uniform(-1, 1, 4) * (0.5, 0.5, 0.5, 0.1)
    gray = before.mean((0, 1)) @ (0.299, 0.587, 0.114)
    expected = mapped(before, color_matrix(*(1 + draws[:3]), draws[3], gray))
    np.testing.assert_allclose(image, np.clip(expected, 0, 255), atol=1)
    assert not wide[:, 80:].any()


def test_zooming_out_is_pasting_a_resized_image():
    image = photograph()
    geometry = Geometry(
        resized=np.array([60, 80]),
        crop=np.array([-40, -20, 120, 160]),
        size=np.array([60, 80]),
        flip=np.bool_(False),
    )
    result, boxes, _ = apply(image, [[0, 0, 80, 60]], [0], geometry)
    expected = Image.new("RGB", (80, 60), FILL)
    expected.paste(Image.fromarray(image).resize((40, 30), Image.Resampling.BILINEAR), (10, 20))
    np.testing.assert_array_equal(result, np.asarray(expected))
    np.testing.assert_allclose(boxes, [[10, 20, 50, 50]])


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_crop_has_the_drawn_iou_with_an_object(turns):
    """Computes the IoU by pycocotools, of the object that np.rot90 turns."""
    drawn = np.zeros((100, 160), np.uint8, order="F")
    drawn[30:90, 40:130] = 1
    encoded = mask.toBbox(mask.encode(np.asfortranarray(np.rot90(drawn, turns))))
    resized = np.array(drawn.shape[:: -1 if turns % 2 else 1])
    crop = np.array([70, 110])[:: -1 if turns % 2 else 1]
    found = {}
    for least in (0.5, 0.97):
        geometry = Geometry(
            resized,
            np.concatenate([[0, 0], crop]),
            crop,
            np.bool_(False),
            turns=np.int8(turns),
            min_iou=np.float32(least),
        )
        scene = Scene(np.zeros((100, 160, 3), np.uint8), np.array([[40, 30, 130, 90]]), [0])
        ious = []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            top, left, height, width = augmentation.place_crop(rng, geometry, scene).crop
            assert 0 <= top <= resized[0] - height and 0 <= left <= resized[1] - width
            assert [height, width] == crop.tolist()
            box = np.array([[left, top, width, height]], np.float64)
            ious.append(mask.iou(box, encoded.reshape(1, 4), [0])[0, 0])
        found[least] = ious
    assert min(found[0.5]) >= 0.5 and max(found[0.97]) < 0.97  # the crop is too large for 0.97
    assert np.mean(found[0.97]) > np.mean(found[0.5])  # the best of the places then
    assert min(found[0.97]) > 0.6


def darken_some(image, boxes, labels, rng):
    """A hook: darkens images at random and keeps the objects."""
    return (image // 2 if rng.random() < 0.5 else image), boxes, labels


def erase_left(image, boxes, labels, rng):
    """A hook: removes what lies left, boxes cut by negative numbers included."""
    image = image.copy()
    image[:, :40] = 0
    return image, boxes - np.array([0, 0, 1000, 0])[None] * (boxes[:, :1] < 40), labels


def wrong_size(image, boxes, labels, rng):
    return image[:-1], boxes, labels


def wrong_type(image, boxes, labels, rng):
    return image / 255, boxes, labels


def wrong_boxes(image, boxes, labels, rng):
    return image, np.full((len(labels), 4), np.nan), labels


def wrong_count(image, boxes, labels, rng):
    return image, np.zeros((3, 4)), np.zeros(2, int)


def wrong_labels(image, boxes, labels, rng):
    return image, boxes, labels + 1000


def no_objects(image, boxes, labels, rng):
    return image, boxes[:0], labels[:0]


def nothing(image, boxes, labels, rng):
    pass


def test_a_hook_has_the_last_word(markers, config):
    """Catches a hook whose image or boxes do not reach the model, and boxes that it emptied."""
    plain = next(train_batches(markers, config, 0, 1))
    config.data.augment.hook = f"{__name__}:erase_left"
    hooked = next(train_batches(markers, config, 0, 1))
    assert plain["image"][:, :, :40].any() and not hooked["image"][:, :, :40].any()
    np.testing.assert_array_equal(plain["image"][:, :, 40:], hooked["image"][:, :, 40:])
    left = (plain["boxes"][..., 0] - plain["boxes"][..., 2] / 2) * plain["size"][:, 1:]
    np.testing.assert_array_equal(hooked["valid"].sum(1), (plain["valid"] & (left >= 40)).sum(1))
    assert 0 < hooked["valid"].sum() < plain["valid"].sum()


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("wrong_size", r"an image uint8 \(.*\), expected uint8 \(.*the size is the plan's"),
        ("wrong_type", r"an image float64"),
        ("wrong_boxes", r"not finite"),
        ("wrong_count", r"boxes \(3, 4\) and labels \(2,\)"),
        ("wrong_labels", r"labels \[100\d.*expected 0 to 9"),
        ("nothing", r"NoneType, expected \(image, boxes, labels\)"),
    ],
)
def test_what_a_hook_returns_is_checked(hook, message, markers, config):
    config.data.augment.hook = f"{__name__}:{hook}"
    with pytest.raises(DataError, match=rf"data\.augment\.hook .*:{hook} returned .*{message}"):
        list(train_batches(markers, config, 0, 1))


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        (f"{__name__}:no_such", "no attribute 'no_such'"),
        (f"{__name__}:CHAINS", "a function; it is"),
    ],
)
def test_a_hook_that_cannot_be_imported_is_named_at_once(hook, message, markers, config):
    config.data.augment.hook = hook
    with pytest.raises(ConfigError, match=rf"data\.augment\.hook = .*{message}"):
        train_plan(markers, config)


@pytest.mark.parametrize("preset", ["conservative", "aggressive", "aerial"])
def test_presets_fit_the_canvases_of_the_fine_tuning(preset):
    config = load_config("finetune")
    config.data.augment.update(augment_preset(preset))
    validate(config)
    sizes = np.array([[480, 640], [640, 480], [3000, 200], [426, 640]] * 16)
    plan_epoch(
        seed=0,
        epoch=0,
        sizes=sizes,
        augment=config.data.augment,
        canvases=config.data.canvases,
        batch_size=16,
        snap=config.data.snap,
    )
    with pytest.raises(ConfigError, match=r"'x': one of the presets conservative, aggressive, aer"):
        augment_preset("x")


def test_a_preview_shows_what_the_model_gets(markers, config, tmp_path):
    """Catches boxes of another image, other canvases, and images that are not those of the step."""
    config.data.augment.update(CHAINS["orientation"])
    batches = list(train_batches(markers, config, 2, 2))
    write_preview(markers, config, tmp_path / "boxes", 10, step=2)
    config.data.augment.hook = f"{__name__}:no_objects"
    write_preview(markers, config, tmp_path / "plain", 10, step=2)
    files = sorted((tmp_path / "plain").iterdir())
    assert [path.name for path in files] == [p.name for p in sorted((tmp_path / "boxes").iterdir())]
    assert len(files) == 10
    for number, path in enumerate(files):
        batch, row = batches[number // 8], number % 8
        assert path.name.startswith(f"step_{2 + number // 8:06d}_row_{row:03d}_image_")
        plain, drawn = (np.asarray(Image.open(p)) for p in (path, tmp_path / "boxes" / path.name))
        np.testing.assert_array_equal(plain, batch["image"][row])
        colored = plain.max(-1) - plain.min(-1) > 60
        ys, xs = np.flatnonzero(colored.any(1)), np.flatnonzero(colored.any(0))
        changed = (plain != drawn).any(-1)
        # The frame goes around the marker; the name covers a part of it.
        top, bottom, left, right = ys[0], ys[-1], xs[0], xs[-1]
        assert changed[top : top + 3, xs[2:-2]].any(0).all()
        assert changed[bottom - 2 : bottom + 1, xs[2:-2]].any(0).all()
        assert changed[ys[2:-2], left : left + 3].any(1).all()
        assert changed[ys[2:-2], right - 2 : right + 1].any(1).all()


def test_unreadable_tiles_of_a_mosaic(markers, config):
    """Catches a mosaic that ends the run although data.skip_bad is set."""
    config.data.augment.mosaic = 1.0
    indices = train_plan(markers, config).batch(0).indices
    broken = dataclasses.replace(markers, source=_BrokenBut(markers.source, indices))
    with pytest.raises(DataError, match="can't be read"):
        list(train_batches(broken, config, 0, 1))
    config.data.skip_bad = True
    batch = next(train_batches(broken, config, 0, 1))
    assert batch["bad_images"] == 0 and batch["valid"].any(1).all()


class _BrokenBut:
    """A source with damaged images, some excepted."""

    def __init__(self, source, readable):
        self.source, self.readable = source, set(readable.tolist())

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        if index in self.readable:
            return example
        return dataclasses.replace(example, image=b"damaged")

"""How often images come in an epoch: repeat factors of LVIS, and mixed data sets."""

import contextlib
import copy
import math

import numpy as np
import pytest
from coco_directory import document, write_coco, write_split

from dn_detr_jax.config import base_config, validate
from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import images_in_epoch, train_batches, train_plan
from dn_detr_jax.data.plan import TrainPlan, plan_epoch
from dn_detr_jax.data.sampling import Sampling, repeat_factors, sampling_of
from dn_detr_jax.errors import ConfigError, DataError

CANVASES = ((64, 96), (96, 64))


def table(images, seed=0):
    """A table of images whose classes are ever rarer, with crowd regions and empty images."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, images)
    total = int(counts.sum())
    return Annotations(
        image_ids=np.arange(images),
        sizes=rng.integers(40, 60, (images, 2)).astype(np.int32),
        file_names=("",) * images,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        ids=np.arange(total),
        bboxes=np.tile([1.0, 1.0, 9.0, 9.0], (total, 1)),
        category_ids=rng.geometric(0.4, total) * 3,
        areas=np.ones(total),
        crowd=rng.random(total) < 0.1,
    )


@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.2, 1.0])
def test_repeat_factors_are_those_of_lvis(threshold):
    """Compares with the formula, image by image and class by class."""
    data = table(300)
    classes = [set(data.targets_of(i).category_ids.tolist()) for i in range(300)]
    expected = []
    for own in classes:
        shares = [sum(c in other for other in classes) / 300 for c in own]
        factors = [max(1.0, math.sqrt(threshold / share)) for share in shares]
        expected.append(max(factors, default=1.0))
    found = repeat_factors(data, threshold)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert threshold < 0.1 or len(np.unique(found)) > 2


def test_counts_round_the_rates_up_or_down_with_the_right_mean():
    """Catches rates rounded to whole numbers, and images that come together in every epoch."""
    rates = np.random.default_rng(0).uniform(0.1, 3.5, 200)
    parts = np.repeat([0, 1, 2], [50, 50, 100])
    sampling = Sampling(rates, parts)
    counts = np.array([sampling.counts(7, epoch) for epoch in range(2000)])
    assert ((counts == np.floor(rates)) | (counts == np.ceil(rates))).all()
    np.testing.assert_allclose(counts.mean(0), rates, atol=0.06)  # 5 standard deviations
    for part in range(3):
        total = rates[parts == part].sum()
        drawn = counts[:, parts == part].sum(1)
        assert set(drawn.tolist()) <= {math.floor(total), math.ceil(total)}
    assert counts.sum(1).min() >= sampling.images_per_epoch == math.floor(rates.sum())
    together = np.corrcoef(counts[:, :50].T) - np.eye(50)
    assert np.abs(together).max() < 0.2
    np.testing.assert_array_equal(sampling.counts(7, 3), counts[3])


def test_thirds_add_up_to_a_whole_number():
    """Catches an epoch that is a batch shorter for a sum of 0.999999."""
    for images in (3, 30, 3003):
        sampling = Sampling(np.full(images, 1 / 3), np.zeros(images, np.int64))
        assert sampling.images_per_epoch == images // 3
        assert all(sampling.counts(0, e).sum() == images // 3 for e in range(50))


def plan_arguments(sizes):
    augment = base_config().data.augment
    augment.update(short_sides=(40, 50, 60), max_long_side=96, crop=0.0)
    common = {"sizes": sizes, "augment": augment, "canvases": CANVASES, "batch_size": 8}
    return common | {"seed": 3}


def test_rates_of_one_give_the_plan_without_sampling():
    """Catches another order or augmentation of a training that repeats nothing."""
    sizes = table(50).sizes
    ones = Sampling(np.ones(50), np.zeros(50, np.int64))
    for epoch in range(3):
        one = plan_epoch(**plan_arguments(sizes), epoch=epoch)
        other = plan_epoch(**plan_arguments(sizes), epoch=epoch, sampling=ones)
        for field in ("indices", "canvas", "repeats"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        for a, b in zip(one.geometry, other.geometry, strict=True):
            np.testing.assert_array_equal(a, b)
        assert not one.repeats.any()


def test_a_plan_follows_the_rates_and_each_repetition_has_its_own_augmentation():
    sizes = table(50).sizes
    rates = np.linspace(0.5, 4.0, 50)
    sampling = Sampling(rates, np.zeros(50, np.int64))
    arguments = plan_arguments(sizes) | {"image_ids": np.arange(50), "sampling": sampling}
    plan = TrainPlan(**arguments)
    assert plan.steps_per_epoch == math.floor(rates.sum()) // 8
    seen = np.zeros(50)
    for epoch in range(400):
        drawn = plan.epoch(epoch)
        assert drawn.indices.shape == (plan.steps_per_epoch, 8)
        keys = set(zip(drawn.indices.ravel().tolist(), drawn.repeats.ravel().tolist(), strict=True))
        assert len(keys) == drawn.indices.size
        seen += np.bincount(drawn.indices.ravel(), minlength=50)
    share = drawn.indices.size / rates.sum()  # of the images, those in full batches
    np.testing.assert_allclose(seen / 400, rates * share, rtol=0.1)
    last = drawn.indices.ravel() == 49  # rate 4: its size is drawn 4 times
    assert len(np.unique(drawn.geometry.size.reshape(-1, 2)[last], axis=0)) > 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two data sets; the second numbers its classes in another way."""
    first = write_coco(tmp_path_factory.mktemp("first"), train=12)
    second = tmp_path_factory.mktemp("second")
    content = document(5, seed=9)
    renumbered = {7: 1, 3: 2, 5: 0}
    content["categories"] = [
        entry | {"id": renumbered[entry["id"]]} for entry in content["categories"]
    ]
    for entry in content["annotations"]:
        entry["category_id"] = renumbered[entry["category_id"]]
    write_split(second / "train.json", second / "train", content, seed=9)
    return first, second


@pytest.fixture
def config(folders):
    config = base_config()
    config.data.update(dir=str(folders[0]), labels="contiguous", max_objects=5, canvases=CANVASES)
    config.data.augment.update(short_sides=(40, 48), max_long_side=64, crop=0.0)
    config.data.augment.update(brightness=0.5, hue=0.2)
    config.data.mix.update(dirs=(str(folders[1]),), shares=(0.4,))
    config.train.batch_size = 4
    return config


def test_mixed_data_sets_have_their_shares_and_the_classes_of_the_first(config, folders):
    """Compares every example with that of the data set opened alone."""
    mixed = open_dataset(config.data, "train")
    assert mixed.parts == (12, 5) and len(mixed) == 17
    assert images_in_epoch(mixed, config) == 20  # 12 are 60% of it
    alone = []
    for folder in folders:
        own = config.data.copy_and_resolve_references()
        own.update(dir=str(folder))
        own.mix.update(dirs=(), shares=())
        alone.append(open_dataset(own, "train"))
    assert mixed.categories == alone[0].categories
    examples = [(dataset, i) for dataset in alone for i in range(len(dataset))]
    for position, (dataset, i) in enumerate(examples):
        got, expected = mixed.source[position], dataset.source[i]
        assert got.image == expected.image and got.image_id == expected.image_id
        np.testing.assert_array_equal(got.boxes, expected.boxes)
        names = [mixed.categories[label].name for label in got.labels]
        assert names == [dataset.categories[label].name for label in expected.labels]
        ids = mixed.annotations.targets_of(position).category_ids.tolist()
        assert ids == [mixed.categories[label].id for label in got.labels]
    assert mixed.annotations.file_names[12].startswith(f"{folders[1]}/")
    per_epoch = [train_plan(mixed, config).epoch(e).indices.ravel() for e in range(40)]
    assert all((indices >= 12).sum() == 8 and indices.size == 20 for indices in per_epoch)
    np.testing.assert_array_equal(
        open_dataset(config.data, "train", images="unread").sizes, mixed.annotations.sizes
    )


def test_shares_hold_beside_repeat_factors():
    data = table(300)
    config = base_config().data
    config.sampling, config.repeat_threshold = "repeat_factor", 0.3
    config.mix.update(dirs=("a", "b"), shares=(0.2, 0.3))
    sampling = sampling_of(data, (100, 150, 50), config)
    sums = np.bincount(sampling.parts, sampling.rates)
    np.testing.assert_allclose(sums / sums.sum(), [0.5, 0.2, 0.3], rtol=1e-12)
    factors = repeat_factors(data, 0.3)
    np.testing.assert_array_equal(sampling.rates[:100], factors[:100])
    ratio = sampling.rates[100:250] / factors[100:250]
    np.testing.assert_allclose(ratio, ratio[0])


def test_any_step_and_any_process_has_the_batch_of_the_undisturbed_run(config):
    """Catches rates or repetitions that depend on what ran before, or on the process."""
    config.data.sampling, config.data.repeat_threshold = "repeat_factor", 1.0
    mixed = open_dataset(config.data, "train")
    steps = train_plan(mixed, config).steps_per_epoch
    whole = list(train_batches(mixed, config, 0, 2 * steps + 1))
    assert any(train_plan(mixed, config).batch(step).repeats.any() for step in range(steps))
    for start in (1, steps - 1, steps + 2):
        with contextlib.closing(train_batches(mixed, config, start, 2)) as resumed:
            for expected, got in zip(whole[start:], resumed, strict=False):
                for key, values in expected.items():
                    np.testing.assert_array_equal(got[key], values, err_msg=key)
    parts = [list(train_batches(mixed, config, 0, steps, p, 2)) for p in range(2)]
    for expected, *shards in zip(whole, *parts, strict=False):
        for key in ("image", "labels", "boxes", "image_id"):
            joined = np.concatenate([shard[key] for shard in shards])
            np.testing.assert_array_equal(joined, expected[key], err_msg=key)


def test_repetitions_of_an_image_have_colors_of_their_own(config):
    """Catches a repeated image that is the same image again."""
    config.data.mix.update(dirs=(), shares=())
    config.data.sampling, config.data.repeat_threshold = "repeat_factor", 1.0
    config.data.augment.update(short_sides=(40,), flip=0.0)
    dataset = open_dataset(config.data, "train")
    steps = train_plan(dataset, config).steps_per_epoch
    seen = {}
    for batch in train_batches(dataset, config, 0, steps):
        for image_id, image in zip(batch["image_id"].tolist(), batch["image"], strict=True):
            seen.setdefault(image_id, []).append(image[:30, :30].tobytes())
    repeated = [images for images in seen.values() if len(images) > 1]
    assert repeated and all(len(set(images)) == len(images) for images in repeated)


def test_classes_that_do_not_match_are_named(config, folders, tmp_path):
    content = copy.deepcopy(document(3))
    content["categories"][1]["name"] = "Cat"
    write_split(tmp_path / "train.json", tmp_path / "train", content)
    config.data.mix.dirs = (str(tmp_path),)
    with pytest.raises(DataError, match=r"the class 'Cat', .*there it is 'cat': use one name"):
        open_dataset(config.data, "train")
    content["categories"][1]["name"] = "wheel"
    write_split(tmp_path / "train.json", tmp_path / "train", content)
    with pytest.raises(DataError, match=rf"{tmp_path} has objects of the class 'wheel'"):
        open_dataset(config.data, "train")
    content["categories"][1]["name"] = "dog"
    write_split(tmp_path / "train.json", tmp_path / "train", content)
    with pytest.raises(DataError, match="'dog' is the name of several classes"):
        open_dataset(config.data, "train")
    config.data.name = "digits_tiny"
    with pytest.raises(DataError, match=r"data\.mix\.dirs needs data\.name='coco'"):
        open_dataset(config.data, "train")


def test_wrong_shares_are_errors(config):
    for shares in ((), (0.5, 0.2), (1.0,), (0,)):
        config.data.mix.shares = shares
        with pytest.raises(ConfigError, match=r"data\.mix\.shares"):
            validate(config)
    config.data.mix.update(dirs=("a", "b"), shares=(0.5, 0.5))
    with pytest.raises(ConfigError, match="together less than 1"):
        validate(config)

"""The path of real data from packing to evaluation, on a sample of COCO 2017 if it is present.

The evaluation must give pycocotools' numbers on the original annotation file to the last digit,
for each format of the annotations.
"""

import contextlib
import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from coco_sample import COCO_SAMPLE, needs_coco_sample
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr_jax.config import base_config
from dn_detr_jax.data import images
from dn_detr_jax.data.coco_classes import COCO_CATEGORIES
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import eval_batches, train_batches
from dn_detr_jax.errors import DataError
from dn_detr_jax.evaluation.coco_ap import CocoEvaluator

pytestmark = needs_coco_sample

ANNOTATIONS = COCO_SAMPLE / "annotations" / "instances_val2017.json"


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


def sample_config(packed_dir, labels="category_ids"):
    config = base_config()
    config.data.update({"dir": str(COCO_SAMPLE), "packed_dir": str(packed_dir), "labels": labels})
    return config


@pytest.fixture(scope="module")
def original():
    return json.loads(ANNOTATIONS.read_text())


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory, original):
    """The validation images in the features of TFDS' `coco/2017`, by a builder as theirs is."""
    from tensorflow_datasets.core import features as f

    class Coco(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.1.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2017")]  # noqa: RUF012

        def _info(self):
            objects = {
                "id": np.int64,
                "area": np.int64,
                "bbox": f.BBoxFeature(),
                "label": f.ClassLabel(num_classes=80),
                "is_crowd": np.bool_,
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=f.FeaturesDict(
                    {
                        "image": f.Image(encoding_format="jpeg"),
                        "image/filename": f.Text(),
                        "image/id": np.int64,
                        "objects": f.Sequence(objects),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            names = [category["name"] for category in original["categories"]]
            self.info.features["objects"]["label"].names = names
            by_id = {category["id"]: category["name"] for category in original["categories"]}
            for image in sorted(original["images"], key=lambda image: image["id"]):
                height, width = image["height"], image["width"]
                objects = []
                for a in original["annotations"]:
                    if a["image_id"] == image["id"]:
                        x, y, w, h = a["bbox"]
                        box = f.BBox(y / height, x / width, (y + h) / height, (x + w) / width)
                        objects.append(
                            {
                                "id": a["id"],
                                "area": int(a["area"]),
                                "bbox": box,
                                "label": by_id[a["category_id"]],
                                "is_crowd": bool(a["iscrowd"]),
                            }
                        )
                path = COCO_SAMPLE / "val2017" / image["file_name"]
                yield (
                    image["file_name"],
                    {
                        "image": io.BytesIO(path.read_bytes()),
                        "image/filename": image["file_name"],
                        "image/id": image["id"],
                        "objects": objects,
                    },
                )

    directory = tmp_path_factory.mktemp("tfds")
    builder = Coco(data_dir=directory, config="2017", file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_dir=directory,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return directory


def by_annotation_id(truth):
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    rows = ({key: a[key] for key in keys} for a in truth["annotations"])
    return sorted(rows, key=lambda a: a["id"])


@pytest.mark.parametrize("labels", ["category_ids", "contiguous"])
def test_ground_truth_is_the_original_to_the_last_digit(packed_dir, original, labels):
    truth = open_dataset(sample_config(packed_dir, labels).data, "validation").coco_ground_truth()
    assert by_annotation_id(truth) == by_annotation_id(original)
    assert truth["categories"] == [
        {"id": category["id"], "name": category["name"]} for category in original["categories"]
    ]


def predictions(kind, original, rng):
    """Returns (image id, category id, bbox, score) of detections."""
    objects = [a for a in original["annotations"] if not a["iscrowd"]]
    if kind == "empty":
        return []
    if kind == "perfect":
        return [(a["image_id"], a["category_id"], a["bbox"], 1.0) for a in objects]
    if kind == "shifted":
        found = []
        for a in objects:
            x, y, w, h = a["bbox"]
            dx, dy = rng.uniform(-0.3, 0.3, 2)
            scale = rng.uniform(0.7, 1.4)
            box = [x + dx * w, y + dy * h, w * scale, h / scale]
            found.append((a["image_id"], a["category_id"], box, float(rng.random())))
        return found
    ids = [category["id"] for category in original["categories"]]
    found = []
    for image in original["images"]:
        for _ in range(60):
            x, y = rng.uniform(0, image["width"]), rng.uniform(0, image["height"])
            box = [x * 0.7, y * 0.7, rng.uniform(5, 200), rng.uniform(5, 200)]
            category = int(rng.choice(ids[:8]))
            found.append((image["id"], category, box, float(rng.random())))
    return found


def reference_stats(detections):
    """Evaluates with pycocotools on the original file, without this package."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(ANNOTATIONS))
        results = [
            {"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in detections
        ]
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": []}
        if results:
            found = truth.loadRes(results)
        else:
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def own_stats(dataset, detections):
    """Evaluates with this package, from normalized boxes as a detector returns them."""
    label_of = {category.id: label for label, category in enumerate(dataset.categories)}
    evaluator = CocoEvaluator(
        dataset.coco_ground_truth(), [category.id for category in dataset.categories]
    )
    for image_id, (height, width) in zip(dataset.image_ids, dataset.sizes.tolist(), strict=True):
        mine = [d for d in detections if d[0] == image_id]
        boxes = np.array([box for _, _, box, _ in mine]).reshape(1, -1, 4)
        boxes[..., :2] += boxes[..., 2:] / 2
        evaluator.add(
            np.array([image_id]),
            np.array([[score for *_, score in mine]]),
            np.array([[label_of[category] for _, category, _, _ in mine]], np.int64),
            boxes / (width, height, width, height),
        )
    assert not evaluator.missing()
    return list(evaluator.metrics().values())


@pytest.mark.parametrize(
    "kind,labels",
    [
        ("perfect", "category_ids"),
        ("shifted", "contiguous"),
        ("random", "category_ids"),
        ("empty", "contiguous"),
    ],
)
def test_evaluation_equals_pycocotools_on_the_original_file(packed_dir, original, kind, labels):
    detections = predictions(kind, original, np.random.default_rng(0))
    expected = reference_stats(detections)
    dataset = open_dataset(sample_config(packed_dir, labels).data, "validation")
    stats = own_stats(dataset, detections)
    assert stats == [
        value if value > -1 else pytest.approx(np.nan, nan_ok=True) for value in expected
    ]
    if kind == "perfect":
        assert stats[0] == 1.0
    else:
        assert stats[0] < 0.9
    if kind in ("shifted", "random"):
        assert stats[1] > 0


def test_tfds_coco_2017_gives_the_numbers_of_the_file_back(tfds_dir, original):
    """Covers TFDS: boxes agree to two decimals (float32 shares), areas are whole numbers."""
    config = base_config().data
    for directory in (tfds_dir, tfds_dir / "coco" / "2017", tfds_dir / "coco" / "2017" / "1.1.0"):
        config.dir = str(directory)
        dataset = open_dataset(config, "validation")
        assert len(dataset) == 86 and len(dataset.categories) == 91
    found, expected = by_annotation_id(dataset.coco_ground_truth()), by_annotation_id(original)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["area"] == int(theirs["area"])
        assert mine | {"area": 0} == theirs | {"area": 0}
    config.labels = "contiguous"
    categories = open_dataset(config, "validation").categories
    assert categories == COCO_CATEGORIES


def test_tfds_records_with_the_original_annotations_evaluate_exactly(tfds_dir, original):
    config = base_config().data
    config.dir = str(tfds_dir)
    config.validation.annotations = str(ANNOTATIONS)
    dataset = open_dataset(config, "validation")
    assert by_annotation_id(dataset.coco_ground_truth()) == by_annotation_id(original)
    detections = predictions("shifted", original, np.random.default_rng(1))
    expected = [value for value in reference_stats(detections) if value > -1]
    assert [value for value in own_stats(dataset, detections) if not np.isnan(value)] == expected
    config.validation.annotations = str(ANNOTATIONS.with_name("instances_train2017.json"))
    with pytest.raises(DataError, match="its 112 images are not the 86 of the records"):
        open_dataset(config, "validation").coco_ground_truth()


def test_both_sources_give_the_same_examples(tfds_dir, packed_dir):
    config = base_config().data
    config.dir = str(tfds_dir)
    records = open_dataset(config, "validation")
    packed = open_dataset(sample_config(packed_dir).data, "validation")
    position = {image_id: i for i, image_id in enumerate(records.image_ids.tolist())}
    for i, image_id in enumerate(packed.image_ids.tolist()):
        mine, theirs = packed.source[i], records.source[position[image_id]]
        assert mine.image == theirs.image and mine.image_id == theirs.image_id
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        np.testing.assert_allclose(mine.boxes, theirs.boxes, rtol=0, atol=1e-4)


def test_every_photograph_is_decoded_at_its_annotated_size(packed_dir):
    for split in ("train", "validation"):
        dataset = open_dataset(sample_config(packed_dir).data, split)
        for i in range(len(dataset)):
            size = tuple(dataset.sizes[i].tolist())
            assert images.decode(dataset.source[i].image, size).shape == (*size, 3)


def test_batches_of_photographs(packed_dir):
    """Catches crowd regions as targets and missing images without objects; small canvases."""
    config = sample_config(packed_dir)
    config.data.update({"canvases": ((128, 128),), "eval_short_side": 96})
    config.data.eval_max_long_side = 128
    config.data.augment.update({"short_sides": (96,), "max_long_side": 128, "crop": 0.0})
    train = open_dataset(config.data, "train")
    seen = {}
    for batch in train_batches(train, config, 0, 7):
        for image_id, valid in zip(batch["image_id"].tolist(), batch["valid"], strict=True):
            seen[image_id] = int(valid.sum())
    assert len(seen) == 112 and sum(count == 0 for count in seen.values()) >= 2
    content = json.loads((COCO_SAMPLE / "annotations/instances_train2017.json").read_text())
    objects = sum(not a["iscrowd"] for a in content["annotations"])
    assert 0.97 * objects < sum(seen.values()) <= objects  # the smallest vanish at this size
    ids = np.concatenate(
        [b["image_id"] for b in eval_batches(open_dataset(config.data, "validation"), config)]
    )
    assert (np.sort(ids[ids >= 0])).size == 86

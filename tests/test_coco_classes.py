"""The table of COCO's classes, against the annotation files of COCO."""

import json

from coco_sample import COCO_SAMPLE, needs_coco_sample

from dn_detr_jax.data.coco_classes import COCO_CATEGORIES, assumed_categories, with_holes


def test_eighty_ids_in_order_and_91_labels():
    """Catches missing or duplicate names, and labels that are off by one."""
    ids = [category.id for category in COCO_CATEGORIES]
    assert len(ids) == 80 and ids == sorted(set(ids))
    unused = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    labels = with_holes(COCO_CATEGORIES)
    assert [category.id for category in labels] == list(range(91))
    assert {category.id for category in labels if not category.name} == unused
    assert len({category.name for category in labels}) == 81
    assert assumed_categories(91) == labels


@needs_coco_sample
def test_names_are_those_of_the_annotation_file():
    for path in sorted((COCO_SAMPLE / "annotations").glob("instances_*.json")):
        listed = json.loads(path.read_text())["categories"]
        assert [(c["id"], c["name"]) for c in listed] == [(c.id, c.name) for c in COCO_CATEGORIES]

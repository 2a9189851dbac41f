"""The config keys of data, plan and augmentation."""

from dn_detr_jax.config import rules
from dn_detr_jax.config.key import Key
from dn_detr_jax.config.rules import (
    BELOW_ONE,
    FLAG,
    PROBABILITY,
    SIZES,
    TEXT,
    duration,
    one_of,
    whole,
)

DATA_KEYS = (
    Key("data.name", "coco", "kind of data set: a name in dn_detr_jax.data.datasets", rules.NAME),
    Key(
        "data.dir",
        "",
        "folder of the data set, or where it is prepared",
        TEXT,
        resume="free",
        machines="free",
    ),
    Key(
        "data.packed_dir",
        "",
        "folder for images packed once; empty: packed/ in data.dir",
        TEXT,
        resume="free",
        machines="free",
    ),
    Key(
        "data.labels",
        "category_ids",
        "classes: the category ids themselves, or contiguous numbers 0, 1, ... in their order",
        one_of("category_ids", "contiguous"),
    ),
    Key(
        "data.skip_bad",
        False,
        "True: unreadable images are replaced and counted; False: they end the run",
        FLAG,
        resume="free",
    ),
    Key(
        "data.exif",
        "auto",
        "pixels that boxes refer to where EXIF turns or mirrors an image: as_shown by viewers or "
        "as_stored; auto: as stored unless the annotated size says otherwise",
        one_of("auto", "as_shown", "as_stored"),
    ),
    Key(
        "data.pixel_range",
        (),
        "(darkest, brightest) value of images of more than 8 bits per channel; empty: by the bits "
        "that each image uses",
        rules.PIXEL_RANGE,
    ),
    Key(
        "data.prepare_split",
        0.0,
        "share of the training images to evaluate on where the data has no validation split; "
        "their names decide which; 0: none",
        BELOW_ONE,
    ),
    Key(
        "data.sampling",
        "uniform",
        "how often an image comes in an epoch: uniform, once; repeat_factor, more often with rare "
        "classes (LVIS)",
        one_of("uniform", "repeat_factor"),
    ),
    Key(
        "data.repeat_threshold",
        0.001,
        "share of the images below which repeat_factor repeats a class",
        PROBABILITY,
    ),
    Key(
        "data.mix.dirs",
        (),
        "folders of further training data, whose classes are matched with those of data.dir by "
        "name",
        rules.TEXTS,
        resume="free",
        machines="free",
    ),
    Key(
        "data.mix.shares",
        (),
        "share of an epoch's images that each folder of data.mix.dirs has; data.dir has the rest",
        rules.numbers(rules.SHARE),
    ),
    Key(
        "data.canvases",
        ((800, 1344), (1344, 800)),
        "canvases (padding buckets): (height, width) in pixels, each compiled once",
        rules.CANVASES,
    ),
    Key(
        "data.snap",
        0.0,
        "share by which an image's scale may change so that the image fills its canvas",
        rules.between(0, 0.5),
    ),
    Key(
        "data.max_objects",
        100,
        "slots for the objects of an image; of more objects a random subset is kept; 0: as many "
        "as the data needs",
        whole(0),
    ),
    Key(
        "data.workers",
        0,
        "processes that read and augment images; 0: threads of the training process",
        whole(0),
        resume="free",
        machines="free",
    ),
    Key(
        "data.threads",
        4,
        "reading threads of each of these processes",
        whole(1),
        resume="free",
        machines="free",
    ),
    Key(
        "data.prefetch",
        4,
        "batches prepared ahead, for each worker",
        whole(1),
        resume="free",
        machines="free",
    ),
    Key("data.augment.flip", 0.5, "probability of a horizontal flip", PROBABILITY),
    Key(
        "data.augment.short_sides",
        tuple(range(480, 801, 32)),
        "short sides of training images in pixels, one drawn for each image",
        SIZES,
    ),
    Key("data.augment.max_long_side", 1333, "limit of the long side in pixels", whole(1)),
    Key("data.augment.crop", 0.5, "probability of resize, random crop, resize", PROBABILITY),
    Key("data.augment.crop_resize", (400, 500, 600), "short sides before the crop", SIZES),
    Key(
        "data.augment.crop_size",
        (384, 600),
        "least and largest side of the crop",
        rules.SIZE_RANGE,
    ),
    *(
        Key(f"data.augment.{name}", 0.0, f"probability of {meaning}", PROBABILITY)
        for name, meaning in (
            ("vertical_flip", "a vertical flip"),
            ("rotate", "a rotation by 90, 180 or 270 degrees"),
            ("zoom_out", "a smaller image on a plain ground, where it is not cropped"),
            ("iou_crop", "a crop around objects, instead of the other crop"),
            ("mosaic", "a mosaic of four images"),
        )
    ),
    Key("data.augment.zoom_out_limit", 4.0, "largest side of that ground", rules.between(1, 10)),
    Key(
        "data.augment.scale",
        (1.0, 1.0),
        "(least, largest) factor of the size, drawn for each image; what exceeds the size without "
        "it is cropped",
        rules.FACTOR_RANGE,
    ),
    *(
        Key(f"data.augment.{name}", 0.0, f"largest change of the {name}, as a share", limit)
        for name, limit in (
            ("brightness", PROBABILITY),
            ("contrast", PROBABILITY),
            ("saturation", PROBABILITY),
            ("hue", rules.between(0, 0.5)),
        )
    ),
    Key(
        "data.augment.hook",
        "",
        "module:function of (image, boxes, labels, rng), called last; empty: none",
        rules.FUNCTION,
    ),
    Key(
        "data.augment.stop_at",
        "100%",
        "when zoom_out, iou_crop, mosaic, scale, changes of color and the hook end: with the next "
        "epoch",
        duration(),
    ),
    Key("data.eval_short_side", 800, "short side of evaluated images in pixels", whole(1)),
    Key("data.eval_max_long_side", 1333, "limit of their long side", whole(1)),
    *(
        Key(f"data.{split}.{part}", "", meaning, TEXT)
        for split in ("train", "validation")
        for part, meaning in (
            (
                "annotations",
                f"annotations of the {split} split, from data.dir: a file of COCO, data.yaml of "
                "YOLO, a list or folder of Pascal VOC; empty: found in the usual layouts",
            ),
            ("images", "folder of its images, relative to data.dir; empty: found likewise"),
        )
    ),
)

"""Classes of objects, and the 80 of COCO with their ids (Lin et al., ECCV 2014).

COCO's category ids are 1 to 90 with ten of them unused. The published DETR models use the ids
themselves as labels, so that they have 91 outputs.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Category:
    """A class of objects: its id in COCO results, and its name."""

    id: int
    name: str


_NAMES = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat,
10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat,
18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack,
28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee, 35 skis, 36 snowboard, 37 sports ball,
38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket,
44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple,
54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair,
63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse,
75 remote, 76 keyboard, 77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink,
82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier,
90 toothbrush
"""

# The 80 categories in the order of their ids, which is also that of the labels of TFDS.
COCO_CATEGORIES = tuple(
    Category(int(number), name)
    for number, name in (entry.split(maxsplit=1) for entry in _NAMES.strip().split(","))
)


def with_holes(categories: tuple[Category, ...]) -> tuple[Category, ...]:
    """One entry for every label where labels are category ids; no name where no id is.

    Examples:
      >>> with_holes((Category(1, "cat"), Category(3, "dog")))[2:]
      (Category(id=2, name=''), Category(id=3, name='dog'))
    """
    names = {category.id: category.name for category in categories}
    return tuple(Category(i, names.get(i, "")) for i in range(max(names, default=-1) + 1))


def assumed_categories(num_classes: int) -> tuple[Category, ...]:
    """The categories of a model that does not come with any: COCO's for 91 labels, else numbers.

    Examples:
      >>> assumed_categories(91)[90]
      Category(id=90, name='toothbrush')
      >>> assumed_categories(2)
      (Category(id=0, name='class 0'), Category(id=1, name='class 1'))
    """
    coco = with_holes(COCO_CATEGORIES)
    if num_classes == len(coco):
        return coco
    return tuple(Category(i, f"class {i}") for i in range(num_classes))

"""Cuts a data set into tiles, for small objects in large images.

    python -m dn_detr_jax cut DIR --out tiles --tile 400
    python -m dn_detr_jax cut DIR --out tiles --tile 400 --config.data.prepare_split=0.2

DIR has a data set in the format of COCO, YOLO or Pascal VOC; `tiles` is then one in the format of
COCO, for `--config.data.dir`. An object belongs to every tile that shows at least the share
`--visible` of its box, with the part of the box inside the tile. In a tile that shows less, that
part is an ignored region (`iscrowd`): it is neither learned nor missed.

`python -m dn_detr_jax predict --tile 400` looks at the same tiles of an image, and merges what it
finds in them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from dn_detr_jax.commands.command_line import define_config_flag, define_path_flag, local_path
from dn_detr_jax.config import base_config, validate
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.training import stop

FLAGS = flags.FLAGS
ARGUMENTS = ("DIR",)
DEFAULT_CONFIG = __file__  # its get_config


def get_config() -> ConfigDict:
    """Returns the config that applies without `--config`."""
    return base_config()


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()
    define_path_flag("out", "Folder to make.", required=True)
    flags.DEFINE_integer("tile", None, "Side of the tiles in pixels.", lower_bound=1)
    flags.DEFINE_float("overlap", 0.2, "Share of a tile's side.", lower_bound=0.0, upper_bound=0.9)
    flags.DEFINE_float(
        "visible", 0.4, "Share of a box, by area, from which on the object is learned."
    )
    flags.mark_flag_as_required("tile")


def main(argv: Sequence[str]) -> None:
    """Cuts the data set and says how many tiles and objects there are."""
    stop.end_on_signals("the tiles were not written", stop.INTERRUPTED)
    config = FLAGS.config
    validate(config)
    if config.data.name != "coco":
        raise ConfigError("data.name", config.data.name, "'coco', the only kind that is cut")
    config.data.dir = os.fspath(local_path(argv[1]))
    from dn_detr_jax.data.cutting import Tiling, cut

    for split in cut(
        config.data, Path(FLAGS.out), Tiling(FLAGS.tile, FLAGS.overlap, FLAGS.visible)
    ):
        tiles = split.tiles
        print(
            f"{split.name}: {split.images} images became {len(tiles.image_ids)} tiles with "
            f"{int(tiles.targets.sum())} objects, at most {int(tiles.counts.max())} in a tile, and "
            f"{int(tiles.crowd.sum())} ignored regions"
        )
    print(f"Wrote {FLAGS.out}")

"""The rows of the config keys, and everything generated from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dn_detr_jax.config import base_config, find_config, load_config, validate, variants
from dn_detr_jax.config.checks import require
from dn_detr_jax.config.key import Key
from dn_detr_jax.config.reference import describe_config
from dn_detr_jax.config.rules import one_of, whole
from dn_detr_jax.config.stored import changed_values, restored_config
from dn_detr_jax.distributed.consistency import agreed_config
from dn_detr_jax.errors import ConfigError, ConfigFileError

_ROOT = Path(__file__).parent.parent
ROWS = list(variants.schema_of("dn_dab_detr").keys.values())


def _stored(**changes):
    """The default config as a run stores it, with other values by dotted key."""
    stored = json.loads(json.dumps(base_config().to_dict()))
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = stored
        for name in sections:
            section = section[name]
        section[last] = value
    return stored


@pytest.mark.parametrize("key", ROWS, ids=lambda key: key.path)
def test_every_key_is_documented_and_its_occasions_fit_together(key):
    """Catches rows without words, and a key that may change on resume but not in an evaluation."""
    assert key.meaning and key.meaning[-1] != "." and "\n" not in key.meaning
    assert key.rule.expected and "\n" not in key.rule.expected
    assert key.rule.problem(key.default) == ""
    assert key.machines == "same" or key.resume == "free"
    assert key.resume == "same" or key.evaluation == "free"


def test_the_document_is_current():
    """Catches changed keys whose document is out of date."""
    command = [sys.executable, "-m", "dn_detr_jax.config.reference"]
    made = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout
    written = (_ROOT / "docs" / "config.md").read_text()
    assert written == made, f"run {' '.join(command[1:])} > docs/config.md"


def test_a_config_is_described_with_its_values():
    """Catches values of the defaults in place of the experiment's."""
    described = describe_config(load_config("finetune"))
    assert all(f"\n{key.path} = " in f"\n{described}" for key in ROWS)
    assert "train.duration = '12 epochs'  (default '50 epochs')\n" in described
    assert "data.dir = ''\n" in described
    assert "`model.num_heads` divides `model.hidden_dim`." in described


# A run that is continued


@pytest.mark.parametrize(
    ("key", "value", "resume", "evaluation"),
    [
        ("seed", 1, False, True),
        ("train__batch_size", 8, False, True),
        ("train__log_every", "1 steps", True, True),
        ("data__threads", 1, True, True),
        ("model__num_heads", 4, False, False),
        ("model__dtype", "bfloat16", False, True),
        ("model__remat", ["encoder"], True, True),
        ("mesh__data", 8, True, True),
    ],
)
def test_what_may_change_of_a_run(key, value, resume, evaluation):
    """Catches a resumed run that trains something else, and an evaluation that is refused."""
    path = key.replace("__", ".")
    default = json.loads(json.dumps({key.path: key.default for key in ROWS}))[path]
    text = [f"{path} was {default!r}, now {value!r}"]
    present = _stored(**{key: value})
    assert changed_values(_stored(), present) == ([] if resume else text)
    assert changed_values(_stored(), present, evaluation=True) == ([] if evaluation else text)


def test_a_run_of_before_a_key_had_its_default():
    """Catches old work directories that are refused, or wrongly accepted as equal."""
    old = _stored()
    del old["dn"]["contrastive"], old["model"]["num_patterns"]
    assert changed_values(old, _stored()) == []
    assert changed_values(old, _stored(dn__contrastive=True)) == [
        "dn.contrastive was False, now True"
    ]
    assert json.loads(json.dumps(restored_config(old).to_dict())) == _stored()


@pytest.mark.parametrize(("hidden_dim", "groups"), [(96, 24), (256, 32), (16, 32)])
def test_a_run_of_before_the_groups_of_level_norms_were_a_key(hidden_dim, groups):
    """Catches old weights that are evaluated, or trained on, with another number of groups."""
    config = base_config("dn_deformable_detr")
    config.model.update(hidden_dim=hidden_dim, level_norm_groups=groups)
    now = json.loads(json.dumps(config.to_dict()))
    old = json.loads(json.dumps(config.to_dict()))
    del old["model"]["level_norm_groups"]
    assert restored_config(old).model.level_norm_groups == groups
    assert changed_values(old, now) == changed_values(old, now, evaluation=True) == []
    now["model"]["level_norm_groups"] = 8
    changed = [f"model.level_norm_groups was {groups}, now 8"]
    assert changed_values(old, now) == changed_values(old, now, evaluation=True) == changed


def test_groups_of_level_norms_divide_the_channels():
    """Catches an error from within the model in place of one that names the key."""
    config = base_config("dn_dino_detr")
    for hidden_dim, groups, problem in (
        (96, 20, r"level_norm_groups = 20: a divisor of model\.hidden_dim = 96"),
        (144, 32, r"hidden_dim = 144: a multiple of 4 below 128, of 32 from there on"),
    ):
        config.model.update(hidden_dim=hidden_dim, level_norm_groups=groups)
        with pytest.raises(ConfigError, match=problem):
            validate(config)


def test_keys_that_are_gone():
    """Catches a model that is built without an option that its parameters were trained with."""
    old = _stored(train__gone=1)
    assert json.loads(json.dumps(restored_config(old).to_dict())) == _stored()
    assert changed_values(old, _stored(), evaluation=True) == []
    assert changed_values(old, _stored()) == ["train.gone was 1, now 'missing'"]
    old = _stored(model__num_head=2)
    with pytest.raises(ConfigError, match=r"model\.num_head = 2: .*did you mean model\.num_heads"):
        restored_config(old)
    assert changed_values(old, _stored(), evaluation=True) == [
        "model.num_head was 2, now 'missing'"
    ]


def test_what_each_machine_may_have_for_itself():
    """Catches processes that refuse to start together, or that train different things."""
    compared = agreed_config(base_config())
    own = {f"config.{key.path}" for key in ROWS} - set(compared)
    assert own == {
        f"config.{key}"
        for key in (
            "compile.cache_dir",
            "data.dir",
            "data.mix.dirs",
            "data.packed_dir",
            "data.prefetch",
            "data.threads",
            "data.workers",
        )
    }
    assert compared["config.model.hidden_dim"] == 256


# Variants


@pytest.fixture
def toy(monkeypatch):
    """A variant with a key of its own, another default, and a rule across keys."""
    monkeypatch.setattr(variants, "_schemas", dict(variants._schemas))

    def check_levels(values):
        """`model.levels` is at most `dn.groups`."""
        require(values, "model.levels", values["model.levels"] <= values["dn.groups"], "fewer")

    keys = (
        Key("model.levels", 4, "levels of features", whole(1), evaluation="same"),
        Key("dn.groups", 100, "denoising groups of the toy", whole(0)),
        Key("matcher.kind", "greedy", "how it matches", one_of("greedy", "optimal")),
    )
    variants.register("greedy_toy", keys, [check_levels])
    return keys


def test_a_variant_has_keys_and_rules_of_its_own(toy):
    """Catches keys of one variant in the config of another."""
    config = base_config("greedy_toy")
    validate(config)
    assert (config.model.name, config.model.levels, config.dn.groups) == ("greedy_toy", 4, 100)
    assert "levels" not in base_config().model and "hidden_dim" not in config.model
    assert config.matcher.kind == "greedy" and config.matcher.cost_class == 2.0
    config.model.levels = 101
    with pytest.raises(ConfigError, match=r"config\.model\.levels = 101: fewer"):
        validate(config)
    described = describe_config(base_config("greedy_toy"))
    assert "dn.groups = 100\n" in described and "`model.levels` is at most" in described


def test_a_key_of_another_variant_is_said_to_be_one(toy):
    """Catches "no such key" for a key that the reference lists."""
    config = base_config()
    config.model.levels = 3
    expected = r"model\.levels = 3: a key of the model greedy_toy; dn_dab_detr has none"
    with pytest.raises(ConfigError, match=expected):
        validate(config)
    config = base_config()
    config.model.name = "greedy_toy"
    with pytest.raises(ConfigError, match=r"a key of the model dn_dab_detr; greedy_toy has none"):
        validate(config)
    assert "model.name was 'dn_dab_detr', now 'greedy_toy'" in changed_values(
        _stored(), json.loads(json.dumps(base_config("greedy_toy").to_dict()))
    )


def test_a_name_belongs_to_one_variant(toy):
    """Catches a variant that silently takes the place of another one; a second import does not."""
    variants.register("greedy_toy", toy)
    with pytest.raises(ValueError, match=r"'greedy_toy'.* registered with other keys"):
        variants.register("greedy_toy", toy[:1])
    with pytest.raises(ValueError, match="two keys with the same path"):
        variants.register("twice", (toy[0], toy[0]))


def test_an_unknown_variant_is_named_with_those_that_are_known():
    """Catches a KeyError, and a user who forgot to import the module of a variant."""
    with pytest.raises(ConfigError, match=r"model\.name = 'dino': unknown; known: dn_dab_detr"):
        base_config("dino")
    config = base_config()
    config.model.name = "dino"
    with pytest.raises(ConfigError, match=r"model\.name = 'dino'"):
        validate(config)


# Experiments by name


def test_an_experiment_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    """Catches names that work only in the root of a clone, and a name that hides a file."""
    monkeypatch.chdir(tmp_path)
    assert find_config("coco_r50") == _ROOT / "configs" / "coco_r50.py"
    (tmp_path / "coco_r50").write_text("")
    assert find_config("coco_r50") == Path("coco_r50")
    (tmp_path / "mine.py").write_text(
        "from dn_detr_jax.config import load_config\n"
        "def get_config():\n"
        "    config = load_config('digits')\n"
        "    config.seed = 7\n"
        "    return config\n"
    )
    config = load_config(str(tmp_path / "mine.py"))
    assert (config.seed, config.data.name) == (7, "digits")
    for missing in "coco_r51", "missing.py", "":
        with pytest.raises(ConfigFileError, match=r"no such file, and no experiment.*finetune"):
            find_config(missing)


@pytest.mark.parametrize("path", sorted((_ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_the_experiments_are_valid(path):
    """Catches an experiment that does not fit changed keys."""
    validate(load_config(path.stem))


def test_a_wheel_has_the_experiments(tmp_path):
    """Catches an installed package that can't name its experiments, or lacks a folder."""
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
    source, installed = tmp_path / "source", tmp_path / "installed"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=_ROOT, **_TEXT)
    for name in listed.stdout.splitlines():
        if name.split("/")[0] not in ("tests", "benchmarks", "docs") and (_ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((_ROOT / name).read_bytes())
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, **_TEXT)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, installed], **_TEXT)
    files = [name for name in listed.stdout.splitlines() if name.startswith("dn_detr_jax/")]
    assert "dn_detr_jax/py.typed" in files
    assert not [name for name in files if not (installed / name).is_file()]
    assert not (installed / "configs").exists()
    program = (
        "from dn_detr_jax.config import find_config, load_config\n"
        "print(find_config('digits'), load_config('coco_r50_12ep').model.num_patterns)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        **_TEXT,
    )
    assert done.stdout.split() == [str(installed / "dn_detr_jax" / "configs" / "digits.py"), "3"]


_TEXT = {"check": True, "capture_output": True, "text": True}

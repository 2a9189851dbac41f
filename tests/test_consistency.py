"""Two processes together: their rows, the matching, and what they gather and compare."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from dn_detr_jax.errors import ConfigError
from dn_detr_jax.matching import solve_on_host
from dn_detr_jax.sharding import make_mesh

# Runs as one of two processes with two devices each. Writes its results as JSON.
_SCRIPT = """
import json, sys
from pathlib import Path
import jax, numpy as np
from dn_detr_jax import matching
from dn_detr_jax.distributed import consistency
from dn_detr_jax.distributed import launch
from dn_detr_jax.errors import DistributedError
from dn_detr_jax.data.plan import process_rows
from dn_detr_jax.errors import DistributedError
from dn_detr_jax.sharding import make_mesh, put_batch
from dn_detr_jax.evaluation.detect import jit_match

address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
facts = {"solved": []}
solve = matching.solve_on_host

def record(cost, valid):
    cost = np.asarray(cost)
    facts["solved"].append(cost[:, 0, 0, 0].astype(int).tolist())
    return solve(cost, valid)

def error(function, *arguments):
    try:
        function(*arguments)
        return ""
    except DistributedError as error:
        return str(error)

with launch.process_group(launch.ProcessInfo(address, 2, index)):
    consistency._SHARED_SECONDS = 0.5
    mesh = make_mesh()
    facts["processes"] = [d.process_index for d in mesh.devices.flat]
    facts["two"] = [d.process_index for d in make_mesh(2).devices.flat]
    cost = np.random.default_rng(0).normal(size=(8, 1, 5, 3)).astype(np.float32)
    cost[:, 0, 0, 0] = 10 + np.arange(8)  # says whose row it is
    batch = {"cost": cost, "valid": np.ones((8, 3), bool)}
    rows = process_rows(8, index, 2)
    put = put_batch({name: values[rows] for name, values in batch.items()}, mesh)
    facts["rows"] = sorted(int(s.data[0, 0, 0, 0]) for s in put["cost"].addressable_shards)
    matching.solve_on_host = record
    facts["assignment"] = np.asarray(jit_match(mesh)(put["cost"], put["valid"])).tolist()
    facts["gathered"] = consistency.all_gather(np.array([0.1, 1e300]) + index).tolist()
    facts["same"] = error(consistency.check_agreement, {"a": 1, "b": (2, "x")})
    facts["value"] = error(consistency.check_agreement, {"a": 1, "config.seed": index})
    facts["names"] = error(consistency.check_agreement, {"a": 1, f"new{index}": 0})
    facts["shared"] = error(consistency.check_shared, folder / "shared")
    facts["apart"] = error(consistency.check_shared, folder / f"machine{index}")
    facts["left"] = [str(p.relative_to(folder)) for p in folder.rglob("processes*")]
    (folder / f"{index}.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Returns the results of the two processes."""
    folder = tmp_path_factory.mktemp("together")
    with socket.create_server(("", 0)) as listening:
        address = f"localhost:{listening.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", _SCRIPT, address]
    processes = [
        subprocess.Popen([*command, str(i), str(folder)], env=env, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr.decode()
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


def test_rows_that_a_process_reads_are_those_of_its_devices(facts):
    """Catches rows that change places: other noise for every image than with one process."""
    assert [f["processes"] for f in facts] == [[0, 0, 1, 1]] * 2
    assert [f["rows"] for f in facts] == [[10, 12], [14, 16]]
    assert [f["two"] for f in facts] == [[0, 1]] * 2


def test_each_device_solves_its_own_rows_where_it_is(facts):
    """Catches costs that are gathered on one device, or on one machine."""
    assert sorted(facts[0]["solved"]) == [[10, 11], [12, 13]]
    assert sorted(facts[1]["solved"]) == [[14, 15], [16, 17]]
    cost = np.random.default_rng(0).normal(size=(8, 1, 5, 3)).astype(np.float32)
    cost[:, 0, 0, 0] = 10 + np.arange(8)
    expected = solve_on_host(cost, np.ones((8, 3), bool)).tolist()
    assert facts[0]["assignment"] == facts[1]["assignment"] == expected


def test_numbers_are_gathered_to_their_last_digit(facts):
    """Catches float64 that is sent as float32, which changes an AP."""
    expected = [[0.1, 1e300], [1.1, 1e300]]
    assert facts[0]["gathered"] == facts[1]["gathered"] == expected


def test_the_first_difference_is_named_in_every_process(facts):
    for index, found in enumerate(facts):
        assert found["same"] == ""
        assert found["value"].startswith(f"config.seed = '{index}': not the same in process 0 and")
        assert found["names"].startswith("the version of this program: not the same")


def test_a_folder_that_is_not_shared_is_noticed(facts):
    """Catches checkpoints that are split over machines."""
    for found in facts:
        assert found["shared"] == ""
        assert "machine" in found["apart"] and "process 1 does not see" in found["apart"]
    assert facts[0]["left"] == []


@dataclasses.dataclass(frozen=True)
class _Device:
    id: int
    process_index: int
    platform: str = "cpu"


def _devices(*counts):
    """Returns `counts` devices of each process; their ids alternate between processes."""
    each = [[(i, process) for i in range(count)] for process, count in enumerate(counts)]
    turns = sorted(pair for pairs in each for pair in pairs)
    return [_Device(number, process) for number, (_, process) in enumerate(turns)]


@pytest.mark.parametrize(
    ("wanted", "processes"), [(-1, [0, 0, 1, 1, 2, 2]), (6, [0, 0, 1, 1, 2, 2]), (3, [0, 1, 2])]
)
def test_the_mesh_goes_by_processes(wanted, processes):
    """Catches the order of jax's devices, which can differ from that of the rows."""
    devices = _devices(2, 2, 2)
    assert [d.process_index for d in devices] == [0, 1, 2, 0, 1, 2]
    assert [d.process_index for d in make_mesh(wanted, devices).devices.flat] == processes


@pytest.mark.parametrize(
    ("counts", "wanted", "words"),
    [
        ((2, 2), 3, r"mesh\.data = 3: .* each of 2 processes; one of them has 2: a multiple of 2"),
        ((4, 4), 9, r"mesh\.data = 9: 1 to 8"),
        ((4, 2), -1, r"mesh\.data = -1: .* one of them has 2: .* at most 4"),
        ((4, 2), 6, r"mesh\.data = 6: .* one of them has 2: .* at most 4"),
        ((1, 1, 1), 2, r"mesh\.data = 2: .* each of 3 processes"),
    ],
)
def test_devices_that_are_not_spread_evenly_are_an_error(counts, wanted, words):
    """Catches processes without a device, and rows that do not divide as the devices do."""
    with pytest.raises(ConfigError, match=words):
        make_mesh(wanted, _devices(*counts))

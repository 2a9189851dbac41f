"""The index and count of processes come from flags or the environment, or are an error."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dn_detr_jax.distributed.launch import (
    ProcessInfo,
    find_process_info,
)
from dn_detr_jax.errors import DistributedError

_ROOT = Path(__file__).parent.parent
_VARIABLES = ("SLURM_", "OMPI_", "PMI_", "JAX_COORDINATOR", "JAX_LOCAL", "WORLD_SIZE", "RANK")
_SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "node[003-004],other7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
_OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
_OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the only cluster variables of an environment."""
    for name in list(os.environ):
        if name.startswith(_VARIABLES) or name == "KUBERNETES_SERVICE_HOST":
            monkeypatch.delenv(name)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_alone_where_nothing_says_otherwise(environment):
    """Catches a start of `jax.distributed` for a single process."""
    assert find_process_info() is None


def test_flags_are_enough(environment):
    found = find_process_info("auto", "10.0.0.1:8476", 2, 1)
    assert found == ProcessInfo("10.0.0.1:8476", 2, 1)
    assert find_process_info("auto", "[fe80::1]:8476", 2, 0).address == "[fe80::1]:8476"


def test_one_process_of_one_is_alone(environment):
    """Catches JAX's default for a Slurm task, one GPU of a machine with several."""
    assert find_process_info("auto", "10.0.0.1:8476", 1, 0) is None
    environment(_SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert find_process_info() is None


def test_slurm(environment):
    environment(_SLURM)
    found = find_process_info()
    host, port = found.address.split(":")
    assert (host, found.count, found.index) == ("node003", 16, 9)
    assert 1024 < int(port) < 2**16
    assert found.local_device_ids == (1,)
    assert find_process_info("off") is None
    assert find_process_info("on") == found
    assert find_process_info("auto", "10.0.0.1:8476").address == "10.0.0.1:8476"


def test_all_devices_of_a_machine_for_one_task(environment):
    """Catches an argument that overrides JAX_LOCAL_DEVICE_IDS, which JAX reads."""
    environment(_SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3"})
    assert find_process_info().local_device_ids is None


def test_open_mpi(environment):
    environment(_OPEN_MPI_4)
    found = find_process_info()
    assert found.address.startswith("10.96.0.1:")
    assert (found.count, found.index) == (4, 2)


def test_a_launcher_that_jax_does_not_know_is_no_license_to_train_alone(environment):
    """Catches a separate training for each process, all in one work directory."""
    environment(_OPEN_MPI_5)
    with pytest.raises(DistributedError, match=r"OMPI_COMM_WORLD_SIZE=4.*--coordinator_address"):
        find_process_info()
    assert find_process_info("auto", "head:8476") == ProcessInfo("head:8476", 4, 2)
    assert find_process_info("off") is None
    environment({"JAX_COORDINATOR_ADDRESS": "head:1234"})
    assert find_process_info() == ProcessInfo("head:1234", 4, 2)


@pytest.mark.parametrize("gone", ["module", "class", "method", "arguments"])
def test_a_jax_that_can_not_be_asked_leaves_flags_and_launchers(gone, environment, monkeypatch):
    """Catches a failure of a single process if jax's private detection is missing."""
    private = "jax._src.clusters"
    if gone == "module":
        monkeypatch.setitem(sys.modules, private, None)
    elif gone == "class":
        monkeypatch.delattr(f"{private}.ClusterEnv")
    else:
        method = f"{private}.ClusterEnv.auto_detect_unset_distributed_params"
        monkeypatch.delattr(method)
        if gone == "arguments":
            monkeypatch.setattr(method, lambda new: None, raising=False)
    assert find_process_info() is None
    assert find_process_info("auto", "a:1", 2, 1) == ProcessInfo("a:1", 2, 1)
    environment(_SLURM | {"SLURM_STEP_NUM_TASKS": "16"})
    with pytest.raises(DistributedError, match=r"SLURM_STEP_NUM_TASKS=16.*--coordinator_address"):
        find_process_info()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("off", "a:1", None, None), "--distributed=off and --coordinator_address=a:1"),
        (("off", None, None, 0), "--distributed=off and --process_id=0"),
        (("on", None, None, None), "--distributed=on: .* --coordinator_address"),
        (("auto", "a:1", None, None), "--num_processes and --process_id missing"),
        (("auto", "a:1", 2, None), "--process_id missing: given are coordinator_address=a:1"),
        (("auto", None, 2, 0), "--coordinator_address missing"),
        (("auto", "a:1", 2, 2), "--process_id=2: expected 0 to 1"),
        (("auto", "a:1", 2, -1), "--process_id=-1: expected 0 to 1"),
        (("auto", "a:1", 0, 0), "--num_processes=0: expected at least 1"),
        (("auto", "a", 2, 0), "--coordinator_address=a: expected HOST:PORT"),
        (("auto", "a:99999", 2, 0), "--coordinator_address=a:99999: expected HOST:PORT"),
        (("auto", "http://a:80", 2, 0), "--coordinator_address=http://a:80: expected HOST:PORT"),
    ],
)
def test_flags_that_can_not_be_right(arguments, words, environment):
    with pytest.raises(DistributedError, match=words):
        find_process_info(*arguments)


def test_an_environment_that_names_no_address_is_incomplete(environment):
    environment({"JAX_COORDINATOR_ADDRESS": "head:1234"})
    with pytest.raises(DistributedError, match="--num_processes and --process_id missing"):
        find_process_info()


def test_wrong_flags_end_train_py_with_one_line(tmp_path, environment):
    """Catches errors after JAX has been started, and in the work directory."""
    command = [sys.executable, str(_ROOT / "train.py"), "--config=configs/digits.py"]
    command += [f"--workdir={tmp_path / 'run'}", "--num_processes=2"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --coordinator_address and --process_id missing")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_ends_train_py_with_one_line(tmp_path, environment):
    """Catches a long wait, and JAX's own stack trace, which names no address."""
    with socket.create_server(("", 0)) as listening:
        address = f"localhost:{listening.getsockname()[1]}"
    command = [sys.executable, str(_ROOT / "train.py"), "--config=configs/digits.py"]
    command += [f"--workdir={tmp_path / 'run'}", "--num_processes=2", "--process_id=1"]
    command += [f"--coordinator_address={address}", "--start_timeout=1"]
    done = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: process 1: process 0 can't be reached at {address}")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


_SCRIPT = """
import sys, time
from dn_detr_jax.distributed import consistency
from dn_detr_jax.distributed import launch

index, address, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
with launch.process_group(launch.ProcessInfo(address, 2, index)):
    consistency.barrier("start")
    print("started", flush=True)
    consistency.barrier("said so")
    if what == "error" and index == 1:
        raise OSError("image 17\\ncan't be read")
    if index == 0:
        time.sleep(1000)
    consistency.barrier("never reached")
"""


def _two(what):
    """Starts two processes; the second one waits for the first, or fails."""
    with socket.create_server(("", 0)) as listening:
        address = f"localhost:{listening.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", _SCRIPT, str(i), address, what], env=env, **pipes)
        for i in range(2)
    ]
    for process in processes:
        while "started" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
    return processes


def test_the_error_of_one_is_the_last_line_of_all():
    """Catches a process that waits forever, here in a sleep, for a failed one."""
    processes = _two("error")
    errors = [process.communicate(timeout=60)[1].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert errors[1] == "error: process 1: image 17 can't be read"
    assert errors[0] == "error: process 0: process 1 has ended: image 17 can't be read"


def test_the_end_of_the_coordinator_is_noticed():
    """Catches a missing message; JAX may report the failure first with its own message."""
    first, second = _two("killed")
    killed = time.monotonic()
    first.kill()
    stderr = second.communicate(timeout=60)[1]
    assert time.monotonic() - killed < 30
    if second.returncode == 1:
        assert "process 0 has ended unexpectedly" in stderr.splitlines()[-1]
    else:
        assert second.returncode < 0 and "the JAX distributed service detected" in stderr
    first.communicate()

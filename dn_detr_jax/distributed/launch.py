"""Starts one training in several processes: a TPU pod, a GPU cluster, or shells of one machine.

Every process runs the same command. Flags say which process it is,

    python train.py ... --coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=0
    python train.py ... --coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=1

or the environment does: under `srun` and `mpirun`, on TPU pods and in Kubernetes jobs the same
command works without these flags (`jax.distributed.initialize` lists the clusters that JAX knows).
If the environment reports several processes but no coordinator address, startup fails: each process
would train alone into the same work directory. `--distributed=off` allows that. See
docs/clusters.md.
"""

import contextlib
import dataclasses
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from dn_detr_jax.distributed.peers import (
    VANISHED,
    Peers,
    connect,
)
from dn_detr_jax.errors import DistributedError, Error, one_line

# Environment variables with number and index of the processes: of srun, Open MPI, MPICH and its
# relatives, and PyTorch.
_LAUNCHERS = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("WORLD_SIZE", "RANK"),
)
_NEWS_SECONDS = 3.0  # until an error is taken for the cause itself


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Address, number and index of this process in a run of several.

    Attributes:
      address: "host:port" at which process 0 listens.
      count: number of processes, at least 2.
      index: of this process.
      local_device_ids: GPUs of this machine to use; None: all, or those of JAX_LOCAL_DEVICE_IDS.
    """

    address: str
    count: int
    index: int
    local_device_ids: tuple[int, ...] | None = None


def define_flags() -> None:
    """Defines the flags of `find_process_info` and `process_group`."""
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "auto: several processes if the flags below or the environment (Slurm, Open MPI, TPU "
        "pods, Kubernetes) say so; on: an error if they do not; off: this process trains alone.",
    )
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, the same for all.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
    flags.DEFINE_integer(
        "start_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "Seconds of silence after which a process without closed connections (no power, no "
        "network) counts as lost, which ends the run.",
        lower_bound=10,
    )


def find_process_info(
    mode: str = "auto",
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    seconds: int = 300,
) -> ProcessInfo | None:
    """Reads from flags and the environment whether this process is one of several.

    Args:
      mode: --distributed.
      address: --coordinator_address.
      count: --num_processes.
      index: --process_id.
      seconds: timeout for a cluster's name service.

    Returns:
      None if this process is alone.

    Raises:
      DistributedError: the flags contradict each other, or a value is missing.
    """
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    given = {flag: value for flag, value in given.items() if value is not None}
    _check_flags(mode, given)
    if mode == "off":
        return None
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    address, count, index, devices = _detected(address, count, index, seconds)
    launcher = ""
    for size, rank in _LAUNCHERS:
        values = os.environ.get(size, ""), os.environ.get(rank, "")
        if all(value.isdecimal() for value in values) and int(values[0]) > 1:
            launcher = size
            count = int(values[0]) if count is None else count
            index = int(values[1]) if index is None else index
            break
    found = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [f"--{flag}" for flag, value in found.items() if value is None]
    if len(missing) == len(found):
        if mode == "on":
            raise DistributedError(
                "--distributed=on: the environment names no cluster known to JAX; give "
                "--coordinator_address=HOST:PORT, --num_processes and --process_id"
            )
        return None
    if count == 1:
        return None
    if missing and launcher and not given:
        raise DistributedError(
            f"{launcher}={os.environ[launcher]}: one of several processes, and JAX finds no "
            "coordinator address: add --coordinator_address=HOST:PORT with the host of process 0, "
            "or --distributed=off to train alone in each"
        )
    if missing:
        raise DistributedError(
            f"{' and '.join(missing)} missing: given are "
            f"{', '.join(f'{flag}={value}' for flag, value in found.items() if value is not None)}"
            ", and the environment does not have the rest"
        )
    assert address is not None and count is not None and index is not None
    if not 0 <= index < count:
        raise DistributedError(f"--process_id={index}: expected 0 to {count - 1}")
    return ProcessInfo(address, count, index, devices)


def _check_flags(mode: str, given: Mapping[str, Any]) -> None:
    """Raises for flags that are wrong in any environment."""
    if mode == "off" and given:
        flag, value = next(iter(given.items()))
        raise DistributedError(f"--distributed=off and --{flag}={value}: leave one of them out")
    address = given.get("coordinator_address")
    if address is not None and not _is_address(address):
        raise DistributedError(
            f"--coordinator_address={address}: expected HOST:PORT, the host of process 0 and a "
            "free port there, for example 10.0.0.1:8476"
        )
    count, index = given.get("num_processes"), given.get("process_id")
    if count is not None and count < 1:
        raise DistributedError(f"--num_processes={count}: expected at least 1")
    if index is not None and not 0 <= index < (count or index + 1):
        expected = f"0 to {count - 1}" if count else "0 or more"
        raise DistributedError(f"--process_id={index}: expected {expected}")


def _is_address(address: str) -> bool:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:\[\]]+):(\d+)", address)
    return match is not None and 0 < int(match[2]) < 2**16


def _detected(
    address: str | None, count: int | None, index: int | None, seconds: int
) -> tuple[str | None, int | None, int | None, tuple[int, ...] | None]:
    """Detects the values that are still None, as `jax.distributed.initialize` does.

    That function can't detect without starting, and must not start for a single process: it would
    leave one of eight GPUs.
    """
    try:
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        inspect.signature(detect).bind(address, count, index, None, None, seconds)
    except (
        ImportError,
        AttributeError,
        TypeError,
    ):  # another version of JAX
        return address, count, index, None
    try:
        address, count, index, devices = detect(address, count, index, None, None, seconds)
    except Exception as error:  # of the network, a name service or the interface of a cluster
        if None not in (address, count, index):
            return address, count, index, None
        raise DistributedError(
            f"the environment of the cluster can't be read ({type(error).__name__}: {error}); give "
            "--coordinator_address, --num_processes and --process_id, or --distributed=off"
        ) from error
    if devices is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return address, count, index, None
    return address, count, index, tuple(devices)


_peers: Peers | None = None  # set by `process_group` while this process is one of several


@contextlib.contextmanager
def process_group(
    process: ProcessInfo | None,
    start_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> Iterator[None]:
    """Connects to the other processes, starts `jax.distributed`, and ends together with them.

    If a process ends before its work is done, all others end at once, with exit status 1 and a line
    that names the process and the cause. An error inside the block has the same effect.

    Args:
      process: this process; None: it is alone, and nothing happens.
      start_timeout: seconds to wait for the others.
      heartbeat_timeout: seconds of silence after which JAX counts a process as lost.

    Raises:
      DistributedError: not all processes connected in time, or they do not fit together.
    """
    global _peers
    if process is None:
        yield
        return
    import jax  # wrong flags are reported without it

    from dn_detr_jax.distributed.consistency import barrier

    try:
        _peers = connect(process.address, process.count, process.index, start_timeout)
    except DistributedError as error:
        raise DistributedError(f"process {process.index}: {error}") from error
    _peers.watch(_end_without_them)
    try:
        jax.distributed.initialize(
            process.address,
            process.count,
            process.index,
            local_device_ids=process.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
        yield
        barrier("finished")
    except BaseException as error:
        _end_with_error(error)
    _peers.leave()


def _end_with_error(error: BaseException) -> None:
    """Ends this process and, through the connections, all others."""
    assert _peers is not None
    expected = isinstance(error, (Error, OSError))
    if not expected or error.__cause__ is not None:
        # A lost process may be the cause. The message about it says more, and ends this process.
        time.sleep(_NEWS_SECONDS)
    line = one_line(error)
    if not expected:
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {line}"
    _peers.leave(line[:1000])
    _end(f"error: process {_peers.index}: {line}")


def _end_without_them(lost: str) -> None:
    """Ends this process from another thread: the main one may wait for a device forever."""
    assert _peers is not None
    advice = "; start all processes again, with the same command, to continue"
    _end(f"error: process {_peers.index}: {lost}{advice if VANISHED in lost else ''}")


def _end(message: str) -> None:
    sys.stdout.flush()
    # One write keeps the lines of several processes apart.
    os.write(2, f"{message}\n".encode())
    os._exit(1)  # JAX's own shutdown would wait for the others

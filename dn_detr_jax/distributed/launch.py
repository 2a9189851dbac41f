"""Several processes that train one detector: a TPU pod, a GPU cluster, or shells of one machine.

Every process runs the same command. Who they are comes from flags,

    python train.py ... --coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=0
    python train.py ... --coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=1

or from where they run: under `srun` and `mpirun`, on TPU pods and in Kubernetes jobs the same
command without these flags will do (`jax.distributed.initialize` names what JAX knows). Where the
environment says that there are several processes, but not where to meet, starting is an error: they
would all train on their own, into the same work directory. `--distributed=off` is for those who
want that. docs/clusters.md is about the rest.
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
    call_roll,
)
from dn_detr_jax.errors import DistributedError, Error, one_line

# Number and index of the processes, where launchers say them: srun, Open MPI, MPICH and its
# relatives, PyTorch's.
_LAUNCHERS = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("WORLD_SIZE", "RANK"),
)
_NEWS_SECONDS = 3.0  # until an error is taken for what is wrong itself


@dataclasses.dataclass(frozen=True)
class Membership:
    """The place of this process among several.

    Attributes:
      address: "host:port" where process 0 listens.
      count: number of processes, at least 2.
      index: of this process.
      local_device_ids: GPUs of this machine to use; None: all, or those of JAX_LOCAL_DEVICE_IDS.
    """

    address: str
    count: int
    index: int
    local_device_ids: tuple[int, ...] | None = None


def define_flags() -> None:
    """Defines the flags of `find_membership` and `working_together`."""
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "Several processes: as the flags below or the environment (Slurm, Open MPI, TPU pods, "
        "Kubernetes) say; on: it is an error if they say nothing; off: this one trains alone.",
    )
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for all the same.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer(
        "start_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "Seconds of silence after which a process that has not even closed its connections "
        "(no power, no network) is given up, and with it the run.",
        lower_bound=10,
    )


def find_membership(
    mode: str = "auto",
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    seconds: int = 300,
) -> Membership | None:
    """Finds out from flags and the environment whether this process is one of several.

    Args:
      mode: --distributed.
      address: --coordinator_address.
      count: --num_processes.
      index: --process_id.
      seconds: how long to wait for a cluster's name service.

    Returns:
      This process's place, or None if it is alone.

    Raises:
      DistributedError: the flags contradict each other, or something is missing.
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
                "--distributed=on: the environment names no cluster that JAX knows; give "
                "--coordinator_address=HOST:PORT, --num_processes and --process_id"
            )
        return None
    if count == 1:
        return None
    if missing and launcher and not given:
        raise DistributedError(
            f"{launcher}={os.environ[launcher]}: one of several processes, and JAX does not find "
            "out where they meet: add --coordinator_address=HOST:PORT with the host of process 0, "
            "or --distributed=off if each is to train alone"
        )
    if missing:
        raise DistributedError(
            f"{' and '.join(missing)} missing: given are "
            f"{', '.join(f'{flag}={value}' for flag, value in found.items() if value is not None)}"
            ", and the environment does not say the rest"
        )
    assert address is not None and count is not None and index is not None
    if not 0 <= index < count:
        raise DistributedError(f"--process_id={index}: expected 0 to {count - 1}")
    return Membership(address, count, index, devices)


def _check_flags(mode: str, given: Mapping[str, Any]) -> None:
    """Raises for flags that can't be right wherever this runs."""
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
    """What JAX finds out about what is still None, as it does in `jax.distributed.initialize`.

    That function can't be asked without being started; with one process it must not be: of eight
    GPUs it would leave one.
    """
    try:
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        inspect.signature(detect).bind(address, count, index, None, None, seconds)
    except (ImportError, AttributeError, TypeError):  # another JAX: flags and launchers are left
        return address, count, index, None
    try:
        address, count, index, devices = detect(address, count, index, None, None, seconds)
    except Exception as error:  # of network, name service or a cluster's interface
        if None not in (address, count, index):
            return address, count, index, None
        raise DistributedError(
            f"the cluster's environment can't be made out ({type(error).__name__}: {error}); give "
            "--coordinator_address, --num_processes and --process_id, or --distributed=off"
        ) from error
    if devices is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return address, count, index, None
    return address, count, index, tuple(devices)


_peers: Peers | None = None  # while this process is one of several, started by `working_together`


@contextlib.contextmanager
def working_together(
    membership: Membership | None,
    start_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> Iterator[None]:
    """Waits for the other processes, starts `jax.distributed`, and ends only with them.

    When one of them ends before its work is done, this process ends too, at once, with exit status
    1 and a line that says which and why: none could go on without the others. An error inside has
    the same effect on all.

    Args:
      membership: of this process; None: it is alone, and nothing happens.
      start_timeout: seconds to wait for the others.
      heartbeat_timeout: seconds after which JAX gives up a process that is silent.

    Raises:
      DistributedError: not all are there in time, or they do not fit together.
    """
    global _peers
    if membership is None:
        yield
        return
    import jax  # not for wrong flags

    from dn_detr_jax.distributed.consistency import barrier

    me = membership
    try:
        _peers = call_roll(me.address, me.count, me.index, start_timeout)
    except DistributedError as error:
        raise DistributedError(f"process {me.index}: {error}") from error
    _peers.watch(_end_without_them)
    try:
        jax.distributed.initialize(
            me.address,
            me.count,
            me.index,
            local_device_ids=me.local_device_ids,
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
    """Ends this process and, through what they watch, all others."""
    assert _peers is not None
    expected = isinstance(error, (Error, OSError))
    if not expected or error.__cause__ is not None:
        # It may come from a lost process. The news of that says more, and ends this process.
        time.sleep(_NEWS_SECONDS)
    line = one_line(error)
    if not expected:
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {line}"
    _peers.leave(line[:1000])
    _end(f"error: process {_peers.index}: {line}")


def _end_without_them(lost: str) -> None:
    """Called in a thread of its own: the main one may be waiting for a device, for ever."""
    assert _peers is not None
    advice = "; start all processes again, with the same command, to continue"
    _end(f"error: process {_peers.index}: {lost}{advice if VANISHED in lost else ''}")


def _end(message: str) -> None:
    sys.stdout.flush()
    # One write, so that lines of several processes stay lines.
    os.write(2, f"{message}\n".encode())
    os._exit(1)  # without JAX' own end, which waits for the others

"""One code path from a CPU to a pod: a mesh of all devices, the batch spread over it, parameters copied or spread.

Arrays are global: a step compiled for a mesh computes what one device would, and XLA inserts the communication. With
several processes each feeds its own rows of a batch.
"""

import dataclasses
import os
import urllib.request
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from percepiano_ast.config import InputError, RunFailed

DATA = "data"  # name of the mesh axis

# How a user describes the processes himself; JAX reads the first, the numbers are handed on to it here.
_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Launchers that JAX knows: a variable that stands only in what they launched -> the variable with the number of tasks.
_LAUNCHERS = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
# The hosts of a TPU slice, where the environment names them (GKE, Colab).
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_METADATA_SECONDS = 5.0


def environment_is_distributed() -> bool:
    """Whether the environment says that this process is one of several.

    It says so in JAX's own variables, in those of a launcher (``srun`` of SLURM, ``mpirun`` of Open MPI), or because
    the TPU slice has several hosts, which on Google Cloud only the machine's metadata tell. ``jax.distributed`` looks
    in the same places; but it would also gather the one process of a lone TPU host or of a SLURM shell.

    Raises:
        InputError: JAX's own variables are incomplete, or a number is none.
    """
    launched = any(name in os.environ and _number(count) > 1 for name, count in _LAUNCHERS.items())
    missing = [name for name in _BY_HAND if not os.environ.get(name)]
    given = [name for name in _BY_HAND if name not in missing]
    if given and missing and not launched:
        raise InputError(f"{', '.join(given)} without {', '.join(missing)}: set all three in every process, or none")
    return launched or (_number("JAX_NUM_PROCESSES") > 1 if given else _tpu_hosts() > 1)


def _number(name: str) -> int:
    text = os.environ.get(name, "1")
    if not text.isdecimal():
        raise InputError(f"{name}={text!r} is no number: set it to one, or unset it")
    return int(text)


def _tpu_hosts() -> int:
    """Hosts that share the TPU slice of this machine (all slices, if several work together); 1 without a TPU."""
    slices = _number("MEGASCALE_NUM_SLICES")
    named = next((os.environ[name] for name in _TPU_HOSTS if os.environ.get(name)), None)
    # JAX itself sets TPU_SKIP_MDS_QUERY on import where it finds no TPU chip; Colab does, which has no metadata server.
    if named is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        named = _metadata("worker-network-endpoints")
    return slices * len(named.split(",")) if named else slices


def _metadata(attribute: str) -> str | None:
    """An attribute of this machine of Google Cloud; None where it has none, or is a machine of somebody else."""
    home = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # as JAX asks
    url = f"http://{home}/computeMetadata/v1/instance/attributes/{attribute}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is this machine's own
    try:
        with direct.open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except OSError:
        return None


def initialize() -> None:
    """Join the other processes where the environment says that there are any; before anything else asks for devices.

    ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` describe them;
    under ``srun``, ``mpirun`` and on the hosts of a TPU slice JAX finds out by itself. A second call does nothing.

    Raises:
        InputError: see `environment_is_distributed`.
    """
    if jax.distributed.is_initialized() or not environment_is_distributed():
        return
    numbers = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given: dict[str, Any] = {what: _number(name) for what, name in numbers.items() if name in os.environ}
    jax.distributed.initialize(**given)


def is_lead() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Block until every process has come here; ``what`` is the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def as_lead_says(number: int) -> int:
    """The lead's number (32 bits), in every process."""
    if jax.process_count() > 1:
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return number


def require_same(number: int, what: str) -> None:
    """Raises RunFailed when not all processes have the same number."""
    if jax.process_count() > 1:
        numbers = multihost_utils.process_allgather(np.asarray(number))
        if len(set(numbers.tolist())) > 1:
            raise RunFailed(f"processes differ in {what}: {numbers.tolist()}. They must all see the same files")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where arrays live.

    Attributes:
        mesh: one axis, ``data``, over all devices.
        shard_params: spread parameters, their average and the optimiser state too, instead of copying them: for models
            that do not fit (ZeRO-3, Rajbhandari et al. 2020; XLA gathers each layer when it is computed).
    """

    mesh: jax.sharding.Mesh
    shard_params: bool = False

    @classmethod
    def over(cls, devices: Sequence[jax.Device] | None = None, shard_params: bool = False) -> "Layout":
        """Over ``devices``, by default over all of all processes; one process's lie side by side, as its rows do."""
        devices = jax.devices() if devices is None else devices
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        return cls(jax.sharding.Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,)), shard_params)

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def device(self) -> jax.Device:
        """One of the devices; they are all alike."""
        return self.mesh.devices.flat[0]

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Of an array whose dimensions lie along these mesh axes; none: a copy on each device."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Raises InputError when devices and micro-batches do not divide the batch."""
        parts = self.size * accumulate
        if accumulate < 1 or batch_size % parts:
            raise InputError(
                f"a batch of {batch_size} is not divided by {self.size} devices x {accumulate} micro-batches; "
                f"choose a batch size that is a multiple of {parts}, or another number of micro-batches"
            )

    def of_state(self, state):
        """Shardings of a training state (arrays or their shapes), leaf by leaf."""
        return jax.tree_util.tree_map_with_path(self._of_leaf, state)

    def _of_leaf(self, path, leaf) -> NamedSharding:
        if not self.shard_params:
            return self.sharding()
        # The leading axis of stacked blocks is walked layer by layer: it stays whole.
        stacked = any(getattr(key, "key", None) == "blocks" for key in path)
        sizes = [0 if axis < stacked else size for axis, size in enumerate(leaf.shape)]
        fitting = [axis for axis, size in enumerate(sizes) if size >= self.size and size % self.size == 0]
        if not fitting:
            return self.sharding()
        axis = max(fitting, key=lambda axis: sizes[axis])
        return self.sharding(*(DATA if axis == other else None for other in range(len(leaf.shape))))

    def put_batch(self, rows: np.ndarray) -> jax.Array:
        """This process's rows of a batch -> the whole batch, spread over the devices."""
        return jax.make_array_from_process_local_data(self.sharding(DATA), rows)

    def put_state(self, state):
        """A state that every process holds whole (numpy, or arrays of its own) -> laid out on the devices."""

        def put(leaf, sharding):
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(put, state, self.of_state(state))

"""One code path from a CPU to a TPU pod: a mesh of all devices, a sharded batch, and replicated or
sharded parameters.

Arrays are global: a step compiled for a mesh computes the same result as on one device, and XLA
inserts the communication. With several processes, each supplies its own rows of a batch.
"""

import contextlib
import dataclasses
import os
import urllib.request
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from percepiano_ast.errors import InputError, RunFailed

DATA = "data"  # name of the mesh axis

# --- Processes ----------------------------------------------------------------------------------

# Variables for describing the processes by hand. JAX reads the first; `initialize` passes it the
# numbers.
_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Launchers that JAX supports: a variable that only launched processes have -> the variable with the
# number of tasks.
_LAUNCHERS = {
    "SLURM_STEP_NODELIST": "SLURM_NTASKS",
    "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE",
}
# The hosts of a TPU slice, if the environment lists them (GKE, Colab).
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_METADATA_SECONDS = 5.0


def environment_is_distributed() -> bool:
    """Whether the environment describes this process as one of several.

    Sources are JAX's own variables, those of a launcher (``srun`` of SLURM, ``mpirun`` of Open
    MPI), and the number of hosts of the TPU slice, on Google Cloud from the machine's metadata
    server. ``jax.distributed`` reads the same sources, but would also initialise for the only
    process of a single TPU host or of a SLURM shell.

    Raises:
        InputError: JAX's own variables are incomplete, or one of them is not a number.
    """
    launched = any(name in os.environ and _number(count) > 1 for name, count in _LAUNCHERS.items())
    missing = [name for name in _BY_HAND if not os.environ.get(name)]
    given = [name for name in _BY_HAND if name not in missing]
    if given and missing and not launched:
        raise InputError(
            f"{', '.join(given)} set without {', '.join(missing)}: set all three in every process,"
            " or none"
        )
    if launched or given:
        return launched or _number("JAX_NUM_PROCESSES") > 1
    slices = _number("MEGASCALE_NUM_SLICES")
    hosts = next((os.environ[name] for name in _TPU_HOSTS if os.environ.get(name)), None)
    # JAX sets TPU_SKIP_MDS_QUERY on import if it finds no TPU chip. Colab sets it because it has no
    # metadata server.
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # as in JAX
        url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        # no proxy: the server is local
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with (
            contextlib.suppress(OSError),  # another kind of machine
            direct.open(request, timeout=_METADATA_SECONDS) as answer,
        ):
            hosts = answer.read().decode()
    return slices * (len(hosts.split(",")) if hosts else 1) > 1


def _number(name: str) -> int:
    text = os.environ.get(name, "1")
    if not text.isdecimal():
        raise InputError(f"{name}={text!r} is not a number: set it to one, or unset it")
    return int(text)


def initialize() -> None:
    """Initialise ``jax.distributed`` if the environment describes several processes. Call it before
    any use of devices.

    ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID`` describe the processes; under ``srun``, ``mpirun`` and on the hosts of a TPU
    slice JAX detects them. A second call does nothing.

    Raises:
        InputError: see `environment_is_distributed`.
    """
    if jax.distributed.is_initialized() or not environment_is_distributed():
        return
    count, process = (_number(name) if name in os.environ else None for name in _BY_HAND[1:])
    jax.distributed.initialize(num_processes=count, process_id=process)


def is_lead() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Block until every process has reached this call; ``what`` names the barrier and is the same
    in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def from_lead(number: int) -> int:
    """The first process's number (32 bits), in every process."""
    if jax.process_count() > 1:
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return number


def require_same(number: int, what: str) -> None:
    """Raises RunFailed if the processes have different numbers."""
    if jax.process_count() > 1:
        numbers = multihost_utils.process_allgather(np.asarray(number))
        if len(set(numbers.tolist())) > 1:
            raise RunFailed(
                f"processes differ in {what}: {numbers.tolist()}. All of them need the same files"
            )


# --- Devices ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sharding of arrays over devices.

    Attributes:
        mesh: one axis, ``data``, over all devices.
        shard_params: shard parameters, their moving average and the optimiser state too, instead of
            replicating them, for models that do not fit on one device (ZeRO-3, Rajbhandari et al.
            2020; XLA gathers each layer when it is computed).
    """

    mesh: jax.sharding.Mesh
    shard_params: bool = False

    @classmethod
    def over(
        cls, devices: Sequence[jax.Device] | None = None, shard_params: bool = False
    ) -> "Layout":
        """A layout over ``devices``, by default all; those of a process are adjacent, and so are
        its rows of a batch."""
        devices = jax.devices() if devices is None else devices
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        mesh = jax.sharding.Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))
        return cls(mesh, shard_params)

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def device(self) -> jax.Device:
        """One of the devices, which are all of one kind."""
        return self.mesh.devices.flat[0]

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array whose dimensions are split along these mesh axes; without axes,
        replicated."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Raises InputError if the batch cannot be split evenly over devices and micro-batches."""
        parts = self.size * accumulate
        if accumulate < 1 or batch_size % parts:
            raise InputError(
                f"a batch of {batch_size} is not divisible by {self.size} devices x {accumulate}"
                f" micro-batches; choose a batch size that is a multiple of {parts}, or another"
                " number of micro-batches"
            )

    def of_state(self, state):
        """Shardings of a training state (arrays or their shapes), leaf by leaf."""

        def of_leaf(path, leaf) -> NamedSharding:
            if not self.shard_params:
                return self.sharding()
            # The leading axis of stacked blocks is scanned layer by layer, so it is not split.
            stacked = any(getattr(key, "key", None) == "blocks" for key in path)
            sizes = [0 if axis < stacked else size for axis, size in enumerate(leaf.shape)]
            divisible = [
                axis
                for axis, size in enumerate(sizes)
                if size >= self.size and not size % self.size
            ]
            if not divisible:
                return self.sharding()
            longest = max(divisible, key=lambda axis: sizes[axis])
            return self.sharding(*(DATA if axis == longest else None for axis in range(leaf.ndim)))

        return jax.tree_util.tree_map_with_path(of_leaf, state)

    def put_batch(self, rows: np.ndarray) -> jax.Array:
        """This process's rows of a batch -> the global batch, sharded over the devices."""
        return jax.make_array_from_process_local_data(self.sharding(DATA), rows)

    def put_state(self, state):
        """A state that every process holds completely (numpy or local arrays) -> global arrays on
        the devices."""

        def put(leaf, sharding):
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(put, state, self.of_state(state))

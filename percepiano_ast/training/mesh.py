"""From a CPU to a TPU pod: processes, a mesh of all devices, sharded batches and parameters.

Arrays are global: a step computes the same result as on one device, and XLA inserts the
communication. With several processes, each supplies its own rows of a batch.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from percepiano_ast.errors import InputError, RunFailed

DATA = "data"  # name of the mesh axis

# --- Processes ----------------------------------------------------------------------------------


def initialize(distributed: bool = False) -> None:
    """Join the processes of a run by ``jax.distributed``; call it before any use of devices.

    ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID`` describe them; under ``srun``, ``mpirun`` and on TPU hosts JAX detects them.
    A second call does nothing. Only the first process logs.

    Raises:
        InputError: an incomplete description; or several processes that are not ``distributed``,
            which would overwrite each other's files.
    """
    if not distributed:
        for name in ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
            if (count := os.environ.get(name, "")) not in ("", "1"):
                raise InputError(
                    f"{name}={count}, but these processes are not connected. Use pretrain"
                    " --distributed; start other commands in one process"
                )
    elif not jax.distributed.is_initialized():
        numbers = []
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            if not (text := os.environ.get(name, "0")).isdecimal():
                raise InputError(f"{name}={text!r} is not a number: set it to one, or unset it")
            numbers.append(int(text) if name in os.environ else None)
        try:
            jax.distributed.initialize(num_processes=numbers[0], process_id=numbers[1])
        except ValueError as error:
            raise InputError(
                f"--distributed: {error} Set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES"
                " and JAX_PROCESS_ID in every process"
            ) from error
        if jax.process_index():
            logging.getLogger("percepiano_ast").setLevel(logging.ERROR)


def is_lead() -> bool:
    """Whether this process writes the history and logs."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Block until every process has reached this call; ``what`` names the barrier."""
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
        fsdp: shard parameters, their moving average and the optimiser state too, for models that
            do not fit on one device (ZeRO-3, Rajbhandari et al. 2020).
    """

    mesh: jax.sharding.Mesh
    fsdp: bool = False

    @classmethod
    def over(cls, devices: Sequence[jax.Device] | None = None, fsdp: bool = False) -> "Layout":
        """A layout over ``devices``, by default all; those of a process are adjacent."""
        devices = jax.devices() if devices is None else devices
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        mesh = jax.sharding.Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))
        return cls(mesh, fsdp)

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def device(self) -> jax.Device:
        """One of the devices, which are all of one kind."""
        return self.mesh.devices.flat[0]

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Of an array whose dimensions are split along these mesh axes; none: replicated."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def check_batch(self, batch_size: int, accum_steps: int) -> None:
        """Raises InputError if the batch cannot be split evenly over devices and micro-batches."""
        parts = self.size * accum_steps
        if accum_steps < 1 or batch_size % parts:
            raise InputError(
                f"a batch of {batch_size} is not divisible by {self.size} devices x {accum_steps}"
                f" micro-batches; choose a batch size that is a multiple of {parts}, or another"
                " number of micro-batches"
            )

    def of_state(self, state):
        """Shardings of a training state (arrays or their shapes), leaf by leaf."""

        def of_leaf(path, leaf) -> NamedSharding:
            if not self.fsdp:
                return self.sharding()
            # The leading axis of stacked blocks is scanned layer by layer, so it is not split.
            stacked = any(getattr(key, "key", None) == "blocks" for key in path)
            sizes = [0 if axis < stacked else size for axis, size in enumerate(leaf.shape)]
            divisible = [size for size in sizes if size and not size % self.size]
            if not divisible:
                return self.sharding()
            longest = sizes.index(max(divisible))
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

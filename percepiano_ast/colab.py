"""Where a notebook runs and where its outputs go. The only module that imports ``google.colab``, inside functions."""

import dataclasses
import os
import warnings
from pathlib import Path

import jax

from percepiano_ast.config import PRESETS, InputError, Preset, choose
from percepiano_ast.data import manifest
from percepiano_ast.suite import Run

DRIVE = Path("/content/drive")
DRIVE_FOLDER = DRIVE / "MyDrive" / "percepiano_ast"
SHARDS = Path("/content/percepiano_ast_shards")  # on the runtime's own disk
_WANTED = {"tpu": "TPU", "gpu": "GPU"}


def on_colab() -> bool:
    """Whether this is a Colab runtime."""
    return "COLAB_RELEASE_TAG" in os.environ


def open_run(preset: str, run_dir: str = "", *, wants: str = "", log=print) -> Run:
    """The run that a notebook works on: its preset and its directory, on Drive in Colab.

    Args:
        preset: ``demo``, ``small`` or ``base``.
        run_dir: directory of the run; empty for ``MyDrive/percepiano_ast/<preset>`` in Colab (Drive is mounted, which asks
            for permission) and ``runs/<preset>`` elsewhere.
        wants: accelerator that the notebook's work is meant for, ``tpu``, ``gpu`` or none.

    Raises:
        InputError: unknown preset, or one that is out of reach of this runtime's devices.
    """
    chosen = choose(PRESETS, preset, "preset")
    check_runtime(chosen, wants)
    if run_dir:
        root = Path(run_dir)
    elif on_colab():
        mount_drive()
        root = DRIVE_FOLDER / preset
    else:
        root = Path("runs") / preset
    root.mkdir(parents=True, exist_ok=True)
    # Progress is text; where there are no widgets, tqdm need not say so.
    warnings.filterwarnings("ignore", message="IProgress not found")
    log(f"preset {preset}: model {chosen.model.name}, outputs in {root}, {describe_devices()}")
    return Run(chosen, root)


def bring_shards(run: Run, log=print) -> Run:
    """The run with the shards for pre-training on this runtime's own disk; off Colab they are read where they lie.

    Training reads at random, which a mounted Drive is slow at; copying is fast, and compares checksums on the way.
    """
    if not on_colab() or not run.maestro.is_relative_to(DRIVE):
        return run
    return dataclasses.replace(run, shards=manifest.copy(run.maestro, SHARDS / run.preset.name, log))


def check_runtime(preset: Preset, wants: str) -> None:
    """Refuse hours of hopeless work: presets other than the demo need an accelerator.

    Raises:
        InputError: names the runtime to choose.
    """
    platform = jax.default_backend()
    if not wants or preset.name == "demo" or platform in ("tpu", "gpu", "cuda"):
        return
    where = f"Runtime > Change runtime type > {_WANTED[wants]}" if on_colab() else f"a machine with a {_WANTED[wants]}"
    raise InputError(
        f"preset {preset.name!r} takes days on this {platform.upper()}: choose {where} and run all cells again, "
        "or PRESET = 'demo', which runs anywhere in minutes"
    )


def describe_devices() -> str:
    """Such as ``1 x TPU v5 lite``."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def mount_drive() -> None:
    """Mount Google Drive; a second call does nothing.

    Raises:
        InputError: permission was refused or the mount failed.
    """
    if DRIVE_FOLDER.parent.exists():
        return
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # Colab raises bare ValueErrors and its own types: any means no Drive
        raise InputError(
            f"Google Drive was not mounted ({error}). Run the cell again and allow access, or set RUN_DIR to a folder "
            "of this runtime, which is lost when it ends"
        ) from error


def play(wave, sample_rate: int):
    """A player for a mono recording, in a notebook."""
    from IPython.display import Audio

    return Audio(wave, rate=sample_rate)

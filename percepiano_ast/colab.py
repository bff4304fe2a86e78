"""Colab runtimes and storage for the notebooks. The only module that imports ``google.colab``,
inside functions."""

import base64
import dataclasses
import logging
import os
import time
from pathlib import Path

import jax
import pandas as pd

from percepiano_ast import pipeline
from percepiano_ast.config import PRESETS, Preset, lookup
from percepiano_ast.data import build, demo, shards
from percepiano_ast.data.shards import MANIFEST
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import copy_verified, show_progress, write_atomic
from percepiano_ast.training import checkpoints
from percepiano_ast.training.checkpoints import Storage, StorageError

# choices of the form, which also takes a folder or gs://BUCKET/PREFIX
HERE, ON_DRIVE = "this runtime only", "Google Drive"
DRIVE = Path("/content/drive")
RUNTIME = Path("/content/percepiano_ast")  # on the runtime's disk, deleted with the runtime
SHARDS = Path("/content/percepiano_ast_shards")  # on the same disk: a copy of the shards on Drive
RECEIVED = Path("runs/recordings")  # uploads and microphone recordings
_RED, _PLAIN = "\033[31m", "\033[0m"

logger = logging.getLogger(__name__)
show_progress()  # every notebook imports this module


def on_colab() -> bool:
    """True on a Colab runtime."""
    return "COLAB_RELEASE_TAG" in os.environ


def open_run(preset: str, save_to: str = HERE, *, wants: str = "") -> pipeline.Run:
    """Open the run of a notebook: check the runtime, and prepare its storage location.

    Args:
        preset: ``demo``, ``micro``, ``mini``, ``compact``, ``small`` or ``base``.
        save_to: ``this runtime only``: a folder that is deleted with the runtime; ``Google Drive``:
            ``MyDrive/percepiano_ast/<preset>``, mounted with the user's permission; off Colab, both
            mean ``runs/<preset>``. ``gs://BUCKET/PREFIX`` for shards, checkpoints and models; all
            other outputs stay on this machine and can be recomputed in minutes. Or a folder.
        wants: recommended accelerator, ``tpu``, ``gpu`` or none.

    Raises:
        InputError: unknown preset, preset too large for this runtime's devices, or storage location
            not writable.
    """
    chosen = lookup(PRESETS, preset, "preset")
    check_runtime(chosen, wants)
    root, store, save_to = (RUNTIME if on_colab() else Path("runs")) / preset, "", save_to.strip()
    if not save_to:
        raise InputError(
            f"SAVE_TO is empty: choose {HERE!r} or {ON_DRIVE!r}, or enter a folder or"
            " gs://BUCKET/PREFIX"
        )
    if "://" in save_to:
        Storage(save_to)  # raises InputError if this is not a bucket address
        store = save_to.rstrip("/")
        if on_colab():
            from google.colab import auth

            try:
                auth.authenticate_user()  # asks for permission once per runtime
            except Exception as error:  # Colab raises its own types: any means no permission
                raise InputError(
                    f"no access to Google Cloud ({error}). Run the cell again and allow access, or"
                    " choose another SAVE_TO"
                ) from error
    elif save_to == ON_DRIVE and not on_colab():
        logger.info(f"Google Drive is available on Colab only: outputs go to the folder {root}")
    elif save_to != HERE:
        root = DRIVE / "MyDrive/percepiano_ast" / preset if save_to == ON_DRIVE else Path(save_to)
        if root.is_relative_to(DRIVE):
            mount_drive()
        if root.is_file():
            raise InputError(f"SAVE_TO = {save_to!r} is a file: enter a folder")
    try:
        Storage(store or root).require_writable("writable")
    except StorageError as error:
        advice = "Choose another SAVE_TO"
        if store:
            advice = f"Check that the bucket exists and that you may write and delete. {advice}"
        elif root.is_relative_to(DRIVE):
            advice = (
                "Drive is mounted: check at drive.google.com that it is not full, or choose"
                f" Runtime > Disconnect and delete runtime and start again. {advice}"
            )
        raise InputError(f"{store or root} is not writable ({error}). {advice}") from error

    root.mkdir(parents=True, exist_ok=True)
    pd.set_option("display.max_colwidth", None)  # the table of `notebook.status` shows full paths
    saved = f", shards, checkpoints and models in {store}" if store else ""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    logger.info(f"preset {preset}: model {chosen.model.name}, outputs in {root}{saved}, {devices}")
    if on_colab() and not store and not root.is_relative_to(DRIVE):
        if preset == "demo":
            logger.info(f"{root} is deleted with this runtime")
        else:
            logger.warning(
                f"{_RED}NOTHING WILL BE KEPT: {root} is deleted with this runtime, which Colab may"
                f" end at any time. Set SAVE_TO to {ON_DRIVE!r} or gs://BUCKET/PREFIX and run all"
                f" cells again.{_PLAIN}"
            )
    return pipeline.Run(chosen, root, store=store)


def check_runtime(preset: Preset, wants: str) -> None:
    """Check that the devices suit the preset: large presets need an accelerator; for small ones
    only a hint is logged.

    Raises:
        InputError: a large preset without an accelerator; the message names the runtime to choose.
    """
    platform = jax.default_backend()
    if not wants or preset.name == "demo" or platform in ("tpu", "gpu", "cuda"):
        return
    device, slow = wants.upper(), f"on this {platform.upper()}"
    other = (
        f"Runtime > Change runtime type > {device}" if on_colab() else f"a machine with a {device}"
    )
    # trainable on CPU: `mini` takes about an hour on one core for two epochs of 45 h of music
    if preset.name not in ("micro", "mini", "compact"):
        raise InputError(
            f"preset {preset.name!r} takes days {slow}: choose {other} and run all cells again, or"
            " set PRESET to 'demo', which takes minutes on any machine"
        )
    hours = f"preset {preset.name!r} takes hours {slow}, less on {other}"
    logger.info(f"{hours}; it resumes after an interruption")


def prepare_demo(run: pipeline.Run, needs: str) -> None:
    """For the demo, run the steps of earlier notebooks whose outputs are missing: Colab gives each
    notebook its own runtime. Does nothing for other presets.

    Args:
        needs: ``shards`` (made by notebook 01), ``encoder`` (02) or ``predictions`` (03).
    """
    if run.preset.name != "demo" or run.store:
        return
    made = {
        "shards": (run.maestro / MANIFEST).exists(),
        "encoder": bool(checkpoints.listing(run.pretrain / "checkpoints")),
        "predictions": any(run.root.glob("predictions_*.csv")),
    }
    if made[needs]:
        return
    if not made["shards"]:
        logger.info("demo: making the shards of notebook 01 (under a minute)")
        pipeline.preprocess_maestro(run)
    if needs != "shards" and not made["encoder"]:
        logger.info("demo: pre-training the encoder of notebook 02 (about a minute)")
        pipeline.pretrain(run)
    if needs == "predictions":
        logger.info("demo: making the predictions of notebook 03 (about a minute)")
        pipeline.preprocess_percepiano(run, init=run.pretraining)
        for init in (run.pretraining, "scratch"):
            pipeline.finetune(run, init)
        pipeline.predict_baselines(run)


def mount_drive() -> None:
    """Mount Google Drive; a second call does nothing.

    Raises:
        InputError: this is not Colab, permission was refused or the mount failed.
    """
    if os.path.isdir(DRIVE / "MyDrive"):  # False also when a mount does not respond
        return
    if not on_colab():
        raise InputError(
            f"{DRIVE} is Google Drive, which is available on Colab only: enter a folder on this"
            " machine"
        )
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # ValueError or Colab's own types: any of them means no Drive
        raise InputError(
            f"Google Drive was not mounted ({error}). Run the cell again and allow access, or set"
            f" SAVE_TO to {HERE!r} (deleted with the runtime) or gs://BUCKET/PREFIX"
        ) from error


def flush(run: pipeline.Run) -> None:
    """Upload pending writes to Drive, then mount Drive again; does nothing for other storage
    locations.

    Call it at the end of a notebook, not after each epoch: unmounting removes the folder while
    training writes to it, and checkpoints are fsynced when written. Files were lost even after a
    flush: only drive.google.com shows which files have arrived.
    """
    if not (on_colab() and run.root.is_relative_to(DRIVE)):
        return
    from google.colab import drive

    logger.info(
        "uploading pending files to Google Drive, then mounting it again; this may take half an"
        " hour"
    )
    started = time.monotonic()
    try:
        drive.flush_and_unmount()
    except Exception as error:  # as in `mount_drive`; a finished training must not fail here
        logger.warning(
            f"{_RED}Drive did not confirm the upload ({error}): check drive.google.com before"
            f" closing this runtime{_PLAIN}"
        )
    mount_drive()
    seconds = time.monotonic() - started
    logger.info(f"done in {seconds:.0f} s; drive.google.com shows which files have arrived")


def upload_shards(run: pipeline.Run) -> None:
    """Copy finished shards from this machine to the run's bucket, the manifest last; does nothing
    without a bucket.

    Raises:
        InputError: the shards are incomplete.
        StorageError: the bucket refuses the upload.
    """
    if not run.in_bucket:
        return
    files = shards.read_manifest(run.maestro)["files"]
    bucket = Storage(run.kept(run.root / "maestro"))
    manifest = (run.maestro / MANIFEST).read_bytes()
    if MANIFEST in bucket.names():
        if bucket.read(MANIFEST) == manifest:
            logger.info(f"shards already in {bucket.place}")
            return
        bucket.remove(MANIFEST)  # the set is incomplete until every file is replaced
    for number, (name, known) in enumerate(files.items(), start=1):
        if bucket.write(name, run.maestro / name) != known["sha256"]:
            raise RunFailed(
                f"{run.maestro / name} does not match its checksum: delete it and run preprocess"
                " again"
            )
        if number % 10 == 0 or number == len(files):
            logger.info(f"  {number}/{len(files)} files of the shards copied to {bucket.place}")
    bucket.write(MANIFEST, manifest)


def download_shards(run: pipeline.Run) -> pipeline.Run:
    """Copy the pre-training shards from a mounted Drive or from ``gs://`` to this machine's disk,
    because training reads at random positions; returns the run with them.

    Raises:
        InputError: no complete set of shards.
        RunFailed: a copied file does not match its checksum.
    """
    if not run.in_bucket:
        if on_colab() and run.maestro.is_relative_to(DRIVE):
            copy = build.copy_shards(run.maestro, SHARDS / run.preset.name)
            return dataclasses.replace(run, shards=copy)
        return run
    bucket = Storage(run.kept(run.root / "maestro"))
    if MANIFEST not in bucket.names():
        raise InputError(
            f"{bucket.place} has no {MANIFEST}: run notebook 01 with the same SAVE_TO first"
        )
    content = bucket.read(MANIFEST)
    files = shards.read_manifest(bucket.place, content)["files"]
    (run.maestro / MANIFEST).unlink(missing_ok=True)
    advice = "Run notebook 01 again, which replaces it."
    copy_verified(files, bucket.place, run.maestro, advice, copy=bucket.get)
    write_atomic(run.maestro / MANIFEST, content)
    return run


def receive(source: str, folder: str | Path = RECEIVED) -> Path:
    """Path of the recording that a row of a notebook's form names.

    Args:
        source: a path; ``upload``, which opens a file dialog; ``record``, which records from the
            microphone until stopped; ``example`` or ``second example``, two renderings of one demo
            tune by the built-in piano.
        folder: for uploads, microphone recordings and examples.

    Raises:
        InputError: no file chosen, no microphone access, or ``upload`` and ``record`` off Colab.
    """
    folder = Path(folder)
    if source in demo.EXAMPLES:
        return demo.write_example(folder, source)
    if source not in ("upload", "record"):
        return Path(source)
    if not on_colab():
        raise InputError(
            f"{source!r} works on Colab only: enter the path of a recording, or 'example'"
        )
    from google.colab import files, output

    if source == "upload":
        given = files.upload()
        if not given:
            raise InputError("no file was chosen: run the cell again and choose a recording")
        name, content = next(iter(given.items()))
    else:
        try:
            answer = output.eval_js(_MICROPHONE)
        except Exception as error:  # Colab passes on the browser's error
            raise InputError(
                f"no microphone access ({error}): allow it in the browser, or upload a recording"
            ) from error
        name, content = "recorded.webm", base64.b64decode(answer.partition(",")[2])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(name).name
    path.write_bytes(content)
    return path


# Disables the browser's speech processing, which would change the piano sound.
_MICROPHONE = """(async () => {
  const raw = {echoCancellation: false, noiseSuppression: false, autoGainControl: false};
  const stream = await navigator.mediaDevices.getUserMedia({audio: raw}), recorder = new MediaRecorder(stream), parts = [];
  const button = document.createElement("button");
  button.textContent = "Recording: press to stop";
  document.querySelector("#output-area").appendChild(button);
  recorder.ondataavailable = (event) => parts.push(event.data);
  const stopped = new Promise((resolve) => (recorder.onstop = resolve));
  recorder.start();
  await new Promise((resolve) => (button.onclick = resolve));
  recorder.stop(); await stopped; stream.getTracks().forEach((track) => track.stop()); button.remove();
  const reader = new FileReader(), read = new Promise((resolve) => (reader.onload = resolve));
  reader.readAsDataURL(new Blob(parts)); await read;
  return reader.result;
})()"""

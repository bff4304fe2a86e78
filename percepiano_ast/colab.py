"""Colab runtimes and storage for the notebooks. The only module that imports ``google.colab``,
inside functions."""

import base64
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pandas as pd

from percepiano_ast import pipeline
from percepiano_ast.config import PRESETS, Preset, lookup
from percepiano_ast.data import build, demo
from percepiano_ast.data.shards import MANIFEST
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import copy_verified, show_progress
from percepiano_ast.training import checkpoints
from percepiano_ast.training.checkpoints import Storage, StorageError

# choices of the form, which also takes a folder or gs://BUCKET/PREFIX
HERE, ON_DRIVE = "this runtime only", "Google Drive"
DRIVE = Path("/content/drive")
RUNTIME = Path("/content/percepiano_ast")  # on the runtime's disk, deleted with the runtime
SHARDS = Path("/content/percepiano_ast_shards")  # on the same disk: a copy of the shards on Drive
# uploads and microphone recordings, relative to the notebook's working directory
RECEIVED = Path("runs/recordings")
_RED, _PLAIN = "\033[31m", "\033[0m"

show_progress()  # every notebook imports this module


def on_colab() -> bool:
    """True on a Colab runtime."""
    return "COLAB_RELEASE_TAG" in os.environ


def open_run(
    preset: str, keep_in: str = HERE, *, wants: str = "", log: Callable[[str], None] = print
) -> pipeline.Run:
    """Open the run of a notebook: check the runtime, and prepare its storage location.

    Args:
        preset: ``demo``, ``micro``, ``mini``, ``small`` or ``base``.
        keep_in: storage location. ``this runtime only``: a folder on the runtime's disk, deleted
            with the runtime. ``Google Drive``: ``MyDrive/percepiano_ast/<preset>``; Drive is
                mounted, which asks for permission.
            Off Colab both mean ``runs/<preset>``. A folder is used as given. With
            ``gs://BUCKET/PREFIX``, shards, checkpoints and models are stored in the bucket; all
            other outputs stay in a folder on this machine and can be recomputed from them in
            minutes.
        wants: recommended accelerator, ``tpu``, ``gpu`` or none.

    Raises:
        InputError: unknown preset, preset too large for this runtime's devices, or storage location
            not writable.
    """
    chosen = lookup(PRESETS, preset, "preset")
    check_runtime(chosen, wants, log)
    root, store = _places(preset, keep_in.strip(), log)
    root.mkdir(parents=True, exist_ok=True)
    pd.set_option("display.max_colwidth", None)  # the table of `notebook.kept` shows full paths
    kept = f", shards, checkpoints and models in {store}" if store else ""
    model = chosen.model.name
    log(f"preset {preset}: model {model}, outputs in {root}{kept}, {describe_devices()}")
    if on_colab() and not store and not root.is_relative_to(DRIVE):
        warning = (
            f"{_RED}NOTHING WILL BE KEPT: {root} is deleted with this runtime, which Colab may end"
            f" at any time. Set KEEP_IN to {ON_DRIVE!r} or gs://BUCKET/PREFIX and run all cells"
            f" again.{_PLAIN}"
        )
        log(f"{root} is deleted with this runtime" if preset == "demo" else warning)
    return pipeline.Run(chosen, root, store=store)


def prepare_demo(run: pipeline.Run, needs: str, log: Callable[[str], None] = print) -> None:
    """For the demo, run the steps of earlier notebooks whose outputs are missing; do nothing for
    other presets.

    Colab gives each notebook its own runtime. With ``this runtime only``, outputs of earlier
    notebooks are not available.

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
        log("demo: making the shards of notebook 01 (under a minute)")
        pipeline.preprocess_maestro(run)
    if needs != "shards" and not made["encoder"]:
        log("demo: pre-training the encoder of notebook 02 (about a minute)")
        pipeline.pretrain(run)
    if needs == "predictions":
        log("demo: making the predictions of notebook 03 (about a minute)")
        pipeline.preprocess_percepiano(run, init=run.pretraining)
        for init in (run.pretraining, "scratch"):
            pipeline.finetune(run, init)
        pipeline.predict_baselines(run)


def _places(preset: str, keep_in: str, log: Callable[[str], None]) -> tuple[Path, str]:
    """The run's folder, and its store ("" if that is the folder itself). Both are checked to be
    writable."""
    if not keep_in:
        raise InputError(
            f"KEEP_IN is empty: choose {HERE!r} or {ON_DRIVE!r}, or enter a folder or"
            " gs://BUCKET/PREFIX"
        )
    own = (RUNTIME if on_colab() else Path("runs")) / preset
    if "://" in keep_in:
        Storage(keep_in)  # raises InputError if this is not a bucket address
        if on_colab():
            from google.colab import auth

            try:
                auth.authenticate_user()  # asks for permission once per runtime
            except Exception as error:  # Colab raises its own types: any means no permission
                raise InputError(
                    f"no access to Google Cloud ({error}). Run the cell again and allow access, or"
                    " choose another KEEP_IN"
                ) from error
        _require_writable(keep_in)
        return own, keep_in.rstrip("/")
    root = {ON_DRIVE: DRIVE / "MyDrive" / "percepiano_ast" / preset, HERE: own}.get(
        keep_in, Path(keep_in)
    )
    if keep_in == ON_DRIVE and not on_colab():
        log(f"Google Drive is available on Colab only: outputs go to the folder {own}")
        root = own
    if root.is_relative_to(DRIVE):
        mount_drive()
    if root.is_file():
        raise InputError(f"KEEP_IN = {keep_in!r} is a file: enter a folder")
    _require_writable(root)
    return root, ""


def _require_writable(place: Path | str) -> None:
    """Raises InputError, with the next action, if no file can be written."""
    try:
        Storage(place).require_writable("writable")
    except StorageError as error:
        advice = "Choose another KEEP_IN"
        if "://" in str(place):
            advice = (
                "Check that the bucket exists and that you have permission to write and delete, or"
                " choose another KEEP_IN"
            )
        elif Path(place).is_relative_to(DRIVE):
            advice = (
                "Drive is mounted: check at drive.google.com that it is not full, or choose"
                " Runtime > Disconnect and delete runtime and start again, or set KEEP_IN to"
                f" {HERE!r} or gs://BUCKET/PREFIX"
            )
        raise InputError(f"{place} is not writable ({error}). {advice}") from error


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
            f" KEEP_IN to {HERE!r} (deleted with the runtime) or gs://BUCKET/PREFIX"
        ) from error


def flush(run: pipeline.Run, log: Callable[[str], None] = print) -> None:
    """Upload pending writes to Drive, then mount Drive again; does nothing for other storage
    locations.

    Call it at the end of a notebook, not after each epoch: unmounting removes the folder while
    training writes to it, and checkpoints are fsynced when written. A flush does not guarantee the
    upload: files were lost even after one. Only drive.google.com shows which files have arrived.
    """
    if not (on_colab() and run.root.is_relative_to(DRIVE)):
        return
    from google.colab import drive

    doing = "uploading pending files to Google Drive, then mounting it again"
    log(f"{doing}; this may take half an hour")
    started = time.monotonic()
    try:
        drive.flush_and_unmount()
    except Exception as error:  # as in `mount_drive`; a finished training must not fail here
        problem = f"Drive did not confirm the upload ({error})"
        log(f"{_RED}{problem}: check drive.google.com before closing this runtime{_PLAIN}")
    mount_drive()
    took = f"done in {time.monotonic() - started:.0f} s"
    log(f"{took}; drive.google.com shows which files have arrived")


def keep_shards(run: pipeline.Run, log: Callable[[str], None] = print) -> None:
    """Copy finished shards from this machine to the run's bucket, the manifest last; does nothing
    without a bucket.

    Raises:
        InputError: the shards are incomplete.
        StorageError: the bucket refuses the upload.
    """
    if not run.in_bucket:
        return
    files = build.read_manifest(run.maestro)["files"]
    there = Storage(run.kept(run.root / "maestro"))
    whole = (run.maestro / MANIFEST).read_bytes()
    if MANIFEST in there.names():
        if there.read(MANIFEST) == whole:
            log(f"shards already in {there.place}")
            return
        there.remove(MANIFEST)  # the set is incomplete until every file is replaced
    for number, (name, known) in enumerate(files.items(), start=1):
        if there.write(name, run.maestro / name) != known["sha256"]:
            raise RunFailed(
                f"{run.maestro / name} does not match its checksum: delete it and run preprocess"
                " again"
            )
        if number % 10 == 0 or number == len(files):
            log(f"  {number}/{len(files)} files of the shards copied to {there.place}")
    there.write(MANIFEST, whole)


def bring_shards(run: pipeline.Run, log: Callable[[str], None] = print) -> pipeline.Run:
    """Copy the pre-training shards from a mounted Drive or from ``gs://`` to this machine's disk;
    returns the run with them.

    Training reads at random positions, which is slow on a mounted Drive. The copy is verified by
    checksums.

    Raises:
        InputError: no complete set of shards.
        RunFailed: a copied file does not match its checksum.
    """
    if not run.in_bucket:
        if on_colab() and run.maestro.is_relative_to(DRIVE):
            there = SHARDS / run.preset.name
            return dataclasses.replace(run, shards=build.copy_shards(run.maestro, there, log))
        return run
    place, target = run.kept(run.root / "maestro"), run.maestro
    store = Storage(place)
    if MANIFEST not in store.names():
        raise InputError(f"{place} has no {MANIFEST}: run notebook 01 with the same KEEP_IN first")
    with tempfile.TemporaryDirectory() as folder:
        store.get(MANIFEST, Path(folder) / MANIFEST, 2**26)
        files, whole = (
            build.read_manifest(Path(folder))["files"],
            Path(folder, MANIFEST).read_bytes(),
        )
    (target / MANIFEST).unlink(missing_ok=True)
    advice = "Run notebook 01 again, which replaces it."
    copy_verified(files, place, target, advice, log, store.get)
    (target / MANIFEST).write_bytes(whole)
    return run


def check_runtime(preset: Preset, wants: str, log: Callable[[str], None] = print) -> None:
    """Check that the devices suit the preset: large presets need an accelerator; for small ones
    only a hint is logged.

    Raises:
        InputError: a large preset without an accelerator; the message names the runtime to choose.
    """
    platform = jax.default_backend()
    if not wants or preset.name == "demo" or platform in ("tpu", "gpu", "cuda"):
        return
    device = wants.upper()
    menu = f"Runtime > Change runtime type > {device}"
    where = menu if on_colab() else f"a machine with a {device}"
    # trainable on CPU: `mini` takes about an hour on one core for two epochs of 45 h of music
    if preset.name in ("micro", "mini"):
        hours = f"preset {preset.name!r} takes hours on this {platform.upper()}, less on {where}"
        log(f"{hours}; it resumes after an interruption")
        return
    raise InputError(
        f"preset {preset.name!r} takes days on this {platform.upper()}: choose {where} and run all"
        " cells again, or set PRESET to 'demo', which takes minutes on any machine"
    )


def describe_devices() -> str:
    """Such as ``1 x TPU v5 lite``."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def play(wave, sample_rate: int):
    """Audio player for a mono recording, for display in a notebook."""
    from IPython.display import Audio

    return Audio(wave, rate=sample_rate)


def receive(place: str, folder: str | Path = RECEIVED) -> Path:
    """Path of the recording that a row of a notebook's form names.

    Args:
        place: a path; ``upload``, which opens a file dialog; ``record``, which records from the
            microphone until stopped; ``example`` or ``second example``, two renderings of one demo
            tune by the built-in piano.
        folder: for uploads, microphone recordings and examples.

    Raises:
        InputError: no file chosen, no microphone access, or ``upload`` and ``record`` off Colab.
    """
    folder = Path(folder)
    if place in demo.EXAMPLES:
        return demo.write_example(folder, place)
    if place not in ("upload", "record"):
        return Path(place)
    if not on_colab():
        raise InputError(
            f"{place!r} works on Colab only: enter the path of a recording, or 'example'"
        )
    from google.colab import files, output

    if place == "upload":
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

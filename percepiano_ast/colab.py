"""Where a notebook runs and where its outputs are kept. The only module that imports ``google.colab``, inside functions."""

import base64
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pandas as pd

from percepiano_ast.config import PRESETS, InputError, Preset, RunFailed, choose
from percepiano_ast.data import demo, manifest
from percepiano_ast.data.download import sha256_of
from percepiano_ast.data.shards import MANIFEST
from percepiano_ast.suite import Run
from percepiano_ast.training.stores import StoreFailed, open_store

ON_DRIVE, HERE = "Google Drive", "this runtime only"  # what the form offers; it also takes a folder or gs://BUCKET/PREFIX
DRIVE = Path("/content/drive")
RUNTIME = Path("/content/percepiano_ast")  # on the runtime's own disk, which ends with it
SHARDS = Path("/content/percepiano_ast_shards")  # the same, for a copy of what lies on Drive
RECEIVED = Path("runs/recordings")  # what was uploaded or recorded, below the folder that a notebook works in
_WANTED = {"tpu": "TPU", "gpu": "GPU"}
_SMALL = ("micro", "mini")  # presets that were trained on CPU cores: `mini` hears 45 h of music twice in an hour of one
_RED, _PLAIN = "\033[31m", "\033[0m"


def on_colab() -> bool:
    """Whether this is a Colab runtime."""
    return "COLAB_RELEASE_TAG" in os.environ


def open_run(preset: str, keep_in: str = ON_DRIVE, *, wants: str = "", log: Callable[[str], None] = print) -> Run:
    """The run that a notebook works on: its preset, and the place where it is kept.

    Args:
        preset: ``demo``, ``mini``, ``small`` or ``base``.
        keep_in: ``Google Drive``: ``MyDrive/percepiano_ast/<preset>``, mounted on the way, which asks for permission;
            ``this runtime only``: a folder that ends with it. Off Colab both mean ``runs/<preset>``.
            A folder is used as given. At ``gs://BUCKET/PREFIX`` shards, checkpoints and models are kept, while the run works
            in a folder of this machine; what else is there is made again from them in minutes.
        wants: accelerator that the notebook's work is meant for, ``tpu``, ``gpu`` or none.

    Raises:
        InputError: unknown preset, or one that is out of reach of this runtime's devices; a place that cannot be used.
    """
    chosen = choose(PRESETS, preset, "preset")
    check_runtime(chosen, wants, log)
    root, store = _places(preset, keep_in.strip(), log)
    root.mkdir(parents=True, exist_ok=True)
    pd.set_option("display.max_colwidth", None)  # a table of what is where, see `views.kept`, cuts no address off
    kept = f", shards, checkpoints and models in {store}" if store else ""
    log(f"preset {preset}: model {chosen.model.name}, outputs in {root}{kept}, {describe_devices()}")
    if on_colab() and not store and not root.is_relative_to(DRIVE):
        log(
            f"{_RED}NOTHING OF THIS RUN WILL BE KEPT: {root} is deleted when this runtime ends, which may be at any second. "
            f"To keep it choose KEEP_IN = {ON_DRIVE!r} or gs://BUCKET/PREFIX, and run all cells again.{_PLAIN}"
        )
    return Run(chosen, root, store=store)


def _places(preset: str, keep_in: str, log: Callable[[str], None]) -> tuple[Path, str]:
    """The run's folder, and its store where that is another place; both can be written to."""
    if not keep_in:
        raise InputError(f"KEEP_IN is empty: choose {ON_DRIVE!r} or {HERE!r}, or name a folder or gs://BUCKET/PREFIX")
    own = (RUNTIME if on_colab() else Path("runs")) / preset
    if "://" in keep_in:
        open_store(keep_in)  # refuses what is no address of a bucket
        if on_colab():
            _sign_in()
        _require_writable(keep_in)
        return own, keep_in.rstrip("/")
    root = {ON_DRIVE: DRIVE / "MyDrive" / "percepiano_ast" / preset, HERE: own}.get(keep_in, Path(keep_in))
    if keep_in == ON_DRIVE and not on_colab():
        log(f"there is no Google Drive outside Colab: outputs go to the folder {own}")
        root = own
    if root.is_relative_to(DRIVE):
        mount_drive()
    if root.is_file():
        raise InputError(f"KEEP_IN = {keep_in!r} is a file: name a folder")
    _require_writable(root)
    return root, ""


def _require_writable(place: Path | str) -> None:
    """Raises InputError, with what to do, where no file can be written."""
    try:
        open_store(place).require_writable("writable")
    except StoreFailed as error:
        cause = f"{place} cannot be used ({error})"
        if "://" in str(place):
            advice = "Check that the bucket exists and that you may write and delete there, or choose another KEEP_IN"
        elif Path(place).is_relative_to(DRIVE):
            advice = (
                f"Drive is mounted, but nothing can be written there: look at drive.google.com whether it is full, choose "
                f"Runtime > Disconnect and delete runtime and start again, or set KEEP_IN = {HERE!r} or gs://BUCKET/PREFIX"
            )
        else:
            advice = "Choose another KEEP_IN"
        raise InputError(f"{cause}. {advice}") from error


def _sign_in() -> None:
    """Google's libraries find the bucket's owner after this; asks for permission once a runtime."""
    from google.colab import auth

    try:
        auth.authenticate_user()
    except Exception as error:  # Colab raises its own types: any means no permission
        raise InputError(
            f"no access to Google Cloud ({error}). Run the cell again and allow it, or choose another KEEP_IN"
        ) from error


def mount_drive() -> None:
    """Mount Google Drive; a second call does nothing.

    Raises:
        InputError: this is not Colab, permission was refused or the mount failed.
    """
    if os.path.isdir(DRIVE / "MyDrive"):  # false, too, where a mount is there but does not answer
        return
    if not on_colab():
        raise InputError(f"{DRIVE} is Google Drive in Colab, which this is not: name a folder of this machine")
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # Colab raises bare ValueErrors and its own types: any means no Drive
        raise InputError(
            f"Google Drive was not mounted ({error}). Run the cell again and allow access, or set KEEP_IN = {HERE!r}, which is "
            "lost when the runtime ends, or gs://BUCKET/PREFIX"
        ) from error


def flush(run: Run, log: Callable[[str], None] = print) -> None:
    """At the end of the work on Drive: have Colab upload what it still holds back, and mount Drive again.

    Elsewhere it does nothing. Not after each epoch, since a checkpoint is fsynced as it is written, which is all that a mount
    offers, while unmounting would pull the folder away from under the training. It is no proof either: files were seen lost
    even after it. What counts is what drive.google.com shows.
    """
    if not (on_colab() and run.root.is_relative_to(DRIVE)):
        return
    from google.colab import drive

    log("uploading to Google Drive what this runtime still holds, then mounting it again; this may take half an hour")
    started = time.monotonic()
    try:
        drive.flush_and_unmount()
    except Exception as error:  # as in `mount_drive`; a training that is done shall not end in this
        log(f"{_RED}Drive did not confirm it ({error}): look at drive.google.com before you close this runtime{_PLAIN}")
    mount_drive()
    log(f"done in {time.monotonic() - started:.0f} s; drive.google.com shows what has arrived")


def keep_shards(run: Run, log: Callable[[str], None] = print) -> None:
    """Copy finished shards from this machine to the run's ``gs://``, the manifest last; elsewhere they lie in their place.

    Raises:
        InputError: they are not complete.
        StoreFailed: the bucket does not take them.
    """
    if not run.in_bucket:
        return
    files, there = manifest.read(run.maestro)["files"], open_store(run.kept(run.root / "maestro"))
    whole = (run.maestro / MANIFEST).read_bytes()
    if MANIFEST in there.names():
        if there.read(MANIFEST) == whole:
            log(f"shards are in {there.place} already")
            return
        there.remove(MANIFEST)  # what is there is not whole until it is all replaced
    for number, (name, known) in enumerate(files.items(), start=1):
        if there.put(name, run.maestro / name) != known["sha256"]:
            raise RunFailed(f"{run.maestro / name} is not as it was written; delete it and run preprocess again")
        if number % 10 == 0 or number == len(files):
            log(f"  {number}/{len(files)} files of the shards copied to {there.place}")
    there.write(MANIFEST, whole)


def bring_shards(run: Run, log: Callable[[str], None] = print) -> Run:
    """The run with the shards for pre-training on this machine's own disk: from a mounted Drive, or from ``gs://``.

    Training reads at random, which a mounted Drive is slow at; copying is fast, and compares checksums on the way.

    Raises:
        InputError: nothing complete is there.
        RunFailed: a file does not arrive as it was written.
    """
    if run.in_bucket:
        _fetch_shards(run.kept(run.root / "maestro"), run.maestro, log)
    elif on_colab() and run.maestro.is_relative_to(DRIVE):
        return dataclasses.replace(run, shards=manifest.copy(run.maestro, SHARDS / run.preset.name, log))
    return run


def _fetch_shards(place: str, target: Path, log: Callable[[str], None]) -> None:
    there = open_store(place)
    if MANIFEST not in there.names():
        raise InputError(f"{place} holds no {MANIFEST}: run notebook 01 with the same KEEP_IN first, it puts the shards there")
    with tempfile.TemporaryDirectory() as folder:
        there.get(MANIFEST, Path(folder) / MANIFEST, 2**26)
        files, whole = manifest.read(Path(folder))["files"], (Path(folder) / MANIFEST).read_bytes()
    todo = {name: known for name, known in files.items() if not _holds(target / name, known["sha256"])}
    target.mkdir(parents=True, exist_ok=True)
    size = sum(known["bytes"] for known in todo.values())
    if (free := shutil.disk_usage(target).free) < size:
        raise InputError(f"{target} has {free / 1e9:.1f} GB free, the shards need {size / 1e9:.1f} GB; free them")
    (target / MANIFEST).unlink(missing_ok=True)
    for number, (name, known) in enumerate(todo.items(), start=1):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        partial = (target / name).with_suffix(".partial")
        if there.get(name, partial, known["bytes"]) != known["sha256"]:
            raise RunFailed(f"{there.path_of(name)} does not arrive as it was written: run notebook 01 again, it is replaced")
        partial.replace(target / name)
        if number % 10 == 0 or number == len(todo):
            log(f"  {number}/{len(todo)} files of the shards copied from {place}")
    (target / MANIFEST).write_bytes(whole)


def _holds(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def check_runtime(preset: Preset, wants: str, log: Callable[[str], None] = print) -> None:
    """Refuse days of hopeless work: the large presets need an accelerator. The small ones take hours without, which is said.

    Raises:
        InputError: names the runtime to choose.
    """
    platform = jax.default_backend()
    if not wants or preset.name == "demo" or platform in ("tpu", "gpu", "cuda"):
        return
    where = f"Runtime > Change runtime type > {_WANTED[wants]}" if on_colab() else f"a machine with a {_WANTED[wants]}"
    if preset.name in _SMALL:
        log(f"preset {preset.name!r} takes hours on this {platform.upper()}, less on {where}; after a break it continues")
        return
    raise InputError(
        f"preset {preset.name!r} takes days on this {platform.upper()}: choose {where} and run all cells again, "
        "or PRESET = 'demo', which runs anywhere in minutes"
    )


def describe_devices() -> str:
    """Such as ``1 x TPU v5 lite``."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def play(wave, sample_rate: int):
    """A player for a mono recording, in a notebook."""
    from IPython.display import Audio

    return Audio(wave, rate=sample_rate)


def receive(place: str, folder: str | Path = RECEIVED) -> Path:
    """The recording that a notebook's form means.

    Args:
        place: a path; ``upload``, which asks for a file; ``record``, which listens to the microphone until it is told to stop;
            ``example`` or ``second example``, a tune of the demo played in two ways by the built-in piano.

    Raises:
        InputError: nothing was chosen or heard, or uploads and microphones outside Colab.
    """
    folder = Path(folder)
    if place in demo.EXAMPLES:
        return demo.write_example(folder, place)
    if place not in ("upload", "record"):
        return Path(place)
    if not on_colab():
        raise InputError(f"{place!r} is for Colab: here write the path of a recording, or 'example'")
    folder.mkdir(parents=True, exist_ok=True)
    return _uploaded(folder) if place == "upload" else _recorded(folder)


def _uploaded(folder: Path) -> Path:
    from google.colab import files

    given = files.upload()
    if not given:
        raise InputError("no file was chosen: run the cell again and choose a recording")
    name, content = next(iter(given.items()))
    (folder / Path(name).name).write_bytes(content)
    return folder / Path(name).name


def _recorded(folder: Path) -> Path:
    from google.colab import output

    try:
        answer = output.eval_js(_MICROPHONE)
    except Exception as error:  # Colab hands on whatever the browser said
        raise InputError(f"the microphone was not heard ({error}): allow it in the browser, or upload a recording") from error
    path = folder / "recorded.webm"
    path.write_bytes(base64.b64decode(answer.partition(",")[2]))
    return path


# Asks the browser for sound as it is: what makes speech clear would change how a piano sounds.
_MICROPHONE = """(async () => {
  const raw = {echoCancellation: false, noiseSuppression: false, autoGainControl: false};
  const stream = await navigator.mediaDevices.getUserMedia({audio: raw}), recorder = new MediaRecorder(stream), parts = [];
  const button = document.createElement("button");
  button.textContent = "recording: press to stop";
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

#!/usr/bin/env bash
# Sets percepiano_ast up, on Colab and elsewhere; `bash colab_setup.sh help` prints the usage. It can be run again at any time:
# a finished environment is left alone, an unfinished one is rebuilt.
set -euo pipefail

usage() {
  cat <<'USAGE'
bash colab_setup.sh rate FILE [...]  install what rating needs, then rate FILE; options as in `percepiano rate --help`
bash colab_setup.sh                  install what the notebooks need: on Colab into the running Python, elsewhere into .venv
bash colab_setup.sh demo             the same, then run the notebooks on the demo data into runs/demo
bash colab_setup.sh test [...]       the same with the test packages, then run the tests; further arguments go to pytest
bash colab_setup.sh help             print this text

PYTHON=/path/to/python3.12           build .venv with this Python; default: the newest of 3.11 to 3.13 that runs
PIP_CONSTRAINT=/path/to/file         version constraints for pip
TPU_COMPILER=1                       also install libtpu, which `pretrain --check-memory` needs on a machine without a TPU
USAGE
}

say() { printf '[setup] %s\n' "$*"; }
fail() { # fail STATUS MESSAGE
  printf 'colab_setup.sh: %s\n' "$2" >&2
  exit "$1"
}

quietly() { # quietly COMMAND...: the output is shown only when the command fails
  if ! "$@" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    return 1
  fi
}

pip_install() { quietly "$python" -m pip install --quiet --no-input "$@"; }

# ---------------------------------------------------------------- which Python, which jax

# Prints "3.12 yes /usr/bin/python3.12": version, whether it can create environments, and the base interpreter even if $1
# belongs to an environment. Runs on Python 2 too, so that its version can be reported as too old.
probe() {
  "$1" -c '
import os, sys
try:
    from importlib.util import find_spec
    able = bool(find_spec("venv") and find_spec("ensurepip"))
except ImportError:
    able = False
path = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
print("%d.%d %s %s" % (sys.version_info[0], sys.version_info[1], "yes" if able else "no", path))' 2>/dev/null
}

candidates() { # candidates 3.13: commands that may be that Python
  type -aP "python$1" || true
  compgen -G "${HOME:-}/.pyenv/versions/$1.*/bin/python" | sort -rV || true
  type -aP python3 || true
}

no_ensurepip() { # no_ensurepip VERSION PATH
  fail 1 "$2 (Python $1) cannot create environments: 'ensurepip' is missing. On Debian and Ubuntu:
  sudo apt-get install python$1-venv
then run this again, or name another Python: PYTHON=/path/to/python bash colab_setup.sh"
}

choose_python() { # sets base (interpreter) and version
  local able path wanted candidate unable=()
  if [[ -n ${PYTHON:-} ]]; then
    read -r version able base <<<"$(probe "$PYTHON")" || true
    [[ -n $version ]] || fail 2 "PYTHON=$PYTHON does not run; name a Python of 3.11 to 3.13 or leave PYTHON unset"
    supported "$version" || fail 2 "PYTHON=$PYTHON is Python $version; this project needs 3.11, 3.12 or 3.13"
    [[ $able == yes ]] || no_ensurepip "$version" "$base"
    return
  fi
  for wanted in 3.13 3.12 3.11; do
    while IFS= read -r candidate; do
      read -r version able path <<<"$(probe "$candidate")" || true
      [[ $version == "$wanted" ]] || continue
      if [[ $able == yes ]]; then
        base=$path
        return
      fi
      unable=("$version" "$path")
    done < <(candidates "$wanted")
  done
  [[ ${#unable[@]} -eq 0 ]] || no_ensurepip "${unable[@]}"
  fail 1 "no Python of 3.11 to 3.13 found; install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv)
or name it: PYTHON=/path/to/python bash colab_setup.sh"
}

supported() { [[ $1 == 3.11 || $1 == 3.12 || $1 == 3.13 ]]; }

has_tpu() { # device ids of jax/_src/hardware_utils.py: Google's vendor id alone would also match its network card
  local device
  [[ -z ${COLAB_TPU_ADDR:-}${TPU_NAME:-} ]] || return 0
  compgen -G '/dev/accel[0-9]*' >/dev/null && return 0
  [[ -e /dev/vfio ]] || return 1
  for device in /sys/bus/pci/devices/*; do
    grep -qs 0x1ae0 "$device/vendor" && grep -qsE '0x00(27|56|5e|62|63|6f|76)' "$device/device" && return 0
  done
  return 1
}

jax_requirement() {
  local extras=()
  if [[ $extra == formats ]]; then # rating is on the CPU
    echo jax
    return
  fi
  if has_tpu || [[ -n ${TPU_COMPILER:-} ]]; then extras+=(tpu); fi
  if nvidia-smi -L >/dev/null 2>&1; then extras+=(cuda12); fi
  if [[ ${#extras[@]} -eq 0 ]]; then echo jax; else (IFS=, && echo "jax[${extras[*]}]"); fi
}

# ---------------------------------------------------------------- elsewhere than Colab: .venv

# The stamp records what .venv was built from, or "unfinished" during the installation, so that a killed installation is not
# trusted. Line 1: the Python and the folder (if they change, .venv is rebuilt). Line 2: what is installed. Line 3: the extra of
# pyproject.toml; "test" includes "notebooks", which includes "formats".
setup_venv() {
  local stamp=.venv/setup-stamp had=() made jax installed size="1.9 GB"
  choose_python
  jax=$(jax_requirement)
  made="Python $version $base in $PWD"
  installed="$jax ${PIP_CONSTRAINT:-} $(cksum <pyproject.toml)"
  python=$PWD/.venv/bin/python
  if [[ -e $stamp ]]; then
    mapfile -t had <"$stamp"
  elif [[ -d .venv && -n $(ls -A .venv) ]]; then
    fail 2 "$PWD/.venv was not made by this script; rename or remove it and run this again"
  fi
  case "$extra in ${had[2]:-}" in
    "formats in notebooks" | "formats in test") had[1]=$installed ;; # rating works with any of them
    "$extra in $extra" | "notebooks in test") ;;
    *) had[1]="" ;;
  esac
  if [[ ${had[0]:-} == "$made" && ${had[1]} == "$installed" ]] && "$python" -c '' 2>/dev/null; then
    [[ $extra == formats ]] || say ".venv is up to date (Python $version)"
    return
  fi
  if [[ ${had[0]:-} != "$made" ]] || ! "$python" -m pip --version >/dev/null 2>&1; then
    make_venv "$stamp" "${had[0]:-}"
  fi
  echo unfinished >"$stamp"
  [[ $extra != formats ]] || size="1.5 GB"
  say "installing $jax and percepiano_ast[$extra] into .venv (about $size on disk, one or two minutes)"
  pip_install -e ".[$extra]" "$jax" || fail 1 "pip could not install the requirements; its last lines are above"
  printf '%s\n' "$made" "$installed" "$extra" >"$stamp"
}

make_venv() { # make_venv STAMP OLD-CONTENT
  rm -rf .venv.old
  if [[ -n $2 ]]; then
    say "the existing .venv is unfinished, was moved or has another Python: rebuilding it"
    mv .venv .venv.old # one step, so that a kill leaves no .venv without its stamp
    rm -rf .venv.old
  fi
  say "creating .venv with Python $version ($base)"
  mkdir -p .venv
  echo unfinished >"$1"
  quietly "$base" -m venv .venv || fail 1 "$base could not create .venv; its last lines are above"
}

# ---------------------------------------------------------------- Colab: the running Python, no version changes

installed_versions() { # NAME==VERSION of everything installed, as pip constraints
  "$python" - <<'PY'
from importlib.metadata import distributions
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

seen = {}
for found in distributions():  # in the order of sys.path: the first of two copies is the one that is imported
    try:
        Version(found.version)
    except InvalidVersion:  # the operating system's own, without a Python version: pip cannot move it either
        continue
    seen.setdefault(canonicalize_name(found.name), found.version)
print("\n".join(f"{name}=={version}" for name, version in sorted(seen.items())))
PY
}

wanting() { # requirements of the extra that are not installed; fails if an installed version is too old
  "$python" - "$extra" <<'PY'
import sys, tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def requirements(lines):
    for requirement in map(Requirement, lines):
        if requirement.name != project["name"]:
            yield requirement
        for extra in sorted(requirement.extras) * (requirement.name == project["name"]):
            yield from requirements(project["optional-dependencies"][extra])


for requirement in requirements(project["dependencies"] + [f"{project['name']}[{sys.argv[1]}]"]):
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        print(requirement)
        continue
    if found not in requirement.specifier:
        sys.exit(f"{requirement} is needed, this runtime has {found}: choose Colab's latest runtime version")
PY
}

tfds_loads() { "$python" -c 'import tensorflow_datasets as tfds; tfds.core' >/dev/null 2>&1; }

setup_colab() {
  local before=$log.before lines line missing=() gcsfs="" moved
  python=$(type -P python3) || fail 1 "this says it is Colab (COLAB_RELEASE_TAG) and has no python3"
  read -r version _ <<<"$(probe "$python")" || true
  supported "$version" || fail 1 "Python 3.11 to 3.13 is needed, Colab has $version: choose its latest runtime version"
  installed_versions >"$before"
  lines=$(wanting) || fail 1 "nothing was installed"
  while IFS= read -r line; do
    case $line in
      '') ;;
      gcsfs*) gcsfs=$line ;;
      *) missing+=("$line") ;;
    esac
  done <<<"$lines"
  if [[ ${#missing[@]} -gt 0 ]]; then
    say "installing the packages that this runtime lacks, changing no version: ${missing[*]}"
    pip_install -c "$before" "${missing[@]}" || fail 1 "pip could not install these; its last lines are above"
  fi
  if [[ -n $gcsfs ]] && ! pip_install -c "$before" "$gcsfs" 2>/dev/null; then # each release wants its own fsspec
    say "gcsfs is left out, pip says: $(grep -m 1 ERROR "$log" | cut -c 1-80) ... It is optional: HTTPS serves as well."
  fi
  if ! (cd / && "$python" -c "import percepiano_ast as p; assert p.__file__.startswith('''$PWD/''')" 2>/dev/null); then
    pip_install --no-deps -e . || fail 1 "pip could not install this package; its last lines are above"
  fi
  installed_versions >"$before.now"
  moved=$(grep -vxFf "$before.now" "$before" || true) # versions that were replaced: numpy, jax, any
  [[ -z $moved ]] || fail 1 "the installation replaced packages of this runtime: ${moved//$'\n'/, }.
Runtime > Disconnect and delete runtime undoes it; please report this."
  if ! tfds_loads; then
    say "tensorflow_datasets does not import here (tfds.core): replacing tensorflow-metadata by 1.17.2, nothing else"
    pip_install --no-deps tensorflow-metadata==1.17.2 && tfds_loads ||
      fail 1 "tensorflow_datasets still does not import; see: python3 -c 'import tensorflow_datasets as tfds; tfds.core'"
  fi
}

# ---------------------------------------------------------------- FluidSynth and soundfonts

# Without recommended packages, which include a desktop program and another soundfont of 120 MB.
setup_sound() {
  local wanted=(fluidsynth timgm6mb-soundfont fluidr3mono-gm-soundfont musescore-general-soundfont-small)
  local missing=() package command as_root=(env)
  if ! type -P apt-get >/dev/null; then
    say "no apt-get here: to render MIDI, install FluidSynth (macOS: brew install fluid-synth) and .sf2/.sf3 soundfonts"
    return
  fi
  for package in "${wanted[@]}"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  command="apt-get update && apt-get install --no-install-recommends ${missing[*]}"
  if [[ $(id -u) -ne 0 ]]; then
    if ! sudo -n true 2>/dev/null; then
      say "to render MIDI with soundfonts (not needed by the demo) run: sudo sh -c '$command'"
      return
    fi
    as_root=(sudo -n env)
  fi
  say "installing ${missing[*]} with apt (about 60 MB)"
  as_root+=(DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -q)
  as_root+=(-o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=60)
  quietly "${as_root[@]}" update || say "apt-get update failed (above); trying with the existing package lists"
  quietly "${as_root[@]}" install -y --no-install-recommends "${missing[@]}" ||
    say "apt-get failed (above): MIDI cannot be rendered with soundfonts until this has run: $command"
}

# ---------------------------------------------------------------- the closing table

table() {
  # Without CI, under which pyfluidsynth prints a line of its own.
  env -u CI XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3 "$python" -P - <<'PY'
import glob, importlib.util, logging, os, pkgutil, platform, shutil, sys, warnings
from importlib.metadata import version

MODULES = """jax flax.linen optax safetensors numpy scipy.stats sklearn pandas soundfile soxr librosa mido
    typer grain array_record.python.array_record_module matplotlib.pyplot nbclient nbformat ipykernel percepiano_ast"""
STACK = "jax jaxlib flax optax safetensors grain tensorflow-datasets librosa numpy scipy scikit-learn"
on_colab = "COLAB_RELEASE_TAG" in os.environ
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


def attempt(what, action):
    """Run one import; note whatever goes wrong, so that the table is finished before the script fails."""
    try:
        return action()
    except Exception as error:
        failed.append(f"  {what}: {type(error).__name__}: {error}".splitlines()[0])


failed = []
for name in MODULES.split():
    attempt(name, lambda: importlib.import_module(name))
attempt("tensorflow_datasets", lambda: importlib.import_module("tensorflow_datasets").core)  # import alone can lie
if not on_colab or importlib.util.find_spec("gcsfs"):
    attempt("gcsfs", lambda: importlib.import_module("gcsfs"))
if "percepiano_ast" in sys.modules:
    for found in pkgutil.walk_packages(sys.modules["percepiano_ast"].__path__, "percepiano_ast."):
        if not found.name.endswith(".__main__"):
            attempt(found.name, lambda: importlib.import_module(found.name))
try:
    devices = ", ".join(f"{d.platform} {d.device_kind}" for d in importlib.import_module("jax").devices())
except (ImportError, RuntimeError) as error:  # RuntimeError: a TPU that the notebook itself holds cannot be asked
    devices = f"not free ({str(error).splitlines()[0]})"
try:
    importlib.import_module("fluidsynth")  # ImportError too when the C library is missing
    synth = "found"
except ImportError:
    synth = "not found: no rendering with soundfonts (the demo needs none)"
fonts = {os.path.basename(os.path.realpath(font)) for font in glob.glob("/usr/share/sounds/sf[23]/*.sf[23]")}
pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
rows = {
    "Python": f"{platform.python_version()} ({sys.executable})",
    "versions": attempt("versions", lambda: ", ".join(f"{name} {version(name)}" for name in STACK.split())),
    "devices": devices,
    "disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free",
    "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf(pages) / 1e9:.1f} GB free",
    "FluidSynth": synth,
    "soundfonts": ", ".join(sorted(fonts)) or "none",
    "imports": f"{len(failed)} FAILED" if failed else "all work",
}
print("\n".join(f"  {name:<11} {value}" for name, value in rows.items()))
if failed:
    way_out = "Runtime > Disconnect and delete runtime" if on_colab else "rm -rf .venv"
    print("colab_setup.sh: not everything imports:", *failed, sep="\n", file=sys.stderr)
    sys.exit(f"Way out: {way_out}, then run this again.")
PY
}

# ---------------------------------------------------------------- main

mode=${1:-} extra=notebooks # of pyproject.toml
[[ $# -eq 0 ]] || shift
case $mode in
  '' | demo) [[ $# -eq 0 ]] || { usage >&2; fail 2 "unexpected argument '$1'"; } ;;
  test) extra=test ;;
  rate) [[ $# -gt 0 ]] && extra=formats || { usage >&2; fail 2 "rate: no FILE given; name a recording or a folder of recordings"; } ;;
  help | -h | --help) usage; exit 0 ;;
  *) usage >&2; fail 2 "unknown argument '$mode'" ;;
esac
[[ ${PYTHON:-} != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
export PIP_DISABLE_PIP_VERSION_CHECK=1
version="" base="" python=""
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log

setup() { if [[ -n ${COLAB_RELEASE_TAG:-} ]]; then setup_colab; else setup_venv; fi; }

if [[ $mode == rate ]]; then # standard output is for the ratings; FILE is relative to the caller's folder
  setup >&2
  cd "$called_from"
  "$python" -P -m percepiano_ast rate "$@"
  exit
fi
setup
setup_sound
table
percepiano=$(dirname "$python")/percepiano
[[ -x $percepiano ]] || percepiano=percepiano
case $mode in
  '') say "ready. Next: $percepiano rate FILE --html page.html" ;;
  demo)
    "$python" -m percepiano_ast notebooks --preset demo --out runs/demo
    say "to rate a recording: $percepiano rate FILE --html page.html"
    ;;
  test)
    # Used by tests/test_style.py. Bounded, unlike pyproject.toml, because each release has new rules; not on Colab, where no
    # version changes.
    [[ -n ${COLAB_RELEASE_TAG:-} ]] || pip_install 'ruff>=0.17.6,<0.18' 'mypy>=2.4.1,<2.5' ||
      say "ruff and mypy could not be installed: tests/test_style.py is skipped"
    # A file stays in one process, so that its shared fixtures are built once.
    "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
    ;;
esac

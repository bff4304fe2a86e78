"""Pinned outputs: features, ratings, shards, training, evaluation and encoders give the values in
tests/golden. Cost: 85 s.

``python tests/test_golden.py --write`` replaces all pinned outputs by those of this environment;
``--digests`` adds the digests of this environment if its values are the pinned ones.

Values are compared everywhere, with tolerances. The bits of shards and of trained parameters depend
on the libraries and on the CPU: `digests.json` holds their SHA-256 by environment, and they are
compared where the environment is listed.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import re
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

import conftest  # noqa: F401 (sets JAX's variables when this file is run by itself)
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from percepiano_ast.audio import fbank

# All that is used of the package.
from percepiano_ast.cli import main
from percepiano_ast.config import KALDI, FrontEnd, ModelConfig
from percepiano_ast.data.demo import write_example, write_maestro, write_percepiano
from percepiano_ast.data.shards import read_manifest
from percepiano_ast.models.ast import Classifier
from percepiano_ast.models.heads import RatingModel
from percepiano_ast.models.ssast import SSAST
from percepiano_ast.models.transcription import STEP, TranscriptionModel, on_steps
from percepiano_ast.models.weights import adapt_pos_embed
from percepiano_ast.music.midi import read_midi, trimmed
from percepiano_ast.music.performance_features import performance_features
from percepiano_ast.music.piano_roll import (
    FramePredictions,
    FrameTargets,
    frame_targets,
    frame_times,
    frames_to_notes,
)
from percepiano_ast.music.score import read_score as read_score
from percepiano_ast.music.score_features import score_features as describe_by_score
from percepiano_ast.training.checkpoints import open_latest

FOLDER = Path(__file__).parent / "golden"
RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results"
CLIPS = ("OdeToJoy_8bars_0_1", "LaFolia_8bars_0_1", "Moonlight_8bars_0_1")
DECODED = "decoded"  # the first clip, decoded from perfect frame-wise predictions
MIDI, SCORES = "virtuoso/data/all_2rounds", "virtuoso/data/score_midi"
PRETRAININGS = ("ssast", "transcription")
NUMBER = r"-?\d+(?:\.\d+)?"


def percepiano(*arguments) -> str:
    """Run a command in this process; returns its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main([str(argument) for argument in arguments]) == 0
    return output.getvalue()


# --- Computation --------------------------------------------------------------------------------


def make_demo(home: Path) -> Path:
    """Recordings, MIDI and ratings of the demo, and their shards; returns ``home``.

    Fewer recordings and performers than the preset demo has, so that it is quick: one per tune.
    """
    write_maestro(home / "maestro.zip", recordings_per_tune=1)
    write_percepiano(home / "source", performers=1)
    run = ("--preset", "demo", "--out", home / "run")
    percepiano("preprocess", *run, "--source", home / "maestro.zip", "--workers", 2)
    percepiano("preprocess", *run, "--percepiano", home / "source")
    return home


def compute_features(home: Path) -> pd.DataFrame:
    """All handcrafted features, one row each, with a column per clip."""
    source = home / "source"
    audio = pd.read_csv(home / "run" / "percepiano" / "classic_features.csv", index_col="clip")
    audio = audio.drop(columns="synthesizer")
    columns = {}
    for clip in (*CLIPS, DECODED):
        name = CLIPS[0] if clip == DECODED else clip
        performance = trimmed(read_midi(source / MIDI / f"{name}.mid"))
        if clip == DECODED:
            front_end = FrontEnd()
            count = STEP * (
                front_end.n_frames(int((performance.duration + 1) * front_end.sample_rate)) // STEP
            )
            targets = FrameTargets(
                *(values[None] for values in frame_targets(performance, 0, count, front_end))
            )
            steps = {
                key: np.asarray(values)[0]
                for key, values in on_steps(targets).items()
                if key in FramePredictions._fields
            }
            performance = trimmed(
                frames_to_notes(
                    FramePredictions(
                        **steps,
                        times=frame_times(0, count, front_end).reshape(-1, STEP).mean(axis=1),
                    )
                )
            )
        score = read_score(source / SCORES / f"{name.rsplit('_', 2)[0]}_Score_1.mid")
        kinds = {
            "performance": performance_features(performance),
            "score": describe_by_score(performance, score),
        }
        kinds |= {} if clip == DECODED else {"audio": audio.loc[clip].to_dict()}
        columns[clip] = {
            (kind, name): value for kind, values in kinds.items() for name, value in values.items()
        }
    return pd.DataFrame(columns).rename_axis(["kind", "feature"]).reindex(list(columns[CLIPS[0]]))


def compute_ratings(home: Path) -> dict:
    """What ``rate --json`` prints of two recordings, without and with the score."""
    files = [write_example(home, name) for name in ("example", "second example")]
    score = home / "source" / SCORES / "OdeToJoy_8bars_Score_1.mid"
    printed = {
        "alone": percepiano("rate", "--json", *files),
        "score": percepiano("rate", "--json", *files, "--score", score),
    }
    found = {name: json.loads(text) for name, text in printed.items()}
    for one in (one for ratings in found.values() for one in ratings):
        one["file"] = Path(one["file"]).name
    return found


def digest_of_ratings(ratings: dict) -> dict[str, str]:
    return {given: sha256(json.dumps(many).encode()) for given, many in ratings.items()}


def compute_data(home: Path) -> tuple[dict, dict[str, str]]:
    """Facts of both data sets, and the digest of each of their files."""
    facts, digests = {}, {}
    for name in ("maestro", "percepiano"):
        folder = home / "run" / name
        manifest = read_manifest(folder)  # without its own checksum, which covers the others
        digests |= {f"{name}/{file}": known["sha256"] for file, known in manifest["files"].items()}
        assert digests == digests | {
            f"{name}/{file}": sha256((folder / file).read_bytes()) for file in manifest["files"]
        }
        shards = folder / manifest["data_set"] / manifest["version"]
        description = json.loads((shards / "dataset_info.json").read_text())
        for split in description["splits"]:
            del split["numBytes"]  # of compressed codes
        recordings = [
            one
            for path in sorted(folder.glob("records/*"))
            for one in json.loads(path.read_text())["recordings"]
        ]
        facts[name] = {
            "manifest": manifest | {"files": list(manifest["files"])},
            "settings": json.loads((folder / "settings.json").read_text()),
            "description": description,
            "metadata": json.loads((shards / "metadata.json").read_text()),
            "features": json.loads((shards / "features.json").read_text()),
            "recordings": {
                one["key"]: {
                    "n_frames": one["n_frames"],
                    "mean_db": one["sum_db"] / one["count"],
                    "power_db": one["sum_squared_db"] / one["count"],
                    "at_floor": one["at_floor"] / one["count"],
                    "at_ceiling": one["at_ceiling"] / one["count"],
                }
                for one in recordings
            },
        }
        facts[name]["tables"] = {
            path.name: (
                pd.read_csv(path)
                .drop(columns="sha256", errors="ignore")
                .astype(object)
                .values.tolist()
            )
            for path in sorted(folder.glob("*.csv"))
            if path.name != "classic_features.csv"
        }
    return json.loads(json.dumps(facts)), digests


def compute_training(home: Path) -> tuple[dict, dict[str, str]]:
    """Histories of short runs and their predictions, and the digests of histories and
    parameters."""
    run = ("--preset", "demo", "--out", home / "run")
    facts, digests = {}, {}
    for name in PRETRAININGS:
        percepiano("pretrain", *run, "--pretraining", name, "--epochs", 2, "--batch-size", 8)
        folder = home / "run" / "pretrain" / name
        facts[name], digests[f"{name}/history"] = history(folder / "history.csv")
        digests[f"{name}/params"] = parameters(folder / "checkpoints")
    percepiano("finetune", *run, "--init", "ssast", "--epochs", 3)
    (model,) = (home / "run" / "finetune").iterdir()
    folds = [path for path in sorted(model.iterdir()) if path.is_dir()]
    for fold in folds:
        facts[fold.name], digests[f"{fold.name}/history"] = history(fold / "history.csv")
    digests[f"{folds[0].name}/params"] = parameters(folds[0] / "model")
    predictions = home / "run" / f"predictions_{model.name}.csv"
    digests["predictions"] = sha256(predictions.read_bytes())
    table = pd.read_csv(predictions)
    facts["predictions"] = {"columns": list(table.columns), "rows": len(table)}
    for name, column in (("mean", "dimension"), ("of clips", "clip")):
        facts["predictions"][name] = table.groupby(column)["prediction"].mean().to_dict()
    return facts, digests


def history(path: Path) -> tuple[dict[str, list[float]], str]:
    """The columns of a history that two runs have alike, and their digest."""
    rows = pd.read_csv(path, dtype=str)
    rows = rows.drop(columns=["seconds", "clips_per_second", "mfu", "input_wait"], errors="ignore")
    # Accuracy counts patches whose logits hardly differ this early in training: its digits are in
    # the digest only.
    values = {
        name: [*map(float, column)]
        for name, column in rows.items()
        if not name.endswith("accuracy")
    }
    return values, sha256(rows.to_csv(index=False).encode())


def parameters(checkpoints: Path) -> str:
    """Digest of names, shapes and bits of the parameters in the newest checkpoint."""
    tree = open_latest(checkpoints, made_by="")[0]
    leaves = jax.tree_util.tree_leaves_with_path(
        tree["state"]["params"] if "state" in tree else tree["params"]
    )
    parts = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode()
        + np.asarray(leaf).tobytes()
        for path, leaf in leaves
    ]
    return sha256(b"".join(parts))


def compute_evaluation(home: Path) -> tuple[dict[str, pd.DataFrame], dict[str, list]]:
    """Tables that ``evaluate`` writes of two models, one of them with three seeds, and the numbers
    in its reports' tables."""
    rows = pd.read_csv(RESULTS / "predictions_content.csv.gz")
    kinds = ("ast-mini-transcriptionstem-packaged", "ast-mini-transcriptionstem-notes")
    rows[rows["model"].isin(kinds)].to_csv(home / "predictions.csv", index=False)
    out = home / "evaluation"
    percepiano("evaluate", home / "predictions.csv", "--out", out, "--permutations", 20)
    tables = {path.stem: pd.read_csv(path) for path in sorted(out.glob("*.csv"))}
    return tables, {path.name: numbers(path.read_text()) for path in sorted(out.glob("*.md"))}


def numbers(text: str) -> list[list[float]]:
    """Numbers in the rows of Markdown tables."""
    rows = [
        re.findall(NUMBER, re.sub(r"`[^`]*`", "", line))
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [[float(number) for number in row] for row in rows if row]


def random_params(model, *arguments) -> dict:
    """Parameters that their names and shapes determine."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = (
            np.random.RandomState(zlib.crc32(name.encode())).randn(*leaf.shape).astype(np.float32)
        )
        if name.endswith("['kernel']"):
            return noise * np.float32(np.prod(leaf.shape[:-1]) ** -0.5)
        return np.float32(0.1) * noise + np.float32(name.endswith("['scale']"))

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    )


def compute_encoders() -> dict[str, np.ndarray]:
    """Outputs of the models at the geometries of the parity cases and of the transcribers, with
    random weights."""
    rng = np.random.RandomState(0)
    small, found = ModelConfig("golden", 48, 3, 3, n_frames=128), {}

    def record(name: str, outputs) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
            values = np.asarray(leaf, np.float32).ravel()
            picked = values[np.linspace(0, len(values) - 1, min(len(values), 48)).astype(int)]
            moments = np.array(
                [values.mean(dtype=np.float64), values.std(dtype=np.float64)], np.float32
            )
            found[f"{name}{jax.tree_util.keystr(path)}"] = np.concatenate([picked, moments])

    def log_mel(frame_targets: int, batch: int = 2) -> jax.Array:
        return jnp.asarray(0.5 * rng.randn(batch, frame_targets, 128), jnp.float32)

    def apply(model, params, *arguments):
        return jax.jit(model.apply)({"params": params}, *arguments)

    # Supervised AST, and Hugging Face's with its epsilons.
    overlapping = ModelConfig("golden", 48, 3, 3, stride=(10, 10), n_frames=128)
    for name, epsilons in {
        "ast_small": {},
        "hf_ast_small": {"norm_epsilon": 1e-12, "head_epsilon": 1e-12},
    }.items():
        model, x = Classifier(overlapping, 7, **epsilons), log_mel(128)
        record(name, apply(model, random_params(model, x), x))

    # Masked patches, by the whole encoder and by visible patches only.
    sizes = {
        "ssast_patch_small": (small, 40, 0),
        "ssast_patch_1024_400": (ModelConfig("golden", 32, 2, 2), 400, 0),
        "ssast_tiny_full": (ModelConfig("golden", 192, 12, 3), 400, 0),
        "visible": (small, 40, 1),
    }
    for name, (config, masked, depth) in sizes.items():
        model, x = SSAST(config, decoder_depth=depth), log_mel(config.n_frames, batch=1)
        index = jnp.asarray(rng.permutation(config.num_patches)[None, :masked], jnp.int32)
        outputs, intermediates = apply(model, random_params(model, x, index), x, index)
        record(name, {"outputs": outputs, "tokens": intermediates["tokens"]})

    # A position table cut, interpolated and unchanged.
    before = ModelConfig("golden", 32, 2, 2, n_frames=256)
    params = random_params(Classifier(before, 5), log_mel(256))
    for length, stride in ((100, 10), (400, 10), (256, 16)):
        config, x = (
            ModelConfig("golden", 32, 2, 2, stride=(stride, stride), n_frames=length),
            log_mel(length),
        )
        resized = adapt_pos_embed(params, before, config)
        record(
            f"ssast_finetune_pos T{length}s{stride}", {"pos_embed": resized["encoder"]["pos_embed"]}
        )
        for pool in ("mean", "prefix"):
            logits = apply(Classifier(config, 5, pool), resized, x)[0]
            record(f"ssast_finetune_pos T{length}s{stride} {pool}", logits)

    # Ratings, and transcription with patches of two frames and with convolutions before patches of
    # four.
    x, valid = log_mel(128), jnp.arange(128)[None, :] < jnp.array([[128], [70]])
    record(
        "rater", apply(RatingModel(small), random_params(RatingModel(small), x, valid), x, valid)[0]
    )
    for name, cut in {
        "transcription": {"frames": 2},
        "transcriptionstem": {"frames": 4, "stem": (4, 8, 12)},
    }.items():
        model, x = TranscriptionModel(small.cut(**cut)), log_mel(128)
        outputs = apply(model, random_params(model, x), x)[0]
        # the pinned file has earlier names of two outputs
        for old, new in {"down": "frame", "sounding": "sustained"}.items():
            outputs[old] = outputs.pop(new)
        record(name, outputs)

    seconds = np.arange(16_000) / 16_000
    record(
        "fbank_kaldi",
        fbank(np.float32(0.3 * np.sin(880 * np.pi * seconds**2) + 0.01 * rng.randn(16_000)), KALDI),
    )
    return found


# --- Pinned files -------------------------------------------------------------------------------


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def environment() -> str:
    """What the bits of results depend on."""
    libraries = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "numpy",
        "scipy",
        "librosa",
        "soundfile",
        "pandas",
        "scikit-learn",
    )
    libraries += ("tensorflow-datasets", "array_record", "grain")
    cpu = np.show_config(mode="dicts")["SIMD Extensions"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [
        platform.machine(),
        "+".join([*cpu["baseline"], *cpu["found"]]),
        f"{cores} cores",
        *platform.libc_ver(),
    ]
    return ", ".join([*parts, *(f"{name} {version(name)}" for name in libraries)])


def read_json(name: str):
    return json.loads((FOLDER / name).read_text())


def write_json(name: str, value) -> None:
    (FOLDER / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_digests() -> dict[str, dict[str, str]]:
    path = FOLDER / "digests.json"
    return read_json(path.name) if path.exists() else {}


def write_tables(tables: dict[str, pd.DataFrame]) -> None:
    for name, table in tables.items():
        text = table.to_csv(index=False, float_format="%.6f", lineterminator="\n")
        (FOLDER / f"evaluation_{name}.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


# --- Comparison ---------------------------------------------------------------------------------


def differences(found, pinned, rtol: float, atol: float, at: str = "") -> list[str]:
    """Where two nested values differ: numbers by more than the tolerance, everything else at
    all."""
    if isinstance(found, dict) and isinstance(pinned, dict) and list(found) == list(pinned):
        return [
            line
            for key in pinned
            for line in differences(found[key], pinned[key], rtol, atol, f"{at}/{key}")
        ]
    if isinstance(found, list) and isinstance(pinned, list) and len(found) == len(pinned):
        pairs = enumerate(zip(found, pinned))
        return [
            line
            for number, pair in pairs
            for line in differences(*pair, rtol, atol, f"{at}/{number}")
        ]
    is_number = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in (found, pinned)
    )
    if (
        found == pinned
        or is_number
        and np.isclose(found, pinned, rtol=rtol, atol=atol, equal_nan=True)
    ):
        return []
    return [f"{at}: {found!r}, pinned {pinned!r}"]


def check(found, pinned, rtol: float, atol: float) -> None:
    wrong = differences(found, pinned, rtol, atol)
    assert not wrong, "\n".join([f"{len(wrong)} values differ:", *wrong[:20]])


def check_digests(found: dict[str, str], part: str) -> None:
    listed = read_digests().get(environment())
    if listed is None:
        pytest.skip(f"no digests of this environment: {environment()}")
    assert found == listed[part]


# Audio features are float32, with thresholds and quantiles: librosa 0.11 and 1.0 differ by up to
# 0.3 %. Frame-wise targets are float32 too. All other features are double precision.
TOLERANCES = {"performance": 1e-9, "score": 1e-9, "audio": 5e-3, DECODED: 1e-5}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def data(demo) -> tuple[dict, dict[str, str]]:
    return compute_data(demo)


@pytest.fixture(scope="module")
def training(demo) -> tuple[dict, dict[str, str]]:
    return compute_training(demo)


def test_features(demo):
    found, pinned = (
        compute_features(demo),
        pd.read_csv(FOLDER / "features.csv").set_index(["kind", "feature"]),
    )
    assert list(found.index) == list(pinned.index) and list(found.columns) == list(pinned.columns)
    assert found.groupby("kind").size().to_dict() == {"audio": 397, "performance": 87, "score": 130}
    for kind, rows in found.groupby("kind"):
        for clip in rows:
            tolerance = TOLERANCES[DECODED if clip == DECODED else kind]
            check(
                rows[clip].to_dict(),
                pinned.loc[kind, clip].set_axis(rows.index).to_dict(),
                tolerance,
                tolerance,
            )


@pytest.fixture(scope="module")
def ratings(demo) -> dict:
    return compute_ratings(demo)


def test_ratings(ratings):
    """With Colab's versions, ratings differ by 0.0005 from those with the newest, and percentiles,
    which are ranks, by 3."""
    for given, pinned in read_json("ratings.json").items():
        for found, one in zip(ratings[given], pinned, strict=True):
            check(found["percentiles"], one["percentiles"], rtol=0, atol=5)
            check(found | {"percentiles": {}}, one | {"percentiles": {}}, rtol=0, atol=1e-3)


def test_bits_of_ratings(ratings):
    check_digests(digest_of_ratings(ratings), "ratings")


def test_facts_of_shards(data):
    check(data[0], read_json("data.json"), rtol=1e-3, atol=1e-3)


def test_bits_of_shards(data):
    check_digests(data[1], "data")


@pytest.mark.slow
def test_training(training):
    # una_corda_r, near 0, differs by 1.3e-4 between two versions of jaxlib: their mean is pinned
    check(training[0], read_json("training.json"), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_bits_of_training(training):
    check_digests(training[1], "training")


@pytest.mark.slow
def test_evaluation(tmp_path):
    tables, reports = compute_evaluation(tmp_path)
    pinned = {path.name: pd.read_csv(path) for path in FOLDER.glob("evaluation_*.csv.gz")}
    assert {f"evaluation_{name}.csv.gz" for name in tables} == set(pinned)
    for name, table in tables.items():
        expected = pinned[f"evaluation_{name}.csv.gz"]
        check({name: table.to_dict("list")}, {name: expected.to_dict("list")}, rtol=0, atol=2.1e-6)
    check(reports, read_json("evaluation_reports.json"), rtol=0, atol=0.0101)


@pytest.mark.slow
def test_encoders():
    found = compute_encoders()
    with np.load(FOLDER / "encoders.npz") as pinned:
        assert set(found) == set(pinned)
        for name, values in found.items():
            tolerance = 1e-3 if name == "fbank_kaldi" else 1e-5
            np.testing.assert_allclose(
                values, pinned[name], rtol=tolerance, atol=tolerance, err_msg=name
            )


def write(only_digests: bool) -> None:
    """Compute everything and write tests/golden, or only the digests of this environment."""
    with tempfile.TemporaryDirectory() as folder:
        demo = make_demo(Path(folder))
        features, (facts, bits) = compute_features(demo), compute_data(demo)
        ratings, (histories, trained) = compute_ratings(demo), compute_training(demo)
        tables, reports = compute_evaluation(demo)
    known = read_digests() if only_digests else {}
    write_json(
        "digests.json",
        known
        | {
            environment(): {
                "data": bits,
                "training": trained,
                "ratings": digest_of_ratings(ratings),
            }
        },
    )
    if only_digests:
        return
    features.reset_index().to_csv(FOLDER / "features.csv", index=False, lineterminator="\n")
    write_json("ratings.json", ratings)
    write_json("data.json", facts)
    write_json("training.json", histories)
    for path in FOLDER.glob("evaluation_*"):
        path.unlink()
    write_tables(tables)
    write_json("evaluation_reports.json", reports)
    np.savez_compressed(FOLDER / "encoders.npz", **compute_encoders())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--write", action="store_true", help="replace all pinned outputs")
    chosen.add_argument(
        "--digests", action="store_true", help="add the digests of this environment"
    )
    write(parser.parse_args().digests)

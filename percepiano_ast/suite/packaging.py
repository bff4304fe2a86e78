"""Make the bundled model from rated clips of one loudness: fit it on all of them, and measure its
error on held-out ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast import audio
from percepiano_ast.audio import BED_DB, JITTER_DB, LOUDNESS
from percepiano_ast.data import percepiano
from percepiano_ast.data.percepiano import read_json
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import metrics, predictions
from percepiano_ast.files import claim_directory, echo
from percepiano_ast.inference import rate, regressors
from percepiano_ast.inference.regressors import RegressorEnsemble, pack
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES
from percepiano_ast.suite.heard import hear
from percepiano_ast.suite.judged import SCORE, Material, material_of
from percepiano_ast.suite.rated import Rated
from percepiano_ast.suite.rating import percepiano_source, rated_clips_of
from percepiano_ast.suite.run import Run, start_of

# Features of each set of regressors.
SETS = {"alone": ("notes", "sound"), "score": ("notes", "sound", "score")}
# a twentieth of the size of the forest of `judge`
FOREST = {"n_estimators": 75, "min_samples_leaf": 10}
LEAST_DB = 1.0  # deviation of a level: below it are the bed of noise, rounding and compression
PROTOCOL = "content"
# Protocols whose errors the calibration and the uncertainty are fitted on: the music of a user is
# not that of the training.
WORKS = ("composition", "movement")
LICENCE = "CC BY-NC-SA 4.0"


def package(
    run: Run,
    init: str,
    to: str | Path = rate.BUNDLED,
    *,
    folder: str = "",
    source: str = "",
    log: Callable[[str], None] = echo,
) -> Path:
    """Make the model file ``to``, its card beside it (``.md``) and, in the run, the predictions of
    held-out clips.

    The regressors are fitted without each fold of the protocols ``content``, ``composition`` and
    ``movement``, for the figures on the card, and then on all renderings, for the file. The
    synthesizer ``unseen`` is left out of the former and included in the latter; its variants
    (``NAME+livingroom``) are for the uncertainty alone. Interrupted, it resumes after the last
    fold.

    Args:
        run: with rated clips made by ``preprocess --one-loudness``.
        init, folder, source: the encoder, PercePiano's folder, and the encoder's file, see
            `judged.judge`.

    Raises:
        InputError: clips of differing loudness; see `judged.judge`.
    """
    start = start_of(run, init, source, log)
    rated, shard_set = rated_clips_of(
        run, start, dataclasses.replace(run.preset.finetune, strategy="frozen"), log
    )
    made = read_json(run.percepiano_in(start.front_end) / "settings.json")
    if made.get("loudness") != [LOUDNESS, JITTER_DB, BED_DB]:
        raise InputError(
            f"{run.percepiano_in(start.front_end)}: these clips are as loud as they were played,"
            " but the bundled model rates recordings of any gain. Make them with preprocess"
            " --one-loudness in another directory"
        )
    heard = hear(rated, embed=False)
    settings = {"heard": heard.key, "seed": rated.config.seed, "unseen": rated.config.unseen}
    home = claim_directory(run.root / "packaged", settings)
    material = material_of(rated, heard, percepiano_source(run, folder, log), home, log)
    learned = ~_for_testing(rated, material)
    protocols = [name for name in (PROTOCOL, *WORKS) if name in predictions.protocols(rated.index)]
    judges: dict[str, regressors.CalibratedRegressors] = {}
    tables: dict[str, pd.DataFrame] = {}
    coverage: dict[str, dict[str, list[float]]] = {}
    for name, sets in SETS.items():
        model = f"{start.name}-packaged{SCORE if name == 'score' else ''}"
        held_out = {
            protocol: _held_out(rated, material, sets, protocol, home, log)
            for protocol in protocols
        }
        errors = _Errors(rated, material, held_out)
        for protocol in protocols:
            made_tables = _tables(
                rated, material, held_out[protocol], errors, model, protocol, home
            )
            tables |= {f"{model_name} {protocol}": rows for model_name, rows in made_tables.items()}
        coverage[name] = errors.coverage()
        fitted = _fit(material, sets, learned, rated.config.seed)
        farthest = float(np.quantile(held_out[PROTOCOL].distances[learned], 0.99))
        calibration, deviation = errors.fit(errors.rows)
        judges[name] = regressors.CalibratedRegressors(
            fitted, calibration, _reference(rated), deviation, errors.within(), farthest
        )
    description = _description(
        Path(to).stem, start.name, shard_set.metadata, rated, learned, tables, coverage["alone"]
    )
    path = rate.RatingModelFile(
        rated.listener, heard.described(log).mean, judges, description
    ).write(to)
    path.with_suffix(".md").write_text(card(description, path))
    log(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, r {description['r']['mean']:.3f} on held-out"
        " clips"
    )
    return path


@dataclasses.dataclass(frozen=True, eq=False)
class _HeldOut:
    """Of every rendering, by regressors that were fitted without its fold: their mean (n, 19), and
    the distance from their training clips (n,)."""

    predicted: np.ndarray
    distances: np.ndarray


def _fit(
    material: Material, sets: tuple[str, ...], train: np.ndarray, seed: int
) -> RegressorEnsemble:
    least = {name: np.zeros(material.parts[name].shape[1]) for name in sets}
    levels = [
        name.startswith(("mel_db", "spectral_contrast")) for name in audio.audio_feature_names()
    ]
    least["sound"] = np.where(levels, LEAST_DB, 0.0)
    x, y = material.features(sets)[train], material.ratings[train]
    return RegressorEnsemble(
        pack(
            regressors.fit(
                x, y, seed=seed, forest=FOREST, least=np.concatenate([least[name] for name in sets])
            )
        )
    )


def _held_out(
    rated: Rated, material: Material, sets: tuple[str, ...], protocol: str, home: Path, log
) -> _HeldOut:
    """Predictions of every fold of a protocol; finished folds are read from ``home``."""
    fold = percepiano.fold_of_clip(rated.index, protocol)
    folds, features = (
        np.array([fold.get(clip, -1) for clip in rated.clips.clip]),
        material.features(sets),
    )
    predicted, distances = np.full(material.ratings.shape, np.nan), np.full(len(folds), np.nan)
    for number in sorted(set(fold.values())):
        test, path = folds == number, home / f"held_out_{'_'.join(sets)}_{protocol}_{number}.npz"
        if not path.exists():
            fitted = _fit(
                material, sets, ~test & (folds >= 0) & ~material.unseen, rated.config.seed
            )
            predictions_of_fold = fitted.predict(features[test]).mean(axis=0)
            partial = path.with_suffix(".partial.npz")
            np.savez(
                partial, predicted=predictions_of_fold, distances=fitted.distance(features[test])
            )
            partial.replace(path)
            log(f"{protocol}, {', '.join(sets)}, fold {number}: {test.sum():,} renderings held out")
        with np.load(path) as found:
            predicted[test], distances[test] = found["predicted"], found["distances"]
    return _HeldOut(predicted, distances)


class _Errors:
    """Errors of held-out predictions, and what is fitted on them: calibration, uncertainty,
    coverage.

    They are those of human performances of works that were left out of training, rendered by the
    held-out synthesizer, dry and in a held-out room: a user's music, piano and room were not in
    training either. Where the index has no works or the clips no held-out synthesizer, those of the
    protocol ``content`` or of all renderings are used.
    """

    def __init__(self, rated: Rated, material: Material, held_out: dict[str, _HeldOut]):
        index = rated.index.set_index("clip").loc[rated.clips.clip]
        works = [name for name in WORKS if name in held_out] or [PROTOCOL]
        rows = index["human"].to_numpy() & (material.unseen if material.unseen.any() else True)
        named = (
            "composition"
            if "composition" in index and works == list(WORKS)
            else predictions.fold_column(works[0])
        )
        self.work = index[named].astype(str).to_numpy()  # of each rendering
        self.kinds = _kinds(rated, material)
        # One row per protocol and rendering.
        which = {
            name: np.flatnonzero(rows & np.isfinite(held_out[name].distances)) for name in works
        }
        self.which = np.concatenate(list(which.values()))
        self.predicted = np.concatenate([held_out[name].predicted[which[name]] for name in works])
        self.ratings = material.ratings[self.which]
        self.segment = index["segment"].to_numpy()[self.which]
        self.protocol = np.repeat(works, [len(part) for part in which.values()])
        self.rows = np.ones(len(self.which), bool)

    def fit(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Calibration (2, 19) and standard deviation (19,) on some rows.

        For unknown music the predictions have too large a variance: one slope, common to all
        dimensions, shrinks them towards the mean of people's ratings in these rows. A slope per
        dimension does not transfer from some works to another.
        """
        mean = self.ratings[rows].mean(axis=0)
        aside = self.predicted[rows] - mean
        slope = float((aside * (self.ratings[rows] - mean)).sum() / np.square(aside).sum())
        calibration = np.stack([(1 - slope) * mean, np.full(len(KEYS), slope)])
        return calibration, np.sqrt(
            np.square(calibration[0] + slope * self.predicted[rows] - self.ratings[rows]).mean(
                axis=0
            )
        )

    def uncertainty(self) -> np.ndarray:
        """Of every rendering (n, 19), fitted without its work."""
        without = {
            work: self.fit(self.work[self.which] != work)[1]
            for work in sorted(set(self.work.tolist()))
        }
        return np.stack([without[work] for work in self.work.tolist()])

    def coverage(self) -> dict[str, list[float]]:
        """Shares of errors within one and two standard deviations; calibration and deviation are
        fitted without the work.

        Of all rows, of each held-out condition, and of each work.
        """
        calibrated, deviation = np.zeros_like(self.predicted), np.zeros_like(self.predicted)
        works = self.work[self.which]
        for work in set(works.tolist()):
            calibration, deviation[works == work] = self.fit(works != work)
            calibrated[works == work] = (
                calibration[0] + calibration[1] * self.predicted[works == work]
            )
        errors = np.abs(calibrated - self.ratings) / deviation
        parts = {"all": self.rows} | {
            kind: self.kinds[self.which] == kind for kind in sorted(set(self.kinds[self.which]))
        }
        parts |= {work: works == work for work in sorted(set(works.tolist()))}
        return {
            name: [round(float((errors[rows] <= far).mean()), 3) for far in (1, 2)]
            for name, rows in parts.items()
        }

    def within(self) -> np.ndarray:
        """Standard deviation of the errors within segments, in units of the calibrated ratings,
        (19,).

        Calibrated differences within a segment are too small by a common factor, the slope of the
        ratings on them. The deviation is divided by it, so that calibrated differences can be
        compared with the deviation.
        """
        calibration, _ = self.fit(self.rows)
        group = [
            f"{a} {b} {c}" for a, b, c in zip(self.protocol, self.kinds[self.which], self.segment)
        ]
        calibrated = calibration[0] + calibration[1] * self.predicted
        x, y = (
            values - pd.DataFrame(values).groupby(group).transform("mean").to_numpy()
            for values in (calibrated, self.ratings)
        )
        slope = float((x * y).sum() / np.square(x).sum())
        return np.sqrt(np.square(y - slope * x).sum(axis=0) / (len(x) - len(set(group)))) / slope


def _reference(rated: Rated) -> np.ndarray:
    """People's mean ratings of human performances, ascending for each dimension, (performances,
    19)."""
    human = rated.index.set_index("clip")["human"].loc[rated.clips.clip].to_numpy()
    return np.sort(
        pd.DataFrame(rated.clips.ratings[human])
        .groupby(rated.clips.clip[human])
        .first()
        .to_numpy(float),
        axis=0,
    )


def _tables(
    rated, material, held_out: _HeldOut, errors: _Errors, model: str, protocol: str, home: Path
) -> dict[str, pd.DataFrame]:
    """Calibrated predictions for the known pianos, their variants and the held-out conditions,
    which are written too."""
    fold, known = percepiano.fold_of_clip(rated.index, protocol), np.isfinite(held_out.distances)
    calibration, _ = errors.fit(errors.rows)
    ratings, deviations, made = (
        calibration[0] + calibration[1] * held_out.predicted,
        errors.uncertainty(),
        {},
    )
    kinds = _kinds(rated, material)
    for kind in sorted(set(kinds)):
        rows, name = (kinds == kind) & known, f"{model}@{kind}" if kind else model
        columns = rated.clips.clip[rows], material.ratings[rows], ratings[rows], deviations[rows]
        made[name] = predictions.to_table((name, protocol, rated.config.seed), fold, *columns)
        predictions.write(made[name], home / f"predictions_{name}_{protocol}.csv.gz")
    return made


def _kinds(rated: Rated, material: Material) -> np.ndarray:
    """Of each rendering: the held-out piano and its variant (``timgm6mb+livingroom``), else the
    variant, such as ``room``; (n,)."""
    variant = np.array(
        [name.partition(percepiano.SEPARATOR)[2] for name in rated.clips.synthesizer], dtype=object
    )
    return np.where(material.unseen, np.array(rated.clips.synthesizer, dtype=object), variant)


def _for_testing(rated: Rated, material: Material) -> np.ndarray:
    """Renderings in a held-out room by the held-out piano, which the model in the file does not
    learn from either, bool (n,)."""
    return material.unseen & ~percepiano.is_plain(rated.clips.synthesizer)


def _description(
    model: str,
    start: str,
    metadata: dict,
    rated: Rated,
    learned: np.ndarray,
    tables: dict[str, pd.DataFrame],
    coverage: dict,
) -> dict:
    """Metadata of file and card."""

    def r(variant: str, protocol: str) -> dict[str, float]:
        if (name := f"{start}-packaged{variant} {protocol}") not in tables:
            return {}
        values = metrics.metric_table(predictions.runs(tables[name], rated.index))
        overall = values[(values["metric"] == "pearson") & (values["scope"] == "overall")]
        return dict(zip(overall["dimension"], overall["value"].round(4).tolist()))

    unseen = rated.config.unseen
    return {
        "model": model,
        "predictions": f"{start}-packaged",
        "data": f"{metadata['licence']}; encoder: see its own card",
        "simulated": metadata["simulated"],
        "clips": int(rated.index["clip"].nunique()),
        "performances": int(rated.index["human"].sum()),
        "pianos": sorted(set(np.array(rated.clips.synthesizer)[learned].tolist())),
        "descriptors": list(PERFORMANCE_FEATURES),
        "loudness": [LOUDNESS, JITTER_DB, BED_DB],
        "protocol": PROTOCOL,
        "unseen": unseen,
        "r": r("", PROTOCOL),
        "r_unseen": r(f"@{unseen}", PROTOCOL),
        "r_room": r("@room", PROTOCOL),
        "r_score": r(SCORE, PROTOCOL),
        "r_works": r("", WORKS[0]),
        "r_works_unseen": r(f"@{unseen}", WORKS[0]),
        "r_works_score": r(SCORE, WORKS[0]),
        "coverage": coverage,
        "licence": LICENCE,
    }


def card(description: dict, path: Path) -> str:
    """The model card: Markdown, with the YAML head that model hubs read."""
    known, works, unseen = description["r"], description["r_works"], description["r_unseen"]

    def mean(name: str) -> str:
        return f"{found['mean']:.2f}" if (found := description[name]) else "not measured"

    rows = "\n".join(
        f"| {one.family}: {one.low} to {one.high} | "
        + " | ".join(f"{r[one.key]:.2f}" if r else "" for r in (known, works, unseen))
        + " |"
        for one in DIMENSIONS
    )
    coverage = "\n".join(
        f"| {name} | {one:.2f} | {two:.2f} |"
        for name, (one, two) in description["coverage"].items()
    )
    return _CARD.format(
        file=path.name,
        size=path.stat().st_size / 1e6,
        clips=f"{description['clips']:,}",
        pianos=", ".join(description["pianos"]),
        loudness=description["loudness"][0],
        jitter=description["loudness"][1],
        bed=description["loudness"][2],
        rows=rows,
        descriptors=len(description["descriptors"]),
        performances=f"{description['performances']:,}",
        coverage=coverage,
        unseen_name=description["unseen"] or "none",
        known=mean("r"),
        room=mean("r_room"),
        unseen=mean("r_unseen"),
        works=mean("r_works"),
        works_unseen=mean("r_works_unseen"),
        scored=mean("r_score"),
        works_scored=mean("r_works_score"),
        load="" if description["model"] == rate.NAME else f'"{path.name}"',
        simulated=(
            "\n**Its ratings were simulated: it says nothing about real playing.**\n"
            if description["simulated"]
            else ""
        ),
        licence_id=description["licence"].lower().replace(" ", "-"),
        **{name: description[name] for name in ("model", "licence", "data", "predictions")},
    )


_CARD = """---
license: {licence_id}
library_name: percepiano_ast
pipeline_tag: audio-classification
tags:
- music
- piano
- music-performance-assessment
- audio-spectrogram-transformer
- jax
datasets:
- PercePiano
- ASAP
metrics:
- pearsonr
---

# {model}: 19 perceptual ratings of a piano performance

`{file}`, {size:.1f} MB, safetensors: no code in it is executed.

```python
import percepiano_ast

rating = percepiano_ast.load_model({load}).rate("take.m4a")
```
{simulated}
A recording is normalised to {loudness:g} LUFS and mixed with faint noise. A transformer of 2.3M parameters transcribes notes and
pedals; the average of ridge regression, kernel ridge and randomised trees on {descriptors} features of the transcription and 397
statistics of the sound gives the ratings. A second set of regressors uses a score, if one is given. The transformer's embedding
is not used.

- **Ratings** are predictions of the mean rating by people, 0 to 1, as PercePiano defines it. They are calibrated on works left out
  of training: one slope takes all predictions towards the mean of people's ratings.
- **Percentiles** are the share of PercePiano's {performances} human performances whose mean rating by people is lower. Deadpan
  renderings of the score are excluded.
- **Uncertainty** is one standard deviation of the error, constant in each dimension, for works, a soundfont and a room that were
  left out of training. It does not depend on the recording: a warning is the sign of an unusual one.
- **Training data**: {clips} clips of three works by Beethoven and Schubert, rendered from PercePiano's MIDI by
  {pianos}, each at {loudness:g} LUFS within {jitter:g} dB, on noise of
  {bed:g} dBFS. {data}.
- **Loudness** of the recording is not used: dynamics are rated by timbre and by the differences within the recording.
- **Intended use**: feedback and research on solo piano recordings.
- **Not for** judging people: no exams, auditions or hiring. **Not a measure of quality**: on 83 learners' performances rated by
  ten people each, "doubtful to convincing" ordered better from worse at chance.
- **Limits**: PercePiano publishes a single recording, so all figures below are of renderings; on a real Disklavier the onset F1 of
  the transcription is 0.74. Other styles, instruments and noisy rooms have not been validated.
- **Licence** {licence}, that of the performances that the encoder was trained on. PercePiano's ratings are MIT-licensed.

## Correlation with people's ratings

Pearson's r, mean over 19 dimensions, on clips held out of training. `{predictions}` is the name in the prediction tables.

| held out | r | with the score |
|---|---|---|
| passages of the training works (`content`) | {known} | {scored} |
| passages, in simulated rooms | {room} | |
| passages, rendered by a held-out soundfont ({unseen_name}) | {unseen} | |
| works (`composition`) | {works} | {works_scored} |
| works, rendered by a held-out soundfont | {works_unseen} | |

| dimension | r, passages | r, works | r, passages on a held-out soundfont |
|---|---|---|---|
{rows}

## Coverage of the uncertainty

Share of errors within one and two standard deviations, human performances of works that neither regressors nor calibration nor
uncertainty were fitted on, rendered by {unseen_name}, dry and in a living room (RT60 0.7 s) that no training uses. The target for
normal errors is 0.68 and 0.95.

| errors of | within 1 SD | within 2 SD |
|---|---|---|
{coverage}

Made by `percepiano package`.
"""

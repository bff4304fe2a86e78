"""Build the bundled model: fitted on all clips, error estimated on held-out ones."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast import audio
from percepiano_ast.audio import BED_DB, JITTER_DB, LOUDNESS
from percepiano_ast.data import percepiano
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import metrics, predictions
from percepiano_ast.files import cached_arrays, lock_config, read_json
from percepiano_ast.inference import rate, regressors, transcribe
from percepiano_ast.inference.regressors import RegressorEnsemble, pack
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES
from percepiano_ast.pipeline.regress import SCORE, RegressionData, regression_data, transcribe_clips
from percepiano_ast.pipeline.run import Run, load_encoder
from percepiano_ast.pipeline.steps import CrossValidation, percepiano_source, rated_clips_of
from percepiano_ast.studies.report import TEMPLATES

logger = logging.getLogger(__name__)

# Features of each set of regressors.
SETS = {"alone": ("notes", "sound"), "score": ("notes", "sound", "score")}
# a twentieth of the forest of `fit_regressors`
FOREST = {"n_estimators": 75, "min_samples_leaf": 10}
LEAST_DB = 1.0  # smaller deviations of a level are noise, rounding and compression
PROTOCOL = "content"
# Calibration and uncertainty are fitted on their errors: a user's music was not in training.
WORKS = ("composition", "movement")
LICENCE = "CC BY-NC-SA 4.0"


def package_model(
    run: Run, init: str, to: str | Path = rate.BUNDLED, *, folder: str = "", source: str = ""
) -> Path:
    """Write the model file ``to``, its card (``.md``) and held-out predictions; resumes by fold.

    For the card, the regressors are fitted without each fold of ``content``, ``composition`` and
    ``movement`` and without the held-out synthesizer; for the file, on all renderings but the
    variants of that synthesizer (``NAME+livingroom``), which serve the uncertainty alone.

    Args:
        run: with rated clips made by ``preprocess --normalize-loudness``.
        init, folder, source: see `fit_regressors`.

    Raises:
        InputError: clips of differing loudness; see `fit_regressors`.
    """
    # --- Clips and features
    start = load_encoder(run, init, source)
    frozen = dataclasses.replace(run.preset.finetune, strategy="frozen")
    rated, metadata = rated_clips_of(run, start, frozen)
    clips = run.percepiano_in(start.front_end)
    if read_json(clips / "settings.json").get("loudness") != [LOUDNESS, JITTER_DB, BED_DB]:
        raise InputError(
            f"{clips} holds clips as loud as they were played. For a model that rates recordings of"
            " any gain, run preprocess --normalize-loudness into another directory"
        )
    transcribed = transcribe_clips(rated, embed=False)
    unseen = frozen.held_out_synthesizer
    settings = {"heard": transcribed.key, "seed": frozen.seed, "unseen": unseen}
    home = lock_config(run.root / "packaged", settings)
    data = regression_data(rated, transcribed, percepiano_source(run, folder), home)
    # The model in the file does not learn from the held-out piano in a held-out room either.
    learned = ~data.unseen | percepiano.is_plain(rated.clips.synthesizer)
    protocols = [name for name in (PROTOCOL, *WORKS) if name in predictions.protocols(rated.index)]
    # People's mean ratings of human performances, ascending, (performances, 19).
    human = rated.index.set_index("clip")["human"].loc[rated.clips.clip].to_numpy()
    known = pd.DataFrame(rated.clips.ratings[human]).groupby(rated.clips.clip[human]).first()
    reference = np.sort(known.to_numpy(float), axis=0)
    # --- Held-out predictions, and regressors on everything
    fitted: dict[str, regressors.CalibratedRegressors] = {}
    tables: dict[tuple[str, str], pd.DataFrame] = {}
    coverage: dict[str, dict[str, list[float]]] = {}
    for name, parts in SETS.items():
        held_out = {
            protocol: _held_out(rated, data, parts, protocol, home) for protocol in protocols
        }
        errors = _Errors(rated, data, held_out)
        calibration, deviation = errors.fit()
        uncertainty = errors.uncertainty()
        for protocol, (predicted, distances) in held_out.items():
            values = calibration[0] + calibration[1] * predicted
            for kind in sorted(set(errors.kinds)):
                suffix = (SCORE if name == "score" else "") + (f"@{kind}" if kind else "")
                rows, model = errors.kinds == kind, f"{start.name}-packaged{suffix}"
                rows &= np.isfinite(distances)
                given = model, rows, values[rows], protocol
                table = rated.table(*given, uncertainty=uncertainty[rows])
                predictions.write(table, home / f"predictions_{model}_{protocol}.csv.gz")
                tables[suffix, protocol] = table
        coverage[name] = errors.coverage()
        fitted[name] = regressors.CalibratedRegressors(
            _fit(data, parts, learned, frozen.seed),
            calibration,
            reference,
            deviation,
            errors.within(),
            float(np.quantile(held_out[PROTOCOL][1][learned], 0.99)),
        )

    # --- File and card
    def r(suffix: str, protocol: str) -> dict[str, float]:
        if (suffix, protocol) not in tables:
            return {}
        values = metrics.metric_table(predictions.runs(tables[suffix, protocol], rated.index))
        overall = values[(values["metric"] == "pearson") & (values["scope"] == "overall")]
        return dict(zip(overall["dimension"], overall["value"].round(4).tolist()))

    description = {
        "model": Path(to).stem,
        "predictions": f"{start.name}-packaged",
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
        "coverage": coverage["alone"],
        "licence": LICENCE,
    }
    mean_features = transcribe.features_of(transcribed.played).mean
    path = rate.RatingModelFile(rated.transcriber, mean_features, fitted, description).write(to)
    path.with_suffix(".md").write_text(card(description, path))
    logger.info(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, r {description['r']['mean']:.3f} on held-out"
        " clips"
    )
    return path


def card(description: dict, path: Path) -> str:
    """The model card: Markdown, with the YAML head that model hubs read."""
    given = {"file": path.name, "bytes": path.stat().st_size, "default": rate.NAME}
    text = TEMPLATES.get_template("card.md.j2").render(description, dimensions=DIMENSIONS, **given)
    return text + "\n"


def _fit(
    data: RegressionData, parts: tuple[str, ...], train: np.ndarray, seed: int
) -> RegressorEnsemble:
    least = {name: np.zeros(data.parts[name].shape[1]) for name in parts}
    levels = [
        name.startswith(("mel_db", "spectral_contrast")) for name in audio.audio_feature_names()
    ]
    least["sound"] = np.where(levels, LEAST_DB, 0.0)
    limits = np.concatenate([least[name] for name in parts])
    x, y = data.features(parts)[train], data.ratings[train]
    return RegressorEnsemble(pack(regressors.fit(x, y, seed=seed, forest=FOREST, least=limits)))


def _held_out(
    rated: CrossValidation, data: RegressionData, parts: tuple[str, ...], protocol: str, home: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (n, 19) without each rendering's fold, and distances from the training clips
    (n,). Finished folds are read from ``home``."""
    folds, features = rated.folds_of(protocol), data.features(parts)
    predicted, distances = np.full(data.ratings.shape, np.nan), np.full(len(folds), np.nan)
    for number in sorted(set(percepiano.fold_of_clip(rated.index, protocol).values())):
        test, path = folds == number, home / f"held_out_{'_'.join(parts)}_{protocol}_{number}.npz"

        def compute(number=number, test=test):
            train = ~test & (folds >= 0) & ~data.unseen
            model = _fit(data, parts, train, rated.config.seed)
            values = model.predict(features[test]).mean(axis=0)
            far = model.distance(features[test])
            logger.info(
                f"{protocol}, {', '.join(parts)}, fold {number}: {test.sum():,} renderings held out"
            )
            return {"predicted": values, "distances": far}

        found = cached_arrays(path, ("predicted", "distances"), compute)
        predicted[test], distances[test] = found["predicted"], found["distances"]
    return predicted, distances


class _Errors:
    """Calibration, uncertainty and coverage, fitted on errors of held-out predictions.

    The errors are of human performances of held-out works by the held-out synthesizer, dry and in a
    held-out room: a user's music, piano and room were not in training either. Without works in the
    index or a held-out synthesizer, the protocol ``content`` or all renderings are used.

    Attributes:
        work, kinds: of each rendering, (n,). A kind is the held-out synthesizer and its variant
            (``timgm6mb+livingroom``), else the variant, such as ``room``.
        which, predicted, ratings, protocol: one row per protocol and rendering.
    """

    def __init__(
        self,
        rated: CrossValidation,
        data: RegressionData,
        held_out: dict[str, tuple[np.ndarray, np.ndarray]],
    ):
        index = rated.index.set_index("clip").loc[rated.clips.clip]
        names = np.array(rated.clips.synthesizer, dtype=object)
        variants = [name.partition(percepiano.SEPARATOR)[2] for name in names]
        self.kinds = np.where(data.unseen, names, np.array(variants, dtype=object))
        works = [name for name in WORKS if name in held_out] or [PROTOCOL]
        by_work = "composition" in index and works == list(WORKS)
        column = "composition" if by_work else predictions.fold_column(works[0])
        self.work = index[column].astype(str).to_numpy()
        rows = index["human"].to_numpy() & (data.unseen if data.unseen.any() else True)
        which = [np.flatnonzero(rows & np.isfinite(held_out[name][1])) for name in works]
        self.which = np.concatenate(which)
        self.predicted = np.concatenate([held_out[w][0][part] for w, part in zip(works, which)])
        self.ratings = data.ratings[self.which]
        self.segment = index["segment"].to_numpy()[self.which]
        self.protocol = np.repeat(works, [len(part) for part in which])

    def fit(self, rows=slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Calibration (2, 19) and standard deviation (19,) on some rows.

        Predictions for unknown music have too large a variance: one slope for all dimensions
        shrinks them towards the mean rating. A slope per dimension does not transfer.
        """
        predicted, ratings = self.predicted[rows], self.ratings[rows]
        mean = ratings.mean(axis=0)
        aside = predicted - mean
        slope = float((aside * (ratings - mean)).sum() / np.square(aside).sum())
        calibration = np.stack([(1 - slope) * mean, np.full(len(KEYS), slope)])
        errors = calibration[0] + slope * predicted - ratings
        return calibration, np.sqrt(np.square(errors).mean(axis=0))

    def uncertainty(self) -> np.ndarray:
        """Of every rendering (n, 19), fitted without its work."""
        works = sorted(set(self.work.tolist()))
        without = {work: self.fit(self.work[self.which] != work)[1] for work in works}
        return np.stack([without[work] for work in self.work.tolist()])

    def coverage(self) -> dict[str, list[float]]:
        """Shares of errors within one and two standard deviations fitted without the work: of all
        rows, of each held-out condition, and of each work."""
        errors, works = np.zeros_like(self.predicted), self.work[self.which]
        kinds, parts = self.kinds[self.which], {"all": np.ones(len(works), bool)}
        parts |= {kind: kinds == kind for kind in sorted(set(kinds))}
        for work in sorted(set(works.tolist())):
            rows = works == work
            (shift, slope), deviation = self.fit(~rows)
            calibrated = shift + slope * self.predicted[rows]
            errors[rows] = np.abs(calibrated - self.ratings[rows]) / deviation
            parts[work] = rows
        return {
            name: [round(float((errors[rows] <= far).mean()), 3) for far in (1, 2)]
            for name, rows in parts.items()
        }

    def within(self) -> np.ndarray:
        """Standard deviation of the errors within segments (19,), divided by the slope of the
        ratings on the predictions there, so that calibrated differences compare with it."""
        calibration, _ = self.fit()
        kinds = self.kinds[self.which]
        group = [f"{a} {b} {c}" for a, b, c in zip(self.protocol, kinds, self.segment)]
        x, y = (
            values - pd.DataFrame(values).groupby(group).transform("mean").to_numpy()
            for values in (calibration[0] + calibration[1] * self.predicted, self.ratings)
        )
        slope = float((x * y).sum() / np.square(x).sum())
        return np.sqrt(np.square(y - slope * x).sum(axis=0) / (len(x) - len(set(group)))) / slope

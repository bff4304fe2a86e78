"""The model that comes along, made from rated clips of one loudness: fitted on all of them, and told by held-out ones how far
it may be trusted."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from percepiano_ast import audio, packaged
from percepiano_ast.audio import BED_DB, JITTER_DB, LOUDNESS
from percepiano_ast.baselines import statistics
from percepiano_ast.baselines.portable import Regressors, pack
from percepiano_ast.config import InputError, say
from percepiano_ast.data import predictions, splits, variants
from percepiano_ast.data.percepiano_files import read_json
from percepiano_ast.descriptors import DESCRIPTORS
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.evaluation import scores, table
from percepiano_ast.suite.heard import hear
from percepiano_ast.suite.judged import SCORE, Material, material_of
from percepiano_ast.suite.rated import Rated
from percepiano_ast.suite.rating import percepiano_source, rated_clips_of
from percepiano_ast.suite.run import Run, start_of

# What each judge is given.
SETS = {"alone": ("notes", "sound"), "score": ("notes", "sound", "score")}
FOREST = {"n_estimators": 75, "min_samples_leaf": 10}  # a twentieth of the size of what `judge` grows
LEAST_DB = 1.0  # deviation of a level: below it is the bed of noise, and what rounding and compression add to it
PROTOCOL = "content"
LICENCE = "CC BY-NC-SA 4.0"


def package(
    run: Run,
    init: str,
    to: str | Path = packaged.SHIPPED,
    *,
    folder: str = "",
    source: str = "",
    log: Callable[[str], None] = say,
) -> Path:
    """Make the model file ``to``, its card beside it (``.md``) and, in the run, the predictions of held-out clips.

    Everything is fitted twice: without each fold of the protocol ``content``, for what is said of its accuracy, and on all
    renderings, those of the ``unseen`` synthesizer too, for the file.

    Args:
        run: with rated clips made by ``preprocess --one-loudness``.
        init, folder, source: the encoder, PercePiano's folder, and the encoder's file, see `judged.judge`.

    Raises:
        InputError: clips of differing loudness; see `judged.judge`.
    """
    start = start_of(run, init, source, log)
    rated, shard_set = rated_clips_of(run, start, dataclasses.replace(run.preset.finetune, strategy="frozen"), log)
    made = read_json(run.percepiano_in(start.front_end) / "settings.json")
    if made.get("loudness") != [LOUDNESS, JITTER_DB, BED_DB]:
        raise InputError(
            f"the clips in {run.percepiano_in(start.front_end)} are as loud as they were played: the packaged model "
            "takes recordings of any gain, make them with preprocess --one-loudness in a directory of its own"
        )
    heard = hear(rated, embed=False)
    home = run.root / "packaged"
    home.mkdir(exist_ok=True)
    material = material_of(rated, heard, percepiano_source(run, folder, log), home, log)
    judges: dict[str, packaged.Judge] = {}
    tables: dict[str, pd.DataFrame] = {}
    for name, sets in SETS.items():
        held_out = _held_out(rated, material, sets, log)
        model = f"{start.name}-packaged{SCORE if name == 'score' else ''}"
        tables |= _tables(rated, material, held_out, model, home)
        every = np.ones(len(material.ratings), bool)
        farthest = float(np.quantile(held_out.distances, 0.99))
        fitted = _fit(material, sets, every, rated.config.seed)
        known, within = _known(rated, held_out), _within(rated, material, held_out)
        judges[name] = packaged.Judge(fitted, known, _spread(material, held_out), within, farthest)
    description = _description(f"{start.name}-packaged", shard_set.metadata, rated, tables)
    path = packaged.Packaged(rated.listener, heard.described(log).unheard, judges, description).write(to)
    path.with_suffix(".md").write_text(card(description, path))
    log(f"{path}: {path.stat().st_size / 1e6:.1f} MB, r {description['r']['mean']:.3f} on held-out clips")
    return path


@dataclasses.dataclass(frozen=True, eq=False)
class _HeldOut:
    """Of every rendering by a model that has not heard its fold: three opinions (3, n, 19), distance from what was heard (n,)."""

    each: np.ndarray
    distances: np.ndarray

    @property
    def ratings(self) -> np.ndarray:
        return self.each.mean(axis=0)


def _fit(material: Material, sets: tuple[str, ...], train: np.ndarray, seed: int) -> Regressors:
    least = {name: np.zeros(material.parts[name].shape[1]) for name in sets}
    levels = [name.startswith(("mel_db", "spectral_contrast")) for name in audio.classic_feature_names()]
    least["sound"] = np.where(levels, LEAST_DB, 0.0)
    floor = np.concatenate([least[name] for name in sets])
    x, y = material.features(sets)[train], material.ratings[train]
    return Regressors(pack(statistics.fit(x, y, seed=seed, forest=FOREST, least=floor)))


def _held_out(rated: Rated, material: Material, sets: tuple[str, ...], log) -> _HeldOut:
    fold = splits.fold_of_clip(rated.index, PROTOCOL)
    folds, features = np.array([fold[clip] for clip in rated.clips.clip]), material.features(sets)
    each, distances = np.zeros((3, *material.ratings.shape)), np.zeros(len(folds))
    for number in sorted(set(folds.tolist())):
        test = folds == number
        fitted = _fit(material, sets, ~test & ~material.unseen, rated.config.seed)
        each[:, test], distances[test] = fitted.predict(features[test]), packaged.distance(fitted, features[test])
        log(f"{', '.join(sets)}, fold {number}: {test.sum():,} renderings held out")
    return _HeldOut(each, distances)


def _tables(rated: Rated, material: Material, held_out: _HeldOut, model: str, home: Path) -> dict[str, pd.DataFrame]:
    """Predictions for the pianos that were heard, for their variants and for the one that was not, which are written too."""
    fold, spread = splits.fold_of_clip(rated.index, PROTOCOL), _spread(material, held_out)
    deviations, made = np.sqrt(spread[0] + spread[1] * held_out.each.var(axis=0)), {}
    for kind in sorted(set(kinds := _kinds(rated, material))):
        rows, name = kinds == kind, f"{model}@{kind}" if kind else model
        said = rated.clips.clip[rows], material.ratings[rows], held_out.ratings[rows], deviations[rows]
        made[name] = predictions.tidy((name, PROTOCOL, rated.config.seed), fold, *said)
        predictions.write(made[name], home / f"predictions_{name}_{PROTOCOL}.csv.gz")
    return made


def _kinds(rated: Rated, material: Material) -> np.ndarray:
    """Of each rendering: the piano that is not learned from, else the variant, such as ``room``, or nothing; (n,)."""
    named = (variants.named(name)[1] for name in rated.clips.synthesizer)
    variant = np.array([one.name if one else "" for one in named], dtype=object)
    return np.where(material.unseen, rated.config.unseen, variant)


def _known(rated: Rated, held_out: _HeldOut) -> np.ndarray:
    """What is said of each clip while it is held out, mean over its renderings, ascending for each dimension (clips, 19)."""
    return np.sort(pd.DataFrame(held_out.ratings).groupby(rated.clips.clip).mean().to_numpy(), axis=0)


def _spread(material: Material, held_out: _HeldOut) -> np.ndarray:
    """Squared errors as a constant and a multiple of the variance between the regressors, both not negative, (2, 19).

    Where there is a piano that was not learned from, its errors alone: a recording is of an instrument that was not either.
    """
    rows = _unlike(material)
    errors, between = np.square(held_out.ratings - material.ratings)[rows], held_out.each.var(axis=0)[rows]
    found = [nnls(np.column_stack([np.ones(len(errors)), between[:, k]]), errors[:, k])[0] for k in range(len(KEYS))]
    return np.array(found).T


def _within(rated: Rated, material: Material, held_out: _HeldOut) -> np.ndarray:
    """Standard deviation of the errors within segments, of renderings as in `_spread`, (19,)."""
    rows = _unlike(material)
    segment = rated.index.set_index("clip")["segment"].loc[rated.clips.clip[rows]].to_numpy()
    errors = pd.DataFrame(held_out.ratings - material.ratings)[rows]
    centred = errors - errors.groupby(segment).transform("mean")
    return np.sqrt(np.square(centred).sum() / (len(errors) - len(set(segment)))).to_numpy()


def _unlike(material: Material) -> np.ndarray:
    """Renderings whose errors are those that a recording must expect, bool (n,)."""
    return material.unseen if material.unseen.any() else np.ones(len(material.unseen), bool)


def _description(model: str, metadata: dict, rated: Rated, tables: dict[str, pd.DataFrame]) -> dict:
    """What goes into file and card."""
    found = {}
    for name, one in tables.items():
        values = scores.evaluate(table.runs(one, rated.index))
        overall = values[(values["metric"] == "pearson") & (values["scope"] == "overall")]
        found[name] = dict(zip(overall["dimension"], overall["value"].round(4).tolist()))
    return {
        "model": model,
        "data": f"{metadata['licence']}; the encoder as its own card says",
        "simulated": metadata["simulated"],
        "clips": int(rated.index["clip"].nunique()),
        "pianos": sorted(set(rated.clips.synthesizer)),
        "descriptors": list(DESCRIPTORS),
        "loudness": [LOUDNESS, JITTER_DB, BED_DB],
        "protocol": PROTOCOL,
        "r": found[model],
        "unseen": rated.config.unseen,
        "r_unseen": found.get(f"{model}@{rated.config.unseen}", {}),
        "r_room": found.get(f"{model}@room", {}),
        "r_score": found[model + SCORE],
        "licence": LICENCE,
    }


def card(description: dict, path: Path) -> str:
    """The model card, Markdown."""
    r, unseen, room = (description[name] for name in ("r", "r_unseen", "r_room"))
    rows = "\n".join(
        f"| {one.family}: {one.low} to {one.high} | {r[one.key]:.2f} | {unseen[one.key]:.2f} |" if unseen
        else f"| {one.family}: {one.low} to {one.high} | {r[one.key]:.2f} | |"
        for one in DIMENSIONS
    )  # fmt: skip
    return _CARD.format(
        file=path.name, size=path.stat().st_size / 1e6, clips=f"{description['clips']:,}", pianos=", ".join(description["pianos"]),
        loudness=description["loudness"][0], jitter=description["loudness"][1], bed=description["loudness"][2], mean=r["mean"],
        scored=description["r_score"]["mean"], descriptors=len(description["descriptors"]),
        unseen=f"{unseen['mean']:.2f} on {description['unseen']}" if unseen else "not measured",
        room=f"{room['mean']:.2f} in rooms and halls" if room else "never heard in a room", rows=rows, **{
            name: description[name] for name in ("model", "licence", "data")
        },
    )  # fmt: skip


_CARD = """# `{model}`: rates a piano performance on 19 dimensions

`{file}`, {size:.1f} MB, nothing in it is run. A recording is brought to {loudness:g} LUFS and laid on faint noise; an encoder
hears its notes and pedals; {descriptors} statistics of these and 397 of the sound are rated by the average of ridge, kernel
ridge and trees.

- **Data**: {clips} clips, rendered by {pianos}, each at {loudness:g} LUFS give or take {jitter:g} dB, on noise of {bed:g} dBFS.
  {data}.
- **Measured** under `content` (no music shared between training and test), mean r {mean:.2f}; {room}; {unseen}, which nothing was
  learned from in that measurement; with the score {scored:.2f}. What the file holds was fitted on all clips and pianos.
- **Uncertainty** is the error on held-out clips of the piano that was not learned from, larger where the regressors disagree.
  It is no error of the playing: people agree among themselves to a noise ceiling of r .86.
- **Loudness** is not heard as such: a soft and a loud recording of the same playing are rated alike, and how loud somebody played
  is told by the timbre alone.
- **Tested on renderings** of {clips} clips of three works by Beethoven and Schubert: PercePiano's audio is not published, and
  people's ratings of real recordings are known for a single one. Works that were not learned from are rated worse (`composition`
  in `notebooks/results`); other styles and instruments are beyond what is known, and rooms were simulated.
- **Not for** judging people: no exam, no audition, no hiring. A rating says what listeners would say on average of such a clip.
- **Licence** {licence}, as that of the performances which the encoder learned from.

| dimension | r | r, unseen piano |
|---|---|---|
{rows}

Made by `python -m percepiano_ast package`.
"""

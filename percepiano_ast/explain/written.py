"""Explanations as files: figures, tables, the excerpt, and a summary in sentences."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import soundfile
from matplotlib.figure import Figure

from percepiano_ast import audio
from percepiano_ast.config import lookup
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.explain import checks
from percepiano_ast.explain.maps import METHODS, SECONDS, TOLERANCE, Explainer, Explanation
from percepiano_ast.explain.notes import check_alignment, note_table
from percepiano_ast.inference.rate import FoldEnsemble, require_explained
from percepiano_ast.music.midi import read_midi
from percepiano_ast.plots import studies as explain_plots

_BASELINE_WORDS = {"mean": "its mean level in every band", "silence": "silence"}


def explain_files(
    files: Iterable[str],
    *,
    run: str,
    out: str | Path,
    dimensions: list[str],
    model: str = "",
    midi: str = "",
    baseline: str = "mean",
    seconds: float = SECONDS,
    with_checks: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """The command ``explain``: write one folder per file below ``out``, and checks over all files.

    Raises:
        InputError: an unknown dimension, model or baseline, a file that is unreadable or too short,
            several files with one MIDI or with equal names, or a MIDI that does not match the
            recording.
    """
    files, rater = list(files), FoldEnsemble(run, model)
    require_explained(rater)
    for key in dimensions:
        lookup(dict.fromkeys(KEYS), key, "dimension")
    if midi and len(files) > 1:
        raise InputError(
            f"one MIDI for {len(files)} recordings: give --midi with a single recording."
        )
    names = [Path(file).stem.strip() for file in files]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"two recordings are called {', '.join(sorted(twice))} and would share a folder; rename"
            " one."
        )
    explainer = Explainer(rater, baseline)
    recordings = [explainer.hear(file) for file in files]
    performance = read_midi(midi) if midi else None
    if performance is not None:
        check_alignment(recordings[0], performance)
    out = Path(out)
    explained = []
    for recording in recordings:
        explained.append(
            explainer.explain(recording, dimensions, METHODS if with_checks else METHODS[:1])
        )
        sentences = [recording.name]
        for explanation in explained[-1]:
            sentences += _write_one(
                explainer, explanation, performance, seconds, out / recording.name
            )
        _tell(out / recording.name / "explanation.txt", sentences, log)
    if with_checks:
        found = checks.run(explainer, explained)
        _write_checks(found, out)
        lines = [
            f"{row.dimension}, {explain_plots.METHOD_NAMES[row.method]}: {row.sentence}"
            for row in found.verdicts.itertuples()
        ]
        _tell(
            out / "verdicts.txt",
            [f"Checks over {len(recordings)} recordings", *(f"  {line}" for line in lines)],
            log,
        )


def _tell(path: Path, lines: list[str], log: Callable[[str], None]) -> None:
    path.write_text("\n".join(lines) + "\n")
    for line in lines:
        log(line)


def _write_one(
    explainer: Explainer, explanation: Explanation, performance, seconds: float, folder: Path
) -> list[str]:
    """Write all files of one dimension of one recording; returns their summary in sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    key, recording = explanation.dimension, explanation.recording
    excerpt = explanation.excerpt(seconds)
    soundfile.write(folder / f"excerpt_{key}.wav", excerpt.wave, recording.front_end.sample_rate)
    explanation.seconds_table().to_csv(
        folder / f"seconds_{key}.csv", index=False, float_format="%.6f"
    )
    explanation.bands_table().to_csv(folder / f"bands_{key}.csv", index=False, float_format="%.6f")
    sentences = describe(explainer, explanation)
    sentences.append(
        f"  largest contribution: {excerpt.start:.1f} to {excerpt.stop:.1f} s"
        f" ({excerpt.contribution:+.3f}); "
        + checks.silence_excerpt(explainer, explanation, excerpt).sentence()
    )
    title = f"{recording.name} \u2013 {_family(key)}, rated {explanation.rating:.2f}"
    title += f" (baseline, {_BASELINE_WORDS[explainer.baseline]}: {explanation.baseline:.2f})"
    marked = (excerpt.start, excerpt.stop)
    hertz = audio.band_centres(recording.front_end)
    words: dict[str, Any] = {"dimension": key, "marked": marked, "title": title}
    figure = explain_plots.attribution_map(
        recording.level, explanation.map, hertz=hertz, front_end=recording.front_end, **words
    )
    _save(figure, folder / f"map_{key}")
    if performance is not None:
        table = note_table(explanation, performance)
        table.to_csv(folder / f"notes_{key}.csv", index=False, float_format="%.6f")
        _save(explain_plots.note_roll(table, **words), folder / f"notes_{key}")
        sentences.append(f"  {_notes_sentence(table)}")
    return sentences


def describe(explainer: Explainer, explanation: Explanation) -> list[str]:
    """The rating, the rating of the baseline, and the remainder that the integral does not
    explain."""
    difference = explanation.rating - explanation.baseline
    baseline = f"baseline ({_BASELINE_WORDS[explainer.baseline]}): {explanation.baseline:.3f}"
    rated = f"{explanation.dimension}: rated {explanation.rating:.3f}"
    lines = [f"{rated}; {baseline}; the map attributes the difference of {difference:+.3f}"]
    if abs(explanation.gap) > TOLERANCE:
        lines.append(
            f"  note: the map does not include {explanation.gap:+.3f} of it, because the integral"
            " did not converge"
        )
    if explainer.simulated:
        lines.append(
            "  note: this model was trained on simulated ratings; its values are not valid for real"
            " performances"
        )
    return lines


def _notes_sentence(table: pd.DataFrame) -> str:
    notes, rest = table[table["note"] >= 0], table[table["note"] < 0]
    named = ", ".join(
        f"{one['name']} at {one.onset:.1f} s ({one.contribution:+.4f})"
        for _, one in notes.head(3).iterrows()
    )
    ten = notes["contribution"].abs().head(10).sum() / max(notes["contribution"].abs().sum(), 1e-12)
    return (
        f"notes with the largest contribution: {named}; the first ten of {len(notes)} account for"
        f" {ten:.0%} of the contributions of notes, frames without a note for"
        f" {rest['contribution'].sum():+.4f}"
    )


def _family(key: str) -> str:
    return next(
        f"{one.family.lower()}: {one.low} \u2013 {one.high}" for one in DIMENSIONS if one.key == key
    )


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_name(path.name + ".png"), dpi=150)
    figure.savefig(path.with_name(path.name + ".svg"), dpi=150)


def _write_checks(found: checks.Checks, out: Path) -> None:
    for name in ("deletion", "randomisation", "verdicts"):
        getattr(found, name).to_csv(out / f"{name}.csv", index=False, float_format="%.6f")
    recordings = found.deletion["recording"].nunique()
    title = f"Deletion curves ({recordings} recordings)"
    _save(explain_plots.deletion_curves(found.deletion, title), out / "deletion")
    title = "Weight randomisation"
    _save(
        explain_plots.randomisation_curves(found.randomisation, checks.ALIKE, title),
        out / "randomisation",
    )

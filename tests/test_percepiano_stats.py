"""Raters, the published means rebuilt from them, and the tables of the data. Cost: 15 s, of it 12
with the published files."""

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from percepiano_ast.data import demo, percepiano, percepiano_stats
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """A simulated folder whose rater table can be changed."""
    return demo.write_percepiano(tmp_path / "demo", performers=1)


def rewrite(folder, change):
    """Change the rater table, a list of rows without its head, in place."""
    path = folder / percepiano.RATERS
    head, *rows = csv.reader(path.read_text().splitlines())
    change(rows)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def test_what_is_no_rating_is_counted_and_not_averaged_in(folder):
    def spoil(rows):
        rows[0][3:22] = [""] * 19
        rows[1][5] = "8"
        rows[2][3] = "0"

    before = percepiano_stats.rater_counts(folder)
    rewrite(folder, spoil)
    found = percepiano_stats.rater_counts(folder)
    assert found == before | {"blank": 1, "too_high": 1, "missing": 1, "valid": before["valid"] - 2}
    table = percepiano_stats.raters(folder)
    clip = table["clip"].iloc[0]
    agreement = percepiano.rater_agreement(table)
    assert agreement.loc[clip, "n_raters"] == agreement.loc[clip, "n_ratings"] == 10
    values = table.loc[table["clip"] == clip, KEYS[0]]
    assert values.isna().sum() == 1 and agreement.loc[clip, KEYS[0]] == pytest.approx(
        values.std() / 7
    )
    with pytest.raises(
        InputError, match=f"the raters' mean of clip {clip} differs from its label by 0\\.\\d+"
    ):
        percepiano_stats.rebuild_means(folder)


def test_who_rates_twice_is_one_rater(folder):
    rewrite(folder, lambda rows: rows.append(rows[0]))
    table = percepiano_stats.raters(folder)
    found = percepiano.rater_agreement(table).loc[table["clip"].iloc[0]]
    assert found["n_ratings"] == 13 and found["n_raters"] == 12


def test_a_label_without_ratings_and_ratings_without_label_are_named(folder):
    clip = percepiano_stats.raters(folder)["clip"].iloc[0]
    path = folder / percepiano.LABELS
    labels = json.loads(path.read_text())
    path.write_text(json.dumps({name: values for name, values in labels.items() if name != clip}))
    with pytest.raises(InputError, match=f"clip {clip} has no label"):
        percepiano_stats.rebuild_means(folder)
    path.write_text(json.dumps(labels | {"A_new_1": labels[clip]}))
    with pytest.raises(InputError, match="clip A_new_1 has no valid rating"):
        percepiano_stats.rebuild_means(folder)


def test_correlations_are_over_clips():
    rng = np.random.default_rng(0)
    ratings = {f"c{k}": rng.random(19) for k in range(50)}
    features = pd.DataFrame({"clip": [*ratings, *ratings], "constant": 1.0})
    features["twice_timing"] = [2 * values[0] for values in ratings.values()] * 2
    found = percepiano_stats.feature_correlations(features, ratings)
    assert (
        found.loc["twice_timing", KEYS[0]] == pytest.approx(1)
        and found.loc["constant"].isna().all()
    )
    between = percepiano_stats.correlations(ratings)
    assert between.shape == (19, 19) and found.loc["twice_timing", KEYS[1]] == pytest.approx(
        between.iloc[0, 1]
    )
    with pytest.raises(InputError, match="none of the clips of the features, such as .*, is rated"):
        percepiano_stats.feature_correlations(features.assign(clip="x"), ratings)


@pytest.mark.real_data
class TestRealData:
    """The published files against the research on them."""

    def test_raters(self, percepiano_dir):
        counts = percepiano_stats.rater_counts(percepiano_dir)
        assert counts == {
            "rows": 14_934,
            "blank": 84,
            "too_high": 208,
            "valid": 14_642,
            "missing": 208,
            "raters": 63,
            "clips": 1202,
        }
        table = percepiano_stats.raters(percepiano_dir)
        assert table[list(KEYS)].min(axis=None) >= 1 and table[list(KEYS)].max(axis=None) <= 7.1
        rounds = table.groupby("round")["rater"].unique()
        assert len(rounds[1]) == 52 and len(rounds[2]) == 11 and not set(rounds[1]) & set(rounds[2])
        agreement = percepiano.rater_agreement(table)
        assert agreement["n_ratings"].agg(["min", "max"]).tolist() == [3, 19]
        assert agreement["n_ratings"].mean() == pytest.approx(12.18, abs=0.005)

    def test_the_published_means_come_out_exactly(self, percepiano_dir):
        found = percepiano_stats.rebuild_means(percepiano_dir)
        assert found.largest < 1e-12 and found.means.shape == (1202, 19)
        assert found.sentence.startswith(
            "14,642 ratings of 63 raters reproduce the published means of 1,202 clips exactly"
        )

    def test_labels_merged_upstream_do_not_come_out(self, percepiano_dir, tmp_path):
        (tmp_path / "labels").mkdir()
        shutil.copy(percepiano_dir / percepiano.RATERS, tmp_path / percepiano.RATERS)
        shutil.copy(percepiano_dir / "labels" / percepiano.LABELS, tmp_path / percepiano.LABELS)
        with pytest.raises(InputError, match="_Score_.* has no label"):
            percepiano_stats.rebuild_means(tmp_path)

    def test_compositions(self, percepiano_dir):
        found = percepiano_stats.compositions(percepiano_dir, percepiano.load_index(percepiano_dir))
        clips = found[["human_clips", "players", "deadpan_clips", "segments"]]
        assert clips.loc["WoO80"].tolist() == [204, 12, 34, 17] and clips.loc["D935"].tolist() == [
            91,
            7,
            26,
            13,
        ]
        assert clips.loc["D960mv2"].tolist() == [262, 12, 26, 26] and clips.loc[
            "D960mv3"
        ].tolist() == [516, 12, 43, 43]
        assert found["median_seconds"].tolist() == pytest.approx(
            [10.9, 37.5, 5.8, 16.7, 11.3], abs=0.2
        )
        assert found["ratings_per_clip"].tolist() == pytest.approx(
            [5.3, 14.7, 15.3, 5.2, 12.18], abs=0.1
        )

    def test_deadpan_clips_are_rated_lower(self, percepiano_dir):
        index = percepiano.load_index(percepiano_dir)
        found = percepiano_stats.distributions(
            percepiano.read_ratings(percepiano_dir, index), index
        )
        names = ["doubtful_convincing", "shallow_rich", "flat_spacious", "disproportioned_balanced"]
        low = found[found.index.str.contains("|".join(names))]
        assert len(low) == 4
        assert (low["deadpan"] < -1.4).all() and found["min"].min() > 0 and found["max"].max() < 1

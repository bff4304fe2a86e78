"""Results in README, docs/evaluation.md and the results page equal those of the committed
predictions. Cost: 20 s."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from percepiano_ast.evaluation import analysis, compare, predictions, reliability
from percepiano_ast.inference import rate, rating

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "notebooks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "evaluation.md", RESULTS / "README.md")
SCOPES = {
    "r": "overall",
    "r, overall": "overall",
    "r, people only": "humans_only",
    "r, humans only": "humans_only",
    "r, within segment": "within_segment",
    "r, within segment, people": "within_segment_humans",
    "r, within segment, humans only": "within_segment_humans",
    "within segment, humans only": "within_segment_humans",
}
NUMBER = r"-?\d?\.\d+"


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """Model, protocol, scope -> mean r with its interval, which allows for seeds where a model has
    several."""
    paths = sorted(RESULTS.glob("predictions_*.csv.gz"))
    rows = predictions.validate_predictions(
        pd.concat([predictions.read_predictions(path) for path in paths], ignore_index=True), None
    )
    several = predictions.ensemble(rows[rows["model"].str.contains("-judged")], "judged")
    rows = pd.concat([rows, several], ignore_index=True)
    found = compare.over_seeds(
        predictions.runs(rows, predictions.load_index()), ("pearson",), least=1
    ).query("dimension == 'mean'")
    found = found.set_index(["model", "protocol", "scope"])[["value", "low", "high"]]
    return {key: tuple(row) for key, row in zip(found.index, found.to_numpy())}


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells, its header first."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for block in blocks
    ]
    return [[block[0], *block[2:]] for block in rows]


def claims(text: str) -> dict[tuple[str, str, str], str]:
    """What a page says of models: model, protocol, scope -> the cell."""
    found = {}
    for header, *rows in tables(text):
        columns = [re.sub(r"\*|\(.*\)", "", cell).strip() for cell in header]
        for row in rows:
            names = re.findall(r"^`([\w@+-]+)`", row[0])
            for column, cell in zip(columns[1:], row[1:]):
                if names and column in SCOPES:
                    found[names[0], "content", SCOPES[column]] = cell
                elif names and column in predictions.protocols(predictions.load_index()):
                    found[names[0], column, "overall"] = cell
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_says_is_what_the_predictions_give(page, known):
    said = {key: cell for key, cell in claims(page.read_text()).items() if re.match(NUMBER, cell)}
    assert len(said) >= 10
    for key, cell in said.items():
        assert key in known, (
            f"{page.name} gives {cell} for {key}, of which there are no predictions"
        )
        for text, value in zip(re.findall(NUMBER, cell), known[key]):
            assert abs(float(text) - value) < 0.0051, (
                f"{page.name} gives {cell} for {key}, the predictions give {known[key]}"
            )


def test_differences_between_models_are_those_of_the_predictions():
    (said,) = [
        rows for rows in tables((RESULTS / "README.md").read_text()) if rows[0][0] == "comparison"
    ]
    rows, index = (
        predictions.read_predictions(RESULTS / "predictions_content.csv.gz"),
        predictions.load_index(),
    )
    for comparison, *cells in said[1:]:
        names = [
            name.replace("piano-rater", "-packaged")
            for name in re.findall(r"`([\w@+-]+)`", comparison)
        ]
        pair = [
            f"ast-mini-transcriptionstem{name}" if name.startswith("-") else name for name in names
        ]
        found = compare.compare_over_seeds(
            predictions.runs(rows[rows["model"].isin(pair)], index), ("pearson",), least=1
        ).query("dimension == 'mean'")
        for cell, scope in zip(cells, ("overall", "within_segment_humans"), strict=True):
            (one,) = found[found["scope"] == scope].iloc
            signed = [one["difference"], one["low"], one["high"]]
            signed = signed if one["model_a"] == pair[0] else [-signed[0], -signed[2], -signed[1]]
            assert numbers([cell]) == pytest.approx(signed, abs=0.00051), f"{comparison}, {scope}"


def test_sensitivity_and_robustness_are_those_of_their_tables():
    page, names = tables((RESULTS / "README.md").read_text()), {"piano-rater": "ast-mini-judged"}
    (signs,) = [rows for rows in page if rows[0][1] == "expected signs"]
    expected = pd.read_csv(RESULTS / "sensitivity.csv").query("expected != 0")
    for name, *cells in signs[1:]:
        agrees = expected.loc[
            expected["model"] == names.get(name.strip("`"), name.strip("`")), "agrees"
        ]
        counts = [
            (agrees != "unheard").sum(),
            *((agrees == word).sum() for word in ("yes", "no", "unclear")),
        ]
        assert [int(cell) for cell in cells] == counts
    (moved,) = [rows for rows in page if rows[0][0] == "condition"]
    median = (
        pd.read_csv(RESULTS / "robustness.csv")
        .groupby(["condition", "model"])["standardised"]
        .median()
    )
    conditions = {
        "tuning, -20 cents": "tuning -20 cents",
        "gain, +12 dB": "gain +12 dB",
        "MP3, 80 kbit/s": "mp3 80 kbit/s",
        "noise, SNR 20 dB": "noise SNR 20 dB",
        "room, RT60 2.5 s": "room RT60 2.5 s",
        "soundfont FluidR3": "piano fluidr3mono",
        "built-in piano": "piano builtin",
    }
    assert [row[0] for row in moved[1:]] == list(conditions)
    for condition, *cells in moved[1:]:
        values = [
            median[conditions[condition], model] for model in ("ast-mini-judged", "audio-stats")
        ]
        assert [float(cell) for cell in cells] == pytest.approx(values, abs=0.0051)


def test_the_results_page_is_short():
    assert (RESULTS / "README.md").stat().st_size <= 20_000


def test_what_pretraining_is_worth_is_what_its_predictions_give():
    (said,) = [
        rows
        for rows in tables((RESULTS / "README.md").read_text())
        if rows[0][0].startswith("start, frozen")
    ]
    runs = predictions.runs(
        predictions.read_predictions(RESULTS / "pretrainings_content.csv.gz"),
        predictions.load_index(),
    )
    known = (
        compare.over_seeds(runs, ("pearson",), least=1)
        .query("dimension == 'mean'")
        .set_index(["model", "scope"])
    )
    names = [row[0].strip("`") for row in said[1:]]
    assert {run.model for run in runs} == {
        f"{name}{piano}" for name in names for piano in ("", "@timgm6mb")
    }
    for name, row in zip(names, said[1:], strict=True):
        overall, people = known.loc[(name, "overall")], known.loc[(name, "within_segment_humans")]
        spread = [] if np.isnan(overall["seed_sd"]) else [overall["seed_sd"]]
        values = [overall["value"], overall["low"], overall["high"], *spread, people["value"]]
        values += [known.loc[(f"{name}@timgm6mb", "overall"), "value"]]
        assert int(row[1]) == overall["seeds"]
        assert numbers(row[2:6]) == pytest.approx(values, abs=0.0051)
        for cell, (piano, scope) in zip(
            row[6:], (("", "overall"), ("", "within_segment_humans"), ("@timgm6mb", "overall"))
        ):
            pair = [f"ast-micro-scratch{piano}", f"{name}{piano}"]
            if pair[0] != pair[1]:
                two = [run for run in runs if run.model in pair]
                (found,) = (
                    compare.compare_over_seeds(two, ("pearson",), least=1)
                    .query(f"dimension == 'mean' and scope == '{scope}'")
                    .iloc
                )
                signed = [found["difference"], found["low"], found["high"]]
                signed = (
                    signed if found["model_a"] == pair[1] else [-signed[0], -signed[2], -signed[1]]
                )
                assert numbers([cell]) == pytest.approx(signed, abs=0.00051)


def test_what_masked_pretraining_is_said_to_teach_is_in_its_predictions():
    runs = predictions.runs(
        predictions.read_predictions(RESULTS / "pretrainings_content.csv.gz"),
        predictions.load_index(),
    )
    two = [run for run in runs if run.model in ("ast-micro-visible", "ast-micro-scratch")]
    (found,) = (
        compare.compare_over_seeds(two, ("pearson",), least=1)
        .query("dimension == 'mean' and scope == 'within_segment'")
        .iloc
    )
    said = "{:.3f} [{:.3f}, {:.3f}]".format(-found["difference"], -found["high"], -found["low"])
    for page in (ROOT / "README.md", RESULTS / "README.md"):
        text = page.read_text()
        assert said in text or said.replace("0.", ".") in text, f"{page} does not give {said}"


def test_the_notebook_that_rates_says_how_well_as_the_predictions_do(known):
    (text,) = [
        cell.source
        for cell in nbformat.read(RESULTS.parent / "05_rate_a_recording.ipynb", 4).cells
        if "How far to trust" in cell.source
    ]
    said = [
        known[f"ast-mini-transcriptionstem-packaged{where}", "content", "overall"][0]
        for where in ("", "@room", "@timgm6mb")
    ]
    assert numbers([text])[:3] == pytest.approx(said, abs=0.0051)


def test_what_the_readme_says_of_the_bundled_model_is_what_the_predictions_give(known):
    (text,) = re.findall(
        r"^- \*\*Known works\*\*.*$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    said = [
        known[f"ast-mini-transcriptionstem-packaged{where}", "content", "overall"][0]
        for where in ("", "@room", "@timgm6mb")
    ]
    ceiling = reliability.load_ceiling(predictions.load_index())["overall"].mean()
    assert numbers([text]) == pytest.approx([*said, ceiling], abs=0.0051)
    works = known["ast-mini-transcriptionstem-packaged", "composition", "overall"][0]
    (text,) = re.findall(
        r"^- \*\*Other works\*\*.*$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert numbers([text]) == pytest.approx([works], abs=0.0051)
    description = rate.load_model().description
    assert [description["r"]["mean"], description["r_works"]["mean"]] == pytest.approx(
        [said[0], works], abs=0.0001
    )


def difference(file: str, model: str, other: str, scope: str = "overall") -> list[float]:
    """Mean r of a model minus that of another, with its interval."""
    rows = predictions.read_predictions(RESULTS / file)
    runs = predictions.runs(rows[rows["model"].isin([model, other])], predictions.load_index())
    (found,) = (
        compare.compare_over_seeds(runs, ("pearson",), least=1)
        .query(f"dimension == 'mean' and scope == '{scope}'")
        .iloc
    )
    signed = [found["difference"], found["low"], found["high"]]
    return signed if found["model_a"] == model else [-signed[0], -signed[2], -signed[1]]


def test_the_findings_of_the_readme_are_those_of_committed_files():
    text = (ROOT / "README.md").read_text()
    first, second, third = (
        numbers([re.search(rf"^{k}\. .*$", text, re.MULTILINE)[0].partition("**")[2]])
        for k in (1, 2, 3)
    )
    gain = difference(
        "predictions_content.csv.gz", "ast-mini-transcriptionstem-judged", "audio-stats"
    )
    assert first[:3] == pytest.approx(gain, abs=0.00051)
    curve = pd.read_csv(RESULTS / "learning_curve.csv")
    half = curve[curve["share"] == 0.5].groupby("unit")["r"].mean()
    whole = curve.loc[curve["unit"] == "everything", "r"].mean()
    assert second == pytest.approx([whole - half["passages"], whole - half["clips"]], abs=0.0051)
    masked = difference("pretrainings_content.csv.gz", "ast-micro-ssast", "ast-micro-scratch")
    visible = difference(
        "pretrainings_content.csv.gz", "ast-micro-visible", "ast-micro-scratch", "within_segment"
    )
    assert third == pytest.approx([*masked, *visible], abs=0.00051)


def numbers(cells: list[str]) -> list[float]:
    """Every number in some cells of a table."""
    return [float(text) for cell in cells for text in re.findall(NUMBER, cell)]


def test_parts_of_the_errors_are_those_of_the_predictions():
    (said,) = [
        rows
        for rows in tables((RESULTS / "README.md").read_text())
        if rows[0][1] == "mean squared error"
    ]
    rows, index = (
        predictions.read_predictions(RESULTS / "predictions_content.csv.gz"),
        predictions.load_index(),
    )
    names = [row[0].strip("`") for row in said[1:]]
    runs = predictions.runs(rows[rows["model"].isin(names)], index)
    found = analysis.error_components(runs, index, reliability.load_ceiling(index)).query(
        "dimension == 'mean'"
    )
    found = found.groupby("model")[["all", *analysis.PARTS]].mean()
    for name, row in zip(names, said[1:], strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx(
            found.loc[name, ["all", *analysis.PARTS]].to_list(), abs=0.0051
        )


BUNDLED = "ast-mini-transcriptionstem-packaged"


def bundled(protocol: str, piano: str) -> predictions.RunPredictions:
    """Held-out predictions of the bundled model."""
    rows = predictions.read_predictions(RESULTS / f"predictions_{protocol}.csv.gz")
    (run,) = predictions.runs(rows[rows["model"] == f"{BUNDLED}{piano}"], predictions.load_index())
    return run


def test_uncertainty_covers_errors_on_works_a_soundfont_and_a_room_that_were_left_out():
    errors = []
    for protocol in ("composition", "movement"):
        for piano in ("@timgm6mb", "@timgm6mb+livingroom"):
            run = bundled(protocol, piano)
            run = run.take(run.human)
            errors.append(np.abs(run.prediction - run.rating) / run.uncertainty)
    assert 0.65 <= np.mean(np.concatenate(errors) <= 1) <= 0.71
    assert 0.93 <= np.mean(np.concatenate(errors) <= 2) <= 0.97


@pytest.mark.parametrize(
    ("protocol", "piano", "shares"),
    [
        ("composition", "@timgm6mb", rating.SHARES),
        ("content", "", (0.93, 0.82)),
        ("content", "@room", (0.89, 0.79)),
    ],
)
def test_two_performances_that_are_said_to_differ_do_so_for_people(protocol, piano, shares):
    run, deviation = (
        bundled(protocol, piano),
        2**0.5 * rate.load_model().regressors["alone"].within,
    )
    right: dict[float, list[np.ndarray]] = {rating.SURE: [], rating.LIKELY: []}
    for segment in np.unique(run.segment):
        part = run.take((run.segment == segment) & run.human)
        one, other = np.triu_indices(len(part.clip), 1)
        said, meant = (values[one] - values[other] for values in (part.prediction, part.rating))
        for far, found in right.items():
            found.append(
                (np.sign(said) == np.sign(meant))[(np.abs(said) >= far * deviation) & (meant != 0)]
            )
    assert [np.concatenate(found).mean() for found in right.values()] == pytest.approx(
        shares, abs=0.0051
    )


def test_no_committed_predictions_go_without_a_word():
    page = (RESULTS / "README.md").read_text()
    models = {
        model
        for path in RESULTS.glob("predictions_*.csv.gz")
        for model in pd.read_csv(path, usecols=["model"])["model"]
    }
    assert {model for model in models if f"`{model}`" not in page} == set()

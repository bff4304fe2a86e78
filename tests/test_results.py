"""The numbers that README and results page give for real predictions are those of the committed predictions. Cost: 20 s."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from percepiano_ast import packaged, recording
from percepiano_ast.data import predictions
from percepiano_ast.evaluation import errors, reliability, seeds, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "notebooks" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
SCOPES = {
    "r": "overall",
    "r, overall": "overall",
    "r, people only": "humans_only",
    "r, within segment": "within_segment",
    "r, within segment, people": "within_segment_humans",
    "within segment, humans only": "within_segment_humans",
}
NUMBER = r"-?\.\d+"


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """Model, protocol, scope -> mean r with its interval, which allows for seeds where a model has several."""
    paths = sorted(RESULTS.glob("predictions_*.csv.gz"))
    rows = table.validate_predictions(pd.concat([table.read_predictions(path) for path in paths], ignore_index=True), None)
    several = predictions.ensemble(rows[rows["model"].str.contains("-judged")], "judged")
    rows = pd.concat([rows, several], ignore_index=True)
    found = seeds.evaluate(table.runs(rows, table.load_index()), ("pearson",), least=1).query("dimension == 'mean'")
    found = found.set_index(["model", "protocol", "scope"])[["value", "low", "high"]]
    return {key: tuple(row) for key, row in zip(found.index, found.to_numpy())}


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells, its header first."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
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
                elif names and column in table.protocols(table.load_index()):
                    found[names[0], column, "overall"] = cell
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_says_is_what_the_predictions_give(page, known):
    said = {key: cell for key, cell in claims(page.read_text()).items() if re.match(NUMBER, cell)}
    assert len(said) >= 10
    for key, cell in said.items():
        assert key in known, f"{page.name} gives {cell} for {key}, of which there are no predictions"
        for text, value in zip(re.findall(NUMBER, cell), known[key]):
            assert abs(float(text) - value) < 0.0051, f"{page.name} gives {cell} for {key}, the predictions give {known[key]}"


def test_what_pretraining_is_worth_is_what_its_predictions_give():
    (said,) = [rows for rows in tables((RESULTS / "README.md").read_text()) if rows[0][0].startswith("start, frozen")]
    runs = table.runs(table.read_predictions(RESULTS / "pretrainings_content.csv.gz"), table.load_index())
    known = seeds.evaluate(runs, ("pearson",), least=1).query("dimension == 'mean'").set_index(["model", "scope"])
    names = [row[0].strip("`") for row in said[1:]]
    assert {run.model for run in runs} == {f"{name}{piano}" for name in names for piano in ("", "@timgm6mb")}
    for name, row in zip(names, said[1:], strict=True):
        overall, people = known.loc[(name, "overall")], known.loc[(name, "within_segment_humans")]
        spread = [] if np.isnan(overall["seed_sd"]) else [overall["seed_sd"]]
        values = [overall["value"], overall["low"], overall["high"], *spread, people["value"]]
        values += [known.loc[(f"{name}@timgm6mb", "overall"), "value"]]
        assert int(row[1]) == overall["seeds"]
        assert numbers(row[2:6]) == pytest.approx(values, abs=0.0051)
        for cell, (piano, scope) in zip(row[6:], (("", "overall"), ("", "within_segment_humans"), ("@timgm6mb", "overall"))):
            pair = [f"ast-micro-scratch{piano}", f"{name}{piano}"]
            if pair[0] != pair[1]:
                two = [run for run in runs if run.model in pair]
                (found,) = seeds.compare(two, ("pearson",), least=1).query(f"dimension == 'mean' and scope == '{scope}'").iloc
                signed = [found["difference"], found["low"], found["high"]]
                signed = signed if found["model_a"] == pair[1] else [-signed[0], -signed[2], -signed[1]]
                assert numbers([cell]) == pytest.approx(signed, abs=0.00051)


def test_what_masked_pretraining_is_said_to_teach_is_in_its_predictions():
    runs = table.runs(table.read_predictions(RESULTS / "pretrainings_content.csv.gz"), table.load_index())
    two = [run for run in runs if run.model in ("ast-micro-visible", "ast-micro-scratch")]
    (found,) = seeds.compare(two, ("pearson",), least=1).query("dimension == 'mean' and scope == 'within_segment'").iloc
    said = "{:.3f} [{:.3f}, {:.3f}]".format(-found["difference"], -found["high"], -found["low"]).replace("0.", ".")
    assert all(said in page.read_text() for page in PAGES)


def test_the_notebook_that_rates_says_how_well_as_the_predictions_do(known):
    (text,) = [
        cell.source
        for cell in nbformat.read(RESULTS.parent / "05_rate_a_recording.ipynb", 4).cells
        if "How far to trust" in cell.source
    ]
    said = [known[f"ast-mini-transcriptionstem-packaged{where}", "content", "overall"][0] for where in ("", "@room", "@timgm6mb")]
    assert numbers([text])[:3] == pytest.approx(said, abs=0.0051)


def numbers(cells: list[str]) -> list[float]:
    """Every number in some cells of a table."""
    return [float(text) for cell in cells for text in re.findall(NUMBER, cell)]


def test_parts_of_the_errors_are_those_of_the_predictions():
    (said,) = [rows for rows in tables((RESULTS / "README.md").read_text()) if rows[0][1] == "mean squared error"]
    rows, index = table.read_predictions(RESULTS / "predictions_content.csv.gz"), table.load_index()
    names = [row[0].strip("`") for row in said[1:]]
    runs = table.runs(rows[rows["model"].isin(names)], index)
    found = errors.evaluate(runs, index, reliability.load_ceiling(index)).query("dimension == 'mean'")
    found = found.groupby("model")[["all", *errors.PARTS]].mean()
    for name, row in zip(names, said[1:], strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx(found.loc[name, ["all", *errors.PARTS]].to_list(), abs=0.0051)


@pytest.mark.parametrize(("piano", "sure", "likely"), [("", 0.92, 0.81), ("@timgm6mb", 0.91, 0.81), ("@room", 0.90, 0.78)])
def test_two_performances_that_are_said_to_differ_do_so_for_people(piano, sure, likely):
    rows = table.read_predictions(RESULTS / "predictions_content.csv.gz")
    rows = rows[rows["model"] == f"ast-mini-transcriptionstem-packaged{piano}"]
    (run,) = table.runs(rows, table.load_index())
    deviation = 2**0.5 * packaged.Packaged.read().judges["alone"].within
    right: dict[float, list[np.ndarray]] = {recording.SURE: [], recording.LIKELY: []}
    for segment in np.unique(run.segment):
        part = run.take((run.segment == segment) & run.human)
        one, other = np.triu_indices(len(part.clip), 1)
        said, meant = (values[one] - values[other] for values in (part.prediction, part.rating))
        for far, found in right.items():
            found.append((np.sign(said) == np.sign(meant))[(np.abs(said) >= far * deviation) & (meant != 0)])
    shares = [np.concatenate(found).mean() for found in right.values()]
    assert shares == pytest.approx([sure, likely], abs=0.0051)


def test_no_committed_predictions_go_without_a_word():
    page = (RESULTS / "README.md").read_text()
    models = {model for path in RESULTS.glob("predictions_*.csv.gz") for model in pd.read_csv(path, usecols=["model"])["model"]}
    assert {model for model in models if f"`{model}`" not in page} == set()

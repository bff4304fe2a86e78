"""Reports: what they say of models, what they mark, and the folder that can be sent. Cost: 40 s."""

import csv
import re
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from predictions import make_index, make_predictions

from percepiano_ast import plots
from percepiano_ast.cli import main
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import EvaluationOptions, compare, evaluate, predictions, reliability
from percepiano_ast.studies import report
from percepiano_ast.tables import read_own

FEW = EvaluationOptions(n_permutations=50)
SOME = EvaluationOptions(n_permutations=2**12)  # all exchanges of twelve content groups
CEILING = pd.DataFrame(0.9, index=list(KEYS), columns=list(predictions.SCOPES))


@pytest.fixture(scope="module")
def index():
    return make_index()


@pytest.fixture(scope="module")
def several(index):
    """Two models of three seeds, a baseline of one."""
    noise = {"ast-micro-ssast": 0.05, "ast-micro-scratch": 0.12}
    rows = [make_predictions(index, noise, rng=0).assign(seed=0)]
    draw = np.random.default_rng(5)
    for seed in (1, 2):
        again = rows[0].assign(seed=seed)
        rows.append(
            again.assign(prediction=again["prediction"] + 0.01 * draw.normal(size=len(again)))
        )
    return pd.concat([*rows, make_predictions(index, {"mlp": 0.3})], ignore_index=True)


@pytest.fixture(scope="module")
def folder(index, several, tmp_path_factory):
    """A report of simulated ratings with a noise ceiling and uncertainties."""
    out = tmp_path_factory.mktemp("report")
    rows = several.assign(uncertainty=0.1)
    report.write(rows, index, out, simulated=True, settings=SOME, ceiling=CEILING)
    return out


def captions(text):
    return re.findall(r"^\*(?!\*)(.*)\*$|^!\[(.*)\]", text, flags=re.MULTILINE)


class TestFolder:
    def test_every_caption_says_that_ratings_are_simulated(self, folder):
        for name in ("report", "comparison"):
            text = (folder / f"{name}.md").read_text()
            assert "(simulated ratings)" in text.splitlines()[0]
            found = ["".join(caption) for caption in captions(text)]
            assert len(found) > 2
            assert all("SIMULATED" in caption for caption in found)
            assert (folder / f"{name}.html").read_text().count(
                "data:image/png;base64,"
            ) == text.count("![")

    def test_figures_lie_there_as_svg_and_png(self, folder):
        text = (folder / "report.md").read_text() + (folder / "comparison.md").read_text()
        named = set(re.findall(r"\]\(figures/(.*)\.png\)", text))
        assert {
            "content_scopes",
            "content_deadpan",
            "content_pairwise",
            "content_errors",
            "content_calibration",
            "content_gains",
        } <= named
        for name in named:
            assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
            assert "<svg" in (folder / "figures" / f"{name}.svg").read_text()[:2000]
        assert {path.stem for path in (folder / "figures").iterdir()} == named

    def test_every_table_shown_is_there_as_csv_and_latex(self, folder):
        text = (folder / "report.md").read_text() + (folder / "comparison.md").read_text()
        tables = sorted((folder / "tables").glob("*.csv"))
        assert len(tables) == len([one for one, _ in captions(text) if one])
        for path in tables:
            rows = list(csv.reader(path.read_text().splitlines()))
            latex = path.with_suffix(".tex").read_text()
            body = latex[latex.index("\\midrule") : latex.index("\\bottomrule")]
            assert body.count("\\\\") == len(rows) - 1
            assert f"\\label{{tab:{path.stem}}}" in latex
            assert not re.search(r"(?<!\\)[%_&#](?![^\n]*\\\\)", body)
            assert "**" not in path.read_text() and "**" not in latex

    def test_results_are_whole_and_repeat_to_the_byte(self, index, several, tmp_path):
        names = {"ast-micro-scratch": "ast-<i>scratch</i>|a"}
        some = several[several["seed"] == 0].replace({"model": names})
        for name in ("a", "b"):
            report.write(some, index, tmp_path / name, settings=FEW)
        files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
        assert len(files) > 50
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), (
                file
            )
        columns = "model,protocol,seed,scope,metric,dimension,value,low,high"
        assert (tmp_path / "a/metrics.csv").read_text().startswith(columns + "\n")
        text = (tmp_path / "a/report.md").read_text()
        assert "only 12 content groups" in text and "Single seed" in text
        assert "Unknown for these ratings" in text and "| noise ceiling |" not in text
        assert "simulated ratings" not in text.lower()
        assert (
            "clips of this evaluation are not PercePiano's"
            in (tmp_path / "a/comparison.md").read_text()
        )
        page = (tmp_path / "a/comparison.html").read_text()
        assert "ast-&lt;i&gt;scratch&lt;/i&gt;|a" in page and "<i>" not in page
        assert '<div class="scroll"><table><caption>Differences in Pearson r from mlp with' in page
        assert "; * significant after Holm's correction (content protocol)</caption>" in page
        assert '<figure><img alt="Differences in Pearson r from mlp per dimension' in page

    def test_names_are_neither_mathematics_nor_markup_nor_formulas(self, tmp_path):
        index = make_index(n_groups=4)
        names = ["$x_{$", "<script>a</script>", "=cmd|'x'!A0", r"\frac{1}_^~&%#$", "NA", "a\nb"]
        names += ["*b* `c` [d](javascript:e)", "\U0001f3b9 \u65e5", "../../x", "x" * 200, "@con"]
        rows = make_predictions(index, {name: 0.1 + n / 50 for n, name in enumerate(names)})
        rows.to_csv(tmp_path / "=1.csv", index=False)
        index.to_csv(tmp_path / "index.csv", index=False)
        out, given = tmp_path / "out", [str(tmp_path / "=1.csv"), "--index"]
        given += [str(tmp_path / "index.csv"), "--out", str(out), "--permutations", "50"]
        assert main(["evaluate", *given, "--reference", names[1]]) == 0
        assert set(read_own(out / "metrics.csv", ["model"])["model"]) == set(names)
        outside = [path for path in tmp_path.rglob("*.csv") if path.parent == tmp_path]
        assert len(outside) == 2
        for path in out.rglob("*.csv"):
            cells = pd.read_csv(path, dtype=str, header=None, keep_default_na=False).to_numpy()
            assert not [cell for cell in cells.ravel() if re.match(r"[=@]|[+-][^\d.]", cell)]
        for name in ("report", "comparison"):
            text, page = (out / f"{name}.md").read_text(), (out / f"{name}.html").read_text()
            text = re.sub(r"(?s)```.*?```", "", text)  # the command
            assert not re.search(r"<script|\[d\]\(|[^`\w]\*b\*|(?<!`)\$", text)
            assert "<script" not in page and 'href="javascript' not in page
            assert "&lt;script&gt;a&lt;/script&gt;" in page and "[d](javascript:e)" in page
        latex = (out / "tables" / "content_agreement.tex").read_text()
        assert r"\textbackslash" in latex and r"\$x\_\{\$" in latex

    def test_the_noise_ceiling_stands_in_tables_and_figures(self, folder):
        text = (folder / "report.md").read_text()
        assert "| noise ceiling |  | 0.90 | 0.90 | 0.90 | 0.90 |" in text
        assert "share of ceiling, first model" in text
        assert "noise ceiling" in (folder / "figures/content_scopes.svg").read_text()
        assert "noise ceiling" in (folder / "figures/content_pearson_overall.svg").read_text()

    def test_what_is_not_about_the_report_is_left_alone(self, index, several, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        report.write(several[several["seed"] == 0], index, tmp_path, settings=FEW)
        assert (tmp_path / "notes.txt").read_text() == "mine"


class TestSeeds:
    def test_a_model_of_several_seeds_is_one_row(self, index, several):
        results = evaluate(several, index, FEW)
        rows = results["summary"]
        mean = rows[
            (rows["scope"] == "overall")
            & (rows["metric"] == "pearson")
            & (rows["dimension"] == "mean")
        ]
        assert dict(zip(mean["model"], mean["seeds"])) == {
            "ast-micro-ssast": 3,
            "ast-micro-scratch": 3,
            "mlp": 1,
        }
        single = results["metrics"]
        of_seeds = single[
            (single["scope"] == "overall")
            & (single["metric"] == "pearson")
            & (single["dimension"] == "mean")
        ]
        for model, value in zip(mean["model"], mean["value"]):
            assert value == pytest.approx(
                of_seeds[of_seeds["model"] == model]["value"].mean(), abs=1e-12
            )

    def test_differences_turn_round_and_say_their_seeds(self, index, several):
        pairs = evaluate(several, index, FEW)["differences"]
        pairs = pairs[
            (pairs["scope"] == "overall")
            & (pairs["metric"] == "pearson")
            & (pairs["dimension"] == "mean")
        ]
        assert len(pairs) == 3
        one = compare.between(pairs, "ast-micro-ssast", "ast-micro-scratch").iloc[0]
        other = compare.between(pairs, "ast-micro-scratch", "ast-micro-ssast").iloc[0]
        assert one["seeds"] == "3 and 3"
        assert (one["difference"], one["low"], one["high"]) == (
            -other["difference"],
            -other["high"],
            -other["low"],
        )
        assert one["difference"] > 0 and one["p"] == other["p"]
        assert compare.between(pairs, "mlp", "ast-micro-ssast").iloc[0]["seeds"] == "1 and 1"

    def test_the_report_says_means_of_seeds(self, folder):
        text = (folder / "report.md").read_text()
        assert (
            "mean of 3 seeds" in text
            and "Models trained with several seeds" in text
            and "Single seed" not in text
        )


class TestWords:
    def say(self, rows, index):
        results = evaluate(rows, index, SOME)
        return "\n".join(report.headlines(results["summary"], results["differences"], "content"))

    def test_whether_the_encoder_beats_its_rivals(self, index):
        noise = {
            "ast-micro-ssast": 0.1,
            "ast-micro-scratch": 0.3,
            "mlp": 0.05,
            "ast-small-ensemble": 0.01,
            "cnn": 0.1,
        }
        text = self.say(make_predictions(index, noise), index)
        assert "best of 5 models is `ast-small-ensemble`" in text
        # an ensemble is not the encoder
        assert "best model with a pre-trained audio encoder is `ast-micro-ssast`" in text
        assert "`ast-micro-ssast` **does not beat** `mlp`: its mean r is lower by" in text
        assert "`ast-micro-ssast` **beats** `ast-micro-scratch` by" in text
        level = self.say(
            make_predictions(index, {"ast-micro-ssast": 0.0999, "mlp": 0.1}, rng=1), index
        )
        assert (
            "**beats**" not in level
            and "the interval includes zero" in level
            and "no `ast-*-scratch` model" in level
        )

    def test_a_model_that_sees_the_score_is_no_audio_encoder(self):
        assert report.is_encoder("ast-small-ssast")
        for name in (
            "ast-small-ssast+score",
            "ast-midi",
            "ast-base-ensemble",
            "mlp",
            "identity-player",
        ):
            assert not report.is_encoder(name)

    def test_answers_follow_the_numbers(self, index):
        rows = make_predictions(index, {"good": 0.05, "bad": 0.4, "identity-player": 0.6})
        results = evaluate(rows, index, SOME, CEILING)
        text = report.agreement(results["summary"], CEILING)
        assert text.startswith("`good` has the highest mean r: ") and "(noise ceiling 0.90)" in text
        assert "(`identity-player`)" in text
        assert "`good` predicts `" in report.dimensions(results["summary"])
        assert report.differences(results["differences"]).startswith(
            "The intervals of 3 of 3 differences in mean r exclude zero."
        )
        gap = report.deadpan(results["deadpan"])
        shares = dict(re.findall(r"`(good|bad|identity-player)` (-?\d+) %", gap))
        assert 80 <= int(shares["good"]) <= 120
        assert "`good` orders " in report.pairwise(results["pairwise"])

    def test_answers_where_there_is_nothing_to_say(self, index):
        rows = make_predictions(index, {"one": 0.1}).assign(prediction=0.5)
        results = evaluate(rows, index, FEW)
        assert (
            report.agreement(results["summary"]) == "No model has a mean correlation in this scope."
        )
        assert report.differences(results["differences"]) == "There are no two models to compare."
        people = index[index["human"]]
        alone = rows[rows["clip"].isin(people["clip"])]
        assert "No segment has both" in report.deadpan(evaluate(alone, index, FEW)["deadpan"])


class TestComparison:
    def test_the_reference_is_the_best_audio_only_model_that_is_no_encoder(self):
        models = ["midi-stats", "ast-small-ssast", "audio-stats", "mlp"]
        assert report.reference_of(models) == "audio-stats"
        assert report.reference_of(models, "mlp") == "mlp"
        assert report.reference_of(["midi-stats"]) == "midi-stats"
        with pytest.raises(
            InputError, match="reference 'cnn' is not among the models; choose one of midi-stats, "
        ):
            report.reference_of(models, "cnn")

    def test_what_is_gained_and_survives_is_said(self, folder):
        text = (folder / "comparison.md").read_text()
        assert "## Differences from mlp" in text
        assert re.search(
            r"- `ast-micro-ssast`: largest difference on `\w+` \(\+0\.\d+\).*Significantly better"
            r" on \d+: ",
            text,
        )
        starred = [line for line in text.splitlines() if line.startswith(f"| {KEYS[0]} ")]
        assert len(starred) == 1 and "* [" in starred[0]

    def test_others_figures_are_marked_as_not_comparable(self, tmp_path):
        index = predictions.load_index()
        rows = make_predictions(
            index, {"ast-x": 0.1, "midi-stats": 0.01, "ast-x+heard+score": 0.02}, "performer"
        )
        report.write(rows, index, tmp_path, settings=FEW, ceiling=reliability.load_ceiling(index))
        shown = pd.read_csv(tmp_path / "tables/published.csv")
        assert (
            len(shown) == len(compare.published_results()) and (shown["comparable"] == "no").all()
        )
        beside = shown.set_index("system")["nearest of ours"]
        # theirs hears audio, so does ours
        assert beside["MERT-330M frozen, MLP"].startswith("performer: ast-x ")
        assert (beside[shown["input"].str.startswith("MIDI").to_numpy()] == "not evaluated").all()
        text = (tmp_path / "report.md").read_text()
        assert (
            "`ast-x+heard+score`: score-informed. Models without the score have less information"
            in text
        )

    def test_a_report_without_any_model_of_sound_is_written(self, tmp_path):
        index = predictions.load_index()
        rows = make_predictions(index, {"midi-stats": 0.1, "midi-stats+score": 0.05})
        report.write(rows, index, tmp_path, settings=FEW, ceiling=reliability.load_ceiling(index))
        shown = pd.read_csv(tmp_path / "tables/published.csv").set_index("system")
        assert shown.loc["MERT-330M frozen, MLP", "nearest of ours"] == "not evaluated"


class TestCommand:
    def test_leaks_gaps_and_the_command_that_repeats_it(self, index, tmp_path, capsys):
        index.to_csv(tmp_path / "index.csv", index=False)
        for protocol in ("content", "random"):
            part = make_predictions(index, {"mlp": 0.1}, protocol)
            part[part["fold"] < 3].to_csv(tmp_path / f"predictions_{protocol}.csv", index=False)
        files, facts = (
            [str(path) for path in sorted(tmp_path.glob("predictions_*.csv"))],
            str(tmp_path / "index.csv"),
        )
        options = ["--out", str(tmp_path / "out"), "--index", facts, "--permutations", "50"]
        assert main(["evaluate", *files, *options]) == 2
        assert "covers 108 of 144" in capsys.readouterr().err
        assert main(["evaluate", *files, *options, "--partial"]) == 0
        text = (tmp_path / "out/report.md").read_text()
        assert "## Random protocol (leaky)" in text and "Protocol `random`: **leaky**" in text
        assert "**Partial**: `mlp`, `content`, seed 0 covers 108 of 144" in text
        command = re.search(
            r"^python -m percepiano_ast evaluate .*", text, flags=re.MULTILINE
        ).group()
        again = [sys.executable, *shlex.split(command)[1:]]
        before = (tmp_path / "out/report.html").read_bytes()
        (tmp_path / "out/report.html").unlink()
        subprocess.run(again, check=True, capture_output=True)
        assert (tmp_path / "out/report.html").read_bytes() == before

    def test_an_unknown_reference_is_refused_before_the_work(self, index, several, tmp_path):
        with pytest.raises(InputError, match="reference 'cnn'"):
            report.write(several, index, tmp_path / "out", reference="cnn")
        assert not (tmp_path / "out").exists()

    def test_a_file_is_no_folder(self, index, several, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="is a file"):
            report.write(several, index, tmp_path / "file", settings=FEW)

    def test_methods_can_go_into_a_paper(self, folder):
        text = (folder / "report.md").read_text()
        methods = text[text.index("## Methods") :]
        assert (
            "144 clips (120 human performances and 24 deadpan renderings of the score)" in methods
        )
        assert "`ast-micro-ssast` (3 seeds), `mlp` (1 seed)" in methods
        assert "jackknife" in methods and "4,096 exchanges, seed 0" in methods and "Holm" in methods
        assert re.search(r"Versions: percepiano_ast [\d.]+, Python 3\.\d+\.\d+, numpy ", methods)


class TestFigures:
    def test_bars_end_at_the_values_under_the_ceiling(self, index, several):
        results = evaluate(several, index, FEW, CEILING)
        axes = plots.by_scope(results["summary"], CEILING).axes[0]
        rows = results["summary"]
        mean = rows[(rows["metric"] == "pearson") & (rows["dimension"] == "mean")]
        heights = sorted(bar.get_height() for bar in axes.patches)
        assert heights == pytest.approx(sorted(mean["value"]))
        ceiling = [line for line in axes.collections if "ceiling" in line.get_label()][0]
        assert {round(point[1], 9) for path in ceiling.get_paths() for point in path.vertices} == {
            0.9
        }

    def test_filled_marks_survive_holm(self, index, several):
        results = evaluate(several, index, FEW)
        pairs = results["differences"]
        pairs = pairs[(pairs["scope"] == "overall") & (pairs["metric"] == "pearson")]
        rows = compare.between(pairs, "ast-micro-ssast", "mlp")
        axes = plots.gains(rows).axes[0]
        rows = rows[rows["dimension"].isin([*KEYS, "mean"])]
        hollow, filled, _ = (line for line in axes.lines if line.get_marker() not in ("None", ""))
        assert len(filled.get_xdata()) == (rows["p_holm"] < 0.05).sum()
        assert len(hollow.get_xdata()) + len(filled.get_xdata()) == len(KEYS) + 1

    def test_a_model_looks_alike_beside_the_reference_and_against_it(self, index, several):
        results = evaluate(several, index, FEW)
        pairs = results["differences"]
        pairs = pairs[(pairs["scope"] == "overall") & (pairs["metric"] == "pearson")]
        others = [
            name for name in results["summary"]["model"].unique() if name != "ast-micro-ssast"
        ]
        drawn = [
            plots.gains(
                pd.concat([compare.between(pairs, name, "ast-micro-ssast") for name in others])
            ),
            plots.pearson_by_dimension(results["summary"]),
        ]
        beside, alone = (
            {
                line.get_label(): (line.get_color(), line.get_marker())
                for line in figure.axes[0].lines
            }
            for figure in drawn
        )
        assert {name: beside[name] for name in others} == {name: alone[name] for name in others}

    def test_leaky_protocols_are_named_and_missing_ones_empty(self, index):
        rows = make_predictions(index, {"mlp": 0.1, "cnn": 0.2})
        values = evaluate(rows, index, FEW)["summary"]
        axes = plots.by_protocol(
            values, {"content": "content", "random": "random\n(leaky)"}, 0.9
        ).axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "content",
            "random\n(leaky)",
        ]

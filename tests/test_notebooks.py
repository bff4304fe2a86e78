"""The notebooks: rules for their cells, and headless runs of all of them. Cost: about 100 s on two
idle cores."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pandas as pd
import pytest
import soundfile
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

from percepiano_ast import colab, notebook, pipeline, plots, run_notebooks
from percepiano_ast.cli import main
from percepiano_ast.config import AUDIOSET, KALDI, PRESETS, FrontEnd, LevelStats, ModelConfig
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.models import ast, weights
from percepiano_ast.music import synth
from percepiano_ast.music.midi import read_midi, trimmed
from percepiano_ast.training.checkpoints import open_latest

REPOSITORY = Path(__file__).resolve().parent.parent
# as Colab writes them
RUNTIMES = {"02_ssast_pretrain_tpu": ("TPU", "V5E1"), "03_finetune_percepiano_gpu": ("GPU", "T4")}
LOADED = {
    name: nbformat.read(run_notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    for name in run_notebooks.NAMES
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(notebook) -> list[str]:
    """The ``img`` elements in the outputs."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return re.findall(
        r"<img [^>]*>", "\n".join(output.get("data", {}).get("text/html", "") for output in outputs)
    )


@pytest.mark.parametrize("name", run_notebooks.NAMES)
class TestRules:
    def test_starts_with_title_and_badge_then_set_up_then_form(self, name):
        title, set_up, form = LOADED[name].cells[:3]
        assert (
            title.source.startswith("# ") and f"/blob/main/notebooks/{name}.ipynb" in title.source
        )
        assert "git clone" in set_up.source and "bash colab_setup.sh" in set_up.source
        if name == "05_rate_a_recording":  # uses the bundled model
            assert next(iter(run_notebooks.form_of(LOADED[name]))) == "RECORDING"
            return
        assert next(iter(run_notebooks.form_of(LOADED[name]))) == "PRESET"
        preset, save_to = form.source.splitlines()[1:3]
        assert (
            preset
            == 'PRESET = "demo"  #@param ["demo", "micro", "mini", "compact", "small", "base"]'
        )
        # "Run all" of the demo opens no Drive dialog.
        choices = f'["{colab.HERE}", "{colab.ON_DRIVE}"] {{allow-input: true}}'
        assert save_to == f'SAVE_TO = "{colab.HERE}"  #@param {choices}'

    def test_metadata_names_the_runtime_and_hides_the_forms(self, name):
        nbformat.validate(LOADED[name])
        metadata = LOADED[name].metadata
        assert (metadata.get("accelerator"), metadata.colab.get("gpuType")) == RUNTIMES.get(
            name, (None, None)
        )
        titled = [cell for cell in code_cells(LOADED[name]) if cell.source.startswith("#@title ")]
        assert titled[:2] == LOADED[name].cells[1:3]
        assert [
            cell for cell in code_cells(LOADED[name]) if cell.metadata.get("cellView") == "form"
        ] == titled
        assert all(
            "#@param" not in cell.source for cell in code_cells(LOADED[name]) if cell not in titled
        )

    def test_every_figure_has_an_alt_text(self, name):
        shown = images(LOADED[name])
        assert shown and not any(
            "image/png" in output.get("data", {})
            for cell in code_cells(LOADED[name])
            for output in cell.outputs
        )
        for tag in shown:
            alt = html.unescape(re.search(r'alt="([^"]*)"', tag)[1])
            assert "axis: " in alt and len(alt) > 40, alt

    def test_cells_are_short_and_hold_no_logic(self, name):
        for cell in code_cells(LOADED[name]):
            assert len(cell.source.splitlines()) <= 25
            assert not re.search(
                r"^\s*(def|class|try|except|async)\b|\blambda\b", cell.source, re.MULTILINE
            )

    def test_committed_with_outputs_and_without_clutter(self, name):
        notebook = LOADED[name]
        assert any(cell.outputs for cell in code_cells(notebook)), (
            "run `notebooks --keep-outputs` before committing"
        )
        assert "widgets" not in notebook.metadata
        assert "<audio" not in json.dumps(notebook)
        for cell in code_cells(notebook):
            assert cell.execution_count is None and "execution" not in cell.metadata
            assert not any(
                output.get("name") == "stderr" or output.output_type == "error"
                for output in cell.outputs
            )

    def test_ends_by_saying_what_comes_next(self, name):
        assert re.search(
            r"next: notebook|all notebooks are done",
            "\n".join(cell.source for cell in LOADED[name].cells[-2:]),
        )


def test_figures_are_displayed_as_html_with_alt_text(monkeypatch):
    shown: list[dict] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    formatter = DisplayFormatter()
    # as `%matplotlib inline` does
    formatter.formatters["image/png"].for_type(Figure, lambda figure: b"png")
    assert formatter.format(
        plots.rating_profile(dict.fromkeys(KEYS, 0.4), title='"Air" & more')
    ) == ({}, {})
    (data,) = shown
    assert (
        data["text/plain"]
        == '"Air" & more. X axis: rating (0 to 1; 0.5 is the middle of the scale). '
        "Y axis: 19 entries from stable to unsatisfactory/doubtful."
    )
    assert f'alt="{html.escape(data["text/plain"])}"' in data["text/html"] and data[
        "text/html"
    ].startswith("<img ")


def test_the_form_offers_every_preset():
    assert set(PRESETS) == {"demo", "micro", "mini", "compact", "small", "base"}


def test_filling_in_a_form_changes_that_row_alone():
    name = "02_ssast_pretrain_tpu"
    notebook = nbformat.read(run_notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    filled = run_notebooks.form_of(
        run_notebooks.with_form(notebook, {"PRETRAIN_EPOCHS": 3, "SAVE_TO": "it's here"})
    )
    assert filled == run_notebooks.form_of(LOADED[name]) | {
        "PRETRAIN_EPOCHS": "3",
        "SAVE_TO": '"it\'s here"',
    }


def test_unknown_form_row_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match="no notebook has a form row EPOCHS"):
        run_notebooks.run(tmp_path, {"EPOCHS": 1})
    assert not list(tmp_path.iterdir())


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "percepiano_ast", *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo by the command line, two epochs of each training, another seed: where it wrote, and
    what it printed."""
    out = tmp_path_factory.mktemp("demo")
    short = ["--set", "PRETRAIN_EPOCHS=2", "--set", "FINETUNE_EPOCHS=2", "--set", "SEED=1"]
    done = command("notebooks", "--preset", "demo", "--out", out, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_demo_says_where_the_report_is(demo):
    out, printed = demo
    assert printed.rstrip().endswith(f"report: {out / 'evaluation' / 'report.html'}")
    assert "simulated" in (out / "evaluation" / "report.html").read_text().lower()
    assert (out / "evaluation" / "comparison.html").exists()
    # The simulated raters have a noise ceiling of their own.
    assert "| noise ceiling |" in (out / "evaluation" / "report.md").read_text()


def test_demo_shows_progress_of_every_notebook(demo):
    for name in run_notebooks.NAMES:
        assert re.search(rf"{name} done, \d+ s", demo[1])
    assert "epoch 2/2" in demo[1]


def test_demo_predicts_every_clip_by_a_model_of_other_music(demo):
    out, _ = demo
    index = pd.read_csv(out / "percepiano" / "index.csv").set_index("clip")
    for model in (
        "ast-micro-ssast",
        "ast-micro-scratch",
        "mlp",
        "audio-stats",
        "identity-segment-deadpan",
    ):
        table = pd.read_csv(out / f"predictions_{model}.csv")
        assert sorted(table["clip"].unique()) == sorted(index.index)
        assert set(table.groupby("clip")["dimension"].count()) == {len(KEYS)}
        assert (table["fold"] == table["clip"].map(index["fold_content"])).all() and set(
            table["seed"]
        ) == {1}
    metrics = pd.read_csv(out / "evaluation" / "metrics.csv")
    assert set(metrics["dimension"]) == {*KEYS, "mean"}


def test_demo_checkpoints_every_epoch_and_keeps_what_is_of_use(demo):
    out, _ = demo
    pretraining, fold = out / "pretrain" / "ssast", out / "finetune" / "ast-micro-ssast" / "fold_0"
    for home in (pretraining, fold):
        assert re.search(r'"seed": 1\b', (home / "settings.json").read_text())
    for home, files in {
        pretraining / "checkpoints": 2,
        fold / "checkpoints": 0,
        fold / "model": 1,
    }.items():
        assert len(pd.read_csv(home.parent / "history.csv")) == 2
        assert len(list(home.glob("step_*.safetensors"))) == files


def test_status_finds_all_of_the_demo_whole(demo):
    out, _ = demo
    rows = notebook.status(pipeline.Run(PRESETS["demo"], out))
    counts = rows["item"].str.replace(r", fold \d", "", regex=True).value_counts()
    wanted = {
        "shards for pre-training": 1,
        "shards of rated clips": 1,
        "pre-training ssast": 2,
        "report.html": 1,
    }
    wanted |= {"ast-micro-ssast": 4, "ast-micro-scratch": 4, "ratings: ast-micro-ssast": 4}  # folds
    assert wanted.items() <= counts.to_dict().items()
    trained = rows[rows["step"] != ""]
    assert set(trained["integrity"]) == {"intact (manifest)"} and set(trained["epoch"]) == {1, 2}
    assert rows["integrity"].str.match(r"intact|$").all()


@pytest.mark.slow
def test_what_is_explained_is_the_best_encoder_that_has_gradients(demo, tmp_path):
    shutil.copytree(demo[0], tmp_path / "demo")
    run = pipeline.Run(PRESETS["demo"], tmp_path / "demo")
    judged = pd.read_csv(run.predictions("ast-micro-ssast")).assign(model="ast-micro-ssast-judged")
    judged["prediction"] += 0.9 * (judged["rating"] - judged["prediction"])
    (run.root / "judged" / "ear").mkdir(parents=True)
    judged.to_csv(
        run.root / "judged" / "ear" / "predictions_ast-micro-ssast-judged_content.csv.gz",
        index=False,
    )
    pipeline.evaluate(run)
    assert notebook.results(run)["summary"].query("model == 'ast-micro-ssast-judged'").shape[0]
    title = notebook.explained(run, "timbre_soft_loud").get_suptitle()
    assert re.search(r"by ast-micro-(ssast|scratch) \(simulated", title)


def test_second_run_continues_from_what_is_there(demo):
    out, _ = demo
    before = (out / "predictions_ast-micro-ssast.csv").read_bytes()
    done = command("finetune", "--out", out, "--epochs", 2, "--set", "seed=1")
    assert done.returncode == 0, done.stderr
    assert (out / "predictions_ast-micro-ssast.csv").read_bytes() == before


@pytest.mark.slow
def test_published_weights_are_a_start_too(demo, tmp_path):
    """In Hugging Face's form, as those of AudioSet are; random and small here."""
    out, _ = demo
    config = ModelConfig("tiny", width=64, depth=1, num_heads=1, stride=(10, 10), n_frames=256)
    params = ast.Classifier(config, 5).init(jax.random.key(0), jnp.zeros((1, 256, 128)))["params"]
    folder = weights.write_weights(
        tmp_path / "published", weights.Weights(params, config, "hf_ast", norm_epsilon=1e-12)
    )
    for arguments in (
        ["preprocess", "--percepiano", "demo"],
        ["finetune", "--weights", folder, "--epochs", 2],
    ):
        done = command(*arguments, "--init", "audioset", "--out", out)
        assert done.returncode == 0, done.stderr
    table = pd.read_csv(out / "predictions_ast-custom-audioset.csv")
    assert table["clip"].nunique() == len(pd.read_csv(out / "percepiano" / "index.csv"))
    assert table.groupby("dimension")["prediction"].std().min() > 0
    # The fold's model carries Kaldi's front end and AudioSet's levels with it.
    _, made = open_latest(out / "finetune/ast-custom-audioset/fold_0/model", made_by="")
    assert FrontEnd(**made["front_end"]) == KALDI and LevelStats(**made["statistics"]) == AUDIOSET
    assert made["model"]["stride"] == [10, 10]


@pytest.mark.slow
def test_switches_are_compared_on_the_frozen_encoder(demo):
    out, _ = demo
    done = command("ablate", "--out", out, "--init", "scratch", "--seeds", 2, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    text = Path(done.stdout.splitlines()[-1]).read_text()
    assert text.startswith(
        "# Ablations of the rating heads on ast-micro-scratch, frozen (simulated ratings)"
    )
    assert "| cross-task attention | on |" in text and "| rater weights | on |" in text


@pytest.mark.slow
def test_what_trains_the_encoder_is_compared_too_and_resumes(demo):
    out, _ = demo
    arguments = [
        "ablate",
        "--out",
        out,
        "--init",
        "scratch",
        "--epochs",
        1,
        "--strategies",
        "mixup",
    ]
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    home = out / "switches" / "ast-micro-scratch-trained"
    found = pd.read_csv(home / "switches.csv").set_index("choice")
    # What it is compared with comes along; one seed tells nothing of others.
    assert list(found.index) == [np.nan, "last", "mixup"] and found["seed_sd"].isna().all()
    assert (
        found.loc["mixup", "against"] == "strategy last"
        and found.loc["last", "against"] == "reference"
    )
    assert not list(home.rglob("finetune"))  # models are not kept
    again = command(*arguments)
    assert again.returncode == 0 and again.stdout.count("already done") == 3
    wrong = command(*arguments[:-1], "mixxup")
    assert wrong.returncode == 2 and "unknown strategy or augmentation 'mixxup'" in wrong.stderr


@pytest.mark.slow
def test_a_rendering_of_ones_own_is_taken_instead(demo, tmp_path):
    """Recordings of all clips by an instrument of one's own; one that is missing is named."""
    source, recordings = demo[0] / "demo" / "percepiano", tmp_path / "recordings"
    recordings.mkdir()
    piano = synth.make_synthesizer("builtin")
    for midi in source.rglob("all_2rounds/*.mid"):
        soundfile.write(
            recordings / f"{midi.stem}.wav", piano.render(trimmed(read_midi(midi)), 22_050), 22_050
        )
    arguments = [
        "preprocess",
        "--percepiano",
        source,
        "--recordings",
        recordings,
        "--out",
        tmp_path / "run",
    ]
    missing = next(iter(recordings.iterdir()))
    kept = missing.read_bytes()
    missing.unlink()
    done = command(*arguments)
    assert done.returncode == 2 and missing.stem in done.stderr
    missing.write_bytes(kept)
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    clips = pd.read_csv(tmp_path / "run" / "percepiano" / "levels.csv")
    assert set(clips["synthesizer"]) == {"own"} and len(clips) == len(
        pd.read_csv(source / "index.csv")
    )


def test_a_pre_training_goes_out_and_comes_back(demo, tmp_path):
    done = command(
        "convert", demo[0] / "pretrain" / "ssast", "--output", tmp_path / "mine.safetensors"
    )
    assert done.returncode == 0, done.stderr
    back = weights.read_weights(tmp_path / "mine.safetensors")
    trained = open_latest(demo[0] / "pretrain/ssast/checkpoints", made_by="")[0]["state"]["params"]
    jax.tree.map(np.testing.assert_array_equal, back.params, trained)
    assert back.front_end == FrontEnd() and back.description["data"] == "made from code"
    done = command(
        "convert",
        tmp_path / "mine.safetensors",
        "--output",
        tmp_path / "folder",
        "--kind",
        "hf_ast",
    )
    assert done.returncode == 2 and "cannot be converted to 'hf_ast'" in done.stderr


def test_other_settings_in_the_same_place_are_refused(demo):
    done = command("pretrain", "--out", demo[0], "--epochs", 5)
    assert done.returncode == 2
    assert (
        "another configuration" in done.stderr
        and "epochs" in done.stderr
        and "Choose another" in done.stderr
    )


def test_rate_prints_json_alone_and_explains_what_it_cannot_rate(demo, tmp_path):
    midi = next((demo[0] / "demo" / "percepiano").rglob("*.mid"))
    wave = synth.make_synthesizer("builtin").render(read_midi(midi), 44_100)
    soundfile.write(tmp_path / "good.wav", wave, 44_100)
    (tmp_path / "bad.wav").write_bytes(b"not a recording")
    files = [tmp_path / "good.wav", tmp_path / "bad.wav"]
    done = command("rate", *files, "--run", demo[0], "--json", env={"PATH": "", "CI": "true"})
    good, bad = json.loads(done.stdout)
    assert done.returncode == 2
    assert list(good["ratings"]) == list(KEYS) == list(good["uncertainty"])
    assert "simulated" in good["warnings"][0]
    assert set(bad) == {"file", "error"} and bad["error"] in done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["notebooks", "--preset", "demmo"], "Did you mean 'demo'"),
        (["pretrain", "--out", "{tmp}"], "Run notebook 01_preprocess_maestro"),
        (["finetune", "--out", "{tmp}"], "Run notebook 02_ssast_pretrain_tpu"),
        (["rate", "x.wav", "--run", "{tmp}"], "Run notebook 03_finetune_percepiano_gpu"),
        (["evaluate", "{tmp}/none.csv", "--out", "{tmp}/report"], "none.csv"),
        (["preprocess", "--source", "{tmp}/none.zip", "--out", "{tmp}"], "none.zip"),
        (["preprocess", "--percepiano", "{tmp}", "--out", "{tmp}/run"], "missing or incomplete"),
        (["pretrain", "--pretraining", "sast", "--out", "{tmp}"], "Did you mean 'ssast'"),
        (["finetune", "--set", "stratgy=lora", "--out", "{tmp}"], "Did you mean 'strategy'"),
        (
            ["finetune", "--set", "strategy", "--out", "{tmp}"],
            "'strategy' does not have the form NAME=VALUE",
        ),
        (
            ["finetune", "--set", "mixup=much", "--out", "{tmp}"],
            "mixup=much: the value must be of type float",
        ),
        (
            ["finetune", "--set", "predict_uncertainty=yes", "--out", "{tmp}"],
            "=yes: the value must be true or false",
        ),
        (
            ["finetune", "--init", "audioset", "--weights", "{tmp}/none.pth", "--out", "{tmp}"],
            "no weights at",
        ),
        (["convert", "{tmp}/none.pth", "--output", "{tmp}/x.safetensors"], "no weights at"),
    ],
)
def test_what_is_missing_is_said_in_one_line_with_exit_2(arguments, message, tmp_path, capsys):
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_cell_that_finds_bad_input_ends_the_run_with_its_message(tmp_path):
    given = ["--set", f"SOURCE={tmp_path}/none.zip", "--set", f"KEEP_IN={tmp_path}/old name"]
    done = command("notebooks", "--preset", "base", "--out", tmp_path, *given)
    (line,) = done.stderr.splitlines()[-1:]
    assert done.returncode == 2 and line.startswith(
        f"error: '{tmp_path}/none.zip': no such archive or folder of recordings"
    )
    assert (tmp_path / "old name").is_dir()  # SAVE_TO by its former name


@pytest.mark.slow
def test_what_plays_no_note_is_rated_to_the_end_of_the_notebook(tmp_path):
    hum = 0.1 * np.sin(2 * np.pi * 50 * np.arange(8 * 22_050) / 22_050)
    soundfile.write(tmp_path / "hum.wav", hum, 22_050)
    run = (
        "import sys; from percepiano_ast import run_notebooks as r; "
        "r.run(sys.argv[1], {'RECORDING': sys.argv[2], 'SECOND': ''}, "
    )
    run += "names=('05_rate_a_recording',))"
    arguments = [sys.executable, "-c", run, str(tmp_path), str(tmp_path / "hum.wav")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "no piano notes were detected"
        in (tmp_path / "notebooks" / "05_rate_a_recording.ipynb").read_text()
    )
    assert (tmp_path / "hum.html").exists()


def test_long_presets_are_refused_on_the_wrong_runtime(logged):
    with pytest.raises(InputError, match="set PRESET to 'demo'"):
        colab.check_runtime(PRESETS["base"], "tpu")
    colab.check_runtime(PRESETS["mini"], "tpu")
    slow = "preset 'mini' takes hours on this CPU, less on a machine with a TPU"
    assert logged == [f"{slow}; it resumes after an interruption"]
    colab.check_runtime(PRESETS["base"], "")  # notebooks 01 and 04 need no accelerator
    colab.check_runtime(PRESETS["demo"], "tpu")


@pytest.mark.parametrize("arguments", [[], ["pretrian"], ["rate"], ["evaluate", "x.csv"]])
def test_usage_errors_exit_with_2(arguments):
    assert main(arguments) == 2

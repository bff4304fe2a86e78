"""The whole experiment, from MIDI to the page of results, on made-up playing and simulated ratings.
Cost: 16 minutes a core."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from conftest import log_lines
from reproduce import Experiment, main, run_experiment
from test_asap import write_folder
from tiny import FINETUNE, PRETRAIN

from percepiano_ast import pipeline
from percepiano_ast.config import PRESETS
from percepiano_ast.errors import InputError
from percepiano_ast.inference.rate import RatingModelFile
from percepiano_ast.music.midi import NOTE, PEDAL, Performance, write_midi

pytestmark = pytest.mark.slow

PRESET = dataclasses.replace(
    PRESETS["demo"],
    model=dataclasses.replace(PRESETS["demo"].model, width=32, depth=1, num_heads=2),
    pretrain=dataclasses.replace(PRETRAIN, epochs=1, batch_size=8, learning_rate=5e-3),
    finetune=dataclasses.replace(FINETUNE, epochs=1),
)


@pytest.fixture(scope="module")
def midi(tmp_path_factory):
    """Long enough for windows of 10 s."""
    folder = write_folder(tmp_path_factory.mktemp("asap"))
    for seed, path in enumerate(sorted(folder.rglob("*.mid"))):
        rng = np.random.default_rng(seed)
        notes = [
            (0.4 * k, 0.4 * k + 0.3, rng.choice([60, 64, 67, 72]), rng.integers(60, 110))
            for k in range(60)
        ]
        write_midi(Performance(np.array(notes, NOTE), np.zeros(0, PEDAL)), path)
    return folder


@pytest.fixture(scope="module")
def done(midi, tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment")
    given = Experiment(
        str(midi),
        "demo",
        hours=0.2,
        voices=("builtin",),
        pianos=("builtin",),
        unseen="",
        starts=("transcriptionstem", "cnn"),
        seeds=(0, 1),
        protocols=("content", "performer"),
        epochs={"transcriptionstem": 12, "cnn": 2},
    )
    with log_lines() as lines:
        first = run_experiment(PRESET, out, given, minutes=1e-6)
        report = run_experiment(PRESET, out, given)
    return out, given, first, report, lines


def test_a_time_limit_stops_between_stages_and_the_same_call_goes_on(done):
    out, _, first, report, lines = done
    assert first is None and report == out / "results" / "report.html" and report.exists()
    assert any("reached before: " in line for line in lines)


def test_results_hold_every_model_and_how_they_were_made(done):
    out, *_ = done
    rows = pd.concat([pd.read_csv(path) for path in (out / "results").glob("predictions_*.csv.gz")])
    assert {"content", "performer"} == set(rows["protocol"])
    content = set(rows.query("protocol == 'content'")["model"])
    name = f"ast-{PRESET.model.name}-transcriptionstem"
    assert {
        name,
        f"{name}-notes",
        f"{name}-judged",
        f"{name}-judged+score",
        "cnn",
        "audio-stats",
        "midi-stats",
    } <= content
    assert {f"{name}-judged-ensemble", f"{name}-judged-ensemble+score"} <= content
    assert set(rows[rows["model"] == f"{name}-judged"]["seed"]) == {0, 1}
    assert {f"{name}-packaged{more}" for more in ("", "+score", "@room", "+score@room")} <= content
    model = out / "packaged" / f"{PRESET.model.name}-rater.safetensors"
    assert (
        RatingModelFile.read(model).description["simulated"] and model.with_suffix(".md").exists()
    )
    assert f"{name}-judged" in set(rows.query("protocol == 'performer'")["model"])
    made = json.loads((out / "results" / "experiment.json").read_text())
    assert made["hours"] == 0.2 and "cores" in made["machine"]
    stages = pd.read_csv(out / "stages.csv")
    assert (stages["minutes"] > 0).all() and stages["stage"].str.startswith("pre-train").any()
    assert "simulated" in (out / "results" / "report.md").read_text()
    assert len(pd.read_csv(out / "seed_0" / "pretrain" / "transcriptionstem" / "history.csv")) == 12
    # What has no pre-training is fine-tuned for as long; heads on the encoder that has one are the
    # preset's.
    cnn, heads = (
        out / "seed_0" / "finetune" / name / "fold_0" / "history.csv" for name in ("cnn", name)
    )
    assert (len(pd.read_csv(cnn)), len(pd.read_csv(heads))) == (2, 1)


def test_nothing_is_made_twice(done):
    out, given, *_ = done
    before = {
        path: path.stat().st_mtime
        for path in out.rglob("predictions_*")
        if "results" not in path.parts
    }
    run_experiment(PRESET, out, given)
    assert {path: path.stat().st_mtime for path in before} == before


def test_another_experiment_is_refused_where_one_is(done):
    out, given, *_ = done
    with pytest.raises(InputError, match="another configuration"):
        run_experiment(PRESET, out, dataclasses.replace(given, hours=1.0))


@pytest.mark.parametrize(
    ("starts", "judged"),
    [(["scratch", "ssast"], []), (["scratch", "transcriptionstem"], ["transcriptionstem"])],
)
def test_what_is_compared_without_hearing_notes_is_not_judged(
    midi, tmp_path, capsys, starts, judged
):
    out = tmp_path / "compared"
    command = [
        "experiment",
        "--midi",
        str(midi),
        "--percepiano",
        "demo",
        "--out",
        str(out),
        "--preset",
        "demo",
        "--unseen",
        "musescore-small",
    ]
    assert (
        main(
            [
                *command,
                "--voices",
                "builtin",
                "--pianos",
                "builtin",
                "--starts",
                *starts,
                "--minutes",
                "0.000001",
            ]
        )
        == 0
    )
    assert "reached before: " in capsys.readouterr().out
    assert json.loads((out / "settings.json").read_text())["experiment"]["judged"] == judged


def test_heads_are_trained_as_it_is_told(midi, tmp_path, capsys):
    command = [
        "experiment",
        "--midi",
        str(midi),
        "--percepiano",
        "demo",
        "--out",
        str(tmp_path),
        "--preset",
        "base",
    ]
    command += [
        "--voices",
        "builtin",
        "--pianos",
        "builtin",
        "--unseen",
        "musescore-small",
        "--minutes",
        "0.000001",
    ]
    assert main([*command, "--set", "seed=3"]) == 2 and "use --seeds" in capsys.readouterr().err
    assert main([*command, "--set", "strategy=frozen"]) == 0
    assert (
        json.loads((tmp_path / "settings.json").read_text())["preset"]["finetune"]["strategy"]
        == "frozen"
    )


def test_a_piano_that_is_heard_is_not_unseen():
    with pytest.raises(
        InputError, match="the held-out soundfont builtin is also used for training"
    ):
        Experiment("midi", "demo", voices=("builtin",), unseen="builtin")
    with pytest.raises(InputError, match="Did you mean 'transcription'"):
        Experiment("midi", "demo", starts=("transcriptoin",))


def test_what_more_labels_would_be_worth(done):
    out, given, *_ = done
    run = pipeline.Run(PRESET, out / "seed_0", shards=out / "maestro", clips=out / "percepiano")
    table = pd.read_csv(
        path := pipeline.learning_curve(run, "transcriptionstem", str(out / "demo" / "percepiano"))
    )
    assert (
        set(table["unit"]) == {"everything", "passages", "players", "clips"}
        and table["r"].notna().all()
    )
    assert path.with_suffix(".png").stat().st_size > 5000

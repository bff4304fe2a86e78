"""Explanations of recordings: a model whose reasons are known, the notes, the checks and the
command. About 25 s."""

import types
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import soundfile
from tiny import CLIPS, compiled_once, embed, finetuning, fold_to

from percepiano_ast import audio
from percepiano_ast.cli import main
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.inference.rate import FoldEnsemble, FoldModel
from percepiano_ast.music.midi import NOTE, PEDAL, Performance, write_midi
from percepiano_ast.studies import explain
from percepiano_ast.studies.attribution import ModelFunctions
from percepiano_ast.training.finetune import Scaler

LOUD, RATE = KEYS[8], 22_050
TONE, AT = 83, 12.0  # B5, 988 Hz: struck once, 12 s into the recording


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


def performance(at: float = AT, seconds: int = 20, shift: float = 0.0) -> Performance:
    """A note a second, A3, but for one B5."""
    notes = [
        (k + 0.1 + shift, k + 0.9 + shift, TONE if k == at else 57, 90) for k in range(seconds)
    ]
    return Performance(np.array(notes, NOTE), np.zeros(0, PEDAL))


def write_wav(path: Path, played: Performance) -> Path:
    """Sines that die away, quite silent in between."""
    wave = np.zeros(int((played.duration + 0.5) * RATE))
    for note in played.notes:
        time = np.arange(int((note["offset"] - note["onset"]) * RATE)) / RATE
        start = int(note["onset"] * RATE)
        hertz = 440 * 2 ** ((int(note["pitch"]) - 69) / 12)
        wave[start : start + len(time)] += (
            0.3 * np.sin(2 * np.pi * hertz * time) * np.exp(-4 * time)
        )
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> Path:
    """A run of two folds, as the fine-tuning step leaves it."""
    root, params = tmp_path_factory.mktemp("run"), finetuning().init(0)
    start = params, embed(finetuning(), params, CLIPS)
    for fold in range(2):
        directory = root / "finetune" / "ast-test-ssast" / f"fold_{fold}"
        fold_to(directory, start, finetuning(seed=fold), init="ssast", fold=fold)
    return root


@pytest.fixture(scope="module")
def wavs(tmp_path_factory) -> list[Path]:
    """Recordings in which B5 is struck at different moments."""
    folder = tmp_path_factory.mktemp("wav")
    return [write_wav(folder / f"take {k}.wav", performance(at)) for k, at in enumerate((AT, 3))]


@pytest.fixture(scope="module")
def short_wavs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("short")
    return [write_wav(folder / f"{at}.wav", performance(at % 3, seconds=3)) for at in range(5)]


@pytest.fixture(scope="module")
def known() -> explain.Explainer:
    """An explainer of a model that hears how loud the bands around 988 Hz are on average, whatever
    its weights."""
    bands = jnp.asarray(np.abs(audio.band_centres() - 988) < 50, jnp.float32)

    def embed_sums(params, log_mel, valid):
        heard = (jax.nn.softplus(4 * log_mel) * bands[None, None, :]).sum(axis=2)
        return valid.sum(axis=1).astype(jnp.float32), jnp.where(valid, heard, 0.0).sum(axis=1)

    def rate(params, sums):
        return 0.2 + (sums[1] / sums[0])[:, None] * jnp.ones((1, len(KEYS)))

    run = finetuning()
    functions = ModelFunctions(embed_sums, rate, run.model.n_frames)

    class Known(explain.Explainer):
        functions = staticmethod(lambda run: functions)

    model = FoldModel(run, run.init(0), Scaler(jnp.zeros(1), jnp.ones(1)), False)
    return Known(types.SimpleNamespace(models=[model], name="known"))


@pytest.fixture(scope="module")
def found(known, wavs) -> explain.Explanation:
    return known.explain(known.load(wavs[0]), [LOUD], methods=("gradients",))[0]


class TestKnownAnswer:
    def test_the_map_points_at_the_band_and_the_second(self, found):
        sizes = np.abs(found.map)
        frames = slice(int(AT / 0.00998), int((AT + 1) / 0.00998))
        near = np.abs(audio.band_centres() - 988) < 50
        assert sizes[frames][:, near].sum() > 0.8 * sizes.sum() and sizes[:, ~near].sum() == 0
        assert found.rating - found.baseline > 0.01 and abs(found.gap) < 0.02 * (
            found.rating - found.baseline
        )

    def test_tables_add_up_to_the_map(self, found):
        total = found.map.sum(dtype=np.float64)
        seconds, bands = found.seconds_table(), found.bands_table()
        assert (
            seconds["contribution"].sum()
            == pytest.approx(total, rel=1e-5)
            == bands["contribution"].sum()
        )
        assert seconds["start"][seconds["contribution"].idxmax()] == AT
        assert bands["hertz"][bands["contribution"].idxmax()] == pytest.approx(988, abs=50)

    @pytest.mark.parametrize("seconds", [2, 5])
    def test_the_excerpt_holds_that_second(self, known, found, seconds):
        excerpt = found.excerpt(seconds)
        assert excerpt.start <= AT + 0.1 and excerpt.stop >= AT + 0.8
        assert (
            len(excerpt.wave) / RATE
            == pytest.approx(seconds, abs=0.02)
            == excerpt.stop - excerpt.start
        )
        assert excerpt.contribution > 0.8 * (found.rating - found.baseline)
        assert (
            excerpt.wave[0] == pytest.approx(0, abs=1e-4) == excerpt.wave[-1]
            and np.abs(excerpt.wave).max() > 0.1
        )
        check = explain.silence_excerpt(known, found, excerpt)
        assert (
            check.rank == 1
            and check.moved > 5 * check.others
            and "the largest change of " in check.sentence
        )

    def test_an_excerpt_longer_than_the_recording_is_all_of_it(self, known, found, wavs):
        whole = found.excerpt(60)
        assert whole.start == 0 and len(whole.wave) == len(found.recording.wave)
        assert "no other excerpt" in explain.silence_excerpt(known, found, whole).sentence
        with pytest.raises(InputError, match="excerpt length is 0 seconds"):
            found.excerpt(0)

    def test_excerpts_can_be_asked_for_at_once(self, known, found, wavs):
        asked = known.excerpt(wavs[0], LOUD, seconds=2)
        assert (asked.start, asked.contribution) == (
            found.excerpt(2).start,
            found.excerpt(2).contribution,
        )

    def test_the_note_is_found(self, found):
        table = explain.note_table(found, performance())
        assert len(table) == 21 and table["contribution"].sum() == pytest.approx(
            found.map.sum(), rel=1e-5
        )
        first = table.iloc[0]
        assert (first["name"], first["pitch"], first["note"]) == ("B5", TONE, AT) and first[
            "share"
        ] > 0.8
        assert table.iloc[-1]["note"] == -1 and table["share"].sum() == pytest.approx(1)

    def test_a_pedal_carries_a_note_on(self, found):
        pedal = np.array([(12.5, 64, 127), (14.5, 64, 0)], PEDAL)
        held = Performance(performance().notes, pedal)
        dry, wet = (
            explain.note_table(found, one).set_index("note")["contribution"]
            for one in (performance(), held)
        )
        assert wet[-1] != dry[-1] and wet.sum() == pytest.approx(dry.sum(), rel=1e-5)

    def test_a_note_under_the_pedal_ends_when_its_string_is_struck_again(self, found):
        front_end = found.recording.front_end
        per_second = front_end.sample_rate / front_end.hop_length
        attributed = np.zeros_like(found.map)
        attributed[int(8.4 * per_second) : int(8.8 * per_second)] = 1
        one = replace(found, maps={"gradients": attributed})
        held = Performance(performance().notes, np.array([(0.0, 64, 127)], PEDAL))
        table = explain.note_table(one, held).set_index("note")["contribution"]
        assert table[8] == pytest.approx(attributed.sum(), rel=1e-5)
        assert (table[table.index != 8] == 0).all()

    def test_checks_tell_good_maps_and_a_model_that_learned_nothing(self, known, short_wavs):
        """It moves fast when the map is followed; and as its weights do nothing, random ones change
        no map."""
        explained = [
            known.explain(known.load(wav), [LOUD], methods=("gradients",)) for wav in short_wavs
        ]
        result, again = (
            explain.run_checks(known, explained, seed=3),
            explain.run_checks(known, explained[:1], seed=3),
        )
        pd.testing.assert_frame_equal(
            result["deletion"][: len(again["deletion"])], again["deletion"]
        )
        area = explain.areas(result["deletion"])
        assert (area["most relevant first"] > 1.5 * area["random"]).all()
        assert (area["random"] > area["least relevant first"]).all()
        verdicts = result["verdicts"].set_index("check")
        assert (
            1.5
            < verdicts.loc["deletion", "low"]
            <= verdicts.loc["deletion", "value"]
            <= verdicts.loc["deletion", "high"]
        )
        assert verdicts.loc["deletion", "sentence"].startswith(
            "maps are faithful: deletion moves the rating "
        )
        assert (result["randomisation"][["spearman", "spearman_size", "ssim"]] > 0.999).all(
            axis=None
        )
        assert verdicts.loc["randomisation", "sentence"].startswith(
            "maps do not depend on the trained weights"
        )


class TestVerdicts:
    def test_deletion_in_words(self):
        assert (
            explain.verdict("deletion", 3.14, 2.1, 4.2, 12)
            == "maps are faithful: deletion moves the rating 3.1 times as fast as random order (95"
            " % interval 2.1 to 4.2, 12 recordings)"
        )
        assert explain.verdict("deletion", 0.5, 0.2, 0.8, 12).startswith("maps are not faithful")
        assert explain.verdict("deletion", 1.2, 0.8, 1.7, 12).startswith(
            "inconclusive whether maps are faithful"
        )
        assert "one recording, no interval" in explain.verdict("deletion", 3.0, np.nan, np.nan, 1)
        assert explain.verdict("deletion", 3.0, 2.0, 4.0, 3).startswith(
            "no verdict from fewer than 5 recordings"
        )

    def test_randomisation_in_words(self):
        assert explain.verdict("randomisation", 0.1, 0, 0.2, 9).startswith(
            "maps depend on the trained weights"
        )
        assert explain.verdict("randomisation", 0.5, 0.4, 0.6, 9).startswith(
            "inconclusive whether maps depend"
        )
        assert explain.verdict("randomisation", 0.9, 0.8, 1.0, 9).startswith(
            "maps do not depend on the trained weights"
        )

    def test_structural_similarity(self):
        image = np.random.default_rng(0).uniform(-1, 1, (40, 8))
        other = np.random.default_rng(1).uniform(-1, 1, (40, 8))
        assert (
            explain.ssim(image, image) == pytest.approx(1) and abs(explain.ssim(image, other)) < 0.3
        )

    def test_cells_add_up(self):
        values = np.random.default_rng(0).normal(size=(70, 128))
        summed = explain.cell_sums(values, (16, 32))
        assert summed.shape == (3, 8) and summed.sum() == pytest.approx(values.sum())
        assert summed[2, 1] == pytest.approx(values[64:, 16:32].sum())


class TestWrongMidi:
    def test_of_another_length(self, found):
        with pytest.raises(
            InputError, match="notes last from 0.1 to 5.9 s, the recording take 0 20.4 s"
        ):
            explain.note_table(found, performance(seconds=6))
        with pytest.raises(InputError, match="Give the MIDI of this recording"):
            explain.note_table(found, performance(seconds=30))

    def test_moved(self, found):
        with pytest.raises(
            InputError, match=r"moved by [+-]0\.\d\d s. Trim both to start at the same time"
        ):
            explain.note_table(found, performance(shift=0.4))


class TestExplainer:
    @pytest.mark.slow
    def test_random_weights_change_maps_of_a_trained_model(self, finetuned, wavs):
        explainer = explain.Explainer(FoldEnsemble(finetuned), steps=8, most_steps=8)
        recording = explainer.load(wavs[0])
        one = explainer.explain(recording, [LOUD], methods=("gradients",))[0]
        assert one.rating == pytest.approx(
            FoldEnsemble(finetuned).rate(wavs[0]).ratings[LOUD], abs=1e-4
        )
        stages = dict(explainer.randomised(0, steps=8))
        assert list(stages) == ["head", "1 of 1 blocks", "everything"]
        other = stages["everything"].explain(recording, [LOUD], methods=("gradients",))[0]
        assert abs(np.corrcoef(one.map.ravel(), other.map.ravel())[0, 1]) < 0.9

    def test_silence_is_another_baseline(self, finetuned, wavs):
        explainer = explain.Explainer(FoldEnsemble(finetuned), "silence", steps=4, most_steps=4)
        recording = explainer.load(wavs[0])
        assert (explainer.baseline_of(recording.level) == -80).all()
        one = explainer.explain(recording, [LOUD, KEYS[0]])[1]
        assert one.dimension == KEYS[0] and set(one.maps) == {"gradients", "relevance", "rollout"}
        assert (one.map[recording.level == -80] == 0).all()
        with pytest.raises(
            InputError, match="unknown baseline 'noise'. Choose one of: mean, silence"
        ):
            explain.Explainer(FoldEnsemble(finetuned), "noise")


class TestCommand:
    def run(self, finetuned, out, *arguments) -> int:
        return main(["explain", *map(str, arguments), "--run", str(finetuned), "--out", str(out)])

    def test_files_of_one_recording(self, finetuned, wavs, tmp_path, capsys):
        write_midi(performance(), tmp_path / "take.mid")
        options = ("--dimension", LOUD, "--midi", tmp_path / "take.mid", "--seconds", 3)
        assert self.run(finetuned, tmp_path / "out", wavs[0], *options) == 0
        folder = tmp_path / "out" / "take 0"
        expected = {
            f"{name}_{LOUD}.{suffix}" for name in ("map", "notes") for suffix in ("png", "svg")
        }
        expected |= {f"{name}_{LOUD}.csv" for name in ("seconds", "bands", "notes")}
        assert {path.name for path in folder.iterdir()} == expected | {
            f"excerpt_{LOUD}.wav",
            "explanation.txt",
        }
        wave, rate = soundfile.read(folder / f"excerpt_{LOUD}.wav")
        assert rate == RATE and len(wave) / rate == pytest.approx(3, abs=0.02)
        told = capsys.readouterr().out
        assert told.strip() == (folder / "explanation.txt").read_text().strip()
        notes = "notes with the largest contribution"
        for part in (
            "rated 0.",
            "largest contribution: ",
            "without it the rating changes by",
            notes,
            "simulated",
        ):
            assert part in told

    def test_checks_over_recordings(self, finetuned, short_wavs, tmp_path, capsys):
        assert (
            self.run(finetuned, tmp_path / "out", *short_wavs[:2], "--dimension", LOUD, "--checks")
            == 0
        )
        for name in ("deletion", "randomisation"):
            assert {path.suffix for path in (tmp_path / "out").glob(f"{name}.*")} == {
                ".csv",
                ".png",
                ".svg",
            }
        verdicts = pd.read_csv(tmp_path / "out" / "verdicts.csv")
        assert len(verdicts) == 4 and (verdicts["recordings"] == 2).all()
        assert verdicts["sentence"].str.startswith("no verdict from fewer than 5").all()
        assert verdicts["sentence"][0] in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (
                ["--dimension", "timbre_soft_lout"],
                "unknown dimension 'timbre_soft_lout'. Did you mean 'timbre_soft_loud'?",
            ),
            (["--dimension", LOUD, "--baseline", "noise"], "Choose one of: mean, silence"),
            (["--dimension", LOUD, "--model", "ast-x"], "Choose one of: ast-test-ssast"),
        ],
    )
    def test_choices_are_named(self, finetuned, wavs, tmp_path, capsys, arguments, why):
        assert self.run(finetuned, tmp_path / "out", wavs[0], *arguments) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "out").exists()

    def test_files_that_cannot_be_explained(self, finetuned, wavs, tmp_path, capsys):
        soundfile.write(tmp_path / "click.wav", np.full(300, 0.1), RATE)
        write_midi(performance(seconds=4), tmp_path / "other.mid")
        midi = ("--midi", tmp_path / "other.mid")
        for files, options, why in [
            ([tmp_path / "click.wav"], (), "Give a recording of at least 1 s"),
            ([wavs[0], wavs[1]], midi, "one MIDI for 2 recordings"),
            ([wavs[0], wavs[0]], (), "two recordings are called take 0"),
            ([wavs[0]], midi, "Give the MIDI of this recording"),
        ]:
            assert self.run(finetuned, tmp_path / "out", *files, "--dimension", LOUD, *options) == 2
            assert why in capsys.readouterr().err

"""Pre-training that hears what is played, and listening with it to whole clips. Cost: 30 s, nearly
all of it compiling."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from tiny import (
    FINETUNE,
    FRONT_END,
    MODEL,
    PRETRAIN,
    STATISTICS,
    bits,
    compiled_once,
    pretrain_to,
    pretrained_bits,
    without_seconds,
)

from percepiano_ast.config import PRESETS, PretrainConfig
from percepiano_ast.data.batches import RatedClips
from percepiano_ast.errors import InputError
from percepiano_ast.files import write_tensors
from percepiano_ast.inference import rate
from percepiano_ast.inference.rate import FoldEnsemble, require_explained
from percepiano_ast.inference.transcribe import Transcriber, features_of
from percepiano_ast.models import transcription
from percepiano_ast.music.midi import NOTE, PEDAL, SUSTAIN, Performance
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES
from percepiano_ast.music.piano_roll import FrameTargets, frame_targets
from percepiano_ast.pipeline.run import EncoderInit, Run
from percepiano_ast.pipeline.steps import CrossValidation, cross_validate
from percepiano_ast.training import pretrain as pretraining
from percepiano_ast.training.checkpoints import open_latest
from percepiano_ast.training.finetune import Finetuning
from percepiano_ast.training.pretrain import Pretraining, reconstruction

NUMBER = 5  # of descriptors
TRANSCRIBE = dataclasses.replace(PRETRAIN, objective="transcription", learning_rate=2e-3, epochs=2)
HOP = FRONT_END.hop_length / FRONT_END.sample_rate


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


def played_clip(seed: int, n_frames: int = MODEL.n_frames) -> tuple[np.ndarray, FrameTargets]:
    """A stripe for every note, louder with its velocity, brighter all over with the pedal; and what
    is to be heard."""
    rng = np.random.default_rng(seed)
    begins = np.arange(4, n_frames - 12, 20) + rng.integers(0, 8)
    notes = [
        (b * HOP, (b + 12) * HOP, 30 + 10 * rng.integers(6), rng.integers(30, 120)) for b in begins
    ]
    down = rng.integers(0, 2) * 127
    performance = Performance(np.array(notes, NOTE), np.array([(0.0, SUSTAIN, down)], PEDAL))
    targets = frame_targets(performance, 0, n_frames, FRONT_END)
    codes = np.full((n_frames, 128), 40 + down // 8, np.uint8)
    for key in range(88):
        codes[targets.frame[:, key], key : key + 6] = 140
        struck = ~np.isnan(targets.onset[:, key])
        codes[struck, key : key + 6] = 140 + 100 * targets.velocity[struck, key][:, None]
    return codes, targets


def batch_of(step: int, batch: int = 4) -> dict:
    clips = [played_clip(10 * step + row) for row in range(batch)]
    descriptors = np.full((batch, NUMBER), np.nan, np.float32)
    descriptors[0] = clips[0][1].sustain[0] - 0.5
    targets = FrameTargets(*map(np.stack, zip(*(targets for _, targets in clips))))
    names = [f"clip {row} of batch {step}" for row in range(batch)]
    return {
        "codes": np.stack([codes for codes, _ in clips]),
        "targets": targets,
        "descriptors": descriptors,
        "clip": names,
    }


def stream(start: int, stop_at: int | None = None):
    for step in itertools.count(start):
        if step == stop_at:
            raise KeyboardInterrupt
        yield batch_of(step)


def train(directory, config, **options):
    defaults = {
        "batches": stream,
        "validation": lambda: [batch_of(1000)],
        "num_descriptors": NUMBER,
    }
    return pretrain_to(directory, config, **defaults | options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory and history of a model that has one batch to learn by heart."""
    directory, same = tmp_path_factory.mktemp("transcription"), batch_of(0)
    config = dataclasses.replace(TRANSCRIBE, epochs=4)
    options = {"batches": lambda start: itertools.repeat(same), "validation": lambda: [same]}
    return directory, train(directory, config, steps=60, **options)


class TestTraining:
    def test_what_is_played_is_learned(self, trained):
        last = trained[1][-1]
        assert last["validation_onset_f1"] > 0.3 and last["validation_sustain_r"] > 0.5
        assert set(last) >= {
            f"validation_{name}" for name in (*transcription.METRICS, *transcription.LOSSES)
        }

    @pytest.mark.parametrize(
        "objective", ["transcription", pytest.param("joint", marks=pytest.mark.slow)]
    )
    def test_resumed_equals_uninterrupted(self, tmp_path, objective):
        config = dataclasses.replace(TRANSCRIBE, objective=objective, augment=True, decoder_depth=1)
        rows = train(tmp_path / "whole", config, steps=3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", config, batches=lambda step: stream(step, stop_at=4), steps=3)
        again = train(tmp_path / "cut", config, steps=3)
        assert pretrained_bits(tmp_path / "cut") == pretrained_bits(tmp_path / "whole")
        assert without_seconds(again) == without_seconds(rows)

    @pytest.mark.slow
    def test_the_joint_encoder_is_asked_both_and_is_one(self, tmp_path):
        (row,) = train(
            tmp_path, dataclasses.replace(TRANSCRIBE, objective="joint", epochs=1), steps=3
        )
        assert row["loss"] == pytest.approx(row["masked_loss"] + row["heard_loss"], rel=1e-5)
        assert {"validation_masked_accuracy", "validation_heard_onset_f1"} <= set(row)
        params = open_latest(tmp_path / "checkpoints", made_by="")[0]["state"]["params"]
        assert set(params) == {
            "encoder",
            "discriminative",
            "generative",
            "transcription",
            "descriptors",
        }

    @pytest.mark.parametrize("objective", ["transcription", "joint"])
    def test_fine_tuning_takes_the_encoder(self, trained, objective):
        params = (
            Pretraining(
                MODEL,
                dataclasses.replace(TRANSCRIBE, objective=objective),
                FRONT_END,
                STATISTICS,
                1,
            )
            .init()
            .params
        )
        wanted = Finetuning(MODEL, FINETUNE, FRONT_END, STATISTICS, 1).init(0)["encoder"]
        assert jax.tree.map(jnp.shape, params["encoder"]) == jax.tree.map(jnp.shape, wanted)

    def test_micro_batches_add_up_to_the_batch(self):
        run = Pretraining(MODEL, TRANSCRIBE, FRONT_END, STATISTICS, 1, num_descriptors=NUMBER)
        params, batch = run.init().params, batch_of(3)

        def losses(rows):
            part = jax.tree.map(
                lambda x: x[rows],
                {name: batch[name] for name in ("codes", "targets", "descriptors")},
            )
            return run.objective.losses(params, run.inputs(part), part)

        whole, *parts = (losses(rows) for rows in (slice(4), slice(0, 2), slice(2, 4)))
        for name, value in whole.items():
            np.testing.assert_allclose(np.mean([part[name] for part in parts]), value, rtol=1e-5)

    def test_unknown_objectives_and_patches_that_do_not_suit_are_refused(self):
        with pytest.raises(
            InputError, match="unknown objective 'transcribe'.* Did you mean 'transcription'"
        ):
            Pretraining(
                MODEL,
                dataclasses.replace(TRANSCRIBE, objective="transcribe"),
                FRONT_END,
                STATISTICS,
                1,
            ).init()
        for stride in (10, 15):
            model = dataclasses.replace(
                MODEL, patch_size=(16, 15 if stride == 15 else 16), stride=(16, stride)
            )
            with pytest.raises(
                InputError,
                match=(
                    "adjacent patches without overlap, with a width that is a multiple of 2 frames"
                ),
            ):
                Pretraining(model, TRANSCRIBE, FRONT_END, STATISTICS, 1).init()

    def test_who_listens_masks_nothing(self):
        run = Pretraining(MODEL, TRANSCRIBE, FRONT_END, STATISTICS, 1)
        with pytest.raises(InputError, match="objective 'transcription' does not mask patches"):
            reconstruction(run, run.init().params, batch_of(0)["codes"])


class TestAugment:
    NOTHING = {
        "gain": jnp.zeros(1),
        "eq": jnp.zeros((1, 3)),
        "noise": jnp.full(1, -200.0),
        "seed": jnp.zeros(1, jnp.uint32),
        "room_seconds": jnp.ones(1),
        "room": jnp.full(1, -jnp.inf),
        "changed": jnp.ones(1, bool),
    }

    def test_targets_and_a_share_of_the_clips_stay_as_they_are(self):
        log_mel = jnp.zeros((64, 32, 128))
        heard_ = np.asarray(
            pretraining.augment(
                log_mel, pretraining.draw_augmentation(jax.random.key(0), 64), STATISTICS, 0.01
            )
        )
        same = (heard_ == 0).all(axis=(1, 2))
        assert 4 < same.sum() < 32
        assert (
            np.abs(heard_[~same].mean(axis=1)).max() * 2 * STATISTICS.std_db
            < pretraining.GAIN_DB + 3 * pretraining.EQ_DB
        )

    def test_one_key_one_change(self):
        log_mel = jnp.zeros((2, 32, 128))
        one, same, other = (
            pretraining.augment(
                log_mel, pretraining.draw_augmentation(jax.random.key(k), 2), STATISTICS, 0.01
            )
            for k in (1, 1, 2)
        )
        assert bits(one) == bits(same) != bits(other)

    def test_noise_covers_what_is_softer_and_leaves_what_is_louder(self):
        drawn = self.NOTHING | {"noise": jnp.full(1, -50.0)}
        levels = jnp.stack([jnp.full((32, 128), level) for level in (-80.0, 0.0)], axis=1).reshape(
            1, 64, 128
        )
        change = pretraining.augment((levels + 20) / 24, drawn, STATISTICS, 0.01) * 24 - 20 - levels
        assert 20 < change[0, ::2].mean() < 32 and jnp.abs(change[0, 1::2]).max() < 0.1

    def test_a_room_rings_by_60_db_in_its_time_and_adds_its_energy(self):
        drawn = self.NOTHING | {"room_seconds": jnp.full(1, 0.5), "room": jnp.zeros(1)}
        stroke = jnp.full((1, 100, 128), -100.0).at[:, 10].set(0.0)
        rings = pretraining.augment((stroke + 20) / 24, drawn, STATISTICS, 0.01)[0] * 24 - 20
        assert rings[9, 0] < -96 and rings[10, 0] == pytest.approx(0.0, abs=0.1)
        assert rings[20, 0] - rings[45, 0] == pytest.approx(60 * 0.25 / 0.5, abs=0.1)
        assert rings[20, -1] < rings[20, 0] - 10  # high frequencies die away first
        steady = pretraining.augment(jnp.zeros((1, 300, 128)), drawn, STATISTICS, 0.01)[0, -1] * 24
        np.testing.assert_allclose(steady, 10 * np.log10(2), atol=0.05)

    def test_many_clips_are_heard_in_rooms_and_some_are_not(self):
        drawn = pretraining.draw_augmentation(jax.random.key(0), 256)
        assert 0.4 < np.isfinite(drawn["room"]).mean() < 0.8
        assert (drawn["room_seconds"] >= 0.199).all() and (drawn["room_seconds"] <= 2.01).all()


class TestScores:
    def test_perfect_hearing_scores_one(self):
        batch = batch_of(5)
        wanted = transcription.on_steps(FrameTargets(*map(jnp.asarray, batch["targets"])))
        sure = {
            name: 40 * (values - 0.5)
            for name, values in wanted.items()
            if name in ("onset", "offset", "frame", "sustained")
        }
        values = {
            name: jax.scipy.special.logit(jnp.clip(wanted[name], 1e-6, 1 - 1e-6))
            for name in ("velocity", "sustain", "una_corda")
        }
        outputs = sure | values | {"descriptors": jnp.nan_to_num(batch["descriptors"])}
        total = transcription.metric_counts(outputs, batch["targets"], batch["descriptors"])
        scores = transcription.metrics({name: float(value) for name, value in total.items()})
        for name in ("onset_f1", "down_f1", "sounding_f1", "sustain_r", "descriptors_r2"):
            assert scores[name] == pytest.approx(1, abs=1e-3), name
        assert scores["velocity_mae"] < 0.01 and scores["una_corda_r"] == 0  # it never moves

    def test_an_onset_two_steps_late_counts_and_three_do_not(self):
        targets = FrameTargets(*map(jnp.asarray, batch_of(5)["targets"]))
        wanted = transcription.on_steps(targets)
        base = {
            name: jnp.zeros_like(wanted[name])
            for name in (*transcription.ROLLS, *transcription.PEDALS)
        }
        for late, found in ((2, 1.0), (3, 0.0)):
            onset = jnp.roll(40 * wanted["struck"] - 20, late, axis=1)
            scores = transcription.metrics(
                {
                    k: float(v)
                    for k, v in transcription.metric_counts(
                        base | {"onset": onset}, targets
                    ).items()
                }
            )
            assert scores["onset_f1"] == found


class TestListener:
    def test_a_whole_clip_is_heard_with_its_notes(self, trained):
        listener = Transcriber.open(trained[0])
        codes, targets = played_clip(77, 251)
        heard_ = listener.predict(codes)
        assert heard_.onset.shape == (125, 88) and heard_.sustain.shape == heard_.times.shape == (
            125,
        )
        assert np.isfinite(heard_.onset).all() and heard_.times[1] - heard_.times[
            0
        ] == pytest.approx(2 * HOP)
        true = targets.sustained[:250].reshape(125, 2, 88).max(axis=1)
        assert heard_.sustained[true].mean() > 2 * heard_.sustained[~true].mean()

    def test_a_clip_shorter_than_a_window_is_heard_without_its_padding(self, trained):
        listener = Transcriber.open(trained[0])
        assert listener.predict(played_clip(3)[0][:31]).onset.shape == (15, 88)

    def test_clips_without_a_note_are_counted_and_have_the_mean_of_the_others(
        self, trained, logged
    ):
        listener, silence = Transcriber.open(trained[0]), np.zeros((64, 128), np.uint8)
        clips = [silence, played_clip(0, 128)[0], played_clip(1, 128)[0]]
        values, unheard = features_of(listener.transcribe_all(clips))
        assert values.shape == (3, len(PERFORMANCE_FEATURES)) and np.isfinite(values).all()
        assert bits(values[0]) == bits(unheard) and np.allclose(values[1:].mean(axis=0), unheard)
        assert logged == [
            "no notes were detected in 1 of 3 recordings; the mean of the others is used for them"
        ]
        with pytest.raises(
            InputError, match="no notes were detected in any of 1 recordings. Pre-train longer"
        ):
            features_of(listener.transcribe_all([silence]))

    def test_a_model_with_the_head_of_version_0_1_is_refused(self, trained, tmp_path):
        listener = Transcriber.open(trained[0])
        tensors, metadata = listener.tensors()
        old = {name.replace("notes_hidden", "hidden"): x for name, x in tensors.items()}
        write_tensors(tmp_path / "old.safetensors", old, metadata | {"description": "{}"})
        with pytest.raises(InputError, match="head is of version 0.1.0.*Pre-train again"):
            Transcriber.read(tmp_path / "old.safetensors")
        params = listener.params | {"transcription": {"hidden": {}, "out": {}}}
        with pytest.raises(InputError, match="head is of version 0.1.0.*Pre-train again"):
            Transcriber(params, listener.model, listener.front_end, listener.statistics)

    def test_what_is_written_hears_the_same(self, trained, tmp_path):
        listener = Transcriber.open(trained[0])
        read = Transcriber.read(
            listener.write(tmp_path / "ear.safetensors", {"licence": "made here"})
        )
        first, again = (one.predict(played_clip(2, 128)[0]) for one in (listener, read))
        for name in first._fields:
            np.testing.assert_allclose(getattr(again, name), getattr(first, name), atol=5e-3)
        assert (read.model, read.front_end, read.statistics) == (
            listener.model,
            listener.front_end,
            listener.statistics,
        )
        (tmp_path / "other.safetensors").write_bytes(b"no weights")
        for name in ("other.safetensors", "missing.safetensors"):
            with pytest.raises(InputError, match="does not hold a transcription model"):
                Transcriber.read(tmp_path / name)

    def test_a_model_that_hears_no_notes_is_refused(self, tmp_path):
        pretrain_to(tmp_path, dataclasses.replace(PRETRAIN, epochs=1), steps=2)
        with pytest.raises(
            InputError,
            match="objective 'ssast', which does not include transcription. Choose one with",
        ):
            Transcriber.open(tmp_path)


@pytest.fixture(scope="module")
def rated(trained, tmp_path_factory) -> CrossValidation:
    """Eight clips of two lengths, rated by their pedal, in two folds."""
    listener = Transcriber.open(trained[0])
    params = listener.params
    start = EncoderInit(
        "ast-test-transcription",
        MODEL,
        FRONT_END,
        STATISTICS,
        params["encoder"],
        "",
        params["transcription"],
    )
    clips = [played_clip(k, 64 + 40 * (k % 2)) for k in range(8)]
    ratings = np.stack(
        [np.full(19, 0.3 + 0.4 * targets.sustain[0], np.float32) for _, targets in clips]
    )
    names = np.array([f"clip {k}" for k in range(8)])
    index = pd.DataFrame(
        {
            "clip": names,
            "content_group": np.arange(8) // 2,
            "human": True,
            "fold_content": np.arange(8) // 4,
        }
    )
    run = Run(dataclasses.replace(PRESETS["demo"], model=MODEL), tmp_path_factory.mktemp("rated"))
    config = dataclasses.replace(FINETUNE, transcription_features=True)
    renderings = RatedClips([codes for codes, _ in clips], names, np.full(8, "builtin"), ratings)
    return CrossValidation(run, start, config, renderings, FRONT_END, index)


class TestRating:
    def test_a_model_that_was_told_other_descriptors_is_refused(self, rated, monkeypatch):
        cross_validate(rated, {"init": "transcription", "data": "made here", "simulated": True})
        monkeypatch.setattr(
            rate, "PERFORMANCE_FEATURES", dict(list(PERFORMANCE_FEATURES.items())[1:])
        )
        with pytest.raises(
            InputError,
            match=f"heads use {len(PERFORMANCE_FEATURES)} descriptors, not"
            f" {len(PERFORMANCE_FEATURES) - 1}. Run",
        ):
            FoldEnsemble(rated.run.root)

    def test_heads_are_told_what_is_heard_and_a_finished_model_hears_it_again(self, rated):
        settings = {"init": "transcription", "data": "made here", "simulated": True}
        found = cross_validate(rated, settings)
        width = 2 * MODEL.grid[0] * MODEL.width
        assert (
            rated.embeddings.shape == (8, width + len(PERFORMANCE_FEATURES))
            and np.isfinite(rated.embeddings).all()
        )
        rater = FoldEnsemble(rated.run.root)
        assert rater.name == "ast-test-transcription-heard"
        for fold, model in zip(rater.folds, rater.models):
            for number in np.flatnonzero(rated.index["fold_content"] == fold):
                np.testing.assert_allclose(
                    model.rate(rated.clips.codes[number]), found.rated[number], atol=1e-5
                )
        with pytest.raises(
            InputError, match="uses transcription descriptors besides its embedding"
        ):
            require_explained(rater)

    def test_of_an_unseen_synthesizer_nothing_is_learned_and_all_is_rated(self, rated, logged):
        clips = rated.clips
        names = np.tile(["builtin", "other"], 8)
        doubled = RatedClips(
            [codes for codes in clips.codes for _ in "12"],
            np.repeat(clips.clip, 2),
            names,
            np.repeat(clips.ratings, 2, axis=0),
        )
        config = dataclasses.replace(
            rated.config, transcription_features=False, held_out_synthesizer="other"
        )
        two = dataclasses.replace(rated, clips=doubled, config=config)
        settings = {"init": "transcription", "data": "made here", "simulated": True}
        found = cross_validate(two, settings)
        said = [line for line in logged if "held out" in line]
        assert [line.split(": ")[1] for line in said] == ["4 training renderings, 8 held out"] * 2
        assert found.which.tolist() == list(range(16))
        with pytest.raises(
            InputError,
            match="held_out_synthesizer=steinway: the clips are rendered by builtin, other."
            " Choose one",
        ):
            _ = dataclasses.replace(
                two, config=dataclasses.replace(config, held_out_synthesizer="steinway")
            ).unseen

    def test_an_encoder_that_hears_no_notes_or_is_trained_on_is_refused(self, rated):
        deaf = dataclasses.replace(
            rated, start=dataclasses.replace(rated.start, transcription=None)
        )
        with pytest.raises(
            InputError,
            match=(
                "was not pre-trained to transcribe; start from transcription, joint or"
                " transcriptionstem"
            ),
        ):
            _ = deaf.params
        with pytest.raises(
            InputError,
            match="strategy 'full' changes the encoder.*"
            "`transcription_features=true` needs 'frozen'",
        ):
            dataclasses.replace(
                rated, config=dataclasses.replace(rated.config, strategy="full")
            ).trainer(1)


def test_the_default_is_the_papers():
    assert (
        PretrainConfig(1, 1, 1.0, 1).objective == "ssast"
        and not PretrainConfig(1, 1, 1.0, 1).augment
    )

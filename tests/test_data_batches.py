"""Batches: every one a function of (seed, step), and windows that lose no frame. Cost: 5 s."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from bench.batches import normalised
from tensorflow_datasets.proto import tf_example_pb2
from tiny import FRONT_END, STATISTICS, shard_set

from percepiano_ast.audio import dequantize
from percepiano_ast.data import shards
from percepiano_ast.data.batches import (
    RatedClips,
    clip_windows,
    finetune_batches,
    from_step,
    pretrain_batches,
)
from percepiano_ast.data.shards import ShardSet
from percepiano_ast.errors import InputError
from percepiano_ast.training.state import normalise

LENGTHS = (2500, 256, 1300, 511, 2047)
# of 256 frames: one less than fits, so that they fit wherever the first one starts
WINDOWS = (8, 1, 4, 1, 6)


def noise() -> dict[str, np.ndarray]:
    """Recordings of noise, so that a frame says where it is from."""
    rng = np.random.default_rng(0)
    return {f"{n}.wav": rng.integers(0, 256, (n, 128), np.uint8) for n in LENGTHS}


@pytest.fixture(scope="module")
def train() -> ShardSet:
    return shard_set(noise(), 300)


def make(train, seed=0, batch_size=4, n_frames=256, **settings):
    return pretrain_batches(train, n_frames=n_frames, batch_size=batch_size, seed=seed, **settings)


def places(batches, recordings: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    """Recording and first frame of every row, of which name and contents agree."""
    found = []
    for batch in batches:
        for codes, name in zip(batch["codes"], batch["clip"]):
            key, start = name.split(" from frame ")
            np.testing.assert_array_equal(codes, recordings[key][int(start) :][: len(codes)])
            found.append((key, int(start)))
    return found


class TestPretrainBatches:
    """Batches are a function of (seed, step)."""

    def test_from_step_continues_the_stream_over_epochs(self, train):
        made = make(train)
        steps = made.steps_per_epoch
        assert steps == sum(WINDOWS) // 4
        whole = [batch["codes"] for batch in itertools.islice(made.from_step(0), 2 * steps + 2)]
        assert all(batch.shape == (4, 256, 128) and batch.dtype == np.uint8 for batch in whole)
        for step in (1, steps - 1, steps, steps + 1, 2 * steps + 1):
            np.testing.assert_array_equal(next(make(train).from_step(step))["codes"], whole[step])
        assert not np.array_equal(whole[0], whole[steps]), (
            "the second epoch repeats the first one's windows"
        )
        np.testing.assert_array_equal(
            np.stack([batch["codes"] for batch in made.one_epoch()]), np.stack(whole[:steps])
        )

    def test_grain_brings_an_iterator_back_to_the_exact_batch(self, train):
        stream = make(train).from_step(3)
        for _ in range(4):
            next(stream)
        state = stream.get_state()
        expected = [next(stream)["clip"] for _ in range(6)]  # into the next epoch
        resumed = make(train).from_step(3)
        resumed.set_state(state)
        assert [next(resumed)["clip"] for _ in range(6)] == expected
        assert next(make(train).from_step(3 + 4))["clip"] == expected[0], (
            "the step alone says as much"
        )

    def test_another_seed_is_another_order(self, train):
        first, other = (next(make(train, seed).from_step(0))["codes"] for seed in (0, 1))
        assert not np.array_equal(first, other)

    def test_the_rows_of_all_processes_are_the_batch_of_one(self, train):
        alone = make(train).from_step(3)
        parts = [make(train, process=(k, 2)).from_step(3) for k in (0, 1)]
        for _ in range(8):  # into the next epoch
            whole, halves = next(alone), [next(part) for part in parts]
            np.testing.assert_array_equal(
                whole["codes"], np.concatenate([half["codes"] for half in halves])
            )
            assert list(whole["clip"]) == [name for half in halves for name in half["clip"]]
        with pytest.raises(InputError, match="batch size 4 is not divisible by 3 processes"):
            make(train, process=(0, 3))

    @pytest.mark.parametrize("chunk_frames", [0, 100, 256, 300, 5000])
    def test_windows_of_an_epoch_lie_end_to_end_whatever_the_chunks(self, chunk_frames):
        recordings = noise()
        made = make(shard_set(recordings, chunk_frames), batch_size=1)
        found = places(made.one_epoch(), recordings)
        assert found != sorted(found)
        for (key, codes), count in zip(recordings.items(), WINDOWS):
            starts = sorted(start for other, start in found if other == key)
            assert starts == [starts[0] + 256 * k for k in range(count)]
            assert 0 <= starts[0] and starts[-1] + 256 <= len(codes)

    def test_every_alignment_is_as_likely_and_every_frame_is_heard(self):
        recordings = {"a.wav": noise()["2500.wav"][:70]}
        made = make(shard_set(recordings, 20), n_frames=8, batch_size=1)
        found = places(itertools.islice(made.from_step(0), 300 * made.steps_per_epoch), recordings)
        assert made.steps_per_epoch == 7
        firsts = np.bincount([min(found[k : k + 7])[1] for k in range(0, len(found), 7)])
        assert len(firsts) == 70 - 7 * 8 + 1 and firsts.min() > 0
        # chi square of 15 equal chances: 99.9 % lie below
        assert ((firsts - 20) ** 2 / 20).sum() < 36

    def test_windows_come_mixed_anew_in_every_epoch(self, train):
        made = make(train, batch_size=20)
        batches = itertools.islice(made.from_step(0), 2)
        first, second = ([name.split()[0] for name in batch["clip"]] for batch in batches)
        assert first != second and sorted(first) == sorted(second)

    def test_float16_levels_are_read_as_they_are(self):
        levels = {key: dequantize(codes).astype(np.float16) for key, codes in noise().items()}
        made = make(shard_set(levels, 300))
        assert next(made.from_step(0))["codes"].dtype == np.float16
        places(made.one_epoch(), levels)

    def test_a_recording_shorter_than_the_window_is_refused(self, train):
        with pytest.raises(
            InputError, match="a recording of 256 frames is shorter than the model's window of 300"
        ):
            make(train, n_frames=300)

    def test_too_few_windows(self, train):
        with pytest.raises(
            InputError, match="20 windows of 256 frames do not fill one batch of 4096"
        ):
            make(train, batch_size=4096)

    def test_damaged_shards_are_refused(self, train):
        with pytest.raises(InputError, match="have 20 chunks, its shards hold 19"):
            make(dataclasses.replace(train, raw=train.raw[1:]))
        swapped = [train.raw[k] for k in (1, 0, *range(2, 20))]
        with pytest.raises(
            InputError,
            match=(
                r"record [01] .* holds 300 frames of 2500.wav from frame (0|300), expected 300 from"
            ),
        ):
            list(make(dataclasses.replace(train, raw=swapped)).one_epoch())
        cut = [record[:-1000] for record in train.raw]
        with pytest.raises(
            InputError, match=r"record \d+ of the shards cannot be read: .*preprocess --verify"
        ):
            next(make(dataclasses.replace(train, raw=cut)).from_step(0))


class TestRecords:
    """The parser finds what TFDS's own decoding finds."""

    FEATURES = {
        "recording": tfds.features.Text(),
        "ratings": tfds.features.Tensor(shape=(19,), dtype=np.float32),
    }
    FEATURES |= {"start_frame": np.int32, "year": np.int32, "title": tfds.features.Text()}

    @pytest.mark.parametrize("dtype", [np.uint8, np.float16])
    @pytest.mark.parametrize("start", [0, 512, 2**31 - 1])
    def test_it_agrees_with_tfds_in_any_order_of_fields(self, dtype, start):
        log_mel = tfds.features.Tensor(shape=(None, 128), dtype=dtype, encoding="bytes")
        features = tfds.features.FeaturesDict(self.FEATURES | {"log_mel": log_mel})
        codes = np.random.default_rng(0).integers(0, 256, (7, 128)).astype(dtype)
        example = {
            "recording": "Frédéric.wav",
            "start_frame": start,
            "year": 1998,
            "title": "log_mel",
        }
        example |= {"log_mel": codes, "ratings": np.arange(19, dtype=np.float32)}
        serialised = features.serialize_example(example)
        for record in (serialised, *self.reordered(serialised)):
            chunk, expected = (
                shards.parse(record, dtype, 128),
                features.deserialize_example_np(record),
            )
            np.testing.assert_array_equal(chunk.levels, expected["log_mel"])
            assert chunk.levels.dtype == dtype and chunk.start == expected["start_frame"] == start
            assert chunk.recording.encode() == expected["recording"]

    def reordered(self, serialised: bytes) -> list[bytes]:
        """The same example with its features in the order of their names, and the other way
        round."""
        entries = tf_example_pb2.Example.FromString(serialised).features.feature
        parts = []
        for name in sorted(entries):
            one = tf_example_pb2.Example()
            one.features.feature[name].CopyFrom(entries[name])
            parts.append(one.SerializeToString())
        # protobuf joins messages that follow one another
        return [b"".join(parts), b"".join(reversed(parts))]

    def test_what_is_no_chunk_is_refused(self):
        (good,) = shard_set({"a.wav": np.zeros((3, 128), np.uint8)}, 0).raw
        assert shards.parse(good, np.uint8, 128).levels.shape == (3, 128)
        for bad, n_mels in ((b"", 128), (good[:-1], 128), (b"\xff" + good, 128), (good, 100)):
            with pytest.raises(InputError, match="not an example of a log-mel chunk"):
                shards.parse(bad, np.uint8, n_mels)


class TestNormalised:
    """The host's levels are the training step's."""

    @pytest.mark.parametrize("dtype", [np.uint8, np.float16])
    def test_it_equals_what_the_training_step_computes(self, dtype):
        codes = np.arange(256, dtype=np.uint8).repeat(2).reshape(2, 2, 128)
        stored = codes if dtype == np.uint8 else dequantize(codes).astype(dtype)
        expected = normalise(jnp.asarray(stored), FRONT_END, STATISTICS)
        out = np.empty(codes.shape, np.float32)
        assert normalised(stored, FRONT_END, STATISTICS, out) is out
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(normalised(stored, FRONT_END, STATISTICS), out)


class TestRatedWindows:
    """Windows of rated clips."""

    LENGTHS = (40, 64, 65, 96, 200)

    @pytest.fixture
    def rated(self) -> RatedClips:
        """Clips whose codes say where they are from: 10 + clip number in band 0, the frame in band
        1."""
        codes = []
        for number, length in enumerate(self.LENGTHS):
            clip = np.full((length, 128), 10 + number, np.uint8)
            clip[:, 1] = 1 + np.arange(length)
            codes.append(clip)
        names = np.array([f"clip{number}" for number in range(5)])
        ratings = np.arange(95, dtype=np.float32).reshape(5, 19) / 95
        return RatedClips(codes, names, np.array(["builtin"] * 5), ratings)

    def test_windows_cover_every_frame_of_every_clip(self, rated):
        seen = [np.zeros(length, bool) for length in self.LENGTHS]
        made = list(clip_windows(rated.codes, n_frames=64, batch_size=4))
        assert all(
            batch["codes"].shape == (4, 64, 128) and batch["codes"].dtype == np.uint8
            for batch in made
        )
        for codes, n_valid, clip in (
            (c, n, k) for b in made for c, n, k in zip(b["codes"], b["n_valid"], b["clip"])
        ):
            if clip < 0:
                continue
            assert (codes[:n_valid, 0] == 10 + clip).all() and not codes[n_valid:].any()
            assert n_valid == min(self.LENGTHS[clip], 64)
            frames = codes[:n_valid, 1].astype(int) - 1
            np.testing.assert_array_equal(frames, frames[0] + np.arange(n_valid))
            seen[clip][frames] = True
        assert all(covered.all() for covered in seen)
        counts = np.bincount(np.concatenate([batch["clip"] for batch in made]) + 1)[1:]
        assert counts.tolist() == [1, 1, 2, 2, 6]

    @pytest.mark.parametrize("max_windows", [1, 3])
    def test_fine_tuning_windows_are_spread_over_their_clip(self, rated, max_windows):
        members = np.array([0, 2, 4])
        dataset, steps = finetune_batches(
            rated, members, n_frames=64, max_windows=max_windows, batch_size=3, seed=0
        )
        assert steps == 1
        stream, starts = from_step(dataset, 0), set()
        for _ in range(30):
            batch = next(stream)
            assert sorted(batch["clip"].tolist()) == members.tolist()
            assert (
                batch["codes"].shape == (3, max_windows, 64, 128)
                and batch["codes"].dtype == np.uint8
            )
            for clip, windows, n_valid in zip(batch["clip"], batch["codes"], batch["n_valid"]):
                # What a rating hears: 1, 2 and 6 windows.
                assert (n_valid > 0).sum() == min({0: 1, 2: 2, 4: 6}[int(clip)], max_windows)
                for codes, length in zip(windows, n_valid):
                    assert length in (0, min(self.LENGTHS[clip], 64)) and not codes[length:].any()
                    assert (codes[:length, 0] == 10 + clip).all()
                    np.testing.assert_array_equal(
                        codes[:length, 1], codes[0, 1] + np.arange(length)
                    )
                if clip == 4:
                    first = windows[:, 0, 1].tolist()
                    starts.add(first[0])
                    assert first == sorted(first) and all(start <= 1 + 200 - 64 for start in first)
                    parts = 136 / max_windows  # each window starts in a part of its own
                    assert all(
                        place * parts - 1 <= start - 1 <= (place + 1) * parts
                        for place, start in enumerate(first)
                    )
        assert len(starts) > 10

    def test_no_window_of_a_clip_is_refused(self, rated):
        with pytest.raises(InputError, match="0 windows per clip"):
            finetune_batches(rated, np.arange(5), n_frames=64, max_windows=0, batch_size=2, seed=0)

    def test_fine_tuning_resumes_at_any_step(self, rated):
        def stream(step, seed=0):
            return from_step(
                finetune_batches(
                    rated, np.arange(5), n_frames=64, max_windows=2, batch_size=2, seed=seed
                )[0],
                step,
            )

        whole = stream(0)
        whole = [next(whole)["codes"] for _ in range(5)]
        for step in (1, 2, 3, 4):
            np.testing.assert_array_equal(next(stream(step))["codes"], whole[step])
        assert not np.array_equal(next(stream(0, seed=1))["codes"], whole[0])

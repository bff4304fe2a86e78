"""Batches: every one a function of (seed, step), and windows that lose no frame. Cost: 3 s."""

import numpy as np
import pytest

from percepiano_ast.config import FrontEnd, InputError, Statistics
from percepiano_ast.data.batches import RatedClips, clip_windows, finetune_batches, from_step, pretrain_batches
from percepiano_ast.data.shards import ShardSet


@pytest.fixture(scope="module")
def train() -> ShardSet:
    """Three chunks of noise, so that a frame says where it is from."""
    rng = np.random.default_rng(0)
    chunks = [
        {"log_mel": rng.integers(0, 256, (n, 128), np.uint8), "recording": f"{n}.wav".encode(), "start_frame": 100}
        for n in (2500, 1024, 1300)
    ]
    return ShardSet(chunks, FrontEnd(), Statistics(0.0, 1.0, 1, 0.0, 0.0), {})


class TestPretrainBatches:
    """Batches are a function of (seed, step)."""

    def make(self, train, seed=0, batch_size=4):
        return pretrain_batches(train, n_frames=256, batch_size=batch_size, seed=seed)

    def test_from_step_continues_the_stream_over_epochs(self, train):
        made = self.make(train)
        steps = made.steps_per_epoch
        stream = made.from_step(0)
        whole = [next(stream)["codes"] for _ in range(2 * steps + 2)]
        assert all(batch.shape == (4, 256, 128) and batch.dtype == np.uint8 for batch in whole)
        for step in (1, steps - 1, steps, steps + 1, 2 * steps + 1):
            np.testing.assert_array_equal(next(self.make(train).from_step(step))["codes"], whole[step])
        assert not np.array_equal(whole[0], whole[steps]), "the second epoch repeats the first one's crops"
        np.testing.assert_array_equal(np.stack([batch["codes"] for batch in made.one_epoch()]), np.stack(whole[:steps]))

    def test_another_seed_is_another_order(self, train):
        first, other = (next(self.make(train, seed).from_step(0))["codes"] for seed in (0, 1))
        assert not np.array_equal(first, other)

    def test_the_rows_of_all_processes_are_the_batch_of_one(self, train):
        alone = self.make(train).from_step(3)
        parts = [pretrain_batches(train, n_frames=256, batch_size=4, seed=0, process=(k, 2)).from_step(3) for k in (0, 1)]
        for _ in range(8):  # into the next epoch
            whole, halves = next(alone), [next(part) for part in parts]
            np.testing.assert_array_equal(whole["codes"], np.concatenate([half["codes"] for half in halves]))
            assert list(whole["clip"]) == [name for half in halves for name in half["clip"]]
        with pytest.raises(InputError, match="a batch of 4 is not divided by 3 processes"):
            pretrain_batches(train, n_frames=256, batch_size=4, seed=0, process=(0, 3))

    def test_an_epoch_visits_every_stretch_of_every_chunk_once(self, train):
        chunks = [train[i]["log_mel"] for i in range(len(train))]
        at = {chunk[k].tobytes(): (i, k) for i, chunk in enumerate(chunks) for k in range(len(chunk))}
        stretches = []
        for batch in self.make(train, batch_size=1).one_epoch():
            (crop,), (name,) = batch["codes"], batch["clip"]
            chunk, start = at[crop[0].tobytes()]
            assert name == f"{len(chunks[chunk])}.wav from frame {100 + start}"
            np.testing.assert_array_equal(crop, chunks[chunk][start : start + 256])
            stretches.append((chunk, int(8 * start / (len(chunks[chunk]) - 255))))
        assert sorted(stretches) == [(chunk, stretch) for chunk in range(3) for stretch in range(8)]

    def test_a_chunk_shorter_than_the_window_is_refused(self, train):
        with pytest.raises(InputError, match="1024 frames is shorter than the model's window of 1200"):
            list(pretrain_batches(train, n_frames=1200, batch_size=1, seed=0).one_epoch())

    def test_too_few_windows(self, train):
        with pytest.raises(InputError, match="windows of 256 frames do not fill one batch of 4096"):
            self.make(train, batch_size=4096)


class TestRatedWindows:
    """Windows of rated clips."""

    LENGTHS = (40, 64, 65, 96, 200)

    @pytest.fixture
    def rated(self) -> RatedClips:
        """Clips whose codes say where they are from: 10 + clip number in band 0, the frame in band 1."""
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
        assert all(batch["codes"].shape == (4, 64, 128) and batch["codes"].dtype == np.uint8 for batch in made)
        for codes, n_valid, clip in ((c, n, k) for b in made for c, n, k in zip(b["codes"], b["n_valid"], b["clip"])):
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

    def test_fine_tuning_crops_stay_in_their_clip(self, rated):
        members = np.array([0, 2, 4])
        dataset, steps = finetune_batches(rated, members, n_frames=64, batch_size=3, seed=0)
        assert steps == 1
        stream = from_step(dataset, 0)
        starts = set()
        for _ in range(30):
            batch = next(stream)
            clips = [int(codes[0, 0]) - 10 for codes in batch["codes"]]
            assert sorted(clips) == members.tolist()
            for clip, codes, n_valid, ratings in zip(clips, batch["codes"], batch["n_valid"], batch["ratings"]):
                assert n_valid == min(self.LENGTHS[clip], 64) and not codes[n_valid:].any()
                np.testing.assert_array_equal(codes[:n_valid, 1], codes[0, 1] + np.arange(n_valid))
                np.testing.assert_array_equal(ratings, rated.ratings[clip])
                starts |= {int(codes[0, 1])} if clip == 4 else set()
        assert len(starts) > 10 and max(starts) <= 1 + 200 - 64

    def test_fine_tuning_resumes_at_any_step(self, rated):
        def stream(step, seed=0):
            return from_step(
                finetune_batches(rated, np.arange(5), n_frames=64, batch_size=2, seed=seed)[0], step
            )

        whole = stream(0)
        whole = [next(whole)["codes"] for _ in range(5)]
        for step in (1, 2, 3, 4):
            np.testing.assert_array_equal(next(stream(step))["codes"], whole[step])
        assert not np.array_equal(next(stream(0, seed=1))["codes"], whole[0])

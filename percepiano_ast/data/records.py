"""Random access to frames of recordings in the shards, without decoding unused features.

A record is a serialised ``tf.train.Example`` of one chunk. TFDS's own decoding converts every
feature through a list and checks its shape; here protobuf's parser locates the bytes of the levels,
which are used without a copy.
"""

from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from percepiano_ast.data.shards import DTYPES, ShardSet, chunk_count
from percepiano_ast.errors import InputError

_REMEDY = "Run `percepiano preprocess --verify` to list all damage."


class Chunk(NamedTuple):
    """The parts of a record that are needed to cut windows.

    Attributes:
        recording: key of the recording.
        start: the chunk's first frame within the recording.
        stored: (time, mel) uint8 codes or float16 dB, read-only.
    """

    recording: str
    start: int
    stored: np.ndarray


def parse(record: bytes, dtype: np.dtype, n_mels: int) -> Chunk:
    """Parse a serialised example, whose levels TFDS stored as bytes of ``dtype``.

    Raises:
        InputError: not such an example.
    """
    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
        # Protobuf returns an empty list for a missing feature, which fails to unpack.
        (log_mel,) = features["log_mel"].bytes_list.value
        (recording,) = features["recording"].bytes_list.value
        (start,) = features["start_frame"].int64_list.value if "start_frame" in features else (0,)
        return Chunk(recording.decode(), start, np.frombuffer(log_mel, dtype).reshape(-1, n_mels))
    except (DecodeError, ValueError) as error:
        raise InputError(f"not an example of a log-mel chunk ({error})") from error


def serialise(features: tfds.features.FeaturesDict, example: dict) -> bytes:
    """Serialise an example deterministically; by default protobuf's feature order differs between
    processes."""
    serialised = tf_example_pb2.Example.FromString(features.serialize_example(example))
    return serialised.SerializeToString(deterministic=True)


class Recordings:
    """Random access to frames of the recordings of a split, across chunks.

    Args:
        shards: the opened split. Its ``metadata["stored"]`` is the type of the levels.

    Raises:
        InputError: the number of chunks in the split does not match its recordings.

    Attributes:
        n_frames: int64 (recordings,).
        dtype: of the stored levels.
        n_mels: bands.
    """

    def __init__(self, shards: ShardSet):
        self.n_frames = shards.n_frames
        self.dtype, self.n_mels = (
            np.dtype(DTYPES[shards.metadata["stored"]]),
            shards.front_end.n_mels,
        )
        self._raw, self._chunk_frames = shards.raw, shards.chunk_frames
        self._counts = [chunk_count(int(frames), shards.chunk_frames) for frames in shards.n_frames]
        # record number of each recording's first chunk
        self._first = np.cumsum([0, *self._counts]).tolist()
        if self._first[-1] != len(shards.raw):
            raise InputError(
                f"the split's {len(self.n_frames)} recordings have {self._first[-1]} chunks, its"
                f" shards hold {len(shards.raw)}. {_REMEDY}"
            )

    def keys(self) -> list[str]:
        """Keys of the recordings, in their order.

        Raises:
            InputError: a chunk is damaged.
        """
        return [self._chunk(recording, 0).recording for recording in range(len(self.n_frames))]

    def read(self, recording: int, start: int, out: np.ndarray) -> str:
        """Fill ``out`` (time, mel) with the frames of a recording from ``start`` on; returns the
        recording's key.

        Raises:
            InputError: a chunk is damaged, or not the expected one.
        """
        number = (
            min(start // self._chunk_frames, self._counts[recording] - 1)
            if self._chunk_frames
            else 0
        )
        filled = 0
        while filled < len(out):
            chunk = self._chunk(recording, number)
            skipped = start + filled - chunk.start
            piece = chunk.stored[skipped : skipped + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1
        return chunk.recording

    def _chunk(self, recording: int, number: int) -> Chunk:
        position = self._first[recording] + number
        try:
            chunk = parse(self._raw[position], self.dtype, self.n_mels)
        # RuntimeError: array_record, for example on a wrong checksum
        except (InputError, RuntimeError) as error:
            raise InputError(
                f"record {position} of the shards cannot be read: {error}. {_REMEDY}"
            ) from error
        start = number * self._chunk_frames
        last = number + 1 == self._counts[recording]
        frames = int(self.n_frames[recording]) - start if last else self._chunk_frames
        if (chunk.start, len(chunk.stored)) != (start, frames):
            raise InputError(
                f"record {position} of the shards holds {len(chunk.stored)} frames of"
                f" {chunk.recording} from frame {chunk.start}, expected {frames} from frame"
                f" {start}. {_REMEDY}"
            )
        return chunk

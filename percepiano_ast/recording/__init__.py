"""Rate recordings: `load_model` and `rate`; `page` for a page with the sound, `tables` for text,
`Stream` for live sound."""

from percepiano_ast.recording.live import Live, Stream
from percepiano_ast.recording.rating import (
    Moment,
    PianoRater,
    Rating,
    in_words,
    load_model,
    rate,
    rate_file,
    rate_wave,
)
from percepiano_ast.recording.tables import (
    LIKELY,
    SHARES,
    SURE,
    as_table,
    as_text,
    compare,
    comparison_text,
    in_short,
    recordings_in,
)

__all__ = [
    "LIKELY",
    "SHARES",
    "SURE",
    "Live",
    "Moment",
    "PianoRater",
    "Rating",
    "Stream",
    "as_table",
    "as_text",
    "compare",
    "comparison_text",
    "in_short",
    "in_words",
    "load_model",
    "rate",
    "rate_file",
    "rate_wave",
    "recordings_in",
]

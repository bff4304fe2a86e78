"""Rate recordings and show it: `rate` for one, `page` for a page that can be heard, `tables` for numbers, `Stream` for live."""

from percepiano_ast.recording.live import Live, Stream
from percepiano_ast.recording.rating import Moment, Rating, in_words, rate, rate_file, rate_wave
from percepiano_ast.recording.tables import LIKELY, SURE, as_table, as_text, compare, in_short, recordings_in

__all__ = [
    "LIKELY",
    "SURE",
    "Live",
    "Moment",
    "Rating",
    "Stream",
    "as_table",
    "as_text",
    "compare",
    "in_short",
    "in_words",
    "rate",
    "rate_file",
    "rate_wave",
    "recordings_in",
]

"""Tables: CSV files of others, read as text with the lines of an editor, and CSV text in which no
cell is a formula."""

import codecs
import contextlib
import csv
import io
import itertools
import logging
import re
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from gzip import GzipFile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from percepiano_ast.errors import InputError

logger = logging.getLogger(__name__)

MAX_BYTES = 2**28  # of a table, decompressed; 1,202 clips and 100 models take half of it
MAX_MEMORY = 2**29  # bytes of its cells
MAX_LINE = 2**20  # bytes; some of up to twice as many pass
MAX_LINES = 2**22
MAX_COLUMNS = 2000
MAX_PLAIN_CELLS = 2**24  # that pandas reads at once
MAX_CELLS = 5 * 10**7  # with empty ones
MISSING = ("NA", "N/A", "NaN", "nan", "null", "None")  # in columns of numbers

_TEXT = pd.Series(["text"]).dtype  # that pandas infers
_GZIP = b"\x1f\x8b"
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx, .ods; .xls
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark begins alike
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NAMES = {"cp1252": "Windows-1252", "mac_roman": "Mac OS Roman"}
_INTERNED = 2**16  # different cells of a column that are stored once, or more
_BLOCK = 2**14  # rows
_CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# Spaces, characters without width, and marks of the direction of writing.
_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u200e\u200f"
_BLANKS += "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" + "\u2060\ufeff"
# Quotes, blanks beside separators, empty lines, apostrophes of `to_csv`, other line ends
_UNUSUAL = (b'"', b"\r", b"\t", b", ", b" ,", b"\n ", b" \n", b"\n\n", b",'", b"\n'")
_LONGEST_NAME = 256  # in form NFC; accents are sorted in the square of the time
# Text in another encoding than assumed: European languages have at most two letters with accents in
# succession, and few symbols within words or beside such letters.
_MISREAD = re.compile(
    r"[À-ÖØ-öø-ÿŠšŽžŒœŸ]{3}|[ŠšŽžŸ](?=[a-z])|(?<=[A-Za-zÀ-ÿ])[“”–—…™®](?=[a-z])"
    r"|(?<=[A-Za-z])[^\s!-~À-ÖØ-öø-ÿœ’´°²«»·“”–—…™®]"
    r"|(?<=[À-ÿ])[¢-ª¬-¯±³-¶¸-º¼-¾]|[¢-ª¬-¯±³-¶¸-º¼-¾](?=[À-ÿ])"
)
_COMMA_NUMBER = re.compile(r"[+-]?[0-9]+,[0-9]+(?:[eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_FORMULA = re.compile(r"'*\s*[=+\-@＝＋－＠]|'*[\t\r\n]")
_HARMLESS = re.compile(r"[-+\d.,%*\[\] ]*")  # numbers, intervals


# --- Reading --------------------------------------------------------------------------------------


def clean_name(text: str) -> str:
    """A name as it is compared: in Unicode form NFC, without blanks and invisible characters at its
    ends. Names of files on macOS are in form NFD."""
    if text.isascii():
        return text.strip()
    if len(text) <= _LONGEST_NAME:
        text = unicodedata.normalize("NFC", text)
    return text.strip(_BLANKS)


def read_csv(
    source: Any, what: str, required: Sequence[str] = (), *, name: str = ""
) -> pd.DataFrame:
    """Read a CSV file of unknown origin as text; its index has the line in which each row begins.

    Separators are commas, semicolons, tabs or vertical bars: those with which the header has the
    ``required`` columns, or most columns. The encoding is UTF-8 or UTF-16, otherwise Windows-1252
    or, with line ends of old Macs, Mac OS Roman, unless the text is then implausible. What differs
    from commas and UTF-8 is logged. Cells and names of columns are as `clean_name` returns them;
    empty cells are NaN, and only these. Rows and trailing columns without any content are dropped,
    and an apostrophe of `to_csv` is removed.

    Args:
        source: a path, or the content; compressed by gzip or not, whatever its name.
        what: the kind of table, in messages.
        required: columns to recognise the separator by; their absence is not an error.
        name: in messages; by default the path.

    Raises:
        InputError: missing, damaged, larger than the limits, in another encoding, or not CSV.
    """
    name = name or str(source)
    content = source if isinstance(source, bytes) else _content(source, what)
    if content.startswith(_GZIP):
        content = _inflated(content, name)
    if len(content) > MAX_BYTES:
        limit = f"more than {MAX_BYTES:,} bytes, the limit for a table"
        raise InputError(f"{name} has {limit}. Split it, or give the right file.")
    if content.startswith(_WORKBOOKS):
        advice = 'Open it in a spreadsheet and save it as "CSV UTF-8".'
        raise InputError(f"{name} is a workbook or an archive, not CSV. {advice}")
    encodings = [encoding for mark, encoding in _BOMS.items() if content.startswith(mark)][:1]
    if not encodings and content[1:4:2] == b"\0\0":
        encodings = ["utf-16-le"]
    elif not encodings and content[0:4:2] == b"\0\0":
        encodings = ["utf-16-be"]
    elif not encodings:
        encodings = ["utf-8", "cp1252"] + ["mac_roman"] * (b"\n" not in content)
    for encoding in encodings:
        with contextlib.suppress(UnicodeError):  # try the next
            return _parse(_as_utf8(content, encoding), _encoding(encoding), required, name)
    tried = " or ".join(map(_encoding, encodings))
    advice = "Save it as CSV in UTF-8, separated by commas, with decimal points."
    raise InputError(f"{name} is not a readable CSV file in {tried}. {advice}")


def _content(path: Any, what: str) -> bytes:
    try:
        with (Path(path) if isinstance(path, str) else path).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        advice = "check the path or run the command that writes it."
        raise InputError(f"no {what} file {path}; {advice}") from None
    except (OSError, ValueError) as error:  # such as a directory, or a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}). Give a CSV file.") from None


def _inflated(content: bytes, name: str) -> bytes:
    try:
        with GzipFile(fileobj=io.BytesIO(content)) as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = f"damaged gzip data: {error}"
        raise InputError(f"{name} is not a readable CSV file ({reason}). Copy it again.") from None


def _cleaned(cell: str) -> str:
    cell = clean_name(cell)
    return clean_name(cell[1:]) if cell[:1] == "'" and _FORMULA.match(cell) else cell


def _encoding(name: str) -> str:
    return _NAMES.get(name, name.removesuffix("-sig").upper())


def _as_utf8(content: bytes, encoding: str) -> bytes:
    """UTF-8 is not decoded: as text, a letter may take four bytes."""
    if encoding.startswith("utf-8"):
        return content.removeprefix(codecs.BOM_UTF8)
    if len(content) > MAX_BYTES // 4:
        raise UnicodeError
    text = content.decode(encoding)
    if encoding in _NAMES and _MISREAD.search(text):
        raise UnicodeError
    return text.removeprefix("\ufeff").encode()


def _parse(content: bytes, read: str, required: Sequence[str], name: str) -> pd.DataFrame:
    """The table in ``content``; UnicodeError if it is not UTF-8. ``read``: its encoding."""

    def refuse(line: int, reason: str, advice: str = "Give a CSV file.") -> InputError:
        what = f"{name} is not a readable CSV file (line {line}: {reason}; {read})"
        return InputError(f"{what}. {advice}")

    def lines_before(end: int) -> int:
        by_two = content.count(b"\r\n", 0, end)
        return content.count(b"\n", 0, end) + content.count(b"\r", 0, end) - by_two

    for start in range(0, len(content), MAX_LINE):
        part = content[start : start + MAX_LINE]
        if control := _CONTROLS.search(part):
            line = 1 + lines_before(start + control.start())
            raise refuse(line, f"the control character {control[0].decode()!r}")
        if len(part) == MAX_LINE and b"\n" not in part and b"\r" not in part:
            raise refuse(1 + lines_before(start), f"more than {MAX_LINE:,} bytes")
    if (count := lines_before(len(content))) > MAX_LINES:
        advice = "Split it, or give the right file."
        raise refuse(count, f"more than {MAX_LINES:,} lines", advice)

    # --- Separator: of Excel's first line, or the one that makes most sense of the header
    source, skipped = io.TextIOWrapper(io.BytesIO(content), "utf-8", newline=""), 0
    for header in source:
        if header.strip():
            break
        skipped += 1
    else:
        raise InputError(f"{name} is not a readable CSV file: it is empty. Write it again.")
    separator = ""
    if found := re.fullmatch(r'\s*"?(?i:sep)=([^\w\s"]|\t)"?[\s,;]*', header):
        separator, header, skipped = found[1], next(source, ""), skipped + 1
    if not separator:

        def sense(separator: str) -> tuple[bool, int]:
            names = [clean_name(cell).strip('" ') for cell in header.split(separator)]
            return {*required} <= {*names}, len(names)

        separator = max(_SEPARATORS, key=sense)
    if content.count(separator.encode()) > MAX_CELLS:
        limit = f"more than {MAX_CELLS:,} cells, the limit for a table"
        raise InputError(f"{name} has {limit}. Split it, or give the right file.")
    read += f", separator {_SEPARATORS.get(separator, repr(separator))}"

    # --- Rows
    def rows() -> Iterator[tuple[int, list[str]]]:
        given, line = itertools.chain([header], source), skipped + 1
        reader = csv.reader(given, delimiter=separator, skipinitialspace=True, strict=True)
        try:
            for row in reader:
                if any(row):
                    yield line, row
                line = skipped + reader.line_num + 1
        except csv.Error as error:
            reason = f"a quote that is not closed, or text after one: {error}"
            advice = "Close quotes, and write a quote inside a quoted cell twice."
            raise refuse(line, reason, advice) from None

    every = rows()
    line, titles = next(every, (1, []))
    names = [_cleaned(title) for title in titles]
    while names and not names[-1]:
        names.pop()
    width, empty = len(names), [""]
    if width > MAX_COLUMNS:
        raise refuse(line, f"{width:,} columns, {MAX_COLUMNS:,} are allowed", "Remove some.")
    for title in filter(None, names):
        if (times := names.count(title)) > 1:
            what = f"{times} columns named {title!r:.60}"
            raise InputError(f"{name} has {what}. Keep one, or rename them.")
    rows_of_text = content.count(b"\n", content.find(b"\n"), len(content) - 1)
    if (
        all(names)
        and read == "UTF-8, separator comma"
        and not skipped
        and content.isascii()
        and not any(map(content.__contains__, _UNUSUAL))
        and content.count(b",") == (rows_of_text + 1) * (width - 1) < MAX_PLAIN_CELLS
    ):
        # The same by pandas, faster
        with warnings.catch_warnings(), contextlib.suppress(pd.errors.ParserWarning, ValueError):
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row is too long
            options: dict = {"dtype": _TEXT, "keep_default_na": False, "na_values": [""]}
            table = pd.read_csv(io.BytesIO(content), index_col=False, **options)
            table.index = pd.RangeIndex(2, 2 + len(table), name="line")
            table.attrs |= {"name": name, "separator": separator, "read": read}
            return table.dropna(how="all")
    columns: list[list] = [[] for _ in names]
    seen: list[dict] = [{} for _ in names]
    starts, memory = [], 0
    while block := list(itertools.islice(every, _BLOCK)):
        for line, row in block:
            if len(row) < width:
                row += empty * (width - len(row))
            elif len(row) > width and any(map(_cleaned, row[width:])):
                if {*required} <= {*names}:
                    what = _SEPARATORS.get(separator, "separator")
                    both = " (decimal commas too)" * (separator == ",")
                    advice = f"Put cells with a {what} into quotes{both}, or use other separators."
                else:
                    advice = f"The first line must name the columns, such as {required[0]}."
                reason = f"{len(row)} cells, but the header has {width}"
                raise refuse(line, reason, advice)
            starts.append(line)
        # Every different cell is cleaned and, while they are few, stored once.
        for column, known, cells in zip(columns, seen, zip(*(row for _, row in block))):
            new = {cell: _cleaned(cell) or np.nan for cell in set(cells) - known.keys()}
            memory += sum(map(sys.getsizeof, new.values()))
            if len(known) < _INTERNED:
                known |= new
                new = known
            else:
                new |= {cell: known[cell] for cell in set(cells) & known.keys()}
            column.extend(map(new.__getitem__, cells))
        memory += len(block) * (16 * width + 40)
        if memory > MAX_MEMORY:
            advice = "Split it, or give the right file."
            raise refuse(line, f"more than {MAX_MEMORY:,} bytes of cells", advice)
    for number, (title, column) in enumerate(zip(names, columns), 1):
        # The first column without a name is an index, as of pandas.
        if not title and number > 1 and any(isinstance(cell, str) for cell in column):
            raise InputError(f"{name}: column {number} has no name. Name it, or remove it.")
    index = pd.Index(starts, name="line", dtype=int)
    kept = {title: pd.Series(column, index, _TEXT) for title, column in zip(names, columns)}
    if names[1:].count(""):
        del kept[""]
    if read != "UTF-8, separator comma":
        logger.info(f"{name}: read as {read}")
    table = pd.DataFrame(kept, index).dropna(how="all")
    table.attrs |= {"name": name, "separator": separator, "read": read}
    return table


def read_own(path: str | Path, names: Sequence[str]) -> pd.DataFrame:
    """Read a table that this package wrote: text in the columns ``names``, and in others unless
    all of their cells are numbers. Raises as `read_csv`."""
    table = read_csv(path, "result", names).reset_index(drop=True)
    for column in table.columns.difference(names):
        found = pd.to_numeric(table[column], errors="coerce")
        if (found.notna() | table[column].isna()).all():
            table[column] = found
    return table


def numbers(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a table of `read_csv` as float64, NaN where a cell is empty or not a number in
    ASCII digits; with decimal commas if it has some, which is logged.

    Raises:
        InputError: points and commas in numbers, or commas that may separate thousands.
    """
    text = table[list(columns)]
    found = text.apply(pd.to_numeric, errors="coerce").astype(float)
    cells, values = text.to_numpy(object), found.to_numpy(copy=True)
    unread = map(tuple, np.argwhere(np.isnan(values) & text.notna().to_numpy()))
    commas = [at for at in unread if re.fullmatch(_COMMA_NUMBER, str(cells[at]))]
    if "read" not in table.attrs:  # made by a program
        return found
    name, read = table.attrs["name"], table.attrs["read"]
    table.attrs["read"] = f"{read}, decimal {'comma' if commas else 'point'}"
    if not commas:
        return found

    def shown(at: tuple[int, int]) -> str:
        return f"line {text.index[at[0]]}: {text.columns[at[1]]} is {cells[at]!r:.60}"

    known = map(tuple, np.argwhere(~np.isnan(values)))
    if point := next((at for at in known if "." in cells[at]), None):
        both = f"{name}, {shown(commas[0])}, but {shown(point)}"
        raise InputError(f"{both} ({read}). Use decimal points, or decimal commas.")
    thousands = all(re.fullmatch(_THOUSANDS, cells[at]) for at in commas)
    if table.attrs["separator"] != ";" and thousands:
        what = "which may have a decimal comma or one of thousands"
        raise InputError(f"{name}, {shown(commas[0])}, {what} ({read}). Use decimal points.")
    logger.info(f"{name}: read with decimal commas")
    for at in commas:
        values[at] = float(cells[at].replace(",", "."))
    return pd.DataFrame(values, text.index, text.columns)


# --- Writing --------------------------------------------------------------------------------------


def to_csv(table: pd.DataFrame, float_format: str | None = None) -> bytes:
    """A table without its index as CSV in UTF-8. Text that a spreadsheet would run as a formula
    begins with an apostrophe, as OWASP's "CSV injection" advises; `read_csv` removes it."""

    def harmless(cell: Any) -> Any:
        runs = isinstance(cell, str) and _FORMULA.match(cell) and not _HARMLESS.fullmatch(cell)
        return f"'{cell}" if runs else cell

    safe = table.rename(columns=harmless)
    for column in safe:
        if safe[column].dtype in (_TEXT, object):
            safe[column] = safe[column].map(harmless)
    text = safe.to_csv(index=False, float_format=float_format, lineterminator="\n")
    return text.encode("utf-8", "backslashreplace")  # a file name may have undecodable bytes

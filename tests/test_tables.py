"""Tables as people have them: separators, encodings, line ends, names, damage and size. Cost: 5
s."""

import gzip
import io
import subprocess
import sys
import unicodedata

import numpy as np
import pandas as pd
import pytest

from percepiano_ast import tables
from percepiano_ast.errors import InputError
from percepiano_ast.tables import clean_name, numbers, read_csv, to_csv

# Names that pandas would read as missing, numbers or truth values, and an umlaut.
NAMES = ["NA", "N/A", "None", "null", "nan", "-", "TRUE", "001", "1e5", "Käse, B-Dur"]
VALUES = [1.5, 2.0, -0.25, 3.125, 0.5, 7.0, 1e-3, 4.0, 5.5, 6.5]


def written(separator=",", end="\n", decimal=".", quotes=False, before="", behind=""):
    """A table of `NAMES` and `VALUES` between other text."""
    lines = [separator.join(["clip", "group", "Wärme"])]
    for name, value in zip(NAMES, VALUES):
        cells = [name, "g 1", f"{value}".replace(".", decimal)]
        lines.append(
            separator.join(f'"{one}"' if quotes or separator in one else one for one in cells)
        )
    return before + end.join(lines) + end + behind


def found(content, name="ratings.csv"):
    table = read_csv(content, "ratings", ("clip", "group"), name=name)
    return table, numbers(table, [column for column in table if column not in ("clip", "group")])


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (written(), "utf-8"),
        (written(end="\r"), "utf-8"),
        (written(end="\r\n"), "utf-8-sig"),
        (written().replace("\n", "\r", 3).replace("\n", "\r\n", 2), "utf-8"),  # mixed
        (written(quotes=True), "utf-8"),
        (written(quotes=True, decimal=","), "utf-8"),
        (written(";"), "utf-8"),
        (written(";", decimal=","), "utf-8"),
        (written(";", decimal=",", end="\r\n"), "cp1252"),
        (written(";", decimal=",", end="\r"), "mac_roman"),
        (written("\t", decimal=",", end="\r\n"), "utf-16"),  # Excel's "Unicode text"
        (written("\t"), "utf-16-le"),
        ("\ufeff" + written("\t"), "utf-16-be"),
        (written(";", before="SEP=;\r\n", end="\r\n"), "utf-16"),
        (written().replace("clip", "\u200fclip\u200e").replace("g 1", "\u202ag 1\u202c"), "utf-8"),
        (written("|"), "latin-1"),
        (written(), "utf-32"),
        (written(";", decimal=",", before="sep=;\r\n", end="\r\n"), "utf-8-sig"),
        (written("\t", before='"sep=\t"\n'), "utf-8"),
        (written("^", before="sep=^\n"), "utf-8"),
        (written(behind="\n\n,,\n , ,\n"), "utf-8"),
        (written(before="\n  \n\n"), "utf-8"),
        (written().replace("\n", ",,\n"), "utf-8"),  # empty columns behind
        (written(";").replace(";", " ; ").replace("clip", "\ufeff clip\u200b"), "utf-8"),
        (written(quotes=True).replace(",", ", "), "utf-8"),
        (written().replace("g 1", "\xa0g 1\u200b\t"), "utf-8"),
        (unicodedata.normalize("NFD", written()), "utf-8"),
    ],
)
def test_what_spreadsheets_write_is_read(text, encoding):
    for content in (text.encode(encoding), gzip.compress(text.encode(encoding))):
        table, values = found(content)
        assert table["clip"].str.replace(",  ", ", ").tolist() == NAMES
        assert set(table["group"]) == {"g 1"} and list(values) == ["Wärme"]
        assert values["Wärme"].tolist() == VALUES


@pytest.mark.parametrize(
    "name",
    [
        *"Größe|Übung “süß”|L’œuvre n°3|Bach–Busoni|créée à Noël".split("|"),
        *"¿Qué?|Steinway™|«Été»|Pärt, m²|20 €".split("|"),
    ],
)
def test_names_in_windows_1252(name):
    content = f"clip;group;W\n{name};g;1\n".encode("cp1252")
    assert found(content)[0]["clip"].tolist() == [name]


@pytest.mark.parametrize("first", ['sep="', "sep= ", "sep=a"])
def test_what_excel_would_not_write_is_a_header(first):
    assert list(read_csv(f"{first}\nx\n".encode(), "ratings")) == [clean_name(first)]


def test_lines_are_counted_as_an_editor_shows_them():
    text = 'sep=;\n\nclip;group;W\n"a\nb";g;1\n\n;;\nc;g;"2\n"\r\nd;g;x\n'
    table, values = found(text.encode())
    assert dict(zip(table.index, table["clip"])) == {4: "a\nb", 8: "c", 10: "d"}
    assert values["W"].isna().idxmax() == 10


def test_only_empty_cells_are_empty():
    table, values = found(b'clip,group,W\na,"",\n , \xc2\xa0 ,1\nb,,NA\n')
    assert table["clip"].tolist() == ["a", "b"] or table["clip"].isna().tolist() == [
        False,
        True,
        False,
    ]
    assert table["group"].isna().all() and values["W"].isna().sum() == 2
    assert table["W"].tolist()[1:] == ["1", "NA"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n \n", "is empty"),
        (
            b"clip,group,W\na,g,3,5\n",
            r"line 2: 4 cells, but the header has 3; UTF-8, separator comma",
        ),
        (b'clip,group,W\na,g,1\n"b,g,2\nc,g,3\n', "line 3: a quote that is not closed"),
        (b'clip,group,W\na,g,1\n"b"x,g,2\n', "line 3: a quote .* or text after one"),
        (b'clip,group,W\n"' + b"x" * 200_000 + b'",g,2\n', "line 2: .*field larger"),
        (b"clip,group,W\na,g,1,234\n", "line 2: 4 cells.* Put cells with a comma into quotes"),
        (b"Ratings of 2024\nclip,group,W\n", "line 2: 3 cells, .*The first line must name the col"),
        (b"clip,group\n" + (b"a" + b"," * 1_000_000 + b"\n") * 51, "more than 50,000,000 cells"),
        (b'clip,group,W\na,g,"1,234"\nb,g,"2,500"\n', "line 2: W is '1,234', which may have"),
        (b"clip\tgroup\tW\na\tg\t1,234\n", "a decimal comma or one of thousands .*separator tab"),
        (b"clip;group;W\na;g;1,5\nb;g;2.5\n", "line 2: W is '1,5', but line 3: W is '2.5'"),
        (b"clip,group,W,W\na,g,1,2\n", "has 2 columns named 'W'. Keep one"),
        (b"clip,group,,W\na,g,x,2\n", "column 3 has no name"),
        (b"\0" * 100, "control character|not text|not a readable CSV"),
        (b"clip,group,W\na\0b,g,1\n", "control character"),
        (b"clip,group,W\n\x1b[31m,g,1\n", r"line 2: the control character '\\x1b'"),
        (b"PK\x03\x04" + bytes(50), "workbook or an archive"),
        ("clip,group,W\nИванов,g,1\n".encode("cp1251"), "not a readable CSV file in UTF-8 or Win"),
        ("clip,group,W\nK\u00e4se,g,1\n".encode("cp437"), "not a readable CSV file in UTF-8"),
        ("clip,group,W\n\u30d4\u30a2\u30ce,g,1\n".encode("shift_jis"), "Save it as CSV in UTF-8"),
        ("clip,group,W\nK\u00f6nig,g,1\n".encode("cp437"), "not a readable CSV file in UTF-8"),
        ("clip,group,W\n\u0141\u00f3d\u017a,g,1\n".encode("cp1250"), "not a readable CSV"),
        ("clip,group,W\n\u94a2\u7434,g,1\n".encode("gbk"), "not a readable CSV file in UTF-8"),
        ("clip,group,W\n\u00e9x\u00e9,g,1\n".encode("mac_roman"), "Save it as CSV in UTF-8"),
        (b"\xff\xfec\0l\0i", "in UTF-16. Save it"),
        (gzip.compress(written().encode(), mtime=0)[:60], "damaged gzip data"),
        (gzip.compress(written().encode(), mtime=0) + b"junk", "damaged gzip data"),
        (gzip.compress(written().encode(), mtime=0)[:-8] + bytes(8), "damaged gzip data"),
        (b"\x1f\x8b\x08\0" + b"\xff" * 50, "damaged gzip data"),
        (b",".join([b"x"] * 3000), "3,000 columns"),
        (b"clip,group,W" + b",x" * 10_000_000, "more than 1,048,576 bytes"),
        (b"clip,group,W\n" + ("\u00e9" + " " * 2**16 + "x\n").encode() * 20 + b"\0", "control"),
        (b"clip,group,W\n" + b"x" * 200_000_000, "more than 1,048,576 bytes"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(content, message):
    with pytest.raises(InputError, match=message) as refused:
        found(content)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "cell",
    "1_000 0x10 ٣ １２ 1,2,3 1.234,5 1,234.5 3% 3,5kg 1e999 inf -inf nan -- 1d5 True".split()
    + ["9" * 5000, "1 000", "1\xa0000", "3 ,5"],
)
def test_what_is_no_finite_number_is_none(cell):
    _, values = found(f'clip;group;W\na;g;"{cell}"\nb;g;2\n'.encode())
    assert not np.isfinite(values["W"].iloc[0]) and values["W"].iloc[1] == 2


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_the_content_decides_about_compression(name, tmp_path):
    for content in (written().encode(), gzip.compress(written().encode())):
        (tmp_path / name).write_bytes(content)
        assert len(read_csv(tmp_path / name, "ratings")) == len(NAMES)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read .Is a directory"):
        read_csv(tmp_path, "ratings")
    with pytest.raises(InputError, match="no ratings file .*none.csv; check the path"):
        read_csv(tmp_path / "none.csv", "ratings")
    with pytest.raises(InputError, match="cannot be read"):
        read_csv("null\0.csv", "ratings")


def test_a_dialect_other_than_commas_and_utf_8_is_logged(logged):
    found(written().encode())
    assert not logged
    found(written(";", decimal=",").encode("cp1252"))
    assert logged == [
        "ratings.csv: read as Windows-1252, separator semicolon",
        "ratings.csv: read with decimal commas",
    ]


# --- Writing --------------------------------------------------------------------------------------

RUN_BY_SPREADSHEETS = [
    "=1+1",
    "+1+cmd|' /C calc'!A0",
    "-take",
    "@SUM(A1)",
    " =1",
    "\uff1d1",
    "\t=1",
    "\r=1",
]


def test_no_cell_is_a_formula_and_names_come_back():
    names = [*RUN_BY_SPREADSHEETS, "'=1", "''@a", "'tis", "a=b", "plain", "3-4"]
    table = pd.DataFrame({"name": names, "=dimension": -0.3, "text": "-0.03 [-0.10, +0.05]"})
    content = to_csv(table, "%.2f")
    cells = pd.read_csv(io.BytesIO(content), dtype=str)
    assert (cells["name"][: len(RUN_BY_SPREADSHEETS)].str[0] == "'").all()
    assert cells.columns[1] == "'=dimension"
    assert set(cells["'=dimension"]) == {"-0.30"} and set(cells["text"]) == {"-0.03 [-0.10, +0.05]"}
    back = read_csv(content, "names")
    assert back["name"].tolist() == [name.strip() for name in names]
    assert list(back) == ["name", "=dimension", "text"]


def test_own_tables_come_back_as_they_were(tmp_path):
    table = pd.DataFrame(
        {"clip": NAMES, "value": VALUES, "count": range(10), "why": ["1", *"bcdefghij"]}
    )
    table.loc[3, "value"] = np.nan
    (tmp_path / "own.csv").write_bytes(to_csv(table))
    pd.testing.assert_frame_equal(tables.read_own(tmp_path / "own.csv", ["clip"]), table)


# --- Size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("gzip.compress(b'clip,group\\n' + bytes(2**29), 1)", "more than 268,435,456 bytes"),
        ("gzip.compress(b'clip,group\\n' + b'a,b\\n' * 2**25, 1)", "more than 4,194,304 lines"),
        (
            "b'a,b,c,d,e,f,g,h\\n' + b''.join(b'%d,,,,,,,%d\\n' % (n, n) for n in range(4194300))",
            "bytes of cells",
        ),
    ],
)
@pytest.mark.slow
def test_bombs_are_refused_in_little_memory(make, message, tmp_path):
    code = f"""
import gzip, resource
from percepiano_ast.tables import InputError, read_csv
with open("bomb.csv.gz", "wb") as file:
    file.write({make})
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    code = """
import resource
from percepiano_ast.tables import InputError, read_csv
try:
    read_csv("bomb.csv.gz", "ratings", ("clip", "group"))
except InputError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    said, kilobytes = run.stdout.splitlines()
    assert message in said and int(kilobytes) < 1_000_000

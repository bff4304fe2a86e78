"""Which files are recordings: by the suffix, or if it says nothing by the first bytes."""

import mimetypes
import re
from pathlib import Path, PurePath

from percepiano_ast import files

# Formats and containers that libsndfile or ffmpeg reads.
SUFFIXES = frozenset(
    (
        ".wav .wave .bwf .rf64 .bw64 .w64 .flac .mp3 .mp2 .mp1 .mpa .m2a .mpga .ogg .oga .ogx .opus"
        " .spx .aif .aiff .aifc .au .snd .caf .m4a .m4b .m4r .aac .adts .latm .loas .ac3 .eac3 .ec3"
        " .dts .thd .truehd .amr .awb .wma .asf .wv .ape .tta .tak .shn .mpc .ra .voc .sph .nist"
        " .ircam .8svx .avr .pvf .sox .nut .dsf .dff .weba .mka .mp4 .m4v .f4a .f4v .mov .qt .3gp"
        " .3g2 .webm .mkv .avi .wmv .flv .ogv .rm .mpg .mpeg .vob .mts .m2ts"
    ).split()
)
_UNFINISHED = frozenset(
    ".crdownload .part .partial .download .opdownload .filepart .aria2 .tmp .bak .old .orig".split()
)
_POINTERS = frozenset(
    ".gshortcut .gdoc .gsheet .gslides .gdraw .glink .lnk .url .webloc .desktop .icloud".split()
)
# How they begin. Images share the container of MP4; a size before a name differs from text.
_BEGINNINGS = re.compile(
    rb"RIFF....(WAVE|AVI )|RIFX....WAVE|(RF|BW)64|riff\x2e\x91\xcf\x11|FORM....(AIF[FC]|8SVX|16SV)"
    rb"|fLaC|OggS|\.snd|caff|ID3[\x02-\x04]|\xff[\xe2\xe3\xf0-\xfd]|ADIF|\x56[\xe0-\xff]|\x0b\x77"
    rb"|[\x00-\x08]...(ftyp(?!hei|hev|mif|msf|avi|crx)|moov|mdat|wide)|\x1a\x45\xdf\xa3|FLV\x01"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x7f\xfe\x80\x01|....\xf8\x72\x6f\xba|#!AMR|wvpk"
    rb"|MAC .[\x0c-\x10]|TTA[12]|tBaK|MPCK|MP\+[\x07\x17\x27]|\.RMF|\.ra\xfd|Creative Voice"
    rb"|NIST_1A|ajkg|\.SoX|XoS\.|nut/multimedia|\x64\xa3[\x01-\x04]|2BIT|PVF1|DSD \x1c"
    rb"|FRM8....DSD |\x00\x00\x01\xba|\x47.{187}\x47|.{4}\x47.{191}\x47",
    re.DOTALL,
)
NO_RECORDING = "other files are not recordings"  # reason of `find_recordings`
_TYPES = mimetypes.MimeTypes()


def is_audio(name: str) -> bool:
    """Whether a file name has the suffix of a recording and is not hidden."""
    path = PurePath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def stem(name: str) -> str:
    """The name of a recording without its suffix, of a known format or of up to five letters and
    digits: "Op. 27 No. 2" has none."""
    suffix = PurePath(name).suffix
    is_one = suffix.lower() in SUFFIXES or re.fullmatch(r"\.(?=\d*[a-z])\w{1,5}", suffix, re.I)
    return name.removesuffix(suffix) if is_one else name


def find_recordings(folder: str | Path) -> tuple[list[Path], dict[Path, str]]:
    """The recordings below a folder, sorted, and its other files with the reason, see
    `files.walk`. Files with the suffix of text, an image or another known type are not opened."""
    found, left = files.walk(folder)
    recordings = []
    for path in found:
        suffix = path.suffix.lower()
        kind = _TYPES.guess_type(f"name{suffix}", strict=False)[0] or "unknown"
        may_sound = kind.startswith(("unknown", "audio/", "video/", "application/octet-stream"))
        beginning = b""
        if suffix in SUFFIXES:
            recordings.append(path)
        elif suffix in _UNFINISHED or path.name.endswith("~"):
            left[path] = "unfinished downloads or backups are left out"
        elif suffix in _POINTERS:
            left[path] = "shortcuts hold no sound; add the file or folder that they point to"
        else:
            try:
                if may_sound and "midi" not in kind:
                    with path.open("rb") as file:
                        beginning = file.read(400)
            except OSError as error:
                left[path] = f"files cannot be read ({error.strerror})"
            else:
                if _BEGINNINGS.match(beginning):
                    recordings.append(path)
                else:
                    left[path] = NO_RECORDING
    return recordings, left

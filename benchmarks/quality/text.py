"""English text of Debian's packages as tokens, for where no hub of datasets can be reached.

    python -m benchmarks.quality.text output/tokens.npy --model output/smollm2

downloads the packages by apt-get, reads the plain text in them (dictionaries, manuals in
reStructuredText, Markdown and POD), leaves out what comes twice, cuts it into pieces at blank
lines, shuffles the pieces and tokenizes them. The file holds rows of `--context` tokens: a model's
prompts, each with BOS first. tokens.json beside it says what text it was.
"""

import argparse
import gzip
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformers import AutoTokenizer, PreTrainedTokenizerBase

PACKAGES = [
    "anarchism",
    "debian-reference-en",
    "dict-foldoc",
    "dict-gcide",
    "dict-jargon",
    "git-doc",
    "linux-doc-6.1",
    "perl-doc",
    "python3.11-doc",
]
SUFFIXES = (".dict.dz", ".md", ".pod", ".rst", ".txt")
PIECE = 8000  # characters; a dictionary is one file of 40 million


def package_text(package: str, directory: Path) -> Iterator[str]:
    """Download a package into `directory` and yield the text of each file that is plain text."""
    subprocess.run(["apt-get", "download", package], cwd=directory, check=True)
    (archive,) = directory.glob(f"{package}_*.deb")
    unpacked = directory / package
    subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
    for path in sorted(unpacked.rglob("*")):
        if path.is_file() and path.name.removesuffix(".gz").endswith(SUFFIXES):
            is_packed = path.suffix in (".gz", ".dz")
            data = gzip.decompress(path.read_bytes()) if is_packed else path.read_bytes()
            yield data.decode(errors="ignore")


def pieces(text: str) -> Iterator[str]:
    """Cut a text at blank lines into pieces of about PIECE characters."""
    piece: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        length += len(paragraph)
        if length >= PIECE:
            yield "\n\n".join(piece)
            piece, length = [], 0
    if length:
        yield "\n\n".join(piece)


def tokenized(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, context: int
) -> Iterator[torch.Tensor]:
    """Yield prompts of `context` tokens, as SAELens makes them of a text dataset."""

    def sequences() -> Iterator[torch.Tensor]:
        for start in range(0, len(texts), 500):
            batch = tokenizer(texts[start : start + 500], add_special_tokens=False)["input_ids"]
            yield from map(torch.tensor, batch)  # pyright: ignore

    return concat_and_batch_sequences(
        sequences(),
        context_size=context,
        begin_batch_token_id=tokenizer.bos_token_id,
        begin_sequence_token_id=None,
        sequence_separator_token_id=tokenizer.eos_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the .npy file to write")
    parser.add_argument("--model", required=True, help="whose tokenizer to take")
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    parser.add_argument("--context", type=int, default=512, help="tokens in a row")
    parser.add_argument("--tokens", type=int, help="tokens to write; left out: all")
    args = parser.parse_args()

    texts: set[str] = set()
    characters = {}
    for package in args.packages:
        with TemporaryDirectory() as directory:
            new = set(package_text(package, Path(directory))) - texts
        texts |= new
        characters[package] = sum(map(len, new))
    shuffled = sorted(piece for text in texts for piece in pieces(text))
    random.Random(0).shuffle(shuffled)

    rows = []
    n_rows = None if args.tokens is None else args.tokens // args.context
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for row in tokenized(shuffled, tokenizer, args.context):
        rows.append(row.numpy().astype(np.uint16 if len(tokenizer) < 2**16 else np.int32))
        if len(rows) == n_rows:
            break
    np.save(args.output, np.stack(rows))
    about = {
        "text": "Debian packages, cut into pieces and shuffled",
        "characters": characters,
        "prompts": len(rows),
        "context_size": args.context,
        "tokens": len(rows) * args.context,
    }
    args.output.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()

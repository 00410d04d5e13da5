"""Turn the glosses of WordNet 3.0 into the text that the tiny language model is trained on.

One document per synset, for example::

    teethe: grow teeth; cut the baby teeth; "The little one is teething now"

The documents are shuffled with a fixed seed, so that neighbours are unrelated. The last 5% go to
`validation.parquet`, and nothing is trained on them. The rest go to `train.parquet`. From the two
file names `datasets` takes the splits "train" and "validation" of the directory.

    python examples/tiny_lm/make_text.py /usr/share/wordnet

The argument is the directory with WordNet's data.noun, data.verb, data.adj and data.adv. Debian's
package wordnet-base puts them in /usr/share/wordnet.
"""

import argparse
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
HELD_OUT_SHARE = 0.05
SEED = 0

ADJECTIVE_POSITION = re.compile(r"\((a|p|ip)\)$")


def parse_synset(line: str) -> str:
    """Make a document of the line of one synset.

    The line is "offset file type word_count word sense word sense ... | gloss", with word_count in
    hexadecimal.
    """
    fields, gloss = line.split(" | ", maxsplit=1)
    words = fields.split(" ")
    word_count = int(words[3], 16)
    lemmas = [
        ADJECTIVE_POSITION.sub("", word).replace("_", " ")
        for word in words[4 : 4 + 2 * word_count : 2]
    ]
    return f"{', '.join(lemmas)}: {gloss.strip()}"


def read_documents(wordnet_dir: Path) -> list[str]:
    """Read every synset of the four data files. The licence at their top, indented, is left out."""
    documents = []
    for part in PARTS_OF_SPEECH:
        lines = (wordnet_dir / f"data.{part}").read_text(encoding="utf-8").splitlines()
        documents += [parse_synset(line) for line in lines if not line.startswith(" ")]
    return documents


def write_split(documents: list[str], path: Path) -> None:
    """Write one document per row, in the single column `text`."""
    pq.write_table(
        pa.table({"text": documents}),
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=False,
        row_group_size=len(documents),
        data_page_size=2**26,
    )
    size = path.stat().st_size
    text_bytes = sum(len(document.encode()) for document in documents)
    print(f"{path.name}: {len(documents)} documents, {text_bytes} bytes of text, {size} on disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wordnet_dir", type=Path, help="directory with data.noun, data.verb, ...")
    parser.add_argument("--out", type=Path, default=HERE / "wordnet_glosses")
    args = parser.parse_args()

    # Sorting makes the order independent of the files. The set drops exact repeats.
    documents = sorted(set(read_documents(args.wordnet_dir)))
    random.Random(SEED).shuffle(documents)
    n_train = len(documents) - round(HELD_OUT_SHARE * len(documents))

    args.out.mkdir(parents=True, exist_ok=True)
    write_split(documents[:n_train], args.out / "train.parquet")
    write_split(documents[n_train:], args.out / "validation.parquet")


if __name__ == "__main__":
    main()

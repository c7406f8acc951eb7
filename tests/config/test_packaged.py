"""The real configs run, with the model and the data swapped for tiny local ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tiny_checkpoint import make_model

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.data.tasks.bilingual import LANGUAGES, REPLACEMENTS
from r1jax.planner.dry_run import describe
from r1jax.pretrained import stream_completions
from r1jax.run.resolve import check, resolve
from r1jax.settings.rewriting import RuleRewrite
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage

SWAPPED = {
    "qwen2.5-1.5b/r1_zero_gsm8k": {"question": "What is 40 + 2?", "answer": "So 42.\n#### 42"},
    "qwen2.5-math-7b/r1_zero_math": {
        "problem": "What is half?",
        "solution": r"It is $\boxed{\frac12}$.",
        "answer": r"\frac{1}{2}",
        "type": "Algebra",
        "subject": "Algebra",
    },
}


@pytest.mark.parametrize("name", SWAPPED)
def test_real_config_runs_on_tiny_parts(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    first = next(iter(SWAPPED[name]))
    for split, count in (("train", 8), ("test", 2)):
        rows = [
            {**SWAPPED[name], first: f"({split} {i}) {SWAPPED[name][first]}"} for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"model.path={tmp_path / 'model'}", f"output={tmp_path / 'runs'}"]
    overrides += ["verifier.workers=1", "trackers=[]", "model.log_prob_chunk=64"]
    for split in ("train", "test"):
        overrides += [f"data.{split}.source=jsonl:{tmp_path / split}.jsonl"]
        overrides += [f"data.{split}.split=train", f"data.{split}.options={{}}"]
        overrides += [f"data.{split}.max_prompt_tokens=1024"]
    for stage in ("before", "after"):
        overrides += [f"stages.{stage}.samples_per_problem=2", f"stages.{stage}.max_new_tokens=8"]
        overrides += [f"stages.{stage}.problems_per_batch=2"]
    for setting in (
        "steps=2",
        "questions_per_step=2",
        "outputs_per_question=2",
        "mini_batches_per_rollout=2",
        "micro_batches=2",
        "rollout_batches=2",
        "max_new_tokens=8",
        "checkpoint_every=2",
        "length_bucket=512",
    ):
        overrides.append(f"stages.rl.{setting}")
    config = load_config(name, overrides)
    assert recipe.run(config) == 0
    run = tmp_path / "runs" / f"{config.name}-s0"
    results = json.loads((run / "results.json").read_text())
    assert results["complete"]
    assert 0 <= results["after"]["pass_at_1"]["value"] <= 1
    rows = [
        json.loads(line) for line in (run / "stages/01-rl/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2]
    sample = json.loads((run / "stages/01-rl/samples.jsonl").read_text().splitlines()[0])
    assert sample["answer"] in ("42", r"\frac12")
    assert "<think>" in sample["prompt"]  # the R1-Zero template
    recipe.export_run(run, tmp_path / "exported")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")


CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n{% else %}"
    "Assistant: {{ m.content }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def test_the_whole_schedule_is_checked_before_any_compute(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    files = {
        "gsm8k": {"question": "What is 40 + 2?", "answer": "So 42.\n#### 42"},
        "general": {"prompt": "Say hello.", "response": "Hello!"},
        "helpful": {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."},
        "safety": {"prompt": "Say hello.", "response": "Hello!", "safe": True},
    }
    for name, row in files.items():
        first = next(iter(row))
        rows = [
            {**row, first: f"({i}) {row[first]}"} for i in range(4096 if name == "gsm8k" else 200)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    overrides = [f"model.path={tmp_path / 'model'}", f"output={tmp_path / 'runs'}"]
    for data, name in (
        ("questions", "gsm8k"),
        ("test", "gsm8k"),
        ("chat_questions", "gsm8k"),
        ("chat_test", "gsm8k"),
        ("general", "general"),
        ("general_questions", "general"),
        ("helpful_pairs", "helpful"),
        ("helpful_held_out", "helpful"),
        ("safety_labels", "safety"),
        ("safety_held_out", "safety"),
    ):
        overrides.append(f"data.{data}.source=jsonl:{tmp_path / name}.jsonl")
        if name == "gsm8k":
            overrides += [f"data.{data}.split=train", f"data.{data}.options={{}}"]
    config = load_config("qwen2.5-1.5b/r1", overrides)
    check(resolve(config))
    assert describe(config)["memory"]
    (tmp_path / "helpful.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello!"}\n')
    with pytest.raises(ValueError, match=r"helpful.jsonl:1: column 'rejected' .* does not exist"):
        check(resolve(config))


def test_streaming_equals_one_text(tmp_path: Path) -> None:
    from r1jax.settings.sampling import SamplingSection

    make_model(tmp_path)
    texts = ["", ""]
    pieces = 0
    for index, text in stream_completions(
        str(tmp_path), "Hi", SamplingSection(temperature=1.0), 2, 40, 0, "plain"
    ):
        texts[index] += text
        pieces += 1
    assert pieces > 4  # in several pieces
    assert all(len(text.encode()) >= 20 for text in texts)
    assert texts[0] != texts[1]


def test_the_miniature_passes_every_check_and_knows_its_languages() -> None:
    config = load_config("tiny/r1")
    check(resolve(config))
    languages = config.rewards["language_consistency"].options["languages"]
    assert languages == LANGUAGES
    cold_start = config.stage("cold_start")
    assert isinstance(cold_start, RejectionSamplingStage)
    assert isinstance(cold_start.rewrite, RuleRewrite)
    assert cold_start.rewrite.replacements == REPLACEMENTS

"""The six published students: what the paper says of them, and one of them made in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_checkpoint import make_model

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.config.packaged import packaged_configs
from r1jax.config.run_config import RunConfig
from r1jax.planner import dry_run
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.sft.settings import SFTStage
from r1jax.train_step import make_schedule

# arXiv 2501.12948, the distillation tables: base, learning rate, AIME 2024 pass@1 and cons@64,
# MATH-500, GPQA Diamond, LiveCodeBench.
PUBLISHED = {
    "Qwen-1.5B": ("Qwen/Qwen2.5-Math-1.5B", 1e-4, "28.9", "52.7", "83.9", "33.8", "16.9"),
    "Qwen-7B": ("Qwen/Qwen2.5-Math-7B", 8e-5, "55.5", "83.3", "92.8", "49.1", "37.6"),
    "Llama-8B": ("meta-llama/Llama-3.1-8B", 5e-5, "50.4", "80.0", "89.1", "49.0", "39.6"),
    "Qwen-14B": ("Qwen/Qwen2.5-14B", 7e-5, "69.7", "80.0", "93.9", "59.1", "53.1"),
    "Qwen-32B": ("Qwen/Qwen2.5-32B", 6e-5, "72.6", "83.3", "94.3", "62.1", "57.2"),
    "Llama-70B": (
        *("meta-llama/Llama-3.3-70B-Instruct", 2e-5),
        *("70.0", "86.7", "94.5", "65.2", "57.5"),
    ),
}
NAMES = {
    student: f"distill/{base.split('/')[1].lower()}" for student, (base, *_) in PUBLISHED.items()
}
BENCHMARKS = ["aime_2024", "math_500", "gpqa_diamond", "livecodebench"]

# The models' published shapes: hidden, layers, heads, key-value heads, MLP, vocabulary, tied; and
# their weights in billions, by their model cards.
SHAPES = {
    "Qwen-1.5B": (1536, 28, 12, 2, 8960, 151936, True, 1.54),
    "Qwen-7B": (3584, 28, 28, 4, 18944, 152064, False, 7.61),
    "Llama-8B": (4096, 32, 32, 8, 14336, 128256, False, 8.03),
    "Qwen-14B": (5120, 48, 40, 8, 13824, 152064, False, 14.7),
    "Qwen-32B": (5120, 64, 40, 8, 27648, 152064, False, 32.5),
    "Llama-70B": (8192, 80, 64, 8, 28672, 128256, False, 70.6),
}

# The form of DeepSeek's chat template: no system prompt of its own, thoughts of past turns
# dropped, and an answer that opens with a thought.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% endif %}"
    "{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


def test_there_is_a_config_for_every_student_and_no_other() -> None:
    distill = {name for name in packaged_configs() if name.startswith("distill/")}
    assert distill == set(NAMES.values())


@pytest.mark.parametrize("student", PUBLISHED)
def test_settings_are_the_papers(student: str) -> None:
    base, rate, *figures = PUBLISHED[student]
    config = load_config(NAMES[student])
    stage, *evaluations = config.stages
    assert isinstance(stage, SFTStage)
    assert (config.model.path, stage.optimizer.learning_rate) == (base, rate)
    assert config.model.tokenizer == f"deepseek-ai/DeepSeek-R1-Distill-{student}"
    assert (stage.rows_per_step, stage.row_tokens) == (64, 32_768)
    assert stage.epochs is not None and 2 <= stage.epochs <= 3
    # Cosine from the published rate to a tenth of it.
    schedule = make_schedule(stage.optimizer, 1000)
    assert float(max(schedule(step) for step in range(1000))) == pytest.approx(rate)
    assert float(schedule(1000)) == pytest.approx(rate / 10)
    halfway = stage.optimizer.warmup_steps + (1000 - stage.optimizer.warmup_steps) // 2
    assert float(schedule(halfway)) == pytest.approx(0.55 * rate)
    assert [each.name for each in evaluations] == BENCHMARKS
    for each, samples in zip(evaluations, (64, 16, 64, 8), strict=True):
        assert isinstance(each, EvaluateStage)
        assert (each.benchmark, each.samples_per_problem) == (each.name, samples)
        assert config.weights_of(each.name) == "student"
        # Devices get equal shares of what is decoded at once, and of what is trained on.
        assert each.problems_per_batch == stage.rows_per_step // stage.micro_batches
    assert config.data["train"].template == "chat"
    told = config.notes.replace("\n", " ")
    aime, cons, maths, gpqa, code = figures
    assert f"AIME 2024 {aime} (cons@64 {cons}), MATH-500 {maths}, GPQA Diamond {gpqa}," in told
    assert f"LiveCodeBench {code}." in told


def test_students_differ_in_nothing_else() -> None:
    """A slip in one of six files that are alike would otherwise go unseen."""

    def common(config: RunConfig) -> dict[str, Any]:
        plan = config.model_dump(exclude={"name", "title", "notes"})
        for key in ("path", "tokenizer", "max_position_embeddings"):
            del plan["model"][key]
        for stage in plan["stages"]:
            for key in ("micro_batches", "problems_per_batch", "samples_per_batch"):
                stage.pop(key, None)
        del plan["stages"][0]["optimizer"]["learning_rate"]
        return plan

    first, *others = [common(load_config(name)) for name in NAMES.values()]
    assert all(other == first for other in others)


def give_template(directory: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜User｜>", "<｜Assistant｜>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


# Prompts have 128 to 256 bytes, as that of the choice: one shape for all that is sampled.
SUM = f"1+1{'+0' * 48}?"


def swapped(student: str, folder: Path, model: Path) -> list[str]:
    """Overrides that put tiny local data, and the model in a directory, in place of the hub's."""
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"{i} + {i}?"},
                {"role": "assistant", "content": f"<think>\nTwice {i}.\n</think>\n\n{2 * i}"},
            ]
        }
        for i in range(40)
    ]
    rows: dict[str, list[dict[str, Any]]] = {
        "train": talks,
        "aime_2024": [{"problem": SUM, "answer": "2"}],
        "math_500": [{"problem": SUM, "answer": "2"}],
        "gpqa_diamond": [
            {
                "Question": SUM,
                "Correct Answer": "2",
                **{f"Incorrect Answer {i}": str(2 + i) for i in (1, 2, 3)},
            }
        ],
        # In the form of the code reward, so that a row needs none of LiveCodeBench's columns.
        "livecodebench": [
            {
                "prompt": f"Print {SUM} Write nothing else, and no space.",
                "answer": {"language": "python", "tests": [{"input": "", "output": "2\n"}]},
            }
        ],
    }
    overrides = [f"model.path={model}", f"model.tokenizer={model}", f"output={folder / 'runs'}"]
    overrides += ["data.train.options={}", "data.livecodebench.row_format=null"]
    # Machines that cannot isolate programs run none here: a tiny model writes no code block.
    limits = "stages.livecodebench.rewards.code.options.minimum_isolation=limits"
    overrides += ["verifier.workers=1", "trackers=[]", limits]
    for name, content in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        overrides += [f"data.{name}.source=jsonl:{path}"]
    return overrides


@pytest.mark.parametrize("student", PUBLISHED)
def test_every_config_resolves_on_its_models_real_shape(student: str, tmp_path: Path) -> None:
    """A dry run: everything but the hub's files is the real thing, weights are abstract."""
    make_model(tmp_path / "model")
    give_template(tmp_path / "model")
    hidden, layers, heads, kv_heads, mlp, vocabulary, tied, billions = SHAPES[student]
    shape = {
        "model_type": "llama" if "Llama" in student else "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    config = load_config(NAMES[student], swapped(student, tmp_path, tmp_path / "model"))
    described = dry_run.describe(config)
    assert described["parameters"] / 1e9 == pytest.approx(billions, rel=0.01)
    memory = {entry["what"]: entry["bytes"] for entry in described["memory"]}
    moments, counters = 8 * described["parameters"], 2 * 4
    assert memory["student: optimizer moments"] == moments + counters
    # On the devices that the file names, half of their memory or less is state and caches.
    devices = config.stages[0].rows_per_step // config.stages[0].micro_batches  # type: ignore[union-attr]
    state = memory["weights"] + memory["student: gradients"] + memory["student: optimizer moments"]
    assert state / devices < 40e9
    cache = memory["aime_2024: key-value cache"] / devices
    assert cache < 48e9


def test_a_student_is_made_in_miniature(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    give_template(tmp_path / "model")
    overrides = swapped("Qwen-1.5B", tmp_path, tmp_path / "model")
    overrides += ["model.log_prob_chunk=64", "stages.student.epochs=2"]
    overrides += ["stages.student.rows_per_step=4", "stages.student.micro_batches=2"]
    overrides += ["stages.student.row_tokens=128", "stages.student.log_every=1"]
    for name in BENCHMARKS:
        overrides += [f"stages.{name}.samples_per_problem=2", f"stages.{name}.max_new_tokens=4"]
        overrides += [f"stages.{name}.samples_per_batch=2", f"stages.{name}.problems_per_batch=1"]
    config = load_config(NAMES["Qwen-1.5B"], overrides)
    assert recipe.run(config) == 0
    run = tmp_path / "runs" / f"{config.name}-s0"
    results = json.loads((run / "results.json").read_text())
    assert results["complete"]
    assert [each["stage"] for each in results["evaluations"]] == BENCHMARKS
    metrics = (run / "stages/00-student/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in metrics]
    assert losses[-1] < losses[0]
    # The thought that the template opens is the prompt's, not the student's to write.
    sample = json.loads((run / "stages/02-math_500/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith(f"<eos><｜User｜>{SUM}\nPlease reason step by step")
    assert sample["prompt"].endswith("within \\boxed{}.<｜Assistant｜><think>\n")
    recipe.export_run(run, tmp_path / "exported", None)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")

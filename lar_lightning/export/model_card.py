"""The card of an export: what it is, where it comes from, and what was measured of it."""

import json
from pathlib import Path
from typing import Any

from lar_lightning.segments import LatentVocabulary
from lar_lightning.trajectories import read_settings, trajectory_files

METRICS = {
    "score": "score",
    "units_per_expanded_token": "units per token of text",
    "adoption_rate": "adoption",
    "expanded_tokens_per_second": "tokens of text per second",
    "agreement": "agreement with the base model's text",
}
"""Key in the results of `evaluate` -> name."""


def model_card(
    base_model: str,
    base: Path,
    vocabulary: LatentVocabulary,
    run_dir: Path,
    origin: dict[str, Any],
) -> str:
    """Return the card as Markdown with the head that hubs read."""
    name = base_name(base_model)
    licence = _licence_of(base)
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {name}"] if _is_of_hub(base_model) else []
    head += [f"license: {licence}"] if licence else []
    head += ["tags:", "- latent-actions", "- lar-lightning", "---", ""]
    sections = [
        f"# {name} with {len(vocabulary)} latent actions\n",
        "Recurring pieces of what the base model writes as an agent are single units here. Each is "
        "an ordinary\nadded token whose text is the piece itself: any engine that reads Hugging "
        "Face checkpoints serves this model\nas it is, and clients send and receive plain text. "
        "`latent_vocabulary.json` lists the pieces.\n",
        _facts(name, vocabulary, run_dir, origin),
        _results(run_dir),
        _checks(origin.get("checks", {})),
        _licence_note(name, licence),
    ]
    return "\n".join(head) + "\n".join(section for section in sections if section)


def base_name(base_model: str) -> str:
    """Return what a base model may be called in public: of a local folder its own name only."""
    return Path(base_model).resolve().name if Path(base_model).is_dir() else base_model


def _is_of_hub(base_model: str) -> bool:
    return not Path(base_model).is_dir() and ":" not in base_model


def _licence_of(base: Path) -> str:
    """Return the licence that the base model's own card names, or nothing."""
    card = base / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    for line in lines[1:] if lines[:1] == ["---"] else ():
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key == "license":
            return value.strip()
    return ""


def _facts(name: str, vocabulary: LatentVocabulary, run_dir: Path, origin: dict[str, Any]) -> str:
    report = vocabulary.provenance.get("report", {})
    held_out = origin.get("checks", {}).get("reencoding", {}).get("held_out", {})
    rows = {
        "base model": name,
        "mined from": _corpus(run_dir, report),
        "latent actions (K)": f"{len(vocabulary):,}",
        "base tokens of a latent": _lengths(vocabulary),
        "rate: generated tokens that fall away, held out": _share(report.get("saved_held_out")),
        "prompt tokens that fall away, held out": _share(held_out.get("prompt", {}).get("saving")),
        "precision": origin.get("dtype", ""),
    }
    return _table(["", ""], [[key, value] for key, value in rows.items() if value])


def _corpus(run_dir: Path, report: dict[str, Any]) -> str:
    files = trajectory_files(run_dir / "trajectories" / "train.jsonl")
    settings = read_settings(files[0]) if files else {}
    benchmark = str(settings.get("benchmark", "")).partition("?")[0]  # options may hold paths
    source = benchmark or ("recordings of other agents" if "recordings" in settings else "")
    size = (
        f"{report['num_tasks']:,} tasks, {report['num_tokens']:,} generated tokens"
        if "num_tasks" in report
        else ""
    )
    return ", ".join(part for part in (source, size) if part)


def _lengths(vocabulary: LatentVocabulary) -> str:
    lengths = [len(segment) for segment in vocabulary.segments]
    if not lengths:
        return ""
    return f"{min(lengths)} to {max(lengths)}, {sum(lengths) / len(lengths):.1f} on average"


def _results(run_dir: Path) -> str:
    """Return the table of `evaluate`, where it was run."""
    path = run_dir / "results.json"
    if not path.exists():
        return ""
    rows = json.loads(path.read_text(encoding="utf-8"))
    cells = [[row["method"], *(_number(row.get(key)) for key in METRICS)] for row in rows]
    return f"## Held-out tasks ({rows[0]['benchmark']}, {rows[0]['num_tasks']} tasks)\n\n" + _table(
        ["method", *METRICS.values()], cells
    )


def _checks(checks: dict[str, Any]) -> str:
    if not checks:
        return ""
    cells = [
        [
            role,
            f"{counts['tokens']:,}",
            f"{counts['units']:,}",
            _share(counts["saving"]),
            _share(counts["equal_share"], places=3),
        ]
        for role, counts in checks["reencoding"]["held_out"].items()
        if counts["tokens"]
    ]
    names = ["text of", "tokens", "units", "saved", "units as by the ids"]
    return (
        f"## Checked when it was written\n\nLoaded from disk: {checks['summary']}.\n\n"
        "Held-out episodes sent back as plain text, through this tokenizer:\n\n"
        + _table(names, cells)
    )


def _licence_note(name: str, licence: str) -> str:
    terms = f"its licence ({licence})" if licence else "its licence"
    return (
        f"## Licence\n\nThe weights derive from {name}: {terms} holds for them. The texts of the "
        "latent actions\nare pieces of the episodes that were mined: see that you may publish "
        "them.\n"
    )


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def _share(value: float | None, places: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{places}f} %"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value if value is not None else "")

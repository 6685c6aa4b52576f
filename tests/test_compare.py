"""What `evaluate` says of a student against its base model."""

import re

from made_up_grid import make_episode, make_request

from lar_lightning.evaluation.compare import markdown_table, result_row
from lar_lightning.evaluation.runner import MethodRun


def run_of(
    method: str, num_solved: int, num_units: int, *, num_tokens: int = 20, is_last: bool = False
) -> MethodRun:
    """Return a run of 20 tasks, of which the first or the last are solved."""
    solved = range(20 - num_solved, 20) if is_last else range(num_solved)
    episodes = tuple(
        make_episode(
            f"t{task:02}",
            is_success=task in solved,
            requests=(make_request(num_units, expanded=num_tokens),),
        )
        for task in range(20)
    )
    return MethodRun(method=method, run=0, wall_clock_seconds=1.0, episodes=episodes)


def test_a_student_is_held_against_its_base_model_task_by_task() -> None:
    vanilla = [run_of("vanilla", 10, 20)]
    row = result_row([run_of("lar", 4, 15)], vanilla, "toy")
    against = row["against_vanilla"]
    assert against["score_difference"] == -0.3
    assert against["mcnemar_p"] == 2 / 2**6  # six tasks were lost and none was won
    assert against["action_tokens_change"] == -0.25
    assert against["action_tokens_change_interval_95"] == [-0.25, -0.25]  # alike in all tasks
    crossed = result_row([run_of("lar", 10, 20, is_last=True)], vanilla, "toy")
    assert crossed["against_vanilla"]["mcnemar_p"] == 1.0  # ten lost, ten won
    assert result_row(vanilla, vanilla, "toy")["against_vanilla"] is None


def test_the_table_ends_with_what_was_lost_and_saved() -> None:
    vanilla, lar = [run_of("vanilla", 10, 20)], [run_of("lar", 4, 12, num_tokens=16)]
    table = markdown_table([result_row(runs, vanilla, "toy") for runs in (vanilla, lar)])
    assert re.fullmatch(
        r"lar against vanilla on the same tasks \(95 % intervals\): score -30\.0 points "
        r"\(-\d\d\.\d to -\d+\.\d\), p = 0\.031 of McNemar's exact test; generated units -40\.0 % "
        r"\(-40\.0 to -40\.0\), from -20\.0 % text and -25\.0 % units per token\.",
        table.splitlines()[-1],
    )

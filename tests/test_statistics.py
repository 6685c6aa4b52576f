import pytest
from hypothesis import given
from hypothesis import strategies as st

from lar_lightning.evaluation.statistics import (
    bootstrap_interval,
    mean_agreement,
    shared_prefix_share,
)


@given(st.text(max_size=20), st.text(max_size=20))
def test_agreement_is_symmetric_and_one_only_for_equal_texts(left: str, right: str) -> None:
    share = shared_prefix_share(left, right)
    assert share == shared_prefix_share(right, left)
    assert 0 <= share <= 1
    assert (share == 1) == (left == right)


def test_a_shorter_text_does_not_agree_fully() -> None:
    assert shared_prefix_share("abcd", "ab") == 0.5
    assert mean_agreement({"a": "xy", "b": "pq"}, {"a": "xy", "b": "pz"}) == 0.75


def test_interval_holds_the_mean_and_shrinks_with_the_number_of_tasks() -> None:
    few, many = [0.0, 1.0] * 5, [0.0, 1.0] * 500
    low, high = bootstrap_interval(few)
    narrow_low, narrow_high = bootstrap_interval(many)
    assert low < 0.5 < high
    assert narrow_high - narrow_low < 0.2 * (high - low)
    # The normal approximation for 1,000 fair coins: 0.5 +- 1.96 * 0.5 / sqrt(1000).
    assert narrow_low == pytest.approx(0.469, abs=0.005)


def test_interval_of_equal_values_has_no_width() -> None:
    assert bootstrap_interval([1.0] * 7) == (1.0, 1.0)

"""What a run takes: memory of each device and time of a step, from numbers alone.

Nothing here imports torch: an estimate is instant, on a login node too. `memory` and `speed` say
term by term what they count; `tests/test_estimates.py` holds them against measured steps.
"""

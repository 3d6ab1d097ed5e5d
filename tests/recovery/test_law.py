"""The rule that ends a training by the law of its curve."""

from apt.recovery.law import enough_tokens
from apt.recovery.record import Training


def test_enough_tokens_gives_a_reason_if_more_tokens_hardly_help():
    def curve(checks, power):
        steps = [100 * k for k in range(1, checks + 1)]
        losses = {0: 4.0} | {s: 3 + 0.4 * (s * 1000 / 1e6) ** -power for s in steps}
        return Training(10_000, 1000, held_back=losses)

    assert enough_tokens(curve(4, 1.0)) is None  # too few measurements
    assert enough_tokens(curve(6, 0.3)) is None  # twice the tokens still help
    reason = enough_tokens(curve(300, 0.9))
    assert reason is not None
    assert "enough tokens" in reason

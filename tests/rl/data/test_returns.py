"""Chunk rewards, discounts and n-step returns against sums written out by hand."""

import numpy as np
import pytest

from trimtab.rl.data.returns import NStepAccumulator, Returns, Transition
from trimtab.rl.envs.chunk import ChunkResult

G = 0.9


def result(rewards, successes, terminated=False, truncated=False):
    return ChunkResult(None, None, np.array(rewards), np.array(successes), terminated, truncated, 0)


def chunk_return(rewards, gamma, per="step", **end):
    """The reward and discount of a chunk with these rewards of the environment's own."""
    chunk = result(rewards, [False] * len(rewards), **end)
    return Returns("env", gamma, per).reward_and_discount(chunk, succeeded=False)


def test_step_rewards():
    chunk = result([0.2, 0.7, 1.0], [False, False, True], terminated=True)
    for gamma in (0.0, 0.1, 0.9):
        sparse, _ = Returns("sparse", gamma).reward_and_discount(chunk, succeeded=True)
        assert sparse == pytest.approx(-1.0 - gamma)
        env, _ = Returns("env", gamma).reward_and_discount(chunk, succeeded=True)
        assert env == pytest.approx(0.2 + 0.7 * gamma + gamma**2)


def test_whole_chunk():
    total, weight = chunk_return([-1.0, -1.0, -1.0, -1.0], G)
    assert total == pytest.approx(-1 - 0.9 - 0.81 - 0.729)
    assert weight == pytest.approx(0.9**4)


def test_short_last_chunk_weighs_gamma_to_the_steps_it_executed():
    total, weight = chunk_return([-1.0, -1.0], G, truncated=True)  # cut by the time limit
    assert (total, weight) == (pytest.approx(-1.9), pytest.approx(0.81))


def test_terminal_chunk_hands_nothing_on():
    total, weight = chunk_return([-1.0, 0.0], G, terminated=True)
    assert (total, weight) == (-1.0, 0.0)


def run_episode(n, chunks, truncated):
    """Feed an episode of (reward, discount) chunks whose features are their index."""
    accumulator, out = NStepAccumulator(n), []
    for t, (reward, discount) in enumerate(chunks):
        ended = t == len(chunks) - 1
        if ended and not truncated:
            discount = 0.0
        chunk = Transition(np.array([t]), np.array([10 + t]), reward, discount, np.array([t + 1]))
        out += accumulator.add(chunk, ended)
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("truncated", [True, False])
def test_n_step_against_explicit_sums(n, truncated):
    chunks = [(-1.0, 0.5), (-2.0, 0.6), (-4.0, 0.7), (-8.0, 0.8)]
    out = run_episode(n, chunks, truncated)
    assert [int(item.features[0]) for item in out] == [0, 1, 2, 3]
    assert [int(item.u[0]) for item in out] == [10, 11, 12, 13]
    discounts = [d for _, d in chunks[:-1]] + [0.8 if truncated else 0.0]
    for start, item in enumerate(out):
        stop = min(start + n, 4)
        total, weight = 0.0, 1.0
        for t in range(start, stop):
            total += weight * chunks[t][0]
            weight *= discounts[t]
        assert item.reward == pytest.approx(total)
        assert item.discount == pytest.approx(weight)
        assert int(item.next_features[0]) == stop


def test_no_transition_crosses_an_episode():
    accumulator = NStepAccumulator(3)
    accumulator.add(Transition(np.array([0]), np.array([0]), -1.0, 0.5, np.array([1])), False)
    ended = accumulator.add(Transition(np.array([1]), np.array([0]), -1.0, 0.0, np.array([2])), True)
    assert len(ended) == 2
    following = Transition(np.array([100]), np.array([0]), -5.0, 0.5, np.array([101]))
    assert accumulator.add(following, False) == []
    assert all(item.next_features[0] <= 2 for item in ended)


def test_value_bounds():
    assert Returns("sparse", 0.99).bounds == (pytest.approx(-100.0), 0.0)
    assert Returns("env", 0.99).bounds is None
    # In units of the larger reward; 0 is possible, for an episode may end.
    assert Returns("env", 0.99, reward_range=(-2.0, 8.0)).bounds == pytest.approx((-25.0, 100.0))
    assert Returns("env", 0.99, reward_range=(4.0, 8.0)).bounds == pytest.approx((0.0, 100.0))
    assert Returns("env", 0.99, reward_range=(-8.0, -4.0)).bounds == pytest.approx((-100.0, 0.0))


@pytest.mark.parametrize("per, size", [("step", 1), ("step", 3), ("chunk", 3)])
def test_no_return_within_the_range_leaves_the_bounds(per, size):
    """The best and the worst for ever; a failure costs no more than the rewards that it misses."""
    for each in (-2.0, 8.0):
        returns, total, weight = Returns("env", 0.9, per, size, reward_range=(-2.0, 8.0)), 0.0, 1.0
        for _ in range(600):
            reward, discount = returns.reward_and_discount(result([each] * size, [False] * size), False)
            total, weight = total + weight * reward, weight * discount
        assert total == pytest.approx(returns.bounds[each > 0])
    failed, discount = returns.reward_and_discount(
        result([4.0] * size, [False] * size, terminated=True), False
    )
    assert (failed, discount) == (pytest.approx(chunk_return(np.full(size, 0.5), 0.9, per)[0]), 0.0)


def test_discount_per_chunk_is_the_references_convention():
    rewards = np.array([-1.0, -1.0, 0.0])
    assert chunk_return(rewards, 0.9, "chunk") == (-2.0, 0.9)
    assert chunk_return(rewards[:1], 0.9, "chunk") == (-1.0, 0.9)  # however short
    assert chunk_return(rewards, 0.9, "chunk", terminated=True) == (-2.0, 0.0)
    # the worst possible: every chunk of 4 steps fails for ever
    worst = sum(-4.0 * 0.9**i for i in range(2000))
    assert Returns("sparse", 0.9, "chunk", 4).bounds == (pytest.approx(worst), 0.0)


def episode(returns, steps, end, n):
    """The transitions of an episode whose last step ends as ``end`` says; features: the step."""
    accumulator, out, size = NStepAccumulator(n), [], returns.chunk_steps
    for start in range(0, steps, size):
        length, last = min(size, steps - start), start + size >= steps
        successes = [False] * (length - 1) + [last and end == "success"]
        chunk = result([0.0] * length, successes, last and end != "limit", last and end == "limit")
        reward, discount = returns.reward_and_discount(chunk, bool(chunk.successes.any()))
        following = np.array([start + size])
        out += accumulator.add(Transition(np.array([start]), np.zeros(1), reward, discount, following), last)
    return out


@pytest.mark.parametrize("bootstraps", [True, False])
@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("per, size", [("step", 1), ("step", 4), ("chunk", 1), ("chunk", 4)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_failing_is_never_worth_more_than_going_on(gamma, per, size, n, bootstraps):
    """At no step more than a time limit or a success at any, whatever the state then is worth."""
    returns = Returns("sparse", gamma, per, size, bootstraps)
    low, high = returns.bounds
    values = {}
    for end in ("failure", "limit", "success"):
        for steps in range(1, 41):
            # From the back: what a state is worth from which the transitions reach on.
            worth = {}
            for tail in (low, 0.5 * low, high):
                for item in reversed(episode(returns, steps, end, n)):
                    following = worth.get(int(item.next_features[0]), tail)
                    worth[int(item.features[0])] = item.reward + item.discount * following
                    assert low - 1e-6 <= item.reward and 0.0 <= item.discount <= 1.0
                values.setdefault((end, steps), []).append(worth[0])
    failed = [max(values["failure", steps]) for steps in range(1, 41)]
    assert failed == pytest.approx([low] * 40)
    for end in ("limit", "success"):
        assert all(min(values[end, steps]) >= low - 1e-6 for steps in range(1, 41)), end
    if gamma == 0.99:  # a success is worth more, the sooner the more
        won = [values["success", steps][0] for steps in range(1, 41)]
        assert won == sorted(won, reverse=True) and won[-1] > 0.5 * low


def test_what_is_no_failure():
    returns = Returns("sparse", G, chunk_steps=4)
    lost = result([0.0, 0.0], [False, False], terminated=True)
    assert returns.reward_and_discount(lost, succeeded=False) == (pytest.approx(-10.0), 0.0)
    # LeRobot counts an episode as a success that has ever reported one, wherever it then ends.
    assert returns.reward_and_discount(lost, succeeded=True) == (-1.9, 0.0)
    first = result([0.0, 0.0, 0.0], [True, False, False], terminated=True)
    assert returns.reward_and_discount(first, succeeded=True) == (pytest.approx(-0.9 - 0.81), 0.0)
    together = result([0.0, 0.0], [False, True], terminated=True)
    assert returns.reward_and_discount(together, succeeded=True) == (-1.0, 0.0)
    limit = result([0.0, 0.0], [False, False], truncated=True)
    assert returns.reward_and_discount(limit, succeeded=False) == (-1.9, pytest.approx(0.81))
    running = result([0.0, 0.0], [False, False])
    assert returns.reward_and_discount(running, succeeded=False) == (-1.9, pytest.approx(0.81))
    either = result([0.0, 0.0], [False, False], terminated=True, truncated=True)
    assert returns.reward_and_discount(either, succeeded=False) == (-1.9, pytest.approx(0.81))
    strict = Returns("sparse", G, chunk_steps=4, bootstrap_at_time_limit=False)
    assert strict.reward_and_discount(limit, succeeded=False) == (-1.9, 0.0)
    assert strict.reward_and_discount(either, succeeded=False) == (pytest.approx(-10.0), 0.0)
    # The paper's count: the rest of the chunk is charged, too.
    assert Returns("sparse", G, "chunk", 4).reward_and_discount(lost, succeeded=False) == (
        pytest.approx(-40.0),
        0.0,
    )


def test_the_environments_own_reward_is_left_alone():
    lost = result([0.5, -3.0], [False, False], terminated=True)
    assert Returns("env", G).reward_and_discount(lost, succeeded=False) == (pytest.approx(0.5 - 2.7), 0.0)
    assert Returns("env", G).bounds is None


@pytest.mark.parametrize("unlearnt", [0.0, -50.0])
def test_q_learning_walks_to_the_goal_and_not_into_the_pit(unlearnt):
    """Pit at -2, goal at 12, start at 0. No step begins in the pit, so its own value is never learnt."""
    pit, goal, returns = -2, 12, Returns("sparse", 0.99)
    draw, q, x = np.random.default_rng(0), np.full((goal - pit + 1, 2), unlearnt), 0
    for _ in range(3000):
        best = np.flatnonzero(q[x - pit] == q[x - pit].max())
        action = draw.integers(2) if draw.random() < 0.3 else draw.choice(best)
        after = x + 2 * action - 1
        won, ended = after == goal, after in (pit, goal)
        reward, discount = returns.reward_and_discount(result([0.0], [won], terminated=ended), won)
        q[x - pit, action] += 0.5 * (reward + discount * q[after - pit].max() - q[x - pit, action])
        x = 0 if ended else after
    assert q[1:-1].argmax(1).tolist() == [1] * (goal - pit - 1)

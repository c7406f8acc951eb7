"""What k samples for each of P problems say about a model, with 95 % intervals.

Pure numpy. Samples of one problem are correlated, and the question is how a figure would change
with *other problems*; so each figure is computed per problem and then averaged, and its interval is
a percentile bootstrap over problems (`RESAMPLES` resamples, fixed seed). Where all problems have
the same value that interval has no width, which is wrong for a share (30 of 30 right is not
certainty): there it is Wilson's score interval of P trials.

Samples that the verifier failed on are neither right nor wrong: they are counted, and left out of
every figure of correctness. A problem with fewer than k scored samples contributes its figure at
that number (a vote over 15 in place of 16; for pass@k a lower bound), so that all figures are of
the same problems; a problem with no scored sample is left out, and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from r1jax.evaluation.selection import expected_best, weighted_vote
from r1jax.files import JsonObject

LEVEL = 0.95
RESAMPLES = 10_000
_Z = 1.959963984540054  # the 97.5 % quantile of the standard normal
_BOOTSTRAP_SEED = 20250122  # any constant; the day the paper appeared
_NO_ANSWER = -1

Floats = NDArray[np.float64]
JsonEstimate: TypeAlias = Mapping[str, float | None]
"""`{"value", "low", "high"}` of an `Estimate`; null where the data cannot say."""
Summary: TypeAlias = Mapping[str, Any]
"""What `summarise` returns: figures by name, as `JsonEstimate`, and counts."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; `low` and `high` are nan where the data cannot say."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """As JSON; nan, which JSON lacks, becomes null."""
        fields = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(x) else float(x) for name, x in fields.items()}


def votes(figures: Mapping[str, object]) -> int:
    """The largest k of a summary's cons@k; 1 where there is none."""
    sizes = [int(name.rsplit("_", 1)[1]) for name in figures if name.startswith("cons_at_")]
    return max(sizes, default=1)


# --- one problem ------------------------------------------------------------------------------


def unbiased_pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, include one of the c right ones.

    1 - C(n-c, k) / C(n, k), as a product so that no binomial overflows (arXiv 2107.03374, eq. 1).
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k with k = {k} of n = {n} samples: k must lie in 1..n")
    if not 0 <= c <= n:
        raise ValueError(f"pass@k with c = {c} right of n = {n} samples: c must lie in 0..n")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def expected_vote(classes: ArrayLike, correct: ArrayLike, k: int) -> float:
    """Expected correctness, in [0, 1], of a majority vote over k of n samples without replacement.

    The class with the most votes wins; classes that tie share the win equally. Samples without
    an answer do not vote, and a draw with no vote at all is wrong. The expectation is exact, not
    sampled. A class with right and wrong samples (two spellings that are equal to the grouping and
    not to the verifier) counts with its share of right ones.

    Args:
      classes: [n] integers, equal for equal answers; negative: no answer.
      correct: [n] booleans.
    """
    labels = np.asarray(classes)
    right = np.asarray(correct, dtype=np.float64)
    n = len(labels)
    if not 1 <= k <= n:
        raise ValueError(f"cons@k with k = {k} of n = {n} samples: k must lie in 1..n")
    answers = np.unique(labels[labels >= 0])
    sizes = np.array([np.sum(labels == answer) for answer in answers], dtype=np.int64)
    shares = np.array([right[labels == answer].mean() for answer in answers], dtype=np.float64)
    if not np.any(shares > 0):
        return 0.0
    if k == n:
        return float(shares[sizes == sizes.max()].mean())

    # Drawing k of n without replacement is drawing each sample independently with probability
    # p = k/n, given that k come out. So class counts are independent binomials, given their sum:
    # every number below is a probability, and nothing overflows whatever n is.
    p = k / n
    unanswered = _binomial(int(np.sum(labels < 0)), p)[: k + 1]
    total = 0.0
    for winner in np.flatnonzero(shares > 0):
        pmf = _binomial(int(sizes[winner]), p)
        rivals = np.delete(sizes, winner)
        for votes in range(1, min(int(sizes[winner]), k) + 1):
            win = _rest_below(rivals, unanswered, p, votes=votes, rest=k - votes)
            total += shares[winner] * pmf[votes] * win
    return float(total / _binomial(n, p)[k])


def _rest_below(
    sizes: NDArray[np.int64], unanswered: Floats, p: float, *, votes: int, rest: int
) -> float:
    """P(rivals and unanswered draw `rest`, no rival above `votes`) x share of a tied win."""
    # joint[t, s]: t rivals so far have exactly `votes`, and s samples are drawn so far.
    joint = np.zeros((rest // votes + 1, rest + 1))
    joint[0, : len(unanswered)] = unanswered[: rest + 1]
    for size in sizes:
        pmf = _binomial(int(size), p)
        after = np.zeros_like(joint)
        for drawn in range(min(int(size), votes - 1, rest) + 1):
            after[:, drawn:] += pmf[drawn] * joint[:, : rest + 1 - drawn]
        if votes <= min(size, rest):
            after[1:, votes:] += pmf[votes] * joint[:-1, : rest + 1 - votes]
        joint = after
    return float(np.sum(joint[:, rest] / (1.0 + np.arange(len(joint)))))


def _binomial(n: int, p: float) -> Floats:
    """[n + 1] probabilities of 0..n successes, for 0 < p < 1."""
    u = np.arange(n + 1)
    log_factorial = np.array([math.lgamma(i + 1.0) for i in range(n + 1)])
    log_choose = log_factorial[n] - log_factorial[u] - log_factorial[n - u]
    return np.exp(log_choose + u * math.log(p) + (n - u) * math.log1p(-p))


# --- intervals --------------------------------------------------------------------------------


def _wilson(share: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share seen in `trials` trials (JASA 22, 1927)."""
    z2 = _Z * _Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = share * (1 - share) / trials + z2 / (4 * trials * trials)
    half = _Z * math.sqrt(spread) / (1 + z2 / trials)
    # At share 0 and 1 one end is the share itself; rounding must not push it past.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mean_over_problems(values: ArrayLike, *, is_share: bool) -> Estimate:
    """The mean of one value per problem, with a bootstrap over problems.

    Args:
      values: [P] finite floats.
      is_share: the values lie in [0, 1]; decides the interval where all values are equal: Wilson's
        for a share; otherwise the value itself, or nan for a single problem.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"an estimate needs one value per problem, got shape {x.shape}")
    if not np.all(np.isfinite(x)):
        raise ValueError(f"values of problems at {np.flatnonzero(~np.isfinite(x))} are not finite")
    mean = float(x.mean())
    if np.all(x == x[0]):
        mean = float(x[0])  # the mean of equal values can be off in the last bit
        if is_share:
            return Estimate(mean, *_wilson(mean, x.size))
        edge = math.nan if x.size == 1 else mean
        return Estimate(mean, edge, edge)
    rng = np.random.Generator(np.random.Philox(_BOOTSTRAP_SEED))
    chunk = max(1, 4_000_000 // x.size)  # bounds memory for large sets
    means = np.concatenate(
        [
            x[rng.integers(0, x.size, (min(chunk, RESAMPLES - start), x.size))].mean(axis=1)
            for start in range(0, RESAMPLES, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high))


# --- all problems -----------------------------------------------------------------------------


def pass_at_k(correct: ArrayLike, k: int, scored: ArrayLike | None = None) -> Estimate:
    """Unbiased pass@k; at k = 1 mean correctness over samples, then over problems (the paper's).

    Args:
      correct: [P, n] booleans.
      scored: [P, n] booleans, False where the verifier failed; default: all scored.
    """
    right, mask = _rows(correct, scored, k)
    values = [
        unbiased_pass_at_k(len(row), int(row.sum()), min(k, len(row)))
        for row in (r[m] for r, m in zip(right, mask, strict=True))
        if len(row)
    ]
    return mean_over_problems(values, is_share=True)


def cons_at_k(
    classes: ArrayLike, correct: ArrayLike, k: int, scored: ArrayLike | None = None
) -> Estimate:
    """Majority vote over k extracted answers; see `expected_vote`.

    Args:
      classes: [P, n] integers, equal within a row for equal answers; negative: no answer.
      k: votes; fewer than n gives the expectation over all subsets.
      correct, scored: as in `pass_at_k`.
    """
    right, mask = _rows(correct, scored, k)
    labels = np.asarray(classes)
    if labels.shape != right.shape:
        raise ValueError(f"classes {labels.shape} and correct {right.shape} differ in shape")
    values = [
        expected_vote(c[m], r[m], min(k, int(m.sum())))
        for c, r, m in zip(labels, right, mask, strict=True)
        if m.any()
    ]
    return mean_over_problems(values, is_share=True)


def _rows(
    correct: ArrayLike, scored: ArrayLike | None, k: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    right = np.asarray(correct, dtype=bool)
    mask = np.ones_like(right) if scored is None else np.asarray(scored, dtype=bool)
    if right.ndim != 2 or mask.shape != right.shape:
        raise ValueError(
            f"correct {right.shape} and scored {mask.shape} must both be [problems, samples]"
        )
    if not 1 <= k <= right.shape[1]:
        raise ValueError(f"k = {k} with {right.shape[1]} samples per problem: must lie in 1..n")
    if not mask.any():
        raise ValueError("no sample was scored: the verifier failed on every one")
    return right, mask


class _Sample(NamedTuple):
    """What the figures need of one stored sample."""

    outcome: str
    answer: str | None  # equal for equal answers
    length: float
    truncated: bool
    parts: Mapping[str, float]
    generated: float | None  # tokens of the search that it is from
    earlier: tuple[str, ...] = ()  # outcomes of the attempts before it


def summarise(
    samples: Iterable[JsonObject],
    *,
    same_answer: Callable[[str], str],
    ks: Sequence[int] | None = None,
    chosen_by: Sequence[str] = (),
) -> JsonObject:
    """All figures of one evaluation, from its stored samples.

    Args:
      samples: rows of `samples.jsonl`: `problem_id`, `sample`, `outcome` (right, wrong,
        unparseable, verifier_failed), `extracted` (text or None), `length` (tokens) and, where
        known, `finish_reason`, `domain`, `parts` (reward name -> value) and, of a search,
        `generated_tokens`. Read once.
      same_answer: text of an answer -> text that is the same for equal answers.
      ks: sizes for pass@k and cons@k; default: 2, 4, 8, ... and the number of samples.
      chosen_by: rewards by which the best of k samples is chosen, and votes are weighted.

    Returns:
      A JSON object: `pass_at_<k>`, `cons_at_<k>`, `mean_length` (tokens; over all samples), each
      `{"value", "low", "high"}`; of searches `generated_tokens`, those of a whole search; `parts`,
      such a figure for each reward, over the samples that have it; `chosen_by`, for each of these
      rewards `best_of_<k>` and, of all samples and where no score is below 0, `weighted_vote`;
      counts `problems`, `samples` (per problem), `outcomes`, `unscored_samples`,
      `unscored_problems`, `unanswered_samples`, `truncated_samples`. Of samples with several
      attempts, whose last one is the sample, `attempts`, see `attempt_figures`. Where the verifier
      failed on every sample, figures of correctness are null; where the reward that judges names
      no answers (`extracted`), votes and `unanswered_samples` are. Where the rows are of several
      domains, `by_domain` has all of this for each of them.

    Raises ValueError: no samples, a sample twice, or problems with different numbers of samples.
    """
    problems: dict[int, dict[int, _Sample]] = {}
    domains: dict[int, str] = {}
    for row in samples:
        problem, index = row["problem_id"], row["sample"]
        group = problems.setdefault(problem, {})
        if index in group:
            raise ValueError(f"problem_id = {problem!r} has sample = {index!r} twice")
        extracted = row["extracted"]
        group[index] = _Sample(
            outcome=str(row["outcome"]),
            answer=None if extracted is None else same_answer(extracted),
            length=float(row["length"]),
            truncated=row.get("finish_reason") in ("length", "truncated"),
            parts=_finite(row.get("parts") or {}),
            generated=row.get("generated_tokens"),
            earlier=tuple(turn["outcome"] for turn in row.get("turns", ()) if "outcome" in turn)[
                :-1
            ],
        )
        domains[problem] = str(row.get("domain") or "")
    if not problems:
        raise ValueError("no samples: nothing was evaluated")
    n = len(next(iter(problems.values())))
    for problem, group in problems.items():
        if len(group) != n:
            raise ValueError(
                f"problem_id = {problem!r} has {len(group)} samples, the first problem has {n}: "
                "every problem needs the same number; was the file cut short?"
            )
    if ks is None:
        ks = sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | {n})

    # Sorted, so that the figures do not depend on the order in which samples were finished.
    ordered = {key: [group[i] for i in sorted(group)] for key, group in sorted(problems.items())}
    summary = _figures(list(ordered.values()), ks, chosen_by)
    names = sorted(set(domains.values()))
    if len(names) > 1:
        summary["by_domain"] = {
            name: _figures(
                [row for key, row in ordered.items() if domains[key] == name], ks, chosen_by
            )
            for name in names
        }
    return summary


def _figures(
    problems: Sequence[Sequence[_Sample]], ks: Sequence[int], chosen_by: Sequence[str]
) -> JsonObject:
    """The figures and counts of some problems, each with the same number of samples."""
    correct = np.array([[sample.outcome == "right" for sample in row] for row in problems])
    scored = np.array([[sample.outcome != "verifier_failed" for sample in row] for row in problems])
    classes = np.array([_classes([sample.answer for sample in row]) for row in problems])
    lengths = np.array([[sample.length for sample in row] for row in problems])
    votes_of = (classes, correct, scored)
    some, nothing = bool(scored.any()), Estimate(math.nan, math.nan, math.nan)
    figures: dict[str, Estimate] = {}
    for k in dict.fromkeys((1, *ks)):
        figures[f"pass_at_{k}"] = pass_at_k(correct, k, scored) if some else nothing
    # A reward that gives a number judges a completion, and names no answer in it to vote with.
    votes = some and (bool((classes >= 0).any()) or not _judged_without_answer(problems))
    for k in ks:
        figures[f"cons_at_{k}"] = cons_at_k(classes, correct, k, scored) if votes else nothing
    figures["mean_length"] = mean_over_problems(lengths.mean(axis=1), is_share=False)
    generated = [[s.generated for s in row if s.generated is not None] for row in problems]
    if all(generated):
        means = [math.fsum(row) / len(row) for row in generated]
        figures["generated_tokens"] = mean_over_problems(means, is_share=False)
    parts = {name: figure.to_json() for name, figure in _mean_parts(problems).items()}
    outcomes = Counter(sample.outcome for row in problems for sample in row)
    chosen = {
        name: _chosen_by([[s.parts.get(name, math.nan) for s in r] for r in problems], votes_of, ks)
        for name in chosen_by
        if some
    }
    if not votes:
        for each in chosen.values():
            each.pop("weighted_vote", None)
    attempts = attempt_figures(
        [[(*sample.earlier, sample.outcome) for sample in row] for row in problems]
    )
    return {name: figure.to_json() for name, figure in figures.items()} | {
        **({"parts": parts} if parts else {}),
        **({"chosen_by": chosen} if chosen else {}),
        **({"attempts": attempts} if attempts else {}),
        "problems": len(problems),
        "samples": correct.shape[1],
        "outcomes": dict(sorted(outcomes.items())),
        "unscored_samples": int(np.sum(~scored)),
        "unscored_problems": int(np.sum(~scored.any(axis=1))),
        "unanswered_samples": int(np.sum((classes < 0) & scored)) if votes or not some else None,
        "truncated_samples": sum(sample.truncated for row in problems for sample in row),
    }


def attempt_figures(problems: Sequence[Sequence[Sequence[str]]]) -> JsonObject:
    """Self-correction, of the outcomes of each sample's attempts; {} where there is one attempt.

    Args:
      problems: for each the samples, each with the outcomes of its attempts.

    Returns:
      `right_1`, `right_2`, ..., the accuracy of each attempt; `difference`, of the last and the
      first; and the shares of samples `mended` (not right at first, right at last) and `spoilt`
      (the other way round), each as an estimate over problems (the metrics of arXiv 2409.12917).
      Samples with an attempt on which the verifier failed are left out.
    """
    if max(len(outcomes) for row in problems for outcomes in row) == 1:
        return {}
    rows = [
        np.array([[o == "right" for o in each] for each in row if "verifier_failed" not in each])
        for row in problems
    ]
    rows = [row.astype(float) for row in rows if len(row)]
    if not rows:
        return {}

    def over(values: Sequence[Floats], *, is_share: bool = True) -> JsonEstimate:
        means = [float(each.mean()) for each in values]
        return mean_over_problems(means, is_share=is_share).to_json()

    return {
        **{f"right_{k + 1}": over([r[:, k] for r in rows]) for k in range(rows[0].shape[1])},
        "difference": over([row[:, -1] - row[:, 0] for row in rows], is_share=False),
        "mended": over([row[:, -1] * (1 - row[:, 0]) for row in rows]),
        "spoilt": over([row[:, 0] * (1 - row[:, -1]) for row in rows]),
    }


def _judged_without_answer(problems: Sequence[Sequence[_Sample]]) -> bool:
    """Whether a sample is right or wrong by a reward that names no answer."""
    judged = ("right", "wrong")
    return any(each.outcome in judged and each.answer is None for row in problems for each in row)


def _chosen_by(
    scores: Sequence[Sequence[float]],
    votes_of: tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]],
    ks: Sequence[int],
) -> JsonObject:
    """The figures of a reward that chooses: the best of k samples, and votes of all by weight.

    Args:
      scores: [P, n], nan where a sample has none. votes_of: `classes`, `correct` and `scored`.
    """
    rows = [
        (np.asarray(values)[mask], answers[mask], right[mask])
        for values, answers, right, mask in zip(scores, *votes_of, strict=True)
        if mask.any()
    ]
    figures = {
        f"best_of_{k}": [expected_best(v, r, min(k, len(v))) for v, _, r in rows] for k in ks
    }
    if all((values[~np.isnan(values)] >= 0).all() for values, _, _ in rows):
        figures["weighted_vote"] = [weighted_vote(c, r, v) for v, c, r in rows]
    return {
        name: mean_over_problems(values, is_share=True).to_json()
        for name, values in figures.items()
    }


def _mean_parts(problems: Sequence[Sequence[_Sample]]) -> dict[str, Estimate]:
    """Each reward's mean over the problems that have it, by name.

    A reward whose values all lie in [0, 1] is taken for a share; most rule rewards are one.
    """
    means = {}
    for name in sorted({name for row in problems for sample in row for name in sample.parts}):
        rewards = [[s.parts[name] for s in row if name in s.parts] for row in problems]
        is_share = all(0 <= value <= 1 for values in rewards for value in values)
        per_problem = [math.fsum(values) / len(values) for values in rewards if values]
        means[name] = mean_over_problems(per_problem, is_share=is_share)
    return means


def _finite(parts: Mapping[str, object]) -> dict[str, float]:
    """Without the rewards that failed, which are stored as null or as "nan"."""
    return {
        name: float(value)
        for name, value in parts.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _classes(keys: Sequence[str | None]) -> list[int]:
    """Numbers each distinct answer of a problem in order of appearance; no answer is -1."""
    seen: dict[str, int] = {}
    return [_NO_ANSWER if key is None else seen.setdefault(key, len(seen)) for key in keys]

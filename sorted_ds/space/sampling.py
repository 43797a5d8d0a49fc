"""Which sub-networks a step trains: pure in (seed, step), the same for any number of ranks.

In: the sub-networks in ascending order of cost. Out: the samples of any step, and how often each will come in a run.
Source of `sandwich`: Universally Slimmable Networks, arXiv 1903.05134, section 3.2.
"""

from collections.abc import Callable, Sequence

from sorted_ds.base.errors import UserError
from sorted_ds.base.shuffle import Shuffle, keyed_number
from sorted_ds.space import SubNet


class Sampler:
    """`schedule.sample(step)` gives the step's sub-networks, one for each sample."""

    def __init__(self, ascending: Sequence[SubNet], samples: int, strategy: str, seed: int):
        """`ascending` in cost, the smallest first and the full one last.

        Raises: UserError for a strategy that needs more samples.
        """
        self.subnets, self.samples, self.strategy, self.seed = tuple(ascending), samples, strategy, seed
        if samples < FEWEST_SAMPLES[strategy]:
            raise UserError(
                f"sampling.subnets_per_step = {samples}, but {strategy} needs at least {FEWEST_SAMPLES[strategy]}. Raise it."
            )

    def sample(self, step: int) -> list[SubNet]:
        """The sub-networks of one optimizer step, ascending in cost."""
        return STRATEGIES[self.strategy](self, step)

    def expected_visits(self, num_steps: int) -> dict[SubNet, float]:
        """How many samples each sub-network gets in `num_steps`, on average over seeds."""
        fixed = {"sandwich": (self.subnets[-1], self.subnets[0]), "full_plus": (self.subnets[-1],)}
        always = fixed.get(self.strategy, ())
        shared = frozenset(_others(self.subnets) if self.strategy == "full_plus" else self.subnets)
        each = num_steps * (self.samples - len(always)) / len(shared)
        visits = {subnet: each if subnet in shared else 0.0 for subnet in self.subnets}
        for subnet in always:
            visits[subnet] += num_steps
        return visits

    def _random(self, step: int, num: int) -> list[SubNet]:
        """Independent samples from the whole space."""
        positions = [keyed_number(len(self.subnets), self.seed, "draw", step, number) for number in range(num)]
        return [self.subnets[position] for position in sorted(positions)]


def _uniform(schedule: Sampler, step: int) -> list[SubNet]:
    return schedule._random(step, sampling.subnets_per_step)


def _stratified(schedule: Sampler, step: int) -> list[SubNet]:
    return strata(schedule.subnets, sampling.subnets_per_step, schedule.seed, step)


def _sandwich(schedule: Sampler, step: int) -> list[SubNet]:
    return [schedule.subnets[0], *schedule._random(step, sampling.subnets_per_step - 2), schedule.subnets[-1]]


def _full_plus(schedule: Sampler, step: int) -> list[SubNet]:
    return [*strata(_others(schedule.subnets), sampling.subnets_per_step - 1, schedule.seed, step), schedule.subnets[-1]]


def _others(subnets: Sequence[SubNet]) -> Sequence[SubNet]:
    """All but the full one, where there are others."""
    return subnets[:-1] or subnets


def strata(subnets: Sequence[SubNet], samples: int, seed: int, step: int) -> list[SubNet]:
    """One from each of `samples` cost quantiles. In every `len(subnets)` steps each comes exactly `samples` times.

    Cut the n sub-networks into `samples` equal pieces each: a quantile is a run of n neighbouring pieces, and in n steps
    it hands out each of them once, in an order of its own.
    """
    cycle, position = divmod(step, len(subnets))
    size = len(subnets)
    pieces = [stratum * size + Shuffle(size, (seed, "stratum", cycle, stratum))(position) for stratum in range(samples)]
    return [subnets[piece // samples] for piece in pieces]


STRATEGIES: dict[str, Callable[[Sampler, int], list[SubNet]]] = {
    "uniform": _uniform,
    "stratified": _stratified,
    "sandwich": _sandwich,
    "full_plus": _full_plus,
}
FEWEST_SAMPLES = {"uniform": 1, "stratified": 1, "sandwich": 2, "full_plus": 2}

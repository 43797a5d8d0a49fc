"""Chooses the passes of a step, as a pure function of (seed, step) that is the same for any number of ranks.

In: the sub-networks in ascending order of cost. Out: the passes of any step, each with its share of the step's rows,
and the expected number of visits of each sub-network. A step's rows are cut into equal *shares*. Most strategies sample
one sub-network for each share; others run several passes on the same share, or a teacher before its student.
The key strings of the random stream ("draw", "stratum") must never change: with other strings, a resumed run would
sample other sub-networks.
Source of `sandwich`: Universally Slimmable Networks, arXiv 1903.05134, section 3.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sorted_ds.base.errors import UserError
from sorted_ds.base.shuffle import Shuffle, keyed_number
from sorted_ds.space.axes import SubNet

Mode = Literal["train", "teach", "evaluate"]
"""`train` has a gradient. `teach` has none and runs before the passes that learn from it. `evaluate` has none."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass executes. Everything that depends on it, like ZeRO-3's traces, uses it as a key."""

    subnet: SubNet
    mode: Mode = "train"

    @property
    def has_gradient(self) -> bool:
        return self.mode == "train"


@dataclass(frozen=True)
class Planned:
    """One pass of a step, with the share of the step's rows that it runs on."""

    run: Pass
    share: int
    """The number of the share, counted from 0."""

    def __str__(self) -> str:
        return f"{self.run.subnet}/{self.run.mode}/{self.share}"


@dataclass(frozen=True)
class Strategy:
    """A way to choose a step's passes."""

    plan: Callable[["Sampler", int], list[Planned]]
    """Returns the passes of a step in the order in which they run. Passes on the same share follow each other."""
    visits: Callable[["Sampler"], dict[SubNet, float]]
    """Returns how often a step trains each sub-network, on average over seeds. A missing one is never trained."""
    fewest: int = 1
    """The smallest `subnets_per_step` that the strategy works with."""
    shares: Callable[[int], int] = lambda subnets_per_step: subnets_per_step
    """Returns the number of equal shares of a step's rows for `subnets_per_step`."""


class Sampler:
    """Gives the passes of any step of a run."""

    def __init__(self, ascending: Sequence[SubNet], subnets_per_step: int, strategy: str, seed: int):
        """Takes the sub-networks in ascending order of cost, so the full network is the last one.

        Raises: UserError for an unknown strategy, or one that needs more sub-networks in a step.
        """
        self.subnets, self.subnets_per_step, self.seed = tuple(ascending), subnets_per_step, seed
        self._strategy = strategy_of(strategy)
        if subnets_per_step < self._strategy.fewest:
            raise UserError(
                f"sampling.subnets_per_step = {subnets_per_step}, but {strategy} needs at least "
                f"{self._strategy.fewest}. Raise it."
            )

    @property
    def num_shares(self) -> int:
        """The number of equal shares of a step's rows."""
        return self._strategy.shares(self.subnets_per_step)

    def plan(self, step: int) -> list[Planned]:
        """Returns the passes of one optimizer step in the order in which they run."""
        plan = self._strategy.plan(self, step)
        assert {planned.share for planned in plan} == set(range(self.num_shares)), "each share has a pass"
        return plan

    def sample(self, step: int) -> list[SubNet]:
        """Returns the sub-networks that one optimizer step trains, in the order in which they run."""
        return [planned.run.subnet for planned in self.plan(step) if planned.run.has_gradient]

    def expected_visits(self, num_steps: int) -> dict[SubNet, float]:
        """Returns how often each sub-network is trained in `num_steps` steps, on average over seeds."""
        visits = self._strategy.visits(self)
        return {subnet: num_steps * visits.get(subnet, 0.0) for subnet in self.subnets}

    @property
    def full(self) -> SubNet:
        return self.subnets[-1]

    @property
    def others(self) -> Sequence[SubNet]:
        """All sub-networks except the full one. A space of one sub-network gives that one."""
        return self.subnets[:-1] or self.subnets

    def at_random(self, step: int, num: int) -> list[SubNet]:
        """Returns `num` independently sampled sub-networks, in ascending order of cost."""
        positions = [keyed_number(len(self.subnets), self.seed, "draw", step, number) for number in range(num)]
        return [self.subnets[position] for position in sorted(positions)]


def one_pass_a_share(subnets: Sequence[SubNet]) -> list[Planned]:
    """Returns one training pass for each sub-network, each on a share of its own."""
    return [Planned(Pass(subnet), share) for share, subnet in enumerate(subnets)]


def strata(subnets: Sequence[SubNet], num: int, seed: int, step: int) -> list[SubNet]:
    """Returns one sub-network from each of `num` cost quantiles.

    In every n = `len(subnets)` steps, each sub-network is returned exactly `num` times. To this end each of the n
    sub-networks is cut into `num` equal pieces, and a quantile consists of n neighbouring pieces. In n steps a quantile
    returns each of its pieces once, in a shuffled order of its own.
    """
    cycle, position = divmod(step, len(subnets))
    size = len(subnets)
    pieces = [stratum * size + Shuffle(size, (seed, "stratum", cycle, stratum))(position) for stratum in range(num)]
    return [subnets[piece // num] for piece in pieces]


def equal_visits(subnets: Sequence[SubNet], num: float) -> dict[SubNet, float]:
    """Returns `num` visits a step, divided equally among the sub-networks."""
    return dict.fromkeys(subnets, num / len(subnets))


def add_visits(*visits: dict[SubNet, float]) -> dict[SubNet, float]:
    """Returns the sum of several dictionaries of visits."""
    return {subnet: sum(part.get(subnet, 0.0) for part in visits) for subnet in {s for part in visits for s in part}}


def _uniform(sampler: Sampler, step: int) -> list[Planned]:
    return one_pass_a_share(sampler.at_random(step, sampler.subnets_per_step))


def _stratified(sampler: Sampler, step: int) -> list[Planned]:
    return one_pass_a_share(strata(sampler.subnets, sampler.subnets_per_step, sampler.seed, step))


def _sandwich(sampler: Sampler, step: int) -> list[Planned]:
    middle = sampler.at_random(step, sampler.subnets_per_step - 2)
    return one_pass_a_share([sampler.subnets[0], *middle, sampler.full])


def _full_plus(sampler: Sampler, step: int) -> list[Planned]:
    return one_pass_a_share([*strata(sampler.others, sampler.subnets_per_step - 1, sampler.seed, step), sampler.full])


def _visits_of_all(sampler: Sampler) -> dict[SubNet, float]:
    return equal_visits(sampler.subnets, sampler.subnets_per_step)


def _sandwich_visits(sampler: Sampler) -> dict[SubNet, float]:
    ends = ({sampler.subnets[0]: 1.0}, {sampler.full: 1.0})
    return add_visits(equal_visits(sampler.subnets, sampler.subnets_per_step - 2), *ends)


def _full_plus_visits(sampler: Sampler) -> dict[SubNet, float]:
    return add_visits(equal_visits(sampler.others, sampler.subnets_per_step - 1), {sampler.full: 1.0})


STRATEGIES: dict[str, Strategy] = {
    "uniform": Strategy(_uniform, _visits_of_all),
    "stratified": Strategy(_stratified, _visits_of_all),
    "sandwich": Strategy(_sandwich, _sandwich_visits, fewest=2),
    "full_plus": Strategy(_full_plus, _full_plus_visits, fewest=2),
}


def strategy_of(name: str) -> Strategy:
    """Returns the strategy with this name. Raises: UserError for an unknown name; the message lists the known ones."""
    if name not in STRATEGIES:
        raise UserError(f"sampling.strategy = {name!r} is not known. Known: {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]

"""Which passes a step runs: pure in (seed, step), the same for any number of ranks.

In: the sub-networks in ascending order of cost. Out: the passes of any step, each with its share of the step's rows,
and how often each sub-network is trained in a run. A step's rows are cut into equal *shares*. Most strategies sample
one sub-network for each share; others run several passes on the same share, or a teacher before its student.
The key strings of the random stream ("draw", "stratum") are part of every run's identity: they stay as they are.
Source of `sandwich`: Universally Slimmable Networks, arXiv 1903.05134, section 3.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sorted_ds.base.errors import UserError
from sorted_ds.base.shuffle import Shuffle, keyed_number
from sorted_ds.space.axes import SubNet

Mode = Literal["train", "teach", "evaluate"]
"""`train`: with a gradient. `teach`: without one, before the passes that learn from it. `evaluate`: without one."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass executes. It keys whatever depends on what runs, like ZeRO-3's traces."""

    subnet: SubNet
    mode: Mode = "train"

    @property
    def has_gradient(self) -> bool:
        return self.mode == "train"


@dataclass(frozen=True)
class Planned:
    """One pass of a step."""

    run: Pass
    share: int
    """The number of the share of the step's rows that the pass runs on."""

    def __str__(self) -> str:
        return f"{self.run.subnet}/{self.run.mode}/{self.share}"


@dataclass(frozen=True)
class Strategy:
    """How a step's passes are chosen."""

    plan: Callable[["Sampler", int], list[Planned]]
    """The passes of a step, in the order in which they run. Passes with the same share follow each other."""
    visits: Callable[["Sampler"], dict[SubNet, float]]
    """How often a step trains each sub-network, on average over seeds. Those that are left out are never trained."""
    fewest: int = 1
    """The smallest `subnets_per_step`."""
    shares: Callable[[int], int] = lambda subnets_per_step: subnets_per_step
    """Into how many equal shares a step's rows are cut, by `subnets_per_step`."""


class Sampler:
    """`sampler.plan(step)` gives the passes of a step."""

    def __init__(self, ascending: Sequence[SubNet], subnets_per_step: int, strategy: str, seed: int):
        """`ascending` in cost, the smallest first and the full one last.

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
        """Into how many equal shares a step's rows are cut."""
        return self._strategy.shares(self.subnets_per_step)

    def plan(self, step: int) -> list[Planned]:
        """The passes of one optimizer step, in the order in which they run."""
        return self._strategy.plan(self, step)

    def sample(self, step: int) -> list[SubNet]:
        """The sub-networks that one optimizer step trains, in the order in which they run."""
        return [planned.run.subnet for planned in self.plan(step) if planned.run.has_gradient]

    def expected_visits(self, num_steps: int) -> dict[SubNet, float]:
        """How often each sub-network is trained in `num_steps`, on average over seeds."""
        visits = self._strategy.visits(self)
        return {subnet: num_steps * visits.get(subnet, 0.0) for subnet in self.subnets}

    @property
    def full(self) -> SubNet:
        return self.subnets[-1]

    @property
    def others(self) -> Sequence[SubNet]:
        """All sub-networks but the full one, where there are others."""
        return self.subnets[:-1] or self.subnets

    def at_random(self, step: int, num: int) -> list[SubNet]:
        """Independent samples from the whole space, ascending in cost."""
        positions = [keyed_number(len(self.subnets), self.seed, "draw", step, number) for number in range(num)]
        return [self.subnets[position] for position in sorted(positions)]


def one_pass_a_share(subnets: Sequence[SubNet]) -> list[Planned]:
    """Trains each sub-network on a share of its own."""
    return [Planned(Pass(subnet), share) for share, subnet in enumerate(subnets)]


def strata(subnets: Sequence[SubNet], num: int, seed: int, step: int) -> list[SubNet]:
    """One from each of `num` cost quantiles. In every `len(subnets)` steps each comes exactly `num` times.

    Cut the n sub-networks into `num` equal pieces each: a quantile is a run of n neighbouring pieces, and in n steps
    it hands out each of them once, in an order of its own.
    """
    cycle, position = divmod(step, len(subnets))
    size = len(subnets)
    pieces = [stratum * size + Shuffle(size, (seed, "stratum", cycle, stratum))(position) for stratum in range(num)]
    return [subnets[piece // num] for piece in pieces]


def equal_visits(subnets: Sequence[SubNet], num: float) -> dict[SubNet, float]:
    """`num` visits a step, shared out equally."""
    return dict.fromkeys(subnets, num / len(subnets))


def add_visits(*visits: dict[SubNet, float]) -> dict[SubNet, float]:
    """The sum of visits that different parts of a strategy give."""
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
    """Raises: UserError for an unknown strategy; it names the known ones."""
    if name not in STRATEGIES:
        raise UserError(f"sampling.strategy = {name!r} is not known. Known: {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]

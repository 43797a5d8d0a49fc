"""Chooses the sub-networks of a step, as a pure function of (seed, step) that is the same for any number of ranks.

In: the sub-networks in ascending order of cost, and policies, which are data. Out: the passes of any step, each with
its share of the step's rows, and the expected number of visits of each sub-network. A step's rows are cut into equal
*shares*. Most policies sample one sub-network for each share; others run several on the same share.
The key strings of the random stream ("draw", "stratum") must never change: with other strings, a resumed run would
sample other sub-networks.
Source of `sandwich`: Universally Slimmable Networks, arXiv 1903.05134, section 3.2.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from sorted_ds.base.errors import UserError
from sorted_ds.base.shuffle import Shuffle, keyed_number
from sorted_ds.space.axes import SubNet
from sorted_ds.space.passes import FINE, LossPasses, Pass, Planned
from sorted_ds.space.space import SubNetSpace


@dataclass(frozen=True)
class Policy:
    """How the steps of a phase choose their sub-networks."""

    subnets_per_step: int = 4
    strategy: str = "stratified"
    full_shares: int = 1
    """How many of a step's sub-networks are the full one, for a strategy that always trains it."""
    subnets_per_share: int = 1
    """How many of a step's sub-networks run on the same rows."""
    hold_steps: int = 1
    """For how many steps the sampled sub-networks stay the same."""
    weights: Mapping[SubNet, float] = field(default_factory=dict)
    """How often each sub-network is sampled, relative to the others. Sub-networks that are not named are never
    sampled. Without any weights all are sampled equally often."""


@dataclass(frozen=True)
class Strategy:
    """A way to choose a step's passes."""

    plan: Callable[["PolicySampler", int], list[Planned]]
    """Returns the passes of a step in the order in which they run. Passes on the same share follow each other."""
    visits: Callable[["PolicySampler"], dict[SubNet, float]]
    """Returns how often a step trains each sub-network, on average over seeds. A missing one is never trained."""
    fewest: Callable[[int], int] = lambda full_shares: 1
    """Returns the smallest `subnets_per_step` that the strategy works with."""
    shares: Callable[[Policy], int] = lambda policy: policy.subnets_per_step // policy.subnets_per_share
    """Returns the number of equal shares of a step's rows."""


class PolicySampler:
    """Gives the passes of the steps of one policy."""

    def __init__(self, ascending: Sequence[SubNet], policy: Policy, seed: int):
        """Raises: UserError for a policy that cannot be followed."""
        self.subnets, self.policy, self.seed = tuple(ascending), policy, seed
        self.strategy = strategy_of(policy.strategy)
        num, fewest = policy.subnets_per_step, self.strategy.fewest(policy.full_shares)
        if num < fewest:
            raise UserError(
                f"sampling.subnets_per_step = {num}, but {policy.strategy} needs at least {fewest}. Raise it."
            )
        if num % policy.subnets_per_share:
            raise UserError(
                f"sampling.subnets_per_step = {num} cannot be divided by sampling.subnets_per_share = "
                f"{policy.subnets_per_share}. Change one of them."
            )
        self.visits()  # raises for a policy that samples nothing

    @property
    def subnets_per_step(self) -> int:
        return self.policy.subnets_per_step

    @property
    def num_shares(self) -> int:
        """The number of equal shares of a step's rows."""
        return self.strategy.shares(self.policy)

    @property
    def full(self) -> SubNet:
        return self.subnets[-1]

    @property
    def others(self) -> Sequence[SubNet]:
        """All sub-networks except the full one. A space of one sub-network gives that one."""
        return self.subnets[:-1] or self.subnets

    def plan(self, step: int) -> list[Planned]:
        """Returns the passes of one optimizer step in the order in which they run."""
        return self.strategy.plan(self, step // self.policy.hold_steps)

    def visits(self) -> dict[SubNet, float]:
        """Returns how often a step trains each sub-network, on average over seeds."""
        return self.strategy.visits(self)

    def pool(self, subnets: Sequence[SubNet]) -> tuple[list[SubNet], list[float]]:
        """Returns those of the sub-networks that are sampled, and how often relative to each other.

        Raises: UserError if none is left.
        """
        weights = self.policy.weights
        sampled = [subnet for subnet in subnets if not weights or weights.get(subnet)]
        if not sampled:
            raise UserError("sampling.weights and sampling.ladder leave no sub-network to sample. Name one more.")
        return sampled, [weights[subnet] if weights else 1.0 for subnet in sampled]

    def at_random(self, step: int, num: int) -> list[SubNet]:
        """Returns `num` independently sampled sub-networks, in ascending order of cost."""
        subnets, weights = self.pool(self.subnets)
        if are_equal(weights):
            positions = [keyed_number(len(subnets), self.seed, "draw", step, number) for number in range(num)]
        else:
            numbers = [keyed_number(FINE, self.seed, "weighted", step, number) / FINE for number in range(num)]
            positions = at_quantiles(weights, numbers)
        return [subnets[position] for position in sorted(positions)]

    def stratified(self, subnets: Sequence[SubNet], step: int, num: int) -> list[SubNet]:
        """Returns one sub-network from each of `num` quantiles of cost, in ascending order of cost."""
        pool, weights = self.pool(subnets)
        return strata(pool, num, self.seed, step, () if are_equal(weights) else weights)

    def dealt(self, ascending: Sequence[SubNet]) -> list[Planned]:
        """Returns a training pass for each sub-network, dealt to the shares of the step's rows.

        If several run on one share, the larger ones are dealt first and run first.
        """
        if self.policy.subnets_per_share == 1:
            return one_pass_a_share(ascending)
        passes = [Planned(Pass(s), number % self.num_shares) for number, s in enumerate(reversed(ascending))]
        return sorted(passes, key=lambda planned: planned.share)


class Sampler:
    """Gives the passes of any step of a run."""

    def __init__(
        self,
        ascending: Sequence[SubNet],
        policy: Policy,
        seed: int,
        phases: Mapping[int, Policy] | None = None,
        loss: LossPasses | None = None,
        space: SubNetSpace | None = None,
    ):
        """Takes the sub-networks in ascending order of cost, so the full network is the last one.

        `phases`: the policies that replace the first one, by the step from which they hold. `loss`: the passes that the
        loss needs, in this `space`.

        Raises: UserError for an unknown strategy, or one that needs more sub-networks in a step.
        """
        self.subnets, self.seed = tuple(ascending), seed
        starts = sorted((phases or {}).items())
        self._starts = [0, *(step for step, _ in starts)]
        self._phases = [PolicySampler(ascending, each, seed) for each in (policy, *(later for _, later in starts))]
        self._loss, self._space = loss or LossPasses(), space or SubNetSpace(ascending)

    def at(self, step: int) -> PolicySampler:
        """Returns the sampler of the phase that a step belongs to."""
        return self._phases[bisect_right(self._starts, step) - 1]

    @property
    def phases(self) -> Sequence[PolicySampler]:
        """The samplers of all phases in their order."""
        return tuple(self._phases)

    def num_shares(self, step: int) -> int:
        """Returns the number of equal shares of a step's rows."""
        return self.at(step).num_shares

    def plan(self, step: int) -> list[Planned]:
        """Returns the passes of one optimizer step in the order in which they run."""
        sampler = self.at(step)
        plan = self._loss.applied(sampler.plan(step), self._space, self.seed, step)
        assert {planned.share for planned in plan} == set(range(sampler.num_shares)), "each share has a pass"
        return plan

    def sample(self, step: int) -> list[SubNet]:
        """Returns the sub-networks that one optimizer step trains, in the order in which they run."""
        return [planned.pass_.subnet for planned in self.plan(step) if planned.pass_.has_gradient]

    def expected_visits(
        self,
        num_steps: int,
        skipped: Collection[int] = (),
        of_visit: Callable[[PolicySampler], float] = lambda sampler: 1.0,
    ) -> dict[SubNet, float]:
        """Returns how often each sub-network is trained in `num_steps` steps, on average over seeds.

        The steps that are `skipped` are not trained. `of_visit`: how much a visit counts in a phase, like its rows.
        """
        stops = [*(min(start, num_steps) for start in self._starts), num_steps]
        total = dict.fromkeys(self.subnets, 0.0)
        for (start, stop), sampler in zip(pairwise(stops), self._phases, strict=True):
            steps = stop - start - sum(start <= step < stop for step in set(skipped))
            for subnet, visits in sampler.visits().items():
                total[subnet] += steps * visits * of_visit(sampler)
        return total

    @property
    def full(self) -> SubNet:
        return self.subnets[-1]


def one_pass_a_share(subnets: Sequence[SubNet]) -> list[Planned]:
    """Returns one training pass for each sub-network, each on a share of its own."""
    return [Planned(Pass(subnet), share) for share, subnet in enumerate(subnets)]


def are_equal(weights: Sequence[float]) -> bool:
    return len(set(weights)) == 1


def at_quantiles(weights: Sequence[float], quantiles: Sequence[float]) -> list[int]:
    """Returns the position at each quantile, in [0, 1), of a distribution with these weights."""
    edges = list(accumulate(weights))
    return [min(bisect_right(edges, quantile * edges[-1]), len(edges) - 1) for quantile in quantiles]


def strata(subnets: Sequence[SubNet], num: int, seed: int, step: int, weights: Sequence[float] = ()) -> list[SubNet]:
    """Returns one sub-network from each of `num` quantiles of cost.

    In every n = `len(subnets)` steps, each sub-network is returned exactly `num` times. To this end each of the n
    sub-networks is cut into `num` equal pieces, and a quantile consists of n neighbouring pieces. In n steps a quantile
    returns each of its pieces once, in a shuffled order of its own. With `weights`, the pieces of the sub-networks have
    other sizes, and a point in each of n equal parts of a quantile is returned once, so the numbers are exact on
    average.
    """
    cycle, position = divmod(step, len(subnets))
    size = len(subnets)
    pieces = [stratum * size + Shuffle(size, (seed, "stratum", cycle, stratum))(position) for stratum in range(num)]
    if not weights:
        return [subnets[piece // num] for piece in pieces]
    points = (keyed_number(FINE, seed, "point", step, stratum) / FINE for stratum in range(num))
    quantiles = [(piece + point) / (num * size) for piece, point in zip(pieces, points, strict=True)]
    return [subnets[position] for position in at_quantiles(weights, quantiles)]


def shared_visits(pool: tuple[Sequence[SubNet], Sequence[float]], num: float) -> dict[SubNet, float]:
    """Returns `num` visits a step, divided among the sub-networks of a pool by their weights."""
    subnets, weights = pool
    return {subnet: num * weight / sum(weights) for subnet, weight in zip(subnets, weights, strict=True)}


def add_visits(*visits: dict[SubNet, float]) -> dict[SubNet, float]:
    """Returns the sum of several dictionaries of visits."""
    return {subnet: sum(part.get(subnet, 0.0) for part in visits) for subnet in {s for part in visits for s in part}}


def _uniform(sampler: PolicySampler, step: int) -> list[Planned]:
    return sampler.dealt(sampler.at_random(step, sampler.subnets_per_step))


def _stratified(sampler: PolicySampler, step: int) -> list[Planned]:
    return sampler.dealt(sampler.stratified(sampler.subnets, step, sampler.subnets_per_step))


def _sandwich(sampler: PolicySampler, step: int) -> list[Planned]:
    full = [sampler.full] * sampler.policy.full_shares
    middle = sampler.at_random(step, sampler.subnets_per_step - 1 - len(full))
    return sampler.dealt([_smallest(sampler), *middle, *full])


def _full_plus(sampler: PolicySampler, step: int) -> list[Planned]:
    full = [sampler.full] * sampler.policy.full_shares
    others = sampler.subnets_per_step - len(full)
    return sampler.dealt([*sampler.stratified(sampler.others, step, others), *full])


def _full(sampler: PolicySampler, step: int) -> list[Planned]:
    return sampler.dealt([sampler.full] * sampler.subnets_per_step)


def _smallest(sampler: PolicySampler) -> SubNet:
    return sampler.pool(sampler.subnets)[0][0]


def _visits_of_all(sampler: PolicySampler) -> dict[SubNet, float]:
    return shared_visits(sampler.pool(sampler.subnets), sampler.subnets_per_step)


def _sandwich_visits(sampler: PolicySampler) -> dict[SubNet, float]:
    num_full = sampler.policy.full_shares
    middle = shared_visits(sampler.pool(sampler.subnets), sampler.subnets_per_step - 1 - num_full)
    return add_visits(middle, {_smallest(sampler): 1.0}, {sampler.full: float(num_full)})


def _full_plus_visits(sampler: PolicySampler) -> dict[SubNet, float]:
    num_full = sampler.policy.full_shares
    others = shared_visits(sampler.pool(sampler.others), sampler.subnets_per_step - num_full)
    return add_visits(others, {sampler.full: float(num_full)})


def _full_visits(sampler: PolicySampler) -> dict[SubNet, float]:
    return {sampler.full: float(sampler.subnets_per_step)}


STRATEGIES: dict[str, Strategy] = {
    "uniform": Strategy(_uniform, _visits_of_all),
    "stratified": Strategy(_stratified, _visits_of_all),
    "sandwich": Strategy(_sandwich, _sandwich_visits, fewest=lambda full_shares: full_shares + 1),
    "full_plus": Strategy(_full_plus, _full_plus_visits, fewest=lambda full_shares: full_shares + 1),
    "full": Strategy(_full, _full_visits),
}


def strategy_of(name: str) -> Strategy:
    """Returns the strategy with this name. Raises: UserError for an unknown name; the message lists the known ones."""
    if name not in STRATEGIES:
        raise UserError(f"sampling.strategy = {name!r} is not known. Known: {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]

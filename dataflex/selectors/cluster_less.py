"""Cluster-LESS: LESS scores of a few rows of every cluster stand for the others'.

N training rows, n of them that can be chosen, J target sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dataflex import distributed
from dataflex.components.compatibility import accepted
from dataflex.errors import ConfigError
from dataflex.fingerprint import keys_digest
from dataflex.selectors.base import Beginning, Context, Selection, View
from dataflex.selectors.composed import Aggregation, over_sets
from dataflex.selectors.parts.choice import Rule
from dataflex.selectors.parts.clustering import Method, Strategy, chosen, clusters, distances
from dataflex.selectors.parts.judgement import Judgement
from dataflex.selectors.parts.similarity import joined, target_vectors, unit
from dataflex.selectors.parts.streamed import OfView, share
from dataflex.selectors.propagated import MOST, Propagated, PropagatedFields, candidates

_NUMBERS = 1 << 24
"""float64 numbers of clusters' gradients held at a time."""


class ClusterLess(Propagated):
    """Clusters the pool once by embeddings; at every update scores representatives of each cluster by LESS.

    Source: the selector `cluster_less` of DataFlex (arXiv 2603.26164). There every member inherits the cosine of the
    mean of its representatives' unit gradients, and ties at the boundary fall as they may. Deviations: within a cluster
    the rows most like its best representative come first; `regress` predicts each row's score from all representatives;
    target sets as in LESS; no LSH and no random partition, which group unrelated rows.
    """

    class Params(PropagatedFields):
        """Parameters of `cluster_less`."""

        cluster_size: int = Field(64, ge=1, description="rows per cluster on average")
        num_clusters: int | None = Field(None, ge=1, description="clusters; default: rows / cluster_size, rounded up")
        samples_per_cluster: int = Field(4, ge=1, description="representatives, whose gradients are computed")
        clustering_method: Method = Field(
            "kmeans",
            description="kmeans: Lloyd's iteration; spherical_kmeans: with centroids of unit length; farthest_first: "
            "each next centre is the row farthest from all before it",
        )
        clustering_max_iter: int = Field(20, ge=1, description="iterations of k-means")
        representative_strategy: Strategy = Field(
            "random", description="random: drawn anew at every update; the others: by distance from the centroid"
        )
        carry_over: Literal["inherit", "regress"] = Field(
            "inherit", description="inherit: the cluster's score; regress: kernel ridge regression on the embeddings"
        )
        aggregation: Aggregation = Field(
            "max", description="over target sets: best set, mean of sets, or sets taking turns"
        )
        embedding_model_dtype: Literal["auto"] = accepted("embedding_model_dtype", "auto")
        clustering_batch_size: int = accepted("clustering_batch_size", 8, ge=1)
        assignment_chunk_size: int = accepted("assignment_chunk_size", 4096, ge=1)
        save_interval: int = accepted("save_interval", 16, ge=1)

    def __init__(self, params: Params):
        super().__init__(params)
        self._clustered: _Clusters | None = None

    def prepare(self, beginning: Beginning) -> None:
        """Refuse more representatives than a regression takes.

        Raises:
            ConfigError: there are more.
        """
        known = min(beginning.eligible, self._count(beginning.eligible) * self.params.samples_per_cluster)
        if self.params.carry_over == "regress" and known > MOST:
            raise ConfigError(
                f"carry_over: found regress from {known} representatives ({self._count(beginning.eligible)} clusters "
                f"x samples_per_cluster); expected at most {MOST}, as its kernel is a square matrix. Set a smaller "
                "num_clusters or samples_per_cluster, a larger cluster_size, or carry_over: inherit"
            )

    def _count(self, rows: int) -> int:
        """Return the number of clusters of some rows."""
        return self.params.num_clusters or -(-rows // self.params.cluster_size)

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Score representatives, carry over, choose.

        Raises:
            CoverageError: no representative has a gradient, or too few rows can be chosen.
        """
        pool = self._clusters(context)
        rows = pool.able[self._representatives(context, pool)]
        gradients = self.gradients(context, rows)
        scores = self.exact(context, gradients)
        ties = None
        if self.params.carry_over == "regress":
            sets = self.regressed(context, rows, scores)
        else:
            sets, ties = self._inherited(context, pool, rows, gradients, scores)
        combined = sets.mean(axis=1) if self.params.aggregation == "mean" else sets.max(axis=1)
        judged = Judgement(context, combined, np.zeros(len(sets), np.int32), sets, ties)
        rule: Rule = over_sets(self.params.aggregation)["rule"]
        return rule.select(judged, num_samples)

    def _clusters(self, context: Context) -> _Clusters:
        """Return the clusters of the rows that can be chosen, made once. Collective."""
        view, p = self.embeddings(context), self.params
        able = candidates(context, view)
        named = keys_digest(context.rows.keys[able])
        # Once for the run, as embeddings of the base model never change; anew only if other rows can be chosen.
        if self._clustered is None or self._clustered.named != named:
            vectors = OfView(view.take(able))
            ids = clusters(vectors, self._count(len(able)), p.clustering_method, p.clustering_max_iter, context.seed)
            far = None if p.representative_strategy == "random" else distances(vectors, ids)
            self._clustered = _Clusters(named, able, ids, far)
        return self._clustered

    def _representatives(self, context: Context, pool: _Clusters) -> np.ndarray:
        """Choose the rows whose gradients are computed; return their positions in `able`."""
        rng = context.rng("representatives", context.update)
        order = np.argsort(pool.ids, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(pool.ids[order])) + 1)
        count, strategy = self.params.samples_per_cluster, self.params.representative_strategy
        far = pool.far
        return np.concatenate([chosen(g, None if far is None else far[g], count, strategy, rng) for g in groups])

    def _inherited(
        self, context: Context, pool: _Clusters, rows: np.ndarray, gradients: View, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return every row's cluster score (N, J), and its likeness to the cluster's best representative (N,)."""
        place = np.full(len(context.rows), -1)
        place[pool.able] = np.arange(len(pool.able))
        of = pool.ids[place[rows]]  # the cluster of each representative
        targets = {name: context.features(self.params.target_spec, name) for name in context.targets}
        means = np.stack([unit(target_vectors(view, name))[0].mean(axis=0) for name, view in targets.items()], axis=1)
        sets = np.full((len(context.rows), len(targets)), -np.inf)
        sets[pool.able] = _by_cluster(gradients, of, int(pool.ids.max()) + 1, means)[pool.ids]
        best = np.full(int(pool.ids.max()) + 1, -1)
        # From the worst on, so that the best representative of a cluster is the one that stays.
        order = np.argsort(scores.max(axis=1), kind="stable")
        best[of[order]] = place[rows[order]]
        vectors = OfView(self.embeddings(context).take(pool.able))
        leaders, at = np.unique(np.maximum(best, 0), return_inverse=True)  # -1: nobody is in it
        directions = vectors.take(leaders)
        likeness = [(some, (v * directions[at[pool.ids[some]]]).sum(axis=1)[:, None]) for some, v in share(vectors)]
        ties = np.zeros(len(context.rows))
        ties[pool.able] = joined(likeness, len(vectors), 1)[:, 0]
        return sets, ties


@dataclass(frozen=True)
class _Clusters:
    """The clusters of n rows.

    Attributes:
        named: digest of their keys.
        able: (n,) the rows, by key.
        ids: (n,) the cluster of each.
        far: (n,) the distance of each from its centroid; None where nobody asks.
    """

    named: str
    able: np.ndarray
    ids: np.ndarray
    far: np.ndarray | None


def _by_cluster(gradients: View, of: np.ndarray, count: int, means: np.ndarray) -> np.ndarray:
    """Return the cosine of each cluster's mean unit gradient with every set's mean direction, (count, J).

    It is -inf without a gradient. Collective: each rank reads the gradients of its own clusters, of some at a time, as
    a gradient can be wider than an embedding.

    Args:
        gradients: of R representatives.
        of: (R,) the cluster of each.
        count: clusters.
        means: (D, J) of the sets' unit gradients.
    """
    found = []
    together = max(1, _NUMBERS // len(means))
    for start in list(range(0, count, together))[distributed.rank() :: distributed.world()]:
        some = np.flatnonzero((of >= start) & (of < start + together))
        sums = np.zeros((min(together, count - start), len(means)))
        for at, block in gradients.take(some).blocks():
            directions, is_long = unit(block.astype(np.float64))
            # Unlike `sums[...] +=`, with every row of a cluster.
            np.add.at(sums, of[some[at[is_long]]] - start, directions[is_long])
        sums, is_known = unit(sums)
        cosines = np.full((len(sums), means.shape[1]), -np.inf)
        cosines[is_known] = sums[is_known] @ means
        found.append((np.arange(start, start + len(sums)), cosines))
    return joined(found, count, means.shape[1])

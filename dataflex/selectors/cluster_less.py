"""Cluster-LESS: LESS scores of a few rows of every cluster stand for the others'.

N training rows, n of them that can be chosen, J target sets.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from dataflex import distributed
from dataflex.components.compatibility import accepted
from dataflex.errors import ConfigError
from dataflex.selectors.base import Beginning, Context, Selection, View
from dataflex.selectors.composed import Aggregation, over_sets
from dataflex.selectors.parts.choice import Rule
from dataflex.selectors.parts.clustering import Method, clusters, representatives
from dataflex.selectors.parts.judgement import Judgement
from dataflex.selectors.parts.similarity import target_vectors, unit, vectors_of
from dataflex.selectors.propagated import MOST, Propagated, PropagatedFields, candidates


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
        clustering_method: Method = Field("kmeans", description="see dataflex.selectors.parts.clustering")
        clustering_max_iter: int = Field(20, ge=1, description="iterations of k-means")
        representative_strategy: Literal["random", "nearest", "farthest", "mixed"] = Field(
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
        self._clustered: tuple[bytes, np.ndarray, np.ndarray] | None = None

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
        able, ids = self._clusters(context)
        vectors = vectors_of(self.embeddings(context), able)
        vectors = unit(vectors)[0]
        chosen = self._representatives(context, able, ids, vectors)
        rows = able[chosen]
        gradients = self.gradients(context, rows)
        scores = self.exact(context, gradients)
        ties = None
        if self.params.carry_over == "regress":
            sets = self.regressed(context, rows, scores)
        else:
            sets, ties = self._inherited(context, able, ids, vectors, rows, gradients, scores)
        combined = sets.mean(axis=1) if self.params.aggregation == "mean" else sets.max(axis=1)
        judged = Judgement(context, combined, np.zeros(len(sets), np.int32), sets, ties)
        rule: Rule = over_sets(self.params.aggregation)["rule"]
        return rule.select(judged, num_samples)

    def _clusters(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that can be chosen, (n,) by key, and the cluster of each; made once, on rank 0."""
        # One rank clusters for all: float32 results of FAISS depend on the FAISS at hand, and ranks must agree.
        view = self.embeddings(context)
        able = candidates(context, view)
        pool = context.rows.keys[able].tobytes()
        # Once for the run, as embeddings of the base model never change; anew only if other rows can be chosen.
        if self._clustered is None or self._clustered[0] != pool:
            p = self.params
            ids = None
            if distributed.is_main():
                vectors = unit(vectors_of(view, able))[0]
                ids = clusters(
                    vectors, self._count(len(able)), p.clustering_method, p.clustering_max_iter, context.seed
                )
            found = distributed.broadcast(ids)
            assert found is not None
            self._clustered = pool, able, found
        return self._clustered[1], self._clustered[2]

    def _representatives(self, context: Context, able: np.ndarray, ids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Choose the rows whose gradients are computed; return their positions in `able`."""
        rng = context.rng("representatives", context.update)
        order = np.argsort(ids, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)
        count, strategy = self.params.samples_per_cluster, self.params.representative_strategy
        return np.concatenate([representatives(group, vectors[group], count, strategy, rng) for group in groups])

    def _inherited(
        self,
        context: Context,
        able: np.ndarray,
        ids: np.ndarray,
        vectors: np.ndarray,
        rows: np.ndarray,
        gradients: View,
        scores: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return every row's cluster score (N, J), and its likeness to the cluster's best representative (N,)."""
        place = np.full(len(context.rows), -1)
        place[able] = np.arange(len(able))
        of = ids[place[rows]]  # the cluster of each representative
        sums: np.ndarray | None = None
        for at, block in gradients.blocks():
            directions, is_long = unit(block.astype(np.float64))
            if sums is None:
                sums = np.zeros((int(ids.max()) + 1, block.shape[1]))
            np.add.at(sums, of[at[is_long]], directions[is_long])  # unlike `sums[...] +=`, with every row of a cluster
        means, is_known = unit(np.zeros((int(ids.max()) + 1, 1)) if sums is None else sums)
        by_cluster = np.full((len(means), len(context.targets)), -np.inf)
        for j, name in enumerate(context.targets):
            target = target_vectors(context.features(self.params.target_spec, name), name)
            by_cluster[is_known, j] = means[is_known] @ unit(target)[0].mean(axis=0)
        sets = np.full((len(context.rows), len(context.targets)), -np.inf)
        sets[able] = by_cluster[ids]
        best = np.full(len(means), -1)
        # From the worst on, so that the best representative of a cluster is the one that stays.
        for i in np.argsort(scores.max(axis=1), kind="stable"):
            best[of[i]] = place[rows[i]]
        ties = np.zeros(len(context.rows))
        ties[able] = (vectors * vectors[best[ids]]).sum(axis=1)
        return sets, ties

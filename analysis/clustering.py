"""Do vectors form clusters of directions? Spherical k-means, its silhouette, and a projection.

The silhouette is near 1 for clusters that are far apart and near 0 for none. Even vectors without
clusters have some silhouette, so compare it with `chance_silhouette`.

Letters: S vectors, V their width, C clusters.
"""

import numpy as np


def spherical_k_means(vectors, n_clusters, seed=0, rounds=50):
    """Cluster vectors (S, V) by direction -> cluster of each (S,), mean silhouette."""
    x = normalize(vectors)
    rng = np.random.default_rng(seed)
    centres = x[rng.choice(len(x), n_clusters, replace=False)]
    for _ in range(rounds):
        cluster = (x @ centres.T).argmax(1)
        for c in np.unique(cluster):  # an empty cluster keeps its centre
            centres[c] = x[cluster == c].sum(0)
        centres = normalize(centres)
    cluster = (x @ centres.T).argmax(1)
    return cluster, mean_silhouette(x, cluster, n_clusters)


def normalize(x):
    return x / np.maximum(1e-12, np.linalg.norm(x, axis=1, keepdims=True))


def mean_silhouette(x, cluster, n_clusters):
    """Mean silhouette (Rousseeuw 1987) of unit vectors x (S, V) in clusters (S,).

    It compares the mean distance to the own cluster with that to the nearest other cluster. A
    point alone in its cluster counts as 0.
    """
    sizes = np.bincount(cluster, minlength=n_clusters)
    if (sizes > 0).sum() < 2:
        return 0.0
    # The distance 1 - x.y is linear, so a sum over a cluster needs no S x S distances.
    centre = np.stack([x[cluster == c].sum(0) for c in range(n_clusters)])  # (C, V)
    sums = sizes - x @ centre.T  # (S, C)
    point = np.arange(len(x))
    own = sums[point, cluster] / np.maximum(1, sizes[cluster] - 1)  # without the point itself
    others = np.where(sizes > 0, sums / np.maximum(1, sizes), np.inf)
    others[point, cluster] = np.inf
    nearest = others.min(1)
    quality = (nearest - own) / np.maximum(1e-12, np.maximum(nearest, own))
    return float(np.where(sizes[cluster] > 1, quality, 0).mean())


def chance_silhouette(vectors, n_clusters, draws=5):
    """Mean silhouette of vectors (S, V) after their columns were permuted."""
    silhouettes = []
    for seed in range(draws):
        _, silhouette = spherical_k_means(permute_columns(vectors, seed), n_clusters, seed)
        silhouettes.append(silhouette)
    return float(np.mean(silhouettes))


def permute_columns(vectors, seed):
    """Permute each column of vectors (S, V) on its own.

    The columns keep their distributions, and which vectors are similar is left to chance.
    """
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(column) for column in vectors.T], axis=1)


def project(vectors):
    """Directions of vectors (S, V) in the plane of their largest variance (PCA) -> (S, 2)."""
    x = normalize(vectors)
    x = x - x.mean(0)
    _, axes = np.linalg.eigh(x.T @ x)  # in order of ascending variance
    return x @ axes[:, -2:][:, ::-1]

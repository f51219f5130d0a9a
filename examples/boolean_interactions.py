"""Which inputs does a trained model join? The large interactions of a black box, on real data.

    python examples/boolean_interactions.py [--model trees|network] [--trees 60] [--seed 0]

Gradient-boosted trees learn to tell the tumours of scikit-learn's breast cancer data apart. The 30 measurements of one tumour become a function of
30 bits: bit i puts the measurement i of a benign tumour in place of that of a malignant one. f(m) is the model's log-odds: 2^30 inputs, far too
many for a table. Each Walsh-Hadamard coefficient X_k says how much the measurements in k act together, beyond what fewer of them do. A tree of
depth 3 has no interaction of more than 3 inputs, so f is sparse, and `sparse_wht` finds the interactions from a few thousand calls for each
hundred of them, without being told how many there are.

A network that reads scikit-learn's digits is asked about one image: bit i puts the training images' mean in place of patch i, 24 patches of two
pixels, and f is the log-odds of the digit. Nothing makes such an f sparse: the few large interactions stand above many small ones, whose power is
the noise that `sparse_wht` estimates.

What is found is judged on masks that it has not seen, beside what one needs without it: Lasso on single inputs and pairs, from as many calls.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LassoCV
from sklearn.neural_network import MLPClassifier

from dither.special import SparseWHT, sparse_wht

PATCHES = 24  # of the 32 in an image of 8 x 8, those whose ink varies most
CALLS = 20000  # that Lasso is given at most: it needs all of them in memory, a column each pair


def ensemble(trees: int, seed: int) -> tuple[Callable[[np.ndarray], np.ndarray], list[str]]:
    """The function of rows of 30 bits, and what each bit is."""
    data = load_breast_cancer()
    model = GradientBoostingClassifier(n_estimators=trees, max_depth=3, random_state=seed).fit(data.data, data.target)
    odds = model.decision_function(data.data)
    malignant, benign = (np.abs(odds - np.quantile(odds[data.target == kind], 0.5)).argmin() for kind in (0, 1))

    def f(bits: np.ndarray) -> np.ndarray:
        rows = np.where(bits, data.data[benign], data.data[malignant])  # [Q, 30]
        found: np.ndarray = model.decision_function(rows)
        return found

    return f, [str(name) for name in data.feature_names]


def network(seed: int) -> tuple[Callable[[np.ndarray], np.ndarray], list[str]]:
    """The function of rows of 24 bits, and what each bit is."""
    data = load_digits()
    images, held_out = data.data[:1400] / 16, data.data[1400:] / 16
    model = MLPClassifier((64, 32), alpha=1e-2, max_iter=300, random_state=seed).fit(images, data.target[:1400])
    patches = np.arange(64).reshape(32, 2)
    chosen = np.sort(np.argsort(-images.var(axis=0)[patches].sum(axis=1))[:PATCHES])
    image, mean, digit = held_out[5], images.mean(axis=0), model.predict(held_out[5:6])[0]

    def f(bits: np.ndarray) -> np.ndarray:
        hidden = np.zeros((len(bits), 64), dtype=bool)
        hidden[:, patches[chosen].reshape(-1)] = np.repeat(bits != 0, 2, axis=1)
        chance = np.log(model.predict_proba(np.where(hidden, mean, image)).clip(1e-300))
        others = np.delete(chance, digit, axis=1)
        found: np.ndarray = chance[:, digit] - np.logaddexp.reduce(others, axis=1)
        return found

    return f, [f"row {i // 4}, columns {i % 4 * 2} and {i % 4 * 2 + 1}" for i in chosen]


def explained(truth: np.ndarray, found: np.ndarray) -> float:
    """R^2."""
    return float(1 - ((truth - found) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def lasso(f: Callable[[np.ndarray], np.ndarray], calls: int, unseen: np.ndarray, seed: int) -> np.ndarray:
    """What single inputs and pairs give at ``unseen [Q, n]``."""
    bits = np.random.default_rng(seed).integers(0, 2, (calls, unseen.shape[1]))
    model = LassoCV(cv=3, max_iter=2000).fit(_pairs(bits), f(bits))
    found: np.ndarray = model.predict(_pairs(unseen))
    return found


def _pairs(bits: np.ndarray) -> np.ndarray:
    x = 1.0 - 2.0 * bits
    return np.hstack([x, *(x[:, i : i + 1] * x[:, j : j + 1] for i, j in itertools.combinations(range(x.shape[1]), 2))])


def main(arguments: list[str] | None = None) -> tuple[SparseWHT, float, float]:
    """Print the interactions; return what was found and R^2 of it and of Lasso."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("trees", "network"), default="trees")
    parser.add_argument("--trees", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    f, names = ensemble(given.trees, given.seed) if given.model == "trees" else network(given.seed)
    n = len(names)

    if given.model == "trees":
        found = sparse_wht(f, n, bits=True, seed=given.seed)
    else:
        found = sparse_wht(f, n, k=256, sigma=None, mode="so", bits=True, seed=given.seed)

    unseen = np.random.default_rng(given.seed + 1).integers(0, 2, (5000, n))
    truth = f(unseen)
    ours = explained(truth, found(unseen))
    theirs = explained(truth, lasso(f, min(found.n_calls, CALLS), unseen, given.seed))
    print(f"{len(found.support)} interactions from {found.n_calls} calls, {100 * found.n_calls / 2**n:.2g} % of 2^{n}; complete: {found.complete}")
    print(f"R^2 on {len(unseen)} unseen inputs: {ours:.6f}; Lasso on pairs, {min(found.n_calls, CALLS)} calls: {theirs:.6f}")
    for k, value in itertools.islice(zip(found.bits(), found.values, strict=True), 12):
        print(f"{value:+9.4f}  {' x '.join(names[i] for i in np.flatnonzero(k)) or 'constant'}")
    return found, ours, theirs


if __name__ == "__main__":
    main()

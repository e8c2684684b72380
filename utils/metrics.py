"""Detection metrics in percent, as the field prints them; None where a metric is undefined."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score


def auroc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve, in percent; labels and scores (n,). None where one of the two kinds is missing."""
    return 100.0 * float(roc_auc_score(labels, scores)) if _has_both(labels) else None


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Average precision (step-wise area under precision and recall), in percent; None as for `auroc`."""
    return 100.0 * float(average_precision_score(labels, scores)) if _has_both(labels) else None


def _has_both(labels: np.ndarray) -> bool:
    return labels.size > 0 and bool(labels.any()) and not bool(labels.all())

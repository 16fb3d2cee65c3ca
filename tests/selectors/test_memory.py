"""Methods take no more memory than they say, and methods with parts take less."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from kdprune_data import order, selectors
from kdprune_data.selectors import Pool, Size


@pytest.mark.parametrize(("n", "classes", "width"), [(3000, 1, 2), (2000, 2, 100), (400, 2, 3000)])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("herding", {}),
        ("kcenter", {}),
        ("craig", {}),
        ("craig", {"greedy": "stochastic"}),
        ("facility_location", {}),
        ("gradmatch", {}),
        ("gradmatch", {"batch": 500}),
    ],
)
def test_the_peak_is_below_what_the_cost_says(method: str, settings: dict[str, object], n: int, classes: int, width: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(n, dtype=np.int32) % classes
    embedding = rng.normal(size=(n, width)).astype(np.float16)
    pool = Pool(
        order.uids_of(str(i) for i in range(n)), labels, embedding=embedding, logits=rng.normal(size=(n, classes)).astype(np.float16)
    )
    found = selectors.method(method)
    groups = np.full(classes, n // classes)
    params = found.params(**settings)
    assert found.cost is not None
    whole, parts = (found.cost(Size(groups, groups // 10, width, classes), found.params(**settings, parts=p)) for p in (1, 4))
    assert parts.bytes < whole.bytes
    assert parts.multiplications < whole.multiplications
    found.select(pool, classes, params)  # what it imports is not counted
    tracemalloc.start()
    try:
        found.select(pool, n // 10, params)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < whole.bytes

"""How a folder's scores are distributed, and how they agree: what `info` adds for scores, as facts and as tables of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from kdprune_pipelines._console import bar, count
from kdprune_pipelines._tables import PAGE, aligned, number
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import FormatError
from kdprune_data.formats import indexing, table
from kdprune_data.formats.manifest import Manifest
from kdprune_data.formats.scores import SCORES
from kdprune_data.report import summary

RANKED_MOST = 1_000_000
"""Rank correlations are taken over at most so many samples."""
CLASSES_SHOWN = 10
NAMES = {0.0: "min", 1.0: "max"}
"""What the outer quantiles are called."""


def facts(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Quantiles and means of each score, means of each class, rank correlations of each two.

    Raises FormatError when the parts are not what the manifest says, or hold a number that is not finite.
    """
    parts = [folder / f.path for f in manifest.files if f.path.startswith("part-")]
    names = list(manifest.config["columns"])
    labels = np.concatenate([indexing.labels_of(table.read(part, columns=["label"])["label"]) for part in parts])
    if len(labels) != manifest.counts["samples"]:
        raise FormatError(f"{folder} has {len(labels):,} scores, its manifest says {manifest.counts['samples']:,}: run score again")
    ranked = _ranked(parts, len(labels))
    kept, columns, means = [], {}, {}
    with bar("summarise", total=len(names), unit="score") as progress:
        for name in names:
            values = _column(parts, name)
            kept.append(values if ranked is None else values[ranked])
            columns[name] = _about(parts[0], name) | _distribution(values)
            means[name] = summary.class_means(values, labels, len(manifest.classes))
            progress.update()
        correlations = summary.rank_correlations(kept)
    rows = {a: {b: _plain(correlations[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}
    return {
        "columns": columns,
        "per_class": _per_class(manifest, labels, columns, means),
        "correlations": {"samples": len(labels) if ranked is None else len(ranked), "of": len(labels), "spearman": rows},
    }


def _ranked(parts: list[Path], samples: int) -> NDArray[np.int64] | None:
    """The rows that rank correlations are taken over, where they are not all: those that come first in the order of their hash."""
    if samples <= RANKED_MOST:
        return None
    found = []
    with bar("hash ids", total=samples) as progress:
        for part in parts:
            found.append(order.uids_of(table.read(part, columns=["id"])["id"].to_pylist()))
            progress.update(len(found[-1]))
    uids = np.concatenate(found)
    first = np.argpartition(order.order_hash(uids, 0, "rank-correlations"), RANKED_MOST)[:RANKED_MOST]
    return np.sort(first)


def _column(parts: list[Path], name: str) -> NDArray[np.float32]:
    """One score of every sample, in shard order."""
    values = np.concatenate([np.asarray(table.read(part, columns=[name])[name].to_numpy(), np.float32) for part in parts])
    if not np.isfinite(values).all():
        raise FormatError(f"{parts[0].parent} has values of {name} that are no finite numbers: make or fetch it again")
    return values


def _about(part: Path, name: str) -> dict[str, Any]:
    """Which end is the hard one, and what it was made from, as the file says."""
    said = table.read(part, columns=[name]).schema.field(name).metadata or {}
    hard = said.get(b"hard", b"").decode() or (SCORES[name].hard if name in SCORES else None)
    return {"hard": hard, "source": said.get(b"source", b"").decode() or None}


def _distribution(values: NDArray[np.float32]) -> dict[str, Any]:
    exact = values.astype(np.float64)
    found = summary.quantiles(values)
    named = {NAMES.get(at, f"{at:g}"): float(value) for at, value in zip(summary.QUANTILES, found, strict=True)}
    return {"quantiles": named, "mean": float(exact.mean()), "std": float(exact.std())}


def _per_class(
    manifest: Manifest, labels: NDArray[np.int32], columns: Mapping[str, Mapping[str, Any]], means: Mapping[str, NDArray[np.float64]]
) -> list[dict[str, Any]]:
    """Every class, in label order."""
    sizes = np.bincount(labels[labels >= 0], minlength=len(manifest.classes))
    spread, hard = ({name: about[key] for name, about in columns.items()} for key in ("std", "hard"))
    harder = summary.hardness(means, spread, hard)
    return [
        {
            "class": name,
            "samples": int(sizes[n]),
            "hardness": _plain(harder[n]),
            "means": {score: _plain(of[n]) for score, of in means.items()},
        }
        for n, name in enumerate(manifest.classes)
    ]


def _plain(value: float) -> float | None:
    """A number as JSON has it."""
    return None if math.isnan(value) else float(value)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The facts as three tables."""
    columns = found["columns"]
    yield "  scores    hard: the end where the hard samples are; quantiles and mean over all samples"
    percent = [NAMES.get(at, f"{at * 100:g} %") for at in summary.QUANTILES]
    rows = [[n, c["hard"] or "?", *map(number, (*c["quantiles"].values(), c["mean"]))] for n, c in columns.items()]
    yield from aligned(["", "hard", *percent, "mean"], rows)
    classes, which = _classes(found["per_class"])
    if classes:
        yield f"  classes   means of {which}"
        sizes = ["samples", *(f"{c['samples']:,}" for c in classes)]
        rows = [[n, *(number(c["means"][n]) for c in classes)] for n in columns]
        yield from aligned(["", *(c["class"] for c in classes)], [sizes, *rows])
    ranks = found["correlations"]
    table_of = ranks["spearman"]
    flat = "; -: a score that does not vary" if any(v is None for row in table_of.values() for v in row.values()) else ""
    among = count(ranks["samples"], "sample") + (f" of {ranks['of']:,}, chosen by hash" if ranks["of"] > ranks["samples"] else "")
    yield f"  ranks     Spearman's rank correlations over {among}; equal values share a rank{flat}"
    yield from _ranks(table_of)


def _ranks(table_of: Mapping[str, Mapping[str, float | None]]) -> Iterator[str]:
    """Each score against those above it, by their names where a page is wide enough, else by their numbers."""
    names = list(table_of)
    rows = [[a, *(_two_digits(table_of[a][b]) for b in names[:n])] for n, a in enumerate(names)]
    lines = list(aligned(["", *names[:-1]], rows))
    if max(map(len, lines)) > PAGE:
        numbered = [[f"{n + 1:>2} {row[0]}", *row[1:]] for n, row in enumerate(rows)]
        lines = list(aligned(["", *(str(n + 1) for n in range(len(names) - 1))], numbered, "  "))
    yield from lines


def _classes(per_class: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The classes to show, hardest first, and which these are; those without samples are left out."""
    there = sorted((c for c in per_class if c["samples"]), key=lambda c: -c["hardness"])
    if len(there) <= CLASSES_SHOWN:
        return there, "each class, from the hardest (on average over the scores) to the easiest"
    half = CLASSES_SHOWN // 2
    which = f"the {half} hardest and {half} easiest of {len(there):,} classes (over all scores; others with --json)"
    return [*there[:half], *there[-half:]], which


def _two_digits(value: float | None) -> str:
    """A rank correlation, without the zero before the point.

    >>> [_two_digits(value) for value in (0.123, -0.5, 1.0, -0.001, None)]
    ['.12', '-.50', '1', '0', '-']
    """
    if value is None:
        return "-"
    rounded = round(value, 2)
    return f"{rounded:.0f}" if abs(rounded) == 1 else f"{rounded:.2f}".replace("0.", ".", 1) if rounded else "0"

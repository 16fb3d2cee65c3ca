"""What shards of small images take on disk, by sample: as WebDataset's writer writes them, and as `import` does."""

from __future__ import annotations

import tempfile
from pathlib import Path

import shards
from common import measured, parser, report


def main() -> None:
    made = parser(__doc__ or "")
    shards.options(made, data="small images", samples=50_000)
    asked = made.parse_args()
    images, labels = shards.read(asked.data, asked.samples)
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        theirs = shards.written(work / "theirs", images, labels)
        data = shards.imported(work / "ours", theirs)
        assert sorted(data.read(range(len(data)))) == sorted(images)
        sizes = {
            "limit: the images": sum(map(len, images)),
            "WebDataset, ShardWriter": sum(Path(path).stat().st_size for path in theirs),
            "ours, the tars": sum(path.stat().st_size for path in data.shard_paths),
            "ours, with index and manifest": sum(path.stat().st_size for path in data.folder.rglob("*") if path.is_file()),
        }
    whole = sizes["WebDataset, ShardWriter"]
    rows = [
        {
            "what": name,
            "bytes a sample": round(size / len(images)),
            "% of WebDataset's": 100 * size / whole,
            "goal": "60 % of WebDataset's" if name.startswith("ours") else None,
        }
        for name, size in sizes.items()
    ]
    report(asked, rows, measured(asked, ["webdataset"], n=asked.samples))


if __name__ == "__main__":
    main()

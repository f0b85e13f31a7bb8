"""Stage `scenes`: renders the training pictures and their captions once.

python -m training.scenes --count 80000
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import numpy as np

from training.checkpoint import WORK
from training.world import Scene, caption, render, sample_scene

CAPTIONS = 4
"""Captions per scene, with different attributes dropped."""


def load() -> tuple[np.ndarray, list[Scene], list[list[str]]]:
    """Pictures (N, 64, 64, 3) uint8, their scenes and CAPTIONS captions each."""
    records = json.loads((WORK / "scenes.json").read_text())
    scenes = [Scene(**{**record["scene"], "objects": tuple(record["scene"]["objects"])}) for record in records]
    return np.load(WORK / "scenes.npy", mmap_mode="r"), scenes, [record["captions"] for record in records]


def clean(scenes: list[Scene]) -> list[int]:
    """Which scenes have no defect: those that images are made from."""
    return [i for i, scene in enumerate(scenes) if not scene.defect]


def main() -> None:
    """Renders `--count` scenes of seed `--seed` into scenes.npy and scenes.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=80_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    pictures = np.empty((args.count, 64, 64, 3), np.uint8)
    records = []
    for i in range(args.count):
        scene = sample_scene(rng, defects=True)
        pictures[i] = np.asarray(render(scene, rng))
        records.append({"scene": asdict(scene), "captions": [caption(scene, rng) for _ in range(CAPTIONS)]})
    np.save(WORK / "scenes.npy", pictures)
    (WORK / "scenes.json").write_text(json.dumps(records, ensure_ascii=False))
    print(f"{args.count} scenes, {len({c for r in records for c in r['captions']})} different captions")


if __name__ == "__main__":
    main()

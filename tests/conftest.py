"""Before anything imports torch: no network, and one thread, which is fastest for tiny tensors."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline on disk."""
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")

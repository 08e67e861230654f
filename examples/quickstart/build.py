"""Make the quickstart's pool and model from what is on any machine: `python -m examples.quickstart.build`.

Nothing is downloaded. The same seed, Python and libraries give the same files; intact files are left as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER = Path("examples/quickstart")
"""Where the outputs go, from the repository's root."""

TARGET = "arithmetic"
"""The source that the demo trains towards."""

PLAN: dict[str, Any] = {
    "seed": 0,
    "rows": {"pool": 200, "target": 40, "test": 40},  # of every source
    "pretrain": {"rare": 12, "common": 420},  # rows of the demo's target source, and of every other one
    "model": {"vocabulary": 2048, "hidden": 160, "layers": 4, "steps": 200},
}


def build(folder: Path = FOLDER) -> bool:
    """Make `data/` and `model/` under the folder unless both are there, intact and made by this code; say whether made.

    `model/built.json` lists what they were made by and the digest of every file.
    """
    begun = time.monotonic()
    marker = folder / "model" / "built.json"
    inputs = _inputs()
    if marker.is_file():
        found = json.loads(marker.read_text("utf-8"))
        if found == {"inputs": inputs, "outputs": _outputs(folder)}:
            logger.info("pool and model are there and intact: nothing to build")
            return False
        logger.info("pool and model were made by other code, or changed since: building them anew")
    for name in ("data", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    _make(folder)
    marker.write_text(json.dumps({"inputs": inputs, "outputs": _outputs(folder)}, indent=1) + "\n", "utf-8")
    logger.info("built pool and model in %.0f s", time.monotonic() - begun)
    return True


def _make(folder: Path) -> None:
    from transformers.utils.logging import disable_progress_bar  # imported only where something is built: 10 s

    from examples.quickstart import model as tiny
    from examples.quickstart import pool

    disable_progress_bar()

    seed, sizes = PLAN["seed"], PLAN["model"]
    splits = {
        source: pool.split(
            source, seed, **PLAN["rows"], pretrain=PLAN["pretrain"]["rare" if source == TARGET else "common"]
        )
        for source in pool.SOURCES
    }
    datasets = {"pool": [row for split in splits.values() for row in split.pool]}
    random.Random(seed).shuffle(datasets["pool"])
    datasets |= {f"target_{source}": split.target for source, split in splits.items()}
    datasets |= {f"test_{source}": split.test for source, split in splits.items()}
    pool.write_datasets(folder / "data", datasets)
    logger.info("wrote a pool of %d rows of %d sources", len(datasets["pool"]), len(splits))

    conversations = ["".join(pool.turns(row)) for split in splits.values() for row in split.pretrain]
    tokenizer = tiny.train_tokenizer(conversations, sizes["vocabulary"])
    model = tiny.new_model(tokenizer, sizes["hidden"], sizes["layers"], seed)
    loss = tiny.pretrain(model, tokenizer, conversations, steps=sizes["steps"], seed=seed)
    tiny.save(model, tokenizer, folder / "model")
    logger.info("pre-trained a model of %d parameters from random weights: loss %.2f", model.num_parameters(), loss)


def _inputs() -> dict[str, Any]:
    """Describe everything that the outputs follow from."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return {
        "plan": PLAN,
        "code": {p.name: _digest(p) for p in sources if p.name not in ("__init__.py", "demo.py", "measure.py")},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
    }


def _outputs(folder: Path) -> dict[str, str]:
    files = sorted(p for name in ("data", "model") for p in (folder / name).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): _digest(p) for p in files if p.name != "built.json"}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build()

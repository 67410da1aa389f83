"""Every shipped recipe is a valid job and runs, made small."""

from __future__ import annotations

from pathlib import Path

import pytest

from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.loops.train import train

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
SMALL = ["train.steps=2", "train.tokens_per_step=256", "train.micro_batch=2", "train.eval_tokens=256", "data.sequence=64", "threads=1"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    text = tmp_path / "play.txt"
    text.write_text("\n".join(f"Enter the {chr(97 + i % 26)}{i} of Lilliput, with {i * 7 % 1000} ropes and {chr(65 + i % 26)} drums." for i in range(1500)))
    sizes = [f"data.tokenizer=bpe:{400}"] if Job.load(recipe).data.tokenizer.startswith("bpe:") else []
    result = train(Job.load(recipe, [*SMALL, *sizes, f"data.path={text}", "train.eval_every=0"]), tmp_path / "run", Show(json=True))
    assert result.steps == 2 and (tmp_path / "run" / "model" / "model.safetensors").is_file()

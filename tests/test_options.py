"""Options of `fit` mean what they say."""

import json

import pytest
import yaml

from lar_lightning.__main__ import main
from lar_lightning.cli import to_the_letter

PATTERNS = ["\\bkey-\\d+", "a\"b'c", "it's"]


@pytest.mark.parametrize("mining", ["--data.init_args.mining", "--data.mining"])
@pytest.mark.parametrize("is_one_word", [True, False])
def test_patterns_come_through_whole(
    mining: str, is_one_word: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    option, value = f"{mining}.parameter_patterns", json.dumps(PATTERNS)
    given = [f"{option}={value}"] if is_one_word else [option, value]
    others = ["--config=configs/tool_calls.yaml", *given, f"{mining}.max_latents=3"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *others, "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["mining"]
    assert settings["parameter_patterns"] == PATTERNS
    assert settings["max_latents"] == 3
    assert settings["min_support"] == 0.16  # of the file before


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config", "a.yaml", "--trainer.max_steps=3"],
        ["fit", "--data.init_args.rollouts.temperatures=[0.0, 1.0]"],
        ["fit", "--data.init_args.rollouts.temperatures", "[0.0, 1.0]", "--base_model=x"],
        ["fit", "--data.init_args.mining.parameter_patterns=[]"],
        ["fit", '--data.init_args.mining.parameter_patterns=["a'],
        ["fit", "--data.init_args.rollouts.style"],
        ["fit", "--data=data_modules.RolloutDataModule"],
    ],
)
def test_other_options_stay_as_they_are(arguments: list[str]) -> None:
    assert to_the_letter(arguments) == arguments

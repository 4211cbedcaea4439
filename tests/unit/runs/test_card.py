from __future__ import annotations

import re

from huggingface_hub import ModelCard

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.prepare import DataStats, SplitStats
from llm_ray.runs.card import model_card
from llm_ray.train.auto import choose
from tests.runs import base_of, opened_run
from tests.unit.runs.conftest import MakeConf

SPLIT = {"rows": 10, "sequences": 2, "tokens": 1234, "supervised_tokens": 321}
RESULT = {
    "data": {"train": SPLIT, "validation": None},
    "training": {
        "status": "done",
        "step": 12,
        "best_step": 10,
        "best_validation_loss": 0.5,
        "loss": 0.4,
        "tokens": 1000,
        "seconds": 12.3,
    },
    "evaluation": {
        "rows": 4,
        "base": {"exact_match": 0.0, "perplexity": None},
        "finetuned": {"exact_match": 0.75, "perplexity": 2.0},
    },
}


def chosen(conf: FinetuneConf) -> FinetuneConf:
    split = SplitStats(
        rows=90,
        sequences=90,
        tokens=900,
        supervised_tokens=300,
        supervised_share=1 / 3,
        longest=12,
        longest_sequence=12,
        mean=10,
        answer=10 / 3,
    )
    data = DataStats(formats=["text"], files=[], max_length=512, read=90, train=split)
    return choose(conf, data, width=64).conf


def test_a_card_says_what_was_made_of_what(make_conf: MakeConf) -> None:
    conf = make_conf("support-bot", data={"train": make_conf().data.train, "system": 'Say "yes".'})
    with opened_run(conf, force=False) as run:
        text = model_card(chosen(conf), base_of(conf), run.lineage(), RESULT)
    header = ModelCard(text).data.to_dict()
    assert header == {
        "base_model": "tiny",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llm-ray", "sft", "lora", "conversational"],
        "license": "apache-2.0",
    }
    for part in (
        "`rows.jsonl`",
        "| train | 10 | 1234 | 321 |",
        "| exact match | 0 | 0.75 |",
        "| perplexity | – | 2 |",
        "step 10",
    ):
        assert part in text
    assert "llm-ray serve deploy --model support-bot" in text
    assert str(conf.run_dir.parent) not in text  # a card is published: no folders of this machine
    assert "\n\n\n" not in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")


def test_a_card_without_figures_or_licence(make_conf: MakeConf) -> None:
    conf = make_conf(tuning={"objective": "pretrain", "method": "full"}, model={"base": "organisation/model"})
    with opened_run(conf, force=False) as run:
        text = model_card(chosen(conf), base_of(conf), run.lineage(), {})
    header = ModelCard(text).data.to_dict()
    assert header["base_model"] == "organisation/model"
    assert "license" not in header
    assert "licence of the base model is not known" in text
    assert "## Results" not in text
    assert "apply_chat_template" not in text
    assert "\n\n\n" not in text


def test_a_card_of_preferences(make_conf: MakeConf) -> None:
    conf = make_conf(tuning={"objective": "dpo", "dpo": {"beta": 0.2, "sft_weight": 0.5}})
    evaluation = {
        "rows": 0,
        "base": {"validation_loss": 0.6931},
        "finetuned": {"validation_loss": 0.51, "reward_accuracy": 0.8, "reward_margin": 0.4},
    }
    with opened_run(conf, force=False) as run:
        text = model_card(chosen(conf), base_of(conf), run.lineage(), {"evaluation": evaluation})
    assert ModelCard(text).data.to_dict()["tags"] == ["llm-ray", "dpo", "lora", "conversational"]
    for part in (
        "on pairs of answers, to prefer the chosen one of each to the rejected one.",
        "| preference loss | sigmoid |",
        "| beta | 0.2 |",
        "| weight of the sft term | 0.5 |",
        "| validation loss | 0.6931 | 0.51 |",
        "| held-out pairs of which the chosen answer is preferred | – | 0.8 |",
        "apply_chat_template",
    ):
        assert part in text
    assert "label smoothing" not in text


def test_a_card_of_odds_ratios(make_conf: MakeConf) -> None:
    conf = make_conf(tuning={"objective": "orpo", "orpo": {"beta": 0.3}})
    with opened_run(conf, force=False) as run:
        text = model_card(chosen(conf), base_of(conf), run.lineage(), {})
    assert "to give the chosen one of each and to prefer it to the rejected one." in text
    assert "| beta | 0.3 |" in text and "preference loss" not in text


def test_a_card_of_ratings(make_conf: MakeConf) -> None:
    conf = make_conf(tuning={"objective": "kto", "kto": {"beta": 0.3, "undesirable_weight": 1.5}})
    evaluation = {"rows": 0, "base": {"validation_loss": 0.5}, "finetuned": {"rating_accuracy": 0.75}}
    with opened_run(conf, force=False) as run:
        text = model_card(chosen(conf), base_of(conf), run.lineage(), {"evaluation": evaluation})
    for part in (
        "on answers rated good or bad, to make good ones likelier and bad ones less likely.",
        "| preference loss | kto |",
        "| beta | 0.3 |",
        "| weights of good and bad answers | 1 and 1.5 |",
        "| held-out answers whose reward agrees with their rating | – | 0.75 |",
    ):
        assert part in text

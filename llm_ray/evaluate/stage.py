"""Evaluation on the cluster: each worker generates answers to its share of the rows, before and after training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypedDict

from llm_ray.cluster import Workers, node_selector, results
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.formats import Conversation
from llm_ray.data.prepare import evaluation_rows, questions_from
from llm_ray.errors import DataError
from llm_ray.evaluate.tasks import evaluate_tasks
from llm_ray.files import write_text
from llm_ray.models.chat import ChatTemplate, text_of
from llm_ray.models.load import Base, load_tokenizer
from llm_ray.progress import Reporter
from llm_ray.runs.benchmarks import shown
from llm_ray.runs.card import FIGURES


class Share(TypedDict):
    """One worker's results: summed validation loss, its token count, and the answers. For preference pairs there is no
    loss; `pairs` maps each pair's number to log-probabilities (nats) and token counts of the chosen and rejected
    answer. For rated answers, `rated` maps each row's number to the log-probability (nats) of its answer and its rating;
    `mismatched` is the summed log-probability of other rows' answers, if the loss needs it."""

    loss: float
    tokens: int
    answers: list[str]
    pairs: dict[int, tuple[list[float], list[int]]]
    rated: dict[int, tuple[float, bool]]
    mismatched: float


def evaluate(
    conf: FinetuneConf, base: Base, workers: Workers, checkpoint: Path, reporter: Reporter, *, fresh: bool = False
) -> dict[str, Any]:
    """Returns figures before and after training, for result.json; writes evaluation.md and answers.jsonl into the run's
    folder. `fresh` repeats tasks that an earlier process has finished.

    Raises DataError as :func:`questions` does, and what :func:`evaluate_tasks` raises.
    """
    import ray

    rows = questions(conf, base)
    number = conf.runtime.workers
    share = ray.remote(
        num_cpus=workers.cpus,
        max_retries=conf.runtime.max_failures,
        scheduling_strategy="SPREAD",
        label_selector=node_selector(conf.runtime, workers.cluster),
    )(_share)
    figures: dict[str, Any] = {"rows": len(rows), "questions": questions_from(conf, conf.run_dir / "prepared")}
    given: dict[str, list[str]] = {}
    pairs: dict[str, dict[int, tuple[list[float], list[int]]]] = {"base": {}, "finetuned": {}}
    rated: dict[str, dict[int, tuple[float, bool]]] = {"base": {}, "finetuned": {}}
    mismatched = {"base": 0.0, "finetuned": 0.0}
    with reporter.bar("evaluating", 2 * number) as bar:
        parts = {
            (which, rank): share.remote(
                conf.model_dump(mode="json"),
                base,
                str(checkpoint) if which == "finetuned" else None,
                [q for q, _ in rows[rank::number]],
                rank,
                workers.cpus,
            )
            for which in ("base", "finetuned")
            for rank in range(number)
        }
        pending = list(parts.values())
        while pending:
            _, pending = ray.wait(pending)
            bar.update(2 * number - len(pending), 2 * number)
    for which in ("base", "finetuned"):
        shares: list[Share] = results([parts[which, rank] for rank in range(number)])
        given[which] = [shares[n % number]["answers"][n // number] for n in range(len(rows))]
        figures[which] = _figures(shares, given[which], [reference for _, reference in rows])
        for share_of in shares:
            pairs[which].update(share_of["pairs"])
            rated[which].update(share_of["rated"])
            mismatched[which] += share_of["mismatched"]
    for which in ("base", "finetuned"):
        if pairs["base"]:
            figures[which] = _preferred(conf, pairs["base"], pairs[which], which == "base") | figures[which]
        if rated["base"]:
            moved = mismatched[which] - mismatched["base"]
            figures[which] = _agreeing(conf, rated["base"], rated[which], moved, which == "base") | figures[which]
    figures["unchanged"] = sum(before == after for before, after in zip(given["base"], given["finetuned"], strict=True))
    figures |= {"harness": "", "tasks": []}
    if conf.evaluation.tasks:
        figures |= evaluate_tasks(conf, base, workers, checkpoint, reporter, fresh=fresh)
    _write_report(conf, figures, rows, given)
    return figures


def questions(conf: FinetuneConf, base: Base) -> list[tuple[Conversation, str]]:
    """Returns the rows to generate answers for, each with its reference.

    Raises DataError if `evaluation.data` contains no question with an answer, or one that the chat template rejects.
    """
    if conf.evaluation.samples == 0 or not conf.objective.answers:
        return []
    tokenizer = load_tokenizer(base)
    pairs = (pair for row in evaluation_rows(conf, tokenizer, conf.run_dir / "prepared") if (pair := _pair(row)))
    rows = [pair for pair, _ in zip(pairs, range(conf.evaluation.samples or 10**9), strict=False)]
    if not conf.evaluation.data:
        return rows  # validation rows, which prepare has already rendered with the template
    named = f"evaluation.data ({', '.join(conf.evaluation.data)})"
    if not rows:
        raise DataError(f"{named} contains no conversation that ends with an assistant's answer")
    template = ChatTemplate(tokenizer)
    for number, (question, _) in enumerate(rows, 1):
        try:
            template.render(question.messages, question.tools, prompt=True)
        except Exception as error:  # templates may raise anything
            raise DataError(f"{named}: the model's chat template rejects conversation {number}: {error}") from error
    return rows


def _pair(row: Conversation) -> tuple[Conversation, str] | None:
    from llm_ray.evaluate.generate import question_and_reference

    return question_and_reference(row)


def _share(
    conf_json: dict[str, Any], base: Base, checkpoint: str | None, questions: list[Conversation], rank: int, cpus: int
) -> Share:
    import contextlib

    import torch

    from llm_ray import cores
    from llm_ray.data.prepare import evaluated_split, lengths_of, open_split
    from llm_ray.evaluate.generate import answers
    from llm_ray.hardware import choose_precision, cpu_flags, torch_dtype
    from llm_ray.train.batches import collate, micro_batch_tokens, passes_over, whole_split
    from llm_ray.train.loss import SupervisedLoss
    from llm_ray.train.trained import load_trained

    conf = FinetuneConf.model_validate(conf_json)
    threads, _ = cores.bind(cpus)
    torch.set_num_threads(threads)
    precision, _ = choose_precision(conf.training.precision, cpu_flags())
    model = load_trained(conf, base, Path(checkpoint) if checkpoint else None, torch_dtype(precision))
    model.eval()
    given = list(
        answers(
            model,
            load_tokenizer(base),
            questions,
            conf.evaluation.max_new_tokens,
            conf.evaluation.batch_size,
        )
    )
    loss, tokens, mismatched = 0.0, 0, 0.0
    pairs: dict[int, tuple[list[float], list[int]]] = {}
    rated: dict[int, tuple[float, bool]] = {}
    if split := evaluated_split(conf.run_dir / "prepared"):
        data = open_split(conf.run_dir / "prepared", split)
        module = SupervisedLoss(model, model, packed=False)
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with torch.inference_mode(), autocast:
            module.choose_blockwise()
            passes = (micro_batch_tokens(conf), rank, conf.runtime.workers)
            for indices in passes_over(lengths_of(data, padded=True), *passes):
                if not indices:
                    continue
                batch = collate(data, indices, packed=False)
                if batch.ratings:
                    of_rows = zip(module.log_probabilities(batch).tolist(), batch.ratings.good.tolist(), strict=True)
                    rated |= dict(zip(indices, of_rows, strict=True))
                elif batch.pairs:
                    given_pairs = module.log_probabilities(batch).view(-1, 2).tolist()
                    pairs |= dict(zip(indices, zip(given_pairs, batch.pairs.tokens.tolist(), strict=True), strict=True))
                else:
                    loss += module(batch).item()
                    tokens += len(batch.targets)
            if conf.tuning.mismatches:
                mismatches = whole_split(data, conf.data.max_length)
                for indices in passes_over(mismatches.lengths, *passes):
                    if indices:
                        batch = collate(data, indices, packed=False, mismatches=mismatches)
                        mismatched += module.log_probabilities(batch).double().sum().item()
    return Share(loss=loss, tokens=tokens, answers=given, pairs=pairs, rated=rated, mismatched=mismatched)


def _preferred(
    conf: FinetuneConf,
    base: dict[int, tuple[list[float], list[int]]],
    model: dict[int, tuple[list[float], list[int]]],
    is_base: bool,
) -> dict[str, float]:
    """Returns the objective's loss over validation pairs, how often the model prefers the chosen answer, and by what
    margin, relative to the base model if the objective uses it as reference. For such a base model itself, returns only
    the loss."""
    import torch

    from llm_ray.train.objectives import preference_of

    numbers = sorted(base)
    reference, given = (torch.tensor([of[n][0] for n in numbers]) for of in (base, model))
    objective = preference_of(conf.tuning)
    sums = objective.figures_of(given, reference, torch.tensor([base[n][1] for n in numbers]))
    found = objective.means(sums.tolist(), len(numbers))
    preferred = {"reward_accuracy": found["rewards/accuracies"], "reward_margin": found["rewards/margins"]}
    return {"validation_loss": found["loss"], **({} if is_base and objective.reference else preferred)}


def _agreeing(
    conf: FinetuneConf,
    base: dict[int, tuple[float, bool]],
    model: dict[int, tuple[float, bool]],
    moved: float,
    is_base: bool,
) -> dict[str, float]:
    """Returns the loss over rated validation rows, the share of rows whose reward agrees with their rating, and the
    margin between good and bad ones; for the base model itself, whose rewards are zero, only the loss. `moved`: by how
    many nats the model finds mismatched answers likelier than its base, summed over the rows."""
    import torch

    from llm_ray.train.objectives import KahnemanTversky, divergence_of

    numbers = sorted(base)
    reference, given = (torch.tensor([of[n][0] for n in numbers]) for of in (base, model))
    good = torch.tensor([base[n][1] for n in numbers])
    objective = KahnemanTversky(conf.tuning.kto)
    sums = objective.figures_of(given, reference, good, divergence_of(moved, len(numbers)))
    found = objective.means(sums.tolist(), len(numbers))
    if is_base:
        return {"validation_loss": found["loss"]}
    margin = {"reward_margin": found["rewards/margins"]} if "rewards/margins" in found else {}
    return {"validation_loss": found["loss"], "rating_accuracy": found["rewards/accuracies"], **margin}


def _figures(shares: list[Share], answers: list[str], references: list[str]) -> dict[str, float]:
    from llm_ray.evaluate.scores import exact_match, token_f1

    figures: dict[str, float] = {}
    if tokens := sum(share["tokens"] for share in shares):
        loss = sum(share["loss"] for share in shares) / tokens
        figures |= {"validation_loss": loss, "perplexity": math.exp(min(loss, 700))}
    if answers:
        pairs = list(zip(answers, references, strict=True))
        figures["exact_match"] = sum(exact_match(a, r) for a, r in pairs) / len(pairs)
        figures["token_f1"] = sum(token_f1(a, r) for a, r in pairs) / len(pairs)
    return figures


def _write_report(
    conf: FinetuneConf, figures: dict[str, Any], rows: list[tuple[Conversation, str]], given: dict[str, list[str]]
) -> None:
    import json

    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("llm_ray.evaluate", "."),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 (it is Markdown)
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["shown"] = shown
    entries = [
        {"question": text_of(row.messages[-1]["content"]), "reference": reference, "base": base, "finetuned": finetuned}
        for (row, reference), base, finetuned in zip(rows, given["base"], given["finetuned"], strict=True)
    ]
    write_text(
        conf.run_dir / "evaluation.md",
        environment.get_template("report.md.j2").render(conf=conf, figures=figures, labels=FIGURES, entries=entries),
    )
    write_text(
        conf.run_dir / "answers.jsonl", "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    )

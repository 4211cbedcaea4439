"""The transformers engine's core, step by step, with small models of random weights beside a real tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RwkvConfig,
)
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, FinishReason

from llm_ray.errors import ModelError
from llm_ray.serve.engines.batches import Batch
from llm_ray.serve.engines.transformers import TransformersCore
from llm_ray.serve.models import ServedModel
from tests.unit.serve.engines.arriving import EOS, request

VOCABULARY, LENGTH = 49152, 1024
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 16,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
OLDER: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": EOS}
STATES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}
# Models that differ in what padding could break, and whether their rows are computed side by side.
MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], bool]] = {
    "heads in groups": (lambda: LlamaConfig(**SIZES), True),
    "learnt positions": (lambda: GPT2Config(**OLDER, n_embd=64, n_positions=LENGTH), True),
    "distances as bias": (lambda: BloomConfig(**OLDER, hidden_size=64), True),
    "a sliding window": (lambda: MistralConfig(**SIZES, sliding_window=6), True),
    "scores with a soft limit": (lambda: Gemma2Config(**SIZES, sliding_window=6, attn_logit_softcapping=2.0), True),
    "layers of two kinds": (lambda: Gemma3TextConfig(**SIZES, sliding_window=6), True),
    "experts": (lambda: MixtralConfig(**SIZES, num_local_experts=4), True),
    "a state": (lambda: MambaConfig(**STATES), False),
    "a state of another kind": (lambda: RwkvConfig(**STATES, attention_hidden_size=64), False),
    "a state and attention": (lambda: Qwen3NextConfig(**SIZES | LINEAR, **EXPERTS), False),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def save(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedConfig], Path]:
    """Saves a model with random weights, large enough that each token's logits depend on all before it. Returns its
    folder."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def saved(config: PreTrainedConfig) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weights in model.parameters():
            if weights.dim() > 1:
                torch.nn.init.normal_(weights, std=weights.shape[-1] ** -0.5)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="module")
def llama(save: Callable[[PreTrainedConfig], Path]) -> Path:
    return save(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def config(llama: Path) -> VllmConfig:
    """What vLLM's front end tells the core: of the model the vocabulary and tokenizer alone, which are the same for all
    here."""
    overrides = {"architectures": ["TransformersForCausalLM"]}
    return AsyncEngineArgs(
        model=str(llama),
        max_model_len=LENGTH,
        max_num_seqs=32,
        kv_cache_memory_bytes=2**20,
        enforce_eager=True,
        hf_overrides=overrides,
    ).create_engine_config()


@pytest.fixture(scope="module")
def reference(llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(llama)


Make = Callable[..., TransformersCore]


@pytest.fixture
def make(llama: Path, config: VllmConfig) -> Make:
    """Makes a core with the given parts of a ServedModel."""
    model = ServedModel("m", llama, "transformers", max_model_len=LENGTH)
    return lambda **parts: TransformersCore(replace(model, **parts), config)


def prompt(length: int, seed: int = 0) -> list[int]:
    numbers = random.Random(f"{length} {seed}")
    return [numbers.randrange(3, VOCABULARY) for _ in range(length)]


class Told(dict[str, list[EngineCoreOutput]]):
    """Outputs by request."""

    def step(self, core: TransformersCore) -> None:
        new = core.step().outputs
        assert len({output.request_id for output in new}) == len(new), "a token for each request at most"
        for output in new:
            self.setdefault(output.request_id, []).append(output)

    def finish(self, core: TransformersCore) -> Told:
        while core.has_work():
            self.step(core)
        return self

    def tokens(self, name: str) -> list[int]:
        return [token for output in self[name] for token in output.new_token_ids]

    def logprobs(self, name: str) -> list[float]:
        return [float(output.new_logprobs.logprobs[0, 0]) for output in self[name] if output.new_logprobs]


def plain(model: PreTrainedModel, ids: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """What the model writes and its log-probabilities, all computed anew for every token: no cache, no padding."""
    new: list[int] = []
    logprobs: list[float] = []
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    with torch.inference_mode():
        for _ in range(tokens):
            likeliest = (
                model(torch.tensor([ids + new]), use_cache=False, **options).logits[0, -1].log_softmax(-1).max(-1)
            )
            new.append(int(likeliest.indices))
            logprobs.append(float(likeliest.values))
    return new, logprobs


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_writes_in_company_what_it_writes_alone(
    kind: str, save: Callable[[PreTrainedConfig], Path], make: Make
) -> None:
    configured, batches = MODELS[kind]
    folder = save(configured())
    # torch's own attention, which transformers takes by default, leaves the soft limit out
    exact = {"attn_implementation": "eager"} if "soft limit" in kind else {}
    reference = AutoModelForCausalLM.from_pretrained(folder, **exact)
    core, told = make(path=folder), Told()
    prompts = [prompt(length) for length in (3, 11, 1, 29, 8)]
    for i, ids in enumerate(prompts):
        core.add(request(str(i), ids, max_tokens=6 + 2 * i, logprobs=0))
        told.step(core)
    assert len(core._running) == (1 if batches else 5)
    told.finish(core)
    for i, ids in enumerate(prompts):
        tokens, logprobs = plain(reference, ids, 6 + 2 * i)
        assert told.tokens(str(i)) == tokens
        assert told.logprobs(str(i)) == pytest.approx(logprobs, abs=1e-4)
        assert told[str(i)][-1].finish_reason == FinishReason.LENGTH


def test_rows_come_and_go_at_any_time(make: Make, reference: PreTrainedModel) -> None:
    core, told, numbers = make(max_batch=8), Told(), random.Random(1)
    asked = {str(i): (prompt(numbers.randint(1, 60), i), numbers.choice((1, 5, 20, 90))) for i in range(40)}
    gone = {name for name in asked if numbers.random() < 0.2}
    coming, leaving = list(asked), sorted(gone)
    while coming or core.has_work():
        for name in coming[: numbers.randint(0, 2)]:
            core.add(request(name, asked[name][0], max_tokens=asked[name][1]))
            coming.remove(name)
        if leaving and leaving[0] in told:
            core.abort([leaving.pop(0), "unknown"])
        told.step(core)
        assert sum(len(rows.rows) for rows in core._all()) <= 8
    for name, (ids, tokens) in asked.items():
        expected = plain(reference, ids, tokens)[0]
        assert told.tokens(name) == (expected[: len(told.tokens(name))] if name in gone else expected)


def test_others_go_on_while_a_long_prompt_is_computed(make: Make, reference: PreTrainedModel) -> None:
    core, told, long = make(), Told(), prompt(1000)
    core.add(request("short", prompt(5), max_tokens=6))
    told.step(core)
    core.add(request("long", long, max_tokens=3))
    told.step(core)
    assert "long" not in told
    assert len(told["short"]) == 2
    told.finish(core)
    assert told.tokens("long") == plain(reference, long, 3)[0]
    assert told.tokens("short") == plain(reference, prompt(5), 6)[0]


def test_rows_are_kept_apart_where_the_padding_would_cost_more(make: Make, reference: PreTrainedModel) -> None:
    core, told = make(), Told()
    core._worth = 200
    for name, length in (("a", 300), ("b", 10), ("c", 20), ("d", 310)):
        core.add(request(name, prompt(length), max_tokens=12))
        told.step(core)
    assert sorted(sorted(row.request.request_id for row in rows.rows) for rows in core._running) == [
        ["a", "d"],
        ["b", "c"],
    ]
    told.finish(core)
    for name, length in (("a", 300), ("b", 10), ("c", 20), ("d", 310)):
        assert told.tokens(name) == plain(reference, prompt(length), 12)[0]


def test_the_cache_is_never_more_than_its_share(make: Make, reference: PreTrainedModel) -> None:
    size = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, bytes
    core, told = make(kv_cache_bytes=1400 * size), Told()
    assert core._capacity == 1400
    asked = {str(i): (prompt(60 + i, i), {"seed": i, "temperature": 2.0} if i % 2 else {}) for i in range(8)}
    free = make()
    for each in (core, free):
        for name, (ids, params) in asked.items():
            each.add(request(name, ids, max_tokens=250, **params))
    most = waited = 0
    while core.has_work():
        told.step(core)
        held = [
            tensor
            for rows in core._all()
            if isinstance(rows, Batch)
            for layer in rows._cache.layers
            for tensor in layer._tensors
        ]
        assert sum(tensor.nbytes for tensor in held) <= 1400 * size
        most = max(most, sum(len(rows.rows) for rows in core._all()))
        waited += any(row.request.num_output_tokens for row in core._waiting)
    assert most > 3, "more than if each had its longest length from the start"
    assert waited, "some had to give way"
    expected = Told().finish(free)
    for name in asked:
        assert told.tokens(name) == expected.tokens(name)


def test_a_request_that_fills_the_cache_is_answered(make: Make) -> None:
    size = 3 * 2 * 2 * 16 * 4
    core, told = make(kv_cache_bytes=LENGTH * size), Told()
    for name in ("first", "second"):
        core.add(request(name, prompt(LENGTH - 10), max_tokens=500))
    told.finish(core)
    assert [len(told.tokens(name)) for name in told] == [10, 10]
    assert told["first"][-1].finish_reason == FinishReason.LENGTH


def test_a_cache_without_room_for_one_request_is_refused(make: Make) -> None:
    with pytest.raises(ModelError, match=r"model m: a request of 1024 tokens .*kv_cache_gib"):
        make(kv_cache_bytes=2**18)


def test_who_goes_away_is_dropped_wherever_it_is(make: Make, reference: PreTrainedModel) -> None:
    core, told = make(max_batch=3), Told()
    core.add(request("stays", prompt(4), max_tokens=10))
    core.add(request("runs", prompt(30), max_tokens=400))
    told.step(core)
    core.add(request("is read", prompt(900)))
    core.add(request("waits", prompt(9)))
    told.step(core)
    assert core._filling is not None
    core.abort(["runs", "is read", "waits"])
    assert core._filling is None
    before = len(told["runs"])
    told.finish(core)
    assert sorted(told) == ["runs", "stays"]
    assert len(told["runs"]) == before
    assert told.tokens("stays") == plain(reference, prompt(4), 10)[0]


# Parameters of requests that are put into one batch, and what shows in the tokens that they were heeded.
PARAMETERS: dict[str, tuple[dict[str, Any], Callable[[list[int]], bool]]] = {
    "none": ({}, lambda tokens: len(tokens) == 8),
    "seed": ({"temperature": 1.5, "seed": 3}, lambda tokens: len(set(tokens)) == 8),
    "another seed": ({"temperature": 1.5, "seed": 4}, lambda tokens: len(set(tokens)) == 8),
    "top_k": ({"temperature": 2.0, "seed": 3, "top_k": 4}, lambda tokens: len(tokens) == 8),
    "top_p": ({"temperature": 1.0, "seed": 3, "top_p": 0.3}, lambda tokens: len(tokens) == 8),
    "min_p": ({"temperature": 1.0, "seed": 3, "min_p": 0.2}, lambda tokens: len(tokens) == 8),
    "repetition_penalty": ({"repetition_penalty": 100.0}, lambda tokens: len(set(tokens)) == 8),
    "presence_penalty": ({"presence_penalty": 2.0, "allowed_token_ids": [7, 8]}, lambda tokens: {7, 8} == set(tokens)),
    "frequency_penalty": (
        {"frequency_penalty": 2.0, "allowed_token_ids": [7, 8]},
        lambda tokens: 2 <= tokens.count(7) <= 6,
    ),
    "logit_bias": ({"logit_bias": {5: 100.0}}, lambda tokens: set(tokens) == {5}),
    "allowed_token_ids": ({"allowed_token_ids": [9]}, lambda tokens: set(tokens) == {9}),
    "stop_token_ids": ({"logit_bias": {5: 100.0}, "stop_token_ids": [5]}, lambda tokens: tokens == [5]),
    "eos": ({"logit_bias": {EOS: 100.0}, "ignore_eos": False}, lambda tokens: tokens == [EOS]),
    "min_tokens": (
        {"logit_bias": {EOS: 100.0}, "ignore_eos": False, "min_tokens": 3},
        lambda tokens: EOS not in tokens[:3] and tokens[3:] == [EOS],
    ),
    "repetition_detection": (
        {"logit_bias": {5: 100.0}, "repetition_detection": RepetitionDetectionParams(max_pattern_size=2, min_count=3)},
        lambda tokens: tokens == [5, 5, 5],
    ),
    "max_tokens": ({"max_tokens": 1}, lambda tokens: len(tokens) == 1),
}


def test_every_row_has_parameters_of_its_own(make: Make) -> None:
    core, told = make(), Told()
    for name, (params, _) in PARAMETERS.items():
        core.add(request(name, prompt(6), **params, logprobs=2))
    told.finish(core)
    for name, (params, heeded) in PARAMETERS.items():
        assert heeded(told.tokens(name)), f"{name}: {told.tokens(name)}"
        core.add(request(f"{name} alone", prompt(6), **params))
        told.finish(core)
        assert told.tokens(f"{name} alone") == told.tokens(name), name
    assert told.tokens("seed") != told.tokens("another seed")
    ends = {name: (told[name][-1].finish_reason, told[name][-1].stop_reason) for name in PARAMETERS}
    assert ends["stop_token_ids"] == (FinishReason.STOP, 5)
    assert ends["eos"] == (FinishReason.STOP, None)
    assert ends["repetition_detection"] == (FinishReason.REPETITION, "repetition_detected")
    assert ends["max_tokens"] == (FinishReason.LENGTH, None)


def test_without_a_seed_answers_differ(make: Make) -> None:
    core, told = make(), Told()
    for name in "abc":
        core.add(request(name, prompt(6), temperature=1.5))
    told.finish(core)
    assert len({tuple(told.tokens(name)) for name in told}) == 3


def test_words_are_forbidden(make: Make, config: VllmConfig, reference: PreTrainedModel) -> None:
    likeliest = plain(reference, prompt(6), 1)[0]
    asked = request("m", prompt(6))
    assert asked.sampling_params is not None
    asked.sampling_params._bad_words_token_ids = [likeliest]  # as the front end makes them of bad_words
    core = make()
    core.add(asked)
    assert likeliest[0] not in Told().finish(core).tokens("m")


NO: Any = StructuredOutputsParams(grammar='root ::= "no"')
CONTRADICTIONS: dict[str, tuple[dict[str, Any], list[list[int]], int]] = {
    # parameters, tokens of bad words, tokens before the end
    "allowed, but not so soon": ({"allowed_token_ids": [EOS], "min_tokens": 3, "ignore_eos": False}, [], 0),
    "allowed and forbidden": ({"allowed_token_ids": [5, 6]}, [[5], [6]], 0),
    "forbidden after a while": ({"allowed_token_ids": [5]}, [[5, 5, 5]], 2),
    "a form that ends, and must not": (
        {"structured_outputs": NO, "logit_bias": {EOS: -100.0}, "min_tokens": 8},
        [[EOS]],
        1,
    ),
    "a form of other tokens": ({"structured_outputs": NO, "allowed_token_ids": [5]}, [], 0),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_leaves_no_token_ends_alone(make: Make, reference: PreTrainedModel, temperature: float) -> None:
    core, told = make(), Told()
    core.add(request("steady", prompt(6), max_tokens=20))
    for name, (params, forbidden, _) in CONTRADICTIONS.items():
        asked = request(name, prompt(6), **params, temperature=temperature, top_k=3, logprobs=2)
        assert asked.sampling_params is not None
        asked.sampling_params._bad_words_token_ids = forbidden
        core.add(asked)
    told.finish(core)
    for name, (_, _, tokens) in CONTRADICTIONS.items():
        assert len(told.tokens(name)) == tokens, name
        assert told[name][-1].finish_reason == FinishReason.ERROR
        assert "leaves no token" in str(told[name][-1].stop_reason)
    assert told.tokens("steady") == plain(reference, prompt(6), 20)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_no_numbers_ends_alone(
    make: Make, reference: PreTrainedModel, temperature: float
) -> None:
    core, told = make(), Told()
    core._model.get_input_embeddings().weight[77] = torch.nan
    for name, ids in (("steady", prompt(6)), ("ill", [*prompt(3), 77])):
        core.add(request(name, ids, temperature=0.0 if name == "steady" else temperature))
    told.finish(core)
    (end,) = told["ill"]
    assert (end.new_token_ids, end.finish_reason, end.stop_reason) == ([], FinishReason.ERROR, None)
    assert told.tokens("steady") == plain(reference, prompt(6), 8)[0]


def test_the_likeliest_tokens_are_those_of_the_raw_logits(make: Make, reference: PreTrainedModel) -> None:
    core, told = make(), Told()
    core.add(request("some", prompt(6), max_tokens=1, logprobs=3, temperature=0.3, seed=1, logit_bias={5: 100.0}))
    core.add(request("all", prompt(6), max_tokens=1, logprobs=-1))
    core.add(request("none", prompt(6), max_tokens=1))
    told.finish(core)
    with torch.inference_mode():
        raw = reference(torch.tensor([prompt(6)])).logits[0, -1].log_softmax(-1)
    some, every = told["some"][0].new_logprobs, told["all"][0].new_logprobs
    assert some
    assert every
    assert some.logprob_token_ids[0].tolist()[:4] == [5, *raw.topk(3).indices.tolist()]
    assert some.logprobs[0, :4] == pytest.approx([float(raw[5]), *raw.topk(3).values.tolist()], abs=1e-4)
    assert some.sampled_token_ranks[0] == int((raw >= raw[5]).sum())
    assert every.logprobs.shape == (1, VOCABULARY + 1)
    assert told["none"][0].new_logprobs is None


def test_a_grammar_is_kept_to_and_a_wrong_one_ends_its_own_request(
    make: Make, smollm2: Path, reference: PreTrainedModel
) -> None:
    tokenizer, core, told = AutoTokenizer.from_pretrained(smollm2), make(), Told()
    shapes = {
        "choice": StructuredOutputsParams(grammar='root ::= "Rome" | "Oslo"'),
        "regex": StructuredOutputsParams(regex="[a-c]{3}-[0-9]{2}"),
        "json": StructuredOutputsParams(
            json={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
        ),
        "wrong": StructuredOutputsParams(grammar="no grammar ::= ("),
    }
    core.add(request("free", prompt(6), max_tokens=20))
    for name, shape in shapes.items():
        core.add(
            request(name, prompt(6), max_tokens=40, structured_outputs=shape, ignore_eos=False, temperature=1.0, seed=2)
        )
    told.finish(core)
    texts = {name: tokenizer.decode(told.tokens(name), skip_special_tokens=True) for name in shapes}
    assert texts["choice"] in ("Rome", "Oslo")
    assert texts["regex"][3] == "-"
    assert "".join(texts["json"].split()).strip("[]").split(",")[0] in ("true", "false")
    assert told["wrong"][-1].finish_reason == FinishReason.ERROR
    assert told.tokens("free") == plain(reference, prompt(6), 20)[0]


def test_bf16_answers_in_batches(make: Make) -> None:
    core, told = make(precision="bf16"), Told()
    for i in range(3):
        core.add(request(str(i), prompt(5 + i)))
        told.step(core)
    assert len(core._running) == 1
    assert core._model.dtype == torch.bfloat16
    assert len(told.finish(core).tokens("2")) == 8


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"prompt_logprob_token_ids": [[1]]}, "prompt_logprob_token_ids"),
        ({"thinking_token_budget": 1}, "thinking_token_budget"),
        ({"trace_decode_token_ids": [1]}, "trace_decode_token_ids"),
        ({"watermarking": True}, "watermarking"),
    ],
)
def test_what_cannot_be_done_is_named(params: dict[str, Any], named: str) -> None:
    reason = TransformersCore.refusal(SamplingParams(**params))
    assert reason
    assert reason.startswith("engine transformers cannot ")
    assert named in reason
    assert "engine vllm can" in reason


def test_what_can_be_done_is_not_refused() -> None:
    for params, _ in PARAMETERS.values():
        assert TransformersCore.refusal(SamplingParams(**params)) is None


def test_embeddings_are_refused(make: Make) -> None:
    core, asked = make(), request("m", prompt(3))
    asked.sampling_params = None
    with pytest.raises(VLLMValidationError, match="embeddings"):
        core.add(asked)
    assert core.call("get_supported_tasks") == ("generate",)
    assert not core.has_work()

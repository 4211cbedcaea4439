"""The schema of a finetune conf, from which validation, help and the reference page are derived.

The text under each field is its documentation; ``llm_ray.conf.reference`` writes it to docs/reference/. Unknown keys
are errors. Rules across fields are checked here too; their messages name the keys.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from llm_ray.conf.engines import WeightForm
from llm_ray.conf.objectives import OBJECTIVES, PAIR_FORMATS, Objective, ObjectiveName, objectives_reading
from llm_ray.conf.section import AbsolutePath, Auto, OrAuto, Paths, Section, Texts, listed

Stage = Literal["prepare", "train", "evaluate", "export", "convert"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DEFAULT_STAGES: tuple[Stage, ...] = STAGES[:-1]
FewBits = Literal["int8", "int4"]
"""Quantized forms of frozen weights."""


class Runtime(Section):
    """Where the work runs, and with how many resources."""

    mode: Literal["local", "cluster"] = "local"
    """`local` starts Ray on this machine and stops it afterwards; `cluster` joins the running cluster at `address`."""
    address: str = "auto"
    """Address of the cluster (`mode: cluster`): `auto` on one of its nodes, else `host:port` of its head (GCS, port
    6379)."""
    nodes: Literal["any", "bare_metal", "docker"] = "any"
    """Runtime of the cluster's nodes that this conf requires: `bare_metal` (a virtual environment) or `docker` (an
    image), as `ray_node_runtime` in the inventory; finetune.yml refuses other clusters. `any`: either."""
    hosts: Texts = ()
    """Hosts of the cluster that may train, by name or address; with finetune.yml also inventory groups. Empty: all."""
    workers: int = Field(1, ge=1)
    """Number of training workers (processes). With one worker per host, this is the number of hosts that train."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers with which training continues when hosts are lost, from the last checkpoint and with as many
    sequences per step as before. Unset: all `workers`, so training waits for lost hosts."""
    cpus_per_worker: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """CPUs (cores) per worker, which also determine threads and core binding. `auto` divides the available CPUs among
    the workers, at most one host's each."""
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    """Placement of workers on hosts: `pack` on as few as possible, `spread` over as many as possible, `strict_spread`
    one per host, or fail."""
    interface: str | None = None
    """Network interface for communication between workers, on hosts with several networks (`GLOO_SOCKET_IFNAME`).
    Unset: the one that leads to the head."""
    max_failures: int = Field(3, ge=0)
    """How often a lost worker (killed, out of memory, host lost) is replaced and training resumes from the last
    checkpoint before the run fails."""

    @model_validator(mode="after")
    def _fewest(self) -> Runtime:
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(
                f"runtime.min_workers is {self.min_workers}, more than runtime.workers ({self.workers}): lower it"
            )
        return self


class Model(Section):
    """The base model."""

    base: str = Field(min_length=1)
    """A folder in Hugging Face form, a name in the model registry, the name of an earlier run, or a hub id
    (`organisation/model`)."""
    gguf_file: str | None = None
    """File name of a GGUF inside `base`: its weights are used (dequantized) instead of safetensors."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Tokenizer other than the model's own: a folder or a hub id."""
    chat_template: AbsolutePath | None = None
    """A Jinja file with a chat template that replaces the tokenizer's, or adds one. It is saved with the output and
    used in serving."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Data type of the frozen weights in memory. `auto`: bf16 if the CPU multiplies bf16 in hardware, else fp32.
    Trainable weights are always fp32."""
    weights: FewBits | None = None
    """Quantize the frozen linear layers of the base model while adapters are trained, to save memory: `int8` (one scale
    per row; about half the memory of bf16, nearly the same loss) or `int4` (one scale per 32 weights; less than a
    third, slightly higher loss). Embeddings and the output head stay in `dtype`. Unset: not quantized. Needs
    `tuning.method: lora` and `training.strategy: ddp`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Refused unless `trusted_models` lists the model as well."""
    trusted_models: tuple[str, ...] = ()
    """Models (as written in `base`) whose own code may run."""
    upload: bool = False
    """With finetune.yml: if `base`, `tokenizer` and `chat_template` are files or folders, they are on the machine that
    runs Ansible and are copied to the shared storage once. Otherwise it has no effect."""

    @model_validator(mode="after")
    def _trust(self) -> Model:
        if self.trust_remote_code and self.base not in self.trusted_models:
            raise ValueError(
                f"model.trust_remote_code runs code that comes with the model: read that code, and add {self.base!r} "
                "to model.trusted_models to allow it"
            )
        return self


class Data(Section):
    """The training data."""

    upload: bool = False
    """With finetune.yml: the data files (training, validation, evaluation, processor, tasks with their folders) are on the
    machine that runs Ansible and are copied to the shared storage once. Otherwise it has no effect."""
    train: Texts = Field(min_length=1)
    """Training data: a file (`.json`, `.jsonl`, `.csv`, `.parquet`, `.txt`, `.arrow`), a folder of them, a hub id, or a
    list of these. Relative paths: beside the conf file, then in the current folder, then under `paths.data`."""
    validation: Annotated[float, Field(gt=0, lt=1)] | Auto | Texts | None = "auto"
    """Validation data: a file or list as in `train`, or a fraction of the training rows, chosen by the seed. `auto`: 10
    % of the rows, at most 500, if there are 200 or more; otherwise none, since a few rows would say little and all are
    needed for training. `null`: none."""
    test: float | None = Field(None, gt=0, lt=1)
    """Fraction of the training rows, chosen by the seed, to hold out from both training and validation: the stage
    `evaluate` uses them, so its figures hold for new rows even after runs were selected by validation loss (llm-ray
    sweep). Unset: none; the stage `evaluate` uses the validation rows."""
    format: Literal[
        "auto",
        "alpaca",
        "dolly",
        "messages",
        "sharegpt",
        "prompt_completion",
        "question_answer",
        "preference",
        "openai_preference",
        "text",
    ] = "auto"
    """Shape of the rows: alpaca (instruction, input, output), dolly (instruction, context, response), messages (role,
    content), sharegpt (conversations of from, value), prompt_completion (prompt, completion), question_answer
    (question, answer, context), preference (chosen, rejected, prompt; of text or turns),
    openai_preference (input, preferred_output, non_preferred_output), text. `auto` detects it from the
    first rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps the format's column names to yours, e.g. `{question: title, answer: body}`."""
    processor: str | None = None
    """Changes or drops rows before they are formatted: a built-in one (`wikitext`), `package.module:Class`, or
    `./file.py:Class`, relative to the conf file."""
    processor_args: dict[str, object] = Field(default_factory=dict)
    """Keyword arguments for the processor's class."""
    system: str | None = None
    """System message for conversations that have none."""
    max_length: int = Field(512, ge=8)
    """Longest sequence in tokens. Longer conversations are cut at a turn boundary, longer texts are split into pieces."""
    packing: bool = True
    """Lay the rows of a forward pass end to end, without attention or loss across rows, instead of padding them to the
    longest. This only affects speed, not what is learned."""
    max_rows: int | None = Field(None, ge=1)
    """Use only the first rows, for a trial."""
    special_tokens_in_text: Literal["keep", "escape", "fail"] = "keep"
    """How to treat special tokens of the model in the text of a row, such as `<|im_end|>` in a question. `keep` treats
    them as special tokens, as serving does, and counts such rows; `escape` treats them as ordinary text; `fail` makes
    the row a bad one."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """How to treat a row that cannot be read or lacks its columns: `fail` stops and reports file and line, `skip`
    counts it and continues."""

    @field_validator("validation", mode="before")
    @classmethod
    def _fraction(cls, value: object) -> object:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < 1:
            raise ValueError(
                f"data.validation is {value:g}: a fraction must be between 0 and 1 (0.05 holds out 5 % of the rows); "
                "use null for no validation"
            )
        return value


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), implemented by peft."""

    r: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int | None = Field(None, ge=1)
    """Scale: the adapter's output is multiplied by alpha / r. Unset: twice the rank."""
    dropout: Annotated[Annotated[float, Field(ge=0, lt=1)] | Auto, OrAuto] = "auto"
    """Dropout on the adapter's input, which keeps small sets from being memorized word for word. `auto`: 0.1 for small
    sets, 0 for others and for mixtures of experts (peft has none for adapters on experts)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: names, or a pattern (regular expression) matching full names. `all-linear`: all
    linear layers except the output head, and the experts of most mixtures of experts, but not their routers."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained in full and saved with the adapter, e.g. `[embed_tokens, lm_head]` after adding tokens."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732): more stable at high ranks."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Ranks of layers that differ from `r`, by name or by a pattern (regular expression) that matches the end of full
    names, e.g. `{q_proj: 32, 'layers\\.0\\..*': 4}`."""
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """`alpha` of some layers, as in `rank_pattern`. If `alpha` is unset, layers in `rank_pattern` use twice their own
    rank."""
    dora: bool = False
    """Train magnitude and direction of each row of a layer's weights separately (DoRA; Liu et al. 2024,
    arXiv:2402.09353): often better at low ranks, but slower. Dropout applies only to the adapter's input. Such an
    adapter cannot be served on its base: deploy the merged model."""
    loraplus_lr_ratio: float = Field(1.0, ge=1)
    """Learning rate of the adapters' B matrices, as a multiple of `training.learning_rate` (LoRA+; Hayou et al. 2024,
    arXiv:2402.12354, who use 16)."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"tuning.lora.{info.field_name}: {pattern!r} is not a regular expression: {error}"
                ) from error
        return value

    @property
    def alphas(self) -> dict[str, int]:
        """alpha_pattern with its defaults for `rank_pattern`."""
        own = {} if self.alpha else {pattern: 2 * rank for pattern, rank in self.rank_pattern.items()}
        return own | self.alpha_pattern

    @property
    def scale(self) -> int:
        """alpha, or its default."""
        return self.alpha or 2 * self.r

    @property
    def dropped(self) -> float:
        """Dropout, or 0 if it has not been chosen yet."""
        return 0.0 if self.dropout == "auto" else self.dropout


class Dpo(Section):
    """Direct preference optimization (`tuning.objective: dpo`; Rafailov et al. 2023, arXiv:2305.18290): raises the odds
    of chosen answers over rejected ones, relative to the base model."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge"] = "sigmoid"
    """`sigmoid` is the original. `robust` corrects for a share `label_smoothing` of swapped pairs (Chowdhury et al.
    2024, arXiv:2403.00409). `ipo` aims at a margin of 1 / (2 beta) per token instead of an ever larger one (Azar et al.
    2023, arXiv:2310.12036; log-probabilities are means over tokens, as in TRL). `hinge` stops at a margin of 1 (Zhao et
    al. 2023, SLiC-HF, arXiv:2305.10425)."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is kept near its base: higher is nearer. With `ipo`, the paper's tau."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of pairs in which chosen and rejected are swapped. With `sigmoid`, the loss is the mean over both
    orders weighted by this share (conservative DPO, Mitchell 2023); with `robust`, it is corrected for them."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's mean negative log-likelihood per token, added to each pair's loss (Pang et al.
    2024, arXiv:2404.19733): keeps chosen answers from becoming less likely."""

    @model_validator(mode="after")
    def _smoothing(self) -> Dpo:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"tuning.dpo.label_smoothing is {self.label_smoothing:g}, which loss {self.loss} does not have: set it "
                "to 0, or use tuning.dpo.loss sigmoid or robust"
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError(
                "tuning.dpo.loss robust needs tuning.dpo.label_smoothing, the share of pairs that are the wrong way "
                "round (0.1, say): set it, or use loss sigmoid"
            )
        return self


class Orpo(Section):
    """Odds ratio preference optimization (`tuning.objective: orpo`; Hong et al. 2024, arXiv:2403.07691): learns the
    chosen answers, as sft does, and to prefer them over the rejected ones, in one training and without a reference
    model."""

    beta: float = Field(0.1, gt=0)
    """Weight of the preference term relative to the chosen answer's loss (the paper's lambda, TRL's beta)."""


class Kto(Section):
    """Kahneman-Tversky optimization (`tuning.objective: kto`; Ethayarajh et al. 2024, arXiv:2402.01306): makes answers
    rated good likelier and answers rated bad less likely, relative to the base model."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto` is the original: rewards are compared with how far the model has moved from its base, estimated in each step
    on the step's prompts with the answers of other rows. `apo_zero_unpaired` compares with the base model alone, for
    good answers that are better than the model's own, and costs a forward pass less (D'Oosterlinck et al. 2024,
    arXiv:2408.06266, as in TRL)."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is kept near its base: higher is nearer."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of the losses of good answers. The paper advises (desirable_weight × good answers) / (undesirable_weight ×
    bad answers) between 1 and 4/3."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of the losses of bad answers."""

    @model_validator(mode="after")
    def _weights(self) -> Kto:
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError(
                "tuning.kto.desirable_weight and tuning.kto.undesirable_weight are both 0, so there is nothing to "
                "learn: set one of them to 1, say"
            )
        return self


class Tuning(Section):
    """The objective, and which weights are trained."""

    objective: ObjectiveName = "sft"
    """`sft`: only the assistant's turns are supervised, including their end-of-turn token. `pretrain`: every token of
    plain text is. `dpo`: learns to prefer the chosen of two answers over the rejected one (see `dpo`). `orpo`: the same
    while also learning the chosen answers, for a model that has not been finetuned yet (see `orpo`). `kto`: learns from
    single answers that are rated good or bad (see `kto`)."""
    method: Literal["lora", "full"] = "lora"
    """`lora` trains small adapters on frozen weights; `full` trains all weights."""
    lora: Lora = Lora()
    dpo: Dpo = Dpo()
    orpo: Orpo = Orpo()
    kto: Kto = Kto()

    @property
    def mismatches(self) -> bool:
        """Whether the loss also needs the step's prompts with the answers of other rows."""
        return self.objective == "kto" and self.kto.loss == "kto"


class EarlyStopping(Section):
    """Stop training when validation no longer improves."""

    patience: int = Field(ge=1)
    """Consecutive validations without improvement before training stops."""
    min_delta: float = Field(0.0, ge=0)
    """Smallest decrease of the validation loss that counts as an improvement."""


class Training(Section):
    """The optimisation."""

    epochs: Annotated[Annotated[float, Field(gt=0)] | Auto, OrAuto] = "auto"
    """Passes over the training data. `auto`: fewer for more rows, or as many as `max_steps` requires."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; instead of `epochs`."""
    global_batch_size: Annotated[Annotated[int, Field(ge=1)] | Auto, OrAuto] = "auto"
    """Rows per optimizer step, over all workers and independent of packing (sequences, for texts and conversations that
    make several). `auto`: more for more rows."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Maximum tokens that a worker computes at once, including padding; the remaining rows of a step are computed in
    further forward passes. Lower values need less memory and, far below the default, more time; what is learned stays
    the same. Unset: 4096, and at least `data.max_length`."""
    learning_rate: Annotated[Annotated[float, Field(gt=0)] | Auto, OrAuto] = "auto"
    """Peak learning rate. `auto`: depends on method and the model's width."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: falling to zero along a cosine or a line, or constant."""
    warmup: float = Field(0.03, ge=0)
    """Warm-up from zero: below 1, a fraction of all steps; from 1, a number of steps."""
    optimizer: Literal["adamw"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, not applied to biases and norms."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Maximum norm of the gradients. `null`: no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrix products. `auto`: bf16 if the CPU has AMX or AVX512-BF16, else fp32 (other CPUs emulate
    bf16, which is slower)."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds the whole model. `fsdp`: weights, gradients and optimizer state are sharded over the
    workers, for models that do not fit one."""
    accelerator: Literal["torch", "ipex"] = "torch"
    """`ipex` computes the frozen layers under adapters with intel-extension-for-pytorch (method lora, strategy ddp);
    needs the IPEX profile (docs/reference/profiles.md)."""
    compile: bool = False
    """Use torch.compile: a minute or more at the start, then faster steps; needs g++ and the Python headers on every
    node."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    validate_every: int | None = Field(None, ge=1)
    """Steps between validations. Unset: once per epoch."""
    early_stopping: EarlyStopping | Auto | None = "auto"
    """Stop when the validation loss stops falling. `auto`: after 2 validations without improvement, if `epochs` is
    `auto` and there is validation data. `null`: never."""
    best_checkpoint: bool = True
    """Export the weights with the lowest validation loss instead of the last ones (if there is validation data)."""
    seed: int = Field(42, ge=0)
    """Seed of the split, the order of rows, adapter weights and dropout. The same seed gives the same losses."""

    @model_validator(mode="before")
    @classmethod
    def _old_batch(cls, values: Any) -> Any:
        """Rejects former keys. They counted sequences, and with packing a sequence holds several rows, so the same
        number would now mean another batch size."""
        if isinstance(values, dict) and (
            old := [k for k in ("batch_size", "gradient_accumulation") if values.get(k) is not None]
        ):
            sequences = math.prod(values[k] for k in old if isinstance(values[k], int))
            raise ValueError(
                f"training.{' and training.'.join(old)} counted packed sequences; a batch counts rows now. Write "
                "training.global_batch_size instead: auto, or the rows per optimizer step over all workers (without "
                f"packing: {sequences} × runtime.workers; with packing, that times the number of rows that fit into "
                "data.max_length). To limit memory, use training.micro_batch_tokens"
            )
        return values

    @model_validator(mode="after")
    def _length(self) -> Training:
        if self.epochs != "auto" and self.max_steps is not None:
            raise ValueError(
                "training.epochs and training.max_steps are both set: keep one of them (--set training.epochs=auto "
                "overrides the conf's for one run)"
            )
        return self


class Checkpoint(Section):
    """Checkpoints, from which an interrupted run resumes."""

    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints. Unset: once per epoch. One more is always written at the end."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep; older ones are deleted once a newer one is complete. The best weights (see
    training.best_checkpoint) are kept in addition."""


class Evaluation(Section):
    """Answers before and after training, and their scores; benchmarks."""

    data: Texts | None = None
    """Held-out questions with answers, in the format of `data`. Unset: the validation rows."""
    samples: int | None = Field(20, ge=0)
    """Number of rows, from the first, to generate answers for; `null` for all, 0 for only the losses."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest generated answer, in tokens. Decoding is greedy."""
    batch_size: int = Field(8, ge=1)
    """Rows generated at once per worker, or requests of a task computed at once."""
    tasks: Texts = ()
    """Benchmarks to run on the base and on the finetuned model with lm-eval (EleutherAI's Language Model Evaluation
    Harness; `make setup-lm-eval` installs it): names of its tasks, groups or tags (`arc_easy`, `mmlu`), whose data come
    from the hub, or local task files or folders of them, with a slash or `.yaml` in their names (`./tasks/tickets.yaml`).
    Relative paths: as in `data.train`; what a task file names is relative to its folder, and its Python functions are
    run."""
    task_limit: int | None = Field(None, ge=1)
    """Use only the first rows of each task. Unset: all."""
    task_fewshot: int | None = Field(None, ge=0)
    """Solved examples in the prompt of each row of a task. Unset: as the task says. Tasks that say 0 stay at 0."""
    task_chat_template: bool = False
    """Put the prompts of tasks, and their examples as earlier turns, into the model's chat template."""

    @field_validator("tasks")
    @classmethod
    def _different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for number, name in enumerate(value) if name in value[:number]]:
            raise ValueError(f"evaluation.tasks names {twice[0]} twice: remove one")
        return value


class Convert(Section):
    """The stage `convert`: the exported model in another engine's form, next to `output/` (docs/how-to/models.md)."""

    to: Literal["openvino"] = "openvino"
    """The engine."""
    weights: WeightForm = "int8"
    """How weights are stored: `fp32`, `bf16` (as 16-bit floats), `int8` (one scale per row; answers hardly change),
    `int4` (one scale per 32 weights; a little over half the memory of int8, and answers change)."""


class Tracking(Section):
    """Where a run's metrics are written. metrics.jsonl is always written."""

    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    log_every: int = Field(1, ge=1)
    """Steps between progress lines if the output is not a terminal."""


class FinetuneConf(Section):
    """A finetune: a base model, data, and what to do with them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the run: its folder under `paths.runs`, and its model name in serving. Letters, digits, `.`, `_`, `-`; at
    most 63."""
    stages: Annotated[tuple[Stage, ...], BeforeValidator(listed, json_schema_input_type=Stage | tuple[Stage, ...])] = (
        DEFAULT_STAGES
    )
    """Stages to run, in this order: prepare (data to tokens), train, evaluate, export (the Hugging Face model in
    `output/`), and, if listed here, convert (see `convert`). Completed stages are skipped while their inputs stay the
    same."""
    runtime: Runtime = Runtime()
    paths: Paths = Field(default_factory=Paths)
    model: Model
    data: Data
    tuning: Tuning = Tuning()
    training: Training = Training()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    convert: Convert = Convert()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _resolve(self) -> FinetuneConf:
        wrong = []
        if not self.stages:
            wrong.append(f"stages is empty: name at least one of {', '.join(STAGES)}")
        if isinstance(self.training.early_stopping, EarlyStopping) and self.data.validation is None:
            wrong.append(
                "training.early_stopping needs validation data, but data.validation is null: set it, or remove "
                "early_stopping"
            )
        if self.objective.reads == "texts" and self.data.format not in ("auto", "text"):
            wrong.append(
                f"tuning.objective {self.tuning.objective} learns plain text, but data.format is {self.data.format}: "
                "use format text, or objective sft"
            )
        if self.objective.reads == "pairs" and self.data.format not in ("auto", "text", *PAIR_FORMATS):
            wrong.append(
                f"tuning.objective {self.tuning.objective} learns from pairs of answers, but data.format is "
                f"{self.data.format}: use format preference, or objective sft"
            )
        if self.objective.reads == "conversations" and self.data.format in PAIR_FORMATS:
            wrong.append(
                f"tuning.objective {self.tuning.objective} learns from one answer a row, but data.format is "
                f"{self.data.format}: "
                f"use another format, or objective {objectives_reading('pairs')}"
            )
        if self.tuning.mismatches and self.training.global_batch_size == 1:
            wrong.append(
                "tuning.kto.loss kto compares each row with the others of its step, but training.global_batch_size is 1: "
                "use 8 or more, or loss apo_zero_unpaired"
            )
        if self.objective.answers and self.data.format == "text":
            wrong.append(
                f"tuning.objective {self.tuning.objective} needs rows with answers, but data.format is text: use "
                "another format, or objective pretrain"
            )
        if self.training.strategy == "fsdp" and self.runtime.workers == 1:
            wrong.append(
                "training.strategy fsdp shards over workers, but runtime.workers is 1: use ddp, or more workers"
            )
        wrong += [
            f"model.weights {self.model.weights} keeps {reason}, or remove model.weights" for reason in self._whole()
        ]
        if self.training.accelerator == "ipex" and self.tuning.method == "lora" and self.tuning.lora.dora:
            wrong.append(
                "tuning.lora.dora needs the base model's weights as they are, but training.accelerator ipex changes "
                "their layout: use accelerator torch, or remove dora"
            )
        if self.training.accelerator == "ipex" and (self.tuning.method != "lora" or self.training.strategy != "ddp"):
            wrong.append(
                "training.accelerator ipex changes the layout of the base model's weights, which works only if they "
                "are neither trained nor sharded: use tuning.method lora and training.strategy ddp, or accelerator "
                "torch"
            )
        if wrong:
            raise ValueError("\n".join(wrong))  # llm_ray.conf.load makes one error of each line
        return self

    def _whole(self) -> list[str]:
        """Returns what conflicts with quantized weights (`model.weights`) in this conf."""
        reasons = {
            "frozen weights quantized, but tuning.method full trains all of them: use tuning.method lora": (
                self.tuning.method == "full"
            ),
            "weights packed on every worker, but training.strategy fsdp shards them: use training.strategy ddp": (
                self.training.strategy == "fsdp"
            ),
            "weights packed, but training.accelerator ipex changes their layout: use accelerator torch": (
                self.training.accelerator == "ipex"
            ),
            "weights packed as they are read from safetensors, but model.gguf_file is a GGUF: import it first "
            "(llm-ray model import), and name the import in model.base": bool(self.model.gguf_file),
        }
        return [reason for reason, applies in reasons.items() if applies and self.model.weights]

    @property
    def objective(self) -> Objective:
        """Properties of `tuning.objective`."""
        return OBJECTIVES[self.tuning.objective]

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.paths.runs / self.name

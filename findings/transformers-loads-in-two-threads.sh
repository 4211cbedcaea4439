#!/usr/bin/env bash
# transformers 5.19.0 (torch 2.13.0): two threads that load models whose head and embedding are one tensor, at the same time.
#
# Behaviour: while from_pretrained makes a model it puts an empty function in the place of PreTrainedModel.tie_weights, of the class, and
# at its end puts back what it had found there. A second load that begins meanwhile finds the empty function, and where it ends after the
# first puts that back: its own model has a head of random numbers, and so has each tied model that the process loads from then on, in
# any thread, alone or not. Nothing is raised; the load of the second and all later ones reports a success. (A server that loads models
# in threads meets it by chance; here each model waits for the other to make the order certain.)
#
# Seen:
#   first: head and embedding are one tensor, logits as saved
#   second: head and embedding are two tensors, logits others
#   alone, afterwards: head and embedding are two tensors, logits others
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" env/bin/python - <<'PYTHON'
import threading

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained("tied")
tokens = torch.arange(8)[None]
right = AutoModelForCausalLM.from_pretrained("tied")(tokens).logits

first_begins, second_begins, first_has_ended = (threading.Event() for _ in range(3))


class First(LlamaForCausalLM):
    """Is slow to make: until another load has begun."""

    def __init__(self, config):
        first_begins.set()
        assert second_begins.wait(60)
        super().__init__(config)


class Second(LlamaForCausalLM):
    """Is slow to make, too: until the first load has ended."""

    def __init__(self, config):
        second_begins.set()
        assert first_has_ended.wait(60)
        super().__init__(config)


models = {}


def load(name, kind):
    models[name] = kind.from_pretrained("tied")


# The first is at work when the second begins, and ends before it.
first = threading.Thread(target=load, args=("first", First))
first.start()
assert first_begins.wait(60)
second = threading.Thread(target=load, args=("second", Second))
second.start()
first.join()
first_has_ended.set()
second.join()
load("alone, afterwards", LlamaForCausalLM)

tied = {}
for name, model in models.items():
    tied[name] = model.lm_head.weight is model.model.embed_tokens.weight
    off = (model(tokens).logits - right).abs().max().item()
    print(f"{name}: head and embedding are {'one tensor' if tied[name] else 'two tensors'}, logits {'as saved' if off < 1e-5 else 'others'}")
assert tied == {"first": True, "second": False, "alone, afterwards": False}, tied
PYTHON

"""The whole way on one machine: finetune a small model on bundled data, deploy it, ask it what it has learnt."""

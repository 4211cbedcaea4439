"""The serving league: this package's engines against other servers, with one model on one machine in one run.

python -m benchmarks league --servers vllm-bf16,openvino-int8 --rounds 1 --concurrency 1,4 --prompts 32
"""

"""Runs llama.cpp's server from the package xllamacpp until SIGTERM.

python -m benchmarks.league.llama_cpp --model FILE.gguf --port 8080 --parallel 4 --ctx-size 8192 --threads 2

The options are those of `llama-server`.
"""

from __future__ import annotations

import signal
from typing import Any

import click


@click.command()
@click.option("--model", required=True)
@click.option("--alias", required=True)
@click.option("--port", type=int, required=True)
@click.option("--parallel", type=int, required=True)
@click.option("--ctx-size", type=int, required=True)
@click.option("--threads", type=int, required=True)
def main(model: str, alias: str, port: int, parallel: int, ctx_size: int, threads: int) -> None:
    import xllamacpp

    print(xllamacpp.get_system_info(), flush=True)
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # also in the server's threads, so that sigwait receives them
    params: Any = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {alias}
    params.port = port
    params.n_parallel = parallel
    params.n_ctx = ctx_size
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    signal.sigwait(signals)
    del server  # ends its threads


if __name__ == "__main__":
    main()

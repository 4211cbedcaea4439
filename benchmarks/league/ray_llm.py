"""Runs `ray.serve.llm` with vLLM until SIGTERM, with default settings except those required for a CPU and for this
machine's ports.

python -m benchmarks.league.ray_llm MODEL --name m --port 8000 --cpus 2 --temp-dir /tmp/r --engine '{"dtype": "float32"}'
"""

from __future__ import annotations

import json
import signal

import click


@click.command()
@click.argument("model")
@click.option("--name", required=True)
@click.option("--port", type=int, required=True)
@click.option("--cpus", type=int, required=True, help="CPUs that Ray manages.")
@click.option("--temp-dir", required=True, help="Ray's temporary folder; a short path, since sockets are in it.")
@click.option("--engine", default="{}", help="vLLM's engine arguments as JSON.")
def main(model: str, name: str, port: int, cpus: int, temp_dir: str, engine: str) -> None:
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, LLMServingArgs, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": model},
        accelerator_config={"kind": "cpu"},
        engine_kwargs=json.loads(engine),
    )
    signals = {signal.SIGTERM, signal.SIGINT}
    ray.init(
        address="local",
        num_cpus=cpus + 2,  # Serve's ingress claims some as well; vLLM binds its threads itself
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=temp_dir,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_openai_app(LLMServingArgs(llm_configs=[config])), blocking=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.sigwait(signals)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()

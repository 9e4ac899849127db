"""The engine's own process: `python -P -m reftserve.server.engine.process --folder ...`.

Standard input is one line, the EngineConfig as JSON; when the parent ends and closes it, this process exits. Messages
cross one ZeroMQ PAIR socket, which the parent binds. Both sides queue, so a slow reader never delays a step.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import msgspec
import torch
import zmq

from reftserve.interventions import InterventionError
from reftserve.server.base.cuda_weights import lend_weights
from reftserve.server.base.folder import eos_token_ids
from reftserve.server.base.kernel_choice import KernelChoice, kernel_choice
from reftserve.server.base.memory import freeze_gc
from reftserve.server.base.model import resolve_device, resolve_dtype
from reftserve.server.base.model_errors import BaseModelError
from reftserve.server.base.tokenizer import load_tokenizer
from reftserve.server.base.weights import load_base
from reftserve.server.engine.config import EngineConfig
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.engine_errors import EngineError
from reftserve.server.engine.engine_folder import RunningRecord, socket_address
from reftserve.server.engine.grammar_masks import GrammarCompiler
from reftserve.server.engine.messages import Cancel, Fatal, FromEngine, Ready, Submit, ToEngine
from reftserve.server.engine.runner import Runner
from reftserve.server.settings import LOG_FORMAT

logger = logging.getLogger(__name__)
LOADING_POLL_MS = 1


def main() -> None:
    """Run the engine's process."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--folder", type=Path, required=True)
    folder = arguments.parse_args().folder
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    config = msgspec.json.decode(sys.stdin.readline(), type=EngineConfig)
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(socket_address(folder))
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromEngine) -> None:
        socket.send(encoder.encode(message))

    try:
        engine, ready = build(config, running=RunningRecord(folder))
    except (BaseModelError, EngineError, InterventionError, OSError, ValueError, RuntimeError) as cause:
        send(Fatal(f"{type(cause).__name__}: {cause}"))
        socket.close(linger=1000)
        sys.exit(1)
    freeze_gc()
    send(ready)
    decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
    while True:
        wait_ms = 0 if engine.has_work else LOADING_POLL_MS if engine.is_loading else None
        while socket.poll(wait_ms):
            _take(engine, decoder.decode(socket.recv()))
            wait_ms = 0
        output = engine.step()
        if output.outputs:
            send(output)


def build(
    config: EngineConfig, kernels: KernelChoice | None = None, running: RunningRecord | None = None
) -> tuple[Engine, Ready]:
    """Load the model and create the engine. kernels: None follows the config. Raises as `load_base` and `Runner` do."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    folder = Path(config.model_folder)
    shared = None if config.weights_folder is None else Path(config.weights_folder)
    kernels = kernels or kernel_choice(config.cpu_kernels, shared)
    model = load_base(
        folder,
        resolve_dtype(config.dtype, device),
        device,
        kernels=kernels,
        shared=shared,
    )
    lent = lend_weights(model)
    tokenizer = load_tokenizer(folder)
    runner = Runner(
        model,
        kv_cache_bytes=config.kv_cache_bytes,
        block_size=config.block_size,
        bank_bytes=config.bank_bytes,
        int8=config.quantization == "int8",
        kernels=kernels,
        recorded_rows=config.max_sequences if config.cuda_graphs else 0,
    )
    if device.type == "cpu":
        logger.info(kernels.describe())
    engine = Engine(
        runner,
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        host_bytes=config.host_bytes,
        prefix_cache=config.prefix_cache,
        overlap=device.type == "cuda",
        on_admission=running.write if running is not None else None,
        grammars=GrammarCompiler(tokenizer, eos_token_ids(folder, tokenizer), runner.config.vocab_size),
    )
    ready = Ready(
        max_context=runner.max_context,
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        max_sequences=config.max_sequences,
        block_size=config.block_size,
        lent=lent,
    )
    return engine, ready


def _take(engine: Engine, message: ToEngine) -> None:
    match message:
        case Submit():
            engine.submit(message)
        case Cancel():
            engine.cancel(message.request_id)


def _exit_with_parent() -> None:
    while sys.stdin.read(4096):
        pass
    # The engine has no state to save.
    os._exit(0)


if __name__ == "__main__":
    main()

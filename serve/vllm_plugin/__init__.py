"""Repairs to vLLM, installed by its own plugin entry point (`vllm.general_plugins`).

vLLM calls `register` in every process it starts, before the model is built.
"""

import multiprocessing
import os
import signal
import threading


def register() -> None:
    """Install the repairs that the installed vLLM still needs. Safe to call more than once."""
    from serve.observability import logs
    from serve.vllm_plugin import cpu_lora, kernel_hub, w8a8

    logs.install_as_child()
    kernel_hub.install()
    cpu_lora.install()
    w8a8.install()
    end_with_parent()


def end_with_parent() -> None:
    """In a process that multiprocessing has started: vLLM's core, and its workers.

    vLLM's core outlives a replica that is killed, and with it the model's memory: nobody tells it.
    """
    parent, name = multiprocessing.parent_process(), "parent-watch"
    if parent is None or any(thread.name == name for thread in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name=name, daemon=True).start()

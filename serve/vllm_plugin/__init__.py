"""Repairs vLLM from within: a plugin of its entry point group `vllm.general_plugins`.

vLLM calls `register` in every process it starts, before the model is built.
"""

import multiprocessing
import os
import signal
import threading


def register() -> None:
    """Installs the repairs that the installed vLLM still needs. Safe to call more than once."""
    from serve.observability import logs
    from serve.vllm_plugin import cpu_lora, cpu_slots, grammar_threads, kernel_hub, w8a8

    logs.install_as_child()
    kernel_hub.install()
    if cpu_lora.install():
        cpu_slots.install()
    w8a8.install()
    grammar_threads.install()
    end_with_parent()


def end_with_parent() -> None:
    """Ends this process with its parent, if multiprocessing has started it: vLLM's core, and its workers.

    vLLM's core would outlive a replica that is killed, and keep the model's memory.
    """
    parent, name = multiprocessing.parent_process(), "parent-watch"
    if parent is None or any(thread.name == name for thread in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name=name, daemon=True).start()

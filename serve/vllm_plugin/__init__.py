"""Repairs to vLLM, installed by its own plugin entry point (`vllm.general_plugins`).

vLLM calls `register` in every process it starts, before the model is built.
"""


def register() -> None:
    """Install the repairs that the installed vLLM still needs. Safe to call more than once."""
    from serve import logs
    from serve.vllm_plugin import cpu_lora, w8a8

    logs.install_as_child()
    cpu_lora.install()
    w8a8.install()

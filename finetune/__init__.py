"""From a customer's conversations to a published LoRA adapter: prepare, train, evaluate, gate, publish.

Nothing is imported here: `serve` reads `finetune.card` in processes that must never load torch.
"""

"""Turns a customer's conversations into a published LoRA adapter: prepare, train, evaluate, gate, publish.

This file imports nothing: `serve` reads `finetune.card` in processes that must never load torch.
"""

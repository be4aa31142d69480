"""LangChain's standard tests of chat models, for the two providers that speak our APIs.

pytest of the drives' own environment collects this file; nothing of ours imports it. A base of random
weights cannot decide by itself to call a tool: the tests that need that are expected to fail.
"""

import os
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

URL, KEY, MODEL = (os.environ[f"BESPOKE_{name}"] for name in ("URL", "KEY", "MODEL"))


class Standard(ChatModelIntegrationTests):
    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def enable_vcr_tests(self) -> bool:
        return False


class TestOpenAI(Standard):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        common = {"temperature": 0, "max_tokens": 200, "max_retries": 0, "stream_usage": True}
        return common | {"model": MODEL, "base_url": f"{URL}/v1", "api_key": KEY}

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestAnthropic(Standard):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": URL, "api_key": KEY, "temperature": 0, "max_retries": 0}

"""Reads all settings of the serving side from a profile (`configs/serve/*.yaml`) and `BESPOKE_*`.

Only the composition roots (`deployment/`, `cli.py` and `commands/`) see this object; below them settings
travel as plain values. Unknown names are errors: a typing mistake must not silently mean a default.
"""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

# An origin as browsers send it; ":*" stands for any port.
Origin = Annotated[str, Field(pattern=r"^(\*|https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:(\d{1,5}|\*))?)$")]
LOOPBACK_ORIGINS = [
    f"{scheme}://{host}:*" for scheme in ("http", "https") for host in ("localhost", "127.0.0.1", "[::1]")
]


class EngineSettings(BaseSettings):
    """Holds the settings of one vLLM engine. A name is vLLM's where the meaning is the same."""

    model_config = SettingsConfigDict(extra="forbid")

    dtype: str = "auto"
    max_model_len: int = Field(2048, ge=64)
    max_num_seqs: int = Field(32, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=64)
    max_loras: int = Field(16, ge=0)  # 0: no adapters, only the base
    max_cpu_loras: int = Field(64, ge=1)
    slot_patience_s: float = Field(0.5, ge=0)  # how long a request waits before it takes another's slot
    max_lora_rank: int = Field(16, ge=1)
    kv_cache_gib: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    device: str = Field("cpu", pattern="^(cpu|gpu)$")
    compute_threads: int | None = Field(None, ge=1)  # of one engine on a CPU; None: its share of the cores
    enforce_eager: bool = False


class LimitSettings(BaseSettings):
    """Holds the bounds on requests, files and batches. They are checked before any work begins."""

    model_config = SettingsConfigDict(extra="forbid")

    body_bytes: int = Field(1 << 20, ge=1024)
    messages: int = Field(256, ge=1, le=2048)
    n: int = Field(8, ge=1, le=64)
    stop_sequences: int = Field(4, ge=1, le=2048)
    completion_tokens: int = Field(2048, ge=1)
    tools: int = Field(128, ge=1, le=2048)
    prompts: int = Field(32, ge=1, le=64)
    body_timeout_s: float = Field(30.0, gt=0)
    file_bytes: int = Field(16 << 20, ge=1024)
    files_per_tenant: int = Field(1000, ge=1)
    files_bytes_per_tenant: int = Field(1 << 30, ge=1024)
    batch_lines: int = Field(10_000, ge=1)
    batches_per_tenant: int = Field(20, ge=1)  # unfinished ones
    batch_requests: int = Field(8, ge=1)  # in flight, of all batches of a gateway
    ongoing_requests: int = Field(128, ge=1)
    queued_requests: int = Field(256, ge=1)


class ScalingSettings(BaseSettings):
    """Holds a deployment's autoscaling. Without `replicas_max` the number of replicas is fixed."""

    model_config = SettingsConfigDict(extra="forbid")

    replicas_max: int | None = Field(None, ge=1)
    requests_per_replica: float = Field(16.0, gt=0)
    up_after_s: float = Field(10.0, ge=0)
    down_after_s: float = Field(300.0, ge=0)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="BESPOKE_", env_nested_delimiter="__", extra="forbid", validate_default=True
    )

    home: Path = Path(".bespoke")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    bases: list[str] = ["smollm2-135m"]
    cors_origins: list[Origin] = LOOPBACK_ORIGINS  # of web pages that may call the API; none: []
    database_url: SecretStr | None = None
    gateway_replicas: int = Field(1, ge=1)
    engine_replicas: int = Field(1, ge=1)
    accept_timeout_s: float = Field(20.0, gt=0)
    request_timeout_s: float = Field(600.0, gt=0)
    first_token_timeout_s: float = Field(120.0, gt=0)
    drain_timeout_s: float = Field(60.0, ge=0)
    metrics_adapters: int = Field(100, ge=0)
    metrics_token: SecretStr | None = Field(None, min_length=1)
    log_format: str = Field("json", pattern="^(json|text)$")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")  # of Bespoke; others: WARNING
    log_file_bytes: int = Field(16 << 20, ge=4096)
    log_files: int = Field(5, ge=2)  # per process, the current one included
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://[^/\s]+")  # a collector; None: no traces
    trace_ratio: float = Field(1.0, ge=0, le=1)  # of the requests, unless the client asks for none
    engine: EngineSettings = EngineSettings()
    limits: LimitSettings = LimitSettings()
    gateway_scaling: ScalingSettings = ScalingSettings()
    engine_scaling: ScalingSettings = ScalingSettings()

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "Settings":
        for name in ("gateway", "engine"):
            replicas = getattr(self, f"{name}_replicas")
            replicas_max = getattr(self, f"{name}_scaling").replicas_max
            if replicas_max is not None and replicas_max < replicas:
                raise ValueError(
                    f"{name}_scaling.replicas_max is {replicas_max}, below {name}_replicas ({replicas})"
                )
        return self

    @property
    def engine_here(self) -> EngineSettings:
        """`engine` with this machine's cores, less one, divided among its engines.

        OpenMP's threads wait for each other actively: if all cores compute, one other busy process makes a
        model several times slower (docs/performance.md).
        """
        engines = len(self.bases) * (self.engine_scaling.replicas_max or self.engine_replicas)
        share = (len(os.sched_getaffinity(0)) - 1) // engines
        threads = self.engine.compute_threads or max(1, share)
        return self.engine.model_copy(update={"compute_threads": threads})

    @property
    def bases_dir(self) -> Path:
        return self.home / "bases"

    @property
    def adapters_dir(self) -> Path:
        return self.home / "adapters"

    @property
    def files_dir(self) -> Path:
        return self.home / "files"

    @property
    def checkpoints_dir(self) -> Path:
        return self.home / "checkpoints"

    @property
    def logs_dir(self) -> Path:
        return self.home / "logs"

    @property
    def invoices_dir(self) -> Path:
        return self.home / "invoices"

    @property
    def store_url(self) -> str:
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.home.resolve() / 'ledger.db'}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Strongest first: the command line, then the environment, then the profile.
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_settings(profile: Path | None = None, **overrides: Any) -> Settings:
    """Settings from `profile` (YAML), `BESPOKE_*` and `overrides`; a later source wins.

    Raises:
        pydantic.ValidationError: names every unknown or ill-typed setting at once.
    """
    given = {name: value for name, value in overrides.items() if value is not None}

    class Profiled(Settings):
        model_config = SettingsConfigDict(yaml_file=profile)

    return Settings.model_validate(Profiled(**given).model_dump()) if profile else Settings(**given)

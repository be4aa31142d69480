"""Names, prices and a moment in time that many tests share."""

from datetime import UTC, datetime
from pathlib import Path

from serve.billing.pricing.plans import PricePlan, Rates

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
CONFIGS = Path(__file__).parents[2] / "configs"
TINY, TINY_TWO = "tiny", "other-tiny"
MINILM = "minilm-l6"  # makes embeddings
TENANTS = ("lumen-bikes", "tidewater-tea")

RATES = Rates(
    prompt_nanos_per_mtok=100_000_000,
    cached_prompt_nanos_per_mtok=50_000_000,
    completion_nanos_per_mtok=400_000_000,
)
PLAN = PricePlan(name="standard", currency="USD", base=RATES, adapter=RATES)

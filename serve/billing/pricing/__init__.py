"""Pricing: plans and their versions, tiers, and the rating of a month."""

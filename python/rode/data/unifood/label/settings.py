"""What the label stage can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LabelSettings:
    base_url: str = "https://api.openai.com/v1"
    """Of any OpenAI-compatible server, a local one as well."""
    model: str = "gpt-4o"
